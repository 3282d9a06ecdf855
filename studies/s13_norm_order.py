"""S13: text 000's order inside blocks, convolution, activation, norm, against norm first."""

from dataclasses import replace

from matplotlib.figure import Figure

from figures import NOISE_AXIS, canvas, decorate, lines
from harness import (
    LEVELS,
    Claim,
    Judgement,
    Lab,
    Numbers,
    Study,
    Table,
    Training,
    Verdict,
    mean,
    spread,
)
from nets import STEPS, small_unet
from pictures import Fields
from undiffuse.spec import Order, UNetSpec

FIELDS = Fields(16, 16, torus=32)
FIRST, LAST, ZEROS = "norm first", "norm last (text 000)", "norm first, blocks start at zero"
CLEAR = 1.1  # times the excess
BINS = 30


def specs() -> dict[str, UNetSpec]:
    """Both orders with torch's usual start, and norm first with the start that it allows."""
    plain = small_unet(zero_init=False)
    last = replace(plain, style=replace(plain.style, order=Order.CONV_ACT_NORM))
    return {FIRST: plain, LAST: last, ZEROS: small_unet()}


def training(name: str, spec: UNetSpec, seed: int, steps: int) -> Training:
    """One of them on fields."""
    return Training(name, spec, FIELDS, seed, steps)


def trainings(lab: Lab) -> list[Training]:
    """Every network with every seed."""
    steps = lab.steps(STEPS)
    return [training(n, spec, s, steps) for n, spec in specs().items() for s in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Errors, the course of training, and seconds."""
    found = dict[str, Numbers]()
    for name, spec in specs().items():
        runs = [training(name, spec, seed, lab.steps(STEPS)) for seed in lab.seeds]
        histories = [lab.history(run) for run in runs]
        found[name] = {
            "losses": [binned(one.losses) for one in histories],
            "clipped": [mean([float((g or 9.0) > 1.0) for g in h.grad_norms]) for h in histories],
            "seconds": [one.seconds_per_step for one in histories],
            "excess": [lab.errors(run)["excess"] for run in runs],
        }
    return {"ratio": list(LEVELS), "networks": found}


def binned(losses: tuple[float | None, ...]) -> list[float]:
    """Means of a thirtieth of the steps each; a loss that is not finite counts as 10."""
    size = max(1, len(losses) // BINS)
    rows = [losses[i : i + size] for i in range(0, size * (len(losses) // size), size)]
    return [mean([10.0 if v is None else v for v in row]) for row in rows]


# --- judging and showing ------------------------------------------------------------------------


def times_worse(numbers: Numbers, name: str, than: str) -> list[float]:
    """Mean excess of one divided by that of another, seed by seed."""
    rows = (numbers["networks"][one]["excess"] for one in (name, than))
    return [mean(a) / mean(b) for a, b in zip(*rows, strict=True)]


def judge(numbers: Numbers) -> Judgement:
    """As good as norm first, or not."""
    worse = times_worse(numbers, LAST, FIRST)
    start = times_worse(numbers, LAST, ZEROS)
    verdict = Verdict.HOLDS if max(worse) <= CLEAR else Verdict.DEPENDS
    verdict = Verdict.FAILS if min(worse) > CLEAR else verdict
    return Judgement(
        verdict,
        f"With the norm last the excess error is {spread(worse)} times that with the norm first,"
        f" all else equal; {spread(start)} times that of norm-first blocks that start at zero.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """One row per network."""
    rows = [
        (
            name,
            spread([row[0] for row in one["losses"]]),
            spread([row[-1] for row in one["losses"]]),
            spread([100 * share for share in one["clipped"]]),
            f"{1000 * min(one['seconds']):.0f}",
            spread([mean(row) for row in one["excess"]]),
        )
        for name, one in numbers["networks"].items()
    ]
    header = (
        "blocks",
        "loss, first thirtieth",
        "last thirtieth",
        "steps clipped, percent",
        "ms per step",
        "excess error, percent",
    )
    return [Table("Training and error", header, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """The course of training, and error by level."""
    drawn, (left, right) = canvas(2)
    nets = numbers["networks"]
    curves = {name: one["losses"] for name, one in nets.items()}
    bins = len(curves[FIRST][0])
    lines(left, [STEPS * (i + 0.5) / bins for i in range(bins)], curves)
    decorate(left, "training step", "loss", "the course of training", "x")
    lines(right, numbers["ratio"], {name: one["excess"] for name, one in nets.items()})
    decorate(right, NOISE_AXIS, "excess error, percent", "at the end", "xy", legend=False)
    return drawn


STUDY = Study(
    id="s13",
    title="Norm first or norm last",
    claims=(
        Claim(
            ("T000-6",),
            "Blocks of convolution, activation, norm, as text 000 prints them, serve as well as the"
            " usual norm, activation, convolution.",
            f"holds if the excess error is at most {CLEAR:g} times that of norm first in every"
            " seed, fails if more in every seed, else depends",
            judge,
        ),
    ),
    how=f"""The small network on fields of 16x16 pixels, with only the order inside residual
    blocks changed; {STEPS} steps of 16 pictures, three seeds. A block that starts at zero needs
    a convolution as its last layer, so norm last cannot have it; for a fair comparison neither
    has it, and norm first with it stands beside.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Loss while training, and error beyond the optimum at the end.",
)

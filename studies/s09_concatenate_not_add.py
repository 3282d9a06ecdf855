"""S9: skips that are concatenated against skips that are added, at equal parameters."""

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
    nearest,
    spread,
)
from nets import STEPS, WIDTHS, small_unet
from pictures import Fields
from undiffuse import cost
from undiffuse.spec import Attn, Concat, Conv, Down, Join, Op, Out, Res, Skip, UNetSpec, Up

FIELDS = Fields(16, 16, torus=32)
BATCH = 16
CONCAT, ADD, NARROW = "concatenated", "added", "added, equal widths"
USUAL = "concatenated, usual program"
WIDER = (12, 22, 30)  # the widths, found by search, that give addition as many parameters
CLEAR = 1.1  # times the excess


def joined(widths: tuple[int, ...], by: Join) -> UNetSpec:
    """A small DDPM-like network in which every skip is as wide as the features it meets.

    Width changes in `Down` and `Up`, so that each skip can be added as well as concatenated.
    """
    program: list[Op] = [Conv(widths[0]), Skip()]
    for level, width in enumerate(widths):
        program += [Down(width=width), Skip()] if level else []
        program += [Res(width), Skip()]
    program += [Res(widths[-1]), Attn(), Res(widths[-1])]
    for level, width in reversed(list(enumerate(widths))):
        program += [Concat(by), Res(width), Concat(by), Res(width)]
        program += [Up(width=widths[level - 1])] if level else []
    return UNetSpec(1, 1, (*program, Out()), small_unet().style)


def specs() -> dict[str, UNetSpec]:
    """Concatenation, addition at equal parameters, addition at equal widths, and the usual
    program, whose skips cannot be added."""
    whole = joined(WIDTHS, Join.CONCAT)
    wanted = cost.total_parameters(whole)
    wider = nearest([joined(WIDER, Join.ADD)], wanted)
    narrow = joined(WIDTHS, Join.ADD)
    return {CONCAT: whole, ADD: wider, NARROW: narrow, USUAL: small_unet()}


def training(name: str, spec: UNetSpec, seed: int, steps: int) -> Training:
    """One of them on fields."""
    return Training(f"skips {name}", spec, FIELDS, seed, steps, batch=BATCH)


def trainings(lab: Lab) -> list[Training]:
    """Every network with every seed."""
    steps = lab.steps(STEPS)
    return [training(n, spec, s, steps) for n, spec in specs().items() for s in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Error, parameters, multiply-adds, memory and time of each."""
    steps, found = lab.steps(STEPS), dict[str, Numbers]()
    for name, spec in specs().items():
        runs = [training(name, spec, seed, steps) for seed in lab.seeds]
        found[name] = {
            "parameters": cost.total_parameters(spec),
            "multiply_adds": cost.total_multiply_adds(spec, FIELDS.height, FIELDS.width),
            "kept_bytes": kept_bytes(spec),
            "seconds": [lab.history(run).seconds_per_step for run in runs],
            "excess": [lab.errors(run)["excess"] for run in runs],
        }
    return {"ratio": list(LEVELS), "networks": found}


def kept_bytes(spec: UNetSpec) -> int:
    """What a batch keeps for the backward pass: what memory grows by per batch."""
    one, two = (cost.training_bytes(spec, FIELDS.height, FIELDS.width, b) for b in (1, 2))
    return (two - one) * BATCH


# --- judging and showing ------------------------------------------------------------------------


def times_worse(numbers: Numbers, name: str, than: str) -> list[float]:
    """Mean excess of one divided by that of another, seed by seed."""
    rows = (numbers["networks"][one]["excess"] for one in (name, than))
    return [mean(a) / mean(b) for a, b in zip(*rows, strict=True)]


def judge(numbers: Numbers) -> Judgement:
    """At equal parameters, against the better of the two networks that concatenate."""
    nets = numbers["networks"]
    ends = {name: [mean(row) for row in nets[name]["excess"]] for name in (CONCAT, USUAL)}
    better = min(ends, key=lambda name: mean(ends[name]))
    worse, same = times_worse(numbers, ADD, better), times_worse(numbers, ADD, CONCAT)
    verdict = Verdict.HOLDS if min(worse) >= CLEAR else Verdict.DEPENDS
    verdict = Verdict.FAILS if mean(worse) <= 1.0 else verdict
    return Judgement(
        verdict,
        f"Added skips give {spread(same)} times the excess error of concatenated ones in the same"
        f" program, and {spread(worse)} times that of the better of two programs that concatenate"
        f" ('{better}').",
    )


def judge_memory(numbers: Numbers) -> Judgement:
    """Of the widths that addition allows at equal parameters, and of equal widths."""
    nets = numbers["networks"]
    equal, narrow = (
        nets[name]["kept_bytes"] / nets[CONCAT]["kept_bytes"] for name in (ADD, NARROW)
    )
    votes = (equal < 0.95, narrow < 0.95)
    verdict = Verdict.HOLDS if all(votes) else Verdict.DEPENDS if any(votes) else Verdict.FAILS
    return Judgement(
        verdict,
        f"For the backward pass addition keeps {100 * narrow:.0f} % of the memory of concatenation"
        f" at equal widths, but {100 * equal:.0f} % at equal parameters.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """One row per network."""
    rows = [
        (
            name,
            f"{one['parameters']:,}",
            f"{one['multiply_adds'] / 1e6:.1f} M",
            f"{one['kept_bytes'] / 2**20:.1f} MiB",
            f"{1000 * min(one['seconds']):.0f}",
            spread([mean(row) for row in one["excess"]]),
        )
        for name, one in numbers["networks"].items()
    ]
    header = (
        "skips",
        "parameters",
        "multiply-adds",
        f"kept for backward, batch {BATCH}",
        "ms per step",
        "excess error, percent",
    )
    return [Table("Cost and error, averaged over noise levels", header, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """Excess by level, and divided by that of concatenation."""
    drawn, (left, right) = canvas(2)
    nets = numbers["networks"]
    lines(left, numbers["ratio"], {name: one["excess"] for name, one in nets.items()})
    decorate(left, NOISE_AXIS, "excess error, percent", "error by noise level", "xy")
    apart = {
        name: [
            [a / b for a, b in zip(row, base, strict=True)]
            for row, base in zip(one["excess"], nets[CONCAT]["excess"], strict=True)
        ]
        for name, one in nets.items()
    }
    lines(right, numbers["ratio"], apart)
    decorate(
        right, NOISE_AXIS, "times the excess", "compared with concatenation", "x", legend=False
    )
    return drawn


STUDY = Study(
    id="s09",
    title="Skips: concatenate or add",
    claims=(
        Claim(
            ("T003-11", "T000-13"),
            "Skips should be concatenated; adding them loses information.",
            "excess error with added skips, divided by that of the better (on average) of two"
            f" networks that concatenate: holds if at least {CLEAR:g} in every seed, fails if at"
            " most 1 on average, else depends",
            judge,
        ),
        Claim(
            ("T003-11",),
            "Addition is the more memory-efficient of the two.",
            "two tests: at least 5 % less memory kept for the backward pass, at equal widths and at"
            " equal parameters. Both: holds, none: fails, else depends",
            judge_memory,
        ),
    ),
    how=f"""Fields of 16x16 pixels. Width changes in the resampling layers, so that each skip is
    as wide as the features it meets and can be added to them. Of the networks with added skips
    one has the widths of the network with concatenated skips, and one is widened to its
    parameters, within 1 %. The usual program, whose widths change in blocks, stands beside them
    with 2 % fewer parameters. {STEPS} steps of {BATCH} pictures, three seeds. Memory is
    counted, not measured.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Error beyond the optimum, and the same divided by that of the first network.",
)

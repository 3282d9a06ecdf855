"""S15: the networks of the four texts, shrunk to equal parameters, side by side."""

from dataclasses import replace
from itertools import chain

from matplotlib.figure import Figure

from figures import COLOURS, MARKERS, NOISE_AXIS, canvas, decorate, lines
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
from nets import STEPS, small_text003, small_unet
from pictures import Fields
from undiffuse import cost, recipes
from undiffuse.spec import (
    Attn,
    Concat,
    Down,
    Downsampling,
    Embedding,
    Out,
    Res,
    Skip,
    UNetSpec,
    Up,
    Upsampling,
)

FIELDS = Fields(16, 16, torus=32)
NAMES = ("text 000", "text 001", "text 002", "text 003")
WIDTHS = ((14, 30, 45), (10, 20, 28), (12, 28, 32))  # of texts 000, 002, 003, found by search
ALIKE, APART = 1.5, 2.0  # worst excess / best excess


def small_text000(widths: tuple[int, int, int]) -> UNetSpec:
    """Text 000's printed network for one channel and other widths."""
    first, second, third = widths
    program = (
        *chain.from_iterable((Res(w), Skip(), Down(Downsampling.MAX)) for w in widths),
        *(Res(third), Attn()),
        *chain.from_iterable(
            (Up(Upsampling.NEAREST), Concat(), Res(w)) for w in (second, first, first)
        ),
        Out(kernel=1, norm=False),
    )
    embedding = Embedding(32, 128, 32, final_activation=None)
    style = replace(recipes.text000().style, groups=4, embedding=embedding)
    return UNetSpec(1, 1, program, style)


def small_text002(widths: tuple[int, int, int]) -> UNetSpec:
    """Text 002's network for one channel and other widths."""
    spec = recipes.text002(1, widths, 32)
    return replace(spec, style=replace(spec.style, groups=4))


def specs() -> dict[str, UNetSpec]:
    """Four networks of equal parameters, within 1 %; text 001's has its own program."""
    chosen = small_unet()
    wanted = cost.total_parameters(chosen)
    others = (small_text000(WIDTHS[0]), chosen, small_text002(WIDTHS[1]), small_text003(WIDTHS[2]))
    return {name: nearest([spec], wanted) for name, spec in zip(NAMES, others, strict=True)}


def training(name: str, spec: UNetSpec, seed: int, steps: int) -> Training:
    """One of them on fields."""
    return Training(name, spec, FIELDS, seed, steps)


def trainings(lab: Lab) -> list[Training]:
    """Every network with every seed."""
    steps = lab.steps(STEPS)
    return [training(n, spec, s, steps) for n, spec in specs().items() for s in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Parameters, multiply-adds, seconds and error of each."""
    found = dict[str, Numbers]()
    for name, spec in specs().items():
        runs = [training(name, spec, seed, lab.steps(STEPS)) for seed in lab.seeds]
        found[name] = {
            "parameters": cost.total_parameters(spec),
            "multiply_adds": cost.total_multiply_adds(spec, FIELDS.height, FIELDS.width),
            "seconds": [lab.history(run).seconds_per_step for run in runs],
            "excess": [lab.errors(run)["excess"] for run in runs],
        }
    return {"ratio": list(LEVELS), "networks": found}


# --- judging and showing ------------------------------------------------------------------------


def judge_alike(numbers: Numbers) -> Judgement:
    """Best and worst, seed by seed."""
    ends = {name: [mean(r) for r in one["excess"]] for name, one in numbers["networks"].items()}
    apart = [max(seeds) / min(seeds) for seeds in zip(*ends.values(), strict=True)]
    verdict = Verdict.HOLDS if max(apart) <= ALIKE else Verdict.DEPENDS
    verdict = Verdict.FAILS if min(apart) >= APART else verdict
    order = sorted(ends, key=lambda name: mean(ends[name]))
    told = ", ".join(f"{name} {spread(ends[name])} %" for name in order)
    return Judgement(
        verdict,
        f"Excess error from best to worst: {told}. The worst has {spread(apart)} times the best's.",
    )


def judge_per_second(numbers: Numbers) -> Judgement:
    """The order by error alone, and by error times cost."""
    nets = numbers["networks"]
    errors = {name: mean([mean(r) for r in one["excess"]]) for name, one in nets.items()}
    costs = {name: errors[name] * one["multiply_adds"] for name, one in nets.items()}
    best, cheap = min(errors, key=lambda n: errors[n]), min(costs, key=lambda n: costs[n])
    beaten = [n for n in nets if any(_beats(nets, errors, other, n) for other in nets)]
    verdict = Verdict.HOLDS if best == cheap else Verdict.FAILS
    told = ", ".join(beaten) or "none"
    return Judgement(
        verdict,
        f"Least error: {best}; least error times multiply-adds: {cheap}. Networks that another one"
        f" beats in both error and multiply-adds: {told}.",
    )


def _beats(nets: Numbers, errors: dict[str, float], one: str, other: str) -> bool:
    cheaper = nets[one]["multiply_adds"] < nets[other]["multiply_adds"]
    return cheaper and errors[one] < errors[other]


def tables(numbers: Numbers) -> list[Table]:
    """One row per text."""
    rows = [
        (
            name,
            f"{one['parameters']:,}",
            f"{one['multiply_adds'] / 1e6:.1f} M",
            f"{1000 * min(one['seconds']):.0f}",
            spread([row[0] for row in one["excess"]]),
            spread([row[6] for row in one["excess"]]),
            spread([row[-1] for row in one["excess"]]),
            spread([mean(row) for row in one["excess"]]),
        )
        for name, one in numbers["networks"].items()
    ]
    levels = (f"at {numbers['ratio'][i]:g}" for i in (0, 6, -1))
    head = ("network", "parameters", "multiply-adds", "ms per step", *levels, "all levels")
    return [Table("Cost, and excess error in percent by σ/α", head, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """Error by level; error against cost."""
    drawn, (left, right) = canvas(2)
    nets = numbers["networks"]
    lines(left, numbers["ratio"], {name: one["excess"] for name, one in nets.items()})
    decorate(left, NOISE_AXIS, "excess error, percent", "by noise level", "xy")
    for (name, one), colour, marker in zip(nets.items(), COLOURS, MARKERS, strict=False):
        ends = [mean(row) for row in one["excess"]]
        adds = [one["multiply_adds"] / 1e6] * len(ends)
        right.plot(adds, ends, marker, color=colour, ms=5, label=name)
    decorate(right, "multiply-adds per picture, M", "excess error, percent", "error and cost")
    right.set_ylim(bottom=0)
    return drawn


STUDY = Study(
    id="s15",
    title="The four texts' networks side by side",
    claims=(
        Claim(
            ("T000-8", "T001-10", "T002-1", "T003-8"),
            "All four networks do the task about equally well at equal parameters.",
            f"holds if the worst has at most {ALIKE:g} times the excess error of the best in every"
            f" seed, fails if at least {APART:g} times in every seed, else depends",
            judge_alike,
        ),
        Claim(
            ("T000-8", "T001-10", "T002-1", "T003-8"),
            "The network that is best per parameter is best per computation too.",
            "holds if least excess error and least product of excess error and multiply-adds (means"
            " over seeds) fall on the same network, else fails",
            judge_per_second,
        ),
    ),
    how=f"""Each text's program with its own blocks, resampling, skips and embedding, for one
    channel and with widths that make its parameters equal within 1 % (three levels; text 001's
    is the small network of other studies; groups of norms are 4 everywhere). Fields of 16x16
    pixels, {STEPS} steps of 16 pictures, three seeds, the same data and noise for all.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Left: error beyond the optimum. Right: the same, averaged over levels, against"
    " cost; one point per seed.",
)

"""S4: a plain CNN, and a U-Net with one thing taken away, against the exact optimum."""

from dataclasses import replace
from functools import cache, partial

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
    step_seconds,
    time_blind,
)
from nets import (
    FIELDS,
    REFERENCE,
    SHAPES,
    STEPS,
    plain_cnn,
    reference,
    small_text003,
    small_unet,
    without_attention,
    without_skips,
)
from undiffuse import cost
from undiffuse.spec import UNetSpec

UNET = "U-Net"
PLAIN, PLAIN_FAST = "plain CNN, equal parameters", "plain CNN, equal multiply-adds"
CUT, BLIND, NO_ATTENTION = "U-Net without skips", "U-Net, time hidden", "U-Net without attention"
T003, T003_FULL = "text 003's joints", "text 003's joints + full-resolution skip"
MUCH, LITTLE = 1.5, 1.1  # times the excess


def multiply_adds(spec: UNetSpec) -> int:
    """Of one forward pass on a field."""
    return cost.total_multiply_adds(spec, FIELDS.height, FIELDS.width)


@cache
def specs() -> dict[str, UNetSpec]:
    """Networks of equal parameters, but for the one of equal multiply-adds."""
    wanted = cost.total_parameters(REFERENCE)
    plain = [plain_cnn(total) for total in range(120, 320)]
    return {
        UNET: REFERENCE,
        PLAIN: nearest(plain, wanted),
        PLAIN_FAST: nearest(plain, multiply_adds(REFERENCE), multiply_adds),
        CUT: nearest((without_skips(small_unet(w)) for w in SHAPES), wanted),
        BLIND: REFERENCE,
        NO_ATTENTION: without_attention(REFERENCE),
        T003: nearest((small_text003(w) for w in SHAPES), wanted),
        T003_FULL: nearest((small_text003(w, True) for w in SHAPES), wanted),
    }


def training(name: str, spec: UNetSpec, seed: int, steps: int) -> Training:
    """One network on fields; the U-Net is the reference that other studies use too."""
    one = replace(reference(seed, steps), name=name, spec=spec)
    return replace(one, run=time_blind) if name == BLIND else one


def trainings(lab: Lab) -> list[Training]:
    """Every network with every seed."""
    steps = lab.steps(STEPS)
    return [training(n, spec, s, steps) for n, spec in specs().items() for s in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Excess over the optimum by level, parameters, multiply-adds and seconds of each network."""
    steps, found = lab.steps(STEPS), dict[str, Numbers]()
    for name, spec in specs().items():
        runs = [training(name, spec, seed, steps) for seed in lab.seeds]
        found[name] = {
            "parameters": cost.total_parameters(spec),
            "multiply_adds": multiply_adds(spec),
            "seconds": lab.kept(step_seconds, spec, FIELDS.height, FIELDS.width, lab.count(15)),
            "excess": [lab.errors(one)["excess"] for one in runs],
        }
    return {"ratio": list(LEVELS), "networks": found}


# --- judging ------------------------------------------------------------------------------------


def times_worse(numbers: Numbers, name: str, than: str) -> list[float]:
    """Mean excess over all levels of one network, divided by another's, seed by seed."""
    rows = (numbers["networks"][one]["excess"] for one in (name, than))
    return [mean(a) / mean(b) for a, b in zip(*rows, strict=True)]


def judge(numbers: Numbers, name: str, than: str) -> Judgement:
    """The common rule."""
    worse = times_worse(numbers, name, than)
    holds, fails = min(worse) >= MUCH, mean(worse) < LITTLE
    verdict = Verdict.HOLDS if holds else Verdict.FAILS if fails else Verdict.DEPENDS
    nets = numbers["networks"]
    apart = [
        mean(a) / mean(b)
        for a, b in zip(
            zip(*nets[name]["excess"], strict=True),
            zip(*nets[than]["excess"], strict=True),
            strict=True,
        )
    ]
    most = max(range(len(apart)), key=lambda place: apart[place])
    return Judgement(
        verdict,
        f"Averaged over noise levels its excess is {spread(worse)} times that of '{than}'; the"
        f" factor is largest at σ/α = {numbers['ratio'][most]:g} ({apart[most]:.1f}) and"
        f" {apart[0]:.1f} at {numbers['ratio'][0]:g}.",
    )


def judge_plain(numbers: Numbers) -> Judgement:
    """Both comparisons must hold."""
    both = [judge(numbers, name, UNET) for name in (PLAIN, PLAIN_FAST)]
    verdicts = {one.verdict for one in both}
    verdict = verdicts.pop() if len(verdicts) == 1 else Verdict.DEPENDS
    return Judgement(
        verdict,
        f"At equal parameters: {_lower(both[0].text)} At equal multiply-adds:"
        f" {_lower(both[1].text)}",
    )


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


# --- showing ------------------------------------------------------------------------------------


def tables(numbers: Numbers) -> list[Table]:
    """One row per network."""
    rows = [
        (
            name,
            f"{one['parameters']:,}",
            f"{one['multiply_adds'] / 1e6:.1f} M",
            f"{1000 * one['seconds']:.0f}",
            *(spread([row[i] for row in one["excess"]]) for i in (0, 4, 8, 11)),
            spread([mean(row) for row in one["excess"]]),
        )
        for name, one in numbers["networks"].items()
    ]
    at = [f"at {numbers['ratio'][i]:g}" for i in (0, 4, 8, 11)]
    header = ("network", "parameters", "multiply-adds", "ms per step", *at, "mean of all levels")
    return [Table("Excess error, percent of the optimum", header, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """Excess by level: what is taken away on the left, text 003's joints on the right."""
    drawn, (left, right) = canvas(2, width=5.0, height=3.8)
    rows = {name: one["excess"] for name, one in numbers["networks"].items()}
    taken = (UNET, PLAIN, PLAIN_FAST, CUT, BLIND, NO_ATTENTION)
    lines(left, numbers["ratio"], {name: rows[name] for name in taken})
    decorate(left, NOISE_AXIS, "excess error, percent", "one thing taken away", "xy")
    lines(right, numbers["ratio"], {name: rows[name] for name in (UNET, T003, T003_FULL)})
    decorate(right, NOISE_AXIS, "excess error, percent", "where skips are joined", "xy")
    right.set_ylim(left.get_ylim())
    return drawn


RULE = (
    f"holds if its mean excess is at least {MUCH:g} times the other's in every seed, fails if below"
    f" {LITTLE:g} times on average, else depends"
)

STUDY = Study(
    id="s04",
    title="A plain CNN, and U-Nets with something missing",
    claims=(
        Claim(
            ("T003-7",),
            "A plain stack of convolutions that sees 11 pixels and is not told the noise level is"
            " not enough.",
            RULE + "; judged at equal parameters and at equal multiply-adds",
            judge_plain,
        ),
        Claim(
            ("T000-1", "T003-10"),
            "Skips keep what the decoder needs: without them the network is worse.",
            RULE,
            partial(judge, name=CUT, than=UNET),
        ),
        Claim(
            ("T000-4", "T003-3"),
            "The network must be told the noise level.",
            RULE,
            partial(judge, name=BLIND, than=UNET),
        ),
        Claim(
            ("T003-8",),
            "A decoder needs a skip at full resolution (text 003 says so, but its own network has"
            " none: its last join is at half size).",
            RULE,
            partial(judge, name=T003, than=T003_FULL),
        ),
    ),
    how=f"""Trained on fields, {STEPS} steps of 16 pictures, three seeds, noise levels uniform in
    ln σ; all else equal. Parameters agree within 1 % by choice of width; 'without attention'
    and 'time hidden' keep the widths. With time hidden the network always hears timestep 0. The
    excess is the mean squared distance to the exact best denoiser on held-out fields, in
    percent of the best one's own error.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Error beyond the best possible, by noise level. Low is good; 0 would be perfect.",
)

"""S2: what the changes of text 001's scaling table really cost, and what they buy."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure

from figures import COLOURS, MARKERS, canvas, decorate
from harness import (
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
    step_seconds,
)
from nets import FIELDS, small_unet
from undiffuse import cost, recipes
from undiffuse.spec import Attn, UNetSpec, trace

BASE = "as it is"
WIDE, DEEP, MORE_ATTENTION = "2x base width", "2x blocks", "attention one level finer"
LESS_ATTENTION, MORE_LEVELS = "no attention at the coarsest level", "one more level"
VARIANTS = (BASE, WIDE, DEEP, MORE_ATTENTION, LESS_ATTENTION, MORE_LEVELS)
FULL_SIDE = 64
STEPS = 300
LENGTHS = (150, 300, 600, 1000)  # of the unchanged network, for equal time
NEAR = 0.1  # "about"
LIMIT = 300  # seconds for one measurement at full size


def full_specs() -> dict[str, UNetSpec]:
    """Text 001's tested configuration (64 pixels) and its changes."""
    make = recipes.text001
    return {
        BASE: make(),
        WIDE: make(base_channels=256),
        DEEP: make(num_res_blocks=4),
        MORE_ATTENTION: make(attention_levels=(1, 2, 3)),
        LESS_ATTENTION: make(attention_levels=(2,)),
        MORE_LEVELS: make(channel_mults=(1, 2, 2, 4, 4)),
    }


def small_specs() -> dict[str, UNetSpec]:
    """The same changes to the same shape, a sixteenth as wide, one block per level, 32 pixels."""
    widths = (8, 16, 16, 32)
    return {
        BASE: small_unet(widths, 1, (2, 3)),
        WIDE: small_unet(tuple(2 * w for w in widths), 1, (2, 3)),
        DEEP: small_unet(widths, 2, (2, 3)),
        MORE_ATTENTION: small_unet(widths, 1, (1, 2, 3)),
        LESS_ATTENTION: small_unet(widths, 1, (2,)),
        MORE_LEVELS: small_unet((*widths, 32), 1, (2, 3)),
    }


def training(name: str, seed: int, steps: int) -> Training:
    """One variant on fields."""
    return Training(f"scaling: {name}, {steps} steps", small_specs()[name], FIELDS, seed, steps)


def lengths(lab: Lab) -> list[int]:
    """Step counts of the unchanged network."""
    return sorted({lab.steps(n) for n in LENGTHS})


def trainings(lab: Lab) -> list[Training]:
    """Every variant at equal images; the unchanged one at several lengths."""
    equal = [training(name, s, lab.steps(STEPS)) for name in VARIANTS for s in lab.seeds]
    return equal + [training(BASE, s, n) for n in lengths(lab) for s in lab.seeds]


# --- measuring ----------------------------------------------------------------------------------


def measure(lab: Lab) -> Numbers:
    """Counts and seconds at full size, error and seconds of the small networks."""
    tiny = lab.steps(STEPS) < STEPS
    return {
        "full": {
            name: _counted(spec) | ({} if tiny else lab.kept(full_step, name))
            for name, spec in full_specs().items()
        },
        "attention_level": _attention_level(),
        "small": {name: _small(lab, name) for name in VARIANTS},
        "lengths": [_length(lab, n) for n in lengths(lab)],
    }


def _counted(spec: UNetSpec) -> Numbers:
    return {
        "parameters": cost.total_parameters(spec),
        "multiply_adds": cost.total_multiply_adds(spec, FULL_SIDE, FULL_SIDE),
        "attention": sum(
            cost.parameters(s, spec.style) for s in trace(spec) if isinstance(s.op, Attn)
        ),
    }


def _attention_level() -> dict[str, float]:
    """Parameters and multiply-adds of the 32-pixel level with attention there, over without."""
    both = [_level(full_specs()[name], 2) for name in (MORE_ATTENTION, BASE)]
    return {what: both[0][what] / both[1][what] for what in both[0]}


def _level(spec: UNetSpec, scale: int) -> dict[str, int]:
    """Of the layers that stay at one resolution; resampling belongs to no level."""
    sites = [s for s in trace(spec) if s.in_scale == s.out_scale == scale]
    adds = (cost.multiply_adds(s, spec.style, FULL_SIDE, FULL_SIDE) for s in sites)
    parameters = (cost.parameters(s, spec.style) for s in sites)
    return {"parameters": sum(parameters), "multiply_adds": sum(adds)}


def full_step(lab: Lab, name: str) -> Numbers:
    """Seconds and peak bytes of a training step of one picture, in a process of its own."""
    script = Path(__file__).with_name("full_step.py")
    command = [sys.executable, str(script), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    return json.loads(done.stdout)


def _small(lab: Lab, name: str) -> Numbers:
    runs = [training(name, seed, lab.steps(STEPS)) for seed in lab.seeds]
    return {
        "parameters": cost.total_parameters(runs[0].spec),
        "multiply_adds": cost.total_multiply_adds(runs[0].spec, FIELDS.height, FIELDS.width),
        **_errors(lab, runs),
    }


def _step_seconds(lab: Lab, spec: UNetSpec) -> float:
    return lab.kept(step_seconds, spec, FIELDS.height, FIELDS.width, lab.count(15))


def _length(lab: Lab, steps: int) -> Numbers:
    return {"steps": steps, **_errors(lab, [training(BASE, s, steps) for s in lab.seeds])}


def _errors(lab: Lab, runs: Sequence[Training]) -> Numbers:
    return {
        "excess": [mean(lab.errors(run)["excess"]) for run in runs],
        "seconds": runs[0].steps * _step_seconds(lab, runs[0].spec),
    }


# --- judging ------------------------------------------------------------------------------------


def factor(numbers: Numbers, name: str, what: str = "parameters") -> float:
    """A count of one variant over that of the unchanged network."""
    return numbers["full"][name][what] / numbers["full"][BASE][what]


def judge_factor(numbers: Numbers, name: str, low: float, high: float) -> Judgement:
    """The printed factor (or range) of parameters."""
    true = factor(numbers, name)
    right = low * (1 - NEAR) <= true <= high * (1 + NEAR)
    count = numbers["full"][name]["parameters"]
    return Judgement(
        Verdict.HOLDS if right else Verdict.FAILS,
        f"{count:,} parameters, {true:.2f} times as many; multiply-adds"
        f" {factor(numbers, name, 'multiply_adds'):.2f} times.",
    )


def judge_attention(numbers: Numbers) -> Judgement:
    """1.5 times at that level."""
    true = numbers["attention_level"]
    right = abs(true["parameters"] / 1.5 - 1) <= NEAR
    return Judgement(
        Verdict.HOLDS if right else Verdict.FAILS,
        f"The 32-pixel level then has {true['parameters']:.2f} times the parameters (its"
        f" multiply-adds grow {true['multiply_adds']:.2f} times), the whole network"
        f" {factor(numbers, MORE_ATTENTION):.2f} times.",
    )


def judge_removal(numbers: Numbers) -> Judgement:
    """Attention at 8 pixels: minor?"""
    full = numbers["full"]
    less = 100 * (1 - factor(numbers, LESS_ATTENTION))
    gone = full[BASE]["parameters"] - full[LESS_ATTENTION]["parameters"]
    share = 100 * gone / full[BASE]["attention"]
    small = numbers["small"]
    change = _change(small[LESS_ATTENTION]["excess"], small[BASE]["excess"])
    verdict = Verdict.HOLDS if less < 5 else Verdict.FAILS if less > 10 else Verdict.DEPENDS
    return Judgement(
        verdict,
        f"It removes {less:.1f} % of all parameters and {share:.0f} % of attention's, but"
        f" {100 * (1 - factor(numbers, LESS_ATTENTION, 'multiply_adds')):.1f} % of the"
        f" multiply-adds."
        f" In the small network the excess error changes by {spread(change)} %.",
    )


def judge_quality(numbers: Numbers) -> Judgement:
    """Width and blocks, at equal images; equal time is told too."""
    small = numbers["small"]
    wide, deep = (_change(small[name]["excess"], small[BASE]["excess"]) for name in (WIDE, DEEP))
    holds = max(wide) < 0 and max(deep) < 0 and mean(wide) < mean(deep)
    fails = mean(wide) >= 0 and mean(deep) >= 0
    bought = [
        100 * (mean(small[n]["excess"]) / at_equal_time(numbers, small[n]["seconds"]) - 1)
        for n in (WIDE, DEEP)
    ]
    return Judgement(
        Verdict.HOLDS if holds else Verdict.FAILS if fails else Verdict.DEPENDS,
        f"At equal images the excess error changes by {spread(wide)} % with twice the width and by"
        f" {spread(deep)} % with twice the blocks. Against the unchanged network trained for as"
        f" many seconds the changes are {bought[0]:+.0f} % and {bought[1]:+.0f} %.",
    )


def _change(new: Sequence[float], old: Sequence[float]) -> list[float]:
    """In percent, seed by seed."""
    return [100 * (a / b - 1) for a, b in zip(new, old, strict=True)]


def at_equal_time(numbers: Numbers, seconds: float) -> float:
    """Excess of the unchanged network after as many seconds; between lengths on a log-log line."""
    points = [(one["seconds"], mean(one["excess"])) for one in numbers["lengths"]]
    points.sort()
    if len(points) == 1 or seconds <= points[0][0]:
        return points[0][1]
    for (t0, e0), (t1, e1) in pairwise(points):
        if seconds <= t1:
            share = math.log(seconds / t0) / math.log(t1 / t0)
            return math.exp((1 - share) * math.log(e0) + share * math.log(e1))
    return points[-1][1]


# --- showing ------------------------------------------------------------------------------------

PRINTED = {
    BASE: "1",
    WIDE: "about 4",
    DEEP: "about 2",
    MORE_ATTENTION: "about 1.5 at that level",
    LESS_ATTENTION: "minor",
    MORE_LEVELS: "1.5 to 2",
}


def tables(numbers: Numbers) -> list[Table]:
    """Full size, then the small networks."""
    header = ("change", "printed", "parameters", "multiply-adds", "s per step", "peak memory")
    rows = [
        (
            name,
            PRINTED[name],
            f"{one['parameters']:,} ({factor(numbers, name):.2f})",
            f"{one['multiply_adds'] / 1e9:.1f} G ({factor(numbers, name, 'multiply_adds'):.2f})",
            f"{one['seconds']:.1f}" if "seconds" in one else "–",
            f"{one['bytes'] / 1e9:.1f} GB" if "bytes" in one else "–",
        )
        for name, one in numbers["full"].items()
    ]
    title = "Full size: 64 pixels, training steps of one picture (factors in brackets)"
    return [Table(title, header, tuple(rows)), _small_table(numbers)]


def _small_table(numbers: Numbers) -> Table:
    header = (
        "change",
        "parameters",
        "seconds",
        "excess at equal images, percent",
        "unchanged network in the same time",
    )
    rows = [
        (
            name,
            f"{one['parameters']:,}",
            f"{one['seconds']:.0f}",
            spread(one["excess"]),
            f"{at_equal_time(numbers, one['seconds']):.3g}",
        )
        for name, one in numbers["small"].items()
    ]
    return Table("Small networks on 32-pixel fields", header, tuple(rows))


def figure(numbers: Numbers) -> Figure:
    """Factors of parameters and multiply-adds; error against time."""
    drawn, (left, right) = canvas(2, width=4.9)
    changed = VARIANTS[1:]
    for shift, what in ((-0.2, "parameters"), (0.2, "multiply_adds")):
        values = [factor(numbers, name, what) for name in changed]
        places = [i + shift for i in range(len(changed))]
        colour = COLOURS[0 if shift < 0 else 1]
        left.barh(places, values, height=0.36, color=colour, label=what.replace("_", "-"))
        for value, place in zip(values, places, strict=True):
            left.text(value + 0.05, place, f"{value:.2f}", va="center", fontsize=8)
    left.axvline(1, color="#20262e", lw=1)
    left.set_yticks(range(len(changed)), [name.replace(" at ", "\nat ") for name in changed])
    left.invert_yaxis()
    decorate(left, "times the unchanged network", "", "full size")
    line = [(one["seconds"], mean(one["excess"])) for one in numbers["lengths"]]
    right.plot(*zip(*line, strict=True), color="#68727f", lw=1, label="unchanged, 150 … 1000 steps")
    for colour, marker, (name, one) in zip(
        COLOURS, MARKERS, numbers["small"].items(), strict=False
    ):
        right.plot(_points(one), one["excess"], marker, color=colour, ms=5, label=name)
    decorate(right, "seconds of training", "excess error, percent", "small networks", "xy")
    return drawn


def _points(one: Numbers) -> list[float]:
    return [one["seconds"]] * len(one["excess"])


def _claim(says: str, name: str, low: float, high: float) -> Claim:
    wanted = f"{low:g}" if low == high else f"between {low:g} and {high:g}"
    rule = f"holds if the factor is {wanted}, give or take {NEAR:.0%}, else fails"
    return Claim(("T001-17",), says, rule, partial(judge_factor, name=name, low=low, high=high))


STUDY = Study(
    id="s02",
    title="What scaling costs",
    claims=(
        _claim("Twice the base width: about 4 times the parameters.", WIDE, 4, 4),
        _claim("Twice the blocks per level: about twice the parameters.", DEEP, 2, 2),
        Claim(
            ("T001-17",),
            "Attention at 32x32 as well: about 1.5 times the parameters of that level.",
            f"holds if the parameters of that level grow 1.5 times, give or take {NEAR:.0%}",
            judge_attention,
        ),
        Claim(
            ("T001-17",),
            "Removing attention at 8x8 has a minor effect on size.",
            "of the parameters: less than 5 % holds, more than 10 % fails, else depends",
            judge_removal,
        ),
        _claim("One more level: 1.5 to 2 times the parameters.", MORE_LEVELS, 1.5, 2),
        Claim(
            ("T001-17",),
            "Twice the width improves quality much, twice the blocks less.",
            "excess error of the small networks at equal images: holds if both changes lower it in"
            " every seed and width lowers it more on average, fails if neither lowers it on"
            " average, else depends",
            judge_quality,
        ),
    ),
    how=f"""Counts are exact, for text 001's tested configuration. Seconds and peak memory (beyond
    that of the bare program): the faster of two training steps of one picture on one core, each
    network in a process of its own. The small networks have the same shape at a sixteenth of
    the width and one block per level, on fields, {STEPS} steps; the unchanged one was also
    trained for {LENGTHS[0]} to {LENGTHS[-1]} steps, to say what the same time would have
    bought.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Left: growth at full size. Right: error of the small networks against training time,"
    " one point per seed; below the line, a change is worth its time.",
)

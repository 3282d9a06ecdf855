"""S11: one skip, or the output, moved by one pixel in a trained U-Net."""

import itertools

import torch
from matplotlib.figure import Figure
from torch import Tensor

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
    excess_by_level,
    mean,
    spread,
)
from nets import FIELDS, STEPS, reference
from s05_bottleneck_and_skips import silenced
from undiffuse.spec import Skip, UNetSpec, trace
from undiffuse.unet import UNet

OUTPUT = "output"
MATTERS = 10.0  # percent of the optimum's error


def moved(features: Tensor) -> Tensor:
    """Everything one pixel to the right; the left edge is repeated."""
    return torch.cat((features[..., :1], features[..., :-1]), dim=-1)


def places(spec: UNetSpec, size: int) -> dict[str, str]:
    """Name of what is moved -> name of its layer: every skip, then the output."""
    sites = list(trace(spec))
    skips = {
        f"skip at {size // site.out_scale} px, after {type(before.op).__name__}": site.name
        for before, site in itertools.pairwise(sites)
        if isinstance(site.op, Skip)
    }
    return {**skips, OUTPUT: sites[-1].name}


def added(lab: Lab, training: Training, layer: str, count: int) -> list[float]:
    """Error by level with a layer's output moved, less the usual; percent of the optimum."""
    denoiser = lab.trained(training)
    assert isinstance(denoiser.net, UNet)
    whole = excess_by_level(denoiser, FIELDS, count=count)
    with silenced(denoiser.net, (layer,), moved):
        shifted = excess_by_level(denoiser, FIELDS, count=count)
    return [a - b for a, b in zip(shifted, whole, strict=True)]


def trainings(lab: Lab) -> list[Training]:
    """The reference network."""
    return [reference(seed, lab.steps(STEPS)) for seed in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Added error for everything moved."""
    runs, count = trainings(lab), lab.count(32)
    named = places(runs[0].spec, FIELDS.height)
    found = {n: [lab.kept(added, run, layer, count) for run in runs] for n, layer in named.items()}
    return {"ratio": list(LEVELS), "added": found}


# --- judging and showing ------------------------------------------------------------------------


def judge(numbers: Numbers) -> Judgement:
    """The output everywhere, each skip somewhere."""
    output = numbers["added"][OUTPUT]
    skips = {name: rows for name, rows in numbers["added"].items() if name != OUTPUT}
    everywhere = all(v >= MATTERS for row in output for v in row)
    somewhere = [name for name, rows in skips.items() if all(max(r) >= MATTERS for r in rows)]
    verdict = Verdict.HOLDS if everywhere and len(somewhere) == len(skips) else Verdict.DEPENDS
    if not somewhere and all(v < MATTERS for row in output for v in row):
        verdict = Verdict.FAILS
    peaks = [max(row) for row in output]
    return Judgement(
        verdict,
        f"Moving the output by one pixel adds up to {spread(peaks)} % of the optimum's error, and"
        f" {spread([row[-1] for row in output])} % at σ/α = {numbers['ratio'][-1]:g}. Of"
        f" {len(skips)} skips {len(somewhere)} add at least {MATTERS:g} % somewhere when moved.",
    )


def judge_finest(numbers: Numbers) -> Judgement:
    """A pixel of the picture against a pixel of coarser features, which is larger."""
    peaks = {n: mean([max(r) for r in rows]) for n, rows in numbers["added"].items() if n != OUTPUT}
    worst = max(peaks, key=lambda name: peaks[name])
    finest = max(int(name.split()[2]) for name in peaks)
    verdict = Verdict.HOLDS if int(worst.split()[2]) == finest else Verdict.FAILS
    told = "; ".join(f"{name}: {peak:.3g} %" for name, peak in peaks.items())
    return Judgement(verdict, f"Largest added error over noise levels: {told}.")


def tables(numbers: Numbers) -> list[Table]:
    """Added error at some levels."""
    chosen = (0, 3, 6, 9, 11)
    rows = [
        (name, *(spread([row[i] for row in rows]) for i in chosen), _worst_level(numbers, name))
        for name, rows in numbers["added"].items()
    ]
    header = ("moved by one pixel", *(f"{numbers['ratio'][i]:g}" for i in chosen), "worst at σ/α")
    return [Table("Added error, percent of the optimum, by σ/α", header, tuple(rows))]


def _worst_level(numbers: Numbers, name: str) -> str:
    means = [mean(c) for c in zip(*numbers["added"][name], strict=True)]
    return f"{numbers['ratio'][means.index(max(means))]:g}"


def figure(numbers: Numbers) -> Figure:
    """Added error by level."""
    drawn, (axes,) = canvas(1, width=6.4, height=4.0)
    curves = {n: [[max(v, 0.1) for v in r] for r in rows] for n, rows in numbers["added"].items()}
    lines(axes, numbers["ratio"], curves)
    decorate(axes, NOISE_AXIS, "added error, percent", log="xy")
    return drawn


STUDY = Study(
    id="s11",
    title="Off by one pixel",
    claims=(
        Claim(
            ("T003-5",),
            "Prediction and picture must be aligned exactly: an error of one pixel hurts.",
            f"holds if moving the output adds at least {MATTERS:g} % of the optimum's error at"
            " every level and moving any one skip does so at some level, in every seed; fails if"
            " neither the output nor any skip ever does; else depends",
            judge,
        ),
        Claim(
            ("T003-5",),
            "Alignment matters most at full resolution.",
            "holds if, of all skips, moving one of full resolution adds most at its worst level"
            " (mean over seeds), else fails",
            judge_finest,
        ),
    ),
    how="""The reference network, trained on fields. While it denoises held-out fields, the
    features of one skip, or the output of the last layer, are moved one pixel to the right (one
    pixel of their own resolution); the left edge is repeated. The network was not trained for
    that.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Error added by moving one thing by one pixel, by noise level (0.1 stands for less).",
)

"""S5: what a trained U-Net loses when its bottleneck or one skip says nothing."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

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
from undiffuse.spec import Part, Skip, UNetSpec, trace
from undiffuse.unet import UNet

BOTTLENECK, FULL, DEEP = "bottleneck", "all skips at 32 px", "everything at 8 px"
MATTERS = 10.0  # percent of the optimum's error
Rows = list[list[float]]  # by seed, by level
Replace = Callable[[Tensor], Tensor]


def zero(features: Tensor) -> Tensor:
    """Nothing at all."""
    return torch.zeros_like(features)


def average(features: Tensor) -> Tensor:
    """The mean over pictures and positions, which tells nothing of this picture."""
    return features.mean((0, 2, 3), keepdim=True).expand_as(features)


def places(spec: UNetSpec, size: int) -> dict[str, tuple[str, ...]]:
    """Name of what is silenced -> names of layers: the bottleneck, then the skips of each size."""
    sites = list(trace(spec))
    last = [site.name for site in sites if site.part is Part.BOTTLENECK][-1]
    skips = [site for site in sites if isinstance(site.op, Skip)]
    scales = sorted({site.out_scale for site in skips})
    by_size = {
        f"all skips at {size // scale} px": tuple(s.name for s in skips if s.out_scale == scale)
        for scale in scales
    }
    coarsest = size // scales[-1]
    deep = (*by_size[f"all skips at {coarsest} px"], last)
    everything = {f"everything at {coarsest} px": deep, "all skips": sum(by_size.values(), ())}
    return {BOTTLENECK: (last,), **by_size, **everything}


@contextmanager
def silenced(net: UNet, names: Sequence[str], by: Replace) -> Iterator[None]:
    """Inside, the outputs of the named layers are replaced."""
    hooks = [
        net.layers[name].register_forward_hook(lambda layer, x, output: by(output))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def added(
    lab: Lab, training: Training, names: tuple[str, ...], by: Replace, count: int
) -> list[float]:
    """Error by level with the layers silenced, less the error with them; percent of the optimum."""
    denoiser = lab.trained(training)
    assert isinstance(denoiser.net, UNet)
    whole = excess_by_level(denoiser, FIELDS, count=count)
    with silenced(denoiser.net, names, by):
        cut = excess_by_level(denoiser, FIELDS, count=count)
    return [a - b for a, b in zip(cut, whole, strict=True)]


def trainings(lab: Lab) -> list[Training]:
    """The reference network."""
    return [reference(seed, lab.steps(STEPS)) for seed in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Added error for everything silenced, by mean and by zero."""
    runs, count = trainings(lab), lab.count(32)
    named = places(runs[0].spec, FIELDS.height)
    found = {
        by.__name__: {
            name: [lab.kept(added, run, layers, by, count) for run in runs]
            for name, layers in named.items()
        }
        for by in (average, zero)
    }
    return {"ratio": list(LEVELS), **found}


# --- judging and showing ------------------------------------------------------------------------


def judge(numbers: Numbers) -> Judgement:
    """The bottleneck at high noise, the finest skips at low noise."""
    fine, middle, deep = (numbers["average"][name] for name in (FULL, BOTTLENECK, DEEP))
    votes = [vote for one in (middle, deep) for vote in _votes(fine, one)]
    verdict = Verdict.HOLDS if all(votes) else Verdict.DEPENDS if any(votes) else Verdict.FAILS
    first, last = numbers["ratio"][0], numbers["ratio"][-1]
    return Judgement(
        verdict,
        f"At σ/α = {first:g} the error grows by {spread([r[0] for r in fine])} % without the finest"
        f" skips, by {spread([r[0] for r in middle])} % without the bottleneck and by"
        f" {spread([r[0] for r in deep])} % without everything at its resolution; at {last:g} by"
        f" {spread([r[-1] for r in fine])} %, {spread([r[-1] for r in middle])} % and"
        f" {spread([r[-1] for r in deep])} %. Silencing the bottleneck alone never adds more than"
        f" {max(max(row) for row in middle):.2g} % at any level.",
    )


def _votes(fine: Rows, coarse: Rows) -> list[bool]:
    """For every seed: fine matters more at the lowest level, and less at the highest."""
    low = [a[0] > b[0] for a, b in zip(fine, coarse, strict=True)]
    return low + [a[-1] < b[-1] for a, b in zip(fine, coarse, strict=True)]


def judge_onset(numbers: Numbers) -> Judgement:
    """Every scale has its own range of noise levels."""
    centres = {name: _centre(numbers, name) for name in _scales(numbers)}
    order = list(centres.values())
    rising = all(a < b for a, b in pairwise(order))
    told = "; ".join(f"{name} {centre:.2g}" for name, centre in centres.items())
    return Judgement(
        Verdict.HOLDS if rising else Verdict.FAILS,
        f"Noise level around which each matters (mean of ln σ/α weighted with the added error):"
        f" {told}.",
    )


def _scales(numbers: Numbers) -> list[str]:
    """Fine to coarse."""
    skips = [name for name in numbers["average"] if name.startswith("all skips at")]
    return [*sorted(skips, key=lambda name: -int(name.split()[-2]))[:-1], DEEP]


def _centre(numbers: Numbers, name: str) -> float:
    weights = [max(0.0, mean(c)) for c in zip(*numbers["average"][name], strict=True)]
    logs = [math.log(ratio) for ratio in numbers["ratio"]]
    return math.exp(
        sum(w * x for w, x in zip(weights, logs, strict=True)) / max(sum(weights), 1e-9)
    )


def _begins(numbers: Numbers, how: str, name: str) -> str:
    """The range of noise levels at which the mean added error is above `MATTERS`."""
    means = [mean(c) for c in zip(*numbers[how][name], strict=True)]
    above = [r for r, value in zip(numbers["ratio"], means, strict=True) if value >= MATTERS]
    return f"{above[0]:g} … {above[-1]:g}" if above else "nowhere"


def tables(numbers: Numbers) -> list[Table]:
    """Added error at some levels, and where it matters."""
    chosen = (0, 3, 6, 9, 11)
    header = ("silenced", "by", *(f"{numbers['ratio'][i]:g}" for i in chosen), "matters at σ/α")
    rows = [
        (
            name,
            "mean" if how == "average" else "zero",
            *(spread([row[i] for row in rows]) for i in chosen),
            _begins(numbers, how, name),
        )
        for name in numbers["average"]
        for how, rows in (("average", numbers["average"][name]), ("zero", numbers["zero"][name]))
    ]
    title = f"Added error, percent of the optimum, by σ/α (it matters from {MATTERS:g} %)"
    return [Table(title, header, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """Added error by level, for both replacements."""
    drawn, axes = canvas(2, width=4.6)
    for one, how in zip(axes, ("average", "zero"), strict=True):
        curves = {n: [[max(v, 0.1) for v in r] for r in rows] for n, rows in numbers[how].items()}
        lines(one, numbers["ratio"], curves)
        word = "its mean" if how == "average" else "zero"
        decorate(one, NOISE_AXIS, "added error, percent", f"replaced by {word}", "xy")
    return drawn


STUDY = Study(
    id="s05",
    title="What the bottleneck and the skips carry",
    claims=(
        Claim(
            ("T003-13",),
            "At high noise the network leans on its bottleneck, at low noise on its skips.",
            "in each seed, for the bottleneck alone and for everything at its resolution: at the"
            " lowest level silencing the finest skips costs more, at the highest level less. All"
            " true: holds, none: fails, else depends",
            judge,
        ),
        Claim(
            ("T003-12",),
            "Every resolution serves noise of its own scale: the coarser, the noisier.",
            "holds if the noise level around which silencing a resolution matters grows from the"
            " finest skips to everything at the coarsest resolution, else fails",
            judge_onset,
        ),
    ),
    how="""The reference network, trained on fields. While it denoises held-out fields, the output
    of the bottleneck, or all skips of one resolution, is replaced by its mean over pictures and
    positions (so that nothing of this picture is left, but the sizes that later layers expect
    are), or by zero. The network was not trained for that: the numbers say what it uses, not
    what it would need.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Error added by silencing one part of a trained U-Net, by noise level"
    " (0.1 stands for less).",
)

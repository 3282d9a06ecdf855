"""S16: ways of halving and doubling: error, and checkerboards."""

from dataclasses import replace

import torch
from matplotlib.figure import Figure
from torch import Tensor

from figures import bars, canvas, decorate
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
    noised,
    spread,
)
from nets import STEPS, small_unet
from pictures import Fields
from undiffuse import cost
from undiffuse.spec import Down, Downsampling, Op, UNetSpec, Up, Upsampling

FIELDS = Fields(16, 16, torus=32)
DOWNS = {
    "conv 3x3": Downsampling.CONV,
    "conv 4x4": Downsampling.CONV4,
    "max": Downsampling.MAX,
    "average": Downsampling.AVG,
    "unshuffle": Downsampling.UNSHUFFLE,
}
UPS = {
    "nearest + conv": Upsampling.NEAREST_CONV,
    "nearest": Upsampling.NEAREST,
    "transposed 4x4": Upsampling.DECONV4,
}
BASE = "conv 3x3 / nearest + conv"
ALIKE, APART = 1.25, 1.5  # times the excess of the best
CLEAR, SAME = 1.5, 1.1  # times the checkerboard of the usual way up


def resampled(down: Downsampling, up: Upsampling) -> UNetSpec:
    """The small network with other `Down` and `Up`."""
    spec = small_unet()

    def changed(op: Op) -> Op:
        if isinstance(op, Down):
            return Down(down)
        return Up(up) if isinstance(op, Up) else op

    return replace(spec, program=tuple(changed(op) for op in spec.program))


def specs() -> dict[str, UNetSpec]:
    """Every way down with the usual way up, every way up with the usual way down."""
    usual_down, usual_up = BASE.split(" / ")
    pairs = [(name, usual_up) for name in DOWNS] + [(usual_down, name) for name in UPS]
    return {f"{d} / {u}": resampled(DOWNS[d], UPS[u]) for d, u in pairs}


def training(name: str, spec: UNetSpec, seed: int, steps: int) -> Training:
    """One of them on fields."""
    return Training(name, spec, FIELDS, seed, steps)


def trainings(lab: Lab) -> list[Training]:
    """Every network with every seed."""
    steps = lab.steps(STEPS)
    return [training(n, spec, s, steps) for n, spec in specs().items() for s in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Cost, error and checkerboards."""
    found = dict[str, Numbers]()
    for name, spec in specs().items():
        runs = [training(name, spec, seed, lab.steps(STEPS)) for seed in lab.seeds]
        found[name] = {
            "parameters": cost.total_parameters(spec),
            "multiply_adds": cost.total_multiply_adds(spec, FIELDS.height, FIELDS.width),
            "excess": [lab.errors(run)["excess"] for run in runs],
            "checkerboard": [lab.kept(checkerboards, run, lab.count(128)) for run in runs],
        }
    return {"ratio": list(LEVELS), "networks": found}


def checkerboards(lab: Lab, run: Training, count: int) -> list[float]:
    """By level, of what the network's estimate differs from the optimum."""
    denoise, oracle, found = lab.trained(run), FIELDS.oracle(), list[float]()
    for ratio in LEVELS:
        _, x, level = noised(FIELDS, ratio, count)
        with torch.no_grad():
            found.append(checkerboard(denoise(x, level) - oracle(x, level)))
    return found


def checkerboard(residual: Tensor) -> float:
    """Energy of the waves of two pixels, across or down, per energy of those a step longer.

    White noise and everything smooth give about 1; a pattern that repeats every second pixel more.
    """
    half = residual.shape[-1] // 2
    energy = torch.fft.fft2(residual.double()).abs().square().mean((0, 1))
    nyquist = energy[half].mean() + energy[:, half].mean()
    beside = energy[half - 1].mean() + energy[:, half - 1].mean()
    return float(nyquist / beside)


# --- judging and showing ------------------------------------------------------------------------


def excess(numbers: Numbers, name: str) -> list[float]:
    """Mean over levels, seed by seed."""
    return [mean(row) for row in numbers["networks"][name]["excess"]]


def judge_alike(numbers: Numbers) -> Judgement:
    """Any way down, any way up."""
    ends = {name: excess(numbers, name) for name in numbers["networks"]}
    best = min(ends, key=lambda name: mean(ends[name]))
    worst = max(ends, key=lambda name: mean(ends[name]))
    apart = [a / b for a, b in zip(ends[worst], ends[best], strict=True)]
    verdict = Verdict.HOLDS if max(apart) <= ALIKE else Verdict.DEPENDS
    verdict = Verdict.FAILS if min(apart) >= APART else verdict
    return Judgement(
        verdict,
        f"Best is {best} ({spread(ends[best])} % excess), worst {worst} ({spread(ends[worst])} %):"
        f" {spread(apart)} times.",
    )


def judge_deconv(numbers: Numbers) -> Judgement:
    """More energy at the shortest wave than with nearest + conv."""
    nets = numbers["networks"]
    name = BASE.replace("nearest + conv", "transposed 4x4")
    found, usual = ([mean(row) for row in nets[one]["checkerboard"]] for one in (name, BASE))
    verdict = Verdict.HOLDS if min(found) >= CLEAR * mean(usual) else Verdict.DEPENDS
    verdict = Verdict.FAILS if mean(found) <= SAME * mean(usual) else verdict
    return Judgement(
        verdict,
        f"The shortest waves hold {spread(found)} times the energy of those beside them with"
        f" transposed convolutions, {spread(usual)} times with nearest neighbour and a"
        " convolution.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """One row per pair."""
    rows = [
        (
            name,
            f"{one['parameters']:,}",
            f"{one['multiply_adds'] / 1e6:.2f} M",
            spread(excess(numbers, name)),
            spread([mean(row) for row in one["checkerboard"]]),
        )
        for name, one in numbers["networks"].items()
    ]
    header = ("down / up", "parameters", "multiply-adds", "excess error, percent", "checkerboard")
    return [Table("Means over noise levels (checkerboard: 1 is none)", header, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """Bars of both."""
    drawn, (left, right) = canvas(2, width=4.8)
    nets = numbers["networks"]
    bars(left, {name: excess(numbers, name) for name in nets})
    decorate(left, "excess error, percent", "", "error", legend=False)
    bars(right, {n: [mean(r) for r in one["checkerboard"]] for n, one in nets.items()})
    decorate(right, "energy at the shortest wave / beside it", "", "checkerboards", legend=False)
    right.axvline(1.0, color="#68727f", lw=1, ls=":")
    right.set_yticklabels([])
    for axes in (left, right):
        axes.margins(x=0.18)
        axes.set_xlim(left=0)
    return drawn


STUDY = Study(
    id="s16",
    title="Ways of halving and doubling",
    claims=(
        Claim(
            ("T003-15",),
            "Strided convolution or pooling, transposed convolution or interpolation: any will do.",
            f"holds if the worst pair has at most {ALIKE:g} times the excess error of the best in"
            f" every seed, fails if at least {APART:g} times in every seed, else depends",
            judge_alike,
        ),
        Claim(
            ("T002-14",),
            "Transposed convolutions, as text 002 has them, leave checkerboards.",
            "energy of the shortest waves per energy of those beside them, divided by the same with"
            f" nearest neighbour and a convolution: holds if at least {CLEAR:g} in every seed,"
            f" fails if at most {SAME:g} on average, else depends",
            judge_deconv,
        ),
    ),
    how=f"""The small network on fields of 16x16 pixels; each way of halving with the usual way
    of doubling and the other way round; {STEPS} steps of 16 pictures, three seeds. Parameters
    differ and are given. What a network's estimate differs from the exact optimum is split into
    waves; a pattern that repeats every second pixel shows as energy at the shortest wave
    (Nyquist frequency) that its neighbours lack.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Error beyond the optimum, and energy at the shortest wave; dotted: no checkerboard.",
)

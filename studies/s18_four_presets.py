"""S18: the four presets of text 001's table: seconds and memory in full, quality when shrunk."""

import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from figures import COLOURS, MARKERS, NOISE_AXIS, canvas, decorate, lines
from harness import (
    LEVELS,
    SCHEDULE,
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
from nets import FIELDS
from undiffuse import cost, recipes
from undiffuse.config import TrainConfig
from undiffuse.denoiser import Denoiser, KarrasPrecond, uniform_t
from undiffuse.noise import Stream, keyed_normal
from undiffuse.spec import UNetSpec
from undiffuse.training import Recipe, TrainState, train
from undiffuse.unet import UNet

GIB = 2**30
LIMIT = 10 * GIB  # of memory that a child process may ask for
SHRINK, STEPS = 16, 120  # by how much the trained copies are narrower, and their steps
SLOWER, BETTER = 1.2, 0.9  # times the seconds, times the excess of the preset before
Family = Callable[[int, int], UNetSpec]  # (base, channels) -> network


@dataclass(frozen=True)
class Row:
    """A row of the text's table: what it says, and the network that has its name."""

    says: str  # time; quality
    side: int  # pixels
    base: int
    family: Family


def light(base: int, channels: int) -> UNetSpec:
    """Two blocks per level, attention at 16 of 64 pixels."""
    return recipes.ddpm_family(base, (1, 2, 2, 2), 2, (2,), channels)


def improved(base: int, channels: int) -> UNetSpec:
    """Three blocks per level, attention at 16 and 8 of 64 pixels."""
    return recipes.improved_family(base, (1, 2, 3, 4), 3, (2, 3), channels)


def highres(base: int, channels: int) -> UNetSpec:
    """Six levels, attention at 16 of 256 pixels."""
    return recipes.ddpm_family(base, (1, 1, 2, 2, 4, 4), 2, (4,), channels)


ROWS = {
    "Light": Row("fast; good for prototyping", 64, 64, light),
    "DDPM": Row("moderate; publication quality", 64, 128, light),
    "Improved": Row("slow; state of the art", 64, 128, improved),
    "HighRes": Row("very slow; high resolution", 256, 128, highres),
}


def shrunk(row: Row) -> UNetSpec:
    """A sixteenth of the width, one channel, fewer groups, a smaller embedding's vector."""
    spec = row.family(row.base // SHRINK, 1)
    return replace(spec, style=replace(spec.style, groups=2))


def training(name: str, seed: int, steps: int) -> Training:
    """A shrunk preset on fields of 32 pixels."""
    return Training(f"shrunk {name}", shrunk(ROWS[name]), FIELDS, seed, steps)


def trainings(lab: Lab) -> list[Training]:
    """Every preset with every seed."""
    return [training(name, seed, lab.steps(STEPS)) for name in ROWS for seed in lab.seeds]


# --- one step in full ---------------------------------------------------------------------------


def one_step(spec: UNetSpec, side: int) -> Numbers:
    """Seconds of a training step with one picture, after one to warm up, and the memory taken."""
    before = _peak()
    config = TrainConfig(max_train_steps=2, train_batch_size=1)
    net = UNet(spec)
    state = TrainState(net, Denoiser(net, SCHEDULE, KarrasPrecond()), config)

    def source(positions: range) -> tuple[Tensor, None]:
        return keyed_normal(0, Stream.AUGMENT, positions, (spec.in_channels, side, side)), None

    began, seconds = time.perf_counter(), 0.0
    for _ in train(state, source, Recipe(SCHEDULE, uniform_t), config):
        seconds, began = time.perf_counter() - began, time.perf_counter()
    return {"seconds": round(seconds, 3), "bytes": max(1, _peak() - before)}


def limited_step(spec: UNetSpec, side: int, limit: int) -> Numbers:
    """The same in a process of its own, which may ask for `limit` bytes."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return one_step(spec, side)


def _peak() -> int:
    """Most bytes this process has held.

    Linux lets a new process inherit its parent's figure in `getrusage`, but not in `status`.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes
    (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def in_full(lab: Lab, name: str, side: int, base: int) -> Numbers:
    """The step's numbers, or why there are none."""
    spec = ROWS[name].family(base, 3)
    counted: Numbers = {
        "side": side,
        "parameters": cost.total_parameters(spec),
        "multiply_adds": cost.total_multiply_adds(spec, side, side),
        "estimate": cost.training_bytes(spec, side, side, 1),
    }
    if counted["estimate"] > LIMIT:
        return {**counted, "failed": "its estimate is above the limit"}
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return {**counted, **pool.submit(limited_step, spec, side, LIMIT).result()}
        except (MemoryError, BrokenProcessPool, RuntimeError) as error:
            if type(error) is RuntimeError and "memory" not in str(error):
                raise
            return {**counted, "failed": f"{type(error).__name__} under the limit"}


def measure(lab: Lab) -> Numbers:
    """Cost in full; errors and seconds when shrunk."""
    full, small = dict[str, Numbers](), dict[str, Numbers]()
    for name, row in ROWS.items():
        full[name] = lab.kept(in_full, name, lab.count(row.side), lab.count(row.base))
        runs = [training(name, seed, lab.steps(STEPS)) for seed in lab.seeds]
        small[name] = {
            "parameters": cost.total_parameters(runs[0].spec),
            "multiply_adds": cost.total_multiply_adds(runs[0].spec, FIELDS.height, FIELDS.width),
            "seconds": [lab.history(run).seconds_per_step for run in runs],
            "excess": [lab.errors(run)["excess"] for run in runs],
        }
    return {"ratio": list(LEVELS), "full": full, "small": small}


# --- judging and showing ------------------------------------------------------------------------


def judge_time(numbers: Numbers) -> Judgement:
    """Seconds in full where they could be measured, multiply-adds everywhere."""
    full = numbers["full"]
    seconds = {name: one["seconds"] for name, one in full.items() if "seconds" in one}
    grows = [b >= SLOWER * a for a, b in pairwise(seconds.values())]
    verdict = Verdict.HOLDS if grows and all(grows) else Verdict.DEPENDS
    verdict = verdict if any(grows) else Verdict.FAILS
    told = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    missing = [name for name in full if name not in seconds]
    left_out = f" Not measured, for want of memory: {', '.join(missing)}." if missing else ""
    return Judgement(verdict, f"A training step of one picture takes: {told}.{left_out}")


def judge_quality(numbers: Numbers) -> Judgement:
    """The three presets of one size, at equal images."""
    names = list(ROWS)[:3]
    ends = {n: [mean(row) for row in one["excess"]] for n, one in numbers["small"].items()}
    apart = [
        [b / a for a, b in zip(ends[one], ends[two], strict=True)] for one, two in pairwise(names)
    ]
    votes = [max(one) <= BETTER for one in apart]
    verdict = Verdict.HOLDS if all(votes) else Verdict.DEPENDS if any(votes) else Verdict.FAILS
    told = ", ".join(f"{name} {spread(ends[name])} %" for name in ROWS)
    return Judgement(
        verdict,
        f"Excess error of the shrunk networks after equally many pictures: {told}. This is error of"
        " denoising, at widths and a size of our choosing; it says nothing of 'state of the art'.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """In full, and shrunk."""
    full = [(name, ROWS[name].says, *_cells(one)) for name, one in numbers["full"].items()]
    small = [
        (
            name,
            f"{one['parameters']:,}",
            f"{one['multiply_adds'] / 1e6:.0f} M",
            f"{1000 * min(one['seconds']):.0f}",
            spread([mean(row) for row in one["excess"]]),
        )
        for name, one in numbers["small"].items()
    ]
    head_full = (
        "preset",
        "the text says",
        "pixels",
        "parameters",
        "multiply-adds",
        "s per step",
        "memory, GiB",
    )
    head_small = ("shrunk", "parameters", "multiply-adds", "ms per step", "excess error, percent")
    return [
        Table("In full: one training step, one picture, one core", head_full, tuple(full)),
        Table(
            f"At a {SHRINK}th of the width, 32 pixels, 16 pictures a step", head_small, tuple(small)
        ),
    ]


def _cells(one: Numbers) -> tuple[str, ...]:
    counted = (str(one["side"]), f"{one['parameters']:,}", f"{one['multiply_adds'] / 1e9:.1f} G")
    if "failed" in one:
        memory = f"{one['estimate'] / GIB:.1f} (estimate)"
        return (*counted, f"not measured: {one['failed']}", memory)
    return (*counted, f"{one['seconds']:.2f}", f"{one['bytes'] / GIB:.1f}")


def figure(numbers: Numbers) -> Figure:
    """Cost in full; quality when shrunk."""
    drawn, (left, right) = canvas(2)
    for (name, one), colour, marker in zip(numbers["full"].items(), COLOURS, MARKERS, strict=False):
        if "seconds" in one:
            place = ([one["bytes"] / GIB], [one["seconds"]])
            left.plot(*place, marker, color=colour, ms=7, label=name)
    decorate(left, "memory, GiB", "seconds per step of one picture", "in full", "xy")
    small = numbers["small"]
    lines(right, numbers["ratio"], {name: one["excess"] for name, one in small.items()})
    decorate(right, NOISE_AXIS, "excess error, percent", "shrunk", "xy", legend=False)
    return drawn


STUDY = Study(
    id="s18",
    title="Time and quality of the four presets",
    claims=(
        Claim(
            ("T001-13",),
            "From Light over DDPM and Improved to HighRes training gets ever slower.",
            "seconds of a training step of one picture: holds if each preset takes at least"
            f" {SLOWER:g} times those of the one before, fails if none does, else depends",
            judge_time,
        ),
        Claim(
            ("T001-13",),
            "From Light over DDPM to Improved quality gets ever better.",
            f"shrunk, at equal images: holds if each has at most {BETTER:g} times the excess error"
            " of the one before in every seed, fails if neither has, else depends",
            judge_quality,
        ),
    ),
    how=f"""Seconds and memory in full: one training step of one random picture at the preset's
    own size, after one to warm up, in a process that may ask for {LIMIT // GIB} GiB; larger
    batches cost time in proportion. Training the presets in full is beyond what these studies
    spend, so quality is that of copies at a {SHRINK}th of the width on fields of 32x32 pixels,
    {STEPS} steps of 16 pictures, three seeds, attention at the same levels. HighRes is no match
    for so small a picture: its number is given and not judged.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Left: time and memory of the presets. Right: excess error of shrunk copies.",
)

"""Two denoisers on the same pictures and noise, level by level: which is closer."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation._bars import Estimate, Told
from undiffuse.evaluation._losses import (
    RATIOS,
    LevelDenoiser,
    Progress,
    in_batches,
    measured_on,
    noised,
    part_of,
    squares,
    tally,
    watched,
)
from undiffuse.evaluation._split import Split
from undiffuse.evaluation._spread import (
    NO_DIFFERENCE,
    Errors,
    Interval,
    in_units,
    interval,
    quotient,
    reached,
    steps,
)
from undiffuse.noise import NoiseLevel


@dataclass(frozen=True)
class LevelDifference:
    """Mean squared errors of both denoisers at one level, on the same pictures and noise.

    `difference` is a - b with its 95 % bootstrap interval over pictures, `percent` that in per cent
    of b; `better` is "a", "b" or "no difference seen".
    """

    ratio: float
    a: float
    b: float
    difference: Interval
    percent: Interval
    better: str


@dataclass(frozen=True)
class LossDifference:
    """The levels both schedules reach, and the sum of difference / ratio^2 times the step in ln
    ratio: what b costs less than a, per value in nats. `judged` is "without label" or "with label".
    """

    levels: tuple[LevelDifference, ...]
    judged: str
    nats_per_value: Interval
    pictures: int
    values: int
    draws: int
    seed: int

    def asdict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, with the sum in all three units."""
        return asdict(self) | in_units(self.nats_per_value, self.values)


@dataclass(frozen=True)
class Contender:
    """A denoiser, and what it may be told; its network in evaluation mode on `device`."""

    denoiser: LevelDenoiser
    labelled: bool = False
    null: bool = True
    device: torch.device | str = "cpu"


def compare_losses(
    a: Contender,
    b: Contender,
    held_out: Split,
    *,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 256,
    ratios: Sequence[float] = RATIOS,
    progress: Progress = lambda done, total: None,
) -> LossDifference:
    """Held-out errors of two denoisers per noise level, on the same pictures and noise.

    Both are judged without label if they can be, else with. Pictures, noise and errors are those of
    `loss_by_level` with the same `draws` and `seed`.

    Raises:
        ConfigError: `draws` or `batch_size` is below 1, no ratio is in the range of both, or one
            denoiser needs labels that the other cannot take or the pictures do not have.
        DataError: there are no held-out pictures.
    """
    if draws < 1 or batch_size < 1:
        raise ConfigError(f"draws and batch_size must be at least 1; got {draws} and {batch_size}")
    if not len(held_out):
        raise DataError("no held-out pictures to compare losses on")
    judged = _judged(a, b, held_out)
    pictures = measured_on(held_out.on_cpu(), seed)
    pairs = _shared(reached(a.denoiser.schedule, ratios), reached(b.denoiser.schedule, ratios))
    seen = tally(2 * len(pairs) * draws * len(pictures), progress)
    estimates = [
        judged.of(in_batches(watched(one.denoiser, seen), batch_size, one.device)) for one in (a, b)
    ]
    errors = [
        tuple(
            _errors(estimate, pictures, level, range(part_of(place), part_of(place) + draws), seed)
            for estimate, level in zip(estimates, pair, strict=True)
        )
        for place, pair in enumerate(pairs)
    ]
    ratios = [float(level.ratio) for level, _ in pairs]
    weighted = zip(steps(ratios), ratios, errors, strict=True)
    nats = np.sum([w * (of_a - of_b) / ratio**2 for w, ratio, (of_a, of_b) in weighted], axis=0)
    return LossDifference(
        levels=tuple(
            _level(ratio, of_a, of_b, seed)
            for ratio, (of_a, of_b) in zip(ratios, errors, strict=True)
        ),
        judged=judged.value,
        nats_per_value=interval(nats, seed),
        pictures=len(pictures),
        values=pictures.x0[0].numel(),
        draws=draws,
        seed=seed,
    )


def _judged(a: Contender, b: Contender, held_out: Split) -> Told:
    if a.null and b.null:
        return Told.NOTHING
    if a.labelled and b.labelled and held_out.label is not None:
        return Told.LABEL
    raise ConfigError(
        "one of the denoisers must be told the class, which the other cannot take or the pictures"
        " do not have; their losses cannot be compared"
    )


def _shared(a: list[NoiseLevel], b: list[NoiseLevel]) -> list[tuple[NoiseLevel, NoiseLevel]]:
    """Those of equal ratio; as the schedule of either has them."""
    pairs = [
        (one, other)
        for one in a
        for other in b
        if math.isclose(float(one.ratio), float(other.ratio), rel_tol=2e-3)
    ]
    if not pairs:
        raise ConfigError("the schedules of the two denoisers share none of the noise levels")
    return pairs


def _errors(
    estimate: Estimate, pictures: Split, level: NoiseLevel, parts: range, seed: int
) -> Errors:
    """Of every picture, the mean over draws."""
    total = np.zeros(len(pictures))
    for part in parts:
        x = noised(pictures, level, 0, part, seed)
        total += squares(estimate(x, level, pictures.label) - pictures.x0)
    return total / len(parts)


def _level(ratio: float, a: Errors, b: Errors, seed: int) -> LevelDifference:
    difference = interval(a - b, seed)
    return LevelDifference(
        ratio=ratio,
        a=float(a.mean()),
        b=float(b.mean()),
        difference=difference,
        percent=quotient(a - b, b, seed).times(100),
        better=_better(difference),
    )


def _better(difference: Interval) -> str:
    low, high = difference.low, difference.high
    if low is None or high is None or low <= 0 <= high:
        return NO_DIFFERENCE
    return "a" if high < 0 else "b"

"""Means over pictures with what chance alone does to them, and sums over noise levels."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from undiffuse.errors import ConfigError
from undiffuse.noise import NoiseLevel, Schedule, Stream, keyed

RESAMPLES = 1000
NO_DIFFERENCE = "no difference seen"  # where a comparison's interval holds 0

Errors = NDArray[np.float64]  # (n,): per picture, mean over values and draws


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval over pictures; None for a single picture."""

    value: float
    low: float | None
    high: float | None

    def times(self, factor: float) -> "Interval":
        """The same in another unit; `factor` above 0."""
        ends = (None if end is None else factor * end for end in (self.low, self.high))
        return Interval(factor * self.value, *ends)


def in_units(nats_per_value: Interval | None, values: int) -> dict[str, dict[str, Any] | None]:
    """A sum over noise levels per picture in nats, and per value in bits, for JSON."""
    if nats_per_value is None:
        return {"nats_per_picture": None, "bits_per_dimension": None}
    return {
        "nats_per_picture": asdict(nats_per_value.times(values)),
        "bits_per_dimension": asdict(nats_per_value.times(1 / math.log(2))),
    }


@lru_cache(maxsize=3)  # the same pictures are drawn at every level
def counts(pictures: int, seed: int, tag: int) -> NDArray[np.int64]:
    """How often each picture comes in each bootstrap sample: (resamples, pictures)."""
    generator = keyed(seed, Stream.EVALUATE, (1 << 41) + tag)
    drawn = generator.multinomial(pictures, np.full(pictures, 1 / pictures), RESAMPLES)
    drawn.flags.writeable = False
    return drawn


def resampled(values: Errors, seed: int, tag: int) -> NDArray[np.float64]:
    """Means of bootstrap samples of the pictures."""
    return counts(len(values), seed, tag) @ values / len(values)


def interval(values: Errors, seed: int) -> Interval:
    """Paired: `values` are differences picture by picture."""
    ends = bounds(resampled(values, seed, 0)) if len(values) > 1 else (None, None)
    return Interval(float(values.mean()), *ends)


def difference(a: Errors, b: Errors, seed: int) -> Interval:
    """Of the means of two sets of different pictures."""
    value = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Interval(value, None, None)
    return Interval(value, *bounds(resampled(a, seed, 1) - resampled(b, seed, 2)))


def quotient(above: Errors, below: Errors, seed: int) -> Interval:
    """Mean of `above` over mean of `below`, the same pictures in both; not a number below 0 / 0."""
    value = _over(above.mean(keepdims=True), below.mean(keepdims=True))[0]
    if len(above) < 2:
        return Interval(float(value), None, None)
    drawn = counts(len(above), seed, 0)
    return Interval(float(value), *bounds(_over(drawn @ above, drawn @ below)))


def _over(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def bounds(means: NDArray[np.float64]) -> tuple[float, float]:
    """Between which the middle 95 % lie."""
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def steps(ratios: Sequence[float]) -> list[float]:
    """Trapezoidal weights in ln ratio; 1 for a single level."""
    if len(ratios) == 1:
        return [1.0]
    logs = np.log(ratios)
    padded = np.concatenate([logs[:1], logs, logs[-1:]])
    return [float(v) for v in (padded[2:] - padded[:-2]) / 2]


def reached(schedule: Schedule, ratios: Sequence[float]) -> list[NoiseLevel]:
    """The levels of these ratios, rising, without those the schedule would clamp.

    Raises:
        ConfigError: none is left.
    """
    wanted = torch.tensor(sorted(ratios), dtype=torch.float64)
    grid = schedule.at(wanted)
    inside = (grid.ratio - wanted).abs() <= 1e-3 * wanted
    if not bool(inside.any()):
        raise ConfigError(f"the schedule reaches none of the ratios {list(ratios)}")
    rows = zip(*(v[inside] for v in grid), strict=True)
    return [NoiseLevel(*row) for row in rows]

"""A measure between samples and held-out pictures, and the same between real ones: its floor.

As many pictures stand on both sides of either, since what a measure says depends on their number.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from undiffuse.evaluation._features import Features
from undiffuse.evaluation._measures import Points
from undiffuse.evaluation._quality_figure import Figure
from undiffuse.evaluation._split import Sets, shuffled

DRAWS = 20  # random subsets that a floor's mean and deviation come from
FEWER_DRAWS = 5  # where a draw takes long, or varies little

Measure = Callable[[Points, Points], float | Sequence[float]]  # of as many points each


@dataclass(frozen=True)
class Sides:
    """The three sets as points of one space; `name` says which, `seed` decides all draws."""

    samples: Points
    train: Points
    held_out: Points
    name: str
    seed: int

    @property
    def dims(self) -> int:
        """0 where the training pictures do not vary."""
        return self.train.shape[1]

    @property
    def reference(self) -> Points:
        """What samples are measured against."""
        return self.train if self.without_reference else self.held_out

    @property
    def without_reference(self) -> bool:
        """Whether training pictures have to do, for want of held-out ones."""
        return len(self.held_out) < 2

    @cached_property
    def real(self) -> Points:
        """All real points, training and held out."""
        return np.concatenate([self.train, self.held_out])

    def count(self, limit: int | None = None) -> int:
        """How many can stand on both sides, of samples and of real pictures."""
        most = min(len(self.samples), len(self.reference), len(self.real) // 2)
        return most if limit is None else min(most, limit)

    def some(self, points: Points, n: int, draw: int, role: int) -> Points:
        """A random n of the points; sets with different roles are drawn independently."""
        return points[shuffled(len(points), self.seed, tag=(role << 16) + draw)[:n].numpy()]

    def map(self, function: Callable[[Points], Points], name: str) -> "Sides":
        """The same sets in another space."""
        made, known, unseen = (function(p) for p in (self.samples, self.train, self.held_out))
        return Sides(made, known, unseen, name, self.seed)

    def figure(self, name: str, drawn: "BesideReal", better: str, n: int, note: str) -> Figure:
        """The figure of a measure, with a warning where it had no held-out pictures."""
        value, floor, std = drawn
        made = Figure(name, value, floor, std, better, n, self.name, note)
        if not self.without_reference:
            return made
        return made.warned("compared with training pictures, for want of held-out ones")


class BesideReal(NamedTuple):
    """A measure of samples, of real pictures, and the standard deviation of the latter."""

    value: float
    floor: float
    std: float


def sides(sets: Sets, features: Features) -> Sides:
    """What the features make of the three sets."""
    known = features(sets.train.x0)
    made, unseen = (
        features(part.x0) if len(part) else known[:0] for part in (sets.samples, sets.held_out)
    )
    return Sides(made, known, unseen, features.name, sets.seed)


def beside_real(
    points: Sides, n: int, measure: Measure, draws: int | None = None, floors: int | None = None
) -> tuple[BesideReal, ...]:
    """Mean of `measure` over draws of n samples and n held-out pictures, for every number it gives.

    The floor: the same over draws of two sets of n from all real pictures, without one in common.

    Args:
        draws: how many of the former; None: 20.
        floors: how many of the latter, 2 or more; None: 20.
    """
    reference = points.reference
    of_samples = (
        (points.some(points.samples, n, i, role=1), points.some(reference, n, i, role=2))
        for i in range(draws or DRAWS)
    )
    of_real = (
        np.split(points.some(points.real, 2 * n, i, role=4), 2) for i in range(floors or DRAWS)
    )
    value, floor = (_table(measure, pairs) for pairs in (of_samples, of_real))
    std = floor.std(0, ddof=1)
    rows = zip(value.mean(0), floor.mean(0), std, strict=True)
    return tuple(BesideReal(*(float(one) for one in row)) for row in rows)


def _table(measure: Measure, pairs: Iterable[Sequence[Points]]) -> Points:
    """(draws, numbers)."""
    return np.stack([np.atleast_1d(measure(a, b)).astype(np.float64) for a, b in pairs])

"""The two nearest training pictures to every sample, as they are or mirrored and moved."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undiffuse.evaluation._features import area_reduced, flat, principal_axes

Rows = NDArray[np.float32]  # (n, d)

CANDIDATES = 4  # found in float32 by matrix products, then measured again without cancellation
LEAST_SHIFTED = 8  # pixels: of a smaller side a shift by one leaves too little to compare
REDUCED = 128  # dimensions that candidates are found in where pictures were moved


class Neighbours(NamedTuple):
    """For every query the nearest picture, its distance, and the ratio to the second nearest.

    `distance` is the root mean square over the values compared, (n,).
    """

    place: NDArray[np.int64]
    distance: NDArray[np.float64]
    ratio: NDArray[np.float64]

    def at(self, places: slice) -> "Neighbours":
        """Those of the queries at these places."""
        return Neighbours(self.place[places], self.distance[places], self.ratio[places])


@dataclass(frozen=True)
class Look:
    """One way to compare pictures.

    Args:
        queries: what is compared of the queries, once in every variant: (variants, n, d).
        rows: the same of training pictures (m, c, h, w), in their one variant: (m, d).
        reduced: rows in fewer dimensions, to find candidates in.
        marks: of training pictures, equal where two are doubles; a copy must not hide behind one.
    """

    queries: NDArray[np.float32]
    rows: Callable[[Tensor], Rows]
    reduced: Callable[[Rows], Rows]
    marks: Callable[[Tensor], list[bytes]]


def as_they_are(queries: Tensor) -> Look:
    """Compares whole pictures."""
    return Look(flat(queries)[None], flat, lambda rows: rows, _marks)


def moved(queries: Tensor, train: Tensor) -> Look:
    """Compares pictures with mirrored ones, and where they have 8 pixels a side shifted by one.

    The distance is the least over all variants, each over the same number of pixels: those that
    every shift leaves.

    Args:
        train: some pictures like those that will be searched.
    """
    shifts = min(area_reduced(queries[:1]).shape[-2:]) >= LEAST_SHIFTED
    rows, windows = (_inner, _windows) if shifts else (flat, _whole)
    variants = np.concatenate([windows(queries), windows(queries.flip(-1))])
    return Look(variants, rows, _reduction(rows(train)), _marks_of_mirrored)


def _whole(x0: Tensor) -> NDArray[np.float32]:
    return flat(x0)[None]


def _inner(x0: Tensor) -> Rows:
    return area_reduced(x0)[..., 1:-1, 1:-1].flatten(1).numpy()


def _windows(x0: Tensor) -> NDArray[np.float32]:
    """The nine windows of the size of `_inner`, (9, n, d)."""
    x0 = area_reduced(x0)
    h, w = (side - 2 for side in x0.shape[-2:])
    places = [(down, right) for down in range(3) for right in range(3)]
    return np.stack([x0[..., i : i + h, j : j + w].flatten(1).numpy() for i, j in places])


def _reduction(rows: Rows) -> Callable[[Rows], Rows]:
    if rows.shape[1] <= REDUCED:
        return lambda rows: rows
    axes = principal_axes(rows.astype(np.float64)).axes.astype(np.float32)
    return lambda rows: rows @ axes


def _marks(x0: Tensor) -> list[bytes]:
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in flat(x0)]


def _marks_of_mirrored(x0: Tensor) -> list[bytes]:
    """The same for a picture and its mirror image."""
    return [min(pair) for pair in zip(_marks(x0), _marks(x0.flip(-1)), strict=True)]


# --- the search ---------------------------------------------------------------------------------


class Search(NamedTuple):
    """What each look found among `searched` pictures; None where fewer than two are distinct."""

    found: tuple[Neighbours | None, ...]
    searched: int


def nearest(looks: tuple[Look, ...], chunks: Iterable[Tensor]) -> Search:
    """The two nearest distinct pictures to each query, n >= 0, by every look.

    The ratio d1 / d2 is small for a copy alone: between two real neighbours a new picture is about
    as far from one as from the other. An exact copy has ratio 0.

    Args:
        chunks: of pictures (m, c, h, w), read once, one at a time; places count on from one to
            the next.
    """
    states = [_State(look) for look in looks]
    searched = 0
    for chunk in _gathered(chunks):
        for state in states:
            state.search(chunk, searched)
        searched += len(chunk)
    return Search(tuple(state.neighbours() for state in states), searched)


AT_ONCE = 4096  # reduced pictures: every block of them has its own candidates


def _gathered(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same pictures, averaged down, in fewer and larger chunks."""
    held: list[Tensor] = []
    for chunk in chunks:
        held.append(area_reduced(chunk))
        if sum(map(len, held)) >= AT_ONCE:
            yield torch.cat(held)
            held.clear()
    if held:
        yield torch.cat(held)


class _State:
    """What one look has found so far."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.seen: set[bytes] = set()
        self.best = _Two.none(look.queries.shape[1])

    def search(self, chunk: Tensor, before: int) -> None:
        new = self._unseen(chunk)
        if len(new):
            rows = self.look.rows(chunk[torch.from_numpy(new)])
            self.best = self.best.or_nearer(_two_nearest(self.look, rows, new + before))

    def _unseen(self, chunk: Tensor) -> NDArray[np.int64]:
        """Places of the first picture of each kind; copies within the set would make d1 = d2."""
        kept: list[int] = []
        for place, mark in enumerate(self.look.marks(chunk)):
            if mark not in self.seen:
                self.seen.add(mark)
                kept.append(place)
        return np.array(kept, dtype=np.int64)

    def neighbours(self) -> Neighbours | None:
        if len(self.seen) < 2:
            return None
        first, second = self.best.distance.T
        ratio = first / np.maximum(second, np.finfo(np.float64).tiny)
        return Neighbours(self.best.place[:, 0], first, ratio)


class _Two(NamedTuple):
    """Places and distances of the two nearest pictures so far, (n, 2); infinity where none is."""

    place: NDArray[np.int64]
    distance: NDArray[np.float64]

    @staticmethod
    def none(count: int) -> "_Two":
        return _Two(np.zeros((count, 2), np.int64), np.full((count, 2), np.inf))

    def or_nearer(self, other: "_Two") -> "_Two":
        place = np.concatenate([self.place, other.place], 1)
        distance = np.concatenate([self.distance, other.distance], 1)
        rank = np.argsort(distance, axis=1, kind="stable")[:, :2]
        return _Two(np.take_along_axis(place, rank, 1), np.take_along_axis(distance, rank, 1))


def _two_nearest(look: Look, rows: Rows, places: NDArray[np.int64]) -> _Two:
    reduced = look.reduced(rows)
    parts = [
        _two_of_block(look, block, rows, reduced, places)
        for block in _blocks(look.queries.shape[1], max(rows.shape))
    ]
    return _Two(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _blocks(count: int, width: int) -> Iterator[slice]:
    size = max(1, (1 << 24) // (CANDIDATES * max(1, width)))  # 64 MiB of numbers at a time
    starts = range(0, max(1, count), size)  # at least one block, of nothing perhaps
    return (slice(start, start + size) for start in starts)


def _two_of_block(
    look: Look, block: slice, rows: Rows, reduced: Rows, places: NDArray[np.int64]
) -> _Two:
    queries = look.queries[:, block]
    near = [look.reduced(variant) for variant in queries]
    count = min(CANDIDATES, len(rows))
    at = np.argpartition(_least_squares(near, reduced), count - 1, axis=1)[:, :count]
    variant = np.argmin([_apart(one, reduced, at) for one in near], axis=0)  # (n, candidates)
    chosen = queries[variant, np.arange(queries.shape[1])[:, None]].astype(np.float64)
    distance = np.sqrt(np.square(chosen - rows[at]).mean(2))
    return _Two.none(len(at)).or_nearer(_Two(places[at], distance))


def _least_squares(queries: list[Rows], rows: Rows) -> NDArray[np.float32]:
    """Roughly the least squared distance over all variants, (n, m)."""
    least: NDArray[np.float32] | None = None
    for one in queries:
        apart = np.square(one).sum(1)[:, None] + np.square(rows).sum(1) - 2 * (one @ rows.T)
        least = apart if least is None else np.minimum(least, apart, out=least)
    assert least is not None
    return least


def _apart(queries: Rows, rows: Rows, at: NDArray[np.int64]) -> NDArray[np.float32]:
    """Squared distance of every query to its own candidates, (n, candidates)."""
    return np.square(queries[:, None] - rows[at]).sum(2)

"""Whether samples repeat training pictures, as they are or mirrored and shifted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from undiffuse.evaluation._copies_search import (
    LEAST_SHIFTED,
    Neighbours,
    Search,
    as_they_are,
    moved,
    nearest,
)
from undiffuse.evaluation._features import PIXELS
from undiffuse.evaluation._quality_figure import LOWER, Figure, share_std, unmeasured
from undiffuse.evaluation._split import Sets, Split, at_most, check_same_shape

COPY_RATIO = 1 / 3
CLOSEST = 16
MOST_UNSEEN = 1000  # held-out pictures that the floor comes from
MOST_KNOWN = 2000  # training pictures that a search in fewer dimensions is fitted to
NAMES = ("copies", "copies_moved")
_NOTES = (
    "share with d1/d2 < 1/3 to the two nearest distinct ones of {:,} training pictures; blind to"
    " all but copies, and to copies that were shifted or mirrored",
    "the same where every training picture may be mirrored, and shifted by a pixel if it has"
    f" {LEAST_SHIFTED} a side; blind to all but copies, and to copies moved further or of"
    " pictures with a shifted double ({:,} training pictures)",
)


@dataclass(frozen=True)
class Pair:
    """A sample and its nearest training picture, by their places in `samples` and `search`.

    `distance` is the root mean square over pixels; `ratio` is d1 / d2. `moved`: it is a copy that
    was mirrored or shifted, and both numbers are of that comparison.
    """

    sample: int
    train: int
    distance: float
    ratio: float
    moved: bool = False


@dataclass(frozen=True)
class Copies:
    """The figures `copies` and `copies_moved`, the closest pairs and how many were searched."""

    figures: tuple[Figure, ...]
    closest: tuple[Pair, ...]
    searched: int


def find_copies(
    sets: Sets, places: Tensor, search: Iterable[Float[Tensor, "n c h w"]] | None
) -> Copies:
    """Look for every sample among `search`, or the training pictures.

    Args:
        places: the samples' places as given.

    Raises:
        DataError: pictures to search have another shape.
    """
    made = sets.samples.x0
    unseen = at_most(sets.held_out, MOST_UNSEEN, sets.seed, tag=7).x0
    queries = torch.cat([made, unseen]) if len(unseen) else made
    some = at_most(sets.train, MOST_KNOWN, sets.seed, tag=8).x0
    chunks = _checked([sets.train.x0] if search is None else search, sets.train)
    search_result = nearest((as_they_are(queries), moved(queries, some)), chunks)
    figures = tuple(
        _figure(name, note, one, len(made), search_result.searched)
        for name, note, one in zip(NAMES, _NOTES, search_result.found, strict=True)
    )
    return Copies(figures, _closest(search_result, places), search_result.searched)


def _checked(search: Iterable[Tensor], train: Split) -> Iterator[Tensor]:
    for chunk in search:
        part = Split(chunk).on_cpu()
        check_same_shape(part, train, "pictures to search")
        yield part.x0


def _figure(name: str, note: str, found: Neighbours | None, made: int, searched: int) -> Figure:
    note = note.format(searched)
    if found is None or not made:
        why = "no finite samples" if found else "fewer than 2 distinct training pictures"
        return unmeasured(name, LOWER, PIXELS, why, note)
    copied = found.ratio < COPY_RATIO
    value, unseen = float(copied[:made].mean()), copied[made:]
    if not len(unseen):
        figure = Figure(name, value, None, None, LOWER, made, PIXELS, note)
        return figure.warned("no held-out pictures, so no floor")
    floor = float(unseen.mean())
    return Figure(name, value, floor, share_std(floor, len(unseen)), LOWER, made, PIXELS, note)


def _closest(search: Search, places: Tensor) -> tuple[Pair, ...]:
    """The pairs with the smallest ratio; a moved copy counts where no plain one was found."""
    found = [one.at(slice(len(places))) for one in search.found if one is not None]
    if len(found) < len(NAMES):
        return ()
    plain, moved_ones = found
    only_moved = (moved_ones.ratio < COPY_RATIO) & (plain.ratio >= COPY_RATIO)
    at = Neighbours(*(np.where(only_moved, b, a) for a, b in zip(plain, moved_ones, strict=True)))
    nearest_first = np.lexsort((at.distance, at.ratio))[:CLOSEST]
    return tuple(_pair(at, only_moved, places, int(i)) for i in nearest_first)


def _pair(found: Neighbours, only_moved: NDArray[np.bool_], places: Tensor, i: int) -> Pair:
    return Pair(
        sample=int(places[i]),
        train=int(found.place[i]),
        distance=float(found.distance[i]),
        ratio=float(found.ratio[i]),
        moved=bool(only_moved[i]),
    )

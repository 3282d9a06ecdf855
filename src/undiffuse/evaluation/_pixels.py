"""What shows in the pixels themselves, in no features: whether a classifier tells samples from
real pictures, and errors of the spectrum, of the mean picture and of its spread."""

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undiffuse.evaluation._features import PIXELS, Features, pixels
from undiffuse.evaluation._floors import FEWER_DRAWS, Sides, beside_real, sides
from undiffuse.evaluation._measures import (
    MomentErrors,
    Points,
    moment_errors,
    sliced_distance,
    spectrum_error,
    two_sample_accuracy,
)
from undiffuse.evaluation._quality_figure import LOWER, Figure, unmeasured
from undiffuse.evaluation._split import Sets
from undiffuse.noise import Stream, keyed

MOST_REAL = 2000  # pictures of a split, all their pixels in memory
MOST_TOLD_APART = 500  # on a side: a support vector machine takes n^2
MOST_POINTS = 1000
DIRECTIONS = 256
FOLDS = 5
FEWEST_TOLD_APART = 2 * FOLDS
ROUNDING = (2 / 255) ** 2 / 12  # variance of 8-bit pixels in [-1, 1] from rounding alone
_SLICES = (1 << 20) + 1  # part of the key of the directions: no draw of subsets has it


def in_pixels(sets: Sets) -> Iterator[Figure]:
    """The figures `two_sample`, `sliced`, `spectrum`, `pixel_mean` and `pixel_std`."""
    sets = sets.at_most(MOST_REAL)
    points = sides(sets, Features(PIXELS, pixels))
    yield _two_sample(points)
    yield _sliced(points)
    yield _spectrum(sides(sets, Features("power by spatial frequency", radial_power)))
    yield from _moments(points)


def _two_sample(points: Sides) -> Figure:
    n = points.count(MOST_TOLD_APART)
    note = (
        f"accuracy of an RBF support vector machine that tells {n} samples from {n} held-out"
        f" pictures, {FOLDS}-fold (1610.06545); 0.5 is a guess. Blind to copies; weak on missing"
        " kinds of pictures, of which one in ten makes 0.55 at best"
    )
    if n < FEWEST_TOLD_APART:
        why = f"{n} pictures a side, {FEWEST_TOLD_APART} needed"
        return unmeasured("two_sample", LOWER, points.name, why, note)
    (drawn,) = beside_real(
        points, n, lambda a, b: two_sample_accuracy(a, b, FOLDS), draws=FEWER_DRAWS
    )
    return points.figure("two_sample", drawn, LOWER, n, note)


def _sliced(points: Sides) -> Figure:
    n = points.count(MOST_POINTS)
    note = (
        f"{n} samples against {n} held-out pictures along {DIRECTIONS} random directions; blind to"
        " copies, weak on structure"
    )
    if not n:
        return unmeasured("sliced", LOWER, points.name, "no pictures to compare", note)
    shape = (points.dims, DIRECTIONS)
    axes = keyed(points.seed, Stream.EVALUATE, 0, part=_SLICES).standard_normal(shape)
    axes /= np.linalg.norm(axes, axis=0)
    (drawn,) = beside_real(points.map(lambda p: p @ axes, points.name), n, sliced_distance)
    return points.figure("sliced", drawn, LOWER, n, note)


def _spectrum(points: Sides) -> Figure:
    n = points.count(MOST_POINTS)
    note = (
        "rms difference of the logarithms of the mean power by spatial frequency, at full size,"
        f" {n} samples against {n} held-out pictures; blind to copies and to all but how fine and"
        " strong the detail is"
    )
    why = "" if points.dims else "pictures of one pixel have no spectrum"
    why = why or ("" if n else "no pictures to compare")
    if why:
        return unmeasured("spectrum", LOWER, points.name, why, note)
    (drawn,) = beside_real(points, n, spectrum_error)
    return points.figure("spectrum", drawn, LOWER, n, note)


def _moments(points: Sides) -> Iterator[Figure]:
    n = points.count(MOST_POINTS)
    note = (
        f"rms z-score over pixels of the {{}}, {n} samples against {n} held-out pictures; blind to"
        " copies and to how pixels hang together"
    )
    kinds = ("pixel_mean", "mean picture"), ("pixel_std", "variance about it")
    if n < 2:
        why = f"{n} pictures a side, 2 needed"
        yield from (
            unmeasured(name, LOWER, points.name, why, note.format(of)) for name, of in kinds
        )
        return
    drawn = beside_real(points, n, moment_errors)
    assert len(drawn) == len(MomentErrors._fields)
    for (name, of), one in zip(kinds, drawn, strict=True):
        yield points.figure(name, one, LOWER, n, note.format(of))


def radial_power(x0: Tensor) -> Points:
    """Power of every picture by distance from zero frequency, mean over channels, (n, bins).

    Bins are 1, 2 … cycles over the shorter side as far as all directions have them, and one for
    the corners beyond, where checkerboards live; none for a picture that is one pixel wide. At
    least what rounding to 8 bits makes of any picture.
    """
    h, w = x0.shape[-2:]
    ring = _rings(h, w)
    count = min(h, w) // 2 + 1
    inside = np.stack([ring == one for one in range(1, count + 1)]).reshape(count, -1)
    inside = inside[inside.any(1)]
    if min(h, w) < 2 or not len(inside):
        return np.zeros((len(x0), 0))
    mean = torch.from_numpy(inside / inside.sum(1, keepdims=True)).float()
    parts = [_power(part).flatten(1) @ mean.T for part in x0.split(256)]
    return cast(Points, torch.cat(parts).double().numpy()) + ROUNDING


def _rings(h: int, w: int) -> NDArray[np.int64]:
    side = min(h, w)
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)) * side
    return np.minimum(np.rint(radius), side // 2 + 1).astype(np.int64)


def _power(x0: Tensor) -> Tensor:
    """(n, c, h, w) to (n, h, w)."""
    return torch.fft.fft2(x0, norm="ortho").abs().square().mean(1)

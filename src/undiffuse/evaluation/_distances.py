"""Distances between samples and real pictures in features, and which features those are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from undiffuse.evaluation._features import (
    MAX_DIMS,
    Features,
    classifier_features,
    pixel_features,
    principal_axes,
)
from undiffuse.evaluation._floors import DRAWS, FEWER_DRAWS, Sides, beside_real, sides
from undiffuse.evaluation._measures import (
    SMALLER,
    Points,
    authentic_share,
    covariance_spectrum,
    density_coverage,
    expected_coverage,
    frechet_distance,
    frechet_floor,
    frechet_infinity,
    kernel_distance,
    precision_recall,
)
from undiffuse.evaluation._quality_figure import HIGHER, LOWER, Figure, share_std, unmeasured
from undiffuse.evaluation._split import Sets, Split

NEIGHBOURS = 5  # k of precision, recall, density and coverage
MOST_POINTS = 1000  # on a side where every point meets every other
MOST_KNOWN = 2000  # training pictures in precision and recall: a dense set draws a tight border
FEW_TRAIN = 100  # below this, or with fewer than 10 per class, no classifier is fitted
PER_DIMENSION = 9  # points that extrapolating the Fréchet distance needs


@dataclass(frozen=True)
class _Space:
    """The same pictures as the measures want them; `suffix` ends the figures' names.

    Fréchet distances want few and whitened dimensions. Between neighbours whitening blows up small
    ones, and then they say little (a Gaussian fit of digits: precision 0.91, unwhitened 0.75; n =
    360).
    """

    whitened: Sides
    kernel: Sides
    neighbours: Sides
    suffix: str = ""


def distances(sets: Sets, features: Features | None) -> Iterator[Figure]:
    """All of them in the features given, or a classifier's, and in components of pixels.

    The last figure is the share of authentic samples, there alone.
    """
    if features is None and can_classify(sets.train):
        space = _plain_space(sides(sets, classifier_features(sets.train, sets.seed)))
        yield from _in_space(space)
    elif features is not None:
        given = sides(sets, features)
        space = _reduced_space(given) if given.dims > MAX_DIMS else _plain_space(given)
        yield from _in_space(space)
        if given.dims > MAX_DIMS:
            yield _frechet_raw(given)
    plain, whitened = (sides(sets, one) for one in pixel_features(sets.train, sets.seed))
    yield from _in_space(_Space(whitened, whitened, plain, "_pca"))
    yield _authentic(plain)


def can_classify(train: Split) -> bool:
    classes = len(train.classes())
    return classes >= 2 and len(train) >= max(FEW_TRAIN, 10 * classes)


def _plain_space(points: Sides) -> _Space:
    return _Space(points, points, points)


def _reduced_space(points: Sides) -> _Space:
    axes = principal_axes(points.train)
    name = f"{axes.whitened_count} whitened principal components of {points.name}"
    return _Space(points.map(axes.whitened, name), points, points)


def _in_space(space: _Space) -> Iterator[Figure]:
    end = space.suffix
    yield _frechet(space.whitened, f"frechet{end}")
    yield _frechet_infinity(space.whitened, f"frechet_infinity{end}")
    yield _kernel(space.kernel, f"kernel{end}")
    yield from _precision_recall(space.neighbours, end)
    yield from _density_coverage(space.neighbours, end)


def _too_few(points: Sides, n: int, needed: int) -> str:
    if not points.dims:
        return "the training pictures do not vary"
    return "" if n >= needed else f"{n} pictures a side, {needed} needed"


# --- Fréchet and kernel distances ---------------------------------------------------------------


def _frechet(points: Sides, name: str) -> Figure:
    n = points.count()
    theory = frechet_floor(covariance_spectrum(points.train), n, n) if points.dims and n else 0
    gauss = f" ({theory:.3g} in theory if Gaussian)" if theory else ""
    return _frechet_figure(points, name, None, f"{DRAWS} draws{gauss}. Not comparable with FID")


def _frechet_raw(points: Sides) -> Figure:
    how = f"{FEWER_DRAWS} draws. All dimensions, as published distances are defined"
    return _frechet_figure(points, "frechet_raw", FEWER_DRAWS, how)


def _frechet_figure(points: Sides, name: str, draws: int | None, how: str) -> Figure:
    n = points.count()
    note = (
        f"{n} samples against {n} held-out pictures; floor: {n} against {n} real ones, {how}; blind"
        " to copies and to whatever the features ignore"
    )
    why = _too_few(points, n, 2)
    if why:
        return unmeasured(name, LOWER, points.name, why, note)
    (drawn,) = beside_real(points, n, frechet_distance, draws, draws)
    figure = points.figure(name, drawn, LOWER, n, note)
    few = n < 2 * points.dims
    return figure.warned(f"{n} pictures are few for {points.dims} dimensions") if few else figure


def _frechet_infinity(points: Sides, name: str) -> Figure:
    n = points.count()
    note = (
        f"the Fréchet distance at {n} to {round(n / SMALLER[-1])} pictures a side, followed to"
        " infinitely many (1911.07023): its floor is 0, so it does not depend on n; blind like it"
        " to copies and to whatever the features ignore"
    )
    why = _too_few(points, n, max(2 * int(SMALLER[-1]), PER_DIMENSION * points.dims))
    if why:
        return unmeasured(name, LOWER, points.name, why, note)
    (drawn,) = beside_real(points, n, frechet_infinity)
    return points.figure(name, drawn, LOWER, n, note)


def _kernel(points: Sides, name: str) -> Figure:
    n = points.count(MOST_POINTS)
    note = (
        f"{n} samples against {n} held-out pictures, kernel (x.y / d + 1)^3, without bias"
        " (1801.01401); blind to copies and to what differs beyond the third moments"
    )
    why = _too_few(points, n, 2)
    if why:
        return unmeasured(name, LOWER, points.name, why, note)
    (drawn,) = beside_real(points, n, kernel_distance)
    return points.figure(name, drawn, LOWER, n, note)


# --- neighbours ---------------------------------------------------------------------------------


def _density_coverage(points: Sides, end: str) -> tuple[Figure, Figure]:
    n = points.count(MOST_POINTS)
    expected = expected_coverage(n, n, NEIGHBOURS) if n else 1.0
    note = f"k = {NEIGHBOURS}, {n} against {n} held-out pictures (2002.09797); "
    notes = (
        f"{note}real pictures have 1; blind to copies and to missing kinds of pictures",
        f"{note}real pictures have {expected:.3f}; blind to copies and to bad pictures beside"
        " good ones",
    )
    names = (f"density{end}", f"coverage{end}")
    why = _too_few(points, n, NEIGHBOURS + 1)
    if why:
        missing = (
            unmeasured(name, HIGHER, points.name, why, note)
            for name, note in zip(names, notes, strict=True)
        )
        return next(missing), next(missing)
    drawn = beside_real(points, n, lambda fake, real: density_coverage(real, fake, NEIGHBOURS))
    density, coverage = (
        points.figure(name, one, HIGHER, n, note)
        for name, one, note in zip(names, drawn, notes, strict=True)
    )
    return density, coverage


def _precision_recall(points: Sides, end: str) -> tuple[Figure, Figure]:
    n, known = _known(points)
    note = f"k = {NEIGHBOURS}, {n} against {known} training pictures (1904.06991); blind to copies"
    notes = (f"{note} and to missing kinds of pictures", f"{note} and to bad pictures beside good")
    names = (f"precision{end}", f"recall{end}")
    why = _too_few(points, min(n, known), NEIGHBOURS + 1)
    if why:
        missing = (
            unmeasured(name, HIGHER, points.name, why, note)
            for name, note in zip(names, notes, strict=True)
        )
        return next(missing), next(missing)
    shares = _shares_against_train(
        points, n, lambda real, fake: precision_recall(real, fake, NEIGHBOURS)
    )
    precision, recall = (
        Figure(name, value, floor, share_std(floor, n), HIGHER, n, points.name, note)
        for name, (value, floor), note in zip(names, shares, notes, strict=True)
    )
    return precision, recall


def _authentic(points: Sides) -> Figure:
    n, known = _known(points)
    note = (
        f"share whose nearest of {known} training pictures has another one nearer still"
        " (2102.08921); low: samples huddle about training pictures, be they copies with noise."
        " Blind to bad pictures, which are authentic; above the floor is not better"
    )
    why = _too_few(points, min(n, known), 2)
    if why:
        return unmeasured("authentic", HIGHER, points.name, why, note)
    ((value, floor),) = _shares_against_train(points, n, authentic_share)
    return Figure("authentic", value, floor, share_std(floor, n), HIGHER, n, points.name, note)


def _known(points: Sides) -> tuple[int, int]:
    """How many samples, and held-out pictures, are held against how many training pictures."""
    n = min(MOST_POINTS, len(points.samples), len(points.held_out))
    return n, min(MOST_KNOWN, len(points.train))


def _shares_against_train(
    points: Sides, n: int, measure: Callable[[Points, Points], float | Sequence[float]]
) -> list[tuple[float, float]]:
    """(of samples, of held-out pictures) for each share that `measure` gives of (train, them)."""
    rows = [_mean_shares(points, part, n, measure) for part in (points.samples, points.held_out)]
    return [(float(value), float(floor)) for value, floor in zip(*rows, strict=True)]


def _mean_shares(
    points: Sides,
    judged: Points,
    n: int,
    measure: Callable[[Points, Points], float | Sequence[float]],
) -> Points:
    """Mean over random subsets; one is enough where all points are taken."""
    draws = 1 if n == len(judged) and len(points.train) <= MOST_KNOWN else FEWER_DRAWS
    drawn = [
        measure(points.some(points.train, MOST_KNOWN, i, role=3), points.some(judged, n, i, role=1))
        for i in range(draws)
    ]
    return np.atleast_2d(np.array(drawn, dtype=np.float64).reshape(draws, -1)).mean(0)

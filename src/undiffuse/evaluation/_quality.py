"""How good a set of generated pictures is, each number beside what real pictures score.

No measure suffices alone. A copy of the training set is perfect on every distance between
distributions; a Gaussian fit nearly so on the Fréchet distance. So each figure says what it is
blind to, and the neighbour ratio is always there.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from undiffuse.errors import DataError
from undiffuse.evaluation._features import (
    SVM_PICTURES,
    Features,
    class_judge,
    classifier_features,
    flat,
    pixel_axes,
)
from undiffuse.evaluation._measures import (
    Neighbours,
    Points,
    PrecisionRecall,
    covariance_spectrum,
    frechet_distance,
    frechet_floor,
    nearest,
    precision_recall,
)
from undiffuse.evaluation._split import Split, at_most, check_same_shape, shuffled

DRAWS = 20  # random subsets that a floor's mean and deviation come from
NEIGHBOURS = 5  # k of precision and recall
SHARE_DRAWS = 5  # the same for shares, whose deviation is the binomial one
MOST_POINTS = 1000  # samples, and held-out pictures, in precision and recall
MOST_KNOWN = 2000  # training pictures there: a dense set draws a tight border
FEW_HELD_OUT = 50  # below this every floor is rough
FEW_TRAIN = 100  # below this, or with fewer than 10 per class, no classifier is fitted
COPY_RATIO = 1 / 3
CLOSEST = 16
FIGURES = (  # the names of all figures; those in features need classes
    "class_accuracy",
    "frechet",
    "precision",
    "recall",
    "frechet_pca",
    "precision_pca",
    "recall_pca",
    "copies",
)


@dataclass(frozen=True)
class Figure:
    """One number about samples, and the same number for real pictures (`floor`).

    `value` is None where nothing could be measured; `warning` then says why. `floor_std` is the
    floor's standard deviation; `better` is "lower" or "higher".
    """

    name: str
    value: float | None
    floor: float | None
    floor_std: float | None
    better: str
    n: int
    features: str
    note: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Pair:
    """A sample and its nearest training picture, by their places in `samples` and `search`.

    `distance` is the root mean square over pixels; `ratio` is d1 / d2.
    """

    sample: int
    train: int
    distance: float
    ratio: float


@dataclass(frozen=True)
class SampleReport:
    """All figures, and the 16 samples that are nearest to a copy (smallest d1 / d2).

    `train` pictures were measured with, and copies were looked for among `train_searched`.
    """

    figures: tuple[Figure, ...]
    closest: tuple[Pair, ...]
    samples: int
    train: int
    train_searched: int
    held_out: int
    not_finite: int

    def asdict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return asdict(self)


def sample_quality(
    samples: Split,
    train: Split,
    held_out: Split,
    *,
    seed: int = 0,
    features: Features | None = None,
    search: Iterable[Float[Tensor, "n c h w"]] | None = None,
) -> SampleReport:
    """Class accuracy, Fréchet distance, precision, recall and near copies, with their floors.

    Measured in the features of a small classifier fitted on `train` now (where it has classes)
    and in principal components of its pixels (`frechet_pca` …). Values below -1 and
    above 1 are clipped, samples that are not finite are left out and counted. Sets too small for
    a measure give a figure without value and a warning, never an error.

    Args:
        train: the pictures the samples' generator was trained on, or some of them.
        held_out: pictures it has not seen.
        seed: of the classifier and of all random subsets.
        features: used in place of the classifier.
        search: where copies are looked for: all training pictures in chunks, read once, one at a
            time, so that they need not fit into memory together. None: `train`.

    Raises:
        DataError: there are no samples or no training pictures, or their shapes differ.
    """
    if not len(samples) or not len(train):
        raise DataError(f"nothing to compare: {len(samples)} samples, {len(train)} for training")
    check_same_shape(samples, train, "samples")
    check_same_shape(held_out, train, "held-out pictures")
    finite, places = _finite(samples.on_cpu())
    sets = _Sets(_clipped(finite), train.on_cpu(), held_out.on_cpu(), seed)
    copies, pairs, searched = _copies(sets, places, [train.x0] if search is None else search)
    figures = [_class_accuracy(sets), *_in_features(sets, features), copies]
    return SampleReport(
        figures=tuple(_with_set_warning(figure, sets) for figure in figures),
        closest=pairs,
        samples=len(samples),
        train=len(train),
        train_searched=searched,
        held_out=len(held_out),
        not_finite=len(samples) - len(finite),
    )


@dataclass(frozen=True)
class _Sets:
    samples: Split
    train: Split
    held_out: Split
    seed: int


def _finite(samples: Split) -> tuple[Split, Tensor]:
    places = samples.x0.flatten(1).isfinite().all(1).nonzero().flatten()
    return samples.at(places), places


def _clipped(split: Split) -> Split:
    return replace(split, x0=split.x0.clamp(-1, 1))


def _with_set_warning(figure: Figure, sets: _Sets) -> Figure:
    if figure.floor is None or len(sets.held_out) >= FEW_HELD_OUT:
        return figure
    return _warned(figure, f"only {len(sets.held_out)} held-out pictures: the floor is rough")


def _warned(figure: Figure, warning: str) -> Figure:
    return replace(figure, warning="; ".join(part for part in (figure.warning, warning) if part))


def _unmeasured(name: str, better: str, features: str, why: str) -> Figure:
    return Figure(name, None, None, None, better, 0, features, warning=f"not measured: {why}")


# --- class accuracy -----------------------------------------------------------------------------

_PIXELS = "pixels (averaged down to 32 px where larger)"


def _class_accuracy(sets: _Sets) -> Figure:
    why = _no_accuracy(sets)
    if why:
        return _unmeasured("class_accuracy", "higher", _PIXELS, why)
    judge = class_judge(sets.train, sets.seed)
    sampled = _per_class(judge, sets.samples, sets.train.classes())
    real = _per_class(judge, sets.held_out, sets.train.classes())
    shared = sorted(sampled.keys() & real.keys()) or sorted(sampled)
    value, _, n = _mean_accuracy(sampled, shared)
    floor, std, _ = _mean_accuracy(real, shared) if real else (None, None, 0)
    figure = Figure("class_accuracy", value, floor, std, "higher", n, _PIXELS, _ACCURACY_NOTE)
    missing = sorted(set(sets.train.classes()) - set(shared))
    if real and missing:
        figure = _warned(figure, f"no samples or held-out pictures of classes {_few(missing)}")
    if not real:
        figure = _warned(figure, "no labelled held-out pictures, so no floor")
    return figure


_ACCURACY_NOTE = (
    "RBF support vector machine fitted on at most"
    f" {SVM_PICTURES} training pictures; mean over classes. Blind to diversity and to copies;"
    " above the floor is no merit"
)


def _no_accuracy(sets: _Sets) -> str:
    if sets.train.label is None or sets.samples.label is None:
        return "the pictures have no classes"
    fitted = at_most(sets.train, SVM_PICTURES, sets.seed, tag=2)
    if len(fitted.classes()) < 2:
        return "the training pictures have one class only"
    if not set(sets.samples.classes()) & set(sets.train.classes()):
        return "no sample is of a class of the training pictures"
    return ""


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (" …" if len(numbers) > 10 else "")


Hits = dict[int, tuple[int, int]]  # class -> (right, all)


def _per_class(
    judge: Callable[[Tensor], NDArray[np.int64]], split: Split, classes: list[int]
) -> Hits:
    if split.label is None or not len(split):
        return {}
    label = split.label.numpy()
    right = judge(split.x0) == label
    return {
        c: (int(right[label == c].sum()), int((label == c).sum())) for c in classes if c in label
    }


def _mean_accuracy(hits: Hits, classes: list[int]) -> tuple[float, float, int]:
    """Mean over classes, its standard error, and the number of pictures."""
    counted = [hits[c] for c in classes if c in hits]
    n = sum(total for _, total in counted)
    value = sum(right / total for right, total in counted) / len(counted)
    effective = len(counted) ** 2 / sum(1 / total for _, total in counted)
    return value, _share_std(value, effective), n


def _share_std(share: float, n: float | int) -> float:
    """Binomial; by Laplace's rule, so that 0 of n is not taken for certainty."""
    share = (share * n + 1) / (n + 2)
    return math.sqrt(share * (1 - share) / n)


# --- distances between distributions ------------------------------------------------------------


def _in_features(sets: _Sets, features: Features | None) -> Iterator[Figure]:
    """Fréchet, precision and recall, in the best features and in principal components of pixels.

    The latter are whitened for the Fréchet distance alone: whitening blows up small ones, and then
    neighbours say little (a Gaussian fit of digits: precision 0.91, unwhitened 0.75; n = 360).
    """
    if features is None and _can_classify(sets.train):
        features = classifier_features(sets.train, sets.seed)
    if features is not None:
        points = _points(sets, features)
        yield _frechet(points)
        yield from _precision_recall(points)
    axes = pixel_axes(sets.train, sets.seed)
    yield replace(_frechet(_points(sets, axes.whitened())), name="frechet_pca")
    for figure in _precision_recall(_points(sets, axes.plain())):
        yield replace(figure, name=f"{figure.name}_pca")


def _can_classify(train: Split) -> bool:
    classes = len(train.classes())
    return classes >= 2 and len(train) >= max(FEW_TRAIN, 10 * classes)


def _points(sets: _Sets, features: Features) -> "_Points":
    made, known, unseen = (
        features(part.x0) if len(part) else np.zeros((0, 1))
        for part in (sets.samples, sets.train, sets.held_out)
    )
    return _Points(made, known, unseen, features.name, sets.seed)


@dataclass(frozen=True)
class _Points:
    samples: Points
    train: Points
    held_out: Points
    name: str
    seed: int

    def some(self, points: Points, n: int, draw: int, role: int) -> Points:
        """A random n of the points; sets with different roles are drawn independently."""
        return points[shuffled(len(points), self.seed, tag=(role << 16) + draw)[:n].numpy()]


def _frechet(points: _Points) -> Figure:
    reference = points.held_out if len(points.held_out) >= 2 else points.train
    pool = np.concatenate([points.train, points.held_out]) if len(points.held_out) else reference
    n, dims = min(len(points.samples), len(reference), len(pool) // 2), points.train.shape[1]
    if n < 2 or dims == 0:
        why = f"{n} pictures a side" if dims else "the training pictures do not vary"
        return _unmeasured("frechet", "lower", points.name, why)
    value = [
        frechet_distance(
            points.some(points.samples, n, i, role=1), points.some(reference, n, i, role=2)
        )
        for i in range(DRAWS)
    ]
    pairs = [np.split(points.some(pool, 2 * n, i, role=4), 2) for i in range(DRAWS)]
    floor = [frechet_distance(a, b) for a, b in pairs]
    mean, std = float(np.mean(floor)), float(np.std(floor, ddof=1))
    note = _frechet_note(points, n)
    figure = Figure("frechet", float(np.mean(value)), mean, std, "lower", n, points.name, note)
    if reference is points.train:
        figure = _warned(figure, "compared with training pictures, for want of held-out ones")
    if n < 2 * dims:
        figure = _warned(figure, f"{n} pictures are few for {dims} dimensions")
    return figure


def _frechet_note(points: _Points, n: int) -> str:
    theory = frechet_floor(covariance_spectrum(points.train), n, n)
    return (
        f"{n} samples against {n} held-out pictures; floor: {n} against {n} real ones,"
        f" {DRAWS} draws ({theory:.3g} in theory if Gaussian). Not comparable with FID; blind to"
        " copies and to whatever the features ignore"
    )


def _precision_recall(points: _Points) -> tuple[Figure, Figure]:
    n = min(MOST_POINTS, len(points.samples), len(points.held_out))
    known = min(MOST_KNOWN, len(points.train))
    if min(n, known) <= NEIGHBOURS or not points.train.shape[1]:
        why = f"{min(n, known)} pictures a side, more than {NEIGHBOURS} needed"
        precision = _unmeasured("precision", "higher", points.name, why)
        return precision, replace(precision, name="recall")
    value, floor = (_mean_shares(points, v, n) for v in (points.samples, points.held_out))
    note = f"k = {NEIGHBOURS}, {n} against {known} training pictures; blind to copies and to "
    return (
        _share("precision", value, floor, n, points.name, f"{note}missing kinds of pictures"),
        _share("recall", value, floor, n, points.name, f"{note}bad pictures beside good ones"),
    )


def _mean_shares(points: _Points, judged: Points, n: int) -> dict[str, float]:
    """Mean over random subsets; one is enough where all points are taken."""
    draws = 1 if n == len(judged) and len(points.train) <= MOST_KNOWN else SHARE_DRAWS
    rows = [
        precision_recall(
            points.some(points.train, MOST_KNOWN, i, role=3),
            points.some(judged, n, i, role=1),
            NEIGHBOURS,
        )
        for i in range(draws)
    ]
    return {
        name: float(mean)
        for name, mean in zip(PrecisionRecall._fields, np.mean(rows, axis=0), strict=True)
    }


def _share(
    name: str, value: dict[str, float], floor: dict[str, float], n: int, features: str, note: str
) -> Figure:
    std = _share_std(floor[name], n)
    return Figure(name, value[name], floor[name], std, "higher", n, features, note)


# --- copies -------------------------------------------------------------------------------------


def _copies(
    sets: _Sets, places: Tensor, search: Iterable[Tensor]
) -> tuple[Figure, tuple[Pair, ...], int]:
    """Share of samples with d1 / d2 < 1/3; `places` are the samples' places as given."""
    made = len(sets.samples)
    queries = np.concatenate([flat(sets.samples.x0), flat(sets.held_out.x0)])
    found, searched = nearest(queries, _rows(search, sets.train))
    if found is None or not made:
        why = "no finite samples" if found else "fewer than 2 distinct training pictures"
        return _unmeasured("copies", "lower", _PIXELS, why), (), searched
    value, floor, std = _share_below(found.at(slice(made)).ratio), None, None
    if len(sets.held_out):
        floor = _share_below(found.at(slice(made, None)).ratio)
        std = _share_std(floor, len(sets.held_out))
    note = _COPIES_NOTE.format(searched)
    figure = Figure("copies", value, floor, std, "lower", made, _PIXELS, note)
    if floor is None:
        figure = _warned(figure, "no held-out pictures, so no floor")
    closest = _closest(found.at(slice(made)), places, queries.shape[1])
    return figure, closest, searched


_COPIES_NOTE = (
    "share with d1/d2 < 1/3 to the two nearest distinct ones of {:,} training pictures; blind to"
    " all but copies, and to copies that were shifted or mirrored"
)


def _rows(search: Iterable[Tensor], train: Split) -> Iterator[NDArray[np.float32]]:
    for chunk in search:
        part = Split(chunk).on_cpu()
        check_same_shape(part, train, "pictures to search")
        yield flat(part.x0)


def _share_below(ratio: Points) -> float:
    return float((ratio < COPY_RATIO).mean())


def _closest(made: Neighbours, places: Tensor, values: int) -> tuple[Pair, ...]:
    order = np.lexsort((made.distance, made.ratio))[:CLOSEST]
    return tuple(
        Pair(
            sample=int(places[i]),
            train=int(made.place[i]),
            distance=float(made.distance[i]) / math.sqrt(values),
            ratio=float(made.ratio[i]),
        )
        for i in order
    )

"""How good a set of generated pictures is, each number beside what real pictures score.

No measure suffices alone. A copy of the training set is perfect on every distance between
distributions; a Gaussian fit nearly so on the Fréchet distance. So each figure says what it is
blind to, copies are always looked for, and where one figure shows that others cannot be trusted
the others say so.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from undiffuse.errors import DataError
from undiffuse.evaluation._class_accuracy import class_accuracy, train_on_samples
from undiffuse.evaluation._copies import NAMES as COPIES
from undiffuse.evaluation._copies import Pair, find_copies
from undiffuse.evaluation._distances import distances
from undiffuse.evaluation._features import Features
from undiffuse.evaluation._pixels import in_pixels
from undiffuse.evaluation._quality_figure import FEW, Figure
from undiffuse.evaluation._split import Sets, Split, check_same_shape

SPACES = ("", "_pca")  # classifier or given features, and principal components of pixels
IN_FEATURES = (
    *("frechet", "frechet_infinity", "kernel"),
    *("precision", "recall", "density", "coverage"),
)
FIGURES = (  # the names of all figures; those in features without `_pca` need classes or features
    *("class_accuracy", "train_on_samples"),
    *IN_FEATURES,
    "frechet_raw",  # where features were given that have more than 32 dimensions
    *(f"{name}_pca" for name in IN_FEATURES),
    "authentic",
    *("two_sample", "sliced", "spectrum", "pixel_mean", "pixel_std"),
    *COPIES,
)
REPEATING = {*COPIES, "authentic"}  # what shows copies, and is not flattered by them
SHARES = ("class_accuracy", "train_on_samples", "precision", "recall", "coverage")


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
    """Every figure of `FIGURES` that these sets allow, each with its floor.

    Distances between distributions are measured in the features of a small classifier fitted on
    `train` now (where it has classes) and in principal components of its pixels (`frechet_pca` …).
    Values below -1 and above 1 are clipped, samples that are not finite are left out and counted.
    Sets too small for a measure give a figure without value and a warning, never an error.

    Args:
        train: the pictures the samples' generator was trained on, or some of them.
        held_out: pictures it has not seen.
        seed: of the classifier and of all random subsets.
        features: used in place of the classifier. Where they have more than 32 dimensions, the
            Fréchet distance is that of 32 principal components, and `frechet_raw` of all.
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
    sets = Sets(_clipped(finite), train.on_cpu(), held_out.on_cpu(), seed)
    copies = find_copies(sets, places, search)
    figures = [class_accuracy(sets), train_on_samples(sets)]
    figures += [*distances(sets, features), *in_pixels(sets), *copies.figures]
    return SampleReport(
        figures=_with_warnings(figures, sets),
        closest=copies.closest,
        samples=len(samples),
        train=len(train),
        train_searched=copies.searched,
        held_out=len(held_out),
        not_finite=len(samples) - len(finite),
    )


def _finite(samples: Split) -> tuple[Split, Tensor]:
    places = samples.x0.flatten(1).isfinite().all(1).nonzero().flatten()
    return samples.at(places), places


def _clipped(split: Split) -> Split:
    return replace(split, x0=split.x0.clamp(-1, 1))


# --- what one figure says about another ---------------------------------------------------------


def _with_warnings(figures: list[Figure], sets: Sets) -> tuple[Figure, ...]:
    """In the order of `FIGURES`, with what follows from all of them and from the sets' sizes."""
    by_name = {figure.name: figure for figure in figures}
    said = [_few(sets), _copied(by_name), _blind, _one_sided(by_name)]
    return tuple(
        _warned(by_name[name], [one(by_name[name]) for one in said])
        for name in FIGURES
        if name in by_name
    )


def _warned(figure: Figure, warnings: list[str]) -> Figure:
    for warning in filter(None, warnings):
        figure = figure.warned(warning) if figure.value is not None else figure
    return figure


_Named = dict[str, Figure]
_Say = Callable[[Figure], str]


def _few(sets: Sets) -> _Say:
    rough = "; ".join(
        f"only {count} {of}: the {what} is rough"
        for count, of, what in (
            (len(sets.samples), "samples", "value"),
            (len(sets.held_out), "held-out pictures", "floor"),
        )
        if 0 < count < FEW
    )
    return lambda figure: rough


def _copied(figures: _Named) -> _Say:
    """Copies look perfect to all that compares distributions."""
    shown = sorted(name for name in REPEATING if name in figures and figures[name].far)
    warning = f"samples repeat training pictures ({', '.join(shown)}), which flatters this figure"
    return lambda figure: warning if shown and figure.name not in REPEATING else ""


def _blind(figure: Figure) -> str:
    """Where real pictures fail as well, a measure cannot tell samples from them."""
    name, floor = figure.name, figure.floor
    if floor is not None and name.removesuffix("_pca") in SHARES and floor < 0.5:
        return f"blind here: real pictures reach no more than {floor:.2g}"
    if floor is not None and name in COPIES and floor > 0.1:
        return f"blind here: {floor:.0%} of the held-out pictures count as copies themselves"
    return ""


def _one_sided(figures: _Named) -> _Say:
    """A pair of which one is as in real pictures and the other is not says what is wrong."""
    said: dict[str, str] = {}
    for good, full in (("precision", "recall"), ("density", "coverage")):
        for end in SPACES:
            pair = [figures.get(f"{name}{end}") for name in (good, full)]
            said |= _about_pair(*pair)
    return lambda figure: said.get(figure.name, "")


def _about_pair(good: Figure | None, full: Figure | None) -> dict[str, str]:
    if good is None or full is None or good.far == full.far:
        return {}
    if full.far:
        return {full.name: f"{good.name} is as in real pictures: some kinds are missing"}
    return {good.name: f"{full.name} is as in real pictures: beside good samples there are bad"}

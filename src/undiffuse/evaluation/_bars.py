"""Closed-form denoisers fitted to training pictures: what a network's loss is held against.

The true minimum of the held-out loss lies below every one of them, so the best is a bar that a
good network can pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.evaluation._split import Split, at_most
from undiffuse.noise import NoiseLevel
from undiffuse.oracles import FiniteSet, Gaussian, Mixture, Smoothed

Estimate = Callable[[Tensor, NoiseLevel, Tensor | None], Tensor]  # (x, level, label) -> x0

BANDWIDTHS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
SHRINKS = (0.0, 0.02, 0.1, 0.3)
MOST_PICTURES = 2000
FEWEST = 500  # training pictures, however large
MOST_VALUES = 1 << 22  # of all of them together, unless they are fewer
FULL_RANK = 1024  # values per picture up to which covariances are full
RANK = 256
CLASS_RANK = 64
CLASS_PICTURES = 16  # fewer in some class: no mixture
MOST_CLASSES = 100


def without_label(estimate: Estimate) -> Estimate:
    """The same estimate, never told the label."""
    return lambda x, level, label: estimate(x, level, None)


class Told(StrEnum):
    """What an estimate knows of a picture beside its noised values."""

    NOTHING = "without label"
    LABEL = "with label"

    def of(self, estimate: Estimate) -> Estimate:
        """The same estimate, told no more than that."""
        return without_label(estimate) if self is Told.NOTHING else estimate


class Candidate(NamedTuple):
    """An estimate, and the setting it was made with."""

    setting: float
    estimate: Estimate


@dataclass(frozen=True)
class Bars:
    """Families of estimates, one of each to be chosen per level.

    `memory` is the train optimum, which takes labels where the pictures have them. `oracle` is the
    exact estimate of the distribution that the pictures come from, if it is known.
    """

    families: Mapping[str, tuple[Candidate, ...]]
    given_class: Estimate | None
    memory: Estimate
    pictures: Split
    notes: tuple[str, ...]
    oracle: Estimate | None = None


def fit_bars(train: Split, seed: int) -> Bars:
    """Wiener filter, kernel density and class mixture of at most 2,000 training pictures.

    Of large pictures fewer: 1,365 at 32 x 32 x 3, 500 at 64 x 64 x 3.
    """
    limit = min(MOST_PICTURES, max(FEWEST, MOST_VALUES // train.x0[0].numel()))
    pictures = at_most(train, limit, seed, tag=10)
    families = {"wiener": _wiener(pictures.x0), "kde": _kernel_density(pictures.x0)}
    mixture, why = _class_mixture(pictures)
    if mixture is not None:
        families["mixture"] = (Candidate(0.0, without_label(mixture)),)
    notes = ["kde bandwidth chosen on the held-out pictures at each level: a stricter bar"]
    if len(families["wiener"]) > 1:
        notes.append("wiener shrinkage chosen likewise: few pictures for so many values")
    if len(pictures) < len(train):
        notes.append(
            f"bars and train optimum know {len(pictures)} of {len(train)} training pictures"
        )
    if why:
        notes.append(f"no class mixture: {why}")
    return Bars(families, mixture, FiniteSet(pictures.x0, pictures.label), pictures, tuple(notes))


def _kernel_density(x0: Tensor) -> tuple[Candidate, ...]:
    return tuple(Candidate(width, without_label(Smoothed(x0, width))) for width in BANDWIDTHS)


def _wiener(x0: Tensor) -> tuple[Candidate, ...]:
    """The maximum-likelihood Gaussian; shrunk ones beside it where pictures are few."""
    rows = x0.double().flatten(1)
    fitted = _gaussian(rows, _covariance(rows), x0) if _small(x0) else _low_rank(rows, RANK, x0)
    shrinks = (0.0,) if len(rows) >= 10 * rows.shape[1] else SHRINKS
    return tuple(Candidate(shrink, _shrunk(fitted, shrink)) for shrink in shrinks)


def _small(x0: Tensor) -> bool:
    return x0[0].numel() <= FULL_RANK


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.mT @ centred / len(rows)


def _gaussian(rows: Tensor, covariance: Tensor, like: Tensor) -> Gaussian:
    return Gaussian.from_covariance(rows.mean(0).reshape(like.shape[1:]), covariance)


def _low_rank(rows: Tensor, rank: int, like: Tensor) -> Gaussian:
    """Leading principal axes; every other direction gets the mean of what they leave over.

    Probabilistic PCA (Tipping & Bishop 1999, eq. 7–8), through the n x n products of pictures.
    """
    n, d = rows.shape
    centred = rows - rows.mean(0)
    values, weights = torch.linalg.eigh(centred @ centred.mT / n)
    rank = min(rank, n // 2)
    kept = values[-rank:] > 1e-9 * values[-1].clamp(min=1e-12) if rank else values[:0].bool()
    top = values[len(values) - rank :][kept]
    axes = centred.mT @ weights[:, n - rank :][:, kept] / (top * n).sqrt()
    rest = float((values.clamp(min=0).sum() - top.sum()).clamp(min=0)) / max(1, d - len(top))
    return Gaussian(rows.mean(0).reshape(like.shape[1:]), top, axes, rest)


def _shrunk(fitted: Gaussian, shrink: float) -> Gaussian:
    """A share of the covariance replaced by a multiple of I of the same trace."""
    d, k = fitted.eigenvectors.shape
    mean = shrink * (float(fitted.eigenvalues.sum()) + (d - k) * fitted.rest) / d
    values = (1 - shrink) * fitted.eigenvalues + mean
    return Gaussian(fitted.mean, values, fitted.eigenvectors, (1 - shrink) * fitted.rest + mean)


def _class_mixture(train: Split) -> tuple[Mixture | None, str]:
    """One Gaussian per class, or why there is none."""
    classes = train.classes()
    if train.label is None or len(classes) < 2:
        return None, "fewer than two classes"
    if len(classes) > MOST_CLASSES:
        return None, f"{len(classes)} classes are too many"
    members = [train.x0[train.label == c] for c in classes]
    fewest = min(len(m) for m in members)
    if fewest < CLASS_PICTURES:
        return None, f"a class has {fewest} pictures, {CLASS_PICTURES} needed"
    components = tuple(_class_gaussian(m) for m in members)
    return Mixture(components, tuple(float(len(m)) for m in members), tuple(classes)), ""


def _class_gaussian(x0: Tensor) -> Gaussian:
    """Covariance 0.85 S + 0.15 diag S + 0.004 I: hundreds of pictures do not settle d^2 numbers."""
    rows = x0.double().flatten(1)
    if not _small(x0):
        return _shrunk(_low_rank(rows, CLASS_RANK, x0), 0.02)
    covariance = _covariance(rows)
    diagonal = torch.diag(0.15 * covariance.diagonal() + 0.004)
    return _gaussian(rows, 0.85 * covariance + diagonal, x0)

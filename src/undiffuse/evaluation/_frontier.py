"""Quality against the number of network evaluations: one Fréchet distance, and what is best.

All settings of one model are judged by the same real pictures in the same features. They start
from the same noise, so that most of what chance does to one it does to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from undiffuse.errors import DataError
from undiffuse.evaluation._distances import can_classify
from undiffuse.evaluation._features import (
    MAX_DIMS,
    Features,
    classifier_features,
    pixel_features,
    principal_axes,
)
from undiffuse.evaluation._measures import (
    Points,
    covariance_spectrum,
    frechet_distance,
    frechet_floor,
)
from undiffuse.evaluation._split import Split, check_same_shape

WITHIN = 1.1  # of the reference's distance: a difference that few would see
FEWEST = 2  # pictures a side that have a covariance


@dataclass(frozen=True)
class FrechetJudge:
    """A Fréchet distance to held-out pictures, whose points are computed once.

    `reference` is how many they are, `against` which: "held-out" pictures, or "training" ones for
    want of those.
    """

    features: Features
    points: Points
    spread: Points
    against: str

    @property
    def reference(self) -> int:
        """How many real pictures."""
        return len(self.points)

    def distance(self, samples: Float[Tensor, "n c h w"]) -> float:
        """Of all samples to all real pictures; values beyond [-1, 1] are clipped."""
        return frechet_distance(self.features(samples.clamp(-1, 1)), self.points)

    def floor(self, n: int) -> float:
        """What n real pictures score if they are Gaussian in these features."""
        return frechet_floor(self.spread, n, self.reference)


def frechet_judge(
    train: Split, held_out: Split, *, seed: int = 0, features: Features | None = None
) -> FrechetJudge:
    """Fit the features and compute the points of the real pictures.

    Args:
        features: used in place of a classifier fitted to `train` (or, where that has no classes, of
            components of its pixels). Of more than 32 dimensions the 32 first principal components
            are taken, whitened.

    Raises:
        DataError: fewer than two real pictures, or shapes differ, or pictures that do not vary.
    """
    check_same_shape(held_out, train, "held-out pictures")
    if len(train) < FEWEST:
        raise DataError(f"a Fréchet distance needs at least {FEWEST} pictures; got {len(train)}")
    train, held_out = train.on_cpu(), held_out.on_cpu()
    chosen = _few_dimensions(features, train) if features else fitted_features(train, seed)
    known = chosen(train.x0)
    if not known.shape[1]:
        raise DataError("a Fréchet distance needs pictures that differ; these are all the same")
    spread = covariance_spectrum(known)
    if len(held_out) < FEWEST:
        return FrechetJudge(chosen, known, spread, "training")
    return FrechetJudge(chosen, chosen(held_out.x0), spread, "held-out")


def fitted_features(train: Split, seed: int) -> Features:
    """A classifier's where the pictures have classes, else whitened components of pixels."""
    if can_classify(train):
        return classifier_features(train, seed)
    return pixel_features(train, seed)[1]


def _few_dimensions(features: Features, train: Split) -> Features:
    points = features(train.x0)
    if points.shape[1] <= MAX_DIMS:
        return features
    return principal_axes(points).features(features.function, features.name)


def paired_distance(made: Float[Tensor, "n c h w"], exact: Float[Tensor, "n c h w"]) -> float:
    """Root mean square over all values between pictures that began as the same noise."""
    return float((made.double() - exact.double()).square().mean().sqrt())


# --- frontier -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplerSetting:
    """A sampler at a number of network evaluations, and what came of it.

    `budget` is the number it was allowed and `evaluations` what its `steps` took. `frechet` is
    None where samples were not finite; `rms` is None for a sampler that adds noise.
    """

    sampler: str
    budget: int
    steps: int
    evaluations: int
    frechet: float | None
    rms: float | None


def best_per_budget(settings: Sequence[SamplerSetting]) -> tuple[SamplerSetting, ...]:
    """The setting of least Fréchet distance at every budget, budgets rising."""
    measured = [one for one in settings if one.frechet is not None]
    budgets = sorted({one.budget for one in measured})
    return tuple(
        min((one for one in measured if one.budget == budget), key=_distance) for budget in budgets
    )


def frontier(settings: Sequence[SamplerSetting]) -> tuple[SamplerSetting, ...]:
    """Those that no setting of as few or fewer evaluations beats, evaluations rising."""
    kept: list[SamplerSetting] = []
    for one in sorted(settings, key=lambda one: (one.evaluations, _distance(one))):
        if one.frechet is not None and (not kept or _distance(one) < _distance(kept[-1])):
            kept.append(one)
    return tuple(kept)


def fewest_evaluations(
    settings: Sequence[SamplerSetting], reference: float
) -> SamplerSetting | None:
    """The fewest evaluations whose distance is within 10 % of the reference's; None if none is.

    Of as many evaluations, the sampler of least distance.
    """
    near = [one for one in settings if _distance(one) <= WITHIN * reference]
    return min(near, key=lambda one: (one.evaluations, _distance(one)), default=None)


def _distance(setting: SamplerSetting) -> float:
    return float("inf") if setting.frechet is None else setting.frechet

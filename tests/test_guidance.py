"""Guidance on oracles, where every result is a formula."""

import math

import pytest
import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.guidance import classifier_free, clipped, guided, with_label, within
from undiffuse.noise import Flow, Karras, NoiseLevel, levels
from undiffuse.oracles import FiniteSet, Gaussian, Mixture
from undiffuse.sampling import ddim, finish, start

SHAPE = (1, 2, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: float, variance: float) -> Gaussian:
    eye = torch.eye(math.prod(SHAPE), dtype=torch.float64)
    return Gaussian.from_covariance(torch.full(SHAPE, mean, dtype=torch.float64), variance * eye)


def at(alpha: float, sigma: float) -> NoiseLevel:
    return NoiseLevel(*torch.tensor([alpha, sigma, 0.5], dtype=torch.float64))


def never(x: Tensor, level: NoiseLevel) -> Tensor:
    raise AssertionError("called")


X = normal(3, *SHAPE)


def test_scale_1_is_the_strong_one_bit_for_bit_and_never_calls_the_weak():
    strong = with_label(gaussian(0.5, 0.25), None)
    assert torch.equal(guided(strong, never, 1.0)(X, at(0.6, 0.8)), strong(X, at(0.6, 0.8)))
    assert guided(strong, never, 1.0) is strong


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, -1.0])
def test_guidance_is_the_straight_line_through_weak_and_strong(scale: float):
    """Two Gaussians of one variance: the guided estimate is that of the extrapolated mean."""
    level, weak, strong = at(0.6, 0.8), gaussian(0.2, 0.25), gaussian(1.0, 0.25)
    got = guided(with_label(strong, None), with_label(weak, None), scale)(X, level)
    expected = gaussian(0.2 + scale * 0.8, 0.25)(X, level)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_guidance_of_x0_is_guidance_of_the_noise():
    level, scale = at(0.6, 0.8), 3.0
    weak, strong = with_label(gaussian(0.2, 1.0), None), with_label(gaussian(1.0, 0.1), None)
    noises = [level.noise_in(X, d(X, level)) for d in (weak, strong)]
    expected = noises[0] + scale * (noises[1] - noises[0])
    got = level.noise_in(X, guided(strong, weak, scale)(X, level))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_classifier_free_is_the_class_posterior_against_the_whole():
    mixture = Mixture((gaussian(-1.0, 0.2), gaussian(1.0, 0.1)), (1.0, 3.0), (0, 1))
    label, level = torch.tensor([0, 1, 0]), at(0.6, 0.8)
    got = classifier_free(mixture, label, 2.5)(X, level)
    base = mixture(X, level)
    torch.testing.assert_close(got, base + 2.5 * (mixture(X, level, label) - base))
    alone = classifier_free(mixture, label, 1.0)(X, level)
    assert torch.equal(alone, mixture(X, level, label))
    torch.testing.assert_close(classifier_free(mixture, label, 0.0)(X, level), base)


def test_classifier_free_without_label_needs_scale_1():
    oracle = FiniteSet(normal(4, *SHAPE))
    assert torch.equal(
        classifier_free(oracle, None, 1.0)(X, at(0.6, 0.8)), oracle(X, at(0.6, 0.8), None)
    )
    with pytest.raises(ConfigError, match="guidance_scale 2 needs class labels"):
        classifier_free(oracle, None, 2.0)


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_no_number_is_refused(scale: float):
    with pytest.raises(ConfigError, match=f"guidance_scale must be a finite number; got {scale}"):
        guided(never, never, scale)


@pytest.mark.parametrize(
    ("level", "inside"),
    [
        (at(1.0, 0.2), True),  # both ends belong to the interval
        (at(1.0, 2.0), True),
        (at(1.0, 0.199), False),
        (at(1.0, 2.001), False),
        (at(0.5, 0.5), True),  # the ratio counts, not sigma
        (at(0.5, 1.5), False),
        (at(0.5, 0.09), False),
        (at(0.0, 1.0), False),
    ],
)
def test_within_chooses_by_the_ratio(level: NoiseLevel, inside: bool):
    yes, no = with_label(gaussian(0.0, 1.0), None), with_label(gaussian(5.0, 1.0), None)
    chosen = within(yes, never, 0.2, 2.0) if inside else within(never, no, 0.2, 2.0)
    assert torch.equal(chosen(X, level), (yes if inside else no)(X, level))


def test_an_interval_without_upper_end_holds_pure_noise():
    inside = with_label(gaussian(0.0, 1.0), None)
    assert torch.equal(
        within(inside, never, 0.2, math.inf)(X, at(0.0, 1.0)), inside(X, at(0.0, 1.0))
    )


def test_clipped_bounds_the_estimate_only_where_it_leaves_the_range():
    level, wild = at(0.6, 0.8), with_label(gaussian(0.0, 9.0), None)
    free, bounded = wild(3 * X, level), clipped(wild)(3 * X, level)
    assert free.abs().max() > 1
    assert torch.equal(bounded, free.clamp(-1, 1))
    assert torch.equal(clipped(wild, -9.0, 9.0)(X, level), wild(X, level))


def test_guidance_on_an_interval_costs_weak_calls_there_only():
    calls: list[float] = []
    weak_oracle, strong = gaussian(0.2, 0.25), with_label(gaussian(1.0, 0.25), None)

    def weak(x: Tensor, level: NoiseLevel) -> Tensor:
        calls.append(float(level.ratio))
        return weak_oracle(x, level)

    grid = levels(Karras(), 20)
    denoise = clipped(within(guided(strong, weak, 2.0), strong, 0.3, 3.0))
    end = finish(ddim(denoise, start(grid[0], X), grid))
    expected = [float(v.ratio) for v in grid if 0.3 <= float(v.ratio) <= 3.0]
    assert calls == expected
    assert 0 < len(calls) < 20
    assert end.abs().max() <= 1


def test_guidance_works_from_pure_noise():
    grid = levels(Flow(), 10, lambda s, n: s(torch.linspace(1, 0, n + 1)[:-1]))
    assert float(grid[0].alpha) == 0
    mixture = Mixture((gaussian(-1.0, 0.2), gaussian(1.0, 0.1)), (1.0, 3.0), (0, 1))
    label = torch.tensor([0, 1, 1])
    end = finish(ddim(classifier_free(mixture, label, 2.0), start(grid[0], X), grid))
    means = end.flatten(1).mean(1)
    assert means[0] < -0.5
    assert (means[1:] > 0.5).all()

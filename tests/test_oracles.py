"""Exact denoisers against Bayes' rule done by brute force, and the identities between them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from undiffuse import oracles
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import ConfigError
from undiffuse.noise import (
    Flow,
    Karras,
    NoiseLevel,
    Stream,
    clean,
    keyed_normal,
    levels,
)
from undiffuse.oracles import (
    FiniteSet,
    Gaussian,
    Mixture,
    Oracle,
    Smoothed,
    fit_gaussian,
    gaussian_flow,
)
from undiffuse.sampling import ddim, dpmpp_2m, finish, heun, start

SHAPE = (1, 2, 2)
SIZE = math.prod(SHAPE)
EYE = torch.eye(SIZE, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def at(alpha: float, sigma: float) -> NoiseLevel:
    """A shared level; the oracles never look at t."""
    return NoiseLevel(*torch.tensor([alpha, sigma, math.nan], dtype=torch.float64))


LEVELS = [at(1.0, 0.05), at(0.8, 0.6), at(0.3, 0.7), at(1.0, 80.0), at(0.0, 1.0)]


def full_gaussian(seed: int = 0) -> Gaussian:
    root = normal(SIZE, SIZE, seed=seed)
    return Gaussian.from_covariance(normal(*SHAPE, seed=seed + 100), root @ root.mT / SIZE)


def low_rank_gaussian(rest: float) -> Gaussian:
    basis = torch.linalg.qr(normal(SIZE, 2, seed=5))[0]
    return Gaussian(
        normal(*SHAPE, seed=6), torch.tensor([2.0, 0.3], dtype=torch.float64), basis, rest
    )


def covariance(g: Gaussian) -> Tensor:
    outer = (g.eigenvectors * g.eigenvalues) @ g.eigenvectors.mT
    return outer + g.rest * (EYE - g.eigenvectors @ g.eigenvectors.mT)


def some_set(n: int = 7) -> tuple[Tensor, Tensor]:
    return normal(n, *SHAPE, seed=1), torch.arange(n) % 3


def every_oracle() -> dict[str, Oracle]:
    x0, label = some_set()
    return {
        "gaussian": full_gaussian(),
        "low rank": low_rank_gaussian(0.0),
        "rest": low_rank_gaussian(0.1),
        "mixture": Mixture((full_gaussian(), low_rank_gaussian(0.2)), (0.3, 0.7), (0, 1)),
        "finite": FiniteSet(x0, label),
        "smoothed": Smoothed(x0, 0.4, label),
    }


ORACLES = every_oracle()

# --- Gaussian -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("g", [full_gaussian(), low_rank_gaussian(0.0), low_rank_gaussian(0.1)])
def test_gaussian_is_the_conditional_mean_of_the_joint_normal(g: Gaussian, level: NoiseLevel):
    x, a, s = normal(3, *SHAPE, seed=2) * 3, level.alpha, level.sigma
    cov, mean = covariance(g), g.mean.flatten()
    gain = torch.linalg.solve(a**2 * cov + s**2 * EYE, a * cov).mT
    expected = mean + (x.flatten(1) - a * mean) @ gain.mT
    torch.testing.assert_close(g(x, level), expected.reshape(x.shape), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("g", [full_gaussian(), low_rank_gaussian(0.1)])
def test_gaussian_log_density_is_torch_distributions(g: Gaussian, level: NoiseLevel):
    x = normal(3, *SHAPE, seed=2)
    cov = level.alpha**2 * covariance(g) + level.sigma**2 * EYE
    law = torch.distributions.MultivariateNormal(level.alpha * g.mean.flatten(), cov)
    torch.testing.assert_close(
        g.log_density(x, level), law.log_prob(x.flatten(1)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("g", [full_gaussian(), low_rank_gaussian(0.0), low_rank_gaussian(0.1)])
@pytest.mark.parametrize("level", [at(1.0, 0.1), at(0.6, 0.8)])
def test_mmse_formula_is_what_monte_carlo_finds(g: Gaussian, level: NoiseLevel):
    n = 40_000
    x0 = g.draw(normal(n, *SHAPE, seed=3))
    x = level.mix(x0, normal(n, *SHAPE, seed=4))
    error = (g(x, level) - x0).square().flatten(1).mean(1)
    assert abs(error.mean() - g.mmse(level)) < 4 * error.std() / math.sqrt(n)
    worse = (1.1 * g(x, level) - x0).square().mean()
    assert worse > g.mmse(level)


def test_mmse_has_the_shape_of_the_level_and_the_right_ends():
    g = full_gaussian()
    batch = Flow()(torch.tensor([0.001, 0.3, 1.0])).like(normal(3, *SHAPE))
    assert g.mmse(batch).shape == (3, 1, 1, 1)
    assert g.mmse(at(0.3, 0.7)).shape == ()
    variance = g.eigenvalues.mean()
    torch.testing.assert_close(g.mmse(batch)[2, 0, 0, 0], variance)  # nothing known: the variance
    for ratio in (1e-3, 1e3):
        assert g.mmse(at(1.0, ratio)) < min(ratio**2, variance)  # the two naive estimates


@pytest.mark.parametrize("shrink", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("n", [3, 50])
def test_fit_has_the_sample_moments_also_below_full_rank(n: int, shrink: float):
    x0 = normal(n, *SHAPE, seed=7) * torch.tensor([1.0, 2.0]) + 3
    g = fit_gaussian(x0.float(), shrink)
    sample = torch.from_numpy(np.cov(x0.float().double().flatten(1).numpy(), rowvar=False, ddof=0))
    target = (1 - shrink) * sample + shrink * sample.trace() / SIZE * EYE
    torch.testing.assert_close(g.mean, x0.float().double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance(g), target, rtol=1e-12, atol=1e-12)


def test_draw_has_the_covariance():
    g = low_rank_gaussian(0.1)
    rows = g.draw(torch.cat([EYE, torch.zeros_like(EYE[:1])]).reshape(-1, *SHAPE))
    linear = (rows[:-1] - rows[-1]).flatten(1)
    torch.testing.assert_close(rows[-1], g.mean)
    torch.testing.assert_close(linear.mT @ linear, covariance(g))


# --- the probability flow -----------------------------------------------------------------------


def test_flow_keeps_the_marginal_and_composes():
    g, x = full_gaussian(), normal(4, *SHAPE)
    high, middle, low = at(0.2, 0.9), at(0.7, 0.5), at(1.0, 0.1)
    two = gaussian_flow(g, gaussian_flow(g, x, high, middle), middle, low)
    torch.testing.assert_close(two, gaussian_flow(g, x, high, low), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gaussian_flow(g, x, high, high), x, rtol=1e-12, atol=1e-12)
    # to the clean level: draws from the data
    unit = torch.cat([EYE, torch.zeros_like(EYE[:1])]).reshape(-1, *SHAPE)
    ends = gaussian_flow(g, unit, at(0.0, 1.0), clean()).flatten(1)
    linear = ends[:-1] - ends[-1]
    torch.testing.assert_close(linear.mT @ linear, covariance(g))


def test_flow_solves_the_differential_equation():
    """d(x/a) / d(s/a) is the noise estimate (2206.00364, eq. 1), by central differences."""
    g, x, ratio, h = full_gaussian(), normal(4, *SHAPE), 0.7, 1e-4
    ahead = gaussian_flow(g, x, at(1.0, ratio), at(1.0, ratio + h))
    behind = gaussian_flow(g, x, at(1.0, ratio), at(1.0, ratio - h))
    slope = at(1.0, ratio).noise_in(x, g(x, at(1.0, ratio)))
    torch.testing.assert_close((ahead - behind) / (2 * h), slope, rtol=1e-6, atol=1e-7)


# --- mixtures and sets against brute force ------------------------------------------------------


def posterior_mean_by_sum(x: Tensor, level: NoiseLevel, points: Tensor) -> Tensor:
    """Bayes' rule point by point, no expansion of the square."""
    square = (x[:, None] - level.alpha * points[None]).square().flatten(2).sum(2)
    weights = torch.softmax(-square / (2 * level.sigma**2), 1)
    return torch.einsum("bn,nchw->bchw", weights, points)


@pytest.mark.parametrize("level", LEVELS)
def test_finite_set_is_bayes_rule(level: NoiseLevel):
    (points, _), x = some_set(), normal(5, *SHAPE, seed=2)
    expected = posterior_mean_by_sum(x, level, points)
    torch.testing.assert_close(FiniteSet(points)(x, level), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [at(1.0, 0.5), at(0.3, 0.7), at(0.0, 1.0)])
def test_gaussian_mixture_is_bayes_rule_on_a_fine_grid(level: NoiseLevel):
    """One value per picture, so that the integral is a sum over 20,001 points."""
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    means, variances, weights = (-1.0, 0.5, 2.0), (0.09, 0.25, 0.04), (1.0, 2.0, 1.5)
    one = torch.ones(1, 1, dtype=torch.float64)
    parts = tuple(
        Gaussian.from_covariance(m * one[None], v * one)
        for m, v in zip(means, variances, strict=True)
    )
    prior = sum(
        w * torch.exp(-((grid - m) ** 2) / (2 * v)) / math.sqrt(v)
        for m, v, w in zip(means, variances, weights, strict=True)
    )
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).reshape(-1, 1, 1, 1)
    likelihood = torch.exp(
        -((x.flatten()[:, None] - level.alpha * grid.flatten()) ** 2) / (2 * level.sigma**2)
    )
    joint = likelihood * prior.flatten()
    expected = (joint @ grid.flatten()) / joint.sum(1)
    mixture = Mixture(parts, weights, (0, 1, 1))
    torch.testing.assert_close(mixture(x, level).flatten(), expected, rtol=1e-9, atol=1e-9)
    norm = math.sqrt(2 * math.pi) * sum(weights)
    density = joint.sum(1) * 16 / 20_000 / norm / (level.sigma * math.sqrt(2 * math.pi))
    torch.testing.assert_close(mixture.log_density(x, level).exp(), density, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_smoothed_set_is_the_mixture_of_its_kernels(level: NoiseLevel):
    (points, label), x, h = some_set(), normal(5, *SHAPE, seed=2), 0.4
    kernels = tuple(Gaussian.from_covariance(p, h**2 * EYE) for p in points)
    mixture = Mixture(kernels, (1.0,) * len(points), tuple(label.tolist()))
    smoothed = Smoothed(points, h, label)
    torch.testing.assert_close(smoothed(x, level), mixture(x, level), rtol=1e-9, atol=1e-9)
    asked = torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(
        smoothed(x, level, asked), mixture(x, level, asked), rtol=1e-9, atol=1e-9
    )


def test_one_component_is_the_gaussian_and_bandwidth_0_the_finite_set():
    x, level, g = normal(5, *SHAPE, seed=2), at(0.6, 0.8), full_gaussian()
    torch.testing.assert_close(Mixture((g,), (3.0,), (0,))(x, level), g(x, level))
    points, label = some_set()
    assert torch.equal(Smoothed(points, 0.0, label)(x, level), FiniteSet(points, label)(x, level))
    one = Gaussian.from_covariance(points[0], 0.16 * EYE)
    torch.testing.assert_close(Smoothed(points[:1], 0.4)(x, level), one(x, level))


def test_a_label_leaves_that_class_only():
    points, label = some_set()
    x, level = normal(3, *SHAPE, seed=2), at(0.6, 0.8)
    asked = torch.tensor([2, 0, 2])
    for make in (FiniteSet, lambda p, lab=None: Smoothed(p, 0.3, lab)):
        got = make(points, label)(x, level, asked)
        for row, k in enumerate(asked):
            alone = make(points[label == k])(x[row : row + 1], level)
            torch.testing.assert_close(got[row : row + 1], alone, rtol=1e-12, atol=1e-12)
    a, b = full_gaussian(), low_rank_gaussian(0.2)
    got = Mixture((a, b), (0.3, 0.7), (4, 9))(x, level, torch.tensor([9, 4, 9]))
    torch.testing.assert_close(got[[0, 2]], b(x[[0, 2]], level))
    torch.testing.assert_close(got[[1]], a(x[[1]], level))


# --- limits and structure -----------------------------------------------------------------------


def test_small_noise_returns_the_nearest_and_large_noise_the_mean():
    points, _ = some_set()
    x = points + 0.01 * normal(*points.shape, seed=3)
    near = FiniteSet(points)(x, at(1.0, 1e-3))
    torch.testing.assert_close(near, points, rtol=0.0, atol=1e-14)
    far = FiniteSet(points)(normal(2, *SHAPE) * 1e6, at(1.0, 1e6 * 1e6))
    torch.testing.assert_close(far, points.mean(0).expand(2, *SHAPE), rtol=1e-5, atol=1e-5)
    for name, oracle in ORACLES.items():
        blind = oracle(normal(2, *SHAPE, seed=8), at(0.0, 1.0))
        torch.testing.assert_close(blind[0], blind[1], msg=name)


def test_far_away_from_all_data_stays_finite():
    """exp underflows for every point; only the log-sum-exp form survives."""
    points, label = some_set()
    x, level = 1e4 * normal(3, *SHAPE, seed=2), at(1.0, 1e-3)
    expected = posterior_mean_by_sum(x, level, points)
    torch.testing.assert_close(FiniteSet(points)(x, level), expected)
    for oracle in ORACLES.values():
        assert oracle(x, level, None).isfinite().all()
    # the class asked for is never the nearest
    assert FiniteSet(points, label)(points, level, (label + 1) % 3).isfinite().all()


@pytest.mark.parametrize("name", ORACLES)
@given(log_sigma=st.floats(-1.5, 3.0), alpha=st.floats(0.1, 1.0), seed=st.integers(0, 1000))
def test_jacobian_is_symmetric_and_not_negative(
    name: str, log_sigma: float, alpha: float, seed: int
):
    """dD*/dx = (alpha / sigma^2) * Cov(x0 | x)."""
    oracle, level = ORACLES[name], at(alpha, math.exp(log_sigma))
    x = normal(1, *SHAPE, seed=seed)
    jacobian = torch.autograd.functional.jacobian(lambda v: oracle(v, level), x)
    square = jacobian.reshape(SIZE, SIZE)
    torch.testing.assert_close(square, square.mT, rtol=1e-8, atol=1e-9)
    assert torch.linalg.eigvalsh(square).min() > -1e-9


@pytest.mark.parametrize("name", ORACLES)
def test_a_batch_of_levels_is_each_level_alone_and_dtype_is_kept(name: str):
    oracle, x = ORACLES[name], normal(3, *SHAPE, seed=2)
    batch = Karras()(torch.tensor([0.2, 0.5, 0.9])).like(x)
    together = oracle(x, batch)
    for i in range(3):
        single = NoiseLevel(*(v[i, 0, 0, 0] for v in batch))
        torch.testing.assert_close(together[i : i + 1], oracle(x[i : i + 1], single))
    half = oracle(x.float(), batch.like(x.float()))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), together, rtol=1e-4, atol=1e-4)
    assert isinstance(oracle, Oracle)


@pytest.mark.parametrize("chunk", [1, 11, 24])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch):
    points, label = some_set(13)
    x, level, asked = normal(4, *SHAPE, seed=2), at(0.9, 0.3), torch.tensor([0, 2, 1, 0])
    oracle = Smoothed(points, 0.2, label)
    whole, classed = oracle(x, level), oracle(x, level, asked)
    monkeypatch.setattr(oracles, "CHUNK", chunk)
    torch.testing.assert_close(oracle(x, level), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(oracle(x, level, asked), classed, rtol=1e-12, atol=1e-12)


# --- in the place of a network ------------------------------------------------------------------


def test_zero_output_is_optimal_under_karras_preconditioning_on_its_own_gaussian():
    sigma_data, schedule = 0.5, Karras()
    g = Gaussian.from_covariance(torch.zeros(SHAPE), sigma_data**2 * EYE)
    zero = Denoiser(lambda x, timestep, label: torch.zeros_like(x), schedule, KarrasPrecond(0.5))
    n = 20_000
    level = schedule(torch.linspace(0, 1, n, dtype=torch.float64)).like(normal(1, 1, 1, 1))
    noise = normal(n, *SHAPE, seed=1)
    x0 = g.draw(normal(n, *SHAPE, seed=2))
    x = level.mix(x0, noise)
    torch.testing.assert_close(zero(x, level), g(x, level), rtol=1e-12, atol=1e-12)
    loss = zero.loss(x0, noise, level)
    assert abs(loss.mean() - 1) < 4 * loss.std() / math.sqrt(n)


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m])
def test_a_perfect_solver_ends_exactly_on_the_set(sampler):
    points, _ = some_set()
    oracle = FiniteSet(points)
    grid = levels(Karras(), 40)
    x = start(grid[0], keyed_normal(0, Stream.SAMPLE, range(16), SHAPE).double())
    end = finish(sampler(lambda v, level: oracle(v, level), x, grid))
    distance = (end[:, None] - points[None]).flatten(2).abs().amax(2)
    assert distance.amin(1).max() < 1e-12
    assert len(distance.argmin(1).unique()) > 2  # and not all on the same one


# --- the published table on real digits ---------------------------------------------------------


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """1,437 training digits with classes, 360 held out; values in [-1, 1]."""
    data = load_digits()
    index = np.random.default_rng(0).permutation(len(data.images))
    x0 = torch.from_numpy(data.images[index] / 8 - 1).unsqueeze(1)
    return x0[:1437], torch.from_numpy(data.target[index[:1437]]), x0[1437:]


def ten_gaussians(x0: Tensor, label: Tensor) -> Mixture:
    """Covariances 0.85 S + 0.15 diag S + 0.004 I per class."""
    parts = []
    for k in range(10):
        rows = x0[label == k]
        cov = torch.from_numpy(np.cov(rows.flatten(1).numpy(), rowvar=False))
        cov = 0.85 * cov + 0.15 * cov.diag().diag() + 0.004 * torch.eye(64)
        parts.append(Gaussian.from_covariance(rows.mean(0), cov))
    counts = label.bincount().tolist()
    return Mixture(tuple(parts), tuple(float(c) for c in counts), tuple(range(10)))


@pytest.mark.parametrize(
    ("sigma", "wiener", "mixture", "optimum"),
    [
        (0.1, 0.00697, 0.00632, 0.00000),
        (0.5, 0.0761, 0.0542, 0.0046),
        (2.0, 0.2281, 0.2139, 0.2013),
    ],
)
def test_digits_bars(sigma: float, wiener: float, mixture: float, optimum: float):
    """Mean squared error per value of the bars on held-out digits and of the set on itself."""
    train, label, held_out = digits()
    level = at(1.0, sigma)

    def error(oracle: Oracle, x0: Tensor) -> float:
        x0 = x0.repeat(4, 1, 1, 1)
        x = level.mix(x0, normal(*x0.shape, seed=9))
        return float((oracle(x, level) - x0).square().mean())

    assert error(fit_gaussian(train), held_out) == pytest.approx(wiener, rel=0.02)
    assert error(ten_gaussians(train, label), held_out) == pytest.approx(mixture, rel=0.02)
    assert error(FiniteSet(train), train) == pytest.approx(optimum, rel=0.03, abs=1e-4)


# --- refusals -----------------------------------------------------------------------------------


def test_what_cannot_be_is_refused():
    one = torch.zeros(SHAPE)
    with pytest.raises(ConfigError, match=r"eigenvectors must have shape \(4, 2\)"):
        Gaussian(one, torch.ones(2), torch.ones(3, 2))
    with pytest.raises(ConfigError, match="negative"):
        Gaussian(one, torch.tensor([-1.0]), torch.ones(4, 1))
    with pytest.raises(ConfigError, match="negative"):
        Gaussian(one, torch.tensor([1.0]), torch.ones(4, 1), rest=-0.1)
    with pytest.raises(ConfigError, match=r"shrink must be in \[0, 1\]; got 1.5"):
        fit_gaussian(some_set()[0], 1.5)
    with pytest.raises(ConfigError, match="bandwidth must be at least 0; got -1"):
        Smoothed(some_set()[0], -1.0)
    g = full_gaussian()
    with pytest.raises(ConfigError, match="got 1, 2 and 1"):
        Mixture((g,), (1.0, 2.0), (0,))
    with pytest.raises(ConfigError, match="weights must be above 0"):
        Mixture((g, g), (1.0, 0.0), (0, 1))


def test_a_label_without_data_is_refused():
    points, label = some_set()
    x, level, asked = normal(2, *SHAPE), at(1.0, 0.5), torch.tensor([1, 7])
    with pytest.raises(ConfigError, match=r"label 7 has no data; use one of \[0, 1, 2\]"):
        FiniteSet(points, label)(x, level, asked)
    with pytest.raises(ConfigError, match=r"label 7 has no data; use one of \[1\]"):
        Mixture((full_gaussian(),), (1.0,), (1,))(x, level, asked)
    with pytest.raises(ConfigError, match="without labels"):
        FiniteSet(points)(x, level, asked)

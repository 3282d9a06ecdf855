"""Exact denoisers against Bayes' rule done by brute force, and the identities between them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from undiffuse import oracles
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import ConfigError
from undiffuse.evaluation import LevelDenoiser
from undiffuse.noise import (
    Flow,
    Karras,
    NoiseLevel,
    Stream,
    clean,
    keyed_normal,
    keyed_uniform,
    levels,
)
from undiffuse.oracles import (
    FiniteSet,
    Gaussian,
    Known,
    Mixture,
    Oracle,
    Smoothed,
    fit_gaussian,
    gaussian_flow,
    measured_mmse,
    power_law_field,
)
from undiffuse.sampling import ddim, dpmpp_2m, dpmpp_3m, finish, heun, ipndm, start, unipc

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


# --- random fields ------------------------------------------------------------------------------


def filtered(white: Tensor, exponent: float) -> Tensor:
    """Fields on a torus: each wave of `white` times k^(-exponent / 2), one after the other."""
    side = white.shape[-1]
    place = torch.arange(side, dtype=torch.float64) * 2 * math.pi / side
    fields = torch.zeros_like(white)
    for v in range(side):
        for u in range(side):
            k = math.hypot(min(v, side - v), min(u, side - u))
            angle = place[:, None] * v + place * u
            wave = torch.complex(angle.cos(), angle.sin())
            share = (white * wave.conj()).sum((-2, -1), keepdim=True)
            fields += (share * wave).real * (k and k ** (-exponent / 2))
    return fields


def test_a_power_law_field_is_a_window_of_periodic_ones():
    """White noise is a sum of independent impulses; their answers add up to the covariance."""
    torus, (height, width) = 8, (3, 4)
    impulses = torch.eye(torus**2, dtype=torch.float64).reshape(-1, torus, torus)
    seen = filtered(impulses, 1.7)[:, :height, :width].flatten(1)
    expected = seen.mT @ seen
    expected *= 0.6**2 / expected[0, 0]
    g = power_law_field(1.7, height, width, spread=0.6)
    assert g.mean.shape == (1, height, width)
    found = (g.eigenvectors * g.eigenvalues) @ g.eigenvectors.mT
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.5])
def test_a_power_law_field_has_its_spread_and_knows_neither_edge_nor_period(exponent: float):
    g = power_law_field(exponent, 6, 9)
    cov = (g.eigenvectors * g.eigenvalues) @ g.eigenvectors.mT
    torch.testing.assert_close(cov.diag(), torch.ones(54, dtype=torch.float64))
    by_place = cov.reshape(6, 9, 6, 9)
    torch.testing.assert_close(by_place[0, 0, :5, :8], by_place[1, 1, 1:, 1:])  # moved by a pixel
    if exponent >= 1.0:  # a period would bring the last column back to the first
        assert by_place[0, 0, 0].diff().max() < 0.02
        assert by_place[0, 0, 0, 8] < 0.6 * by_place[0, 0, 0, 1]


def test_a_larger_torus_makes_the_window_a_smaller_part():
    """Waves longer than the window: its mean varies more."""
    means = [
        power_law_field(2.0, 8, 8, torus=torus).eigenvalues.max() / 64 for torus in (8, 16, 32)
    ]
    assert means[0] < means[1] < means[2] < 1


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


def test_the_score_is_the_slope_of_the_log_density():
    """(alpha D* - x) / sigma^2 (Tweedie's formula)."""
    mixture = ORACLES["mixture"]
    for oracle in (full_gaussian(), low_rank_gaussian(0.1), mixture):
        for level in LEVELS[:3]:
            x = normal(3, *SHAPE, seed=2).requires_grad_()
            (slope,) = torch.autograd.grad(oracle.log_density(x, level).sum(), x)
            score = (level.alpha * oracle(x, level) - x) / level.sigma**2
            torch.testing.assert_close(score, slope, rtol=1e-9, atol=1e-9)


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


def test_jacobian_is_the_posterior_covariance():
    """By brute force over the points of a set."""
    (points, _), x, level = some_set(), normal(1, *SHAPE, seed=4), at(0.8, 0.6)
    square = (x - level.alpha * points).square().flatten(1).sum(1)
    weights = torch.softmax(-square / (2 * level.sigma**2), 0)
    rows = points.flatten(1) - weights @ points.flatten(1)
    expected = level.alpha / level.sigma**2 * (rows.mT * weights) @ rows
    jacobian = torch.autograd.functional.jacobian(lambda v: FiniteSet(points)(v, level), x)
    torch.testing.assert_close(jacobian.reshape(SIZE, SIZE), expected, rtol=1e-9, atol=1e-9)


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


class Largest(TorchDispatchMode):
    """The most numbers that any new tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("label", [None, torch.tensor([0, 2, 1])])
def test_memory_does_not_grow_with_the_set(label: Tensor | None, monkeypatch: pytest.MonkeyPatch):
    """Half of the set's numbers in any temporary would be found."""
    monkeypatch.setattr(oracles, "CHUNK", 600)
    points = normal(3000, 1, 5, 4, seed=1).float()
    oracle = Smoothed(points, 0.1, torch.arange(3000) % 3)
    x, level = normal(3, 1, 5, 4, seed=2), at(1.0, 0.5)
    with Largest() as largest:
        found = oracle(x, level, label)
    assert largest.numbers <= 3000  # the set's labels; its pictures are 60,000 numbers
    monkeypatch.undo()
    torch.testing.assert_close(found, oracle(x, level, label), rtol=1e-12, atol=1e-12)


def test_a_large_set_is_bayes_rule_to_rounding():
    """Ten times as many points as fit in a chunk, of single precision and far from the origin."""
    points = (normal(2000, 3, 32, 32, seed=1) + 5).float()
    assert points.numel() > 10 * oracles.CHUNK
    x, level = points[:2].double() + 30 * normal(2, 3, 32, 32, seed=2), at(1.0, 30.0)
    parts = points.split(100)
    square = torch.cat([(x[:, None] - p.double()).square().flatten(2).sum(2) for p in parts], 1)
    weights = torch.softmax(-square / (2 * 30**2), 1).split(100, 1)
    expected = sum(w @ p.double().flatten(1) for w, p in zip(weights, parts, strict=True))
    assert float(torch.cat(weights, 1).max()) < 0.9  # a mean of many
    torch.testing.assert_close(
        FiniteSet(points)(x, level).flatten(1), expected, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize(("set_on", "x_on"), [("cpu", "meta"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_the_set_may_lie_elsewhere_than_x(set_on: str, x_on: str):
    """`meta` knows devices and shapes but no numbers: mixing it with another device is refused."""
    if "cuda" in (set_on, x_on) and not torch.cuda.is_available():
        pytest.skip("no GPU")
    (points, label), x, level = some_set(), normal(4, *SHAPE, seed=2).float(), at(0.9, 0.3)
    for make in (FiniteSet, lambda p, lab: Smoothed(p, 0.2, lab)):
        oracle = make(points.to(set_on), label.to(set_on))
        found = oracle(x.to(x_on), level)
        assert found.device.type == x_on
        assert found.dtype == torch.float32
        assert oracle.x0.device.type == set_on
        if x_on != "meta":
            asked = torch.tensor([0, 2, 1, 0])
            torch.testing.assert_close(found.cpu(), make(points, label)(x, level))
            torch.testing.assert_close(
                oracle(x.to(x_on), level, asked.to(x_on)).cpu(),
                make(points, label)(x, level, asked),
            )


# --- the least possible error, measured ---------------------------------------------------------


def draws(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise for pictures, uniform numbers for choices, and noise to add."""
    uniform = torch.from_numpy(keyed_uniform(0, Stream.EVALUATE, range(count), 1)[:, 0])
    return normal(count, *SHAPE, seed=11), uniform, normal(count, *SHAPE, seed=12)


@pytest.mark.parametrize("level", [at(1.0, 0.3), at(0.6, 0.8)])
def test_measured_mmse_is_the_formula_where_there_is_one(level: NoiseLevel):
    noise, uniform, added = draws(20_000)
    g, h = full_gaussian(), 0.4
    one = Smoothed(g.mean[None], h)  # a Gaussian of covariance h^2 I
    formula = h**2 * level.sigma**2 / (level.alpha**2 * h**2 + level.sigma**2)
    for x0, oracle, expected in (
        (g.draw(noise), g, g.mmse(level)),
        (one.draw(noise, uniform)[0], one, formula),
        (Mixture((g, g), (1.0, 2.0), (0, 1)).draw(noise, uniform)[0], g, g.mmse(level)),
    ):
        found = measured_mmse(oracle, x0, added, level)
        assert abs(found.value - expected) < 4 * found.error < 0.1 * expected


@pytest.mark.parametrize("name", ["mixture", "finite", "smoothed"])
def test_measured_mmse_is_the_power_that_the_estimate_lacks(name: str):
    """E|x0 - D*|^2 = E|x0|^2 - E|D*|^2, and knowing the class is never worse."""
    oracle, level, count = ORACLES[name], at(0.8, 0.6), 20_000
    noise, uniform, added = draws(count)
    x0, label = oracle.draw(uniform) if name == "finite" else oracle.draw(noise, uniform)
    found = measured_mmse(oracle, x0, added, level)
    estimate = oracle(level.mix(x0, added), level)
    lacking = (x0.square() - estimate.square()).flatten(1).mean(1)
    scatter = float(lacking.std()) / math.sqrt(count)
    assert abs(found.value - lacking.mean()) < 4 * math.hypot(scatter, float(found.error))
    knowing = measured_mmse(oracle, x0, added, level, label)
    assert knowing.value < found.value
    with pytest.raises(ConfigError, match="at least two pictures; got 1"):
        measured_mmse(oracle, x0[:1], added[:1], level)


def test_draws_are_those_of_the_data():
    noise, uniform, _ = draws(20_000)
    a, b = full_gaussian(), low_rank_gaussian(0.2)
    x0, label = Mixture((a, b), (0.3, 0.7), (4, 9)).draw(noise, uniform)
    assert float((label == 9).double().mean()) == pytest.approx(0.7, abs=0.02)
    for part, g in ((x0[label == 4], a), (x0[label == 9], b)):
        torch.testing.assert_close(part.mean(0), g.mean, rtol=0.0, atol=0.06)
        sample = torch.from_numpy(np.cov(part.flatten(1).numpy(), rowvar=False))
        torch.testing.assert_close(sample, covariance(g), rtol=0.0, atol=0.06)
    points, classes = some_set()
    drawn, label = FiniteSet(points, classes).draw(uniform)
    index = (drawn[:, None] == points).flatten(2).all(2).long().argmax(1)
    torch.testing.assert_close(points[index], drawn)
    assert torch.equal(classes[index], label)
    assert index.bincount().min() > 20_000 / 7 * 0.9
    blurred, same = Smoothed(points, 0.3, classes).draw(noise, uniform)
    torch.testing.assert_close(blurred, drawn + 0.3 * noise)
    assert torch.equal(label, same)
    last = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert torch.equal(FiniteSet(points).draw(last)[0], points[-1:])


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


def test_an_oracle_with_a_schedule_stands_where_a_denoiser_does():
    points, label = some_set()
    known = Known(FiniteSet(points, label), Karras())
    assert isinstance(known, LevelDenoiser)
    x, level, asked = normal(3, *SHAPE), levels(known.schedule, 5)[2], torch.tensor([2, 0, 1])
    assert torch.equal(known(x, level), known.oracle(x, level))
    assert torch.equal(known(x, level, asked), known.oracle(x, level, asked))


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m, dpmpp_3m, unipc, ipndm])
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
    for setting in ({"exponent": math.nan}, {"spread": 0.0}, {"height": 0}, {"torus": 3}):
        (field,) = setting
        with pytest.raises(ConfigError, match=f"power_law_field needs .* {field}="):
            power_law_field(**{"exponent": 2.0, "height": 4, "width": 4, **setting})
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

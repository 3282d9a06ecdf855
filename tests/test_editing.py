"""Uses of a denoiser, on data whose every answer is a formula."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from undiffuse import editing
from undiffuse.editing import (
    encode,
    estimate_sigma,
    filled,
    filling,
    likelihood_slope,
    local_wiener,
    partial_levels,
    partly,
    psnr,
    reflected,
    repaint,
    slerp,
    ssim,
    tiled,
)
from undiffuse.errors import ConfigError
from undiffuse.guidance import Denoise, clipped
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    KarrasSpacing,
    LeadIn,
    LinearBetas,
    NoiseLevel,
    Schedule,
    levels,
    uniform,
)
from undiffuse.oracles import Gaussian, Mixture, gaussian_flow, power_law_field
from undiffuse.sampling import SAMPLERS, Step, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, finish, heun

SHAPE = (1, 3, 3)
SIZE = math.prod(SHAPE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signs(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).sign()


def draws(*shape: int, seed: int = 1) -> Callable[[int], Tensor]:
    return lambda step: normal(*shape, seed=1000 * seed + step)


def at(ratio: float, schedule: Schedule | None = None) -> NoiseLevel:
    return (schedule or Karras()).at(torch.tensor(ratio, dtype=torch.float64))


def smooth(variance: float = 0.3, reach: float = 2.0) -> Tensor:
    """A covariance that falls with the distance of two pixels."""
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).double()
    return variance * torch.exp(-torch.cdist(places, places) / reach)


MEAN = torch.linspace(-0.5, 0.5, SIZE, dtype=torch.float64).reshape(SHAPE)
COVARIANCE = smooth()
GAUSSIAN = Gaussian.from_covariance(MEAN, COVARIANCE)
PAIR = Mixture(
    (GAUSSIAN, Gaussian.from_covariance(-MEAN, smooth(0.1, 1.0))), (0.7, 0.3), labels=(0, 1)
)
ALL = [math.sqrt(SIZE) * row.reshape(1, *SHAPE) for row in torch.eye(SIZE, dtype=torch.float64)]


# --- how noisy is it? ---------------------------------------------------------------------------


def log_density(oracle: Gaussian | Mixture, x: Tensor, log_ratio: float) -> Tensor:
    """Of x0 + s * noise, whatever the schedule's alpha is."""
    one = torch.ones((), dtype=torch.float64)
    return oracle.log_density(x, NoiseLevel(one, one * math.exp(log_ratio), one))


@pytest.mark.parametrize("schedule", [Karras(), Cosine(), Flow()], ids=str)
@pytest.mark.parametrize("ratio", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("oracle", [GAUSSIAN, PAIR], ids=["Gaussian", "mixture"])
def test_the_slope_is_that_of_the_likelihood(
    oracle: Gaussian | Mixture, ratio: float, schedule: Schedule
) -> None:
    """Probes along the axes give the whole diagonal; for a Gaussian, differences are exact."""
    x, step = MEAN + normal(2, *SHAPE), 1e-4
    got = likelihood_slope(oracle, x, at(ratio, schedule), ALL).sum((1, 2, 3))
    high, low = (log_density(oracle, x, math.log(ratio) + h) for h in (step, -step))
    exact = oracle is GAUSSIAN
    torch.testing.assert_close(
        got, (high - low) / (2 * step), rtol=1e-6 if exact else 0.02, atol=1e-6 if exact else 0.02
    )


def test_random_signs_give_the_slope_on_average() -> None:
    x = MEAN + normal(1, *SHAPE)
    whole = likelihood_slope(GAUSSIAN, x, at(0.5), ALL)
    probes = [signs(1, *SHAPE, seed=seed) for seed in range(400)]
    some = likelihood_slope(GAUSSIAN, x, at(0.5), probes)
    torch.testing.assert_close(some, whole, rtol=0, atol=0.1)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8])
def test_the_estimate_is_the_maximum_of_the_likelihood(sigma: float) -> None:
    x = GAUSSIAN.draw(normal(300, *SHAPE)) + sigma * normal(300, *SHAPE, seed=1)
    found = estimate_sigma(GAUSSIAN, x, Cosine(), ALL)
    fine = torch.linspace(math.log(0.01), math.log(3), 1000).tolist()
    heights = [float(log_density(GAUSSIAN, x, s).sum()) for s in fine]
    assert found == pytest.approx(math.exp(fine[heights.index(max(heights))]), rel=0.015)
    assert found == pytest.approx(sigma, rel=0.2)  # the data themselves vary by 0.27 and more


def dark(count: int, sigma: float) -> tuple[Gaussian, Tensor]:
    """Black pictures with one grey column, and noise."""
    spread = torch.full((SIZE,), 1e-4, dtype=torch.float64)
    spread[::3] = 0.1
    mean = torch.full(SHAPE, -1.0, dtype=torch.float64)
    mean[..., 0] = 0.0
    oracle = Gaussian(mean, spread, torch.eye(SIZE, dtype=torch.float64))
    clean = oracle.draw(normal(count, *SHAPE)).clamp(-1, 1)
    return oracle, clean + sigma * normal(count, *SHAPE, seed=1)


def test_what_a_file_has_clipped_does_not_vote() -> None:
    oracle, noisy = dark(100, 0.2)
    clipped = noisy.clamp(-1, 1)
    assert float((clipped == -1).double().mean()) > 0.3
    assert estimate_sigma(oracle, clipped, Karras(), ALL) == pytest.approx(0.2, rel=0.1)
    clipped[0, 0, 0, 0] = 1.01  # no longer a clipped picture: all vote, and half of the noise is
    assert estimate_sigma(oracle, clipped, Karras(), ALL) < 0.16  # gone


def test_no_estimate_without_a_vote_or_a_range() -> None:
    with pytest.raises(ConfigError, match="every value is -1 or 1"):
        estimate_sigma(GAUSSIAN, signs(1, *SHAPE), Karras(), ALL)
    with pytest.raises(ConfigError, match="0 < low < high; got 2 and 1"):
        estimate_sigma(GAUSSIAN, normal(1, *SHAPE), Karras(), ALL, low=2, high=1)


@pytest.mark.parametrize(
    ("slopes", "top"),
    [
        ([-1.0, -1.0, -1.0], 0.0),  # clean: the lowest level
        ([1.0, 1.0, 1.0], 2.0),  # noisier than the highest
        ([1.0, -1.0, -1.0], 0.5),
        ([1.0, -3.0, -3.0], 0.25),
        ([1.0, -4.0, 3.0], 0.2),  # an end that lies lower than an earlier top ...
        ([0.1, -1.0, 8.0], 2.0),  # ... and one that lies higher
        ([0.0, -1.0, 0.0], 0.0),
    ],
)
def test_the_highest_point_of_some_slopes(slopes: list[float], top: float) -> None:
    assert editing._highest([0.0, 1.0, 2.0], slopes) == pytest.approx(top, abs=1e-12)


# --- pictures of other sizes --------------------------------------------------------------------


def blur(reach: int) -> Callable[[Tensor, NoiseLevel], Tensor]:
    """A convolution that sees `reach` pixels far, with zeros beyond the edge as networks have."""
    kernel = normal(1, 1, 2 * reach + 1, 2 * reach + 1, seed=reach)
    return lambda x, level: F.conv2d(x, kernel, padding=reach)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.data())
def test_tiles_leave_nothing_out(height: int, width: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    x = normal(1, 2, height, width)
    got = tiled(lambda x, level: x, tile, overlap)(x, at(1.0))
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(24, 24), (25, 40), (61, 17), (9, 64)])
def test_tiles_are_the_whole_where_a_tile_sees_enough(size: tuple[int, int]) -> None:
    """The outermost quarter of the overlap has no say: 3 of 12 pixels, enough for 3, not for 4."""
    x = normal(2, 1, *size)
    whole = blur(3)(x, at(1.0))
    torch.testing.assert_close(tiled(blur(3), 24, 12)(x, at(1.0)), whole, rtol=1e-5, atol=1e-5)
    if max(size) > 24:
        short = tiled(blur(4), 24, 12)(x, at(1.0)) - blur(4)(x, at(1.0))
        assert float(short.abs().max()) > 1e-3


def test_tiles_lie_where_the_network_halves() -> None:
    def halving(x: Tensor, level: NoiseLevel) -> Tensor:
        return F.avg_pool2d(x, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)

    x = normal(1, 1, 52, 36)
    whole = halving(x, at(1.0))
    torch.testing.assert_close(tiled(halving, 16, 8)(x, at(1.0)), whole, rtol=1e-6, atol=1e-6)
    wrong = tiled(halving, 20, 6)(x, at(1.0)) - whole  # the second tile begins at 14
    assert float(wrong.abs().max()) > 0.1


@pytest.mark.parametrize("overlap", [-1, 8, 9])
def test_tiles_that_cannot_overlap(overlap: int) -> None:
    with pytest.raises(
        ConfigError, match=f"overlap must be at least 0 and below .* 8; got {overlap}"
    ):
        tiled(blur(1), 8, overlap)


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (5, 16), (1, 3)])
def test_a_mirror_at_the_edge(size: tuple[int, int]) -> None:
    seen: list[Tensor] = []

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        seen.append(x)
        return 2 * x

    x = normal(2, 1, *size)
    assert torch.equal(reflected(denoise, 4)(x, at(1.0)), 2 * x)
    (wide,) = seen
    assert wide.shape[-2] % 4 == wide.shape[-1] % 4 == 0
    assert torch.equal(wide[..., : size[0], : size[1]], x)
    if size == (9, 11):
        assert torch.equal(wide[..., 9:, :11], x[..., 5:8, :].flip(-2))


# --- the posterior ------------------------------------------------------------------------------


def test_a_stochastic_sampler_from_the_noisy_picture_draws_from_the_posterior() -> None:
    """Its error is twice the mean's; a deterministic one always ends at the same place."""
    level, count = at(0.6), 4000
    clean = GAUSSIAN.draw(normal(1, *SHAPE, seed=5))
    noisy = (clean + 0.6 * normal(1, *SHAPE, seed=6)).expand(count, *SHAPE)
    grid = levels(Karras(), 40, KarrasSpacing(high=0.6))
    made = finish(ddpm(GAUSSIAN, noisy, grid, noise=draws(count, *SHAPE))).flatten(1)
    mean = GAUSSIAN(noisy[:1], level).flatten()
    covariance = COVARIANCE - COVARIANCE @ torch.linalg.solve(
        COVARIANCE + 0.36 * torch.eye(SIZE), COVARIANCE
    )
    torch.testing.assert_close(made.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(made.mT), covariance, rtol=0, atol=0.02)
    assert float(finish(ddim(GAUSSIAN, noisy, grid)).var(0).max()) < 1e-20


# --- inpainting ---------------------------------------------------------------------------------

HOLE = torch.zeros(1, *SHAPE, dtype=torch.bool)
HOLE[..., 1:, 1:] = True
IN, OUT = HOLE.flatten().nonzero()[:, 0], (~HOLE).flatten().nonzero()[:, 0]
KNOWN = GAUSSIAN.draw(normal(1, *SHAPE, seed=4))


def exact_filling() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the hole, given the rest."""
    gain = torch.linalg.solve(COVARIANCE[OUT][:, OUT], COVARIANCE[OUT][:, IN]).mT
    mean = MEAN.flatten()[IN] + gain @ (KNOWN - MEAN).flatten()[OUT]
    return mean, COVARIANCE[IN][:, IN] - gain @ COVARIANCE[OUT][:, IN]


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def distance(pictures: Tensor) -> float:
    """Wasserstein-2 to the exact filling, over its standard deviation."""
    mean, covariance = exact_filling()
    found = pictures.flatten(1)[:, IN]
    half, spread = root(covariance), torch.cov(found.mT)
    cross = root(half @ spread @ half)
    squared = (found.mean(0) - mean).square().sum() + torch.trace(covariance + spread - 2 * cross)
    return float((squared / torch.trace(covariance)).sqrt())


@pytest.mark.parametrize("schedule", [Karras(), LinearBetas(), Flow()], ids=str)
@pytest.mark.parametrize("ratio", [0.05, 0.5, 5.0])
def test_moments_give_the_exact_conditional_mean(ratio: float, schedule: Schedule) -> None:
    """E[x0 | x, known]: x is a second, noisy look at all pixels."""
    level, x = at(ratio, schedule), normal(2, *SHAPE, seed=8)
    got = filled(GAUSSIAN, KNOWN.expand(2, *SHAPE), HOLE, len(OUT), tolerance=0.0)(x, level)
    a, s = float(level.alpha), float(level.sigma)
    looks = torch.cat((torch.eye(SIZE, dtype=torch.float64)[OUT], a * torch.eye(SIZE)))
    noise = torch.diag(torch.tensor([0.0] * len(OUT) + [s**2] * SIZE, dtype=torch.float64))
    seen = torch.cat((KNOWN.flatten()[OUT].expand(2, -1), x.flatten(1)), 1)
    both = looks @ COVARIANCE @ looks.mT + noise
    gain = torch.linalg.solve(both, looks @ COVARIANCE).mT
    wanted = MEAN.flatten() + (seen - looks @ MEAN.flatten()) @ gain.mT
    torch.testing.assert_close(got.flatten(1), wanted, rtol=1e-6, atol=1e-6)


FIELD = power_law_field(3.0, 8, 8, spread=0.3)
LOWER = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
LOWER[..., 4:, :] = True


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0, 5.0, 80.0])
def test_what_the_defaults_leave_of_the_correction(ratio: float) -> None:
    """Half of a field with the spectrum of smooth pictures: 32 pixels to fill, 32 known ones."""
    x0, noise = FIELD.draw(normal(16, 1, 8, 8)), normal(16, 1, 8, 8, seed=1)
    x, level = x0 + ratio * noise, at(ratio)
    exact = filled(FIELD, x0, LOWER, 64, tolerance=0.0)(x, level)
    plain = torch.where(LOWER, FIELD(x, level), x0)

    def left(told: Denoise) -> float:
        return float((told(x, level) - exact).norm() / (exact - plain).norm())

    assert left(filled(FIELD, x0, LOWER)) < 0.08
    assert ratio < 1.0 or left(filled(FIELD, x0, LOWER, iterations=2)) > 0.3


def test_the_defaults_fill_nearer_to_the_exact_conditional_than_two_iterations() -> None:
    """By energy distance, 2 E|X - Y| - E|X - X'| - E|Y - Y'|, over the deviation."""
    inside, count = LOWER.flatten(), 200
    covariance = (FIELD.eigenvectors * FIELD.eigenvalues) @ FIELD.eigenvectors.mT
    gain = torch.linalg.solve(covariance[~inside][:, ~inside], covariance[~inside][:, inside]).mT
    spread = covariance[inside][:, inside] - gain @ covariance[~inside][:, inside]
    known = FIELD.draw(normal(1, 1, 8, 8, seed=2))
    exact = gain @ known.flatten()[~inside] + normal(count, 32, seed=3) @ root(spread)
    grid = levels(Karras(), 12, LeadIn(0.3, 64))

    def apart(told: Denoise) -> float:
        x = 80 * normal(count, 1, 8, 8, seed=4)
        made = finish(dpmpp_2m_sde(told, x, grid, noise=draws(count, 1, 8, 8)))[:, LOWER[0]]
        own = (torch.cdist(one, one).sum() / (count * (count - 1)) for one in (made, exact))
        return float(2 * torch.cdist(made, exact).mean() - sum(own)) / math.sqrt(spread.trace())

    assert apart(filled(FIELD, known, LOWER)) < 0.01
    assert apart(filled(FIELD, known, LOWER, iterations=2)) > 0.02


@given(st.integers(0, 30))
def test_a_derivative_that_is_no_covariance_never_makes_the_fit_worse(seed: int) -> None:
    """A network's is neither symmetric nor positive; conjugate gradients would go astray."""
    matrix, missing = normal(SIZE, SIZE, seed=seed), normal(2, *SHAPE, seed=seed + 100)
    missing = torch.where(HOLE, 0.0, missing)

    def spread(v: Tensor) -> Tensor:
        return (v.flatten(1) @ matrix.mT).reshape(v.shape)

    def rest(iterations: int) -> Tensor:
        change = editing._conditioned(spread, missing, HOLE, iterations, 0.0)
        return torch.where(HOLE, 0.0, missing - change).flatten(1).norm(dim=1)

    rests = torch.stack([missing.flatten(1).norm(dim=1), *(rest(n) for n in range(1, 6))])
    assert float(rests.diff(dim=0).max()) < 1e-9
    alone = editing._conditioned(spread, missing[:1], HOLE, 4, 0.1)
    both = editing._conditioned(spread, missing, HOLE, 4, 0.1)
    torch.testing.assert_close(alone, both[:1])


def test_filling_by_moments_is_the_exact_conditional_and_replacement_is_biased() -> None:
    """At equal steps. RePaint's error falls with its repeats, towards that of the step length."""
    count = 1500
    grid = levels(Karras(), 20, KarrasSpacing(high=10.0))
    x, noise = float(grid[0].sigma) * normal(count, *SHAPE), draws(count, *SHAPE)

    def painted(repeats: int) -> float:
        steps = repaint(
            GAUSSIAN, x, grid, known=KNOWN, hole=HOLE, noise=noise, num_resamples=repeats
        )
        return distance(finish(steps))

    by_moments = distance(finish(dpmpp_2m(filled(GAUSSIAN, KNOWN, HOLE), x, grid)))
    replaced, some, many = painted(1), painted(3), painted(12)
    assert by_moments < 0.15
    assert replaced > 0.4
    assert replaced > 1.2 * some > 1.2 * 1.2 * many > 1.2 * 1.2 * 1.2 * by_moments


@pytest.mark.parametrize("how", ["moments", "repaint"])
def test_known_pixels_stay_bit_for_bit(how: str) -> None:
    known, grid = KNOWN.float().expand(3, *SHAPE), levels(Karras(), 4)
    x, noise = 80 * normal(3, *SHAPE).float(), lambda step: normal(3, *SHAPE, seed=step).float()
    steps = {
        "moments": lambda: ddpm(filled(GAUSSIAN, known, HOLE), x, grid, noise=noise),
        "repaint": lambda: repaint(
            GAUSSIAN, x, grid, known=known, hole=HOLE, noise=noise, num_resamples=2
        ),
    }[how]()
    last: Step = list(steps)[-1]
    assert last.x.dtype == torch.float32
    assert torch.equal(last.x[~HOLE.expand(3, -1, -1, -1)], known[~HOLE.expand(3, -1, -1, -1)])
    assert float((last.x - known).abs().max()) > 0.01


def test_nothing_within_the_hole_is_looked_at() -> None:
    other = torch.where(HOLE, torch.nan, KNOWN)
    grid, x = levels(Karras(), 3), normal(1, *SHAPE)
    for known in (KNOWN, other):
        by_moments = finish(ddim(filled(GAUSSIAN, known, HOLE), x, grid))
        painted = finish(repaint(GAUSSIAN, x, grid, known=known, hole=HOLE, noise=draws(1, *SHAPE)))
        if known is KNOWN:
            wanted = by_moments, painted
    assert torch.equal(by_moments, wanted[0])
    assert torch.equal(painted, wanted[1])


def test_a_hole_of_everything_is_plain_sampling_and_one_of_nothing_changes_nothing() -> None:
    grid, x = levels(Karras(), 5), 80 * normal(2, *SHAPE)
    everything, nothing = torch.ones_like(HOLE), torch.zeros_like(HOLE)
    known = KNOWN.expand(2, *SHAPE)
    got = finish(ddim(filled(GAUSSIAN, known, everything), x, grid))
    torch.testing.assert_close(got, finish(ddim(GAUSSIAN, x, grid)))
    assert torch.equal(finish(ddim(filled(GAUSSIAN, known, nothing), x, grid)), known)


def test_filling_as_a_sampler_keeps_to_the_range_of_pictures() -> None:
    known, grid = KNOWN.clamp(-1, 1), levels(Karras(), 6)
    x, noise = 80 * normal(40, *SHAPE), draws(40, *SHAPE)
    steps = list(filling(known, HOLE)(GAUSSIAN, x, grid, noise=noise))
    assert max(float(step.x0.abs().max()) for step in steps) == 1.0
    assert torch.equal(steps[-1].x[:, ~HOLE[0]], known[:, ~HOLE[0]].expand(40, -1))
    plain = finish(filling(known, HOLE, ddim, 3)(GAUSSIAN, x, grid))
    assert torch.equal(plain, finish(ddim(clipped(filled(GAUSSIAN, known, HOLE, 3)), x, grid)))


def test_counts_below_one_and_no_noise() -> None:
    grid = levels(Karras(), 2)
    with pytest.raises(ConfigError, match="iterations must be at least 1; got 0"):
        filled(GAUSSIAN, KNOWN, HOLE, iterations=0)
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(ConfigError, match=f"tolerance must be at least 0 .* got {wrong}"):
            filled(GAUSSIAN, KNOWN, HOLE, tolerance=wrong)
    with pytest.raises(ConfigError, match="num_resamples must be at least 1; got 0"):
        next(repaint(GAUSSIAN, KNOWN, grid, known=KNOWN, hole=HOLE, num_resamples=0))
    with pytest.raises(ConfigError, match="pass noise"):
        next(repaint(GAUSSIAN, KNOWN, grid, known=KNOWN, hole=HOLE))


# --- image to image, encoding, interpolation ----------------------------------------------------

SCHEDULES = [Karras(), Cosine(), LinearBetas(), Flow()]


def ratios(grid: Sequence[NoiseLevel]) -> list[float]:
    return [float(level.ratio) for level in grid]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("left", [0, 1, 7, 12])
def test_strength_is_the_share_of_the_steps(schedule: Schedule, left: int) -> None:
    grid = levels(schedule, 12)
    assert partial_levels(schedule, grid, left / 12) == grid[12 - left :]


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 30))
def test_more_strength_is_more_noise_and_more_steps(a: float, b: float, steps: int) -> None:
    whole = levels(Karras(), steps)
    low, high = (partial_levels(Karras(), whole, one) for one in sorted((a, b)))
    assert float(low[0].ratio) <= float(high[0].ratio) * (1 + 1e-6)
    assert len(low) <= len(high)
    assert len(low) - 1 == math.ceil(round(steps * min(a, b), 9))
    assert ratios(low)[1:] == ratios(whole)[len(whole) - len(low) + 1 :]
    assert ratios(low) == sorted(ratios(low), reverse=True)


def test_a_part_of_a_step_by_hand() -> None:
    grid = levels(Karras(), 2)  # 80, 0.002, clean
    found = partial_levels(Karras(), grid, 0.75)
    assert ratios(found) == pytest.approx([math.sqrt(80 * 0.002), 0.002, 0.0])


@pytest.mark.parametrize("strength", [0.8, 0.9, 0.999, 1.0])
def test_a_part_of_a_step_from_pure_noise_is_not_all_noise(strength: float) -> None:
    """Where the first ratio is infinite there is no ratio in between, but there is a time."""
    grid = levels(Flow(), 4, uniform)
    found = partial_levels(Flow(), grid, strength)
    assert float(found[0].t) == pytest.approx(strength)
    assert float(found[0].alpha) == pytest.approx(1 - strength)
    assert found[1:] == grid[1:]
    (only, _) = partial_levels(Flow(), levels(Flow(), 1, uniform), strength)  # before clean
    assert float(only.t) == pytest.approx(strength)


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(ConfigError, match=r"strength must be in \[0, 1\]"):
        partial_levels(Karras(), levels(Karras(), 2), strength)


def edited(strength: float, x0: Tensor, x: Tensor) -> Tensor:
    sampler = partly(x0, strength, Karras(), ddim)
    return finish(sampler(GAUSSIAN, x, levels(Karras(), 16)))


def test_strength_0_returns_the_picture_and_1_has_never_seen_it() -> None:
    x0, x = KNOWN, 80 * normal(3, *SHAPE)
    assert torch.equal(edited(0.0, x0, x), x0.expand_as(x))
    assert torch.equal(edited(1.0, x0, x), finish(ddim(GAUSSIAN, x, levels(Karras(), 16))))
    assert torch.equal(edited(1.0, 5 * x0, x), edited(1.0, x0, x))


def test_an_edited_picture_is_the_flow_from_where_it_was_noised() -> None:
    x0, noise = KNOWN, normal(3, *SHAPE)
    whole = levels(Karras(), 64)
    first = partial_levels(Karras(), whole, 0.5)[0]
    exact = gaussian_flow(GAUSSIAN, x0 + float(first.sigma) * noise, first, whole[-1])
    got = finish(partly(x0, 0.5, Karras(), heun)(GAUSSIAN, 80 * noise, whole))
    torch.testing.assert_close(got, exact, rtol=0, atol=0.01)
    away = [float((edited(s, x0, 80 * noise) - x0).norm()) for s in (0.1, 0.3, 0.6)]
    assert away == sorted(away)


@pytest.mark.parametrize("schedule", [Karras(0.02, 20.0), Cosine()], ids=str)
def test_encoding_is_the_flow_upwards_and_decoding_brings_it_back(schedule: Schedule) -> None:
    """Against the exact flow, of order 2."""
    x0 = GAUSSIAN.draw(normal(3, *SHAPE))
    wrong: list[float] = []
    for steps in (32, 64):
        grid = levels(schedule, steps, KarrasSpacing(high=20.0, low=0.02))
        noise = encode(GAUSSIAN, x0, grid)
        exact = gaussian_flow(GAUSSIAN, float(grid[-2].alpha) * x0, grid[-2], grid[0])
        wrong.append(float((noise - exact).norm() / exact.norm()))
        back = finish(heun(GAUSSIAN, noise, grid))
    assert wrong[1] < 2e-3
    assert wrong[0] / wrong[1] == pytest.approx(4, rel=0.3)
    torch.testing.assert_close(back, x0, rtol=0, atol=0.02)


DETERMINISTIC = [name for name in SAMPLERS if name not in ("ddpm", "dpmpp_2m_sde")]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_deterministic_sampler_encodes_up_to_pure_noise(name: str) -> None:
    """Where alpha = 0 the result is noise alone: sigma = 1 times standard normal numbers."""
    x0 = GAUSSIAN.draw(normal(3, *SHAPE))
    wrong: list[float] = []
    for steps in (16, 64):
        grid = levels(Flow(), steps, uniform)
        noise = encode(GAUSSIAN, x0, grid, SAMPLERS[name])
        exact = gaussian_flow(GAUSSIAN, float(grid[-2].alpha) * x0, grid[-2], grid[0])
        wrong.append(float((noise - exact).norm() / exact.norm()))
    assert float(grid[0].alpha) == 0.0
    assert wrong[1] < 0.1
    assert wrong[1] < wrong[0] / 2


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde"])
def test_what_adds_noise_does_not_encode(name: str) -> None:
    with pytest.raises(ConfigError, match="eta 1 adds noise at every step"):
        encode(GAUSSIAN, KNOWN, levels(Flow(), 4, uniform), SAMPLERS[name])


@given(st.floats(0.0, 1.0), st.integers(0, 20))
def test_slerp_stays_on_the_sphere(share: float, seed: int) -> None:
    a, b = normal(2, 2, *SHAPE, seed=seed)
    a, b = (v / v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for v in (a, b))
    c = slerp(a, b, share)
    lengths = c.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-9)
    whole, part = ((v * a).sum((1, 2, 3)).clamp(-1, 1).arccos() for v in (b, c))
    torch.testing.assert_close(part, share * whole, rtol=0, atol=1e-6)


def test_slerp_ends_at_its_ends_and_joins_parallel_ones_straight() -> None:
    a, b = normal(2, 3, *SHAPE)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, 3 * a, 0.25), 1.5 * a)
    assert bool(slerp(a, -a, 0.5).isfinite().all())
    wide = slerp(*normal(2, 1, 1, 100, 100), 0.5)
    assert float(wide.std()) == pytest.approx(1.0, abs=0.02)  # a straight line has 0.71


# --- how close? ---------------------------------------------------------------------------------


def test_psnr_by_hand() -> None:
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack((a[0], a[1] + 0.2))
    assert psnr(a, b).tolist() == pytest.approx([126.02, 20.0], abs=0.01)


@pytest.mark.parametrize("shape", [(1, 17, 23), (3, 11, 40)])
def test_ssim_is_that_of_scikit_image(shape: tuple[int, int, int]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a = normal(2, *shape).clamp(-1, 1)
    b = (a + 0.3 * normal(2, *shape, seed=1)).clamp(-1, 1)
    wanted = [
        metrics.structural_similarity(
            one.numpy(),
            two.numpy(),
            data_range=2,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, two in zip(a, b, strict=True)
    ]
    assert ssim(a, b).tolist() == pytest.approx(wanted, abs=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


def test_ssim_of_small_pictures_by_hand() -> None:
    """5x4 pixels hold a window of 3x3, at 3x2 places."""
    a, b = normal(1, 1, 5, 4), normal(1, 1, 5, 4, seed=1)
    line = torch.exp(torch.tensor([-1.0, 0.0, -1.0], dtype=torch.float64) / 4.5)
    w = torch.outer(line, line) / line.sum() ** 2
    values: list[float] = []
    for top in range(3):
        for left in range(2):
            p, q = (v[0, 0, top : top + 3, left : left + 3] for v in (a, b))
            mp, mq = float((w * p).sum()), float((w * q).sum())
            vp, vq = float((w * (p - mp) ** 2).sum()), float((w * (q - mq) ** 2).sum())
            cov = float((w * (p - mp) * (q - mq)).sum())
            c1, c2 = 0.02**2, 0.06**2
            top_part = (2 * mp * mq + c1) * (2 * cov + c2)
            values.append(top_part / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert float(ssim(a, b)) == pytest.approx(sum(values) / 6, abs=1e-9)


def test_the_local_wiener_filter_is_scipys_away_from_the_edge() -> None:
    signal = pytest.importorskip("scipy.signal")
    x = normal(1, 1, 20, 20).cumsum(-1) / 5
    wanted = torch.from_numpy(signal.wiener(x[0, 0].numpy(), 3, noise=0.04))
    got = local_wiener(x, 0.2)[0, 0]
    torch.testing.assert_close(got[1:-1, 1:-1], wanted[1:-1, 1:-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_the_local_wiener_filter_of_a_line_is_that_of_the_line_repeated(
    size: tuple[int, int],
) -> None:
    """One pixel has nothing to mirror; a mirror of equal rows is what it is at the edge."""
    x = normal(2, 1, *size)
    got = local_wiener(x, 0.2)
    assert got.shape == x.shape
    thick = F.pad(x, (1, 1, 1, 1), mode="replicate")
    inner = local_wiener(F.pad(thick, (1, 1, 1, 1)), 0.2)[..., 2:-2, 2:-2]
    torch.testing.assert_close(got, inner)

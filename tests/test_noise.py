"""Schedules, grids of levels and keyed random numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.noise import (
    MIN_SIGMA,
    Cosine,
    Flow,
    Karras,
    KarrasSpacing,
    LeadIn,
    LinearBetas,
    NoiseLevel,
    ScaledLinearBetas,
    Schedule,
    Sigmoid,
    Stream,
    clean,
    descending,
    keyed,
    keyed_even,
    keyed_normal,
    keyed_uniform,
    levels,
    order,
    uniform,
)
from undiffuse.oracles import power_law_field

SCHEDULES = [
    *(LinearBetas(), LinearBetas(37, last=0.3), ScaledLinearBetas(), Sigmoid(), Sigmoid(60)),
    *(Cosine(), Cosine(100), Karras(), Flow()),
]

GOLDEN_UNIFORM = [0.47515916035519756, 0.48792174538598776]
GOLDEN_NORMAL = [-1.0755235, -0.5424798]
GOLDEN_ORDER = [2, 0, 4, 1, 5, 3]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- NoiseLevel ---------------------------------------------------------------------------------


def test_mix_and_noise_in_are_inverse():
    level = NoiseLevel(*f64(0.6, 0.8, 0.5))
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    x = level.mix(x0, noise)
    assert torch.equal(x, 0.6 * x0 + 0.8 * noise)
    torch.testing.assert_close(level.noise_in(x, x0), noise, rtol=1e-13, atol=1e-13)
    assert float(level.ratio) == pytest.approx(4 / 3, rel=1e-15)


def test_like_rounds_once_and_shapes_for_pictures():
    level = Karras()(f64(0.1, 0.5, 0.9))
    there = level.like(torch.zeros(3, 1, 2, 2))
    for before, after in zip(level, there, strict=True):
        assert after.shape == (3, 1, 1, 1)
        assert torch.equal(after.flatten(), before.float())


def test_a_shared_float64_level_leaves_float32_pictures_float32():
    level = levels(Cosine(), 3)[1]
    assert level.alpha.dtype == torch.float64
    assert level.mix(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).dtype == torch.float32


# --- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 1000])
def test_linear_betas_are_ddpm_on_the_grid(steps: int):
    """alpha_bar by a plain cumulative product in numpy, float64."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, steps))
    level = LinearBetas(steps)(torch.arange(steps, dtype=torch.float64) / (steps - 1))
    np.testing.assert_allclose(level.alpha.numpy() ** 2, alpha_bar, rtol=1e-12)
    # 1 - alpha_bar cancels in the reference, not in ours
    np.testing.assert_allclose(level.sigma.numpy() ** 2, 1 - alpha_bar, rtol=1e-11)
    assert float(level.sigma[0]) == pytest.approx(0.01, rel=1e-14)


@pytest.mark.parametrize("steps", [10, 1000])
def test_sigmoid_is_its_formula_on_the_grid(steps: int):
    """2212.11972, figure 8: gamma(t) from sigmoid(-3) to sigmoid(3), turned upside down."""

    def gamma(t: float) -> float:
        low, high, at = (1 / (1 + math.exp(-v)) for v in (-3.0, 3.0, -3.0 + 6.0 * t))
        return (high - at) / (high - low)

    betas = [min(1 - gamma((i + 1) / steps) / gamma(i / steps), 0.999) for i in range(steps)]
    alpha_bar = np.cumprod(1 - np.array(betas))
    level = Sigmoid(steps)(torch.arange(steps, dtype=torch.float64) / (steps - 1))
    np.testing.assert_allclose(level.alpha.numpy() ** 2, alpha_bar, rtol=1e-8)
    np.testing.assert_allclose(level.sigma.numpy() ** 2, 1 - alpha_bar, rtol=1e-8)


def test_scaled_linear_is_linear_in_the_root_of_beta():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    level = ScaledLinearBetas(1000, 0.00085, 0.012)(torch.arange(1000).double() / 999)
    np.testing.assert_allclose(level.alpha.numpy() ** 2, np.cumprod(1 - betas), rtol=1e-10)


@pytest.mark.parametrize("steps", [10, 1000])
def test_cosine_is_improved_ddpm_on_the_grid(steps: int):
    """alpha_bar(t) = cos^2((t + s) / (1 + s) * pi / 2) up to a constant, betas at most 0.999."""

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((i + 1) / steps) / f(i / steps), 0.999) for i in range(steps)]
    alpha_bar = np.cumprod(1 - np.array(betas))
    level = Cosine(steps)(torch.arange(steps, dtype=torch.float64) / (steps - 1))
    np.testing.assert_allclose(level.alpha.numpy() ** 2, alpha_bar, rtol=1e-9)
    np.testing.assert_allclose(level.sigma.numpy() ** 2, 1 - alpha_bar, rtol=1e-10)
    # below the cap the product telescopes to the formula itself
    np.testing.assert_allclose(alpha_bar[-2], f(1 - 1 / steps) / f(0), rtol=1e-9)


@pytest.mark.parametrize("schedule", [LinearBetas(), Cosine()])
def test_tables_interpolate_the_log_ratio(schedule: Schedule):
    low, high = (schedule(f64(i / 999)).ratio.log() for i in (412, 413))
    between = schedule(f64(412.25 / 999))
    torch.testing.assert_close(
        between.ratio.log(), 0.75 * low + 0.25 * high, rtol=1e-11, atol=1e-11
    )


def test_karras_and_flow_formulas():
    level = Karras(0.01, 100.0)(f64(0.0, 0.25, 1.0))
    torch.testing.assert_close(level.sigma, f64(0.01, 0.1, 100.0), rtol=1e-14, atol=0.0)
    assert torch.equal(level.alpha, torch.ones_like(level.alpha))
    level = Flow()(f64(0.0, 0.25, 1.0))
    assert torch.equal(level.sigma, f64(MIN_SIGMA, 0.25, 1.0))
    assert torch.equal(level.alpha, f64(1 - MIN_SIGMA, 0.75, 0.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_grow_stay_bounded_and_are_float64(schedule: Schedule):
    level = schedule(torch.linspace(0, 1, 501))  # float32 times
    assert level.alpha.dtype == level.sigma.dtype == level.t.dtype == torch.float64
    assert level.sigma.min() >= MIN_SIGMA
    assert level.alpha.min() >= 0
    assert level.alpha.max() <= 1
    grows = level.ratio.diff()
    assert (grows[1:] > 0).all()  # Flow may repeat its smallest level
    assert grows[0] >= 0


@pytest.mark.parametrize("schedule", SCHEDULES[:4])
def test_tables_preserve_variance(schedule: Schedule):
    level = schedule(torch.linspace(0, 1, 997, dtype=torch.float64))
    total = level.alpha.square() + level.sigma.square()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(t=st.floats(0.0, 1.0))
def test_at_is_the_inverse(schedule: Schedule, t: float):
    there = schedule(f64(t))
    back = schedule.at(there.ratio)
    floor = schedule.t_min if isinstance(schedule, Flow) else 0.0
    # a position within 1e-9 of an entry counts as that entry
    assert float(back.t) == pytest.approx(max(t, floor), abs=2e-9)
    torch.testing.assert_close(back.sigma, there.sigma, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(back.alpha, there.alpha, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(log_ratio=st.floats(-4.0, 1.0))
def test_at_has_the_ratio_asked_for(schedule: Schedule, log_ratio: float):
    low, high = (float(schedule(f64(t)).ratio) for t in (0.0, 1.0))
    level = schedule.at(f64(math.exp(log_ratio)))
    expected = min(max(math.exp(log_ratio), low), high)
    assert float(level.ratio) == pytest.approx(expected, rel=1e-12)
    assert float(schedule(level.t).ratio) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_at_clamps_to_the_range(schedule: Schedule):
    ends, beyond = schedule(f64(0.0, 1.0)), schedule.at(f64(0.0, math.inf))
    torch.testing.assert_close(beyond.sigma, ends.sigma, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(beyond.alpha, ends.alpha, rtol=1e-12, atol=0.0)


def test_at_finds_every_entry_of_a_table():
    t = torch.arange(1000, dtype=torch.float64) / 999
    for schedule in (LinearBetas(), Cosine()):
        torch.testing.assert_close(schedule.at(schedule(t).ratio).t, t, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearBetas(steps=1), "steps=1"),
        (lambda: LinearBetas(first=0.0), "first=0.0"),
        (lambda: LinearBetas(first=1e-7), "1e-06 <= first"),
        (lambda: LinearBetas(first=0.5, last=0.1), "last=0.1"),
        (lambda: LinearBetas(last=1.0), "last=1.0"),
        (lambda: Cosine(steps=1), "steps=1"),
        (lambda: ScaledLinearBetas(first=0.5, last=0.1), "first=0.5, last=0.1"),
        (lambda: Sigmoid(steps=1), "steps=1"),
        (lambda: Sigmoid(start=3.0), "start=3.0"),
        (lambda: Sigmoid(tau=0.0), "tau=0.0"),
        (lambda: Sigmoid(max_beta=1.0), "max_beta=1.0"),
        (lambda: Sigmoid(start=-40.0), "a later start"),
        (lambda: Cosine(offset=-0.1), "offset=-0.1"),
        (lambda: Cosine(max_beta=1.0), "max_beta=1.0"),
        (lambda: Cosine(steps=100_000, offset=0.0), "fewer than 100000 steps"),
        (lambda: Karras(sigma_min=1e-4), "sigma_min=0.0001"),
        (lambda: Karras(sigma_min=2.0, sigma_max=1.0), "sigma_max=1.0"),
        (lambda: Karras(sigma_max=math.inf), "sigma_max=inf"),
        (lambda: Flow(t_min=0.0), "t_min=0.0"),
        (lambda: Flow(t_min=1.0), "t_min=1.0"),
        (lambda: LinearBetas(first=math.nan), "first=nan"),
        (lambda: LeadIn(spread=0.0), "spread=0.0"),
        (lambda: LeadIn(spread=math.nan), "spread=nan"),
        (lambda: LeadIn(values=0), "values=0"),
        (lambda: levels(Flow(), 0), "num_inference_steps must be at least 1; got 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(make, message: str):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


# --- grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", [uniform, KarrasSpacing(), LeadIn(), LeadIn(3.0, 12_288), None])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 17])
def test_grids_fall_to_exactly_clean(schedule: Schedule, spacing, steps: int):
    grid = levels(schedule, steps, spacing)
    assert len(grid) == steps + 1
    assert all(v.shape == () and v.dtype == torch.float64 for level in grid for v in level)
    assert [float(v) for v in grid[-1]] == [1.0, 0.0, 0.0]
    ratios = [float(level.ratio) for level in grid]
    assert all(a > b for a, b in itertools.pairwise(ratios))


def test_uniform_is_even_in_t():
    grid = uniform(Flow(), 4)
    assert grid.t.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert float(grid.alpha[0]) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_karras_spacing_is_even_in_the_root(schedule: Schedule):
    grid = KarrasSpacing(rho=7.0, low=0.02, high=5.0)(schedule, 9)
    root = grid.ratio ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(8), rtol=1e-9, atol=1e-12)
    low, high = schedule(f64(0.0)).ratio, schedule(f64(1.0)).ratio
    torch.testing.assert_close(grid.ratio[:1], f64(5.0).clamp(max=high), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(grid.ratio[-1:], f64(0.02).clamp(min=low), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("schedule", "low", "high"),
    [
        (Karras(), 1.0, 1.0),
        (Karras(), 0.002, 0.002),
        (Karras(), 2.0, 1.0),
        (Karras(), 100.0, 200.0),  # both beyond the schedule
        (LinearBetas(), 0.002, 0.005),
        (Flow(), 0.002, 0.001),
    ],
)
def test_a_spacing_without_room_is_refused(schedule: Schedule, low: float, high: float) -> None:
    with pytest.raises(ConfigError, match=r"^KarrasSpacing needs low < high; .* further apart"):
        levels(schedule, 5, KarrasSpacing(low=low, high=high))


def test_karras_spacing_is_the_published_grid():
    """2206.00364, eq. 5, at 18 steps from 80 to 0.002."""
    i = np.arange(18) / 17
    sigma = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    ours = [float(level.sigma) for level in levels(Karras(), 18)]
    np.testing.assert_allclose(ours, [*sigma, 0.0], rtol=1e-12)


@pytest.mark.parametrize(("steps", "above"), [(4, 1), (10, 1), (15, 1), (16, 2), (100, 7)])
def test_the_lead_in_has_one_level_in_fifteen_above_its_reach(steps: int, above: int):
    """Both parts are Karras grids, and meet: from 80 to 10 and from 10 to 0.01."""
    spacing = LeadIn(spread=0.5, values=64)
    assert spacing.reach == 10.0
    ratios = spacing(Karras(), steps).ratio
    high, low = ratios[: above + 1], ratios[above:]
    for part, ends in ((high, (80.0, 10.0)), (low, (10.0, 0.01))):
        torch.testing.assert_close(part[[0, -1]], f64(*ends), rtol=1e-12, atol=0.0)
        even = (part ** (1 / 7)).diff()
        torch.testing.assert_close(even, even.mean().expand(len(even)), rtol=1e-9, atol=1e-12)


def test_the_lead_in_reaches_down_as_far_as_large_pictures_allow():
    """Four deviations of a natural field's strongest direction are above the noise there."""
    assert LeadIn(0.5, 16 * 16).reach == pytest.approx(10.0)
    assert LeadIn(0.25, 3 * 64 * 64).reach == pytest.approx(0.25 * 1.25 * 64 * 3**0.5)
    strongest = float(power_law_field(2.0, 24, 24, spread=0.5).eigenvalues.max()) ** 0.5
    assert LeadIn(0.5, 24 * 24).reach == pytest.approx(4 * strongest, rel=0.1)


@pytest.mark.parametrize(
    ("schedule", "spacing"),
    [
        (Karras(), LeadIn(0.5, 10**6)),  # reaches above 80
        (LinearBetas(37, last=0.3), LeadIn(4.0)),  # above the schedule's own top
        (Flow(), LeadIn(1e-5)),  # below the schedule's own bottom
    ],
)
def test_without_room_for_a_lead_in_the_grid_is_plain(schedule: Schedule, spacing: LeadIn):
    plain = KarrasSpacing(low=spacing.spread / 50)
    for ours, theirs in zip(spacing(schedule, 9), plain(schedule, 9), strict=True):
        assert torch.equal(ours, theirs)


def test_descending_goes_through_the_given_ratios():
    ratios = f64(5.0, 1.0, 0.1)
    for schedule in SCHEDULES:
        got = torch.stack([level.ratio for level in descending(schedule, ratios)])
        torch.testing.assert_close(got, ratios.clamp(max=schedule(f64(1.0)).ratio))


def test_clean_is_the_picture_itself():
    x0 = torch.randn(1, 1, 2, 2)
    assert torch.equal(clean().mix(x0, torch.full_like(x0, 7.0)), x0)


# --- keyed random numbers -----------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40),
    cuts=st.lists(st.integers(0, 6), max_size=3),
    part=st.integers(0, 1000),
)
def test_numbers_do_not_depend_on_batching(seed: int, first: int, cuts: list[int], part: int):
    whole = range(first, first + 6)
    edges = [0, *sorted(cuts), 6]
    pieces = [whole[a:b] for a, b in itertools.pairwise(edges)]
    normal = keyed_normal(seed, Stream.NOISE, whole, (2, 3), part)
    split = torch.cat([keyed_normal(seed, Stream.NOISE, p, (2, 3), part) for p in pieces])
    assert torch.equal(normal, split)
    even = keyed_uniform(seed, Stream.LEVEL, whole, 2, part)
    assert np.array_equal(
        even, np.concatenate([keyed_uniform(seed, Stream.LEVEL, p, 2, part) for p in pieces])
    )
    strided = [whole[0::2], whole[1::2]]  # as two processes take them
    for rank, mine in enumerate(strided):
        assert torch.equal(normal[rank::2], keyed_normal(seed, Stream.NOISE, mine, (2, 3), part))


def test_a_larger_picture_starts_with_the_same_numbers():
    small = keyed_normal(3, Stream.SAMPLE, range(2), (5,))
    large = keyed_normal(3, Stream.SAMPLE, range(2), (9,))
    assert torch.equal(large[:, :5], small)


def test_no_two_places_share_numbers():
    seeds = [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
    places = itertools.product(seeds, Stream, [0, 1, 2, 2**32, 2**40], [0, 1, 2**32])
    # four words each; shifted by any number of words no two sequences may meet
    words = [keyed(*p).bit_generator.random_raw(4) for p in places]
    flat = np.concatenate(words)
    assert len(np.unique(flat)) == len(flat) == 4 * len(seeds) * len(Stream) * 15


def test_seed_and_position_do_not_add_up():
    """Picture n of seed s is not picture n - 1 of seed s + 1."""
    a = keyed_normal(7, Stream.SAMPLE, range(4), (8,))
    b = keyed_normal(8, Stream.SAMPLE, range(4), (8,))
    assert not any(torch.equal(x, y) for x in a for y in b)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed: int):
    with pytest.raises(ConfigError, match=f"seed must be between 0 and 2.64 - 1; got {seed}"):
        keyed(seed, Stream.NOISE, 0)


def test_the_numbers_are_the_file_format():
    """Changing any of these changes every run that is resumed."""
    assert [int(s) for s in Stream] == list(range(12))
    assert keyed_uniform(0, Stream.LEVEL, range(1), 2)[0].tolist() == pytest.approx(
        GOLDEN_UNIFORM, abs=0.0, rel=1e-15
    )
    assert keyed_normal(1, Stream.NOISE, range(5, 6), (2,))[0].tolist() == pytest.approx(
        GOLDEN_NORMAL, rel=1e-6
    )
    assert order(0, 6, range(6)).tolist() == GOLDEN_ORDER


def test_distributions():
    """Kolmogorov-Smirnov at fixed seeds: within a position and across positions."""
    across = keyed_normal(0, Stream.NOISE, range(4000), (1,)).flatten().numpy()
    within = keyed_normal(0, Stream.NOISE, range(1), (4000,)).flatten().numpy()
    by_seed = np.array([float(keyed_normal(s, Stream.NOISE, range(1), (1,))) for s in range(4000)])
    for sample in (across, within, by_seed):
        assert stats.kstest(sample, "norm").pvalue > 0.01
    even = keyed_uniform(0, Stream.LEVEL, range(4000), 2)
    assert stats.kstest(even[:, 0], "uniform").pvalue > 0.01
    assert stats.kstest(even[:, 1], "uniform").pvalue > 0.01
    assert even.min() >= 0
    assert even.max() < 1
    for a, b in itertools.pairwise((across, within, by_seed, even[:, 0], even[:, 1])):
        assert stats.pearsonr(a, b).pvalue > 0.001
    assert stats.pearsonr(across[1:], across[:-1]).pvalue > 0.001


def test_empty_ranges_are_empty():
    assert keyed_normal(0, Stream.NOISE, range(0), (2, 3)).shape == (0, 2, 3)
    assert keyed_uniform(0, Stream.LEVEL, range(0), 2).shape == (0, 2)
    assert order(0, 5, range(0)).shape == (0,)
    assert order(0, 5, range(0)).dtype == order(0, 5, range(3)).dtype == np.int64


@given(size=st.integers(1, 40), epoch=st.integers(0, 5), seed=st.integers(0, 2**64 - 1))
def test_each_epoch_is_a_permutation(size: int, epoch: int, seed: int):
    whole = order(seed, size, range(epoch * size, (epoch + 1) * size))
    assert sorted(whole) == list(range(size))


@given(size=st.integers(1, 40), first=st.integers(0, 200), count=st.integers(0, 60))
def test_order_does_not_depend_on_slicing(size: int, first: int, count: int):
    positions = range(first, first + count)
    whole = order(5, size, positions)
    assert [int(order(5, size, range(p, p + 1))[0]) for p in positions] == whole.tolist()


def test_epochs_and_seeds_differ():
    size = 50
    seen = {tuple(order(s, size, range(e * size, (e + 1) * size))) for s in (0, 1) for e in (0, 1)}
    assert len(seen) == 4


@given(st.integers(0, 2**40), st.integers(1, 300), st.integers(0, 2**63))
@settings(max_examples=50, deadline=None)
def test_even_numbers_leave_no_gap_in_any_stretch_of_positions(
    first: int, count: int, seed: int
) -> None:
    """The golden ratio's gaps are at most 1 + 1 / phi = 1.618 / n, plus one for where n ends."""
    values = keyed_even(seed, Stream.LEVEL, range(first, first + count))
    assert values.shape == (count,)
    ends = np.sort(values)
    assert ((values >= 0) & (values < 1)).all()
    gaps = np.diff(np.concatenate([ends, [ends[0] + 1]]))
    assert gaps.max() <= 2.62 / count + 1e-12


def test_even_numbers_belong_to_positions_and_not_to_batches() -> None:
    whole = keyed_even(3, Stream.LEVEL, range(10, 30))
    parts = [keyed_even(3, Stream.LEVEL, r) for r in (range(10, 17), range(17, 30))]
    assert (whole == np.concatenate(parts)).all()
    assert (whole != keyed_even(4, Stream.LEVEL, range(10, 30))).all()
    assert (whole != keyed_even(3, Stream.NOISE, range(10, 30))).all()


def test_the_mean_over_seeds_of_even_numbers_is_uniform() -> None:
    values = np.array([keyed_even(seed, Stream.LEVEL, range(5, 6))[0] for seed in range(2000)])
    assert abs(values.mean() - 0.5) < 0.03
    assert abs(values.var() - 1 / 12) < 0.01

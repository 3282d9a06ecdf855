"""Multistep samplers: orders on exact paths, exact steps, the law of the stochastic one."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exact_paths import (
    DOUBLINGS,
    QUARTER,
    SCHEDULES,
    centred,
    diagonal,
    digits,
    distance,
    moments,
    name,
    ones,
    parabola,
    phi_2,
    ratio_grid,
    relative_error,
    slope,
)
from undiffuse.errors import ConfigError
from undiffuse.guidance import with_label
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    KarrasSpacing,
    LeadIn,
    LinearBetas,
    NoiseLevel,
    Schedule,
    descending,
    levels,
    uniform,
)
from undiffuse.oracles import FiniteSet, Gaussian, gaussian_flow
from undiffuse.sampling import (
    SAMPLERS,
    Sampler,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    finish,
    heun,
    ipndm,
    start,
    unipc,
)

unipc_2: Sampler = partial(unipc, order=2)
unipc_3: Sampler = unipc

VARIANCES = (0.0, 0.01, 0.25, 4.0)
MIXED = diagonal(*VARIANCES)


def points() -> FiniteSet:
    """A denoiser that is not linear."""
    return FiniteSet(torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64).reshape(-1, 1, 1, 1))


def spread_out(schedule: Schedule, steps: int, *, clean_end: bool) -> tuple[NoiseLevel, ...]:
    grid = levels(schedule, steps, uniform)
    return grid if clean_end else grid[:-1]


# --- order --------------------------------------------------------------------------------------

TABLE = [
    pytest.param(dpmpp_3m, True, ("1.1e-03", "2.4e-05", "3.9e-07"), id="dpmpp_3m-graded"),
    pytest.param(dpmpp_3m, False, ("1.4e-03", "3.8e-05", "1.3e-06"), id="dpmpp_3m-plain"),
    pytest.param(unipc_2, False, ("4.1e-03", "6.1e-05", "9.4e-07"), id="unipc-2"),
    pytest.param(unipc_3, False, ("1.3e-03", "5.4e-06", "2.1e-08"), id="unipc-3"),
    pytest.param(ipndm, False, ("3.0e-03", "1.8e-04", "1.1e-05"), id="ipndm"),
]


@pytest.mark.parametrize(("sampler", "graded", "errors"), TABLE)
def test_errors_are_the_derived_ones(sampler: Sampler, graded: bool, errors: tuple[str, ...]):
    """At 16, 64 and 256 steps, to two digits; x / alpha does not see the schedule."""
    for steps, expected in zip((16, 64, 256), errors, strict=True):
        schedules = SCHEDULES if steps == 16 else SCHEDULES[:1]
        for schedule in schedules:
            grid = ratio_grid(schedule, steps, graded)
            assert f"{relative_error(sampler, QUARTER, grid, QUARTER):.1e}" == expected


@pytest.mark.parametrize(
    ("sampler", "graded", "order"),
    [
        pytest.param(dpmpp_3m, True, 3, id="dpmpp_3m"),
        pytest.param(unipc_2, False, 3, id="unipc-2"),
        pytest.param(unipc_3, False, 4, id="unipc-3"),
        pytest.param(ipndm, False, 2, id="ipndm"),
        # one coefficient of the first halved: this is how the test fails
        pytest.param(parabola(1.0, phi_2), True, 2, id="half the curvature"),
    ],
)
def test_order(sampler: Sampler, graded: bool, order: int):
    """The slope of ln(error) against ln(steps) over three doublings, 64 to 512."""

    def error(steps: int) -> float:
        return relative_error(sampler, QUARTER, ratio_grid(Karras(), steps, graded), QUARTER)

    assert slope(error) == pytest.approx(order, abs=0.15)


def test_a_first_step_of_order_1_pulls_dpmpp_3m_towards_order_2():
    grids = [ratio_grid(Karras(), steps) for steps in DOUBLINGS]
    errors = [relative_error(dpmpp_3m, QUARTER, grid, QUARTER) for grid in grids]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert 2.6 > slopes[0] > slopes[1] > slopes[2] > 2.1


# relative error at 100 steps from t = 1 down to the clean level, whatever the schedule
OWN_GRID_BOUND = {dpmpp_3m: 0.008, unipc: 0.0035, ipndm: 0.0045}


def own_grid_error(sampler: Sampler, steps: int, schedule: Schedule) -> float:
    grid = levels(schedule, steps, uniform)
    x = start(grid[0], ones(QUARTER))
    exact = gaussian_flow(QUARTER, x, grid[0], grid[-1])
    return float((finish(sampler(with_label(QUARTER, None), x, grid)) / exact - 1).abs())


@pytest.mark.parametrize("schedule", [LinearBetas(), Flow()], ids=name)
@pytest.mark.parametrize("sampler", OWN_GRID_BOUND, ids=name)
def test_own_grid_four_times_the_steps_a_third_of_the_error(sampler: Sampler, schedule: Schedule):
    bound = OWN_GRID_BOUND[sampler]
    assert own_grid_error(sampler, 100, schedule) < bound
    assert own_grid_error(sampler, 400, schedule) < bound / 3


@pytest.mark.parametrize("sampler", OWN_GRID_BOUND, ids=name)
def test_order_2_from_alpha_0(sampler: Sampler):
    """The first step, from alpha = 0, is of order 1 and leaves nothing to extrapolate from."""
    found = slope(lambda n: own_grid_error(sampler, n, Flow()), (128, 256, 512))
    assert found == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("sampler", [dpmpp_2m_sde, dpmpp_3m, unipc_2, unipc_3, ipndm])
def test_schedule_does_not_matter_at_equal_ratios(sampler: Sampler):
    """Samplers work on x / alpha as a function of sigma / alpha."""
    ends = []
    for schedule in SCHEDULES:
        grid, noise = ratio_grid(schedule, 9), ones(MIXED)
        x = ones(MIXED) * grid[0].alpha
        end = finish(sampler(with_label(MIXED, None), x, grid, noise=lambda step: noise))  # noqa: B023
        ends.append(end / grid[-1].alpha)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-12)


# --- single steps -------------------------------------------------------------------------------

NODES, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(12))


@given(
    gaps=st.lists(st.floats(0.05, 1.5), min_size=5, max_size=5),
    coefficients=st.tuples(*[st.floats(-1.0, 1.0)] * 3),
    schedule=st.sampled_from(SCHEDULES),
)
def test_estimates_on_a_parabola_are_integrated_exactly(
    gaps: list[float], coefficients: tuple[float, ...], schedule: Schedule
):
    """x' = s'/s x + a' integral, on uneven grids, by Gauss-Legendre; from the third step on."""
    places = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0)
    grid = descending(schedule, 5 * (-places).exp())

    def estimate(log_ratio: Tensor) -> Tensor:  # of lambda = -ln(sigma / alpha)
        return sum(c * log_ratio**k for k, c in enumerate(coefficients))  # pyright: ignore[reportReturnType]

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        return torch.zeros_like(x) + estimate(-level.ratio.log())

    def exact(x: Tensor, now: NoiseLevel, then: NoiseLevel) -> Tensor:
        begin, end = -now.ratio.log(), -then.ratio.log()
        at = begin + (end - begin) * (NODES + 1) / 2
        integral = (WEIGHTS * (at - end).exp() * estimate(at)).sum() * (end - begin) / 2
        return then.sigma / now.sigma * x + then.alpha * integral

    found = list(dpmpp_3m(denoise, ones(QUARTER), grid))
    for before, after in pairwise(found[1:]):
        expected = exact(before.x, before.level, after.level)
        torch.testing.assert_close(after.x, expected, rtol=1e-10, atol=1e-10)
    # UniPC's correction of exact estimates is nothing once its predictor is exact too.
    predicted = list(unipc(denoise, ones(QUARTER), grid))
    for before, after in pairwise(predicted[2:]):
        expected = exact(before.x, before.level, after.level)
        torch.testing.assert_close(after.x, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [LinearBetas(), Cosine(), Flow()], ids=name)
def test_dpmpp_3m_is_its_differences_spelled_out(schedule: Schedule):
    grid = levels(schedule, 8)
    x = torch.linspace(-3, 3, 9, dtype=torch.float64).reshape(-1, 1, 1, 1) * grid[0].sigma
    found = dpmpp_3m(with_label(points(), None), x, grid)
    wanted = parabola(2.0, phi_2)(with_label(points(), None), x, grid)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", [LinearBetas(), Karras(), Flow()], ids=name)
def test_ipndm_is_adams_bashforth_in_the_noise(schedule: Schedule, order: int):
    """x'/a' = x/a + (r' - r) sum of c_j e_j, weights from exact integrals over equal steps."""
    grid = spread_out(schedule, 8, clean_end=True)[1:]
    x = torch.linspace(-3, 3, 9, dtype=torch.float64).reshape(-1, 1, 1, 1) * grid[0].sigma
    found = [step.x for step in ipndm(with_label(points(), None), x, grid, order=order)]
    slopes: list[Tensor] = []
    for i, (now, then) in enumerate(pairwise(grid)):
        slopes = [now.noise_in(x, points()(x, now)), *slopes][:order]
        if i == len(grid) - 2:
            x = points()(x, now)
        else:
            weights = equal_step_weights(len(slopes))
            mean = sum(w * e for w, e in zip(weights, slopes, strict=True))
            x = then.alpha * (x / now.alpha + (then.ratio - now.ratio) * mean)
        torch.testing.assert_close(found[i], x, rtol=1e-9, atol=1e-9)


def equal_step_weights(count: int) -> list[float]:
    """Integrals over 0 ... 1 of the Lagrange polynomials through 0, -1, -2 ..."""
    nodes = -torch.arange(count, dtype=torch.float64)
    powers = torch.vander(nodes, increasing=True).mT
    return torch.linalg.solve(powers, 1 / torch.arange(1, count + 1).double()).tolist()


def test_ipndm_of_order_1_is_ddim():
    grid = levels(Cosine(), 7, uniform)
    denoise = with_label(points(), None)
    for ours, plain in zip(
        ipndm(denoise, ones(QUARTER), grid, order=1),
        ddim(denoise, ones(QUARTER), grid),
        strict=True,
    ):
        torch.testing.assert_close(ours.x, plain.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [0, 5])
def test_ipndm_has_four_orders(order: int):
    with pytest.raises(ConfigError, match=f"order must be 1, 2, 3 or 4; got {order}"):
        next(ipndm(with_label(QUARTER, None), ones(QUARTER), levels(Flow(), 2), order=order))


def test_unipc_needs_an_order():
    with pytest.raises(ConfigError, match="order must be at least 1; got 0"):
        next(unipc(with_label(QUARTER, None), ones(QUARTER), levels(Flow(), 2), order=0))


# --- the stochastic one -------------------------------------------------------------------------


def law(g: Gaussian, grid: Sequence[NoiseLevel]) -> tuple[Tensor, Tensor]:
    """Factor and variance per direction of SDE-DPM-Solver++(2M), by a recursion over pairs.

    With D = g u (g = a l / (a^2 l + s^2)) each step is linear in u and the u before:
    u' = A u + B g u + C (g u - g_before u_before) + n z, with 1 - e^(-2h) in B, C and n.
    """
    lam = g.eigenvalues
    factor, before = torch.ones_like(lam), torch.zeros_like(lam)
    variance, cross, earlier = (torch.zeros_like(lam) for _ in range(3))
    gain_before, h_before = torch.zeros_like(lam), math.inf
    for now, then in pairwise(grid):
        (a, s), (b, r) = (now.alpha, now.sigma), (then.alpha, then.sigma)
        gain = a * lam / (a**2 * lam + s**2)
        shrink = (a * r / (s * b)) ** 2  # e^(-2h)
        h = math.inf if float(r) == 0 else float(-shrink.log() / 2)
        bend = 0.0 if math.inf in (h, h_before) else h / (2 * h_before)
        fresh = r**2 * (1 - shrink)
        own = r / s * shrink.sqrt() + b * (1 - shrink) * (1 + bend) * gain
        old = -b * (1 - shrink) * bend * gain_before
        factor, before = own * factor + old * before, factor
        new = own**2 * variance + 2 * own * old * cross + old**2 * earlier + fresh
        variance, cross, earlier = new, own * variance + old * cross, variance
        gain_before, h_before = gain, h
    return factor, variance


SDE_GRIDS = {
    "vp": levels(Cosine(), 7, uniform),
    "ve": levels(Karras(), 7),
    "flow": levels(Flow(), 7, uniform)[1:],
}


@pytest.mark.parametrize("grid", SDE_GRIDS)
def test_the_stochastic_sampler_has_the_exact_mean_and_variance(grid: str):
    got, expected = moments(dpmpp_2m_sde, MIXED, SDE_GRIDS[grid]), law(MIXED, SDE_GRIDS[grid])
    assert float(got[0].abs().max()) == 0.0  # the data's mean is 0
    torch.testing.assert_close(got[1], expected[0], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(got[2], expected[1], rtol=1e-9, atol=1e-14)


def test_the_stochastic_sampler_nears_the_data_with_its_steps():
    """Twice the steps, a quarter of the distance; at 20 less than half of ddpm's 0.2277."""
    g, found = centred(digits()), list[float]()
    for steps in (20, 40, 80, 160):
        factor, fresh = law(g, levels(Karras(), steps))
        found.append(distance(g, factor**2 * (g.eigenvalues + 80**2) + fresh))
    assert all(fine < coarse / 4 for coarse, fine in pairwise(found[:3]))
    assert found[-1] < 0.0015
    assert found[0] < 0.2277 / 2


def test_without_history_the_stochastic_sampler_is_ddpm_and_draws_none_at_the_end():
    grid, drawn = levels(Flow(), 5, uniform), list[int]()

    def draw(step: int) -> Tensor:
        drawn.append(step)
        return ones(QUARTER)

    denoise = with_label(points(), None)
    first = next(dpmpp_2m_sde(denoise, ones(QUARTER), grid, noise=draw))
    plain = next(ddpm(denoise, ones(QUARTER), grid, noise=draw))
    torch.testing.assert_close(first.x, plain.x, rtol=1e-12, atol=1e-12)
    drawn.clear()
    finish(dpmpp_2m_sde(denoise, ones(QUARTER), grid, noise=draw))
    assert drawn == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="eta 1 adds noise at every step: pass noise"):
        next(dpmpp_2m_sde(denoise, ones(QUARTER), grid))


# --- few steps ----------------------------------------------------------------------------------


def solver_error(sampler: Sampler, g: Gaussian, grid: Sequence[NoiseLevel]) -> float:
    factor = finish(sampler(with_label(g, None), ones(g), grid)).flatten()
    return distance(g, factor**2 * (g.eigenvalues + grid[0].sigma ** 2))


@pytest.mark.parametrize(
    ("evaluations", "high", "expected"),
    [
        (5, 80.0, (1.3429, 0.6455, 0.1048)),
        (10, 80.0, (0.2120, 0.2969, 0.0554)),
        (20, 80.0, (0.0266, 0.0211, 0.0139)),
        (35, 80.0, (0.0030, 0.0016, 0.0039)),
        (100, 80.0, (0.0002, 0.0002, 0.0005)),
        (10, 10.0, (0.1177, 0.1039, 0.0203)),
        (20, 10.0, (0.0061, 0.0033, 0.0050)),
    ],
)
def test_solver_error_on_the_digits_gaussian(
    evaluations: int, high: float, expected: tuple[float, ...]
):
    """Exact start, the end not: relative W2 to the data, for dpmpp_3m, unipc and ipndm."""
    g, grid = centred(digits()), levels(Karras(), evaluations, KarrasSpacing(high=high))
    found = [solver_error(sampler, g, grid) for sampler in (dpmpp_3m, unipc, ipndm)]
    assert found == [pytest.approx(value, abs=6e-5) for value in expected]


def from_pure_noise(sampler: Sampler, g: Gaussian, grid: Sequence[NoiseLevel]) -> float:
    """As pictures are made: x starts around 0, not around the data's mean.

    An affine map of the start and of the noise of every step, found out in one batch.
    """
    rows = torch.zeros(len(grid) + 1, len(grid) + 1, *g.mean.shape, dtype=torch.float64)
    rows[range(len(rows)), range(len(rows))] = 1.0  # the start, every step's noise, nothing
    end = finish(sampler(with_label(g, None), rows[0], grid, noise=lambda step: rows[1 + step]))
    offset = end[-1].flatten()
    factor, *fresh = end[:-1].flatten(1) - offset
    variance = (factor * grid[0].sigma) ** 2 + torch.stack(fresh).square().sum(0)
    return distance(g, variance, offset - g.mean.flatten())


def gain(sampler: Sampler, evaluations: int) -> float:
    """How many times as close the lead-in comes to the digits as the plain grid."""
    steps = (evaluations + 1) // 2 if sampler is heun else evaluations
    plain, led = (
        from_pure_noise(sampler, digits(), levels(Karras(), steps, spacing))
        for spacing in (KarrasSpacing(), LeadIn(0.5, 64))
    )
    return plain / led


@pytest.mark.parametrize("key", SAMPLERS)
def test_the_lead_in_comes_closer_to_the_digits_than_the_plain_grid(key: str):
    """1.1 to 8 times at 5 to 20 evaluations, with the one exception that its text names."""
    gains = {evaluations: gain(SAMPLERS[key], evaluations) for evaluations in range(5, 21)}
    if key == "dpmpp_2m_sde":
        assert gains.pop(7) == pytest.approx(0.8, abs=0.05)
    assert min(gains.values()) > 1.1
    assert max(gains.values()) < 8.5
    if key in ("dpmpp_2m", "dpmpp_3m", "unipc", "ipndm"):
        assert gains[20] > 2.0
    assert gain(SAMPLERS[key], 35) > 0.995


@pytest.mark.parametrize("sampler", [heun, dpmpp_2m, dpmpp_3m, unipc, ipndm], ids=name)
def test_with_the_lead_in_samplers_still_converge(sampler: Sampler):
    """To the data, but for what the last step, from 2 % of the spread, leaves out."""
    found = from_pure_noise(sampler, digits(), levels(Karras(), 200, LeadIn(0.5, 64)))
    assert found < 0.0065

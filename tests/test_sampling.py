"""Samplers against the exact probability-flow path and the exact variance of Gaussian data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from exact_paths import (
    QUARTER,
    SCHEDULES,
    centred,
    diagonal,
    digits,
    distance,
    moments,
    name,
    ones,
    ratio_grid,
    relative_error,
    slope,
)
from undiffuse.denoiser import (
    Denoiser,
    Epsilon,
    FlowVelocity,
    KarrasPrecond,
    Prediction,
    Sample,
    Velocity,
)
from undiffuse.errors import ConfigError
from undiffuse.guidance import with_label
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    KarrasSpacing,
    LinearBetas,
    NoiseLevel,
    Schedule,
    Stream,
    keyed_normal,
    levels,
    uniform,
)
from undiffuse.oracles import FiniteSet, Gaussian, gaussian_flow
from undiffuse.sampling import SAMPLERS, Sampler, ddim, ddpm, dpmpp_2m, finish, heun, start

PREDICTIONS: list[Prediction] = [
    Epsilon(),
    Sample(),
    Velocity(),
    FlowVelocity(),
    KarrasPrecond(0.5),
]
ORDER = {ddim: 1, heun: 2, dpmpp_2m: 2}


@dataclass(frozen=True)
class OracleNet:
    """A raw network whose Denoiser is the oracle: it knows the level from its timestep alone."""

    oracle: Gaussian
    schedule: Schedule
    prediction: Prediction

    def __call__(self, scaled: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        if isinstance(self.prediction, KarrasPrecond):
            level = self.schedule.at((4 * timestep).exp())
        else:
            level = self.schedule(timestep.double() / (self.prediction.steps - 1))
        k = self.prediction(level := level.like(scaled))
        x = scaled / k.c_in
        return (self.oracle(x, level, label) - k.c_skip * x) / k.c_out


def as_denoiser(oracle: Gaussian, schedule: Schedule, prediction: Prediction) -> Denoiser | None:
    """None exactly where Denoiser refuses the pair."""
    try:
        return Denoiser(OracleNet(oracle, schedule, prediction), schedule, prediction)
    except ConfigError:
        return None


PAIRS = [
    pytest.param(schedule, prediction, id=f"{name(schedule)}-{name(prediction)}")
    for schedule in SCHEDULES
    for prediction in PREDICTIONS
    if as_denoiser(QUARTER, schedule, prediction)
]


def test_only_two_pairs_are_left_out():
    assert len(PAIRS) == len(SCHEDULES) * len(PREDICTIONS) - 2


# --- order --------------------------------------------------------------------------------------


# The inner loop sees every schedule and every prediction once; all pairs run before a release.
QUICK = {
    "LinearBetas-Epsilon",
    "Cosine-Velocity",
    "Karras-KarrasPrecond",
    "Flow-FlowVelocity",
    "Karras-Sample",
}


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        pair if pair.id in QUICK else pytest.param(*pair.values, id=pair.id, marks=pytest.mark.slow)
        for pair in PAIRS
    ],
)
@pytest.mark.parametrize("sampler", ORDER, ids=name)
def test_order_through_every_prediction_and_schedule(
    sampler: Sampler, schedule: Schedule, prediction: Prediction
):
    """The slope of ln(error) against ln(steps) over three doublings, 64 to 512."""
    denoiser = as_denoiser(QUARTER, schedule, prediction)
    assert denoiser is not None
    found = slope(lambda n: relative_error(sampler, denoiser, ratio_grid(schedule, n), QUARTER))
    assert found == pytest.approx(ORDER[sampler], abs=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize(
    ("sampler", "errors"),
    [
        (ddim, ("7.0e-02", "1.8e-02", "4.5e-03")),
        (heun, ("1.0e-02", "6.0e-04", "3.7e-05")),
        (dpmpp_2m, ("9.1e-03", "5.5e-04", "3.4e-05")),
    ],
    ids=lambda v: name(v) if callable(v) else "",
)
def test_errors_are_the_derived_ones(sampler: Sampler, errors: tuple[str, ...], schedule: Schedule):
    """At 16, 64 and 256 steps, to two digits; x / alpha does not see the schedule."""
    found = [
        relative_error(sampler, QUARTER, ratio_grid(schedule, n), QUARTER) for n in (16, 64, 256)
    ]
    assert tuple(f"{error:.1e}" for error in found) == errors


def test_a_solver_with_one_wrong_coefficient_fails_the_order():
    """The test above can fail: DPM-Solver++ with its history weight off by 2 is of order 1."""

    def wrong(denoise, x, levels, *, noise=None):
        last = None
        for now, then in pairwise(levels):
            x0 = denoise(x, now)
            d = x0 if last is None else x0 + (x0 - last)
            shrink = now.alpha * then.sigma / (now.sigma * then.alpha)
            x = then.sigma / now.sigma * x + then.alpha * (1 - shrink) * d
            last = x0
            yield type("S", (), {"x": x})

    found = slope(lambda n: relative_error(wrong, QUARTER, ratio_grid(Karras(), n), QUARTER))
    assert found == pytest.approx(1, abs=0.15)


# --- each schedule's own grid -------------------------------------------------------------------

OWN_GRID_BOUND = {ddim: 0.03, heun: 0.009, dpmpp_2m: 0.0012}  # relative, at 100 steps


def own_grid_error(
    sampler: Sampler, denoiser: Denoiser | Gaussian, steps: int, schedule: Schedule
) -> float:
    """From t = 1 (for Flow alpha = 0) down to the clean level."""
    grid = levels(schedule, steps, uniform)
    x = start(grid[0], ones(QUARTER))
    exact = gaussian_flow(QUARTER, x, grid[0], grid[-1])
    return float((finish(sampler(with_label(denoiser, None), x, grid)) / exact - 1).abs())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", ORDER, ids=name)
def test_own_grid_four_times_the_steps_a_third_of_the_error(sampler: Sampler, schedule: Schedule):
    bound = OWN_GRID_BOUND[sampler]
    assert own_grid_error(sampler, QUARTER, 100, schedule) < bound
    assert own_grid_error(sampler, QUARTER, 400, schedule) < bound / 3


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
@pytest.mark.parametrize("sampler", ORDER, ids=name)
def test_own_grid_through_every_prediction(
    sampler: Sampler, schedule: Schedule, prediction: Prediction
):
    """The network changes nothing, from pure noise down to the smallest sigma."""
    denoiser = as_denoiser(QUARTER, schedule, prediction)
    assert denoiser is not None
    grid = levels(schedule, 12, uniform)
    x = start(grid[0], ones(QUARTER))
    ends = [finish(sampler(with_label(d, None), x, grid)) for d in (denoiser, QUARTER)]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-7, atol=0.0)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 1.8)])
def test_order_from_alpha_0(sampler: Sampler, order: float):
    """The first step is of order 1 there. One such step leaves Heun its order; the history of 2M
    starts a step later and nears 2 slowly: 1.77, 1.81, 1.85 for each doubling from 128."""
    found = slope(lambda n: own_grid_error(sampler, QUARTER, n, Flow()), (128, 256, 512))
    assert found == pytest.approx(order, abs=0.15)


# --- closed forms, step by step -----------------------------------------------------------------

VARIANCES = (0.0, 0.01, 0.25, 4.0)
MIXED = diagonal(*VARIANCES)
GRIDS = {
    "vp": levels(Cosine(), 7, uniform),
    "ve": levels(Karras(), 7),
    "flow": levels(Flow(), 7, uniform),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_ddim_factor(grid: str):
    """u' = u (a a' l + s s') / (a^2 l + s^2) per eigen-direction."""
    lam, x = torch.tensor(VARIANCES, dtype=torch.float64), ones(MIXED)
    for (now, then), step in zip(
        pairwise(GRIDS[grid]), ddim(with_label(MIXED, None), x, GRIDS[grid]), strict=True
    ):
        a, s, b, r = now.alpha, now.sigma, then.alpha, then.sigma
        x = x * (a * b * lam + s * r) / (a**2 * lam + s**2)
        torch.testing.assert_close(step.x, x, rtol=1e-12, atol=1e-15)
        assert step.level is then


def test_heun_factor_at_alpha_1():
    lam, x = torch.tensor(VARIANCES, dtype=torch.float64), ones(MIXED)
    grid = GRIDS["ve"]
    steps = list(heun(with_label(MIXED, None), x, grid))
    for (now, then), step in zip(pairwise(grid[:-1]), steps, strict=False):
        s, r = now.sigma, then.sigma
        h, first = r - s, s / (lam + s**2)
        x = x * (1 + h / 2 * (first + r / (lam + r**2) * (1 + h * first)))
        torch.testing.assert_close(step.x, x, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(steps[-1].x, MIXED(x, grid[-2]), rtol=1e-12, atol=1e-15)


def test_heun_is_edms_algorithm_1_without_churn():
    """2206.00364, algorithm 1, line by line on a denoiser that is not linear."""
    oracle = FiniteSet(torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64).reshape(-1, 1, 1, 1))
    x = torch.linspace(-3, 3, 9, dtype=torch.float64).reshape(-1, 1, 1, 1) * 80
    grid = levels(Karras(), 18)
    found = [step.x for step in heun(with_label(oracle, None), x, grid)]
    for i, (now, then) in enumerate(pairwise(grid)):
        slope = (x - oracle(x, now)) / now.sigma
        ahead = x + (then.sigma - now.sigma) * slope
        if then.sigma != 0:
            slope = slope / 2 + (ahead - oracle(ahead, then)) / then.sigma / 2
            ahead = x + (then.sigma - now.sigma) * slope
        x = ahead
        torch.testing.assert_close(found[i], x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sampler", ORDER, ids=name)
def test_schedule_does_not_matter_at_equal_ratios(sampler: Sampler):
    """Samplers work on x / alpha as a function of sigma / alpha."""
    ends = []
    for schedule in SCHEDULES:
        grid = ratio_grid(schedule, 9)
        end = finish(sampler(with_label(MIXED, None), ones(MIXED) * grid[0].alpha, grid))
        ends.append(end / grid[-1].alpha)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-10, atol=1e-12)


def recursion(g: Gaussian, grid: Sequence[NoiseLevel], eta: float) -> tuple[Tensor, Tensor]:
    """V' = f^2 V + n^2 with f = (a a' l + s sqrt(s'^2 - n^2)) / (a^2 l + s^2)."""
    lam = g.eigenvalues
    factor, variance = torch.ones_like(lam), torch.zeros_like(lam)
    for now, then in pairwise(grid):
        a, s, b, r = (float(v) for v in (now.alpha, now.sigma, then.alpha, then.sigma))
        n2 = eta**2 * (r / s) ** 2 * (s**2 - (a * r / b) ** 2)
        f = (a * b * lam + s * math.sqrt(r**2 - n2)) / (a**2 * lam + s**2)
        factor, variance = f * factor, f**2 * variance + n2
    return factor, variance


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_stochastic_sampling_has_the_exact_variance(grid: str, eta: float):
    got = moments(partial(ddim, eta=eta), MIXED, GRIDS[grid])[1:]
    expected = recursion(MIXED, GRIDS[grid], eta)
    # 1e-8: sqrt(s'^2 - n^2) cancels where eta is 1 and alpha almost 0
    torch.testing.assert_close(got[0], expected[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-11, atol=1e-14)


def test_ddpm_is_the_ancestral_posterior():
    """2006.11239, eq. 6-7: mean and variance of q(x' | x, x0) with beta = 1 - a^2 / a'^2."""
    now, then = GRIDS["vp"][2:4]
    oracle = diagonal(0.25)
    x, z = ones(oracle) * 0.7, ones(oracle) * -1.3
    x0 = oracle(x, now)
    beta = 1 - now.alpha**2 / then.alpha**2
    mean = (then.alpha * beta * x0 + (1 - beta).sqrt() * then.sigma**2 * x) / now.sigma**2
    deviation = (then.sigma**2 / now.sigma**2 * beta).sqrt()
    end = finish(ddpm(with_label(oracle, None), x, (now, then), noise=lambda step: z))
    torch.testing.assert_close(end, mean + deviation * z, rtol=1e-12, atol=1e-12)


def test_many_steps_give_the_data_its_variance():
    """Ancestral sampling over the whole table: the end has the variances of the data."""
    grid = levels(LinearBetas(), 1000, uniform)
    factor, fresh = recursion(MIXED, grid, 1.0)
    end = factor**2 * (grid[0].alpha ** 2 * MIXED.eigenvalues + grid[0].sigma ** 2) + fresh
    torch.testing.assert_close(end[1:], MIXED.eigenvalues[1:], rtol=0.1, atol=0.0)
    got = moments(ddpm, MIXED, levels(LinearBetas(), 40, uniform))
    wanted = recursion(MIXED, levels(LinearBetas(), 40, uniform), 1.0)
    torch.testing.assert_close(got[2], wanted[1], rtol=1e-9, atol=1e-14)


# --- the published table on digits --------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluations", "high", "expected"),
    [
        (5, 80.0, (0.4908, 4.01, 0.0912)),
        (10, 80.0, (0.2511, 1.148, 0.1547)),
        (20, 80.0, (0.1282, 0.1856, 0.0417)),
        (35, 80.0, (0.0738, 0.0470, 0.0118)),
        (100, 80.0, (0.0260, 0.0052, 0.0013)),
        (10, 10.0, (0.1751, 0.4523, 0.0836)),
        (20, 10.0, (0.0872, 0.0768, 0.0172)),
    ],
)
def test_solver_error_on_the_digits_gaussian(
    evaluations: int, high: float, expected: tuple[float, ...]
):
    """The error of the solver alone; Heun gets the odd number of evaluations below."""
    g, calls, found = centred(digits()), 0, []

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        nonlocal calls
        calls += 1
        return g(x, level)

    for sampler in (ddim, heun, dpmpp_2m):
        steps = (evaluations + 1) // 2 if sampler is heun else evaluations
        grid, calls = levels(Karras(), steps, KarrasSpacing(high=high)), 0
        factor = finish(sampler(denoise, ones(g), grid)).flatten()
        found.append(distance(g, factor**2 * (g.eigenvalues + grid[0].sigma ** 2)))
        assert calls == (evaluations - 1) // 2 * 2 + 1 if sampler is heun else evaluations
    assert found == [pytest.approx(value, rel=1.5e-3, abs=6e-5) for value in expected]


@pytest.mark.parametrize(
    ("steps", "expected"), [(10, 0.3794), (20, 0.2277), (100, 0.0536), (1000, 0.0056)]
)
def test_ancestral_error_on_the_digits_gaussian(steps: int, expected: float):
    g, grid = centred(digits()), levels(Karras(), steps)
    factor, fresh = moments(ddpm, g, grid)[1:] if steps <= 20 else recursion(g, grid, 1.0)
    found = distance(g, factor**2 * (g.eigenvalues + grid[0].sigma ** 2) + fresh)
    assert found == pytest.approx(expected, abs=6e-5)


# --- contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_float32_pictures_stay_float32_and_the_last_estimate_is_the_picture(
    key: str, schedule: Schedule, steps: int
):
    grid = levels(schedule, steps, uniform)
    x = start(grid[0], keyed_normal(0, Stream.SAMPLE, range(3), (1, 2, 2)))
    oracle = FiniteSet(torch.linspace(-1, 1, 20).reshape(5, 1, 2, 2))
    noise = partial(keyed_normal, 0, Stream.SAMPLE, range(3), (1, 2, 2))
    taken = list(
        SAMPLERS[key](with_label(oracle, None), x, grid, noise=lambda step: noise(step + 1))
    )
    assert [step.level for step in taken] == list(grid[1:])
    for step in taken:
        assert step.x.dtype == step.x0.dtype == torch.float32
        assert step.x.isfinite().all()
    torch.testing.assert_close(taken[-1].x, taken[-1].x0, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("key", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch_nor_on_calls_before(key: str):
    grid = levels(Cosine(), 6)
    oracle = FiniteSet(torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 1, 2, 2))

    def run(positions: range) -> Tensor:
        x = start(grid[0], keyed_normal(4, Stream.SAMPLE, positions, (1, 2, 2)).double())
        draw = partial(keyed_normal, 4, Stream.SAMPLE, positions, (1, 2, 2))
        return finish(
            SAMPLERS[key](
                with_label(oracle, None), x, grid, noise=lambda step: draw(step + 1).double()
            )
        )

    whole = run(range(5))
    for i in range(5):
        torch.testing.assert_close(run(range(i, i + 1)), whole[i : i + 1], rtol=1e-12, atol=1e-12)
    assert torch.equal(run(range(5)), whole)


def test_eta_0_draws_no_noise_and_ddpm_none_at_the_end():
    def forbidden(step: int) -> Tensor:
        raise AssertionError(step)

    drawn: list[int] = []

    def count(step: int) -> Tensor:
        drawn.append(step)
        return ones(QUARTER)

    grid, x = levels(Flow(), 5, uniform), ones(QUARTER)
    quiet = finish(ddim(with_label(QUARTER, None), x, grid, noise=forbidden))
    assert torch.equal(quiet, finish(ddim(with_label(QUARTER, None), x, grid)))
    finish(ddpm(with_label(QUARTER, None), x, grid, noise=count))
    assert drawn == [0, 1, 2, 3]


@pytest.mark.parametrize("key", [key for key in SAMPLERS if key != "heun"])
def test_one_evaluation_per_step_and_none_at_the_clean_level(key: str):
    seen: list[float] = []

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        seen.append(float(level.sigma))
        return QUARTER(x, level)

    grid = levels(Karras(), 6)
    finish(SAMPLERS[key](denoise, ones(QUARTER), grid, noise=lambda step: ones(QUARTER)))
    assert len(seen) == 6
    assert min(seen) > 0


def test_samplers_run_one_step_at_a_time():
    """Nothing is computed before it is asked for, so a caller can stop."""
    calls = 0

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        nonlocal calls
        calls += 1
        return QUARTER(x, level)

    steps = ddim(denoise, ones(QUARTER), levels(Karras(), 6))
    next(steps)
    next(steps)
    assert calls == 2


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_its_range_is_refused(eta: float):
    with pytest.raises(ConfigError, match=rf"eta must be in \[0, 1\]; got {eta}"):
        next(ddim(with_label(QUARTER, None), ones(QUARTER), levels(Flow(), 2), eta=eta))


def test_eta_without_noise_is_refused():
    with pytest.raises(ConfigError, match="eta 1 adds noise at every step: pass noise"):
        next(ddpm(with_label(QUARTER, None), ones(QUARTER), levels(Flow(), 2)))


def test_start_is_noise_at_the_level():
    level = levels(Karras(), 3)[0]
    assert torch.equal(start(level, ones(QUARTER)), 80 * ones(QUARTER))

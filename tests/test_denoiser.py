"""Prediction types, the one loss, its weightings, and which levels are drawn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from undiffuse.denoiser import (
    Denoiser,
    Epsilon,
    FlowVelocity,
    HighNoise,
    KarrasPrecond,
    LogNormal,
    LogUniform,
    MinSnr,
    OnGrid,
    Prediction,
    Sample,
    Velocity,
    uniform_t,
    unweighted,
)
from undiffuse.errors import ConfigError
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    LinearBetas,
    NoiseLevel,
    Schedule,
    Stream,
    keyed_uniform,
)
from undiffuse.oracles import Gaussian

SCHEDULES: list[Schedule] = [LinearBetas(), Cosine(), Karras(), Flow()]
PREDICTIONS: list[Prediction] = [
    Epsilon(),
    Sample(),
    Velocity(),
    FlowVelocity(),
    KarrasPrecond(0.5),
]
REFUSED = {("Flow", "Epsilon"), ("Flow", "KarrasPrecond")}  # alpha reaches 0
SHAPE = (3, 2, 2)


def name(value: object) -> str:
    return type(value).__name__


PAIRS = [
    pytest.param(s, p, id=f"{name(s)}-{name(p)}")
    for s in SCHEDULES
    for p in PREDICTIONS
    if (name(s), name(p)) not in REFUSED
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def zero(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


def some_net(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
    """Not linear, hears the noise level and the class."""
    shift = 0.0 if label is None else label.to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(x + shift) * torch.cos(timestep / 300).reshape(-1, 1, 1, 1)


def batch(schedule: Schedule, n: int = 5) -> tuple[Tensor, Tensor, NoiseLevel]:
    x0, noise = normal(n, *SHAPE, seed=1), normal(n, *SHAPE, seed=2)
    return x0, noise, schedule(torch.linspace(0.01, 0.99, n, dtype=torch.float64)).like(x0)


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


# --- which pairs work ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=name)
def test_every_pair_is_accepted_or_refused(schedule: Schedule, prediction: Prediction):
    if (name(schedule), name(prediction)) in REFUSED:
        with pytest.raises(ConfigError) as caught:
            Denoiser(zero, schedule, prediction)
        text = str(caught.value)
        assert name(prediction) in text
        assert name(schedule) in text
        assert "alpha reaches 0 at t = 1; use Velocity or FlowVelocity" in text
        return
    denoiser = Denoiser(zero, schedule, prediction)
    level = schedule(torch.linspace(0, 1, 201, dtype=torch.float64))
    for number in prediction(level):
        assert number.isfinite().all()
        assert number.shape == level.alpha.shape
    assert (prediction(level).c_out != 0).all()  # the loss divides by it
    x0, noise, levels = batch(schedule)
    assert denoiser.loss(x0, noise, levels).isfinite().all()


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.inf, math.nan])
def test_impossible_sigma_data_is_refused(sigma_data: float):
    with pytest.raises(ConfigError, match=f"sigma_data must be above 0; got {sigma_data}"):
        KarrasPrecond(sigma_data)


# --- targets and losses -------------------------------------------------------------------------


def target(prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """What the papers train on, written out (architecture's table, last column)."""
    a, s = level.alpha, level.sigma
    match prediction:
        case Epsilon():
            return noise
        case Sample():
            return x0
        case Velocity():
            return (a * noise - s * x0) / (a**2 + s**2).sqrt()
        case FlowVelocity():
            return noise - x0
        case KarrasPrecond(sigma_data=d):
            return (s * x0 - a * d**2 * noise) / (d * (a**2 * d**2 + s**2).sqrt())
    raise AssertionError(prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=name)
@pytest.mark.parametrize("level", [(0.6, 0.8), (1.0, 2.5), (0.3, 0.7)])
def test_targets_are_the_papers(prediction: Prediction, level: tuple[float, float]):
    x0, noise = normal(2, 4, *SHAPE, seed=3)
    at = NoiseLevel(*torch.tensor([*level, 0.5], dtype=torch.float64))
    k, x = prediction(at), at.mix(x0, noise)
    ours = (x0 - k.c_skip * x) / k.c_out
    torch.testing.assert_close(ours, target(prediction, x0, noise, at), rtol=0.0, atol=3e-15)


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_loss_is_the_mean_squared_error_of_the_papers_target(
    schedule: Schedule, prediction: Prediction
):
    x0, noise, level = batch(schedule)
    k, label = prediction(level), torch.arange(5)
    raw = some_net(k.c_in * level.mix(x0, noise), k.c_noise.flatten(), label)
    expected = mse(raw, target(prediction, x0, noise, level))
    loss = Denoiser(some_net, schedule, prediction).loss(x0, noise, level, label)
    assert loss.shape == (5,)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0.0)


def test_karras_loss_is_edms_weighted_error_of_the_estimate():
    """2206.00364, table 1: lambda(sigma) = (sigma^2 + d^2) / (sigma d)^2 on |D - x0|^2."""
    x0, noise, level = batch(Karras())
    d, sigma = 0.5, level.sigma
    edm = Denoiser(some_net, Karras(), KarrasPrecond(d))
    weight = ((sigma**2 + d**2) / (sigma * d) ** 2).flatten()
    expected = weight * mse(edm(level.mix(x0, noise), level), x0)
    torch.testing.assert_close(edm.loss(x0, noise, level), expected, rtol=1e-9, atol=0.0)


def test_karras_numbers_are_edms():
    """2206.00364, table 1, at alpha = 1."""
    sigma, d = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64), 0.5
    k = KarrasPrecond(d)(Karras().at(sigma))
    norm = (sigma**2 + d**2).sqrt()
    torch.testing.assert_close(k.c_skip, d**2 / (sigma**2 + d**2))
    torch.testing.assert_close(k.c_out, sigma * d / norm)
    torch.testing.assert_close(k.c_in, 1 / norm)
    torch.testing.assert_close(k.c_noise, sigma.log() / 4)


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.05])
def test_karras_input_and_target_have_unit_variance_at_any_alpha(alpha: float):
    d, sigma = 0.37, 0.8
    level = NoiseLevel(*torch.tensor([alpha, sigma, 0.5], dtype=torch.float64))
    k = KarrasPrecond(d)(level)
    assert float(k.c_in**2 * (alpha**2 * d**2 + sigma**2)) == pytest.approx(1)
    from_x0, from_noise = (1 - k.c_skip * alpha) / k.c_out, k.c_skip * sigma / k.c_out
    assert float(from_x0**2 * d**2 + from_noise**2) == pytest.approx(1)
    assert float(alpha * k.c_skip * d**2) == pytest.approx(float(d**2 - k.c_out**2))


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_one_estimate_gives_losses_in_the_ratio_of_one_over_c_out_squared(
    schedule: Schedule, prediction: Prediction
):
    """The network that makes D the oracle has the optimal loss: error of D* / c_out^2."""
    eye = torch.eye(math.prod(SHAPE), dtype=torch.float64)
    g = Gaussian.from_covariance(normal(*SHAPE), 0.25 * eye)
    x0, noise, level = batch(schedule)
    k, x = prediction(level), level.mix(x0, noise)

    def net(scaled: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        x = scaled / k.c_in
        return (g(x, level) - k.c_skip * x) / k.c_out

    denoiser = Denoiser(net, schedule, prediction)
    torch.testing.assert_close(denoiser(x, level), g(x, level), rtol=1e-9, atol=1e-9)
    expected = mse(g(x, level), x0) / k.c_out.flatten() ** 2
    torch.testing.assert_close(denoiser.loss(x0, noise, level), expected, rtol=1e-7, atol=0.0)


def test_a_single_pair_survives_float32_at_the_smallest_sigma():
    """c_out is smallest there; the target keeps its digits."""
    x0, noise = normal(2, 1, 1, 64, 64, seed=3).float()
    for schedule in SCHEDULES:
        level = schedule(torch.zeros(1, dtype=torch.float64)).like(x0)
        for prediction in PREDICTIONS:
            if (name(schedule), name(prediction)) in REFUSED:
                continue
            k = prediction(level)
            ours = (x0 - k.c_skip * level.mix(x0, noise)) / k.c_out
            assert (ours - target(prediction, x0, noise, level)).abs().max() < 2e-3


# --- what the network receives ------------------------------------------------------------------


@pytest.mark.parametrize("prediction", [p(1000) for p in (Epsilon, Sample, Velocity)], ids=name)
def test_table_timesteps_are_the_papers_whole_numbers(prediction: Prediction):
    seen: list[Tensor] = []

    def spy(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        seen.append(timestep)
        return x

    schedule, whole = LinearBetas(), torch.tensor([0.0, 1.0, 517.0, 999.0])
    x = torch.zeros(4, *SHAPE)
    Denoiser(spy, schedule, prediction)(x, schedule(whole.double() / 999).like(x))
    torch.testing.assert_close(seen[0], whole, rtol=1e-6, atol=0.0)
    assert seen[0].dtype == x.dtype


def test_a_shared_level_reaches_every_picture_and_the_label_passes_through():
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def spy(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        seen.append((x, timestep, label))
        return x.to(torch.bfloat16)

    schedule = Karras()
    denoiser = Denoiser(spy, schedule, KarrasPrecond())
    x, label = normal(3, *SHAPE).float(), torch.tensor([2, 0, 1])
    out = denoiser(x, NoiseLevel(*(v[0] for v in schedule(torch.tensor([0.5])))), label)
    got_x, timestep, got_label = seen[0]
    assert timestep.shape == (3,)
    assert torch.equal(timestep, timestep[:1].expand(3))
    assert got_label is label
    assert got_x.dtype == out.dtype == torch.float32  # the network's precision stays inside
    denoiser(x, schedule(torch.tensor([0.5])).like(x[:1]))
    assert seen[1][2] is None


def test_the_network_can_be_exchanged():
    """How an average of the weights is used."""
    denoiser = Denoiser(zero, Flow(), Velocity())
    other = replace(denoiser, net=some_net)
    x, level = normal(1, *SHAPE), Flow()(torch.tensor([0.5])).like(normal(1, *SHAPE))
    assert not torch.equal(denoiser(x, level), other(x, level))
    assert (other.schedule, other.prediction) == (denoiser.schedule, denoiser.prediction)


# --- weighting ----------------------------------------------------------------------------------


def test_unweighted_is_one():
    level = Flow()(torch.linspace(0, 1, 5))
    assert torch.equal(unweighted(level), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@given(t=st.floats(0.0, 1.0))
def test_min_snr_is_the_published_weight(gamma: float, t: float):
    """2303.09556, section 3.4: min(snr, g) for x0, / snr for the noise, / (snr + 1) for v."""
    level = Cosine()(torch.tensor([t], dtype=torch.float64))
    snr = float((level.alpha / level.sigma) ** 2)
    published = {Sample(): 1.0, Epsilon(): snr, Velocity(): snr + 1}
    for prediction, divisor in published.items():
        weight = float(MinSnr(prediction, gamma)(level))
        assert weight == pytest.approx(min(snr, gamma) / divisor, rel=1e-12)


# --- which levels are trained -------------------------------------------------------------------


def uniforms(n: int) -> Tensor:
    return torch.from_numpy(keyed_uniform(0, Stream.LEVEL, range(n), 1)[:, 0])


def test_uniform_t_and_the_grid():
    u = uniforms(5000)
    assert stats.kstest(uniform_t(Flow(0.001), u).t.numpy().clip(1e-3), "uniform").pvalue > 0.01
    t = OnGrid(10)(LinearBetas(10), u).t * 9
    assert torch.equal(t, t.round())
    counts = np.bincount(t.long().numpy(), minlength=10)
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 0.01


def test_the_grid_holds_every_entry_of_the_table_exactly():
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    level = OnGrid(1000)(LinearBetas(), u)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(level.alpha.numpy() ** 2, alpha_bar, rtol=1e-12)


def test_log_normal_levels():
    """2206.00364, table 1: ln sigma is normal; the middle uniform is the median."""
    level = LogNormal(-1.2, 1.2)(Karras(), uniforms(5000))
    inside = ((level.ratio > 0.0021) & (level.ratio < 79)).numpy()
    z = (level.ratio.log().numpy() + 1.2) / 1.2
    assert inside.mean() > 0.999
    assert stats.kstest(z, "norm").pvalue > 0.01
    share = float(((level.ratio > 0.05) & (level.ratio < 3)).double().mean())
    assert share == pytest.approx(0.905, abs=0.012)
    middle = LogNormal(-1.2, 1.2)(Cosine(), torch.tensor([0.5]))
    assert float(middle.ratio) == pytest.approx(math.exp(-1.2), rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_extreme_uniforms_stay_inside_the_schedule(schedule: Schedule):
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for draw in (uniform_t, OnGrid(1000), LogNormal()):
        level = draw(schedule, ends)
        assert level.sigma.min() >= 1e-3
        assert all(v.isfinite().all() for v in level)
        assert float(level.t[0]) <= 0.05
        assert float(level.t[1]) <= 1


def test_noisier_levels_count_more_up_to_a_limit() -> None:
    weighting, schedule = HighNoise(0.5, 10.0), Karras()
    weights = weighting(schedule.at(torch.tensor([0.0, 0.5, 1.0, 1.5, 80.0]).double()))
    assert weights.tolist() == pytest.approx([1 + (0.002 / 0.5) ** 2, 2.0, 5.0, 10.0, 10.0])
    same_ratio = Cosine().at(torch.tensor([1.0]).double())
    assert weighting(same_ratio).tolist() == pytest.approx([5.0])


def test_log_uniform_levels_are_even_in_their_logarithm() -> None:
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    ratios = LogUniform(0.1, 10.0)(Karras(), u).ratio
    assert ratios.tolist() == pytest.approx([0.1, 10**-0.5, 1.0, 10**0.5, 10.0])
    for low, high in ((0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))):
        with pytest.raises(ConfigError, match="LogUniform needs 0 < low < high"):
            LogUniform(low, high)

"""The loop: averages, learning rates, batches as functions of position, guards, accumulation."""

# pyright: basic

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from undiffuse import kernels
from undiffuse.averaging import ema_gamma
from undiffuse.config import LrScheduler, TrainConfig
from undiffuse.denoiser import (
    Denoiser,
    FlowVelocity,
    KarrasPrecond,
    LogNormal,
    MinSnr,
    OnGrid,
    Velocity,
    uniform_t,
)
from undiffuse.errors import CheckpointError, DivergedError
from undiffuse.noise import Cosine, Flow, Karras, NoiseLevel, Stream, keyed, keyed_uniform
from undiffuse.recipes import ddpm_family
from undiffuse.training import (
    MAX_BAD_STEPS,
    Batch,
    FusedUpdate,
    Recipe,
    Source,
    StepReport,
    TrainState,
    ema_beta,
    held_out_loss,
    learning_rate_at,
    make_batch,
    micro_batches,
    train,
)
from undiffuse.unet import UNet

SHAPE = (3, 4, 4)
CLASSES = 3
RECIPE = Recipe(Karras(), LogNormal(), classes=CLASSES)


def source(positions: range) -> tuple[Tensor, Tensor]:
    """Pictures and labels as functions of position."""
    draws = keyed_uniform(5, Stream.AUGMENT, positions, math.prod(SHAPE))
    x0 = torch.from_numpy(draws).float().reshape(-1, *SHAPE) * 2 - 1
    return x0, torch.tensor([p % CLASSES for p in positions])


def source64(positions: range) -> tuple[Tensor, Tensor]:
    x0, label = source(positions)
    return x0.double(), label


def unet(dropout: float = 0.0, seed: int = 0, **style: Any) -> UNet:
    spec = ddpm_family(4, (1, 2), 1, (1,)).with_classes(CLASSES, null=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(replace(spec, style=replace(spec.style, dropout=dropout, **style)))


def state_of(
    config: TrainConfig, net: nn.Module | None = None, fused: FusedUpdate | None = None
) -> TrainState:
    net = unet() if net is None else net
    return TrainState(net, Denoiser(net, Karras(), KarrasPrecond()), config, fused=fused)


CONFIG = TrainConfig(
    max_train_steps=6, train_batch_size=4, lr_warmup_steps=0, learning_rate=1e-2, seed=1
)


def run(config: TrainConfig, net: nn.Module | None = None, source: Source = source) -> TrainState:
    state = state_of(config, net)
    assert [r.step for r in train(state, source, RECIPE, config)] == [
        *range(1, config.max_train_steps + 1)
    ]
    return state


def flat(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{group}/{name}": tensor.clone()
        for group, tensors in state.tensors().items()
        for name, tensor in tensors.items()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], except_for: str = "?") -> None:
    assert one.keys() == other.keys()
    for name in one:
        if not name.startswith(except_for):
            assert torch.equal(one[name], other[name]), name


# --- an update in one pass ----------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))


def push(state: TrainState, step: int, scale: float = 1.0) -> StepReport:
    """An update by gradients that do not depend on the weights."""
    generator = torch.Generator().manual_seed(step)
    for p in state.parameters:
        p.grad = torch.empty_like(p).copy_(scale * torch.randn(p.shape, generator=generator))
    return state.advance(torch.tensor(1.0))


def assert_close(one: TrainState, other: TrainState) -> None:
    mine, theirs = flat(one), flat(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.allclose(theirs[name], value, rtol=1e-5, atol=1e-7), name


@needs_kernels
@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_one_pass_does_what_clipping_adamw_and_averaging_do(limit: float) -> None:
    config = replace(CONFIG, max_grad_norm=limit, adam_weight_decay=0.1)
    plain, fused = state_of(config), state_of(config, fused=kernels)
    for step in range(5):
        wanted, got = push(plain, step), push(fused, step)
        assert torch.allclose(got.grad_norm, wanted.grad_norm, rtol=1e-5)
        assert got.learning_rate == wanted.learning_rate
    assert_close(plain, fused)


@needs_kernels
def test_one_pass_leaves_weights_and_moments_alone_when_a_gradient_is_not_finite() -> None:
    plain, fused = state_of(CONFIG), state_of(CONFIG, fused=kernels)
    for state in (plain, fused):
        push(state, 0)
        before = flat(state)
        report = push(state, 1, scale=float("nan"))
        assert float(report.skipped) == 1.0
        assert all(p.grad is None for p in state.parameters)
        assert_same(before, flat(state), except_for="ema/")
        push(state, 2)
    assert_close(plain, fused)


@needs_kernels
@pytest.mark.parametrize("kernels_first", [True, False])
def test_one_pass_and_the_optimiser_continue_each_other(kernels_first: bool) -> None:
    """Their states are one: a run may move between machines with and without kernels."""
    ways = (kernels, None) if kernels_first else (None, kernels)
    wanted, first = state_of(CONFIG), state_of(CONFIG, fused=ways[0])
    for step in range(4):
        push(wanted, step)
    push(first, 0)
    push(first, 1)
    second = state_of(CONFIG, unet(seed=5), fused=ways[1])
    second.restore(first.tensors(), first.counters())
    push(second, 2)
    push(second, 3)
    assert_close(wanted, second)


# --- the average --------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_is_the_published_one(length: float, gamma: float) -> None:
    """2312.02696, section 3.1: sigma_rel = 0.05 is gamma = 16.97, 0.10 is 6.94."""
    assert ema_gamma(length) == pytest.approx(gamma, abs=0.005)


@given(st.floats(0.005, 0.25))
def test_gamma_gives_the_relative_length(length: float) -> None:
    """Eq. 126, and the deviation of the profile t^gamma on [0, 1] by its moments."""
    gamma = ema_gamma(length)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_the_average_s_weights_follow_the_power_function(length: float) -> None:
    """Step i has share w_i = (1 - beta_i) prod_{j > i} beta_j. The product telescopes:
    w_1 + ... + w_i = (i / n)^(gamma + 1), so that w_i is about (gamma + 1) i^gamma / n^(gamma+1),
    and the start of the run has no share at all."""
    config, n = TrainConfig(ema_length=length), 2000
    betas = [ema_beta(config, step) for step in range(1, n + 1)]
    assert betas[0] == 0.0
    after = np.cumprod([1.0, *reversed(betas[1:])])[::-1]
    shares = (1 - np.array(betas)) * after
    gamma, steps = ema_gamma(length), np.arange(1, n + 1)
    assert np.cumsum(shares) == pytest.approx((steps / n) ** (gamma + 1), rel=1e-9, abs=1e-15)
    late = slice(n // 2, None)
    profile = (gamma + 1) * (steps - 0.5) ** gamma / n ** (gamma + 1)
    assert shares[late] == pytest.approx(profile[late], rel=1e-3)
    middle = float((shares * steps).sum())
    deviation = math.sqrt(float((shares * (steps - middle) ** 2).sum())) / n
    assert deviation == pytest.approx(length, rel=2e-3)


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    config = replace(CONFIG, max_train_steps=7)
    state = state_of(config, unet().double())
    history = [
        copy.deepcopy(state.net.state_dict()) for _ in train(state, source64, RECIPE, config)
    ]
    n, power = len(history), ema_gamma(config.ema_length) + 1
    shares = [(i / n) ** power - ((i - 1) / n) ** power for i in range(1, n + 1)]
    for name, average in state.ema.state_dict().items():
        terms = [share * w[name] for share, w in zip(shares, history, strict=True)]
        wanted = torch.stack(terms).sum(0)
        assert torch.allclose(average, wanted, rtol=0, atol=1e-13), name
    assert not state.ema.training
    assert not any(p.requires_grad for p in state.ema.parameters())


# --- the learning rate --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "end"),
    [(LrScheduler.CONSTANT, 1.0), (LrScheduler.LINEAR, 0.01), (LrScheduler.COSINE, 0.01)],
)
def test_the_learning_rate_warms_up_and_decays(scheduler: LrScheduler, end: float) -> None:
    config = TrainConfig(
        max_train_steps=1000, lr_warmup_steps=50, learning_rate=2.0, lr_scheduler=scheduler
    )
    rates = np.array([learning_rate_at(config, step) for step in range(1001)])
    assert rates[:50] == pytest.approx(2.0 * np.arange(1, 51) / 51)
    assert rates[50] == 2.0
    assert rates[1000] == pytest.approx(2.0 * end)
    assert rates[525] == pytest.approx(2.0 if end == 1.0 else 2.0 * (1 + end) / 2)
    assert (np.diff(rates[:50]) > 0).all()
    assert (np.diff(rates[50:]) <= 0).all()
    assert learning_rate_at(config, 10**9) == pytest.approx(2.0 * end)


@given(st.integers(1, 300), st.integers(0, 1000), st.sampled_from(LrScheduler))
def test_no_step_has_a_rate_of_zero_or_above_the_highest(
    steps: int, warmup: int, scheduler: LrScheduler
) -> None:
    config = TrainConfig(max_train_steps=steps, lr_warmup_steps=warmup, lr_scheduler=scheduler)
    rates = [learning_rate_at(config, step) for step in range(steps)]
    assert all(0.009 * config.learning_rate < rate <= config.learning_rate for rate in rates)
    assert config.learning_rate in rates  # the warm-up is never the whole run


def test_reports_carry_the_rate_of_their_update() -> None:
    config = replace(CONFIG, lr_warmup_steps=100, max_train_steps=20)
    rates = [r.learning_rate for r in train(state_of(config), source, RECIPE, config)]
    assert rates == [learning_rate_at(config, step) for step in range(20)]


# --- batches ------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40))
def test_micro_batches_partition_the_batch_s_positions(step: int, size: int, parts: int) -> None:
    parts = min(parts, size)
    config = TrainConfig(train_batch_size=size, gradient_accumulation_steps=parts)
    ranges = micro_batches(config, step)
    assert [p for part in ranges for p in part] == [*range(step * size, (step + 1) * size)]
    lengths = [len(part) for part in ranges]
    assert len(lengths) == parts
    assert max(lengths) - min(lengths) <= 1


def joined(parts: list[Batch]) -> list[Tensor]:
    rows = [(p.x0, p.noise, *p.level, p.label) for p in parts]
    return [torch.cat(column) for column in zip(*rows, strict=True)]


@given(
    st.integers(0, 10**12),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 2**63 - 1),
)
def test_a_batch_is_a_function_of_its_positions(start: int, cuts: list[int], seed: int) -> None:
    """However positions are cut into batches, each gets the same picture, noise, level, label."""
    config = replace(CONFIG, seed=seed, label_dropout=0.5)
    edges = [start, *(start + total for total in itertools.accumulate(cuts))]
    whole = make_batch(source, RECIPE, config, range(edges[0], edges[-1]))
    parts = [make_batch(source, RECIPE, config, range(a, b)) for a, b in itertools.pairwise(edges)]
    for one, other in zip(joined([whole]), joined(parts), strict=True):
        assert torch.equal(one, other)


def test_every_seed_and_position_has_its_own_noise_and_level() -> None:
    batches = [make_batch(source, RECIPE, replace(CONFIG, seed=s), range(50)) for s in range(4)]
    noise = torch.cat([b.noise for b in batches]).flatten(1)
    sigma = torch.cat([b.level.sigma for b in batches]).flatten()
    assert len({row.numpy().tobytes() for row in noise}) == 200
    assert len(set(sigma.tolist())) == 200


def test_a_batch_draws_standard_noise_and_the_recipe_s_levels() -> None:
    batch = make_batch(source, RECIPE, CONFIG, range(4000))
    flat_noise, log_sigma = batch.noise.double(), batch.level.sigma.double().log()
    assert float(flat_noise.mean()) == pytest.approx(0, abs=4 / math.sqrt(flat_noise.numel()))
    assert float(flat_noise.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * flat_noise.numel()))
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=4 * 1.2 / math.sqrt(4000))
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=4 * 1.2 / math.sqrt(8000))
    assert batch.level.sigma.shape == (4000, 1, 1, 1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_to_the_null_class_at_the_asked_share(share: float) -> None:
    config, n = replace(CONFIG, label_dropout=share), 6000
    label = make_batch(source, RECIPE, config, range(n)).label
    assert label is not None
    dropped = label == CLASSES
    spread = 4 * math.sqrt(share * (1 - share) / n)
    assert float(dropped.float().mean()) == pytest.approx(share, abs=spread + 1e-9)
    kept = torch.arange(n) % CLASSES
    assert torch.equal(label[~dropped], kept[~dropped])


def test_a_recipe_without_classes_hears_no_labels() -> None:
    assert make_batch(source, replace(RECIPE, classes=0), CONFIG, range(4)).label is None
    unlabelled: Source = lambda positions: (source(positions)[0], None)  # noqa: E731
    assert make_batch(unlabelled, RECIPE, CONFIG, range(4)).label is None


# --- accumulation -------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_accumulation_does_not_change_the_run(parts: int) -> None:
    """In float64 to rounding, also where parts are uneven (8 pictures in 3 parts). Epsilon is
    large, since AdamW divides by sqrt(v) + epsilon: behind a layer that starts at zero the
    gradients are as small as their rounding errors, and would be blown up to whole updates."""
    config = replace(CONFIG, train_batch_size=8, label_dropout=0.5, adam_epsilon=1e-3)
    whole = run(config, unet().double(), source64)
    cut = run(replace(config, gradient_accumulation_steps=parts), unet().double(), source64)
    for (name, one), other in zip(flat(whole).items(), flat(cut).values(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12), name


def test_accumulation_counts_the_weighting_too() -> None:
    recipe = replace(RECIPE, weighting=MinSnr(KarrasPrecond(), 5.0))
    losses = []
    for parts in (1, 3):
        config = replace(CONFIG, gradient_accumulation_steps=parts, max_train_steps=2)
        state = state_of(config, unet().double())
        losses.append([float(r.loss) for r in train(state, source64, recipe, config)])
    plain = [float(r.loss) for r in train(state_of(CONFIG), source, RECIPE, CONFIG)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # a loss is reported in float32
    assert losses[0][0] != pytest.approx(plain[0], rel=1e-2)


# --- guards -------------------------------------------------------------------------------------


def poisoned(bad: Callable[[int], bool], value: float = math.nan) -> Source:
    """A source whose pictures hold `value` wherever `bad` says so of a position."""

    def poison(positions: range) -> tuple[Tensor, Tensor]:
        x0, label = source(positions)
        for row, position in enumerate(positions):
            if bad(position):
                x0[row, 0, 0, 0] = value
        return x0, label

    return poison


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("parts", [1, 4])
def test_an_update_that_is_not_finite_is_left_out(value: float, parts: int) -> None:
    """Weights, moments and the optimiser's step stay; it is counted; the run goes on."""
    config = replace(CONFIG, adam_weight_decay=0.1, gradient_accumulation_steps=parts)
    state = state_of(config)
    before, skipped = flat(state), []
    for report in train(state, poisoned(lambda p: p in (9, 10), value), RECIPE, config):
        after = flat(state)
        if report.step == 3:  # positions 8 ... 11
            assert_same(before, after, except_for="ema/")
            assert not report.loss.isfinite()
            assert state.counters()["skipped_in_row"] == 1.0
        else:
            assert not torch.equal(
                before["model/layers.00_conv.weight"], after["model/layers.00_conv.weight"]
            )
        skipped.append(float(report.skipped))
        before = after
    assert skipped == [0, 0, 1, 1, 1, 1]
    assert state.step == 6
    assert state.counters() == {"step": 6, "skipped": 1.0, "skipped_in_row": 0.0}
    assert all(tensor.isfinite().all() for tensor in before.values())
    steps = [float(v) for name, v in before.items() if name.endswith("/step")]
    assert set(steps) == {5.0}


def test_a_gradient_that_is_not_finite_counts_like_a_loss() -> None:
    """A finite loss with an infinite gradient: sqrt at zero."""

    class Cliff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
            return x + self.weight.sqrt()

    net = Cliff()
    state = state_of(CONFIG, net)
    report = next(train(state, source, RECIPE, CONFIG))
    assert report.loss.isfinite()
    assert not report.grad_norm.isfinite()
    assert float(report.skipped) == 1.0
    assert float(net.weight.detach()) == 0.0


def test_ten_bad_updates_in_a_row_end_the_run() -> None:
    config = replace(CONFIG, max_train_steps=50)
    state, start = state_of(config), flat(state_of(config))
    with pytest.raises(DivergedError, match=r"10 updates in a row before step 10 .*learning.rate"):
        for _ in train(state, poisoned(lambda p: True), RECIPE, config):
            pass
    now = flat(state)
    assert_same(start, {name: now[name] for name in start})
    assert not any(tensor.any() for name, tensor in now.items() if name.startswith("optim/"))
    assert state.step == MAX_BAD_STEPS


def test_fewer_than_ten_in_a_row_do_not_end_it() -> None:
    """Nine bad, one good, over and over."""
    config = replace(CONFIG, max_train_steps=40, train_batch_size=1, lr_warmup_steps=0)
    state = state_of(config)
    *_, last = train(state, poisoned(lambda p: p % 10 != 9), RECIPE, config)
    assert float(last.skipped) == 36.0
    assert float(flat(state)["optim/layers.00_conv.weight/step"]) == 4.0


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_are_clipped_to_the_norm(limit: float) -> None:
    """The first AdamW moment is (1 - beta1) g, with g the clipped gradient."""
    config = replace(CONFIG, max_grad_norm=limit)
    state = state_of(config)
    report = next(train(state, source, RECIPE, config))
    moments = [v for name, v in flat(state).items() if name.endswith("/exp_avg")]
    norm = float(torch.stack([m.square().sum() for m in moments]).sum().sqrt()) / 0.1
    assert norm == pytest.approx(min(limit, float(report.grad_norm)), rel=1e-4)
    assert float(report.grad_norm) > 1e-2


def test_one_step_is_adamw_s() -> None:
    """The first update of AdamW by hand: w - lr wd w - lr g / (|g| + eps)."""
    config = replace(CONFIG, adam_weight_decay=0.1, max_grad_norm=1e9)
    state = state_of(config, unet().double())
    reference = unet().double()
    batch = make_batch(source64, RECIPE, config, range(4))
    loss = Denoiser(reference, Karras(), KarrasPrecond()).loss(
        batch.x0, batch.noise, batch.level, batch.label
    )
    loss.mean().backward()
    report = next(train(state, source64, RECIPE, config))
    assert float(report.loss) == pytest.approx(float(loss.detach().mean()), rel=1e-6)
    for (name, got), before in zip(
        state.net.named_parameters(), reference.parameters(), strict=True
    ):
        g = before.grad
        assert g is not None
        wanted = before * (1 - 1e-2 * 0.1) - 1e-2 * g / (g.abs() + config.adam_epsilon)
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12), name


# --- learning -----------------------------------------------------------------------------------


def test_an_untrained_net_has_a_loss_of_one_on_gaussian_pictures() -> None:
    """Pictures N(0, s^2 I) and a network that answers 0: the target of KarrasPrecond(s) has unit
    variance at every level (2206.00364, appendix B.6), so the loss is 1 +- sqrt(2 / numbers)."""
    spread = 0.37

    def gaussian(positions: range) -> tuple[Tensor, Tensor | None]:
        rows = [keyed(3, Stream.AUGMENT, p).standard_normal(SHAPE) for p in positions]
        return torch.from_numpy(np.stack(rows) * spread).float(), None

    net = unet(zero_init=True)
    config = replace(CONFIG, train_batch_size=1500, gradient_accumulation_steps=10)
    recipe = replace(RECIPE, classes=0)
    state = TrainState(net, Denoiser(net, Karras(), KarrasPrecond(spread)), config)
    report = next(train(state, gaussian, recipe, config))
    tolerance = 4 * math.sqrt(2 / (1500 * math.prod(SHAPE)))
    assert float(report.loss) == pytest.approx(1.0, abs=tolerance)


@pytest.mark.parametrize(
    ("recipe", "prediction"),
    [
        (RECIPE, KarrasPrecond()),
        pytest.param(
            Recipe(Cosine(), OnGrid(), classes=CLASSES), Velocity(), marks=pytest.mark.slow
        ),
        pytest.param(
            Recipe(Flow(), uniform_t, classes=CLASSES), FlowVelocity(), marks=pytest.mark.slow
        ),
    ],
    ids=["karras", "cosine-v", "flow"],
)
def test_four_pictures_are_learned_by_heart(recipe: Recipe, prediction: Any) -> None:
    """Four pictures, far apart: the loss falls far below what any linear denoiser reaches."""
    pictures = torch.sign(torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)))

    def four(positions: range) -> tuple[Tensor, Tensor]:
        index = torch.tensor([p % 4 for p in positions])
        return pictures[index], index % CLASSES

    net = unet(groups=4)
    config = TrainConfig(
        max_train_steps=240, train_batch_size=12, learning_rate=1e-2, label_dropout=0.0
    )
    state = TrainState(net, Denoiser(net, recipe.schedule, prediction), config)
    losses = [float(r.loss) for r in train(state, four, recipe, config)]
    assert np.mean(losses[-25:]) < 0.5 * np.mean(losses[:5])
    args = (recipe, pictures.repeat(16, 1, 1, 1), torch.arange(64) % 4 % CLASSES, 0)
    before = Denoiser(unet(groups=4), recipe.schedule, prediction)
    with torch.no_grad():
        assert np.mean(held_out_loss(state.averaged, *args)) < 0.5 * np.mean(
            held_out_loss(before, *args)
        )


# --- the held-out loss --------------------------------------------------------------------------


def held_out(state: TrainState, seed: int = 0, n: int = 40) -> list[float]:
    x0, label = source(range(n))
    return held_out_loss(state.averaged, RECIPE, x0, label, seed)


def test_the_held_out_loss_differs_by_the_weights_alone() -> None:
    state = state_of(CONFIG)
    first = held_out(state)
    torch.manual_seed(99)
    assert held_out(state) == first
    assert held_out(state_of(replace(CONFIG, seed=77))) == first
    assert held_out(state, seed=1) != first
    for _ in train(state, source, RECIPE, CONFIG):
        pass
    assert held_out(state) != first
    assert len(first) == 8


def test_the_held_out_bins_go_from_low_noise_to_high() -> None:
    """Every bin holds an equal share of the training levels; the levels seen tell which."""
    seen: list[NoiseLevel] = []

    def watch(schedule: Any, u: Tensor) -> NoiseLevel:
        level = LogNormal()(schedule, u)
        seen.append(level)
        return level

    state, (x0, label) = state_of(CONFIG), source(range(64))
    held_out_loss(state.averaged, replace(RECIPE, levels=watch), x0, label, 0, bins=4)
    (level,) = seen
    quarter = [level.sigma[i::4] for i in range(4)]
    for low, high in itertools.pairwise(quarter):
        assert float(low.max()) < float(high.min())
    middle = math.exp(-1.2)  # the median of the levels divides the second bin from the third
    assert float(quarter[1].max()) < middle < float(quarter[2].min())


def test_the_held_out_loss_hears_every_label_and_few_pictures_give_few_bins() -> None:
    labels: list[Tensor | None] = []

    def net(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        labels.append(label)
        return torch.zeros_like(x)

    denoiser = Denoiser(net, Karras(), KarrasPrecond())
    x0, label = source(range(300))
    assert len(held_out_loss(denoiser, RECIPE, x0, label, 0, batch_size=128)) == 8
    assert [len(one) for one in labels if one is not None] == [128, 128, 44]
    assert torch.equal(torch.cat([one for one in labels if one is not None]), label)
    assert len(held_out_loss(denoiser, RECIPE, x0[:3], label[:3], 0)) == 3
    labels.clear()
    held_out_loss(denoiser, replace(RECIPE, classes=0), x0, label, 0, batch_size=150)
    assert labels == [None, None]


def test_the_held_out_loss_is_computed_on_its_device() -> None:
    """The meta device stands for a GPU: it refuses to meet tensors of the CPU."""
    devices: list[str] = []

    def net(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        devices.extend({x.device.type, timestep.device.type, label.device.type})
        return torch.zeros_like(x)

    denoiser = Denoiser(net, Karras(), KarrasPrecond())
    x0, label = source(range(4))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # it has no numbers
        held_out_loss(denoiser, RECIPE, x0, label, 0, device="meta")
    assert set(devices) == {"meta"}


# --- stopping, saving, random numbers -----------------------------------------------------------


def test_stop_is_asked_between_steps() -> None:
    state, asked = state_of(CONFIG), []

    def stop() -> bool:
        asked.append(state.step)
        return len(asked) > 3

    steps = [report.step for report in train(state, source, RECIPE, CONFIG, stop)]
    assert steps == [1, 2, 3]
    assert asked == [0, 1, 2, 3]
    assert [r.step for r in train(state, source, RECIPE, CONFIG)] == [4, 5, 6]
    assert_same(flat(state), flat(run(CONFIG)))


def test_a_finished_state_trains_no_further() -> None:
    state = run(CONFIG)
    assert list(train(state, source, RECIPE, CONFIG)) == []


def test_a_loop_that_is_left_early_leaves_no_thread_behind() -> None:
    import threading

    state = state_of(CONFIG)
    for _ in train(state, source, RECIPE, CONFIG):
        break
    loop: Iterator[StepReport] = train(state, source, RECIPE, CONFIG)
    next(loop)
    assert any(t.name.startswith("batches") for t in threading.enumerate())
    loop.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not any(t.name.startswith("batches") for t in threading.enumerate())


def test_batches_are_made_on_one_core_and_steps_on_all() -> None:
    seen: set[int] = set()

    def counting(positions: range) -> tuple[Tensor, Tensor]:
        seen.add(torch.get_num_threads())
        return source(positions)

    torch.set_num_threads(3)
    try:
        for _ in train(state_of(CONFIG), counting, RECIPE, CONFIG):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert seen == {1}


def test_a_source_that_fails_ends_the_loop_with_its_own_error() -> None:
    def broken(positions: range) -> tuple[Tensor, Tensor]:
        if positions.start >= 8:
            raise OSError("the pictures are gone")
        return source(positions)

    state = state_of(CONFIG)
    with pytest.raises(OSError, match="the pictures are gone"):
        for _ in train(state, broken, RECIPE, CONFIG):
            pass
    assert state.step == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stop", range(1, 6))
def test_restore_continues_with_the_same_bits(stop: int, layout: torch.memory_format) -> None:
    """Also where weights, and so their moments, are stored channels last: the fused optimiser
    looks at no strides."""
    config = replace(CONFIG, label_dropout=0.5)

    def fresh() -> TrainState:
        net = unet(dropout=0.3).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        return state_of(config, net)

    straight, first = fresh(), fresh()
    for _ in train(straight, source, RECIPE, config):
        pass
    for _ in train(first, source, RECIPE, config, lambda: first.step >= stop):
        pass
    saved = {g: {k: v.contiguous() for k, v in t.items()} for g, t in first.tensors().items()}
    second = fresh()
    second.restore(saved, first.counters())
    assert_same(flat(first), flat(second))
    assert second.counters() == first.counters()
    for _ in train(second, source, RECIPE, config):
        pass
    assert_same(flat(straight), flat(second))


def test_restoring_copies() -> None:
    """The tensors that were handed in are not the ones that training writes on."""
    state = run(CONFIG)
    saved = {group: dict(tensors) for group, tensors in state.tensors().items()}
    kept = flat(state)
    other = state_of(replace(CONFIG, max_train_steps=9), unet(seed=5))
    other.restore(saved, state.counters())
    for _ in train(other, source, RECIPE, replace(CONFIG, max_train_steps=9)):
        pass
    assert_same(kept, flat(state))


def test_the_counters_of_a_bad_streak_survive_restoring() -> None:
    config = replace(CONFIG, max_train_steps=50)
    bad = poisoned(lambda p: True)
    first, second = state_of(config), state_of(config)
    for _ in train(first, bad, RECIPE, config, lambda: first.step >= 7):
        pass
    second.restore(first.tensors(), first.counters())
    with pytest.raises(DivergedError, match="10 updates in a row before step 10"):
        for _ in train(second, bad, RECIPE, config):
            pass


def test_tensors_that_do_not_fit_are_refused() -> None:
    state, wide = run(CONFIG), ddpm_family(8, (1, 2), 1, (1,)).with_classes(CLASSES, null=True)
    other = state_of(CONFIG, UNet(wide))
    with pytest.raises(CheckpointError, match="model does not fit this network"):
        other.restore(state.tensors(), state.counters())
    tensors = other.tensors() | {"optim": state.tensors()["optim"]}
    with pytest.raises(CheckpointError, match=r"optim: .* is \[.*\] in the checkpoint"):
        other.restore(tensors, state.counters())
    missing = state.tensors()
    del missing["ema"]["layers.00_conv.weight"]
    with pytest.raises(CheckpointError, match="ema does not fit"):
        state_of(CONFIG).restore(missing, state.counters())


def test_runs_are_equal_whatever_torch_s_own_generator_was() -> None:
    """Dropout draws from it, so it is keyed before every use; nothing else reads it."""
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append(flat(run(CONFIG, unet(dropout=0.5))))
    assert_same(*ends)


def test_the_dropout_keys_do_not_disturb_a_run_without_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = flat(run(CONFIG))
    monkeypatch.setattr("undiffuse.training._seed_dropout", lambda seed, step, part: None)
    assert_same(plain, flat(run(CONFIG)))
    with_dropout = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with_dropout.append(flat(run(CONFIG, unet(dropout=0.5))))
    name = "model/layers.00_conv.weight"
    assert not torch.equal(with_dropout[0][name], with_dropout[1][name])  # the fault is real


def test_dropout_differs_from_step_to_step_and_between_parts() -> None:
    """torch's global generator is used in one way only: seeded by (seed, step, part)."""
    config = replace(CONFIG, gradient_accumulation_steps=2, max_train_steps=3)
    masks: list[bytes] = []

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
            kept = nn.functional.dropout(torch.ones(64), 0.5, self.training)
            masks.append(kept.numpy().tobytes())
            return x * self.weight

    first = run(config, Masks())
    assert len(masks) == len(set(masks)) == 6
    seen = masks.copy()
    masks.clear()
    torch.manual_seed(1234)
    again = run(config, Masks())
    assert masks == seen
    assert_same(flat(first), flat(again))

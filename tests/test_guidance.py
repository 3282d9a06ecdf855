"""Guidance on oracles, where every result is a formula."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from undiffuse import runs
from undiffuse.checkpoint import Model, Pictures
from undiffuse.denoiser import Denoiser, KarrasPrecond, Velocity
from undiffuse.errors import ConfigError
from undiffuse.guidance import (
    Denoise,
    classifier_free,
    clipped,
    guided,
    on_schedule,
    with_label,
    within,
)
from undiffuse.noise import Cosine, Flow, Karras, LinearBetas, NoiseLevel, Schedule, levels
from undiffuse.oracles import FiniteSet, Gaussian, Mixture
from undiffuse.recipes import ddpm_family
from undiffuse.sampling import Draw, Step, ddim, finish, start
from undiffuse.unet import UNet

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


@pytest.mark.parametrize("scale", [0.5, 1.5, 3.0])
def test_the_guided_score_of_two_gaussians_is_that_of_their_weighted_product(scale: float):
    """p_strong^w p_weak^(1-w) of two noisy Gaussians has precision P = w/V + (1-w)/V', and the
    score P (m - x) with P m = w a mu/V + (1-w) a mu'/V'."""
    level, (mu, lam), (mu_weak, lam_weak) = at(0.6, 0.8), (1.0, 0.1), (0.2, 0.4)
    strong, weak = gaussian(mu, lam), gaussian(mu_weak, lam_weak)
    x0 = guided(with_label(strong, None), with_label(weak, None), scale)(X, level)
    score = (0.6 * x0 - X) / 0.8**2
    v, v_weak = 0.36 * lam + 0.64, 0.36 * lam_weak + 0.64
    precision = scale / v + (1 - scale) / v_weak
    pulled = scale * 0.6 * mu / v + (1 - scale) * 0.6 * mu_weak / v_weak
    torch.testing.assert_close(score, pulled - precision * X, rtol=1e-12, atol=1e-12)


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


def test_guidance_on_an_interval_follows_the_exact_path():
    """Two Gaussians of one variance: inside the interval the path is that of the extrapolated mean,
    outside that of the strong one; each is x' = m + (x - m) sqrt((v + s'^2) / (v + s^2))."""
    weak, strong = (with_label(gaussian(mean, 0.25), None) for mean in (0.2, 1.0))
    ratios = torch.logspace(1.0, -3.0, 801, dtype=torch.float64)
    grid = [NoiseLevel(torch.ones_like(ratio), ratio, ratio) for ratio in ratios]
    guiding = guided(strong, weak, 2.0)
    end = finish(ddim(within(guiding, strong, float(ratios[400]), float(ratios[150])), X, grid))

    def moved(x: Tensor, *parts: tuple[int, int, float]) -> Tensor:
        for now, then, mean in parts:
            x = mean + (x - mean) * ((0.25 + ratios[then] ** 2) / (0.25 + ratios[now] ** 2)) ** 0.5
        return x

    # the step that begins at the lower end is still guided
    exact = moved(X, (0, 150, 1.0), (150, 401, 1.8), (401, 800, 1.0))
    torch.testing.assert_close(end, exact, rtol=0.0, atol=1e-2)
    assert float((moved(X, (0, 800, 1.8)) - exact).abs().min()) > 0.1
    assert float((moved(X, (0, 800, 1.0)) - exact).abs().min()) > 0.1


def test_guidance_works_from_pure_noise():
    grid = levels(Flow(), 10, lambda s, n: s(torch.linspace(1, 0, n + 1)[:-1]))
    assert float(grid[0].alpha) == 0
    mixture = Mixture((gaussian(-1.0, 0.2), gaussian(1.0, 0.1)), (1.0, 3.0), (0, 1))
    label = torch.tensor([0, 1, 1])
    end = finish(ddim(classifier_free(mixture, label, 2.0), start(grid[0], X), grid))
    means = end.flatten(1).mean(1)
    assert means[0] < -0.5
    assert (means[1:] > 0.5).all()


def timed(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
    """A network whose output shows what it was told."""
    return x.tanh() * (1 + timestep.reshape(-1, 1, 1, 1) / 100)


SCHEDULES = [Karras(), Cosine(), LinearBetas(), Flow()]


@pytest.mark.parametrize("asked", SCHEDULES, ids=str)
@pytest.mark.parametrize("own", SCHEDULES, ids=str)
def test_a_denoiser_is_asked_at_the_level_of_its_own_schedule(asked: Schedule, own: Schedule):
    """As if it had been called with its own alpha, sigma and t from the start."""
    denoiser, x0, noise = Denoiser(timed, own, Velocity()), normal(3, *SHAPE), normal(3, *SHAPE)
    told = on_schedule(denoiser, own)
    for ratio in (0.05, 1.0, 20.0):
        theirs, ours = (one.at(torch.tensor(ratio)) for one in (asked, own))
        wanted = denoiser(ours.mix(x0, noise), ours)
        torch.testing.assert_close(told(theirs.mix(x0, noise), theirs, None), wanted)
    for level in (asked(torch.zeros(())), asked(torch.ones(()))):  # alpha may be 0
        assert bool(told(level.mix(x0, noise), level, None).isfinite().all())


# --- through the whole road, calls counted -------------------------------------------------------


def model(seed: int, classes: int = 2) -> Model:
    """A network whose last layer does not start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UNet(ddpm_family(8, (1, 2), 1, (), 1).with_classes(classes, null=classes > 0))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    denoiser = Denoiser(net.eval(), Karras(), KarrasPrecond(0.5))
    return Model(denoiser, Pictures(4, 4, 1), {})


@pytest.mark.parametrize("schedule", [Karras(), Cosine(), LinearBetas()], ids=str)
def test_a_weak_model_of_another_schedule_is_asked_as_it_was_trained(schedule: Schedule):
    """At scale 0 the guided estimate is the weak one: that of the weak denoiser itself."""
    strong, weak = model(0), model(1)
    weak = replace(weak, denoiser=replace(weak.denoiser, schedule=schedule, prediction=Velocity()))
    seen: list[Step] = []
    runs.generate(
        strong,
        2,
        label=[0, 1],
        weak=weak,
        guidance_scale=0.0,
        sampler=ddim,
        num_inference_steps=3,
        mixed_precision="no",
        on_step=seen.append,
    )
    for before, after in pairwise(seen):
        own = schedule.at(before.level.ratio)
        with torch.no_grad():
            wanted = weak.denoiser(before.x * own.alpha, own, torch.tensor([0, 1]))  # alpha was 1
        torch.testing.assert_close(after.x0, wanted.clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def strong() -> Model:
    return model(0)


@pytest.fixture(scope="module")
def weak() -> Model:
    return model(1)


def drawn(strong: Model, **options: Any) -> tuple[Tensor, list[int], list[float]]:
    """Pictures, how many pictures each evaluation was about, and the noise levels of the steps."""
    calls: list[int] = []
    seen: list[float] = []

    def sampler(
        denoise: Denoise, x: Tensor, levels: Sequence[NoiseLevel], *, noise: Draw | None = None
    ) -> Iterator[Step]:
        seen.extend(float(level.ratio) for level in levels[:-1])
        return ddim(denoise, x, levels, noise=noise)

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(len(output))

    hook = strong.net.layers["00_conv"].register_forward_hook(count)
    given: dict[str, Any] = {
        "num_inference_steps": 10,
        "mixed_precision": "no",
        "sampler": sampler,
        **options,
    }
    pictures = runs.generate(strong, 2, **given)
    hook.remove()
    return pictures, calls, seen


INTERVAL = (0.1, 3.0)


def inside(ratios: list[float]) -> list[bool]:
    low, high = INTERVAL
    return [low <= ratio <= high for ratio in ratios]


def test_classifier_free_guidance_asks_for_no_class_inside_the_interval_only(strong: Model):
    pictures, calls, ratios = drawn(strong, guidance_scale=3.0, guidance_interval=INTERVAL)
    assert 2 < sum(inside(ratios)) < 8
    assert calls == [4 if one else 2 for one in inside(ratios)]  # two labels in one call, or one
    everywhere, calls, _ = drawn(strong, guidance_scale=3.0)
    assert calls == [4] * 10
    assert not torch.equal(pictures, everywhere)


def test_autoguidance_calls_the_weak_model_inside_the_interval_only(strong: Model, weak: Model):
    seen: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(len(output))

    hook = weak.net.layers["00_conv"].register_forward_hook(count)

    def weak_calls(**options: Any) -> int:
        seen.clear()
        _, calls, _ = drawn(strong, **{"weak": weak, "guidance_scale": 2.0, **options})
        assert calls == [2] * 10
        return len(seen)

    ratios = drawn(strong)[2]
    assert weak_calls() == 10
    assert weak_calls(guidance_interval=INTERVAL) == sum(inside(ratios))
    assert weak_calls(guidance_interval=(100.0, math.inf)) == 0
    assert weak_calls(guidance_interval=(0.0, math.inf)) == 10
    assert weak_calls(guidance_scale=1.0) == 0
    hook.remove()


def test_scale_1_and_an_interval_without_levels_draw_the_plain_pictures(strong: Model, weak: Model):
    plain, _, _ = drawn(strong)
    for options in (
        {"weak": weak},
        {"guidance_interval": INTERVAL},
        {"weak": weak, "guidance_interval": INTERVAL},
        {"guidance_scale": 3.0, "guidance_interval": (100.0, 200.0)},
        {"guidance_scale": 3.0, "weak": weak, "guidance_interval": (100.0, math.inf)},
    ):
        pictures, calls, _ = drawn(strong, **options)
        assert torch.equal(pictures, plain), options
        assert calls == [2] * 10


def test_an_interval_that_holds_every_level_is_guidance_everywhere(strong: Model):
    everywhere, _, ratios = drawn(strong, guidance_scale=3.0)
    ends = (min(ratios), max(ratios))  # both belong to it
    assert torch.equal(drawn(strong, guidance_scale=3.0, guidance_interval=ends)[0], everywhere)


@pytest.mark.parametrize("interval", [(2.0, 1.0), (-0.1, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_an_interval_the_wrong_way_round_is_refused(interval: tuple[float, float], strong: Model):
    with pytest.raises(ConfigError, match=r"^guidance_interval must be two noise levels .* got"):
        runs.generate(strong, 1, guidance_scale=2.0, guidance_interval=interval)

"""What a sampling step costs beside the network: counted, not timed.

A pass is one elementwise operation that writes a tensor of the size of the pictures.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from undiffuse.checkpoint import Model, Pictures
from undiffuse.denoiser import Denoiser, Velocity
from undiffuse.guidance import PAIRED, Denoise, classifier_free, clipped, guided, with_label
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    LinearBetas,
    NoiseLevel,
    Schedule,
    Stream,
    keyed_normal,
    levels,
    uniform,
)
from undiffuse.oracles import FiniteSet
from undiffuse.recipes import preset
from undiffuse.runs import generate
from undiffuse.sampling import SAMPLERS, Sampler, finish, start
from undiffuse.unet import UNet

SHAPE = (4, 3, 8, 8)
SIZE = math.prod(SHAPE)
EVALUATIONS = {key: 2 if key == "heun" else 1 for key in SAMPLERS}  # per step
PASSES = dict.fromkeys(SAMPLERS, 4)  # the sampler's own, per step
PASSES |= {"ddpm": 3, "ddim": 2, "dpmpp_2m": 3, "unipc": 5, "ipndm": 7}


class Watch(TorchDispatchMode):
    """Counts passes over pictures, and numbers that the host read, by their dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.read: list[torch.dtype] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.read.append(args[0].dtype)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.passes += out.numel() // SIZE
        return out


def pictures(seed: int) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) - 0.5


STRONG, WEAK, NOISE = pictures(0), pictures(1), pictures(2)
LABEL = torch.tensor([0, 1, 2, 3])


def free(x: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor:
    """A denoiser without any cost."""
    return WEAK if label is None else STRONG


def net(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
    """A network without any cost."""
    return STRONG


def passes(sampler: Sampler, denoise: Denoise, steps: int) -> int:
    grid = levels(Cosine(), steps)
    x = start(grid[0], NOISE)
    with Watch() as watch:
        finish(sampler(denoise, x, grid, noise=lambda step: NOISE))
    return watch.passes


def passes_of_one_step(sampler: Sampler, denoise: Denoise) -> int:
    """In the middle: the first and the last step are cheaper."""
    return passes(sampler, denoise, 9) - passes(sampler, denoise, 8)


@pytest.mark.parametrize("key", SAMPLERS)
def test_a_step_reads_each_picture_of_its_equation_once(key: str) -> None:
    assert passes_of_one_step(SAMPLERS[key], with_label(free, None)) == PASSES[key]


@pytest.mark.parametrize("key", SAMPLERS)
def test_guidance_and_clipping_are_one_pass_each(key: str) -> None:
    denoise = clipped(guided(with_label(free, LABEL), with_label(free, None), 3.0))
    expected = PASSES[key] + 2 * EVALUATIONS[key]
    assert passes_of_one_step(SAMPLERS[key], denoise) == expected


@pytest.mark.parametrize("key", SAMPLERS)
def test_with_preconditioning_there_are_at_most_12_passes_per_evaluation(key: str) -> None:
    denoise = clipped(with_label(Denoiser(net, Cosine(), Velocity()), None))
    assert passes_of_one_step(SAMPLERS[key], denoise) <= 12 * EVALUATIONS[key]


def test_the_count_can_fail() -> None:
    """Noise added the long way is found."""

    def wasteful(denoise: Denoise, x: Tensor, levels: Any, *, noise: Any = None) -> Any:
        for step in SAMPLERS["ddim"](denoise, x, levels):
            yield step._replace(x=step.x + 0 * noise(0))

    assert passes_of_one_step(wasteful, with_label(free, None)) == PASSES["ddim"] + 2


@pytest.mark.parametrize("key", SAMPLERS)
def test_at_most_three_pictures_are_kept_between_evaluations(key: str) -> None:
    given: list[weakref.ref[Tensor]] = []
    most = 0

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        nonlocal most
        alive = {id(one()) for one in given if one() is not None} - {id(x)}
        most = max(most, len(alive))
        estimate = x * 0.5
        given.extend((weakref.ref(x), weakref.ref(estimate)))
        return estimate

    grid = levels(Cosine(), 8)
    for step in SAMPLERS[key](denoise, start(grid[0], NOISE), grid, noise=lambda step: NOISE):
        del step
    assert len(given) == 2 * 8 * EVALUATIONS[key] - 2 * (key == "heun")
    assert most <= 3


@pytest.mark.parametrize("key", SAMPLERS)
def test_a_step_changes_no_picture_that_was_given_away(key: str) -> None:
    """Neither what `denoise` was given or gave, nor an earlier step's pictures."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(picture: Tensor) -> Tensor:
        seen.append((picture, picture.clone()))
        return picture

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        return keep(keep(x) if level.t > 0.5 else x * 0.5)

    grid = levels(Cosine(), 6)
    noise = lambda step: keep(NOISE.clone())  # noqa: E731
    for step in SAMPLERS[key](denoise, start(grid[0], NOISE), grid, noise=noise):
        keep(step.x)
        keep(step.x0)
    assert len(seen) > 20
    for picture, before in seen:
        assert torch.equal(picture, before)


# --- the host never waits -----------------------------------------------------------------------


def tiny_model() -> Model:
    torch.manual_seed(0)
    network = UNet(preset("tiny", 3).with_classes(4, null=True)).eval()
    with torch.no_grad():  # the last convolution starts at zero, which would hide everything
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Model(
        Denoiser(network, Cosine(), Velocity()), Pictures(8, 8, 3, 8, ("a", "b", "c", "d"))
    )


@pytest.mark.parametrize("key", SAMPLERS)
def test_no_number_of_the_pictures_is_read_while_sampling(key: str) -> None:
    """Levels are float64 and lie on the CPU; reading a float32 makes a GPU stop."""
    denoise = clipped(classifier_free(tiny_model().denoiser, LABEL, 2.0, null=4))
    grid = levels(Cosine(), 3)
    with torch.no_grad(), Watch() as watch:
        finish(SAMPLERS[key](denoise, start(grid[0], NOISE), grid, noise=lambda step: NOISE))
    assert set(watch.read) <= {torch.float64}


def test_reading_a_number_is_found() -> None:
    def curious(x: Tensor, level: NoiseLevel) -> Tensor:
        return x * 0.5 if bool(x.isfinite().all()) else x

    grid = levels(Cosine(), 3)
    with Watch() as watch:
        finish(SAMPLERS["ddim"](curious, start(grid[0], NOISE), grid))
    assert torch.bool in watch.read


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_level_is_told_once(shared: bool) -> None:
    """One number in memory for the whole batch, so that the network can embed it once."""
    told: list[Tensor] = []

    def listen(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        told.append(timestep)
        return x

    level = levels(Cosine(), 3)[1]
    own = NoiseLevel(*(v.expand(4).reshape(4, 1, 1, 1) for v in level)).like(NOISE)
    Denoiser(listen, Cosine(), Velocity())(NOISE, level if shared else own)
    assert told[0].shape == (4,)
    assert told[0].untyped_storage().nbytes() == (4 if shared else 16)


def test_a_shared_level_is_told_once_under_guidance_too() -> None:
    told: list[Tensor] = []

    def listen(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        told.append(timestep)
        return x

    denoiser = Denoiser(listen, Cosine(), Velocity())
    classifier_free(denoiser, LABEL, 2.0, null=4)(NOISE, levels(Cosine(), 3)[1])
    assert [t.shape for t in told] == [(8,)]
    assert told[0].untyped_storage().nbytes() == 4


# --- one call for both labels -------------------------------------------------------------------


class Calls:
    """A denoiser that remembers the labels of its calls."""

    def __init__(self, denoiser: Callable[[Tensor, NoiseLevel, Tensor | None], Tensor]) -> None:
        self.denoiser = denoiser
        self.labels: list[list[int] | None] = []

    def __call__(self, x: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor:
        self.labels.append(None if label is None else label.tolist())
        return self.denoiser(x, level, label)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, -1.0])
@pytest.mark.parametrize("shared", [True, False])
def test_one_call_of_twice_the_pictures_gives_what_two_calls_give(
    scale: float, shared: bool
) -> None:
    calls = Calls(tiny_model().denoiser)
    level = levels(Cosine(), 5)[2]
    if not shared:
        grid = levels(Cosine(), 5)[:4]
        level = NoiseLevel(*(torch.stack(v) for v in zip(*grid, strict=True))).like(NOISE)
    with torch.no_grad():
        apart = classifier_free(calls, LABEL, scale)(NOISE, level)
        together = classifier_free(calls, LABEL, scale, null=4)(NOISE, level)
    assert calls.labels == [None, [0, 1, 2, 3], [4, 4, 4, 4, 0, 1, 2, 3]]
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6 * (1 + abs(scale)))


def test_a_large_batch_and_scale_1_are_not_doubled() -> None:
    calls = Calls(lambda x, level, label: x * 0.5)
    level = levels(Cosine(), 3)[1]
    fits = torch.zeros(PAIRED // 64, 1, 8, 8)
    for count, label in ((len(fits), 0), (len(fits) + 1, 0)):
        x = torch.zeros(count, 1, 8, 8)
        classifier_free(calls, torch.full((count,), label), 2.0, null=4)(x, level)
    classifier_free(calls, LABEL, 1.0, null=4)(NOISE, level)
    assert [None if one is None else len(one) for one in calls.labels] == [
        2 * len(fits),
        None,
        len(fits) + 1,
        4,
    ]


def test_generating_with_guidance_takes_one_call_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    counted: list[int] = []
    model.net.register_forward_hook(lambda module, given, out: counted.append(len(out)))
    together = generate(model, 3, guidance_scale=2.0, num_inference_steps=4)
    assert counted == [6] * 4
    monkeypatch.setattr("undiffuse.guidance.PAIRED", 0)
    apart = generate(model, 3, guidance_scale=2.0, num_inference_steps=4)
    assert counted == [6] * 4 + [3] * 8
    torch.testing.assert_close(together, apart, rtol=0.0, atol=1e-5)


# --- the same pictures as by the equations' own words -------------------------------------------


def spelled_out(key: str, now: NoiseLevel, then: NoiseLevel, eps: Any, x: Any, z: Any) -> Tensor:
    """One step as the papers write it. `eps`: the noise estimate at any x and level."""
    e = eps(x, now)
    x0 = (x - now.sigma * e) / now.alpha
    if key == "ddpm":
        left = 1 - (now.alpha / then.alpha) ** 2 * (then.sigma / now.sigma) ** 2
        fresh = then.sigma * left.clamp(min=0).sqrt()
        kept = (then.sigma**2 - fresh**2).clamp(min=0).sqrt()
        return then.alpha * x0 + kept * e + fresh * z
    euler = then.alpha * x0 + then.sigma * e
    if key == "ddim" or then.sigma == 0:
        return euler
    slope = (e + eps(euler, then)) / 2
    return then.alpha * (x / now.alpha + (then.ratio - now.ratio) * slope)


@pytest.mark.parametrize("schedule", [LinearBetas(), Karras(), Flow()], ids=repr)
@pytest.mark.parametrize("key", ["ddpm", "ddim", "heun"])
def test_steps_are_those_of_the_papers(key: str, schedule: Schedule) -> None:
    oracle = FiniteSet(torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 1, 2, 2))
    x = keyed_normal(0, Stream.SAMPLE, range(3), (1, 2, 2)).double()
    draw = partial(keyed_normal, 0, Stream.SAMPLE, range(3), (1, 2, 2))
    noise: Callable[[int], Tensor] = lambda step: draw(step + 1).double()  # noqa: E731
    grid = levels(schedule, 7, None if isinstance(schedule, Karras) else uniform)[1:]
    x = start(grid[0], x)
    found = [step.x for step in SAMPLERS[key](with_label(oracle, None), x, grid, noise=noise)]
    for i, picture in enumerate(found):
        eps = lambda x, level: level.noise_in(x, oracle(x, level))  # noqa: E731
        x = spelled_out(key, grid[i], grid[i + 1], eps, x, noise(i))
        torch.testing.assert_close(picture, x, rtol=1e-9, atol=1e-9)


def test_heun_keeps_its_digits_where_alpha_is_small() -> None:
    """Dividing x by alpha and multiplying again lost four of seven digits here."""
    oracle = FiniteSet(torch.linspace(-1, 1, 20).reshape(5, 1, 2, 2))
    precise = FiniteSet(torch.linspace(-1, 1, 20).reshape(5, 1, 2, 2).double())
    grid = levels(Cosine(), 12, uniform)
    assert 0 < float(grid[0].alpha) < 1e-3
    x = start(grid[0], keyed_normal(0, Stream.SAMPLE, range(3), (1, 2, 2)))
    got = SAMPLERS["heun"](with_label(oracle, None), x, grid)
    wanted = SAMPLERS["heun"](with_label(precise, None), x.double(), grid)
    for step, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(step.x.double(), exact.x, rtol=5e-6, atol=5e-6)

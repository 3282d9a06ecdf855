"""Where the arithmetic runs: devices, precision, and what deciding leaves alone."""

# pyright: basic

import pytest
import torch
from torch import Tensor, nn

from undiffuse import runtime
from undiffuse.config import Device, Precision, RuntimeConfig
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import ConfigError
from undiffuse.noise import Karras, NoiseLevel
from undiffuse.recipes import ddpm_family
from undiffuse.unet import UNet

CPU = torch.device("cpu")
SHAPE = (2, 3, 8, 8)


def unet(classes: int = 0) -> UNet:
    spec = ddpm_family(8, (1, 2), 1, (1,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return awake(UNet(spec.with_classes(classes, null=True) if classes else spec))


def awake(net: UNet) -> UNet:
    """Weights that start at zero would hide every difference in front of them."""
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(0, 0.05)
    return net


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator, dtype=dtype)
    return x, torch.tensor([-1.0, 0.5], dtype=dtype)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# --- devices ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
def test_auto_takes_the_processor_where_there_is_nothing_else() -> None:
    assert runtime.choose_device(Device.AUTO) == CPU
    assert runtime.choose_device(Device.CPU) == CPU


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", [Device.CUDA, Device.MPS])
def test_a_device_that_is_not_there_is_refused_and_the_others_named(device: Device) -> None:
    with pytest.raises(ConfigError, match=rf"device {device.value} is not .* there is: cpu$"):
        runtime.choose_device(device)


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps")]
)
def test_auto_takes_the_best_there_is(
    cuda: bool, mps: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert runtime.choose_device(Device.AUTO).type == best
    assert runtime.choose_device(Device.CPU) == CPU
    other = Device.MPS if not mps else Device.CUDA
    if not (cuda and mps):
        with pytest.raises(ConfigError, match=best):
            runtime.choose_device(other)


def test_move_changes_layout_but_no_number() -> None:
    net, before = unet(), {k: v.clone() for k, v in unet().state_dict().items()}
    moved = runtime.move(net, CPU)
    assert moved is net
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    weight = net.get_parameter("layers.00_conv.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


# --- precision ----------------------------------------------------------------------------------


def test_float32_is_the_bare_network() -> None:
    net, (x, timestep) = unet(), inputs()
    with torch.no_grad():
        wanted = net(x, timestep, None)
        got = runtime.callable_net(runtime.move(net, CPU), bf16=False)(x, timestep, None)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)


def test_float32_leaves_float64_alone() -> None:
    net, (x, timestep) = unet().double(), inputs(torch.float64)
    got = runtime.callable_net(net, bf16=False)(x, timestep, None)
    assert got.dtype == torch.float64
    assert torch.allclose(got, net(x, timestep, None), rtol=0, atol=1e-12)


def test_bf16_is_close_and_finite_but_not_equal() -> None:
    """bfloat16 has 8 bits of mantissa: relative errors of about 2^-8 per operation."""
    net, (x, timestep) = runtime.move(unet(), CPU), inputs()
    assert isinstance(net, nn.Module)
    with torch.no_grad():
        full = runtime.callable_net(net, bf16=False)(x, timestep, None)
        half = runtime.callable_net(net, bf16=True)(x, timestep, None).float()
    assert half.isfinite().all()
    error = float((half - full).norm() / full.norm())
    assert 1e-5 < error < 0.05


def test_bf16_stays_inside_the_network() -> None:
    """Weights, gradients, loss and estimate are float32; the network's own output is not."""
    net, (x0, _) = unet(), inputs()
    run = runtime.callable_net(net, bf16=True)
    seen: list[torch.dtype] = []

    def watch(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        seen.append(run(x, timestep, label).dtype)
        return run(x, timestep, label)

    denoiser = Denoiser(watch, Karras(), KarrasPrecond())
    level = NoiseLevel(*(v.reshape(-1, 1, 1, 1).float() for v in Karras()(torch.rand(2))))
    loss = denoiser.loss(x0, torch.randn(SHAPE), level)
    loss.sum().backward()
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert denoiser(x0, level).dtype == torch.float32
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}


def test_bf16_gradients_point_where_float32_gradients_point() -> None:
    grads = []
    for bf16 in (False, True):
        net, (x, timestep) = unet(), inputs()
        runtime.callable_net(net, bf16)(x, timestep, None).float().square().mean().backward()
        parts = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        grads.append(torch.cat(parts))
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0)
    assert float(cosine) > 0.99


# --- deciding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [Precision.NO, Precision.BF16])
def test_a_named_precision_is_taken_without_timing(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def timed(net: nn.Module, shape: object, label: object, bf16: bool) -> float:
        asked.append(bf16)
        return 1.0

    monkeypatch.setattr(runtime, "step_seconds", timed)
    chosen = runtime.decide(RuntimeConfig(Device.CPU, precision), unet(), SHAPE, None)
    assert chosen.precision is precision
    assert chosen.reason == "as asked"
    assert chosen.device == CPU
    assert asked == [precision is Precision.BF16]  # only to say how long a run will take
    assert chosen.seconds == 1.0 / SHAPE[0]


@pytest.mark.parametrize(
    ("full", "half", "bf16"), [(1.0, 0.5, True), (1.0, 0.95, False), (1.0, 3.0, False)]
)
def test_auto_takes_bf16_only_where_it_gains(
    full: float, half: float, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(net: nn.Module, shape: object, label: object, bf16: bool) -> float:
        return half if bf16 else full

    monkeypatch.setattr(runtime, "step_seconds", timed)
    chosen = runtime.decide(RuntimeConfig(Device.CPU), unet(), SHAPE, None)
    assert chosen.bf16 is bf16
    assert f"{half / full:.2f}x" in chosen.reason


@pytest.mark.parametrize("training", [True, False])
def test_timing_leaves_weights_gradients_mode_and_random_numbers_alone(training: bool) -> None:
    net = unet(classes=3).train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    label = torch.zeros(SHAPE[0], dtype=torch.int64)
    chosen = runtime.decide(RuntimeConfig(Device.CPU), net, SHAPE, label)
    assert chosen.reason.startswith("bf16 steps take")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in net.parameters())
    assert net.training is training
    assert torch.equal(torch.get_rng_state(), generator)


def test_timing_takes_the_best_of_its_repeats_after_a_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter([0.0, 0.1, 1.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(ticks))
    assert runtime.step_seconds(unet(), SHAPE, None, bf16=False) == pytest.approx(2.0)

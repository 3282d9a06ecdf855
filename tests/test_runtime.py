"""Where the arithmetic runs: devices, precision, and what deciding leaves alone."""

# pyright: basic

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from undiffuse import kernels, runtime
from undiffuse.config import Device, Precision, RuntimeConfig
from undiffuse.cost import recomputable
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import ConfigError
from undiffuse.noise import Karras, NoiseLevel
from undiffuse.recipes import ddpm_family
from undiffuse.runtime import Path
from undiffuse.unet import UNet

CPU = torch.device("cpu")
SHAPE = (2, 3, 8, 8)
needs_kernels = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))


def unet(classes: int = 0, dropout: float = 0.0) -> UNet:
    spec = ddpm_family(8, (1, 2), 1, (1,))
    spec = replace(spec, style=replace(spec.style, dropout=dropout))
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


# --- paths --------------------------------------------------------------------------------------

HALF = [Path.BF16, pytest.param(Path.KERNELS, marks=needs_kernels)]


def test_the_plain_path_is_the_bare_network() -> None:
    net, (x, timestep) = unet(), inputs()
    with torch.no_grad():
        wanted = net(x, timestep, None)
        got = runtime.callable_net(runtime.move(net, CPU))(x, timestep, None)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)


def test_the_plain_path_leaves_float64_alone() -> None:
    net, (x, timestep) = unet().double(), inputs(torch.float64)
    got = runtime.callable_net(net)(x, timestep, None)
    assert got.dtype == torch.float64
    assert torch.allclose(got, net(x, timestep, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", HALF)
def test_bf16_is_close_and_finite_but_not_equal(path: Path) -> None:
    """bfloat16 has 8 bits of mantissa: relative errors of about 2^-8 per operation."""
    net, (x, timestep) = runtime.move(unet(), CPU), inputs()
    with torch.no_grad():
        full = runtime.callable_net(net)(x, timestep, None)
        half = runtime.callable_net(net, path)(x, timestep, None)
    assert half.isfinite().all()
    error = float((half - full).norm() / full.norm())
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("path", HALF)
def test_bf16_stays_inside_the_network(path: Path) -> None:
    """Weights, gradients, loss and estimate are float32."""
    net, (x0, _) = unet(), inputs()
    run = runtime.callable_net(net, path)
    denoiser = Denoiser(run, Karras(), KarrasPrecond())
    level = NoiseLevel(*(v.reshape(-1, 1, 1, 1).float() for v in Karras()(torch.rand(2))))
    loss = denoiser.loss(x0, torch.randn(SHAPE), level)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert denoiser(x0, level).dtype == torch.float32
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("path", HALF)
def test_the_timestep_is_not_rounded(path: Path) -> None:
    """bfloat16 holds whole numbers exactly up to 256 only: 999 and 997 would be one level."""
    embedding, timestep = unet().embedding, torch.tensor([999.0, 997.0])
    with torch.no_grad():
        got = runtime.layers_on(path)(embedding, timestep, None, torch.float32)
        wanted = embedding(timestep, None, torch.float32)
    assert float((wanted[0] - wanted[1]).norm() / wanted.norm()) > 0.05
    assert float((got - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("path", HALF)
def test_bf16_gradients_point_where_float32_gradients_point(path: Path) -> None:
    grads = []
    for one in (Path.PLAIN, path):
        net, (x, timestep) = unet(), inputs()
        runtime.callable_net(net, one)(x, timestep, None).square().mean().backward()
        parts = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        grads.append(torch.cat(parts))
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0)
    assert float(cosine) > 0.99


@pytest.mark.parametrize("path", [Path.PLAIN, *HALF])
def test_weights_that_change_between_calls_count(path: Path) -> None:
    net, (x, timestep) = unet(), inputs()
    run = runtime.callable_net(net, path)
    with torch.no_grad():
        run(x, timestep, None)
        for p in net.parameters():
            p.mul_(0.5)
        got, wanted = run(x, timestep, None), net(x, timestep)
    assert float((got - wanted).norm() / wanted.norm()) < 0.05


COMPILED = """
import torch
from undiffuse import runtime
from undiffuse.spec import Conv, Out, Res, Style, UNetSpec
from undiffuse.unet import UNet

torch.manual_seed(0)
net = UNet(UNetSpec(3, 3, (Conv(8), Res(8), Out()), Style()))
for p in net.parameters():
    torch.nn.init.normal_(p, 0, 0.1)
x, timestep = torch.randn(2, 3, 8, 8), torch.tensor([-1.0, 0.5])
outputs, grads = [], []
for path in (runtime.Path.BF16, runtime.Path.COMPILED):
    run = runtime.callable_net(net, path)
    with torch.no_grad():
        outputs.append(run(x, timestep, None))
    net.zero_grad()
    run(x, timestep, None).square().mean().backward()
    grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
for one, other in (outputs, grads):
    print(float((one - other).norm() / one.norm()))
"""


@pytest.mark.slow
def test_the_compiled_path_is_the_bf16_path_with_its_gradients() -> None:
    """In a process of its own: the compiler cannot read through the tests' type checks."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True, check=True
    )
    output, gradient = map(float, done.stdout.split())
    assert output < 0.02
    assert gradient < 0.05


# --- activations computed again -----------------------------------------------------------------


def backward(path: Path, recompute: list[str]) -> tuple[int, dict[str, Tensor]]:
    """Bytes kept for the backward pass, and the gradients."""
    net, (x, timestep) = runtime.move(unet(), CPU).train(), inputs()
    own, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = runtime.callable_net(net, path, recompute)(x, timestep, None)
    y.square().mean().backward()
    return sum(kept.values()), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("path", [Path.PLAIN, *HALF])
def test_recomputing_saves_memory_and_changes_no_bit(path: Path) -> None:
    names = recomputable(unet().spec, *SHAPE[2:])
    kept, wanted = backward(path, [])
    less, got = backward(path, names)
    some, _ = backward(path, names[:3])
    assert less < some < kept
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


def test_recomputing_repeats_the_same_dropout() -> None:
    grads = []
    for again in (False, True):
        net, (x, timestep) = unet(dropout=0.5).train(), inputs()
        names = recomputable(net.spec, *SHAPE[2:]) if again else []
        torch.manual_seed(0)
        runtime.callable_net(net, Path.PLAIN, names)(x, timestep, None).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert torch.equal(*grads)


# --- deciding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [Precision.NO, Precision.BF16])
def test_a_named_precision_is_taken_without_timing(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def timed(net: object, shape: object, label: object, path: Path, recompute: object) -> float:
        asked.append(path)
        return 1.0

    monkeypatch.setattr(runtime, "step_seconds", timed)
    chosen = runtime.decide(RuntimeConfig(Device.CPU, precision), unet(), SHAPE, None)
    assert chosen.precision is precision
    assert chosen.reason.startswith("as asked")
    assert chosen.device == CPU
    assert asked == [chosen.path]  # only to say how long a run will take
    assert chosen.seconds == 1.0 / SHAPE[0]


@pytest.mark.parametrize(
    ("full", "half", "bf16"), [(1.0, 0.5, True), (1.0, 0.95, False), (1.0, 3.0, False)]
)
def test_auto_takes_bf16_only_where_it_gains(
    full: float, half: float, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(net: object, shape: object, label: object, path: Path, recompute: object) -> float:
        return full if path is Path.PLAIN else half

    monkeypatch.setattr(runtime, "step_seconds", timed)
    chosen = runtime.decide(RuntimeConfig(Device.CPU), unet(), SHAPE, None)
    assert chosen.bf16 is bf16
    assert f"{half / full:.2f}x" in chosen.reason


def test_without_kernels_the_reason_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "why_not", lambda: "no C++ compiler")
    path, reason = runtime.half_path(CPU)
    assert path is Path.BF16
    assert "no C++ compiler" in reason
    assert runtime.half_path(CPU, compiled=True)[0] is Path.COMPILED


@pytest.mark.parametrize(
    ("base", "able", "path"),
    [(8, True, Path.PLAIN), (64, False, Path.PLAIN), (64, True, None)],
)
def test_generating_takes_bf16_for_wide_networks_on_able_processors(
    base: int, able: bool, path: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "fast_bf16", lambda: able)
    net = UNet(ddpm_family(base, (1,), 1, ()))
    chosen = runtime.choose(net)
    assert chosen.path is (path or runtime.half_path(CPU)[0])
    assert runtime.choose(net, Precision.NO).path is Path.PLAIN
    assert runtime.choose(net, Precision.BF16).path is runtime.half_path(CPU)[0]
    assert runtime.choose(net) == chosen  # nothing is timed


@pytest.mark.parametrize("training", [True, False])
def test_timing_leaves_weights_gradients_mode_and_random_numbers_alone(training: bool) -> None:
    net = unet(classes=3).train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    label = torch.zeros(SHAPE[0], dtype=torch.int64)
    chosen = runtime.decide(RuntimeConfig(Device.CPU), net, SHAPE, label)
    assert "steps take" in chosen.reason
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in net.parameters())
    assert net.training is training
    assert torch.equal(torch.get_rng_state(), generator)


def test_timing_takes_the_best_of_its_repeats_after_a_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ticking(*steps: float) -> list[float]:
        return [tick for step in steps for tick in (0.0, step)]

    def measured(*steps: float) -> float:
        ticks = iter(ticking(*steps))
        monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(ticks))
        return runtime.step_seconds(unet(), SHAPE, None, Path.PLAIN)

    assert measured(0.1, 4.0, 2.0) == 2.0  # slow steps: two are enough
    assert measured(0.01, 0.25, 0.2, 0.1) == 0.1  # half a second of them
    assert measured(0.01, *(0.003,) * 7, 0.002) == 0.002  # eight quick ones

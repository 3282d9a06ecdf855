"""How a network is computed: device, precision, layout, kernels. The one place that decides.

`unet` is the plain path. Every other path computes the same function of the same float32
parameters, gradients included, up to rounding:

- `bf16`: every operation on bfloat16 copies of the weights, without autocast's casts;
- `kernels`: hand-written kernels for processors, bfloat16 features (`undiffuse.fast`);
- `compiled`: `bf16` through torch.compile.

Weights, preconditioning, loss and averages stay float32 on every path.
"""

import copy
import ctypes
import math
import os
import platform
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from undiffuse import kernels
from undiffuse.config import Device, Precision, RuntimeConfig
from undiffuse.errors import ConfigError
from undiffuse.fast import Fast
from undiffuse.spec import trace
from undiffuse.unet import TimestepEmbedding, UNet, call

Net = Callable[..., Tensor]  # (x, timestep, label[, augment]), as `Denoiser` calls it
Run = Callable[..., Tensor]  # run(layer, *inputs), as `UNet.forward` takes it

# So much faster must another path be before `auto` takes it in training: below, the same numbers
# on every machine are worth more. Far from what is usual (1.5 to 3), so that chance decides rarely.
MIN_GAIN = 1.25


class Path(StrEnum):
    """A way to compute the network."""

    PLAIN = "plain"
    BF16 = "bf16"
    KERNELS = "kernels"
    COMPILED = "compiled"


@dataclass(frozen=True)
class Runtime:
    """A decision: where and how to compute, with the reason in words."""

    device: torch.device
    path: Path
    reason: str
    seconds: float = math.nan  # that one picture takes, forward and backward, where it was timed

    @property
    def bf16(self) -> bool:
        return self.path is not Path.PLAIN

    @property
    def precision(self) -> Precision:
        return Precision.BF16 if self.bf16 else Precision.NO


def memory(device: torch.device) -> int | None:
    """Bytes of memory that computing on `device` can use; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return None


def choose_device(device: Device) -> torch.device:
    """The named device, or the best there is.

    Raises:
        ConfigError: the named device is not there.
    """
    present = {
        Device.CUDA: torch.cuda.is_available(),
        Device.MPS: torch.backends.mps.is_available(),
        Device.CPU: True,
    }
    if device is Device.AUTO:
        return torch.device(next(name for name, there in present.items() if there).value)
    if not present[device]:
        have = ", ".join(name.value for name, there in present.items() if there)
        raise ConfigError(f"device {device.value} is not available here; there is: {have}")
    return torch.device(device.value)


def move(net: nn.Module, device: torch.device) -> nn.Module:
    """Put a network on its device, with channels last: convolutions are faster there."""
    return net.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportUnknownVariableType] # overload lacks memory_format


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the whole process; False where it cannot be told.

    Features come and go by the megabyte. glibc takes such memory from the system and gives it back
    each time, and the system clears every page again: a sixth of a step on a processor.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older versions refuse a threshold above 32 MB. Without any, the other two would make it worse.
    if not any(mallopt(M_MMAP_THRESHOLD, size) for size in (2**30, 2**25)):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_TOP_PAD, 2**26))


# malloc.h: how much free memory is kept at the top, how much is taken at a time, and from what size
# on a piece comes from the system by itself. Values are C ints.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


# --- the paths ----------------------------------------------------------------------------------


def callable_net(net: UNet, path: Path = Path.PLAIN, recompute: Collection[str] = ()) -> Net:
    """The network as `Denoiser` calls it, on one of the paths.

    With gradients switched on they reach the float32 parameters of `net`; without, rounded weights
    are kept until a parameter changes (not through `.data`, which torch does not count). Forward
    hooks run on the plain path alone: the others do not call the layers. On a processor this also
    tells the C library, once and for the whole process, to keep freed memory.

    Args:
        recompute: names of layers that keep only their input for the backward pass and compute
            the rest again (Chen et al. 2016, 1604.06174): less memory, up to a third more work.
    """
    if next(net.parameters()).device.type == "cpu":
        keep_freed_memory()
    run = _recomputing(layers_on(path), [net.layers[name] for name in recompute])

    def compute(
        x: Tensor, timestep: Tensor, label: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return net(x, timestep, label, run, augment).to(x.dtype)

    return _compiled(net, compute) if path is Path.COMPILED else compute


def _compiled(net: UNet, training: Net) -> Net:
    """`training` through torch.compile, and without gradients a rounded copy of the network.

    What the compiler made is kept in the user's cache and found again by the next process.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels.cache_folder() / "torch"))
    rounded, training = _Rounded(), torch.compile(training, dynamic=False)
    # On a GPU the launches of one evaluation become one graph, whose output lives until the next
    # replay: hence the copy below.
    on_gpu = next(net.parameters()).device.type == "cuda"
    mode = "reduce-overhead" if on_gpu else "default"
    generating = torch.compile(rounded.copy_of(net), dynamic=False, mode=mode)

    def compute(
        x: Tensor, timestep: Tensor, label: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        if torch.is_grad_enabled():
            return training(x, timestep, label, augment)
        rounded.copy_of(net)  # the same copy, with the weights of now
        half = x.bfloat16().contiguous(memory_format=torch.channels_last)
        return generating(half, timestep, label, call, augment).to(x.dtype, copy=True)

    return compute


def layers_on(path: Path) -> Run:
    """How one network's layers are run on a path; it keeps that network's rounded weights."""
    match path:
        case Path.PLAIN:
            return call
        case Path.BF16 | Path.COMPILED:
            return _Rounded()
        case Path.KERNELS:
            return Fast(winograd=winograd_pays())


def _recomputing(run: Run, layers: list[nn.Module]) -> Run:
    """`run`, but keeping only the inputs of `layers`."""
    if not layers:
        return run
    chosen = {id(layer) for layer in layers}

    def frugal(layer: nn.Module, *inputs: Any) -> Tensor:
        if id(layer) not in chosen or not torch.is_grad_enabled():
            return run(layer, *inputs)
        return checkpoint(run, layer, *inputs, use_reentrant=False)

    return frugal


class _Rounded:
    """Runs a layer in bfloat16 throughout, on rounded copies of its weights.

    Autocast decides anew at every operation and carries features to float32 and back around norms.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[nn.Module, tuple[int, ...], nn.Module]] = {}

    def __call__(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if isinstance(layer, TimestepEmbedding):  # timestep 999 has no exact bfloat16
            timestep, label, _, *augment = inputs
            inputs = timestep, label, torch.bfloat16, *augment
        else:
            inputs = tuple(map(_rounded, inputs))
        if not torch.is_grad_enabled():
            return self.copy_of(layer)(*inputs)
        weights = {name: p.bfloat16() for name, p in layer.named_parameters()}
        return torch.func.functional_call(layer, weights, inputs)

    def copy_of(self, layer: nn.Module) -> nn.Module:
        """One bfloat16 copy of a layer for good, brought up to date when a weight has changed."""
        now = tuple(n for p in layer.parameters() for n in (_changes(p), p.data_ptr()))
        of, then, kept = self._kept.get(id(layer), (None, None, None))
        with torch.inference_mode(False), torch.no_grad():
            if kept is None or of is not layer:
                kept = copy.deepcopy(layer).requires_grad_(False).bfloat16()
            elif then != now:
                for mine, theirs in zip(kept.parameters(), layer.parameters(), strict=True):
                    mine.copy_(theirs.detach())
        self._kept[id(layer)] = layer, now, kept.train(layer.training)
        return kept


def _changes(parameter: Tensor) -> int:
    """How often torch has seen it change; it does not count what inference mode has made."""
    return 0 if parameter.is_inference() else parameter._version


def _rounded(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.bfloat16() if floating else value


def updates_by_kernels(device: torch.device) -> bool:
    """Whether `TrainState` may take `undiffuse.kernels` for an update in one pass."""
    return device.type == "cpu" and kernels.why_not() is None


# --- deciding -----------------------------------------------------------------------------------


def half_path(device: torch.device, compiled: bool = False) -> tuple[Path, str]:
    """The fastest bfloat16 path there is on `device`, and why not a faster one."""
    if compiled:
        return Path.COMPILED, "torch.compile as asked"
    if device.type != "cpu":
        return Path.BF16, f"bfloat16 on {device.type}"
    missing = kernels.why_not()
    if missing is None:
        return Path.KERNELS, kernels.describe()
    return Path.BF16, f"no kernels: {missing}"


def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def winograd_pays() -> bool:
    """Whether transforms cost less than the products they save.

    They do on vector units. A matrix unit (AMX) multiplies ten times faster, but adds no faster.
    """
    return not torch.cpu.get_capabilities().get("amx_bf16", False)


def choose(
    net: UNet, mixed_precision: Precision = Precision.AUTO, torch_compile: bool = False
) -> Runtime:
    """Settle the path for generating, without timing anything: a function of network and machine.

    bfloat16 where asked for; by default where the processor is fast at it and the network wide
    enough for it to matter.
    """
    device = next(net.parameters()).device
    half, reason = half_path(device, torch_compile)
    plainly = ", so not compiled" if torch_compile else ""
    match mixed_precision:
        case Precision.NO:
            return Runtime(device, Path.PLAIN, f"float32 as asked{plainly}")
        case Precision.BF16:
            return Runtime(device, half, f"as asked; {reason}")
        case Precision.AUTO:
            pass
    if width_of(net) < WIDE:
        return Runtime(device, Path.PLAIN, f"narrower than {WIDE} channels{plainly}")
    if not has_bf16(device):
        return Runtime(device, Path.PLAIN, f"{device.type} is not fast in bfloat16{plainly}")
    return Runtime(device, half, reason)


WIDE = 64  # channels of the first features; narrower networks are bound by overhead, not products


def width_of(net: UNet) -> int:
    """Channels of the network's first features."""
    return next(iter(trace(net.spec))).out_width


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32."""
    match device.type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            return fast_bf16()
        case _:
            return False


def decide(
    config: RuntimeConfig,
    net: UNet,
    shape: tuple[int, int, int, int],
    label: Tensor | None,
    recompute: Collection[str] = (),
) -> Runtime:
    """Settle device and path for training; `auto` times a training step of this network on `shape`.

    `net` must already be on its device. Its weights are not changed.
    """
    device = next(net.parameters()).device
    fixed = _fixed(config, device)
    if fixed is not None:
        path, reason = fixed
        seconds = step_seconds(net, shape, label, path, recompute)
        return Runtime(device, path, reason, seconds / shape[0])
    half_way, why = half_path(device, config.torch_compile)
    full, half = (
        step_seconds(net, shape, label, path, recompute) for path in (Path.PLAIN, half_way)
    )
    path = half_way if full / half >= MIN_GAIN else Path.PLAIN
    reason = f"{half_way} steps take {half / full:.2f}x the time of plain float32 ({why})"
    return Runtime(device, path, reason, min(half, full) / shape[0])


def _fixed(config: RuntimeConfig, device: torch.device) -> tuple[Path, str] | None:
    """The path and its reason, where nothing needs to be timed."""
    if config.mixed_precision is Precision.NO:
        return Path.PLAIN, f"as asked{', so not compiled' if config.torch_compile else ''}"
    if device.type == "cuda" and not has_bf16(device):
        return Path.PLAIN, "this GPU has no bf16"
    if config.mixed_precision is Precision.BF16:
        path, why = half_path(device, config.torch_compile)
        return path, f"as asked; {why}"
    return (Path.PLAIN, "float32 on mps") if device.type == "mps" else None


def step_seconds(
    net: UNet,
    shape: tuple[int, int, int, int],
    label: Tensor | None,
    path: Path,
    recompute: Collection[str] = (),
    enough: float = 0.5,
) -> float:
    """Seconds of one forward and backward pass: after a warm-up the best of two, or of up to eight
    where `enough` seconds hold them, since other work on the machine only ever slows one down."""
    device = next(net.parameters()).device
    run, x = callable_net(net, path, recompute), torch.zeros(shape, device=device)
    label = None if label is None else label.to(device)
    timestep = torch.zeros(shape[0], device=device)
    told = net.spec.augment
    augment = torch.zeros(shape[0], told, device=device) if told else None
    with torch.random.fork_rng(devices=[]):  # dropout draws
        once = partial(_timed, run, net, x, timestep, label, augment)
        once()
        times = [once(), once()]
        while sum(times) < enough and len(times) < 8:
            times.append(once())
    return min(times)


def _timed(run: Net, net: nn.Module, x: Tensor, *told: Tensor | None) -> float:
    begin = time.perf_counter()
    run(x, *told).float().square().mean().backward()
    _wait_for(x.device)
    seconds = time.perf_counter() - begin
    net.zero_grad(set_to_none=True)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()

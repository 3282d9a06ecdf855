"""Device, precision and memory format: the only module that decides what arithmetic runs on.

Weights, preconditioning and loss stay float32. bfloat16 exists only inside the network, and only
where it is measured to be faster: on some processors it is many times faster for wide networks
and useless for narrow ones.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from undiffuse.config import Device, Precision, RuntimeConfig
from undiffuse.errors import ConfigError

Net = Callable[[Tensor, Tensor, Tensor | None], Tensor]

MIN_GAIN = 1.1  # bf16 must be this much faster than float32 before `auto` takes it


@dataclass(frozen=True)
class Runtime:
    """A decision: where to compute and how precisely, with the reason in words."""

    device: torch.device
    bf16: bool
    reason: str
    seconds: float  # that one picture takes, forward and backward

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


def callable_net(net: nn.Module, bf16: bool) -> Net:
    """The network as `Denoiser` calls it: inputs made channels last, bfloat16 inside if wanted."""
    if not bf16:
        return lambda x, timestep, label: net(_channels_last(x), timestep, label)

    def run(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return net(_channels_last(x), timestep, label)

    return run


def decide(
    config: RuntimeConfig, net: nn.Module, shape: tuple[int, int, int, int], label: Tensor | None
) -> Runtime:
    """Settle device and precision; `auto` times a training step of this network on `shape`.

    `net` must already be on its device. Its weights are not changed.
    """
    device = next(net.parameters()).device
    fixed = _fixed_precision(config, device)
    if fixed is not None:
        bf16, reason = fixed
        return Runtime(device, bf16, reason, step_seconds(net, shape, label, bf16) / shape[0])
    full, half = (step_seconds(net, shape, label, bf16) for bf16 in (False, True))
    reason = f"bf16 steps take {half / full:.2f}x the time of float32"
    bf16 = full / half >= MIN_GAIN
    return Runtime(device, bf16, reason, (half if bf16 else full) / shape[0])


def _fixed_precision(config: RuntimeConfig, device: torch.device) -> tuple[bool, str] | None:
    """The precision and its reason, where nothing needs to be timed."""
    if config.mixed_precision is Precision.NO:
        return False, "as asked"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False, "this GPU has no bf16"
    if config.mixed_precision is Precision.BF16:
        return True, "as asked"
    return (False, "float32 on mps") if device.type == "mps" else None


def step_seconds(
    net: nn.Module,
    shape: tuple[int, int, int, int],
    label: Tensor | None,
    bf16: bool,
    repeats: int = 2,
) -> float:
    """Seconds of one forward and backward pass: the best of `repeats`, after a warm-up."""
    device = next(net.parameters()).device
    run, x = callable_net(net, bf16), torch.zeros(shape, device=device)
    label = None if label is None else label.to(device)
    timestep = torch.zeros(shape[0], device=device)
    times = [_timed(run, net, x, timestep, label) for _ in range(repeats + 1)]
    return min(times[1:])


def _timed(run: Net, net: nn.Module, x: Tensor, timestep: Tensor, label: Tensor | None) -> float:
    begin = time.perf_counter()
    run(x, timestep, label).float().square().mean().backward()
    _wait_for(x.device)
    seconds = time.perf_counter() - begin
    net.zero_grad(set_to_none=True)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)

"""A denoiser of ours in place of diffusers' network, in its pipelines and under its schedulers.

Each scheduler asks its network the same question in its own words: it gives a scaled picture and a
number, and takes the answer for noise, velocity or the clean picture. What the words mean is a
`_Process`: the level that belongs to a timestep, and a prediction type as everywhere in this
package. The adapter turns the question into x and a level, asks the denoiser, and solves for the
answer that means its estimate.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

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
from undiffuse.guidance import Labelled
from undiffuse.noise import NoiseLevel, Schedule

Pictures = Float[Tensor, "b c h w"]


@runtime_checkable
class DiffusersScheduler(Protocol):
    """What every scheduler of diffusers has."""

    @property
    def config(self) -> Mapping[str, object]: ...


@dataclass(frozen=True)
class NetworkConfig:
    """The fields of a network's configuration that pipelines read."""

    sample_size: tuple[int, int]
    in_channels: int
    out_channels: int


@dataclass(frozen=True)
class NetworkOutput:
    """The answer, in the words of the scheduler."""

    sample: Tensor


def for_diffusers(
    denoise: Labelled,
    scheduler: DiffusersScheduler,
    *,
    channels: int,
    size: tuple[int, int],
    label: int | None = None,
    schedule: Schedule | None = None,
) -> "DiffusersUNet":
    """A denoiser as the `unet` of a pipeline, whatever its own schedule and prediction are.

    Supported are DDPM, DDIM and PNDM; DPM-Solver (multistep and singlestep), UniPC and DEIS; Euler,
    Euler ancestral, Heun and LMS; EDM's Euler and DPM-Solver; FlowMatchEuler. Where a scheduler's
    level lies outside the denoiser's own schedule, its nearest level is used.

    Args:
        denoise: a `Denoiser`, an oracle, or a guided function of them: (x, level, label) -> x0.
        scheduler: the one that will be stepped; `set_timesteps` may be called before or after.
        channels: of the pictures.
        size: height and width of the pictures that a pipeline starts with.
        label: of every picture, for pipelines that pass none; None is "no class".
        schedule: whose levels `denoise` knows. Default: that of a `Denoiser`; of all else, every
            level, but no t: a guided function of a `Denoiser` needs the schedule.

    Raises:
        ConfigError: the scheduler is of another family, or an option of it is not supported.
    """
    if schedule is None and isinstance(denoise, Denoiser):
        schedule = denoise.schedule
    config = NetworkConfig(size, channels, channels)
    return DiffusersUNet(denoise, _process(scheduler), config, schedule, label)


class DiffusersUNet(nn.Module):
    """Stands where diffusers expects a `UNet2DModel`; made by `for_diffusers`.

    `.to(...)` moves the denoiser's network too. It cannot be saved by diffusers.
    """

    anchor: Tensor

    def __init__(
        self,
        denoise: Labelled,
        process: "_Process",
        config: NetworkConfig,
        schedule: Schedule | None,
        label: int | None,
    ) -> None:
        super().__init__()
        net = denoise.net if isinstance(denoise, Denoiser) else denoise
        self.net = net if isinstance(net, nn.Module) else None
        self.denoise, self.process, self.schedule, self.label = denoise, process, schedule, label
        self.config = config
        like = next(self.parameters(), torch.empty(0))
        self.register_buffer("anchor", like.new_empty(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the pictures that a pipeline starts with."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def forward(
        self,
        sample: Pictures,
        timestep: Tensor | float,
        class_labels: Int[Tensor, "b"] | None = None,
        return_dict: bool = True,
    ) -> NetworkOutput | tuple[Tensor]:
        """The answer of the scheduler's prediction type.

        Args:
            sample: x as the scheduler scales its model input.
            timestep: one of the scheduler's, for all pictures or one each.
            class_labels: instead of the label of `for_diffusers`.

        Raises:
            ConfigError: the timestep is none of the scheduler's.
        """
        theirs = _shared_or_each(self.process.level(_numbers(timestep)), sample)
        k = self.process.prediction(theirs)
        x = sample / k.c_in
        ours = _known(self.schedule, theirs)
        x0 = self.denoise(x * (_length(ours) / _length(theirs)), ours, self._label(class_labels, x))
        answer = (x0 - k.c_skip * x) / k.c_out
        return NetworkOutput(answer) if return_dict else (answer,)

    def _label(self, given: Tensor | None, x: Tensor) -> Tensor | None:
        if given is not None or self.label is None:
            return given
        return torch.full((len(x),), self.label, device=x.device)


def _numbers(timestep: Tensor | float) -> Float[Tensor, "m"]:
    """One number, or one per picture; float64 on the CPU."""
    return torch.as_tensor(timestep).detach().to("cpu", torch.float64).reshape(-1)


def _shared_or_each(level: NoiseLevel, x: Tensor) -> NoiseLevel:
    """0-d where all pictures have the same level."""
    if bool((level.t == level.t[0]).all()):
        return NoiseLevel(*(value[0] for value in level))
    return level.like(x)


def _known(schedule: Schedule | None, level: NoiseLevel) -> NoiseLevel:
    """The level of the same ratio on a schedule. Without one nobody knows what t would be."""
    if schedule is None:
        return level._replace(t=torch.full_like(level.t, math.nan))
    found = schedule.at(level.ratio)
    return NoiseLevel(*(value.to(level.t) for value in found))


def _length(level: NoiseLevel) -> Tensor:
    """What x is scaled by. Beyond the ends of a schedule, where ratios differ, this keeps the
    noise of pure noise and the picture in a clean picture."""
    return torch.sqrt(level.alpha**2 + level.sigma**2)


# --- the families -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    """What a scheduler's timestep, input and output mean.

    Args:
        level: timesteps (m) -> levels (m), float64 on the CPU, with the timestep as t.
    """

    level: Callable[[Tensor], NoiseLevel]
    prediction: Prediction


_TABLE = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler"),
    "PNDMScheduler",
)
_SIGMAS = (
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "LMSDiscreteScheduler"),
)
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler",)

_PREDICTIONS: Mapping[object, Prediction] = {
    "epsilon": Epsilon(),
    "sample": Sample(),
    "v_prediction": Velocity(),
}


@runtime_checkable
class _WithTable(Protocol):
    alphas_cumprod: Tensor


@runtime_checkable
class _WithSigmas(Protocol):
    timesteps: Tensor
    sigmas: Tensor
    step_index: int | None


def _process(scheduler: DiffusersScheduler) -> _Process:
    kind = type(scheduler).__name__
    if kind in _TABLE:
        table = cast(_WithTable, scheduler)
        return _Process(lambda t: _preserving(t, _ratio_in(table, t)), _named(scheduler))
    steps = cast(_WithSigmas, scheduler)
    if kind in _SIGMAS:
        _refuse(scheduler, "use_flow_sigmas")
        return _Process(lambda t: _preserving(t, _sigma_in(steps, t)), _named(scheduler))
    if kind in _EDM:
        data = cast(float, scheduler.config["sigma_data"])
        if scheduler.config["prediction_type"] != "epsilon":
            raise _unsupported(scheduler, "prediction_type")
        return _Process(lambda t: _exploding(t, _sigma_in(steps, t)), KarrasPrecond(data))
    if kind in _FLOW:
        _refuse(scheduler, "invert_sigmas")
        return _Process(lambda t: _straight(t, _sigma_in(steps, t)), FlowVelocity())
    known = ", ".join((*_TABLE, *_SIGMAS, *_EDM, *_FLOW))
    raise ConfigError(f"scheduler {kind} is not supported; use one of {known}")


def _named(scheduler: DiffusersScheduler) -> Prediction:
    prediction = _PREDICTIONS.get(scheduler.config["prediction_type"])
    if prediction is None:
        raise _unsupported(scheduler, "prediction_type")
    return prediction


def _refuse(scheduler: DiffusersScheduler, option: str) -> None:
    if scheduler.config.get(option):
        raise _unsupported(scheduler, option)


def _unsupported(scheduler: DiffusersScheduler, option: str) -> ConfigError:
    value = scheduler.config[option]
    return ConfigError(f"scheduler {type(scheduler).__name__}: {option}={value!r} is not supported")


def _preserving(t: Tensor, ratio: Tensor) -> NoiseLevel:
    """alpha^2 + sigma^2 = 1. Those that keep x / alpha scale it back before they ask."""
    alpha = (1 + ratio**2).rsqrt()
    sigma = torch.where(ratio.isinf(), torch.ones_like(ratio), ratio * alpha)
    return NoiseLevel(alpha, sigma, t)


def _exploding(t: Tensor, sigma: Tensor) -> NoiseLevel:
    return NoiseLevel(torch.ones_like(sigma), sigma, t)


def _straight(t: Tensor, sigma: Tensor) -> NoiseLevel:
    return NoiseLevel(1 - sigma, sigma, t)


def _ratio_in(scheduler: _WithTable, t: Tensor) -> Tensor:
    """sigma / alpha at whole timesteps."""
    table = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
    inside = (t >= 0) & (t < len(table)) & (t == t.round())
    if not bool(inside.all()):
        raise ConfigError(
            f"timestep must be a whole number in 0…{len(table) - 1}; got {t.tolist()[:8]}"
        )
    alpha_bar = table[t.long()]
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def _sigma_in(scheduler: _WithSigmas, t: Tensor) -> Tensor:
    """The sigma of the step that a timestep stands for: in the scheduler's own list, for between
    its timesteps, and under other spacings, schedulers differ in how they interpolate."""
    timesteps = scheduler.timesteps.detach().to("cpu", torch.float64)
    sigmas = scheduler.sigmas.detach().to("cpu", torch.float64)
    return torch.stack([_sigma_at(scheduler, timesteps, sigmas, float(one)) for one in t])


def _sigma_at(scheduler: _WithSigmas, timesteps: Tensor, sigmas: Tensor, t: float) -> Tensor:
    places = (timesteps == t).nonzero().flatten()
    if not len(places):
        raise ConfigError(
            f"timestep {t:g} is none of the scheduler's; pass one of scheduler.timesteps"
        )
    found = sigmas[places]
    if bool((found == found[0]).all()):
        return found[0]
    if scheduler.step_index in places.tolist():  # rounded timesteps that fell together
        return sigmas[cast(int, scheduler.step_index)]
    raise ConfigError(
        f"timestep {t:g} stands for {len(found)} noise levels of the scheduler; use fewer steps or"
        " another spacing"
    )

"""What the network's output means, and the one loss that follows from it.

A prediction type is four numbers per noise level (2206.00364, eq. 7):

    D(x, level) = c_skip * x + c_out * net(c_in * x, c_noise)

D estimates the clean picture. Solving for the output that would make D exact gives the target
(x0 - c_skip * x) / c_out: this is the noise for `Epsilon`, the velocity for `Velocity`, and so on,
so one loss line serves every paper. Every type works with every schedule at which it is finite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.noise import NoiseLevel, Schedule

Pictures = Float[Tensor, "b c h w"]
# (x, timestep, label) -> output; with a fourth argument by name, `augment`, in training on
# augmented pictures alone
Net = Callable[..., Tensor]
Weighting = Callable[[NoiseLevel], Tensor]  # factor on the loss, shape of the level


class Preconditioning(NamedTuple):
    """The four numbers, each in the shape of the level."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@runtime_checkable
class Prediction(Protocol):
    """level -> the four numbers."""

    def __call__(self, level: NoiseLevel) -> Preconditioning: ...


def _norm(level: NoiseLevel) -> Tensor:
    """r = sqrt(alpha^2 + sigma^2); 1 for variance-preserving schedules."""
    return torch.sqrt(level.alpha**2 + level.sigma**2)


@dataclass(frozen=True)
class Epsilon:
    """The network predicts the noise (DDPM, 2006.11239)."""

    steps: int = 1000  # the network is told (steps - 1) * t ...
    timestep_scale: float = 1.0  # ... times this: improved-diffusion tells 1000 / steps per step

    def __call__(self, level: NoiseLevel) -> Preconditioning:
        return Preconditioning(
            c_skip=1 / level.alpha,
            c_out=-level.sigma / level.alpha,
            c_in=1 / _norm(level),
            c_noise=(self.steps - 1) * level.t * self.timestep_scale,
        )


@dataclass(frozen=True)
class Sample:
    """The network predicts the clean picture."""

    steps: int = 1000
    timestep_scale: float = 1.0

    def __call__(self, level: NoiseLevel) -> Preconditioning:
        return Preconditioning(
            c_skip=torch.zeros_like(level.alpha),
            c_out=torch.ones_like(level.alpha),
            c_in=1 / _norm(level),
            c_noise=(self.steps - 1) * level.t * self.timestep_scale,
        )


@dataclass(frozen=True)
class Velocity:
    """The network predicts v = (alpha * noise - sigma * x0) / r (2202.00512, appendix D)."""

    steps: int = 1000

    def __call__(self, level: NoiseLevel) -> Preconditioning:
        r = _norm(level)
        return Preconditioning(
            c_skip=level.alpha / r**2,
            c_out=-level.sigma / r,
            c_in=1 / r,
            c_noise=(self.steps - 1) * level.t,
        )


@dataclass(frozen=True)
class FlowVelocity:
    """The network predicts noise - x0 (flow matching, 2210.02747)."""

    steps: int = 1000

    def __call__(self, level: NoiseLevel) -> Preconditioning:
        total = level.alpha + level.sigma
        return Preconditioning(
            c_skip=1 / total,
            c_out=-level.sigma / total,
            c_in=1 / total,
            c_noise=(self.steps - 1) * level.t,
        )


@dataclass(frozen=True)
class KarrasPrecond:
    """EDM (2206.00364, table 1), extended to alpha != 1: input, output and target have unit
    variance when pictures have standard deviation `sigma_data`."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_data < float("inf"):
            raise ConfigError(f"sigma_data must be above 0; got {self.sigma_data}")

    def __call__(self, level: NoiseLevel) -> Preconditioning:
        s = self.sigma_data
        v = level.alpha**2 * s**2 + level.sigma**2
        return Preconditioning(
            c_skip=level.alpha * s**2 / v,
            c_out=level.sigma * s / v.sqrt(),
            c_in=1 / v.sqrt(),
            c_noise=level.ratio.log() / 4,
        )


@dataclass(frozen=True)
class Denoiser:
    """A network together with what its input and output mean. It has no parameters of its own.

    Raises:
        ConfigError: the prediction is not finite at the schedule's noisiest level.
    """

    net: Net
    schedule: Schedule
    prediction: Prediction

    def __post_init__(self) -> None:
        level = self.schedule(torch.ones((), dtype=torch.float64))
        if not all(bool(value.isfinite()) for value in self.prediction(level)):
            raise ConfigError(
                f"prediction {type(self.prediction).__name__} is not finite with schedule"
                f" {type(self.schedule).__name__}: alpha reaches {float(level.alpha):g} at t = 1;"
                " use Velocity or FlowVelocity"
            )

    def __call__(
        self, x: Pictures, level: NoiseLevel, label: Int[Tensor, "b"] | None = None
    ) -> Pictures:
        """Estimate the clean pictures in x; `level` is 0-d or one per picture (b,1,1,1)."""
        k = self.prediction(level)
        return k.c_skip * x + k.c_out * self._net(x, k, label)

    def loss(
        self,
        x0: Pictures,
        noise: Pictures,
        level: NoiseLevel,
        label: Int[Tensor, "b"] | None = None,
        augment: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b"]:
        """Mean squared error of the raw output, per picture.

        `augment` tells the network how each picture was transformed (2206.00364, appendix F.2);
        estimates by calling the denoiser never do, and so are of pictures as they were.
        """
        x, k = level.mix(x0, noise), self.prediction(level)
        target = (x0 - k.c_skip * x) / k.c_out
        return (self._net(x, k, label, augment) - target).square().flatten(1).mean(1)

    def _net(
        self, x: Pictures, k: Preconditioning, label: Tensor | None, augment: Tensor | None = None
    ) -> Pictures:
        timestep = k.c_noise.to(x.dtype).to(x.device).flatten().expand(x.shape[0])
        told = {} if augment is None else {"augment": augment}
        return self.net(k.c_in * x, timestep, label, **told).to(x.dtype)


# --- weighting of the loss by noise level -------------------------------------------------------


def unweighted(level: NoiseLevel) -> Tensor:
    """Every level counts by the squared error of the raw output."""
    return torch.ones_like(level.alpha)


@dataclass(frozen=True)
class MinSnr:
    """Min-SNR (2303.09556): the x0-loss weight alpha^2/sigma^2 is capped at `gamma`, expressed for
    the raw output of `prediction` by the factor c_out^2."""

    prediction: Prediction
    gamma: float = 5.0

    def __call__(self, level: NoiseLevel) -> Tensor:
        snr = (level.alpha / level.sigma) ** 2
        return snr.clamp(max=self.gamma) * self.prediction(level).c_out ** 2


@dataclass(frozen=True)
class HighNoise:
    """1 + (sigma / alpha / sigma_data)^2, at most `most`: the noisier, the more a level counts.

    With stable targets the loss goes to 0 at high noise and stays where the training set cannot be
    generalised, so that unweighted the latter's gradient drowns the former's. (2312.02696, eq. 21,
    learns a weight per level for such a reason; this one is fixed.)
    """

    sigma_data: float = 0.5
    most: float = 10.0

    def __call__(self, level: NoiseLevel) -> Tensor:
        return (1 + (level.ratio / self.sigma_data) ** 2).clamp(max=self.most)


# --- which levels are trained -------------------------------------------------------------------

LevelSampling = Callable[[Schedule, Tensor], NoiseLevel]  # uniforms (b,) in [0,1) -> levels (b,)


def uniform_t(schedule: Schedule, u: Float[Tensor, "b"]) -> NoiseLevel:
    """Time uniform in [0, 1): the papers' usual choice beside their own schedule."""
    return schedule(u)


@dataclass(frozen=True)
class OnGrid:
    """Time uniform on the grid i / (T - 1), as DDPM's whole-numbered timesteps."""

    steps: int = 1000

    def __call__(self, schedule: Schedule, u: Float[Tensor, "b"]) -> NoiseLevel:
        return schedule((u.double() * self.steps).floor() / (self.steps - 1))


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma / alpha) normal with mean `mean` and deviation `std` (2206.00364, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, schedule: Schedule, u: Float[Tensor, "b"]) -> NoiseLevel:
        tiny = torch.finfo(torch.float64).eps
        normal = torch.special.ndtri(u.double().clamp(tiny, 1 - tiny))
        return schedule.at((self.mean + self.std * normal).exp())


@dataclass(frozen=True)
class LogUniform:
    """ln(sigma / alpha) uniform between the logarithms of two levels, all counted alike."""

    low: float = 0.002
    high: float = 80.0

    def __post_init__(self) -> None:
        if not 0.0 < self.low < self.high < float("inf"):
            raise ConfigError(
                f"LogUniform needs 0 < low < high; got low={self.low}, high={self.high}"
            )

    def __call__(self, schedule: Schedule, u: Float[Tensor, "b"]) -> NoiseLevel:
        return schedule.at(self.low * (self.high / self.low) ** u.double())

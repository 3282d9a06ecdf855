"""Noise levels, schedules, grids of levels, and keyed random numbers.

A noised picture is x = alpha * x0 + sigma * noise. A schedule says what alpha and sigma are at
time t, from 0 (clean) to 1 (noise). The ratio sigma / alpha alone decides how hard a picture is
to denoise; alpha only scales it (2206.00364, section 2; 2107.00630, section 3).

All schedule arithmetic is float64 on the CPU. `NoiseLevel.like` rounds once, to the picture's
precision, and is the only place where levels meet the shape of pictures.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.errors import ConfigError

Pictures = Float[Tensor, "b c h w"]

MIN_SIGMA = 1e-3  # below this c_out of every prediction is too small to divide by in float32


class NoiseLevel(NamedTuple):
    """Signal scale, noise scale and time; 0-d when shared, (b,1,1,1) when one per picture."""

    alpha: Tensor
    sigma: Tensor
    t: Tensor

    @property
    def ratio(self) -> Tensor:
        """sigma / alpha: the noise level of x / alpha."""
        return self.sigma / self.alpha

    def mix(self, x0: Pictures, noise: Pictures) -> Pictures:
        """x = alpha * x0 + sigma * noise."""
        return self.alpha * x0 + self.sigma * noise

    def noise_in(self, x: Pictures, x0: Pictures) -> Pictures:
        """The noise that turns x0 into x: (x - alpha * x0) / sigma."""
        return (x - self.alpha * x0) / self.sigma

    def like(self, x: Pictures) -> "NoiseLevel":
        """One level per picture of x: (b,) values become (b,1,1,1) in x's dtype and device."""
        return NoiseLevel(*(v.to(x.dtype).to(x.device).reshape(-1, 1, 1, 1) for v in self))


@runtime_checkable
class Schedule(Protocol):
    """Maps time to noise level, and back."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        """The level at each t in [0, 1]; float64."""
        ...

    def at(self, ratio: Tensor) -> NoiseLevel:
        """The level whose sigma / alpha is `ratio` (clamped to the schedule's own range)."""
        ...


@dataclass(frozen=True)
class LinearBetas:
    """DDPM (2006.11239): beta grows linearly over `steps` steps.

    Between the table's entries ln(sigma / alpha) is interpolated; on them it is exact.
    """

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def __post_init__(self) -> None:
        _check_betas(self)

    def __call__(self, t: Tensor) -> NoiseLevel:
        return _level_from_table(_linear_table(self), t)

    def at(self, ratio: Tensor) -> NoiseLevel:
        return _level_at(_linear_table(self), ratio)


@dataclass(frozen=True)
class ScaledLinearBetas:
    """Latent diffusion (2112.10752): the root of beta grows linearly ("scaled_linear")."""

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def __post_init__(self) -> None:
        _check_betas(self)

    def __call__(self, t: Tensor) -> NoiseLevel:
        return _level_from_table(_scaled_linear_table(self), t)

    def at(self, ratio: Tensor) -> NoiseLevel:
        return _level_at(_scaled_linear_table(self), ratio)


@dataclass(frozen=True)
class Sigmoid:
    """2212.11972, figure 8: alpha^2 follows a sigmoid from `start` to `end`, betas capped."""

    steps: int = 1000
    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 2 or not (self.start < self.end and self.tau > 0.0 < self.max_beta < 1.0):
            raise ConfigError(
                "Sigmoid needs steps >= 2, start < end, tau > 0 and 0 < max_beta < 1;"
                f" got steps={self.steps}, start={self.start}, end={self.end}, tau={self.tau},"
                f" max_beta={self.max_beta}"
            )
        if not float(_sigmoid_table(self)[0]) >= math.log(MIN_SIGMA):
            raise ConfigError(
                f"Sigmoid's first step must have sigma >= {MIN_SIGMA}; got steps={self.steps},"
                f" start={self.start}: use fewer steps or a later start"
            )

    def __call__(self, t: Tensor) -> NoiseLevel:
        return _level_from_table(_sigmoid_table(self), t)

    def at(self, ratio: Tensor) -> NoiseLevel:
        return _level_at(_sigmoid_table(self), ratio)


@dataclass(frozen=True)
class Cosine:
    """Improved DDPM (2102.09672, eq. 17): alpha^2 follows a squared cosine, betas capped."""

    steps: int = 1000
    offset: float = 0.008
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0.0 <= self.offset < 1.0 or not 0.0 < self.max_beta < 1.0:
            raise ConfigError(
                "Cosine needs steps >= 2, 0 <= offset < 1 and 0 < max_beta < 1;"
                f" got steps={self.steps}, offset={self.offset}, max_beta={self.max_beta}"
            )
        if float(_cosine_table(self)[0]) < math.log(MIN_SIGMA):
            raise ConfigError(
                f"Cosine's first step must have sigma >= {MIN_SIGMA}; use fewer than"
                f" {self.steps} steps or an offset above {self.offset}"
            )

    def __call__(self, t: Tensor) -> NoiseLevel:
        return _level_from_table(_cosine_table(self), t)

    def at(self, ratio: Tensor) -> NoiseLevel:
        return _level_at(_cosine_table(self), ratio)


@dataclass(frozen=True)
class Karras:
    """EDM (2206.00364): alpha is 1 and ln sigma is uniform between the two ends."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not MIN_SIGMA <= self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(
                f"Karras needs {MIN_SIGMA} <= sigma_min < sigma_max;"
                f" got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}"
            )

    def __call__(self, t: Tensor) -> NoiseLevel:
        t = t.double()
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return NoiseLevel(torch.ones_like(t), torch.exp(low + (high - low) * t), t)

    def at(self, ratio: Tensor) -> NoiseLevel:
        sigma = ratio.double().clamp(self.sigma_min, self.sigma_max)
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return NoiseLevel(torch.ones_like(sigma), sigma, (sigma.log() - low) / (high - low))


@dataclass(frozen=True)
class Flow:
    """Rectified flow / flow matching (2209.03003, 2210.02747): a straight line, alpha = 1 - t."""

    t_min: float = MIN_SIGMA

    def __post_init__(self) -> None:
        if not MIN_SIGMA <= self.t_min < 1.0:
            raise ConfigError(f"Flow needs {MIN_SIGMA} <= t_min < 1; got t_min={self.t_min}")

    def __call__(self, t: Tensor) -> NoiseLevel:
        t = t.double().clamp(min=self.t_min)
        return NoiseLevel(1 - t, t, t)

    def at(self, ratio: Tensor) -> NoiseLevel:
        ratio = ratio.double()
        t = torch.where(ratio.isinf(), torch.ones_like(ratio), ratio / (1 + ratio))
        return self(t)


def _check_betas(schedule: LinearBetas | ScaledLinearBetas) -> None:
    steps, first, last = schedule.steps, schedule.first, schedule.last
    if steps < 2 or not MIN_SIGMA**2 <= first <= last < 1.0:
        raise ConfigError(
            f"{type(schedule).__name__} needs steps >= 2 and {MIN_SIGMA**2:g} <= first <= last < 1;"
            f" got steps={steps}, first={first}, last={last}"
        )


def clean() -> NoiseLevel:
    """The noiseless level, at which no denoiser is ever called."""
    one = torch.ones((), dtype=torch.float64)
    return NoiseLevel(one, torch.zeros_like(one), torch.zeros_like(one))


def _alpha_sigma(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """alpha^2 + sigma^2 = 1 with sigma / alpha = exp(log_ratio), without cancellation."""
    return torch.sigmoid(-2 * log_ratio).sqrt(), torch.sigmoid(2 * log_ratio).sqrt()


def _level_from_table(table: Tensor, t: Tensor) -> NoiseLevel:
    """Interpolate ln(sigma / alpha) at t = i / (T - 1); exact on the entries."""
    t = t.double()
    position = t.clamp(0, 1) * (len(table) - 1)
    nearest = position.round()  # i / (T - 1) * (T - 1) may miss i by a rounding
    position = torch.where((position - nearest).abs() < 1e-9, nearest, position)
    low = position.floor().long().clamp(max=len(table) - 2)
    weight = position - low
    log_ratio = torch.lerp(table[low], table[low + 1], weight)
    return NoiseLevel(*_alpha_sigma(log_ratio), t)


def _level_at(table: Tensor, ratio: Tensor) -> NoiseLevel:
    log_ratio = ratio.double().log().clamp(table[0], table[-1])
    high = torch.searchsorted(table, log_ratio.contiguous()).clamp(1, len(table) - 1)
    span = table[high] - table[high - 1]
    t = (high - 1 + (log_ratio - table[high - 1]) / span) / (len(table) - 1)
    return NoiseLevel(*_alpha_sigma(log_ratio), t)


def _log_ratios(betas: Tensor) -> Tensor:
    """ln(sigma / alpha) of each step, from log(alpha_bar) so that small sigma keeps its digits."""
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar) / 2


@cache
def _linear_table(schedule: LinearBetas) -> Tensor:
    betas = torch.linspace(schedule.first, schedule.last, schedule.steps, dtype=torch.float64)
    return _log_ratios(betas)


@cache
def _scaled_linear_table(schedule: ScaledLinearBetas) -> Tensor:
    first, last = schedule.first**0.5, schedule.last**0.5
    return _log_ratios(torch.linspace(first, last, schedule.steps, dtype=torch.float64).square())


@cache
def _sigmoid_table(schedule: Sigmoid) -> Tensor:
    t = torch.arange(schedule.steps + 1, dtype=torch.float64) / schedule.steps
    low, high = schedule.start / schedule.tau, schedule.end / schedule.tau
    # 1 - sigmoid(v) = sigmoid(-v); what is constant in t cancels in the ratio of neighbours.
    fallen = torch.sigmoid(-(low + t * (high - low)))
    alpha_bar = fallen - fallen[-1]
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=schedule.max_beta)
    return _log_ratios(betas)


@cache
def _cosine_table(schedule: Cosine) -> Tensor:
    i = torch.arange(schedule.steps + 1, dtype=torch.float64) / schedule.steps
    alpha_bar = torch.cos((i + schedule.offset) / (1 + schedule.offset) * (math.pi / 2)).square()
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=schedule.max_beta)
    return _log_ratios(betas)


# --- grids of levels for sampling ---------------------------------------------------------------

Spacing = Callable[[Schedule, int], NoiseLevel]


def uniform(schedule: Schedule, steps: int) -> NoiseLevel:
    """`steps` levels evenly spaced in t, from t = 1 down, without the clean end."""
    return schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1])


@dataclass(frozen=True)
class KarrasSpacing:
    """sigma / alpha spaced by the rho-th root (2206.00364, eq. 5), clipped to the schedule.

    Raises:
        ConfigError: `low` is not below `high`, as they are or clipped.
    """

    rho: float = 7.0
    low: float = 0.002
    high: float = 80.0

    def __call__(self, schedule: Schedule, steps: int) -> NoiseLevel:
        high, low = schedule.at(torch.tensor([self.high, self.low], dtype=torch.float64)).ratio
        if not low < high:
            raise ConfigError(
                f"KarrasSpacing needs low < high; got low={self.low:g} and high={self.high:g},"
                f" {low:g} and {high:g} in this schedule: choose them further apart within it"
            )
        return schedule.at(_even_roots(high, low, steps, self.rho))


def _even_roots(high: Tensor, low: Tensor, count: int, rho: float) -> Tensor:
    """`count` values from high down to low whose rho-th roots are evenly spaced."""
    fraction = torch.linspace(0, 1, count, dtype=torch.float64)
    first, last = high ** (1 / rho), low ** (1 / rho)
    return (first + fraction * (last - first)) ** rho


@dataclass(frozen=True)
class LeadIn:
    """`KarrasSpacing` with most levels where pictures take shape, and one in fifteen above.

    Far above the scale of the pictures the best estimate is their mean (or that of their class)
    wherever x lies, and the path is almost straight: one long step does for the third of all levels
    that `KarrasSpacing` puts there. From `reach` it goes down to 2 % of the spread; the step to the
    clean level needs no less noise. At 5 to 20 evaluations the samplers here end 1.1 to 8 times as
    close to the Gaussian of 8x8 digits (but `dpmpp_2m_sde` with 7, 0.8 times), and with many as
    close.

    Args:
        spread: standard deviation of the pictures' values, such as `KarrasPrecond.sigma_data`.
        values: numbers in a picture, channels * height * width. The larger natural pictures are,
            the more of their spread lies in few directions, and the sooner these show.
        rho: as in `KarrasSpacing`.
        high: the noisiest level.

    Raises:
        ConfigError: `spread` is not above 0, or `values` below 1.
    """

    spread: float = 0.5
    values: int = 256
    rho: float = 7.0
    high: float = 80.0

    def __post_init__(self) -> None:
        if not 0.0 < self.spread < math.inf or self.values < 1:
            raise ConfigError(
                "LeadIn needs spread above 0 and values of at least 1;"
                f" got spread={self.spread}, values={self.values}"
            )

    @property
    def reach(self) -> float:
        """20 spreads, but at least four deviations of natural pictures' strongest direction, which
        has about a tenth of the whole variance (a power law of exponent 2)."""
        return self.spread * max(20.0, 1.25 * math.sqrt(self.values))

    def __call__(self, schedule: Schedule, steps: int) -> NoiseLevel:
        low, lead = self.spread / 50.0, math.ceil(steps / 15)
        ends = torch.tensor([self.high, self.reach, low], dtype=torch.float64)
        top, middle, bottom = schedule.at(ends).ratio
        if steps < 4 or not bottom < middle < top:  # too few, or nothing above
            return KarrasSpacing(self.rho, low, self.high)(schedule, steps)
        above = _even_roots(top, middle, lead + 1, self.rho)[:-1]
        below = _even_roots(middle, bottom, steps - lead, self.rho)
        return schedule.at(torch.cat((above, below)))


def levels(
    schedule: Schedule, steps: int, spacing: Spacing | None = None
) -> tuple[NoiseLevel, ...]:
    """steps + 1 levels from noisiest to exactly clean; 0-d float64 on the CPU.

    0-d CPU tensors neither promote a float32 picture nor make a device wait.

    Args:
        spacing: `uniform` in t, `KarrasSpacing()` (the default), or `LeadIn(...)` for few steps.

    Raises:
        ConfigError: `steps` is below 1.
    """
    if steps < 1:
        raise ConfigError(f"num_inference_steps must be at least 1; got {steps}")
    grid = (spacing or KarrasSpacing())(schedule, steps)
    return (*(NoiseLevel(*values) for values in zip(*grid, strict=True)), clean())


def descending(schedule: Schedule, ratios: Tensor) -> tuple[NoiseLevel, ...]:
    """A grid through given values of sigma / alpha, without the clean end."""
    grid = schedule.at(ratios)
    return tuple(NoiseLevel(*values) for values in zip(*grid, strict=True))


# --- keyed random numbers -----------------------------------------------------------------------


class Stream(IntEnum):
    """What a random number is for. Streams never touch each other; values are part of the file
    format: renumbering would change every run that is resumed."""

    WEIGHTS = 0
    ORDER = 1
    AUGMENT = 2
    LEVEL = 3
    NOISE = 4
    LABEL_DROP = 5
    DROPOUT = 6
    SAMPLE = 7
    VALIDATE = 8
    EVALUATE = 9
    ADDED = 10
    TRANSFORM = 11


def keyed(seed: int, stream: Stream, position: int, part: int = 0) -> np.random.Generator:
    """The generator that belongs to (seed, stream, position, part), independent of all history.

    Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a bijection of
    key and counter, so different places never share numbers. `part` numbers draws within a
    position, such as the steps of a stochastic sampler. Drawn on the CPU: the numbers are the same
    on every device and for every number of processes.

    Raises:
        ConfigError: `seed` is outside [0, 2^64).
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed must be between 0 and 2^64 - 1; got {seed}")
    key = np.array([seed, int(stream)], dtype=np.uint64)  # a plain list passes through float64
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, part, position]))


def keyed_normal(
    seed: int, stream: Stream, positions: range, shape: tuple[int, ...], part: int = 0
) -> Float[Tensor, "b ..."]:
    """Standard normal numbers, one block of `shape` per position; float32 on the CPU."""
    out = np.empty((len(positions), *shape), dtype=np.float32)
    for row, generator in zip(out, _keyed_in_turn(seed, stream, positions, part), strict=True):
        generator.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def keyed_uniform(
    seed: int, stream: Stream, positions: range, count: int, part: int = 0
) -> np.ndarray:
    """Uniform numbers in [0, 1), `count` per position; float64 of shape (len(positions), count)."""
    out = np.empty((len(positions), count))
    for row, generator in zip(out, _keyed_in_turn(seed, stream, positions, part), strict=True):
        generator.random(out=row)
    return out


_GOLDEN = np.uint64(11400714819323198485)  # 2^64 times the golden ratio's fraction


def keyed_even(seed: int, stream: Stream, positions: range) -> np.ndarray:
    """One number in [0, 1) per position, each uniform, together even: float64 (len(positions),).

    Kronecker's sequence, the fractions of start + position * golden ratio: any stretch of n
    positions divides [0, 1) into gaps of at most three lengths, near 1 / n. A batch then meets all
    noise levels alike however it is cut into parts, which takes their share out of the gradient's
    noise (2107.00630, appendix I.1, draws its times evenly for that reason).
    """
    start = keyed(seed, stream, 0).integers(2**64, dtype=np.uint64)
    steps = np.arange(positions.start, positions.stop, dtype=np.uint64)
    return ((start + steps * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _keyed_in_turn(
    seed: int, stream: Stream, positions: range, part: int
) -> Iterator[np.random.Generator]:
    """`keyed` of each position, good until the next: one generator is set to all of them, since
    making one takes longer than the numbers of a small picture."""
    generator = keyed(seed, stream, 0, part)
    fresh = cast("dict[str, Any]", generator.bit_generator.state)
    for position in positions:
        fresh["state"]["counter"][3] = position
        generator.bit_generator.state = fresh
        yield generator


def order(seed: int, size: int, positions: range) -> np.ndarray:
    """Which picture stands at each global position: a fresh permutation of `size` per epoch.

    Position p is entry p % size of epoch p // size, so batches run across epoch ends and nothing
    is dropped or repeated.
    """
    places = [_permutation(seed, size, p // size)[p % size] for p in positions]
    return np.array(places, dtype=np.int64)


@lru_cache(maxsize=4)  # a batch touches one or two epochs
def _permutation(seed: int, size: int, epoch: int) -> np.ndarray:
    return keyed(seed, Stream.ORDER, epoch).permutation(size)

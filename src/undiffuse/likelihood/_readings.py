"""What a picture is taken for: a number has a density, one of so many grey values a probability."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.noise import Stream, keyed_normal, keyed_uniform

Pictures = Float[Tensor, "n c h w"]
Values = Float[Tensor, "n"]

LOW = 0.002  # sigma / alpha (2206.00364, table 1)
MOST_LEVELS = 256  # that float values are looked through for
REACH = 9.0  # deviations from a grey value beyond which its Gaussian counts as 0
MOST_TERMS = 512  # of a sum over grey values, on each side

_PART = 1 << 40  # of a picture's stream


class Point(NamedTuple):
    """Where a picture starts: ln P(picture) >= ln p(u) + log_weight.

    p is the density at the lowest noise level or, where `clean`, at no noise at all.
    """

    u: Pictures
    log_weight: Values
    clean: bool


@runtime_checkable
class Reading(Protocol):
    """How a picture in [-1, 1] becomes a point whose density is asked for."""

    @property
    def low(self) -> float:
        """The lowest ratio sigma / alpha that it is worth going down to."""
        ...

    def point(self, x0: Pictures, ratio: float, seed: int, positions: range) -> Point:
        """The point of float64 pictures at the lowest ratio; chance is that of (seed, position)."""
        ...


@dataclass(frozen=True)
class Noised:
    """Numbers, as they are under the noise of the lowest level: a density that always exists.

    The bits of the numbers themselves lie below, by 0.72 (s / l)^2 for every direction in which the
    data have a deviation l well above the lowest ratio s.
    """

    @property
    def low(self) -> float:
        return LOW

    def point(self, x0: Pictures, ratio: float, seed: int, positions: range) -> Point:
        noise = keyed_normal(seed, Stream.EVALUATE, positions, tuple(x0.shape[1:]), _PART)
        return Point(x0 + ratio * noise, x0.new_zeros(len(x0)), clean=False)


@dataclass(frozen=True)
class Clean:
    """Numbers as they are: their own density, which data need not have.

    From the lowest ratio s down to 0 the heat equation d ln p / d s^2 = (lap ln p + |grad ln p|^2)
    / 2 is followed to first order, and all of that stretch counts as error.
    """

    @property
    def low(self) -> float:
        return LOW

    def point(self, x0: Pictures, ratio: float, seed: int, positions: range) -> Point:
        return Point(x0, x0.new_zeros(len(x0)), clean=True)


@dataclass(frozen=True)
class Grid:
    """One of `levels` grey values from -1 to 1: a probability, bounded from below.

    The noise of the lowest level is the dequantiser, and every value is read off it by itself
    (Kingma et al. 2021, 2107.00630, section 3): P(v | u_i) is N(u_i; v, s^2) over its sum, and

        ln P(x) >= E [ln p(u) - sum_i ln sum_v N(u_i; v, s^2)],    u = x + s * noise

    with one draw for the mean. That costs what the other pixels would tell about a value that the
    noise hides. Uniform noise, the older way, is the noise of no level: a network that has learned
    the grid holds values between its points to be impossible.

    Raises:
        ConfigError: fewer than two levels.
    """

    levels: int = 256

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ConfigError(f"a grid of values needs at least 2 levels; got {self.levels}")

    @property
    def spacing(self) -> float:
        return 2 / (self.levels - 1)

    @property
    def low(self) -> float:
        """A quarter of the spacing, 0.002 for bytes: there 19 of 20 values can be read off."""
        return max(LOW, self.spacing / 4)

    def point(self, x0: Pictures, ratio: float, seed: int, positions: range) -> Point:
        """As `Reading` says; raises ConfigError for values off the grid."""
        _check_on_grid(x0, self.levels)
        u = Noised().point(x0, ratio, seed, positions).u
        return Point(u, -self.log_comb(u, ratio).flatten(1).sum(1), clean=False)

    def log_comb(self, u: Tensor, ratio: float) -> Tensor:
        """ln of the sum over the grid of N(u; v, ratio^2), value by value."""
        reach = math.ceil(REACH * ratio / self.spacing)
        if reach > MOST_TERMS:  # so dense that the sum is the integral
            return self._log_integral(u, ratio)
        nearest = ((u + 1) / self.spacing).round().clamp(0, self.levels - 1)
        total = torch.full_like(u, -math.inf)
        for offset in range(-reach, reach + 1):
            place = nearest + offset
            term = -((u + 1 - place * self.spacing) / ratio).square() / 2
            there = (place >= 0) & (place < self.levels)
            total = torch.logaddexp(total, term.where(there, -math.inf))
        return total - math.log(ratio * math.sqrt(2 * math.pi))

    def _log_integral(self, u: Tensor, ratio: float) -> Tensor:
        edge = 1 + self.spacing / 2
        mass = torch.special.ndtr((edge - u) / ratio) - torch.special.ndtr((-edge - u) / ratio)
        return mass.log() - math.log(self.spacing)


@dataclass(frozen=True)
class Uniform:
    """One of `levels` grey values, dequantised by uniform noise as wide as their spacing.

    The usual way of the literature (Theis et al. 2016, 1511.01844, section 3.1): for bytes the bits
    of the density plus log2(127.5). Also an upper bound on the bits, and a poor one for a network
    that has learned, at lower noise, that there are grey values; see `Grid`.
    """

    levels: int = 256

    @property
    def low(self) -> float:
        return LOW

    def point(self, x0: Pictures, ratio: float, seed: int, positions: range) -> Point:
        """As `Reading` says; raises ConfigError for values off the grid."""
        _check_on_grid(x0, self.levels)
        width, count = Grid(self.levels).spacing, x0[0].numel()
        draws = keyed_uniform(seed, Stream.EVALUATE, positions, count, _PART)
        u = x0 + width * (torch.from_numpy(draws).reshape(x0.shape) - 0.5)
        return Point(u, x0.new_full((len(x0),), count * math.log(width)), clean=True)


BYTES = Grid(256)


def reading_of(x0: Pictures, bits: int) -> Reading:
    """What pictures are that were stored with so many bits per value.

    Args:
        x0: pictures in [-1, 1], all that shall be read alike.
        bits: 8 or 16, of whole numbers; 32, of floats: the coarsest grid of up to 256 grey values
            on which all lie, such as the digits' 17, else numbers.
    """
    if bits <= 16:
        return Grid(2**bits)
    fitting = (n for n in range(2, MOST_LEVELS + 1) if _off_grid(x0, n) < 1e-4)
    levels = next(fitting, None)
    return Noised() if levels is None else Grid(levels)


def _off_grid(x0: Tensor, levels: int) -> float:
    """How far the furthest value lies from the grid's points, in spacings."""
    place = (x0.double() + 1) * (levels - 1) / 2
    return float((place - place.round().clamp(0, levels - 1)).abs().max())


def _check_on_grid(x0: Tensor, levels: int) -> None:
    off = _off_grid(x0, levels)
    if not off < 0.01:
        raise ConfigError(
            f"pictures are not of {levels} levels per value from -1 to 1: one lies {off:.2g}"
            " spacings beside them; read them as numbers (Noised), or give their number of levels"
        )

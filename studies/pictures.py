"""The pictures that the studies train on and are judged by.

Every set offers `source(seed)`, what `training.train` reads from, and `held_out(count, seed)`,
pictures that no training has seen, in [-1, 1] or nearly so, always one channel:

- `Fields(...)`: Gaussian random fields drawn fresh for every step, so nothing can be memorised.
  Their covariance is known in closed form, so `oracle()` is the best possible denoiser. A field
  knows no edge and no period: it is a window of a larger torus. Its large-scale waves reach across
  the whole picture, which makes it the right set for claims about reach;
- `Digits()`: scikit-learn's 8x8 digits;
- `Photos(...)`: grey crops of two photographs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from undiffuse import images
from undiffuse.noise import Stream, keyed_normal, keyed_uniform, order
from undiffuse.oracles import Gaussian

Source = Callable[[range], tuple[Tensor, Tensor | None]]

STD = 0.5  # of a field's values, which is what KarrasPrecond expects


class Pictures(Protocol):
    """What every set is."""

    def source(self, seed: int) -> Source: ...

    def held_out(self, count: int, seed: int) -> Tensor: ...


@dataclass(frozen=True)
class Fields:
    """Gaussian fields of `height` x `width` pixels, power spectrum 1 / k^`exponent`.

    The torus they are cut from is `torus` pixels wide, so waves twice as long as a picture exist.
    """

    height: int = 32
    width: int = 32
    exponent: float = 2.0
    torus: int = 64

    def source(self, seed: int) -> Source:
        return lambda positions: (self._draw(seed, Stream.AUGMENT, positions), None)

    def held_out(self, count: int, seed: int) -> Tensor:
        return self._draw(seed, Stream.VALIDATE, range(count))

    def oracle(self) -> Gaussian:
        """The exact distribution; called like a denoiser it is the best there can be."""
        return _gaussian(self)

    def _draw(self, seed: int, stream: Stream, positions: range) -> Tensor:
        white = keyed_normal(seed, stream, positions, (1, self.torus, self.torus))
        gain = spectrum(self).sqrt().to(white.dtype)
        waves = torch.fft.ifft2(torch.fft.fft2(white) * gain).real
        return waves[..., : self.height, : self.width].contiguous()


def spectrum(fields: Fields) -> Tensor:
    """Variance of each wave on the torus, (torus, torus); their mean is `STD` squared."""
    k = torch.fft.fftfreq(fields.torus, dtype=torch.float64) * fields.torus
    squared = k[:, None] ** 2 + k[None, :] ** 2
    power = squared.clamp(min=1.0) ** (-fields.exponent / 2)
    power[0, 0] = 0.0  # the mean of the torus
    return power * (STD**2 / power.mean())


def covariance(fields: Fields) -> Tensor:
    """Covariance of a field's values in row order, in closed form; (h w, h w), float64.

    The spectrum's inverse transform gives it as a function of the distance (Wiener-Khinchin).
    """
    by_distance = torch.fft.ifft2(spectrum(fields)).real
    y = torch.arange(fields.height).repeat_interleave(fields.width)
    x = torch.arange(fields.width).repeat(fields.height)
    return by_distance[y[:, None] - y, x[:, None] - x]  # negative distances count from the end


@lru_cache(maxsize=4)
def _gaussian(fields: Fields) -> Gaussian:
    mean = torch.zeros(1, fields.height, fields.width, dtype=torch.float64)
    return Gaussian.from_covariance(mean, covariance(fields))


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits, 8x8 pixels, with the product's own split."""

    def source(self, seed: int) -> Source:
        return _source(_bundled("digits", 8).train, seed)

    def held_out(self, count: int, seed: int) -> Tensor:
        return _chosen(_bundled("digits", 8).held_out, count, seed)


@dataclass(frozen=True)
class Photos:
    """Random grey crops of `size` pixels; training from the photographs' left parts, held out
    from their right parts."""

    size: int = 32

    def source(self, seed: int) -> Source:
        return _source(_bundled("photos", self.size).train, seed)

    def held_out(self, count: int, seed: int) -> Tensor:
        return _chosen(_bundled("photos", self.size).held_out, count, seed)


@lru_cache(maxsize=4)
def _bundled(name: str, size: int) -> images.Data:
    return images.load(name, images.DataOptions(resolution=(size, size), channels=1))


def _source(data: images.Dataset, seed: int) -> Source:
    def source(positions: range) -> tuple[Tensor, Tensor | None]:
        draws = keyed_uniform(seed, Stream.AUGMENT, positions, 3)
        return data.batch(order(seed, len(data), positions), draws), None

    return source


def _chosen(data: images.Dataset, count: int, seed: int) -> Tensor:
    """`count` pictures (or crops) in a keyed order; a small set is gone through again."""
    places = range(count)
    draws = keyed_uniform(seed, Stream.VALIDATE, places, 3)
    return data.batch(order(seed, len(data), places), draws)

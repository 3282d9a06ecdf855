"""How far a denoiser lies from the best possible one, where that one is known.

The mean square of D - D* is what the denoiser's loss lies above the least possible loss (the
posterior mean is orthogonal to its error), estimated here as the difference of two denoisers: the
noise of the loss itself, far larger, falls out. Divided by ratio^2 and summed over ln ratio it
bounds the divergence of what the denoiser generates from the data, in nats (Girsanov's theorem;
Song et al. 2101.09258, theorem 1; Kong et al. 2302.03792).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation._losses import RATIOS, LevelDenoiser, part_of, squares
from undiffuse.evaluation._spread import (
    Errors,
    Interval,
    in_units,
    interval,
    quotient,
    reached,
    steps,
)
from undiffuse.noise import NoiseLevel, Stream, keyed_normal
from undiffuse.oracles import Gaussian, Oracle

FRESH = 1 << 33  # positions of pictures drawn from an oracle
DRAWN = 1 << 40  # the part of their noise: no level's


@dataclass(frozen=True)
class GapRow:
    """One level; all squares are means per value.

    `mmse` is the least possible error, `excess` the mean of (D - D*)^2, `percent` its share of
    `mmse` with the ends of its 95 % interval (None for one picture), and `nats_per_value` excess
    alpha^2 / sigma^2, the integrand over ln sigma/alpha.
    """

    ratio: float
    mmse: float
    excess: float
    percent: float
    percent_low: float | None
    percent_high: float | None
    nats_per_value: float


@dataclass(frozen=True)
class GapReport:
    """The levels in rising order, and the sum of excess / ratio^2 times the step in ln ratio.

    The sum is an upper bound of the divergence KL(data | generated), up to what lies outside the
    levels and what the start of generation adds. `values` is how many a picture has.
    """

    rows: tuple[GapRow, ...]
    nats_per_value: Interval
    pictures: int
    values: int
    draws: int
    seed: int

    @property
    def nats_per_picture(self) -> Interval:
        """The sum over a picture's values."""
        return self.nats_per_value.times(self.values)

    @property
    def bits_per_dimension(self) -> Interval:
        """The sum per value, in bits."""
        return self.nats_per_value.times(1 / math.log(2))

    def asdict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, with the sum in all three units."""
        return asdict(self) | in_units(self.nats_per_value, self.values)


def excess_by_level(
    denoiser: LevelDenoiser,
    oracle: Gaussian,
    *,
    pictures: int = 4096,
    ratios: Sequence[float] = RATIOS,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
) -> GapReport:
    """`excess_over` on fresh pictures of a Gaussian, whose least possible error is a formula.

    Args:
        pictures: how many are drawn from `oracle`; no two seeds share one.

    Raises:
        ConfigError: `pictures`, `draws` or `batch_size` is below 1, or no ratio is in range.
    """
    if pictures < 1:
        raise ConfigError(f"pictures must be at least 1; got {pictures}")
    places = range(FRESH, FRESH + pictures)
    noise = keyed_normal(seed, Stream.EVALUATE, places, tuple(oracle.mean.shape), DRAWN)
    return excess_over(
        denoiser,
        oracle,
        oracle.draw(noise),
        mmse=oracle.mmse,
        ratios=ratios,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        device=device,
    )


def excess_over(
    denoiser: LevelDenoiser,
    oracle: Oracle,
    x0: Float[Tensor, "n c h w"],
    label: Int[Tensor, "n"] | None = None,
    *,
    mmse: Callable[[NoiseLevel], Tensor] | None = None,
    ratios: Sequence[float] = RATIOS,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
) -> GapReport:
    """The mean square of D - D* at each noise level, as a share of the least error and in nats.

    Cost: n x levels x draws evaluations of both.

    Args:
        denoiser: its network in evaluation mode.
        oracle: E[x0 | x] of the distribution that `x0` was drawn from; called on the CPU.
        x0: clean pictures that neither was fitted to.
        label: given to both.
        mmse: the least error per value where a formula gives it (`Gaussian.mmse`); None: the
            oracle's own on the same pictures and noise.
        ratios: values of sigma / alpha; those outside the schedule's range are left out.
        draws: noise per picture and level.
        device: where the denoiser is called.

    Raises:
        ConfigError: `draws` or `batch_size` is below 1, or no ratio is in range.
        DataError: there are no pictures, or they are not (n, c, h, w).
    """
    if draws < 1 or batch_size < 1:
        raise ConfigError(f"draws and batch_size must be at least 1; got {draws} and {batch_size}")
    if x0.ndim != 4 or not len(x0):
        raise DataError(f"pictures must be (n, c, h, w), at least one; got {tuple(x0.shape)}")
    x0 = x0.detach().cpu().float()
    job = _Job(denoiser, oracle, x0, label, mmse, draws, seed, batch_size, device)
    levels = reached(denoiser.schedule, ratios)
    measured = [_measure(job, part_of(place), level) for place, level in enumerate(levels)]
    return _report(job, levels, measured)


@dataclass(frozen=True)
class _Job:
    denoiser: LevelDenoiser
    oracle: Oracle
    x0: Tensor
    label: Tensor | None
    mmse: Callable[[NoiseLevel], Tensor] | None
    draws: int
    seed: int
    batch_size: int
    device: torch.device | str

    def parts(self, part: int, level: NoiseLevel) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Noised pictures, the clean ones, and their labels."""
        for first in range(0, len(self.x0), self.batch_size):
            x0 = self.x0[first : first + self.batch_size]
            label = None if self.label is None else self.label[first : first + self.batch_size]
            places = range(FRESH + first, FRESH + first + len(x0))
            noise = keyed_normal(self.seed, Stream.EVALUATE, places, tuple(x0.shape[1:]), part)
            yield level.mix(x0, noise), x0, label


@dataclass(frozen=True)
class _Measured:
    excess: Errors
    least: Errors


@torch.no_grad()
def _measure(job: _Job, part: int, level: NoiseLevel) -> _Measured:
    """Of every picture, the mean over values and draws."""
    excess, least = np.zeros(len(job.x0)), np.zeros(len(job.x0))
    for draw in range(job.draws):
        rows = [_squares(job, level, *batch) for batch in job.parts(part + draw, level)]
        excess += np.concatenate([apart for apart, _ in rows])
        least += np.concatenate([error for _, error in rows])
    if job.mmse is not None:
        return _Measured(excess / job.draws, np.full_like(least, float(job.mmse(level))))
    return _Measured(excess / job.draws, least / job.draws)


def _squares(
    job: _Job, level: NoiseLevel, x: Tensor, x0: Tensor, label: Tensor | None
) -> tuple[Errors, Errors]:
    best = job.oracle(x, level, label).double()
    there = None if label is None else label.to(job.device)
    made = job.denoiser(x.to(job.device), level, there).cpu().double()
    return squares(made - best), squares(best - x0)


def _report(job: _Job, levels: list[NoiseLevel], measured: list[_Measured]) -> GapReport:
    ratios = [float(level.ratio) for level in levels]
    whole = zip(steps(ratios), ratios, measured, strict=True)
    nats = np.sum([w * m.excess / ratio**2 for w, ratio, m in whole], axis=0)
    return GapReport(
        rows=tuple(_row(r, m, job.seed) for r, m in zip(ratios, measured, strict=True)),
        nats_per_value=interval(nats, job.seed),
        pictures=len(job.x0),
        values=job.x0[0].numel(),
        draws=job.draws,
        seed=job.seed,
    )


def _row(ratio: float, m: _Measured, seed: int) -> GapRow:
    percent = quotient(m.excess, m.least, seed).times(100)
    return GapRow(
        ratio=ratio,
        mmse=float(m.least.mean()),
        excess=float(m.excess.mean()),
        percent=percent.value,
        percent_low=percent.low,
        percent_high=percent.high,
        nats_per_value=float(m.excess.mean()) / ratio**2,
    )

"""Bits per dimension of pictures: grid after grid until two agree, and what may still be wrong."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.likelihood._flow import (
    Carried,
    Flow,
    Labelled,
    below,
    carry,
    cost,
    directions,
)
from undiffuse.likelihood._readings import BYTES, Noised, Point, Reading
from undiffuse.noise import NoiseLevel, Schedule

Pictures = Float[Tensor, "n c h w"]
Values = Float[Tensor, "n"]
Progress = Callable[[int, int], None]  # (points computed, of how many by now)

HIGH = 80.0  # sigma / alpha (2206.00364, table 1)
GRIDS = (12, 18, 27, 40, 60, 90, 135)  # points of one pass after another


# --- the result ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """Bits per dimension of every picture, and how far off they may be; float64 on the CPU.

    In the estimates: the path and the integral, by the difference of two grids
    (`integration_error`); the probes of the trace, as a standard error (`probe_error`, 0 for exact
    traces); the Gaussian at the highest level, by the size of its correction (`prior_error`); the
    stretch below the lowest level, by its own (`truncation_error`, 0 unless `Point.clean`).

    Not in them: the rounding of a float32 network, some 1e-6; the draw of `Noised`, `Grid` and
    `Uniform`, which is part of the scatter over pictures and so of `standard_error`; and by how
    much the bits of `Grid` and `Uniform` are an upper bound.

    Args:
        evaluations: of the denoiser per picture, all grids together: how often pictures went
            through it. For the trace a small batch is repeated until it is full, and all count.
        products: of a vector with its Jacobian, likewise; each costs about an evaluation.
        probes: random vectors per picture; 0 for exact traces.
        low: the ratio sigma / alpha where it was begun.
        high: where it ended.
    """

    bits: Values
    integration_error: Values
    probe_error: Values
    prior_error: Values
    truncation_error: Values
    evaluations: Int[Tensor, "n"]
    products: Int[Tensor, "n"]
    probes: int
    low: float
    high: float

    def __len__(self) -> int:
        return len(self.bits)

    @property
    def mean(self) -> float:
        return float(self.bits.mean())

    @property
    def standard_error(self) -> float | None:
        """Of the mean, over pictures; None for a single one."""
        return _standard_error(self.bits)

    @property
    def error(self) -> Values:
        """All estimates of a picture added up."""
        return self.integration_error + self.prior_error + self.truncation_error + self.probe_error

    @property
    def mean_error(self) -> float:
        """Likewise for the mean: probes are independent from picture to picture, the others are
        taken to have the same sign."""
        probes = float(self.probe_error.square().sum().sqrt()) / len(self)
        return float((self.error - self.probe_error).mean()) + probes


def _standard_error(values: Values) -> float | None:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None


# --- the function -------------------------------------------------------------------------------


def bits_per_dimension(
    denoiser: Labelled,
    schedule: Schedule,
    x0: Pictures,
    label: Int[Tensor, "labels"] | None = None,
    *,
    reading: Reading = BYTES,
    num_probes: int | None = None,
    tolerance: float = 0.01,
    low: float | None = None,
    high: float = HIGH,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Likelihood:
    """-log2 of the probability (or density) of each picture, over its number of values.

    It is that of the model whose pictures a perfect solver would make with `denoiser`, stopping at
    the lowest level. With an exact denoiser it is that of the data.

    Every picture is carried along 12 points, then along 18, 27 ... 135, until two grids agree to
    `tolerance`; where they never do, its `integration_error` says so. What chance does to a picture
    depends on the seed and its position alone.

    Args:
        denoiser: (x, level, label) -> estimate of x0, differentiable in x; a network in evaluation
            mode. It is called in the precision of `x0`, with levels shared by the whole batch.
        schedule: the noise levels that the denoiser knows.
        label: with it, the likelihood given the class; None is "no class".
        reading: what the pictures are; `reading_of` finds out.
        num_probes: random vectors per picture that the trace is estimated with. None: for up to 256
            values the exact trace, which takes as many products as there are values, else 8. As
            many as there are values, or more: exact.
        tolerance: of the estimated integration error, in bits per dimension.
        low: the lowest sigma / alpha; None takes the reading's. Both ends are clipped to the
            schedule.
        high: the highest, which should be far above the pictures' spread.
        first: the position of the first picture; other positions have other random numbers.
        batch_size: pictures that the denoiser is called with at once; changes rounding, and how
            many evaluations the trace takes.
        device: where it is called; all else is float64 on the CPU.
        progress: called with the points computed; the total grows where more are needed.

    Raises:
        ConfigError: no pictures, values that the reading does not have, labels that are not as many
            as the pictures, or a number out of range.
    """
    _check(x0, label, num_probes, tolerance, batch_size)
    ends = _ends(schedule, reading.low if low is None else low, high)
    ticks = _Ticks(progress, len(x0) * (GRIDS[0] + GRIDS[1]))
    parts: list[Likelihood] = []
    for begin in range(0, len(x0), batch_size):
        some = slice(begin, begin + batch_size)
        pictures = x0[some].detach().cpu().double()
        positions = range(first + begin, first + begin + len(pictures))
        flow = Flow(
            denoiser,
            schedule,
            label=None if label is None else label[some].to(device),
            directions=directions(pictures, num_probes, seed, positions),
            kind=torch.empty(0, dtype=x0.dtype, device=device),
            at_once=batch_size,
        )
        point = reading.point(pictures, math.exp(ends[0]), seed, positions)
        parts.append(_measured(flow, point, ends, tolerance, ticks))
    return _joined(parts)


def _check(
    x0: Pictures, label: Tensor | None, num_probes: int | None, tolerance: float, batch_size: int
) -> None:
    if not len(x0):
        raise ConfigError("no pictures: give at least one")
    if label is not None and len(label) != len(x0):
        raise ConfigError(f"{len(x0)} pictures need as many labels; got {len(label)}")
    if num_probes is not None and num_probes < 2:
        raise ConfigError(f"num_probes must be at least 2, or None; got {num_probes}")
    if not 0.0 < tolerance < math.inf:
        raise ConfigError(f"tolerance must be above 0; got {tolerance}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}")


def _ends(schedule: Schedule, low: float, high: float) -> tuple[float, float]:
    """ln of the lowest and the highest ratio, as far as the schedule goes."""
    if not 0.0 < low < high < math.inf:
        raise ConfigError(f"low and high must be 0 < low < high; got {low} and {high}")
    first, last = schedule.at(torch.tensor([low, high], dtype=torch.float64)).ratio.log().tolist()
    if not first < last:
        raise ConfigError(
            f"the schedule has no noise levels between {low} and {high}; choose another low or high"
        )
    return first, last


class _Ticks:
    """Counts points for `progress`."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def expect(self, more: int) -> None:
        self._total += more

    def __call__(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


def _joined(parts: Sequence[Likelihood]) -> Likelihood:
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Likelihood(
        bits=cat("bits"),
        integration_error=cat("integration_error"),
        probe_error=cat("probe_error"),
        prior_error=cat("prior_error"),
        truncation_error=cat("truncation_error"),
        evaluations=cat("evaluations"),
        products=cat("products"),
        probes=parts[0].probes,
        low=parts[0].low,
        high=parts[0].high,
    )


# --- grid after grid ----------------------------------------------------------------------------


def _measured(
    flow: Flow, point: Point, ends: tuple[float, float], tolerance: float, ticks: _Ticks
) -> Likelihood:
    """One batch; a picture takes part in passes until two of them agree."""
    nats, size = point.u[0].numel() * math.log(2), len(point.u)  # nats in a bit per dimension
    stretch, spent = point.u.new_zeros(size, 1), torch.zeros(size, 2, dtype=torch.int64)
    if point.clean:
        stretch = below(flow, point.u, ends[0])
        spent += torch.tensor([flow.copies(size), flow.directions.count])
    found = carry(flow, point.u, ends, GRIDS[0], ticks)
    spent += torch.tensor(cost(flow, size, GRIDS[0]))
    error, index = torch.full((size,), math.inf, dtype=torch.float64), torch.arange(size)
    for before, points in pairwise(GRIDS):
        if before != GRIDS[0]:
            ticks.expect(len(index) * points)
        finer = carry(flow.of(index), point.u[index], ends, points, ticks)
        error[index] = _apart(finer, Carried(*(part[index] for part in found))) / nats
        for part, fine in zip(found, finer, strict=True):
            part[index] = fine
        spent[index] += torch.tensor(cost(flow, len(index), points))
        index = index[~(error[index] <= tolerance)]
        if not len(index):
            break
    log_density = found.log_density + stretch
    return Likelihood(
        bits=-(log_density.mean(1) + point.log_weight) / nats,
        integration_error=error,
        probe_error=_probe_error(log_density) / nats,
        prior_error=found.prior / nats,
        truncation_error=stretch.mean(1).abs() / nats,
        evaluations=spent[:, 0],
        products=spent[:, 1],
        probes=flow.directions.probes,
        low=math.exp(ends[0]),
        high=math.exp(ends[1]),
    )


def _apart(one: Carried, other: Carried) -> Values:
    """How far two grids differ. Their totals may agree by chance, so the moments count as well."""
    total = (one.log_density - other.log_density).mean(1).abs()
    return total + (one.moments - other.moments).square().sum(1).sqrt()


def _probe_error(log_density: Float[Tensor, "n k"]) -> Values:
    """Standard error of the mean over probes."""
    count = log_density.shape[1]
    if count == 1:
        return log_density.new_zeros(len(log_density))
    return log_density.std(1) / math.sqrt(count)


# --- beside an exact density --------------------------------------------------------------------


class BesideExact(NamedTuple):
    """Mean bits per dimension, the exact ones of the same pictures, and their mean difference with
    its standard error over pictures: the model's, since `error` estimates the rest."""

    bits: float
    exact: float
    excess: float
    standard_error: float | None
    error: float


def beside_exact(
    denoiser: Labelled,
    schedule: Schedule,
    log_density: Callable[[Pictures, NoiseLevel], Values],
    x0: Pictures,
    *,
    low: float | None = None,
    high: float = HIGH,
    tolerance: float = 0.001,
    seed: int = 0,
    batch_size: int = 64,
) -> BesideExact:
    """A denoiser on data whose density is known, such as `oracles.Gaussian.log_density`.

    Compared at the noise of the lowest level, where both are defined. The mean difference estimates
    KL(data || model) per dimension: at least 0 but for chance.

    Args:
        log_density: (x, level) -> ln p(x) at the level, per picture.
        x0: pictures drawn from the data.
        low: the lowest sigma / alpha, 0.002 by default; below the noise it was trained on a
            denoiser says nothing.
        high: the highest.

    Raises:
        ConfigError: as `bits_per_dimension`.
    """
    found = bits_per_dimension(
        denoiser,
        schedule,
        x0,
        reading=Noised(),
        tolerance=tolerance,
        low=low,
        high=high,
        seed=seed,
        batch_size=batch_size,
    )
    level = NoiseLevel(*torch.tensor([1.0, found.low, 0.0], dtype=torch.float64))
    u = Noised().point(x0.detach().cpu().double(), found.low, seed, range(len(x0))).u
    exact = -log_density(u, level) / (x0[0].numel() * math.log(2))
    apart = found.bits - exact
    return BesideExact(
        bits=found.mean,
        exact=float(exact.mean()),
        excess=float(apart.mean()),
        standard_error=_standard_error(apart),
        error=found.mean_error,
    )

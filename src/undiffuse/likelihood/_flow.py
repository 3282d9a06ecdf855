"""The probability-flow equation for one batch, and the trace along it.

y = u / sqrt(v + s^2) is carried over t = ln s, for which isotropic data of variance v stand still:

    dy/dt = y v / r^2 - D / r,    d ln p_y / dt = tr dD/du - d v / r^2,    r^2 = v + s^2

Nothing grows and nothing cancels, and for smooth data the integrand is analytic in t and falls off
at both ends, so that Gauss-Legendre points converge geometrically. Only at these points is the
trace needed, which costs far more than the path between them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.noise import NoiseLevel, Schedule, Stream, keyed_uniform

Pictures = Float[Tensor, "n c h w"]
Values = Float[Tensor, "n"]
Columns = Float[Tensor, "n k"]  # one column per probe; a single one for exact traces
Labelled = Callable[..., Tensor]  # (x, level, label) -> estimate of x0
Done = Callable[[int], None]  # so many pictures have passed one more point

EXACT_UP_TO = 256  # values per picture
PROBES = 8
MOMENTS = 8
SPREAD = 0.5  # root of v, the deviation of usual pictures: decides the speed alone

_PART = 1 << 41  # of a picture's stream

# Dormand & Prince 1980, RK5(4)7M, without the row that only the embedded method needs.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_WEIGHTS = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)


# --- directions of the trace --------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """All unit vectors: their products with the Jacobian add up to its trace."""

    count: int
    probes: int = 0

    def of(self, index: Tensor) -> "Units":
        """For some of the pictures."""
        del index
        return self

    def groups(self, like: Pictures, size: int) -> Iterator[Float[Tensor, "m n c h w"]]:
        """At most `size` vectors at a time, for every picture."""
        for rows in torch.arange(self.count).split(size):
            units = like.new_zeros(len(rows), self.count)
            units[torch.arange(len(rows)), rows] = 1
            yield units.reshape(-1, 1, *like.shape[1:]).expand(-1, len(like), -1, -1, -1)

    def columns(self, products: Float[Tensor, "directions n"]) -> Columns:
        return products.sum(0).unsqueeze(1)


@dataclass(frozen=True)
class Signs:
    """Vectors of random signs: the expectation of each product is the trace (Hutchinson 1990)."""

    signs: Float[Tensor, "k n c h w"]

    @property
    def count(self) -> int:
        return len(self.signs)

    @property
    def probes(self) -> int:
        return len(self.signs)

    def of(self, index: Tensor) -> "Signs":
        """For some of the pictures."""
        return Signs(self.signs[:, index])

    def groups(self, like: Pictures, size: int) -> Iterator[Float[Tensor, "m n c h w"]]:
        """At most `size` vectors at a time, for every picture."""
        yield from self.signs.to(like).split(size)

    def columns(self, products: Float[Tensor, "directions n"]) -> Columns:
        return products.mT


Directions = Units | Signs


def directions(x0: Pictures, asked: int | None, seed: int, positions: range) -> Directions:
    """As many as asked for, those of a picture by (seed, position) alone; None: by its size."""
    size = x0[0].numel()
    count = (size if size <= EXACT_UP_TO else PROBES) if asked is None else min(asked, size)
    if count == size:
        return Units(size)
    draws = keyed_uniform(seed, Stream.EVALUATE, positions, count * size, _PART)
    signs = torch.from_numpy(draws).lt(0.5).float() * 2 - 1
    return Signs(signs.reshape(len(x0), count, *x0.shape[1:]).transpose(0, 1))


# --- the equation -------------------------------------------------------------------------------


def radius(t: float) -> float:
    """r, the length of a unit of y."""
    return math.hypot(SPREAD, math.exp(t))


@dataclass(frozen=True)
class Flow:
    """The equation for one batch; u and y are float64 on the CPU."""

    denoiser: Labelled
    schedule: Schedule
    label: Tensor | None
    directions: Directions
    kind: Tensor  # has the denoiser's dtype and device
    at_once: int  # pictures that the denoiser is called with

    def of(self, index: Tensor) -> "Flow":
        """For some of the pictures."""
        label = None if self.label is None else self.label[index.to(self.label.device)]
        return replace(self, label=label, directions=self.directions.of(index))

    def estimate(self, u: Pictures, t: float) -> Pictures:
        """D at ln(sigma / alpha) = t."""
        level = self._level(t)
        with torch.no_grad():
            return self._called((level.alpha * u).to(self.kind), level, 1).cpu().double()

    def traced(self, u: Pictures, t: float) -> tuple[Pictures, Columns]:
        """D, and the trace of dD/du.

        Small batches are repeated, up to what is allowed at once, for as many directions.
        """
        level, size = self._level(t), len(u)
        copies = self.copies(size)
        x = (level.alpha * u).to(self.kind).repeat(copies, 1, 1, 1).requires_grad_()
        products: list[Tensor] = []
        with torch.enable_grad():
            x0 = self._called(x, level, copies)
            for group in self.directions.groups(x.detach()[:size], copies):
                v = group.flatten(0, 1)
                (back,) = torch.autograd.grad(x0[: len(v)], x, v, retain_graph=True)
                along = (back[: len(v)] * v).flatten(1).sum(1)
                products.append(along.reshape(-1, size).cpu().double())
        trace = self.directions.columns(torch.cat(products)) * level.alpha
        return x0[:size].detach().cpu().double(), trace

    def copies(self, size: int) -> int:
        """How often a batch of so many pictures is repeated for the trace."""
        return min(self.directions.count, max(1, self.at_once // size))

    def slope(self, y: Pictures, x0: Pictures, t: float) -> Pictures:
        """dy/dt, from the estimate there."""
        return y * (SPREAD / radius(t)) ** 2 - x0 / radius(t)

    def step(self, y: Pictures, slope: Pictures, t: float, then: float) -> Pictures:
        """y at `then`, by one step of order 5 that begins with `slope`."""
        h, slopes = then - t, [slope]
        for node, row in zip(_NODES, _STAGES, strict=True):
            there, at = _moved(y, slopes, row, h), t + node * h
            slopes.append(self.slope(there, self.estimate(there * radius(at), at), at))
        return _moved(y, slopes, _WEIGHTS, h)

    def _level(self, t: float) -> NoiseLevel:
        at = self.schedule.at(torch.tensor([math.exp(t)], dtype=torch.float64))
        return NoiseLevel(*(value[0] for value in at))

    def _called(self, x: Pictures, level: NoiseLevel, copies: int) -> Pictures:
        label = None if self.label is None else self.label.repeat(copies)
        return self.denoiser(x, level, label)


def _moved(y: Tensor, slopes: Sequence[Tensor], weights: Sequence[float], h: float) -> Tensor:
    return y + h * sum(w * slope for w, slope in zip(weights, slopes, strict=True))


# --- from the lowest level to the highest -------------------------------------------------------


class Carried(NamedTuple):
    """ln p at the lowest level; the size of the correction at the highest; and moments of the
    integrand, whose 0th is part of ln p: what another grid should agree in."""

    log_density: Columns
    prior: Values
    moments: Float[Tensor, "n j"]


def cost(flow: Flow, size: int, points: int) -> tuple[int, int]:
    """Evaluations and products that `carry` takes for each of `size` pictures.

    Evaluations are the first slope, five more per step, the mean at the end and, at every point and
    at the end, as many as there are copies.
    """
    traces = points + 1
    return 2 + 5 * (points + 1) + flow.copies(size) * traces, flow.directions.count * traces


def carry(flow: Flow, u: Pictures, ends: tuple[float, float], points: int, done: Done) -> Carried:
    """From ln of the lowest ratio to ln of the highest, collecting the trace at `points`."""
    size, (t, last) = u[0].numel(), ends
    places, weights = gauss_legendre(t, last, points)
    integrals = u.new_zeros(MOMENTS + 1, len(u), 1)
    y, start = u / radius(t), radius(t)
    slope = flow.slope(y, flow.estimate(u, t), t)
    for place, weight in zip(places.tolist(), weights.mT, strict=True):
        y, t = flow.step(y, slope, t, place), place
        x0, trace = flow.traced(y * radius(t), t)
        slope = flow.slope(y, x0, t)
        integrand = trace - size * (SPREAD / radius(t)) ** 2
        integrals = integrals + weight.reshape(-1, 1, 1) * integrand
        done(len(u))
    known, correction = _prior(flow, flow.step(y, slope, t, last) * radius(last), last)
    grown = size * math.log(radius(last) / start)
    return Carried(known - integrals[0] + grown, correction, integrals[1:].mean(2).mT)


def gauss_legendre(
    low: float, high: float, points: int
) -> tuple[Float[Tensor, "points"], Float[Tensor, "j points"]]:
    """Places from low to high; and weights for the integral and for those with the Legendre
    polynomials of degree 1 to 8, by eigenvectors (Golub & Welsch 1969)."""
    k = torch.arange(1, points, dtype=torch.float64)
    beside = torch.diag(k / (4 * k.square() - 1).sqrt(), 1)
    places, vectors = torch.linalg.eigh(beside + beside.mT)
    half, degree = (high - low) / 2, torch.arange(MOMENTS + 1, dtype=torch.float64)
    weights = vectors[0] * vectors[: MOMENTS + 1] * 2 / (2 * degree + 1).sqrt().unsqueeze(1)
    return low + half * (places + 1), half * weights


def _prior(flow: Flow, u: Pictures, t: float) -> tuple[Columns, Values]:
    """ln p at the highest level, N(m, s^2 I) with a correction; and the size of its two terms.

    m is the data's mean as the denoiser sees it, D at x = 0, where the noise tells nothing; that is
    right up to the data's covariance S over s^2. To that order S / s^2 = dD/du = J and
    J (u - m) = D - m, so the next term of ln N(u; m, S + s^2 I) is
    ((u - m) . (D - m) / s^2 - tr J) / 2.
    """
    variance, size = math.exp(2 * t), u[0].numel()
    mean = flow.estimate(torch.zeros_like(u), t)
    x0, trace = flow.traced(u, t)
    away = (u - mean).flatten(1)
    known = -(away.square().sum(1) / variance + size * math.log(2 * math.pi * variance)) / 2
    pull = (away * (x0 - mean).flatten(1)).sum(1) / variance
    size_of_both = (pull.abs() + trace.mean(1).abs()) / 2
    return (known + pull / 2).unsqueeze(1) - trace / 2, size_of_both


def below(flow: Flow, u: Pictures, t: float) -> Columns:
    """What ln p gains from s = exp(t) down to 0 where u stays, to first order in s^2.

    The heat equation gives -s^2 / 2 (lap ln p + |grad ln p|^2), and the denoiser grad ln p =
    (D - u) / s^2 and lap ln p = (tr J - d) / s^2.
    """
    x0, trace = flow.traced(u, t)
    pull = (x0 - u).flatten(1).square().sum(1, keepdim=True) / math.exp(2 * t)
    return (u[0].numel() - trace - pull) / 2

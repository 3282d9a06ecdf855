"""Samplers: from noise to pictures, one level at a time.

A sampler is a generator function `sampler(denoise, x, levels, noise=...)`. It yields a `Step`
after every level, so the caller cuts a film, draws a progress bar or stops, all from outside:

    *_, last = ddim(denoise, x, levels(schedule, 20))
    pictures = last.x

`denoise` is any function (x, level) -> estimate of x0; an exact one from `oracles` will do.
Histories of multistep methods are local variables, so nothing is left over between calls.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, zip_longest
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.noise import NoiseLevel

Pictures = Float[Tensor, "b c h w"]
Denoise = Callable[[Pictures, NoiseLevel], Pictures]
Draw = Callable[[int], Tensor]  # step index -> standard normal numbers in the shape of x
Estimate = tuple[Tensor, NoiseLevel]  # of x0, and the level at which it was made


class Step(NamedTuple):
    """x after the step, the estimate of x0 that led there, and the level that x is at now."""

    x: Tensor
    x0: Tensor
    level: NoiseLevel


@runtime_checkable
class Sampler(Protocol):
    """What all samplers here have in common."""

    def __call__(
        self,
        denoise: Denoise,
        x: Pictures,
        levels: Sequence[NoiseLevel],
        *,
        noise: Draw | None = None,
    ) -> Iterator[Step]: ...


def start(level: NoiseLevel, noise: Pictures) -> Pictures:
    """The noisiest x, as if the picture under it were mid-grey (x0 = 0)."""
    return level.sigma * noise


def ddim(
    denoise: Denoise,
    x: Pictures,
    levels: Sequence[NoiseLevel],
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
) -> Iterator[Step]:
    """DDIM (2010.02502, eq. 12 and 16): order 1; `eta` 1 is ancestral sampling (`ddpm`).

    With 0 < eta fresh noise enters at every step but the last, drawn by `noise(step)`.

    Raises:
        ConfigError: `eta` is outside [0, 1], or above 0 without `noise`.
    """
    _check_eta(eta, noise)
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        kept, fresh = _kept_and_fresh(now, then, eta)
        x = _move(x, x0, now, float(then.alpha), kept)
        if noise is not None and fresh > 0.0:
            x.add_(noise(step), alpha=fresh)
        yield Step(x, x0, then)


def _check_eta(eta: float, noise: Draw | None) -> None:
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta must be in [0, 1]; got {eta}")
    if eta > 0.0 and noise is None:
        raise ConfigError(f"eta {eta:g} adds noise at every step: pass noise")


def _kept_and_fresh(now: NoiseLevel, then: NoiseLevel, eta: float) -> tuple[float, float]:
    """How much of sigma' is the noise that x has, and how much is fresh; the squares add up.

    Fresh is eta * (s'/s) * sqrt(s^2 - (a s'/a')^2), the posterior's deviation (2010.02502, eq. 16);
    nothing is on the way to a noisier level, which may be alpha' = 0.
    """
    (a, s), (a_then, s_then) = _alpha_sigma(now), _alpha_sigma(then)
    if a * s_then >= a_then * s:
        return s_then, 0.0
    fresh = eta * s_then / s * math.sqrt(max(s**2 - (a * s_then / a_then) ** 2, 0.0))
    return math.sqrt(max(s_then**2 - fresh**2, 0.0)), fresh


def _move(x: Tensor, x0: Tensor, now: NoiseLevel, alpha: float, sigma: float) -> Tensor:
    """alpha * x0 + sigma * now.noise_in(x, x0), with the factors of x and x0 gathered."""
    a, s = _alpha_sigma(now)
    return _sum((sigma / s, x), (alpha - a * sigma / s, x0))


def _sum(*terms: tuple[float, Tensor]) -> Tensor:
    """Pictures times their factors, added up in a new tensor: one pass over each."""
    (factor, picture), *rest = terms
    total = factor * picture
    for factor, picture in rest:
        total.add_(picture, alpha=factor)
    return total


def _alpha_sigma(level: NoiseLevel) -> tuple[float, float]:
    """A shared level as numbers; it lies on the CPU, so no device is waited for."""
    return float(level.alpha), float(level.sigma)


ddpm: Sampler = partial(ddim, eta=1.0)


def heun(
    denoise: Denoise,
    x: Pictures,
    levels: Sequence[NoiseLevel],
    *,
    noise: Draw | None = None,
) -> Iterator[Step]:
    """Heun's method on x / alpha over sigma / alpha (2206.00364, algorithm 1): order 2.

    Two evaluations per step; one where a level has sigma = 0 or alpha = 0. With r the ratio
    sigma / alpha and e the Euler step, the mean of both slopes,

        x' / a' = x / a + (r' - r) ((x / a - x0) / r + (e / a' - x0') / r') / 2,

    is e with a correction: x' = e + a' (r / r' - 1) / 2 (x0' - x0).
    """
    del noise  # deterministic
    for now, then in pairwise(levels):
        x0 = denoise(x, now)
        (a, s), (a_then, s_then) = _alpha_sigma(now), _alpha_sigma(then)
        euler = _move(x, x0, now, a_then, s_then)
        if _endless(now, then):
            yield Step(x := euler, x0, then)
            continue
        correction = a_then * (s / a * a_then / s_then - 1.0) / 2.0
        x = torch.add(euler, denoise(euler, then) - x0, alpha=correction)
        yield Step(x, x0, then)


def dpmpp_2m(
    denoise: Denoise,
    x: Pictures,
    levels: Sequence[NoiseLevel],
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
) -> Iterator[Step]:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): order 2, one evaluation per step.

    It is `ddim` with the estimate extrapolated to the middle of the step, and `eta` is ddim's: 1 is
    SDE-DPM-Solver++(2M) (`dpmpp_2m_sde`), with fresh noise at every step but the last. The first
    step and the step to the clean level are of order 1.

    Raises:
        ConfigError: `eta` is outside [0, 1], or above 0 without `noise`.
    """
    _check_eta(eta, noise)
    last: Estimate | None = None
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        (a, s), a_then = _alpha_sigma(now), float(then.alpha)
        kept, fresh = _kept_and_fresh(now, then, eta)
        of_d = a_then - a * kept / s  # alpha' * -expm1(-h), with alpha and sigma allowed to be 0
        d = _extrapolated(x0, last, now, then)
        x = _sum((kept / s, x), *((of_d * weight, part) for weight, part in d))
        if noise is not None and fresh > 0.0:
            x.add_(noise(step), alpha=fresh)
        last = x0, now
        yield Step(x, x0, then)


def _extrapolated(
    x0: Tensor, last: Estimate | None, now: NoiseLevel, then: NoiseLevel
) -> tuple[tuple[float, Tensor], ...]:
    """d = x0 + (x0 - before) * h / (2 * h_before), as factors and pictures."""
    if last is None or _endless(now, then):
        return ((1.0, x0),)
    before, earlier = last
    weight = _log_step(now, then) / (2.0 * _log_step(earlier, now))
    return (1.0 + weight, x0), (-weight, before)


def _log_step(now: NoiseLevel, then: NoiseLevel) -> float:
    """h: the step in ln(alpha / sigma); infinite from alpha = 0."""
    return math.log(float(now.ratio) / float(then.ratio))


def _endless(now: NoiseLevel, then: NoiseLevel) -> bool:
    """Whether h is infinite: from alpha = 0 or to sigma = 0, or upwards to alpha = 0."""
    return 0.0 in (float(now.alpha), float(then.sigma), float(then.alpha))


dpmpp_2m_sde: Sampler = partial(dpmpp_2m, eta=1.0)


# --- polynomials in ln(alpha / sigma) -----------------------------------------------------------
#
# With h the step in ln(alpha / sigma), the probability-flow equation is solved by
#
#     x' = sigma' / sigma * x + alpha' * integral of e^(tau - h) x0(tau), tau from 0 to h
#
# (2211.01095, proposition 4.1). The next two put a polynomial through the estimates of x0, at their
# uneven distances, and integrate it exactly: x' is a weighted sum of x and the estimates.


def dpmpp_3m(
    denoise: Denoise,
    x: Pictures,
    levels: Sequence[NoiseLevel],
    *,
    noise: Draw | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(3M) (2211.01095): order 3, one evaluation per step.

    A parabola through the last three estimates. The first step and the step to the clean level are
    of order 1, the second is of order 2. (Widespread programs take half of the parabola's second
    difference where the integral has all of it; theirs is of order 2.)
    """
    del noise  # deterministic
    seen: list[Estimate] = []
    for now, then in pairwise(levels):
        seen = [(denoise(x, now), now), *seen]
        x = _weighted(x, now, then, _integrals(now, then, _places(seen)), seen)
        yield Step(x, seen[0][0], then)
        seen = _remembered(seen, 2)


def unipc(
    denoise: Denoise,
    x: Pictures,
    levels: Sequence[NoiseLevel],
    *,
    noise: Draw | None = None,
    order: int = 3,
) -> Iterator[Step]:
    """UniPC (2302.04867) for estimates of x0, with B(h) = e^h - 1: order `order` + 1.

    A predictor through the last `order` estimates, and a corrector: the same step with the estimate
    at its end, which is the next step's own, so there is one evaluation per step. Both are sums of
    the same pictures; correcting x gives each of them another weight. The last steps before the
    clean level have predictors of order 2 and 1.

    Raises:
        ConfigError: `order` is below 1.
    """
    del noise  # deterministic
    if order < 1:
        raise ConfigError(f"order must be at least 1; got {order}")
    seen: list[Estimate] = []
    correction: list[float] = []
    for now, then, highest in _with_falling_order(levels, order):
        seen = [(denoise(x, now), now), *seen]
        places = _places(seen)[:highest]
        predictor = _unipc_weights(now, then, places)
        shrink = float(then.sigma / now.sigma)
        weights = [
            shrink * corrected + predicted
            for corrected, predicted in zip_longest(correction, predictor, fillvalue=0.0)
        ]
        x = _weighted(x, now, then, weights, seen)
        yield Step(x, seen[0][0], then)
        corrector = _unipc_weights(now, then, [then, *places])
        correction = [c - p for c, p in zip(corrector, [0.0, *predictor], strict=True)]
        seen = _remembered(seen, order)


def _with_falling_order(
    levels: Sequence[NoiseLevel], order: int
) -> Iterator[tuple[NoiseLevel, NoiseLevel, int]]:
    """Each step with its highest order: in front of the clean level no more than steps are left."""
    clean_end = float(levels[-1].sigma) == 0.0
    for left, (now, then) in zip(range(len(levels) - 1, 0, -1), pairwise(levels), strict=True):
        yield now, then, min(order, left) if clean_end else order


def _unipc_weights(now: NoiseLevel, then: NoiseLevel, places: Sequence[NoiseLevel]) -> list[float]:
    """`_integrals`, but where only one difference is known half of B(h), as UniPC has it."""
    if len(places) != 2 or _endless(now, then):
        return _integrals(now, then, places)
    (whole,) = _integrals(now, then, [now])
    (other,) = (place for place in places if place is not now)
    half = whole / 2.0 * _log_step(now, then) / _log_step(now, other)
    return [half if place is other else whole - half for place in places]


def _integrals(now: NoiseLevel, then: NoiseLevel, places: Sequence[NoiseLevel]) -> list[float]:
    """alpha' * the integral of e^(tau - h) times the Lagrange polynomial of each place.

    In a step of infinite h the estimate at `now` counts alone.
    """
    if _endless(now, then):
        whole = float(then.alpha - now.alpha * then.sigma / now.sigma)
        return [whole * (place is now) for place in places]
    h = _log_step(now, then)
    moments = [-math.expm1(-h)]  # of (tau / h)^0, then each from the one before, by parts
    for power in range(1, len(places)):
        moments.append(1.0 - power / h * moments[-1])
    points = torch.tensor([_log_step(now, place) / h for place in places], dtype=torch.float64)
    powers = torch.vander(points, increasing=True).mT
    weights = torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64))
    return (weights * float(then.alpha)).tolist()


def _weighted(
    x: Tensor, now: NoiseLevel, then: NoiseLevel, weights: Sequence[float], seen: list[Estimate]
) -> Tensor:
    """sigma' / sigma * x + the estimates times their weights."""
    parts = ((weight, x0) for weight, (x0, _) in zip(weights, seen, strict=False))
    return _sum((float(then.sigma / now.sigma), x), *parts)


def _places(seen: list[Estimate]) -> list[NoiseLevel]:
    return [level for _, level in seen]


def _remembered(seen: list[Estimate], count: int) -> list[Estimate]:
    """The newest; what was estimated at alpha = 0 lies infinitely far away."""
    return [one for one in seen[:count] if float(one[1].alpha) > 0.0]


# --- constant steps -----------------------------------------------------------------------------

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(
    denoise: Denoise,
    x: Pictures,
    levels: Sequence[NoiseLevel],
    *,
    noise: Draw | None = None,
    order: int = 4,
) -> Iterator[Step]:
    """iPNDM (2204.13902): Adams-Bashforth on the noise, one evaluation per step.

    The slope of x / alpha over sigma / alpha is the noise in x (2010.02502, eq. 14); it is
    extrapolated as if all steps were equally long. On uneven grids that is of order 2, and still
    hard to beat at few steps. The first steps are of lower order, that to the clean level of 1.

    Raises:
        ConfigError: `order` is not 1, 2, 3 or 4.
    """
    del noise  # deterministic
    if order not in range(1, len(ADAMS_BASHFORTH) + 1):
        raise ConfigError(f"order must be 1, 2, 3 or 4; got {order}")
    slopes: list[Tensor] = []
    for now, then in pairwise(levels):
        x0 = denoise(x, now)
        (a, s), (a_then, s_then) = _alpha_sigma(now), _alpha_sigma(then)
        slopes = [_sum((1.0 / s, x), (-a / s, x0)), *slopes][:order]
        first, *others = ADAMS_BASHFORTH[0 if s_then == 0.0 else len(slopes) - 1]
        # ddim's step with the newest slope, and a' * (r' - r) times what the others change
        reach = s_then - a_then * s / a if others else 0.0
        parts = ((reach * weight, slope) for weight, slope in zip(others, slopes[1:], strict=False))
        x = _sum((a_then, x0), (s_then + reach * (first - 1.0), slopes[0]), *parts)
        yield Step(x, x0, then)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "ipndm": ipndm,
}


def finish(steps: Iterator[Step]) -> Pictures:
    """Run a sampler to its end and return the pictures."""
    *_, last = steps
    return last.x

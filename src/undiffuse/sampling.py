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
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.noise import NoiseLevel

Pictures = Float[Tensor, "b c h w"]
Denoise = Callable[[Pictures, NoiseLevel], Pictures]
Draw = Callable[[int], Tensor]  # step index -> standard normal numbers in the shape of x


class Step(NamedTuple):
    """x after the step, the estimate of x0 that led there, and the level that x is at now."""

    x: Tensor
    x0: Tensor
    level: NoiseLevel


@runtime_checkable
class Sampler(Protocol):
    """What `ddim`, `ddpm`, `heun` and `dpmpp_2m` have in common."""

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
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta must be in [0, 1]; got {eta}")
    if eta > 0.0 and noise is None:
        raise ConfigError(f"eta {eta:g} adds noise at every step: pass noise")
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        fresh = _fresh_sigma(now, then, eta)
        kept = math.sqrt(max(float(then.sigma) ** 2 - fresh**2, 0.0))
        x = _move(x, x0, now, float(then.alpha), kept)
        if noise is not None and fresh > 0.0:
            x.add_(noise(step), alpha=fresh)
        yield Step(x, x0, then)


def _fresh_sigma(now: NoiseLevel, then: NoiseLevel, eta: float) -> float:
    """eta * (s'/s) * sqrt(s^2 - (a s'/a')^2): the posterior's deviation (2010.02502, eq. 16)."""
    (a, s), (a_then, s_then) = _alpha_sigma(now), _alpha_sigma(then)
    return eta * s_then / s * math.sqrt(max(s**2 - (a * s_then / a_then) ** 2, 0.0))


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
        if s_then == 0.0 or a == 0.0:
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
) -> Iterator[Step]:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): order 2, one evaluation per step.

    The first step and the step to the clean level are of order 1.
    """
    del noise  # deterministic
    last: tuple[Tensor, NoiseLevel] | None = None
    for now, then in pairwise(levels):
        x0 = denoise(x, now)
        (a, s), (a_then, s_then) = _alpha_sigma(now), _alpha_sigma(then)
        # -expm1(-h) = 1 - (sigma'/alpha')/(sigma/alpha), with alpha and sigma allowed to be 0
        of_d = a_then * (1.0 - a * s_then / (s * a_then))
        d = _extrapolated(x0, last, now, then)
        x = _sum((s_then / s, x), *((of_d * weight, part) for weight, part in d))
        last = x0, now
        yield Step(x, x0, then)


def _extrapolated(
    x0: Tensor, last: tuple[Tensor, NoiseLevel] | None, now: NoiseLevel, then: NoiseLevel
) -> tuple[tuple[float, Tensor], ...]:
    """d = x0 + (x0 - before) * h / (2 * h_before), as factors and pictures."""
    if last is None or float(then.sigma) == 0.0:
        return ((1.0, x0),)
    before, earlier = last
    weight = _log_step(now, then) / (2.0 * _log_step(earlier, now))
    return (1.0 + weight, x0), (-weight, before)


def _log_step(now: NoiseLevel, then: NoiseLevel) -> float:
    """h: the step in ln(alpha / sigma); infinite from alpha = 0."""
    return math.log(float(now.ratio) / float(then.ratio))


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m}


def finish(steps: Iterator[Step]) -> Pictures:
    """Run a sampler to its end and return the pictures."""
    *_, last = steps
    return last.x

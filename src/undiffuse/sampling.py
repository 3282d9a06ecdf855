"""Samplers: from noise to pictures, one level at a time.

A sampler is a generator function `sampler(denoise, x, levels, noise=...)`. It yields a `Step`
after every level, so the caller cuts a film, draws a progress bar or stops, all from outside:

    *_, last = ddim(denoise, x, levels(schedule, 20))
    pictures = last.x

`denoise` is any function (x, level) -> estimate of x0; an exact one from `oracles` will do.
Histories of multistep methods are local variables, so nothing is left over between calls.
"""

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
        kept = (then.sigma**2 - fresh**2).clamp(min=0).sqrt()
        x = then.alpha * x0 + kept * now.noise_in(x, x0)
        if noise is not None and bool(fresh > 0):
            x = x + fresh * noise(step)
        yield Step(x, x0, then)


def _fresh_sigma(now: NoiseLevel, then: NoiseLevel, eta: float) -> Tensor:
    """eta * (s'/s) * sqrt(s^2 - (a s'/a')^2): the posterior's deviation (2010.02502, eq. 16)."""
    left = (now.sigma**2 - (now.alpha * then.sigma / then.alpha) ** 2).clamp(min=0)
    return eta * then.sigma / now.sigma * left.sqrt()


ddpm: Sampler = partial(ddim, eta=1.0)


def heun(
    denoise: Denoise,
    x: Pictures,
    levels: Sequence[NoiseLevel],
    *,
    noise: Draw | None = None,
) -> Iterator[Step]:
    """Heun's method on x / alpha over sigma / alpha (2206.00364, algorithm 1): order 2.

    Two evaluations per step; one where a level has sigma = 0 or alpha = 0.
    """
    del noise  # deterministic
    for now, then in pairwise(levels):
        x0 = denoise(x, now)
        euler = then.alpha * x0 + then.sigma * now.noise_in(x, x0)
        if bool(then.sigma == 0) or bool(now.alpha == 0):
            yield Step(x := euler, x0, then)
            continue
        slope = now.noise_in(x, x0)
        slope = (slope + then.noise_in(euler, denoise(euler, then))) / 2
        x = then.alpha * (x / now.alpha + (then.ratio - now.ratio) * slope)
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
        d = _extrapolated(x0, last, now, then)
        # -expm1(-h) = 1 - (sigma'/alpha')/(sigma/alpha), with alpha and sigma allowed to be 0
        shrink = now.alpha * then.sigma / (now.sigma * then.alpha)
        x = then.sigma / now.sigma * x + then.alpha * (1 - shrink) * d
        last = x0, now
        yield Step(x, x0, then)


def _extrapolated(
    x0: Tensor, last: tuple[Tensor, NoiseLevel] | None, now: NoiseLevel, then: NoiseLevel
) -> Tensor:
    if last is None or bool(then.sigma == 0):
        return x0
    before, earlier = last
    step, step_before = _log_step(now, then), _log_step(earlier, now)
    return x0 + (x0 - before) * (step / (2 * step_before))


def _log_step(now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """h: the step in ln(alpha / sigma)."""
    return torch.log(then.alpha / then.sigma) - torch.log(now.alpha / now.sigma)


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m}


def finish(steps: Iterator[Step]) -> Pictures:
    """Run a sampler to its end and return the pictures."""
    *_, last = steps
    return last.x

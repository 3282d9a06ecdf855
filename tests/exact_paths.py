"""Gaussian data, whose probability-flow paths are a formula, for the tests of samplers."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.guidance import with_label
from undiffuse.noise import Cosine, Flow, Karras, LinearBetas, NoiseLevel, Schedule, descending
from undiffuse.oracles import Gaussian, fit_gaussian, gaussian_flow
from undiffuse.sampling import Denoise, Draw, Sampler, Step, finish

SCHEDULES: list[Schedule] = [LinearBetas(), Cosine(), Karras(), Flow()]
DOUBLINGS = (64, 128, 256, 512)


def name(value: object) -> str:
    return getattr(value, "__name__", type(value).__name__)


def diagonal(*variances: float, mean: float = 0.0) -> Gaussian:
    """Pictures of one row with independent values."""
    values = torch.tensor(variances, dtype=torch.float64)
    centre = torch.full((1, 1, len(values)), mean, dtype=torch.float64)
    return Gaussian(centre, values, torch.eye(len(values), dtype=torch.float64))


def ones(g: Gaussian) -> Tensor:
    return torch.ones(1, *g.mean.shape, dtype=torch.float64)


QUARTER = diagonal(0.25)


def ratio_grid(schedule: Schedule, steps: int, graded: bool = False) -> tuple[NoiseLevel, ...]:
    """sigma / alpha from 5 to 0.05 by Karras spacing with rho = 7, without the clean end.

    `graded` puts one more level shortly after the first, so that the first step, which is of order
    1 for want of a history, is short enough for methods of order 3.
    """
    ratios = torch.linspace(5 ** (1 / 7), 0.05 ** (1 / 7), steps + 1, dtype=torch.float64) ** 7
    if graded:
        early = ratios[0] * (ratios[1] / ratios[0]) ** (1 / steps)
        ratios = torch.cat((ratios[:1], early[None], ratios[1:]))
    return descending(schedule, ratios)


def relative_error(
    sampler: Sampler, denoiser: Denoiser | Gaussian, grid: Sequence[NoiseLevel], g: Gaussian
) -> float:
    x = ones(g) * grid[0].alpha  # the same x / alpha everywhere
    exact = gaussian_flow(g, x, grid[0], grid[-1])
    end = finish(sampler(with_label(denoiser, None), x, grid))
    return float(((end - exact).abs() / exact.abs()).max())


def slope(error: Callable[[int], float], steps: Sequence[int] = DOUBLINGS) -> float:
    """The order: minus the slope of ln(error) against ln(steps)."""
    errors = [error(n) for n in steps]
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def moments(
    sampler: Sampler, g: Gaussian, grid: Sequence[NoiseLevel]
) -> tuple[Tensor, Tensor, Tensor]:
    """A sampler's exact affine map: where x = 0 ends, factor of x, variance from its own noise.

    Running on 0 and on unit x without noise gives the first two; unit noise at one step gives that
    step's coefficient.
    """
    zero, denoise = torch.zeros_like(ones(g)), with_label(g, None)

    def run(x: Tensor, at: int | None) -> Tensor:
        draw: Draw = lambda step: ones(g) if step == at else zero  # noqa: E731
        return finish(sampler(denoise, x, grid, noise=draw)).flatten()

    offset = run(zero, None)
    fresh = [(run(zero, step) - offset).square() for step in range(len(grid) - 1)]
    return offset, run(ones(g), None) - offset, torch.stack(fresh).sum(0)


@cache
def digits() -> Gaussian:
    """The Gaussian of the training digits, along its own directions, with its mean."""
    data = load_digits()
    index = np.random.default_rng(0).permutation(len(data.images))[:1437]
    fitted = fit_gaussian(torch.from_numpy(data.images[index] / 8 - 1).unsqueeze(1))
    mean = fitted.eigenvectors.mT @ fitted.mean.flatten()
    eye = torch.eye(len(mean), dtype=torch.float64)
    return Gaussian(mean.reshape(1, 1, -1), fitted.eigenvalues, eye)


def centred(g: Gaussian) -> Gaussian:
    return diagonal(*g.eigenvalues.tolist())


def distance(g: Gaussian, variance: Tensor, bias: Tensor | float = 0.0) -> float:
    """Relative W2 between the sampler's Gaussian and the data's, both along g's directions."""
    squares = (variance.sqrt() - g.eigenvalues.sqrt()) ** 2 + bias**2
    return float((squares.sum() / g.eigenvalues.sum()).sqrt())


def parabola(curvature: float, second: Callable[[float], float]) -> Sampler:
    """DPM-Solver++(3M) spelled out with first and second differences of the estimates.

    x' = s'/s x + a' ((1 - e^-h) D + phi_2 D' + curvature * phi_3 D''), with h times the first
    derivative D' and h^2 / 2 times the second D'' of the parabola through the last three estimates.
    `second(h)` is the factor of the only difference in the second step. The integral of the
    parabola has curvature 2; Hugging Face diffusers has 1.
    """

    def sampler(
        denoise: Denoise, x: Tensor, levels: Sequence[NoiseLevel], *, noise: Draw | None = None
    ) -> Iterator[Step]:
        del noise
        seen: list[tuple[Tensor, float]] = []
        for now, then in pairwise(levels):
            x0 = denoise(x, now)
            seen = [(x0, -float(now.ratio.log())), *seen][:3]
            if float(then.sigma) == 0:
                yield Step(x0, x0, then)
                return
            (d, at), h = seen[0], float((now.ratio / then.ratio).log())
            moved = -np.expm1(-h) * d
            slopes = [h * (p - q) / (m - n) for (p, m), (q, n) in pairwise(seen)]
            if len(slopes) == 1:
                moved = moved + second(h) * slopes[0]
            if len(slopes) == 2:
                bend = h * (slopes[0] - slopes[1]) / (at - seen[2][1])
                slope = slopes[0] + bend * (at - seen[1][1]) / h
                moved = moved + phi_2(h) * slope + curvature * (0.5 - phi_2(h) / h) * bend
            x = then.sigma / now.sigma * x + then.alpha * moved
            yield Step(x, x0, then)

    return sampler


def phi_2(h: float) -> float:
    """The integral of e^(tau - h) tau / h, tau from 0 to h."""
    return 1.0 + float(np.expm1(-h)) / h

"""Uses of a trained denoiser: how noisy is this picture, fill the hole, change it, mix two.

Everything here is mathematics on a denoise function (x, level) -> estimate of x0, such as a guided
network or an oracle. A picture with noise of standard deviation s is x / alpha at a level whose
ratio sigma / alpha is s. Most of it rests on Tweedie's formulas, exact for a posterior mean D:

    score of x:  (alpha D - x) / sigma^2        Cov(x0 | x) = sigma^2 / alpha * dD/dx

(Efron 2011, "Tweedie's formula and selection bias"; the covariance in 2310.06721).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.guidance import clipped
from undiffuse.noise import NoiseLevel, Schedule, descending
from undiffuse.sampling import (
    Denoise,
    Draw,
    Sampler,
    Step,
    ddpm,
    dpmpp_2m_sde,
    finish,
    heun,
)

Pictures = Float[Tensor, "b c h w"]
Shared = Float[Tensor, "#b c h w"]  # one for each picture, or one for all
Hole = Bool[Tensor, "#b #c h w"]  # True where a picture is to be filled in

DIFFERENCE = 0.05  # of a noise level: the step of finite differences
ROUGH, FINE = 13, 7  # noise levels that an unknown one is compared with, far apart and near


# --- how noisy is it? ---------------------------------------------------------------------------


def likelihood_slope(
    denoise: Denoise, x: Pictures, level: NoiseLevel, probes: Sequence[Shared]
) -> Pictures:
    """d ln p_s(x) / d ln s by pixel, at s = sigma / alpha of `level`; the sum is the picture's.

    Noise spreads densities by the heat equation, d p / d s = s * Laplacian of p. With D, that is

        d ln p / d ln s = sum of (x - D)^2 / s^2 - (1 - dD/dx)

    over the pixels: 0 where the residual has the variance that D's own derivative promises, which
    is also where Stein's unbiased estimate of the squared error (1981) is Tweedie's s^2 dD/dx.

    Args:
        x: noisy pictures, x0 + s * noise, whatever the schedule's alpha is.
        probes: random signs; the diagonal of dD/dx is the mean of probe * (dD/dx probe)
            (Hutchinson 1990), by a finite difference.
    """
    alpha, s = float(level.alpha), float(level.ratio)
    d, step = denoise(alpha * x, level), DIFFERENCE * s
    diagonal = torch.zeros_like(x)
    for probe in probes:
        moved = denoise(alpha * (x + step * probe), level)
        diagonal += probe * (moved - d) / (step * len(probes))
    return ((x - d) / s).square() - 1 + diagonal


def estimate_sigma(
    denoise: Denoise,
    x: Pictures,
    schedule: Schedule,
    probes: Sequence[Shared],
    low: float = 0.01,
    high: float = 3.0,
) -> float:
    """The standard deviation of the noise in x, one for all of them, by maximum likelihood.

    The slope is integrated over ln s; the estimate is the highest point of ln p_s(x) between `low`
    and `high`, looked for once from end to end and once more in its neighbourhood. Values of
    exactly -1 or 1 do not vote in pictures that keep to [-1, 1]: a file has clipped their noise.

    Args:
        x: one or more pictures, or parts of one picture, with the same noise.
        schedule: has the levels that `denoise` knows; ends beyond them are drawn in.
        probes: as of `likelihood_slope`; the fewer pixels, the more of them.

    Raises:
        ConfigError: not 0 < low < high, or no pixel is left to vote.
    """
    if not 0.0 < low < high < math.inf:
        raise ConfigError(f"sigma is looked for between 0 < low < high; got {low} and {high}")
    votes = _unclipped(x)
    if not bool(votes.any()):
        raise ConfigError("sigma cannot be estimated where every value is -1 or 1; state it")

    def highest(first: float, last: float, count: int) -> float:
        ends = schedule.at(torch.tensor([first, last], dtype=torch.float64).exp()).ratio.log()
        places = torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64)
        grid = descending(schedule, places.exp())
        slopes = [likelihood_slope(denoise, x, level, probes)[votes] for level in grid]
        return _highest(places.tolist(), [float(slope.double().sum()) for slope in slopes])

    ends = math.log(low), math.log(high)
    near = (ends[1] - ends[0]) / (ROUGH - 1)
    rough = highest(*ends, ROUGH)
    return math.exp(highest(max(ends[0], rough - near), min(ends[1], rough + near), FINE))


def _unclipped(x: Pictures) -> Tensor:
    """Where noise left the values free."""
    return (x.abs() < 1) if bool((x.abs() <= 1).all()) else torch.ones_like(x, dtype=torch.bool)


def _highest(places: list[float], slopes: list[float]) -> float:
    """Where a function with these slopes is highest; the slopes are straight in between."""
    best, height, at = 0.0, 0.0, places[0]
    for (a, b), (rise, fall) in zip(pairwise(places), pairwise(slopes), strict=True):
        share = rise / (rise - fall) if rise > 0.0 >= fall else 1.0  # of the way to the top
        there = rise + share * (fall - rise)
        top = height + share * (b - a) * (rise + there) / 2
        if top > best:
            best, at = top, a + share * (b - a)
        height += (b - a) * (rise + fall) / 2
    return at


# --- pictures of other sizes --------------------------------------------------------------------


def reflected(denoise: Denoise, multiple: int) -> Denoise:
    """`denoise` on pictures whose sides are continued to a multiple, as by a mirror at the edge."""

    def padded(x: Pictures, level: NoiseLevel) -> Pictures:
        height, width = x.shape[-2:]
        below, right = -height % multiple, -width % multiple
        if not below and not right:
            return denoise(x, level)
        return denoise(_continued(x, 0, right, 0, below), level)[..., :height, :width]

    return padded


def _continued(
    x: Pictures, left: int, right: int, above: int, below: int
) -> Float[Tensor, "b c y x"]:
    """By a mirror at the edge, or where there is not enough to reflect by the edge itself."""
    mirror = max(left, right) < x.shape[-1] and max(above, below) < x.shape[-2]
    return F.pad(x, (left, right, above, below), mode="reflect" if mirror else "replicate")


def tiled(denoise: Denoise, tile: int, overlap: int) -> Denoise:
    """`denoise` on overlapping square parts, one after the other, blended where they overlap.

    A tile's outermost quarter of the overlap has no say, so what a convolution sees beyond the
    tile does not show if it reaches less far; over the middle half the say grows linearly. Tiles
    lie at multiples of whatever divides tile, overlap and the picture's sides: that must be the
    network's stride, else it halves at other places than in the whole picture.

    Raises:
        ConfigError: not 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ConfigError(f"overlap must be at least 0 and below the tile's {tile}; got {overlap}")

    def blended(x: Pictures, level: NoiseLevel) -> Pictures:
        rows, columns = (_windows(side, tile, overlap) for side in x.shape[-2:])
        total, shares = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        for top, high in rows:
            for left, wide in columns:
                part = (..., slice(top, top + len(high)), slice(left, left + len(wide)))
                share = (high[:, None] * wide).to(x)
                total[part] += share * denoise(x[part], level)
                shares[part] += share
        return total / shares

    return blended


def _windows(side: int, tile: int, overlap: int) -> list[tuple[int, Float[Tensor, "t"]]]:
    """Where tiles begin, and what each pixel's say is in one direction."""
    if side <= tile:
        return [(0, torch.ones(side))]
    last = side - tile
    starts = [*range(0, last, tile - overlap), last]
    near = (torch.arange(tile) + 0.5 - overlap / 4) / max(overlap / 2, 1e-9)
    rising, whole = near.clamp(0, 1), torch.ones(tile)
    return [
        (at, (rising if at else whole) * (rising.flip(0) if at < last else whole)) for at in starts
    ]


# --- inpainting ---------------------------------------------------------------------------------


def filled(
    denoise: Denoise, known: Shared, hole: Hole, iterations: int = 8, tolerance: float = 0.05
) -> Denoise:
    """The estimate of x0 given x and what is known of x0: moment matching (2405.13712).

    As if x0 given x were Gaussian, with mean D and Tweedie's covariance C, the pixels K outside the
    hole pull the others along:

        E[x0 | x, known] = D + C_.K C_KK^-1 (known - D)_K

    For Gaussian data this formula is exact, and every sampler that follows it draws from the exact
    conditional. The system is solved by conjugate residuals: each iteration multiplies with C, one
    backward pass through `denoise`, which therefore must be differentiable. The defaults stop
    early: on Gaussian fields with the spectra of pictures about a twentieth of the correction is
    then left (two iterations leave up to half). Known pixels come back as they are.

    Args:
        known: pictures; values inside the hole are not looked at.
        iterations: at most so many, for every level.
        tolerance: share of known - D that may stay unexplained; and a picture for which an
            iteration explains less than this share of the rest gets no further ones, since it is
            then mostly the network's errors in C that are inverted.

    Raises:
        ConfigError: `iterations` is below 1, or `tolerance` not in [0, 1).
    """
    if iterations < 1:
        raise ConfigError(f"iterations must be at least 1; got {iterations}")
    if not 0.0 <= tolerance < 1.0:
        raise ConfigError(f"tolerance must be at least 0 and below 1; got {tolerance}")

    def pulled(x: Pictures, level: NoiseLevel) -> Pictures:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            mean = denoise(x, level)
        variance = float(level.sigma) ** 2 / max(float(level.alpha), 1e-12)

        def spread(v: Tensor) -> Tensor:
            return variance * torch.autograd.grad(mean, x, v, retain_graph=True)[0]

        missing = torch.where(hole, 0.0, known - mean.detach())
        change = _conditioned(spread, missing, hole, iterations, tolerance)
        return torch.where(hole, mean.detach() + change, known)

    return pulled


def filling(
    known: Shared, hole: Hole, sampler: Sampler = dpmpp_2m_sde, iterations: int = 8
) -> Sampler:
    """`sampler` with `filled` around what it is given, kept within the range of pictures."""

    def fill(
        denoise: Denoise, x: Pictures, levels: Sequence[NoiseLevel], *, noise: Draw | None = None
    ) -> Iterator[Step]:
        told = clipped(filled(denoise, known, hole, iterations))
        return sampler(told, x, levels, noise=noise)

    return fill


def _conditioned(
    spread: Callable[[Pictures], Pictures],
    missing: Pictures,
    hole: Hole,
    iterations: int,
    tolerance: float,
) -> Pictures:
    """C v, where v is 0 inside the hole and C v about `missing` outside.

    By generalised conjugate residuals (Eisenstat, Elman & Schultz 1983), which makes the rest
    smaller with every iteration even where C, a network's derivative, is neither symmetric nor
    positive; conjugate gradients, which need both, make it larger there. Each picture stops alone,
    so that none depends on its batch.
    """
    change, rest = torch.zeros_like(missing), missing
    size = _dot(rest, rest)
    enough, going = tolerance**2 * size, size > 0
    ways: list[tuple[Pictures, Pictures]] = []  # C v everywhere, and outside the hole orthonormal
    for _ in range(iterations):
        if not bool(going.any()):
            break
        seen, outside = _orthonormal(spread(rest), hole, ways)
        ways.append((seen, outside))
        length = torch.where(going, _dot(rest, outside), 0.0)
        change, rest = change + length * seen, rest - length * outside
        size, before = _dot(rest, rest), size
        going &= (size > enough) & (size < (1 - tolerance) ** 2 * before)
    return change


def _orthonormal(
    seen: Pictures, hole: Hole, ways: Sequence[tuple[Pictures, Pictures]]
) -> tuple[Pictures, Pictures]:
    """C v with as much of earlier ways in v as makes it orthogonal to them outside the hole."""
    for earlier, outside in ways:
        seen = seen - _dot(seen, outside) * earlier
    outside = torch.where(hole, 0.0, seen)
    norm = _dot(outside, outside).sqrt().clamp(min=torch.finfo(seen.dtype).tiny)
    return seen / norm, outside / norm


def _dot(a: Pictures, b: Pictures) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


def repaint(
    denoise: Denoise,
    x: Pictures,
    levels: Sequence[NoiseLevel],
    *,
    known: Shared,
    hole: Hole,
    noise: Draw | None = None,
    num_resamples: int = 10,
) -> Iterator[Step]:
    """RePaint (2201.09865, algorithm 1, with jumps of one step): ddpm, told after every step.

    After a step the known pixels are put in, with noise of their own for the level reached. The
    others were made without seeing them: so noise is added back and the step repeated,
    `num_resamples` times in all, until both fit. Once is plain replacement (2011.13456, appendix
    I.2), which is biased; the bias falls with repeats and with steps. Nothing is differentiated.
    With known and hole fixed it is a `Sampler`.

    Raises:
        ConfigError: `num_resamples` is below 1, or there is no `noise`.
    """
    if num_resamples < 1:
        raise ConfigError(f"num_resamples must be at least 1; got {num_resamples}")
    if noise is None:
        raise ConfigError("repaint adds noise at every step: pass noise")
    draws = map(noise, itertools.count())
    for now, then in pairwise(levels):
        step = _told(denoise, x, (now, then), known, hole, draws)
        for _ in range(num_resamples - 1 if float(then.sigma) > 0.0 else 0):
            x = _renoised(step.x, then, now, next(draws))
            step = _told(denoise, x, (now, then), known, hole, draws)
        x = step.x
        yield step


def _told(
    denoise: Denoise,
    x: Pictures,
    levels: tuple[NoiseLevel, NoiseLevel],
    known: Shared,
    hole: Hole,
    draws: Iterator[Tensor],
) -> Step:
    """One step of ddpm, then the known pixels with the noise of the level reached."""
    step = next(ddpm(denoise, x, levels, noise=lambda _: next(draws)))
    then = levels[1]
    told = known.expand_as(x)
    if float(then.sigma) > 0.0:
        told = then.mix(told, next(draws))
    return step._replace(x=torch.where(hole, step.x, told))


def _renoised(x: Pictures, now: NoiseLevel, then: NoiseLevel, noise: Tensor) -> Pictures:
    """From a level to a noisier one, as the forward process goes."""
    scale = float(then.alpha / now.alpha)
    fresh = float(then.sigma) ** 2 - (scale * float(now.sigma)) ** 2
    return scale * x + math.sqrt(max(fresh, 0.0)) * noise


# --- image to image, encoding, interpolation ----------------------------------------------------


def partial_levels(
    schedule: Schedule, levels: Sequence[NoiseLevel], strength: float
) -> tuple[NoiseLevel, ...]:
    """The last part of a grid for sampling: `strength` is the share of its steps that is left.

    Strength 1 is the whole grid, 0 its clean end alone. Between two levels the first step is a part
    of one, from a ratio interpolated geometrically (in front of the clean level linearly), or where
    the first ratio is infinite, from a t interpolated linearly.

    Raises:
        ConfigError: `strength` is outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise ConfigError(f"strength must be in [0, 1]; got {strength}")
    whole, part = divmod(round((1.0 - strength) * (len(levels) - 1), 9), 1.0)
    left = levels[int(whole) :]
    if part == 0.0:
        return tuple(left)
    return (_between(schedule, left[0], left[1], part), *left[1:])


def _between(schedule: Schedule, noisy: NoiseLevel, cleaner: NoiseLevel, part: float) -> NoiseLevel:
    above, below = noisy.ratio, cleaner.ratio
    if bool(above.isinf()):
        return schedule(noisy.t + part * (cleaner.t - noisy.t))
    if float(below) == 0.0:
        return schedule.at(above * (1 - part))
    return schedule.at(above ** (1 - part) * below**part)


def partly(x0: Shared, strength: float, schedule: Schedule, sampler: Sampler) -> Sampler:
    """A sampler that begins with noised pictures instead of noise: SDEdit (2108.01073).

    The noise is that of the start it is given, which at strength 1 is used as it is; at strength 0
    the pictures come back untouched. `strength` is as of `partial_levels`.
    """

    def edit(
        denoise: Denoise, x: Pictures, levels: Sequence[NoiseLevel], *, noise: Draw | None = None
    ) -> Iterator[Step]:
        grid = partial_levels(schedule, levels, strength)
        if len(grid) == 1:
            yield Step(x0.expand_as(x), x0.expand_as(x), grid[0])
            return
        if len(grid) < len(levels) or strength < 1.0:
            x = grid[0].mix(x0.expand_as(x), x / float(levels[0].sigma))
        yield from sampler(denoise, x, grid, noise=noise)

    return edit


def encode(
    denoise: Denoise, x0: Pictures, levels: Sequence[NoiseLevel], sampler: Sampler = heun
) -> Pictures:
    """The noise that a deterministic sampler makes these pictures of: its equation, run upwards.

    `levels` is a grid for sampling, noisiest first; the way starts at its last noisy level. The
    result is x at the first level, sigma times about standard normal numbers. Decoding it with
    the same grid returns the pictures up to the error of both ways (2010.02502, section 5.4).

    Raises:
        ConfigError: `sampler` adds noise; only deterministic ones can be run upwards.
    """
    upwards = [level for level in reversed(levels) if float(level.sigma) > 0.0]
    x = float(upwards[0].alpha) * x0
    return finish(sampler(denoise, x, upwards)) if len(upwards) > 1 else x


def slerp(a: Pictures, b: Pictures, share: float) -> Pictures:
    """The way from a to b on the great circle through both, picture by picture (Shoemake 1985).

    Between independent normal numbers a straight line would pass through numbers of half the
    variance, which no sampler has seen. Parallel ones are joined by a straight line.
    """
    cosine = F.cosine_similarity(a.double().flatten(1), b.double().flatten(1)).clamp(-1, 1)
    angle = cosine.arccos().reshape(-1, 1, 1, 1)
    sine = angle.sin()
    parallel = sine < 1e-6
    first = torch.where(parallel, 1 - share, ((1 - share) * angle).sin() / sine)
    second = torch.where(parallel, share, (share * angle).sin() / sine)
    return (first * a + second * b).to(a.dtype)


# --- how close? ---------------------------------------------------------------------------------

PEAK = 2.0  # the range of pictures, -1 ... 1


def psnr(a: Pictures, b: Pictures) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio in dB, by picture; 126 dB where they are equal."""
    error = (a - b).double().square().flatten(1).mean(1).clamp(min=1e-12)
    return 10 * torch.log10(PEAK**2 / error)


def ssim(a: Pictures, b: Pictures) -> Float[Tensor, "b"]:
    """Structural similarity (Wang et al. 2004, eq. 13), by picture; 1 where they are equal.

    A Gaussian window of deviation 1.5 over 11x11 pixels (over the largest odd square that fits,
    where pictures are smaller), K1 = 0.01, K2 = 0.03; the mean over channels and all places where
    the window lies within the picture.
    """
    size = min(11, *(side - 1 + side % 2 for side in a.shape[-2:]))
    places = torch.arange(size, dtype=torch.float64, device=a.device) - size // 2
    line = torch.exp(-places.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(v: Tensor) -> Tensor:
        return F.conv2d(v.flatten(0, 1)[:, None], window).unflatten(0, a.shape[:2])

    a, b = a.double(), b.double()
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


def local_wiener(x: Pictures, sigma: float, window: int = 3) -> Pictures:
    """The adaptive Wiener filter (Lee 1980): the mean of the surroundings, and of the deviation
    from it the share that noise of this sigma does not explain. For comparison."""
    edge = window // 2

    def mean(v: Tensor) -> Tensor:
        return F.avg_pool2d(_continued(v, edge, edge, edge, edge), window, stride=1)

    centre = mean(x)
    spread = (mean(x * x) - centre**2).clamp(min=sigma**2)
    return centre + (1 - sigma**2 / spread) * (x - centre)

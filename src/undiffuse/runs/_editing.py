"""From a model and pictures to other pictures: cleaned, filled in, changed, in between."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undiffuse import cost, editing, runtime
from undiffuse.checkpoint import Model
from undiffuse.config import Precision
from undiffuse.errors import ConfigError, DataError, ResourceError
from undiffuse.guidance import Denoise, clipped, with_label
from undiffuse.noise import KarrasSpacing, NoiseLevel, Stream, keyed_normal, levels
from undiffuse.runs._generate import (
    Interval,
    OnStep,
    checked_labels,
    denoise_function,
    generate,
    guidance_of,
    known_sampler,
    quick_denoiser,
    spacing_of,
)
from undiffuse.runs._load import choice
from undiffuse.sampling import SAMPLERS, Sampler, dpmpp_2m_sde, finish, heun, start
from undiffuse.spec import Concat, Skip, trace

Picture = Float[Tensor, "_c _h _w"]  # each of its own size

VALUES = 2**14  # of a picture that its noise is estimated from, at most, but one crop at least
VOTES = 2**11  # residuals to average, at least: small pictures are looked at several times
ENLARGED = 2  # a tile's sides in those of the pictures that the network was trained on
ROOM = 2.0  # a sampler's first noise level over the schedule's last, at least


# --- denoise ------------------------------------------------------------------------------------


class Cleaned(NamedTuple):
    """A picture in [-1, 1], and the noise level it was taken to have."""

    picture: Picture
    sigma: float


@torch.no_grad()
def denoise_pictures(
    model: Model,
    pictures: Sequence[Picture],
    sigma: float | None = None,
    *,
    label: int | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    tile: int | None = None,
    on_picture: Callable[[], None] = lambda: None,
) -> list[Cleaned]:
    """Remove the noise from pictures of any size; each is float32 in [-1, 1] on the CPU.

    The result is the posterior mean E[x0 | picture], of least squared error and rather smooth. With
    `num_inference_steps` it is one draw from the posterior: as sharp as the pictures that the model
    knows, at up to twice the squared error. (Where sigma is less than twice the least noise that
    the model knows, a draw would hardly differ, and it is the mean.)

    Args:
        pictures: of the model's channels; their values may go beyond [-1, 1].
        sigma: standard deviation of the noise; None estimates it for every picture.
        label: class of them all; None is "no class".
        num_inference_steps: of `dpmpp_2m_sde`, from sigma down.
        seed: of that sampler's noise; picture n depends on (seed, n) alone.
        tile: side of the square parts that larger pictures are computed in, overlapping by a
            quarter; None is twice the side of the model's own pictures, 0 never cuts.
        on_picture: called after each.

    Raises:
        ConfigError: `sigma`, `label`, `num_inference_steps` or `tile` is none that this model can
            use.
        DataError: a picture has other channels, or values that are not finite.
        ResourceError: a picture in one piece does not fit into memory.
    """
    for n, picture in enumerate(pictures):
        _check_channels(model, picture)
        _check_finite(picture, f"picture {n}")
    if sigma is not None:
        _level(model, sigma)
    if num_inference_steps is not None and num_inference_steps < 1:
        raise ConfigError(f"num_inference_steps must be at least 1; got {num_inference_steps}")
    made: list[Cleaned] = []
    for n, picture in enumerate(pictures):
        made.append(_cleaned(model, picture, sigma, label, num_inference_steps, (seed, n), tile))
        on_picture()
    return made


def _cleaned(
    model: Model,
    picture: Picture,
    sigma: float | None,
    label: int | None,
    steps: int | None,
    key: tuple[int, int],
    tile: int | None,
) -> Cleaned:
    if sigma is None:
        sigma = estimate_sigma(model, picture, label=label)
    level = _level(model, sigma)
    denoise = clipped(_in_parts(model, _plain(model, label, 1), picture, tile))
    x = (float(level.alpha) * picture[None]).to(_device(model))
    if steps is None or sigma < ROOM * _known_sigmas(model)[0]:
        made = denoise(x, level)
    else:
        grid = levels(model.denoiser.schedule, steps, _down_from(sigma))
        made = finish(dpmpp_2m_sde(denoise, x, grid, noise=partial(_draw, key, x)))
    return Cleaned(made[0].clamp(-1, 1).float().cpu(), sigma)


def _down_from(sigma: float) -> KarrasSpacing:
    """To the usual end, or a tenth of sigma where that is nearer to clean."""
    return KarrasSpacing(low=min(KarrasSpacing().low, sigma / 10), high=sigma)


def _draw(key: tuple[int, int], like: Tensor, step: int) -> Tensor:
    seed, n = key
    noise = keyed_normal(seed, Stream.SAMPLE, range(n, n + 1), tuple(like.shape[1:]), step + 1)
    return noise.to(like)


@torch.no_grad()
def estimate_sigma(model: Model, picture: Picture, *, label: int | None = None) -> float:
    """The standard deviation of a picture's noise, at which it is most likely under the model.

    Looked for between 0.01 and 3, as far as the model knows these levels, in crops of the size that
    it was trained on, spread over the picture (`editing.estimate_sigma`). The network's own error
    limits it: a network that has learned little takes some of the picture for noise.

    Raises:
        ConfigError: every value is -1 or 1, or `label` is none of this model.
        DataError: the picture has other channels, or values that are not finite.
    """
    _check_channels(model, picture)
    _check_finite(picture, "picture")
    crops = _crops(picture, model.pictures.height, model.pictures.width)
    crops = crops.repeat(max(1, VOTES // crops.numel()), 1, 1, 1).to(_device(model))
    drawn = keyed_normal(0, Stream.EVALUATE, range(len(crops)), tuple(crops.shape[1:]))
    signs = torch.where(drawn < 0, -1.0, 1.0).to(crops)
    denoise = _plain(model, label, len(crops))
    found = editing.estimate_sigma(denoise, crops, model.denoiser.schedule, [signs])
    low, high = _known_sigmas(model)
    return min(max(found, low), high)  # by way of logarithms it may end a rounding beyond


def _crops(picture: Picture, height: int, width: int) -> Float[Tensor, "n c y x"]:
    """Parts of at most that size, evenly spread, of at most `VALUES` values."""
    height, width = min(height, picture.shape[1]), min(width, picture.shape[2])
    tops, lefts = picture.shape[1] - height, picture.shape[2] - width
    fitting = max(1, VALUES // (picture.shape[0] * height * width))
    there = (picture.shape[1] // height) * (picture.shape[2] // width)
    count = min(fitting, there)
    # Steps of the golden ratio spread any number of places over both directions (Kronecker).
    spread = [((n + 0.5) / count, (0.5 + 0.618034 * n) % 1.0) for n in range(count)]
    corners = [(round(a * tops), round(b * lefts)) for a, b in spread]
    return torch.stack([picture[:, y : y + height, x : x + width] for y, x in corners])


def _check_channels(model: Model, picture: Picture) -> None:
    if picture.shape[0] != model.pictures.channels:
        raise DataError(
            f"a picture has {picture.shape[0]} channels, this model knows pictures of"
            f" {model.pictures.channels}; convert it"
        )


def _check_finite(values: Tensor, name: str) -> None:
    if not bool(values.isfinite().all()):
        raise DataError(f"{name} has values that are not finite; replace them, they say nothing")


def _level(model: Model, sigma: float) -> NoiseLevel:
    low, high = _known_sigmas(model)
    if not low <= sigma <= high:
        raise ConfigError(f"sigma must be {low:.4g} ... {high:.4g} for this model; got {sigma:g}")
    return model.denoiser.schedule.at(torch.tensor(sigma, dtype=torch.float64))


def _known_sigmas(model: Model) -> tuple[float, float]:
    """The least and the most noise of the model's schedule."""
    ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    low, high = model.denoiser.schedule.at(ends).ratio.tolist()
    return low, high


def _device(model: Model) -> torch.device:
    return next(model.net.parameters()).device


def _plain(model: Model, label: int | None, count: int) -> Denoise:
    """The network in float32 (differences need the digits), for `count` pictures of one class."""
    labels = one_label(model, label, count)
    quick = quick_denoiser(model, Precision.NO, False)
    return with_label(quick, None if labels is None else labels.to(_device(model)))


def one_label(model: Model, label: int | None, count: int) -> Int[Tensor, "n"] | None:
    """`count` times the class; None is "no class".

    Raises:
        ConfigError: no class of this model, or None where it must be told one.
    """
    if label is None and not model.spec.classes:
        return None
    if label is None and not model.spec.style.embedding.null:
        raise ConfigError(
            f"class_label is missing: this model must be told one of its {model.spec.classes}"
            " classes"
        )
    return checked_labels(model, [model.spec.classes if label is None else label] * count, count)


def _in_parts(model: Model, denoise: Denoise, picture: Picture, tile: int | None) -> Denoise:
    """Pieces that the network can compute, of a picture continued to a multiple of its stride."""
    stride, side = model.spec.stride, max(model.pictures.height, model.pictures.width)
    if tile is not None and tile != 0 and tile < 2 * stride:
        raise ConfigError(f"tile must be 0 or at least {2 * stride} for this network; got {tile}")
    tile = ENLARGED * side if tile is None else tile
    if tile and max(picture.shape[1:]) > tile:
        tile = math.ceil(tile / stride) * stride
        denoise = editing.tiled(denoise, tile, tile // 4 // stride * stride)
    else:
        _check_fits(model, picture)
    return editing.reflected(denoise, stride)


def _check_fits(model: Model, picture: Picture) -> None:
    need, have = forward_bytes(model, *picture.shape[1:]), runtime.memory(_device(model))
    if have is not None and need > have:
        raise ResourceError(
            f"a picture of {picture.shape[1]}x{picture.shape[2]} in one piece needs about"
            f" {need / 1e9:,.0f} GB, this machine has {have / 1e9:.0f} GB; choose another tile"
            " than 0"
        )


def forward_bytes(model: Model, height: int, width: int) -> int:
    """About what one picture needs in float32: the saved skips, and a layer with its work space."""
    size = cost.padded(model.spec, height, width)
    saved, most, stack = 0, 0, list[int]()
    for site in trace(model.spec):
        inside = cost.input_numbers(site, *size)
        made = site.out_width * size[0] * size[1] // site.out_scale**2
        most = max(most, saved + 2 * inside + 2 * made)
        if isinstance(site.op, Skip):
            stack.append(made)
        elif isinstance(site.op, Concat):
            stack.pop()
        saved = sum(stack)
    return cost.BYTES_PER_ACTIVATION * most


# --- inpaint, edit ------------------------------------------------------------------------------


def inpaint(
    model: Model,
    picture: Picture,
    hole: Bool[Tensor, "_h _w"],
    count: int = 4,
    *,
    label: Int[Tensor, "n"] | Sequence[int] | None = None,
    num_resamples: int | None = None,
    num_inference_steps: int = 20,
    seed: int = 0,
    guidance_scale: float | None = None,
    guidance_interval: Interval | None = None,
    weak: Model | None = None,
    batch_size: int = 64,
    mixed_precision: Precision | str = Precision.AUTO,
    on_step: OnStep = lambda step: None,
) -> Float[Tensor, "n c h w"]:
    """The picture with its hole filled in, `count` times; all else stays bit for bit.

    By moment matching (`editing.filled`, with `dpmpp_2m_sde`), which for Gaussian data comes close
    to the exact conditional; it needs the network's derivative, up to eight backward passes per
    step. With `num_resamples` by RePaint, which does not.

    Args:
        picture: of the model's size; what it holds in the hole is not looked at.
        hole: True where to fill.
        label: class per result; None is "no class".
        num_resamples: how often RePaint repeats each step; 1 is plain replacement.

    Others are those of `generate`.

    Raises:
        ConfigError: the hole has another size or is empty, or as `generate`.
        DataError: the picture has another shape than the model's, or values outside the hole that
            are not finite.
    """
    _check_shape(model, picture, "picture")
    if hole.shape != picture.shape[1:]:
        raise ConfigError(
            f"mask is {hole.shape[0]}x{hole.shape[1]}, the picture {picture.shape[1]}x"
            f"{picture.shape[2]}; they must be of one size"
        )
    if not bool(hole.any()):
        raise ConfigError("mask has nothing to fill: it must be white where the picture is to be")
    _check_finite(picture[:, ~hole], "picture")
    known, where = picture[None].to(_device(model)), hole[None, None].to(_device(model))
    method = (
        editing.filling(known, where)
        if num_resamples is None
        else partial(editing.repaint, known=known, hole=where, num_resamples=num_resamples)
    )
    made = generate(
        model,
        count,
        label=one_label(model, None, count) if label is None else label,
        sampler=method,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=_scale(guidance_scale, label, weak),
        guidance_interval=guidance_interval,
        weak=weak,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        on_step=on_step,
    )
    return torch.where(hole, made, picture)


def edit(
    model: Model,
    picture: Picture,
    strength: float = 0.5,
    count: int = 4,
    *,
    label: Int[Tensor, "n"] | Sequence[int] | None = None,
    sampler: Sampler | str = "dpmpp_2m",
    num_inference_steps: int = 20,
    seed: int = 0,
    guidance_scale: float | None = None,
    guidance_interval: Interval | None = None,
    weak: Model | None = None,
    batch_size: int = 64,
    mixed_precision: Precision | str = Precision.AUTO,
    on_step: OnStep = lambda step: None,
) -> Float[Tensor, "n c h w"]:
    """Image to image: noise is added to the picture and taken away again (SDEdit, 2108.01073).

    Args:
        picture: of the model's size.
        strength: the share of the sampler's steps that is taken, from the noise level at which
            they begin: 0 returns the picture, 1 is `generate` with these labels, which has not
            seen it.
        label: class per result; None is "no class", where `generate` takes all classes in turn.

    Others are those of `generate`.

    Raises:
        ConfigError: `strength` is outside [0, 1], or as `generate`.
        DataError: the picture has another shape than the model's, or values that are not finite.
    """
    _check_shape(model, picture, "picture")
    _check_finite(picture, "picture")
    if not 0.0 <= strength <= 1.0:
        raise ConfigError(f"strength must be in [0, 1]; got {strength}")
    run = SAMPLERS[known_sampler(sampler)] if isinstance(sampler, str) else sampler
    x0 = picture[None].to(_device(model))
    return generate(
        model,
        count,
        label=one_label(model, None, count) if label is None else label,
        sampler=editing.partly(x0, strength, model.denoiser.schedule, run),
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=_scale(guidance_scale, label, weak),
        guidance_interval=guidance_interval,
        weak=weak,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        on_step=on_step,
    )


def strength_sigma(model: Model, strength: float, num_inference_steps: int = 20) -> float:
    """sigma / alpha of the noise that `edit` adds at that strength."""
    schedule = model.denoiser.schedule
    grid = levels(schedule, num_inference_steps, spacing_of(model))
    return float(editing.partial_levels(schedule, grid, strength)[0].ratio)


def _scale(scale: float | None, label: object, weak: Model | None) -> float | None:
    """As given; else as usual where there is something to guide towards."""
    if label is not None or weak is not None:
        return scale
    if scale not in (None, 1.0):
        raise ConfigError(
            f"guidance_scale {scale:g} needs a class label (or autoguidance): without one there"
            " is nothing to guide towards"
        )
    return 1.0


def _check_shape(model: Model, picture: Picture, name: str) -> None:
    size = model.pictures
    wanted = (size.channels, size.height, size.width)
    if tuple(picture.shape) != wanted:
        raise DataError(
            f"{name} has shape {tuple(picture.shape)} (channels, height, width), this model makes"
            f" {wanted}; crop or resize it"
        )


# --- interpolate --------------------------------------------------------------------------------


@torch.no_grad()
def interpolate(
    model: Model,
    a: Picture | int,
    b: Picture | int,
    count: int = 8,
    *,
    label: int | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    mixed_precision: Precision | str = Precision.AUTO,
    on_step: OnStep = lambda step: None,
) -> Float[Tensor, "n c h w"]:
    """Pictures on the way from a to b, ends included, evenly spaced on a great circle of noise.

    A seed stands for the noise of its first picture: that end is `generate(model, 1, seed=a,
    sampler="heun")` with the same label. A picture is encoded to the noise that `heun` would make
    it of (`editing.encode`) and decoded like the others; its end is the picture up to the error of
    both.

    Args:
        label: class of all of them; None is "no class", where `generate` takes all classes in turn.

    Raises:
        ConfigError: `count` is below 2, or as `generate`.
        DataError: a picture has another shape than the model's, or values that are not finite.
    """
    if count < 2:
        raise ConfigError(f"num_images must be at least 2, the two ends; got {count}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}")
    guidance = guidance_of(model, _scale(guidance_scale, label, None), None)
    grid = levels(model.denoiser.schedule, num_inference_steps, spacing_of(model))
    precision = choice("mixed_precision", Precision, mixed_precision)
    quick = quick_denoiser(model, precision, False)

    def denoise(size: int) -> Denoise:
        return denoise_function(model, quick, one_label(model, label, size), guidance)

    ends = [_noise_of(model, one, denoise(1), grid) for one in (a, b)]
    shares = torch.linspace(0, 1, count, dtype=torch.float64).tolist()
    x = torch.cat([editing.slerp(ends[0], ends[1], share) for share in shares])
    made: list[Tensor] = []
    for part in x.split(batch_size):
        for step in heun(denoise(len(part)), part, grid):
            on_step(step)
            last = step.x
        made.append(last.clamp(-1, 1).float().cpu())  # pyright: ignore[reportPossiblyUnboundVariable] # at least one step
    return torch.cat(made)


def _noise_of(
    model: Model, end: Picture | int, denoise: Denoise, grid: Sequence[NoiseLevel]
) -> Float[Tensor, "1 c h w"]:
    size = model.pictures
    if isinstance(end, int):
        shape = (size.channels, size.height, size.width)
        drawn = keyed_normal(end, Stream.SAMPLE, range(1), shape)
        return start(grid[0], drawn.to(_device(model)))
    _check_shape(model, end, "picture")
    _check_finite(end, "picture")
    return editing.encode(denoise, end[None].to(_device(model)), grid)

"""From a model to pictures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse import runtime
from undiffuse.checkpoint import Model
from undiffuse.config import GuidanceConfig, Precision, SampleConfig, changed
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import ConfigError
from undiffuse.guidance import (
    Denoise,
    Labelled,
    classifier_free,
    clipped,
    guided,
    on_schedule,
    with_label,
    within,
)
from undiffuse.noise import LeadIn, NoiseLevel, Stream, keyed_normal, levels
from undiffuse.runs._load import choice
from undiffuse.sampling import SAMPLERS, Sampler, Step, start

OnStep = Callable[[Step], None]
Interval = tuple[float, float]  # lowest and highest sigma / alpha
EVERYWHERE = (0.0, math.inf)


class SamplingOptions(TypedDict):
    """What `generate`, `inpaint` and `edit` take alike from a `SampleConfig`."""

    num_inference_steps: int
    seed: int
    guidance_scale: float
    guidance_interval: Interval
    batch_size: int
    mixed_precision: Precision | str


def usual_guidance(model: Model) -> GuidanceConfig:
    """As the run that trained the model was told; none where it was told nothing.

    Raises:
        ConfigError: what the model file says of it cannot be.
    """
    return changed(GuidanceConfig(), model.trained)


def guidance_words(scale: float, interval: Interval) -> str:
    """Such as "1.3 at sigma 0.3 to 2"."""
    low, high = interval
    where = "at all levels" if interval == EVERYWHERE else f"at sigma {low:g} to {high:g}"
    return f"{scale:g} {where}"


def sampling_options(model: Model, config: SampleConfig) -> SamplingOptions:
    """For `generate(model, count, **sampling_options(model, config))`."""
    guidance = config.guided(usual_guidance(model))
    return SamplingOptions(
        num_inference_steps=config.num_inference_steps,
        seed=config.seed,
        guidance_scale=guidance.guidance_scale,
        guidance_interval=guidance.interval,
        batch_size=config.batch_size,
        mixed_precision=config.mixed_precision,
    )


@torch.no_grad()
def generate(
    model: Model,
    count: int = 16,
    *,
    seed: int = 0,
    label: Int[Tensor, "n"] | Sequence[int] | None = None,
    sampler: Sampler | str = "dpmpp_2m",
    num_inference_steps: int = 20,
    guidance_scale: float | None = None,
    guidance_interval: Interval | None = None,
    weak: Model | None = None,
    batch_size: int = 64,
    mixed_precision: Precision | str = Precision.AUTO,
    torch_compile: bool = False,
    on_step: OnStep = lambda step: None,
) -> Float[Tensor, "n c h w"]:
    """New pictures, float32 in [-1, 1] on the CPU.

    Picture n depends on (seed, n) alone, up to rounding, whatever `count` and `batch_size` are.
    Forward hooks on the network's layers run with `mixed_precision="no"`.

    Args:
        label: class per picture; None takes all classes in turn.
        sampler: one of `sampling.SAMPLERS` by name, or any function of that kind.
        guidance_scale: weak + scale * (strong - weak); 1 is no guidance; None is `usual_guidance`.
        guidance_interval: lowest and highest sigma / alpha at which to guide (2404.07724);
            elsewhere the weak model is not evaluated; None is `usual_guidance`.
        weak: a less trained model of the same pictures, for autoguidance (2406.02507), of any
            schedule; None uses the model's own "no class" (2207.12598).
        mixed_precision: "auto" takes bfloat16 inside wide networks where the machine is fast at it
            (`runtime.choose`); "no" and "bf16" insist.
        torch_compile: where that is bfloat16, through torch.compile: worth its minutes on a GPU.
        on_step: called after every step of every batch, for progress bars and films.

    Raises:
        ConfigError: a label, scale, interval or sampler that this model cannot use.
    """
    if count < 1 or batch_size < 1:
        raise ConfigError(f"count and batch_size must be at least 1; got {count}, {batch_size}")
    if weak is not None:
        _check_weak(model, weak)
    guidance = guidance_of(model, guidance_scale, guidance_interval)
    precision = choice("mixed_precision", Precision, mixed_precision)
    quick = quick_denoiser(model, precision, torch_compile)
    quick_weak = None if weak is None else _quick_weak(model, weak, precision, torch_compile)
    labels = checked_labels(model, label, count)
    run = SAMPLERS[known_sampler(sampler)] if isinstance(sampler, str) else sampler
    grid = levels(model.denoiser.schedule, num_inference_steps, spacing_of(model))
    batches = (range(i, min(i + batch_size, count)) for i in range(0, count, batch_size))
    made: list[Tensor] = []
    for positions in batches:
        part = None if labels is None else labels[positions.start : positions.stop]
        denoise = denoise_function(model, quick, part, guidance, quick_weak)
        for step in _steps(model, run, denoise, positions, seed, grid):
            on_step(step)
            last = step.x
        made.append(last.clamp(-1, 1).float().cpu())  # pyright: ignore[reportPossiblyUnboundVariable] # at least one step
    return torch.cat(made)


def film(
    model: Model, count: int = 8, *, frames: int = 20, **options: object
) -> list[Float[Tensor, "n c h w"]]:
    """The estimates of the clean pictures, step by step, and the pictures at the end."""
    seen: list[Tensor] = []
    steps = {"num_inference_steps": frames, "batch_size": count, **options}
    final = generate(model, count, on_step=lambda step: seen.append(step.x0.cpu()), **steps)  # pyright: ignore[reportArgumentType] # options of generate
    return [*seen, final]


def labels_in_turn(model: Model, count: int) -> Int[Tensor, "n"] | None:
    """0, 1, 2 ... over and over; None for a model without classes."""
    classes = model.spec.classes
    return torch.arange(count) % classes if classes else None


def parse_labels(model: Model, words: Sequence[str], count: int) -> Int[Tensor, "n"] | None:
    """Class names or numbers, repeated in turn up to `count`.

    Raises:
        ConfigError: a word that is no class of this model.
    """
    if not words:
        return None
    chosen = torch.tensor([_parse_label(model, word) for word in words])
    return chosen[torch.arange(count) % len(chosen)]


def _parse_label(model: Model, word: str) -> int:
    names, classes = model.pictures.class_names, model.spec.classes
    if not classes:
        raise ConfigError(f"class_label {word!r}: this model was trained without classes")
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < classes:
        return int(word)
    known = ", ".join(names[:12]) or f"0 ... {classes - 1}"
    raise ConfigError(f"class_label {word!r} is not one of: {known}")


def checked_labels(
    model: Model, label: Tensor | Sequence[int] | None, count: int
) -> Int[Tensor, "n"] | None:
    if label is None:
        return labels_in_turn(model, count)
    labels, classes = torch.as_tensor(label, dtype=torch.int64), model.spec.classes
    most = classes - 1 + int(model.spec.style.embedding.null)
    if not classes:
        raise ConfigError(f"label must be None: this model has no classes; got {label!r}")
    if labels.shape != (count,) or bool((labels < 0).any()) or bool((labels > most).any()):
        found = f" from {int(labels.min())} to {int(labels.max())}" if labels.numel() else ""
        raise ConfigError(
            f"label must be {count} numbers in 0 ... {most};"
            f" got {list(labels.shape)} numbers{found}"
        )
    return labels


def _check_weak(model: Model, weak: Model) -> None:
    for name in ("height", "width", "channels", "class_names"):
        ours, theirs = getattr(model.pictures, name), getattr(weak.pictures, name)
        if ours != theirs:
            raise ConfigError(
                f"the autoguidance model has {name} {theirs}, the guided one has {ours};"
                " guide with a model of the same pictures"
            )


def guidance_of(model: Model, scale: float | None, interval: Interval | None) -> GuidanceConfig:
    """The usual guidance, but for what is given."""
    guidance = usual_guidance(model)
    if scale is not None:
        guidance = replace(guidance, guidance_scale=scale)
    if interval is None:
        return guidance
    low, high = interval
    if not 0.0 <= low <= high:
        raise ConfigError(
            f"guidance_interval must be two noise levels sigma/alpha, the lower one first; got"
            f" {low:g}, {high:g}"
        )
    return replace(guidance, guidance_low=low, guidance_high=None if math.isinf(high) else high)


def known_sampler(sampler: str) -> str:
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler {sampler!r} is not one of: {', '.join(SAMPLERS)}")
    return sampler


def spacing_of(model: Model) -> LeadIn:
    """Levels for pictures of this size and spread; 0.5 is usual for values in [-1, 1]."""
    prediction, pictures = model.denoiser.prediction, model.pictures
    spread = prediction.sigma_data if isinstance(prediction, KarrasPrecond) else 0.5
    return LeadIn(spread, pictures.channels * pictures.height * pictures.width)


def quick_denoiser(model: Model, precision: Precision, torch_compile: bool) -> Denoiser:
    """The model's denoiser on the fastest path: once per call, since it keeps packed weights."""
    chosen = runtime.choose(model.net, precision, torch_compile)
    return replace(model.denoiser, net=runtime.callable_net(model.net, chosen.path))


def _quick_weak(model: Model, weak: Model, precision: Precision, torch_compile: bool) -> Labelled:
    """It is asked at the guided model's levels, which need not be of its own schedule."""
    quick, schedule = quick_denoiser(weak, precision, torch_compile), weak.denoiser.schedule
    return quick if schedule == model.denoiser.schedule else on_schedule(quick, schedule)


def denoise_function(
    model: Model,
    denoiser: Denoiser,
    label: Tensor | None,
    guidance: GuidanceConfig,
    weak: Labelled | None = None,
) -> Denoise:
    """With that label and guidance; beyond the guided levels without."""
    device = next(model.net.parameters()).device
    label = None if label is None else label.to(device)
    plain, scale = with_label(denoiser, label), guidance.guidance_scale
    if weak is not None:
        denoise = guided(plain, with_label(weak, label), scale)
    else:
        null = model.spec.classes if model.spec.style.embedding.null else None
        denoise = classifier_free(denoiser, label, scale, null)
    if scale != 1.0 and guidance.interval != EVERYWHERE:
        denoise = within(denoise, plain, *guidance.interval)
    return clipped(denoise)


def _steps(
    model: Model,
    sampler: Sampler,
    denoise: Denoise,
    positions: range,
    seed: int,
    grid: Sequence[NoiseLevel],
) -> Iterator[Step]:
    shape = (model.pictures.channels, model.pictures.height, model.pictures.width)
    device = next(model.net.parameters()).device
    draw = partial(_draw, seed, positions, shape, device)
    return sampler(denoise, start(grid[0], draw(-1)), grid, noise=draw)


def _draw(
    seed: int, positions: range, shape: tuple[int, ...], device: torch.device, step: int
) -> Tensor:
    """Part 0 of a picture's stream is its start, part n + 1 its noise at step n."""
    return keyed_normal(seed, Stream.SAMPLE, positions, shape, part=step + 1).to(device)

"""Numbers about a run: its losses beside exact bars, its samples beside real pictures."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse import evaluation, images, runtime
from undiffuse.checkpoint import Model
from undiffuse.config import Device, SampleConfig, Weights
from undiffuse.runs._folder import RunFolder, write_json
from undiffuse.runs._generate import generate, labels_in_turn
from undiffuse.runs._load import load
from undiffuse.runs._real import Crops, real_pictures
from undiffuse.sampling import Step

# Defaults that keep an evaluation to minutes on a laptop: the time goes with pixels.
SAMPLED_PIXELS, FEWEST_SAMPLES, MOST_SAMPLES = 2**18, 100, 1000
DENOISED_VALUES, MOST_DRAWS = 2**18, 4

Progress = Callable[[str, int, int], None]  # (what is done, how much of it, of how much)


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure, and how much of it."""

    num_samples: int | None = None  # None: 1000 pictures of 16x16, fewer of larger ones
    draws: int | None = None  # of noise per held-out picture; None: up to 4, fewer of large data
    sampling: SampleConfig = SampleConfig(batch_size=250)  # its num_images is not used
    data: str | None = None  # instead of the run's own
    weights: Weights = Weights.EMA
    checkpoint: int | None = None
    device: Device = Device.AUTO


@dataclass(frozen=True)
class Evaluated:
    """The figures, the pictures they are about, and the pairs that look most alike."""

    body: dict[str, Any]
    samples: Tensor
    neighbours: Tensor | None  # sample, its nearest training picture, sample, ...


def evaluate_run(
    path: str | Path,
    options: EvaluateOptions = EvaluateOptions(),  # frozen
    progress: Progress = lambda what, done, total: None,
) -> Evaluated:
    """Measure a run (or a model file with `options.data`) and write its evaluation.json.

    Copies are looked for in all training pictures; all else is measured with at most 5,000 of
    them (of large ones fewer), evenly spread. `body["warnings"]` says what is strange about the
    pictures: that they are not those of training, or that their classes are others.

    Raises:
        CheckpointError: no model there, or it was trained on pictures given in Python and the
            run holds no copy of them.
        DataError: the pictures it was trained on are gone, and the run holds no copy.
        ConfigError: a model file without data, or options out of range.
    """
    path = Path(path)
    model = load(path, options.weights, options.checkpoint)
    runtime.move(model.net, runtime.choose_device(options.device))
    real = real_pictures(path, model, options.data)
    train, held_out = real.splits()
    sampling = replace(options.sampling, num_images=sample_count(model, options.num_samples))
    losses = _losses(model, real.known, (train, held_out), options, partial(progress, "losses"))
    samples = _samples(model, sampling, partial(progress, "samples"))
    quality = evaluation.sample_quality(
        evaluation.Split(samples, labels_in_turn(model, len(samples))),
        train,
        held_out,
        seed=sampling.seed,
        search=real.train.chunks(),
    )
    body = evaluation.summary(losses, quality)
    body |= {"sampling": _described(sampling, model), "warnings": list(real.warnings)}
    neighbours = _pairs(samples, real.train, quality)
    if path.is_dir():
        write_json(RunFolder(path).evaluation, body)
        if neighbours is not None:
            images.save_grid(neighbours, RunFolder(path).samples / "neighbours.png", columns=8)
    return Evaluated(body, samples, neighbours)


def sample_count(model: Model, asked: int | None) -> int:
    """How many pictures to judge: as asked or by their size, and as many of every class."""
    pixels = model.pictures.height * model.pictures.width
    fitting = min(MOST_SAMPLES, max(FEWEST_SAMPLES, SAMPLED_PIXELS // pixels))
    classes = max(1, model.spec.classes)
    return -(-(asked or fitting) // classes) * classes


def _losses(
    model: Model,
    known: bool,
    splits: tuple[evaluation.Split, evaluation.Split],
    options: EvaluateOptions,
    progress: Callable[[int, int], None],
) -> evaluation.LevelReport:
    train, held_out = splits
    fitting = DENOISED_VALUES // max(1, held_out.x0.numel())
    draws = min(MOST_DRAWS, max(1, fitting)) if options.draws is None else options.draws
    return evaluation.loss_by_level(
        model.denoiser,  # pyright: ignore[reportArgumentType] # its own protocol
        train,
        held_out,
        draws=draws,
        seed=options.sampling.seed,
        known=known,
        labelled=model.spec.classes > 0 and train.label is not None,
        null=model.spec.classes == 0 or model.spec.style.embedding.null,
        device=next(model.net.parameters()).device,
        progress=progress,
    )


def _samples(model: Model, config: SampleConfig, progress: Callable[[int, int], None]) -> Tensor:
    count, done = config.num_images, 0
    total = -(-count // config.batch_size) * config.num_inference_steps

    def on_step(step: Step) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return generate(
        model,
        count,
        seed=config.seed,
        sampler=config.sampler.value,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        mixed_precision=config.mixed_precision,
        torch_compile=config.torch_compile,
        on_step=on_step,
    )


def _described(config: SampleConfig, model: Model) -> dict[str, Any]:
    return {
        "num_samples": config.num_images,
        "sampler": config.sampler.value,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
        "trained_steps": model.trained.get("steps"),
    }


def _pairs(samples: Tensor, train: Crops, quality: evaluation.SampleReport) -> Tensor | None:
    if not quality.closest:
        return None
    made = samples[[pair.sample for pair in quality.closest]]
    nearest = train.at([pair.train for pair in quality.closest]).x0
    return torch.stack([made, nearest], 1).flatten(0, 1)

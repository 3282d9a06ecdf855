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
from undiffuse.config import DataConfig, Device, SampleConfig, Weights
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.runs._folder import RunFolder, stored_config, write_json
from undiffuse.runs._generate import generate, labels_in_turn
from undiffuse.runs._load import load
from undiffuse.runs._plan import data_options
from undiffuse.sampling import Step

TRAIN_MOST = 5000  # training pictures that the measures use


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

    Raises:
        CheckpointError: no model there.
        DataError: the pictures it was trained on are gone.
        ConfigError: a model file without data, or options out of range.
    """
    path = Path(path)
    model = load(path, options.weights, options.checkpoint)
    runtime.move(model.net, runtime.choose_device(options.device))
    train, held_out = _splits(_data(path, model, options), model)
    sampling = replace(options.sampling, num_images=sample_count(model, options.num_samples))
    losses = _losses(model, train, held_out, options, partial(progress, "losses"))
    samples = _samples(model, sampling, partial(progress, "samples"))
    quality = evaluation.sample_quality(
        evaluation.Split(samples, labels_in_turn(model, len(samples))),
        train,
        held_out,
        seed=sampling.seed,
    )
    body = evaluation.summary(losses, quality) | {"sampling": _described(sampling, model)}
    neighbours = _pairs(samples, train.x0, quality)
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
    train: evaluation.Split,
    held_out: evaluation.Split,
    options: EvaluateOptions,
    progress: Callable[[int, int], None],
) -> evaluation.LevelReport:
    fitting = DENOISED_VALUES // max(1, held_out.x0.numel())
    draws = min(MOST_DRAWS, max(1, fitting)) if options.draws is None else options.draws
    return evaluation.loss_by_level(
        model.denoiser,  # pyright: ignore[reportArgumentType] # its own protocol
        train,
        held_out,
        draws=draws,
        seed=options.sampling.seed,
        labelled=model.spec.classes > 0 and train.label is not None,
        null=model.spec.classes == 0 or model.spec.style.embedding.null,
        device=next(model.net.parameters()).device,
        progress=progress,
    )


def _data(path: Path, model: Model, options: EvaluateOptions) -> images.Data:
    size = (model.pictures.height, model.pictures.width)
    if path.is_dir() and options.data is None:
        config = stored_config(path).data
        if not _readable(config):
            raise CheckpointError(
                f"{path} was trained on pictures given in Python; pass them with --data"
            )
        return images.load(config.data, data_options(config), RunFolder(path).cache)
    if options.data is None:
        raise ConfigError(f"data is missing: {path} is a model file; pass --data FOLDER")
    chosen = DataConfig(options.data, resolution=size, channels=model.pictures.channels)
    return images.load(options.data, data_options(chosen))


def _readable(config: DataConfig) -> bool:
    return config.data in ("digits", "photos") or Path(config.data).exists()


def _splits(data: images.Data, model: Model) -> tuple[evaluation.Split, evaluation.Split]:
    wanted = (model.pictures.channels, model.pictures.height, model.pictures.width)
    got = (data.train.channels, *data.train.size)
    if got != wanted:
        raise ConfigError(
            f"data has pictures of {got} (channels, height, width), the model makes {wanted}"
        )
    train = data.train.fixed(TRAIN_MOST)
    held_out = data.held_out.fixed(TRAIN_MOST)
    classes = model.spec.classes > 0
    return (
        evaluation.Split(train[0], train[1] if classes else None),
        evaluation.Split(held_out[0], held_out[1] if classes else None),
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


def _pairs(samples: Tensor, train: Tensor, quality: evaluation.SampleReport) -> Tensor | None:
    if not quality.closest:
        return None
    both = [(samples[pair.sample], train[pair.train]) for pair in quality.closest]
    return torch.stack([picture for pair in both for picture in pair])

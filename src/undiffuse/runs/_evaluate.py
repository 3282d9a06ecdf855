"""Numbers about a run: its losses beside exact bars, its samples beside real pictures."""

from collections.abc import Callable
from dataclasses import dataclass
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

TRAIN_MOST = 5000  # training pictures that the measures use


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure, and how much of it."""

    sampling: SampleConfig = SampleConfig(num_images=1000, batch_size=250)
    draws: int = 4
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
    on_step: Callable[[], None] = lambda: None,
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
    losses = evaluation.loss_by_level(
        model.denoiser,  # pyright: ignore[reportArgumentType] # its own protocol
        train,
        held_out,
        draws=options.draws,
        seed=options.sampling.seed,
        labelled=model.spec.classes > 0 and train.label is not None,
        null=model.spec.classes == 0 or model.spec.style.embedding.null,
        device=next(model.net.parameters()).device,
    )
    samples = _samples(model, options.sampling, on_step)
    label = labels_in_turn(model, len(samples))
    quality = evaluation.sample_quality(
        evaluation.Split(samples, label), train, held_out, seed=options.sampling.seed
    )
    body = evaluation.summary(losses, quality) | {"sampling": _described(options.sampling, model)}
    if path.is_dir():
        write_json(RunFolder(path).evaluation, body)
        neighbours = _pairs(samples, train.x0, quality)
        if neighbours is not None:
            images.save_grid(neighbours, RunFolder(path).samples / "neighbours.png", columns=8)
    return Evaluated(body, samples, _pairs(samples, train.x0, quality))


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


def _samples(model: Model, config: SampleConfig, on_step: Callable[[], None]) -> Tensor:
    count = config.num_images
    if model.spec.classes:  # as many of every class
        count = -(-count // model.spec.classes) * model.spec.classes
    return generate(
        model,
        count,
        seed=config.seed,
        sampler=config.sampler.value,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        on_step=lambda step: on_step(),
    )


def evaluation_steps(model: Model, config: SampleConfig) -> int:
    """How often `on_step` will be called, for a progress bar."""
    classes = max(1, model.spec.classes)
    count = -(-config.num_images // classes) * classes
    return -(-count // config.batch_size) * config.num_inference_steps


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

"""Numbers about a run: its losses beside exact bars, its samples beside real pictures."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse import drawing, evaluation, images
from undiffuse.checkpoint import Model
from undiffuse.config import JUDGED, Device, SampleConfig, Weights
from undiffuse.errors import ConfigError
from undiffuse.runs._folder import RunFolder, write_json
from undiffuse.runs._generate import generate, labels_in_turn, sampling_options, usual_guidance
from undiffuse.runs._load import guide, load
from undiffuse.runs._real import Crops, Real, real_pictures
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
    sampling: SampleConfig = JUDGED  # its num_images is not used
    data: str | None = None  # instead of the run's own
    weights: Weights = Weights.EMA
    checkpoint: int | None = None
    device: Device = Device.AUTO
    ema_length: float | None = None  # rebuilt, instead of the run's own
    autoguidance: str | int | None = None  # `runs.guide`'s word for what guides the samples
    features: str | None = None  # an ONNX file in place of the classifier fitted on the spot
    features_output: str | None = None  # the name of its output; None: the first


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
        ConfigError: a model file without data, features that cannot be computed, or options out
            of range.
    """
    path = Path(path)
    subject = subject_of(path, options)
    model, real, sampling = subject.model, subject.real, subject.sampling
    losses = _losses(subject, options, partial(progress, "losses"))
    samples = sampled(model, subject.weak, sampling, partial(progress, "samples"))
    quality = evaluation.sample_quality(
        evaluation.Split(samples, labels_in_turn(model, len(samples))),
        subject.train,
        subject.held_out,
        seed=sampling.seed,
        features=subject.features,
        search=real.train.chunks(),
    )
    body = evaluation.summary(losses, quality)
    body |= {"sampling": described(subject, options), "warnings": list(real.warnings)}
    neighbours = _pairs(samples, real.train, quality)
    if path.is_dir():
        write_json(RunFolder(path).evaluation, body)
        if body["levels"]:
            figure = drawing.draw_levels(body["levels"], body["loss"]["values"])
            drawing.save(figure, RunFolder(path).levels)
        if neighbours is not None:
            images.save_grid(neighbours, RunFolder(path).samples / "neighbours.png", columns=8)
    return Evaluated(body, samples, neighbours)


@dataclass(frozen=True)
class Subject:
    """What every measurement of a model starts from."""

    model: Model
    weak: Model | None  # guides it
    real: Real
    train: evaluation.Split
    held_out: evaluation.Split
    features: evaluation.Features | None  # in place of those fitted to `train`
    sampling: SampleConfig  # whose guidance is settled


def subject_of(path: Path, options: EvaluateOptions) -> Subject:
    """Load the model and the real pictures that the options name."""
    model = load(path, options.weights, options.checkpoint, options.device, options.ema_length)
    guiding = options.autoguidance
    weak = None if guiding is None else guide(path, guiding, options.device)
    real = real_pictures(path, model, options.data)
    train, held_out = real.splits()
    features = given_features(options, train)
    sampling = replace(
        options.sampling,
        num_images=sample_count(model, options.num_samples),
        **asdict(options.sampling.guided(usual_guidance(model))),
    )
    return Subject(model, weak, real, train, held_out, features, sampling)


def sample_count(model: Model, asked: int | None) -> int:
    """How many pictures to judge: as asked or by their size, and as many of every class."""
    classes = max(1, model.spec.classes)
    count = asked or fitting_count(model.pictures.height, model.pictures.width)
    return -(-count // classes) * classes


def fitting_count(height: int, width: int) -> int:
    """How many pictures of that size are judged where nobody says."""
    return min(MOST_SAMPLES, max(FEWEST_SAMPLES, SAMPLED_PIXELS // (height * width)))


def draws_of(options: EvaluateOptions, held_out: evaluation.Split) -> int:
    """Of noise per held-out picture, as asked or by their size."""
    fitting = DENOISED_VALUES // max(1, held_out.x0.numel())
    return min(MOST_DRAWS, max(1, fitting)) if options.draws is None else options.draws


def given_features(
    options: EvaluateOptions, pictures: evaluation.Split
) -> evaluation.Features | None:
    """Those of the file that the options name."""
    if options.features is None:
        if options.features_output is not None:
            raise ConfigError("features_output names an output of the file that features names")
        return None
    features = evaluation.onnx_features(options.features, options.features_output)
    features(pictures.x0[:1])  # refused now rather than after all pictures were drawn
    return features


def _losses(
    subject: Subject, options: EvaluateOptions, progress: Callable[[int, int], None]
) -> evaluation.LevelReport:
    model, train = subject.model, subject.train
    return evaluation.loss_by_level(
        model.denoiser,  # pyright: ignore[reportArgumentType] # its own protocol
        train,
        subject.held_out,
        draws=draws_of(options, subject.held_out),
        seed=options.sampling.seed,
        known=subject.real.known,
        labelled=model.spec.classes > 0 and train.label is not None,
        null=takes_null(model),
        device=next(model.net.parameters()).device,
        progress=progress,
    )


def takes_null(model: Model) -> bool:
    """Whether it may be called without label."""
    return model.spec.classes == 0 or model.spec.style.embedding.null


def sampled(
    model: Model,
    weak: Model | None,
    config: SampleConfig,
    progress: Callable[[int, int], None],
    sampler: str | None = None,
) -> Tensor:
    """`config.num_images` pictures, of all classes in turn, by `sampler` or the configured one."""
    count, done = config.num_images, 0
    total = -(-count // config.batch_size) * config.num_inference_steps

    def on_step(step: Step) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return generate(
        model,
        count,
        sampler=sampler or config.sampler.value,
        weak=weak,
        torch_compile=config.torch_compile,
        on_step=on_step,
        **sampling_options(model, config),
    )


def described(subject: Subject, options: EvaluateOptions) -> dict[str, Any]:
    """How the pictures were made, and what made them, for JSON."""
    trained = subject.model.trained
    return sampling_settings(subject.sampling) | {
        "ema_length": trained.get("ema_length"),
        "trained_steps": trained.get("steps"),
        "autoguidance": options.autoguidance,
    }


def sampling_settings(config: SampleConfig) -> dict[str, Any]:
    """What decides the samples of a model."""
    return {
        "num_samples": config.num_images,
        "sampler": config.sampler.value,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "guidance_low": config.guidance_low,
        "guidance_high": config.guidance_high,
        "seed": config.seed,
    }


def _pairs(samples: Tensor, train: Crops, quality: evaluation.SampleReport) -> Tensor | None:
    if not quality.closest:
        return None
    made = samples[[pair.sample for pair in quality.closest]]
    nearest = train.at([pair.train for pair in quality.closest]).x0
    return torch.stack([made, nearest], 1).flatten(0, 1)

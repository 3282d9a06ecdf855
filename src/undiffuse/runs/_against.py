"""Two models, or sets of pictures, measured alike: which differences are real."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undiffuse import images
from undiffuse.checkpoint import Model
from undiffuse.config import DataConfig, SampleConfig
from undiffuse.errors import CheckpointError, ConfigError, DataError
from undiffuse.evaluation import (
    Contender,
    FigureDifference,
    LossDifference,
    Split,
    compare_losses,
    compare_samples,
)
from undiffuse.runs._evaluate import (
    EvaluateOptions,
    Progress,
    draws_of,
    fitting_count,
    given_features,
    sample_count,
    sampled,
    sampling_settings,
    takes_null,
)
from undiffuse.runs._folder import RunFolder
from undiffuse.runs._generate import labels_in_turn, usual_guidance
from undiffuse.runs._load import load, missing_run
from undiffuse.runs._plan import data_options
from undiffuse.runs._real import Crops, Real, real_pictures

SCHEMA = "undiffuse.against/1"
MODEL_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Comparison:
    """`figures` of samples and `losses` by noise level; the latter None where there are none.

    `a` and `b` say what was compared, `settings` how; `notes` what a reader must know.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    figures: tuple[FigureDifference, ...]
    losses: LossDifference | None
    settings: dict[str, Any]
    notes: tuple[str, ...]

    def asdict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        losses = None if self.losses is None else self.losses.asdict()
        return {"schema": SCHEMA, **asdict(self), "losses": losses}


def compare_runs(
    a: str | Path,
    b: str | Path,
    options: EvaluateOptions = EvaluateOptions(),  # noqa: B008 - frozen
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Measure two models, or sets of pictures, with the same real pictures, number and seeds.

    Either may be a run, a model file, or pictures of any program: a folder or an .npz as `images`
    reads them. The real pictures are `options.data`, else those that A was trained on, else those
    of B. Models draw as many samples from the same noise by the same sampler, so that a model has
    no difference from itself; each is guided as its run was told, unless `options.sampling` says.
    Where both are models, their losses are compared by noise level.

    Args:
        options: `weights`, `checkpoint` and `ema_length` are of A; B is as it lies there.

    Raises:
        CheckpointError: nothing is at `a` or `b`, or what is there is damaged.
        DataError: pictures that cannot be read, or of another shape than those of A.
        ConfigError: no real pictures are known, or options that two models cannot share.
    """
    if options.autoguidance is not None:
        raise ConfigError("autoguidance guides one network; a comparison samples both alike")
    sides = _sides((Path(a), Path(b)), options)
    real = _real(sides, options)
    train, held_out = real.splits()
    _check_shapes(sides, tuple(train.x0.shape[1:]))
    features = given_features(options, train)
    count, notes = _count(sides, options)
    samples, unlabelled = _samples(
        sides, real, replace(options.sampling, num_images=count), progress
    )
    figures = compare_samples(
        *samples,
        train,
        held_out,
        seed=options.sampling.seed,
        features=features,
        search=real.train.chunks,
        progress=partial(progress, "figures"),
    )
    losses, no_losses = _losses(sides, held_out, options, partial(progress, "losses"))
    of_a, of_b = (side.asdict(options.sampling) for side in sides)
    settings = sampling_settings(replace(options.sampling, num_images=count))
    settings |= {"train": len(train), "held_out": len(held_out)}
    notes = (*real.warnings, *_strangers(sides), *notes, *unlabelled, *no_losses)
    return Comparison(of_a, of_b, figures, losses, settings, notes)


# --- the two sides ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """Pictures of another program (or our own), read but not held in memory."""

    parts: tuple[Crops, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def some(self, count: int) -> Split:
        """So many of them, evenly spread."""
        places, first, found = np.arange(count) * len(self) // count, 0, list[Split]()
        for part in self.parts:
            inside = (places >= first) & (places < first + len(part))
            found.append(part.at(places[inside] - first))
            first += len(part)
        labels = [one.label for one in found if one.label is not None]
        whole = torch.cat(labels) if len(labels) == len(found) else None
        return Split(torch.cat([one.x0 for one in found]), whole)


@dataclass(frozen=True)
class _Side:
    """What was named: a model, or pictures."""

    name: str  # "A" or "B"
    path: Path
    model: Model | None
    stored: _Stored | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its pictures."""
        if self.model is not None:
            pictures = self.model.pictures
            return pictures.channels, pictures.height, pictures.width
        assert self.stored is not None
        dataset = self.stored.parts[0].dataset
        return dataset.channels, *dataset.size

    def asdict(self, sampling: SampleConfig) -> dict[str, Any]:
        """What it is, and how its samples were guided."""
        if self.model is None:
            count = None if self.stored is None else len(self.stored)
            return {"path": str(self.path), "kind": "pictures", "pictures": count}
        kind, trained = "run" if self.path.is_dir() else "model file", self.model.trained
        return {
            "path": str(self.path),
            "kind": kind,
            "trained_steps": trained.get("steps"),
            **asdict(sampling.guided(usual_guidance(self.model))),
        }


def _sides(paths: tuple[Path, Path], options: EvaluateOptions) -> tuple[_Side, _Side]:
    chosen = (options, EvaluateOptions(device=options.device))
    models = [_model(path, which) for path, which in zip(paths, chosen, strict=True)]
    channels = next((one.pictures.channels for one in models if one is not None), None)
    a, b = (
        _Side(name, path, model, _stored(path, channels) if model is None else None)
        for name, path, model in zip("AB", paths, models, strict=True)
    )
    return a, b


def holds_model(path: Path) -> bool:
    """Whether a run or a model file is there; else there are pictures.

    Raises:
        CheckpointError: nothing is there.
    """
    if not path.exists():
        raise CheckpointError(missing_run(path))
    folder = RunFolder(path)
    parts = (folder.config, folder.model, folder.checkpoints)
    is_run = path.is_dir() and any(one.exists() for one in parts)
    return is_run or path.suffix == MODEL_SUFFIX


def _model(path: Path, options: EvaluateOptions) -> Model | None:
    """The model there; None where there are pictures."""
    if not holds_model(path):
        return None
    return load(path, options.weights, options.checkpoint, options.device, options.ema_length)


def _stored(path: Path, channels: int | None) -> _Stored:
    data = images.load(str(path), images.DataOptions(channels=channels))
    parts = tuple(Crops.of(part) for part in (data.train, data.held_out) if len(part))
    return _Stored(parts, data.train.class_names)


def _check_shapes(sides: tuple[_Side, _Side], real: tuple[int, ...]) -> None:
    for side in sides:
        if side.shape != real:
            raise DataError(
                f"{side.name} ({side.path}) has pictures of {side.shape} (channels, height, width),"
                f" the real ones are {real}; compare pictures of one shape"
            )


def _strangers(sides: tuple[_Side, _Side]) -> tuple[str, ...]:
    marks = [one.model.trained.get("data_fingerprint") for one in sides if one.model is not None]
    if len(marks) < 2 or None in marks or marks[0] == marks[1]:
        return ()
    return ("A and B were trained on different pictures: one may know those held out by the other",)


# --- real pictures ------------------------------------------------------------------------------


def _real(sides: tuple[_Side, _Side], options: EvaluateOptions) -> Real:
    """Those that the options name, else those of A, else of B."""
    for side in sides:
        if side.model is not None and (options.data is not None or side.path.is_dir()):
            return real_pictures(side.path, side.model, options.data)
    if options.data is None:
        raise ConfigError("data is missing: neither A nor B is a run; pass --data FOLDER")
    channels, *size = sides[0].shape
    chosen = DataConfig(options.data, resolution=(size[0], size[1]), channels=channels)
    data = images.load(options.data, data_options(chosen))
    labelled = data.train.labels is not None
    return Real(Crops.of(data.train), Crops.of(data.held_out), False, labelled, ())


# --- what is compared ---------------------------------------------------------------------------


def _count(sides: tuple[_Side, _Side], options: EvaluateOptions) -> tuple[int, tuple[str, ...]]:
    """How many samples of each, and what is to be said about it."""
    model = next((side.model for side in sides if side.model is not None), None)
    asked = options.num_samples
    wanted = asked or fitting_count(*sides[0].shape[1:])
    wanted = wanted if model is None else sample_count(model, asked)
    stored = [(len(side.stored), side.name) for side in sides if side.stored is not None]
    fewest, name = min(stored, default=(wanted, ""))
    if fewest >= wanted:
        return wanted, ()
    return fewest, (f"{fewest} samples of each: {name} has no more pictures",)


def _samples(
    sides: tuple[_Side, _Side], real: Real, config: SampleConfig, progress: Progress
) -> tuple[tuple[Split, Split], tuple[str, ...]]:
    """Of both as many, labelled where the real pictures have their classes."""
    names = real.train.dataset.class_names if real.labelled else ()
    made, notes = list[Split](), list[str]()
    for side in sides:
        split = _sample(side, config, partial(progress, f"samples of {side.name}"))
        if names and not (split.label is not None and _same_classes(side, names)):
            notes.append(f"{side.name} does not have the real pictures' classes: taken without")
            split = Split(split.x0)
        made.append(split if names else Split(split.x0))
    return (made[0], made[1]), tuple(notes)


def _sample(side: _Side, config: SampleConfig, progress: Callable[[int, int], None]) -> Split:
    if side.model is None:
        assert side.stored is not None
        return side.stored.some(config.num_images)
    made = sampled(side.model, None, config, progress)
    return Split(made, labels_in_turn(side.model, len(made)))


def _same_classes(side: _Side, names: tuple[str, ...]) -> bool:
    """By name; numbers alone, as an .npz has them, are taken for the places of the names."""
    if side.model is not None:
        ours = side.model.pictures.class_names
        return ours == names if ours else side.model.spec.classes == len(names)
    assert side.stored is not None
    ours = side.stored.class_names
    numbered = all(name.isdecimal() for name in ours) and len(ours) <= len(names)
    return ours == names or numbered


def _losses(
    sides: tuple[_Side, _Side],
    held_out: Split,
    options: EvaluateOptions,
    progress: Callable[[int, int], None],
) -> tuple[LossDifference | None, tuple[str, ...]]:
    """None with a note where they cannot be compared."""
    a, b = (side.model for side in sides)
    if a is None or b is None:
        who = " and ".join(side.name for side in sides if side.model is None)
        return None, (f"losses by noise level were not compared: no model came with {who}",)
    try:
        losses = compare_losses(
            _contender(a, held_out),
            _contender(b, held_out),
            held_out,
            draws=draws_of(options, held_out),
            seed=options.sampling.seed,
            progress=progress,
        )
    except (ConfigError, DataError) as error:
        return None, (f"losses by noise level were not compared: {error}",)
    return losses, ()


def _contender(model: Model, held_out: Split) -> Contender:
    return Contender(
        model.denoiser,  # pyright: ignore[reportArgumentType] # its own protocol
        labelled=model.spec.classes > 0 and held_out.label is not None,
        null=takes_null(model),
        device=next(model.net.parameters()).device,
    )

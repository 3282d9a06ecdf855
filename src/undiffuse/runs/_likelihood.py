"""How probable a run's model holds its training pictures and held-out ones to be."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse import evaluation, likelihood, runtime
from undiffuse.checkpoint import Model
from undiffuse.errors import ConfigError, DataError
from undiffuse.likelihood import Grid, Likelihood, Reading, reading_of
from undiffuse.runs._real import Crops, Real, real_pictures

# Defaults that keep digits to about a minute: the time goes with pictures, and much with pixels.
MOST_IMAGES, FEWEST_IMAGES, MEASURED_PIXELS = 50, 8, 2**13
AT_ONCE, AT_ONCE_PIXELS = 64, 2**14
HELD_OUT_FIRST = 1 << 32  # held-out pictures get random numbers of their own

Progress = Callable[[str, int, int], None]  # (what is done, how much of it, of how much)


class Side(StrEnum):
    """Which pictures."""

    TRAIN = "train"
    HELD_OUT = "held-out"
    BOTH = "both"


@dataclass(frozen=True)
class LikelihoodOptions:
    """What to measure, and how closely."""

    num_images: int | None = None  # of each side; None: 50 of 8x8, fewer of larger ones
    side: Side = Side.BOTH
    given_class: bool = False  # of pictures given their class; else of pictures alone
    num_probes: int | None = None  # None: exact up to 256 values, else 8
    tolerance: float = 0.01  # bits per dimension
    data: str | None = None  # instead of the run's own
    seed: int = 0


@dataclass(frozen=True)
class RunLikelihood:
    """The numbers as JSON has them, and what they were made of, by side."""

    body: dict[str, Any]
    found: Mapping[str, Likelihood]


def run_likelihood(
    path: str | Path,
    model: Model,
    options: LikelihoodOptions = LikelihoodOptions(),  # frozen
    progress: Progress = lambda what, done, total: None,
) -> RunLikelihood:
    """Bits per dimension of training pictures and held-out ones, evenly spread over all of them.

    A model that holds its training pictures to be much more probable has memorised them. With
    labels a model that knows "no class" is asked about pictures alone, unless `given_class`.

    Args:
        path: the run or model file that `model` comes from; it says where its pictures are.
        model: as `load` returns it.

    Raises:
        CheckpointError: it was trained on pictures given in Python, and the run has no copy.
        DataError: its pictures are gone, or none are held out.
        ConfigError: a model file without data, a class that is not known, or options out of range.
    """
    real = real_pictures(Path(path), model, options.data)
    chosen = _chosen(model, real, options)
    labelled = _labelled(model, real, options.given_class)
    together = torch.cat([split.x0 for split in chosen.values()])
    reading = reading_of(together, real.train.dataset.bits)
    found = {
        side: _measured(model, reading, split, labelled, options, side, progress)
        for side, split in chosen.items()
    }
    return RunLikelihood(_body(model, real, reading, labelled, options, found), found)


def _chosen(model: Model, real: Real, options: LikelihoodOptions) -> dict[str, evaluation.Split]:
    sides = {Side.TRAIN: real.train, Side.HELD_OUT: real.held_out}
    wanted = {s: crops for s, crops in sides.items() if options.side in (s, Side.BOTH)}
    if options.side is Side.BOTH and not len(real.held_out):
        del wanted[Side.HELD_OUT]
    for side, crops in wanted.items():
        if not len(crops):
            raise DataError(f"no {side} pictures in {options.data or 'the data of this run'}")
    pixels = model.pictures.height * model.pictures.width
    fitting = min(MOST_IMAGES, max(FEWEST_IMAGES, MEASURED_PIXELS // pixels))
    count = fitting if options.num_images is None else options.num_images
    if count < 1:
        raise ConfigError(f"num_images must be at least 1; got {count}")
    return {side.value: _spread(crops, count) for side, crops in wanted.items()}


def _spread(crops: Crops, count: int) -> evaluation.Split:
    """So many, or all, evenly over the whole set."""
    few = min(count, len(crops))
    return crops.at(np.arange(few) * len(crops) // few)


def _labelled(model: Model, real: Real, wanted: bool) -> bool:
    """Whether the pictures' classes are told."""
    if wanted and not model.spec.classes:
        raise ConfigError("given_class: this model was trained without classes")
    if wanted and not real.labelled:
        raise ConfigError("given_class: the pictures do not have the classes of this model")
    return wanted or (model.spec.classes > 0 and not model.spec.style.embedding.null)


def _measured(
    model: Model,
    reading: Reading,
    split: evaluation.Split,
    labelled: bool,
    options: LikelihoodOptions,
    side: str,
    progress: Progress,
) -> Likelihood:
    pixels = model.pictures.height * model.pictures.width
    return likelihood.bits_per_dimension(
        replace(model.denoiser, net=runtime.callable_net(model.net.eval())),
        model.denoiser.schedule,
        split.x0,
        split.label if labelled else None,
        reading=reading,
        num_probes=options.num_probes,
        tolerance=options.tolerance,
        seed=options.seed,
        first=0 if side == Side.TRAIN else HELD_OUT_FIRST,
        batch_size=min(AT_ONCE, max(1, AT_ONCE_PIXELS // pixels)),
        device=next(model.net.parameters()).device,
        # another bar where more points turn out to be needed
        progress=lambda done, total: progress(f"{side} pictures, {total:,} points", done, total),
    )


# --- as JSON ------------------------------------------------------------------------------------


def _body(
    model: Model,
    real: Real,
    reading: Reading,
    labelled: bool,
    options: LikelihoodOptions,
    found: Mapping[str, Likelihood],
) -> dict[str, Any]:
    some = next(iter(found.values()))
    values = model.pictures.channels * model.pictures.height * model.pictures.width
    return {
        "splits": [_split(side, one) for side, one in found.items()],
        "held_out_minus_train": _difference(found),
        "reading": _described(reading),
        "low": some.low,
        "high": some.high,
        "given_class": labelled,
        "trace": f"{some.probes} probes" if some.probes else "exact",
        "values": values,
        "tolerance": options.tolerance,
        "seed": options.seed,
        "trained_steps": model.trained.get("steps"),
        "warnings": [*real.warnings, *_unreached(found, options.tolerance)],
    }


def _split(side: str, found: Likelihood) -> dict[str, Any]:
    return {
        "name": side,
        "pictures": len(found),
        "bits_per_dimension": found.mean,
        "standard_error": found.standard_error,
        "error": found.mean_error,
        "integration_error": _mean(found.integration_error),
        "probe_error": _mean(found.probe_error),
        "prior_error": _mean(found.prior_error),
        "truncation_error": _mean(found.truncation_error),
        "evaluations": _mean(found.evaluations),
        "products": _mean(found.products),
        "bits": [round(bits, 6) for bits in found.bits.tolist()],
    }


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _described(reading: Reading) -> str:
    return (
        f"{reading.levels} levels per value" if isinstance(reading, Grid) else "numbers under noise"
    )


def _difference(found: Mapping[str, Likelihood]) -> dict[str, float | None] | None:
    """Held out minus train: above 0 where the model knows its training pictures better."""
    if len(found) < 2:
        return None
    train, held_out = found[Side.TRAIN], found[Side.HELD_OUT]
    errors = (train.standard_error, held_out.standard_error)
    both = None if None in errors else math.hypot(*(e for e in errors if e is not None))
    return {"value": held_out.mean - train.mean, "standard_error": both}


def _unreached(found: Mapping[str, Likelihood], tolerance: float) -> list[str]:
    return [
        f"{count} of {len(one)} {side} pictures miss the tolerance of {tolerance:g} bits per"
        f" dimension: the estimated error is up to {float(one.integration_error.max()):.2g}"
        for side, one in found.items()
        if (count := int((one.integration_error > tolerance).sum()))
    ]

"""From a path to a model: a model file, a finished run, or a run still under way."""

import difflib
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from undiffuse import runtime
from undiffuse.checkpoint import Checkpoints, Model, load_model
from undiffuse.config import Device, Weights
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.recipes import PRESETS

ChoiceT = TypeVar("ChoiceT", bound=StrEnum)

MODEL_FILE = "model.safetensors"


def list_models() -> list[str]:
    """The names of the presets, smallest network first."""
    return list(PRESETS)


def load(
    path: str | Path,
    weights: Weights | str = Weights.EMA,
    checkpoint: int | None = None,
    device: Device | str = Device.AUTO,
) -> Model:
    """A trained model, ready for `generate(model, 16)`.

    Args:
        path: a model file, or a run folder. An unfinished run gives its newest checkpoint.
        weights: "ema", the average, or "raw", the last update; raw needs a checkpoint.
        checkpoint: the step to load, instead of the finished model or the newest.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "mps".

    Raises:
        CheckpointError: nothing is there, or it is damaged; the message says what is whole.
    """
    where = runtime.choose_device(choice("device", Device, device))
    model = _read(Path(path), choice("weights", Weights, weights), checkpoint)
    runtime.move(model.net, where)
    return model


def _read(path: Path, wanted: Weights, checkpoint: int | None) -> Model:
    if path.is_dir():
        return _from_run(path, wanted, checkpoint)
    if not path.exists():
        raise CheckpointError(missing_run(path))
    if wanted is Weights.RAW or checkpoint is not None:
        raise ConfigError(f"weights and checkpoint choose within a run folder; {path} is a file")
    return load_model(path)


def missing_run(path: Path) -> str:
    """The message for a path where nothing is, with the nearest name."""
    parent = path.parent
    runs = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, runs, 1)
    hint = f" Did you mean {parent / near[0]}?" if near else ""
    there = f" There: {', '.join(runs[:8])}" if runs else ""
    return f"No run or model file at {path}.{hint}{there}"


def choice(name: str, kind: type[ChoiceT], value: str) -> ChoiceT:
    """The member of that value.

    Raises:
        ConfigError: there is none; the message lists them.
    """
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(member.value for member in kind)
        raise ConfigError(f"{name} must be one of {choices}; got {value!r}") from None


def _from_run(run: Path, weights: Weights, checkpoint: int | None) -> Model:
    finished = run / MODEL_FILE
    checkpoints = Checkpoints(run / "checkpoints")
    if finished.exists() and weights is Weights.EMA and checkpoint is None:
        return load_model(finished)
    if not checkpoints.steps():
        if finished.exists():
            raise CheckpointError(f"{run} has no checkpoints, only {MODEL_FILE} with ema weights")
        raise CheckpointError(
            f"{run} holds neither {MODEL_FILE} nor a checkpoint; train first, or name another run"
        )
    return checkpoints.model(checkpoint, weights.value)

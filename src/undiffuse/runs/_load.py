"""From a path to a model: a model file, a finished run, or a run still under way."""

import difflib
from pathlib import Path

from undiffuse.checkpoint import Checkpoints, Model, load_model
from undiffuse.config import Weights
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.recipes import PRESETS

MODEL_FILE = "model.safetensors"


def list_models() -> list[str]:
    """The names of the presets, smallest network first."""
    return list(PRESETS)


def load(
    path: str | Path, weights: Weights | str = Weights.EMA, checkpoint: int | None = None
) -> Model:
    """A trained model, ready for `generate(model, 16)`.

    Args:
        path: a model file, or a run folder. An unfinished run gives its newest checkpoint.
        weights: "ema", the average, or "raw", the last update; raw needs a checkpoint.
        checkpoint: the step to load, instead of the finished model or the newest.

    Raises:
        CheckpointError: nothing is there, or it is damaged; the message says what is whole.
    """
    path, wanted = Path(path), _weights(weights)
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


def _weights(weights: Weights | str) -> Weights:
    try:
        return Weights(weights)
    except ValueError:
        raise ConfigError(f"weights must be ema or raw; got {weights!r}") from None


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

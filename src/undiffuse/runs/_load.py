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
from undiffuse.runs._averages import early, rebuilt

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
    ema_length: float | None = None,
) -> Model:
    """A trained model, ready for `generate(model, 16)`.

    Args:
        path: a model file, or a run folder. An unfinished run gives its newest checkpoint.
        weights: "ema", the average, or "raw", the last update; raw needs a checkpoint.
        checkpoint: the step to load, instead of the finished model or the newest.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "mps".
        ema_length: of the average, rebuilt as `averaged` does; `checkpoint` is its step then.

    Raises:
        CheckpointError: nothing is there, or it is damaged; the message says what is whole.
        ConfigError: a choice that is not there to be made.
    """
    where = runtime.choose_device(choice("device", Device, device))
    wanted = choice("weights", Weights, weights)
    model = _read(Path(path), wanted, checkpoint, ema_length)
    runtime.move(model.net, where)
    return model


def averaged(
    path: str | Path,
    length: float,
    step: int | None = None,
    device: Device | str = Device.AUTO,
) -> Model:
    """The average of a run's weights of any length, from those that it has kept (post-hoc EMA).

    Karras et al. 2023, 2312.02696, section 3.2. A length that was kept comes back bit for bit.

    Args:
        path: a run folder.
        length: sigma_rel, the profile's deviation as a share of the steps, in [0.005, 0.25].
        step: one at which averages were kept, as if the run had ended there; None for the last.

    Raises:
        CheckpointError: no run is there, or it has kept no averages, or none of that step.
        ConfigError: what was kept does not reach so far; the message says which lengths it does.
    """
    return load(path, checkpoint=step, device=device, ema_length=length)


def guide(
    run: str | Path, which: str | Path | int = "early", device: Device | str = Device.AUTO
) -> Model:
    """A weaker model to guide a run's own with: `generate(weak=...)`, autoguidance (2406.02507).

    Args:
        run: the folder of the run that is to be guided.
        which: "early", its longest average of an eighth of the steps; a step, that of this step;
            or the path of another run or model.

    Raises:
        CheckpointError: nothing is there, or the run has kept no averages, none of that step, or
            no early one.
        ConfigError: `run` is a file.
    """
    if isinstance(which, Path) or (isinstance(which, str) and which != "early"):
        return load(which, device=device)
    path = Path(run)
    check_run(path, "autoguidance early and of a step")
    where = runtime.choose_device(choice("device", Device, device))
    model = early(path, None if isinstance(which, str) else which)
    runtime.move(model.net, where)
    return model


def _read(path: Path, wanted: Weights, checkpoint: int | None, length: float | None) -> Model:
    if wanted is Weights.RAW or checkpoint is not None or length is not None:
        check_run(path, "weights, checkpoint and ema_length")
    if not path.exists():
        raise CheckpointError(missing_run(path))
    if not path.is_dir():
        return load_model(path)
    if length is None:
        return _from_run(path, wanted, checkpoint)
    if wanted is Weights.RAW:
        raise ConfigError(f"ema_length {length:g} is of an average, and weights raw is none")
    return rebuilt(path, length, checkpoint)


def check_run(path: Path, names: str) -> None:
    """Refuse what is no run folder, for options of these names, which choose within one.

    Raises:
        CheckpointError: nothing is there.
        ConfigError: it is a file.
    """
    if not path.exists():
        raise CheckpointError(missing_run(path))
    if not path.is_dir():
        raise ConfigError(f"{names} choose within a run folder; {path} is a file")


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

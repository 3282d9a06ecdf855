"""The run folder: a public format, written so that no crash leaves a torn file.

config.json  run.json  metrics.jsonl  log.txt  skipped.txt  model.safetensors
samples/  checkpoints/step_00001500/  ema/  cache/  evaluation.json  levels.png
pareto.json  pareto.png  report.html
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

from undiffuse.config import RunConfig, flatten, override
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.runs._load import missing_run


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def info(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def averages(self) -> Path:
        return self.path / "ema"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def levels(self) -> Path:
        return self.path / "levels.png"

    @property
    def pareto(self) -> Path:
        return self.path / "pareto.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def create(self) -> None:
        """Make the folders.

        Raises:
            ResourceError: the place cannot be written.
        """
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def set_aside(self, step: int) -> None:
        """Before a run goes on from `step`: what it will write anew must not pass for its state.

        The finished model and its evaluation are kept under another name; later sample grids go.
        """
        for path in (self.model, self.evaluation):
            if path.exists():
                path.replace(_free(path.with_stem(f"{path.stem}-before-{step:08d}")))
        for grid in self.samples.glob("step_*.png"):
            if grid.stem > f"step_{step:08d}":
                grid.unlink()


def _free(path: Path) -> Path:
    """`path`, numbered where something has that name: going back twice must not lose the first."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(one for one in chain((path,), numbered) if not one.exists())


def unwritable(path: Path, error: OSError) -> ResourceError:
    """The message for a place that cannot be written."""
    reason = error.strerror or str(error)
    return ResourceError(f"output_dir {path} cannot be written: {reason}; choose another")


def check_writable(path: Path) -> None:
    """Refuse an impossible place before anything is computed, without creating it.

    Raises:
        ResourceError: a parent is no folder or may not be written.
    """
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ResourceError(f"output_dir {path} cannot be written: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ResourceError(f"output_dir {path} cannot be written: no permission in {nearest}")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new, never half."""
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object")
    return cast("dict[str, Any]", value)


def save_config(folder: RunFolder, config: RunConfig) -> None:
    write_json(folder.config, flatten(config))


def stored_config(path: Path) -> RunConfig:
    """The settings a run was made with.

    Raises:
        CheckpointError: no run is there, or its config.json is damaged.
    """
    folder = RunFolder(path)
    if not folder.config.exists():
        raise CheckpointError(missing_run(path) if not path.exists() else _no_config(path))
    try:
        return override(RunConfig(), read_json(folder.config))
    except ConfigError as error:
        raise CheckpointError(f"{folder.config}: {error}") from error


def _no_config(path: Path) -> str:
    return f"{path} is no run: it has no config.json; name a folder that train has written"


def append_line(path: Path, line: str) -> None:
    """Add one line to a log; a log that cannot be written never stops a run."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        return


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; torn or foreign lines are left out."""
    return (
        list(_records(path.read_text(encoding="utf-8", errors="replace").splitlines()))
        if (path.is_file())
        else []
    )


def _records(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):  # pyright: ignore[reportUnknownMemberType]
            yield cast("dict[str, Any]", record)


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will repeat."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    if path.is_file():
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

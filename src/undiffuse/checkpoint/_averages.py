"""Averages of the weights, kept while a run goes on: model files, each of which stands alone.

    ema/step_00001250_ema0.05.safetensors

What a file is, its header says: `trained` holds the step and the average's length.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from torch import Tensor

from undiffuse.checkpoint._codec import shown
from undiffuse.checkpoint._disk import REAL_DISK, Disk, reason_of
from undiffuse.checkpoint._model import (
    Model,
    load_model,
    load_weights,
    read_header,
    save_model,
)
from undiffuse.errors import CheckpointError, ResourceError


@dataclass(frozen=True)
class Average:
    """One file: the average of relative length `length` (2312.02696) after `step` updates."""

    path: Path
    step: int
    length: float

    def model(self) -> Model:
        """The file as a model, on the CPU.

        Raises:
            CheckpointError: it is damaged.
        """
        return load_model(self.path)

    def weights(self) -> dict[str, Tensor]:
        """Its weights alone, by name.

        Raises:
            CheckpointError: it is damaged.
        """
        return load_weights(self.path)


@dataclass(frozen=True)
class Averages:
    """The averages that one run has kept.

    Args:
        folder: made when first needed, in an existing folder.
        disk: the file operations for writing.
    """

    folder: Path
    disk: Disk = field(default=REAL_DISK)

    def kept(self) -> tuple[Average, ...]:
        """By step, then by length; weights are not read.

        Raises:
            CheckpointError: a file has no header of ours, which the message names.
        """
        found = [_average(self.folder / name) for name in self._names()]
        return tuple(sorted(found, key=lambda one: (one.step, one.length)))

    def save(self, model: Model, weights: dict[str, Tensor] | None = None) -> Path:
        """Keep an average; the file appears whole or not at all, and replaces one of that name.

        Args:
            model: its `trained` says `steps` and `ema_length`.
            weights: instead of the model's own, by name.

        Raises:
            CheckpointError: the weights are not finite, or `trained` does not say so.
            ResourceError: the disk is full or failed.
        """
        step, length = _step_and_length(model.trained, "this model")
        path = self.folder / f"step_{step:08d}_ema{length!r}.safetensors"
        try:
            if not self.folder.is_dir():
                self.disk.make_folder(self.folder)
                self.disk.sync_folder(self.folder.parent)
        except OSError as error:
            raise ResourceError(f"cannot save {path}: {reason_of(error)}") from error
        save_model(path, model, weights, self.disk)
        return path

    def set_aside(self, step: int) -> None:
        """Before a run goes on from `step`: what it will keep anew gets another name, which nothing
        had before, and what a killed save has left goes.

        Raises:
            ResourceError: a file cannot be renamed or removed.
        """
        later = [self.folder / name for name in self._names() if _step_in(name) > step]
        torn = [self.folder / name for name in self._names(r"\.tmp-step_.*")]
        try:
            for path in later:
                once = f"{path.stem}-before-{step:08d}-{uuid4().hex[:8]}"
                self.disk.rename(path, path.with_name(f"{once}{path.suffix}"))
            for path in torn:
                self.disk.remove(path)
        except OSError as error:
            raise ResourceError(f"cannot rename in {self.folder}: {reason_of(error)}") from error

    def _names(self, pattern: str = r"step_\d{8,18}_ema[0-9.e-]+\.safetensors") -> list[str]:
        try:
            there = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {reason_of(error)}") from error
        return sorted(name for name in there if re.fullmatch(pattern, name, re.ASCII))


def _step_in(name: str) -> int:
    return int(name.split("_")[1])


def _average(path: Path) -> Average:
    return Average(path, *_step_and_length(read_header(path).trained, str(path)))


def _step_and_length(trained: object, where: str) -> tuple[int, float]:
    if isinstance(trained, dict):
        step, length = trained.get("steps"), trained.get("ema_length")
        if type(step) is int and step > 0 and type(length) is float and 0.0 < length < 1.0:
            return step, length
    raise CheckpointError(f"{where}: no steps and ema_length of an average; got {shown(trained)}")

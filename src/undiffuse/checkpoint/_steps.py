"""Checkpoint directories: what a run needs to go on, kept through crashes and losses of power.

    checkpoints/step_00001234/  model.safetensors ema.safetensors optim.safetensors state.json
                                MANIFEST.json

A directory gets its name only when all of it is on the disk, and the manifest, written last, holds
size and SHA-256 of each file. Whatever happens, every directory therefore either verifies or is
refused with its reason, and an old one goes only after the new one has been read again.
"""

import errno
import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar
from uuid import uuid4

from undiffuse.checkpoint._directory import (
    Groups,
    Loaded,
    Snapshot,
    is_whole,
    payloads,
    read,
    read_model,
    verify,
)
from undiffuse.checkpoint._disk import REAL_DISK, Disk, Payload, amount, reason_of, remove_tree
from undiffuse.checkpoint._model import Model
from undiffuse.errors import CheckpointError, ConfigError, ResourceError

SPARE = 1.3  # free space asked for, as a multiple of what will be written

Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds the `step_...` directories; made when first needed, in an existing folder.
        keep: how many to keep, at least 2: one may turn out to be damaged.
        disk: the file operations for writing.

    Raises:
        ConfigError: `keep` is below 2.
    """

    folder: Path
    keep: int = 2
    disk: Disk = field(default=REAL_DISK)

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise ConfigError(f"keep must be at least 2, as one may be damaged; got {self.keep}")

    def steps(self) -> tuple[int, ...]:
        """The steps that have a directory, ascending; whether they verify, `read` tells."""
        return tuple(sorted(_step_of(name) for name in self._names() if _is_step(name)))

    def path(self, step: int) -> Path:
        """The directory of one step."""
        return self.folder / f"step_{step:08d}"

    def save(self, snapshot: Snapshot) -> Path:
        """Write, verify, and only then let old ones go. Returns the new directory.

        A directory of the same step is replaced. Steps above this one are left alone and never
        counted among the ones kept: they belong to a future that training came back from.

        Raises:
            CheckpointError: a tensor is not finite or does not fit the spec, or the state is not
                JSON; nothing is written.
            ResourceError: the disk is full or failed; older checkpoints are untouched.
        """
        files = payloads(snapshot)
        final = self.path(snapshot.step)
        temporary = self.folder / f".tmp-{snapshot.step}-{uuid4().hex}"
        needed = sum(payload.size for payload in files.values())
        try:
            self._make_room(needed)
            self._write(temporary, files)
            self._put_in_place(temporary, final)
        except OSError as error:
            if temporary.exists():
                with suppress(OSError):
                    remove_tree(self.disk, temporary)
            raise ResourceError(self._explain(error, final, needed)) from error
        self._read_back(final, snapshot.step)
        self._prune(snapshot.step)
        return final

    def read(self, step: int | None = None) -> tuple[Loaded, tuple[str, ...]]:
        """A checkpoint, and why newer ones were passed over.

        Args:
            step: None for the highest that verifies; a given step is never exchanged for another.

        Raises:
            CheckpointError: there is none, the given one is missing or damaged, or all are.
        """
        return self._first_good(step, read)

    def model(self, step: int | None = None, weights: Literal["ema", "raw"] = "ema") -> Model:
        """The model as it was at a step, to draw with; passed-over newer ones are logged.

        Raises:
            CheckpointError: as `read`, or the weights cannot draw.
        """
        group = {"ema": "ema", "raw": "model"}[weights]
        model, rejected = self._first_good(step, partial(read_model, group=group))
        for reason in rejected:
            logging.getLogger(__name__).warning("passed over: %s", reason)
        return model

    def clean(self) -> None:
        """Remove what interrupted saves left. Only for the holder of the run's lock.

        Raises:
            ResourceError: it cannot be removed.
        """
        try:
            for name in self._names():
                self._clean_one(name)
        except OSError as error:
            raise ResourceError(f"cannot clean {self.folder}: {reason_of(error)}") from error

    def rewind(self, step: int) -> tuple[int, ...]:
        """Set later steps aside, as `set-aside-step_...`, so that a run goes on from `step`.

        Returns:
            The steps set aside; their directories are kept whole.

        Raises:
            ResourceError: they cannot be renamed.
        """
        later = tuple(one for one in self.steps() if one > step)
        try:
            for one in later:
                aside = self.folder / f"set-aside-{uuid4().hex[:8]}-{self.path(one).name}"
                self.disk.rename(self.path(one), aside)
            if later:
                self.disk.sync_folder(self.folder)
        except OSError as error:
            raise ResourceError(f"cannot rename in {self.folder}: {reason_of(error)}") from error
        return later

    def spare(self, tensors: Groups) -> int:
        """Bytes that may be written beside, so that a checkpoint of these tensors still finds room.

        Raises:
            ResourceError: the disk does not say.
        """
        needed = sum(one.nbytes for group in tensors.values() for one in group.values())
        there = self.folder if self.folder.is_dir() else self.folder.parent
        try:
            return self.disk.free_space(there) - int(SPARE * needed)
        except OSError as error:
            raise ResourceError(f"{there} cannot be measured: {reason_of(error)}") from error

    # --- steps of saving ------------------------------------------------------------------------

    def _make_room(self, needed: int) -> None:
        if not self.folder.is_dir():
            self.disk.make_folder(self.folder)
            self.disk.sync_folder(self.folder.parent)
        if self.disk.free_space(self.folder) < SPARE * needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write(self, temporary: Path, files: Mapping[str, Payload]) -> None:
        self.disk.make_folder(temporary)
        for name, payload in files.items():
            self.disk.write(temporary / name, payload.chunks)
            self.disk.sync(temporary / name)
        self.disk.sync_folder(temporary)

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        """Rename; one of the same step steps aside first, under a name that `clean` gives back."""
        aside = self.folder / f".old-{final.name}-{uuid4().hex}"
        replaces = final.is_symlink() or final.exists()
        if replaces:
            self.disk.rename(final, aside)
        try:
            self.disk.rename(temporary, final)
        except OSError:
            if replaces:
                self.disk.rename(aside, final)
            raise
        self.disk.sync_folder(self.folder)
        if replaces:
            remove_tree(self.disk, aside)

    def _read_back(self, final: Path, step: int) -> None:
        try:
            verify(final, step)
        except CheckpointError as error:
            raise ResourceError(
                f"the disk does not give back what was saved: {error}. {self._intact()}"
            ) from error

    def _prune(self, newest: int) -> None:
        """Keep the `keep` highest that verify, up to the one just saved; by number, never by age
        of the files. Damaged ones do not count, as they could not be gone back to."""
        older = [step for step in self.steps() if step < newest]
        if len(older) < self.keep:
            return
        kept = 1
        for step in reversed(older):
            if kept >= self.keep:
                self._remove(step, newest)
            elif is_whole(self.path(step), step):
                kept += 1

    def _remove(self, step: int, newest: int) -> None:
        """Under another name first, so that no half of it is ever taken for a checkpoint."""
        trash = self.folder / f".trash-{step}-{uuid4().hex}"
        try:
            self.disk.rename(self.path(step), trash)
            remove_tree(self.disk, trash)
        except OSError as error:
            raise ResourceError(
                f"{self.path(newest)} is saved, but {self.path(step)} cannot be removed:"
                f" {reason_of(error)}"
            ) from error

    def _clean_one(self, name: str) -> None:
        path = self.folder / name
        if match := re.fullmatch(r"\.old-(step_\d{8,})-[0-9a-f]{32}", name):
            final = self.folder / match[1]
            if not final.exists():  # the save stopped between its two renames
                self.disk.rename(path, final)
                self.disk.sync_folder(self.folder)
                return
        elif not re.fullmatch(r"\.(tmp|trash)-\d+-[0-9a-f]{32}", name):
            return
        remove_tree(self.disk, path)

    def _explain(self, error: OSError, final: Path, needed: int) -> str:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return f"cannot save {final}: {reason_of(error)}. {self._intact()}"
        free = "an unknown amount"
        with suppress(OSError):
            free = amount(self.disk.free_space(self.folder))
        wanted = amount(int(SPARE * needed))
        return f"Disk full: {final} needs {wanted}, {free} free. {self._intact()}"

    def _intact(self) -> str:
        for step in reversed(self.steps()):
            if is_whole(self.path(step), step):
                return f"{self.path(step).name} is intact"
        return f"{self.folder} holds no whole checkpoint"

    # --- steps of reading -----------------------------------------------------------------------

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder} cannot be read: {reason_of(error)}") from error

    def _first_good(
        self, step: int | None, reader: Callable[[Path, int], Result]
    ) -> tuple[Result, tuple[str, ...]]:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        if step is not None:
            if step not in steps:
                there = ", ".join(self.path(one).name for one in steps)
                raise CheckpointError(f"{self.path(step)} does not exist; there are {there}")
            return reader(self.path(step), step), ()
        rejected: list[str] = []
        for one in reversed(steps):
            try:
                return reader(self.path(one), one), tuple(rejected)
            except CheckpointError as error:
                rejected.append(str(error).replace(f"{self.folder}{os.sep}", ""))
        reasons = "; ".join(rejected)
        raise CheckpointError(f"every checkpoint in {self.folder} is damaged: {reasons}")


def _is_step(name: str) -> bool:
    return bool(re.fullmatch(r"step_(\d{8}|[1-9]\d{8,17})", name, re.ASCII))


def _step_of(name: str) -> int:
    return int(name.removeprefix("step_"))

"""The real pictures that an evaluation measures with: which they are, and what is known of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undiffuse import evaluation, images
from undiffuse.checkpoint import Model
from undiffuse.config import DataConfig
from undiffuse.errors import CheckpointError, ConfigError, DataError, UndiffuseError
from undiffuse.runs._folder import RunFolder, stored_config
from undiffuse.runs._plan import data_options
from undiffuse.runs._train import IN_PYTHON

MOST_PICTURES, MOST_VALUES = 5000, 2**26  # of a split, held in memory for the measures
CHUNK_VALUES = 2**24  # of training pictures searched at a time

CHANGED = "the pictures changed since training: held-out ones may have been trained on"
NEW = (
    "not the pictures this model was trained on: 'train' and 'held out' are both new to it,"
    " nothing here shows memorising"
)


@dataclass(frozen=True)
class Real:
    """The pictures, and what a reader of the figures must know about them.

    `known` is False where the model was trained on other pictures than `train`; `labelled` is
    False where their labels are none of the model's classes.
    """

    train: "Crops"
    held_out: "Crops"
    known: bool
    labelled: bool
    warnings: tuple[str, ...]

    def splits(self) -> tuple[evaluation.Split, evaluation.Split]:
        """What the measures hold in memory of both sides."""
        both = (self.train.some(), self.held_out.some())
        train, held_out = (part if self.labelled else replace(part, label=None) for part in both)
        return train, held_out


def real_pictures(path: Path, model: Model, other: str | None) -> Real:
    """The pictures that the model at `path` was trained on, or `other` ones.

    Raises:
        CheckpointError: it was trained on pictures given in Python, and the run has no copy.
        DataError: the pictures it was trained on are gone, and the run has no copy.
        ConfigError: a model file without `other`, or pictures of another shape.
    """
    source = _source(path, model, other)
    data = source.data
    wanted = (model.pictures.channels, model.pictures.height, model.pictures.width)
    got = (data.train.channels, *data.train.size)
    if got != wanted:
        raise ConfigError(
            f"data has pictures of {got} (channels, height, width), the model makes {wanted}"
        )
    known, strange = _trained_on(source, model)
    labelled, unlabelled = _labels(data, model)
    warnings = (*source.notes, *strange, *unlabelled)
    return Real(Crops.of(data.train), Crops.of(data.held_out), known, labelled, warnings)


# --- which pictures -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    data: images.Data
    own: bool  # the place that the run's pictures came from
    notes: tuple[str, ...] = ()


def _source(path: Path, model: Model, other: str | None) -> _Source:
    folder = RunFolder(path)
    if other is None:
        if not path.is_dir():
            raise ConfigError(f"data is missing: {path} is a model file; pass --data FOLDER")
        return _own(folder, stored_config(path).data, model)
    config = stored_config(path).data if folder.config.exists() else None
    if config is not None and _same_place(other, config.data):
        return _Source(images.load(other, data_options(config), folder.cache), own=True)
    if config is not None and config.data == IN_PYTHON:
        known = _given_again(other, config, model)
        if known is not None:
            return _Source(known, own=True)
    size = (model.pictures.height, model.pictures.width)
    chosen = DataConfig(other, resolution=size, channels=model.pictures.channels)
    return _Source(images.load(other, data_options(chosen)), own=False)


def _own(folder: RunFolder, config: DataConfig, model: Model) -> _Source:
    if config.data in ("digits", "photos") or Path(config.data).exists():
        return _Source(images.load(config.data, data_options(config), folder.cache), own=True)
    copy = images.load_cache(folder.cache, str(model.trained.get("data_fingerprint", "")))
    if copy is None:
        raise _gone(folder, config.data)
    gone = f"{config.data} is not there any more: its copy in {folder.cache} is used"
    return _Source(copy, own=True, notes=() if config.data == IN_PYTHON else (gone,))


def _gone(folder: RunFolder, data: str) -> UndiffuseError:
    if data == IN_PYTHON:
        return CheckpointError(
            f"{folder.path} was trained on pictures given in Python; pass them with --data"
        )
    return DataError(
        f"No folder or .npz at {data}, which {folder.path} was trained on, and no copy in"
        f" {folder.cache}; name its new place with --data"
    )


def _same_place(one: str, other: str) -> bool:
    try:
        return one == other or Path(one).samefile(other)
    except (OSError, ValueError):  # one of them is not there, or no path at all
        return False


def _given_again(source: str, config: DataConfig, model: Model) -> images.Data | None:
    """Pictures that were given in Python and now in a file, if read likewise they are the same."""
    try:
        data = images.load(source, data_options(config))
    except ConfigError:  # the run's settings do not fit them
        return None
    return data if data.fingerprint == model.trained.get("data_fingerprint") else None


# --- what is known of them ----------------------------------------------------------------------


def _trained_on(source: _Source, model: Model) -> tuple[bool, tuple[str, ...]]:
    """Whether the model may have been trained on these, and what is strange about them."""
    mark = model.trained.get("data_fingerprint")
    if not mark or mark == source.data.fingerprint:
        return True, ()
    before = str(model.trained.get("data", ""))
    if source.own or _without_count(source.data.source) == _without_count(before):
        return True, (CHANGED,)
    return False, (NEW,)


def _without_count(source: str) -> str:
    """The place alone of `pictures (24 images)`."""
    return source.rsplit(" (", 1)[0]


def _labels(data: images.Data, model: Model) -> tuple[bool, tuple[str, ...]]:
    """Whether their labels are the model's classes, by name where it knows the names."""
    classes, ours = model.spec.classes, model.pictures.class_names
    if not classes:
        return False, ()
    theirs = data.train.class_names
    same = theirs == ours if ours else len(theirs) == classes
    labelled = data.train.labels is not None and same
    if not labelled and not model.spec.style.embedding.null:
        raise ConfigError(
            f"this model must be told one of its {classes} classes ({_few(ours)}), which"
            f" {data.source} does not have ({_few(theirs)}); choose other pictures"
        )
    if labelled or data.train.labels is None:
        return labelled, ()
    return False, (
        f"{data.source} has other classes ({_few(theirs)}) than the model ({_few(ours)}):"
        " measured without labels",
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


# --- pictures out of a dataset ------------------------------------------------------------------


@dataclass(frozen=True)
class Crops:
    """All pictures that `dataset` gives unflipped, without holding them in memory together.

    Those of one canvas follow one another: place p is crop p mod `each` of picture p div `each`.
    """

    dataset: images.Dataset
    each: int  # crops of every stored canvas; 1 but for whole photographs

    @staticmethod
    def of(dataset: images.Dataset) -> "Crops":
        each = len(_part(dataset, slice(0, 1)).fixed()[0]) if len(dataset) else 1
        return Crops(dataset, each)

    def __len__(self) -> int:
        return len(self.dataset) * self.each

    def chunks(self) -> Iterator[Tensor]:
        """All of them in their order, (n, c, h, w) at a time."""
        at_once = self._at_once()
        for start in range(0, len(self.dataset), at_once):
            yield self._cut(slice(start, start + at_once))

    def at(self, places: Sequence[int] | NDArray[np.int64]) -> evaluation.Split:
        """The pictures at these places, in the order given, with their labels."""
        wanted = np.asarray(places, dtype=np.int64)
        canvases, rank = np.unique(wanted // self.each, return_inverse=True)
        x0 = torch.empty(len(wanted), self.dataset.channels, *self.dataset.size)
        at_once = self._at_once()
        for start in range(0, len(canvases), at_once):
            some = canvases[start : start + at_once]
            here = np.flatnonzero((rank >= start) & (rank < start + len(some)))
            row = (rank[here] - start) * self.each + wanted[here] % self.each
            x0[torch.from_numpy(here)] = self._cut(some)[torch.from_numpy(row)]
        labels = self.dataset.labels
        known = None if labels is None else torch.from_numpy(labels[wanted // self.each])
        return evaluation.Split(x0, known)

    def some(self) -> evaluation.Split:
        """All, or as many as the measures may hold, evenly spread over the whole set."""
        values = self.dataset.channels * self.dataset.size[0] * self.dataset.size[1]
        count = min(len(self), MOST_PICTURES, max(1, MOST_VALUES // values))
        return self.at(np.arange(count) * len(self) // max(1, count))

    def _at_once(self) -> int:
        """How many canvases."""
        return max(1, CHUNK_VALUES // int(np.prod(self.dataset.pixels.shape[1:])))

    def _cut(self, canvases: slice | NDArray[np.int64]) -> Tensor:
        """All crops of these canvases; `fixed` gives the first ones of all before the second."""
        x0, _ = _part(self.dataset, canvases).fixed()
        return x0.unflatten(0, (self.each, -1)).transpose(0, 1).flatten(0, 1)


def _part(dataset: images.Dataset, places: slice | NDArray[np.int64]) -> images.Dataset:
    """Some of the canvases; a slice of a memory map is not read yet."""
    pixels: NDArray[Any] = dataset.pixels[places]
    labels = None if dataset.labels is None else dataset.labels[places]
    return replace(dataset, pixels=pixels, labels=labels, names=("",) * len(pixels))

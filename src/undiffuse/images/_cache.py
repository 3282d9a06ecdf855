"""Decoded pictures on disk, memory-mapped on the next start if nothing has changed."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from undiffuse.errors import DataError, ResourceError
from undiffuse.images._dataset import Data, Dataset, Skipped

_FORMAT = 1
_INDEX = "cache.json"
_SIDES = ("train", "held_out")


def save_cache(data: Data, folder: Path) -> None:
    """Write ``data`` to ``folder``, for ``load(..., cache=folder)``.

    Written beside it and renamed, so that a crash leaves the old cache, none or the new one. A
    memory-mapped ``data`` of the old cache stays valid on systems where open files may be removed.
    Raises ResourceError if ``folder`` holds anything but a cache, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and _replaceable(folder)):
        raise ResourceError(f"{folder} is not a cache of pictures; choose another folder")
    fresh: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = folder.parent / f".{folder.name}.{uuid4().hex}"
        fresh.mkdir()
        _fill(fresh, data)
        _swap(fresh, folder)
    except OSError as error:
        raise ResourceError(f"cannot write the cache {folder}: {error.strerror}") from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)


def load_cache(folder: Path, fingerprint: str) -> Data | None:
    """The cached source, or None if it is missing, damaged or of another fingerprint."""
    try:
        index: dict[str, Any] = json.loads((folder / _INDEX).read_text("utf-8"))
        if index["format"] != _FORMAT or index["fingerprint"] != fingerprint:
            return None
        return Data(
            **{side: _dataset(folder, side, index[side]) for side in _SIDES},
            source=index["source"],
            attribution=index["attribution"],
            fingerprint=fingerprint,
            skipped=tuple(Skipped(**one) for one in index["skipped"]),
            notes=tuple(index["notes"]),
        )
    # Whatever is wrong with a cache, the files themselves are still there.
    except (OSError, EOFError, ValueError, KeyError, TypeError, DataError):
        return None


def _replaceable(folder: Path) -> bool:
    return (folder / _INDEX).exists() or not any(folder.iterdir())


def _fill(folder: Path, data: Data) -> None:
    index: dict[str, Any] = {
        "format": _FORMAT,
        "fingerprint": data.fingerprint,
        "source": data.source,
        "attribution": data.attribution,
        "skipped": [asdict(one) for one in data.skipped],
        "notes": data.notes,
    }
    for side, part in zip(_SIDES, (data.train, data.held_out), strict=True):
        index[side] = _written(folder, side, part)
    with open(folder / _INDEX, "w", encoding="utf-8") as file:
        json.dump(index, file)
        _sync(file.fileno(), file.flush)


def _written(folder: Path, side: str, part: Dataset) -> dict[str, Any]:
    with open(folder / f"{side}.npy", "wb") as file:
        np.save(file, part.pixels, allow_pickle=False)
        _sync(file.fileno(), file.flush)
    return {
        "labels": None if part.labels is None else part.labels.tolist(),
        "class_names": part.class_names,
        "names": part.names,
        "size": part.size,
        "flip": part.flip,
    }


def _sync(descriptor: int, flush: Any) -> None:
    flush()
    os.fsync(descriptor)


def _swap(fresh: Path, folder: Path) -> None:
    """A folder with content cannot be renamed over: the old one steps aside first."""
    aside = Path(f"{fresh}.old")
    if folder.exists():
        folder.rename(aside)
    fresh.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _dataset(folder: Path, side: str, index: dict[str, Any]) -> Dataset:
    labels = index["labels"]
    height, width = index["size"]
    return Dataset(
        pixels=np.load(folder / f"{side}.npy", mmap_mode="r", allow_pickle=False),
        labels=None if labels is None else np.array(labels, dtype=np.int64),
        class_names=tuple(index["class_names"]),
        names=tuple(index["names"]),
        size=(height, width),
        flip=index["flip"],
    )

"""What all sources share: a fingerprint before any decoding, splits, canvases, notes."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from undiffuse.errors import ConfigError, ResourceError
from undiffuse.images._dataset import Data, Dataset
from undiffuse.images._options import DataOptions
from undiffuse.images._pixels import Pixels

_DECODER = 1
"""Raised when the same files and options would give other pixels than before."""


@dataclass(frozen=True)
class Plan:
    """A source that is known exactly but not decoded yet."""

    fingerprint: str
    build: Callable[[], Data]


@dataclass(frozen=True)
class Labelled:
    """All pictures of a source that has no splits of its own."""

    pixels: Pixels
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    names: tuple[str, ...]


def fingerprint(entries: Iterable[object], options: DataOptions) -> str:
    """SHA-256 over the options and the entries, which must be JSON-able and in a fixed order."""
    digest = hashlib.sha256(json.dumps([_DECODER, asdict(options)]).encode())
    for entry in entries:
        digest.update(b"\n" + json.dumps(entry).encode())
    return digest.hexdigest()


def array_entry(pixels: NDArray[Any] | None) -> list[object]:
    """An array's part of a fingerprint."""
    if pixels is None:
        return []
    content = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
    return [str(pixels.dtype), list(pixels.shape), content]


def split(count: int, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices for training and held out: ``default_rng(0).permutation``, its end held out.

    ceil(count · fraction) are held out, at least 1 stays on each side; one picture is on both.
    """
    order = np.random.default_rng(0).permutation(count)
    if count == 1:
        return order, order
    # 100 · 0.07 is 7.000000000000001 in binary; that is no reason to hold out 8.
    held_out = min(max(ceil(count * fraction - 1e-9), 1), count - 1)
    return order[:-held_out], order[-held_out:]


def canvas_of(size: tuple[int, int], random_crop: bool) -> tuple[int, int]:
    """The stored size: 9/8 of what is drawn if crops are random, else the same."""
    return (ceil(size[0] * 9 / 8), ceil(size[1] * 9 / 8)) if random_crop else size


def needs_resolution(options: DataOptions) -> None:
    """Raise ConfigError if random crops are wanted of pictures whose size is left open."""
    if options.random_crop and options.resolution is None:
        raise ConfigError("random_crop needs a resolution to crop to; add --resolution HxW")


def halves(
    whole: Labelled, size: tuple[int, int], fraction: float, options: DataOptions
) -> tuple[Dataset, Dataset]:
    """The training and the held-out part of a source that has no splits of its own."""

    def part(indices: NDArray[np.int64]) -> Dataset:
        return Dataset(
            pixels=whole.pixels[indices],
            labels=None if whole.labels is None else whole.labels[indices],
            class_names=whole.class_names,
            names=tuple(whole.names[i] for i in indices),
            size=size,
            flip=options.random_flip,
        )

    training, held_out = split(len(whole.names), fraction)
    return part(training), part(held_out)


def numbered(prefix: str, count: int) -> tuple[str, ...]:
    """digits/0000, digits/0001, …"""
    return tuple(f"{prefix}/{index:04d}" for index in range(count))


def few_notes(count: int) -> tuple[str, ...]:
    """What to tell about a source of ``count`` pictures."""
    if count == 1:
        return ("Only 1 image: it is trained on and held out at once; expect copies of it.",)
    if count < 100:
        return (
            f"Only {count} images: expect copies of them. The report shows nearest neighbours.",
        )
    return ()


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Pixels:
    """An empty array, or a ResourceError that says how much it would have needed."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        size = np.prod(shape, dtype=np.float64) * dtype.itemsize / 2**30
        raise ResourceError(
            f"{shape[0]:,} pictures of {shape[2]}x{shape[3]} need {size:.1f} GiB of memory: "
            "choose a smaller --resolution"
        ) from error

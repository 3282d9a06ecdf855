"""What all sources share: a fingerprint before any decoding, splits, canvases, notes."""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from undiffuse.errors import ConfigError
from undiffuse.images._dataset import Data, Dataset
from undiffuse.images._options import DataOptions
from undiffuse.images._pixels import Pixels

_DECODER = 1
"""Raised when the same files and options would give other pixels than before."""

SPLIT_ENTRY = ["split", "by content"]
"""Part of the fingerprint of every source that is split by ``split_by_content``."""

Sides = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Indices for training, and indices held out."""


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


def content_hash(content: bytes) -> str:
    """What ``split_by_content`` knows a picture by: 64 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()


def by_content(contents: Sequence[str]) -> list[int]:
    """Indices in the order of the hashes, which mixes classes; equal ones keep their order."""
    return sorted(range(len(contents)), key=lambda index: contents[index])


def split_by_content(contents: Sequence[str], fraction: float) -> Sides:
    """Held out is what hashes below ``fraction``, as a share of the 2²⁵⁶ values there are.

    contents: one ``content_hash`` per picture. A picture's side depends on nothing but its content:
    other pictures that come or go never move it, and copies of it are on the same side. Only where
    one side would be empty, the lowest hash is held out, or the highest trained on; where all
    contents are equal, one is held out. A single picture is on both sides. Each side is in the
    order of the hashes.
    """
    order = by_content(contents)
    border = held_out_of([contents[index] for index in order], fraction)
    whole = np.array(order, dtype=np.int64)
    return (whole, whole) if border == len(whole) else (whole[border:], whole[:border])


def held_out_of(ranked: Sequence[str], fraction: float) -> int:
    """How many of the sorted hashes ``split_by_content`` holds out: the first ones, or the only."""
    if len(ranked) < 2:
        return len(ranked)
    border = bisect_left(ranked, f"{ceil(Fraction(fraction) * 2**256):064x}")
    if border == 0:
        border = bisect_right(ranked, ranked[0])
    if border == len(ranked):
        border = bisect_left(ranked, ranked[-1]) or 1
    return border


def split_permuted(count: int, fraction: float) -> Sides:
    """The end of ``default_rng(0).permutation`` is held out: ceil(count · fraction) pictures.

    For bundled pictures, of which none come or go; ``count`` must leave one on each side.
    """
    order = np.random.default_rng(0).permutation(count)
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
    whole: Labelled, size: tuple[int, int], sides: Sides, options: DataOptions
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

    training, held_out = sides
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

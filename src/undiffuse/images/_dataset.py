"""Decoded pictures in memory (or memory-mapped), and how batches are cut from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from undiffuse.errors import DataError
from undiffuse.images._pixels import STORED, Pixels, to_float


@dataclass(frozen=True)
class Skipped:
    """A picture that is left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded pictures of one split.

    pixels: (n, c, H, W), uint8, uint16 or float32 in [-1, 1]; may be memory-mapped. The canvas
        H × W may be larger than ``size``, which is what ``batch`` cuts out of it.
    labels: (n,) int64 into ``class_names``, or None.
    names: one per picture: its relative path, or for example digits/0012.
    size: (height, width) of what ``batch`` and ``fixed`` return.
    flip: whether ``batch`` flips horizontally in half of the draws.

    Raises DataError if these do not fit each other.
    """

    pixels: Pixels
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    size: tuple[int, int]
    flip: bool

    def __post_init__(self) -> None:
        shape, dtype = self.pixels.shape, self.pixels.dtype
        if len(shape) != 4 or dtype.name not in STORED:
            raise DataError(f"pixels must be (n, c, h, w) uint8, uint16 or float32; got {shape}")
        if shape[2] < self.size[0] or shape[3] < self.size[1]:
            raise DataError(f"size {self.size} does not fit into pictures of {shape[2:]}")
        if len(self.names) != shape[0]:
            raise DataError(f"{shape[0]} pictures have {len(self.names)} names")
        if self.labels is not None:
            check_labels(self.labels, shape[0], len(self.class_names))

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def channels(self) -> int:
        """Channels of every picture."""
        return self.pixels.shape[1]

    @property
    def bits(self) -> int:
        """Bits per stored value: 8, 16 or 32."""
        return self.pixels.dtype.itemsize * 8

    def batch(
        self, indices: Sequence[int] | NDArray[Any], draws: NDArray[Any]
    ) -> Float[Tensor, "b c h w"]:
        """Pictures ``indices`` in [-1, 1]; a pure function of the arguments.

        draws: (b, 3) uniform in [0, 1): flipped if the first is below 1/2 (and ``flip`` is on);
        the second and third place the crop vertically and horizontally on a larger canvas.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        uniform = np.asarray(draws, dtype=np.float64)
        if uniform.shape != (len(chosen), 3):
            raise ValueError(f"draws must be ({len(chosen)}, 3); got {uniform.shape}")
        tops = _offsets(uniform[:, 1], self.pixels.shape[2] - self.size[0])
        lefts = _offsets(uniform[:, 2], self.pixels.shape[3] - self.size[1])
        pixels = self._cut(chosen, tops, lefts)
        if self.flip:
            flipped = uniform[:, 0] < 0.5
            pixels[flipped] = pixels[flipped][..., ::-1]
        return to_float(pixels)

    def fixed(
        self, count: int | None = None
    ) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"] | None]:
        """The first ``count`` pictures (all, if fewer), unflipped, and their labels.

        Every canvas gives the centred grid of non-overlapping crops that it holds: one centre crop
        where the canvas is less than twice ``size``, many for whole photographs. All pictures'
        first crops come before the second ones.
        """
        canvas = self.pixels.shape[2:]
        rows, columns = canvas[0] // self.size[0], canvas[1] // self.size[1]
        total = len(self) * rows * columns
        order = np.arange(total if count is None else min(count, total))
        picture, crop = order % len(self), order // len(self)
        top = (canvas[0] - rows * self.size[0]) // 2 + crop // columns * self.size[0]
        left = (canvas[1] - columns * self.size[1]) // 2 + crop % columns * self.size[1]
        labels = None if self.labels is None else torch.from_numpy(self.labels[picture])
        return to_float(self._cut(picture, top, left)), labels

    def _cut(
        self, indices: NDArray[np.int64], tops: NDArray[np.int64], lefts: NDArray[np.int64]
    ) -> Pixels:
        height, width = self.size
        if self.pixels.shape[2:] == self.size:
            return np.asarray(self.pixels[indices])
        cut = np.empty((len(indices), self.channels, height, width), self.pixels.dtype)
        for slot, (index, top, left) in enumerate(zip(indices, tops, lefts, strict=True)):
            cut[slot] = self.pixels[index, :, top : top + height, left : left + width]
        return cut


@dataclass(frozen=True, eq=False)
class Data:
    """A whole source.

    source: short printable description. attribution: whom to credit, "" if nobody is known.
    fingerprint: SHA-256 over every picture's relative path, size, content and label, and the
        options; equal fingerprints mean equal pixels.
    skipped: pictures left out. notes: lines for the user about how the pictures were read.
    """

    train: Dataset
    held_out: Dataset
    source: str
    attribution: str
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


def check_labels(labels: NDArray[Any], count: int, classes: int) -> None:
    """Raise DataError unless ``labels`` are ``count`` whole numbers in 0…classes-1."""
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"labels must be {count} whole numbers, one per picture; "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if count and not (labels.min() >= 0 and labels.max() < classes):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"labels must be in 0…{classes - 1}; got {wrong}")


def _offsets(uniform: NDArray[np.float64], room: int) -> NDArray[np.int64]:
    # min: the largest double below 1 times (room + 1) may round up to room + 1.
    return np.minimum(np.floor(uniform * (room + 1)).astype(np.int64), room)

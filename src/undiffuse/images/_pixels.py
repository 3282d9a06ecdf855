"""Stored integers to [-1, 1] and back; fitting a picture to a size."""

import os
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8, UInt16
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from undiffuse.errors import ResourceError

Pixels = NDArray[Any]
"""(n, c, h, w) or (c, h, w): uint8 0…255, uint16 0…65535, or float32 in [-1, 1]."""

STORED = ("uint8", "uint16", "float32")


def to_float(pixels: Pixels | Tensor) -> Float[Tensor, "..."]:
    """2v/255 - 1 for uint8, 2v/65535 - 1 for uint16; floats pass as float32, unchanged.

    Multiplied before divided, so that the ends are exactly -1 and 1.
    """
    integers = {torch.uint8: 255, torch.uint16: 65535}
    # An array may be a read-only memory map, which torch cannot share: copied while converted.
    values = torch.tensor(np.asarray(pixels)) if isinstance(pixels, np.ndarray) else pixels
    top = integers.get(values.dtype)
    if top is None:
        return values.to(torch.float32)
    return values.to(torch.float32).mul_(2).div_(top).sub_(1)


def to_uint8(x: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """clamp(round((x + 1) · 127.5)) to 0…255; what is not a number becomes 0."""
    return _to_integers(x, 255).to(torch.uint8)


def to_uint16(x: Float[Tensor, "..."]) -> UInt16[Tensor, "..."]:
    """clamp(round((x + 1) · 32767.5)) to 0…65535; what is not a number becomes 0."""
    return _to_integers(x, 65535).to(torch.int32).to(torch.uint16)


def _to_integers(x: Tensor, top: int) -> Tensor:
    scaled = (x.detach().to(torch.float32) + 1) * (top / 2)
    return torch.nan_to_num(scaled, nan=0.0).round_().clamp_(0, top)


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part of the aspect ratio of ``size``, resampled to (height, width).

    One antialiased pass (Lanczos); a picture of the right size is returned untouched.
    """
    height, width = size
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    box_width, box_height = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def fit_array(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """``fit_image`` for a stack (n, c, h, w) with any number of channels, in its own dtype."""
    if pixels.shape[2:] == size:
        return pixels
    fitted = allocate((*pixels.shape[:2], *size), pixels.dtype)
    for index in np.ndindex(*pixels.shape[:2]):
        plane = Image.fromarray(pixels[index].astype(np.float32))
        fitted[index] = from_float_plane(np.asarray(fit_image(plane, size)), pixels.dtype)
    return fitted


def from_float_plane(values: Pixels, dtype: np.dtype[Any]) -> Pixels:
    """Rounded and clipped to ``dtype``'s range: Lanczos overshoots at edges."""
    if dtype.kind == "f":
        return np.clip(values, -1, 1).astype(dtype)
    return np.clip(np.rint(values), 0, np.iinfo(dtype).max).astype(dtype)


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Pixels:
    """An empty array, or a ResourceError that says how much it would have needed."""
    needed, there = prod(shape) * dtype.itemsize, _physical_memory()
    message = (
        f"{shape[0]:,} pictures of {shape[1]}x{shape[2]}x{shape[3]} need "
        f"{needed / 1e9:,.1f} GB of memory{{}}: choose a smaller --resolution or fewer pictures"
    )
    # An allocation beyond the memory does not fail where the system promises more than it has;
    # the process is killed later, while the pictures are filled in.
    if there is not None and needed > there:
        raise ResourceError(message.format(f", this machine has {there / 1e9:,.1f} GB"))
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise ResourceError(message.format("")) from error


def _physical_memory() -> int | None:
    """Bytes of memory in this machine, or None where the system does not say (Windows)."""
    try:
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return page * pages if page > 0 and pages > 0 else None  # -1 where it is not known

"""Pixels to files: single pictures, grids, films."""

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor

from undiffuse.errors import ConfigError, DataError, ResourceError
from undiffuse.images._pixels import to_uint8, to_uint16

_STILL: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".webp": {"format": "WEBP", "lossless": True},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF"},
    ".tiff": {"format": "TIFF"},
}
_MOVING: dict[str, dict[str, Any]] = {
    ".webp": {"format": "WEBP", "lossless": True},
    ".gif": {"format": "GIF"},
    ".png": {"format": "PNG"},
}
_VIEWABLE = 64
"""Pixels on the long side up to which ``save_grid`` enlarges small pictures."""
_LAST_FRAME = 1000
"""Milliseconds that a film rests on its last frame before it starts again."""


def grid(
    x: Shaped[Tensor, "b c h w"], columns: int | None = None, pad: int = 1
) -> UInt8[Tensor, "c H W"]:
    """Pictures in rows, ``pad`` white pixels between them, white where the last row is short.

    x: floats in [-1, 1] or uint8. columns: by default as many as rows, or one more.
    """
    pictures = _as_bytes(x)
    count, channels, height, width = pictures.shape
    if count == 0:
        raise DataError("a grid needs at least one picture; got 0")
    columns = min(columns or ceil(sqrt(count)), count)
    rows = ceil(count / columns)
    size = rows * (height + pad) - pad, columns * (width + pad) - pad
    sheet = torch.full((channels, *size), 255, dtype=torch.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + pad), index % columns * (width + pad)
        sheet[:, top : top + height, left : left + width] = picture
    return sheet


def save_grid(
    x: Shaped[Tensor, "b c h w"],
    path: str | Path,
    columns: int | None = None,
    scale: int | None = None,
) -> None:
    """Write ``grid(x)``; the suffix chooses the format (.png .webp .jpg .bmp .tif).

    scale: every pixel becomes scale × scale pixels; by default small pictures grow to about 64
    pixels. Pictures with two channels show the first, with more than four the first three.
    Raises ConfigError for another suffix and ResourceError if the file cannot be written.
    """
    options = _options(Path(path), _STILL)
    sheet = grid(_enlarged(x, scale), columns)
    _write(Path(path), _encoded(_image(sheet), options))


def save_image(x: Shaped[Tensor, "c h w"], path: str | Path, bits: int = 8) -> None:
    """Write one picture, pixel for pixel. bits: 8, or 16 for one channel as .png or .tif."""
    options = _options(Path(path), _STILL)
    if bits == 8:
        image = _image(_as_bytes(x))
    elif bits == 16 and x.shape[0] == 1 and options["format"] in ("PNG", "TIFF"):
        image = Image.fromarray(to_uint16(x)[0].cpu().numpy())
    else:
        raise ConfigError(
            f"bits must be 8, or 16 for one channel as .png or .tif; "
            f"got {bits} for {x.shape[0]} channels as {Path(path).suffix}"
        )
    _write(Path(path), _encoded(image, options))


def save_film(
    frames: Sequence[Float[Tensor, "b c h w"]],
    path: str | Path,
    milliseconds: int = 80,
    columns: int | None = None,
) -> None:
    """Write an endless film, one grid per frame; the suffix chooses: .webp, .gif or .png.

    GIF has 256 colours per frame; the others are lossless. The last frame rests for a second.
    Pillow may join frames that are exactly equal into one of twice the time.
    """
    options = _options(Path(path), _MOVING)
    if not frames:
        raise DataError(f"a film needs at least one frame; {path} got 0")
    first, *rest = (_image(grid(_enlarged(frame, None), columns)) for frame in frames)
    times = [milliseconds] * len(rest) + [max(milliseconds, _LAST_FRAME)]
    moving = {"save_all": True, "append_images": rest, "duration": times, "loop": 0}
    _write(Path(path), _encoded(first, options | moving))


def encode_png(x: Shaped[Tensor, "c h w"]) -> bytes:
    """The bytes of a PNG file, to be embedded in a page. x: uint8, or floats in [-1, 1]."""
    return _encoded(_image(_as_bytes(x)), _STILL[".png"])


def _as_bytes(x: Tensor) -> Tensor:
    return (x if x.dtype == torch.uint8 else to_uint8(x)).detach().cpu()


def _enlarged(x: Tensor, scale: int | None) -> Tensor:
    if scale is None:
        scale = max(1, _VIEWABLE // max(x.shape[-2:]))
    return _as_bytes(x).repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def _image(picture: Tensor) -> Image.Image:
    channels = picture.shape[0]
    shown = picture if channels in (1, 3, 4) else picture[: 1 if channels == 2 else 3]
    values = shown.numpy()
    if len(values) == 1:
        return Image.fromarray(values[0])
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(values, 0, -1)))


def _options(path: Path, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    options = table.get(path.suffix.lower())
    if options is None:
        raise ConfigError(f"cannot write {path}: the name must end in one of {' '.join(table)}")
    return options


def _encoded(image: Image.Image, options: dict[str, Any]) -> bytes:
    if image.mode == "RGBA" and options["format"] in ("JPEG", "BMP"):
        raise ConfigError(f"{options['format']} has no transparency: write 4 channels as .png")
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Through a neighbour and a rename: a reader never sees half a picture."""
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        neighbour.write_bytes(content)
        neighbour.replace(path)
    except OSError as error:
        with suppress(OSError):
            neighbour.unlink()
        raise ResourceError(f"cannot write {path}: {error.strerror}") from error

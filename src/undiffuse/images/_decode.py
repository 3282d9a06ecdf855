"""One picture file: opened safely, described by its header, decoded to pixels.

Only regular files are opened, only six formats are tried, and a header that announces more than
64 megapixels is refused before anything is allocated.
"""

import os
import stat
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from undiffuse.errors import ConfigError, DataError
from undiffuse.images._options import checked_colour, checked_size
from undiffuse.images._pixels import Pixels, fit_image, from_float_plane, to_float

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 64_000_000
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_FORMAT_OF = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
_GREY = {"1", "L", "LA", "La"}
# EXIF 2.32, tag 274: what undoes orientations 2…8.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """This picture cannot be read; the message says why in a few words."""


@dataclass(frozen=True)
class Header:
    """What a picture says about itself before its pixels are decoded."""

    mode: str
    size: tuple[int, int]
    """(height, width), upright."""
    grey: bool
    deep: bool
    """More than 8 bits, kept: 16-bit, 32-bit or float grey."""
    narrowed: bool
    """16-bit colour, which Pillow decodes to 8 bits."""
    transparent: bool
    turned: bool
    several: bool
    misnamed: bool


@dataclass(frozen=True)
class Target:
    """What every picture of a set is decoded to: uint16 if ``deep`` (then one channel)."""

    channels: int
    deep: bool
    size: tuple[int, int] | None
    background: tuple[int, int, int]


def read(
    path: str | Path, channels: int, size: tuple[int, int] | None = None, background: str = "white"
) -> Float[Tensor, "c h w"]:
    """One picture in [-1, 1]: upright, fitted to ``size`` (height, width) if given.

    channels: 1 (a 16-bit grey file keeps its 16 bits), 3 or 4. Transparency is composited on
    ``background`` unless ``channels`` is 4. Raises DataError if the file cannot be read.
    """
    check_channels(channels)
    wanted = None if size is None else checked_size(size)
    colour = checked_colour(background)
    with pillow_warnings():
        try:
            deep = channels == 1 and header(Path(path)).deep
            return to_float(decode(Path(path), Target(channels, deep, wanted, colour)))
        except BadImage as error:
            raise DataError(f"{path} cannot be read: {error}") from error


def check_channels(channels: int) -> None:
    """Raise ConfigError unless picture files can have this many channels."""
    if channels not in MODES:
        raise ConfigError(
            f"channels must be 1 (grey), 3 (RGB) or 4 (RGBA) for picture files; got {channels}"
        )


@contextmanager
def pillow_warnings() -> Generator[None, None, None]:
    """Bomb warnings are errors and other warnings of Pillow silent, in worker threads too.

    To be entered by the thread that starts the workers: warning filters belong to the process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def header(path: Path) -> Header:
    """Describe a picture without decoding it (palettes excepted). Raises BadImage."""
    with _opened(path) as image:
        deep = image.mode[0] in "IF"
        return Header(
            mode=image.mode,
            size=_upright_size(image),
            grey=deep or image.mode in _GREY or _grey_palette(image),
            deep=deep,
            # The decoder's raw mode is the only trace of the file's depth.
            narrowed=not deep and ";16" in str(image.tile),
            transparent=image.has_transparency_data and not deep,
            turned=_orientation(image) != 1,
            several=bool(getattr(image, "is_animated", False)),
            misnamed=_misnamed(path, image.format),
        )


def decode(path: Path, target: Target) -> Pixels:
    """(c, h, w) uint8 or uint16 pixels of one picture. Raises BadImage."""
    with _opened(path) as image:
        orientation = _orientation(image)
        if target.size is not None:
            # JPEG can decode at 1/2, 1/4, 1/8: twice the wanted size leaves Lanczos its work.
            enough = 2 * max(target.size)
            image.draft(None, (enough, enough))
        image.load()
        flat = _flatten(image, target)
        if image.format != "TIFF" and orientation in _UPRIGHT:  # Pillow turns TIFF by itself
            flat = flat.transpose(_UPRIGHT[orientation])
        fitted = np.asarray(flat if target.size is None else fit_image(flat, target.size))
    if target.deep:
        fitted = from_float_plane(fitted, np.dtype(np.uint16))
    return fitted[None] if fitted.ndim == 2 else np.moveaxis(fitted, -1, 0)


@contextmanager
def open_regular(path: Path) -> Generator[BufferedReader, None, None]:
    """Open a regular file, never blocking on a pipe or device. Raises BadImage."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadImage("not a regular file")
        # The kind is asked again of the open file: the path may have changed meanwhile.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _O_BINARY)
    except (OSError, ValueError) as error:
        raise BadImage(_reason(error)) from error
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BadImage("not a regular file")
        yield file


_O_BINARY: int = getattr(os, "O_BINARY", 0)


@contextmanager
def _opened(path: Path) -> Generator[ImageFile.ImageFile, None, None]:
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(f"{image.width}x{image.height} is more than 64 megapixels")
                yield image
        except BadImage:
            raise
        # Damaged files make Pillow's decoders raise nearly anything.
        except Exception as error:
            raise BadImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    match error:
        case Image.DecompressionBombWarning() | Image.DecompressionBombError():
            return "more than 64 megapixels"
        case UnidentifiedImageError():
            return "not a JPEG, PNG, WebP, BMP, GIF or TIFF picture"
        case OSError(strerror=str() as text):
            return text.lower()
        case _:
            return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    # Pillow would decode a whole PNG to look for an eXIf chunk behind the pixels; not worth it.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - damaged EXIF makes no picture unreadable
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    swapped = _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"
    return image.size if swapped else (image.height, image.width)


def _misnamed(path: Path, kind: str | None) -> bool:
    suffix = path.suffix.lower()
    claimed = _FORMAT_OF.get(suffix, suffix[1:].upper())
    # MPO is a JPEG with further pictures behind it (stereo cameras, phones).
    return claimed != ("JPEG" if kind == "MPO" else kind)


def _grey_palette(image: Image.Image) -> bool:
    if image.mode not in ("P", "PA"):
        return False
    colours = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _flatten(image: Image.Image, target: Target) -> Image.Image:
    """In the target's mode; mode F with values 0…65535 if it is deep."""
    if image.mode[0] in "IF":
        values = _grey16(image)
        if target.deep:
            return Image.fromarray(values)
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert(
            MODES[target.channels]
        )
    flat = _composited(image, target)
    if target.deep:
        return Image.fromarray(np.asarray(flat).astype(np.float32) * 257)
    return flat


def _composited(image: Image.Image, target: Target) -> Image.Image:
    mode = MODES[target.channels]
    if mode != "RGBA" and image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*target.background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert(mode)


def _grey16(image: Image.Image) -> Pixels:
    """(h, w) float32 in 0…65535. Float pictures are taken as 0…1, any other range is refused."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise BadImage(f"grey values must be finite and within 0…{top}")
    return values.astype(np.float32) * np.float32(65535 / top)

"""``load``: everything that can be trained on, by name, path or array."""

import difflib
import stat
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from undiffuse.errors import ConfigError, DataError, ResourceError
from undiffuse.images._cache import load_cache
from undiffuse.images._dataset import Data, Dataset, check_labels
from undiffuse.images._decode import SUFFIXES, BadImage, open_regular
from undiffuse.images._files import plan_folder
from undiffuse.images._folder import printable
from undiffuse.images._options import DataOptions
from undiffuse.images._pixels import Pixels, fit_array
from undiffuse.images._plan import (
    SPLIT_ENTRY,
    Labelled,
    Plan,
    Sides,
    array_entry,
    canvas_of,
    content_hash,
    few_notes,
    fingerprint,
    halves,
    needs_resolution,
    numbered,
    split_by_content,
    split_permuted,
)

_DIGITS_CREDIT = (
    "Digits: copy of the test set of the UCI hand-written digits "
    "(E. Alpaydin, C. Kaynak, 1998), from scikit-learn."
)
_PHOTOS_CREDIT = (
    "china.jpg by danielbuechele (Flickr photo 6061409035); flower.jpg from the account vultilion "
    "(Flickr photo 6056698931); both CC BY 2.0, from scikit-learn, whose own text reads:"
)
_PHOTO_CROP = (32, 32)
_MOST_CLASSES = 100_000

Source = str | Path | Tensor | NDArray[Any] | Data


def load(source: Source, options: DataOptions = DataOptions(), cache: Path | None = None) -> Data:  # noqa: B008 - frozen
    """Pictures to train on and pictures held out.

    source: "digits" or "photos" (bundled with scikit-learn); a folder of pictures; an ``.npz``
        with ``images`` (n, h, w[, c]) and perhaps ``labels``; an array (n, c, h, w), uint8, uint16
        or float in [-1, 1]; or a ``Data``, which is returned as it is.
    cache: a folder written by ``save_cache``; used instead of decoding if its fingerprint is that
        of the source and the options as they are now. It is not written here.

    Folders and arrays are split by their pictures' contents, see ``DataOptions.val_fraction``;
    folders of runs that lie in a folder are not read.

    Raises DataError for sources that are missing, unreadable or malformed, ConfigError for options
    that do not fit the source, ResourceError if memory does not suffice.
    """
    if isinstance(source, Data):
        return source
    plan = _plan(source, options)
    cached = None if cache is None else load_cache(Path(cache), plan.fingerprint)
    return cached or replace(plan.build(), fingerprint=plan.fingerprint)


def _plan(source: str | Path | Tensor | NDArray[Any], options: DataOptions) -> Plan:
    if isinstance(source, Tensor):
        return _plan_array(_from_tensor(source), None, "a tensor", "images", options)
    if isinstance(source, np.ndarray):
        return _plan_array(_checked_array(source), None, "an array", "images", options)
    if isinstance(source, str) and source in _BUNDLED:
        return _BUNDLED[source](options)
    path = Path(source)
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as error:  # also a name too long, a NUL, a link loop
        raise DataError(_missing(source, error)) from error
    if stat.S_ISDIR(kind):
        return plan_folder(path, options)
    if stat.S_ISREG(kind) and path.suffix.lower() == ".npz":
        return _plan_npz(path, options)
    raise DataError(_unusable(path))


def _unusable(path: Path) -> str:
    name = printable(str(path))
    if path.suffix.lower() in SUFFIXES:
        return f"{name} is one picture; name the folder that it lies in"
    return f"{name} is neither a folder nor an .npz file"


def _missing(source: str | Path, error: Exception) -> str:
    path = Path(source)
    if isinstance(error, PermissionError):
        return f"{printable(str(path))} cannot be read: permission denied"
    near = list(_BUNDLED) if isinstance(source, str) else []
    with suppress(OSError, ValueError):
        near += [
            str(other)
            for other in path.parent.iterdir()
            if other.is_dir() or other.suffix.lower() == ".npz"
        ]
    close = difflib.get_close_matches(str(path), near, n=1)
    hint = f" Did you mean {printable(close[0])}?" if close else ""
    return f"No folder or .npz at {printable(str(path))}.{hint}"


# Bundled pictures --------------------------------------------------------------------------------


def _plan_digits(options: DataOptions) -> Plan:
    from sklearn.datasets import load_digits

    bundle = cast("Any", load_digits())
    # Values 0…16, kept as floats: v/8 - 1 is exact, and bytes would not be.
    pixels = (bundle.images[:, None] / 8 - 1).astype(np.float32)
    stack = _Stack(
        pixels, bundle.target.astype(np.int64), "digits (scikit-learn)", "digits", _permuted
    )
    fraction = replace(options, val_fraction=options.val_fraction or 0.2)
    mark = fingerprint([array_entry(pixels), array_entry(stack.labels)], fraction)
    plan = _plan_stack(stack, mark, fraction)
    return replace(plan, build=lambda: replace(plan.build(), attribution=_DIGITS_CREDIT))


def _plan_photos(options: DataOptions) -> Plan:
    from sklearn.datasets import load_sample_images

    bundle = cast("Any", load_sample_images())
    if options.channels not in (None, 1, 3):
        raise ConfigError(f"channels must be 1 or 3 for photos; got {options.channels}")
    mode = "L" if options.channels == 1 else "RGB"
    planes = [np.asarray(Image.fromarray(image).convert(mode)) for image in bundle.images]
    pixels = np.stack(planes).reshape(len(planes), *planes[0].shape[:2], -1).transpose(0, 3, 1, 2)
    names = tuple(Path(name).name for name in bundle.filenames)
    mark = fingerprint([array_entry(pixels)], options)
    credit = f"{_PHOTOS_CREDIT}\n{bundle.DESCR.strip()}"
    return Plan(mark, lambda: _photos(pixels, names, credit, options))


def _photos(pixels: Pixels, names: tuple[str, ...], credit: str, options: DataOptions) -> Data:
    """Left columns for training, right ones held out; every draw is a crop at full scale."""
    size = options.resolution or _PHOTO_CROP
    width = pixels.shape[3]
    border = width - round(width * (options.val_fraction or 0.2))
    height, narrow = pixels.shape[2], min(border, width - border)
    if size[0] > height or size[1] > narrow:
        raise ConfigError(
            f"resolution {size[0]}x{size[1]} does not fit into the photos' parts "
            f"({height}x{narrow}); choose a smaller --resolution"
        )
    sides = (pixels[..., :border], pixels[..., border:])
    train, held_out = (
        Dataset(np.ascontiguousarray(side), None, (), names, size, options.random_flip)
        for side in sides
    )
    note = f"Random crops of {size[0]}x{size[1]} from the left of {len(names)} photos."
    return Data(train, held_out, "photos (scikit-learn)", credit, "", notes=(note,))


_BUNDLED: dict[str, Callable[[DataOptions], Plan]] = {
    "digits": _plan_digits,
    "photos": _plan_photos,
}


# Arrays ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stack:
    """Pictures of one shape, (n, c, h, w), and how they are split."""

    pixels: Pixels
    labels: NDArray[np.int64] | None
    source: str
    prefix: str
    split: Callable[[Pixels, float], Sides]


def _permuted(pixels: Pixels, fraction: float) -> Sides:
    return split_permuted(len(pixels), fraction)


def _by_content(pixels: Pixels, fraction: float) -> Sides:
    return split_by_content([content_hash(picture.tobytes()) for picture in pixels], fraction)


def _plan_array(
    pixels: Pixels,
    labels: NDArray[np.int64] | None,
    source: str,
    prefix: str,
    options: DataOptions,
) -> Plan:
    mark = fingerprint([SPLIT_ENTRY, array_entry(pixels), array_entry(labels)], options)
    return _plan_stack(_Stack(pixels, labels, source, prefix, _by_content), mark, options)


def _plan_stack(stack: _Stack, mark: str, options: DataOptions) -> Plan:
    needs_resolution(options)
    count, channels, *_ = stack.pixels.shape
    if count == 0:
        raise DataError(f"No images in {stack.source}: its shape is {stack.pixels.shape}")
    if options.channels not in (None, channels):
        raise ConfigError(
            f"{stack.source} has {channels} channels; --channels {options.channels} asked"
        )
    return Plan(mark, lambda: _build_stack(stack, options))


def _build_stack(stack: _Stack, options: DataOptions) -> Data:
    pixels, labels = stack.pixels, stack.labels
    size = options.resolution or (pixels.shape[2], pixels.shape[3])
    classes = 0 if labels is None else int(labels.max()) + 1
    whole = Labelled(
        pixels=fit_array(pixels, canvas_of(size, options.random_crop)),
        labels=labels,
        class_names=tuple(map(str, range(classes))),
        names=numbered(stack.prefix, len(pixels)),
    )
    sides = stack.split(pixels, options.val_fraction or 0.1)
    train, held_out = halves(whole, size, sides, options)
    return Data(train, held_out, stack.source, "", "", notes=few_notes(len(pixels)))


def _from_tensor(source: Tensor) -> Pixels:
    values = source.detach().cpu()
    # NumPy has no bfloat16.
    return _checked_array((values.float() if values.is_floating_point() else values).numpy())


def _checked_array(values: NDArray[Any]) -> Pixels:
    """(n, c, h, w) uint8, uint16 or float32 in [-1, 1], or a DataError."""
    if values.ndim != 4 or 0 in values.shape[1:]:
        raise DataError(f"an array of pictures must be (n, c, h, w); got {values.shape}")
    if values.shape[3] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
        raise DataError(
            f"an array of pictures must be (n, c, h, w); {values.shape} looks like (n, h, w, c). "
            "Try: numpy.moveaxis(images, -1, 1)"
        )
    if values.dtype.name in ("uint8", "uint16"):
        return values.astype(values.dtype.name, copy=False)  # in this machine's byte order
    if values.dtype.kind != "f":
        raise DataError(f"pictures must be uint8, uint16 or float in [-1, 1]; got {values.dtype}")
    floats = values.astype(np.float32)
    if not np.isfinite(floats).all() or np.abs(floats).max(initial=0) > 1:
        raise DataError(
            f"float pictures must be finite and in [-1, 1]; got {floats.min()} … {floats.max()}. "
            "For 0…255 pass uint8."
        )
    return floats


def _plan_npz(path: Path, options: DataOptions) -> Plan:
    name = printable(str(path))
    arrays = _npz_arrays(path, name)
    if "images" not in arrays:
        found = ", ".join(map(printable, arrays)) or "nothing"
        raise DataError(f'{name} has no array "images"; found {found}')
    images, labels = arrays["images"], arrays.get("labels")
    if images.ndim not in (3, 4):
        raise DataError(f"{name}: images must be (n, h, w) or (n, h, w, c); got {images.shape}")
    stacked = images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)
    return _plan_array(
        _in_file(name, lambda: _checked_array(np.ascontiguousarray(stacked))),
        None if labels is None else _in_file(name, lambda: _checked_labels(labels, len(images))),
        name,
        printable(path.stem),
        options,
    )


def _npz_arrays(path: Path, name: str) -> dict[str, NDArray[Any]]:
    """``images`` and ``labels``; other arrays only by name. Objects (pickles) are refused."""
    try:
        with open_regular(path) as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{name} is one array, not an .npz archive")
            wanted = {"images", "labels"}
            return {key: archive[key] if key in wanted else np.empty(0) for key in archive.files}
    except MemoryError as error:
        raise ResourceError(f"{name} does not fit into memory") from error
    except (BadImage, OSError, *_NPZ_DAMAGE) as error:
        raise DataError(f"{name} cannot be read: {' '.join(str(error).split())}") from error


_NPZ_DAMAGE = (
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


def _checked_labels(labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    check_labels(labels, count, _MOST_CLASSES)
    return labels.astype(np.int64)


def _in_file(name: str, check: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    try:
        return check()
    except DataError as error:
        raise DataError(f"{name}: {error}") from error

"""A folder of picture files: inspected first, decoded in threads straight into one array."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFile

from undiffuse.errors import ConfigError, DataError
from undiffuse.images._dataset import Data, Dataset, Skipped
from undiffuse.images._decode import (
    MODES,
    BadImage,
    Header,
    Target,
    check_channels,
    decode,
    header,
    open_regular,
    pillow_warnings,
)
from undiffuse.images._folder import Listing, Picture, list_folder, listed_names, printable
from undiffuse.images._options import LARGEST, DataOptions, OnBadImage, checked_colour
from undiffuse.images._pixels import Pixels, allocate
from undiffuse.images._plan import (
    SPLIT_ENTRY,
    Plan,
    by_content,
    canvas_of,
    few_notes,
    fingerprint,
    held_out_of,
    needs_resolution,
)

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class _Inspected:
    picture: Picture
    length: int
    content: str
    """SHA-256 of the file, "" if it cannot be opened."""
    found: Header | str
    """The header, or why there is none."""


def plan_folder(root: Path, options: DataOptions) -> Plan:
    """List, hash and read the headers of a folder's pictures. Raises DataError, ConfigError."""
    needs_resolution(options)
    if options.channels is not None:
        check_channels(options.channels)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ConfigError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, which makes up missing pixels; "
            "set it to False"
        )
    listing = list_folder(root)
    with pillow_warnings():
        inspected = in_threads(_inspect, listing.pictures)
    entries = [
        (os.fsencode(one.picture.name).hex(), one.length, one.content, one.picture.label)
        for one in inspected
    ]
    missing = [(skipped.name, skipped.reason) for skipped in listing.skipped]
    return Plan(
        fingerprint([SPLIT_ENTRY, *entries, *missing], options),
        lambda: _Folder(root, listing, inspected, options).build(),
    )


def _inspect(picture: Picture) -> _Inspected:
    length, content = 0, ""
    try:
        with open_regular(picture.path) as file:
            length = os.fstat(file.fileno()).st_size
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return _Inspected(picture, length, content, header(picture.path))
    except (BadImage, OSError) as error:
        return _Inspected(picture, length, content, str(error))


@dataclass(frozen=True)
class _Folder:
    root: Path
    listing: Listing
    inspected: list[_Inspected]
    options: DataOptions

    def build(self) -> Data:
        skipped = list(self.listing.skipped)
        skipped += [
            Skipped(printable(one.picture.name), one.found)
            for one in self.inspected
            if isinstance(one.found, str)
        ]
        self._refuse(skipped)
        readable = [one for one in self.inspected if not isinstance(one.found, str)]
        headers = [one.found for one in readable if not isinstance(one.found, str)]
        target = self._target(headers)
        pixels, good = self._decoded(_in_order(readable), target, skipped)
        self._refuse(skipped, left=len(good))
        border = _held_out(good, self.options) % len(good)  # all or none: both sides are the whole
        return Data(
            train=self._dataset(pixels[border:], good[border:]),
            held_out=self._dataset(pixels[: border or None], good[: border or None]),
            source=f"{printable(str(self.root))} ({self._good(skipped):,} images)",
            attribution="",
            fingerprint="",
            skipped=tuple(skipped),
            notes=self._notes(headers, target, skipped),
        )

    def _total(self) -> int:
        return len(self.inspected) + len(self.listing.skipped)

    def _good(self, skipped: Sequence[Skipped]) -> int:
        return self._total() - len(skipped)

    def _refuse(self, skipped: Sequence[Skipped], left: int = 1) -> None:
        """Raise DataError if pictures are bad and that is an error, or if nothing is left."""
        root = printable(str(self.root))
        if skipped and self.options.on_bad_image is OnBadImage.ERROR:
            first = skipped[0]
            raise DataError(
                f"{root}/{first.name} cannot be used: {first.reason} "
                f"({len(skipped):,} such). --on-bad-image skip to leave them out."
            )
        if not left or self._good(skipped) == 0:
            raise DataError(
                f"None of the {self._total():,} images in {root} can be used: {_why(skipped)}"
            )

    def _target(self, headers: Sequence[Header]) -> Target:
        size = self.options.resolution or self._common_size(headers)
        return target_of(headers, size, self.options)

    def _common_size(self, headers: Sequence[Header]) -> tuple[int, int]:
        root = printable(str(self.root))
        sizes = Counter(found.size for found in headers).most_common()
        if len(sizes) > 1:
            found = ", ".join(f"{count:,} of {h}x{w}" for (h, w), count in sizes[:3])
            more = f" and {len(sizes) - 3:,} more sizes" if len(sizes) > 3 else ""
            raise DataError(f"images in {root} differ in size: {found}{more}. Add --resolution HxW")
        (height, width), _ = sizes[0]
        if max(height, width) > LARGEST:
            raise DataError(f"images in {root} are {height}x{width}. Add --resolution HxW")
        return height, width

    def _decoded(
        self, inspected: Sequence[_Inspected], target: Target, skipped: list[Skipped]
    ) -> tuple[Pixels, list[_Inspected]]:
        """Decode in place; what fails is added to ``skipped`` and closed up."""
        assert target.size is not None
        dtype = np.dtype(np.uint16 if target.deep else np.uint8)
        pixels = allocate((len(inspected), target.channels, *target.size), dtype)

        def fill(index: int) -> str | None:
            try:
                pixels[index] = decode(inspected[index].picture.path, target)
            except BadImage as error:
                return str(error)
            return None

        with pillow_warnings():
            reasons = in_threads(fill, range(len(inspected)))
        skipped += [
            Skipped(printable(one.picture.name), reason)
            for one, reason in zip(inspected, reasons, strict=True)
            if reason is not None
        ]
        kept = [index for index, reason in enumerate(reasons) if reason is None]
        for place, index in enumerate(kept):
            if place != index:
                pixels[place] = pixels[index]
        return pixels[: len(kept)], [inspected[index] for index in kept]

    def _dataset(self, pixels: Pixels, inspected: Sequence[_Inspected]) -> Dataset:
        pictures = [one.picture for one in inspected]
        return Dataset(
            pixels=pixels,
            labels=self._labels(pictures),
            class_names=self.listing.class_names,
            names=tuple(printable(picture.name) for picture in pictures),
            size=self.options.resolution or (pixels.shape[2], pixels.shape[3]),
            flip=self.options.random_flip,
        )

    def _labels(self, pictures: Sequence[Picture]) -> NDArray[np.int64] | None:
        classes = {name: index for index, name in enumerate(self.listing.class_names)}
        if not classes:
            return None
        return np.array([classes[str(picture.label)] for picture in pictures], dtype=np.int64)

    def _notes(
        self, headers: Sequence[Header], target: Target, skipped: Sequence[Skipped]
    ) -> tuple[str, ...]:
        notes = [*self.listing.notes, *reading_notes(headers, target, self.options.background)]
        if skipped:
            notes.append(
                f"Skipped {len(skipped):,} of {self._total():,} images: {_why(skipped)}. "
                "--on-bad-image error to stop instead."
            )
        return (*notes, *few_notes(self._good(skipped)))


def target_of(
    headers: Sequence[Header], size: tuple[int, int] | None, options: DataOptions
) -> Target:
    """Grey if all pictures are, 16 bits if one has them; ``size`` is None where it is open."""
    channels = options.channels or (1 if all(found.grey for found in headers) else 3)
    deep = channels == 1 and any(found.deep for found in headers)
    canvas = None if size is None else canvas_of(size, options.random_crop)
    return Target(channels, deep, canvas, checked_colour(options.background))


def _in_order(inspected: Sequence[_Inspected]) -> list[_Inspected]:
    """By the contents' hashes, so that the first few are of all classes; held-out ones first."""
    mixed = [inspected[index] for index in by_content([one.content for one in inspected])]
    return sorted(mixed, key=lambda one: not one.picture.held_out)


def _held_out(ordered: Sequence[_Inspected], options: DataOptions) -> int:
    """How many come first that are held out, by the folder's own splits or by their contents."""
    own = [one.picture.held_out for one in ordered if one.picture.held_out is not None]
    if own:
        return sum(own)
    return held_out_of([one.content for one in ordered], options.val_fraction or 0.1)


def in_threads(work: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """``work`` on every item, in order. Pillow decodes outside the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
        return list(pool.map(work, items))


def _why(skipped: Sequence[Skipped]) -> str:
    return listed_names([f"{one.name} ({one.reason})" for one in skipped])


def reading_notes(headers: Sequence[Header], target: Target, background: str) -> list[str]:
    """How pictures were changed on the way in, each with the number of them."""

    def count(chosen: Callable[[Header], bool]) -> int:
        return sum(map(chosen, headers))

    depth = "kept at 16 bits" if target.deep else "scaled to 8 bits"
    canvas = target.size or (1, 1)
    counted = {
        f"with transparency: composited on {background}": 0
        if target.channels == 4
        else count(lambda h: h.transparent),
        f"in 16-bit grey: {depth}": count(lambda h: h.deep),
        "in 8-bit grey: stored with 16 bits": count(lambda h: not h.deep) if target.deep else 0,
        "in 16-bit colour: decoded to 8 bits": count(lambda h: h.narrowed),
        "turned upright as their EXIF orientation says": count(lambda h: h.turned),
        "with several frames or pages: only the first is used": count(lambda h: h.several),
        "with another format than their suffix says": count(lambda h: h.misnamed),
        f"smaller than {canvas[0]}x{canvas[1]}: enlarged": count(
            lambda h: h.size[0] < canvas[0] or h.size[1] < canvas[1]
        ),
    }
    notes = [f"{number:,} {text}." for text, number in counted.items() if number]
    if 0 < count(lambda h: h.grey) < len(headers):
        modes = ", ".join(f"{n:,} {mode}" for mode, n in _modes(headers))
        advice = " --channels 1 for grey." if target.channels != 1 else ""
        notes.insert(0, f"{modes}: converting all to {MODES[target.channels]}.{advice}")
    return notes


def _modes(headers: Sequence[Header]) -> list[tuple[str, int]]:
    return Counter(found.mode for found in headers).most_common()

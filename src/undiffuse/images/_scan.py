"""``scan``: what a folder holds, from its listing and the pictures' headers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from undiffuse.errors import DataError
from undiffuse.images._dataset import Skipped
from undiffuse.images._decode import (
    BadImage,
    Header,
    Target,
    check_channels,
    header,
    pillow_warnings,
)
from undiffuse.images._files import in_threads, reading_notes, target_of
from undiffuse.images._folder import Listing, Picture, list_folder, printable
from undiffuse.images._options import LARGEST, DataOptions

_T = TypeVar("_T")


@dataclass(frozen=True)
class Scan:
    """What ``load`` would find in a folder, as far as listing and headers tell.

    source: printable path. count: pictures with a readable header; ``paths`` are these.
    size: the (height, width) all have in common, or None. sizes: every upright size with the
        number of its pictures, most common first. modes: likewise Pillow's modes.
    channels, bits: of the pictures as they would be loaded.
    splits: (training, held-out) pictures of a folder with its own splits, or None.
    classes: names with the number of their pictures, in the order of the labels.
    ignored: suffixes that are no pictures', with the number of files, most common first.
    skipped: what would be left out; damage behind a header is found by ``load`` only.
    notes: lines for the user about how the pictures would be read.
    """

    source: str
    count: int
    paths: tuple[Path, ...]
    size: tuple[int, int] | None
    sizes: tuple[tuple[tuple[int, int], int], ...]
    modes: tuple[tuple[str, int], ...]
    channels: int
    bits: int
    splits: tuple[int, int] | None
    classes: tuple[tuple[str, int], ...]
    ignored: tuple[tuple[str, int], ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


def scan(source: str | Path, options: DataOptions = DataOptions()) -> Scan:  # noqa: B008 - frozen
    """Describe a folder of pictures without decoding any; their sizes may differ.

    Raises DataError if ``source`` is no folder, cannot be listed, has no pictures or a malformed
    table, ConfigError if picture files cannot have ``options.channels``.
    """
    root = Path(source)
    if not root.is_dir():
        raise DataError(f"{printable(str(root))} is no folder; only folders can be scanned")
    if options.channels is not None:
        check_channels(options.channels)
    listing = list_folder(root)
    with pillow_warnings():
        found = in_threads(_header, listing.pictures)
    pairs = list(zip(listing.pictures, found, strict=True))
    good = [(picture, one) for picture, one in pairs if isinstance(one, Header)]
    bad = [Skipped(printable(picture.name), one) for picture, one in pairs if isinstance(one, str)]
    return _summed(root, listing, good, bad, options)


def _summed(
    root: Path,
    listing: Listing,
    good: list[tuple[Picture, Header]],
    bad: list[Skipped],
    options: DataOptions,
) -> Scan:
    pictures, headers = [picture for picture, _ in good], [one for _, one in good]
    sizes = _counted(one.size for one in headers)
    size = sizes[0][0] if len(sizes) == 1 else None
    target = target_of(headers, options.resolution or size, options)
    labels = Counter(picture.label for picture in pictures)
    return Scan(
        source=printable(str(root)),
        count=len(good),
        paths=tuple(picture.path for picture in pictures),
        size=size,
        sizes=sizes,
        modes=_counted(one.mode for one in headers),
        channels=target.channels,
        bits=16 if target.deep else 8,
        splits=_splits(pictures),
        classes=tuple((name, labels[name]) for name in listing.class_names),
        ignored=listing.ignored,
        skipped=(*listing.skipped, *bad),
        notes=_notes(listing, headers, target, options),
    )


def _notes(
    listing: Listing, headers: list[Header], target: Target, options: DataOptions
) -> tuple[str, ...]:
    notes = [*listing.notes, *reading_notes(headers, target, options.background)]
    if target.size is not None and max(target.size) > LARGEST and options.resolution is None:
        notes.append(f"More than {LARGEST} pixels on a side need --resolution HxW.")
    return tuple(notes)


def _header(picture: Picture) -> Header | str:
    """The header, or why there is none."""
    try:
        return header(picture.path)
    except (BadImage, OSError) as error:
        return str(error)


def _counted(values: Iterable[_T]) -> tuple[tuple[_T, int], ...]:
    return tuple(Counter(values).most_common())


def _splits(pictures: list[Picture]) -> tuple[int, int] | None:
    own = Counter(picture.held_out for picture in pictures)
    return None if None in own or not own else (own[False], own[True])

"""`describe` of a folder of pictures, of which only headers are read, or another data set."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse import images
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._describe import BUNDLED
from undiffuse.cli._output import Output, count_of, table
from undiffuse.config import DataConfig, changed
from undiffuse.errors import ConfigError, DataError

SHEET = 64  # pictures on a contact sheet
THUMBNAIL = 256  # pixels on the long side of a folder's picture on a contact sheet
ROWS = 10  # sizes, skipped pictures and suffixes that are listed
NAMES = 20  # classes that are listed


def describe_pictures(target: str, arguments: Arguments, out: Output) -> int:
    """How many there are, of which size and kind, and which cannot be read."""
    if "classes" in arguments.given:
        raise ConfigError(f"classes is for presets; {target} has its own")
    options = changed(DataConfig(), arguments.settings(DataConfig))
    chosen = images.DataOptions(resolution=options.resolution, channels=options.channels)
    if Path(target).is_dir() and target not in BUNDLED:
        return _describe_folder(images.scan(target, chosen), chosen, arguments, out)
    return _describe_set(images.load(target, chosen), arguments, out)


def _report(
    lines: Iterator[str], facts: Mapping[str, Any], drawing: Path | None, out: Output
) -> int:
    for line in lines:
        out.say(line)
    if drawing is not None:
        out.say(f"drawn: {drawing}")
    out.result("describe", **facts, drawing=drawing and drawing.as_posix())
    return 0


def _sheet_path(arguments: Arguments) -> Path | None:
    return Path(str(arguments.given["output"])) if "output" in arguments.given else None


def _skipped_lines(skipped: Sequence[images.Skipped]) -> Iterator[str]:
    yield from (f"skipped: {one.name}: {one.reason}" for one in skipped[:ROWS])
    if len(skipped) > ROWS:
        yield f"skipped: {len(skipped) - ROWS:,} more"


def _skipped_facts(skipped: Sequence[images.Skipped]) -> list[dict[str, str]]:
    return [{"name": one.name, "reason": one.reason} for one in skipped]


def _class_line(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NAMES else ""
    return f"{len(names):,} {'class' if len(names) == 1 else 'classes'}: " + (
        ", ".join(names[:NAMES]) + more
    )


# --- a folder -----------------------------------------------------------------------------------


def _describe_folder(
    scan: images.Scan, options: images.DataOptions, arguments: Arguments, out: Output
) -> int:
    sheet = _sheet_path(arguments)
    if sheet is not None:
        images.save_grid(_thumbnails(scan, options), sheet)
    return _report(_folder_lines(scan, options), _folder_facts(scan, options), sheet, out)


def _thumbnails(scan: images.Scan, options: images.DataOptions) -> Tensor:
    """Up to SHEET pictures from all over the folder; what cannot be decoded is left out."""
    step = max(1, len(scan.paths) // SHEET)
    size = _thumbnail_size(scan, options)
    shown: list[Tensor] = []
    for path in scan.paths[::step]:
        try:
            shown.append(images.read(path, scan.channels, size))
        except DataError:
            continue
        if len(shown) == SHEET:
            break
    if not shown:
        raise DataError(f"none of the images in {scan.source} can be drawn")
    return torch.stack(shown)


def _thumbnail_size(scan: images.Scan, options: images.DataOptions) -> tuple[int, int] | None:
    """The size of all, or else the most common one; None leaves pictures as they are."""
    if not scan.sizes:
        return None
    height, width = options.resolution or scan.sizes[0][0]
    longest = max(height, width)
    if longest <= THUMBNAIL and scan.size == (height, width):
        return None
    scale = min(1.0, THUMBNAIL / longest)
    return max(4, round(height * scale)), max(4, round(width * scale))


def _folder_lines(scan: images.Scan, options: images.DataOptions) -> Iterator[str]:
    own = scan.splits
    split = f": {own[0]:,} for training, {own[1]:,} held out" if own else ""
    yield f"{scan.source}: {count_of(scan.count, 'picture')}{split}"
    yield from _size_lines(scan, options)
    if scan.modes:
        yield "modes: " + ", ".join(f"{count:,} {mode}" for mode, count in scan.modes)
    if scan.classes:
        yield _class_line([f"{name} ({count:,})" for name, count in scan.classes])
    if scan.ignored:
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in scan.ignored[:ROWS])
        yield f"other files: {listed}{', ...' if len(scan.ignored) > ROWS else ''}"
    yield from (f"note: {note}" for note in scan.notes)
    yield from _skipped_lines(scan.skipped)


def _size_lines(scan: images.Scan, options: images.DataOptions) -> Iterator[str]:
    size = options.resolution or scan.size
    if size is not None:
        shape = f"{scan.channels}x{size[0]}x{size[1]}"
        yield f"each {shape} (channels, height, width), {scan.bits} bits"
    if len(scan.sizes) < 2:
        return
    rows = [(f"{h}x{w}", f"{count:,}") for (h, w), count in scan.sizes[:ROWS]]
    yield from table([("height x width", "pictures"), *rows], right=(1,))
    if len(scan.sizes) > ROWS:
        yield f"and {len(scan.sizes) - ROWS:,} more sizes"
    if size is None:
        yield "the pictures differ in size: to train on them add --resolution HxW"


def _folder_facts(scan: images.Scan, options: images.DataOptions) -> dict[str, Any]:
    training, held_out = scan.splits or (None, None)
    size = options.resolution or scan.size
    return {
        "source": scan.source,
        "images": scan.count,
        "train_images": training,
        "held_out_images": held_out,
        "size": None if size is None else list(size),
        "sizes": [{"size": list(one), "images": count} for one, count in scan.sizes],
        "channels": scan.channels,
        "bits": scan.bits,
        "modes": dict(scan.modes),
        "classes": [name for name, _ in scan.classes],
        "class_images": [count for _, count in scan.classes],
        "ignored": dict(scan.ignored),
        "skipped": _skipped_facts(scan.skipped),
        "notes": list(scan.notes),
    }


# --- what is loaded -----------------------------------------------------------------------------


def _describe_set(data: images.Data, arguments: Arguments, out: Output) -> int:
    sheet = _sheet_path(arguments)
    if sheet is not None:
        images.save_grid(data.train.fixed(min(SHEET, len(data.train)))[0], sheet)
    return _report(_picture_lines(data), _picture_facts(data), sheet, out)


def _picture_lines(data: images.Data) -> Iterator[str]:
    train, (height, width) = data.train, data.train.size
    shape = f"{train.channels}x{height}x{width}"
    pictures = count_of(len(train), "picture")
    yield f"{data.source}: {pictures} for training, {len(data.held_out):,} held out"
    yield f"each {shape} (channels, height, width), {train.bits} bits"
    if train.labels is not None:
        yield _class_line(train.class_names)
    yield from (f"note: {note}" for note in data.notes)
    yield from _skipped_lines(data.skipped)
    if data.attribution:
        yield data.attribution


def _picture_facts(data: images.Data) -> dict[str, Any]:
    return {
        "source": data.source,
        "train_images": len(data.train),
        "held_out_images": len(data.held_out),
        "size": list(data.train.size),
        "channels": data.train.channels,
        "bits": data.train.bits,
        "classes": list(data.train.class_names),
        "skipped": _skipped_facts(data.skipped),
    }

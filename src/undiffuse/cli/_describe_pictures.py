"""`describe` of a folder of pictures or another data set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from undiffuse import images
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._output import Output, count_of
from undiffuse.config import DataConfig, changed
from undiffuse.errors import ConfigError

SHEET = 64  # pictures on a contact sheet


def describe_pictures(target: str, arguments: Arguments, out: Output) -> int:
    """How many there are, of which size and kind, and which cannot be read."""
    if "classes" in arguments.given:
        raise ConfigError(f"classes is for presets; {target} has its own")
    options = changed(DataConfig(), arguments.settings(DataConfig))
    chosen = images.DataOptions(resolution=options.resolution, channels=options.channels)
    data = images.load(target, chosen)
    sheet = _contact_sheet(data, arguments)
    for line in _picture_lines(data):
        out.say(line)
    if sheet is not None:
        out.say(f"drawn: {sheet}")
    out.result("describe", **_picture_facts(data), drawing=sheet and sheet.as_posix())
    return 0


def _contact_sheet(data: images.Data, arguments: Arguments) -> Path | None:
    if "output" not in arguments.given:
        return None
    path = Path(str(arguments.given["output"]))
    images.save_grid(data.train.fixed(min(SHEET, len(data.train)))[0], path)
    return path


def _picture_lines(data: images.Data) -> Iterator[str]:
    train, (height, width) = data.train, data.train.size
    shape = f"{train.channels}x{height}x{width}"
    pictures = count_of(len(train), "picture")
    yield f"{data.source}: {pictures} for training, {len(data.held_out):,} held out"
    yield f"each {shape} (channels, height, width), {train.bits} bits"
    if train.labels is not None:
        names = train.class_names
        more = ", ..." if len(names) > 20 else ""
        yield f"{len(names)} classes: {', '.join(names[:20])}{more}"
    yield from (f"note: {note}" for note in data.notes)
    yield from (f"skipped: {one.name}: {one.reason}" for one in data.skipped[:10])
    if len(data.skipped) > 10:
        yield f"skipped: {len(data.skipped) - 10:,} more"
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
        "skipped": [{"name": one.name, "reason": one.reason} for one in data.skipped],
    }

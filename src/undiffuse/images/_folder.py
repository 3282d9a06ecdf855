"""Which pictures lie in a folder, and how they are split and labelled. Nothing is opened here
but tables; the listing is in the order of the path's bytes, whatever the file system says."""

import csv
import io
import json
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import cast

from undiffuse.errors import DataError
from undiffuse.images._dataset import Skipped
from undiffuse.images._decode import SUFFIXES, BadImage, open_regular

TABLES = ("metadata.csv", "metadata.jsonl", "labels.csv")
_HELD_OUT = ("val", "valid", "validation", "test")
_RUN = {"config.json", "run.json"}
"""Files by which a run's folder is known; its pictures are drawn, not data."""
_NAMED = 5


@dataclass(frozen=True)
class Picture:
    """A picture file: ``name`` is its path relative to the folder, with slashes."""

    path: Path
    name: str
    label: str | None = None
    held_out: bool | None = None
    """None where the folder has no splits of its own."""


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder with their splits and labels."""

    pictures: tuple[Picture, ...]
    class_names: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    ignored: tuple[tuple[str, int], ...]
    """Suffixes of files that are neither pictures nor tables in use, most common first."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Found:
    pictures: list[Picture]
    tables: list[str]
    others: Counter[str]
    skipped: list[Skipped]
    runs: list[str]


def list_folder(root: Path) -> Listing:
    """Find pictures in all sub-folders, and their splits and labels.

    Labels come from a table (``metadata.csv``, ``metadata.jsonl`` or ``labels.csv`` with columns
    file_name and label) or else from two or more sub-folders. ``train/`` beside ``val/`` or
    ``test/`` are splits; with both, ``val/`` is held out. Sub-folders that are runs are left alone.
    Raises DataError.
    """
    found = _scan(root)
    if not found.pictures and not found.skipped:
        raise DataError(_nothing(root, found))
    pictures, tops, notes = _split(found.pictures)
    notes = [*_run_notes(found.runs), *notes]
    tables = _chosen_tables(found.tables, tops)
    listed, skipped = _from_tables(root, pictures, tables) if tables else (pictures, [])
    if not tables:
        listed = _from_folders(pictures, tops)
    if tables and any(picture.label is None for picture in listed):
        notes.append(f"{', '.join(tables)} has no label for every image: training without classes.")
        listed = [replace(picture, label=None) for picture in listed]
    names = _sorted_names({picture.label for picture in listed if picture.label is not None})
    ignored = found.others - Counter(posixpath.splitext(table)[1] for table in tables)
    return Listing(
        pictures=tuple(listed),
        class_names=names,
        skipped=tuple(found.skipped + skipped),
        ignored=tuple((printable(suffix), n) for suffix, n in ignored.most_common()),
        notes=tuple(notes),
    )


def printable(name: str) -> str:
    """A file name that fits on one line of valid text, whatever bytes it has."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def listed_names(names: Sequence[str]) -> str:
    """The first five names, and that there are more."""
    shown = ", ".join(printable(name) for name in names[:_NAMED])
    return shown + (", …" if len(names) > _NAMED else "")


# Finding -----------------------------------------------------------------------------------------


def _scan(root: Path) -> _Found:
    found = _Found([], [], Counter(), [], [])
    pending, seen = [("", root)], set[tuple[int, int]]()
    while pending:
        prefix, folder = pending.pop()
        try:
            if not _first_visit(folder, seen):
                continue
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            if not prefix:
                raise DataError(f"{printable(str(root))} cannot be read: {reason}") from error
            found.skipped.append(Skipped(printable(prefix), f"folder cannot be read: {reason}"))
            continue
        if prefix and {entry.name for entry in entries} >= _RUN:
            found.runs.append(prefix)
            continue
        for entry in entries:
            if not entry.name.startswith("."):
                if _is_folder(entry):
                    pending.append((f"{prefix}{entry.name}/", Path(entry.path)))
                else:
                    _note_file(entry, prefix + entry.name, found)
    found.pictures.sort(key=lambda picture: os.fsencode(picture.name))
    found.skipped.sort(key=lambda skipped: skipped.name)
    return found


def _first_visit(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """False where a link leads to a folder already visited: loops end here."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link loop
        return False


def _note_file(entry: os.DirEntry[str], name: str, found: _Found) -> None:
    suffix = posixpath.splitext(entry.name)[1].lower()
    if suffix not in SUFFIXES:
        if entry.name in TABLES:
            found.tables.append(name)
        found.others[suffix or "without a suffix"] += 1
        return
    try:
        regular = stat.S_ISREG(entry.stat().st_mode)
        reason = "not a regular file"
    except OSError as error:
        regular, reason = False, (error.strerror or str(error)).lower()
    if regular:
        found.pictures.append(Picture(Path(entry.path), name))
    else:
        found.skipped.append(Skipped(printable(name), reason))


def _nothing(root: Path, found: _Found) -> str:
    looked = f"Looked for {' '.join(SUFFIXES)} in all sub-folders"
    files, others = "found no files", found.others
    if others:
        files = f"found {others.total():,} files, most often {others.most_common(1)[0][0]}"
    path = printable(str(root))
    runs = "".join(f" {note}" for note in _run_notes(found.runs))
    return f"No images in {path}. {looked}; {files}.{runs} Try: undiffuse describe {path}"


def _run_notes(runs: list[str]) -> list[str]:
    """One line for all, so that a folder of a hundred runs stays readable."""
    if not runs:
        return []
    folders = "1 run folder is" if len(runs) == 1 else f"{len(runs):,} run folders are"
    return [f"{folders} not read as data: {listed_names(sorted(runs))}."]


# Splits and labels -------------------------------------------------------------------------------


def _split(pictures: list[Picture]) -> tuple[list[Picture], tuple[str, ...], list[str]]:
    """The pictures with their split, the splits' folders ("train/", "val/"), and notes."""
    tops = {picture.name.split("/")[0] for picture in pictures if "/" in picture.name}
    held_out = [name for name in _HELD_OUT if name in tops]
    if "train" not in tops or not held_out:
        return pictures, (), []
    sides = {"train": False, held_out[0]: True}
    inside = [
        replace(picture, held_out=sides[top])
        for picture in pictures
        if (top := picture.name.split("/")[0]) in sides and "/" in picture.name
    ]
    notes: list[str] = []
    if outside := len(pictures) - len(inside):
        notes.append(f"{outside:,} images outside train/ and {held_out[0]}/ are left alone.")
    return inside, tuple(f"{top}/" for top in sides), notes


def _from_folders(pictures: list[Picture], tops: tuple[str, ...]) -> list[Picture]:
    """Labels by the first sub-folder below the split, or below the folder all have in common."""
    start = 0 if tops else _common_depth(pictures)
    parts = [picture.name.split("/")[start + (len(tops) > 0) :] for picture in pictures]
    if any(len(part) < 2 for part in parts) or len({part[0] for part in parts}) < 2:
        return pictures
    return [
        replace(picture, label=printable(part[0]))
        for picture, part in zip(pictures, parts, strict=True)
    ]


def _common_depth(pictures: list[Picture]) -> int:
    folders = [picture.name.split("/")[:-1] for picture in pictures]
    levels = zip(*folders, strict=False)
    return sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))


def _sorted_names(labels: set[str]) -> tuple[str, ...]:
    """By number if all are numbers ("10" after "9"), else by their bytes."""
    if all(label.isascii() and label.isdigit() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels, key=os.fsencode))


# Tables ------------------------------------------------------------------------------------------


def _chosen_tables(tables: list[str], tops: tuple[str, ...]) -> list[str]:
    """One table on top, or else one in each split; tables elsewhere are only files."""

    def first(top: str) -> list[str]:
        return [top + name for name in TABLES if top + name in tables][:1]

    return first("") or [table for top in tops for table in first(top)]


def _from_tables(
    root: Path, pictures: list[Picture], tables: list[str]
) -> tuple[list[Picture], list[Skipped]]:
    """Pictures with the tables' labels; what only one of folder and table has is skipped."""
    labels: dict[str, str | None] = {}
    extra: set[str] = set()
    skipped: list[Skipped] = []
    for table in tables:
        top = table[: table.rfind("/") + 1]
        here = {picture.name for picture in pictures if picture.name.startswith(top)}
        rows = _labels_in(root / table, table, top)
        missing = sorted(rows.keys() - here)
        skipped += [Skipped(printable(name), f"named in {table} but not there") for name in missing]
        skipped += [
            Skipped(printable(name), f"not in {table}") for name in sorted(here - rows.keys())
        ]
        extra |= here - rows.keys()
        labels |= rows
    kept = [picture for picture in pictures if picture.name not in extra]
    return [replace(picture, label=labels.get(picture.name)) for picture in kept], skipped


def _labels_in(path: Path, table: str, top: str) -> dict[str, str | None]:
    labels: dict[str, str | None] = {}
    for where, file_name, label in _rows(path, table):
        # Only a key to look up among the files found: "../" leads nowhere.
        name = posixpath.normpath(top + file_name)
        if labels.setdefault(name, label) != label:
            raise DataError(f"{where}: {printable(file_name)} already has another label")
    return labels


def _rows(path: Path, table: str) -> Iterator[tuple[str, str, str | None]]:
    """(where, file_name, label) of every row. Raises DataError naming table and line."""
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except (BadImage, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    records = _json_lines(text, table) if table.endswith(".jsonl") else _csv_rows(text, table)
    for line, record in records:
        where = f"{table} line {line}"
        name, label = record.get("file_name"), record.get("label")
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: no file_name; found {listed_names(sorted(record))}")
        if "label" in record and not _is_label(label):
            raise DataError(f"{where}: label must be a word or a whole number; got {label!r}")
        yield where, name, str(label) if "label" in record else None


def _is_label(label: object) -> bool:
    return isinstance(label, str | int) and not isinstance(label, bool) and label != ""


def _csv_rows(text: str, table: str) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="")
    try:
        for row in reader:
            yield reader.line_num, cast("dict[str, object]", row)
    except csv.Error as error:
        raise DataError(f"{table} line {reader.line_num}: {error}") from error


def _json_lines(text: str, table: str) -> Iterator[tuple[int, dict[str, object]]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                record = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{table} line {line} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{table} line {line} is not a JSON object")
            yield line, cast("dict[str, object]", record)

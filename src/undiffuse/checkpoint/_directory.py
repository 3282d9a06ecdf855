"""One checkpoint directory: which files it has, what its manifest says, and whether they agree."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import cast

from torch import Tensor

from undiffuse.checkpoint._codec import JSON, dump, parse, shown
from undiffuse.checkpoint._disk import Payload, amounts, open_own, read_all, reason_of
from undiffuse.checkpoint._model import (
    FORMAT,
    NEEDS,
    Header,
    Model,
    assemble,
    check_finite,
    check_format,
    checked_header,
    model_payload,
)
from undiffuse.checkpoint._tensors import Head, container, read_head, read_tensors
from undiffuse.errors import CheckpointError

GROUPS = ("model", "ema", "optim")
SECOND = "ema_second"  # in runs that keep two averages; bare tensors, to go on with
STATE, MANIFEST = "state.json", "MANIFEST.json"
FILES = (*(f"{group}.safetensors" for group in GROUPS), STATE)
SECOND_FILE = f"{SECOND}.safetensors"
MAX_JSON = 16 * 1024 * 1024

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run consists of at one step.

    Args:
        tensors: by name, in the groups "model", "ema", "optim" and, where there is one,
            "ema_second".
        model: says what the weights mean; its own weights are not saved.
        state: counters and settings; any JSON.
    """

    step: int
    tensors: Groups
    model: Model
    state: Mapping[str, JSON]
    run_id: str


@dataclass(frozen=True)
class Loaded:
    """A snapshot read back: tensors bit-identical on the CPU."""

    step: int
    tensors: Groups
    header: Header
    state: Mapping[str, JSON]
    run_id: str


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says about one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The last file of a checkpoint; it must agree with all others."""

    step: int
    run_id: str
    files: Mapping[str, FileEntry]


def payloads(snapshot: Snapshot) -> dict[str, Payload]:
    """All files of a checkpoint, the manifest last."""
    if snapshot.step < 0 or set(snapshot.tensors) - {SECOND} != set(GROUPS):
        raise CheckpointError(
            f"a snapshot needs a step of at least 0 and the groups {', '.join(GROUPS)};"
            f" got step {snapshot.step} and {', '.join(snapshot.tensors)}"
        )
    header, groups = snapshot.model.header, snapshot.tensors
    check_finite(groups["optim"])
    files = {
        "model.safetensors": model_payload(header, groups["model"]),
        "ema.safetensors": model_payload(header, groups["ema"]),
        "optim.safetensors": container(groups["optim"], {"format": f"undiffuse {FORMAT}"}),
        STATE: _json(
            {"run_id": snapshot.run_id, "step": snapshot.step, "state": dict(snapshot.state)},
            "state",
        ),
    }
    if SECOND in groups:
        check_finite(groups[SECOND])
        files[SECOND_FILE] = container(groups[SECOND], {"format": f"undiffuse {FORMAT}"})
    return {**files, MANIFEST: _manifest(snapshot, files)}


def _json(value: JSON, what: str) -> Payload:
    return Payload([dump(value, what).encode()])


def _manifest(snapshot: Snapshot, files: Mapping[str, Payload]) -> Payload:
    entries: dict[str, JSON] = {
        name: {"size": payload.size, "sha256": payload.sha256()} for name, payload in files.items()
    }
    return _json(
        {
            "format": FORMAT,
            "needs": NEEDS,
            "step": snapshot.step,
            "run_id": snapshot.run_id,
            "files": entries,
        },
        "manifest",
    )


def _read_manifest(directory: Path, step: int) -> Manifest:
    """Every value in it is either compared with something else or used to compare with, so that
    no damage to the manifest itself can pass."""
    if os.path.islink(directory) or not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is not a folder")
    path = directory / MANIFEST
    with open_own(path) as file:
        table = parse(read_all(file, MAX_JSON, path), str(path))
    if not isinstance(table, dict) or type(table.get("format")) is not int:
        raise CheckpointError(f"{path} is damaged: it has no format")
    check_format("checkpoint", cast(int, table["format"]), table.get("needs"))
    wanted = {"format": FORMAT, "needs": NEEDS, "step": step}
    for name, value in wanted.items():
        if table.get(name) != value or type(table[name]) is not type(value):
            raise CheckpointError(f"{path}: {name} is {shown(table.get(name))}, not {value}")
    run_id, files = table.get("run_id"), table.get("files")
    if len(table) != len(wanted) + 2 or not isinstance(run_id, str) or not isinstance(files, dict):
        raise CheckpointError(f"{path} is damaged: its fields are not those of a manifest")
    if files.keys() - {SECOND_FILE} != set(FILES):
        raise CheckpointError(f"{path} is damaged: it does not list {', '.join(FILES)}")
    entries = {name: _file_entry(entry, f"{path}: {name}") for name, entry in files.items()}
    return Manifest(step, run_id, entries)


def _file_entry(value: JSON, where: str) -> FileEntry:
    if isinstance(value, dict) and value.keys() == {"size", "sha256"}:
        size, digest = value["size"], value["sha256"]
        if type(size) is int and isinstance(digest, str):
            return FileEntry(size, digest)
    raise CheckpointError(f"{where} is damaged: no size and sha256")


def verify(directory: Path, step: int) -> Manifest:
    """Compare size and SHA-256 of every file with the manifest.

    Raises:
        CheckpointError: naming the file that differs, and how.
    """
    manifest = _read_manifest(directory, step)
    for name, entry in manifest.files.items():
        with _open_entry(directory / name, entry) as file:
            digest = _hash(file, directory / name)
        _check_hash(directory / name, entry, digest)
    _read_state(directory, manifest)
    return manifest


def is_whole(directory: Path, step: int) -> bool:
    try:
        verify(directory, step)
    except (CheckpointError, OSError):
        return False
    return True


def _open_entry(path: Path, entry: FileEntry) -> FileIO:
    file = open_own(path)
    size = os.fstat(file.fileno()).st_size
    if size == entry.size:
        return file
    file.close()
    if size < entry.size:
        raise CheckpointError(f"{path} is truncated ({amounts(size, entry.size)})")
    raise CheckpointError(f"{path} has {size - entry.size} bytes more than its MANIFEST says")


def _hash(file: FileIO, path: Path) -> str:
    digest = sha256()
    try:
        while chunk := file.read(2**20):
            digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
    return digest.hexdigest()


def _check_hash(path: Path, entry: FileEntry, found: str) -> None:
    if found != entry.sha256:
        raise CheckpointError(f"{path} differs from its MANIFEST (SHA-256)")


def _read_group(directory: Path, manifest: Manifest, group: str) -> tuple[Head, dict[str, Tensor]]:
    path = directory / f"{group}.safetensors"
    entry = manifest.files[path.name]
    with _open_entry(path, entry) as file:
        head = read_head(file, path)
        tensors, found = read_tensors(file, head, head.raw, path)
    _check_hash(path, entry, found)
    return head, tensors


def _read_state(directory: Path, manifest: Manifest) -> Mapping[str, JSON]:
    path = directory / STATE
    entry = manifest.files[STATE]
    with _open_entry(path, entry) as file:
        raw = read_all(file, MAX_JSON, path)
    _check_hash(path, entry, sha256(raw).hexdigest())
    table = parse(raw, str(path))
    if not isinstance(table, dict) or table.keys() != {"run_id", "step", "state"}:
        raise CheckpointError(f"{path} is damaged: its fields are not run_id, step and state")
    if table["run_id"] != manifest.run_id or table["step"] != manifest.step:
        raise CheckpointError(f"{path} is not of the run and step that its MANIFEST names")
    if not isinstance(table["state"], dict):
        raise CheckpointError(f"{path} is damaged: state is no table")
    return table["state"]


def read(directory: Path, step: int) -> Loaded:
    manifest = _read_manifest(directory, step)
    state = _read_state(directory, manifest)
    second = (SECOND,) if SECOND_FILE in manifest.files else ()
    groups = {group: _read_group(directory, manifest, group) for group in (*GROUPS, *second)}
    headers = {
        group: checked_header(groups[group][0], directory / f"{group}.safetensors")
        for group in ("model", "ema")
    }
    tensors = {group: tensors for group, (_, tensors) in groups.items()}
    return Loaded(step, tensors, headers["model"], state, manifest.run_id)


def read_model(directory: Path, step: int, group: str) -> Model:
    head, tensors = _read_group(directory, verify(directory, step), group)
    path = directory / f"{group}.safetensors"
    return assemble(checked_header(head, path), tensors, path)

"""The safetensors container: an 8-byte length, a JSON header, then the tensors' bytes.

Written and read here rather than by the safetensors package for three reasons: every check of the
header runs before anything is allocated and can say what is wrong; hashing and reading are one
pass over the same bytes; and no second copy of the weights stands in memory. Tests compare with
the package in both directions.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import TypeGuard, cast

import torch
from torch import Tensor

from undiffuse.checkpoint._codec import JSON, parse, shown
from undiffuse.checkpoint._disk import Chunk, Payload, amounts, read_exactly
from undiffuse.errors import CheckpointError

MAX_HEADER = 16 * 1024 * 1024
MAX_TENSORS = 100_000
HASH = "file_sha256"
NO_HASH = "0" * 64

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies; `begin` and `end` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Head:
    """Everything before the tensors' bytes, checked: they fill the rest of the file exactly."""

    raw: bytes  # the length and the header, as they stand in the file
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]  # in the order of their bytes


# --- writing ------------------------------------------------------------------------------------


def container(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Payload:
    """A file of tensors whose metadata holds the SHA-256 of the whole file.

    The hash is that of the file with 64 zeros in its place.
    """
    # Large items first, so that every tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    data = [_bytes_of(tensors[name], name) for name in names]
    header = _header(names, tensors, {**metadata, HASH: NO_HASH})
    digest = Payload([header, *data]).sha256()
    return Payload([header.replace(NO_HASH.encode(), digest.encode(), 1), *data])


def _bytes_of(tensor: Tensor, name: str) -> Chunk:
    if tensor.dtype not in _NAMES:
        raise CheckpointError(f"{name} is {tensor.dtype}, which a model file cannot hold")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _header(names: list[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    # the hash stands first, so that no other value can hold 64 zeros before it
    ordered = {HASH: metadata[HASH], **metadata}
    header: dict[str, object] = {"__metadata__": ordered}
    begin = 0
    for name in names:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- reading ------------------------------------------------------------------------------------


def read_head(file: FileIO, path: Path) -> Head:
    """Read and check everything before the tensors' bytes.

    Raises:
        CheckpointError: the file is not a safetensors file, too large in some way, or cut off.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = _read_prefix(file, size, path)
    header = parse(prefix[8:], f"{path}: its header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no JSON object")
    if len(header) > MAX_TENSORS + 1:
        raise CheckpointError(f"{path} lists {len(header)} tensors; the limit is {MAX_TENSORS}")
    metadata = _metadata(header.get("__metadata__", {}), path)
    found = {
        name: _entry(value, f"{path}: tensor {shown(name)}")
        for name, value in header.items()
        if name != "__metadata__"
    }
    entries = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_extent(entries, len(prefix), size, path)
    return Head(prefix, metadata, entries)


def _read_prefix(file: FileIO, size: int, path: Path) -> bytes:
    if size < 8:
        what = "is empty" if not size else f"is not a safetensors file: it has {size} bytes only"
        raise CheckpointError(f"{path} {what}")
    start = bytearray(8)
    read_exactly(file, memoryview(start), path)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path} is not a safetensors file: its first bytes {shown(bytes(start))} mean a"
            f" header of {length} bytes; the limit is {MAX_HEADER}"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path} is truncated inside its header ({amounts(size, length + 8)})"
        )
    rest = bytearray(length)
    read_exactly(file, memoryview(rest), path)
    return bytes(start + rest)


def _metadata(value: JSON, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path}: its metadata is not a table of texts")
    return cast(dict[str, str], value)


def _entry(value: JSON, where: str) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} does not have dtype, shape and data_offsets")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in _DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {shown(name)}")
    if not _is_counts(shape) or len(shape) > 8:
        raise CheckpointError(f"{where}: impossible shape {shown(shape)}")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: impossible data_offsets {shown(offsets)}")
    begin, end = offsets
    size = math.prod(shape) * _DTYPES[name].itemsize
    if end - begin != size:
        raise CheckpointError(f"{where}: {size} bytes by its shape, {end - begin} by its offsets")
    return Entry(_DTYPES[name], tuple(shape), begin, end)


def _is_counts(value: JSON) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    return all(type(one) is int and 0 <= one < 2**48 for one in value)


def _check_extent(entries: Mapping[str, Entry], start: int, size: int, path: Path) -> None:
    """The tensors must follow each other without gap or overlap, up to the end of the file."""
    end = 0
    for name, entry in entries.items():
        if entry.begin != end:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} starts at byte {entry.begin}, not at {end}"
            )
        end = entry.end
    wanted = start + end
    if size < wanted:
        raise CheckpointError(f"{path} is truncated ({amounts(size, wanted)})")
    if size > wanted:
        raise CheckpointError(f"{path} is damaged: {size - wanted} bytes too many at its end")


def read_tensors(
    file: FileIO, head: Head, prefix: bytes, path: Path
) -> tuple[dict[str, Tensor], str]:
    """The tensors, and the SHA-256 of `prefix` followed by their bytes, in one pass."""
    digest = sha256(prefix)
    tensors: dict[str, Tensor] = {}
    for name, entry in head.entries.items():
        flat = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        view = flat.numpy().data
        read_exactly(file, view, path)
        digest.update(view)
        tensors[name] = flat.view(entry.dtype).reshape(entry.shape)
    return tensors, digest.hexdigest()


def read_own(file: FileIO, head: Head, path: Path) -> dict[str, Tensor]:
    """The tensors of a file that carries its own hash.

    Raises:
        CheckpointError: any bit of the file differs from what was written.
    """
    wanted = head.metadata.get(HASH, "")
    if not re.fullmatch("[0-9a-f]{64}", wanted) or head.raw.count(wanted.encode()) != 1:
        raise CheckpointError(f"{path} is damaged: its metadata has no proper {HASH}")
    prefix = head.raw.replace(wanted.encode(), NO_HASH.encode())
    tensors, found = read_tensors(file, head, prefix, path)
    if found != wanted:
        raise CheckpointError(
            f"{path} is damaged: its contents do not match its SHA-256; take another copy"
        )
    return tensors

"""Foreign files of weights, read so that nothing in them can run.

What a file is follows from its first bytes, never from its name. safetensors files are read here;
what torch has saved is read by a process of its own (`_child`), under limits, and handed back as
safetensors. All else is refused by name.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from undiffuse.errors import CheckpointError
from undiffuse.interop._words import short

Number = int | float | bool | str

OLDEST_TORCH = (2, 10)  # before: memory errors in the reader of foreign files (CVE-2026-24747)


class Kind(StrEnum):
    """What a file turned out to be."""

    SAFETENSORS = "safetensors"
    TORCH_ZIP = "torch zip archive"
    TORCH_LEGACY = "torch pickle of before 1.6"


class Weights(StrEnum):
    """Which of the two sets of weights that training keeps."""

    EMA = "ema"  # averaged over the steps; what papers sample with
    RAW = "raw"  # as the optimiser left them


@dataclass(frozen=True)
class Foreign:
    """What a file holds, as it is.

    Args:
        tensors: by name, on the CPU, in the precision of the file, each with memory of its own.
            Keys of nested dictionaries are joined by "/": "ema/ema_model.model.init_conv.weight".
        numbers: the other leaves, such as "step"; for safetensors the metadata.
    """

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Number]
    kind: Kind


@dataclass(frozen=True)
class Limits:
    """What reading one torch file may cost.

    Args:
        memory: bytes, beyond those of an idle torch; for the handed-back file too.
        seconds: on the clock, and of work.
    """

    memory: int
    seconds: float = 600.0

    @classmethod
    def for_size(cls, size: int) -> "Limits":
        """Ample for any honest file of `size` bytes, too little for one that pretends."""
        return cls(memory=4 * size + 2**30)


def read_tensors(path: str | Path, limits: Limits | None = None) -> Foreign:
    """The tensors in a safetensors file, or in what `torch.save` has written.

    Args:
        limits: default: `Limits.for_size` of the file.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, asks for code to be run,
            or costs more than `limits`.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind is Kind.SAFETENSORS:
        tensors, numbers = _read_safetensors(path, path)
        if not tensors:
            raise _refusal(path, "holds no tensors")
        return Foreign(tensors, numbers, kind)
    return _read_in_child(path.resolve(), kind, limits or Limits.for_size(path.stat().st_size))


# --- what is it? --------------------------------------------------------------------------------

MAGIC_OF_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, as a pickle says it

PICKLE = (
    "is a plain pickle, as EDM's .pkl: such files bring program code that runs when they are read,"
    " so undiffuse reads none. Where you trust it, load it with the code that wrote it (EDM:"
    " dnnlib, pickle) and keep the weights: safetensors.torch.save_file(net.state_dict(), ...)"
)

# First bytes -> what the file is. The order counts: a longer prefix stands first.
OTHERS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "is a git-LFS pointer, not the file itself; fetch it with: git lfs pull",
    ),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras, TensorFlow), which is not read"),
    (b"\x08\x01\x12", "is a TensorFlow SavedModel, which is not read"),
    (b"GGUF", "is a GGUF file, which is not read"),
    (b"\x93NUMPY", "is a NumPy array, which is not read"),
    (b"\x1f\x8b", "is compressed (gzip); unpack it first"),
    (b"BZh", "is compressed (bzip2); unpack it first"),
    (b"\xfd7zXZ\0", "is compressed (xz); unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is compressed (7z); unpack it first"),
    (b"\x89PNG", "is a picture"),
    (b"\xff\xd8\xff", "is a picture"),
)


def kind_of(path: Path) -> Kind:
    """What the file is, by its content.

    Raises:
        CheckpointError: it cannot be opened, or is of a kind that is not read.
    """
    if path.is_dir():
        raise _refusal(path, "is a folder; name the file of weights in it")
    if path.exists() and not path.is_file():
        raise _refusal(path, "is no ordinary file")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(max(0, path.stat().st_size - 8))
            tail = file.read(8)
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror or error}") from error
    known = _kind(head)
    if known is None:
        raise _refusal(path, _what_else(head, tail))
    return known


def _kind(head: bytes) -> Kind | None:
    if head.startswith(b"PK\x03\x04"):
        return Kind.TORCH_ZIP
    if head.startswith(b"\x80") and MAGIC_OF_TORCH in head[:32]:
        return Kind.TORCH_LEGACY
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 2**40:
        return Kind.SAFETENSORS
    return None


def _what_else(head: bytes, tail: bytes) -> str:
    if not head:
        return "is empty; the download or the copy has failed"
    for start, what in OTHERS:
        if head.startswith(start):
            return what
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "is a web page, not weights: the link leads to a page; fetch the file itself"
    if re.match(rb"\x80[\x00-\x05]|c[\w.]+\n[\w.]+\n|\(?[cd(l]p?\d*\n", head):
        return PICKLE
    if head[257:262] == b"ustar":
        return "is a tar archive (torch before 0.2, or another); save the weights anew with torch"
    if re.match(rb"\x08[\x02-\x20][\x12\x3a\x42]", head):
        return "is an ONNX file, which is not read; use the weights it was made of"
    if tail == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb":
        return "is the index of a TensorFlow checkpoint, which is not read"
    return "is no file of weights that undiffuse knows: it reads safetensors and torch.save's files"


def _refusal(path: Path, why: str) -> CheckpointError:
    shown = str(path)
    return CheckpointError(f"{shown if shown.isprintable() else repr(shown)} {why}")


# --- safetensors --------------------------------------------------------------------------------


def _read_safetensors(path: Path, named: Path) -> tuple[dict[str, Tensor], dict[str, Number]]:
    from safetensors import SafetensorError, safe_open

    # pread: tensors of their own, which a file that changes later cannot reach.
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no dict: it has keys, but cannot be walked through
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError, LookupError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refusal(
            named, f"is a damaged or incomplete safetensors file: {short(why, MAX_REASON)}"
        ) from error


# --- torch, in a process of its own -------------------------------------------------------------

# Isolated (-I): no PYTHON... variables, no start-up file, nothing from the folder one stands in.
# That also hides packages found by PYTHONPATH, so the places known here are handed over.
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1));"
    " from undiffuse.interop._child import main; sys.exit(main(sys.argv[1:]))"
)

KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_ALL", "LC_CTYPE")

MAX_REASON = 400  # characters of a foreign reason, which may hold names of any length
MAX_RESULT = 2**28  # bytes of JSON: a million names


def command(path: Path, folder: Path, limits: Limits) -> list[str]:
    """What starts the process that reads `path` and writes into `folder`."""
    places = json.dumps([place for place in sys.path if os.path.isabs(place)])
    python = [sys.executable, "-I", "-X", "utf8", "-c", START, places]
    return [*python, str(path), str(folder), str(limits.memory), str(int(limits.seconds) + 1)]


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    home = {name: str(folder) for name in ("HOME", "TMPDIR", "TEMP", "TMP")}
    return {**kept, **home, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _read_in_child(path: Path, kind: Kind, limits: Limits) -> Foreign:
    _check_torch(path, torch.__version__)
    with tempfile.TemporaryDirectory(prefix="undiffuse-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        code = _run(path, folder, limits)
        result = folder / "result.json"
        if code != 0 or not result.is_file():
            raise _refusal(path, _ended(code, folder, limits))
        names, numbers = _parse(path, result)
        tensors, _ = _read_safetensors(folder / "tensors.safetensors", path)
    if set(tensors) != {str(number) for number in range(len(names))}:
        raise _refusal(path, "could not be read: its tensors and their names do not agree")
    return Foreign({name: tensors[str(i)] for i, name in enumerate(names)}, numbers, kind)


def _check_torch(path: Path, version: str) -> None:
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TORCH:
        raise _refusal(
            path,
            f"is not read with torch {version}: its reader can be made to run code; use torch >="
            f" {'.'.join(map(str, OLDEST_TORCH))}",
        )


def _run(path: Path, folder: Path, limits: Limits) -> int | None:
    """Exit code of the process, negative for a signal; None if its time was over."""
    with (folder / "stderr").open("wb") as stderr:
        child = subprocess.Popen(
            command(path, folder, limits),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            return child.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also on Ctrl-C
            if child.returncode is None:
                _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and whatever it may have started."""
    if sys.platform == "win32":
        child.kill()
    else:
        os.killpg(child.pid, signal.SIGKILL)  # not reaped yet: the number is still its own
    child.wait()


def _ended(code: int | None, folder: Path, limits: Limits) -> str:
    """Why there is no result."""
    if code is None or (code < 0 and -code == _SIGXCPU):
        return f"took longer than {limits.seconds:g} s to read; it was given up"
    if code < 0 and -code == _SIGKILL:
        return "could not be read: the system ended the reading (SIGKILL), often for want of memory"
    if code < 0:
        return f"is damaged: reading it crashed ({signal.Signals(-code).name})"
    with (folder / "stderr").open("rb") as file:
        file.seek(max(0, (folder / "stderr").stat().st_size - 2000))
        lines = file.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
    return f"could not be read: {short(last, MAX_REASON)}"


_SIGKILL, _SIGXCPU = 9, 24  # Windows has no such names


def _parse(path: Path, result: Path) -> tuple[list[str], dict[str, Number]]:
    """What the process says, which is believed no more than the file."""
    if result.stat().st_size > MAX_RESULT:
        raise _refusal(path, f"holds names and numbers of more than {MAX_RESULT} bytes")
    try:
        told: object = json.loads(result.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"could not be read: {error}") from error
    if not isinstance(told, dict):
        raise _refusal(path, "could not be read: what was read is no JSON object")
    told = cast("dict[str, object]", told)
    if "refused" in told:
        raise _refusal(path, short(str(told["refused"]), MAX_REASON))
    names, numbers = told.get("names"), told.get("numbers")
    if not (_all_of(names, list, str) and _all_of(numbers, dict, str)):
        raise _refusal(path, "could not be read: its names are no names")
    named = cast("dict[str, object]", numbers)
    if not all(isinstance(number, int | float | str) for number in named.values()):
        raise _refusal(path, "could not be read: its numbers are no numbers")
    return cast("list[str]", names), cast("dict[str, Number]", named)


def _all_of(values: object, outer: type, inner: type) -> bool:
    if not isinstance(values, outer):
        return False
    return all(isinstance(value, inner) for value in cast("list[object]", values))


# --- which weights ------------------------------------------------------------------------------

EMA_LEVELS = ("ema", "ema_state_dict", "ema_model", "model_ema", "state_dict_ema")
RAW_LEVELS = ("model", "state_dict", "model_state_dict", "net", "unet")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, any


@dataclass(frozen=True)
class Chosen:
    """One state dict of a file, without what wraps it.

    Args:
        note: where it stood, for the user: 'weights: ema, from "ema", prefix "ema_model."'.
    """

    tensors: Mapping[str, Tensor]
    note: str


def choose_weights(foreign: Foreign, weights: Weights) -> Chosen:
    """The state dict in a file that may hold several, or wrap it.

    Known are the levels `EMA_LEVELS` and `RAW_LEVELS`, ema_pytorch's prefixes `ema_model.` and
    `online_model.`, and `WRAPPERS` if all names begin with one. A file that is nothing but one
    state dict does not say which weights it holds; it is taken for either, and the note says so.

    Raises:
        CheckpointError: the file does not hold these weights, or several that could be meant.
    """
    levels = _levels(foreign.tensors)
    found = _candidates(levels, weights)
    if not found:
        raise CheckpointError(_absent(levels, weights))
    if len(found) > 1:
        places = ", ".join(place for place, _ in found)
        raise CheckpointError(f"the file holds several networks ({places}); keep one of them")
    ((place, tensors),) = found
    return _unwrapped(place, tensors)


def _levels(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the dictionary that holds them; "" is the outermost."""
    levels = dict[str, dict[str, Tensor]]()
    for name, tensor in tensors.items():
        level, _, last = name.rpartition("/")
        levels.setdefault(level, {})[last] = tensor
    return levels


Candidate = tuple[str, dict[str, Tensor]]


def _candidates(levels: Mapping[str, dict[str, Tensor]], weights: Weights) -> list[Candidate]:
    ema = [(name, levels[name]) for name in EMA_LEVELS if name in levels]
    raw = [(name, levels[name]) for name in RAW_LEVELS if name in levels]
    bare = [("", levels[""])] if "" in levels and not (ema or raw) else []
    averaged, online = list[Candidate](), list[Candidate]()
    for place, tensors in (*ema, *bare):
        inner = _within(tensors, "ema_model.")
        averaged.append((f"{place} ema_model.".lstrip(), inner) if inner else (place, tensors))
        if other := _within(tensors, "online_model."):
            online.append((f"{place} online_model.".lstrip(), other))
        elif not inner and not place:
            online.append((place, tensors))
    return averaged if weights is Weights.EMA else raw or online


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _unwrapped(place: str, tensors: dict[str, Tensor]) -> Chosen:
    removed = list[str]()
    while prefix := next((w for w in WRAPPERS if all(n.startswith(w) for n in tensors)), None):
        tensors = _within(tensors, prefix)
        removed.append(prefix)
    taken = f"weights taken from {place}"
    unsaid = "the file holds one set of weights and does not say whether they are averaged"
    prefixes = f"; prefix {''.join(removed)} removed" if removed else ""
    return Chosen(tensors, (taken if place else unsaid) + prefixes)


def _absent(levels: Mapping[str, dict[str, Tensor]], weights: Weights) -> str:
    other = Weights.RAW if weights is Weights.EMA else Weights.EMA
    if _candidates(levels, other):
        return f"the file holds no {weights.value} weights; ask for its {other.value} weights"
    shown = ", ".join(short(level) for level in list(levels)[:8])
    known = ", ".join(chain(EMA_LEVELS, RAW_LEVELS))
    return f"the file holds its tensors in {shown}; weights are looked for in {known}"

"""A process of its own that turns a foreign torch file into safetensors and plain JSON.

Started by `_files.read_tensors`; nothing of ours imports it. It is the only place where a pickle
is opened, and it opens it with torch's own reader that knows tensors and plain containers and
nothing else (`weights_only`). Should that reader have a hole, this process may use only so much
memory, time and disk, may write into one folder, and may start nothing and connect to nobody.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor, nn

TENSORS = "tensors.safetensors"  # its names are "0", "1", ...: theirs are in RESULT
RESULT = "result.json"

MAX_DEPTH = 50
MAX_NODES = 1_000_000  # dictionaries that hold each other would never end

Number = int | float | bool | str
Found = tuple[dict[str, Tensor], dict[str, Number]]

DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    }
)


class Refused(Exception):
    """Why the file is not read, in words that follow the name of the file."""


def main(argv: list[str]) -> int:
    """IN OUT_DIR MEMORY SECONDS: bytes beyond those of an idle torch, and seconds of work."""
    source, out, memory, seconds = Path(argv[0]), Path(argv[1]), int(argv[2]), int(argv[3])
    limit(memory, seconds)
    guard(out)
    result = convert(source, out, memory)
    (out / RESULT).write_text(json.dumps(result), encoding="ascii")
    return 0


def convert(source: Path, out: Path, memory: int) -> dict[str, object]:
    """Write the tensors of `source` into `out`.

    Returns:
        `names` of the tensors, and `numbers` by name; or `refused` with the reason.
    """
    try:
        tensors, numbers = flattened(load(source))
        save(tensors, out / TENSORS, memory)
        return {"names": list(tensors), "numbers": numbers}
    except Refused as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001  # whatever a damaged file does to torch
        return {"refused": reason(error)}


def load(source: Path) -> object:
    """What is in the file; where possible its tensors stay on disk until they are copied."""
    with source.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    mapped = zipped and _check_archive(source)
    return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _check_archive(source: Path) -> bool:
    """Say what a zip archive is if none of torch's, and whether it can be mapped to memory."""
    try:
        with ZipFile(source) as archive:
            entries = archive.infolist()
            _check_names({entry.filename for entry in entries})
            damaged = archive.testzip()  # torch does not look at the checksums
    except BadZipFile:
        raise Refused("is an incomplete or damaged zip archive; fetch it again") from None
    if damaged is not None:
        raise Refused(
            f"is damaged: {damaged} in it does not have its checksum; fetch it again"
            " (or save it again, if set_crc32_options(False) was on)"
        )
    # torch would take the bytes of a compressed entry for numbers.
    return all(entry.compress_type == ZIP_STORED for entry in entries)


def _check_names(names: set[str]) -> None:
    files = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in files:
        raise Refused("is a TorchScript archive, which holds a program; save its state_dict()")
    if "data.pkl" not in files:
        known = "NumPy arrays (.npz)" if any(n.endswith(".npy") for n in names) else "other things"
        raise Refused(f"is a zip archive of {known}, not one that torch.save has written")


# --- what is in it ------------------------------------------------------------------------------


def flattened(value: object) -> Found:
    """Tensors and numbers by name: keys of nested dictionaries, joined by "/".

    None, dtypes and other leaves without a number are left out.
    """
    if not isinstance(value, dict):
        raise Refused(f"holds a {type(value).__name__}, not a dictionary of tensors")
    tensors, numbers = dict[str, Tensor](), dict[str, Number]()
    for count, (name, leaf) in enumerate(_nodes(value, "", 0)):
        if count > MAX_NODES:
            raise Refused(f"holds more than {MAX_NODES} values; no network has so many")
        if name in tensors or name in numbers:
            raise Refused(f"holds two values that are both called {name!r}")
        if isinstance(leaf, Tensor):
            tensors[name] = _plain(name, leaf)
        elif isinstance(leaf, bool | int | float | str):
            numbers[name] = leaf
    if not tensors:
        raise Refused("holds no tensors")
    return tensors, numbers


def _nodes(value: object, name: str, depth: int) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        yield name, value
        return
    if depth == MAX_DEPTH:
        raise Refused(f"holds dictionaries {MAX_DEPTH} deep; no network has so many")
    yield name, None
    for key, inner in items:
        if not isinstance(key, str | int):
            raise Refused(f"has a key that is a {type(key).__name__} in {name or 'its dictionary'}")
        yield from _nodes(inner, f"{name}/{key}" if name else str(key), depth + 1)


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor without history; only what is nothing but numbers in memory."""
    special = None
    if type(tensor) not in (Tensor, nn.Parameter):
        special = type(tensor).__name__
    elif tensor.layout is not torch.strided:
        special = f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    elif tensor.is_quantized:
        special = "quantized"
    elif tensor.is_nested:
        special = "nested"
    elif tensor.device.type != "cpu":
        special = f"empty (device {tensor.device.type})"
    elif tensor.dtype not in DTYPES:
        special = str(tensor.dtype).removeprefix("torch.")
    if special is not None:
        raise Refused(f"cannot be read: its tensor {name} is {special}; only plain tensors are")
    return tensor.detach().resolve_neg()


def save(tensors: dict[str, Tensor], path: Path, memory: int) -> None:
    """Write plain copies; views that overlap or repeat are written out in full."""
    from safetensors.torch import save_file

    total = sum(t.numel() * t.element_size() for t in tensors.values())
    if total > memory:
        raise Refused(
            f"holds tensors of {total / 2**20:.0f} MiB; for its size, at most"
            f" {memory / 2**20:.0f} MiB are allowed"
        )
    seen, copies = set[int](), dict[str, Tensor]()
    for number, tensor in enumerate(tensors.values()):
        pointer = tensor.untyped_storage().data_ptr()
        shared = pointer in seen or not tensor.is_contiguous()
        copies[str(number)] = (
            tensor.clone(memory_format=torch.contiguous_format) if shared else tensor
        )
        seen.add(pointer)
    save_file(copies, path)


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error)
    asked = re.search(r"GLOBAL (\S+)", text)
    if asked:
        return (
            f"asks for {asked[1]} to be called while it is read; only tensors are read, since"
            " anything else could run a program"
        )
    if isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text:
        return "needs more memory to read than a file of its size may"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "weights_only" not in line]
    shown = ": ".join((type(error).__name__, *(told or lines)[:1]))
    return f"is damaged, incomplete or no file of weights ({shown[:300]})"


# --- what this process may do -------------------------------------------------------------------


def limit(memory: int, seconds: int) -> None:
    """Bound memory, seconds of work and the size of files, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: only the parent's clock is left
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (memory, memory))
    status = Path("/proc/self/statm")
    if status.exists():  # torch alone maps gigabytes, more with CUDA: what counts is the rest
        mapped = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

FORBIDDEN = (
    *("socket.", "subprocess.", "ctypes.", "shutil.", "urllib.", "ftplib.", "http.", "smtplib."),
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "pty."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.kill", "os.putenv", "signal.", "webbrowser.", "sys.settrace"),
)


def guard(folder: Path) -> None:
    """From here on Python may write into `folder` alone, start nothing and connect to nobody.

    Not a sandbox: native code is not seen. It bars what an ordinary exploit does first.
    """
    home = os.path.realpath(folder)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event.startswith(FORBIDDEN) or (event == "open" and _writes_outside(home, args)):
            raise PermissionError(f"{event} is not allowed while a foreign file is read")

    sys.addaudithook(hook)


def _writes_outside(home: str, args: tuple[object, ...]) -> bool:
    path, _, flags = args
    if not isinstance(flags, int) or not flags & WRITES:
        return False
    if not isinstance(path, str | bytes):
        return True
    return os.path.dirname(os.path.realpath(os.fsdecode(path))) != home


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The few file operations that saving needs, as an argument, so that tests can let each fail.

Everything is created with mode 0666 or 0777 and narrowed by the umask, like any other file.
"""

import os
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Protocol, runtime_checkable

from undiffuse.errors import CheckpointError

Chunk = bytes | memoryview


@runtime_checkable
class Disk(Protocol):
    """What may go wrong while saving. Every method may raise OSError."""

    def make_folder(self, path: Path) -> None:
        """Create one folder whose parent exists."""
        ...

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """Create a new file and write all of it; not yet durable."""
        ...

    def sync(self, path: Path) -> None:
        """Wait until the file's contents would survive a loss of power."""
        ...

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in this folder would survive a loss of power."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Atomic; an existing file `new` is replaced, a folder that holds something is not."""
        ...

    def remove(self, path: Path) -> None:
        """Delete one file or link."""
        ...

    def remove_folder(self, path: Path) -> None:
        """Delete one empty folder."""
        ...

    def free_space(self, path: Path) -> int:
        """Bytes that this user may still write."""
        ...


@dataclass(frozen=True)
class RealDisk:
    """The operating system's files."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        with open(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)

    def sync(self, path: Path) -> None:
        # Linux flushes the file, not the descriptor, so a second descriptor serves
        with open(path, "r+b") as file:
            os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        if sys.platform == "win32":  # folders cannot be opened there; best effort
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        path.rmdir()

    def free_space(self, path: Path) -> int:
        import shutil

        return shutil.disk_usage(path).free


REAL_DISK = RealDisk()


def remove_tree(disk: Disk, path: Path) -> None:
    """Delete a folder and what is in it, or a single file; links are never followed."""
    if path.is_symlink() or not path.is_dir():
        disk.remove(path)
        return
    for child in sorted(path.iterdir()):
        remove_tree(disk, child)
    disk.remove_folder(path)


@dataclass(frozen=True)
class Payload:
    """What one file will hold."""

    chunks: Sequence[Chunk]

    @property
    def size(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)

    def sha256(self) -> str:
        digest = sha256()
        for chunk in self.chunks:
            digest.update(chunk)
        return digest.hexdigest()


# --- reading ------------------------------------------------------------------------------------

_BINARY = getattr(os, "O_BINARY", 0)  # only Windows tells text from bytes
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a FIFO would otherwise wait for its other end


def open_named(path: Path) -> FileIO:
    """Open a regular file that the user named; links are followed, nothing ever blocks.

    Raises:
        CheckpointError: it does not exist, is no regular file, or may not be read.
    """
    return _open_regular(path, 0)


def open_own(path: Path) -> FileIO:
    """Open a regular file inside a checkpoint, where a link has no business."""
    if os.path.islink(path):
        raise CheckpointError(f"{path} is a symbolic link; a checkpoint holds files only")
    return _open_regular(path, _NO_FOLLOW)


def _open_regular(path: Path, flags: int) -> FileIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_WAIT | _BINARY | flags)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CheckpointError(f"{path} is {kind}, not a file")
    return FileIO(descriptor, "rb")


def read_exactly(file: FileIO, into: memoryview, path: Path) -> None:
    """Fill `into` from the file.

    Raises:
        CheckpointError: the file ends early or the disk reports an error.
    """
    done = 0
    while done < len(into):
        try:
            count = file.readinto(into[done : done + 2**26])
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
        if not count:
            raise CheckpointError(f"{path} is truncated: it ended while it was read")
        done += count


def read_all(file: FileIO, limit: int, path: Path) -> bytes:
    """The whole of a small file."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise CheckpointError(f"{path} has {size} bytes, more than the limit of {limit}")
    data = bytearray(size)
    read_exactly(file, memoryview(data), path)
    return bytes(data)


def reason_of(error: Exception) -> str:
    """What went wrong, without the path that the message names anyway."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def amounts(have: int, want: int) -> str:
    """Two sizes in the unit that suits the second: "1.2 of 2.8 MB"."""
    unit, divisor, digits = _unit(want)
    return f"{have / divisor:.{digits}f} of {want / divisor:.{digits}f} {unit}"


def amount(size: int) -> str:
    """A size for people: "412.0 MB"."""
    unit, divisor, digits = _unit(size)
    return f"{size / divisor:.{digits}f} {unit}"


def _unit(size: int) -> tuple[str, int, int]:
    """The decimal unit in which a size has few digits, its bytes, and digits after the point."""
    units = (("GB", 10**9, 1), ("MB", 10**6, 1), ("kB", 10**3, 1))
    return next((unit for unit in units if size >= unit[1]), ("bytes", 1, 0))

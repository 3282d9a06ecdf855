"""One writer per run folder."""

import json
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from undiffuse.checkpoint._disk import reason_of
from undiffuse.errors import ConfigError, ResourceError


@dataclass
class RunLock:
    """Holds RUN/.lock while the `with` block runs; the system lets go of it when we die.

    The file stays, since deleting it could let two processes lock two files of that name.

    Raises:
        ConfigError: another process holds it; the message names its PID and host.
        ResourceError: the folder cannot be written, or its file system has no locks.
    """

    folder: Path
    _descriptor: int = field(default=-1, init=False)

    def __enter__(self) -> "RunLock":
        path = self.folder / ".lock"
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            self._descriptor = os.open(path, flags, 0o666)
            _take(self._descriptor)
        except BlockingIOError as error:
            owner = _read_owner(self._descriptor)
            self._close()
            raise ConfigError(f"{self.folder} is being trained by {owner}") from error
        except OSError as error:
            self._close()
            raise ResourceError(f"cannot lock {path}: {reason_of(error)}") from error
        _write_owner(self._descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def _take(descriptor: int) -> None:
    if sys.platform == "win32":  # no flock there; best effort
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write_owner(descriptor: int) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": int(time.time())}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _read_owner(descriptor: int) -> str:
    try:
        owner = cast(dict[str, object], json.loads(os.pread(descriptor, 1000, 0)))
        host = str(owner["host"])
        place = "this host" if host == socket.gethostname() else host
        return f"PID {owner['pid']} on {place}"
    except (ValueError, KeyError, TypeError):  # it has locked, but not yet written
        return "another process"

"""Compiles `native.cpp` with the machine's own compiler, keeps the result, and loads it.

Nothing here may stop a program: whatever goes wrong ends in a `Missing` with the reason in words,
and the caller does the work with torch's own operations instead.

The library must share torch's OpenMP runtime. A second one in the process would start threads of
its own, and the two would fight for the cores; so the object file is linked with the very file
that torch has loaded, and the dynamic linker then finds it present already.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")
LIMIT_S = 120.0  # for all that compilers do, together; two to six seconds are normal
CANDIDATES = ("c++", "g++", "clang++")

# No -ffast-math: it would change how the whole process treats very small numbers. These two give
# up only the error flags that nobody reads. Without the third, gcc splits the clamps of an
# activation into branches first and then computes every branch for every element (30 % slower).
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-thread-jumps",
)
OPENMP = re.compile(r"/lib(gomp|omp|iomp5)[-.][^/]*$")


@dataclass(frozen=True)
class Library:
    """The loaded library and the compiler that made it."""

    handle: ctypes.CDLL
    compiler: str


@dataclass(frozen=True)
class Missing:
    """There is no library, because of `reason` (one clause)."""

    reason: str


class _Failed(Exception):
    """Why one attempt came to nothing."""


_lock = threading.Lock()
_loaded: list[Library | Missing] = []


def load() -> Library | Missing:
    """The library, compiled on the first call ever and loaded on the first call of a process."""
    with _lock:
        if not _loaded:
            _loaded.append(_find_or_build())
        return _loaded[0]


def _find_or_build() -> Library | Missing:
    """Try one compiler after the other; the first one's complaint is the one reported."""
    if os.name != "posix":
        return Missing(f"on {platform.system()} there is no compiler that takes these options")
    deadline = time.monotonic() + LIMIT_S
    reasons: list[str] = []
    for compiler in compilers():
        try:
            return _with_compiler(compiler, deadline)
        except _Failed as failure:
            reasons.append(str(failure))
        except subprocess.TimeoutExpired:
            reasons.append(f"{compiler[0]} did not end within {LIMIT_S:g} s")
            break
        except OSError as error:
            reasons.append(f"{error.strerror or error}: {error.filename or compiler[0]}")
    return Missing(reasons[0] if reasons else _none_found())


def compilers() -> list[list[str]]:
    """Commands to try, each compiler once: what $CXX says, else the usual names."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    commands = [wanted] if wanted else [[name] for name in CANDIDATES]
    found: dict[str, list[str]] = {}
    for name, *options in commands:
        path = shutil.which(name)
        if path is not None:
            found.setdefault(os.path.realpath(path), [path, *options])
    return list(found.values())


def _none_found() -> str:
    wanted = os.environ.get("CXX")
    if wanted:
        return f"the compiler that CXX names, {wanted}, was not found"
    return f"no C++ compiler was found ({', '.join(CANDIDATES)}); install one or set CXX"


def _with_compiler(compiler: list[str], deadline: float) -> Library:
    version = _run([*compiler, "--version"], deadline)
    flags = (*FLAGS, *machine_flags(platform.machine()))
    runtime = openmp_runtime()
    parts = (*compiler[1:], *flags, version, runtime.name, cpu())
    key = hashlib.sha256("\0".join(parts).encode() + SOURCE.read_bytes()).hexdigest()
    folder = _private(cache_folder())
    path = folder / f"{key}.so" if folder else None
    handle = _kept(path) or _build([*compiler, *flags], runtime, path, deadline)
    return Library(handle, version.partition("\n")[0] or compiler[0])


def machine_flags(machine: str) -> tuple[str, ...]:
    """The compiler's words for "this processor": the library never leaves the machine."""
    if machine in ("x86_64", "AMD64", "i686"):
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",)


def cpu() -> str:
    """What a home folder shared between unlike machines must be told apart by."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = text.split("\n\n", 1)[0]
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in first.splitlines() if line.startswith(names))


def openmp_runtime() -> Path:
    """The OpenMP library that torch has loaded.

    Raises:
        _Failed: there is none, or this system does not tell.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        maps = ""
    mapped = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    found = [path for path in mapped if OPENMP.search(path)]
    if not found:
        raise _Failed("the OpenMP library that torch uses was not found in this process")
    # Another package may have brought one of its own.
    ours = str(Path(torch.__file__).parent)
    return Path(min(found, key=lambda path: (not path.startswith(ours), path)))


def _run(command: list[str], deadline: float) -> str:
    """Standard output of a command that must succeed in time.

    It runs in a process group of its own: a compiler is a tree of processes, and all must go.
    """
    left = max(deadline - time.monotonic(), 0.01)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=left)
        except BaseException:  # too long, or Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0:
        said = [line.strip() for line in stderr.splitlines() if line.strip()]
        telling = next((line for line in said if "error" in line), (said or ["no message"])[0])
        raise _Failed(f"{command[0]} failed with code {process.returncode}: {telling[:200]}")
    return stdout


def _kept(path: Path | None) -> ctypes.CDLL | None:
    """The library of an earlier run, if there is one that loads."""
    if path is None or not path.is_file() or path.stat().st_uid != os.getuid():
        return None
    try:
        return _open(path)
    except _Failed:
        return None


def _build(command: list[str], runtime: Path, path: Path | None, deadline: float) -> ctypes.CDLL:
    """Compile, link, load, and only then keep as `path`: whole or not at all, for others race."""
    folder = None if path is None else path.parent
    with tempfile.TemporaryDirectory(
        dir=folder, prefix="build-", ignore_cleanup_errors=True
    ) as build:
        part, made = f"{build}/native.o", Path(build, "native.so")
        _run([*command, "-c", str(SOURCE), "-o", part], deadline)
        # Linked without -fopenmp, which would name the compiler's own runtime.
        link = [option for option in command if option != "-fopenmp"]
        _run([*link, "-shared", part, str(runtime), "-o", str(made)], deadline)
        if not made.is_file():
            raise _Failed(f"{command[0]} reported success but wrote nothing")
        handle = _open(made)
        if path is not None:
            os.replace(made, path)
    return handle


def _open(path: Path) -> ctypes.CDLL:
    try:
        handle = ctypes.CDLL(str(path))
        handle.undiffuse_vector_floats()
    except (OSError, AttributeError) as error:
        raise _Failed(f"what was compiled does not load: {str(error)[:200]}") from error
    return handle


def cache_folder() -> Path:
    """$UNDIFFUSE_CACHE, or `undiffuse` in $XDG_CACHE_HOME or ~/.cache; in it, `kernels`."""
    own, shared = os.environ.get("UNDIFFUSE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).absolute() / "kernels"
    base = Path(shared) if shared else Path(os.path.expanduser("~"), ".cache")
    return base.absolute() / "undiffuse" / "kernels"


def _private(folder: Path) -> Path | None:
    """`folder`, made if need be, if nobody else can put a file there: it will be executed."""
    mine = os.getuid()
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != mine or folder.parent.stat().st_uid not in (mine, 0):
            return None
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None

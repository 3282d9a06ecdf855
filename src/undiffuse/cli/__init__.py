"""The command line: arguments in, lines and exit codes out. The only module that prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a defect of ours,
2 usage, 3 data, 4 checkpoint or model file, 5 diverged, 6 a limit not met, 7 memory or disk,
130 and 143 stopped by a signal.
"""

import contextlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from undiffuse.cli._arguments import Arguments
from undiffuse.cli._output import Output
from undiffuse.cli._parser import parse_arguments, wants
from undiffuse.cli._signals import Terminated, listening, terminate
from undiffuse.errors import ResourceError, UndiffuseError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and raises nothing."""
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    out = Output(as_json=wants(words, "--json"), quiet=wants(words, "-q", "--quiet"))
    try:
        with listening(terminate, "SIGTERM", "SIGHUP"):
            code = _guarded(words, out)
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader of our stdout has gone, as with `| head`: nothing left to say
        _point_to_nowhere(sys.stdout)
        return 0


def _guarded(words: Sequence[str], out: Output) -> int:
    try:
        arguments = parse_arguments(words)
        return arguments.run(arguments, out)
    except SystemExit as done:  # argparse has answered --help or --version
        return int(done.code or 0)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as stop:
        return out.error(143 if isinstance(stop, Terminated) else 130, "Interrupted", "interrupted")
    except Exception as error:  # noqa: BLE001 # the last border: users get a line, not a traceback
        if wants(words, "--debug"):
            traceback.print_exc()
        return _report(error, out)


def _report(error: Exception, out: Output) -> int:
    """One line about what went wrong; the exit code of its kind."""
    if isinstance(error, UndiffuseError):
        return out.error(error.exit_code, type(error).__name__, str(error))
    if _is_memory(error):
        text = "out of memory; try fewer or smaller pictures at once (--batch-size, --resolution)"
        return out.error(ResourceError.exit_code, "ResourceError", text)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}; name another place, or change its permissions"
        return out.error(ResourceError.exit_code, "ResourceError", text)
    reason = f"{type(error).__name__}: {error}"
    kept = f"(traceback: {_keep_traceback(error, out.run)}); please report it"
    return out.error(1, type(error).__name__, f"a defect of undiffuse: {reason} {kept}")


def _is_memory(error: Exception) -> bool:
    """Python's, a GPU's, or that of torch's allocator on the CPU; torch is not imported here."""
    names = {one.__name__ for one in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def _keep_traceback(error: Exception, run: Path | None) -> Path:
    """In the run if there is one, else among the temporary files."""
    text = "".join(traceback.format_exception(error))
    if run is not None and (run / "config.json").is_file():
        (run / "crash.txt").write_text(text, encoding="utf-8")
        return run / "crash.txt"
    with tempfile.NamedTemporaryFile(
        "w", prefix="undiffuse-crash-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    return Path(file.name)


def _prepare_streams() -> None:
    """A stream that was closed swallows its words; a name no encoding knows is shown escaped."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 # for the whole process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 # likewise
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _point_to_nowhere(stream: object) -> None:
    """Otherwise Python complains about the broken pipe once more at its end."""
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


__all__ = ["Arguments", "main"]

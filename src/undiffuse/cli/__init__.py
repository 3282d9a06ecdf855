"""The command line: arguments in, lines and exit codes out. The only module that prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a defect of ours,
2 usage, 3 data, 4 checkpoint or model file, 5 diverged, 6 a limit not met, 7 memory or disk,
130 and 143 stopped by a signal.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from undiffuse.cli._output import Output
from undiffuse.cli._parser import Arguments, parse_arguments, wants
from undiffuse.errors import UndiffuseError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and raises nothing."""
    words = list(sys.argv[1:] if argv is None else argv)
    out = Output(as_json=wants(words, "--json"), quiet=wants(words, "-q", "--quiet"))
    try:
        return _guarded(words, out)
    except BrokenPipeError:
        # the reader of our stdout has gone, as with `| head`: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _guarded(words: Sequence[str], out: Output) -> int:
    try:
        arguments = parse_arguments(words)
        code = arguments.run(arguments, out)
        sys.stdout.flush()
        return code
    except UndiffuseError as error:
        if wants(words, "--debug"):
            traceback.print_exc()
        return out.error(error.exit_code, type(error).__name__, str(error))
    except KeyboardInterrupt:
        return out.error(130, "Interrupted", "interrupted; nothing was left half-written")
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 # the last border: users get a line, not a traceback
        return out.error(1, type(error).__name__, _crash(error))


def _crash(error: Exception) -> str:
    """Keep the traceback in a file and say where."""
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w", prefix="undiffuse-crash-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    reason = " ".join(str(error).split())
    return f"a defect of undiffuse: {reason} (traceback: {Path(file.name)}); please report it"


__all__ = ["Arguments", "main"]

"""Lines, errors and JSON: everything a command says."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast


class Output:
    """Where a command's words go: stdout for results, stderr for the rest."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.warnings: list[str] = []
        self.run: Path | None = None  # where a defect leaves its traceback

    def say(self, text: str = "") -> None:
        """A line of the result."""
        if not self.as_json:
            print(text)

    def tell(self, text: str) -> None:
        """A line of progress."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A line of progress that `--json` repeats under "warnings"."""
        self.warnings.append(text)
        self.tell(f"note: {one_line(text)}")

    def result(self, command: str, status: str = "ok", **values: Any) -> None:
        """With `--json`: one object on one line, at the end, alone on stdout."""
        if not self.as_json:
            return
        lost: list[str] = []
        plain = cast("dict[str, Any]", _finite(values, "", lost))
        warnings = [*self.warnings, *(f"{name} is not a finite number" for name in lost)]
        self._object({"schema": f"undiffuse.{command}/1", "status": status, **plain}, warnings)

    def error(self, code: int, kind: str, message: str) -> int:
        """One line on stderr (and one object with `--json`); returns the exit code."""
        message = one_line(message)
        if self.as_json:
            status = "interrupted" if code in (130, 143) else "error"
            record = {"code": code, "type": kind, "message": message}
            self._object({"schema": "undiffuse.error/1", "status": status, **record}, self.warnings)
        print(f"undiffuse: {message}", file=sys.stderr, flush=True)
        return code

    def _object(self, values: dict[str, Any], warnings: list[str]) -> None:
        print(json.dumps({**values, "warnings": warnings}, allow_nan=False))


def one_line(text: str) -> str:
    """Spaces for line breaks, escapes for what could steer a terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in " ".join(text.split())
    )


def _finite(value: object, name: str, lost: list[str]) -> object:
    """JSON has no NaN and no infinity: null instead, and the name goes on the list."""
    if isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        return {key: _finite(one, f"{name}.{key}".lstrip("."), lost) for key, one in items}
    if isinstance(value, list | tuple):
        rows = enumerate(cast("Sequence[object]", value))
        return [_finite(one, f"{name}[{i}]", lost) for i, one in rows]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(name)
        return None
    return value


def count_of(number: int, singular: str) -> str:
    """1 thread, 2 threads, 10,000 pictures."""
    return f"{number:,} {singular}{'' if number == 1 else 's'}"


def shown(value: float | None, digits: int = 4) -> str:
    """A figure; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows in columns, the given ones right-aligned; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def duration(seconds: float) -> str:
    """3 s, 2 min 05 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Bar:
    """A progress bar on a terminal, else one plain line every ten seconds."""

    def __init__(self, out: Output, total: int, what: str, done: int = 0) -> None:
        from tqdm import tqdm

        self.out, self.total, self.what, self.done, self.first = out, total, what, done, done
        self.facts: Mapping[str, str] = {}
        self.began = self.spoken = time.monotonic()
        self.plain = not sys.stderr.isatty()
        self.tqdm = tqdm(
            total=total,
            initial=done,
            desc=what,
            disable=self.plain or out.quiet,
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self, facts: Mapping[str, str] | None = None, by: int = 1) -> None:
        """One more (or `by` more) is done; facts (loss, ...) stay until they change."""
        self.done += by
        self.tqdm.update(by)
        if facts:
            self.show(facts)
        if self.plain and time.monotonic() - self.spoken > 10:
            self._speak()

    def show(self, facts: Mapping[str, str]) -> None:
        """Change what stands beside the bar."""
        self.facts = {**self.facts, **facts}
        self.tqdm.set_postfix(self.facts)

    def write(self, text: str) -> None:
        """A line that does not tear the bar."""
        if self.plain or self.out.quiet:
            self.out.tell(text)
        else:
            self.tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self.tqdm.close()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _speak(self) -> None:
        self.spoken = time.monotonic()
        rate = (self.done - self.first) / (self.spoken - self.began)
        left = duration((self.total - self.done) / rate)
        facts = "".join(f" {name} {value}" for name, value in self.facts.items())
        self.out.tell(f"{self.what} {self.done}/{self.total}{facts} ETA {left}")


class Bars:
    """One bar after another, each begun when its part of the work begins."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self.bar: Bar | None = None

    def reach(self, what: str, done: int, total: int) -> None:
        """So much of `what` is done."""
        if self.bar is None or self.bar.what != what:
            self.close()
            self.bar = Bar(self.out, total, what)
        self.bar.advance(by=done - self.bar.done)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

"""What a measurement of quality is made of.

A task is a function (lab, seed) -> findings: it trains (or takes what was trained), judges, and
says one number per finding beside what it is held against. A finding *holds* if its value is on the
right side of its bound, and nothing else decides. Results are lines of JSON; the newest line of
every name and seed counts, and the page shows the mean over the seeds with its spread.

Interrupted work goes on: a task whose lines are there for this seed, made with the same settings,
is left out, and a training that was stopped resumes from its checkpoint.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

SCHEMA = "undiffuse.quality/1"
VERSION = 1  # raise when a change of the product makes kept results out of date

Numbers = dict[str, Any]  # anything that JSON holds


class Side(StrEnum):
    """On which side of its bound a value should be."""

    AT_MOST = "<="
    AT_LEAST = ">="
    SHOWN = ""  # held against nothing


@dataclass(frozen=True)
class Finding:
    """One number of one seed.

    Args:
        name: such as "digits-best/recall".
        value: what was found.
        bound: what `value` must reach; None where nothing is asked.
        target: the bound in words, such as "<= 2 x floor".
        floor: what real data score; `limit`: what mathematics allows. Whichever applies.
        detail: all that the number was made of, for the page and for whoever asks.
    """

    name: str
    value: float
    side: Side = Side.SHOWN
    bound: float | None = None
    target: str = ""
    floor: float | None = None
    limit: float | None = None
    unit: str = ""
    detail: Numbers = dataclasses.field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """None where nothing is asked. A value that is no number never holds."""
        if self.bound is None or self.side is Side.SHOWN:
            return None
        if self.side is Side.AT_MOST:
            return self.value <= self.bound
        return self.value >= self.bound


def at_most(name: str, value: float, bound: float, target: str = "", **more: Any) -> Finding:
    """A value that should not be above `bound`."""
    return Finding(name, value, Side.AT_MOST, bound, target or f"<= {bound:g}", **more)


def at_least(name: str, value: float, bound: float, target: str = "", **more: Any) -> Finding:
    """A value that should not be below `bound`."""
    return Finding(name, value, Side.AT_LEAST, bound, target or f">= {bound:g}", **more)


@dataclass(frozen=True)
class Lab:
    """Where trained networks are kept between runs."""

    kept: Path

    def folder(self, name: str, settings: object, seed: int) -> Path:
        """One training's own folder; other settings or another seed are another one."""
        return self.kept / f"{name}-{key_of((VERSION, settings))}-seed{seed}"


@dataclass(frozen=True)
class Task:
    """A group of findings.

    Args:
        settings: everything that decides the result; other settings make old results stale.
    """

    name: str
    run: Callable[[Lab, int], Iterator[Finding]]
    settings: object = None
    seeds: Sequence[int] = (0, 1, 2)

    @property
    def key(self) -> str:
        return key_of((VERSION, self.name, self.settings))


def key_of(value: object) -> str:
    """A short name for plain values and dataclasses of them."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def line(task: Task, seed: int, finding: Finding, about: Mapping[str, Any]) -> Numbers:
    """A finding as JSON holds it; numbers that are not finite become None."""
    body = {
        "schema": SCHEMA,
        "task": task.name,
        "key": task.key,
        "seed": seed,
        **dataclasses.asdict(finding),
        "side": finding.side.value,
        "holds": finding.holds,
        **about,
    }
    return {name: _plain(value) for name, value in body.items()}


def _plain(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else None
        case Mapping():
            return {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case _:
            return value


def read(file: Path) -> list[Numbers]:
    """The lines of a results file; none where there is no file."""
    if not file.is_file():
        return []
    return [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines() if text]


def finished(lines: Sequence[Numbers], task: Task, seed: int) -> list[Numbers]:
    """What the task said of this seed as it is now, the newest line of every name; nothing where it
    did not come to its end, which its last line tells."""
    said = [
        one
        for one in lines
        if (one["task"], one["seed"], one["key"]) == (task.name, seed, task.key)
    ]
    newest = {one["name"]: one for one in said}
    return list(newest.values()) if any(one["last"] for one in said) else []

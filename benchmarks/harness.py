"""How every case is measured. Read this page before writing one.

A case is a function (bench) -> results. It builds both sides from the same weights, lets
`check_equal` compare what they compute, and only then asks for seconds:

1. a `Side` is made by `side`, which warms it up: medians of a few calls, until two in a row agree
   within 3 % (or the rounds run out); one timing is as many calls as fill `budget.seconds`;
2. `paired` times both in one process in the order A B B A A B B A ...: whatever drifts, drifts for
   both;
3. the result is the median of the paired ratios with a bootstrap 95 % interval. How long a
   compilation took stands beside, never inside.

A result is not `usable` where the load average before or after was above threads + 0.5 (somebody
else was computing), or the interval is wider than 15 % of the ratio. Nothing is averaged over runs.

One result is one line of JSON (`Result.line`). `ratio` is the number that `target` speaks of, and
`of` says in words what it is a ratio of; `holds` is `ratio` against `target` and nothing else.
"""

import dataclasses
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import undiffuse
from undiffuse import runtime
from undiffuse.unet import UNet

SCHEMA = "undiffuse.bench/1"
ROOT = Path(__file__).resolve().parent.parent

AGREE = 0.03  # two medians in a row, for a side to count as warm
SPREAD = 0.15  # of the ratio: a wider interval is not usable
SPARE_LOAD = 0.5  # load average beyond our own threads that may be there
FLOAT32, BFLOAT16 = 1e-5, 2e-2  # relative difference of outputs that counts as equal
MORE = 5  # times that the gradient of one parameter may differ as much as all of them together

Clock = Callable[[], float]
Numbers = dict[str, Any]  # anything that JSON holds


class NotEqual(Exception):
    """The two sides compute different things, so their times say nothing."""


# --- what is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How much time a comparison may take.

    Args:
        pairs: timings of each side.
        long_pairs: the same where one timing takes many seconds.
        seconds: that one timing lasts, at least.
        group: calls in each median of the warm-up.
        rounds: of the warm-up, at most.
        cold: processes per start-up time.
    """

    pairs: int = 9
    long_pairs: int = 7
    seconds: float = 0.5
    group: int = 3
    rounds: int = 10
    cold: int = 12


FULL = Budget()
QUICK = Budget(pairs=5, long_pairs=3, seconds=0.25, group=1, rounds=4, cold=10)


@dataclass(frozen=True)
class Side:
    """One of the two that are compared; `measure` takes one timing: seconds per call."""

    label: str
    measure: Callable[[], float]


@dataclass(frozen=True)
class Pairs:
    """Seconds per call of both sides, in the order of the pairs."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def speedups(self) -> list[float]:
        """How many times longer the peer took, pair by pair."""
        return [b / a for a, b in zip(self.ours, self.peer, strict=True)]


def side(label: str, call: Callable[[], object], budget: Budget, clock: Clock) -> Side:
    """Warm up, then fix how many calls are one timing."""
    once = warm(call, budget, clock)
    repeats = max(1, math.ceil(budget.seconds / max(once, 1e-9)))
    return Side(label, lambda: seconds_of(call, repeats, clock))


def seconds_of(call: Callable[[], object], repeats: int, clock: Clock) -> float:
    """Seconds per call, over `repeats` calls."""
    synchronise()
    began = clock()
    for _ in range(repeats):
        call()
    synchronise()
    return (clock() - began) / repeats


def warm(call: Callable[[], object], budget: Budget, clock: Clock) -> float:
    """Call until two medians in a row agree within 3 %, or `rounds` are over; the last median."""

    def middle() -> float:
        return statistics.median(seconds_of(call, 1, clock) for _ in range(budget.group))

    now = middle()
    for _ in range(1, budget.rounds):
        before, now = now, middle()
        if abs(now - before) <= AGREE * before:
            break
    return now


def synchronise() -> None:
    """A GPU works on after the call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(ours: Side, peer: Side, pairs: int) -> Pairs:
    """Time both in the order A B B A A B B A ..."""
    a, b = list[float](), list[float]()
    for number in range(pairs):
        order = [(a, ours), (b, peer)]
        for taken, one in order if number % 2 == 0 else order[::-1]:
            taken.append(one.measure())
    return Pairs(tuple(a), tuple(b))


# --- statistics ---------------------------------------------------------------------------------


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median, the same every time for the same values."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Law:
    """y = c x^exponent, fitted by least squares of logarithms; `error` is one standard error."""

    exponent: float
    error: float


def power_law(x: Sequence[float], y: Sequence[float]) -> Law:
    """The exponent with which y grows with x; at least three points."""
    a, b = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    centred = a - a.mean()
    slope = float(centred @ b / (centred @ centred))
    left = b - b.mean() - slope * centred
    return Law(slope, float(np.sqrt(left @ left / (len(a) - 2) / (centred @ centred))))


_TARGET = re.compile(r"(>=|<=) (\d+(?:\.\d+)?)")


def reaches(value: float, target: str) -> bool:
    """Whether a number keeps to ">= 5" or "<= 0.6"."""
    match = _TARGET.fullmatch(target)
    if match is None:
        raise ValueError(f"target must be like '>= 5' or '<= 0.6'; got {target!r}")
    limit = float(match[2])
    return value >= limit if match[1] == ">=" else value <= limit


# --- equality -----------------------------------------------------------------------------------


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; infinite where shapes differ or a number is not finite."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    if a.shape != b.shape or not bool(a.isfinite().all() & b.isfinite().all()):
        return math.inf
    return float((a - b).abs().max() / b.abs().max())


def check_equal(name: str, a: Tensor, b: Tensor, tolerance: float) -> float:
    """Their relative difference.

    Raises:
        NotEqual: it is above `tolerance`, or `b` is all zero, with which anything agrees.
    """
    if not bool(b.any()):
        raise NotEqual(f"{name}: the output is all zero, so it cannot be compared")
    found = difference(a, b)
    if not found <= tolerance:
        raise NotEqual(
            f"{name}: outputs differ by {found:.2e} of their size; {tolerance:g} allowed"
        )
    return found


def check_gradients(
    name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float
) -> float:
    """|a - b| / |b| of all gradients as one long vector.

    Raises:
        NotEqual: names differ, this is above `tolerance`, or that of one parameter is above five
            times as much. What is shorter than 1 % of the longest counts as that long: it nearly
            cancels, and the rest is rounding on both sides.
    """
    if a.keys() != b.keys():
        raise NotEqual(f"{name}: gradients of {min(a.keys() ^ b.keys())} on one side only")
    lengths = {key: float(value.double().norm()) for key, value in b.items()}
    apart = {key: float((a[key].double() - b[key].double()).norm()) for key in b}
    total, least = math.hypot(*lengths.values()), 0.01 * max(lengths.values())
    if total == 0:
        raise NotEqual(f"{name}: all gradients are zero, so they cannot be compared")
    overall = math.hypot(*apart.values()) / total
    checks = {key: (apart[key] / max(lengths[key], least), MORE * tolerance) for key in b}
    for key, (found, allowed) in {"all parameters": (overall, tolerance), **checks}.items():
        if not found <= allowed:
            raise NotEqual(f"{name}: gradients of {key} differ by {found:.2e}; {allowed:g} allowed")
    return overall


# --- our side -----------------------------------------------------------------------------------


def ours(net: UNet, path: runtime.Path) -> runtime.Net:
    """Our network as (x, timestep, label) -> output, on one of the paths."""
    return runtime.callable_net(net, path)


def chosen(net: UNet) -> runtime.Path:
    """The path that `undiffuse sample` takes."""
    return runtime.choose(net).path


def eager(net: UNet) -> runtime.Path:
    """The path without torch.compile."""
    path = chosen(net)
    if path is not runtime.Path.COMPILED:
        return path
    return runtime.half_path(next(net.parameters()).device)[0]


def tolerance_of(path: runtime.Path) -> float:
    """What rounding on this path may change."""
    return FLOAT32 if path is runtime.Path.PLAIN else BFLOAT16


# --- a result -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One line. Fields that a case does not know stay None.

    Args:
        name: "forward/ddpm/b8/default".
        how: a sentence: what was measured against what.
        unit: of `ours` and `peer`.
        of: what `ratio` is: "peer seconds / our seconds".
        width: of the interval, relative to what was timed; None where nothing was timed in pairs.
        target: ">= 5" or "<= 0.6".
        skipped: why nothing was measured.
        refused: because the two sides were not equal.
        more: whatever else is worth keeping, such as the points of a curve.
    """

    name: str
    how: str
    ours: float | None = None
    peer: float | None = None
    unit: str = ""
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    of: str = ""
    target: str | None = None
    ours_s: tuple[float, ...] = ()
    peer_s: tuple[float, ...] = ()
    images_per_second: float | None = None
    flop_per_image: int | None = None
    of_gemm: float | None = None
    of_floor: float | None = None
    compile_s: float | None = None
    peak_bytes: int | None = None
    max_abs_diff: float | None = None
    skipped: str | None = None
    refused: bool = False
    width: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def holds(self) -> bool | None:
        if self.ratio is None or self.target is None:
            return None
        return reaches(self.ratio, self.target)

    def why_unusable(self, loads: tuple[float, float], threads: int) -> list[str]:
        """Reasons not to believe the numbers; none for one that is usable."""
        wrong = [
            f"load average {load:.2f} {when}, {threads} threads of our own"
            for when, load in zip(("before", "after"), loads, strict=True)
            if load > threads + SPARE_LOAD
        ]
        if self.width is not None and self.width > SPREAD:
            wrong.append(f"the interval is {100 * self.width:.0f} % of the median wide")
        return wrong

    def line(self, machine: Numbers, versions: Numbers, commit: str) -> Numbers:
        """Everything, as plain JSON."""
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        loads = machine["load_before"], machine["load_after"]
        wrong = self.why_unusable(loads, machine["threads"])
        return {
            "schema": SCHEMA,
            "case": self.name,
            **{name: _shortened(value) for name, value in known.items()},
            "holds": self.holds,
            "usable": self.skipped is None and not wrong,
            "why_unusable": wrong,
            "machine": machine,
            "versions": versions,
            "commit": commit,
        }


def _shortened(value: Any) -> Any:
    """Six digits are more than any clock gives."""
    match value:
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else None
        case tuple() | list():
            return [_shortened(one) for one in value]
        case Mapping():
            return {name: _shortened(one) for name, one in value.items()}
        case _:
            return value


def speedup(name: str, how: str, pairs: Pairs, images: int, target: str | None = None) -> Result:
    """A comparison of throughput, `images` per call."""
    per_second = images / statistics.median(pairs.ours)
    ratio, (low, high) = statistics.median(pairs.speedups), interval(pairs.speedups)
    return Result(
        name=name,
        how=how,
        ours=per_second,
        peer=images / statistics.median(pairs.peer),
        unit="images/s",
        ratio=ratio,
        spread=(low, high),
        width=(high - low) / ratio,
        of="peer seconds / our seconds",
        target=target,
        ours_s=pairs.ours,
        peer_s=pairs.peer,
        images_per_second=per_second,
    )


# --- the machine, without its name ---------------------------------------------------------------

FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "asimd", "bf16")


def machine(threads: int, load_before: float) -> Numbers:
    """What the numbers depend on. `load_after` is taken now."""
    info = _cpu_info()
    gpu = torch.cuda.is_available()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "flags": [name for name in FLAGS if name in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "ram_gb": round((runtime.memory(torch.device("cpu")) or 0) / 2**30),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": _driver() if gpu else None,
        "load_before": round(load_before, 2),
        "load_after": round(load(), 2),
    }


def _cpu_info() -> dict[str, str]:
    """The first processor's entries; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _said(words).split("\n")[0]


def load() -> float:
    """Load average over the last minute; 0 where the system tells none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def processor(about: Numbers) -> str:
    """Its name and the most that it computes with, for which one name may stand for several."""
    return " ".join([about["cpu"], *about["flags"][:1]])


def machine_kind(about: Numbers) -> str:
    """A file name for all machines like this one: "amd-epyc-avx2-2-threads"."""
    words = [about["gpu"] or processor(about), f"{about['threads']} threads"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def versions() -> Numbers:
    """Of everything that computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "undiffuse": undiffuse.__version__,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of the repository, with "-dirty" if files are changed; empty where there is no git."""
    return _said(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"])


def _said(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


# --- fresh processes ----------------------------------------------------------------------------


def fresh(words: Sequence[str], threads: int) -> Numbers:
    """Run `python words...` in the repository's folder; the last line it prints is JSON.

    Raises:
        RuntimeError: it failed, with what it said last.
    """
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process, or its GPU, has held so far.

    Not `ru_maxrss` where the system says better: Linux hands that on from the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


# --- the bench ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What every case is given: how long it may take, and where.

    Args:
        scratch: a folder that goes when the run ends.
        kept: a folder that stays, for compiled code and for which form of a peer is fastest.
        quick: only what the headline figures need.
        peer_paths: checkouts of projects that are not installed as packages.
    """

    budget: Budget
    threads: int
    scratch: Path
    kept: Path
    quick: bool = False
    peer_paths: tuple[Path, ...] = ()
    clock: Clock = time.perf_counter

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def side(self, label: str, call: Callable[[], object]) -> Side:
        return side(label, call, self.budget, self.clock)

    def pairs(self, ours: Side, peer: Side) -> Pairs:
        return paired(ours, peer, self.budget.pairs)

    def compare(self, ours: Callable[[], object], peer: Callable[[], object]) -> Pairs:
        """Warm both up and time them."""
        return self.pairs(self.side("ours", ours), self.side("peer", peer))


@dataclass(frozen=True)
class Case:
    """A group of results under one name.

    Args:
        quick: whether it belongs to the headline figures.
    """

    name: str
    run: Callable[[Bench], Iterator[Result]]
    quick: bool = False

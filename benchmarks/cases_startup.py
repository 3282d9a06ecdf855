"""How long one waits before anything happens, in processes that have just begun."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.cases_sample import model_of
from benchmarks.harness import ROOT, Bench, Case, Pairs, Result, Side, fresh, interval, paired
from benchmarks.peers import Twins, ddpm_twins
from undiffuse import checkpoint
from undiffuse.config import SampleConfig


def cold(words: Sequence[str], threads: int) -> float:
    """Seconds of one process from its start to its end."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def _later(words: Sequence[str], threads: int) -> Callable[[], float]:
    """The same later, once the files have been read from the disk."""
    cold(words, threads)
    return lambda: cold(words, threads)


def help_text(bench: Bench) -> Iterator[Result]:
    """`undiffuse --help`, which must not wait for torch."""
    measure = _later(["-m", "undiffuse", "--help"], bench.threads)
    taken = tuple(measure() for _ in range(bench.budget.cold))
    middle, (low, high) = statistics.median(taken), interval(taken)
    yield Result(
        name="startup/help",
        how=f"`undiffuse --help`, {len(taken)} processes",
        ours=middle,
        unit="s",
        ratio=middle,
        spread=(low, high),
        width=(high - low) / middle,
        of="seconds",
        target="<= 0.2",
        ours_s=taken,
    )


def importing(bench: Bench) -> Iterator[Result]:
    """What our import adds to torch's; then everything that training and sampling import."""
    yield _import(bench, "import", "import torch, undiffuse", "<= 1.1")
    if not bench.quick:
        yield _import(bench, "import-all", "import torch, undiffuse.runs", None)


def _import(bench: Bench, name: str, code: str, target: str | None) -> Result:
    lines = (code, "import torch")
    a, b = (Side(line, _later(["-c", line], bench.threads)) for line in lines)
    pairs = paired(a, b, bench.budget.cold)
    ratios = [1 / one for one in pairs.speedups]
    how = f"`{code}` against `import torch`, {bench.budget.cold} processes each"
    low, high = interval(ratios)
    return Result(
        name=f"startup/{name}",
        how=how,
        ours=statistics.median(pairs.ours),
        peer=statistics.median(pairs.peer),
        unit="s",
        ratio=statistics.median(ratios),
        spread=(low, high),
        width=(high - low) / statistics.median(ratios),
        of="our seconds / seconds of torch alone",
        target=target,
        ours_s=pairs.ours,
        peer_s=pairs.peer,
    )


# --- the first picture --------------------------------------------------------------------------


def first_image(bench: Bench, make: Callable[[Bench], Twins] = ddpm_twins) -> Iterator[Result]:
    """`undiffuse sample -n 1` against what cannot be left out."""
    file = bench.scratch / "model.safetensors"
    checkpoint.save_model(file, model_of(bench, make(bench)))
    out = str(bench.scratch / "samples")
    words = ["-m", "undiffuse", "sample", str(file), "-n", "1", "-q", "--output-dir", out]
    least = Side("least", lambda: sum(_parts(file, bench.threads).values()))
    whole = Side("sample", _later(words, bench.threads))
    least.measure()
    yield above(paired(whole, least, bench.budget.cold))


def _parts(file: Path, threads: int) -> dict[str, float]:
    return fresh(["-m", "benchmarks.first_picture", str(file)], threads)


def above(pairs: Pairs) -> Result:
    """The difference, pair by pair."""
    more = [a - b for a, b in zip(pairs.ours, pairs.peer, strict=True)]
    low, high = interval(more)
    return Result(
        name="startup/first-image",
        how=f"`undiffuse sample -n 1` (DDPM's network, {SampleConfig().num_inference_steps} steps)"
        " against importing torch + reading the weights + as many evaluations at batch 1, each"
        f" timed alone; {len(more)} processes each",
        ours=statistics.median(pairs.ours),
        peer=statistics.median(pairs.peer),
        unit="s",
        ratio=statistics.median(more),
        spread=(low, high),
        width=(high - low) / statistics.median(pairs.ours),
        of="seconds above the least",
        target="<= 1",
        ours_s=pairs.ours,
        peer_s=pairs.peer,
    )


CASES = (
    Case("startup/help", help_text, quick=True),
    Case("startup/import", importing, quick=True),
    Case("startup/first-image", first_image, quick=True),
)

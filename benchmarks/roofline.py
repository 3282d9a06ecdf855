"""What the machine can do at best: matrix products and copies.

The fastest of several sizes, after a warm-up, with the threads of the other cases. Processors'
virtual cores may share one real core, so products are also timed with one thread.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch

from benchmarks.harness import Bench, Case, Result, seconds_of

SIZES = (1024, 2048, 4096)  # rows and columns; a GPU wants more
GPU_SIZES = (4096, 8192, 16384)
IN_MEMORY = 2**29  # bytes: beyond every cache
IN_CACHE = 2**18  # bytes: source and target inside a core's own cache
REPEATS = 7


@cache
def gemm(bench: Bench, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square product."""
    sizes = GPU_SIZES if bench.device.type == "cuda" else SIZES
    return max(_product(bench, n, dtype) for n in (sizes[1:2] if bench.quick else sizes))


def peak(bench: Bench) -> float:
    """FLOP/s in bfloat16 or float32, whichever is faster."""
    return max(gemm(bench, torch.float32), gemm(bench, torch.bfloat16))


def _product(bench: Bench, n: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
    return 2 * n**3 / _median(bench, lambda: torch.mm(a, b))


@cache
def bandwidth(bench: Bench) -> float:
    """Bytes per second of a copy in memory, read and written ones added."""
    return _copy(bench, IN_MEMORY)


def _copy(bench: Bench, size: int) -> float:
    source = torch.ones(size // 4, device=bench.device)
    target = torch.ones_like(source)  # ones, not empty: its pages are there before the clock runs
    return 2 * size / _median(bench, lambda: target.copy_(source))


def _median(bench: Bench, call: Callable[[], object]) -> float:
    repeats = max(1, round(0.02 / max(seconds_of(call, 3, bench.clock), 1e-9)))
    return statistics.median(seconds_of(call, repeats, bench.clock) for _ in range(REPEATS))


def results(bench: Bench) -> Iterator[Result]:
    """GEMM by precision and threads, copies in memory and in cache."""
    for threads in sorted({1, bench.threads}):
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            rate = _with_threads(threads, bench, dtype)
            yield _rate(f"roofline/gemm/{name}/{threads}-threads", rate / 1e9, "GFLOP/s", SIZES)
    yield _rate("roofline/copy/memory", bandwidth(bench) / 1e9, "GB/s", (IN_MEMORY,))
    yield _rate("roofline/copy/cache", _copy(bench, IN_CACHE) / 1e9, "GB/s", (IN_CACHE,))


def _with_threads(threads: int, bench: Bench, dtype: torch.dtype) -> float:
    torch.set_num_threads(threads)
    try:
        return gemm(bench, dtype) if threads == bench.threads else _product(bench, SIZES[1], dtype)
    finally:
        torch.set_num_threads(bench.threads)


def _rate(name: str, value: float, unit: str, sizes: Sequence[int]) -> Result:
    how = "the fastest of several sizes, each the median of seven timings after a warm-up"
    return Result(name, how, ours=value, unit=unit, more={"sizes": list(sizes)})


CASES = (Case("roofline", results),)

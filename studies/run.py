"""Measure the studies and draw their page: `python studies/run.py [s04 s07 ...] [--quick]`.

Two processes work side by side, each on one core. Whatever is finished is kept in `.cache`, so an
interrupted run goes on where it was.
"""

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the workers

import torch

from harness import QUICK, Lab, Scale, Study, Training, dump, machine, write_atomically
from page import write_page

HERE = Path(__file__).resolve().parent
WORKERS = 2


def all_studies() -> list[Study]:
    """Every module `sNN_*.py` beside this one."""
    return [study(name) for name in _names()]


def study(name: str) -> Study:
    """The study of one module."""
    return importlib.import_module(name).STUDY


def _names() -> list[str]:
    return sorted(file.stem for file in HERE.glob("s[0-9][0-9]_*.py"))


def main(words: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # workers are sent home either way
    chosen = [study(n) for n in _names() if not options.study or n[:3] in options.study]
    unknown = set(options.study) - {s.id for s in chosen}
    if unknown:
        print(f"there is no study {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    base = options.output or (Path(tempfile.mkdtemp(prefix="studies-")) if options.quick else None)
    results, docs, cache = _folders(base)
    scale = QUICK if options.quick else Scale()
    failed = [] if options.page else measure_all(chosen, cache, results, scale, options.workers)
    print(f"wrote {write_page(all_studies(), results, docs)}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="measure the studies and draw their page")
    parser.add_argument("study", nargs="*", help="s01 … s18 (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny, only to see that it runs")
    parser.add_argument("--page", action="store_true", help="only draw the page again")
    parser.add_argument("--output", type=Path, help="a folder for everything that is written")
    parser.add_argument("--workers", type=int, default=WORKERS, help="0: in this process")
    return parser


def _folders(base: Path | None) -> tuple[Path, Path, Path]:
    """Results, docs and cache: the repository's own, or all under one folder."""
    if base is None:
        return HERE / "results", HERE.parent / "docs", HERE / ".cache"
    return base / "results", base / "docs", base / "cache"


# --- measuring ----------------------------------------------------------------------------------


def measure_all(
    studies: Sequence[Study], cache: Path, results: Path, scale: Scale, workers: int
) -> list[str]:
    """Train, then measure; returns the ids of studies and names of trainings that failed."""
    results.mkdir(parents=True, exist_ok=True)
    lab = Lab(cache, scale)
    trainings = {t.key: t for one in studies for t in one.trainings(lab)}
    missing = [t for t in trainings.values() if not (cache / f"{t.key}.json").exists()]
    print(f"{len(trainings)} trainings, {len(missing)} to do; {len(studies)} studies", flush=True)
    jobs = [(t.name, train_one, (cache, scale, t)) for t in missing]
    failed = _run(jobs, workers)
    ids = [(s.id, measure_one, (cache, results, scale, s.id)) for s in studies]
    return failed + _run(ids, workers)


Job = tuple[str, Callable[..., None], tuple[object, ...]]


def _run(jobs: Sequence[Job], workers: int) -> list[str]:
    """Run all jobs, tell about each, and return the names of those that failed."""
    if workers == 0:
        for _, function, arguments in jobs:
            function(*arguments)
        return []
    failed: list[str] = []
    began = time.monotonic()
    for done, (name, future) in enumerate(_finished(jobs, workers), 1):
        error = future.exception()
        if error is not None:
            traceback.print_exception(error)
            failed.append(name)
        state = "failed" if error else "done"
        elapsed = time.monotonic() - began
        print(f"{done}/{len(jobs)} {name}: {state} after {elapsed:.0f} s", flush=True)
    return failed


def _finished(jobs: Sequence[Job], workers: int) -> Iterator[tuple[str, Future[None]]]:
    # spawn, not fork: torch's threads do not survive a fork
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        names = {pool.submit(function, *args): name for name, function, args in jobs}
        try:
            for future in as_completed(names):
                yield names[future], future
        finally:
            pool.shutdown(cancel_futures=True)


def train_one(cache: Path, scale: Scale, training: Training) -> None:
    """One training, in a worker."""
    Lab(cache, scale).history(training)


def measure_one(cache: Path, results: Path, scale: Scale, id_: str) -> None:
    """One study's numbers, in a worker."""
    (name,) = (n for n in _names() if n[:3] == id_)
    numbers = study(name).measure(Lab(cache, scale))
    kept = {"study": id_, "machine": machine(), "numbers": numbers}
    write_atomically(results / f"{id_}.json", dump(kept))


if __name__ == "__main__":
    sys.exit(main())

"""Measure: `python -m benchmarks.run [--quick] [--only NAME ...] [--peer-path DIR ...]`.

One JSON line per result on stdout; what is being done, on stderr. In full, the lines are appended
to benchmarks/results/<machine>.jsonl. Compiled code and the peers' fastest forms are kept in
~/.cache/undiffuse/benchmarks. Exit code 1: two sides that should be equal were not.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import (
    cases_data,
    cases_forward,
    cases_memory,
    cases_sample,
    cases_startup,
    cases_train,
    roofline,
    scaling,
)
from benchmarks.harness import (
    FULL,
    QUICK,
    Bench,
    Case,
    NotEqual,
    Numbers,
    Result,
    commit,
    load,
    machine,
    machine_kind,
    versions,
)

HERE = Path(__file__).resolve().parent
CASES: tuple[Case, ...] = (
    *roofline.CASES,
    *cases_forward.CASES,
    *cases_train.CASES,
    *cases_memory.CASES,
    *cases_sample.CASES,
    *cases_data.CASES,
    *cases_startup.CASES,
    *scaling.CASES,
)


def main(words: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(words)
    cases = chosen_cases(CASES, options.quick, options.only)
    if not cases:
        print(f"no case is called so; there are: {names()}", file=sys.stderr)
        return 2
    results = options.results or (None if options.quick else HERE / "results")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Dynamo detected a call")  # in diffusers; nothing to do here
    with tempfile.TemporaryDirectory(prefix="undiffuse-bench-") as scratch:
        bench = Bench(
            budget=QUICK if options.quick else FULL,
            threads=options.threads,
            scratch=Path(scratch),
            kept=_kept(),
            quick=options.quick,
            peer_paths=tuple(options.peer_path),
        )
        return measure(bench, cases, results)


def names() -> str:
    return ", ".join(case.name for case in CASES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="speed and memory against other projects"
    )
    parser.add_argument("--quick", action="store_true", help="the headline figures only")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"cases that begin so: {names()}"
    )
    parser.add_argument(
        "--peer-path",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a checkout of denoising-diffusion-pytorch or guided-diffusion, or a folder of them",
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="(default: benchmarks/results; quick: none)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N")
    return parser


def chosen_cases(cases: Sequence[Case], quick: bool, only: Sequence[str]) -> list[Case]:
    """By name; all, or the quick ones, where no name is given."""
    if only:
        return [case for case in cases if any(case.name.startswith(name) for name in only)]
    return [case for case in cases if case.quick or not quick]


def _kept() -> Path:
    """Where torch.compile keeps its code, too; compiling in one process leaves no others behind
    that would compute while something is timed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kept = Path(base) / "undiffuse" / "benchmarks"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept / "inductor"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return kept


# --- measuring ----------------------------------------------------------------------------------


def measure(bench: Bench, cases: Sequence[Case], results: Path | None) -> int:
    """Run the cases; print and keep every line."""
    known, revision, refused = versions(), commit(), 0
    for case in cases:
        began = time.monotonic()
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        before = load()
        for result in guarded(bench, case):
            line = result.line(machine(bench.threads, before), known, revision)
            tell(line, results)
            refused += int(result.refused)
            before = load()
        print(f"{case.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return 1 if refused else 0


def guarded(bench: Bench, case: Case) -> Iterator[Result]:
    """The case's results; where the sides are not equal, that instead of a number."""
    try:
        yield from case.run(bench)
    except NotEqual as error:
        yield Result(case.name, "refused", skipped=str(error), refused=True)


def tell(line: Numbers, results: Path | None) -> None:
    text = json.dumps(line, allow_nan=False)
    print(text, flush=True)
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        with (results / f"{machine_kind(line['machine'])}.jsonl").open("a", encoding="utf-8") as to:
            to.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())

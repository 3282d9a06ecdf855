"""Measure: `python -m quality.run [--quick] [--only NAME ...] [--seeds 0 1 2]`.

One JSON line per finding on stdout; what is being done, on stderr. In full, the lines are appended
to quality/results/<machine>.jsonl, trained networks are kept in ~/.cache/undiffuse/quality, and
what is finished is not done again. Exit code 1: something does not hold.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.harness import commit, load, machine, machine_kind, versions
from quality import ablation, bits, digits, fields, samplers
from quality.harness import Lab, Numbers, Task, finished, line, read

HERE = Path(__file__).resolve().parent
TASKS: tuple[Task, ...] = (
    *bits.TASKS,
    *digits.TASKS,
    *samplers.TASKS,
    *fields.TASKS,
    *ablation.TASKS,
)
QUICK: tuple[Task, ...] = (*bits.QUICK, *digits.QUICK)


def main(words: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(words)
    tasks = [one for one in (QUICK if options.quick else TASKS) if _named(one, options.only)]
    if not tasks:
        print(f"no task is called so; there are: {names()}", file=sys.stderr)
        return 2
    results = options.results or (None if options.quick else HERE / "results")
    lab = Lab(options.kept)
    return 1 if [one for one in measured(tasks, lab, options.seeds, results) if not one] else 0


def names() -> str:
    return ", ".join(task.name for task in TASKS)


def _named(task: Task, only: Sequence[str]) -> bool:
    return not only or any(task.name.startswith(name) for name in only)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m quality.run", description="what the networks reach, beside what is possible"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the headline figures for one seed, ten minutes"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"tasks that begin so: {names()}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="(default: the task's)")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="(default: quality/results; quick: none)"
    )
    parser.add_argument(
        "--kept", type=Path, default=_kept(), metavar="DIR", help="trained networks"
    )
    return parser


def _kept() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "undiffuse" / "quality"


def measured(
    tasks: Sequence[Task], lab: Lab, seeds: Sequence[int] | None, results: Path | None
) -> list[bool]:
    """Do what is not done yet; whether each finding that is held against something holds, whether
    found now or before."""
    about = machine(os.cpu_count() or 1, load())
    file = None if results is None else results / f"{machine_kind(about)}.jsonl"
    verdicts: list[bool] = []
    for task in tasks:
        for seed in task.seeds if seeds is None else seeds:
            before = [] if file is None else finished(read(file), task, seed)
            if before:
                print(f"{task.name} seed {seed}: done before", file=sys.stderr, flush=True)
            held = [one["holds"] for one in before] or _measured(task, lab, seed, file)
            verdicts += [one for one in held if one is not None]
    return verdicts


def _measured(task: Task, lab: Lab, seed: int, file: Path | None) -> list[bool | None]:
    """Run one task; its last line says that it came to its end."""
    print(f"{task.name} seed {seed} ...", file=sys.stderr, flush=True)
    before, began = load(), time.monotonic()
    found = list(task.run(lab, seed))
    seconds = round(time.monotonic() - began, 1)
    about: Numbers = {
        "machine": machine(os.cpu_count() or 1, before),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for place, one in enumerate(found, 1):
        tell(line(task, seed, one, {"last": place == len(found), **about}), file)
    print(f"{task.name} seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return [one.holds for one in found]


def tell(body: Numbers, file: Path | None) -> None:
    text = json.dumps(body, allow_nan=False)
    print(text, flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as to:
            to.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())

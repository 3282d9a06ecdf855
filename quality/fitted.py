"""Runs of the product that are trained once and kept."""

import json
from itertools import pairwise
from pathlib import Path

from undiffuse import runs
from undiffuse.checkpoint import Model


def fitted(run: Path, data: object, **settings: object) -> Model:
    """The model of `run`: trained now, or where it was stopped gone on with, or as it is there."""
    if (run / "model.safetensors").exists():
        return runs.load(run)
    resume = "latest" if (run / "checkpoints").exists() else None
    return runs.fit(data, output_dir=run, resume=resume, **settings)  # pyright: ignore[reportArgumentType] # settings by name


def seconds_of(run: Path) -> float:
    """Of training, over all the times that it was gone on with: the clock starts anew at each."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    clock = [json.loads(line)["time"] for line in text.splitlines()]
    return sum(now for now, then in pairwise((*clock, 0.0)) if then < now)


def threads_of(run: Path) -> int:
    """That the training was done with."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["environment"]["threads"]

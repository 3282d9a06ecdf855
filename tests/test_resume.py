"""Stop at any step, by any means, go on in another process: the same bits as without a stop.

Every stop and every resume happens in a process of its own. A child works through a list of jobs,
so that many cases share the start of an interpreter.
"""

# pyright: basic

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from undiffuse.checkpoint import Checkpoints, Loaded

STEPS = 8
EPOCH = 9  # pictures that are trained on: 10, one held out

# Trains each job's run from where it is to a stop or to the end; says what happens.
CHILD = """
import json, sys
from pathlib import Path
import torch
from undiffuse import recipes, runs
from undiffuse.config import RunConfig, override

torch.set_num_threads(1)
recipes.PRESETS["small"] = recipes.Preset(
    lambda channels: recipes.ddpm_family(8, (1, 2), 1, (1,), channels), 8, "for tests"
)
for job in json.load(sys.stdin):
    step, events = 0, []
    config = override(RunConfig(), job["settings"])
    if job["resume"]:
        config = runs.stored_config(Path(job["run"]))
    request = runs.Request(config, Path(job["run"]), resume=job["resume"])
    for event in runs.training_run(request, lambda: step >= job["stop"]):
        events.append(event)
        print(json.dumps({"event": type(event).__name__}), flush=True)
        if isinstance(event, runs.Planned):
            step = event.plan.first_step
        if isinstance(event, runs.Progress):
            step = event.report.step
    notes = [event.text for event in events if isinstance(event, runs.Note)]
    print(json.dumps({"last": type(events[-1]).__name__, "step": step, "notes": notes}))
"""
BASE: dict[str, Any] = {
    "preset": "small",
    "max_train_steps": STEPS,
    "train_batch_size": 3,
    "mixed_precision": "no",
    "num_samples": 1,
    "sample_every": 1000,
    "checkpointing_steps": 1000,
    "learning_rate": 5e-3,
    "ema_snapshots": 2,
}
ALL_AT_ONCE: dict[str, Any] = {
    "train_batch_size": 4,  # epochs of 9 pictures end inside batches
    "gradient_accumulation_steps": 3,
    "random_flip": True,
    "random_crop": True,
    "resolution": 8,
    "dropout": 0.3,
    "label_dropout": 0.5,
    "augment": 0.3,
    "mixed_precision": "bf16",
    "adam_weight_decay": 0.1,
    "seed": 2**63 - 1,
}
# by name: the settings, and the steps at which it is stopped, one process after the other
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    **{f"at step {n}": ({}, (n,)) for n in range(STEPS)},
    "again and again": ({}, (0, 1)),
    "inside an epoch": ({"train_batch_size": 4}, (1, 4)),
    "at epoch ends": ({}, (3, 6)),
    "accumulation": ({"gradient_accumulation_steps": 2, "train_batch_size": 5}, (3,)),
    "flips": ({"random_flip": True}, (5,)),
    "crops": ({"random_crop": True, "resolution": 8}, (2,)),
    "dropout": ({"dropout": 0.3}, (5,)),
    "label dropout": ({"label_dropout": 0.5}, (2,)),
    "augmentation": ({"augment": 0.5}, (5,)),
    "bf16": ({"mixed_precision": "bf16"}, (5,)),
    "weight decay": ({"adam_weight_decay": 0.1}, (2,)),
    "min-SNR on a table": (
        {"prediction_type": "epsilon", "beta_schedule": "linear", "snr_gamma": 5.0},
        (5,),
    ),
    "checkpoints and previews between": ({"checkpointing_steps": 2, "sample_every": 3}, (3, 5)),
    "everything": (ALL_AT_ONCE, (1, 6)),
}

Job = dict[str, Any]


def arguments(*words: str) -> list[str]:
    return [sys.executable, *words]


def quiet_environment() -> dict[str, str]:
    source = str(Path(__file__).parent.parent / "src")
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}


def work(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """One process that does these jobs; how each of them ended."""
    child = subprocess.run(
        arguments("-c", CHILD),
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=quiet_environment(),
        check=False,
    )
    assert child.returncode == 0, child.stderr
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    return [line for line in lines if "last" in line]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of 8x8 in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((8, 8)).save(path)
    return folder


def settings_of(name: str, data: Path) -> dict[str, Any]:
    return {**BASE, "data": str(data), **CASES[name][0]}


def job(run: Path, settings: Mapping[str, Any], stop: int, resume: str | None) -> Job:
    return {"run": str(run), "settings": dict(settings), "stop": stop, "resume": resume}


def loaded(run: Path, step: int = STEPS) -> Loaded:
    return Checkpoints(run / "checkpoints").read(step)[0]


def differing(one: Loaded, other: Loaded) -> list[str]:
    """The names of tensors that are not the same bits."""
    first, second = (
        {
            f"{group}/{name}": tensor
            for group, part in each.tensors.items()
            for name, tensor in part.items()
        }
        for each in (one, other)
    )
    assert first.keys() == second.keys()
    return [name for name in first if not same_bits(first[name], second[name])]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


Runs = dict[str, Path]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> tuple[Runs, Runs]:
    """Every case's run without a stop (cases with equal settings share one), and stopped at its
    steps; each part of a stopped one in a fresh process."""
    root = tmp_path_factory.mktemp("runs")
    by_settings: dict[str, Job] = {}
    straight, stopped = {}, {name: root / f"stopped-{n}" for n, name in enumerate(CASES)}
    for number, name in enumerate(CASES):
        settings = settings_of(name, pictures)
        one = job(root / f"straight-{number}", settings, STEPS, None)
        straight[name] = Path(by_settings.setdefault(json.dumps(settings), one)["run"])
    carry_out(list(by_settings.values()))
    for part in range(1 + max(len(stops) for _, stops in CASES.values())):
        carry_out(
            [
                job(
                    stopped[name],
                    settings_of(name, pictures),
                    (*stops, STEPS)[part],
                    "latest" if part else None,
                )
                for name, (_, stops) in CASES.items()
                if part <= len(stops)
            ]
        )
    return straight, stopped


def carry_out(jobs: Sequence[Job]) -> None:
    """In one process; each must end at its stop, on what it calls an unchanged machine."""
    for one, end in zip(jobs, work(jobs), strict=True):
        wanted = "Finished" if one["stop"] == STEPS else "Stopped"
        assert (one["run"], end["last"], end["step"]) == (one["run"], wanted, one["stop"])
        assert not any("not bit for bit" in note for note in end["notes"]), end["notes"]


@pytest.fixture(scope="module")
def straight(both: tuple[Runs, Runs]) -> Runs:
    return both[0]


@pytest.fixture(scope="module")
def stopped(both: tuple[Runs, Runs]) -> Runs:
    return both[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(
    name: str, straight: dict[str, Path], stopped: dict[str, Path]
) -> None:
    one, other = loaded(straight[name]), loaded(stopped[name])
    assert differing(one, other) == []
    assert one.state["counters"] == other.state["counters"]
    files = [run / "model.safetensors" for run in (straight[name], stopped[name])]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert other.tensors["ema_second"].keys() == other.tensors["ema"].keys()
    averages = [
        {path.name: path.read_bytes() for path in (run / "ema").iterdir()}
        for run in (straight[name], stopped[name])
    ]
    assert len(averages[0]) == 4  # two averages, half way and at the end
    assert averages[0] == averages[1]


@pytest.mark.slow
def test_the_cases_are_different_runs(straight: dict[str, Path]) -> None:
    """Otherwise an option that does nothing would pass the test above."""
    runs = {str(run): loaded(run) for name, run in straight.items() if "previews" not in name}
    ends = {name: run.tensors["model"]["layers.00_conv.weight"] for name, run in runs.items()}
    assert len({tensor.numpy().tobytes() for tensor in ends.values()}) == len(runs)
    optim = next(iter(runs.values())).tensors["optim"]
    assert all(float(optim[name]) == STEPS for name in optim if name.endswith("/step"))


@pytest.mark.slow
def test_checkpoints_and_previews_do_not_touch_the_weights(straight: dict[str, Path]) -> None:
    """F20: saving, drawing and measuring draw from streams of their own."""
    busy, plain = straight["checkpoints and previews between"], straight["at step 0"]
    assert (busy / "samples" / "step_00000003.png").exists()
    assert not (plain / "samples" / "step_00000003.png").exists()
    assert differing(loaded(busy), loaded(plain)) == []


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, pictures: Path, straight: dict[str, Path]
) -> None:
    """F1: SIGKILL between two events, twice; every step is saved."""
    run, chance = tmp_path / "run", np.random.default_rng(0)
    settings = {**BASE, "data": str(pictures), "checkpointing_steps": 1}
    for events in (7, 8):  # until the kill, counted from the start of each process
        before = max(Checkpoints(run / "checkpoints").steps(), default=0)
        resume = "latest" if before else None
        kill_after(job(run, settings, STEPS, resume), events, float(chance.uniform(0, 0.05)))
        assert before <= max(Checkpoints(run / "checkpoints").steps()) <= STEPS
    (end,) = work([job(run, settings, STEPS, "latest")])
    assert end["last"] == "Finished"
    assert differing(loaded(run), loaded(straight["at step 0"])) == []
    assert not list((run / "checkpoints").glob(".tmp-*"))


def kill_after(one: Job, events: int, delay: float) -> None:
    child = subprocess.Popen(
        arguments("-c", CHILD),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet_environment(),
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(json.dumps([one]))
        child.stdin.close()
        seen = [child.stdout.readline() for _ in range(events)]
        assert all(seen), child.stderr.read()
        time.sleep(delay)
        child.kill()


# --- the command line ---------------------------------------------------------------------------

CLI_STEPS = 30
CLI_SETTINGS: dict[str, Any] = {
    "preset": "tiny",
    "max_train_steps": CLI_STEPS,
    "train_batch_size": 4,
    "checkpointing_steps": 3,
    "num_samples": 1,
    "dropout": 0.1,
    "mixed_precision": "no",
}


def command(*words: str) -> list[str]:
    return arguments("-m", "undiffuse", "train", *words)


def first_words(data: Path, run: Path) -> list[str]:
    options = {f"--{name.replace('_', '-')}": str(v) for name, v in CLI_SETTINGS.items()}
    flat = [word for pair in options.items() for word in pair]
    return command(str(data), "--output-dir", str(run), *flat)


def resume_words(run: Path) -> list[str]:
    return command("--resume-from-checkpoint", "latest", "--output-dir", str(run))


def signalled(words: Sequence[str], run: Path, after: int, number: int) -> tuple[int, str, str]:
    """Start a command, send it a signal once a checkpoint of `after` or later is there."""
    child = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet_environment(),
    )
    with child:
        wait_until(lambda: child.poll() is not None or newest(run) >= after)
        child.send_signal(number)
        out, err = child.communicate()
    return child.returncode, out, err


def newest(run: Path) -> int:
    return max(Checkpoints(run / "checkpoints").steps(), default=0)


def wait_until(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(0.01)


@pytest.mark.slow
def test_signals_stop_the_command_and_it_goes_on_bit_for_bit(
    tmp_path: Path, pictures: Path
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    work([job(straight, {**CLI_SETTINGS, "data": str(pictures)}, CLI_STEPS, None)])
    again = f"undiffuse train --resume-from-checkpoint latest --output-dir {run.as_posix()}"
    steps = [0]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        words = resume_words(run) if steps[-1] else first_words(pictures, run)
        ended, out, err = signalled(words, run, steps[-1] + 3, number)
        assert ended == code, err
        if number != signal.SIGKILL:
            assert f"Stopped at step {newest(run)}, saved. Go on: {again}" in out
            assert "Traceback" not in err
        steps.append(newest(run))
    assert all(one < other for one, other in pairwise([*steps, CLI_STEPS])), steps
    done = subprocess.run(
        resume_words(run), check=False, env=quiet_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert differing(loaded(run, CLI_STEPS), loaded(straight, CLI_STEPS)) == []
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]

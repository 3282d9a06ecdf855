"""A training run as a stream of events. The caller prints; this module never does."""

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from undiffuse import images, kernels, runtime
from undiffuse.checkpoint import Averages, Checkpoints, Model, RunLock, Snapshot, save_model
from undiffuse.config import RunConfig, Tracker, flatten, override
from undiffuse.errors import ConfigError, ResourceError
from undiffuse.runs._averages import lengths_of, snapshot_steps
from undiffuse.runs._folder import (
    RunFolder,
    append_line,
    rewind_metrics,
    save_config,
    stored_config,
    write_json,
    write_text,
)
from undiffuse.runs._generate import generate
from undiffuse.runs._load import load
from undiffuse.runs._plan import (
    Plan,
    Request,
    counters_of,
    environment,
    gather,
    make_plan,
    names_of,
    source_of,
)
from undiffuse.training import StepReport, TrainState, held_out_loss, train
from undiffuse.unet import UNet

LOG_EVERY = 10  # steps per line of metrics.jsonl; reading a loss makes a GPU wait
HELD_OUT_MOST = 512  # held-out pictures in the loss that is taken while training
PREVIEW_STEPS = 15
IN_PYTHON = "(given in Python)"  # config.json's word for data that no path names


@dataclass(frozen=True)
class Planned:
    """Everything is settled; after this (unless it is a dry run) the first file is written."""

    plan: Plan


@dataclass(frozen=True)
class Doing:
    """Something that may take a while has begun."""

    text: str


@dataclass(frozen=True)
class Note:
    """Something the user should read once."""

    text: str


@dataclass(frozen=True)
class Progress:
    """One update is done."""

    report: StepReport


@dataclass(frozen=True)
class Validated:
    """A sample grid was written and the held-out loss taken."""

    step: int
    loss: float | None
    grid: Path


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk, whole."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopped:
    """Stopped on request before the end; everything is saved."""

    step: int
    run: Path


@dataclass(frozen=True)
class Finished:
    """The run is complete and its model file written."""

    step: int
    model: Path
    seconds: float
    images_per_second: float
    loss: float | None
    held_out: float | None


Event = Doing | Planned | Note | Progress | Validated | Saved | Stopped | Finished
Stop = Callable[[], bool]


def fit(
    data: object = "digits",
    *,
    output_dir: str | Path | None = None,
    resume: str | int | None = None,
    on_event: Callable[[Event], object] = lambda event: None,
    **settings: object,
) -> Model:
    """Train a generator and return it: the short road.

    Args:
        data: a folder, an .npz file, "digits", "photos", a tensor (n, c, h, w) in [-1, 1], or an
            uint8 array.
        output_dir: the run folder, with checkpoints, samples and logs. None keeps nothing.
        resume: "latest" or a step: go on with the run in output_dir, with its own settings but
            for those given here.
        on_event: called with every event of the run; `print` shows what happens.
        settings: any option of `undiffuse train`, with underscores: resolution=64,
            max_train_steps=2000, train_batch_size=32, seed=1 ...

    Raises:
        ConfigError, DataError, ResourceError, DivergedError: with what to do in the message.
    """
    named = isinstance(data, str | Path)
    with tempfile.TemporaryDirectory(prefix="undiffuse-") as folder:
        run = Path(folder) / "run" if output_dir is None else Path(output_dir)
        before = RunConfig() if resume is None else stored_config(run)
        if output_dir is None:  # nobody could go back to them
            settings = {"ema_snapshots": 0, **settings}
        config = override(before, {**settings, "data": str(data) if named else IN_PYTHON})
        step = None if resume is None else str(resume)
        for event in training_run(Request(config, run, None if named else data, step)):
            on_event(event)
        return load(run)


def _name_of(request: Request) -> str:
    return request.config.data.data if request.data is None else "pictures"


def training_run(request: Request, stop: Stop = lambda: False) -> Iterator[Event]:
    """Run a training from plan to model file, or to a saved stop.

    Raises:
        UndiffuseError: before the first file is written, for everything that can be known then.
    """
    _check_tracker(request.config)
    with _memory_advice(request.config):
        yield Doing(f"reading {_name_of(request)} ...")
        gathered = gather(request)
        yield Doing("timing a step ...")
        plan = make_plan(gathered)
        yield Planned(plan)
        yield from (Note(text) for text in plan.notes)
        if request.dry_run:
            return
        plan.folder.create()
        with RunLock(plan.request.run):
            yield from _Run(plan).events(stop)


@contextmanager
def _memory_advice(config: RunConfig) -> Generator[None]:
    """Turn running out of memory into advice; everything else passes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        size, parts = config.train.train_batch_size, config.train.parts
        raise ResourceError(
            f"out of memory at train_batch_size {size}; try"
            f" --gradient-accumulation-steps {min(2 * parts, size)} (same gradient, less memory)"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator" in str(error)  # the CPU has no exception type of its own
    )


@dataclass
class _Run:
    """The moving parts of one run."""

    plan: Plan
    state: TrainState = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    averages: Averages = field(init=False)
    run_id: str = field(init=False)
    losses: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    began: float = field(default_factory=time.monotonic)
    last_loss: float | None = None
    last_held_out: float | None = None

    def __post_init__(self) -> None:
        plan = self.plan
        self.state = TrainState(
            plan.net,
            plan.denoiser,
            plan.config.train,
            lambda net: runtime.callable_net(_unet(net), plan.runtime.path, plan.recompute),
            kernels if runtime.updates_by_kernels(plan.runtime.device) else None,
        )
        log = plan.config.log
        self.checkpoints = Checkpoints(plan.folder.checkpoints, log.checkpoints_total_limit)
        self.averages = Averages(plan.folder.averages)
        self.run_id = uuid.uuid4().hex
        if plan.resumed is not None:
            self.state.restore(plan.resumed.tensors, counters_of(plan.resumed))
            self.run_id = plan.resumed.run_id

    def events(self, stop: Stop) -> Iterator[Event]:
        self._write_start()
        tracker = _tracker(self.plan)
        plan, config = self.plan, self.plan.config
        source = source_of(plan.data.train, config.train.seed)
        for report in train(self.state, source, plan.recipe, config.train, stop):
            self.losses.append(report.loss)
            yield Progress(report)
            yield from self._after_step(report, tracker)
        yield from self._end()

    def _after_step(self, report: StepReport, tracker: "Track") -> Iterator[Event]:
        log, step = self.plan.config.log, report.step
        last = step == self.plan.config.train.max_train_steps
        record: dict[str, Any] = {}
        # First of all: what goes on from a checkpoint of this step will not come here again.
        if step in snapshot_steps(self.plan.config):
            yield from self._try_keep()
        if step % log.checkpointing_steps == 0 and not last:
            yield from self._try_save()
        if step % log.sample_every == 0 or last:
            validated = self._validate(record)
            yield validated
        if step % LOG_EVERY == 0 or record:
            self._log(report, record, tracker)

    def _end(self) -> Iterator[Event]:
        state, plan = self.state, self.plan
        yield Saved(state.step, self.checkpoints.save(self._snapshot()))
        if state.step < plan.config.train.max_train_steps:
            yield Stopped(state.step, plan.request.run)
            return
        save_model(plan.folder.model, self.model())
        done = state.step - plan.first_step
        seconds = time.monotonic() - self.began
        yield Finished(
            step=state.step,
            model=plan.folder.model,
            seconds=seconds,
            images_per_second=done * plan.config.train.train_batch_size / max(seconds, 1e-9),
            loss=self.last_loss,
            held_out=self.last_held_out,
        )

    def _try_save(self) -> Iterator[Event]:
        """Between steps a full disk costs one checkpoint, not the run."""
        try:
            yield Saved(self.state.step, self.checkpoints.save(self._snapshot()))
        except ResourceError as error:
            append_line(self.plan.folder.log, str(error))
            yield Note(f"checkpoint of step {self.state.step} not written: {error}")

    def _try_keep(self) -> Iterator[Event]:
        """The averages, each as a model file; a full disk costs them, not the run."""
        state, train = self.state, self.plan.config.train
        try:
            self._check_room()
            self.averages.save(self.model())
            if train.second_length is not None:
                self.averages.save(self._model(state.ema, train.second_length), state.second)
        except ResourceError as error:
            append_line(self.plan.folder.log, str(error))
            yield Note(f"averages of step {state.step} not kept: {error}")

    def _check_room(self) -> None:
        """Beside the averages a checkpoint must still fit: a run goes on from that."""
        tensors = self.state.tensors()
        one = sum(tensor.nbytes for tensor in tensors["ema"].values())
        need, spare = len(lengths_of(self.plan.config)) * one, self.checkpoints.spare(tensors)
        if need > spare:
            raise ResourceError(
                f"they need {need / 1e6:,.1f} MB, and the disk has {max(0, spare) / 1e6:,.1f} MB"
                " beside the next checkpoint; free some, or train with --ema-snapshots 0"
            )

    def _validate(self, record: dict[str, Any]) -> Validated:
        plan, step = self.plan, self.state.step
        x0, label = plan.data.held_out.fixed(HELD_OUT_MOST)
        config = plan.config.train
        bins = held_out_loss(
            self.state.averaged,
            plan.recipe,
            x0,
            label,
            config.seed,
            batch_size=config.part_size,
            device=self.state.device,
        )
        self.last_held_out = sum(bins) / len(bins)
        record["val_loss"] = _finite(self.last_held_out)
        record["loss_by_t"] = [_finite(one) for one in bins]
        pictures = generate(
            self.model(),
            plan.config.log.num_samples,
            seed=config.seed,
            num_inference_steps=PREVIEW_STEPS,
            batch_size=config.part_size,
            mixed_precision=plan.runtime.precision,
        )
        grid = plan.folder.samples / f"step_{step:08d}.png"
        images.save_grid(pictures, grid)
        return Validated(step, self.last_held_out, grid)

    def _log(self, report: StepReport, record: dict[str, Any], tracker: "Track") -> None:
        self.last_loss = float(torch.stack(self.losses).mean())
        done = (report.step - self.plan.first_step) * self.plan.config.train.train_batch_size
        elapsed = time.monotonic() - self.began
        line: dict[str, Any] = {
            "step": report.step,
            "time": round(elapsed, 3),
            "loss": _finite(self.last_loss),
            "lr": report.learning_rate,
            "grad_norm": _finite(float(report.grad_norm)),
            "skipped": int(report.skipped),
            "images_per_second": round(done / max(elapsed, 1e-9), 1),
            **record,
        }
        self.losses.clear()
        append_line(self.plan.folder.metrics, json.dumps(line))
        tracker(line)

    def model(self) -> Model:
        """The averaged weights as a finished model."""
        return self._model(self.state.ema, self.plan.config.train.ema_length)

    def _model(self, net: nn.Module, ema_length: float) -> Model:
        plan, step = self.plan, self.state.step
        trained = {
            "steps": step,
            "images_seen": step * plan.config.train.train_batch_size,
            "ema_length": ema_length,
            "seed": plan.config.train.seed,
            "data": plan.data.source,
            "data_fingerprint": plan.data.fingerprint,
            "attribution": plan.data.attribution,
            **plan.guidance,
        }
        return Model(replace(plan.denoiser, net=net), plan.pictures, trained)

    def _snapshot(self) -> Snapshot:
        state = {
            "counters": self.state.counters(),
            "config": flatten(self.plan.config),
            "bf16": self.plan.runtime.bf16,
            "data_fingerprint": self.plan.data.fingerprint,
            "environment": environment(),
        }
        tensors = self.state.tensors()
        return Snapshot(self.state.step, tensors, self.model(), state, self.run_id)

    def _write_start(self) -> None:
        plan, folder = self.plan, self.plan.folder
        self.checkpoints.clean()
        self.checkpoints.rewind(plan.first_step)
        self.averages.set_aside(plan.first_step)
        if plan.first_step < plan.config.train.max_train_steps:
            folder.set_aside(plan.first_step)
        save_config(folder, plan.config)
        write_json(folder.info, _info(plan, self.run_id))
        write_json(folder.path / "data.json", {"names": names_of(plan.data)})
        images.save_cache(plan.data, folder.cache)
        if plan.data.skipped:
            lines = (f"{one.name}\t{one.reason}\n" for one in plan.data.skipped)
            write_text(folder.path / "skipped.txt", "".join(lines))
        rewind_metrics(folder.metrics, plan.first_step)
        for text in plan.notes:
            append_line(folder.log, text)


def _unet(net: nn.Module) -> UNet:
    assert isinstance(net, UNet)  # the plan's own, or the average's copy of it
    return net


def _info(plan: Plan, run_id: str) -> dict[str, Any]:
    train, held_out = plan.data.train, plan.data.held_out
    return {
        "run_id": run_id,
        "data": plan.data.source,
        "train_images": len(train),
        "held_out_images": len(held_out),
        "parameters": sum(p.numel() for p in plan.net.parameters()),
        "device": str(plan.runtime.device),
        "precision": plan.runtime.precision.value,
        "path": plan.runtime.path.value,
        "precision_reason": plan.runtime.reason,
        "environment": environment(),
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


Track = Callable[[dict[str, Any]], None]


def _tracker(plan: Plan) -> Track:
    if plan.config.log.report_to is Tracker.NONE:
        return lambda line: None
    return _tensorboard(plan.folder)


def _check_tracker(config: RunConfig) -> None:
    if config.log.report_to is Tracker.TENSORBOARD and find_spec("tensorboard") is None:
        raise ConfigError(
            'report_to tensorboard needs an extra: pip install "undiffuse[tensorboard]"'
        )


def _tensorboard(folder: RunFolder) -> Track:
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(folder.path / "tensorboard"))

    def track(line: dict[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, line["step"])
        writer.flush()

    return track

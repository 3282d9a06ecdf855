"""`train` and `demo`: a run's events, told as they happen."""

import json
import re
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from undiffuse import __version__, cost, images, runs
from undiffuse.cli._figures import print_figures
from undiffuse.cli._output import Bar, Output, duration
from undiffuse.cli._parser import Arguments
from undiffuse.config import RunConfig, override
from undiffuse.errors import ConfigError, UndiffuseError
from undiffuse.training import StepReport

# The demo's recipe was chosen on the training digits' own validation part: see docs/decisions.md.
DEMO: dict[str, dict[str, object]] = {
    "digits": {"max_train_steps": 1100, "learning_rate": 2e-3, "p_mean": -0.6},
    "photos": {"max_train_steps": 300, "train_batch_size": 32, "random_flip": True},
}
FINAL_IMAGES = 64
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Turns the first signal into a polite question between steps, a second into the end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.saved_step: int | None = None
        self.running = False

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return 130 if self.signal in (None, signal.SIGINT) else 143

    @contextmanager
    def listening(self) -> Generator[None]:
        """Install the handlers; put the old ones back at the end."""
        before = {one: signal.signal(one, self._handle) for one in SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.running:
            raise KeyboardInterrupt
        if self.signal is not None:
            self._leave_now()
        self.signal = number
        sys.stderr.write("\nstopping after this step; once more to stop without saving\n")

    def _leave_now(self) -> None:
        import os

        last = "none" if self.saved_step is None else f"step {self.saved_step}"
        os.write(2, f"undiffuse: not saved; last checkpoint: {last}\n".encode())
        os._exit(self.exit_code)


def train(arguments: Arguments, out: Output) -> int:
    """`undiffuse train`."""
    request = _request(arguments)
    return run_training(request, out, "train", lambda finished: 0)


def demo(arguments: Arguments, out: Output) -> int:
    """`undiffuse demo`: train, sample, evaluate, report."""
    began = time.monotonic()
    data = str(arguments.given.get("data", "digits"))
    if data not in DEMO:
        raise ConfigError(f"data must be one of {', '.join(DEMO)} in the demo; got {data!r}")
    default = "runs/demo" if data == "digits" else f"runs/demo-{data}"
    run = Path(arguments.given.get("output_dir", default))
    settings = {"data": data, **DEMO[data], **arguments.settings(type(RunConfig().train))}
    request = _demo_request(run, override(RunConfig(), settings))

    def after(finished: runs.Finished) -> int:
        body = evaluate(run, runs.EvaluateOptions(), out).body
        page = runs.write_report(run)
        print_figures(body, out)
        _say_done(run, page, time.monotonic() - began, out)
        out.result(
            "demo",
            run_dir=run.as_posix(),
            seconds=round(time.monotonic() - began, 1),
            figures=body["figures"],
            report=page.as_posix(),
        )
        return 0

    return run_training(request, out, "demo", after)


def _demo_request(run: Path, config: RunConfig) -> runs.Request:
    """A second demo goes on with an interrupted one; a finished one is made anew elsewhere."""
    if not (run / "config.json").exists():
        return runs.Request(config, run)
    stored = runs.stored_config(run)
    return runs.Request(stored, run, resume="latest")


def run_training(
    request: runs.Request, out: Output, command: str, after: Callable[[runs.Finished], int]
) -> int:
    """Tell the events of a run; `after` is called with the finished run."""
    stop, teller = Stop(), _Teller(request, out)
    with stop.listening():
        try:
            for event in runs.training_run(request, stop):
                stop.running = True
                if isinstance(event, runs.Saved):
                    stop.saved_step = event.step
                teller.hear(event)
        except UndiffuseError:
            teller.close()
            raise
        except Exception:
            teller.close()
            _keep_crash(request.run)
            raise
        stop.running = False
    teller.close()
    last = teller.last
    if isinstance(last, runs.Stopped):
        return _say_stopped(last, stop, out, command)
    if isinstance(last, runs.Finished):
        _final_samples(request.run, last, out)
        if command == "train":
            _train_result(request.run, last, teller, out)
        return after(last)
    return _dry_result(teller, out, command)


def _keep_crash(run: Path) -> None:
    import traceback

    if run.is_dir():
        (run / "crash.txt").write_text(traceback.format_exc(), encoding="utf-8")


class _Teller:
    """Prints events; remembers the plan and the last one."""

    def __init__(self, request: runs.Request, out: Output) -> None:
        self.request, self.out = request, out
        self.plan: runs.Plan | None = None
        self.last: runs.Event | None = None
        self.bar: Bar | None = None
        self.reports = 0

    def hear(self, event: runs.Event) -> None:
        self.last = event
        match event:
            case runs.Planned(plan):
                self.plan = plan
                self._introduce(plan)
            case runs.Note(text):
                self.out.warn(text)
            case runs.Progress(report):
                self._progress(report)
            case runs.Validated(step, loss, grid):
                if self.bar is not None and loss is not None:
                    self.bar.show(val=f"{loss:.4f}")
                    self.bar.write(f"step {step}: held-out loss {loss:.4f}, samples {grid}")
            case _:
                pass

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _progress(self, report: StepReport) -> None:
        assert self.plan is not None
        if self.bar is None:
            total = self.plan.config.train.max_train_steps
            self.bar = Bar(self.out, total, "train", report.step - 1)
        self.reports += 1
        facts = {"loss": f"{float(report.loss):.4f}"} if self.reports % 20 == 1 else {}
        self.bar.advance(**facts)

    def _introduce(self, plan: runs.Plan) -> None:
        import torch

        tell, train, held_out = self.out.tell, plan.data.train, plan.data.held_out
        threads = torch.get_num_threads()
        tell(
            f"undiffuse {__version__} · torch {torch.__version__} · {threads} threads"
            f" · seed {plan.config.train.seed} · run: {self.request.run}"
        )
        size = f"{train.size[1]}x{train.size[0]}x{train.channels}"
        classes = f", {len(train.class_names)} classes" if train.labels is not None else ""
        tell(
            f"data: {plan.data.source}: {len(train):,} pictures of {size} for training,"
            f" {len(held_out):,} held out{classes}"
        )
        tell(
            f"network: {plan.config.model.preset}, {cost.total_parameters(plan.spec):,} parameters,"
            f" {plan.config.model.prediction_type.value} prediction"
        )
        tell(f"computing on {plan.runtime.device} in {_precision(plan)}: {plan.runtime.reason}")
        start = f" from step {plan.first_step}" if plan.first_step else ""
        tell(
            f"about {duration(plan.seconds)} for {plan.config.train.max_train_steps:,} steps of"
            f" {plan.config.train.train_batch_size} pictures{start}"
        )
        _say_padding(plan, tell)


def _precision(plan: runs.Plan) -> str:
    return "bf16" if plan.runtime.bf16 else "float32"


def _say_padding(plan: runs.Plan, tell: Callable[[str], None]) -> None:
    stride, (height, width) = plan.spec.stride, plan.data.train.size
    if height % stride or width % stride:
        padded = f"{height + -height % stride}x{width + -width % stride}"
        tell(f"{height}x{width} does not divide by {stride}: padded to {padded} inside, cropped")


def _say_stopped(stopped: runs.Stopped, stop: Stop, out: Output, command: str) -> int:
    run = stopped.run.as_posix()
    again = f"undiffuse train --resume-from-checkpoint latest --output-dir {run}"
    out.say(f"Stopped at step {stopped.step}, saved. Go on: {again}")
    out.result(command, "interrupted", run_dir=run, step=stopped.step, resume=again)
    return stop.exit_code


def _final_samples(run: Path, finished: runs.Finished, out: Output) -> None:
    out.tell("sampling ...")
    model = runs.load(run)
    pictures = runs.generate(model, FINAL_IMAGES, seed=0)
    images.save_grid(pictures, run / "samples" / "final.png")
    images.save_film(runs.film(model, 8), run / "samples" / "film.webp")


def _train_result(run: Path, finished: runs.Finished, teller: _Teller, out: Output) -> None:
    out.say(
        f"Done: {finished.step:,} steps in {duration(finished.seconds)}"
        f" ({finished.images_per_second:,.0f} pictures per second)."
    )
    out.say(f"  samples  {run / 'samples' / 'final.png'}")
    out.say(f"  model    {finished.model}")
    out.say("Next:")
    out.say(f"  undiffuse sample {run} -n 64 --seed 1")
    out.say(f"  undiffuse evaluate {run}")
    out.say(f"  undiffuse report {run}")
    out.result(
        "train",
        run_dir=run.as_posix(),
        step=finished.step,
        seconds=round(finished.seconds, 3),
        images_per_second=round(finished.images_per_second, 1),
        loss={"train": finished.loss, "held_out": finished.held_out},
        artifacts={
            "model": finished.model.as_posix(),
            "samples": (run / "samples" / "final.png").as_posix(),
            "metrics": (run / "metrics.jsonl").as_posix(),
        },
    )


def _dry_result(teller: _Teller, out: Output, command: str) -> int:
    assert teller.plan is not None
    plan = teller.plan
    out.say("Dry run: nothing was written.")
    out.result(
        command,
        "dry_run",
        parameters=cost.total_parameters(plan.spec),
        preset=plan.config.model.preset,
        train_images=len(plan.data.train),
        held_out_images=len(plan.data.held_out),
        seconds=round(plan.seconds, 1),
    )
    return 0


def _say_done(run: Path, page: Path, seconds: float, out: Output) -> None:
    out.say(f"\nDone in {duration(seconds)}.")
    out.say(f"  report   {page}     (open in a browser; works offline)")
    out.say(f"  samples  {run / 'samples' / 'final.png'}")
    out.say(f"  model    {run / 'model.safetensors'}")
    out.say("Next:")
    for line, _ in runs.next_commands(run):
        out.say(f"  {line}")


def evaluate(run: Path, options: runs.EvaluateOptions, out: Output) -> runs.Evaluated:
    """Measure a run under a progress bar."""
    model = runs.load(run, options.weights, options.checkpoint)
    out.tell("measuring the loss beside exact bars, then sampling ...")
    bar = Bar(out, runs.evaluation_steps(model, options.sampling), "evaluate")
    try:
        return runs.evaluate_run(run, options, bar.advance)
    finally:
        bar.close()


# --- from options to a request ------------------------------------------------------------------


def _request(arguments: Arguments) -> runs.Request:
    given = arguments.given
    typed = arguments.settings(*(type(getattr(RunConfig(), f)) for f in _SECTIONS))
    typed = {**_from_file(given.get("config")), **typed}
    resume = given.get("resume_from_checkpoint")
    common: dict[str, Any] = {
        "init_from": Path(given["init_from"]) if "init_from" in given else None,
        "accept_data_change": bool(given.get("accept_data_change")),
        "dry_run": bool(given.get("dry_run")),
    }
    if resume is not None:
        return _resume_request(given, typed, str(resume), common)
    if "data" not in typed:
        raise ConfigError("DATA is missing: name a folder of pictures, an .npz file or 'digits'")
    config = override(RunConfig(), typed)
    run = Path(given["output_dir"]) if "output_dir" in given else _next_run(config.data.data)
    return runs.Request(config, run, **common)


_SECTIONS = ("data", "model", "train", "runtime", "log")


def _resume_request(
    given: dict[str, Any], typed: dict[str, object], resume: str, common: dict[str, Any]
) -> runs.Request:
    if "output_dir" not in given:
        raise ConfigError("resume_from_checkpoint needs --output-dir RUN, the run to go on with")
    if resume != "latest" and not re.fullmatch(r"\d+", resume):
        raise ConfigError(f"resume_from_checkpoint must be latest or a step; got {resume!r}")
    run = Path(given["output_dir"])
    config = runs.resumed_config(run, runs.stored_config(run), typed)
    return runs.Request(config, run, resume=resume, **common)


def _from_file(path: str | None) -> dict[str, object]:
    """Settings from a JSON or TOML file; keys are option names, with underscores."""
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"config {path} cannot be read as JSON or TOML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must hold one table of options")
    override(RunConfig(), values)  # unknown names are refused here, with the file still in mind
    return values


def _next_run(data: str) -> Path:
    name = re.sub(r"[^\w.-]+", "-", Path(data).stem) or "run"
    numbers = (f"{n:03d}" for n in range(1, 1000))
    return next(path for n in numbers if not (path := Path("runs") / f"{name}-{n}").exists())

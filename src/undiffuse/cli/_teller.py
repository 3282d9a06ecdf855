"""The events of a training run in words."""

from collections.abc import Iterator
from threading import Timer

import torch

from undiffuse import __version__, cost, runs
from undiffuse.cli._output import Bar, Output, count_of, duration
from undiffuse.training import StepReport

ANNOUNCED_AFTER = 2.0  # seconds: what is done sooner needs no words
LOSS_EVERY = 20  # steps; reading a loss makes a GPU wait


class Teller:
    """Says what happens; remembers the plan and the last event."""

    def __init__(self, request: runs.Request, out: Output) -> None:
        self.request, self.out = request, out
        self.plan: runs.Plan | None = None
        self.last: runs.Event | None = None
        self.bar: Bar | None = None
        self.reports = 0
        self.quick = Timer(0, lambda: None)

    @property
    def planned(self) -> runs.Plan:
        assert self.plan is not None  # among the first events of every run
        return self.plan

    def hear(self, event: runs.Event) -> None:
        self.last = event
        self.quick.cancel()
        match event:
            case runs.Planned(plan):
                self.plan = plan
                for line in _introduction(plan):
                    self.out.tell(line)
            case runs.Doing(text):
                self._announce(text)
            case runs.Note(text):
                self.out.warn(text)
            case runs.Progress(report):
                self._progress(report)
            case runs.Validated():
                self._validated(event)
            case _:
                pass

    def close(self) -> None:
        self.quick.cancel()
        if self.bar is not None:
            self.bar.close()

    def _announce(self, text: str) -> None:
        """Say what is being done, unless it is done at once."""
        self.quick = Timer(ANNOUNCED_AFTER, self.out.tell, [text])
        self.quick.daemon = True
        self.quick.start()

    def _progress(self, report: StepReport) -> None:
        if self.bar is None:
            total = self.planned.config.train.max_train_steps
            self.bar = Bar(self.out, total, "train", report.step - 1)
        self.reports += 1
        facts = {"loss": f"{float(report.loss):.4f}"} if self.reports % LOSS_EVERY == 1 else {}
        self.bar.advance(facts)

    def _validated(self, event: runs.Validated) -> None:
        if self.bar is None or event.loss is None:
            return
        self.bar.show({"val": f"{event.loss:.4f}"})
        self.bar.write(f"step {event.step}: held-out loss {event.loss:.4f}, samples {event.grid}")


def _introduction(plan: runs.Plan) -> Iterator[str]:
    threads = count_of(torch.get_num_threads(), "thread")
    yield (
        f"undiffuse {__version__} · torch {torch.__version__} · {threads}"
        f" · seed {plan.config.train.seed} · run: {plan.request.run}"
    )
    yield _data_line(plan)
    yield (
        f"network: {plan.config.model.preset or 'as initialised from'},"
        f" {cost.total_parameters(plan.spec):,} parameters,"
        f" {type(plan.denoiser.prediction).__name__} prediction"
    )
    precision = "bf16" if plan.runtime.bf16 else "float32"
    path = plan.runtime.path
    yield f"computing on {plan.runtime.device} in {precision} ({path} path): {plan.runtime.reason}"
    yield from _padding_line(plan)
    yield from _averages_line(plan)
    yield _time_line(plan)


def _data_line(plan: runs.Plan) -> str:
    train, held_out = plan.data.train, plan.data.held_out
    height, width = train.size
    classes = f", {len(train.class_names)} classes" if train.labels is not None else ""
    return (
        f"data: {plan.data.source}: {count_of(len(train), 'picture')} of"
        f" {train.channels}x{height}x{width} for training, {len(held_out):,} held out{classes}"
    )


def _time_line(plan: runs.Plan) -> str:
    train = plan.config.train
    left = max(0, train.max_train_steps - plan.first_step)
    start = f" from step {plan.first_step:,} on" if plan.first_step else ""
    pictures = count_of(train.train_batch_size, "picture")
    return f"about {duration(plan.seconds)} for {count_of(left, 'step')} of {pictures}{start}"


def _averages_line(plan: runs.Plan) -> Iterator[str]:
    train, times = plan.config.train, plan.config.log.ema_snapshots
    if times:
        second = "" if train.second_length is None else f" and {train.second_length:g}"
        yield (
            f"averages of length {train.ema_length:g}{second} of the run, kept"
            f" {count_of(times, 'time')}: {plan.snapshot_bytes / 1e6:,.0f} MB in"
            f" {plan.folder.averages}"
        )


def _padding_line(plan: runs.Plan) -> Iterator[str]:
    stride, (height, width) = plan.spec.stride, plan.data.train.size
    if height % stride or width % stride:
        padded = f"{height + -height % stride}x{width + -width % stride}"
        yield (
            f"{height}x{width} cannot be halved {stride.bit_length() - 1} times: the network pads"
            f" it to {padded} inside and crops back"
        )

"""What every study is made of. Read this page before writing one.

A study is a module `sNN_name.py` with one constant, `STUDY`, a frozen `Study`. Nothing runs at
import. `run.py` finds the module, and does three things in this order:

1. it trains everything that `STUDY.trainings(lab)` names, two at a time, each on one core;
2. it calls `STUDY.measure(lab)`, which returns plain JSON: numbers, strings, lists, dicts. They are
   written to `results/sNN.json`, and that file is committed;
3. it draws the page. Tables, the figure, verdicts and sentences are functions of those numbers and
   of nothing else, so the page can be drawn again, byte for byte, without training anything.

A `Training` says everything that determines a network's weights. Equal trainings are trained once,
whichever studies name them (`name` is for people and does not count). Take `nets.py`'s networks
where they fit, so that trainings are shared.

Inside `trainings` and `measure` use the lab:

- `lab.seeds` for everything random: three seeds, one in the quick setting;
- `lab.steps(300)` and `lab.count(64)` wherever a number costs time: the quick setting shrinks them;
- `lab.trained(training)`: a `Denoiser` with the averaged weights, in evaluation mode;
- `lab.history(training)`: losses and gradient norms of every step, seconds per step, parameters,
  and whether the training broke down (then `trained` raises);
- `lab.errors(training)`: held-out error by noise level, and on fields the excess over the best
  possible denoiser;
- seconds in a table come from `step_seconds`, not from a history, which knows what else the machine
  was doing;
- `lab.kept(function, *arguments)`: calls `function(lab, *arguments)` once and keeps what it
  returns. Everything that takes more than a second belongs in such a piece: an interrupted run then
  goes on where it was. The key is the function's own text and its arguments (plain values,
  dataclasses, enums, named functions), so a changed function is computed again. It must return
  JSON.

Errors by noise level are measured at `LEVELS`, values of sigma / alpha, on the same pictures and
the same noise for every denoiser: `error_by_level` (any denoiser or oracle), `excess_by_level` (on
fields: mean squared distance to the exact optimum, in percent of the optimum's own error; far less
noisy than a difference of two errors) and `optimum_by_level`.

Step counts are fixed and not timed, so that numbers come out the same anywhere. Seconds are
measured and stand beside the description of the machine.
"""

import hashlib
import inspect
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum, StrEnum
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pictures import Fields, Pictures
from undiffuse import checkpoint, cost
from undiffuse.config import TrainConfig
from undiffuse.denoiser import Denoiser, KarrasPrecond, LevelSampling, Prediction, uniform_t
from undiffuse.errors import DivergedError, UndiffuseError
from undiffuse.noise import Karras, NoiseLevel, Schedule, Stream, keyed, keyed_normal
from undiffuse.spec import UNetSpec
from undiffuse.training import Net, Recipe, StepReport, TrainState, train
from undiffuse.unet import UNet

Numbers = dict[str, Any]  # anything that JSON holds

CACHE = 1  # raise when a change of the product makes kept results out of date
SEEDS = (0, 1, 2)
LEVELS = (0.05, 0.09, 0.15, 0.26, 0.45, 0.77, 1.3, 2.3, 4.0, 6.8, 12.0, 20.0)  # sigma / alpha
SCHEDULE = Karras(0.02, 40.0)  # with `uniform_t`: ln sigma uniform, wider than LEVELS
HELD_OUT = 1000  # the seed of held-out pictures and their noise


class StudyError(UndiffuseError):
    """A study asks for something that cannot be."""


# --- what a study is ----------------------------------------------------------------------------


class Verdict(StrEnum):
    """What the numbers say about a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    DEPENDS = "depends"


@dataclass(frozen=True)
class Judgement:
    """A verdict, and one or two sentences made from the numbers that led to it."""

    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Claim:
    """Something the texts say, and the rule that decides about it.

    Args:
        ids: of the checklist, such as "T003-7".
        says: the claim in one plain sentence of our own.
        rule: in words, what `judge` computes.
        judge: numbers of the study -> judgement. It must be able to fail.
    """

    ids: tuple[str, ...]
    says: str
    rule: str
    judge: Callable[[Numbers], Judgement]


@dataclass(frozen=True)
class Table:
    """A table of the page; cells are text already."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Study:
    """One study; see the module's own text.

    Args:
        id: "s04".
        title: a few words.
        claims: at least one.
        how: how it was measured: data, networks, steps, seeds. A paragraph or two of Markdown.
        trainings: lab -> everything to train beforehand.
        measure: lab -> numbers.
        tables: numbers -> tables.
        figure: numbers -> figure, made with `figures.canvas`.
        caption: one sentence under the figure: what to see.
    """

    id: str
    title: str
    claims: tuple[Claim, ...]
    how: str
    trainings: Callable[["Lab"], Sequence["Training"]]
    measure: Callable[["Lab"], Numbers]
    tables: Callable[[Numbers], Sequence[Table]]
    figure: Callable[[Numbers], Figure]
    caption: str


# --- a training ---------------------------------------------------------------------------------

Run = Callable[[nn.Module], Net]


def as_it_is(net: nn.Module) -> Net:
    """The network is called as it is."""
    return net


def time_blind(net: nn.Module) -> Net:
    """The network is told timestep 0 whatever the noise level."""
    return lambda x, timestep, label: net(x, torch.zeros_like(timestep), label)


def unprepared(net: UNet) -> None:
    """The network stays as it was built."""


@dataclass(frozen=True)
class Training:
    """Everything that determines the weights of a trained network.

    Args:
        run: how the network is called, in training and afterwards, such as `time_blind`.
        prepare: changes the network once it is built: initial weights, hooks. It may not add
            parameters.
    """

    name: str
    spec: UNetSpec
    data: Pictures
    seed: int
    steps: int = 300
    batch: int = 16
    learning_rate: float = 4e-3
    prediction: Prediction = KarrasPrecond()
    schedule: Schedule = SCHEDULE
    levels: LevelSampling = uniform_t
    run: Run = as_it_is
    prepare: Callable[[UNet], None] = unprepared

    @property
    def key(self) -> str:
        """Of all but the name."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return key_of("training", parts)

    @property
    def config(self) -> TrainConfig:
        """As the product's own training wants it."""
        return TrainConfig(
            max_train_steps=self.steps,
            train_batch_size=self.batch,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )


@dataclass(frozen=True)
class History:
    """What a training left behind besides the weights."""

    losses: tuple[float | None, ...]  # of every step; None where not finite
    grad_norms: tuple[float | None, ...]
    seconds_per_step: float
    parameters: int
    diverged: bool


def build(training: Training) -> UNet:
    """The network with its first weights, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        seed = keyed(training.seed, Stream.WEIGHTS, 0).integers(2**63)
        torch.manual_seed(int(seed))
        net = UNet(training.spec)
        training.prepare(net)
    return net


def _train(training: Training) -> tuple[UNet, History]:
    """The averaged network and its history, by the product's own loop."""
    net = build(training)
    denoiser = Denoiser(net, training.schedule, training.prediction)
    state = TrainState(net, denoiser, training.config, training.run)
    recipe = Recipe(training.schedule, training.levels)
    source = training.data.source(training.seed)
    reports: list[StepReport] = []
    began, diverged = time.perf_counter(), False
    try:
        reports.extend(train(state, source, recipe, training.config))
    except DivergedError:
        diverged = True
    seconds = (time.perf_counter() - began) / max(1, state.step)
    assert isinstance(state.ema, UNet)
    return state.ema, _history(training, reports, seconds, diverged)


def _history(
    training: Training, reports: Sequence[StepReport], seconds: float, diverged: bool
) -> History:
    return History(
        tuple(_finite(float(r.loss)) for r in reports),
        tuple(_finite(float(r.grad_norm)) for r in reports),
        round(seconds, 5),
        cost.total_parameters(training.spec),
        diverged,
    )


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


# --- the lab ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How large everything is: in full, or just enough to see that it runs."""

    seeds: tuple[int, ...] = SEEDS
    most_steps: int = 10**9
    most_pictures: int = 10**9


QUICK = Scale(seeds=(0,), most_steps=3, most_pictures=4)


class Lab:
    """Trains, measures, and keeps what is finished in a folder."""

    def __init__(self, cache: Path, scale: Scale = Scale()) -> None:
        self.cache, self.scale = cache, scale
        cache.mkdir(parents=True, exist_ok=True)

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.scale.seeds

    def steps(self, steps: int) -> int:
        """A number of training or sampling steps, fewer in the quick setting."""
        return min(steps, self.scale.most_steps)

    def count(self, pictures: int) -> int:
        """A number of pictures, fewer in the quick setting."""
        return min(pictures, self.scale.most_pictures)

    def history(self, training: Training) -> History:
        """Trains if nobody has yet."""
        file = self.cache / f"{training.key}.json"
        if not file.exists():
            self._train(training)
        kept = json.loads(file.read_text(encoding="utf-8"))
        kept["losses"], kept["grad_norms"] = tuple(kept["losses"]), tuple(kept["grad_norms"])
        return History(**kept)

    def trained(self, training: Training) -> Denoiser:
        """The averaged network as a denoiser.

        Raises:
            StudyError: the training broke down.
        """
        if self.history(training).diverged:
            raise StudyError(f"training {training.name!r} diverged and has no network")
        model = checkpoint.load_model(self._weights(training))
        net = build(training)
        net.load_state_dict(model.net.state_dict())
        net.requires_grad_(False).eval()
        return Denoiser(training.run(net), training.schedule, training.prediction)

    def errors(
        self, training: Training, data: Pictures | None = None, count: int = 64
    ) -> dict[str, list[float]]:
        """`error_by_level` on `data` (the training's own kind), and on fields the excess."""
        return self.kept(_errors, training, data or training.data, self.count(count))

    def kept(self, function: Callable[..., Any], *arguments: object) -> Any:
        """function(self, *arguments), computed once."""
        key = key_of("piece", (inspect.getsource(function), function, arguments))
        file = self.cache / f"{key}.json"
        if not file.exists():
            write_atomically(file, dump(function(self, *arguments)))
        return json.loads(file.read_text(encoding="utf-8"))

    def _train(self, training: Training) -> None:
        net, history = _train(training)
        if not history.diverged:
            shape = training.data.held_out(1, HELD_OUT).shape
            pictures = checkpoint.Pictures(shape[2], shape[3], shape[1])
            denoiser = Denoiser(net, training.schedule, training.prediction)
            model = checkpoint.Model(denoiser, pictures)
            checkpoint.save_model(self._weights(training), model)
        # The history comes last: where it lies, the weights lie too.
        write_atomically(self.cache / f"{training.key}.json", dump(described(history)["is"]))

    def _weights(self, training: Training) -> Path:
        return self.cache / f"{training.key}.safetensors"


def _errors(lab: Lab, training: Training, data: Pictures, count: int) -> dict[str, list[float]]:
    denoiser = lab.trained(training)
    errors = error_by_level(denoiser, data, count=count)
    if isinstance(data, Fields):
        errors["excess"] = excess_by_level(denoiser, data, count=count)
    return errors


# --- error by noise level -----------------------------------------------------------------------


class Estimator(Protocol):
    """A denoiser, an oracle, or anything called like them."""

    def __call__(self, x: Tensor, level: NoiseLevel, /) -> Tensor: ...


def noised(
    data: Pictures, ratio: float, count: int, seed: int = HELD_OUT, schedule: Schedule = SCHEDULE
) -> tuple[Tensor, Tensor, NoiseLevel]:
    """Held-out pictures, the same noised, and the level: equal for every denoiser that asks.

    Raises:
        StudyError: the schedule does not reach the level.
    """
    level = schedule.at(torch.tensor(ratio, dtype=torch.float64))
    if abs(float(level.ratio) / ratio - 1) > 1e-3:
        raise StudyError(f"the schedule does not reach sigma/alpha {ratio}: {schedule}")
    x0 = data.held_out(count, seed)
    part = round(ratio * 1000)  # every level has noise of its own
    noise = keyed_normal(seed, Stream.EVALUATE, range(count), tuple(x0.shape[1:]), part)
    return x0, level.mix(x0, noise), level


@torch.no_grad()
def error_by_level(
    denoise: Estimator,
    data: Pictures,
    levels: Sequence[float] = LEVELS,
    seed: int = HELD_OUT,
    count: int = 64,
    schedule: Schedule = SCHEDULE,
) -> dict[str, list[float]]:
    """Held-out mean squared error per value of the clean picture ("x0") and of the noise
    ("epsilon"), beside "ratio", the values of sigma / alpha.

    An epsilon error is the x0 error times (alpha / sigma)^2.
    """
    schedule = denoise.schedule if isinstance(denoise, Denoiser) else schedule
    errors: list[float] = []
    for ratio in levels:
        x0, x, level = noised(data, ratio, count, seed, schedule)
        errors.append(float((denoise(x, level) - x0).square().mean()))
    epsilon = [error / ratio**2 for error, ratio in zip(errors, levels, strict=True)]
    return {"ratio": list(levels), "x0": errors, "epsilon": epsilon}


@torch.no_grad()
def excess_by_level(
    denoise: Estimator,
    data: Fields,
    levels: Sequence[float] = LEVELS,
    seed: int = HELD_OUT,
    count: int = 64,
    schedule: Schedule = SCHEDULE,
) -> list[float]:
    """How much more error than the best denoiser, in percent of the best one's.

    The error of any denoiser is the best one's plus the mean squared distance to it; the latter is
    measured here.
    """
    schedule = denoise.schedule if isinstance(denoise, Denoiser) else schedule
    oracle, excess = data.oracle(), list[float]()
    for ratio in levels:
        _, x, level = noised(data, ratio, count, seed, schedule)
        apart = (denoise(x, level) - oracle(x, level)).square().mean()
        excess.append(100 * float(apart) / optimum(data, ratio))
    return excess


def optimum(data: Fields, ratio: float) -> float:
    """The least possible mean squared error of x0 at this sigma / alpha."""
    one = torch.ones((), dtype=torch.float64)
    return float(data.oracle().mmse(NoiseLevel(one, ratio * one, one)))


def optimum_by_level(data: Fields, levels: Sequence[float] = LEVELS) -> dict[str, list[float]]:
    """The exact least errors of x0 and of the noise, as `error_by_level` gives them."""
    best = [optimum(data, ratio) for ratio in levels]
    epsilon = [error / ratio**2 for error, ratio in zip(best, levels, strict=True)]
    return {"ratio": list(levels), "x0": best, "epsilon": epsilon}


# --- equal size ---------------------------------------------------------------------------------


def nearest(
    candidates: Iterable[UNetSpec],
    wanted: int,
    count: Callable[[UNetSpec], int] = cost.total_parameters,
    within: float = 0.01,
) -> UNetSpec:
    """The candidate whose parameters (or multiply-adds: another `count`) come nearest to `wanted`.

    Raises:
        StudyError: none is within 1 %.
    """
    best = min(candidates, key=lambda spec: abs(count(spec) - wanted))
    if abs(count(best) / wanted - 1) > within:
        raise StudyError(f"no candidate within {within:.0%} of {wanted}; nearest {count(best)}")
    return best


# --- numbers ------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def columns(rows: Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    """(mean, lowest, highest) over seeds for each place; `rows` has one row per seed."""
    return [(mean(c), min(c), max(c)) for c in zip(*rows, strict=True)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and range over seeds as text: "1.23 (1.20 … 1.25)"."""
    low, high = min(values), max(values)
    middle = f"{mean(values):.{digits}g}"
    return middle if low == high else f"{middle} ({low:.{digits}g} … {high:.{digits}g})"


# --- keys and files -----------------------------------------------------------------------------


def described(value: object) -> Any:
    """Plain JSON that says everything about a value; for keys.

    Raises:
        StudyError: a kind of value that has no such text, such as a tensor or a lambda.
    """
    if value is None or (
        isinstance(value, bool | int | float | str) and not isinstance(value, Enum)
    ):
        return value
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if is_dataclass(value) and not isinstance(value, type):
        inside = {f.name: described(getattr(value, f.name)) for f in fields(value)}
        return {"a": type(value).__name__, "is": inside}
    if isinstance(value, Mapping):
        return {str(name): described(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [described(one) for one in value]
    if isinstance(value, FunctionType) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    raise StudyError(f"a key cannot be made of {value!r}; use plain values and named functions")


def key_of(kind: str, value: object) -> str:
    """A short hash of what determines a result."""
    told = {"cache": CACHE, "torch": torch.__version__, "kind": kind, "of": described(value)}
    text = json.dumps(told, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def dump(value: object) -> str:
    """JSON in the order given."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_atomically(file: Path, text: str) -> None:
    """The file appears whole or not at all."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def step_seconds(lab: Lab, spec: UNetSpec, height: int, width: int, repeats: int) -> float:
    """Of a training step of 16 pictures: the fastest of some, so that other work on the machine
    counts for little. Use it as a piece: lab.kept(step_seconds, spec, 32, 32, lab.count(15))."""
    net, x, times = UNet(spec), torch.zeros(16, spec.in_channels, height, width), list[float]()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in range(repeats):
        began = time.perf_counter()
        net(x, torch.zeros(16), None).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    return round(min(times), 5)


def machine() -> dict[str, Any]:
    """What the seconds were measured on, in general words."""
    return {
        "cores": os.cpu_count(),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads per process": 1,
        "torch": torch.__version__,
    }

"""Gaussian random fields, whose best possible denoiser is known exactly.

A network is trained on fresh draws and never sees the exact denoiser. Its excess is the mean square
of D - D*, in percent of the least possible error, on pictures drawn anew: the upper end of the 95 %
interval must lie below 1 % at every level.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quality.harness import Finding, Lab, Side, Task, at_most
from undiffuse import evaluation, kernels, runtime
from undiffuse.checkpoint import Model, Pictures, load_model, save_model
from undiffuse.config import TrainConfig
from undiffuse.denoiser import Denoiser, KarrasPrecond, LogNormal
from undiffuse.noise import Karras, Stream, keyed, keyed_normal
from undiffuse.oracles import Gaussian, power_law_field
from undiffuse.recipes import ddpm_family
from undiffuse.spec import Inject, UNetSpec
from undiffuse.training import Recipe, TrainState, train
from undiffuse.unet import UNet

SPREAD = 0.5  # standard deviation of a pixel
LIMIT = 1.0  # percent
EXPONENTS = (1.0, 2.0, 3.0)


@dataclass(frozen=True)
class FieldTraining:
    """Everything that decides the weights."""

    side: int
    exponent: float
    steps: int
    width: int
    mults: tuple[int, ...]
    batch: int = 64
    learning_rate: float = 4e-3
    ema_length: float = 0.1
    p_mean: float = -0.4  # of ln sigma: most often where the excess falls slowest, and as far as
    p_std: float = 1.5  # what is judged (0.05 to 5) reaches

    @property
    def spec(self) -> UNetSpec:
        """A small DDPM network with scale and shift, attention on its lowest level."""
        spec = ddpm_family(self.width, self.mults, 1, (len(self.mults) - 1,), channels=1)
        return replace(spec, style=replace(spec.style, groups=8, inject=Inject.SCALE_SHIFT))

    @property
    def oracle(self) -> Gaussian:
        return power_law_field(self.exponent, self.side, self.side, spread=SPREAD)

    def config(self, seed: int) -> TrainConfig:
        return TrainConfig(
            max_train_steps=self.steps,
            train_batch_size=self.batch,
            learning_rate=self.learning_rate,
            ema_length=self.ema_length,
            seed=seed,
        )


SMALL_STEPS, LARGE_STEPS = (500, 1000, 1500), (300, 900, 2500)  # smoother fields are harder
SMALL = tuple(
    FieldTraining(16, exponent, steps, 24, (1, 2))
    for exponent, steps in zip(EXPONENTS, SMALL_STEPS, strict=True)
)
LARGE = tuple(
    FieldTraining(32, exponent, steps, 16, (1, 2, 2))
    for exponent, steps in zip(EXPONENTS, LARGE_STEPS, strict=True)
)
MINUTES = {16: 10.0, 32: 30.0}  # of training that are allowed


def trained(lab: Lab, training: FieldTraining, seed: int) -> Model:
    """From the folder where it is kept, or from training."""
    file = lab.folder("field", training, seed) / "model.safetensors"
    if not file.exists():
        _train(training, seed, file)
    return load_model(file)


def _train(training: FieldTraining, seed: int, file: Path) -> None:
    """By the product's own loop, on pictures drawn anew at every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(keyed(seed, Stream.WEIGHTS, 0).integers(2**63)))
        net = UNet(training.spec)
    denoiser = Denoiser(net, Karras(), KarrasPrecond(SPREAD))
    oracle, config = training.oracle, training.config(seed)

    def fresh(positions: range) -> tuple[Tensor, None]:
        shape = (1, training.side, training.side)
        return oracle.draw(keyed_normal(seed, Stream.AUGMENT, positions, shape)), None

    path, _ = runtime.half_path(torch.device("cpu")) if _kernels() else (runtime.Path.PLAIN, "")
    state = TrainState(
        net,
        denoiser,
        config,
        lambda one: runtime.callable_net(one, path),  # pyright: ignore[reportArgumentType] # a UNet and its copy
        kernels if _kernels() else None,
    )
    recipe = Recipe(denoiser.schedule, LogNormal(training.p_mean, training.p_std))
    began = time.perf_counter()
    for _ in train(state, fresh, recipe, config):
        pass
    seconds = time.perf_counter() - began
    model = Model(
        replace(denoiser, net=state.ema),
        Pictures(training.side, training.side, 1),
        {"seconds": round(seconds, 1), "steps": training.steps, "seed": seed},
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    save_model(file, model)


def _kernels() -> bool:
    return runtime.updates_by_kernels(torch.device("cpu")) and runtime.fast_bf16()


def judge(training: FieldTraining, model: Model) -> evaluation.GapReport:
    """Excess by level on 4,096 fresh pictures."""
    return evaluation.excess_by_level(model.denoiser, training.oracle, pictures=4096, seed=2000)


def worst(values: Sequence[float | None]) -> float:
    """The largest; NaN where one is missing or no number, so that nothing is hidden behind it."""
    known = [math.nan if value is None else value for value in values]
    return math.nan if any(map(math.isnan, known)) else max(known)


def findings(training: FieldTraining, lab: Lab, seed: int) -> Iterator[Finding]:
    model = trained(lab, training, seed)
    report = judge(training, model)
    name = f"field/{training.side}/exponent{training.exponent:g}"
    yield at_most(
        f"{name}/worst_excess",
        worst([row.percent_high for row in report.rows]),
        LIMIT,
        limit=0.0,
        unit="% of the least error, upper end of the 95 % interval, at the worst level",
        detail={"levels": [asdict(row) for row in report.rows]},
    )
    nats = report.nats_per_picture.value
    yield Finding(f"{name}/nats", nats, Side.SHOWN, limit=0.0, unit="nats per picture")
    yield at_most(
        f"{name}/minutes",
        float(str(model.trained["seconds"])) / 60,
        MINUTES[training.side],
        unit="minutes of training",
    )


TASKS = tuple(
    Task(
        f"field/{one.side}/exponent{one.exponent:g}",
        partial(findings, one),
        one,
    )
    for one in (*SMALL, *LARGE)
)

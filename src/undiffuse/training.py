"""The training loop: a stream of reports, one after every update.

The loop knows no folder, logger or progress bar. It gets batches from a function of position and
yields what happened; the caller saves, draws and stops. Every random number is a function of
(seed, stream, position in the run), never of what was drawn before, so resuming is arithmetic.
"""

import copy
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from undiffuse.averaging import beta
from undiffuse.config import LrScheduler, TrainConfig
from undiffuse.denoiser import Denoiser, LevelSampling, Weighting, unweighted
from undiffuse.errors import CheckpointError, DivergedError
from undiffuse.noise import (
    NoiseLevel,
    Schedule,
    Stream,
    keyed,
    keyed_even,
    keyed_normal,
    keyed_uniform,
)

Pictures = Float[Tensor, "b c h w"]
Net = Callable[..., Tensor]  # as `Denoiser` calls it
Source = Callable[[range], tuple[Tensor, Tensor | None]]  # global positions -> (x0, label)

MAX_BAD_STEPS = 10  # updates in a row whose loss or gradient is not finite


@dataclass(frozen=True)
class Batch:
    """Everything one forward pass needs, on the CPU until `to`."""

    x0: Pictures
    noise: Pictures
    level: NoiseLevel  # (b,1,1,1) each
    label: Int[Tensor, "b"] | None
    augment: Float[Tensor, "b k"] | None = None  # how each picture was transformed

    def to(self, device: torch.device) -> "Batch":
        level = NoiseLevel(*(v.to(device) for v in self.level))
        label = None if self.label is None else self.label.to(device)
        augment = None if self.augment is None else self.augment.to(device)
        return Batch(self.x0.to(device), self.noise.to(device), level, label, augment)


@runtime_checkable
class Augmentation(Protocol):
    """Transforms pictures and tells how (`undiffuse.augmentation.Augment` is one)."""

    @property
    def draws(self) -> int:
        """How many uniform numbers each picture takes."""
        ...

    def __call__(
        self, x0: Pictures, draws: Float[Tensor, "b n"]
    ) -> tuple[Pictures, Float[Tensor, "b k"]]:
        """The pictures, and the parameters of what was done to each: zeros mean nothing."""
        ...


def as_it_is(batch: Batch) -> Batch:
    """The target is the picture that was noised."""
    return batch


@dataclass(frozen=True)
class Recipe:
    """How noise enters training: which levels, how much each counts, what is done to the pictures
    before, and what the estimate is compared with."""

    schedule: Schedule
    levels: LevelSampling
    weighting: Weighting = unweighted
    classes: int = 0  # > 0: labels may be dropped to the null label `classes`
    augment: Augmentation | None = None  # of which the network is told
    aim: Callable[[Batch], Batch] = as_it_is  # same x, other target


@dataclass(frozen=True)
class StepReport:
    """State after an update. Tensors stay on the device until somebody reads them."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor  # updates left out so far because a number was not finite
    learning_rate: float


@runtime_checkable
class FusedUpdate(Protocol):
    """AdamW, clipping and the average in one pass (`undiffuse.kernels` is one)."""

    def squared_norm(self, grads: Sequence[Tensor]) -> Tensor: ...

    def adamw_ema(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        ema: Sequence[Tensor],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
        grad_scale: float,
        ema_weight: float,
    ) -> None: ...


class TrainState:
    """Weights, their averages, the optimiser's moments, and where in the run we are.

    `ema` is the average that becomes the model. `second`, by name, is one of another length that is
    kept beside it; empty where none is wanted.
    """

    def __init__(
        self,
        net: nn.Module,
        denoiser: Denoiser,
        config: TrainConfig,
        run: Callable[[nn.Module], Net] = lambda net: net,
        fused: FusedUpdate | None = None,
    ) -> None:
        """`run` wraps a network as the denoiser should call it (precision, layout); `fused` makes
        an update and its average in one pass over the memory, where there is such a thing."""
        self.net, self.ema = net, copy.deepcopy(net).requires_grad_(False).eval()
        self.denoiser = replace(denoiser, net=run(self.net))
        self.averaged = replace(denoiser, net=run(self.ema))
        self.config, self.step, self.fused = config, 0, fused
        self.parameters = list(net.parameters())
        self.second = {} if config.second_length is None else _copies(net)
        self.device = self.parameters[0].device
        self.optimizer = _optimizer(self.parameters, config)
        self.skipped = torch.zeros((), device=self.device)
        self.skipped_in_row = torch.zeros((), device=self.device)
        self.longest_row = torch.zeros((), device=self.device)

    def advance(self, loss: Tensor) -> StepReport:
        """Clip, update, average; leave everything alone if loss or gradient is not finite."""
        learning_rate = learning_rate_at(self.config, self.step)
        if self.fused is None:
            norm, bad = self._update(loss, learning_rate)
        else:
            norm, bad = self._update_by(self.fused, loss, learning_rate)
        self._average_second()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped += bad
        self.skipped_in_row = (self.skipped_in_row + 1) * bad
        self.longest_row = torch.maximum(self.longest_row, self.skipped_in_row)
        self._check_progress(learning_rate)
        return StepReport(self.step, loss, norm, self.skipped.clone(), learning_rate)

    def _update(self, loss: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        bad = _not_finite(loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # The fused optimiser leaves weights and moments alone where found_inf is 1: no host wait.
        self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue] # as GradScaler does
        self.optimizer.step()
        self._average()
        return norm, bad

    def _update_by(
        self, fused: FusedUpdate, loss: Tensor, learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        """The same in one pass. On a processor, looking at a number costs nothing."""
        pairs = zip(self.parameters, self.ema.parameters(), strict=True)
        moved = [(p, p.grad, mean, self._moments(p)) for p, mean in pairs if p.grad is not None]
        norm = fused.squared_norm([grad for _, grad, _, _ in moved]).sqrt().float()
        bad = _not_finite(loss, norm)
        if bad:
            self._average()
            return norm, bad
        # All count the same: a step that is left out is left out for all.
        done = int(moved[0][3]["step"]) if moved else 0
        fused.adamw_ema(
            [p for p, _, _, _ in moved],
            [grad for _, grad, _, _ in moved],
            [state["exp_avg"] for _, _, _, state in moved],
            [state["exp_avg_sq"] for _, _, _, state in moved],
            [mean for _, _, mean, _ in moved],
            lr=learning_rate,
            beta1=self.config.adam_beta1,
            beta2=self.config.adam_beta2,
            eps=self.config.adam_epsilon,
            weight_decay=self.config.adam_weight_decay,
            step=done + 1,
            grad_scale=min(1.0, self.config.max_grad_norm / (float(norm) + 1e-6)),
            ema_weight=1 - ema_beta(self.config, self.step + 1),
        )
        for _, _, _, state in moved:
            state["step"] += 1
        return norm, bad

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The optimiser's own state, made at first use as the optimiser itself would."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in "mv")
        return state

    @torch.no_grad()
    def _average(self) -> None:
        # A skipped update leaves the weights where they were, so averaging them once more is right.
        weight = 1 - ema_beta(self.config, self.step + 1)
        averages, newest = list(self.ema.parameters()), self.parameters
        torch._foreach_lerp_(averages, newest, weight)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportCallIssue, reportArgumentType] # as torch's own EMA does; no public name

    @torch.no_grad()
    def _average_second(self) -> None:
        """At every step, not every few: the profile stays exact, for one pass over the memory."""
        if self.config.second_length is None:
            return
        weight = 1 - beta(self.config.second_length, self.step + 1)
        averages = [self.second[name] for name, _ in self.net.named_parameters()]
        torch._foreach_lerp_(averages, self.parameters, weight)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportCallIssue, reportArgumentType] # as in `_average`

    def _check_progress(self, learning_rate: float) -> None:
        # Looked at every few steps only: reading a number makes a GPU wait.
        if self.step % MAX_BAD_STEPS == 0 and float(self.longest_row) >= MAX_BAD_STEPS:
            raise DivergedError(
                f"loss or gradient not finite for {int(self.longest_row)} updates in a row before"
                f" step {self.step} (learning_rate {learning_rate:.3g});"
                " try a lower --learning-rate or --mixed-precision no"
            )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights, averages and optimiser, flat by name: what a checkpoint stores."""
        second = {"ema_second": dict(self.second)} if self.second else {}
        return {
            "model": dict(self.net.state_dict()),
            "ema": dict(self.ema.state_dict()),
            "optim": _flat_optimizer(self.net, self.optimizer),
            **second,
        }

    def counters(self) -> dict[str, Any]:
        """The rest of the state, in plain numbers."""
        return {
            "step": self.step,
            "skipped": float(self.skipped),
            "skipped_in_row": float(self.skipped_in_row),
        }

    def restore(
        self, tensors: Mapping[str, Mapping[str, Tensor]], counters: Mapping[str, Any]
    ) -> None:
        """Continue exactly where `tensors` and `counters` were taken.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        _load(self.net, tensors["model"], "model")
        _load(self.ema, tensors["ema"], "ema")
        _fill(self.second, tensors.get("ema_second", {}), "ema_second")
        _restore_optimizer(self.net, self.optimizer, tensors["optim"])
        self.step = int(counters["step"])
        self.skipped.fill_(float(counters["skipped"]))
        self.skipped_in_row.fill_(float(counters["skipped_in_row"]))


def train(
    state: TrainState,
    source: Source,
    recipe: Recipe,
    config: TrainConfig,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepReport]:
    """Train to `config.max_train_steps`; yields after every update.

    Batches are made one step ahead in a thread. `stop` is asked between steps.

    Raises:
        DivergedError: ten updates in a row were not finite.
    """
    # One core makes batches: a second team of threads beside the step's own makes both wait.
    with ThreadPoolExecutor(1, "batches", torch.set_num_threads, (1,)) as pool:
        upcoming = _submit(pool, source, recipe, config, state.step)
        while state.step < config.max_train_steps and not stop():
            parts = [future.result() for future in upcoming]
            upcoming = _submit(pool, source, recipe, config, state.step + 1)
            yield state.advance(_accumulate(state, recipe, config, parts))


def _submit(
    pool: ThreadPoolExecutor, source: Source, recipe: Recipe, config: TrainConfig, step: int
) -> list[Future[Batch]]:
    if step >= config.max_train_steps:
        return []
    return [
        pool.submit(make_batch, source, recipe, config, positions)
        for positions in micro_batches(config, step)
    ]


def micro_batches(config: TrainConfig, step: int) -> list[range]:
    """The global positions of one step's parts: step * B + i, split as evenly as possible."""
    size, parts = config.train_batch_size, config.parts
    edges = [step * size + size * i // parts for i in range(parts + 1)]
    return [range(low, high) for low, high in pairwise(edges)]


def make_batch(source: Source, recipe: Recipe, config: TrainConfig, positions: range) -> Batch:
    """Pictures, noise, levels and label dropout of the given positions."""
    x0, label = source(positions)
    noise = keyed_normal(config.seed, Stream.NOISE, positions, tuple(x0.shape[1:]))
    u = torch.from_numpy(keyed_even(config.seed, Stream.LEVEL, positions))
    level = recipe.levels(recipe.schedule, u).like(x0)
    label = _drop_labels(label, recipe, config, positions)
    x0, augment = _transform(x0, recipe, config, positions)
    return recipe.aim(Batch(x0, noise, level, label, augment))


def _transform(
    x0: Pictures, recipe: Recipe, config: TrainConfig, positions: range
) -> tuple[Pictures, Float[Tensor, "b k"] | None]:
    if recipe.augment is None:
        return x0, None
    draws = keyed_uniform(config.seed, Stream.TRANSFORM, positions, recipe.augment.draws)
    return recipe.augment(x0, torch.from_numpy(draws))


def _drop_labels(
    label: Tensor | None, recipe: Recipe, config: TrainConfig, positions: range
) -> Tensor | None:
    if label is None or not recipe.classes:
        return None
    coins = keyed_uniform(config.seed, Stream.LABEL_DROP, positions, 1)[:, 0]
    dropped = torch.from_numpy(coins < config.label_dropout)
    return label.masked_fill(dropped, recipe.classes)


def _accumulate(
    state: TrainState, recipe: Recipe, config: TrainConfig, parts: list[Batch]
) -> Tensor:
    """Sum of gradients over the parts, as if the batch had been computed whole."""
    state.net.train()
    total = torch.zeros((), device=state.device)
    for index, part in enumerate(parts):
        batch = part.to(state.device)
        _seed_dropout(config.seed, state.step, index)
        losses = state.denoiser.loss(batch.x0, batch.noise, batch.level, batch.label, batch.augment)
        weights = recipe.weighting(batch.level).flatten()
        loss = (losses * weights).sum() / config.train_batch_size
        loss.backward()
        total += loss.detach()
    return total


def _seed_dropout(seed: int, step: int, part: int) -> None:
    """torch's dropout takes no generator, so the global one is keyed before every use."""
    torch.manual_seed(int(keyed(seed, Stream.DROPOUT, step, part).integers(2**63)))


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant or decay to 1 % at `max_train_steps`; `step` counts from 0."""
    warmup = min(config.lr_warmup_steps, config.max_train_steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, config.max_train_steps - warmup)
    return config.learning_rate * _decay(config.lr_scheduler, min(done, 1.0))


def _decay(scheduler: LrScheduler, done: float, floor: float = 0.01) -> float:
    match scheduler:
        case LrScheduler.CONSTANT:
            return 1.0
        case LrScheduler.LINEAR:
            return 1.0 - (1.0 - floor) * done
        case LrScheduler.COSINE:
            return floor + (1.0 - floor) * (1 + math.cos(math.pi * done)) / 2


def ema_beta(config: TrainConfig, step: int) -> float:
    """beta of the average that becomes the model, after `step` updates."""
    return beta(config.ema_length, step)


def _not_finite(loss: Tensor, norm: Tensor) -> Tensor:
    return (~(loss.isfinite() & norm.isfinite())).float()


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=True,
    )


def _flat_optimizer(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in net.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(
    net: nn.Module, optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]
) -> None:
    for name, parameter in net.named_parameters():
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{k}" in flat]
        state = {key: flat[f"{name}/{key}"] for key in keys}
        if state and state["exp_avg"].shape != parameter.shape:
            raise CheckpointError(
                f"optim: {name} is {list(state['exp_avg'].shape)} in the checkpoint,"
                f" {list(parameter.shape)} here; a changed model is a new run"
            )
        optimizer.state[parameter] = {
            key: _laid_out_like(parameter, value) for key, value in state.items()
        }


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy on the parameter's device and, for moments, in its memory format: the fused optimiser
    walks through weights and moments in parallel and looks at the strides of neither."""
    if value.shape != parameter.shape:  # the step counter
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _load(net: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    try:
        net.load_state_dict(dict(tensors))
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 200)
        raise CheckpointError(f"{what} does not fit this network: {reason}") from error


def _copies(net: nn.Module) -> dict[str, Tensor]:
    """All that a network stores, laid out as its own: the start of an average."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def _fill(stored: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in stored.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise CheckpointError(f"{what} does not fit this network: {name} is missing or other")
        tensor.copy_(tensors[name])


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser,
    recipe: Recipe,
    x0: Pictures,
    label: Tensor | None,
    seed: int,
    bins: int = 8,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Mean loss in `bins` equally likely bins of the training levels, from low noise to high.

    Noise and levels are the same at every call, so that only the weights differ. The denoiser is
    called on `device` with at most `batch_size` pictures.
    """
    n = len(x0)
    positions = range(n)
    noise = keyed_normal(seed, Stream.VALIDATE, positions, tuple(x0.shape[1:]))
    bin_of = torch.arange(n) % bins
    offset = torch.from_numpy(keyed_uniform(seed, Stream.VALIDATE, positions, 1, part=1)[:, 0])
    level = recipe.levels(recipe.schedule, (bin_of + offset) / bins).like(x0)
    known = label if recipe.classes else None
    batch = Batch(x0, noise, level, known)
    parts = (part.to(torch.device(device)) for part in _split(batch, batch_size))
    losses = torch.cat([_losses(denoiser, part) for part in parts])
    return [float(losses[bin_of == b].mean()) for b in range(min(bins, n))]


def _losses(denoiser: Denoiser, batch: Batch) -> Tensor:
    return denoiser.loss(batch.x0, batch.noise, batch.level, batch.label).cpu()


def _split(batch: Batch, size: int) -> Iterator[Batch]:
    for i in range(0, len(batch.x0), size):
        part = slice(i, i + size)
        level = NoiseLevel(*(v[part] for v in batch.level))
        label = None if batch.label is None else batch.label[part]
        yield Batch(batch.x0[part], batch.noise[part], level, label)

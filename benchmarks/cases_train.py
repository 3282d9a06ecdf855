"""Training steps: loss, gradients, clipping, AdamW. Ours also averages the weights (EMA)."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import floor, roofline
from benchmarks.harness import (
    BFLOAT16,
    FLOAT32,
    Bench,
    Case,
    Result,
    Side,
    check_gradients,
    chosen,
    ours,
    speedup,
    tolerance_of,
)
from benchmarks.peers import (
    AS_IT_COMES,
    Arithmetic,
    Form,
    Prepared,
    Tuned,
    Twins,
    built,
    ddpm_twins,
    fastest,
    forms,
    light_twins,
    prepared,
)
from undiffuse import cost, kernels
from undiffuse.config import TrainConfig
from undiffuse.denoiser import Denoiser
from undiffuse.noise import NoiseLevel
from undiffuse.runtime import Path, move, updates_by_kernels
from undiffuse.training import TrainState
from undiffuse.unet import UNet

RATE = 1e-6  # so that weights stay where they are, however often a step is timed
# Weights kept in bfloat16 lose updates below 1/256 of them: not the same training, so no peer.
ARITHMETICS = (Arithmetic.FLOAT32, Arithmetic.AUTOCAST)


@dataclass(frozen=True)
class Lesson:
    """A batch, the same for both sides, with the peer's float32 gradients under our names."""

    name: str  # "train/ddpm/b8"
    twins: Twins
    net: UNet
    x0: Tensor
    noise: Tensor
    timestep: Tensor
    gradients: Mapping[str, Tensor]

    @property
    def batch(self) -> int:
        return len(self.x0)


def lesson(bench: Bench, name: str, twins: Twins, batch: int) -> Lesson:
    """Let the peer learn once, and see that our plain path has the same gradients.

    Raises:
        NotEqual: it has not.
    """
    x0, timestep = twins.inputs(batch)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(x0.device)
    net = twins.ours()
    move(net, bench.device)
    given = Lesson(f"train/{name}/b{batch}", twins, net, x0, noise, timestep, {})
    given = replace(given, gradients=their_gradients(given, prepared(twins, AS_IT_COMES)))
    check_ours(given, Path.PLAIN)
    return given


def check_ours(given: Lesson, path: Path) -> float:
    """How far our gradients are from the peer's in float32.

    Raises:
        NotEqual: too far.
    """
    net, run = given.net, ours(given.net, path)
    found = gradients(given, net, lambda x, t: run(x, t.float(), None))
    return check_gradients(f"{given.name} {path}", found, given.gradients, tolerance_of(path))


def their_gradients(given: Lesson, peer: Prepared) -> Mapping[str, Tensor]:
    return given.twins.under_our_names(gradients(given, peer.net, peer.run))


def gradients(
    given: Lesson, net: nn.Module, run: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Of the mean squared error of the output, with the clean pictures as they are for input:
    noise schedules differ in their last digits, which is not what is compared here."""
    F.mse_loss(run(given.x0, given.timestep), given.noise).backward()
    found = {name: one.grad.float() for name, one in net.named_parameters() if one.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


# --- the steps ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """A side that learns.

    Args:
        learn: (x0, noise, timestep) -> loss; one whole step.
        update: what happens once the gradients are there.
    """

    parameters: list[nn.Parameter]
    learn: Callable[[Tensor, Tensor, Tensor], Tensor]
    update: Callable[[Tensor], object]

    def make_moments(self) -> None:
        """An update with gradients of zero: then the optimiser holds all that it ever will."""
        for one in self.parameters:
            one.grad = torch.zeros_like(one)
        self.update(torch.zeros(()))


def our_trainer(denoiser: Denoiser, path: Path) -> Trainer:
    """As `undiffuse train`: `TrainState.advance` clips, takes an AdamW step and averages."""
    net = _unet(denoiser.net)
    config = TrainConfig(learning_rate=RATE, lr_warmup_steps=0, max_train_steps=10**9)
    device = next(net.parameters()).device
    fused = kernels if updates_by_kernels(device) else None
    state = TrainState(net.train(), denoiser, config, lambda one: ours(_unet(one), path), fused)

    def learn(x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        level = denoiser.schedule(timestep.double().cpu() / 999).like(x0)
        level = NoiseLevel(*(value.to(x0.device) for value in level))
        loss = state.denoiser.loss(x0, noise, level).mean()
        loss.backward()
        state.advance(loss.detach())
        return loss.detach()

    return Trainer(state.parameters, learn, state.advance)


def _unet(net: object) -> UNet:
    assert isinstance(net, UNet)
    return net


def our_step(given: Lesson, path: Path) -> Callable[[], Tensor]:
    """A step of ours on the lesson's batch; returns the loss."""
    imported, net = given.twins.imported(), copy.deepcopy(given.net)
    trainer = our_trainer(Denoiser(net, imported.schedule, imported.prediction), path)
    return lambda: trainer.learn(given.x0, given.noise, given.timestep)


def their_step(given: Lesson, form: Form) -> Callable[[], Tensor]:
    """Likewise of theirs, once its gradients are right.

    Raises:
        NotEqual: they are not.
    """
    peer = prepared(given.twins, form)
    peer.net.train()
    allowed = FLOAT32 if form.arithmetic is Arithmetic.FLOAT32 else BFLOAT16
    found = their_gradients(given, peer)
    check_gradients(f"{given.name} {form.label}", found, given.gradients, allowed)
    trainer = their_trainer(peer, fused=form != AS_IT_COMES)
    return lambda: trainer.learn(given.x0, given.noise, given.timestep)


def their_trainer(peer: Prepared, fused: bool) -> Trainer:
    """As in the training scripts of diffusers: clipped gradients and torch's AdamW, as it comes or
    (a tuned form) by torch's own kernel for all of it."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    parameters = list(peer.net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=fused or None)
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def update(loss: Tensor) -> None:
        del loss
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def learn(x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        noisy = scheduler.add_noise(x0, noise, timestep)  # pyright: ignore[reportArgumentType] # any integers will do
        loss = F.mse_loss(peer.run(noisy, timestep), noise)
        loss.backward()
        update(loss)
        return loss.detach()

    return Trainer(parameters, learn, update)


# --- the comparisons ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    default: str | None = None
    tuned: str | None = None


def results(
    bench: Bench, name: str, make: Callable[[Bench], Twins], batch: int, targets: Targets
) -> Iterator[Result]:
    """Everything about one network and batch."""
    given = lesson(bench, name, make(bench), batch)
    path = chosen(given.net)
    apart = check_ours(given, path)
    pairs = bench.compare(our_step(given, path), their_step(given, AS_IT_COMES))
    how = f"{path} path with EMA against diffusers as it comes (fp32, NCHW, eager) without"
    found = speedup(f"{given.name}/default", how, pairs, batch, targets.default)
    yield _known(bench, given, apart, found)
    yield _known(bench, given, apart, against_fastest(bench, given, path, targets.tuned))
    if not bench.quick:
        yield _known(bench, given, apart, against_floor(bench, given, path))


def fastest_form(bench: Bench, given: Lesson) -> Tuned:
    return fastest(bench, given.name, forms(ARITHMETICS), partial(their_step, given))


def against_fastest(bench: Bench, given: Lesson, path: Path, target: str | None) -> Result:
    tuned = fastest_form(bench, given)
    _, theirs = built(tuned.form, partial(their_step, given))
    pairs = bench.compare(our_step(given, path), theirs)
    how = f"{path} path with EMA against diffusers in its fastest form ({tuned.form.label}) without"
    found = speedup(f"{given.name}/tuned", how, pairs, given.batch, target)
    more = {"peer_form": tuned.form.label, "peer_forms_s": dict(tuned.tried)}
    return replace(found, compile_s=tuned.compile_s, more=more)


def against_floor(bench: Bench, given: Lesson, path: Path) -> Result:
    recorded = floor.record(given.net, given.x0, given.timestep.float())
    parameters = cost.total_parameters(given.net.spec)
    floors: list[floor.Floor] = []

    def below() -> float:
        floors.append(floor.measure(bench, recorded, training=True, parameters=parameters))
        return floors[-1].seconds

    below()
    pairs = bench.pairs(bench.side("ours", our_step(given, path)), Side("floor", below))
    how = f"{path} path against its products with gradients run alone in bf16, and the traffic"
    found = speedup(f"{given.name}/floor", how, pairs, given.batch)
    found = replace(found, of="floor seconds / our seconds", of_floor=found.ratio)
    return replace(found, more=floor.details(floors, pairs.ours))


def _known(bench: Bench, given: Lesson, apart: float, found: Result) -> Result:
    """A training step counts as three forward passes."""
    assert found.images_per_second is not None
    flop = 3 * cost.flops(given.net.spec, given.x0.shape[-2], given.x0.shape[-1])
    share = found.images_per_second * flop / roofline.peak(bench)
    more = {**found.more, "gradient_difference": apart}
    return replace(found, flop_per_image=flop, of_gemm=share, more=more)


CASES = (
    Case(
        "train/ddpm/b8",
        partial(
            results, name="ddpm", make=ddpm_twins, batch=8, targets=Targets(">= 3.5", ">= 1.3")
        ),
        quick=True,
    ),
    Case(
        "train/light/b8",
        partial(results, name="light", make=light_twins, batch=8, targets=Targets()),
    ),
)

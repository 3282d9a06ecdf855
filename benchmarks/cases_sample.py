"""64 finished pictures: our sampler at its default against the peer's 1000-step loop."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.cases_forward import our_call, question, their_call
from benchmarks.harness import (
    Bench,
    Case,
    Pairs,
    Result,
    Side,
    chosen,
    paired,
    seconds_of,
    speedup,
)
from benchmarks.peers import AS_IT_COMES, Form, Twins, ddpm_twins, known, prepared
from undiffuse import checkpoint, runs
from undiffuse.config import SampleConfig
from undiffuse.denoiser import Denoiser
from undiffuse.runtime import move

PICTURES, LOOP = 64, 1000
TARGET = ">= 50"


def results(bench: Bench, make: Callable[[Bench], Twins] = ddpm_twins) -> Iterator[Result]:
    """Against the loop as it comes, and with the peer's fastest form if that is known."""
    twins = make(bench)
    asked = question(bench, "ddpm", twins, 8)
    our_call(asked, chosen(asked.net))
    yield against(bench, twins, AS_IT_COMES, "default", TARGET)
    tuned = known(bench, asked.name)
    if tuned is not None and not bench.quick:
        their_call(asked, tuned.form)
        yield against(bench, twins, tuned.form, "tuned", None)


def against(bench: Bench, twins: Twins, form: Form, what: str, target: str | None) -> Result:
    """Ours in full; a step of theirs costs the same at every level, so a few stand for all."""
    step = their_step(twins, form)
    seconds_of(step, 2, bench.clock)  # warms it up
    loop = Side("peer", lambda: LOOP * seconds_of(step, 1, bench.clock))
    pairs = paired(our_side(bench, twins), loop, bench.budget.long_pairs)
    steps = SampleConfig().num_inference_steps
    how = (
        f"ours in full ({SampleConfig().sampler}, {steps} steps); of diffusers' DDPM loop"
        f" ({form.label}) one step at batch {PICTURES} is timed and multiplied by {LOOP}; which"
        " pictures are better is not compared"
    )
    found = speedup(f"sample/ddpm/{PICTURES}/{what}", how, pairs, PICTURES, target)
    return in_seconds(found, pairs)


def in_seconds(found: Result, pairs: Pairs) -> Result:
    ours, peer = statistics.median(pairs.ours), statistics.median(pairs.peer)
    return replace(found, ours=ours, peer=peer, unit="s")


def our_side(bench: Bench, twins: Twins) -> Side:
    """`generate` with its defaults; one step beforehand warms it up."""
    model = model_of(bench, twins)
    runs.generate(model, PICTURES, num_inference_steps=1)
    return Side("ours", lambda: seconds_of(lambda: runs.generate(model, PICTURES), 1, bench.clock))


def model_of(bench: Bench, twins: Twins) -> checkpoint.Model:
    imported, net = twins.imported(), twins.ours()
    move(net, bench.device)
    pictures = checkpoint.Pictures(twins.size, twins.size, imported.spec.in_channels)
    return checkpoint.Model(Denoiser(net, imported.schedule, imported.prediction), pictures)


def their_step(twins: Twins, form: Form) -> Callable[[], object]:
    """One step of `DDPMPipeline`'s loop."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=LOOP)
    scheduler.set_timesteps(LOOP)
    timestep = scheduler.timesteps[0]
    run, (x, _) = prepared(twins, form).run, twins.inputs(PICTURES)

    @torch.no_grad()
    def step() -> object:
        return scheduler.step(run(x, timestep), int(timestep), x)

    return step


CASES = (Case("sample", results, quick=True),)

"""Forward passes: ours against the peer as it comes, its fastest form, and the floor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import floor, roofline
from benchmarks.harness import (
    BFLOAT16,
    FLOAT32,
    Bench,
    Case,
    Result,
    Side,
    check_equal,
    chosen,
    eager,
    ours,
    speedup,
    tolerance_of,
)
from benchmarks.peers import (
    AS_IT_COMES,
    Arithmetic,
    Form,
    PeerMissing,
    Twins,
    built,
    ddpm_twins,
    fastest,
    forms,
    guided_twins,
    light_twins,
    lucidrains_twins,
    prepared,
)
from undiffuse import cost
from undiffuse.recipes import ddpmpp_family
from undiffuse.runtime import Path, move
from undiffuse.unet import UNet


@dataclass(frozen=True)
class Targets:
    """What the ratios should reach; None is not measured against anything."""

    default: str | None = None
    tuned: str | None = None
    floor: str | None = None
    eager: str | None = None


DDPM_TARGETS = Targets(">= 5", ">= 1.25", ">= 0.75", ">= 4")


@dataclass(frozen=True)
class Question:
    """The same for both sides, with the peer's float32 answer."""

    name: str  # "forward/ddpm/b8"
    twins: Twins
    net: UNet
    x: Tensor
    timestep: Tensor
    answer: Tensor

    @property
    def batch(self) -> int:
        return len(self.x)

    @property
    def flop(self) -> int:
        """Per picture."""
        return cost.flops(self.net.spec, self.x.shape[-2], self.x.shape[-1])


def question(bench: Bench, name: str, twins: Twins, batch: int) -> Question:
    """Ask the peer, and see that our plain path says the same.

    Raises:
        NotEqual: it does not.
    """
    x, timestep = twins.inputs(batch)
    net = twins.ours()
    move(net, bench.device)
    answer = torch.no_grad()(prepared(twins, AS_IT_COMES).run)(x, timestep)
    asked = Question(f"forward/{name}/b{batch}", twins, net, x, timestep, answer)
    our_call(asked, Path.PLAIN)
    return asked


def our_call(asked: Question, path: Path) -> Callable[[], Tensor]:
    """Our forward pass, once it has given the right answer.

    Raises:
        NotEqual: it has not.
    """
    net, timestep = ours(asked.net, path), asked.timestep.float()
    call = torch.no_grad()(lambda: net(asked.x, timestep, None))
    check_equal(f"{asked.name} {path}", call(), asked.answer, tolerance_of(path))
    return call


def their_call(asked: Question, form: Form) -> Callable[[], Tensor]:
    """Likewise for the peer in one of its forms."""
    run = prepared(asked.twins, form).run
    call = torch.no_grad()(lambda: run(asked.x, asked.timestep))
    allowed = FLOAT32 if form.arithmetic is Arithmetic.FLOAT32 else BFLOAT16
    check_equal(f"{asked.name} {form.label}", call(), asked.answer, allowed)
    return call


# --- the comparisons ----------------------------------------------------------------------------


def results(
    bench: Bench, name: str, make: Callable[[Bench], Twins], batch: int, targets: Targets
) -> Iterator[Result]:
    """Everything about one network and batch."""
    try:
        twins = make(bench)
    except PeerMissing as error:
        yield Result(f"forward/{name}/b{batch}/default", "forward pass", skipped=str(error))
        return
    asked = question(bench, name, twins, batch)
    path = chosen(asked.net)
    yield against_default(bench, asked, path, "default", targets.default)
    yield against_fastest(bench, asked, path, targets.tuned)
    yield against_floor(bench, asked, path, targets.floor)
    yield against_default(bench, asked, eager(asked.net), "eager", targets.eager)
    if not bench.quick:
        yield compiled(bench, asked)


def against_default(
    bench: Bench, asked: Question, path: Path, what: str, target: str | None
) -> Result:
    call = our_call(asked, path)
    pairs = bench.compare(call, their_call(asked, AS_IT_COMES))
    how = f"{path} path against {asked.twins.project} as it comes (fp32, NCHW, eager)"
    return _known(
        bench, asked, call, speedup(f"{asked.name}/{what}", how, pairs, asked.batch, target)
    )


def against_fastest(bench: Bench, asked: Question, path: Path, target: str | None) -> Result:
    build = partial(their_call, asked)
    tuned = fastest(bench, asked.name, forms(), build)
    _, theirs = built(tuned.form, build)
    call = our_call(asked, path)
    pairs = bench.compare(call, theirs)
    how = f"{path} path against {asked.twins.project} in its fastest form ({tuned.form.label})"
    found = speedup(f"{asked.name}/tuned", how, pairs, asked.batch, target)
    more = {"peer_form": tuned.form.label, "peer_forms_s": dict(tuned.tried)}
    return _known(bench, asked, call, replace(found, compile_s=tuned.compile_s, more=more))


def against_floor(bench: Bench, asked: Question, path: Path, target: str | None) -> Result:
    call = our_call(asked, path)
    recorded = floor.record(asked.net, asked.x, asked.timestep.float())
    floors: list[floor.Floor] = []

    def below() -> float:
        floors.append(floor.measure(bench, recorded, training=False, parameters=0))
        return floors[-1].seconds

    below()  # warms up what the first pass would pay for
    pairs = bench.pairs(bench.side("ours", call), Side("floor", below))
    how = f"{path} path against its products run alone in bf16, and the norms' traffic"
    found = speedup(f"{asked.name}/floor", how, pairs, asked.batch, target)
    found = replace(found, of="floor seconds / our seconds", of_floor=found.ratio)
    return _known(bench, asked, call, replace(found, more=floor.details(floors, pairs.ours)))


def compiled(bench: Bench, asked: Question) -> Result:
    """Our own path through torch.compile against our eager one."""
    seconds, call = built(Form(compiled=True), lambda _: our_call(asked, Path.COMPILED))
    path = eager(asked.net)
    pairs = bench.compare(call, our_call(asked, path))
    how = f"compiled path against our own {path} path"
    found = speedup(f"{asked.name}/compiled", how, pairs, asked.batch)
    return _known(bench, asked, call, replace(found, compile_s=seconds))


def _known(bench: Bench, asked: Question, call: Callable[[], Tensor], found: Result) -> Result:
    """With what follows from the arithmetic, and how far outputs are apart."""
    assert found.images_per_second is not None
    apart = float((call().float() - asked.answer).abs().max())
    share = found.images_per_second * asked.flop / roofline.peak(bench)
    return replace(found, flop_per_image=asked.flop, of_gemm=share, max_abs_diff=apart)


# --- EDM, by topology ---------------------------------------------------------------------------


def edm(bench: Bench) -> Iterator[Result]:
    """DDPM++ as EDM trains it for CIFAR-10: 55.7 M parameters. Its code is not run here."""
    net = UNet(ddpmpp_family(128, (2, 2, 2), 4, (1,))).eval()
    move(net, bench.device)
    x, timestep = (
        torch.randn(8, 3, 32, 32, device=bench.device),
        torch.zeros(8, device=bench.device),
    )
    path = chosen(net)
    run = ours(net, path)
    timed = bench.side("ours", torch.no_grad()(lambda: run(x, timestep, None)))
    taken = tuple(timed.measure() for _ in range(bench.budget.pairs))
    rate, flop = 8 / sorted(taken)[len(taken) // 2], cost.flops(net.spec, 32, 32)
    yield Result(
        name="forward/edm/b8/alone",
        how=f"our own network of EDM's topology, {path} path: throughput, no peer",
        ours=rate,
        unit="images/s",
        ours_s=taken,
        images_per_second=rate,
        flop_per_image=flop,
        of_gemm=rate * flop / roofline.peak(bench),
    )


def _case(
    name: str,
    make: Callable[[Bench], Twins],
    batch: int,
    targets: Targets = Targets(),
    quick: bool = False,
) -> Case:
    run = partial(results, name=name, make=make, batch=batch, targets=targets)
    return Case(f"forward/{name}/b{batch}", run, quick)


CASES = (
    _case("ddpm", ddpm_twins, 8, DDPM_TARGETS, quick=True),
    _case("ddpm", ddpm_twins, 32, DDPM_TARGETS),
    _case("light", light_twins, 8),
    _case("light", light_twins, 32),
    _case("denoising-diffusion-pytorch", lucidrains_twins, 8),
    _case("guided-diffusion", guided_twins, 4),
    Case("forward/edm/b8", edm),
)

"""How costs grow: exponents of measured curves beside those that arithmetic predicts.

    python -m benchmarks.scaling SIDE        (started by this module)

prints the memory of an attention layer's training step on one picture of SIDE pixels.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    Bench,
    Case,
    Law,
    Numbers,
    Result,
    chosen,
    fresh,
    ours,
    peak_memory,
    power_law,
)
from undiffuse import cost
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.guidance import with_label
from undiffuse.noise import Karras, levels
from undiffuse.recipes import ddpm_family
from undiffuse.runtime import Path, move
from undiffuse.sampling import dpmpp_2m, finish, start
from undiffuse.spec import Attn, Conv, Out, Style, UNetSpec
from undiffuse.unet import UNet

ROOM = 0.1  # that a measured exponent may lie above the predicted one
Curve = Mapping[int, float]  # where -> how much


def convolutions(width: int) -> UNetSpec:
    """Two levels without attention."""
    return ddpm_family(width, (1, 2), 1, ())


def attention(width: int = 64) -> UNetSpec:
    """Nothing but one attention between two convolutions."""
    return UNetSpec(3, 3, (Conv(width), Attn(), Out()), Style())


def fitted(name: str, how: str, of: str, found: Curve, law: Curve) -> Result:
    """The exponent of a curve; it should not lie above that of the law by more than `ROOM`."""
    one, other = _law(found), _law(law)
    margin = 1.96 * one.error
    return Result(
        name=f"scaling/{name}",
        how=how,
        ratio=one.exponent,
        spread=(one.exponent - margin, one.exponent + margin),
        of=f"exponent of {of}",
        target=f"<= {other.exponent + ROOM:.2f}",
        more={"points": [list(p) for p in found.items()], "law": other.exponent},
    )


def _law(curve: Curve) -> Law:
    return power_law(list(curve), list(curve.values()))


def seconds(bench: Bench, calls: Mapping[int, Callable[[], object]]) -> Curve:
    """Median seconds of each call, taken in turn so that a disturbance meets them all."""
    sides = {where: bench.side(str(where), call) for where, call in calls.items()}
    rounds = [[one.measure() for one in sides.values()] for _ in range(bench.budget.pairs)]
    middle = map(statistics.median, zip(*rounds, strict=True))
    return dict(zip(sides, middle, strict=True))


# --- time ---------------------------------------------------------------------------------------


def times(
    bench: Bench,
    sizes: Sequence[int] = (32, 64, 128, 256),
    widths: Sequence[int] = (64, 128, 256),
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    steps: Sequence[int] = (5, 10, 20, 40),
) -> Iterator[Result]:
    """Forward passes and sampling."""
    net = _net(bench, convolutions(widths[0]))
    by_size = seconds(bench, {s * s: _forward(bench, net, 1, s) for s in sizes})
    law = {s * s: cost.flops(net.spec, s, s) for s in sizes}
    yield fitted("pixels", "forward, no attention", "seconds in pixels", by_size, law)
    nets = {w: _net(bench, convolutions(w)) for w in widths}
    by_width = seconds(bench, {w: _forward(bench, one, 4, 32) for w, one in nets.items()})
    law = {w: cost.flops(one.spec, 32, 32) for w, one in nets.items()}
    yield fitted("width", "forward, no attention", "seconds in base width", by_width, law)
    by_batch = seconds(bench, {b: _forward(bench, net, b, 32) for b in batches})
    each = {b: value / b for b, value in by_batch.items()}
    flat = dict.fromkeys(batches, 1.0)
    yield fitted("batch", "forward", "seconds per picture in batch size", each, flat)
    by_steps = seconds(bench, {n: _sample(bench, net, n) for n in steps})
    law = {n: float(n) for n in steps}
    yield fitted("steps", "DPM-Solver++ 2M", "seconds in steps", by_steps, law)


def _net(bench: Bench, spec: UNetSpec) -> UNet:
    net = UNet(spec).eval()
    move(net, bench.device)
    return net


def _forward(bench: Bench, net: UNet, batch: int, size: int) -> Callable[[], object]:
    run = ours(net, chosen(net))
    x = torch.randn(batch, net.spec.in_channels, size, size, device=bench.device)
    timestep = torch.zeros(batch, device=bench.device)
    return torch.no_grad()(lambda: run(x, timestep, None))


def _sample(bench: Bench, net: UNet, steps: int, size: int = 32) -> Callable[[], object]:
    denoiser = Denoiser(ours(net, chosen(net)), Karras(), KarrasPrecond())
    grid = levels(denoiser.schedule, steps)
    x = start(grid[0], torch.randn(4, net.spec.in_channels, size, size, device=bench.device))
    return torch.no_grad()(lambda: finish(dpmpp_2m(with_label(denoiser, None), x, grid)))


# --- memory of attention ------------------------------------------------------------------------


def memory(
    bench: Bench, sides: Sequence[int] = (32, 48, 64, 96, 128), width: int = 64
) -> Iterator[Result]:
    """Never the n x n scores: bytes grow as pixels do."""
    net = _net(bench, attention(width))
    law = {s * s: float(s * s) for s in sides}
    path = chosen(net)
    kept = {s * s: float(saved_bytes(net, path, s)) for s in sides}
    how = f"bytes that one attention layer keeps for its backward pass, {path} path"
    yield fitted("attention/saved", how, "bytes in pixels", kept, law)
    words = ["-m", "benchmarks.scaling"]
    told = {s: fresh([*words, str(s), str(width)], bench.threads) for s in sides}
    peaks = {s * s: float(found["peak"] - found["before"]) for s, found in told.items()}
    how = f"peak memory of a forward and backward pass above that of 8x8 pixels, {path} path"
    yield fitted("attention/peak", how, "bytes in pixels", peaks, law)


def saved_bytes(net: UNet, path: Path, size: int) -> int:
    """Bytes kept for the backward pass of one picture, parameters not among them."""
    own = {one.untyped_storage().data_ptr() for one in net.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # or another tensor could come to lie at the same address

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        _loss(net, path, size)
    return sum(kept.values())


def _loss(net: UNet, path: Path, size: int) -> Tensor:
    device = next(net.parameters()).device
    x = torch.ones(1, net.spec.in_channels, size, size, device=device)
    return F.mse_loss(ours(net, path)(x, torch.zeros(1, device=device), None), x)


def child(size: int, width: int) -> Numbers:
    """Peak bytes after a tiny picture, and after the real one."""
    net = UNet(attention(width))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    move(net, device)
    path = chosen(net)
    _loss(net, path, 8).backward()
    before = peak_memory(device)
    _loss(net, path, size).backward()
    return {"before": before, "peak": peak_memory(device)}


CASES = (Case("scaling/time", times), Case("scaling/memory", memory))

if __name__ == "__main__":
    print(json.dumps(child(int(sys.argv[1]), int(sys.argv[2]))))

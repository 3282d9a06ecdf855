"""How far the output of a program sees, counted from its ops and measured by gradients.

Attention and the statistics of norms reach every pixel, so both are left out: what is counted is
the reach through convolutions and resampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from undiffuse.spec import (
    Act,
    Attn,
    Concat,
    Conv,
    Down,
    Downsampling,
    Embedding,
    Inject,
    LinearAttn,
    Op,
    Out,
    Res,
    Resize,
    Skip,
    UNetSpec,
    Up,
    Upsampling,
    trace,
)
from undiffuse.unet import UNet


@dataclass(frozen=True)
class Span:
    """Positions first … last of a row."""

    first: int
    last: int

    def wider(self, by: int) -> "Span":
        return Span(self.first - by, self.last + by)

    def joined(self, other: "Span") -> "Span":
        return Span(min(self.first, other.first), max(self.last, other.last))

    def __len__(self) -> int:
        return self.last - self.first + 1


def seen_by(spec: UNetSpec, position: int, ops: int | None = None) -> Span:
    """The input pixels of a row that the output pixel `position` depends on, on an endless row.

    The program (or its first `ops` ops, to ask about features inside) is walked backwards; a skip's
    reach waits at its `Skip`.
    """
    span, waiting = Span(position, position), dict[int, Span]()
    for site in reversed(list(trace(spec))[:ops]):
        match site.op:
            case Concat():
                assert site.skip is not None
                waiting[site.skip] = span
            case Skip():
                span = span.joined(waiting.pop(site.index, span))
            case op:
                span = _before(op, span)
    return span


def sides(spec: UNetSpec) -> tuple[int, int]:
    """The smallest and largest side of the receptive field, in pixels, over output positions."""
    lengths = [len(seen_by(spec, position)) for position in range(spec.stride)]
    return min(lengths), max(lengths)


def _before(op: Op, span: Span) -> Span:
    """What an op reads to give `span`."""
    match op:
        case Conv(_, kernel) | Out(kernel):
            return span.wider(kernel // 2)
        case Res(_, resize):
            return _resized(span.wider(2), resize)
        case Down(by):
            return _halved(span, by)
        case Up(by):
            return _doubled(span, by)
        case _:  # attention is left out; activations and stack ops read what they give
            assert isinstance(op, Act | Attn | LinearAttn)
            return span


def _resized(span: Span, resize: Resize | None) -> Span:
    if resize is Resize.DOWN:
        return _halved(span, Downsampling.AVG)
    return _doubled(span, Upsampling.NEAREST) if resize is Resize.UP else span


_READ = {  # output i of a row reads 2 i + first … 2 i + last
    Downsampling.CONV: (-1, 1),
    Downsampling.CONV_END: (0, 2),
    Downsampling.CONV4: (-1, 2),
}


def _halved(span: Span, by: Downsampling) -> Span:
    first, last = _READ.get(by, (0, 1))
    return Span(2 * span.first + first, 2 * span.last + last)


def _doubled(span: Span, by: Upsampling) -> Span:
    if by is Upsampling.DECONV4:  # input i gives outputs 2 i - 1 … 2 i + 2
        return Span(-((2 - span.first) // 2), (span.last + 1) // 2)
    span = span.wider(1) if by is Upsampling.NEAREST_CONV else span
    return Span(span.first // 2, span.last // 2)


# --- measured -----------------------------------------------------------------------------------


def thin(spec: UNetSpec) -> UNetSpec:
    """The same program two channels wide, without attention, and with averages for maxima.

    None of this changes which pixels an output depends on; a maximum would hide three of four.
    """
    program = tuple(_thin(op) for op in spec.program if not isinstance(op, Attn | LinearAttn))
    style = replace(spec.style, zero_init=False, inject=Inject.ADD, embedding=Embedding(2, 2, 2))
    return UNetSpec(1, 1, program, style)


def _thin(op: Op) -> Op:
    match op:
        case Conv() | Res():
            return replace(op, width=2)
        case Down(Downsampling.MAX):
            return Down(Downsampling.AVG)
        case Down() | Up():
            return op if op.width is None else replace(op, width=2)
        case _:
            return op


def measured_side(spec: UNetSpec, position: int) -> int:
    """The side of the gradient's support at one output pixel of the thinned program.

    Weights are positive and norms are left out, so that no two paths cancel. The picture is a strip
    as high as the stride and as wide as the reach.
    """
    net = _positive(thin(spec))
    reach = seen_by(spec, position)
    left = -(reach.first // spec.stride - 1) * spec.stride  # room to the left, whole strides
    right = (reach.last // spec.stride + 2) * spec.stride
    x = torch.ones(1, 1, spec.stride, left + right, dtype=torch.float64, requires_grad=True)
    output = net(x, torch.zeros(1, dtype=torch.float64), None)
    (gradient,) = torch.autograd.grad(output[0, 0, 0, left + position], x)
    columns = gradient[0, 0].abs().sum(0).nonzero().flatten()
    return int(columns[-1] - columns[0]) + 1


def _positive(spec: UNetSpec) -> nn.Module:
    net = UNet(spec).double().requires_grad_(False)
    for module in net.modules():
        for name in ("norm", "norm1", "norm2"):
            if name in dict(module.named_children()):
                setattr(module, name, nn.Identity())
    for parameter in net.parameters():
        fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
        parameter.fill_(1.0 / fan if parameter.ndim > 1 else 0.0)
    return net


def effective_side(weights: Tensor, centre: tuple[int, int], share: float = 0.9) -> int:
    """The side of the smallest square around `centre` that holds `share` of |weights| (h, w)."""
    mass, (y, x) = weights.abs(), centre
    total = float(mass.sum())
    for reach in range(max(mass.shape)):
        rows = slice(max(0, y - reach), y + reach + 1)
        across = slice(max(0, x - reach), x + reach + 1)
        if float(mass[rows, across].sum()) >= share * total:
            return 2 * reach + 1
    return 2 * max(mass.shape) - 1


def gradient_mass(net_output: Tensor, x: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
    """|d output / d input| for each output pixel, averaged over pictures: (pixels, h, w)."""
    maps: list[Tensor] = []
    for y, column in pixels:
        (gradient,) = torch.autograd.grad(net_output[:, 0, y, column].sum(), x, retain_graph=True)
        maps.append(gradient.abs().mean((0, 1)))
    return torch.stack(maps)

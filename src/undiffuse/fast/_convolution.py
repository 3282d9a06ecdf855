"""Convolutions as the fast path runs them: the library's own, and Winograd's for 3x3.

Winograd's F(2x2, 3x3) (Lavin & Gray, 1509.09308) computes 2x2 outputs with 16 products where the
sum over the window needs 36. Input windows, weights and outputs are carried into another basis by
additions, and what lies between is 16 matrix products. Bfloat16 rounding enters in that basis too:
one convolution has about twice the error of a direct one in bfloat16.

Both kinds have the same three functions. Features are (b, c, h, w), channels last; weights are the
float32 parameters, brought to the features' precision where they are used. On the way back, what a
source gives is written over.
"""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from undiffuse import kernels

Shape = tuple[int, int, int, int]  # of the input: b, c, h, w
WINDOW_BYTES = 8 * 2**20  # of transformed input at a time: what stays in the last cache


Source = Callable[[slice], Tensor]  # some pictures of the batch -> their features
Sink = Callable[[slice, Tensor], None]  # takes the gradient of what the source gave
ALL = slice(None)


class Gradients(NamedTuple):
    """Of a convolution's weight and bias, float32."""

    weight: Tensor
    bias: Tensor | None


@runtime_checkable
class Convolution(Protocol):
    """A 'same' convolution: how to prepare its weight, run it, and run it backwards.

    It asks for its input a part of the batch at a time, so that what can be computed from something
    smaller never has to exist as a whole.
    """

    def prepared(self, weight: Tensor, dtype: torch.dtype) -> Tensor: ...

    def forward(
        self,
        source: Source,
        shape: Shape,
        prepared: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor: ...

    def backward(
        self,
        dy: Tensor,
        source: Source,
        sink: Sink,
        shape: Shape,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Gradients: ...


@dataclass(frozen=True)
class Direct:
    """The library's convolution, with stride 1, of the whole batch at once."""

    padding: int

    def prepared(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype)

    def forward(
        self,
        source: Source,
        shape: Shape,
        prepared: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        bias = None if bias is None else bias.to(prepared.dtype)
        y = torch.conv2d(source(ALL), prepared, bias, padding=self.padding)
        return y if residual is None else y.add_(residual)

    def backward(
        self,
        dy: Tensor,
        source: Source,
        sink: Sink,
        shape: Shape,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Gradients:
        x = source(ALL)
        sizes = None if bias is None else [bias.shape[0]]
        both = [self.padding, self.padding]
        needed = [True, True, bias is not None]
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy, x, self.prepared(weight, x.dtype), sizes,
            [1, 1], both, [1, 1], False, [0, 0], 1, needed,
        )  # fmt: skip
        del x
        sink(ALL, dx.contiguous(memory_format=torch.channels_last))
        return Gradients(dw.to(weight.dtype), None if db is None else db.to(weight.dtype))


class Workspace(threading.local):
    """Memory that is used again: fresh pages cost as much time as the sums written to them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Whatever was there before, in this shape. Valid until `name` is taken again."""
        size = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size:
            with torch.inference_mode(False):  # such a tensor could not be written to outside
                kept = torch.empty(size, dtype=dtype, device="cpu")
            self._kept[name, dtype] = kept
        return kept[:size].view(shape)


@dataclass(frozen=True)
class Winograd:
    """F(2x2, 3x3), some pictures at a time."""

    workspace: Workspace = field(default_factory=Workspace)

    def prepared(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return kernels.winograd_weight(weight, dtype)

    def forward(
        self,
        source: Source,
        shape: Shape,
        prepared: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        b, _, h, w = shape
        y = torch.empty(
            (b, prepared.shape[1], h, w),
            dtype=prepared.dtype,
            device="cpu",
            memory_format=torch.channels_last,
        )
        for part in _parts(shape, y.element_size()):
            v = self._windows(source(part))
            m = self.workspace.take("m", (*v.shape[:2], y.shape[1]), y.dtype)
            torch.bmm(v, prepared.transpose(1, 2), out=m)
            rest = None if residual is None else residual[part]
            kernels.winograd_output(m, shape_of(y[part]), bias, rest, out=y[part])
        return y

    def backward(
        self,
        dy: Tensor,
        source: Source,
        sink: Sink,
        shape: Shape,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Gradients:
        prepared = self.prepared(weight, dy.dtype)
        du = torch.zeros_like(prepared, dtype=torch.float32)
        for part in _parts(shape, dy.element_size()):
            x = source(part)
            v = self._windows(x)
            dm = self.workspace.take("m", (*v.shape[:2], dy.shape[1]), dy.dtype)
            kernels.winograd_output_adjoint(dy[part], out=dm)
            du += torch.bmm(dm.transpose(1, 2), v)
            torch.bmm(dm, prepared, out=v)  # the windows are done with: now their gradient
            sink(part, kernels.winograd_input_adjoint(v, shape_of(x), out=x))  # so is x
        dw = kernels.winograd_weight_backward(du, like=weight)
        return Gradients(dw, None if bias is None else kernels.channel_sum(dy))

    def _windows(self, x: Tensor) -> Tensor:
        shape = (16, x.shape[0] * _tiles(shape_of(x)), x.shape[1])
        return kernels.winograd_input(x, out=self.workspace.take("v", shape, x.dtype))


def shape_of(x: Tensor) -> Shape:
    """(b, c, h, w) as plain numbers."""
    b, c, h, w = x.shape
    return b, c, h, w


def _tiles(shape: Shape) -> int:
    """Windows of one picture: 2x2 outputs each."""
    return -(-shape[2] // 2) * -(-shape[3] // 2)


def _parts(shape: Shape, bytes_each: int) -> Iterator[slice]:
    """Slices of the batch whose windows fit the cache together."""
    picture = 16 * _tiles(shape) * shape[1] * bytes_each
    size = max(1, WINDOW_BYTES // picture)
    for start in range(0, shape[0], size):
        yield slice(start, start + size)


def kind_of(conv: nn.Conv2d, winograd: Winograd | None) -> Convolution:
    """How a convolution is run: `winograd`'s way where there is one and it fits and pays."""
    same = (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    wide = min(conv.in_channels, conv.out_channels) >= MIN_WIDTH
    if winograd is not None and same and wide:
        return winograd
    return Direct(conv.kernel_size[0] // 2)


MIN_WIDTH = 64  # channels: below, carrying windows to and fro costs more than the products saved

"""Convolutions as the fast path runs them: the library's own, and Winograd's for 3x3.

Winograd's F(2x2, 3x3) (Lavin & Gray, 1509.09308) computes 2x2 outputs with 16 products where the
sum over the window needs 36. Input windows, weights and outputs are carried into another basis by
additions, and what lies between is 16 matrix products. Bfloat16 rounding enters in that basis too:
about twice the error of a direct convolution in bfloat16.

Both kinds have the same three functions. Features are (b, c, h, w), channels last; weights are the
float32 parameters, brought to the features' precision where they are used.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from undiffuse import kernels

WINDOW_BYTES = 8 * 2**20  # of transformed input at a time: what stays in the last cache


class Gradients(NamedTuple):
    """Of a convolution's input, and (float32) of its weight and bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


@runtime_checkable
class Convolution(Protocol):
    """A 'same' convolution: how to prepare its weight, run it, and run it backwards."""

    def prepared(self, weight: Tensor, x: Tensor) -> Tensor: ...

    def forward(
        self, x: Tensor, prepared: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor: ...

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, prepared: Tensor, bias: Tensor | None
    ) -> Gradients: ...


@dataclass(frozen=True)
class Direct:
    """The library's convolution, with stride 1."""

    padding: int

    def prepared(self, weight: Tensor, x: Tensor) -> Tensor:
        return weight.to(x.dtype)

    def forward(
        self, x: Tensor, prepared: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        y = torch.conv2d(x, prepared, bias, padding=self.padding)
        return y if residual is None else y.add_(residual)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, prepared: Tensor, bias: Tensor | None
    ) -> Gradients:
        sizes = None if bias is None else [bias.shape[0]]
        both = [self.padding, self.padding]
        needed = [True, True, bias is not None]
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy, x, prepared, sizes, [1, 1], both, [1, 1], False, [0, 0], 1, needed
        )
        return Gradients(dx, dw.to(weight.dtype), None if db is None else db.to(weight.dtype))


class Workspace(threading.local):
    """Memory that is used again: fresh pages cost as much time as the sums written to them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Whatever was there before, in this shape. Valid until `name` is taken again."""
        size = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size:
            kept = self._kept[name, dtype] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)


@dataclass(frozen=True)
class Winograd:
    """F(2x2, 3x3), some pictures at a time."""

    workspace: Workspace = field(default_factory=Workspace)

    def prepared(self, weight: Tensor, x: Tensor) -> Tensor:
        return kernels.winograd_weight(weight, x.dtype)

    def forward(
        self, x: Tensor, prepared: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        y = torch.empty(
            (x.shape[0], prepared.shape[1], *x.shape[2:]),
            dtype=x.dtype,
            memory_format=torch.channels_last,
        )
        for part in _parts(x):
            v = self._windows(x[part])
            m = self.workspace.take("m", (*v.shape[:2], len(prepared[0])), x.dtype)
            torch.bmm(v, prepared.transpose(1, 2), out=m)
            rest = None if residual is None else residual[part]
            kernels.winograd_output(m, _shape(y[part]), bias, rest, out=y[part])
        return y

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, prepared: Tensor, bias: Tensor | None
    ) -> Gradients:
        dx = torch.empty_like(x)
        du = torch.zeros_like(prepared, dtype=torch.float32)
        for part in _parts(x):
            v = self._windows(x[part])
            dm = self.workspace.take("m", (*v.shape[:2], dy.shape[1]), dy.dtype)
            kernels.winograd_output_adjoint(dy[part], out=dm)
            du += torch.bmm(dm.transpose(1, 2), v)
            torch.bmm(dm, prepared, out=v)  # the windows are done with: now their gradient
            kernels.winograd_input_adjoint(v, _shape(x[part]), out=dx[part])
        dw = kernels.winograd_weight_backward(du, like=weight)
        return Gradients(dx, dw, None if bias is None else kernels.channel_sum(dy))

    def _windows(self, x: Tensor) -> Tensor:
        shape = (16, x.shape[0] * _tiles(x), x.shape[1])
        return kernels.winograd_input(x, out=self.workspace.take("v", shape, x.dtype))


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    b, c, h, w = x.shape
    return b, c, h, w


def _tiles(x: Tensor) -> int:
    """Windows of one picture: 2x2 outputs each."""
    return -(-x.shape[2] // 2) * -(-x.shape[3] // 2)


def _parts(x: Tensor) -> Iterator[slice]:
    """Slices of the batch whose windows fit the cache together."""
    each = 16 * _tiles(x) * x.shape[1] * x.element_size()
    size = max(1, WINDOW_BYTES // each)
    for start in range(0, x.shape[0], size):
        yield slice(start, start + size)


def kind_of(conv: nn.Conv2d, winograd: Winograd | None) -> Convolution:
    """How a convolution is run: `winograd`'s way where there is one and it fits and pays."""
    same = (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    wide = min(conv.in_channels, conv.out_channels) >= MIN_WIDTH
    if winograd is not None and same and wide:
        return winograd
    return Direct(conv.kernel_size[0] // 2)


MIN_WIDTH = 64  # channels: below, carrying windows to and fro costs more than the products saved

"""conv(act(norm(x))) as one step of the backward pass, which keeps x and computes the rest again.

A block written layer by layer keeps three tensors for its backward pass: what the norm, the
activation and the convolution read. The last two follow from the first and two numbers per group,
in one cheap pass.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from undiffuse import kernels
from undiffuse.fast._convolution import Convolution, shape_of
from undiffuse.kernels import Act


@dataclass(frozen=True)
class Recipe:
    """The constants of one norm, activation and convolution."""

    groups: int
    eps: float
    act: Act
    conv: Convolution
    dropout: float = 0.0


class NormAct(torch.autograd.Function):
    """act(norm(x)), which keeps x and two numbers per group."""

    @staticmethod
    def forward(
        ctx: Any, groups: int, eps: float, act: Act, x: Tensor, gain: Tensor, offset: Tensor
    ) -> Tensor:
        a, stats = kernels.norm_act(x, gain, offset, groups, eps, act)
        ctx.act = act
        ctx.save_for_backward(x, stats, gain, offset)
        return a

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator renames
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, stats, gain, offset = ctx.saved_tensors
        dy = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        d = kernels.norm_act_backward(dy, x, stats, gain, offset, ctx.act, None, None, None)
        return None, None, None, d.x, d.weight, d.bias


class Heard(NamedTuple):
    """What the block hears of the noise level: float32 (b, c) each, `add` before the norm."""

    add: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def of(self, part: slice) -> "Heard":
        """What some pictures of the batch hear."""
        return Heard(*(None if rows is None else rows[part] for rows in self))


NOTHING = Heard()


class NormActConv(torch.autograd.Function):
    """conv(act(norm(x + add) * (1 + scale) + shift)) + residual."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        x: Tensor,
        gain: Tensor,
        offset: Tensor,
        add: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        mask = _mask(x, recipe.dropout)
        stats = x.new_empty((len(x), recipe.groups, 2), dtype=torch.float32)
        heard = Heard(add, scale, shift)

        def activated(part: slice) -> Tensor:
            a, stats[part] = kernels.norm_act(
                x[part], gain, offset, recipe.groups, recipe.eps, recipe.act, *heard.of(part)
            )
            return _dropped(a, None if mask is None else mask[part], recipe.dropout)

        prepared = recipe.conv.prepared(weight, x.dtype)
        y = recipe.conv.forward(activated, shape_of(x), prepared, bias, residual)
        ctx.recipe = recipe
        ctx.save_for_backward(x, stats, gain, offset, *heard, weight, bias, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator renames
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, stats, gain, offset, add, scale, shift, weight, bias, mask = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        dy = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        heard, dx = Heard(add, scale, shift), torch.empty_like(x)
        slopes: list[kernels.Gradients] = []

        def activated(part: slice) -> Tensor:
            known = stats[part], gain, offset, recipe.act
            a = kernels.norm_act_again(x[part], *known, *heard.of(part))
            return _dropped(a, None if mask is None else mask[part], recipe.dropout)

        def through_norm(part: slice, da: Tensor) -> None:
            da = _dropped(da, None if mask is None else mask[part], recipe.dropout)
            known = x[part], stats[part], gain, offset, recipe.act, *heard.of(part)
            slopes.append(kernels.norm_act_backward(da, *known, out=dx[part]))

        shape = shape_of(x)
        dweight, dbias = recipe.conv.backward(dy, activated, through_norm, shape, weight, bias)
        dgain, doffset = (reduce(torch.add, parts) for parts in _columns(slopes, 1, 3))
        dheard = (_joined(parts) for parts in _columns(slopes, 3, 6))
        residual = dy if ctx.needs_input_grad[9] else None
        return None, dx, dgain, doffset, *dheard, dweight, dbias, residual


def _columns(slopes: list[kernels.Gradients], first: int, end: int) -> list[list[Any]]:
    return [[part[i] for part in slopes] for i in range(first, end)]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _mask(a: Tensor, dropout: float) -> Tensor | None:
    """Which features stay; None without dropout."""
    if dropout == 0.0:
        return None
    return torch.empty_like(a, dtype=torch.bool).bernoulli_(1 - dropout)


def _dropped(a: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """What stays, scaled so that its mean is what it was; in place."""
    return a if mask is None else a.mul_(mask).mul_(1 / (1 - dropout))

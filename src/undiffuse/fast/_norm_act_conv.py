"""conv(act(norm(x))) as one step of the backward pass, which keeps x and computes the rest again.

A block written layer by layer keeps three tensors for its backward pass: what the norm, the
activation and the convolution read. The last two follow from the first and two numbers per group,
in one cheap pass.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse import kernels
from undiffuse.fast._convolution import Convolution
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
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, gain, offset = ctx.saved_tensors
        dy = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        d = kernels.norm_act_backward(dy, x, stats, gain, offset, ctx.act, None, None, None)
        return None, None, None, d.x, d.weight, d.bias


class Heard(NamedTuple):
    """What the block hears of the noise level: float32 (b, c) each, `add` before the norm."""

    add: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


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
        a, stats = kernels.norm_act(
            x, gain, offset, recipe.groups, recipe.eps, recipe.act, add, scale, shift
        )
        mask = _mask(a, recipe.dropout)
        if mask is not None:
            a *= mask
        ctx.recipe = recipe
        ctx.save_for_backward(x, stats, gain, offset, add, scale, shift, weight, bias, mask)
        return recipe.conv.forward(a, recipe.conv.prepared(weight, a), bias, residual)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, gain, offset, add, scale, shift, weight, bias, mask = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        dy = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        a = kernels.norm_act_again(x, stats, gain, offset, recipe.act, add, scale, shift)
        if mask is not None:
            a *= mask
        prepared = recipe.conv.prepared(weight, a)
        da, dweight, dbias = recipe.conv.backward(dy, a, weight, prepared, bias)
        if mask is not None:
            da *= mask
        d = kernels.norm_act_backward(da, x, stats, gain, offset, recipe.act, add, scale, shift)
        residual = dy if ctx.needs_input_grad[9] else None
        first = (None, d.x, d.weight, d.bias, d.add, d.scale, d.shift)
        return (*first, dweight, dbias, residual)


def _mask(a: Tensor, dropout: float) -> Tensor | None:
    """0 or 1 / (1 - dropout) for every feature; None without dropout."""
    if dropout == 0.0:
        return None
    return torch.empty_like(a).bernoulli_(1 - dropout).div_(1 - dropout)

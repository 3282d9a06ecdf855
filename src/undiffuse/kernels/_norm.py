"""Group norm, the injected noise level and the activation in one pass."""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.kernels import _arguments as check
from undiffuse.kernels._arguments import address, is_bf16
from undiffuse.kernels._library import library, threads


class Act(IntEnum):
    """What follows the norm. GELU is the exact form, with the error function."""

    NONE = 0
    SILU = 1
    GELU = 2
    RELU = 3


class Gradients(NamedTuple):
    """Of `norm_act`'s arguments; None for those that were None."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    add: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    act: Act,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = act(norm(x + add) * (1 + scale) + shift), norm with `weight` and `bias` in it.

    Args:
        x: (b, c, h, w), channels_last, bfloat16 or float32; statistics are float32.
        weight, bias: (c) float32.
        groups: divides c; mean and (population) variance are taken per group of channels.
        eps: added to the variance, not negative.
        add, scale, shift: (b, c) float32; scale and shift together or not at all.

    Returns:
        y like x, and the statistics (b, groups, 2) float32: mean and 1 / sqrt(variance + eps).

    Raises:
        ConfigError: an argument has another shape, type, device or memory format.
    """
    _check(x, weight, bias, add, scale, shift)
    if groups < 1 or x.shape[1] % groups:
        raise ConfigError(f"groups must divide the {x.shape[1]} channels of x; got {groups}")
    if not eps >= 0.0:
        raise ConfigError(f"eps must not be negative; got {eps}")
    stats = x.new_empty((x.shape[0], groups, 2), dtype=torch.float32)
    return _forward(x, stats, eps, weight, bias, act, add, scale, shift), stats


def norm_act_again(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: Act,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The same y as `norm_act` gave with these `stats`, to the bit, in one pass over x.

    Raises:
        ConfigError: an argument has another shape, type, device or memory format.
    """
    _check(x, weight, bias, add, scale, shift)
    _check_stats(stats, x)
    return _forward(x, stats, -1.0, weight, bias, act, add, scale, shift)


def norm_act_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: Act,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Gradients:
    """Gradients of sum(dy * y) for all that y depends on; float32 except that of x.

    Args:
        out: like x; where its gradient is written.

    Raises:
        ConfigError: an argument has another shape, type, device or memory format.
    """
    _check(x, weight, bias, add, scale, shift)
    _check_stats(stats, x)
    check.alike("dy", dy, x)
    b, c, h, w = x.shape
    if out is not None:
        check.alike("out", out, x)
    dx = torch.empty_like(x, memory_format=check.LAST) if out is None else out
    du, dun = x.new_empty((2, b, c), dtype=torch.float32).unbind()
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    dadd = None if add is None else torch.empty_like(add)
    dscale = None if scale is None else torch.empty_like(scale)
    library().undiffuse_norm_act_backward(
        is_bf16(x), act, threads(), b, h * w, c, stats.shape[1],
        dy.data_ptr(), x.data_ptr(), dx.data_ptr(), stats.data_ptr(),
        weight.data_ptr(), bias.data_ptr(), address(add), address(scale), address(shift),
        du.data_ptr(), dun.data_ptr(), dweight.data_ptr(), dbias.data_ptr(),
        address(dadd), address(dscale),
    )  # fmt: skip
    return Gradients(dx, dweight, dbias, dadd, dscale, None if shift is None else du)


def _forward(
    x: Tensor,
    stats: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    act: Act,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """A negative eps says that `stats` are known."""
    b, c, h, w = x.shape
    y = torch.empty_like(x, memory_format=check.LAST)
    library().undiffuse_norm_act(
        is_bf16(x), act, threads(), b, h * w, c, stats.shape[1], eps,
        x.data_ptr(), y.data_ptr(), stats.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        address(add), address(scale), address(shift),
    )  # fmt: skip
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    check.features("x", x)
    b, c = x.shape[:2]
    check.dense("weight", weight, (c,), torch.float32)
    check.dense("bias", bias, (c,), torch.float32)
    for name, row in (("add", add), ("scale", scale), ("shift", shift)):
        if row is not None:
            check.dense(name, row, (b, c), torch.float32)
    if (scale is None) != (shift is None):
        raise ConfigError("scale and shift must be given together; got only one of them")


def _check_stats(stats: Tensor, x: Tensor) -> None:
    groups = stats.shape[1] if stats.dim() == 3 else 0
    if groups < 1 or x.shape[1] % groups:
        raise ConfigError(
            f"stats must have shape (b, groups, 2), groups dividing the {x.shape[1]} channels "
            f"of x; got {tuple(stats.shape)}"
        )
    check.dense("stats", stats, (x.shape[0], groups, 2), torch.float32)

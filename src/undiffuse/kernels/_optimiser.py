"""One pass over the parameters per training step, instead of eight."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.kernels import _arguments as check
from undiffuse.kernels._library import library, threads


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    ema: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    ema_weight: float,
) -> None:
    """A step of `torch.optim.AdamW` and of the weights' moving average, all in place.

    ema += ema_weight * (params - ema), with the new params. Gradients are only read.

    Args:
        params, grads, exp_avg, exp_avg_sq, ema: float32 on the CPU; those of one index have the
            same size and the same layout, without gaps.
        step: 1 at the first step (bias correction).
        grad_scale: every gradient is multiplied by this: min(1, limit / norm) clips.

    Raises:
        ConfigError: lists or tensors do not fit each other; nothing has been changed then.
    """
    lists = (params, grads, exp_avg, exp_avg_sq, ema)
    names = ("params", "grads", "exp_avg", "exp_avg_sq", "ema")
    for name, tensors in zip(names, lists, strict=True):
        _check(name, tensors, params)
    if step < 1:
        raise ConfigError(f"step must be at least 1; got {step}")
    library().undiffuse_adamw_ema(
        threads(), len(params), _sizes(params), *(_addresses(tensors) for tensors in lists),
        lr, beta1, beta2, eps, weight_decay, step, grad_scale, ema_weight,
    )  # fmt: skip
    # Whoever keeps something made of these tensors sees by their versions that they have changed.
    torch.autograd.graph.increment_version([*params, *exp_avg, *exp_avg_sq, *ema])


def squared_norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements: float64, 0-d; the same for any number of threads.

    Raises:
        ConfigError: a tensor is not float32 on the CPU, or has gaps.
    """
    _check("grads", grads, grads)
    total = library().undiffuse_squared_norm(
        threads(), len(grads), _sizes(grads), _addresses(grads)
    )
    return torch.tensor(total, dtype=torch.float64)


def _check(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    if len(tensors) != len(like):
        raise ConfigError(
            f"{name} must have as many tensors as params, {len(like)}; got {len(tensors)}"
        )
    for i, (tensor, other) in enumerate(zip(tensors, like, strict=True)):
        check.on_cpu(f"{name}[{i}]", tensor)
        if tensor.dtype != torch.float32:
            raise ConfigError(f"{name}[{i}] must be float32; got {tensor.dtype}")
        if tensor is other:
            _check_dense(f"{name}[{i}]", tensor)
        elif not _same_layout(tensor, other):
            raise ConfigError(
                f"{name}[{i}] must be laid out as params[{i}], {tuple(other.shape)} with strides "
                f"{other.stride()}; got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """The stride of an axis of one element says nothing."""
    if a.shape != b.shape:
        return False
    steps = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.stride() == b.stride() or all(p == q or n == 1 for n, p, q in steps)


def _check_dense(name: str, tensor: Tensor) -> None:
    """The elements fill one run of memory, in whatever order."""
    expected = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and step != expected and tensor.numel():
            raise ConfigError(
                f"{name} must fill its memory without gaps; got {tuple(tensor.shape)} with "
                f"strides {tensor.stride()}"
            )
        expected *= size


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(tensors))(*(tensor.numel() for tensor in tensors))


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))

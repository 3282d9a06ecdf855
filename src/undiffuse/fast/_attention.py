"""Exact attention in blocks of queries, so that memory stays linear in the number of positions.

torch's fused kernel for processors works on small tiles with float32 sums; two batched matrix
products per block of queries run at the speed of the machine's matrix unit. A block meets all its
keys at once, so its softmax is complete and nothing has to be rescaled afterwards, and the backward
pass computes the scores again instead of keeping them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Heads = Float[Tensor, "b n d"]  # batch times heads, positions, channels of a head

SCORES = 4 * 2**20  # numbers in a block's matrix of scores


def attention(
    q: Heads, k: Float[Tensor, "b m d"], v: Float[Tensor, "b m d"]
) -> Float[Tensor, "b n d"]:
    """softmax(q k^T / sqrt(d)) v, with gradients, never storing all n * m scores at once."""
    if torch.is_grad_enabled():
        return _Attention.apply(q, k, v)
    return _forward(q, k, v)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    for rows in _blocks(q, k):
        torch.bmm(_weights(q[:, rows], k), v, out=out[:, rows])
    return out


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Each query's distribution over the keys."""
    scale = q.shape[-1] ** -0.5
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    return scores.softmax(dim=-1)


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    size = max(16, SCORES // (q.shape[0] * k.shape[1]))
    for start in range(0, q.shape[1], size):
        yield slice(start, start + size)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return _forward(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator renames
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (dout,) = grad_outputs
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))  # sums over blocks
        for rows in _blocks(q, k):
            p, dy = _weights(q[:, rows], k), dout[:, rows]
            dv += torch.bmm(p.transpose(1, 2), dy)
            dp = torch.bmm(dy, v.transpose(1, 2))
            # through softmax: p * (dp - sum(p * dp)), then the scale of the scores
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype) * q.shape[-1] ** -0.5
            torch.bmm(ds, k, out=dq[:, rows])
            dk += torch.bmm(ds.transpose(1, 2), q[:, rows])
        return dq, dk.to(k.dtype), dv.to(v.dtype)

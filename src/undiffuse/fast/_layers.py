"""Every layer's fast form. `Fast` is what `UNet.forward` takes as `run`.

Parameters stay the network's own float32 ones; features are bfloat16 and channels last from the
first convolution to the last. With gradients switched on, weights are rounded where they are used
and gradients arrive in float32, so training needs to know nothing. Without, the rounded and
repacked weights are kept until a parameter changes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse import kernels
from undiffuse.fast._attention import attention
from undiffuse.fast._convolution import Winograd, kind_of, shape_of
from undiffuse.fast._norm_act_conv import (
    NOTHING,
    Heard,
    NormAct,
    NormActConv,
    Recipe,
)
from undiffuse.fast._packed import Packed
from undiffuse.kernels import Act
from undiffuse.spec import Activation, Inject, Order
from undiffuse.unet import (
    AttentionBlock,
    Downsample,
    Head,
    ResBlock,
    RMSNorm,
    TimestepEmbedding,
    Upsample,
    call,
    remember,
    resample,
)

ACTS = {Activation.SILU: Act.SILU, Activation.GELU: Act.GELU, Activation.RELU: Act.RELU}


class Fast:
    """run(layer, *inputs) -> output, with kernels where there is one and autocast elsewhere."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, winograd: bool = True) -> None:
        """`dtype` of features inside; `winograd`: 3x3 convolutions by F(2x2, 3x3)."""
        self.dtype, self.winograd = dtype, Winograd() if winograd else None
        self.packed = Packed(dtype, self.winograd)
        self.forms: dict[type[nn.Module], Callable[..., Tensor]] = {
            nn.Conv2d: self._conv,
            ResBlock: self._res,
            AttentionBlock: self._attention,
            Upsample: self._up,
            Downsample: self._down,
            Head: self._head,
            TimestepEmbedding: self._embedding,
        }

    def __call__(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # the precision of every number is settled here
            with torch.autocast("cpu", enabled=False):
                return self(layer, *inputs)
        return self.forms.get(type(layer), self._plain)(layer, *inputs)

    def _plain(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if next(layer.parameters(), None) is None:
            return call(layer, *inputs)
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not torch.float32):
            return call(layer, *inputs).to(self.dtype)

    def _embedding(
        self,
        layer: TimestepEmbedding,
        timestep: Tensor,
        label: Tensor | None,
        _: torch.dtype,
        augment: Tensor | None = None,
    ) -> Tensor:
        """In float32, and once where all pictures share the level, as when sampling."""
        if augment is not None or timestep.stride(0) or (label is not None and label.stride(0)):
            return layer(timestep, label, torch.float32, augment)
        row = layer(timestep[:1], None if label is None else label[:1], torch.float32)
        return row.expand(len(timestep), -1)

    def _res(self, block: ResBlock, x: Tensor, emb: Tensor) -> Tensor:
        style, norm1, norm2 = block.style, block.norm1, block.norm2
        if isinstance(norm1, RMSNorm) or isinstance(norm2, RMSNorm):
            return self._plain(block, x, emb)
        if style.order is not Order.NORM_ACT_CONV:
            return self._plain(block, x, emb)
        x, act = self._laid_out(x), ACTS[style.activation]
        if block.resize is None:
            h = self._norm_act_conv(norm1, block.conv1, x, act)
        else:
            h = resample(self._norm_act(norm1, x, act), block.resize)
            h = self._laid_out(self._conv(block.conv1, h))
        rest = resample(x, block.resize)
        if isinstance(block.shortcut, nn.Conv2d):
            rest = self._conv(block.shortcut, rest)
        dropout = block.dropout.p if block.training else 0.0
        heard = _heard(block, emb)
        h = self._norm_act_conv(norm2, block.conv2, h, act, heard, rest, dropout)
        return h if style.skip_gain == 1.0 else h * style.skip_gain

    def _attention(self, block: AttentionBlock, x: Tensor) -> Tensor:
        x = self._laid_out(x)
        match block.norm:
            case nn.GroupNorm():
                qkv = self._norm_act_conv(block.norm, block.qkv, x, Act.NONE)
            case _:
                qkv = self._conv(block.qkv, block.norm(x))
        b, _, height, width = x.shape
        rows = qkv.movedim(1, -1).reshape(b, height * width, 3, block.heads, -1)
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
        k, v = remember(block.memory, k, v)
        h = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        h = h.unflatten(0, (b, block.heads)).transpose(1, 2).reshape(b, height, width, -1)
        h = self._conv(block.proj, h.movedim(-1, 1), x)
        return h if block.skip_gain == 1.0 else h * block.skip_gain

    def _up(self, layer: Upsample, x: Tensor) -> Tensor:
        if not isinstance(layer.conv, nn.Conv2d):  # nothing learned, or a transposed convolution
            return self._plain(layer, x)
        x, conv = self._laid_out(x), layer.conv
        if _frozen():
            small = self.packed.kept(conv.weight, "phases", lambda w: phases(w).to(self.dtype))
        else:
            small = phases(conv.weight).to(x.dtype)
        bias = None if conv.bias is None else conv.bias.to(x.dtype).repeat(4)
        return interleaved(torch.conv2d(x, small, bias, padding=1))

    def _down(self, layer: Downsample, x: Tensor) -> Tensor:
        x = layer.before(self._laid_out(x))
        return x if layer.conv is None else self._conv(layer.conv, x)

    def _head(self, layer: Head, x: Tensor) -> Tensor:
        x = self._laid_out(x)
        match layer.norm:
            case None:
                y = self._conv(layer.conv, x)
            case nn.GroupNorm():
                y = self._norm_act_conv(layer.norm, layer.conv, x, Act.SILU)
            case _:
                y = self._conv(layer.conv, F.silu(layer.norm(x)))
        return y.float()

    def _conv(self, conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self._laid_out(x)
        if _frozen():
            return self.packed.conv(conv, lambda part: x[part], shape_of(x), residual)
        bias = None if conv.bias is None else conv.bias.to(x.dtype)
        y = torch.conv2d(x, conv.weight.to(x.dtype), bias, conv.stride, conv.padding)
        return y if residual is None else y + residual

    def _norm_act(self, norm: nn.GroupNorm, x: Tensor, act: Act) -> Tensor:
        if _frozen():
            return kernels.norm_act(x, norm.weight, norm.bias, norm.num_groups, norm.eps, act)[0]
        return NormAct.apply(norm.num_groups, norm.eps, act, x, norm.weight, norm.bias)

    def _norm_act_conv(
        self,
        norm: nn.GroupNorm,
        conv: nn.Conv2d,
        x: Tensor,
        act: Act,
        heard: Heard = NOTHING,
        residual: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        groups, eps = norm.num_groups, norm.eps
        if _frozen():
            gain, offset = norm.weight, norm.bias

            def activated(part: slice) -> Tensor:
                given = (gain, offset, groups, eps, act)
                return kernels.norm_act(x[part], *given, *heard.of(part))[0]

            return self.packed.conv(conv, activated, shape_of(x), residual)
        recipe = Recipe(groups, eps, act, kind_of(conv, self.winograd), dropout)
        return NormActConv.apply(
            recipe, x, norm.weight, norm.bias, *heard, conv.weight, conv.bias, residual
        )

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)


def _frozen() -> bool:
    """Nothing will ask for gradients: weights may be packed."""
    return not torch.is_grad_enabled()


def _heard(block: ResBlock, emb: Tensor) -> Heard:
    """What the block adds before its second norm, or multiplies and adds after it."""
    shared = emb.stride(0) == 0
    parts = block.time_proj(emb[:1] if shared else emb)
    parts = parts.expand(len(emb), -1) if shared else parts
    if block.style.inject is Inject.ADD:
        return Heard(add=parts.contiguous())
    scale, shift = (part.contiguous() for part in parts.chunk(2, dim=1))
    return Heard(scale=scale, shift=shift)


# Nearest neighbour makes 2x2 copies of a value, and a 3x3 window on them holds only 2x2 different
# ones: rows (i-1, i) or (i, i+1) of the small picture, by the parity of the output's row. So the
# same numbers come from four 2x2 convolutions on the small picture, with 16 products where the
# large one has 36.
TAPS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))  # (parity, 2, 3)


def phases(weight: Float[Tensor, "d c 3 3"]) -> Float[Tensor, "4*d c 2 2"]:
    """The small kernels of doubling and a 3x3 convolution: (row parity, column parity, d) each."""
    taps = weight.new_tensor(TAPS)
    return torch.einsum("aik,bjl,dckl->abdcij", taps, taps, weight).flatten(0, 2)


def interleaved(z: Float[Tensor, "b e y x"]) -> Float[Tensor, "b d 2*y-2 2*x-2"]:
    """The four convolutions' outputs, e = 4d, at the pixels they belong to."""
    height, width = z.shape[2] - 1, z.shape[3] - 1
    quarters = z.movedim(1, -1).unflatten(-1, (2, 2, -1))  # b h+1 w+1 parity parity d
    parts = [quarters[:, a : a + height, b : b + width, a, b] for a in (0, 1) for b in (0, 1)]
    y = torch.stack(parts, dim=3).unflatten(3, (2, 2)).transpose(2, 3)  # b h 2 w 2 d
    return y.reshape(len(z), 2 * height, 2 * width, -1).movedim(-1, 1)

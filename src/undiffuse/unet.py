"""The network: one layer per op, and a forward pass that is the program.

Features have shape (batch, channels, height, width). The network knows neither noise nor
diffusion: it gets a picture, one number per picture (`timestep`) and perhaps a class label.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from undiffuse.errors import ConfigError
from undiffuse.spec import (
    Act,
    Activation,
    Attn,
    Concat,
    Conv,
    Down,
    Downsampling,
    Embedding,
    Inject,
    Join,
    LinearAttn,
    Norm,
    Order,
    Out,
    Res,
    Resize,
    Site,
    Skip,
    Style,
    UNetSpec,
    Up,
    Upsampling,
    groups_of,
    inner_width,
    trace,
)

Features = Float[Tensor, "b c h w"]
Changed = Float[Tensor, "b d y x"]  # other channels, another size, or both

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.RELU: F.relu,
}


def call(layer: nn.Module, *inputs: Any) -> Tensor:
    """Run a layer as it is written."""
    return layer(*inputs)


class UNet(nn.Module):
    """A network built from a `UNetSpec`; weights are named `layers.<site name>.<part>`."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stride = spec.stride
        sites = list(trace(spec))
        hears = any(isinstance(site.op, Res) for site in sites)
        self.embedding = TimestepEmbedding(spec.style.embedding) if hears else None
        self.layers = nn.ModuleDict({site.name: build(site, spec.style) for site in sites})

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        timestep: Shaped[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
        run: Callable[..., Tensor] = call,
        augment: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b d h w"]:
        """Run the program.

        Args:
            x: any height and width; sizes that cannot be halved are padded inside.
            timestep: what the network is told about the noise: any real number per picture.
            label: 0 ... classes - 1; classes means "no class" where the spec has a null row.
            run: run(layer, *inputs) -> output; a faster or more frugal way to the same numbers.
            augment: in training, how each picture was transformed; zeros, or None, say "not at
                all", as for every generated picture.

        Raises:
            ConfigError: shapes, dtypes or labels do not fit this network.
        """
        check_inputs(self.spec, x, timestep, label, augment)
        height, width = x.shape[-2:]
        h = pad_to_multiple(x, self.stride)
        emb = None
        if self.embedding is not None:
            emb = run(self.embedding, timestep, label, h.dtype, augment)
        skips: list[Tensor] = []
        for layer in self.layers.values():
            if isinstance(layer, PushSkip):
                skips.append(run(layer, h))
            elif isinstance(layer, ConcatSkip):
                h = run(layer, h, skips.pop())
            elif isinstance(layer, ResBlock):
                h = run(layer, h, emb)
            else:
                h = run(layer, h)
        return h[..., :height, :width]


def build(site: Site, style: Style) -> nn.Module:
    """The layer of one op."""
    match site.op:
        case Conv(width, kernel):
            return nn.Conv2d(site.in_width, width, kernel, padding=kernel // 2)
        case Res(width, resize):
            return ResBlock(site.in_width, width, style, resize)
        case Attn():
            return AttentionBlock(site.in_width, site.op, style)
        case LinearAttn():
            return LinearAttentionBlock(site.in_width, site.op, style)
        case Down(by):
            return Downsample(site.in_width, site.out_width, by)
        case Up(by):
            return Upsample(site.in_width, site.out_width, by)
        case Act(by):
            return Activate(by)
        case Skip():
            return PushSkip()
        case Concat(by):
            return ConcatSkip(by)
        case Out(kernel, norm):
            return Head(site.in_width, site.out_width, kernel, norm, style)


class TimestepEmbedding(nn.Module):
    """timestep (b) [and label (b), and augmentation parameters (b, k)] -> vector (b, out) that
    every residual block hears."""

    frequencies: Tensor

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.options = embedding
        self.register_buffer("frequencies", frequencies_of(embedding), persistent=False)
        self.linear1 = nn.Linear(embedding.width, embedding.hidden)
        self.linear2 = nn.Linear(embedding.hidden, embedding.out)
        rows = embedding.classes + int(embedding.null)
        width = embedding.width if embedding.label_first else embedding.out
        self.labels = nn.Embedding(rows, width) if rows else None
        self.augment = augment_map(embedding)

    def forward(
        self,
        timestep: Shaped[Tensor, "b"],
        label: Int[Tensor, "b"] | None,
        dtype: torch.dtype,
        augment: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b e"]:
        emb = self.sinusoid(timestep).to(dtype)
        if self.augment is not None and augment is not None:
            emb = emb + F.linear(augment.to(dtype), self.augment)
        if self.options.label_first:
            emb = self._labelled(emb, timestep, label)
        emb = self.linear2(ACTIVATIONS[self.options.activation](self.linear1(emb)))
        if not self.options.label_first:
            emb = self._labelled(emb, timestep, label)
        if self.options.final_activation is not None:
            emb = ACTIVATIONS[self.options.final_activation](emb)
        return emb

    def sinusoid(self, timestep: Shaped[Tensor, "b"]) -> Float[Tensor, "b w"]:
        """sin and cos of timestep times each frequency (1706.03762, section 3.5).

        In float32 whatever the network's precision: timestep 999 has no exact bfloat16.
        """
        angles = timestep.float()[:, None] * self.frequencies.float()
        halves = (angles.sin(), angles.cos())
        emb = torch.cat(halves if self.options.sin_first else halves[::-1], dim=1)
        return F.pad(emb, (0, self.options.width % 2))

    def _labelled(self, emb: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        if self.labels is None:
            return emb
        return emb + self._rows(self.labels, self._or_null(label, timestep))

    def _or_null(self, label: Tensor | None, timestep: Tensor) -> Tensor:
        if label is not None:
            return label.long()
        return torch.full_like(timestep, self.options.classes, dtype=torch.int64)

    def _rows(self, table: nn.Embedding, label: Tensor) -> Tensor:
        # Asking for the largest label first would make a GPU wait at every step; the table
        # itself complains on the CPU.
        try:
            return table(label)
        except IndexError as error:
            null = f", or {self.options.classes} for no class" if self.options.null else ""
            raise ConfigError(
                f"label must be in 0…{self.options.classes - 1}{null}; got {label.tolist()}"
            ) from error

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "TimestepEmbedding":
        """Let the frequencies move with the layer but never round them, as `.bfloat16()` would:
        at timestep 999 an error of 2^-9 is an angle of two radians."""
        exact = self.frequencies
        super()._apply(fn, recurse)
        if not exact.is_meta:
            self.frequencies = exact.to(self.frequencies.float())
        return self


def augment_map(embedding: Embedding) -> nn.Parameter | None:
    """The map of the augmentation parameters, or nothing. It starts at zero, and no number is
    drawn for it: with and without it a network starts as the same function."""
    if not embedding.augment:
        return None
    return nn.Parameter(torch.zeros(embedding.width, embedding.augment))


def frequencies_of(embedding: Embedding) -> Float[Tensor, "half"]:
    """The sinusoid's frequencies: they follow from the spec, so files do not hold them."""
    half = embedding.width // 2
    steps = half - 1 if embedding.half_minus_one else half
    k = torch.arange(half, dtype=torch.float32)
    # The same numbers but for the last bit. At timestep 999 that bit is an angle of 6e-5, so a
    # network only gives its trained outputs to the last digit when it is rounded as in training.
    if embedding.divide_last:
        return torch.exp(k * -math.log(10_000.0) / steps)
    return torch.exp(k * (-math.log(10_000.0) / steps))


class ResBlock(nn.Module):
    """x + f(x, emb), f two convolutions with the noise level injected between them.

    DDPM's block (2006.11239) with the variations that `Style` names. At zero initialisation of
    `conv2` the block starts as its shortcut.
    """

    def __init__(self, in_width: int, out_width: int, style: Style, resize: Resize | None) -> None:
        super().__init__()
        self.style, self.resize = style, resize
        norm_first = style.order is Order.NORM_ACT_CONV
        both = 2 if style.inject is Inject.SCALE_SHIFT else 1
        self.norm1 = norm_layer(in_width if norm_first else out_width, style)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.time_proj = nn.Linear(style.embedding.out, both * out_width)
        self.norm2 = norm_layer(out_width, style)
        self.dropout = nn.Dropout(style.dropout)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        projected = in_width != out_width or (resize is not None and style.project_resized)
        self.shortcut = nn.Conv2d(in_width, out_width, 1) if projected else nn.Identity()
        if style.zero_init:
            zero_(self.conv2)

    def forward(self, x: Features, emb: Float[Tensor, "b e"]) -> Changed:
        act = ACTIVATIONS[self.style.activation]
        parts = self.time_proj(emb)[..., None, None].chunk(self._injected(), dim=1)
        match self.style.order:
            case Order.NORM_ACT_CONV:
                h = self.conv1(resample(norm_act(self.norm1, x, act), self.resize))
                h = self._inject_norm_act(self.norm2, h, parts, act)
                h = self.conv2(self.dropout(h))
            case Order.CONV_NORM_ACT:
                h = self.conv1(resample(x, self.resize))
                h = self._inject_norm_act(self.norm1, h, parts, act)
                h = norm_act(self.norm2, self.conv2(self.dropout(h)), act)
            case Order.CONV_ACT_NORM:
                h = self.norm1(act(self.conv1(resample(x, self.resize))))
                h = h * (1 + parts[0]) + parts[1] if len(parts) == 2 else h + parts[0]
                h = self.norm2(act(self.conv2(self.dropout(h))))
        h = self.shortcut(resample(x, self.resize)) + h
        return h if self.style.skip_gain == 1.0 else h * self.style.skip_gain

    def _injected(self) -> int:
        return 2 if self.style.inject is Inject.SCALE_SHIFT else 1

    def _inject_norm_act(
        self,
        norm: nn.Module,
        h: Tensor,
        parts: tuple[Tensor, ...],
        act: Callable[[Tensor], Tensor],
    ) -> Tensor:
        if len(parts) == 1:
            return norm_act(norm, h + parts[0], act)
        scale, shift = parts
        return act(norm(h) * (1 + scale) + shift)


class AttentionBlock(nn.Module):
    """x + proj(attention(norm(x))) over all h*w positions.

    Rows of `qkv` are ordered (query, key, value)(head)(channel); `memory`, if the op has any,
    (key, value)(head)(entry)(channel).
    """

    def __init__(self, width: int, op: Attn, style: Style) -> None:
        super().__init__()
        self.heads, self.skip_gain = op.heads, style.skip_gain
        inner = inner_width(op, width)
        self.norm = norm_layer(width, style) if op.norm else nn.Identity()
        self.qkv = nn.Conv2d(width, 3 * inner, 1, bias=op.bias)
        self.memory = memory_of(op, inner)
        self.proj = nn.Conv2d(inner, width, 1)
        if style.zero_init:
            zero_(self.proj)

    def forward(self, x: Features) -> Features:
        b, _, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, height * width)
        # The fused kernels want the channels of a head next to each other; without the copy
        # torch falls back to one that stores all n² scores.
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)
        k, v = remember(self.memory, k, v)
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.proj(h.transpose(-1, -2).reshape(b, -1, height, width))
        return x + h if self.skip_gain == 1.0 else (x + h) * self.skip_gain


class LinearAttentionBlock(nn.Module):
    """x + norm(proj(attention(norm(x)))) at a cost linear in the number of positions.

    Softmax is taken of the queries over channels and of the keys over positions, so that keys and
    values meet first, in one small matrix per head (1812.01243; denoising-diffusion-pytorch).
    Rows of `qkv` and of `memory` are ordered as in `AttentionBlock`.
    """

    def __init__(self, width: int, op: LinearAttn, style: Style) -> None:
        super().__init__()
        self.heads, self.skip_gain = op.heads, style.skip_gain
        inner = inner_width(op, width)
        self.norm = norm_layer(width, style)
        self.qkv = nn.Conv2d(width, 3 * inner, 1, bias=False)
        self.memory = memory_of(op, inner)
        self.proj = nn.Conv2d(inner, width, 1)
        self.proj_norm = norm_layer(width, style)
        if style.zero_init:  # the gain, not `proj`: RMSNorm has no slope at zero
            nn.init.zeros_(self.proj_norm.weight)

    def forward(self, x: Features) -> Features:
        b, _, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        k, v = remember(self.memory, k, v)
        q = q.softmax(dim=-1) * q.shape[-1] ** -0.5
        h = q @ (k.softmax(dim=-2).transpose(-1, -2) @ v)
        h = self.proj_norm(self.proj(h.transpose(-1, -2).reshape(b, -1, height, width)))
        return x + h if self.skip_gain == 1.0 else (x + h) * self.skip_gain


def memory_of(op: Attn | LinearAttn, inner: int) -> nn.Parameter | None:
    """Learned (key, value)(head)(entry)(channel), or nothing."""
    if not op.memory:
        return None
    return nn.Parameter(torch.randn(2, op.heads, op.memory, inner // op.heads))


def remember(memory: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Put the learned keys and values before those of each picture."""
    if memory is None:
        return k, v
    mk, mv = (one.to(k.dtype).expand(k.shape[0], -1, -1, -1) for one in memory)
    return torch.cat((mk, k), dim=2), torch.cat((mv, v), dim=2)


class Downsample(nn.Module):
    """Halve height and width."""

    def __init__(self, in_width: int, out_width: int, by: Downsampling) -> None:
        super().__init__()
        self.by = by
        match by:
            case Downsampling.CONV:
                self.conv = nn.Conv2d(in_width, out_width, 3, stride=2, padding=1)
            case Downsampling.CONV_END:
                self.conv = nn.Conv2d(in_width, out_width, 3, stride=2)
            case Downsampling.CONV4:
                self.conv = nn.Conv2d(in_width, out_width, 4, stride=2, padding=1)
            case Downsampling.UNSHUFFLE:
                self.conv = nn.Conv2d(4 * in_width, out_width, 1)
            case Downsampling.MAX | Downsampling.AVG:
                self.conv = None

    def forward(self, x: Features) -> Changed:
        x = self.before(x)
        return x if self.conv is None else self.conv(x)

    def before(self, x: Features) -> Changed:
        """What happens to the features before the convolution, if there is one."""
        match self.by:
            case Downsampling.MAX:
                x = F.max_pool2d(x, 2)
            case Downsampling.AVG:
                x = F.avg_pool2d(x, 2)
            case Downsampling.CONV_END:
                x = F.pad(x, (0, 1, 0, 1))
            case Downsampling.UNSHUFFLE:
                x = F.pixel_unshuffle(x, 2)
            case Downsampling.CONV | Downsampling.CONV4:
                pass
        return x


class Upsample(nn.Module):
    """Double height and width."""

    def __init__(self, in_width: int, out_width: int, by: Upsampling) -> None:
        super().__init__()
        self.doubles = by is not Upsampling.DECONV4
        match by:
            case Upsampling.NEAREST:
                self.conv = nn.Identity()
            case Upsampling.NEAREST_CONV:
                self.conv = nn.Conv2d(in_width, out_width, 3, padding=1)
            case Upsampling.DECONV4:
                self.conv = nn.ConvTranspose2d(in_width, out_width, 4, stride=2, padding=1)

    def forward(self, x: Features) -> Changed:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.doubles else x)


class Head(nn.Module):
    """The last op: (norm, SiLU,) convolution to the output channels.

    SiLU whatever the blocks use, as in all the peers.
    """

    def __init__(
        self, in_width: int, out_channels: int, kernel: int, norm: bool, style: Style
    ) -> None:
        super().__init__()
        self.norm = norm_layer(in_width, style) if norm else None
        self.conv = nn.Conv2d(in_width, out_channels, kernel, padding=kernel // 2)
        if style.zero_init:
            zero_(self.conv)

    def forward(self, x: Features) -> Changed:
        if self.norm is not None:
            x = norm_act(self.norm, x, F.silu)
        return self.conv(x)


class Activate(nn.Module):
    """A bare activation."""

    def __init__(self, by: Activation) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Features) -> Features:
        return ACTIVATIONS[self.by](x)


class PushSkip(nn.Identity):
    """Stands where a skip leaves, so that hooks can record or cut it."""


class ConcatSkip(nn.Module):
    """Stands where a skip comes back: (features, skip) along channels, or their sum."""

    def __init__(self, by: Join) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Features, skip: Float[Tensor, "b k h w"]) -> Float[Tensor, "b d h w"]:
        return torch.cat((x, skip), dim=1) if self.by is Join.CONCAT else x + skip


class GroupNorm(nn.GroupNorm):
    """GroupNorm (1803.08494) for any size.

    torch's layer refuses groups of a single value, which one small picture on the deepest level
    can have. Normalised, such a value is 0.
    """

    def forward(self, input: Features) -> Features:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(channels) * weight, |x| over the channels of each position.

    The form of denoising-diffusion-pytorch: no eps under the root, so zero stays zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Features) -> Features:
        return F.normalize(x, dim=1) * self.weight[:, None, None] * self.weight.shape[0] ** 0.5


def norm_layer(width: int, style: Style) -> GroupNorm | RMSNorm:
    """The norm that `style` asks for, over `width` channels."""
    match style.norm:
        case Norm.GROUP:
            return GroupNorm(groups_of(width, style), width, style.eps)
        case Norm.RMS:
            return RMSNorm(width)


def norm_act(norm: nn.Module, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Norm and activation in one place, so that one fused kernel can replace both."""
    return act(norm(x))


def resample(x: Tensor, resize: Resize | None) -> Tensor:
    """Average pooling or nearest neighbour inside a residual block; None leaves x alone."""
    match resize:
        case Resize.DOWN:
            return F.avg_pool2d(x, 2)
        case Resize.UP:
            return F.interpolate(x, scale_factor=2.0)
        case None:
            return x


def pad_to_multiple(x: Features, multiple: int) -> Float[Tensor, "b c y x"]:
    """Repeat the right and bottom edge until both sides divide by `multiple`."""
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if bottom == 0 and right == 0:
        return x
    return F.pad(x, (0, right, 0, bottom), mode="replicate")


def zero_(layer: nn.Conv2d) -> None:
    """Let a layer start as the zero function (2105.05233, 1706.02677)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def check_inputs(
    spec: UNetSpec,
    x: Tensor,
    timestep: Tensor,
    label: Tensor | None,
    augment: Tensor | None = None,
) -> None:
    """Raises ConfigError naming the first argument that does not fit the network."""
    for name, value in (("x", x), ("timestep", timestep)):
        _check_tensor(name, value)
    for name, value in (("label", label), ("augment", augment)):
        if value is not None:
            _check_tensor(name, value)
    if x.ndim != 4 or x.shape[1] != spec.in_channels or not x.is_floating_point():
        raise ConfigError(
            f"x must be float [batch, {spec.in_channels}, height, width];"
            f" got {list(x.shape)} {x.dtype}{_layout_hint(spec, x)}"
        )
    if 0 in x.shape:
        raise ConfigError(f"x must not be empty; got {list(x.shape)}")
    if timestep.shape != (x.shape[0],) or timestep.is_complex():
        raise ConfigError(
            f"timestep must have one number per picture, shape [{x.shape[0]}];"
            f" got {list(timestep.shape)} {timestep.dtype}"
        )
    _check_label(spec, x, label)
    if augment is not None:
        _check_augment(spec, x, augment)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"{name} must be a torch.Tensor; got {type(value).__name__}: use torch.as_tensor"
        )


def _layout_hint(spec: UNetSpec, x: Tensor) -> str:
    if x.ndim in (3, 4) and x.shape[-1] == spec.in_channels:
        return ", which looks like height x width x channels: use x.movedim(-1, -3)"
    return ""


def _check_label(spec: UNetSpec, x: Tensor, label: Tensor | None) -> None:
    embedding = spec.style.embedding
    if label is None:
        if embedding.classes and not embedding.null:
            raise ConfigError(
                f"label is missing: this network has {embedding.classes} classes and no row for"
                " 'no class'; pass label"
            )
        return
    if not embedding.classes:
        raise ConfigError(
            f"label must be None: this network has no classes; got {list(label.shape)}"
        )
    if label.shape != (x.shape[0],) or not _is_whole(label):
        raise ConfigError(
            f"label must be whole numbers of shape [{x.shape[0]}]; got {list(label.shape)}"
            f" {label.dtype}"
        )


def _check_augment(spec: UNetSpec, x: Tensor, augment: Tensor) -> None:
    if not spec.augment:
        raise ConfigError(
            "augment must be None: this network hears no augmentation parameters;"
            f" got {list(augment.shape)}"
        )
    if augment.shape != (x.shape[0], spec.augment) or not augment.is_floating_point():
        raise ConfigError(
            f"augment must be float of shape [{x.shape[0]}, {spec.augment}];"
            f" got {list(augment.shape)} {augment.dtype}"
        )


def _is_whole(label: Tensor) -> bool:
    return not (label.is_floating_point() or label.is_complex() or label.dtype is torch.bool)

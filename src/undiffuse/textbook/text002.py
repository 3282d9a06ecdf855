"""Text 002: the API page of `DiffusionModel`.

Every name on the page is here with its arguments, order and defaults. Decisions where the page is
silent or contradicts itself: each entry of `hidden_dims` makes one down/up pair, as its prose says
(`pairs` one fewer is its drawing); the 4x4 convolutions have padding 1, without which sizes would
not halve and double; widths must be multiples of 8 because its norms have 8 groups. Names inside a
block, which the page does not give, are those of `undiffuse.unet`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from undiffuse import recipes, unet
from undiffuse.errors import ConfigError
from undiffuse.spec import (
    Activation,
    Attn,
    Concat,
    Down,
    Downsampling,
    Program,
    Res,
    Skip,
    Style,
    Up,
    Upsampling,
)
from undiffuse.textbook._view import (
    Group,
    Layers,
    Network,
    TimeMLP,
    View,
    check_whole,
    crop,
    join,
    layers_of,
    linked_stem,
    piece,
    time_embedding,
)

_STYLE = recipes.text002().style
_GROUPS = 8


class TimeEmbedding(TimeMLP):
    """Timesteps (b) -> (b, dim): sinusoid, then `mlp` = Linear, GELU, Linear."""

    activation: ClassVar[Activation] = Activation.GELU


class ResBlock(View[unet.ResBlock]):
    """Norm, SiLU, convolution; plus the projected time; norm, SiLU, convolution; plus the input.

    Raises:
        ConfigError: a width is no multiple of 8.
    """

    def __init__(self, in_ch: int, out_ch: int, time_dim: int) -> None:
        _check_width("in_ch", in_ch)
        _check_width("out_ch", out_ch)
        self.hold(piece(in_ch, (Res(out_ch),), _style(time_dim)).take(unet.ResBlock))

    def forward(
        self, x: Float[Tensor, "b c h w"], t_emb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b d h w"]:
        """x (b, in_ch, h, w), t_emb (b, time_dim) -> (b, out_ch, h, w)."""
        return self.core(x, t_emb)


class SelfAttention(View[unet.AttentionBlock]):
    """x + projection(attention(norm(x))) over all positions.

    Raises:
        ConfigError: `ch` is no multiple of 8, or `num_heads` does not divide it.
    """

    def __init__(self, ch: int, num_heads: int = 4) -> None:
        _check_width("ch", ch)
        check_whole("num_heads", num_heads)
        if ch % num_heads:
            raise ConfigError(
                f"num_heads must divide ch; got num_heads={num_heads} and ch={ch}:"
                " use 1, 2, 4 or 8 heads"
            )
        self.hold(piece(ch, (Attn(num_heads),), _STYLE).take(unet.AttentionBlock))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The shape stays."""
        return self.core(x)


class DownBlock(Group):
    """ResBlock at `in_ch`, then a 4x4 convolution with stride 2 to `out_ch`."""

    def __init__(self, in_ch: int, out_ch: int, time_dim: int) -> None:
        _check_width("in_ch", in_ch)
        _check_width("out_ch", out_ch)
        program: Program = (Res(in_ch), Down(Downsampling.CONV4, out_ch), Up())
        self.hold(piece(in_ch, program, _style(time_dim)))

    def hold(self, layers: Layers) -> None:
        """Become the view of the next two layers."""
        super().__init__()
        self.res = ResBlock.over(layers.take(unet.ResBlock))
        self.down = layers.take(unet.Downsample)

    def forward(
        self, x: Float[Tensor, "b c h w"], t_emb: Float[Tensor, "b e"]
    ) -> tuple[Float[Tensor, "b d y x"], Float[Tensor, "b c h w"]]:
        """x (b, in_ch, h, w) -> ((b, out_ch, h/2, w/2), the skip (b, in_ch, h, w))."""
        skip = self.res(x, t_emb)
        return self.down(skip), skip


class UpBlock(Group):
    """4x4 transposed convolution with stride 2 to `out_ch`, the skip beside it, ResBlock."""

    def __init__(self, in_ch: int, skip_ch: int, out_ch: int, time_dim: int) -> None:
        for name, width in (("in_ch", in_ch), ("skip_ch", skip_ch), ("out_ch", out_ch)):
            _check_width(name, width)
        # The ops before `Up` only make the place it stands in; their layers are not built.
        place: Program = (Skip(), Down(Downsampling.CONV4, in_ch))
        program: Program = (*place, Up(Upsampling.DECONV4, out_ch), Concat(), Res(out_ch))
        self.hold(piece(skip_ch, program, _style(time_dim), start=len(place)))

    def hold(self, layers: Layers) -> None:
        """Become the view of the next two layers."""
        super().__init__()
        self.up = layers.take(unet.Upsample)
        self.res = ResBlock.over(layers.take(unet.ResBlock))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        skip: Float[Tensor, "b s y x"],
        t_emb: Float[Tensor, "b e"],
    ) -> Float[Tensor, "b d y x"]:
        """x (b, in_ch, h, w), skip (b, skip_ch, 2h, 2w) -> (b, out_ch, 2h, 2w)."""
        return self.res(join(self.up(x), skip), t_emb)


class BottleneckBlock(Group):
    """ResBlock, SelfAttention with four heads, ResBlock."""

    def __init__(self, ch: int, time_dim: int) -> None:
        _check_width("ch", ch)
        self.hold(piece(ch, (Res(ch), Attn(4), Res(ch)), _style(time_dim)))

    def hold(self, layers: Layers) -> None:
        """Become the view of the next three layers."""
        super().__init__()
        self.res1 = ResBlock.over(layers.take(unet.ResBlock))
        self.attn = SelfAttention.over(layers.take(unet.AttentionBlock))
        self.res2 = ResBlock.over(layers.take(unet.ResBlock))

    def forward(
        self, x: Float[Tensor, "b c h w"], t_emb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c h w"]:
        """The shape stays."""
        return self.res2(self.attn(self.res1(x, t_emb)), t_emb)


class DiffusionModel(Network):
    """U-Net with time embeddings, residual blocks, and self-attention in the bottleneck.

    Parts: `time_mlp`, `init_conv`, `down_blocks`, `bottleneck`, `up_blocks`, `out_norm`,
    `out_conv`. It starts by predicting zero noise exactly.
    """

    init_conv: nn.Conv2d
    out_norm: nn.GroupNorm
    out_conv: nn.Conv2d

    def __init__(
        self,
        image_size: int,
        channels: int,
        hidden_dims: Sequence[int] = (32, 64, 128),
        time_dim: int = 128,
        pairs: int | None = None,
    ) -> None:
        """
        Args:
            image_size: height and width in pixels; only checked, any size runs.
            channels: of the pictures, 1 for grey and 3 for RGB.
            hidden_dims: width of each level, multiples of 8; one down/up pair per entry. Blocks
                of width 8 cannot hear the time: their norms have one channel per group, and
                take away what was added to it.
            time_dim: width of the time embedding.
            pairs: down/up pairs, at most one per entry; one fewer gives the page's drawing.

        Raises:
            ConfigError: a number cannot work.
        """
        check_whole("image_size", image_size)
        _check_dims(hidden_dims, pairs)
        super().__init__(unet.UNet(recipes.text002(channels, tuple(hidden_dims), time_dim, pairs)))
        assert self.unet.embedding is not None
        layers = layers_of(self.unet)
        count = len(hidden_dims) if pairs is None else pairs
        self.time_mlp = TimeEmbedding.over(self.unet.embedding)
        self.link("init_conv", *linked_stem(self.unet))
        self.down_blocks = nn.ModuleList(DownBlock.over(layers) for _ in range(count))
        self.bottleneck = BottleneckBlock.over(layers)
        self.up_blocks = nn.ModuleList(UpBlock.over(layers) for _ in range(count))
        self.link("out_norm", self.head, "norm")
        self.link("out_conv", self.head, "conv")

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Predict the noise in x.

        Args:
            x: noisy pictures (batch, channels, height, width).
            t: timesteps (batch), integers or floats.
            label: None; here so that `Denoiser` can call every network alike.

        Raises:
            ConfigError: a shape or dtype does not fit, or there is a label.
        """
        h = self.enter(x, t, label)
        t_emb = self.time_mlp(t)
        h = self.init_conv(h)
        skips: list[Tensor] = []
        for block in self.down_blocks:
            h, skip = block(h, t_emb)
            skips.append(skip)
        h = self.bottleneck(h, t_emb)
        for block in self.up_blocks:
            h = block(h, skips.pop(), t_emb)
        return crop(self.head(h), x)


def _style(time_dim: int) -> Style:
    return replace(_STYLE, embedding=time_embedding(time_dim, Activation.GELU))


def _check_width(name: str, width: int) -> None:
    check_whole(name, width)
    if width % _GROUPS:
        lower = width - width % _GROUPS or _GROUPS
        raise ConfigError(
            f"{name} must be a multiple of {_GROUPS}, the number of groups of the norms;"
            f" got {width}: use {lower} or {width - width % _GROUPS + _GROUPS}"
        )


def _check_dims(hidden_dims: Sequence[int], pairs: int | None) -> None:
    if not hidden_dims:
        raise ConfigError("hidden_dims must have at least one entry; got none: use (32, 64, 128)")
    for index, width in enumerate(hidden_dims):
        _check_width(f"hidden_dims[{index}]", width)
    if pairs is not None:
        check_whole("pairs", pairs, least=0)
        if pairs > len(hidden_dims):
            raise ConfigError(
                f"pairs must be at most the number of hidden_dims; got {pairs} and"
                f" {len(hidden_dims)}: add an entry to hidden_dims"
            )

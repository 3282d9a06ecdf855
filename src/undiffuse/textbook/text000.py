"""Text 000: a small U-Net, as its code and as its figure.

Names, arguments and state-dict keys are the text's, and so is the order of the parameters, so
that weights trained with the printed code load here. Known differences to the printed code: any
picture size works (it is padded inside), the embedding works on every device and for odd widths,
and a width that 8 does not divide gets fewer groups instead of an error.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from undiffuse import recipes, unet
from undiffuse.spec import Activation, Attn, Res, UNetSpec
from undiffuse.textbook._view import Network, TimeMLP, View, crop, join, layers_of, piece
from undiffuse.textbook._view import time_embedding as _embedding

_STYLE = recipes.text000().style


class TimestepEmbedding(TimeMLP):
    """Noise level (b) -> vector (b, dim): sinusoid, then `mlp` = Linear, SiLU, Linear.

    The sinusoid has dim // 2 rates exp(-ln(10000) k / (dim // 2)), sines first.
    """

    activation: ClassVar[Activation] = Activation.SILU


class ResBlock(View[unet.ResBlock]):
    """conv1, SiLU, norm1; plus `time_mlp` of the embedding; conv2, SiLU, norm2; plus `skip`."""

    names: ClassVar[Mapping[str, str]] = {
        "conv1": "conv1",
        "conv2": "conv2",
        "norm1": "norm1",
        "norm2": "norm2",
        "time_mlp": "time_proj",
        "skip": "shortcut",
    }
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    norm1: nn.Module
    norm2: nn.Module
    time_mlp: nn.Linear
    skip: nn.Module

    def __init__(self, in_ch: int, out_ch: int, time_emb_dim: int) -> None:
        style = replace(_STYLE, embedding=_embedding(time_emb_dim, Activation.SILU))
        self.hold(piece(in_ch, (Res(out_ch),), style).take(unet.ResBlock))

    def forward(
        self, x: Float[Tensor, "b c h w"], t_emb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b d h w"]:
        """x (b, in_ch, h, w), t_emb (b, time_emb_dim) -> (b, out_ch, h, w)."""
        return self.core(x, t_emb)


class AttentionBlock(View[unet.AttentionBlock]):
    """x + proj(softmax(q k / sqrt(channels)) v), one head over all positions of `norm`(x)."""

    norm: nn.Module
    qkv: nn.Conv2d
    proj: nn.Conv2d

    def __init__(self, channels: int) -> None:
        self.hold(piece(channels, (Attn(),), _STYLE).take(unet.AttentionBlock))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The shape stays."""
        return self.core(x)


class UNet(Network):
    """The simplified U-Net: three halvings, 64 to 256 wide, attention in the middle.

    4,530,243 parameters. `textbook` exports it as `SimpleUNet`.
    """

    out: nn.Conv2d

    def __init__(self) -> None:
        super().__init__(unet.UNet(recipes.text000()))
        assert self.unet.embedding is not None
        layers = layers_of(self.unet)
        self.time_emb = TimestepEmbedding.over(self.unet.embedding)
        self.enc1 = ResBlock.over(layers.take(unet.ResBlock))
        self.enc2 = ResBlock.over(layers.take(unet.ResBlock))
        self.enc3 = ResBlock.over(layers.take(unet.ResBlock))
        self.down = layers.take(unet.Downsample)  # without weights: one serves every level
        self.mid = ResBlock.over(layers.take(unet.ResBlock))
        self.mid_attn = AttentionBlock.over(layers.take(unet.AttentionBlock))
        self.up = layers.take(unet.Upsample)
        self.dec3 = ResBlock.over(layers.take(unet.ResBlock))
        self.dec2 = ResBlock.over(layers.take(unet.ResBlock))
        self.dec1 = ResBlock.over(layers.take(unet.ResBlock))
        self.link("out", self.head, "conv")

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Predict the noise in x.

        Args:
            x: any height and width.
            t: integers or floats, one per picture.
            label: None; here so that `Denoiser` can call every network alike.

        Raises:
            ConfigError: a shape or dtype does not fit, or there is a label.
        """
        h = self.enter(x, t, label)
        t_emb = self.time_emb(t)
        e1 = self.enc1(h, t_emb)
        e2 = self.enc2(self.down(e1), t_emb)
        e3 = self.enc3(self.down(e2), t_emb)
        m = self.mid_attn(self.mid(self.down(e3), t_emb))
        d3 = self.dec3(join(self.up(m), e3), t_emb)
        d2 = self.dec2(join(self.up(d3), e2), t_emb)
        d1 = self.dec1(join(self.up(d2), e1), t_emb)
        return crop(self.head(d1), x)


class FigureUNet(Network):
    """The text's figure: five resolutions, 64 to 512 wide, drawn at 256 pixels.

    One block per drawn row and a stem before the first; 22,786,691 parameters.
    """

    out: nn.Conv2d

    def __init__(self) -> None:
        super().__init__(unet.UNet(figure()))
        assert self.unet.embedding is not None
        layers = layers_of(self.unet)
        self.time_emb = TimestepEmbedding.over(self.unet.embedding)
        self.stem = layers.take(nn.Conv2d)
        self.enc1 = ResBlock.over(layers.take(unet.ResBlock))
        self.enc2 = ResBlock.over(layers.take(unet.ResBlock))
        self.enc3 = ResBlock.over(layers.take(unet.ResBlock))
        self.enc4 = ResBlock.over(layers.take(unet.ResBlock))
        self.down = layers.take(unet.Downsample)
        self.mid = ResBlock.over(layers.take(unet.ResBlock))
        self.mid_attn = AttentionBlock.over(layers.take(unet.AttentionBlock))
        self.up = layers.take(unet.Upsample)
        self.dec4 = ResBlock.over(layers.take(unet.ResBlock))
        self.dec3 = ResBlock.over(layers.take(unet.ResBlock))
        self.dec2 = ResBlock.over(layers.take(unet.ResBlock))
        self.dec1 = ResBlock.over(layers.take(unet.ResBlock))
        self.link("out", self.head, "conv")

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """As `UNet.forward`, one level deeper."""
        h = self.stem(self.enter(x, t, label))
        t_emb = self.time_emb(t)
        e1 = self.enc1(h, t_emb)
        e2 = self.enc2(self.down(e1), t_emb)
        e3 = self.enc3(self.down(e2), t_emb)
        e4 = self.enc4(self.down(e3), t_emb)
        m = self.mid_attn(self.mid(self.down(e4), t_emb))
        d4 = self.dec4(join(self.up(m), e4), t_emb)
        d3 = self.dec3(join(self.up(d4), e3), t_emb)
        d2 = self.dec2(join(self.up(d3), e2), t_emb)
        d1 = self.dec1(join(self.up(d2), e1), t_emb)
        return crop(self.head(d1), x)


def figure() -> UNetSpec:
    """The spec of the figure: 64@256, 128@128, 256@64, 512@32, 512@16, and back."""
    return recipes.text000_figure()

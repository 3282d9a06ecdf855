"""Text 003: the plain CNN that is not enough, and the U-Net that is.

The text prints the first as code and the second as a table of shapes. The table holds exactly when
a skip is taken after each halving and joined before each doubling, so that no skip has the full
resolution; `full_resolution_skip` adds one, as the text's own argument asks for. Names of parts
are ours: `time_embed`, `init_conv`, `down1` ... `down4`, `bottleneck`, `up1` ... `up4`, `out_norm`,
`out_conv`, and `full` for the block after the added skip.
"""

from dataclasses import replace

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from undiffuse import recipes, unet
from undiffuse.spec import Inject
from undiffuse.textbook._view import Layers, Network, crop, join, layers_of, linked_stem


class SimpleNoisePredictor(Network):
    """A naive approach: five convolutions at one resolution, blind to t, seeing 11x11 pixels."""

    def __init__(self, in_channels: int = 3, hidden_dim: int = 64) -> None:
        super().__init__(unet.UNet(recipes.naive(in_channels, hidden_dim)))
        *plain, _ = self.unet.layers.values()
        body = (layer if isinstance(layer, nn.Conv2d) else nn.ReLU() for layer in plain)
        self.layers = nn.Sequential(*body, self.head.conv)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Predict the noise in x. The problem: t is not used.

        Raises:
            ConfigError: a shape or dtype does not fit, or there is a label.
        """
        return self.layers(self.enter(x, t, label))


class DownBlock(nn.Module):
    """Residual block, then a halving; the result is also the skip."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.block = layers.take(unet.ResBlock)
        self.down = layers.take(unet.Downsample)

    def forward(self, x: Float[Tensor, "b c h w"], time_emb: Float[Tensor, "b e"]) -> Tensor:
        """(b, in, h, w) -> (b, out, h/2, w/2)."""
        return self.down(self.block(x, time_emb))


class Bottleneck(nn.Module):
    """Residual block, self-attention, residual block at the lowest resolution."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.block1 = layers.take(unet.ResBlock)
        self.attention = layers.take(unet.AttentionBlock)
        self.block2 = layers.take(unet.ResBlock)

    def forward(
        self, x: Float[Tensor, "b c h w"], time_emb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c h w"]:
        """The shape stays."""
        return self.block2(self.attention(self.block1(x, time_emb)), time_emb)


class UpBlock(nn.Module):
    """The skip beside the features, residual block, then a doubling."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.block = layers.take(unet.ResBlock)
        self.up = layers.take(unet.Upsample)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        skip: Float[Tensor, "b s h w"],
        time_emb: Float[Tensor, "b e"],
    ) -> Tensor:
        """Features and skip of equal size -> (b, out, 2h, 2w)."""
        return self.up(self.block(join(x, skip), time_emb))


class DiffusionUNet(Network):
    """U-Net for diffusion models: four halvings, 64 to 512 wide, drawn at 256 pixels.

    24,404,803 parameters; 25,046,275 when time scales as well as shifts; 24,540,611 with the skip
    at full resolution.
    """

    init_conv: nn.Conv2d
    out_norm: nn.GroupNorm
    out_conv: nn.Conv2d

    def __init__(
        self,
        in_channels: int = 3,
        inject: Inject = Inject.ADD,
        full_resolution_skip: bool = False,
    ) -> None:
        """
        Args:
            in_channels: of the pictures, in and out.
            inject: how every block hears the time: added, or as scale and shift.
            full_resolution_skip: one more skip, from the first convolution to a last block.

        Raises:
            SpecError: `in_channels` is no whole number of at least 1.
        """
        spec = recipes.text003(inject, full_resolution_skip)
        spec = replace(spec, in_channels=in_channels, out_channels=in_channels)
        super().__init__(unet.UNet(spec))
        assert self.unet.embedding is not None
        layers = layers_of(self.unet)
        self.time_embed = self.unet.embedding
        self.link("init_conv", *linked_stem(self.unet))
        self.down1, self.down2 = DownBlock(layers), DownBlock(layers)
        self.down3, self.down4 = DownBlock(layers), DownBlock(layers)
        self.bottleneck = Bottleneck(layers)
        self.up1, self.up2 = UpBlock(layers), UpBlock(layers)
        self.up3, self.up4 = UpBlock(layers), UpBlock(layers)
        self.full = layers.take(unet.ResBlock) if full_resolution_skip else None
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
            x: any height and width.
            t: integers or floats, one per picture.
            label: None; here so that `Denoiser` can call every network alike.

        Raises:
            ConfigError: a shape or dtype does not fit, or there is a label.
        """
        h = self.enter(x, t, label)
        time_emb = self.time_embed(t, None, h.dtype)
        h0 = self.init_conv(h)
        h1 = self.down1(h0, time_emb)
        h2 = self.down2(h1, time_emb)
        h3 = self.down3(h2, time_emb)
        h4 = self.down4(h3, time_emb)
        h = self.bottleneck(h4, time_emb)
        h = self.up1(h, h4, time_emb)
        h = self.up2(h, h3, time_emb)
        h = self.up3(h, h2, time_emb)
        h = self.up4(h, h1, time_emb)
        if self.full is not None:
            h = self.full(join(h, h0), time_emb)
        return crop(self.head(h), x)

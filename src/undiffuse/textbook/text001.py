"""Text 001: the configurable U-Net, its counter of parameters and its initialiser.

The text prints the bottleneck, the counter, the initialiser and a test, but not the class itself.
Where it is silent or contradicts itself, this is DDPM's network (2006.11239): one skip after every
op of the encoder, n + 1 blocks per level on the way up, no halving after the last level.
`Bookkeeping.PER_BLOCK` and `last_downsample` are the text's other readings. Attention resolutions
are pixels. Names inside a block, which the text does not give, are those of `undiffuse.unet`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import NotRequired, TypedDict, TypeVar

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from undiffuse import recipes, unet
from undiffuse.errors import ConfigError
from undiffuse.spec import (
    Attn,
    Concat,
    Conv,
    Down,
    Downsampling,
    Embedding,
    Inject,
    Op,
    Out,
    Part,
    Program,
    Res,
    Site,
    Skip,
    Style,
    UNetSpec,
    Up,
    trace,
)
from undiffuse.textbook._view import (
    Group,
    Layers,
    Network,
    View,
    check_whole,
    crop,
    join,
    layers_of,
    linked_stem,
    piece,
)

Model = TypeVar("Model", bound=nn.Module)

_STYLE = recipes.text001().style
_DOWN, _UP = Down(Downsampling.CONV_END), Up()


class Bookkeeping(StrEnum):
    """Which features of the encoder become skips."""

    DDPM = "ddpm"  # the stem, every block and every halving; n + 1 blocks per level going up
    PER_BLOCK = "per_block"  # every block; n blocks per level going up


# --- configurations -----------------------------------------------------------------------------


class Config(TypedDict):
    """The keyword arguments of `UNet`."""

    image_size: int
    in_channels: int
    out_channels: int
    base_channels: int
    channel_mults: Sequence[int]
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    dropout: NotRequired[float]
    heads: NotRequired[int]
    classes: NotRequired[int]
    bookkeeping: NotRequired[Bookkeeping]
    last_downsample: NotRequired[bool]
    inject: NotRequired[Inject]


def _config(
    image_size: int, base: int, mults: Sequence[int], blocks: int, attention: Sequence[int]
) -> Config:
    return Config(
        image_size=image_size,
        in_channels=3,
        out_channels=3,
        base_channels=base,
        channel_mults=mults,
        num_res_blocks=blocks,
        attention_resolutions=attention,
    )


# The rows of the text's table of presets. 8,952,067, 35,746,307, 121,060,483 and 113,673,219
# parameters; `improved_config` has iDDPM's sizes (2102.09672), heads, and scale and shift.
light_config: Config = _config(64, 64, (1, 2, 2, 2), 2, (16,))
ddpm_config: Config = _config(64, 128, (1, 2, 2, 2), 2, (16,))
improved_config: Config = {
    **_config(64, 128, (1, 2, 3, 4), 3, (16, 8)),
    "heads": 4,
    "inject": Inject.SCALE_SHIFT,
}
highres_config: Config = _config(256, 128, (1, 1, 2, 2, 4, 4), 2, (16,))


# --- blocks -------------------------------------------------------------------------------------


class ResBlock(View[unet.ResBlock]):
    """Norm, SiLU, convolution; plus the projected time; norm, SiLU, convolution; plus the input.

    The last convolution starts at zero, so that a new block is its shortcut.
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_emb_dim: int, dropout: float = 0.0
    ) -> None:
        style = _style(time_emb_dim, dropout)
        self.hold(piece(in_channels, (Res(out_channels),), style).take(unet.ResBlock))

    def forward(
        self, x: Float[Tensor, "b c h w"], time_emb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b d h w"]:
        """x (b, in_channels, h, w), time_emb (b, time_emb_dim) -> (b, out_channels, h, w)."""
        return self.core(x, time_emb)


class AttentionBlock(View[unet.AttentionBlock]):
    """x + projection(attention(norm(x))) over all positions, one head."""

    def __init__(self, channels: int) -> None:
        self.hold(piece(channels, (Attn(),), _STYLE).take(unet.AttentionBlock))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The shape stays."""
        return self.core(x)


class Bottleneck(Group):
    """Middle block at the lowest resolution: ResBlock, attention, ResBlock."""

    def __init__(self, channels: int, time_emb_dim: int, dropout: float = 0.0) -> None:
        program: Program = (Res(channels), Attn(), Res(channels))
        self.hold(piece(channels, program, _style(time_emb_dim, dropout)))

    def hold(self, layers: Layers) -> None:
        """Become the view of the next three layers."""
        super().__init__()
        self.block1 = ResBlock.over(layers.take(unet.ResBlock))
        self.attention = AttentionBlock.over(layers.take(unet.AttentionBlock))
        self.block2 = ResBlock.over(layers.take(unet.ResBlock))

    def forward(
        self, x: Float[Tensor, "b c h w"], time_emb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c h w"]:
        """The shape stays."""
        x = self.block1(x, time_emb)
        x = self.attention(x)
        return self.block2(x, time_emb)


def _style(time_emb_dim: int, dropout: float) -> Style:
    embedding = Embedding(time_emb_dim, 4 * time_emb_dim, time_emb_dim)
    return replace(_STYLE, dropout=dropout, embedding=embedding)


class EncoderLevel(nn.Module):
    """Blocks at one resolution, each with its attention, then perhaps a halving."""

    def __init__(self, layers: Layers, blocks: int, attends: bool, halves: bool, keeps: bool):
        """`keeps`: the halved features become a skip too."""
        super().__init__()
        pairs = [_block_and_attention(layers, attends) for _ in range(blocks)]
        self.blocks = nn.ModuleList(block for block, _ in pairs)
        self.attentions = nn.ModuleList(attention for _, attention in pairs)
        self.downsample = layers.take(unet.Downsample) if halves else None
        self.keeps = keeps

    def forward(
        self, h: Float[Tensor, "b c y x"], time_emb: Float[Tensor, "b e"]
    ) -> tuple[Tensor, list[Tensor]]:
        """Features -> (features, the skips in the order in which they are saved)."""
        skips: list[Tensor] = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(h, time_emb))
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(h)
        return h, [*skips, h] if self.keeps else skips


class DecoderLevel(nn.Module):
    """Perhaps a doubling, then blocks at one resolution, each joined to the newest skip."""

    def __init__(self, layers: Layers, blocks: int, attends: bool, doubles: bool) -> None:
        super().__init__()
        self.upsample = layers.take(unet.Upsample) if doubles else None
        pairs = [_block_and_attention(layers, attends) for _ in range(blocks)]
        self.blocks = nn.ModuleList(block for block, _ in pairs)
        self.attentions = nn.ModuleList(attention for _, attention in pairs)

    def forward(
        self, h: Float[Tensor, "b c y x"], skips: list[Tensor], time_emb: Float[Tensor, "b e"]
    ) -> Tensor:
        """Features -> features; takes one skip per block off the end of `skips`."""
        if self.upsample is not None:
            h = self.upsample(h)
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(join(h, skips.pop()), time_emb))
        return h


def _block_and_attention(layers: Layers, attends: bool) -> tuple[nn.Module, nn.Module]:
    block = ResBlock.over(layers.take(unet.ResBlock))
    if not attends:
        return block, nn.Identity()
    return block, AttentionBlock.over(layers.take(unet.AttentionBlock))


# --- the network --------------------------------------------------------------------------------


class UNet(Network):
    """The complete U-Net: `time_embed`, `init_conv`, `encoder`, `bottleneck`, `decoder`,
    `out_norm`, `out_conv`.

    It starts by predicting zero noise exactly, whatever it is shown.
    """

    init_conv: nn.Conv2d
    out_norm: nn.GroupNorm
    out_conv: nn.Conv2d

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_channels: int,
        base_channels: int,
        channel_mults: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        heads: int = 1,
        classes: int = 0,
        bookkeeping: Bookkeeping = Bookkeeping.DDPM,
        last_downsample: bool = False,
        inject: Inject = Inject.ADD,
    ) -> None:
        """
        Args:
            image_size: pixels; gives `attention_resolutions` their meaning. Pictures of other
                sizes run as well.
            base_channels: width of the first level. Blocks of up to 32 channels cannot hear a
                time that is added: their norms have one channel per group, and take it away.
            channel_mults: width of each level as a multiple of `base_channels`.
            num_res_blocks: blocks per level of the encoder.
            attention_resolutions: sides in pixels of the levels with attention after every block;
                the bottleneck always has it.
            dropout: inside the blocks, at least 0 and below 1.
            heads: of every attention; must divide the widths.
            classes: labels 0 ... classes - 1; `classes` itself, or None, means "no class".
            bookkeeping: which features become skips.
            last_downsample: halve after the last level too.
            inject: how blocks hear the time.

        Raises:
            ConfigError: a number cannot work, or no level has a listed attention resolution.
        """
        _check_numbers(image_size, base_channels, channel_mults, num_res_blocks)
        levels = len(channel_mults)
        attention = attention_levels(
            image_size, levels, attention_resolutions, levels if last_downsample else levels - 1
        )
        base = recipes.text001(base_channels, channel_mults, num_res_blocks, attention, in_channels)
        widths = [base_channels * mult for mult in channel_mults]
        program = _PROGRAMS[bookkeeping](widths, num_res_blocks, attention, heads)
        style = replace(base.style, dropout=dropout, inject=inject)
        spec = UNetSpec(in_channels, out_channels, program, style)
        spec = spec.with_classes(classes, null=True) if classes else spec
        super().__init__(unet.UNet(_deeper(spec) if last_downsample else spec))
        self.saves_all = bookkeeping is Bookkeeping.DDPM
        self._name_parts(levels, num_res_blocks, attention, last_downsample)

    def _name_parts(
        self, levels: int, blocks: int, attention: Sequence[int], last_downsample: bool
    ) -> None:
        assert self.unet.embedding is not None
        layers, last = layers_of(self.unet), levels - 1
        self.time_embed = self.unet.embedding
        self.link("init_conv", *linked_stem(self.unet))
        self.encoder = nn.ModuleList(
            EncoderLevel(
                layers,
                blocks,
                attends=level in attention,
                halves=level < last or last_downsample,
                keeps=level < last and self.saves_all,
            )
            for level in range(levels)
        )
        self.bottleneck = Bottleneck.over(layers)
        self.decoder = nn.ModuleList(
            DecoderLevel(
                layers,
                blocks + int(self.saves_all),
                attends=level in attention,
                doubles=level < last or last_downsample,
            )
            for level in reversed(range(levels))
        )
        self.link("out_norm", self.head, "norm")
        self.link("out_conv", self.head, "conv")

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b d h w"]:
        """Predict the noise in x.

        Args:
            x: any height and width.
            t: integers or floats, one per picture.
            label: 0 ... classes, for a network with classes.

        Raises:
            ConfigError: shapes, dtypes or labels do not fit this network.
        """
        h = self.enter(x, t, label)
        time_emb = self.time_embed(t, label, h.dtype)
        h = self.init_conv(h)
        skips = [h] if self.saves_all else []
        for level in self.encoder:
            h, saved = level(h, time_emb)
            skips += saved
        h = self.bottleneck(h, time_emb)
        for level in self.decoder:
            h = level(h, skips, time_emb)
        return crop(self.head(h), x)


def attention_levels(
    image_size: int, levels: int, resolutions: Sequence[int], halvings: int
) -> list[int]:
    """Levels, 0 the finest, whose features have these sides in pixels.

    Args:
        halvings: in the whole network; the picture is padded to a multiple of 2**halvings.

    Raises:
        ConfigError: no level has such a side; names those that there are.
    """
    padded = image_size + -image_size % 2**halvings
    sides = [padded >> level for level in range(levels)]
    for side in resolutions:
        if side not in sides:
            legal = ", ".join(str(one) for one in sides)
            raise ConfigError(
                f"attention_resolutions has {side!r}, but with image_size={image_size} and"
                f" {levels} levels the sides are {legal}; use some of these"
            )
    return [level for level, side in enumerate(sides) if side in resolutions]


def _check_numbers(
    image_size: int, base_channels: int, channel_mults: Sequence[int], num_res_blocks: int
) -> None:
    check_whole("image_size", image_size)
    check_whole("base_channels", base_channels)
    check_whole("num_res_blocks", num_res_blocks)
    if not channel_mults:
        raise ConfigError("channel_mults must have at least one entry; got none: use (1, 2, 2)")
    for index, mult in enumerate(channel_mults):
        check_whole(f"channel_mults[{index}]", mult)


def _ddpm(widths: Sequence[int], blocks: int, attention: Sequence[int], heads: int) -> Program:
    return recipes.hourglass(
        widths,
        blocks,
        recipes.attention_at(attention, lambda _: heads),
        lambda _: (_DOWN,),
        lambda _: (_UP,),
        middle=(Attn(heads),),
    )


def _per_block(widths: Sequence[int], blocks: int, attention: Sequence[int], heads: int) -> Program:
    program: list[Op] = [Conv(widths[0])]
    attend = recipes.attention_at(attention, lambda _: heads)
    for level, width in enumerate(widths):
        program += [_DOWN] if level else []
        program += [Res(width), *attend(level, width), Skip()] * blocks
    program += [Res(widths[-1]), Attn(heads), Res(widths[-1])]
    for level, width in reversed(list(enumerate(widths))):
        program += [Concat(), Res(width), *attend(level, width)] * blocks
        program += [_UP] if level else []
    return (*program, Out())


_PROGRAMS: dict[Bookkeeping, Callable[[Sequence[int], int, Sequence[int], int], Program]] = {
    Bookkeeping.DDPM: _ddpm,
    Bookkeeping.PER_BLOCK: _per_block,
}


def _deeper(spec: UNetSpec) -> UNetSpec:
    """The same network with its bottleneck at half the resolution."""
    middle = [site.index for site in trace(spec) if site.part is Part.BOTTLENECK]
    first, end, ops = middle[0], middle[-1] + 1, spec.program
    return replace(spec, program=(*ops[:first], _DOWN, *ops[first:end], _UP, *ops[end:]))


# --- counting -----------------------------------------------------------------------------------

_COMPONENTS: tuple[str, ...] = (
    "time_embed",
    "init_conv",
    "encoder",
    "bottleneck",
    "decoder",
    "output",
)


def count_parameters_by_component(
    model: Network | unet.UNet, tell: Callable[[str], None] = print
) -> dict[str, int]:
    """Break down parameters by component of the U-Net, tell the table, and return it.

    The text's counter looks for fragments of names; this one goes by the place of each layer in
    the program, so it works on every network of this package and cannot be misled by a name.

    Args:
        tell: gets each line. The text's function prints, hence the default; nothing else in a
            library should.

    Returns:
        time_embed, init_conv, encoder, bottleneck, decoder, output; the sum is the model's size.
    """
    bare = model.unet if isinstance(model, Network) else model
    components: dict[str, int] = dict.fromkeys(_COMPONENTS, 0)
    components["time_embed"] = _size(bare.embedding) if bare.embedding is not None else 0
    for site in trace(bare.spec):
        components[_component(site)] += _size(bare.layers[site.name])
    total = sum(components.values())
    tell("\nParameter breakdown:")
    for name, count in components.items():
        tell(f"  {name:12s}: {count:>10,} ({100 * count / total:5.1f}%)")
    tell(f"  {'TOTAL':12s}: {total:>10,}")
    return components


def _size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _component(site: Site) -> str:
    match site.op:
        case Conv() if site.index == 0:
            return "init_conv"
        case Out():
            return "output"
        case _:
            return site.part.value


# --- initialisation -----------------------------------------------------------------------------


def initialize_weights(model: Model) -> Model:
    """Initialise as text 001 does, except that a layer that is all zero stays zero.

    Convolutions: Kaiming normal over the values going out, biases 0. Linear layers: Xavier uniform,
    biases 0. GroupNorm: weight 1, bias 0. The output convolution: zero, so that the network starts
    by predicting zero noise. Layers that were zero, as the last convolution of every residual
    block and the projection of every attention, keep the text's third principle, which its code
    would undo. Embeddings and buffers stay as they are.

    Returns:
        The same model.
    """
    for module in model.modules():
        if not _is_zero(module):
            _initialize(module)
    for convolution in _outputs(model):
        nn.init.zeros_(convolution.weight)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    return model


def _is_zero(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(bool(parameter.any()) for parameter in own)


def _initialize(module: nn.Module) -> None:
    match module:
        case nn.Conv2d() | nn.Conv1d():
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        case nn.ConvTranspose2d():
            # torch takes the second axis for the inputs; here it holds the outputs.
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        case nn.Linear():
            nn.init.xavier_uniform_(module.weight)
        case nn.GroupNorm(affine=True):
            nn.init.ones_(module.weight)
        case _:
            return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _outputs(model: nn.Module) -> Iterator[nn.Conv2d]:
    """What `Out` became, and a part called `out_conv` of anybody's model, as in the text."""
    bare = model.unet if isinstance(model, Network) else model
    yield from (layer.conv for layer in bare.modules() if isinstance(layer, unet.Head))
    named = getattr(model, "out_conv", None)
    if isinstance(named, nn.Conv2d):
        yield named

"""Functions that return a `UNetSpec`: the known networks, the four texts', and named presets.

A preset places attention by level, not by pixel size, so its parameter count does not depend on
the pictures. `nominal` is the size at which those levels are the ones its paper names.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

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
    LinearAttn,
    Norm,
    Op,
    Order,
    Out,
    Program,
    Res,
    Resize,
    Skip,
    Style,
    UNetSpec,
    Up,
    Upsampling,
)

Resample = Callable[[int], tuple[Op, ...]]  # width of the level that is left -> ops
Attention = Callable[[int, int], tuple[Op, ...]]  # (level, width) -> ops after a Res
UpAttention = Callable[[int, int, int], tuple[Op, ...]]  # (level, width, block) -> the same


def hourglass(
    widths: Sequence[int],
    blocks: int,
    attention: Attention,
    down: Resample,
    up: Resample,
    middle: tuple[Op, ...] = (Attn(),),
    stem: int | None = None,
    up_attention: UpAttention | None = None,
) -> Program:
    """The DDPM family (2006.11239, appendix B): `blocks` Res per level on the way down and one
    more on the way up, a skip after every op of the encoder, Res - middle - Res at the bottom.

    Args:
        middle: between the two Res at the bottom.
        stem: width of the first convolution (default: that of the first level).
        up_attention: on the way up, where it differs from `attention`.
    """
    program: list[Op] = [Conv(stem or widths[0]), Skip()]
    for level, width in enumerate(widths):
        if level:
            program += [*down(widths[level - 1]), Skip()]
        for _ in range(blocks):
            program += [Res(width), *attention(level, width), Skip()]
    program += [Res(widths[-1]), *middle, Res(widths[-1])]
    for level, width in reversed(list(enumerate(widths))):
        for block in range(blocks + 1):
            program += [Concat(), Res(width)]
            program += (
                up_attention(level, width, block) if up_attention else attention(level, width)
            )
        if level:
            program += up(width)
    return (*program, Out())


def attention_at(levels: Sequence[int], heads: Callable[[int], int] = lambda width: 1) -> Attention:
    """Attention after every Res of the given levels; `heads` maps a width to a head count."""
    return lambda level, width: (Attn(heads(width)),) if level in levels else ()


def head_width(channels: int) -> Callable[[int], int]:
    """As many heads as it takes to have `channels` channels each (ADM: 64)."""
    return lambda width: max(1, width // channels)


def ddpm_family(
    base: int,
    mults: Sequence[int],
    blocks: int,
    attention_levels: Sequence[int],
    channels: int = 3,
    dropout: float = 0.0,
) -> UNetSpec:
    """DDPM's own network (2006.11239): one attention head, timestep added, padding at the end."""
    widths = [base * m for m in mults]
    program = hourglass(
        widths,
        blocks,
        attention_at(attention_levels),
        lambda _: (Down(Downsampling.CONV_END),),
        lambda _: (Up(),),
    )
    # diffusers' rounding, in which all of DDPM's weights that are handed around are used
    embedding = replace(_embedding(base, half_minus_one=True), divide_last=True)
    return UNetSpec(
        channels, channels, program, Style(eps=1e-6, dropout=dropout, embedding=embedding)
    )


def improved_family(
    base: int, mults: Sequence[int], blocks: int, attention_levels: Sequence[int], channels: int = 3
) -> UNetSpec:
    """Improved DDPM (2102.09672): four heads, scale and shift by the timestep, cosine first."""
    widths = [base * m for m in mults]
    program = hourglass(
        widths,
        blocks,
        attention_at(attention_levels, lambda _: 4),
        lambda _: (Down(),),
        lambda _: (Up(),),
        middle=(Attn(4),),
    )
    return UNetSpec(channels, channels, program, _style_openai(base))


def adm_family(
    base: int,
    mults: Sequence[float],
    blocks: int,
    attention_levels: Sequence[int],
    channels: int = 3,
) -> UNetSpec:
    """ADM (2105.05233): heads of 64 channels, resampling inside residual blocks."""
    widths = [int(base * m) for m in mults]
    heads = head_width(64)
    program = hourglass(
        widths,
        blocks,
        attention_at(attention_levels, heads),
        lambda width: (Res(width, Resize.DOWN),),
        lambda width: (Res(width, Resize.UP),),
        middle=(Attn(heads(widths[-1])),),
    )
    return UNetSpec(channels, channels, program, _style_openai(base))


def _style_openai(base: int) -> Style:
    embedding = Embedding(base, 4 * base, 4 * base, sin_first=False, divide_last=True)
    return Style(inject=Inject.SCALE_SHIFT, embedding=embedding)


def ddpmpp_family(
    base: int, mults: Sequence[int], blocks: int, attention_levels: Sequence[int], channels: int = 3
) -> UNetSpec:
    """DDPM++ (2011.13456) as 2206.00364 trains it: sums scaled by sqrt(1/2), resampling inside
    residual blocks, and on the way up attention after the last block of a level only."""
    widths = [base * m for m in mults]
    attention = attention_at(attention_levels)
    program = hourglass(
        widths,
        blocks,
        attention,
        lambda width: (Res(width, Resize.DOWN),),
        lambda width: (Res(width, Resize.UP),),
        stem=base,
        up_attention=lambda level, width, block: attention(level, width) if block == blocks else (),
    )
    embedding = replace(_embedding(base, half_minus_one=True), label_first=True)
    style = Style(
        group_width=4, eps=1e-6, skip_gain=0.5**0.5, project_resized=True, embedding=embedding
    )
    return UNetSpec(channels, channels, program, style)


def lucidrains_family(
    base: int,
    mults: Sequence[int] = (1, 2, 4, 8),
    channels: int = 3,
    full: Sequence[int] | None = None,
) -> UNetSpec:
    """The network of denoising-diffusion-pytorch: two blocks per level at the width of the level
    above, attention after the second, linear except on the levels `full` (default: the last)."""
    dims = [base, *(base * m for m in mults)]
    last = len(mults) - 1
    linear = LinearAttn(heads=4, head_width=32, memory=4)
    softmax = Attn(heads=4, head_width=32, memory=4, bias=False)
    attention = [softmax if i in (full or (last,)) else linear for i in range(len(mults))]
    program: list[Op] = [Conv(base, 7), Skip()]
    for i, (wide, wider) in enumerate(pairwise(dims)):
        program += [Res(wide), Skip(), Res(wide), attention[i], Skip()]
        program += [Conv(wider) if i == last else Down(Downsampling.UNSHUFFLE, wider)]
    program += [Res(dims[-1]), softmax, Res(dims[-1])]
    for i, (wide, wider) in reversed(list(enumerate(pairwise(dims)))):
        program += [Concat(), Res(wider), Concat(), Res(wider), attention[i]]
        program += [Conv(wide) if i == 0 else Up(Upsampling.NEAREST_CONV, wide)]
    program += [Concat(), Res(base), Out(kernel=1, norm=False)]
    return UNetSpec(channels, channels, tuple(program), _style_lucidrains(base))


def _style_lucidrains(base: int) -> Style:
    embedding = replace(_embedding(base, half_minus_one=True), activation=Activation.GELU)
    return Style(
        norm=Norm.RMS,
        order=Order.CONV_NORM_ACT,
        inject=Inject.SCALE_SHIFT,
        zero_init=False,
        embedding=embedding,
    )


def _embedding(base: int, half_minus_one: bool = False) -> Embedding:
    return Embedding(base, 4 * base, 4 * base, half_minus_one=half_minus_one)


# --- the networks of the four texts -------------------------------------------------------------


def text000() -> UNetSpec:
    """The code of text 000: three halvings, widths 64 to 256, convolution before norm."""
    program = (
        *chain.from_iterable((Res(w), Skip(), Down(Downsampling.MAX)) for w in (64, 128, 256)),
        *(Res(256), Attn()),
        *chain.from_iterable((Up(Upsampling.NEAREST), Concat(), Res(w)) for w in (128, 64, 64)),
        Out(kernel=1, norm=False),
    )
    return UNetSpec(3, 3, program, _style000())


def text000_figure() -> UNetSpec:
    """The figure of text 000: five resolutions, 64 to 512 wide, for pictures of 256 pixels."""
    program = (
        Conv(64),
        *chain.from_iterable((Res(w), Skip(), Down(Downsampling.MAX)) for w in (64, 128, 256, 512)),
        *(Res(512), Attn()),
        *chain.from_iterable(
            (Up(Upsampling.NEAREST), Concat(), Res(w)) for w in (512, 256, 128, 64)
        ),
        Out(kernel=1, norm=False),
    )
    return UNetSpec(3, 3, program, _style000())


def _style000() -> Style:
    embedding = Embedding(256, 1024, 256, final_activation=None)
    return Style(groups=8, order=Order.CONV_ACT_NORM, zero_init=False, embedding=embedding)


def text001(
    base_channels: int = 128,
    channel_mults: Sequence[int] = (1, 2, 2, 4),
    num_res_blocks: int = 2,
    attention_levels: Sequence[int] = (2, 3),
    channels: int = 3,
) -> UNetSpec:
    """The configurable network of text 001, with DDPM's bookkeeping of skips."""
    return ddpm_family(base_channels, channel_mults, num_res_blocks, attention_levels, channels)


def text001_listing() -> UNetSpec:
    """The data-flow listing of text 001: two skips per level, widths that grow in `Down`."""
    conv, grow = Downsampling.CONV, Upsampling.NEAREST_CONV
    program = (
        *(Conv(128), Res(128), Skip(), Res(128), Skip(), Down(conv, 256)),
        *(Res(256), Skip(), Attn(), Skip(), Down(conv, 256)),
        *(Res(256), Skip(), Attn(), Skip(), Down(conv, 512)),
        *(Res(512), Attn(), Res(512)),
        *(Up(grow, 256), Concat(), Res(256), Concat(), Res(256), Attn()),
        *(Up(grow, 256), Concat(), Res(256), Attn(), Concat(), Res(256)),
        *(Up(grow, 128), Concat(), Res(128), Concat(), Res(128)),
        Out(),
    )
    return UNetSpec(3, 3, program, Style(embedding=_embedding(128)))


def text002(
    channels: int = 3,
    hidden_dims: Sequence[int] = (32, 64, 128),
    time_dim: int = 128,
    pairs: int | None = None,
) -> UNetSpec:
    """`DiffusionModel` of text 002: 4x4 convolutions down and up, four heads at the bottom."""
    count = len(hidden_dims) if pairs is None else pairs
    grown = [*hidden_dims[1:], hidden_dims[-1]]
    inner = grown[count - 1] if count else hidden_dims[0]
    down = [
        (Res(w), Skip(), Down(Downsampling.CONV4, g))
        for w, g in zip(hidden_dims[:count], grown[:count], strict=True)
    ]
    up = [(Up(Upsampling.DECONV4, w), Concat(), Res(w)) for w in reversed(hidden_dims[:count])]
    program = (
        Conv(hidden_dims[0]),
        *chain.from_iterable(down),
        *(Res(inner), Attn(4), Res(inner)),
        *chain.from_iterable(up),
        Out(),
    )
    embedding = Embedding(
        time_dim, 4 * time_dim, time_dim, activation=Activation.GELU, final_activation=None
    )
    return UNetSpec(channels, channels, program, Style(groups=8, embedding=embedding))


def text003(inject: Inject = Inject.ADD, full_resolution_skip: bool = False) -> UNetSpec:
    """`DiffusionUNet` of text 003: skips after each `Down`, joined before each `Up`."""
    stem: Program = (Conv(64), Skip()) if full_resolution_skip else (Conv(64),)
    head: Program = (Concat(), Res(64)) if full_resolution_skip else ()
    program = (
        *stem,
        *chain.from_iterable((Res(w), Down(), Skip()) for w in (64, 128, 256, 512)),
        *(Res(512), Attn(), Res(512)),
        *chain.from_iterable((Concat(), Res(w), Up()) for w in (256, 128, 64, 64)),
        *head,
        Out(),
    )
    return UNetSpec(3, 3, program, Style(inject=inject, embedding=_embedding(64)))


def naive(channels: int = 3, hidden_dim: int = 64) -> UNetSpec:
    """`SimpleNoisePredictor` of text 003: five plain convolutions that never hear the timestep."""
    body = chain.from_iterable((Conv(hidden_dim), Act()) for _ in range(4))
    return UNetSpec(channels, channels, (*body, Out(norm=False)), Style(zero_init=False))


def tiny(channels: int = 3) -> UNetSpec:
    """DDPM's network at a quarter of the width and fewer blocks, its norms in eight groups.

    A norm over a group of one channel takes away what the timestep adds to that channel; blocks
    of 32 channels in 32 groups would never hear it.
    """
    spec = ddpm_family(32, (1, 2, 2), 1, (1, 2), channels)
    return replace(spec, style=replace(spec.style, groups=8))


def compact(channels: int = 3) -> UNetSpec:
    """Two resolutions, half as wide again as `tiny`: for pictures that are small to begin with."""
    spec = ddpm_family(48, (1, 2), 1, (1,), channels)
    return replace(spec, style=replace(spec.style, groups=8, inject=Inject.SCALE_SHIFT))


# --- presets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """A named network: `build(channels)` returns its spec without classes."""

    build: Callable[[int], UNetSpec]
    nominal: int  # the picture size, in pixels, that its attention levels were chosen for
    summary: str


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        tiny,
        16,
        "for laptops and pictures up to 32 pixels",
    ),
    "compact": Preset(
        compact,
        8,
        "for pictures up to 16 pixels",
    ),
    "light": Preset(
        lambda channels: ddpm_family(64, (1, 2, 2, 2), 2, (2,), channels),
        64,
        "the DDPM network at half the width",
    ),
    "ddpm": Preset(
        lambda channels: ddpm_family(128, (1, 2, 2, 2), 2, (1,), channels),
        32,
        "DDPM for CIFAR-10 (2006.11239)",
    ),
    "improved": Preset(
        lambda channels: improved_family(128, (1, 2, 3, 4), 3, (2, 3), channels),
        64,
        "Improved DDPM for ImageNet 64x64 (2102.09672)",
    ),
    "highres": Preset(
        lambda channels: ddpm_family(128, (1, 1, 2, 2, 4, 4), 2, (4,), channels),
        256,
        "DDPM for 256x256 (2006.11239)",
    ),
    "adm-64": Preset(
        lambda channels: adm_family(192, (1, 2, 3, 4), 3, (1, 2, 3), channels),
        64,
        "ADM for ImageNet 64x64 (2105.05233)",
    ),
    "naive": Preset(naive, 32, "five plain convolutions, for comparison (text 003)"),
}


def preset(
    name: str,
    channels: int = 3,
    classes: int = 0,
    null: bool | None = None,
    dropout: float = 0.0,
    augment: int = 0,
) -> UNetSpec:
    """The spec of a named preset.

    Args:
        channels: of the pictures, in and out.
        classes: number of class labels; 0 for none.
        null: whether the label table has a row for "no class" (default: if there are classes).
        dropout: inside the residual blocks, at least 0 and below 1.
        augment: number of parameters that tell how a training picture was transformed.

    Raises:
        ConfigError: no preset has that name.
        SpecError: a number is out of range.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no preset is called {name!r}. {hint}There are: {', '.join(PRESETS)}")
    spec = PRESETS[name].build(channels)
    if dropout:
        spec = replace(spec, style=replace(spec.style, dropout=dropout))
    if augment:
        spec = spec.with_augment(augment)
    if not classes:
        return spec
    return spec.with_classes(classes, null=True if null is None else null)

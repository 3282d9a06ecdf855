"""Hugging Face diffusers: `UNet2DModel` and what its schedulers say about the noise.

Their configuration is read strictly into a `_Layout`; `_layers` turns that into our ops, each with
the name of their module, so the program and the names of the weights have one source. The way out
goes back from a program to a `_Layout`, makes its program again and compares op by op: whatever
`UNet2DModel` does not have is refused by its place, never approximated.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from itertools import pairwise, zip_longest
from typing import NamedTuple, cast

import torch
from torch import Tensor

from undiffuse.denoiser import Prediction
from undiffuse.errors import CheckpointError, ConfigError, SpecError
from undiffuse.interop._diffusers_json import Config, Fields, Legal
from undiffuse.interop._diffusers_schedulers import meaning_of, scheduler_config
from undiffuse.interop._weights import (
    Imported,
    Rule,
    Tensors,
    layer,
    layer_1x1,
    read_weights,
    same,
    stacked,
)
from undiffuse.noise import Schedule
from undiffuse.spec import (
    Activation,
    Attn,
    Concat,
    Conv,
    Down,
    Downsampling,
    Embedding,
    Inject,
    Norm,
    Op,
    Order,
    Out,
    Part,
    Program,
    Res,
    Resize,
    Site,
    Skip,
    Style,
    UNetSpec,
    Up,
    groups_of,
    trace,
)
from undiffuse.unet import TimestepEmbedding

UNET = "diffusers UNet2DModel"
MAX_WIDTH = 2**16  # channels; products of such widths can still be counted in 64 bits

# --- their network ------------------------------------------------------------------------------


class _Change(StrEnum):
    """How a level is left: their `downsample_type` and `upsample_type`."""

    CONV = "conv"
    RESNET = "resnet"


class _Middle(Enum):
    """What lies between their down and up blocks."""

    NOTHING = "nothing"
    PLAIN = "plain"
    ATTENTION = "attention"


# By the ops there. Not the values of the enum: Python 3.11.2 forgets a value that is ().
_MIDDLES: dict[tuple[type[Op], ...], _Middle] = {
    (): _Middle.NOTHING,
    (Res, Res): _Middle.PLAIN,
    (Res, Attn, Res): _Middle.ATTENTION,
}


@dataclass(frozen=True)
class _Block:
    """One of their down or up blocks."""

    attention: bool
    change: _Change


@dataclass(frozen=True)
class _Layout:
    """Everything in their configuration that decides the program.

    Args:
        widths: of the levels, from the largest pictures to the smallest.
        down, up: one block per level, each in the order in which it runs.
        by: how a block without a residual block there shrinks.
        head_width: channels per attention head; None for a single head.
        middle_norm: whether the attention in the middle has a norm.
    """

    widths: tuple[int, ...]
    layers: int
    down: tuple[_Block, ...]
    up: tuple[_Block, ...]
    by: Downsampling
    head_width: int | None
    middle: _Middle
    middle_norm: bool


class _Layer(NamedTuple):
    """One of our ops and the name of their module ("" where there is none)."""

    op: Op
    theirs: str = ""


def _layers(layout: _Layout) -> Iterator[_Layer]:
    """The whole program."""
    yield _Layer(Conv(layout.widths[0]), "conv_in")
    yield _Layer(Skip())
    for level in range(len(layout.widths)):
        yield from _down_layers(layout, level)
    yield from _middle_layers(layout)
    for place in range(len(layout.widths)):
        yield from _up_layers(layout, place)
    yield _Layer(Out(), "out")


def _down_layers(layout: _Layout, level: int) -> Iterator[_Layer]:
    block, width, theirs = layout.down[level], layout.widths[level], f"down_blocks.{level}"
    for j in range(layout.layers):
        yield _Layer(Res(width), f"{theirs}.resnets.{j}")
        if block.attention:
            yield _Layer(_attention(layout, width), f"{theirs}.attentions.{j}")
        yield _Layer(Skip())
    if level < len(layout.widths) - 1:
        conv = block.change is _Change.CONV
        yield _Layer(
            Down(layout.by) if conv else Res(width, Resize.DOWN), f"{theirs}.downsamplers.0"
        )
        yield _Layer(Skip())


def _middle_layers(layout: _Layout) -> Iterator[_Layer]:
    width = layout.widths[-1]
    if layout.middle is _Middle.NOTHING:
        return
    yield _Layer(Res(width), "mid_block.resnets.0")
    if layout.middle is _Middle.ATTENTION:
        attention = replace(_attention(layout, width), norm=layout.middle_norm)
        yield _Layer(attention, "mid_block.attentions.0")
    yield _Layer(Res(width), "mid_block.resnets.1")


def _up_layers(layout: _Layout, place: int) -> Iterator[_Layer]:
    block, width, theirs = layout.up[place], layout.widths[-1 - place], f"up_blocks.{place}"
    for j in range(layout.layers + 1):
        yield _Layer(Concat())
        yield _Layer(Res(width), f"{theirs}.resnets.{j}")
        if block.attention:
            yield _Layer(_attention(layout, width), f"{theirs}.attentions.{j}")
    if place < len(layout.widths) - 1:
        conv = block.change is _Change.CONV
        yield _Layer(Up() if conv else Res(width, Resize.UP), f"{theirs}.upsamplers.0")


def _attention(layout: _Layout, width: int) -> Attn:
    """Their heads are counted by dividing down; what is left over belongs to none."""
    each = layout.head_width or width
    heads = max(1, width // each)
    return Attn(heads, head_width=None if heads * each == width else each)


def _program(layout: _Layout) -> Program:
    return tuple(one.op for one in _layers(layout))


# --- from their configuration -------------------------------------------------------------------

_ACTIVATIONS: Legal[Activation] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "relu": Activation.RELU,
}
_INJECTS: Legal[Inject] = {
    "default": Inject.ADD,
    "scale_shift": Inject.SCALE_SHIFT,
}
_CHANGES: Legal[_Change] = {
    "conv": _Change.CONV,
    "resnet": _Change.RESNET,
    None: _Change.CONV,
}
_PADDINGS: Legal[Downsampling] = {
    1: Downsampling.CONV,
    0: Downsampling.CONV_END,
}

# Without attention, resampling by a convolution or by a residual block; and with attention.
_DOWN_TYPES = ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D")
_UP_TYPES = ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")

_UNET_FIELDS = """
    act_fn add_attention attention_head_dim attn_norm_num_groups block_out_channels
    center_input_sample class_embed_type down_block_types downsample_padding downsample_type dropout
    flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor mid_block_type
    norm_eps norm_num_groups num_class_embeds out_channels resnet_time_scale_shift sample_size
    time_embedding_dim time_embedding_type up_block_types upsample_type
"""
# Read for learned embeddings of the timestep only; and what diffusers' own average of the weights
# leaves in the configuration.
_MEANINGLESS = """
    num_train_timesteps
    decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup
"""


def from_diffusers(
    config: Mapping[str, object],
    tensors: Tensors,
    scheduler: Mapping[str, object] | None = None,
) -> Imported:
    """A `UNet2DModel` and what its scheduler says about the noise.

    Args:
        config: the model's `config.json`. What is left out has diffusers' default.
        tensors: its weights; the names that attention had before diffusers 0.15 will do.
        scheduler: a `scheduler_config.json`; without one DDPM's own is assumed, with a note.

    Raises:
        CheckpointError: something cannot be expressed, which the message names, or the weights
            are those of another network.
    """
    fields = check_config(config)
    spec = _spec(fields)
    schedule, prediction, notes = meaning_of(scheduler)
    return Imported(
        spec=spec,
        weights=read_weights(spec, diffusers_rules(spec, config), _modern(tensors)),
        schedule=schedule,
        prediction=prediction,
        origin=UNET,
        size=_size(fields),
        notes=(*notes, *_variance_notes(spec)),
    )


def check_config(config: Config) -> Fields:
    """The configuration of a `UNet2DModel`, of which nothing is unknown.

    Raises:
        CheckpointError: it is that of something else, or a field cannot be expressed.
    """
    fields = Fields(UNET, config)
    fields.check_class(("UNet2DModel",))
    fields.check_known(_UNET_FIELDS + _MEANINGLESS)
    fields.only("center_input_sample", False)
    fields.only("time_embedding_type", "positional")
    fields.only("class_embed_type", None)
    fields.only("mid_block_scale_factor", 1)
    return fields


def _spec(fields: Fields) -> UNetSpec:
    layout = _layout(fields)
    channels, made = fields.whole("in_channels", 3), fields.whole("out_channels", 3)
    if made not in (channels, 2 * channels):
        can = f"in_channels, {channels}, or {2 * channels} with a learned variance"
        raise fields.refusal("out_channels", made, can)
    try:
        return UNetSpec(channels, made, _program(layout), _style(fields, layout.widths))
    except SpecError as error:
        raise CheckpointError(f"{UNET}: {error}") from error


def _style(fields: Fields, widths: tuple[int, ...]) -> Style:
    activation = fields.one_of("act_fn", "silu", _ACTIVATIONS)
    # In theirs 0 counts as not given.
    hidden = fields.whole_or_none("time_embedding_dim", None) or 4 * widths[0]
    embedding = Embedding(
        width=widths[0],
        hidden=hidden,
        out=hidden,
        final_activation=activation,
        sin_first=not fields.flag("flip_sin_to_cos", True),
        half_minus_one=fields.one_of("freq_shift", 0, {0: False, 1: True}),
        divide_last=True,
        classes=fields.whole_or_none("num_class_embeds", None) or 0,
    )
    return Style(
        groups=_groups(fields, widths),
        eps=fields.number("norm_eps", 1e-5),
        inject=fields.one_of("resnet_time_scale_shift", "default", _INJECTS),
        activation=activation,
        dropout=fields.number("dropout", 0.0),
        zero_init=False,
        embedding=embedding,
    )


def _groups(fields: Fields, widths: tuple[int, ...]) -> int:
    groups = fields.whole("norm_num_groups", 32)
    for width in widths:
        if width % groups:
            raise fields.refusal("norm_num_groups", groups, f"a divisor of {width} channels")
    return groups


def _layout(fields: Fields) -> _Layout:
    widths = tuple(_widths(fields))
    downs = fields.sequence("down_block_types", (_DOWN_TYPES[0], *(_DOWN_TYPES[2],) * 3))
    ups = fields.sequence("up_block_types", (*(_UP_TYPES[2],) * 3, _UP_TYPES[0]))
    change_down = fields.one_of("downsample_type", "conv", _CHANGES)
    change_up = fields.one_of("upsample_type", "conv", _CHANGES)
    for name, types in (("down_block_types", downs), ("up_block_types", ups)):
        if len(types) != len(widths):
            raise fields.refusal(name, list(types), f"{len(widths)}, as block_out_channels")
    middle = _middle(fields)
    layout = _Layout(
        widths=widths,
        layers=fields.whole("layers_per_block", 2, most=64),
        down=tuple(_block(fields, "down_block_types", t, _DOWN_TYPES, change_down) for t in downs),
        up=tuple(_block(fields, "up_block_types", t, _UP_TYPES, change_up) for t in ups),
        by=fields.one_of("downsample_padding", 1, _PADDINGS),
        head_width=fields.whole_or_none("attention_head_dim", 8),
        middle=middle,
        middle_norm=middle is not _Middle.ATTENTION or _has_middle_norm(fields),
    )
    _check_head_width(fields, layout)
    return layout


def _widths(fields: Fields) -> Iterator[int]:
    widths = fields.sequence("block_out_channels", (224, 448, 672, 896))
    for width in widths:
        if type(width) is not int or not 1 <= width <= MAX_WIDTH:
            can = f"whole numbers from 1 to {MAX_WIDTH}"
            raise fields.refusal("block_out_channels", list(widths), can)
        yield width


def _block(
    fields: Fields, name: str, kind: object, legal: tuple[str, str, str], change: _Change
) -> _Block:
    """`legal`: without attention (by convolution, by a residual block), with attention."""
    match str(kind).removeprefix("UNetRes"), legal:
        case found, (conv, _, _) if found == conv:
            return _Block(False, _Change.CONV)
        case found, (_, resnet, _) if found == resnet:
            return _Block(False, _Change.RESNET)
        case found, (_, _, attention) if found == attention:
            return _Block(True, change)
        case _:
            raise fields.refusal(name, kind, ", ".join(legal))


def _middle(fields: Fields) -> _Middle:
    kind = fields.one_of("mid_block_type", "UNetMidBlock2D", {"UNetMidBlock2D": True, None: False})
    attention = fields.flag("add_attention", True)
    if not kind:
        return _Middle.NOTHING
    return _Middle.ATTENTION if attention else _Middle.PLAIN


def _has_middle_norm(fields: Fields) -> bool:
    """Without a number of its own, the attention in the middle has a norm as long as the noise
    level is added; with scale_shift it has none."""
    own = fields.whole_or_none("attn_norm_num_groups", None)
    groups = fields.whole("norm_num_groups", 32)
    if own is None:
        inject = fields.one_of("resnet_time_scale_shift", "default", _INJECTS)
        return inject is Inject.ADD
    if own != groups:
        raise fields.refusal("attn_norm_num_groups", own, f"norm_num_groups, {groups}, or null")
    return True


def _check_head_width(fields: Fields, layout: _Layout) -> None:
    with_attention = {
        *(w for w, block in zip(layout.widths, layout.down, strict=True) if block.attention),
        *(w for w, block in zip(layout.widths[::-1], layout.up, strict=True) if block.attention),
        *((layout.widths[-1],) if layout.middle is _Middle.ATTENTION else ()),
    }
    for width in with_attention:
        if layout.head_width is not None and layout.head_width > width:
            can = f"at most {width}, the channels of an attention"
            raise fields.refusal("attention_head_dim", layout.head_width, can)


def _size(fields: Fields) -> tuple[int, int] | None:
    value = fields.values.get("sample_size")
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        side = fields.whole("sample_size", 1)
        return side, side
    pair = cast(Sequence[object], value)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise fields.refusal("sample_size", value, "a whole number, a pair of them, or null")
    return cast(int, pair[0]), cast(int, pair[1])


def _variance_notes(spec: UNetSpec) -> Iterator[str]:
    if spec.out_channels != spec.in_channels:
        yield (
            f"{spec.in_channels} of the {spec.out_channels} output channels are a learned variance,"
            " which a Denoiser leaves out (`mean_only`)"
        )


# --- names --------------------------------------------------------------------------------------

_RES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
}
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(\w+)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_rules(spec: UNetSpec, config: Mapping[str, object]) -> list[Rule]:
    """Our names and theirs, for a spec that is that of the configuration.

    Raises:
        CheckpointError: the configuration cannot be expressed.
    """
    rules = [
        *layer("embedding.linear1", "time_embedding.linear_1"),
        *layer("embedding.linear2", "time_embedding.linear_2"),
    ]
    if spec.classes:
        rules.append(same("embedding.labels.weight", "class_embedding.weight"))
    layers = _layers(_layout(check_config(config)))
    for site, (_, theirs) in zip(trace(spec), layers, strict=True):
        rules += _op_rules(site, f"layers.{site.name}", theirs)
    return rules


def _op_rules(site: Site, ours: str, theirs: str) -> Sequence[Rule]:
    match site.op:
        case Conv():
            return layer(ours, theirs)
        case Res():
            wider = {"shortcut": "conv_shortcut"} if site.in_width != site.out_width else {}
            names = {**_RES, **wider}
            return [r for a, b in names.items() for r in layer(f"{ours}.{a}", f"{theirs}.{b}")]
        case Attn(norm=norm):
            return _attn_rules(norm, ours, theirs)
        case Down() | Up():
            return layer(f"{ours}.conv", f"{theirs}.conv")
        case Out():
            return (
                *layer(f"{ours}.norm", "conv_norm_out"),
                *layer(f"{ours}.conv", "conv_out"),
            )
        case _:
            return ()


def _attn_rules(norm: bool, ours: str, theirs: str) -> Sequence[Rule]:
    weights, biases = (
        (f"{theirs}.to_q.{part}", f"{theirs}.to_k.{part}", f"{theirs}.to_v.{part}")
        for part in ("weight", "bias")
    )
    return (
        *(layer(f"{ours}.norm", f"{theirs}.group_norm") if norm else ()),
        stacked(f"{ours}.qkv.weight", weights, ones=2),
        stacked(f"{ours}.qkv.bias", biases, ones=0),
        *layer_1x1(f"{ours}.proj", f"{theirs}.to_out.0", ones=2),
    )


def _modern(tensors: Tensors) -> dict[str, Tensor]:
    """The names that diffusers writes today."""
    return {_modern_name(name): tensor for name, tensor in tensors.items()}


def _modern_name(name: str) -> str:
    match = _OLD_ATTENTION.fullmatch(name)
    return f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" if match else name


# --- to their configuration ---------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A network and its meaning as diffusers configures them.

    Args:
        unet: `config.json` of the `UNet2DModel`.
        scheduler: `scheduler_config.json`.
        notes: one line for each thing that a user of the result must know.
    """

    unet: Mapping[str, object]
    scheduler: Mapping[str, object]
    notes: tuple[str, ...]


def to_diffusers(
    spec: UNetSpec,
    schedule: Schedule,
    prediction: Prediction,
    size: tuple[int, int] | None = None,
) -> Exported:
    """The configurations with which diffusers builds this network.

    A row of labels for "no class" becomes the last of `num_class_embeds` classes.

    Args:
        size: height and width of the pictures, multiples of the network's stride.

    Raises:
        ConfigError: diffusers cannot express it; the message names the op or the field.
    """
    layout = _layout_of(spec)
    unet = {"_class_name": "UNet2DModel", "sample_size": _sample_size(spec, size)}
    unet |= _unet_config(spec, layout)
    scheduler = scheduler_config(schedule, prediction)
    return Exported(unet, scheduler, tuple(_export_notes(spec, scheduler)))


def _sample_size(spec: UNetSpec, size: tuple[int, int] | None) -> int | list[int] | None:
    if size is None:
        return None
    if any(side < 1 or side % spec.stride for side in size):
        raise ConfigError(
            f"size {size[0]}x{size[1]}: UNet2DModel takes multiples of {spec.stride} only;"
            " pad the pictures, or pass size=None"
        )
    return size[0] if size[0] == size[1] else list(size)


def _unet_config(spec: UNetSpec, layout: _Layout) -> dict[str, object]:
    style, embedding = spec.style, spec.style.embedding
    groups = _one_group_count(spec)
    with_norm = layout.middle is _Middle.ATTENTION and layout.middle_norm
    return {
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "time_embedding_dim": embedding.out,
        "freq_shift": int(embedding.half_minus_one),
        "flip_sin_to_cos": not embedding.sin_first,
        "down_block_types": [_type_of(block, _DOWN_TYPES) for block in layout.down],
        "mid_block_type": None if layout.middle is _Middle.NOTHING else "UNetMidBlock2D",
        "up_block_types": [_type_of(block, _UP_TYPES) for block in layout.up],
        "block_out_channels": list(layout.widths),
        "layers_per_block": layout.layers,
        "mid_block_scale_factor": 1,
        "downsample_padding": 0 if layout.by is Downsampling.CONV_END else 1,
        "downsample_type": _one_change(layout.down).value,
        "upsample_type": _one_change(layout.up).value,
        "dropout": style.dropout,
        "act_fn": style.activation.value,
        "attention_head_dim": layout.head_width,
        "norm_num_groups": groups,
        "attn_norm_num_groups": (
            groups if with_norm and style.inject is Inject.SCALE_SHIFT else None
        ),
        "norm_eps": style.eps,
        "resnet_time_scale_shift": "default" if style.inject is Inject.ADD else "scale_shift",
        "add_attention": layout.middle is not _Middle.PLAIN,
        "class_embed_type": None,
        "num_class_embeds": embedding.classes + embedding.null or None,
    }


def _type_of(block: _Block, types: tuple[str, str, str]) -> str:
    if block.attention:
        return types[2]
    return types[0] if block.change is _Change.CONV else types[1]


def _one_change(blocks: Sequence[_Block]) -> _Change:
    """How the blocks with attention resample; the last block of a side does not."""
    return next((block.change for block in blocks[:-1] if block.attention), _Change.CONV)


def _export_notes(spec: UNetSpec, scheduler: Config) -> Iterator[str]:
    embedding = spec.style.embedding
    if embedding.null:
        yield f'class_labels {embedding.classes}, the last, is "no class": pass it where none is'
    drift = _rounding(embedding)
    if drift:
        yield (
            "diffusers rounds the frequencies of the timestep differently in their last bit: an"
            f" angle of at most {drift:.1e} at timestep 999, so outputs are not equal to the bit"
        )
    if scheduler.get("clip_sample"):
        yield "clip_sample is true, as pictures generated here are clipped to [-1, 1] at every step"


def _rounding(embedding: Embedding) -> float:
    """Largest difference of an angle at timestep 999 from the frequencies of theirs."""
    small = replace(embedding, hidden=1, out=1, classes=0, null=False, divide_last=False)
    with torch.random.fork_rng(devices=[]):
        ours = TimestepEmbedding(replace(small, divide_last=embedding.divide_last)).frequencies
        theirs = TimestepEmbedding(replace(small, divide_last=True)).frequencies
    return float(999 * (ours - theirs).abs().max())


# --- from a program to their layout -------------------------------------------------------------


def _layout_of(spec: UNetSpec) -> _Layout:
    """The layout whose program this is.

    Raises:
        ConfigError: there is none; the message names the first op or field that has no place.
    """
    sites = list(trace(spec))
    for site in sites:
        _check_op(site)
    down, up = (_levels(sites, part) for part in (Part.ENCODER, Part.DECODER))
    if len(down) != len(up):
        raise ConfigError(f"{len(down)} levels go down and {len(up)} up; UNet2DModel has as many")
    layout = _Layout(
        widths=tuple(level.width for level in down),
        layers=down[0].blocks,
        down=tuple(level.kind for level in down),
        up=tuple(level.kind for level in up),
        by=_one_padding(sites),
        head_width=_one_head_width(sites),
        middle=_middle_of(sites),
        middle_norm=all(op.norm for _, op in _attentions(sites)),
    )
    _check_levels(down, up)
    _check_program(sites, _program(layout))
    _check_style(spec, layout)
    return layout


class _Level(NamedTuple):
    """What lies between two changes of size."""

    width: int
    blocks: int
    kind: _Block
    first: int  # index of its first residual block


def _levels(sites: Sequence[Site], part: Part) -> list[_Level]:
    """The levels of the encoder or of the decoder, in the order in which they run."""
    runs: list[list[Site]] = [[]]
    for site in (site for site in sites if site.part is part):
        runs[-1].append(site)
        if site.in_scale != site.out_scale:
            runs.append([])
    return [_level(run, sites) for run in runs]


def _level(run: Sequence[Site], sites: Sequence[Site]) -> _Level:
    blocks = [site for site in run if site.op == Res(site.out_width)]
    if not blocks:
        place = run[0].index if run else len(sites) - 1
        raise ConfigError(
            f"op {place}: its level has no Res; UNet2DModel has layers_per_block of them"
        )
    change = _Change.RESNET if isinstance(run[-1].op, Res) and run[-1].op.resize else _Change.CONV
    attention = any(isinstance(site.op, Attn) for site in run)
    return _Level(blocks[0].out_width, len(blocks), _Block(attention, change), blocks[0].index)


def _attentions(sites: Sequence[Site]) -> list[tuple[Site, Attn]]:
    return [(site, site.op) for site in sites if isinstance(site.op, Attn)]


def _middle_of(sites: Sequence[Site]) -> _Middle:
    kinds = tuple(type(site.op) for site in sites if site.part is Part.BOTTLENECK)
    if kinds in _MIDDLES:
        return _MIDDLES[kinds]
    index = next(site.index for site in sites if site.part is Part.BOTTLENECK)
    raise ConfigError(
        f"op {index} and on, the bottleneck, is {', '.join(kind.__name__ for kind in kinds)};"
        " UNet2DModel has Res, Attn, Res or Res, Res or nothing there"
    )


def _one_padding(sites: Sequence[Site]) -> Downsampling:
    downs = [(site.index, site.op.by) for site in sites if isinstance(site.op, Down)]
    for (_, by), (index, other) in pairwise(downs):
        if other is not by:
            raise ConfigError(
                f"op {index} Down: by {other} after one by {by}; UNet2DModel has one"
                " downsample_padding"
            )
    return downs[0][1] if downs else Downsampling.CONV


def _one_head_width(sites: Sequence[Site]) -> int | None:
    found = [(s, op.head_width or s.in_width // op.heads) for s, op in _attentions(sites)]
    if all(each == site.in_width for site, each in found):
        return None
    for (before, one), (site, each) in pairwise(found):
        if one != each:
            raise ConfigError(
                f"op {site.index} Attn: heads of {each} channels, but of {one} at op"
                f" {before.index}; UNet2DModel has one attention_head_dim"
            )
    return found[0][1]


def _check_op(site: Site) -> None:
    """Refuse ops by a reason of their own; `_check_program` would only say that they differ."""
    match site.op:
        case Attn(memory=memory) if memory:
            wrong = f"memory {memory}; UNet2DModel has no learned keys and values"
        case Attn(bias=False):
            wrong = "bias False; UNet2DModel has biases in query, key and value"
        case Attn(head_width=each) if each is not None and each > site.in_width:
            wrong = f"head_width {each}; UNet2DModel has at most the {site.in_width} channels there"
        case Down(by) if by not in (Downsampling.CONV, Downsampling.CONV_END):
            wrong = f"by {by}; UNet2DModel has {Downsampling.CONV} or {Downsampling.CONV_END}"
        case Up(by) if by is not Up().by:
            wrong = f"by {by}; UNet2DModel has only {Up().by}"
        case _:
            return
    raise ConfigError(f"op {site.index} {type(site.op).__name__}: {wrong}")


def _check_levels(down: Sequence[_Level], up: Sequence[_Level]) -> None:
    for level in down:
        if level.blocks != down[0].blocks:
            raise ConfigError(
                f"op {level.first} Res: its level has {level.blocks}, the first {down[0].blocks};"
                " UNet2DModel has one layers_per_block"
            )
    for name, levels in (("downsample_type", down), ("upsample_type", up)):
        for one, level in pairwise(level for level in levels[:-1] if level.kind.attention):
            if one.kind.change is not level.kind.change:
                raise ConfigError(
                    f"ops from {one.first} and from {level.first}, two levels with attention, end"
                    f" in {one.kind.change} and {level.kind.change}; UNet2DModel has one {name}"
                )


def _check_program(sites: Sequence[Site], theirs: Program) -> None:
    for index, (have, can) in enumerate(zip_longest(map(_plain, sites), theirs)):
        if have != can:
            raise ConfigError(f"op {index} is {have}; UNet2DModel can only have {can} there")


def _plain(site: Site) -> Op:
    """The op without what it says twice."""
    op = site.op
    if isinstance(op, Attn) and op.heads * (op.head_width or 0) == site.in_width:
        return replace(op, head_width=None)
    if isinstance(op, Down | Up) and op.width == site.in_width:
        return replace(op, width=None)
    return op


def _check_style(spec: UNetSpec, layout: _Layout) -> None:
    style, embedding = spec.style, spec.style.embedding
    resized = any(isinstance(op, Res) and op.resize for op in spec.program)
    bare = layout.middle is _Middle.ATTENTION and not layout.middle_norm
    for name, have, can in (
        ("style.norm", style.norm, Norm.GROUP),
        ("style.order", style.order, Order.NORM_ACT_CONV),
        ("style.skip_gain", style.skip_gain, 1.0),
        ("style.project_resized", resized and style.project_resized, False),
        ("style.inject", style.inject, Inject.SCALE_SHIFT if bare else style.inject),
        ("embedding.width", embedding.width, layout.widths[0]),
        ("embedding.out", embedding.out, embedding.hidden),
        ("embedding.activation", embedding.activation, Activation.SILU),
        ("embedding.final_activation", embedding.final_activation, style.activation),
        ("embedding.label_first", bool(spec.classes) and embedding.label_first, False),
    ):
        if have != can:
            raise ConfigError(f"{name} is {have}; UNet2DModel can only have {can} here")


def _one_group_count(spec: UNetSpec) -> int:
    """The groups of every norm, of which theirs has one number."""
    sites = list(trace(spec))
    widths = {site.in_width for site in sites if isinstance(site.op, Res | Attn | Out)}
    widths |= {site.out_width for site in sites if isinstance(site.op, Res)}
    counts = {groups_of(width, spec.style): width for width in sorted(widths)}
    if len(counts) > 1:
        shown = " and ".join(f"{groups} for {width} channels" for groups, width in counts.items())
        raise ConfigError(
            f"style.groups gives norms of {shown}; UNet2DModel has one norm_num_groups"
        )
    return next(iter(counts))

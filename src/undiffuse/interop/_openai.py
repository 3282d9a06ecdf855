"""improved-diffusion and guided-diffusion: the `UNetModel` of 2102.09672 and 2105.05233.

Their files hold weights alone. Names and shapes tell the whole program (`Structure`); what they
cannot tell, such as the number of heads or the noise schedule, is in `OpenAIOptions`, under the
names that those programs' own flags have. For the published networks it is known (`PUBLISHED`).
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import reduce
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.denoiser import Epsilon, Prediction, Sample
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop._weights import (
    Imported,
    Rule,
    Tensors,
    layer,
    layer_1x1,
    net_shapes,
    read_weights,
    rows_by_head,
    same,
    write_weights,
)
from undiffuse.noise import Cosine, LinearBetas, Schedule
from undiffuse.recipes import attention_at, hourglass
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
    Resize,
    Site,
    Skip,
    Style,
    UNetSpec,
    Up,
    Upsampling,
    trace,
)

GROUPS = 32  # of every norm; their widths are multiples of it


class NoiseSchedule(StrEnum):
    """Their `noise_schedule`."""

    LINEAR = "linear"
    COSINE = "cosine"


class Resampling(StrEnum):
    """How a level is left: their `conv_resample` and `resblock_updown`."""

    CONV = "conv"
    POOL = "pool"  # conv_resample False: no weights
    RESBLOCK = "resblock"  # resblock_updown True


def _whole(low: int) -> tuple[str, Callable[[object], bool]]:
    legal = f"a whole number of at least {low}"
    return legal, lambda value: type(value) is int and value >= low


def _one_of(kind: type[bool] | type[NoiseSchedule]) -> tuple[str, Callable[[object], bool]]:
    names = [f"NoiseSchedule.{one.name}" for one in NoiseSchedule]
    legal = "True or False" if kind is bool else " or ".join(names)
    return legal, lambda value: isinstance(value, kind)


_LEGAL: Sequence[tuple[str, str, Callable[[object], bool]]] = (
    ("num_heads", *_whole(1)),
    ("num_head_channels", *_whole(1)),
    ("use_new_attention_order", *_one_of(bool)),
    ("diffusion_steps", *_whole(2)),
    ("noise_schedule", *_one_of(NoiseSchedule)),
    ("rescale_timesteps", *_one_of(bool)),
    ("predict_xstart", *_one_of(bool)),
    ("image_size", *_whole(1)),
)


@dataclass(frozen=True)
class OpenAIOptions:
    """What the weights cannot tell; None means "not given".

    Args:
        num_heads: of every attention, at least 1; excludes `num_head_channels`.
        num_head_channels: channels of each head, at least 1.
        use_new_attention_order: rows of `qkv` are (query, key, value)(head)(channel), not
            (head)(query, key, value)(channel); improved-diffusion always has the latter.
        diffusion_steps: length T of the noise schedule in training, at least 2.
        rescale_timesteps: the network is told 1000 * i / T at step i, not i.
        predict_xstart: the network predicts the clean picture, not the noise.
        image_size: height and width of the training pictures, in pixels; may be left out.
        dropout: in training only, at least 0 and below 1; may be left out.

    Raises:
        ConfigError: a value is out of range, or two exclude each other.
    """

    num_heads: int | None = None
    num_head_channels: int | None = None
    use_new_attention_order: bool | None = None
    diffusion_steps: int | None = None
    noise_schedule: NoiseSchedule | None = None
    rescale_timesteps: bool | None = None
    predict_xstart: bool | None = None
    image_size: int | None = None
    dropout: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads is not None and self.num_head_channels is not None:
            raise ConfigError(
                f"num_heads={self.num_heads} and num_head_channels={self.num_head_channels} exclude"
                " each other; give one of them"
            )
        for name, legal, test in _LEGAL:
            value = getattr(self, name)
            if value is not None and not test(value):
                raise ConfigError(f"{name} must be {legal}; got {value!r}")

    def over(self, base: "OpenAIOptions") -> "OpenAIOptions":
        """These options, and those of `base` where nothing is given here."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: value for name, value in given.items() if value is not None}
        if self.num_heads is not None or self.num_head_channels is not None:
            base = replace(base, num_heads=None, num_head_channels=None)
        return replace(base, **changed)


@dataclass(frozen=True)
class Structure:
    """What names and shapes of the tensors tell, in the words of the peer's arguments."""

    in_channels: int
    out_channels: int
    model_channels: int
    stem: int  # channels after the first convolution
    widths: tuple[int, ...]  # of the levels, from the largest pictures to the smallest
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    resampling: Resampling
    inject: Inject  # their use_scale_shift_norm
    num_classes: int = 0


class Published(NamedTuple):
    """A network whose weights OpenAI gives away."""

    structure: Structure
    options: OpenAIOptions


def from_openai(
    tensors: Tensors, options: OpenAIOptions | None = None, like: str | None = None
) -> Imported:
    """A state dict of `UNetModel`, read from an `ema_*.pt`, `model*.pt` or a published file.

    Args:
        tensors: names as in the file; any floating precision. A half-precision torso is widened.
        options: what the weights do not tell; whatever is left out is filled in from `like`, or
            from the published network that has the same structure.
        like: a key of `PUBLISHED`: the options are those of that network.

    Returns:
        The network with all its output channels; where they predict a variance too, `mean_only`
        leaves that out.

    Raises:
        CheckpointError: the tensors are those of another network, or not complete.
        ConfigError: options are missing or do not fit the network.
    """
    structure = structure_of(tensors)
    complete, notes = _completed(structure, options or OpenAIOptions(), like)
    facts = _facts(complete)
    spec = _spec(structure, facts.heads, complete.dropout or 0.0)
    weights = read_weights(spec, _rules(spec, facts.new_order), tensors)
    weights, widened = _one_precision(weights)
    return Imported(
        spec=spec,
        weights=weights,
        schedule=facts.schedule,
        prediction=facts.prediction,
        origin="OpenAI UNetModel",
        size=(complete.image_size, complete.image_size) if complete.image_size else None,
        notes=(*notes, *widened),
    )


def to_openai(
    spec: UNetSpec, weights: Tensors, use_new_attention_order: bool = False
) -> dict[str, Tensor]:
    """The weights under the names that `UNetModel` has for them: the inverse of `from_openai`.

    Raises:
        ConfigError: `UNetModel` cannot express this network; the message names the op or field.
    """
    if spec.style.embedding.null:
        raise ConfigError(
            'embedding.null is True: OpenAI\'s UNetModel has no row for "no class"; it cannot be'
            " written"
        )
    spec = spec.with_augment(0)  # a generated picture is told of none
    rules = _rules(spec, use_new_attention_order)
    _check_expressible(spec, rules)
    missing = [rule.ours for rule in rules if rule.ours not in weights]
    if missing:
        raise ConfigError(f"{missing[0]} is missing from the weights of this network")
    return write_weights(rules, weights)


# --- the structure, from names and shapes -------------------------------------------------------


def structure_of(tensors: Tensors) -> Structure:
    """The arguments of `UNetModel` that names and shapes tell.

    Raises:
        CheckpointError: this is no `UNetModel`, or one that a `Denoiser` cannot hold.
    """
    _refuse_classifier(tensors)
    stem, channels, *_ = _shape(tensors, "input_blocks.0.0.weight", 4)
    count = 1 + max(_numbers(tensors, r"input_blocks\.(\d{1,4})\."))
    if count > len(tensors):  # before anything as long as a number in a name
        raise CheckpointError(f"input_blocks.{count - 2} is missing, but there is a later one")
    resampling, ends = _level_ends(tensors, count)
    period = math.gcd(*ends) if ends else count
    if period < 2 or count % period:
        raise CheckpointError(
            f"input_blocks.{count} is missing: {count} input blocks do not make whole levels"
        )
    firsts = range(1, count, period)  # of each level, the first residual block
    conv = "input_blocks.{}.0.in_layers.2.weight"
    attended = _numbers(tensors, r"input_blocks\.(\d{1,4})\.1\.")
    structure = Structure(
        in_channels=channels,
        out_channels=_shape(tensors, "out.2.weight", 4)[0],
        model_channels=_shape(tensors, "time_embed.0.weight", 2)[1],
        stem=stem,
        widths=tuple(_shape(tensors, conv.format(i), 4)[0] for i in firsts),
        num_res_blocks=period - 1,
        attention_levels=tuple(level for level, i in enumerate(firsts) if i in attended),
        resampling=resampling,
        inject=_inject(tensors),
        num_classes=_classes(tensors),
    )
    _check_structure(structure)
    return structure


def _level_ends(tensors: Tensors, count: int) -> tuple[Resampling, set[int]]:
    """How levels end, and at which input blocks; output block i - 1 ends a level as i does."""
    down = _numbers(tensors, r"input_blocks\.(\d{1,4})\.0\.op\.")
    up = {i + 1 for i in _numbers(tensors, r"output_blocks\.(\d{1,4})\.[12]\.conv\.")}
    if down or up:
        return Resampling.CONV, down | up
    # A residual block that resizes has the same tensors as any other, but stands second or third.
    resized = {i + 1 for i in _numbers(tensors, r"output_blocks\.(\d{1,4})\.[12]\.in_layers\.")}
    if resized:
        return Resampling.RESBLOCK, resized
    empty = set(range(count)) - _numbers(tensors, r"input_blocks\.(\d{1,4})\.")
    return (Resampling.POOL, empty) if empty else (Resampling.CONV, empty)


def _numbers(tensors: Iterable[str], pattern: str) -> set[int]:
    found = (re.match(pattern, name) for name in tensors)
    return {int(match[1]) for match in found if match}


def _shape(tensors: Tensors, name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(
            f"{name} is missing: the file holds no UNetModel of improved- or guided-diffusion"
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != dims:
        raise CheckpointError(f"{name} must have {dims} dimensions; got {list(shape)}")
    return shape


def _inject(tensors: Tensors) -> Inject:
    rows, _ = _shape(tensors, "input_blocks.1.0.emb_layers.1.weight", 2)
    width = _shape(tensors, "input_blocks.1.0.in_layers.2.weight", 4)[0]
    return Inject.SCALE_SHIFT if rows == 2 * width else Inject.ADD


def _classes(tensors: Tensors) -> int:
    name = "label_emb.weight"
    return _shape(tensors, name, 2)[0] if name in tensors else 0


def _refuse_classifier(tensors: Tensors) -> None:
    if "input_blocks.0.0.weight" in tensors and not _numbers(
        tensors, r"output_blocks\.(\d{1,4})\."
    ):
        raise CheckpointError(
            "output_blocks.0 is missing: an EncoderUNetModel (classifier) cannot be imported,"
            " only a UNetModel"
        )


def _check_structure(structure: Structure) -> None:
    given, made = structure.in_channels, structure.out_channels
    if given == 2 * made or (given, made) == (6, 6):
        raise CheckpointError(
            f"input_blocks.0.0.weight has {given} channels in: a SuperResModel (the picture and a"
            " smaller one together) cannot be imported, for nothing here gives it the smaller one"
        )
    if made not in (given, 2 * given):
        raise CheckpointError(
            f"out.2.weight must have {given} rows, or {2 * given} with a learned variance;"
            f" got {made}"
        )
    for width in (structure.stem, *structure.widths):
        if width % GROUPS:
            raise CheckpointError(
                f"a width of {width} channels is no multiple of {GROUPS}, the groups of UNetModel"
            )


# --- the options --------------------------------------------------------------------------------


class _Facts(NamedTuple):
    """The options when all are known, in our words."""

    heads: Callable[[int], int]
    new_order: bool
    schedule: Schedule
    prediction: Prediction


def _facts(options: OpenAIOptions) -> _Facts:
    missing = _missing(options)
    if missing:
        raise ConfigError(
            f"the weights do not tell {', '.join(missing)}, and no published network has this"
            f" structure: give OpenAIOptions(...), or like= one of {', '.join(PUBLISHED)}"
        )
    steps = options.diffusion_steps or 0
    scale = 1000 / steps
    linear = options.noise_schedule is NoiseSchedule.LINEAR
    kind = Sample if options.predict_xstart else Epsilon
    return _Facts(
        heads=_heads(options),
        new_order=bool(options.use_new_attention_order),
        schedule=LinearBetas(steps, 1e-4 * scale, 0.02 * scale) if linear else Cosine(steps),
        prediction=kind(steps, scale if options.rescale_timesteps else 1.0),
    )


def _missing(options: OpenAIOptions) -> list[str]:
    """Names of the options without which the network's outputs would not be known."""
    free = ("num_heads", "num_head_channels", "image_size", "dropout")
    names = [f.name for f in fields(options) if f.name not in free]
    missing = [name for name in names if getattr(options, name) is None]
    if options.num_heads is None and options.num_head_channels is None:
        missing.insert(0, "num_heads or num_head_channels")
    return missing


def _heads(options: OpenAIOptions) -> Callable[[int], int]:
    """The number of heads of an attention of that many channels."""
    heads, each = options.num_heads, options.num_head_channels

    def count(width: int) -> int:
        name, divisor = ("num_heads", heads) if heads else ("num_head_channels", each or 1)
        if width % divisor:
            raise ConfigError(
                f"{name}={divisor} does not divide the {width} channels of an attention;"
                " give the number that the network was trained with"
            )
        return divisor if heads else width // divisor

    return count


def _completed(
    structure: Structure, given: OpenAIOptions, like: str | None
) -> tuple[OpenAIOptions, tuple[str, ...]]:
    """The options with those of a published network where none are given, and a note if so."""
    if like is not None:
        return given.over(_published(like).options), (f"options not given are those of {like}",)
    if not _missing(given):
        return given, ()
    # Published networks of one structure differ in dropout alone, which changes no output.
    name = next((n for n, known in PUBLISHED.items() if known.structure == structure), None)
    if name is None:
        return given, ()
    options = given.over(PUBLISHED[name].options)
    return options, (f"it has the structure of {name}, so {_shown(options)} are assumed",)


def _published(name: str) -> Published:
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"like={name!r} is no published network. {hint}There are: {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


def _shown(options: OpenAIOptions) -> str:
    values = ((f.name, getattr(options, f.name)) for f in fields(options))
    return ", ".join(f"{name}={value}" for name, value in values if value is not None)


# --- the program --------------------------------------------------------------------------------


def _spec(structure: Structure, heads: Callable[[int], int], dropout: float) -> UNetSpec:
    widths, base = structure.widths, structure.model_channels
    program = hourglass(
        widths,
        structure.num_res_blocks,
        attention_at(structure.attention_levels, heads),
        _DOWN[structure.resampling],
        _UP[structure.resampling],
        middle=(Attn(heads(widths[-1])),),
        stem=structure.stem,
    )
    embedding = Embedding(
        base,
        4 * base,
        4 * base,
        sin_first=False,
        divide_last=True,
        classes=structure.num_classes,
    )
    style = Style(inject=structure.inject, dropout=dropout, embedding=embedding)
    return UNetSpec(structure.in_channels, structure.out_channels, program, style)


_DOWN: Mapping[Resampling, Callable[[int], tuple[Op, ...]]] = {
    Resampling.CONV: lambda _: (Down(),),
    Resampling.POOL: lambda _: (Down(Downsampling.AVG),),
    Resampling.RESBLOCK: lambda width: (Res(width, Resize.DOWN),),
}
_UP: Mapping[Resampling, Callable[[int], tuple[Op, ...]]] = {
    Resampling.CONV: lambda _: (Up(),),
    Resampling.POOL: lambda _: (Up(Upsampling.NEAREST),),
    Resampling.RESBLOCK: lambda width: (Res(width, Resize.UP),),
}


def _one_precision(weights: Tensors) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Widen a half-precision torso to the rest of the network, which is exact."""
    kinds = {tensor.dtype for tensor in weights.values()}
    if len(kinds) == 1:
        return dict(weights), ()
    widest = reduce(torch.promote_types, sorted(kinds, key=str))
    note = f"part of the file is in a lower precision: widened to {widest}, which changes no value"
    return {name: tensor.to(widest) for name, tensor in weights.items()}, (note,)


# --- names --------------------------------------------------------------------------------------


def _rules(spec: UNetSpec, new_order: bool) -> list[Rule]:
    rules = [
        *layer("embedding.linear1", "time_embed.0"),
        *layer("embedding.linear2", "time_embed.2"),
    ]
    if spec.classes:
        rules.append(same("embedding.labels.weight", "label_emb.weight"))
    for site, theirs in _modules(spec):
        rules += _op_rules(site, f"layers.{site.name}", theirs, new_order)
    return rules


def _modules(spec: UNetSpec) -> Iterator[tuple[Site, str]]:
    """Each op with the name of the peer's module.

    A block of theirs is what lies between two skips, or after a join; its ops are numbered.
    """
    saved = joined = place = 0
    for site in trace(spec):
        if isinstance(site.op, Skip | Concat):
            saved += isinstance(site.op, Skip)
            joined += isinstance(site.op, Concat)
            place = 0
            continue
        block = {
            Part.ENCODER: f"input_blocks.{saved}",
            Part.BOTTLENECK: "middle_block",
            Part.DECODER: f"output_blocks.{joined - 1}",
        }[site.part]
        yield site, "out" if isinstance(site.op, Out) else f"{block}.{place}"
        place += 1


def _op_rules(site: Site, ours: str, theirs: str, new_order: bool) -> Sequence[Rule]:
    match site.op:
        case Conv():
            return layer(ours, theirs)
        case Res():
            return _res_rules(site, ours, theirs)
        case Attn(heads):
            return _attn_rules(heads, ours, theirs, new_order)
        case Down(Downsampling.CONV):
            return layer(f"{ours}.conv", f"{theirs}.op")
        case Up(Upsampling.NEAREST_CONV):
            return layer(f"{ours}.conv", f"{theirs}.conv")
        case Down(Downsampling.AVG) | Up(Upsampling.NEAREST):
            return ()
        case Out():
            return (*layer(f"{ours}.norm", f"{theirs}.0"), *layer(f"{ours}.conv", f"{theirs}.2"))
        case _:
            raise ConfigError(f"op {site.index} {site.op} has no counterpart in OpenAI's UNetModel")


def _res_rules(site: Site, ours: str, theirs: str) -> Sequence[Rule]:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
    }
    if site.in_width != site.out_width:
        names["shortcut"] = "skip_connection"
    return [rule for a, b in names.items() for rule in layer(f"{ours}.{a}", f"{theirs}.{b}")]


def _attn_rules(heads: int, ours: str, theirs: str, new_order: bool) -> Sequence[Rule]:
    qkv = layer_1x1(f"{ours}.qkv", f"{theirs}.qkv", ones=1)
    return (
        *layer(f"{ours}.norm", f"{theirs}.norm"),
        *(qkv if new_order else (rows_by_head(rule, heads) for rule in qkv)),
        *layer_1x1(f"{ours}.proj", f"{theirs}.proj_out", ones=1),
    )


# --- what can be written ------------------------------------------------------------------------


def _check_expressible(spec: UNetSpec, rules: Sequence[Rule]) -> None:
    """Refuse a network that would not come back as itself."""
    shapes = net_shapes(spec)
    strange = {rule.ours for rule in rules} ^ set(shapes)
    if strange:
        raise ConfigError(f"{min(strange)} has no counterpart in OpenAI's UNetModel")
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        structure = structure_of(write_weights(rules, empty))
    except CheckpointError as error:
        raise ConfigError(f"OpenAI's UNetModel cannot express this network: {error}") from error
    theirs = _spec(structure, _heads_in(spec), spec.style.dropout)
    _check_program(spec.program, theirs.program)
    _check_style(spec.style, theirs.style)


def _heads_in(spec: UNetSpec) -> Callable[[int], int]:
    """The one number of heads, or the one number of channels per head, that a network has."""
    found = {(s.in_width, s.op.heads) for s in trace(spec) if isinstance(s.op, Attn)}
    counts = sorted({heads for _, heads in found})
    each = {width // heads for width, heads in found}
    if len(counts) == 1:
        return _heads(OpenAIOptions(num_heads=counts[0]))
    if len(each) == 1:
        return _heads(OpenAIOptions(num_head_channels=each.pop()))
    raise ConfigError(
        f"Attn has {counts} heads, which is neither one number of heads nor one number of channels"
        " per head: OpenAI's UNetModel cannot express it"
    )


def _check_program(ours: Program, theirs: Program) -> None:
    for index, (have, can) in enumerate(zip_longest(ours, theirs)):
        if have != can:
            raise ConfigError(f"op {index} is {have}; OpenAI's UNetModel can only have {can} there")


def _check_style(ours: Style, theirs: Style) -> None:
    # Zero initialisation concerns new networks only.
    ours = replace(ours, zero_init=theirs.zero_init)
    for have, can, name in (
        (ours, theirs, "style"),
        (ours.embedding, theirs.embedding, "embedding"),
    ):
        for field in fields(have):
            mine, other = getattr(have, field.name), getattr(can, field.name)
            if mine != other and field.name != "embedding":
                raise ConfigError(
                    f"{name}.{field.name} is {mine}; OpenAI's UNetModel can only have {other}"
                )


# --- the networks that OpenAI gives away --------------------------------------------------------
# Structures and options are those of the flags in the two README files.


def _improved_net(
    base: int, mults: Sequence[int], blocks: int, levels: tuple[int, ...], classes: int = 0
) -> Structure:
    widths = tuple(base * m for m in mults)
    return Structure(
        3, 6, base, base, widths, blocks, levels, Resampling.CONV, Inject.SCALE_SHIFT, classes
    )


def _adm_net(
    base: int, mults: Sequence[float], blocks: int, levels: tuple[int, ...], classes: int = 1000
) -> Structure:
    widths = tuple(int(base * m) for m in mults)
    resampling, inject = Resampling.RESBLOCK, Inject.SCALE_SHIFT
    return Structure(3, 6, base, widths[0], widths, blocks, levels, resampling, inject, classes)


_IMPROVED = OpenAIOptions(
    num_heads=4,
    use_new_attention_order=False,
    diffusion_steps=4000,
    noise_schedule=NoiseSchedule.COSINE,
    rescale_timesteps=True,
    predict_xstart=False,
    image_size=64,
    dropout=0.0,
)
_ADM = OpenAIOptions(
    num_head_channels=64,
    use_new_attention_order=False,
    diffusion_steps=1000,
    noise_schedule=NoiseSchedule.LINEAR,
    rescale_timesteps=False,
    predict_xstart=False,
    image_size=256,
    dropout=0.0,
)
_LSUN = replace(
    _IMPROVED,
    num_heads=1,
    diffusion_steps=1000,
    noise_schedule=NoiseSchedule.LINEAR,
    rescale_timesteps=False,
    image_size=256,
)

PUBLISHED: Mapping[str, Published] = {
    "iddpm-imagenet-64": Published(_improved_net(128, (1, 2, 3, 4), 3, (2, 3)), _IMPROVED),
    "iddpm-cifar-10": Published(
        _improved_net(128, (1, 2, 2, 2), 3, (1, 2)),
        replace(_IMPROVED, image_size=32, dropout=0.3),
    ),
    "iddpm-imagenet-64-class": Published(
        _improved_net(192, (1, 2, 3, 4), 3, (2, 3), 1000),
        replace(_IMPROVED, rescale_timesteps=False),
    ),
    "iddpm-lsun-256": Published(
        replace(_improved_net(128, (1, 1, 2, 2, 4, 4), 2, (4,)), inject=Inject.ADD), _LSUN
    ),
    "adm-64": Published(
        _adm_net(192, (1, 2, 3, 4), 3, (1, 2, 3)),
        replace(
            _ADM,
            use_new_attention_order=True,
            noise_schedule=NoiseSchedule.COSINE,
            image_size=64,
            dropout=0.1,
        ),
    ),
    "adm-128": Published(
        _adm_net(256, (1, 1, 2, 3, 4), 2, (2, 3, 4)),
        replace(_ADM, num_heads=4, num_head_channels=None, image_size=128),
    ),
    "adm-256": Published(_adm_net(256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)), _ADM),
    "adm-256-uncond": Published(_adm_net(256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 0), _ADM),
    "adm-512": Published(
        _adm_net(256, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6)), replace(_ADM, image_size=512)
    ),
    "adm-lsun-256": Published(
        _adm_net(256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 0), replace(_ADM, dropout=0.1)
    ),
}

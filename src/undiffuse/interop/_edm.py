"""EDM (2206.00364): its `SongUNet` in the form "ddpm++", and its `DhariwalUNet`, import only.

Names say resolution and role, and with the shapes they tell the whole program. What differs from
ADM and DDPM++ as others write them: the rows of query, key and value are interleaved, SiLU acts
once on the embedding, and labels come as one-hot vectors that a linear layer reads.

Known from the paper and from names and shapes of the tensors; nothing of EDM's code is here.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.augmentation import PARAMETERS
from undiffuse.denoiser import KarrasPrecond
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop._weights import (
    Imported,
    Rule,
    Tensors,
    layer,
    read_weights,
    rows_interleaved,
    same,
)
from undiffuse.noise import Karras
from undiffuse.recipes import hourglass
from undiffuse.spec import (
    Attn,
    Conv,
    Embedding,
    Inject,
    Op,
    Out,
    Part,
    Res,
    Resize,
    Site,
    Style,
    UNetSpec,
    trace,
)

LICENCE = (
    "EDM's own weights are under CC BY-NC-SA 4.0: not for commercial use, and what is made of them"
    " must be passed on under the same terms"
)


class Kind(Enum):
    """EDM's two networks that can be expressed."""

    SONG = "SongUNet"
    DHARIWAL = "DhariwalUNet"


@dataclass(frozen=True)
class EDMOptions:
    """What the weights cannot tell; the defaults are those of every published EDM network.

    Args:
        sigma_data: standard deviation of the training pictures in [-1, 1], above 0.
        channels_per_head: of a DhariwalUNet's attention, at least 1; a SongUNet has one head.
        dropout: in training only, at least 0 and below 1.
        label_dropout: whether labels were left out at times in training, so that the network has
            learned what "no class" means.

    Raises:
        ConfigError: a number is out of range.
    """

    sigma_data: float = 0.5
    channels_per_head: int = 64
    dropout: float = 0.0
    label_dropout: bool = False

    def __post_init__(self) -> None:
        if type(self.channels_per_head) is not int or self.channels_per_head < 1:
            raise ConfigError(
                "channels_per_head must be a whole number of at least 1;"
                f" got {self.channels_per_head!r}"
            )


@dataclass(frozen=True)
class Structure:
    """What names and shapes of the tensors tell."""

    kind: Kind
    channels: int
    model_channels: int  # values of the sinusoid
    stem: int  # channels after the first convolution
    resolutions: tuple[int, ...]  # of the levels, each half the one before
    widths: tuple[int, ...]
    num_blocks: int
    attention: tuple[int, ...]  # levels
    num_classes: int = 0
    augment: int = 0  # numbers that told the network of augmentation


def from_edm(tensors: Tensors, options: EDMOptions | None = None) -> Imported:
    """The state dict of an `EDMPrecond` around a SongUNet (ddpm++) or a DhariwalUNet.

    Args:
        tensors: names as in the state dict, with or without the prefix "model."; buffers may be
            there. EDM's own .pkl files carry program text and cannot be read: save the state dict
            with EDM's own code first.
        options: what the weights do not tell.

    Labels become a table: row k is what the label's layer makes of the one-hot vector k. Of a
    vector of zeros, EDM's "no class", a SongUNet makes its bias, which becomes the last row; a
    DhariwalUNet adds nothing, so it gets a row (of zeros, which is exact) only if
    `options.label_dropout` says that the network was trained to have one.

    Raises:
        CheckpointError: the tensors are those of another network, or not complete.
        ConfigError: an option does not fit the network.
    """
    options = options or EDMOptions()
    bare = _bare(tensors)
    _refuse_others(bare)
    structure = structure_of(bare)
    spec = _spec(structure, options)
    weights = read_weights(spec, _rules(spec, structure), bare, _ignored(bare))
    size = structure.resolutions[0]
    return Imported(
        spec=spec,
        weights=weights,
        schedule=Karras(0.002, 80.0),
        prediction=KarrasPrecond(options.sigma_data),
        origin=f"EDM {structure.kind.value}",
        size=(size, size),
        notes=tuple(_notes(bare, structure, options)),
    )


def _bare(tensors: Tensors) -> Tensors:
    """Without the prefix that the preconditioning's module gives to the network's names."""
    prefix = "model."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _ignored(tensors: Iterable[str]) -> list[str]:
    """Fixed filters."""
    return [name for name in tensors if name.endswith(".resample_filter")]


def _notes(tensors: Tensors, structure: Structure, options: EDMOptions) -> Iterator[str]:
    yield LICENCE
    yield (
        "the weights do not tell how the network was preconditioned in training: EDM's way with"
        f" sigma_data={options.sigma_data} is assumed"
    )
    if structure.augment not in (0, PARAMETERS):
        yield (
            f"what the {structure.augment} numbers that told of augmentation mean is not known:"
            " zeros, or none, as for every generated picture, add nothing"
        )
    if structure.num_classes and structure.kind is Kind.SONG and not options.label_dropout:
        yield (
            f"label {structure.num_classes} means no class; unless labels were left out at times"
            " in training, it has not been learned"
        )


# --- what is refused ----------------------------------------------------------------------------


class _Foreign(NamedTuple):
    sign: str  # regular expression that one of the names matches
    feature: str


_FOREIGN = (
    _Foreign(r"(unet\.|.*\.emb_gain$|out_gain$)", "an EDM2 network (other blocks)"),
    _Foreign(r"u$", "iDDPM preconditioning (its table `u`)"),
    _Foreign(r"map_noise\.freqs$", "embedding_type='fourier' (ncsn++)"),
    _Foreign(
        r"enc\.\d+x\d+_aux_", "encoder_type='skip' or 'residual' (the image pyramid of ncsn++)"
    ),
    _Foreign(r"dec\.\d+x\d+_aux_up", "decoder_type='skip' (an image pyramid)"),
)


def _refuse_others(tensors: Tensors) -> None:
    for foreign in _FOREIGN:
        signs = [name for name in tensors if re.match(foreign.sign, name)]
        if signs:
            raise CheckpointError(f"{signs[0]}: {foreign.feature} cannot be expressed")
    for name, tensor in tensors.items():
        if name.endswith(".resample_filter") and tuple(tensor.shape[-2:]) != (2, 2):
            raise CheckpointError(
                f"{name} is {list(tensor.shape)}: only resample_filter=[1, 1] can be expressed"
            )


# --- the structure, from names and shapes -------------------------------------------------------


def structure_of(tensors: Tensors) -> Structure:
    """The network's arguments, as far as names and shapes tell.

    Raises:
        CheckpointError: this is neither a SongUNet nor a DhariwalUNet.
    """
    sizes = _resolutions(tensors)
    top = f"enc.{sizes[0]}x{sizes[0]}"
    kind = Kind.DHARIWAL if "out_conv.weight" in tensors else Kind.SONG
    stem, channels, *_ = _shape(tensors, f"{top}_conv.weight", 4)
    blocks = _matches(tensors, re.escape(top) + r"_block(\d{1,5})\.")
    absent = next(i for i in itertools.count() if i not in blocks)
    if absent <= max(blocks, default=0):
        raise CheckpointError(f"{top}_block{absent} is missing: the file is not complete")
    first = [f"enc.{size}x{size}_block0" for size in sizes]
    attended = _matches(tensors, r"enc\.(\d{1,5})x\1_block0\.(?:norm2|qkv|proj)\.")
    return Structure(
        kind=kind,
        channels=channels,
        model_channels=_shape(tensors, "map_layer0.weight", 2)[1],
        stem=stem,
        resolutions=sizes,
        widths=tuple(_shape(tensors, f"{name}.conv0.weight", 4)[0] for name in first),
        num_blocks=1 + max(blocks),
        attention=tuple(level for level, size in enumerate(sizes) if size in attended),
        num_classes=_inputs(tensors, "map_label.weight"),
        augment=_inputs(tensors, "map_augment.weight"),
    )


def _resolutions(tensors: Tensors) -> tuple[int, ...]:
    sizes = sorted(_matches(tensors, r"enc\.(\d{1,5})x\1_"), reverse=True)
    if not sizes:
        raise CheckpointError(
            "enc.RxR_conv.weight is missing: the file holds no SongUNet or DhariwalUNet of EDM"
        )
    for level, size in enumerate(sizes):
        if size << level != sizes[0]:
            raise CheckpointError(
                f"enc.{sizes[0] >> level}x{sizes[0] >> level}_down.conv0.weight is missing:"
                f" the levels are {', '.join(f'{s}x{s}' for s in sizes)}"
            )
    return tuple(sizes)


def _matches(tensors: Iterable[str], pattern: str) -> set[int]:
    found = (re.match(pattern, name) for name in tensors)
    return {int(match[1]) for match in found if match}


def _shape(tensors: Tensors, name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(
            f"{name} is missing: the file holds no SongUNet or DhariwalUNet of EDM"
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != dims:
        raise CheckpointError(f"{name} must have {dims} dimensions; got {list(shape)}")
    return shape


def _inputs(tensors: Tensors, name: str) -> int:
    return _shape(tensors, name, 2)[1] if name in tensors else 0


# --- the program --------------------------------------------------------------------------------


def _spec(structure: Structure, options: EDMOptions) -> UNetSpec:
    """Attention after every block of its levels, but on SongUNet's way up after the last only."""
    heads = _heads(structure, options)
    last = structure.num_blocks

    def attend(level: int, width: int) -> tuple[Op, ...]:
        return (Attn(heads[width]),) if level in structure.attention else ()

    def attend_last(level: int, width: int, block: int) -> tuple[Op, ...]:
        return attend(level, width) if block == last else ()

    program = hourglass(
        structure.widths,
        structure.num_blocks,
        attend,
        lambda width: (Res(width, Resize.DOWN),),
        lambda width: (Res(width, Resize.UP),),
        middle=(Attn(heads[structure.widths[-1]]),),
        stem=structure.stem,
        up_attention=attend_last if structure.kind is Kind.SONG else None,
    )
    style = _song_style if structure.kind is Kind.SONG else _dhariwal_style
    channels = structure.channels
    return UNetSpec(channels, channels, program, style(structure, options))


def _heads(structure: Structure, options: EDMOptions) -> Mapping[int, int]:
    """Number of heads by width, for the levels that have attention and the bottom."""
    levels = {*structure.attention, len(structure.widths) - 1}
    widths = sorted({structure.widths[level] for level in levels})
    if structure.kind is Kind.SONG:
        return dict.fromkeys(widths, 1)
    each = options.channels_per_head
    for width in widths:
        if width % each:
            raise ConfigError(
                f"channels_per_head={each} does not divide the {width} channels of an attention;"
                " give the number that the network was trained with"
            )
    return {width: width // each for width in widths}


def _song_style(structure: Structure, options: EDMOptions) -> Style:
    base, classes = structure.model_channels, structure.num_classes
    embedding = Embedding(
        base,
        4 * base,
        4 * base,
        half_minus_one=True,
        classes=classes,
        null=classes > 0,
        label_first=True,
        augment=structure.augment,
    )
    return Style(
        group_width=4,
        eps=1e-6,
        skip_gain=0.5**0.5,
        project_resized=True,
        dropout=options.dropout,
        embedding=embedding,
    )


def _dhariwal_style(structure: Structure, options: EDMOptions) -> Style:
    base, classes = structure.model_channels, structure.num_classes
    embedding = Embedding(
        base,
        4 * base,
        4 * base,
        sin_first=False,
        classes=classes,
        null=classes > 0 and options.label_dropout,
        augment=structure.augment,
    )
    return Style(
        group_width=4, inject=Inject.SCALE_SHIFT, dropout=options.dropout, embedding=embedding
    )


# --- names --------------------------------------------------------------------------------------


def _rules(spec: UNetSpec, structure: Structure) -> list[Rule]:
    rules = [
        *layer("embedding.linear1", "map_layer0"),
        *layer("embedding.linear2", "map_layer1"),
    ]
    if spec.augment:
        rules.append(same("embedding.augment", "map_augment.weight"))
    if spec.classes:
        rules.append(
            _one_hot_with_bias(spec.classes)
            if structure.kind is Kind.SONG
            else _one_hot(spec.style.embedding.null)
        )
    for site, theirs in _modules(spec, structure):
        rules += _op_rules(site, spec.style, f"layers.{site.name}", theirs)
    return rules


def _one_hot_with_bias(classes: int) -> Rule:
    """Row k is W[:, k] * sqrt(classes) + bias, which rounds once; the last row is the bias."""
    factor = math.sqrt(classes)

    def read(theirs: Sequence[Tensor]) -> Tensor:
        weight, bias = theirs[0].double(), theirs[1].double()
        rows = torch.cat((weight.T * factor, torch.zeros_like(bias)[None])) + bias
        return rows.to(theirs[0].dtype)

    def write(ours: Tensor) -> Sequence[Tensor]:  # the shapes; rounding has no inverse
        return ((ours[:-1] - ours[-1]).T / factor, ours[-1])

    return Rule("embedding.labels.weight", ("map_label.weight", "map_label.bias"), read, write)


def _one_hot(null: bool) -> Rule:
    """Row k is W[:, k]; a last row of zeros stands for "no class"."""
    rule = same("embedding.labels.weight", "map_label.weight")

    def read(theirs: Sequence[Tensor]) -> Tensor:
        rows = theirs[0].T
        return torch.cat((rows, torch.zeros_like(rows[:1]))) if null else rows

    def write(ours: Tensor) -> Sequence[Tensor]:
        return ((ours[:-1] if null else ours).T,)

    return Rule(rule.ours, rule.theirs, read, write)


def _modules(spec: UNetSpec, structure: Structure) -> Iterator[tuple[Site, str]]:
    """Each op with weights and the name of the peer's module; an attention is in its block."""
    top = structure.resolutions[0]
    numbers = defaultdict[str, Iterator[int]](itertools.count)
    theirs = ""
    for site in trace(spec):
        size = f"{top // site.out_scale}x{top // site.out_scale}"
        match site.op:
            case Conv():
                theirs = f"enc.{size}_conv"
            case Res():
                theirs = _block_name(site, size, numbers)
            case Attn():
                pass
            case Out():
                theirs = f"dec.{size}_aux_" if structure.kind is Kind.SONG else "out_"
            case _:
                continue
        yield site, theirs


def _block_name(site: Site, size: str, numbers: Mapping[str, Iterator[int]]) -> str:
    match site.op:
        case Res(resize=Resize.DOWN):
            return f"enc.{size}_down"
        case Res(resize=Resize.UP):
            return f"dec.{size}_up"
        case _:
            role = {Part.ENCODER: "enc.{}_block", Part.BOTTLENECK: "dec.{}_in"}
            name = role.get(site.part, "dec.{}_block").format(size)
            return f"{name}{next(numbers[name])}"


def _op_rules(site: Site, style: Style, ours: str, theirs: str) -> Sequence[Rule]:
    match site.op:
        case Res():
            return _res_rules(site, style, ours, theirs)
        case Attn(heads):
            qkv = layer(f"{ours}.qkv", f"{theirs}.qkv")
            return (
                *layer(f"{ours}.norm", f"{theirs}.norm2"),
                *(rows_interleaved(rule, heads) for rule in qkv),
                *layer(f"{ours}.proj", f"{theirs}.proj"),
            )
        case Out():
            head = (layer(f"{ours}.{part}", f"{theirs}{part}") for part in ("norm", "conv"))
            return tuple(itertools.chain.from_iterable(head))
        case _:
            return layer(ours, theirs)


def _res_rules(site: Site, style: Style, ours: str, theirs: str) -> Sequence[Rule]:
    names = {
        "norm1": "norm0",
        "conv1": "conv0",
        "time_proj": "affine",
        "norm2": "norm1",
        "conv2": "conv1",
    }
    resized = isinstance(site.op, Res) and site.op.resize is not None
    if site.in_width != site.out_width or (resized and style.project_resized):
        names["shortcut"] = "skip"
    return [rule for a, b in names.items() for rule in layer(f"{ours}.{a}", f"{theirs}.{b}")]

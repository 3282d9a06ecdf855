"""A U-Net is a program: a flat tuple of ops for one register and one stack.

The register holds the features, the stack holds the skips. `Skip` pushes a copy of the register,
`Concat` pops one and joins it. Everything else rewrites the register. `trace` runs a program on
widths and scales alone, without torch and without any picture, so a program that cannot work is
refused before a single weight exists:

    >>> spec = UNetSpec(3, 3, (Conv(32), Skip(), Down(), Res(64), Up(), Concat(), Res(32), Out()))
    >>> [site.name for site in trace(spec)][:3]
    ['00_conv', '01_skip', '02_down']

The shape is that of U-Net (Ronneberger et al. 2015, 1505.04597); the blocks are those of DDPM
(Ho et al. 2020, 2006.11239) and its successors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import islice
from typing import cast

from undiffuse.errors import SpecError


class Downsampling(StrEnum):
    """How `Down` halves height and width."""

    CONV = "conv"  # 3x3 convolution, stride 2, padding 1
    CONV_END = "conv_end"  # the same, but padded at the right and bottom only (DDPM)
    CONV4 = "conv4"  # 4x4 convolution, stride 2, padding 1
    UNSHUFFLE = "unshuffle"  # four neighbours become four channels, then a 1x1 convolution
    MAX = "max"
    AVG = "avg"


class Upsampling(StrEnum):
    """How `Up` doubles height and width."""

    NEAREST = "nearest"
    NEAREST_CONV = "nearest_conv"  # nearest neighbour, then a 3x3 convolution
    DECONV4 = "deconv4"  # 4x4 transposed convolution, stride 2, padding 1


class Resize(StrEnum):
    """Resampling inside a `Res` block, as BigGAN and ADM do (2105.05233, section 3)."""

    DOWN = "down"
    UP = "up"


class Join(StrEnum):
    """What `Concat` does with the skip it pops."""

    CONCAT = "concat"
    ADD = "add"


class Activation(StrEnum):
    """The nonlinearities that the ops know."""

    SILU = "silu"
    GELU = "gelu"
    RELU = "relu"


class Order(StrEnum):
    """Order of the three parts of each half of a `Res` block."""

    NORM_ACT_CONV = "norm_act_conv"
    CONV_ACT_NORM = "conv_act_norm"  # text 000
    CONV_NORM_ACT = "conv_norm_act"  # denoising-diffusion-pytorch


class Norm(StrEnum):
    """What normalises the features in `Res`, `Attn`, `LinearAttn` and `Out`."""

    GROUP = "group"  # mean and variance of groups of channels (1803.08494)
    RMS = "rms"  # length of the channel vector at each position (denoising-diffusion-pytorch)


class Inject(StrEnum):
    """How a `Res` block hears the noise level: h + b, or norm(h) * (1 + a) + b (ADM)."""

    ADD = "add"
    SCALE_SHIFT = "scale_shift"


class Part(StrEnum):
    """Where in the U an op stands."""

    ENCODER = "encoder"
    BOTTLENECK = "bottleneck"
    DECODER = "decoder"


@dataclass(frozen=True)
class Conv:
    """Convolution, stride 1, to `width` channels."""

    width: int
    kernel: int = 3


@dataclass(frozen=True)
class Res:
    """Residual block to `width` channels; the only op that hears the noise level."""

    width: int
    resize: Resize | None = None


@dataclass(frozen=True)
class Attn:
    """Self-attention over all positions, added to its input."""

    heads: int = 1
    norm: bool = True  # False: diffusers' middle block with scale-shift has no norm there
    head_width: int | None = None  # channels per head; None: the width divided by `heads`
    memory: int = 0  # learned keys and values beside those of the picture
    bias: bool = True  # of query, key and value


@dataclass(frozen=True)
class LinearAttn:
    """Attention whose cost is linear in the number of positions (1812.01243, in the form of
    denoising-diffusion-pytorch), added to its input."""

    heads: int = 4
    head_width: int = 32
    memory: int = 0


@dataclass(frozen=True)
class Down:
    """Halve height and width; `width` None keeps the channels."""

    by: Downsampling = Downsampling.CONV
    width: int | None = None


@dataclass(frozen=True)
class Up:
    """Double height and width; `width` None keeps the channels."""

    by: Upsampling = Upsampling.NEAREST_CONV
    width: int | None = None


@dataclass(frozen=True)
class Act:
    """A bare activation, for plain convolutional programs."""

    by: Activation = Activation.RELU


@dataclass(frozen=True)
class Skip:
    """Push the features onto the stack."""


@dataclass(frozen=True)
class Concat:
    """Pop the newest skip and join it to the features: along channels, or by addition."""

    by: Join = Join.CONCAT


@dataclass(frozen=True)
class Out:
    """The head: (norm, activation,) convolution to the spec's `out_channels`."""

    kernel: int = 3
    norm: bool = True


Op = Conv | Res | Attn | LinearAttn | Down | Up | Act | Skip | Concat | Out
Program = tuple[Op, ...]

OPS: tuple[type[Op], ...] = (Conv, Res, Attn, LinearAttn, Down, Up, Act, Skip, Concat, Out)


@dataclass(frozen=True)
class Embedding:
    """What turns the timestep (and a class label) into the vector that `Res` blocks hear.

    sinusoid of `width` values -> Linear(`hidden`) -> activation -> Linear(`out`), plus a row of
    the label table, then `final_activation`. The sinusoid is that of 1706.03762, section 3.5.
    With `label_first` the label's row is added to the sinusoid instead. With `augment`, a linear
    map without bias of that many parameters of the picture's augmentation is added to the sinusoid
    (2206.00364, appendix F.2): parameters of zero, or none, add nothing.
    """

    width: int = 128
    hidden: int = 512
    out: int = 512
    activation: Activation = Activation.SILU
    final_activation: Activation | None = Activation.SILU
    sin_first: bool = True
    half_minus_one: bool = False  # divide the log-frequencies by half - 1 instead of half (DDPM)
    divide_last: bool = False  # the last bit of the frequencies as in diffusers, guided-diffusion
    classes: int = 0  # labels 0 ... classes - 1
    null: bool = False  # one more row, label `classes`, that means "no class"
    label_first: bool = False  # DDPM++ of 2206.00364 adds the label before the two layers
    augment: int = 0  # parameters that tell how a training picture was transformed


@dataclass(frozen=True)
class Style:
    """What is alike in every block of one network."""

    norm: Norm = Norm.GROUP
    groups: int = 32  # used: the largest divisor of the width that is at most this ...
    group_width: int = 1  # ... and leaves this many channels in a group (DDPM++: 4)
    eps: float = 1e-5
    order: Order = Order.NORM_ACT_CONV
    inject: Inject = Inject.ADD
    activation: Activation = Activation.SILU
    dropout: float = 0.0
    skip_gain: float = 1.0  # factor on the sum in `Res` and `Attn` (DDPM++: sqrt(1/2))
    project_resized: bool = False  # a resizing `Res` gets a 1x1 shortcut even at equal widths
    zero_init: bool = True  # last convolution of `Res`, projection of `Attn`, and `Out` start at 0
    embedding: Embedding = field(default_factory=Embedding)


@dataclass(frozen=True)
class UNetSpec:
    """Everything that determines a network, in plain data.

    Raises:
        SpecError: the program or the style cannot work; the message names the op by its index.
    """

    in_channels: int
    out_channels: int
    program: Program
    style: Style = field(default_factory=Style)

    def __post_init__(self) -> None:
        _check_positive("in_channels", self.in_channels)
        _check_positive("out_channels", self.out_channels)
        _check_style(self.style)
        for _ in trace(self):
            pass
        _check_augment(self)

    @cached_property
    def stride(self) -> int:
        """The factor by which the deepest features are smaller than the picture."""
        return max((site.out_scale for site in trace(self)), default=1)

    @property
    def classes(self) -> int:
        """Number of classes the network distinguishes; 0 if it takes no label."""
        return self.style.embedding.classes

    @property
    def augment(self) -> int:
        """Number of augmentation parameters the network hears; 0 if none."""
        return self.style.embedding.augment

    def with_classes(self, classes: int, null: bool) -> "UNetSpec":
        """The same network for `classes` labels, with a row for "no class" if `null`."""
        embedding = replace(self.style.embedding, classes=classes, null=null)
        return replace(self, style=replace(self.style, embedding=embedding))

    def with_augment(self, augment: int) -> "UNetSpec":
        """The same network, told `augment` parameters of how a training picture was transformed."""
        embedding = replace(self.style.embedding, augment=augment)
        return replace(self, style=replace(self.style, embedding=embedding))


@dataclass(frozen=True)
class Site:
    """One op in its place: what goes in, what comes out, and which skip it pops."""

    index: int
    name: str  # "07_res": the layer's name, in weights and in messages
    op: Op
    part: Part
    in_width: int
    out_width: int
    in_scale: int  # height and width going in are the picture's divided by this
    out_scale: int
    skip: int | None = None  # index of the `Skip` that a `Concat` pops
    skip_width: int = 0


@dataclass(frozen=True)
class _Saved:
    index: int
    width: int
    scale: int


def trace(spec: UNetSpec) -> Iterator[Site]:
    """Run the program on widths and scales alone.

    Yields one `Site` per op, in order.

    Raises:
        SpecError: the program cannot work.
    """
    program = spec.program
    _check_ops(program)
    if not program or not isinstance(program[-1], Out):
        raise SpecError("program must end with Out(); add Out() as its last op")
    early = next(i for i, op in enumerate(program) if isinstance(op, Out))
    if early != len(program) - 1:
        raise SpecError(f"op {early} Out: only the last op may be Out; remove it")
    parts = _parts(program)
    digits = 3 if len(program) > 100 else 2
    width, scale, stack = spec.in_channels, 1, list[_Saved]()
    for index, op in enumerate(program):
        saved = _apply_to_stack(index, op, width, scale, stack)
        site = Site(
            index=index,
            name=f"{index:0{digits}d}_{type(op).__name__.lower()}",
            op=op,
            part=parts[index],
            in_width=width,
            out_width=_out_width(index, op, width, saved, spec.out_channels),
            in_scale=scale,
            out_scale=_out_scale(index, op, scale),
            skip=saved.index if saved else None,
            skip_width=saved.width if saved else 0,
        )
        yield site
        width, scale = site.out_width, site.out_scale
    if stack:
        raise SpecError(f"Skip without Concat: ops {', '.join(str(s.index) for s in stack)}")
    if scale != 1:
        raise SpecError(
            f"the program ends at 1/{scale} resolution: {_count_missing(scale)} missing before Out"
        )


def groups_of(width: int, style: Style) -> int:
    """The number of groups that a norm of `width` channels really uses."""
    return largest_divisor(width, max(1, min(style.groups, width // style.group_width)))


def inner_width(op: Attn | LinearAttn, width: int) -> int:
    """Channels that the heads of an attention hold together, in a network of `width` there."""
    return width if op.head_width is None else op.heads * op.head_width


def largest_divisor(width: int, limit: int) -> int:
    """The largest divisor of `width` that is at most `limit`."""
    return next(g for g in range(min(width, limit), 0, -1) if width % g == 0)


def _check_ops(program: object) -> None:
    if not isinstance(program, tuple):
        raise SpecError(f"program must be a tuple of ops; got a {type(program).__name__}")
    for index, op in enumerate(cast(tuple[object, ...], program)):
        if not isinstance(op, OPS):
            names = ", ".join(kind.__name__ for kind in OPS)
            raise SpecError(f"op {index} is {op!r}, which is no op; use one of {names}")


def _count_missing(scale: int) -> str:
    count = int(math.log2(scale))
    return "one Up is" if count == 1 else f"{count} Up are"


def _apply_to_stack(
    index: int, op: Op, width: int, scale: int, stack: list[_Saved]
) -> _Saved | None:
    match op:
        case Skip():
            stack.append(_Saved(index, width, scale))
        case Concat():
            if not stack:
                raise SpecError(f"op {index} Concat: no Skip is left; add Skip() before it")
            saved = stack.pop()
            _check_concat(index, op, width, scale, saved)
            return saved
        case _:
            pass
    return None


def _check_concat(index: int, op: Concat, width: int, scale: int, saved: _Saved) -> None:
    if saved.scale != scale:
        need = "Up()" if scale > saved.scale else "Down()"
        raise SpecError(
            f"op {index} Concat: features are at 1/{scale}, but op {saved.index} Skip stored them"
            f" at 1/{saved.scale}; add {need} before op {index}"
        )
    if op.by is Join.ADD and saved.width != width:
        raise SpecError(
            f"op {index} Concat(add): features have {width} channels, but op {saved.index} Skip"
            f" stored {saved.width}; make them equal"
        )


def _out_width(index: int, op: Op, width: int, saved: _Saved | None, out_channels: int) -> int:
    _check_choices(index, op)
    match op:
        case Conv() | Res():
            _check_positive(f"op {index} {type(op).__name__}: width", op.width)
            _check_kernel(index, op)
            return op.width
        case Attn() | LinearAttn():
            _check_heads(index, op, width)
            return width
        case Down() | Up():
            return _resampled_width(index, op, width)
        case Concat(by=Join.CONCAT):
            assert saved is not None
            return width + saved.width
        case Out():
            _check_kernel(index, op)
            return out_channels
        case _:
            return width


def _resampled_width(index: int, op: Down | Up, width: int) -> int:
    if op.width is None or op.width == width:
        return width
    _check_positive(f"op {index} {type(op).__name__}: width", op.width)
    if op.by in (Downsampling.MAX, Downsampling.AVG, Upsampling.NEAREST):
        raise SpecError(
            f"op {index} {type(op).__name__}: {op.by.value} cannot change {width} channels to"
            f" {op.width}; leave width out or use a convolution"
        )
    return op.width


def _out_scale(index: int, op: Op, scale: int) -> int:
    match op:
        case Down() | Res(resize=Resize.DOWN):
            return scale * 2
        case Up() | Res(resize=Resize.UP):
            if scale == 1:
                raise SpecError(
                    f"op {index} {type(op).__name__}: already at full resolution; remove it"
                )
            return scale // 2
        case _:
            return scale


def _parts(program: Program) -> list[Part]:
    """Split the U in three (architecture: the decoder starts at the first op that joins or grows;
    the encoder ends at the last op before it that saves or shrinks)."""
    decoder = next((i for i, op in enumerate(program) if _grows(op)), len(program))
    saves = (i + 1 for i, op in enumerate(program[:decoder]) if _shrinks(op))
    encoder = max(saves, default=decoder)
    return [
        Part.ENCODER if i < encoder else Part.BOTTLENECK if i < decoder else Part.DECODER
        for i in range(len(program))
    ]


def _grows(op: Op) -> bool:
    return isinstance(op, Concat | Up) or (isinstance(op, Res) and op.resize is Resize.UP)


def _shrinks(op: Op) -> bool:
    return isinstance(op, Skip | Down) or (isinstance(op, Res) and op.resize is Resize.DOWN)


def _check_positive(what: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise SpecError(f"{what} must be a whole number of at least 1; got {value!r}")


def _check_choice(what: str, value: object, kind: type[StrEnum]) -> None:
    if not isinstance(value, kind):
        legal = ", ".join(f"{kind.__name__}.{one.name}" for one in kind)
        raise SpecError(f"{what} must be one of {legal}; got {value!r}")


def _check_choices(index: int, op: Op) -> None:
    match op:
        case Down(by):
            _check_choice(f"op {index} Down: by", by, Downsampling)
        case Up(by):
            _check_choice(f"op {index} Up: by", by, Upsampling)
        case Act(by):
            _check_choice(f"op {index} Act: by", by, Activation)
        case Concat(by):
            _check_choice(f"op {index} Concat: by", by, Join)
        case Res(resize=resize) if resize is not None:
            _check_choice(f"op {index} Res: resize", resize, Resize)
        case _:
            pass


def _check_kernel(index: int, op: Op) -> None:
    if not isinstance(op, Conv | Out):
        return
    if type(op.kernel) is not int or op.kernel < 1 or op.kernel % 2 == 0:
        raise SpecError(
            f"op {index} {type(op).__name__}: kernel must be odd so that sizes are kept;"
            f" got {op.kernel!r}"
        )


def _check_heads(index: int, op: Attn | LinearAttn, width: int) -> None:
    where = f"op {index} {type(op).__name__}"
    _check_positive(f"{where}: heads", op.heads)
    if type(op.memory) is not int or op.memory < 0:
        raise SpecError(f"{where}: memory must be a whole number of at least 0; got {op.memory!r}")
    if op.head_width is not None:
        _check_positive(f"{where}: head_width", op.head_width)
    elif width % op.heads:
        legal = (h for h in range(1, min(width, 1024) + 1) if width % h == 0)
        shown = ", ".join(str(h) for h in islice(legal, 8))
        raise SpecError(
            f"op {index} Attn(heads={op.heads}): {width} channels do not split into"
            f" {op.heads} heads; {shown} do"
        )


def _check_style(style: Style) -> None:
    _check_positive("style.groups", style.groups)
    _check_positive("style.group_width", style.group_width)
    _check_choice("style.norm", style.norm, Norm)
    if not (_is_finite(style.dropout) and 0.0 <= style.dropout < 1.0):
        raise SpecError(f"style.dropout must be at least 0 and below 1; got {style.dropout!r}")
    for name in ("eps", "skip_gain"):
        value = getattr(style, name)
        if not (_is_finite(value) and value > 0.0):
            raise SpecError(f"style.{name} must be a finite number above 0; got {value!r}")
    _check_choice("style.order", style.order, Order)
    _check_choice("style.inject", style.inject, Inject)
    _check_choice("style.activation", style.activation, Activation)
    _check_embedding(style.embedding)


def _is_finite(value: object) -> bool:
    """True for a finite float or int; False for everything else, a bool included."""
    return type(value) in (float, int) and math.isfinite(cast(float, value))


def _check_embedding(embedding: Embedding) -> None:
    for name in ("width", "hidden", "out"):
        _check_positive(f"embedding.{name}", getattr(embedding, name))
    _check_choice("embedding.activation", embedding.activation, Activation)
    if embedding.final_activation is not None:
        _check_choice("embedding.final_activation", embedding.final_activation, Activation)
    if embedding.width < 2:
        raise SpecError(f"embedding.width must be at least 2; got {embedding.width}")
    for name in ("classes", "augment"):
        value = getattr(embedding, name)
        if type(value) is not int or value < 0:
            raise SpecError(f"embedding.{name} must be a whole number of at least 0; got {value!r}")
    if embedding.null and not embedding.classes:
        raise SpecError("embedding.null needs classes; got classes=0: set null=False")
    if embedding.half_minus_one and embedding.width < 4:
        raise SpecError(
            f"embedding.half_minus_one needs width of at least 4; got {embedding.width}"
        )


def _check_augment(spec: UNetSpec) -> None:
    """A network that is deaf to the parameters would generate augmented pictures."""
    if spec.augment and not any(isinstance(op, Res) for op in spec.program):
        raise SpecError(
            f"embedding.augment is {spec.augment}, but no op hears it, so augmented pictures would"
            " be generated: add a Res to the program, or set augment=0"
        )

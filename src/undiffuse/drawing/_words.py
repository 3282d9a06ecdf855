"""What every op is called, what colour it has, and what it says when the pointer rests on it.

An op that has no line in `_LOOKS` is drawn in grey under its own name, so that a new one shows up
before anybody has chosen its colour.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import NamedTuple

from undiffuse.spec import (
    Act,
    Attn,
    Concat,
    Conv,
    Down,
    LinearAttn,
    Op,
    Out,
    Res,
    Resize,
    Site,
    Skip,
    UNetSpec,
    Up,
)

FLOW, SKIP, RAIL = "#5b6673", "#3d8d80", "#c3abdf"


class Look(NamedTuple):
    """How an op of one kind is drawn and explained."""

    word: str
    fill: str
    edge: str
    meaning: str  # for the legend
    does: str  # a sentence


_LOOKS: Mapping[type[object], Look] = {
    Conv: Look(
        *("Conv", "#dcefe0", "#6ba57c", "convolution"),
        "Every position looks at its neighbours and gets a new list of channels.",
    ),
    Res: Look(
        *("Res", "#d8e6f6", "#6d99cb", "residual block"),
        "Adds a correction to its input: two convolutions, told the noise level in between.",
    ),
    Attn: Look(
        *("Attn", "#fbe3c6", "#d69b4f", "self-attention"),
        "Every position looks at every other one and adds what it finds.",
    ),
    LinearAttn: Look(
        *("LinA", "#fdf0cf", "#c9a544", "linear attention"),
        "Every position adds a mixture of what all others offer, at a cost linear in their number.",
    ),
    Down: Look(
        *("Down", "#f6d6d9", "#cc7f88", "halve"),
        "Halves height and width, so that what follows sees further.",
    ),
    Up: Look(
        *("Up", "#e3daf3", "#9a84c8", "double"),
        "Doubles height and width.",
    ),
    Act: Look(*("Act", "#eef0f2", "#a3acb7", "activation"), "Bends every value; has no weights."),
    Out: Look(
        *("Out", "#d3ece9", "#5fa39b", "head"),
        "Turns the features into the answer, one value per channel of every pixel.",
    ),
    Skip: Look(
        *("Skip", SKIP, SKIP, "skip: store"),
        "Puts a copy of the features on the stack; they go on unchanged.",
    ),
    Concat: Look(
        *("Concat", "white", SKIP, "skip: join"),
        "Takes the newest copy from the stack and joins it to the features.",
    ),
}


def look_of(kind: type[object]) -> Look:
    """The look of a kind of op, known or new."""
    name, doc = kind.__name__, (kind.__doc__ or kind.__name__).strip().splitlines()[0]
    return _LOOKS.get(kind) or Look(name, "#eef0f2", "#a3acb7", name.lower(), doc)


def blocks_among(kinds: set[type[object]]) -> list[type[object]]:
    """The kinds that are drawn as blocks, in the legend's order, new ones last."""
    known = [kind for kind in _LOOKS if kind in kinds]
    new = sorted(kinds - set(_LOOKS), key=lambda kind: kind.__name__)
    return [kind for kind in (*known, *new) if kind not in (Skip, Concat)]


def word_of(op: Op) -> str:
    """The upper line in a block."""
    match op:
        case Res(resize=Resize.DOWN):
            return "Res ▾"
        case Res(resize=Resize.UP):
            return "Res ▴"
        case _:
            return look_of(type(op)).word


def number_of(site: Site) -> str:
    """The lower line in a block."""
    return site.op.by.value if isinstance(site.op, Act) else str(site.out_width)


def short(count: int) -> str:
    """1234 -> 1.2k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


# --- what the pointer is told ---------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What is known about a network beside its spec; both mappings go by op index."""

    size: tuple[int, int] | None = None  # of the picture, in pixels
    params: Mapping[int, int] = field(default_factory=dict[int, int])
    multiply_adds: Mapping[int, int] = field(default_factory=dict[int, int])


def row_size(spec: UNetSpec, size: tuple[int, int], scale: int) -> tuple[int, int]:
    """Height and width of the features at 1/scale of the padded picture."""
    height, width = (-(-edge // spec.stride) * spec.stride // scale for edge in size)
    return height, width


def about(site: Site, spec: UNetSpec, facts: Facts) -> str:
    """What an op does, its settings, its shapes in and out, and what it costs."""
    return "\n".join(_lines_about(site, spec, facts))


def _lines_about(site: Site, spec: UNetSpec, facts: Facts) -> Iterator[str]:
    yield f"{site.name}, {site.part.value}"
    yield look_of(type(site.op)).does
    if settings := ", ".join(_settings(site.op)):
        yield settings
    yield f"in {_shape(spec, facts, site.in_width, site.in_scale)}"
    if site.skip is not None:
        yield f"joined by op {site.skip}: {_shape(spec, facts, site.skip_width, site.in_scale)}"
    yield f"out {_shape(spec, facts, site.out_width, site.out_scale)}"
    if site.index in facts.params:
        yield f"{facts.params[site.index]:,} parameters"
    if site.index in facts.multiply_adds:
        yield f"{facts.multiply_adds[site.index]:,} multiply-adds per picture"


def _settings(op: Op) -> Iterator[str]:
    """Which kind it is, and what is unlike the default; the shapes tell the width."""
    for one in fields(op):
        value = getattr(op, one.name)
        if one.name == "width" or not (isinstance(value, Enum) or value != one.default):
            continue
        yield f"{one.name}: {value.value if isinstance(value, Enum) else value}"


def _shape(spec: UNetSpec, facts: Facts, width: int, scale: int) -> str:
    if facts.size is None:
        return f"{width} channels at 1/{scale}"
    return "×".join(str(n) for n in (width, *row_size(spec, facts.size, scale)))


def about_skip(end: Site, spec: UNetSpec, facts: Facts) -> str:
    """What a skip's line carries, and from where to where."""
    shape = _shape(spec, facts, end.skip_width, end.in_scale)
    return f"skip: op {end.skip} stores {shape}, op {end.index} joins it"


def about_embedding(spec: UNetSpec) -> str:
    """What the box that the timestep enters does."""
    one = spec.style.embedding
    return (
        f"The noise level enters here: one number becomes {one.width} sines and cosines, and two"
        f" linear layers make {one.out} values of them.\nEvery residual block is told all of"
        f" them ({spec.style.inject.value})."
    )

"""Small networks that several studies share, so that their trainings are shared too.

The reference is DDPM's network with base width 12, three levels and one block per level, one
channel, attention in the middle only: large enough to show every effect on 32x32 pictures, small
enough to be trained in half a minute on one core.
"""

from collections.abc import Sequence
from dataclasses import replace

from harness import Training
from pictures import Fields
from undiffuse.recipes import attention_at, hourglass
from undiffuse.spec import (
    Act,
    Attn,
    Concat,
    Conv,
    Down,
    Embedding,
    Op,
    Out,
    Program,
    Res,
    Skip,
    Style,
    UNetSpec,
    Up,
)

WIDTHS = (12, 24, 24)
FIELDS = Fields()
STEPS = 300

# Three widths in about the reference's proportion, even so that norms have groups: candidates for
# `harness.nearest`, which finds networks of equal parameters.
SHAPES = tuple(
    (first, second, third)
    for first in range(10, 18, 2)
    for second in range(2 * first - 6, 2 * first + 7, 2)
    for third in range(second - 4, second + 9, 2)
)


def small_unet(
    widths: Sequence[int] = WIDTHS,
    blocks: int = 1,
    attention_levels: Sequence[int] = (),
    middle: tuple[Op, ...] = (Attn(),),
    zero_init: bool = True,
) -> UNetSpec:
    """A small network of the DDPM family for one channel."""
    program = hourglass(
        widths,
        blocks,
        attention_at(attention_levels),
        lambda _: (Down(),),
        lambda _: (Up(),),
        middle,
    )
    embedding = Embedding(32, 64, 64)
    return UNetSpec(1, 1, program, Style(groups=4, zero_init=zero_init, embedding=embedding))


def without_skips(spec: UNetSpec) -> UNetSpec:
    """The same program with every skip cut."""
    kept: Program = tuple(op for op in spec.program if not isinstance(op, Skip | Concat))
    return replace(spec, program=kept)


def without_attention(spec: UNetSpec) -> UNetSpec:
    """The same program without attention."""
    return replace(spec, program=tuple(op for op in spec.program if not isinstance(op, Attn)))


def small_text003(widths: Sequence[int], full_resolution_skip: bool = False) -> UNetSpec:
    """A small copy of text 003's network: skips after each `Down`, joined before each `Up`."""
    stem: Program = (Conv(widths[0]), Skip()) if full_resolution_skip else (Conv(widths[0]),)
    head: Program = (Concat(), Res(widths[0])) if full_resolution_skip else ()
    program: list[Op] = [*stem]
    for width in widths:
        program += [Res(width), Down(), Skip()]
    program += [Res(widths[-1]), Attn(), Res(widths[-1])]
    for width in (*reversed(widths[:-1]), widths[0]):
        program += [Concat(), Res(width), Up()]
    return UNetSpec(1, 1, (*program, *head, Out()), small_unet().style)


def plain_cnn(total_width: int, layers: int = 4) -> UNetSpec:
    """Text 003's plain network for one channel: `layers` convolutions, whose widths add up to
    `total_width`, and an output convolution."""
    widths = [(total_width + place) // layers for place in range(layers)]
    body = [op for width in widths for op in (Conv(width), Act())]
    return UNetSpec(1, 1, (*body, Out(norm=False)), Style(zero_init=False))


REFERENCE = small_unet()


def reference(seed: int, steps: int) -> Training:
    """The reference network on fields; `steps` is `lab.steps(STEPS)`."""
    return Training("reference", REFERENCE, FIELDS, seed, steps)

"""Hypothesis strategies: random programs that work, random styles, and programs with a fault."""

import importlib.util
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import strategies as st

import undiffuse
from undiffuse.spec import (
    OPS,
    Act,
    Activation,
    Attn,
    Concat,
    Conv,
    Down,
    Downsampling,
    Embedding,
    Inject,
    Join,
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

WIDTHS = st.sampled_from((4, 5, 6, 8))
LEARNED_DOWN = (
    Downsampling.CONV,
    Downsampling.CONV_END,
    Downsampling.CONV4,
    Downsampling.UNSHUFFLE,
)
LEARNED_UP = (Upsampling.NEAREST_CONV, Upsampling.DECONV4)

Draw = Callable[[st.SearchStrategy[Any]], Any]
Piece = tuple[list[Op], int]  # ops, and the width they leave


@st.composite
def programs(draw: Draw, in_channels: int = 3) -> Program:
    """Balanced programs with every op; at most two halvings deep."""
    ops, _ = _body(draw, in_channels, depth=2)
    out = Out(kernel=draw(st.sampled_from((1, 3))), norm=draw(st.booleans()))
    return (*ops, out)


@st.composite
def specs(draw: Draw, style: st.SearchStrategy[Style] | None = None) -> UNetSpec:
    """A random program in a random style."""
    in_channels, out_channels = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    program = draw(programs(in_channels))
    chosen = draw(style if style is not None else styles())
    # The type checks of the tests draw from `random`, which strategies may not.
    state = random.getstate()
    spec = UNetSpec(in_channels, out_channels, program, chosen)
    random.setstate(state)
    return spec


def styles() -> st.SearchStrategy[Style]:
    return st.builds(
        Style,
        norm=st.sampled_from(Norm),
        groups=st.sampled_from((1, 2, 4, 32)),
        group_width=st.sampled_from((1, 4)),
        eps=st.sampled_from((1e-5, 1e-6)),
        order=st.sampled_from(Order),
        inject=st.sampled_from(Inject),
        activation=st.sampled_from(Activation),
        skip_gain=st.sampled_from((1.0, 0.5**0.5)),
        project_resized=st.booleans(),
        zero_init=st.booleans(),
        embedding=embeddings(),
    )


def embeddings() -> st.SearchStrategy[Embedding]:
    plain = st.builds(
        Embedding,
        width=st.integers(4, 9),
        hidden=st.integers(1, 8),
        out=st.integers(1, 8),
        activation=st.sampled_from(Activation),
        final_activation=st.sampled_from((None, *Activation)),
        sin_first=st.booleans(),
        half_minus_one=st.booleans(),
        divide_last=st.booleans(),
        label_first=st.booleans(),
    )
    classes = st.sampled_from(((0, False), (3, False), (3, True)))
    return st.builds(lambda e, c: replace(e, classes=c[0], null=c[1]), plain, classes)


def _body(draw: Draw, width: int, depth: int) -> Piece:
    ops: list[Op] = []
    for _ in range(draw(st.integers(1, 3 if depth == 2 else 2))):
        piece, width = draw(st.sampled_from(PIECES))(draw, width, depth)
        ops += piece
    return ops, width


def _conv(draw: Draw, width: int, depth: int) -> Piece:
    new = draw(WIDTHS)
    return [Conv(new, draw(st.sampled_from((1, 3, 5))))], new


def _res(draw: Draw, width: int, depth: int) -> Piece:
    new = draw(WIDTHS)
    return [Res(new)], new


def _attn(draw: Draw, width: int, depth: int) -> Piece:
    memory = draw(st.sampled_from((0, 3)))
    if draw(st.booleans()):
        return [LinearAttn(draw(st.integers(1, 3)), draw(st.integers(1, 4)), memory)], width
    norm, bias = draw(st.booleans()), draw(st.booleans())
    if draw(st.booleans()):
        return [Attn(draw(st.integers(1, 3)), norm, draw(st.integers(1, 4)), memory, bias)], width
    heads = draw(st.sampled_from([h for h in range(1, width + 1) if width % h == 0]))
    return [Attn(heads, norm, None, memory, bias)], width


def _act(draw: Draw, width: int, depth: int) -> Piece:
    return [Act(draw(st.sampled_from(Activation)))], width


def _skip(draw: Draw, width: int, depth: int) -> Piece:
    if depth == 0:
        return _res(draw, width, depth)
    ops, inner = _body(draw, width, depth - 1)
    if draw(st.booleans()):
        return [Skip(), *ops, Concat()], inner + width
    return [Skip(), *ops, Conv(width), Concat(Join.ADD)], width


def _halve(draw: Draw, width: int, depth: int) -> Piece:
    if depth == 0:
        return _attn(draw, width, depth)
    down, inner = draw(st.sampled_from((_down, _res_down)))(draw, width)
    ops, inner = _body(draw, inner, depth - 1)
    up, outer = draw(st.sampled_from((_up, _res_up)))(draw, inner)
    return [down, *ops, up], outer


def _down(draw: Draw, width: int) -> tuple[Op, int]:
    by = draw(st.sampled_from(Downsampling))
    new = draw(st.none() | WIDTHS) if by in LEARNED_DOWN else None
    return Down(by, new), new or width


def _up(draw: Draw, width: int) -> tuple[Op, int]:
    by = draw(st.sampled_from(Upsampling))
    new = draw(st.none() | WIDTHS) if by in LEARNED_UP else None
    return Up(by, new), new or width


def _res_down(draw: Draw, width: int) -> tuple[Op, int]:
    new = draw(st.just(width) | WIDTHS)
    return Res(new, Resize.DOWN), new


def _res_up(draw: Draw, width: int) -> tuple[Op, int]:
    new = draw(st.just(width) | WIDTHS)
    return Res(new, Resize.UP), new


PIECES = (_conv, _res, _attn, _act, _skip, _skip, _halve, _halve)

SOME_OPS: tuple[Op, ...] = (
    *(Conv(4), Conv(6, 1), Res(4), Res(6, Resize.DOWN), Res(6, Resize.UP), Attn(), Attn(3)),
    *(Down(), Down(Downsampling.MAX), Down(Downsampling.AVG, 6), Up(), Up(Upsampling.NEAREST, 4)),
    *(Attn(2, head_width=3, memory=1), LinearAttn(), Down(Downsampling.UNSHUFFLE, 6)),
    *(Act(), Skip(), Concat(), Concat(Join.ADD), Out()),
)
assert {type(op) for op in SOME_OPS} == set(OPS)


@st.composite
def faulty_programs(draw: Draw) -> Program:
    """A working program after one to four random deletions, insertions or swaps."""
    ops = list(draw(programs()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(ops)))
        match draw(st.sampled_from(("drop", "insert", "swap"))):
            case "drop":
                del ops[at : at + 1]
            case "insert":
                ops.insert(at, draw(st.sampled_from(SOME_OPS)))
            case _:
                other = draw(st.integers(0, len(ops)))
                ops[at : at + 1], ops[other : other + 1] = (
                    ops[other : other + 1],
                    ops[at : at + 1],
                )
    return tuple(ops)


def unchecked(module: str) -> ModuleType:
    """A second copy of a module, without the tests' type checks.

    What users meet when they pass nonsense is our message, not that of the checks.
    """
    name = f"unchecked_{module}"
    path = Path(undiffuse.__file__).parent / f"{module}.py"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    copy = importlib.util.module_from_spec(found)
    sys.modules[name] = copy  # dataclasses look their module up
    found.loader.exec_module(copy)
    return copy

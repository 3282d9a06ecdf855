"""Pictures for people: the U of a spec, loss curves, loss by noise level, a schedule.

Every function returns a matplotlib `Figure` made with the object interface, so nothing is opened,
shown or remembered between calls; matplotlib itself is imported at the first picture, since it
costs more time than most commands take. `save`, `to_svg` and `to_png` turn a figure into a file
that is the same, byte for byte, every time.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from undiffuse.errors import ConfigError, ResourceError
from undiffuse.noise import Schedule
from undiffuse.spec import (
    Act,
    Attn,
    Concat,
    Conv,
    Down,
    Join,
    Op,
    Out,
    Res,
    Resize,
    Site,
    Skip,
    UNetSpec,
    Up,
    trace,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# --- files --------------------------------------------------------------------------------------

_INK, _MUTED, _FAINT = "#20262e", "#68727f", "#d9dee5"
_BLUE, _ORANGE, _GREEN, _PURPLE = "#2f6db3", "#d9731a", "#2f8f5b", "#8a5fb8"
_LINES = (_GREEN, _PURPLE, "#b8892b", "#3a9aa8", "#a8476b")  # bars, in the order given

_RC: dict[str, object] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _MUTED,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "path",  # letters as shapes: no font is needed where the picture is read
    "svg.hashsalt": "undiffuse",  # otherwise ids, and so files, differ from run to run
}


def _look() -> AbstractContextManager[None]:
    """Our settings over matplotlib's defaults, whatever the user's own configuration says."""
    from matplotlib import style

    return style.context(["default", _RC])


def to_svg(figure: "Figure") -> str:
    """The figure as SVG text; equal figures give equal text."""
    buffer = io.StringIO()
    with _look():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: "Figure", dpi: int = 150) -> bytes:
    """The figure as a PNG file of `dpi` pixels per inch."""
    buffer = io.BytesIO()
    with _look():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: "Figure", path: str | Path) -> None:
    """Write the figure as SVG or PNG, by the suffix of `path`.

    Raises:
        ConfigError: the suffix is neither .svg nor .png.
        ResourceError: the place cannot be written.
    """
    path = Path(path)
    writers: dict[str, Callable[[Figure], bytes]] = {
        ".svg": lambda it: to_svg(it).encode(),
        ".png": to_png,
    }
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise ConfigError(f"a drawing is saved as .svg or .png; got {path.name!r}: change its end")
    content = writer(figure)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}; choose another") from error


# --- the U: where everything stands (inches; y grows upwards) ------------------------------------

_BLOCK, _MARKER, _GAP = 0.46, 0.2, 0.11  # widths of an op and of a Skip or Concat; air between
_TURN = 0.16  # from the end of a run of ops to the vertical part of the line that leaves it
_RADIUS: Mapping[type[Op], float] = {Skip: 0.045, Concat: 0.085}
_LANE = 0.085  # between two skip lines above one row
_INDENT = 0.3  # of each level of the U against the one above
_OPENING = 1.1  # between the two arms of the U
_WIDE = 12.5  # a staircase wider than this is folded into a U
_LABELS = 1.75  # left margin with the resolutions
_MARGIN = 0.3


@dataclass(frozen=True)
class _Place:
    site: Site
    left: float
    width: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def middle(self) -> float:
        return self.left + self.width / 2

    @property
    def edge(self) -> float:
        """x at which a line from the left meets the ink."""
        return self.middle - _RADIUS.get(type(self.site.op), self.width / 2)


@dataclass(frozen=True)
class _Layout:
    runs: tuple[tuple[_Place, ...], ...]  # consecutive ops at one resolution
    lanes: Mapping[int, int]  # index of a Concat -> which lane its skip takes, 0 the lowest
    centre: Mapping[int, float]  # scale -> y of the row's blocks
    gutter: Mapping[int, float]  # scale -> y of the free line above the row and its lanes
    block_height: float
    width: float
    height: float  # of the rows alone

    @property
    def places(self) -> dict[int, _Place]:
        return {place.site.index: place for run in self.runs for place in run}


def _lay_out(sites: Sequence[Site], block_height: float) -> _Layout:
    runs = [list(run) for _, run in groupby(sites, key=lambda site: site.in_scale)]
    widths = [_run_width(run) for run in runs]
    starts = _staircase(widths)
    if starts[-1] + widths[-1] > _WIDE and _is_u(runs):
        starts = _folded(widths)
    placed = tuple(tuple(_place_run(*pair)) for pair in zip(runs, starts, strict=True))
    lanes = _lanes(placed)
    centre, gutter, height = _rows(sites, lanes, block_height)
    right = max(run[-1].right for run in placed)
    return _Layout(placed, lanes, centre, gutter, block_height, right, height)


def _op_width(op: Op) -> float:
    return _MARKER if isinstance(op, Skip | Concat) else _BLOCK


def _run_width(run: Sequence[Site]) -> float:
    return sum(_op_width(site.op) for site in run) + _GAP * (len(run) - 1)


def _place_run(run: Sequence[Site], left: float) -> Iterator[_Place]:
    for site in run:
        place = _Place(site, left, _op_width(site.op))
        yield place
        left = place.right + _GAP


def _staircase(widths: Sequence[float]) -> list[float]:
    """Each run starts where the one before ends: a V, as long as there is room for it."""
    starts = [0.0]
    for width in widths[:-1]:
        starts.append(starts[-1] + width + 2 * _TURN)
    return starts


def _is_u(runs: Sequence[Sequence[Site]]) -> bool:
    """Down to the deepest level once and up again once."""
    return len(runs) == 2 * len({run[0].in_scale for run in runs}) - 1


def _folded(widths: Sequence[float]) -> list[float]:
    """Levels below each other: the encoder's at the left, the decoder's at the right."""
    depth = len(widths) // 2
    down, bottom, up = widths[:depth], widths[depth], widths[:depth:-1]
    rows = [d + u + 2 * k * _INDENT for k, (d, u) in enumerate(zip(down, up, strict=True))]
    total = max(max(rows, default=0.0) + _OPENING, bottom + 2 * _INDENT)
    left = [k * _INDENT for k in range(depth)]
    right = [total - k * _INDENT - width for k, width in enumerate(up)]
    middle = total / 2
    if depth:  # the bottom hangs between the lowest two arms, so that no two lines cross
        middle = min(max(middle, left[-1] + down[-1]), right[-1])
    start = min(max(middle - bottom / 2, 0.0), total - bottom)
    return [*left, start, *reversed(right)]


def _lanes(runs: Sequence[Sequence[_Place]]) -> dict[int, int]:
    """The lowest free lane for every skip: a stack only nests, so inner ones come first."""
    places = {place.site.index: place for run in runs for place in run}
    spans = [(p.site.skip, p.site.index) for p in places.values() if p.site.skip is not None]
    lanes = dict[int, int]()
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        scale = places[end].site.in_scale
        inside = [
            lanes[inner_end]
            for inner_start, inner_end in spans
            if start < inner_start and inner_end < end and places[inner_end].site.in_scale == scale
        ]
        lanes[end] = max(inside, default=-1) + 1
    return lanes


def _rows(
    sites: Sequence[Site], lanes: Mapping[int, int], block_height: float
) -> tuple[dict[int, float], dict[int, float], float]:
    """y of each row's blocks and of the free line above it, from 0 downwards."""
    centre, gutter, y = dict[int, float](), dict[int, float](), 0.0
    for scale in sorted({site.in_scale for site in sites}):
        used = [lanes[s.index] + 1 for s in sites if s.index in lanes and s.in_scale == scale]
        top = 0.12 + max(used, default=0) * _LANE
        gutter[scale] = y
        centre[scale] = y - top - block_height / 2
        y = centre[scale] - block_height / 2 - 0.34
    return centre, gutter, -y


# --- the U: ink -----------------------------------------------------------------------------------

_KINDS: Mapping[type[Op], tuple[str, str, str, str]] = {  # word, fill, edge, meaning
    Conv: ("Conv", "#dcefe0", "#6ba57c", "convolution"),
    Res: ("Res", "#d8e6f6", "#6d99cb", "residual block"),
    Attn: ("Attn", "#fbe3c6", "#d69b4f", "self-attention"),
    Down: ("Down", "#f6d6d9", "#cc7f88", "halve"),
    Up: ("Up", "#e3daf3", "#9a84c8", "double"),
    Act: ("Act", "#eef0f2", "#a3acb7", "activation"),
    Out: ("Out", "#d3ece9", "#5fa39b", "head"),
}
_FLOW, _SKIP, _RAIL = "#5b6673", "#3d8d80", "#c3abdf"


def draw_unet(
    spec: UNetSpec,
    size: tuple[int, int] | None = None,
    params: Mapping[int, int] | None = None,
) -> "Figure":
    """The U as one draws it on a whiteboard: one row per resolution, one block per op.

    Ops run from left to right within a row. Small programs descend and rise as a staircase;
    larger ones are folded, encoder at the left and decoder at the right. In the SVG every op is
    the element `op-<its name>` and every skip `skip-<from>-<to>`.

    Args:
        size: height and width of the picture in pixels, for the labels of the rows.
        params: parameters per op index, written into the blocks.
    """
    sites = tuple(trace(spec))
    layout = _lay_out(sites, 0.52 if params else 0.4)
    legend = _legend_rows(sites, layout.width + _LABELS + 0.4)
    foot = 0.3 * len(legend) + (0.42 if _hearing(sites) else 0.0)
    with _look():
        axes = _canvas(layout, foot)
        for scale in layout.centre:
            _draw_row(axes, layout, spec, scale, size)
        _draw_rails(axes, layout, spec)
        _draw_flow(axes, layout, spec)
        for place in layout.places.values():
            if place.site.skip is not None:
                _draw_skip(axes, layout, place)
        for place in layout.places.values():
            _draw_op(axes, layout, place, (params or {}).get(place.site.index))
        _draw_legend(axes, legend, -layout.height - foot + 0.3 * len(legend) - 0.1)
    return _figure_of(axes)


def _figure_of(axes: "Axes") -> "Figure":
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def _canvas(layout: _Layout, foot: float) -> "Axes":
    """An axes over the whole figure in which one unit is one inch."""
    from matplotlib.figure import Figure

    width = max(_LABELS + layout.width + 2 * _MARGIN + 0.4, 5.0)
    height = layout.height + foot + 2 * _MARGIN - 0.1
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-_LABELS - _MARGIN, width - _LABELS - _MARGIN)
    axes.set_ylim(-layout.height - foot - _MARGIN, _MARGIN - 0.1)
    return axes


def _draw_row(
    axes: "Axes", layout: _Layout, spec: UNetSpec, scale: int, size: tuple[int, int] | None
) -> None:
    """The resolution at the left, and a hairline above every row but the first."""
    y = layout.centre[scale]
    left = -_LABELS
    axes.text(left, y, f"1/{scale}", va="center", fontsize=9.5, weight="bold", color=_INK)
    if size is not None:
        height, width = (-(-edge // spec.stride) * spec.stride // scale for edge in size)
        label = f"{height}×{width}"
        axes.text(left + 0.48, y, label, va="center", fontsize=8, color=_MUTED)
    axes.text(left, y, "", gid=f"row-{scale}")


def _draw_rails(axes: "Axes", layout: _Layout, spec: UNetSpec) -> None:
    """The timestep's way to every block that hears it."""
    places = layout.places.values()
    if not _hearing([place.site for place in places]):
        return
    bus, foot = -0.56, -layout.height - 0.12
    ends = list[float]()
    for scale, centre in layout.centre.items():
        hearing = [p for p in places if isinstance(p.site.op, Res) and p.site.in_scale == scale]
        if not hearing:
            continue
        base = centre - layout.block_height / 2
        _rail(axes, [bus, hearing[-1].middle], [base - 0.11] * 2)
        for place in hearing:
            _rail(axes, [place.middle] * 2, [base - 0.11, base])
        ends.append(base - 0.11)
    _rail(axes, [bus, bus], [max(ends), foot])
    _embedding_label(axes, spec, foot)


def _rail(axes: "Axes", x: list[float], y: list[float]) -> None:
    axes.plot(x, y, color=_RAIL, linewidth=0.8, zorder=0.5, solid_capstyle="round")


def _hearing(sites: Sequence[Site]) -> bool:
    return any(isinstance(site.op, Res) for site in sites)


def _embedding_label(axes: "Axes", spec: UNetSpec, y: float) -> None:
    one = spec.style.embedding
    label = "class label" if one.classes == 1 else f"{one.classes} class labels"
    words = f"timestep → sinusoid {one.width} → {one.hidden} → {one.out}"
    words += f", plus {label}" if one.classes else ""
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#f3ecfa", "edgecolor": _RAIL, "lw": 0.8}
    axes.text(
        -_LABELS + 0.05, y - 0.06, words, fontsize=7.5, va="center", bbox=box, gid="embedding"
    )


def _draw_flow(axes: "Axes", layout: _Layout, spec: UNetSpec) -> None:
    first, last = layout.runs[0][0], layout.runs[-1][-1]
    for run in layout.runs:
        y = layout.centre[run[0].site.in_scale]
        axes.plot([run[0].left, run[-1].right], [y, y], color=_FLOW, linewidth=1.1, zorder=1)
    for before, after in pairwise(layout.runs):
        _arrow(axes, _turn(layout, before[-1], after[0]), _FLOW, f"turn-{after[0].site.index}")
    y = layout.centre[1]
    _arrow(axes, [(first.left - 0.34, y), (first.edge, y)], _FLOW, "in")
    _arrow(axes, [(last.right, y), (last.right + 0.34, y)], _FLOW, "out")
    note: dict[str, Any] = {"fontsize": 7, "color": _MUTED, "va": "bottom"}
    axes.text(first.left - 0.2, y + 0.05, str(spec.in_channels), ha="center", **note)
    axes.text(last.right + 0.16, y + 0.05, str(spec.out_channels), ha="center", **note)


def _turn(layout: _Layout, leaving: _Place, entering: _Place) -> list[tuple[float, float]]:
    """The line from the last op of one row to the first op of the next."""
    y0, y1 = layout.centre[leaving.site.in_scale], layout.centre[entering.site.in_scale]
    out, into = leaving.right + _TURN, entering.left - _TURN
    if into >= out - 1e-6:  # forwards: one corner, on the lower of the two rows
        x = out if y1 < y0 else into
        return [(leaving.right, y0), (x, y0), (x, y1), (entering.edge, y1)]
    free = layout.gutter[max(leaving.site.in_scale, entering.site.in_scale)]
    return [
        *((leaving.right, y0), (out, y0), (out, free)),
        *((into, free), (into, y1), (entering.edge, y1)),
    ]


def _draw_skip(axes: "Axes", layout: _Layout, end: _Place) -> None:
    assert end.site.skip is not None
    start = layout.places[end.site.skip]
    y = layout.centre[end.site.in_scale]
    lane = y + layout.block_height / 2 + 0.09 + layout.lanes[end.site.index] * _LANE
    points = [(start.middle, y), (start.middle, lane), (end.middle, lane), (end.middle, y + 0.08)]
    _arrow(axes, points, _SKIP, f"skip-{start.site.index}-{end.site.index}")


def _arrow(axes: "Axes", points: Sequence[tuple[float, float]], color: str, gid: str) -> None:
    """An arrow along straight lines with rounded corners."""
    from matplotlib.patches import FancyArrowPatch

    patch = FancyArrowPatch(
        path=_rounded(points),
        arrowstyle="-|>,head_length=2.6,head_width=1.5",
        color=color,
        linewidth=1.0,
        mutation_scale=1.0,
        capstyle="butt",
        joinstyle="miter",
        zorder=2,
    )
    patch.set_gid(gid)
    axes.add_patch(patch)


def _rounded(points: Sequence[tuple[float, float]], radius: float = 0.06):
    """A path through `points` whose corners are quadratic curves."""
    from matplotlib.path import Path as Outline

    vertices, codes = [np.array(points[0])], [Outline.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        here = np.array(corner)
        for end in (before, after):
            away = np.array(end) - here
            length = float(np.hypot(*away)) or 1.0
            near = here + away * min(radius / length, 0.5)
            vertices += [near] if end is before else [here, near]
            codes += [Outline.LINETO] if end is before else [Outline.CURVE3, Outline.CURVE3]
    return Outline([*vertices, np.array(points[-1])], [*codes, Outline.LINETO])


def _draw_op(axes: "Axes", layout: _Layout, place: _Place, params: int | None) -> None:
    y = layout.centre[place.site.in_scale]
    match place.site.op:
        case Skip():
            _disc(axes, place, y, _SKIP)
        case Concat(by=by):
            _disc(axes, place, y, "white")
            _draw_join(axes, place.middle, y, by)
        case _:
            _draw_block(axes, layout, place, y, params)


def _disc(axes: "Axes", place: _Place, y: float, fill: str) -> None:
    from matplotlib.patches import Circle

    radius = _RADIUS[type(place.site.op)]
    disc = Circle((place.middle, y), radius, facecolor=fill, edgecolor=_SKIP, lw=1.0, zorder=3)
    disc.set_gid(f"op-{place.site.name}")
    axes.add_patch(disc)


def _draw_join(axes: "Axes", x: float, y: float, by: Join) -> None:
    """Two bars for side by side, a cross for the sum."""
    reach = 0.045
    bars = [((x - 0.02,) * 2, (y - reach, y + reach)), ((x + 0.02,) * 2, (y - reach, y + reach))]
    cross = [((x - reach, x + reach), (y, y)), ((x, x), (y - reach, y + reach))]
    for xs, ys in bars if by is Join.CONCAT else cross:
        axes.plot(xs, ys, color=_SKIP, linewidth=1.0, zorder=4)


def _draw_block(axes: "Axes", layout: _Layout, place: _Place, y: float, params: int | None) -> None:
    from matplotlib.patches import FancyBboxPatch

    site, height = place.site, layout.block_height
    _, fill, edge, _ = _KINDS[type(site.op)]
    box = FancyBboxPatch(
        (place.left, y - height / 2),
        place.width,
        height,
        boxstyle="round,pad=0,rounding_size=0.05",
        facecolor=fill,
        edgecolor=edge,
        linewidth=1.0,
        zorder=3,
    )
    box.set_gid(f"op-{site.name}")
    axes.add_patch(box)
    lines = [(_word(site.op), 6.2, _MUTED), (_number(site), 7.8, _INK)]
    lines += [(_short(params), 5.6, _MUTED)] if params is not None else []
    step = height / (len(lines) + 0.35)
    for row, (text, points, color) in enumerate(lines):
        at = y + (len(lines) - 1 - 2 * row) * step / 2
        style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 4}
        axes.text(place.middle, at, text, fontsize=points, color=color, **style)


def _word(op: Op) -> str:
    match op:
        case Res(resize=Resize.DOWN):
            return "Res ▾"
        case Res(resize=Resize.UP):
            return "Res ▴"
        case _:
            return _KINDS[type(op)][0]


def _number(site: Site) -> str:
    return site.op.by.value if isinstance(site.op, Act) else str(site.out_width)


def _short(count: int) -> str:
    """1234 -> 1.2k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


Key = tuple[str, str, str]  # word, fill, edge


def _legend_rows(sites: Sequence[Site], width: float) -> list[list[Key]]:
    """What the colours mean, for the kinds that occur, broken into lines that fit."""
    kinds = {type(site.op) for site in sites}
    keys = [
        (f"{word}: {meaning}", fill, edge)
        for kind, (word, fill, edge, meaning) in _KINDS.items()
        if kind in kinds
    ]
    resized = any(isinstance(site.op, Res) and site.op.resize for site in sites)
    keys += [("▾ halves, ▴ doubles", *_KINDS[Res][1:3])] if resized else []
    joins = {site.op.by for site in sites if isinstance(site.op, Concat)}
    keys += [("skip: store", _SKIP, _SKIP)] if joins else []
    keys += [("join side by side", "||", _SKIP)] if Join.CONCAT in joins else []
    keys += [("join by adding", "+", _SKIP)] if Join.ADD in joins else []
    rows, room = [list[Key]()], width
    for key in keys:
        if rows[-1] and room < _key_width(key):
            rows, room = [*rows, []], width
        rows[-1].append(key)
        room -= _key_width(key)
    return rows


def _key_width(key: Key) -> float:
    return 0.46 + 0.06 * len(key[0])


def _draw_legend(axes: "Axes", rows: Sequence[Sequence[Key]], top: float) -> None:
    for line, row in enumerate(rows):
        x, y = -_LABELS, top - 0.3 * line - 0.1
        for key in row:
            _draw_key(axes, key, x, y)
            axes.text(x + 0.24, y, key[0], fontsize=7.5, va="center", color=_MUTED)
            x += _key_width(key)


def _draw_key(axes: "Axes", key: Key, x: float, y: float) -> None:
    from matplotlib.patches import Circle, FancyBboxPatch

    _, fill, edge = key
    if edge is not _SKIP:
        shape = "round,pad=0,rounding_size=0.03"
        box = FancyBboxPatch((x, y - 0.065), 0.17, 0.13, shape, fc=fill, ec=edge, lw=0.9)
        axes.add_patch(box)
        return
    joins = {"||": Join.CONCAT, "+": Join.ADD}
    radius, paint = (_RADIUS[Concat], "white") if fill in joins else (_RADIUS[Skip], fill)
    axes.add_patch(Circle((x + 0.085, y), radius, fc=paint, ec=edge, lw=1.0))
    if fill in joins:
        _draw_join(axes, x + 0.085, y, joins[fill])


# --- curves ---------------------------------------------------------------------------------------

Row = Mapping[str, object]


def draw_losses(records: Sequence[Row], held_out: Sequence[Row] | None = None) -> "Figure":
    """Training loss over steps, smoothed over raw, with the held-out loss where it was measured.

    Args:
        records: lines of `metrics.jsonl`: {"step", "loss", "val_loss"}; what is missing, null or
            not finite is left out.
        held_out: {"step", "loss"} of the held-out measurements; None: `val_loss` of `records`.
    """
    with _look():
        axes = _plot("step", "loss", (8.2, 3.4))
        steps, loss = _points(records, "step", "loss")
        if len(steps):
            smooth = _smoothed(loss)
            axes.plot(steps, loss, color=_BLUE, alpha=0.22, linewidth=0.8, gid="raw")
            axes.plot(steps, smooth, color=_BLUE, linewidth=1.8, label="training", gid="smooth")
        rows, key = (records, "val_loss") if held_out is None else (held_out, "loss")
        at, held = _points(rows, "step", key)
        if len(at):
            style: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "linewidth": 1.0}
            axes.plot(at, held, "o-", color=_ORANGE, label="held out", gid="held-out", **style)
        _scale_losses(axes, [smoothed for smoothed in (_smoothed(loss), held) if len(smoothed)])
        _legend(axes, len(steps) + len(at))
    return _figure_of(axes)


def _plot(x: str, y: str, size: tuple[float, float]) -> "Axes":
    from matplotlib.figure import Figure

    axes = Figure(figsize=size, layout="constrained").add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _legend(axes: "Axes", count: int) -> None:
    """Names of the lines, or a word where there is none to draw."""
    if count:
        axes.legend(loc="best", fontsize=8.5)
    else:
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": _MUTED}
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, **style)


def _points(rows: Sequence[Row], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of finite numbers, ordered by x."""
    pairs = ((_number_in(row, x), _number_in(row, y)) for row in rows)
    whole = sorted((a, b) for a, b in pairs if a is not None and b is not None)
    table = np.array(whole, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _number_in(row: Row, key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred mean over a fortieth of the run; the window shrinks at both ends."""
    reach = len(values) // 80
    total = np.concatenate([[0.0], np.cumsum(values)])
    here = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(here, len(values) - 1 - here))
    low, high = here - reaches, here + reaches + 1
    return (total[high] - total[low]) / (high - low)


def _scale_losses(axes: "Axes", curves: Sequence[np.ndarray]) -> None:
    """Logarithmic where the loss falls by more than a factor of five."""
    values = np.concatenate(curves) if curves else np.array([1.0])
    if values.min() > 0 and values.max() > 5 * values.min():
        _log_axis(axes.set_yscale, axes.yaxis)
    elif values.min() >= 0:
        axes.set_ylim(bottom=0)


def _log_axis(set_scale: Callable[[str], None], axis: object) -> None:
    """Powers and a few steps between, written as plain numbers."""
    from matplotlib.axis import Axis
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    assert isinstance(axis, Axis)
    set_scale("log")
    low, high = np.log10(axis.get_view_interval())
    steps = (1.0, 2.0, 5.0) if high - low < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def draw_levels(rows: Sequence[Row]) -> "Figure":
    """Loss per noise level: the model's, held out and training, against what is attainable.

    Args:
        rows: one per level: {"ratio": sigma / alpha, "held_out", "train", "bar",
            "train_optimum", "bars": {name: loss}}; what is missing or null is left out.
    """
    bars = [_number_in(row, "bar") for row in rows]
    relative = any(bars)
    with _look():
        axes = _plot(_RATIO, "mean squared error of x0", (8.2, 5.2 if relative else 3.6))
        drawn = _level_curves(axes, rows)
        if drawn:
            _log_axis(axes.set_xscale, axes.xaxis)
            _log_axis(axes.set_yscale, axes.yaxis)
        _legend(axes, drawn)
        if relative:
            _draw_relative(axes, [_divided(*pair) for pair in zip(rows, bars, strict=True)])
    return _figure_of(axes)


_RATIO = "noise level σ/α"


def _level_curves(axes: "Axes", rows: Sequence[Row]) -> int:
    drawn = 0
    for name, colour in zip(_bar_names(rows), _cycled(_LINES), strict=False):
        bars = [{"ratio": row.get("ratio"), "bar": _bars(row).get(name)} for row in rows]
        drawn += _level_line(axes, bars, "bar", name, (colour, "--", 1.2))
    for key, name, look in _LEVEL_LINES:
        drawn += _level_line(axes, rows, key, name, look)
    return drawn


def _divided(row: Row, bar: float | None) -> Row:
    """The row in units of its bar; losses span decades, what matters is a few per cent."""
    if not bar:
        return {}
    losses = {key: _number_in(row, key) for key, _, _ in _LEVEL_LINES}
    named = {name: _number_in(_bars(row), name) for name in _bars(row)}
    return {
        "ratio": row.get("ratio"),
        **{key: value / bar for key, value in losses.items() if value is not None},
        "bars": {name: value / bar for name, value in named.items() if value is not None},
    }


def _draw_relative(above: "Axes", rows: Sequence[Row]) -> None:
    """A second, lower panel with the same lines over the bar."""
    grid = _figure_of(above).add_gridspec(2, 1, height_ratios=(3, 2))
    above.set_subplotspec(grid[0])
    above.set_xlabel("")
    axes = _figure_of(above).add_subplot(grid[1], sharex=above)
    _level_curves(axes, rows)
    for line in axes.get_lines():
        line.set_gid(f"{line.get_gid()}-relative")
    axes.set_xlabel(_RATIO)
    axes.set_ylabel("÷ bar to beat")
    axes.set_ylim(bottom=0)


_LEVEL_LINES = (
    ("train_optimum", "exact optimum of the training set", (_MUTED, ":", 1.4)),
    ("bar", "bar to beat", (_INK, "--", 1.2)),
    ("train", "model, training pictures", (_BLUE, "-", 1.4)),
    ("held_out", "model, held-out pictures", (_ORANGE, "o-", 2.0)),
)


def _cycled(colours: Sequence[str]) -> Iterator[str]:
    while True:
        yield from colours


def _bars(row: Row) -> Mapping[str, object]:
    bars = row.get("bars")
    return {str(name): value for name, value in bars.items()} if isinstance(bars, Mapping) else {}


def _bar_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in _bars(row)))


def _level_line(
    axes: "Axes", rows: Sequence[Row], key: str, name: str, look: tuple[str, str, float]
) -> int:
    """Draw what is positive, and say how many points that were."""
    ratio, loss = _points(rows, "ratio", key)
    seen = (ratio > 0) & (loss > 0)
    if seen.any():
        colour, style, width = look
        points: dict[str, Any] = {"markersize": 4.5, "markeredgecolor": "white"}
        axes.plot(
            ratio[seen], loss[seen], style, color=colour, linewidth=width, label=name, gid=name,
            **points,
        )  # fmt: skip
    return int(seen.sum())


def draw_schedule(schedule: Schedule) -> "Figure":
    """alpha and sigma over t, and the logarithm of the signal-to-noise ratio alpha² / sigma²."""
    t = torch.linspace(0, 1, 513, dtype=torch.float64)
    level = schedule(t)
    alpha, sigma = level.alpha.numpy(), level.sigma.numpy()
    with np.errstate(divide="ignore"):  # alpha may reach 0 at t = 1; the curve ends before it
        log_snr = 2 * (np.log(alpha) - np.log(sigma))
    with _look():
        axes = _plot("t", "", (8.2, 3.0))
        axes.plot(t, alpha, color=_BLUE, linewidth=1.8, label="α, signal", gid="alpha")
        axes.plot(t, sigma, color=_ORANGE, linewidth=1.8, label="σ, noise", gid="sigma")
        if sigma.max() > 5:
            _log_axis(axes.set_yscale, axes.yaxis)
        axes.legend(fontsize=8.5)
        figure = _figure_of(axes)
        axes.set_subplotspec(figure.add_gridspec(1, 2)[0])
        _draw_log_snr(figure, t.numpy(), log_snr)
    return figure


def _draw_log_snr(figure: "Figure", t: np.ndarray, log_snr: np.ndarray) -> None:
    axes = figure.add_subplot(1, 2, 2)
    seen = np.isfinite(log_snr)
    axes.plot(t[seen], log_snr[seen], color=_GREEN, linewidth=1.8, gid="log-snr")
    axes.axhline(0, color=_FAINT, linewidth=1.0)
    axes.set_xlabel("t")
    axes.set_ylabel("ln α²/σ²")

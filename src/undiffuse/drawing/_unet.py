"""The U in ink."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from undiffuse.drawing._figure import INK, MUTED, THROUGH, figure_of, look
from undiffuse.drawing._layout import (
    LABELS,
    MARGIN,
    RADIUS,
    Layout,
    Place,
    Point,
    embedding_point,
    hearing,
    lay_out,
    rail_y,
    skip_line,
    told_line,
    turn,
    way_in,
    way_out,
)
from undiffuse.drawing._legend import draw_join, draw_legend, legend_rows
from undiffuse.drawing._words import (
    FLOW,
    RAIL,
    SKIP,
    Facts,
    about,
    about_embedding,
    about_skip,
    look_of,
    number_of,
    row_size,
    short,
    word_of,
)
from undiffuse.spec import Concat, Skip, UNetSpec, trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch


def draw_unet(
    spec: UNetSpec,
    size: tuple[int, int] | None = None,
    params: Mapping[int, int] | None = None,
    multiply_adds: Mapping[int, int] | None = None,
) -> "Figure":
    """The U as one draws it on a whiteboard: one row per resolution, one block per op.

    Ops run from left to right within a row. Small programs descend and rise as a staircase;
    larger ones are folded, encoder at the left and decoder at the right. In the SVG every op is
    the element `op-<its name>`, every skip the arrow `skip-<from>-<to>`, every way of the timestep
    into a block the arrow `told-<its name>`; where the pointer rests, each says what it does.

    Args:
        size: height and width of the picture in pixels, for the shapes.
        params: parameters per op index, written into the blocks.
        multiply_adds: multiply-adds per op index and picture, for the words under the pointer.
    """
    return draw(spec, Facts(size, params or {}, multiply_adds or {})).figure


class Drawn(NamedTuple):
    """The U, and where everything in it stands; one unit of `layout` is an inch."""

    figure: "Figure"
    layout: Layout
    corner: Point  # the top left of the page, in the layout's units


def draw(spec: UNetSpec, facts: Facts, room_below: float = 0.0) -> Drawn:
    """`draw_unet`, with `room_below` inches left free under it."""
    sites = tuple(trace(spec))
    layout = lay_out(sites, 0.52 if facts.params else 0.4)
    legend = legend_rows(sites, layout.width + LABELS + 0.4)
    foot = 0.3 * len(legend) + (0.42 if hearing(layout) else 0.0)
    with look():
        axes = _canvas(layout, foot + room_below)
        for scale in layout.centre:
            _draw_row(axes, layout, spec, scale, facts.size)
        _draw_rails(axes, layout, spec)
        _draw_flow(axes, layout, spec)
        for place in layout.places.values():
            if place.site.skip is not None:
                words = about_skip(place.site, spec, facts)
                name = f"skip-{place.site.skip}-{place.site.index}"
                _arrow(axes, skip_line(layout, place), SKIP, name).set_label(words)
        for place in layout.places.values():
            _draw_op(axes, layout, place, facts).set_label(about(place.site, spec, facts))
        draw_legend(axes, legend, -layout.height - foot + 0.3 * len(legend) - 0.1)
    return Drawn(figure_of(axes), layout, (axes.get_xlim()[0], axes.get_ylim()[1]))


def _canvas(layout: Layout, foot: float) -> "Axes":
    """An axes over the whole figure in which one unit is one inch."""
    from matplotlib.figure import Figure

    width = max(LABELS + layout.width + 2 * MARGIN + 0.4, 5.0)
    height = layout.height + foot + 2 * MARGIN - 0.1
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-LABELS - MARGIN, width - LABELS - MARGIN)
    axes.set_ylim(-layout.height - foot - MARGIN, MARGIN - 0.1)
    return axes


def _draw_row(
    axes: "Axes", layout: Layout, spec: UNetSpec, scale: int, size: tuple[int, int] | None
) -> None:
    """The resolution at the left."""
    y = layout.centre[scale]
    left = -LABELS
    axes.text(left, y, f"1/{scale}", va="center", fontsize=9.5, weight="bold", color=INK)
    if size is not None:
        label = "×".join(str(n) for n in row_size(spec, size, scale))
        axes.text(left + 0.48, y, label, va="center", fontsize=8, color=MUTED)
    axes.text(left, y, "", gid=f"row-{scale}")


def _draw_rails(axes: "Axes", layout: Layout, spec: UNetSpec) -> None:
    """The timestep's way to every block that hears it."""
    told = hearing(layout)
    if not told:
        return
    bus, foot = embedding_point(layout)
    last = {place.site.in_scale: place for place in told}  # the rightmost of each row
    for scale, place in last.items():
        _rail(axes, [bus, place.middle], [rail_y(layout, scale)] * 2)
    for place in told:
        _arrow(axes, told_line(layout, place)[-2:], RAIL, f"told-{place.site.name}", zorder=0.6)
    _rail(axes, [bus, bus], [max(rail_y(layout, scale) for scale in last), foot])
    _embedding_label(axes, spec, foot)


def _rail(axes: "Axes", x: list[float], y: list[float]) -> None:
    axes.plot(x, y, color=RAIL, linewidth=0.8, zorder=0.5, solid_capstyle="round")


def _embedding_label(axes: "Axes", spec: UNetSpec, y: float) -> None:
    one = spec.style.embedding
    label = "class label" if one.classes == 1 else f"{one.classes} class labels"
    words = f"timestep → sinusoid {one.width} → {one.hidden} → {one.out}"
    words += f", plus {label}" if one.classes else ""
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#f3ecfa", "edgecolor": RAIL, "lw": 0.8}
    style: dict[str, Any] = {"fontsize": 7.5, "va": "center", "bbox": box, "gid": "embedding"}
    axes.text(-LABELS + 0.05, y - 0.06, words, label=about_embedding(spec), **style)


def _draw_flow(axes: "Axes", layout: Layout, spec: UNetSpec) -> None:
    first, last = layout.runs[0][0], layout.runs[-1][-1]
    for run in layout.runs:
        y = layout.centre[run[0].site.in_scale]
        axes.plot([run[0].left, run[-1].right], [y, y], color=FLOW, linewidth=1.1, zorder=1)
    for before, after in pairwise(layout.runs):
        _arrow(axes, turn(layout, before[-1], after[0]), FLOW, f"turn-{after[0].site.index}")
    y = layout.centre[1]
    _arrow(axes, way_in(layout), FLOW, "in")
    _arrow(axes, way_out(layout), FLOW, "out")
    note: dict[str, Any] = {"fontsize": 7, "color": MUTED, "va": "bottom"}
    axes.text(first.left - 0.2, y + 0.05, str(spec.in_channels), ha="center", **note)
    axes.text(last.right + 0.16, y + 0.05, str(spec.out_channels), ha="center", **note)


def _arrow(
    axes: "Axes", points: Sequence[Point], color: str, gid: str, zorder: float = 2
) -> "Patch":
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
        zorder=zorder,
    )
    patch.set_gid(gid)
    axes.add_patch(patch)
    return patch


def _rounded(points: Sequence[Point], radius: float = 0.06):
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


# --- ops ------------------------------------------------------------------------------------------


def _draw_op(axes: "Axes", layout: Layout, place: Place, facts: Facts) -> "Patch":
    y = layout.centre[place.site.in_scale]
    match place.site.op:
        case Skip():
            return _disc(axes, place, y, SKIP)
        case Concat(by=by):
            draw_join(axes, (place.middle, y), by, f"{THROUGH}{place.site.name}")
            return _disc(axes, place, y, "white")
        case _:
            _write_in_block(axes, layout, place, facts.params.get(place.site.index))
            return _draw_block(axes, layout, place, y)


def _disc(axes: "Axes", place: Place, y: float, fill: str) -> "Patch":
    from matplotlib.patches import Circle

    radius = RADIUS[type(place.site.op)]
    disc = Circle((place.middle, y), radius, facecolor=fill, edgecolor=SKIP, lw=1.0, zorder=3)
    disc.set_gid(f"op-{place.site.name}")
    axes.add_patch(disc)
    return disc


def _draw_block(axes: "Axes", layout: Layout, place: Place, y: float) -> "Patch":
    from matplotlib.patches import FancyBboxPatch

    height, colours = layout.block_height, look_of(type(place.site.op))
    box = FancyBboxPatch(
        (place.left, y - height / 2),
        place.width,
        height,
        boxstyle="round,pad=0,rounding_size=0.05",
        facecolor=colours.fill,
        edgecolor=colours.edge,
        linewidth=1.0,
        zorder=3,
    )
    box.set_gid(f"op-{place.site.name}")
    axes.add_patch(box)
    return box


def _write_in_block(axes: "Axes", layout: Layout, place: Place, params: int | None) -> None:
    site, y = place.site, layout.centre[place.site.in_scale]
    lines = [(word_of(site.op), 6.2, MUTED), (number_of(site), 7.8, INK)]
    lines += [(short(params), 5.6, MUTED)] if params is not None else []
    step = layout.block_height / (len(lines) + 0.35)
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 4}
    for row, (text, points, color) in enumerate(lines):
        at = y + (len(lines) - 1 - 2 * row) * step / 2
        name = f"{THROUGH}{site.name}-{row}"
        axes.text(place.middle, at, text, fontsize=points, color=color, gid=name, **style)

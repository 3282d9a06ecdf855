"""What the colours mean, below the U."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from undiffuse.drawing._figure import MUTED
from undiffuse.drawing._layout import LABELS, RADIUS, Point
from undiffuse.drawing._words import SKIP, blocks_among, look_of
from undiffuse.spec import Concat, Join, Res, Site, Skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW = 0.3  # height of a line of keys


class Key(NamedTuple):
    """One sign of the legend: a box, or a disc for skips, with the sign of a join in it."""

    words: str
    fill: str
    edge: str
    join: Join | None = None

    @property
    def width(self) -> float:
        return 0.46 + 0.06 * len(self.words)


def legend_rows(sites: Sequence[Site], width: float) -> list[list[Key]]:
    """What the colours mean, for the kinds that occur, broken into lines that fit."""
    rows, room = [list[Key]()], width
    for key in _keys(sites):
        if rows[-1] and room < key.width:
            rows, room = [*rows, []], width
        rows[-1].append(key)
        room -= key.width
    return rows


def _keys(sites: Sequence[Site]) -> Iterator[Key]:
    for kind in blocks_among({type(site.op) for site in sites}):
        word, fill, edge, meaning, _ = look_of(kind)
        yield Key(f"{word}: {meaning}", fill, edge)
    if any(isinstance(site.op, Res) and site.op.resize for site in sites):
        yield Key("▾ halves, ▴ doubles", *look_of(Res)[1:3])
    joins = {site.op.by for site in sites if isinstance(site.op, Concat)}
    if joins:
        yield Key("skip: store", SKIP, SKIP)
    for by in sorted(joins, key=list(Join).index):
        yield Key(_JOINS.get(by, f"join: {by.value}"), "white", SKIP, by)


_JOINS = {Join.CONCAT: "join side by side", Join.ADD: "join by adding"}


def draw_legend(axes: "Axes", rows: Sequence[Sequence[Key]], top: float) -> None:
    """Write the keys, from `top` downwards."""
    for line, row in enumerate(rows):
        x, y = -LABELS, top - _ROW * line - 0.1
        for key in row:
            _draw_key(axes, key, x, y)
            axes.text(x + 0.24, y, key.words, fontsize=7.5, va="center", color=MUTED)
            x += key.width


def _draw_key(axes: "Axes", key: Key, x: float, y: float) -> None:
    from matplotlib.patches import Circle, FancyBboxPatch

    if key.edge is not SKIP:
        shape = "round,pad=0,rounding_size=0.03"
        box = FancyBboxPatch((x, y - 0.065), 0.17, 0.13, shape, fc=key.fill, ec=key.edge, lw=0.9)
        axes.add_patch(box)
        return
    radius = RADIUS[Skip if key.join is None else Concat]
    axes.add_patch(Circle((x + 0.085, y), radius, fc=key.fill, ec=key.edge, lw=1.0))
    if key.join is not None:
        draw_join(axes, (x + 0.085, y), key.join)


def draw_join(axes: "Axes", centre: Point, by: Join, gid: str | None = None) -> None:
    """Two bars for side by side, a cross for the sum and whatever else there may be."""
    (x, y), reach = centre, 0.045
    bars = [((x - 0.02,) * 2, (y - reach, y + reach)), ((x + 0.02,) * 2, (y - reach, y + reach))]
    cross = [((x - reach, x + reach), (y, y)), ((x, x), (y - reach, y + reach))]
    for number, (xs, ys) in enumerate(bars if by is Join.CONCAT else cross):
        name = None if gid is None else f"{gid}-{number}"
        axes.plot(xs, ys, color=SKIP, linewidth=1.0, zorder=4, gid=name)

"""Where everything in the U stands, in inches; x grows to the right, y upwards. No ink here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from undiffuse.spec import Concat, Op, Res, Site, Skip

Point = tuple[float, float]

_BLOCK, _MARKER, _GAP = 0.46, 0.2, 0.11  # widths of an op and of a Skip or Concat; air between
_TURN = 0.16  # from the end of a run of ops to the vertical part of the line that leaves it
RADIUS: Mapping[type[Op], float] = {Skip: 0.045, Concat: 0.085}
LANE = 0.085  # between two skip lines above one row
_INDENT = 0.3  # of each level of the U against the one above
_OPENING = 1.1  # between the two arms of the U
_WIDE = 12.5  # a staircase wider than this is folded into a U
LABELS = 1.75  # left margin with the resolutions
MARGIN = 0.3


@dataclass(frozen=True)
class Place:
    """An op and the room it takes in its row."""

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
        return self.middle - RADIUS.get(type(self.site.op), self.width / 2)


@dataclass(frozen=True)
class Layout:
    """The whole U without its ink."""

    runs: tuple[tuple[Place, ...], ...]  # consecutive ops at one resolution
    lanes: Mapping[int, int]  # index of a Concat -> which lane its skip takes, 0 the lowest
    centre: Mapping[int, float]  # scale -> y of the row's blocks
    gutter: Mapping[int, float]  # scale -> y of the free line above the row and its lanes
    block_height: float
    width: float
    height: float  # of the rows alone

    @property
    def places(self) -> dict[int, Place]:
        return {place.site.index: place for run in self.runs for place in run}


def lay_out(sites: Sequence[Site], block_height: float) -> Layout:
    """A place for every op, with blocks of that height."""
    runs = [list(run) for _, run in groupby(sites, key=lambda site: site.in_scale)]
    widths = [_run_width(run) for run in runs]
    starts = _staircase(widths)
    if starts[-1] + widths[-1] > _WIDE and _is_u(runs):
        starts = _folded(widths)
    placed = tuple(tuple(_place_run(*pair)) for pair in zip(runs, starts, strict=True))
    lanes = _lanes(placed)
    centre, gutter, height = _rows(sites, lanes, block_height)
    right = max(run[-1].right for run in placed)
    return Layout(placed, lanes, centre, gutter, block_height, right, height)


def _op_width(op: Op) -> float:
    return _MARKER if isinstance(op, Skip | Concat) else _BLOCK


def _run_width(run: Sequence[Site]) -> float:
    return sum(_op_width(site.op) for site in run) + _GAP * (len(run) - 1)


def _place_run(run: Sequence[Site], left: float) -> Iterator[Place]:
    for site in run:
        place = Place(site, left, _op_width(site.op))
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


def _lanes(runs: Sequence[Sequence[Place]]) -> dict[int, int]:
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
        top = 0.12 + max(used, default=0) * LANE
        gutter[scale] = y
        centre[scale] = y - top - block_height / 2
        y = centre[scale] - block_height / 2 - 0.34
    return centre, gutter, -y


def turn(layout: Layout, leaving: Place, entering: Place) -> list[Point]:
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


def skip_line(layout: Layout, end: Place) -> list[Point]:
    """The line from a `Skip` up to its lane, along it, and down to the `Concat` at `end`."""
    assert end.site.skip is not None
    start = layout.places[end.site.skip]
    y = layout.centre[end.site.in_scale]
    lane = y + layout.block_height / 2 + 0.09 + layout.lanes[end.site.index] * LANE
    return [(start.middle, y), (start.middle, lane), (end.middle, lane), (end.middle, y + 0.08)]


def way_in(layout: Layout) -> list[Point]:
    """The picture's way to the first op."""
    first, y = layout.runs[0][0], layout.centre[1]
    return [(first.left - 0.34, y), (first.edge, y)]


def way_out(layout: Layout) -> list[Point]:
    """The answer's way from the last op."""
    last, y = layout.runs[-1][-1], layout.centre[1]
    return [(last.right, y), (last.right + 0.34, y)]


# --- the timestep's way ---------------------------------------------------------------------------

_BUS = -0.56  # x of the vertical line that leads to every row


def hearing(layout: Layout) -> list[Place]:
    """The ops that hear the timestep, in order."""
    return [place for place in layout.places.values() if isinstance(place.site.op, Res)]


def embedding_point(layout: Layout) -> Point:
    """Where the timestep's vector leaves its box."""
    return _BUS, -layout.height - 0.12


def rail_y(layout: Layout, scale: int) -> float:
    """y of the horizontal line under one row."""
    return layout.centre[scale] - layout.block_height / 2 - 0.11


def told_line(layout: Layout, place: Place) -> list[Point]:
    """The vector's way from its box to one block: along the bus, along the row, up."""
    (bus, foot), y = embedding_point(layout), rail_y(layout, place.site.in_scale)
    start = (bus, foot + 0.05)  # above the frame of the box
    return [start, (bus, y), (place.middle, y), (place.middle, y + 0.11)]

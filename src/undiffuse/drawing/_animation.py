"""The U in motion: a pulse runs through the program, in SVG and CSS alone.

Everything that moves is drawn over the still picture, invisible until its time comes. So a reader
that ignores CSS animations, or a person who asked for less motion, sees the still picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import dist
from xml.sax.saxutils import escape

from undiffuse.drawing._figure import to_svg
from undiffuse.drawing._layout import (
    RADIUS,
    Layout,
    Place,
    Point,
    hearing,
    skip_line,
    told_line,
    turn,
    way_in,
    way_out,
)
from undiffuse.drawing._unet import Drawn, draw
from undiffuse.drawing._words import Facts, look_of
from undiffuse.spec import Concat, Skip, UNetSpec

_INCH = 72.0  # units of matplotlib's SVG
_LEAD, _STEP, _TAIL = 1.8, 0.5, 1.5  # seconds: the timestep, one op, rest before it starts again
_ROOM = 0.32  # inches below the U, for a line of words


def animate_unet(
    spec: UNetSpec,
    size: tuple[int, int] | None = None,
    params: Mapping[int, int] | None = None,
    multiply_adds: Mapping[int, int] | None = None,
) -> str:
    """`draw_unet` as an SVG text in which the data flow moves, over and over again.

    First the noise level becomes a vector, of which every `Res` block is told. Then a pulse runs
    through the program in order, half a second per op. A skip's arrow lights when it is pushed,
    stays faintly lit as long as it waits on the stack, and lights again when it is popped; each
    `Res` lights its line from the vector. A line below says what happens. The text is one file
    without script; whoever asks for reduced motion gets the still picture.

    In the SVG the light over an op is `lit-<its name>`, and `animation-delay` says when, in
    seconds; likewise `push-` and `pop-<from>-<to>` for skips, `hears-<its name>` for the vector.
    """
    drawn = draw(spec, Facts(size, params or {}, multiply_adds or {}), _ROOM)
    still = to_svg(drawn.figure)
    return still.replace("</svg>", f"{_overlay(_Stage(drawn))}</svg>")


@dataclass(frozen=True)
class _Stage:
    """The picture that is played on: places in units of the SVG, times in seconds."""

    drawn: Drawn

    @property
    def layout(self) -> Layout:
        return self.drawn.layout

    @property
    def places(self) -> list[Place]:
        return list(self.layout.places.values())

    @property
    def length(self) -> float:
        return self.at(len(self.layout.places)) + _TAIL

    def at(self, index: int) -> float:
        """When the pulse reaches an op."""
        return _LEAD + _STEP * index

    def point(self, point: Point) -> Point:
        left, top = self.drawn.corner
        return (point[0] - left) * _INCH, (top - point[1]) * _INCH

    def path(self, points: Sequence[Point]) -> str:
        return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in map(self.point, points))


def _overlay(stage: _Stage) -> str:
    parts = (
        f"<style>{_css(stage)}</style>",
        *(_told(stage, place) for place in hearing(stage.layout)),
        *(_skip(stage, place) for place in stage.places if place.site.skip is not None),
        *(_lit(stage, place) for place in stage.places),
        '<circle id="pulse" class="flow pulse" r="5"/>',
        *(_caption(stage, place) for place in stage.places),
    )
    return '<g id="flow" pointer-events="none">\n' + "\n".join(parts) + "\n</g>\n"


# --- what lights ----------------------------------------------------------------------------------


def _lit(stage: _Stage, place: Place) -> str:
    start = _delay(stage.at(place.site.index))
    return f'<{_outline(stage, place)} id="lit-{place.site.name}" class="flow lit" {start}/>'


def _outline(stage: _Stage, place: Place) -> str:
    y = stage.layout.centre[place.site.in_scale]
    if isinstance(place.site.op, Skip | Concat):
        cx, cy = stage.point((place.middle, y))
        radius = (RADIUS[type(place.site.op)] + 0.03) * _INCH
        return f'circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius:.1f}"'
    left, top = stage.point((place.left, y + stage.layout.block_height / 2))
    width, height = place.width * _INCH, stage.layout.block_height * _INCH
    return f'rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3.6"'


def _told(stage: _Stage, place: Place) -> str:
    """The vector's way into one block, and the block as it is told; again when its time comes."""
    name, way = place.site.name, stage.path(told_line(stage.layout, place))
    first, then = _delay(0.5 * _LEAD), _delay(stage.at(place.site.index))
    line = f'path d="{way}" pathLength="1"'
    return (
        f'<{_outline(stage, place)} class="flow told" {first}/>'
        f'<{line} class="flow vector" {_delay(0.3 * _LEAD)}/>'
        f'<{line} id="hears-{name}" class="flow vector" {then}/>'
    )


def _skip(stage: _Stage, end: Place) -> str:
    """Three lights on one line: pushed, waiting, popped."""
    assert end.site.skip is not None
    pair = f"{end.site.skip}-{end.site.index}"
    line = f'path d="{stage.path(skip_line(stage.layout, end))}" pathLength="1"'
    pushed, popped = (_delay(stage.at(index)) for index in (end.site.skip, end.site.index))
    return (
        f'<{line} id="push-{pair}" class="flow skip" {pushed}/>'
        f'<{line} class="flow skip" style="animation-name: held-{pair}"/>'
        f'<{line} id="pop-{pair}" class="flow skip back" {popped}/>'
    )


def _delay(seconds: float) -> str:
    return f'style="animation-delay: {seconds:.2f}s"'


def _caption(stage: _Stage, place: Place) -> str:
    """Below the U, for as long as the pulse is there."""
    words = f"{place.site.name}: {look_of(type(place.site.op)).does}"
    x, _ = stage.point((stage.drawn.corner[0] + 0.3, 0.0))
    y = stage.drawn.figure.get_figheight() * _INCH - 12
    start = _delay(stage.at(place.site.index))
    return f'<text class="flow words" x="{x:.1f}" y="{y:.1f}" {start}>{escape(words)}</text>'


# --- when -----------------------------------------------------------------------------------------


def _css(stage: _Stage) -> str:
    return "\n".join((*_rules(stage), *_held(stage), *_pulse(stage), _REDUCED))


_REDUCED = """@media (prefers-reduced-motion: reduce) {
  .flow, #embedding { animation: none !important }
}"""


def _rules(stage: _Stage) -> Iterator[str]:
    """One shape of light each; an element's delay says when it shines."""
    total = stage.length
    yield (
        f".flow {{ opacity: 0; fill: none; animation: {total:.2f}s linear infinite }}\n"
        ".lit { fill: #ffd23f; fill-opacity: .28; stroke: #e08a00; stroke-width: 2.5;"
        " animation-name: lit }\n"
        ".told { fill: #8a5fb8; fill-opacity: .25; stroke: #8a5fb8; stroke-width: 2;"
        " animation-name: lit }\n"
        ".vector { stroke: #8a5fb8; stroke-width: 2.2; stroke-dasharray: 1;"
        " animation-name: runs }\n"
        ".skip { stroke: #12a389; stroke-width: 3; animation-name: lit }\n"
        ".back { stroke-dasharray: 1; animation-name: runs }\n"
        ".pulse { fill: #e04f2f; stroke: white; stroke-width: 1.5; animation-name: pulse }\n"
        ".words { fill: #20262e; font: 11px sans-serif; animation-name: words }\n"
        f"#embedding {{ animation: named {total:.2f}s linear infinite }}"
    )
    short, long, gone = (_percent(n * _STEP, total) for n in (0.25, 1.0, 2.2))
    yield f"@keyframes lit {{ 0%, {long} {{ opacity: 1 }} {gone}, 100% {{ opacity: 0 }} }}"
    yield (
        f"@keyframes runs {{ 0% {{ opacity: 1; stroke-dashoffset: 1 }} {long} {{ opacity: 1;"
        f" stroke-dashoffset: 0 }} {gone}, 100% {{ opacity: 0; stroke-dashoffset: 0 }} }}"
    )
    end = _percent(0.999 * _STEP, total)
    yield f"@keyframes words {{ 0%, {end} {{ opacity: 1 }} {long}, 100% {{ opacity: 0 }} }}"
    yield f"@keyframes named {{ 0%, {long}, 100% {{ opacity: 1 }} {short} {{ opacity: .25 }} }}"


def _held(stage: _Stage) -> Iterator[str]:
    """A skip shines faintly from its push to its pop, and no other time."""
    for place in stage.places:
        if place.site.skip is None:
            continue
        start, end = stage.at(place.site.skip), stage.at(place.site.index)
        a, b, c, d = (
            _percent(s, stage.length) for s in (start, start + 0.01, end + _STEP, end + 2 * _STEP)
        )
        yield (
            f"@keyframes held-{place.site.skip}-{place.site.index} {{ 0%, {a} {{ opacity: 0 }}"
            f" {b}, {c} {{ opacity: .45 }} {d}, 100% {{ opacity: 0 }} }}"
        )


def _pulse(stage: _Stage) -> Iterator[str]:
    """The pulse rests in every op for half its time and travels in the other half."""
    frames = list(_stops(stage))
    (first, at_first), (last, at_last) = frames[0], frames[-1]
    yield "@keyframes pulse {"
    yield f"  0%, {_percent(at_first - 0.01, stage.length)} {{ opacity: 0; {_move(first)} }}"
    for point, seconds in frames:
        yield f"  {_percent(seconds, stage.length)} {{ opacity: 1; {_move(point)} }}"
    yield f"  {_percent(at_last + 0.2, stage.length)}, 100% {{ opacity: 0; {_move(last)} }}"
    yield "}"


def _stops(stage: _Stage) -> Iterator[tuple[Point, float]]:
    """(where, when) of every corner of the pulse's way, in order."""
    places, begin = stage.places, stage.at(0) - _STEP
    way = [*way_in(stage.layout), _centre(stage, places[0])]
    yield stage.point(way[0]), begin
    yield from _travel(stage, way, begin, stage.at(0))
    for before, after in pairwise(places):
        leave = stage.at(before.site.index) + _STEP / 2
        yield stage.point(_centre(stage, before)), leave
        way = [_centre(stage, before), *_between(stage, before, after), _centre(stage, after)]
        yield from _travel(stage, way, leave, stage.at(after.site.index))
    leave = stage.at(places[-1].site.index) + _STEP / 2
    yield stage.point(_centre(stage, places[-1])), leave
    way = [_centre(stage, places[-1]), *way_out(stage.layout)]
    yield from _travel(stage, way, leave, leave + _STEP / 2)


def _between(stage: _Stage, before: Place, after: Place) -> Sequence[Point]:
    same = before.site.in_scale == after.site.in_scale
    return () if same else turn(stage.layout, before, after)


def _centre(stage: _Stage, place: Place) -> Point:
    return place.middle, stage.layout.centre[place.site.in_scale]


def _travel(
    stage: _Stage, way: Sequence[Point], start: float, end: float
) -> Iterator[tuple[Point, float]]:
    """At even speed along straight lines; the start itself is left to whoever came before."""
    whole, gone = sum(dist(a, b) for a, b in pairwise(way)), 0.0
    for before, here in pairwise(way):
        gone += dist(before, here)
        yield stage.point(here), start + (end - start) * gone / whole


def _percent(seconds: float, total: float) -> str:
    return f"{100 * seconds / total:.3f}%"


def _move(point: Point) -> str:
    return f"transform: translate({point[0]:.1f}px, {point[1]:.1f}px)"

"""Quality against the number of network evaluations, a line per sampler."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from undiffuse.drawing._axes import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    Row,
    legend,
    log_axis,
    number_in,
    plot,
    points,
)
from undiffuse.drawing._figure import INK, MUTED, figure_of, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SAMPLERS = (BLUE, ORANGE, GREEN, PURPLE, "#b8892b", "#3a9aa8", "#a8476b", "#7a8c2e", INK)
_MARKERS = "osD^v<>ph"


def draw_pareto(body: Row) -> "Figure":
    """Fréchet distance, and distance to the pictures of 100 evaluations, over evaluations.

    Left a ring marks the best sampler at every number of evaluations; the dashed line is what 100
    evaluations score, the dotted one as many real pictures.

    Args:
        body: {"settings": [{"sampler", "evaluations", "frechet", "rms"}], "best": likewise,
            "reference": likewise, "floor": number}; what is missing or null is left out.
    """
    settings = _rows(body, "settings")
    with look():
        left = plot(_EVALUATIONS, "Fréchet distance", (9.6, 4.2))
        figure = figure_of(left)
        grid = figure.add_gridspec(1, 2, width_ratios=(3, 2))
        left.set_subplotspec(grid[0])
        drawn = _draw_samplers(left, settings, "frechet")
        right = figure.add_subplot(grid[1])
        right.set_xlabel(_EVALUATIONS)
        right.set_ylabel("root mean square to 100 evaluations")
        exact = _draw_samplers(right, settings, "rms")
        _draw_limits(left, body)
        for axes, count in ((left, drawn), (right, exact)):
            if count:
                log_axis(axes.set_xscale, axes.xaxis)
                log_axis(axes.set_yscale, axes.yaxis)
        legend(left, drawn)
    return figure


_EVALUATIONS = "network evaluations"


def _rows(body: Row, key: str) -> Sequence[Row]:
    rows = body.get(key)
    whole = cast("Sequence[object]", rows) if isinstance(rows, list | tuple) else ()
    return [cast("Row", row) for row in whole if isinstance(row, Mapping)]


def _draw_samplers(axes: "Axes", rows: Sequence[Row], key: str) -> int:
    """A line per sampler, with the same colour in every panel; how many points there are."""
    names, drawn = list(dict.fromkeys(str(row.get("sampler")) for row in rows)), 0
    for place, name in enumerate(names):
        mine = [row for row in rows if str(row.get("sampler")) == name]
        at, value = points(mine, "evaluations", key)
        seen = value > 0
        drawn += int(seen.sum())
        if seen.any():
            axes.plot(
                at[seen],
                value[seen],
                marker=_MARKERS[place % len(_MARKERS)],
                color=_SAMPLERS[place % len(_SAMPLERS)],
                linewidth=1.4,
                markersize=4.5,
                markeredgecolor="white",
                label=name,
                gid=f"{key}-{name}",
            )
    return drawn


def _draw_limits(axes: "Axes", body: Row) -> None:
    reference = body.get("reference")
    often = number_in(cast("Row", reference), "frechet") if isinstance(reference, Mapping) else None
    for value, style, name in (
        (often, "--", "at 100 evaluations"),
        (number_in(body, "floor"), ":", "real pictures"),
    ):
        if value:
            axes.axhline(value, color=MUTED, linestyle=style, linewidth=1.2, label=name)
    at, best = points(_rows(body, "best"), "evaluations", "frechet")
    axes.scatter(at, best, s=90, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=3)

"""Losses over noise levels, and what their excess over the best possible costs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from undiffuse.drawing._axes import (
    BLUE,
    LINES,
    ORANGE,
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

Panel = Callable[["Axes"], None]


def draw_levels(rows: Sequence[Row], values: int | None = None) -> "Figure":
    """Loss per noise level: the model's, held out and training, against what is attainable.

    Below, where there is a bar, the same in units of the bar; where there are gaps, what each
    octave of noise costs in nats: gap / ratio^2 times ln 2.

    Args:
        rows: one per level: {"ratio": sigma / alpha, "held_out", "train", "bar",
            "train_optimum", "bars": {name: loss}, "excess": {"low", "high"} in per cent,
            "gap": {"value", "low", "high"}}; what is missing or null is left out.
        values: of a picture; with them costs are per picture and not per value.
    """
    bars = [number_in(row, "bar") for row in rows]
    costs = [{"ratio": row.get("ratio"), **_inner(row, "gap")} for row in rows]
    lower: list[Panel] = []
    if any(bars):
        relative = [_divided(*pair) for pair in zip(rows, bars, strict=True)]
        lower.append(partial(_draw_relative, relative))
    if len(points(costs, "ratio", "value")[0]):
        lower.append(partial(_draw_costs, costs, values))
    with look():
        axes = plot("", "mean squared error of x0", (8.2, 3.6 + 1.6 * len(lower)))
        drawn = _level_curves(axes, rows)
        if drawn:
            log_axis(axes.set_xscale, axes.xaxis)
            _bound_below(axes, rows)
            log_axis(axes.set_yscale, axes.yaxis)
        legend(axes, drawn)
        _stacked(axes, lower)
    return figure_of(axes)


def draw_gap(rows: Sequence[Row], values: int | None = None) -> "Figure":
    """A denoiser's excess over an exact one: in per cent of the least error, and what it costs.

    Args:
        rows: `GapReport.asdict()["rows"]`: {"ratio", "percent", "percent_low", "percent_high",
            "mmse", "excess"}; what is missing or null is left out.
        values: of a picture; with them costs are per picture and not per value.
    """
    costs = [{"ratio": row.get("ratio"), "value": row.get("excess")} for row in rows]
    with look():
        axes = plot("", "excess, % of the least error", (8.2, 5.2))
        ratio, percent = points(rows, "ratio", "percent")
        if len(ratio):
            _draw_band(axes, rows, ("percent_low", "percent_high"))
            axes.plot(ratio, percent, "o-", color=ORANGE, label="model", gid="excess", **_DOTS)
            log_axis(axes.set_xscale, axes.xaxis)
            axes.set_ylim(bottom=0)
        legend(axes, len(ratio))
        _stacked(axes, [partial(_draw_costs, costs, values)] if len(ratio) else [])
    return figure_of(axes)


def _stacked(above: "Axes", lower: Sequence[Panel]) -> None:
    """Further, lower panels under one that is there, over the same noise levels."""
    figure = figure_of(above)
    grid = figure.add_gridspec(1 + len(lower), 1, height_ratios=(3, *(2 for _ in lower)))
    above.set_subplotspec(grid[0])
    panels = [above]
    for place, draw in enumerate(lower, 1):
        panels.append(figure.add_subplot(grid[place], sharex=above))
        draw(panels[-1])
    panels[-1].set_xlabel(_RATIO)


def _draw_costs(rows: Sequence[Row], values: int | None, axes: "Axes") -> None:
    """The area under the line, over octaves, is the sum."""
    ratio, gap = points(rows, "ratio", "value")
    scale = math.log(2) * (values or 1) / ratio**2
    _draw_band(axes, rows, ("low", "high"), lambda r: math.log(2) * (values or 1) / r**2)
    axes.fill_between(ratio, 0, gap * scale, color=ORANGE, alpha=0.12, linewidth=0)
    axes.plot(ratio, gap * scale, "o-", color=ORANGE, gid="cost", **_DOTS)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_ylabel(f"nats per octave\nand {'value' if values is None else 'picture'}")


def _draw_band(
    axes: "Axes",
    rows: Sequence[Row],
    ends: tuple[str, str],
    scale: Callable[[np.ndarray], np.ndarray | float] = lambda ratio: 1.0,
) -> None:
    """From the lower to the upper end of the rows' intervals; those without are left out."""
    whole = [row for row in rows if all(number_in(row, end) is not None for end in ends)]
    ratio, low = points(whole, "ratio", ends[0])
    high = points(whole, "ratio", ends[1])[1]
    if len(ratio):
        by = scale(ratio)
        axes.fill_between(ratio, low * by, high * by, color=ORANGE, alpha=0.25, linewidth=0)


_DOTS: dict[str, Any] = {"linewidth": 1.8, "markersize": 4.5, "markeredgecolor": "white"}


_RATIO = "noise level σ/α"


def _bound_below(axes: "Axes", rows: Sequence[Row]) -> None:
    """At what is compared: the train optimum falls to 0 and may leave the picture there."""
    seen = np.concatenate([points(rows, "ratio", key)[1] for key in ("bar", "train", "held_out")])
    if (seen > 0).any():
        axes.set_ylim(bottom=float(seen[seen > 0].min()) / 30)


def _level_curves(axes: "Axes", rows: Sequence[Row]) -> int:
    drawn = 0
    for name, colour in zip(_bar_names(rows), _cycled(LINES), strict=False):
        bars = [{"ratio": row.get("ratio"), "bar": _bars(row).get(name)} for row in rows]
        drawn += _level_line(axes, bars, "bar", name, (colour, "--", 1.2))
    for key, name, stroke in _LEVEL_LINES:
        drawn += _level_line(axes, rows, key, name, stroke)
    return drawn


def _divided(row: Row, bar: float | None) -> Row:
    """The row in units of its bar; losses span decades, what matters is a few per cent."""
    if not bar:
        return {}
    losses = {key: number_in(row, key) for key, _, _ in _LEVEL_LINES}
    named = {name: number_in(_bars(row), name) for name in _bars(row)}
    return {
        "ratio": row.get("ratio"),
        **{key: value / bar for key, value in losses.items() if value is not None},
        **{end: 1 + value / 100 for end, value in _ends(row)},
        "bars": {name: value / bar for name, value in named.items() if value is not None},
    }


def _draw_relative(rows: Sequence[Row], axes: "Axes") -> None:
    """The same lines over the bar, with the interval of the excess."""
    _draw_band(axes, rows, ("low", "high"))
    _level_curves(axes, rows)
    for line in axes.get_lines():
        line.set_gid(f"{line.get_gid()}-relative")
    axes.set_ylabel("÷ bar to beat")
    axes.set_ylim(0, _top(axes, rows))


def _top(axes: "Axes", rows: Sequence[Row]) -> float:
    """Twice the bar, or as high as the model goes; a few per cent are to be seen."""
    model = [points(rows, "ratio", key)[1] for key in ("held_out", "train")]
    return max(2.0, 1.1 * float(np.concatenate(model).max(initial=0.0)))


_LEVEL_LINES = (
    ("train_optimum", "exact optimum of the training set", (MUTED, ":", 1.4)),
    ("bar", "bar to beat", (INK, "--", 1.2)),
    ("train", "model, training pictures", (BLUE, "-", 1.4)),
    ("held_out", "model, held-out pictures", (ORANGE, "o-", 2.0)),
)


def _cycled(colours: Sequence[str]) -> Iterator[str]:
    while True:
        yield from colours


def _inner(row: Row, key: str) -> Mapping[str, object]:
    inner = row.get(key)
    return {str(name): value for name, value in inner.items()} if isinstance(inner, Mapping) else {}


def _bars(row: Row) -> Mapping[str, object]:
    return _inner(row, "bars")


def _ends(row: Row) -> Iterator[tuple[str, float]]:
    """ "low" and "high" of the row's excess, as far as they are numbers."""
    excess = _inner(row, "excess")
    both = ((end, number_in(excess, end)) for end in ("low", "high"))
    return ((end, value) for end, value in both if value is not None)


def _bar_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in _bars(row)))


def _level_line(
    axes: "Axes", rows: Sequence[Row], key: str, name: str, stroke: tuple[str, str, float]
) -> int:
    """Draw what is positive, and say how many points that were."""
    ratio, loss = points(rows, "ratio", key)
    seen = (ratio > 0) & (loss > 0)
    if seen.any():
        colour, style, width = stroke
        dots: dict[str, Any] = {**_DOTS, "linewidth": width, "color": colour}
        axes.plot(ratio[seen], loss[seen], style, label=name, gid=name, **dots)
    return int(seen.sum())

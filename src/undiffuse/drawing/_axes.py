"""What all curves share: axes, scales, legends, and numbers out of rows that may lack some."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from undiffuse.drawing._figure import MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE = "#2f6db3", "#d9731a", "#2f8f5b", "#8a5fb8"
LINES = (GREEN, PURPLE, "#b8892b", "#3a9aa8", "#a8476b")  # of what is only compared with

Row = Mapping[str, object]


def plot(x: str, y: str, size: tuple[float, float]) -> "Axes":
    from matplotlib.figure import Figure

    axes = Figure(figsize=size, layout="constrained").add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def legend(axes: "Axes", count: int) -> None:
    """Names of the lines, or a word where there is none to draw."""
    if count:
        axes.legend(loc="best", fontsize=8.5)
    else:
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": MUTED}
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, **style)


def points(rows: Sequence[Row], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of finite numbers, ordered by x."""
    pairs = ((number_in(row, x), number_in(row, y)) for row in rows)
    whole = sorted((a, b) for a, b in pairs if a is not None and b is not None)
    table = np.array(whole, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def number_in(row: Row, key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def log_axis(set_scale: Callable[[str], None], axis: object) -> None:
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

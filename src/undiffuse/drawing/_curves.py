"""Curves: losses over steps, losses over noise levels, and what a schedule does."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from undiffuse.drawing._figure import FAINT, INK, MUTED, figure_of, look
from undiffuse.noise import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _PURPLE = "#2f6db3", "#d9731a", "#2f8f5b", "#8a5fb8"
_LINES = (_GREEN, _PURPLE, "#b8892b", "#3a9aa8", "#a8476b")  # bars, in the order given

Row = Mapping[str, object]


def draw_losses(records: Sequence[Row], held_out: Sequence[Row] | None = None) -> "Figure":
    """Training loss over steps, smoothed over raw, with the held-out loss where it was measured.

    Args:
        records: lines of `metrics.jsonl`: {"step", "loss", "val_loss"}; what is missing, null or
            not finite is left out.
        held_out: {"step", "loss"} of the held-out measurements; None: `val_loss` of `records`.
    """
    with look():
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
    return figure_of(axes)


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
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": MUTED}
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
    with look():
        axes = _plot(_RATIO, "mean squared error of x0", (8.2, 5.2 if relative else 3.6))
        drawn = _level_curves(axes, rows)
        if drawn:
            _log_axis(axes.set_xscale, axes.xaxis)
            _log_axis(axes.set_yscale, axes.yaxis)
        _legend(axes, drawn)
        if relative:
            _draw_relative(axes, [_divided(*pair) for pair in zip(rows, bars, strict=True)])
    return figure_of(axes)


_RATIO = "noise level σ/α"


def _level_curves(axes: "Axes", rows: Sequence[Row]) -> int:
    drawn = 0
    for name, colour in zip(_bar_names(rows), _cycled(_LINES), strict=False):
        bars = [{"ratio": row.get("ratio"), "bar": _bars(row).get(name)} for row in rows]
        drawn += _level_line(axes, bars, "bar", name, (colour, "--", 1.2))
    for key, name, stroke in _LEVEL_LINES:
        drawn += _level_line(axes, rows, key, name, stroke)
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
    grid = figure_of(above).add_gridspec(2, 1, height_ratios=(3, 2))
    above.set_subplotspec(grid[0])
    above.set_xlabel("")
    axes = figure_of(above).add_subplot(grid[1], sharex=above)
    _level_curves(axes, rows)
    for line in axes.get_lines():
        line.set_gid(f"{line.get_gid()}-relative")
    axes.set_xlabel(_RATIO)
    axes.set_ylabel("÷ bar to beat")
    axes.set_ylim(bottom=0)


_LEVEL_LINES = (
    ("train_optimum", "exact optimum of the training set", (MUTED, ":", 1.4)),
    ("bar", "bar to beat", (INK, "--", 1.2)),
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
    axes: "Axes", rows: Sequence[Row], key: str, name: str, stroke: tuple[str, str, float]
) -> int:
    """Draw what is positive, and say how many points that were."""
    ratio, loss = _points(rows, "ratio", key)
    seen = (ratio > 0) & (loss > 0)
    if seen.any():
        colour, style, width = stroke
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
    with look():
        axes = _plot("t", "", (8.2, 3.0))
        axes.plot(t, alpha, color=_BLUE, linewidth=1.8, label="α, signal", gid="alpha")
        axes.plot(t, sigma, color=_ORANGE, linewidth=1.8, label="σ, noise", gid="sigma")
        if sigma.max() > 5:
            _log_axis(axes.set_yscale, axes.yaxis)
        axes.legend(fontsize=8.5)
        figure = figure_of(axes)
        axes.set_subplotspec(figure.add_gridspec(1, 2)[0])
        _draw_log_snr(figure, t.numpy(), log_snr)
    return figure


def _draw_log_snr(figure: "Figure", t: np.ndarray, log_snr: np.ndarray) -> None:
    axes = figure.add_subplot(1, 2, 2)
    seen = np.isfinite(log_snr)
    axes.plot(t[seen], log_snr[seen], color=_GREEN, linewidth=1.8, gid="log-snr")
    axes.axhline(0, color=FAINT, linewidth=1.0)
    axes.set_xlabel("t")
    axes.set_ylabel("ln α²/σ²")

"""Curves: losses over steps, and what a schedule does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from undiffuse.drawing._axes import BLUE, GREEN, ORANGE, Row, legend, log_axis, plot, points
from undiffuse.drawing._figure import FAINT, figure_of, look
from undiffuse.noise import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_losses(records: Sequence[Row], held_out: Sequence[Row] | None = None) -> "Figure":
    """Training loss over steps, smoothed over raw, with the held-out loss where it was measured.

    Args:
        records: lines of `metrics.jsonl`: {"step", "loss", "val_loss"}; what is missing, null or
            not finite is left out.
        held_out: {"step", "loss"} of the held-out measurements; None: `val_loss` of `records`.
    """
    with look():
        axes = plot("step", "loss", (8.2, 3.4))
        steps, loss = points(records, "step", "loss")
        if len(steps):
            smooth = _smoothed(loss)
            axes.plot(steps, loss, color=BLUE, alpha=0.22, linewidth=0.8, gid="raw")
            axes.plot(steps, smooth, color=BLUE, linewidth=1.8, label="training", gid="smooth")
        rows, key = (records, "val_loss") if held_out is None else (held_out, "loss")
        at, held = points(rows, "step", key)
        if len(at):
            style: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "linewidth": 1.0}
            axes.plot(at, held, "o-", color=ORANGE, label="held out", gid="held-out", **style)
        _scale_losses(axes, [smoothed for smoothed in (_smoothed(loss), held) if len(smoothed)])
        legend(axes, len(steps) + len(at))
    return figure_of(axes)


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
        log_axis(axes.set_yscale, axes.yaxis)
    elif values.min() >= 0:
        axes.set_ylim(bottom=0)


def draw_schedule(schedule: Schedule) -> "Figure":
    """alpha and sigma over t, and the logarithm of the signal-to-noise ratio alpha² / sigma²."""
    t = torch.linspace(0, 1, 513, dtype=torch.float64)
    level = schedule(t)
    alpha, sigma = level.alpha.numpy(), level.sigma.numpy()
    with np.errstate(divide="ignore"):  # alpha may reach 0 at t = 1; the curve ends before it
        log_snr = 2 * (np.log(alpha) - np.log(sigma))
    with look():
        axes = plot("t", "", (8.2, 3.0))
        axes.plot(t, alpha, color=BLUE, linewidth=1.8, label="α, signal", gid="alpha")
        axes.plot(t, sigma, color=ORANGE, linewidth=1.8, label="σ, noise", gid="sigma")
        if sigma.max() > 5:
            log_axis(axes.set_yscale, axes.yaxis)
        axes.legend(fontsize=8.5)
        figure = figure_of(axes)
        axes.set_subplotspec(figure.add_gridspec(1, 2)[0])
        _draw_log_snr(figure, t.numpy(), log_snr)
    return figure


def _draw_log_snr(figure: "Figure", t: np.ndarray, log_snr: np.ndarray) -> None:
    axes = figure.add_subplot(1, 2, 2)
    seen = np.isfinite(log_snr)
    axes.plot(t[seen], log_snr[seen], color=GREEN, linewidth=1.8, gid="log-snr")
    axes.axhline(0, color=FAINT, linewidth=1.0)
    axes.set_xlabel("t")
    axes.set_ylabel("ln α²/σ²")

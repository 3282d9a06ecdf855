"""The look of every figure: a white ground, few colours, small letters.

figure, (left, right) = canvas(2)
lines(left, ratios, {"U-Net": rows_by_seed, ...})
decorate(left, x="noise level σ/α", y="excess, percent", log="xy")
"""

from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness import columns

INK, MUTED, FAINT = "#20262e", "#68727f", "#e3e7ec"
COLOURS = (
    "#2f6db3",
    "#d9731a",
    "#2f8f5b",
    "#8a5fb8",
    "#b8892b",
    "#a8476b",
    "#3a9aa8",
    "#68727f",
)
MARKERS = "osD^vPX*"
NOISE_AXIS = "noise level σ/α"

_LOOK = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "legend.fontsize": 8,
}


def canvas(
    panels: int = 1, width: float = 4.4, height: float = 3.8, rows: int = 1
) -> tuple[Figure, tuple[Axes, ...]]:
    """A figure with `panels` axes, side by side in `rows` rows."""
    across = -(-panels // rows)
    with rc_context(_LOOK):
        figure = Figure(figsize=(width * across, height * rows), layout="constrained")
        axes = tuple(figure.add_subplot(rows, across, 1 + i) for i in range(panels))
    return figure, axes


def lines(axes: Axes, x: Sequence[float], curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """One line per name through the means over seeds, with a band from lowest to highest."""
    for place, (name, rows) in enumerate(curves.items()):
        middle, low, high = zip(*columns(rows), strict=True)
        colour = COLOURS[place % len(COLOURS)]
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(x, middle, color=colour, marker=marker, markersize=3.5, lw=1.5, label=name)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def decorate(
    axes: Axes, x: str, y: str, title: str = "", log: str = "", legend: bool = True
) -> None:
    """Labels, logarithmic axes ("", "x", "y" or "xy") and a legend."""
    with rc_context(_LOOK):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title)
        if "x" in log:
            axes.set_xscale("log")
            _plain(axes.xaxis)
        if "y" in log:
            axes.set_yscale("log")
            _plain(axes.yaxis)
        if legend:  # below, where it hides nothing
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False, fontsize=8
            )


def _plain(axis: Axis) -> None:
    """Ticks at 1, 2, 5, 10 … in plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def bars(axes: Axes, values: Mapping[str, Sequence[float]], form: str = "{:.3g}") -> None:
    """Horizontal bars, the mean over seeds written beside each, a thin line from low to high."""
    for place, seeds in enumerate(values.values()):
        middle, low, high = columns([[v] for v in seeds])[0]
        axes.barh(place, middle, color=COLOURS[0], height=0.62)
        axes.plot((low, high), (place, place), color=INK, lw=1)
        text = form.format(middle)
        axes.annotate(
            text, (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(values)), list(values), color=INK)
    axes.invert_yaxis()
    axes.grid(False, axis="y")

"""How every picture looks, and how it becomes a file."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from undiffuse.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#20262e", "#68727f", "#d9dee5"

_RC: dict[str, object] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "path",  # letters as shapes: no font is needed where the picture is read
    "svg.hashsalt": "undiffuse",  # otherwise ids, and so files, differ from run to run
}


def look() -> AbstractContextManager[None]:
    """Our settings over matplotlib's defaults, whatever the user's own configuration says."""
    from matplotlib import style

    return style.context(["default", _RC])


def figure_of(axes: "Axes") -> "Figure":
    """The figure that the axes belong to."""
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def to_svg(figure: "Figure") -> str:
    """The figure as SVG text; equal figures give equal text.

    What has both an id and a label shows the label when the pointer rests on it.
    """
    buffer = io.StringIO()
    with look():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _with_titles(buffer.getvalue(), dict(_titles(figure)))


def _titles(figure: "Figure") -> Iterator[tuple[str, str]]:
    for artist in figure.findobj():
        name, words = artist.get_gid(), str(artist.get_label() or "")
        if name and words and not words.startswith("_"):  # matplotlib's own begin so
            yield name, words


def _with_titles(svg: str, titles: dict[str, str]) -> str:
    """matplotlib writes no <title>, which is what browsers show; letters let the pointer through
    to the block they stand on."""

    def titled(match: re.Match[str]) -> str:
        words = titles.get(match[1])
        return match[0] if words is None else f"{match[0]}<title>{escape(words)}</title>"

    svg = re.sub(r'<g id="([^"]+)">', titled, svg)
    return re.sub(rf'<g id="({THROUGH}[^"]*)">', r'<g id="\1" pointer-events="none">', svg)


THROUGH = "on-"  # ids of what is drawn over a block begin so


def to_png(figure: "Figure", dpi: int = 150) -> bytes:
    """The figure as a PNG file of `dpi` pixels per inch."""
    buffer = io.BytesIO()
    with look():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: "Figure", path: str | Path) -> None:
    """Write the figure as SVG or PNG, by the suffix of `path`.

    Raises:
        ConfigError: the suffix is neither .svg nor .png.
        ResourceError: the place cannot be written.
    """
    path = Path(path)
    writers: dict[str, Callable[[Figure], bytes]] = {
        ".svg": lambda it: to_svg(it).encode(),
        ".png": to_png,
    }
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise ConfigError(f"a drawing is saved as .svg or .png; got {path.name!r}: change its end")
    _write(path, writer(figure))


def save_svg(svg: str, path: str | Path) -> None:
    """Write SVG text, such as an animation.

    Raises:
        ConfigError: the suffix is not .svg.
        ResourceError: the place cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".svg":
        raise ConfigError(f"an animation is saved as .svg; got {path.name!r}: change its end")
    _write(path, svg.encode())


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}; choose another") from error

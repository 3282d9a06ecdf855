"""An evaluation as lines of text: each figure beside what real pictures score."""

from typing import Any

from undiffuse.cli._output import Output, table


def print_figures(body: dict[str, Any], out: Output) -> None:
    """Losses by noise level, then the figures of samples."""
    for line in (*level_lines(body), "", *figure_lines(body)):
        out.say(line)


def figure_lines(body: dict[str, Any]) -> list[str]:
    """The figures of samples as a table, warnings below."""
    figures = body["figures"]
    if not figures:
        return []
    heading = ("samples", "value", "real pictures", "better", "n")
    rows = [heading, *(_figure_row(figure) for figure in figures)]
    notes = [f"note: {f['name']}: {f['warning']}" for f in figures if f["warning"]]
    return [*table(rows, right=(1, 4)), *notes]


def _figure_row(figure: dict[str, Any]) -> tuple[str, str, str, str, str]:
    spread = figure["floor_std"]
    floor = _shown(figure["floor"]) + (f" ± {_shown(spread)}" if spread else "")
    return figure["name"], _shown(figure["value"]), floor, figure["better"], str(figure["n"])


def level_lines(body: dict[str, Any]) -> list[str]:
    """The losses by noise level beside the best bar."""
    levels = body["levels"]
    if not levels:
        return []
    heading = ("sigma/alpha", "held out", "best bar", "", "train", "train optimum")
    rows = [heading]
    for row in levels:
        names = {value: name for name, value in row["bars"].items()}
        best = names.get(row["bar"], "")
        cells = (row["ratio"], row["held_out"], row["bar"], best, row["train"])
        shown = [c if isinstance(c, str) else _shown(c) for c in (*cells, row["train_optimum"])]
        rows.append(tuple(shown))  # pyright: ignore[reportArgumentType]
    return [*table(rows, right=(0, 1, 2, 4, 5)), *_verdict_lines(body["verdict"])]


def _verdict_lines(verdict: dict[str, Any]) -> list[str]:
    word, reason = verdict.get("verdict"), verdict.get("reason")
    return [f"{word}: {reason}"] if word else []


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

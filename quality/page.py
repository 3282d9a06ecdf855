"""`docs/quality.md` and its charts, from the results alone: `python -m quality.page`.

Of every name and seed the newest line counts, whichever machine it is from; what was found with
settings that a task no longer has, such as those of an older recipe, is left out. The same results
give the same bytes. `notes.md` beside this file is written by hand and included as it stands.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from benchmarks.harness import processor
from quality.harness import Task, read
from quality.run import TASKS
from undiffuse import drawing

HERE = Path(__file__).resolve().parent
Line = Mapping[str, Any]
Group = Sequence[Line]  # one name, one line per seed

HEAD = """# Quality, measured

What the networks reach, each number beside what it is held against. `make quality` measures
everything (hours; it goes on where it was interrupted) and adds to `quality/results`,
`make quality-quick` prints the headline figures for one seed in less than ten minutes on two cores,
and `python -m quality.page` draws this page.

Every number is a mean over seeds, with the smallest and the largest behind it; a target *holds* if
every seed reaches it.
"""
SAMPLERS = """## Samplers

Every sampler on the network of `digits-best` without guidance, 500 samples of each setting, all
from the same noise, with the most steps that a budget of evaluations allows.
"""
NOTHING = "No results yet: `make quality` makes them.\n"
LOOK: Any = {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "path"}
COLOURS = ("#2f6db3", "#d9731a", "#3c8d40")
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2, 5)  # sigma, as they are judged
INK, GRID = "#20262e", "#e3e7ec"
TITLES = {
    "bits": "Bits per dimension on Gaussian data",
    "digits-demo": "The demo's preset on digits",
    "digits-best": "`--preset digits-best`",
    "field": "Gaussian random fields",
}


def write_page(results: Path, docs: Path, notes: Path, tasks: Sequence[Task]) -> Path:
    """Draw the page and its charts; returns the page."""
    keys = {task.name: task.key for task in tasks}
    found = [line for file in sorted(results.glob("*.jsonl")) for line in read(file)]
    lines = [line for line in found if keys.get(line["task"]) == line["key"]]
    groups = grouped(sorted(lines, key=lambda line: line.get("date", "")))
    charts = docs / "images" / "quality"
    parts = [HEAD]
    if not groups:
        parts.append(NOTHING)
    else:
        parts += _sections(groups, charts)
    if notes.exists():
        parts.append(notes.read_text(encoding="utf-8"))
    page = docs / "quality.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def grouped(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The newest line of every name and seed, by name, in the order of first appearance."""
    newest: dict[str, dict[int, Line]] = {}
    for line in lines:
        newest.setdefault(line["name"], {})[line["seed"]] = line
    return {name: [by[seed] for seed in sorted(by)] for name, by in newest.items()}


def _sections(groups: Mapping[str, Group], charts: Path) -> Iterator[str]:
    yield _machines(groups)
    for prefix, title in TITLES.items():
        chosen = {n: g for n, g in groups.items() if n.split("/")[0] == prefix}
        if not chosen:
            continue
        yield f"## {title}\n"
        figure = fields_chart(chosen) if prefix == "field" else losses_chart(chosen)
        if figure is not None:
            charts.mkdir(parents=True, exist_ok=True)
            drawing.save(figure, charts / f"{prefix}.svg")
            yield f"![{title}](images/quality/{prefix}.svg)\n"
        yield _table(chosen)
    chosen = {n: g for n, g in groups.items() if n.startswith("samplers/")}
    if chosen:
        yield SAMPLERS
        charts.mkdir(parents=True, exist_ok=True)
        drawing.save(samplers_chart(chosen), charts / "samplers.svg")
        yield "![Samplers](images/quality/samplers.svg)\n"
        yield _samplers(chosen)
    for ground in ("digits", "photos"):
        start = f"ablation/{ground}/"
        chosen = {n: g for n, g in groups.items() if n.startswith(start)}
        if chosen:
            yield f"## One change at a time: {ground}\n"
            yield _ablation({name.removeprefix(start): g for name, g in chosen.items()})


def _machines(groups: Mapping[str, Group]) -> str:
    lines = [line for group in groups.values() for line in group]
    machines = dict.fromkeys(
        f"{processor(x['machine'])}, {x['threads']} of {x['machine']['cores']} cores" for x in lines
    )
    commits = dict.fromkeys(line["commit"] for line in lines if line["commit"])
    torch = dict.fromkeys(line["versions"]["torch"] for line in lines)
    return f"{'; '.join(machines)}. torch {', '.join(torch)}. Commit {', '.join(commits)}.\n"


# --- tables -------------------------------------------------------------------------------------


def _table(groups: Mapping[str, Group]) -> str:
    head = ("figure", "mean", "from … to", "seeds", "floor or limit", "target", "holds")
    return _markdown([head, *(_row(name, group) for name, group in groups.items())])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(row) + " |\n" for row in lines)


def _row(name: str, group: Group) -> tuple[str, ...]:
    values = [line["value"] for line in group]
    beside = next((group[0][k] for k in ("floor", "limit") if group[0][k] is not None), None)
    unit = f" {group[0]['unit']}" if group[0]["unit"] else ""
    return (
        f"`{name}`{unit and ':'}{unit}",
        _mean(values),
        _range(values),
        str(len(values)),
        "" if beside is None else _number(beside),
        group[0]["target"].replace("<=", "≤").replace(">=", "≥"),
        _verdict(group),
    )


def _verdict(group: Group) -> str:
    held = [line["holds"] for line in group]
    if held[0] is None:
        return ""
    return "yes" if all(held) else f"**no** ({sum(map(bool, held))} of {len(held)})"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return "not finite" if len(known) < len(values) else _number(statistics.fmean(known))


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{_number(min(known))} … {_number(max(known))}" if len(known) > 1 else ""


def _number(value: float) -> str:
    """Three digits; an exponent only where there would be none of them."""
    if 0 < abs(value) < 5e-4:
        return f"{value:.0e}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def _samplers(groups: Mapping[str, Group]) -> str:
    """A row per sampler, a column per number of evaluations that are allowed: the mean distance,
    and how far the seeds scatter."""
    names = list(dict.fromkeys(name.split("/")[1] for name in groups))
    budgets = sorted({int(name.split("/")[2]) for name in groups})
    rows = [("Fréchet distance at", *map(str, budgets))]
    for name in names:
        cells = [groups.get(f"samplers/{name}/{budget}", ()) for budget in budgets]
        rows.append((f"`{name}`", *(_scatter([line["value"] for line in one]) for one in cells)))
    return _markdown(rows)


def _scatter(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "not finite" if values else ""
    spread = f" ± {_number(statistics.stdev(known))}" if len(known) > 1 else ""
    return f"{_number(statistics.fmean(known))}{spread}"


def _ablation(groups: Mapping[str, Group]) -> str:
    """A row per change, a column per measure: the mean, and how far from the base's same seeds."""
    measures = ("nats", "class_accuracy", "frechet", "frechet_pca", "precision", "recall")
    names = list(dict.fromkeys(name.rpartition("/")[0] for name in groups))
    shown = [m for m in measures if any(f"{name}/{m}" in groups for name in names)]
    rows = [("change", "seeds", *shown)]
    for name in names:
        cells = [_cell(groups, name, measure) for measure in shown]
        seeds = max(len(groups.get(f"{name}/{m}", ())) for m in shown)
        rows.append((name, str(seeds), *cells))
    return _markdown(rows)


def _cell(groups: Mapping[str, Group], name: str, measure: str) -> str:
    group, base = (groups.get(f"{one}/{measure}", ()) for one in (name, "base"))
    if not group:
        return ""
    mean = _mean([line["value"] for line in group])
    before = {line["seed"]: line["value"] for line in base}
    pairs = [(line["value"], before.get(line["seed"])) for line in group]
    apart = [now - then for now, then in pairs if now is not None and then is not None]
    return mean if name == "base" or not apart else f"{mean} ({_signed(apart)})"


def _signed(apart: Sequence[float]) -> str:
    """The mean difference, and its standard error where several seeds tell one."""
    mean = statistics.fmean(apart)
    shown = f"{'-' if mean < 0 else '+'}{_number(abs(mean))}"
    if len(apart) < 2:
        return shown
    return f"{shown} ± {_number(statistics.stdev(apart) / len(apart) ** 0.5)}"


# --- charts -------------------------------------------------------------------------------------


def fields_chart(groups: Mapping[str, Group]) -> Figure:
    """Excess over the least possible error by noise level: a line per seed."""
    with rc_context(LOOK):
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        for place, side in enumerate(("16", "32")):
            axes = figure.add_subplot(1, 2, place + 1)
            for exponent, colour in enumerate(COLOURS, 1):
                group = groups.get(f"field/{side}/exponent{exponent}/worst_excess", ())
                for number, line in enumerate(group):
                    levels = line["detail"]["levels"]
                    axes.plot(
                        [row["ratio"] for row in levels],
                        [row["percent"] for row in levels],
                        color=colour,
                        lw=1.2,
                        label=None if number else f"exponent {exponent}",
                    )
            axes.axhline(1.0, color=INK, lw=1, ls="--", label="target")
            axes.set_ylim(0.0, max(1.4, axes.get_ylim()[1]))  # room for the legend
            axes.set_xscale("log")
            axes.set_title(f"{side} x {side}")
            _numbered(axes.xaxis, LEVELS)
            axes.set_xlabel("sigma")
            axes.set_ylabel("excess over the exact optimum, %")
            axes.grid(True, color=GRID)
            axes.legend(frameon=False, ncols=2, loc="upper center")
        return figure


def losses_chart(groups: Mapping[str, Group]) -> Figure | None:
    """Held-out error against the best bar by noise level, with the target."""
    chosen = {n: g for n, g in groups.items() if "/loss/" in n}
    if not chosen:
        return None
    with rc_context(LOOK):
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        ratios = [float(name.rpartition("/")[2]) for name in chosen]
        for seed in range(max(len(group) for group in chosen.values())):
            values = [group[min(seed, len(group) - 1)]["value"] for group in chosen.values()]
            axes.plot(ratios, values, color=COLOURS[0], lw=1.2, label=None if seed else "seeds")
        targets = [group[0]["bound"] for group in chosen.values()]
        axes.step(ratios, targets, where="mid", color=INK, ls="--", lw=1, label="target")
        axes.axhline(0.0, color=GRID, lw=1)
        axes.set_xscale("log")
        _numbered(axes.xaxis, LEVELS)
        axes.set_xlabel("sigma")
        axes.set_ylabel("held-out error above the best bar, %")
        axes.grid(True, color=GRID)
        axes.legend(frameon=False)
        return figure


def samplers_chart(groups: Mapping[str, Group]) -> Figure:
    """Mean distance by the number of evaluations: a line per sampler, the floor below them."""
    with rc_context(LOOK):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axes = figure.add_subplot()
        names = dict.fromkeys(name.split("/")[1] for name in groups)
        for name, marker in zip(names, cycle("os^vDP*Xh"), strict=False):
            points = {
                statistics.fmean(line["detail"]["evaluations"] for line in group): group
                for key, group in groups.items()
                if key.split("/")[1] == name and all(line["value"] is not None for line in group)
            }
            across = sorted(points)
            means = [statistics.fmean(line["value"] for line in points[at]) for at in across]
            axes.plot(across, means, marker=marker, ms=4, lw=1.2, label=name)
        floor = next(iter(groups.values()))[0]["floor"]
        axes.axhline(floor, color=INK, lw=1, ls="--", label="real against real")
        axes.set_xscale("log")
        axes.set_yscale("log")
        _numbered(axes.xaxis, (3, 5, 10, 20, 50, 100))
        _numbered(axes.yaxis, (1, 2, 5, 10, 20, 50, 100))
        axes.set_xlabel("evaluations of the network per picture")
        axes.set_ylabel("Fréchet distance to held-out digits")
        axes.grid(True, color=GRID, which="both")
        axes.legend(frameon=False, ncols=2)
        return figure


def _numbered(axis: Axis, values: Sequence[float]) -> None:
    """A logarithmic axis with numbers as people write them."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="draw docs/quality.md from the results")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args(words)
    print(f"wrote {write_page(options.results, options.docs, HERE / 'notes.md', TASKS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

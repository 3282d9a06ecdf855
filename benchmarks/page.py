"""`docs/performance.md` and its charts, from the results alone: `python benchmarks/page.py`.

Of every case the newest line of each machine counts. The same results give the same bytes.
`notes.md` beside this file is written by hand and included as it stands.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from undiffuse import drawing

HERE = Path(__file__).resolve().parent
Line = Mapping[str, Any]

HEAD = """# Performance, measured

Ours against other projects, and against what the machine can do. `make bench` measures everything
and adds to the results, `make bench-quick` prints the headline figures in less than ten minutes on
two cores, and `python benchmarks/page.py` draws this page from `benchmarks/results`.
"""

HOW = """## How it is measured

- **Equality first.** The peer's network is made with random weights, none of them zero, and ours
  imports them. Outputs must agree before anything is timed: within 1e-5 of their largest value in
  float32, 2e-2 in bfloat16. For training steps all gradients together must agree within the same
  limits, and those of every parameter within five times as much (of its own length, or of 1 % of
  the longest where it is shorter). Otherwise there is no number.
- **The peer** is diffusers as it comes (float32, NCHW, eager) and in its *fastest form*: of
  float32, bf16 autocast and bf16 weights, NCHW and channels_last, eager and compiled, every
  combination is measured once and the fastest taken (in training without bf16 weights, which lose
  small updates and so train something else, and with torch's fused AdamW). A quick run takes the
  form that is known from before; the first one compiles only the two that are fastest eager.
- **Ours** is the path that `undiffuse sample` takes by itself. Our training step also averages the
  weights (EMA); the peers' is what diffusers' scripts do, without an average.
- **In one process**, with the same threads and inputs. Both sides are called until two medians in a
  row agree within 3 % or the rounds run out, then timed in the order A B B A A B …, at least seven
  pairs (quick: five; of the 64 pictures three). The ratio is the median of the paired ratios, the
  brackets are its bootstrap 95 % interval. Compiling is timed by itself.
- **The floor** is every convolution, linear layer and attention product of one forward pass run
  alone in bfloat16 and channels last, plus the traffic that cannot be avoided at the speed of a
  copy: norms read and write their features once, and in training AdamW its 28 bytes per parameter.
- **Peak memory** is that of a training step in a fresh process, everything included; start-up times
  are those of at least ten processes.
- **64 pictures**: ours is run in full. A step of the peer's loop costs the same at every level, so
  a few are timed and multiplied by 1000. Which pictures are better is not compared here.
- **Exponents** are fitted to logarithms; the target is what arithmetic predicts, plus 0.1.
- A line is **not usable** where the load average before or after was above threads + 0.5, or the
  interval is wider than 15 % of what was timed (fitted exponents have their own error instead). It
  is shown, but proves nothing.
- The same cases run on a GPU where torch finds one. **That part has not been run.**
"""

NOTHING = "No results yet: `make bench` makes them.\n"
LOOK: Any = {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "path"}
GOOD, BAD, DOUBTFUL, INK = "#2f6db3", "#d9731a", "#b8bec6", "#20262e"
NARROWEST, WIDEST = 0.1, 20.0  # of the chart, in multiples of the target


def write_page(results: Path, docs: Path, notes: Path) -> Path:
    """Draw the page and a chart per machine; returns the page."""
    machines = {file.stem: newest(file) for file in sorted(results.glob("*.jsonl"))}
    charts = docs / "images" / "performance"
    sections = [_section(name, lines, charts) for name, lines in machines.items()]
    written = [notes.read_text(encoding="utf-8")] if notes.exists() else []
    page = docs / "performance.md"
    page.write_text("\n".join([HEAD, *(sections or [NOTHING]), HOW, *written]), encoding="utf-8")
    return page


def newest(file: Path) -> list[Line]:
    """The last line of every case, in the order in which the cases first came."""
    found: dict[str, Line] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        found[line["name"]] = line
    return list(found.values())


# --- one machine --------------------------------------------------------------------------------


def _section(name: str, lines: Sequence[Line], charts: Path) -> str:
    about = lines[-1]["machine"]
    parts = [f"## {about['gpu'] or about['cpu']}, {about['threads']} threads\n", _machine(lines)]
    judged = [line for line in lines if line["target"] and line["ratio"] is not None]
    if judged:
        charts.mkdir(parents=True, exist_ok=True)
        drawing.save(chart(judged), charts / f"{name}.svg")
        parts.append(f"![Ratios beside their targets](images/performance/{name}.svg)\n")
    parts.append(_table([line for line in lines if not line["skipped"]]))
    skipped = [f"- `{line['name']}`: {line['skipped']}\n" for line in lines if line["skipped"]]
    if skipped:
        parts.append("Not measured:\n\n" + "".join(skipped))
    parts.append("What is compared in each case:\n\n" + "".join(map(_said, lines)))
    return "\n".join(parts)


def _machine(lines: Sequence[Line]) -> str:
    about, known = lines[-1]["machine"], lines[-1]["versions"]
    flags = ", ".join(about["flags"]) or "none of note"
    driver = f", driver {about['driver']}" if about["driver"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in known.items() if version)
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines if line["commit"]))
    machine = f"{about['cpu']}, {about['cores']} cores, {about['ram_gb']} GB{driver}; {flags}"
    return f"{machine}. {packages}." + (f" Commit {commits}." if commits else "") + "\n"


def _table(lines: Sequence[Line]) -> str:
    head = ("case", "ours", "peer", "ratio [95 %]", "target", "holds")
    rows = [head, tuple("---" for _ in head), *map(_row, lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _row(line: Line) -> tuple[str, ...]:
    target = line["target"].replace(">=", "≥").replace("<=", "≤") if line["target"] else ""
    values = [_value(line[side], line["unit"]) for side in ("ours", "peer")]
    return (f"`{line['name']}`", *values, _ratio(line), target, _verdict(line))


def _value(value: float | None, unit: str) -> str:
    return "" if value is None else f"{_number(value)} {unit}".strip()


def _ratio(line: Line) -> str:
    if line["ratio"] is None:
        return ""
    inside = f" [{', '.join(map(_number, line['spread']))}]" if line["spread"] else ""
    return _number(line["ratio"]) + inside


def _verdict(line: Line) -> str:
    if line["holds"] is None:
        return "" if line["usable"] else "not usable"
    word = "yes" if line["holds"] else "**no**"
    return word if line["usable"] else f"{word}, but not usable"


def _number(value: float) -> str:
    """Three digits, never an exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}" if abs(value) >= 1 or value == 0 else f"{value:.3f}"


def _said(line: Line) -> str:
    doubt = "".join(f" *Not usable: {why}.*" for why in line["why_unusable"])
    of = f"; the ratio is {line['of']}" if line["of"] else ""
    return f"- `{line['name']}`: {line['how']}{of}.{doubt}\n"


# --- the chart ----------------------------------------------------------------------------------


def chart(lines: Sequence[Line]) -> Figure:
    """How far every ratio is on the right side of its target: 1 is the target itself."""
    with rc_context(LOOK):
        figure = Figure(figsize=(7.5, 1.1 + 0.26 * len(lines)), layout="constrained")
        axes = figure.add_subplot()
        for place, line in enumerate(lines):
            colour = (GOOD if line["holds"] else BAD) if line["usable"] else DOUBTFUL
            ends = [beyond(value, line["target"]) for value in line["spread"] or [line["ratio"]]]
            axes.plot(ends, [place] * len(ends), color=colour, lw=2)
            axes.plot(beyond(line["ratio"], line["target"]), place, "o", color=colour, ms=5)
        axes.axvline(1, color=INK, lw=1)
        axes.set_xscale("log")
        axes.set_xlim(NARROWEST, WIDEST)
        ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(lines)), [f"{one['name']}  {one['target']}" for one in lines])
        axes.invert_yaxis()
        axes.set_xlabel("times the target (right of 1: reached; grey: not usable)")
        axes.grid(True, axis="x", color="#e3e7ec")
    return figure


def beyond(value: float, target: str) -> float:
    """1 on the target, more on its good side; cut to what the chart shows."""
    sign, limit = target.split()
    if sign == "<=":
        share = float(limit) / value if value > 0 else WIDEST
    else:
        share = value / float(limit)
    return min(max(share, NARROWEST), WIDEST)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="draw docs/performance.md from the results")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args(words)
    print(f"wrote {write_page(options.results, options.docs, HERE / 'notes.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One web page about one run, readable without a network, a server or this package.

`render` turns numbers and pictures that others computed into HTML text. Everything is inside the
page: pictures as data URIs, drawings as inline SVG, one style sheet, and a dozen lines of script
for the slider. A content security policy in the page forbids it to load anything else. What a
`Report` lacks is left out, so a run that is unfinished or not evaluated has a page too.
"""

import hashlib
import math
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import cast

MAX_BYTES = 3_000_000  # of the whole page: small enough to send by mail

Values = Mapping[str, object]


@dataclass(frozen=True)
class Report:
    """What the page shows; every part but the title may be missing.

    Text is escaped. The SVG texts are trusted: they come from `drawing.to_svg`.
    """

    title: str
    facts: Values = field(default_factory=dict[str, object])  # label -> text, shown at the top
    samples_png: bytes | None = None
    film: bytes | None = None  # animated WebP: the pictures coming out of the noise
    grids: Sequence[tuple[int, bytes]] = ()  # (step, PNG), the same noise at each step
    loss_svg: str | None = None
    levels_svg: str | None = None
    unet_svg: str | None = None
    evaluation: Values = field(default_factory=dict[str, object])  # as in `evaluation.json`
    neighbours_png: bytes | None = None
    config: Values = field(default_factory=dict[str, object])
    commands: Sequence[tuple[str, str]] = ()  # (command, what it is good for)
    attribution: str = ""
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class _Section:
    """A heading and what stands under it; `body` is HTML, the rest is text."""

    anchor: str
    title: str
    body: str
    lead: str = ""

    @property
    def html(self) -> str:
        lead = f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""
        heading = f'<h2 id="{self.anchor}-title">{escape(self.title)}</h2>'
        return (
            f'<section id="{self.anchor}" aria-labelledby="{self.anchor}-title">'
            f"{heading}{lead}{self.body}</section>"
        )


def render(report: Report) -> str:
    """The page as HTML text, at most `MAX_BYTES` long in UTF-8 as far as pictures decide that.

    Pictures that do not fit are replaced by a line that says so, the least asked-for first; the
    history is thinned before.
    """
    room = MAX_BYTES - _RESERVE
    made = dict[_Maker, _Section]()
    for maker in _BY_RANK:
        section = maker(report, room)
        if section is not None:
            made[maker] = section
            room -= len(section.html.encode())
    return _page(report, [made[maker] for maker in _BY_PLACE if maker in made])


def _page(report: Report, sections: Sequence[_Section]) -> str:
    title = escape(report.title)
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    nav = f'<nav aria-label="On this page">{links}</nav>' if links else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{title}</h1>{_facts(report.facts)}{_warnings(report.warnings)}{nav}</header>"
        f"<main>{''.join(section.html for section in sections)}</main>"
        f"{_footer(report)}<script>{_SCRIPT}</script></body></html>\n"
    )


# --- sections -------------------------------------------------------------------------------------


def _samples(report: Report, room: int) -> _Section | None:
    lead = "Pictures that the network made from pure noise: the first ones, not the best."
    return _pictured("samples", "Samples", lead, report.samples_png, "Grid of samples", room)


def _film(report: Report, room: int) -> _Section | None:
    lead = "The same network at work: from noise to picture, one frame per denoising step."
    alt = "Animation of pictures emerging from noise"
    return _pictured("film", "From noise to picture", lead, report.film, alt, room)


def _neighbours(report: Report, room: int) -> _Section | None:
    lead = (
        "Beside each sample the training pictures most like it. Near-identical pairs would mean"
        " that the network repeats its data instead of making new pictures."
    )
    alt = "Samples, each with its nearest training pictures"
    png = report.neighbours_png
    return _pictured("neighbours", "Nearest neighbours", lead, png, alt, room)


def _pictured(
    anchor: str, title: str, lead: str, data: bytes | None, alt: str, room: int
) -> _Section | None:
    if not data:
        return None
    body = f'<figure class="picture">{_image(data, alt)}</figure>'
    return _fitting(_Section(anchor, title, body, lead), len(data), room)


def _fitting(section: _Section, size: int, room: int) -> _Section:
    """The section, or a line in its place if the page has no room for it."""
    if len(section.html.encode()) <= room:
        return section
    note = f"Left out to keep this page small ({size / 1e6:.1f} MB). It is in the run's folder."
    return _Section(section.anchor, section.title, f'<p class="note">{note}</p>')


def _history(report: Report, room: int) -> _Section | None:
    grids = _thinned([(step, png) for step, png in report.grids if png], room - 2_000)
    if not grids:
        return None
    last = len(grids) - 1
    images = "".join(
        _image(png, f"Samples at step {step}", "" if index == last else " hidden")
        for index, (step, png) in enumerate(grids)
    )
    steps = ",".join(str(step) for step, _ in grids)
    body = (
        f'<figure class="picture" id="frames">{images}</figure><p class="slider">'
        f'<label for="when">Step <output id="step" for="when">{grids[-1][0]}</output></label>'
        f'<input id="when" type="range" min="0" max="{last}" value="{last}" step="1"'
        f' data-steps="{steps}"></p>'
    )
    lead = "The same noise, denoised at earlier and later steps of training. Drag to go back."
    return _Section("history", "How it learned", body, lead)


def _thinned(grids: Sequence[tuple[int, bytes]], room: int) -> list[tuple[int, bytes]]:
    """Every n-th grid, counted from the last, with the smallest n that fits."""
    for stride in range(1, len(grids) + 1):
        kept = list(grids[::-1][::stride][::-1])
        if sum(len(png) * 4 // 3 + 300 for _, png in kept) <= room:
            return kept
    return []


def _evaluation(report: Report, room: int) -> _Section | None:
    tables = "".join(_measured(path, rows) for path, rows in _tables(report.evaluation))
    rest = [(path, value) for path, value in _scalars(report.evaluation) if value is not None]
    rest += [pair for path, rows in _tables(report.evaluation) for pair in _notes(path, rows)]
    notes = _details("How it was measured", _pairs(dict(rest))) if rest else ""
    body = _verdicts(report.evaluation) + tables + notes
    lead = (
        "Beside each number its limit: what real pictures that the network never saw, or an exact"
        " solution, score on the same measure."
    )
    return _Section("quality", "How good is it?", body, lead if tables else "") if body else None


def _levels(report: Report, room: int) -> _Section | None:
    lead = (
        "Error in estimating the clean picture, by how noisy it was. Left: almost clean, right:"
        " nothing but noise. Lower is better. Below: the same error over the bar to beat, and what"
        " each octave of noise costs."
    )
    alt = "Held-out loss at each noise level, with the bars to compare with"
    numbers = _level_numbers(report.evaluation)
    section = _drawn(
        "levels", "Loss by noise level", lead, report.levels_svg, alt, room - len(numbers.encode())
    )
    return None if section is None else replace(section, body=section.body + numbers)


def _loss(report: Report, room: int) -> _Section | None:
    lead = "Held out: pictures that the network never saw in training."
    alt = "Training and held-out loss over steps"
    return _drawn("training", "Training", lead, report.loss_svg, alt, room)


def _unet(report: Report, room: int) -> _Section | None:
    lead = "Rows are resolutions, blocks are layers with their number of channels, in order."
    alt = "The layers of the network, drawn as a U"
    return _drawn("network", "The network", lead, report.unet_svg, alt, room)


def _drawn(
    anchor: str, title: str, lead: str, svg: str | None, alt: str, room: int
) -> _Section | None:
    if not svg:
        return None
    drawing = _inlined(svg, anchor, alt)
    body = f'<figure class="drawing" tabindex="0" aria-label="{escape(alt)}">{drawing}</figure>'
    return _fitting(_Section(anchor, title, body, lead), len(svg), room)


def _settings(report: Report, room: int) -> _Section | None:
    pairs = dict(_scalars(report.config, lists=True))
    if not pairs:
        return None
    return _Section("settings", "Settings", _details(f"All {len(pairs)} settings", _pairs(pairs)))


def _repeat(report: Report, room: int) -> _Section | None:
    if not report.commands:
        return None
    items = "".join(
        f"<li><p>{escape(why)}</p><pre tabindex='0'><code>{escape(command)}</code></pre></li>"
        for command, why in report.commands
    )
    return _Section("next", "How to go on", f'<ol class="commands">{items}</ol>')


_Maker = Callable[[Report, int], _Section | None]  # (what there is, bytes left) -> section

_BY_PLACE: tuple[_Maker, ...] = (
    *(_samples, _film, _evaluation, _levels, _neighbours),
    *(_history, _loss, _unet, _settings, _repeat),
)
_BY_RANK: tuple[_Maker, ...] = (
    *(_evaluation, _repeat, _settings, _samples, _neighbours),
    *(_levels, _loss, _unet, _film, _history),
)

# --- pieces ---------------------------------------------------------------------------------------


def _image(data: bytes, alt: str, attributes: str = "") -> str:
    return f'<img src="{_data_uri(data)}" alt="{escape(alt)}"{_scaled(data)}{attributes}>'


def _data_uri(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def _scaled(data: bytes) -> str:
    """Width and height enlarged by a whole factor, so that each pixel becomes a crisp square."""
    if not data.startswith(b"\x89PNG") or len(data) < 24:
        return ' class="free"'
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))  # PNG, chunk IHDR
    factor = max(1, _PICTURE // max(width, 1))
    return f' width="{width * factor}" height="{height * factor}"'


_PICTURE = 640  # pixels across that a small picture is enlarged to, at most


def _inlined(svg: str, anchor: str, alt: str) -> str:
    """The drawing as part of a page: no prologue, no namespaces, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="', f'id="{anchor}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{anchor}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def _facts(facts: Values) -> str:
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(_text(value))}</dd></div>"
        for label, value in facts.items()
        if value is not None
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings" role="note" aria-label="Warnings">{items}</ul>' if items else ""


def _footer(report: Report) -> str:
    lines = [line for line in report.attribution.splitlines() if line.strip()]
    credit = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"<footer><h2>Attribution</h2>{credit}</footer>" if credit else ""


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _pairs(values: Values) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_text(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="scroll"><table class="pairs"><tbody>{rows}</tbody></table></div>'


# --- losses by noise level ------------------------------------------------------------------------


def _level_numbers(evaluation: Values) -> str:
    """The drawing's numbers as a table, and what the excess sums up to."""
    rows = evaluation.get("levels")
    rows = cast("Sequence[object]", rows) if isinstance(rows, list | tuple) else ()
    levels = [row for row in map(_mapping, rows) if row is not None and "ratio" in row]
    if not levels:
        return ""
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for title, _ in _LEVEL_COLUMNS)
    lines = "".join(_level_line(level) for level in levels)
    table = (
        f'<div class="scroll"><table class="figures"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
    return _cost(_mapping(evaluation.get("loss")) or {}) + _details("The numbers", table)


def _level_line(level: Values) -> str:
    first, *rest = (escape(show(level)) for _, show in _LEVEL_COLUMNS)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'


def _judged(level: Values) -> str:
    """Without label where the network can do without."""
    plain = level.get("held_out")
    return _text(level.get("held_out_labelled") if plain is None else plain)


def _signed(interval: object, unit: str = "") -> str:
    """+2.1 (+1.9 to +2.3), or an en dash."""
    ends = _mapping(interval) or {}
    value, low, high = (ends.get(name) for name in ("value", "low", "high"))
    if not isinstance(value, float | int):
        return "–"
    whole = isinstance(low, float | int) and isinstance(high, float | int)
    spread = f" ({low:+.3g} to {high:+.3g})" if whole else ""
    return f"{value:+.3g}{unit}{spread}"


_LEVEL_COLUMNS: tuple[tuple[str, Callable[[Values], str]], ...] = (
    ("Noise σ/α", lambda level: _text(level.get("ratio"))),
    ("Held out", _judged),
    ("Bar", lambda level: _text(level.get("bar"))),
    ("which is", lambda level: _text(level.get("bar_name")).replace("_", " ")),
    ("Excess", lambda level: _signed(level.get("excess"), " %")),
    ("Training", lambda level: _text(level.get("train"))),
    ("Optimum of the training set", lambda level: _text(level.get("train_optimum"))),
)


def _cost(loss: Values) -> str:
    if _mapping(loss.get("nats_per_picture")) is None:
        return ""
    nats, bits = _signed(loss.get("nats_per_picture")), _signed(loss.get("bits_per_dimension"))
    return (
        f'<p class="verdict">Excess over the bar, summed over the noise levels: {escape(nats)} nats'
        f" per picture, {escape(bits)} bits per dimension.</p>"
    )


# --- evaluation -----------------------------------------------------------------------------------


def _mapping(value: object) -> Values | None:
    return cast("Values", value) if isinstance(value, Mapping) else None


def _figures(value: object) -> list[Values] | None:
    """The value if it is a list of {"name", "value", ...}."""
    if not isinstance(value, list | tuple) or not value:
        return None
    rows = [_mapping(row) for row in cast("Sequence[object]", value)]
    whole = [row for row in rows if row is not None and {"name", "value"} <= row.keys()]
    return whole if len(whole) == len(rows) else None


def _tables(values: Values, path: str = "") -> Iterator[tuple[str, list[Values]]]:
    """Every list of figures in the nested dictionary, with the words that lead to it."""
    for name, value in values.items():
        rows, inner = _figures(value), _mapping(value)
        if rows:
            yield (path if name == "figures" else _joined(path, name)), rows
        elif inner is not None:
            yield from _tables(inner, _joined(path, name))


def _scalars(values: Values, path: str = "", lists: bool = False) -> Iterator[tuple[str, object]]:
    """Every single value of the nested dictionary under its dotted name."""
    for name, value in values.items():
        inner = _mapping(value)
        if inner is not None:
            yield from _scalars(inner, _joined(path, name), lists)
        elif lists or not isinstance(value, list | tuple):
            yield _joined(path, name), value


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)


def _measured(path: str, rows: Sequence[Values]) -> str:
    """Warnings about most figures, the figures, and folded away their doubles in pixels."""
    shared = _shared_warnings(rows)
    rows = [_without_warnings(row, shared) for row in rows]
    names = {_text(row["name"]) for row in rows}
    doubles = {name for name in names if name.removesuffix("_pca") in names - {name}}
    first = [row for row in rows if _text(row["name"]) not in doubles]
    second = [row for row in rows if _text(row["name"]) in doubles]
    said = "".join(f'<p class="why warned">{escape(warning)}.</p>' for warning in shared)
    more = _details("The same in principal components of the pixels", _table("", second))
    return said + _table(path, first) + (more if second else "")


def _shared_warnings(rows: Sequence[Values]) -> list[str]:
    """Those that stand at half of the figures or more, and at three."""
    every = [warning for row in rows for warning in _warnings_of(row)]
    return [one for one in dict.fromkeys(every) if every.count(one) >= max(3, len(rows) / 2)]


def _without_warnings(row: Values, shared: Sequence[str]) -> Values:
    kept = [warning for warning in _warnings_of(row) if warning not in shared]
    return {**row, "warning": "; ".join(kept)}


def _warnings_of(row: Values) -> list[str]:
    return [one for one in _text(row.get("warning") or "").split("; ") if one]


def _table(path: str, rows: Sequence[Values]) -> str:
    """A row per figure; the columns that no row fills are left out."""
    columns = [c for c in _COLUMNS if c[0] == "value" or any(r.get(c[0]) is not None for r in rows)]
    caption = escape(path.replace("_", " ").replace(".", ", "))
    heads = "".join(f'<th scope="col" class="{key}">{title}</th>' for key, title in columns)
    lines = "".join(_line(row, [key for key, _ in columns]) for row in rows)
    return (
        f'<div class="scroll"><table class="figures">'
        f"{f'<caption>{caption}</caption>' if caption else ''}"
        f'<thead><tr><th scope="col">Measure</th>{heads}</tr></thead><tbody>{lines}</tbody>'
        "</table></div>"
    )


_COLUMNS = (("value", "This run"), ("floor", "Limit"), ("worst", "Worst"))

_IN_FEATURES: Mapping[str, tuple[str, str]] = {  # `Figure.name` -> heading, what it says
    "frechet": (
        "Fréchet distance",
        "How far samples as a whole are from real pictures, in a classifier's features.",
    ),
    "frechet_infinity": (
        "Fréchet distance for infinitely many samples",
        "What it would be without the share that their finite number adds. Real pictures have 0,"
        " but for chance.",
    ),
    "kernel": (
        "Kernel distance",
        "The same question asked another way. Real pictures have 0, but for chance.",
    ),
    "precision": ("Precision", "Share of the samples that look like real pictures."),
    "recall": ("Recall", "Share of the real pictures that some sample resembles."),
    "density": ("Density", "How closely samples lie among real pictures, which have 1."),
    "coverage": ("Coverage", "Share of the real pictures that have a sample close by."),
}
_MEASURES: Mapping[str, tuple[str, str]] = {
    **_IN_FEATURES,
    **{
        f"{name}_pca": (f"{title}, pixels", f"{why} In principal components of the pixels.")
        for name, (title, why) in _IN_FEATURES.items()
    },
    "frechet_pca": (
        "Fréchet distance, pixels",
        "How far samples as a whole are from real pictures, in principal components of the pixels.",
    ),
    "frechet_raw": (
        "Fréchet distance, all features",
        "The same in all numbers that the features have, as published distances are.",
    ),
    "class_accuracy": (
        "Right class",
        "How often a classifier sees the class that was asked for.",
    ),
    "train_on_samples": (
        "Teaches classes",
        "How often a classifier is right about real pictures that has learned from samples alone.",
    ),
    "two_sample": (
        "Told apart",
        "How often a classifier tells samples from real pictures. Half of the time is a guess.",
    ),
    "sliced": (
        "Sliced distance",
        "How far the pixels of samples and real pictures are apart in random directions.",
    ),
    "spectrum": ("Spectrum", "Whether there is as much fine and coarse detail as in reality."),
    "pixel_mean": (
        "Mean picture",
        "How far the mean of all samples is from that of real pictures, in standard errors.",
    ),
    "pixel_std": ("Spread of pixels", "The same for how much every pixel varies."),
    "copies": ("Near copies", "Share of the samples that almost repeat one training picture."),
    "copies_moved": (
        "Moved copies",
        "The same where training pictures may be mirrored or shifted by a pixel.",
    ),
    "authentic": (
        "Authentic",
        "Share of the samples that are not crowded about one training picture.",
    ),
}


def _line(row: Values, columns: Sequence[str]) -> str:
    name = _text(row["name"])
    title, why = _MEASURES.get(name, (name, _text(row.get("note") or "")))
    better = f"{_text(row['better']).capitalize()} is better." if row.get("better") else ""
    why = " ".join(part for part in (why, better) if part)
    explained = f'<span class="why">{escape(why)}</span>' if why else ""
    warning = row.get("warning")
    warned = f'<span class="why warned">{escape(_text(warning))}</span>' if warning else ""
    cells = "".join(f'<td class="{key}">{_cell(row, key)}</td>' for key in columns)
    return f'<tr><th scope="row">{escape(title)}{explained}{warned}</th>{cells}</tr>'


def _cell(row: Values, key: str) -> str:
    spread = row.get(f"{key}_std")
    more = f' <span class="spread">± {escape(_brief(spread))}</span>' if spread is not None else ""
    return escape(_text(row.get(key))) + more


def _brief(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else _text(value)


def _notes(path: str, rows: Sequence[Values]) -> Iterator[tuple[str, str]]:
    """The technical notes of the measures that have a plain explanation in their table."""
    for row in rows:
        name = _text(row["name"])
        if name in _MEASURES and row.get("note"):
            yield _joined(path, name), _text(row["note"])


def _verdicts(values: Values) -> str:
    """Every {"verdict", "reason"} in the nested dictionary, in words."""
    here = ""
    if isinstance(values.get("verdict"), str):
        reason = escape(_text(values.get("reason") or ""))
        verdict = escape(_text(values["verdict"]).capitalize())
        here = f'<p class="verdict"><strong>{verdict}.</strong> {reason}</p>'
    inner = (_mapping(value) for value in values.values())
    return here + "".join(_verdicts(one) for one in inner if one is not None)


def _text(value: object) -> str:
    """A value in words: four significant digits, thousands apart, an en dash for nothing."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return _float_text(value)
        case list() | tuple():
            items = cast("Sequence[object]", value)
            return ", ".join(_text(item) for item in items) or "–"
        case _:
            return str(value)


def _float_text(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.3e}"


# --- look -----------------------------------------------------------------------------------------

_SCRIPT = """\
const when = document.getElementById('when');
if (when) {
  const frames = document.querySelectorAll('#frames img');
  const steps = when.dataset.steps.split(',');
  when.addEventListener('input', () => {
    frames.forEach((frame, index) => { frame.hidden = index !== Number(when.value); });
    document.getElementById('step').value = steps[when.value];
    when.setAttribute('aria-valuetext', 'step ' + steps[when.value]);
  });
}
"""

_HASH = b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_POLICY = (  # nothing is loaded from anywhere, and no script runs but the one above
    "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
    f" script-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"
)

_STYLE = """\
:root {
  --ink: #20262e; --soft: #5c6672; --line: #e1e5ea; --page: #fbfbfa; --card: #ffffff;
  --accent: #2f6db3; --warn: #fff6e0; --warn-line: #e3b341;
  --warn-ink: #8a5a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e7eaee; --soft: #a0a9b4; --line: #2d333b; --page: #14171b; --card: #1c2026;
    --accent: #7db2ee; --warn: #2e2716; --warn-line: #a67c1a;
    --warn-ink: #e0b050;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0 0 1rem; font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.15;
  letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { margin: 0 0 0.35rem; font-size: 1.3rem; letter-spacing: -0.01em; }
p { margin: 0 0 0.75rem; }
a { color: var(--accent); }
section { margin-top: 3.25rem; scroll-margin-top: 1rem; }
.lead { max-width: 42rem; margin-bottom: 1.1rem; color: var(--soft); }
.note { color: var(--soft); font-style: italic; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem;
  margin: 0 0 1.25rem; padding: 1.1rem 0; border-block: 1px solid var(--line); }
.facts dt { color: var(--soft); font-size: 0.8rem; }
.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.warnings { margin: 0 0 1.25rem; padding: 0.75rem 1rem; list-style: none; border-radius: 0.4rem;
  border-left: 4px solid var(--warn-line); background: var(--warn); }
nav { display: flex; flex-wrap: wrap; gap: 0.35rem 1.1rem; font-size: 0.9rem; }
nav a { text-decoration: none; }
nav a:hover, nav a:focus { text-decoration: underline; }
figure { margin: 0; }
.picture img { display: block; max-width: 100%; height: auto; image-rendering: pixelated;
  border-radius: 0.3rem; }
.picture img.free { width: min(100%, 40rem); }
.picture img[hidden] { display: none; }
.drawing { overflow-x: auto; padding: 0.75rem; border: 1px solid var(--line);
  border-radius: 0.6rem; background: #ffffff; }
.drawing svg { display: block; width: 100%; height: auto; }
#network .drawing svg { min-width: 46rem; }
#levels .drawing svg, #training .drawing svg { min-width: 30rem; max-width: 52rem; margin: auto; }
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 1rem; max-width: 40rem;
  margin-top: 0.9rem; }
.slider label { min-width: 7rem; font-variant-numeric: tabular-nums; }
.slider output { font-weight: 600; }
.slider input { flex: 1 1 12rem; height: 1.5rem; accent-color: var(--accent); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding: 0.9rem 0 0.3rem; color: var(--soft); font-size: 0.85rem; text-align: left; }
caption::first-letter { text-transform: uppercase; }
th, td { padding: 0.6rem 0.75rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; font-weight: 400; }
th:first-child { padding-left: 0; }
thead th { color: var(--soft); font-size: 0.8rem; vertical-align: bottom; }
.figures td, .figures thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.figures tbody th { min-width: 9rem; font-weight: 600; }
.figures td.value { font-weight: 600; }
.figures td.floor, .figures td.worst { color: var(--soft); }
.why { display: block; max-width: 36rem; color: var(--soft); font-size: 0.875rem;
  font-weight: 400; }
.why.warned { color: var(--warn-ink); }
.spread { font-size: 0.8rem; font-weight: 400; }
.verdict { max-width: 46rem; padding: 0.8rem 1rem; border: 1px solid var(--line);
  border-left: 4px solid var(--accent); border-radius: 0.4rem; background: var(--card); }
.pairs { font-size: 0.875rem; }
.pairs th { width: 40%; color: var(--soft); }
.pairs th, .pairs td { padding-block: 0.3rem; overflow-wrap: anywhere; }
details { margin-top: 1rem; }
summary { padding: 0.35rem 0; color: var(--accent); cursor: pointer; }
.commands { margin: 0; padding: 0; list-style: none; }
.commands p { margin: 0 0 0.3rem; }
.commands li { margin-top: 1.1rem; }
pre { margin: 0; padding: 0.7rem 0.9rem; overflow-x: auto; border: 1px solid var(--line);
  border-radius: 0.4rem; background: var(--card); }
code { font: 0.875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 3.5rem; padding-top: 1.25rem; border-top: 1px solid var(--line);
  color: var(--soft); font-size: 0.875rem; overflow-wrap: anywhere; }
footer h2 { font-size: 0.95rem; color: var(--ink); }
footer p { margin-bottom: 0.3rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 32rem) { .figures th, .figures td { padding-inline: 0.4rem; }
  .figures th:first-child { padding-left: 0; } }
@media print { nav, .slider { display: none; } section { break-inside: avoid; } }
"""

_RESERVE = 60_000  # bytes for style, script, heading and the text around the pictures

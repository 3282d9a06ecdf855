"""`docs/studies.md` and its figures, from the committed results alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness import Claim, Judgement, Numbers, Study, Table, Verdict
from undiffuse import drawing

HEAD = """# Studies: the claims of the four texts, measured

Four texts explain the U-Net of diffusion models. Whatever they claim that can be measured is
measured here, on small networks and with three seeds, and every verdict is computed from the
numbers by the rule that stands beside it. `make studies` measures everything again, draws this page
and goes on where it was interrupted; on two cores it should take one to two hours, an estimate from
its parts. Shaded bands and brackets
are the lowest and the highest of the seeds.

Three kinds of pictures are used. *Fields* are Gaussian random fields of 32x32 pixels, windows of
a larger torus, drawn fresh for every training step: their best possible denoiser is known exactly,
so "excess" means error beyond that optimum, in percent of it. *Digits* are scikit-learn's 8x8
digits, *photos* grey crops of its two photographs. Noise levels are values of σ/α; pictures have a
standard deviation of about 0.5.
"""

_MARK = {Verdict.HOLDS: "holds", Verdict.FAILS: "**fails**", Verdict.DEPENDS: "*depends*"}


def write_page(studies: Sequence[Study], results: Path, docs: Path) -> Path:
    """Draw the page and the figures of all studies that have results; returns the page."""
    found = [
        (study, _read(results / f"{study.id}.json")) for study in studies if _has(study, results)
    ]
    figures = docs / "images" / "studies"
    figures.mkdir(parents=True, exist_ok=True)
    for study, kept in found:
        drawing.save(study.figure(kept["numbers"]), figures / f"{study.id}.svg")
    page = docs / "studies.md"
    page.write_text(_page(found), encoding="utf-8")
    return page


def _has(study: Study, results: Path) -> bool:
    return (results / f"{study.id}.json").exists()


def _read(file: Path) -> Numbers:
    return json.loads(file.read_text(encoding="utf-8"))


def _page(found: Sequence[tuple[Study, Numbers]]) -> str:
    sections = "\n".join(_section(study, kept) for study, kept in found)
    return f"{HEAD}\n## All claims\n\n{_index(found)}\n{sections}"


def _index(found: Sequence[tuple[Study, Numbers]]) -> str:
    rows = [
        (id_, claim.says, f"[{study.id.upper()}](#{study.id})", _MARK[judged.verdict])
        for study, kept in found
        for claim, judged in _judged(study, kept)
        for id_ in claim.ids
    ]
    rows.sort(key=lambda row: _order(row[0]))
    return _table(Table("", ("claim", "says", "study", "verdict"), tuple(rows)))


def _order(id_: str) -> tuple[str, int]:
    text, _, number = id_.partition("-")
    return text, int(number)


def _judged(study: Study, kept: Numbers) -> Iterator[tuple[Claim, Judgement]]:
    return ((claim, claim.judge(kept["numbers"])) for claim in study.claims)


def _section(study: Study, kept: Numbers) -> str:
    parts = [
        f'<a id="{study.id}"></a>\n\n## {study.id.upper()}. {study.title}\n',
        *(_verdict(claim, judged) for claim, judged in _judged(study, kept)),
        f"![{study.title}](images/studies/{study.id}.svg)\n\n*{' '.join(study.caption.split())}*\n",
        f"**How.** {' '.join(study.how.split())}\n",
        *(f"**{table.title}**\n\n{_table(table)}" for table in study.tables(kept["numbers"])),
        _machine(kept["machine"]),
    ]
    return "\n".join(parts)


def _verdict(claim: Claim, judged: Judgement) -> str:
    ids = ", ".join(claim.ids)
    return (
        f"- **Claim** ({ids}): {claim.says}<br>\n"
        f"  **Verdict: {judged.verdict.value}.** {judged.text}<br>\n"
        f"  *Rule: {claim.rule}.*\n"
    )


def _table(table: Table) -> str:
    lines = [table.header, tuple("---" for _ in table.header), *table.rows]
    return "".join("| " + " | ".join(_cell(c) for c in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _machine(about: Mapping[str, object]) -> str:
    return "*Measured on: " + "; ".join(f"{name} {value}" for name, value in about.items()) + ".*\n"

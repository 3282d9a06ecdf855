"""The code in README and docs runs as it stands, and every file, line and anchor they name exists.

When a line that a page links has moved: `python tests/test_docs.py` moves the links along.
"""

import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from enum import Enum
from functools import cache
from inspect import isclass, signature
from pathlib import Path

import pytest
from torch import nn

from undiffuse import cost, drawing, recipes, spec, textbook, unet
from undiffuse.spec import Act, Concat, Res, Skip, trace

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def run(page: str) -> int:
    """Run all blocks of a page, in order and in one name space; how many there were."""
    found, names = blocks(ROOT / "docs" / page), dict[str, object]()
    for number, block in enumerate(found, 1):
        exec(compile(block, f"{page} block {number}", "exec"), names)
    return len(found)


def test_tour_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tour.md") >= 8
    assert "op 3 Concat: features are at 1/2" in capsys.readouterr().out


def test_the_chapter_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """T001-20: any size, depth, width and place of attention, time, skips. T001-21: train, then
    sample from pure noise."""
    assert run("unet.md") >= 10
    assert "popped one level too deep: op 3 Concat" in capsys.readouterr().out


def test_the_textbook_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """T002-20: the usage of every class."""
    assert run("textbook.md") >= 5
    assert "TOTAL" in capsys.readouterr().out


@pytest.mark.slow
def test_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a folder of pictures where the example says one is, and a few steps instead of all."""
    from undiffuse import images

    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    folder = tmp_path / "path" / "to" / "images"
    folder.mkdir(parents=True)
    pictures, _ = images.load("photos").train.fixed(12)
    for number, picture in enumerate(pictures):
        images.save_image(picture, folder / f"{number}.png")
    short = re.sub(r"resolution=\d+", "resolution=8, max_train_steps=3, train_batch_size=4", block)
    assert short != block
    exec(compile(short, "README.md", "exec"), {})
    assert (tmp_path / "grid.png").stat().st_size > 100


def test_every_measured_table_is_there() -> None:
    """Between the marks of docs/uses.md stands what `scripts/make-uses` has measured."""
    text = (ROOT / "docs" / "uses.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end of \1 -->", text, re.S)
    assert len(tables) == text.count("<!-- end of ") == 6
    assert [name for name, body in tables if body.count("\n|") < 2] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


# --- links to lines -------------------------------------------------------------------------------

LINE_LINK = re.compile(r"\[`([^`]+)`\]\(((?:\.\./)?src/[^)#]+)#L(\d+)\)")


def with_lines_of_today(page: Path) -> str:
    """The page with every link on a line of code pointing to where that code stands now."""

    def moved(match: re.Match[str]) -> str:
        code, file, _ = match.groups()
        lines = (page.parent / file).read_text(encoding="utf-8").splitlines()
        found = [number for number, line in enumerate(lines, 1) if code in line]
        assert len(found) == 1, f"{page.name}: {code!r} stands {len(found)} times in {file}"
        return f"[`{code}`]({file}#L{found[0]})"

    return LINE_LINK.sub(moved, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_on_lines_lead_to_those_lines(page: Path) -> None:
    """T003-9, for all pages: remarks anchored to lines of our own source."""
    here = page.read_text(encoding="utf-8")
    assert here == with_lines_of_today(page), "lines have moved: run python tests/test_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]*\.md)?#([\w-]+)\)", text)
    targets = {(page.parent / (file or page.name), anchor) for file, anchor in links}
    missing = [
        f"{file.name}#{anchor}"
        for file, anchor in sorted(targets)
        if not file.is_file() or f'<a id="{anchor}">' not in file.read_text(encoding="utf-8")
    ]
    assert missing == []


# --- the chapter ----------------------------------------------------------------------------------

CHAPTER = ROOT / "docs" / "unet.md"
TEXTBOOK = ROOT / "docs" / "textbook.md"


def section(anchor: str, page: Path = CHAPTER) -> str:
    """What stands between an anchor and the next heading of the same or a higher rank."""
    text = page.read_text(encoding="utf-8")
    assert text.count(f'<a id="{anchor}"></a>') == 1, f"anchor {anchor} in {page.name}"
    rest = text.split(f'<a id="{anchor}"></a>')[1]
    heading = re.match(r"(?:\s|<a [^>]*></a>)*(#+) .*\n", rest)
    if heading is None:
        return re.split(r"^#+ ", rest, maxsplit=1, flags=re.M)[0]
    return re.split(rf"^#{{1,{len(heading[1])}}} ", rest[heading.end() :], flags=re.M)[0]


def heading_after(anchor: str, page: Path = CHAPTER) -> str:
    rest = page.read_text(encoding="utf-8").split(f'<a id="{anchor}"></a>')[1]
    found = re.search(r"^#+ (.*)$", rest, re.M)
    assert found is not None
    return found[1]


def words(text: str) -> int:
    """Words of prose, without code and tables."""
    plain = re.sub(r"^\|.*$", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M)
    return len(re.findall(r"[A-Za-z]{2,}", plain))


def rows(text: str) -> list[list[str]]:
    """The body of the first table."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert lines is not None
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[0].splitlines()]
    return cells[2:]


@pytest.mark.parametrize(
    ("anchor", "least"),
    [
        ("t000-1", 80),  # T000-1: down for context, up for detail, skips
        ("t001-1", 60),  # T001-1: the objectives
        ("t003-1", 400),  # T003-1: why a U-Net
        ("t003-3", 60),  # T003-3: detail, context, scale-dependent processing
        ("t003-10", 80),  # T003-10: what skips give
        ("t001-20", 30),  # T001-20: the promises
        ("t001-21", 30),  # T001-21: next
    ],
)
def test_sections_have_a_body(anchor: str, least: int) -> None:
    assert words(section(anchor)) >= least


def test_the_objectives_are_met_by_sections() -> None:
    """T001-1: six objectives, each leading to a section; T003-1: five aims in its first words."""
    aims = re.findall(r"^- \*\*([\w ]+)\*\*", section("t001-1"), re.M)
    assert len(aims) == 6
    targets = re.findall(r"\]\(#([\w-]+)\)", section("t001-1"))
    assert len(targets) >= 6
    assert all(words(section(target)) >= 40 for target in targets)
    assert "five aims" in section("t003-1")


@pytest.mark.parametrize(
    ("anchor", "title"),
    [
        ("t001-5", "Why this architecture works for diffusion"),
        ("skips", "Understanding skip connections"),
        ("attention", "Why attention at the bottleneck?"),
        ("alignment", "Skip connection alignment"),
        ("class", "The complete class"),
        ("configuration", "Choosing a configuration"),
        ("zero", "Zero output initialisation"),
    ],
)
def test_the_seven_headings_have_a_body(anchor: str, title: str) -> None:
    """T001-5: all seven, with words, and with code that runs."""
    assert heading_after(anchor) == title
    body = section(anchor)
    assert words(body) >= (50 if anchor == "class" else 100)
    assert "```python" in body


def test_the_component_table_names_our_layers() -> None:
    """T001-2: each row links the class that does it."""
    table = rows(section("t001-2"))
    assert len(table) >= 8
    for _, _, link in table:
        match = LINE_LINK.fullmatch(link)
        assert match is not None, link
        name = re.match(r"class (\w+)\(", match[1])
        assert name is not None
        assert issubclass(getattr(unet, name[1]), nn.Module)
        assert match[2].endswith("unet.py")


def test_the_six_components_name_all_kinds() -> None:
    """T003-15: a registry of everything that comes in kinds."""
    table = rows(section("t001-2").split("Six of them come in kinds")[1])
    assert len(table) == 6
    named = {name for row in table for name in re.findall(r"\[`class (\w+)", row[1])}
    kinds = {one.__name__ for one in vars(spec).values() if isclass(one) and issubclass(one, Enum)}
    assert kinds - {"StrEnum", "Part", "Activation"} <= named
    assert {"Attn", "LinearAttn", "Embedding"} <= named
    assert all(isclass(getattr(spec, name)) for name in named)


def test_the_task_table() -> None:
    """T003-4: four tasks; only the last answers with a number per value."""
    table = rows(section("t003-4"))
    names = [row[0] for row in table]
    assert names == ["classification", "detection", "segmentation", "noise prediction"]
    assert [row[2].endswith("H×W×3") for row in table] == [False, False, False, True]


def test_the_scale_table() -> None:
    """T003-12: five resolutions; the periods and shares follow from the grid."""
    table = rows(section("t003-12"))
    sides = [int(row[0].split("×")[0]) for row in table]
    assert sides == [256, 128, 64, 32, 16]
    assert [int(row[3]) for row in table] == [2 * 256 // side for side in sides]
    shares = ["all" if side == 256 else f"1/{(256 // side) ** 2}" for side in sides]
    assert [row[4] for row in table] == shares
    assert "studies.md#s10" in section("t003-12")


def test_the_walk_follows_the_source() -> None:
    """T003-9: remarks on lines of UNet.forward and ResBlock.forward, in the order of the source."""
    whole, block = section("t003-9").split("Then one residual block")
    for part, least in ((whole, 8), (block, 5)):
        numbers = [int(match[3]) for match in LINE_LINK.finditer(part)]
        assert len(numbers) >= least
        assert numbers == sorted(numbers)


def test_the_preset_table_counts() -> None:
    for name, _, count in rows(section("configuration")):
        assert cost.total_parameters(recipes.preset(name.strip("`"))) == int(count.replace(",", ""))


# --- the drawn U ----------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


@cache
def drawn(name: str) -> dict[str, ET.Element]:
    """The elements of a picture of ours, by id."""
    root = ET.parse(ROOT / "docs" / "images" / name).getroot()
    return {element.get("id", ""): element for element in root.iter()}


@pytest.mark.parametrize(("file", "preset"), [("light.svg", "light"), ("flow.svg", "tiny")])
def test_the_pictures_show_every_op_and_skip_with_words(file: str, preset: str) -> None:
    """T003-14: any block tells about itself. T001-4: skips and time are arrows."""
    for site in trace(recipes.preset(preset)):
        title = drawn(file)[f"op-{site.name}"].find(f"{SVG}title")
        assert title is not None
        assert title.text is not None
        count = cost.parameters(site, recipes.preset(preset).style)
        assert f"{count:,} parameters" in title.text
        if isinstance(site.op, Concat):
            assert drawn(file)[f"skip-{site.skip}-{site.index}"].find(f"{SVG}title") is not None
        if isinstance(site.op, Res):
            assert f"told-{site.name}" in drawn(file)


def when(element: ET.Element) -> float:
    found = re.search(r"animation-delay: ([\d.]+)s", element.get("style", ""))
    assert found is not None
    return float(found[1])


def test_the_moving_picture_runs_through_the_program() -> None:
    """T000-3, T001-4: in order; skips at push and pop, the noise level at every block."""
    picture, sites = drawn("flow.svg"), list(trace(recipes.preset("tiny")))
    times = [when(picture[f"lit-{site.name}"]) for site in sites]
    assert times == sorted(set(times))
    for site in sites:
        if site.skip is not None:
            pair = f"{site.skip}-{site.index}"
            assert when(picture[f"push-{pair}"]) == times[site.skip]
            assert when(picture[f"pop-{pair}"]) == times[site.index]
        if isinstance(site.op, Res):
            assert when(picture[f"hears-{site.name}"]) == times[site.index]


def test_the_moving_picture_is_of_today() -> None:
    today = drawing.animate_unet(recipes.preset("tiny"), (16, 16))
    now = {element.get("id") for element in ET.fromstring(today).iter()} - {None}
    ours = ("op-", "skip-", "told-", "lit-", "push-", "pop-", "hears-")
    kept = {name for name in drawn("flow.svg") if name.startswith(ours)}
    assert kept == {name for name in now if name is not None and name.startswith(ours)}


# --- the textbook page ----------------------------------------------------------------------------

PARTS = ("Constructor", "Parameters", "Attributes", "Methods", "Components", "Usage", "Diagram")
CLASSES = ("SimpleUNet", "UNet", "DiffusionModel", "SimpleNoisePredictor", "DiffusionUNet")


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_every_section(name: str) -> None:
    """T002-20: constructor, parameters, attributes, methods, components, usage, diagram."""
    body = section(name.lower(), TEXTBOOK)
    assert re.findall(r"^\*\*(\w+)\.\*\*", body, re.M) == list(PARTS)
    for one in signature(getattr(textbook, name).__init__).parameters.values():
        if one.name != "self":
            assert f"`{one.name}`" in body, f"{name} has {one.name}"


@pytest.mark.parametrize("name", CLASSES)
def test_every_attribute_exists(name: str) -> None:
    """T002-20: the attributes are those of the class, and none is left out."""
    body = section(name.lower(), TEXTBOOK).split("**Attributes.**")[1].split("**Methods.**")[0]
    named = {row[0].strip("`") for row in rows(body)}
    assert named == {child for child, _ in PAGE_NETS[name]().named_children()}


@pytest.mark.parametrize("name", CLASSES)
def test_every_diagram_is_the_trace(name: str) -> None:
    """T002-20: every `width@scale` of the drawing, in the order in which the network makes them."""
    body = section(name.lower(), TEXTBOOK).split("**Diagram.**")[1]
    block = re.search(r"^```text\n(.*?)^```", body, re.S | re.M)
    assert block is not None
    shown = [(int(w), int(s or 1)) for w, s in re.findall(r"(\d+)@1(?:/(\d+))?", block[1])]
    net = PAGE_NETS[name]()
    made = [
        (site.out_width, site.out_scale)
        for site in trace(net.spec)
        if not isinstance(site.op, Skip | Concat | Act)
    ]
    assert shown == made
    joins = re.findall(r"join skip (\d+) ──► (\d+)", block[1])
    assert [(int(i), int(w)) for i, w in joins] == [
        (site.skip, site.out_width) for site in trace(net.spec) if site.skip is not None
    ]


PAGE_NETS: dict[str, Callable[[], nn.Module]] = {
    "SimpleUNet": textbook.SimpleUNet,
    "UNet": lambda: textbook.UNet(16, 3, 3, 32, (1, 2), 1, (8,)),
    "DiffusionModel": lambda: textbook.DiffusionModel(32, 3),
    "SimpleNoisePredictor": textbook.SimpleNoisePredictor,
    "DiffusionUNet": textbook.DiffusionUNet,
}


@pytest.mark.parametrize("name", textbook.__all__)
def test_every_name_of_the_textbook_is_on_its_page(name: str) -> None:
    assert f"`{name}" in TEXTBOOK.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["000", "001", "002", "003", "across"])
def test_what_was_decided_is_told(text: str) -> None:
    assert words(section(f"decided-{text}", TEXTBOOK)) >= 60


if __name__ == "__main__":
    for one in PAGES:
        before, now = one.read_text(encoding="utf-8"), with_lines_of_today(one)
        if now != before:
            one.write_text(now, encoding="utf-8")
            sys.stdout.write(f"{one.name}\n")

"""The page: whole, offline, escaped, small, and content with what there is."""

import base64
import hashlib
import io
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from undiffuse import drawing, recipes
from undiffuse.report import MAX_BYTES, Report, render

VOID = {"meta", "img", "input", "br", "link"}
EVIL = "<script>alert('x')</script>\"&"


class Page(HTMLParser):
    """Checks nesting while it reads, and keeps what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def ids(self):
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]


def png(seed=0, edge=8, height=None):
    pixels = np.random.default_rng(seed).integers(0, 256, (height or edge, edge), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def webp():
    buffer = io.BytesIO()
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 128, 255)]
    frames[0].save(buffer, "webp", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


FIGURES = [
    {"name": "frechet", "value": 3.21987, "floor": 1.934, "floor_std": 0.2123, "better": "lower",
     "note": "360 against 360", "warning": "few pictures"},
    {"name": "own measure", "value": None, "floor": 0.5, "note": "what it says"},
]  # fmt: skip


@pytest.fixture(scope="module")
def full():
    losses = drawing.draw_losses([{"step": i, "loss": 1 / (i + 1)} for i in range(9)])
    levels = drawing.draw_levels([{"ratio": r, "held_out": r, "bar": 1.0} for r in (0.1, 1.0)])
    return Report(
        title="digits, tiny",
        facts={"Steps": 1500, "Loss": 0.15934},
        samples_png=png(1),
        film=webp(),
        grids=[(250 * i, png(i)) for i in range(1, 5)],
        loss_svg=drawing.to_svg(losses),
        levels_svg=drawing.to_svg(levels),
        unet_svg=drawing.to_svg(drawing.draw_unet(recipes.text002(), (16, 16))),
        evaluation={
            "seed": 0,
            "quality": {"figures": FIGURES},
            "loss": {"verdict": "partly learned", "reason": "It wins at 9 of 12.", "levels": [{}]},
        },
        neighbours_png=png(3),
        config={"seed": 7, "model": {"mults": [1, 2]}, "compile": False},
        commands=[("undiffuse sample runs/demo", "More pictures.")],
        attribution="Digits: E. Alpaydin and C. Kaynak, 1998.",
        warnings=["Only 40 images."],
    )


def test_full_page_is_well_formed_and_in_order(full):
    page = Page(render(full))
    assert [s["id"] for s in page.all("section")] == [
        *("samples", "film", "quality", "levels", "neighbours"),
        *("history", "training", "network", "settings", "next"),
    ]
    ids = page.ids()
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:  # every reference inside the page has its target
        for link in (attrs.get("href"), attrs.get("xlink:href")):
            assert link is None or link[1:] in ids
    for clip in re.findall(r"url\(#([^)]*)\)", render(full)):
        assert clip in ids


def test_nothing_comes_from_outside(full):
    text = render(full)
    bare = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text).lower()
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|<object", bare)
    for attrs in Page(text).all("img"):
        assert attrs["src"].startswith("data:image/")
    assert "default-src 'none'" in text


def test_the_policy_admits_exactly_the_script_that_is_there(full):
    text = render(full)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_accessible(full):
    page = Page(render(full))
    assert page.all("html") == [{"lang": "en"}]
    assert any(m.get("name") == "viewport" for m in page.all("meta"))
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert all(attrs.get("role") == "img" and attrs["aria-label"] for attrs in page.all("svg"))
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))
    (slider,) = page.all("input")
    assert slider["id"] in {attrs.get("for") for attrs in page.all("label")}
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert set(headings[1:]) == {2}


def test_pictures_arrive_byte_for_byte(full):
    sources = [attrs["src"] for attrs in Page(render(full)).all("img")]
    held = {base64.b64decode(source.split(",")[1]) for source in sources}
    assert {full.samples_png, full.film, full.neighbours_png, *(g for _, g in full.grids)} == held
    assert sum(source.startswith("data:image/webp") for source in sources) == 1


def test_small_pictures_grow_by_a_whole_factor(full):
    (image,) = Page(render(Report("x", samples_png=png(0, 73, 37)))).all("img")
    assert (image["width"], image["height"]) == (str(73 * 8), str(37 * 8))
    (image,) = Page(render(Report("x", samples_png=png(0, 1000, 10)))).all("img")
    assert (image["width"], image["height"]) == ("1000", "10")


def test_history_shows_the_last_grid_and_lists_all_steps(full):
    page = Page(render(full))
    (slider,) = page.all("input")
    assert slider["data-steps"] == "250,500,750,1000"
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "3", "3")
    frames = [a for a in page.all("img") if a["alt"].startswith("Samples at step")]
    assert ["hidden" in frame for frame in frames] == [True, True, True, False]


def test_evaluation_explains_numbers_and_their_limits(full):
    text = Page(render(full)).text
    shown = ("Fréchet distance", "3.22", "1.934", "± 0.21", "Lower is better.", "few pictures")
    shown += ("own measure", "what it says", "–", "Partly learned.", "It wins at 9 of 12.")
    assert [words for words in shown if words not in text] == []
    assert "Worst" not in text  # no figure has one


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, "yes"), (1234567, "1,234,567"), (0.15934, "0.1593"), (1.5e-7, "1.500e-07"),
     (None, "–"), ([1, 2], "1, 2"), (0.0, "0"), (float("nan"), "nan"), ("a", "a")],
)  # fmt: skip
def test_numbers_in_words(value, shown):
    page = Page(render(Report("x", config={"key": value})))
    assert page.text.endswith(f"key{shown}\n")


def test_everything_from_outside_is_escaped():
    evil = Report(
        title=EVIL,
        facts={EVIL: EVIL},
        evaluation={EVIL: [{"name": EVIL, "value": EVIL, "floor": EVIL, "worst": EVIL,
                            "note": EVIL, "warning": EVIL, "better": EVIL, "floor_std": EVIL}],
                    "verdict": EVIL, "reason": EVIL, "other": EVIL},
        config={EVIL: {EVIL: [EVIL]}},
        commands=[(EVIL, EVIL)],
        attribution=EVIL,
        warnings=[EVIL],
    )  # fmt: skip
    text = render(evil)
    page = Page(text)
    assert len(page.all("script")) == 1  # ours
    assert "<script>alert" not in text
    assert page.text.count("alert('x')") >= 15
    assert page.all("title") == [{}]


EMPTY = {"facts": {}, "grids": (), "evaluation": {}, "config": {}, "commands": (),
         "attribution": "", "warnings": ()}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(Report) if f.name != "title"])
def test_each_part_may_be_missing(full, name):
    page = Page(render(replace(full, **{name: EMPTY.get(name)})))
    missing = len(Page(render(full)).all("section")) - len(page.all("section"))
    assert missing == (name not in ("facts", "attribution", "warnings"))


def test_an_empty_report_is_a_page():
    page = Page(render(Report("nothing yet")))
    assert not page.all("section")
    assert not page.all("nav")
    assert "nothing yet" in page.text


def test_large_histories_are_thinned_from_the_last_backwards(full):
    grids = [(i, png(i, 600)) for i in range(20)]  # about 360 kB each
    text = render(replace(full, grids=grids))
    (slider,) = Page(text).all("input")
    steps = [int(step) for step in slider["data-steps"].split(",")]
    assert len(text.encode()) <= MAX_BYTES
    assert steps[-1] == 19
    assert 3 <= len(steps) < 20
    assert len({b - a for a, b in pairwise(steps)}) == 1


def test_what_does_not_fit_is_named_instead(full):
    text = render(replace(full, film=b"RIFF" + bytes(4_000_000), grids=[(1, png(0, 2500))]))
    page = Page(text)
    assert len(text.encode()) <= MAX_BYTES
    assert "Left out to keep this page small (4.0 MB)" in page.text
    assert "history" not in page.ids()
    assert any(attrs["alt"] == "Grid of samples" for attrs in page.all("img"))


def test_parts_that_fit_alone_but_not_together(full):
    one = bytes(1_200_000)  # 1.6 MB as text: only the first of the three has room
    text = render(replace(full, samples_png=one, neighbours_png=one, film=one))
    page = Page(text)
    assert len(text.encode()) <= MAX_BYTES
    assert page.text.count("Left out to keep this page small (1.2 MB)") == 2
    assert any(attrs["alt"] == "Grid of samples" for attrs in page.all("img"))

"""Drawings: every op and every skip is there, nothing overlaps, files repeat byte for byte."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text

from undiffuse import drawing, noise, recipes
from undiffuse.drawing import _words
from undiffuse.errors import ConfigError
from undiffuse.spec import Concat, Conv, Down, Join, Out, Res, Skip, UNetSpec, Up, trace

TEXTS = {
    name: getattr(recipes, name)
    for name in ("text000", "text000_figure", "text001_listing", "text002", "text003")
}
SPECS = {name: preset.build(3) for name, preset in recipes.PRESETS.items()}
SPECS |= {name: make() for name, make in TEXTS.items()}
SPECS["W"] = UNetSpec(
    1, 1, (Conv(8), *(Skip(), Down(), Res(8), Up(), Concat(Join.ADD), Res(8)) * 2, Out())
)


@cache
def drawn(name):
    """The largest picture of a network: with sizes and parameters."""
    params = {site.index: 10**site.index % 10**9 for site in trace(SPECS[name])}
    return drawing.draw_unet(SPECS[name], (256, 256), params)


def marked(figure, prefix):
    """The artists whose SVG id starts with `prefix`, by id."""
    found = figure.findobj(lambda artist: (artist.get_gid() or "").startswith(prefix))
    return {artist.get_gid(): artist for artist in found}


def row_of(shape):
    """y of an op's middle."""
    if isinstance(shape, Circle):
        return shape.center[1]
    assert isinstance(shape, FancyBboxPatch)
    return shape.get_y() + shape.get_height() / 2


def left_of(shape):
    return shape.center[0] - shape.radius if isinstance(shape, Circle) else shape.get_x()


@pytest.mark.parametrize("name", SPECS)
def test_every_op_is_drawn_once_in_its_row_and_in_order(name):
    sites = list(trace(SPECS[name]))
    ops = marked(drawn(name), "op-")
    assert set(ops) == {f"op-{site.name}" for site in sites}
    rows = {site.in_scale: row_of(ops[f"op-{site.name}"]) for site in sites}
    assert sorted(rows, key=lambda scale: -rows[scale]) == sorted(rows)  # full size on top
    for site in sites:
        assert row_of(ops[f"op-{site.name}"]) == pytest.approx(rows[site.in_scale])
    for before, after in combinations(sites, 2):
        if before.in_scale == after.in_scale:
            assert left_of(ops[f"op-{before.name}"]) < left_of(ops[f"op-{after.name}"])


@pytest.mark.parametrize("name", SPECS)
def test_skips_lead_from_skip_to_the_concat_that_pops_it(name):
    figure, sites = drawn(name), list(trace(SPECS[name]))
    arrows, ops = marked(figure, "skip-"), marked(figure, "op-")
    pairs = {(site.skip, site.index) for site in sites if isinstance(site.op, Concat)}
    assert set(arrows) == {f"skip-{start}-{end}" for start, end in pairs}
    for start, end in pairs:
        arrow = arrows[f"skip-{start}-{end}"]
        assert isinstance(arrow, FancyArrowPatch)
        line = arrow._path_original.vertices
        for site, x in ((sites[start], line[0, 0]), (sites[end], line[-1, 0])):
            assert ops[f"op-{site.name}"].center[0] == pytest.approx(x)


@pytest.mark.parametrize("name", SPECS)
def test_no_two_skips_share_a_lane_where_they_overlap(name):
    arrows = marked(drawn(name), "skip-").values()
    lines = [arrow._path_original.vertices for arrow in arrows]
    spans = [(line[:, 0].min(), line[:, 0].max(), line[:, 1].max()) for line in lines]
    for (low, high, y), (other_low, other_high, other_y) in combinations(spans, 2):
        assert high < other_low or other_high < low or abs(y - other_y) > 0.05


@pytest.mark.parametrize("name", SPECS)
def test_no_words_overlap_and_none_leave_the_page(name):
    figure = drawn(name)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text()]
    assert len(boxes) > len(SPECS[name].program)
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    for one, other in combinations(boxes, 2):
        assert not (
            one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1
        )


@pytest.mark.parametrize("name", SPECS)
def test_the_page_stays_of_a_sensible_size(name):
    width, height = drawn(name).get_size_inches()
    assert 4 <= width <= 18
    assert 1 <= height <= 10


def words_of(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_row_labels_give_the_padded_size():
    words = words_of(drawing.draw_unet(recipes.text000(), (50, 33)))
    assert [w for w in words if "×" in w] == ["56×40", "28×20", "14×10", "7×5"]
    assert {"1/1", "1/2", "1/4", "1/8"} <= set(words)
    assert not any("×" in word for word in words_of(drawing.draw_unet(recipes.text000())))


def test_blocks_carry_width_and_parameters():
    spec = UNetSpec(1, 5, (Conv(77), Out()))
    words = words_of(drawing.draw_unet(spec, params={0: 1_234, 1: 5_600_000}))
    assert {"77", "1.23k", "5", "5.6M"} <= set(words)


def test_rail_only_where_something_hears_the_timestep():
    assert "embedding" in marked(drawing.draw_unet(recipes.preset("tiny")), "embedding")
    assert not marked(drawing.draw_unet(recipes.naive()), "embedding")
    labelled = words_of(drawing.draw_unet(recipes.preset("tiny", classes=10)))
    assert any("10 class labels" in word for word in labelled)


def test_svg_is_deterministic_and_holds_every_op():
    spec = recipes.preset("tiny")
    first, second = (drawing.to_svg(drawing.draw_unet(spec, (16, 16))) for _ in range(2))
    assert first == second
    ids = {element.get("id") for element in ET.fromstring(first).iter()}
    assert {f"op-{site.name}" for site in trace(spec)} <= ids
    assert "<dc:date>" not in first


def test_the_users_matplotlib_settings_change_nothing():
    import matplotlib

    plain = drawing.to_svg(drawing.draw_losses([{"step": 1, "loss": 2.0}]))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": None}):
        assert drawing.to_svg(drawing.draw_losses([{"step": 1, "loss": 2.0}])) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_save_by_suffix(tmp_path):
    figure = drawing.draw_schedule(noise.Cosine())
    drawing.save(figure, tmp_path / "a.svg")
    drawing.save(figure, str(tmp_path / "b.PNG"))
    assert (tmp_path / "a.svg").read_text() == drawing.to_svg(figure)
    assert (tmp_path / "b.PNG").read_bytes() == drawing.to_png(figure)
    assert drawing.to_png(figure).startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.svg or \.png; got 'c\.jpg'"):
        drawing.save(figure, tmp_path / "c.jpg")
    assert not (tmp_path / "c.jpg").exists()


def line(figure, gid):
    return marked(figure, gid)[gid].get_xydata()


def test_losses_leave_out_what_is_missing():
    records = [{"step": i, "loss": 1.0 + i, "val_loss": None} for i in range(1, 6)]
    records += [{"step": 6, "loss": math.nan}, {"step": 7}, {"step": None, "loss": 1.0}]
    records += [{"step": 0, "loss": 1.0, "val_loss": 3.5}]
    figure = drawing.draw_losses(records)
    assert line(figure, "raw").tolist() == [[i, 1.0 + i] for i in range(6)]
    assert line(figure, "held-out").tolist() == [[0, 3.5]]
    given = drawing.draw_losses(records, [{"step": 3, "loss": 2.5}])
    assert line(given, "held-out").tolist() == [[3, 2.5]]
    assert "nothing recorded yet" in words_of(drawing.draw_losses([]))
    assert "nothing recorded yet" not in words_of(figure)


def test_smoothing_keeps_a_straight_line_and_calms_noise():
    straight = [{"step": i, "loss": 2.0 + 3.0 * i} for i in range(400)]
    smooth = line(drawing.draw_losses(straight), "smooth")
    np.testing.assert_allclose(smooth[:, 1], 2.0 + 3.0 * np.arange(400), rtol=1e-9)
    rough = np.random.default_rng(0).normal(5.0, 1.0, 400)
    figure = drawing.draw_losses([{"step": i, "loss": v} for i, v in enumerate(rough)])
    assert line(figure, "smooth")[20:-20, 1].std() < 0.5 * rough.std()


@pytest.mark.parametrize(
    ("losses", "scale"), [((1.0, 0.5), "linear"), ((1.0, 0.01), "log"), ((1.0, 0.0), "linear")]
)
def test_loss_axis_is_logarithmic_only_where_it_helps(losses, scale):
    figure = drawing.draw_losses([{"step": i, "loss": v} for i, v in enumerate(losses)])
    assert figure.axes[0].get_yscale() == scale


def test_levels_draw_model_bars_and_optimum():
    rows = [
        {"ratio": 0.1, "held_out": 0.2, "train": 0.1, "train_optimum": 0.0, "bar": 0.4},
        {"ratio": 10.0, "held_out": None, "bar": 0.5, "bars": {"Wiener": 0.5, "KDE": None}},
        {"ratio": 1.0, "held_out": 0.3, "bars": {"Wiener": 0.6}},
    ]
    figure = drawing.draw_levels(rows)
    held_out = line(figure, "model, held-out pictures")
    assert held_out.tolist() == [[0.1, 0.2], [1.0, 0.3]]
    assert line(figure, "Wiener").tolist() == [[1.0, 0.6], [10.0, 0.5]]
    assert not marked(figure, "KDE")
    assert not marked(figure, "exact optimum")  # 0 has no place on a logarithmic axis
    assert line(figure, "model, held-out pictures-relative").tolist() == [[0.1, 0.5]]
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    drawing.to_png(figure)


def test_levels_without_bars_or_rows():
    assert len(drawing.draw_levels([{"ratio": 1.0, "held_out": 0.3}]).axes) == 1
    assert "nothing recorded yet" in words_of(drawing.draw_levels([]))


@pytest.mark.parametrize(
    "schedule", [noise.Cosine(), noise.LinearBetas(), noise.Karras(), noise.Flow()]
)
def test_schedule_curves(schedule):
    figure = drawing.draw_schedule(schedule)
    alpha, sigma = (line(figure, gid)[:, 1] for gid in ("alpha", "sigma"))
    t, log_snr = line(figure, "log-snr").T
    assert np.isfinite(log_snr).all()
    assert (np.diff(log_snr[t > 0.01]) < 0).all()
    kept = len(log_snr)
    np.testing.assert_allclose(np.exp(log_snr), (alpha / sigma)[:kept] ** 2, rtol=1e-9)
    drawing.to_svg(figure)


def test_no_window_system_and_no_pyplot():
    code = (
        "import sys; from undiffuse import drawing, recipes\n"
        "assert 'matplotlib' not in sys.modules\n"
        "drawing.to_svg(drawing.draw_unet(recipes.naive()))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- under the pointer ----------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


@cache
def pointed():
    """Words by id, of a network whose costs are told by its op indices."""
    spec = recipes.preset("tiny")
    numbers = range(len(spec.program))
    params = {index: 1_000_000 + index for index in numbers}
    multiply_adds = {index: 7_000_000 + index for index in numbers}
    svg = drawing.to_svg(drawing.draw_unet(spec, (15, 16), params, multiply_adds))
    titled = (e for e in ET.fromstring(svg).iter() if e.find(f"{SVG}title") is not None)
    return {element.get("id"): element.find(f"{SVG}title").text for element in titled}


def test_every_op_says_what_it_does_and_costs():
    for site in trace(recipes.preset("tiny")):
        lines = pointed()[f"op-{site.name}"].splitlines()
        side, out = 16 // site.in_scale, 16 // site.out_scale
        assert lines[0] == f"{site.name}, {site.part.value}"
        assert lines[1].endswith(".")
        assert f"in {site.in_width}×{side}×{side}" in lines
        assert f"out {site.out_width}×{out}×{out}" in lines
        assert f"{1_000_000 + site.index:,} parameters" in lines
        assert f"{7_000_000 + site.index:,} multiply-adds per picture" in lines


def test_every_skip_and_the_timestep_say_what_they_carry():
    sites = list(trace(recipes.preset("tiny")))
    pops = [site for site in sites if site.skip is not None]
    assert len(pops) == 6
    for site in pops:
        words = pointed()[f"skip-{site.skip}-{site.index}"]
        shape = f"{site.skip_width}×{16 // site.in_scale}×{16 // site.in_scale}"
        assert words == f"skip: op {site.skip} stores {shape}, op {site.index} joins it"
    assert "noise level enters here" in pointed()["embedding"]
    assert len(pointed()) == len(sites) + len(pops) + 1


def test_without_numbers_the_words_speak_of_scales():
    svg = drawing.to_svg(drawing.draw_unet(recipes.text000()))
    assert "in 64 channels at 1/1" in svg
    assert "parameters" not in svg


def test_letters_let_the_pointer_through():
    svg = ET.fromstring(drawing.to_svg(drawing.draw_unet(recipes.preset("tiny"))))
    over = [e for e in svg.iter() if (e.get("id") or "").startswith("on-")]
    assert len(over) > len(recipes.preset("tiny").program)
    assert {element.get("pointer-events") for element in over} == {"none"}


@pytest.mark.parametrize("name", SPECS)
def test_an_arrow_leads_the_timestep_into_every_block_that_hears_it(name):
    hearing = {f"told-{s.name}" for s in trace(SPECS[name]) if isinstance(s.op, Res)}
    assert set(marked(drawn(name), "told-")) == hearing


def test_an_op_nobody_has_coloured_is_drawn_under_its_own_name():
    class Gate:
        """Opens and closes.

        More words.
        """

    look = _words.look_of(Gate)
    assert (look.word, look.meaning, look.does) == ("Gate", "gate", "Opens and closes.")
    assert _words.blocks_among({Gate, Skip, Res, Conv}) == [Conv, Res, Gate]


# --- in motion ------------------------------------------------------------------------------------


@cache
def moving(name):
    return drawing.animate_unet(SPECS[name], (64, 64))


def delays(svg, prefix):
    """Seconds by id, in the order of the file."""
    found = re.findall(rf'id="{prefix}([^"]+)"[^>]*animation-delay: ([\d.]+)s', svg)
    return {name: float(seconds) for name, seconds in found}


@pytest.mark.parametrize("name", SPECS)
def test_ops_light_in_the_order_of_the_program(name):
    lit = delays(moving(name), "lit-")
    assert sorted(lit, key=lit.__getitem__) == [site.name for site in trace(SPECS[name])]
    steps = np.diff(sorted(lit.values()))
    np.testing.assert_allclose(steps, steps[0], atol=1e-9)
    assert steps[0] > 0


@pytest.mark.parametrize("name", SPECS)
def test_skips_light_when_pushed_and_again_when_popped(name):
    sites, lit = list(trace(SPECS[name])), delays(moving(name), "lit-")
    pushed, popped = delays(moving(name), "push-"), delays(moving(name), "pop-")
    pops = {f"{site.skip}-{site.index}": site for site in sites if site.skip is not None}
    assert set(pushed) == set(popped) == set(pops)
    for pair, site in pops.items():
        assert pushed[pair] == lit[sites[site.skip].name]
        assert popped[pair] == lit[site.name]
        assert f"@keyframes held-{pair} " in moving(name)


@pytest.mark.parametrize("name", SPECS)
def test_the_vector_lights_exactly_the_blocks_that_hear_it(name):
    lit, hears = delays(moving(name), "lit-"), delays(moving(name), "hears-")
    assert set(hears) == {site.name for site in trace(SPECS[name]) if isinstance(site.op, Res)}
    assert all(hears[block] == lit[block] for block in hears)
    assert moving(name).count('class="flow told"') == len(hears)


@pytest.mark.parametrize("name", SPECS)
def test_the_pulse_visits_every_op_in_order_and_on_time(name):
    svg, sites = moving(name), list(trace(SPECS[name]))
    frames = svg[svg.index("@keyframes pulse {") : svg.index("@media")]
    stops = re.findall(r"^  ([\d.]+)% \{ opacity: 1; .*\(([-\d.]+)px, ([-\d.]+)px", frames, re.M)
    way = [(float(when), float(x), float(y)) for when, x, y in stops]
    assert all(before[0] < after[0] for before, after in pairwise(way))
    total = float(re.search(r"animation: ([\d.]+)s", svg)[1])
    lit, boxes = delays(svg, "lit-"), centres(svg)
    for site in sites:
        when, x, y = min(way, key=lambda stop: abs(stop[0] - 100 * lit[site.name] / total))
        assert when == pytest.approx(100 * lit[site.name] / total, abs=0.01)
        assert (x, y) == pytest.approx(boxes[site.name], abs=0.2)


def centres(svg):
    """Middle of the light over every op."""
    found = {}
    for element in ET.fromstring(svg).iter():
        name = element.get("id") or ""
        if name.startswith("lit-") and element.tag == f"{SVG}circle":
            found[name[4:]] = (float(element.get("cx")), float(element.get("cy")))
        elif name.startswith("lit-"):
            x, y, w, h = (float(element.get(one)) for one in ("x", "y", "width", "height"))
            found[name[4:]] = (x + w / 2, y + h / 2)
    return found


def test_lights_lie_on_the_ops():
    spec = SPECS["tiny"]
    figure = drawing.draw_unet(spec, (64, 64))
    left, top = figure.axes[0].get_xlim()[0], figure.axes[0].get_ylim()[1]
    ops, lights = marked(figure, "op-"), centres(moving("tiny"))
    for site in trace(spec):
        shape = ops[f"op-{site.name}"]
        width = shape.radius * 2 if isinstance(shape, Circle) else shape.get_width()
        middle = (left_of(shape) + width / 2 - left) * 72, (top - row_of(shape)) * 72
        assert lights[site.name] == pytest.approx(middle, abs=0.1)


def test_the_animation_is_one_file_without_script_and_can_be_calmed():
    svg = moving("tiny")
    assert "<script" not in svg
    assert "@import" not in svg
    hrefs = re.findall(r'(?:href|src)="([^"]+)"|url\(([^)]+)\)', svg)
    assert all((one or other).startswith("#") for one, other in hrefs)
    calm = svg[svg.index("@media (prefers-reduced-motion: reduce)") :]
    assert "animation: none !important" in calm[: calm.index("</style>")]
    assert ".flow { opacity: 0;" in svg  # what does not move is not seen
    assert drawing.animate_unet(SPECS["tiny"], (64, 64)) == svg


def test_save_svg(tmp_path):
    drawing.save_svg("<svg/>", tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == "<svg/>"
    with pytest.raises(ConfigError, match=r"saved as \.svg; got 'a\.png'"):
        drawing.save_svg("<svg/>", tmp_path / "a.png")

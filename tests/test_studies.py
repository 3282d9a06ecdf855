"""The studies' harness: exact pieces against independent ones, and a run that is interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import harness
import nets
import pictures
import receptive
import run
import s01_parameters
import s03_receptive_field
import s04_naive_against_unet
import s05_bottleneck_and_skips
import s06_errors_add_up
import s07_zero_output
from harness import HELD_OUT, LEVELS, QUICK, Lab, StudyError, Training, Verdict
from page import write_page
from undiffuse import cost
from undiffuse.noise import NoiseLevel
from undiffuse.unet import UNet

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "studies"

SMALL = pictures.Fields(8, 6, torus=16)
TINY = nets.small_unet((4, 4), middle=())


def tiny(seed: int = 0, **changes: object) -> Training:
    return replace(Training("tiny", TINY, SMALL, seed, steps=2, batch=2), **changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("cache"), QUICK)


# --- fields -------------------------------------------------------------------------------------


def test_covariance_of_fields_is_that_of_samples() -> None:
    """The formula knows nothing of how fields are drawn."""
    drawn = SMALL.held_out(20_000, 1).double().flatten(1)
    sample = drawn.mT @ drawn / len(drawn)
    exact = pictures.covariance(SMALL)
    deviation = ((exact.square() + exact[0, 0] ** 2) / len(drawn)).sqrt()
    z = (sample - exact) / deviation
    assert float(z.abs().max()) < 5.5
    assert float(z.square().mean()) == pytest.approx(1, abs=0.6)


def test_fields_have_the_stated_deviation() -> None:
    assert pictures.covariance(SMALL).diagonal().tolist() == pytest.approx([0.25] * 48)


def test_fields_are_no_torus() -> None:
    exact = pictures.covariance(pictures.Fields(8, 8, torus=16))
    assert float(exact[0, 7]) < 0.9 * float(exact[0, 1])


def test_training_and_held_out_fields_differ() -> None:
    trained, _ = SMALL.source(HELD_OUT)(range(2))
    assert not torch.equal(trained, SMALL.held_out(2, HELD_OUT))


@pytest.mark.parametrize("data", [pictures.Digits(), pictures.Photos(16)])
def test_bundled_pictures(data: pictures.Pictures) -> None:
    held_out = data.held_out(3, 0)
    drawn, _ = data.source(0)(range(2))
    assert held_out.shape[1] == 1
    assert drawn.shape[1:] == held_out.shape[1:]
    assert float(held_out.abs().max()) <= 1


# --- errors by noise level ----------------------------------------------------------------------


def test_oracle_has_no_excess_and_the_optimum_as_error() -> None:
    excess = harness.excess_by_level(SMALL.oracle(), SMALL, count=4)
    assert excess == [0.0] * len(LEVELS)
    errors = harness.error_by_level(SMALL.oracle(), SMALL, (0.3, 2.0), count=2000)
    best = harness.optimum_by_level(SMALL, (0.3, 2.0))
    assert errors["x0"] == pytest.approx(best["x0"], rel=0.03)
    assert errors["epsilon"] == pytest.approx(best["epsilon"], rel=0.03)


def test_excess_of_doing_nothing_is_what_the_formula_says() -> None:
    """x itself as the estimate is off by sigma^2."""

    def nothing(x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        return x

    (excess,) = harness.excess_by_level(nothing, SMALL, (0.5,), count=2000)
    best = harness.optimum(SMALL, 0.5)
    assert excess == pytest.approx(100 * (0.25 - best) / best, rel=0.05)


def test_levels_outside_the_schedule_are_refused() -> None:
    with pytest.raises(StudyError, match="does not reach sigma/alpha 100"):
        harness.noised(SMALL, 100.0, 1)


# --- equal size ---------------------------------------------------------------------------------


def test_studied_networks_have_equal_size() -> None:
    study = s04_naive_against_unet
    specs = study.specs()
    wanted = cost.total_parameters(nets.REFERENCE)
    for name in (study.PLAIN, study.CUT, study.T003, study.T003_FULL):
        assert cost.total_parameters(specs[name]) == pytest.approx(wanted, rel=0.01)
    adds = [study.multiply_adds(specs[name]) for name in (study.UNET, study.PLAIN_FAST)]
    assert adds[1] == pytest.approx(adds[0], rel=0.01)


def test_search_says_when_nothing_is_near() -> None:
    with pytest.raises(StudyError, match="no candidate within 1%"):
        harness.nearest([TINY], 10 * cost.total_parameters(TINY))


# --- receptive fields ---------------------------------------------------------------------------

REACH = {
    "naive CNN": (11, 11),
    "text 002, diagram": (76, 76),
    "two levels, two blocks": (85, 85),
    "text 000": (92, 100),
    "text 002": (156, 164),
    "text 001, listing": (185, 185),
    "text 000, figure": (190, 206),
    "text 003": (365, 381),
    "text 001, tested configuration": (393, 401),
    "DDPM": (393, 401),
    "Improved DDPM": (517, 517),
    "ADM, 64 pixels": (574, 582),
    "DDPM, 256 pixels": (1625, 1657),
}


def test_every_network_is_there() -> None:
    assert list(s03_receptive_field.networks()) == list(REACH)


@pytest.mark.parametrize("name", REACH)
def test_reach_counted(name: str) -> None:
    assert receptive.sides(s03_receptive_field.networks()[name]) == REACH[name]


@pytest.mark.parametrize("name", list(REACH)[:6])
def test_reach_measured_at_every_position(name: str) -> None:
    spec = s03_receptive_field.networks()[name]
    places = range(min(spec.stride, 4))
    measured = [receptive.measured_side(spec, p) for p in places]
    assert measured == [len(receptive.seen_by(spec, p)) for p in places]


def test_effective_side_of_a_known_picture() -> None:
    weights = torch.zeros(9, 9)
    weights[4, 4], weights[4, 6] = 8.0, -2.0
    assert receptive.effective_side(weights, (4, 4)) == 5
    assert receptive.effective_side(weights, (4, 4), share=0.8) == 1


# --- S1, exact ----------------------------------------------------------------------------------

DDPM_PARTS = {
    "time_embed": 328_704,
    "init_conv": 3_584,
    "encoder": 10_190_720,
    "bottleneck": 2_888_704,
    "decoder": 22_330_880,
    "output": 3_715,
}
TESTED_PARTS = {
    "time_embed": 328_704,
    "init_conv": 3_584,
    "encoder": 18_589_056,
    "bottleneck": 11_020_288,
    "decoder": 44_105_984,
    "output": 3_715,
}
TOTALS = {
    "light": 8_952_067,
    "ddpm": 35_746_307,
    "improved": 121_060_483,
    "highres": 113_673_219,
    s01_parameters.DDPM: 35_746_307,
    s01_parameters.TESTED: 74_051_331,
}


@pytest.fixture(scope="module")
def counts(lab: Lab) -> harness.Numbers:
    return s01_parameters.measure(lab)


@pytest.mark.parametrize(
    ("name", "parts"),
    [(s01_parameters.DDPM, DDPM_PARTS), (s01_parameters.TESTED, TESTED_PARTS)],
)
def test_parts(counts: harness.Numbers, name: str, parts: dict[str, int]) -> None:
    assert {part: counts[name][part] for part in parts} == parts


@pytest.mark.parametrize("name", TOTALS)
def test_totals(counts: harness.Numbers, name: str) -> None:
    assert counts[name]["total"] == TOTALS[name]


def test_verdicts_on_parameters(counts: harness.Numbers) -> None:
    verdicts = [claim.judge(counts).verdict for claim in s01_parameters.STUDY.claims]
    depends = Verdict.DEPENDS
    assert verdicts == [Verdict.FAILS, depends, depends, depends]
    true = {s01_parameters.DDPM: {**s01_parameters.PRINTED, "total": 1}}
    printed = {**counts, **true}
    assert s01_parameters.judge_breakdown(printed).verdict is Verdict.HOLDS


def test_printed_parts_add_up() -> None:
    assert sum(s01_parameters.PRINTED.values()) == 35_035_136


# --- the lab ------------------------------------------------------------------------------------


def test_trained_once(lab: Lab) -> None:
    one = tiny()
    first = lab.trained(one)
    file = lab.cache / f"{one.key}.safetensors"
    written = file.stat().st_mtime_ns
    again = lab.trained(replace(one, name="the same by another name"))
    x, _, level = harness.noised(SMALL, 1.0, 2)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first(x, level), again(x, level))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"steps": 3},
        {"spec": nets.without_skips(TINY)},
        {"run": harness.time_blind},
        {"prepare": s07_zero_output.usual_head},
        {"data": pictures.Fields(8, 6, exponent=3.0, torus=16)},
    ],
)
def test_key_knows_everything(changes: dict[str, object]) -> None:
    assert tiny(**changes).key != tiny().key


def test_keys_are_not_made_of_lambdas() -> None:
    with pytest.raises(StudyError, match="named functions"):
        _ = tiny(prepare=lambda net: None).key


def test_diverged_training_is_remembered(lab: Lab) -> None:
    broken = tiny(steps=40, prepare=spoilt)
    assert lab.history(broken).diverged
    assert None in lab.history(broken).losses
    with pytest.raises(StudyError, match="diverged"):
        lab.trained(broken)


def spoilt(net: UNet) -> None:
    for parameter in net.parameters():
        parameter.data.fill_(torch.inf)


def test_time_blind_network_hears_nothing(lab: Lab) -> None:
    blind = lab.trained(tiny(run=harness.time_blind, steps=20, batch=4))
    seeing = lab.trained(tiny(steps=20, batch=4))
    x = SMALL.held_out(1, 3)
    outputs = [[d.net(x, torch.tensor([t]), None) for t in (0.0, 3.0)] for d in (blind, seeing)]
    assert torch.equal(*outputs[0])
    assert not torch.equal(*outputs[1])


def counted(lab: Lab, file: str) -> int:
    with Path(file).open("a") as one:
        return one.write("x")


def test_pieces_are_computed_once(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "calls"
    for _ in range(3):
        lab.kept(counted, str(file))
    assert file.read_text() == "x"


# --- single studies -----------------------------------------------------------------------------


def test_zero_output_is_exact() -> None:
    runs = [s07_zero_output.training(name, 0, 1) for name in ("zero output", "usual output")]
    outputs = [s07_zero_output._first_output(one) for one in runs]
    assert outputs[0] == 0.0
    assert outputs[1] > 0.0


def test_silenced_layers_come_back(lab: Lab) -> None:
    denoiser = lab.trained(tiny(steps=20, batch=4))
    assert isinstance(denoiser.net, UNet)
    x = SMALL.held_out(2, 3)

    def output() -> torch.Tensor:
        return denoiser.net(x, torch.zeros(2), None)

    before, named = output(), s05_bottleneck_and_skips.places(TINY, 8)
    with s05_bottleneck_and_skips.silenced(
        denoiser.net, named["all skips"], s05_bottleneck_and_skips.zero
    ):
        assert not torch.equal(output(), before)
    assert torch.equal(output(), before)


def test_named_places_cover_all_skips() -> None:
    named = s05_bottleneck_and_skips.places(nets.REFERENCE, 32)
    sizes = [names for name, names in named.items() if name.startswith("all skips at")]
    assert sorted(sum(sizes, ())) == sorted(named["all skips"])
    assert len(named["all skips"]) == 6


def test_errors_without_size_do_nothing(monkeypatch: pytest.MonkeyPatch, lab: Lab) -> None:
    """The zero line: the exact denoiser, nothing injected."""
    monkeypatch.setattr(s06_errors_add_up, "FIELDS", SMALL)
    monkeypatch.setattr(s06_errors_add_up, "SIZE", 0.0)
    assert max(s06_errors_add_up.single(lab, 4, 0, 1)["final"]) < 1e-12
    assert s06_errors_add_up.repeated(lab, 4, 0, 1)["same"] < 1e-12


def test_error_at_the_last_step_arrives_whole(monkeypatch: pytest.MonkeyPatch, lab: Lab) -> None:
    monkeypatch.setattr(s06_errors_add_up, "FIELDS", SMALL)
    found = s06_errors_add_up.single(lab, 4, 0, 64)
    assert found["final"][-1] == pytest.approx(found["injected"][-1], rel=0.1)
    assert found["final"][0] < found["injected"][0]


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run of the studies that cost least."""
    folder = tmp_path_factory.mktemp("quick")
    words = ["s01", "s07", "--quick", "--workers", "0", "--output", str(folder)]
    assert run.main(words) == 0
    return folder


def test_quick_run_touches_nothing_committed(quick: Path) -> None:
    assert sorted(file.name for file in (quick / "results").iterdir()) == ["s01.json", "s07.json"]
    assert (quick / "docs" / "studies.md").exists()


def test_every_claim_is_on_the_page(quick: Path) -> None:
    page = (quick / "docs" / "studies.md").read_text(encoding="utf-8")
    for study in (s01_parameters.STUDY, s07_zero_output.STUDY):
        assert f'<a id="{study.id}"></a>' in page
        for claim in study.claims:
            for id_ in claim.ids:
                assert f"| {id_} | {claim.says} | [{study.id.upper()}](#{study.id})" in page


def drawn(results: Path, docs: Path) -> dict[str, bytes]:
    write_page(run.all_studies(), results, docs)
    return {str(f.relative_to(docs)): f.read_bytes() for f in docs.rglob("*") if f.is_file()}


def test_page_comes_out_the_same(quick: Path, tmp_path: Path) -> None:
    first = drawn(quick / "results", tmp_path / "a")
    assert first == drawn(quick / "results", tmp_path / "b")
    assert len(first) == 3


def test_committed_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    now = drawn(STUDIES / "results", tmp_path)
    docs = ROOT / "docs"
    assert now["studies.md"].decode() == (docs / "studies.md").read_text(encoding="utf-8")
    for name, figure in now.items():
        assert _numbered(figure) == _numbered((docs / name).read_bytes()), name
        assert len(figure) < 150_000, name


def _numbered(svg: bytes) -> bytes:
    """With clip paths called by their order. Matplotlib calls them by a hash of their unrounded
    coordinates, in which processors differ by the last bit."""
    ids = dict.fromkeys(re.findall(rb"\bp[0-9a-f]{10}\b", svg))
    for number, one in enumerate(ids):
        svg = svg.replace(one, b"p%d" % number)
    return svg


# What the checklist of the four texts has, by text.
ITEMS = {"T000": 14, "T001": 21, "T002": 20, "T003": 16}

# Items that a study answers, and which; their verdicts are of the numbers, not of this table.
ANSWERED = {
    "T001-13": {"s01", "s18"},  # the presets' sizes, times and quality
    "T001-15": {"s01"},  # the printed breakdown
    "T001-16": {"s01"},  # observations on shares
    "T001-17": {"s02", "s08"},  # the scaling table
    "T001-18": {"s07", "s14"},  # initialisers
    "T003-3": {"s03", "s04", "s10"},  # detail, context, doing different things
    "T003-5": {"s06", "s10", "s11"},  # alignment, all scales, small errors
    "T003-7": {"s03", "s04", "s12"},  # what a plain CNN cannot do
    "T003-13": {"s05", "s10"},  # bottleneck at high noise, skips at low
    "T003-16": {"s12"},  # the summary: see below
}


def answers() -> dict[str, set[str]]:
    found = dict[str, set[str]]()
    for study in run.all_studies():
        for claim in study.claims:
            for id_ in claim.ids:
                found.setdefault(id_, set()).add(study.id)
    return found


@pytest.mark.parametrize("id_", ANSWERED)
def test_items_are_answered_by_their_studies(id_: str) -> None:
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    found = answers()[id_]
    missing = ANSWERED[id_] - found
    assert not missing
    for study in found:
        assert re.search(
            rf"^\| {id_} \| .*\(#{study}\) \| (holds|\*\*fails\*\*|\*depends\*) \|$", page, re.M
        )


def test_every_study_has_its_numbers_and_its_section() -> None:
    """T003-16: the five claims of the summary are an index of studies; all eighteen are there."""
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    ids = [f"s{number:02d}" for number in range(1, 19)]
    assert [study.id for study in run.all_studies()] == ids
    for id_ in ids:
        kept = json.loads((STUDIES / "results" / f"{id_}.json").read_text(encoding="utf-8"))
        assert kept["numbers"]
        assert f'<a id="{id_}"></a>' in page


def test_every_item_of_the_checklist_is_in_a_test() -> None:
    known = {f"{text}-{number}" for text, last in ITEMS.items() for number in range(1, last + 1)}
    tests = "".join(f.read_text(encoding="utf-8") for f in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"\bT00[0-3]-\d+\b", tests))
    for text, low, high in re.findall(r"\b(T00[0-3])-(\d+)…(\d+)", tests):
        named |= {f"{text}-{number}" for number in range(int(low), int(high) + 1)}
    assert known - named == set()
    assert set(answers()) <= known


# --- interrupting -------------------------------------------------------------------------------


def test_killed_run_goes_on(tmp_path: Path) -> None:
    """The process group is killed once something is finished; the rest is done afterwards."""
    words = [sys.executable, str(STUDIES / "run.py"), "s07", "--quick", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        [*words, "--workers", "1"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(tmp_path / "cache")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    finished = set((tmp_path / "cache").glob("[0-9a-f]*.json"))
    before = {file: file.stat().st_mtime_ns for file in finished}
    assert not (tmp_path / "results" / "s07.json").exists()
    assert run.main(["s07", "--quick", "--workers", "0", "--output", str(tmp_path)]) == 0
    assert {file: file.stat().st_mtime_ns for file in finished} == before
    assert json.loads((tmp_path / "results" / "s07.json").read_text())["study"] == "s07"


def wait_for(cache: Path) -> set[Path]:
    """Until the first training is there."""
    for _ in range(3000):
        found = set(cache.glob("[0-9a-f]*.json"))
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("nothing was finished")

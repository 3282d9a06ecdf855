"""Quality against network evaluations: budgets, frontier, and a measurement taken up again."""

import json
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from undiffuse import drawing, runs, runtime
from undiffuse.checkpoint import Model, Pictures, save_model
from undiffuse.cli import _pareto as lines
from undiffuse.cli import main
from undiffuse.config import Device, SampleConfig, SamplerName
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import DataError
from undiffuse.evaluation import (
    Features,
    SamplerSetting,
    Split,
    best_per_budget,
    fewest_evaluations,
    frechet_distance,
    frechet_judge,
    frontier,
    paired_distance,
)
from undiffuse.noise import Flow, Karras, Schedule, levels
from undiffuse.recipes import preset
from undiffuse.runs import _pareto
from undiffuse.sampling import SAMPLERS
from undiffuse.unet import UNet

# --- frontier -----------------------------------------------------------------------------------


def setting(sampler: str, evaluations: int, frechet: float | None) -> SamplerSetting:
    return SamplerSetting(sampler, evaluations, evaluations, evaluations, frechet, None)


TABLE = (
    *(setting("a", n, d) for n, d in ((4, 9.0), (6, 4.0), (10, 2.2), (20, 2.1))),
    *(setting("b", n, d) for n, d in ((4, 8.0), (6, 5.0), (10, None), (20, 2.3))),
)


def test_best_frontier_and_recommendation_by_hand() -> None:
    assert [(one.sampler, one.budget) for one in best_per_budget(TABLE)] == [
        *(("b", 4), ("a", 6), ("a", 10), ("a", 20))
    ]
    assert [one.frechet for one in frontier(TABLE)] == [8.0, 4.0, 2.2, 2.1]
    assert fewest_evaluations(TABLE, reference=2.0) == TABLE[2]  # 2.2 is within 10 % of 2
    assert fewest_evaluations(TABLE, reference=1.9) is None
    assert fewest_evaluations(TABLE, reference=7.5) == TABLE[4]


SOME = st.builds(
    setting,
    st.sampled_from("abc"),
    st.integers(1, 9),
    st.one_of(st.none(), st.floats(0.1, 9.0)),
)


@given(st.lists(SOME, max_size=12))
def test_nothing_beats_the_frontier(table: list[SamplerSetting]) -> None:
    kept = frontier(table)
    for one in kept:
        cheaper = [o for o in table if o.frechet is not None and o.evaluations <= one.evaluations]
        assert one.frechet == min(o.frechet for o in cheaper)  # type: ignore[type-var]
    assert bool(kept) == any(one.frechet is not None for one in table)
    for one in table:  # and all others are beaten, or equalled by one that is on it
        if one.frechet is not None and one not in kept:
            assert any(
                o.evaluations <= one.evaluations and o.frechet <= one.frechet  # type: ignore[operator]
                for o in kept
            )


# --- the judge ----------------------------------------------------------------------------------


def flat(count: int, columns: int) -> Features:
    return Features(f"{columns} values", lambda x0: x0.flatten(1)[:, :columns].double().numpy())


def normal(count: int, seed: int, spread: float = 0.2) -> Tensor:
    return spread * torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_the_judge_measures_all_samples_against_all_held_out_pictures() -> None:
    train, held_out, samples = normal(300, 1), normal(200, 2), normal(150, 3, spread=0.3)
    features = flat(300, 4)
    judge = frechet_judge(Split(train), Split(held_out), features=features)
    expected = frechet_distance(features(samples.clamp(-1, 1)), features(held_out))
    assert judge.distance(samples) == pytest.approx(expected)
    assert (judge.reference, judge.against) == (200, "held-out")
    assert judge.distance(4 * samples) == judge.distance((4 * samples).clamp(-1, 1))


def test_real_pictures_score_the_floor() -> None:
    train, held_out = Split(normal(500, 1)), Split(normal(200, 2))
    judge = frechet_judge(train, held_out, features=flat(500, 4))
    scores = [
        replace(judge, points=judge.features(normal(200, seed))).distance(normal(300, 99 - seed))
        for seed in range(3, 43)
    ]
    assert np.mean(scores) == pytest.approx(judge.floor(300), rel=0.15)
    assert judge.floor(100) > judge.floor(300)


def test_many_features_are_reduced_and_few_pictures_refused() -> None:
    wide = Features("wide", lambda x0: np.repeat(x0.flatten(1).double().numpy(), 5, axis=1))
    judge = frechet_judge(Split(normal(100, 1)), Split(normal(50, 2)), features=wide)
    assert "whitened principal components of wide" in judge.features.name
    assert judge.features(normal(4, 3)).shape[1] <= 32
    alone = frechet_judge(Split(normal(100, 1)), Split(normal(1, 2)), features=flat(1, 4))
    assert (alone.reference, alone.against) == (100, "training")
    with pytest.raises(DataError, match="at least 2 pictures; got 1"):
        frechet_judge(Split(normal(1, 1)), Split(normal(1, 2)))
    same = torch.zeros(9, 1, 3, 3)
    with pytest.raises(DataError, match="pictures that differ"):
        frechet_judge(Split(same), Split(same))


def test_paired_distance_by_hand() -> None:
    exact = torch.zeros(2, 1, 2, 2)
    made = exact.clone()
    made[0, 0, 0, 0] = 2.0
    assert paired_distance(made, exact) == pytest.approx((4 / 8) ** 0.5)


# --- budgets ------------------------------------------------------------------------------------


@cache
def plan_of(schedule: Schedule) -> dict[str, list[_pareto._Candidate]]:
    return _pareto._plan(partial(levels, schedule))


@pytest.mark.parametrize("schedule", [Karras(), Flow()])
def test_no_setting_exceeds_its_budget_and_none_has_steps_to_spare(schedule: Schedule) -> None:
    plan = plan_of(schedule)
    assert plan.keys() == SAMPLERS.keys()
    for name, candidates in plan.items():
        assert [one.budget for one in candidates] == [*_pareto.BUDGETS, _pareto.REFERENCE]
        for one in candidates[:3]:
            calls, _ = _pareto._tried(SAMPLERS[name], levels(schedule, one.steps))
            assert calls == one.evaluations <= one.budget
            more, _ = _pareto._tried(SAMPLERS[name], levels(schedule, one.steps + 1))
            assert more > one.budget


def test_heun_takes_two_evaluations_a_step_and_one_in_the_last() -> None:
    heun = plan_of(Karras())["heun"]
    assert [(one.steps, one.evaluations) for one in heun][:4] == [(2, 3), (3, 5), (3, 5), (4, 7)]
    assert heun[-1].evaluations == 99


def test_samplers_that_add_noise_are_found_out() -> None:
    noisy = {name for name, some in plan_of(Karras()).items() if some[0].adds_noise}
    assert noisy == {"ddpm", "dpmpp_2m_sde"} & SAMPLERS.keys()


# --- a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model in it, and pictures beside it."""
    root = tmp_path_factory.mktemp("start")
    (root / "run").mkdir()
    save_tiny(root / "run" / "model.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(root / "pictures.npz", images=pixels)
    return root


def save_tiny(path: Path) -> None:
    """A network whose last layer, zero at first, is made to matter."""
    net = UNet(preset("tiny", 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    save_model(path, Model(Denoiser(net, Karras(), KarrasPrecond(0.5)), Pictures(8, 8, 1), {}))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samplers, few evaluations, few pictures."""
    monkeypatch.setattr(_pareto, "BUDGETS", (2, 3))
    monkeypatch.setattr(_pareto, "REFERENCE", 6)
    monkeypatch.setattr(_pareto, "PAIRED", 2)
    some = {name: SAMPLERS[name] for name in ("ddpm", "ddim", "dpmpp_2m")}
    monkeypatch.setattr(_pareto, "SAMPLERS", some)


@pytest.fixture
def options(start: Path) -> runs.EvaluateOptions:
    return runs.EvaluateOptions(
        num_samples=4,
        sampling=SampleConfig(batch_size=2),
        data=str(start / "pictures.npz"),
        device=Device.CPU,
    )


@pytest.fixture
def fresh(start: Path, tmp_path: Path, hasty: None) -> Path:
    """The run, without what a measurement leaves."""
    return Path(shutil.copytree(start / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def made_once() -> list[runs.Pareto]:
    return []


@pytest.fixture
def whole(
    fresh: Path, options: runs.EvaluateOptions, tmp_path: Path, made_once: list[runs.Pareto]
) -> runs.Pareto:
    """Of an uninterrupted measurement."""
    if not made_once:
        made_once.append(runs.pareto_run(shutil.copytree(fresh, tmp_path / "whole"), options))
    return made_once[0]


PASSES = 3 * (2 + 3) * 2 + 6 * 2 + 6  # the budgets, the reference, and ddim's own of one batch


def test_a_run_is_measured_and_its_files_are_whole(
    fresh: Path, whole: runs.Pareto, options: runs.EvaluateOptions
) -> None:
    seen: list[tuple[str, int, int]] = []
    made = runs.pareto_run(fresh, options, lambda *state: seen.append(state))
    assert made == whole
    assert seen[0][1] == 0
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (PASSES, PASSES)
    body = json.loads((fresh / "pareto.json").read_text())
    assert body == json.loads(json.dumps(made.asdict()))
    assert body["schema"] == "undiffuse.pareto/1"
    assert (fresh / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_distances_are_those_of_the_pictures_that_generate_makes(
    start: Path, whole: runs.Pareto
) -> None:
    model = runs.load(start / "run", device="cpu")
    exact = {name: drawn(model, name, 6) for name in ("ddim", "dpmpp_2m")}
    for one in whole.settings:
        if one.sampler == "ddpm":
            assert one.rms is None
            continue
        made = drawn(model, one.sampler, one.steps)
        apart = paired_distance(made[:2], exact[one.sampler][:2])
        assert one.rms == pytest.approx(apart, rel=1e-4)
        assert apart > 0
    assert whole.reference.frechet != whole.settings[-1].frechet


def drawn(model: Model, sampler: str, steps: int) -> Tensor:
    return runs.generate(model, 4, sampler=sampler, num_inference_steps=steps, batch_size=2)


def test_an_interrupted_measurement_goes_on_where_it_was(
    fresh: Path, whole: runs.Pareto, options: runs.EvaluateOptions
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.pareto_run(fresh, options, stop)
    kept = json.loads((fresh / "pareto.json").read_text())
    assert kept["reference"] is None
    assert 0 < len(kept["settings"]) < 7
    seen: list[tuple[int, int]] = []
    again = runs.pareto_run(fresh, options, lambda what, *state: seen.append(state))
    assert again == whole
    assert 0 < seen[-1][1] < PASSES
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ("torn {", 0),
        ("[]", 0),
        ('{"schema": "undiffuse.pareto/1"}', 0),
        ("other seed", 0),
        ("another schema", 0),
        ("other columns", 0),
        ("the same", 7),
    ],
)
def test_only_what_fits_is_taken_up(
    left: str, kept: int, whole: runs.Pareto, tmp_path: Path
) -> None:
    body = json.loads(json.dumps(whole.asdict()))
    changed = {
        "the same": body,
        "other seed": body | {"measured": body["measured"] | {"seed": 1}},
        "another schema": body | {"schema": "undiffuse.pareto/0"},
        "other columns": body | {"settings": [{"sampler": "ddim"}]},
    }
    text = json.dumps(changed[left]) if left in changed else left
    (tmp_path / "pareto.json").write_text(text)
    store = _pareto._Store(tmp_path / "pareto.json", whole.measured, {})
    store.read()
    assert len(store.found) == kept


def test_a_change_of_weights_is_measured_anew(whole: runs.Pareto, start: Path) -> None:
    """Or of pictures, or settings: all of them stand in `measured`."""
    assert whole.measured["num_samples"] == 4
    assert whole.measured["reference_pictures"] > 0
    state = runs.load(start / "run", device="cpu").net.state_dict()
    assert whole.measured["weights"] == _pareto._fingerprint(state.values())
    last = list(state)[-1]
    other = {**state, last: state[last] + 1e-6}
    assert whole.measured["weights"] != _pareto._fingerprint(other.values())


def test_a_model_that_explodes_has_no_figures(start: Path, options: runs.EvaluateOptions) -> None:
    broken = torch.full((4, 1, 8, 8), torch.nan)
    subject = _pareto.subject_of(start / "run", options)
    judge = frechet_judge(subject.train, subject.held_out)
    job = _pareto._Job(subject, judge, "ddim", _pareto._Store(None, {}, {}))
    one = plan_of(Karras())["ddim"][0]
    assert job.judged(one, broken, None).frechet is None


# --- words and pictures -------------------------------------------------------------------------


def test_lines(whole: runs.Pareto) -> None:
    text = lines.pareto_lines(whole)
    assert text[0].startswith("Fréchet distance of 4 samples to ")
    assert text[1].split() == ["evaluations", "2", "3"]
    stars = [sum(row.split()[place].endswith("*") for row in text[2:5]) for place in (1, 2)]
    assert stars == [1, 1]
    assert any(line.startswith("6 evaluations of dpmpp_2m: ") for line in text)
    assert any(line.startswith("on the frontier: 2 ") for line in text)
    assert text[-1].startswith(("recommended: --sampler ", "none of these is within 10 %"))


def test_nothing_is_recommended_where_nothing_is_near(whole: runs.Pareto) -> None:
    none = replace(whole, recommended=None)
    assert lines.pareto_lines(none)[-1] == "none of these is within 10 % of that"


def test_the_command(
    fresh: Path, options: runs.EvaluateOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(fresh), "--pareto", "--num-samples", "4", "--device", "cpu"]
    words += ["--data", str(options.data), "--sampler", "ddim"]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    body = json.loads(out)
    assert body["schema"] == "undiffuse.pareto/1"
    assert len(body["settings"]) == 6
    assert body["reference"]["sampler"] == "ddim"
    assert "network evaluations of a batch, 4 pictures per setting" in err


def test_more_pictures_than_fit_are_refused_on_the_chosen_device(
    start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Device] = []
    choose = runtime.choose_device
    monkeypatch.setattr(runtime, "choose_device", lambda one: seen.append(one) or choose(one))
    for pareto in ([], ["--pareto"]):
        line = ["evaluate", str(start / "run"), "--num-samples", "10000000000", *pareto]
        assert main([*line, "--device", "cpu"]) == 7
        assert "num_samples: 10,000,000,000 pictures of 8x8 need" in capsys.readouterr().err
    assert set(seen) == {Device.CPU}


@pytest.mark.parametrize(
    "option",
    ["--num-inference-steps 4", "--draws 2", "--fail-above frechet=3", "--fail-below recall=1"],
)
def test_options_without_use_are_refused(
    start: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(start / "run"), "--pareto", *option.split()]) == 2
    name = option.split()[0].strip("-").replace("-", "_")
    assert f"{name} does not go with --pareto" in capsys.readouterr().err


def test_drawn_are_all_samplers_their_best_and_the_limits(
    whole: runs.Pareto,
) -> None:
    figure = drawing.draw_pareto(whole.asdict())
    left, right = figure.axes
    drawn = {one.get_gid(): np.asarray(one.get_ydata()) for one in left.get_lines()}
    by_name = {(one.sampler, one.budget): one.frechet for one in whole.settings}
    for name in ("ddpm", "ddim", "dpmpp_2m"):
        expected = [by_name[name, 2], by_name[name, 3]]
        assert drawn[f"frechet-{name}"] == pytest.approx(expected)
    assert {line.get_label() for line in left.get_lines()} >= {
        *("at 100 evaluations", "real pictures")
    }
    assert {one.get_gid() for one in right.get_lines()} == {"rms-ddim", "rms-dpmpp_2m"}
    (rings,) = left.collections
    assert len(rings.get_offsets()) == 2


def test_an_empty_table_is_drawn_as_such() -> None:
    figure = drawing.draw_pareto({"settings": []})
    assert "nothing recorded yet" in [text.get_text() for text in figure.axes[0].texts]


def test_the_names_of_samplers_are_those_of_the_options() -> None:
    """The recommendation can be typed."""
    assert {one.value for one in SamplerName} == SAMPLERS.keys()

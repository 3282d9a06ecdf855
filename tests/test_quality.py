"""The measurements of quality: verdicts, resuming, and a page that follows from the results."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from quality import ablation, digits, fields, page, run
from quality.fitted import fitted, seconds_of, threads_of
from quality.harness import (
    Finding,
    Lab,
    Side,
    Task,
    at_least,
    at_most,
    finished,
    key_of,
    line,
    read,
)
from undiffuse import config
from undiffuse.checkpoint import load_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("finding", "holds"),
    [
        (at_most("a", 1.0, 1.0), True),
        (at_most("a", 1.01, 1.0), False),
        (at_least("a", 0.9, 0.9), True),
        (at_least("a", 0.89, 0.9), False),
        (at_most("a", math.nan, 1.0), False),
        (at_least("a", math.nan, 1.0), False),
        (Finding("a", 5.0), None),
    ],
)
def test_a_finding_holds_on_the_right_side_of_its_bound(
    finding: Finding, holds: bool | None
) -> None:
    assert finding.holds is holds


@dataclass(frozen=True)
class Settings:
    steps: int = 3


def counted(log: list[int]) -> Task:
    def job(lab: Lab, seed: int) -> Iterator[Finding]:
        log.append(seed)
        yield at_most("one/number", seed, 1)
        yield Finding("one/other", 0.5, Side.SHOWN)

    return Task("one", job, Settings(), seeds=(0, 1, 2))


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    log: list[int] = []
    task, lab = counted(log), Lab(tmp_path / "kept")
    verdicts = run.measured([task], lab, None, tmp_path)
    assert log == [0, 1, 2]
    assert verdicts == [True, True, False]
    assert run.measured([task], lab, None, tmp_path) == verdicts  # what was found still counts
    assert log == [0, 1, 2]
    (file,) = tmp_path.glob("*.jsonl")
    last = [one for one in read(file) if one["name"] == "one/other"]
    assert [one["seed"] for one in last] == [0, 1, 2]


def test_a_task_that_broke_off_or_changed_is_not_finished(tmp_path: Path) -> None:
    task = counted([])
    found = at_most("one/number", 0.0, 1.0)
    whole, half = ([line(task, 0, found, {"last": last})] for last in (True, False))
    assert finished(whole, task, 0)
    assert not finished(half, task, 0)
    assert not finished(whole, task, 1)
    changed = Task("one", task.run, Settings(steps=4))
    assert not finished(whole, changed, 0)


def test_networks_of_another_version_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Lab(tmp_path).folder("one", Settings(), 0)
    monkeypatch.setattr("quality.harness.VERSION", -1)
    assert Lab(tmp_path).folder("one", Settings(), 0) != before


def test_training_is_timed_over_all_its_parts(tmp_path: Path) -> None:
    clock = (1.0, 2.5, 4.0, 0.5, 1.5, 0.25)  # gone on with twice
    lines = [json.dumps({"time": time}) for time in clock]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert seconds_of(tmp_path) == 4.0 + 1.5 + 0.25


def test_a_network_is_kept_and_gone_on_with(tmp_path: Path) -> None:
    data, run = torch.zeros(4, 1, 8, 8), tmp_path / "run"
    settings = {"max_train_steps": 4, "train_batch_size": 2, "sample_every": 4, "ema_snapshots": 0}
    model = fitted(run, data, **settings)
    written = (run / "model.safetensors").read_bytes()
    assert fitted(run, data, **settings).trained == model.trained
    (run / "model.safetensors").unlink()  # stopped before its end
    fitted(run, data, **settings)
    assert (run / "model.safetensors").read_bytes() == written
    assert threads_of(run) == torch.get_num_threads()
    assert seconds_of(run) > 0


@pytest.mark.parametrize("values", [(0.1, math.nan, 0.2), (0.1, None, 0.2)])
def test_a_level_that_is_no_number_is_not_hidden(values: tuple[float | None, ...]) -> None:
    assert math.isnan(fields.worst(values))
    assert fields.worst((0.1, 0.3, 0.2)) == 0.3


def test_lines_are_json_even_where_numbers_are_not_finite() -> None:
    task = counted([])
    body = line(task, 0, at_most("a", math.inf, 1.0, detail={"x": [math.nan, 1]}), {"last": True})
    assert json.loads(json.dumps(body, allow_nan=False))["value"] is None
    assert body["detail"]["x"] == [None, 1]
    assert body["holds"] is False


def test_every_task_has_a_name_and_a_key_of_its_own() -> None:
    names = [task.name for task in run.TASKS]
    assert len(set(names)) == len(names)
    assert len({task.key for task in run.TASKS}) == len(names)


def test_the_key_of_settings_is_the_same_in_every_process() -> None:
    assert key_of(digits.Preset("digits-demo", 90.0)) == "17fdee87e5cb"


def test_ablations_name_settings_that_exist() -> None:
    for ground in ablation.GROUNDS:
        for change in ground.changes:
            config.override(config.RunConfig(), {**dict(ground.settings), **dict(change.training)})


def test_the_judging_digits_are_not_in_the_ablation() -> None:
    train, _ = digits.splits()
    data = ablation.GROUNDS[0].data()
    assert len(data.train) + len(data.held_out) == len(train)
    seen = {row.tobytes() for row in (*data.train.pixels, *data.held_out.pixels)}
    judging = {row.tobytes() for row in digits.raw_held_out()}
    assert not seen & judging


def test_a_guided_step_counts_as_two_evaluations() -> None:
    class Judge:
        def distance(self, x0: torch.Tensor) -> float:
            return float(len(x0))

    model = load_model(digits.COMMITTED)
    for steps, evaluations in ((digits.FEW_STEPS, digits.FEW), (digits.MANY_STEPS, digits.MANY)):
        found = digits._distance(Judge(), model, 3, steps)  # pyright: ignore[reportPrivateUsage, reportArgumentType] # what counts evaluations; a stand-in for the judge
        assert found == (3.0, evaluations)


def test_the_page_follows_from_the_committed_results(tmp_path: Path) -> None:
    results, notes = ROOT / "quality" / "results", ROOT / "quality" / "notes.md"
    made = page.write_page(results, tmp_path, notes, run.TASKS)
    assert made.read_bytes() == (ROOT / "docs" / "quality.md").read_bytes()


def test_a_change_is_told_beside_the_same_seeds_of_the_base() -> None:
    def group(values: list[float]) -> list[dict[str, float]]:
        return [{"seed": seed, "value": value} for seed, value in enumerate(values)]

    groups = {"base/nats": group([1.0, 2.0, 6.0]), "other/nats": group([0.75, 1.25])}
    table = page._ablation(groups)  # pyright: ignore[reportPrivateUsage] # a part of the page
    assert "| base | 3 | 3.00 |" in table
    assert "| other | 2 | 1.00 (-0.500 ± 0.250) |" in table


def test_a_target_holds_only_if_every_seed_reaches_it(tmp_path: Path) -> None:
    run.measured([counted([])], Lab(tmp_path), None, tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    text = page._table(page.grouped(read(file)))  # pyright: ignore[reportPrivateUsage]
    assert "| 1.00 | 0.000 … 2.00 | 3 |" in text
    assert "**no** (2 of 3)" in text


def test_samplers_stand_beside_each_other(tmp_path: Path) -> None:
    def found(lab: Lab, seed: int) -> Iterator[Finding]:
        for budget in (5, 10):
            detail = {"evaluations": budget, "steps": budget, "rms": None}
            yield Finding(f"samplers/heun/{budget}", seed + 10 / budget, floor=1, detail=detail)
        yield Finding("samplers/ddpm/10", math.nan, floor=1, detail=detail)

    task = Task("samplers", found, seeds=(0, 1))
    run.measured([task], Lab(tmp_path), None, tmp_path / "results")
    made = page.write_page(tmp_path / "results", tmp_path, tmp_path / "none.md", [task])
    text = made.read_text(encoding="utf-8")
    assert "| Fréchet distance at | 5 | 10 |" in text
    assert "| `heun` | 2.50 ± 0.707 | 1.50 ± 0.707 |" in text
    assert "| `ddpm` |  | not finite |" in text
    assert (tmp_path / "images" / "quality" / "samplers.svg").stat().st_size > 1000


def test_what_older_settings_gave_is_not_shown(tmp_path: Path) -> None:
    task = counted([])
    run.measured([task], Lab(tmp_path), None, tmp_path / "results")
    page.write_page(tmp_path / "results", tmp_path, tmp_path / "none.md", [task])
    shown = (tmp_path / "quality.md").read_text(encoding="utf-8")
    changed = replace(task, settings="of another recipe")
    page.write_page(tmp_path / "results", tmp_path, tmp_path / "none.md", [changed])
    assert page.NOTHING in (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert page.NOTHING not in shown

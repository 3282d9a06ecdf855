"""A run that was told how its pictures are guided: whatever is made of it afterwards follows."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import undiffuse
from undiffuse import runs
from undiffuse.checkpoint import Model, save_model
from undiffuse.cli import main
from undiffuse.config import RECIPES, GuidanceConfig, RunConfig, SampleConfig, override
from undiffuse.errors import ConfigError
from undiffuse.runs import _editing, _evaluate, _generate

pytestmark = pytest.mark.usefixtures("small_preset")

TOLD = {"guidance_scale": 3.0, "guidance_low": 0.1, "guidance_high": 3.0}
TINY: dict[str, Any] = {
    "preset": "small",
    "max_train_steps": 2,
    "train_batch_size": 4,
    "mixed_precision": "no",
    "num_samples": 2,
    "learning_rate": 1e-2,
    "ema_snapshots": 0,
}


def draw(path: Path, labelled: bool) -> Path:
    dice = np.random.default_rng(0)
    arrays = {"images": dice.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)}
    np.savez(path, **arrays, **({"labels": np.arange(12) % 2} if labelled else {}))  # pyright: ignore[reportArgumentType] # numpy's stub takes the names for its flags
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small_preset: None) -> Path:
    del small_preset
    root = tmp_path_factory.mktemp("guided")
    undiffuse.fit(draw(root / "data.npz", True), output_dir=root / "run", **TINY, **TOLD)
    return root


@pytest.fixture(scope="module")
def model(world: Path) -> Model:
    return runs.load(world / "run")


def drawn(model: Model, **options: Any) -> torch.Tensor:
    return runs.generate(model, 2, num_inference_steps=6, mixed_precision="no", **options)


def test_the_model_says_it_and_is_drawn_so(model: Model) -> None:
    assert runs.usual_guidance(model) == GuidanceConfig(**TOLD)
    usual, plain = drawn(model), drawn(model, guidance_scale=1.0)
    assert torch.equal(usual, drawn(model, guidance_scale=3.0, guidance_interval=(0.1, 3.0)))
    assert not torch.equal(usual, plain)
    bare = replace(model, trained={})
    assert runs.usual_guidance(bare) == GuidanceConfig()
    assert torch.equal(drawn(bare), plain)


def test_what_is_said_replaces_its_own_part_only(model: Model) -> None:
    everywhere = drawn(model, guidance_interval=(0.0, math.inf))
    bare = replace(model, trained={})
    assert torch.equal(everywhere, drawn(bare, guidance_scale=3.0))
    inside = drawn(bare, guidance_scale=2.0, guidance_interval=(0.1, 3.0))
    assert torch.equal(drawn(model, guidance_scale=2.0), inside)


def test_a_part_that_is_typed_meets_the_rest_of_what_the_run_was_told() -> None:
    usual = GuidanceConfig(**TOLD)
    assert SampleConfig().guided(usual) == usual
    assert SampleConfig(guidance_low=0.0).guided(usual) == replace(usual, guidance_low=0.0)
    with pytest.raises(ConfigError, match=r"^guidance_low 4 is above guidance_high 3; no noise"):
        SampleConfig(guidance_low=4.0).guided(usual)


def test_a_model_file_that_says_nonsense_is_refused(model: Model) -> None:
    for name, value in (("guidance_scale", "much"), ("guidance_low", -1), ("guidance_high", 0.01)):
        broken = replace(model, trained={**model.trained, name: value})
        with pytest.raises(ConfigError, match=f"^(guidance_low|{name}) "):
            drawn(broken)


def test_pictures_without_labels_are_not_guided_and_the_plan_says_so(tmp_path: Path) -> None:
    events = list[runs.Event]()
    data = draw(tmp_path / "data.npz", False)
    made = undiffuse.fit(data, on_event=events.append, **TINY, **TOLD)
    notes = [one.text for one in events if isinstance(one, runs.Note)]
    assert "guidance_scale 3 is not used: the network takes no labels" in notes
    assert runs.usual_guidance(made) == GuidanceConfig()
    assert drawn(made).isfinite().all()


def test_a_rebuilt_average_is_guided_as_its_run(tmp_path: Path) -> None:
    data = draw(tmp_path / "data.npz", True)
    settings = {**TINY, **TOLD, "max_train_steps": 16, "ema_snapshots": 8}
    undiffuse.fit(data, output_dir=tmp_path / "run", **settings)
    rebuilt = runs.averaged(tmp_path / "run", 0.07)
    assert runs.usual_guidance(rebuilt) == GuidanceConfig(**TOLD)


def test_recipes_that_guide_say_so_in_the_settings_of_a_run() -> None:
    for name in ("digits-demo", "digits-best"):
        settings = override(RunConfig(), {"preset": name}).guidance
        assert settings != GuidanceConfig()
        assert settings.guidance_scale == RECIPES[name].settings["guidance_scale"]


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture
def ask(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Runs a command; its JSON object, and the options of every `generate` in it."""
    monkeypatch.chdir(tmp_path)
    seen = list[dict[str, Any]]()
    original = runs.generate

    def generate(*words: Any, **options: Any) -> torch.Tensor:
        seen.append(options)
        return original(*words, **options)

    monkeypatch.setattr(_generate, "generate", generate)
    monkeypatch.setattr(_editing, "generate", generate)
    monkeypatch.setattr(_evaluate, "generate", generate)

    def asked(line: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        seen.clear()
        words = line.format(run=world / "run").split()
        assert main([*words, "--num-inference-steps", "3", "--json", "--quiet"]) == 0
        return json.loads(capsys.readouterr().out), [*seen]

    return asked


def how(options: dict[str, Any]) -> tuple[float, tuple[float, float] | None]:
    return options["guidance_scale"], options["guidance_interval"]


def test_sample_follows_the_run_unless_told(ask: Any) -> None:
    line = "sample {run} -n 2 --output-dir out"
    assert how(ask(line)[1][0]) == (3.0, (0.1, 3.0))
    assert how(ask(f"{line} --guidance-scale 1")[1][0])[0] == 1.0
    assert how(ask(f"{line} --guidance-low 0")[1][0]) == (3.0, (0.0, 3.0))


def test_sample_says_what_nobody_typed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sample", str(world / "run"), "-n", "2", "--num-inference-steps", "3"]
    said = "guided by 3 at sigma 0.1 to 3, as the run was told (--guidance-scale 1: not at all)"
    for more, expected in (([], True), (["--guidance-scale", "3"], False)):
        assert main([*line, *more]) == 0
        assert (said in capsys.readouterr().out) is expected


def test_evaluate_follows_the_run_and_writes_what_it_took(ask: Any) -> None:
    line = "evaluate {run} --num-samples 4 --draws 1"
    body, seen = ask(line)
    assert {name: body["sampling"][name] for name in TOLD} == TOLD
    assert how(seen[0]) == (3.0, (0.1, 3.0))
    assert ask(f"{line} --guidance-scale 1")[0]["sampling"]["guidance_scale"] == 1.0


def test_a_comparison_guides_each_as_its_run(world: Path) -> None:
    options = runs.EvaluateOptions(num_samples=4, draws=1)
    other = undiffuse.fit(world / "data.npz", **TINY)
    save_model(world / "other.safetensors", other)
    made = runs.compare_runs(world / "run", world / "other.safetensors", options)
    assert {name: made.a[name] for name in TOLD} == TOLD
    assert made.b["guidance_scale"] == 1.0


def test_pictures_are_edited_with_it_where_a_label_is_named(ask: Any, tmp_path: Path) -> None:
    picture = np.zeros((1, 8, 8), np.float32)
    undiffuse.images.save_image(torch.from_numpy(picture), tmp_path / "one.png")
    line = f"edit {{run}} {tmp_path / 'one.png'} -n 1 --output-dir out"
    assert how(ask(line)[1][0])[0] == 1.0
    assert how(ask(f"{line} --class-label 1")[1][0]) == (3.0, (0.1, 3.0))


def test_the_report_names_it(world: Path, tmp_path: Path) -> None:
    page = runs.write_report(world / "run", tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Guidance" in page
    assert "3 at sigma 0.1 to 3" in page
    assert runs.guidance_words(1.5, (0.0, math.inf)) == "1.5 at all levels"

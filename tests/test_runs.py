"""Runs from plan to model file: what is refused, what is written, what comes back out."""

# pyright: basic

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import undiffuse
from undiffuse import cost, images, recipes, runs
from undiffuse.augmentation import Augment
from undiffuse.checkpoint import Checkpoints, Model, load_model, save_model
from undiffuse.config import Device, RunConfig, SampleConfig, Weights, flatten, override
from undiffuse.denoiser import Epsilon, KarrasPrecond, OnGrid, Velocity
from undiffuse.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ResourceError,
    UndiffuseError,
)
from undiffuse.noise import Cosine, LinearBetas, Sigmoid
from undiffuse.runs import _plan, _real
from undiffuse.runs._folder import read_metrics, rewind_metrics
from undiffuse.sampling import SAMPLERS
from undiffuse.unet import UNet

QUICK: dict[str, Any] = {
    "preset": "small",
    "max_train_steps": 4,
    "train_batch_size": 4,
    "mixed_precision": "no",
    "num_samples": 2,
    "device": "cpu",
    "ema_snapshots": 0,  # tests/test_averaging.py keeps them
}
TWO_STEPS: dict[str, Any] = {**QUICK, "max_train_steps": 2}

SIDES = ("train", "held_out")


def make_plan(one: runs.Request) -> runs.Plan:
    """What a run does before its first step."""
    return _plan.make_plan(_plan.gather(one))


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """A preset that trains a step in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        build = lambda channels: recipes.ddpm_family(8, (1, 2), 1, (1,), channels)  # noqa: E731
        patch.setitem(recipes.PRESETS, "small", recipes.Preset(build, 16, "for tests"))
        yield


def draw(path: Path, seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> None:
    """A smooth picture, different for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, bands), dtype=np.uint8)
    coarse = Image.fromarray(pixels.squeeze())
    assert coarse.mode == mode
    coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path)


def make_folder(folder: Path, count: int = 24) -> Path:
    for number in range(count):
        draw(folder / ("ant", "bee", "cat")[number % 3] / f"{number:02d}.png", number)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures"))


def request(data: object, run: Path, **settings: Any) -> runs.Request:
    options = {name: settings.pop(name) for name in list(settings) if name in OF_REQUEST}
    config = override(RunConfig(), {**QUICK, "data": str(data), **settings})
    return runs.Request(config, run, **options)


OF_REQUEST = ("resume", "init_from", "accept_data_change", "dry_run")


def events(one: runs.Request, stop: Callable[[], bool] = lambda: False) -> list[runs.Event]:
    return list(runs.training_run(one, stop))


def notes(happened: list[runs.Event]) -> list[str]:
    return [event.text for event in happened if isinstance(event, runs.Note)]


def run_until(one: runs.Request, step: int) -> list[runs.Event]:
    """Stop after an update, as a signal would."""
    done: list[runs.Event] = []
    for event in runs.training_run(one, lambda: updates(done) >= step):
        done.append(event)
    return done


def updates(happened: list[runs.Event]) -> int:
    return sum(isinstance(event, runs.Progress) for event in happened)


def weights(run: Path, step: int | None = None) -> dict[str, Tensor]:
    groups = Checkpoints(run / "checkpoints").read(step)[0].tensors
    return {f"{group}/{name}": t for group, part in groups.items() for name, t in part.items()}


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    undiffuse.fit(pictures, output_dir=run, **{**QUICK, "max_train_steps": 12, "sample_every": 5})
    return run


@pytest.fixture(scope="module")
def model(finished: Path) -> Model:
    """Its last layer, which starts at zero and has hardly moved, is made to matter."""
    loaded = undiffuse.load(finished)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in loaded.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return loaded


# --- fit and the run folder ---------------------------------------------------------------------


def test_a_run_leaves_the_files_that_are_promised(finished: Path, pictures: Path) -> None:
    found = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    promised = {
        "config.json",
        "run.json",
        "metrics.jsonl",
        "log.txt",
        "model.safetensors",
        "samples/step_00000005.png",
        "samples/step_00000010.png",
        "samples/step_00000012.png",
        "checkpoints/step_00000012/MANIFEST.json",
        "cache/train.npy",
    }
    assert promised <= found
    assert not any(".tmp" in name for name in found)
    config = json.loads((finished / "config.json").read_text())
    assert config == flatten(runs.stored_config(finished))
    assert config["data"] == str(pictures)
    assert config["preset"] == "small"
    info = json.loads((finished / "run.json").read_text())
    sides = {side: len(np.load(finished / "cache" / f"{side}.npy")) for side in SIDES}
    assert {side: info[f"{side}_images"] for side in SIDES} == sides
    assert sum(sides.values()) == 24
    assert min(sides.values()) >= 1
    with Image.open(finished / "samples" / "step_00000012.png") as grid:
        assert min(grid.size) >= 16


def test_every_line_of_the_metrics_is_json(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line in lines:
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["skipped"] == 0
        assert 0 < line["lr"] <= 1e-3
        assert line["images_per_second"] > 0
        assert line["val_loss"] == pytest.approx(np.mean(line["loss_by_t"]))


def test_fit_returns_a_model_that_generates(finished: Path) -> None:
    trained = undiffuse.load(finished)
    assert trained.spec.classes == 3
    assert trained.pictures.class_names == ("ant", "bee", "cat")
    assert (trained.pictures.height, trained.pictures.width) == (16, 16)
    assert trained.trained["steps"] == 12
    assert trained.trained["images_seen"] == 48
    made = undiffuse.generate(trained, 4, num_inference_steps=3)
    assert made.shape == (4, 3, 16, 16)
    assert made.dtype == torch.float32
    assert made.isfinite().all()
    assert made.abs().max() <= 1


def test_fit_without_a_folder_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pixels = torch.rand(12, 1, 8, 8) * 2 - 1
    trained = undiffuse.fit(pixels, **QUICK)
    assert undiffuse.generate(trained, 1, num_inference_steps=2).shape == (1, 1, 8, 8)
    assert list(tmp_path.iterdir()) == []


def test_fit_takes_arrays_too(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    trained = undiffuse.fit(pixels, output_dir=tmp_path / "run", **QUICK)
    assert trained.spec.classes == 0


def test_the_events_come_in_order(tmp_path: Path, pictures: Path) -> None:
    happened = events(request(pictures, tmp_path / "run", checkpointing_steps=2, sample_every=3))
    names = [type(event).__name__ for event in happened]
    assert names == [
        *("Doing", "Doing", "Planned", "Note"),
        *("Progress", "Progress", "Saved", "Progress", "Validated"),
        *("Progress", "Validated", "Saved", "Finished"),
    ]
    last = happened[-1]
    assert isinstance(last, runs.Finished)
    assert last.step == 4
    assert last.model == tmp_path / "run" / "model.safetensors"
    assert last.held_out is not None
    assert last.held_out > 0
    assert "Only 24 images" in notes(happened)[0]
    assert notes(happened)[0] in (tmp_path / "run" / "log.txt").read_text()


def test_the_saved_model_holds_the_averaged_weights(finished: Path) -> None:
    stored = Checkpoints(finished / "checkpoints").read(12)[0].tensors
    averaged = load_model(finished / "model.safetensors").net.state_dict()
    assert_same(averaged, stored["ema"])
    assert any(not torch.equal(stored["ema"][n], stored["model"][n]) for n in averaged)


@pytest.mark.parametrize(
    ("size", "mode", "channels"), [((48, 40), "L", 1), ((12, 20), "RGB", 3)], ids=["grey", "odd"]
)
def test_odd_sizes_and_grey_pictures_train(
    size: tuple[int, int], mode: str, channels: int, tmp_path: Path
) -> None:
    for number in range(8):
        draw(tmp_path / "data" / f"{number}.png", number, size, mode)
    trained = undiffuse.fit(tmp_path / "data", **TWO_STEPS)
    assert undiffuse.generate(trained, 2, num_inference_steps=2).shape == (2, channels, *size)


def test_two_channels_from_an_npz_train(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 2), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels)
    settings = QUICK | {"max_train_steps": 2, "output_dir": tmp_path / "run"}
    trained = undiffuse.fit(tmp_path / "data.npz", **settings)
    assert undiffuse.generate(trained, 2, num_inference_steps=2).shape == (2, 2, 8, 8)
    assert list((tmp_path / "run" / "samples").glob("*"))


def test_sixteen_bit_grey_pictures_keep_their_bits(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 2**16, (8, 8), dtype=np.uint16)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    trained = undiffuse.fit(tmp_path / "data", **TWO_STEPS)
    assert trained.pictures.bits == 16
    assert undiffuse.generate(trained, 1, num_inference_steps=2).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "epsilon", "beta_schedule": "linear", "num_train_timesteps": 50},
        {"prediction_type": "v_prediction", "beta_schedule": "cosine", "snr_gamma": 5.0},
        {"prediction_type": "flow", "beta_schedule": "flow"},
        {"prediction_type": "sample", "beta_schedule": "karras", "class_conditional": False},
    ],
    ids=lambda s: s["prediction_type"],
)
def test_every_prediction_trains_and_samples(
    settings: dict[str, Any], tmp_path: Path, pictures: Path
) -> None:
    happened = events(request(pictures, tmp_path / "run", **settings))
    trained = undiffuse.load(tmp_path / "run")
    assert isinstance(happened[-1], runs.Finished)
    assert trained.spec.classes == (0 if "class_conditional" in settings else 3)
    assert undiffuse.generate(trained, 2, num_inference_steps=3).isfinite().all()


def test_tensorboard_gets_an_event_file(tmp_path: Path, pictures: Path) -> None:
    events(request(pictures, tmp_path / "run", report_to="tensorboard"))
    (file,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    assert b"loss" in file.read_bytes()


def test_previews_do_not_touch_the_weights(tmp_path: Path, pictures: Path) -> None:
    """F20."""
    for name, every in (("often", 1), ("never", 10**6)):
        settings = {"sample_every": every, "checkpointing_steps": every, "dropout": 0.2}
        events(request(pictures, tmp_path / name, **settings))
    assert_same(weights(tmp_path / "often"), weights(tmp_path / "never"))


def test_a_preset_is_chosen_by_the_pictures_size(tmp_path: Path, pictures: Path) -> None:
    for size, name in ((8, "tiny"), (32, "tiny"), (33, "light")):
        one = request(pictures, tmp_path / "run", resolution=size, dry_run=True)
        config = override(one.config, {"preset": None, "train_batch_size": 1})
        assert make_plan(replace(one, config=config)).config.model.preset == name


def test_sigma_data_is_measured(tmp_path: Path, pictures: Path) -> None:
    plan = make_plan(request(pictures, tmp_path / "run"))
    x0, _ = plan.data.train.fixed()
    measured = KarrasPrecond(round(float(x0.double().std()), 3))
    assert plan.denoiser.prediction == measured
    flat = torch.zeros(6, 3, 8, 8)  # one colour only: not zero, which nothing could be divided by
    plan = make_plan(replace(request("x", tmp_path / "run"), data=flat))
    assert plan.denoiser.prediction == KarrasPrecond(0.01)


def test_building_a_plan_depends_on_the_seed_alone(tmp_path: Path, pictures: Path) -> None:
    nets = []
    for seed, own in ((1, 0), (1, 5), (2, 5)):
        torch.manual_seed(own)
        before = torch.get_rng_state()
        nets.append(make_plan(request(pictures, tmp_path / "run", seed=seed)).net.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert_same(nets[0], nets[1])
    assert any(not torch.equal(nets[1][name], nets[2][name]) for name in nets[0])


# --- refusals -----------------------------------------------------------------------------------


def poisoned_model(path: Path, model: Model) -> Path:
    """A model file whose weights are NaN; `save_model` would refuse to write it."""
    save_model(path, model)
    body = bytearray(path.read_bytes())
    body[-4:] = np.array([math.nan], dtype="<f4").tobytes()
    path.write_bytes(bytes(body))
    return path


REFUSED: dict[str, tuple[type[UndiffuseError], str, dict[str, Any]]] = {
    "unknown preset": (ConfigError, "no preset is called 'smal'", {"preset": "smal"}),
    "no data": (DataError, "No folder or .npz", {"data": "no/such/place"}),
    "background": (ConfigError, "background", {"background": "no colour"}),
    "crop without size": (ConfigError, "random_crop", {"random_crop": True}),
    "no checkpoint": (CheckpointError, "no checkpoint of step 3", {"resume": "3"}),
    "senseless resume": (ConfigError, "resume", {"resume": "the last"}),
    "no initial model": (CheckpointError, "No run or model file", {"init_from": Path("nowhere")}),
    "too big": (ResourceError, "GB", {"resolution": 8192, "preset": "light"}),
    "too big, unnamed": (ResourceError, "resolution 8192x8192", {"resolution": 8192}),
    "alpha is zero": (
        ConfigError,
        "prediction_type epsilon does not work with beta_schedule flow",
        {"prediction_type": "epsilon", "beta_schedule": "flow"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_run_writes_nothing(name: str, tmp_path: Path, pictures: Path) -> None:
    kind, words, settings = REFUSED[name]
    one = request(**{"data": pictures, "run": tmp_path / "run", **settings})
    with pytest.raises(kind, match=words):
        events(one)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_initial_model_is_refused(tmp_path: Path, pictures: Path, model: Model) -> None:
    path = poisoned_model(tmp_path / "bad.safetensors", model)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        events(request(pictures, tmp_path / "run", init_from=path))
    assert not (tmp_path / "run").exists()


def test_an_initial_model_of_other_channels_is_refused(tmp_path: Path, finished: Path) -> None:
    one = replace(
        request("x", tmp_path / "run", init_from=finished), data=torch.zeros(6, 1, 16, 16)
    )
    with pytest.raises(ConfigError, match=r"init_from has 3 channels, the pictures have\s+1"):
        events(one)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", ["file", "file/deeper/still"])
def test_a_place_under_a_file_is_refused(inside: str, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ResourceError, match="is not a folder"):
        events(request(pictures, tmp_path / inside))
    assert (tmp_path / "file").read_text() == "text"


def test_a_place_that_may_not_be_written_is_refused(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ResourceError, match=f"no permission in {tmp_path}"):
        events(request(pictures, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_refused_and_left_alone(finished: Path, pictures: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"holds step 12: .*--resume-from-checkpoint latest"):
        events(request(pictures, finished))
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_a_folder_with_a_model_only_is_refused(
    tmp_path: Path, pictures: Path, model: Model
) -> None:
    save_model(tmp_path / "model.safetensors", model)
    with pytest.raises(ConfigError, match="already holds a model"):
        events(request(pictures, tmp_path))


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path, pictures: Path) -> None:
    happened = events(request(pictures, tmp_path / "run", dry_run=True))
    (plan,) = [event.plan for event in happened if isinstance(event, runs.Planned)]
    assert plan.seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_two_trainers_in_one_folder_are_refused(tmp_path: Path, pictures: Path) -> None:
    first = runs.training_run(request(pictures, tmp_path / "run"))
    while not isinstance(next(first), runs.Progress):
        pass
    with pytest.raises(ConfigError, match="is being trained by PID"):
        events(request(pictures, tmp_path / "run"))
    assert isinstance([*first][-1], runs.Finished)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "--gradient-accumulation-steps 4"),
        (torch.OutOfMemoryError("CUDA out of memory"), "--gradient-accumulation-steps 4"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "train_batch_size 4"),
    ],
    ids=["python", "gpu", "cpu"],
)
def test_out_of_memory_becomes_advice(
    error: Exception,
    words: str,
    tmp_path: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("undiffuse.denoiser.Denoiser.loss", full)
    one = request(pictures, tmp_path / "run", gradient_accumulation_steps=2)
    with pytest.raises(ResourceError, match=words):
        events(one)


def test_other_errors_pass_as_they_are(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("undiffuse.denoiser.Denoiser.loss", broken)
    with pytest.raises(RuntimeError, match=r"^a defect$"):
        events(request(pictures, tmp_path / "run"))


# --- stopping and going on ----------------------------------------------------------------------


def test_a_stopped_run_goes_on_and_its_log_is_rewound(tmp_path: Path, pictures: Path) -> None:
    run, settings = tmp_path / "run", {"max_train_steps": 30, "checkpointing_steps": 5}
    happened = run_until(request(pictures, run, **settings), 12)
    assert isinstance(happened[-1], runs.Stopped)
    assert happened[-1].step == 12
    assert not (run / "model.safetensors").exists()
    with (run / "metrics.jsonl").open("a") as file:  # as a process killed at step 27 leaves it
        file.write('{"step": 20, "loss": 1.0}\n{"step": 2')
    happened = events(request(pictures, run, **settings, resume="latest"))
    assert updates(happened) == 18
    assert isinstance(happened[-1], runs.Finished)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [10, 20, 30]
    assert "1.0}" not in (run / "metrics.jsonl").read_text()


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path, pictures: Path) -> None:
    run = tmp_path / "run"
    events(request(pictures, run))
    happened = events(request(pictures, run, max_train_steps=6, resume="latest"))
    assert "from step 4 on: max_train_steps 4 -> 6" in notes(happened)
    assert [e.report.step for e in happened if isinstance(e, runs.Progress)] == [5, 6]
    assert undiffuse.load(run).trained["steps"] == 6
    assert runs.stored_config(run).train.max_train_steps == 6


def test_going_on_twice_from_one_step_loses_no_model(tmp_path: Path) -> None:
    folder = runs.RunFolder(tmp_path)
    for text in ("first", "second", "third"):
        folder.model.write_text(text)
        folder.set_aside(4)
    kept = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert kept == {
        "model-before-00000004.safetensors": "first",
        "model-before-00000004-2.safetensors": "second",
        "model-before-00000004-3.safetensors": "third",
    }


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path, pictures: Path) -> None:
    run = tmp_path / "run"
    events(request(pictures, run))
    before, file = weights(run), (run / "model.safetensors").read_bytes()
    happened = events(request(pictures, run, resume="latest"))
    assert isinstance(happened[-1], runs.Finished)
    assert updates(happened) == 0
    assert_same(before, weights(run))
    assert (run / "model.safetensors").read_bytes() == file


def test_an_earlier_step_can_be_gone_back_to(tmp_path: Path, pictures: Path) -> None:
    run = tmp_path / "run"
    events(request(pictures, run, checkpointing_steps=2))
    end = weights(run, 4)
    happened = events(request(pictures, run, checkpointing_steps=2, resume="2"))
    assert updates(happened) == 2
    assert_same(end, weights(run, 4))


def test_resuming_an_empty_folder_starts_at_the_beginning(tmp_path: Path, pictures: Path) -> None:
    happened = events(request(pictures, tmp_path / "run", resume="latest"))
    assert any("no checkpoint yet: starting at step 0" in text for text in notes(happened))
    assert updates(happened) == 4


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, pictures: Path) -> None:
    run = tmp_path / "run"
    run_until(request(pictures, run, checkpointing_steps=2), 3)
    (run / "checkpoints" / "step_00000003" / "ema.safetensors").write_bytes(b"")
    happened = events(request(pictures, run, checkpointing_steps=2, resume="latest"))
    assert any("step_00000003" in text for text in notes(happened))
    assert updates(happened) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: draw(data / "ant" / "new.png", 99), "1 added, 0 removed .*new.png"),
        (lambda data: (data / "ant" / "00.png").unlink(), "0 added, 1 removed .*00.png"),
        (
            lambda data: (data / "ant" / "00.png").rename(data / "ant" / "zz.png"),
            "1 added, 1 removed .*zz.png",
        ),
        (lambda data: draw(data / "ant" / "00.png", 99), "the same names, edited pictures"),
    ],
    ids=["added", "removed", "renamed", "edited"],
)
def test_changed_pictures_are_named_and_go_on_only_when_accepted(
    change: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    data, run = make_folder(tmp_path / "data", 9), tmp_path / "run"
    run_until(request(data, run), 2)
    before = weights(run)
    change(data)
    with pytest.raises(DataError, match=rf"changed since step 2: {words}.*--accept-data-change"):
        events(request(data, run, resume="latest"))
    assert_same(before, weights(run))
    happened = events(request(data, run, resume="latest", accept_data_change=True))
    assert any("changed since step 2" in text for text in notes(happened))
    assert isinstance(happened[-1], runs.Finished)


def test_accepted_pictures_do_not_change_what_the_network_means(tmp_path: Path) -> None:
    """sigma_data belongs to the weights: it stays the one they were trained with."""
    run, make = tmp_path / "run", partial(replace, request("x", tmp_path / "run"))
    run_until(make(data=torch.rand(12, 1, 8, 8)), 2)
    other = make(data=0.1 * torch.rand(12, 1, 8, 8), resume="latest", accept_data_change=True)
    before = Checkpoints(run / "checkpoints").model().denoiser.prediction
    events(other)
    assert undiffuse.load(run).denoiser.prediction == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preset", "tiny"),
        ("resolution", 8),
        ("channels", 1),
        ("class_conditional", False),
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "linear"),
        ("num_train_timesteps", 10),
    ],
)
def test_another_model_is_no_continuation(
    name: str, value: object, finished: Path, pictures: Path
) -> None:
    """By the settings, as the command line does, and by the request itself."""
    stored = runs.stored_config(finished)
    with pytest.raises(CheckpointError, match=f"{name} is .*a changed model is a new run"):
        runs.resumed_config(finished, stored, {name: value})
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    config = override(stored, {name: value})
    with pytest.raises(CheckpointError, match=name):
        events(runs.Request(config, finished, resume="latest", accept_data_change=True))
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_what_may_change_is_said(finished: Path) -> None:
    stored = runs.stored_config(finished)
    config = runs.resumed_config(finished, stored, {"learning_rate": "1e-4", "seed": 3})
    plan = make_plan(runs.Request(config, finished, resume="latest"))
    assert "from step 12 on: learning_rate 0.001 -> 0.0001" in plan.notes
    assert "from step 12 on: seed 0 -> 3" in plan.notes


def test_a_changed_machine_is_said(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    plan = make_plan(runs.Request(runs.stored_config(finished), finished, resume="latest"))
    assert any("threads" in note and "not bit for bit" in note for note in plan.notes)


def test_where_single_pictures_do_not_fit_the_fewest_layers_are_computed_again(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(pictures, tmp_path / "run", train_batch_size=1)
    roomy = make_plan(asked)
    size, spec = roomy.data.train.size, roomy.spec
    layers = cost.recomputable(spec, *size)
    whole = cost.training_bytes(spec, *size, 1)
    least = cost.training_bytes(spec, *size, 1, layers)
    assert not roomy.recompute
    monkeypatch.setattr("undiffuse.runtime.memory", lambda device: (whole + least) / 2 / 0.8)
    tight = make_plan(asked)
    assert 0 < len(tight.recompute) < len(layers)
    assert any("again" in note for note in tight.notes)
    monkeypatch.setattr("undiffuse.runtime.memory", lambda device: least / 2)
    with pytest.raises(ResourceError, match="GB"):
        make_plan(asked)
    monkeypatch.undo()
    every = make_plan(
        request(pictures, tmp_path / "run", train_batch_size=1, gradient_checkpointing=True)
    )
    assert list(every.recompute) == layers


def test_the_precision_that_was_timed_is_kept(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    faster = lambda net, shape, label, path, again: 9.0 if path == "plain" else 1.0  # noqa: E731
    monkeypatch.setattr("undiffuse.runtime.step_seconds", faster)
    run_until(request(pictures, run, mixed_precision="auto"), 1)
    slower = lambda net, shape, label, path, again: 1.0 if path == "plain" else 9.0  # noqa: E731
    monkeypatch.setattr("undiffuse.runtime.step_seconds", slower)
    plan = make_plan(request(pictures, run, mixed_precision="auto", resume="latest"))
    assert plan.runtime.bf16
    assert plan.runtime.reason == "as in the checkpoint"


def test_a_full_disk_costs_one_checkpoint_and_not_the_run(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: noted, and tried again at the next interval."""
    save = Checkpoints.save

    def full(self: Checkpoints, snapshot: Any) -> Path:
        if snapshot.step == 2:
            raise ResourceError("Disk full: needs 1 GB, 3 MB free")
        return save(self, snapshot)

    monkeypatch.setattr(Checkpoints, "save", full)
    happened = events(request(pictures, tmp_path / "run", checkpointing_steps=1))
    saved = [event.step for event in happened if isinstance(event, runs.Saved)]
    assert saved == [1, 3, 4]
    assert "checkpoint of step 2 not written: Disk full: needs 1 GB, 3 MB free" in notes(happened)
    assert "Disk full" in (tmp_path / "run" / "log.txt").read_text()


def test_a_disk_that_stays_full_ends_the_run_with_an_error(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Checkpoints, snapshot: Any) -> Path:
        raise ResourceError("Disk full")

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(ResourceError, match="Disk full"):
        events(request(pictures, tmp_path / "run", checkpointing_steps=1))


def test_torn_lines_are_left_out_of_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnull\n[3]\n{"step": "x"}\n\xff\xfe\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    rewind_metrics(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    assert read_metrics(tmp_path / "none") == []


# --- starting from another model ----------------------------------------------------------------


def test_init_from_starts_with_its_averaged_weights(
    tmp_path: Path, finished: Path, pictures: Path
) -> None:
    one = request(pictures, tmp_path / "run", init_from=finished)
    assert_same(make_plan(one).net.state_dict(), undiffuse.load(finished).net.state_dict())


def test_init_from_another_prediction_is_said(
    tmp_path: Path, finished: Path, pictures: Path
) -> None:
    same = make_plan(request(pictures, tmp_path / "run", init_from=finished))
    assert not any("init_from" in note for note in same.notes)
    settings = {"prediction_type": "v_prediction", "beta_schedule": "cosine"}
    other = make_plan(request(pictures, tmp_path / "run", init_from=finished, **settings))
    words = "init_from predicts KarrasPrecond on Karras, this run Velocity on Cosine"
    assert any(words in note for note in other.notes)


def test_init_from_keeps_its_schedule_and_prediction_unless_others_are_named(
    tmp_path: Path, finished: Path, pictures: Path
) -> None:
    model = undiffuse.load(finished)
    denoiser = undiffuse.Denoiser(model.net, Sigmoid(50), Velocity(50))
    undiffuse.checkpoint.save_model(tmp_path / "m", replace(model, denoiser=denoiser))
    plan = make_plan(request(pictures, tmp_path / "run", init_from=tmp_path / "m"))
    assert (plan.denoiser.schedule, plan.denoiser.prediction) == (Sigmoid(50), Velocity(50))
    assert plan.recipe.levels == OnGrid(50)
    named = {"beta_schedule": "linear", "num_train_timesteps": 30}
    other = make_plan(request(pictures, tmp_path / "run", init_from=tmp_path / "m", **named))
    assert other.denoiser.schedule == LinearBetas(30)
    assert other.denoiser.prediction == Epsilon(30)


def test_a_resumed_run_keeps_the_meaning_it_took_from_init_from(
    tmp_path: Path, finished: Path, pictures: Path
) -> None:
    model = undiffuse.load(finished)
    denoiser = undiffuse.Denoiser(model.net, Sigmoid(50), Velocity(50))
    undiffuse.checkpoint.save_model(tmp_path / "m", replace(model, denoiser=denoiser))
    events(request(pictures, tmp_path / "run", init_from=tmp_path / "m"))
    resumed = make_plan(request(pictures, tmp_path / "run", resume="latest"))
    assert resumed.denoiser.schedule == Sigmoid(50)
    assert resumed.recipe.levels == OnGrid(50)


def test_dropout_is_the_run_s_own_and_not_the_initial_model_s(
    tmp_path: Path, finished: Path, pictures: Path
) -> None:
    one = request(pictures, tmp_path / "run", init_from=finished, dropout=0.25)
    plan = make_plan(one)
    assert plan.spec.style.dropout == 0.25
    assert_same(plan.net.state_dict(), undiffuse.load(finished).net.state_dict())


def test_init_from_with_other_classes_starts_their_table_afresh(
    tmp_path: Path, finished: Path
) -> None:
    one = request("x", tmp_path / "run", init_from=finished)
    plan = make_plan(replace(one, data=torch.rand(6, 3, 16, 16)))
    assert plan.spec.classes == 0
    stored = undiffuse.load(finished).net.state_dict()
    assert_same(
        plan.net.state_dict(), {k: v for k, v in stored.items() if "embedding.labels" not in k}
    )


def test_augmentation_is_told_to_the_network_and_to_nobody_else(
    tmp_path: Path, finished: Path, pictures: Path
) -> None:
    plain = make_plan(request(pictures, tmp_path / "run"))
    plan = make_plan(request(pictures, tmp_path / "run", augment=0.25))
    assert plan.recipe.augment == Augment(0.25)
    assert plan.spec == plain.spec.with_augment(9)
    weights = plan.net.state_dict()
    assert not weights.pop("embedding.augment").any()
    assert_same(weights, plain.net.state_dict())
    started = make_plan(request(pictures, tmp_path / "run", augment=0.25, init_from=finished))
    weights = started.net.state_dict()
    assert not weights.pop("embedding.augment").any()
    assert_same(weights, undiffuse.load(finished).net.state_dict())


def test_augmentation_may_change_within_a_run_but_not_begin_there(
    tmp_path: Path, finished: Path, pictures: Path
) -> None:
    run = tmp_path / "run"
    run_until(request(pictures, run, augment=0.5), 2)
    less = make_plan(request(pictures, run, augment=0.0, resume="latest"))
    assert less.spec.augment == 9
    assert less.recipe.augment is None
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    with pytest.raises(CheckpointError, match=r"augment is above 0 here.* not told of it"):
        events(request(pictures, again, augment=0.5, resume="latest"))


def test_initial_weights_that_were_told_other_numbers_are_refused(
    tmp_path: Path, finished: Path, pictures: Path
) -> None:
    model = undiffuse.load(finished)
    net = UNet(model.spec.with_augment(4))
    net.load_state_dict(model.net.state_dict(), strict=False)
    other = replace(model, denoiser=replace(model.denoiser, net=net))
    undiffuse.checkpoint.save_model(tmp_path / "m", other)
    kept = make_plan(request(pictures, tmp_path / "run", init_from=tmp_path / "m"))
    assert kept.spec.augment == 4
    with pytest.raises(ConfigError, match="init_from is told 4 numbers of each transformation"):
        events(request(pictures, tmp_path / "run", augment=0.1, init_from=tmp_path / "m"))


def test_a_run_that_started_from_another_network_can_be_resumed(
    tmp_path: Path, finished: Path, pictures: Path
) -> None:
    """Its network is the initial model's, not the one of any preset in its settings."""
    run = tmp_path / "run"
    one = request(pictures, run, init_from=finished)
    one = replace(one, config=override(one.config, {"preset": None}))
    run_until(one, 2)
    spec = Checkpoints(run / "checkpoints").model().spec
    assert spec == undiffuse.load(finished).spec
    happened = events(runs.Request(runs.stored_config(run), run, resume="latest"))
    assert isinstance(happened[-1], runs.Finished)
    assert undiffuse.load(run).spec == spec


# --- loading ------------------------------------------------------------------------------------


def test_a_run_a_file_and_a_checkpoint_load(finished: Path) -> None:
    from_run = undiffuse.load(finished).net.state_dict()
    assert_same(from_run, undiffuse.load(str(finished / "model.safetensors")).net.state_dict())
    assert_same(from_run, undiffuse.load(finished, checkpoint=12).net.state_dict())
    raw = undiffuse.load(finished, weights="raw").net.state_dict()
    assert_same(raw, Checkpoints(finished / "checkpoints").read(12)[0].tensors["model"])
    assert not undiffuse.load(finished, Weights.EMA).net.training


def test_an_unfinished_run_loads_its_newest_checkpoint(tmp_path: Path, pictures: Path) -> None:
    run_until(request(pictures, tmp_path / "run"), 3)
    assert undiffuse.load(tmp_path / "run").trained["steps"] == 3


@pytest.mark.parametrize(
    ("place", "options", "kind", "words"),
    [
        ("rum", {}, CheckpointError, r"No run or model file at .*rum\. Did you mean .*run\?"),
        ("no/such", {}, CheckpointError, r"No run or model file at .*such\.$"),
        ("run", {"weights": "best"}, ConfigError, "weights must be one of ema, raw; got 'best'"),
        ("run", {"checkpoint": 7}, CheckpointError, "step_00000007 does not exist"),
        ("run/model.safetensors", {"weights": "raw"}, ConfigError, "is a file"),
        ("run/model.safetensors", {"checkpoint": 12}, ConfigError, "is a file"),
        ("run/config.json", {}, CheckpointError, "config.json"),
        ("run/samples", {}, CheckpointError, "neither"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    place: str, options: dict[str, Any], kind: type[Exception], words: str, finished: Path
) -> None:
    with pytest.raises(kind, match=words):
        undiffuse.load(finished.parent / place, **options)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": -1}', '{"unknown": 1}', "\0"])
def test_a_damaged_config_is_a_checkpoint_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        runs.stored_config(tmp_path)


def test_presets_are_listed_smallest_first() -> None:
    names = undiffuse.list_models()
    assert {"tiny", "light", "ddpm"} <= set(names)
    assert names.index("tiny") < names.index("light") < names.index("ddpm")


# --- generating ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_picture_n_depends_on_seed_and_n_alone(sampler: str, model: Model) -> None:
    """Whatever the count and the batch size; ddpm draws fresh noise at every step."""
    make = partial(undiffuse.generate, model, sampler=sampler, num_inference_steps=4)
    seven = make(7, seed=3)
    assert torch.allclose(make(7, seed=3, batch_size=3), seven, rtol=0, atol=1e-5)
    assert torch.allclose(make(4, seed=3), seven[:4], rtol=0, atol=1e-5)
    assert torch.allclose(make(7, seed=3, batch_size=1), seven, rtol=0, atol=1e-5)
    other = make(7, seed=4)
    assert float((other - seven).flatten(1).abs().amax(1).min()) > 0.05
    pairs = [(a, b) for a in range(7) for b in range(a)]
    assert all(float((seven[a] - seven[b]).abs().max()) > 0.05 for a, b in pairs)


def test_generate_leaves_torch_s_generator_alone(model: Model) -> None:
    before = torch.get_rng_state()
    first = undiffuse.generate(model, 2, sampler="ddpm", num_inference_steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(first, undiffuse.generate(model, 2, sampler="ddpm", num_inference_steps=3))


def test_labels_are_taken_in_turn_or_as_given(model: Model) -> None:
    make = partial(undiffuse.generate, model, num_inference_steps=2)
    in_turn = make(5)
    assert torch.equal(make(5, label=[0, 1, 2, 0, 1]), in_turn)
    assert torch.equal(make(5, label=torch.tensor([0, 1, 2, 0, 1])), in_turn)
    other = make(5, label=[0, 1, 2, 0, 2])
    assert torch.equal(other[:4], in_turn[:4])
    assert not torch.equal(other[4], in_turn[4])
    assert not torch.equal(make(5, label=[3] * 5), in_turn)  # 3 is "no class"
    parsed = runs.parse_labels(model, ["bee", "2"], 5)
    assert parsed is not None
    assert parsed.tolist() == [1, 2, 1, 2, 1]
    assert runs.parse_labels(model, [], 5) is None


def test_guidance_moves_away_from_no_class(model: Model) -> None:
    make = partial(undiffuse.generate, model, 3, num_inference_steps=1, label=[1] * 3)
    plain, none = make(), make(label=[3] * 3)
    assert torch.allclose(make(guidance_scale=0.0), none, atol=1e-5)
    strong = make(guidance_scale=1.5)
    inside = (strong.abs() < 1) & (plain.abs() < 1) & (none.abs() < 1)  # not clipped
    assert inside.any()
    wanted = none + 1.5 * (plain - none)
    assert torch.allclose(strong[inside], wanted[inside], atol=1e-4)


def test_a_weak_model_guides_too(model: Model, finished: Path) -> None:
    weak = undiffuse.load(finished)
    plain = undiffuse.generate(model, 2, num_inference_steps=2)
    same = undiffuse.generate(model, 2, num_inference_steps=2, weak=model, guidance_scale=2.0)
    guided = undiffuse.generate(model, 2, num_inference_steps=2, weak=weak, guidance_scale=2.0)
    assert torch.allclose(same, plain, atol=1e-4)
    assert not torch.allclose(guided, plain, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count and batch_size must be at least 1; got 0"),
        ({"batch_size": 0}, "got 16, 0"),
        ({"sampler": "euler"}, "sampler 'euler' is not one of: "),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1; got 0"),
        ({"count": 2, "label": [0, 4]}, r"2 numbers in 0 \.\.\. 3; got"),
        ({"count": 2, "label": [-1, 0]}, "from -1 to 0"),
        ({"count": 2, "label": [0]}, r"got \[1\] numbers"),
        ({"count": 2, "label": []}, "label must be 2 numbers"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    options: dict[str, Any], words: str, model: Model
) -> None:
    with pytest.raises(ConfigError, match=words):
        undiffuse.generate(model, **options)


@pytest.mark.parametrize("word", ["dog", "3", "-1", "1.5", ""])
def test_a_word_that_is_no_class_is_refused(word: str, model: Model) -> None:
    with pytest.raises(ConfigError, match=r"class_label .* is not one of: ant, bee, cat"):
        runs.parse_labels(model, [word], 2)


def test_a_model_without_classes_takes_no_labels() -> None:
    net = UNet(recipes.ddpm_family(8, (1, 2), 1, (1,)))
    plain = Model(
        undiffuse.Denoiser(net, Cosine(), Velocity()), undiffuse.checkpoint.Pictures(8, 8, 3)
    )
    assert runs.labels_in_turn(plain, 3) is None
    with pytest.raises(ConfigError, match="this model has no classes"):
        undiffuse.generate(plain, 1, label=[0])
    with pytest.raises(ConfigError, match="trained without classes"):
        runs.parse_labels(plain, ["cat"], 1)
    with pytest.raises(ConfigError, match="guidance"):
        undiffuse.generate(plain, 1, guidance_scale=2.0)


def test_a_film_shows_every_step_and_the_end(model: Model) -> None:
    frames = runs.film(model, 2, frames=5, seed=4)
    assert len(frames) == 6
    final = undiffuse.generate(model, 2, num_inference_steps=5, seed=4)
    assert torch.equal(frames[-1], final)
    assert all(frame.shape == (2, 3, 16, 16) for frame in frames)


def test_generated_pictures_can_be_saved(model: Model, tmp_path: Path) -> None:
    images.save_grid(undiffuse.generate(model, 3, num_inference_steps=2), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] >= 48


# --- evaluate -----------------------------------------------------------------------------------

HASTY = runs.EvaluateOptions(
    num_samples=6, draws=1, sampling=SampleConfig(num_inference_steps=1), device=Device.CPU
)


def evaluated(run: Path, **options: Any) -> dict[str, Any]:
    return runs.evaluate_run(run, replace(HASTY, **options)).body


def sides(run: Path) -> tuple[int, int]:
    """How many pictures the run trained on and held out."""
    train, held_out = (np.load(run / "cache" / f"{name}.npy") for name in ("train", "held_out"))
    return len(train), len(held_out)


def copy_of(finished: Path, to: Path, **settings: object) -> Path:
    """Another run with the same model and copy of the pictures, and these settings."""
    to.mkdir()
    shutil.copy(finished / "model.safetensors", to)
    shutil.copytree(finished / "cache", to / "cache")
    config = json.loads((finished / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | settings))
    return to


def array_run(run: Path, **settings: Any) -> tuple[Path, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), dtype=np.uint8)
    undiffuse.fit(pixels, output_dir=run, **TWO_STEPS, **settings)
    return run, pixels


def test_evaluate_says_nothing_where_nothing_is_strange(finished: Path, tmp_path: Path) -> None:
    body = evaluated(copy_of(finished, tmp_path / "run"))
    assert body["warnings"] == []
    train, _ = sides(finished)
    assert (body["neighbours"]["train"], body["neighbours"]["train_searched"]) == (train, train)
    assert body["loss"]["judged"] == "without label"
    assert body["levels"][0]["held_out_labelled"] is not None
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == body


def test_evaluate_searches_pictures_that_it_does_not_measure_with(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The neighbours are those of the whole set, and the grid shows them."""
    run = copy_of(finished, tmp_path / "run")
    monkeypatch.setattr(_real, "MOST_VALUES", 5 * 3 * 16 * 16)
    monkeypatch.setattr(_real, "CHUNK_VALUES", 4 * 3 * 16 * 16)
    outcome = runs.evaluate_run(run, HASTY)
    assert outcome.body["neighbours"]["train"] == 5
    assert outcome.body["neighbours"]["train_searched"] == sides(finished)[0] > 5
    everything = images.load(runs.stored_config(run).data.data).train.fixed()[0]
    apart = (outcome.samples[:, None] - everything).square().mean((2, 3, 4)).sqrt()
    pairs = outcome.body["neighbours"]["closest"]
    assert len(pairs) == 6
    for place, pair in enumerate(pairs):
        assert pair["train"] == apart[pair["sample"]].argmin()
        assert pair["distance"] == pytest.approx(float(apart[pair["sample"]].min()), rel=1e-4)
        assert outcome.neighbours is not None
        assert torch.equal(outcome.neighbours[2 * place], outcome.samples[pair["sample"]])
        assert torch.equal(outcome.neighbours[2 * place + 1], everything[pair["train"]])


@pytest.mark.parametrize("chunk", [1, 40 * 60 * 2, 10**9])
def test_every_crop_of_a_photograph_is_a_picture(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_real, "CHUNK_VALUES", chunk)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 40, 60), dtype=np.uint8)
    whole = images.Dataset(pixels, np.arange(5), tuple("abcde"), tuple("abcde"), (16, 16), False)
    crops = _real.Crops.of(whole)
    assert len(crops) == 5 * 2 * 3
    chunks = torch.cat(list(crops.chunks()))
    # `fixed` has all pictures' first crops before the second ones
    assert torch.equal(chunks, whole.fixed()[0].unflatten(0, (6, 5)).transpose(0, 1).flatten(0, 1))
    places = [29, 0, 7, 7, 6]
    some = crops.at(places)
    assert torch.equal(some.x0, chunks[places])
    assert some.label is not None
    assert some.label.tolist() == [4, 0, 1, 1, 1]
    assert torch.equal(crops.some().x0, chunks)
    monkeypatch.setattr(_real, "MOST_PICTURES", 10)
    assert torch.equal(crops.some().x0, chunks[::3])


def test_evaluate_notices_that_the_pictures_changed(tmp_path: Path) -> None:
    folder, run = make_folder(tmp_path / "pictures"), tmp_path / "run"
    undiffuse.fit(folder, output_dir=run, **TWO_STEPS)
    assert evaluated(run)["warnings"] == []
    draw(folder / "ant" / "99.png", 99)
    (warning,) = evaluated(run)["warnings"]
    assert warning.startswith("the pictures changed since training: held-out ones may have been")
    assert evaluated(run, data=str(folder / ".." / "pictures"))["warnings"] == [warning]
    assert evaluated(run / "model.safetensors", data=str(folder))["warnings"] == [warning]
    assert evaluated(run)["loss"]["memorised"] is not None


def test_evaluate_notices_pictures_of_another_place(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    other = make_folder(tmp_path / "other", 27)
    body = evaluated(run, data=str(other))
    (warning,) = body["warnings"]
    assert warning.startswith("not the pictures this model was trained on: 'train' and")
    assert body["loss"]["memorised"] is None
    assert "training error" not in body["reason"]
    assert body["levels"][0]["held_out_labelled"] is not None  # the classes are the same


def test_evaluate_reads_the_same_place_as_training_did(tmp_path: Path, pictures: Path) -> None:
    """The held-out pictures stay the same ones."""
    run = tmp_path / "run"
    undiffuse.fit(pictures, output_dir=run, **TWO_STEPS, val_fraction=0.5, random_flip=True)
    body = evaluated(run, data=str(pictures))
    assert body["warnings"] == []
    assert (body["neighbours"]["train"], body["neighbours"]["held_out"]) == sides(run)


def test_evaluate_does_not_take_other_classes_for_its_own(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    other = make_folder(tmp_path / "other", 27)
    (other / "cat").rename(other / "dog")
    strange, classes = evaluated(run, data=str(other))["warnings"]
    assert "not the pictures" in strange
    assert "other classes (ant, bee, dog) than the model (ant, bee, cat)" in classes
    (other / "dog").rename(other / "cat")
    for number in range(6):
        draw(other / "dog" / f"{number}.png", number)  # one class more: its label is no label
    body = evaluated(run, data=str(other))
    assert "(ant, bee, cat, dog) than the model (ant, bee, cat)" in body["warnings"][1]
    assert body["levels"][0]["held_out_labelled"] is None
    assert "no classes" in body["figures"][0]["warning"]


def test_evaluate_uses_the_copy_of_pictures_given_in_python(tmp_path: Path) -> None:
    run, pixels = array_run(tmp_path / "run", val_fraction=0.2)
    body = evaluated(run)
    assert body["warnings"] == []
    assert (body["neighbours"]["train"], body["neighbours"]["held_out"]) == sides(run)
    np.savez(tmp_path / "same.npz", images=np.moveaxis(pixels, 1, -1))
    np.savez(tmp_path / "other.npz", images=np.moveaxis(255 - pixels, 1, -1))
    again = evaluated(run, data=str(tmp_path / "same.npz"))
    assert again["figures"] == body["figures"]
    assert again["warnings"] == []
    (warning,) = evaluated(run, data=str(tmp_path / "other.npz"))["warnings"]
    assert "not the pictures" in warning
    shutil.rmtree(run / "cache")
    with pytest.raises(CheckpointError, match="was trained on pictures given in Python"):
        evaluated(run)


def test_evaluate_uses_the_copy_of_pictures_that_are_gone(finished: Path, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    run = copy_of(finished, tmp_path / "run", data=gone)
    body = evaluated(run)
    assert body["warnings"] == [
        f"{gone} is not there any more: its copy in {run / 'cache'} is used"
    ]
    assert body["neighbours"]["train"] == sides(run)[0]
    index = run / "cache" / "cache.json"
    index.write_text(index.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(DataError, match="--data") as refused:  # a copy of other pictures
        evaluated(run)
    assert gone in str(refused.value)

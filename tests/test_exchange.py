"""Networks of other projects through files: in, drawn with, and out again."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from test_interop_edm import Layout
from undiffuse import interop, recipes, runs
from undiffuse.checkpoint import Model, Pictures, load_model, save_model
from undiffuse.cli import _exchange as cli_exchange
from undiffuse.cli import main
from undiffuse.config import ExportFormat, ImportConfig
from undiffuse.denoiser import Denoiser, Epsilon, KarrasPrecond, Prediction, Velocity
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop import to_lucidrains, to_openai
from undiffuse.noise import Cosine, Karras, LinearBetas, Schedule, Sigmoid
from undiffuse.runs import _exchange
from undiffuse.spec import Conv, Down, Out, Res, UNetSpec, Up
from undiffuse.unet import UNet

Capture = pytest.CaptureFixture[str]
OPENAI = {
    "num_heads": 4,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
    "num_train_timesteps": 1000,
    "rescale_timesteps": False,
    "predict_xstart": False,
    "resolution": 8,
}
OPENAI_LINE = (
    "--num-heads 4 --no-use-new-attention-order --noise-schedule linear --num-train-timesteps 1000"
    " --no-rescale-timesteps --no-predict-xstart --resolution 8"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def filled(tensors: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Other numbers in the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in tensors.items()
    }


def model(
    spec: UNetSpec,
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
    size: tuple[int, int] = (8, 8),
) -> Model:
    """With a weight in every place."""
    net = UNet(spec).eval()
    net.load_state_dict(filled(net.state_dict()))
    denoiser = Denoiser(net, schedule or LinearBetas(), prediction or Epsilon())
    return Model(denoiser, Pictures(*size, spec.in_channels))


def ddpm() -> UNetSpec:
    """That of diffusers to the last bit."""
    spec = recipes.ddpm_family(32, (1, 2), 1, (1,))
    embedding = replace(spec.style.embedding, divide_last=True)
    return replace(spec, style=replace(spec.style, zero_init=False, embedding=embedding))


def improved() -> UNetSpec:
    return recipes.improved_family(32, (1, 2), 1, (1,))


def lucidrains() -> UNetSpec:
    return recipes.lucidrains_family(8, (1, 2))


def same(one: Model, other: Model) -> bool:
    ours, theirs = one.net.state_dict(), other.net.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def ask(capsys: Capture, line: str, code: int = 0) -> dict[str, Any]:
    """The one object that a command answers with."""
    capsys.readouterr()
    assert main([*line.split(), "--json"]) == code
    (only,) = capsys.readouterr().out.splitlines()
    return json.loads(only)


# --- diffusers ----------------------------------------------------------------------------------


def diffusers_net(**changes: Any) -> diffusers.UNet2DModel:
    options = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        **changes,
    }
    net = diffusers.UNet2DModel(**options).eval()
    net.load_state_dict(filled(net.state_dict()))
    return net


def test_a_pipeline_of_diffusers_comes_in_and_draws(capsys: Capture) -> None:
    """Their own program writes; the answer of the network is theirs; `sample` works at once."""
    net = diffusers_net()
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(net, scheduler).save_pretrained("theirs")
    body = ask(capsys, "import theirs -o mine.safetensors")
    assert body["schema"] == "undiffuse.import/1"
    assert (body["origin"], body["size"]) == ("diffusers UNet2DModel", [8, 8])
    file = Path("theirs/unet/diffusion_pytorch_model.safetensors")
    assert body["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    back = load_model("mine.safetensors")
    assert (back.denoiser.schedule, back.denoiser.prediction) == (Cosine(), Epsilon())
    assert back.trained["source"] == file.as_posix()
    x, timestep = torch.randn(2, 3, 8, 8), torch.tensor([3, 950])
    with torch.no_grad():
        theirs = net(x, timestep).sample
        torch.testing.assert_close(back.net(x, timestep), theirs, rtol=1e-5, atol=1e-6)
    drawn = ask(capsys, "sample mine.safetensors -n 2 --num-inference-steps 2 --format png")
    assert len(drawn["files"]) == 2
    assert all(Path(name).stat().st_size > 60 for name in drawn["files"])


def test_a_model_goes_to_diffusers_and_comes_back(capsys: Capture) -> None:
    ours = model(ddpm(), Cosine(500), Velocity(500))
    save_model("mine.safetensors", ours)
    body = ask(capsys, "export mine.safetensors -o out")
    assert body["files"] == ["out"]
    assert 0.0 <= body["difference"] < 1e-5
    pipeline = diffusers.DDPMPipeline.from_pretrained("out", low_cpu_mem_usage=False)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.num_train_timesteps == 500
    back = runs.import_model("out").model
    assert same(back, ours)
    assert back.spec == ours.spec
    assert back.denoiser.schedule == ours.denoiser.schedule
    assert back.denoiser.prediction == ours.denoiser.prediction
    assert back.pictures == ours.pictures


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: model(ddpm().with_classes(2, True)), "passes no labels"),
        (lambda: model(ddpm(), Karras(), KarrasPrecond()), "does not scale its input as EDMEuler"),
        (lambda: model(ddpm(), size=(7, 8)), "needs a sample_size"),
    ],
)
def test_what_ddpm_pipeline_cannot_run_goes_without_it(made: Callable[[], Model], why: str) -> None:
    ours = made()
    exported = runs.export_model(ours, "out")
    assert any(why in note for note in exported.notes)
    assert exported.difference is not None
    assert exported.difference < 1e-5
    assert sorted(one.name for one in Path("out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "scheduler_config.json",
    ]
    assert same(runs.import_model("out", resolution=8).model, ours)
    with pytest.raises(ConfigError, match="pipeline DDPMPipeline: the network has"):
        runs.export_model(ours, "other", pipeline=True)
    assert not Path("other").exists()


def test_without_pipeline_if_that_is_wanted() -> None:
    exported = runs.export_model(model(ddpm()), "out", pipeline=False, check=False)
    assert exported.difference is None
    assert Path("out/config.json").is_file()


def test_a_folder_that_differs_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An injected fault: diffusers is asked with another network's weights."""
    other = model(ddpm())
    with torch.no_grad():
        next(other.net.parameters()).add_(0.01)
    monkeypatch.setattr(_exchange.interop, "plain", lambda net: other.net)
    with pytest.raises(CheckpointError, match="out is not written: its outputs differ"):
        runs.export_model(model(ddpm()), "out")
    assert list(Path().iterdir()) == []


def test_without_diffusers_the_comparison_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exchange, "find_spec", lambda name: None)
    exported = runs.export_model(model(ddpm()), "out")
    assert exported.difference is None
    assert any('pip install "undiffuse[diffusers]"' in note for note in exported.notes)


def test_averaged_weights_are_not_silently_taken_for_raw_ones() -> None:
    diffusers_net().save_pretrained("run/unet")
    diffusers_net().save_pretrained("run/unet_ema")
    assert "averaged" in runs.import_model("run").notes[0]
    with pytest.raises(ConfigError, match="weights raw: run holds averaged weights"):
        runs.import_model("run", weights="raw")


# --- OpenAI -------------------------------------------------------------------------------------


def test_an_openai_checkpoint_comes_in_and_goes_out(capsys: Capture) -> None:
    """A torch file, read by a process of its own."""
    ours = model(improved())
    torch.save(to_openai(ours.spec, ours.net.state_dict()), "ema_0.9999_1.pt")
    body = ask(capsys, f"import ema_0.9999_1.pt {OPENAI_LINE}")
    assert body["file"] == "runs/ema_0-9999_1/model.safetensors"
    assert body["origin"] == "OpenAI UNetModel"
    assert any("does not say whether they are averaged" in note for note in body["warnings"])
    back = runs.load("runs/ema_0-9999_1", device="cpu")
    assert same(back, ours)
    assert back.denoiser.schedule == LinearBetas()
    body = ask(capsys, "export runs/ema_0-9999_1 --format openai")
    assert body["files"] == ["runs/ema_0-9999_1/openai.safetensors"]
    again = runs.import_model(body["files"][0], **OPENAI)
    assert same(again.model, ours)


def test_a_learned_variance_is_left_out_and_said() -> None:
    ours = model(improved())
    both = filled(to_openai(ours.spec, ours.net.state_dict()))
    for name in ("out.2.weight", "out.2.bias"):
        both[name] = torch.cat([both[name], torch.ones_like(both[name])])
    save_file(both, "six.safetensors")
    imported = runs.import_model("six.safetensors", **OPENAI)
    assert imported.model.spec.out_channels == 3
    assert any("variance" in note for note in imported.notes)
    last = list(imported.model.net.state_dict().values())[-2]
    assert torch.equal(last, both["out.2.weight"][:3])


def test_what_openai_files_do_not_say_must_be_said(capsys: Capture) -> None:
    ours = model(improved())
    save_file(to_openai(ours.spec, ours.net.state_dict()), "net.safetensors")
    error = ask(capsys, "import net.safetensors --resolution 8", code=2)
    assert "the weights do not tell num_heads or num_head_channels" in error["message"]
    without = {name: value for name, value in OPENAI.items() if name != "resolution"}
    with pytest.raises(ConfigError, match="resolution is missing"):
        runs.import_model("net.safetensors", **without)
    like = runs.import_model("net.safetensors", like="iddpm-cifar-10", num_heads=4)
    assert like.model.pictures.height == 32
    assert like.model.denoiser.schedule == Cosine(4000)


# --- denoising-diffusion-pytorch and EDM --------------------------------------------------------


def test_a_checkpoint_of_their_trainer_comes_in_and_goes_out(capsys: Capture) -> None:
    """Averaged weights by default, raw ones when asked."""
    ours = model(lucidrains(), Sigmoid(), Velocity())
    averaged = to_lucidrains(ours.spec, ours.net.state_dict())
    raw = {name: tensor + 1 for name, tensor in averaged.items()}
    ema = {f"ema_model.model.{name}": tensor for name, tensor in averaged.items()}
    wrapped = {f"model.{name}": tensor for name, tensor in raw.items()}
    torch.save({"step": 7, "model": wrapped, "ema": ema}, "model-1.pt")
    body = ask(capsys, "import model-1.pt --resolution 16x8")
    assert body["size"] == [16, 8]
    back = load_model(body["file"])
    assert same(back, ours)
    assert (back.denoiser.schedule, back.denoiser.prediction) == (Sigmoid(), Velocity())
    other = runs.import_model("model-1.pt", weights="raw", resolution=8).model
    theirs = next(iter(other.net.state_dict().values()))
    torch.testing.assert_close(theirs, next(iter(ours.net.state_dict().values())) + 1)
    line = f"export {body['file']} --format denoising-diffusion-pytorch -o out.safetensors"
    assert ask(capsys, line)["files"] == ["out.safetensors"]
    written = load_file("out.safetensors")
    assert all(torch.equal(written[name], averaged[name]) for name in averaged)
    drawn = ask(capsys, f"sample {body['file']} -n 2 --num-inference-steps 2")
    assert Path(drawn["files"][0]).parent == Path("runs/model-1/samples")


def test_edm_comes_in_with_its_licence(capsys: Capture) -> None:
    layout = Layout(True, 8, 16, (1, 2), 1, (4,), classes=2)
    tensors = {name: torch.empty(shape) for name, shape in layout.shapes().items()}
    save_file(filled(tensors), "edm.safetensors")
    body = ask(capsys, "import edm.safetensors")
    assert body["origin"] == "EDM SongUNet"
    assert (body["size"], body["classes"]) == ([8, 8], 2)
    assert any("CC BY-NC-SA" in note for note in body["warnings"])
    assert main(["import", "edm.safetensors", "-o", "again.safetensors"]) == 0
    assert "CC BY-NC-SA" in capsys.readouterr().err
    picture = runs.generate(runs.load("again.safetensors"), 2, num_inference_steps=2)
    assert picture.shape == (2, 3, 8, 8)


# --- graphs -------------------------------------------------------------------------------------


def small() -> UNetSpec:
    """That hears the timestep; halved once."""
    program = (Conv(4), Down(), Res(4), Up(), Out())
    return replace(ddpm(), in_channels=1, out_channels=1, program=program)


def test_a_run_goes_to_onnx_and_says_what_it_is(capsys: Capture) -> None:
    Path("run").mkdir()
    ours = model(small().with_classes(2, True), Karras(), KarrasPrecond())
    pictures = replace(ours.pictures, class_names=("day", "night"))
    save_model("run/model.safetensors", replace(ours, pictures=pictures))
    body = ask(capsys, "export run --format onnx")
    assert body["files"] == ["run/model.onnx"]
    assert 0.0 < body["difference"] < 1e-5
    facts = {one.key: one.value for one in onnx.load("run/model.onnx").metadata_props}
    assert json.loads(facts["prediction"]) == {"type": "KarrasPrecond", "sigma_data": 0.5}
    assert json.loads(facts["schedule"])["type"] == "Karras"
    assert json.loads(facts["class_names"]) == ["day", "night"]
    assert (facts["size"], facts["no_class_label"]) == ("8x8", "2")


def test_the_ending_tells_the_format_and_a_fixed_size_is_said() -> None:
    exported = runs.export_model(model(small(), size=(7, 8)), "net.pt2")
    assert exported.files == (Path("net.pt2"),)
    assert exported.difference is not None
    assert exported.difference < 1e-5
    assert "pictures must have 7x8" in exported.notes[0]
    assert (
        torch.export.load("net.pt2")
        .module()(torch.ones(1, 1, 7, 8), torch.ones(1))
        .isfinite()
        .all()
    )


# --- the page about it --------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "interop.md"


def test_the_page_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 2
    names = dict[str, object]()
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"interop.md block {number}", "exec"), names)


def test_the_page_names_every_published_network_and_format() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in interop.PUBLISHED if f"`{name}`" not in text] == []
    assert [one for one in ExportFormat if one.value not in text] == []


@pytest.mark.parametrize("name", recipes.PRESETS)
def test_the_page_is_right_about_which_presets_go_to_diffusers(name: str) -> None:
    can = name not in ("improved", "naive")
    try:
        interop.to_diffusers(recipes.preset(name), LinearBetas(), Epsilon())
    except ConfigError:
        assert not can
    else:
        assert can


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def files() -> None:
    """What one may try to import by mistake."""
    save_model("mine.safetensors", model(small()))
    save_file({"layer.weight": torch.ones(2)}, "other.safetensors")
    diffusers_net().save_pretrained("folder")
    save_file(
        {n: t.contiguous() for n, t in filled(diffusers_net().state_dict()).items()},
        "lone.safetensors",
    )
    Path("empty").mkdir()
    Path("short.safetensors").write_bytes(Path("mine.safetensors").read_bytes()[:-5])


@pytest.mark.usefixtures("files")
def test_wrong_imports_end_with_a_line(capsys: Capture) -> None:
    for line, code, says in (
        ("mine.safetensors", 2, "is a model file of undiffuse already"),
        ("other.safetensors", 4, "tensors such as layer.weight belong to no network"),
        ("lone.safetensors", 2, "name the folder"),
        ("lone.safetensors --format diffusers", 2, "format diffusers is a folder"),
        ("lone.safetensors --format edm --resolution 8", 4, "holds no SongUNet"),
        ("empty", 4, "config.json of a UNet2DModel is missing"),
        ("folder --format openai", 4, "is a folder"),
        ("folder --like adm-64", 2, "like is for networks of openai; got adm-64"),
        ("folder --num-heads 0", 2, "num_heads must be at least 1"),
        ("folder --format keras", 2, "format must be one of auto, diffusers, openai"),
        ("nothing.pt", 4, "cannot be read"),
        ("short.safetensors", 4, "damaged or incomplete"),
        ("folder -o mine.safetensors", 2, "mine.safetensors exists"),
        ("folder -o empty/..", 2, "is a folder that is not empty"),
        ("folder --steps 3", 2, "unknown option --steps"),
    ):
        assert says in ask(capsys, f"import {line}", code)["message"], line
    assert not Path("runs").exists()


@pytest.mark.usefixtures("files")
def test_wrong_exports_end_with_a_line(capsys: Capture) -> None:
    for line, code, says in (
        ("nothing", 4, "No run or model file"),
        ("mine.safetensors --format tflite", 2, "format must be one of diffusers, onnx, pt2"),
        ("mine.safetensors -o out.tflite", 2, "does not say its format"),
        ("mine.safetensors -o folder", 2, "folder is a folder that is not empty"),
        ("mine.safetensors -o folder --force", 2, "folder is a folder that is not empty"),
        ("mine.safetensors --format pt2 -o other.safetensors", 2, "exists"),
        ("mine.safetensors --format pt2 --pipeline", 2, "pipeline is for format diffusers"),
        ("mine.safetensors --format pt2 -o empty", 2, "empty is a folder"),
        ("mine.safetensors --format openai", 2, "OpenAI's UNetModel"),
        ("mine.safetensors --weights raw", 2, "choose within a run folder"),
    ):
        assert says in ask(capsys, f"export {line}", code)["message"], line
    assert not Path("diffusers").exists()


@pytest.mark.usefixtures("files")
def test_force_replaces_a_file(capsys: Capture) -> None:
    body = ask(capsys, "import folder -o other.safetensors --force")
    assert body["file"] == "other.safetensors"
    assert load_model("other.safetensors").trained["origin"] == "diffusers UNet2DModel"


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "line",
    [
        "import folder -o folder/diffusion_pytorch_model.safetensors",
        "import folder -o folder/new/model.safetensors",
        "import other.safetensors -o ./folder/../other.safetensors",
        "import other.safetensors -o link.safetensors",
        "export mine.safetensors --format onnx -o mine.safetensors",
        "export mine.safetensors --format onnx -o link-to-mine",
        "export run --format pt2 -o run/model.safetensors",
        "export run --format pt2 -o run/checkpoints/last/model.safetensors",
        "export run --format diffusers -o run/checkpoints/new",
    ],
)
def test_force_never_replaces_what_is_read(
    line: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run/checkpoints/last").mkdir(parents=True)
    Path("run/model.safetensors").write_bytes(Path("mine.safetensors").read_bytes())
    Path("link.safetensors").symlink_to("other.safetensors")
    Path("link-to-mine").symlink_to("mine.safetensors")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for reader in ("load", "import_model"):
        monkeypatch.setattr(runs, reader, lambda *_: pytest.fail("something was read"))
    told = ask(capsys, f"{line} --force", 2)["message"]
    assert "which --force does not replace either" in told
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_run_folder_may_hold_what_is_exported(capsys: Capture) -> None:
    Path("run").mkdir()
    save_model("run/model.safetensors", model(small()))
    for _ in range(2):
        body = ask(capsys, "export run --format pt2 --no-check --force")
        assert body["files"] == ["run/model.pt2"]


@pytest.mark.usefixtures("files")
def test_a_folder_is_no_output_of_import(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "import_model", lambda *_: pytest.fail("something was read"))
    told = ask(capsys, "import folder -o empty --force", 2)["message"]
    assert "empty is a folder; name a file" in told


@pytest.mark.parametrize(("made", "expected"), [("my.v2", "my-v2"), ("net.v2.pt", "net-v2")])
def test_a_run_is_called_as_what_was_imported(made: str, expected: str) -> None:
    if made.endswith(".pt"):
        Path(made).touch()
    else:
        Path(made).mkdir()
    assert cli_exchange._default_model(Path(made)) == Path("runs", expected, "model.safetensors")


def test_weights_beside_a_graph_are_not_lost_without_force(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    monkeypatch.setattr(place, 10)
    side = Path("net.onnx.data")
    side.write_bytes(b"of another graph")
    with pytest.raises(ConfigError, match=r"net\.onnx\.data exists"):
        runs.export_model(model(small()), "net.onnx")
    assert side.read_bytes() == b"of another graph"
    assert not Path("net.onnx").exists()
    exported = runs.export_model(model(small()), "net.onnx", force=True)
    assert exported.files[0] == Path("net.onnx")


def test_every_target_is_looked_at_before_the_first_is_replaced() -> None:
    Path("a").write_bytes(b"before")

    def fill(file: Path) -> None:
        file.write_bytes(b"new")
        file.with_name("b").write_bytes(b"new")

    with pytest.raises(ConfigError, match="a exists; name another file"):
        interop.placed(Path("a"), fill, 1.0, force=False)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == {"a": b"before"}
    interop.placed(Path("a"), fill, 1.0, force=True)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == {"a": b"new", "b": b"new"}


def test_names_of_any_length_make_a_short_line(capsys: Capture) -> None:
    save_file({"x" * 100_000: torch.ones(2)}, "long.safetensors")
    told = ask(capsys, "import long.safetensors", 4)["message"]
    assert "belong to no network" in told
    assert len(told) < 1000


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'resolutoin'\. Did you mean 'resolu"):
        runs.import_model("x", resolutoin=8)
    with pytest.raises(ConfigError, match=r"unknown setting 'formt'\. Did you mean 'format'"):
        runs.export_model(model(small()), "x", formt="onnx")


def test_every_option_that_is_not_for_all_formats_is_listed() -> None:
    for_all = {"format", "weights", "resolution", "force"}
    assert set(_exchange._BELONGING) == set(vars(ImportConfig())) - for_all

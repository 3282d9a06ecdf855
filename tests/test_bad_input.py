"""Bad input at the command line: one line that names the field, its value and a remedy."""

import json
from pathlib import Path

import pytest
import torch

from tiny_world import World, make_world, spoil
from undiffuse.cli import main

TRAIN = "train {pictures} --output-dir new"
SAMPLE = "sample {run} --output-dir new"
HUGE = f"1{'0' * 9}"

# command line -> exit code and words that its one line must hold
USAGE = {
    "": (2, "command is missing", "demo"),
    "trian x": (2, "'trian'", "Did you mean train?", "--help"),
    "generate x": (2, "'generate'", "Did you mean sample?"),
    "--wat": (2, "--wat", "--help"),
    "train": (2, "DATA is missing", "folder"),
    "sample": (2, "RUN is missing"),
    "denoise {run}": (2, "IMAGE is missing"),
    "env now": (2, "'now'", "too many"),
    TRAIN + " --lerning-rate 1": (2, "--lerning-rate", "Did you mean --learning-rate?"),
    TRAIN + " --lr 1e-3": (2, "--lr", "Did you mean --learning-rate?"),
    TRAIN + " --image_size 8": (2, "--image-size", "Did you mean --resolution?"),
    TRAIN + " --dim_mults 1 2 4": (2, "--dim-mults", "Did you mean --preset?"),
    TRAIN + " --steps=5": (2, "--steps", "Did you mean --max-train-steps?"),
    SAMPLE + " --steps 5": (2, "--steps", "Did you mean --num-inference-steps?"),
    TRAIN + " --qqqqqq": (2, "unknown option --qqqqqq", "--help"),
    TRAIN + " --seed": (2, "--seed needs a value"),
    TRAIN + " --random-flip=3": (2, "--random-flip", "takes no value", "'3'"),
    TRAIN + " --preset=": (2, "preset", "not empty"),
}
DATA = {
    "train nowhere --output-dir new": (3, "nowhere", "No folder"),
    "train {root}/picturse --output-dir new": (3, "Did you mean {root}/pictures?"),
    "train {root}/empty --output-dir new": (3, "No images", "{root}/empty", ".png"),
    "train {root}/texts --output-dir new": (3, "{root}/texts", "can be used"),
    "train {root}/notes --output-dir new": (3, "No images", ".txt"),
    "train {root}/file.txt --output-dir new": (3, "file.txt", "folder"),
    "train {root}/texts/a.png --output-dir new": (3, "one picture", "folder"),
    "train \x1b[31mred --output-dir new": (3, "No folder", "\\x1b[31mred"),
    "train größe/画像 --output-dir new": (3, "größe/画像"),
    "train - --output-dir new": (3, "No folder"),
    "describe {root}/empty": (3, "No images"),
    "describe lihgt": (2, "'lihgt'", "Did you mean light?", "presets"),
    "describe tiny --output new.pdf": (2, ".svg or .png", "new.pdf"),
    "describe tiny --classes -1": (2, "classes", "-1"),
    "describe {run} --classes 3": (2, "classes", "trained model"),
    "describe tiny --resolution 3": (2, "resolution", "from 4"),
}
NUMBERS = {
    TRAIN + " --resolution 0": (2, "resolution", "from 4 to 8192", "'0'"),
    TRAIN + " --resolution 3": (2, "resolution", "'3'"),
    TRAIN + f" --resolution {HUGE}": (2, "resolution", HUGE),
    TRAIN + " --resolution 8x8x8": (2, "resolution", "N or HxW", "'8x8x8'"),
    TRAIN + " --resolution 8192": (7, "resolution 8192x8192", "GB", "smaller"),
    TRAIN + f" --train-batch-size {HUGE}": (7, HUGE, "GB", "--train-batch-size"),
    TRAIN + " --channels 2": (2, "channels", "got 2"),
    TRAIN + " --channels x": (2, "channels", "whole number", "'x'"),
    TRAIN + " --preset lihgt": (2, "preset", "lihgt", "light"),
    TRAIN + " --max-train-steps -1": (2, "max_train_steps", "at least 1", "-1"),
    TRAIN + " --max-train-steps 0": (2, "max_train_steps", "at least 1", "got 0"),
    TRAIN + " --max-train-steps 1.5": (2, "max_train_steps", "whole number", "'1.5'"),
    TRAIN + " --learning-rate nan": (2, "learning_rate", "got nan"),
    TRAIN + " --learning-rate inf": (2, "learning_rate", "finite", "inf"),
    TRAIN + " --learning-rate -inf": (2, "learning_rate", "-inf"),
    TRAIN + " --learning-rate 1e400": (2, "learning_rate", "finite", "inf"),
    TRAIN + " --learning-rate abc": (2, "learning_rate", "a number", "'abc'"),
    TRAIN + " --learning-rate -1e-3": (2, "learning_rate", "above 0", "-0.001"),
    TRAIN + " --seed -1": (2, "seed", "at least 0", "-1"),
    TRAIN + f" --seed {2**64}": (2, "seed", "below", str(2**64)),
    TRAIN + " --val-fraction 1": (2, "val_fraction", "below 1"),
    TRAIN + " --gradient-accumulation-steps 100": (2, "gradient_accumulation_steps 100"),
    TRAIN + " --mixed-precision fp16": (2, "mixed_precision", "bf16", "'fp16'"),
    TRAIN + " --background mauvish": (2, "background", "mauvish"),
}
CONFIGS = {
    TRAIN + " --config {root}/none.json": (2, "none.json", "No such file"),
    TRAIN + " --config {root}/empty": (2, "empty", "directory"),
    TRAIN + " --config {root}/configs/binary.json": (2, "binary.json", "not text"),
    TRAIN + " --config {root}/configs/empty.json": (2, "empty.json", "not JSON"),
    TRAIN + " --config {root}/configs/torn.json": (2, "torn.json", "not JSON"),
    TRAIN + " --config {root}/configs/list.json": (2, "list.json", "one table", "a list"),
    TRAIN + " --config {root}/configs/deep.json": (2, "deep.json", "too deeply"),
    TRAIN + " --config {root}/configs/twice.json": (2, "twice.json", "'seed'", "twice"),
    TRAIN + " --config {root}/configs/twice.toml": (2, "twice.toml", "TOML"),
    TRAIN + " --config {root}/configs/unknown.json": (2, "'lerning_rate'", "'learning_rate'"),
    TRAIN + " --config {root}/configs/unknown.toml": (2, "unknown.toml", "'dim_mults'"),
    TRAIN + " --config {root}/configs/nested.json": (2, "nested.json", "'model'"),
    TRAIN + " --config {root}/configs/nan.json": (2, "nan.json", "learning_rate"),
    TRAIN + " --config {root}/configs/word.json": (2, "word.json", "learning_rate", "'fast'"),
    TRAIN + " --config {root}/configs/truth.json": (2, "truth.json", "seed", "True"),
    TRAIN + " --config {root}/configs/model.yaml": (2, "YAML", "JSON or TOML"),
}
PLACES = {
    "train {pictures} --output-dir {root}/file.txt/new": (7, "output_dir", "not a folder"),
    "sample {run} --output-dir {root}/file.txt": (7, "output_dir", "not a folder"),
    "train {pictures} --output-dir {run}": (2, "{run}", "--resume-from-checkpoint", "--output-dir"),
    "train --resume-from-checkpoint latest": (2, "resume_from_checkpoint", "--output-dir"),
    "train --resume-from-checkpoint soon --output-dir {run}": (2, "latest or a step", "'soon'"),
    "train --resume-from-checkpoint 99 --output-dir {run}": (4, "99", "{run}"),
    "train --resume-from-checkpoint latest --output-dir {pictures}": (4, "{pictures}", "no run"),
    "train --resume-from-checkpoint latest --output-dir {root}/none": (4, "No run", "{root}/none"),
    "train --resume-from-checkpoint latest --output-dir {run} --preset light": (
        *(4, "preset is light here", "tiny"),
    ),
    "report {pictures}": (4, "{pictures}", "no run"),
    "report {model}": (4, "model.safetensors", "run folder"),
    "report {root}/none": (4, "No run", "none"),
    "report {run} --output {root}/file.txt/r.html": (7, "r.html"),
    "demo --data cats": (2, "data", "digits, photos", "'cats'"),
    "demo --output-dir {run}": (2, "{run}", "--output-dir"),
    "demo --seed x --output-dir new": (2, "seed", "'x'"),
}
MODELS = {
    "sample {root}/runs/frist": (4, "No run", "Did you mean {root}/runs/first?"),
    "sample {pictures}": (4, "{pictures}", "neither", "train"),
    "sample {root}/file.txt": (4, "file.txt"),
    "sample {root}/short.safetensors": (4, "short.safetensors", "truncated"),
    "sample {root}/noise.safetensors": (4, "noise.safetensors"),
    "sample {root}/none.safetensors": (4, "none.safetensors"),
    "sample {root}/nan.safetensors": (4, "nan.safetensors", "finite"),
    "describe {root}/short.safetensors": (4, "short.safetensors", "truncated"),
    SAMPLE + " --checkpoint 99": (4, "99", "3"),
    SAMPLE + " --checkpoint last": (2, "checkpoint", "'last'"),
    SAMPLE + " --checkpoint -1": (2, "checkpoint", "'-1'"),
    SAMPLE + " --weights best": (2, "weights", "ema, raw", "'best'"),
    "sample {model} --weights raw --output-dir new": (2, "weights", "file"),
    SAMPLE + " --class-label dusk": (2, "class_label 'dusk'", "day, night"),
    SAMPLE + " --class-label 2": (2, "class_label '2'", "day, night"),
    SAMPLE + " --class-label -1": (2, "class_label '-1'"),
    SAMPLE + " --guidance-scale nan": (2, "guidance_scale", "nan"),
    SAMPLE + " --guidance-scale high": (2, "guidance_scale", "'high'"),
    SAMPLE + " --sampler euler": (2, "sampler", "ddim", "'euler'"),
    SAMPLE + " --num-inference-steps 0": (2, "num_inference_steps", "at least 1"),
    SAMPLE + " --num-inference-steps 1000000000000": (2, "num_inference_steps"),
    SAMPLE + " -n 0": (2, "num_images", "at least 1"),
    SAMPLE + " -n 1000000000000": (7, "num_images", "GB", "fewer"),
    SAMPLE + " --batch-size 0": (2, "batch_size", "at least 1"),
    SAMPLE + " --seed -5": (2, "seed", "-5"),
    SAMPLE + " --format jpg": (2, "format", "grid, png, npz", "'jpg'"),
    SAMPLE + " --film mp4": (2, "film", "webp, gif", "'mp4'"),
    SAMPLE + " --eta 0.5": (2, "eta", "ddim"),
    SAMPLE + " --device gpu": (2, "device", "cuda", "'gpu'"),
    SAMPLE + " --autoguidance {root}/none": (4, "No run"),
    SAMPLE + " --autoguidance {root}/plain.safetensors": (2, "autoguidance", "class_names"),
    "sample {root}/plain.safetensors --guidance-scale 2 --output-dir new": (
        *(2, "guidance_scale 2", "class"),
    ),
    "sample {root}/plain.safetensors --class-label day --output-dir new": (
        *(2, "class_label 'day'", "without classes"),
    ),
    "evaluate {model}": (2, "data is missing", "--data"),
    "evaluate {run} --fail-above frechet": (2, "fail_above", "NAME=X", "'frechet'"),
    "evaluate {run} --fail-above frechet=nan": (2, "fail_above", "nan"),
    "evaluate {run} --fail-above =3": (2, "fail_above", "NAME=X"),
    "evaluate {run} --num-samples 0": (2, "num_samples", "at least 1", "0"),
    "evaluate {run} --draws many": (2, "draws", "'many'"),
    "evaluate {run} --data nowhere": (3, "nowhere"),
}
DENOISE = {
    "denoise {run} nothing.png": (3, "nothing.png"),
    "denoise {run} {pictures}": (3, "{pictures}"),
    "denoise {run} {root}/texts/a.png": (3, "a.png"),
    "denoise {run} {root}/file.txt": (3, "file.txt"),
    "denoise {run} {pictures}/day/00.png --sigma 0": (2, "sigma", "above 0"),
    "denoise {run} {pictures}/day/00.png --sigma -1": (2, "sigma", "-1"),
    "denoise {run} {pictures}/day/00.png --sigma inf": (2, "sigma", "finite"),
    "denoise {run} {pictures}/day/00.png --sigma x": (2, "sigma", "'x'"),
    "denoise {run} {pictures}/day/00.png --sigma 1000": (2, "sigma", "80", "1000"),
    "denoise {run} {pictures}/day/00.png --seed -1": (2, "seed", "-1"),
}
CASES = USAGE | DATA | NUMBERS | CONFIGS | PLACES | MODELS | DENOISE


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    spoil(made)
    return made


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(*roots: Path) -> set[str]:
    """All but the lock, which stays where a run has been opened for writing."""
    return {str(path) for root in roots for path in root.rglob("*") if path.name != ".lock"}


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("words", CASES)
def test_refusal(
    words: str,
    world: World,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, *said = CASES[words]
    before = files(world.root, here)
    got = main(world.words(words))
    stdout, stderr = capsys.readouterr()
    assert got == code, stderr
    *told, last = stderr.splitlines()
    assert last.startswith("undiffuse: ")
    for part in said:
        assert world.put(str(part)) in last
    assert not told
    assert "Traceback" not in stdout + stderr
    assert not stdout
    assert files(world.root, here) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
@pytest.mark.parametrize("line", [TRAIN, SAMPLE, "evaluate {run}", "denoise {run} {pictures}"])
def test_a_device_that_is_not_here(
    line: str, world: World, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*world.words(line), "--device", "cuda"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "undiffuse: device cuda is not available here; there is: cpu"
    assert not files(here)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no such place here")
def test_a_place_where_not_even_root_may_write(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    words = world.words("train {pictures} --output-dir /proc/new --max-train-steps 2 --quiet")
    assert main(words) == 7
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("undiffuse: output_dir /proc/new cannot be written: ")


@pytest.mark.parametrize("name", ["two words", "größe 画像", "line\nbreak", "-x", "\x1b[31m", "🎨"])
def test_names_of_all_kinds_in_an_error(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--output-dir", "new", "--", name]) == 3
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("undiffuse: No folder or .npz at ")
    assert said.isprintable()
    assert not files(here)


@pytest.mark.parametrize("name", ["x\0y", "x" * 5000])
@pytest.mark.parametrize(
    "line", ["train NAME", "sample NAME", "describe NAME", "train {pictures} --output-dir NAME"]
)
def test_names_no_file_can_have(
    name: str, line: str, world: World, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("NAME", name) for word in world.words(line)]
    assert main(words) in (2, 3, 4, 7)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("undiffuse: ")
    assert "defect" not in said
    assert not files(here)


def test_an_error_as_json_is_one_object_beside_the_line(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*world.words("sample {root}/runs/frist"), "--json"]) == 4
    stdout, stderr = capsys.readouterr()
    (line,) = stdout.splitlines()
    body = json.loads(line)
    assert body["schema"] == "undiffuse.error/1"
    assert (body["status"], body["code"], body["type"]) == ("error", 4, "CheckpointError")
    assert stderr == f"undiffuse: {body['message']}\n"


def test_debug_shows_the_traceback_before_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "nowhere", "--debug"]) == 4
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith("undiffuse: No run or model file at nowhere")

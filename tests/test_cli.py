"""The commands, tried on one tiny run: what they print, write and return."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse
from tiny_world import CLASSES, SIZE, STEPS, World, draw_pictures, make_world
from undiffuse import runs
from undiffuse.cli import _demo, _evaluate, main
from undiffuse.cli._output import Bar, Output, count_of, duration, one_line, table
from undiffuse.cli._parser import FOREIGN, parse_arguments
from undiffuse.config import SampleConfig
from undiffuse.errors import ConfigError

COMMANDS = (
    *("demo", "train", "sample", "denoise", "evaluate", "describe"),
    *("import", "export", "average", "report", "env"),
)
QUICK = "--num-inference-steps 2"
SRC = Path(undiffuse.__file__).parent.parent

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed road: another process."""
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "undiffuse", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def ask(world: World, capsys: Capture) -> Callable[..., dict[str, Any]]:
    """A command with --json that succeeds: its one object."""

    def answer(line: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*world.words(line), "--json"]) == code
        (only,) = capsys.readouterr().out.splitlines()
        return json.loads(only)

    return answer


# --- help, version, start -----------------------------------------------------------------------


def test_help_names_every_command(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert all(f"    {name} " in out for name in COMMANDS)
    assert not err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: undiffuse {command} ")
    assert "--json" in out
    assert "None" not in out
    assert not err


def test_help_says_defaults_that_are_zero_or_false(capsys: Capture) -> None:
    assert main(["train", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "of everything random (default: 0)" in out
    assert "mirror half of the pictures (default: off)" in out
    assert "use class labels where the data have them (default: on)" in out


def test_help_says_the_defaults_of_its_own_command(capsys: Capture) -> None:
    """`evaluate` computes more pictures at once than `sample`, and every path has a default."""
    for command, size in (("evaluate", runs.EvaluateOptions().sampling.batch_size), ("sample", 64)):
        assert main([command, "--help"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"pictures computed at once; changes rounding only (default: {size})" in out
        assert "where to compute (default: auto)" in out


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"]])
def test_version(words: list[str], capsys: Capture) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == f"undiffuse {undiffuse.__version__}\n"


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "--wat"], ["describe", "light"]]
)
def test_these_answers_do_not_wait_for_torch(words: list[str]) -> None:
    code = f"""
import sys
from undiffuse.cli import main
main({words!r})
heavy = {{"torch", "numpy", "matplotlib", "sklearn", "PIL"}} & set(sys.modules)
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_dash_m() -> None:
    done = run(["--version"])
    assert (done.returncode, done.stdout) == (0, f"undiffuse {undiffuse.__version__}\n")
    assert run(["--wat"]).returncode == 2


def test_a_reader_that_leaves_is_no_error() -> None:
    """`undiffuse describe highres | head -1`, with a pipe that is closed at once."""
    reading, writing = os.pipe()
    os.close(reading)
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-m", "undiffuse", "describe", "highres"],
        env=env,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    line = f"'{sys.executable}' -m undiffuse describe tiny {closed}"
    assert subprocess.run(["sh", "-c", line], env=env, timeout=60).returncode == 0


def test_a_terminal_that_knows_ascii_alone(here: Path) -> None:
    (here / "größe").mkdir()
    Image.new("RGB", (8, 8)).save(here / "größe" / "a.png")
    Image.new("RGB", (8, 8)).save(here / "größe" / "b.png")
    env = {**os.environ, "PYTHONPATH": str(SRC), "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "undiffuse", "describe", "größe"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in done.stdout


# --- words to settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["train", "x", "--train-batch-size", "8", "--resolution", "16"],
        ["train", "x", "--train_batch_size=8", "--resolution=16"],
        ["train", "--train_batch_size", "8", "--resolution", "16", "x"],
        ["--quiet", "train", "x", "--resolution", "16", "--train-batch-size", "8", "--json"],
    ],
)
def test_spellings_of_one_command(words: list[str]) -> None:
    arguments = parse_arguments(words)
    assert arguments.command == "train"
    assert arguments.given == {"data": "x", "train_batch_size": "8", "resolution": "16"}


def test_values_keep_their_underscores_and_signs() -> None:
    line = "sample my_run --sampler=dpmpp_2m --seed -3 --guidance-scale -1e-3 --class-label a_b c"
    given = parse_arguments(line.split()).given
    assert given["run"] == "my_run"
    assert given["sampler"] == "dpmpp_2m"
    assert (given["seed"], given["guidance_scale"]) == ("-3", "-1e-3")
    assert given["class_label"] == ["a_b", "c"]


def test_words_after_two_dashes_are_no_options() -> None:
    assert parse_arguments(["train", "--", "--my_folder"]).given == {"data": "--my_folder"}
    without = parse_arguments(["train", "--"])
    with pytest.raises(ConfigError, match="DATA"):
        without.run(without, Output())


def test_home_is_found_where_the_shell_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_arguments(["train", "x", "--output-dir=~/runs/1"]).given["output_dir"] == (
        "/home/me/runs/1"
    )


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_foreign_words_lead_to_options_that_exist(command: str, capsys: Capture) -> None:
    main([command, "--help"])
    known = capsys.readouterr().out
    led = 0
    for word, ours in FOREIGN.items():
        if f"--{word} " in known or not any(f"--{one} " in known for one in ours):
            continue
        assert main([command, "x", f"--{word}", "3"]) == 2
        said = capsys.readouterr().err
        assert any(f"Did you mean --{one}?" in said for one in ours), said
        led += 1
    assert led >= 5


# --- what is printed ----------------------------------------------------------------------------


def test_numbers_json_lacks_become_null_with_a_warning(capsys: Capture) -> None:
    Output(as_json=True).result("x", a=[1.0, float("nan")], b={"c": float("inf")})
    body = json.loads(capsys.readouterr().out)
    assert body["a"] == [1.0, None]
    assert body["b"] == {"c": None}
    assert body["warnings"] == ["a[1] is not a finite number", "b.c is not a finite number"]


def test_lines_cannot_steer_the_terminal() -> None:
    assert one_line("a\nb\t c\x1b[2Jd\u202ee") == "a b c\\x1b[2Jd\\u202ee"
    assert one_line("größe 🎨") == "größe 🎨"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (12_000, "3 h 20 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_counts_and_tables() -> None:
    assert (count_of(1, "step"), count_of(1000, "step")) == ("1 step", "1,000 steps")
    assert table([("a", "n"), ("bb", "10")], right=(1,)) == ["a    n", "bb  10"]


def test_without_a_terminal_there_is_a_line_per_ten_seconds(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, *(float(n) for n in range(4, 100, 4))])
    monkeypatch.setattr("undiffuse.cli._output.time.monotonic", lambda: next(clock))
    with Bar(Output(), 8, "train") as bar:
        for _ in range(8):
            bar.advance({"loss": "0.5"})
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(line.startswith("train ") and "/8 loss 0.5 ETA " in line for line in lines)


def test_quiet_leaves_only_the_result(world: World, capsys: Capture) -> None:
    assert main(world.words(f"sample {{run}} -n 2 {QUICK} --output-dir new --quiet")) == 0
    out, err = capsys.readouterr()
    assert out == "new/grid_2_seed0.png\n"
    assert not err


# --- train --------------------------------------------------------------------------------------


def test_a_run_leaves_the_files_it_promises(world: World) -> None:
    names = {str(path.relative_to(world.run)) for path in world.run.rglob("*") if path.is_file()}
    assert {
        *("config.json", "run.json", "metrics.jsonl", "model.safetensors"),
        *("samples/final.png", "samples/film.webp", f"samples/step_{STEPS:08d}.png"),
    } <= names
    assert not [name for name in names if "part" in name or name.endswith("crash.txt")]


def test_train_tells_and_advises(world: World, capsys: Capture) -> None:
    line = "train {pictures} --max-train-steps 2 --train-batch-size 2 --seed 1"
    assert main(world.words(line)) == 0
    out, err = capsys.readouterr()
    assert "run: runs/pictures-001" in err
    assert f"of 3x{SIZE}x{SIZE} for training" in err
    assert "2 classes" in err
    assert "for 2 steps of 2 pictures" in err
    assert out.startswith("Done: 2 steps in ")
    assert "  undiffuse sample runs/pictures-001 -n 64 --seed 1" in out


def test_train_from_a_file_with_a_mark_at_its_start(
    ask: Callable[..., dict[str, Any]], here: Path
) -> None:
    """JSON with a byte-order mark, and TOML; typed options win over the file."""
    (here / "a.json").write_text('\ufeff{"max_train_steps": 7, "seed": 5}', encoding="utf-8")
    (here / "b.toml").write_text('max_train_steps = 8\nlr_scheduler = "linear"')
    first = ask("train {pictures} --dry-run --config a.json --seed 6")
    assert (first["config"]["max_train_steps"], first["config"]["seed"]) == (7, 6)
    second = ask("train {pictures} --dry_run --config b.toml")
    assert second["config"]["lr_scheduler"] == "linear"


def test_a_dry_run_writes_nothing(ask: Callable[..., dict[str, Any]], here: Path) -> None:
    body = ask("train {pictures} -n --output-dir new --resolution 16 --preset naive")
    assert (body["schema"], body["status"]) == ("undiffuse.train/1", "dry_run")
    assert body["config"]["preset"] == "naive"
    assert body["config"]["resolution"] == [16, 16]
    assert body["train_images"] + body["held_out_images"] == 12
    assert body["memory_bytes"] > 16 * body["parameters"]
    assert not list(here.iterdir())


def test_resume_goes_on_to_a_later_end(ask: Callable[..., dict[str, Any]], here: Path) -> None:
    words = "--output-dir größe~1 --train-batch-size 2"
    assert ask(f"train {{pictures}} {words} --max-train-steps 1")["step"] == 1
    again = "train --resume-from-checkpoint latest --output-dir größe~1 --max-train-steps 2"
    body = ask(again)
    assert (body["step"], body["run_dir"]) == (2, "größe~1")
    assert any("max_train_steps 1 -> 2" in warning for warning in body["warnings"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: int, code: int, world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent by the run itself, between its first and its second step."""
    progress = _signal_after_first_step(number)
    monkeypatch.setattr("undiffuse.cli._teller.Teller._progress", progress)
    line = "train {pictures} --output-dir a;b --max-train-steps 50 --train-batch-size 2 --json"
    assert main(world.words(line)) == code
    body = json.loads(capsys.readouterr().out)
    assert (body["status"], body["step"]) == ("interrupted", 1)
    assert body["resume"] == ("undiffuse train --resume-from-checkpoint latest --output-dir 'a;b'")
    assert [path.name for path in Path("a;b/checkpoints").glob("step_*")] == ["step_00000001"]


def _signal_after_first_step(number: int) -> Callable[..., None]:
    def progress(teller: object, report: Any) -> None:
        if report.step == 1:
            os.kill(os.getpid(), number)

    return progress


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_elsewhere_ends_with_one_line(
    number: int, code: int, world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*args: object, **options: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(runs, "generate", generate)
    assert main(world.words("sample {run} --output-dir new --json")) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "interrupted"
    assert err == "undiffuse: interrupted\n"
    assert not Path("new").exists()


def test_a_defect_leaves_its_traceback_in_the_run(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def progress(teller: object, report: object) -> None:
        raise ZeroDivisionError("of course")

    monkeypatch.setattr("undiffuse.cli._teller.Teller._progress", progress)
    assert main(world.words("train {pictures} --output-dir new --quiet")) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("undiffuse: a defect of undiffuse: ZeroDivisionError: of course")
    assert "new/crash.txt" in said
    assert "Traceback" in Path("new/crash.txt").read_text()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no")])
def test_out_of_memory_is_no_defect(
    error: Exception, world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(runs, "generate", generate)
    assert main(world.words("sample {run} --output-dir new")) == 7
    assert "--batch-size" in capsys.readouterr().err


# --- sample -------------------------------------------------------------------------------------


def test_sample_writes_a_grid_into_the_run(
    world: World, ask: Callable[..., dict[str, Any]]
) -> None:
    body = ask(f"sample {{run}} -n 5 {QUICK} --seed 3")
    (file,) = body["files"]
    assert Path(file) == world.run / "samples" / "grid_5_seed3.png"
    scale = 64 // SIZE
    with Image.open(file) as grid:
        assert grid.size == (3 * SIZE * scale + 2, 2 * SIZE * scale + 1)


def test_single_files_hold_the_pictures_of_the_array(
    ask: Callable[..., dict[str, Any]], here: Path
) -> None:
    files = ask(f"sample {{run}} -n 3 {QUICK} --format png --output-dir a")["files"]
    (array,) = ask(f"sample {{run}} -n 3 {QUICK} --format npz --output-dir b")["files"]
    with np.load(array) as arrays:
        pictures, labels = arrays["images"], arrays["labels"]
    assert pictures.shape == (3, SIZE, SIZE, 3)
    assert pictures.dtype == np.float32
    assert labels.tolist() == [0, 1, 0]
    for name, picture in zip(files, pictures, strict=True):
        with Image.open(name) as file:
            assert np.abs(np.asarray(file) - (picture + 1) * 127.5).max() <= 0.5 + 1e-4


def test_the_array_can_be_trained_on(ask: Callable[..., dict[str, Any]]) -> None:
    (array,) = ask(f"sample {{run}} -n 4 {QUICK} --format npz --output-dir b")["files"]
    body = ask(f"describe {array}")
    assert body["train_images"] + body["held_out_images"] == 4
    assert body["size"] == [SIZE, SIZE]


def pictures_of(body: dict[str, Any]) -> Any:
    with np.load(body["files"][0]) as arrays:
        return arrays["images"]


def test_a_class_by_its_name_is_the_class_by_its_number(
    ask: Callable[..., dict[str, Any]],
) -> None:
    line = f"sample {{run}} -n 2 {QUICK} --format npz --output-dir"
    named = pictures_of(ask(f"{line} a --class-label {CLASSES[1]}"))
    numbered = pictures_of(ask(f"{line} b --class_label 1"))
    other = pictures_of(ask(f"{line} c --class-label {CLASSES[0]} {CLASSES[1]}"))
    assert np.array_equal(named, numbered)
    assert not np.array_equal(named[0], other[0])
    assert np.array_equal(named[1], other[1])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpmpp_2m"])
def test_every_sampler_is_the_one_of_the_library(
    sampler: str, world: World, ask: Callable[..., dict[str, Any]]
) -> None:
    body = ask(f"sample {{run}} -n 2 {QUICK} --format npz --output-dir a --sampler {sampler}")
    model = undiffuse.load(world.run)
    wanted = undiffuse.generate(model, 2, sampler=sampler, num_inference_steps=2)
    # not bit for bit: the command computes with channels last
    assert np.allclose(pictures_of(body), wanted.movedim(1, -1).numpy(), atol=1e-5)


def test_options_that_change_pictures_and_one_that_does_not(
    ask: Callable[..., dict[str, Any]],
) -> None:
    line = f"sample {{run}} -n 3 {QUICK} --format npz --output-dir"
    plain = pictures_of(ask(f"{line} a"))
    for n, extra in enumerate(
        (
            *("--seed 1", "--guidance-scale 3", "--weights raw", "--num-inference-steps 3"),
            *("--sampler ddim --eta 1", "--autoguidance {run} --guidance-scale 2 --seed 2"),
        )
    ):
        assert not np.array_equal(plain, pictures_of(ask(f"{line} b{n} {extra}"))), extra
    same = pictures_of(ask(f"{line} c --autoguidance {{run}} --guidance-scale 2"))
    assert np.allclose(plain, same, atol=1e-4)  # guiding by itself changes nothing
    same = pictures_of(ask(f"{line} d --checkpoint {STEPS}"))
    assert np.array_equal(plain, same)


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_a_film_shows_every_step_and_the_end(kind: str, ask: Callable[..., dict[str, Any]]) -> None:
    body = ask(f"sample {{run}} -n 2 --num-inference-steps 4 --film {kind} --output-dir new")
    assert [Path(name).suffix for name in body["files"]] == [".png", f".{kind}"]
    with Image.open(body["files"][1]) as film:
        assert 2 <= film.n_frames <= 5  # equal frames are joined


def test_a_model_file_alone_is_enough(
    world: World, ask: Callable[..., dict[str, Any]], here: Path
) -> None:
    copy = here / "elsewhere.safetensors"
    copy.write_bytes(world.model.read_bytes())
    (file,) = ask(f"sample {copy} -n 1 {QUICK}")["files"]
    assert Path(file) == here / "samples" / "grid_1_seed0.png"


# --- denoise ------------------------------------------------------------------------------------


def test_denoise_of_added_noise_knows_its_error(
    world: World, ask: Callable[..., dict[str, Any]], here: Path
) -> None:
    body = ask("denoise {run} {pictures}/day/00.png --add-noise --sigma 0.1 --output-dir new")
    (one,) = body["files"]
    # sigma 0.1 of a range of 2: 20 log10(2 / 0.1) = 26 dB, a little more where it is clipped
    assert 25 < one["psnr_noisy"] < 29
    clean = undiffuse.images.read(world.pictures / "day" / "00.png", 3)
    noisy = undiffuse.images.read(one["noisy"], 3)
    assert float((noisy - clean).std()) == pytest.approx(0.1, rel=0.25)
    assert undiffuse.images.read(one["file"], 3).shape == clean.shape


def test_denoise_leaves_its_input_alone_and_keeps_names_apart(
    world: World, ask: Callable[..., dict[str, Any]], here: Path
) -> None:
    for folder, size, mode in (("a", (SIZE, SIZE), "RGB"), ("b", (11, 7), "L")):
        (here / folder).mkdir()
        Image.new(mode, size, 90).save(here / folder / "1.png")
    before = (here / "a" / "1.png").read_bytes()
    body = ask("denoise {run} a/1.png b/1.png --output-dir a")
    assert [one["file"] for one in body["files"]] == ["a/1_denoised.png", "a/1_2_denoised.png"]
    assert (here / "a" / "1.png").read_bytes() == before
    with Image.open("a/1_2_denoised.png") as other:
        assert other.size == (11, 7)


def test_denoise_is_the_denoiser(world: World, ask: Callable[..., dict[str, Any]]) -> None:
    ask("denoise {run} {pictures}/night/01.png --sigma 0.4 --output-dir new")
    model = undiffuse.load(world.run)
    noisy = undiffuse.images.read(world.pictures / "night" / "01.png", 3)
    level = model.denoiser.schedule.at(torch.tensor(0.4, dtype=torch.float64))
    with torch.no_grad():
        wanted = model.denoiser(noisy[None], level).clamp(-1, 1)[0]
    found = undiffuse.images.read("new/01_denoised.png", 3)
    assert float((found - wanted).abs().max()) <= 1.001 / 255


# --- evaluate, report, demo ---------------------------------------------------------------------

MEASURE = "evaluate {run} --num-samples 4 --draws 1 --num-inference-steps 2"


def test_evaluate_report_and_a_limit(
    world: World, ask: Callable[..., dict[str, Any]], capsys: Capture
) -> None:
    body = ask(MEASURE)
    assert body["schema"] == "undiffuse.evaluate/1"
    names = [figure["name"] for figure in body["figures"]]
    assert "frechet_pca" in names
    assert body["levels"]
    assert json.loads((world.run / "evaluation.json").read_text())["figures"] == body["figures"]
    assert main(world.words("report {run} --output page.html")) == 0
    assert capsys.readouterr().out == "page.html\n"
    page = Path("page.html").read_text(encoding="utf-8")
    assert "frechet_pca" in page
    failed = ask(f"{MEASURE} --fail-above frechet_pca=0", code=6)
    assert failed["type"] == "QualityError"
    assert failed["message"].startswith("frechet_pca ")
    assert " is above 0 (real pictures: " in failed["message"]


BODY: dict[str, Any] = {
    "sampling": {"guidance_scale": 1.0},
    "figures": [
        {
            "name": "frechet",
            "value": 41.234,
            "floor": 8.9,
            "floor_std": 0.25,
            "better": "lower",
            "n": 1000,
            "warning": "few; rough",
        },
        {
            "name": "copies",
            "value": None,
            "floor": None,
            "floor_std": None,
            "better": "lower",
            "n": 0,
            "warning": "rough",
        },
    ],
    "levels": [
        {
            "ratio": 0.5,
            "held_out": 0.25,
            "bar": 0.125,
            "bars": {"wiener": 0.125, "kde": 0.5},
            "train": 0.2,
            "train_optimum": None,
        }
    ],
    "verdict": "underfits",
    "reason": "everything is above the bar",
}


def test_figures_as_lines() -> None:
    first, *_, few, rough = _evaluate.figure_lines(BODY)
    assert first.split() == ["samples", "value", "real", "pictures", "better", "n"]
    assert "41.23  8.9 ± 0.25" in _evaluate.figure_lines(BODY)[1]
    assert few == "note (frechet): few"
    assert rough == "note (all): rough"
    _, row, verdict = _evaluate.level_lines(BODY)
    assert row.split() == ["0.5", "0.25", "0.125", "wiener", "-", "0.2", "-"]
    assert verdict == "underfits: everything is above the bar"


@pytest.mark.parametrize(
    ("limit", "kind", "words"),
    [
        ("above frechet=50", None, ""),
        ("above frechet=41.2", "QualityError", "frechet 41.23 is above 41.2 (real pictures: 8.9)"),
        ("above copies=1", "QualityError", "copies has no value to compare with 1: rough"),
        ("above recall=1", "ConfigError", "recall was not measured; there are: frechet, copies"),
        ("below frechet=41.2", None, ""),
        ("below frechet=50", "QualityError", "frechet 41.23 is below 50 (real pictures: 8.9)"),
        ("below copies=0", "QualityError", "copies has no value to compare with 0: rough"),
        ("above frechet=50 --fail-below frechet=9", None, ""),
        ("above frechet=50 --fail-below frechet=45", "QualityError", "41.23 is below 45"),
        ("above frechet=40 --fail-below frechet=9", "QualityError", "41.23 is above 40"),
    ],
)
def test_limits(
    limit: str,
    kind: str | None,
    words: str,
    ask: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_evaluate, "measure", lambda run, options, out: BODY)
    codes = {None: 0, "QualityError": 6, "ConfigError": 2}
    body = ask(f"evaluate {{run}} --fail-{limit}", code=codes[kind])
    assert body.get("type") == kind
    assert words in body.get("message", "")


@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("fid=3", "no figure 'fid'; there are: class_accuracy, train_on_samples, frechet, "),
        ("=3", "must be NAME=X, such as frechet=3; got '=3'"),
        ("frechet", "must be NAME=X"),
        ("frechet=low", "low"),
    ],
)
def test_senseless_limits_are_refused_before_measuring(
    side: str,
    limit: str,
    words: str,
    ask: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_evaluate, "measure", lambda run, options, out: pytest.fail("measured"))
    refused = ask(f"evaluate {{run}} --fail-{side} {limit}", code=2)
    assert refused["message"].startswith(f"fail_{side}")
    assert words in refused["message"]


def test_what_is_strange_about_the_pictures_is_said(
    world: World, ask: Callable[..., dict[str, Any]], capsys: Capture
) -> None:
    draw_pictures(Path("other"), 10)
    Path("other/night").rename("other/dusk")
    assert main([*world.words(MEASURE), "--data", "other"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [note.split(":")[1] for note in notes[-2:]] == [
        " not the pictures this model was trained on",
        " other (10 images) has other classes (day, dusk) than the model (day, night)",
    ]
    body = ask(f"{MEASURE} --data other")
    assert [f"note: {warning}" for warning in body["warnings"]] == notes[-2:]
    assert json.loads((world.run / "evaluation.json").read_text())["warnings"] == body["warnings"]
    assert ask(MEASURE)["warnings"] == []


def test_the_demo_and_the_demo_again(
    ask: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few steps, few samples and no figures, which other tests look at."""
    few = {"max_train_steps": 2, "train_batch_size": 4, "val_fraction": 0.01}
    monkeypatch.setitem(_demo.DEMO, "digits", few)
    monkeypatch.setattr(_demo, "measure", lambda run, options, out: {**BODY})
    first = ask("demo --output-dir new")
    assert (first["schema"], first["step"], first["run_dir"]) == ("undiffuse.demo/1", 2, "new")
    assert Path("new/samples/final.png").stat().st_size > 1000
    assert b"<html" in Path(first["report"]).read_bytes()
    assert ask("demo --output-dir new")["step"] == 2
    refused = ask("demo --output-dir new --seed 1", code=2)
    assert "seed 0, this one has 1" in refused["message"]


def test_the_demo_measures_as_evaluate_does() -> None:
    assert runs.EvaluateOptions() == _demo.MEASURED
    assert replace(_demo.MEASURED.sampling, batch_size=64) == SampleConfig()


# --- describe, env ------------------------------------------------------------------------------


def test_describe_names_what_there_is(ask: Callable[..., dict[str, Any]]) -> None:
    body = ask("describe")
    counts = {one["name"]: one["parameters"] for one in body["presets"]}
    assert counts["ddpm"] == 35_746_307
    assert "dpmpp_2m" in body["known"]["samplers"]


def test_describe_a_preset(world: World, capsys: Capture) -> None:
    assert main(["describe", "tiny", "--resolution", "20x16", "--channels", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("pictures of 1x20x16")
    assert lines[3].split()[:3] == ["00_conv", "Conv(32)", "32x20x16"]
    assert "01_skip" in lines[4]
    assert lines[-1].endswith("GFLOP per picture and step")


def test_describe_sums_up(ask: Callable[..., dict[str, Any]]) -> None:
    body = ask("describe adm-64 --classes 10")
    # what lies between the ops is the embedding of time and class
    rest = body["components"]["time_embed"]
    assert sum(op["parameters"] for op in body["ops"]) + rest == body["parameters"]
    assert sum(body["components"].values()) == body["parameters"]


@pytest.mark.parametrize("target", ["{run}", "{model}"])
def test_describe_a_run(target: str, ask: Callable[..., dict[str, Any]]) -> None:
    body = ask(f"describe {target}")
    assert body["size"] == [SIZE, SIZE]
    assert body["facts"]["classes"] == ", ".join(CLASSES)
    assert body["facts"]["steps"] == STEPS


@pytest.mark.parametrize(("end", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_describe_draws(end: str, start: bytes, capsys: Capture) -> None:
    assert main(["describe", "tiny", "--output", f"u.{end}"]) == 0
    assert capsys.readouterr().out.endswith(f"\ndrawn: u.{end}\n")
    assert Path(f"u.{end}").read_bytes().startswith(start)


def test_describe_animates(capsys: Capture) -> None:
    """T000-3, T001-4: the data flow, moving."""
    assert main(["describe", "tiny", "--output", "flow.svg", "--animate"]) == 0
    assert capsys.readouterr().out.endswith("\ndrawn: flow.svg\n")
    moving = Path("flow.svg").read_text(encoding="utf-8")
    assert "@keyframes pulse" in moving
    assert "parameters" in moving
    assert "multiply-adds" in moving
    assert main(["describe", "tiny", "--output", "still.svg"]) == 0
    assert "@keyframes" not in Path("still.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("describe tiny --animate", "needs a file"),
        ("describe tiny --animate --output flow.png", "an animation is saved as .svg"),
        ("describe --animate", "needs a network"),
        ("describe {pictures} --animate", "is for networks"),
    ],
)
def test_describe_says_what_cannot_move(
    words: str, said: str, ask: Callable[..., dict[str, Any]]
) -> None:
    assert said in ask(words, code=2)["message"]
    assert not Path("flow.png").exists()


def test_describe_pictures(ask: Callable[..., dict[str, Any]]) -> None:
    body = ask("describe {pictures} --output sheet.png")
    assert body["images"] == 12
    assert body["classes"] == list(CLASSES)
    assert sum(body["class_images"]) == 12
    assert (body["channels"], body["size"]) == (3, [SIZE, SIZE])
    with Image.open("sheet.png") as sheet:
        assert sheet.size[0] > 3 * SIZE


def test_describe_pictures_of_different_sizes(
    ask: Callable[..., dict[str, Any]], capsys: Capture
) -> None:
    for index, (height, width) in enumerate([(6, 8), (600, 300), (6, 8)]):
        Path("mixed").mkdir(exist_ok=True)
        pixels = np.full((height, width, 3), 50 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(f"mixed/{index}.png")
    Path("mixed/notes.txt").write_text("")
    body = ask("describe mixed --output sheet.png")
    assert (body["images"], body["size"], body["ignored"]) == (3, None, {".txt": 1})
    assert body["sizes"] == [{"size": [6, 8], "images": 2}, {"size": [600, 300], "images": 1}]
    assert Path("sheet.png").exists()
    assert main(["describe", "mixed"]) == 0
    said = capsys.readouterr().out
    assert "6x8" in said
    assert "add --resolution HxW" in said
    assert ask("describe mixed --resolution 16x12")["size"] == [16, 12]
    assert main(["describe", "mixed", "--resolution", "16x12"]) == 0
    assert "add --resolution" not in capsys.readouterr().out


def test_env_says_what_a_bug_report_needs(
    ask: Callable[..., dict[str, Any]], capsys: Capture
) -> None:
    body = ask("env")
    assert body["undiffuse"] == undiffuse.__version__
    assert body["torch"] == torch.__version__
    assert main(["env"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["torch", torch.__version__] in lines

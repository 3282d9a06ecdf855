"""`undiffuse likelihood` on a small model: what it prints, measures and refuses."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_world import draw_pictures
from undiffuse import runs
from undiffuse.checkpoint import Model, Pictures, load_model, save_model
from undiffuse.cli import main
from undiffuse.config import DataConfig, RunConfig, flatten
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.likelihood import _measure
from undiffuse.noise import Karras
from undiffuse.runs import LikelihoodOptions, Side
from undiffuse.spec import Conv, Out, Res, UNetSpec
from undiffuse.unet import UNet

Capture = pytest.CaptureFixture[str]
Ask = Callable[..., dict[str, Any]]
QUICK = "--num-images 2 --num-probes 2 --tolerance 5"


def filled(classes: int, null: bool) -> UNet:
    """One block with a weight in every place."""
    net = UNet(UNetSpec(3, 3, (Conv(4), Res(4), Out())).with_classes(classes, null))
    generator = torch.Generator().manual_seed(classes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
    return net.eval()


def save(path: Path, classes: int = 2, null: bool = True) -> Path:
    denoiser = Denoiser(filled(classes, null), Karras(), KarrasPrecond(0.5))
    names = ("day", "night")[:classes]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, Model(denoiser, Pictures(8, 8, 3, 8, names), {"steps": 7}))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures; a run on them that knows their classes; models that know none, or nothing else;
    other pictures."""
    root = tmp_path_factory.mktemp("likelihood")
    pictures = draw_pictures(root / "pictures", 40)
    config = RunConfig(data=DataConfig(str(pictures), val_fraction=0.2))
    save(root / "run" / "model.safetensors")
    (root / "run" / "config.json").write_text(json.dumps(flatten(config)))
    save(root / "plain.safetensors", classes=0, null=False)
    save(root / "told.safetensors", classes=2, null=False)
    dice = random.Random(1)
    numbers = [dice.uniform(-1, 1) for _ in range(30 * 3 * 64)]
    floats = np.array(numbers, dtype=np.float32).reshape(30, 8, 8, 3)
    np.savez(root / "floats.npz", images=floats)
    return root


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about what is asked and told; test_likelihood.py is about the numbers."""
    monkeypatch.setattr(_measure, "GRIDS", (9, 10))


@pytest.fixture
def ask(root: Path, capsys: Capture) -> Ask:
    """A command with --json that succeeds: its one object."""

    def answer(line: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*line.format(root=root).split(), "--json", "--quiet"]) == 0
        (only,) = capsys.readouterr().out.splitlines()
        return json.loads(only)

    return answer


def test_both_splits_of_a_run(ask: Ask) -> None:
    body = ask(f"likelihood {{root}}/run {QUICK}")
    assert (body["schema"], body["status"]) == ("undiffuse.likelihood/1", "ok")
    train, held_out = body["splits"]
    assert (train["name"], held_out["name"]) == ("train", "held-out")
    for split in (train, held_out):
        assert split["pictures"] == len(split["bits"]) == 2
        assert split["bits_per_dimension"] == pytest.approx(np.mean(split["bits"]), abs=1e-5)
        assert split["probe_error"] > 0
        assert split["truncation_error"] == 0
    apart = body["held_out_minus_train"]
    assert apart["value"] == pytest.approx(
        held_out["bits_per_dimension"] - train["bits_per_dimension"]
    )
    both = np.hypot(train["standard_error"], held_out["standard_error"])
    assert apart["standard_error"] == pytest.approx(both)
    assert body["reading"] == "256 levels per value"
    assert body["low"] == pytest.approx(0.002)
    assert (body["trace"], body["values"], body["trained_steps"]) == ("2 probes", 192, 7)
    assert body["warnings"] == []


def test_the_numbers_are_those_of_the_library(root: Path, ask: Ask) -> None:
    """And the same again; another seed draws otherwise."""
    line = f"likelihood {{root}}/run --split held-out {QUICK}"
    body = ask(line)
    (only,) = body["splits"]
    assert body["held_out_minus_train"] is None
    model = runs.load(root / "run")
    options = LikelihoodOptions(2, Side.HELD_OUT, num_probes=2, tolerance=5.0)
    found = runs.run_likelihood(root / "run", model, options)
    assert only["bits"] == pytest.approx(found.found["held-out"].bits.tolist(), abs=1e-6)
    assert ask(line) == body
    assert ask(f"{line} --seed 1")["splits"][0]["bits"] != only["bits"]


def test_classes_are_told_where_asked_or_where_they_must(ask: Ask) -> None:
    line = f"likelihood {{root}}/run --split train {QUICK}"
    alone, told = ask(line), ask(f"{line} --given-class")
    assert (alone["given_class"], told["given_class"]) == (False, True)
    assert alone["splits"][0]["bits"] != told["splits"][0]["bits"]
    must = ask(f"likelihood {{root}}/told.safetensors --data {{root}}/pictures {QUICK}")
    assert must["given_class"] is True
    never = ask(f"likelihood {{root}}/plain.safetensors --data {{root}}/pictures {QUICK}")
    assert never["given_class"] is False


def test_the_null_label_is_asked_where_no_class_is_told(root: Path) -> None:
    """Relabelled pictures have the same bits alone, and other bits given their class."""
    model = load_model(root / "run" / "model.safetensors")
    options = LikelihoodOptions(2, Side.TRAIN, num_probes=2, tolerance=5.0)
    null = model.net.embedding
    assert null is not None
    assert null.labels is not None
    before = {c: bits(model, root, replace(options, given_class=c)) for c in (False, True)}
    with torch.no_grad():
        null.labels.weight[:2] += 1.0
    after = {c: bits(model, root, replace(options, given_class=c)) for c in (False, True)}
    assert before[False] == after[False]
    assert before[True] != after[True]


def bits(model: Model, root: Path, options: LikelihoodOptions) -> list[float]:
    return runs.run_likelihood(root / "run", model, options).found["train"].bits.tolist()


def test_numbers_have_a_density(ask: Ask) -> None:
    body = ask(f"likelihood {{root}}/plain.safetensors --data {{root}}/floats.npz {QUICK}")
    assert body["reading"] == "numbers under noise"


def test_an_exact_trace_on_request(ask: Ask) -> None:
    body = ask(
        "likelihood {root}/plain.safetensors --data {root}/pictures --split train"
        " --num-images 1 --num-probes exact --tolerance 5"
    )
    (only,) = body["splits"]
    assert body["trace"] == "exact"
    assert only["products"] == 192 * (9 + 10 + 2)
    assert (only["standard_error"], only["probe_error"]) == (None, 0)


def test_what_misses_the_tolerance_is_said(ask: Ask) -> None:
    line = "likelihood {root}/plain.safetensors --data {root}/pictures --split train"
    body = ask(f"{line} --num-images 1 --num-probes 2 --tolerance 1e-12")
    assert [w for w in body["warnings"] if "1 of 1 train pictures miss the tolerance of 1e-12" in w]


def test_as_lines(root: Path, capsys: Capture) -> None:
    assert main(f"likelihood {root}/run {QUICK}".split()) == 0
    heading, train, held_out, apart, how = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["pictures", "bits/dim"]
    assert train.startswith("train ")
    assert held_out.startswith("held-out ")
    assert apart.startswith("held-out minus train: ")
    assert "±" in apart
    assert "256 levels per value" in how
    assert "trace: 2 probes" in how
    # two pictures are repeated for both probes: 2 + 5 * 10 + 2 * 10, and 2 + 5 * 11 + 2 * 11
    assert "151 network evaluations, with the copies in small batches, and 42 products" in how


REFUSED = {
    "{root}/run --split test": (2, "split must be one of train, held-out, both; got 'test'"),
    "{root}/run --num-images 0": (2, "num_images", "at least 1", "'0'"),
    "{root}/run --num-probes 1": (2, "num_probes", "at least 2", "'1'"),
    "{root}/run --num-probes few": (2, "num_probes", "'few'"),
    "{root}/run --tolerance 0 --num-images 1": (2, "tolerance", "above 0"),
    "{root}/run --tolerance nan": (2, "tolerance", "finite", "'nan'"),
    "{root}/run --seed -1": (2, "seed", "'-1'"),
    "{root}/plain.safetensors": (2, "data is missing", "--data"),
    "{root}/plain.safetensors --data {root}/pictures --given-class": (
        *(2, "given_class", "without classes"),
    ),
    "{root}/run --data {root}/floats.npz --given-class": (2, "given_class", "classes of this"),
    "{root}/told.safetensors --data {root}/floats.npz": (2, "must be told", "classes"),
    "{root}/run --data nowhere": (3, "nowhere"),
    "{root}/nothing": (4, "No run", "nothing"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_ends_in_one_line(line: str, root: Path, capsys: Capture) -> None:
    code, *words = REFUSED[line]
    assert main(["likelihood", *line.format(root=root).split()]) == code
    out, err = capsys.readouterr()
    assert not out
    assert all(str(word) in err for word in words), err
    assert err.count("\n") == 1

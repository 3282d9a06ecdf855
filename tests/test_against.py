"""Two models, or sets of pictures, compared: which differences are real, and which are chance."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from undiffuse import runs
from undiffuse.checkpoint import Model, Pictures, save_model
from undiffuse.cli import _against as lines
from undiffuse.cli import main
from undiffuse.config import Device, SampleConfig
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation import (
    Contender,
    Figure,
    FigureDifference,
    Split,
    _compare_samples,
    compare_losses,
    compare_samples,
    loss_by_level,
)
from undiffuse.noise import Flow, Karras, NoiseLevel, Schedule
from undiffuse.oracles import Gaussian
from undiffuse.recipes import preset
from undiffuse.runs import _against
from undiffuse.unet import UNet

# --- figures of samples -------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    figures: tuple[Figure, ...]


def mean_alone(
    samples: Split,
    train: Split,
    held_out: Split,
    *,
    seed: int,
    features: object,
    search: Iterable[Tensor] | None,
) -> Report:
    """One figure, whose scatter is known: the mean of the pixels. Higher is better, up to 9."""
    value = float(samples.x0.mean())
    return Report((Figure("mean", value, 9.0, 0.1, "higher", len(samples), "pixels"),))


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compare_samples, "sample_quality", mean_alone)


NOTHING = Split(torch.zeros(2, 1, 1, 1))


def compared(a: Tensor, b: Tensor, **options: Any) -> FigureDifference:
    (one,) = compare_samples(Split(a), Split(b), NOTHING, NOTHING, **options)
    return one


def values(count: int, seed: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(count, 1, 1, 1, generator=generator)


@pytest.mark.usefixtures("simple")
def test_the_spread_is_that_of_a_difference_of_means() -> None:
    """4.03 standard errors of sqrt(2 / n), on average over draws."""
    spreads = [compared(values(400, 2 * i), values(400, 2 * i + 1)).spread for i in range(30)]
    squared = np.mean(np.square(np.array(spreads, dtype=float)))
    assert np.sqrt(squared) == pytest.approx(_compare_samples.SURE * (2 / 400) ** 0.5, rel=0.1)


@pytest.mark.usefixtures("simple")
def test_chance_is_seldom_taken_for_a_difference() -> None:
    found = [compared(values(60, 2 * i), values(60, 2 * i + 1)).better for i in range(150)]
    assert found.count("no difference seen") >= 143


@pytest.mark.usefixtures("simple")
@pytest.mark.parametrize(("mean", "better"), [(1.5, "a"), (-1.5, "b")])
def test_a_real_difference_is_seen(mean: float, better: str) -> None:
    one = compared(values(200, 1, mean), values(200, 2))
    assert one.better == better
    assert one.difference == pytest.approx(mean, abs=0.3)
    assert one.difference == one.a - one.b  # type: ignore[operator]


@pytest.mark.usefixtures("simple")
def test_what_the_seed_has_in_common_falls_out() -> None:
    shared = values(100, 1)
    one = compared(shared + 0.01, shared)
    assert one.better == "a"
    assert one.spread == pytest.approx(0, abs=1e-6)
    same = compared(shared, shared)
    assert (same.difference, same.spread, same.better) == (0.0, 0.0, "no difference seen")


@pytest.mark.usefixtures("simple")
def test_further_than_real_pictures_is_no_merit() -> None:
    assert compared(values(100, 1, 15.0), values(100, 2, 11.0)).better == "no difference seen"
    assert compared(values(100, 1, 15.0), values(100, 2, 7.0)).better == "a"


@pytest.mark.usefixtures("simple")
def test_too_few_samples_have_no_spread() -> None:
    one = compared(values(3, 1), values(3, 2, 5.0))
    assert (one.spread, one.better) == (None, "not measured")
    assert one.difference is not None
    with pytest.raises(DataError, match="as many samples of both; got 3 and 4"):
        compared(values(3, 1), values(4, 1))


@pytest.mark.usefixtures("simple")
def test_progress_and_search() -> None:
    seen: list[tuple[int, int]] = []
    searched: list[int] = []

    def search() -> Iterable[Tensor]:
        searched.append(1)
        return iter([torch.zeros(1, 1, 1, 1)])

    compared(values(8, 1), values(8, 2), search=search, progress=lambda *state: seen.append(state))
    assert seen == [(place, 22) for place in range(1, 23)]
    assert len(searched) == 2  # of all samples of either; halves are searched in `train`


# --- losses -------------------------------------------------------------------------------------


@dataclass
class Estimate:
    """Any estimate as denoiser; remembers whether it was told labels."""

    function: Callable[[Tensor, NoiseLevel, Tensor | None], Tensor]
    schedule: Schedule = field(default_factory=Karras)
    told: list[bool] = field(default_factory=list)

    def __call__(self, x: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor:
        self.told.append(label is not None)
        return self.function(x, level, label)


BASIS = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))[0].double()
TRUTH = Gaussian(torch.zeros(1, 3, 3), 0.5 ** torch.arange(9.0).double(), BASIS)
HELD_OUT = Split(
    TRUTH.draw(torch.randn(80, 1, 3, 3, generator=torch.Generator().manual_seed(1))),
    torch.arange(80) % 2,
)
EXACT = Estimate(TRUTH)
OFF = Estimate(lambda x, level, label: 0.5 * TRUTH(x, level))
RATIOS = (0.1, 0.5, 2.0)


def test_a_denoiser_does_not_differ_from_itself() -> None:
    made = compare_losses(Contender(OFF), Contender(OFF), HELD_OUT, draws=1, ratios=RATIOS)
    assert [level.better for level in made.levels] == ["no difference seen"] * 3
    assert made.nats_per_value.value == 0


def test_the_worse_denoiser_is_named_and_its_cost_summed() -> None:
    made = compare_losses(Contender(OFF), Contender(EXACT), HELD_OUT, draws=4, ratios=RATIOS)
    assert [level.better for level in made.levels] == ["b"] * 3
    for level in made.levels:
        assert level.difference.value == pytest.approx(level.a - level.b)
        assert level.percent.value == pytest.approx(100 * (level.a / level.b - 1))
        assert level.percent.low > 0  # type: ignore[operator]
    integrand = [level.difference.value / level.ratio**2 for level in made.levels]
    assert made.nats_per_value.value == pytest.approx(np.trapezoid(integrand, np.log(RATIOS)))
    body = json.loads(json.dumps(made.asdict()))
    assert body["nats_per_picture"]["value"] == pytest.approx(9 * made.nats_per_value.value)
    swapped = compare_losses(Contender(EXACT), Contender(OFF), HELD_OUT, draws=4, ratios=RATIOS)
    assert [level.better for level in swapped.levels] == ["a"] * 3


def test_errors_are_those_of_the_report_by_level() -> None:
    made = compare_losses(Contender(OFF), Contender(EXACT), HELD_OUT, draws=2, ratios=RATIOS)
    report = loss_by_level(OFF, HELD_OUT, HELD_OUT, draws=2, ratios=RATIOS)
    assert [level.a for level in made.levels] == [level.held_out for level in report.levels]


def test_schedules_may_differ() -> None:
    """Pictures and noise are the same at equal ratios, so an exact estimate has the same error."""
    other = replace(EXACT, schedule=Flow())
    made = compare_losses(
        Contender(EXACT), Contender(other), HELD_OUT, draws=1, ratios=(*RATIOS, 50.0)
    )
    for level in made.levels:
        assert level.b == pytest.approx(level.a, rel=1e-3)
    narrow = replace(EXACT, schedule=Karras(0.3, 3.0))
    made = compare_losses(Contender(EXACT), Contender(narrow), HELD_OUT, draws=1, ratios=RATIOS)
    assert [level.ratio for level in made.levels] == pytest.approx([0.5, 2.0])
    low = replace(EXACT, schedule=Karras(0.05, 0.2))
    with pytest.raises(ConfigError, match="share none of the noise levels"):
        compare_losses(Contender(low), Contender(narrow), HELD_OUT, ratios=RATIOS)


def test_labels_are_told_only_where_one_cannot_do_without() -> None:
    plain, told = replace(EXACT, told=[]), replace(EXACT, told=[])
    needs = Contender(told, labelled=True, null=False)
    made = compare_losses(Contender(plain, labelled=True), needs, HELD_OUT, draws=1, ratios=(0.5,))
    assert made.judged == "with label"
    assert set(plain.told) == set(told.told) == {True}
    with pytest.raises(ConfigError, match="one of the denoisers must be told the class"):
        compare_losses(Contender(plain), needs, HELD_OUT, ratios=(0.5,))


def test_senseless_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="draws and batch_size must be at least 1; got 0"):
        compare_losses(Contender(EXACT), Contender(EXACT), HELD_OUT, draws=0)
    with pytest.raises(DataError, match="no held-out pictures"):
        compare_losses(Contender(EXACT), Contender(EXACT), HELD_OUT.at(slice(0)))


# --- runs, model files, pictures ----------------------------------------------------------------


def save_tiny(path: Path, seed: int, side: int = 8) -> None:
    """A network whose last layer, zero at first, is made to matter."""
    net = UNet(preset("tiny", 1))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    save_model(path, Model(Denoiser(net, Karras(), KarrasPrecond(0.5)), Pictures(side, side, 1)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, real pictures, and pictures of another program."""
    root = tmp_path_factory.mktemp("place")
    for name, seed in (("a", 0), ("b", 1)):
        (root / name).mkdir()
        save_tiny(root / name / "model.safetensors", seed)
    save_tiny(root / "wide.safetensors", 0, side=16)
    dice = np.random.default_rng(0)
    for name, count, side in (("real", 40, 8), ("made", 7, 8), ("large", 9, 16)):
        pixels = dice.integers(0, 256, (count, side, side), dtype=np.uint8)
        np.savez(root / f"{name}.npz", images=pixels, labels=np.arange(count) % 2)
    return root


@pytest.fixture
def options(place: Path, monkeypatch: pytest.MonkeyPatch) -> runs.EvaluateOptions:
    monkeypatch.setattr(_compare_samples, "SPLITS", 1)
    return runs.EvaluateOptions(
        num_samples=8,
        draws=1,
        sampling=SampleConfig(num_inference_steps=2, batch_size=8),
        data=str(place / "real.npz"),
        device=Device.CPU,
    )


def test_a_run_against_its_own_model_file(place: Path, options: runs.EvaluateOptions) -> None:
    made = runs.compare_runs(place / "a", place / "a" / "model.safetensors", options)
    assert (made.a["kind"], made.b["kind"]) == ("run", "model file")
    for figure in made.figures:
        assert figure.a == figure.b
        assert figure.better in ("no difference seen", "not measured")
    assert made.losses is not None
    assert {level.better for level in made.losses.levels} == {"no difference seen"}
    body = made.asdict()
    assert json.loads(json.dumps(body))["schema"] == "undiffuse.against/1"
    assert body["losses"]["nats_per_picture"]["value"] == 0
    assert made.settings["num_samples"] == 8


def test_two_models_differ(place: Path, options: runs.EvaluateOptions, simple: None) -> None:
    seen: list[str] = []
    made = runs.compare_runs(
        place / "a", place / "b", options, lambda what, done, total: seen.append(what)
    )
    (figure,) = made.figures
    assert figure.difference != 0
    assert made.losses is not None
    assert any(level.better in "ab" for level in made.losses.levels)
    assert list(dict.fromkeys(seen)) == ["samples of A", "samples of B", "figures", "losses"]
    sample = runs.generate(
        runs.load(place / "b", device="cpu"), 8, num_inference_steps=2, batch_size=8
    )
    assert figure.b == pytest.approx(float(sample.mean()), abs=1e-6)


def test_pictures_of_another_program(
    place: Path, options: runs.EvaluateOptions, simple: None
) -> None:
    made = runs.compare_runs(place / "a", place / "made.npz", options)
    assert made.b == {"path": str(place / "made.npz"), "kind": "pictures", "pictures": 7}
    assert made.settings["num_samples"] == 7
    assert "7 samples of each: B has no more pictures" in made.notes
    assert "losses by noise level were not compared: no model came with B" in made.notes
    assert made.losses is None
    pixels = np.load(place / "made.npz")["images"] / 127.5 - 1
    assert made.figures[0].b == pytest.approx(pixels.mean(), abs=1e-5)


def test_two_sets_of_pictures_with_classes(
    place: Path, options: runs.EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []

    def remember(samples: Split, *sets: Split, **rest: Any) -> Report:
        told.append(samples.label is not None)
        return mean_alone(samples, *sets, **rest)

    monkeypatch.setattr(_compare_samples, "sample_quality", remember)
    made = runs.compare_runs(place / "made.npz", place / "real.npz", options)
    assert set(told) == {True}
    assert made.notes[-1].endswith("no model came with A and B")
    with pytest.raises(ConfigError, match="data is missing: neither A nor B is a run"):
        runs.compare_runs(place / "made.npz", place / "made.npz", replace(options, data=None))


def test_evenly_spread_pictures_with_their_labels(place: Path) -> None:
    stored = _against._stored(place / "real.npz", None)
    some = stored.some(10)
    assert some.x0.shape == (10, 1, 8, 8)
    assert some.label is not None
    everything = stored.some(len(stored))
    where = [int((everything.x0 == one).flatten(1).all(1).nonzero()[0]) for one in some.x0]
    assert where == [place * 40 // 10 for place in range(10)]
    assert torch.equal(some.label, everything.label[where])  # type: ignore[index]


@pytest.mark.parametrize(
    ("a", "b", "code", "words"),
    [
        ("a", "nowhere", 4, "No run or model file at"),
        ("a", "large.npz", 3, "B ({root}/large.npz) has pictures of (1, 16, 16)"),
        ("a", "wide.safetensors", 3, "compare pictures of one shape"),
        ("large.npz", "a", 3, "A ({root}/large.npz) has pictures of (1, 16, 16)"),
        ("a --pareto", "b", 2, "pareto does not go with --against"),
        ("a --fail-above frechet=1", "b", 2, "fail_above does not go with --against"),
        ("a --autoguidance early", "b", 2, "autoguidance does not go with --against"),
        ("a --checkpoint 3", "b", 4, "no checkpoints"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    place: Path, a: str, b: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, *rest = a.split()
    line = ["evaluate", str(place / run), *rest, "--against", str(place / b)]
    assert main([*line, "--data", str(place / "real.npz"), "--device", "cpu"]) == code
    assert words.format(root=place) in capsys.readouterr().err


def test_the_command(
    place: Path,
    options: runs.EvaluateOptions,
    simple: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["evaluate", str(place / "a"), "--against", str(place / "b"), "--num-samples", "8"]
    line += ["--data", str(options.data), "--draws", "1", "--num-inference-steps", "2"]
    assert main([*line, "--device", "cpu", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["schema"] == "undiffuse.against/1"
    assert body["figures"][0].keys() >= {"name", "a", "b", "difference", "spread", "better"}
    assert len(body["losses"]["levels"]) == 9


def test_more_pictures_than_fit_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any is drawn; of pictures there are no more than there are."""
    many = ["--num-samples", "10000000000", "--data", str(place / "real.npz"), "--device", "cpu"]
    assert main(["evaluate", str(place / "a"), "--against", str(place / "b"), *many]) == 7
    assert "num_samples: 20,000,000,000 pictures of 8x8 need" in capsys.readouterr().err
    made = [runs.holds_model(place / name) for name in ("a", "wide.safetensors", "made.npz")]
    assert made == [True, True, False]


def test_lines(place: Path, options: runs.EvaluateOptions, simple: None) -> None:
    made = runs.compare_runs(place / "a", place / "b", options)
    figure = FigureDifference("recall", 0.9, 0.5, 0.4, 0.123, 0.95, "higher", "a")
    text = lines.comparison_lines(replace(made, figures=(figure,)))
    assert text[0] == f"A: {place / 'a'} (run)"
    assert text[3].split() == ["sigma/alpha", "A", "B", "A", "above", "B,", "%", "better"]
    assert any(line.startswith("held-out error without label; A - B summed") for line in text)
    assert text[-2].split() == ["recall", "0.9", "0.5", "+0.4", "±", "0.12", "0.95", "A"]
    none = replace(figure, a=None, difference=None, spread=None, better="not measured")
    text = lines.comparison_lines(replace(made, figures=(none,), losses=None))
    assert text[-2].split() == ["recall", "-", "0.5", "-", "0.95", "not", "measured"]
    assert not any("sigma/alpha" in line for line in text)


def test_a_copy_of_a_run_has_no_difference_even_where_b_was_trained_elsewhere(
    place: Path, tmp_path: Path, options: runs.EvaluateOptions, simple: None
) -> None:
    """But it is said that B may know the pictures held out."""
    for name in ("one", "two"):
        shutil.copytree(place / "a", tmp_path / name)
        model = runs.load(place / "a", device="cpu")
        known = replace(model, trained={"data_fingerprint": name})
        save_model(tmp_path / name / "model.safetensors", known)
    made = runs.compare_runs(tmp_path / "one", tmp_path / "two", options)
    assert made.figures[0].difference == 0
    assert any("may know those held out by the other" in note for note in made.notes)

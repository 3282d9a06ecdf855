"""Measures against closed forms, bars against oracles, and sets too small to measure."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation import (
    FIGURES,
    RATIOS,
    Features,
    Figure,
    LevelReport,
    SampleReport,
    Split,
    _bars,
    _features,
    _floors,
    frechet_distance,
    frechet_floor,
    loss_by_level,
    precision_recall,
    sample_quality,
    summary,
)
from undiffuse.noise import Flow, Karras, LinearBetas, NoiseLevel, Schedule
from undiffuse.oracles import FiniteSet, Gaussian, Mixture, fit_gaussian

Estimate = Callable[[Tensor, NoiseLevel, Tensor | None], Tensor]


@dataclass
class Model:
    """An oracle as denoiser; remembers whether it was told labels."""

    estimate: Estimate
    schedule: Schedule = field(default_factory=Karras)
    told: list[bool] = field(default_factory=list)

    def __call__(self, x: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor:
        self.told.append(label is not None)
        return self.estimate(x, level, label)


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    """1,437 digits to train on, 360 held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.data))
    x0 = torch.tensor(data.data[order] / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    everything = Split(x0, torch.tensor(data.target[order]))
    return everything.at(slice(1437)), everything.at(slice(1437, None))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier that hardly learns and few draws, where they are not the question."""
    monkeypatch.setattr(_features, "CLASSIFIER_STEPS", 4)
    monkeypatch.setattr(_floors, "DRAWS", 2)


def unlabelled(split: Split) -> Split:
    return replace(split, label=None)


def figure(report: SampleReport, name: str) -> Figure:
    (found,) = (f for f in report.figures if f.name == name)
    return found


def random_split(count: int, shape: tuple[int, ...] = (1, 6, 5), classes: int = 0) -> Split:
    generator = torch.Generator().manual_seed(count)
    x0 = torch.rand(count, *shape, generator=generator) * 2 - 1
    return Split(x0, torch.arange(count) % classes if classes else None)


# --- measures -----------------------------------------------------------------------------------


def test_frechet_distance_of_commuting_gaussians() -> None:
    a = np.random.default_rng(0).standard_normal((50, 3))
    stretch, shift = np.array([2.0, 0.5, 3.0]), np.array([1.0, -2.0, 0.0])
    axes = np.linalg.svd(a - a.mean(0), full_matrices=False)[2]  # a's own: covariances commute
    b = (a - a.mean(0)) @ axes.T * stretch @ axes + a.mean(0) + shift
    spread = np.sqrt(np.linalg.eigvalsh(np.cov(a.T))[::-1])
    expected = np.square(shift).sum() + np.square(spread * (stretch - 1)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_general_gaussians_in_the_plane() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((30, 2)) @ rng.standard_normal((2, 2)) for _ in range(2))
    c, d = np.cov(a.T), np.cov(b.T)
    # for 2 x 2: (tr M^1/2)^2 = tr M + 2 sqrt(det M)
    cross = math.sqrt(np.trace(c @ d) + 2 * math.sqrt(np.linalg.det(c @ d)))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c) + np.trace(d) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("values", [np.ones(6), np.array([4.0, 1.0, 0.25, 0.0])])
def test_frechet_floor_is_the_mean_over_simulated_pairs(values: np.ndarray) -> None:
    rng, n, m = np.random.default_rng(2), 400, 300
    draws = [
        frechet_distance(*(rng.standard_normal((k, len(values))) * np.sqrt(values) for k in (n, m)))
        for _ in range(300)
    ]
    error = np.std(draws) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - frechet_floor(values, n, m)) < 4 * error + 0.01 * np.mean(draws)


def test_frechet_floor_of_whitened_dimensions() -> None:
    assert frechet_floor(np.ones(32), 360, 360) == pytest.approx(2 / 360 * 32 * 37 / 4)


def test_precision_and_recall_by_hand() -> None:
    real, fake = np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [30.0], [31.0]])
    # k = 1: real radii 1, 1, 9 cover 0.5 alone; fake radii 29.5, 1, 1 cover all of real
    assert precision_recall(real, fake, k=1) == (pytest.approx(1 / 3), 1.0)
    assert precision_recall(fake, real, k=1) == (1.0, pytest.approx(1 / 3))


def test_a_lost_mode_costs_recall_and_bad_pictures_cost_precision() -> None:
    rng = np.random.default_rng(3)
    modes = np.repeat([[0.0, 0, 0, 0], [50.0, 0, 0, 0]], 150, axis=0)
    real = modes + rng.standard_normal(modes.shape)
    one_mode = rng.standard_normal((300, 4))
    lost = precision_recall(real, one_mode)
    assert lost.precision > 0.9
    assert lost.recall == pytest.approx(0.5, abs=0.05)
    spoiled = modes + rng.standard_normal(modes.shape)
    spoiled[::3] += 20
    noisy = precision_recall(real, spoiled)
    assert noisy.precision == pytest.approx(2 / 3, abs=0.05)
    assert noisy.recall > 0.9


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 8), st.integers(0, 99))
def test_every_copy_is_precise(n: int, copies: int, k: int, seed: int) -> None:
    real = np.random.default_rng(seed).standard_normal((n, 3))
    fake = np.concatenate([real[:copies], real[:1]])
    assert precision_recall(real, fake, k).precision == 1.0


# --- samples ------------------------------------------------------------------------------------


def gaussian_fit(train: Split, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return fit_gaussian(train.x0).draw(torch.randn(count, 1, 8, 8, generator=generator))


@pytest.fixture(scope="module")
def exposed(digits: tuple[Split, Split]) -> SampleReport:
    """A Gaussian fit of the digits, passed off as digits."""
    train, held_out = digits
    assert train.label is not None
    return sample_quality(Split(gaussian_fit(train, 700), train.label[:700]), train, held_out)


def test_all_figures_are_listed(exposed: SampleReport) -> None:
    assert (*(f.name for f in exposed.figures),) == tuple(
        name
        for name in FIGURES
        if name != "frechet_raw"  # of given features alone
    )


def test_floors_on_digits(exposed: SampleReport) -> None:
    floors = {f.name: f.floor for f in exposed.figures}
    assert floors["class_accuracy"] >= 0.97
    assert floors["frechet"] == pytest.approx(frechet_floor(np.ones(32), 360, 360), rel=0.15)
    assert floors["frechet_pca"] == pytest.approx(frechet_floor(np.ones(32), 360, 360), rel=0.15)
    for name in ("precision", "recall", "precision_pca", "recall_pca"):
        assert floors[name] > 0.94
    assert floors["copies"] == 0
    assert {f.name: f.n for f in exposed.figures}["frechet"] == 360
    assert not any(f.warning for f in exposed.figures)


def test_a_gaussian_fit_is_exposed(exposed: SampleReport) -> None:
    assert figure(exposed, "class_accuracy").value < 0.2
    assert figure(exposed, "precision").value < 0.5
    assert figure(exposed, "precision_pca").value < 0.5
    assert figure(exposed, "frechet").value > 3 * figure(exposed, "frechet").floor
    assert figure(exposed, "copies").value == 0


@pytest.mark.usefixtures("quick")
def test_copies_are_found_and_named(digits: tuple[Split, Split]) -> None:
    train, held_out = digits
    places = torch.randperm(len(train), generator=torch.Generator().manual_seed(5))[:60]
    shaken = train.x0[places] + 0.002
    twice = Split(torch.cat([train.x0, train.x0]))  # a copy must not hide behind its double
    report = sample_quality(Split(shaken), twice, unlabelled(held_out))
    assert figure(report, "copies").value == 1.0
    assert figure(report, "copies").floor == 0.0
    assert len(report.closest) == 16
    for pair in report.closest:
        assert pair.train == places[pair.sample]
        assert pair.distance <= 0.0021
        assert pair.ratio < 0.01


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("size", [1, 97, 5000])
def test_copies_are_looked_for_in_all_chunks(digits: tuple[Split, Split], size: int) -> None:
    """Of pictures that the other measures never see; the same whatever the chunks are."""
    everything, held_out = digits
    some = everything.at(slice(0, 100))
    copied = torch.tensor([3, 700, 1200, 1436])
    samples = Split(torch.cat([everything.x0[copied] + 0.001, held_out.x0[:30]]))
    chunks = (chunk for chunk in everything.x0.split(size))  # read once
    report = sample_quality(samples, some, held_out, search=chunks)
    assert (report.train, report.train_searched) == (100, 1437)
    assert figure(report, "copies").value == pytest.approx(4 / 34)
    assert "1,437 training pictures" in figure(report, "copies").note
    closest = {pair.sample: pair.train for pair in report.closest}
    assert [closest[i] for i in range(4)] == copied.tolist()
    apart = (samples.x0.clamp(-1, 1)[:, None] - everything.x0[None]).flatten(2).double()
    first, second = apart.square().mean(2).sqrt().sort(1)[0][:, :2].unbind(1)
    for pair in report.closest:
        assert pair.distance == pytest.approx(float(first[pair.sample]), abs=1e-6)
        assert pair.ratio == pytest.approx(
            float(first[pair.sample] / second[pair.sample]), abs=1e-5
        )


def test_a_copy_does_not_hide_behind_its_double_in_another_chunk() -> None:
    train, samples = random_split(40), Split(random_split(40).x0[7:8])
    report = sample_quality(samples, train, NOTHING, search=[train.x0, train.x0])
    assert report.train_searched == 80
    assert figure(report, "copies").value == 1.0
    assert [(pair.train, pair.ratio) for pair in report.closest] == [(7, 0.0)]


def test_a_search_in_other_pictures_is_refused() -> None:
    split = random_split(4)
    with pytest.raises(DataError, match="pictures to search must have the shape"):
        sample_quality(split, split, split, search=[random_split(3, (3, 6, 5)).x0])


@pytest.mark.usefixtures("quick")
def test_real_pictures_stand_at_their_floor(digits: tuple[Split, Split]) -> None:
    train, held_out = digits
    report = sample_quality(held_out, train, held_out)
    for one in report.figures:
        if one.name.startswith(("precision", "recall", "class_accuracy", "authentic", "copies")):
            assert one.value == pytest.approx(one.floor, abs=1e-9)
        if one.name in ("frechet", "frechet_pca", "sliced", "spectrum", "pixel_mean", "pixel_std"):
            assert one.value == pytest.approx(0, abs=1e-9)
        if one.name.startswith(("density", "coverage")):
            assert one.value >= 1


@pytest.mark.usefixtures("quick")
def test_samples_depend_on_the_seed_alone(digits: tuple[Split, Split]) -> None:
    train, held_out = digits[0].at(slice(200)), digits[1].at(slice(100))
    samples = digits[0].at(slice(300, 450))
    before = torch.get_rng_state()
    first = sample_quality(samples, train, held_out, seed=3)
    torch.rand(7)
    assert sample_quality(samples, train, held_out, seed=3) == first
    torch.set_rng_state(before)
    other = sample_quality(samples, train, held_out, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert figure(other, "frechet") != figure(first, "frechet")


def test_the_classifier_sees_classes(
    digits: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearest class mean in its features names held-out digits."""
    monkeypatch.setattr(_features, "CLASSIFIER_STEPS", 60)
    train, held_out = digits
    features = _features.classifier_features(train, seed=0)
    points, unseen = features(train.x0), features(held_out.x0)
    assert points.shape == (1437, 32)
    np.testing.assert_allclose(np.cov(points.T), np.eye(32), atol=1e-6)
    means = np.stack([points[train.label.numpy() == c].mean(0) for c in range(10)])  # type: ignore[union-attr]
    named = np.square(unseen[:, None] - means).sum(2).argmin(1)
    assert (named == held_out.label.numpy()).mean() > 0.9  # type: ignore[union-attr]


def test_features_of_the_callers_choice_are_named() -> None:
    train, held_out, samples = random_split(60), random_split(55), random_split(50)
    mean_and_spread = Features(
        "two moments",
        lambda x0: torch.stack([x0.mean((1, 2, 3)), x0.std((1, 2, 3))], 1).double().numpy(),
    )
    report = sample_quality(samples, train, held_out, features=mean_and_spread)
    assert figure(report, "frechet").features == "two moments"
    assert figure(report, "frechet").value is not None
    assert not figure(report, "frechet").warning


def test_without_classes_components_are_used() -> None:
    report = sample_quality(random_split(80), random_split(200), random_split(90))
    names = {f.name for f in report.figures}
    in_features = {name.removesuffix("_pca") for name in FIGURES if name.endswith("_pca")}
    assert names == set(FIGURES) - in_features - {"frechet_raw"}
    assert "principal components" in figure(report, "frechet_pca").features
    accuracy = figure(report, "class_accuracy")
    assert accuracy.value is None
    assert "no classes" in accuracy.warning


@pytest.mark.usefixtures("quick")
def test_a_class_missing_from_the_held_out_pictures_is_named(digits: tuple[Split, Split]) -> None:
    train, held_out = digits[0].at(slice(300)), digits[1]
    assert held_out.label is not None
    report = sample_quality(train, train, held_out.at(held_out.label != 3))
    accuracy = figure(report, "class_accuracy")
    assert accuracy.value == 1.0
    assert "classes 3" in accuracy.warning


def test_samples_that_are_not_finite_are_counted() -> None:
    samples = random_split(30)
    samples.x0[3], samples.x0[7, 0, 0, 0] = torch.nan, torch.inf
    train = Split(torch.cat([random_split(40).x0, samples.x0[20:21]]))
    report = sample_quality(samples, train, random_split(20))
    assert report.not_finite == 2
    assert (report.closest[0].sample, report.closest[0].train) == (20, 40)


CONSTANT = Split(torch.zeros(12, 1, 4, 4), torch.arange(12) % 2)
NOTHING = Split(torch.zeros(0, 1, 6, 5), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize(
    ("samples", "train", "held_out"),
    [
        (random_split(20, classes=10), random_split(16, classes=10), random_split(4, classes=10)),
        (random_split(10, classes=1), random_split(9, classes=1), random_split(5, classes=1)),
        (random_split(10), random_split(9), random_split(1)),
        (random_split(10), random_split(9, classes=3), NOTHING),
        (random_split(1), random_split(1), random_split(1)),
        (random_split(2, classes=2), random_split(2, classes=2), random_split(2, classes=2)),
        (CONSTANT, CONSTANT, CONSTANT),
        (Split(random_split(3).x0 * torch.nan), random_split(9), random_split(8)),
        (Split(random_split(3).x0 * torch.nan), random_split(9), NOTHING),
        (
            Split(random_split(3, (3, 48, 40)).x0 * torch.nan),
            random_split(9, (3, 48, 40)),
            random_split(2, (3, 48, 40)).at(slice(0)),
        ),
        (random_split(9, (3, 48, 40)), random_split(30, (3, 48, 40)), random_split(8, (3, 48, 40))),
        (random_split(8, (1, 1, 1)), random_split(9, (1, 1, 1)), random_split(8, (1, 1, 1))),
        (random_split(9, classes=40), random_split(9, classes=2), random_split(9, classes=7)),
    ],
)
def test_small_and_odd_sets_give_warnings_not_errors(
    samples: Split, train: Split, held_out: Split
) -> None:
    report = sample_quality(samples, train, held_out)
    for one in report.figures:
        assert one.warning  # all these sets are too small to be trusted
        assert one.value is not None or "not measured" in one.warning
        assert one.value is None or math.isfinite(one.value)
    json.dumps(summary(None, report), allow_nan=False)


def test_samples_must_be_comparable() -> None:
    with pytest.raises(DataError, match="samples must have the shape"):
        sample_quality(random_split(4, (3, 6, 5)), random_split(4), random_split(4))
    with pytest.raises(DataError, match="nothing to compare: 0 samples"):
        sample_quality(NOTHING, random_split(4), random_split(4))
    with pytest.raises(DataError, match="4 pictures need as many labels"):
        Split(torch.zeros(4, 1, 2, 2), torch.zeros(3, dtype=torch.long))


# --- losses -------------------------------------------------------------------------------------

WIENER = (0.00198, 0.00697, 0.0222, 0.0400, 0.0761, 0.1233, 0.1701, 0.2281, 0.2808)
KDE = (0.00243, 0.00883, 0.0263, 0.0415, 0.0614, 0.0853, 0.1293, 0.2104, 0.2798)
MIXTURE = (0.00200, 0.00632, 0.0183, 0.0307, 0.0542, 0.0875, 0.1355, 0.2139, 0.2801)
GIVEN_CLASS = (0.00203, 0.00642, 0.0184, 0.0307, 0.0534, 0.0800, 0.1055, 0.1355, 0.1647)
TRAIN_OPTIMUM = (0.0, 0.0, 0.0, 0.0002, 0.0046, 0.0382, 0.1058, 0.2013, 0.2760)


@pytest.fixture(scope="module")
def wiener(digits: tuple[Split, Split]) -> LevelReport:
    """The Gaussian fit as the model."""
    train, held_out = digits
    return loss_by_level(Model(fit_gaussian(train.x0)), train, held_out, draws=2)


def test_bars_of_the_digits(wiener: LevelReport) -> None:
    """Measured before, with other noise, by other code."""
    assert tuple(level.ratio for level in wiener.levels) == pytest.approx(RATIOS)
    for place, level in enumerate(wiener.levels):
        assert level.bars["wiener"] == pytest.approx(WIENER[place], rel=0.04)
        assert level.bars["kde"] == pytest.approx(KDE[place], rel=0.04)
        assert level.bars["mixture"] == pytest.approx(MIXTURE[place], rel=0.04)
        assert level.mixture_given_class == pytest.approx(GIVEN_CLASS[place], rel=0.04)
        assert level.train_optimum == pytest.approx(TRAIN_OPTIMUM[place], rel=0.08, abs=2e-4)
        assert level.bar == min(level.bars.values()) == level.bars[level.bar_name]


def test_a_labelled_denoiser_is_held_to_what_knows_its_label(digits: tuple[Split, Split]) -> None:
    """To the smaller of the bar and the mixture given class: Wiener at 0.05, given class at 0.8."""
    train, held_out = digits
    fit = Model(fit_gaussian(train.x0))
    both = loss_by_level(fit, train, held_out, draws=1, ratios=(0.05, 0.8), labelled=True)
    always = loss_by_level(
        fit, train, held_out, draws=1, ratios=(0.05, 0.8), labelled=True, null=False
    )
    assert [level.bar_name for level in both.levels] == ["wiener", "kde"]
    assert [level.bar_name for level in always.levels] == ["wiener", "given_class"]
    for plain, told in zip(both.levels, always.levels, strict=True):
        assert plain.bar == min(plain.bars.values())
        assert told.mixture_given_class is not None
        assert told.bar == min(told.mixture_given_class, plain.bar)
        assert plain.gap_labelled == told.gap


def test_excess_is_the_gap_in_per_cent_of_the_bar(wiener: LevelReport) -> None:
    for level in wiener.levels:
        expected = 100 * (level.held_out / level.bar - 1)  # type: ignore[operator]
        assert level.excess.value == pytest.approx(expected, abs=1e-6)
        assert level.excess.low <= level.excess.value <= level.excess.high  # type: ignore[operator]
    assert wiener.nats_per_picture is not None
    assert wiener.nats_per_value is not None
    assert wiener.nats_per_picture.value == pytest.approx(64 * wiener.nats_per_value.value)


def test_the_bar_as_model_has_no_gap(wiener: LevelReport) -> None:
    assert wiener.levels[0].bar_name == "wiener"
    assert wiener.levels[0].gap.value == pytest.approx(0, abs=1e-9)
    for level in wiener.levels:
        assert level.held_out == pytest.approx(level.bars["wiener"], rel=1e-6)
    assert wiener.verdict == "underfits"
    assert abs(wiener.memorised or 1) < 0.05


def test_nats_are_the_integral_of_the_gap(wiener: LevelReport) -> None:
    logs = np.log(RATIOS)
    integrand = [level.gap.value / level.ratio**2 for level in wiener.levels]
    assert wiener.nats_per_value is not None
    assert wiener.nats_per_value.value == pytest.approx(np.trapezoid(integrand, logs), rel=1e-6)
    low, high = wiener.nats_per_value.low, wiener.nats_per_value.high
    assert low is not None
    assert high is not None
    assert low < wiener.nats_per_value.value < high


def test_the_train_optimum_memorises(digits: tuple[Split, Split]) -> None:
    train, held_out = digits[0].at(slice(400)), digits[1].at(slice(120))
    report = loss_by_level(Model(FiniteSet(train.x0)), train, held_out, draws=1)
    assert report.verdict == "memorises"
    assert report.memorised == pytest.approx(1, abs=1e-6)
    for level in report.levels:
        assert level.train == pytest.approx(level.train_optimum, abs=1e-9)
        assert level.held_out == pytest.approx(level.memory, rel=1e-6)


def test_the_train_optimum_is_told_as_much_as_the_denoiser() -> None:
    """The copy that knows the class, judged with labels: nothing lies below its training error."""
    (_, train), (_, held_out) = two_classes(60, 1), two_classes(40, 2)
    copy = Model(FiniteSet(train.x0, train.label))
    ratios = (0.05, 0.1, 3.0)
    with_label, without = (
        loss_by_level(copy, train, held_out, draws=2, ratios=ratios, labelled=True, null=null)
        for null in (False, True)
    )
    for report in (with_label, without):
        assert (report.verdict, report.memorised) == ("memorises", pytest.approx(1, abs=1e-6))
        for level in report.levels:
            assert level.over_train_optimum.value == pytest.approx(0, abs=1e-9)
    assert with_label.levels[-1].train_optimum < 0.7 * without.levels[-1].train_optimum


def test_of_a_class_without_training_pictures_the_train_optimum_says_nothing() -> None:
    (truth, train), (_, held_out) = two_classes(60, 1), two_classes(40, 2)
    unseen = replace(held_out, label=held_out.label + 1)  # type: ignore[operator] # digits have labels
    told = Model(lambda x, level, label: truth(x, level))
    report = loss_by_level(
        told, train, unseen, draws=1, ratios=(0.3, 1.0), labelled=True, null=False
    )
    assert [level.memory for level in report.levels] == [None, None]
    assert report.memorised is None
    assert all(level.over_train_optimum.value > 0 for level in report.levels)


def gaussian_data(count: int, seed: int) -> tuple[Gaussian, Split]:
    """Pictures from a Gaussian that is known."""
    basis = torch.linalg.qr(torch.randn(25, 25, generator=torch.Generator().manual_seed(0)))[0]
    truth = Gaussian(torch.zeros(1, 5, 5), 0.5 ** torch.arange(25.0).double(), basis.double())
    noise = torch.randn(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return truth, Split(truth.draw(noise))


def test_the_truth_passes_every_bar_and_reaches_the_least_error() -> None:
    (truth, train), (_, held_out) = gaussian_data(40, 1), gaussian_data(500, 2)
    report = loss_by_level(Model(truth, Flow()), train, held_out, draws=2, ratios=RATIOS[1:])
    assert report.verdict == "learned"
    assert report.beaten == pytest.approx(RATIOS[1:])
    assert report.judged == "without label"
    for level in report.levels:
        least = truth.mmse(Flow().at(torch.tensor(level.ratio)))
        assert level.held_out == pytest.approx(float(least), rel=0.06)
        assert level.gap.high is not None
        assert level.gap.high < 0
    assert any("shrinkage" in note for note in report.notes)


@pytest.mark.parametrize("schedule", [LinearBetas(), Flow()])
def test_errors_depend_on_the_ratio_alone(schedule: Schedule) -> None:
    (truth, train), (_, held_out) = gaussian_data(40, 1), gaussian_data(60, 2)
    ratios = (0.1, 1.0)
    one = loss_by_level(Model(truth), train, held_out, draws=1, ratios=ratios)
    other = loss_by_level(Model(truth, schedule), train, held_out, draws=1, ratios=ratios)
    for a, b in zip(one.levels, other.levels, strict=True):
        assert b.held_out == pytest.approx(a.held_out, rel=1e-4)
        assert b.bars == pytest.approx(a.bars, rel=1e-4)


def two_classes(count: int, seed: int) -> tuple[Mixture, Split]:
    """Pictures that are mostly dark or mostly bright."""
    eye = torch.eye(9, dtype=torch.float64)
    parts = tuple(
        Gaussian(torch.full((1, 3, 3), mean), torch.full((9,), 0.02).double(), eye)
        for mean in (-0.5, 0.5)
    )
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 2
    noise = torch.randn(count, 1, 3, 3, generator=generator)
    drawn = torch.stack([part.draw(noise) for part in parts])
    return Mixture(parts, (1.0, 1.0), (0, 1)), Split(drawn[label, torch.arange(count)], label)


def test_labels_are_passed_where_the_denoiser_takes_them() -> None:
    (truth, train), (_, held_out) = two_classes(80, 1), two_classes(70, 2)

    def run(**options: Any) -> tuple[LevelReport, set[bool]]:
        model = Model(truth)
        return loss_by_level(model, train, held_out, draws=2, ratios=(0.1, 5.0), **options), set(
            model.told
        )

    plain, told = run()
    assert told == {False}
    assert plain.levels[0].held_out_labelled is None
    both, told = run(labelled=True)
    assert told == {True, False}
    assert both.judged == "without label"
    assert both.levels[1].held_out == plain.levels[1].held_out
    assert both.levels[1].held_out_labelled < 0.5 * both.levels[1].held_out
    assert both.levels[1].gap_labelled is not None
    always, told = run(labelled=True, null=False)
    assert told == {True}
    assert always.judged == "with label"
    assert always.levels[1].held_out is None
    assert always.levels[1].bar == always.levels[1].mixture_given_class
    assert always.levels[1].train < 0.5 * both.levels[1].train


def test_a_denoiser_without_null_label_needs_labels() -> None:
    truth, train = two_classes(20, 1)
    with pytest.raises(ConfigError, match="without null label needs labelled=True and labels"):
        loss_by_level(Model(truth), train, unlabelled(train), labelled=True, null=False)
    with pytest.raises(ConfigError, match="labelled=True"):
        loss_by_level(Model(truth), train, train, null=False)


def test_a_network_that_outputs_nothing_has_its_closed_form_error() -> None:
    """D = c_skip x: the error is (1 - c)^2 E x0^2 + c^2 s^2, for any size of batches."""
    _, train = gaussian_data(200, 1)
    _, held_out = gaussian_data(200, 2)
    silent = Denoiser(lambda x, timestep, label: torch.zeros_like(x), Karras(), KarrasPrecond(0.5))
    report = loss_by_level(silent, train, held_out, draws=4, ratios=(0.5, 2.0), batch_size=7)
    for level in report.levels:
        c = 0.25 / (0.25 + level.ratio**2)
        expected = (1 - c) ** 2 * float(held_out.x0.square().mean()) + c**2 * level.ratio**2
        assert level.held_out == pytest.approx(expected, rel=0.03)
    whole = loss_by_level(silent, train, held_out, draws=4, ratios=(0.5, 2.0))
    assert whole == report


def test_low_rank_fits_agree_with_full_ones(
    digits: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the products of pictures; where the rank suffices it is the same Gaussian."""
    train, held_out = digits[0].at(slice(700)), digits[1].at(slice(60))
    model = Model(fit_gaussian(train.x0))
    full = loss_by_level(model, train, held_out, draws=1, ratios=(0.1, 1.0))
    monkeypatch.setattr(_bars, "FULL_RANK", 10)
    low = loss_by_level(model, train, held_out, draws=1, ratios=(0.1, 1.0))
    for a, b in zip(full.levels, low.levels, strict=True):
        assert b.bars["wiener"] == pytest.approx(a.bars["wiener"], rel=1e-6)
        assert b.bars["mixture"] == pytest.approx(a.bars["mixture"], rel=0.4)


def test_levels_out_of_the_schedules_range_are_left_out() -> None:
    truth, train = gaussian_data(30, 1)
    report = loss_by_level(Model(truth, Karras(0.1, 2.0)), train, train, draws=1)
    assert tuple(level.ratio for level in report.levels) == pytest.approx(RATIOS[1:-1])
    assert "2 levels lie outside the schedule's range" in report.notes
    with pytest.raises(ConfigError, match="reaches none of the ratios"):
        loss_by_level(Model(truth, Karras(0.1, 2.0)), train, train, ratios=(9.0,))


def test_losses_depend_on_the_seed_alone() -> None:
    truth, train = gaussian_data(30, 1)
    model = Model(truth)
    first = loss_by_level(model, train, train, draws=1, seed=3)
    torch.rand(3)
    assert loss_by_level(model, train, train, draws=1, seed=3) == first
    assert loss_by_level(model, train, train, draws=1, seed=4) != first


def blend(share: float, train: Split) -> Estimate:
    """`share` of the train optimum, the rest of a Gaussian fit."""
    copy, fit = FiniteSet(train.x0), fit_gaussian(train.x0)
    return lambda x, level, label: share * copy(x, level, None) + (1 - share) * fit(x, level, None)


def test_the_reason_tells_the_share_that_it_was_judged_by(digits: tuple[Split, Split]) -> None:
    """Above every bar, 0.3 of the way to a copy: not "about equal"."""
    train, held_out = digits[0].at(slice(400)), digits[1].at(slice(120))
    # errors of +0.5 at every level make any bar win; they are the same on both sides
    worse = lambda x, level, label: blend(0.3, train)(x, level, None) + 0.5  # noqa: E731
    report = loss_by_level(Model(worse), train, held_out, draws=1, ratios=(0.1, 0.3, 0.5))
    assert report.memorised is not None
    assert 0.1 < report.memorised < 0.5
    assert (report.verdict, report.beaten) == ("underfits", ())
    share = f"training error lies below held-out error by {report.memorised:.0%}"
    assert share in report.reason
    assert "about equal" not in report.reason


def test_the_reason_tells_a_share_on_the_wrong_side(digits: tuple[Split, Split]) -> None:
    train, held_out = digits[0].at(slice(400)), digits[1].at(slice(120))
    swapped = loss_by_level(Model(FiniteSet(held_out.x0)), train, held_out, draws=1)
    assert swapped.memorised is not None
    assert swapped.memorised < -0.1
    assert f"lies above held-out error by {-swapped.memorised:.0%}" in swapped.reason


def test_about_equal_is_said_where_it_is_so(wiener: LevelReport) -> None:
    assert wiener.reason.endswith("training error about equal")


def test_nothing_is_said_about_memorising_pictures_that_are_new(
    digits: tuple[Split, Split],
) -> None:
    train, held_out = digits[0].at(slice(400)), digits[1].at(slice(120))
    copier = Model(FiniteSet(train.x0))
    report = loss_by_level(copier, train, held_out, draws=1, known=False)
    assert (report.verdict, report.memorised) == ("underfits", None)
    assert "training error" not in report.reason
    known = loss_by_level(copier, train, held_out, draws=1)
    assert known.verdict == "memorises"
    assert known.levels == report.levels


def test_a_denoiser_that_explodes_is_not_judged() -> None:
    _, train = gaussian_data(30, 1)
    report = loss_by_level(Model(lambda x, level, label: x * torch.nan), train, train, draws=1)
    assert report.verdict == "not measured"
    json.dumps(summary(report, None), allow_nan=False)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        (random_split(1), random_split(1)),
        (random_split(16, classes=8), random_split(4, classes=2)),
        (random_split(40, classes=2), random_split(4, classes=3)),
        (CONSTANT, CONSTANT),
        (random_split(20, (3, 24, 20), classes=2), random_split(3, (3, 24, 20), classes=2)),
    ],
)
def test_losses_of_small_and_odd_sets(train: Split, held_out: Split) -> None:
    model = Model(lambda x, level, label: torch.zeros_like(x))
    report = loss_by_level(model, train, held_out, draws=1, labelled=True, ratios=(0.1, 1.0))
    assert any("the intervals are rough" in note for note in report.notes)
    body = json.loads(json.dumps(summary(report, None), allow_nan=False))
    assert body["levels"][0]["held_out"] == pytest.approx(float(held_out.x0.square().mean()))
    assert all(math.isfinite(value) for level in report.levels for value in level.bars.values())


def test_without_held_out_pictures_nothing_is_measured() -> None:
    truth, _ = gaussian_data(1, 1)
    report = loss_by_level(Model(truth), random_split(9), NOTHING)
    assert report.verdict == "not measured"
    assert report.levels == ()


def test_senseless_requests_are_refused() -> None:
    truth, train = gaussian_data(9, 1)
    with pytest.raises(ConfigError, match="draws and batch_size must be at least 1; got 0"):
        loss_by_level(Model(truth), train, train, draws=0)
    with pytest.raises(DataError, match="no training pictures"):
        loss_by_level(Model(truth), train.at(slice(0)), train)
    with pytest.raises(DataError, match="held-out pictures must have the shape"):
        loss_by_level(Model(truth), train, random_split(4))


# --- summary ------------------------------------------------------------------------------------


def test_summary_is_json(wiener: LevelReport, exposed: SampleReport) -> None:
    body = summary(wiener, exposed)
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert body["schema"] == "undiffuse.evaluation/1"
    assert body["verdict"] == "underfits"
    assert len(body["levels"]) == 9
    assert body["levels"][3]["gap"].keys() == {"value", "low", "high"}
    assert {f["name"] for f in body["figures"]} >= {"class_accuracy", "frechet", "copies"}
    assert len(body["neighbours"]["closest"]) == 16


def test_summary_of_nothing() -> None:
    body = summary(None, None)
    assert body["figures"] == body["levels"] == []
    assert body["verdict"] is None


@pytest.mark.parametrize(("labelled", "null"), [(False, True), (True, True), (True, False)])
def test_progress_counts_every_picture_and_ends_at_the_total(labelled: bool, null: bool) -> None:
    x0 = torch.linspace(-1, 1, 12 * 4).reshape(12, 1, 2, 2)
    split = Split(x0, torch.arange(12) % 2)
    seen: list[tuple[int, int]] = []
    denoiser = Denoiser(lambda x, t, label: torch.zeros_like(x), Karras(), KarrasPrecond())
    loss_by_level(
        denoiser,
        split,
        split.at(slice(0, 5)),
        draws=2,
        batch_size=3,
        ratios=(0.1, 1.0),
        labelled=labelled,
        null=null,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] == 2 * 2 * (5 * (labelled + null) + 5)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})

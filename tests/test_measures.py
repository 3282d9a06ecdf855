"""Measures of samples by hand and by closed forms, copies that were moved, failures that must be
caught, and features out of an ONNX file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional

from tiny_world import SIZE, draw_pictures
from undiffuse.checkpoint import Model, Pictures, save_model
from undiffuse.cli import main
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation import (
    FIGURES,
    Features,
    Figure,
    Pair,
    SampleReport,
    Split,
    _copies_search,
    _features,
    _features_onnx,
    _floors,
    _pixels,
    _quality,
    authentic_share,
    density_coverage,
    expected_coverage,
    frechet_distance,
    frechet_infinity,
    kernel_distance,
    moment_errors,
    onnx_features,
    radial_power,
    sample_quality,
    sliced_distance,
    spectrum_error,
    summary,
    two_sample_accuracy,
)
from undiffuse.evaluation._copies import find_copies
from undiffuse.evaluation._quality_figure import share_std
from undiffuse.evaluation._split import Sets
from undiffuse.noise import Karras
from undiffuse.oracles import fit_gaussian
from undiffuse.recipes import preset
from undiffuse.report import Report, render
from undiffuse.unet import UNet


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def mean_and_error(draws: list[float]) -> tuple[float, float]:
    return float(np.mean(draws)), float(np.std(draws, ddof=1) / math.sqrt(len(draws)))


# --- Fréchet and kernel distances ---------------------------------------------------------------


def test_the_frechet_distance_does_not_care_for_dimensions_without_variance() -> None:
    """Few points in many dimensions take the way through products between points."""
    a, b = normal(12, 3, 1) * (1, 2, 3), normal(9, 3, 2) + np.eye(3)[0]
    turned = np.linalg.qr(normal(40, 40, 3))[0][:3]  # three orthonormal rows
    assert frechet_distance(a @ turned, b @ turned) == pytest.approx(frechet_distance(a, b))
    assert frechet_distance(a @ turned, a @ turned) == pytest.approx(0, abs=1e-9)


def test_frechet_infinity_has_no_bias() -> None:
    shift = np.array([0.5, 0, 0, 0])
    apart, alike = [], []
    for seed in range(30):
        a, b = normal(120, 4, 2 * seed), normal(120, 4, 2 * seed + 1)
        alike.append(frechet_infinity(a, b))
        apart.append(frechet_infinity(a, b + shift))
    for draws, truth in ((alike, 0.0), (apart, 0.25)):
        mean, error = mean_and_error(draws)
        assert abs(mean - truth) < 4 * error
        assert error < 0.03
    biased = np.mean([frechet_distance(normal(120, 4, s), normal(120, 4, s + 99)) for s in (0, 1)])
    assert biased > 0.1  # what was taken away


def test_kernel_distance_by_its_definition() -> None:
    a, b = normal(5, 3, 1), normal(4, 3, 2) + 0.5
    kernel: Callable[[np.ndarray, np.ndarray], float] = lambda x, y: float((x @ y / 3 + 1) ** 3)  # noqa: E731
    inside = [
        np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
        for s in (a, b)
    ]
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(inside) - 2 * across)


def test_kernel_distance_has_no_bias_and_sees_third_moments() -> None:
    skewed = np.random.default_rng(0).standard_exponential((2, 30, 200, 2)) - 1  # mean 0, var 1
    alike, apart = zip(
        *(
            (kernel_distance(a, b), kernel_distance(a, normal(200, 2, seed)))
            for seed, (a, b) in enumerate(skewed.transpose(1, 0, 2, 3))
        ),
        strict=True,
    )
    mean, error = mean_and_error(list(alike))
    assert abs(mean) < 4 * error
    mean, error = mean_and_error(list(apart))
    assert mean > 5 * error


# --- neighbours ---------------------------------------------------------------------------------


def test_density_and_coverage_by_hand() -> None:
    real, fake = np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [0.75], [30.0]])
    # k = 1: radii 1, 1, 9: the first two fakes lie in the first two spheres, none elsewhere;
    # k = 2: radii 10, 9, 10: in three spheres each
    assert density_coverage(real, fake, k=1) == (pytest.approx(4 / 3), pytest.approx(2 / 3))
    assert density_coverage(real, fake, k=2) == (pytest.approx(6 / 3 / 2), 1.0)


@pytest.mark.parametrize(("n", "m", "k"), [(30, 30, 5), (40, 20, 3), (4, 9, 5)])
def test_coverage_of_one_distribution_by_itself(n: int, m: int, k: int) -> None:
    draws = [
        density_coverage(normal(n, 2, 2 * s), normal(m, 2, 2 * s + 1), k).coverage
        for s in range(120)
    ]
    mean, error = mean_and_error(draws)
    assert abs(mean - expected_coverage(n, m, k)) < 4 * error


def test_coverage_of_many_points() -> None:
    assert expected_coverage(898, 898) == pytest.approx(0.969, abs=5e-4)  # 1 - 1/2^5


def test_authentic_by_hand() -> None:
    real = np.array([[0.0], [1.0], [5.0]])  # 1, 1 and 4 from their own neighbours
    fake = np.array([[0.1], [-1.5], [6.0], [9.5]])  # 0.1, 1.5, 1 and 4.5 from the nearest
    assert authentic_share(real, fake) == 0.5
    assert authentic_share(real, real) == 0


# --- pixels -------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.floats(-3, 3), st.integers(0, 99))
def test_the_sliced_distance_of_a_shift_is_the_shift(n: int, shift: float, seed: int) -> None:
    a = normal(n, 4, seed)
    assert sliced_distance(a, a[::-1] + shift) == pytest.approx(abs(shift), abs=1e-12)


def test_a_classifier_that_guesses_and_one_that_knows() -> None:
    n = 100
    alike = [two_sample_accuracy(normal(n, 3, s), normal(n, 3, s + 50)) for s in range(10)]
    mean, error = mean_and_error(alike)
    assert abs(mean - 0.5) < 4 * error
    assert np.std(alike) < 2 * 0.5 / math.sqrt(2 * n)
    assert two_sample_accuracy(normal(n, 3), normal(n, 3, 1) + 6) == 1.0
    assert two_sample_accuracy(0.3 * normal(n, 3, 2), normal(n, 3, 3)) > 0.8  # one mean


def test_moment_errors_are_z_scores() -> None:
    n, shift = 400, 0.3
    alike = [moment_errors(normal(n, 20, s), normal(n, 20, s + 50)) for s in range(20)]
    assert np.mean(alike, axis=0) == pytest.approx([1, 1], abs=0.1)
    moved = moment_errors(normal(n, 20, 1), normal(n, 20, 2) + shift)
    assert moved.mean == pytest.approx(math.sqrt(1 + shift**2 * n / 2), rel=0.1)
    wider = moment_errors(normal(n, 20, 1), normal(n, 20, 2) * 1.2)
    assert wider.spread > 2 > wider.mean


def test_an_offset_of_blank_pixels_is_no_fault() -> None:
    a, b = (np.concatenate([normal(400, 10, s), np.zeros((400, 10))], 1) for s in (1, 2))
    b[:, 10:] += 0.002
    assert moment_errors(a, b).mean < 1.3
    b[:, 10:] += 0.5
    assert moment_errors(a, b).mean > 5


def test_power_stands_where_its_frequency_is() -> None:
    x = torch.arange(16.0)
    for cycles in range(1, 9):
        wave = torch.cos(2 * math.pi * cycles * x / 16).expand(1, 2, 16, 16)
        power = radial_power(wave)[0]
        assert power.argmax() == cycles - 1
        assert np.sort(power)[-2] < 1e-4 * power.max()
    chess = (1 - 2 * ((x[:, None] + x) % 2)).expand(1, 1, 16, 16)
    assert radial_power(chess)[0].argmax() == 8  # the corners have the last of nine bins
    assert radial_power(torch.zeros(2, 1, 5, 1)).shape == (2, 0)


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 14)])
def test_white_noise_has_as_much_power_everywhere(shape: tuple[int, ...]) -> None:
    noise = torch.from_numpy(normal(600, math.prod(shape))).float().reshape(600, *shape)
    power = radial_power(noise)
    assert power.mean(0) == pytest.approx(np.ones(power.shape[1]), rel=0.1)
    assert spectrum_error(power, radial_power(noise * 2)) == pytest.approx(math.log(4), rel=1e-3)


# --- floors -------------------------------------------------------------------------------------


def test_a_floor_holds_as_many_real_pictures_against_others() -> None:
    """30 samples against the 20 held out: 20 on every side, none on both, none a sample."""
    points = np.arange(100.0)[:, None]
    sides = _floors.Sides(points[:30], points[30:80], points[80:], "places", seed=0)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def measure(a: np.ndarray, b: np.ndarray) -> float:
        pairs.append((a[:, 0], b[:, 0]))
        return 0.0

    n = sides.count()
    assert n == 20
    _floors.beside_real(sides, n, measure)
    assert len(pairs) == 2 * 20
    for a, b in pairs:
        assert len(set(a)) == len(set(b)) == 20
        assert not set(a) & set(b)
    for a, b in pairs[:20]:
        assert max(a) < 30
        assert min(b) >= 80
    drawn = [set(a) | set(b) for a, b in pairs[20:]]
    assert all(min(both) >= 30 for both in drawn)
    assert len(set.union(*drawn)) == 70


@given(st.sampled_from(["lower", "higher"]), st.floats(-9, 9), st.floats(0.1, 2))
def test_how_far_beyond_the_floor(better: str, worse: float, std: float) -> None:
    value = 1 + worse if better == "lower" else 1 - worse
    figure = Figure("x", value, 1.0, std, better, 9, "")
    assert figure.beyond == pytest.approx(worse / std)
    assert figure.far == (worse / std > 4)
    assert Figure("x", None, 1.0, std, better, 9, "").beyond is None


# --- copies -------------------------------------------------------------------------------------


def shifted(x0: Tensor, down: int, right: int) -> Tensor:
    padded = functional.pad(x0, (1, 1, 1, 1), value=-1.0)
    h, w = x0.shape[-2:]
    return padded[..., 1 + down : 1 + down + h, 1 + right : 1 + right + w]


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda x0: x0.flip(-1),
    "right": lambda x0: shifted(x0, 0, 1),
    "up and left": lambda x0: shifted(x0, -1, -1),
    "mirrored and down": lambda x0: shifted(x0.flip(-1), 1, 0),
    "right, with noise": lambda x0: shifted(x0, 0, 1) + 0.03 * torch.randn(x0.shape).clamp(-2, 2),
}


def digits() -> tuple[Split, Split]:
    """1,437 to train on, 360 held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.data))
    x0 = torch.tensor(data.data[order] / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    everything = Split(x0, torch.tensor(data.target[order]))
    return everything.at(slice(1437)), everything.at(slice(1437, None))


TRAIN, HELD_OUT = digits()


def searched(made: Tensor, train: Split, held_out: Split) -> tuple[dict[str, Figure], tuple[Pair]]:
    sets = Sets(Split(made), train, held_out, 0)
    found = find_copies(sets, torch.arange(len(made)), None)
    return {figure.name: figure for figure in found.figures}, found.closest  # type: ignore[return-value]


@pytest.mark.parametrize("move", MOVES)
def test_a_copy_that_was_moved_is_found(move: str) -> None:
    torch.manual_seed(0)
    made = MOVES[move](TRAIN.x0[100:140])
    figures, closest = searched(made, TRAIN, HELD_OUT)
    assert figures["copies"].value < 0.1
    assert figures["copies_moved"].value == 1.0
    assert figures["copies_moved"].floor == figures["copies"].floor == 0.0
    assert all(pair.train == pair.sample + 100 for pair in closest)
    assert all(pair.moved for pair in closest[:5])


def pink(count: int, side: int, seed: int) -> Tensor:
    """Colour pictures with the spectrum of photographs, each kept from 0 to 1/2 of its range."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.fft.fftfreq(side)
    falling = torch.hypot(ways[:, None], ways).clamp_min(1 / side) ** -1.5
    noise = torch.randn(count, 3, side, side, generator=generator)
    x0 = torch.fft.ifft2(torch.fft.fft2(noise) * falling).real
    return 0.4 * x0 / x0.std((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("side", [20, 48])
def test_moved_copies_of_larger_pictures_are_found(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates are found in principal components, and a few pictures are searched at a time."""
    monkeypatch.setattr(_copies_search, "AT_ONCE", 50)
    train, fresh = Split(pink(120, side, 0)), Split(pink(30, side, 1))
    copies = [move(train.x0[i : i + 1]) for i, move in enumerate(MOVES.values())]
    figures, closest = searched(torch.cat([fresh.x0, *copies]), train, Split(pink(40, side, 2)))
    assert figures["copies_moved"].value == pytest.approx(len(copies) / (30 + len(copies)))
    assert figures["copies_moved"].floor == 0
    assert {(pair.sample, pair.train) for pair in closest[: len(copies)]} == {
        (30 + i, i) for i in range(len(copies))
    }


@pytest.mark.parametrize("at_once", [100, 4096])
def test_the_two_nearest_of_all_moves_are_those_of_a_full_search(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_copies_search, "AT_ONCE", at_once)
    queries, train = HELD_OUT.x0[:25], TRAIN.x0[:300]
    looks = (_copies_search.as_they_are(queries), _copies_search.moved(queries, train))
    plain, moved = _copies_search.nearest(looks, train.split(30)).found
    assert plain is not None
    assert moved is not None
    inner = train[..., 1:-1, 1:-1].flatten(1).double()
    tried = [
        torch.cdist(q[..., i : i + 6, j : j + 6].flatten(1).double(), inner) / 6
        for q in (queries, queries.flip(-1))
        for i in range(3)
        for j in range(3)
    ]
    for found, apart in (
        (moved, torch.stack(tried).amin(0)),
        (plain, torch.cdist(queries.flatten(1).double(), train.flatten(1).double()) / 8),
    ):
        (first, second), place = apart.sort(1)[0][:, :2].unbind(1), apart.argmin(1)
        np.testing.assert_array_equal(found.place, place)
        np.testing.assert_allclose(found.distance, first, atol=1e-6)
        np.testing.assert_allclose(found.ratio, first / second, atol=1e-5)


def test_a_small_picture_is_mirrored_only() -> None:
    train = Split(torch.rand(40, 1, 6, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    made = torch.cat([train.x0[3:4].flip(-1), shifted(train.x0[5:6], 0, 1)])
    figures, closest = searched(made, train, Split(torch.zeros(0, 1, 6, 7)))
    assert figures["copies"].value == 0
    assert figures["copies_moved"].value == 0.5
    assert (closest[0].sample, closest[0].train, closest[0].moved) == (0, 3, True)


def test_a_copy_does_not_hide_behind_its_mirrored_double() -> None:
    train = Split(torch.cat([TRAIN.x0[:50], TRAIN.x0[:50].flip(-1)]))
    figures, _ = searched(shifted(TRAIN.x0[:20], 1, 0), train, HELD_OUT)
    assert figures["copies_moved"].value == 1.0


# --- what fails must be caught ------------------------------------------------------------------


def gaussian() -> Split:
    fit = fit_gaussian(TRAIN.x0)
    made = fit.draw(torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(4)))
    return Split(made, TRAIN.label[:300])  # type: ignore[index]


def noisy() -> Split:
    noise = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    return Split(TRAIN.x0[:300] + 0.2 * noise, TRAIN.label[:300])  # type: ignore[index]


SPLIT = 1077  # the training pictures beyond are real samples that nobody has seen
FAILURES: dict[str, Callable[[], Split]] = {
    "gaussian": gaussian,
    "noise": noisy,
    "copy": lambda: TRAIN.at(slice(300)),
    "mirrored copy": lambda: Split(TRAIN.x0[:300].flip(-1), TRAIN.label[:300]),  # type: ignore[index]
    "lost class": lambda: without_threes(TRAIN.at(slice(SPLIT, None))),
    "real": lambda: TRAIN.at(slice(SPLIT, None)),
}
CAUGHT = {  # by which figures, at least
    "gaussian": "class_accuracy train_on_samples frechet frechet_infinity frechet_pca kernel"
    " kernel_pca precision recall density coverage precision_pca recall_pca density_pca"
    " coverage_pca two_sample sliced spectrum pixel_std",
    "noise": "authentic two_sample spectrum pixel_mean pixel_std frechet kernel",
    "copy": "copies copies_moved authentic",
    "mirrored copy": "copies_moved class_accuracy frechet two_sample",
    "lost class": "train_on_samples",
    "real": "",
}
FLATTERED = ("frechet", "frechet_pca", "kernel", "precision", "recall", "density", "coverage")


def without_threes(split: Split) -> Split:
    assert split.label is not None
    return split.at((split.label != 3).nonzero().flatten())


@pytest.fixture(scope="module")
def judged() -> dict[str, SampleReport]:
    """All failures, with fewer draws than usual and one classifier for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_features, "CLASSIFIER_STEPS", 80)
        patch.setattr(_floors, "DRAWS", 8)
        patch.setattr(_pixels, "FEWER_DRAWS", 1)
        features = _features.classifier_features(TRAIN, 0)
        known = TRAIN.at(slice(SPLIT))
        return {
            name: sample_quality(make(), known, HELD_OUT, features=features)
            for name, make in FAILURES.items()
        }


def far(report: SampleReport) -> set[str]:
    return {figure.name for figure in report.figures if figure.far}


def figure(report: SampleReport, name: str) -> Figure:
    return next(figure for figure in report.figures if figure.name == name)


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_caught_and_real_pictures_are_not(
    failure: str, judged: dict[str, SampleReport]
) -> None:
    found = far(judged[failure])
    assert set(CAUGHT[failure].split()) - found == set()
    if failure == "real":
        assert found == set()
        assert [f.warning for f in judged["real"].figures if f.warning] == []


def test_copies_look_perfect_and_every_figure_says_so(judged: dict[str, SampleReport]) -> None:
    report = judged["copy"]
    assert far(report) == {"copies", "copies_moved", "authentic"}
    for name in FLATTERED:
        assert abs(figure(report, name).beyond) < 4  # type: ignore[arg-type]
        assert "samples repeat training pictures (authentic, copies" in figure(report, name).warning
    assert not figure(report, "copies").warning


def test_a_lost_class_costs_diversity_and_nothing_else(judged: dict[str, SampleReport]) -> None:
    lost, real = judged["lost class"], judged["real"]
    for name in ("recall", "coverage", "recall_pca", "coverage_pca"):
        assert figure(lost, name).value < figure(real, name).value - 0.01
    for name in ("precision", "density", "two_sample"):
        assert not figure(lost, name).far
    accuracy = figure(lost, "class_accuracy")
    assert not accuracy.far
    assert "classes 3" in accuracy.warning
    assert figure(lost, "train_on_samples").value == pytest.approx(0.9, abs=0.03)


def test_every_figure_says_what_it_is_blind_to(judged: dict[str, SampleReport]) -> None:
    for one in judged["real"].figures:
        assert "blind" in one.note.lower()
        assert one.floor is not None
        assert one.floor_std is not None
        assert one.n in (300, 360)
    nothing = sample_quality(
        Split(torch.zeros(1, 1, 2, 2)),
        Split(torch.zeros(1, 1, 2, 2)),
        Split(torch.zeros(1, 1, 2, 2)),
    )
    for one in nothing.figures:
        assert "blind" in one.note.lower()
        assert "not measured" in one.warning or "rough" in one.warning


# --- what figures say of one another ------------------------------------------------------------


def share(name: str, value: float, floor: float = 0.9, better: str = "higher") -> Figure:
    return Figure(name, value, floor, share_std(floor, 100), better, 100, "")


def warnings(*figures: Figure, count: int = 100) -> dict[str, str]:
    split = Split(torch.zeros(count, 1, 1, 1))
    told = _quality._with_warnings(list(figures), Sets(split, split, split, 0))
    return {figure.name: figure.warning for figure in told}


def test_recall_alone_and_precision_alone() -> None:
    lost = warnings(share("precision", 0.9), share("recall", 0.5))
    assert lost == {
        "precision": "",
        "recall": "precision is as in real pictures: some kinds are missing",
    }
    bad = warnings(share("density_pca", 0.5), share("coverage_pca", 0.9))
    assert bad["density_pca"].endswith("as in real pictures: beside good samples there are bad")
    assert not bad["coverage_pca"]
    assert not any(warnings(share("precision", 0.5), share("recall", 0.5)).values())


def test_a_measure_that_real_pictures_fail_is_called_blind() -> None:
    said = warnings(
        share("precision_pca", 0.4, floor=0.48),
        share("recall_pca", 0.6, floor=0.6),
        share("copies", 0.2, floor=0.2, better="lower"),
    )
    assert said["precision_pca"] == "blind here: real pictures reach no more than 0.48"
    assert said["recall_pca"] == ""
    assert said["copies"] == "blind here: 20% of the held-out pictures count as copies themselves"


def test_small_sets_are_called_rough() -> None:
    assert warnings(share("precision", 0.9), count=50) == {"precision": ""}
    (said,) = warnings(share("precision", 0.9), count=49).values()
    assert said == (
        "only 49 samples: the value is rough; only 49 held-out pictures: the floor is rough"
    )


def test_the_page_says_once_what_is_true_of_most_and_folds_doubles_away(
    judged: dict[str, SampleReport],
) -> None:
    body = summary(None, judged["copy"])
    page = render(Report("copies", evaluation=body))
    assert page.count("samples repeat training pictures") == 1
    shown, folded = page.split("<summary>The same in principal components")
    assert "Moved copies" in shown
    assert "Fréchet distance for infinitely many samples" in shown
    assert ", pixels" not in shown
    for title in ("Fréchet distance", "Kernel distance", "Recall", "Coverage"):
        assert f"{title}, pixels" in folded
    real = render(Report("real", evaluation=summary(None, judged["real"])))
    assert "samples repeat" not in real
    without = {**body, "figures": [f for f in body["figures"] if f["name"] in ("frechet_pca",)]}
    assert "<summary>The same in" not in render(Report("x", evaluation=without))


def test_every_figure_has_plain_words_on_the_page() -> None:
    rows = [{"name": name, "value": 1.0, "note": "words of its own"} for name in FIGURES]
    table = render(Report("x", evaluation={"figures": rows})).split("How it was measured")[0]
    assert "words of its own" not in table


# --- features out of a file ---------------------------------------------------------------------

FLOAT, BYTE = TensorProto.FLOAT, TensorProto.UINT8
Shape = tuple[int | str, ...]


def write_onnx(
    path: Path, shape: Shape, kind: int = FLOAT, *nodes: onnx.NodeProto, out: str = "out"
) -> Path:
    """A graph from `x` to `out` through the nodes, or through a plain cast to float32."""
    nodes = nodes or (helper.make_node("Cast", ["x"], ["out"], to=FLOAT),)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in out.split()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def pictures(n: int, c: int, h: int, w: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, c, h, w, generator=generator) * 2 - 1


def test_a_network_of_any_size_gets_pictures_as_they_are(tmp_path: Path) -> None:
    features = onnx_features(write_onnx(tmp_path / "x.onnx", ("n", 3, "h", "w")))
    x0 = pictures(70, 3, 5, 6)
    np.testing.assert_allclose(features(x0), x0.flatten(1), atol=1e-6)
    assert features.name == "x.onnx, output out (pictures at their size, -1 to 1)"
    assert str(tmp_path) not in features.name


def test_a_network_of_bytes_and_fixed_sizes(tmp_path: Path) -> None:
    """Of 4 pictures at a time, channels last; the last batch of 10 is filled up."""
    features = onnx_features(write_onnx(tmp_path / "x.onnx", (4, 6, 8, 3), BYTE))
    x0 = pictures(10, 1, 12, 16)
    x0[0, 0, :2, :2], x0[0, 0, :2, 2:4] = -1, 1
    points = features(x0).reshape(10, 6, 8, 3)
    smaller = functional.avg_pool2d(x0, 2)[:, 0]
    for channel in range(3):  # grey in all three
        np.testing.assert_allclose(points[..., channel], (smaller + 1) * 127.5, atol=0.501)
    assert (points[0, 0, 0, 0], points[0, 0, 1, 0]) == (0, 255)
    assert "6x8, 0 to 255" in features.name


def test_pictures_that_are_too_small_are_enlarged_and_colours_become_grey(tmp_path: Path) -> None:
    features = onnx_features(write_onnx(tmp_path / "x.onnx", ("n", 1, 9, 9)))
    flat = torch.tensor([1.0, -1.0, 0.5])[None, :, None, None].expand(2, 3, 4, 4)
    grey = 0.299 - 0.587 + 0.114 * 0.5
    np.testing.assert_allclose(features(flat), np.full((2, 81), grey), atol=1e-5)


def test_an_output_by_its_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
        helper.make_node("GlobalMaxPool", ["x"], ["max"]),
    ]
    path = write_onnx(tmp_path / "x.onnx", ("n", 3, "h", "w"), FLOAT, *nodes, out="mean max")
    x0 = pictures(5, 3, 4, 4)
    np.testing.assert_allclose(onnx_features(path)(x0), x0.mean((2, 3)), atol=1e-6)
    np.testing.assert_allclose(onnx_features(path, "max")(x0), x0.amax((2, 3)), atol=1e-6)
    with pytest.raises(ConfigError, match="no output 'min'; it has mean, max"):
        onnx_features(path, "min")


def refused(path: Path, x0: Tensor | None = None) -> str:
    """The one line."""
    with pytest.raises((ConfigError, DataError)) as caught:
        onnx_features(path)(pictures(3, 3, 8, 8) if x0 is None else x0)
    (line,) = str(caught.value).splitlines()
    return line


def test_files_that_are_no_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no file" in refused(tmp_path / "no.onnx")
    text = tmp_path / "text.onnx"
    for content in (b"", b"words", b"\x08\x07" * 50):
        text.write_bytes(content)
        assert "text.onnx" in refused(text)
    good = write_onnx(tmp_path / "x.onnx", ("n", 3, "h", "w"))
    monkeypatch.setattr(_features_onnx, "find_spec", lambda name: None)
    assert 'pip install "undiffuse[onnx]"' in refused(good)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [(("n", 10), FLOAT), (("n", 4, 8, 8), FLOAT), (("n", 3, 8, 8), TensorProto.INT64)],
)
def test_networks_that_want_no_pictures(tmp_path: Path, shape: Shape, kind: int) -> None:
    said = refused(write_onnx(tmp_path / "x.onnx", shape, kind))
    assert "must have one input for pictures" in said
    assert f"({', '.join(map(str, shape))})" in said


def test_networks_that_fail_on_pictures(tmp_path: Path) -> None:
    log = helper.make_node("Log", ["x"], ["out"])
    assert "not finite for 3 of 3 pictures" in refused(
        write_onnx(tmp_path / "log.onnx", ("n", 3, "h", "w"), FLOAT, log)
    )
    mean = helper.make_node("ReduceMean", ["x"], ["out"], keepdims=0)
    assert "1 to 8192 numbers for each picture; for 3 it gives float32 ()" in refused(
        write_onnx(tmp_path / "mean.onnx", ("n", 3, "h", "w"), FLOAT, mean)
    )
    path = write_onnx(tmp_path / "many.onnx", ("n", 3, "h", "w"))
    assert "it gives float32 (1, 3, 64, 64). Name another output" in refused(
        path, pictures(1, 3, 64, 64)
    )
    two = pictures(2, 2, 8, 8)
    assert "wants pictures of 3 channels; got 2" in refused(path, two)
    pool = helper.make_node("AveragePool", ["x"], ["out"], kernel_shape=[20, 20])
    small = write_onnx(tmp_path / "pool.onnx", ("n", 3, "h", "w"), FLOAT, pool)
    assert "does not run on pictures (3, 3, 8, 8)" in refused(small)


def test_many_features_are_reduced_and_given_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_floors, "DRAWS", 2)
    features = onnx_features(write_onnx(tmp_path / "pixels.onnx", ("n", 1, 8, 8)))
    report = sample_quality(TRAIN.at(slice(60)), TRAIN.at(slice(200)), HELD_OUT, features=features)
    reduced, full = (figure(report, name) for name in ("frechet", "frechet_raw"))
    assert reduced.features.startswith("32 whitened principal components of pixels.onnx")
    assert reduced.warning.startswith("60 pictures are few for 32 dimensions")
    assert full.features == "pixels.onnx, output out (pictures resized to 8x8, -1 to 1)"
    assert "60 pictures are few for 64 dimensions" in full.warning
    assert figure(report, "kernel").features == figure(report, "recall").features == full.features
    few = Features("two", lambda x0: features(x0)[:, 27:29])
    report = sample_quality(TRAIN.at(slice(60)), TRAIN.at(slice(200)), HELD_OUT, features=few)
    assert "frechet_raw" not in {one.name for one in report.figures}
    assert figure(report, "frechet").features == "two"


def test_features_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_floors, "DRAWS", 2)
    denoiser = Denoiser(UNet(preset("tiny", 3)), Karras(), KarrasPrecond(0.5))
    save_model(tmp_path / "m.safetensors", Model(denoiser, Pictures(SIZE, SIZE, 3), {}))
    line = ["evaluate", str(tmp_path / "m.safetensors"), "--num-samples", "4", "--draws", "1"]
    line += ["--num-inference-steps", "2", "--data", str(draw_pictures(tmp_path / "pictures"))]
    network = str(write_onnx(tmp_path / "x.onnx", ("n", 3, "h", "w")))

    def said(code: int, *more: str) -> dict[str, Any]:
        assert main([*line, *more, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    body = said(0, "--features", network, "--features-output", "out")
    names = {one["name"]: one["features"] for one in body["figures"]}
    assert names["frechet_raw"].startswith("x.onnx, output out")
    assert names["frechet_pca"].endswith("components of pixels")
    assert "there is no file" in said(2, "--features", "none.onnx")["message"]
    assert "no output 'in'" in said(2, "--features", network, "--features-output", "in")["message"]
    assert "features_output" in said(2, "--features-output", "out")["message"]

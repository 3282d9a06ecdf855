"""The gap to the optimum: against closed forms, and what the report draws and says of it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from undiffuse import drawing, report
from undiffuse.cli import _evaluate
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation import (
    RATIOS,
    GapReport,
    LevelReport,
    Split,
    excess_by_level,
    excess_over,
    loss_by_level,
    summary,
)
from undiffuse.evaluation._spread import interval, quotient, steps
from undiffuse.noise import Flow, Karras, NoiseLevel, Schedule
from undiffuse.oracles import FiniteSet, Gaussian, Mixture, fit_gaussian

Estimate = Callable[[Tensor, NoiseLevel, Tensor | None], Tensor]


@dataclass
class Model:
    """Any estimate as denoiser."""

    estimate: Estimate
    schedule: Schedule = field(default_factory=Karras)

    def __call__(self, x: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor:
        return self.estimate(x, level, label)


def gaussian(spectrum: Tensor, mean: float = 0.0) -> Gaussian:
    """4 x 4 pictures with these variances along random axes."""
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    return Gaussian(torch.full((1, 4, 4), mean), spectrum.double(), basis.double())


FALLING = 0.5 ** torch.arange(16.0)
TRUTH = gaussian(FALLING, mean=0.3)


def shaken(share: float, oracle: Gaussian) -> Estimate:
    """The exact estimate and beside it an error of a known share of the least one."""

    def estimate(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        signs = torch.where(torch.arange(x[0].numel()) % 2 == 0, 1.0, -1.0).reshape(x.shape[1:])
        return oracle(x, level) + signs * math.sqrt(share * float(oracle.mmse(level)))

    return estimate


def silent(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


# --- excess over an exact denoiser --------------------------------------------------------------


def test_a_network_that_outputs_nothing_is_optimal_on_white_noise() -> None:
    """KarrasPrecond(s_d) with F = 0 is the Wiener filter of N(0, s_d^2 I): the excess is 0."""
    white = gaussian(torch.full((16,), 0.25))
    report = excess_by_level(Denoiser(silent, Karras(), KarrasPrecond(0.5)), white, pictures=64)
    assert tuple(row.ratio for row in report.rows) == pytest.approx(RATIOS)
    for row in report.rows:
        assert row.excess == pytest.approx(0, abs=1e-12)
        assert row.mmse == pytest.approx(0.25 * row.ratio**2 / (0.25 + row.ratio**2))
    assert report.nats_per_picture.value == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("schedule", [Karras(), Flow()])
def test_excess_of_a_wrong_filter_has_its_closed_form(schedule: Schedule) -> None:
    """D = c x on N(0, U l U'): E(D - D*)^2 = mean of (c - w)^2 (l + s^2) with w = l / (l + s^2)."""
    truth, variances = gaussian(FALLING), FALLING.double()
    wrong = KarrasPrecond(0.5)
    filtered = Model(lambda x, level, label: wrong(level).c_skip * x, schedule)
    report = excess_by_level(filtered, truth, pictures=1500, ratios=(0.1, 0.5, 2.0))
    for row in report.rows:
        s2 = row.ratio**2
        c, w = 0.25 / (0.25 + s2), variances / (variances + s2)
        exact = float(((c - w).square() * (variances + s2)).mean())
        assert row.percent_low is not None
        assert row.percent_high is not None
        assert row.percent_low < 100 * exact / row.mmse < row.percent_high
        assert row.percent_high - row.percent_low < 0.3 * row.percent
        assert row.nats_per_value == row.excess / s2


def test_two_per_cent_everywhere_cost_two_nats_on_digits() -> None:
    """As derived: 2.0 nats, 0.046 bits per dimension; per octave of 1 % 0.35, 0.13 and 0.005."""
    from sklearn.datasets import load_digits

    places = np.random.default_rng(0).permutation(1797)[:1437]
    x0 = torch.from_numpy(load_digits().images[places]).float()[:, None] / 8 - 1
    fit = fit_gaussian(x0)
    ratios = tuple(np.geomspace(0.05, 5, 13))
    report = excess_by_level(Model(shaken(0.02, fit)), fit, pictures=2, ratios=ratios)
    assert [row.percent for row in report.rows] == pytest.approx([2.0] * 13, rel=1e-4)
    assert report.nats_per_picture.value == pytest.approx(2.0, rel=0.03)
    assert report.bits_per_dimension.value == pytest.approx(0.046, rel=0.02)
    rows = excess_by_level(Model(shaken(0.01, fit)), fit, pictures=2, ratios=(0.05, 0.5, 5)).rows
    octaves = [row.nats_per_value * 64 * math.log(2) for row in rows]
    assert octaves == pytest.approx([0.35, 0.13, 0.005], rel=0.06)


def test_nats_are_the_trapezoid_over_levels_for_any_ratios() -> None:
    ratios = (0.1, 0.4, 0.5, 3.0)
    made = excess_by_level(Model(shaken(0.05, TRUTH)), TRUTH, pictures=9, ratios=ratios)
    expected = np.trapezoid([row.nats_per_value for row in made.rows], np.log(ratios))
    assert made.nats_per_value.value == pytest.approx(expected, rel=1e-6)
    assert made.nats_per_picture.value == pytest.approx(16 * expected, rel=1e-6)
    body = made.asdict()
    assert body["bits_per_dimension"]["value"] == pytest.approx(expected / math.log(2), rel=1e-6)
    assert json.loads(json.dumps(body))["nats_per_picture"]["low"] is not None


def test_the_least_error_without_a_formula() -> None:
    """Of the oracle itself, on the same pictures and noise; the excess does not change."""
    generator = torch.Generator().manual_seed(1)
    x0 = TRUTH.draw(torch.randn(2000, 1, 4, 4, generator=generator))
    ratios = (0.1, 1.0)
    known = excess_over(Model(shaken(0.1, TRUTH)), TRUTH, x0, mmse=TRUTH.mmse, ratios=ratios)
    found = excess_over(Model(shaken(0.1, TRUTH)), TRUTH, x0, ratios=ratios)
    for one, other in zip(known.rows, found.rows, strict=True):
        assert other.excess == one.excess
        assert other.mmse == pytest.approx(one.mmse, rel=0.04)
        assert other.percent != one.percent


def test_labels_reach_both() -> None:
    halves = tuple(gaussian(0.01 * torch.ones(16), mean) for mean in (-0.5, 0.5))
    truth = Mixture(halves, (1.0, 1.0), (0, 1))
    label = torch.arange(40) % 2
    x0 = torch.where(label.reshape(-1, 1, 1, 1) == 0, -0.5, 0.5).expand(40, 1, 4, 4)
    told = excess_over(Model(truth), truth, x0, label, ratios=(3.0,))
    assert told.rows[0].excess == 0
    deaf = Model(lambda x, level, label: truth(x, level))
    assert excess_over(deaf, truth, x0, label, ratios=(3.0,)).rows[0].percent > 100
    untold = excess_over(Model(truth), truth, x0, ratios=(3.0,))
    assert untold.rows[0].mmse > told.rows[0].mmse


def test_batches_change_nothing_and_seeds_draw_anew() -> None:
    model = Model(lambda x, level, label: 0.9 * TRUTH(x, level))

    def run(**options: int) -> GapReport:
        return excess_by_level(model, TRUTH, pictures=30, ratios=(0.2, 1.0), **options)

    whole = run()
    assert run(batch_size=7) == whole
    assert run(seed=1).rows != whole.rows
    assert run(draws=3).rows[0].excess != whole.rows[0].excess


def test_more_pictures_make_the_bound_tighter() -> None:
    model = Model(lambda x, level, label: 0.9 * TRUTH(x, level))
    few, many = (
        excess_by_level(model, TRUTH, pictures=count, ratios=(0.5,)).rows[0] for count in (20, 2000)
    )
    assert few.percent_high is not None
    assert many.percent_high is not None
    assert many.percent_high - many.percent < 0.3 * (few.percent_high - few.percent)


def test_one_picture_has_no_interval() -> None:
    (row,) = excess_by_level(Model(TRUTH), TRUTH, pictures=1, ratios=(0.5,)).rows
    assert (row.percent_low, row.percent_high) == (None, None)


def test_what_cannot_be_measured_is_refused() -> None:
    model, x0 = Model(TRUTH), torch.zeros(3, 1, 4, 4)
    with pytest.raises(ConfigError, match="pictures must be at least 1; got 0"):
        excess_by_level(model, TRUTH, pictures=0)
    with pytest.raises(ConfigError, match="draws and batch_size must be at least 1; got 0 and 512"):
        excess_over(model, TRUTH, x0, draws=0)
    with pytest.raises(DataError, match=r"at least one; got \(0, 1, 4, 4\)"):
        excess_over(model, TRUTH, x0[:0])
    with pytest.raises(ConfigError, match="reaches none of the ratios"):
        excess_by_level(replace(model, schedule=Karras(0.1, 2.0)), TRUTH, ratios=(9.0,))


# --- sums and intervals -------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 90), min_size=2, max_size=6, unique=True))
def test_steps_add_up_to_the_range(ratios: list[float]) -> None:
    ratios = sorted(ratios)
    weights = steps(ratios)
    assert sum(weights) == pytest.approx(math.log(ratios[-1] / ratios[0]), abs=1e-12)
    assert all(weight >= 0 for weight in weights)


def test_a_quotient_is_paired() -> None:
    """Where one is a multiple of the other nothing is left to chance."""
    below = np.random.default_rng(0).uniform(0.1, 2, 50)
    exact = quotient(0.3 * below, below, seed=0)
    assert (exact.value, exact.low, exact.high) == pytest.approx((0.3, 0.3, 0.3))
    loose = quotient(0.3 * below[::-1], below, seed=0)
    assert loose.low is not None
    assert loose.low < 0.28 < loose.value
    assert math.isnan(quotient(below, 0 * below, seed=0).value)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng, n = np.random.default_rng(1), 100
    found = [interval(rng.exponential(size=n), seed=place) for place in range(40)]
    hits = sum(one.low <= 1 <= one.high for one in found)  # type: ignore[operator]
    assert 33 <= hits <= 40


# --- an oracle in the place of the bar ----------------------------------------------------------


def splits(truth: Gaussian, train: int, held_out: int) -> tuple[Split, Split]:
    generator = torch.Generator().manual_seed(2)
    drawn = truth.draw(torch.randn(train + held_out, 1, 4, 4, generator=generator))
    return Split(drawn[:train]), Split(drawn[train:])


def judged(share: float) -> LevelReport:
    model = Model(shaken(share, TRUTH))
    return loss_by_level(model, *splits(TRUTH, 60, 40), draws=1, ratios=(0.1, 1.0), oracle=TRUTH)


def test_an_oracle_is_the_bar_and_no_noise_hides_the_excess() -> None:
    report = judged(0.01)
    for level in report.levels:
        assert level.bar_name == "oracle"
        assert level.bar == level.bars["oracle"]
        assert level.gap.low == pytest.approx(level.gap.high, rel=1e-4)
        exact = 0.01 * float(TRUTH.mmse(Karras().at(torch.tensor(level.ratio).double())))
        assert level.gap.value == pytest.approx(exact, rel=1e-4)
        assert level.excess.value == pytest.approx(100 * level.gap.value / level.bar, rel=1e-6)
    assert report.verdict == "learned"
    assert "within 2 % of the least possible at 2 of 2 levels" in report.reason


def test_far_from_the_oracle_nothing_is_learned() -> None:
    report = judged(0.05)
    assert (report.verdict, report.beaten) == ("underfits", ())
    assert "at 0 of 2 levels" in report.reason


def test_an_oracle_is_told_as_much_as_the_model() -> None:
    halves = tuple(gaussian(0.01 * torch.ones(16), mean) for mean in (-0.5, 0.5))
    truth = Mixture(halves, (1.0, 1.0), (0, 1))
    label = torch.arange(40) % 2
    noise = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    means = torch.where(label.reshape(-1, 1, 1, 1) == 0, -0.5, 0.5)
    split = Split(means + 0.1 * noise, label)
    both = loss_by_level(
        Model(truth), split, split, draws=1, ratios=(3.0,), labelled=True, oracle=truth
    )
    (level,) = both.levels
    assert level.gap.value == 0
    assert level.gap_labelled is not None
    assert level.gap_labelled.value == 0
    always = loss_by_level(
        Model(truth), split, split, draws=1, ratios=(3.0,), labelled=True, null=False, oracle=truth
    )
    assert always.levels[0].bar_name == "oracle_given_class"
    assert always.levels[0].bar < 0.5 * level.bar


# --- reading ------------------------------------------------------------------------------------


def test_training_error_below_a_bar_that_held_out_error_exceeds_is_overfitting() -> None:
    """A share of a copy of the set: train sinks below every bar, held-out rises above all."""
    truth = gaussian(torch.full((16,), 0.2))  # nothing to learn: no estimate can pass the bar
    train, held_out = splits(truth, 100, 200)
    copy, fit = FiniteSet(train.x0), fit_gaussian(train.x0)

    def blend(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        return 0.4 * copy(x, level) + 0.6 * fit(x, level)

    report = loss_by_level(Model(blend), train, held_out, draws=2, ratios=(0.2, 0.3, 0.5))
    assert report.beaten == ()
    assert all(level.train < level.bar for level in report.levels)
    assert report.verdict == "overfits"


def test_the_copy_lies_nothing_above_the_train_optimum() -> None:
    train, held_out = splits(TRUTH, 50, 30)
    copy = Model(FiniteSet(train.x0))
    report = loss_by_level(copy, train, held_out, draws=1, ratios=(0.1, 1.0))
    for level in report.levels:
        assert level.over_train_optimum.value == pytest.approx(0, abs=1e-9)
    fit = loss_by_level(Model(TRUTH), train, held_out, draws=1, ratios=(0.1, 1.0))
    for level in fit.levels:
        apart = level.train - level.train_optimum
        assert level.over_train_optimum.value == pytest.approx(apart)
        assert level.over_train_optimum.value > 0


# --- words and pictures -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def body() -> dict[str, Any]:
    return json.loads(json.dumps(summary(judged(0.01), None), allow_nan=False))


def excess_of(body: dict[str, Any]) -> str:
    """Of the lowest level, as it is printed; about 1 %."""
    value = body["levels"][0]["excess"]["value"]
    assert value == pytest.approx(1, rel=0.2)
    return f"{value:+.3g}"


def test_lines_end_with_the_sum(body: dict[str, Any]) -> None:
    heading, low, high, verdict, cost = _evaluate.level_lines(body)
    assert heading.split()[-6:] == ["is", "excess", "%", "train", "train", "optimum"]
    assert f" oracle  {excess_of(body)} [" in low.replace("   ", "  ")
    assert high.split()[:2] == ["1", f"{body['levels'][1]['held_out']:.4g}"]
    assert verdict.startswith("learned: ")
    values = [float(word.strip("[],+")) for word in cost.split() if word[0] in "+-["]
    expected = judged(0.01).nats_per_picture
    assert expected is not None
    assert values[0] == pytest.approx(expected.value, rel=0.01)
    assert cost.endswith("bits per dimension")


def test_a_level_without_excess_has_a_dash() -> None:
    level = {"ratio": 1.0, "held_out": None, "held_out_labelled": 0.5, "bar": 0.25, "bars": {}}
    level |= {"train": 0.4, "train_optimum": 0.1}
    _, row = _evaluate.level_lines({"levels": [level], "verdict": None})
    assert row.split() == ["1", "0.5", "0.25", "-", "0.4", "0.1"]


def test_the_report_tells_levels_and_sum(body: dict[str, Any]) -> None:
    levels = body["levels"]
    svg = drawing.to_svg(drawing.draw_levels(levels, 16))
    page = report.render(report.Report("gap", levels_svg=svg, evaluation=body))
    assert "Excess over the bar, summed over the noise levels: +" in page
    assert f"<td>{excess_of(body)} % (+" in page
    assert page.count('<th scope="row">0.1</th>') == 1
    plain = report.render(report.Report("gap", levels_svg=svg))
    assert "summed over the noise levels" not in plain


def line(figure: Any, gid: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = (one for axes in figure.axes for one in axes.get_lines() if one.get_gid() == gid)
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def test_costs_are_drawn_so_that_their_area_is_the_sum() -> None:
    made = excess_by_level(Model(shaken(0.05, TRUTH)), TRUTH, pictures=9)
    figure = drawing.draw_gap(made.asdict()["rows"], values=16)
    assert len(figure.axes) == 2
    ratio, percent = line(figure, "excess")
    assert percent == pytest.approx([row.percent for row in made.rows])
    ratio, cost = line(figure, "cost")
    area = np.trapezoid(cost, np.log2(ratio))
    assert area == pytest.approx(made.nats_per_picture.value, rel=1e-6)


def test_levels_show_costs_below_where_there_are_gaps(body: dict[str, Any]) -> None:
    levels = body["levels"]
    figure = drawing.draw_levels(levels, 16)
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == [
        "mean squared error of x0",
        "÷ bar to beat",
        "nats per octave",
    ]
    tops = [axes.get_position().y1 for axes in figure.axes]
    assert all(above > below for above, below in pairwise(tops))
    per_value = drawing.draw_levels(levels)
    assert line(figure, "cost")[1] == pytest.approx(16 * line(per_value, "cost")[1])
    assert "value" in per_value.axes[2].get_ylabel()


@pytest.mark.parametrize("rows", [[], [{"ratio": 1.0}], [{"ratio": 1.0, "excess": None}]])
def test_nothing_measured_is_said(rows: list[dict[str, Any]]) -> None:
    figure = drawing.draw_gap(rows)
    assert len(figure.axes) == 1
    assert "nothing recorded yet" in [text.get_text() for text in figure.axes[0].texts]

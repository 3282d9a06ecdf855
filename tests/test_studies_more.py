"""Studies S9 to S18: every verdict can be spoken, and each runs through in the quick setting."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import s09_concatenate_not_add as s09
import s10_noise_scales as s10
import s11_off_by_one as s11
import s12_gradients as s12
import s13_norm_order as s13
import s14_initialisers as s14
import s15_four_texts as s15
import s16_resampling as s16
import s17_any_size as s17
import s18_four_presets as s18
from harness import LEVELS, QUICK, Judgement, Lab, Numbers, Verdict, optimum
from nets import small_unet
from pictures import Fields
from undiffuse import cost
from undiffuse.noise import Stream, keyed_normal
from undiffuse.spec import Concat, Join
from undiffuse.unet import Head, ResBlock, UNet

HOLDS, FAILS, DEPENDS = Verdict.HOLDS, Verdict.FAILS, Verdict.DEPENDS
Judge = Callable[[Numbers], Judgement]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("more"), QUICK)


def flat(*seeds: float) -> list[list[float]]:
    """The same number at every level, one row per seed."""
    return [[one] * len(LEVELS) for one in seeds]


def nets(key: str, **excess: tuple[float, ...]) -> Numbers:
    return {"ratio": list(LEVELS), key: {name: {"excess": flat(*e)} for name, e in excess.items()}}


# --- verdicts -----------------------------------------------------------------------------------


def joined(add: tuple[float, float], kept: tuple[int, int] = (80, 80)) -> Numbers:
    sizes = {s09.CONCAT: 100, s09.ADD: kept[0], s09.NARROW: kept[1], s09.USUAL: 90}
    excess = {
        s09.CONCAT: (10.0, 10.0),
        s09.ADD: add,
        s09.NARROW: (12.0, 12.0),
        s09.USUAL: (11.0, 11.0),
    }
    found = nets("networks", **excess)
    for name, one in found["networks"].items():
        one |= {"kept_bytes": sizes[name], "parameters": 100}
    return found


def bands(pictures: list[float], noise: list[float], halves: list[float]) -> Numbers:
    """`halves`: the level up to which each band is recovered."""
    shares = [[float(ratio <= half) for ratio in LEVELS] for half in halves]
    fields = {"pictures": pictures, "noise": noise}
    return {
        "ratio": list(LEVELS),
        "fields": fields,
        "photos": fields,
        "exact": {"pictures": [0.09, 0.25, 1.0, 4.0, 16.0]},
        "recovered": [shares],
    }


GROWING = [1.0, 4.0, 16.0, 64.0, 256.0]
EVEN = [1.0] * 5


def moved(output: float, fine: float, coarse: float) -> Numbers:
    names = {
        "skip at 32 px, after Conv": fine,
        "skip at 16 px, after Res": coarse,
        "output": output,
    }
    return {"ratio": list(LEVELS), "added": {name: flat(v) for name, v in names.items()}}


def gradients(untrained: float, trained: float, plain: list[float], excess: float = 9.0) -> Numbers:
    """Shares of the last gradient that arrive with skips; without them it is 0.1."""

    def kind(before: float, after: float, error: float) -> Numbers:
        rows = [[before, 1.0]] * len(s12.DEPTHS)
        return {"untrained": [rows], "trained": [[after, 1.0]], "excess": flat(error)}

    layers = [[share, 1.0] for share in plain]
    return {
        s12.SKIPS: kind(untrained, trained, 3.0),
        s12.CUT: kind(0.1, 0.1, excess),
        "plain": {s12.DEFAULT: [layers], s12.HE: [layers]},
    }


def orders(last: tuple[float, float]) -> Numbers:
    return nets("networks", **{s13.FIRST: (10.0, 10.0), s13.LAST: last, s13.ZEROS: (9.0, 9.0)})


def starts(default: tuple[float, float]) -> Numbers:
    found = nets("starts", **{s14.DEFAULT: default, s14.TEXT: (10.0, 10.0)})
    for one in found["starts"].values():
        one["last_join"] = [1.0, 1.0]
    return found


def texts(*ends: tuple[float, float], adds: tuple[int, ...] = (1, 2, 3, 4)) -> Numbers:
    found = nets("networks", **dict(zip(s15.NAMES, ends, strict=True)))
    for one, cost_of_it in zip(found["networks"].values(), adds, strict=True):
        one["multiply_adds"] = cost_of_it
    return found


def pairs(worst: tuple[float, float], board: tuple[float, float]) -> Numbers:
    deconv = s16.BASE.replace("nearest + conv", "transposed 4x4")
    found = nets("networks", **{s16.BASE: (10.0, 10.0), deconv: worst})
    found["networks"][s16.BASE]["checkerboard"] = flat(1.0, 1.0)
    found["networks"][deconv]["checkerboard"] = flat(*board)
    return found


def sizes(whole: float, padded: float, kept: bool = True) -> Numbers:
    found = nets("sizes", **{"32x32": (10.0,), "24x24": (whole,), "31x33": (padded,)})
    for name, one in found["sizes"].items():
        one |= {"divisible": name != "31x33", "shape_kept": kept}
    return found


def presets(seconds: tuple[float, ...], ends: tuple[float, ...]) -> Numbers:
    names = list(s18.ROWS)
    found = nets("small", **dict(zip(names, ((end,) for end in ends), strict=True)))
    found["full"] = {name: {"seconds": s} for name, s in zip(names, seconds, strict=True)}
    return found


VERDICTS: list[tuple[Judge, Numbers, Verdict]] = [
    (s09.judge, joined((12.0, 12.0)), HOLDS),
    (s09.judge, joined((12.0, 10.0)), DEPENDS),
    (s09.judge, joined((9.0, 9.0)), FAILS),
    (s09.judge_memory, joined((9.0, 9.0)), HOLDS),
    (s09.judge_memory, joined((9.0, 9.0), kept=(99, 80)), DEPENDS),
    (s09.judge_memory, joined((9.0, 9.0), kept=(99, 99)), FAILS),
    (s10.judge_scales, bands(GROWING, EVEN, EVEN), HOLDS),
    (s10.judge_scales, bands([1.0, 4.0, 5.0, 20.0, 80.0], EVEN, EVEN), DEPENDS),
    (s10.judge_scales, bands(EVEN, EVEN, EVEN), FAILS),
    (s10.judge_white, bands(EVEN, GROWING, EVEN), HOLDS),
    (s10.judge_white, bands(EVEN, [1.0, 1.0, 1.0, 1.0, 1.5], EVEN), DEPENDS),
    (s10.judge_white, bands(EVEN, EVEN, EVEN), FAILS),
    (s10.judge_network, bands(EVEN, EVEN, [0.26, 0.45, 0.77, 1.3, 4.0]), HOLDS),
    (s10.judge_network, bands(EVEN, EVEN, [0.05, 0.09, 0.15, 0.26, 0.45]), DEPENDS),
    (s10.judge_network, bands(EVEN, EVEN, EVEN), FAILS),
    (s11.judge, moved(20.0, 20.0, 20.0), HOLDS),
    (s11.judge, moved(20.0, 20.0, 2.0), DEPENDS),
    (s11.judge, moved(2.0, 2.0, 2.0), FAILS),
    (s11.judge_finest, moved(20.0, 20.0, 2.0), HOLDS),
    (s11.judge_finest, moved(20.0, 2.0, 20.0), FAILS),
    (s12.judge_skips, gradients(0.3, 0.3, EVEN), HOLDS),
    (s12.judge_skips, gradients(0.3, 0.1, EVEN), DEPENDS),
    (s12.judge_skips, gradients(0.1, 0.1, EVEN), FAILS),
    (s12.judge_plain, gradients(1.0, 1.0, [0.001] * 4), HOLDS),
    (s12.judge_plain, gradients(1.0, 1.0, [0.1, 0.1, 0.1, 0.001]), DEPENDS),
    (s12.judge_plain, gradients(1.0, 1.0, [0.1] * 4), FAILS),
    (s12.judge_deep, gradients(1.0, 1.0, EVEN, excess=9.0), HOLDS),
    (s12.judge_deep, gradients(1.0, 1.0, EVEN, excess=4.0), DEPENDS),
    (s12.judge_deep, gradients(1.0, 1.0, EVEN, excess=3.0), FAILS),
    (s13.judge, orders((10.0, 10.5)), HOLDS),
    (s13.judge, orders((10.0, 15.0)), DEPENDS),
    (s13.judge, orders((15.0, 15.0)), FAILS),
    (s14.STUDY.claims[0].judge, starts((12.0, 12.0)), HOLDS),
    (s14.STUDY.claims[0].judge, starts((12.0, 10.0)), DEPENDS),
    (s14.STUDY.claims[0].judge, starts((9.0, 9.0)), FAILS),
    (s15.judge_alike, texts((10, 10), (11, 11), (12, 12), (13, 13)), HOLDS),
    (s15.judge_alike, texts((10, 10), (11, 11), (12, 12), (13, 30)), DEPENDS),
    (s15.judge_alike, texts((10, 10), (11, 11), (12, 12), (30, 30)), FAILS),
    (s15.judge_per_second, texts((10, 10), (11, 11), (12, 12), (13, 13)), HOLDS),
    (s15.judge_per_second, texts((10, 10), (11, 11), (12, 12), (9, 9)), FAILS),
    (s16.judge_alike, pairs((11.0, 11.0), (1.0, 1.0)), HOLDS),
    (s16.judge_alike, pairs((11.0, 20.0), (1.0, 1.0)), DEPENDS),
    (s16.judge_alike, pairs((20.0, 20.0), (1.0, 1.0)), FAILS),
    (s16.judge_deconv, pairs((10.0, 10.0), (2.0, 2.0)), HOLDS),
    (s16.judge_deconv, pairs((10.0, 10.0), (2.0, 1.2)), DEPENDS),
    (s16.judge_deconv, pairs((10.0, 10.0), (0.9, 0.9)), FAILS),
    (s17.judge, sizes(11.0, 12.0), HOLDS),
    (s17.judge, sizes(11.0, 20.0), DEPENDS),
    (s17.judge, sizes(40.0, 50.0), FAILS),
    (s17.judge, sizes(11.0, 12.0, kept=False), FAILS),
    (s17.judge_padding, sizes(10.0, 10.5), HOLDS),
    (s17.judge_padding, sizes(10.0, 13.0), DEPENDS),
    (s17.judge_padding, sizes(10.0, 20.0), FAILS),
    (s18.judge_time, presets((1, 2, 3, 4), (4, 3, 2, 1)), HOLDS),
    (s18.judge_time, presets((1, 2, 2, 4), (4, 3, 2, 1)), DEPENDS),
    (s18.judge_time, presets((4, 3, 2, 1), (4, 3, 2, 1)), FAILS),
    (s18.judge_quality, presets((1, 2, 3, 4), (4, 3, 2, 1)), HOLDS),
    (s18.judge_quality, presets((1, 2, 3, 4), (4, 3, 3, 1)), DEPENDS),
    (s18.judge_quality, presets((1, 2, 3, 4), (4, 4, 4, 4)), FAILS),
]


@pytest.mark.parametrize(("judge", "numbers", "verdict"), VERDICTS)
def test_verdicts(judge: Judge, numbers: Numbers, verdict: Verdict) -> None:
    judged = judge(numbers)
    assert judged.verdict is verdict
    assert "nan" not in judged.text


# --- exact pieces -------------------------------------------------------------------------------


def test_spectra_of_fields_are_their_closed_form() -> None:
    """Sample powers scatter around the formula as chi-squared numbers do."""
    fields, count = Fields(8, 8, torus=16), 4000
    measured, exact = s10.power(fields.held_out(count, 3)), s10.exact_power(fields)
    z = (measured / exact - 1) * (count / 2) ** 0.5
    assert float(z.abs().max()) < 4.5
    assert float(z.square().mean()) == pytest.approx(1, abs=0.5)


def test_cosines_are_orthonormal() -> None:
    waves = s10.cosines(8)
    assert torch.allclose(waves @ waves.mT, torch.eye(8, dtype=torch.float64), atol=1e-12)


def test_exact_errors_add_up_to_the_optimum() -> None:
    fields = Fields(8, 8, torus=16)
    assert float(s10.exact_errors(fields, 0.7).mean()) == pytest.approx(optimum(fields, 0.7))


def test_half_is_found_between_levels() -> None:
    assert s10.half_at((1.0, 4.0), (0.75, 0.25)) == pytest.approx(2.0)
    assert s10.half_at((1.0, 4.0), (0.1, 0.1)) == 1.0
    assert s10.half_at((1.0, 4.0), (0.9, 0.8)) == 4.0


def test_added_skips_have_equal_parameters() -> None:
    specs = s09.specs()
    whole, added = (cost.total_parameters(specs[name]) for name in (s09.CONCAT, s09.ADD))
    assert added == pytest.approx(whole, rel=0.01)
    joins = {op.by for op in specs[s09.ADD].program if isinstance(op, Concat)}
    assert joins == {Join.ADD}


def test_moving_repeats_the_edge() -> None:
    assert s11.moved(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[1.0, 1.0, 2.0]]


def test_printed_initialiser_loses_the_zeros_of_blocks() -> None:
    net = UNet(small_unet())
    s14.as_printed(net)
    blocks = [layer for layer in net.layers.values() if isinstance(layer, ResBlock)]
    (head,) = (layer for layer in net.layers.values() if isinstance(layer, Head))
    assert all(bool(block.conv2.weight.any()) for block in blocks)
    assert not bool(head.conv.weight.any())


def test_checkerboards_are_seen() -> None:
    noise = keyed_normal(0, Stream.NOISE, range(64), (1, 16, 16))
    board = torch.tensor([1.0, -1.0]).repeat(8)
    assert s16.checkerboard(noise) == pytest.approx(1, abs=0.15)
    assert s16.checkerboard(noise + 0.5 * board) > 2


def test_gradients_of_a_network_built_with_zeros_are_zero() -> None:
    assert s12.feature_gradients(UNet(s12.deep(2, skips=True, zero_init=True)))[0] == 0.0


# --- everything, tiny ---------------------------------------------------------------------------


def here(lab: Lab, name: str, side: int, base: int) -> Numbers:
    """`s18.in_full` without a process of its own."""
    spec = s18.ROWS[name].family(base, 3)
    return {"side": side, "parameters": 1, "multiply_adds": 1, **s18.one_step(spec, side)}


@pytest.mark.parametrize("module", [s09, s10, s11, s12, s13, s14, s15, s16, s17, s18])
def test_quick_run(module: Any, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s18, "in_full", here)
    study = importlib.import_module(module.__name__).STUDY
    numbers = study.measure(lab)
    assert all(table.rows for table in study.tables(numbers))
    assert all(
        len(row) == len(table.header) for table in study.tables(numbers) for row in table.rows
    )
    assert all(claim.judge(numbers).text for claim in study.claims)
    assert study.figure(numbers).axes


def test_a_preset_is_measured_in_a_process_of_its_own(lab: Lab) -> None:
    measured = s18.in_full(lab, "Light", 8, 4)
    assert measured["seconds"] > 0
    assert measured["bytes"] > 0


def test_a_preset_that_cannot_fit_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s18, "LIMIT", 1000)
    assert s18.in_full(lab, "Light", 8, 4)["failed"] == "its estimate is above the limit"

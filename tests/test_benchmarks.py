"""The benchmarks' harness: arithmetic on known numbers, fake clocks, and gates that must close.

Nothing here depends on how fast anything is: where a clock runs at all, its numbers are not looked
at.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import (
    cases_data,
    cases_forward,
    cases_memory,
    cases_sample,
    cases_startup,
    cases_train,
    floor,
    page,
    peers,
    roofline,
    run,
    scaling,
)
from benchmarks.harness import (
    AGREE,
    BFLOAT16,
    FLOAT32,
    SCHEMA,
    Bench,
    Budget,
    Case,
    NotEqual,
    Pairs,
    Result,
    Side,
    check_equal,
    check_gradients,
    difference,
    interval,
    machine,
    machine_kind,
    ours,
    paired,
    power_law,
    reaches,
    seconds_of,
    side,
    speedup,
    warm,
)
from benchmarks.peers import AS_IT_COMES, Arithmetic, Form, PeerMissing, Twins, forms
from undiffuse import cost
from undiffuse.recipes import adm_family, ddpmpp_family, lucidrains_family, text002, tiny
from undiffuse.runtime import Path as Way
from undiffuse.spec import UNetSpec
from undiffuse.unet import UNet

SMALL = {  # of diffusers' UNet2DModel
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
BRIEF = Budget(pairs=3, seconds=0.0, group=1, rounds=2, cold=2)


def small_twins(bench: Bench) -> Twins:
    return peers.diffusers_twins(SMALL, bench.device)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Everything as short as it can be, and peaks of small matrices."""
    monkeypatch.setattr(roofline, "SIZES", (32, 48))
    monkeypatch.setattr(roofline, "IN_MEMORY", 2**16)
    (tmp_path / "scratch").mkdir()
    return Bench(BRIEF, 1, tmp_path / "scratch", tmp_path / "kept", quick=True)


class FakeClock:
    """Time passes only where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def lasting(self, durations: Iterator[float]) -> Callable[[], None]:
        """A call that takes the next of these seconds each time."""

        def call() -> None:
            self.now += next(durations)

        return call


# --- statistics ---------------------------------------------------------------------------------


def test_interval_holds_the_median_of_normal_numbers_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = interval(random.normal(3.0, 1.0, 25), draws=400)
        covered += low <= 3.0 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_interval_of_equal_numbers_is_that_number() -> None:
    assert interval([2.5] * 7) == (2.5, 2.5)


def test_interval_is_the_same_every_time_and_inside_the_values() -> None:
    values = [4.0, 5.0, 5.2, 5.4, 9.0]
    assert interval(values) == interval(values)
    low, high = interval(values)
    assert 4.0 <= low < 5.2 < high <= 9.0


@given(st.floats(-2, 3), st.floats(0.1, 10))
def test_exponents_of_exact_power_laws(exponent: float, factor: float) -> None:
    x = [1.0, 2.0, 5.0, 9.0]
    law = power_law(x, [factor * value**exponent for value in x])
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.error == pytest.approx(0, abs=1e-7)


def test_error_of_an_exponent_is_that_of_least_squares() -> None:
    """Against numpy's own covariance of the fit."""
    x, y = [1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 2.2, 3.9, 8.5, 15.0]
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    law = power_law(x, y)
    assert law.exponent == pytest.approx(slope)
    assert law.error == pytest.approx(math.sqrt(covariance[0, 0]))


@pytest.mark.parametrize(
    ("value", "target", "holds"),
    [(5, ">= 5", True), (4.99, ">= 5", False), (0.6, "<= 0.6", True), (0.61, "<= 0.6", False)],
)
def test_targets_have_a_direction(value: float, target: str, holds: bool) -> None:
    assert reaches(value, target) is holds


def test_a_target_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="target must be like"):
        reaches(1.0, "about 5")


# --- timing -------------------------------------------------------------------------------------


def test_pairs_are_taken_in_the_order_abba() -> None:
    order: list[str] = []

    def one(name: str, seconds: float) -> Side:
        return Side(name, lambda: order.append(name) or seconds)

    pairs = paired(one("A", 1.0), one("B", 3.0), 4)
    assert "".join(order) == "ABBAABBA"
    assert pairs.ours == (1.0,) * 4
    assert pairs.speedups == [3.0] * 4


def test_a_slow_drift_cancels_in_the_order_abba() -> None:
    clock = FakeClock()
    slowing = iter(itertools.count(10))
    drift = (value / 10 for value in slowing)
    a, b = (Side(n, lambda: seconds_of(clock.lasting(drift), 1, clock)) for n in "AB")
    ratios = paired(a, b, 4).speedups
    assert [ratio > 1 for ratio in ratios] == [True, False, True, False]


def test_warm_until_two_medians_agree() -> None:
    clock = FakeClock()
    calls = [9.0, 4.0, 2.0, 1.99, 50.0]
    call = clock.lasting(iter(calls))
    assert warm(call, Budget(group=1, rounds=10), clock) == pytest.approx(1.99)
    assert clock.now == pytest.approx(sum(calls[:4]))


def test_warm_takes_medians_so_one_slow_call_does_not_count() -> None:
    clock = FakeClock()
    call = clock.lasting(iter([5.0, 1.0, 1.0, 1.0, 7.0, 1.0]))
    assert warm(call, Budget(group=3, rounds=10), clock) == pytest.approx(1.0)


def test_warm_ends_even_if_it_never_settles() -> None:
    clock = FakeClock()
    call = clock.lasting(float(2**n) for n in itertools.count())
    assert warm(call, Budget(group=1, rounds=5), clock) == pytest.approx(16.0)
    assert clock.now == pytest.approx(31.0)


@given(st.floats(0.5, 2.0))
def test_warm_agrees_within_three_percent(second: float) -> None:
    clock = FakeClock()
    warm(clock.lasting(iter([1.0, second, second])), Budget(group=1, rounds=3), clock)
    agreed = clock.now == pytest.approx(1.0 + second)
    assert agreed is (abs(second - 1) <= AGREE)


def test_one_timing_lasts_long_enough() -> None:
    clock = FakeClock()
    made = side("x", clock.lasting(itertools.repeat(0.03)), Budget(seconds=0.5, group=1), clock)
    before = clock.now
    assert made.measure() == pytest.approx(0.03)
    assert clock.now - before == pytest.approx(0.51)


# --- results ------------------------------------------------------------------------------------

QUIET = {**machine(2, 0.3), "load_before": 0.3, "load_after": 1.9}


def result(ours_s: tuple[float, ...] = (1.0,) * 7, target: str = ">= 2") -> Result:
    pairs = Pairs(ours_s, tuple(3 * one for one in ours_s))
    return speedup("forward/x/b8/default", "a against b", pairs, 8, target)


def test_speedup_is_the_median_of_paired_ratios() -> None:
    found = speedup("x", "", Pairs((1.0, 2.0, 1.0), (2.0, 10.0, 3.0)), 8)
    assert found.ratio == 3.0
    assert found.ours == 8.0
    assert found.peer == pytest.approx(8 / 3)
    assert found.spread is not None
    assert found.spread[0] <= found.ratio <= found.spread[1]


def test_a_line_has_the_whole_schema() -> None:
    line = result().line(QUIET, {"torch": "2"}, "abc")
    wanted = "schema case name ours peer ratio spread target holds usable ours_s peer_s more"
    wanted += " images_per_second flop_per_image of_gemm of_floor compile_s peak_bytes max_abs_diff"
    wanted += " machine versions commit unit of how skipped"
    assert set(wanted.split()) <= set(line)
    assert line["schema"] == SCHEMA
    assert line["case"] == line["name"] == "forward/x/b8/default"
    assert line["ratio"] == 3.0
    assert line["spread"] == [3.0, 3.0]
    assert line["holds"] is True
    assert line["usable"] is True
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_the_machine_has_no_name() -> None:
    import platform

    about = machine(2, 0.5)
    wanted = "cpu flags cores threads ram_gb gpu driver load_before load_after"
    assert set(about) == set(wanted.split())
    assert platform.node() not in json.dumps(about).split('"')
    cpu = {**about, "cpu": "Some CPU (R) @ 2 GHz", "flags": ["avx512f", "avx2"], "gpu": None}
    assert machine_kind(cpu) == "some-cpu-r-2-ghz-avx512f-2-threads"
    assert machine_kind({**cpu, "flags": []}) == "some-cpu-r-2-ghz-2-threads"
    assert machine_kind({**cpu, "gpu": "NVIDIA H200"}) == "nvidia-h200-2-threads"


@pytest.mark.parametrize("when", ["load_before", "load_after"])
def test_a_foreign_load_makes_a_line_unusable(when: str) -> None:
    line = result().line({**QUIET, when: 2.6}, {}, "")
    assert line["usable"] is False
    assert line["why_unusable"] == [f"load average 2.60 {when[5:]}, 2 threads of our own"]
    assert line["holds"] is True


def test_a_wide_interval_makes_a_line_unusable() -> None:
    pairs = Pairs((1.0,) * 7, (2.0, 2.0, 2.0, 3.0, 4.0, 4.0, 4.0))
    line = speedup("x", "", pairs, 1).line(QUIET, {}, "")
    assert line["usable"] is False
    assert "of the median wide" in line["why_unusable"][0]


def test_a_target_that_is_missed_does_not_hold() -> None:
    assert result(target=">= 4").holds is False
    assert replace(result(), target=None).holds is None


# --- equality -----------------------------------------------------------------------------------


def test_difference_is_relative_to_the_largest_value() -> None:
    assert difference(torch.tensor([1.0, 10.5]), torch.tensor([1.0, 10.0])) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, 3), torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0])]
)
def test_other_shapes_and_numbers_that_are_none_are_not_equal(wrong: Tensor) -> None:
    with pytest.raises(NotEqual):
        check_equal("x", wrong, torch.ones(2), 1e9)


def test_zero_proves_nothing() -> None:
    with pytest.raises(NotEqual, match="all zero"):
        check_equal("x", torch.zeros(2), torch.zeros(2), FLOAT32)


def test_small_gradients_are_compared_too() -> None:
    right = {"a": torch.full((9,), 100.0), "b": torch.full((4,), 5.0)}
    check_gradients("x", right, right, FLOAT32)
    wrong = {**right, "b": torch.full((4,), 6.0)}
    with pytest.raises(NotEqual, match="gradients of b differ"):
        check_gradients("x", wrong, right, BFLOAT16)
    with pytest.raises(NotEqual, match="b on one side only"):
        check_gradients("x", {"a": right["a"]}, right, BFLOAT16)


def test_equal_networks_pass_and_a_wrong_weight_is_refused(bench: Bench) -> None:
    asked = cases_forward.question(bench, "small", small_twins(bench), 2)
    cases_forward.our_call(asked, Way.BF16)
    with torch.no_grad():
        next(iter(asked.net.layers.values())).weight[0, 0, 0, 0] += 1.0
    for way in (Way.PLAIN, Way.BF16):
        with pytest.raises(NotEqual, match=f"forward/small/b2 {way}: outputs differ"):
            cases_forward.our_call(asked, way)


def test_a_wrong_gradient_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is right, but only half of the gradient comes back."""
    given_ = cases_train.lesson(bench, "small", small_twins(bench), 2)

    def halved(net: UNet, way: Way) -> Callable[..., Tensor]:
        def half(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
            output = ours(net, way)(x, timestep, label)
            return (output + output.detach()) / 2

        return half

    cases_train.check_ours(given_, Way.PLAIN)
    monkeypatch.setattr(cases_train, "ours", halved)
    with pytest.raises(NotEqual, match="of all parameters differ by 5"):
        cases_train.check_ours(given_, Way.BF16)


def test_unequal_losses_of_processes_are_refused() -> None:
    sides = {"ours": {"loss": 1.01}, "default": {"loss": 1.0}, "tuned": {"loss": 1.0}}
    cases_memory.check_losses(sides)
    with pytest.raises(NotEqual, match="memory ours"):
        cases_memory.check_losses({**sides, "ours": {"loss": 1.03}})


def test_a_refused_case_gives_no_number_and_an_exit_code(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    def unequal(_: Bench) -> Iterator[Result]:
        raise NotEqual("outputs differ")
        yield

    assert run.measure(bench, [Case("x", unequal)], None) == 1
    line = json.loads(capsys.readouterr().out)
    assert line["skipped"] == "outputs differ"
    assert line["ratio"] is None
    assert line["usable"] is False


# --- peers --------------------------------------------------------------------------------------


def test_no_weight_of_a_peer_is_zero_or_left_at_one(bench: Bench) -> None:
    for name, weight in small_twins(bench).theirs.named_parameters():
        assert not bool((weight == 0).all()), name
        assert not bool((weight == 1).all()), name


def test_the_ddpm_configuration_has_the_published_count() -> None:
    with torch.device("meta"):
        net = peers._diffusers("diffusers").UNet2DModel.from_config(dict(peers.DDPM))
    assert sum(one.numel() for one in net.parameters()) == 35_746_307


def test_every_form_is_there_once() -> None:
    every = forms()
    assert len(set(every)) == len(every) == 12
    assert len([form for form in every if form.compiled]) == 6
    assert every[0] == AS_IT_COMES
    assert AS_IT_COMES.label == "fp32, NCHW, eager"


@pytest.mark.parametrize("form", [form for form in forms() if not form.compiled], ids=str)
def test_every_uncompiled_form_computes_the_same(bench: Bench, form: Form) -> None:
    asked = cases_forward.question(bench, "small", small_twins(bench), 2)
    assert cases_forward.their_call(asked, form)().dtype is torch.float32


def fake_build(clock: FakeClock, seconds: dict[Form, float]) -> peers.Build:
    def build(form: Form) -> Callable[[], Tensor]:
        if form not in seconds:
            raise NotEqual(f"{form.label}: outputs differ")
        call = clock.lasting(itertools.repeat(seconds[form]))
        return lambda: torch.zeros(()) if call() is None else torch.ones(())

    return build


@pytest.fixture
def no_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here, so there is nothing to forget."""
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


@pytest.mark.usefixtures("no_reset")
def test_the_fastest_form_is_found_and_kept(bench: Bench) -> None:
    clock = FakeClock()
    full = replace(bench, quick=False, clock=clock)
    best = Form(Arithmetic.AUTOCAST, channels_last=True, compiled=True)
    seconds = {form: 1.0 + i for i, form in enumerate(forms())} | {best: 0.5}
    found = peers.fastest(full, "key", forms(), fake_build(clock, seconds))
    assert found.form == best
    assert len(found.tried) == 12
    again = peers.fastest(replace(full, quick=True), "key", forms(), fake_build(clock, {}))
    assert again == found
    assert peers.known(full, "another key") is None


@pytest.mark.usefixtures("no_reset")
def test_a_quick_run_compiles_the_two_fastest_only(bench: Bench) -> None:
    clock = FakeClock()
    quick = replace(bench, clock=clock)
    first, second = Form(Arithmetic.BFLOAT16, channels_last=True), Form(Arithmetic.AUTOCAST)
    seconds = dict.fromkeys(forms(), 5.0) | {first: 1.0, second: 2.0}
    found = peers.fastest(quick, "key", forms(), fake_build(clock, seconds))
    assert found.form == first
    compiled = [label for label in found.tried if label.endswith("compiled")]
    assert sorted(compiled) == sorted(
        replace(form, compiled=True).label for form in (first, second)
    )


@pytest.mark.usefixtures("no_reset")
def test_a_form_that_is_wrong_is_never_the_fastest(bench: Bench) -> None:
    clock = FakeClock()
    full = replace(bench, quick=False, clock=clock)
    found = peers.fastest(full, "key", forms(), fake_build(clock, {AS_IT_COMES: 9.0}))
    assert found.form == AS_IT_COMES
    wrong = [reason for reason in found.tried.values() if isinstance(reason, str)]
    assert len(wrong) == 11


def test_without_a_checkout_a_peer_is_skipped(bench: Bench) -> None:
    (found,) = cases_forward.results(
        bench, "guided", peers.guided_twins, 4, cases_forward.Targets()
    )
    assert found.skipped is not None
    assert found.skipped.startswith("no --peer-path")
    assert found.ratio is None


def test_a_checkout_is_found_beside_or_below(tmp_path: Path) -> None:
    package = tmp_path / "clone" / "some_peer_project"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text("import no_such_module_anywhere")
    assert peers.from_checkout([tmp_path], "some_peer_project").__name__ == "some_peer_project"
    with pytest.raises(PeerMissing, match="cannot be imported: No module"):
        peers.from_checkout([tmp_path / "clone"], "some_peer_project.net")


# --- the floor ----------------------------------------------------------------------------------

SPECS: dict[str, UNetSpec] = {
    "tiny": tiny(),
    "lucidrains": lucidrains_family(8, (1, 2)),
    "text002": text002(hidden_dims=(8, 16, 16), time_dim=16),
    "adm": adm_family(32, (1, 2), 1, (1,)),
    "ddpmpp": ddpmpp_family(16, (1, 2), 1, (0,)),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_floor_records_every_product(name: str) -> None:
    """The sum of its multiply-adds is what `cost` counts from the program alone."""
    spec = SPECS[name]
    recorded = floor.record(UNet(spec), torch.randn(2, 3, 16, 16), torch.zeros(2))
    assert recorded.multiply_adds() == 2 * cost.total_multiply_adds(spec, 16, 16)


def test_the_floor_records_every_layer_once() -> None:
    """Counted by hooks on the layers themselves."""
    net, seen = UNet(tiny()), list[str]()
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    recorded = floor.record(net, torch.randn(1, 3, 16, 16), torch.zeros(1))
    kinds = [one.kind for one in recorded.products.elements()]
    assert len(seen) == kinds.count(floor.Kind.CONV) + kinds.count(floor.Kind.LINEAR)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert kinds.count(floor.Kind.ATTENTION) == sum("qkv" in name for name in seen)
    assert recorded.normed >= len(norms) * 16


def test_norm_traffic_is_counted_by_hand() -> None:
    spec = UNetSpec(3, 3, scaling.attention(32).program, scaling.attention(32).style)
    recorded = floor.record(UNet(spec), torch.randn(2, 3, 8, 8), torch.zeros(2))
    features = 2 * 32 * 8 * 8
    assert recorded.normed == 2 * features  # the attention's norm and the head's
    assert recorded.traffic(training=False, parameters=7) == 2 * 2 * 2 * features
    assert recorded.traffic(training=True, parameters=7) == 5 * 2 * 2 * features + 28 * 7


def test_every_recorded_product_runs_alone(bench: Bench) -> None:
    for spec in (SPECS["lucidrains"], SPECS["text002"]):
        recorded = floor.record(UNet(spec), torch.randn(1, 3, 16, 16), torch.zeros(1))
        for training in (False, True):
            found = floor.measure(bench, recorded, training, 1)
            assert found.seconds >= found.products > 0
            assert found.traffic > 0


def test_a_product_alone_is_the_product_in_the_network() -> None:
    product = floor.Product(
        floor.Kind.CONV,
        (floor.Shape((2, 6, 9, 9)), floor.Shape((4, 6, 3, 3)), None, (2, 2), (1, 1), (1, 1), 1),
    )
    assert product(*product.operands(torch.device("cpu"))).shape == (2, 4, 5, 5)
    assert product.multiply_adds() == 2 * 4 * 5 * 5 * 6 * 9


# --- scaling ------------------------------------------------------------------------------------


def test_a_curve_is_judged_against_the_law() -> None:
    curve = {n: 3.0 * n**2 for n in (1, 2, 4, 8)}
    linear = {n: float(n) for n in (1, 2, 4, 8)}
    assert scaling.fitted("x", "", "y in x", curve, curve).holds is True
    wrong = scaling.fitted("x", "", "y in x", curve, linear)
    assert wrong.holds is False
    assert wrong.ratio == pytest.approx(2)
    assert wrong.target == "<= 1.10"


@pytest.mark.parametrize("way", [Way.PLAIN, Way.BF16])
def test_attention_keeps_bytes_linear_in_pixels(way: Way) -> None:
    net = UNet(scaling.attention(8))
    kept = {n * n: scaling.saved_bytes(net, way, n) for n in (8, 16, 32)}
    law = power_law(list(kept), list(kept.values()))
    assert law.exponent == pytest.approx(1, abs=0.05)


def test_scores_that_are_kept_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", scores)
    net = UNet(scaling.attention(8))
    kept = {n * n: scaling.saved_bytes(net, Way.PLAIN, n) for n in (8, 16, 32)}
    assert power_law(list(kept), list(kept.values())).exponent > 1.5


def test_scaling_runs(bench: Bench) -> None:
    found = list(scaling.times(bench, (8, 16, 32), (32, 48, 64), (1, 2, 4), (1, 2, 3)))
    found += scaling.memory(bench, (16, 24, 32), 8)
    names = [one.name.removeprefix("scaling/") for one in found]
    assert names == ["pixels", "width", "batch", "steps", "attention/saved", "attention/peak"]
    laws = [one.more["law"] for one in found]
    assert laws[0] == pytest.approx(1, abs=0.05)
    assert 1.5 < laws[1] < 2.05
    assert laws[2:] == pytest.approx([0, 1, 1, 1])


# --- whole cases, tiny --------------------------------------------------------------------------


def keep(bench: Bench, key: str) -> None:
    """As if a run before had found that nothing beats this form; so nothing is compiled."""
    peers._kept(bench, key).write(peers.Tuned(Form(Arithmetic.AUTOCAST), 0.0, {}))


def lines_of(bench: Bench, found: Iterator[Result]) -> list[dict[str, object]]:
    return [one.line(machine(1, 0.0), {}, "") for one in found]


def test_forward_case(bench: Bench) -> None:
    keep(bench, "forward/small/b2")
    found = lines_of(
        bench,
        cases_forward.results(bench, "small", small_twins, 2, cases_forward.DDPM_TARGETS),
    )
    names = [str(line["name"]).rpartition("/")[2] for line in found]
    assert names == ["default", "tuned", "floor", "eager"]
    assert all(len(line["ours_s"]) == BRIEF.pairs for line in found)  # pyright: ignore[reportArgumentType]
    assert all(line["holds"] in (True, False) for line in found)
    twins = small_twins(bench)
    assert {line["flop_per_image"] for line in found} == {cost.flops(twins.ours().spec, 8, 8)}
    assert found[2]["of_floor"] == found[2]["ratio"]


def test_train_case(bench: Bench) -> None:
    keep(bench, "train/small/b2")
    targets = cases_train.Targets(">= 3.5", ">= 1.3")
    found = list(cases_train.results(bench, "small", small_twins, 2, targets))
    assert [one.name for one in found] == ["train/small/b2/default", "train/small/b2/tuned"]
    assert all(one.more["gradient_difference"] <= BFLOAT16 for one in found)
    net = cases_train.lesson(bench, "small", small_twins(bench), 2)
    assert cases_train.against_floor(bench, net, Way.PLAIN).of_floor is not None


def test_both_training_steps_learn_the_same(bench: Bench) -> None:
    """Same weights, pictures, noise and levels: the same loss, up to the peer's float32 table."""
    given_ = cases_train.lesson(bench, "small", small_twins(bench), 2)
    mine = cases_train.our_step(given_, Way.PLAIN)()
    theirs = cases_train.their_step(given_, AS_IT_COMES)()
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_memory_case(bench: Bench) -> None:
    keep(bench, "train/ddpm/b8")
    (found,) = cases_memory.results(bench, SMALL, batch=2)
    assert found.ratio is not None
    processes = found.more["processes"]
    assert set(processes) == {"ours", "default", "tuned"}
    assert all(one["peak"] >= one["before"] > 2**24 for one in processes.values())
    assert found.ratio == processes["ours"]["peak"] / min(
        processes["default"]["peak"], processes["tuned"]["peak"]
    )


def test_sample_case(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases_sample, "PICTURES", 2)
    (found,) = cases_sample.results(bench, small_twins)
    assert found.target == ">= 50"
    assert found.unit == "s"
    assert "multiplied by 1000" in found.how


def test_the_loop_is_its_step_times_a_thousand(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    slow = replace(bench, clock=clock)
    step = clock.lasting(itertools.repeat(0.25))
    monkeypatch.setattr(cases_sample, "their_step", lambda twins, form: step)
    monkeypatch.setattr(cases_sample, "our_side", lambda bench, twins: Side("ours", lambda: 5.0))
    found = cases_sample.against(slow, small_twins(bench), AS_IT_COMES, "default", ">= 50")
    assert found.peer == pytest.approx(250.0)
    assert found.ours == pytest.approx(5.0)
    assert found.ratio == pytest.approx(50.0)
    assert found.holds is True


def test_data_cases(bench: Bench) -> None:
    (decoded,) = cases_data.decoding(bench, files=6)
    assert decoded.unit == "images/s"
    (made,) = cases_data.batches(bench, small_twins)
    assert made.target == "<= 0.02"


def test_a_wrong_pixel_is_refused(bench: Bench) -> None:
    cases_data.write_pictures(bench.scratch, 4)
    from undiffuse import images

    plain = cases_data.plain_decode(bench.scratch)
    loaded = images.load(bench.scratch)
    cases_data.check_pixels(loaded, plain)
    plain[2, 1, 5, 5] ^= 1
    with pytest.raises(NotEqual):
        cases_data.check_pixels(loaded, plain)


@pytest.mark.slow
def test_startup_cases(bench: Bench) -> None:
    bench = replace(bench, budget=replace(BRIEF, cold=1))
    (shown,) = cases_startup.help_text(bench)
    assert len(shown.ours_s) == 1
    (found,) = cases_startup.first_image(bench, small_twins)
    assert found.of == "seconds above the least"
    assert all(one > 0 for one in (*found.ours_s, *found.peer_s))


def test_first_image_is_a_difference() -> None:
    found = cases_startup.above(Pairs((3.0, 3.2, 3.1), (2.5, 2.6, 2.6)))
    assert found.ratio == pytest.approx(0.5)
    assert found.holds is True


def test_roofline_reports_rates(bench: Bench) -> None:
    found = {one.name: one for one in roofline.results(bench)}
    assert found["roofline/gemm/float32/1-threads"].unit == "GFLOP/s"
    assert found["roofline/copy/memory"].unit == "GB/s"


def test_bandwidth_counts_what_is_read_and_written(bench: Bench) -> None:
    clock = FakeClock()
    copied = replace(bench, clock=lambda: clock.now)
    real = Tensor.copy_

    def slow(self: Tensor, source: Tensor) -> Tensor:
        clock.now += 0.5
        return real(self, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "copy_", slow)
        assert roofline.bandwidth(copied) == pytest.approx(2 * 2**16 / 0.5)


# --- the command --------------------------------------------------------------------------------


def test_names_are_chosen_by_their_beginning() -> None:
    cases = run.chosen_cases(run.CASES, False, ["forward/ddpm", "startup/help"])
    assert [one.name for one in cases] == ["forward/ddpm/b8", "forward/ddpm/b32", "startup/help"]
    assert run.chosen_cases(run.CASES, False, []) == list(run.CASES)
    assert len({one.name for one in run.CASES}) == len(run.CASES)


def test_quick_has_every_headline() -> None:
    quick = [one.name for one in run.chosen_cases(run.CASES, True, [])]
    wanted = "forward/ddpm/b8 train/ddpm/b8 memory sample startup/help startup/import"
    assert quick == [*wanted.split(), "startup/first-image"]


def test_lines_are_printed_and_appended(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    case = Case("x", lambda bench: iter([result()]))
    for _ in range(2):
        assert run.measure(bench, [case], tmp_path) == 0
    shown = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    (file,) = tmp_path.glob("*.jsonl")
    assert [json.loads(text) for text in file.read_text().splitlines()] == shown
    assert file.stem == machine_kind(shown[0]["machine"])


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "nothing"]) == 2
    assert "forward/ddpm/b8" in capsys.readouterr().err


# --- the page -----------------------------------------------------------------------------------


def written(folder: Path, *found: Result, load: float = 0.5) -> None:
    folder.mkdir(exist_ok=True)
    about = {**QUIET, "load_after": load}
    lines = [one.line(about, {"torch": "2.13"}, "abc123") for one in found]
    with (folder / "some-machine.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_the_page_is_the_same_to_the_byte(tmp_path: Path) -> None:
    missed = replace(result(target=">= 4"), name="forward/x/b8/tuned")
    absent = Result("forward/y/b4/default", "forward pass", skipped="no --peer-path")
    written(tmp_path / "results", result(), missed, absent)
    (tmp_path / "notes.md").write_text("## Why\n\nBecause of *this*.\n")
    drawn: list[dict[str, bytes]] = []
    for name in ("a", "b"):
        docs = tmp_path / name
        docs.mkdir()
        page.write_page(tmp_path / "results", docs, tmp_path / "notes.md")
        files = [file for file in sorted(docs.rglob("*")) if file.is_file()]
        drawn.append({file.relative_to(docs).as_posix(): file.read_bytes() for file in files})
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"performance.md", "images/performance/some-machine.svg"}
    text = drawn[0]["performance.md"].decode()
    row = (
        "| `forward/x/b8/default` | 8.00 images/s | 2.67 images/s | 3.00 [3.00, 3.00] | ≥ 2 | yes |"
    )
    assert row in text
    assert "| ≥ 4 | **no** |" in text
    assert "`forward/y/b4/default`: no --peer-path" in text
    assert text.endswith("## Why\n\nBecause of *this*.\n")


def test_the_newest_line_counts_and_an_unusable_one_says_so(tmp_path: Path) -> None:
    written(tmp_path / "results", result(target=">= 4"))
    written(tmp_path / "results", result(), load=9.0)
    page.write_page(tmp_path / "results", tmp_path, tmp_path / "none.md")
    text = (tmp_path / "performance.md").read_text()
    assert text.count("| `forward/x/b8/default` |") == 1
    assert "| yes, but not usable |" in text
    assert "load average 9.00 after" in text


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    page.write_page(tmp_path / "none", tmp_path, tmp_path / "none.md")
    assert "No results yet" in (tmp_path / "performance.md").read_text()


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    page.write_page(page.HERE / "results", tmp_path, page.HERE / "notes.md")
    docs = page.HERE.parent / "docs"
    text = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert (docs / "performance.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("value", "target", "place"),
    [(5, ">= 5", 1), (10, ">= 5", 2), (0.3, "<= 0.6", 2), (-1, "<= 1", 20), (0.01, ">= 5", 0.1)],
)
def test_the_chart_shows_how_far_a_target_is_passed(
    value: float, target: str, place: float
) -> None:
    assert page.beyond(value, target) == pytest.approx(place)


def test_fields_of_results_are_those_of_the_schema_and_plain() -> None:
    names = {one.name for one in dataclasses.fields(Result)}
    assert {"name", "ratio", "spread", "ours", "peer", "target"} <= names
    assert isinstance(SimpleNamespace(**result().line(QUIET, {}, "")).more, dict)

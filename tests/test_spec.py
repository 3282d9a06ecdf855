"""Programs: what `trace` says about those that work, and about those that cannot."""

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from programs import faulty_programs, programs, specs, unchecked
from undiffuse.errors import ConfigError, SpecError
from undiffuse.spec import (
    Attn,
    Concat,
    Conv,
    Down,
    Downsampling,
    Embedding,
    Join,
    Out,
    Part,
    Program,
    Res,
    Resize,
    Site,
    Skip,
    Style,
    UNetSpec,
    Up,
    Upsampling,
    largest_divisor,
    trace,
)

PLAIN = unchecked("spec")  # for values that no type checker would let through

U: Program = (Conv(8), Skip(), Down(), Res(12), Up(), Concat(), Res(6), Out())


def refused(program: Program, in_channels: int = 3) -> str:
    with pytest.raises(SpecError) as caught:
        UNetSpec(in_channels, 3, program)
    return str(caught.value)


def built_or_message(build: Callable[[], Any]) -> Any:
    """What `build` returns, or the text of the one error it may raise."""
    try:
        return build()
    except SpecError as error:
        return str(error)


def is_one_line(message: str) -> bool:
    return bool(message) and "\n" not in message and not message.endswith(".")


# --- what works ---------------------------------------------------------------------------------


def test_trace_of_a_small_u_is_the_one_done_by_hand() -> None:
    encoder, decoder = Part.ENCODER, Part.DECODER
    assert list(trace(UNetSpec(3, 1, U))) == [
        Site(0, "00_conv", Conv(8), encoder, 3, 8, 1, 1),
        Site(1, "01_skip", Skip(), encoder, 8, 8, 1, 1),
        Site(2, "02_down", Down(), encoder, 8, 8, 1, 2),
        Site(3, "03_res", Res(12), Part.BOTTLENECK, 8, 12, 2, 2),
        Site(4, "04_up", Up(), decoder, 12, 12, 2, 1),
        Site(5, "05_concat", Concat(), decoder, 12, 20, 1, 1, skip=1, skip_width=8),
        Site(6, "06_res", Res(6), decoder, 20, 6, 1, 1),
        Site(7, "07_out", Out(), decoder, 6, 1, 1, 1),
    ]


def test_an_added_skip_keeps_the_width_and_a_joined_one_sums_them() -> None:
    added = list(trace(UNetSpec(3, 3, (Conv(8), Skip(), Res(8), Concat(Join.ADD), Out()))))
    joined = list(trace(UNetSpec(3, 3, (Conv(8), Skip(), Res(8), Concat(), Out()))))
    assert (added[3].out_width, joined[3].out_width) == (8, 16)


def test_concat_pops_the_newest_skip() -> None:
    program = (Conv(4), Skip(), Conv(5), Skip(), Conv(6), Concat(), Concat(), Out())
    popped = [(s.skip, s.skip_width) for s in trace(UNetSpec(3, 3, program)) if s.skip is not None]
    assert popped == [(3, 5), (1, 4)]


def test_down_and_up_may_change_the_width() -> None:
    program = (Down(width=5), Up(Upsampling.DECONV4, 7), Out())
    assert [s.out_width for s in trace(UNetSpec(3, 2, program))] == [5, 7, 2]


def test_stride_is_the_deepest_scale() -> None:
    deep = (Res(4, Resize.DOWN), Down(), Down(), Up(), Up(), Res(4, Resize.UP), Out())
    assert UNetSpec(3, 3, deep).stride == 8
    assert UNetSpec(3, 3, (Out(),)).stride == 1


def test_a_program_of_more_than_a_hundred_ops_has_names_of_three_digits() -> None:
    sites = list(trace(UNetSpec(3, 3, (*(Conv(4) for _ in range(100)), Out()))))
    assert (sites[7].name, sites[100].name) == ("007_conv", "100_out")
    assert next(trace(UNetSpec(3, 3, (*(Conv(4) for _ in range(99)), Out())))).name == "00_conv"


def test_parts_of_a_program_without_a_u() -> None:
    plain = UNetSpec(3, 3, (Conv(4), Conv(4), Out()))
    assert {site.part for site in trace(plain)} == {Part.ENCODER}


def test_with_classes_changes_the_label_table_alone() -> None:
    spec = UNetSpec(3, 3, U)
    labelled = spec.with_classes(10, null=True)
    assert labelled.classes == 10
    assert labelled.style.embedding.null
    assert labelled.with_classes(0, null=False) == spec


def test_with_augment_changes_the_map_alone() -> None:
    spec = UNetSpec(3, 3, U)
    told = spec.with_augment(9)
    assert (spec.augment, told.augment) == (0, 9)
    assert told.with_augment(0) == spec


def test_a_network_that_cannot_hear_of_augmentation_is_refused() -> None:
    """It would generate what it was not told is augmented."""
    with pytest.raises(SpecError, match=r"embedding\.augment is 9, but no op hears it.* add a Res"):
        UNetSpec(3, 3, (Conv(4), Out())).with_augment(9)


def test_specs_are_values() -> None:
    assert hash(UNetSpec(3, 3, U)) == hash(UNetSpec(3, 3, U))
    with pytest.raises(FrozenInstanceError):
        UNetSpec(3, 3, U).in_channels = 4  # type: ignore[misc]


@given(st.integers(1, 300), st.integers(1, 64))
def test_largest_divisor_by_trying_all(width: int, limit: int) -> None:
    found = largest_divisor(width, limit)
    assert found == max(g for g in range(1, limit + 1) if width % g == 0)


@settings(max_examples=150)
@given(specs())
def test_invariants_of_every_trace(spec: UNetSpec) -> None:
    sites = list(trace(spec))
    assert [site.op for site in sites] == list(spec.program)
    assert [site.index for site in sites] == list(range(len(sites)))
    assert [site.name for site in sites] == sorted(site.name for site in sites)
    for before, after in pairwise(sites):
        assert (after.in_width, after.in_scale) == (before.out_width, before.out_scale)
    assert (sites[0].in_width, sites[-1].out_width) == (spec.in_channels, spec.out_channels)
    assert (sites[0].in_scale, sites[-1].out_scale) == (1, 1)
    pushed = [site.index for site in sites if isinstance(site.op, Skip)]
    popped = [site.skip for site in sites if isinstance(site.op, Concat)]
    assert sorted(pushed) == sorted(index for index in popped if index is not None)
    for site in sites:
        if site.skip is not None:
            saved = sites[site.skip]
            assert (saved.out_width, saved.out_scale) == (site.skip_width, site.in_scale)
    order = (Part.ENCODER, Part.BOTTLENECK, Part.DECODER)
    parts = [order.index(site.part) for site in sites]
    assert parts == sorted(parts)


# --- what does not ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ((), "program must end with Out(); add Out() as its last op"),
        ((Conv(8),), "program must end with Out(); add Out() as its last op"),
        ((Conv(8), Out(), Out()), "op 1 Out: only the last op may be Out; remove it"),
        (
            (Conv(8), Skip(), Down(), Concat(), Out()),
            "op 3 Concat: features are at 1/2, but op 1 Skip stored them at 1/1; add Up() before"
            " op 3",
        ),
        (
            (Conv(8), Down(), Skip(), Up(), Concat(), Out()),
            "op 4 Concat: features are at 1/1, but op 2 Skip stored them at 1/2; add Down() before"
            " op 4",
        ),
        (
            (Conv(8), Skip(), Conv(4), Concat(Join.ADD), Out()),
            "op 3 Concat(add): features have 4 channels, but op 1 Skip stored 8; make them equal",
        ),
        ((Conv(8), Concat(), Out()), "op 1 Concat: no Skip is left; add Skip() before it"),
        ((Conv(8), Skip(), Out()), "Skip without Concat: ops 1"),
        ((Skip(), Conv(8), Skip(), Out()), "Skip without Concat: ops 0, 2"),
        (
            (Conv(65), Attn(4), Out()),
            "op 1 Attn(heads=4): 65 channels do not split into 4 heads; 1, 5, 13, 65 do",
        ),
        ((Conv(8), Attn(0), Out()), "op 1 Attn: heads must be a whole number of at least 1; got 0"),
        ((Conv(8), Skip(), Up(), Out()), "op 2 Up: already at full resolution; remove it"),
        ((Res(8, Resize.UP), Out()), "op 0 Res: already at full resolution; remove it"),
        (
            (Down(), Out()),
            "the program ends at 1/2 resolution: one Up is missing before Out",
        ),
        (
            (Down(), Res(8, Resize.DOWN), Down(), Out()),
            "the program ends at 1/8 resolution: 3 Up are missing before Out",
        ),
        ((Conv(0), Out()), "op 0 Conv: width must be a whole number of at least 1; got 0"),
        ((Res(-4), Out()), "op 0 Res: width must be a whole number of at least 1; got -4"),
        ((Down(width=0), Out()), "op 0 Down: width must be a whole number of at least 1; got 0"),
        (
            (Conv(8, 4), Out()),
            "op 0 Conv: kernel must be odd so that sizes are kept; got 4",
        ),
        ((Out(kernel=2),), "op 0 Out: kernel must be odd so that sizes are kept; got 2"),
        ((Out(kernel=-1),), "op 0 Out: kernel must be odd so that sizes are kept; got -1"),
        (
            (Conv(8), Down(Downsampling.MAX, 16), Up(), Out()),
            "op 1 Down: max cannot change 8 channels to 16; leave width out or use a convolution",
        ),
        (
            (Conv(8), Down(), Up(Upsampling.NEAREST, 16), Out()),
            "op 2 Up: nearest cannot change 8 channels to 16; leave width out or use a convolution",
        ),
    ],
)
def test_message_of_a_program_that_cannot_work(program: Program, message: str) -> None:
    assert refused(program) == message


def test_a_width_repeated_in_pooling_is_fine() -> None:
    UNetSpec(3, 3, (Conv(8), Down(Downsampling.MAX, 8), Up(Upsampling.NEAREST, 8), Out()))


def test_the_message_about_heads_is_quick_and_short_for_a_huge_width() -> None:
    assert refused((Conv(2**61), Attn(3), Out())).endswith("; 1, 2, 4, 8, 16, 32, 64, 128 do")


@pytest.mark.parametrize("field", ["in_channels", "out_channels"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "64", None, True])
def test_message_about_channels(field: str, value: Any) -> None:
    channels = {"in_channels": 3, "out_channels": 3, field: value}
    with pytest.raises(SpecError) as caught:
        PLAIN.UNetSpec(**channels, program=(PLAIN.Out(),))
    assert str(caught.value) == f"{field} must be a whole number of at least 1; got {value!r}"


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (PLAIN.Conv("64"), "op 0 Conv: width must be a whole number of at least 1; got '64'"),
        (PLAIN.Conv(True), "op 0 Conv: width must be a whole number of at least 1; got True"),
        (PLAIN.Res(None), "op 0 Res: width must be a whole number of at least 1; got None"),
        (PLAIN.Conv(8, 3.0), "op 0 Conv: kernel must be odd so that sizes are kept; got 3.0"),
        (
            PLAIN.Down("max"),
            "op 0 Down: by must be one of Downsampling.CONV, Downsampling.CONV_END,"
            " Downsampling.CONV4, Downsampling.UNSHUFFLE, Downsampling.MAX, Downsampling.AVG;"
            " got 'max'",
        ),
        (
            PLAIN.Up(PLAIN.Downsampling.CONV),
            "op 0 Up: by must be one of Upsampling.NEAREST, Upsampling.NEAREST_CONV,"
            " Upsampling.DECONV4; got <Downsampling.CONV: 'conv'>",
        ),
        (
            PLAIN.Act("tanh"),
            "op 0 Act: by must be one of Activation.SILU, Activation.GELU, Activation.RELU;"
            " got 'tanh'",
        ),
        (
            PLAIN.Res(8, "down"),
            "op 0 Res: resize must be one of Resize.DOWN, Resize.UP; got 'down'",
        ),
        (
            "conv",
            "op 0 is 'conv', which is no op; use one of Conv, Res, Attn, LinearAttn, Down, Up, Act,"
            " Skip, Concat, Out",
        ),
        (
            PLAIN.Skip,
            "op 0 is <class 'unchecked_spec.Skip'>, which is no op; use one of Conv, Res, Attn,"
            " LinearAttn, Down, Up, Act, Skip, Concat, Out",
        ),
    ],
)
def test_message_about_an_op_of_the_wrong_type(op: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        PLAIN.UNetSpec(3, 3, (op, PLAIN.Out()))
    assert str(caught.value) == message


def test_message_about_a_join_of_the_wrong_type() -> None:
    with pytest.raises(SpecError) as caught:
        PLAIN.UNetSpec(3, 3, (PLAIN.Skip(), PLAIN.Concat("add"), PLAIN.Out()))
    assert str(caught.value) == "op 1 Concat: by must be one of Join.CONCAT, Join.ADD; got 'add'"


def test_a_list_is_no_program() -> None:
    with pytest.raises(SpecError) as caught:
        PLAIN.UNetSpec(3, 3, [PLAIN.Out()])
    assert str(caught.value) == "program must be a tuple of ops; got a list"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("groups", 0, "style.groups must be a whole number of at least 1; got 0"),
        ("groups", 1.5, "style.groups must be a whole number of at least 1; got 1.5"),
        ("dropout", -0.1, "style.dropout must be at least 0 and below 1; got -0.1"),
        ("dropout", 1.0, "style.dropout must be at least 0 and below 1; got 1.0"),
        ("dropout", float("nan"), "style.dropout must be at least 0 and below 1; got nan"),
        ("dropout", "0.1", "style.dropout must be at least 0 and below 1; got '0.1'"),
        ("eps", 0.0, "style.eps must be a finite number above 0; got 0.0"),
        ("eps", float("inf"), "style.eps must be a finite number above 0; got inf"),
        ("skip_gain", -1.0, "style.skip_gain must be a finite number above 0; got -1.0"),
        ("skip_gain", None, "style.skip_gain must be a finite number above 0; got None"),
        (
            "order",
            "norm_act_conv",
            "style.order must be one of Order.NORM_ACT_CONV, Order.CONV_ACT_NORM,"
            " Order.CONV_NORM_ACT; got 'norm_act_conv'",
        ),
        ("inject", None, "style.inject must be one of Inject.ADD, Inject.SCALE_SHIFT; got None"),
        (
            "activation",
            "silu",
            "style.activation must be one of Activation.SILU, Activation.GELU, Activation.RELU;"
            " got 'silu'",
        ),
    ],
)
def test_message_about_style(field: str, value: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        PLAIN.UNetSpec(3, 3, (PLAIN.Out(),), PLAIN.Style(**{field: value}))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "embedding.width must be a whole number of at least 1; got 0"),
        ({"width": 1}, "embedding.width must be at least 2; got 1"),
        ({"hidden": -1}, "embedding.hidden must be a whole number of at least 1; got -1"),
        ({"out": 2.5}, "embedding.out must be a whole number of at least 1; got 2.5"),
        ({"classes": -1}, "embedding.classes must be a whole number of at least 0; got -1"),
        ({"classes": True}, "embedding.classes must be a whole number of at least 0; got True"),
        ({"augment": -1}, "embedding.augment must be a whole number of at least 0; got -1"),
        ({"augment": 9.0}, "embedding.augment must be a whole number of at least 0; got 9.0"),
        ({"null": True}, "embedding.null needs classes; got classes=0: set null=False"),
        (
            {"half_minus_one": True, "width": 3},
            "embedding.half_minus_one needs width of at least 4; got 3",
        ),
        (
            {"final_activation": "silu"},
            "embedding.final_activation must be one of Activation.SILU, Activation.GELU,"
            " Activation.RELU; got 'silu'",
        ),
        (
            {"activation": None},
            "embedding.activation must be one of Activation.SILU, Activation.GELU,"
            " Activation.RELU; got None",
        ),
    ],
)
def test_message_about_the_embedding(changes: dict[str, Any], message: str) -> None:
    style = PLAIN.Style(embedding=PLAIN.Embedding(**changes))
    with pytest.raises(SpecError) as caught:
        PLAIN.UNetSpec(3, 3, (PLAIN.Out(),), style)
    assert str(caught.value) == message


def test_a_spec_error_is_a_config_error_and_ends_with_code_2() -> None:
    with pytest.raises(ConfigError) as caught:
        UNetSpec(3, 3, ())
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)


def test_replacing_a_field_checks_again() -> None:
    spec = UNetSpec(3, 3, U, Style(embedding=Embedding(8, 8, 8)))
    with pytest.raises(SpecError, match="must end with Out"):
        replace(spec, program=U[:-1])
    with pytest.raises(SpecError, match=re.escape("style.dropout")):
        replace(spec, style=replace(spec.style, dropout=1.0))


@settings(max_examples=300)
@given(faulty_programs())
def test_a_damaged_program_works_or_raises_a_spec_error(program: Program) -> None:
    outcome = built_or_message(lambda: UNetSpec(3, 3, program))
    if isinstance(outcome, UNetSpec):
        assert [site.op for site in trace(outcome)] == list(program)
    else:
        assert is_one_line(outcome)


@given(programs(), st.data())
def test_a_program_without_one_of_its_skips_is_refused(program: Program, data: Any) -> None:
    at = [i for i, op in enumerate(program) if isinstance(op, Skip | Concat | Down | Up)]
    if not at:
        return
    index = data.draw(st.sampled_from(at))
    with pytest.raises(SpecError):
        UNetSpec(3, 3, (*program[:index], *program[index + 1 :]))


NONSENSE = st.one_of(
    st.sampled_from((0, -1, True, 1.5, float("nan"), "64", None, 2**31, b"", (), 3 + 0j)),
    st.integers(-(2**65), 2**65),
    st.text(max_size=3),
)


@settings(max_examples=300)
@given(st.data())
def test_nonsense_in_any_field_is_a_spec_error_or_works(data: Any) -> None:
    kind = data.draw(st.sampled_from((PLAIN.Style, PLAIN.Embedding, *PLAIN.OPS)))
    names = [name for name in kind.__dataclass_fields__ if name not in ("embedding", "width")]
    chosen = {name: data.draw(NONSENSE) for name in names if data.draw(st.booleans())}
    if "width" in kind.__dataclass_fields__:
        chosen["width"] = data.draw(NONSENSE)
    one = kind(**chosen)
    program = (PLAIN.Out(),)
    style = PLAIN.Style()
    if kind is PLAIN.Style:
        style = one
    elif kind is PLAIN.Embedding:
        style = PLAIN.Style(embedding=one)
    else:
        program = (one, PLAIN.Out())
    outcome = built_or_message(lambda: PLAIN.UNetSpec(3, 3, program, style))
    assert isinstance(outcome, PLAIN.UNetSpec) or is_one_line(outcome)

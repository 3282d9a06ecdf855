"""The known networks: their exact sizes, their shapes, and the names of presets."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from undiffuse import recipes
from undiffuse.errors import ConfigError, SpecError
from undiffuse.recipes import PRESETS, preset
from undiffuse.spec import (
    Attn,
    Concat,
    Conv,
    Down,
    Inject,
    Part,
    Program,
    Res,
    Resize,
    Skip,
    UNetSpec,
    trace,
)
from undiffuse.unet import UNet


def count(spec: UNetSpec) -> int:
    """Parameters of the network really built, without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(spec).parameters())


# Published counts where there are any: DDPM 35.7 M and 113.7 M, ADM-64 295.9 M, improved 121 M.
GOLDEN: dict[str, tuple[Callable[[], UNetSpec], int]] = {
    "tiny": (lambda: preset("tiny"), 1_164_259),
    "compact": (lambda: preset("compact"), 1_695_651),
    "light": (lambda: preset("light"), 8_952_067),
    "ddpm": (lambda: preset("ddpm"), 35_746_307),
    "improved": (lambda: preset("improved"), 121_060_483),
    "improved, 6 outputs": (lambda: replace(preset("improved"), out_channels=6), 121_063_942),
    "highres": (lambda: preset("highres"), 113_673_219),
    "adm-64": (lambda: preset("adm-64"), 295_131_267),
    "adm-64, 1000 classes": (lambda: preset("adm-64", classes=1000, null=False), 295_899_267),
    # 2206.00364's carry 1,152 parameters more, for augmentation labels.
    "DDPM++ CIFAR-10": (lambda: recipes.ddpmpp_family(128, (2, 2, 2), 4, (1,)), 55_732_739),
    "DDPM++ CIFAR-10, classes": (
        lambda: recipes.ddpmpp_family(128, (2, 2, 2), 4, (1,)).with_classes(10, True),
        55_735_299 - 1_152,
    ),
    "DDPM++ 64": (
        lambda: recipes.ddpmpp_family(128, (1, 2, 2, 2), 4, (2,)),
        61_805_571 - 1_152,
    ),
    "denoising-diffusion-pytorch": (lambda: recipes.lucidrains_family(64), 35_711_491),
    "improved CIFAR-10": (
        lambda: replace(recipes.improved_family(128, (1, 2, 2, 2), 3, (1, 2)), out_channels=6),
        52_546_438,
    ),
    "improved 64, classes": (
        lambda: replace(
            recipes.improved_family(192, (1, 2, 3, 4), 3, (2, 3)), out_channels=6
        ).with_classes(1000, False),
        273_049_350,
    ),
    "ADM-64, 6 outputs": (
        lambda: replace(preset("adm-64", classes=1000, null=False), out_channels=6),
        295_904_454,
    ),
    "ADM-128": (
        lambda: replace(
            recipes.adm_family(256, (1, 1, 2, 3, 4), 2, (2, 3, 4)), out_channels=6
        ).with_classes(1000, False),
        421_529_606,
    ),
    "ADM-256": (
        lambda: replace(
            recipes.adm_family(256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)), out_channels=6
        ).with_classes(1000, False),
        553_838_086,
    ),
    "ADM-512": (
        lambda: replace(
            recipes.adm_family(256, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6)), out_channels=6
        ).with_classes(1000, False),
        558_997_638,
    ),
    "text 000": (recipes.text000, 4_530_243),
    "text 000, figure": (recipes.text000_figure, 22_786_691),
    "text 001": (recipes.text001, 74_051_331),
    "text 001, twice as wide": (lambda: recipes.text001(256), 296_017_411),
    "text 001, twice the blocks": (lambda: recipes.text001(num_res_blocks=4), 120_213_507),
    "text 001, listing": (recipes.text001_listing, 29_109_763),
    "text 002": (recipes.text002, 2_748_579),
    "text 002, grey": (lambda: recipes.text002(1), 2_747_425),
    "text 002, wider": (lambda: recipes.text002(hidden_dims=(64, 128, 256)), 10_401_475),
    "text 002, two pairs": (lambda: recipes.text002(pairs=2), 1_419_043),
    "text 002, wider, two pairs": (
        lambda: recipes.text002(hidden_dims=(64, 128, 256), pairs=2),
        5_153_731,
    ),
    "text 003": (recipes.text003, 24_404_803),
    "text 003, scale-shift": (lambda: recipes.text003(Inject.SCALE_SHIFT), 25_046_275),
    "text 003, full-resolution skip": (
        lambda: recipes.text003(full_resolution_skip=True),
        24_540_611,
    ),
    "naive": (lambda: preset("naive"), 114_307),
    "naive, grey": (lambda: preset("naive", channels=1), 112_001),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_number_of_parameters(name: str) -> None:
    build, expected = GOLDEN[name]
    assert count(build()) == expected


U_SHAPED = {name: build for name, (build, _) in GOLDEN.items() if not name.startswith("naive")}


@pytest.mark.parametrize("name", U_SHAPED)
def test_the_bottleneck_is_res_attn_res_or_res_attn(name: str) -> None:
    sites = trace(U_SHAPED[name]())
    kinds = [type(site.op) for site in sites if site.part is Part.BOTTLENECK]
    expected = {"text 000": [Res, Attn], "denoisin": [Conv, Res, Attn, Res]}
    assert kinds == expected.get(name[:8], [Res, Attn, Res])


@pytest.mark.parametrize("name", U_SHAPED)
def test_resolution_falls_then_rises_and_skips_meet_their_scale(name: str) -> None:
    sites = list(trace(U_SHAPED[name]()))
    scales = [site.in_scale for site in sites]
    turn = scales.index(max(scales))
    assert scales[:turn] == sorted(scales[:turn])
    assert scales[turn:] == sorted(scales[turn:], reverse=True)
    for site in sites:
        if site.skip is not None:
            assert sites[site.skip].out_scale == site.in_scale


def kinds(program: Program, kind: type) -> int:
    return sum(isinstance(op, kind) for op in program)


@pytest.mark.parametrize(("levels", "blocks"), [(1, 1), (2, 1), (3, 2), (4, 3)])
def test_ddpm_keeps_one_skip_per_encoder_op(levels: int, blocks: int) -> None:
    program = recipes.ddpm_family(32, (1,) * levels, blocks, ()).program
    skips = 1 + levels * blocks + (levels - 1)
    assert kinds(program, Skip) == kinds(program, Concat) == skips
    assert kinds(program, Res) == levels * blocks + 2 + levels * (blocks + 1)


def shape_rows(spec: UNetSpec, size: int, kind: type) -> list[tuple[int, int]]:
    """(width, side) after every op of a kind."""
    return [(s.out_width, size // s.out_scale) for s in trace(spec) if isinstance(s.op, kind)]


def test_the_figure_of_text_000_has_its_five_resolutions() -> None:
    rows = shape_rows(recipes.text000_figure(), 256, Res)
    down = [(64, 256), (128, 128), (256, 64), (512, 32), (512, 16)]
    assert rows == [*down, (512, 32), (256, 64), (128, 128), (64, 256)]


def test_text_003_has_the_shapes_it_prints() -> None:
    rows = shape_rows(recipes.text003(), 256, Down)
    assert rows == [(64, 128), (128, 64), (256, 32), (512, 16)]
    ups = [
        (s.out_width, 256 // s.out_scale) for s in trace(recipes.text003()) if s.name[3:] == "up"
    ]
    assert ups == [(256, 32), (128, 64), (64, 128), (64, 256)]


def test_text_002_runs_its_bottleneck_at_an_eighth_and_with_two_pairs_at_a_quarter() -> None:
    assert recipes.text002().stride == 8
    assert recipes.text002(pairs=2).stride == 4
    assert recipes.text002(pairs=0).stride == 1


def attention_sides(name: str) -> set[int]:
    spec = preset(name)
    outside = (s for s in trace(spec) if s.part is not Part.BOTTLENECK)
    return {PRESETS[name].nominal // s.in_scale for s in outside if isinstance(s.op, Attn)}


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("light", {16}),
        ("ddpm", {16}),
        ("improved", {16, 8}),
        ("highres", {16}),
        ("adm-64", {32, 16, 8}),
    ],
)
def test_presets_attend_where_their_papers_do(name: str, sides: set[int]) -> None:
    assert attention_sides(name) == sides


def test_adm_has_heads_of_64_channels_and_improved_has_four_heads() -> None:
    adm = [(s.op, s.in_width) for s in trace(preset("adm-64")) if isinstance(s.op, Attn)]
    assert {width // op.heads for op, width in adm if isinstance(op, Attn)} == {64}
    improved = [op.heads for op in preset("improved").program if isinstance(op, Attn)]
    assert set(improved) == {4}


def test_adm_resamples_inside_residual_blocks() -> None:
    program = preset("adm-64").program
    assert kinds(program, Down) == 0
    assert [op.resize for op in program if isinstance(op, Res) and op.resize] == (
        [Resize.DOWN] * 3 + [Resize.UP] * 3
    )


def test_attention_levels_do_not_depend_on_the_size_of_the_pictures() -> None:
    deep = recipes.ddpm_family(32, (1, 2), 1, (1,))
    assert [s.in_scale for s in trace(deep) if isinstance(s.op, Attn)] == [2, 2, 2, 2]


# --- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_presets_take_and_give_the_channels_asked_for(name: str, channels: int) -> None:
    spec = preset(name, channels)
    assert (spec.in_channels, spec.out_channels) == (channels, channels)
    assert next(trace(spec)).op == Conv(next(trace(spec)).out_width)


def test_presets_start_without_classes_and_dropout() -> None:
    for name in PRESETS:
        spec = preset(name)
        assert (spec.classes, spec.style.embedding.null, spec.style.dropout) == (0, False, 0.0)


def test_classes_bring_a_row_for_none_unless_refused() -> None:
    assert preset("tiny", classes=10).style.embedding.null
    assert not preset("tiny", classes=10, null=False).style.embedding.null
    out = preset("tiny").style.embedding.out
    assert count(preset("tiny", classes=10)) - count(preset("tiny")) == 11 * out


def test_dropout_reaches_the_style_and_adds_no_parameters() -> None:
    assert preset("tiny", dropout=0.1).style.dropout == 0.1
    assert count(preset("tiny", dropout=0.1)) == count(preset("tiny"))


def test_augmentation_reaches_the_embedding() -> None:
    told, plain = preset("tiny", augment=9), preset("tiny")
    assert told == plain.with_augment(9)
    assert count(told) - count(plain) == 9 * plain.style.embedding.width


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        preset("ddmp")
    assert str(caught.value) == (
        "no preset is called 'ddmp'. Did you mean ddpm? There are: tiny, compact, light, ddpm,"
        " improved, highres, adm-64, naive"
    )
    with pytest.raises(ConfigError, match=r"no preset is called 'xyz'\. There are: tiny"):
        preset("xyz")


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(SpecError, match="in_channels must be a whole number"):
        preset("tiny", channels=0)
    with pytest.raises(SpecError, match=r"style\.dropout must be at least 0 and below 1; got 1\.5"):
        preset("tiny", dropout=1.5)
    with pytest.raises(SpecError, match=r"embedding\.classes must be a whole number"):
        preset("tiny", classes=-1)

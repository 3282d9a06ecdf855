"""What `cost` computes from a program, against the network really built and really counted."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from programs import specs
from undiffuse import cost, recipes
from undiffuse.recipes import PRESETS, preset
from undiffuse.spec import (
    Act,
    Activation,
    Attn,
    Concat,
    Conv,
    Down,
    Downsampling,
    Embedding,
    Inject,
    LinearAttn,
    Norm,
    Op,
    Order,
    Out,
    Program,
    Res,
    Resize,
    Skip,
    Style,
    UNetSpec,
    Up,
    Upsampling,
    trace,
)
from undiffuse.unet import UNet

SMALL = Style(embedding=Embedding(8, 12, 10))

RECIPES: dict[str, Callable[[], UNetSpec]] = {
    **{name: lambda name=name: preset(name) for name in PRESETS},
    "adm-64, 1000 classes": lambda: preset("adm-64", classes=1000),
    "tiny, augmentation": lambda: preset("tiny", augment=9),
    "text000": recipes.text000,
    "text000_figure": recipes.text000_figure,
    "text001": recipes.text001,
    "text001_listing": recipes.text001_listing,
    "text002": recipes.text002,
    "text003": recipes.text003,
    "text003, scale-shift": lambda: recipes.text003(Inject.SCALE_SHIFT),
}


def on_meta(spec: UNetSpec) -> UNet:
    with torch.device("meta"):
        return UNet(spec)


def numel(layer: nn.Module | None) -> int:
    return 0 if layer is None else sum(p.numel() for p in layer.parameters())


def counted(spec: UNetSpec, height: int, width: int) -> int:
    """Multiply-adds that torch itself counts in one forward pass of one picture."""
    net = on_meta(spec)
    x = torch.empty(1, spec.in_channels, height, width, device="meta")
    label = torch.zeros(1, dtype=torch.long, device="meta") if spec.classes else None
    counter = FlopCounterMode(display=False)
    # The fused kernels are counted as 0 on some devices; the plain products never are.
    with sdpa_kernel(SDPBackend.MATH), counter:
        net(x, torch.empty(1, device="meta"), label)
    return counter.get_total_flops() // 2


# --- parameters ---------------------------------------------------------------------------------


def check_parameters(spec: UNetSpec) -> None:
    net = on_meta(spec)
    for site in trace(spec):
        assert cost.parameters(site, spec.style) == numel(net.layers[site.name]), site.name
    assert cost.embedding_parameters(spec) == numel(net.embedding)
    assert cost.total_parameters(spec) == numel(net)


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_of_every_layer_of_the_known_networks(name: str) -> None:
    check_parameters(RECIPES[name]())


@settings(max_examples=40)
@given(specs())
def test_parameters_of_every_layer_of_random_networks(spec: UNetSpec) -> None:
    check_parameters(spec)


def test_by_component_is_the_table_of_text_001() -> None:
    assert cost.by_component(preset("ddpm")) == {
        "time_embed": 328_704,
        "init_conv": 3_584,
        "encoder": 10_190_720,
        "bottleneck": 2_888_704,
        "decoder": 22_330_880,
        "output": 3_715,
    }
    assert cost.by_component(recipes.text001()) == {
        "time_embed": 328_704,
        "init_conv": 3_584,
        "encoder": 18_589_056,
        "bottleneck": 11_020_288,
        "decoder": 44_105_984,
        "output": 3_715,
    }


@pytest.mark.parametrize("name", RECIPES)
def test_components_are_ordered_and_add_up(name: str) -> None:
    spec = RECIPES[name]()
    parts = cost.by_component(spec)
    assert tuple(parts) == cost.COMPONENTS
    assert sum(parts.values()) == cost.total_parameters(spec)


# --- multiply-adds ------------------------------------------------------------------------------


@pytest.mark.parametrize("by", Downsampling)
@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("inject", Inject)
def test_multiply_adds_of_every_downsampling(
    by: Downsampling, order: Order, inject: Inject
) -> None:
    spec = UNetSpec(3, 2, u_of(Down(by), Up()), replace(SMALL, order=order, inject=inject))
    assert cost.total_multiply_adds(spec, 8, 12) == counted(spec, 8, 12)


@pytest.mark.parametrize("by", Upsampling)
@pytest.mark.parametrize("join", ["same", "wider"])
def test_multiply_adds_of_every_upsampling(by: Upsampling, join: str) -> None:
    width = None if join == "same" or by is Upsampling.NEAREST else 10
    spec = UNetSpec(3, 2, u_of(Down(), Up(by, width)), SMALL)
    assert cost.total_multiply_adds(spec, 8, 12) == counted(spec, 8, 12)


@pytest.mark.parametrize("project_resized", [True, False])
def test_multiply_adds_of_blocks_that_resample(project_resized: bool) -> None:
    style = replace(SMALL, project_resized=project_resized)
    spec = UNetSpec(3, 2, u_of(Res(4, Resize.DOWN), Res(8, Resize.UP)), style)
    assert cost.total_multiply_adds(spec, 8, 12) == counted(spec, 8, 12)


def u_of(down: Op, up: Op) -> Program:
    inner = (Res(8), Attn(2), Res(6), Act(), Attn(norm=False))
    return (Conv(4), Skip(), down, *inner, up, Concat(), Res(5), Out(kernel=1))


@settings(max_examples=25)
@given(specs(), st.integers(1, 17), st.integers(1, 17))
def test_multiply_adds_of_random_networks_at_any_size(
    spec: UNetSpec, height: int, width: int
) -> None:
    assert cost.total_multiply_adds(spec, height, width) == counted(spec, height, width)


@pytest.mark.parametrize(
    ("spec", "size", "giga"),
    [
        (preset("ddpm"), 32, 6.22),
        (replace(preset("improved"), out_channels=6), 64, 39.74),
        (preset("adm-64"), 64, 109.66),
        (recipes.text001(), 64, 26.25),
        (recipes.ddpm_family(32, (1, 2, 2, 2), 2, (1,)), 32, 0.42),
        (recipes.ddpm_family(64, (1, 2, 2, 2), 2, (1,)), 32, 1.60),
        (recipes.ddpm_family(96, (1, 2, 2, 2), 2, (1,)), 32, 3.53),
    ],
)
def test_published_sizes_of_the_known_networks(spec: UNetSpec, size: int, giga: float) -> None:
    assert round(cost.total_multiply_adds(spec, size, size) / 1e9, 2) == giga


def test_multiply_adds_of_ddpm_to_the_digit() -> None:
    assert cost.total_multiply_adds(preset("ddpm"), 32, 32) == counted(preset("ddpm"), 32, 32)
    assert cost.flops(preset("ddpm"), 32, 32) == 2 * 6_221_856_768


def test_attention_grows_with_the_square_of_the_positions() -> None:
    site = list(trace(UNetSpec(3, 3, (Conv(8), Attn(), Out()))))[1]
    at = {side: cost.multiply_adds(site, Style(), side, side) for side in (8, 16)}
    projections = {side: side**2 * 4 * 8**2 for side in at}
    assert at[8] - projections[8] == 2 * 64**2 * 8
    assert at[16] - projections[16] == 16 * (at[8] - projections[8])


@given(specs(), st.integers(1, 40), st.integers(1, 40))
def test_padding_is_the_smallest_that_the_stride_divides(
    spec: UNetSpec, height: int, width: int
) -> None:
    for given_side, side in zip((height, width), cost.padded(spec, height, width), strict=True):
        assert side % spec.stride == 0
        assert 0 <= side - given_side < spec.stride


# --- memory -------------------------------------------------------------------------------------


def kept_numbers(spec: UNetSpec, batch: int, side: int) -> float:
    """4-byte words that autograd really keeps for the backward pass, weights left out."""
    torch.manual_seed(0)
    net = UNet(spec)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(torch.randn(batch, spec.in_channels, side, side), torch.rand(batch))
    assert out.requires_grad
    own = (t for at, t in kept.items() if at not in weights)
    return sum(t.untyped_storage().nbytes() for t in own) / 4


def estimated_numbers(spec: UNetSpec, batch: int, side: int) -> int:
    return batch * sum(cost.activations(s, spec.style, side, side) for s in trace(spec))


MEMORY: dict[str, Program] = {
    "convolutions": (Conv(16), Act(), Conv(16), Act(Activation.GELU), Out(norm=False)),
    "blocks": (Conv(16), Res(16), Res(24), Out()),
    "resampling blocks": (Conv(16), Res(16, Resize.DOWN), Res(24, Resize.UP), Out()),
    "learned": (Conv(16), Down(), Down(Downsampling.CONV4), Up(Upsampling.DECONV4), Up(), Out()),
    "pooling": (Conv(16), Down(Downsampling.MAX), Up(), Down(Downsampling.AVG), Up(), Out()),
    "attention": (Conv(16), Attn(2), Attn(1), Out()),
    "wide heads": (Conv(16), Attn(2, head_width=24), Out()),
    "linear attention": (Conv(16), LinearAttn(2, 24), Out()),
    "unshuffling": (Conv(16), Down(Downsampling.UNSHUFFLE, 24), Up(), Out()),
    "a U": (Conv(16), Skip(), Down(), Res(24), Attn(2), Up(), Concat(), Res(16), Out()),
}
MEMORY_STYLES = {
    "plain": SMALL,
    "scale-shift": replace(SMALL, inject=Inject.SCALE_SHIFT),
    "conv norm act": replace(SMALL, order=Order.CONV_NORM_ACT),
    "rms": replace(SMALL, norm=Norm.RMS),
    "conv first": replace(SMALL, order=Order.CONV_ACT_NORM),
    "relu": replace(SMALL, activation=Activation.RELU),
    "dropout": replace(SMALL, dropout=0.1),
    "projected": replace(SMALL, project_resized=True),
}


@pytest.mark.parametrize("style", MEMORY_STYLES)
@pytest.mark.parametrize("program", MEMORY)
def test_activations_are_what_autograd_keeps(program: str, style: str) -> None:
    spec = UNetSpec(3, 3, MEMORY[program], MEMORY_STYLES[style])
    assert estimated_numbers(spec, 2, 16) == pytest.approx(kept_numbers(spec, 2, 16), rel=0.03)


def test_activations_of_a_preset() -> None:
    tiny = preset("tiny")
    assert estimated_numbers(tiny, 2, 16) == pytest.approx(kept_numbers(tiny, 2, 16), rel=0.01)


def test_training_bytes_by_hand() -> None:
    spec = UNetSpec(1, 1, (Out(kernel=1, norm=False),))  # 2 parameters; keeps its input
    assert cost.training_bytes(spec, 5, 7, 3) == 2 * 16 + 3 * 35 * 4


def test_training_bytes_grow_with_batch_and_padded_size() -> None:
    spec = preset("tiny")
    fixed = 16 * cost.total_parameters(spec)
    one = cost.training_bytes(spec, 16, 16, 1) - fixed
    assert cost.training_bytes(spec, 16, 16, 8) - fixed == 8 * one
    assert cost.training_bytes(spec, 13, 15, 1) - fixed == one


def test_an_absurd_network_is_priced_without_being_built() -> None:
    spec = recipes.ddpm_family(2**20, (1, 2, 4, 8), 2, (1,))
    assert cost.training_bytes(spec, 2**16, 2**16, 2**10) > 10**18

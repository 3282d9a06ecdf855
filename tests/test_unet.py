"""The network: its blocks against their formulas, and what a user can do to it."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from programs import specs, styles, unchecked
from undiffuse.errors import ConfigError
from undiffuse.recipes import PRESETS, ddpm_family, preset, text000, text002, text003
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
    Join,
    LinearAttn,
    Norm,
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
from undiffuse.unet import (
    ACTIVATIONS,
    AttentionBlock,
    Downsample,
    LinearAttentionBlock,
    ResBlock,
    RMSNorm,
    TimestepEmbedding,
    UNet,
    Upsample,
    call,
    norm_layer,
    pad_to_multiple,
)

# What users meet, who run without the tests' type checks.
PlainUNet: type[UNet] = unchecked("unet").UNet

EMBEDDING = Embedding(8, 12, 10)
STYLE = Style(groups=2, zero_init=False, embedding=EMBEDDING)
U: Program = (
    *(Conv(4), Skip(), Res(4), Attn(2), Skip(), Down(), Res(6), Attn(), Res(6)),
    *(Up(), Concat(), Res(4), Attn(2), Concat(), Res(4), Out()),
)


def small(style: Style = STYLE, program: Program = U, channels: int = 3) -> UNetSpec:
    return UNetSpec(channels, channels, program, style)


def seeded(spec: UNetSpec, kind: type[UNet] = UNet) -> UNet:
    torch.manual_seed(0)
    return kind(spec).eval()


def shaken(module: nn.Module) -> nn.Module:
    """Every weight random, norms and zero-initialised layers included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3)
    return module.double()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(spec: UNetSpec, batch: int = 2, height: int = 8, width: int = 8) -> tuple[Any, ...]:
    label = torch.arange(batch) % spec.classes if spec.classes else None
    return noise(batch, spec.in_channels, height, width), torch.linspace(0.0, 999.0, batch), label


# --- any program runs ---------------------------------------------------------------------------


@settings(max_examples=60)
@given(specs(), st.integers(1, 2), st.integers(4, 17), st.integers(4, 17))
def test_random_networks_give_finite_pictures_of_the_same_size(
    spec: UNetSpec, batch: int, height: int, width: int
) -> None:
    net = seeded(spec)
    with torch.no_grad():
        out = net(*inputs(spec, batch, height, width))
    assert out.shape == (batch, spec.out_channels, height, width)
    assert out.isfinite().all()


def without_relu(spec: UNetSpec) -> UNetSpec:
    """A handful of channels behind a ReLU can all be dead, which is no fault of the network."""
    gelu, relu = Activation.GELU, Activation.RELU
    style, embedding = spec.style, spec.style.embedding
    embedding = replace(
        embedding,
        activation=gelu if embedding.activation is relu else embedding.activation,
        final_activation=gelu if embedding.final_activation is relu else embedding.final_activation,
    )
    activation = gelu if style.activation is relu else style.activation
    program = tuple(Act(gelu) if op == Act(relu) else op for op in spec.program)
    style = replace(style, activation=activation, embedding=embedding)
    return replace(spec, program=program, style=style)


@settings(max_examples=30)
@given(specs(styles().map(lambda s: replace(s, groups=1, zero_init=False))))
def test_the_gradient_reaches_every_parameter(spec: UNetSpec) -> None:
    spec = without_relu(spec)
    torch.manual_seed(0)
    net = UNet(spec).double()
    x, timestep, label = inputs(spec, 4, 16, 12)
    out = net(x.double(), timestep, label)
    (out * noise(*out.shape, seed=1)).sum().backward()
    missed = [
        name
        for name, parameter in net.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert missed == []


@settings(max_examples=30)
@given(specs())
def test_names_in_the_state_dict_are_those_of_the_sites(spec: UNetSpec) -> None:
    with torch.device("meta"):
        keys = list(UNet(spec).state_dict())
    names = [site.name for site in trace(spec)]
    owners = [key.split(".")[1] for key in keys if key.startswith("layers.")]
    assert all(key.startswith(("embedding.", "layers.")) for key in keys)
    assert set(owners) <= set(names)
    assert owners == sorted(owners)  # in the order of the program


def test_names_of_a_small_network() -> None:
    spec = UNetSpec(1, 1, (Res(4), Attn(), Out()), STYLE)
    assert list(UNet(spec).state_dict()) == [
        *(f"embedding.linear{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
        *(
            f"layers.00_res.{layer}.{part}"
            for layer in ("norm1", "conv1", "time_proj", "norm2", "conv2", "shortcut")
            for part in ("weight", "bias")
        ),
        *(
            f"layers.01_attn.{layer}.{part}"
            for layer in ("norm", "qkv", "proj")
            for part in ("weight", "bias")
        ),
        *(
            f"layers.02_out.{layer}.{part}"
            for layer in ("norm", "conv")
            for part in ("weight", "bias")
        ),
    ]


def test_a_network_without_res_has_no_embedding_and_ignores_the_timestep() -> None:
    net = seeded(preset("naive", channels=1))
    assert net.embedding is None
    x = noise(2, 1, 6, 6)
    assert torch.equal(net(x, torch.zeros(2)), net(x, torch.full((2,), 999.0)))


# --- the program is the forward pass ------------------------------------------------------------


def test_forward_is_the_program_written_out() -> None:
    spec = small()
    net = shaken(UNet(spec))
    x, timestep, _ = inputs(spec)
    x = x.double()
    layer = net.layers
    emb = net.embedding(timestep, None, torch.float64)
    first = layer["00_conv"](x)
    second = layer["03_attn"](layer["02_res"](first, emb))
    h = layer["05_down"](second)
    h = layer["08_res"](layer["07_attn"](layer["06_res"](h, emb)), emb)
    h = torch.cat((layer["09_up"](h), second), dim=1)
    h = layer["12_attn"](layer["11_res"](h, emb))
    h = layer["14_res"](torch.cat((h, first), dim=1), emb)
    assert torch.equal(net(x, timestep), layer["15_out"](h))


def test_an_added_skip_is_a_sum() -> None:
    program = (Conv(4), Skip(), Conv(4), Concat(Join.ADD), Out(norm=False))
    net = shaken(UNet(small(program=program)))
    x = noise(1, 3, 4, 4, dtype=torch.float64)
    first = net.layers["00_conv"](x)
    expected = net.layers["04_out"](first + net.layers["02_conv"](first))
    assert torch.equal(net(x, torch.zeros(1)), expected)


# --- initialisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [preset("tiny"), text002(), text003(Inject.SCALE_SHIFT)])
def test_at_zero_initialisation_the_output_is_exactly_zero(spec: UNetSpec) -> None:
    net = seeded(spec)
    assert torch.equal(net(*inputs(spec)), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("in_width", [4, 6])
@pytest.mark.parametrize("resize", [None, *Resize])
def test_at_zero_initialisation_a_block_is_its_shortcut(
    in_width: int, resize: Resize | None
) -> None:
    block = ResBlock(in_width, 6, replace(STYLE, zero_init=True), resize)
    x = noise(2, in_width, 4, 4)
    resized = {
        None: x,
        Resize.DOWN: F.avg_pool2d(x, 2),
        Resize.UP: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
    }[resize]
    assert torch.equal(block(x, noise(2, 10)), block.shortcut(resized))
    assert isinstance(block.shortcut, nn.Identity) == (in_width == 6)


def test_at_zero_initialisation_attention_is_the_identity() -> None:
    x = noise(2, 4, 3, 3)
    assert torch.equal(AttentionBlock(4, Attn(2), replace(STYLE, zero_init=True))(x), x)


def test_without_zero_initialisation_nothing_starts_at_zero() -> None:
    weights = [p for n, p in UNet(small()).named_parameters() if n.endswith("weight")]
    assert all(weight.any() for weight in weights)


# --- blocks against their formulas --------------------------------------------------------------


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm from its definition (1803.08494, equations 1 and 2)."""
    b, c, h, w = x.shape
    groups = x.reshape(b, norm.num_groups, -1)
    mean = groups.mean(-1, keepdim=True)
    variance = (groups - mean).square().mean(-1, keepdim=True)
    normed = ((groups - mean) / (variance + norm.eps).sqrt()).reshape(b, c, h, w)
    return normed * norm.weight[:, None, None] + norm.bias[:, None, None]


def restated(block: ResBlock, style: Style, x: Tensor, emb: Tensor) -> Tensor:
    """A residual block, line by line from the papers."""
    act = {Activation.SILU: lambda h: h * h.sigmoid(), Activation.RELU: lambda h: h.clamp(min=0)}[
        style.activation
    ]

    def inject(h: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        e = block.time_proj(emb)[:, :, None, None]
        if style.inject is Inject.ADD:
            return norm(h + e)
        half = e.shape[1] // 2
        return norm(h) * (1 + e[:, :half]) + e[:, half:]

    if style.order is Order.NORM_ACT_CONV:
        h = block.conv1(act(group_norm(x, block.norm1)))
        h = block.conv2(act(inject(h, lambda v: group_norm(v, block.norm2))))
    elif style.order is Order.CONV_NORM_ACT:
        h = act(inject(block.conv1(x), lambda v: group_norm(v, block.norm1)))
        h = act(group_norm(block.conv2(h), block.norm2))
    else:
        h = inject(group_norm(act(block.conv1(x)), block.norm1), lambda v: v)
        h = group_norm(act(block.conv2(h)), block.norm2)
    return (block.shortcut(x) + h) * style.skip_gain


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("inject", Inject)
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.RELU])
@pytest.mark.parametrize("widths", [(4, 4), (4, 6)])
@pytest.mark.parametrize("skip_gain", [1.0, 0.5**0.5])
def test_a_residual_block_is_its_formula(
    order: Order, inject: Inject, activation: Activation, widths: tuple[int, int], skip_gain: float
) -> None:
    style = replace(STYLE, order=order, inject=inject, activation=activation, skip_gain=skip_gain)
    block = shaken(ResBlock(*widths, style, None))
    x, emb = noise(2, 4, 5, 3, dtype=torch.float64), noise(2, 10, seed=1, dtype=torch.float64)
    torch.testing.assert_close(
        block(x, emb), restated(block, style, x, emb), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("skip_gain", [1.0, 0.5**0.5])
def test_attention_is_softmax_written_out(heads: int, norm: bool, skip_gain: float) -> None:
    block = shaken(AttentionBlock(6, Attn(heads, norm), replace(STYLE, skip_gain=skip_gain)))
    x = noise(2, 6, 4, 3, dtype=torch.float64)
    normed = group_norm(x, block.norm) if norm else x
    weight, bias = block.qkv.weight[:, :, 0, 0], block.qkv.bias
    q, k, v = (weight @ normed.flatten(2) + bias[:, None]).chunk(3, dim=1)  # (b, c, n)
    results = []
    for head in range(heads):
        rows = slice(head * 6 // heads, (head + 1) * 6 // heads)
        scores = q[:, rows].transpose(1, 2) @ k[:, rows] / math.sqrt(6 // heads)
        chances = scores.exp() / scores.exp().sum(-1, keepdim=True)  # (b, n, n), rows sum to 1
        results.append(v[:, rows] @ chances.transpose(1, 2))
    mixed = torch.cat(results, dim=1).reshape(2, 6, 4, 3)
    expected = (x + block.proj(mixed)) * skip_gain
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_with_memory_is_softmax_over_pictures_and_memory(bias: bool) -> None:
    op = Attn(heads=2, norm=False, head_width=5, memory=3, bias=bias)
    block = shaken(AttentionBlock(6, op, STYLE))
    x = noise(2, 6, 4, 3, dtype=torch.float64)
    qkv = torch.einsum("oc,bcn->bon", block.qkv.weight[:, :, 0, 0], x.flatten(2))
    q, k, v = (qkv + (block.qkv.bias[:, None] if bias else 0)).chunk(3, dim=1)
    results = []
    for head in range(2):
        rows = slice(5 * head, 5 * head + 5)
        mk, mv = (block.memory[i, head].T.expand(2, 5, 3) for i in (0, 1))  # (b, channel, entry)
        keys, values = torch.cat((mk, k[:, rows]), 2), torch.cat((mv, v[:, rows]), 2)
        chances = (q[:, rows].transpose(1, 2) @ keys / math.sqrt(5)).softmax(-1)
        results.append(values @ chances.transpose(1, 2))
    expected = x + block.proj(torch.cat(results, dim=1).reshape(2, 10, 4, 3))
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize("memory", [0, 3])
def test_linear_attention_is_its_formula(norm: Norm, memory: int) -> None:
    """Every output position, one by one, as sums over positions and memory."""
    op = LinearAttn(heads=2, head_width=5, memory=memory)
    block = shaken(LinearAttentionBlock(6, op, replace(STYLE, norm=norm)))
    x = noise(2, 6, 4, 3, dtype=torch.float64)
    weight = block.qkv.weight[:, :, 0, 0]
    q, k, v = torch.einsum("oc,bcn->bon", weight, block.norm(x).flatten(2)).chunk(3, dim=1)
    results = []
    for head in range(2):
        rows = slice(5 * head, 5 * head + 5)
        keys, values = k[:, rows], v[:, rows]
        if memory:
            mk, mv = (block.memory[i, head].T.expand(2, 5, 3) for i in (0, 1))
            keys, values = torch.cat((mk, keys), 2), torch.cat((mv, values), 2)
        keys = keys.exp() / keys.exp().sum(2, keepdim=True)  # over positions
        queries = q[:, rows].exp() / q[:, rows].exp().sum(1, keepdim=True)  # over channels
        context = sum(keys[:, :, None, n] * values[:, None, :, n] for n in range(keys.shape[2]))
        results.append(torch.einsum("bde,bdn->ben", context, queries / math.sqrt(5)))
    mixed = torch.cat(results, dim=1).reshape(2, 10, 4, 3)
    expected = x + block.proj_norm(block.proj(mixed))
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def test_at_zero_initialisation_linear_attention_is_the_identity_and_can_learn() -> None:
    block = LinearAttentionBlock(4, LinearAttn(2, 3), replace(STYLE, zero_init=True, norm=Norm.RMS))
    x = noise(2, 4, 3, 3)
    assert torch.equal(block(x), x)
    (block(x) * noise(2, 4, 3, 3, seed=1)).sum().backward()
    assert block.proj_norm.weight.grad.abs().max() > 1e-3


def test_rms_norm_is_its_formula() -> None:
    norm = shaken(RMSNorm(6))
    x = noise(2, 6, 4, 3, dtype=torch.float64)
    x[0, :, 1, 1] = 0.0
    length = x.square().sum(1, keepdim=True).sqrt()
    expected = x / length.clamp(min=1e-12) * norm.weight.reshape(6, 1, 1) * math.sqrt(6)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_unshuffling_orders_channel_row_column() -> None:
    """Channel 4 c + 2 row + column, as in denoising-diffusion-pytorch."""
    layer = Downsample(2, 8, Downsampling.UNSHUFFLE)
    with torch.no_grad():
        layer.conv.weight.copy_(torch.eye(8)[:, :, None, None])
        layer.conv.bias.zero_()
    x = noise(1, 2, 4, 6)
    expected = [x[0, c, row::2, column::2] for c in (0, 1) for row in (0, 1) for column in (0, 1)]
    assert torch.equal(layer(x)[0], torch.stack(expected))


@pytest.mark.parametrize(("width", "groups"), [(8, 2), (64, 16), (128, 32), (256, 32), (2, 1)])
def test_a_group_holds_at_least_its_width(width: int, groups: int) -> None:
    """min(32, C / 4) groups, as DDPM++ counts them."""
    assert norm_layer(width, Style(group_width=4)).num_groups == groups


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "naive"])
def test_every_block_of_every_preset_hears_the_timestep(name: str) -> None:
    """A norm over groups of one channel would take away what the timestep adds (group_width)."""
    spec = preset(name)
    for site in trace(spec):
        if isinstance(site.op, Res):
            style = spec.style
            groups = norm_layer(site.out_width, style).num_groups
            assert style.inject is Inject.SCALE_SHIFT or groups < site.out_width


def test_a_block_in_groups_of_one_channel_cannot_hear_the_timestep() -> None:
    """Why `group_width` exists."""
    x, emb = noise(2, 8, 5, 3), noise(2, 10)
    for group_width, heard in ((1, False), (4, True)):
        style = Style(group_width=group_width, zero_init=False, embedding=EMBEDDING)
        block = shaken(ResBlock(8, 8, style, None))
        difference = (block(x.double(), emb.double()) - block(x.double(), -emb.double())).abs()
        assert bool(difference.max() > 1e-3) == heard


def test_the_label_can_be_added_to_the_sinusoid() -> None:
    options = replace(EMBEDDING, classes=3, null=True, label_first=True)
    embedding = shaken(TimestepEmbedding(options))
    timestep, label = noise(2, dtype=torch.float64) * 50, torch.tensor([2, 3])
    first = embedding.sinusoid(timestep).double() + embedding.labels.weight[label]
    expected = F.silu(embedding.linear2(F.silu(embedding.linear1(first))))
    assert torch.equal(embedding(timestep, label, torch.float64), expected)


@pytest.mark.parametrize("half_minus_one", [True, False])
def test_both_roundings_of_the_frequencies_differ_in_the_last_bit_only(
    half_minus_one: bool,
) -> None:
    options = Embedding(96, half_minus_one=half_minus_one)
    one = TimestepEmbedding(options).frequencies
    other = TimestepEmbedding(replace(options, divide_last=True)).frequencies
    exact = 10_000.0 ** -(torch.arange(48, dtype=torch.float64) / (47 if half_minus_one else 48))
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.double(), exact, rtol=1e-6, atol=0)


def test_attention_keeps_no_score_matrix() -> None:
    """Memory grows with n, not n²: the fused kernel is used, whatever the layout going in."""
    block = AttentionBlock(4, Attn(2), STYLE)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    for x in (
        noise(1, 4, 16, 16),
        noise(1, 4, 16, 16).contiguous(memory_format=torch.channels_last),
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x).sum()
    assert kept
    assert max(kept) < 256 * 256


@pytest.mark.parametrize("by", Downsampling)
@pytest.mark.parametrize("size", [(4, 6), (2, 2)])
def test_every_downsampling_halves(by: Downsampling, size: tuple[int, int]) -> None:
    out = Downsample(4, 4, by)(noise(1, 4, *size))
    assert out.shape == (1, 4, size[0] // 2, size[1] // 2)


@pytest.mark.parametrize("by", Upsampling)
def test_every_upsampling_doubles(by: Upsampling) -> None:
    assert Upsample(4, 4, by)(noise(1, 4, 3, 2)).shape == (1, 4, 6, 4)


def test_ddpm_pads_at_the_end_only() -> None:
    layer = Downsample(1, 1, Downsampling.CONV_END)
    x = noise(1, 1, 4, 4)
    padded = torch.zeros(1, 1, 5, 5)
    padded[..., :4, :4] = x
    assert layer.conv is not None
    expected = F.conv2d(padded, layer.conv.weight, layer.conv.bias, stride=2)
    assert torch.equal(layer(x), expected)


def test_group_norm_works_on_a_single_value_per_group() -> None:
    """Where torch's own layer refuses; one value less its mean is 0."""
    style = replace(STYLE, groups=32)
    net = seeded(small(style, (Conv(8), Down(), Res(8), Up(), Out())))
    assert net(noise(1, 3, 2, 2), torch.zeros(1)).isfinite().all()
    norm = net.layers["02_res"].norm1
    torch.testing.assert_close(norm(noise(1, 8, 1, 1)), torch.zeros(1, 8, 1, 1), rtol=0, atol=1e-3)
    x = noise(2, 8, 3, 3)
    assert torch.equal(norm(x), nn.GroupNorm.forward(norm, x))


# --- timestep and label -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("sin_first", [True, False])
@pytest.mark.parametrize("half_minus_one", [True, False])
def test_the_sinusoid_is_its_formula(width: int, sin_first: bool, half_minus_one: bool) -> None:
    options = Embedding(width, 4, 4, sin_first=sin_first, half_minus_one=half_minus_one)
    timestep = [0.0, 1.0, 17.5, 999.0, -1.25]
    found = TimestepEmbedding(options).sinusoid(torch.tensor(timestep))
    half = width // 2
    rates = [10_000 ** (-k / (half - 1 if half_minus_one else half)) for k in range(half)]
    sines = [[math.sin(t * rate) for rate in rates] for t in timestep]
    cosines = [[math.cos(t * rate) for rate in rates] for t in timestep]
    first, second = (sines, cosines) if sin_first else (cosines, sines)
    expected = [[*a, *b, *([0.0] * (width % 2))] for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)
    exact = [row for row, t in enumerate(timestep) if abs(t) < 20]
    torch.testing.assert_close(found[exact], torch.tensor(expected)[exact], rtol=0, atol=3e-6)


def test_the_embedding_is_its_formula() -> None:
    options = replace(EMBEDDING, activation=Activation.GELU, classes=3, null=True)
    layer = shaken(TimestepEmbedding(options))
    timestep, label = torch.tensor([3.0, 500.0]), torch.tensor([2, 0])
    hidden = F.gelu(layer.linear1(layer.sinusoid(timestep).double()))
    expected = F.silu(layer.linear2(hidden) + layer.labels.weight[label])
    found = layer(timestep, label, torch.float64)
    assert torch.equal(found, expected)
    bare = shaken(TimestepEmbedding(replace(options, final_activation=None)))
    assert torch.equal(F.silu(bare(timestep, label, torch.float64)), expected)


def test_whole_and_real_timesteps_of_any_sign_are_the_same_numbers() -> None:
    net = seeded(small())
    x = noise(3, 3, 4, 4)
    whole = net(x, torch.tensor([0, 7, -3]))
    assert torch.equal(whole, net(x, torch.tensor([0.0, 7.0, -3.0])))
    assert torch.equal(whole, net(x, torch.tensor([0.0, 7.0, -3.0], dtype=torch.float64)))
    assert not torch.allclose(whole[1], net(x, torch.tensor([0, 8, -3]))[1])


def test_every_res_hears_the_timestep() -> None:
    spec = small()
    for name in (site.name for site in trace(spec) if isinstance(site.op, Res)):
        net = seeded(spec)
        x, timestep, _ = inputs(spec)
        before = net(x, timestep)
        with torch.no_grad():
            net.layers[name].time_proj.weight.zero_()
        assert not torch.allclose(before, net(x, timestep))


LABELLED = small(replace(STYLE, embedding=replace(EMBEDDING, classes=3, null=True)))
WITHOUT_NULL = small(replace(STYLE, embedding=replace(EMBEDDING, classes=3)))


AUGMENTED = small(replace(STYLE, embedding=replace(EMBEDDING, augment=9)))


def test_zeros_of_augmentation_are_a_network_without_its_map_to_the_bit() -> None:
    plain, told = seeded(small()), UNet(AUGMENTED)
    missing = told.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["embedding.augment"]
    assert not told.embedding.augment.any()
    x, timestep, _ = inputs(AUGMENTED)
    expected = plain(x, timestep)
    assert torch.equal(told(x, timestep, augment=noise(2, 9)), expected)  # the map starts at zero
    torch.nn.init.normal_(told.embedding.augment)
    assert torch.equal(told(x, timestep), expected)
    assert torch.equal(told(x, timestep, augment=torch.zeros(2, 9)), expected)
    assert not torch.allclose(told(x, timestep, augment=noise(2, 9)), expected)


def test_the_map_of_augmentation_draws_no_number() -> None:
    """With and without it, a seed gives the same other weights."""
    plain, told = seeded(small()), seeded(AUGMENTED)
    weights = told.state_dict()
    assert not weights.pop("embedding.augment").any()
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())


def test_augmentation_is_added_to_the_sinusoid() -> None:
    embedding = shaken(TimestepEmbedding(replace(EMBEDDING, augment=4)))
    timestep, told = noise(2, dtype=torch.float64) * 50, noise(2, 4, dtype=torch.float64)
    first = embedding.sinusoid(timestep).double() + told @ embedding.augment.T
    expected = F.silu(embedding.linear2(F.silu(embedding.linear1(first))))
    torch.testing.assert_close(embedding(timestep, None, torch.float64, told), expected)


def test_no_label_means_the_null_row() -> None:
    net = seeded(LABELLED)
    x, timestep, _ = inputs(LABELLED)
    null = torch.full((2,), 3)
    assert torch.equal(net(x, timestep), net(x, timestep, null))
    outs = [net(x, timestep, torch.full((2,), k)) for k in range(4)]
    assert not any(torch.allclose(a, b) for a, b in pairwise(outs))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_whole_type_are_the_same(dtype: torch.dtype) -> None:
    net = seeded(LABELLED, PlainUNet)
    x, timestep, label = inputs(LABELLED)
    assert torch.equal(net(x, timestep, label.to(dtype)), net(x, timestep, label))


# --- sizes --------------------------------------------------------------------------------------

DEEP = small(program=(Conv(4), Skip(), Down(), Res(4), Down(), Res(6), Up(), Up(), Concat(), Out()))


def replicated(x: Tensor, height: int, width: int) -> Tensor:
    """`x` with its last row and column repeated, cell by cell."""
    rows = [min(i, x.shape[-2] - 1) for i in range(height)]
    columns = [min(i, x.shape[-1] - 1) for i in range(width)]
    return x[..., rows, :][..., columns]


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (3, 8), (8, 9), (4, 6)])
def test_any_size_is_padded_by_repeating_the_edge_and_cropped(size: tuple[int, int]) -> None:
    net = seeded(DEEP)
    x, timestep = noise(2, 3, *size), torch.tensor([5.0, 600.0])
    height, width = (math.ceil(side / 4) * 4 for side in size)
    expected = net(replicated(x, height, width), timestep)[..., : size[0], : size[1]]
    assert torch.equal(net(x, timestep), expected)


def test_nothing_is_padded_where_the_size_divides() -> None:
    x = noise(1, 2, 8, 12)
    assert pad_to_multiple(x, 4) is x
    assert pad_to_multiple(x, 1) is x


# --- independence -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LABELLED, text000(), DEEP])
def test_a_picture_does_not_see_the_rest_of_its_batch(spec: UNetSpec) -> None:
    net = seeded(spec).double()
    x, timestep, label = inputs(spec, 3)
    x = x.double()
    together = net(x, timestep, label)
    for i in range(3):
        one = net(x[i : i + 1], timestep[i : i + 1], None if label is None else label[i : i + 1])
        torch.testing.assert_close(one[0], together[i], rtol=1e-9, atol=1e-9)


def test_forward_changes_nothing() -> None:
    net = seeded(LABELLED)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, timestep, label = inputs(LABELLED)
    kept = x.clone()
    net.train()(x, timestep, label)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_dropout_acts_in_training_only() -> None:
    spec = small(replace(STYLE, dropout=0.5))
    net = seeded(spec)
    x, timestep, _ = inputs(spec)
    assert torch.equal(net(x, timestep), net(x, timestep))
    plain = seeded(small())
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net(x, timestep), plain(x, timestep))
    net.train()
    assert not torch.allclose(net(x, timestep), net(x, timestep))


# --- wrong inputs -------------------------------------------------------------------------------

X, T, K = noise(2, 3, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
WRONG: dict[str, tuple[UNetSpec, tuple[Any, ...], str]] = {
    "rank 3": (
        LABELLED,
        (X[0], T),
        "x must be float [batch, 3, height, width]; got [3, 4, 4] torch.float32",
    ),
    "rank 5": (
        LABELLED,
        (X[None], T),
        "x must be float [batch, 3, height, width]; got [1, 2, 3, 4, 4] torch.float32",
    ),
    "channels": (
        LABELLED,
        (X[:, :2], T),
        "x must be float [batch, 3, height, width]; got [2, 2, 4, 4] torch.float32",
    ),
    "layout": (
        LABELLED,
        (X.movedim(1, -1), T),
        "x must be float [batch, 3, height, width]; got [2, 4, 4, 3] torch.float32, which looks"
        " like height x width x channels: use x.movedim(-1, -3)",
    ),
    "one picture, layout": (
        LABELLED,
        (X[0].movedim(0, -1), T),
        "x must be float [batch, 3, height, width]; got [4, 4, 3] torch.float32, which looks"
        " like height x width x channels: use x.movedim(-1, -3)",
    ),
    **{
        f"x {dtype}": (
            LABELLED,
            (X.to(dtype), T),
            f"x must be float [batch, 3, height, width]; got [2, 3, 4, 4] {dtype}",
        )
        for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64)
    },
    "no height": (LABELLED, (X[:, :, :0], T), "x must not be empty; got [2, 3, 0, 4]"),
    "no width": (LABELLED, (X[..., :0], T), "x must not be empty; got [2, 3, 4, 0]"),
    "no picture": (LABELLED, (X[:0], T[:0]), "x must not be empty; got [0, 3, 4, 4]"),
    "x is no tensor": (
        LABELLED,
        (X.numpy(), T),
        "x must be a torch.Tensor; got ndarray: use torch.as_tensor",
    ),
    "x is None": (
        LABELLED,
        (None, T),
        "x must be a torch.Tensor; got NoneType: use torch.as_tensor",
    ),
    "timestep is a float": (
        LABELLED,
        (X, 3.0),
        "timestep must be a torch.Tensor; got float: use torch.as_tensor",
    ),
    "timestep of another batch": (
        LABELLED,
        (X, torch.zeros(3)),
        "timestep must have one number per picture, shape [2]; got [3] torch.float32",
    ),
    "timestep without a batch": (
        LABELLED,
        (X, torch.tensor(3)),
        "timestep must have one number per picture, shape [2]; got [] torch.int64",
    ),
    "timestep with an axis too many": (
        LABELLED,
        (X, T[:, None]),
        "timestep must have one number per picture, shape [2]; got [2, 1] torch.float32",
    ),
    "timestep complex": (
        LABELLED,
        (X, T.to(torch.complex64)),
        "timestep must have one number per picture, shape [2]; got [2] torch.complex64",
    ),
    "label is an int": (
        LABELLED,
        (X, T, 1),
        "label must be a torch.Tensor; got int: use torch.as_tensor",
    ),
    "label of another batch": (
        LABELLED,
        (X, T, torch.zeros(3, dtype=torch.int64)),
        "label must be whole numbers of shape [2]; got [3] torch.int64",
    ),
    **{
        f"label {dtype}": (
            LABELLED,
            (X, T, K.to(dtype)),
            f"label must be whole numbers of shape [2]; got [2] {dtype}",
        )
        for dtype in (torch.float32, torch.bool, torch.complex64)
    },
    "label too large": (
        LABELLED,
        (X, T, torch.tensor([0, 4])),
        "label must be in 0…2, or 3 for no class; got [0, 4]",
    ),
    "label negative": (
        LABELLED,
        (X, T, torch.tensor([-1, 0])),
        "label must be in 0…2, or 3 for no class; got [-1, 0]",
    ),
    "label too large, no null row": (
        WITHOUT_NULL,
        (X, T, torch.tensor([0, 3])),
        "label must be in 0…2; got [0, 3]",
    ),
    "label missing": (
        WITHOUT_NULL,
        (X, T),
        "label is missing: this network has 3 classes and no row for 'no class'; pass label",
    ),
    "label for a network without classes": (
        small(),
        (X, T, K),
        "label must be None: this network has no classes; got [2]",
    ),
    "augment for a network that hears none": (
        small(),
        (X, T, None, call, torch.zeros(2, 9)),
        "augment must be None: this network hears no augmentation parameters; got [2, 9]",
    ),
    "augment of another length": (
        AUGMENTED,
        (X, T, None, call, torch.zeros(2, 8)),
        "augment must be float of shape [2, 9]; got [2, 8] torch.float32",
    ),
    "augment in whole numbers": (
        AUGMENTED,
        (X, T, None, call, torch.zeros(2, 9, dtype=torch.int64)),
        "augment must be float of shape [2, 9]; got [2, 9] torch.int64",
    ),
    "augment no tensor": (
        AUGMENTED,
        (X, T, None, call, [0.0] * 9),
        "augment must be a torch.Tensor; got list: use torch.as_tensor",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_named_and_leaves_the_network_as_it_was(case: str) -> None:
    spec, arguments, message = WRONG[case]
    net = seeded(spec, PlainUNet)
    good = (X, T, K if spec.classes else None)
    before = net(*good)
    with pytest.raises(ConfigError) as caught:
        net(*arguments)
    assert str(caught.value) == message
    assert torch.equal(net(*good), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_timestep_that_is_not_finite_spoils_its_own_picture_only(bad: float) -> None:
    net = seeded(small())
    out = net(X, torch.tensor([bad, 3.0]))
    assert out[0].isnan().any()
    torch.testing.assert_close(out[1], net(X, torch.tensor([3.0, 3.0]))[1])


# --- ways to run it -----------------------------------------------------------------------------


def test_channels_last_gives_the_same_picture() -> None:
    spec = LABELLED
    net = seeded(spec)
    x, timestep, label = inputs(spec)
    expected = net(x, timestep, label)
    last = net.to(memory_format=torch.channels_last)
    found = last(x.contiguous(memory_format=torch.channels_last), timestep, label)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_strided_input_and_inference_mode_give_the_same_picture() -> None:
    net = seeded(small())
    wide = noise(2, 3, 4, 8)
    x, timestep = wide[..., ::2], torch.tensor([1.0, 2.0])
    expected = net(x.contiguous(), timestep)
    torch.testing.assert_close(net(x, timestep), expected)
    with torch.inference_mode():
        torch.testing.assert_close(net(x, timestep), expected.detach())


def test_autocast_to_bfloat16_is_finite_close_and_does_not_round_the_timestep() -> None:
    net = seeded(small())
    x = noise(2, 3, 8, 8)
    near = torch.tensor([998.0, 999.0])  # one and the same bfloat16
    assert near.bfloat16().unique().numel() == 1
    exact = net(x, near)
    seen: list[Tensor] = []
    hook = net.embedding.linear1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = net(x, near)
    hook.remove()
    assert rough.isfinite().all()
    assert (rough.float() - exact).square().mean() < 1e-3 * exact.square().mean()
    torch.testing.assert_close(seen[0].float(), net.embedding.sinusoid(near))
    assert not torch.allclose(seen[0][0].float(), seen[0][1].float(), atol=0.1)


def test_weights_in_bfloat16_leave_the_frequencies_alone() -> None:
    net = seeded(small())
    exact = net.embedding.sinusoid(torch.tensor([999.0]))
    half = net.bfloat16()
    assert torch.equal(half.embedding.sinusoid(torch.tensor([999.0])), exact)
    out = half(noise(1, 3, 4, 4).bfloat16(), torch.tensor([999.0]))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_double_precision_stays_double() -> None:
    net = seeded(small()).double()
    out = net(noise(1, 3, 4, 4, dtype=torch.float64), torch.tensor([3]))
    assert out.dtype == torch.float64
    single = seeded(small())(noise(1, 3, 4, 4, dtype=torch.float64).float(), torch.tensor([3]))
    torch.testing.assert_close(out.float(), single, rtol=1e-4, atol=1e-5)


def test_meta_tensors_give_shapes_without_numbers() -> None:
    with torch.device("meta"):
        out = UNet(preset("ddpm"))(torch.empty(2, 3, 30, 33), torch.empty(2))
    assert out.shape == (2, 3, 30, 33)
    assert out.is_meta


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = (seeded(LABELLED).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_it_compiles_in_one_piece(size: tuple[int, int]) -> None:
    spec = ddpm_family(8, (1, 2), 1, (1,)).with_classes(3, null=True)
    spec = replace(spec, style=replace(spec.style, zero_init=False))
    net = seeded(spec, PlainUNet)
    arguments = inputs(spec, 2, *size)
    expected = net(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), expected)
    expected.sum().backward()
    kept = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    compiled(*arguments).sum().backward()
    for parameter, gradient in zip(net.parameters(), kept, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_every_activation_is_there() -> None:
    x = noise(5)
    assert set(ACTIVATIONS) == set(Activation)
    assert torch.equal(ACTIVATIONS[Activation.RELU](x), x.clamp(min=0))
    torch.testing.assert_close(ACTIVATIONS[Activation.SILU](x), x * x.sigmoid())
    torch.testing.assert_close(
        ACTIVATIONS[Activation.GELU](x), x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    )

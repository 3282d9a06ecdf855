"""The four texts' systems: documented names, printed formulas, and one network behind them.

Ids such as T000-5 are the items that each text describes; a test's docstring starts with the ids
that it checks. Oracles are the texts' own printed code and formulas, written out here.
"""

# pyright: basic

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undiffuse import cost, recipes, textbook
from undiffuse.checkpoint import Model, Pictures, load_model, save_model
from undiffuse.config import TrainConfig
from undiffuse.denoiser import Denoiser, Epsilon, uniform_t
from undiffuse.errors import ConfigError, SpecError
from undiffuse.noise import Cosine, Stream, keyed_normal, levels
from undiffuse.sampling import ddim, finish
from undiffuse.spec import (
    OPS,
    Activation,
    Attn,
    Concat,
    Conv,
    Down,
    Downsampling,
    Inject,
    Join,
    Norm,
    Order,
    Out,
    Part,
    Res,
    Skip,
    Style,
    UNetSpec,
    Up,
    Upsampling,
    trace,
)
from undiffuse.textbook import text000, text001, text002, text003
from undiffuse.textbook._view import Network
from undiffuse.training import Recipe, TrainState, train
from undiffuse.unet import ACTIVATIONS, ConcatSkip, TimestepEmbedding, UNet, build

DDPM, PER_BLOCK = text001.Bookkeeping.DDPM, text001.Bookkeeping.PER_BLOCK


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The network's shapes without its memory."""
    with torch.device("meta"):
        return make()


def stirred(model: Any, seed: int = 0) -> Any:
    """The model with random weights everywhere: nothing is zero, so everything shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1 / math.sqrt(max(1, parameter[0].numel()))
            parameter.normal_(0, spread, generator=generator)
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(one: Tensor, other: Tensor, within: float = 2e-5) -> bool:
    return torch.allclose(one, other, rtol=within, atol=within)


def arguments(thing: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(thing).parameters)


def defaults(thing: Callable[..., Any]) -> dict[str, Any]:
    found = inspect.signature(thing).parameters.values()
    return {one.name: one.default for one in found if one.default is not one.empty}


def small001(**changes: Any) -> text001.UNet:
    config: dict[str, Any] = {
        "image_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "base_channels": 36,  # two channels per group: one could not hear an added time
        "channel_mults": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
    }
    return text001.UNet(**(config | changes))


NETWORKS: dict[str, Callable[[], Network]] = {
    "text000": text000.UNet,
    "text000-figure": text000.FigureUNet,
    "text001": small001,
    "text001-options": lambda: small001(heads=2, classes=3, dropout=0.1, out_channels=6),
    "text001-scale-shift": lambda: small001(inject=Inject.SCALE_SHIFT),
    "text001-per-block": lambda: small001(bookkeeping=PER_BLOCK, num_res_blocks=2),
    "text001-per-block-last": lambda: small001(bookkeeping=PER_BLOCK, last_downsample=True),
    "text001-last": lambda: small001(last_downsample=True),
    "text002": lambda: text002.DiffusionModel(16, 3, (16, 24), 16),
    "text002-diagram": lambda: text002.DiffusionModel(16, 3, (16, 24), 16, pairs=1),
    "text003-naive": lambda: text003.SimpleNoisePredictor(3, 8),
    "text003": text003.DiffusionUNet,
    "text003-full": lambda: text003.DiffusionUNet(full_resolution_skip=True),
    "text003-scale-shift": lambda: text003.DiffusionUNet(1, Inject.SCALE_SHIFT),
}
# The same code paths at a fraction of the weights.
LIGHT = [name for name in NETWORKS if name not in ("text000-figure", "text003-scale-shift")]


def batch_for(net: Network, side: tuple[int, int] = (12, 10)) -> tuple[Tensor, Tensor]:
    return noise(2, net.spec.in_channels, *side), torch.tensor([3, 870])


# --- every front door is the one network --------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_view_computes_what_its_bare_network_computes(name: str) -> None:
    """T003-2: noisy pictures and t in, noise of the same size out, for all networks; and the
    view's own forward may not drift from the network that is saved and compiled."""
    net = stirred(NETWORKS[name]()).eval()
    x, t = batch_for(net)
    with torch.no_grad():
        out = net(x, t)
        bare = net.unet(x, t)
    assert out.shape == (2, net.spec.out_channels, 12, 10)
    assert type(out) is Tensor
    assert torch.equal(out, bare)
    assert float(out.std()) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_both_sides_have_the_very_same_parameters(name: str) -> None:
    net = on_meta(NETWORKS[name])
    assert isinstance(net, Network)
    assert type(net.unet) is UNet
    assert {id(p) for p in net.parameters()} == {id(p) for p in net.unet.parameters()}
    assert size(net) == cost.total_parameters(net.spec)
    assert not [key for key in net.state_dict() if re.search(r"layers\.\d\d_", key)]


@pytest.mark.parametrize("name", LIGHT)
def test_a_hook_on_every_named_module_fires(name: str) -> None:
    net = stirred(NETWORKS[name]())
    fired = set[str]()
    for part, module in net.named_modules():
        module.register_forward_hook(lambda *_, part=part: fired.add(part))
    with torch.no_grad():
        net(*batch_for(net))
    containers = (nn.ModuleList, nn.Embedding)
    wanted = {part for part, module in net.named_modules() if not isinstance(module, containers)}
    assert wanted - fired == set()


def test_the_label_table_fires_too() -> None:
    net = small001(classes=3)
    labels = net.get_submodule("time_embed.labels")
    seen: list[Tensor] = []
    labels.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    net(*batch_for(net), torch.tensor([0, 3]))
    assert seen[0].tolist() == [0, 3]


@pytest.mark.parametrize("name", LIGHT)
def test_a_copy_is_whole_and_apart(name: str) -> None:
    net = stirred(NETWORKS[name]()).eval()
    other = copy.deepcopy(net)
    x, t = batch_for(net)
    with torch.no_grad():
        before = net(x, t)
        stirred(other, seed=9)
        changed = other(x, t)
        assert torch.equal(net(x, t), before)
        assert torch.equal(changed, other.unet(x, t))
    assert not torch.equal(changed, before)
    assert {id(p) for p in net.parameters()}.isdisjoint({id(p) for p in other.parameters()})


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", LIGHT)
def test_loaded_weights_are_used(name: str, assign: bool) -> None:
    giver, taker = stirred(NETWORKS[name]()).eval(), NETWORKS[name]().eval()
    tensors = {key: value.clone() for key, value in giver.state_dict().items()}
    taker.load_state_dict(tensors, assign=assign)
    x, t = batch_for(giver)
    with torch.no_grad():
        wanted = giver(x, t)
        assert torch.equal(taker(x, t), wanted)
        assert torch.equal(taker.unet(x, t), wanted)
    assert {id(p) for p in taker.parameters()} == {id(p) for p in taker.unet.parameters()}


@pytest.mark.parametrize("name", ["text000", "text001", "text002", "text003-naive"])
@pytest.mark.parametrize("through", [lambda net: net, lambda net: net.unet])
def test_a_change_of_precision_reaches_both_sides(
    name: str, through: Callable[[Network], nn.Module]
) -> None:
    net = stirred(NETWORKS[name]()).eval()
    x, t = batch_for(net)
    with torch.no_grad():
        single = net(x, t)
        through(net).double()
        double = net(x.double(), t)
        assert torch.equal(double, net.unet(x.double(), t))
    assert double.dtype is torch.float64
    assert close(double.float(), single, 1e-3)


@pytest.mark.parametrize("name", ["text000", "text002"])
def test_frequencies_move_with_either_side_and_are_never_rounded(name: str) -> None:
    net = NETWORKS[name]()
    assert net.unet.embedding is not None
    exact = net.unet.embedding.frequencies.clone()
    net.bfloat16()
    assert torch.equal(net.unet.embedding.frequencies, exact)
    net.to("meta")
    assert net.unet.embedding.frequencies.is_meta


@pytest.mark.parametrize("name", ["text001-options", "text002", "text000"])
def test_train_and_eval_reach_both_sides(name: str) -> None:
    net = NETWORKS[name]()
    net.eval()
    assert {m.training for m in (*net.modules(), *net.unet.modules())} == {False}
    net.train()
    assert {m.training for m in (*net.modules(), *net.unet.modules())} == {True}


def test_dropout_follows_the_mode_of_a_block_alone() -> None:
    block = stirred(text001.ResBlock(8, 8, 16, dropout=0.5))
    x, emb = noise(1, 8, 4, 4), noise(1, 16)
    block.eval()
    assert torch.equal(block(x, emb), block(x, emb))
    assert {module.training for module in block.core.modules()} == {False}
    block.train()
    assert not torch.equal(block(x, emb), block(x, emb))


def test_another_layer_in_place_of_a_named_one_is_used_on_both_sides() -> None:
    net = stirred(small001()).eval()
    x, t = batch_for(net)
    net.out_conv = nn.Conv2d(36, 3, 3, padding=1)
    net.encoder[0].blocks[0].conv1 = nn.Conv2d(36, 36, 3, padding=1)
    net.init_conv = nn.Conv2d(3, 36, 3, padding=1)
    with torch.no_grad():
        net.out_conv.bias.fill_(7.0)
        out = net(x, t)
        assert torch.equal(out, net.unet(x, t))
    assert {id(p) for p in net.parameters()} == {id(p) for p in net.unet.parameters()}
    assert abs(float(out.detach().mean()) - 7.0) < 1.0


def test_overwritten_weights_are_used() -> None:
    net = text000.UNet().eval()
    x, t = batch_for(net)
    with torch.no_grad():
        net.out.weight.zero_()
        net.out.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        out = net(x, t)
    assert torch.equal(out, torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand_as(out))


@pytest.mark.parametrize("name", ["text000", "text002", "text001"])
def test_the_bare_network_saves_and_loads_as_a_model(name: str, tmp_path: Path) -> None:
    net = stirred(NETWORKS[name]()).eval()
    file = tmp_path / "model.safetensors"
    save_model(file, Model(Denoiser(net.unet, Cosine(), Epsilon()), Pictures(12, 10, 3)))
    loaded = load_model(file).net
    x, t = batch_for(net)
    with torch.no_grad():
        assert torch.equal(loaded(x, t), net(x, t))


@pytest.mark.parametrize("name", ["text001", "text003-naive"])
def test_wrong_input_gets_the_network_s_own_message(name: str) -> None:
    net = NETWORKS[name]()
    x, t = batch_for(net)
    with pytest.raises(ConfigError, match=r"x must be float \[batch, 3, height, width\]"):
        net(x[:, :2], t)
    with pytest.raises(ConfigError, match="label must be None"):
        net(x, t, torch.tensor([0, 0]))


@pytest.mark.parametrize("name", LIGHT)
def test_every_door_opens_for_the_denoiser(name: str) -> None:
    """T003-2: the contract of a noise predictor, as the denoiser uses it."""
    net = stirred(NETWORKS[name]()).eval()
    if net.spec.in_channels != net.spec.out_channels:
        net = stirred(small001(heads=2, classes=3)).eval()
    x0, drawn = noise(2, net.spec.in_channels, 8, 8), noise(2, net.spec.in_channels, 8, 8, seed=2)
    level = Cosine()(torch.tensor([0.2, 0.7], dtype=torch.float64).reshape(2, 1, 1, 1)).like(x0)
    with torch.no_grad():
        losses = [Denoiser(n, Cosine(), Epsilon()).loss(x0, drawn, level) for n in (net, net.unet)]
        told = (999 * level.t).flatten()
        direct = (net(level.mix(x0, drawn), told) - drawn).square().flatten(1).mean(1)
    assert torch.equal(losses[0], losses[1])
    assert close(losses[0], direct, 1e-3)


def test_the_front_page_has_the_names_that_occur_once() -> None:
    assert textbook.SimpleUNet is text000.UNet
    assert textbook.UNet is text001.UNet
    assert textbook.Bottleneck is text001.Bottleneck
    assert textbook.DiffusionModel is text002.DiffusionModel
    assert textbook.DiffusionUNet is text003.DiffusionUNet
    assert sorted(textbook.__all__) == textbook.__all__
    assert set(textbook.__all__) <= set(dir(textbook))


# --- text 000 -----------------------------------------------------------------------------------


class PrintedEmbedding(nn.Module):
    """Text 000's printed code, with the line restored that stores `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 4), nn.SiLU(), nn.Linear(dim * 4, dim))

    def forward(self, t: Tensor) -> Tensor:
        half_dim = self.dim // 2
        emb: Any = math.log(10000) / half_dim
        emb = torch.exp(torch.arange(half_dim) * -emb)
        emb = t[:, None] * emb[None, :]
        emb = torch.cat([torch.sin(emb), torch.cos(emb)], dim=-1)
        return self.mlp(emb)


class PrintedResBlock(nn.Module):
    """Text 000's printed code."""

    def __init__(self, in_ch: int, out_ch: int, time_emb_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, out_ch)
        self.norm2 = nn.GroupNorm(8, out_ch)
        self.time_mlp = nn.Linear(time_emb_dim, out_ch)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        h = self.norm1(F.silu(self.conv1(x)))
        h = h + self.time_mlp(t_emb)[:, :, None, None]
        h = self.norm2(F.silu(self.conv2(h)))
        return h + self.skip(x)


class PrintedAttention(nn.Module):
    """Text 000's printed code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, c, height * width)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        attn = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(c), dim=-1)
        return x + self.proj((v @ attn.transpose(-1, -2)).reshape(b, c, height, width))


class PrintedUNet(nn.Module):
    """Text 000's printed code."""

    def __init__(self) -> None:
        super().__init__()
        self.time_emb = PrintedEmbedding(256)
        self.enc1 = PrintedResBlock(3, 64, 256)
        self.enc2 = PrintedResBlock(64, 128, 256)
        self.enc3 = PrintedResBlock(128, 256, 256)
        self.down = nn.MaxPool2d(2)
        self.mid = PrintedResBlock(256, 256, 256)
        self.mid_attn = PrintedAttention(256)
        self.up = nn.Upsample(scale_factor=2)
        self.dec3 = PrintedResBlock(512, 128, 256)
        self.dec2 = PrintedResBlock(256, 64, 256)
        self.dec1 = PrintedResBlock(128, 64, 256)
        self.out = nn.Conv2d(64, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t_emb = self.time_emb(t)
        e1 = self.enc1(x, t_emb)
        e2 = self.enc2(self.down(e1), t_emb)
        e3 = self.enc3(self.down(e2), t_emb)
        m = self.mid_attn(self.mid(self.down(e3), t_emb))
        d3 = self.dec3(torch.cat([self.up(m), e3], dim=1), t_emb)
        d2 = self.dec2(torch.cat([self.up(d3), e2], dim=1), t_emb)
        d1 = self.dec1(torch.cat([self.up(d2), e1], dim=1), t_emb)
        return self.out(d1)


def twin(printed: nn.Module, ours: Any) -> Any:
    """Ours with the printed module's weights, by the printed names, all of them."""
    stirred(printed)
    ours.load_state_dict(printed.state_dict(), strict=True)
    return ours


def rows(spec: UNetSpec, side: int, *kinds: type) -> list[tuple[int, int]]:
    """(width, side) after every op of these kinds."""
    return [(s.out_width, side // s.out_scale) for s in trace(spec) if isinstance(s.op, kinds)]


def test_the_figure_of_text_000() -> None:
    """T000-2: five resolutions, a stem, four skips, mirrored; 22,786,691 parameters."""
    net = on_meta(text000.FigureUNet)
    spec = text000.figure()
    down = [(64, 256), (128, 128), (256, 64), (512, 32), (512, 16)]
    assert rows(spec, 256, Res) == [*down, (512, 32), (256, 64), (128, 128), (64, 256)]
    assert rows(spec, 256, Conv) == [(64, 256)]
    assert rows(spec, 256, Attn) == [(512, 16)]
    assert sum(isinstance(op, Skip) for op in spec.program) == 4
    assert net.spec == spec == recipes.text000_figure()
    assert size(net) == 22_786_691


def test_text_000_hears_the_noise_level() -> None:
    """T000-4: other t, other output; T000-14: every block hears it."""
    net = stirred(text000.UNet()).eval()
    x, t = batch_for(net)
    with torch.no_grad():
        out = net(x, t)
        assert not close(out, net(x, t + 50))
        for name in ("enc1", "enc2", "enc3", "mid", "dec3", "dec2", "dec1"):
            deaf = copy.deepcopy(net)
            deaf.get_submodule(f"{name}.time_mlp").weight.zero_()
            assert not close(deaf(x, t), out), name


@pytest.mark.parametrize("dim", [8, 9, 256])
@pytest.mark.parametrize("t", [torch.tensor([0, 1, 999]), torch.tensor([0.0, 0.5, 998.5])])
def test_the_timestep_embedding_of_text_000(dim: int, t: Tensor) -> None:
    """T000-5: dim // 2 rates exp(-ln(10^4) k / half), sine first, a zero for an odd dim, MLP."""
    ours = stirred(text000.TimestepEmbedding(dim))
    half = dim // 2
    angles = [[float(v) * math.exp(-math.log(1e4) * k / half) for k in range(half)] for v in t]
    sines = torch.tensor([[*map(math.sin, row), *map(math.cos, row)] for row in angles])
    wanted = ours.mlp(F.pad(sines, (0, dim % 2)))
    sinusoids: list[Tensor] = []
    ours.mlp.register_forward_pre_hook(lambda _, given: sinusoids.append(given[0]))
    out = ours(t)
    # The text's float32 angle of 999 rad has a spacing of 6e-5.
    assert torch.allclose(sinusoids[0], F.pad(sines, (0, dim % 2)), rtol=0, atol=1e-4)
    assert torch.allclose(sinusoids[0][:2], F.pad(sines, (0, dim % 2))[:2], rtol=0, atol=1e-6)
    assert close(out, wanted, 1e-3)
    assert arguments(text000.TimestepEmbedding) == ["dim"]


def test_the_embedding_s_layers_and_the_printed_code() -> None:
    """T000-5: `mlp` is Linear(dim, 4 dim), SiLU, Linear(4 dim, dim); runs on any device."""
    printed = PrintedEmbedding(12)
    ours = twin(printed, text000.TimestepEmbedding(12))
    t = torch.tensor([0, 17, 999])
    first, middle, last = ours.mlp
    assert (first.in_features, first.out_features) == (12, 48)
    assert isinstance(middle, nn.SiLU)
    assert (last.in_features, last.out_features) == (48, 12)
    assert close(ours(t), printed(t))
    ours.to("meta")
    assert ours(t.to("meta")).device.type == "meta"


@pytest.mark.parametrize(("in_ch", "out_ch"), [(3, 16), (16, 16), (24, 8)])
def test_the_residual_block_of_text_000(in_ch: int, out_ch: int) -> None:
    """T000-6: conv, SiLU, norm, plus time (not activated first), conv, SiLU, norm, plus skip."""
    ours = stirred(text000.ResBlock(in_ch, out_ch, 10))
    x, e = noise(2, in_ch, 5, 6), noise(2, 10)
    h = F.silu(F.conv2d(x, ours.conv1.weight, ours.conv1.bias, padding=1))
    h = F.group_norm(h, 8, ours.norm1.weight, ours.norm1.bias)
    h = h + F.linear(e, ours.time_mlp.weight, ours.time_mlp.bias)[:, :, None, None]
    h = F.silu(F.conv2d(h, ours.conv2.weight, ours.conv2.bias, padding=1))
    h = F.group_norm(h, 8, ours.norm2.weight, ours.norm2.bias)
    same = in_ch == out_ch
    skip = x if same else F.conv2d(x, ours.skip.weight, ours.skip.bias)
    assert close(ours(x, e), h + skip)
    assert isinstance(ours.skip, nn.Identity if same else nn.Conv2d)
    assert arguments(text000.ResBlock) == ["in_ch", "out_ch", "time_emb_dim"]
    assert list(ours.state_dict()) == list(PrintedResBlock(in_ch, out_ch, 10).state_dict())


def test_the_attention_of_text_000() -> None:
    """T000-7: one head, scores over sqrt(C), residual; equal to the explicit softmax."""
    printed = PrintedAttention(16)
    ours = twin(printed, text000.AttentionBlock(16))
    x = noise(2, 16, 3, 5)
    assert close(ours(x), printed(x))
    assert ours.norm.num_groups == 8
    assert arguments(text000.AttentionBlock) == ["channels"]


def test_text_000_is_its_printed_code() -> None:
    """T000-8, T000-9: same keys in the same order, same numbers, 4,530,243 parameters."""
    printed = PrintedUNet()
    ours = twin(printed, textbook.SimpleUNet())
    x, t = noise(2, 3, 16, 24), torch.tensor([0, 731])
    with torch.no_grad():
        wanted, out = printed(x, t), ours(x, t)
    assert list(ours.state_dict()) == list(printed.state_dict())
    assert [n for n, _ in ours.named_children()] == [n for n, _ in printed.named_children()]
    assert close(out, wanted, 1e-4)
    assert size(ours) == 4_530_243
    assert arguments(text000.UNet) == []
    assert ours.spec == recipes.text000()


def test_text_000_takes_sizes_that_its_code_refuses() -> None:
    """T000-9: the output has the input's shape, at 36 pixels too."""
    net = text000.UNet()
    x = noise(1, 3, 36, 21)
    with torch.no_grad():
        assert net(x, torch.tensor([5])).shape == x.shape
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            PrintedUNet()(x, torch.tensor([5]))


def test_text_000_joins_upsampled_first() -> None:
    """T000-9, T000-13: [upsampled, skip], side by side."""
    net = stirred(text000.UNet())
    seen = dict[str, Tensor]()
    net.up.register_forward_hook(lambda _, __, out: seen.update(up=out))
    net.enc1.register_forward_hook(lambda _, __, out: seen.update(skip=out))
    net.dec1.register_forward_pre_hook(lambda _, given: seen.update(joined=given[0]))
    with torch.no_grad():
        net(noise(1, 3, 8, 8), torch.tensor([5]))
    assert torch.equal(seen["joined"], torch.cat([seen["up"], seen["skip"]], dim=1))


@pytest.mark.parametrize("spec", [recipes.text000(), recipes.text000_figure()])
def test_the_five_rules_of_text_000(spec: UNetSpec) -> None:
    """T000-10, T000-11, T000-12, T000-13, T000-14: group norm, SiLU, attention at the lowest
    resolution only (where it is cheap), concatenation, time in every block."""
    sites = list(trace(spec))
    attention = [s for s in sites if isinstance(s.op, Attn)]
    assert (spec.style.norm, spec.style.groups) == (Norm.GROUP, 8)
    assert spec.style.activation is Activation.SILU
    assert spec.style.order is Order.CONV_ACT_NORM
    assert [s.in_scale for s in attention] == [spec.stride]
    assert {op.by for op in spec.program if isinstance(op, Concat)} == {Join.CONCAT}
    assert spec.style.inject is Inject.ADD
    full = replace(attention[0], in_scale=1, out_scale=1)
    dear = cost.multiply_adds(full, spec.style, 64, 64)
    cheap = cost.multiply_adds(attention[0], spec.style, 64, 64)
    assert dear > spec.stride**2 * cheap


def test_every_norm_of_text_000_is_a_group_norm_of_eight() -> None:
    """T000-10: in every residual block and in the attention; the bare output has none."""
    net = on_meta(text000.UNet)
    norms = {n: m for n, m in net.named_modules() if "norm" in n}
    assert len(norms) == 7 * 2 + 1
    assert {isinstance(m, nn.GroupNorm) for m in norms.values()} == {True}
    assert {m.num_groups for m in norms.values()} == {8}


# --- text 001 -----------------------------------------------------------------------------------

TESTED: dict[str, Any] = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "base_channels": 128,
    "channel_mults": (1, 2, 2, 4),
    "num_res_blocks": 2,
    "attention_resolutions": (16, 8),
}

CONFIGS: dict[str, tuple[text001.Config, int]] = {
    "light": (text001.light_config, 8_952_067),
    "ddpm": (text001.ddpm_config, 35_746_307),
    "improved": (text001.improved_config, 121_060_483),
    "highres": (text001.highres_config, 113_673_219),
}


@pytest.mark.parametrize("name", [*CONFIGS, "tested"])
def test_text_001_is_an_hourglass(name: str) -> None:
    """T001-3: resolution falls, then rises; every Concat stands at its Skip's scale."""
    config: Any = TESTED if name == "tested" else CONFIGS[name][0]
    sites = list(trace(on_meta(lambda: text001.UNet(**config)).spec))
    scales = [site.in_scale for site in sites]
    turn = scales.index(max(scales))
    assert scales[:turn] == sorted(scales[:turn])
    assert scales[turn:] == sorted(scales[turn:], reverse=True)
    joined = [(s.in_scale, sites[s.skip].out_scale) for s in sites if s.skip is not None]
    assert {now == then for now, then in joined} == {True}
    assert {s.in_scale for s in sites if s.part is Part.BOTTLENECK} == {max(scales)}


def test_the_listing_of_text_001() -> None:
    """T001-6: its shapes at 64 pixels, six skips, width grows in `Down`; 29,109,763 parameters."""
    spec = recipes.text001_listing()
    saved = [(s.in_width, 64 // s.in_scale) for s in trace(spec) if isinstance(s.op, Skip)]
    assert saved == [(128, 64)] * 2 + [(256, 32)] * 2 + [(256, 16)] * 2
    assert rows(spec, 64, Down) == [(256, 32), (256, 16), (512, 8)]
    assert rows(spec, 64, Up) == [(256, 16), (256, 32), (128, 64)]
    assert size(on_meta(lambda: UNet(spec))) == 29_109_763


def encoder_words(spec: UNetSpec) -> str:
    found = (s for s in trace(spec) if s.part is Part.ENCODER)
    return " ".join(type(s.op).__name__ for s in found)


def test_the_encoder_of_text_001() -> None:
    """T001-7: skip after attention, halving last, width grows in the first block of a level."""
    net = small001(num_res_blocks=2)
    stem, level = "Conv Skip", "Res Skip Res Skip Down Skip"
    assert encoder_words(net.spec) == f"{stem} {level} Res Attn Skip Res Attn Skip"
    widths = [(s.in_width, s.out_width) for s in trace(net.spec) if isinstance(s.op, Res)]
    assert widths[:4] == [(36, 36), (36, 36), (36, 72), (72, 72)]
    assert [s.in_width == s.out_width for s in trace(net.spec) if isinstance(s.op, Down)] == [True]
    assert net.spec == replace(
        recipes.text001(36, (1, 2), 2, (1,)), style=replace(net.spec.style, dropout=0.0)
    )


def test_saved_features_include_attention() -> None:
    """T001-7: what the decoder joins is what left the attention."""
    net = stirred(small001())
    seen = dict[str, Tensor]()
    last = net.encoder[1].attentions[0]
    last.register_forward_hook(lambda _, __, out: seen.update(skip=out))
    net.decoder[0].blocks[0].register_forward_pre_hook(lambda _, g: seen.update(joined=g[0]))
    with torch.no_grad():
        net(*batch_for(net))
    assert torch.equal(seen["joined"][:, -72:], seen["skip"])


def norm_act_conv(block: Any, x: Tensor, e: Tensor, groups: int, eps: float) -> Tensor:
    """The norm-first residual block, from its formula."""
    h = F.silu(F.group_norm(x, groups, block.norm1.weight, block.norm1.bias, eps))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    h = h + F.linear(e, block.time_proj.weight, block.time_proj.bias)[:, :, None, None]
    h = F.silu(F.group_norm(h, groups, block.norm2.weight, block.norm2.bias, eps))
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    if isinstance(block.shortcut, nn.Identity):
        return x + h
    return F.conv2d(x, block.shortcut.weight, block.shortcut.bias) + h


def explicit_attention(block: Any, x: Tensor, heads: int, groups: int, eps: float) -> Tensor:
    """x + proj(softmax(q k / sqrt(d)) v), heads side by side."""
    b, c, height, width = x.shape
    h = F.group_norm(x, groups, block.norm.weight, block.norm.bias, eps)
    qkv = F.conv2d(h, block.qkv.weight, block.qkv.bias).reshape(b, 3, heads, c // heads, -1)
    q, k, v = qkv.unbind(1)
    weights = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(c // heads), dim=-1)
    h = (v @ weights.transpose(-1, -2)).reshape(b, c, height, width)
    return x + F.conv2d(h, block.proj.weight, block.proj.bias)


def test_the_bottleneck_of_text_001() -> None:
    """T001-8: block1, attention, block2; the shape stays; signatures as printed."""
    middle = stirred(textbook.Bottleneck(32, 12))
    x, e = noise(2, 32, 4, 4), noise(2, 12)
    h = norm_act_conv(middle.block1, x, e, 32, 1e-6)
    h = explicit_attention(middle.attention, h, 1, 32, 1e-6)
    h = norm_act_conv(middle.block2, h, e, 32, 1e-6)
    assert close(middle(x, e), h)
    assert middle(x, e).shape == x.shape
    assert [name for name, _ in middle.named_children()] == ["block1", "attention", "block2"]
    assert arguments(text001.Bottleneck) == ["channels", "time_emb_dim", "dropout"]
    assert defaults(text001.Bottleneck) == {"dropout": 0.0}
    assert arguments(text001.Bottleneck.forward) == ["self", "x", "time_emb"]
    assert arguments(text001.AttentionBlock) == ["channels"]
    assert arguments(text001.ResBlock)[2:] == ["time_emb_dim", "dropout"]


def test_the_bottleneck_stands_at_the_lowest_resolution() -> None:
    """T001-8: 8x8 for pictures of 64 pixels with four levels, 4x4 with a last halving."""
    net = on_meta(lambda: text001.UNet(**TESTED))
    assert 64 // net.spec.stride == 8
    deeper = on_meta(lambda: text001.UNet(**TESTED, last_downsample=True))
    assert 64 // deeper.spec.stride == 4
    assert isinstance(net.bottleneck, text001.Bottleneck)


def test_the_decoder_of_text_001_mirrors() -> None:
    """T001-9: upsample, concatenate, block; a misaligned program is refused by op number."""
    net = small001()
    program = net.spec.program
    decoder = [type(s.op).__name__ for s in trace(net.spec) if s.part is Part.DECODER]
    fine = "Up Concat Res Concat Res Out"
    assert " ".join(decoder) == f"Concat Res Attn Concat Res Attn {fine}"
    up = next(index for index, op in enumerate(program) if isinstance(op, Up))
    with pytest.raises(SpecError, match=rf"op {up} Concat: features are at 1/2"):
        replace(net.spec, program=program[:up] + program[up + 1 :])


DOCUMENTED_001 = [
    "image_size",
    "in_channels",
    "out_channels",
    "base_channels",
    "channel_mults",
    "num_res_blocks",
    "attention_resolutions",
]


def test_the_constructor_of_text_001() -> None:
    """T001-10: the text's keywords first and in order, ours after them with defaults."""
    ours = ["dropout", "heads", "classes", "bookkeeping", "last_downsample", "inject"]
    assert arguments(text001.UNet) == DOCUMENTED_001 + ours
    assert defaults(text001.UNet) == dict(
        zip(ours, (0.0, 1, 0, DDPM, False, Inject.ADD), strict=True)
    )
    net = stirred(small001())
    x, t = batch_for(net)
    assert torch.equal(net(x, t), net(x, t.float()))


EXAMPLE_T001_11 = """
# Test the U-Net
model = UNet(
    image_size=64,
    in_channels=3,
    out_channels=3,
    base_channels=128,
    channel_mults=(1, 2, 2, 4),
    num_res_blocks=2,
    attention_resolutions=(16, 8),
)

# Count parameters
num_params = sum(p.numel() for p in model.parameters())
print(f"Number of parameters: {num_params:,}")  # ~35M for this config

# Test forward pass
x = torch.randn(2, 3, 64, 64)  # Batch of 2 images
t = torch.randint(0, 1000, (2,))  # Random timesteps

noise_pred = model(x, t)
print(f"Input shape: {x.shape}")
print(f"Output shape: {noise_pred.shape}")  # Should match input!

assert noise_pred.shape == x.shape, "U-Net should preserve spatial dimensions!"
"""


def run_text(code: str) -> dict[str, Any]:
    """Run a text's example as written; only the imports are ours."""
    names: dict[str, Any] = {name: getattr(textbook, name) for name in textbook.__all__}
    names |= {"torch": torch, "nn": nn}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        exec(compile(code, "text", "exec"), names)
    return names


def test_the_test_of_text_001_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    """T001-11: and prints the true number, 74,051,331."""
    run_text(EXAMPLE_T001_11)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "Number of parameters: 74,051,331",
        "Input shape: torch.Size([2, 3, 64, 64])",
        "Output shape: torch.Size([2, 3, 64, 64])",
    ]


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 74_051_331),
        ({"inject": Inject.SCALE_SHIFT}, 77_531_523),
        ({"bookkeeping": PER_BLOCK}, 61_895_427),
        ({"bookkeeping": PER_BLOCK, "last_downsample": True}, 66_615_043),
        ({"base_channels": 256}, 296_017_411),
        ({"num_res_blocks": 4}, 120_213_507),
        ({"heads": 4}, 74_051_331),
        ({"dropout": 0.1}, 74_051_331),
        ({"classes": 10}, 74_051_331 + 11 * 512),
        ({"out_channels": 6}, 74_051_331 + 3 * (128 * 9 + 1)),
        ({"in_channels": 1}, 74_051_331 - 2 * 9 * 128),
    ],
)
def test_sizes_of_text_001(changes: dict[str, Any], count: int) -> None:
    """T001-10, T001-11: published and derived numbers of parameters."""
    assert size(on_meta(lambda: text001.UNet(**(TESTED | changes)))) == count


# As printed; only the indentation and the line numbers are restored and removed.
PRINTED_COUNTER = r'''
def count_parameters_by_component(model):
    """Break down parameters by U-Net component."""

    components = {
        'time_embed': 0,
        'init_conv': 0,
        'encoder': 0,
        'bottleneck': 0,
        'decoder': 0,
        'output': 0,
    }

    for name, param in model.named_parameters():
        count = param.numel()
        if 'time_embed' in name:
            components['time_embed'] += count
        elif 'init_conv' in name:
            components['init_conv'] += count
        elif 'encoder' in name:
            components['encoder'] += count
        elif 'bottleneck' in name:
            components['bottleneck'] += count
        elif 'decoder' in name:
            components['decoder'] += count
        else:
            components['output'] += count

    total = sum(components.values())
    print("\nParameter breakdown:")
    for component, count in components.items():
        pct = 100 * count / total
        print(f"  {component:12s}: {count:>10,} ({pct:5.1f}%)")
    print(f"  {'TOTAL':12s}: {total:>10,}")

    return components
'''


@pytest.mark.parametrize("config", ["light", "ddpm", "improved", "highres", "tested", "odd"])
def test_the_printed_counter_agrees_with_ours(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """T001-12, T001-15: by fragments of names or by place in the program, the same table."""
    odd = TESTED | {"bookkeeping": PER_BLOCK, "last_downsample": True, "classes": 3}
    every: dict[str, Any] = {name: made for name, (made, _) in CONFIGS.items()}
    arguments: Any = (every | {"tested": TESTED, "odd": odd})[config]
    net = on_meta(lambda: text001.UNet(**arguments))
    theirs = run_text(PRINTED_COUNTER)["count_parameters_by_component"](net)
    table = capsys.readouterr().out
    ours = text001.count_parameters_by_component(net)
    assert ours == theirs
    assert list(ours) == list(theirs)
    assert capsys.readouterr().out == table
    assert sum(ours.values()) == size(net)


def test_the_parts_of_text_001() -> None:
    """T001-12: attributes by name and kind."""
    net = small001(classes=2)
    assert isinstance(net.time_embed, TimestepEmbedding)
    assert net.init_conv.kernel_size == (3, 3)
    assert len(net.encoder) == len(net.decoder) == 2
    assert isinstance(net.bottleneck, text001.Bottleneck)
    assert net.out_conv.kernel_size == (3, 3)
    assert isinstance(net.out_norm, nn.GroupNorm)
    wanted = ["time_embed", "init_conv", "encoder", "bottleneck", "decoder"]
    assert [name for name, _ in net.named_children()] == [*wanted, "out_norm", "out_conv"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_presets_of_text_001(name: str) -> None:
    """T001-13, T001-14: each row's network has its true size; they are our presets' sizes."""
    config, count = CONFIGS[name]
    net = on_meta(lambda: text001.UNet(**config))
    assert size(net) == count
    assert cost.total_parameters(recipes.preset(name)) == count


def test_ddpm_config_as_its_prose_says() -> None:
    """T001-14: 64 pixels, base 128, (1, 2, 2, 2), two blocks, attention at 16."""
    assert textbook.ddpm_config == {
        "image_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "base_channels": 128,
        "channel_mults": (1, 2, 2, 2),
        "num_res_blocks": 2,
        "attention_resolutions": (16,),
    }
    spec = on_meta(lambda: textbook.UNet(**textbook.ddpm_config)).spec
    outside = {64 // s.in_scale for s in trace(spec) if isinstance(s.op, Attn)} - {8}
    assert outside == {16}


EXAMPLE_T001_15 = """
# Analyze the DDPM model
model = UNet(**ddpm_config)
components = count_parameters_by_component(model)
"""

TABLE_T001_15 = """
Parameter breakdown:
  time_embed  :    328,704 (  0.9%)
  init_conv   :      3,584 (  0.0%)
  encoder     : 10,190,720 ( 28.5%)
  bottleneck  :  2,888,704 (  8.1%)
  decoder     : 22,330,880 ( 62.5%)
  output      :      3,715 (  0.0%)
  TOTAL       : 35,746,307
"""


def test_the_breakdown_of_text_001_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    """T001-15: keys, order and layout as printed, with the true numbers."""
    with torch.device("meta"):
        found = run_text(EXAMPLE_T001_15)["components"]
    assert capsys.readouterr().out == TABLE_T001_15
    assert found == cost.by_component(recipes.preset("ddpm"))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_breakdown_works_on_every_network(name: str) -> None:
    """T001-15: by place in the program, so no name can mislead it; view and bare agree."""
    net: Any = on_meta(NETWORKS[name])
    lines: list[str] = []
    found = text001.count_parameters_by_component(net, lines.append)
    assert found == text001.count_parameters_by_component(net.unet, lambda _: None)
    assert found == cost.by_component(net.spec)
    assert len(lines) == 8
    assert lines[-1] == f"  {'TOTAL':12s}: {size(net):>10,}"


# As printed, indentation restored.
PRINTED_INITIALIZER = r'''
import torch.nn as nn

def initialize_weights(model: nn.Module):
    """
    Initialize U-Net weights for stable diffusion training.

    Key principles:
    1. Most layers: Default PyTorch initialization (Kaiming/He)
    2. Output layer: Initialize to zero (start by predicting zero noise)
    3. Residual projections: Can be scaled down for stability
    """

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            # Default: Kaiming initialization for convolutions
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if module.bias is not None:
                nn.init.zeros_(module.bias)

        elif isinstance(module, nn.Linear):
            # Xavier/Glorot for linear layers
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

        elif isinstance(module, nn.GroupNorm):
            # Standard: gamma=1, beta=0
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    # CRITICAL: Initialize output convolution to zero
    # This means the model initially predicts zero noise,
    # which is a reasonable starting point (especially for t close to 0)
    if hasattr(model, 'out_conv'):
        nn.init.zeros_(model.out_conv.weight)
        nn.init.zeros_(model.out_conv.bias)

    return model
'''


def printed_initializer(model: nn.Module) -> nn.Module:
    """Text 001's own initialiser."""
    return run_text(PRINTED_INITIALIZER)["initialize_weights"](model)


def seeded(call: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return call()


@pytest.mark.parametrize("name", ["text000", "text001", "text002"])
def test_our_initialiser_is_the_printed_one_where_nothing_is_zero(name: str) -> None:
    """T001-18: the same draws in the same order, bit for bit (but transposed convolutions)."""
    one = stirred(NETWORKS[name]())
    if name == "text002":
        one = nn.Sequential(one.init_conv, one.down_blocks, one.out_norm)
    other = copy.deepcopy(one)
    assert seeded(lambda: text001.initialize_weights(one)) is one
    seeded(lambda: printed_initializer(other))
    if name == "text000":  # its head is not called out_conv, so the text would leave it
        nn.init.zeros_(other.out.weight)
    assert one.state_dict().keys() == other.state_dict().keys()
    differing = [
        k for k, v in one.state_dict().items() if not torch.equal(v, other.state_dict()[k])
    ]
    assert differing == []


def test_what_was_zero_stays_zero() -> None:
    """T001-18: the third principle, which the printed code states and undoes."""
    net = small001()
    zero = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and not m.weight.any()]
    text001.initialize_weights(net)
    still = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and not m.weight.any()]
    assert still == zero
    assert sum(name.endswith("conv2") for name in zero) == 2 + 2 + 4
    assert sum(name.endswith("proj") for name in zero) == 1 + 1 + 2
    assert "out_conv" in zero
    printed_initializer(net)
    assert all(bool(net.get_submodule(name).weight.any()) for name in zero if name != "out_conv")


def test_layers_that_the_printed_initialiser_misses() -> None:
    """T001-18: transposed and one-dimensional convolutions, norms without weights, embeddings."""
    transposed, line = nn.ConvTranspose2d(64, 16, 4), nn.Conv1d(32, 64, 3)
    table, norm = nn.Embedding(4, 5), nn.GroupNorm(2, 4, affine=False)
    model = nn.Sequential(transposed, line, table, norm, nn.BatchNorm2d(4))
    before = table.weight.detach().clone()
    seeded(lambda: text001.initialize_weights(model))
    gain = math.sqrt(2)
    assert math.isclose(
        float(transposed.weight.detach().std()), gain / math.sqrt(16 * 16), rel_tol=0.05
    )
    assert math.isclose(float(line.weight.detach().std()), gain / math.sqrt(64 * 3), rel_tol=0.05)
    assert not transposed.bias.any()
    assert not line.bias.any()
    assert torch.equal(table.weight, before)
    assert torch.equal(model[4].running_var, torch.ones(4))
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'fill_'"):
        printed_initializer(nn.Sequential(nn.GroupNorm(2, 4, affine=False)))


@pytest.mark.parametrize("name", LIGHT)
def test_the_output_is_zeroed_whatever_its_name(name: str) -> None:
    """T001-18: for views, for bare networks, and for anybody's model with an `out_conv`."""
    net = stirred(NETWORKS[name]())
    bare = stirred(UNet(net.spec))
    x, t = batch_for(net)
    with torch.no_grad():
        assert not text001.initialize_weights(net)(x, t).any()
        assert not text001.initialize_weights(bare)(x, t).any()
    foreign = nn.Module()
    foreign.out_conv = nn.Conv2d(2, 2, 1)
    text001.initialize_weights(foreign)
    assert not foreign.out_conv.weight.any()


EXAMPLE_T001_19 = """
# Apply initialization
model = UNet(**ddpm_config)
model = initialize_weights(model)

# Verify output is initially zero
x = torch.randn(1, 3, 64, 64)
t = torch.zeros(1, dtype=torch.long)
with torch.no_grad():
    output = model(x, t)
    print(f"Initial output mean: {output.mean():.6f}")  # Should be ~0
    print(f"Initial output std: {output.std():.6f}")  # Should be ~0
"""


def test_the_check_of_text_001_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    """T001-19: not about zero but exactly zero."""
    output = run_text(EXAMPLE_T001_19)["output"]
    printed = capsys.readouterr().out
    assert printed == "Initial output mean: 0.000000\nInitial output std: 0.000000\n"
    assert float(output.abs().max()) == 0.0


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({}, (16, 16)),
        ({}, (9, 23)),
        ({}, (1, 1)),
        ({"channel_mults": (1,), "attention_resolutions": (16,)}, (16, 16)),
        ({"channel_mults": (1, 1, 2), "num_res_blocks": 2}, (16, 12)),
        ({"base_channels": 40, "attention_resolutions": ()}, (16, 16)),
        ({"attention_resolutions": (16, 8), "heads": 4}, (8, 8)),
        ({"bookkeeping": PER_BLOCK, "last_downsample": True}, (10, 10)),
    ],
)
def test_promises_of_text_001(changes: dict[str, Any], side: tuple[int, int]) -> None:
    """T001-20: any resolution, depth, width, attention placement; time; skips."""
    net = stirred(small001(**changes)).eval()
    x, t = batch_for(net, side)
    with torch.no_grad():
        out = net(x, t)
        assert out.shape == x.shape
        assert torch.equal(out, net.unet(x, t))
        assert not close(net(x, t + 40), out)
    skips = sum(isinstance(op, Skip) for op in net.spec.program)
    assert skips == sum(isinstance(op, Concat) for op in net.spec.program) > 0


@pytest.mark.parametrize(("levels", "blocks"), [(2, 1), (3, 2), (1, 3)])
def test_bookkeeping_of_skips(levels: int, blocks: int) -> None:
    """T001-20: DDPM keeps 1 + L n + (L - 1) skips, per block L n; a last halving adds none."""
    shape: Any = {
        "channel_mults": (1,) * levels,
        "num_res_blocks": blocks,
        "attention_resolutions": (),
    }
    for last in (False, True):
        for kind, wanted in ((DDPM, levels * (blocks + 1)), (PER_BLOCK, levels * blocks)):
            net = small001(**shape, bookkeeping=kind, last_downsample=last)
            assert sum(isinstance(op, Skip) for op in net.spec.program) == wanted
            assert net.spec.stride == 2 ** (levels - 1 + int(last))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_resolutions": (4,)},
            "attention_resolutions has 4, but with image_size=16 and 2 levels the sides are"
            " 16, 8; use some of these",
        ),
        (
            {"image_size": 15, "attention_resolutions": (15,)},
            "attention_resolutions has 15, but with image_size=15 and 2 levels the sides are"
            " 16, 8; use some of these",
        ),
        ({"image_size": 0}, "image_size must be a whole number of at least 1; got 0"),
        ({"base_channels": 0}, "base_channels must be a whole number of at least 1; got 0"),
        ({"num_res_blocks": 0}, "num_res_blocks must be a whole number of at least 1; got 0"),
        ({"channel_mults": ()}, "channel_mults must have at least one entry; got none: use"),
        ({"channel_mults": (1, 0)}, "channel_mults[1] must be a whole number of at least 1"),
        ({"dropout": 1.0}, "style.dropout must be at least 0 and below 1; got 1.0"),
        ({"heads": 5}, "72 channels do not split into 5 heads; 1, 2, 3, 4, 6, 8, 9, 12 do"),
        ({"classes": -1}, "embedding.classes must be a whole number of at least 0; got -1"),
        ({"out_channels": 0}, "out_channels must be a whole number of at least 1; got 0"),
    ],
)
def test_text_001_refuses_what_cannot_work(changes: dict[str, Any], message: str) -> None:
    """T001-10: every refusal names the field and the value."""
    with pytest.raises(ConfigError) as caught:
        small001(**changes)
    assert message in str(caught.value)


def pictures(positions: range) -> tuple[Tensor, None]:
    return keyed_normal(3, Stream.AUGMENT, positions, (3, 8, 8)), None


@pytest.mark.parametrize("through", [lambda net: net, lambda net: net.unet])
def test_text_001_trains_and_samples(through: Callable[[Network], nn.Module]) -> None:
    """T001-21: trains with the one loop, through the view or its bare network, and samples."""
    view = seeded(small001)
    net = through(view)
    config = TrainConfig(max_train_steps=3, train_batch_size=2, lr_warmup_steps=0)
    state = TrainState(net, Denoiser(net, Cosine(), Epsilon()), config)
    before = [parameter.detach().clone() for parameter in view.parameters()]
    losses = [float(r.loss) for r in train(state, pictures, Recipe(Cosine(), uniform_t), config)]
    moved = [not torch.equal(p, b) for p, b in zip(view.parameters(), before, strict=True)]
    grid = levels(Cosine(), 3)
    with torch.no_grad():
        drawn = finish(ddim(state.averaged, noise(2, 3, 8, 8), grid))
    assert len(losses) == 3
    assert any(moved)
    assert drawn.shape == (2, 3, 8, 8)
    assert bool(drawn.isfinite().all())


# --- text 002 -----------------------------------------------------------------------------------


def small002(**changes: Any) -> text002.DiffusionModel:
    return text002.DiffusionModel(
        **({"image_size": 16, "channels": 3, "hidden_dims": [16, 24, 32], "time_dim": 16} | changes)
    )


def test_the_constructor_of_text_002() -> None:
    """T002-1: arguments, order, defaults; the default cannot be changed by accident."""
    wanted = ["image_size", "channels", "hidden_dims", "time_dim"]
    assert arguments(text002.DiffusionModel) == [*wanted, "pairs"]
    assert defaults(text002.DiffusionModel) == {
        "hidden_dims": (32, 64, 128),
        "time_dim": 128,
        "pairs": None,
    }
    dims = [8, 16]
    net = text002.DiffusionModel(16, 1, dims, 8)
    dims.append(24)
    assert len(net.down_blocks) == 2


def test_the_attributes_of_text_002() -> None:
    """T002-2, T002-3, T002-4, T002-5, T002-6, T002-7, T002-8: type and shape of each."""
    net = small002()
    assert isinstance(net.time_mlp, text002.TimeEmbedding)
    init, out = net.init_conv, net.out_conv
    assert (init.in_channels, init.out_channels, init.kernel_size) == (3, 16, (3, 3))
    assert isinstance(net.down_blocks, nn.ModuleList)
    assert [type(block) for block in net.down_blocks] == [text002.DownBlock] * 3
    assert isinstance(net.bottleneck, text002.BottleneckBlock)
    assert isinstance(net.up_blocks, nn.ModuleList)
    assert [type(block) for block in net.up_blocks] == [text002.UpBlock] * 3
    assert isinstance(net.out_norm, nn.GroupNorm)
    assert (net.out_norm.num_groups, net.out_norm.num_channels) == (8, 16)
    assert (out.in_channels, out.out_channels, out.kernel_size) == (16, 3, (3, 3))


@pytest.mark.parametrize("side", [(16, 16), (13, 7)])
def test_forward_of_text_002(side: tuple[int, int]) -> None:
    """T002-9: [B, C, H, W] and [B] integers to noise of the same shape, a plain tensor."""
    net = stirred(small002(channels=1))
    x, t = noise(2, 1, *side), torch.randint(0, 1000, (2,))
    out = net(x, t)
    assert out.shape == x.shape
    assert type(out) is Tensor
    assert arguments(text002.DiffusionModel.forward)[:3] == ["self", "x", "t"]


def test_the_six_steps_of_text_002() -> None:
    """T002-10: the parts run in the order of the page, and the program has that order."""
    net = small002(hidden_dims=(16, 24))
    order: list[str] = []
    for name in ("time_mlp", "init_conv", "bottleneck", "out_norm", "out_conv"):
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    for group in (net.down_blocks, net.up_blocks):
        for block in group:
            block.register_forward_hook(lambda m, *_: order.append(type(m).__name__))
    net(*batch_for(net))
    down, up = ["DownBlock"] * 2, ["UpBlock"] * 2
    ends = ["out_norm", "out_conv"]
    assert order == ["time_mlp", "init_conv", *down, "bottleneck", *up, *ends]
    words = [type(op).__name__ for op in net.spec.program]
    middle, tail = ["Res", "Attn", "Res"], ["Up", "Concat", "Res"] * 2
    assert words == ["Conv", *["Res", "Skip", "Down"] * 2, *middle, *tail, "Out"]


def test_the_time_embedding_of_text_002() -> None:
    """T002-11: sinusoid, Linear(dim, 4 dim), GELU, Linear(4 dim, dim); 131,712 at 128."""
    ours = stirred(text002.TimeEmbedding(16))
    t = torch.tensor([0, 3, 40])
    first, act, last = ours.mlp
    angles = t[:, None] * torch.exp(torch.arange(8) * (-math.log(1e4) / 8))
    h = torch.cat([angles.sin(), angles.cos()], dim=1)
    h = F.gelu(F.linear(h, first.weight, first.bias))
    assert close(ours(t), F.linear(h, last.weight, last.bias))
    assert isinstance(act, nn.GELU)
    assert ours(t).shape == (3, 16)
    assert size(on_meta(lambda: text002.TimeEmbedding(128))) == 131_712


@pytest.mark.parametrize(("in_ch", "out_ch"), [(8, 16), (16, 16)])
def test_the_residual_block_of_text_002(in_ch: int, out_ch: int) -> None:
    """T002-12: GN(8), SiLU, conv; plus projected time; GN(8), SiLU, conv; plus skip."""
    ours = stirred(text002.ResBlock(in_ch, out_ch, 12))
    x, e = noise(2, in_ch, 5, 6), noise(2, 12)
    assert close(ours(x, e), norm_act_conv(ours, x, e, 8, 1e-5))
    assert arguments(text002.ResBlock) == ["in_ch", "out_ch", "time_dim"]


@pytest.mark.parametrize("side", [2, 8, 32])
def test_the_down_block_of_text_002(side: int) -> None:
    """T002-13: ResBlock, then a 4x4 convolution with stride 2; (down, skip); exact halving."""
    ours = stirred(text002.DownBlock(8, 24, 12))
    x, e = noise(2, 8, side, 2 * side), noise(2, 12)
    down, skip = ours(x, e)
    conv = ours.get_submodule("down.conv")
    assert conv.kernel_size == (4, 4)
    assert close(skip, norm_act_conv(ours.res, x, e, 8, 1e-5))
    assert close(down, F.conv2d(skip, conv.weight, conv.bias, stride=2, padding=1))
    assert down.shape == (2, 24, side // 2, side)
    assert skip.shape == x.shape
    assert arguments(text002.DownBlock) == ["in_ch", "out_ch", "time_dim"]


@pytest.mark.parametrize("side", [1, 4, 16])
def test_the_up_block_of_text_002(side: int) -> None:
    """T002-14: transposed 4x4 convolution with stride 2, concatenate, ResBlock; exact doubling."""
    ours = stirred(text002.UpBlock(24, 8, 16, 12))
    x, skip, e = noise(2, 24, side, side), noise(2, 8, 2 * side, 2 * side), noise(2, 12)
    conv = ours.get_submodule("up.conv")
    h = F.conv_transpose2d(x, conv.weight, conv.bias, stride=2, padding=1)
    h = torch.cat([h, skip], dim=1)
    assert conv.kernel_size == (4, 4)
    assert close(ours(x, skip, e), norm_act_conv(ours.res, h, e, 8, 1e-5))
    assert ours(x, skip, e).shape == (2, 16, 2 * side, 2 * side)
    assert arguments(text002.UpBlock) == ["in_ch", "skip_ch", "out_ch", "time_dim"]


def test_the_bottleneck_of_text_002() -> None:
    """T002-15: ResBlock, SelfAttention with four heads, ResBlock."""
    ours = stirred(text002.BottleneckBlock(16, 12))
    x, e = noise(2, 16, 3, 4), noise(2, 12)
    h = norm_act_conv(ours.res1, x, e, 8, 1e-5)
    h = explicit_attention(ours.attn, h, 4, 8, 1e-5)
    assert close(ours(x, e), norm_act_conv(ours.res2, h, e, 8, 1e-5))
    assert [type(part).__name__ for part in ours.children()] == [
        "ResBlock",
        "SelfAttention",
        "ResBlock",
    ]
    assert arguments(text002.BottleneckBlock) == ["ch", "time_dim"]


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_the_attention_of_text_002(heads: int) -> None:
    """T002-16: norm, heads, projection, residual."""
    ours = stirred(text002.SelfAttention(24, heads))
    x = noise(2, 24, 3, 4)
    assert close(ours(x), explicit_attention(ours, x, heads, 8, 1e-5))
    assert arguments(text002.SelfAttention) == ["ch", "num_heads"]
    assert defaults(text002.SelfAttention) == {"num_heads": 4}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: text002.SelfAttention(24, 5),
            "num_heads must divide ch; got num_heads=5 and ch=24",
        ),
        (lambda: text002.SelfAttention(24, 0), "num_heads must be a whole number of at least 1"),
        (lambda: text002.SelfAttention(20), "ch must be a multiple of 8"),
        (lambda: text002.ResBlock(8, 12, 16), "out_ch must be a multiple of 8, the number of"),
        (lambda: text002.DownBlock(4, 8, 16), "in_ch must be a multiple of 8"),
        (lambda: text002.UpBlock(8, 9, 8, 16), "got 9: use 8 or 16"),
        (lambda: text002.BottleneckBlock(4, 16), "got 4: use 8 or 8"),
        (lambda: small002(hidden_dims=(8, 20)), "hidden_dims[1] must be a multiple of 8"),
        (lambda: small002(hidden_dims=()), "hidden_dims must have at least one entry; got none"),
        (lambda: small002(pairs=4), "pairs must be at most the number of hidden_dims; got 4 and 3"),
        (lambda: small002(pairs=-1), "pairs must be a whole number of at least 0; got -1"),
        (lambda: small002(image_size=0), "image_size must be a whole number of at least 1; got 0"),
        (lambda: small002(channels=0), "in_channels must be a whole number of at least 1; got 0"),
    ],
)
def test_text_002_refuses_what_cannot_work(make: Callable[[], Any], message: str) -> None:
    """T002-16: widths that the heads or the eight groups do not divide; both are named."""
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_time_enters_every_block_of_text_002() -> None:
    """T002-17: zeroing one projection changes the output, whichever it is."""
    net = stirred(small002(hidden_dims=(16, 24))).eval()
    x, t = batch_for(net)
    blocks = [n for n, m in net.named_modules() if isinstance(m, text002.ResBlock)]
    assert len(blocks) == 2 + 2 + 2
    with torch.no_grad():
        out = net(x, t)
        for name in blocks:
            deaf = copy.deepcopy(net)
            deaf.get_submodule(f"{name}.time_proj").weight.zero_()
            assert not close(deaf(x, t), out), name


@pytest.mark.parametrize("make", [lambda: small002(hidden_dims=(8,)), lambda: narrow001()])
def test_one_channel_per_group_cannot_hear_an_added_time(make: Callable[[], Network]) -> None:
    """The next norm takes away what is constant over a group; both docstrings warn of it."""
    net = stirred(make()).eval()
    x, t = batch_for(net)
    with torch.no_grad():
        assert close(net(x, t), net(x, t + 40))


def narrow001() -> text001.UNet:
    return small001(base_channels=8, channel_mults=(1, 2))


EXAMPLE_T002_18 = """
# Initialize model for 32x32 RGB images
model = DiffusionModel(
    image_size=32,
    channels=3,
    hidden_dims=[64, 128, 256],
    time_dim=128
)

# Create sample inputs
batch_size = 8
noisy_images = torch.randn(batch_size, 3, 32, 32)
timesteps = torch.randint(0, 1000, (batch_size,))

# Forward pass
predicted_noise = model(noisy_images, timesteps)
print(predicted_noise.shape)  # Output: torch.Size([8, 3, 32, 32])

# Calculate loss
true_noise = torch.randn_like(noisy_images)
loss = torch.nn.functional.mse_loss(predicted_noise, true_noise)
"""


def test_the_usage_of_text_002_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    """T002-18: prints the shape; the untrained loss is the noise's mean square, about 1."""
    found = run_text(EXAMPLE_T002_18)
    assert capsys.readouterr().out == "torch.Size([8, 3, 32, 32])\n"
    assert size(found["model"]) == 10_401_475
    assert found["loss"] == found["true_noise"].square().mean()


def test_the_diagram_of_text_002() -> None:
    """T002-19: with a pair per entry every drawn row and skip is in the trace; with one pair
    fewer the trace is the diagram."""
    three = on_meta(lambda: text002.DiffusionModel(64, 3)).spec
    two = on_meta(lambda: text002.DiffusionModel(64, 3, pairs=2)).spec
    drawn = [(32, 64), (64, 32), (128, 16), (64, 32), (32, 64)]
    assert rows(two, 64, Conv, Down, Up) == drawn
    middle = [(128, 16), (128, 8), (128, 16)]
    assert rows(three, 64, Conv, Down, Up) == [(32, 64), (64, 32), *middle, (64, 32), (32, 64)]
    skips = [(s.in_width, 64 // s.in_scale) for s in trace(three) if isinstance(s.op, Skip)]
    assert skips == [(32, 64), (64, 32), (128, 16)]
    assert rows(two, 64, Attn) == [(128, 16)]


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: text002.DiffusionModel(32, 3), 2_748_579),
        (lambda: text002.DiffusionModel(28, 1), 2_747_425),
        (lambda: text002.DiffusionModel(32, 3, [64, 128, 256]), 10_401_475),
        (lambda: text002.DiffusionModel(32, 3, pairs=2), 1_419_043),
        (lambda: text002.DiffusionModel(32, 3, [64, 128, 256], 128, 2), 5_153_731),
    ],
)
def test_sizes_of_text_002(make: Callable[[], nn.Module], count: int) -> None:
    """T002-19: derived numbers of parameters."""
    assert size(on_meta(make)) == count


# --- text 003 -----------------------------------------------------------------------------------

EXAMPLE_T003_6 = """
model = SimpleNoisePredictor()
x = torch.randn(2, 3, 24, 17)
t = torch.randint(0, 1000, (2,))
out = model(x, t)
"""


def test_the_naive_predictor() -> None:
    """T003-6: five 3x3 convolutions and four ReLUs in `layers`; t is ignored."""
    found = run_text(EXAMPLE_T003_6)
    net, h = found["model"], found["x"]
    assert [type(layer) for layer in net.layers] == [nn.Conv2d, nn.ReLU] * 4 + [nn.Conv2d]
    for index in range(0, 9, 2):
        h = F.conv2d(h, net.layers[index].weight, net.layers[index].bias, padding=1)
        h = h if index == 8 else F.relu(h)
    assert close(found["out"], h)
    assert list(net.state_dict()) == [f"layers.{i}.{p}" for i in range(0, 9, 2) for p in WB]
    assert defaults(text003.SimpleNoisePredictor) == {"in_channels": 3, "hidden_dim": 64}
    assert (size(net), size(text003.SimpleNoisePredictor(1))) == (114_307, 112_001)
    assert net.spec == recipes.preset("naive")


WB = ("weight", "bias")


def test_problems_of_the_naive_predictor() -> None:
    """T003-7: an output pixel sees 11x11 pixels, one resolution, and never hears t."""
    net = text003.SimpleNoisePredictor(1, 4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.1)
    x = torch.ones(1, 1, 25, 25, requires_grad=True)
    net(x, torch.tensor([0]))[0, 0, 12, 12].backward()
    assert x.grad is not None
    seen = x.grad[0, 0].nonzero()
    assert seen.amin(0).tolist() == [7, 7]
    assert seen.amax(0).tolist() == [17, 17]
    assert len(seen) == 11 * 11
    assert {site.out_scale for site in trace(net.spec)} == {1}
    other = stirred(net)
    assert torch.equal(other(x, torch.tensor([0])), other(x, torch.tensor([999])))


def test_the_shapes_of_text_003() -> None:
    """T003-8: as printed for 256 pixels, here at an eighth."""
    net = text003.DiffusionUNet().eval()
    shapes = dict[str, tuple[int, ...]]()
    for name in ("down1", "down2", "down3", "down4", "bottleneck", "up1", "up2", "up3", "up4"):
        net.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])})
        )
    with torch.no_grad():
        out = net(noise(1, 3, 32, 32), torch.tensor([5]))
    found = {name: (width, height * 8) for name, (width, height, _) in shapes.items()}
    downs = {"down1": (64, 128), "down2": (128, 64), "down3": (256, 32), "down4": (512, 16)}
    ups = {"up1": (256, 32), "up2": (128, 64), "up3": (64, 128), "up4": (64, 256)}
    assert found == downs | {"bottleneck": (512, 16)} | ups
    assert out.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (text003.DiffusionUNet, 24_404_803),
        (lambda: text003.DiffusionUNet(inject=Inject.SCALE_SHIFT), 25_046_275),
        (lambda: text003.DiffusionUNet(full_resolution_skip=True), 24_540_611),
    ],
)
def test_sizes_of_text_003(make: Callable[[], nn.Module], count: int) -> None:
    """T003-8: derived numbers of parameters; by default no skip has the full resolution."""
    net: Any = on_meta(make)
    full = [s for s in trace(net.spec) if isinstance(s.op, Skip) and s.in_scale == 1]
    assert size(net) == count
    assert len(full) == int(count == 24_540_611)


def test_time_enters_every_block_of_text_003() -> None:
    """T003-8: t is added, or scales and shifts, in every block."""
    net = stirred(text003.DiffusionUNet()).eval()
    x, t = noise(1, 3, 16, 16), torch.tensor([400])
    names = [n for n, _ in net.named_modules() if n.endswith("time_proj")]
    assert len(names) == 4 + 2 + 4
    with torch.no_grad():
        out = net(x, t)
        for name in names:
            kept = net.get_submodule(name).weight.clone()
            net.get_submodule(name).weight.zero_()
            assert not close(net(x, t), out, 1e-6), name
            net.get_submodule(name).weight.copy_(kept)


def test_concatenation_keeps_both_signals_and_addition_mixes_them() -> None:
    """T003-11: f = Concat(f_enc, f_dec) has the channels of both; the add variant keeps width."""
    decoder, encoder = noise(1, 4, 3, 3), noise(1, 4, 3, 3, seed=2)
    both = ConcatSkip(Join.CONCAT)(decoder, encoder)
    assert torch.equal(both[:, :4], decoder)
    assert torch.equal(both[:, 4:], encoder)
    assert torch.equal(ConcatSkip(Join.ADD)(decoder, encoder), decoder + encoder)
    program = (Conv(8), Skip(), Res(8), Concat(Join.ADD), Out())
    added = replace(recipes.text003(), program=program)
    joined = replace(added, program=(*program[:3], Concat(), Out()))
    assert [s.out_width for s in trace(added)][3] == 8
    assert [s.out_width for s in trace(joined)][3] == 16
    out = stirred(UNet(added))(noise(1, 3, 8, 8), torch.tensor([3]))
    assert out.shape == (1, 3, 8, 8)


def components() -> Iterator[tuple[str, UNetSpec]]:
    style = Style(groups=4)
    for down in Downsampling:
        yield f"down-{down}", UNetSpec(3, 3, (Conv(8), Down(down), Up(), Out()), style)
    for up in Upsampling:
        yield f"up-{up}", UNetSpec(3, 3, (Conv(8), Down(), Up(up), Out()), style)


@pytest.mark.parametrize("spec", [s for _, s in components()], ids=[n for n, _ in components()])
def test_every_way_to_halve_and_to_double(spec: UNetSpec) -> None:
    """T003-15: strided convolution or pooling; transposed convolution or interpolation."""
    down, up = [s for s in trace(spec) if isinstance(s.op, Down | Up)]
    x = noise(1, 8, 6, 4)
    half = build(down, spec.style)(x)
    assert half.shape == (1, 8, 3, 2)
    assert build(up, spec.style)(half).shape == x.shape


def test_all_six_components_are_ops_or_layers() -> None:
    """T003-15: residual blocks, down, up, time embedding, attention, concatenation."""
    assert {Res, Down, Up, Attn, Skip, Concat} <= set(OPS)
    net = on_meta(text003.DiffusionUNet)
    found = {type(op) for op in net.spec.program}
    assert {Res, Down, Up, Attn, Skip, Concat} <= found
    assert isinstance(net.time_embed, TimestepEmbedding)
    assert set(ACTIVATIONS) == set(Activation)

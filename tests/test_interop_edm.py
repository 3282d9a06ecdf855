"""EDM's networks, from their description alone: names, shapes, equations, counts.

Nothing of EDM's code or weights is here. State dicts are laid out by the helper below, and what
they compute by a second one, both written from the paper (2206.00364) and the layout's facts.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixtures.openai.rule import weights_of
from undiffuse.cost import total_parameters
from undiffuse.denoiser import KarrasPrecond
from undiffuse.errors import CheckpointError, ConfigError, SpecError
from undiffuse.interop._edm import LICENCE, EDMOptions, from_edm
from undiffuse.interop._openai import OpenAIOptions, from_openai
from undiffuse.interop._weights import mean_only
from undiffuse.noise import Karras
from undiffuse.recipes import adm_family, ddpmpp_family
from undiffuse.spec import Attn, Inject, Res, groups_of, trace

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """A network of EDM's: `song` is its DDPM++, otherwise its ADM."""

    song: bool
    size: int
    base: int
    mults: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]  # resolutions
    classes: int = 0
    augment: int = 0
    channels: int = 3

    def shapes(self) -> Shapes:
        named = dict(self._embedding())
        for name, shape in self._body():
            named[name] = shape
        return {f"model.{name}": shape for name, shape in named.items()}

    def _embedding(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        base, wide = self.base, 4 * self.base
        if self.augment:
            yield "map_augment.weight", (base, self.augment)
        yield from linear("map_layer0", base, wide)
        yield from linear("map_layer1", wide, wide)
        if self.classes and self.song:
            yield from linear("map_label", self.classes, base)
        elif self.classes:
            yield "map_label.weight", (wide, self.classes)

    def _body(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        widths = [self.base * m for m in self.mults]
        width = self.base if self.song else widths[0]
        yield from conv(f"enc.{self.size}x{self.size}_conv", self.channels, width, 3)
        skips = [width]
        for level, wider in enumerate(widths):
            at = f"{self.size >> level}x{self.size >> level}"
            if level:
                yield from self._block(f"enc.{at}_down", width, width, resized=True)
                skips.append(width)
            for j in range(self.blocks):
                attends = self.size >> level in self.attention
                yield from self._block(f"enc.{at}_block{j}", width, wider, attends)
                width = wider
                skips.append(width)
        yield from self._block(f"dec.{at}_in0", width, width, True)
        yield from self._block(f"dec.{at}_in1", width, width)
        for level, wider in reversed(list(enumerate(widths))):
            at = f"{self.size >> level}x{self.size >> level}"
            if level < len(widths) - 1:
                yield from self._block(f"dec.{at}_up", width, width, resized=True)
            for j in range(self.blocks + 1):
                attends = self.size >> level in self.attention
                attends = attends and (j == self.blocks or not self.song)
                yield from self._block(f"dec.{at}_block{j}", width + skips.pop(), wider, attends)
                width = wider
        head = f"dec.{at}_aux_" if self.song else "out_"
        yield from norm(f"{head}norm", width)
        yield from conv(f"{head}conv", width, self.channels, 3)

    def _block(
        self, name: str, width: int, wider: int, attends: bool = False, resized: bool = False
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norm(f"{name}.norm0", width)
        yield from conv(f"{name}.conv0", width, wider, 3)
        yield from linear(f"{name}.affine", 4 * self.base, wider if self.song else 2 * wider)
        yield from norm(f"{name}.norm1", wider)
        yield from conv(f"{name}.conv1", wider, wider, 3)
        if width != wider or (resized and self.song):
            yield from conv(f"{name}.skip", width, wider, 1)
        if resized:
            yield f"{name}.conv0.resample_filter", (1, 1, 2, 2)
            yield f"{name}.skip.resample_filter", (1, 1, 2, 2)
        if attends:
            yield from norm(f"{name}.norm2", wider)
            yield from conv(f"{name}.qkv", wider, 3 * wider, 1)
            yield from conv(f"{name}.proj", wider, wider, 1)


def linear(name: str, width: int, wider: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (wider, width)
    yield f"{name}.bias", (wider,)


def conv(name: str, width: int, wider: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (wider, width, kernel, kernel)
    yield f"{name}.bias", (wider,)


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def empty(layout: Layout) -> Tensors:
    return {name: torch.empty(s, device="meta") for name, s in layout.shapes().items()}


def count(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() for name, t in tensors.items() if "resample_filter" not in name)


# --- what those networks compute ----------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The forward pass, by EDM's names, in float64 but for the sinusoid."""

    layout: Layout
    tensors: Tensors
    channels_per_head: int = 64

    def __call__(
        self, x: Tensor, noise: Tensor, one_hot: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        emb = self._embed(noise, one_hot, augment)
        order = dict.fromkeys(
            ".".join(name.split(".")[1:3])
            for name in self.tensors
            if name.startswith(("model.enc", "model.dec"))
        )
        skips: list[Tensor] = []
        for name in order:
            role = name.split("_", 1)[1]
            if role == "conv":
                x = self._conv(name, x)
            elif role.startswith("aux"):
                break
            else:
                if name.startswith("dec") and role.startswith("block"):
                    x = torch.cat((x, skips.pop()), dim=1)
                x = self._block(name, x, emb)
            if name.startswith("enc"):
                skips.append(x)
        head = f"dec.{self.layout.size}x{self.layout.size}_aux_" if self.layout.song else "out_"
        return self._conv(f"{head}conv", F.silu(self._norm(f"{head}norm", x)))

    def _get(self, name: str) -> Tensor:
        return self.tensors[f"model.{name}"].double()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._get(f"{name}.weight"), self._get(f"{name}.bias"))

    def _conv(self, name: str, x: Tensor) -> Tensor:
        weight = self._get(f"{name}.weight")
        return F.conv2d(x, weight, self._get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        groups, eps = min(32, x.shape[1] // 4), 1e-6 if self.layout.song else 1e-5
        weight, bias = self._get(f"{name}.weight"), self._get(f"{name}.bias")
        return F.group_norm(x, groups, weight, bias, eps)

    def _embed(self, noise: Tensor, one_hot: Tensor | None, augment: Tensor | None) -> Tensor:
        song, half = self.layout.song, self.layout.base // 2
        k = torch.arange(half, dtype=torch.float32)
        angles = noise.float()[:, None] * torch.exp(k * (-math.log(1e4) / (half - song)))
        emb = torch.cat((angles.sin(), angles.cos()) if song else (angles.cos(), angles.sin()), 1)
        emb = emb.double()
        if one_hot is not None and song:
            emb = emb + self._linear("map_label", one_hot * math.sqrt(one_hot.shape[1]))
        if augment is not None:
            emb = emb + augment @ self._get("map_augment.weight").T
        emb = self._linear("map_layer1", F.silu(self._linear("map_layer0", emb)))
        if one_hot is not None and not song:
            emb = emb + one_hot @ self._get("map_label.weight").T
        return F.silu(emb)

    def _block(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        song, gain = self.layout.song, math.sqrt(0.5) if self.layout.song else 1.0
        told = self._linear(f"{name}.affine", emb)[..., None, None]
        h = self._conv(f"{name}.conv0", resized(name, F.silu(self._norm(f"{name}.norm0", x))))
        if song:
            h = F.silu(self._norm(f"{name}.norm1", h + told))
        else:
            scale, shift = told.chunk(2, dim=1)
            h = F.silu(self._norm(f"{name}.norm1", h) * (scale + 1) + shift)
        h = self._conv(f"{name}.conv1", h)
        x = resized(name, x)
        if f"model.{name}.skip.weight" in self.tensors:
            x = self._conv(f"{name}.skip", x)
        x = (x + h) * gain
        return self._attend(name, x) * gain if f"model.{name}.qkv.weight" in self.tensors else x

    def _attend(self, name: str, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        heads = 1 if self.layout.song else c // self.channels_per_head
        qkv = self._conv(f"{name}.qkv", self._norm(f"{name}.norm2", x))
        q, k, v = qkv.reshape(b, heads, c // heads, 3, height * width).unbind(3)
        weights = (q.transpose(2, 3) @ k / math.sqrt(c // heads)).softmax(dim=-1)
        return x + self._conv(f"{name}.proj", (v @ weights.transpose(2, 3)).reshape(x.shape))


def resized(name: str, x: Tensor) -> Tensor:
    if name.endswith("_down"):
        return F.avg_pool2d(x, 2)
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if name.endswith("_up") else x


SONG = Layout(True, 16, 16, (2, 2, 2), 2, (8,), classes=5, augment=9)
ADM = Layout(False, 16, 32, (1, 2, 3), 2, (8, 4), classes=5)
OPTIONS = EDMOptions(channels_per_head=16)


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("layout", [SONG, ADM], ids=["song", "adm"])
def test_outputs_are_those_of_the_description(layout: Layout, classes: int) -> None:
    layout = replace(layout, classes=classes)
    tensors = weights_of(layout.shapes())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    noise = torch.tensor([80.0, 0.3, 0.002], dtype=torch.float64).log() / 4
    labels = torch.tensor([0, 4, 2]) if classes else None
    one_hot = F.one_hot(labels, classes).double() if labels is not None else None
    expected = Reference(layout, tensors, 16)(x, noise, one_hot)
    double = {name: tensor.double() for name, tensor in tensors.items()}
    with torch.no_grad():
        found = from_edm(double, OPTIONS).net()(x, noise, labels)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-12


@pytest.mark.parametrize("layout", [SONG, replace(ADM, augment=9)], ids=["song", "adm"])
def test_augmentation_is_heard_as_in_the_description(layout: Layout) -> None:
    """2206.00364, appendix F.2: before the two layers of the embedding; zeros add nothing."""
    tensors = {n: t.double() for n, t in weights_of(layout.shapes()).items()}
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    told = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    noise, labels = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0, 4])
    reference, net = Reference(layout, tensors, 16), from_edm(tensors, OPTIONS).net()
    one_hot = F.one_hot(labels, 5).double()
    with torch.no_grad():
        plain = net(x, noise, labels)
        assert torch.equal(net(x, noise, labels, augment=0 * told), plain)
        found = net(x, noise, labels, augment=told)
    expected = reference(x, noise, one_hot, told)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-12
    assert float((found - plain).abs().max() / expected.abs().max()) >= 1e-3


@pytest.mark.parametrize("layout", [SONG, ADM], ids=["song", "adm"])
def test_no_class_is_a_vector_of_zeros(layout: Layout) -> None:
    tensors = {n: t.double() for n, t in weights_of(layout.shapes()).items()}
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.zeros(1, dtype=torch.float64)
    expected = Reference(layout, tensors, 16)(x, noise, torch.zeros(1, 5, dtype=torch.float64))
    net = from_edm(tensors, EDMOptions(channels_per_head=16, label_dropout=True)).net()
    with torch.no_grad():
        found = net(x, noise, torch.tensor([5]))
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-12


def test_rows_of_labels_round_once() -> None:
    tensors = weights_of(SONG.shapes())
    table = from_edm(tensors).weights["embedding.labels.weight"]
    weight, bias = tensors["model.map_label.weight"], tensors["model.map_label.bias"]
    exact = weight.double().T * math.sqrt(5) + bias.double()
    assert table.dtype is torch.float32
    assert torch.equal(table[:5], exact.float())
    assert torch.equal(table[5], bias)


# --- the published networks, by their counts ----------------------------------------------------

CIFAR = (True, 32, 128, (2, 2, 2), 4, (16,))
ADM_64 = Layout(False, 64, 192, (1, 2, 3, 4), 3, (32, 16, 8), classes=1000)
COUNTS = [
    (Layout(*CIFAR), 55_732_739),
    (Layout(*CIFAR, augment=9), 55_733_891),
    (Layout(*CIFAR, classes=10, augment=9), 55_735_299),
    (Layout(True, 64, 128, (1, 2, 2, 2), 4, (16,), augment=9), 61_805_571),
    (ADM_64, 295_899_267),
]


@pytest.mark.parametrize(("layout", "number"), COUNTS)
def test_counts_in_full_size(layout: Layout, number: int) -> None:
    tensors = empty(layout)
    assert count(tensors) == number
    found = from_edm(tensors)
    assert count(found.weights) == total_parameters(found.spec) == number
    assert found.size == (layout.size, layout.size)


def test_ddpmpp_is_our_recipe() -> None:
    found = from_edm(empty(Layout(*CIFAR, classes=10, augment=9)))
    ours = ddpmpp_family(128, (2, 2, 2), 4, (1,)).with_classes(10, True).with_augment(9)
    assert found.spec == ours
    assert found.origin == "EDM SongUNet"
    assert found.schedule == Karras(0.002, 80.0)
    assert found.prediction == KarrasPrecond(0.5)


def test_adm_is_our_recipe_with_edms_groups() -> None:
    found = from_edm(empty(ADM_64))
    ours = adm_family(192, (1, 2, 3, 4), 3, (1, 2, 3)).with_classes(1000, False)
    assert found.spec.program == ours.program
    assert found.origin == "EDM DhariwalUNet"
    for site in trace(ours):
        for width in (site.in_width, site.out_width):
            if isinstance(site.op, Res | Attn):
                assert groups_of(width, found.spec.style) == groups_of(width, ours.style) == 32


def test_the_style_of_song() -> None:
    style = from_edm(empty(SONG)).spec.style
    assert style.skip_gain == math.sqrt(0.5)
    assert style.project_resized
    assert style.eps == 1e-6
    assert style.inject is Inject.ADD
    assert [groups_of(width, style) for width in (16, 32, 64, 128, 256)] == [4, 8, 16, 32, 32]
    assert style.embedding.label_first
    assert style.embedding.half_minus_one
    assert style.embedding.sin_first


def test_the_style_of_adm() -> None:
    style = from_edm(empty(ADM), OPTIONS).spec.style
    assert style.skip_gain == 1.0
    assert not style.project_resized
    assert style.eps == 1e-5
    assert style.inject is Inject.SCALE_SHIFT
    assert [groups_of(width, style) for width in (32, 64, 128)] == [8, 16, 32]
    assert not style.embedding.label_first
    assert not style.embedding.sin_first
    assert not style.embedding.null


def test_attention_on_the_way_up_is_in_the_last_block_only() -> None:
    found = from_edm(empty(SONG))
    sides = [16 // s.in_scale for s in trace(found.spec) if isinstance(s.op, Attn)]
    assert sides == [8, 8, 4, 8]
    adm = from_edm(empty(ADM), OPTIONS)
    assert sum(isinstance(op, Attn) for op in adm.spec.program) == 2 * (2 + 3) + 1


# --- the same network as guided-diffusion stores it ---------------------------------------------

FIXTURES = Path(__file__).parent / "fixtures" / "openai"


def as_edm(openai: Tensors, layout: Layout, channels_per_head: int) -> Tensors:
    """guided-diffusion's tensors under EDM's names, rows of qkv interleaved."""
    theirs = {
        "model.map_layer0": "time_embed.0",
        "model.map_layer1": "time_embed.2",
        f"model.enc.{layout.size}x{layout.size}_conv": "input_blocks.0.0",
        "model.out_norm": "out.0",
        "model.out_conv": "out.2",
        **_blocks(openai, layout),
    }
    tensors: Tensors = {}
    for name, shape in layout.shapes().items():
        module, _, part = name.rpartition(".")
        if name == "model.map_label.weight":
            tensors[name] = openai["label_emb.weight"].T
        elif part == "resample_filter":
            tensors[name] = torch.full(shape, 0.25)
        else:
            tensors[name] = openai[f"{theirs[module]}.{part}"].reshape(shape)
        if module.endswith("qkv"):
            width = shape[0] // 3
            split = tensors[name].reshape(3, width // channels_per_head, channels_per_head, -1)
            tensors[name] = split.permute(1, 2, 0, 3).reshape(shape)
    return tensors


def _blocks(openai: Tensors, layout: Layout) -> dict[str, str]:
    """EDM's modules of blocks -> guided-diffusion's; both store blocks as they run."""
    resnets = dict.fromkeys(n.split(".in_layers")[0] for n in openai if ".in_layers." in n)
    blocks = dict.fromkeys(n.split(".conv0")[0] for n in layout.shapes() if ".conv0." in n)
    inside = {"norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1"}
    inside |= {"norm1": "out_layers.0", "conv1": "out_layers.3", "skip": "skip_connection"}
    names: dict[str, str] = {}
    for block, resnet in zip(blocks, resnets, strict=True):
        names |= {f"{block}.{a}": f"{resnet}.{b}" for a, b in inside.items()}
        attention = resnet.rpartition(".")[0] + ".1"
        pairs = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
        names |= {f"{block}.{a}": f"{attention}.{b}" for a, b in pairs.items()}
    return names


def test_one_adm_network_in_both_layouts_is_the_same() -> None:
    nets = json.loads((FIXTURES / "nets.json").read_text(encoding="utf-8"))
    openai = weights_of({n: tuple(s) for n, s in nets["adm-64"]["shapes"].items()})
    options = OpenAIOptions(num_head_channels=16, dropout=0.0)
    first = mean_only(from_openai(openai, options, like="adm-64"))
    openai |= {n: openai[n][:3] for n in ("out.2.weight", "out.2.bias")}
    layout = Layout(False, 16, 32, (1, 2, 3, 4), 3, (8, 4, 2), classes=10)
    second = from_edm(as_edm(openai, layout, 16), OPTIONS)
    assert second.spec.program == first.spec.program
    assert second.weights.keys() == first.weights.keys()
    assert all(torch.equal(second.weights[name], first.weights[name]) for name in first.weights)


# --- what is said and what is refused -----------------------------------------------------------


def test_what_was_left_out_or_assumed_is_said() -> None:
    notes = from_edm(empty(SONG), EDMOptions(sigma_data=0.25)).notes
    assert notes[0] == LICENCE
    assert "CC BY-NC-SA 4.0" in LICENCE
    assert "sigma_data=0.25 is assumed" in notes[1]
    assert notes[2].startswith("label 5 means no class")
    assert all("\n" not in note for note in notes)
    assert len(from_edm(empty(SONG), EDMOptions(label_dropout=True)).notes) == 2
    assert len(from_edm(empty(ADM), OPTIONS).notes) == 2
    strange = from_edm(empty(replace(SONG, augment=4))).notes
    assert strange[2].startswith("what the 4 numbers that told of augmentation mean is not known")


def test_the_prefix_may_be_missing() -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in empty(SONG).items()}
    assert from_edm(bare).spec == from_edm(empty(SONG)).spec


def refusal(tensors: Mapping[str, Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_edm(tensors, OPTIONS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("more", "feature"),
    [
        ({"u": meta(1001)}, "iDDPM preconditioning"),
        ({"model.map_noise.freqs": meta(8)}, "embedding_type='fourier' (ncsn++)"),
        ({"model.enc.8x8_aux_residual.weight": meta(32, 3, 3, 3)}, "encoder_type='skip'"),
        ({"model.dec.16x16_aux_up.resample_filter": meta(1, 1, 2, 2)}, "decoder_type='skip'"),
        ({"unet.enc.16x16_conv.weight": meta(32, 4, 3, 3)}, "an EDM2 network"),
        ({"model.enc.8x8_down.conv0.resample_filter": meta(1, 1, 4, 4)}, "only resample_filter="),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(more: Tensors, feature: str) -> None:
    message = refusal({**empty(SONG), **more})
    assert feature in message
    assert message.startswith(next(iter(more)).removeprefix("model."))


def weights_in(layout: Layout) -> list[str]:
    """Names of tensors that a file cannot lack and still be a network of this family."""
    optional = ("resample_filter", "map_augment.weight", "map_label.weight")
    return [name for name in layout.shapes() if not name.endswith(optional)]


@pytest.mark.parametrize("name", weights_in(SONG)[::7])
def test_a_missing_tensor_of_song_is_named(name: str) -> None:
    left = {key: value for key, value in empty(SONG).items() if key != name}
    assert name.removeprefix("model.") in refusal(left)


@pytest.mark.parametrize("name", weights_in(ADM)[::7])
def test_a_missing_tensor_of_adm_is_named(name: str) -> None:
    left = {key: value for key, value in empty(ADM).items() if key != name}
    assert name.removeprefix("model.") in refusal(left)


@pytest.mark.parametrize(
    "name",
    [
        "map_layer1.weight",
        "map_label.bias",
        "enc.16x16_block1.conv1.weight",
        "enc.8x8_down.affine.weight",
        "dec.4x4_in0.qkv.weight",
        "dec.16x16_up.skip.bias",
        "dec.16x16_aux_conv.weight",
    ],
)
def test_a_wrong_shape_or_type_is_named(name: str) -> None:
    tensors = empty(SONG)
    shape = list(tensors[f"model.{name}"].shape)
    wrong = {**tensors, f"model.{name}": meta(shape[0] + 1, *shape[1:])}
    assert refusal(wrong).startswith(f"{name} is torch.float32 [{shape[0] + 1}")
    whole = {**tensors, f"model.{name}": meta(*shape).to(torch.int32)}
    assert refusal(whole).startswith(f"{name} is torch.int32")


def test_more_tensors_than_the_network_has_are_named() -> None:
    assert refusal({**empty(SONG), "model.step": meta()}).startswith("step is in the file, but")


def test_a_missing_level_is_named() -> None:
    left = {key: value for key, value in empty(SONG).items() if "enc.8x8_" not in key}
    assert refusal(left).startswith("enc.8x8_down.conv0.weight is missing: the levels are 16x16,")
    assert refusal({}).startswith("enc.RxR_conv.weight is missing: the file holds no SongUNet")


def test_a_missing_block_is_named() -> None:
    left = {key: value for key, value in empty(SONG).items() if "enc.16x16_block0" not in key}
    assert refusal(left) == "enc.16x16_block0 is missing: the file is not complete"
    far = {**empty(SONG), "model.enc.16x16_block99999.conv0.weight": meta(32, 32, 3, 3)}
    assert refusal(far) == "enc.16x16_block2 is missing: the file is not complete"


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="channels_per_head=64 does not divide the 96 channels"):
        from_edm(empty(ADM))
    with pytest.raises(ConfigError, match=r"channels_per_head must be a whole number.* got 0"):
        EDMOptions(channels_per_head=0)
    with pytest.raises(ConfigError, match=r"sigma_data must be above 0; got -1\.0"):
        from_edm(empty(SONG), EDMOptions(sigma_data=-1.0))
    with pytest.raises(SpecError, match=r"style\.dropout must be .* got 2\.0"):
        from_edm(empty(SONG), EDMOptions(dropout=2.0))


def test_foreign_files_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"enc\.RxR_conv\.weight is missing"):
        from_edm({"input_blocks.0.0.weight": meta(32, 3, 3, 3)})

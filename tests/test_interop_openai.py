"""OpenAI's networks: their outputs to the last digit, their names, and what is refused."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fixtures.openai.rule import weights_of
from programs import unchecked
from undiffuse import recipes
from undiffuse.denoiser import Epsilon, Sample
from undiffuse.errors import CheckpointError, ConfigError, SpecError
from undiffuse.interop._openai import (
    PUBLISHED,
    NoiseSchedule,
    OpenAIOptions,
    from_openai,
    structure_of,
    to_openai,
)
from undiffuse.interop._weights import Imported, mean_only, net_shapes
from undiffuse.noise import Cosine, LinearBetas
from undiffuse.spec import (
    Attn,
    Down,
    Downsampling,
    Embedding,
    Inject,
    LinearAttn,
    Op,
    Res,
    Resize,
    Style,
    UNetSpec,
    Up,
    Upsampling,
)
from undiffuse.unet import UNet

FOLDER = Path(__file__).parent / "fixtures" / "openai"
NETS: dict[str, dict[str, Any]] = json.loads((FOLDER / "nets.json").read_text(encoding="utf-8"))
FULL: dict[str, dict[str, Any]] = json.loads(
    (FOLDER / "published.json").read_text(encoding="utf-8")
)
# What the narrow copies have to say beside the options of the published network.
LIKE: dict[str, tuple[str, OpenAIOptions]] = {
    **{name: (name, OpenAIOptions()) for name in NETS},
    "adm-64": ("adm-64", OpenAIOptions(num_head_channels=16)),
    "adm-256": ("adm-256", OpenAIOptions(num_head_channels=16)),
    "adm-256-uncond": ("adm-256-uncond", OpenAIOptions(num_head_channels=32)),
    "adm-512": ("adm-512", OpenAIOptions(num_head_channels=16)),
    "conv-resample-false": ("adm-256", OpenAIOptions(num_heads=2)),
}
MULTI_HEADED = [name for name in NETS if NETS[name]["arguments"].get("num_heads") != 1]

every_net = pytest.mark.parametrize("name", NETS)


@dataclass(frozen=True)
class Case:
    """A network of the fixtures: its weights by the rule, what went in, and what came out."""

    tensors: dict[str, Tensor]
    x: Tensor
    timesteps: Tensor
    labels: Tensor | None
    sinusoid: Tensor
    single: Tensor
    double: Tensor
    keep: int

    def run(self, net: UNet, x: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x, self.timesteps, self.labels)[..., :: self.keep, :: self.keep]


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in NETS[name]["shapes"].items()}


def case(name: str) -> Case:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        found = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return Case(
        tensors=weights_of(shapes(name)),
        x=found["pictures"].float() / 128 - 1,
        timesteps=found["timesteps"],
        labels=found.get("labels"),
        sinusoid=found["sinusoid"],
        single=found["float32"],
        double=found["float64"],
        keep=NETS[name]["keep"],
    )


def imported(name: str, tensors: Mapping[str, Tensor]) -> Imported:
    like, options = LIKE[name]
    return from_openai(tensors, options, like)


def empty(name: str) -> dict[str, Tensor]:
    """Names and shapes of a narrow network, without memory."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes(name).items()}


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


def with_sinusoid(net: UNet, values: Tensor) -> UNet:
    """sin and cos may differ by a rounding between machines; take those of the fixture."""
    assert net.embedding is not None
    net.embedding.sinusoid = lambda timestep: values  # type: ignore[method-assign] # the stored sinusoid
    return net


# --- the same outputs ---------------------------------------------------------------------------


@every_net
def test_outputs_are_those_of_the_peer(name: str) -> None:
    it = case(name)
    net = with_sinusoid(imported(name, it.tensors).net(), it.sinusoid)
    single = it.run(net, it.x)
    double = it.run(net.double(), it.x.double())
    assert double.dtype is torch.float64
    assert double.shape == it.double.shape
    assert apart(double, it.double) <= 1e-12
    assert apart(single, it.double) <= max(1e-6, 4 * apart(it.single, it.double))


@every_net
def test_timesteps_are_told_as_the_peer_tells_them(name: str) -> None:
    it = case(name)
    assert len(it.timesteps.unique()) >= 2
    embedding = imported(name, it.tensors).net().embedding
    assert embedding is not None
    # One rounding of a frequency is an angle of up to timestep * 2^-24.
    allowed = 1e-6 + it.timesteps[:, None] * 2.0**-23
    assert bool(((embedding.sinusoid(it.timesteps) - it.sinusoid).abs() <= allowed).all())
    half = it.sinusoid.shape[1] // 2
    k = torch.arange(half, dtype=torch.float32)
    assert torch.equal(embedding.frequencies, torch.exp(-np.log(10_000.0) * k / half))


@pytest.mark.parametrize("name", MULTI_HEADED)
def test_the_comparison_sees_a_wrong_order_of_query_key_and_value(name: str) -> None:
    it = case(name)
    like, options = LIKE[name]
    right = PUBLISHED[like].options.use_new_attention_order
    wrong = from_openai(it.tensors, replace(options, use_new_attention_order=not right), like)
    assert apart(it.run(with_sinusoid(wrong.net(), it.sinusoid), it.x), it.double) > 1e-4


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_comparison_sees_a_wrong_number_of_heads(heads: int) -> None:
    it = case("iddpm-cifar-10")
    wrong = from_openai(it.tensors, OpenAIOptions(num_heads=heads), "iddpm-cifar-10")
    assert apart(it.run(with_sinusoid(wrong.net(), it.sinusoid), it.x), it.double) > 1e-4


@every_net
def test_import_and_export_are_inverse_to_the_bit(name: str) -> None:
    it = case(name)
    like, _ = LIKE[name]
    order = bool(PUBLISHED[like].options.use_new_attention_order)
    ours = imported(name, it.tensors)
    theirs = to_openai(ours.spec, ours.weights, order)
    assert theirs.keys() == it.tensors.keys()
    assert all(torch.equal(theirs[key], it.tensors[key]) for key in theirs)
    again = imported(name, theirs)
    assert again.spec == ours.spec
    assert all(torch.equal(again.weights[key], ours.weights[key]) for key in ours.weights)


def test_the_mean_is_the_first_half_of_the_channels() -> None:
    it = case("iddpm-cifar-10")
    whole = imported("iddpm-cifar-10", it.tensors)
    mean = mean_only(whole)
    assert (whole.spec.out_channels, mean.spec.out_channels) == (6, 3)
    assert torch.equal(it.run(mean.net(), it.x), it.run(whole.net(), it.x)[:, :3])


def test_a_half_precision_torso_is_widened_and_said_so() -> None:
    it = case("adm-64")
    torso = ("input_blocks", "middle_block", "output_blocks")
    mixed = {
        key: value.half() if key.startswith(torso) and value.ndim > 2 else value
        for key, value in it.tensors.items()
    }
    found = imported("adm-64", mixed)
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.float32}
    rounded = imported("adm-64", {key: value.float() for key, value in mixed.items()})
    assert all(torch.equal(found.weights[key], rounded.weights[key]) for key in found.weights)
    assert "part of the file is in a lower precision" in " ".join(found.notes)
    assert bool(it.run(found.net(), it.x).isfinite().all())


def test_a_file_in_one_precision_keeps_it() -> None:
    half = {key: value.half() for key, value in case("conv-resample-false").tensors.items()}
    found = imported("conv-resample-false", half)
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.float16}


# --- the published networks in full size --------------------------------------------------------


def full_specs() -> dict[str, Callable[[], UNetSpec]]:
    """By our recipes; their numbers of heads do not matter for names and shapes."""
    improved, adm = recipes.improved_family, recipes.adm_family
    big = (1, 1, 2, 2, 4, 4)
    return {
        "iddpm-imagenet-64": lambda: improved(128, (1, 2, 3, 4), 3, (2, 3)),
        "iddpm-cifar-10": lambda: improved(128, (1, 2, 2, 2), 3, (1, 2)),
        "iddpm-imagenet-64-class": lambda: improved(192, (1, 2, 3, 4), 3, (2, 3)).with_classes(
            1000, False
        ),
        "iddpm-lsun-256": lambda: additive(improved(128, big, 2, (4,))),
        "adm-64": lambda: adm(192, (1, 2, 3, 4), 3, (1, 2, 3)).with_classes(1000, False),
        "adm-128": lambda: adm(256, (1, 1, 2, 3, 4), 2, (2, 3, 4)).with_classes(1000, False),
        "adm-256": lambda: adm(256, big, 2, (3, 4, 5)).with_classes(1000, False),
        "adm-256-uncond": lambda: adm(256, big, 2, (3, 4, 5)),
        "adm-512": lambda: adm(256, (0.5, *big), 2, (4, 5, 6)).with_classes(1000, False),
    }


def additive(spec: UNetSpec) -> UNetSpec:
    return replace(spec, style=replace(spec.style, inject=Inject.ADD))


def full(name: str) -> tuple[UNetSpec, dict[str, Tensor]]:
    spec = replace(full_specs()[name](), out_channels=6)
    weights = {key: torch.empty(s, device="meta") for key, s in net_shapes(spec).items()}
    return spec, to_openai(spec, weights)


@pytest.mark.parametrize("name", FULL)
def test_names_shapes_and_count_in_full_size(name: str) -> None:
    _, tensors = full(name)
    lines = "\n".join(f"{key} {list(tensors[key].shape)}" for key in sorted(tensors))
    assert sum(tensor.numel() for tensor in tensors.values()) == FULL[name]["count"]
    assert hashlib.sha256(lines.encode()).hexdigest() == FULL[name]["sha256"]
    assert structure_of(tensors) == PUBLISHED[name].structure


def heads_of(spec: UNetSpec) -> set[int]:
    return {op.heads for op in spec.program if isinstance(op, Attn)}


ALONE = [name for name in FULL if name != "adm-256-uncond"]


@pytest.mark.parametrize("name", ALONE)
def test_published_networks_are_recognised_by_their_structure(name: str) -> None:
    spec, tensors = full(name)
    found = from_openai(tensors)
    assert found.notes[0].startswith(f"it has the structure of {name}, so num_head")
    assert found.size is not None
    assert str(found.size[0]) == name.replace("-10", "-32").replace("-class", "").split("-")[-1]
    heads = {"iddpm-lsun-256": {1}, "adm-128": {4}, "adm-64": {6, 9, 12}}
    heads |= {"adm-256": {8, 16}, "adm-512": {8, 16}}
    assert heads_of(found.spec) == heads.get(name, {4})
    style = replace(spec.style, dropout=found.spec.style.dropout)
    assert found.spec.style == style


def test_adm_64_is_our_recipe() -> None:
    spec, tensors = full("adm-64")
    assert from_openai(tensors, OpenAIOptions(dropout=0.0)).spec == spec


@pytest.mark.parametrize(
    ("name", "schedule", "prediction", "dropout"),
    [
        ("iddpm-imagenet-64", Cosine(4000), Epsilon(4000, 0.25), 0.0),
        ("iddpm-cifar-10", Cosine(4000), Epsilon(4000, 0.25), 0.3),
        ("iddpm-imagenet-64-class", Cosine(4000), Epsilon(4000), 0.0),
        ("iddpm-lsun-256", LinearBetas(), Epsilon(), 0.0),
        ("adm-64", Cosine(1000), Epsilon(), 0.1),
        ("adm-512", LinearBetas(), Epsilon(), 0.0),
    ],
)
def test_published_networks_mean_what_their_flags_say(
    name: str, schedule: object, prediction: object, dropout: float
) -> None:
    found = from_openai(full(name)[1])
    assert found.schedule == schedule
    assert found.prediction == prediction
    assert found.spec.style.dropout == dropout


def test_only_adm_64_has_the_new_order() -> None:
    new = [name for name, one in PUBLISHED.items() if one.options.use_new_attention_order]
    assert new == ["adm-64"]


def test_two_published_networks_that_differ_in_dropout_alone_need_no_choice() -> None:
    """The outputs are the same; only going on with training would tell them apart."""
    _, tensors = full("adm-256-uncond")
    found = from_openai(tensors)
    assert found.spec.style.dropout == 0.0
    assert "structure of adm-256-uncond" in " ".join(found.notes)
    assert from_openai(tensors, like="adm-lsun-256").spec.style.dropout == 0.1
    assert from_openai(tensors, like="adm-256-uncond").spec.style.dropout == 0.0
    assert from_openai(tensors, OpenAIOptions(dropout=0.2)).spec.style.dropout == 0.2


def test_published_networks_of_one_structure_differ_in_dropout_alone() -> None:
    """So that a file needs no name: whichever is taken, the outputs are the same."""
    for one, other in combinations(PUBLISHED.values(), 2):
        if one.structure == other.structure:
            assert replace(one.options, dropout=0.0) == replace(other.options, dropout=0.0)


# --- options ------------------------------------------------------------------------------------

COMPLETE = OpenAIOptions(
    num_heads=4,
    use_new_attention_order=False,
    diffusion_steps=500,
    noise_schedule=NoiseSchedule.LINEAR,
    rescale_timesteps=True,
    predict_xstart=True,
)


def test_complete_options_need_no_published_network() -> None:
    found = from_openai(empty("iddpm-cifar-10"), COMPLETE)
    assert found.schedule == LinearBetas(500, 2e-4, 0.04)
    assert found.prediction == Sample(500, 2.0)
    assert found.size is None
    assert found.notes == ()


def test_what_neither_file_nor_user_says_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        from_openai(empty("iddpm-cifar-10"))
    assert str(caught.value).startswith(
        "the weights do not tell num_heads or num_head_channels, use_new_attention_order,"
        " diffusion_steps, noise_schedule, rescale_timesteps, predict_xstart, and no published"
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^the weights do not tell noise_schedule, and no pub"):
        from_openai(empty("iddpm-cifar-10"), replace(COMPLETE, noise_schedule=None))


def test_a_step_is_told_as_the_peer_tells_it() -> None:
    prediction = from_openai(empty("iddpm-cifar-10"), like="iddpm-cifar-10").prediction
    level = Cosine(4000)(torch.tensor([0.0, 1.0, 2000 / 3999], dtype=torch.float64))
    told = prediction(level).c_noise.float()
    assert torch.equal(told, torch.tensor([0, 3999, 2000]) * (1000.0 / 4000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4, "num_head_channels": 64}, "num_heads=4 and num_head_channels=64 exclude"),
        ({"num_heads": 0}, "num_heads must be a whole number of at least 1; got 0"),
        ({"num_head_channels": -1}, "num_head_channels must be a whole number"),
        ({"num_heads": True}, "num_heads must be a whole number of at least 1; got True"),
        ({"diffusion_steps": 1}, "diffusion_steps must be a whole number of at least 2; got 1"),
        ({"image_size": 0}, "image_size must be a whole number"),
        ({"noise_schedule": "linear"}, "noise_schedule must be NoiseSchedule.LINEAR or"),
        ({"rescale_timesteps": "False"}, "rescale_timesteps must be True or False; got 'False'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        unchecked("interop/_openai").OpenAIOptions(**options)
    assert message in str(caught.value)


def test_heads_that_do_not_divide_are_refused() -> None:
    tensors = empty("iddpm-cifar-10")
    with pytest.raises(ConfigError, match="num_heads=5 does not divide the 64 channels"):
        from_openai(tensors, OpenAIOptions(num_heads=5), "iddpm-cifar-10")
    with pytest.raises(ConfigError, match="num_head_channels=48 does not divide the 64 channels"):
        from_openai(tensors, OpenAIOptions(num_head_channels=48), "iddpm-cifar-10")
    with pytest.raises(SpecError, match=r"style\.dropout must be .* got 1\.5"):
        from_openai(tensors, OpenAIOptions(dropout=1.5), "iddpm-cifar-10")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        from_openai(empty("iddpm-cifar-10"), like="adm-46")
    assert str(caught.value).startswith(
        "like='adm-46' is no published network. Did you mean adm-64? There are: iddpm-imagenet-64,"
    )


# --- damaged and foreign files ------------------------------------------------------------------


def refusal(tensors: Mapping[str, Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_openai(tensors, like="iddpm-cifar-10")
    message = str(caught.value)
    assert "\n" not in message
    return message


SMALL = empty("iddpm-cifar-10")


@pytest.mark.parametrize("name", sorted(SMALL)[::5])
def test_a_missing_tensor_is_named(name: str) -> None:
    assert name in refusal({key: value for key, value in SMALL.items() if key != name})


@pytest.mark.parametrize(
    "name",
    [
        "time_embed.2.weight",
        "input_blocks.2.0.in_layers.2.bias",
        "input_blocks.5.1.qkv.weight",
        "input_blocks.4.0.op.weight",
        "middle_block.1.proj_out.weight",
        "output_blocks.7.2.conv.weight",
        "output_blocks.15.0.skip_connection.weight",
        "out.0.weight",
    ],
)
def test_a_wrong_shape_or_type_is_named(name: str) -> None:
    right = list(SMALL[name].shape)
    longer = torch.empty((right[0] + 32, *right[1:]), device="meta")
    message = refusal({**SMALL, name: longer})
    assert message == (
        f"{name} is torch.float32 {list(longer.shape)} in the file, {right} in this network"
    )
    whole = torch.empty(right, dtype=torch.int64, device="meta")
    assert f"{name} is torch.int64" in refusal({**SMALL, name: whole})


def test_more_tensors_than_the_network_has_are_named() -> None:
    more = {**SMALL, "ema.decay": torch.zeros(()), "step": torch.zeros(())}
    assert refusal(more) == (
        "ema.decay is in the file, but this network has no such weight (2 such in all)"
    )


def test_a_truncated_file_is_refused() -> None:
    names = list(SMALL)
    encoder = {name: SMALL[name] for name in names if not name.startswith("output_blocks.")}
    assert refusal(encoder).startswith("output_blocks.0 is missing: an EncoderUNetModel (clas")
    half = {name: SMALL[name] for name in names[: len(names) // 2]}
    assert refusal(half).startswith("out.2.weight is missing: the file holds no UNetModel")
    without = {k: v for k, v in SMALL.items() if not k.startswith("input_blocks.15.")}
    assert refusal(without) == (
        "input_blocks.15 is missing: 15 input blocks do not make whole levels"
    )
    assert refusal({}).startswith("input_blocks.0.0.weight is missing: the file holds no UNetModel")


def test_a_large_number_in_a_name_costs_nothing() -> None:
    far = {**SMALL, "input_blocks.9999.0.in_layers.2.weight": SMALL["out.2.weight"]}
    assert refusal(far) == "input_blocks.9998 is missing, but there is a later one"
    name = f"input_blocks.{'9' * 5000}.0.in_layers.2.weight"
    assert refusal({**SMALL, name: SMALL["out.2.weight"]}).startswith("input_blocks.999")


def changed(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    named = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {**SMALL, **{name: torch.empty(s, device="meta") for name, s in named.items()}}


@pytest.mark.parametrize("rows", [3, 6])
def test_upsamplers_are_refused_by_name(rows: int) -> None:
    tensors = changed(input_blocks__0__0__weight=(32, 6, 3, 3), out__2__weight=(rows, 32, 3, 3))
    assert "6 channels in: a SuperResModel" in refusal(tensors)


def test_other_numbers_of_channels_are_refused() -> None:
    message = refusal(changed(out__2__weight=(5, 32, 3, 3)))
    assert message == "out.2.weight must have 3 rows, or 6 with a learned variance; got 5"
    message = refusal(changed(input_blocks__0__0__weight=(32, 3, 3)))
    assert message == "input_blocks.0.0.weight must have 4 dimensions; got [32, 3, 3]"
    message = refusal(changed(input_blocks__0__0__weight=(48, 3, 3, 3)))
    assert message.startswith("a width of 48 channels is no multiple of 32")


# --- any network of the family ------------------------------------------------------------------

Resample = tuple[Callable[[int], tuple[Op, ...]], Callable[[int], tuple[Op, ...]]]
RESAMPLING: list[Resample] = [
    (lambda _: (Down(),), lambda _: (Up(),)),
    (lambda _: (Down(Downsampling.AVG),), lambda _: (Up(Upsampling.NEAREST),)),
    (lambda width: (Res(width, Resize.DOWN),), lambda width: (Res(width, Resize.UP),)),
]
FAMILY = [
    OpenAIOptions(num_heads=1),
    OpenAIOptions(num_heads=4),
    OpenAIOptions(num_head_channels=8),
    OpenAIOptions(num_head_channels=32),
]


# Plain choices: the type checks of the tests draw from `random`, which strategies may not.
CHOICES = st.fixed_dictionaries(
    {
        "widths": st.lists(st.sampled_from((32, 64)), min_size=1, max_size=3),
        "blocks": st.integers(1, 3),
        "levels": st.sets(st.integers(0, 2)),
        "resampling": st.integers(0, 2),
        "stem": st.sampled_from((32, 64)),
        "base": st.sampled_from((16, 32)),
        "classes": st.sampled_from((0, 3)),
        "inject": st.sampled_from(("add", "scale_shift")),
        "channels": st.integers(1, 3),
        "variance": st.booleans(),
        "heads": st.integers(0, 3),
        "new_order": st.booleans(),
    }
)


def chosen(choice: dict[str, Any]) -> tuple[UNetSpec, OpenAIOptions]:
    """A network of the family, with the options that its weights do not tell."""
    options, widths, base = FAMILY[choice["heads"]], choice["widths"], choice["base"]
    fixed, each = options.num_heads, options.num_head_channels or 1
    program = recipes.hourglass(
        widths,
        choice["blocks"],
        recipes.attention_at(sorted(choice["levels"]), lambda w: fixed or w // each),
        *RESAMPLING[choice["resampling"] if len(widths) > 1 else 0],
        middle=(Attn(fixed or widths[-1] // each),),
        stem=choice["stem"],
    )
    embedding = Embedding(
        base, 4 * base, 4 * base, sin_first=False, divide_last=True, classes=choice["classes"]
    )
    style = Style(inject=Inject(choice["inject"]), embedding=embedding)
    channels, factor = choice["channels"], 1 + choice["variance"]
    spec = UNetSpec(channels, channels * factor, program, style)
    return spec, replace(options.over(COMPLETE), use_new_attention_order=choice["new_order"])


def random_weights(spec: UNetSpec, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator) for k, s in net_shapes(spec).items()}


@settings(max_examples=25)
@given(choice=CHOICES, seed=st.integers(0, 99))
def test_every_network_of_the_family_comes_back(choice: dict[str, Any], seed: int) -> None:
    spec, options = chosen(choice)
    weights = random_weights(spec, seed)
    theirs = to_openai(spec, weights, options.use_new_attention_order is True)
    back = from_openai(theirs, options)
    assert back.spec == spec
    assert back.weights.keys() == weights.keys()
    assert all(torch.equal(back.weights[key], weights[key]) for key in weights)


# --- what cannot be written ---------------------------------------------------------------------


def base_spec() -> UNetSpec:
    return recipes.improved_family(32, (1, 2), 1, (1,))


def restyled(**changes: Any) -> UNetSpec:
    spec = base_spec()
    return replace(spec, style=replace(spec.style, **changes))


def reprogrammed(index: int, op: Op) -> UNetSpec:
    spec = base_spec()
    return replace(spec, program=(*spec.program[:index], op, *spec.program[index + 1 :]))


def test_the_base_of_these_refusals_can_be_written() -> None:
    assert to_openai(base_spec(), random_weights(base_spec(), 0))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (recipes.ddpm_family(32, (1, 2), 1, (1,)), "op 4 Down(by="),
        (recipes.text002(), "has no counterpart"),
        (recipes.naive(), "has no counterpart"),
        (restyled(eps=1e-6), "style.eps is 1e-06; OpenAI's UNetModel can only have 1e-05"),
        (restyled(skip_gain=0.5), "style.skip_gain is 0.5"),
        (restyled(embedding=Embedding(32, 128, 128)), "embedding.sin_first is True"),
        (base_spec().with_classes(3, True), 'no row for "no class"'),
        (replace(base_spec(), out_channels=5), "out.2.weight must have 3 rows"),
        (reprogrammed(7, LinearAttn()), "op 7 LinearAttn(heads=4"),
        (reprogrammed(7, Attn(2)), "Attn has [2, 4] heads, which is neither"),
        (reprogrammed(7, Attn(4, norm=False)), "layers.07_attn.norm"),
    ],
)
def test_what_the_peer_cannot_express_is_refused_by_name(spec: UNetSpec, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_openai(spec, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_complete_are_not_written() -> None:
    with pytest.raises(ConfigError, match=r"^embedding\.linear1\.weight is missing from the wei"):
        to_openai(base_spec(), {})

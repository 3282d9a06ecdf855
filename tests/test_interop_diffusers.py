"""diffusers' networks in and out: equal outputs, equal pictures, and no silent difference.

The installed diffusers is the oracle. Widths are shrunk, everything else is as published; every
parameter is random, biases and norms included, so that two that were swapped would show.
"""

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from undiffuse.denoiser import (
    Denoiser,
    Epsilon,
    FlowVelocity,
    KarrasPrecond,
    Prediction,
    Sample,
    Velocity,
)
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.guidance import clipped, with_label
from undiffuse.interop import _diffusers_folder
from undiffuse.interop._adapter import for_diffusers
from undiffuse.interop._diffusers import from_diffusers, to_diffusers
from undiffuse.interop._diffusers_folder import Pipeline, read_diffusers_folder, write_diffusers
from undiffuse.interop._diffusers_json import read_json
from undiffuse.interop._diffusers_schedulers import _BETA_SCHEDULERS
from undiffuse.interop._weights import Imported, mean_only
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    LinearBetas,
    NoiseLevel,
    ScaledLinearBetas,
    Schedule,
    Sigmoid,
    clean,
    uniform,
)
from undiffuse.oracles import Gaussian, gaussian_flow
from undiffuse.recipes import (
    adm_family,
    ddpm_family,
    ddpmpp_family,
    improved_family,
    lucidrains_family,
    preset,
    text000,
    text002,
    text003,
)
from undiffuse.sampling import ddim, ddpm, dpmpp_2m, finish
from undiffuse.spec import (
    Activation,
    Attn,
    Conv,
    Down,
    Downsampling,
    Join,
    Norm,
    Op,
    Order,
    Res,
    Resize,
    Skip,
    UNetSpec,
    Up,
    Upsampling,
)
from undiffuse.unet import UNet

# diffusers calls numpy.array on a torch tensor, whose __array__ lacks numpy 2's copy argument.
numpy_2 = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

DOWN, ATTN_DOWN, RES_DOWN = "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
UP, ATTN_UP, RES_UP = "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"
CIFAR = {
    "sample_size": 32,
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": [DOWN, ATTN_DOWN, DOWN, DOWN],
    "up_block_types": [UP, UP, ATTN_UP, UP],
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_num_groups": 4,
}
DDPM_256 = {
    **CIFAR,
    "sample_size": 256,
    "block_out_channels": [4, 4, 8, 8, 16, 16],
    "down_block_types": [DOWN, DOWN, DOWN, DOWN, ATTN_DOWN, DOWN],
    "up_block_types": [UP, ATTN_UP, UP, UP, UP, UP],
}
ADM_64 = {
    "sample_size": 64,
    "block_out_channels": [8, 16, 24, 32],
    "layers_per_block": 3,
    "num_class_embeds": 5,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 4,
    "norm_num_groups": 4,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "down_block_types": [RES_DOWN, ATTN_DOWN, ATTN_DOWN, ATTN_DOWN],
    "up_block_types": [ATTN_UP, ATTN_UP, ATTN_UP, RES_UP],
}
LSUN_256 = {
    "sample_size": 256,
    "block_out_channels": [4, 4, 8, 8, 16, 16],
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "down_block_types": [RES_DOWN] * 3 + [ATTN_DOWN] * 3,
    "up_block_types": [ATTN_UP] * 3 + [RES_UP] * 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"block_out_channels": [8, 16, 24, 32], "norm_num_groups": 4},
    "ddpm-cifar10-32": CIFAR,
    "ddpm-256": DDPM_256,
    "example script": {
        "sample_size": [64, 32],
        "block_out_channels": [8, 8, 16, 16, 32, 32],
        "down_block_types": [DOWN, DOWN, DOWN, DOWN, ATTN_DOWN, DOWN],
        "up_block_types": [UP, ATTN_UP, UP, UP, UP, UP],
        "norm_num_groups": 4,
    },
    "adm-64": ADM_64,
    "scale-shift without norm in the middle": {**ADM_64, "attn_norm_num_groups": None},
    "middle without attention": {**CIFAR, "add_attention": False},
    "no middle": {**CIFAR, "mid_block_type": None},
    "lsun-256": LSUN_256,
    "old names": {
        **CIFAR,
        "down_block_types": ["UNetRes" + DOWN, "UNetRes" + ATTN_DOWN, DOWN, DOWN],
    },
    "heads that leave channels over": {**CIFAR, "attention_head_dim": 5},
    "one level": {
        **CIFAR,
        "block_out_channels": [8],
        "down_block_types": [ATTN_DOWN],
        "up_block_types": [UP],
    },
    "learned variance": {**CIFAR, "out_channels": 6},
    "odd width, gelu, grey": {
        **CIFAR,
        "block_out_channels": [9, 18, 18, 18],
        "norm_num_groups": 3,
        "act_fn": "gelu",
        "in_channels": 1,
        "out_channels": 1,
        "time_embedding_dim": 20,
        "downsample_type": None,
        "_diffusers_version": "0.1.2",
    },
}
TIMES = torch.tensor([0.0, 431.7, 999.0], dtype=torch.float64)


def peer(config: Mapping[str, Any], seed: int = 0) -> UNet2DModel:
    """Their network with noise in every parameter; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UNet2DModel.from_config(config).eval()
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def random_weights(spec: UNetSpec, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = UNet(spec).state_dict()
        return {name: t + 0.1 * torch.randn_like(t) for name, t in state.items()}


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def labels_of(spec: UNetSpec, count: int) -> Tensor | None:
    return torch.arange(count) % spec.classes if spec.classes else None


def side_of(spec: UNetSpec) -> int:
    return max(8, spec.stride)


def check_parity(config: Mapping[str, Any], seed: int = 0) -> Imported:
    theirs = peer(config, seed)
    narrow = from_diffusers(config, theirs.state_dict())
    spec = narrow.spec
    side, label = side_of(spec), labels_of(spec, 3)
    x = normal(3, spec.in_channels, side, side, seed=seed + 1)
    with torch.no_grad():
        single = theirs(x.float(), TIMES.float(), label).sample
        ours_single = narrow.net()(x.float(), TIMES.float(), label)
        exact = theirs.double()(x, TIMES, label).sample
        wide = from_diffusers(config, theirs.state_dict())
        assert relative(wide.net()(x, TIMES, label), exact) <= 1e-12
    assert relative(ours_single, single) <= max(1e-6, 4 * relative(single, exact))
    return narrow


def changed(spec: UNetSpec, **fields: Any) -> UNetSpec:
    return replace(spec, style=replace(spec.style, **fields))


def embedded(spec: UNetSpec, **fields: Any) -> UNetSpec:
    return changed(spec, embedding=replace(spec.style.embedding, **fields))


def few_groups(spec: UNetSpec) -> UNetSpec:
    return changed(spec, groups=4)


# --- in: equal outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_equal(name: str) -> None:
    imported = check_parity(CONFIGS[name])
    assert imported.origin == "diffusers UNet2DModel"


def test_parity_would_see_the_missing_norm_in_the_middle() -> None:
    """Scale-shift without attn_norm_num_groups: a reader of the rest alone would add a norm."""
    config = {**ADM_64, "attn_norm_num_groups": None}
    spec = from_diffusers(config, peer(config).state_dict()).spec
    bare = [op for op in spec.program if isinstance(op, Attn) and not op.norm]
    assert len(bare) == 1


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any configuration that can be expressed, small."""
    levels = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    attn_groups = draw(st.sampled_from([None, groups]))
    channels = draw(st.integers(1, 3))
    types = st.lists(st.integers(0, 2), min_size=levels, max_size=levels)
    widths = st.lists(st.sampled_from([4, 8, 12]), min_size=levels, max_size=levels)
    return {
        "block_out_channels": draw(widths),
        "down_block_types": [(DOWN, ATTN_DOWN, RES_DOWN)[i] for i in draw(types)],
        "up_block_types": [(UP, ATTN_UP, RES_UP)[i] for i in draw(types)],
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2D", None])),
        "add_attention": draw(st.booleans()),
        "layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": groups,
        "attn_norm_num_groups": attn_groups,
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "attention_head_dim": draw(st.sampled_from([None, 1, 2, 3, 4])),
        "act_fn": draw(st.sampled_from(["silu", "swish", "gelu", "relu"])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "downsample_padding": draw(st.integers(0, 1)),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.integers(0, 1)),
        "time_embedding_dim": draw(st.sampled_from([None, 10])),
        "num_class_embeds": draw(st.sampled_from([None, 3])),
        "in_channels": channels,
        "out_channels": channels * draw(st.integers(1, 2)),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
    }


@settings(max_examples=20)
@given(config=configs(), seed=st.integers(0, 99))
def test_any_configuration_gives_equal_outputs_and_comes_back(
    config: dict[str, Any], seed: int
) -> None:
    imported = check_parity(config, seed)
    again = exported_and_read(imported)
    assert again.spec == imported.spec


def exported_and_read(imported: Imported) -> Imported:
    exported = to_diffusers(imported.spec, imported.schedule, imported.prediction, imported.size)
    rules = _diffusers_folder.diffusers_rules(imported.spec, exported.unet)
    theirs = _diffusers_folder.write_weights(rules, imported.weights)
    again = from_diffusers(exported.unet, theirs, exported.scheduler)
    for name, tensor in imported.weights.items():
        assert torch.equal(again.weights[name], tensor)
    return again


@pytest.mark.parametrize("name", CONFIGS)
def test_in_out_in_is_the_same_to_the_bit(name: str) -> None:
    config = CONFIGS[name]
    imported = from_diffusers(config, peer(config).state_dict())
    again = exported_and_read(imported)
    assert again.spec == imported.spec
    assert again.schedule == imported.schedule
    assert again.prediction == imported.prediction
    assert again.size == imported.size


@pytest.mark.parametrize("name", CONFIGS)
def test_out_gives_back_their_names_and_shapes(name: str) -> None:
    config = CONFIGS[name]
    theirs = peer(config)
    imported = from_diffusers(config, theirs.state_dict())
    exported = to_diffusers(imported.spec, imported.schedule, imported.prediction)
    with torch.device("meta"):
        rebuilt = UNet2DModel.from_config(exported.unet)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes


def test_names_of_attention_before_0_15() -> None:
    theirs = peer(CIFAR).state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(theirs)
    for new, name in old.items():
        renamed = {k.replace(f".{new}.", f".{name}."): v for k, v in renamed.items()}
    assert "mid_block.attentions.0.proj_attn.weight" in renamed
    expected = from_diffusers(CIFAR, theirs).weights
    found = from_diffusers(CIFAR, renamed).weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_is_kept() -> None:
    imported = from_diffusers(CIFAR, peer(CIFAR).half().state_dict())
    assert {tensor.dtype for tensor in imported.weights.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 274_056_163),
        (
            {**CIFAR, "block_out_channels": [128, 256, 256, 256], "norm_num_groups": 32},
            35_746_307,
        ),
        (
            {
                **DDPM_256,
                "block_out_channels": [128, 128, 256, 256, 512, 512],
                "norm_num_groups": 32,
            },
            113_673_219,
        ),
    ],
    ids=["default", "ddpm-cifar10-32", "ddpm-256"],
)
def test_full_size_counts(config: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        theirs = UNet2DModel.from_config(config)
    imported = from_diffusers(config, theirs.state_dict())
    assert sum(tensor.numel() for tensor in imported.weights.values()) == count


def test_a_learned_variance_is_left_out_of_the_mean() -> None:
    config = CONFIGS["learned variance"]
    theirs = peer(config).double()
    imported = from_diffusers(config, theirs.state_dict())
    x, mean = normal(3, 3, 8, 8), mean_only(imported)
    with torch.no_grad():
        assert relative(mean.net()(x, TIMES), theirs(x, TIMES).sample[:, :3]) <= 1e-12
    assert "learned variance" in imported.notes[-1]


# --- in: what is refused ------------------------------------------------------------------------

REFUSED: list[tuple[str, object]] = [
    ("time_embedding_type", "fourier"),
    ("time_embedding_type", "learned"),
    ("center_input_sample", True),
    ("mid_block_scale_factor", math.sqrt(2)),
    ("mid_block_type", "UNetMidBlock2DCrossAttn"),
    ("class_embed_type", "timestep"),
    ("class_embed_type", "identity"),
    ("num_class_embeds", 0),
    ("act_fn", "mish"),
    ("resnet_time_scale_shift", "spatial"),
    ("resnet_time_scale_shift", "ada_group"),
    ("downsample_type", "fir"),
    ("upsample_type", "pool"),
    ("downsample_padding", 2),
    ("freq_shift", 2),
    ("freq_shift", True),
    ("flip_sin_to_cos", 1),
    ("norm_num_groups", 3),
    ("norm_num_groups", None),
    ("attn_norm_num_groups", 2),
    ("attention_head_dim", 17),
    ("attention_head_dim", 2.0),
    ("norm_eps", math.inf),
    ("norm_eps", "1e-5"),
    ("layers_per_block", 0),
    ("layers_per_block", 10**9),
    ("block_out_channels", [8] * 17),
    ("dropout", 1.0),
    ("layers_per_block", [2, 2, 2, 2]),
    ("block_out_channels", [8, 16, 16]),
    ("block_out_channels", [8, 16, 16, "16"]),
    ("block_out_channels", [8, 16, 16, 2**16 + 1]),
    ("block_out_channels", [10**9] * 4),
    ("block_out_channels", []),
    ("block_out_channels", 8),
    ("down_block_types", [DOWN, DOWN, DOWN]),
    ("down_block_types", ["SkipDownBlock2D", ATTN_DOWN, DOWN, DOWN]),
    ("down_block_types", ["AttnSkipDownBlock2D", ATTN_DOWN, DOWN, DOWN]),
    ("down_block_types", ["KDownBlock2D", ATTN_DOWN, DOWN, DOWN]),
    ("down_block_types", ["CrossAttnDownBlock2D", ATTN_DOWN, DOWN, DOWN]),
    ("down_block_types", [UP, ATTN_DOWN, DOWN, DOWN]),
    ("up_block_types", [UP, UP, ATTN_UP, "SkipUpBlock2D"]),
    ("out_channels", 4),
    ("in_channels", 6),
    ("sample_size", [32]),
    ("sample_size", "32"),
    ("cross_attention_dim", 768),
    ("use_linear_projection", False),
    ("_class_name", "UNet2DConditionModel"),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_expressed_is_refused_by_name(field: str, value: object) -> None:
    theirs = peer(CIFAR).state_dict()
    with pytest.raises(CheckpointError) as caught:
        from_diffusers({**CIFAR, field: value}, theirs)
    message = str(caught.value)
    assert message.startswith("diffusers UNet2DModel: ")
    assert ("out_channels" if field == "in_channels" else field) in message
    assert "\n" not in message


def test_unknown_fields_without_a_meaning_are_no_obstacle() -> None:
    extra = {"_commit_hash": "abc", "new_thing": None, "num_train_timesteps": 4000, "decay": 0.9999}
    theirs = peer(CIFAR).state_dict()
    assert from_diffusers({**CIFAR, **extra}, theirs).spec == from_diffusers(CIFAR, theirs).spec


def test_weights_of_another_network_are_refused() -> None:
    theirs = peer(CIFAR).state_dict()
    with pytest.raises(CheckpointError, match=r"^mid_block\.attentions\.0\.group_norm\.bias is in"):
        from_diffusers({**CIFAR, "resnet_time_scale_shift": "scale_shift"}, widened(theirs))
    del theirs["conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"^conv_in\.bias is missing"):
        from_diffusers(CIFAR, theirs)


def widened(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With projections as scale-shift has them."""
    return {name: torch.cat([t, t]) if "time_emb_proj" in name else t for name, t in theirs.items()}


# --- schedulers ---------------------------------------------------------------------------------

MEANINGS: list[tuple[dict[str, Any], Schedule, Prediction]] = [
    ({}, LinearBetas(), Epsilon()),
    ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, LinearBetas(), Epsilon()),
    (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ScaledLinearBetas(1000, 0.00085, 0.012),
        Epsilon(),
    ),
    (
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
        Cosine(400),
        Epsilon(400),
    ),
    ({"prediction_type": "v_prediction"}, LinearBetas(), Velocity()),
    ({"prediction_type": "sample"}, LinearBetas(), Sample()),
    ({"_class_name": "HeunDiscreteScheduler"}, LinearBetas(1000, 0.00085, 0.012), Epsilon()),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf},
        LinearBetas(),
        Epsilon(),
    ),
    (
        {"_class_name": "EDMEulerScheduler", "sigma_max": 50.0},
        Karras(0.002, 50.0),
        KarrasPrecond(0.5),
    ),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, Flow(), FlowVelocity(1001)),
    # As the file of google/ddpm-cifar10-32 has it.
    (
        {
            "_class_name": "DDPMScheduler",
            "_diffusers_version": "0.1.1",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "clip_sample": True,
            "num_train_timesteps": 1000,
            "trained_betas": None,
            "variance_type": "fixed_large",
        },
        LinearBetas(),
        Epsilon(),
    ),
]


@pytest.mark.parametrize(("scheduler", "schedule", "prediction"), MEANINGS)
def test_schedulers_are_understood(
    scheduler: dict[str, Any], schedule: Schedule, prediction: Prediction
) -> None:
    imported = from_diffusers(CIFAR, peer(CIFAR).state_dict(), scheduler)
    assert imported.schedule == schedule
    assert imported.prediction == prediction


@numpy_2
@pytest.mark.parametrize(
    "make",
    [
        *(DDPMScheduler, DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler),
        *(EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler),
        *(UniPCMultistepScheduler, DPMSolverSinglestepScheduler, DEISMultistepScheduler),
        *(EDMEulerScheduler, FlowMatchEulerDiscreteScheduler),
    ],
)
def test_every_scheduler_as_it_saves_itself(make: type, tmp_path: Path) -> None:
    """Each field that they write is known, and defaults are theirs."""
    make().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    theirs = peer(CIFAR).state_dict()
    imported = from_diffusers(CIFAR, theirs, saved)
    bare = from_diffusers(CIFAR, theirs, {"_class_name": make.__name__})
    assert (imported.schedule, imported.prediction) == (bare.schedule, bare.prediction)


def test_default_betas_are_those_of_each_class() -> None:
    for name, betas in _BETA_SCHEDULERS.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert (parameters["beta_start"].default, parameters["beta_end"].default) == betas


REFUSED_SCHEDULERS: list[tuple[dict[str, Any], str]] = [
    ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
    ({"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas=[0.1, 0.2]"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
    ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type"),
    ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler"),
    ({"_class_name": "CMStochasticIterativeScheduler"}, "CMStochasticIterativeScheduler"),
    ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
    (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
        "invert_sigmas=True",
    ),
    ({"num_train_timesteps": 1}, "num_train_timesteps=1"),
    ({"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000"),
    ({"beta_start": 0.1}, "LinearBetas needs"),
    ({"predict_epsilon": False}, "predict_epsilon=False"),
    ({"_class_name": "EDMEulerScheduler", "sigma_data": 0}, "sigma_data must be above 0"),
    ({"beta_end": "0.02"}, "beta_end='0.02'"),
    ({"something_new": 1}, "something_new=1"),
    ({"clip_sample_range": 0}, "clip_sample_range=0"),
    ({"clip_sample_range": -2.0}, "clip_sample_range=-2.0"),
]


@pytest.mark.parametrize(("scheduler", "named"), REFUSED_SCHEDULERS, ids=lambda value: str(value))
def test_schedulers_that_are_refused(scheduler: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_diffusers(CIFAR, peer(CIFAR).state_dict(), scheduler)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("scheduler", "note"),
    [
        (None, "no scheduler is given"),
        (
            {"_class_name": "DDIMScheduler", "clip_sample_range": 2},
            "(their use_clipped_model_output=True)",
        ),
        ({"clip_sample_range": 2.5}, "clipped(denoise, -2.5, 2.5)"),
        ({"thresholding": True}, "thresholding"),
        ({"clip_sample": False, "variance_type": "fixed_large"}, "variance_type='fixed_large'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "shift=3"),
    ],
)
def test_notes_say_what_a_sampler_must_do(scheduler: dict[str, Any] | None, note: str) -> None:
    imported = from_diffusers(CIFAR, peer(CIFAR).state_dict(), scheduler)
    assert len(imported.notes) == 1
    assert note in imported.notes[0]


@pytest.mark.parametrize(
    "scheduler",
    [{"clip_sample": False}, {}, {"_class_name": "DDIMScheduler", "clip_sample_range": 1}],
)
def test_nothing_is_noted_where_nothing_is_left_out(scheduler: dict[str, Any]) -> None:
    """Clipping to [-1, 1] is what generation does here anyway."""
    imported = from_diffusers(CIFAR, peer(CIFAR).state_dict(), scheduler)
    assert imported.notes == ()


# --- in: equal pictures -------------------------------------------------------------------------

SAMPLED = {**CIFAR, "sample_size": 8}
SHAPE = (2, 3, 8, 8)


def exact(scheduler: Any) -> Any:
    """Their scheduler with its table in float64 instead of float32."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.betas = betas
    scheduler.alphas = 1 - betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def levels_of(timesteps: Tensor, schedule: Schedule | None = None) -> tuple[NoiseLevel, ...]:
    grid = (schedule or LinearBetas())(timesteps.double() / 999)
    return (*(NoiseLevel(*values) for values in zip(*grid, strict=True)), clean())


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_an_imported_ddpm_makes_the_pictures_of_their_pipeline() -> None:
    theirs = peer(SAMPLED).double()
    pipe = quiet(DDPMPipeline(theirs, exact(DDPMScheduler())))
    generator = torch.Generator().manual_seed(5)
    wanted = pipe(2, generator, num_inference_steps=20, output_type="pt").images
    imported = from_diffusers(SAMPLED, theirs.state_dict(), dict(pipe.scheduler.config))
    same = torch.Generator().manual_seed(5)

    def draw(_: int) -> Tensor:
        return torch.randn(SHAPE, dtype=torch.float64, generator=same)

    denoise = clipped(with_label(imported.denoiser(), None))
    with torch.no_grad():
        steps = ddpm(denoise, draw(0), levels_of(pipe.scheduler.timesteps), noise=draw)
        found = (finish(steps) / 2 + 0.5).clamp(0, 1)
    assert wanted.std() > 0.1
    assert float((found - wanted).abs().max()) <= 1e-8


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_imported_ddim_makes_the_pictures_of_their_pipeline(kind: str) -> None:
    theirs = peer(SAMPLED).double()
    pipe = quiet(DDIMPipeline(theirs, DDIMScheduler(prediction_type=kind, clip_sample=False)))
    exact(pipe.scheduler)  # the pipeline has made one of its own
    generator = torch.Generator().manual_seed(5)
    wanted = pipe(2, generator, num_inference_steps=15, output_type="pt").images
    imported = from_diffusers(SAMPLED, theirs.state_dict(), dict(pipe.scheduler.config))
    same = torch.Generator().manual_seed(5)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=same)
    with torch.no_grad():
        denoise = with_label(imported.denoiser(), None)
        last = finish(ddim(denoise, x, levels_of(pipe.scheduler.timesteps)))
    assert float(((last / 2 + 0.5).clamp(0, 1) - wanted).abs().max()) <= 1e-8


def run_scheduler(
    scheduler: Any, net: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int
) -> Tensor:
    """Their usual loop."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


@pytest.mark.parametrize(
    "make", [EDMEulerScheduler, FlowMatchEulerDiscreteScheduler], ids=["edm", "flow"]
)
def test_imported_edm_and_flow_networks_make_the_same_pictures(make: type) -> None:
    """Their schedulers are float32, so the pictures are."""
    theirs, scheduler = peer(SAMPLED), make()
    imported = from_diffusers(
        SAMPLED, theirs.state_dict(), {**scheduler.config, "_class_name": make.__name__}
    )
    if make is FlowMatchEulerDiscreteScheduler:
        scheduler.init_noise_sigma = 1.0
        scheduler.scale_model_input = lambda x, t: x
    noise = normal(*SHAPE).float()
    with torch.no_grad():
        wanted = run_scheduler(
            scheduler, lambda x, t: theirs(x, t.expand(2)).sample, noise, steps=8
        )
        sigmas = scheduler.sigmas[:-1].double()
        ratios = sigmas if make is EDMEulerScheduler else sigmas / (1 - sigmas)
        grid = imported.schedule.at(ratios)
        levels = (*(NoiseLevel(*values) for values in zip(*grid, strict=True)), clean())
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        found = finish(ddim(with_label(imported.denoiser(), None), x, levels))
    assert relative(found, wanted) <= 2e-5


# --- out: equal outputs -------------------------------------------------------------------------

OURS: dict[str, UNetSpec] = {
    "tiny": few_groups(ddpm_family(8, (1, 2, 2), 1, (1, 2))),
    "light": few_groups(ddpm_family(8, (1, 2, 2, 2), 2, (2,))),
    "ddpm": few_groups(ddpm_family(8, (1, 2, 2, 2), 2, (1,), dropout=0.1)),
    "highres": few_groups(ddpm_family(4, (1, 1, 2, 2, 4, 4), 2, (4,))),
    "improved": few_groups(improved_family(8, (1, 2, 2, 2), 3, (1, 2))),
    "adm-64": adm_family(64, (1, 2, 3, 4), 1, (1, 2, 3)),
    "classes": few_groups(ddpm_family(8, (1, 2), 1, (1,))).with_classes(3, null=False),
    "classes and none": few_groups(ddpm_family(8, (1, 2), 1, (1,))).with_classes(3, null=True),
    "grey": few_groups(ddpm_family(8, (1, 2), 1, (1,), channels=1)),
}


def written(folder: Path, spec: UNetSpec, pipeline: Pipeline | None = None) -> dict[str, Tensor]:
    weights = random_weights(spec)
    size = (spec.stride * 2, spec.stride * 2)
    write_diffusers(folder, spec, weights, LinearBetas(), Epsilon(), size, pipeline)
    return weights


def doubled(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


@pytest.mark.parametrize("name", OURS)
def test_our_networks_give_the_same_outputs_there(name: str, tmp_path: Path) -> None:
    spec = OURS[name]
    weights = doubled(written(tmp_path / "net", spec))
    theirs = UNet2DModel.from_pretrained(tmp_path / "net").double()
    label = labels_of(spec, 3)
    x = normal(3, spec.in_channels, side_of(spec), side_of(spec))
    with torch.no_grad():
        wanted = theirs(x, TIMES, label).sample
        found, rounded = (
            ours_with(one, weights)(x, TIMES, label)
            for one in (spec, embedded(spec, divide_last=False))
        )
    assert relative(found, wanted) <= 1e-12
    assert relative(rounded, wanted) <= 1e-4  # frequencies rounded otherwise in their last bit


def ours_with(spec: UNetSpec, weights: Mapping[str, Tensor]) -> UNet:
    return Imported(spec, weights, LinearBetas(), Epsilon(), "test").net()


def test_no_class_is_the_last_class_there(tmp_path: Path) -> None:
    spec = embedded(OURS["classes and none"], divide_last=True)
    weights = doubled(written(tmp_path / "net", spec))
    theirs = UNet2DModel.from_pretrained(tmp_path / "net").double()
    assert theirs.config.num_class_embeds == 4
    x = normal(3, 3, 8, 8)
    with torch.no_grad():
        wanted = theirs(x, TIMES, torch.full((3,), 3)).sample
        assert relative(ours_with(spec, weights)(x, TIMES, None), wanted) <= 1e-12
    exported = to_diffusers(spec, LinearBetas(), Epsilon())
    assert 'class_labels 3, the last, is "no class"' in exported.notes[0]


def test_the_rounding_of_the_frequencies_is_noted_only_where_it_differs() -> None:
    # a width of no power of two: dividing by one of those rounds nothing
    spec = embedded(ddpm_family(96, (1, 2), 1, ()), divide_last=False)
    notes = to_diffusers(spec, LinearBetas(), Epsilon()).notes
    assert any("rounds the frequencies" in note for note in notes)
    same = to_diffusers(embedded(spec, divide_last=True), LinearBetas(), Epsilon()).notes
    assert not any("rounds" in note for note in same)


@pytest.mark.parametrize("name", ["tiny", "light", "ddpm", "highres", "adm-64"])
def test_presets_at_full_width_are_expressible(name: str) -> None:
    spec = preset(name)
    exported = to_diffusers(spec, LinearBetas(), Epsilon())
    with torch.device("meta"):
        theirs = UNet2DModel.from_config(exported.unet)
        ours = UNet(spec)
    count = sum(p.numel() for p in ours.parameters())
    assert sum(p.numel() for p in theirs.parameters()) == count


def with_op(spec: UNetSpec, index: int, *ops: Op) -> UNetSpec:
    program = spec.program
    return replace(spec, program=(*program[:index], *ops, *program[index + 1 :]))


def place(spec: UNetSpec, kind: type) -> int:
    return next(i for i, op in enumerate(spec.program) if isinstance(op, kind))


TINY = OURS["tiny"]
HERE = {kind: place(TINY, kind) for kind in (Attn, Down, Up, Res, Conv)}
LAST = len(TINY.program) - 1
REFUSED_SPECS: list[tuple[UNetSpec, str]] = [
    (changed(TINY, skip_gain=0.5**0.5), r"^style\.skip_gain is 0\.707"),
    (changed(TINY, norm=Norm.RMS), r"^style\.norm is rms"),
    (changed(TINY, order=Order.CONV_ACT_NORM), r"^style\.order is conv_act_norm"),
    (
        changed(TINY, groups=16),
        r"^style\.groups gives norms of 8 for 8 channels and 16 for 32 channels",
    ),
    (embedded(TINY, width=16), r"^embedding\.width is 16"),
    (embedded(TINY, out=16), r"^embedding\.out is 16"),
    (embedded(TINY, activation=Activation.GELU), r"^embedding\.activation is gelu"),
    (embedded(TINY, final_activation=None), r"^embedding\.final_activation is None"),
    (changed(TINY, activation=Activation.GELU), r"^embedding\.final_activation is silu"),
    (
        embedded(TINY.with_classes(3, null=False), label_first=True),
        r"^embedding\.label_first is True",
    ),
    (with_op(TINY, HERE[Attn], Attn(memory=4)), rf"^op {HERE[Attn]} Attn: memory 4"),
    (
        with_op(TINY, HERE[Attn], Attn(head_width=32)),
        rf"^op {HERE[Attn]} Attn: head_width 32; UNet2DModel has at most the 16 channels",
    ),
    (with_op(TINY, HERE[Attn], Attn(bias=False)), rf"^op {HERE[Attn]} Attn: bias False"),
    (with_op(TINY, HERE[Attn], Attn(2)), r"^op \d+ Attn: heads of 16 channels, but of 8"),
    (
        with_op(TINY, HERE[Attn], Attn(norm=False)),
        rf"^op {HERE[Attn]} is Attn\(heads=1, norm=False.*can only have Attn\(heads=1, norm=True",
    ),
    (
        with_op(TINY, HERE[Down], Down(Downsampling.AVG)),
        rf"^op {HERE[Down]} Down: by avg; UNet2DModel has conv or conv_end",
    ),
    (with_op(TINY, HERE[Down], Down(Downsampling.CONV)), r"^op \d+ Down: by conv_end after one"),
    (
        with_op(TINY, HERE[Up], Up(Upsampling.NEAREST)),
        rf"^op {HERE[Up]} Up: by nearest; UNet2DModel has only nearest_conv",
    ),
    (
        with_op(TINY, HERE[Up], Up(Upsampling.NEAREST_CONV, 8)),
        rf"^op {HERE[Up]} is Up\(.*width=8\); UNet2DModel can only have Up",
    ),
    (with_op(TINY, 0, Conv(8, 5)), r"^op 0 is Conv\(width=8, kernel=5\); UNet2DModel can only"),
    (with_op(TINY, LAST, replace(TINY.program[-1], kernel=1)), rf"^op {LAST} is Out\(kernel=1"),
    (with_op(TINY, LAST, replace(TINY.program[-1], norm=False)), rf"^op {LAST} is Out\(kernel=3"),
    (
        few_groups(ddpmpp_family(8, (1, 2), 1, (1,))),
        r"^op \d+ is Concat\(.*; UNet2DModel can only have Attn\(",
    ),
    (lucidrains_family(8, (1, 2)), r"^op \d+ Down: by unshuffle; UNet2DModel has conv or conv_end"),
    (text000(), r"^op \d+ Down: by max"),
    (text002(), r"^op \d+ Down: by conv4"),
    (text003(), r"^op \d+: its level has no Res"),
    (
        changed(preset("tiny"), groups=32, group_width=4),
        r"^style\.groups gives norms of 8 for 32 channels and 16 for 64",
    ),
    (preset("naive"), r"^op 0: its level has no Res"),
    (preset("improved"), r"^op \d+ Attn: heads of 128 channels, but of 96 at op \d+"),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED_SPECS)
def test_what_they_have_no_word_for_is_refused_by_its_place(spec: UNetSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_diffusers(spec, LinearBetas(), Epsilon())


def hourglass_with(middle: tuple[Op, ...], blocks: tuple[int, int] = (1, 1)) -> UNetSpec:
    """Two levels of width 8 with that many residual blocks and that middle."""
    from undiffuse.spec import Concat, Out

    def level(count: int) -> list[Op]:
        return [op for _ in range(count) for op in (Res(8), Skip())]

    def back(count: int) -> list[Op]:
        return [op for _ in range(count + 1) for op in (Concat(), Res(8))]

    program = (
        *(Conv(8), Skip(), *level(blocks[0]), Down(), Skip(), *level(blocks[1])),
        *middle,
        *(*back(blocks[1]), Up(), *back(blocks[0]), Out()),
    )
    return embedded(UNetSpec(3, 3, program), width=8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (hourglass_with((Res(8), Res(8), Res(8))), r"^op 8 and on, the bottleneck, is Res, Res"),
        (hourglass_with((Attn(),)), r"the bottleneck, is Attn;"),
        (
            hourglass_with((Res(8), Attn(norm=False), Res(8))),
            r"^style\.inject is add; UNet2DModel can only have scale_shift here",
        ),
        (
            hourglass_with((Res(8), Res(8)), blocks=(1, 2)),
            r"^op 6 Res: its level has 2, the first 1; UNet2DModel has one layers_per_block",
        ),
    ],
)
def test_other_shapes_are_refused(spec: UNetSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_diffusers(spec, LinearBetas(), Epsilon())


def test_addition_instead_of_concatenation_is_refused() -> None:
    from undiffuse.spec import Concat

    spec = hourglass_with((Res(8), Res(8)))
    added = tuple(Concat(Join.ADD) if isinstance(op, Concat) else op for op in spec.program)
    with pytest.raises(ConfigError, match=r"is Concat\(by=.*UNet2DModel can only have Concat"):
        to_diffusers(replace(spec, program=added), LinearBetas(), Epsilon())


def test_two_ways_to_resample_beside_attention_are_refused() -> None:
    spec = adm_family(64, (1, 1, 1), 1, (0, 1, 2))
    index = next(i for i, op in enumerate(spec.program) if op == Res(64, Resize.DOWN))
    with pytest.raises(
        ConfigError,
        match=r"^ops from \d+ and from \d+, .*in conv and resnet; UNet2DModel has one down",
    ):
        to_diffusers(with_op(spec, index, Down()), LinearBetas(), Epsilon())


def test_a_shortcut_where_they_have_none_is_refused() -> None:
    spec = changed(OURS["adm-64"], project_resized=True)
    with pytest.raises(ConfigError, match=r"^style\.project_resized is True"):
        to_diffusers(spec, LinearBetas(), Epsilon())


@pytest.mark.parametrize(
    ("schedule", "prediction", "message"),
    [
        (Karras(), Epsilon(), r"^schedule Karras: diffusers has"),
        (Flow(), Velocity(), r"^schedule Flow: diffusers has"),
        (Sigmoid(), Velocity(), r"^schedule Sigmoid: diffusers has"),
        (Cosine(offset=0.01), Epsilon(), r"^schedule Cosine\(steps=1000, offset=0\.01"),
        (LinearBetas(), KarrasPrecond(), r"^prediction KarrasPrecond"),
        (LinearBetas(), FlowVelocity(), r"^prediction FlowVelocity"),
        (LinearBetas(400), Epsilon(), r"^prediction Epsilon\(steps=1000.*\(steps=400\)"),
        (LinearBetas(), Epsilon(1000, 0.25), r"^prediction Epsilon\(steps=1000, timestep_scale="),
    ],
)
def test_processes_they_do_not_have_are_refused(
    schedule: Schedule, prediction: Prediction, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        to_diffusers(TINY, schedule, prediction)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (LinearBetas(500, 2e-4, 0.04), Velocity(500)),
        (ScaledLinearBetas(), Sample()),
        (Cosine(400), Epsilon(400)),
        (Karras(0.01, 50.0), KarrasPrecond(0.4)),
        (Flow(), FlowVelocity(1000)),
    ],
)
def test_processes_come_back(schedule: Schedule, prediction: Prediction) -> None:
    exported = to_diffusers(TINY, schedule, prediction)
    again = from_diffusers(CIFAR, peer(CIFAR).state_dict(), exported.scheduler)
    assert again.schedule == schedule
    assert again.prediction == prediction


def test_a_size_that_they_cannot_halve_is_refused() -> None:
    with pytest.raises(ConfigError, match="size 28x30: UNet2DModel takes multiples of 4"):
        to_diffusers(TINY, LinearBetas(), Epsilon(), (28, 30))


# --- folders ------------------------------------------------------------------------------------


def read(folder: Path) -> Imported:
    return read_diffusers_folder(folder, read_file)


def read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", Pipeline)
def test_their_pipelines_read_what_is_written(kind: Pipeline, tmp_path: Path) -> None:
    spec = embedded(OURS["tiny"], divide_last=True)
    weights = doubled(written(tmp_path / "net", spec, kind))
    make = {Pipeline.DDPM: DDPMPipeline, Pipeline.DDIM: DDIMPipeline}[kind]
    pipe = quiet(make.from_pretrained(tmp_path / "net"))
    pipe.unet.double()
    exact(pipe.scheduler)
    assert type(pipe.scheduler).__name__ == kind.value.replace("Pipeline", "Scheduler")
    generator = torch.Generator().manual_seed(5)
    # Ours goes on with the noise of the clipped estimate.
    options = {} if kind is Pipeline.DDPM else {"use_clipped_model_output": True}
    wanted = pipe(2, generator, num_inference_steps=10, output_type="pt", **options).images
    same = torch.Generator().manual_seed(5)

    def draw(_: int) -> Tensor:
        return torch.randn(SHAPE, dtype=torch.float64, generator=same)

    denoise = clipped(
        with_label(Denoiser(ours_with(spec, weights), LinearBetas(), Epsilon()), None)
    )
    eta = 1.0 if kind is Pipeline.DDPM else 0.0
    with torch.no_grad():
        grid = levels_of(pipe.scheduler.timesteps)
        found = finish(ddim(denoise, draw(0), grid, noise=draw, eta=eta))
    assert wanted.std() > 0.1
    assert float(((found / 2 + 0.5).clamp(0, 1) - wanted).abs().max()) <= 1e-8


@pytest.mark.parametrize("kind", [None, *Pipeline])
def test_what_is_written_is_read_back_to_the_bit(kind: Pipeline | None, tmp_path: Path) -> None:
    weights = written(tmp_path / "net", TINY, kind)
    imported = read(tmp_path / "net")
    assert imported.spec == embedded(changed(TINY, zero_init=False), divide_last=True)
    assert imported.size == (8, 8)
    assert imported.schedule == LinearBetas()
    assert imported.weights.keys() == weights.keys()
    assert all(torch.equal(imported.weights[name], weights[name]) for name in weights)


def test_their_folders_are_read(tmp_path: Path) -> None:
    theirs = peer(SAMPLED)
    DDPMPipeline(theirs, DDPMScheduler(beta_end=0.03)).save_pretrained(tmp_path)
    imported = read(tmp_path)
    expected = from_diffusers(SAMPLED, theirs.state_dict()).weights
    assert imported.schedule == LinearBetas(last=0.03)
    assert all(torch.equal(imported.weights[name], expected[name]) for name in expected)
    alone = read(tmp_path / "unet")
    assert "no scheduler is given" in alone.notes[0]


def test_shards_and_variants_are_read(tmp_path: Path) -> None:
    theirs = peer(SAMPLED)
    expected = from_diffusers(SAMPLED, theirs.state_dict()).weights
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    found = read(tmp_path / "shards").weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    theirs.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors").exists()
    half = read(tmp_path / "half").weights
    assert all(torch.equal(half[name], expected[name].half()) for name in expected)


def test_a_pipe_as_configuration_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is no ordinary file"):
        read_json(tmp_path / "config.json")


def test_weights_with_names_of_any_length_make_a_short_line() -> None:
    with pytest.raises(CheckpointError, match="is in the file, but") as caught:
        from_diffusers(CIFAR, peer(CIFAR).state_dict() | {"x" * 100_000: torch.ones(1)})
    assert len(str(caught.value)) < 1000


def test_torch_files_and_the_flat_layout_are_read(tmp_path: Path) -> None:
    """As the oldest repositories have it: everything in one folder."""
    theirs = peer(SAMPLED)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    DDIMScheduler(beta_end=0.03).save_pretrained(tmp_path)
    index = {"_class_name": "DDIMPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    index["unet"] = ["diffusers", "UNet2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert (tmp_path / "diffusion_pytorch_model.bin").exists()
    assert read(tmp_path).schedule == LinearBetas(last=0.03)


def test_averaged_weights_go_first(tmp_path: Path) -> None:
    peer(SAMPLED, seed=1).save_pretrained(tmp_path / "unet")
    averaged = peer(SAMPLED, seed=2)
    averaged.register_to_config(decay=0.9999, use_ema_warmup=True, optimization_step=7)
    averaged.save_pretrained(tmp_path / "unet_ema")
    imported = read(tmp_path)
    wanted = averaged.state_dict()["conv_in.weight"]
    assert torch.equal(imported.weights["layers.00_conv.weight"], wanted)
    assert imported.notes[0] == "weights are the averaged ones of unet_ema/"


Damage = Callable[[Path], object]


def overwrite(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


UNET, INDEX = "unet/config.json", "model_index.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(UNET), r"config\.json of a UNet2DModel is missing"),
        (remove("unet/diffusion_pytorch_model.safetensors"), "the weights are missing; there is"),
        (remove("scheduler/scheduler_config.json"), r"scheduler_config\.json is missing"),
        (overwrite(UNET, "{"), r"config\.json is no JSON: "),
        (overwrite(UNET, "[]"), r"config\.json must hold a JSON object; got \[\]"),
        (overwrite(UNET, '{"act_fn": "silu", "act_fn": "relu"}'), "'act_fn' is there twice"),
        (overwrite(UNET, "[" * 100_000), r"config\.json is no JSON: "),
        (overwrite(UNET, " " * (2**24 + 1)), "has more than 16777216 bytes"),
        (overwrite(UNET, '{"_class_name": "VQModel"}'), "_class_name is 'VQModel'"),
        (overwrite(INDEX, "nonsense"), r"model_index\.json is no JSON"),
        (
            overwrite(INDEX, '{"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}'),
            "_class_name is 'LDMPipeline', a pipeline with vqvae",
        ),
        (
            overwrite(INDEX, '{"unet": ["diffusers", "UNet2DConditionModel"]}'),
            "only a UNet2DModel is read",
        ),
        (
            overwrite("scheduler/scheduler_config.json", '{"_class_name": "KarrasVeScheduler"}'),
            "_class_name is 'KarrasVeScheduler'",
        ),
    ],
)
def test_damaged_folders(damage: Damage, message: str, tmp_path: Path) -> None:
    written(tmp_path / "net", TINY, Pipeline.DDPM)
    damage(tmp_path / "net")
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path / "net")
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        read(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is missing, here and in unet/"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "conv_in.bias": "../outside.safetensors"}, "is no name of a file"),
        (lambda m: {**m, "conv_in.bias": ".."}, "is no name of a file"),
        (lambda m: {**m, "conv_in.bias": ""}, "is no name of a file"),
        (lambda m: {**m, "conv_in.bias": 7}, "is no name of a file"),
        (lambda m: {**m, "conv_in.bias": "gone.safetensors"}, r"gone\.safetensors is missing"),
        (lambda m: {**m, "ghost": m["conv_in.bias"]}, "ghost is not in"),
        (lambda m: {k: v for k, v in m.items() if k != "conv_in.bias"}, "does not say that"),
        (lambda m: {}, "weight_map must be an object"),
    ],
)
def test_damaged_shards(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    peer(SAMPLED).save_pretrained(tmp_path, max_shard_size="50KB")
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": OURS["classes"]}, "3 classes, and DDPMPipeline passes no labels"),
        ({"size": None}, "no size, and DDPMPipeline needs one"),
        ({"spec": replace(TINY, out_channels=6)}, "6 channels out of 3: use `mean_only`"),
        (
            {"schedule": Karras(), "prediction": KarrasPrecond()},
            "a EDMEulerScheduler, whose input DDPMPipeline does not scale",
        ),
    ],
)
def test_what_a_pipeline_cannot_run(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {
        "spec": TINY,
        "schedule": LinearBetas(),
        "prediction": Epsilon(),
        "size": (8, 8),
        "pipeline": Pipeline.DDPM,
        **changes,
    }
    weights = random_weights(arguments["spec"])
    with pytest.raises(ConfigError, match=message):
        write_diffusers(tmp_path / "net", weights=weights, **arguments)
    assert list(tmp_path.iterdir()) == []
    write_diffusers(tmp_path / "net", weights=weights, **{**arguments, "pipeline": None})
    assert read(tmp_path / "net").schedule == arguments["schedule"]


def test_a_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_diffusers_folder, "save_file", full)
        with pytest.raises(ResourceError, match="No space left on device"):
            written(tmp_path / "net", TINY, Pipeline.DDPM)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "net").mkdir()  # an empty one will do
    written(tmp_path / "net", TINY, Pipeline.DDPM)
    before = sorted(path.name for path in (tmp_path / "net").iterdir())
    assert before == ["model_index.json", "scheduler", "unet"]
    with pytest.raises(ConfigError, match="is not empty"):
        written(tmp_path / "net", TINY)
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_file_in_the_way_and_a_missing_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no folder"):
        written(tmp_path / "file", TINY)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ResourceError, match="cannot be written: No such file"):
        written(tmp_path / "no" / "net", TINY)


def test_weights_of_another_spec_are_not_written(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    del weights["embedding.linear1.bias"]
    with pytest.raises(ConfigError, match=r"^weights: embedding\.linear1\.bias has shape None"):
        write_diffusers(tmp_path / "net", TINY, weights, LinearBetas(), Epsilon())
    assert list(tmp_path.iterdir()) == []


def test_files_are_read_by_the_function_that_is_passed(tmp_path: Path) -> None:
    written(tmp_path / "net", TINY)
    seen: list[Path] = []

    def spy(path: Path) -> dict[str, Tensor]:
        seen.append(path)
        return load_file(path)

    read_diffusers_folder(tmp_path / "net", spy)
    assert seen == [tmp_path / "net" / "diffusion_pytorch_model.safetensors"]
    save_file(load_file(seen[0]), tmp_path / "net" / "diffusion_pytorch_model.fp16.safetensors")
    read_diffusers_folder(tmp_path / "net", spy)
    assert seen[1] == seen[0]


# --- our denoisers in their loops ---------------------------------------------------------------

DATA = Gaussian.from_covariance(
    0.3 * normal(3, 8, 8, seed=1),
    torch.diag(torch.linspace(0.05, 1.5, 192, dtype=torch.float64)),
)


def adapted(scheduler: Any, denoise: Any = DATA, **options: Any) -> Callable[..., Tensor]:
    unet = for_diffusers(denoise, scheduler, channels=3, size=(8, 8), **options)
    return lambda x, t: unet(x, t).sample


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_oracle_in_ddim_walks_as_in_ours(kind: str) -> None:
    scheduler = exact(DDIMScheduler(prediction_type=kind, clip_sample=False))
    found = run_scheduler(scheduler, adapted(scheduler), normal(*SHAPE), 20)
    wanted = finish(ddim(with_label(DATA, None), normal(*SHAPE), levels_of(scheduler.timesteps)))
    assert relative(found, wanted) <= 1e-9


def own_schedules() -> list[tuple[Schedule, Prediction]]:
    return [
        (LinearBetas(), Epsilon()),
        (Cosine(), Velocity()),
        (Karras(), KarrasPrecond()),
        (Flow(), FlowVelocity()),
    ]


def answer_of(schedule: Schedule, prediction: Prediction) -> Denoiser:
    """A network of that schedule and prediction that answers exactly.

    It only gets what networks get, a scaled x and c_noise; it looks the level up by c_noise.
    """
    grid = schedule(torch.linspace(0, 1, 20_001, dtype=torch.float64))
    noises = prediction(grid).c_noise

    def net(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        place = torch.searchsorted(noises, timestep[:1].double()).clamp(1, 20_000)
        low, high = noises[place - 1], noises[place]
        weight = (timestep[:1].double() - low) / (high - low)
        log_ratio = torch.lerp(grid.ratio[place - 1].log(), grid.ratio[place].log(), weight)
        level = NoiseLevel(*(value[0] for value in schedule.at(log_ratio.exp())))
        k = prediction(level)
        return (DATA(x / k.c_in, level) - k.c_skip * (x / k.c_in)) / k.c_out

    return Denoiser(net, schedule, prediction)


@pytest.mark.parametrize(("schedule", "prediction"), own_schedules())
def test_networks_of_other_schedules_answer_in_ddim(
    schedule: Schedule, prediction: Prediction
) -> None:
    """Levels between timesteps 25 and 975, which all four schedules have."""
    scheduler = exact(DDIMScheduler(clip_sample=False))
    scheduler.set_timesteps(20)
    unet = adapted(scheduler, answer_of(schedule, prediction))
    plain = adapted(scheduler)
    x = normal(*SHAPE)
    for t in (25, 400, 900, 975):
        assert relative(unet(x, t), plain(x, t)) <= 1e-4


def exact_end(scheduler: Any, noise: Tensor) -> Tensor:
    """Where the probability flow takes the scheduler's first x."""
    ratio = scheduler.sigmas[0].double()
    alpha = (1 + ratio**2).rsqrt()
    return gaussian_flow(DATA, noise, NoiseLevel(alpha, ratio * alpha, ratio), clean())


def karras(make: Any, **options: Any) -> Any:
    return make(use_karras_sigmas=True, **options)


SOLVERS: dict[str, tuple[Callable[[], Any], int, float]] = {
    "dpm-solver++ 2M": (DPMSolverMultistepScheduler, 60, 2e-2),
    "dpm-solver++ 2M v": (
        lambda: DPMSolverMultistepScheduler(prediction_type="v_prediction"),
        60,
        2e-2,
    ),
    "dpm-solver++ 2M karras": (lambda: karras(DPMSolverMultistepScheduler), 30, 2e-2),
    "dpm-solver++ 2S": (
        lambda: DPMSolverSinglestepScheduler(lower_order_final=True),
        60,
        2e-2,
    ),
    "unipc": (UniPCMultistepScheduler, 60, 2e-2),
    "euler": (EulerDiscreteScheduler, 400, 2e-2),
    "euler karras": (lambda: karras(EulerDiscreteScheduler), 200, 2e-2),
    "euler karras v": (
        lambda: karras(EulerDiscreteScheduler, prediction_type="v_prediction"),
        200,
        2e-2,
    ),
    "heun": (lambda: HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02), 60, 2e-2),
    "lms": (LMSDiscreteScheduler, 100, 2e-2),
}


@numpy_2
@pytest.mark.parametrize("name", SOLVERS)
def test_an_oracle_in_their_solvers_ends_where_the_flow_does(name: str) -> None:
    """Errors are those of the solvers; they shrink with the steps (next test)."""
    make, steps, tolerance = SOLVERS[name]
    scheduler = make()
    noise = normal(*SHAPE)
    scheduler.set_timesteps(steps)
    vp = float(scheduler.init_noise_sigma) == 1.0
    alpha = float((1 + scheduler.sigmas[0].double() ** 2).rsqrt())
    start = noise if vp else noise / alpha / float(scheduler.init_noise_sigma)
    found = run_scheduler(scheduler, adapted(scheduler), start, steps)
    assert relative(found, exact_end(scheduler, noise)) <= tolerance


@numpy_2
def test_their_euler_with_a_denoiser_is_our_ddim() -> None:
    """Both are Euler's method on x / alpha; theirs is float32."""
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(12)
    found = run_scheduler(scheduler, adapted(scheduler), normal(*SHAPE), 12)
    grid = Karras(1e-3, 1e4).at(scheduler.sigmas[:-1].double())
    levels = (*(NoiseLevel(*values) for values in zip(*grid, strict=True)), clean())
    x = normal(*SHAPE) * float(scheduler.init_noise_sigma)
    assert relative(found, finish(ddim(with_label(DATA, None), x, levels))) <= 1e-5


@numpy_2
def test_their_dpm_solver_with_a_denoiser_is_ours() -> None:
    """Theirs rounds x to float32 at every step."""
    scheduler = DPMSolverMultistepScheduler()
    denoiser = answer_of(LinearBetas(), Epsilon())
    found = run_scheduler(scheduler, adapted(scheduler, denoiser), normal(*SHAPE), 20)
    levels = levels_of(scheduler.timesteps)
    wanted = finish(dpmpp_2m(with_label(denoiser, None), normal(*SHAPE), levels))
    assert relative(found, wanted) <= 1e-4


def test_an_oracle_in_edm_and_flow_walks_as_in_ours() -> None:
    edm = EDMEulerScheduler()
    found = run_scheduler(edm, adapted(edm), normal(*SHAPE), 12)
    grid = Karras(1e-3, 100.0).at(edm.sigmas[:-1].double())
    levels = (*(NoiseLevel(*values) for values in zip(*grid, strict=True)), clean())
    x = normal(*SHAPE) * edm.init_noise_sigma
    assert relative(found, finish(ddim(with_label(DATA, None), x, levels))) <= 1e-5
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(12)
    unet, x = adapted(flow), normal(*SHAPE)
    for t in flow.timesteps:
        x = flow.step(unet(x, t), t, x).prev_sample
    at = Flow()(flow.sigmas[:-1].double())
    levels = (*(NoiseLevel(*values) for values in zip(*at, strict=True)), clean())
    assert relative(x, finish(ddim(with_label(DATA, None), normal(*SHAPE), levels))) <= 1e-5


@pytest.mark.parametrize("make", [DDPMPipeline, DDIMPipeline])
def test_any_denoiser_runs_in_their_pipelines(make: Any) -> None:
    """A Cosine-velocity network under a linear schedule of theirs, from noise to pictures."""
    scheduler = exact(DDPMScheduler(clip_sample=False, timestep_spacing="trailing"))
    spec = few_groups(ddpm_family(8, (1, 2), 1, ())).with_classes(3, null=True)
    net = ours_with(spec, random_weights(spec))
    denoiser = Denoiser(net, Cosine(), Velocity())
    unet = for_diffusers(denoiser, scheduler, channels=3, size=(8, 16), label=2)
    pipe = quiet(make(unet, scheduler))
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=5).images
    assert [image.size for image in images] == [(16, 8), (16, 8)]
    again = quiet(make(for_diffusers(denoiser, scheduler, channels=3, size=(8, 16)), scheduler))
    other = again(2, torch.Generator().manual_seed(0), num_inference_steps=5).images
    assert images[0].tobytes() != other[0].tobytes()  # another label


def test_a_pipeline_with_an_oracle_makes_its_data() -> None:
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    mean = torch.full((3, 8, 8), 0.5, dtype=torch.float64)
    data = Gaussian(mean, torch.ones(1), torch.eye(192, 1), rest=1e-6)
    unet = for_diffusers(data, scheduler, channels=3, size=(8, 8))
    pipe = quiet(DDIMPipeline(unet, scheduler))
    generator = torch.Generator().manual_seed(0)
    images = pipe(4, generator, num_inference_steps=20, output_type="pt").images
    flat = images.flatten(1)[:, 1:]  # all but the one value that varies
    assert float((flat - 0.75).abs().max()) < 0.01


def test_the_adapter_looks_like_a_network() -> None:
    net = ours_with(TINY, random_weights(TINY))
    denoiser = Denoiser(net, LinearBetas(), Epsilon())
    unet = for_diffusers(denoiser, DDIMScheduler(), channels=3, size=(8, 8))
    assert unet.config.sample_size == (8, 8)
    assert unet.config.in_channels == 3
    assert unet.dtype is torch.float32
    assert unet.device.type == "cpu"
    unet.to(torch.float64)
    assert unet.dtype is torch.float64
    assert next(net.parameters()).dtype is torch.float64
    x = normal(*SHAPE)
    with torch.no_grad():
        (answer,) = unet(x, torch.tensor([10, 900]), return_dict=False)
        first, second = unet(x, 10).sample, unet(x, torch.tensor(900)).sample
    assert relative(answer[:1], first[:1]) <= 1e-12
    assert relative(answer[1:], second[1:]) <= 1e-12


def test_class_labels_go_before_the_fixed_label() -> None:
    seen: list[Tensor | None] = []

    def denoise(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        seen.append(label)
        return torch.zeros_like(x)

    unet = for_diffusers(denoise, DDIMScheduler(), channels=3, size=(8, 8), label=4)
    unet(normal(*SHAPE), 10)
    unet(normal(*SHAPE), 10, class_labels=torch.tensor([1, 2]))
    assert [label.tolist() for label in seen if label is not None] == [[4, 4], [1, 2]]


def test_without_a_schedule_nobody_knows_the_time() -> None:
    """A guided function of a Denoiser, passed without the Denoiser's schedule, must not go on."""
    denoiser = Denoiser(ours_with(TINY, random_weights(TINY)), LinearBetas(), Epsilon())

    def guided(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        return denoiser(x, level, label).clamp(-1, 1)

    x = normal(*SHAPE).float()
    with torch.no_grad():
        lost = for_diffusers(guided, DDIMScheduler(), channels=3, size=(8, 8))
        assert bool(lost(x, 10).sample.isnan().all())
        found = for_diffusers(
            guided, DDIMScheduler(), channels=3, size=(8, 8), schedule=denoiser.schedule
        )
        assert bool(found(x, 10).sample.isfinite().all())


def test_beyond_its_own_levels_a_denoiser_keeps_the_scale() -> None:
    """Their first timestep is noisier than any level of this schedule."""
    seen: list[tuple[Tensor, NoiseLevel]] = []
    narrow = Karras(0.5, 2.0)

    def denoise(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        seen.append((x, level))
        return torch.zeros_like(x)

    unet = for_diffusers(denoise, DDIMScheduler(), channels=3, size=(8, 8), schedule=narrow)
    x = normal(*SHAPE)
    unet(x, 999)
    unet(x, 0)
    (high, top), (low, bottom) = seen
    assert (float(top.ratio), float(bottom.ratio)) == (2.0, 0.5)
    assert relative(high, x * math.sqrt(5)) <= 1e-12
    assert relative(low, x * math.sqrt(1.25)) <= 1e-12


@numpy_2
@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: LCMScheduler(), "scheduler LCMScheduler is not supported; use one of DDPMSch"),
        (
            lambda: EDMEulerScheduler(prediction_type="v_prediction"),
            "EDMEulerScheduler: prediction_type='v_prediction' is not supported",
        ),
        (
            lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True),
            "use_flow_sigmas=True is not supported",
        ),
        (
            lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            "invert_sigmas=True is not supported",
        ),
        (
            lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "prediction_type='flow_prediction' is not supported",
        ),
    ],
)
def test_schedulers_that_the_adapter_refuses(scheduler: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        for_diffusers(DATA, scheduler(), channels=3, size=(8, 8))


@pytest.mark.parametrize("timestep", [-1, 1000, 3.5, torch.tensor([1.0, math.nan])])
def test_timesteps_that_are_none(timestep: Any) -> None:
    unet = for_diffusers(DATA, DDIMScheduler(), channels=3, size=(8, 8))
    with pytest.raises(ConfigError, match=r"whole number in 0…999"):
        unet(normal(*SHAPE), timestep)


@numpy_2
def test_timesteps_of_another_grid() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    unet = for_diffusers(DATA, scheduler, channels=3, size=(8, 8))
    with pytest.raises(ConfigError, match=r"none of the scheduler's"):
        unet(normal(*SHAPE), 3)


@numpy_2
def test_timesteps_that_fell_together() -> None:
    """Many Karras steps round to the same whole timestep; the running scheduler tells them
    apart."""
    scheduler = karras(DPMSolverMultistepScheduler)
    scheduler.set_timesteps(100)
    twice = next(t for t in scheduler.timesteps if (scheduler.timesteps == t).sum() > 1)
    found = run_scheduler(scheduler, adapted(scheduler), normal(*SHAPE), 100)
    assert relative(found, exact_end(scheduler, normal(*SHAPE))) <= 2e-2
    scheduler.set_timesteps(100)
    with pytest.raises(ConfigError, match=r"stands for \d+ noise levels"):
        adapted(scheduler)(normal(*SHAPE), twice)


def test_uniform_levels_are_theirs_when_trailing() -> None:
    """The spacing that is written: both start at pure noise."""
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    ours = uniform(LinearBetas(), 10)
    assert int(scheduler.timesteps[0]) == 999
    assert float(ours.t[0]) == 1.0

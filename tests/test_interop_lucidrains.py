"""denoising-diffusion-pytorch's networks come over with equal outputs.

The fixtures were made by its own code (tests/fixtures/lucidrains/NOTICE). float64 shows that the
same thing is computed; in float32 two orders of summation differ by about their rounding.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from undiffuse.denoiser import Epsilon, Prediction, Sample, Velocity
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop import _lucidrains
from undiffuse.interop._files import Foreign, Kind, Weights, choose_weights
from undiffuse.interop._lucidrains import from_lucidrains, rules, spec_of, to_lucidrains
from undiffuse.interop._weights import mean_only, net_shapes, write_weights
from undiffuse.noise import Cosine, LinearBetas, Schedule, Sigmoid
from undiffuse.recipes import ddpm_family, lucidrains_family
from undiffuse.spec import (
    Attn,
    Conv,
    Down,
    Downsampling,
    Inject,
    LinearAttn,
    Norm,
    Op,
    Out,
    UNetSpec,
    Up,
)

FIXTURES = Path(__file__).parent / "fixtures" / "lucidrains"
sys.path.insert(0, str(FIXTURES))

from lucidrains_rule import weights_of  # noqa: E402 # its folder is put on the path above

NETS = json.loads((FIXTURES / "nets.json").read_text(encoding="utf-8"))
NAMES = ("default", "full-attention", "options")
PROCESSES = dict(np.load(FIXTURES / "processes.npz"))


def theirs(name: str) -> dict[str, Tensor]:
    return weights_of(NETS[name]["shapes"])


def stored(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def small() -> dict[str, Tensor]:
    """The shallowest network there is, for what needs no outputs."""
    spec = lucidrains_family(8, (1,))
    weights = {name: torch.ones(shape) for name, shape in net_shapes(spec).items()}
    return to_lucidrains(spec, weights)


def diffusion(schedule: str, steps: int, objective: str, gamma: int) -> dict[str, Tensor]:
    """The buffers of a GaussianDiffusion."""
    key = f"{schedule} {steps}"
    return {
        "betas": torch.from_numpy(PROCESSES[f"{key} betas"]),
        "loss_weight": torch.from_numpy(PROCESSES[f"{key} {objective} {gamma}"]),
    }


# --- outputs ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_equal_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = from_lucidrains(theirs(name)).net().double(), stored(name)
    # The sinusoid is float32 on both sides, and its last bit may differ between processors.
    monkeypatch.setattr(net.embedding, "sinusoid", lambda timestep: data["sinusoid"])
    output = net(data["pictures"].double() / 128 - 1, data["timesteps"])
    assert difference(output, data["float64"]) <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_equal_in_float32(name: str) -> None:
    net, data = from_lucidrains(theirs(name)).net(), stored(name)
    output = net(data["pictures"].float() / 128 - 1, data["timesteps"])
    rounding = difference(data["float32"], data["float64"])
    assert difference(output, data["float32"]) <= max(1e-6, 4 * rounding)


@pytest.mark.parametrize("name", NAMES)
def test_the_sinusoid_has_their_rounding(name: str) -> None:
    embedding, data = from_lucidrains(theirs(name)).net().embedding, stored(name)
    assert embedding is not None
    assert (embedding.sinusoid(data["timesteps"]) - data["sinusoid"]).abs().max() <= 2e-7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_import_and_export_are_inverse_to_the_bit(name: str, dtype: torch.dtype) -> None:
    before = {n: t.to(dtype) for n, t in theirs(name).items()}
    imported = from_lucidrains(before)
    after = to_lucidrains(imported.spec, imported.weights)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    again = from_lucidrains(after)
    assert again.spec == imported.spec
    assert all(torch.equal(again.weights[n], imported.weights[n]) for n in imported.weights)


def test_weights_in_another_place_give_another_output() -> None:
    """The parity test can fail: memories that are not turned, queries exchanged for keys."""
    tensors, data = theirs("default"), stored("default")
    imported = from_lucidrains(tensors)
    attention = next(n for n in imported.weights if n.endswith("qkv.weight"))
    q, k, v = imported.weights[attention].chunk(3)
    swapped = replace(imported, weights={**imported.weights, attention: torch.cat((k, q, v))}).net()
    with torch.no_grad():
        output = swapped(data["pictures"].float() / 128 - 1, data["timesteps"])
    assert difference(output, data["float32"]) > 1e-3


# --- the program --------------------------------------------------------------------------------


def test_the_default_network_is_our_recipe() -> None:
    assert from_lucidrains(theirs("default")).spec == lucidrains_family(16)


def test_full_attention_is_seen() -> None:
    wanted = lucidrains_family(8, full=(2, 3))
    assert from_lucidrains(theirs("full-attention")).spec == wanted


def test_every_option_is_seen() -> None:
    spec = from_lucidrains(theirs("options")).spec
    first, second, third = (
        Attn(2, head_width=6, memory=4, bias=False),
        LinearAttn(4, head_width=8, memory=4),
        Attn(1, head_width=32, memory=4, bias=False),
    )
    attentions = [op for op in spec.program if isinstance(op, Attn | LinearAttn)]
    assert attentions == [first, second, third, third, third, second, first]
    assert spec.program[0] == Conv(5, 7)
    assert [op.width for op in spec.program if isinstance(op, Down)] == [8, 24]
    assert (spec.in_channels, spec.out_channels) == (1, 2)


def test_the_published_network_is_complete() -> None:
    spec = lucidrains_family(64)
    ours = {n: torch.empty(shape, device="meta") for n, shape in net_shapes(spec).items()}
    tensors = write_weights(rules(spec), ours)
    lines = "\n".join(f"{name} {list(tensors[name].shape)}" for name in sorted(tensors))
    published = NETS["Unet(dim=64)"]
    assert published["count"] == 35_711_491
    assert sum(tensor.numel() for tensor in tensors.values()) == published["count"]
    assert hashlib.sha256(lines.encode()).hexdigest() == published["sha256"]
    assert spec_of(tensors) == spec


def test_a_learned_variance_is_left_out_of_the_denoiser() -> None:
    imported = from_lucidrains(theirs("options"))
    data, mean = stored("options"), mean_only(imported)
    with torch.no_grad():
        output = mean.net()(data["pictures"].float() / 128 - 1, data["timesteps"])
    assert mean.spec.out_channels == 1
    assert difference(output, data["float32"][:, :1]) <= 1e-5
    assert "variance" in mean.notes[-1]


def test_memories_without_entries_come_and_go() -> None:
    tensors = small()
    for name in [n for n in tensors if n.endswith("mem_kv")]:
        heads, width = 4, 32
        linear = name.replace("mem_kv", "to_out.1.g") in tensors
        tensors[name] = torch.empty((2, heads, width, 0) if linear else (2, heads, 0, width))
    imported = from_lucidrains(tensors)
    assert not any("memory" in name for name in imported.weights)
    after = to_lucidrains(imported.spec, imported.weights)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in tensors.items()}


# --- the process --------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "linear": lambda steps: LinearBetas(steps, 0.1 / steps, 20 / steps),
    "cosine": Cosine,
    "sigmoid": Sigmoid,
}
OBJECTIVES: dict[str, Callable[[int], Prediction]] = {
    "pred_noise": Epsilon,
    "pred_x0": Sample,
    "pred_v": Velocity,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gamma", [0, 5])
def test_schedule_and_objective_are_recognised(
    schedule: str, steps: int, objective: str, gamma: int
) -> None:
    process = _lucidrains._process(diffusion(schedule, steps, objective, gamma))
    assert process.schedule == SCHEDULES[schedule](steps)
    assert process.prediction == OBJECTIVES[objective](steps)
    clipped = ("trained with min_snr_loss_weight, min_snr_gamma=5",)
    assert process.notes == (clipped if gamma else ())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_that_are_a_little_different_are_refused(schedule: str) -> None:
    buffers = diffusion(schedule, 1000, "pred_v", 0)
    buffers["betas"] = buffers["betas"] * 1.00001
    with pytest.raises(CheckpointError, match="betas: 1000 values of no schedule"):
        _lucidrains._process(buffers)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("loss_weight", None, "loss_weight is missing"),
        ("betas", None, "betas is missing"),
        ("loss_weight", torch.linspace(0, 1, 1000), "none of pred_noise, pred_x0 and pred_v"),
        ("loss_weight", torch.ones(3), "none of pred_noise, pred_x0 and pred_v"),
        ("loss_weight", torch.full((1000,), float("nan")), "none of pred_noise"),
        ("betas", torch.linspace(0.001, 0.012, 1000), "betas: 1000 values of no schedule"),
        ("betas", torch.zeros(1), "betas: 1 values of no schedule"),
        ("betas", torch.full((1000,), float("nan")), "betas: 1000 values of no schedule"),
    ],
)
def test_another_process_is_refused(name: str, value: Tensor | None, says: str) -> None:
    buffers = diffusion("linear", 1000, "pred_noise", 0)
    del buffers[name]
    if value is not None:
        buffers[name] = value
    with pytest.raises(CheckpointError, match=says):
        _lucidrains._process(buffers)


def test_a_bare_network_gets_the_defaults_and_a_note() -> None:
    imported = from_lucidrains(small(), (32, 48))
    assert imported.schedule == Sigmoid()
    assert imported.prediction == Velocity()
    assert imported.size == (32, 48)
    assert "defaults are assumed" in imported.notes[0]
    assert "sinusoidal_pos_emb_theta=10000" in imported.notes[1]


def test_a_checkpoint_of_the_trainer_is_read() -> None:
    """Levels as `Trainer.save` writes them, prefixes as ema_pytorch does."""
    raw = {f"model.{name}": tensor for name, tensor in small().items()}
    raw |= diffusion("cosine", 100, "pred_noise", 0)
    buffers = set(NETS["GaussianDiffusion"]) - set(raw)
    assert all(name in _lucidrains.BUFFERS for name in buffers)
    raw |= {name: torch.zeros(100) for name in buffers}
    tensors = {f"model/{name}": tensor for name, tensor in raw.items()}
    for part, value in (("ema_model", 2.0), ("online_model", 1.0)):
        tensors |= {f"ema/{part}.{n}": t * value if "model." in n else t for n, t in raw.items()}
    tensors |= {"ema/initted": torch.tensor(True), "opt/state/0/exp_avg": torch.zeros(3)}
    foreign = Foreign(tensors, {"step": 7}, Kind.TORCH_ZIP)
    for weights, value in ((Weights.EMA, 2.0), (Weights.RAW, 1.0)):
        imported = from_lucidrains(choose_weights(foreign, weights).tensors)
        assert all(float(t.mean()) == value for t in imported.weights.values())
        assert imported.schedule == Cosine(100)
        assert imported.prediction == Epsilon(100)


def test_the_denoiser_says_what_their_equations_say() -> None:
    """Their x_start of a predicted v is sqrt(a) x - sqrt(1 - a) v, at whole-numbered times."""
    name, steps, i = "full-attention", 1000, 437
    wrapped = {f"model.{n}": t for n, t in theirs(name).items()}
    buffers = diffusion("sigmoid", steps, "pred_v", 0)
    denoiser = from_lucidrains(wrapped | buffers).denoiser()
    data = stored(name)
    where = int((data["timesteps"] == i).nonzero()[0, 0])
    x = data["pictures"][where : where + 1].double() / 128 - 1
    level = denoiser.schedule(torch.tensor([i / (steps - 1)])).like(x)
    alpha_bar = (1 - buffers["betas"].double()).cumprod(0)[i]
    wanted = alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * data["float64"][where]
    with torch.no_grad():
        assert difference(denoiser(x.float(), level.like(x.float())), wanted) <= 1e-5


# --- what cannot be expressed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"time_mlp.0.weights": (8,)}, "learned_sinusoidal_cond and random_fourier_features"),
        ({"downs.0.0.block1.norm.weight": (8,)}, "before 2.0.0, whose blocks have GroupNorm"),
        ({"classes_mlp.0.weight": (8, 8)}, "classifier_free_guidance.Unet"),
        ({"init_conv.weight": (8, 6, 7, 7)}, "self_condition=True cannot be expressed"),
        ({"init_conv.weight": (8, 3, 7)}, "pictures of 1 dimensions"),
        ({"init_conv.weight": (8, 3, 7, 7, 7)}, "pictures of 3 dimensions"),
        ({"init_conv.weight": (8, 3, 6, 6)}, "op 0 Conv: kernel must be odd"),
        ({"final_conv.weight": (5, 8, 1, 1)}, "out_dim=5 cannot be expressed"),
        ({"time_mlp.1.weight": (32, 9)}, "dim=9 is odd"),
        ({"time_mlp.1.weight": (32, 2)}, "its shapes make no network"),
        ({"mid_attn.mem_kv": None}, "mid_attn has no mem_kv"),
        ({"init_conv.weight": None}, "init_conv.weight is missing"),
        ({"downs.0.0.mlp.1.weight": None}, "downs.0.0.mlp.1.weight is missing"),
        ({"ups.0.1.block1.proj.weight": None}, "ups.0.1.block1.proj.weight is missing"),
        ({"ups.0.1.block2.norm.g": None}, "ups.0.1.block2.norm.g is missing"),
        ({"mid_block1.block2.norm.g": (8,)}, "mid_block1.block2.norm.g is"),
        ({"mid_block1.block2.norm.g": (1, 9, 1, 1)}, r"\[1, 8, 1, 1\] in this network"),
        ({"downs.0.2.mem_kv": (2, 4, 4)}, r"downs.0.2.mem_kv has shape \[2, 4, 4\]"),
        ({"downs.0.2.mem_kv": (2, 0, 4, 4)}, "its shapes make no network"),
        ({"init_conv.weight": (9, 3, 7, 7)}, r"init_conv.bias is .* \[8\] in the file, \[9\]"),
        ({"extra.weight": (3,)}, "extra.weight is in the file, but this network has no such"),
    ],
)
def test_what_is_not_theirs_is_refused_by_name(
    change: dict[str, tuple[int, ...] | None], says: str
) -> None:
    tensors = small()
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.ones(shape)
    with pytest.raises(CheckpointError, match=says):
        from_lucidrains(tensors)


def test_tensors_of_whole_numbers_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"mid_attn.mem_kv is torch.int64"):
        from_lucidrains(small() | {"mid_attn.mem_kv": small()["mid_attn.mem_kv"].long()})


def test_wrappers_that_are_not_theirs_are_refused() -> None:
    elucidated = {f"net.{name}": tensor for name, tensor in small().items()}
    with pytest.raises(CheckpointError, match="ElucidatedDiffusion cannot be expressed"):
        from_lucidrains(elucidated)
    wrapped = {f"model.{name}": tensor for name, tensor in small().items()}
    with pytest.raises(CheckpointError, match="to_weights is in the file, but GaussianDiffusion"):
        from_lucidrains(wrapped | {"to_weights": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"init_conv\.weight is missing"):
        from_lucidrains({"other": torch.ones(1)})


def test_even_channels_leave_a_doubt() -> None:
    spec = lucidrains_family(8, (1,), channels=2)
    weights = {name: torch.ones(shape) for name, shape in net_shapes(spec).items()}
    assert "self_condition" in from_lucidrains(to_lucidrains(spec, weights)).notes[-1]


def with_op(index: int, op: Op) -> UNetSpec:
    spec = lucidrains_family(8, (1, 2))
    program = list(spec.program)
    program[index] = op
    return replace(spec, program=tuple(program))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (ddpm_family(32, (1, 2), 1, ()), "op 0 Conv|op 2 Res|op 4"),
        (with_op(7, Down(Downsampling.CONV, 8)), "op 7 Down.* cannot be expressed"),
        (with_op(5, Attn(4, head_width=32, memory=4)), "op 5 Attn.* cannot be expressed"),
        (with_op(-1, Out(3, norm=False)), "Out.* cannot be expressed"),
        (with_op(-1, Out(1)), "cannot be expressed"),
        (with_op(14, Conv(16)), "op 14 Conv: .* has Res there"),
    ],
)
def test_a_network_that_they_do_not_have_is_refused(spec: UNetSpec, says: str) -> None:
    weights = {name: torch.ones(shape) for name, shape in net_shapes(spec).items()}
    with pytest.raises(ConfigError, match=says):
        to_lucidrains(spec, weights)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inject": Inject.ADD}, "style.inject=add cannot be expressed"),
        ({"norm": Norm.GROUP}, "style.norm=group cannot be expressed"),
        ({"skip_gain": 0.5}, "style.skip_gain=0.5 cannot be expressed"),
    ],
)
def test_a_style_that_they_do_not_have_is_refused(change: dict[str, object], says: str) -> None:
    spec = lucidrains_family(8, (1,))
    spec = replace(spec, style=replace(spec.style, **change))
    weights = {name: torch.ones(shape) for name, shape in net_shapes(spec).items()}
    with pytest.raises(ConfigError, match=says):
        to_lucidrains(spec, weights)


def test_what_only_training_uses_or_goes_without_saying_is_no_hindrance() -> None:
    wanted = lucidrains_family(8, (1, 1))
    program = tuple(
        replace(op, width=None) if isinstance(op, Down | Up) else op for op in wanted.program
    )
    style = replace(wanted.style, dropout=0.1, zero_init=True, groups=4)
    spec = replace(wanted, program=program, style=style)
    weights = {name: torch.ones(shape) for name, shape in net_shapes(spec).items()}
    assert spec_of(to_lucidrains(spec, weights)) == wanted

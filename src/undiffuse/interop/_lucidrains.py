"""denoising-diffusion-pytorch (lucidrains): its `Unet`, alone or inside a `GaussianDiffusion`.

Releases from 2.0.0 on. Names and shapes tell the whole network; the buffers of `GaussianDiffusion`
tell the noise schedule and what is predicted. What leaves no trace in a file, such as the base of
the sinusoid, is taken to be the default, and a note says so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from undiffuse.denoiser import Epsilon, Prediction, Sample, Velocity
from undiffuse.errors import CheckpointError, ConfigError, SpecError
from undiffuse.interop._weights import (
    Imported,
    Rule,
    Shape,
    Tensors,
    layer,
    read_weights,
    same,
    then,
    write_weights,
)
from undiffuse.noise import Cosine, LinearBetas, Schedule, Sigmoid
from undiffuse.recipes import lucidrains_family
from undiffuse.spec import (
    Attn,
    Concat,
    Conv,
    Down,
    LinearAttn,
    Op,
    Out,
    Program,
    Res,
    Site,
    Skip,
    UNetSpec,
    Up,
    trace,
)

ORIGIN = "denoising-diffusion-pytorch Unet"

# What GaussianDiffusion keeps beside its network; all follows from `betas` and the objective.
BUFFERS = frozenset(
    {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "loss_weight"),
        *("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
        *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped"),
        *("posterior_mean_coef1", "posterior_mean_coef2"),
    }
)

ASSUMED = "not in the file, so assumed: sinusoidal_pos_emb_theta=10000, auto_normalize=True"
NO_PROCESS = (
    "the file holds no GaussianDiffusion, so its defaults are assumed: beta_schedule='sigmoid',"
    " timesteps=1000, objective='pred_v'"
)


def from_lucidrains(tensors: Tensors, size: tuple[int, int] | None = None) -> Imported:
    """The network of a `Unet` or a `GaussianDiffusion`, from its state dict.

    A checkpoint of `Trainer` holds several state dicts: see `choose_weights`.

    Args:
        size: height and width of the pictures; the file does not say.

    Raises:
        CheckpointError: it is no such network, or uses what cannot be expressed, which is named.
    """
    theirs, buffers = _parts(tensors)
    spec = spec_of(theirs)
    weights = read_weights(spec, rules(spec), theirs, _empty_memories(spec))
    process = _process(buffers) if buffers else Process(Sigmoid(), Velocity(), (NO_PROCESS,))
    notes = (*process.notes, ASSUMED, *_doubts(spec))
    return Imported(spec, weights, process.schedule, process.prediction, ORIGIN, size, notes)


def to_lucidrains(spec: UNetSpec, weights: Tensors) -> dict[str, Tensor]:
    """The state dict of their `Unet`.

    Raises:
        ConfigError: their `Unet` has no such network; the message names the op or the field.
    """
    spec = spec.with_augment(0)  # a generated picture is told of none
    _check_kinds(spec)
    theirs = write_weights(rules(spec), weights)
    theirs |= {name: torch.empty(shape) for name, shape in _empty_memories(spec).items()}
    _check_same(spec, spec_of(theirs))
    return theirs


def _parts(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The network's own tensors, and what GaussianDiffusion adds."""
    if "init_conv.weight" in tensors:
        return tensors, {}
    if "net.init_conv.weight" in tensors:
        raise _refusal("ElucidatedDiffusion cannot be expressed (only GaussianDiffusion)")
    prefix = "model."
    if f"{prefix}init_conv.weight" not in tensors:
        raise _refusal("init_conv.weight is missing: the file does not hold this network")
    theirs = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    others = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
    if unknown := others.keys() - BUFFERS:
        raise _refusal(f"{min(unknown)} is in the file, but GaussianDiffusion has no such buffer")
    return theirs, others


def _refusal(why: str) -> CheckpointError:
    return CheckpointError(f"{ORIGIN}: {why}")


# --- the program --------------------------------------------------------------------------------


def spec_of(theirs: Tensors) -> UNetSpec:
    """The network's program, from names and shapes.

    Raises:
        CheckpointError: it is no such network, or uses what cannot be expressed.
    """
    _refuse_relatives(theirs)
    levels = next(i for i in range(len(theirs) + 1) if f"downs.{i}.0.mlp.1.weight" not in theirs)
    if not levels:
        raise _refusal("downs.0.0.mlp.1.weight is missing: the file does not hold this network")
    channels, out_channels = _channels(theirs)
    names = iter(_names(levels))
    ops = (_op(op, theirs, names) for op in _template(levels))
    hidden, width = _shape(theirs, "time_mlp.1.weight", 2)
    if width % 2:
        raise _refusal(f"dim={width} is odd, which its own sinusoid cannot be")
    style = lucidrains_family(64).style
    embedding = replace(style.embedding, width=width, hidden=hidden, out=hidden)
    try:
        return UNetSpec(channels, out_channels, tuple(ops), replace(style, embedding=embedding))
    except SpecError as error:
        raise _refusal(f"its shapes make no network: {error}") from error


def _template(levels: int) -> Program:
    """The right ops in the right order; their widths and heads are not yet those of the file."""
    return lucidrains_family(8, (1,) * levels).program


def _names(levels: int) -> Iterator[str]:
    """Where each op keeps its tensors, in the order of the program; skips keep none."""
    yield "init_conv"
    for i in range(levels):
        yield from _level_names(f"downs.{i}", last=i == levels - 1)
    yield from ("mid_block1", "mid_attn", "mid_block2")
    for i in range(levels):
        yield from _level_names(f"ups.{i}", last=i == levels - 1)
    yield from ("final_res_block", "final_conv")


def _level_names(level: str, last: bool) -> tuple[str, ...]:
    """Two blocks, attention, and what changes the width: in all but the last after a resampling."""
    return (f"{level}.0", f"{level}.1", f"{level}.2", f"{level}.3" if last else f"{level}.3.1")


def _op(op: Op, theirs: Tensors, names: Iterator[str]) -> Op:
    """The op with the widths that its tensors have."""
    match op:
        case Conv():
            width, _, kernel, _ = _shape(theirs, f"{next(names)}.weight", 4)
            return Conv(width, kernel)
        case Res():
            return Res(_shape(theirs, f"{next(names)}.block1.proj.weight", 4)[0])
        case Attn() | LinearAttn():
            return _attention(theirs, next(names))
        case Down() | Up():
            return replace(op, width=_shape(theirs, f"{next(names)}.weight", 4)[0])
        case _:
            return op


def _attention(theirs: Tensors, name: str) -> Attn | LinearAttn:
    """Linear attention has a norm after its projection, and its memory is turned."""
    if f"{name}.mem_kv" not in theirs and f"{name}.to_qkv.weight" in theirs:
        raise _refusal(f"{name} has no mem_kv (a release before 1.9.0), so heads cannot be told")
    _, heads, first, second = _shape(theirs, f"{name}.mem_kv", 4)
    if f"{name}.to_out.1.g" in theirs:
        return LinearAttn(heads, head_width=first, memory=second)
    return Attn(heads, head_width=second, memory=first, bias=False)


def _channels(theirs: Tensors) -> tuple[int, int]:
    channels = _shape(theirs, "init_conv.weight", 4)[1]
    out_channels = _shape(theirs, "final_conv.weight", 4)[0]
    if channels == 2 * out_channels:
        raise _refusal("self_condition=True cannot be expressed")
    if out_channels not in (channels, 2 * channels):
        raise _refusal(
            f"out_dim={out_channels} cannot be expressed (only {channels}, or"
            f" {2 * channels} with learned_variance)"
        )
    return channels, out_channels


def _doubts(spec: UNetSpec) -> tuple[str, ...]:
    if spec.in_channels != spec.out_channels or spec.in_channels % 2:
        return ()
    return (
        f"taken for pictures of {spec.in_channels} channels; self_condition together with"
        " learned_variance would look the same",
    )


def _refuse_relatives(theirs: Tensors) -> None:
    """Other releases, and other networks of the same package, by their tell-tale tensors."""
    marks = {
        "time_mlp.0.weights": "learned_sinusoidal_cond and random_fourier_features"
        " cannot be expressed",
        "downs.0.0.block1.norm.weight": "a release before 2.0.0, whose blocks have GroupNorm",
        "classes_mlp.0.weight": "classifier_free_guidance.Unet cannot be expressed",
    }
    for mark, what in marks.items():
        if mark in theirs:
            raise _refusal(f"{what} ({mark})")
    stem = theirs.get("init_conv.weight")
    if stem is not None and stem.ndim != 4:
        raise _refusal(f"pictures of {stem.ndim - 2} dimensions cannot be expressed (only 2)")


def _shape(theirs: Tensors, name: str, dimensions: int) -> Shape:
    if name not in theirs:
        raise _refusal(f"{name} is missing: the file does not hold this network")
    shape = tuple(theirs[name].shape)
    if len(shape) != dimensions:
        raise _refusal(f"{name} has shape {list(shape)}; {dimensions} dimensions belong there")
    return shape


# --- the weights --------------------------------------------------------------------------------


def rules(spec: UNetSpec) -> list[Rule]:
    """Which of our tensors is which of theirs."""
    found = [*layer("embedding.linear1", "time_mlp.1"), *layer("embedding.linear2", "time_mlp.3")]
    for site, name in _placed(spec):
        found += _site_rules(site, f"layers.{site.name}", name)
    return found


def _placed(spec: UNetSpec) -> list[tuple[Site, str]]:
    """Each op that has weights, with the place of its tensors."""
    levels = 1 + sum(isinstance(op, Down) for op in spec.program)
    sites = [site for site in trace(spec) if not isinstance(site.op, Skip | Concat)]
    return list(zip(sites, _names(levels), strict=True))


def _site_rules(site: Site, ours: str, theirs: str) -> tuple[Rule, ...]:
    match site.op:
        case Res():
            return _res_rules(site, ours, theirs)
        case Attn() | LinearAttn():
            return _attention_rules(site.op, ours, theirs)
        case Down() | Up() | Out():
            return layer(f"{ours}.conv", theirs)
        case _:
            return layer(ours, theirs)


def _res_rules(site: Site, ours: str, theirs: str) -> tuple[Rule, ...]:
    projected = site.in_width != site.out_width
    return (
        *layer(f"{ours}.conv1", f"{theirs}.block1.proj"),
        _gain(f"{ours}.norm1", f"{theirs}.block1.norm"),
        *layer(f"{ours}.time_proj", f"{theirs}.mlp.1"),
        *layer(f"{ours}.conv2", f"{theirs}.block2.proj"),
        _gain(f"{ours}.norm2", f"{theirs}.block2.norm"),
        *(layer(f"{ours}.shortcut", f"{theirs}.res_conv") if projected else ()),
    )


def _attention_rules(op: Attn | LinearAttn, ours: str, theirs: str) -> tuple[Rule, ...]:
    shared = (
        _gain(f"{ours}.norm", f"{theirs}.norm"),
        *layer(f"{ours}.qkv", f"{theirs}.to_qkv", bias=False),
    )
    memory = same(f"{ours}.memory", f"{theirs}.mem_kv")
    match op:
        case Attn():
            rest = (memory, *layer(f"{ours}.proj", f"{theirs}.to_out"))
        case LinearAttn():
            rest = (
                then(memory, _turned, _turned),
                *layer(f"{ours}.proj", f"{theirs}.to_out.0"),
                _gain(f"{ours}.proj_norm", f"{theirs}.to_out.1"),
            )
    return (*shared, *(rest if op.memory else rest[1:]))


def _turned(memory: Tensor) -> Tensor:
    """(key, value)(head)(entry)(channel) <-> (key, value)(head)(channel)(entry)."""
    return memory.transpose(2, 3)


def _gain(ours: str, theirs: str) -> Rule:
    """The gain of an RMSNorm, which is (1, width, 1, 1) on their side."""
    rule = same(f"{ours}.weight", f"{theirs}.g")
    return Rule(
        rule.ours, rule.theirs, lambda ts: ts[0].reshape(-1), lambda t: (t.reshape(1, -1, 1, 1),)
    )


def _empty_memories(spec: UNetSpec) -> Mapping[str, Shape]:
    """Their memories without entries, which ours do not have."""
    empty = dict[str, Shape]()
    for site, name in _placed(spec):
        match site.op:
            case Attn(heads=heads, head_width=int(width), memory=0):
                empty[f"{name}.mem_kv"] = (2, heads, 0, width)
            case LinearAttn(heads=heads, head_width=width, memory=0):
                empty[f"{name}.mem_kv"] = (2, heads, width, 0)
            case _:
                pass
    return empty


# --- what can be given to them ------------------------------------------------------------------


def _check_kinds(spec: UNetSpec) -> None:
    """Refuse a program whose ops are not theirs; widths and heads are free."""
    template = _template(1 + sum(isinstance(op, Down) for op in spec.program))
    for index, (op, wanted) in enumerate(zip(spec.program, template, strict=False)):
        if _kind(op) is not _kind(wanted):
            raise ConfigError(
                f"op {index} {type(op).__name__}: {ORIGIN} has {type(wanted).__name__} there;"
                " it cannot hold this network"
            )
    if len(spec.program) != len(template):
        raise ConfigError(
            f"the program has {len(spec.program)} ops, {ORIGIN} of as many levels"
            f" {len(template)}; it cannot hold this network"
        )


def _kind(op: Op) -> type[Op]:
    return Attn if isinstance(op, LinearAttn) else type(op)


def _check_same(spec: UNetSpec, theirs: UNetSpec) -> None:
    """What their file would be read as must be what was written, training and group norms aside."""
    inert = ("dropout", "zero_init", "groups", "group_width", "eps", "project_resized")
    wanted = replace(theirs.style, **{name: getattr(spec.style, name) for name in inert})
    if spec.style != wanted:
        field = next(n for n in vars(wanted) if getattr(spec.style, n) != getattr(wanted, n))
        raise ConfigError(
            f"style.{field}={getattr(spec.style, field)} cannot be expressed by {ORIGIN}"
            f" (only {getattr(wanted, field)})"
        )
    for site, op in zip(trace(spec), theirs.program, strict=True):
        ours = site.op
        if isinstance(ours, Down | Up) and ours.width is None:
            ours = replace(ours, width=site.out_width)
        if ours != op:
            raise ConfigError(f"op {site.index} {site.op} cannot be expressed by {ORIGIN}")


# --- the process --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """What the network's input and output mean."""

    schedule: Schedule
    prediction: Prediction
    notes: tuple[str, ...]


def _process(buffers: Tensors) -> Process:
    for name in ("betas", "loss_weight"):
        if name not in buffers:
            raise _refusal(f"{name} is missing: schedule and objective cannot be told")
    betas, weight = (buffers[name].double().flatten() for name in ("betas", "loss_weight"))
    schedule = _schedule(betas)
    snr = schedule(_grid(len(betas))).ratio ** -2
    prediction, gamma = _objective(weight, snr)
    clipped = (f"trained with min_snr_loss_weight, min_snr_gamma={gamma:g}",) if gamma else ()
    return Process(schedule, prediction, clipped)


def _grid(steps: int) -> Tensor:
    return torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)


def _schedule(betas: Tensor) -> Schedule:
    """Which of their three schedules, each with its default arguments, gives these betas."""
    steps = len(betas)
    makers = (
        partial(LinearBetas, steps, 0.1 / steps, 20 / steps),
        partial(Cosine, steps),
        partial(Sigmoid, steps),
    )
    for make in makers:
        try:
            schedule = make()
        except ConfigError:  # not for this number of steps
            continue
        if _gives(schedule, betas):
            return schedule
    raise _refusal(
        f"betas: {steps} values of no schedule that can be expressed (linear, cosine and sigmoid,"
        " with the default schedule_fn_kwargs)"
    )


def _gives(schedule: Schedule, betas: Tensor) -> bool:
    """Equal but for their rounding.

    Betas are kept in float32, and the last value of the sigmoid is rounded to float32 before it is
    subtracted, so that a beta is the less certain the less signal is left.
    """
    alpha_bar = schedule(_grid(len(betas))).alpha ** 2
    before = torch.cat((torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]))
    wanted = 1 - alpha_bar / before
    return bool(((betas - wanted).abs() <= wanted * (1e-6 + 2e-7 / before)).all())


def _objective(weight: Tensor, snr: Tensor) -> tuple[Prediction, float]:
    """What is predicted, and the gamma of min-SNR (0 without), from the weight of the loss.

    The weight is min(snr, gamma) on the clean picture (2303.09556), times what an error of the
    prediction is worth there.
    """
    steps = len(snr)
    if weight.shape == snr.shape:
        worth = {Epsilon(steps): 1 / snr, Sample(steps): snr**0, Velocity(steps): 1 / (snr + 1)}
        for prediction, factor in worth.items():
            capped = weight / factor
            gamma = float(capped.max())
            # 1e-3: at the noisy end the ratio is known no better (see `_gives`).
            if torch.allclose(capped, snr.clamp(max=gamma), rtol=1e-3, atol=0.0):
                return prediction, 0.0 if gamma > 0.999 * float(snr.max()) else gamma
    raise _refusal("loss_weight is that of none of pred_noise, pred_x0 and pred_v")

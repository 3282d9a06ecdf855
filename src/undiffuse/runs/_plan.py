"""Everything that is settled, and refused, before a run writes its first file."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse import cost, images, runtime
from undiffuse.checkpoint import Checkpoints, Loaded, Model, Pictures
from undiffuse.config import (
    BetaSchedule,
    DataConfig,
    ModelConfig,
    Precision,
    PredictionType,
    RunConfig,
    flatten,
    override,
)
from undiffuse.denoiser import (
    Denoiser,
    Epsilon,
    FlowVelocity,
    KarrasPrecond,
    LevelSampling,
    LogNormal,
    MinSnr,
    OnGrid,
    Prediction,
    Sample,
    Velocity,
    uniform_t,
    unweighted,
)
from undiffuse.errors import CheckpointError, ConfigError, DataError, ResourceError
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    LinearBetas,
    Schedule,
    Stream,
    keyed,
    keyed_uniform,
    order,
)
from undiffuse.recipes import preset
from undiffuse.runs._folder import RunFolder, check_writable, read_json
from undiffuse.runs._load import load
from undiffuse.spec import UNetSpec
from undiffuse.training import Recipe, Source
from undiffuse.unet import UNet

Example = tuple[tuple[int, int, int, int], Tensor | None]

TINY_UP_TO = 32  # pixels: the largest picture for which `tiny` is the default preset

# What a checkpoint's weights mean; changing one of these makes another model.
FIXED = (
    "preset",
    "resolution",
    "channels",
    "class_conditional",
    "prediction_type",
    "beta_schedule",
    "num_train_timesteps",
)


@dataclass(frozen=True)
class Request:
    """What the caller wants: settings, a place, and where to start from."""

    config: RunConfig
    run: Path
    data: object = None  # a tensor, array or `images.Data` instead of config.data.data
    resume: str | None = None  # "latest" or a step
    init_from: Path | None = None
    accept_data_change: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Plan:
    """A run, ready to start: nothing has been written yet."""

    request: Request
    config: RunConfig  # with every default settled
    data: images.Data
    net: nn.Module  # on its device
    denoiser: Denoiser
    recipe: Recipe
    pictures: Pictures
    runtime: runtime.Runtime
    step_seconds: float
    resumed: Loaded | None
    notes: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.request.run)

    @property
    def spec(self) -> UNetSpec:
        assert isinstance(self.net, UNet)
        return self.net.spec

    @property
    def first_step(self) -> int:
        return 0 if self.resumed is None else self.resumed.step

    @property
    def seconds(self) -> float:
        """What the remaining steps will take, roughly."""
        left = max(0, self.config.train.max_train_steps - self.first_step)
        return left * self.step_seconds


def make_plan(request: Request) -> Plan:
    """Load the data, build the network, time a step; raise whatever stands in the way."""
    check_writable(request.run)
    resumed, notes = _resumed(request)
    initial = load(request.init_from) if request.init_from and resumed is None else None
    if resumed is None and initial is None:
        _refuse_early(request.config)
    data = _load_data(request)
    if resumed is not None:
        notes += _check_same_data(request, data, resumed)
        if request.init_from:
            notes += (f"init_from is not used: going on from step {resumed.step}",)
    config, spec = _settle(request.config, data, initial, resumed)
    _check_memory(spec, config, data.train.size)
    net = _build(spec, config.train.seed, initial)
    device = runtime.choose_device(config.runtime.device)
    runtime.move(net, device)
    example = _example(spec, config, data.train.size)
    chosen = _choose_runtime(config, net, example, resumed)
    part_seconds = runtime.step_seconds(net, *example, chosen.bf16, repeats=1)
    schedule, prediction = _meaning(config.model, data, resumed)
    notes += _meaning_notes(initial, schedule, prediction)
    return Plan(
        request=request,
        config=config,
        data=data,
        net=net,
        denoiser=Denoiser(net, schedule, prediction),
        recipe=_recipe(config.model, schedule, prediction, spec),
        pictures=_pictures(data, spec),
        runtime=chosen,
        step_seconds=part_seconds * config.train.gradient_accumulation_steps,
        resumed=resumed,
        notes=(*data.notes, *notes),
    )


def source_of(data: images.Dataset, seed: int) -> Source:
    """Global positions -> pictures and labels: order and augmentation keyed by position."""

    def source(positions: range) -> tuple[Tensor, Tensor | None]:
        index = order(seed, len(data), positions)
        draws = keyed_uniform(seed, Stream.AUGMENT, positions, 3)
        label = None if data.labels is None else torch.from_numpy(data.labels[index])
        return data.batch(index, draws), label

    return source


def resumed_config(run: Path, stored: RunConfig, changes: Mapping[str, object]) -> RunConfig:
    """The run's own settings with those changed that the user typed.

    Raises:
        CheckpointError: a change would make another model.
    """
    config = override(stored, changes)
    _check_fixed(run, flatten(stored), flatten(config))
    return config


def _check_fixed(run: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name in FIXED:
        unnamed = name == "preset" and after[name] is None
        if not unnamed and before.get(name) != after[name]:
            raise CheckpointError(
                f"{name} is {after[name]} here, {before.get(name)} in {run};"
                " a changed model is a new run: drop --resume-from-checkpoint"
            )


def changes_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings that differ from the checkpoint's, in words."""
    return tuple(
        f"{name} {before[name]} -> {after[name]}"
        for name in after
        if name in before and before[name] != after[name]
    )


def _resumed(request: Request) -> tuple[Loaded | None, tuple[str, ...]]:
    checkpoints = Checkpoints(request.run / "checkpoints")
    if request.resume is None:
        _refuse_used(request.run, checkpoints)
        return None, ()
    if request.resume != "latest" and not request.resume.isdecimal():
        raise ConfigError(f"resume must be latest or a step; got {request.resume!r}")
    if not checkpoints.steps():
        if request.resume != "latest":
            raise CheckpointError(f"{request.run} has no checkpoint of step {request.resume}")
        return None, (f"{request.run} has no checkpoint yet: starting at step 0",)
    step = None if request.resume == "latest" else int(request.resume)
    loaded, rejected = checkpoints.read(step)
    _check_fixed(request.run, _table(loaded, "config"), flatten(request.config))
    changed = changes_between(_table(loaded, "config"), flatten(request.config))
    accepted = tuple(f"from step {loaded.step} on: {change}" for change in changed)
    return loaded, (*rejected, *accepted, *_environment_notes(loaded))


def _table(loaded: Loaded, name: str) -> Mapping[str, Any]:
    value = loaded.state.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"state.json of step {loaded.step} lacks {name!r}; use another step")
    return value


def counters_of(loaded: Loaded) -> Mapping[str, Any]:
    """The training counters in a checkpoint's state."""
    return _table(loaded, "counters")


def _refuse_used(run: Path, checkpoints: Checkpoints) -> None:
    if checkpoints.steps():
        raise ConfigError(
            f"{run} already holds step {checkpoints.steps()[-1]}: go on with"
            " --resume-from-checkpoint latest, or choose another --output-dir"
        )
    if (run / "model.safetensors").exists():
        raise ConfigError(f"{run} already holds a model; choose another --output-dir")


def environment() -> dict[str, Any]:
    """What bit-exact resuming depends on besides the files."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _environment_notes(loaded: Loaded) -> tuple[str, ...]:
    changed = changes_between(_table(loaded, "environment"), environment())
    if not changed:
        return ()
    return (f"resumed on a changed machine ({'; '.join(changed)}): not bit for bit the same",)


def _load_data(request: Request) -> images.Data:
    options = data_options(request.config.data)
    source = request.config.data.data if request.data is None else request.data
    return images.load(source, options, RunFolder(request.run).cache)  # pyright: ignore[reportArgumentType] # checked there


def data_options(config: DataConfig) -> images.DataOptions:
    """The border's options for a run's settings."""
    return images.DataOptions(
        resolution=config.resolution,
        channels=config.channels,
        background=config.background,
        random_crop=config.random_crop,
        random_flip=config.random_flip,
        on_bad_image=images.OnBadImage(config.on_bad_image.value),
        val_fraction=config.val_fraction,
    )


def _check_same_data(request: Request, data: images.Data, resumed: Loaded) -> tuple[str, ...]:
    if resumed.state.get("data_fingerprint") == data.fingerprint:
        return ()
    what = _data_difference(request.run, data)
    message = f"{data.source} changed since step {resumed.step}: {what}"
    if not request.accept_data_change:
        raise DataError(f"{message}. --accept-data-change to go on")
    return (message,)


def _data_difference(run: Path, data: images.Data) -> str:
    before = set(read_json(run / "data.json").get("names", []))
    after = set(names_of(data))
    added, removed = sorted(after - before), sorted(before - after)
    if not added and not removed:
        return "the same names, edited pictures"
    first = (added + removed)[0]
    return f"{len(added)} added, {len(removed)} removed (first: {first})"


def names_of(data: images.Data) -> list[str]:
    return sorted((*data.train.names, *data.held_out.names))


def _settle(
    config: RunConfig, data: images.Data, initial: Model | None, resumed: Loaded | None
) -> tuple[RunConfig, UNetSpec]:
    """Settle the preset, which the pictures' size decides where nobody named one."""
    classes = _classes(config.model, data)
    if resumed is not None:
        name = str(_table(resumed, "config")["preset"])
        spec = _resumed_spec(resumed, data, classes)
    elif initial is not None:
        name = _preset_name(config.model, data.train.size)
        spec = _initial_spec(initial, data, classes)
    else:
        name = _preset_name(config.model, data.train.size)
        spec = preset(name, data.train.channels, classes)
    settled = replace(config, model=replace(config.model, preset=name))
    return settled, replace(spec, style=replace(spec.style, dropout=config.model.dropout))


def _preset_name(config: ModelConfig, size: tuple[int, int]) -> str:
    return config.preset or ("tiny" if max(size) <= TINY_UP_TO else "light")


def _refuse_early(config: RunConfig) -> None:
    """What would fail for any pictures of this size, before they are decoded."""
    size = config.data.resolution
    if size is not None:
        _check_memory(preset(_preset_name(config.model, size), 1), config, size)
    elif config.model.preset is not None:
        preset(config.model.preset)


def _classes(config: ModelConfig, data: images.Data) -> int:
    labelled = config.class_conditional and data.train.labels is not None
    return len(data.train.class_names) if labelled else 0


def _resumed_spec(resumed: Loaded, data: images.Data, classes: int) -> UNetSpec:
    """The checkpoint's own network: --init-from may have brought one that no preset names."""
    spec, before = resumed.header.spec, resumed.header.pictures
    was = (before.channels, before.height, before.width, spec.classes)
    now = (data.train.channels, *data.train.size, classes)
    if was != now:
        raise CheckpointError(
            f"pictures are {now} (channels, height, width, classes) here, {was} in step"
            f" {resumed.step}; a changed model is a new run: drop --resume-from-checkpoint"
        )
    return spec


def _initial_spec(initial: Model, data: images.Data, classes: int) -> UNetSpec:
    if initial.spec.in_channels != data.train.channels:
        raise ConfigError(
            f"init_from has {initial.spec.in_channels} channels, the pictures have"
            f" {data.train.channels}; pass --channels {initial.spec.in_channels}"
        )
    if classes == initial.spec.classes:
        return initial.spec
    return initial.spec.with_classes(classes, null=classes > 0)


def _check_memory(spec: UNetSpec, config: RunConfig, size: tuple[int, int]) -> None:
    part = _part_size(config)
    need = cost.training_bytes(spec, *size, part)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ResourceError(
            f"training at resolution {size[0]}x{size[1]} with {part} pictures at once needs about"
            f" {need / 1e9:.0f} GB, this machine has {have / 1e9:.0f} GB; try a smaller"
            " --resolution or --train-batch-size, or more --gradient-accumulation-steps"
        )


def _part_size(config: RunConfig) -> int:
    return math.ceil(config.train.train_batch_size / config.train.gradient_accumulation_steps)


def _build(spec: UNetSpec, seed: int, initial: Model | None) -> UNet:
    """The network with its first weights: a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(keyed(seed, Stream.WEIGHTS, 0).integers(2**63)))
        net = UNet(spec)
    if initial is not None:
        kept, same = dict(initial.net.state_dict()), spec.classes == initial.spec.classes
        if not same:  # another label table: its rows start afresh
            kept = {k: v for k, v in kept.items() if not k.startswith("embedding.labels")}
        net.load_state_dict(kept, strict=same)
    return net


def _choose_runtime(
    config: RunConfig, net: nn.Module, example: Example, resumed: Loaded | None
) -> runtime.Runtime:
    asked = config.runtime
    if resumed is not None and asked.mixed_precision is Precision.AUTO:
        device = next(net.parameters()).device
        return runtime.Runtime(device, bool(resumed.state.get("bf16")), "as in the checkpoint")
    return runtime.decide(asked, net, *example)


def _example(spec: UNetSpec, config: RunConfig, size: tuple[int, int]) -> Example:
    """Shape and labels of one micro-batch, for timing."""
    part = _part_size(config)
    label = torch.zeros(part, dtype=torch.int64) if spec.classes else None
    return (part, spec.in_channels, *size), label


def _meaning(
    config: ModelConfig, data: images.Data, resumed: Loaded | None
) -> tuple[Schedule, Prediction]:
    """What the output means; a checkpoint's sigma_data stays, even if the pictures changed."""
    if resumed is not None:
        return resumed.header.schedule, resumed.header.prediction
    return _schedule(config), _prediction(config, data)


def _meaning_notes(
    initial: Model | None, schedule: Schedule, prediction: Prediction
) -> tuple[str, ...]:
    """Other outputs than the initial weights were made for have to be learned anew."""
    if initial is None:
        return ()
    before = (type(initial.denoiser.prediction), type(initial.denoiser.schedule))
    now = (type(prediction), type(schedule))
    if before == now:
        return ()
    words = [f"{one.__name__} on {other.__name__}" for one, other in (before, now)]
    return (f"init_from predicts {words[0]}, this run {words[1]}: see --prediction-type",)


def _schedule(config: ModelConfig) -> Schedule:
    match config.beta_schedule:
        case BetaSchedule.KARRAS:
            return Karras()
        case BetaSchedule.LINEAR:
            return LinearBetas(config.num_train_timesteps)
        case BetaSchedule.COSINE:
            return Cosine(config.num_train_timesteps)
        case BetaSchedule.FLOW:
            return Flow()


def _prediction(config: ModelConfig, data: images.Data) -> Prediction:
    match config.prediction_type:
        case PredictionType.KARRAS:
            return KarrasPrecond(_spread(data.train))
        case PredictionType.EPSILON:
            return Epsilon(config.num_train_timesteps)
        case PredictionType.SAMPLE:
            return Sample(config.num_train_timesteps)
        case PredictionType.V_PREDICTION:
            return Velocity(config.num_train_timesteps)
        case PredictionType.FLOW:
            return FlowVelocity(config.num_train_timesteps)


def _spread(data: images.Dataset, most: int = 2048) -> float:
    """sigma_data: the standard deviation of the training pixels, to three digits."""
    x0, _ = data.fixed(min(most, len(data)))
    return max(0.01, round(float(x0.double().std()), 3))


def _recipe(
    config: ModelConfig, schedule: Schedule, prediction: Prediction, spec: UNetSpec
) -> Recipe:
    weighting = MinSnr(prediction, config.snr_gamma) if config.snr_gamma else unweighted
    return Recipe(schedule, _level_sampling(config), weighting, spec.classes)


def _level_sampling(config: ModelConfig) -> LevelSampling:
    """The paper's own choice for each schedule."""
    match config.beta_schedule:
        case BetaSchedule.KARRAS:
            return LogNormal(config.p_mean, config.p_std)
        case BetaSchedule.LINEAR | BetaSchedule.COSINE:
            return OnGrid(config.num_train_timesteps)
        case BetaSchedule.FLOW:
            return uniform_t


def _pictures(data: images.Data, spec: UNetSpec) -> Pictures:
    height, width = data.train.size
    names = data.train.class_names if spec.classes else ()
    bits = 16 if data.train.bits == 16 else 8
    return Pictures(height, width, data.train.channels, bits, tuple(names))

"""Everything that is settled, and refused, before a run writes its first file."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse import cost, images, kernels, runtime
from undiffuse.augmentation import PARAMETERS
from undiffuse.checkpoint import Checkpoints, Loaded, Model, Pictures
from undiffuse.config import (
    RECIPES,
    DataConfig,
    GuidanceConfig,
    ModelConfig,
    Precision,
    RunConfig,
    TrainConfig,
    flatten,
    override,
)
from undiffuse.denoiser import Denoiser
from undiffuse.errors import CheckpointError, ConfigError, DataError, ResourceError
from undiffuse.noise import Stream, keyed, keyed_uniform, order
from undiffuse.recipes import PRESETS, preset
from undiffuse.runs import _averages
from undiffuse.runs._folder import RunFolder, check_writable, read_json
from undiffuse.runs._load import load
from undiffuse.runs._meaning import meaning, meaning_notes, recipe_of, settled
from undiffuse.runs._targets import stable_targets
from undiffuse.spec import UNetSpec
from undiffuse.training import Recipe, Source
from undiffuse.unet import UNet

Example = tuple[tuple[int, int, int, int], Tensor | None]

TIMED_PIXELS = 2**16  # in the batch that a step is timed on
AUTOMATIC_PARTS = (1, 2, 4, 8, 16, 32, 64)  # that a batch may be split into unasked
MEMORY_SHARE = 0.8  # of the memory, that the estimate may fill: it is an estimate

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
    "ema_length",
    "ema_second_length",
)


# What a run settles by itself where nobody names it; a resumed run keeps it.
SETTLED = (
    "preset",
    "prediction_type",
    "beta_schedule",
    "gradient_accumulation_steps",
    "ema_second_length",
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
    net: UNet  # on its device
    denoiser: Denoiser
    recipe: Recipe
    pictures: Pictures
    runtime: runtime.Runtime
    recompute: tuple[str, ...]  # layers whose activations are computed again, not kept
    step_seconds: float
    resumed: Loaded | None
    notes: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.request.run)

    @property
    def spec(self) -> UNetSpec:
        return self.net.spec

    @property
    def first_step(self) -> int:
        return 0 if self.resumed is None else self.resumed.step

    @property
    def seconds(self) -> float:
        """What the remaining steps will take, roughly."""
        left = max(0, self.config.train.max_train_steps - self.first_step)
        return left * self.step_seconds

    @property
    def guidance(self) -> dict[str, Any]:
        """What the model says of itself; nothing where nothing is guided."""
        guided = self.spec.style.embedding.null and self.config.guidance != GuidanceConfig()
        return asdict(self.config.guidance) if guided else {}

    @property
    def snapshot_bytes(self) -> int:
        """What the averages that the remaining steps keep will take on the disk, roughly."""
        times = sum(step > self.first_step for step in _averages.snapshot_steps(self.config))
        each = 4 * cost.total_parameters(self.spec)
        return times * len(_averages.lengths_of(self.config)) * each


@dataclass(frozen=True)
class Gathered:
    """The pictures and the settled settings: nothing has been built yet."""

    request: Request
    config: RunConfig
    spec: UNetSpec
    data: images.Data
    device: torch.device
    resumed: Loaded | None
    initial: Model | None
    recompute: tuple[str, ...]
    notes: tuple[str, ...]


def gather(request: Request) -> Gathered:
    """Check the request and load its data; raise whatever stands in the way."""
    check_writable(request.run)
    resumed, notes = _resumed(request)
    start = request.init_from if resumed is None else None
    initial = None if start is None else load(start, device="cpu")
    device = runtime.choose_device(request.config.runtime.device)
    if resumed is None and initial is None:
        _refuse_early(request.config, device)
    data = _load_data(request)
    if resumed is not None:
        notes += _check_same_data(request, data, resumed)
        if request.init_from:
            notes += (f"init_from is not used: going on from step {resumed.step}",)
    wanted = request.config if resumed is None else _filled(request.config, resumed)
    config, spec = _settle(wanted, data, initial, resumed)
    config, recompute = _fit_memory(spec, config, data.train.size, device)
    room = _has_room(spec, config, data.train.size, device, recompute)
    config, told = _averages.settled(config, resumed, room)
    notes += told
    if config.train.parts > wanted.train.parts:
        notes += (_parts_note(config),)
    if recompute and not config.runtime.gradient_checkpointing:
        notes += (_recompute_note(recompute),)
    scale = config.guidance.guidance_scale
    if scale != 1.0 and not spec.style.embedding.null:
        notes += (f"guidance_scale {scale:g} is not used: the network takes no labels",)
    notes = data.notes + notes
    return Gathered(request, config, spec, data, device, resumed, initial, recompute, notes)


def make_plan(gathered: Gathered) -> Plan:
    """Build the network and time a step."""
    config, spec, data, resumed = gathered.config, gathered.spec, gathered.data, gathered.resumed
    net = _build(spec, config.train.seed, gathered.initial)
    runtime.move(net, gathered.device)
    chosen = _choose_runtime(gathered, net)
    schedule, prediction = meaning(config.model, data, resumed, gathered.initial)
    return Plan(
        request=gathered.request,
        config=config,
        data=data,
        net=net,
        denoiser=Denoiser(net, schedule, prediction),
        recipe=_with_targets(
            recipe_of(config.model, schedule, prediction, spec, config.train.augment), config, data
        ),
        pictures=_pictures(data, spec),
        runtime=chosen,
        recompute=gathered.recompute,
        step_seconds=chosen.seconds * config.train.train_batch_size,
        resumed=resumed,
        notes=(*gathered.notes, *meaning_notes(gathered.initial, schedule, prediction)),
    )


def _with_targets(recipe: Recipe, config: RunConfig, data: images.Data) -> Recipe:
    if not config.train.stable_targets:
        return recipe
    return replace(recipe, aim=stable_targets(data.train, recipe.classes))


def _parts_note(config: RunConfig) -> str:
    train = config.train
    return (
        f"{train.train_batch_size} pictures at once do not fit in memory:"
        f" computed in {train.parts} parts (--gradient-accumulation-steps {train.parts})"
    )


def _recompute_note(recompute: tuple[str, ...]) -> str:
    return (
        f"one picture does not fit in memory with all that its backward pass wants: computing"
        f" {len(recompute)} layers again instead (--gradient-checkpointing does so for all)"
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
        if before.get(name, after[name]) != after[name]:  # an older run may lack it
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
    stored, asked = _table(loaded, "config"), flatten(_filled(request.config, loaded))
    _check_fixed(request.run, stored, asked)
    changed = changes_between(stored, asked)
    accepted = tuple(f"from step {loaded.step} on: {change}" for change in changed)
    return loaded, (*rejected, *accepted, *_environment_notes(loaded))


def _table(loaded: Loaded, name: str) -> Mapping[str, Any]:
    value = loaded.state.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"state.json of step {loaded.step} lacks {name!r}; use another step")
    return value


def _filled(config: RunConfig, loaded: Loaded) -> RunConfig:
    """The settings with those that the run settled by itself, where they are not named."""
    stored, asked = _table(loaded, "config"), flatten(config)
    return override(config, {n: stored[n] for n in SETTLED if asked[n] is None and n in stored})


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
        "kernels": kernels.why_not() or kernels.describe(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
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
    classes, told = _classes(config.model, data), _told(config.train)
    if resumed is not None:
        name, spec = config.model.preset, _resumed_spec(resumed, data, classes, told)
    elif initial is not None:
        spec = _initial_spec(initial, data, classes, told)
        name = _name_of(spec, config.model)
    else:
        name = _preset_name(config.model, data.train.size)
        spec = preset(name, data.train.channels, classes, augment=told)
    model = config.model if resumed is not None else settled(config.model, initial)
    named = replace(config, model=replace(model, preset=name))
    return named, replace(spec, style=replace(spec.style, dropout=config.model.dropout))


def _preset_name(config: ModelConfig, size: tuple[int, int]) -> str:
    return config.preset or ("tiny" if max(size) <= TINY_UP_TO else "light")


def _refuse_early(config: RunConfig, device: torch.device) -> None:
    """What would fail for any pictures of this size, before they are decoded."""
    _check_preset(config.model.preset)
    settled(config.model, None)
    size, told = config.data.resolution, _told(config.train)
    if size is not None:
        spec = preset(_preset_name(config.model, size), 1, augment=told)
        _fit_memory(spec, config, size, device)
    elif config.model.preset is not None:
        preset(config.model.preset, augment=told)


def _check_preset(name: str | None) -> None:
    """Recipes have been spelled out by now; here they are only suggested."""
    if name is None or name in PRESETS:
        return
    near = difflib.get_close_matches(name, [*PRESETS, *RECIPES], 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"no preset is called {name!r}. {hint}There are networks: {', '.join(PRESETS)};"
        f" and whole recipes: {', '.join(RECIPES)}"
    )


def _classes(config: ModelConfig, data: images.Data) -> int:
    labelled = config.class_conditional and data.train.labels is not None
    return len(data.train.class_names) if labelled else 0


def _told(config: TrainConfig) -> int:
    """How many numbers the network must hear of what is done to the pictures."""
    return PARAMETERS if config.augment else 0


def _resumed_spec(resumed: Loaded, data: images.Data, classes: int, told: int) -> UNetSpec:
    """The checkpoint's own network: --init-from may have brought one that no preset names."""
    spec, before = resumed.header.spec, resumed.header.pictures
    was = (before.channels, before.height, before.width, spec.classes)
    now = (data.train.channels, *data.train.size, classes)
    if was != now:
        raise CheckpointError(
            f"pictures are {now} (channels, height, width, classes) here, {was} in step"
            f" {resumed.step}; a changed model is a new run: drop --resume-from-checkpoint"
        )
    if told and spec.augment != told:
        raise CheckpointError(
            f"augment is above 0 here, but the network of step {resumed.step} is not told of it;"
            " a changed model is a new run: drop --resume-from-checkpoint"
        )
    return spec


def _name_of(spec: UNetSpec, config: ModelConfig) -> str | None:
    """The preset that a spec is, or None.

    Raises:
        ConfigError: another one was asked for.
    """
    plain = spec.with_classes(0, null=False).with_augment(0)
    plain = replace(plain, style=replace(plain.style, dropout=0.0))
    same = (name for name in PRESETS if preset(name, spec.in_channels) == plain)
    found = next(same, None)
    if config.preset not in (None, found):
        raise ConfigError(
            f"preset {config.preset} is not the network of init_from ({found or 'no preset'});"
            " leave --preset out"
        )
    return found


def _initial_spec(initial: Model, data: images.Data, classes: int, told: int) -> UNetSpec:
    """What it hears of augmentation it keeps, used or not."""
    if initial.spec.in_channels != data.train.channels:
        raise ConfigError(
            f"init_from has {initial.spec.in_channels} channels, the pictures have"
            f" {data.train.channels}; pass --channels {initial.spec.in_channels}"
        )
    before = initial.spec.augment
    if told and before not in (0, told):
        raise ConfigError(
            f"init_from is told {before} numbers of each transformation, these are {told};"
            " leave --augment out"
        )
    return initial.spec.with_classes(classes, null=classes > 0).with_augment(before or told)


def _fit_memory(
    spec: UNetSpec, config: RunConfig, size: tuple[int, int], device: torch.device
) -> tuple[RunConfig, tuple[str, ...]]:
    """Settle in how many parts a batch is computed, and which layers are computed twice.

    Parts as asked, or as few as fit in memory; layers again only where that is not enough, and as
    few as needed.

    Raises:
        ResourceError: the parts asked for, or single pictures, do not fit even so.
    """
    train, have = config.train, runtime.memory(device) or math.inf
    layers = tuple(cost.recomputable(spec, *size))
    always = layers if config.runtime.gradient_checkpointing else ()
    asked = train.gradient_accumulation_steps
    few = (parts for parts in AUTOMATIC_PARTS if parts <= train.train_batch_size)
    tried = [
        replace(train, gradient_accumulation_steps=parts)
        for parts in (few if asked is None else (asked,))
    ]
    ways = [(one, always) for one in tried]
    ways += [(tried[-1], layers[: n + 1]) for n in range(len(always), len(layers))]
    least = cost.training_bytes(spec, *size, tried[-1].part_size, layers)
    if least >= MEMORY_SHARE * have:
        raise _too_large(config, size, tried[-1].parts, least, have)
    fit = (
        (one, again)
        for one, again in ways
        if cost.training_bytes(spec, *size, one.part_size, again) < MEMORY_SHARE * have
    )
    one, again = next(fit, (tried[-1], layers))
    return replace(config, train=one), again


def _has_room(
    spec: UNetSpec,
    config: RunConfig,
    size: tuple[int, int],
    device: torch.device,
    again: tuple[str, ...],
) -> bool:
    """Whether a second average fits beside all else; the estimate has neither in it."""
    need = cost.training_bytes(spec, *size, config.train.part_size, again)
    have = runtime.memory(device) or math.inf
    return need + 8 * cost.total_parameters(spec) < MEMORY_SHARE * have


def _too_large(
    config: RunConfig, size: tuple[int, int], parts: int, need: float, have: float
) -> ResourceError:
    return ResourceError(
        f"train_batch_size {config.train.train_batch_size} at resolution {size[0]}x{size[1]} in"
        f" {parts} parts needs about {need / 1e9:.0f} GB, this machine has"
        f" {have / 1e9:.0f} GB; try a smaller --train-batch-size, --resolution or --preset, or more"
        " --gradient-accumulation-steps"
    )


def _build(spec: UNetSpec, seed: int, initial: Model | None) -> UNet:
    """The network with its first weights: a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(keyed(seed, Stream.WEIGHTS, 0).integers(2**63)))
        net = UNet(spec)
    if initial is not None:
        kept = dict(initial.net.state_dict())
        same = spec.style.embedding == initial.spec.style.embedding
        if not _same_labels(spec, initial.spec):  # another table: its rows start afresh
            kept = {k: v for k, v in kept.items() if not k.startswith("embedding.labels")}
        net.load_state_dict(kept, strict=same)
    return net


def _same_labels(one: UNetSpec, other: UNetSpec) -> bool:
    return one.with_augment(0).style.embedding == other.with_augment(0).style.embedding


def _choose_runtime(gathered: Gathered, net: UNet) -> runtime.Runtime:
    config, resumed = gathered.config, gathered.resumed
    example = _example(gathered.spec, config, gathered.data.train.size)
    if resumed is None or config.runtime.mixed_precision is not Precision.AUTO:
        return runtime.decide(config.runtime, net, *example, gathered.recompute)
    stored = Precision.BF16 if resumed.state.get("bf16") else Precision.NO
    asked = replace(config.runtime, mixed_precision=stored)
    chosen = runtime.decide(asked, net, *example, gathered.recompute)
    return replace(chosen, reason="as in the checkpoint")


def _example(spec: UNetSpec, config: RunConfig, size: tuple[int, int]) -> Example:
    """Shape and labels of a micro-batch for timing, of few pictures if they are large."""
    part = max(1, min(config.train.part_size, TIMED_PIXELS // (size[0] * size[1])))
    label = torch.zeros(part, dtype=torch.int64) if spec.classes else None
    return (part, spec.in_channels, *size), label


def _pictures(data: images.Data, spec: UNetSpec) -> Pictures:
    height, width = data.train.size
    names = data.train.class_names if spec.classes else ()
    bits = 16 if data.train.bits == 16 else 8
    return Pictures(height, width, data.train.channels, bits, tuple(names))

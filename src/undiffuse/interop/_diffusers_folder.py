"""Folders of diffusers: a model alone, a pipeline, a checkpoint of its training script."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from torch import Tensor

from undiffuse.denoiser import Prediction
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.interop._diffusers import (
    Exported,
    check_config,
    diffusers_rules,
    from_diffusers,
    to_diffusers,
)
from undiffuse.interop._diffusers_json import SHORT, Config, read_json
from undiffuse.interop._weights import Imported, Tensors, net_shapes, write_weights
from undiffuse.noise import Schedule
from undiffuse.spec import UNetSpec

ReadTensors = Callable[[Path], Tensors]

CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model"


class Pipeline(StrEnum):
    """The pipelines of diffusers that run a `UNet2DModel` without labels."""

    DDPM = "DDPMPipeline"
    DDIM = "DDIMPipeline"


def write_diffusers(
    folder: str | Path,
    spec: UNetSpec,
    weights: Tensors,
    schedule: Schedule,
    prediction: Prediction,
    size: tuple[int, int] | None = None,
    pipeline: Pipeline | None = None,
) -> Exported:
    """Write a folder that diffusers reads with `from_pretrained`, whole or not at all.

    Args:
        folder: does not exist yet, or is empty; the folder it lies in exists.
        weights: under our names, complete; their precision is kept.
        size: as for `to_diffusers`; a pipeline needs it.
        pipeline: for `Pipeline.from_pretrained`: the model in `unet/`. None: the model alone, with
            the scheduler's configuration beside it.

    Returns:
        What was written, with notes.

    Raises:
        ConfigError: diffusers cannot express it, `weights` are not those of `spec`, or `folder`
            holds something.
        ResourceError: the disk refused.
    """
    exported = to_diffusers(spec, schedule, prediction, size)
    if pipeline is not None:
        exported = _for_pipeline(exported, spec, pipeline)
    theirs = write_weights(diffusers_rules(spec, exported.unet), _complete(spec, weights))
    folder = Path(folder)
    try:
        _write_whole(folder, lambda place: _fill(place, exported, theirs, pipeline))
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written: {error.strerror or error}") from error
    return exported


def _for_pipeline(exported: Exported, spec: UNetSpec, pipeline: Pipeline) -> Exported:
    """The same with the pipeline's own scheduler, if it can run this network."""
    kind = exported.scheduler["_class_name"]
    if spec.classes:
        reason = f"{spec.classes} classes, and {pipeline} passes no labels"
    elif kind != "DDPMScheduler":
        reason = f"schedule and prediction of a {kind}, whose input {pipeline} does not scale"
    elif spec.in_channels != spec.out_channels:
        reason = f"{spec.out_channels} channels out of {spec.in_channels}: use `mean_only`"
    elif exported.unet["sample_size"] is None:
        reason = f"no size, and {pipeline} needs one: pass size"
    else:
        name = {Pipeline.DDPM: "DDPMScheduler", Pipeline.DDIM: "DDIMScheduler"}[pipeline]
        return replace(exported, scheduler={**exported.scheduler, "_class_name": name})
    raise ConfigError(
        f"pipeline {pipeline}: the network has {reason}; or write it without pipeline"
    )


def _complete(spec: UNetSpec, weights: Tensors) -> Tensors:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = net_shapes(spec)
    for name in sorted({*shapes, *wanted}):
        have, want = shapes.get(name), wanted.get(name)
        if have != want:
            raise ConfigError(f"weights: {name} has shape {have}; the spec's network has {want}")
    return weights


def _fill(place: Path, exported: Exported, theirs: Tensors, pipeline: Pipeline | None) -> None:
    model, scheduler = place, place
    if pipeline is not None:
        model, scheduler = place / "unet", place / "scheduler"
        model.mkdir()
        scheduler.mkdir()
        index: dict[str, object] = {"_class_name": pipeline.value}
        index["scheduler"] = ["diffusers", exported.scheduler["_class_name"]]
        index["unet"] = ["diffusers", "UNet2DModel"]
        _write_json(place / INDEX, index)
    _write_json(model / CONFIG, exported.unet)
    _write_json(scheduler / SCHEDULER, exported.scheduler)
    # Rows of one tensor of ours are three of theirs; safetensors wants memory of their own.
    apart = {name: tensor.detach().clone() for name, tensor in theirs.items()}
    save_file(apart, model / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, values: Config) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside `folder`, then give it its name."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} exists and is no folder; name one that does not exist")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; name a folder that does not exist")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        fill(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# --- reading ------------------------------------------------------------------------------------

_SUFFIXES = (".safetensors", ".bin")
_VARIANTS = ("", ".fp16", ".bf16")


def read_diffusers_folder(folder: str | Path, read_tensors: ReadTensors) -> Imported:
    """A folder of diffusers: of a pipeline, of a training checkpoint, or of the model alone.

    Averaged weights (`unet_ema/`) go before raw ones (`unet/`), safetensors before torch files,
    full before half precision.

    Args:
        read_tensors: reads one file of weights.

    Raises:
        CheckpointError: a file is missing or damaged, or holds what cannot be expressed.
    """
    folder = Path(folder)
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else None
    if index is not None:
        _check_pipeline(index, folder / INDEX)
    model = _model_folder(folder)
    notes = () if model.name != "unet_ema" else ("weights are the averaged ones of unet_ema/",)
    config = read_json(model / CONFIG)
    check_config(config)  # before gigabytes of weights are read
    scheduler = _read_scheduler(folder, required=index is not None)
    imported = from_diffusers(config, _read_files(model, read_tensors), scheduler)
    return replace(imported, notes=(*notes, *imported.notes))


def _check_pipeline(index: Config, path: Path) -> None:
    """Refuse pipelines in which the network works on something other than pictures."""
    kind = SHORT.repr(index.get("_class_name"))
    parts = {name for name in index if not name.startswith("_") and index[name] is not None}
    others = parts - {"unet", "unet_ema", "scheduler"}
    if others:
        raise CheckpointError(
            f"{path}: _class_name is {kind}, a pipeline with {min(others)}; only pipelines of unet"
            " and scheduler can be imported"
        )
    unet = index.get("unet")
    if not isinstance(unet, list) or unet[1:] != ["UNet2DModel"]:
        raise CheckpointError(f"{path}: unet is {SHORT.repr(unet)}; only a UNet2DModel is read")


def _model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name the one with {CONFIG} or {INDEX}")
    for place in (folder / "unet_ema", folder / "unet", folder):
        if (place / CONFIG).exists():
            return place
    raise CheckpointError(f"{folder}: {CONFIG} of a UNet2DModel is missing, here and in unet/")


def _read_scheduler(folder: Path, required: bool) -> Config | None:
    places = (folder / "scheduler" / SCHEDULER, folder / SCHEDULER)
    for path in places:
        if path.exists():
            return read_json(path)
    if required:
        raise CheckpointError(f"{places[0]} is missing")
    return None


def _read_files(model: Path, read_tensors: ReadTensors) -> Tensors:
    for suffix in _SUFFIXES:
        for variant in _VARIANTS:
            whole = model / f"{WEIGHTS}{variant}{suffix}"
            if whole.exists():
                return read_tensors(whole)
            shards = model / f"{WEIGHTS}{suffix}.index{variant}.json"
            if shards.exists():
                return _read_shards(shards, read_tensors)
    names = ", ".join(f"{WEIGHTS}{suffix}" for suffix in _SUFFIXES)
    raise CheckpointError(f"{model}: the weights are missing; there is neither of {names}")


def _read_shards(path: Path, read_tensors: ReadTensors) -> Tensors:
    found, places = dict[str, Tensor](), _weight_map(path)
    files = sorted(set(places.values()))
    for file in files:
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path.parent / file} is missing, which {path.name} names")
    for file in files:
        shard = read_tensors(path.parent / file)
        for name, tensor in shard.items():
            if places.get(name) != file:
                raise CheckpointError(f"{path}: does not say that {name} is in {file}")
            found[name] = tensor
    missing = set(places) - set(found)
    if missing:
        raise CheckpointError(f"{path}: {min(missing)} is not in {places[min(missing)]}")
    return found


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor to file, where a file is a plain name in the same folder."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: weight_map must be an object; got {SHORT.repr(places)}")
    for file in cast(dict[str, object], places).values():
        plain = isinstance(file, str) and file == Path(file).name and "\\" not in file
        if not plain or file in ("", ".."):
            raise CheckpointError(f"{path}: {SHORT.repr(file)} is no name of a file beside it")
    return cast(dict[str, str], places)

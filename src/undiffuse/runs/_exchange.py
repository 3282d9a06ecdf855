"""Networks of other projects: in as a model of ours, and out in forms that others run."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from undiffuse import interop
from undiffuse.checkpoint import JSON, Model, Pictures, encode
from undiffuse.config import (
    ExportConfig,
    ExportFormat,
    ForeignFormat,
    ImportConfig,
    Weights,
    changed,
    suggestion,
)
from undiffuse.denoiser import Denoiser
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.spec import UNetSpec

DIFFUSERS_LIMIT = 1e-4  # of the outputs; two implementations in float32


@dataclass(frozen=True)
class ImportedModel:
    """A model from elsewhere, and what a user should know about it, a line each."""

    model: Model
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ExportedModel:
    """What was written.

    Args:
        files: or the one folder.
        difference: of its outputs from ours in float32, max |a - b| / max |b|; None if unchecked.
        notes: a line each.
    """

    files: tuple[Path, ...]
    difference: float | None
    notes: tuple[str, ...]


# --- in -----------------------------------------------------------------------------------------


def import_model(
    path: str | Path, config: ImportConfig | None = None, **settings: object
) -> ImportedModel:
    """A trained network of another project as a model, ready for `generate` and `save_model`.

    Args:
        path: a folder of diffusers with a `UNet2DModel`, or a file of weights (safetensors, or
            what `torch.save` has written) of OpenAI's improved- or guided-diffusion, of
            denoising-diffusion-pytorch, or of EDM.
        settings: any option of `undiffuse import`, with underscores: like="adm-64",
            resolution=64, weights="raw" ...

    Raises:
        CheckpointError: the file is damaged, or holds what cannot be expressed, by name.
        ConfigError: the weights leave something open that the settings do not say.
    """
    path, options = Path(path), _options(config or ImportConfig(), settings)
    files = list[Path]()
    imported = interop.mean_only(_read(path, options, files))
    size = options.resolution or imported.size
    if size is None:
        raise ConfigError(
            "resolution is missing: the file does not say how large its pictures are; pass"
            " --resolution N, such as 64"
        )
    net = imported.net().float()
    denoiser = Denoiser(net, imported.schedule, imported.prediction)
    facts: dict[str, JSON] = {
        "origin": imported.origin,
        "source": " ".join(file.relative_to(path.parent).as_posix() for file in files),
        "sha256": " ".join(_fingerprint(file) for file in files),
        "notes": " · ".join(imported.notes),
    }
    pictures = Pictures(*size, imported.spec.in_channels)
    return ImportedModel(Model(denoiser, pictures, facts), imported.notes)


def _options(config: ImportConfig, settings: Mapping[str, object]) -> ImportConfig:
    _check_known(settings, {one.name for one in fields(ImportConfig)})
    return changed(config, settings)


def _check_known(settings: Mapping[str, object], known: Collection[str]) -> None:
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{suggestion(name, known)}")


def _fingerprint(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(path: Path, options: ImportConfig, files: list[Path]) -> interop.Imported:
    """The network; `files` gets the files of weights that were read."""

    def tensors_of(file: Path) -> Mapping[str, Tensor]:
        files.append(file)
        return interop.read_tensors(file).tensors

    kind = options.format
    if path.is_dir() and kind in (ForeignFormat.AUTO, ForeignFormat.DIFFUSERS):
        _refuse_others(options, ForeignFormat.DIFFUSERS)
        _check_diffusers_weights(path, options.weights)
        return interop.read_diffusers_folder(path, tensors_of)
    if kind is ForeignFormat.DIFFUSERS:
        raise ConfigError(f"format diffusers is a folder with config.json; {path} is none")
    foreign = interop.read_tensors(path)
    files.append(path)
    if str(foreign.numbers.get("format", "")).startswith("undiffuse "):
        raise ConfigError(
            f"{path} is a model file of undiffuse already; there is nothing to import"
        )
    chosen = interop.choose_weights(foreign, interop.Weights(options.weights.value))
    kind = _detect(chosen.tensors, path) if kind is ForeignFormat.AUTO else kind
    _refuse_others(options, kind)
    imported = _READERS[kind](chosen.tensors, options)
    return replace(imported, notes=(chosen.note, *imported.notes))


def _check_diffusers_weights(folder: Path, weights: Weights) -> None:
    """`unet_ema/` is read where it is there; what is in `unet/` may be of either kind."""
    if weights is Weights.RAW and (folder / "unet_ema").is_dir():
        raise ConfigError(
            f"weights raw: {folder} holds averaged weights in unet_ema/, which are the ones that"
            " are read; for those of unet/ copy the folder without unet_ema/"
        )


_SIGNS: Mapping[ForeignFormat, str] = {
    ForeignFormat.OPENAI: r"(input_blocks|output_blocks|time_embed)\.",
    ForeignFormat.LUCIDRAINS: r"(model\.)?(init_conv|time_mlp|final_res_block)\.",
    ForeignFormat.EDM: r"(model\.)?((enc|dec)\.\d+x\d+_|map_(layer|label|noise|augment))",
    ForeignFormat.DIFFUSERS: r"(down_blocks|up_blocks|mid_block|time_embedding)\.",
}


def _detect(names: Collection[str], path: Path) -> ForeignFormat:
    """Whose names these are."""
    for kind, sign in _SIGNS.items():
        if any(re.match(sign, name) for name in names):
            if kind is ForeignFormat.DIFFUSERS:
                raise ConfigError(
                    f"{path} holds weights of diffusers, whose network is in the config.json"
                    " beside them: name the folder"
                )
            return kind
    known = ", ".join(kind.value for kind in _SIGNS)
    first = ", ".join(interop.short(name) for name in sorted(names)[:3])
    raise CheckpointError(
        f"{path}: tensors such as {first} belong to no network that is known here ({known})"
    )


# Which of the options mean something for which of the formats; the rest do for all.
_BELONGING: Mapping[str, tuple[ForeignFormat, ...]] = {
    "like": (ForeignFormat.OPENAI,),
    "num_heads": (ForeignFormat.OPENAI,),
    "num_head_channels": (ForeignFormat.OPENAI, ForeignFormat.EDM),
    "use_new_attention_order": (ForeignFormat.OPENAI,),
    "noise_schedule": (ForeignFormat.OPENAI,),
    "num_train_timesteps": (ForeignFormat.OPENAI,),
    "rescale_timesteps": (ForeignFormat.OPENAI,),
    "predict_xstart": (ForeignFormat.OPENAI,),
}


def _refuse_others(options: ImportConfig, kind: ForeignFormat) -> None:
    """An option that would have no effect is a mistake of the one who typed it."""
    for name, kinds in _BELONGING.items():
        value: object = getattr(options, name)
        if value is not None and kind not in kinds:
            owners = " and ".join(one.value for one in kinds)
            raise ConfigError(
                f"{name} is for networks of {owners}; got {value} with one of {kind.value}, which"
                " says so itself"
            )


def _openai(tensors: Mapping[str, Tensor], options: ImportConfig) -> interop.Imported:
    schedule = options.noise_schedule
    given = interop.OpenAIOptions(
        num_heads=options.num_heads,
        num_head_channels=options.num_head_channels,
        use_new_attention_order=options.use_new_attention_order,
        diffusion_steps=options.num_train_timesteps,
        noise_schedule=None if schedule is None else interop.NoiseSchedule(schedule.value),
        rescale_timesteps=options.rescale_timesteps,
        predict_xstart=options.predict_xstart,
    )
    return interop.from_openai(tensors, given, options.like)


def _lucidrains(tensors: Mapping[str, Tensor], options: ImportConfig) -> interop.Imported:
    return interop.from_lucidrains(tensors, options.resolution)


def _edm(tensors: Mapping[str, Tensor], options: ImportConfig) -> interop.Imported:
    each = options.num_head_channels
    given = interop.EDMOptions() if each is None else interop.EDMOptions(channels_per_head=each)
    return interop.from_edm(tensors, given)


_READERS: Mapping[
    ForeignFormat, Callable[[Mapping[str, Tensor], ImportConfig], interop.Imported]
] = {
    ForeignFormat.OPENAI: _openai,
    ForeignFormat.LUCIDRAINS: _lucidrains,
    ForeignFormat.EDM: _edm,
}


# --- out ----------------------------------------------------------------------------------------


def export_model(
    model: Model, path: str | Path, config: ExportConfig | None = None, **settings: object
) -> ExportedModel:
    """Write a model in a form that others run.

    Args:
        path: a folder for diffusers, else a file; it appears whole or not at all.
        settings: any option of `undiffuse export`, with underscores: format="onnx",
            check=False, force=True ...

    Raises:
        ConfigError: the form cannot express this network, which the message names; or `path` is
            taken.
        CheckpointError: the check has failed; nothing was written.
        ResourceError: the disk refused.
    """
    _check_known(settings, {one.name for one in fields(ExportConfig)})
    options, path = changed(config or ExportConfig(), settings), Path(path)
    kind = options.format or format_of(path)
    if options.pipeline is not None and kind is not ExportFormat.DIFFUSERS:
        raise ConfigError(f"pipeline is for format diffusers; got it with {kind.value}")
    if kind is not ExportFormat.DIFFUSERS and path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")
    for target in _targets(kind, path):
        check_free(target, options.force and kind is not ExportFormat.DIFFUSERS)
    return _WRITERS[kind](model, path, options)


def _targets(kind: ExportFormat, path: Path) -> tuple[Path, ...]:
    """All that may be written; the weights of a large graph of ONNX stand beside it."""
    beside = (path.with_name(f"{path.name}.data"),) if kind is ExportFormat.ONNX else ()
    return (path, *beside)


def format_of(path: Path) -> ExportFormat:
    """By the ending of the name; a name without one is a folder of diffusers.

    Raises:
        ConfigError: the ending is that of several formats, or of none.
    """
    endings = {
        "": ExportFormat.DIFFUSERS,
        ".onnx": ExportFormat.ONNX,
        ".pt2": ExportFormat.PT2,
    }
    ending = path.suffix.lower()
    if ending not in endings:
        known = ", ".join(kind.value for kind in ExportFormat)
        raise ConfigError(f"{path} does not say its format; pass --format, one of {known}")
    return endings[ending]


def check_free(path: Path, force: bool) -> None:
    """Refuse to write over what is there; `force` allows it for files.

    Raises:
        ConfigError: naming the path.
    """
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path} is a folder that is not empty; name one that does not exist")
    if path.exists() and not path.is_dir() and not force:
        raise ConfigError(f"{path} exists; name another file, or pass --force to replace a file")


def _size(model: Model) -> tuple[int, int]:
    return model.pictures.height, model.pictures.width


def metadata(model: Model) -> dict[str, str]:
    """What somebody who runs the bare network has to know, as texts."""
    pictures, embedding = model.pictures, model.spec.style.embedding
    facts = {
        "prediction": json.dumps(encode(model.denoiser.prediction)),
        "schedule": json.dumps(encode(model.denoiser.schedule)),
        "size": f"{pictures.height}x{pictures.width}",
        "range": "-1 ... 1",
        "class_names": json.dumps(pictures.class_names),
        "trained": json.dumps(dict(model.trained)),
    }
    return facts | ({"no_class_label": str(embedding.classes)} if embedding.null else {})


Export = Callable[..., interop.Graph]


def _graph(export: Export, model: Model, path: Path, options: ExportConfig) -> ExportedModel:
    graph = export(path, model.net, _size(model), metadata(model), options.check)
    return ExportedModel(graph.files, graph.difference, tuple(_graph_notes(model, graph)))


def _graph_notes(model: Model, graph: interop.Graph) -> Iterator[str]:
    height, width = _size(model)
    if graph.multiple is None:
        yield (
            f"pictures must have {height}x{width}, any number of them at once: only sizes that"
            f" {model.net.stride} divides, from {2 * model.net.stride} on, can be left free"
        )
    if len(graph.files) > 1:
        yield f"the weights are in {graph.files[1].name}; keep both files together"


def _diffusers(model: Model, path: Path, options: ExportConfig) -> ExportedModel:
    notes = list[str]()
    denoiser, size = model.denoiser, _diffusers_size(model, notes)
    configs = interop.to_diffusers(model.spec, denoiser.schedule, denoiser.prediction, size)
    pipeline = _pipeline(model, configs, options.pipeline, notes)
    check = options.check and _can_check(notes)

    def fill(folder: Path) -> float | None:
        meaning = denoiser.schedule, denoiser.prediction
        interop.write_diffusers(folder, model.spec, _weights(model), *meaning, size, pipeline)
        if not check:
            return None
        return interop.difference_diffusers(folder, interop.plain(model.net), _tried(model))

    files, difference = interop.placed(path, fill, DIFFUSERS_LIMIT, force=False)
    return ExportedModel(files, difference, (*notes, *configs.notes))


def _weights(model: Model) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in model.net.state_dict().items()}


def _diffusers_size(model: Model, notes: list[str]) -> tuple[int, int] | None:
    """diffusers does not pad."""
    size, stride = _size(model), model.net.stride
    if any(side % stride for side in size):
        notes.append(
            f"sample_size is left out: diffusers takes only multiples of {stride}, and pictures"
            f" have {size[0]}x{size[1]}"
        )
        return None
    return size


def _tried(model: Model) -> tuple[int, int]:
    """The next size from the model's that diffusers takes."""
    height, width = (side + -side % model.net.stride for side in _size(model))
    return height, width


def _can_check(notes: list[str]) -> bool:
    if find_spec("diffusers") is None:
        notes.append(
            'not compared with diffusers, which is not installed: pip install "undiffuse'
            '[diffusers]"'
        )
        return False
    return True


def _pipeline(
    model: Model, configs: interop.Exported, wanted: bool | None, notes: list[str]
) -> interop.Pipeline | None:
    """DDPMPipeline unless that is not wanted or, where nobody asked, not possible."""
    kind = configs.scheduler["_class_name"]
    hindrances = {
        "DDPMPipeline passes no labels": model.spec.classes > 0,
        f"DDPMPipeline does not scale its input as {kind} has to": kind != "DDPMScheduler",
        "DDPMPipeline needs a sample_size": configs.unet["sample_size"] is None,
    }
    found = [words for words, there in hindrances.items() if there]
    if wanted is False or (found and wanted is None):
        notes += [f"the model and its scheduler alone: {words}" for words in found]
        return None
    return interop.Pipeline.DDPM


def _state_dict(
    convert: Callable[[UNetSpec, Mapping[str, Tensor]], Mapping[str, Tensor]],
    model: Model,
    path: Path,
    options: ExportConfig,
) -> ExportedModel:
    # Nothing runs here that the outputs could be compared with: options.check has no meaning.
    tensors = convert(model.spec, _weights(model))
    written = interop.write_state_dict(path, tensors, options.force)
    denoiser = model.denoiser
    notes = (
        "a state dict in safetensors; not compared, for nothing here runs it",
        f"it does not say what the outputs mean: {denoiser.prediction}, {denoiser.schedule}",
    )
    return ExportedModel((written,), None, notes)


_WRITERS: Mapping[ExportFormat, Callable[[Model, Path, ExportConfig], ExportedModel]] = {
    ExportFormat.DIFFUSERS: _diffusers,
    ExportFormat.ONNX: partial(_graph, interop.export_onnx),
    ExportFormat.PT2: partial(_graph, interop.export_program),
    ExportFormat.OPENAI: partial(_state_dict, interop.to_openai),
    ExportFormat.LUCIDRAINS: partial(_state_dict, interop.to_lucidrains),
}

"""`import` and `export`: networks of other projects in, ours out."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from undiffuse import cost, runs
from undiffuse.checkpoint import Model, save_model
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._options import Given, checkpoint, weights
from undiffuse.cli._output import Output
from undiffuse.cli._train import say_next
from undiffuse.config import Device, ExportConfig, ExportFormat, ImportConfig
from undiffuse.errors import ConfigError

NAMES = {
    ExportFormat.DIFFUSERS: "diffusers",
    ExportFormat.ONNX: "model.onnx",
    ExportFormat.PT2: "model.pt2",
    ExportFormat.OPENAI: "openai.safetensors",
    ExportFormat.LUCIDRAINS: "denoising-diffusion-pytorch.safetensors",
}


def import_(arguments: Arguments, out: Output) -> int:
    """`undiffuse import`: foreign weights to a model file."""
    given = arguments.given
    config = arguments.section(ImportConfig())
    source = Path(given["path"])
    path = Path(given["output"]) if "output" in given else _default_model(source)
    _check_apart(path, (source,))
    runs.check_free(path, config.force)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file, such as {path / 'model.safetensors'}")
    runs.check_writable(path.parent)
    imported = runs.import_model(source, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, imported.model)
    for note in imported.notes:
        out.warn(note)
    _say_model(imported.model, path, out)
    return 0


def _default_model(source: Path) -> Path:
    """A run folder of its own, under the name of the source."""
    place = source.resolve()
    own = place.name if place.is_dir() else place.stem  # the dot of my.v2/ begins no ending
    name = re.sub(r"[^\w-]+", "-", own).strip("-") or "imported"
    return Path("runs") / name / "model.safetensors"


def _check_apart(path: Path, sources: Iterable[Path]) -> None:
    """What is read is never written over, not even with --force."""
    for source in sources:
        if _is_same(path, source) or path.resolve().is_relative_to(source.resolve()):
            raise ConfigError(
                f"{path} is, or lies in, what is read ({source}), which --force does not replace"
                " either; name another place with -o"
            )


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _say_model(model: Model, path: Path, out: Output) -> None:
    size, parameters = model.pictures, cost.total_parameters(model.spec)
    origin = str(model.trained["origin"])
    classes = f", {model.spec.classes:,} classes" if model.spec.classes else ""
    out.say(
        f"{origin}: {parameters:,} parameters, pictures of"
        f" {size.channels}x{size.height}x{size.width}{classes}"
    )
    out.say(f"  model    {path}")
    say_next((f"undiffuse sample {shlex.quote(str(path))}",), out)
    out.result(
        "import",
        file=path.as_posix(),
        origin=origin,
        parameters=parameters,
        size=[size.height, size.width],
        channels=size.channels,
        classes=model.spec.classes,
        sha256=model.trained["sha256"],
    )


def export(arguments: Arguments, out: Output) -> int:
    """`undiffuse export`: a model for other programs."""
    given = arguments.given
    config = arguments.section(ExportConfig())
    path = _output(given, config)
    _check_apart(path, _loaded_from(Path(given["run"])))
    runs.check_free(path, config.force)
    model = runs.load(given["run"], weights(given), checkpoint(given), Device.CPU)
    exported = runs.export_model(model, path, config)
    for note in exported.notes:
        out.warn(note)
    for file in exported.files:
        out.say(str(file))
    if exported.difference is not None:
        out.say(f"compared: its outputs differ by at most {exported.difference:.1e} of their size")
    out.result(
        "export",
        files=[file.as_posix() for file in exported.files],
        difference=exported.difference,
    )
    return 0


def _loaded_from(run: Path) -> tuple[Path, ...]:
    """Where a model may be read; the rest of a run folder may hold what is exported."""
    return (run / "model.safetensors", run / "checkpoints") if run.is_dir() else (run,)


def _output(given: Given, config: ExportConfig) -> Path:
    if "output" in given:
        return Path(given["output"])
    run = Path(given["run"])
    return (run if run.is_dir() else run.parent) / NAMES[config.format or ExportFormat.DIFFUSERS]

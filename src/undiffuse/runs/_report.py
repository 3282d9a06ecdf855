"""One HTML page per run, from what its folder holds."""

import shlex
from pathlib import Path
from typing import Any

from undiffuse import drawing, report
from undiffuse.checkpoint import Model
from undiffuse.config import flatten
from undiffuse.cost import multiply_adds, padded, parameters, total_parameters
from undiffuse.runs._folder import (
    RunFolder,
    read_json,
    read_metrics,
    stored_config,
    write_text,
)
from undiffuse.runs._generate import guidance_words, usual_guidance
from undiffuse.runs._load import load
from undiffuse.spec import trace


def write_report(run: str | Path, output: Path | None = None) -> Path:
    """Write RUN/report.html; parts that the run does not have yet are left out.

    Raises:
        CheckpointError: no run is there.
        ResourceError: the page cannot be written.
    """
    folder = RunFolder(Path(run))
    config = stored_config(folder.path)
    model = load(folder.path, device="cpu")
    records = read_metrics(folder.metrics)
    body = read_json(folder.evaluation) if folder.evaluation.exists() else {}
    page = report.Report(
        title=f"undiffuse: {folder.path.name}",
        facts=_facts(folder, model, records),
        samples_png=_bytes(folder.samples / "final.png"),
        film=_bytes(folder.samples / "film.webp"),
        grids=_grids(folder),
        loss_svg=_loss_svg(records),
        levels_svg=_levels_svg(body),
        unet_svg=_unet_svg(model),
        evaluation=body,
        neighbours_png=_bytes(folder.samples / "neighbours.png"),
        config=flatten(config),
        commands=next_commands(folder.path),
        attribution=str(model.trained.get("attribution", "")),
        warnings=(
            *_warnings(folder, model, config.train.max_train_steps),
            *body.get("warnings", ()),
        ),
    )
    path = output or folder.report
    write_text(path, report.render(page))
    return path


def next_commands(run: Path) -> tuple[tuple[str, str], ...]:
    """The three things to do with a run."""
    place = shlex.quote(str(run))
    return (
        (f"undiffuse sample {place} -n 64 --seed 1", "make other pictures"),
        (f"undiffuse evaluate {place}", "measure it again, or with other settings"),
        ("undiffuse train path/to/images --resolution 64", "learn pictures of your own"),
    )


def _facts(folder: RunFolder, model: Model, records: list[dict[str, Any]]) -> dict[str, object]:
    info = read_json(folder.info) if folder.info.exists() else {}
    pictures = model.pictures
    speed = next((r["images_per_second"] for r in reversed(records)), None)
    facts: dict[str, object] = {
        "Data": info.get("data", model.trained.get("data", "")),
        "Pictures": f"{pictures.width} × {pictures.height}, {pictures.channels} channel"
        + ("s" if pictures.channels > 1 else ""),
        "Training pictures": info.get("train_images"),
        "Held out": info.get("held_out_images"),
        "Steps": model.trained.get("steps"),
        "Parameters": f"{total_parameters(model.spec):,}",
        "Guidance": _guidance(model),
        "Computed on": f"{info.get('device', '?')}, {_precision(info)}",
        "Speed": None if speed is None else f"{speed:g} pictures per second",
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _guidance(model: Model) -> str | None:
    """Of all pictures that the report shows, unless they were asked for otherwise."""
    usual = usual_guidance(model)
    if usual.guidance_scale == 1.0:
        return None
    return guidance_words(usual.guidance_scale, usual.interval)


def _precision(info: dict[str, Any]) -> str:
    return "bfloat16 inside the network" if info.get("precision") == "bf16" else "float32"


def _unet_svg(model: Model) -> str:
    spec, size = model.spec, (model.pictures.height, model.pictures.width)
    whole, sites = padded(spec, *size), list(trace(spec))
    counts = {site.index: parameters(site, spec.style) for site in sites}
    costs = {site.index: multiply_adds(site, spec.style, *whole) for site in sites}
    return drawing.to_svg(drawing.draw_unet(spec, size, counts, costs))


def _loss_svg(records: list[dict[str, Any]]) -> str | None:
    return drawing.to_svg(drawing.draw_losses(records)) if records else None


def _levels_svg(body: dict[str, Any]) -> str | None:
    levels, values = body.get("levels"), body.get("loss", {}).get("values")
    return drawing.to_svg(drawing.draw_levels(levels, values)) if levels else None


def _grids(folder: RunFolder) -> list[tuple[int, bytes]]:
    paths = sorted(folder.samples.glob("step_*.png"))
    return [(int(path.stem.removeprefix("step_")), path.read_bytes()) for path in paths]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _warnings(folder: RunFolder, model: Model, planned: int) -> tuple[str, ...]:
    steps = model.trained.get("steps")
    found: list[str] = []
    if isinstance(steps, int) and steps < planned:
        found.append(f"Unfinished: {steps} of {planned} steps.")
    skipped = folder.path / "skipped.txt"
    if skipped.exists():
        count = len(skipped.read_text(encoding="utf-8").splitlines())
        found.append(f"{count} pictures could not be read (skipped.txt names them).")
    return tuple(found)

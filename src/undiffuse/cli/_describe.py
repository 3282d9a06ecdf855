"""`describe`: a network op by op, a run, a folder of pictures, or what there is.

Programs and their costs are plain arithmetic: torch is imported only for a run or for pictures.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from undiffuse import cost, recipes
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._output import Output, table
from undiffuse.config import (
    RECIPES,
    BetaSchedule,
    DataConfig,
    PredictionType,
    SamplerName,
    changed,
)
from undiffuse.errors import ConfigError
from undiffuse.spec import Op, Site, UNetSpec, trace

BUNDLED = ("digits", "photos")


@dataclass(frozen=True)
class _Network:
    """What is to be described: a spec, at a picture size, with facts about its training."""

    name: str
    spec: UNetSpec
    size: tuple[int, int]
    facts: Mapping[str, object]


def describe(arguments: Arguments, out: Output) -> int:
    """Describe the target: a preset, a run or model file, a folder of pictures, or all names."""
    target = arguments.given.get("target")
    if target is None:
        _refuse_animation(arguments, "needs a network: name a preset, a run or a model file")
        return _names(out)
    path = Path(str(target))
    if target in recipes.PRESETS:
        return _network(_from_preset(str(target), arguments), arguments, out)
    if _is_run(path) or (path.suffix == ".safetensors" and path.exists()):
        return _network(_from_model(path, arguments), arguments, out)
    if path.is_dir() or target in BUNDLED or path.suffix == ".npz":
        _refuse_animation(arguments, f"is for networks; {target} is a set of pictures")
        from undiffuse.cli._describe_pictures import describe_pictures

        return describe_pictures(str(target), arguments, out)
    raise ConfigError(
        f"TARGET {target!r} is no preset, run, model file, .npz file or folder{_near(path)};"
        f" presets: {', '.join(recipes.PRESETS)}"
    )


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "model.safetensors").is_file()


def _near(path: Path) -> str:
    there = [str(one) for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), [*recipes.PRESETS, *BUNDLED, *there], 1)
    return f". Did you mean {near[0]}?" if near else ""


# --- names --------------------------------------------------------------------------------------


def _names(out: Output) -> int:
    presets = [_preset_facts(name) for name in recipes.PRESETS]
    rows = [(p["name"], f"{p['parameters']:,}", p["for"]) for p in presets]
    for line in table([("preset", "parameters", "for"), *rows], right=(1,)):
        out.say(line)
    named = [(name, one.summary) for name, one in RECIPES.items()]
    out.say()
    for line in table([("recipe", "what it is"), *named], right=()):
        out.say(line)
    lists = {
        "samplers": [one.value for one in SamplerName],
        "schedules": [one.value for one in BetaSchedule],
        "predictions": [one.value for one in PredictionType],
        "data": [*BUNDLED, "a folder of pictures", "an .npz file"],
    }
    out.say()
    for name, values in lists.items():
        out.say(f"{name}: {', '.join(values)}")
    out.say("\nmore about one: undiffuse describe light")
    out.result("describe", presets=presets, recipes=dict(named), known=lists)
    return 0


def _preset_facts(name: str) -> dict[str, Any]:
    parameters = cost.total_parameters(recipes.preset(name))
    return {"name": name, "parameters": parameters, "for": recipes.PRESETS[name].summary}


# --- networks -----------------------------------------------------------------------------------


def _from_preset(name: str, arguments: Arguments) -> _Network:
    options = changed(DataConfig(), arguments.settings(DataConfig))
    spec = recipes.preset(name, options.channels or 3, _classes(arguments.given))
    nominal = recipes.PRESETS[name].nominal
    return _Network(name, spec, options.resolution or (nominal, nominal), {})


def _classes(given: Mapping[str, Any]) -> int:
    text = str(given.get("classes", "0"))
    if not text.isdecimal():
        raise ConfigError(f"classes must be a whole number of at least 0; got {text!r}")
    return int(text)


def _from_model(path: Path, arguments: Arguments) -> _Network:
    from undiffuse import runs

    for name in ("channels", "classes"):
        if name in arguments.given:
            raise ConfigError(f"{name} is for presets; {path} is a trained model with its own")
    options = changed(DataConfig(), arguments.settings(DataConfig))
    model = runs.load(path)
    facts = {
        "schedule": model.denoiser.schedule,
        "prediction": model.denoiser.prediction,
        "classes": ", ".join(model.pictures.class_names) or "none",
        **{k.replace("_", " "): v for k, v in model.trained.items() if v != ""},
    }
    size = options.resolution or (model.pictures.height, model.pictures.width)
    return _Network(str(path), model.spec, size, facts)


def _network(network: _Network, arguments: Arguments, out: Output) -> int:
    drawn = _draw(network, arguments)  # first: a name it cannot have is refused before any line
    for line in _network_lines(network):
        out.say(line)
    if drawn is not None:
        out.say(f"drawn: {drawn}")
    spec, size = network.spec, network.size
    out.result(
        "describe",
        name=network.name,
        size=list(size),
        parameters=cost.total_parameters(spec),
        flops=cost.flops(spec, *size),
        components=cost.by_component(spec),
        ops=[_op_facts(site, spec) for site in trace(spec)],
        facts={name: _plain(value) for name, value in network.facts.items()},
        drawing=None if drawn is None else drawn.as_posix(),
    )
    return 0


def _plain(value: object) -> object:
    return value if isinstance(value, int | float | str | None) else str(value)


def _op_facts(site: Site, spec: UNetSpec) -> dict[str, object]:
    parameters = cost.parameters(site, spec.style)
    return {"index": site.index, "name": site.name, "parameters": parameters}


def _network_lines(network: _Network) -> Iterator[str]:
    spec, (height, width) = network.spec, network.size
    padded, total = cost.padded(spec, height, width), cost.total_parameters(spec)
    sites = list(trace(spec))
    classes = f", {spec.classes:,} classes" if spec.classes else ""
    yield (
        f"{network.name}: {len(sites)} ops, {total:,} parameters, pictures of"
        f" {spec.in_channels}x{height}x{width}{classes}"
    )
    yield ""
    yield from _op_lines(spec, sites, padded)
    yield ""
    yield from _component_lines(spec, total)
    yield f"\n{cost.flops(spec, height, width) / 1e9:,.3g} GFLOP per picture and step"
    if padded != network.size:
        yield f"pictures are padded to {padded[0]}x{padded[1]} inside and cropped"
    for name, value in network.facts.items():
        if name != "data fingerprint":  # 64 digits that tell a reader nothing
            yield f"{name}: {value}"


def _op_lines(spec: UNetSpec, sites: list[Site], size: tuple[int, int]) -> list[str]:
    rows = [("op", "what", "output CxHxW", "parameters", "MFLOP", "")]
    rows.extend(_op_row(site, spec, size) for site in sites)
    return table(rows, right=(3, 4))


def _op_row(
    site: Site, spec: UNetSpec, size: tuple[int, int]
) -> tuple[str, str, str, str, str, str]:
    height, width = size[0] // site.out_scale, size[1] // site.out_scale
    count = cost.parameters(site, spec.style)
    flops = 2 * cost.multiply_adds(site, spec.style, *size) / 1e6
    return (
        site.name,
        _words(site.op),
        f"{site.out_width}x{height}x{width}",
        f"{count:,}" if count else "",
        f"{flops:,.2f}" if flops else "",
        f"with {site.skip:02d}" if site.skip is not None else site.part.value,
    )


def _words(op: Op) -> str:
    """Res(64) for Res(width=64, resize=None): only what differs from the default."""
    values = [
        str(getattr(op, one.name)) for one in fields(op) if getattr(op, one.name) != one.default
    ]
    return type(op).__name__ + (f"({', '.join(values)})" if values else "")


def _component_lines(spec: UNetSpec, total: int) -> list[str]:
    rows = [("part", "parameters", "")]
    for name, count in cost.by_component(spec).items():
        rows.append((name.replace("_", " "), f"{count:,}", f"{count / total:.1%}"))
    return table([*rows, ("all", f"{total:,}", "")], right=(1, 2))


def _draw(network: _Network, arguments: Arguments) -> Path | None:
    if "output" not in arguments.given:
        _refuse_animation(arguments, "needs a file: add --output u.svg")
        return None
    from undiffuse import drawing

    path, (spec, size) = Path(str(arguments.given["output"])), (network.spec, network.size)
    costs = _costs(spec, cost.padded(spec, *size))
    if "animate" in arguments.given:
        drawing.save_svg(drawing.animate_unet(spec, size, *costs), path)
    else:
        drawing.save(drawing.draw_unet(spec, size, *costs), path)
    return path


def _costs(spec: UNetSpec, size: tuple[int, int]) -> tuple[dict[int, int], dict[int, int]]:
    """Parameters and multiply-adds per op index; `size` is that of the padded picture."""
    sites = list(trace(spec))
    counts = {site.index: cost.parameters(site, spec.style) for site in sites}
    return counts, {site.index: cost.multiply_adds(site, spec.style, *size) for site in sites}


def _refuse_animation(arguments: Arguments, why: str) -> None:
    if "animate" in arguments.given:
        raise ConfigError(f"animate {why}")

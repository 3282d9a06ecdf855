"""`undiffuse describe`: a network op by op, a run, a folder of pictures, or what there is."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from undiffuse import cost, recipes
from undiffuse.cli._output import Output, table
from undiffuse.cli._parser import Arguments
from undiffuse.config import (
    BetaSchedule,
    DataConfig,
    PredictionType,
    SamplerName,
    changed,
)
from undiffuse.errors import ConfigError
from undiffuse.spec import Op, Site, UNetSpec, trace


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
        return _names(out)
    path = Path(str(target))
    if str(target) in recipes.PRESETS:
        return _network(_from_preset(str(target), arguments), arguments, out)
    if _is_run(path) or path.suffix == ".safetensors":
        return _network(_from_model(path), arguments, out)
    if path.is_dir() or str(target) in ("digits", "photos") or path.suffix == ".npz":
        return _pictures(str(target), arguments, out)
    raise ConfigError(
        f"TARGET {target!r} is no preset, run, model file or folder;"
        f" presets: {', '.join(recipes.PRESETS)}"
    )


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "model.safetensors").is_file()


def _names(out: Output) -> int:
    rows = [("preset", "parameters", "for")]
    for name, preset in recipes.PRESETS.items():
        count = cost.total_parameters(recipes.preset(name))
        rows.append((name, f"{count:,}", preset.summary))
    for line in table(rows, right=(1,)):
        out.say(line)
    lists = {
        "samplers": [one.value for one in SamplerName],
        "schedules": [one.value for one in BetaSchedule],
        "predictions": [one.value for one in PredictionType],
        "data": ["digits", "photos", "a folder", "an .npz file"],
    }
    out.say()
    for name, values in lists.items():
        out.say(f"{name}: {', '.join(values)}")
    out.result("describe", presets=list(recipes.PRESETS), known=lists)
    return 0


def _from_preset(name: str, arguments: Arguments) -> _Network:
    given = arguments.given
    options = changed(DataConfig(), arguments.settings(DataConfig))
    classes = given.get("classes", "0")
    if not str(classes).isdecimal():
        raise ConfigError(f"classes must be a whole number of at least 0; got {classes!r}")
    spec = recipes.preset(name, options.channels or 3, int(classes))
    nominal = recipes.PRESETS[name].nominal
    return _Network(name, spec, options.resolution or (nominal, nominal), {})


def _from_model(path: Path) -> _Network:
    from undiffuse import runs

    model = runs.load(path)
    size = (model.pictures.height, model.pictures.width)
    facts = {
        "schedule": model.denoiser.schedule,
        "prediction": model.denoiser.prediction,
        "classes": ", ".join(model.pictures.class_names) or "none",
        **{name.replace("_", " "): value for name, value in model.trained.items() if value != ""},
    }
    return _Network(str(path), model.spec, size, facts)


def _network(network: _Network, arguments: Arguments, out: Output) -> int:
    spec, (height, width) = network.spec, network.size
    padded, sites = cost.padded(spec, height, width), list(trace(spec))
    macs = {s.index: cost.multiply_adds(s, spec.style, *padded) for s in sites}
    for line in _op_lines(spec, sites, padded, macs):
        out.say(line)
    total, parts = cost.total_parameters(spec), cost.by_component(spec)
    out.say()
    for name, count in parts.items():
        out.say(f"{name:<12} {count:>13,}  {count / total:6.1%}")
    flops = cost.flops(spec, height, width)
    out.say(f"{'TOTAL':<12} {total:>13,}  {flops / 1e9:,.3g} GFLOP per picture of {width}x{height}")
    if padded != network.size:
        out.say(f"pictures are padded to {padded[1]}x{padded[0]} inside and cropped")
    for name, value in network.facts.items():
        out.say(f"{name}: {value}")
    drawn = _draw(network, arguments, out)
    out.result(
        "describe",
        name=network.name,
        parameters=total,
        flops=flops,
        components=parts,
        ops=[
            {"index": s.index, "name": s.name, "parameters": cost.parameters(s, spec.style)}
            for s in sites
        ],
        drawing=drawn,
    )
    return 0


def _op_lines(
    spec: UNetSpec, sites: list[Site], size: tuple[int, int], macs: dict[int, int]
) -> list[str]:
    rows = [("op", "what", "output", "parameters", "MFLOP", "")]
    for site in sites:
        shape = f"{site.out_width}x{size[0] // site.out_scale}x{size[1] // site.out_scale}"
        count, flops = cost.parameters(site, spec.style), 2 * macs[site.index] / 1e6
        where = f"from {site.skip}" if site.skip is not None else site.part.value
        rows.append(
            (
                site.name,
                _words(site.op),
                shape,
                f"{count:,}" if count else "",
                f"{flops:,.2f}" if flops else "",
                where,
            )
        )
    return table(rows, right=(3, 4))


def _words(op: Op) -> str:
    """Res(64) for Res(width=64, resize=None): only what differs from the default."""
    values = [
        str(getattr(op, one.name)) for one in fields(op) if getattr(op, one.name) != one.default
    ]
    return f"{type(op).__name__}({', '.join(values)})"


def _draw(network: _Network, arguments: Arguments, out: Output) -> str | None:
    output = arguments.given.get("output")
    if output is None:
        return None
    from undiffuse import drawing

    path = Path(str(output))
    drawing.save(drawing.draw_unet(network.spec, network.size), path)
    out.say(f"drawn: {path}")
    return path.as_posix()


def _pictures(target: str, arguments: Arguments, out: Output) -> int:
    from undiffuse import images

    options = changed(DataConfig(), arguments.settings(DataConfig))
    chosen = images.DataOptions(resolution=options.resolution, channels=options.channels)
    data = images.load(target, chosen)
    train, held_out = data.train, data.held_out
    height, width = train.size
    out.say(f"{data.source}: {len(train):,} pictures for training, {len(held_out):,} held out")
    out.say(f"{width}x{height}, {train.channels} channels, {train.bits} bits")
    if train.labels is not None:
        out.say(f"{len(train.class_names)} classes: {', '.join(train.class_names[:20])}")
    for note in data.notes:
        out.say(f"note: {note}")
    for one in data.skipped[:10]:
        out.say(f"skipped: {one.name}: {one.reason}")
    if data.attribution:
        out.say(data.attribution)
    out.result(
        "describe",
        source=data.source,
        train_images=len(train),
        held_out_images=len(held_out),
        size=[height, width],
        channels=train.channels,
        classes=list(train.class_names),
        skipped=len(data.skipped),
    )
    return 0

"""Options that several commands share, from text to checked values."""

import math
import os
from pathlib import Path
from typing import Any

from undiffuse import runs, runtime
from undiffuse.checkpoint import Model
from undiffuse.cli._output import Output
from undiffuse.config import Device, Weights
from undiffuse.errors import ConfigError, ResourceError

Given = dict[str, Any]
FILMS = ("webp", "gif")


def load_model(given: Given) -> Model:
    """The model that RUN, --weights, --checkpoint and --ema-length name, on --device."""
    on, length = device(given), ema_length(given)
    return runs.load(given["run"], weights(given), checkpoint(given), on, length)


def load_guide(given: Given) -> Model | None:
    """The weaker model that --autoguidance names."""
    which = autoguidance(given)
    return None if which is None else runs.guide(given["run"], which, device(given))


def weights(given: Given) -> Weights:
    return Weights(one_of("weights", str(given.get("weights", "ema")), tuple(Weights)))


def device(given: Given) -> Device:
    chosen = Device(one_of("device", str(given.get("device", "auto")), tuple(Device)))
    runtime.choose_device(chosen)
    return chosen


def checkpoint(given: Given) -> int | None:
    if "checkpoint" not in given:
        return None
    text = str(given["checkpoint"])
    if not text.isdecimal():
        raise ConfigError(f"checkpoint must be a step, such as 500; got {text!r}")
    return int(text)


def ema_length(given: Given) -> float | None:
    return number("ema_length", given["ema_length"]) if "ema_length" in given else None


def film_format(given: Given) -> str | None:
    """What the animation is saved as; None where none is asked for."""
    return one_of("film", str(given["film"]), FILMS) if "film" in given else None


def autoguidance(given: Given) -> str | int | None:
    """A step is a number; "early" or a path stays text, which ./2024 and ./early are."""
    which = given.get("autoguidance")
    return int(which) if which is not None and which.isdecimal() else which


def warn_unguided(given: Given, scale: float, out: Output) -> None:
    """What was typed about guidance has no effect at scale 1."""
    typed = [n for n in ("autoguidance", "guidance_low", "guidance_high") if n in given]
    if typed and scale == 1.0:
        out.warn(f"{' and '.join(typed)}: no effect at guidance_scale 1; try --guidance-scale 1.5")


def say_guidance(given: Given, asked: runs.SamplingOptions, out: Output) -> None:
    """What nobody typed should not be a surprise."""
    scale = asked["guidance_scale"]
    if scale != 1.0 and "guidance_scale" not in given:
        words = runs.guidance_words(scale, asked["guidance_interval"])
        out.say(f"guided by {words}, as the run was told (--guidance-scale 1: not at all)")


def whole(name: str, value: object, at_least: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = None
    if number is None or number < at_least:
        raise ConfigError(f"{name} must be a whole number of at least {at_least}; got {value!r}")
    return number


def number(name: str, value: object) -> float:
    try:
        found = float(str(value))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{name} must be a finite number; got {value!r}")
    return found


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def output_folder(given: Given, name: str) -> Path:
    """--output-dir, or a folder of that name in the run; refused now if it cannot be written."""
    run = Path(given["run"])
    default = (run if run.is_dir() else run.parent) / name
    folder = Path(given["output_dir"]) if "output_dir" in given else default
    runs.check_writable(folder)
    return folder


def check_memory(model: Model, pictures: int, what: str) -> None:
    """Refuse a number of pictures that this machine cannot hold, before the work and not after."""
    size = model.pictures
    need = 2 * 4 * pictures * size.channels * size.height * size.width  # once more when joined
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ResourceError(
            f"{what} {pictures:,} pictures of {size.height}x{size.width} need about"
            f" {need / 1e9:,.0f} GB, this machine has {have / 1e9:.0f} GB; ask for fewer"
        )

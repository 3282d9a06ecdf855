"""From typed options and a config file to a training request."""

import itertools
import json
import re
import tomllib
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from undiffuse import runs
from undiffuse.cli._arguments import Arguments
from undiffuse.config import RunConfig, override
from undiffuse.errors import ConfigError

Settings = dict[str, object]
SECTIONS = tuple(type(getattr(RunConfig(), one.name)) for one in fields(RunConfig))


def training_request(arguments: Arguments) -> runs.Request:
    """Command line > config file > preset > defaults; a resumed run's own settings come first."""
    given = arguments.given
    settings = {**from_file(given.get("config")), **arguments.settings(*SECTIONS)}
    common: dict[str, Any] = {
        "init_from": Path(given["init_from"]) if "init_from" in given else None,
        "accept_data_change": bool(given.get("accept_data_change")),
        "dry_run": bool(given.get("dry_run")),
    }
    if "resume_from_checkpoint" in given:
        return _resumed(given, settings, common)
    if "data" not in settings:
        raise ConfigError("DATA is missing: name a folder of pictures, an .npz file or 'digits'")
    config = override(RunConfig(), settings)
    run = Path(given["output_dir"]) if "output_dir" in given else _next_run(config.data.data)
    return runs.Request(config, run, **common)


def _resumed(given: dict[str, Any], settings: Settings, common: dict[str, Any]) -> runs.Request:
    resume = str(given["resume_from_checkpoint"])
    if "output_dir" not in given:
        raise ConfigError("resume_from_checkpoint needs --output-dir RUN, the run to go on with")
    if resume != "latest" and not re.fullmatch(r"[0-9]+", resume):
        raise ConfigError(f"resume_from_checkpoint must be latest or a step; got {resume!r}")
    run = Path(given["output_dir"])
    config = runs.resumed_config(run, runs.stored_config(run), settings)
    return runs.Request(config, run, resume=resume, **common)


def from_file(path: str | None) -> Settings:
    """Settings from a JSON or TOML file; keys are option names, with underscores.

    Raises:
        ConfigError: unreadable, another format, or a key or value that no option has.
    """
    if path is None:
        return {}
    if path.lower().endswith((".yaml", ".yml")):
        raise ConfigError(f"config {path} is YAML, which is not read; write it as JSON or TOML")
    values = _parsed(path)
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must hold one table of options; got a {_kind(values)}")
    settings = cast("Settings", values)
    try:
        override(RunConfig(), settings)  # refused here, with the file still in mind
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from error
    return settings


def _parsed(path: str) -> object:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.lower().endswith(".toml"):
            return tomllib.loads(text)
        return json.loads(text, object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path} is not text: byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ConfigError(
            f"config {path} is nested too deeply; options are one flat table"
        ) from error
    except ValueError as error:
        kind = "TOML" if path.lower().endswith(".toml") else "JSON"
        raise ConfigError(f"config {path} is not {kind}: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> Settings:
    """JSON allows a key twice and keeps the last; a reader would see the first."""
    twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} stands there twice; keep one")
    return dict(pairs)


def _kind(value: object) -> str:
    match value:
        case list():
            return "list"
        case str():
            return "text"
        case _:
            return "single value"


def _next_run(data: str) -> Path:
    """runs/DATA-001, or the first number that is free."""
    name = re.sub(r"[^\w-]+", "-", Path(data).resolve().stem).strip("-") or "run"
    paths = (Path("runs") / f"{name}-{n:03d}" for n in itertools.count(1))
    return next(path for path in paths if not path.exists())

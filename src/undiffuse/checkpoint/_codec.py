"""Plain data <-> JSON, through one closed tuple of types.

A file can name a type, but only one of `TYPES` is ever built: no import by name, nothing that
runs. Enumerations are reached through the fields that hold them, so they are closed as well.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, Union, cast, get_args, get_origin
from typing import get_type_hints as resolved_hints

from undiffuse.checkpoint._pictures import Pictures
from undiffuse.denoiser import Epsilon, FlowVelocity, KarrasPrecond, Prediction, Sample, Velocity
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    LinearBetas,
    ScaledLinearBetas,
    Schedule,
    Sigmoid,
)
from undiffuse.spec import OPS, Embedding, Style, UNetSpec

if TYPE_CHECKING:
    JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None
else:
    JSON = object  # checkers of types at run time cannot follow an alias into itself

Schedules = LinearBetas | ScaledLinearBetas | Sigmoid | Cosine | Karras | Flow
Predictions = Epsilon | Sample | Velocity | FlowVelocity | KarrasPrecond

TYPES: tuple[type, ...] = (
    *(UNetSpec, Style, Embedding),
    *OPS,
    *get_args(Schedules),
    *get_args(Predictions),
    Pictures,
)

# No width, step count or class count is near this. Without the limit a forged file could ask for
# a schedule table larger than memory before its weights are even looked at.
MAX_INT = 2**20


def encode(value: object) -> JSON:
    """A spec, op, style, schedule or prediction as JSON: `{"type": "Res", "width": 64, ...}`.

    Raises:
        CheckpointError: the type is not among those that can be read back.
    """
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple):
        return [encode(item) for item in cast(tuple[object, ...], value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) not in TYPES:
        raise CheckpointError(
            f"{type(value).__name__} cannot be saved in a model file; known types are"
            f" {_names(TYPES)}"
        )
    return {
        "type": type(value).__name__,
        **{one.name: encode(getattr(value, one.name)) for one in _fields(type(value))},
    }


def decode_spec(value: JSON, where: str = "spec") -> UNetSpec:
    """The inverse of `encode`; `where` is what messages call the value.

    Raises:
        CheckpointError: an unknown type or field, or a value that cannot be.
    """
    return cast(UNetSpec, _decode(value, UNetSpec, where))


def decode_schedule(value: JSON, where: str = "schedule") -> Schedule:
    """As `decode_spec`, for one of the noise schedules."""
    return cast(Schedule, _decode(value, Schedules, where))


def decode_prediction(value: JSON, where: str = "prediction") -> Prediction:
    """As `decode_spec`, for one of the prediction types."""
    return cast(Prediction, _decode(value, Predictions, where))


def decode_pictures(value: JSON, where: str = "pictures") -> Pictures:
    """As `decode_spec`, for what a model draws."""
    return cast(Pictures, _decode(value, Pictures, where))


def _decode(value: JSON, wanted: object, where: str) -> object:
    choices = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    if value is None and type(None) in choices:
        return None
    if get_origin(wanted) is tuple:
        return _decode_tuple(value, get_args(wanted)[0], where)
    types = cast(list[type], [choice for choice in choices if choice is not type(None)])
    if all(choice in TYPES for choice in types):
        return _decode_record(value, types, where)
    assert len(types) == 1, f"{where}: no rule for {wanted}"
    if issubclass(types[0], StrEnum):
        return _decode_enum(value, types[0], where)
    return _PLAIN[types[0]](value, where)


def _decode_tuple(value: JSON, item: object, where: str) -> tuple[object, ...]:
    if not isinstance(value, list):
        _refuse(where, "a list", value)
    return tuple(_decode(one, item, f"{where}[{i}]") for i, one in enumerate(value))


def _decode_record(value: JSON, types: Sequence[type], where: str) -> object:
    if not isinstance(value, dict):
        _refuse(where, "an object with a type", value)
    by_name = {one.__name__: one for one in types}
    name = value.get("type")
    if not isinstance(name, str) or name not in by_name:
        raise CheckpointError(f"{where}: unknown type {shown(name)}; known: {_names(types)}")
    return _build(by_name[name], value, f"{where} {name}" if len(types) > 1 else where)


def _build(kind: type, value: Mapping[str, JSON], where: str) -> object:
    known = {one.name: one for one in _fields(kind)}
    for name in value:
        if name not in known and name != "type":
            raise CheckpointError(
                f"{where}: unknown field {shown(name)}; fields are {', '.join(known) or 'none'}"
            )
    for name, one in known.items():
        if name not in value and one.default is MISSING and one.default_factory is MISSING:
            raise CheckpointError(f"{where}: field '{name}' is missing")
    hints = _hints(kind)
    given = {
        name: _decode(value[name], hints[name], f"{where}.{name}")
        for name in known
        if name in value
    }
    try:
        return kind(**given)
    except (ConfigError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _decode_enum(value: JSON, kind: type[StrEnum], where: str) -> StrEnum:
    for one in kind:
        if value == one.value:
            return one
    _refuse(where, f"one of {', '.join(kind)}", value)


def _whole(value: JSON, where: str) -> int:
    if type(value) is not int or abs(value) > MAX_INT:
        _refuse(where, f"a whole number of at most {MAX_INT}", value)
    return value


def _real(value: JSON, where: str) -> float:
    if type(value) is int and abs(value) <= MAX_INT:
        return float(value)
    if type(value) is not float or not math.isfinite(value):
        _refuse(where, "a finite number", value)
    return value


def _truth(value: JSON, where: str) -> bool:
    if type(value) is not bool:
        _refuse(where, "true or false", value)
    return value


def _text(value: JSON, where: str) -> str:
    if not isinstance(value, str):
        _refuse(where, "text", value)
    return value


_PLAIN: dict[type, Any] = {int: _whole, float: _real, bool: _truth, str: _text}


def _refuse(where: str, wanted: str, value: object) -> NoReturn:
    raise CheckpointError(f"{where} must be {wanted}; got {shown(value)}")


def _fields(kind: type) -> tuple[Field[Any], ...]:
    return fields(kind)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return resolved_hints(kind)


def _names(types: Sequence[type]) -> str:
    return ", ".join(one.__name__ for one in types)


# --- text ---------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """A value out of a file, short and on one line whatever it holds."""
    text = ascii(value) if not isinstance(value, int) else hex(value)[:40]
    text = str(value) if isinstance(value, int) and abs(value) < 2**64 else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def dump(value: JSON, what: str) -> str:
    """Compact JSON.

    Raises:
        CheckpointError: something inside is not JSON (a number that is not finite, a tensor ...);
            the message names its place.
    """
    _check_plain(value, what)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, item in cast(dict[object, object], value).items():
            if not isinstance(key, str):
                _refuse(f"{where}: a key", "text", key)
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(cast(Sequence[object], value)):
            _check_plain(item, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        _refuse(where, "a finite number", value)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        _refuse(where, "plain data for JSON", value)


def parse(text: str | bytes, what: str) -> JSON:
    """Strict JSON: UTF-8, no key twice, no NaN or Infinity.

    Raises:
        CheckpointError: anything else; `what` is what the message calls the text.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise CheckpointError(f"{what} is damaged: not valid JSON ({reason})") from error


def _unique(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

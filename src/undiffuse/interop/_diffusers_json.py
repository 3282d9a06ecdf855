"""The JSON of diffusers' configurations, read strictly.

Nothing that might have a meaning is ignored: a field is expressed, or refused by name and value.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import TypeVar, cast

from undiffuse.errors import CheckpointError

T = TypeVar("T")
Config = Mapping[str, object]  # a parsed JSON object
Legal = Mapping[str | int | None, T]  # each value that is expressed, and what it means

MAX_LEVELS = 16  # the smallest features are then 2^15 times smaller than the picture
MAX_JSON = 2**24  # bytes; a shard index of the largest networks has a few MiB

SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlist = 8


@dataclass(frozen=True)
class Fields:
    """Values of a JSON object, each of the type it must have.

    Args:
        what: the class that the object configures, for messages.
    """

    what: str
    values: Config

    def refusal(self, name: str, value: object, can: str) -> CheckpointError:
        shown = SHORT.repr(value)
        return CheckpointError(f"{self.what}: {name}={shown} cannot be expressed (only {can})")

    def whole(self, name: str, default: int, least: int = 1, most: int = 2**24) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.refusal(name, value, f"a whole number from {least} to {most}")
        return value

    def whole_or_none(self, name: str, default: int | None) -> int | None:
        if self.values.get(name, default) is None:
            return None
        return self.whole(name, default or 1)

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if not (type(value) in (int, float) and math.isfinite(cast(float, value))):
            raise self.refusal(name, value, "a finite number")
        return float(cast(float, value))

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true or false")
        return value

    def one_of(self, name: str, default: object, legal: Legal[T]) -> T:
        """What `legal` has for the value."""
        value = self.values.get(name, default)
        if not isinstance(value, str | int | None) or isinstance(value, bool) or value not in legal:
            raise self.refusal(name, value, " or ".join(repr(one) for one in legal))
        return legal[value]

    def only(self, name: str, legal: object) -> None:
        """Refuse every value but one, which is also the default."""
        value = self.values.get(name, legal)
        if value != legal or isinstance(value, bool) != isinstance(legal, bool):
            raise self.refusal(name, value, repr(legal))

    def sequence(self, name: str, default: Sequence[object]) -> Sequence[object]:
        value = self.values.get(name, default)
        if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_LEVELS:
            raise self.refusal(name, value, f"a list of 1 to {MAX_LEVELS}")
        return cast(Sequence[object], value)

    def check_known(self, known: str) -> None:
        """Refuse what might have a meaning that nobody here knows; null has none.

        Args:
            known: names, with blanks between them.
        """
        names = known.split()
        for name, value in self.values.items():
            if name not in names and not name.startswith("_") and value is not None:
                raise CheckpointError(
                    f"{self.what}: {name}={SHORT.repr(value)} cannot be expressed"
                    " (the field is not known here)"
                )

    def check_class(self, legal: Collection[str]) -> str:
        """The class that the object says it configures; the first of `legal` if it says none."""
        value = self.values.get("_class_name", next(iter(legal)))
        if value not in legal:
            raise CheckpointError(
                f"{self.what}: _class_name is {SHORT.repr(value)}, which cannot be imported"
                f" (only {', '.join(legal)})"
            )
        return cast(str, value)


def read_json(path: Path) -> dict[str, object]:
    """One JSON object. diffusers itself writes Infinity into schedulers; `number` refuses it."""
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise CheckpointError(f"{path} is no ordinary file; it must hold a JSON object")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_JSON:
        raise CheckpointError(
            f"{path} has more than {MAX_JSON} bytes, too many for a configuration"
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object; got {SHORT.repr(value)}")
    return cast(dict[str, object], value)


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return values

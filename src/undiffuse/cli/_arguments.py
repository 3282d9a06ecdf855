"""What the user typed, once it is understood."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from undiffuse import config
from undiffuse.cli._output import Output


@dataclass(frozen=True)
class Arguments:
    """What the user typed: the command and only those options that were given."""

    command: str
    run: "Runner"
    given: dict[str, Any]

    def section(self, section: config.SectionT) -> config.SectionT:
        """The section's defaults with the typed options."""
        return config.changed(section, self.given)

    def settings(self, *sections: type) -> dict[str, object]:
        """Those typed options that belong to the sections."""
        names = {one.name for section in sections for one in fields(section)}
        return {name: value for name, value in self.given.items() if name in names}


Runner = Callable[[Arguments, Output], int]

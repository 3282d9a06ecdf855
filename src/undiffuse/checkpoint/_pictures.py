"""What a model draws, as its file says it."""

from dataclasses import dataclass

from undiffuse.errors import ConfigError


@dataclass(frozen=True)
class Pictures:
    """Size and kind of the pictures of one model.

    Args:
        bits: per channel of the files it was trained on, 8 or 16.
        class_names: in the order of the labels; empty if classes have no names.

    Raises:
        ConfigError: a size below 1, other bits, or a class name twice.
    """

    height: int
    width: int
    channels: int
    bits: int = 8
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("height", "width", "channels"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"pictures.{name} must be a whole number above 0; got {value!r}")
        if self.bits not in (8, 16):
            raise ConfigError(f"pictures.bits must be 8 or 16; got {self.bits!r}")
        if len(set(self.class_names)) != len(self.class_names):
            raise ConfigError("pictures.class_names has a name twice; rename one")

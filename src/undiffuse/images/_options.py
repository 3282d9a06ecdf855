"""How files become pixels: the options of a data source, checked when they are made."""

from dataclasses import dataclass
from enum import StrEnum

from PIL import ImageColor

from undiffuse.errors import ConfigError

SMALLEST, LARGEST = 4, 8192


class OnBadImage(StrEnum):
    """What to do with a picture that cannot be read."""

    SKIP = "skip"
    ERROR = "error"


@dataclass(frozen=True)
class DataOptions:
    """How files become pixels. All fields are JSON-able.

    resolution: (height, width) of the pictures; None takes the pictures' common size.
    channels: 1 grey, 3 RGB, 4 RGBA; None detects grey or RGB by the files' modes. Arrays may have
        any number of channels, and this must then be that number.
    background: Pillow colour name on which transparency is composited, unless ``channels`` is 4.
    random_crop: keep a canvas 9/8 larger than ``resolution`` and crop it anew for every draw.
    random_flip: flip horizontally in half of the draws.
    on_bad_image: leave unreadable pictures out and name them, or stop at the first one.
    val_fraction: share of held-out pictures; None is 0.2 for digits and photos, 0.1 otherwise.
        Folders and arrays hold out every picture whose content hashes below it, so about that
        share, and the same ones when others come or go. Unused where the source has own splits.

    Raises ConfigError naming the field, its value and what is allowed.
    """

    resolution: tuple[int, int] | None = None
    channels: int | None = None
    background: str = "white"
    random_crop: bool = False
    random_flip: bool = False
    on_bad_image: OnBadImage = OnBadImage.SKIP
    val_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None:
            object.__setattr__(self, "resolution", checked_size(self.resolution))
        if self.channels is not None and not (_is_int(self.channels) and self.channels >= 1):
            raise ConfigError(f"channels must be a whole number from 1; got {self.channels!r}")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction must lie between 0 and 1; got {self.val_fraction!r}")
        if self.on_bad_image not in tuple(OnBadImage):
            raise ConfigError(f'on_bad_image must be "skip" or "error"; got {self.on_bad_image!r}')
        object.__setattr__(self, "on_bad_image", OnBadImage(self.on_bad_image))
        checked_colour(self.background)


def checked_size(size: object) -> tuple[int, int]:
    """``size`` as (height, width), or a ConfigError that names the resolution."""
    match size:
        case [int() as height, int() as width] if all(map(_in_range, (height, width))):
            return (height, width)
        case _:
            raise ConfigError(
                f"resolution must be (height, width), each {SMALLEST}…{LARGEST}; got {size!r}"
            )


def checked_colour(name: str) -> tuple[int, int, int]:
    """The sRGB bytes of a Pillow colour name such as "white" or "#102030"."""
    try:
        return ImageColor.getrgb(name)[:3]
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f'background must be a colour such as "white" or "#808080"; got {name!r}'
        ) from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in_range(value: object) -> bool:
    return isinstance(value, int) and _is_int(value) and SMALLEST <= value <= LARGEST

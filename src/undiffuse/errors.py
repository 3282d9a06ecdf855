"""The exceptions that users meet, each with the exit code that the command line ends with.

Every message names the field, the value it got, and what to do; the command line prints it as
one line and shows no traceback. Anything else that escapes is a defect of ours (exit code 1).
"""

from typing import ClassVar


class UndiffuseError(Exception):
    """Base of every error that is the input's fault rather than ours."""

    exit_code: ClassVar[int] = 1


class ConfigError(UndiffuseError, ValueError):
    """An option, a setting or a combination of them cannot work."""

    exit_code = 2


class SpecError(ConfigError):
    """A U-Net program cannot be built; the message names the op by its index."""


class DataError(UndiffuseError):
    """Pictures are missing, unreadable or not what the model expects."""

    exit_code = 3


class CheckpointError(UndiffuseError):
    """A model file or a checkpoint is missing, damaged or does not fit."""

    exit_code = 4


class DivergedError(UndiffuseError):
    """Training produced numbers that are not finite."""

    exit_code = 5


class ResourceError(UndiffuseError):
    """Memory, disk space or permission to write is missing."""

    exit_code = 7


class QualityError(UndiffuseError):
    """A measured figure is on the wrong side of the limit that the user set."""

    exit_code = 6

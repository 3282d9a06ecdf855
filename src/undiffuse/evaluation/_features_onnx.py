"""Features from a network in an ONNX file that the user names, such as Inception."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation._features import Features
from undiffuse.evaluation._measures import Points

AT_ONCE = 64  # pictures, where the network does not say
MOST_NUMBERS = 8192  # per picture: of thousands of pictures they must fit into memory
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: colours as one grey
TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}

Run = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class _Input:
    """How the network wants its pictures; None where it takes any number."""

    name: str
    dtype: type[np.float32] | type[np.uint8]
    batch: int | None
    channels: int
    height: int | None
    width: int | None
    channels_last: bool

    def prepared(self, x0: Tensor) -> NDArray[Any]:
        """Pictures (n, c, h, w) in [-1, 1] as the network wants them."""
        x0 = self._resized(self._with_channels(x0)).clamp(-1, 1)
        if self.dtype is np.uint8:
            x0 = ((x0 + 1) * 127.5).round().to(torch.uint8)
        return (x0.permute(0, 2, 3, 1) if self.channels_last else x0).contiguous().numpy()

    def _with_channels(self, x0: Tensor) -> Tensor:
        have = x0.shape[1]
        if have == 1:
            return x0.expand(-1, self.channels, -1, -1)
        if have == 3 and self.channels == 1:
            return (x0 * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        if have != self.channels:
            raise ConfigError(
                f"features: the network wants pictures of {self.channels} channels; got {have}"
            )
        return x0

    def _resized(self, x0: Tensor) -> Tensor:
        """Averaged where both sides shrink, bicubic where one grows."""
        size = (self.height or x0.shape[-2], self.width or x0.shape[-1])
        if size == tuple(x0.shape[-2:]):
            return x0
        if size[0] <= x0.shape[-2] and size[1] <= x0.shape[-1]:
            return functional.interpolate(x0, size=size, mode="area")
        return functional.interpolate(x0, size=size, mode="bicubic", antialias=True)

    @property
    def described(self) -> str:
        kind = "0 to 255" if self.dtype is np.uint8 else "-1 to 1"
        if self.height is None and self.width is None:
            return f"pictures at their size, {kind}"
        height, width = (side or "any" for side in (self.height, self.width))
        return f"pictures resized to {height}x{width}, {kind}"


def onnx_features(path: str | Path, output: str | None = None) -> Features:
    """What an ONNX network makes of pictures, flattened to (n, d); run on the CPU.

    The network has one input: (n, c, height, width) or (n, height, width, c), of 1 or 3 channels
    and of any or fixed numbers and sizes. As uint8 it gets 0 to 255; as float32 -1 to 1, so a
    network that wants other values must be exported with the conversion in front. Grey pictures
    are repeated for three channels, colours averaged for one (BT.601).

    Args:
        output: the name of one; None: the first.

    Raises:
        ConfigError: no such file, not an ONNX file, no input for pictures, no such output, or
            `onnxruntime` is missing. Also when called: it cannot run on pictures of that size, or
            gives no numbers for each of them.
        DataError: when called: its numbers are not finite.
    """
    path = Path(path)
    session, errors = _session(path)
    taken = _input(path, session.get_inputs())
    names = [one.name for one in session.get_outputs()]
    if output is not None and output not in names:
        raise ConfigError(f"features: {path} has no output {output!r}; it has {', '.join(names)}")
    chosen = names[0] if output is None else output

    def run(batch: NDArray[Any]) -> NDArray[Any]:
        try:
            return np.asarray(session.run([chosen], {taken.name: batch})[0])
        except errors as error:
            raise ConfigError(
                f"features: {path} does not run on pictures {batch.shape}: {_first_line(error)}"
            ) from error

    name = f"{path.name}, output {chosen} ({taken.described})"
    return Features(name, lambda x0: _embedded(run, taken, path, x0))


def _session(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    """A session of ONNX Runtime, and the errors that running it may raise."""
    if not path.is_file():
        raise ConfigError(f"features: there is no file {path}")
    if find_spec("onnxruntime") is None:
        raise ConfigError(
            "features: an ONNX file needs onnxruntime, which is not installed:"
            ' pip install "undiffuse[onnx]"'
        )
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # pyright: ignore[reportAttributeAccessIssue] # compiled

    errors = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf)
    errors += (state.NoSuchFile, state.NotImplemented, state.RuntimeException, state.NoModel)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised; nothing is printed
    providers = ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers), errors
    except errors as error:
        raise ConfigError(
            f"features: {path} is not an ONNX file that can be run: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _input(path: Path, inputs: Sequence[Any]) -> _Input:
    found = _as_pictures(inputs[0]) if len(inputs) == 1 else None
    if found is None:
        has = ", ".join(f"{one.name}: {one.type} {_shape_text(one.shape)}" for one in inputs)
        raise ConfigError(
            f"features: {path} must have one input for pictures, float32 or uint8, (n, c, height,"
            f" width) or (n, height, width, c) with 1 or 3 channels; it has {has or 'none'}"
        )
    return found


def _as_pictures(one: Any) -> _Input | None:
    if one.type not in TYPES or len(one.shape) != 4:
        return None
    batch, *rest = (size if isinstance(size, int) and size > 0 else None for size in one.shape)
    first, middle, last = rest
    if first in (1, 3):
        return _Input(one.name, TYPES[one.type], batch, first, middle, last, False)
    if last in (1, 3):
        return _Input(one.name, TYPES[one.type], batch, last, first, middle, True)
    return None


def _shape_text(shape: Sequence[object]) -> str:
    return f"({', '.join(str(size) for size in shape)})"


# --- running it ---------------------------------------------------------------------------------


def _embedded(run: Run, taken: _Input, path: Path, x0: Tensor) -> Points:
    size = taken.batch or AT_ONCE
    parts = [_of_batch(run, taken, path, part, size) for part in x0.split(size)]
    points = np.concatenate(parts)
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points).all(1)).sum())
        raise DataError(
            f"features: what {path} gives is not finite for {bad} of {len(points)} pictures"
        )
    return points


def _of_batch(run: Run, taken: _Input, path: Path, x0: Tensor, size: int) -> Points:
    """Of one batch; where the network takes one number of pictures only, the last is repeated."""
    n = len(x0)
    if taken.batch is not None and n < size:
        x0 = torch.cat([x0, x0[-1:].expand(size - n, -1, -1, -1)])
    out = run(taken.prepared(x0))
    numbers = out.ndim >= 1 and out.dtype.kind in "fiu"
    if not numbers or len(out) != len(x0) or not 0 < out[0].size <= MOST_NUMBERS:
        raise ConfigError(
            f"features: {path} must give 1 to {MOST_NUMBERS} numbers for each picture; for"
            f" {len(x0)} it gives {out.dtype} {_shape_text(out.shape)}. Name another output"
        )
    return out.reshape(len(out), -1)[:n].astype(np.float64)

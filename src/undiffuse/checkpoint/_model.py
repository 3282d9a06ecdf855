"""The model file: weights together with everything that says what they mean."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from undiffuse.checkpoint._codec import (
    JSON,
    decode_pictures,
    decode_prediction,
    decode_schedule,
    decode_spec,
    dump,
    encode,
    parse,
    shown,
)
from undiffuse.checkpoint._disk import REAL_DISK, Disk, Payload, open_named, reason_of
from undiffuse.checkpoint._pictures import Pictures
from undiffuse.checkpoint._tensors import Head, container, read_head, read_own
from undiffuse.denoiser import Denoiser, Prediction
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.noise import Schedule
from undiffuse.spec import UNetSpec, trace
from undiffuse.unet import UNet, frequencies_of

FORMAT = 1
NEEDS = "0.1.0"  # the oldest version that reads FORMAT


@dataclass(frozen=True)
class Header:
    """What a model file says about its weights.

    Raises:
        ConfigError: pictures and spec do not fit each other.
    """

    spec: UNetSpec
    schedule: Schedule
    prediction: Prediction
    pictures: Pictures
    trained: Mapping[str, JSON] = field(default_factory=dict[str, JSON])

    def __post_init__(self) -> None:
        channels, names = self.pictures.channels, len(self.pictures.class_names)
        if not channels == self.spec.in_channels == self.spec.out_channels:
            raise ConfigError(
                f"pictures.channels is {channels}, but the spec has in_channels"
                f" {self.spec.in_channels} and out_channels {self.spec.out_channels}"
            )
        if names not in (0, self.spec.classes):
            raise ConfigError(
                f"pictures.class_names has {names} names, but the spec has"
                f" {self.spec.classes} classes"
            )


@dataclass(frozen=True)
class Model:
    """A denoiser with what is needed to draw with it.

    Args:
        denoiser: its `net` is a bare `UNet`, without wrappers.
        trained: how it came about: steps, images seen, EMA, data fingerprint, seed ...; any JSON.

    Raises:
        ConfigError: the net is not a `UNet`, or does not draw such pictures.
    """

    denoiser: Denoiser
    pictures: Pictures
    trained: Mapping[str, JSON] = field(default_factory=dict[str, JSON])

    def __post_init__(self) -> None:
        _ = self.header

    @property
    def net(self) -> UNet:
        """The bare network."""
        if not isinstance(self.denoiser.net, UNet):
            raise ConfigError(
                f"a model's net must be a UNet; got {type(self.denoiser.net).__name__}:"
                " take the net out of its wrapper"
            )
        return self.denoiser.net

    @property
    def spec(self) -> UNetSpec:
        """The program that the network runs."""
        return self.net.spec

    @property
    def header(self) -> Header:
        """All but the weights."""
        denoiser = self.denoiser
        return Header(
            self.spec, denoiser.schedule, denoiser.prediction, self.pictures, self.trained
        )


# --- writing ------------------------------------------------------------------------------------


def save_model(
    path: str | Path,
    model: Model,
    weights: Mapping[str, Tensor] | None = None,
    disk: Disk = REAL_DISK,
) -> None:
    """Write one safetensors file that says itself what it is; weights become float32.

    The file appears whole or not at all; an older one under the same name stays until then.

    Args:
        weights: instead of the net's own, such as an average of them; by name.
        disk: the file operations to use; the operating system's by default.

    Raises:
        CheckpointError: the weights are not finite or do not fit the spec, or the model holds
            something that cannot be saved.
        ResourceError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    tensors = _single(model.net.state_dict() if weights is None else weights)
    payload = model_payload(model.header, tensors)
    _remove_leftovers(path, disk)
    temporary = path.parent / f".tmp-{path.name}-{uuid4().hex}"
    try:
        disk.write(temporary, payload.chunks)
        disk.sync(temporary)
        _read_back(temporary)
        disk.rename(temporary, path)
        disk.sync_folder(path.parent)
    except (OSError, ValueError, CheckpointError) as error:  # ValueError: a zero byte in a name
        with suppress(OSError, ValueError):
            disk.remove(temporary)
        raise ResourceError(f"cannot save {path}: {reason_of(error)}") from error


def model_payload(header: Header, tensors: Mapping[str, Tensor]) -> Payload:
    """The bytes of a model file, after the checks that keep a bad one from being written."""
    check_weights(header.spec, {name: tuple(t.shape) for name, t in tensors.items()}, "given")
    check_finite(tensors)
    metadata = _metadata(header)
    _header(metadata, "this model")  # what cannot be read back must not be written
    return container(tensors, metadata)


def _single(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def _metadata(header: Header) -> dict[str, str]:
    return {
        "format": f"undiffuse {FORMAT}",
        "needs": NEEDS,
        "spec": dump(encode(header.spec), "spec"),
        "schedule": dump(encode(header.schedule), "schedule"),
        "prediction": dump(encode(header.prediction), "prediction"),
        "pictures": dump(encode(header.pictures), "pictures"),
        "trained": dump(dict(header.trained), "trained"),
    }


def _read_back(path: Path) -> None:
    with open_named(path) as file:
        read_own(file, read_head(file, path), path)


def _remove_leftovers(path: Path, disk: Disk) -> None:
    """What an earlier save under this name left when it was killed."""
    with suppress(OSError, ValueError):
        for old in path.parent.iterdir():
            if old.name.startswith(f".tmp-{path.name}-"):
                disk.remove(old)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError naming the first tensor with NaN or infinity in it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} has values that are not finite")


# --- reading ------------------------------------------------------------------------------------


def read_header(path: str | Path) -> Header:
    """What a model file says about itself, without reading (or verifying) its weights.

    Raises:
        CheckpointError: no model file of ours, or one from a newer version.
    """
    path = Path(path)
    with open_named(path) as file:
        return _header(_own_metadata(read_head(file, path), path), str(path))


def load_model(path: str | Path) -> Model:
    """The model in a file, its network in evaluation mode and float32 on the CPU.

    Nothing in the file can run code, and no bit of it can differ from what was written.

    Raises:
        CheckpointError: no model file of ours, from a newer version, damaged, or weights that
            do not fit its spec or are not finite.
    """
    path = Path(path)
    with open_named(path) as file:
        head = read_head(file, path)
        header = checked_header(head, path)
        return assemble(header, read_own(file, head, path), path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a model file without its network, by name: float32, on the CPU.

    Raises:
        CheckpointError: as `load_model`.
    """
    with open_named(path) as file:
        head = read_head(file, path)
        checked_header(head, path)
        tensors = _single(read_own(file, head, path))
    check_finite(tensors)
    return tensors


def checked_header(head: Head, path: Path) -> Header:
    """The header of a model file whose list of weights fits its spec."""
    header = _header(_own_metadata(head, path), str(path))
    shapes = {name: entry.shape for name, entry in head.entries.items()}
    try:
        check_weights(header.spec, shapes, "in the file")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}. Was the metadata edited?") from error
    for name, entry in head.entries.items():
        if not entry.dtype.is_floating_point:
            raise CheckpointError(f"{path}: {name} holds {entry.dtype}, not floating numbers")
    return header


def assemble(header: Header, tensors: Mapping[str, Tensor], path: Path) -> Model:
    """Put weights that fit the spec into a network."""
    try:
        check_finite(tensors)
        denoiser = Denoiser(_network(header.spec, tensors), header.schedule, header.prediction)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Model(denoiser, header.pictures, header.trained)


def _network(spec: UNetSpec, tensors: Mapping[str, Tensor]) -> UNet:
    net = _on_meta(spec)
    net.load_state_dict(_single(tensors), assign=True)
    if net.embedding is not None:
        net.embedding.frequencies = frequencies_of(spec.style.embedding)
    return net.eval()


def _on_meta(spec: UNetSpec) -> UNet:
    """The network's shapes without its memory."""
    try:
        with torch.device("meta"), _Unvalued():
            return UNet(spec)
    except (RuntimeError, TypeError, ArithmeticError) as error:  # a size beyond 64 bits
        reason = str(error).splitlines()[0][:100]
        raise CheckpointError(f"spec: no network can be built from it ({reason})") from error


class _Unvalued(TorchFunctionMode):
    """Nothing is computed where tensors have no values, only their shapes are kept.

    torch would find the shape of every result in Python, and imports its compiler for that: most
    of the time from a model file to the first picture. Functions that are not named here still
    give the right shapes.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func in (torch.arange, torch.randn):
            return torch.empty(*args, **named)
        if func in (Tensor.mul, Tensor.div, torch.exp):  # by numbers: the shape stays
            return args[0]
        return named["tensor"] if func is nn.init.normal_ else func(*args, **named)


def _own_metadata(head: Head, path: Path) -> Mapping[str, str]:
    """The metadata, if it is ours and not from the future."""
    name, _, number = head.metadata.get("format", "").partition(" ")
    if name != "undiffuse" or not number.isdecimal() or len(number) > 9:
        raise CheckpointError(f"{path} has no undiffuse metadata: it is not a file of undiffuse")
    check_format("model", int(number), head.metadata.get("needs"))
    return head.metadata


def check_format(what: str, number: int, needs: object) -> None:
    """Raises CheckpointError if a format is newer than this version, naming the one to get."""
    if number > FORMAT:
        wanted = f">= {needs}" if isinstance(needs, str) and len(needs) < 20 else "of a later date"
        raise CheckpointError(f"{what} format {number} needs undiffuse {wanted}; this is {_here()}")
    if number < 1:
        raise CheckpointError(f"{what} format {number} never existed")


def _here() -> str:
    try:
        return version("undiffuse")
    except PackageNotFoundError:  # run from the sources
        return NEEDS


def _header(metadata: Mapping[str, str], where: str) -> Header:
    values = {name: _parsed(metadata, name, where) for name in _PARTS}
    try:
        return Header(
            decode_spec(values["spec"]),
            decode_schedule(values["schedule"]),
            decode_prediction(values["prediction"]),
            decode_pictures(values["pictures"]),
            _decode_table(values["trained"], "trained"),
        )
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{where}: {error}") from error


_PARTS = ("spec", "schedule", "prediction", "pictures", "trained")


def _parsed(metadata: Mapping[str, str], name: str, where: str) -> JSON:
    if name not in metadata:
        raise CheckpointError(f"{where}: its metadata has no {name}")
    return parse(metadata[name], f"{where}: {name}")


def _decode_table(value: JSON, where: str) -> dict[str, JSON]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be an object; got {shown(value)}")
    return value


# --- weights against spec -----------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]


def check_weights(spec: UNetSpec, found: Shapes, where: str) -> None:
    """Every weight of the spec must be there, in its shape, and no other.

    Raises:
        CheckpointError: naming the first weight that differs, and its op.
    """
    wanted = _shapes(spec)
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{name} is missing{_of_op(spec, name)}")
        if found[name] != shape:
            raise CheckpointError(
                f"{name} is {_brackets(found[name])} {where},"
                f" {_brackets(shape)} by the spec{_of_op(spec, name)}"
            )
    for name in found:
        if name not in wanted:
            raise CheckpointError(f"{shown(name)} is {where}, but the spec has no such weight")


@lru_cache(maxsize=8)  # model and average share one spec, save after save
def _shapes(spec: UNetSpec) -> Shapes:
    return {name: tuple(t.shape) for name, t in _on_meta(spec).state_dict().items()}


def _of_op(spec: UNetSpec, name: str) -> str:
    for site in trace(spec):
        if name.startswith(f"layers.{site.name}."):
            return f" (op {site.index} {type(site.op).__name__})"
    return ""


def _brackets(shape: tuple[int, ...]) -> str:
    return f"[{','.join(str(size) for size in shape)}]"

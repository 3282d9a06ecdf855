"""What leaves the house: written beside its place, compared with the network, then put there."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.unet import UNet

Size = tuple[int, int]
Inputs = Mapping[str, Tensor]  # x, timestep and, for networks with classes, label, in this order
Run = Callable[[Inputs], Tensor]
Fill = Callable[[Path], float | None]  # writes there; how far it is from the network, if checked

# What networks are told: whole steps, ln(sigma) / 4, and numbers between.
TIMESTEPS = (999.0, 0.0, -1.5536, 417.25, 1.0955, 31.0)


def plain(net: UNet) -> UNet:
    """A copy for the CPU in float32, in evaluation mode and torch's usual memory format."""
    twin = copy.deepcopy(net).to("cpu", torch.float32)
    usual = torch.contiguous_format
    twin = twin.to(memory_format=usual)  # pyright: ignore[reportCallIssue] # not in torch's stub
    return twin.eval().requires_grad_(False)


def inputs(net: UNet, batch: int, size: Size, first: int) -> dict[str, Tensor]:
    """Pictures of noise, with timesteps and labels that begin elsewhere with each `first`."""
    generator, spec = torch.Generator().manual_seed(first), net.spec
    numbers = torch.arange(first, first + batch)
    found = {
        "x": torch.randn(batch, spec.in_channels, *size, generator=generator),
        "timestep": torch.tensor(TIMESTEPS)[numbers % len(TIMESTEPS)],
    }
    if spec.classes:
        rows = spec.classes + int(spec.style.embedding.null)
        found["label"] = (rows - 1 - numbers) % rows  # "no class" is the last
    return found


def questions(net: UNet, size: Size, other: Size) -> Iterator[dict[str, Tensor]]:
    """Inputs of one, three and two pictures; the last two of another size."""
    yield inputs(net, 1, size, 0)
    yield inputs(net, 3, size, 1)
    yield inputs(net, 2, other, 4)


@torch.no_grad()
def difference(run: Run, net: UNet, size: Size, other: Size) -> float:
    """max |a - b| / max |b| with b our output, the largest of all questions; NaN if any is."""
    found = [_relative(run(one), net(*one.values())) for one in questions(net, size, other)]
    return float(torch.stack(found).max())


def _relative(theirs: Tensor, ours: Tensor) -> Tensor:
    if theirs.shape != ours.shape:
        return torch.tensor(torch.inf)
    smallest = torch.finfo(ours.dtype).tiny  # a new network answers zero
    return (theirs - ours).abs().max() / ours.abs().max().clamp(min=smallest)


def difference_diffusers(folder: Path, net: UNet, size: Size) -> float:
    """The network in a folder of diffusers, run by diffusers, against ours in float32 on the CPU.

    Raises:
        ConfigError: diffusers is not installed.
    """
    try:
        from diffusers.models.unets.unet_2d import UNet2DModel
    except ImportError as error:
        raise ConfigError(
            "the comparison needs diffusers, which is not installed:"
            ' pip install "undiffuse[diffusers]", or go without it (--no-check)'
        ) from error
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    theirs = UNet2DModel.from_pretrained(place, local_files_only=True, low_cpu_mem_usage=False)

    theirs.eval()

    def run(one: Inputs) -> Tensor:
        return theirs(one["x"], one["timestep"], class_labels=one.get("label")).sample

    return difference(run, net, size, size)


def placed(
    path: Path, fill: Fill, limit: float, force: bool = True
) -> tuple[tuple[Path, ...], float | None]:
    """Let `fill` write and check in a folder beside; then give what it wrote its place.

    Args:
        force: whether files that exist already are replaced.

    Returns:
        The files, or the folder, that were written, and what `fill` found.

    Raises:
        ConfigError: without `force`, one of the files exists; nothing was put in its place.
        CheckpointError: `fill` found `limit` or more; nothing was put in its place.
        ResourceError: the disk refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            found = fill(Path(folder) / path.name)
            if found is not None and not found < limit:
                raise CheckpointError(
                    f"{path} is not written: its outputs differ from the network's by {found:.1e}"
                    f" of their size, and {limit:g} is allowed; report it, or pass --no-check"
                )
            files = sorted(Path(folder).iterdir())
            if not force:
                _check_absent(path.with_name(file.name) for file in files)
            for file in reversed(files):  # the weights first, then the graph that names them
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from error
    return tuple(path.with_name(file.name) for file in files), found


def _check_absent(targets: Iterable[Path]) -> None:
    for target in targets:
        if target.is_file():
            raise ConfigError(
                f"{target} exists; name another file, or pass --force to replace a file"
            )


def write_state_dict(path: str | Path, tensors: Mapping[str, Tensor], force: bool = True) -> Path:
    """Tensors as one safetensors file, whole or not at all.

    Args:
        force: whether a file that exists already is replaced.

    Raises:
        ConfigError: without `force`, the file exists.
        ResourceError: the disk refused.
    """
    apart = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}

    def fill(file: Path) -> None:
        save_file(apart, file, metadata={"format": "pt"})

    (written,), _ = placed(Path(path), fill, 0.0, force)
    return written

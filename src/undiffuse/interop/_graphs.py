"""The bare network as a graph for other programs: ONNX, and torch's own exported program (.pt2).

A graph computes (x, timestep[, label]) -> output in float32, for any number of pictures. Noise
levels, preconditioning and sampling stay with whoever runs it; what they have to be stands in the
file's metadata. Unless told otherwise, a graph is only kept once it has given our own outputs.
"""

import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.unet import UNet

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

OPSET = 20  # of ONNX, 2023: ONNX Runtime has it since 1.17
METADATA = "undiffuse.json"  # in a .pt2, beside the program
ONNX_LIMIT = 1e-4  # another runtime adds in another order
PROGRAM_LIMIT = 1e-5

Run = Callable[[Sequence[Tensor]], Tensor]  # (x, timestep[, label]) -> output
Size = tuple[int, int]


@dataclass(frozen=True)
class Graph:
    """A graph that has been written.

    Args:
        files: the graph, and beside it the weights of an ONNX graph of more than 1.5 GB, which
            fit into no single file of that format.
        difference: from our own outputs, max |a - b| / max |b| over everything that was tried;
            None if nothing was.
        multiple: height and width may be any multiples of this, from twice on; None: they are
            fixed to the size that the graph was made for.
    """

    files: tuple[Path, ...]
    difference: float | None
    multiple: int | None


def export_onnx(
    path: str | Path,
    net: UNet,
    size: Size,
    metadata: Mapping[str, str] | None = None,
    check: bool = True,
) -> Graph:
    """Write the network as ONNX; inputs and output are named x, timestep, label and output.

    Args:
        path: appears whole or not at all, and replaces what is there.
        size: height and width of the network's pictures. Where both can be halved as often as the
            network does, and once more, the graph takes other sizes too.
        metadata: goes into the file's own table of texts.
        check: run onnx's checker, then ONNX Runtime against our own outputs on several batches,
            sizes, timesteps and labels.

    Raises:
        ConfigError: a package of the extra `onnx` is missing.
        CheckpointError: the check has failed; nothing was written.
        ResourceError: the disk refused.
    """
    _need_onnx(check)
    twin = _plain(net)
    program = _program(twin, size)
    graph = _to_onnx(program, metadata or {})

    def fill(file: Path) -> float | None:
        graph.save(file)
        return _difference_onnx(file, twin, size) if check else None

    return _written(Path(path), fill, ONNX_LIMIT, _multiple(net, size))


def export_program(
    path: str | Path,
    net: UNet,
    size: Size,
    metadata: Mapping[str, str] | None = None,
    check: bool = True,
) -> Graph:
    """Write the network for `torch.export.load`.

    Args:
        path: appears whole or not at all, and replaces what is there.
        size: as for `export_onnx`.
        metadata: goes into the archive as JSON, under `METADATA`.
        check: load the file again and compare with our own outputs.

    Raises:
        CheckpointError: the check has failed; nothing was written.
        ResourceError: the disk refused.
    """
    twin = _plain(net)
    program = _program(twin, size)

    def fill(file: Path) -> float | None:
        with _quietly(), file.open("wb") as stream:
            extra = {METADATA: json.dumps(dict(metadata or {}))}
            torch.export.save(program, stream, extra_files=extra)
        return _difference_program(file, twin, size) if check else None

    return _written(Path(path), fill, PROGRAM_LIMIT, _multiple(net, size))


# --- making the graph ---------------------------------------------------------------------------


def _need_onnx(check: bool) -> None:
    try:
        import onnx as _onnx
        import onnxscript as _onnxscript

        if check:
            import onnxruntime as _onnxruntime
    except ImportError as error:
        raise ConfigError(
            f'ONNX needs {error.name}, which is not installed: pip install "undiffuse[onnx]"'
        ) from error


def _plain(net: UNet) -> UNet:
    """A copy for the CPU in float32, in evaluation mode and torch's usual memory format."""
    twin = copy.deepcopy(net).to("cpu", torch.float32, memory_format=torch.contiguous_format)
    return twin.eval().requires_grad_(False)


def _multiple(net: UNet, size: Size) -> int | None:
    """What sizes may be multiples of. A size that has to be padded is padded by fixed numbers,
    and torch takes a length of 1 for a constant."""
    fits = all(side % net.stride == 0 and side >= 2 * net.stride for side in size)
    return net.stride if fits else None


def _program(net: UNet, size: Size) -> ExportedProgram:
    example = _inputs(net, 2, size, 0)
    with _quietly():
        program = torch.export.export(
            net, tuple(example.values()), dynamic_shapes=_shapes(net, size)
        )
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # the names of files on this machine
    return program


def _shapes(net: UNet, size: Size) -> dict[str, dict[int, Any]]:
    """Which dimension of which input is free. torch gives no name to the type of a Dim."""
    batch = Dim("batch", min=1)
    x: dict[int, Any] = {0: batch}
    if _multiple(net, size) is not None:
        sides = (Dim(name, min=2) for name in ("rows", "columns"))
        x |= {axis: net.stride * side for axis, side in enumerate(sides, 2)}  # pyright: ignore[reportOperatorIssue] # Dim's arithmetic is not in its stub
    others = ("timestep", "label") if net.spec.classes else ("timestep",)
    return {"x": x} | {name: {0: batch} for name in others}


def _to_onnx(program: ExportedProgram, metadata: Mapping[str, str]) -> "ONNXProgram":
    names = program.graph_signature.user_inputs
    sides = {0: "batch", 2: "height", 3: "width"}
    with _quietly():
        graph = torch.onnx.export(
            program,
            input_names=[str(name) for name in names],
            output_names=["output"],
            opset_version=OPSET,
            dynamic_shapes={"x": sides} | {str(name): {0: "batch"} for name in names[1:]},
            verbose=False,
            dynamo=True,
        )
    assert graph is not None  # None is the answer of the old exporter
    graph.model.metadata_props.update(metadata)
    return graph


@contextmanager
def _quietly() -> Iterator[None]:
    """torch's exporters report on their own past and future; their errors still come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- checking it --------------------------------------------------------------------------------

# What networks are told: whole steps, ln(sigma) / 4, and numbers between.
TIMESTEPS = (999.0, 0.0, -1.5536, 417.25, 1.0955, 31.0)


def _inputs(net: UNet, batch: int, size: Size, first: int) -> dict[str, Tensor]:
    """Pictures of noise, with timesteps and labels that begin elsewhere with each `first`."""
    generator, spec = torch.Generator().manual_seed(first), net.spec
    numbers = torch.arange(first, first + batch)
    inputs = {
        "x": torch.randn(batch, spec.in_channels, *size, generator=generator),
        "timestep": torch.tensor(TIMESTEPS)[numbers % len(TIMESTEPS)],
    }
    if spec.classes:
        rows = spec.classes + int(spec.style.embedding.null)
        inputs["label"] = (rows - 1 - numbers) % rows  # "no class" is the last
    return inputs


def _questions(net: UNet, size: Size) -> Iterator[dict[str, Tensor]]:
    """Inputs of one, three and two pictures; the last of another size if the graph takes it."""
    other = (2 * net.stride, 3 * net.stride)
    yield _inputs(net, 1, size, 0)
    yield _inputs(net, 3, size, 1)
    yield _inputs(net, 2, other if _multiple(net, size) is not None else size, 4)


def _difference_onnx(file: Path, net: UNet, size: Size) -> float:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(file), full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        answer = session.run(["output"], {name: value.numpy() for name, value in inputs.items()})
        return torch.as_tensor(answer[0])

    return _difference(run, net, size)


def _difference_program(file: Path, net: UNet, size: Size) -> float:
    with _quietly():
        loaded = torch.export.load(file).module()
    return _difference(lambda inputs: loaded(*inputs.values()), net, size)


@torch.no_grad()
def _difference(run: Callable[[Mapping[str, Tensor]], Tensor], net: UNet, size: Size) -> float:
    """max |a - b| / max |b|, the largest of all questions; NaN if any is."""
    found = [_relative(run(inputs), net(*inputs.values())) for inputs in _questions(net, size)]
    return float(torch.stack(found).max())


def _relative(theirs: Tensor, ours: Tensor) -> Tensor:
    if theirs.shape != ours.shape:
        return torch.tensor(torch.inf)
    smallest = torch.finfo(ours.dtype).tiny  # a new network answers zero
    return (theirs - ours).abs().max() / ours.abs().max().clamp(min=smallest)


# --- files --------------------------------------------------------------------------------------


def _written(
    path: Path, fill: Callable[[Path], float | None], limit: float, multiple: int | None
) -> Graph:
    """Let `fill` write and check in a folder beside; then give the files their place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            difference = fill(Path(folder) / path.name)
            if difference is not None and not difference < limit:
                raise CheckpointError(
                    f"{path} is not written: the graph differs from the network by"
                    f" {difference:.1e}, more than {limit:g}; use another version of torch"
                )
            files = sorted(Path(folder).iterdir())
            for file in reversed(files):  # the weights first, then the graph that names them
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from error
    return Graph(tuple(path.with_name(file.name) for file in files), difference, multiple)

"""The bare network as a graph for other programs: ONNX, and torch's own exported program (.pt2).

A graph computes (x, timestep[, label]) -> output in float32, for any number of pictures. Noise
levels, preconditioning and sampling stay with whoever runs it; what they have to be stands in the
file's metadata. Unless told otherwise, a graph is only kept once it has given our own outputs.
"""

import json
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from undiffuse.errors import ConfigError
from undiffuse.interop._checked import Inputs, Size, difference, inputs, placed, plain
from undiffuse.unet import UNet

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

OPSET = 20  # of ONNX, 2023: ONNX Runtime has it since 1.17
METADATA = "undiffuse.json"  # in a .pt2, beside the program
ONNX_LIMIT = 1e-4  # another runtime adds in another order
PROGRAM_LIMIT = 1e-5


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
    twin = plain(net)
    program = _program(twin, size)
    graph = _to_onnx(program, metadata or {})

    def fill(file: Path) -> float | None:
        graph.save(file)
        return _difference_onnx(file, twin, size) if check else None

    files, found = placed(Path(path), fill, ONNX_LIMIT)
    return Graph(files, found, _multiple(net, size))


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
    twin = plain(net)
    program = _program(twin, size)

    def fill(file: Path) -> float | None:
        with _quietly(), file.open("wb") as stream:
            extra = {METADATA: json.dumps(dict(metadata or {}))}
            torch.export.save(program, stream, extra_files=extra)
        return _difference_program(file, twin, size) if check else None

    files, found = placed(Path(path), fill, PROGRAM_LIMIT)
    return Graph(files, found, _multiple(net, size))


# --- making the graph ---------------------------------------------------------------------------


def _need_onnx(check: bool) -> None:
    wanted = ("onnx", "onnxscript", *(("onnxruntime",) if check else ()))
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX needs {' and '.join(missing)}, which is not installed:"
            ' pip install "undiffuse[onnx]"'
        )


def _multiple(net: UNet, size: Size) -> int | None:
    """What sizes may be multiples of. A size that has to be padded is padded by fixed numbers,
    and torch takes a length of 1 for a constant."""
    fits = all(side % net.stride == 0 and side >= 2 * net.stride for side in size)
    return net.stride if fits else None


def _program(net: UNet, size: Size) -> ExportedProgram:
    example = inputs(net, 2, size, 0)
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
    names = [str(name) for name in program.graph_signature.user_inputs]
    sides = {0: "batch", 2: "height", 3: "width"}
    with _quietly():
        graph = torch.onnx.export(
            program,
            input_names=names,
            output_names=["output"],
            opset_version=OPSET,
            dynamic_shapes={"x": sides} | {name: {0: "batch"} for name in names[1:]},
            verbose=False,
            dynamo=True,
        )
    assert graph is not None  # None is the answer of the old exporter
    graph.model.metadata_props.update(metadata)
    return graph


@contextmanager
def _quietly() -> Generator[None]:
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


def _other(net: UNet, size: Size) -> Size:
    """Another size for the check, if the graph takes one."""
    return size if _multiple(net, size) is None else (2 * net.stride, 3 * net.stride)


def _difference_onnx(file: Path, net: UNet, size: Size) -> float:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(file), full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(one: Inputs) -> Tensor:
        answer = session.run(["output"], {name: value.numpy() for name, value in one.items()})
        return torch.as_tensor(cast("Sequence[object]", answer)[0])

    return difference(run, net, size, _other(net, size))


def _difference_program(file: Path, net: UNet, size: Size) -> float:
    with _quietly():
        loaded = torch.export.load(file).module()
    return difference(lambda one: loaded(*one.values()), net, size, _other(net, size))

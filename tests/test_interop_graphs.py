"""ONNX and torch.export: every kind of op, run where it will be used, against our own outputs."""

import json
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.interop import _checked, _graphs
from undiffuse.interop._graphs import Graph, export_onnx, export_program
from undiffuse.spec import (
    OPS,
    Act,
    Activation,
    Attn,
    Concat,
    Conv,
    Down,
    Downsampling,
    Embedding,
    Inject,
    Join,
    LinearAttn,
    Norm,
    Order,
    Out,
    Program,
    Res,
    Resize,
    Skip,
    Style,
    UNetSpec,
    Up,
    Upsampling,
)
from undiffuse.unet import UNet

EMBEDDING = Embedding(8, 16, 16)
Size = tuple[int, int]


def spec(program: Program, style: Style | None = None, channels: int = 1) -> UNetSpec:
    return UNetSpec(channels, channels, program, style or Style(embedding=EMBEDDING))


# Together they have every op, and every way of every op: see the test below.
NETS: dict[str, tuple[UNetSpec, Size]] = {
    "classes and no class, any size": (
        spec(
            (
                *(Conv(8), Skip(), Down(), Skip(), Res(8, Resize.DOWN)),
                Attn(2, head_width=3, memory=2, bias=False),
                *(Res(8, Resize.UP), Concat(), Attn(2, norm=False), Up(), Concat(), Out()),
            ),
            Style(
                inject=Inject.SCALE_SHIFT,
                embedding=replace(EMBEDDING, classes=3, null=True, sin_first=False),
            ),
            channels=2,
        ),
        (8, 16),
    ),
    "padded, RMS norm, linear attention": (
        spec(
            (
                *(Conv(8, 7), Skip(), Down(Downsampling.UNSHUFFLE), Res(8), LinearAttn(2, 4, 1)),
                *(Up(Upsampling.DECONV4), Concat(), Out(1, norm=False)),
            ),
            Style(
                norm=Norm.RMS,
                order=Order.CONV_NORM_ACT,
                activation=Activation.GELU,
                embedding=replace(EMBEDDING, classes=3, label_first=True),
            ),
        ),
        (7, 9),
    ),
    "pools and sums": (
        spec(
            (
                *(Conv(4), Skip(), Down(Downsampling.MAX), Down(Downsampling.AVG)),
                *(Down(Downsampling.CONV4), Down(Downsampling.CONV_END), Act(), Res(4)),
                *(Up(Upsampling.NEAREST), Up(Upsampling.NEAREST), Up(Upsampling.NEAREST_CONV)),
                *(Up(Upsampling.NEAREST), Concat(Join.ADD), Out()),
            ),
            Style(
                order=Order.CONV_ACT_NORM,
                activation=Activation.RELU,
                skip_gain=0.5,
                embedding=EMBEDDING,
            ),
        ),
        (32, 48),
    ),
}
SMALL = spec((Conv(4), Act(), Out()))
SMALLEST = spec((Conv(4), Down(), Res(4), Up(), Out()))

Export = Callable[..., Graph]
BOTH = pytest.mark.parametrize(
    ("export", "ending"), [(export_onnx, ".onnx"), (export_program, ".pt2")], ids=["onnx", "pt2"]
)


def network(which: UNetSpec) -> UNet:
    """Every weight is something else than it starts with."""
    net, generator = UNet(which), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return net


def kinds_in(which: UNetSpec) -> set[object]:
    """The types of the ops, and every enumerated choice of ops and style."""
    chosen = [*which.program, which.style, which.style.embedding]
    values = {value for one in chosen for value in vars(one).values()}
    return {type(op) for op in which.program} | {v for v in values if isinstance(v, StrEnum)}


def test_the_nets_have_every_op_and_every_way_of_it() -> None:
    every: set[object] = set(OPS)
    for kind in (Downsampling, Upsampling, Resize, Join, Activation, Order, Norm, Inject):
        every |= set(kind)
    assert every - set().union(*(kinds_in(which) for which, _ in NETS.values())) == set()


@pytest.mark.parametrize("name", NETS)
@BOTH
def test_every_op_gives_our_outputs(name: str, export: Export, ending: str, tmp_path: Path) -> None:
    which, size = NETS[name]
    net = network(which).to(memory_format=torch.channels_last)
    graph = export(tmp_path / f"net{ending}", net, size)
    assert graph.difference is not None
    assert graph.difference < (1e-5 if ending == ".onnx" else 1e-6)
    assert graph.multiple == (None if size == (7, 9) else net.stride)
    assert graph.files == (tmp_path / f"net{ending}",)
    assert list(tmp_path.iterdir()) == list(graph.files)


# --- the files, opened without us ---------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UNet]:
    """A folder with both files of a network with classes, and the network."""
    folder = tmp_path_factory.mktemp("labelled")
    style = Style(embedding=replace(EMBEDDING, classes=2, null=True))
    net = network(spec((Conv(4), Skip(), Down(), Res(4), Up(), Concat(), Out()), style))
    facts = {"prediction": '{"type": "Epsilon"}', "class_names": '["ä", "b"]'}
    export_onnx(folder / "net.onnx", net, (8, 8), facts, check=False)
    export_program(folder / "net.pt2", net, (8, 8), facts, check=False)
    return folder, net


def question(batch: int, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 1, *size, generator=generator)
    return x, torch.linspace(0.5, 900.0, batch), torch.arange(batch) % 3


@pytest.mark.parametrize(("batch", "size"), [(1, (8, 8)), (5, (8, 8)), (2, (4, 18))])
def test_onnx_runtime_gives_our_outputs(
    labelled: tuple[Path, UNet], batch: int, size: Size
) -> None:
    folder, net = labelled
    x, timestep, label = question(batch, size)
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"))
    names = {"x": x.numpy(), "timestep": timestep.numpy(), "label": label.numpy()}
    (answer,) = session.run(["output"], names)
    with torch.no_grad():
        ours = net(x, timestep, label)
    torch.testing.assert_close(torch.as_tensor(answer), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "size"), [(1, (8, 8)), (5, (8, 8)), (2, (4, 18))])
def test_a_loaded_program_gives_our_outputs(
    labelled: tuple[Path, UNet], batch: int, size: Size
) -> None:
    folder, net = labelled
    loaded = torch.export.load(folder / "net.pt2").module()
    asked = question(batch, size)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*asked), net(*asked), rtol=1e-5, atol=1e-6)


def test_names_shapes_and_facts_stand_in_the_onnx_file(labelled: tuple[Path, UNet]) -> None:
    model = onnx.load(labelled[0] / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [one.dim_param or one.dim_value for one in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "x": ["batch", 1, "height", "width"],
        "timestep": ["batch"],
        "label": ["batch"],
        "output": ["batch", 1, "height", "width"],
    }
    facts = {one.key: one.value for one in model.metadata_props}
    assert facts["prediction"] == '{"type": "Epsilon"}'
    assert json.loads(facts["class_names"]) == ["ä", "b"]
    assert [one.version for one in model.opset_import if not one.domain] == [_graphs.OPSET]


def test_facts_stand_in_the_program(labelled: tuple[Path, UNet]) -> None:
    extra = {_graphs.METADATA: ""}
    torch.export.load(labelled[0] / "net.pt2", extra_files=extra)
    assert json.loads(extra[_graphs.METADATA])["class_names"] == '["ä", "b"]'


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_no_path_of_this_machine_leaves_it(labelled: tuple[Path, UNet], name: str) -> None:
    data = (labelled[0] / name).read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in data
    assert str(Path(_graphs.__file__).parent.parent).encode() not in data
    assert b"unet.py" not in data


# --- sizes --------------------------------------------------------------------------------------


def test_a_size_that_needs_padding_stays_fixed(tmp_path: Path) -> None:
    net = network(SMALLEST)
    export_program(tmp_path / "net.pt2", net, (7, 8), check=False)
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    x, timestep, _ = question(3, (7, 8))
    assert torch.equal(loaded(x, timestep), net(x, timestep))
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded(*question(3, (8, 8))[:2])


@pytest.mark.parametrize(
    ("size", "multiple"),
    [((4, 4), 2), ((4, 6), 2), ((2, 4), None), ((4, 2), None), ((4, 5), None), ((3, 4), None)],
)
def test_which_sizes_can_be_left_free(size: Size, multiple: int | None) -> None:
    assert _graphs._multiple(UNet(SMALLEST), size) == multiple


# --- what can go wrong --------------------------------------------------------------------------


@BOTH
def test_the_comparison_sees_one_weight(export: Export, ending: str, tmp_path: Path) -> None:
    """An injected fault: the file is compared with a network that differs in one number."""
    net = network(SMALLEST)
    path = tmp_path / f"net{ending}"
    export(path, net, (8, 8), check=False)
    compare = {".onnx": _graphs._difference_onnx, ".pt2": _graphs._difference_program}[ending]
    assert compare(path, net, (8, 8)) < 1e-5
    with torch.no_grad():
        net.layers["04_out"].conv.bias[0] += 0.01
    assert compare(path, net, (8, 8)) > 1e-4


@BOTH
def test_a_graph_that_differs_is_not_kept(
    export: Export, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"net{ending}"
    path.write_bytes(b"before")
    monkeypatch.setattr(_graphs, "difference", lambda *_: float("nan"))
    with pytest.raises(CheckpointError, match="is not written: its outputs differ"):
        export(path, network(SMALL), (8, 8))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_differences_are_relative_and_see_shapes_and_nan() -> None:
    ours = torch.tensor([[1.0, -4.0]])
    assert float(_checked._relative(ours + torch.tensor([[0.0, 1.0]]), ours)) == 0.25
    assert float(_checked._relative(ours[0], ours)) == float("inf")
    assert bool(_checked._relative(ours * float("nan"), ours).isnan())
    assert float(_checked._relative(0 * ours, 0 * ours)) == 0.0


def test_questions_ask_for_every_label_and_for_many_times() -> None:
    which = spec((Conv(4), Res(4), Out()), Style(embedding=replace(EMBEDDING, classes=2)))
    asked = list(_checked.questions(UNet(which), (4, 4), (4, 6)))
    assert [tuple(one["x"].shape) for one in asked] == [(1, 1, 4, 4), (3, 1, 4, 4), (2, 1, 4, 6)]
    assert {int(label) for one in asked for label in one["label"]} == {0, 1}
    assert len({float(t) for one in asked for t in one["timestep"]}) == 6


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_graphs, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ConfigError, match=rf'needs {missing},.*pip install "undiffuse\[onnx\]"'):
        export_onnx(tmp_path / "net.onnx", network(SMALL), (8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"net\.pt2 cannot be written"):
        export_program(tmp_path / "file" / "net.pt2", network(SMALL), (8, 8), check=False)


def test_weights_that_are_too_many_for_one_file_stand_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    monkeypatch.setattr(place, 10)
    net = network(spec((Conv(32), Conv(32), Out(norm=False))))
    graph = export_onnx(tmp_path / "net.onnx", net, (8, 8))
    assert graph.files == (tmp_path / "net.onnx", tmp_path / "net.onnx.data")
    assert graph.files[1].stat().st_size >= 4 * 32 * 32 * 9
    assert _graphs._difference_onnx(graph.files[0], net, (8, 8)) < 1e-5
    graph.files[1].unlink()
    with pytest.raises(Exception, match=r"net\.onnx\.data"):
        _graphs._difference_onnx(graph.files[0], net, (8, 8))


def test_the_network_itself_is_left_as_it_was(tmp_path: Path) -> None:
    net = network(SMALL).double().train()
    export_program(tmp_path / "net.pt2", net, (8, 8))
    assert net.training
    assert all(weight.dtype is torch.float64 for weight in net.parameters())
    assert all(weight.requires_grad for weight in net.parameters())

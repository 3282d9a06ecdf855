"""Model files and checkpoints: exact round trips, and every kind of damage we can think of."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from undiffuse.checkpoint import (
    REAL_DISK,
    Checkpoints,
    Chunk,
    Loaded,
    Model,
    Pictures,
    RunLock,
    Snapshot,
    decode_prediction,
    decode_schedule,
    decode_spec,
    encode,
    load_model,
    read_header,
    save_model,
)
from undiffuse.checkpoint._codec import TYPES, parse
from undiffuse.checkpoint._directory import FILES, MANIFEST, is_whole
from undiffuse.denoiser import (
    Denoiser,
    Epsilon,
    FlowVelocity,
    KarrasPrecond,
    Sample,
    Velocity,
)
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.noise import Cosine, Flow, Karras, LinearBetas, ScaledLinearBetas, Sigmoid
from undiffuse.spec import (
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
    Op,
    Order,
    Out,
    Res,
    Resize,
    Skip,
    Style,
    UNetSpec,
    Up,
    Upsampling,
)
from undiffuse.unet import UNet

ALL_FILES = (*FILES, MANIFEST)


# --- a tiny model and its checkpoints -----------------------------------------------------------


def tiny_spec(classes: int = 2) -> UNetSpec:
    program = (Conv(4), Skip(), Down(), Res(8), Attn(2), Up(), Concat(), Res(4), Out())
    style = Style(groups=2, zero_init=False, embedding=Embedding(4, 6, 6, classes=classes))
    return UNetSpec(1, 1, program, style)


def tiny_model(seed: int = 0) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet(tiny_spec())
    names = ("cat", "dög\n")
    return Model(
        Denoiser(net, Karras(), KarrasPrecond()),
        Pictures(6, 5, 1, class_names=names),
        {"steps": 3, "ema": [0.5, None], "data": {"sha256": "ab"}},
    )


def snapshot(step: int, model: Model | None = None) -> Snapshot:
    """A state in which every number depends on the step."""
    model = model or tiny_model()
    weights = {k: v.detach() + step for k, v in model.net.state_dict().items()}
    tensors = {
        "model": weights,
        "ema": {k: v / 3 for k, v in weights.items()},
        "optim": {
            **{f"{k}/exp_avg": v.double() / 7 for k, v in weights.items()},
            "step": torch.tensor(step),
            "half": torch.tensor([1.5, -0.0, step], dtype=torch.bfloat16),
            "none": torch.empty(0, 3),
        },
    }
    return Snapshot(step, tensors, model, {"seed": 2**63, "lr": 0.1, "best": None}, "run-1")


def assert_same(loaded: Loaded, saved: Snapshot) -> None:
    assert (loaded.step, loaded.run_id) == (saved.step, saved.run_id)
    assert loaded.state == saved.state
    assert loaded.header == saved.model.header
    assert loaded.tensors.keys() == saved.tensors.keys()
    for group, tensors in saved.tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert_bits(loaded.tensors[group][name], tensor)


def assert_bits(a: Tensor, b: Tensor) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    flat_a, flat_b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    assert torch.equal(flat_a, flat_b)


def refused(call: Callable[[], object], match: str | None = None) -> str:
    """The message of the CheckpointError; it must be one line."""
    with pytest.raises(CheckpointError, match=match) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable(), message
    return message


# --- the codec ----------------------------------------------------------------------------------

widths = st.integers(1, 64)
odd = st.sampled_from([1, 3, 5])
plain_ops = st.one_of(
    st.builds(Conv, widths, odd),
    st.builds(Res, widths),
    st.builds(
        Attn, st.just(1), st.booleans(), st.none() | widths, st.integers(0, 3), st.booleans()
    ),
    st.builds(LinearAttn, st.integers(1, 3), widths, st.integers(0, 3)),
    st.builds(Act, st.sampled_from(Activation)),
)
fractions = st.floats(1e-6, 0.99)


@st.composite
def programs(draw: st.DrawFn, depth: int = 2) -> tuple[Op, ...]:
    """Random ops around a random smaller U; any such sandwich is a valid program."""
    before, after = (tuple(draw(st.lists(plain_ops, max_size=3))) for _ in range(2))
    if depth == 0:
        return before
    down = draw(
        st.one_of(
            st.builds(Down, st.sampled_from(Downsampling)),
            st.builds(Down, st.just(Downsampling.CONV), widths),
            st.builds(Res, widths, st.just(Resize.DOWN)),
        )
    )
    up = draw(
        st.one_of(
            st.builds(Up, st.sampled_from(Upsampling)),
            st.builds(Up, st.just(Upsampling.DECONV4), widths),
            st.builds(Res, widths, st.just(Resize.UP)),
        )
    )
    inner = draw(programs(depth=depth - 1))
    return (*before, Skip(), down, *inner, up, Concat(Join.CONCAT), *after)


embeddings = st.builds(
    Embedding,
    st.integers(4, 9),
    widths,
    widths,
    st.sampled_from(Activation),
    st.none() | st.sampled_from(Activation),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
styles = st.builds(
    Style,
    st.sampled_from(Norm),
    widths,
    widths,
    fractions,
    st.sampled_from(Order),
    st.sampled_from(Inject),
    st.sampled_from(Activation),
    fractions,
    fractions,
    st.booleans(),
    st.booleans(),
    embeddings,
)


@given(st.integers(1, 4), st.integers(1, 4), programs(), st.builds(Out, odd, st.booleans()), styles)
@settings(max_examples=40)
def test_any_spec_survives_json(
    in_channels: int, out_channels: int, program: tuple[Op, ...], out: Out, style: Style
) -> None:
    spec = UNetSpec(in_channels, out_channels, (*program, out), style)
    assert decode_spec(json.loads(json.dumps(encode(spec)))) == spec


@pytest.mark.parametrize(
    "schedule",
    [
        *(LinearBetas(10, 0.1, 0.3), ScaledLinearBetas(9, 0.1, 0.2), Sigmoid(11, -2.0, 4.0, 0.9)),
        *(Cosine(7, 0.01, 0.9), Karras(0.004, 9.0), Flow(0.1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedules_survive_json(schedule: object) -> None:
    assert decode_schedule(json.loads(json.dumps(encode(schedule)))) == schedule


@pytest.mark.parametrize(
    "prediction",
    [Epsilon(7, 0.25), Sample(8, 2.0), Velocity(9), FlowVelocity(10), KarrasPrecond(0.3)],
    ids=lambda value: type(value).__name__,
)
def test_predictions_survive_json(prediction: object) -> None:
    assert decode_prediction(json.loads(json.dumps(encode(prediction)))) == prediction


def test_names_of_types_are_distinct() -> None:
    assert len({kind.__name__ for kind in TYPES}) == len(TYPES)


def test_the_form_in_the_file() -> None:
    assert encode(Res(64, Resize.UP)) == {"type": "Res", "width": 64, "resize": "up"}


def test_missing_fields_take_their_defaults() -> None:
    program = [{"type": "Conv", "width": 8}, {"type": "Out"}]
    old = {"type": "UNetSpec", "in_channels": 3, "out_channels": 3, "program": program}
    assert decode_spec(old) == UNetSpec(3, 3, (Conv(8), Out()))
    assert decode_schedule({"type": "Karras"}) == Karras()


def changed_spec(change: Callable[[dict], object]) -> dict:
    value = json.loads(json.dumps(encode(tiny_spec())))
    change(value)
    return value


def set_at(*path_and_value: object) -> Callable[[dict], object]:
    *path, last, value = path_and_value

    def change(table: dict) -> None:
        for key in path:
            table = table[key]
        table[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("program", 3, "type", "Ress"), r"spec.program\[3\]: unknown type 'Ress'; known: C"),
        (set_at("program", 3, "type", "Style"), r"spec.program\[3\]: unknown type 'Style'"),
        (set_at("program", 3, "type", ["Res"]), r"unknown type \['Res'\]"),
        (set_at("program", 3, None), r"spec.program\[3\] must be an object with a type; got None"),
        (set_at("program", "Res"), "spec.program must be a list; got 'Res'"),
        (set_at("program", 3, "widht", 4), r"\[3\] Res: unknown field 'widht'; fields are width"),
        (set_at("program", 3, "width", "64"), r"Res.width must be a whole number .* got '64'"),
        (set_at("program", 3, "width", True), "Res.width must be a whole number .* got True"),
        (set_at("program", 3, "width", 2.0), "Res.width must be a whole number"),
        (set_at("program", 3, "width", 10**5000), "Res.width must be a whole number of at most"),
        (set_at("program", 3, "width", -1), "op 3 Res: width must be a whole number"),
        (set_at("program", 3, "resize", "left"), "resize must be one of down, up; got 'left'"),
        (set_at("program", 5, "type", "Skip"), "Skip: unknown field 'by'; fields are none"),
        (lambda t: t["program"][3].pop("width"), "Res: field 'width' is missing"),
        (lambda t: t["program"].pop(5), "op 5 Concat: features are at 1/2"),
        (set_at("style", "eps", "small"), "spec.style.eps must be a finite number; got 'small'"),
        (set_at("style", "eps", 1e999), "spec.style.eps must be a finite number; got inf"),
        (set_at("style", "eps", False), "spec.style.eps must be a finite number; got False"),
        (set_at("style", "zero_init", 1), "spec.style.zero_init must be true or false; got 1"),
        (set_at("style", "order", None), "spec.style.order must be one of norm_act_conv"),
        (set_at("type", "Karras"), "spec: unknown type 'Karras'; known: UNetSpec"),
    ],
)
def test_what_cannot_be_is_named(change: Callable[[dict], object], message: str) -> None:
    refused(lambda: decode_spec(changed_spec(change)), message)


def test_a_forged_table_is_refused_before_it_is_built() -> None:
    forged = {"type": "LinearBetas", "steps": 10**12}
    refused(lambda: decode_schedule(forged), "schedule LinearBetas.steps must be a whole number")


def test_only_known_types_are_saved() -> None:
    refused(lambda: encode(tiny_model()), "Model cannot be saved in a model file; known types are")


@pytest.mark.parametrize("text", ['{"a":1,"a":2}', "NaN", "[Infinity]", "[" * 10**5, "", b"\xff"])
def test_json_is_strict(text: str | bytes) -> None:
    refused(lambda: parse(text, "x"), "x is damaged: not valid JSON")


# --- the model file -----------------------------------------------------------------------------


def inputs(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 6, 5, generator=generator)
    return x, torch.tensor([3.0, -0.5]), torch.tensor([0, 1])


def test_a_model_draws_the_same_after_a_round_trip(tmp_path: Path) -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.header == model.header == read_header(str(tmp_path / "m.safetensors"))
    assert not loaded.net.training
    for name, weight in model.net.state_dict().items():
        assert_bits(loaded.net.state_dict()[name], weight)
    assert_bits(loaded.net(*inputs(model)), model.net(*inputs(model)))
    loaded.net(*inputs(model)).sum().backward()  # it can be trained on
    assert all(p.grad is not None for p in loaded.net.parameters())
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_given_weights_take_the_place_of_the_nets_own(tmp_path: Path) -> None:
    model = tiny_model()
    average = {k: (v / 2).double() for k, v in model.net.state_dict().items()}
    save_model(tmp_path / "m", model, average)
    for name, weight in load_model(tmp_path / "m").net.state_dict().items():
        assert_bits(weight, average[name].float())


def test_a_model_without_residual_blocks_has_no_embedding(tmp_path: Path) -> None:
    net = UNet(UNetSpec(1, 1, (Conv(4), Act(), Out())))
    save_model(tmp_path / "m", Model(Denoiser(net, Cosine(), Epsilon()), Pictures(4, 4, 1)))
    assert load_model(tmp_path / "m").spec == net.spec


def test_the_safetensors_package_reads_our_file(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(tmp_path / "m", model)
    theirs = safetensors.torch.load_file(tmp_path / "m")
    assert theirs.keys() == model.net.state_dict().keys()
    for name, weight in model.net.state_dict().items():
        assert_bits(theirs[name], weight)
    with safetensors.safe_open(tmp_path / "m", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "undiffuse 1"
    assert json.loads(metadata["prediction"]) == {"type": "KarrasPrecond", "sigma_data": 0.5}


def resaved(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> Path:
    """The file written by the safetensors package after a change, with a matching hash."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = safetensors.torch.load_file(path)
    metadata["file_sha256"] = "0" * 64
    change(tensors, metadata)
    data = safetensors.torch.save(tensors, metadata)
    digest = hashlib.sha256(data).hexdigest()
    path.write_bytes(data.replace(b"0" * 64, digest.encode()))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_model(tmp_path / "m", tiny_model(), disk=Faulty())
    return tmp_path / "m"


def test_we_read_a_file_of_the_safetensors_package(file: Path) -> None:
    resaved(file, lambda tensors, metadata: None)
    for name, weight in tiny_model().net.state_dict().items():
        assert_bits(load_model(file).net.state_dict()[name], weight)


def test_half_precision_weights_become_float32(file: Path) -> None:
    def halve(tensors: dict[str, Tensor], _: object) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    weights = load_model(resaved(file, halve)).net.state_dict()
    for name, weight in tiny_model().net.state_dict().items():
        assert_bits(weights[name], weight.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, m: t.update({"layers.03_res.conv1.weight": torch.zeros(8, 5, 3, 3)}),
            r"layers\.03_res\.conv1\.weight is \[8,5,3,3\] in the file, \[8,4,3,3\] by the spec"
            r" \(op 3 Res\)\. Was the metadata edited\?$",
        ),
        (
            lambda t, m: m.update(spec=m["spec"].replace('"Res","width":8', '"Res","width":6')),
            r"is \[8,4,3,3\] in the file, \[6,4,3,3\] by the spec \(op 3 Res\)",
        ),
        (lambda t, m: t.pop("layers.08_out.conv.bias"), r"bias is missing \(op 8 Out\)\. Was"),
        (lambda t, m: t.pop("embedding.linear1.bias"), r"embedding.linear1.bias is missing\. Was"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "'extra' is in the file, but the spec"),
        (
            lambda t, m: t.update({"layers.00_conv.bias": torch.zeros(4, dtype=torch.int32)}),
            r"layers.00_conv.bias holds torch.int32, not floating numbers",
        ),
        (
            lambda t, m: t["layers.00_conv.bias"].fill_(float("nan")),
            "layers.00_conv.bias has values that are not finite",
        ),
        (lambda t, m: m.update(spec="{"), "spec is damaged: not valid JSON"),
        (lambda t, m: m.update(trained="[]"), r"trained must be an object; got \[\]"),
        (lambda t, m: m.pop("pictures"), "its metadata has no pictures"),
        (
            lambda t, m: m.update(pictures='{"type":"Pictures","height":1,"width":1,"channels":3}'),
            "pictures.channels is 3, but the spec has in_channels 1",
        ),
        (
            lambda t, m: m.update(
                schedule='{"type":"Flow"}', prediction='{"type":"Epsilon","steps":9}'
            ),
            "prediction Epsilon is not finite with schedule Flow",
        ),
        (
            lambda t, m: m.update(format="undiffuse 3", needs="0.9"),
            r"^model format 3 needs undiffuse >= 0.9; this is \d",
        ),
        (lambda t, m: m.update(format="undiffuse 0"), "model format 0 never existed"),
        (lambda t, m: m.pop("format"), "has no undiffuse metadata"),
        (lambda t, m: m.pop("file_sha256"), "its metadata has no proper file_sha256"),
    ],
)
def test_what_does_not_fit_is_named(file: Path, change: Callable, message: str) -> None:
    refused(lambda: load_model(resaved(file, change)), message)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    refused(lambda: load_model(path), "has no undiffuse metadata")
    path.write_text("a text of some length, which is no safetensors file")
    refused(lambda: load_model(path), r"is not a safetensors file: its first bytes b'a text o'")
    path.write_bytes(b"")
    refused(lambda: load_model(path), "is empty")


def test_names_that_are_no_files(tmp_path: Path, file: Path) -> None:
    refused(lambda: load_model(tmp_path / "no"), "no does not exist")
    refused(lambda: load_model(tmp_path), "is a folder, not a file")
    refused(lambda: load_model("/dev/zero"), "is a pipe, socket or device, not a file")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: load_model(tmp_path / "pipe"), "is a pipe, socket or device, not a file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model("zero\0byte")
    (tmp_path / "link").symlink_to(file)
    assert load_model(tmp_path / "link").header == tiny_model().header


HEADERS = [
    ("[]", "its header is no JSON object"),
    ('{"__metadata__":{"a":1}}', "its metadata is not a table of texts"),
    ('{"w":{"dtype":"F32","shape":[1]}}', "'w' does not have dtype, shape and data_offsets"),
    ('{"w":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', "'w': unknown dtype 'F31'"),
    ('{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "impossible shape"),
    ('{"w":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "impossible shape"),
    ('{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "8 bytes by its shape, 4 by"),
    ('{"w":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}', "starts at byte 4, not at 0"),
    ('{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', "4 bytes by its shape, -4 by"),
    ('{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', "1 bytes too many at its end"),
    ('{"w":{"dtype":"U8","shape":[5],"data_offsets":[0,5]}}', r"is truncated \(65 of 66 bytes\)"),
    (
        '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
        '"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        "'b' starts at byte 2, not at 3",
    ),
]


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_forged_headers(tmp_path: Path, header: str, message: str) -> None:
    raw = header.encode()
    (tmp_path / "m").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0\0\0\0")
    refused(lambda: load_model(tmp_path / "m"), message)


def test_forged_counts(tmp_path: Path) -> None:
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    raw = ("{" + ",".join(f'"{i}":{empty}' for i in range(100_002)) + "}").encode()
    (tmp_path / "m").write_bytes(len(raw).to_bytes(8, "little") + raw)
    refused(lambda: load_model(tmp_path / "m"), "lists 100002 tensors; the limit is 100000")
    (tmp_path / "m").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(lambda: load_model(tmp_path / "m"), "the limit is 16777216")


def damages(data: bytes, flips: int, seed: int) -> Iterator[bytes]:
    """Truncated, extended and with single bits flipped, all over the file."""
    for size in (0, 1, 8, len(data) // 2, len(data) - 1):
        yield data[:size]
    yield data + b"\0"
    generator = torch.Generator().manual_seed(seed)
    for bit in torch.randint(8 * len(data), (flips,), generator=generator).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def test_every_damage_to_a_model_file_is_detected(file: Path) -> None:
    original = file.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    for damaged in damages(original, 64, seed=0):
        file.write_bytes(damaged)
        refused(lambda: load_model(file))
    for bit in range(0, 8 * header, 211):  # the header once more, evenly
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        refused(lambda: load_model(file))
    file.write_bytes(original)
    load_model(file)


def test_a_flip_in_the_weights_is_found_by_the_hash(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(lambda: load_model(file), "its contents do not match its SHA-256")
    read_header(file)  # reads no weights, and says so


def test_truncation_is_told_in_sizes(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    sizes = rf"\({len(data) // 2 / 1e3:.1f} of [\d.]+ kB\)$"
    refused(lambda: load_model(file), "m is truncated (inside its header )?" + sizes)
    file.write_bytes(data[:-1])
    refused(lambda: load_model(file), rf"m is truncated \({len(data) / 1e3:.1f} of .* kB\)$")


@given(st.binary(max_size=200), st.integers(0, 10**6), st.integers(0, 50))
@settings(max_examples=150)
def test_any_bytes_load_or_are_refused(tmp_path_factory, junk: bytes, at: int, cut: int) -> None:
    """Junk alone, and junk written over a whole file: no other error, and nothing accepted."""
    folder = tmp_path_factory.getbasetemp()
    whole = folder / "whole"
    if not whole.exists():
        save_model(whole, tiny_model())
    data = whole.read_bytes()
    at %= len(data)
    spliced = data[:at] + junk + data[at + cut :]
    for forged in (junk, len(junk).to_bytes(8, "little") + junk, spliced):
        (folder / "forged").write_bytes(forged)
        if forged != data:
            refused(lambda: load_model(folder / "forged"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=80)
def test_any_json_decodes_or_is_refused(data: st.DataObject) -> None:
    value = json.loads(json.dumps(encode(tiny_spec())))
    place = value
    while isinstance(place, dict | list) and place and data.draw(st.booleans()):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        parent, key = place, data.draw(st.sampled_from(keys))
        place = parent[key]
        if data.draw(st.booleans()):
            parent[key] = data.draw(JSON_VALUES)
            break
    try:
        spec = decode_spec(value)
    except CheckpointError:
        return
    assert decode_spec(json.loads(json.dumps(encode(spec)))) == spec


def test_what_must_not_be_saved(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "m"
    weights = model.net.state_dict()
    bad = {**weights, "layers.00_conv.bias": torch.full((4,), float("inf"))}
    refused(lambda: save_model(path, model, bad), "layers.00_conv.bias has values that are not")
    few = {k: v for k, v in weights.items() if k != "layers.00_conv.bias"}
    refused(lambda: save_model(path, model, few), r"layers.00_conv.bias is missing \(op 0 Conv\)")
    odd_shape = {**weights, "layers.00_conv.bias": torch.zeros(5)}
    refused(lambda: save_model(path, model, odd_shape), r"is \[5\] given, \[4\] by the spec")
    nan = replace(model, trained={"loss": [float("nan")]})
    refused(lambda: save_model(path, nan), r"trained.loss\[0\] must be a finite number; got nan")
    strange = replace(model, trained={"path": Path("x")})  # type: ignore[arg-type]
    refused(lambda: save_model(path, strange), "trained.path must be plain data for JSON")
    steps = replace(model, denoiser=replace(model.denoiser, prediction=Epsilon(10**7)))
    refused(lambda: save_model(path, steps), "prediction Epsilon.steps must be a whole number")
    assert os.listdir(tmp_path) == []


def test_a_model_must_fit_its_pictures() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="channels is 3, but the spec has in_channels 1"):
        replace(model, pictures=Pictures(4, 4, 3))
    with pytest.raises(ConfigError, match="class_names has 1 names, but the spec has 2 classes"):
        replace(model, pictures=Pictures(4, 4, 1, class_names=("a",)))
    with pytest.raises(ConfigError, match="net must be a UNet; got function"):
        replace(model, denoiser=replace(model.denoiser, net=lambda x, t, label: x))
    with pytest.raises(ConfigError, match=r"pictures.height must be .* got 0"):
        Pictures(0, 4, 1)
    with pytest.raises(ConfigError, match=r"pictures.bits must be 8 or 16; got 9"):
        Pictures(4, 4, 1, 9)


def test_an_older_model_stays_until_the_new_one_is_whole(file: Path) -> None:
    old = file.read_bytes()
    count = len(operations(lambda disk: save_model(file, tiny_model(), disk=disk)))
    for index in range(count):
        file.write_bytes(old)
        for error in (OSError(errno.ENOSPC, "No space left on device"), Crash()):
            disk = Faulty(index, error)
            with pytest.raises((ResourceError, Crash)) as caught:
                save_model(file, tiny_model(1), disk=disk)
            if isinstance(error, OSError):
                assert str(caught.value) == f"cannot save {file}: No space left on device"
                assert os.listdir(file.parent) == ["m"]
            weights = load_model(file).net.state_dict()
            assert any(same(weights, tiny_model(seed).net.state_dict()) for seed in (0, 1))
    save_model(file, tiny_model(1))
    assert os.listdir(file.parent) == ["m"]  # leftovers of the crashes are gone


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot save .*no/m: No such file or directory$"):
        save_model(tmp_path / "no" / "m", tiny_model())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


# --- disks that fail ----------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here: nothing that catches Exception may run on."""


@dataclass
class Faulty:
    """A disk on which operation number `fail_at` raises; a write gets half done before.

    `log` holds the operations as (name, path, argument). Nothing is really synced, which makes it
    the fast disk of the tests that do not let it fail.
    """

    fail_at: int = -1
    error: BaseException = field(default_factory=Crash)
    half: bool = True
    free: int = 10**12
    log: list[tuple[str, Path, object]] = field(default_factory=list)

    def _step(self, name: str, path: Path, argument: object = None) -> None:
        index = len(self.log)
        self.log.append((name, path, argument))
        if index == self.fail_at:
            raise self.error

    def make_folder(self, path: Path) -> None:
        self._step("make_folder", path)
        REAL_DISK.make_folder(path)

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        data = b"".join(chunks)
        try:
            self._step("write", path, data)
        except BaseException:
            if self.half:
                REAL_DISK.write(path, [data[: len(data) // 2]])
            raise
        REAL_DISK.write(path, [data])

    def sync(self, path: Path) -> None:
        self._step("sync", path)

    def sync_folder(self, path: Path) -> None:
        self._step("sync_folder", path)

    def rename(self, old: Path, new: Path) -> None:
        self._step("rename", old, new)
        REAL_DISK.rename(old, new)

    def remove(self, path: Path) -> None:
        self._step("remove", path)
        REAL_DISK.remove(path)

    def remove_folder(self, path: Path) -> None:
        self._step("remove_folder", path)
        REAL_DISK.remove_folder(path)

    def free_space(self, path: Path) -> int:
        return self.free


def operations(action: Callable[[Faulty], object]) -> list[tuple[str, Path, object]]:
    disk = Faulty()
    action(disk)
    return disk.log


# --- checkpoints --------------------------------------------------------------------------------

SNAPSHOTS = {step: snapshot(step) for step in (8, 9, 10, 11)}


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep, Faulty())
    for step in steps:
        checkpoints.save(SNAPSHOTS[step])
    return checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 9 and 10; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    saved(folder, 9, 10)
    return folder


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Checkpoints:
    shutil.copytree(two, tmp_path / "checkpoints")
    return Checkpoints(tmp_path / "checkpoints", disk=Faulty())


def test_a_round_trip_is_bit_exact(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == ()
    assert checkpoints.save(SNAPSHOTS[9]) == tmp_path / "checkpoints" / "step_00000009"
    loaded, rejected = checkpoints.read(None)
    assert_same(loaded, SNAPSHOTS[9])
    assert rejected == ()
    assert sorted(os.listdir(checkpoints.path(9))) == sorted(ALL_FILES)


def test_steps_are_ordered_by_number_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 8, 9, 10, 11)
    assert checkpoints.steps() == (10, 11)
    assert sorted(os.listdir(tmp_path)) == ["step_00000010", "step_00000011"]
    assert saved(tmp_path / "three", 8, 9, 10, 11, keep=3).steps() == (9, 10, 11)
    with pytest.raises(ConfigError, match="keep must be at least 2"):
        Checkpoints(tmp_path, keep=1)


def test_large_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, disk=Faulty())
    for step in (99_999_999, 100_000_000):
        checkpoints.save(replace(SNAPSHOTS[9], step=step))
    assert checkpoints.steps() == (99_999_999, 100_000_000)
    assert checkpoints.read(None)[0].step == 100_000_000
    for name in ("step_9", "step_000000009", "step_00000009x", "xstep_00000009", "step_٠٠٠٠٠٠٠٩"):
        (tmp_path / name).mkdir()
    assert checkpoints.steps() == (99_999_999, 100_000_000)


def test_weights_of_an_unfinished_run_draw(copy: Checkpoints) -> None:
    for weights, group in (("ema", "ema"), ("raw", "model")):
        model = copy.model(9, weights)
        for name, weight in SNAPSHOTS[9].tensors[group].items():
            assert_bits(model.net.state_dict()[name], weight)
    latest = copy.model().net.state_dict()
    assert same(latest, SNAPSHOTS[10].tensors["ema"])
    alone = load_model(copy.path(10) / "ema.safetensors")  # each file is usable alone
    assert same(alone.net.state_dict(), SNAPSHOTS[10].tensors["ema"])
    assert alone.header == SNAPSHOTS[10].model.header


def test_nothing_there_differs_from_everything_damaged(copy: Checkpoints, tmp_path: Path) -> None:
    refused(Checkpoints(tmp_path / "no").read, "no holds no checkpoint$")
    refused(lambda: copy.read(5), "step_00000005 does not exist; there are step_00000009, step_0")
    for step in copy.steps():
        (copy.path(step) / "state.json").write_text("{}")
    message = refused(copy.read, "^every checkpoint in .* is damaged: step_00000010.state.json is")
    assert "; step_00000009/state.json is truncated (2 of" in message


def assert_refused_and_passed_over(checkpoints: Checkpoints, file: str) -> None:
    """Step 10 is damaged: explicitly refused, passed over with its reason, never drawn from."""
    explicit = refused(lambda: checkpoints.read(10))
    assert file in explicit
    refused(lambda: checkpoints.model(10))
    loaded, (reason,) = checkpoints.read(None)
    assert loaded.step == 9
    assert reason.startswith("step_00000010")
    assert explicit.endswith(reason)


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_damage_to_a_checkpoint_is_detected(copy: Checkpoints, name: str) -> None:
    path = copy.path(10) / name
    original = path.read_bytes()
    for number, damaged in enumerate(damages(original, 24, seed=len(name))):
        path.write_bytes(damaged)
        explicit = refused(lambda: copy.read(10))
        assert name in explicit or name == MANIFEST
        if number % 6 == 0:
            assert_refused_and_passed_over(copy, "step_00000010")
    path.write_bytes(original)
    assert_same(copy.read(None)[0], SNAPSHOTS[10])


def test_every_part_of_a_manifest_counts(copy: Checkpoints) -> None:
    path = copy.path(10) / MANIFEST
    original = path.read_bytes()
    for bit in range(0, 8 * len(original), 11):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert not is_whole(copy.path(10), 10), (bit, bytes(damaged))


@pytest.mark.parametrize("name", ALL_FILES)
@pytest.mark.parametrize("kind", ["gone", "folder", "link", "pipe", "swapped"])
def test_something_else_in_place_of_a_file(copy: Checkpoints, name: str, kind: str) -> None:
    path, other = copy.path(10) / name, copy.path(9) / name
    if kind == "swapped":
        path.write_bytes(other.read_bytes())
    else:
        moved = path.rename(copy.folder / "moved")
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(moved)  # the right bytes, but not ours to follow
        elif kind == "pipe":
            os.mkfifo(path)
    assert_refused_and_passed_over(copy, name)


def test_directories_that_are_not_what_their_name_says(copy: Checkpoints) -> None:
    copy.path(9).rename(copy.path(12))
    refused(lambda: copy.read(12), r"step_00000012/MANIFEST.json: step is 9, not 12$")
    copy.path(13).symlink_to(copy.path(10))
    refused(lambda: copy.read(13), "step_00000013 is not a folder")
    copy.path(14).write_text("a file")
    refused(lambda: copy.read(14), "step_00000014 is not a folder")
    loaded, rejected = copy.read(None)
    assert loaded.step == 10
    assert [reason[:13] for reason in rejected] == [
        "step_00000014",
        "step_00000013",
        "step_00000012",
    ]


def test_a_checkpoint_from_the_future(copy: Checkpoints) -> None:
    path = copy.path(10) / MANIFEST
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "format": 3, "needs": "0.9", "more": 1}))
    refused(lambda: copy.read(10), r"^checkpoint format 3 needs undiffuse >= 0.9; this is \d")


def test_files_beside_a_checkpoint_are_never_read(copy: Checkpoints) -> None:
    (copy.path(10) / "notes.txt").write_text("mine")
    (copy.folder / "best").mkdir()
    assert copy.read(None)[0].step == 10
    copy.clean()
    assert (copy.folder / "best").is_dir()


def test_damaged_steps_do_not_count_as_kept(copy: Checkpoints) -> None:
    (copy.path(10) / "optim.safetensors").unlink()
    copy.save(SNAPSHOTS[11])
    assert copy.steps() == (9, 10, 11)  # 9 and 11 can be gone back to
    (copy.path(11) / "optim.safetensors").unlink()
    assert copy.read(None)[0].step == 9


def test_saving_a_step_again_replaces_it(copy: Checkpoints) -> None:
    (copy.path(10) / "optim.safetensors").unlink()
    other = replace(SNAPSHOTS[10], state={"again": True})
    copy.save(other)
    assert_same(copy.read(10)[0], other)
    assert sorted(os.listdir(copy.folder)) == ["step_00000009", "step_00000010"]


def test_going_back_never_loses_the_step_just_saved(copy: Checkpoints) -> None:
    copy.save(SNAPSHOTS[8])
    assert copy.steps() == (8, 9, 10)


def test_what_must_not_become_a_checkpoint(tmp_path: Path) -> None:
    good = SNAPSHOTS[9]
    nan = torch.full((4,), float("nan"))
    for group, name in (("model", "layers.00_conv.bias"), ("optim", "layers.00_conv.bias/exp_avg")):
        bad = {**good.tensors, group: {**good.tensors[group], name: nan}}
        refused(
            lambda bad=bad: Checkpoints(tmp_path).save(replace(good, tensors=bad)), re.escape(name)
        )
    fewer = {"model": good.tensors["model"]}
    refused(lambda: Checkpoints(tmp_path).save(replace(good, tensors=fewer)), "groups model, ema")
    refused(lambda: Checkpoints(tmp_path).save(replace(good, step=-1)), "step of at least 0")
    state = {"best": float("inf")}
    refused(lambda: Checkpoints(tmp_path).save(replace(good, state=state)), "state.state.best must")
    assert os.listdir(tmp_path) == []


# --- crashes, full disks, loss of power ---------------------------------------------------------


@pytest.mark.parametrize("before", [(), (9,), (8, 9)], ids=["first", "second", "with prune"])
def test_a_crash_at_any_operation_leaves_old_or_new(tmp_path: Path, before: tuple) -> None:
    def save(folder: Path, disk: Faulty) -> None:
        Checkpoints(folder, disk=disk).save(SNAPSHOTS[10])

    template = tmp_path / "template"
    saved(template, *before)
    template.mkdir(exist_ok=True)
    shutil.copytree(template, tmp_path / "dry")
    log = operations(lambda disk: save(tmp_path / "dry", disk))
    assert [name for name, *_ in log].count("write") == 5
    for index in range(len(log)):
        folder = tmp_path / f"crash_{index}"
        shutil.copytree(template, folder)
        with pytest.raises(Crash):
            save(folder, Faulty(index))
        checkpoints = Checkpoints(folder, disk=Faulty())
        assert_old_or_new(checkpoints, before)
        checkpoints.clean()
        assert_old_or_new(checkpoints, before)
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        checkpoints.save(SNAPSHOTS[11])  # and it goes on
        assert_same(checkpoints.read(None)[0], SNAPSHOTS[11])


def assert_old_or_new(checkpoints: Checkpoints, before: tuple) -> None:
    if not before and not checkpoints.steps():
        return
    loaded, rejected = checkpoints.read(None)
    assert loaded.step in (10, *before[-1:])
    assert_same(loaded, SNAPSHOTS[loaded.step])
    assert rejected == ()


def test_a_crash_while_replacing_a_step(two: Path, tmp_path: Path) -> None:
    again = replace(SNAPSHOTS[10], state={"again": True})
    shutil.copytree(two, tmp_path / "dry")
    log = operations(lambda disk: Checkpoints(tmp_path / "dry", disk=disk).save(again))
    for index in range(len(log)):
        folder = tmp_path / f"crash_{index}"
        shutil.copytree(two, folder)
        with pytest.raises(Crash):
            Checkpoints(folder, disk=Faulty(index)).save(again)
        checkpoints = Checkpoints(folder, disk=Faulty())
        assert checkpoints.read(None)[0].step in (9, 10)
        checkpoints.clean()
        loaded, _ = checkpoints.read(None)
        assert loaded.step == 10  # clean puts back the one that had stepped aside
        assert_same(loaded, again if loaded.state == again.state else SNAPSHOTS[10])
        assert sorted(os.listdir(folder)) == ["step_00000009", "step_00000010"]


def test_interrupting_the_user_leaves_the_old_state(copy: Checkpoints) -> None:
    disk = Faulty(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        replace(copy, disk=disk).save(SNAPSHOTS[11])
    assert_same(copy.read(None)[0], SNAPSHOTS[10])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_is_named_and_harms_nothing(two: Path, tmp_path: Path, code: int) -> None:
    shutil.copytree(two, tmp_path / "dry")
    log = operations(lambda disk: Checkpoints(tmp_path / "dry", disk=disk).save(SNAPSHOTS[11]))
    first_removal = next(i for i, (_, path, _) in enumerate(log) if path.name == "step_00000009")
    for index in range(0, len(log), 5 if code == errno.EDQUOT else 1):
        folder = tmp_path / f"{index}"
        shutil.copytree(two, folder)
        disk = Faulty(index, OSError(code, os.strerror(code)))
        with pytest.raises(ResourceError) as caught:
            Checkpoints(folder, disk=disk).save(SNAPSHOTS[11])
        checkpoints = Checkpoints(folder, disk=Faulty())
        assert_failure_is_named(str(caught.value), checkpoints, code, index >= first_removal)
        assert_same(checkpoints.read(10)[0], SNAPSHOTS[10])
        assert not [name for name in os.listdir(folder) if name.startswith(".tmp")]
        checkpoints.save(SNAPSHOTS[11])  # the next interval tries again
        assert checkpoints.read(None)[0].step == 11


def assert_failure_is_named(
    message: str, checkpoints: Checkpoints, code: int, pruning: bool
) -> None:
    path = checkpoints.path(11)
    if pruning:
        assert message.startswith(f"{path} is saved, but {checkpoints.path(9)} cannot be removed:")
    elif code == errno.EIO:
        assert message.startswith(f"cannot save {path}: Input/output error. step_000000")
    else:
        assert re.match(rf"Disk full: {path} needs [\d.]+ kB, 1000.0 GB free\. step_\d+ ", message)
    assert pruning or message.endswith(" is intact")


def test_a_failed_replacement_is_taken_back(copy: Checkpoints) -> None:
    again = replace(SNAPSHOTS[10], state={"again": True})
    disk = Faulty(13, OSError(errno.EIO, "bad"))  # folder, 5 times write and sync, sync, rename
    with pytest.raises(ResourceError, match="step_00000010 is intact"):
        replace(copy, disk=disk).save(again)
    assert [name for name, *_ in disk.log[12:15]] == ["rename"] * 3
    assert_same(copy.read(10)[0], SNAPSHOTS[10])


def test_space_is_asked_for_before_anything_is_written(copy: Checkpoints, tmp_path: Path) -> None:
    disk = Faulty(free=1000)
    with pytest.raises(ResourceError) as caught:
        replace(copy, disk=disk).save(SNAPSHOTS[11])
    size = sum(file.stat().st_size for file in copy.path(10).iterdir())
    assert str(caught.value) == (
        f"Disk full: {copy.path(11)} needs {1.3 * size / 1e3:.1f} kB, 1.0 kB free."
        " step_00000010 is intact"
    )
    assert disk.log == []
    with pytest.raises(ResourceError, match=r"free\. .*new holds no whole checkpoint$"):
        Checkpoints(tmp_path / "new", disk=disk).save(SNAPSHOTS[11])


def test_a_disk_that_lies_is_found_out(copy: Checkpoints) -> None:
    class Forgetful(Faulty):
        def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
            data = bytearray(b"".join(chunks))
            data[-1] ^= path.name == "ema.safetensors"
            super().write(path, [bytes(data)])

    with pytest.raises(ResourceError, match=r"does not give back what was saved: .*ema\.safet"):
        replace(copy, disk=Forgetful()).save(SNAPSHOTS[11])
    assert copy.steps()[:2] == (9, 10)
    assert copy.read(None)[0].step == 10


@dataclass
class FileNode:
    """Bytes as programs see them, and those that a loss of power would leave."""

    live: bytes
    durable: bytes = b""


@dataclass
class FolderNode:
    live: dict[str, "Node"] = field(default_factory=dict)
    durable: dict[str, "Node"] = field(default_factory=dict)


Node = FileNode | FolderNode
Contents = Callable[[FileNode], bytes]


def replay(log: list[tuple[str, Path, object]], root: Path) -> FolderNode:
    """What a file system that keeps only what was synced would hold after these operations."""
    top = FolderNode()

    def folder(path: Path) -> FolderNode:
        node: Node = top
        for part in path.relative_to(root).parts:
            assert isinstance(node, FolderNode)
            node = node.live[part]
        assert isinstance(node, FolderNode)
        return node

    for name, path, argument in log:
        if name == "sync_folder":
            node = folder(path)
            node.durable = dict(node.live)
            continue
        parent = folder(path.parent).live
        if name == "make_folder":
            parent[path.name] = FolderNode()
        elif name == "write":
            assert isinstance(argument, bytes)
            parent[path.name] = FileNode(argument)
        elif name == "sync":
            node = parent[path.name]
            assert isinstance(node, FileNode)
            node.durable = node.live
        elif name == "rename":
            assert isinstance(argument, Path)
            folder(argument.parent).live[argument.name] = parent.pop(path.name)
        else:
            del parent[path.name]
    return top


def left(
    node: FolderNode, path: Path, durable_names: bool, contents: Contents
) -> Iterator[tuple[Path, bytes | None]]:
    """What stands on the disk after the loss; None is a folder."""
    yield path, None
    for name, child in (node.durable if durable_names else node.live).items():
        if isinstance(child, FileNode):
            yield path / name, contents(child)
        else:
            yield from left(child, path / name, durable_names, contents)


def lay_out(files: dict[Path, bytes | None], root: Path) -> None:
    for path, data in files.items():
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def kept(node: FileNode) -> bytes:
    return node.live


def dropped(node: FileNode) -> bytes:
    return node.durable


def halved(node: FileNode) -> bytes:
    return node.durable or node.live[: len(node.live) // 2]


def zeroed(node: FileNode) -> bytes:
    return node.durable or bytes(len(node.live))


def test_a_loss_of_power_at_any_moment(tmp_path: Path) -> None:
    """Un-synced contents dropped, halved or zeroed; un-synced names kept or undone."""
    root = tmp_path / "real"
    root.mkdir()
    disk = Faulty()
    checkpoints = Checkpoints(root / "checkpoints", disk=disk)
    saved_at: dict[int, int] = {}
    again = replace(SNAPSHOTS[10], state={"again": True})
    for one in (SNAPSHOTS[8], SNAPSHOTS[9], SNAPSHOTS[10], again):
        checkpoints.save(one)
        saved_at.setdefault(one.step, len(disk.log))
    states: set[object] = set()
    for length in range(1, len(disk.log) + 1):
        tree = replay(disk.log[:length], root)
        newest = max((step for step, at in saved_at.items() if at <= length), default=None)
        for durable_names in (False, True):
            for contents in (kept, dropped, halved, zeroed):
                files = dict(left(tree, Path(), durable_names, contents))
                state = (newest, frozenset(files.items()))
                if state not in states:
                    states.add(state)
                    lay_out(files, tmp_path / "after")
                    assert_survived(
                        Checkpoints(tmp_path / "after" / "checkpoints", disk=Faulty()), newest
                    )
                    shutil.rmtree(tmp_path / "after")
    assert len(states) > 100


def assert_survived(checkpoints: Checkpoints, newest: int | None) -> None:
    """As soon as one save had returned, a checkpoint must be there.

    While a step is being replaced, the one below it may be the highest until `clean`.
    """
    if newest is None and not checkpoints.steps():
        return
    assert checkpoints.read(None)[0].step >= min(newest or 0, 9)
    checkpoints.clean()
    assert checkpoints.read(None)[0].step >= (newest or 0)


def test_everything_is_synced_before_its_name_counts(tmp_path: Path) -> None:
    """The order that the two tests above rely on, in words."""
    folder = tmp_path / "checkpoints"
    log = operations(lambda disk: Checkpoints(folder, disk=disk).save(SNAPSHOTS[9]))
    names = [(name, path.name if path.name in ALL_FILES else "") for name, path, _ in log]
    payload = [(verb, name) for name in ALL_FILES for verb in ("write", "sync")]
    assert names == [
        ("make_folder", ""),
        ("sync_folder", ""),
        ("make_folder", ""),
        *payload,
        ("sync_folder", ""),
        ("rename", ""),
        ("sync_folder", ""),
    ]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(tmp_path / "m", tiny_model())
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(SNAPSHOTS[9])
    finally:
        os.umask(before)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640
    assert checkpoints.path(9).stat().st_mode & 0o777 == 0o750
    for file in checkpoints.path(9).iterdir():
        assert file.stat().st_mode & 0o777 == 0o640


# --- the lock -----------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from undiffuse.checkpoint import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_trains(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "src"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        message = rf"{tmp_path} is being trained by PID {holder.pid} on this host$"
        with pytest.raises(ConfigError, match=message), RunLock(tmp_path):
            pass
        holder.kill()  # the lock goes with its holder
        holder.wait()
        with RunLock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_can_be_taken_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    for _ in range(2):
        with lock:
            with pytest.raises(ConfigError, match=f"PID {os.getpid()} on this host"):
                RunLock(tmp_path).__enter__()
            (tmp_path / ".lock").write_text('{"pid": 4711, "host": "elsewhere"}')
            with pytest.raises(ConfigError, match="PID 4711 on elsewhere"), RunLock(tmp_path):
                pass
            (tmp_path / ".lock").write_text("")
            with pytest.raises(ConfigError, match="by another process"), RunLock(tmp_path):
                pass
    with pytest.raises(ResourceError, match=r"cannot lock .*no/.lock: No such file"):
        RunLock(tmp_path / "no").__enter__()


def test_rewind_sets_later_steps_aside_whole(copy: Checkpoints) -> None:
    checkpoints = copy
    whole = {f: (checkpoints.path(10) / f).read_bytes() for f in ALL_FILES}
    assert checkpoints.rewind(9) == (10,)
    assert checkpoints.steps() == (9,)
    (aside,) = checkpoints.folder.glob("set-aside-*-step_00000010")
    assert {f: (aside / f).read_bytes() for f in ALL_FILES} == whole
    checkpoints.clean()
    assert aside.is_dir()
    assert checkpoints.rewind(9) == ()

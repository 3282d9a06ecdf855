"""Foreign files of weights: what is in them comes out to the bit, and nothing in them runs.

The attacks are real: each would write a marker file if anything in it were run.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import dumps

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from undiffuse.errors import CheckpointError
from undiffuse.interop import _child, _files
from undiffuse.interop._files import Foreign, Kind, Limits, Weights, choose_weights, read_tensors

ROOM = 2**30


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, to see that none is left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def state_dict() -> dict[str, Tensor]:
    """What a network's file may hold, with every way in which tensors can share memory."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(6, 4, generator=generator)
    small = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45, 3.4e38])
    return {
        "whole": base,
        "same": base,
        "row": base[2],
        "transposed": base.t(),
        "strided": base[::2, 1:3],
        "spread": base[0].expand(3, 4),
        "edge": small,
        "half": small.half(),
        "bfloat16": base.bfloat16(),
        "float64": base.double() / 3,
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(7.5),
        "count": torch.tensor(2**62),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "parameter": nn.Parameter(base.clone()),
    }


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    flat_a, flat_b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    assert torch.equal(flat_a, flat_b)


def message(path: Path, limits: Limits | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path, limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(tmp_path: Path, value: object, new: bool = True) -> Path:
    path = tmp_path / "net.pt"
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


# --- what is in a file comes out ----------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False])
def test_a_torch_file_comes_out_to_the_bit(tmp_path: Path, scratch: Path, new: bool) -> None:
    # A path that no shell would survive.
    folder = tmp_path / "a b\nc é "
    folder.mkdir()
    path = folder / "-i $(x).ckpt"
    inside = {"model": state_dict(), "ema": {"ema_model.x": torch.ones(2)}, "step": 7, "no": None}
    more = {"opt": {"groups": [{"lr": 0.1, "betas": (0.9, 1)}], "state": {0: {"m": torch.eye(2)}}}}
    torch.save(inside | more, path, _use_new_zipfile_serialization=new)
    foreign = read_tensors(path)
    assert foreign.kind is (Kind.TORCH_ZIP if new else Kind.TORCH_LEGACY)
    expected = {f"model/{name}": tensor for name, tensor in state_dict().items()}
    assert {*expected, "ema/ema_model.x", "opt/state/0/m"} == set(foreign.tensors)
    for name, tensor in expected.items():
        assert_same_bits(foreign.tensors[name], tensor)
        assert type(foreign.tensors[name]) is Tensor
    groups = {"opt/groups/0/lr": 0.1, "opt/groups/0/betas/0": 0.9, "opt/groups/0/betas/1": 1}
    assert foreign.numbers == {"step": 7, **groups}
    assert list(scratch.iterdir()) == []


def test_tensors_that_shared_memory_no_longer_do(tmp_path: Path) -> None:
    found = _child.convert(saved(tmp_path, state_dict()), tmp_path, ROOM)
    assert found["names"] == list(state_dict())
    tensors, _ = _files._read_safetensors(tmp_path / _child.TENSORS, tmp_path)
    tensors["0"].zero_()
    assert tensors["1"].abs().sum() > 0


def test_safetensors_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save_file({"a": torch.ones(2).bfloat16()}, path, {"step": "7"})
    foreign = read_tensors(path)
    assert foreign.kind is Kind.SAFETENSORS
    assert foreign.numbers == {"step": "7"}
    assert_same_bits(foreign.tensors["a"], torch.ones(2).bfloat16())


def test_a_torch_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    torch.save({"a": torch.ones(2)}, path)
    assert _files.kind_of(path) is Kind.TORCH_ZIP


def test_a_safetensors_file_that_changes_later_does_not_change_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"a": torch.ones(2)}, path)
    foreign = read_tensors(path)
    path.write_bytes(b"")
    assert foreign.tensors["a"].tolist() == [1.0, 1.0]


# --- what is refused by its first bytes ---------------------------------------------------------


def archive(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<HTML>", "web page"),
        (b"\x89HDF\r\n\x1a\n" + b"0" * 20, "HDF5"),
        (b"\x08\x01\x12\x00", "TensorFlow SavedModel"),
        (b"0" * 50 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "TensorFlow checkpoint"),
        (b"\x08\x0a\x12\x07pytorch", "ONNX"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x80\x04\x95\x10", "plain pickle"),
        (b"cposix\nsystem\n(S'true'\ntR.", "plain pickle"),
        (b"0123456789 some text", "no file of weights"),
        (b"PK", "no file of weights"),
        ((2**62).to_bytes(8, "little") + b"{}", "no file of weights"),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(data)
    told = message(path)
    assert says in told
    assert "net.safetensors" in told


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a.npy": b"", "b.npy": b""}, "NumPy arrays"),
        ({"word/document.xml": b""}, "other things"),
        ({"net/data.pkl": b"", "net/constants.pkl": b""}, "TorchScript"),
    ],
)
def test_other_archives_are_named(tmp_path: Path, entries: dict[str, bytes], says: str) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(archive(entries))
    assert says in str(_child.convert(path, tmp_path, ROOM)["refused"])


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "no ordinary file" in message(pipe)
    assert "is a folder" in message(tmp_path)
    assert "No such file" in message(tmp_path / "absent.pt")


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    path = saved(tmp_path, {"a": torch.ones(1)})
    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in message(path)


@given(st.binary(max_size=64))
def test_any_first_bytes_give_a_kind_or_one_line(data: bytes) -> None:
    known = _files._kind(data)
    assert known is None or known in Kind
    assert "\n" not in _files._what_else(data, data[-8:])


LONG = "x" * 100_000


def test_names_of_any_length_make_a_short_line(tmp_path: Path) -> None:
    special = {LONG: torch.eye(2).to_sparse()}
    told = message(saved(tmp_path, special))
    assert "sparse" in told
    assert len(told) < 1000
    with pytest.raises(CheckpointError, match="in xxx") as caught:
        choose_weights(foreign(f"{LONG}/a"), Weights.EMA)
    assert len(str(caught.value)) < 1000


def test_a_damaged_header_with_a_long_name_makes_a_short_line(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors({LONG: {"dtype": LONG, "shape": [1], "data_offsets": [0, 4]}}))
    assert len(message(path)) < 1000


@pytest.mark.parametrize("told", ["[]", "7", "null", '"refused"'])
def test_a_result_that_is_no_object_is_refused(tmp_path: Path, told: str) -> None:
    result = tmp_path / "result.json"
    result.write_text(told)
    with pytest.raises(CheckpointError, match="could not be read: what was read is no JSON object"):
        _files._parse(tmp_path / "net.pt", result)


def test_a_name_that_would_break_the_line_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines"
    path.write_bytes(b"")
    assert r"two\nlines" in message(path)


# --- safetensors that lie -----------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"0000"),
        safetensors({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"00"),
        (2**39).to_bytes(8, "little") + b"{}",
        (90).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_safetensors_file_that_lies_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(data)
    assert "net.safetensors" in message(path)


@pytest.mark.parametrize("part", range(1, 16))
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, part: int) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"a": torch.ones(50), "b": torch.ones(3, 4)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * part // 16])
    assert "net.safetensors" in message(path)


# --- what would run -----------------------------------------------------------------------------


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def tar_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_the_attack_is_a_real_one(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = saved(tmp_path, {"a": Attack(marker)})
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("new", [True, False])
def test_what_would_run_in_a_torch_file_does_not(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    marker = tmp_path / "marker"
    # Everything that an environment can say in favour of the attack.
    (tmp_path / "sitecustomize.py").write_text(f"open({str(marker)!r}, 'w')")
    (tmp_path / "json.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, {"w": torch.ones(2), "a": Attack(marker)}, new)
    told = message(path)
    assert f"{os.system.__module__}.system" in told
    assert "net.pt" in told
    assert not marker.exists()
    assert list(scratch.iterdir()) == []


def test_what_would_run_in_other_files_does_not(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "net.pkl"
    attack = dumps({"ema": Attack(marker)})
    for data in (attack, dumps(Attack(marker), 0), tar_of(attack)):
        path.write_bytes(data)
        message(path)
    assert not marker.exists()


TRIES = """
import os, socket, subprocess, sys
from pathlib import Path
from undiffuse.interop import _child
home, outside = Path(sys.argv[1]), Path(sys.argv[2])
_child.limit(2**27, 30)
try:
    bytearray(2**29)
except MemoryError:
    print("memory")
_child.guard(home)
(home / "allowed").write_text("")
tries = {
    "write": lambda: (outside / "marker").write_text(""),
    "append": lambda: open(outside / "kept", "a"),
    "descriptor": lambda: os.open(outside / "marker", os.O_CREAT | os.O_WRONLY),
    "remove": lambda: os.remove(outside / "kept"),
    "rename": lambda: os.rename(outside / "kept", outside / "marker"),
    "system": lambda: os.system(f"touch {outside / 'marker'}"),
    "process": lambda: subprocess.run(["touch", outside / "marker"]),
    "fork": os.fork,
    "socket": lambda: socket.create_connection(("127.0.0.1", 9)),
    "library": lambda: __import__("ctypes").CDLL(None),
    "kill": lambda: os.kill(os.getppid(), 0),
}
for name, attempt in tries.items():
    try:
        attempt()
    except PermissionError:
        print(name)
while True:
    pass
"""


def test_the_process_that_reads_may_do_nothing_else(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (outside / "kept").write_text("")
    script = TRIES.replace("(2**27, 30)", "(2**27, 4)")  # and its last line is cut off by the limit
    done = subprocess.run(
        [sys.executable, "-u", "-c", script, str(home), str(outside)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    wanted = "memory write append descriptor remove rename system process fork socket library kill"
    assert done.stdout.split() == wanted.split(), done.stderr
    assert [file.name for file in outside.iterdir()] == ["kept"]
    assert -done.returncode in (signal.SIGXCPU, signal.SIGKILL)


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, new: bool) -> None:
    data = saved(tmp_path, {"model": state_dict()}, new).read_bytes()
    cut = tmp_path / "cut.pt"
    for part in range(1, 16):
        cut.write_bytes(data[: len(data) * part // 16])
        assert "refused" in _child.convert(cut, tmp_path, ROOM)


FLIPS = """
import json, random, sys
from pathlib import Path
from undiffuse.interop import _child
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
_child.limit(2**28, 60)
data, draw, outcomes = source.read_bytes(), random.Random(7), []
for _ in range(int(sys.argv[3])):
    flipped = bytearray(data)
    for _ in range(draw.choice((1, 1, 3))):
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (folder / "flipped").write_bytes(flipped)
    outcomes.append(list(_child.convert(folder / "flipped", folder, 2**28)))
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("new", [True, False])
def test_flipped_bits_are_refused_or_give_tensors(tmp_path: Path, new: bool) -> None:
    tensors = {"a": torch.ones(40), "b": torch.arange(6).reshape(2, 3)}
    path = saved(tmp_path, {"model": tensors, "step": 3}, new)
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, str(path), str(tmp_path), "250"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == 250
    assert all(outcome in (["refused"], ["names", "numbers"]) for outcome in outcomes)
    assert ["refused"] in outcomes


def test_a_bit_that_flips_inside_a_tensor_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.full((64,), 3.0)})
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((64,), 3.0).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    assert "checksum" in str(_child.convert(path, tmp_path, ROOM)["refused"])


# --- bombs --------------------------------------------------------------------------------------


def zip_bomb(tmp_path: Path, size: int) -> Path:
    """A torch file whose one storage is `size` zeros, packed."""
    small = saved(tmp_path, {"a": torch.zeros(size // 4)})
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    small.unlink()
    return bomb


def test_a_zip_bomb_ends_by_the_limit(tmp_path: Path, scratch: Path) -> None:
    bomb = zip_bomb(tmp_path, 200_000_000)
    assert bomb.stat().st_size < 1_000_000
    told = message(bomb, Limits(memory=2**26))
    assert "memory" in told
    assert list(scratch.iterdir()) == []


def test_a_packed_archive_gives_the_same_tensors(tmp_path: Path) -> None:
    bomb = zip_bomb(tmp_path, 4000)
    assert _child.convert(bomb, tmp_path, ROOM) == {"names": ["a"], "numbers": {}}
    tensors, _ = _files._read_safetensors(tmp_path / _child.TENSORS, bomb)
    assert torch.equal(tensors["0"], torch.zeros(1000))


def test_a_tensor_that_repeats_one_number_without_end_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(1).expand(10**6, 10**6)})
    assert "tensors of 3814697 MiB" in str(_child.convert(path, tmp_path, ROOM)["refused"])


def test_a_dictionary_in_itself_is_refused(tmp_path: Path) -> None:
    inside: dict[str, object] = {"a": torch.ones(1)}
    inside["again"] = inside
    refused = _child.convert(saved(tmp_path, inside), tmp_path, ROOM)["refused"]
    assert "50 deep" in str(refused)


def test_dictionaries_that_multiply_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_child, "MAX_NODES", 1000)
    inside: object = {}
    for _ in range(30):
        inside = {str(key): inside for key in range(10)}
    refused = _child.convert(saved(tmp_path, inside), tmp_path, ROOM)["refused"]
    assert "more than 1000 values" in str(refused)


# --- tensors that are none of ours --------------------------------------------------------------


class Special(Tensor):
    """A subclass, which may do anything when used."""


@pytest.mark.filterwarnings("ignore")  # torch announces changes of these kinds of tensors
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x: x.to_sparse(), "sparse (sparse_coo)"),
        (lambda x: x.to_sparse_csr(), "sparse (sparse_csr)"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantized"),
        (lambda x: torch.nested.nested_tensor([x, x]), "nested"),
        (lambda x: x.to("meta"), "empty (device meta)"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: x.as_subclass(Special), "Special"),
    ],
)
def test_special_tensors_are_refused_by_name(make: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(_child.Refused) as caught:
        _child.flattened({"net": {"w": make(torch.eye(3))}})
    assert says in str(caught.value)
    assert "net/w" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.ones(2), "holds a Tensor, not a dictionary"),
        ({}, "no tensors"),
        ({"step": 3}, "no tensors"),
        ({("a", 1): torch.ones(1)}, "a key that is a tuple"),
        ({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}, "both called 'a/b'"),
    ],
)
def test_what_is_no_state_dict_is_refused(value: object, says: str) -> None:
    with pytest.raises(_child.Refused) as caught:
        _child.flattened(value)
    assert says in str(caught.value)


# --- a process that goes wrong ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import time; time.sleep(60)", "took longer than 2 s"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("import os; os.kill(os.getpid(), 11)", "crashed (SIGSEGV)"),
        ("import os; os.kill(os.getpid(), 24)", "took longer than 2 s"),
        ("raise MemoryError('all gone')", "could not be read: MemoryError: all gone"),
        ("pass", "could not be read: exit code 0"),
        ("open('result.json', 'w').write('{')", "could not be read: Expecting"),
        ("open('result.json', 'w').write('{\"names\": 3}')", "its names are no names"),
        (
            "open('result.json', 'w').write('{\"names\": [], \"numbers\": {\"a\": []}}')",
            "its numbers are no numbers",
        ),
        (
            "open('result.json', 'w').write('{\"names\": [\"a\"], \"numbers\": {}}')",
            "safetensors file: No such file",
        ),
    ],
)
def test_a_process_that_goes_wrong_ends_in_one_line(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, program: str, says: str
) -> None:
    monkeypatch.setattr(_files, "command", lambda *_: [sys.executable, "-I", "-c", program])
    told = message(saved(tmp_path, {"a": torch.ones(1)}), Limits(ROOM, 2.0))
    assert says in told
    assert "net.pt" in told
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu121", "2.9.0"])
def test_an_old_torch_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(CheckpointError, match=r"use torch >= 2\.10"):
        _files._check_torch(tmp_path, version)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git12"])
def test_a_new_torch_is_not(tmp_path: Path, version: str) -> None:
    _files._check_torch(tmp_path, version)


# --- which weights ------------------------------------------------------------------------------


def foreign(*names: str) -> Foreign:
    tensors = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    return Foreign(tensors, {}, Kind.TORCH_ZIP)


TRAINER = (
    *("model/model.x", "model/betas", "opt/state/0/exp_avg", "ema/initted"),
    *("ema/ema_model.model.x", "ema/ema_model.betas", "ema/online_model.model.x"),
)


@pytest.mark.parametrize(
    ("names", "weights", "expected", "note"),
    [
        (TRAINER, Weights.EMA, {"model.x": 4, "betas": 5}, "taken from ema ema_model."),
        (TRAINER, Weights.RAW, {"model.x": 0, "betas": 1}, "taken from model"),
        (("ema/module.x",), Weights.EMA, {"x": 0}, "from ema; prefix module. removed"),
        (("ema_model.x", "online_model.x"), Weights.EMA, {"x": 0}, "taken from ema_model."),
        (("ema_model.x", "online_model.x"), Weights.RAW, {"x": 1}, "taken from online_model."),
        (("state_dict/x", "ema/x"), Weights.RAW, {"x": 0}, "taken from state_dict"),
        (("x", "y"), Weights.EMA, {"x": 0, "y": 1}, "does not say"),
        (("x", "y"), Weights.RAW, {"x": 0, "y": 1}, "does not say"),
        (("module.model.x",), Weights.RAW, {"x": 0}, "prefix module.model. removed"),
        (("model.x", "betas"), Weights.RAW, {"model.x": 0, "betas": 1}, "averaged"),
    ],
)
def test_the_weights_are_found(
    names: tuple[str, ...], weights: Weights, expected: dict[str, int], note: str
) -> None:
    chosen = choose_weights(foreign(*names), weights)
    assert {name: int(tensor) for name, tensor in chosen.tensors.items()} == expected
    assert note in chosen.note


@pytest.mark.parametrize(
    ("names", "weights", "says"),
    [
        (("model/x",), Weights.EMA, "holds no ema weights; ask for its raw weights"),
        (("ema/x",), Weights.RAW, "holds no raw weights; ask for its ema weights"),
        (("ema/ema_model.x",), Weights.RAW, "holds no raw weights"),
        (("model/x", "state_dict/x"), Weights.RAW, r"several networks \(model, state_dict\)"),
        (("generator/x", "other/y"), Weights.RAW, "in generator, other; weights are looked for in"),
    ],
)
def test_weights_that_are_not_there_are_refused(
    names: tuple[str, ...], weights: Weights, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        choose_weights(foreign(*names), weights)

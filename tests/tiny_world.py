"""A folder of tiny pictures and a run of three steps on it: what the commands are tried on."""

import hashlib
import json
import random
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from undiffuse.checkpoint import Model, Pictures, save_model
from undiffuse.cli import main
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.noise import Karras
from undiffuse.recipes import preset
from undiffuse.unet import UNet

CLASSES = ("day", "night")
SIZE = 8
STEPS = 3


@dataclass(frozen=True)
class World:
    """Everything lies under `root`; no test changes the pictures or the weights."""

    root: Path
    pictures: Path
    run: Path

    @property
    def model(self) -> Path:
        return self.run / "model.safetensors"

    def put(self, text: str) -> str:
        """The text with {root}, {pictures}, {run} and {model} replaced by paths."""
        return text.format(root=self.root, pictures=self.pictures, run=self.run, model=self.model)

    def words(self, line: str) -> list[str]:
        """A command line as the shell would split it."""
        return [self.put(word) for word in line.split()]


def draw_pictures(folder: Path, count: int = 12) -> Path:
    """Coloured squares, light ones and dark ones, in one folder per class."""
    dice = random.Random(0)
    for number in range(count):
        name = CLASSES[number % 2]
        low = 128 if name == "day" else 0
        (folder / name).mkdir(parents=True, exist_ok=True)
        colour = tuple(dice.randrange(low, low + 128) for _ in range(3))
        picture = Image.new("RGB", (SIZE, SIZE), colour)
        picture.putpixel((number % SIZE, dice.randrange(SIZE)), (255, 0, 0))
        picture.save(folder / name / f"{number:02d}.png")
    return folder


def make_world(root: Path) -> World:
    """Draw the pictures, and train with the command itself."""
    made = World(root, draw_pictures(root / "pictures"), root / "runs" / "first")
    line = "train {pictures} --output-dir {run} --train-batch-size 4 --quiet --json"
    assert main([*made.words(line), "--max-train-steps", str(STEPS)]) == 0
    return made


def spoil(world: World) -> None:
    """Put beside the run what a user's disk may hold instead of good input."""
    root = world.root
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "a.png").write_text("not a picture")
    (root / "notes").mkdir()
    (root / "notes" / "a.txt").write_text("words")
    (root / "file.txt").write_text("a file")
    _spoil_models(world)
    _spoil_configs(root / "configs")


def _spoil_models(world: World) -> None:
    whole = world.model.read_bytes()
    (world.root / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (world.root / "noise.safetensors").write_bytes(random.Random(0).randbytes(4096))
    (world.root / "none.safetensors").write_bytes(b"")
    _save_without_classes(world.root / "plain.safetensors")
    (world.root / "nan.safetensors").write_bytes(_with_nan(whole))


def _save_without_classes(path: Path) -> None:
    """Untrained weights; nothing is wrong with the file."""
    denoiser = Denoiser(UNet(preset("tiny", 3)), Karras(), KarrasPrecond(0.5))
    save_model(path, Model(denoiser, Pictures(SIZE, SIZE, 3), {}))


def _with_nan(whole: bytes) -> bytes:
    """The last weight is NaN, and the file's own hash is right."""
    data = whole[:-4] + struct.pack("<f", float("nan"))
    mark = re.search(rb'"file_sha256":"([0-9a-f]{64})"', data)
    assert mark is not None
    empty = data[: mark.start(1)] + b"0" * 64 + data[mark.end(1) :]
    digest = hashlib.sha256(empty).hexdigest().encode()
    return data[: mark.start(1)] + digest + data[mark.end(1) :]


def _spoil_configs(folder: Path) -> None:
    folder.mkdir()
    texts = {
        "unknown.json": '{"lerning_rate": 1e-3}',
        "twice.json": '{"seed": 1, "seed": 2}',
        "list.json": "[1, 2]",
        "deep.json": "[" * 100_000,
        "empty.json": "",
        "torn.json": '{"seed": ',
        "nan.json": '{"learning_rate": NaN}',
        "word.json": '{"learning_rate": "fast"}',
        "truth.json": '{"seed": true}',
        "nested.json": '{"model": {"dropout": 0.1}}',
        "unknown.toml": "dim_mults = [1, 2]",
        "twice.toml": "seed = 1\nseed = 2",
        "model.yaml": "seed: 1",
        "bom.json": "\ufeff" + json.dumps({"max_train_steps": 2}),
        "good.toml": "max_train_steps = 2\nrandom_flip = true",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "binary.json").write_bytes(bytes(range(256)))

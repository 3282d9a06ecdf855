"""The data pipeline: decoding a folder, and making the batches of a training step."""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks.cases_train import lesson, our_step
from benchmarks.harness import Bench, Case, NotEqual, Result, chosen, interval, speedup
from benchmarks.peers import Twins, ddpm_twins
from undiffuse import images
from undiffuse.config import TrainConfig
from undiffuse.denoiser import LogNormal
from undiffuse.noise import Karras, Stream, keyed_uniform, order
from undiffuse.training import Batch, Recipe, make_batch

FILES, SIDE, BATCH = 256, 64, 8


def decoding(bench: Bench, files: int = FILES) -> Iterator[Result]:
    """A folder of PNG files into memory, against a bare loop of Pillow."""
    folder = bench.scratch / "pictures"
    write_pictures(folder, files)
    check_pixels(images.load(folder), plain_decode(folder))
    pairs = bench.compare(lambda: images.load(folder), lambda: plain_decode(folder))
    how = f"images.load of {files} colour PNG files of {SIDE}x{SIDE}: decoded, checked, hashed and"
    how += " split, against opening and decoding them with Pillow"
    yield speedup("data/decode/png", how, pairs, files)


def write_pictures(folder: Path, count: int) -> None:
    """Smooth random pictures: noise would make PNG files that nobody has."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:04d}.png")


def plain_decode(folder: Path) -> np.ndarray:
    """(n, 3, h, w) uint8."""
    files = sorted(folder.glob("*.png"))
    return np.stack(
        [np.asarray(Image.open(one).convert("RGB")).transpose(2, 0, 1) for one in files]
    )


def check_pixels(ours: images.Data, plain: np.ndarray) -> None:
    """The same pictures, in whatever order and split.

    Raises:
        NotEqual: a picture differs.
    """
    both = [*ours.train.pixels, *ours.held_out.pixels]
    if sorted(one.tobytes() for one in both) != sorted(one.tobytes() for one in plain):
        raise NotEqual("data/decode: pixels differ from those that Pillow decodes")


def batches(bench: Bench, make: Callable[[Bench], Twins] = ddpm_twins) -> Iterator[Result]:
    """Making a batch against the training step that it is for; it is made one step ahead."""
    given = lesson(bench, "ddpm", make(bench), BATCH)
    pairs = bench.compare(_make(bench), our_step(given, chosen(given.net)))
    shares = [1 / one for one in pairs.speedups]
    low, high = interval(shares)
    yield Result(
        name=f"data/batch/b{BATCH}",
        how="pictures, noise and levels of a batch, made in a thread while the step before runs",
        ours=statistics.median(pairs.ours),
        peer=statistics.median(pairs.peer),
        unit="s",
        ratio=statistics.median(shares),
        width=(high - low) / statistics.median(shares),
        spread=(low, high),
        of="seconds to make a batch / seconds of a training step",
        target="<= 0.02",
        ours_s=pairs.ours,
        peer_s=pairs.peer,
    )


def _make(bench: Bench) -> Callable[[], Batch]:
    """As in a run: colour photographs cut to 32 pixels, order and augmentation by position."""
    data = images.load("photos").train
    config, recipe = TrainConfig(train_batch_size=BATCH), Recipe(Karras(), LogNormal())

    def source(positions: range) -> tuple[Tensor, Tensor | None]:
        draws = keyed_uniform(config.seed, Stream.AUGMENT, positions, 3)
        return data.batch(order(config.seed, len(data), positions), draws), None

    return lambda: make_batch(source, recipe, config, range(BATCH)).to(bench.device)


CASES = (Case("data/decode", decoding), Case("data/batch", batches))

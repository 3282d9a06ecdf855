"""Batches cost little and are, bit for bit, what they were: order, crops, flips, noise, labels."""

import hashlib
from collections.abc import Callable
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undiffuse import noise
from undiffuse.config import TrainConfig
from undiffuse.denoiser import LogNormal
from undiffuse.images import Dataset
from undiffuse.images._dataset import _offsets
from undiffuse.noise import Karras, Stream, keyed, keyed_normal, keyed_uniform
from undiffuse.runs._plan import source_of
from undiffuse.training import Recipe, make_batch

COUNT = 20


def dataset(canvas: tuple[int, int], size: tuple[int, int], dtype: type) -> Dataset:
    """Every stored value is a function of its place."""
    top = 2.0**-12 if dtype is np.float32 else 1
    pixels = (np.arange(COUNT * 3 * canvas[0] * canvas[1]) * 7 % 251 * top).astype(dtype)
    return Dataset(
        pixels=pixels.reshape(COUNT, 3, *canvas),
        labels=np.arange(COUNT) % 4,
        class_names=("a", "b", "c", "d"),
        names=tuple(map(str, range(COUNT))),
        size=size,
        flip=True,
    )


def digest(*arrays: np.ndarray) -> str:
    total = hashlib.sha256()
    for one in arrays:
        total.update(np.ascontiguousarray(one).tobytes())
    return total.hexdigest()[:16]


@pytest.mark.parametrize(
    ("canvas", "dtype", "expected"),
    [
        ((6, 5), np.uint8, "e9c7ea6064eacc0d"),
        ((9, 11), np.uint8, "c25efd73cfbd8a3a"),
        ((9, 11), np.uint16, "e501c10cf3bdc83b"),
        ((7, 5), np.float32, "a4a9eefc4f97e2fc"),
    ],
)
def test_batches_are_the_ones_of_every_earlier_version(
    canvas: tuple[int, int], dtype: type, expected: str
) -> None:
    """A resumed run must see what it would have seen."""
    source = source_of(dataset(canvas, (6, 5), dtype), seed=11)
    parts = [source(range(first, first + 7)) for first in (0, 13, 2**33)]
    x0 = [x.numpy() for x, _ in parts]
    labels = [label.numpy() for _, label in parts if label is not None]
    assert len(labels) == 3
    assert digest(*x0, *labels) == expected


def test_label_dropout_is_the_one_of_every_earlier_version() -> None:
    config = TrainConfig(train_batch_size=40, seed=5, label_dropout=0.5)
    recipe = Recipe(Karras(), LogNormal(), classes=4)
    source = source_of(dataset((6, 5), (6, 5), np.uint8), seed=5)
    batch = make_batch(source, recipe, config, range(80, 120))
    assert batch.label is not None
    assert "".join(map(str, batch.label.tolist())) == "4041444144424304441420344442314043214444"


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.sampled_from(Stream),
    first=st.integers(0, 2**62),
    count=st.integers(0, 5),
    step=st.integers(1, 9),
    part=st.integers(0, 1000),
    width=st.integers(1, 9),
)
def test_numbers_in_turn_are_those_of_each_position_s_own_generator(
    seed: int, stream: Stream, first: int, count: int, step: int, part: int, width: int
) -> None:
    """Odd widths leave half-used words behind, which must not reach the next position."""
    positions = range(first, first + count * step, step)
    own = [keyed(seed, stream, p, part) for p in positions]
    normal = [g.standard_normal((width,), dtype=np.float32) for g in own]
    uniform = [keyed(seed, stream, p, part).random(width) for p in positions]
    got = keyed_normal(seed, stream, positions, (width,), part).numpy()
    assert np.array_equal(got, np.array(normal, dtype=np.float32).reshape(count, width))
    got = keyed_uniform(seed, stream, positions, width, part)
    assert np.array_equal(got, np.array(uniform).reshape(count, width))


@pytest.mark.parametrize(
    "draw",
    [
        lambda positions: keyed_normal(0, Stream.NOISE, positions, (2, 2)),
        lambda positions: keyed_uniform(0, Stream.LEVEL, positions, 3),
    ],
)
def test_a_batch_makes_one_generator(
    draw: Callable[[range], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(seed: int, stream: Stream, position: int, part: int = 0) -> np.random.Generator:
        made.append(position)
        return keyed(seed, stream, position, part)

    monkeypatch.setattr(noise, "keyed", counted)
    draw(range(100))
    assert len(made) == 1


ENDS = st.sampled_from([0.0, 0.5, np.nextafter(1.0, 0.0)])


@given(st.lists(st.floats(0, 1, exclude_max=True) | ENDS, max_size=9), st.integers(0, 10_000))
def test_crops_lie_where_one_by_one_arithmetic_puts_them(uniform: list[float], room: int) -> None:
    """floor(u (room + 1)), at most room: the largest double below 1 may round up."""
    got = _offsets(np.array(uniform, dtype=np.float64), room)
    assert got.dtype == np.int64
    assert got.tolist() == [min(floor(u * (room + 1)), room) for u in uniform]


def test_pictures_of_a_batch_are_its_own() -> None:
    """A batch changed by training must not change what is stored."""
    data = dataset((6, 5), (6, 5), np.float32)
    before = data.pixels.copy()
    data.batch(np.arange(5), np.full((5, 3), 0.9)).fill_(9.0)
    assert np.array_equal(data.pixels, before)
    assert torch.equal(data.batch([1], np.full((1, 3), 0.9))[0], torch.from_numpy(before[1]))

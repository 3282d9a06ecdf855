"""The border: pixel values, damaged and hostile files, folders, splits, cache, writing."""

import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from undiffuse import images
from undiffuse.errors import ConfigError, DataError, ResourceError
from undiffuse.images import DataOptions, Dataset, OnBadImage, load

RNG = np.random.default_rng(5)
NOISE = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def stored(path: Path, channels: int, background: str = "white") -> list[list[list[int]]]:
    """The bytes that a picture is read as: (c, h, w)."""
    return images.to_uint8(images.read(path, channels, background=background)).tolist()


def write(path: Path, pixels: np.ndarray = NOISE, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def folder(root: Path, count: int = 10, size: tuple[int, int] = (6, 8)) -> Path:
    """``count`` RGB pictures of different contents."""
    for index in range(count):
        write(root / f"{index:03d}.png", RNG.integers(0, 256, (*size, 3), dtype=np.uint8))
    return root


def read_or_refused(path: Path) -> torch.Tensor | None:
    """None after a DataError of one line; anything else that is raised fails the test."""
    try:
        return images.read(path, 3)
    except DataError as error:
        return None if len(str(error).splitlines()) == 1 else pytest.fail(repr(error))


def bytes_of(part: Dataset) -> dict[str, np.ndarray]:
    return dict(zip(part.names, part.pixels, strict=True))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Lets values of wrong types reach our own checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


# Values ------------------------------------------------------------------------------------------


def test_all_bytes_survive_the_way_in_and_out() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    there = images.to_float(values)
    assert there[0] == -1
    assert there[-1] == 1
    assert there.dtype is torch.float32
    assert torch.equal(images.to_uint8(there), values)


def test_all_16_bit_values_survive_the_way_in_and_out() -> None:
    values = np.arange(65536, dtype=np.uint16)
    there = images.to_float(values)
    assert (there[0], there[-1]) == (-1, 1)
    assert np.array_equal(images.to_uint16(there).numpy(), values)


def test_what_is_out_of_range_is_clamped_and_floats_pass() -> None:
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 9.0, float("nan"), float("inf"), -float("inf")])
    assert images.to_uint8(x).tolist() == [0, 0, 128, 255, 255, 0, 255, 0]
    assert images.to_uint16(x).tolist() == [0, 0, 32768, 65535, 65535, 0, 65535, 0]
    assert torch.equal(images.to_float(x[:5]), x[:5])


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([0, 1])
    if transparent:
        image.info["transparency"] = 1
    return image


def pixel(mode: str, *values: object) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


# Grey from RGB is (19595 R + 38470 G + 7471 B + 32768) >> 16, ITU-R BT.601. Half transparent:
# 128/255 of the picture, the rest background.
MODES: list[tuple[str, str, Callable[[], Image.Image], int, list[list[int]]]] = [
    ("1", "png", lambda: pixel("1", 0, 255), 1, [[0, 255]]),
    ("L", "png", lambda: pixel("L", 7, 250), 3, [[7, 250]] * 3),
    ("L", "bmp", lambda: pixel("L", 7, 250), 1, [[7, 250]]),
    ("RGB", "png", lambda: pixel("RGB", (255, 0, 0), (0, 0, 255)), 1, [[76, 29]]),
    ("RGB", "bmp", lambda: pixel("RGB", (1, 2, 3)), 3, [[1], [2], [3]]),
    ("RGB to RGBA", "png", lambda: pixel("RGB", (1, 2, 3)), 4, [[1], [2], [3], [255]]),
    ("RGBA", "png", lambda: pixel("RGBA", (9, 8, 7, 0), (9, 8, 7, 255)), 3,
     [[255, 9], [255, 8], [255, 7]]),
    ("RGBA half", "webp", lambda: pixel("RGBA", (0, 0, 0, 128)), 3, [[127]] * 3),
    ("RGBA kept", "png", lambda: pixel("RGBA", (9, 8, 7, 33)), 4, [[9], [8], [7], [33]]),
    ("LA", "png", lambda: pixel("LA", (10, 0), (10, 255)), 1, [[255, 10]]),
    ("P", "png", lambda: palette(False), 3, [[10, 200], [20, 100], [30, 0]]),
    ("P transparent", "png", lambda: palette(True), 3, [[10, 255], [20, 255], [30, 255]]),
    ("P gif", "gif", lambda: palette(False), 3, [[10, 200], [20, 100], [30, 0]]),
    ("CMYK", "tif", lambda: pixel("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)), 3,
     [[255, 0, 0], [255, 255, 0], [255, 255, 0]]),
    ("YCbCr", "tif", lambda: pixel("YCbCr", (90, 128, 128)), 3, [[90]] * 3),
    ("I;16", "png", lambda: Image.fromarray(np.array([[0, 257 * 77, 65535]], np.uint16)), 3,
     [[0, 77, 255]] * 3),
    ("I", "tif", lambda: Image.fromarray(np.array([[0, 257 * 77, 65535]], np.int32)), 1,
     [[0, 77, 255]]),
    ("F", "tif", lambda: Image.fromarray(np.array([[0, 0.2, 1]], np.float32)), 1, [[0, 51, 255]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "suffix", "make", "channels", "expected"), MODES)
def test_every_mode_has_stated_values(
    tmp_path: Path,
    name: str,
    suffix: str,
    make: Callable[[], Image.Image],
    channels: int,
    expected: list[list[int]],
) -> None:
    path = tmp_path / f"{name.replace(';', '')}.{suffix}"
    make().save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert stored(path, channels) == [[row] for row in expected]


def test_transparency_is_composited_on_the_background(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    pixel("RGBA", (9, 8, 7, 0)).save(path)
    assert stored(path, 3, "#102030") == [[[16]], [[32]], [[48]]]


def test_16_bit_grey_is_kept_and_scaled_only_for_colour(tmp_path: Path) -> None:
    values = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    for suffix in ("png", "tif"):
        path = write(tmp_path / f"a.{suffix}", values)
        assert np.array_equal(images.to_uint16(images.read(path, 1))[0].numpy(), values)
        eight = np.array(stored(path, 3), dtype=np.float64)
        assert np.abs(eight - values / 257).max() <= 0.5


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    values = np.array([[1, 256, 65535]], dtype=np.uint16)
    tags = [(256, 3), (257, 1), (258, 16), (259, 1), (262, 1), (273, 122), (278, 1), (279, 6)]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"MM" + struct.pack(">HIH", 42, 8, len(tags)) + entries + bytes(4)
    path = tmp_path / "a.tif"
    path.write_bytes(head.ljust(122, b"\0") + values.astype(">u2").tobytes())
    assert images.to_uint16(images.read(path, 1)).tolist() == [values.tolist()]


def test_float_and_integer_greys_out_of_range_are_refused(tmp_path: Path) -> None:
    for values in (
        np.array([[0.5, np.nan]], np.float32),
        np.array([[0.5, 255]], np.float32),
        np.array([[-1, 5]], np.int32),
        np.array([[65536, 5]], np.int32),
    ):
        path = write(tmp_path / "a.tif", values)
        with pytest.raises(DataError, match="finite and within 0"):
            images.read(path, 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_eight_orientations_are_identical(tmp_path: Path, suffix: str) -> None:
    # One colour per quarter in blocks of 16: a JPEG keeps them apart.
    upright = np.kron(np.array([[10, 90, 250], [200, 40, 130]]), np.ones((16, 16)))
    # EXIF names the visual side of the stored row 0 and column 0: 6 is right, top.
    turned = [
        upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1],
        upright.T, upright[:, ::-1].T, upright[::-1, ::-1].T, upright[::-1].T,
    ]  # fmt: skip
    for orientation, values in enumerate(turned, 1):
        shown = Image.fromarray(values.astype(np.uint8)).convert("RGB")
        exif = Image.Exif()
        exif[274] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        lossless = {"lossless": True} if suffix == "webp" else {}
        shown.save(path, exif=exif, **lossless)
        got = np.array(stored(path, 1)[0])
        assert got.shape == (32, 48)
        assert np.abs(got - upright).max() <= (3 if suffix == "jpg" else 0)
    options = DataOptions(resolution=None)  # rotated headers must not look like other sizes
    data = load(tmp_path, options)
    assert any(note.startswith("7 turned upright") for note in data.notes)


def test_first_frame_of_animations(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("gif", "webp", "png", "tif"):
        lossless = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(
            tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **lossless
        )
    data = load(tmp_path)
    assert any(note.startswith("4 with several frames") for note in data.notes)
    for pixels in (data.train.pixels, data.held_out.pixels):
        assert (pixels == np.array([255, 0, 0]).reshape(1, 3, 1, 1)).all()


def test_16_bit_colour_is_counted(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    row = b"\0" + b"".join(struct.pack(">3H", 257 * 10, 257 * 20, 257 * 30) for _ in range(4))
    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    data = load(tmp_path)
    assert data.train.pixels[0, :, 0, 0].tolist() == [10, 20, 30]
    assert "1 in 16-bit colour: decoded to 8 bits." in data.notes


# Fitting -----------------------------------------------------------------------------------------


def test_resize_keeps_means_and_cuts_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 200
    path = write(tmp_path / "a.png", wide)
    fitted = images.to_uint8(images.read(path, 1, (10, 10)))
    assert fitted.shape == (1, 10, 10)
    assert (fitted[..., 2:-2].int() - 200).abs().max() <= 1  # Lanczos rings beside the edges
    half = images.to_uint8(images.read(path, 1, (20, 40)))[0]
    assert half.shape == (20, 40)
    assert (half == torch.from_numpy(wide[:, 10:50])).all()


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    path = write(tmp_path / "a.png", stripes)
    fitted = images.to_uint8(images.read(path, 1, (8, 8)))[0, :, 1:-1]
    assert (fitted.float() - 127.5).abs().max() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (7, 7)])
def test_odd_sizes_are_fitted(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write(tmp_path / "a.png", np.full(size, 80, np.uint8))
    fitted = images.to_uint8(images.read(path, 1, (8, 12)))
    assert fitted.shape == (1, 8, 12)
    assert (fitted == 80).all()


def test_16_bit_is_resized_in_16_bits(tmp_path: Path) -> None:
    values = np.full((16, 16), 1000, np.uint16)
    values[:, 8:] = 1001
    path = write(tmp_path / "a.png", values)
    fitted = images.to_uint16(images.read(path, 1, (8, 8)))
    assert set(fitted.flatten().tolist()) == {1000, 1001}


def test_large_jpegs_decoded_at_a_fraction_stay_close(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (512, 1)), np.tile(ramp[:, None], (1, 512))], -1)
    picture = np.concatenate([picture, np.full((512, 512, 1), 99, np.uint8)], -1)
    small = images.read(write(tmp_path / "a.jpg", picture, quality=95), 3, (32, 32))
    exact = images.read(write(tmp_path / "a.png", picture), 3, (32, 32))
    assert (small - exact).abs().max() < 4 * 2 / 255


# Damaged and hostile files -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.9])
def test_truncated_files_are_skipped_and_named(tmp_path: Path, suffix: str, share: float) -> None:
    folder(tmp_path / "x", 4, (32, 32))
    pixels = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = write(tmp_path / "x" / f"bad.{suffix}", pixels)
    whole.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    data = load(tmp_path / "x")
    assert [one.name for one in data.skipped] == [f"bad.{suffix}"]
    assert len(data.train) + len(data.held_out) == 4
    assert f"bad.{suffix}" not in data.train.names + data.held_out.names
    note = next(note for note in data.notes if note.startswith("Skipped"))
    assert note.startswith(f"Skipped 1 of 5 images: bad.{suffix} (")
    assert "\n" not in note
    with pytest.raises(DataError, match=rf"bad\.{suffix} cannot be used.*--on-bad-image skip"):
        load(tmp_path / "x", DataOptions(on_bad_image=OnBadImage.ERROR))


def test_what_was_skipped_leaves_the_other_pictures_in_place(tmp_path: Path) -> None:
    folder(tmp_path, 12, (16, 16))
    expected = {
        path.name: np.moveaxis(np.asarray(Image.open(path)), -1, 0)
        for path in sorted(tmp_path.iterdir())
    }
    for name in ("003.png", "007.png"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-200])
    data = load(tmp_path)
    got = bytes_of(data.train) | bytes_of(data.held_out)
    assert sorted(got) == sorted(expected.keys() - {"003.png", "007.png"})
    assert all(np.array_equal(pixels, expected[name]) for name, pixels in got.items())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_flipped_bytes_give_values_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("flip") / "a"
    suffix = data.draw(st.sampled_from(["png", "jpg", "webp", "bmp", "gif", "tif"]))
    path = write(path.with_suffix(f".{suffix}"))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    x = read_or_refused(path)
    assert x is None or x.abs().max() <= 1


def bomb(path: Path, side: int) -> Path:
    """A BMP header that announces side × side pixels, without any."""
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    path.write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info)
    return path


@pytest.mark.parametrize("side", [8001, 10_000, 14_200, 60_000])
def test_bombs_are_refused_by_their_header(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    with pytest.raises(DataError, match="more than 64 megapixels"):
        images.read(bomb(tmp_path / "a.bmp", side), 3)


def test_bombs_are_skipped_in_worker_threads(tmp_path: Path) -> None:
    folder(tmp_path, 3)
    bomb(tmp_path / "b.bmp", 10_000)
    bomb(tmp_path / "c.bmp", 60_000)
    reasons = {one.reason for one in load(tmp_path).skipped}
    assert reasons == {"more than 64 megapixels"}


def test_png_text_bomb(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    text = b"k\0\0" + zlib.compress(bytes(80_000_000), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + text))
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunk + content[33:])
    x = read_or_refused(path)
    assert x is None or np.array_equal(images.to_uint8(x).numpy(), np.moveaxis(NOISE, -1, 0))


@pytest.mark.skipif(os.name == "nt", reason="POSIX file kinds")
def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, 3)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "self").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "linked.png").symlink_to("000.png")
    (tmp_path / "empty.png").mkdir()
    opened: list[str] = []
    real = os.open

    def spy(path: Path, *rest: int) -> int:
        opened.append(Path(path).name)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", spy)
    data = load(tmp_path)
    assert {"000.png", "linked.png"} <= set(opened)
    assert "fifo.png" not in opened
    assert {one.name for one in data.skipped} == {"fifo.png", "dangling.png", "loop.png"}
    assert sorted(data.train.names + data.held_out.names) == [
        "000.png", "001.png", "002.png", "linked.png",
    ]  # fmt: skip
    with pytest.raises(DataError, match="not a regular file"):
        images.read(tmp_path / "fifo.png", 3)
    assert "fifo.png" not in opened


def test_foreign_formats_are_not_tried(tmp_path: Path) -> None:
    for kind in ("PPM", "ICO", "TGA", "PDF", "EPS"):
        Image.fromarray(NOISE).save(tmp_path / "a.png", format=kind)
        with pytest.raises(DataError, match="not a JPEG, PNG, WebP, BMP, GIF or TIFF"):
            images.read(tmp_path / "a.png", 3)


def test_a_wrong_suffix_is_read_and_noted(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", format="PNG")
    write(tmp_path / "b.JPEG")
    data = load(tmp_path)
    assert not data.skipped
    assert "1 with another format than their suffix says." in data.notes


def test_truncated_loading_must_be_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigError, match="LOAD_TRUNCATED_IMAGES"):
        load(folder(tmp_path, 2))


# Folders -----------------------------------------------------------------------------------------


def test_order_suffixes_and_hidden_files(tmp_path: Path) -> None:
    for name in (
        "b.PNG",
        "a/z.jpg",
        "Z.png",
        ".hidden.png",
        "._b.png",
        ".cache/c.png",
        "notes.txt",
    ):
        Image.fromarray(NOISE).save(write(tmp_path / "tmp.png").rename(tmp_path / "tmp.png"))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tmp.png").rename(tmp_path / name)
    data = load(tmp_path)
    assert sorted(data.train.names + data.held_out.names) == ["Z.png", "a/z.jpg", "b.PNG"]


def test_class_folders(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.png", "dog/1.png"):
        write(tmp_path / "all" / name)
    data = load(tmp_path)
    assert data.train.class_names == ("cat", "dog")
    for part in (data.train, data.held_out):
        assert part.labels is not None
        assert [part.class_names[label] for label in part.labels] == [
            name.split("/")[1] for name in part.names
        ]
    write(tmp_path / "all" / "loose.png")
    assert load(tmp_path).train.labels is None


def test_numbered_classes_are_in_numeric_order(tmp_path: Path) -> None:
    for name in ("10", "9", "2"):
        write(tmp_path / name / "a.png")
    assert load(tmp_path).train.class_names == ("2", "9", "10")


def test_split_folders(tmp_path: Path) -> None:
    for name in ("train/b/1.png", "train/a/1.png", "train/a/2.png", "test/c/1.png", "extra.png"):
        write(tmp_path / name)
    data = load(tmp_path)
    assert sorted(data.train.names) == ["train/a/1.png", "train/a/2.png", "train/b/1.png"]
    assert data.held_out.names == ("test/c/1.png",)
    assert data.train.class_names == data.held_out.class_names == ("a", "b", "c")
    assert data.held_out.labels is not None
    assert data.held_out.labels.tolist() == [2]
    assert "1 images outside train/ and test/ are left alone." in data.notes
    write(tmp_path / "val" / "c" / "9.png")
    assert load(tmp_path).held_out.names == ("val/c/9.png",)


@pytest.mark.parametrize(
    ("table", "content"),
    [
        ("metadata.csv", "file_name,label\na.png,cat\nsub/b.png,dog\n./c.png,cat\n"),
        ("labels.csv", '\ufefflabel,file_name\ncat,a.png\n"dog",sub/b.png\ncat,c.png\n'),
        (
            "metadata.jsonl",
            '{"file_name":"a.png","label":"cat"}\n{"file_name":"sub/b.png","label":"dog"}\n\n'
            '{"file_name":"c.png","label":"cat","other":[1]}\n',
        ),
    ],
)
def test_tables_give_labels(tmp_path: Path, table: str, content: str) -> None:
    for name in ("a.png", "sub/b.png", "c.png"):
        write(tmp_path / name)
    (tmp_path / table).write_text(content, encoding="utf-8")
    data = load(tmp_path)
    assert not data.skipped
    assert data.train.class_names == ("cat", "dog")
    assert data.train.labels is not None
    assert data.held_out.labels is not None
    labels = [*data.train.labels, *data.held_out.labels]
    found = dict(zip(data.train.names + data.held_out.names, labels, strict=True))
    assert found == {"a.png": 0, "sub/b.png": 1, "c.png": 0}


def test_what_only_table_or_folder_has_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "extra.png"):
        write(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(
        "file_name,label\na.png,1\nb.png,0\ngone.png,1\n../../etc/x.png,1\n"
    )
    data = load(tmp_path)
    assert {(one.name, one.reason) for one in data.skipped} == {
        ("gone.png", "named in metadata.csv but not there"),
        ("../../etc/x.png", "named in metadata.csv but not there"),
        ("extra.png", "not in metadata.csv"),
    }
    with pytest.raises(DataError, match=r"named in metadata\.csv but not there"):
        load(tmp_path, DataOptions(on_bad_image=OnBadImage.ERROR))


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("metadata.csv", "name,label\na.png,1\n", "line 2: no file_name; found label, name"),
        ("metadata.csv", "file_name,label\na.png\n", "line 2: label must be"),
        ("metadata.csv", "file_name,label\na.png,1\na.png,2\n", "already has another label"),
        ("metadata.csv", b"file_name\n\xff\xfe.png\n", "metadata.csv cannot be read"),
        ("metadata.jsonl", '{"file_name":"a.png","label":1.5}', "line 1: label must be"),
        ("metadata.jsonl", "[1]", "line 1 is not a JSON object"),
        ("metadata.jsonl", "\n{", "line 2 is not JSON"),
        ("metadata.jsonl", "[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_bad_tables(tmp_path: Path, table: str, content: str | bytes, message: str) -> None:
    write(tmp_path / "a.png")
    (tmp_path / table).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_table_without_labels_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,hello\n")
    data = load(tmp_path)
    assert data.train.labels is None
    assert any("no label for every image" in note for note in data.notes)


def run_folder(path: Path) -> Path:
    folder(path / "samples", 2, (16, 16))
    for name in ("config.json", "run.json"):
        (path / name).write_text("{}")
    return path


def test_runs_inside_a_folder_are_not_data(tmp_path: Path) -> None:
    for label in "ab":
        folder(tmp_path / label, 4)
    before = load(tmp_path)
    run_folder(tmp_path / "runs" / "light-001")
    run_folder(tmp_path / "a" / "runs" / "old" / "light-002")
    after = load(tmp_path)
    assert after.fingerprint == before.fingerprint
    assert sides(after) == sides(before)
    assert after.train.class_names == ("a", "b")
    (note,) = set(after.notes) - set(before.notes)
    assert note == ("2 run folders are not read as data: a/runs/old/light-002/, runs/light-001/.")
    (tmp_path / "runs" / "light-001" / "run.json").unlink()
    with pytest.raises(DataError, match="differ in size"):
        load(tmp_path)


def test_a_folder_of_nothing_but_runs(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "light-001")
    with pytest.raises(DataError, match=r"no files\. 1 run folder is not read as data: light-001/"):
        load(tmp_path)
    assert len(load(run / "samples").train.names) == 1  # samples may be data where they are named


def test_a_scan_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "train" / "a", 3, (6, 8))
    folder(tmp_path / "train" / "b", 2, (9, 9))
    write(tmp_path / "val" / "a" / "x.png", NOISE[..., 0])
    (tmp_path / "val" / "a" / "bad.png").write_text("no picture")
    for name in ("a.txt", "b.txt", "c"):
        (tmp_path / name).write_text("")
    run_folder(tmp_path / "runs" / "light-001")

    def never(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    found = images.scan(tmp_path)
    assert (found.count, len(found.paths)) == (6, 6)
    assert found.size is None
    assert found.sizes == (((6, 8), 4), ((9, 9), 2))
    assert found.modes == (("RGB", 5), ("L", 1))
    assert (found.channels, found.bits) == (3, 8)
    assert found.splits == (5, 1)
    assert found.classes == (("a", 4), ("b", 2))
    assert found.ignored == ((".txt", 2), ("without a suffix", 1))
    assert [one.name for one in found.skipped] == ["val/a/bad.png"]
    assert "1 run folder is not read as data: runs/light-001/." in found.notes
    assert any(note.startswith("5 RGB, 1 L: converting all to RGB") for note in found.notes)
    with pytest.raises(DataError, match="is no folder"):
        images.scan(tmp_path / "a.txt")


def test_a_scan_says_what_load_reads(tmp_path: Path) -> None:
    for label in "ab":
        folder(tmp_path / label, 6)
    rows = "".join(f"{label}/{i:03d}.png,{label}\n" for label in "ab" for i in range(6))
    (tmp_path / "labels.csv").write_text("file_name,label\n" + rows)
    found, data = images.scan(tmp_path), load(tmp_path)
    assert found.count == len(data.train) + len(data.held_out)
    assert (found.size, found.channels, found.bits) == (data.train.size, 3, 8)
    assert found.classes == (("a", 6), ("b", 6))
    assert found.splits is None
    assert found.ignored == ()  # the table is in use


def test_empty_and_missing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs-a").mkdir()
    with pytest.raises(DataError, match=r"^No images in runs-a\..*; found no files\. Try:"):
        load("runs-a")
    for name in ("a.npy", "b.npy", "c.txt"):
        (tmp_path / "runs-a" / name).write_text("")
    with pytest.raises(
        DataError,
        match=r"^No images in runs-a\. Looked for \.png .* in all sub-folders; "
        r"found 3 files, most often \.npy\. Try: undiffuse describe runs-a$",
    ):
        load("runs-a")
    with pytest.raises(DataError, match=r"^No folder or \.npz at runs-b\. Did you mean runs-a\?$"):
        load("runs-b")
    with pytest.raises(DataError, match=r"^No folder or \.npz at digitz\. Did you mean digits\?$"):
        load("digitz")
    with pytest.raises(DataError, match=r"^No folder or \.npz at qqqqqqqqq\.$"):
        load("qqqqqqqqq")
    with pytest.raises(DataError, match=r"is neither a folder nor an \.npz file"):
        load("runs-a/c.txt")
    with pytest.raises(DataError, match="is one picture"):
        load(write(Path("one.png")))
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(DataError, match="No folder or"):
            load(name)


def test_folders_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, 2)
    (tmp_path / "locked").mkdir()
    real = os.scandir
    locked = tmp_path / "locked"

    def refuse(path: Path) -> object:
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    skipped = load(tmp_path).skipped
    assert [(one.name, one.reason) for one in skipped] == [
        ("locked/", "folder cannot be read: permission denied")
    ]
    with pytest.raises(DataError, match="locked cannot be read: permission denied"):
        load(locked)


def test_only_bad_pictures(tmp_path: Path) -> None:
    for index in range(7):
        (tmp_path / f"{index}.png").write_text("no picture")
    with pytest.raises(DataError, match=r"^None of the 7 images in .*: 0\.png \(not a .*, …$"):
        load(tmp_path)


@pytest.mark.parametrize("side", ["train", "held out"])
def test_a_side_whose_pictures_are_all_bad(tmp_path: Path, side: str) -> None:
    folder(tmp_path, 2, (16, 16))
    data = load(tmp_path)
    bad = (data.train if side == "train" else data.held_out).names[0]
    path = tmp_path / bad
    path.write_bytes(path.read_bytes()[:-200])
    data = load(tmp_path)
    assert len(data.train) == len(data.held_out) == 1
    assert bad not in data.train.names + data.held_out.names


@pytest.mark.skipif(os.name == "nt", reason="POSIX file names")
def test_any_file_name_gives_printable_lines(tmp_path: Path) -> None:
    for name in (b"a\nb.png", b"\xff\xfe.png", "ä😀.png".encode(), b"\x1b[31m.png"):
        write(tmp_path / "x.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    (tmp_path / "bad\r.png").write_text("")
    data = load(tmp_path)
    names = data.train.names + data.held_out.names
    assert sorted(names) == ["\\x1b[31m.png", "\\xff\\xfe.png", "a\\nb.png", "ä😀.png"]
    assert data.skipped[0].name == "bad\\r.png"
    json.dumps(names).encode()


def test_deep_folders(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 200)
    write(deep / "a.png")
    write(tmp_path / "b.png")
    assert len(load(tmp_path).train.names) == 1


def test_sizes_must_agree_or_be_named(tmp_path: Path) -> None:
    folder(tmp_path, 3, (6, 8))
    write(tmp_path / "x.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(DataError, match=r"3 of 6x8, 1 of 9x9\. Add --resolution HxW$"):
        load(tmp_path)
    data = load(tmp_path, DataOptions(resolution=(8, 12)))
    assert data.train.pixels.shape[1:] == (3, 8, 12)
    assert data.train.size == (8, 12)
    assert any(note.startswith("4 smaller than 8x12: enlarged") for note in data.notes)


def test_channels_are_detected_and_forced(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path / f"{index}.png", NOISE[..., 0])
    assert load(tmp_path).train.channels == 1
    write(tmp_path / "colour.png")
    data = load(tmp_path)
    assert data.train.channels == 3
    assert "3 L, 1 RGB: converting all to RGB. --channels 1 for grey." in data.notes
    assert load(tmp_path, DataOptions(channels=1)).train.channels == 1
    alpha = load(tmp_path, DataOptions(channels=4)).train
    assert (alpha.pixels[:, 3] == 255).all()
    with pytest.raises(ConfigError, match="channels must be 1"):
        load(tmp_path, DataOptions(channels=2))


def test_deep_sets_are_stored_with_16_bits(tmp_path: Path) -> None:
    write(tmp_path / "a.png", np.full((4, 4), 1234, np.uint16))
    write(tmp_path / "b.png", np.full((4, 4), 7, np.uint8))
    data = load(tmp_path)
    assert data.train.bits == 16
    got = bytes_of(data.train) | bytes_of(data.held_out)
    assert (got["a.png"] == 1234).all()
    assert (got["b.png"] == 7 * 257).all()
    assert "1 in 16-bit grey: kept at 16 bits." in data.notes
    colour = load(tmp_path, DataOptions(channels=3))
    assert colour.train.bits == 8
    assert "1 in 16-bit grey: scaled to 8 bits." in colour.notes


def sides(data: images.Data) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return data.train.names, data.held_out.names


def share(content: bytes) -> float:
    """A content's place in [0, 1), below which it is held out."""
    return int(hashlib.sha256(content).hexdigest(), 16) / 2**256


@pytest.mark.parametrize("fraction", [None, 0.07, 0.3, 0.5, 0.99])
def test_arrays_are_split_by_their_contents(fraction: float | None) -> None:
    stack = np.arange(256, dtype=np.uint8).reshape(-1, 1, 1, 1)
    data = load(stack, DataOptions(val_fraction=fraction))
    order = sorted(range(256), key=lambda value: share(bytes([value])))
    below = [value for value in order if share(bytes([value])) < (fraction or 0.1)]
    assert 0 < len(below) < 256
    assert data.held_out.pixels.ravel().tolist() == below
    assert data.train.pixels.ravel().tolist() == order[len(below) :]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.floats(0.001, 0.999))
def test_small_sets_have_both_sides_and_copies_stay_together(
    values: list[int], fraction: float
) -> None:
    stack = np.array(values, dtype=np.uint8).reshape(-1, 1, 1, 1)
    data = load(stack, DataOptions(val_fraction=fraction))
    train, held_out = (part.pixels.ravel().tolist() for part in (data.train, data.held_out))
    assert sorted(train + held_out) == sorted(values)
    assert train
    assert held_out
    if len(set(values)) == 1:
        assert 1 in (len(train), len(held_out))
        return
    assert not set(train) & set(held_out)
    assert max(share(bytes([v])) for v in held_out) < min(share(bytes([v])) for v in train)
    if {share(bytes([v])) < fraction for v in values} == {True, False}:
        assert all(share(bytes([v])) < fraction for v in held_out)
        assert all(share(bytes([v])) >= fraction for v in train)


def test_a_folder_is_split_by_the_files_contents(tmp_path: Path) -> None:
    folder(tmp_path, 40)
    data = load(tmp_path, DataOptions(val_fraction=0.3))
    shares = {path.name: share(path.read_bytes()) for path in tmp_path.iterdir()}
    order = sorted(shares, key=lambda name: shares[name])
    border = sum(value < 0.3 for value in shares.values())
    assert sides(data) == (tuple(order[border:]), tuple(order[:border]))


def test_no_other_file_moves_a_picture_between_the_sides(tmp_path: Path) -> None:
    folder(tmp_path, 40)
    options = DataOptions(val_fraction=0.4)
    train, held_out = sides(load(tmp_path, options))
    for index in range(3):
        write(tmp_path / f"0{index}-new.png", RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        more = sides(load(tmp_path, options))
        assert set(train) <= set(more[0])
        assert set(held_out) <= set(more[1])
    for name in (train[0], held_out[0]):
        (tmp_path / name).unlink()
    fewer = sides(load(tmp_path, options))
    assert set(train[1:]) <= set(fewer[0])
    assert set(held_out[1:]) <= set(fewer[1])
    (tmp_path / train[1]).rename(tmp_path / "zzz.png")
    assert "zzz.png" in sides(load(tmp_path, options))[0]


def test_copies_of_a_picture_are_on_its_side(tmp_path: Path) -> None:
    folder(tmp_path / "a", 20)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    data = load(tmp_path, DataOptions(val_fraction=0.4))
    for names in sides(data):
        assert names[0::2] == tuple(name.replace("b/", "a/") for name in names[1::2])


def test_own_splits_are_mixed(tmp_path: Path) -> None:
    for side in ("train", "val"):
        for label in "ab":
            folder(tmp_path / side / label, 16)
    data = load(tmp_path)
    for part, top in ((data.train, "train/"), (data.held_out, "val/")):
        assert all(name.startswith(top) for name in part.names)
        shares = [share((tmp_path / name).read_bytes()) for name in part.names]
        assert shares == sorted(shares)
        assert part.labels is not None
        assert set(part.labels[:16].tolist()) == {0, 1}


@pytest.mark.parametrize("stack", [None, np.zeros((3, 3, 8, 8), np.uint8)])
def test_a_set_larger_than_the_memory_is_refused_before_it_is_filled(
    tmp_path: Path, stack: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path, 3) if stack is None else stack
    options = DataOptions(resolution=(100, 200))
    needed = 3 * 3 * 100 * 200

    def machine_of(pages: int) -> None:
        said = {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": pages}
        monkeypatch.setattr(os, "sysconf", said.__getitem__, raising=False)

    machine_of(needed // 4 - 1)
    with pytest.raises(
        ResourceError,
        match=r"^3 pictures of 3x100x200 need 0\.0 GB of memory, this machine has 0\.0 GB: "
        r"choose a smaller --resolution",
    ):
        load(source, options)
    for enough in (needed // 4, -1):  # -1 is said where it is not known
        machine_of(enough)
        assert len(load(source, options).train.names) in (1, 2)
    monkeypatch.delattr(os, "sysconf")
    assert len(load(source, options).train.names) in (1, 2)


def test_few_pictures_are_noted(tmp_path: Path) -> None:
    data = load(folder(tmp_path, 40))
    assert (
        "Only 40 images: expect copies of them. The report shows nearest neighbours." in data.notes
    )
    one = load(np.zeros((1, 1, 4, 4), np.uint8))
    assert len(one.train) == len(one.held_out) == 1
    assert one.notes[0].startswith("Only 1 image:")
    assert load(np.zeros((100, 1, 4, 4), np.uint8)).notes == ()


# Bundled pictures --------------------------------------------------------------------------------


def test_digits() -> None:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    data = load("digits")
    order = np.random.default_rng(0).permutation(1797)
    for part, chosen in ((data.train, order[:1437]), (data.held_out, order[1437:])):
        assert np.array_equal(part.pixels[:, 0], bundle.images[chosen] / 8 - 1)
        assert np.array_equal(part.labels, bundle.target[chosen])
        assert part.names[0] == f"digits/{chosen[0]:04d}"
        assert part.class_names == tuple("0123456789")
        assert part.size == (8, 8)
    assert data.source == "digits (scikit-learn)"
    assert "Kaynak" in data.attribution
    assert data.train.bits == 32
    assert load("digits", DataOptions(resolution=(16, 16))).train.pixels.shape == (1437, 1, 16, 16)
    with pytest.raises(ConfigError, match=r"digits .* has 1 channels; --channels 3"):
        load("digits", DataOptions(channels=3))


def test_photos() -> None:
    data = load("photos", DataOptions(random_flip=True))
    assert data.train.pixels.shape == (2, 3, 427, 512)
    assert data.held_out.pixels.shape == (2, 3, 427, 128)
    assert data.train.size == (32, 32)
    assert data.train.flip
    fixed, labels = data.held_out.fixed()
    assert fixed.shape == (2 * 13 * 4, 3, 32, 32)
    assert labels is None
    assert "vultilion (Flickr photo 6056698931)" in data.attribution
    assert "Released under a creative commons license" in data.attribution
    assert load("photos", DataOptions(channels=1)).train.channels == 1
    with pytest.raises(ConfigError, match=r"427x128"):
        load("photos", DataOptions(resolution=(256, 256)))
    with pytest.raises(ConfigError, match="channels must be 1 or 3 for photos"):
        load("photos", DataOptions(channels=4))


def test_fixed_crops_of_a_canvas_do_not_overlap() -> None:
    canvas = np.arange(7 * 9, dtype=np.uint16).reshape(1, 1, 7, 9)
    part = Dataset(np.concatenate([canvas, canvas + 100]), None, (), ("a", "b"), (3, 4), False)
    crops = images.to_uint16(part.fixed()[0]).to(torch.int32)
    assert crops.shape == (8, 1, 3, 4)
    assert crops[::2].unique().numel() == crops[::2].numel()
    assert crops[0, 0].tolist() == canvas[0, 0, 0:3, 0:4].tolist()
    assert crops[1, 0].tolist() == (canvas[0, 0, 0:3, 0:4] + 100).tolist()
    assert crops[6, 0].tolist() == canvas[0, 0, 3:6, 4:8].tolist()
    assert len(part.fixed(3)[0]) == 3
    assert len(part.fixed(99)[0]) == 8


# Arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.bfloat16])
def test_tensors_keep_their_values(dtype: torch.dtype) -> None:
    stack = torch.arange(12 * 5 * 2).reshape(12, 5, 1, 2)
    stack = (stack / 128 - 0.5).to(dtype) if dtype.is_floating_point else stack.to(dtype)
    data = load(stack)
    assert data.train.channels == 5
    whole = images.to_float(stack)
    for part in (data.train, data.held_out):
        chosen = [int(name.split("/")[1]) for name in part.names]
        assert torch.equal(part.fixed()[0], whole[chosen])
    assert len(data.train) + len(data.held_out) == 12
    assert load(data) is data


def test_big_endian_arrays() -> None:
    stack = np.full((2, 1, 1, 1), 258, dtype=">u2")
    assert images.to_uint16(load(stack).train.fixed()[0]).item() == 258


def test_arrays_are_resized_in_their_own_type() -> None:
    for stack in (
        np.full((3, 2, 8, 8), 200, np.uint8),
        np.full((3, 2, 8, 8), 60_000, np.uint16),
        np.full((3, 2, 8, 8), 0.25, np.float32),
    ):
        fitted = load(stack, DataOptions(resolution=(4, 6))).train.pixels
        assert fitted.shape == (2, 2, 4, 6)
        assert fitted.dtype == stack.dtype
        assert (fitted == stack[0, 0, 0, 0]).all()


def test_resizing_never_leaves_the_range() -> None:
    edges = np.tile(np.array([-1, -1, 1, 1], np.float32), (2, 1, 8, 2))
    assert np.abs(load(edges, DataOptions(resolution=(16, 16))).train.pixels).max() <= 1


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"must be \(n, c, h, w\); got \(3, 8, 8\)"),
        (np.zeros((3, 8, 8, 3), np.uint8), r"looks like \(n, h, w, c\)"),
        (np.zeros((2, 1, 8, 0), np.uint8), r"must be \(n, c, h, w\)"),
        (np.zeros((0, 1, 8, 8), np.uint8), "No images in an array"),
        (np.zeros((2, 1, 8, 8), np.int64), "got int64"),
        (np.zeros((2, 1, 8, 8), bool), "got bool"),
        (np.full((2, 1, 8, 8), 1.5), "pass uint8"),
        (np.full((2, 1, 8, 8), np.nan), "must be finite"),
    ],
)
def test_bad_arrays(stack: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(stack)


def test_npz(tmp_path: Path) -> None:
    grey, labels = RNG.integers(0, 256, (5, 3, 4), dtype=np.uint8), np.array([2, 0, 1, 1, 0])
    np.savez(tmp_path / "set.npz", images=grey, labels=labels)
    data = load(tmp_path / "set.npz")
    order = sorted(range(5), key=lambda index: share(grey[index].tobytes()))
    border = max(1, sum(share(picture.tobytes()) < 0.1 for picture in grey))
    assert np.array_equal(data.train.pixels, grey[order[border:], None])
    assert data.train.labels is not None
    assert data.train.labels.tolist() == labels[order[border:]].tolist()
    assert data.train.class_names == ("0", "1", "2")
    assert data.held_out.names == tuple(f"set/{index:04d}" for index in order[:border])
    colour = RNG.integers(0, 65536, (5, 3, 4, 3), dtype=np.uint16)
    np.savez_compressed(tmp_path / "set.npz", images=colour)
    data = load(str(tmp_path / "set.npz"))
    (index,) = (int(name.split("/")[1]) for name in data.held_out.names[:1])
    assert np.array_equal(data.held_out.pixels[0], np.moveaxis(colour, -1, 1)[index])
    assert data.train.labels is None


class Trap:
    """Leaves a mark if it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (os.environ["TRAP"],))


def test_npz_with_pickles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    np.savez(tmp_path / "a.npz", images=np.array([Trap(), Trap()], dtype=object))
    with pytest.raises(DataError, match="cannot be read: Object arrays cannot be loaded"):
        load(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3), "y": np.zeros(3)}, 'has no array "images"; found x, y'),
        ({"images": np.zeros((3, 4), np.uint8)}, r"got \(3, 4\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "labels must be 2"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "got float64"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "got -1"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 10**9])}, "got 10000"),
        ({"images": np.zeros((2, 4, 4), np.int32)}, "got int32"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.npz")


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=RNG.integers(0, 256, (4, 8, 8), dtype=np.uint8))
    whole = path.read_bytes()
    broken = [b"", b"garbage", whole[:-30], whole[:60] + bytes(40) + whole[100:]]
    np.save(tmp_path / "one.npy", np.zeros(3))
    broken.append((tmp_path / "one.npy").read_bytes())
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npz") as caught:
            load(path)
        assert "\n" not in str(caught.value)


# Batches -----------------------------------------------------------------------------------------


def test_random_crop_stores_a_larger_canvas(tmp_path: Path) -> None:
    data = load(folder(tmp_path, 4, (20, 20)), DataOptions(resolution=(16, 16), random_crop=True))
    assert data.train.pixels.shape[2:] == (18, 18)
    assert data.train.size == (16, 16)
    fixed = images.to_uint8(data.train.fixed(2)[0]).numpy()
    assert np.array_equal(fixed, data.train.pixels[:2, :, 1:17, 1:17])
    with pytest.raises(ConfigError, match="random_crop needs a resolution"):
        load(tmp_path, DataOptions(random_crop=True))


def test_draws_place_crops_and_flips() -> None:
    canvas = np.arange(5 * 6, dtype=np.uint8).reshape(1, 1, 5, 6)
    part = Dataset(canvas, None, (), ("a",), (4, 4), True)
    last = np.nextafter(1, 0)
    draws = np.array([[0.5, 0, 0], [0.49, 0, 0], [0.9, last, last], [0.9, 0.5, 0.34]])
    got = images.to_uint8(part.batch([0, 0, 0, 0], draws))[:, 0].numpy()
    plane = canvas[0, 0]
    assert np.array_equal(got[0], plane[:4, :4])
    assert np.array_equal(got[1], plane[:4, 3::-1])
    assert np.array_equal(got[2], plane[1:, 2:])
    assert np.array_equal(got[3], plane[1:, 1:5])
    unflipped = replace(part, flip=False).batch([0], draws[1:2])
    assert np.array_equal(images.to_uint8(unflipped)[0, 0].numpy(), plane[:4, :4])
    with pytest.raises(ValueError, match=r"draws must be \(1, 3\)"):
        part.batch([0], draws)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_batches_are_pure_and_independent_of_their_neighbours(seed: int, count: int) -> None:
    rng = np.random.default_rng(3)
    part = Dataset(
        rng.integers(0, 256, (6, 2, 9, 9), dtype=np.uint8), None, (), tuple("abcdef"), (8, 8), True
    )
    before = part.pixels.copy()
    rng = np.random.default_rng(seed)
    indices, draws = rng.integers(0, 6, count), rng.random((count, 3))
    whole = part.batch(indices, draws)
    assert torch.equal(whole, part.batch(indices.tolist(), draws))
    singles = [part.batch(indices[i : i + 1], draws[i : i + 1]) for i in range(count)]
    assert torch.equal(whole, torch.cat(singles))
    whole.zero_()
    assert np.array_equal(part.pixels, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": np.zeros((2, 8, 8), np.uint8)}, "pixels must be"),
        ({"pixels": np.zeros((2, 1, 8, 8), np.int16)}, "pixels must be"),
        ({"size": (9, 8)}, "does not fit"),
        ({"names": ("a",)}, "2 pictures have 1 names"),
        ({"labels": np.array([0, 2])}, "labels must be in 0…1; got 2"),
        ({"labels": np.array([0])}, "labels must be 2 whole numbers"),
    ],
)
def test_datasets_check_themselves(change: dict[str, object], message: str) -> None:
    good = Dataset(
        np.zeros((2, 1, 8, 8), np.uint8), np.array([0, 1]), ("x", "y"), ("a", "b"), (8, 8), False
    )
    with pytest.raises(DataError, match=message):
        replace(good, **change)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": (3, 64)}, r"resolution must be .* 4…8192; got \(3, 64\)"),
        ({"resolution": (64, 8193)}, "resolution"),
        ({"resolution": 64}, "resolution"),
        ({"resolution": (64,)}, "resolution"),
        ({"resolution": (64.0, 64)}, "resolution"),
        ({"resolution": (True, 64)}, "resolution"),
        ({"channels": 0}, "channels must be a whole number from 1; got 0"),
        ({"channels": True}, "channels"),
        ({"background": "whitish"}, "background must be a colour .* got 'whitish'"),
        ({"val_fraction": 0}, "val_fraction"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"val_fraction": float("nan")}, "val_fraction"),
        ({"on_bad_image": "ignore"}, "on_bad_image"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataOptions(**values)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("unchecked")
def test_options_survive_json() -> None:
    options = DataOptions(resolution=(8, 16), on_bad_image=OnBadImage.ERROR, val_fraction=0.3)
    assert DataOptions(**json.loads(json.dumps(asdict(options)))) == options


# Fingerprint and cache ---------------------------------------------------------------------------


def test_the_fingerprint_follows_names_contents_labels_and_options(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", 4)
    marks = [load(root).fingerprint]
    assert load(root).fingerprint == marks[0]
    (root / "000.png").touch()
    assert load(root).fingerprint == marks[0]
    marks.append(load(root, DataOptions(random_flip=True)).fingerprint)
    (root / "000.png").rename(root / "00x.png")
    marks.append(load(root).fingerprint)
    write(root / "00x.png", 255 - NOISE)
    marks.append(load(root).fingerprint)
    for label in "ab":
        rows = "".join(f"{path.name},{label}\n" for path in sorted(root.glob("*.png")))
        (root / "labels.csv").write_text("file_name,label\n" + rows)
        marks.append(load(root).fingerprint)
    assert len(set(marks)) == len(marks)
    assert all(re.fullmatch("[0-9a-f]{64}", mark) for mark in marks)
    stack = np.zeros((3, 1, 4, 4), np.uint8)
    assert load(stack).fingerprint != load(stack + 1).fingerprint


def test_cache_round_trip_and_invalidation(tmp_path: Path) -> None:
    root, cache = tmp_path / "x", tmp_path / "run" / "cache"
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        write(root / name, RNG.integers(0, 256, (18, 18, 3), dtype=np.uint8))
    (root / "dog" / "bad.png").write_text("")
    options = DataOptions(resolution=(16, 16), random_crop=True, random_flip=True)
    fresh = load(root, options, cache=cache)
    assert not cache.exists()
    images.save_cache(fresh, cache)
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]
    cached = load(root, options, cache=cache)
    assert isinstance(cached.train.pixels, np.memmap)
    for a, b in ((fresh.train, cached.train), (fresh.held_out, cached.held_out)):
        assert np.array_equal(a.pixels, b.pixels)
        assert a.labels is not None
        assert np.array_equal(a.labels, b.labels)
        assert (a.names, a.class_names, a.size, a.flip) == (b.names, b.class_names, b.size, b.flip)
        draws = np.random.default_rng(0).random((2, 3))
        assert torch.equal(a.batch([0, 0], draws), b.batch([0, 0], draws))
    for field in ("source", "attribution", "fingerprint", "skipped", "notes"):
        assert getattr(fresh, field) == getattr(cached, field)
    write(root / "cat" / "1.png", np.zeros((18, 18, 3), np.uint8))
    changed = load(root, options, cache=cache)
    assert not isinstance(changed.train.pixels, np.memmap)
    images.save_cache(changed, cache)
    assert isinstance(load(root, options, cache=cache).train.pixels, np.memmap)
    assert np.array_equal(cached.train.pixels, fresh.train.pixels)  # the old map stays valid


@pytest.mark.parametrize("file", ["cache.json", "train.npy", "held_out.npy"])
def test_damaged_caches_are_not_used(tmp_path: Path, file: str) -> None:
    root, cache = folder(tmp_path / "x", 4), tmp_path / "cache"
    images.save_cache(load(root), cache)
    for keep in (0, 10, 0.5):
        images.save_cache(load(root), cache)
        content = (cache / file).read_bytes()
        (cache / file).write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
        assert not isinstance(load(root, cache=cache).train.pixels, np.memmap)
    (cache / file).unlink()
    if file == "cache.json":
        with pytest.raises(ResourceError, match="is not a cache"):
            images.save_cache(load(root), cache)
    else:
        images.save_cache(load(root), cache)
        assert isinstance(load(root, cache=cache).train.pixels, np.memmap)


def test_a_failed_write_keeps_the_old_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = folder(tmp_path / "x", 4), tmp_path / "cache"
    images.save_cache(load(root), cache)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(ResourceError, match="No space left on device"):
            images.save_cache(load(root), cache)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "x"]
    assert isinstance(load(root, cache=cache).train.pixels, np.memmap)


def test_foreign_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ResourceError, match="is not a cache"):
        images.save_cache(load("digits"), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


# Writing -----------------------------------------------------------------------------------------


def test_grid_layout() -> None:
    x = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
    sheet = images.grid(x)
    assert sheet.shape == (1, 2 * 2 + 1, 3 * 3 + 2)
    assert sheet[0, 0].tolist() == [0, 0, 0, 255, 1, 1, 1, 255, 2, 2, 2]
    assert sheet[0, 4].tolist() == [3, 3, 3, 255, 4, 4, 4, 255, 255, 255, 255]
    assert sheet[0, 2].unique().tolist() == [255]
    assert images.grid(x, columns=1, pad=0).shape == (1, 10, 3)
    assert images.grid(x, columns=9).shape == (1, 2, 5 * 4 - 1)
    with pytest.raises(DataError, match="at least one"):
        images.grid(x[:0])


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".bmp", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_saved_grids_reopen(tmp_path: Path, suffix: str, channels: int) -> None:
    path = tmp_path / "new" / f"grid{suffix}"
    images.save_grid(torch.zeros(6, channels, 8, 8), path)
    with Image.open(path) as image:
        assert image.size == (3 * 64 + 2, 2 * 64 + 1)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_small_pictures_are_enlarged_without_blending(tmp_path: Path) -> None:
    x = images.to_float(torch.tensor([[[[0, 100], [200, 255]]]], dtype=torch.uint8))
    images.save_grid(x, tmp_path / "a.png", scale=3)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), np.kron([[0, 100], [200, 255]], np.ones((3, 3))))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_single_pictures_round_trip(tmp_path: Path, channels: int) -> None:
    x = images.to_float(RNG.integers(0, 256, (channels, 5, 7), dtype=np.uint8))
    for suffix in (".png", ".webp", ".tif"):
        if (channels, suffix) == (4, ".webp"):
            continue  # lossless WebP forgets colours that are fully transparent
        images.save_image(x, tmp_path / f"a{suffix}")
        assert torch.equal(images.read(tmp_path / f"a{suffix}", channels), x)
    (tmp_path / "b.png").write_bytes(images.encode_png(images.to_uint8(x)))
    assert torch.equal(images.read(tmp_path / "b.png", channels), x)


def test_16_bit_pictures_round_trip(tmp_path: Path) -> None:
    x = images.to_float(np.arange(65536, dtype=np.uint16).reshape(1, 256, 256))
    for suffix in (".png", ".tif"):
        images.save_image(x, tmp_path / f"a{suffix}", bits=16)
        assert torch.equal(images.read(tmp_path / f"a{suffix}", 1), x)
    with pytest.raises(ConfigError, match="bits must be 8, or 16"):
        images.save_image(x, tmp_path / "a.jpg", bits=16)


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
def test_films_reopen(tmp_path: Path, suffix: str) -> None:
    frames = [torch.full((4, 3, 16, 16), level) for level in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    path = tmp_path / f"film{suffix}"
    images.save_film(frames, path, milliseconds=120)
    with Image.open(path) as film:
        assert film.n_frames == 5
        assert film.size == (2 * 64 + 1, 2 * 64 + 1)
        for index, value in enumerate((0, 64, 128, 191, 255)):
            film.seek(index)
            film.load()
            assert abs(film.convert("RGB").getpixel((3, 3))[0] - value) <= 1
            assert film.info["duration"] == (1000 if index == 4 else 120)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    x = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ConfigError, match=r"must end in one of \.png"):
        images.save_grid(x, tmp_path / "grid.pdf")
    with pytest.raises(ConfigError, match=r"must end in one of \.webp"):
        images.save_film([x], tmp_path / "film.mp4")
    with pytest.raises(ConfigError, match="JPEG has no transparency"):
        images.save_grid(x, tmp_path / "grid.jpg")
    with pytest.raises(DataError, match="at least one frame"):
        images.save_film([], tmp_path / "film.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        images.save_grid(x, tmp_path / "file" / "grid.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

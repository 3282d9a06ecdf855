"""`denoise`, `inpaint`, `edit` and `interpolate`: from pictures to other pictures."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse import editing, images, runs
from undiffuse.checkpoint import Model
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._options import (
    Given,
    autoguidance,
    check_memory,
    film_format,
    load_guide,
    load_model,
    number,
    output_folder,
    warn_unguided,
    whole,
)
from undiffuse.cli._output import Bar, Output, table
from undiffuse.config import SampleConfig, changed
from undiffuse.errors import ConfigError, DataError
from undiffuse.noise import Stream, keyed_normal
from undiffuse.oracles import Gaussian

ADDED = 0.2  # the noise of --add-noise, unless it is stated
DRAWN = 4  # results per picture, unless stated
BETWEEN = 8  # pictures from one end to the other, unless stated
ACROSS = 9  # pictures in a row, at most


# --- denoise ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Denoising:
    """What `denoise` was asked for, checked."""

    model: Model
    names: list[str]
    stated: float | None  # the noise level; None is to be estimated
    seed: int
    label: int | None
    steps: int | None
    tile: int | None
    folder: Path
    gaussian: Gaussian | None
    compare: bool


def denoise(arguments: Arguments, out: Output) -> int:
    """`undiffuse denoise`: from noisy pictures to estimates of the clean ones."""
    given = arguments.given
    asked = _denoising(given)
    noisy, clean = _pictures(asked, given)
    with Bar(out, len(noisy), "denoise") as bar:
        cleaned = runs.denoise_pictures(
            asked.model,
            noisy,
            asked.stated,
            label=asked.label,
            num_inference_steps=asked.steps,
            seed=asked.seed,
            tile=asked.tile,
            on_picture=bar.advance,
        )
    results: list[dict[str, Any]] = []
    for stem, one, truth, found in zip(_stems(asked.names), noisy, clean, cleaned, strict=True):
        results.append(_written(asked, stem, one, truth, found, added="add_noise" in given))
        for line in _lines(results[-1]):
            out.say(line)
    out.result("denoise", files=results)
    return 0


def _denoising(given: Given) -> _Denoising:
    """Everything is refused here that can be, before any picture is read."""
    stated = _stated_sigma(given)
    seed = changed(SampleConfig(), {"seed": given.get("seed", 0)}).seed
    steps = given.get("num_inference_steps")
    tile, compare = given.get("tile"), bool(given.get("compare"))
    if compare:
        runs.check_filters()
    model = load_model(given)
    words = (str(given["class_label"]),) if "class_label" in given else ()
    label = runs.parse_labels(model, words, 1)
    return _Denoising(
        model=model,
        names=given["images"],
        stated=stated,
        seed=seed,
        label=None if label is None else int(label),
        steps=None if steps is None else whole("num_inference_steps", steps, 1),
        tile=None if tile is None else whole("tile", tile, 0),
        folder=output_folder(given, "denoised"),
        gaussian=runs.training_gaussian(given["run"], model) if compare else None,
        compare=compare,
    )


def _stated_sigma(given: Given) -> float | None:
    """None where the noise is to be estimated."""
    added = bool(given.get("add_noise"))
    if added and "clean" in given:
        raise ConfigError("clean does not go with --add-noise: the pictures are the clean ones")
    text = str(given.get("sigma", ADDED if added else "auto"))
    if text == "auto":
        if added:
            raise ConfigError("add_noise needs --sigma X, the noise to add; got auto")
        return None
    sigma = number("sigma", text)
    if sigma <= 0.0:
        raise ConfigError(f"sigma must be above 0, or auto; got {sigma:g}")
    return sigma


def _pictures(asked: _Denoising, given: Given) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """The noisy pictures, and the clean ones where they are known."""
    channels = asked.model.pictures.channels
    read = [images.read(name, channels) for name in asked.names]
    if asked.stated is not None and given.get("add_noise"):
        return [_noised(one, asked.stated, asked.seed, n) for n, one in enumerate(read)], read
    if "clean" not in given:
        return read, [None] * len(read)
    names: list[str] = given["clean"]
    if len(names) != len(read):
        raise ConfigError(f"clean needs one picture for each IMAGE, {len(read)}; got {len(names)}")
    clean = [images.read(name, channels) for name in names]
    for name, one, picture in zip(names, clean, read, strict=True):
        if one.shape != picture.shape:
            raise DataError(
                f"clean {name} is {_size(one)}, its noisy picture {_size(picture)};"
                " they must be of one size"
            )
    return read, clean


def _noised(clean: Tensor, sigma: float, seed: int, n: int) -> Tensor:
    noise = keyed_normal(seed, Stream.ADDED, range(n, n + 1), tuple(clean.shape))
    return clean + sigma * noise[0]


def _stems(names: Sequence[str]) -> Iterator[str]:
    """a/1.png, b/1.png -> 1, 1_2: two pictures of one name do not overwrite each other."""
    seen: Counter[str] = Counter()
    for name in names:
        stem = Path(name).stem
        seen[stem] += 1
        yield stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"


def _written(
    asked: _Denoising,
    stem: str,
    noisy: Tensor,
    clean: Tensor | None,
    cleaned: runs.Cleaned,
    *,
    added: bool,
) -> dict[str, Any]:
    """Write a picture and what belongs to it; the figures, by name."""
    bits = asked.model.pictures.bits
    path = asked.folder / f"{stem}_denoised.png"
    images.save_image(cleaned.picture, path, bits)
    result: dict[str, Any] = {
        "file": path.as_posix(),
        "sigma": cleaned.sigma,
        "estimated": asked.stated is None,
    }
    if added:
        noisy_path = asked.folder / f"{stem}_noisy.png"
        images.save_image(noisy, noisy_path, bits)
        result["noisy"] = noisy_path.as_posix()
    shown = {"noisy": noisy.clamp(-1, 1), "denoised": cleaned.picture}
    if asked.compare:
        shown |= runs.filters(noisy, cleaned.sigma, asked.gaussian)
        result["comparison"] = _compared(shown, clean, asked.folder / f"{stem}_compared.png")
    return result if clean is None else result | _figures(shown, clean)


def _compared(shown: dict[str, Tensor], clean: Tensor | None, path: Path) -> dict[str, Any]:
    """All in one row, the clean one last."""
    row = shown if clean is None else {**shown, "clean": clean}
    images.save_grid(torch.stack(list(row.values())), path, columns=len(row))
    return {"file": path.as_posix(), "pictures": list(row)}


def _figures(shown: dict[str, Tensor], clean: Tensor) -> dict[str, Any]:
    judged = {
        name: {
            "psnr": float(editing.psnr(one[None], clean[None])),
            "ssim": float(editing.ssim(one[None], clean[None])),
        }
        for name, one in shown.items()
    }
    flat = {
        f"{measure}_{name}": judged[name][measure]
        for name in ("noisy", "denoised")
        for measure in ("psnr", "ssim")
    }
    return {**flat, "judged": judged}


def _lines(result: dict[str, Any]) -> Iterator[str]:
    how = "estimated" if result["estimated"] else "as stated"
    yield f"{result['file']}  sigma {result['sigma']:.3g}, {how}"
    if "judged" in result:
        rows = [
            (name, f"{one['psnr']:.2f}", f"{one['ssim']:.3f}")
            for name, one in result["judged"].items()
        ]
        yield from (f"  {line}" for line in table([("", "PSNR dB", "SSIM"), *rows], right=(1, 2)))
    if "comparison" in result:
        yield f"{result['comparison']['file']}  {' | '.join(result['comparison']['pictures'])}"


# --- inpaint, edit ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What the commands below have in common, checked."""

    config: SampleConfig
    model: Model
    folder: Path
    label: Tensor | None  # of each picture; None is "no class"

    @property
    def batches(self) -> int:
        return -(-self.config.num_images // self.config.batch_size)


def _asked(arguments: Arguments, count: int, folder: str) -> _Asked:
    """`count` pictures in `folder`, unless stated."""
    config = arguments.section(SampleConfig(num_images=count))
    model = load_model(arguments.given)
    place = output_folder(arguments.given, folder)
    check_memory(model, config.num_images, "num_images:")
    label = runs.parse_labels(model, config.class_label, config.num_images)
    if label is None and autoguidance(arguments.given) is None and config.guidance_scale is None:
        config = replace(config, guidance_scale=1.0)  # there is nothing to guide towards
    return _Asked(config, model, place, label)


def inpaint(arguments: Arguments, out: Output) -> int:
    """`undiffuse inpaint`: fill the white part of a mask, several times."""
    given = arguments.given
    repeats = given.get("num_resamples")
    repeats = None if repeats is None else whole("num_resamples", repeats, 1)
    asked = _asked(arguments, DRAWN, "inpainted")
    picture, hole = _own_size(given["image"], asked.model), images.read(given["mask"], 1)[0] > 0
    _check_mask(given["mask"], hole, picture)
    weak = load_guide(given)
    options = runs.sampling_options(asked.model, asked.config)
    with Bar(out, asked.batches * asked.config.num_inference_steps, "inpaint") as bar:
        made = runs.inpaint(
            asked.model,
            picture,
            hole,
            asked.config.num_images,
            label=asked.label,
            num_resamples=repeats,
            weak=weak,
            on_step=lambda step: bar.advance(),
            **options,
        )
    warn_unguided(given, options["guidance_scale"], out)
    told = torch.where(hole, 0.0, picture)  # the hole in grey
    files = _save_all(made, told, f"{Path(given['image']).stem}_filled", asked)
    _say(files, out)
    out.result("inpaint", files=files, seed=asked.config.seed, pixels=int(hole.sum()))
    return 0


def _check_mask(name: str, hole: Tensor, picture: Tensor) -> None:
    """Here the file's name is known."""
    if hole.shape != picture.shape[1:]:
        raise DataError(
            f"mask {name} is {_size(hole)}, the picture {_size(picture)}; they must be of one size"
        )
    if not bool(hole.any()):
        raise DataError(f"mask {name} has no white pixel: there is nothing to fill")


def edit(arguments: Arguments, out: Output) -> int:
    """`undiffuse edit`: image to image."""
    given = arguments.given
    strength = _strength(given)
    asked = _asked(arguments, DRAWN, "edited")
    config = asked.config
    pictures = [_own_size(name, asked.model) for name in given["images"]]
    weak = load_guide(given)
    steps = math.ceil(round(strength * config.num_inference_steps, 9)) * asked.batches
    results: list[list[str]] = []
    options = runs.sampling_options(asked.model, config)
    with Bar(out, max(1, steps) * len(pictures), "edit") as bar:
        for stem, picture in zip(_stems(given["images"]), pictures, strict=True):
            made = runs.edit(
                asked.model,
                picture,
                strength,
                config.num_images,
                label=asked.label,
                sampler=config.sampler.value,
                weak=weak,
                on_step=lambda step: bar.advance(),
                **options,
            )
            results.append(_save_all(made, picture, f"{stem}_edited", asked))
    warn_unguided(given, options["guidance_scale"], out)
    _say_edited(results, strength, asked, out)
    return 0


def _strength(given: Given) -> float:
    strength = number("strength", given.get("strength", 0.5))
    if not 0.0 <= strength <= 1.0:
        raise ConfigError(f"strength must be in [0, 1]; got {strength:g}")
    return strength


def _say_edited(results: list[list[str]], strength: float, asked: _Asked, out: Output) -> None:
    for files in results:
        _say(files, out)
    sigma = runs.strength_sigma(asked.model, strength, asked.config.num_inference_steps)
    out.say(f"strength {strength:g} is noise of sigma {sigma:.3g}")
    files = [path for group in results for path in group]
    out.result("edit", files=files, seed=asked.config.seed, strength=strength, sigma=sigma)


def _own_size(name: str, model: Model) -> Tensor:
    size = model.pictures
    picture = images.read(name, size.channels)
    if picture.shape[1:] != (size.height, size.width):
        raise DataError(
            f"{name} is {_size(picture)}, this model makes pictures of {size.height}x{size.width};"
            " crop or resize it"
        )
    return picture


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-2]}x{picture.shape[-1]}"


def _save_all(made: Tensor, first: Tensor, stem: str, asked: _Asked) -> list[str]:
    """A sheet with what was given and what came out, and every result as a file of its own."""
    sheet = asked.folder / f"{stem}.png"
    row = torch.cat((first[None], made))
    images.save_grid(row, sheet, columns=min(len(row), ACROSS))
    paths = [asked.folder / f"{stem}_{i:05d}.png" for i in range(len(made))]
    for picture, path in zip(made, paths, strict=True):
        images.save_image(picture, path, asked.model.pictures.bits)
    return [path.as_posix() for path in (sheet, *paths)]


def _say(files: Sequence[str], out: Output) -> None:
    """The sheet shows them all."""
    out.say(f"{files[0]}  and {len(files) - 1} single files")


# --- interpolate --------------------------------------------------------------------------------


def interpolate(arguments: Arguments, out: Output) -> int:
    """`undiffuse interpolate`: the way from one seed or picture to another."""
    given = arguments.given
    film = film_format(given)
    names = [str(given["a"]), str(given["b"])]
    asked = _asked(arguments, BETWEEN, "interpolated")
    config = asked.config
    if len(config.class_label) > 1:
        raise ConfigError("class_label must be one for all pictures on the way; got several")
    ends = [_end(name, asked.model) for name in names]
    with Bar(out, asked.batches * config.num_inference_steps, "interpolate") as bar:
        made = runs.interpolate(
            asked.model,
            ends[0],
            ends[1],
            config.num_images,
            label=None if asked.label is None else int(asked.label[0]),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
            mixed_precision=config.mixed_precision,
            on_step=lambda step: bar.advance(),
        )
    files = _save_way(made, asked.folder / "_to_".join(Path(name).stem for name in names), film)
    _say_ends(names, ends, made, files, out)
    return 0


def _save_way(made: Tensor, place: Path, film: str | None) -> list[Path]:
    """All in one sheet; the film goes there and back."""
    sheet = place.with_name(f"{place.name}.png")
    images.save_grid(made, sheet, columns=min(len(made), 2 * ACROSS))
    if film is None:
        return [sheet]
    path = place.with_name(f"{place.name}.{film}")
    images.save_film([one[None] for one in (*made, *made.flip(0)[1:-1])], path)
    return [sheet, path]


def _end(name: str, model: Model) -> Tensor | int:
    """A whole number is a seed, all else a picture's file."""
    if name.removeprefix("-").isdecimal():
        return changed(SampleConfig(), {"seed": name}).seed
    return _own_size(name, model)


def _say_ends(
    names: Sequence[str],
    ends: Sequence[Tensor | int],
    made: Tensor,
    files: Sequence[Path],
    out: Output,
) -> None:
    """Pictures come back from their noise nearly as they were; how nearly, is said."""
    again = {
        name: float(editing.psnr(end[None], one[None]))
        for name, end, one in zip(names, ends, (made[0], made[-1]), strict=True)
        if isinstance(end, Tensor)
    }
    for path in files:
        out.say(str(path))
    for name, decibel in again.items():
        out.say(f"{name} came back from its noise with PSNR {decibel:.2f} dB")
    paths = [path.as_posix() for path in files]
    out.result("interpolate", files=paths, num_images=len(made), psnr_of_ends=again)

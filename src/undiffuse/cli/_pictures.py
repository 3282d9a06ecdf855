"""`sample`: from a model to picture files."""

import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from undiffuse import images, runs
from undiffuse.checkpoint import Model
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._options import (
    check_memory,
    film_format,
    load_guide,
    load_model,
    one_of,
    output_folder,
    say_guidance,
    warn_unguided,
)
from undiffuse.cli._output import Bar, Output
from undiffuse.config import SampleConfig, SamplerName
from undiffuse.errors import ConfigError
from undiffuse.sampling import SAMPLERS, Sampler, Step, ddim

LISTED = 4  # up to so many files are named one by one, more by their folder


def sample(arguments: Arguments, out: Output) -> int:
    """`undiffuse sample`: new pictures as a grid, single files or an array."""
    given = arguments.given
    config = arguments.section(SampleConfig())
    write = WRITERS[one_of("format", str(given.get("format", "grid")), tuple(WRITERS))]
    film = film_format(given)
    sampler = _sampler(config)
    model = load_model(given)
    folder = output_folder(given, "samples")
    check_memory(model, config.num_images, "num_images:")
    label = runs.parse_labels(model, config.class_label, config.num_images)
    frames: list[Tensor] = []
    weak = load_guide(given)
    asked = runs.sampling_options(model, config)
    with Bar(out, _sampler_steps(config), "sample") as bar:
        pictures = runs.generate(
            model,
            config.num_images,
            label=label,
            sampler=sampler,
            weak=weak,
            torch_compile=config.torch_compile,
            on_step=_watch(bar, frames, config, film is not None),
            **asked,
        )
    if label is None:
        label = runs.labels_in_turn(model, len(pictures))
    written = write(pictures, label, model, folder, config)
    if film is not None:
        written.append(folder / f"film_seed{config.seed}.{film}")
        images.save_film([*frames, pictures[: len(frames[0])]], written[-1])
    warn_unguided(given, asked["guidance_scale"], out)
    say_guidance(given, asked, out)
    _say_written(written, folder, config, out)
    return 0


def _watch(
    bar: Bar, frames: list[Tensor], config: SampleConfig, film: bool
) -> Callable[[Step], None]:
    """Move the bar; for a film also keep the estimates of the first batch."""

    def on_step(step: Step) -> None:
        bar.advance()
        if film and len(frames) < config.num_inference_steps:
            frames.append(step.x0.cpu())

    return on_step


def _sampler(config: SampleConfig) -> Sampler:
    if config.eta > 0.0:
        if config.sampler is not SamplerName.DDIM:
            raise ConfigError(
                f"eta {config.eta:g} needs --sampler ddim; got {config.sampler.value}"
            )
        return partial(ddim, eta=config.eta)
    return SAMPLERS[config.sampler.value]


def _sampler_steps(config: SampleConfig) -> int:
    return -(-config.num_images // config.batch_size) * config.num_inference_steps


def _say_written(written: list[Path], folder: Path, config: SampleConfig, out: Output) -> None:
    for path in written if len(written) <= LISTED else [folder]:
        out.say(str(path))
    files = [path.as_posix() for path in written]
    out.result("sample", files=files, num_images=config.num_images, seed=config.seed)


# --- the three formats --------------------------------------------------------------------------


def _write_grid(
    pictures: Tensor, label: Tensor | None, model: Model, folder: Path, config: SampleConfig
) -> list[Path]:
    del label, model
    path = folder / f"grid_{config.num_images}_seed{config.seed}.png"
    images.save_grid(pictures, path)
    return [path]


def _write_files(
    pictures: Tensor, label: Tensor | None, model: Model, folder: Path, config: SampleConfig
) -> list[Path]:
    del label
    paths = [folder / f"seed{config.seed}_{i:05d}.png" for i in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        images.save_image(picture, path, model.pictures.bits)
    return paths


def _write_array(
    pictures: Tensor, label: Tensor | None, model: Model, folder: Path, config: SampleConfig
) -> list[Path]:
    """`images` (n, h, w, c) float32 in [-1, 1] and `labels`: what `train` reads back."""
    del model
    path = folder / f"samples_{config.num_images}_seed{config.seed}.npz"
    arrays = {"images": pictures.movedim(1, -1).numpy()}
    if label is not None:
        arrays["labels"] = label.numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType] # numpy's stub takes the names for its flags
    _write_whole(path, buffer.getvalue())
    return [path]


def _write_whole(path: Path, content: bytes) -> None:
    """Through a neighbour and a rename: a reader never sees half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


WRITERS = {"grid": _write_grid, "png": _write_files, "npz": _write_array}

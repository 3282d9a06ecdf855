"""`sample` and `denoise`: from a model to picture files."""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from undiffuse import images, runs
from undiffuse.checkpoint import Model
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._options import (
    check_memory,
    load_guide,
    load_model,
    number,
    one_of,
    output_folder,
    warn_unguided,
)
from undiffuse.cli._output import Bar, Output
from undiffuse.config import SampleConfig, SamplerName, changed
from undiffuse.errors import ConfigError
from undiffuse.noise import Stream, keyed_normal
from undiffuse.sampling import SAMPLERS, Sampler, Step, ddim

FILMS = ("webp", "gif")
LISTED = 4  # up to so many files are named one by one, more by their folder


def sample(arguments: Arguments, out: Output) -> int:
    """`undiffuse sample`: new pictures as a grid, single files or an array."""
    given = arguments.given
    config = arguments.section(SampleConfig())
    write = WRITERS[one_of("format", str(given.get("format", "grid")), tuple(WRITERS))]
    film = one_of("film", str(given["film"]), FILMS) if "film" in given else None
    sampler = _sampler(config)
    model = load_model(given)
    folder = output_folder(given, "samples")
    check_memory(model, config.num_images, "num_images:")
    label = runs.parse_labels(model, config.class_label, config.num_images)
    frames: list[Tensor] = []
    weak = load_guide(given)
    make = partial(runs.generate, model, label=label, sampler=sampler, weak=weak)
    with Bar(out, _sampler_steps(config), "sample") as bar:
        pictures = _generate(make, config, _watch(bar, frames, config, film is not None))
    if label is None:
        label = runs.labels_in_turn(model, len(pictures))
    written = write(pictures, label, model, folder, config)
    if film is not None:
        written.append(folder / f"film_seed{config.seed}.{film}")
        images.save_film([*frames, pictures[: len(frames[0])]], written[-1])
    warn_unguided(given, config.guidance_scale, out)
    _say_written(written, folder, config, out)
    return 0


def _generate(
    make: Callable[..., Tensor], config: SampleConfig, on_step: Callable[[Step], None]
) -> Tensor:
    return make(
        count=config.num_images,
        seed=config.seed,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        batch_size=config.batch_size,
        mixed_precision=config.mixed_precision,
        torch_compile=config.torch_compile,
        on_step=on_step,
    )


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


# --- denoise ------------------------------------------------------------------------------------


def denoise(arguments: Arguments, out: Output) -> int:
    """`undiffuse denoise`: one step from a noisy picture to the estimate of the clean one."""
    given = arguments.given
    sigma = number("sigma", given.get("sigma", 0.2))
    seed = changed(SampleConfig(), {"seed": given.get("seed", 0)}).seed
    if sigma <= 0.0:
        raise ConfigError(f"sigma must be above 0; got {sigma:g}")
    model = load_model(given)
    _check_sigma(model, sigma)
    names: list[str] = given["images"]
    pictures = [images.read(name, model.pictures.channels) for name in names]
    folder = output_folder(given, "denoised")
    add_noise = bool(given.get("add_noise"))
    results: list[dict[str, object]] = []
    for n, (stem, picture) in enumerate(zip(_stems(names), pictures, strict=True)):
        one = partial(_denoise_added, seed=seed, n=n) if add_noise else _denoise_given
        results.append(one(model, picture, sigma, folder / stem))
        out.say(_line(results[-1]))
    out.result("denoise", sigma=sigma, files=results)
    return 0


def _stems(names: Sequence[str]) -> Iterator[str]:
    """a/1.png, b/1.png -> 1, 1_2: two pictures of one name do not overwrite each other."""
    seen: Counter[str] = Counter()
    for name in names:
        stem = Path(name).stem
        seen[stem] += 1
        yield stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"


def _denoise_given(model: Model, noisy: Tensor, sigma: float, place: Path) -> dict[str, object]:
    """The picture is noisy already."""
    path = place.with_name(f"{place.name}_denoised.png")
    images.save_image(_estimate(model, noisy, sigma), path, model.pictures.bits)
    return {"file": path.as_posix()}


def _denoise_added(
    model: Model, clean: Tensor, sigma: float, place: Path, *, seed: int, n: int
) -> dict[str, object]:
    """Add the noise first, which makes the error known."""
    noise = keyed_normal(seed, Stream.ADDED, range(n, n + 1), tuple(clean.shape))
    noisy = clean + sigma * noise[0]
    estimate, bits = _estimate(model, noisy, sigma), model.pictures.bits
    path, noisy_path = (place.with_name(f"{place.name}_{end}.png") for end in ("denoised", "noisy"))
    images.save_image(noisy, noisy_path, bits)
    images.save_image(estimate, path, bits)
    return {
        "file": path.as_posix(),
        "noisy": noisy_path.as_posix(),
        "psnr_noisy": _psnr(noisy.clamp(-1, 1), clean),
        "psnr_denoised": _psnr(estimate, clean),
    }


def _line(result: dict[str, object]) -> str:
    if "psnr_noisy" not in result:
        return str(result["file"])
    before, after = result["psnr_noisy"], result["psnr_denoised"]
    return f"{result['file']}  PSNR {before:.2f} dB noisy, {after:.2f} dB denoised"


def _check_sigma(model: Model, sigma: float) -> None:
    ends = (model.denoiser.schedule.at(torch.tensor(x).double()) for x in (0.0, float("inf")))
    low, high = (float(level.ratio) for level in ends)
    if not low <= sigma <= high:
        raise ConfigError(f"sigma must be {low:.3g} ... {high:.3g} for this model; got {sigma:g}")


@torch.no_grad()
def _estimate(model: Model, noisy: Tensor, sigma: float) -> Tensor:
    on = next(model.net.parameters()).device
    level = model.denoiser.schedule.at(torch.tensor(sigma, dtype=torch.float64))
    x = level.alpha.float() * noisy[None]
    return model.denoiser(x.to(on), level).clamp(-1, 1)[0].cpu()


def _psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB, for pictures in [-1, 1] (peak 2)."""
    return float(10 * torch.log10(4 / (a - b).double().square().mean().clamp(min=1e-12)))

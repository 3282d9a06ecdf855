"""What each command does once its words are understood."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse import __version__, images, runs, runtime
from undiffuse.checkpoint import Model
from undiffuse.cli._describe import describe
from undiffuse.cli._figures import print_figures
from undiffuse.cli._output import Bar, Output
from undiffuse.cli._parser import Arguments
from undiffuse.cli._train import demo, evaluate, train
from undiffuse.config import Device, SampleConfig, SamplerName, Weights, changed
from undiffuse.errors import ConfigError, QualityError, ResourceError
from undiffuse.noise import Stream, keyed_normal
from undiffuse.sampling import SAMPLERS, Sampler, Step, ddim

FORMATS = ("grid", "png", "npz")
FILMS = ("webp", "gif")


def sample(arguments: Arguments, out: Output) -> int:
    """`undiffuse sample`: new pictures as a grid, single files or an array."""
    given = arguments.given
    config = arguments.section(SampleConfig())
    kind = _one_of("format", str(given.get("format", "grid")), FORMATS)
    moving = _one_of("film", str(given["film"]), FILMS) if "film" in given else None
    model = _load(given)
    weak = _load({"run": given["autoguidance"]}) if "autoguidance" in given else None
    folder = _output_folder(given, "samples")
    label = runs.parse_labels(model, config.class_label, config.num_images)
    frames: list[Tensor] = []
    bar = Bar(out, _sampler_steps(config), "sample")

    def on_step(step: Step) -> None:
        bar.advance()
        if moving is not None and len(frames) < config.num_inference_steps:
            frames.append(step.x0.cpu())  # of the first batch

    pictures = runs.generate(
        model,
        config.num_images,
        seed=config.seed,
        label=label,
        sampler=_sampler(config),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        weak=weak,
        batch_size=config.batch_size,
        on_step=on_step,
    )
    bar.close()
    written = _write_pictures(pictures, model, folder, kind, config)
    if moving is not None:
        written.append(folder / f"film_seed{config.seed}.{moving}")
        images.save_film([*frames, pictures[: len(frames[0])]], written[-1])
    for path in written if len(written) < 4 else [folder]:
        out.say(str(path))
    out.result("sample", files=[p.as_posix() for p in written], seed=config.seed)
    return 0


def _sampler(config: SampleConfig) -> Sampler:
    if config.eta > 0.0:
        if config.sampler is not SamplerName.DDIM:
            raise ConfigError(f"eta {config.eta:g} is for ddim; got sampler {config.sampler.value}")
        return partial(ddim, eta=config.eta)
    return SAMPLERS[config.sampler.value]


def _sampler_steps(config: SampleConfig) -> int:
    return -(-config.num_images // config.batch_size) * config.num_inference_steps


def _write_pictures(
    pictures: Tensor, model: Model, folder: Path, kind: str, config: SampleConfig
) -> list[Path]:
    name = f"{config.num_images}_seed{config.seed}"
    if kind == "npz":
        path = folder / f"samples_{name}.npz"
        np.savez_compressed(path, images=pictures.movedim(1, -1).numpy())
        return [path]
    if kind == "png":
        paths = [folder / f"seed{config.seed}_{i:05d}.png" for i in range(len(pictures))]
        for picture, path in zip(pictures, paths, strict=True):
            images.save_image(picture, path, model.pictures.bits)
        return paths
    path = folder / f"grid_{name}.png"
    images.save_grid(pictures, path)
    return [path]


def denoise(arguments: Arguments, out: Output) -> int:
    """`undiffuse denoise`: one step from a noisy picture to the estimate of the clean one."""
    given = arguments.given
    sigma = _number("sigma", given.get("sigma", 0.2))
    seed = changed(SampleConfig(), {"seed": given.get("seed", 0)}).seed
    if not 0.0 < sigma < float("inf"):
        raise ConfigError(f"sigma must be above 0; got {sigma:g}")
    model = _load(given)
    read = [images.read(path, model.pictures.channels) for path in given["images"]]
    folder = _output_folder(given, "denoised")
    results: list[dict[str, object]] = []
    for n, (name, picture) in enumerate(zip(given["images"], read, strict=True)):
        clean = picture if given.get("add_noise") else None
        noisy = picture
        if clean is not None:
            noise = keyed_normal(seed, Stream.SAMPLE, range(n, n + 1), tuple(picture.shape))
            noisy = picture + sigma * noise[0]
        estimate = _estimate(model, noisy, sigma)
        path = folder / f"{Path(name).stem}.png"
        images.save_image(estimate, path, model.pictures.bits)
        line = f"{path}"
        facts: dict[str, object] = {"file": path.as_posix()}
        if clean is not None:
            images.save_image(noisy, folder / f"{Path(name).stem}_noisy.png", model.pictures.bits)
            before, after = _psnr(noisy.clamp(-1, 1), clean), _psnr(estimate, clean)
            line += f"  PSNR {before:.2f} dB noisy, {after:.2f} dB denoised"
            facts |= {"psnr_noisy": before, "psnr_denoised": after}
        results.append(facts)
        out.say(line)
    out.result("denoise", sigma=sigma, files=results)
    return 0


@torch.no_grad()
def _estimate(model: Model, noisy: Tensor, sigma: float) -> Tensor:
    device = next(model.net.parameters()).device
    level = model.denoiser.schedule.at(torch.tensor(sigma, dtype=torch.float64))
    low = float(level.ratio)
    if abs(low / sigma - 1) > 1e-6:
        raise ConfigError(f"sigma {sigma:g} is outside what this model was trained for: {low:g}")
    x = level.alpha * noisy[None].to(device)
    return model.denoiser(x, level).clamp(-1, 1)[0].cpu()


def _psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB, for pictures in [-1, 1] (peak 2)."""
    return float(10 * torch.log10(4 / (a - b).double().square().mean().clamp(min=1e-12)))


def evaluate_command(arguments: Arguments, out: Output) -> int:
    """`undiffuse evaluate`: losses beside exact bars, samples beside real pictures."""
    given = arguments.given
    defaults = runs.EvaluateOptions()
    sampling = changed(defaults.sampling, arguments.settings(SampleConfig))
    if "num_samples" in given:
        sampling = changed(sampling, {"num_images": given["num_samples"]})
    options = replace(
        defaults,
        sampling=sampling,
        draws=_whole("draws", given.get("draws", defaults.draws)),
        data=given.get("data"),
        weights=_weights(given),
        checkpoint=_step(given),
        device=_device(given),
    )
    limit = _limit(given.get("fail_above"))
    run = Path(given["run"])
    body = evaluate(run, options, out).body
    print_figures(body, out)
    if run.is_dir():
        out.say(f"\nwritten to {runs.RunFolder(run).evaluation}")
    out.result("evaluate", **{k: v for k, v in body.items() if k != "schema"})
    if limit is not None:
        _check_limit(body, *limit)
    return 0


def _limit(text: object) -> tuple[str, float] | None:
    if text is None:
        return None
    name, equals, value = str(text).partition("=")
    if not equals:
        raise ConfigError(f"fail_above must be NAME=X, such as frechet=3; got {text!r}")
    return name, _number("fail_above", value)


def _check_limit(body: dict[str, Any], name: str, limit: float) -> None:
    figures = {figure["name"]: figure for figure in body["figures"]}
    if name not in figures:
        raise ConfigError(f"fail_above: no figure {name!r}; there are: {', '.join(figures)}")
    value = figures[name]["value"]
    if value is None or value > limit:
        raise QualityError(f"{name} {value} is above {limit:g} (floor {figures[name]['floor']})")


def report(arguments: Arguments, out: Output) -> int:
    """`undiffuse report`: one offline HTML page."""
    run = Path(arguments.given["run"])
    output = arguments.given.get("output")
    path = runs.write_report(run, None if output is None else Path(output))
    out.say(str(path))
    out.result("report", file=path.as_posix())
    return 0


def env(arguments: Arguments, out: Output) -> int:
    """`undiffuse env`: what a bug report should say."""
    del arguments
    facts = dict(_facts())
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        out.say(f"{name.ljust(width)}  {value}")
    out.result("env", **{name.replace(" ", "_"): value for name, value in facts.items()})
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    from importlib import metadata, util

    yield "undiffuse", __version__
    yield "python", platform.python_version()
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    for name in ("torch", "numpy", "scikit-learn", "pillow", "safetensors", "matplotlib"):
        yield name, metadata.version(name)
    yield "cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    yield "threads", str(torch.get_num_threads())
    yield "device", str(runtime.choose_device(Device.AUTO))
    if torch.cuda.is_available():
        yield "gpu", torch.cuda.get_device_name()
    yield "tensorboard", "installed" if util.find_spec("tensorboard") else "not installed"
    if util.find_spec("torchvision"):
        yield "torchvision", "installed; undiffuse does not need it, and a mismatch breaks others"


# --- options shared by commands -----------------------------------------------------------------


def _load(given: dict[str, Any]) -> Model:
    model = runs.load(given["run"], _weights(given), _step(given))
    runtime.move(model.net, runtime.choose_device(_device(given)))
    return model


def _weights(given: dict[str, Any]) -> Weights:
    return Weights(_one_of("weights", str(given.get("weights", "ema")), tuple(Weights)))


def _device(given: dict[str, Any]) -> Device:
    return Device(_one_of("device", str(given.get("device", "auto")), tuple(Device)))


def _step(given: dict[str, Any]) -> int | None:
    return _whole("checkpoint", given["checkpoint"]) if "checkpoint" in given else None


def _whole(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ConfigError(f"{name} must be a whole number; got {value!r}") from None


def _number(name: str, value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise ConfigError(f"{name} must be a number; got {value!r}") from None


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def _output_folder(given: dict[str, Any], name: str) -> Path:
    run = Path(given["run"])
    default = (run if run.is_dir() else run.parent) / name
    folder = Path(given["output_dir"]) if "output_dir" in given else default
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"output_dir {folder} cannot be written: {error.strerror}") from error
    return folder


COMMANDS: dict[str, Callable[[Arguments, Output], int]] = {
    "demo": demo,
    "train": train,
    "sample": sample,
    "denoise": denoise,
    "evaluate": evaluate_command,
    "describe": describe,
    "report": report,
    "env": env,
}

"""`report` and `env`: the two commands that need few words."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import torch

from undiffuse import __version__, kernels, runs, runtime
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._output import Output
from undiffuse.config import Device
from undiffuse.errors import CheckpointError

LIBRARIES = (
    *("torch", "numpy", "scikit-learn", "pillow", "safetensors"),
    *("jaxtyping", "tqdm", "matplotlib"),
)


def report(arguments: Arguments, out: Output) -> int:
    """`undiffuse report`: one offline HTML page."""
    run = Path(arguments.given["run"])
    if run.is_file():
        raise CheckpointError(
            f"{run} is a file; a report needs a run folder that train has written"
        )
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
    out.result("env", **{name.replace("-", "_"): value for name, value in facts.items()})
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    yield "undiffuse", __version__
    yield "python", platform.python_version()
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield from ((name, _version(name)) for name in LIBRARIES)
    yield "cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    yield "threads", str(torch.get_num_threads())
    device = runtime.choose_device(Device.AUTO)
    yield "device", str(device)
    yield "bf16", "fast here" if runtime.has_bf16(device) else "not fast here: float32 by default"
    yield "kernels", kernels.describe()
    yield "convolutions", _convolutions(device)
    if torch.cuda.is_available():
        yield "gpu", torch.cuda.get_device_name()
    yield "tensorboard", _version("tensorboard")
    if util.find_spec("torchvision"):
        advice = "undiffuse does not need it; one that does not match torch breaks diffusers"
        yield "torchvision", f"{_version('torchvision')} ({advice})"


def _convolutions(device: torch.device) -> str:
    if runtime.half_path(device)[0] is not runtime.Path.KERNELS:
        return "torch's own"
    return "3x3 by Winograd in bf16" if runtime.winograd_pays() else "direct: this CPU has AMX"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"

"""`average`: an average of a run's weights that was never kept, as a model file."""

import shlex
from pathlib import Path

from undiffuse import runs
from undiffuse.checkpoint import Model, save_model
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._options import checkpoint, ema_length
from undiffuse.cli._output import Output
from undiffuse.cli._train import say_next
from undiffuse.config import Device
from undiffuse.errors import ConfigError


def average(arguments: Arguments, out: Output) -> int:
    """`undiffuse average`."""
    given = arguments.given
    run, length = Path(given["run"]), ema_length(given)
    if length is None:
        raise ConfigError("ema_length is missing: name the length, such as --ema-length 0.08")
    runs.check_run(run, "ema_length and checkpoint")
    path = Path(given.get("output", run / f"ema-{length:g}.safetensors"))
    if path.resolve().is_relative_to((run / "ema").resolve()):
        raise ConfigError(f"{path} lies in what is read; name another place with -o")
    runs.check_free(path, bool(given.get("force")))
    runs.check_writable(path.parent)
    model = runs.averaged(run, length, checkpoint(given), Device.CPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, model)
    out.say(f"{path}: {_origin(model)}")
    say_next((f"undiffuse sample {shlex.quote(str(path))}",), out)
    out.result("average", file=path.as_posix(), trained=dict(model.trained))
    return 0


def _origin(model: Model) -> str:
    steps, rebuilding = model.trained["steps"], model.trained.get("rebuilt")
    if not isinstance(rebuilding, dict):
        return f"as it was kept at step {steps}"
    missed = float(str(rebuilding["missed"]))
    return (
        f"rebuilt from {rebuilding['averages']} averages up to step {steps}, which miss"
        f" {missed:.1%} of its profile"
    )

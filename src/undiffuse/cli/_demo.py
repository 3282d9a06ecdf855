"""`demo`: the whole road on bundled pictures, in about three minutes."""

import time
from functools import partial
from pathlib import Path

from undiffuse import runs
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._evaluate import measure, print_figures
from undiffuse.cli._output import Output, duration
from undiffuse.cli._train import run_training, say_files, say_next
from undiffuse.config import RunConfig, TrainConfig, flatten, override
from undiffuse.errors import ConfigError

DEMO: dict[str, dict[str, object]] = {
    "digits": {"preset": "digits-demo"},
    "photos": {"max_train_steps": 300, "train_batch_size": 32, "random_flip": True},
}
MEASURED = runs.EvaluateOptions()


def demo(arguments: Arguments, out: Output) -> int:
    """`undiffuse demo`: train, sample, evaluate, report."""
    data = str(arguments.given.get("data", "digits"))
    if data not in DEMO:
        raise ConfigError(f"data must be one of {', '.join(DEMO)} in the demo; got {data!r}")
    default = "runs/demo" if data == "digits" else f"runs/demo-{data}"
    run = Path(arguments.given.get("output_dir", default))
    settings = {"data": data, **DEMO[data], **arguments.settings(TrainConfig)}
    request = _demo_request(run, override(RunConfig(), settings))
    return run_training(request, out, "demo", partial(_after, run, out, time.monotonic()))


def _demo_request(run: Path, config: RunConfig) -> runs.Request:
    """A second demo goes on with an interrupted one, if it is the same one."""
    if not (run / "config.json").exists():
        return runs.Request(config, run)
    stored = runs.stored_config(run)
    there = flatten(stored)
    for name, value in flatten(config).items():
        if value is not None and value != there[name]:  # None: the run has settled it
            raise ConfigError(
                f"{run} holds a run with {name} {there[name]}, this one has {value};"
                " choose another --output-dir"
            )
    return runs.Request(stored, run, resume="latest")


def _after(run: Path, out: Output, began: float, finished: runs.Finished) -> int:
    body = measure(run, MEASURED, out)
    page = runs.write_report(run)
    seconds = time.monotonic() - began
    print_figures(body, out)
    out.say(f"\nDone in {duration(seconds)}.")
    out.say(f"  report   {page}     (open in a browser; works offline)")
    say_files(run, out)
    say_next([line for line, _ in runs.next_commands(run)], out)
    out.result(
        "demo",
        run_dir=run.as_posix(),
        step=finished.step,
        seconds=round(seconds, 1),
        figures=body["figures"],
        report=page.as_posix(),
    )
    return 0

"""`train`: a run's events, told as they happen."""

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from undiffuse import cost, images, runs
from undiffuse.checkpoint import Model
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._output import Bar, Output, count_of, duration
from undiffuse.cli._request import training_request
from undiffuse.cli._signals import Stop, listening
from undiffuse.cli._teller import Teller
from undiffuse.config import flatten

FINAL_IMAGES, FINAL_PIXELS = 64, 2**16
FILM_IMAGES, FILM_STEPS = 8, 20
SAMPLE_STEPS = 20


def train(arguments: Arguments, out: Output) -> int:
    """`undiffuse train`."""
    request = training_request(arguments)
    return run_training(request, out, "train", lambda finished: _result(request, finished, out))


def run_training(
    request: runs.Request, out: Output, command: str, after: Callable[[runs.Finished], int]
) -> int:
    """Tell the events of a run, draw its samples, and call `after` with the finished run."""
    stop, teller = Stop(), Teller(request, out)
    out.run = request.run
    with listening(stop.handle, "SIGINT", "SIGTERM", "SIGHUP"):
        _follow(request, stop, teller)
    match teller.last:
        case runs.Stopped(step):
            return _stopped(request.run, step, stop, out, command)
        case runs.Finished() as finished:
            _final_samples(request, out)
            return after(finished)
        case _:
            return _dry_result(teller.planned, out, command)


def _follow(request: runs.Request, stop: Stop, teller: Teller) -> None:
    try:
        for event in runs.training_run(request, stop):
            stop.running = not request.dry_run
            if isinstance(event, runs.Saved):
                stop.saved_step = event.step
            teller.hear(event)
    finally:
        stop.running = False
        teller.close()


def _stopped(run: Path, step: int, stop: Stop, out: Output, command: str) -> int:
    place = shlex.quote(str(run))
    again = f"undiffuse train --resume-from-checkpoint latest --output-dir {place}"
    out.say(f"Stopped at step {step:,}, saved. Go on: {again}")
    out.result(command, "interrupted", run_dir=run.as_posix(), step=step, resume=again)
    return stop.exit_code


def _final_samples(request: runs.Request, out: Output) -> None:
    run = request.run
    model = runs.load(run, device=request.config.runtime.device)
    count, columns = _final_grid(model)
    with Bar(out, SAMPLE_STEPS + FILM_STEPS, "sample") as bar:
        pictures = runs.generate(
            model,
            count,
            num_inference_steps=SAMPLE_STEPS,
            batch_size=count,
            on_step=lambda step: bar.advance(),
        )
        images.save_grid(pictures, run / "samples" / "final.png", columns)
        film = runs.film(model, FILM_IMAGES, frames=FILM_STEPS)
        images.save_film(film, run / "samples" / "film.webp", columns=FILM_IMAGES // 2)


def _final_grid(model: Model) -> tuple[int, int | None]:
    """How many pictures, in how many columns: fewer of large ones, a column per class if few."""
    pixels = model.pictures.height * model.pictures.width
    count = min(FINAL_IMAGES, max(FILM_IMAGES, FINAL_PIXELS // pixels))
    classes = model.spec.classes
    if 2 <= classes <= count:
        return classes * max(1, count // classes), classes if classes > 4 else None
    return count, None


def _result(request: runs.Request, finished: runs.Finished, out: Output) -> int:
    run = request.run
    out.say(
        f"Done: {count_of(finished.step, 'step')} in {duration(finished.seconds)}"
        f" ({finished.images_per_second:,.0f} pictures per second)."
    )
    say_files(run, out)
    place = shlex.quote(str(run))
    say_next(
        (
            f"undiffuse sample {place} -n 64 --seed 1",
            f"undiffuse evaluate {place}",
            f"undiffuse report {place}",
        ),
        out,
    )
    out.result(
        "train",
        run_dir=run.as_posix(),
        step=finished.step,
        seed=request.config.train.seed,
        seconds=round(finished.seconds, 3),
        images_per_second=round(finished.images_per_second, 1),
        loss={"train": finished.loss, "held_out": finished.held_out},
        artifacts={
            "model": finished.model.as_posix(),
            "samples": (run / "samples" / "final.png").as_posix(),
            "metrics": (run / "metrics.jsonl").as_posix(),
        },
    )
    return 0


def say_files(run: Path, out: Output) -> None:
    out.say(f"  samples  {run / 'samples' / 'final.png'}")
    out.say(f"  model    {run / 'model.safetensors'}")


def say_next(lines: Iterable[str], out: Output) -> None:
    out.say("Next:")
    for line in lines:
        out.say(f"  {line}")


def _dry_result(plan: runs.Plan, out: Output, command: str) -> int:
    config, train = plan.config.train, plan.data.train
    memory = cost.training_bytes(plan.spec, *train.size, config.part_size)
    parameters = cost.total_parameters(plan.spec)
    out.say(
        f"Would train {parameters:,} parameters on {count_of(len(train), 'picture')}"
        f" for {count_of(config.max_train_steps, 'step')}: about {duration(plan.seconds)},"
        f" at least {memory / 1e9:.2g} GB of memory."
    )
    out.say("Dry run: nothing was written.")
    out.result(
        command,
        "dry_run",
        parameters=parameters,
        train_images=len(train),
        held_out_images=len(plan.data.held_out),
        seconds=round(plan.seconds, 1),
        memory_bytes=memory,
        config=flatten(plan.config),
    )
    return 0

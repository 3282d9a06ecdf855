"""The 8x8 digits: what the presets reach, judged on 360 digits that no part of them has seen.

Generator, classifier and bars know the 1,437 training digits only. Recipes were compared on a
validation part of those (`quality.ablation`), never on the 360.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quality.fitted import fitted, seconds_of, threads_of
from quality.harness import Finding, Lab, Task, at_least, at_most
from undiffuse import evaluation, images, runs
from undiffuse.checkpoint import Model, load_model
from undiffuse.config import RunConfig, override

COMMITTED = Path(__file__).resolve().parent / "models" / "digits-best.safetensors"
SAMPLES = 1440
FEW, MANY = 10, 100  # network evaluations of a picture
LOW, GAIN, EVEN = 0.8, 10.0, 0.5  # up to LOW a gain of GAIN percent, above it EVEN at most

Known = evaluation.Split


@dataclass(frozen=True)
class Preset:
    """A preset as `undiffuse train --preset` takes it."""

    name: str
    seconds: float  # of training that are allowed on two cores

    @property
    def config(self) -> RunConfig:
        """Everything that decides the weights, but for the seed."""
        return override(RunConfig(), {"data": "digits", "preset": self.name})


@dataclass(frozen=True)
class Effort:
    """How closely the best preset is looked at.

    Args:
        draws: of noise per picture; at sigma 5 the bars lie 0.4 % apart.
        samples: of which the Fréchet distances at few and at many evaluations are taken.
    """

    draws: int
    samples: int


FULL, QUICK_LOOK = Effort(16, 2000), Effort(4, 1440)
STEPS = 20
FEW_STEPS, MANY_STEPS = 8, 80  # two of them and twenty are guided and count twice
DEMO = Preset("digits-demo", 90.0)
BEST = Preset("digits-best", 900.0)


@cache
def splits() -> tuple[Known, Known]:
    """The training digits and the held-out ones."""
    data = images.load("digits")
    return Known(*data.train.fixed()), Known(*data.held_out.fixed())


def raw_held_out() -> NDArray[Any]:
    """The pixels that judge, as they are stored."""
    return images.load("digits").held_out.pixels


def trained(lab: Lab, preset: Preset, seed: int) -> tuple[Model, Path]:
    """The model and its run."""
    run = lab.folder(preset.name, preset.config, seed)
    return fitted(run, "digits", preset=preset.name, seed=seed), run


def samples(model: Model, count: int, steps: int = STEPS) -> evaluation.Split:
    """Classes in turn, the default sampler, guided as the preset says."""
    made = runs.generate(
        model,
        count,
        seed=0,
        num_inference_steps=steps,
        batch_size=500,
        mixed_precision="no",  # as a network of this width runs anyway; `_distance` hooks into it
    )
    return evaluation.Split(made, runs.labels_in_turn(model, count))


# --- the demo: class accuracy -------------------------------------------------------------------


def demo_findings(lab: Lab, seed: int) -> Iterator[Finding]:
    model, run = trained(lab, DEMO, seed)
    yield from accuracy("digits-demo", quality_of(model))
    yield within_time(run, DEMO)


def quality_of(model: Model) -> dict[str, evaluation.Figure]:
    train, held_out = splits()
    report = evaluation.sample_quality(samples(model, SAMPLES), train, held_out)
    return {figure.name: figure for figure in report.figures}


def accuracy(name: str, figures: dict[str, evaluation.Figure]) -> Iterator[Finding]:
    figure = figures["class_accuracy"]
    value, floor = _measured(figure)
    bound = floor - 0.01
    yield at_least(f"{name}/class_accuracy", value, bound, "real held-out - 0.01", floor=floor)


def within_time(run: Path, preset: Preset) -> Finding:
    seconds, threads = seconds_of(run), threads_of(run)
    detail = {"threads": threads}
    unit = "s of training"
    return at_most(f"{preset.name}/seconds", seconds, preset.seconds, unit=unit, detail=detail)


# --- the best: everything -----------------------------------------------------------------------


def best_findings(lab: Lab, seed: int) -> Iterator[Finding]:
    model, run = trained(lab, BEST, seed)
    yield within_time(run, BEST)
    yield from judged("digits-best", model)


def committed_findings(lab: Lab, seed: int) -> Iterator[Finding]:
    """The model in the repository: seed 0 of the preset."""
    del lab, seed
    yield from judged("digits-best", load_model(COMMITTED), QUICK_LOOK)


def judged(name: str, model: Model, effort: Effort = FULL) -> Iterator[Finding]:
    """All that is asked of the best preset."""
    yield from losses(name, model, effort.draws)
    figures = quality_of(model)
    yield from accuracy(name, figures)
    for one in ("precision", "recall"):
        value, floor = _measured(figures[one])
        yield at_least(f"{name}/{one}", value, 0.9, floor=floor)
    value, floor = _measured(figures["frechet"])
    yield at_most(f"{name}/frechet", value, 2 * floor, "<= 2 x floor", floor=floor)
    value, floor = _measured(figures["copies"])
    yield at_most(f"{name}/copies", value, floor, "<= real held-out", floor=floor)
    yield few_steps(name, model, effort.samples)


def _measured(figure: evaluation.Figure) -> tuple[float, float]:
    assert figure.value is not None
    assert figure.floor is not None
    return figure.value, figure.floor


def losses(name: str, model: Model, draws: int) -> Iterator[Finding]:
    """Without label, against the best of Wiener, KDE and mixture on the same noise."""
    train, held_out = splits()
    report = evaluation.loss_by_level(model.denoiser, train, held_out, draws=draws, labelled=True)
    for level in report.levels:
        assert level.held_out is not None
        percent = 100 * (level.held_out / level.bar - 1)
        bound = -GAIN if level.ratio <= LOW + 1e-9 else EVEN
        detail = {
            "low": level.excess.low,
            "high": level.excess.high,
            "held_out": level.held_out,
            "labelled": level.held_out_labelled,
            "bar": level.bar,
            "bar_name": level.bar_name,
            "train": level.train,
            "train_optimum": level.train_optimum,
        }
        where = f"{name}/loss/{level.ratio:g}"
        yield at_most(where, percent, bound, unit="% above the best bar", detail=detail)


def few_steps(name: str, model: Model, count: int) -> Finding:
    """Fréchet distance to the held-out digits with ten evaluations over that with a hundred."""
    judge = evaluation.frechet_judge(*splits())
    few, evaluations = _distance(judge, model, count, FEW_STEPS)
    many, more = _distance(judge, model, count, MANY_STEPS)
    if evaluations > FEW or more < MANY:
        raise AssertionError(f"{evaluations:g} and {more:g} evaluations, not {FEW} and {MANY}")
    detail = {
        "few": few,
        "few_evaluations": evaluations,
        "many": many,
        "many_evaluations": more,
        "samples": count,
    }
    title = "<= 1.1 x with 100 evaluations"
    return at_most(f"{name}/ten_evaluations", few / many, 1.1, title, unit="ratio", detail=detail)


def _distance(
    judge: evaluation.FrechetJudge, model: Model, count: int, steps: int
) -> tuple[float, float]:
    """And the evaluations of a picture: a guided step takes two, as one call or as two."""
    seen: list[int] = []
    hook = model.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        distance = judge.distance(samples(model, count, steps).x0)
    finally:
        hook.remove()
    return distance, sum(seen) / count


_DEMO = Task("digits-demo", demo_findings, (DEMO, DEMO.config, SAMPLES, STEPS))
_JUDGED = (SAMPLES, STEPS, FULL, FEW_STEPS, MANY_STEPS)
TASKS = (_DEMO, Task("digits-best", best_findings, (BEST, BEST.config, *_JUDGED)))
QUICK = (_DEMO, Task("digits-best/committed", committed_findings))

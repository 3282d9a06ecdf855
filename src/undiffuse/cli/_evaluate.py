"""`evaluate`, and an evaluation as lines of text: each figure beside what real pictures score."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from undiffuse import runs
from undiffuse.cli import _options as options
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._output import Bars, Output, table
from undiffuse.config import SampleConfig, changed
from undiffuse.errors import ConfigError, QualityError

Body = Mapping[str, Any]


def evaluate(arguments: Arguments, out: Output) -> int:
    """`undiffuse evaluate`: losses beside exact bars, samples beside real pictures."""
    given = arguments.given
    limit = _limit(given.get("fail_above"))
    run = Path(given["run"])
    body = measure(run, _evaluate_options(arguments), out)
    print_figures(body, out)
    if run.is_dir():
        out.say(f"\nwritten to {runs.RunFolder(run).evaluation}")
    if limit is not None:
        _check_limit(body, *limit)
    out.result("evaluate", **{k: v for k, v in body.items() if k != "schema"})
    return 0


def measure(run: Path, chosen: runs.EvaluateOptions, out: Output) -> Body:
    """Measure a run under a progress bar for each part; writes its evaluation.json."""
    model = runs.load(run, chosen.weights, chosen.checkpoint)
    count = runs.sample_count(model, chosen.num_samples)
    options.check_memory(model, count, "num_samples:")
    with Bars(out) as bars:
        return runs.evaluate_run(run, chosen, bars.reach).body


def _evaluate_options(arguments: Arguments) -> runs.EvaluateOptions:
    given, defaults = arguments.given, runs.EvaluateOptions()
    return replace(
        defaults,
        sampling=changed(defaults.sampling, arguments.settings(SampleConfig)),
        num_samples=options.whole("num_samples", given["num_samples"], 1)
        if "num_samples" in given
        else None,
        draws=options.whole("draws", given["draws"], 1) if "draws" in given else None,
        data=given.get("data"),
        weights=options.weights(given),
        checkpoint=options.checkpoint(given),
        device=options.device(given),
    )


def _limit(text: str | None) -> tuple[str, float] | None:
    if text is None:
        return None
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"fail_above must be NAME=X, such as frechet=3; got {text!r}")
    return name, options.number(f"fail_above {name}", value)


def _check_limit(body: Body, name: str, limit: float) -> None:
    figures = {figure["name"]: figure for figure in body["figures"]}
    if name not in figures:
        raise ConfigError(f"fail_above: no figure {name!r}; there are: {', '.join(figures)}")
    figure = figures[name]
    if figure["value"] is None:
        raise QualityError(f"{name} has no value to compare with {limit:g}: {figure['warning']}")
    if figure["value"] > limit:
        real = _shown(figure["floor"])
        raise QualityError(
            f"{name} {_shown(figure['value'])} is above {limit:g} (real pictures: {real})"
        )


# --- lines --------------------------------------------------------------------------------------


def print_figures(body: Body, out: Output) -> None:
    """Losses by noise level, then the figures of samples."""
    for line in (*level_lines(body), "", *figure_lines(body)):
        out.say(line)


def figure_lines(body: Body) -> list[str]:
    """The figures of samples as a table, warnings below."""
    figures = body["figures"]
    if not figures:
        return []
    heading = ("samples", "value", "real pictures", "better", "n")
    rows = [heading, *(_figure_row(figure) for figure in figures)]
    return [*table(rows, right=(1, 4)), *_notes(figures)]


def _notes(figures: Sequence[Body]) -> list[str]:
    """Each warning once, with the figures it is about."""
    about: dict[str, list[str]] = {}
    for figure in figures:
        for warning in filter(None, figure["warning"].split("; ")):
            about.setdefault(warning, []).append(figure["name"])
    return [
        f"note ({'all' if len(names) == len(figures) else ', '.join(names)}): {warning}"
        for warning, names in about.items()
    ]


def _figure_row(figure: Body) -> tuple[str, str, str, str, str]:
    spread = figure["floor_std"]
    floor = _shown(figure["floor"]) + (f" ± {_shown(spread)}" if spread else "")
    return figure["name"], _shown(figure["value"]), floor, figure["better"], f"{figure['n']:,}"


def level_lines(body: Body) -> list[str]:
    """The losses by noise level beside the best bar, and what follows from them."""
    levels = body["levels"]
    if not levels:
        return []
    heading = ("sigma/alpha", "held out", "best bar", "is", "train", "train optimum")
    lines = table([heading, *(_level_row(level) for level in levels)], right=(0, 1, 2, 4, 5))
    return [*lines, f"{body['verdict']}: {body['reason']}"] if body["verdict"] else lines


def _level_row(level: Body) -> tuple[str, ...]:
    """The lowest bar is the one to beat; its name stands beside it."""
    best = next((name for name, value in level["bars"].items() if value == level["bar"]), "")
    left, right = ("ratio", "held_out", "bar"), ("train", "train_optimum")
    return *(_shown(level[n]) for n in left), best, *(_shown(level[n]) for n in right)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

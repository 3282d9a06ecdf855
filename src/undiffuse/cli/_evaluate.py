"""`evaluate`, and an evaluation as lines of text: each figure beside what real pictures score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from undiffuse import evaluation, runs
from undiffuse.cli import _options as options
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._output import Bars, Output, shown, table
from undiffuse.config import SampleConfig, changed
from undiffuse.errors import ConfigError, QualityError

Body = Mapping[str, Any]


def evaluate(arguments: Arguments, out: Output) -> int:
    """`undiffuse evaluate`: losses beside exact bars, samples beside real pictures."""
    given = arguments.given
    limits = _limits(given)
    run = Path(given["run"])
    chosen = evaluate_options(arguments)
    body = measure(run, chosen, out)
    options.warn_unguided(given, body["sampling"]["guidance_scale"], out)
    print_figures(body, out)
    if run.is_dir():
        out.say(f"\nwritten to {runs.RunFolder(run).evaluation}")
    for limit in limits:
        limit.check(body)
    out.result("evaluate", **{k: v for k, v in body.items() if k != "schema"})
    return 0


def measure(run: Path, chosen: runs.EvaluateOptions, out: Output) -> Body:
    """Measure a run under a progress bar for each part; writes its evaluation.json.

    What is strange about the pictures is said at the end, in a line each.
    """
    judged_count(run, chosen)
    with Bars(out) as bars:
        body = runs.evaluate_run(run, chosen, bars.reach).body
    for warning in body["warnings"]:
        out.warn(warning)
    return body


def judged_count(run: Path, chosen: runs.EvaluateOptions, sets: int = 1) -> int:
    """How many pictures are judged; refused where so many sets of them do not fit in memory."""
    model = runs.load(run, chosen.weights, chosen.checkpoint, chosen.device, chosen.ema_length)
    count = runs.sample_count(model, chosen.num_samples)
    options.check_memory(model, sets * count, "num_samples:")
    return count


def evaluate_options(arguments: Arguments) -> runs.EvaluateOptions:
    """What was typed over the defaults."""
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
        ema_length=options.ema_length(given),
        autoguidance=options.autoguidance(given),
        features=given.get("features"),
        features_output=given.get("features_output"),
    )


def refuse(given: Mapping[str, Any], flag: str, senseless: Mapping[str, str]) -> None:
    """Refuse options that `--flag` has no use for; `senseless` says of each why."""
    for name, why in senseless.items():
        if name in given:
            raise ConfigError(f"{name} does not go with --{flag}: {why}; leave it out")


@dataclass(frozen=True)
class _Limit:
    """`--fail-above name=value`, or `--fail-below`."""

    side: str
    name: str
    value: float

    def check(self, body: Body) -> None:
        figures = {figure["name"]: figure for figure in body["figures"]}
        if self.name not in figures:
            there = ", ".join(figures)
            raise ConfigError(f"fail_{self.side}: {self.name} was not measured; there are: {there}")
        figure = figures[self.name]
        if figure["value"] is None:
            raise QualityError(
                f"{self.name} has no value to compare with {self.value:g}: {figure['warning']}"
            )
        if self._passed(figure["value"]):
            found, real = shown(figure["value"]), shown(figure["floor"])
            raise QualityError(
                f"{self.name} {found} is {self.side} {self.value:g} (real pictures: {real})"
            )

    def _passed(self, value: float) -> bool:
        return value > self.value if self.side == "above" else value < self.value


def _limits(given: Mapping[str, Any]) -> list[_Limit]:
    """Refused before anything is measured where no figure can have that name."""
    sides = [side for side in ("above", "below") if f"fail_{side}" in given]
    return [_limit(side, given[f"fail_{side}"]) for side in sides]


def _limit(side: str, text: str) -> _Limit:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"fail_{side} must be NAME=X, such as frechet=3; got {text!r}")
    if name not in evaluation.FIGURES:
        there = ", ".join(evaluation.FIGURES)
        raise ConfigError(f"fail_{side}: no figure {name!r}; there are: {there}")
    return _Limit(side, name, options.number(f"fail_{side} {name}", value))


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
    floor = shown(figure["floor"]) + (f" ± {shown(spread)}" if spread else "")
    return figure["name"], shown(figure["value"]), floor, figure["better"], f"{figure['n']:,}"


def level_lines(body: Body) -> list[str]:
    """The losses by noise level beside the best bar, and what follows from them."""
    levels = body["levels"]
    if not levels:
        return []
    heading = ("sigma/alpha", "held out", "best bar", "is", "excess %", "train", "train optimum")
    lines = table([heading, *(_level_row(level) for level in levels)], right=(0, 1, 2, 4, 5, 6))
    verdict = [f"{body['verdict']}: {body['reason']}"] if body["verdict"] else []
    return [*lines, *verdict, *_cost_lines(body.get("loss", {}))]


def _level_row(level: Body) -> tuple[str, ...]:
    """The lowest bar is the one to beat; its name stands beside it."""
    best = next((name for name, value in level["bars"].items() if value == level["bar"]), "")
    judged = level["held_out"]
    if judged is None:  # a denoiser that must be told the class
        judged = level.get("held_out_labelled")
    left, right = (level["ratio"], judged, level["bar"]), (level["train"], level["train_optimum"])
    return *map(shown, left), best, signed(level.get("excess")), *map(shown, right)


def signed(interval: Body | None, digits: int = 3) -> str:
    """+27.4 [+23.8, +31.2]: a difference with its 95 % interval."""
    if interval is None or interval["value"] is None:
        return "-"
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    ends = "" if low is None or high is None else f" [{low:+.{digits}g}, {high:+.{digits}g}]"
    return f"{value:+.{digits}g}{ends}"


def _cost_lines(loss: Body) -> list[str]:
    """What the excess of all levels sums up to, where it was measured."""
    if loss.get("nats_per_picture") is None:
        return []
    nats, bits = signed(loss["nats_per_picture"]), signed(loss["bits_per_dimension"])
    return [f"excess summed over the levels: {nats} nats per picture, {bits} bits per dimension"]

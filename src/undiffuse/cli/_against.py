"""`evaluate A --against B`: each figure of both, and whether the difference is more than chance."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from undiffuse import runs
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._evaluate import evaluate_options, judged_count, refuse, signed
from undiffuse.cli._output import Bars, Output, shown, table
from undiffuse.evaluation import FigureDifference, LevelDifference, LossDifference

SENSELESS = {
    "pareto": "it measures one model",
    "fail_above": "no figure is judged",
    "fail_below": "no figure is judged",
    "autoguidance": "both are sampled alike",
}


def against(arguments: Arguments, out: Output) -> int:
    """`undiffuse evaluate A --against B`."""
    refuse(arguments.given, "against", SENSELESS)
    a, b = (Path(arguments.given[name]) for name in ("run", "against"))
    chosen = evaluate_options(arguments)
    if runs.holds_model(a) and runs.holds_model(b):  # else no more than there are pictures
        judged_count(a, chosen, sets=2)
    with Bars(out) as bars:
        made = runs.compare_runs(a, b, chosen, bars.reach)
    for line in comparison_lines(made):
        out.say(line)
    for note in made.notes:
        out.warn(note)
    out.result("against", **{k: v for k, v in made.asdict().items() if k != "schema"})
    return 0


def comparison_lines(made: runs.Comparison) -> list[str]:
    """Who A and B are, the losses by noise level, and the figures of samples."""
    who = [f"{name}: {side['path']} ({side['kind']})" for name, side in _named(made)]
    losses = [] if made.losses is None else [*_loss_lines(made.losses), ""]
    return [*who, "", *losses, *_figure_lines(made)]


def _named(made: runs.Comparison) -> Sequence[tuple[str, dict[str, object]]]:
    return (("A", made.a), ("B", made.b))


def _figure_lines(made: runs.Comparison) -> list[str]:
    count = made.settings["num_samples"]
    heading = (f"{count:,} samples", "A", "B", "A - B", "real pictures", "better")
    rows = [heading, *(_figure_row(figure) for figure in made.figures)]
    return [
        *table(rows, right=(1, 2, 3, 4)),
        "± is half the 99 % interval of chance; being better than real pictures does not count",
    ]


def _figure_row(figure: FigureDifference) -> tuple[str, ...]:
    spread = "" if figure.spread is None else f" ± {figure.spread:.2g}"
    apart = "-" if figure.difference is None else f"{figure.difference:+.3g}{spread}"
    values = (shown(figure.a), shown(figure.b), apart, shown(figure.floor))
    return figure.name, *values, _winner(figure.better)


def _loss_lines(losses: LossDifference) -> list[str]:
    heading = ("sigma/alpha", "A", "B", "A above B, %", "better")
    rows = [heading, *(_level_row(level) for level in losses.levels)]
    body = losses.asdict()
    nats, bits = signed(body["nats_per_picture"]), signed(body["bits_per_dimension"])
    return [
        *table(rows, right=(0, 1, 2, 3)),
        f"held-out error {losses.judged}; A - B summed over the levels: {nats} nats per picture,"
        f" {bits} bits per dimension",
    ]


def _level_row(level: LevelDifference) -> tuple[str, ...]:
    return (
        *(shown(value) for value in (level.ratio, level.a, level.b)),
        signed(asdict(level.percent)),
        _winner(level.better),
    )


def _winner(better: str) -> str:
    return {"a": "A", "b": "B"}.get(better, better)

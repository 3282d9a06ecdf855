"""`evaluate --pareto`: quality against network evaluations, as two tables and what they say."""

from collections.abc import Sequence
from pathlib import Path

from undiffuse import runs
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._evaluate import evaluate_options, judged_count, refuse
from undiffuse.cli._output import Bars, Output, count_of, shown, table
from undiffuse.evaluation import SamplerSetting

SENSELESS = {
    "num_inference_steps": "it is chosen for every sampler",
    "draws": "no losses are measured",
    "fail_above": "no figure is judged",
    "fail_below": "no figure is judged",
}


def pareto(arguments: Arguments, out: Output) -> int:
    """`undiffuse evaluate RUN --pareto`: writes pareto.json and pareto.png into the run."""
    refuse(arguments.given, "pareto", SENSELESS)
    run, chosen = Path(arguments.given["run"]), evaluate_options(arguments)
    count = judged_count(run, chosen)
    with Bars(out) as bars:
        made = runs.pareto_run(run, chosen, _Teller(out, bars, count).reach)
    for line in pareto_lines(made):
        out.say(line)
    for warning in made.warnings:
        out.warn(warning)
    if run.is_dir():
        folder = runs.RunFolder(run)
        out.say(f"\nwritten to {folder.pareto} and {folder.pareto.with_suffix('.png')}")
    out.result("pareto", **{k: v for k, v in made.asdict().items() if k not in _OWN})
    return 0


_OWN = ("schema", "warnings")  # which `Output.result` writes itself


class _Teller:
    """Says how much there is to do before it begins."""

    def __init__(self, out: Output, bars: Bars, count: int) -> None:
        self.out, self.bars, self.count = out, bars, count

    def reach(self, what: str, done: int, total: int) -> None:
        if not done:
            pictures = count_of(self.count, "picture")
            self.out.tell(f"{total:,} {what} of a batch, {pictures} per setting")
        self.bars.reach(what, done, total)


# --- lines --------------------------------------------------------------------------------------


def pareto_lines(made: runs.Pareto) -> list[str]:
    """Fréchet distances and distances to the pictures of many steps, and the conclusions."""
    n = made.measured["num_samples"]
    against = f"{made.measured['reference_pictures']} {made.measured['against']} pictures"
    return [
        f"Fréchet distance of {n:,} samples to {against} (* lowest; real pictures: "
        f"{made.floor:.4g})",
        *_grid(made, [one.frechet for one in made.settings], made.best),
        "",
        "distance to the same sampler's pictures at 100 evaluations (root mean square)",
        *_grid(made, [one.rms for one in made.settings], ()),
        "",
        *_conclusions(made),
    ]


def _grid(
    made: runs.Pareto, values: Sequence[float | None], marked: Sequence[SamplerSetting]
) -> list[str]:
    """A row per sampler, a column per budget."""
    cells = {
        (one.sampler, one.budget): shown(value, 3) + ("*" if one in marked else " ")
        for one, value in zip(made.settings, values, strict=True)
    }
    samplers = list(dict.fromkeys(one.sampler for one in made.settings))
    budgets = sorted({one.budget for one in made.settings})
    heading = ("evaluations", *(f"{budget} " for budget in budgets))
    rows = [(name, *(cells[name, budget] for budget in budgets)) for name in samplers]
    return table([heading, *rows], right=range(1, len(budgets) + 1))


def _conclusions(made: runs.Pareto) -> list[str]:
    reference, chosen = made.reference, made.recommended
    often = (
        f"{reference.evaluations} evaluations of {reference.sampler}: {shown(reference.frechet, 3)}"
    )
    steps = ", ".join(f"{one.evaluations} {one.sampler}" for one in made.frontier)
    lines = [often, f"on the frontier: {steps or 'nothing'}"]
    if chosen is None:
        return [*lines, "none of these is within 10 % of that"]
    return [
        *lines,
        f"recommended: --sampler {chosen.sampler} --num-inference-steps {chosen.steps}, the fewest"
        f" evaluations ({chosen.evaluations}) within 10 % of that: {shown(chosen.frechet, 3)}",
    ]

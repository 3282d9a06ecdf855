"""`likelihood`: bits per dimension of training pictures and held-out ones."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from undiffuse import runs
from undiffuse.checkpoint import Model
from undiffuse.cli import _options as options
from undiffuse.cli._arguments import Arguments
from undiffuse.cli._output import Bars, Output, table

Body = Mapping[str, Any]
EXACT = "exact"  # --num-probes of this word


def likelihood(arguments: Arguments, out: Output) -> int:
    """`undiffuse likelihood`."""
    given = arguments.given
    chosen = _chosen(given)  # refused before anything is loaded
    model = options.load_model(given)
    chosen = replace(chosen, num_probes=_probes(given, model))
    with Bars(out) as bars:
        body = runs.run_likelihood(given["run"], model, chosen, bars.reach).body
    for warning in body["warnings"]:
        out.warn(warning)
    for line in lines(body):
        out.say(line)
    out.result("likelihood", **{k: v for k, v in body.items() if k != "warnings"})
    return 0


def _chosen(given: options.Given) -> runs.LikelihoodOptions:
    defaults = runs.LikelihoodOptions()
    count = given.get("num_images")
    if given.get("num_probes", EXACT) != EXACT:
        options.whole("num_probes", given["num_probes"], 2)
    return replace(
        defaults,
        num_images=None if count is None else options.whole("num_images", count, 1),
        side=runs.Side(
            options.one_of("split", str(given.get("split", defaults.side)), tuple(runs.Side))
        ),
        given_class=bool(given.get("given_class")),
        tolerance=options.number("tolerance", given.get("tolerance", defaults.tolerance)),
        data=given.get("data"),
        seed=options.whole("seed", given.get("seed", defaults.seed), 0),
    )


def _probes(given: options.Given, model: Model) -> int | None:
    """As many as a picture has values are exact."""
    asked = given.get("num_probes")
    if asked == EXACT:
        return model.pictures.channels * model.pictures.height * model.pictures.width
    return None if asked is None else int(asked)


def lines(body: Body) -> Iterator[str]:
    """The means with what may be wrong with them, and how they were found."""
    heading = ("pictures", "bits/dim", "std. error", "estimated error", "n")
    yield from table([heading, *(_row(split) for split in body["splits"])], right=(1, 2, 3, 4))
    apart = body["held_out_minus_train"]
    if apart is not None:
        yield f"held-out minus train: {apart['value']:+.4f}" + _plus_minus(apart["standard_error"])
    split, given = body["splits"][0], ", given their class" if body["given_class"] else ""
    yield (
        f"read as {body['reading']}{given}; sigma/alpha {body['low']:.3g} to {body['high']:.3g};"
        f" trace: {body['trace']}; {split['evaluations']:.0f} network evaluations, with the"
        f" copies in small batches, and {split['products']:.0f} products with the Jacobian per"
        " picture"
    )


def _row(split: Body) -> tuple[str, ...]:
    spread = split["standard_error"]
    return (
        split["name"],
        f"{split['bits_per_dimension']:.4f}",
        "-" if spread is None else f"{spread:.4f}",
        f"{split['error']:.2g}",
        f"{split['pictures']:,}",
    )


def _plus_minus(spread: float | None) -> str:
    return "" if spread is None else f" ± {spread:.4f}"

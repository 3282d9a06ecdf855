"""Numbers about a denoiser or about a set of pictures, each beside what it should be.

`loss_by_level` measures a denoiser against exact ones on pictures it has not seen;
`sample_quality` measures generated pictures beside real ones; `summary` joins both into one
dictionary that can be written as JSON. Nothing here prints or opens files.

Everything that judges is fitted on the spot to the training split, with one seed. No number is
comparable with published ones, which come from other features and other sets.
"""

import math
from typing import Any, cast

from undiffuse.evaluation._features import Features
from undiffuse.evaluation._losses import (
    RATIOS,
    Interval,
    LevelDenoiser,
    LevelReport,
    LevelResult,
    loss_by_level,
)
from undiffuse.evaluation._measures import (
    PrecisionRecall,
    frechet_distance,
    frechet_floor,
    precision_recall,
)
from undiffuse.evaluation._quality import FIGURES, Figure, Pair, SampleReport, sample_quality
from undiffuse.evaluation._split import Split

__all__ = [
    "FIGURES",
    "RATIOS",
    "SCHEMA",
    "Features",
    "Figure",
    "Interval",
    "LevelDenoiser",
    "LevelReport",
    "LevelResult",
    "Pair",
    "PrecisionRecall",
    "SampleReport",
    "Split",
    "frechet_distance",
    "frechet_floor",
    "loss_by_level",
    "precision_recall",
    "sample_quality",
    "summary",
]

SCHEMA = "undiffuse.evaluation/1"


def summary(levels: LevelReport | None, quality: SampleReport | None) -> dict[str, Any]:
    """Both reports as one dictionary for JSON; numbers that are not finite become None.

    Keys: schema, figures (list), levels (list), verdict (a word or None), reason (a sentence or
    None), loss (the sums over levels, sizes, notes), neighbours (closest pairs and sizes of the
    sets). The parts of a report that is None are empty.
    """
    loss = {} if levels is None else levels.asdict()
    sample = {} if quality is None else quality.asdict()
    body = {
        "schema": SCHEMA,
        "figures": sample.pop("figures", ()),
        "levels": loss.pop("levels", ()),
        "verdict": loss.pop("verdict", None),
        "reason": loss.pop("reason", None),
        "loss": loss,
        "neighbours": sample,
    }
    return cast(dict[str, Any], _plain(body))


def _plain(value: object) -> object:
    """Tuples become lists, and numbers that JSON lacks become None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in cast(dict[object, object], value).items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in cast(list[object], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value

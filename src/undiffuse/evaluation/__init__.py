"""Numbers about a denoiser or about a set of pictures, each beside what it should be.

`loss_by_level` measures a denoiser against exact ones on pictures it has not seen;
`sample_quality` measures generated pictures beside real ones; `summary` joins both into one
dictionary that can be written as JSON. `excess_by_level` and `excess_over` measure a denoiser
against the exact one where that is known; `compare_losses` and `compare_samples` tell which
differences between two are more than chance; `frechet_judge`, `frontier` and `fewest_evaluations`
weigh quality against network evaluations. Nothing here prints, and no file
is opened but the network that `onnx_features` is given.

Everything else that judges is fitted on the spot to the training split, with one seed. No number
of that is comparable with published ones, which come from other features and other sets.
"""

import math
from typing import Any, cast

from undiffuse.evaluation._compare_losses import (
    Contender,
    LevelDifference,
    LossDifference,
    compare_losses,
)
from undiffuse.evaluation._compare_samples import FigureDifference, compare_samples
from undiffuse.evaluation._copies import Pair
from undiffuse.evaluation._features import Features
from undiffuse.evaluation._features_onnx import onnx_features
from undiffuse.evaluation._frontier import (
    FrechetJudge,
    SamplerSetting,
    best_per_budget,
    fewest_evaluations,
    frechet_judge,
    frontier,
    paired_distance,
)
from undiffuse.evaluation._gap import GapReport, GapRow, excess_by_level, excess_over
from undiffuse.evaluation._losses import (
    RATIOS,
    LevelDenoiser,
    LevelReport,
    LevelResult,
    loss_by_level,
)
from undiffuse.evaluation._measures import (
    DensityCoverage,
    MomentErrors,
    PrecisionRecall,
    authentic_share,
    density_coverage,
    expected_coverage,
    frechet_distance,
    frechet_floor,
    frechet_infinity,
    kernel_distance,
    moment_errors,
    precision_recall,
    sliced_distance,
    spectrum_error,
    two_sample_accuracy,
)
from undiffuse.evaluation._pixels import radial_power
from undiffuse.evaluation._quality import FIGURES, SampleReport, sample_quality
from undiffuse.evaluation._quality_figure import Figure
from undiffuse.evaluation._split import Split
from undiffuse.evaluation._spread import Interval

__all__ = [
    "FIGURES",
    "RATIOS",
    "SCHEMA",
    "Contender",
    "DensityCoverage",
    "Features",
    "Figure",
    "FigureDifference",
    "FrechetJudge",
    "GapReport",
    "GapRow",
    "Interval",
    "LevelDenoiser",
    "LevelDifference",
    "LevelReport",
    "LevelResult",
    "LossDifference",
    "MomentErrors",
    "Pair",
    "PrecisionRecall",
    "SampleReport",
    "SamplerSetting",
    "Split",
    "authentic_share",
    "best_per_budget",
    "compare_losses",
    "compare_samples",
    "density_coverage",
    "excess_by_level",
    "excess_over",
    "expected_coverage",
    "fewest_evaluations",
    "frechet_distance",
    "frechet_floor",
    "frechet_infinity",
    "frechet_judge",
    "frontier",
    "kernel_distance",
    "loss_by_level",
    "moment_errors",
    "onnx_features",
    "paired_distance",
    "precision_recall",
    "radial_power",
    "sample_quality",
    "sliced_distance",
    "spectrum_error",
    "summary",
    "two_sample_accuracy",
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

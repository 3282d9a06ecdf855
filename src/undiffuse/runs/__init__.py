"""Joins the siblings below: data + training + checkpoints, model + sampler, run + evaluation.

The four-line road in Python and the command line both stand on these functions:

    model = undiffuse.fit("path/to/images", output_dir="runs/mine", resolution=64)
    pictures = undiffuse.generate(model, 16, seed=0)
"""

from undiffuse.runs._evaluate import Evaluated, EvaluateOptions, evaluate_run, sample_count
from undiffuse.runs._exchange import (
    ExportedModel,
    ImportedModel,
    check_free,
    export_model,
    format_of,
    import_model,
)
from undiffuse.runs._folder import RunFolder, check_writable, stored_config
from undiffuse.runs._generate import film, generate, labels_in_turn, parse_labels
from undiffuse.runs._load import list_models, load, missing_run
from undiffuse.runs._plan import Plan, Request, resumed_config
from undiffuse.runs._report import next_commands, write_report
from undiffuse.runs._train import (
    Doing,
    Event,
    Finished,
    Note,
    Planned,
    Progress,
    Saved,
    Stopped,
    Validated,
    fit,
    training_run,
)

__all__ = [
    "Doing",
    "EvaluateOptions",
    "Evaluated",
    "Event",
    "ExportedModel",
    "Finished",
    "ImportedModel",
    "Note",
    "Plan",
    "Planned",
    "Progress",
    "Request",
    "RunFolder",
    "Saved",
    "Stopped",
    "Validated",
    "check_free",
    "check_writable",
    "evaluate_run",
    "export_model",
    "film",
    "fit",
    "format_of",
    "generate",
    "import_model",
    "labels_in_turn",
    "list_models",
    "load",
    "missing_run",
    "next_commands",
    "parse_labels",
    "resumed_config",
    "sample_count",
    "stored_config",
    "training_run",
    "write_report",
]

"""Joins the siblings below: data + training + checkpoints, model + sampler, run + evaluation.

The four-line road in Python and the command line both stand on these functions:

    model = undiffuse.fit("path/to/images", output_dir="runs/mine", resolution=64)
    pictures = undiffuse.generate(model, 16, seed=0)

Every name is imported when it is first used (PEP 562): sampling waits for neither the pictures,
the measures, the drawings nor the other projects' formats, which are most of the package.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from undiffuse.runs._against import Comparison, compare_runs, holds_model
    from undiffuse.runs._editing import (
        Cleaned,
        denoise_pictures,
        edit,
        estimate_sigma,
        inpaint,
        interpolate,
        strength_sigma,
    )
    from undiffuse.runs._evaluate import Evaluated, EvaluateOptions, evaluate_run, sample_count
    from undiffuse.runs._exchange import (
        ExportedModel,
        ImportedModel,
        check_free,
        export_model,
        format_of,
        import_model,
    )
    from undiffuse.runs._filters import check_filters, filters, training_gaussian
    from undiffuse.runs._folder import RunFolder, check_writable, stored_config
    from undiffuse.runs._generate import (
        SamplingOptions,
        film,
        generate,
        guidance_words,
        labels_in_turn,
        parse_labels,
        sampling_options,
        usual_guidance,
    )
    from undiffuse.runs._likelihood import (
        LikelihoodOptions,
        RunLikelihood,
        Side,
        run_likelihood,
    )
    from undiffuse.runs._load import averaged, check_run, guide, list_models, load, missing_run
    from undiffuse.runs._pareto import Pareto, pareto_run
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
    "Cleaned",
    "Comparison",
    "Doing",
    "EvaluateOptions",
    "Evaluated",
    "Event",
    "ExportedModel",
    "Finished",
    "ImportedModel",
    "LikelihoodOptions",
    "Note",
    "Pareto",
    "Plan",
    "Planned",
    "Progress",
    "Request",
    "RunFolder",
    "RunLikelihood",
    "SamplingOptions",
    "Saved",
    "Side",
    "Stopped",
    "Validated",
    "averaged",
    "check_filters",
    "check_free",
    "check_run",
    "check_writable",
    "compare_runs",
    "denoise_pictures",
    "edit",
    "estimate_sigma",
    "evaluate_run",
    "export_model",
    "film",
    "filters",
    "fit",
    "format_of",
    "generate",
    "guidance_words",
    "guide",
    "holds_model",
    "import_model",
    "inpaint",
    "interpolate",
    "labels_in_turn",
    "list_models",
    "load",
    "missing_run",
    "next_commands",
    "pareto_run",
    "parse_labels",
    "resumed_config",
    "run_likelihood",
    "sample_count",
    "sampling_options",
    "stored_config",
    "strength_sigma",
    "training_gaussian",
    "training_run",
    "usual_guidance",
    "write_report",
]

_HOMES = {
    "Cleaned": "_editing",
    "Comparison": "_against",
    "Doing": "_train",
    "EvaluateOptions": "_evaluate",
    "Evaluated": "_evaluate",
    "Event": "_train",
    "ExportedModel": "_exchange",
    "Finished": "_train",
    "ImportedModel": "_exchange",
    "LikelihoodOptions": "_likelihood",
    "Note": "_train",
    "Pareto": "_pareto",
    "Plan": "_plan",
    "Planned": "_train",
    "Progress": "_train",
    "Request": "_plan",
    "RunFolder": "_folder",
    "RunLikelihood": "_likelihood",
    "Saved": "_train",
    "Side": "_likelihood",
    "Stopped": "_train",
    "Validated": "_train",
    "averaged": "_load",
    "check_filters": "_filters",
    "check_free": "_exchange",
    "check_run": "_load",
    "check_writable": "_folder",
    "compare_runs": "_against",
    "denoise_pictures": "_editing",
    "edit": "_editing",
    "estimate_sigma": "_editing",
    "evaluate_run": "_evaluate",
    "export_model": "_exchange",
    "film": "_generate",
    "filters": "_filters",
    "fit": "_train",
    "format_of": "_exchange",
    "generate": "_generate",
    "guidance_words": "_generate",
    "guide": "_load",
    "holds_model": "_against",
    "import_model": "_exchange",
    "inpaint": "_editing",
    "interpolate": "_editing",
    "labels_in_turn": "_generate",
    "list_models": "_load",
    "load": "_load",
    "missing_run": "_load",
    "next_commands": "_report",
    "pareto_run": "_pareto",
    "parse_labels": "_generate",
    "resumed_config": "_plan",
    "run_likelihood": "_likelihood",
    "sample_count": "_evaluate",
    "SamplingOptions": "_generate",
    "sampling_options": "_generate",
    "stored_config": "_folder",
    "strength_sigma": "_editing",
    "training_gaussian": "_filters",
    "usual_guidance": "_generate",
    "training_run": "_train",
    "write_report": "_report",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

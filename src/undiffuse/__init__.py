"""U-Nets that remove noise: build them, train them on a folder of pictures, generate, measure.

    import undiffuse
    model = undiffuse.fit("path/to/images", output_dir="runs/mine", resolution=64)
    pictures = undiffuse.generate(model, 16, seed=0)
    undiffuse.images.save_grid(pictures, "grid.png")

Every name below is imported when it is first used (PEP 562), so that `import undiffuse` and
`undiffuse --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from undiffuse import (
        augmentation,
        averaging,
        checkpoint,
        config,
        cost,
        denoiser,
        drawing,
        editing,
        errors,
        evaluation,
        fast,
        guidance,
        images,
        interop,
        kernels,
        likelihood,
        noise,
        oracles,
        recipes,
        report,
        runs,
        runtime,
        sampling,
        spec,
        textbook,
        training,
        unet,
    )
    from undiffuse.checkpoint import Model
    from undiffuse.denoiser import Denoiser
    from undiffuse.recipes import preset
    from undiffuse.runs import (
        denoise_pictures,
        edit,
        export_model,
        fit,
        generate,
        import_model,
        inpaint,
        interpolate,
        list_models,
        load,
    )
    from undiffuse.spec import UNetSpec
    from undiffuse.training import train
    from undiffuse.unet import UNet

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "Model",
    "UNet",
    "UNetSpec",
    "__version__",
    "augmentation",
    "averaging",
    "checkpoint",
    "config",
    "cost",
    "denoise_pictures",
    "denoiser",
    "drawing",
    "edit",
    "editing",
    "errors",
    "evaluation",
    "export_model",
    "fast",
    "fit",
    "generate",
    "guidance",
    "images",
    "import_model",
    "inpaint",
    "interop",
    "interpolate",
    "kernels",
    "likelihood",
    "list_models",
    "load",
    "noise",
    "oracles",
    "preset",
    "recipes",
    "report",
    "runs",
    "runtime",
    "sampling",
    "spec",
    "textbook",
    "train",
    "training",
    "unet",
]

# Where the names live that are not sub-modules themselves.
_HOMES = {
    "Denoiser": "denoiser",
    "Model": "checkpoint",
    "UNet": "unet",
    "UNetSpec": "spec",
    "denoise_pictures": "runs",
    "edit": "runs",
    "export_model": "runs",
    "fit": "runs",
    "generate": "runs",
    "import_model": "runs",
    "inpaint": "runs",
    "interpolate": "runs",
    "list_models": "runs",
    "load": "runs",
    "preset": "recipes",
    "train": "training",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__.copy()

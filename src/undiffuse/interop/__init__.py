"""Trained networks of other projects in and out, to the last digit."""

from undiffuse.interop._adapter import DiffusersUNet, for_diffusers
from undiffuse.interop._checked import difference_diffusers, placed, plain, write_state_dict
from undiffuse.interop._diffusers import Exported, from_diffusers, to_diffusers
from undiffuse.interop._diffusers_folder import Pipeline, read_diffusers_folder, write_diffusers
from undiffuse.interop._edm import EDMOptions, from_edm
from undiffuse.interop._files import (
    Chosen,
    Foreign,
    Limits,
    Weights,
    choose_weights,
    read_tensors,
)
from undiffuse.interop._graphs import Graph, export_onnx, export_program
from undiffuse.interop._lucidrains import from_lucidrains, to_lucidrains
from undiffuse.interop._openai import (
    PUBLISHED,
    NoiseSchedule,
    OpenAIOptions,
    from_openai,
    to_openai,
)
from undiffuse.interop._weights import Imported, mean_only
from undiffuse.interop._words import short

__all__ = [
    "PUBLISHED",
    "Chosen",
    "DiffusersUNet",
    "EDMOptions",
    "Exported",
    "Foreign",
    "Graph",
    "Imported",
    "Limits",
    "NoiseSchedule",
    "OpenAIOptions",
    "Pipeline",
    "Weights",
    "choose_weights",
    "difference_diffusers",
    "export_onnx",
    "export_program",
    "for_diffusers",
    "from_diffusers",
    "from_edm",
    "from_lucidrains",
    "from_openai",
    "mean_only",
    "placed",
    "plain",
    "read_diffusers_folder",
    "read_tensors",
    "short",
    "to_diffusers",
    "to_lucidrains",
    "to_openai",
    "write_diffusers",
    "write_state_dict",
]

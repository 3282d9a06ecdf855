"""The systems of the four texts that this project started from, under the texts' own names.

Each is a front door to the one network in `undiffuse.unet`: it has a `spec`, its bare network is
`unet`, and both run with `Denoiser(net, schedule, Epsilon())`. The texts use the same words for
different blocks (three of them have a `ResBlock`), so each has its module, `text000` ... `text003`;
here are the names that occur once.
"""

from undiffuse.textbook import text000, text001, text002, text003
from undiffuse.textbook.text000 import UNet as SimpleUNet
from undiffuse.textbook.text001 import (
    Bottleneck,
    UNet,
    count_parameters_by_component,
    ddpm_config,
    initialize_weights,
)
from undiffuse.textbook.text002 import DiffusionModel
from undiffuse.textbook.text003 import DiffusionUNet, SimpleNoisePredictor

__all__ = [
    "Bottleneck",
    "DiffusionModel",
    "DiffusionUNet",
    "SimpleNoisePredictor",
    "SimpleUNet",
    "UNet",
    "count_parameters_by_component",
    "ddpm_config",
    "initialize_weights",
    "text000",
    "text001",
    "text002",
    "text003",
]

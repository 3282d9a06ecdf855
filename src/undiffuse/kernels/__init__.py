"""Hand-written kernels for the CPU, compiled with the machine's own compiler at first use.

They know arithmetic only: no gradients are recorded, and every function says in its docstring
what the way back is made of. Importing this package looks for no compiler; `why_not()` does.
"""

from undiffuse.kernels._build import cache_folder
from undiffuse.kernels._library import describe, why_not
from undiffuse.kernels._norm import Act, Gradients, norm_act, norm_act_again, norm_act_backward
from undiffuse.kernels._optimiser import adamw_ema, squared_norm
from undiffuse.kernels._winograd import (
    channel_sum,
    winograd_input,
    winograd_input_adjoint,
    winograd_output,
    winograd_output_adjoint,
    winograd_weight,
    winograd_weight_backward,
)

__all__ = [
    "Act",
    "Gradients",
    "adamw_ema",
    "cache_folder",
    "channel_sum",
    "describe",
    "norm_act",
    "norm_act_again",
    "norm_act_backward",
    "squared_norm",
    "why_not",
    "winograd_input",
    "winograd_input_adjoint",
    "winograd_output",
    "winograd_output_adjoint",
    "winograd_weight",
    "winograd_weight_backward",
]

"""The functions of the compiled library, with the types of their arguments."""

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import lru_cache

import torch

from undiffuse.errors import ConfigError
from undiffuse.kernels._build import Missing, load

_INT, _LONG, _REAL, _AT = (c_int,), (c_int64,), (c_double,), (c_void_p,)

# As in `native.cpp`: the type's number, threads, sizes, real numbers, addresses.
SIGNATURES = {
    "norm_act": 3 * _INT + 4 * _LONG + _REAL + 8 * _AT,
    "norm_act_backward": 3 * _INT + 4 * _LONG + 15 * _AT,
    "winograd_input": 2 * _INT + 4 * _LONG + 2 * _AT,
    "winograd_input_adjoint": 2 * _INT + 4 * _LONG + 2 * _AT,
    "winograd_output": 2 * _INT + 4 * _LONG + 4 * _AT,
    "winograd_output_adjoint": 2 * _INT + 4 * _LONG + 2 * _AT,
    "winograd_weight": 3 * _INT + 2 * _LONG + 2 * _AT,
    "winograd_weight_backward": 3 * _INT + 2 * _LONG + 2 * _AT,
    "channel_sum": 2 * _INT + 2 * _LONG + 2 * _AT,
    "squared_norm": _INT + _LONG + 2 * _AT,
    "adamw_ema": _INT + _LONG + 6 * _AT + 5 * _REAL + _LONG + 2 * _REAL,
}


def why_not() -> str | None:
    """None if the kernels can be used here; otherwise the reason, in one clause.

    The first call in a process loads them, and the first call on a machine compiles them.
    """
    loaded = load()
    return loaded.reason if isinstance(loaded, Missing) else None


def describe() -> str:
    """The compiler and the width of the vector instructions, or why there are no kernels."""
    loaded = load()
    if isinstance(loaded, Missing):
        return f"not available: {loaded.reason}"
    return f"{loaded.compiler}, {loaded.handle.undiffuse_vector_floats()} floats per vector"


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library, ready to be called.

    Raises:
        ConfigError: there is none on this machine.
    """
    loaded = load()
    if isinstance(loaded, Missing):
        raise ConfigError(f"kernels are not available here: {loaded.reason}; ask why_not() first")
    for name, types in SIGNATURES.items():
        function = getattr(loaded.handle, f"undiffuse_{name}")
        function.argtypes, function.restype = types, None
    loaded.handle.undiffuse_squared_norm.restype = c_double
    return loaded.handle


def threads() -> int:
    """As many as torch itself uses: another number would make OpenMP stop and start threads."""
    return torch.get_num_threads()

"""What every kernel asks of its arguments: a wrong address would not raise, it would crash."""

from collections.abc import Sequence

import torch
from torch import Tensor

from undiffuse.errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16)
LAST = torch.channels_last


def features(name: str, x: Tensor) -> None:
    """(b, c, h, w) in channels_last memory format, bfloat16 or float32, on the CPU."""
    on_cpu(name, x)
    typed(name, x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ConfigError(f"{name} must have shape (b, c, h, w), none of c, h, w zero; {_got(x)}")
    if not x.is_contiguous(memory_format=LAST):
        raise ConfigError(
            f"{name} must be in channels_last memory format; got strides {x.stride()}: "
            "call .contiguous(memory_format=torch.channels_last)"
        )


def alike(name: str, x: Tensor, other: Tensor) -> None:
    """`x` may be read wherever `other` is."""
    features(name, x)
    if x.shape != other.shape or x.dtype != other.dtype:
        raise ConfigError(f"{name} must be {other.dtype} {tuple(other.shape)}; {_got(x)}")


def dense(name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Contiguous, of that shape and type, on the CPU."""
    on_cpu(name, x)
    if x.shape != torch.Size(shape) or x.dtype != dtype or not x.is_contiguous():
        raise ConfigError(f"{name} must be contiguous {dtype} {tuple(shape)}; {_got(x)}")


def typed(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ConfigError(f"{name} must be float32 or bfloat16; got {x.dtype}")


def on_cpu(name: str, x: Tensor) -> None:
    if not x.is_cpu or x.layout != torch.strided:
        raise ConfigError(f"{name} must be a dense tensor on the CPU; got {x.device}, {x.layout}")


def is_bf16(x: Tensor) -> int:
    """How the library is told the type."""
    return int(x.dtype == torch.bfloat16)


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _got(x: Tensor) -> str:
    return f"got {x.dtype} {tuple(x.shape)} with strides {x.stride()}"

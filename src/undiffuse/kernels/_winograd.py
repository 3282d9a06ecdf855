"""The linear maps around the matrix products of a 3x3 convolution, F(2x2, 3x3).

A convolution with padding 1 is

    y = winograd_output(torch.bmm(winograd_input(x), winograd_weight(w).transpose(1, 2)), y.shape)

(Lavin and Gray, 1509.09308): 16 multiplications per 2x2 tile of the output and pair of channels
instead of 36. Rounding errors in bfloat16 are a few times those of a direct convolution, because
V and M are rounded between the steps.
"""

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.kernels import _arguments as check
from undiffuse.kernels._arguments import address, is_bf16
from undiffuse.kernels._library import library, threads


def tiles(b: int, h: int, w: int) -> int:
    """2x2 tiles of b pictures; those of odd sizes stick out."""
    return b * ((h + 1) // 2) * ((w + 1) // 2)


def winograd_weight(w: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """U = G g G^T of every filter: (16, d, c) of `dtype` from w (d, c, 3, 3) float32.

    Raises:
        ConfigError: w is neither contiguous nor channels_last, or of another shape or type.
    """
    _check_filters("w", w)
    if dtype not in check.DTYPES:
        raise ConfigError(f"dtype must be float32 or bfloat16; got {dtype}")
    d, c = w.shape[:2]
    u = w.new_empty((16, d, c), dtype=dtype)
    library().undiffuse_winograd_weight(
        is_bf16(u), threads(), not w.is_contiguous(), d, c, w.data_ptr(), u.data_ptr()
    )
    return u


def winograd_weight_backward(du: Tensor, like: Tensor) -> Tensor:
    """The transpose of `winograd_weight`: dw float32, shaped and laid out as `like`.

    Args:
        du: (16, d, c), bfloat16 or float32.
        like: (d, c, 3, 3) float32: the weights.

    Raises:
        ConfigError: an argument has another shape, type, device or memory format.
    """
    _check_filters("like", like)
    check.typed("du", du)
    d, c = like.shape[:2]
    check.dense("du", du, (16, d, c), du.dtype)
    dw = torch.empty_like(like)
    library().undiffuse_winograd_weight_backward(
        is_bf16(du), threads(), not dw.is_contiguous(), d, c, du.data_ptr(), dw.data_ptr()
    )
    return dw


def winograd_input(x: Tensor, out: Tensor | None = None) -> Tensor:
    """V = B^T d B of every 4x4 window d of x, padded with zeros: (16, tiles, c).

    Args:
        x: (b, c, h, w), channels_last, bfloat16 or float32, any h and w.
        out: where V is written; fresh memory costs as much time as the map itself.

    Raises:
        ConfigError: an argument has another shape, type, device or memory format.
    """
    check.features("x", x)
    b, c, h, w = x.shape
    v = _into("out", out, (16, tiles(b, h, w), c), x.dtype)
    library().undiffuse_winograd_input(
        is_bf16(x), threads(), b, h, w, c, x.data_ptr(), v.data_ptr()
    )
    return v


def winograd_input_adjoint(
    dv: Tensor, shape: tuple[int, int, int, int], out: Tensor | None = None
) -> Tensor:
    """The transpose of `winograd_input`: dx of `shape` (b, c, h, w), channels_last.

    Raises:
        ConfigError: dv is not contiguous (16, tiles, c), bfloat16 or float32.
    """
    b, c, h, w = _checked_shape(shape)
    check.typed("dv", dv)
    check.dense("dv", dv, (16, tiles(b, h, w), c), dv.dtype)
    dx = _features(shape, dv.dtype) if out is None else out
    check.features("out", dx)
    if tuple(dx.shape) != (b, c, h, w) or dx.dtype != dv.dtype:
        raise ConfigError(f"out must be {dv.dtype} {shape}; got {dx.dtype} {tuple(dx.shape)}")
    library().undiffuse_winograd_input_adjoint(
        is_bf16(dv), threads(), b, h, w, c, dv.data_ptr(), dx.data_ptr()
    )
    return dx


def winograd_output(
    m: Tensor,
    shape: tuple[int, int, int, int],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = A^T M A + bias + residual: features of `shape` (b, d, h, w), channels_last.

    Args:
        m: (16, tiles, d), bfloat16 or float32.
        bias: (d) float32.
        residual: like y.
        out: where y is written; it may be `residual` itself.

    Raises:
        ConfigError: an argument has another shape, type, device or memory format.
    """
    b, d, h, w = _checked_shape(shape)
    check.typed("m", m)
    check.dense("m", m, (16, tiles(b, h, w), d), m.dtype)
    y = _features(shape, m.dtype) if out is None else out
    check.features("out", y)
    if tuple(y.shape) != (b, d, h, w) or y.dtype != m.dtype:
        raise ConfigError(f"out must be {m.dtype} {shape}; got {y.dtype} {tuple(y.shape)}")
    if bias is not None:
        check.dense("bias", bias, (d,), torch.float32)
    if residual is not None:
        check.alike("residual", residual, y)
    library().undiffuse_winograd_output(
        is_bf16(m), threads(), b, h, w, d,
        m.data_ptr(), address(bias), address(residual), y.data_ptr(),
    )  # fmt: skip
    return y


def winograd_output_adjoint(dy: Tensor, out: Tensor | None = None) -> Tensor:
    """The transpose of `winograd_output` without bias and residual: dM (16, tiles, d).

    Raises:
        ConfigError: an argument has another shape, type, device or memory format.
    """
    check.features("dy", dy)
    b, d, h, w = dy.shape
    dm = _into("out", out, (16, tiles(b, h, w), d), dy.dtype)
    library().undiffuse_winograd_output_adjoint(
        is_bf16(dy), threads(), b, h, w, d, dy.data_ptr(), dm.data_ptr()
    )
    return dm


def channel_sum(dy: Tensor) -> Tensor:
    """The gradient of a convolution's bias: the sum over all but the channels, (c) float32.

    Raises:
        ConfigError: dy has another shape, type, device or memory format.
    """
    check.features("dy", dy)
    b, c, h, w = dy.shape
    total = torch.empty(c, dtype=torch.float32, device="cpu")
    library().undiffuse_channel_sum(
        is_bf16(dy), threads(), b * h * w, c, dy.data_ptr(), total.data_ptr()
    )
    return total


def _into(name: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    check.dense(name, out, shape, dtype)
    return out


def _features(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=check.LAST)


def _checked_shape(shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    if len(shape) != 4 or min(shape[1:]) < 1 or shape[0] < 0:
        raise ConfigError(f"shape must be (b, c, h, w), none of c, h, w zero; got {tuple(shape)}")
    b, c, h, w = shape
    return b, c, h, w


def _check_filters(name: str, w: Tensor) -> None:
    check.on_cpu(name, w)
    if w.dim() != 4 or w.shape[2:] != (3, 3) or w.dtype != torch.float32:
        raise ConfigError(f"{name} must be float32 (d, c, 3, 3); got {w.dtype} {tuple(w.shape)}")
    if not (w.is_contiguous() or w.is_contiguous(memory_format=check.LAST)):
        raise ConfigError(f"{name} must be contiguous or channels_last; got strides {w.stride()}")

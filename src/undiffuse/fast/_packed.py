"""Weights as inference wants them: rounded, repacked, and kept until a parameter changes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from undiffuse.fast._convolution import ALL, Shape, Source, Winograd, kind_of

# What torch's own compiler calls on processors; there are no public names.
_library = torch.ops.mkldnn
_reorder = torch.ops.aten.mkldnn_reorder_conv2d_weight


def _packs(x: Tensor) -> bool:
    """Whether oneDNN computes with weights in its own order on this machine."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype is torch.float32 or bool(_library._is_mkldnn_bf16_supported())


class Packed:
    """The packed weights of one network's convolutions."""

    def __init__(self, dtype: torch.dtype, winograd: Winograd | None) -> None:
        self.dtype, self.winograd = dtype, winograd
        self._kept: dict[tuple[int, str], tuple[Tensor, Tensor, int, Tensor]] = {}

    def conv(
        self, conv: nn.Conv2d, source: Source, shape: Shape, residual: Tensor | None = None
    ) -> Tensor:
        """conv(x) + residual, without gradients, x of `shape` from `source`."""
        kind = kind_of(conv, self.winograd)
        if isinstance(kind, Winograd):
            u = self.kept(conv.weight, "winograd", lambda w: kind.prepared(w, self.dtype))
            return kind.forward(source, shape, u, conv.bias, residual)
        x = source(ALL)
        if _packs(x):
            return self._by_library(conv, x, residual)
        return self._plainly(conv, x, residual)

    def kept(self, of: Tensor, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """make(of), made again when `of` was changed, moved or replaced.

        Changes are seen by torch's own count of them, which writing through `.data` passes by.
        """
        now = 0 if of.is_inference() else of._version
        parameter, data, then, value = self._kept.get((id(of), name), (None, None, -1, None))
        moved = data is None or data.data_ptr() != of.data_ptr()
        if value is None or parameter is not of or moved or then != now:
            with torch.inference_mode(False):
                data = of.detach()  # kept, so that its address is not given to another
                value = make(data)
            self._kept[id(of), name] = of, data, now, value
        return value

    def _by_library(self, conv: nn.Conv2d, x: Tensor, residual: Tensor | None) -> Tensor:
        """oneDNN on weights in its own order, with the sum in the same pass over the output."""
        where = (conv.padding, conv.stride, conv.dilation, conv.groups)
        shape = list(x.shape)
        w = self.kept(
            conv.weight,
            "library",
            lambda w: _reorder(w.to(self.dtype).to_mkldnn(), *where, shape),
        )
        bias = None
        if conv.bias is not None:
            bias = self.kept(conv.bias, "bias", lambda b: b.to(self.dtype))
        if residual is None:
            return _library._convolution_pointwise(x, w, bias, *where, "none", [], "")
        return _library._convolution_pointwise.binary(
            x, residual, w, bias, *where, "add", 1.0, None, [], None
        )

    def _plainly(self, conv: nn.Conv2d, x: Tensor, residual: Tensor | None) -> Tensor:
        w = self.kept(conv.weight, "rounded", lambda w: w.to(self.dtype))
        bias = None if conv.bias is None else conv.bias.to(self.dtype)
        y = torch.conv2d(x, w, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y if residual is None else y.add_(residual)

"""The floor: what a forward pass costs if nothing but its products and unavoidable traffic did.

Every convolution, linear layer and attention product of one forward pass of the plain network is
recorded and run alone, in bfloat16 and channels last; the medians are added. To this comes what
must move through memory in any case: a norm reads and writes its features once, in training five
times with its gradients, and AdamW reads and writes 28 bytes per parameter.

The floor is what the library delivers layer by layer, not physics: a better convolution beats it.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.harness import Bench, Clock, seconds_of
from benchmarks.roofline import bandwidth
from undiffuse.unet import UNet

REPEATS = 5
BYTES = 2  # of a bfloat16 number
NORM_PASSES = {False: 2, True: 5}  # read, write; in training also input, gradient in, gradient out
ADAMW_BYTES = 28  # per parameter: weight, gradient and two moments read, all but one written


class Kind(StrEnum):
    CONV = "convolution"
    TRANSPOSED = "transposed convolution"
    LINEAR = "linear"
    ATTENTION = "attention"
    MATMUL = "matrix product"


_KINDS: dict[Callable[..., Any], Kind] = {
    torch.conv2d: Kind.CONV,
    torch.conv_transpose2d: Kind.TRANSPOSED,
    F.linear: Kind.LINEAR,
    F.scaled_dot_product_attention: Kind.ATTENTION,
    Tensor.matmul: Kind.MATMUL,  # also what `@` calls
}
_NORMS = (torch.group_norm, F.normalize)


class Shape(tuple[int, ...]):
    """Stands for a tensor among the arguments."""


@dataclass(frozen=True)
class Product:
    """One call: what, and its arguments, each tensor by its shape."""

    kind: Kind
    arguments: tuple[Any, ...]

    def multiply_adds(self) -> int:
        first, second = self.arguments[:2]
        match self.kind:
            case Kind.CONV:
                shapes = self(*self.operands(torch.device("meta"))).shape
                return math.prod(shapes) * math.prod(second[1:])
            case Kind.TRANSPOSED:
                return math.prod(first) * math.prod(second[1:])
            case Kind.LINEAR:
                return math.prod(first) * second[0]
            case Kind.ATTENTION:
                return 2 * math.prod(first) * second[-2]
            case Kind.MATMUL:
                return math.prod(first) * second[-1]

    def operands(self, device: torch.device) -> list[Tensor]:
        """Random tensors of the recorded shapes, bfloat16, pictures and kernels channels last."""
        return [self._operand(one, device) for one in self.arguments if isinstance(one, Shape)]

    def _operand(self, shape: Shape, device: torch.device) -> Tensor:
        made = torch.randn(*shape, device=device).bfloat16()
        pictures = len(shape) == 4 and self.kind in (Kind.CONV, Kind.TRANSPOSED)
        return made.contiguous(memory_format=torch.channels_last) if pictures else made

    def __call__(self, *operands: Tensor) -> Tensor:
        given = iter(operands)
        arguments = [next(given) if isinstance(one, Shape) else one for one in self.arguments]
        return _CALLS[self.kind](*arguments)


_CALLS: dict[Kind, Callable[..., Tensor]] = {
    Kind.CONV: torch.conv2d,
    Kind.TRANSPOSED: torch.conv_transpose2d,
    Kind.LINEAR: F.linear,
    Kind.ATTENTION: F.scaled_dot_product_attention,
    Kind.MATMUL: torch.matmul,
}


@dataclass
class Recorded:
    """Products with how often each occurs, and numbers that go through norms."""

    products: Counter[Product] = field(default_factory=Counter[Product])
    normed: int = 0

    def multiply_adds(self) -> int:
        return sum(count * one.multiply_adds() for one, count in self.products.items())

    def traffic(self, training: bool, parameters: int) -> int:
        """Bytes that must move besides those of the products."""
        optimiser = ADAMW_BYTES * parameters if training else 0
        return NORM_PASSES[training] * BYTES * self.normed + optimiser


class _Recorder(TorchFunctionMode):
    """Sees every call into torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Recorded()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _KINDS:
            self.found.products[Product(_KINDS[func], tuple(map(_described, args)))] += 1
        if func in _NORMS:
            self.found.normed += args[0].numel()
        return func(*args, **(kwargs or {}))


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Shape(argument.shape)
    return tuple(argument) if isinstance(argument, list) else argument


@torch.no_grad()
def record(net: UNet, x: Tensor, timestep: Tensor) -> Recorded:
    """Everything that one forward pass multiplies."""
    with _Recorder() as recorder:
        net(x, timestep)
    return recorder.found


@dataclass(frozen=True)
class Floor:
    """Seconds of one pass: products run alone, and traffic at the speed of a copy."""

    products: float
    traffic: float

    @property
    def seconds(self) -> float:
        return self.products + self.traffic


def measure(bench: Bench, recorded: Recorded, training: bool, parameters: int) -> Floor:
    """Run every distinct product alone and add up."""
    alone = _trained if training else _forward
    seconds = sum(
        count * _median(alone(one, bench.device), bench.clock)
        for one, count in recorded.products.items()
    )
    return Floor(seconds, recorded.traffic(training, parameters) / bandwidth(bench))


def _median(call: Callable[[], object], clock: Clock) -> float:
    seconds_of(call, 2, clock)
    return statistics.median(seconds_of(call, 1, clock) for _ in range(REPEATS))


def _forward(product: Product, device: torch.device) -> Callable[[], object]:
    operands = product.operands(device)
    return torch.no_grad()(lambda: product(*operands))


def _trained(product: Product, device: torch.device) -> Callable[[], object]:
    """Forward, and the gradients of everything that came in."""
    operands = [one.requires_grad_() for one in product.operands(device)]
    slope = torch.ones_like(product(*operands))
    return lambda: torch.autograd.grad(product(*operands), operands, slope)


def details(floors: Sequence[Floor], ours: Sequence[float]) -> dict[str, float]:
    """The parts of the floor, and the share of the products alone, without any traffic."""
    products, traffic = (
        statistics.median(values)
        for values in zip(*((one.products, one.traffic) for one in floors), strict=True)
    )
    share = products / statistics.median(ours)
    return {"products_s": products, "traffic_s": traffic, "of_products_alone": share}

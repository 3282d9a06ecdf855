"""One network's weights under two sets of names.

A `Rule` ties one of our tensors to those of a peer that hold the same numbers, in both directions.
Nothing is computed, only moved: what is read and written again is the same to the bit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser, Prediction
from undiffuse.errors import CheckpointError
from undiffuse.interop._words import short
from undiffuse.noise import Schedule
from undiffuse.spec import UNetSpec
from undiffuse.unet import UNet, frequencies_of

Tensors = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """`read` makes ours of theirs, in the order of `theirs`; `write` is its inverse."""

    ours: str
    theirs: tuple[str, ...]
    read: Callable[[Sequence[Tensor]], Tensor]
    write: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Imported:
    """A peer's network in our words: its program, its weights, and what they mean.

    Args:
        weights: under our names, complete, in the precision of the file.
        origin: what the network was, for messages: "diffusers UNet2DModel".
        size: height and width of the pictures, where the file says.
        notes: one line for each thing that was left out or had to be assumed.
    """

    spec: UNetSpec
    weights: Tensors
    schedule: Schedule
    prediction: Prediction
    origin: str
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    def net(self) -> UNet:
        """The network, in evaluation mode, in the precision of its weights."""
        with torch.device("meta"):
            net = UNet(self.spec)
        net.load_state_dict(dict(self.weights), assign=True)
        if net.embedding is not None:
            net.embedding.frequencies = frequencies_of(self.spec.style.embedding)
        return net.eval()

    def denoiser(self) -> Denoiser:
        """The network with its meaning; a learned variance is left out (`mean_only`)."""
        mean = mean_only(self)
        return Denoiser(mean.net(), mean.schedule, mean.prediction)


def mean_only(imported: Imported) -> Imported:
    """Without the channels that predict a variance (2102.09672, section 3.1).

    Such networks have twice as many channels out as in; the first half is the prediction.
    """
    spec = imported.spec
    if spec.out_channels != 2 * spec.in_channels:
        return imported
    last = f"layers.{list(net_shapes(spec))[-1].split('.')[1]}."
    keep = spec.in_channels
    weights = {
        name: tensor[:keep].clone() if name.startswith(last + "conv.") else tensor
        for name, tensor in imported.weights.items()
    }
    note = "the learned variance (the last half of the output channels) is left out"
    return replace(
        imported,
        spec=replace(spec, out_channels=keep),
        weights=weights,
        notes=(*imported.notes, note),
    )


# --- rules --------------------------------------------------------------------------------------


def same(ours: str, theirs: str) -> Rule:
    """One tensor, one tensor."""
    return Rule(ours, (theirs,), lambda ts: ts[0], lambda t: (t,))


def squeezed(ours: str, theirs: str, ones: int) -> Rule:
    """Theirs lacks our last `ones` dimensions of size 1: a Linear (2) or Conv1d (1) of theirs is
    a 1x1 Conv2d of ours."""
    return Rule(
        ours,
        (theirs,),
        lambda ts: ts[0].reshape(*ts[0].shape, *(1,) * ones),
        lambda t: (t.reshape(t.shape[: t.ndim - ones]),),
    )


def layer(ours: str, theirs: str, bias: bool = True) -> tuple[Rule, ...]:
    """`weight` and, unless it has none, `bias` of a layer that both sides build alike."""
    names = ("weight", "bias") if bias else ("weight",)
    return tuple(same(f"{ours}.{name}", f"{theirs}.{name}") for name in names)


def layer_1x1(ours: str, theirs: str, ones: int, bias: bool = True) -> tuple[Rule, ...]:
    """A 1x1 convolution of ours that is a Linear (`ones` 2) or a Conv1d (1) of theirs."""
    weight = squeezed(f"{ours}.weight", f"{theirs}.weight", ones)
    return (weight, same(f"{ours}.bias", f"{theirs}.bias")) if bias else (weight,)


def then(rule: Rule, read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> Rule:
    """The rule, with a rearrangement on our side and its inverse."""
    return Rule(
        rule.ours,
        rule.theirs,
        lambda ts: read(rule.read(ts)),
        lambda t: rule.write(write(t)),
    )


def stacked(ours: str, theirs: tuple[str, str, str], ones: int) -> Rule:
    """Query, key and value apart on their side, one tensor of rows on ours."""
    return Rule(
        ours,
        theirs,
        lambda ts: torch.cat(list(ts)).reshape(-1, *ts[0].shape[1:], *(1,) * ones),
        lambda t: t.reshape(t.shape[: t.ndim - ones]).chunk(3),
    )


def rows_by_head(rule: Rule, heads: int) -> Rule:
    """Their rows are (head)(query, key, value)(channel); ours begin with (query, key, value)."""
    return then(
        rule,
        lambda t: _swapped(t, (heads, 3, -1), (1, 0, 2)),
        lambda t: _swapped(t, (3, heads, -1), (1, 0, 2)),
    )


def rows_interleaved(rule: Rule, heads: int) -> Rule:
    """Their rows are (head)(channel)(query, key, value)."""
    return then(
        rule,
        lambda t: _swapped(t, (heads, -1, 3), (2, 0, 1)),
        lambda t: _swapped(t, (3, heads, -1), (1, 2, 0)),
    )


def _swapped(t: Tensor, split: tuple[int, int, int], order: tuple[int, int, int]) -> Tensor:
    """Split the rows in three, reorder the three, and join them again."""
    rest = t.shape[1:]
    return t.reshape(*split, *rest).permute(*order, *range(3, 3 + len(rest))).reshape(t.shape)


# --- both directions ----------------------------------------------------------------------------


def read_weights(
    spec: UNetSpec, rules: Sequence[Rule], theirs: Tensors, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """A peer's tensors under our names.

    Args:
        ignored: names of theirs that hold no weights.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is known to no rule.
    """
    unknown = set(theirs) - set(ignored)
    shapes, ours = net_shapes(spec), dict[str, Tensor]()
    for rule in rules:
        missing = [name for name in rule.theirs if name not in theirs]
        if missing:
            raise CheckpointError(
                f"{short(missing[0])} is missing: the file does not hold this network"
            )
        unknown -= set(rule.theirs)
        ours[rule.ours] = _fitting(rule, [theirs[name] for name in rule.theirs], shapes)
    if unknown:
        raise CheckpointError(
            f"{short(min(unknown))} is in the file, but this network has no such weight"
            f" ({len(unknown)} such in all)"
        )
    assert set(ours) == set(shapes), set(ours) ^ set(shapes)
    return ours


def _fitting(rule: Rule, theirs: list[Tensor], shapes: Mapping[str, Shape]) -> Tensor:
    wanted = rule.write(torch.empty(shapes[rule.ours], device="meta"))
    for name, have, want in zip(rule.theirs, theirs, wanted, strict=True):
        if have.shape != want.shape or not have.is_floating_point():
            raise CheckpointError(
                f"{name} is {have.dtype} {list(have.shape)} in the file,"
                f" {list(want.shape)} in this network"
            )
    return rule.read(theirs).contiguous()


def write_weights(rules: Sequence[Rule], ours: Tensors) -> dict[str, Tensor]:
    """Our weights under a peer's names: the inverse of `read_weights`."""
    theirs = dict[str, Tensor]()
    for rule in rules:
        parts = rule.write(ours[rule.ours])
        theirs |= {n: t.contiguous() for n, t in zip(rule.theirs, parts, strict=True)}
    return theirs


@lru_cache(maxsize=8)
def net_shapes(spec: UNetSpec) -> Mapping[str, Shape]:
    """Shapes of our network's weights, by name, in order; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in UNet(spec).state_dict().items()}

"""Pictures with their classes, and the checks that every measure starts with."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.errors import DataError
from undiffuse.noise import Stream, keyed

_DRAWS = 1 << 40  # positions of subset draws; those below number pictures, whose noise is keyed


@dataclass(frozen=True)
class Split:
    """Pictures in [-1, 1] and, where there are classes, one class number per picture.

    Raises:
        DataError: the pictures are not (n, c, h, w), or labels and pictures differ in number.
    """

    x0: Float[Tensor, "n c h w"]
    label: Int[Tensor, "labels"] | None = None

    def __post_init__(self) -> None:
        if self.x0.ndim != 4:
            raise DataError(f"pictures must be (n, c, h, w); got shape {tuple(self.x0.shape)}")
        if self.label is not None and self.label.shape != self.x0.shape[:1]:
            raise DataError(
                f"{len(self.x0)} pictures need as many labels; got {tuple(self.label.shape)}"
            )

    def __len__(self) -> int:
        return len(self.x0)

    def at(self, index: Tensor | slice) -> "Split":
        """The pictures at these places, with their labels."""
        return Split(self.x0[index], None if self.label is None else self.label[index])

    def on_cpu(self) -> "Split":
        """A float32 copy in ordinary memory, where everything but the network is computed."""
        label = None if self.label is None else self.label.detach().cpu().long()
        return Split(self.x0.detach().cpu().float(), label)

    def classes(self) -> list[int]:
        """The classes that occur, in rising order; empty without labels."""
        return [] if self.label is None else [int(c) for c in self.label.unique()]


def check_same_shape(split: Split, other: Split, name: str) -> None:
    """Raise DataError unless the pictures of both have the same channels, height and width."""
    if len(split) and len(other) and split.x0.shape[1:] != other.x0.shape[1:]:
        raise DataError(
            f"{name} must have the shape of the training pictures"
            f" {tuple(other.x0.shape[1:])}; got {tuple(split.x0.shape[1:])}"
        )


@dataclass(frozen=True)
class Sets:
    """The three sets of one comparison, in memory and clipped to [-1, 1], and the seed of draws."""

    samples: Split
    train: Split
    held_out: Split
    seed: int

    def at_most(self, limit: int) -> "Sets":
        """The same with at most so many real pictures on either side."""
        train, held_out = (at_most(part, limit, self.seed, tag=4) for part in self.real)
        return Sets(self.samples, train, held_out, self.seed)

    @property
    def real(self) -> tuple[Split, Split]:
        """Training and held-out pictures."""
        return self.train, self.held_out


def shuffled(count: int, seed: int, tag: int) -> Tensor:
    """A permutation of 0 … count - 1 that depends on (seed, tag) alone."""
    return torch.from_numpy(keyed(seed, Stream.EVALUATE, _DRAWS + tag).permutation(count))


def at_most(split: Split, limit: int, seed: int, tag: int) -> Split:
    """All pictures in their order, or a random `limit` of them."""
    return split if len(split) <= limit else split.at(shuffled(len(split), seed, tag)[:limit])

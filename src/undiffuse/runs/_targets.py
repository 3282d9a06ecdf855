"""Training targets from which chance is taken out as far as the training set allows."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from undiffuse import images
from undiffuse.errors import ConfigError
from undiffuse.noise import NoiseLevel
from undiffuse.oracles import FiniteSet
from undiffuse.training import Batch

MOST_VALUES = 1 << 24  # of all pictures together: every noised picture is compared with each


@dataclass(frozen=True, eq=False)
class StableTargets:
    """Aim at E[x0 | x] over the training set, not at the one picture that x was made from.

    Given x both have the same mean, so the same network has the least loss; but the gradient no
    longer depends on which of the pictures that x could be made from it was (2302.00670, with the
    whole set as reference batch). At high noise that is most of its scatter. A picture that was
    transformed, which the network is told, keeps its own target.

    Args:
        pictures: the training set, with classes where labels are given.
        null: the label that means "no class".
    """

    pictures: FiniteSet
    null: int

    def __call__(self, batch: Batch) -> Batch:
        """The same x, made of another x0 and the noise that belongs to it."""
        x = batch.level.mix(batch.x0, batch.noise)
        aim = batch.x0.clone()
        for rows, label in self._groups(batch):
            level = NoiseLevel(*(v[rows] for v in batch.level))
            aim[rows] = self.pictures(x[rows], level, label)
        return replace(batch, x0=aim, noise=batch.level.noise_in(x, aim))

    def _groups(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Places of the pictures that were not transformed, with class and without."""
        as_it_was = torch.ones(len(batch.x0), dtype=torch.bool)
        if batch.augment is not None:
            as_it_was = ~batch.augment.any(1)
        classless = as_it_was if batch.label is None else as_it_was & (batch.label == self.null)
        if bool(classless.any()):
            yield classless.nonzero().flatten(), None
        known = as_it_was & ~classless
        if batch.label is not None and bool(known.any()):
            yield known.nonzero().flatten(), batch.label[known]


def stable_targets(data: images.Dataset, classes: int) -> StableTargets:
    """For all pictures that `data.batch` can give.

    Raises:
        ConfigError: these are too many to be compared with each.
    """
    if data.pixels.shape[2:] != data.size:
        raise ConfigError(
            "stable_targets needs pictures that are not cropped at random, since every crop would"
            " be a picture of its own; leave one of the two out"
        )
    values = data.pixels.size * (2 if data.flip else 1)
    if values > MOST_VALUES:
        raise ConfigError(
            f"stable_targets compares with all training pictures: {values:,} values are more than"
            f" {MOST_VALUES:,}; leave it out"
        )
    x0, label = data.fixed()
    if data.flip:
        x0 = torch.cat((x0, x0.flip(3)))
        label = None if label is None else torch.cat((label, label))
    return StableTargets(FiniteSet(x0, label if classes else None), classes)

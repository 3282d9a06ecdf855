"""Stable targets: the same x, the training set's own mean as target, the same minimum."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from undiffuse import images, runs
from undiffuse.config import TrainConfig
from undiffuse.denoiser import Denoiser, KarrasPrecond, LogUniform
from undiffuse.errors import ConfigError
from undiffuse.noise import Karras
from undiffuse.oracles import FiniteSet
from undiffuse.runs._targets import MOST_VALUES, StableTargets, stable_targets
from undiffuse.training import Batch, Recipe, make_batch

SET = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (12, 1, 2, 3))).float()
CLASSES = torch.arange(12) % 3
CONFIG = TrainConfig(train_batch_size=8, label_dropout=0.5)


def source(positions: range) -> tuple[Tensor, Tensor]:
    places = torch.tensor([p % 12 for p in positions])
    return SET[places], CLASSES[places]


def batches(count: int = 400) -> tuple[Batch, Batch]:
    """The same positions with plain targets and with stable ones."""
    recipe = Recipe(Karras(), LogUniform(0.02, 20.0), classes=3)
    plain = make_batch(source, recipe, CONFIG, range(count))
    return plain, StableTargets(FiniteSet(SET, CLASSES), 3)(plain)


def test_the_noised_pictures_are_the_same() -> None:
    plain, stable = batches()
    x = plain.level.mix(plain.x0, plain.noise)
    again = stable.level.mix(stable.x0, stable.noise)
    assert ((x - again).abs() <= 1e-5 * (1 + x.abs())).all()


def test_the_target_is_the_mean_of_what_the_picture_may_have_been() -> None:
    """By brute force, picture by picture, with the class where it is known."""
    plain, stable = batches(40)
    assert plain.label is not None
    x = plain.level.mix(plain.x0, plain.noise).double()
    for i, label in enumerate(plain.label.tolist()):
        among = SET.double() if label == 3 else SET[label == CLASSES].double()
        sigma = plain.level.sigma[i].double()
        weight = torch.softmax(
            -(x[i] - among).square().sum((1, 2, 3)) / (2 * sigma**2).squeeze(), 0
        )
        expected = (weight[:, None, None, None] * among).sum(0)
        assert torch.allclose(stable.x0[i].double(), expected, atol=1e-4)


def test_the_best_denoiser_stays_the_best_and_reaches_zero() -> None:
    """Against plain targets it keeps the training set's least error; against these, none."""
    oracle = FiniteSet(SET, CLASSES)
    prediction = KarrasPrecond(0.5)
    plain, stable = batches()
    assert plain.label is not None
    known = plain.label < 3

    def excess(batch: Batch) -> float:
        x = batch.level.mix(batch.x0, batch.noise)
        k = prediction(batch.level)
        best = oracle(
            x[known], type(batch.level)(*(v[known] for v in batch.level)), batch.label[known]
        )  # pyright: ignore[reportOptionalSubscript]
        error = (best - batch.x0[known]) / k.c_out[known]
        return float(error.square().mean())

    assert excess(stable) < 1e-6
    assert excess(plain) > 0.1


def test_both_targets_have_the_same_gradient_on_average() -> None:
    """Of a linear net: the difference shrinks as 1 / sqrt(n) while each stays what it is."""
    weight = torch.zeros(6, 6, requires_grad=True)
    denoiser = Denoiser(
        lambda x, t, label: (x.flatten(1) @ weight).view_as(x), Karras(), KarrasPrecond()
    )
    gradients: list[Tensor] = []
    for batch in batches(20_000):
        denoiser.loss(batch.x0, batch.noise, batch.level, batch.label).mean().backward()
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
        weight.grad = None
    plain, stable = gradients
    assert (plain - stable).norm() < 0.1 * plain.norm()


def test_transformed_pictures_keep_their_own_target() -> None:
    plain, _ = batches(4)
    told = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
    batch = Batch(plain.x0, plain.noise, plain.level, plain.label, told)
    stable = StableTargets(FiniteSet(SET, CLASSES), 3)(batch)
    moved = told.any(1)
    assert torch.equal(stable.x0[moved], plain.x0[moved])
    assert not torch.equal(stable.x0[~moved], plain.x0[~moved])


def test_a_mirrored_set_counts_both_ways() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (5, 1, 4, 4), dtype=np.uint8)
    one = stable_targets(images.load(pixels).train, 0).pictures.x0
    flipped = images.load(pixels, images.DataOptions(random_flip=True))
    both = stable_targets(flipped.train, 0).pictures.x0
    assert torch.equal(both[: len(one)], one)
    assert torch.equal(both[len(one) :], one.flip(3))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="stable_targets needs pictures that are not cropped"):
        runs.fit("photos", resolution=16, max_train_steps=1, stable_targets=True)
    side = int((MOST_VALUES / 4) ** 0.5) + 64
    large = images.load(np.zeros((5, 1, side, side), dtype=np.uint8))
    with pytest.raises(ConfigError, match=r"stable_targets compares .* leave it out"):
        stable_targets(large.train, 0)


def test_training_with_them_runs_and_is_recorded(tmp_path: Path) -> None:
    model = runs.fit(
        "digits",
        output_dir=tmp_path / "run",
        max_train_steps=2,
        train_batch_size=8,
        num_samples=1,
        stable_targets=True,
    )
    assert model.trained["steps"] == 2
    assert runs.stored_config(tmp_path / "run").train.stable_targets

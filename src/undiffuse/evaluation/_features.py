"""What pictures are compared by: classifier features, principal components, and the SVM judge.

Everything here is fitted on the spot on the training split, on the CPU, from one seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from undiffuse.evaluation._measures import Points
from undiffuse.evaluation._split import Split, at_most, shuffled

MAX_SIDE = 32  # larger pictures are averaged down to this before they are compared
MAX_DIMS = 32  # of features: the Fréchet floor grows as d^2 / n
MAX_COMPONENTS = 128  # whose distances stand for those of pixels
SVM_PICTURES = 2000
AXES_PICTURES = 2000
CLASSIFIER_PICTURES = 5000
CLASSIFIER_STEPS = 200
CLASSIFIER_BATCH = 128
PIXELS = f"pixels (averaged down to {MAX_SIDE} px where larger)"


@dataclass(frozen=True)
class Features:
    """A function from pictures (n, c, h, w) in [-1, 1] to points (n, d), and its name."""

    name: str
    function: Callable[[Tensor], Points]

    def __call__(self, x0: Tensor) -> Points:
        return self.function(x0)


def area_reduced(x0: Tensor, side: int = MAX_SIDE) -> Tensor:
    """Pictures averaged down so that their longer side is at most `side`; else as they are."""
    h, w = x0.shape[-2:]
    if max(h, w) <= side:
        return x0
    size = [max(1, round(length * side / max(h, w))) for length in (h, w)]
    return functional.interpolate(x0, size=size, mode="area")


def flat(x0: Tensor) -> NDArray[np.float32]:
    """Rows of at most 32 x 32 pixels."""
    return cast(NDArray[np.float32], area_reduced(x0).flatten(1).numpy())


# --- principal components -----------------------------------------------------------------------


@dataclass(frozen=True)
class PrincipalAxes:
    """The leading principal axes of some points, with variances in falling order.

    There are at most half as many as points, and none without variance.
    """

    mean: Points
    variances: Points
    axes: Points

    @property
    def whitened_count(self) -> int:
        """How many components `whitened` gives: at most 32."""
        return min(MAX_DIMS, len(self.variances))

    def plain(self, points: Points) -> Points:
        """At most 128 components in their own units, so that distances are those of the points."""
        return (points - self.mean) @ self.axes

    def whitened(self, points: Points) -> Points:
        """At most 32 components, each with variance 1."""
        count = self.whitened_count
        return (points - self.mean) @ (self.axes[:, :count] / np.sqrt(self.variances[:count]))

    def features(self, embed: Callable[[Tensor], Points], of: str) -> Features:
        """The whitened components of what `embed` makes of pictures; `of` names that."""
        name = f"{self.whitened_count} whitened principal components of {of}"
        return Features(name, lambda x0: self.whitened(embed(x0)))


def principal_axes(points: Points) -> PrincipalAxes:
    """Fit them to points (n, d), n >= 1."""
    mean = points.mean(0)
    count = min(MAX_COMPONENTS, (len(points) - 1) // 2 or 1)
    return PrincipalAxes(mean, *_leading_axes(points - mean, count))


def pixels(x0: Tensor) -> Points:
    """Rows of at most 32 x 32 pixels, as points."""
    return flat(x0).astype(np.float64)


def pixel_features(train: Split, seed: int) -> tuple[Features, Features]:
    """Principal components of pixels, plain and whitened; fitted to at most 2,000 pictures."""
    axes = principal_axes(pixels(at_most(train, AXES_PICTURES, seed, tag=3).x0))
    name = f"{len(axes.variances)} principal components of pixels"
    return Features(name, lambda x0: axes.plain(pixels(x0))), axes.features(pixels, "pixels")


def _leading_axes(centred: Points, count: int) -> tuple[Points, Points]:
    """Largest eigenvalues of the covariance (k,) and their axes (d, k), k <= count."""
    n = len(centred)
    wide = centred.shape[1] > n  # then the n x n products have the same non-zero eigenvalues
    gram = (centred @ centred.T if wide else centred.T @ centred) / max(1, n - 1)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    kept = values > 1e-6 * max(float(values[0]), 1e-12)
    values, vectors = values[kept], vectors[:, kept]
    return values, centred.T @ vectors / np.sqrt(values * max(1, n - 1)) if wide else vectors


# --- a small classifier -------------------------------------------------------------------------


class _Classifier(nn.Module):
    """Three convolutions, averaged to 2 x 2; `head` turns these 256 numbers into class scores."""

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__()
        stride = 1 if side <= 16 else 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def classifier_features(train: Split, seed: int) -> Features:
    """32 whitened components of what a small network sees that learns the classes of `train` now.

    Its last convolution rather than a narrow layer before the scores: there pictures collapse to
    one point per class, and the distance says little but how many there are of each. Whitened, the
    floor of the Fréchet distance is known, (1/n + 1/m) d (d + 5) / 4.
    """
    chosen = at_most(train, CLASSIFIER_PICTURES, seed, tag=1)
    net = _trained_classifier(chosen, seed)
    axes = principal_axes(_embedded(net, chosen.x0))
    return axes.features(
        lambda x0: _embedded(net, x0), "a classifier fitted on the training pictures"
    )


def _trained_classifier(train: Split, seed: int) -> _Classifier:
    x0, target = area_reduced(train.x0), _class_index(train)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = _Classifier(x0.shape[1], int(target.max()) + 1, max(x0.shape[-2:]))
        optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
        for step in range(CLASSIFIER_STEPS):
            _set_rate(optimiser, 2e-3 * (1 - step / CLASSIFIER_STEPS))
            at = _batch(len(train), step, seed)
            loss = functional.cross_entropy(net.head(net(x0[at])), target[at])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.eval()


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def _batch(size: int, step: int, seed: int) -> Tensor:
    """Places of one batch: permutations, one after another."""
    per_epoch = max(1, size // CLASSIFIER_BATCH)
    start = step % per_epoch * CLASSIFIER_BATCH
    order = shuffled(size, seed, tag=1000 + step // per_epoch)
    return order[start : start + CLASSIFIER_BATCH]


def _class_index(split: Split) -> Tensor:
    """Class numbers without holes, as cross entropy wants them."""
    assert split.label is not None
    return split.label.unique(return_inverse=True)[1]


@torch.no_grad()
def _embedded(net: _Classifier, x0: Tensor) -> Points:
    parts = [net(part) for part in area_reduced(x0).split(1024)]
    return cast(Points, torch.cat(parts).double().numpy())


# --- the judge of classes -----------------------------------------------------------------------


def class_judge(pictures: Split) -> Callable[[Tensor], NDArray[np.int64]]:
    """An RBF support vector machine on pixels (C = 10, gamma "scale") that names classes.

    Args:
        pictures: to fit it to, with labels of two classes or more.
    """
    from sklearn.svm import SVC

    assert pictures.label is not None
    machine = SVC(C=10.0, gamma="scale").fit(flat(pictures.x0), pictures.label.numpy())
    return lambda x0: cast("NDArray[np.int64]", machine.predict(flat(x0)))

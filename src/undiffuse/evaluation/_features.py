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
    """The leading principal axes of `embed`, with variances in falling order.

    There are at most half as many as pictures, and none without variance.
    """

    embed: Callable[[Tensor], Points]
    of: str
    mean: Points
    variances: Points
    axes: Points

    def plain(self) -> Features:
        """At most 128 components in their own units, so that distances are those of `embed`."""
        axes = self.axes[:, :MAX_COMPONENTS]
        name = f"{axes.shape[1]} principal components of {self.of}"
        return Features(name, lambda x0: (self.embed(x0) - self.mean) @ axes)

    def whitened(self) -> Features:
        """At most 32 components, each with variance 1 on the pictures they were fitted to."""
        axes = self.axes[:, :MAX_DIMS] / np.sqrt(self.variances[:MAX_DIMS])
        name = f"{axes.shape[1]} whitened principal components of {self.of}"
        return Features(name, lambda x0: (self.embed(x0) - self.mean) @ axes)


def principal_axes(embed: Callable[[Tensor], Points], of: str, x0: Tensor) -> PrincipalAxes:
    """Fit them to pictures (n, c, h, w), n >= 1; `of` names what `embed` makes of pictures."""
    points = embed(x0)
    mean = points.mean(0)
    count = min(MAX_COMPONENTS, (len(points) - 1) // 2 or 1)
    return PrincipalAxes(embed, of, mean, *_leading_axes(points - mean, count))


def pixel_axes(train: Split, seed: int) -> PrincipalAxes:
    """Principal axes of pixels, from at most 2,000 pictures."""
    chosen = at_most(train, AXES_PICTURES, seed, tag=3)
    return principal_axes(lambda x0: flat(x0).astype(np.float64), "pixels", chosen.x0)


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
    of = "a classifier fitted on the training pictures"
    return principal_axes(lambda x0: _embedded(net, x0), of, chosen.x0).whitened()


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


def class_judge(train: Split, seed: int) -> Callable[[Tensor], NDArray[np.int64]]:
    """An RBF support vector machine on pixels (C = 10, gamma "scale") that names classes."""
    from sklearn.svm import SVC

    chosen = at_most(train, SVM_PICTURES, seed, tag=2)
    assert chosen.label is not None
    machine = SVC(C=10.0, gamma="scale").fit(flat(chosen.x0), chosen.label.numpy())
    return lambda x0: cast("NDArray[np.int64]", machine.predict(flat(x0)))

"""Distances between two sets of points, as plain functions of float64 arrays (n, d)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def frechet_distance(a: Points, b: Points) -> float:
    """Fréchet distance of the Gaussians fitted to two sets (Dowson & Landau 1982; 1706.08500):

    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2), covariances with the factor 1 / (n - 1).
    """
    return _frechet(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def _frechet(mean_a: Points, cov_a: Points, mean_b: Points, cov_b: Points) -> float:
    # tr (C C')^1/2 = tr (R C' R)^1/2 with the symmetric root R of C: no complex numbers
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root).clip(0)
    spread = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum()
    return max(0.0, float(np.square(mean_a - mean_b).sum() + spread))


def _covariance(points: Points) -> Points:
    return np.cov(points, rowvar=False).reshape(points.shape[1], points.shape[1])


def covariance_spectrum(points: Points) -> Points:
    """Eigenvalues of the covariance, (d,)."""
    return np.linalg.eigvalsh(_covariance(points)).astype(np.float64)


def frechet_floor(eigenvalues: Points, n: int, m: int) -> float:
    """Expected Fréchet distance of two samples of one Gaussian, to first order in 1/n and 1/m.

    (1/n + 1/m) {sum l_i + [sum_ij l_i l_j / (l_i + l_j) + sum l_i / 2] / 2}; for d whitened
    dimensions (1/n + 1/m) d (d + 5) / 4.

    Args:
        eigenvalues: those of the common covariance, (d,).
    """
    values = eigenvalues[eigenvalues > 0]
    pairs = values[:, None] * values / (values[:, None] + values)
    return (1 / n + 1 / m) * float(values.sum() + (pairs.sum() + values.sum() / 2) / 2)


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: Points, fake: Points, k: int = 5) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, 1904.06991).

    Precision: the share of `fake` that lies within the distance from some real point to its k-th
    neighbour among the real ones. Recall: the same with the roles exchanged.
    """
    across = _square_distances(real, fake)
    radius_real = _kth_square_distance(real, k)[:, None]
    radius_fake = _kth_square_distance(fake, k)[None]
    return PrecisionRecall(
        float((across <= radius_real).any(0).mean()), float((across <= radius_fake).any(1).mean())
    )


def _kth_square_distance(points: Points, k: int) -> Points:
    """Squared distance to the k-th nearest other point (the farthest, if there are fewer)."""
    squares = _square_distances(points, points)
    np.fill_diagonal(squares, 0.0)
    k = min(k, len(points) - 1)
    return np.partition(squares, k, axis=1)[:, k]  # place 0 is the point itself


def _square_distances(a: Points, b: Points) -> Points:
    centre = a.mean(0)  # smaller numbers cancel less
    a, b = a - centre, b - centre
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    return squares.clip(0)


class Neighbours(NamedTuple):
    """For every query the nearest picture, its distance, and the ratio to the second nearest."""

    place: NDArray[np.int64]
    distance: Points
    ratio: Points


CANDIDATES = 4  # found in float32 by one matrix product, then measured again without cancellation


def nearest(queries: NDArray[np.float32], pictures: NDArray[np.float32]) -> Neighbours:
    """The two nearest of `pictures` (m, d), at least two and no two alike, to each query (n, d).

    The ratio d1 / d2 is small for a copy alone: between two real neighbours a new picture is about
    as far from one as from the other. An exact copy has ratio 0.
    """
    parts = [_nearest_of_block(block, pictures) for block in _blocks(queries, len(pictures))]
    return Neighbours(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _blocks(queries: NDArray[np.float32], width: int) -> Iterator[NDArray[np.float32]]:
    rows = max(1, (1 << 24) // max(1, width))  # 64 MiB of distances at a time
    return (queries[start : start + rows] for start in range(0, len(queries), rows))


def _nearest_of_block(block: NDArray[np.float32], pictures: NDArray[np.float32]) -> Neighbours:
    count = min(CANDIDATES, len(pictures))
    rough = np.square(pictures).sum(1) - 2 * (block @ pictures.T)
    places = np.argpartition(rough, count - 1, axis=1)[:, :count]
    apart = pictures[places].astype(np.float64) - block[:, None].astype(np.float64)
    distances = np.sqrt(np.square(apart).sum(2))
    rank = np.argsort(distances, axis=1, kind="stable")
    places, distances = (np.take_along_axis(v, rank, 1) for v in (places, distances))
    ratio = distances[:, 0] / np.maximum(distances[:, 1], np.finfo(np.float64).tiny)
    return Neighbours(places[:, 0], distances[:, 0], ratio)


def distinct(pictures: NDArray[np.float32]) -> NDArray[np.int64]:
    """Places of the first picture of each kind; copies within the set would make d1 = d2."""
    first: dict[bytes, int] = {}
    for place, picture in enumerate(pictures):
        first.setdefault(picture.tobytes(), place)
    return np.fromiter(first.values(), dtype=np.int64)

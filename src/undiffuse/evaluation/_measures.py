"""Distances between two sets of points, as plain functions of float64 arrays (n, d)."""

import hashlib
from collections.abc import Iterable, Iterator
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

    def at(self, places: slice) -> "Neighbours":
        """Those of the queries at these places."""
        return Neighbours(self.place[places], self.distance[places], self.ratio[places])


class Search(NamedTuple):
    """What was found among `searched` pictures; nothing where fewer than two are distinct."""

    found: Neighbours | None
    searched: int


CANDIDATES = 4  # found in float32 by one matrix product, then measured again without cancellation


def nearest(queries: NDArray[np.float32], chunks: Iterable[NDArray[np.float32]]) -> Search:
    """The two nearest distinct pictures to each query (n, d), n >= 0.

    The ratio d1 / d2 is small for a copy alone: between two real neighbours a new picture is about
    as far from one as from the other. An exact copy has ratio 0.

    Args:
        chunks: of pictures (m, d), read once, one at a time; places count on from one to the next.
    """
    seen: set[bytes] = set()
    searched, best = 0, _Two.none(len(queries))
    for chunk in chunks:
        new = _unseen(chunk, seen)
        if len(new):
            best = best.or_nearer(_two_nearest(queries, chunk[new], new + searched))
        searched += len(chunk)
    return Search(best.neighbours() if len(seen) >= 2 else None, searched)


class _Two(NamedTuple):
    """Places and distances of the two nearest pictures so far, (n, 2); infinity where none is."""

    place: NDArray[np.int64]
    distance: Points

    @staticmethod
    def none(count: int) -> "_Two":
        return _Two(np.zeros((count, 2), np.int64), np.full((count, 2), np.inf))

    def or_nearer(self, other: "_Two") -> "_Two":
        place = np.concatenate([self.place, other.place], 1)
        distance = np.concatenate([self.distance, other.distance], 1)
        rank = np.argsort(distance, axis=1, kind="stable")[:, :2]
        return _Two(np.take_along_axis(place, rank, 1), np.take_along_axis(distance, rank, 1))

    def neighbours(self) -> Neighbours:
        first, second = self.distance.T
        ratio = first / np.maximum(second, np.finfo(np.float64).tiny)
        return Neighbours(self.place[:, 0], first, ratio)


def _two_nearest(
    queries: NDArray[np.float32], pictures: NDArray[np.float32], places: NDArray[np.int64]
) -> _Two:
    parts = [_two_of_block(block, pictures, places) for block in _blocks(queries, len(pictures))]
    return _Two(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _blocks(queries: NDArray[np.float32], width: int) -> Iterator[NDArray[np.float32]]:
    rows = max(1, (1 << 24) // max(1, width))  # 64 MiB of distances at a time
    starts = range(0, max(1, len(queries)), rows)  # at least one block, of nothing perhaps
    return (queries[start : start + rows] for start in starts)


def _two_of_block(
    block: NDArray[np.float32], pictures: NDArray[np.float32], places: NDArray[np.int64]
) -> _Two:
    count = min(CANDIDATES, len(pictures))
    rough = np.square(pictures).sum(1) - 2 * (block @ pictures.T)
    rows = np.argpartition(rough, count - 1, axis=1)[:, :count]
    apart = pictures[rows].astype(np.float64) - block[:, None].astype(np.float64)
    return _Two.none(len(block)).or_nearer(_Two(places[rows], np.sqrt(np.square(apart).sum(2))))


def _unseen(pictures: NDArray[np.float32], seen: set[bytes]) -> NDArray[np.int64]:
    """Places of the first picture of each kind; copies within the set would make d1 = d2."""
    kept: list[int] = []
    for place, picture in enumerate(pictures):
        mark = hashlib.blake2b(picture.tobytes(), digest_size=16).digest()
        if mark not in seen:
            seen.add(mark)
            kept.append(place)
    return np.array(kept, dtype=np.int64)

"""Measures between two sets of points, as plain functions of float64 arrays (n, d)."""

import math
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def frechet_distance(a: Points, b: Points) -> float:
    """Fréchet distance of the Gaussians fitted to two sets (Dowson & Landau 1982; 1706.08500):

    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2), covariances with the factor 1 / (n - 1).
    """
    few = len(a) + len(b) < a.shape[1]  # then products between points are the smaller matrices
    spread = _spread_of_few(_centred(a), _centred(b)) if few else _spread(a, b)
    return max(0.0, float(np.square(a.mean(0) - b.mean(0)).sum()) + spread)


def _spread(a: Points, b: Points) -> float:
    # tr (C C')^1/2 = tr (R C' R)^1/2 with the symmetric root R of C: no complex numbers
    cov_a, cov_b = _covariance(a), _covariance(b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root).clip(0)
    return float(np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum())


def _spread_of_few(a: Points, b: Points) -> float:
    # C = A^T A and C' = B^T B: the eigenvalues of C C' are the squared singular values of A B^T
    cross = np.linalg.svd(a @ b.T, compute_uv=False)
    return float(np.square(a).sum() + np.square(b).sum() - 2 * cross.sum())


def _centred(points: Points) -> Points:
    return (points - points.mean(0)) / np.sqrt(len(points) - 1)


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


SMALLER = (1.0, 1.5, 2.0, 2.5, 3.0)  # by which the sets are divided to see where this leads


def frechet_infinity(a: Points, b: Points) -> float:
    """The Fréchet distance that infinitely many points would have (Chong & Forsyth, 1911.07023).

    Its bias is proportional to 1/n, so it is measured between parts of n, n/1.5, n/2, n/2.5 and
    n/3 points and the straight line is followed to 1/n = 0. Without bias, hence below 0 at times.

    Args:
        a: points in random order, (n, d); n should be at least 9 d, since the next term is d/n
            times the first.
        b: as many others.
    """
    sizes = [round(len(a) / q) for q in SMALLER]
    means = [np.mean(_frechet_of_parts(a, b, size)) for size in sizes]
    return float(np.polyfit(1 / np.array(sizes), means, 1)[1])


def _frechet_of_parts(a: Points, b: Points, size: int) -> list[float]:
    """Of as many stretches as cover all points, the ends included."""
    starts = np.linspace(0, len(a) - size, -(-len(a) // size)).astype(int)
    return [frechet_distance(a[i : i + size], b[i : i + size]) for i in starts]


def kernel_distance(a: Points, b: Points) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3 (Bińkowski et al. 2018,
    1801.01401: the kernel distance, KID).

    Without bias: 0 on average for two sets of one distribution, hence below 0 at times. Each set
    has at least 2 points.
    """
    inside = sum(_mean_apart(_cubic(points, points)) for points in (a, b))
    return inside - 2 * float(_cubic(a, b).mean())


def _cubic(a: Points, b: Points) -> Points:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_apart(products: Points) -> float:
    """Mean over pairs of different points."""
    n = len(products)
    return float(products.sum() - np.trace(products)) / (n * (n - 1))


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


class DensityCoverage(NamedTuple):
    """Density is about 1 for real points and may be above; coverage is a fraction in [0, 1]."""

    density: float
    coverage: float


def density_coverage(real: Points, fake: Points, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, 2002.09797).

    Density: how many real points have a fake one within the distance to their k-th neighbour among
    the real ones, per fake point and divided by k. Coverage: the share of real points that have.
    Unlike precision and recall they are not moved by a single outlier, whose sphere is large.
    """
    inside = _square_distances(real, fake) <= _kth_square_distance(real, k)[:, None]
    return DensityCoverage(float(inside.sum(0).mean() / k), float(inside.any(1).mean()))


def expected_coverage(n: int, m: int, k: int = 5) -> float:
    """Coverage of n points by m of the same distribution, on average (2002.09797):

    1 - (n-1) ... (n-k) / ((n+m-1) ... (n+m-k)), whatever the distribution and the dimension: a
    point is not covered if its k nearest of the n + m - 1 others are all among the n.
    """
    k = min(k, n - 1)  # as `density_coverage` takes the farthest where there are fewer
    return 1 - math.prod((n - j) / (n + m - j) for j in range(1, k + 1))


def authentic_share(real: Points, fake: Points) -> float:
    """Share of `fake` whose nearest real point has a real one nearer still (Alaa et al. 2021,
    2102.08921: authenticity). No copy is authentic; noise always is."""
    own = _kth_square_distance(real, 1)
    across = _square_distances(real, fake)
    nearest = across.argmin(0)
    return float((across[nearest, np.arange(len(fake))] > own[nearest]).mean())


def sliced_distance(a: Points, b: Points) -> float:
    """Root mean square of the Wasserstein-2 distances along the axes (Rabin et al. 2012; with
    random directions as axes, the sliced distance). As many points on both sides."""
    return float(np.sqrt(np.square(np.sort(a, 0) - np.sort(b, 0)).mean()))


def two_sample_accuracy(a: Points, b: Points, folds: int = 5) -> float:
    """How often a classifier tells which set a point is of (Lopez-Paz & Oquab 2017, 1610.06545).

    An RBF support vector machine (C = 10, gamma 1 / (d variance)), cross-validated. Without any
    difference 1/2, with a standard error of about 1 / (2 sqrt(2 n)).

    Args:
        a: points in random order, (n, d).
        b: as many others.
    """
    both, of_b = np.concatenate([a, b]), np.repeat([False, True], [len(a), len(b)])
    fold = np.concatenate([np.arange(len(a)), np.arange(len(b))]) % folds
    # one kernel for all folds: the machine's own would be computed number by number
    width = both.shape[1] * max(float(both.var()), np.finfo(np.float64).tiny)
    kernel = np.exp(-_square_distances(both, both) / width)
    right = [_right_in_fold(kernel, of_b, fold == one) for one in range(folds)]
    return float(np.concatenate(right).mean())


def _right_in_fold(
    kernel: Points, target: NDArray[np.bool_], held: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    from sklearn.svm import SVC

    machine = SVC(C=10.0, kernel="precomputed").fit(kernel[np.ix_(~held, ~held)], target[~held])
    return cast(NDArray[np.bool_], machine.predict(kernel[np.ix_(held, ~held)]) == target[held])


class MomentErrors(NamedTuple):
    """Root mean square z-scores over dimensions: about 1 for two sets of one distribution."""

    mean: float
    spread: float


QUIET = 0.01  # of the mean variance: dimensions that vary less are taken to vary so much


def moment_errors(a: Points, b: Points) -> MomentErrors:
    """z-scores of the difference of means, and of variances about the common mean.

    A dimension that hardly varies, such as a pixel of a blank border, counts with a hundredth of
    the mean variance: else the smallest offset there would drown all others.
    """
    centre = np.concatenate([a, b]).mean(0)
    a, b = a - centre, b - centre
    quiet = QUIET * float(np.concatenate([a, b]).var(0).mean())
    return MomentErrors(_rms_z(a, b, quiet), _rms_z(a**2, b**2, 2 * quiet**2))


def _rms_z(a: Points, b: Points, least: float) -> float:
    """`least`: the least variance; that of the squares of a normal variable is 2 variance^2."""
    parts = [(points.var(0) + least) / len(points) for points in (a, b)]
    squares = np.square(a.mean(0) - b.mean(0)) / (sum(parts) + np.finfo(np.float64).tiny)
    return float(np.sqrt(squares.mean()))


def spectrum_error(a: Points, b: Points) -> float:
    """Root mean square difference of the natural logarithms of two mean power spectra.

    Args:
        a: power of every picture by frequency, (n, bins), as `radial_power` gives it.
        b: that of others.
    """
    ratio = np.log(a.mean(0)) - np.log(b.mean(0))
    return float(np.sqrt(np.square(ratio).mean()))


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

"""Exact denoisers: data whose best possible estimate of the clean picture is a formula.

An oracle is called like a denoiser, `(x, level, label=None) -> x0`, so it stands wherever one does:
in samplers, guidance and, as `Known(oracle, schedule)`, in evaluation. It returns the posterior
mean D*(x) = E[x0 | x] of

    x = alpha * x0 + sigma * noise

which no denoiser can beat in mean squared error. Everything is computed in float64 and returned in
x's precision. `level` is 0-d or (b,1,1,1) with sigma > 0; alpha may be 0, where nothing is known
of x0 and D* is its mean. (2206.00364, appendix B.3; Kay, "Estimation theory", section 11.)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.noise import NoiseLevel, Schedule

Pictures = Float[Tensor, "b c h w"]
Rows = Float[Tensor, "b d"]  # pictures as float64 vectors

CHUNK = 2**19  # float64 values in the largest temporary: 4 MiB, which caches hold


@runtime_checkable
class Oracle(Protocol):
    """What every exact denoiser is."""

    def __call__(
        self, x: Pictures, level: NoiseLevel, label: Int[Tensor, "b"] | None = None
    ) -> Pictures: ...


@dataclass(frozen=True)
class Known:
    """An oracle with the schedule whose levels it is asked for, as a `Denoiser` has one.

    For whatever chooses the levels itself, such as `evaluation.loss_by_level`.
    """

    oracle: Oracle
    schedule: Schedule

    def __call__(
        self, x: Pictures, level: NoiseLevel, label: Int[Tensor, "b"] | None = None
    ) -> Pictures:
        """E[x0 | x], or E[x0 | x, label]."""
        return self.oracle(x, level, label)


class Measured(NamedTuple):
    """A mean over draws, and its standard error; 0-d float64."""

    value: Tensor
    error: Tensor


def measured_mmse(
    oracle: Oracle,
    x0: Pictures,
    noise: Pictures,
    level: NoiseLevel,
    label: Int[Tensor, "b"] | None = None,
) -> Measured:
    """E|x0 - D*|^2 per value by Monte Carlo, where there is no formula such as `Gaussian.mmse`.

    It equals (E|x0|^2 - E|D*|^2) / d, since the error of D* is orthogonal to D*; measured directly
    it is the less noisy, by far where sigma is small.

    Args:
        x0: at least two independent pictures from the oracle's own law, as its `draw` gives them.
        noise: standard normal numbers.
        label: the pictures' classes, for the MMSE of an estimate that knows them.

    Raises:
        ConfigError: there are fewer than two pictures.
    """
    if len(x0) < 2:
        raise ConfigError(f"measured_mmse needs at least two pictures; got {len(x0)}")
    estimate = oracle(level.mix(x0, noise), level, label)
    errors = (estimate - x0).double().square().flatten(1).mean(1)
    return Measured(errors.mean(), errors.std() / math.sqrt(len(errors)))


def _rows(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Float64 rows, on the device of `like`; they travel in their own precision."""
    device = x.device if like is None else like.device
    return x.to(device).to(torch.float64).flatten(1)


def _scales(level: NoiseLevel, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma as float64 columns (b,1) or (1,1) on x's device."""
    return tuple(v.double().to(x.device).reshape(-1, 1) for v in (level.alpha, level.sigma))  # pyright: ignore[reportReturnType] - two of two


# --- Gaussian -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Pictures from N(mean, U diag(eigenvalues) U^T + rest * (I - U U^T)).

    D*(x) = mean + U diag(a l / (a^2 l + s^2)) U^T (x - a mean), the Wiener filter. With fewer
    eigenvectors than values (k < d) every direction outside U has variance `rest`.

    Args:
        mean: the mean picture.
        eigenvalues: variances along the columns of `eigenvectors`, at least 0.
        eigenvectors: orthonormal columns U, one row per value of a picture.
        rest: variance along every other direction, at least 0.

    Raises:
        ConfigError: sizes do not fit or a variance is negative.
    """

    mean: Float[Tensor, "c h w"]
    eigenvalues: Float[Tensor, "k"]
    eigenvectors: Float[Tensor, "d k"]
    rest: float = 0.0

    def __post_init__(self) -> None:
        expected = (self.mean.numel(), len(self.eigenvalues))
        if tuple(self.eigenvectors.shape) != expected:
            raise ConfigError(
                f"eigenvectors must have shape {expected}, one row per value of a picture and one"
                f" column per eigenvalue; got {tuple(self.eigenvectors.shape)}"
            )
        if self.rest < 0 or bool((self.eigenvalues < 0).any()):
            raise ConfigError("eigenvalues and rest are variances; got a negative one")

    @classmethod
    def from_covariance(
        cls, mean: Float[Tensor, "c h w"], covariance: Float[Tensor, "d d"]
    ) -> "Gaussian":
        """From a full covariance; eigenvalues below 0 by rounding become 0."""
        values, vectors = torch.linalg.eigh(covariance.double())
        return cls(mean.double(), values.clamp(min=0), vectors)

    def __call__(
        self, x: Pictures, level: NoiseLevel, label: Int[Tensor, "b"] | None = None
    ) -> Pictures:
        """E[x0 | x]; a Gaussian has no classes, so `label` changes nothing."""
        alpha, sigma = _scales(level, x)
        rows = _row_mean(self, x) + _along(
            self, _centred(self, x, alpha), lambda v: alpha * v / (alpha**2 * v + sigma**2)
        )
        return rows.to(x.dtype).reshape(x.shape)

    def mmse(self, level: NoiseLevel) -> Tensor:
        """E|x0 - D*|^2 per value, in the shape of the level; float64.

        (1/d) * sum of l s^2 / (a^2 l + s^2). No denoiser does better on this data.
        """
        alpha, sigma = (v.double().unsqueeze(-1) for v in (level.alpha, level.sigma))
        values = _spectrum(self).to(alpha.device)
        return (values * sigma**2 / (alpha**2 * values + sigma**2)).mean(-1)

    def log_density(self, x: Pictures, level: NoiseLevel) -> Float[Tensor, "b"]:
        """ln N(x; alpha * mean, alpha^2 * covariance + sigma^2 * I), in float64."""
        alpha, sigma = _scales(level, x)
        variances = alpha**2 * _spectrum(self).to(x.device) + sigma**2
        white = _along(self, _centred(self, x, alpha), lambda v: (alpha**2 * v + sigma**2).rsqrt())
        return -(white.square() + variances.log() + math.log(2 * math.pi)).sum(1) / 2

    def draw(self, noise: Pictures) -> Pictures:
        """Standard normal numbers to clean pictures with this mean and covariance."""
        rows = _row_mean(self, noise) + _along(self, _rows(noise), torch.sqrt)
        return rows.to(noise.dtype).reshape(noise.shape)


def fit_gaussian(x0: Pictures, shrink: float = 0.0) -> Gaussian:
    """The maximum-likelihood Gaussian, through an SVD of the centred pictures.

    Args:
        x0: clean pictures; fewer pictures than values give a low rank.
        shrink: share of the covariance, 0 to 1, replaced by a multiple of I of the same trace.

    Raises:
        ConfigError: `shrink` is outside [0, 1].
    """
    if not 0.0 <= shrink <= 1.0:
        raise ConfigError(f"shrink must be in [0, 1]; got {shrink}")
    rows = _rows(x0)
    mean = rows.mean(0)
    _, singular, vectors = torch.linalg.svd(rows - mean, full_matrices=False)
    values = singular.square() / len(rows)
    rest = shrink * float(values.sum()) / rows.shape[1]
    return Gaussian(mean.reshape(x0.shape[1:]), (1 - shrink) * values + rest, vectors.mT, rest)


def power_law_field(
    exponent: float, height: int, width: int, *, spread: float = 1.0, torus: int | None = None
) -> Gaussian:
    """Random fields of one channel and zero mean with the power spectrum k^-`exponent`.

    Natural pictures have exponents near 2 (Field 1987, "Relations between the statistics of natural
    images and the response properties of cortical cells"). A field has neither edge nor period: it
    is a window cut out of a field that is periodic on a `torus`, of which it shows no more than a
    part. The covariance of two pixels is the spectrum's inverse transform at their distance
    (Wiener-Khinchin), in closed form; its eigenvectors need O((height * width)^3) operations.

    Args:
        exponent: 0 is nearly white noise; the larger, the smoother. The torus has no mean (k = 0).
        height: pixels of a picture.
        width: likewise.
        spread: standard deviation of every pixel.
        torus: side of the torus in pixels; None takes twice the picture's longer side.

    Raises:
        ConfigError: the exponent is not finite, a size or the spread is not above 0, or the torus
            is smaller than the picture or than 2 pixels.
    """
    side = 2 * max(height, width) if torus is None else torus
    if not math.isfinite(exponent) or not 0.0 < spread < math.inf:
        raise ConfigError(
            "power_law_field needs a finite exponent and a spread above 0;"
            f" got exponent={exponent} and spread={spread}"
        )
    if min(height, width) < 1 or side < max(height, width, 2):
        raise ConfigError(
            "power_law_field needs a height and a width of at least 1 and a torus as large as both,"
            f" at least 2; got height={height}, width={width}, torus={side}"
        )
    by_distance = torch.fft.ifft2(_power(exponent, side)).real * spread**2
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    covariance = by_distance[y[:, None] - y, x[:, None] - x]  # distances below 0 count from the end
    return Gaussian.from_covariance(torch.zeros(1, height, width), covariance)


def _power(exponent: float, side: int) -> Float[Tensor, "n n"]:
    """Variance of each wave on a torus, k^-exponent without k = 0; the mean is 1."""
    k = torch.fft.fftfreq(side, dtype=torch.float64) * side
    squared = k[:, None] ** 2 + k**2
    power = squared.clamp(min=1.0) ** (-exponent / 2)
    power[0, 0] = 0.0
    return power / power.mean()


def gaussian_flow(gaussian: Gaussian, x: Pictures, now: NoiseLevel, then: NoiseLevel) -> Pictures:
    """Where the probability-flow equation takes x from level `now` to level `then`, exactly.

    x' = a' mean + U diag sqrt((a'^2 l + s'^2) / (a^2 l + s^2)) U^T (x - a mean). `then` may be the
    clean level. Every deterministic sampler approximates this (2011.13456, eq. 13).
    """
    (a, s), (b, r) = _scales(now, x), _scales(then, x)
    rows = b * _row_mean(gaussian, x) + _along(
        gaussian,
        _centred(gaussian, x, a),
        lambda v: ((b**2 * v + r**2) / (a**2 * v + s**2)).sqrt(),
    )
    return rows.to(x.dtype).reshape(x.shape)


def _row_mean(gaussian: Gaussian, x: Tensor) -> Tensor:
    return _rows(gaussian.mean[None], like=x)


def _centred(gaussian: Gaussian, x: Tensor, alpha: Tensor) -> Tensor:
    return _rows(x) - alpha * _row_mean(gaussian, x)


def _along(gaussian: Gaussian, rows: Rows, gain: Callable[[Tensor], Tensor]) -> Rows:
    """Multiply each eigen-direction of `rows` by gain(its variance)."""
    basis = gaussian.eigenvectors.to(rows)
    inside = rows @ basis
    scaled = (inside * gain(gaussian.eigenvalues.to(rows))) @ basis.mT
    if basis.shape[0] == basis.shape[1]:
        return scaled
    return scaled + (rows - inside @ basis.mT) * gain(rows.new_tensor([gaussian.rest]))


def _spectrum(gaussian: Gaussian) -> Float[Tensor, "d"]:
    """All d variances."""
    missing = gaussian.mean.numel() - len(gaussian.eigenvalues)
    values = gaussian.eigenvalues.double()
    return torch.cat([values, values.new_full((missing,), gaussian.rest)])


# --- mixture ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mixture:
    """Pictures from one of several Gaussians: D* = sum of r_k D_k, r_k the posterior of each.

    Args:
        components: the Gaussians.
        weights: how often each occurs, above 0; they need not sum to 1.
        labels: the class of each component. With a label only that class's components count.

    Raises:
        ConfigError: the three lengths differ, a weight is not above 0, or a label has no component.
    """

    components: tuple[Gaussian, ...]
    weights: tuple[float, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = len(self.components), len(self.weights), len(self.labels)
        if not sizes[0] == sizes[1] == sizes[2] > 0:
            raise ConfigError(
                "a mixture needs as many components as weights and labels, at least one;"
                f" got {sizes[0]}, {sizes[1]} and {sizes[2]}"
            )
        if not min(self.weights) > 0:
            raise ConfigError(f"mixture weights must be above 0; got {min(self.weights)}")

    def __call__(
        self, x: Pictures, level: NoiseLevel, label: Int[Tensor, "b"] | None = None
    ) -> Pictures:
        """E[x0 | x], or E[x0 | x, label]."""
        wide, out = x.double(), torch.zeros_like(x, dtype=torch.float64)
        shares = torch.softmax(self._log_joint(wide, level, label), 1)
        for share, component in zip(shares.unbind(1), self.components, strict=True):
            out += share.reshape(-1, 1, 1, 1) * component(wide, level)
        return out.to(x.dtype)

    def draw(
        self, noise: Pictures, uniform: Float[Tensor, "b"]
    ) -> tuple[Pictures, Int[Tensor, "b"]]:
        """Clean pictures and their classes; `uniform` in [0, 1) chooses the components."""
        shares = torch.tensor(self.weights, dtype=torch.float64, device=noise.device)
        edges = shares.cumsum(0)[:-1] / shares.sum()
        chosen = torch.bucketize(uniform.double().to(noise.device), edges, right=True)
        x0 = torch.empty_like(noise)
        for index, component in enumerate(self.components):
            x0[chosen == index] = component.draw(noise[chosen == index])
        return x0, torch.tensor(self.labels, device=noise.device)[chosen]

    def log_density(self, x: Pictures, level: NoiseLevel) -> Float[Tensor, "b"]:
        """ln p(x) at this level, in float64."""
        total = math.log(sum(self.weights))
        return self._log_joint(x.double(), level, None).logsumexp(1) - total

    def _log_joint(self, x: Pictures, level: NoiseLevel, label: Tensor | None) -> Tensor:
        columns = [c.log_density(x, level) for c in self.components]
        joint = torch.stack(columns, 1) + x.new_tensor(self.weights).log()
        classes = torch.tensor(self.labels, device=x.device)
        _check_labels(classes, label)
        return joint + _log_mask(classes, label)


def _log_mask(classes: Int[Tensor, "k"], label: Tensor | None) -> Tensor:
    """0 where an entry belongs to the picture's class, else -inf; (b,k), or 0-d without labels."""
    if label is None:
        return torch.zeros((), dtype=torch.float64, device=classes.device)
    same = label.to(classes.device).unsqueeze(1) == classes
    return torch.where(same, 0.0, -torch.inf).double()


def _check_labels(classes: Tensor, label: Tensor | None) -> None:
    if label is None:
        return
    known = torch.isin(label.to(classes.device), classes)
    if not bool(known.all()):
        unknown = int(label.to(classes.device)[~known][0])
        raise ConfigError(
            f"label {unknown} has no data; use one of {sorted(set(classes.tolist()))}"
        )


# --- finite set, kernel density -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FiniteSet:
    """Pictures from a list, all equally likely: D* = softmax-weighted mean of the list.

    On a training set this is the denoiser of least training loss: it has memorised the set. The
    list may be large and lie on another device than x: it stays there in its own precision, and
    chunks of it travel to x.

    Args:
        x0: the list; not to be changed afterwards.
        label: the class of each. With a label only that class's pictures count.

    Raises:
        ConfigError: a label is asked for that the list lacks.
    """

    x0: Float[Tensor, "n c h w"]
    label: Int[Tensor, "n"] | None = None

    def __call__(
        self, x: Pictures, level: NoiseLevel, label: Int[Tensor, "b"] | None = None
    ) -> Pictures:
        """E[x0 | x], or E[x0 | x, label]."""
        alpha, sigma = _scales(level, x)
        mean = _kernel_mean(self, x, alpha, sigma**2, label)
        return mean.to(x.dtype).reshape(x.shape)

    def draw(self, uniform: Float[Tensor, "b"]) -> tuple[Pictures, Int[Tensor, "b"] | None]:
        """Pictures of the list and their classes; `uniform` in [0, 1) chooses them."""
        return _drawn(self, uniform)

    @cached_property
    def centre(self) -> Float[Tensor, "d"]:
        """The mean of the list as a vector, in float64."""
        return _mean(self.x0)


@dataclass(frozen=True, eq=False)
class Smoothed:
    """A list of pictures, each blurred by N(0, bandwidth^2 I): a kernel density estimate.

    Args:
        x0: the list, as in `FiniteSet`.
        bandwidth: deviation of the kernel in units of pixel values; 0 is `FiniteSet`.
        label: the class of each.

    Raises:
        ConfigError: `bandwidth` is negative, or a label is asked for that the list lacks.
    """

    x0: Float[Tensor, "n c h w"]
    bandwidth: float
    label: Int[Tensor, "n"] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.bandwidth < math.inf:
            raise ConfigError(f"bandwidth must be at least 0; got {self.bandwidth}")

    def __call__(
        self, x: Pictures, level: NoiseLevel, label: Int[Tensor, "b"] | None = None
    ) -> Pictures:
        """E[x0 | x], or E[x0 | x, label]."""
        alpha, sigma = _scales(level, x)
        width = self.bandwidth**2
        spread = alpha**2 * width + sigma**2
        mean = _kernel_mean(self, x, alpha, spread, label)
        rows = mean + alpha * width / spread * (_rows(x) - alpha * mean)
        return rows.to(x.dtype).reshape(x.shape)

    def draw(
        self, noise: Pictures, uniform: Float[Tensor, "b"]
    ) -> tuple[Pictures, Int[Tensor, "b"] | None]:
        """Clean pictures and their classes; `uniform` in [0, 1) chooses from the list."""
        x0, label = _drawn(self, uniform)
        return x0.to(noise) + self.bandwidth * noise, label

    @cached_property
    def centre(self) -> Float[Tensor, "d"]:
        """The mean of the list as a vector, in float64."""
        return _mean(self.x0)


def _drawn(
    points: FiniteSet | Smoothed, uniform: Tensor
) -> tuple[Pictures, Int[Tensor, "b"] | None]:
    count = len(points.x0)  # a number next to 1 may round up to it
    chosen = (uniform.double() * count).long().clamp(max=count - 1).to(points.x0.device)
    return points.x0[chosen], None if points.label is None else points.label[chosen]


def _mean(x0: Tensor) -> Float[Tensor, "d"]:
    """The mean picture in float64, without a float64 copy of the list."""
    total = torch.zeros(x0[0].numel(), dtype=torch.float64, device=x0.device)
    for part in x0.split(max(1, CHUNK // x0[0].numel())):
        total += _rows(part).sum(0)
    return total / len(x0)


def _kernel_mean(
    points: FiniteSet | Smoothed,
    x: Tensor,
    alpha: Tensor,
    spread: Tensor,
    label: Tensor | None,
) -> Rows:
    """Sum of w_i y_i with w = softmax of -|x - alpha y_i|^2 / (2 spread).

    |x|^2 falls out of the softmax. The list is taken in chunks with a running maximum, so memory
    does not grow with it; centring keeps the digits of the products.
    """
    centre = points.centre.to(x.device)
    rows = _rows(x) - alpha * centre
    top = rows.new_full(
        (len(rows), 1), torch.finfo(torch.float64).min
    )  # finite: -inf - -inf is nan
    total, mean = torch.zeros_like(top), torch.zeros_like(rows)
    for part, mask in _chunks(points.x0, points.label, x, label):
        part = part - centre
        logits = alpha * (rows @ part.mT - alpha * part.square().sum(1) / 2) / spread + mask
        higher = torch.maximum(top, logits.amax(1, keepdim=True))
        weights, fade = (logits - higher).exp(), (top - higher).exp()
        total, mean = total * fade + weights.sum(1, keepdim=True), mean * fade + weights @ part
        top = higher
    return centre + mean / total


def _chunks(
    x0: Tensor, classes: Tensor | None, x: Tensor, label: Tensor | None
) -> Iterator[tuple[Rows, Tensor]]:
    """Float64 rows of the list with what is added to their logits."""
    if label is not None and classes is None:
        raise ConfigError("a label was passed, but this set of pictures was given without labels")
    groups = torch.zeros(len(x0), dtype=torch.long) if classes is None else classes
    _check_labels(groups, label)
    size = max(1, CHUNK // max(x.shape[0], x[0].numel()))
    for part, group in zip(x0.split(size), groups.split(size), strict=True):
        yield _rows(part, like=x), _log_mask(group.to(x.device), label)

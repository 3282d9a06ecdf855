"""Power-function averages of the weights, and how to rebuild one that was never kept.

Karras et al. 2023, 2312.02696, section 3. The average of relative length sigma_rel at step T gives
the weights at time t <= T the share

    p(t) dt = (gamma + 1) t^gamma / T^(gamma + 1) dt

(eq. 123). Weights do not change within a step, and `beta` integrates the profile exactly over one,
so the integrals below hold for the averages that were really kept, not only in the limit.

Post-hoc EMA: the profile of another length is approximated by a sum of the stored ones, and the
same sum of the stored weights is the average that would have been kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undiffuse.errors import ConfigError

Numbers = NDArray[np.float64]

SHORTEST, LONGEST = 0.005, 0.25  # relative lengths of an average
MOST_MISSED = 0.1  # of a profile, in its own norm, where an average is still called rebuilt
TRIED = 0.001  # lengths that far apart are tried, to say which can be rebuilt


@dataclass(frozen=True)
class Profile:
    """Which average: that of relative length `length`, as it was after `step` updates."""

    length: float
    step: int

    @property
    def gamma(self) -> float:
        return ema_gamma(self.length)


@dataclass(frozen=True)
class Mixture:
    """How an average is made of stored ones.

    Args:
        shares: of each stored average; they sum to 1, and some are negative.
        missed: distance of the mixed profile from the wanted one, relative to the wanted one.
    """

    shares: tuple[float, ...]
    missed: float


@cache
def ema_gamma(length: float) -> float:
    """gamma of a profile of relative length sigma_rel (2312.02696, eq. 126):
    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved as a cubic."""
    t = length**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(roots.real.max())


def beta(length: float, step: int) -> float:
    """What is left of the average at update number `step`: (1 - 1/step)^(gamma + 1).

    2312.02696, eq. 127. The average forgets the start of the run by itself, so it needs no warm-up.
    """
    return (1 - 1 / step) ** (ema_gamma(length) + 1)


def inner(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles."""
    return float(_inner(_numbers([one]), _numbers([other]))[0])


def _numbers(profiles: Sequence[Profile]) -> Numbers:
    """A row of gammas and one of steps."""
    return np.array([[one.gamma for one in profiles], [one.step for one in profiles]], float)


def _inner(one: Numbers, other: Numbers) -> Numbers:
    """(g + 1)(h + 1) / (g + h + 1) * m^(g + h + 1) / (S^(g + 1) T^(h + 1)), with m the smaller of
    the steps S and T; written so that no power is large."""
    (g, s), (h, t) = one, other
    m = np.minimum(s, t)
    ends = (m / s) ** (g + 1) * (m / t) ** (h + 1)
    return (g + 1) * (h + 1) / (g + h + 1) * ends / m


def weights_for(length: float, step: int, stored: Sequence[Profile]) -> Mixture:
    """The mixture of stored averages that comes nearest to the one of `length` at `step`.

    Least squares between the profiles, as 2312.02696, section 3.2, but among the sums whose shares
    add up to 1: what does not move during the run is then met exactly, and the error of what does
    is several times smaller. One that is stored is its own mixture.

    Raises:
        ConfigError: the length is outside [0.005, 0.25], or these averages leave out more than a
            tenth of it; the message says which lengths can be rebuilt.
    """
    if not SHORTEST <= length <= LONGEST:
        raise ConfigError(
            f"ema_length must be at least {SHORTEST} and at most {LONGEST}; got {length:g}"
        )
    if not stored:
        raise ConfigError(f"ema_length {length:g} needs stored averages to be rebuilt from")
    (mixture,) = _nearest([Profile(length, step)], stored)
    if mixture.missed > MOST_MISSED:
        there = ", ".join(f"{low:g} ... {high:g}" for low, high in rebuildable(step, stored))
        raise ConfigError(
            f"ema_length {length:g} at step {step} cannot be rebuilt: {len(stored)} stored averages"
            f" miss {mixture.missed:.0%} of its profile; what can be is {there or 'no length'}"
        )
    return mixture


def rebuildable(step: int, stored: Sequence[Profile]) -> list[tuple[float, float]]:
    """The ranges of lengths that `weights_for` accepts at `step`, to three digits."""
    count = round((LONGEST - SHORTEST) / TRIED)
    lengths = [round(SHORTEST + TRIED * i, 3) for i in range(count + 1)]
    mixtures = _nearest([Profile(one, step) for one in lengths], stored)
    tried = zip(lengths, (mixture.missed <= MOST_MISSED for mixture in mixtures), strict=True)
    ranges = [[x for x, _ in part] for good, part in groupby(tried, lambda one: one[1]) if good]
    return [(one[0], one[-1]) for one in ranges]


def _nearest(wanted: Sequence[Profile], stored: Sequence[Profile]) -> list[Mixture]:
    """For each wanted p minimise |p - sum x_i p_i|^2 subject to sum x_i = 1, by a multiplier.

    In float64, and in units of each profile's norm: those of early steps are high and narrow.
    """
    n, each, each_wanted = len(stored), _numbers(stored), _numbers(wanted)
    gram = _inner(each[:, :, None], each[:, None, :])
    scale, scale_wanted = np.sqrt(np.diag(gram)), np.sqrt(_inner(each_wanted, each_wanted))
    mass = scale.min() / scale  # of each scaled profile, in a unit that keeps the system balanced
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = gram / scale / scale[:, None]
    system[n, :n] = system[:n, n] = mass
    shared = _inner(each[:, :, None], each_wanted[:, None, :]) / scale[:, None] / scale_wanted
    right = np.vstack([shared, scale.min() / scale_wanted])
    x = np.linalg.lstsq(system, right, rcond=None)[0][:n]  # many snapshots are nearly dependent
    squares = 1 - 2 * (x * shared).sum(0) + (x * (system[:n, :n] @ x)).sum(0)
    shares = (x * scale_wanted / scale[:, None]).T
    missed = np.sqrt(np.maximum(squares, 0.0))
    return [Mixture(tuple(s), float(m)) for s, m in zip(shares.tolist(), missed, strict=True)]


@torch.no_grad()
def mixed(shares: Sequence[float], averages: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of shares times weights, by name: float32, added up in float64.

    `averages` is walked through once, so that one of them at a time needs memory.
    """
    total: dict[str, Tensor] = {}
    for share, weights in zip(shares, averages, strict=True):
        for name, tensor in weights.items():
            start = total.setdefault(name, torch.zeros_like(tensor, dtype=torch.float64))
            start.add_(tensor.double(), alpha=share)
    return {name: tensor.float() for name, tensor in total.items()}

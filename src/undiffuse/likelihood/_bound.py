"""A bound on bits per dimension from denoising errors alone."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.errors import ConfigError


class Bound(NamedTuple):
    """Bits per dimension under the noise of the lowest level, and of the numbers themselves."""

    noised: Float[Tensor, "..."]
    clean: Float[Tensor, "..."]


def bound_from_errors(ratios: Float[Tensor, "levels"], errors: Float[Tensor, "rows ..."]) -> Bound:
    """An upper bound on bits per dimension from mean squared errors at many noise levels (I-MMSE).

    A picture x under noise of ratio s tells itself from the data under that noise by
    KL(N(x, s^2 I) || p_s), which falls with the noise by the exact denoiser's error:

        d KL / d ln s = -E |x - D|^2 / s^2

    (Guo et al. 2005; Kong et al. 2023, 2302.03792, section 2). Summed from the highest level, where
    it is nearly 0, it gives the mean of -ln p_s, picture by picture. A worse denoiser has larger
    errors on average, hence a bound: it is that of the sampler with noise at every step (the
    variational bound, 2107.00630). `bits_per_dimension` is that of the sampler without, and usually
    below. The two agree where D is exact; their distance shows how far it is from being so.

    Args:
        ratios: sigma / alpha, rising, from far below the data's finest detail to far above their
            spread. Steps of 0.4 in their logarithm leave an error of some 1e-4.
        errors: mean squared error of the estimate of x0 per value, one row per ratio: of all
            pictures together, or of each, then with enough draws of the noise.

    Raises:
        ConfigError: fewer than three ratios, ratios that do not rise, or not as many errors.
    """
    if len(ratios) < 3 or len(ratios) != len(errors) or not bool((ratios.diff() > 0).all()):
        raise ConfigError(
            "a bound needs at least three rising ratios, and a row of errors for each;"
            f" got ratios {ratios.tolist()} and {len(errors)} rows"
        )
    t, e = ratios.double().log(), errors.double()
    squared = ratios.double().square().reshape(-1, *[1] * (e.ndim - 1))
    low, high, spread = squared[0], squared[-1], e[-1]
    # Beside a Gaussian of the data's variance, whose integral is known, little is left to sum up.
    apart = torch.trapezoid(e / squared - spread / (spread + squared), t, dim=0)
    divergence = apart + ((1 + spread / low) / (1 + spread / high)).log() / 2 + spread / high / 2
    noised = (2 * math.pi * math.e * low).log() / 2 + divergence
    # Below the lowest level 1 - e / s^2 falls with s^2: its integral is half of what it is there.
    clean = noised - (1 - e[0] / low) / 2
    return Bound(noised / math.log(2), clean / math.log(2))

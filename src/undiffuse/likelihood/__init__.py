"""How probable a denoiser holds pictures to be, in bits per dimension, with error estimates.

A denoiser D fixes the probability-flow equation (2011.13456, eq. 13), which carries pictures from
the lowest noise level to the highest without chance. In u = x / alpha over the ratio s = sigma /
alpha it is du/ds = (u - D) / s (2206.00364, section 2), and along it the log density falls by the
divergence (2011.13456, eq. 39 and appendix D.2; Chen et al. 2018, 1806.07366):

    d ln p / d ln s = -(d - tr dD/du)

At the highest level the density is known, up to a small error; so it is where the picture started.

    found = bits_per_dimension(denoiser, schedule, pictures, reading=reading_of(pictures, 8))
    found.mean, found.standard_error, found.mean_error

What a picture is taken for is a `Reading`: grey values have a probability, numbers a density.
`bound_from_errors` bounds the same from denoising errors alone, without any equation.
"""

from undiffuse.likelihood._bound import Bound, bound_from_errors
from undiffuse.likelihood._flow import EXACT_UP_TO, PROBES
from undiffuse.likelihood._measure import (
    GRIDS,
    HIGH,
    BesideExact,
    Likelihood,
    beside_exact,
    bits_per_dimension,
)
from undiffuse.likelihood._readings import (
    LOW,
    Clean,
    Grid,
    Noised,
    Point,
    Reading,
    Uniform,
    reading_of,
)

__all__ = [
    "EXACT_UP_TO",
    "GRIDS",
    "HIGH",
    "LOW",
    "PROBES",
    "BesideExact",
    "Bound",
    "Clean",
    "Grid",
    "Likelihood",
    "Noised",
    "Point",
    "Reading",
    "Uniform",
    "beside_exact",
    "bits_per_dimension",
    "bound_from_errors",
    "reading_of",
]

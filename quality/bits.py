"""Bits per dimension by the probability-flow equation, on Gaussian data, where they are known.

The exact value is that of the same pictures, so nothing but the method differs.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from quality import fields
from quality.fields import FieldTraining
from quality.harness import Finding, Lab, Task, at_most
from undiffuse.likelihood import Clean, Likelihood, bits_per_dimension
from undiffuse.noise import Karras, NoiseLevel, Stream, keyed_normal
from undiffuse.oracles import Gaussian, power_law_field

ORACLE, NETWORK = 0.001, 0.05  # bits per dimension
SIDES, PICTURES, PROBES = (8, 16), 32, 8


def exact(oracle: Gaussian, x0: Tensor) -> float:
    """Mean of -log2 density per value."""
    zero = torch.zeros((), dtype=torch.float64)
    clean = NoiseLevel(zero + 1, zero, zero)
    return -float(oracle.log_density(x0.double(), clean).mean()) / math.log(2) / x0[0].numel()


def fresh(oracle: Gaussian, seed: int, count: int) -> Tensor:
    """Pictures in float64, so that rounding has no part in the comparison."""
    noise = keyed_normal(seed, Stream.EVALUATE, range(count), tuple(oracle.mean.shape))
    return oracle.draw(noise.double())


def with_oracle(side: int, exponent: float, seed: int) -> Finding:
    oracle = power_law_field(exponent, side, side, spread=fields.SPREAD)
    x0 = fresh(oracle, seed, PICTURES)
    found = bits_per_dimension(oracle, Karras(), x0, reading=Clean(), tolerance=1e-4)
    return _finding(f"bits/oracle/{side}/exponent{exponent:g}", found, exact(oracle, x0), ORACLE)


def _finding(name: str, found: Likelihood, limit: float, bound: float) -> Finding:
    detail = {"bits": found.mean, "exact": limit, "estimated_error": found.mean_error}
    apart = abs(found.mean - limit)
    unit = "bits per dimension away from the exact value"
    return at_most(name, apart, bound, limit=0.0, unit=unit, detail=detail)


def oracle_findings(lab: Lab, seed: int) -> Iterator[Finding]:
    del lab
    for side in SIDES:
        for exponent in fields.EXPONENTS:
            yield with_oracle(side, exponent, seed)


def network_findings(training: FieldTraining, lab: Lab, seed: int) -> Iterator[Finding]:
    """The network of `quality.fields`, which was trained to denoise and nothing else."""
    oracle = training.oracle
    x0 = fresh(oracle, 1000 + seed, PICTURES)
    model = fields.trained(lab, training, seed)
    found = bits_per_dimension(
        model.denoiser, Karras(), x0.float(), reading=Clean(), num_probes=PROBES
    )
    name = f"bits/network/{training.side}/exponent{training.exponent:g}"
    yield _finding(name, found, exact(oracle, x0), NETWORK)


QUICK = (Task("bits/oracle", oracle_findings, (SIDES, fields.EXPONENTS, PICTURES)),)
TASKS = (
    *QUICK,
    *(
        Task(
            f"bits/network/{one.side}/exponent{one.exponent:g}",
            partial(network_findings, one),
            (one, PICTURES, PROBES),
        )
        for one in fields.SMALL
    ),
)

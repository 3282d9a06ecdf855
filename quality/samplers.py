"""To choose the default sampler by: every one at 4 to 50 evaluations, from the same noise.

That is `undiffuse evaluate --pareto --guidance-scale 1` on the network of `digits-best`. Its
samples are compared with the 360 held-out digits, which is fair here: no weight depends on what is
found.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from quality import digits
from quality.harness import Finding, Lab, Task
from undiffuse.config import JUDGED
from undiffuse.runs import EvaluateOptions, pareto_run

SAMPLES = 500  # pictures of each setting
PLAIN = replace(JUDGED, guidance_scale=1.0)


def findings(lab: Lab, seed: int) -> Iterator[Finding]:
    """The Fréchet distance of every sampler at every budget; the pictures' distance to those of a
    hundred evaluations stands beside it."""
    _, run = digits.trained(lab, digits.BEST, seed)
    found = pareto_run(run, EvaluateOptions(num_samples=SAMPLES, sampling=PLAIN))
    for one in (*found.settings, found.reference):
        yield Finding(
            f"samplers/{one.sampler}/{one.budget}",
            math.nan if one.frechet is None else one.frechet,
            floor=found.floor,
            unit="Fréchet distance",
            detail={"steps": one.steps, "evaluations": one.evaluations, "rms": one.rms},
        )


TASKS = (Task("samplers", findings, (digits.BEST, digits.BEST.config, SAMPLES)),)

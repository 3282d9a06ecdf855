"""S6: what becomes of an error that the network makes at one step, or at every step."""

from collections.abc import Callable
from dataclasses import replace

import torch
from matplotlib.figure import Figure
from torch import Tensor

from figures import canvas, decorate, lines
from harness import (
    HELD_OUT,
    SCHEDULE,
    Claim,
    Judgement,
    Lab,
    Numbers,
    Study,
    Table,
    Training,
    Verdict,
    mean,
    spread,
)
from nets import FIELDS, STEPS, reference
from pictures import STD
from undiffuse import noise
from undiffuse.noise import NoiseLevel, Stream, keyed_normal
from undiffuse.oracles import gaussian_flow
from undiffuse.sampling import Denoise, ddim, finish, start

SIZE = 0.05  # relative error of the predicted noise
COUNTS = (10, 30, 100, 300, 1000)  # steps of the sampler
NET_COUNTS = (10, 30, 100, 300)
PLACES = 12  # steps that get a single error
EARLY = 30  # training steps of the early checkpoint


def early(seed: int, steps: int) -> Training:
    """The reference, hardly trained."""
    return replace(reference(seed, steps), name="early checkpoint")


def trainings(lab: Lab) -> list[Training]:
    """Trained and hardly trained."""
    full, short = lab.steps(STEPS), lab.steps(EARLY)
    return [one for s in lab.seeds for one in (reference(s, full), early(s, short))]


# --- sampling with errors -----------------------------------------------------------------------


def start_noise(count: int, seed: int) -> Tensor:
    """The same beginnings for every sampler and denoiser."""
    return keyed_normal(
        seed, Stream.SAMPLE, range(count), (1, FIELDS.height, FIELDS.width)
    ).double()


def sampled(denoise: Denoise, steps: int, begin: Tensor) -> Tensor:
    """Pictures from noise by DDIM on the Karras grid."""
    grid = noise.levels(SCHEDULE, steps)
    return finish(ddim(denoise, start(grid[0], begin), grid))


def wrong(denoise: Denoise, error: Callable[[int], Tensor]) -> Denoise:
    """A denoiser whose prediction of the noise is off by error(step), step counting from 0."""
    step = -1

    def off(x: Tensor, level: NoiseLevel) -> Tensor:
        nonlocal step
        step += 1
        return denoise(x, level) - level.ratio * error(step)

    return off


def distance(pictures: Tensor, right: Tensor) -> float:
    """Root mean square, relative to the pictures' standard deviation."""
    return float((pictures - right).square().mean().sqrt()) / STD


def single(lab: Lab, steps: int, seed: int, count: int) -> dict[str, list[float]]:
    """One error at one of several steps: deviation of the final pictures, and what was injected."""
    oracle, begin = FIELDS.oracle(), start_noise(count, seed)
    places = sorted({round(i * (steps - 1) / (PLACES - 1)) for i in range(PLACES)})
    direction = SIZE * start_noise(count, seed + HELD_OUT)
    batch = begin.repeat(len(places), 1, 1, 1)
    none = torch.zeros_like(batch)
    errors = {place: none.clone() for place in places}
    for row, place in enumerate(places):
        errors[place][row * count : (row + 1) * count] = direction
    final = sampled(wrong(oracle, lambda step: errors.get(step, none)), steps, batch)
    right = sampled(oracle, steps, begin)
    grid = noise.levels(SCHEDULE, steps)
    injected = [
        distance(direction, none[:count]) * float(grid[p].ratio - grid[p + 1].ratio) for p in places
    ]  # in x, right after the step
    deviations = [distance(part, right) for part in final.split(count)]
    ratios = [float(grid[p].ratio) for p in places]
    return {"ratio": ratios, "injected": injected, "final": deviations}


def repeated(lab: Lab, steps: int, seed: int, count: int) -> dict[str, float]:
    """The same error at every step, a fresh one at every step, and the solver's own error."""
    oracle, begin = FIELDS.oracle(), start_noise(count, seed)
    right = sampled(oracle, steps, begin)
    same = SIZE * start_noise(count, seed + HELD_OUT)
    shape = (1, FIELDS.height, FIELDS.width)

    def fresh(step: int) -> Tensor:
        part = keyed_normal(seed + HELD_OUT, Stream.SAMPLE, range(count), shape, step + 1)
        return SIZE * part.double()

    grid = noise.levels(SCHEDULE, steps)
    exact = gaussian_flow(oracle, start(grid[0], begin), grid[0], grid[-1])
    return {
        "same": distance(sampled(wrong(oracle, lambda step: same), steps, begin), right),
        "fresh": distance(sampled(wrong(oracle, fresh), steps, begin), right),
        "solver": distance(right, exact),
    }


@torch.no_grad()
def of_network(lab: Lab, training: Training, steps: int, seed: int, count: int) -> float:
    """Deviation of a trained network's pictures from the exact denoiser's, same beginnings."""
    denoiser, begin = lab.trained(training), start_noise(count, seed)
    drawn = sampled(denoiser, steps, begin.float()).double()
    return distance(drawn, sampled(FIELDS.oracle(), steps, begin))


def measure(lab: Lab) -> Numbers:
    """All deviations, by seed."""
    counts = sorted({lab.steps(n) for n in COUNTS})
    nets = sorted({lab.steps(n) for n in NET_COUNTS})
    few = lab.count(8)
    runs = trainings(lab)
    return {
        "steps": counts,
        "single": {str(n): [lab.kept(single, n, s, few) for s in lab.seeds] for n in counts},
        "repeated": [[lab.kept(repeated, n, s, few) for n in counts] for s in lab.seeds],
        "network_steps": nets,
        "trained": [
            [lab.kept(of_network, run, n, s, few) for n in nets]
            for s, run in zip(lab.seeds, runs[::2], strict=True)
        ],
        "early": [
            [lab.kept(of_network, run, n, s, few) for n in nets]
            for s, run in zip(lab.seeds, runs[1::2], strict=True)
        ],
    }


# --- judging and showing ------------------------------------------------------------------------


def growth(numbers: Numbers, kind: str) -> list[float]:
    """Final deviation with the most steps over that with the fewest, by seed."""
    return [rows[-1][kind] / rows[0][kind] for rows in numbers["repeated"]]


def judge_growth(numbers: Numbers) -> Judgement:
    """More steps, more error?"""
    same, fresh = growth(numbers, "same"), growth(numbers, "fresh")
    network = [rows[-1] / rows[0] for rows in numbers["early"]]
    cases = (mean(same), mean(fresh), mean(network))
    up, flat = [c >= 2 for c in cases], [c <= 1.25 for c in cases]
    verdict = Verdict.HOLDS if all(up) else Verdict.FAILS if all(flat) else Verdict.DEPENDS
    few, most = numbers["steps"][0], numbers["steps"][-1]
    return Judgement(
        verdict,
        f"From {few} to {most} steps the final deviation changes by a factor of {spread(same)} if"
        f" the error is the same at every step and of {spread(fresh)} if it is fresh at every step."
        f" With a hardly trained network it changes by {spread(network)} from"
        f" {numbers['network_steps'][0]} to {numbers['network_steps'][-1]} steps."
        + (" An error is paid per way through the noise levels, not per step." * (not any(up))),
    )


def judge_compounding(numbers: Numbers) -> Judgement:
    """Does a single error grow on its way to the picture?"""
    most = str(numbers["steps"][-1])
    kept = [
        final / injected
        for row in numbers["single"][most]
        for final, injected in zip(row["final"], row["injected"], strict=True)
    ]
    verdict = Verdict.HOLDS if min(kept) > 1.01 else Verdict.FAILS
    verdict = Verdict.DEPENDS if max(kept) > 1.01 and verdict is Verdict.FAILS else verdict
    return Judgement(
        verdict,
        f"With the exact denoiser for all other steps, between {100 * min(kept):.2g} % and"
        f" {100 * max(kept):.3g} % of a single error is left in the final picture."
        + (" Later steps remove what does not look like data." * (verdict is Verdict.FAILS)),
    )


def judge_systematic(numbers: Numbers) -> Judgement:
    """Does an error at every step end larger than the same error at any one step?"""
    most = str(numbers["steps"][-1])
    single = [max(row["final"]) for row in numbers["single"][most]]
    every = [rows[-1]["same"] for rows in numbers["repeated"]]
    times = [e / s for e, s in zip(every, single, strict=True)]
    verdict = (
        Verdict.HOLDS if min(times) >= 2 else Verdict.DEPENDS if mean(times) > 1 else Verdict.FAILS
    )
    return Judgement(
        verdict,
        f"A {SIZE:.0%} error of the noise at all {most} steps moves the final picture by"
        f" {spread(every)} standard deviations, {spread(times)} times as much as at the worst"
        " single step.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """Deviation by number of steps."""
    kinds = {"same": "same error at every step", "fresh": "fresh error at every step"}
    rows = [
        (
            text,
            *(
                spread([r[i][kind] for r in numbers["repeated"]])
                for i in range(len(numbers["steps"]))
            ),
        )
        for kind, text in {**kinds, "solver": "no error: the sampler's own"}.items()
    ]
    missing = len(numbers["steps"]) - len(numbers["network_steps"])
    for kind, text in (("trained", "trained network"), ("early", "hardly trained network")):
        cells = [spread(list(column)) for column in zip(*numbers[kind], strict=True)]
        rows.append((text, *cells, *["–"] * missing))
    header = ("deviation of the final picture", *(f"{n} steps" for n in numbers["steps"]))
    return [Table("In standard deviations of the pictures", header, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """A single error by where it enters; errors at every step by the number of steps."""
    drawn, (left, middle, right) = canvas(3, width=4.0)
    for n, rows in numbers["single"].items():
        means = [mean(c) for c in zip(*(r["final"] for r in rows), strict=True)]
        left.plot(rows[0]["ratio"], means, marker="o", ms=3, lw=1.3, label=f"{n} steps")
    decorate(
        left, "σ/α at which one error enters", "deviation of the final picture", "one error", "xy"
    )
    kinds = {"same": "same error", "fresh": "fresh error", "solver": "no error (sampler)"}
    curves = {t: [[r[k] for r in rows] for rows in numbers["repeated"]] for k, t in kinds.items()}
    lines(middle, numbers["steps"], curves)
    decorate(
        middle,
        "steps of the sampler",
        "deviation of the final picture",
        "an error at every step",
        "xy",
    )
    nets = {"trained": numbers["trained"], "hardly trained": numbers["early"]}
    lines(right, numbers["network_steps"], nets)
    decorate(right, "steps of the sampler", "deviation of the final picture", "networks", "xy")
    return drawn


STUDY = Study(
    id="s06",
    title="Do errors add up over sampling?",
    claims=(
        Claim(
            ("T003-5",),
            "Sampling calls the network hundreds of times, and every call adds its error: more"
            " steps,"
            " more error.",
            "with growth from fewest to most steps in three cases (same error, fresh error, hardly"
            " trained network): all at least doubled: holds; all at most 1.25: fails; else depends",
            judge_growth,
        ),
        Claim(
            ("T003-5",),
            "An error compounds: it grows on its way to the final picture.",
            "holds if every single error ends more than 1 % larger than it was right after its"
            " step,"
            " fails if none does, else depends",
            judge_compounding,
        ),
        Claim(
            ("T003-5",),
            "A systematic error of the network is worse than an occasional one.",
            "holds if the same error at every step moves the final picture at least twice as far as"
            " at the worst single step, in every seed; depends if further on average; else fails",
            judge_systematic,
        ),
    ),
    how=f"""Fields of 32x32 pixels; DDIM on the Karras grid from σ = 40. The exact denoiser makes
    no error, so without injection the deviation is 0 but for rounding. An error is a fixed random
    picture added to the predicted noise, {SIZE:.0%} of its size, at one step, at every step, or
    a fresh one at every step. Networks: the reference after {STEPS} and after {EARLY} training
    steps, against the exact denoiser from the same noise. Deviations are root mean squares in
    standard deviations of the pictures.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Deviation of the final picture from the one without error, three seeds.",
)

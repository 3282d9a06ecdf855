"""S8: attention at no level, in the middle, and at ever finer levels: cost and use."""

import time
from dataclasses import replace
from functools import partial

import torch
from matplotlib.figure import Figure

from figures import COLOURS, MARKERS, NOISE_AXIS, canvas, decorate, lines
from harness import (
    LEVELS,
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
from nets import FIELDS, REFERENCE, STEPS, reference, small_unet, without_attention
from undiffuse import cost, recipes
from undiffuse.spec import Attn, UNetSpec, trace
from undiffuse.unet import UNet

NONE, MIDDLE = "none", "middle"
FINEST, COARSEST = f"middle and {FIELDS.width} px", f"middle and {FIELDS.width // 4} px"
CLEAR = 10.0  # percent less error


def specs() -> dict[str, UNetSpec]:
    """The reference, without attention, and with attention at one more level."""
    levels = {f"middle and {FIELDS.width >> level} px": level for level in (2, 1, 0)}
    more = {name: small_unet(attention_levels=(level,)) for name, level in levels.items()}
    return {NONE: without_attention(REFERENCE), MIDDLE: REFERENCE, **more}


def training(name: str, spec: UNetSpec, seed: int, steps: int) -> Training:
    """On fields, like the reference."""
    return replace(reference(seed, steps), name=f"attention: {name}", spec=spec)


def trainings(lab: Lab) -> list[Training]:
    """Every placement with every seed."""
    steps = lab.steps(STEPS)
    return [training(n, spec, s, steps) for n, spec in specs().items() for s in lab.seeds]


def attention_cost(spec: UNetSpec, side: int) -> dict[str, float]:
    """Parameters, multiply-adds, and attention's shares of both in percent."""
    size = cost.padded(spec, side, side)
    sites = [site for site in trace(spec) if isinstance(site.op, Attn)]
    parameters = cost.total_parameters(spec)
    adds = cost.total_multiply_adds(spec, side, side)
    of_sites = sum(cost.multiply_adds(site, spec.style, *size) for site in sites)
    return {
        "parameters": parameters,
        "multiply_adds": adds,
        "parameter_share": 100 * sum(cost.parameters(s, spec.style) for s in sites) / parameters,
        "multiply_add_share": 100 * of_sites / adds,
    }


@torch.no_grad()
def milliseconds(lab: Lab, spec: UNetSpec, repeats: int) -> float:
    """Of one forward pass of 16 pictures: the fastest of some."""
    net, times = UNet(spec).eval(), list[float]()
    x, timestep = torch.zeros(16, 1, FIELDS.height, FIELDS.width), torch.zeros(16)
    for _ in range(repeats):
        began = time.perf_counter()
        net(x, timestep, None)
        times.append(1000 * (time.perf_counter() - began))
    return round(min(times), 2)


def measure(lab: Lab) -> Numbers:
    """Cost and error of every placement; cost at full size."""
    steps, small = lab.steps(STEPS), dict[str, Numbers]()
    for name, spec in specs().items():
        runs = [training(name, spec, seed, steps) for seed in lab.seeds]
        small[name] = {
            **attention_cost(spec, FIELDS.width),
            "milliseconds": lab.kept(milliseconds, spec, lab.count(20)),
            "excess": [lab.errors(run)["excess"] for run in runs],
        }
    return {"ratio": list(LEVELS), "small": small, "full": full_size()}


def full_size() -> dict[str, dict[str, float]]:
    """Text 001's tested configuration at 64 pixels with attention at one level."""
    levels = {f"{64 >> level} px": (level,) for level in (3, 2, 1, 0)}
    made = {name: recipes.text001(attention_levels=chosen) for name, chosen in levels.items()}
    made = {"middle only": recipes.text001(attention_levels=()), **made}
    return {name: attention_cost(spec, 64) for name, spec in made.items()}


# --- judging and showing ------------------------------------------------------------------------


def judge_cost(numbers: Numbers) -> Judgement:
    """Fine levels are dear."""
    full, small = numbers["full"], numbers["small"]
    low, high = full["8 px"]["multiply_adds"], full["64 px"]["multiply_adds"]
    times = {name: one["milliseconds"] for name, one in small.items()}
    slower = times[FINEST] / times[MIDDLE]
    verdict = Verdict.HOLDS if high >= 1.5 * low and slower >= 1.5 else Verdict.DEPENDS
    verdict = Verdict.FAILS if high < 1.5 * low and slower < 1.5 else verdict
    return Judgement(
        verdict,
        f"At full size attention at 64 px takes {full['64 px']['multiply_add_share']:.0f} % of all"
        f" multiply-adds, at 8 px {full['8 px']['multiply_add_share']:.1f} % (all of them:"
        f" {high / 1e9:.1f} G and {low / 1e9:.1f} G). The small network takes {slower:.1f} times as"
        " long with attention at full resolution as with attention in the middle only.",
    )


def gain(numbers: Numbers, name: str, than: str) -> list[float]:
    """How much less excess error, in percent, by seed; mean over levels."""
    rows = (numbers["small"][one]["excess"] for one in (name, than))
    return [100 * (1 - mean(a) / mean(b)) for a, b in zip(*rows, strict=True)]


def judge_use(numbers: Numbers, name: str, than: str) -> Judgement:
    """Clearly less error in every seed, on average, or not."""
    gains = gain(numbers, name, than)
    verdict = Verdict.HOLDS if min(gains) >= CLEAR else Verdict.DEPENDS
    verdict = Verdict.FAILS if mean(gains) < CLEAR / 2 else verdict
    return Judgement(
        verdict,
        f"Attention '{name}' instead of '{than}' changes the excess error by"
        f" {spread([-g for g in gains])} %, on fields, whose best denoiser is a linear filter.",
    )


def judge_enough(numbers: Numbers) -> Judgement:
    """Fine levels add nothing that coarse ones do not give."""
    return _little(numbers, FINEST, COARSEST)


def judge_minor(numbers: Numbers) -> Judgement:
    """The 8-pixel level adds little to the middle."""
    return _little(numbers, COARSEST, MIDDLE)


def _little(numbers: Numbers, name: str, than: str) -> Judgement:
    gains = gain(numbers, name, than)
    verdict = Verdict.HOLDS if max(gains) < CLEAR else Verdict.DEPENDS
    verdict = Verdict.FAILS if min(gains) >= CLEAR else verdict
    return Judgement(
        verdict,
        f"Attention '{name}' instead of '{than}' changes the excess error by"
        f" {spread([-g for g in gains])} %.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """Small networks with their errors, then the full-size costs."""
    small = [
        (
            name,
            f"{one['parameters']:,} ({one['parameter_share']:.1f} %)",
            f"{one['multiply_adds'] / 1e6:.1f} M ({one['multiply_add_share']:.1f} %)",
            f"{one['milliseconds']:.1f}",
            spread([mean(row) for row in one["excess"]]),
        )
        for name, one in numbers["small"].items()
    ]
    full = [
        (
            name,
            f"{one['parameters']:,} ({one['parameter_share']:.1f} %)",
            f"{one['multiply_adds'] / 1e9:.2f} G ({one['multiply_add_share']:.1f} %)",
        )
        for name, one in numbers["full"].items()
    ]
    head = ("attention", "parameters (its share)", "multiply-adds (its share)")
    return [
        Table(
            "Small networks on 32-pixel fields",
            (*head, "ms, 16 pictures forward", "excess error, percent"),
            tuple(small),
        ),
        Table("Text 001's tested configuration at 64 pixels", head, tuple(full)),
    ]


def figure(numbers: Numbers) -> Figure:
    """Error by level; error against time."""
    drawn, (left, right) = canvas(2, width=4.8)
    small = numbers["small"]
    lines(left, numbers["ratio"], {name: one["excess"] for name, one in small.items()})
    decorate(left, NOISE_AXIS, "excess error, percent", "by noise level", "xy")
    for colour, marker, (name, one) in zip(COLOURS, MARKERS, small.items(), strict=False):
        errors = [mean(row) for row in one["excess"]]
        where = [one["milliseconds"]] * len(errors)
        right.plot(where, errors, marker, color=colour, ms=5, label=name)
    decorate(right, "milliseconds for 16 pictures", "excess error, percent", "cost and use")
    right.set_ylim(bottom=0)
    return drawn


STUDY = Study(
    id="s08",
    title="Attention: its share, its cost, its use",
    claims=(
        Claim(
            ("T000-12",),
            "Attention is costly at high resolution.",
            "two tests: at full size the network with attention at 64 px needs at least 1.5 times"
            " the"
            " multiply-adds of that with attention at 8 px; the small network at least 1.5 times"
            " the time with attention at full resolution. Both: holds, none: fails, else depends",
            judge_cost,
        ),
        Claim(
            ("T000-12",),
            "Attention at low resolution is enough: at high resolution it adds little.",
            f"holds if it saves less than {CLEAR:g} % of the excess error in every seed, fails if"
            " at least that in every seed, else depends",
            judge_enough,
        ),
        Claim(
            ("T003-15",),
            "Attention in the middle belongs to a good network.",
            f"holds if it saves at least {CLEAR:g} % of the excess error in every seed, fails if"
            f" less than {CLEAR / 2:g} % on average, else depends",
            partial(judge_use, name=MIDDLE, than=NONE),
        ),
        Claim(
            ("T001-17",),
            "Removing attention from the 8-pixel level has a minor effect on quality.",
            "the effect is minor where attention there is not clearly useful: holds if it saves"
            " less"
            f" than {CLEAR:g} % of the excess error in every seed, fails if at least that in every"
            " seed, else depends",
            judge_minor,
        ),
    ),
    how=f"""The reference network on fields with attention (one head) nowhere, in the middle only,
    or in the middle and after every block of one level; {STEPS} steps, three seeds. A Gaussian
    field needs nothing but a fixed linear filter for each noise level, so what attention could
    do on real pictures, comparing contents, has no use here; its reach has. Costs at full size
    are counted.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Left: error beyond the optimum. Right: the same, averaged, against the time it takes.",
)

"""S3: how far networks see, counted, measured by gradients, and what they really use."""

from itertools import chain
from typing import Any

import torch
from matplotlib.figure import Figure

from figures import NOISE_AXIS, canvas, decorate, lines
from harness import LEVELS, Claim, Judgement, Lab, Numbers, Study, Table, Training, Verdict, noised
from nets import FIELDS, STEPS, reference
from receptive import effective_side, gradient_mass, measured_side, seen_by, sides
from s04_naive_against_unet import PLAIN_FAST, specs, training
from undiffuse import recipes
from undiffuse.noise import NoiseLevel
from undiffuse.oracles import Gaussian
from undiffuse.spec import Attn, UNetSpec

NAIVE, TEXT003 = "naive CNN", "text 003"
CENTRE = (16, 16)
PATCH = 16


def networks() -> dict[str, UNetSpec]:
    """Everything whose reach is counted."""
    return {
        NAIVE: recipes.naive(),
        "text 002, diagram": recipes.text002(pairs=2),
        "two levels, two blocks": recipes.ddpm_family(32, (1, 2), 2, ()),
        "text 000": recipes.text000(),
        "text 002": recipes.text002(),
        "text 001, listing": recipes.text001_listing(),
        "text 000, figure": recipes.text000_figure(),
        TEXT003: recipes.text003(),
        "text 001, tested configuration": recipes.text001(),
        "DDPM": recipes.preset("ddpm"),
        "Improved DDPM": recipes.preset("improved"),
        "ADM, 64 pixels": recipes.preset("adm-64"),
        "DDPM, 256 pixels": recipes.preset("highres"),
    }


def plain(seed: int, steps: int) -> Training:
    """The plain network with as many multiply-adds as the reference, which S4 trains too."""
    return training(PLAIN_FAST, specs()[PLAIN_FAST], seed, steps)


def trainings(lab: Lab) -> tuple[Training, ...]:
    """The reference and the plain network."""
    steps = lab.steps(STEPS)
    return tuple(chain.from_iterable((reference(s, steps), plain(s, steps)) for s in lab.seeds))


def measure(lab: Lab) -> Numbers:
    """Reach of every network; effective fields by noise level; what a bottleneck position sees."""
    steps = lab.steps(STEPS)
    return {
        "reach": {name: _reach(spec) for name, spec in networks().items()},
        "patch": _patch(recipes.text003()),
        "ratio": list(LEVELS),
        "reference": [lab.kept(effective, reference(s, steps), lab.count(16)) for s in lab.seeds],
        "plain": [lab.kept(effective, plain(s, steps), lab.count(16)) for s in lab.seeds],
        "optimum": [_best_side(ratio) for ratio in LEVELS],
    }


def _reach(spec: UNetSpec) -> dict[str, list[int]]:
    lengths = [len(seen_by(spec, position)) for position in range(spec.stride)]
    places = [lengths.index(min(lengths)), lengths.index(max(lengths))]
    return {"counted": list(sides(spec)), "measured": [measured_side(spec, p) for p in places]}


def _patch(spec: UNetSpec) -> dict[str, int]:
    """Stride and reach of a position of the deepest features, before attention."""
    ops = next(i for i, op in enumerate(spec.program) if isinstance(op, Attn))
    return {"stride": spec.stride, "reach": len(seen_by(spec, 0, ops))}


def effective(lab: Lab, training: Training, count: int) -> list[int]:
    """By noise level: the side that holds 90 % of the gradient of the central pixel."""
    denoiser, found = lab.trained(training), list[int]()
    for ratio in LEVELS:
        _, x, level = noised(FIELDS, ratio, count)
        x = x.requires_grad_(True)
        (mass,) = gradient_mass(denoiser(x, level), x, [CENTRE])
        found.append(effective_side(mass, CENTRE))
    return found


def _best_side(ratio: float) -> int:
    """The same of the best possible denoiser, whose gradient is a row of the Wiener filter."""
    one = torch.ones((), dtype=torch.float64)
    return effective_side(_wiener_row(FIELDS.oracle(), NoiseLevel(one, ratio * one, one)), CENTRE)


def _wiener_row(gaussian: Gaussian, level: NoiseLevel) -> torch.Tensor:
    unit = torch.zeros(1, *gaussian.mean.shape, dtype=torch.float64)
    unit[0, 0, CENTRE[0], CENTRE[1]] = 1.0
    return gaussian(unit, level)[0, 0]  # the mean is 0 and the filter symmetric


# --- judging and showing ------------------------------------------------------------------------


def judge_naive(numbers: Numbers) -> Judgement:
    """11 x 11."""
    reach = numbers["reach"][NAIVE]
    sizes = {*reach["counted"], *reach["measured"]}
    verdict = Verdict.HOLDS if sizes == {11} else Verdict.FAILS
    needed = max(numbers["optimum"])
    return Judgement(
        verdict,
        f"Counted {reach['counted'][0]} pixels, measured {reach['measured'][0]}. On 32-pixel fields"
        f" the best possible denoiser has 90 % of its weight in a square of side"
        f" {min(numbers['optimum'])} at the lowest noise level, and of {needed} at most.",
    )


def judge_patch(numbers: Numbers) -> Judgement:
    """A position of the deepest features stands for a patch of 16 pixels."""
    patch = numbers["patch"]
    verdict = Verdict.HOLDS if patch["reach"] == PATCH else Verdict.FAILS
    return Judgement(
        verdict,
        f"{patch['stride']} pixels is the distance between neighbouring positions. Through its"
        f" convolutions alone each position sees {patch['reach']} pixels a side.",
    )


def judge_scales(numbers: Numbers) -> Judgement:
    """Every U-Net sees the whole of the pictures it is made for; deeper networks see further."""
    wide = {name: reach["counted"][0] for name, reach in numbers["reach"].items() if name != NAIVE}
    least = min(wide, key=lambda name: wide[name])
    used = [max(row) / min(row) for row in numbers["reference"]]
    verdict = Verdict.HOLDS if min(used) >= 1.5 else Verdict.FAILS
    return Judgement(
        verdict,
        f"The trained U-Net uses a square {min(used):.1f} to {max(used):.1f} times as wide at one"
        f" noise level as at another. Even the smallest reach of a U-Net here, {least}, is"
        f" {wide[least]} pixels.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """Counted beside measured, and the effective sides."""
    rows = [
        (name, _range(reach["counted"]), _range(reach["measured"]))
        for name, reach in numbers["reach"].items()
    ]
    reach = Table("Side in pixels", ("network", "counted", "measured"), tuple(rows))
    return [reach, _effective_table(numbers)]


def _range(both: list[int]) -> str:
    return str(both[0]) if both[0] == both[1] else f"{both[0]}–{both[1]}"


def _effective_table(numbers: Numbers) -> Table:
    columns = zip(
        numbers["ratio"],
        zip(*numbers["plain"], strict=True),
        zip(*numbers["reference"], strict=True),
        numbers["optimum"],
        strict=True,
    )
    rows = tuple((f"{r:g}", _seeds(p), _seeds(u), str(o)) for r, p, u, o in columns)
    title = "Side that holds 90 % of the gradient (one value per seed)"
    return Table(title, ("σ/α", "plain CNN", "U-Net", "best possible"), rows)


def _seeds(values: tuple[Any, ...]) -> str:
    return ", ".join(str(v) for v in values)


def figure(numbers: Numbers) -> Figure:
    """Reach of the networks, and what the trained ones use."""
    drawn, (left, right) = canvas(2, width=4.6)
    for place, reach in enumerate(numbers["reach"].values()):
        left.barh(place, reach["counted"][1], color="#2f6db3", height=0.62)
        left.plot(reach["measured"][1], place, "x", color="#d9731a", ms=5)
        left.annotate(
            _range(reach["counted"]), (reach["counted"][1], place), (7, 0),
            textcoords="offset points", va="center", fontsize=7,
        )  # fmt: skip
    left.set_yticks(range(len(numbers["reach"])), list(numbers["reach"]), fontsize=7)
    left.invert_yaxis()
    left.set_xlim(8, 9000)
    decorate(
        left, "side of the receptive field, pixels", "", "counted (bar), measured (×)", "x", False
    )
    curves = {name: numbers[name] for name in ("plain", "reference")}
    named = {"plain CNN": curves["plain"], "U-Net": curves["reference"]}
    lines(right, numbers["ratio"], {**named, "best possible": [numbers["optimum"]]})
    decorate(
        right, NOISE_AXIS, "side with 90 % of the gradient, pixels", "used on 32-pixel fields", "x"
    )
    return drawn


STUDY = Study(
    id="s03",
    title="How far networks see",
    claims=(
        Claim(
            ("T003-7",),
            "Five 3x3 convolutions see 11x11 pixels.",
            "holds if both the count and the gradient say 11",
            judge_naive,
        ),
        Claim(
            ("T003-12",),
            "In features of a sixteenth of the size, every position stands for a patch of 16x16"
            " pixels.",
            "holds if the reach of such a position in text 003's network is 16 pixels",
            judge_patch,
        ),
        Claim(
            ("T003-3",),
            "How much context a denoiser uses depends on the noise level.",
            "holds if in every seed the trained U-Net's widest effective field is at least 1.5"
            " times its narrowest",
            judge_scales,
        ),
    ),
    how="""The reach is counted by walking each program backwards, and measured as the support of
    the gradient of one output pixel, in a copy of the network two channels wide with positive
    weights, norms and attention left out (both reach every pixel). A range means that it
    depends on where the pixel lies within the stride. Used reach: the smallest square around
    the central pixel that holds 90 % of the absolute gradient, in the reference network and a
    plain CNN trained on fields, beside the exact best denoiser, whose gradient is a row of the
    Wiener filter.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="""Left: receptive fields, smallest to largest. Right: the part of its field that a
    trained network uses, by noise level; the plain CNN cannot follow the optimum beyond 11
    pixels.""",
)

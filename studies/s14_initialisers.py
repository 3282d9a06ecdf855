"""S14: how weights start: torch's default, default and zeros, text 001's initialiser, ours."""

from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from figures import NOISE_AXIS, canvas, decorate, lines
from harness import (
    HELD_OUT,
    LEVELS,
    Claim,
    Judgement,
    Lab,
    Numbers,
    Study,
    Table,
    Training,
    Verdict,
    build,
    mean,
    spread,
)
from nets import STEPS, small_unet
from pictures import Fields
from s13_norm_order import binned
from undiffuse import textbook
from undiffuse.unet import ConcatSkip, Head, UNet

FIELDS = Fields(16, 16, torus=32)
DEFAULT, ZEROS = "torch's default", "default and zeros"
TEXT, OURS = "text 001, as printed", "text 001, zeros kept"
CLEAR = 1.1  # times the excess


def as_printed(net: UNet) -> None:
    """Text 001's initialiser as its code says it, with every layer drawn anew.

    Convolutions: Kaiming normal, fan out, ReLU gain. Linear layers: Xavier uniform. Norms: 1 and 0.
    Biases 0. Only the output convolution becomes zero: zeros that blocks started with are lost.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    (head,) = (layer for layer in net.layers.values() if isinstance(layer, Head))
    nn.init.zeros_(head.conv.weight)


def zeros_kept(net: UNet) -> None:
    """The same, but a layer that is zero on entry stays zero."""
    textbook.initialize_weights(net)


def training(name: str, seed: int, steps: int) -> Training:
    """The small network on fields with one of the four starts."""
    if name == DEFAULT:
        return Training(name, small_unet(zero_init=False), FIELDS, seed, steps)
    if name == ZEROS:
        return Training(name, small_unet(), FIELDS, seed, steps)
    prepare = as_printed if name == TEXT else zeros_kept
    return Training(name, small_unet(), FIELDS, seed, steps, prepare=prepare)


KINDS = (DEFAULT, ZEROS, TEXT, OURS)


def trainings(lab: Lab) -> list[Training]:
    """Every start with every seed."""
    return [training(name, seed, lab.steps(STEPS)) for name in KINDS for seed in lab.seeds]


def at_last_join(lab: Lab, run: Training) -> float:
    """Size of the features that come up, per size of the skip they meet, before training."""
    net, sizes = build(run).eval(), list[float]()

    def look(layer: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        up, skip = inputs
        sizes.append(float(up.square().mean().sqrt() / skip.square().mean().sqrt()))

    joins = [layer for layer in net.layers.values() if isinstance(layer, ConcatSkip)]
    joins[-1].register_forward_pre_hook(look)
    with torch.no_grad():
        net(2 * FIELDS.held_out(16, HELD_OUT), torch.zeros(16), None)  # of variance 1
    return sizes[0]


def measure(lab: Lab) -> Numbers:
    """Errors, the course of training, and how the first features compare in size."""
    found = dict[str, Numbers]()
    for name in KINDS:
        runs = [training(name, seed, lab.steps(STEPS)) for seed in lab.seeds]
        histories = [lab.history(run) for run in runs]
        found[name] = {
            "first_loss": [one.losses[0] for one in histories],
            "last_join": [lab.kept(at_last_join, run) for run in runs],
            "losses": [binned(one.losses) for one in histories],
            "excess": [lab.errors(run)["excess"] for run in runs],
        }
    return {"ratio": list(LEVELS), "starts": found}


# --- judging and showing ------------------------------------------------------------------------


def times_worse(numbers: Numbers, name: str, than: str) -> list[float]:
    """Mean excess of one divided by that of another, seed by seed."""
    rows = (numbers["starts"][one]["excess"] for one in (name, than))
    return [mean(a) / mean(b) for a, b in zip(*rows, strict=True)]


def judge(numbers: Numbers, name: str, than: str) -> Judgement:
    """Clearly better, or not."""
    better = times_worse(numbers, than, name)
    verdict = Verdict.HOLDS if min(better) >= CLEAR else Verdict.DEPENDS
    verdict = Verdict.FAILS if mean(better) <= 1.0 else verdict
    return Judgement(
        verdict,
        f"'{than}' ends with {spread(better)} times the excess error of '{name}'. Before training,"
        " features that meet the last skip are"
        f" {spread(numbers['starts'][than]['last_join'])} and"
        f" {spread(numbers['starts'][name]['last_join'])} times as large as it.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """One row per start."""
    rows = [
        (
            name,
            spread(one["last_join"]),
            spread(one["first_loss"]),
            spread([mean(row[: max(1, len(row) // 10)]) for row in one["losses"]]),
            spread([row[-1] for row in one["losses"]]),
            spread([mean(row) for row in one["excess"]]),
        )
        for name, one in numbers["starts"].items()
    ]
    header = (
        "start",
        "features / skip at the last join",
        "first loss",
        "first tenth",
        "last thirtieth",
        "excess error, percent",
    )
    return [Table("Training and error", header, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """The course of training, and error by level."""
    drawn, (left, right) = canvas(2)
    starts = numbers["starts"]
    curves = {name: one["losses"] for name, one in starts.items()}
    bins = len(curves[DEFAULT][0])
    lines(left, [STEPS * (i + 0.5) / bins for i in range(bins)], curves)
    decorate(left, "training step", "loss", "the course of training", "x")
    lines(right, numbers["ratio"], {name: one["excess"] for name, one in starts.items()})
    decorate(right, NOISE_AXIS, "excess error, percent", "at the end", "xy", legend=False)
    return drawn


RULE = (
    f"holds if the other ends with at least {CLEAR:g} times the excess error in every seed, fails"
    " if with no more on average, else depends"
)

STUDY = Study(
    id="s14",
    title="Initialisers",
    claims=(
        Claim(
            ("T001-18",),
            "The printed initialiser (Kaiming, Xavier, zero output) is better than torch's"
            " default.",
            RULE,
            partial(judge, name=TEXT, than=DEFAULT),
        ),
        Claim(
            ("T001-18",),
            "Residual branches should start small: with the last layer of each block at zero, which"
            " the text advises and its code does not do, the same initialiser is better.",
            RULE,
            partial(judge, name=OURS, than=TEXT),
        ),
        Claim(
            ("T001-18",),
            "Kaiming and Xavier are better than torch's default when both keep those zeros.",
            RULE,
            partial(judge, name=OURS, than=ZEROS),
        ),
    ),
    how=f"""The small network on fields of 16x16 pixels, {STEPS} steps of 16 pictures, three
    seeds; only the first weights differ. Zeros are those of the last convolution of every
    block, the projection of every attention, and the output layer.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Loss while training, and error beyond the optimum at the end, for four starts.",
)

"""S12: how much gradient reaches the first block: depth, skips, and plain CNNs."""

from collections.abc import Callable
from dataclasses import replace

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn

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
    build,
    mean,
    spread,
    unprepared,
)
from nets import FIELDS, plain_cnn, small_unet, without_skips
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.noise import Stream, keyed_normal
from undiffuse.spec import Act, Res, UNetSpec, trace
from undiffuse.unet import UNet

SKIPS, CUT = "with skips", "without skips"
DEFAULT, HE = "torch's default", "He's"
DEPTHS = (1, 2, 3, 4, 5, 6)
LAYERS = (4, 8, 16, 32)  # hidden layers of the plain CNN; text 003's has 4
WIDTH, STEPS = 12, 100
VANISHED = 0.01  # gradient at the first layer, as a share of that at the last
CLEAR = 2.0


def deep(depth: int, skips: bool, zero_init: bool) -> UNetSpec:
    """`depth` levels of equal width, one block each, no attention."""
    whole = small_unet((WIDTH,) * depth, middle=(), zero_init=zero_init)
    return whole if skips else without_skips(whole)


def training(depth: int, skips: bool, seed: int, steps: int) -> Training:
    """A deep network on fields, for a short while."""
    name = f"{depth} levels {SKIPS if skips else CUT}"
    return Training(name, deep(depth, skips, zero_init=True), FIELDS, seed, steps)


def he_normal(net: UNet) -> None:
    """He's initialisation (1502.01852), which keeps the gradient's size through ReLU layers."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


# --- measuring ----------------------------------------------------------------------------------


def loss(net: UNet) -> Tensor:
    """Of 16 held-out fields, one noise level each."""
    x0 = FIELDS.held_out(16, HELD_OUT)
    noise = keyed_normal(HELD_OUT, Stream.EVALUATE, range(16), tuple(x0.shape[1:]))
    level = SCHEDULE((torch.arange(16) + 0.5) / 16).like(x0)
    return Denoiser(net, SCHEDULE, KarrasPrecond()).loss(x0, noise, level).mean()


def feature_gradients(net: UNet) -> list[float]:
    """|d loss / d features| after each block (in plain CNNs: each activation), in order."""
    net.requires_grad_(True)
    kinds = (Res, Act)
    names = [site.name for site in trace(net.spec) if isinstance(site.op, kinds)]
    kept = list[Tensor]()
    hooks = [net.layers[name].register_forward_hook(_keeper(kept)) for name in names]
    loss(net).backward()
    for hook in hooks:
        hook.remove()
    return [0.0 if f.grad is None else float(f.grad.norm()) for f in kept]


def _keeper(kept: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    def keep(layer: nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    return keep


def untrained(lab: Lab, run: Training) -> list[float]:
    """Of the first weights."""
    return feature_gradients(build(run))


def after_training(lab: Lab, run: Training) -> list[float]:
    """Of the averaged weights."""
    net = lab.trained(run).net
    assert isinstance(net, UNet)
    return feature_gradients(net)


def plain(layers: int, seed: int, prepare: Callable[[UNet], None]) -> Training:
    """Text 003's plain network, `layers` hidden layers of equal width; never trained here."""
    return Training("plain", plain_cnn(16 * layers, layers), FIELDS, seed, 0, prepare=prepare)


def trainings(lab: Lab) -> list[Training]:
    """The deepest networks."""
    steps = lab.steps(STEPS)
    return [training(DEPTHS[-1], skips, s, steps) for skips in (True, False) for s in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Gradients after every block."""
    return {
        **{SKIPS if skips else CUT: _measured(lab, skips) for skips in (True, False)},
        "plain": {
            name: [
                [lab.kept(untrained, plain(layers, s, prepare)) for layers in LAYERS]
                for s in lab.seeds
            ]
            for name, prepare in ((DEFAULT, unprepared), (HE, he_normal))
        },
    }


def _measured(lab: Lab, skips: bool) -> Numbers:
    steps = lab.steps(STEPS)
    runs = [training(DEPTHS[-1], skips, seed, steps) for seed in lab.seeds]
    zeros = [[training(d, skips, s, steps) for d in DEPTHS] for s in lab.seeds]
    usual = [[replace(r, spec=deep(d, skips, False)) for d, r in _paired(row)] for row in zeros]
    return {
        "untrained": [[lab.kept(untrained, run) for run in row] for row in usual],
        "zeros": [[lab.kept(untrained, run) for run in row] for row in zeros],
        "trained": [lab.kept(after_training, run) for run in runs],
        "excess": [lab.errors(run, count=32)["excess"] for run in runs],
    }


def _paired(row: list[Training]) -> list[tuple[int, Training]]:
    return list(zip(DEPTHS, row, strict=True))


# --- judging and showing ------------------------------------------------------------------------


def share(gradients: list[float]) -> float:
    """Gradient after the first layer as a share of that after the last."""
    return gradients[0] / gradients[-1] if gradients[-1] else 0.0


def shares(numbers: Numbers, name: str) -> list[list[float]]:
    """Untrained, seeds x depths."""
    return [[share(one) for one in row] for row in numbers[name]["untrained"]]


def judge_skips(numbers: Numbers) -> Judgement:
    """More gradient at the first block, when untrained and when trained."""
    trained = {n: [[share(one)] for one in numbers[n]["trained"]] for n in (SKIPS, CUT)}
    apart = (
        _times(shares(numbers, SKIPS), shares(numbers, CUT)),
        _times(trained[SKIPS], trained[CUT]),
    )
    votes = [min(one) >= CLEAR for one in apart]
    verdict = Verdict.HOLDS if all(votes) else Verdict.DEPENDS
    verdict = Verdict.FAILS if all(mean(one) < 1.25 for one in apart) else verdict
    before = [spread([row[-1] for row in shares(numbers, name)]) for name in (SKIPS, CUT)]
    after = [spread([row[0] for row in trained[name]]) for name in (SKIPS, CUT)]
    return Judgement(
        verdict,
        f"At {DEPTHS[-1]} levels the first block's share is {before[0]} with skips and {before[1]}"
        f" without before training (quotient {spread(apart[0])}), {after[0]} and {after[1]} after"
        f" {STEPS} steps (quotient {spread(apart[1])}).{_remark(numbers)}",
    )


def _remark(numbers: Numbers) -> str:
    """Why a network without skips has gradients too, if it has."""
    least = min(min(row) for row in shares(numbers, CUT))
    if least < VANISHED:
        return ""
    return (
        f" Without skips it never falls below {least:.2g} before training, at any depth: every"
        " block has a shortcut of its own."
    )


def _times(rows: list[list[float]], others: list[list[float]]) -> list[float]:
    """Quotient of the last entries, seed by seed."""
    return [a[-1] / max(b[-1], 1e-12) for a, b in zip(rows, others, strict=True)]


def judge_plain(numbers: Numbers) -> Judgement:
    """At text 003's depth, or at a larger one."""
    found = {n: [[share(one) for one in row] for row in r] for n, r in numbers["plain"].items()}
    default = list(zip(*found[DEFAULT], strict=True))
    gone = [max(seeds) < VANISHED for seeds in default]
    verdict = Verdict.HOLDS if gone[0] else Verdict.DEPENDS if any(gone) else Verdict.FAILS
    told = "; ".join(
        f"{layers} hidden layers {spread(list(default[i]))}, with He's start"
        f" {spread([row[i] for row in found[HE]])}"
        for i, layers in enumerate(LAYERS)
    )
    return Judgement(verdict, f"Gradient at the first layer as a share of the last's: {told}.")


def judge_deep(numbers: Numbers) -> Judgement:
    """Deep networks train with skips and not without."""
    ends = {name: [mean(row) for row in numbers[name]["excess"]] for name in (SKIPS, CUT)}
    worse = [b / a for a, b in zip(ends[SKIPS], ends[CUT], strict=True)]
    verdict = Verdict.HOLDS if min(worse) >= CLEAR else Verdict.DEPENDS
    verdict = Verdict.FAILS if mean(worse) < 1.1 else verdict
    return Judgement(
        verdict,
        f"After {STEPS} steps {DEPTHS[-1]} levels have an excess error of {spread(ends[SKIPS])} %"
        f" with skips and {spread(ends[CUT])} % without. Without them there is less to train with:"
        " detail cannot pass either, so gradients are not the only reason.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """By depth, and plain CNNs."""
    nets = [
        (
            f"{depth}",
            *(spread([row[i] for row in shares(numbers, name)]) for name in (SKIPS, CUT)),
            spread([max(row[i]) for row in numbers[SKIPS]["zeros"]]),
        )
        for i, depth in enumerate(DEPTHS)
    ]
    found = numbers["plain"]
    plains = [
        (
            f"{layers}",
            *(spread([share(row[i]) for row in rows]) for rows in found.values()),
            *(spread([row[i][0] for row in rows]) for rows in found.values()),
        )
        for i, layers in enumerate(LAYERS)
    ]
    head = ("levels", SKIPS, CUT, "largest gradient if built with zeros")
    starts = tuple(found)
    head_plain = ("hidden layers", *starts, *(f"{name}, absolute" for name in starts))
    return [
        Table("U-Nets before training: first block's gradient / last block's", head, tuple(nets)),
        Table("Plain CNNs before training: first layer / last layer", head_plain, tuple(plains)),
    ]


def figure(numbers: Numbers) -> Figure:
    """Along the deepest network; by depth; plain CNNs."""
    drawn, (along, by_depth, plains) = canvas(3, width=4.2)
    curves = {f"{n}, untrained": [row[-1] for row in numbers[n]["untrained"]] for n in (SKIPS, CUT)}
    curves |= {f"{n}, trained": numbers[n]["trained"] for n in (SKIPS, CUT)}
    blocks = range(1, len(next(iter(curves.values()))[0]) + 1)
    relative = {n: [[v / row[-1] for v in row] for row in rows] for n, rows in curves.items()}
    lines(along, list(blocks), relative)
    decorate(along, "block, in order", "gradient / last block's", f"{DEPTHS[-1]} levels", "y")
    along.yaxis.set_major_locator(LogLocator(numticks=9))
    along.set_ylim(bottom=0.3 * min(min(row) for rows in relative.values() for row in rows) ** 1.5)
    along.set_xticks([1, 5, 10, 15, 20])
    along.legend(loc="lower center", ncols=2, fontsize=7, frameon=False)
    lines(by_depth, DEPTHS, {name: shares(numbers, name) for name in (SKIPS, CUT)})
    decorate(by_depth, "levels", "first block / last block", "untrained U-Nets", "y")
    found = {n: [[share(one) for one in row] for row in r] for n, r in numbers["plain"].items()}
    lines(plains, LAYERS, {f"{name} start": rows for name, rows in found.items()})
    decorate(plains, "hidden layers", "first layer / last layer", "untrained plain CNNs", "xy")
    plains.yaxis.set_major_locator(LogLocator(numticks=9))
    return drawn


STUDY = Study(
    id="s12",
    title="Gradients on their way back",
    claims=(
        Claim(
            ("T003-10", "T003-16"),
            "Skips give the gradient a short way to the first layers.",
            f"at {DEPTHS[-1]} levels, untrained and trained, the first block's share of the last"
            f" block's gradient, with skips divided by without: holds if at least {CLEAR:g} in"
            " every seed both times, fails if both means are below 1.25, else depends",
            judge_skips,
        ),
        Claim(
            ("T003-7",),
            "In a plain CNN gradients vanish.",
            f"vanished: below {VANISHED:g} at the first layer, as a share of the last's, in every"
            f" seed. Holds if so at text 003's {LAYERS[0]} hidden layers, depends if at more layers"
            " only, fails if never, with torch's default start",
            judge_plain,
        ),
        Claim(
            ("T003-16",),
            "Skips make it possible to train very deep networks.",
            f"after {STEPS} steps at {DEPTHS[-1]} levels: holds if the excess error without skips"
            f" is at least {CLEAR:g} times that with, in every seed; fails if below 1.1 times on"
            " average; else depends",
            judge_deep,
        ),
    ),
    how=f"""The gradient of the loss with respect to the features after every block, for one
    batch of 16 held-out fields with 16 noise levels. U-Nets have levels of equal width
    ({WIDTH}), one block per level, no attention; without skips the blocks are the same.
    Untrained networks start as torch starts any layer: built with zeros, as usual here, the
    gradient of the features is exactly 0 before the first step, since the output layer is 0.
    Plain CNNs are text 003's, of width 16.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Left: gradient after each block of the deepest networks. Middle and right: what"
    " arrives at the first layer.",
)

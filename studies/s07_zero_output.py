"""S7: a network whose output starts at zero, against one whose output layer starts as usual."""

from dataclasses import replace

import torch
from matplotlib.figure import Figure

from figures import canvas, decorate, lines
from harness import (
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
from nets import small_unet
from pictures import Fields
from undiffuse.denoiser import Epsilon
from undiffuse.noise import LinearBetas, Stream, keyed_normal
from undiffuse.unet import Head, UNet

FIELDS = Fields(16, 16, torus=32)
STEPS, SHORT = 600, 150
ZERO, USUAL = "zero output", "usual output"
RATES = (0.004, 0.016, 0.064, 0.256)
FAILED = 0.5  # mean of the last 50 losses; predicting nothing gives 1
BINS = 30


def usual_head(net: UNet) -> None:
    """The output layer as torch initialises any layer; all else as it was."""
    (head,) = (layer for layer in net.layers.values() if isinstance(layer, Head))
    head.conv.reset_parameters()


def training(name: str, seed: int, steps: int, rate: float = 0.004) -> Training:
    """Noise prediction as in DDPM, with one of the two output layers."""
    one = Training(
        f"{name}, rate {rate:g}",
        small_unet(),
        FIELDS,
        seed,
        steps,
        learning_rate=rate,
        prediction=Epsilon(),
        schedule=LinearBetas(),
    )
    return one if name == ZERO else replace(one, prepare=usual_head)


def trainings(lab: Lab) -> list[Training]:
    """Both networks: long, and short at every learning rate."""
    long, short = lab.steps(STEPS), lab.steps(SHORT)
    kinds = [(name, seed) for name in (ZERO, USUAL) for seed in lab.seeds]
    return [
        *(training(name, seed, long) for name, seed in kinds),
        *(training(name, seed, short, rate) for name, seed in kinds for rate in RATES),
    ]


def measure(lab: Lab) -> Numbers:
    """First output and loss, the curve, final errors, failures by learning rate."""
    return {name: _measured(lab, name) for name in (ZERO, USUAL)} | {
        "noise": [_mean_square_of_noise(seed) for seed in lab.seeds],
        "rates": list(RATES),
    }


def _measured(lab: Lab, name: str) -> Numbers:
    runs = [training(name, seed, lab.steps(STEPS)) for seed in lab.seeds]
    losses = [lab.history(run).losses for run in runs]
    final = [lab.errors(run) for run in runs]
    return {
        "first_output": [_first_output(run) for run in runs],
        "first_loss": [row[0] for row in losses],
        "losses": [_binned(row) for row in losses],
        "ratio": final[0]["ratio"],
        "excess": [one["excess"] for one in final],
        "untrained": [lab.kept(untrained, run, lab.count(64)) for run in runs],
        "at_rate": [
            [_last_loss(lab, training(name, s, lab.steps(SHORT), rate)) for rate in RATES]
            for s in lab.seeds
        ],
    }


def _mean_square_of_noise(seed: int) -> float:
    """Of the first batch, whatever the network."""
    shape = (1, FIELDS.height, FIELDS.width)
    return float(keyed_normal(seed, Stream.NOISE, range(16), shape).square().mean())


@torch.no_grad()
def _first_output(run: Training) -> float:
    """The largest output of the untrained network at t = 0."""
    x = FIELDS.held_out(4, run.seed)
    return float(build(run).eval()(x, torch.zeros(4), None).abs().max())


@torch.no_grad()
def untrained(lab: Lab, run: Training, count: int) -> list[float]:
    """Mean squared error of the noise that the untrained network predicts, at t = 0 … 1."""
    net, x0 = build(run).eval(), FIELDS.held_out(count, run.seed)
    noise = keyed_normal(run.seed, Stream.EVALUATE, range(count), tuple(x0.shape[1:]))
    found: list[float] = []
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        level = run.schedule(torch.full((count,), t)).like(x0)
        x = level.mix(x0, noise)
        told = torch.full((count,), 999 * t)
        found.append(float((net(x, told, None) - noise).square().mean()))
    return found


def _binned(losses: tuple[float | None, ...]) -> list[float]:
    """Means of a thirtieth of the steps each; a loss that is not finite counts as 10."""
    size = max(1, len(losses) // BINS)
    rows = [losses[i : i + size] for i in range(0, size * (len(losses) // size), size)]
    return [mean([10.0 if v is None else v for v in row]) for row in rows]


def _last_loss(lab: Lab, run: Training) -> float:
    """Mean of the last 50 losses; 10 if the training broke down."""
    history = lab.history(run)
    last = history.losses[-50:]
    return 10.0 if history.diverged or None in last else mean([v or 0.0 for v in last])


# --- judging and showing ------------------------------------------------------------------------


def judge_zero(numbers: Numbers) -> Judgement:
    """Exactly 0, and so the first loss is the mean square of the noise."""
    outputs = numbers[ZERO]["first_output"]
    apart = [abs(a - b) for a, b in zip(numbers[ZERO]["first_loss"], numbers["noise"], strict=True)]
    exact = max(outputs) == 0.0 and max(apart) < 2e-6
    return Judgement(
        Verdict.HOLDS if exact else Verdict.FAILS,
        f"Its largest output is {max(outputs):g} before training, so the first loss is the mean"
        f" square"
        f" of the noise, {spread(numbers['noise'], 4)}, to {max(apart):.1g}. With a usual output"
        f" layer the first loss is {spread(numbers[USUAL]['first_loss'], 4)}.",
    )


def judge_near_zero(numbers: Numbers) -> Judgement:
    """Predicting no noise is not good at t = 0 either."""
    first = [row[0] for row in numbers[ZERO]["untrained"]]
    last = [row[-1] for row in numbers[ZERO]["untrained"]]
    verdict = Verdict.HOLDS if mean(first) < 0.5 * mean(last) else Verdict.FAILS
    return Judgement(
        verdict,
        f"The mean squared error of predicting no noise is {spread(first)} at t = 0 and"
        f" {spread(last)}"
        " at t = 1: the noise to be predicted has variance 1 at every t. Only the picture implied"
        " by it is nearly right at t = 0, because hardly any noise was added.",
    )


def judge_training(numbers: Numbers) -> Judgement:
    """Faster start, better end, fewer failures."""
    starts = [numbers[name]["losses"] for name in (ZERO, USUAL)]
    faster = all(mean(a[:3]) < mean(b[:3]) for a, b in zip(*starts, strict=True))
    ends = [[mean(row) for row in numbers[name]["excess"]] for name in (ZERO, USUAL)]
    better = mean(ends[0]) <= 0.9 * mean(ends[1])
    failures = [
        sum(v > FAILED for row in numbers[n]["at_rate"] for v in row) for n in (ZERO, USUAL)
    ]
    votes = (faster, better, failures[0] < failures[1])
    verdict = Verdict.HOLDS if all(votes) else Verdict.DEPENDS if any(votes) else Verdict.FAILS
    tried = sum(len(row) for row in numbers[ZERO]["at_rate"])
    return Judgement(
        verdict,
        f"Mean loss of the first tenth of the steps: {spread([mean(r[:3]) for r in starts[0]])}"
        f" with"
        f" zero output, {spread([mean(r[:3]) for r in starts[1]])} without. Excess error at the"
        f" end:"
        f" {spread(ends[0])} % and {spread(ends[1])} %. Failed trainings at four learning rates:"
        f" {failures[0]} and {failures[1]} of {tried}.",
    )


def tables(numbers: Numbers) -> list[Table]:
    """Start and end, and learning rates."""
    names = (ZERO, USUAL)
    ends = [
        (
            name,
            spread(numbers[name]["first_loss"], 5),
            spread([mean(r[:3]) for r in numbers[name]["losses"]]),
            spread([mean(r[-3:]) for r in numbers[name]["losses"]]),
            spread([mean(r) for r in numbers[name]["excess"]]),
        )
        for name in names
    ]
    header = ("network", "first loss", "first tenth", "last tenth", "excess at the end, percent")
    columns = {n: list(zip(*numbers[n]["at_rate"], strict=True)) for n in names}
    rates = [
        (f"{rate:g}", *(spread(list(columns[name][i])) for name in names))
        for i, rate in enumerate(numbers["rates"])
    ]
    title = f"Loss after {SHORT} steps by learning rate (10: broke down)"
    return [
        Table("Training", header, tuple(ends)),
        Table(title, ("learning rate", *names), tuple(rates)),
    ]


def figure(numbers: Numbers) -> Figure:
    """The curves, and the loss by learning rate."""
    drawn, (left, right) = canvas(2)
    size = max(1, STEPS // BINS)
    curves = {name: numbers[name]["losses"] for name in (ZERO, USUAL)}
    places = [size * (i + 0.5) for i in range(len(curves[ZERO][0]))]
    lines(left, places, curves)
    decorate(left, "training step", "loss", "the course of training", "xy")
    lines(right, numbers["rates"], {name: numbers[name]["at_rate"] for name in (ZERO, USUAL)})
    right.axhline(1.0, color="#68727f", lw=1, ls=":")
    decorate(right, "learning rate", f"loss after {SHORT} steps", "high learning rates", "xy")
    return drawn


STUDY = Study(
    id="s07",
    title="Starting with an output of zero",
    claims=(
        Claim(
            ("T001-19",),
            "With a zeroed output layer the first prediction is zero.",
            "holds if the largest output is exactly 0 and the first loss is the mean square of the"
            " noise to 2e-6, in every seed",
            judge_zero,
        ),
        Claim(
            ("T001-5",),
            "Predicting no noise is a reasonable start, since it is right near t = 0.",
            "holds if its error at t = 0 is less than half of that at t = 1, else fails",
            judge_near_zero,
        ),
        Claim(
            ("T001-18",),
            "A zeroed output layer makes training stable.",
            "three tests: lower loss in the first tenth of the steps in every seed; at least a"
            " tenth less excess error at the end; fewer failures (loss above"
            f" {FAILED:g}) at high learning rates. All: holds, none: fails, else depends",
            judge_training,
        ),
    ),
    how=f"""The reference network on fields of 16x16 pixels, noise prediction on DDPM's linear
    schedule, {STEPS} steps of 16 pictures; only the output layer differs: zeros, or torch's
    usual random start. The last layers inside residual blocks and attention start at zero in
    both. Learning rates: {SHORT} steps at four rates; gradients are clipped to length 1 as
    always.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Left: loss while training. Right: loss after a short training at high learning rates;"
    " the dotted line is predicting nothing.",
)

"""S17: a U-Net trained at one size, asked at others."""

from dataclasses import replace

import torch
from matplotlib.figure import Figure

from figures import NOISE_AXIS, bars, canvas, decorate, lines
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
    noised,
    optimum,
    spread,
)
from nets import FIELDS, REFERENCE, STEPS, reference

# The first is the size of training; the largest, whose optimum takes longest to find, come last.
SIZES = ((32, 32), (31, 33), (20, 44), (17, 17), (24, 24), (30, 30), (13, 50), (48, 48))
FREE, AS_GOOD, POOR = 1.1, 1.5, 3.0  # times the excess at the size of training


def name_of(size: tuple[int, int]) -> str:
    """Height x width."""
    return f"{size[0]}x{size[1]}"


def divisible(size: tuple[int, int]) -> bool:
    """Whether nothing has to be padded."""
    return all(side % REFERENCE.stride == 0 for side in size)


def at_size(lab: Lab, run: Training, size: tuple[int, int], count: int) -> Numbers:
    """Excess by level, in all pixels and in those of the last two rows and columns."""
    fields = replace(FIELDS, height=size[0], width=size[1])
    denoise, oracle = lab.trained(run), fields.oracle()
    whole, edge, kept = list[float](), list[float](), True
    for ratio in LEVELS:
        _, x, level = noised(fields, ratio, count)
        with torch.no_grad():
            estimate = denoise(x, level)
        kept = kept and estimate.shape == x.shape
        apart = (estimate - oracle(x, level)).square().mean((0, 1))
        last = torch.cat((apart[-2:].flatten(), apart[:-2, -2:].flatten()))
        whole.append(100 * float(apart.mean()) / optimum(fields, ratio))
        edge.append(100 * float(last.mean()) / optimum(fields, ratio))
    return {"shape_kept": kept, "excess": whole, "edge": edge}


def trainings(lab: Lab) -> list[Training]:
    """The reference network."""
    return [reference(seed, lab.steps(STEPS)) for seed in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Every size with every seed."""
    sizes = SIZES[: lab.count(len(SIZES))]
    found = dict[str, Numbers]()
    for size in sizes:  # outside, so that a size's optimum is found once
        rows = [lab.kept(at_size, run, size, lab.count(32)) for run in trainings(lab)]
        found[name_of(size)] = {
            "divisible": divisible(size),
            "shape_kept": all(row["shape_kept"] for row in rows),
            "excess": [row["excess"] for row in rows],
            "edge": [row["edge"] for row in rows],
        }
    return {"ratio": list(LEVELS), "sizes": found}


# --- judging and showing ------------------------------------------------------------------------


def times_worse(numbers: Numbers) -> dict[str, list[float]]:
    """Mean excess divided by that at the size of training, seed by seed; that size left out."""
    sizes, trained = numbers["sizes"], name_of(SIZES[0])
    base = [mean(row) for row in sizes[trained]["excess"]]
    return {
        name: [mean(row) / b for row, b in zip(one["excess"], base, strict=True)]
        for name, one in sizes.items()
        if name != trained
    }


def judge(numbers: Numbers) -> Judgement:
    """Sizes and shapes it was not trained on."""
    worse = times_worse(numbers)
    kept = all(one["shape_kept"] for one in numbers["sizes"].values())
    verdict = Verdict.HOLDS if max(map(max, worse.values())) <= AS_GOOD else Verdict.DEPENDS
    if min(mean(seeds) for seeds in worse.values()) >= POOR or not kept:
        verdict = Verdict.FAILS
    told = "; ".join(f"{name} {spread(seeds)}" for name, seeds in worse.items())
    shapes = "Every output has its input's size" if kept else "Some outputs have another size"
    return Judgement(verdict, f"{shapes}. Excess error as a multiple of that at 32x32: {told}.")


def judge_padding(numbers: Numbers) -> Judgement:
    """Sizes that have to be padded, but are as large as the trained one but for a pixel or two."""
    worse, sizes = times_worse(numbers), numbers["sizes"]
    near = {n: seeds for n, seeds in worse.items() if _near(n) and not sizes[n]["divisible"]}
    far = [mean(seeds) for name, seeds in worse.items() if name not in near]
    apart = [value for seeds in near.values() for value in seeds]
    verdict = Verdict.HOLDS if max(apart) <= FREE else Verdict.DEPENDS
    verdict = Verdict.FAILS if mean(apart) > AS_GOOD else verdict
    return Judgement(
        verdict,
        f"{' and '.join(near)}, which have to be padded, have {spread(apart)} times the excess"
        f" error of 32x32; sizes further from it, padded or not, {spread(far)} times.",
    )


def _near(name: str) -> bool:
    """Whether no side is more than two pixels from the trained one."""
    sides = (int(side) for side in name.split("x"))
    return all(abs(a - b) <= 2 for a, b in zip(sides, SIZES[0], strict=True))


def tables(numbers: Numbers) -> list[Table]:
    """One row per size."""
    rows = [
        (
            name,
            "no" if one["divisible"] else "yes",
            "yes" if one["shape_kept"] else "no",
            *(spread([row[i] for row in one["excess"]]) for i in (0, 6, -1)),
            spread([mean(row) for row in one["excess"]]),
            spread([mean(row) for row in one["edge"]]),
        )
        for name, one in numbers["sizes"].items()
    ]
    levels = (f"at {numbers['ratio'][i]:g}" for i in (0, 6, -1))
    head = ("size", "padded", "size kept", *levels, "all levels", "last two rows and columns")
    return [Table("Excess error, percent, by σ/α", head, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """Compared with the size of training: by level, and on average."""
    drawn, (left, right) = canvas(2, width=4.8)
    sizes = numbers["sizes"]
    trained = sizes[name_of(SIZES[0])]["excess"]
    apart = {
        name if one["divisible"] else f"{name}, padded": [
            [a / b for a, b in zip(row, base, strict=True)]
            for row, base in zip(one["excess"], trained, strict=True)
        ]
        for name, one in sizes.items()
        if one["excess"] is not trained
    }
    lines(left, numbers["ratio"], apart)
    decorate(left, NOISE_AXIS, "times the excess at 32x32", "by noise level", "x", legend=False)
    left.legend(fontsize=7, ncols=2, frameon=False)
    left.set_ylim(0.5, 3.2)
    worse = times_worse(numbers)
    bars(right, dict(zip(apart, worse.values(), strict=True)))
    right.axvline(1.0, color="#68727f", lw=1, ls=":")
    decorate(right, "times the excess at 32x32", "", "mean over noise levels", legend=False)
    right.margins(x=0.18)
    right.set_xlim(left=0)
    return drawn


STUDY = Study(
    id="s17",
    title="Pictures of any size",
    claims=(
        Claim(
            ("T001-20", "T000-9"),
            "One network serves pictures of any size.",
            f"holds if every untrained size has at most {AS_GOOD:g} times the excess error of the"
            f" trained one in every seed; fails if all have {POOR:g} times or more on average, or"
            " an output has another size than its input; else depends",
            judge,
        ),
        Claim(
            ("T001-20",),
            "Sizes that cannot be halved as often as needed cost nothing, when padded and cropped.",
            "excess error of sizes within two pixels of the trained one that are padded, divided by"
            f" that at the trained one: holds if at most {FREE:g} in every seed, fails if above"
            f" {AS_GOOD:g} on average, else depends",
            judge_padding,
        ),
    ),
    how="""The reference network, trained on fields of 32x32 pixels, denoises fields of other
    heights and widths; for each size the exact optimum is known. All are windows of the same
    torus, so only the size differs. A size that the network's halvings do not divide is padded
    inside by repeating its last row and column, and the output is cropped.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Error beyond each size's optimum, divided by that at the size of training.",
)

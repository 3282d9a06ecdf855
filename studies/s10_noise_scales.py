"""S10: which noise level drowns which resolution, and what a network can still predict there."""

import itertools
import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from figures import COLOURS, NOISE_AXIS, canvas, decorate, lines
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
    noised,
    spread,
)
from nets import FIELDS, STEPS, reference
from pictures import Fields, Photos, Pictures, covariance
from undiffuse.noise import Stream, keyed_normal

RESOLUTIONS = (32, 16, 8, 4, 2)  # of fields
LARGE = (128, 64, 32, 16, 8)  # of photographs, which have no larger parts; the text begins at 256
SHOWN = (0.15, 1.3, 12.0)  # noise levels whose spectra are drawn
EVEN, STEEP = 1.25, 2.0  # ratio of the noise's power in two bands: white, or not
NEAR = 1.5


# --- bands --------------------------------------------------------------------------------------


def cosines(side: int) -> Tensor:
    """The orthonormal DCT-II, one wave per row: it needs no periodic picture; float64."""
    k = torch.arange(side, dtype=torch.float64)[:, None]
    x = torch.arange(side, dtype=torch.float64)
    rows = torch.cos(math.pi * k * (2 * x + 1) / (2 * side)) * math.sqrt(2 / side)
    rows[0] /= math.sqrt(2)
    return rows


def power(pictures: Tensor) -> Tensor:
    """Mean square of every wave, (side, side); 1 for white noise of variance 1."""
    waves = cosines(pictures.shape[-1])
    return (waves @ pictures.double() @ waves.mT).square().mean((0, 1))


def exact_power(fields: Fields) -> Tensor:
    """The same for fields, from their covariance."""
    return _diagonal(covariance(fields), fields.height)


def exact_errors(fields: Fields, ratio: float) -> Tensor:
    """Mean squared error of every wave of the best possible estimate at sigma / alpha = ratio.

    The covariance of the posterior: U diag(l s^2 / (l + s^2)) U^T.
    """
    oracle = fields.oracle()
    values = oracle.eigenvalues * ratio**2 / (oracle.eigenvalues + ratio**2)
    basis = oracle.eigenvectors
    return _diagonal((basis * values) @ basis.mT, fields.height)


def _diagonal(matrix: Tensor, side: int) -> Tensor:
    """Variance of each wave of pictures with this covariance."""
    waves = torch.kron(cosines(side), cosines(side))
    return ((waves @ matrix) * waves).sum(1).reshape(side, side)


def in_band(power: Tensor, resolution: int) -> float:
    """Mean over the waves that `resolution` pixels can show and half as many cannot."""
    k = torch.arange(power.shape[0])
    larger = torch.maximum(k[:, None], k)
    return float(power[(larger >= resolution // 2) & (larger < resolution)].mean())


def by_wave(power: Tensor) -> list[float]:
    """Mean over the waves of each number of half periods, from 1."""
    k = torch.arange(power.shape[0])
    larger = torch.maximum(k[:, None], k)
    return [float(power[larger == i].mean()) for i in range(1, power.shape[0])]


# --- measuring ----------------------------------------------------------------------------------


def spectra(lab: Lab, data: Pictures, resolutions: Sequence[int], count: int) -> Numbers:
    """Power of held-out pictures and of noise, by band and by wave."""
    x0 = data.held_out(count, HELD_OUT)
    noise = keyed_normal(HELD_OUT, Stream.EVALUATE, range(count), tuple(x0.shape[1:]))
    of_pictures, of_noise = power(x0), power(noise)
    return {
        "pictures": [in_band(of_pictures, r) for r in resolutions],
        "noise": [in_band(of_noise, r) for r in resolutions],
        "waves": by_wave(of_pictures),
        "noise_waves": by_wave(of_noise),
    }


def mixed(lab: Lab, count: int) -> list[list[float]]:
    """Spectra of noised fields at the levels shown."""
    return [by_wave(power(noised(FIELDS, ratio, count)[1])) for ratio in SHOWN]


def exact(lab: Lab) -> Numbers:
    """Closed forms for fields: power, and the share of it that can be recovered, by band."""
    whole = exact_power(FIELDS)
    left = [exact_errors(FIELDS, ratio) for ratio in LEVELS]
    bands = [in_band(whole, r) for r in RESOLUTIONS]
    shares = [
        [1 - in_band(one, r) / p for one in left] for r, p in zip(RESOLUTIONS, bands, strict=True)
    ]
    return {"pictures": bands, "waves": by_wave(whole), "recovered": shares}


def recovered(lab: Lab, training: Training, count: int) -> list[list[float]]:
    """Share of a band's power that the network's estimate recovers: bands x levels."""
    denoise, found = lab.trained(training), list[list[float]]()
    for ratio in LEVELS:
        x0, x, level = noised(FIELDS, ratio, count)
        with torch.no_grad():
            error, whole = power(denoise(x, level) - x0), power(x0)
        found.append([1 - in_band(error, r) / in_band(whole, r) for r in RESOLUTIONS])
    return [list(band) for band in zip(*found, strict=True)]


def trainings(lab: Lab) -> list[Training]:
    """The reference network."""
    return [reference(seed, lab.steps(STEPS)) for seed in lab.seeds]


def measure(lab: Lab) -> Numbers:
    """Spectra of fields and photographs, closed forms, and what networks recover."""
    return {
        "ratio": list(LEVELS),
        "fields": lab.kept(spectra, FIELDS, RESOLUTIONS, lab.count(256)),
        "photos": lab.kept(spectra, Photos(LARGE[0]), LARGE, lab.count(64)),
        "mixed": lab.kept(mixed, lab.count(256)),
        "exact": lab.kept(exact),
        "recovered": [lab.kept(recovered, run, lab.count(64)) for run in trainings(lab)],
    }


# --- judging and showing ------------------------------------------------------------------------


def drowned_at(powers: Sequence[float]) -> list[float]:
    """sigma / alpha at which noise and picture have equal power, for each band."""
    return [math.sqrt(p) for p in powers]


def judge_scales(numbers: Numbers) -> Judgement:
    """Each band has a noise level of its own, the coarser the higher."""
    sets = [drowned_at(numbers[name]["pictures"]) for name in ("fields", "photos")]
    steps = [b / a for row in sets for a, b in itertools.pairwise(row)]
    verdict = Verdict.HOLDS if min(steps) >= NEAR else Verdict.DEPENDS
    verdict = Verdict.FAILS if min(steps) <= 1.0 else verdict
    small, large = (", ".join(f"{v:.3g}" for v in row) for row in sets)
    return Judgement(
        verdict,
        f"From fine to coarse, noise drowns the five resolutions of fields at σ/α = {small}, those"
        f" of 128-pixel photographs at {large}.",
    )


def judge_white(numbers: Numbers) -> Judgement:
    """The noise has the same power in every band."""
    noise = numbers["fields"]["noise"]
    slope = noise[-1] / noise[0]
    verdict = Verdict.HOLDS if slope >= STEEP else Verdict.DEPENDS
    verdict = Verdict.FAILS if max(noise) / min(noise) <= EVEN else verdict
    picture = numbers["fields"]["pictures"]
    return Judgement(
        verdict,
        f"In its coarsest band the noise has {slope:.2f} times the power of its finest: it is white"
        f" at every level. The picture has {picture[-1] / picture[0]:.0f} times: what survives at"
        " high noise is the coarse part of the picture, not of the noise.",
    )


def half_at(ratios: Sequence[float], shares: Sequence[float]) -> float:
    """The highest level at which half of a band is recovered, interpolated in ln(sigma/alpha).

    The ends stand for "beyond": below the lowest level, or above the highest.
    """
    above = [place for place, share in enumerate(shares) if share >= 0.5]
    if not above:
        return ratios[0]
    last = above[-1]
    if last == len(ratios) - 1:
        return ratios[-1]
    part = (shares[last] - 0.5) / (shares[last] - shares[last + 1])
    return ratios[last] * (ratios[last + 1] / ratios[last]) ** part


def judge_network(numbers: Numbers) -> Judgement:
    """The network recovers half of a band where signal and noise are equal."""
    wanted = drowned_at(numbers["exact"]["pictures"])
    halves = [[half_at(numbers["ratio"], band) for band in one] for one in numbers["recovered"]]
    ordered = all(a < b for row in halves for a, b in itertools.pairwise(row))
    apart = [max(a / b, b / a) for row in halves for a, b in zip(row, wanted, strict=True)]
    verdict = Verdict.HOLDS if ordered and max(apart) <= NEAR else Verdict.DEPENDS
    verdict = verdict if ordered else Verdict.FAILS
    told = "; ".join(
        f"{r} px {spread([row[i] for row in halves])} (equal power at {wanted[i]:.3g})"
        for i, r in enumerate(RESOLUTIONS)
    )
    return Judgement(verdict, f"Half of a band is recovered up to σ/α of: {told}.")


def tables(numbers: Numbers) -> list[Table]:
    """Bands of fields and of photographs."""
    exact_at = drowned_at(numbers["exact"]["pictures"])
    rows = list[tuple[str, ...]]()
    for name, resolutions in (("fields", RESOLUTIONS), ("photos", LARGE)):
        measured = drowned_at(numbers[name]["pictures"])
        for i, resolution in enumerate(resolutions):
            closed = f"{exact_at[i]:.3g}" if name == "fields" else "–"
            noise = f"{numbers[name]['noise'][i]:.3f}"
            rows.append((name, f"{resolution} px", f"{measured[i]:.3g}", closed, noise))
    header = ("pictures", "resolution", "drowned at σ/α", "in closed form", "power of unit noise")
    return [Table("Where each resolution's signal-to-noise ratio is 1", header, tuple(rows))]


def figure(numbers: Numbers) -> Figure:
    """Spectra; recovered shares."""
    drawn, (left, right) = canvas(2, width=4.8, height=3.8)
    waves = range(1, len(numbers["exact"]["waves"]) + 1)
    left.plot(waves, numbers["exact"]["waves"], color="#20262e", lw=2, label="fields")
    for ratio, row, colour in zip(SHOWN, numbers["mixed"], COLOURS, strict=False):
        left.plot(waves, row, color=colour, lw=1.5, label=f"noised, σ/α = {ratio:g}")
        flat = [ratio**2 * p for p in numbers["fields"]["noise_waves"]]
        left.plot(waves, flat, color=colour, lw=1, ls=":")
    decorate(left, "half periods across the picture", "power per wave", "noise is white", "xy")
    bands = [[one[i] for one in numbers["recovered"]] for i in range(len(RESOLUTIONS))]
    names = [f"{resolution} px" for resolution in RESOLUTIONS]
    lines(right, numbers["ratio"], dict(zip(names, bands, strict=True)))
    for colour, row in zip(COLOURS, numbers["exact"]["recovered"], strict=False):
        right.plot(numbers["ratio"], row, color=colour, lw=1, ls=":")
    decorate(right, NOISE_AXIS, "share recovered", "what a network recovers", "x")
    right.set_ylim(-0.05, 1.05)
    return drawn


STUDY = Study(
    id="s10",
    title="Scales of noise and scales of pictures",
    claims=(
        Claim(
            ("T003-5", "T003-12"),
            "Each of five resolutions has a noise scale of its own.",
            "the noise level at which a resolution's signal-to-noise ratio is 1, from fine to"
            f" coarse, on fields and photographs: holds if it grows by at least {NEAR:g} times each"
            " step, fails if it ever does not grow, else depends",
            judge_scales,
        ),
        Claim(
            ("T003-13",),
            "At high noise the input is dominated by low-frequency noise.",
            f"power of the noise in the coarsest band and in the finest: holds if {STEEP:g} times"
            f" or more, fails if no two bands differ by more than {EVEN:g} times, else depends",
            judge_white,
        ),
        Claim(
            ("T003-3", "T003-13"),
            "A network works on coarse structure at high noise and on detail at low noise.",
            "the highest noise level at which half of a band's power is recovered: fails unless it"
            " grows from fine to coarse in every seed; holds if it is also within a factor of"
            f" {NEAR:g} of the level of equal power; else depends",
            judge_network,
        ),
    ),
    how="""Spectra are those of the cosine transform, which needs no periodic picture. The band
    of a resolution holds the waves that so many pixels can show and half as many cannot. Fields
    are 32 pixels wide, their five resolutions 32 to 2; the photographs' are those of the text,
    128 to 8, from random grey crops. Dotted lines are the noise alone (left) and the exact
    optimum (right); networks are the reference with three seeds.""",
    trainings=trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Left: noise adds the same power to every wave, so it drowns fine detail first. Right:"
    " share of each band's power in the network's estimate, and in the best possible one (dotted).",
)

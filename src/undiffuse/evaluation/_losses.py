"""A denoiser's error per noise level, beside exact bars on the same pictures and noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation._bars import Bars, Candidate, Estimate, Told, fit_bars
from undiffuse.evaluation._split import Split, at_most, check_same_shape
from undiffuse.evaluation._spread import (
    Errors,
    Interval,
    difference,
    in_units,
    interval,
    quotient,
    reached,
    steps,
)
from undiffuse.noise import NoiseLevel, Schedule, Stream, keyed_normal

RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 5.0)  # sigma / alpha
MOST_PICTURES = 1000
MOST_VALUES = 1 << 19  # of all pictures measured together
CHOOSING_VALUES = 1 << 18  # the same where a bar's setting is chosen
FEWEST = 64  # pictures, however large
FEW_HELD_OUT = 50
TRAIN_OFFSET = 1 << 32  # training pictures get noise of their own
MEMORY_BELOW = 1.2  # above this ratio memorised and learned look alike
NEAR = 2.0  # per cent above an exact oracle that count as having reached it

Progress = Callable[[int, int], None]  # (pictures denoised, in all)


@runtime_checkable
class LevelDenoiser(Protocol):
    """`Denoiser`, or anything called like it that knows its schedule."""

    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, x: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class LevelResult:
    """Mean squared errors per value of the estimate of x0, at one level.

    `held_out` is without label (null), `held_out_labelled` with; None where the denoiser does not
    offer it. `bars` are unconditional and `mixture_given_class` knows the label. `gap` is the
    judged error minus `bar`, below 0 where the denoiser wins, and `excess` the same in per cent of
    `bar`. Against an exact oracle it is the mean of (D - D*)^2, which is that difference without
    the noise of both. `nats_per_value` is gap alpha^2 / sigma^2, the integrand over ln sigma/alpha.
    `train_optimum` is the least possible error on the training pictures for a denoiser that is told
    as much, `over_train_optimum` what their error lies above it, and `memory` that same estimate's
    error on held-out pictures; None where these have a class that the training pictures lack.
    """

    ratio: float
    held_out: float | None
    held_out_labelled: float | None
    train: float
    bars: dict[str, float]
    mixture_given_class: float | None
    bar: float
    bar_name: str
    gap: Interval
    gap_labelled: Interval | None
    excess: Interval
    nats_per_value: float
    train_minus_held_out: Interval
    train_optimum: float
    over_train_optimum: Interval
    memory: float | None
    settings: dict[str, float]


@dataclass(frozen=True)
class LevelReport:
    """The levels, and what they say together.

    `judged` is "without label" or "with label". `beaten` are the ratios where the judged error is
    below the bar, or within 2 % of an exact oracle's. `nats_per_value` is the sum of gap / ratio^2
    times the step in ln ratio, over the `values` of a picture `nats_per_picture`; against an oracle
    it bounds the divergence of the generated pictures from the data. `memorised` is 0 for a
    denoiser that treats training and held-out pictures alike and 1 for the train optimum, None
    where that cannot be told. `verdict` is "learned", "partly learned", "underfits", "overfits",
    "memorises" or "not measured"; `reason` says it in a sentence.
    """

    levels: tuple[LevelResult, ...]
    judged: str
    beaten: tuple[float, ...]
    nats_per_value: Interval | None
    memorised: float | None
    verdict: str
    reason: str
    held_out_pictures: int
    train_pictures: int
    values: int
    draws: int
    seed: int
    notes: tuple[str, ...]

    @property
    def nats_per_picture(self) -> Interval | None:
        """The sum over a picture's values."""
        return None if self.nats_per_value is None else self.nats_per_value.times(self.values)

    @property
    def bits_per_dimension(self) -> Interval | None:
        """The sum per value, in bits."""
        return None if self.nats_per_value is None else self.nats_per_value.times(1 / math.log(2))

    def asdict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, with the sum in all three units."""
        return asdict(self) | in_units(self.nats_per_value, self.values)


def loss_by_level(
    denoiser: LevelDenoiser,
    train: Split,
    held_out: Split,
    *,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 256,
    ratios: Sequence[float] = RATIOS,
    known: bool = True,
    labelled: bool = False,
    null: bool = True,
    oracle: Estimate | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> LevelReport:
    """Held-out error per noise level beside Wiener, kernel-density and class-mixture bars.

    All are measured on the same pictures and noise. Cost: pictures x levels x draws evaluations of
    the denoiser on held-out pictures, once more with labels, and once more on as many training
    pictures. At most 1,000 pictures are used, fewer where they are large.

    Args:
        denoiser: its network in evaluation mode.
        train: the pictures it was trained on, or some of them; the bars are fitted to them.
        draws: noise per picture and level.
        ratios: values of sigma / alpha; those outside the schedule's range are left out.
        known: the denoiser was trained on `train`. Otherwise both splits are new to it, and
            nothing is said about memorising.
        labelled: the denoiser takes the splits' labels.
        null: it may be called without label. Without null it is judged with labels, and its bar
            may use them too.
        oracle: the exact E[x0 | x] of the distribution that both splits were drawn from; it is
            the bar then, whatever the fitted ones reach on these pictures.
        device: where the denoiser is called; all else is computed on the CPU.
        progress: called with how many pictures the denoiser has seen, and will see in all.

    Raises:
        ConfigError: `draws` or `batch_size` is below 1, no ratio is left, or the denoiser needs
            labels and there are none.
        DataError: there are no training pictures, or shapes differ.
    """
    _check(train, held_out, draws, batch_size, labelled, null)
    levels = reached(denoiser.schedule, ratios)
    train, held_out = train.on_cpu(), held_out.on_cpu()
    if not len(held_out):
        return _not_measured(train, draws, seed)
    bars = replace(fit_bars(train, seed), oracle=oracle)
    unseen = measured_on(held_out, seed)
    trained = at_most(bars.pictures, len(unseen), seed, tag=12)
    told = [Told.NOTHING] if null else []
    told += [Told.LABEL] if labelled and unseen.label is not None else []
    total = len(levels) * draws * (len(unseen) * len(told) + len(trained))
    counted = in_batches(watched(denoiser, tally(total, progress)), batch_size, device)
    models = {one: one.of(counted) for one in told}
    job = _Job(models, told[0], bars, trained, unseen, draws, seed, known)
    measured = [_measure(job, place, level) for place, level in enumerate(levels)]
    return _report(job, measured, _notes(job, len(held_out), len(ratios) - len(levels)))


def measured_on(held_out: Split, seed: int) -> Split:
    """As many of them as are measured: at most 1,000, fewer of large pictures."""
    limit = min(MOST_PICTURES, max(FEWEST, MOST_VALUES // held_out.x0[0].numel()))
    return at_most(held_out, limit, seed, tag=11)


def watched(denoiser: LevelDenoiser, seen: Callable[[int], None]) -> Estimate:
    """The denoiser, telling how many pictures it was given."""

    def counting(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        estimate = denoiser(x, level, label)
        seen(len(x))
        return estimate

    return counting


def tally(total: int, progress: Progress) -> Callable[[int], None]:
    """Adds up, and tells."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return more


def _check(
    train: Split, held_out: Split, draws: int, batch_size: int, labelled: bool, null: bool
) -> None:
    if draws < 1 or batch_size < 1:
        raise ConfigError(f"draws and batch_size must be at least 1; got {draws} and {batch_size}")
    if not len(train):
        raise DataError("no training pictures to fit the bars to")
    check_same_shape(held_out, train, "held-out pictures")
    if not null and not (labelled and train.label is not None and held_out.label is not None):
        raise ConfigError(
            "a denoiser without null label needs labelled=True and labels in both splits"
        )


def _not_measured(train: Split, draws: int, seed: int) -> LevelReport:
    reason = "there are no held-out pictures"
    none = "not measured"
    values = train.x0[0].numel()
    return LevelReport((), "", (), None, None, none, reason, 0, len(train), values, draws, seed, ())


def _notes(job: "_Job", held_out: int, out_of_range: int) -> tuple[str, ...]:
    notes = list(job.bars.notes)
    used = len(job.held_out)
    if used < held_out:
        notes.append(f"measured on {used} of {held_out} held-out pictures")
    if used < FEW_HELD_OUT:
        notes.append(f"only {used} held-out pictures: the intervals are rough")
    if out_of_range:
        notes.append(f"{out_of_range} levels lie outside the schedule's range")
    return tuple(notes)


# --- measuring ----------------------------------------------------------------------------------


def in_batches(denoiser: Estimate, batch_size: int, device: torch.device | str) -> Estimate:
    """The denoiser, given so many pictures at a time on its device."""

    @torch.no_grad()
    def estimate(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        classes = [None] * len(x) if label is None else label.to(device).split(batch_size)
        parts = zip(x.to(device).split(batch_size), classes, strict=False)
        return torch.cat([denoiser(part, level, c).cpu() for part, c in parts])

    return estimate


@dataclass(frozen=True)
class _Job:
    models: Mapping[Told, Estimate]
    judged: Told
    bars: Bars
    train: Split
    held_out: Split
    draws: int
    seed: int
    known: bool


@dataclass(frozen=True)
class _Measured:
    ratio: float
    unseen: Mapping[str, Errors]
    apart: Mapping[str, Errors]  # squares of D - D*, where there is an oracle
    bar_names: tuple[str, ...]
    settings: dict[str, float]
    train: Errors
    train_optimum: Errors

    def bar(self, told: Told) -> str:
        """The oracle, or the best of the bars that know as much as the denoiser does."""
        if _ORACLES[told] in self.unseen:
            return _ORACLES[told]
        knows = told is Told.LABEL and "given_class" in self.unseen
        names = (*self.bar_names, "given_class") if knows else self.bar_names
        return min(names, key=lambda name: self.unseen[name].mean())

    def gaps(self, told: Told) -> Errors:
        if told in self.apart:
            return self.apart[told]
        return self.unseen[told] - self.unseen[self.bar(told)]


_ORACLES = {Told.NOTHING: "oracle", Told.LABEL: "oracle_given_class"}


def _measure(job: _Job, place: int, level: NoiseLevel) -> _Measured:
    part = part_of(place)
    chosen = {name: _chosen(family, job, level, part) for name, family in job.bars.families.items()}
    exact = _oracles(job)
    memory = job.judged.of(job.bars.memory)
    estimates = {**job.models, **exact, **{name: c.estimate for name, c in chosen.items()}}
    if job.bars.given_class is not None and _classes_known(job):
        estimates["given_class"] = job.bars.given_class
    if job.judged is Told.NOTHING or _classes_known(job):
        estimates["memory"] = memory
    known = {"model": job.models[job.judged], "memory": memory}
    at_train = _errors(known, {}, job.train, level, TRAIN_OFFSET, part, job)[0]
    best: dict[str, Estimate] = {told: exact[_ORACLES[told]] for told in job.models if exact}
    unseen, apart = _errors(estimates, best, job.held_out, level, 0, part, job)
    return _Measured(
        ratio=float(level.ratio),
        unseen=unseen,
        apart=apart,
        bar_names=(*(name for name in exact if name == "oracle"), *chosen),
        settings={n: c.setting for n, c in chosen.items() if len(job.bars.families[n]) > 1},
        train=at_train["model"],
        train_optimum=at_train["memory"],
    )


def _oracles(job: _Job) -> dict[str, Estimate]:
    """The oracle, told as much as each of the models; nothing where there is none."""
    oracle = job.bars.oracle
    if oracle is None:
        return {}
    return {_ORACLES[told]: told.of(oracle) for told in job.models}


def _classes_known(job: _Job) -> bool:
    classes = job.held_out.classes()
    return bool(classes) and set(classes) <= set(job.bars.pictures.classes())


def _chosen(family: tuple[Candidate, ...], job: _Job, level: NoiseLevel, part: int) -> Candidate:
    """The candidate of least error on the first draw (of the first pictures, if they are large)."""
    if len(family) == 1:
        return family[0]
    count = max(FEWEST, CHOOSING_VALUES // job.held_out.x0[0].numel())
    some = job.held_out.at(slice(count))
    x = noised(some, level, 0, part, job.seed)
    return min(family, key=lambda c: float((c.estimate(x, level, None) - some.x0).square().mean()))


def part_of(place: int) -> int:
    """The first part of the noise of a level; its draws do not meet those of the next."""
    return place << 20


def noised(split: Split, level: NoiseLevel, offset: int, part: int, seed: int) -> Tensor:
    """The pictures at that level; equal parts and offsets give the same noise."""
    places = range(offset, offset + len(split))
    noise = keyed_normal(seed, Stream.EVALUATE, places, tuple(split.x0.shape[1:]), part)
    return level.mix(split.x0, noise)


def _errors(
    estimates: Mapping[str, Estimate],
    best: Mapping[str, Estimate],
    split: Split,
    level: NoiseLevel,
    offset: int,
    part: int,
    job: _Job,
) -> tuple[dict[str, Errors], dict[str, Errors]]:
    """Squared error per picture of every estimate, on the same noise, and from what is `best`."""
    errors = {name: np.zeros(len(split)) for name in estimates}
    apart = {name: np.zeros(len(split)) for name in best}
    for draw in range(job.draws):
        x = noised(split, level, offset, part + draw, job.seed)
        for name, estimate in estimates.items():
            made = estimate(x, level, split.label)
            errors[name] += squares(made - split.x0) / job.draws
            if name in best:
                apart[name] += squares(made - best[name](x, level, split.label)) / job.draws
    return errors, apart


def squares(apart: Tensor) -> Errors:
    """Mean square of every picture's values."""
    return apart.double().square().flatten(1).mean(1).cpu().numpy()


# --- reading ------------------------------------------------------------------------------------


def _report(job: _Job, measured: list[_Measured], notes: tuple[str, ...]) -> LevelReport:
    weights = steps([m.ratio for m in measured])
    gaps = [w * m.gaps(job.judged) / m.ratio**2 for w, m in zip(weights, measured, strict=True)]
    nats = interval(np.sum(gaps, axis=0), job.seed)
    levels = tuple(_result(job, m) for m in measured)
    exact = job.bars.oracle is not None
    reach = NEAR if exact else 0.0
    beaten = tuple(level.ratio for level in levels if level.excess.value < reach)
    memorised = _memorised(levels, measured, job.judged) if job.known else None
    won = f"within {NEAR:g} % of the least possible" if exact else "below the bar"
    verdict, reason = _verdict(levels, beaten, nats, memorised, won)
    return LevelReport(
        levels=levels,
        judged=job.judged.value,
        beaten=beaten,
        nats_per_value=nats,
        memorised=memorised,
        verdict=verdict,
        reason=reason,
        held_out_pictures=len(job.held_out),
        train_pictures=len(job.train),
        values=job.held_out.x0[0].numel(),
        draws=job.draws,
        seed=job.seed,
        notes=notes,
    )


def _result(job: _Job, m: _Measured) -> LevelResult:
    means = {name: float(errors.mean()) for name, errors in m.unseen.items()}
    bar, gaps = m.bar(job.judged), m.gaps(job.judged)
    gap = interval(gaps, job.seed)
    both = job.judged is Told.NOTHING and Told.LABEL in m.unseen
    return LevelResult(
        ratio=m.ratio,
        held_out=means.get(Told.NOTHING),
        held_out_labelled=means.get(Told.LABEL),
        train=float(m.train.mean()),
        bars={name: means[name] for name in m.bar_names},
        mixture_given_class=means.get("given_class"),
        bar=means[bar],
        bar_name=bar,
        gap=gap,
        gap_labelled=interval(m.gaps(Told.LABEL), job.seed) if both else None,
        excess=quotient(gaps, m.unseen[bar], job.seed).times(100),
        nats_per_value=gap.value / m.ratio**2,
        train_minus_held_out=difference(m.train, m.unseen[job.judged], job.seed),
        train_optimum=float(m.train_optimum.mean()),
        over_train_optimum=interval(m.train - m.train_optimum, job.seed),
        memory=means.get("memory"),
        settings=m.settings,
    )


def _memorised(
    levels: Sequence[LevelResult], measured: Sequence[_Measured], judged: Told
) -> float | None:
    """How far train and held-out errors lie apart, as a share of the train optimum's own."""
    pairs = [
        (float(m.unseen[judged].mean()) - level.train, level.memory - level.train_optimum)
        for level, m in zip(levels, measured, strict=True)
        if level.ratio <= MEMORY_BELOW and level.memory is not None
    ]
    whole = sum(most for _, most in pairs)
    return sum(apart for apart, _ in pairs) / whole if whole > 0 else None


def _verdict(
    levels: Sequence[LevelResult],
    beaten: tuple[float, ...],
    nats: Interval,
    memorised: float | None,
    won: str,
) -> tuple[str, str]:
    cost = f"{nats.value:+.4f} nats per value against the bars"
    score = f"held-out error {won} at {len(beaten)} of {len(levels)} levels, {cost}"
    if not math.isfinite(nats.value):
        return "not measured", "the denoiser's estimates are not finite"
    share = 0.0 if memorised is None else memorised
    surely = any((level.train_minus_held_out.high or 0.0) < 0 for level in levels)
    fits = beaten or any(level.train < level.bar for level in levels)
    if share >= 0.5:
        return "memorises", f"{_apart(share)}; {score}"
    if share >= 0.1 and surely and fits:
        return "overfits", f"{_apart(share)}; {score}"
    reason = score if memorised is None else f"{score}, {_apart(share)}"
    if len(beaten) == len(levels):
        return "learned", reason
    if 2 * len(beaten) >= len(levels):
        return "partly learned", reason
    return "underfits", reason


def _apart(share: float) -> str:
    if abs(share) < 0.1:
        return "training error about equal"
    side = "below" if share > 0 else "above"
    return (
        f"training error lies {side} held-out error by {abs(share):.0%} of what a copy of the set"
        " has"
    )

"""A denoiser's error per noise level, beside exact bars on the same pictures and noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation._bars import Bars, Candidate, Estimate, fit_bars, without_label
from undiffuse.evaluation._split import Split, at_most, check_same_shape
from undiffuse.noise import NoiseLevel, Schedule, Stream, keyed, keyed_normal

RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 5.0)  # sigma / alpha
MOST_PICTURES = 1000
MOST_VALUES = 1 << 19  # of all pictures measured together
CHOOSING_VALUES = 1 << 18  # the same where a bar's setting is chosen
FEWEST = 64  # pictures, however large
FEW_HELD_OUT = 50
RESAMPLES = 1000
TRAIN_OFFSET = 1 << 32  # training pictures get noise of their own
MEMORY_BELOW = 1.2  # above this ratio memorised and learned look alike


Progress = Callable[[int, int], None]  # (pictures denoised, in all)


@runtime_checkable
class LevelDenoiser(Protocol):
    """`Denoiser`, or anything called like it that knows its schedule."""

    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, x: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval over pictures; None for a single picture."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class LevelResult:
    """Mean squared errors per value of the estimate of x0, at one level.

    `held_out` is without label (null), `held_out_labelled` with; None where the denoiser does not
    offer it. `bars` are unconditional and `mixture_given_class` knows the label. `gap` is the
    judged error minus `bar`, below 0 where the denoiser wins; `nats_per_value` is gap alpha^2 /
    sigma^2, the integrand over ln sigma/alpha. `train_optimum` is the least possible error on the
    training pictures and `memory` that same estimate's error on held-out ones.
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
    nats_per_value: float
    train_minus_held_out: Interval
    train_optimum: float
    memory: float
    settings: dict[str, float]


@dataclass(frozen=True)
class LevelReport:
    """The levels, and what they say together.

    `judged` is "without label" or "with label". `nats_per_value` is the sum of gap / ratio^2 times
    the step in ln ratio. `memorised` is 0 for a denoiser that treats training and held-out pictures
    alike and 1 for the train optimum, None where that cannot be told. `verdict` is "learned",
    "partly learned", "underfits", "overfits", "memorises" or "not measured"; `reason` says it in a
    sentence.
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
    draws: int
    seed: int
    notes: tuple[str, ...]

    def asdict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return asdict(self)


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
        device: where the denoiser is called; all else is computed on the CPU.
        progress: called with how many pictures the denoiser has seen, and will see in all.

    Raises:
        ConfigError: `draws` or `batch_size` is below 1, no ratio is left, or the denoiser needs
            labels and there are none.
        DataError: there are no training pictures, or shapes differ.
    """
    _check(train, held_out, draws, batch_size, labelled, null)
    levels = _levels(denoiser.schedule, ratios)
    train, held_out = train.on_cpu(), held_out.on_cpu()
    if not len(held_out):
        return _not_measured(train, draws, seed)
    bars = fit_bars(train, seed)
    limit = min(MOST_PICTURES, max(FEWEST, MOST_VALUES // train.x0[0].numel()))
    unseen = at_most(held_out, limit, seed, tag=11)
    trained = at_most(bars.pictures, len(unseen), seed, tag=12)
    labels = labelled and unseen.label is not None
    total = len(levels) * draws * (len(unseen) * (int(labels) + int(null)) + len(trained))
    watched = _watched(denoiser, total, progress)
    models = _models(watched, batch_size, device, labels, null)
    job = _Job(models, bars, trained, unseen, draws, seed, known)
    measured = [_measure(job, place, level) for place, level in enumerate(levels)]
    return _report(job, measured, _notes(job, len(held_out), len(ratios) - len(levels)))


def _watched(denoiser: LevelDenoiser, total: int, progress: Progress) -> Estimate:
    """The denoiser, counting the pictures it is given."""
    done = 0

    def watched(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        nonlocal done
        estimate = denoiser(x, level, label)
        done += len(x)
        progress(done, total)
        return estimate

    return watched


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


def _levels(schedule: Schedule, ratios: Sequence[float]) -> list[NoiseLevel]:
    """Those the schedule reaches; it clamps the others."""
    wanted = torch.tensor(sorted(ratios), dtype=torch.float64)
    grid = schedule.at(wanted)
    reached = (grid.ratio - wanted).abs() <= 1e-3 * wanted
    if not bool(reached.any()):
        raise ConfigError(f"the schedule reaches none of the ratios {list(ratios)}")
    rows = zip(*(v[reached] for v in grid), strict=True)
    return [NoiseLevel(*row) for row in rows]


def _not_measured(train: Split, draws: int, seed: int) -> LevelReport:
    reason = "there are no held-out pictures"
    none = "not measured"
    return LevelReport((), "", (), None, None, none, reason, 0, len(train), draws, seed, ())


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


def _models(
    denoiser: Estimate, batch_size: int, device: torch.device | str, labels: bool, null: bool
) -> dict[str, Estimate]:
    """ "plain" and "labelled", as far as the denoiser offers them; the first is the judged one."""

    @torch.no_grad()
    def labelled(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        classes = [None] * len(x) if label is None else label.to(device).split(batch_size)
        parts = zip(x.to(device).split(batch_size), classes, strict=False)
        return torch.cat([denoiser(part, level, c).cpu() for part, c in parts])

    plain = {"plain": without_label(labelled)} if null else {}
    return plain | ({"labelled": labelled} if labels else {})


@dataclass(frozen=True)
class _Job:
    models: Mapping[str, Estimate]
    bars: Bars
    train: Split
    held_out: Split
    draws: int
    seed: int
    known: bool

    @property
    def judged(self) -> str:
        return next(iter(self.models))


Errors = NDArray[np.float64]  # (n,): per picture, mean over values and draws


@dataclass(frozen=True)
class _Measured:
    ratio: float
    unseen: Mapping[str, Errors]
    bar_names: tuple[str, ...]
    settings: dict[str, float]
    train: Errors
    train_optimum: Errors

    def best_bar(self, names: Sequence[str]) -> str:
        return min(names, key=lambda name: self.unseen[name].mean())

    def judged_bars(self, judged: str) -> tuple[str, ...]:
        """The bars that know as much as the denoiser does."""
        knows = judged == "labelled" and "given_class" in self.unseen
        return (*self.bar_names, "given_class") if knows else self.bar_names

    def gaps(self, judged: str) -> Errors:
        return self.unseen[judged] - self.unseen[self.best_bar(self.judged_bars(judged))]


def _measure(job: _Job, place: int, level: NoiseLevel) -> _Measured:
    part = place << 20  # the draws of one level do not meet those of the next
    chosen = {name: _chosen(family, job, level, part) for name, family in job.bars.families.items()}
    estimates = {**job.models, **{name: c.estimate for name, c in chosen.items()}}
    if job.bars.given_class is not None and _classes_known(job):
        estimates["given_class"] = job.bars.given_class
    estimates["memory"] = job.bars.memory
    known = {"model": job.models[job.judged], "memory": job.bars.memory}
    at_train = _errors(known, job.train, level, TRAIN_OFFSET, part, job)
    return _Measured(
        ratio=float(level.ratio),
        unseen=_errors(estimates, job.held_out, level, 0, part, job),
        bar_names=tuple(chosen),
        settings={n: c.setting for n, c in chosen.items() if len(job.bars.families[n]) > 1},
        train=at_train["model"],
        train_optimum=at_train["memory"],
    )


def _classes_known(job: _Job) -> bool:
    classes = job.held_out.classes()
    return bool(classes) and set(classes) <= set(job.bars.pictures.classes())


def _chosen(family: tuple[Candidate, ...], job: _Job, level: NoiseLevel, part: int) -> Candidate:
    """The candidate of least error on the first draw (of the first pictures, if they are large)."""
    if len(family) == 1:
        return family[0]
    count = max(FEWEST, CHOOSING_VALUES // job.held_out.x0[0].numel())
    some = job.held_out.at(slice(count))
    x = _noised(some, level, 0, part, job.seed)
    return min(family, key=lambda c: float((c.estimate(x, level, None) - some.x0).square().mean()))


def _noised(split: Split, level: NoiseLevel, offset: int, part: int, seed: int) -> Tensor:
    places = range(offset, offset + len(split))
    noise = keyed_normal(seed, Stream.EVALUATE, places, tuple(split.x0.shape[1:]), part)
    return level.mix(split.x0, noise)


def _errors(
    estimates: Mapping[str, Estimate],
    split: Split,
    level: NoiseLevel,
    offset: int,
    part: int,
    job: _Job,
) -> dict[str, Errors]:
    """Squared error per picture of every estimate, on the same noise."""
    totals = {name: torch.zeros(len(split), dtype=torch.float64) for name in estimates}
    for draw in range(job.draws):
        x = _noised(split, level, offset, part + draw, job.seed)
        for name, estimate in estimates.items():
            apart = estimate(x, level, split.label) - split.x0
            totals[name] += apart.double().square().flatten(1).mean(1)
    return {name: (total / job.draws).numpy() for name, total in totals.items()}


# --- reading ------------------------------------------------------------------------------------


def _report(job: _Job, measured: list[_Measured], notes: tuple[str, ...]) -> LevelReport:
    weights = _steps([m.ratio for m in measured])
    gaps = [w * m.gaps(job.judged) / m.ratio**2 for w, m in zip(weights, measured, strict=True)]
    nats = _interval(np.sum(gaps, axis=0), job.seed)
    levels = tuple(_result(job, m) for m in measured)
    beaten = tuple(level.ratio for level in levels if level.gap.value < 0)
    memorised = _memorised(levels, measured, job.judged) if job.known else None
    verdict, reason = _verdict(levels, beaten, nats, memorised)
    return LevelReport(
        levels=levels,
        judged={"plain": "without label", "labelled": "with label"}[job.judged],
        beaten=beaten,
        nats_per_value=nats,
        memorised=memorised,
        verdict=verdict,
        reason=reason,
        held_out_pictures=len(job.held_out),
        train_pictures=len(job.train),
        draws=job.draws,
        seed=job.seed,
        notes=notes,
    )


def _steps(ratios: list[float]) -> list[float]:
    """Trapezoidal weights in ln ratio; 1 for a single level."""
    if len(ratios) == 1:
        return [1.0]
    logs = np.log(ratios)
    padded = np.concatenate([logs[:1], logs, logs[-1:]])
    return [float(v) for v in (padded[2:] - padded[:-2]) / 2]


def _result(job: _Job, m: _Measured) -> LevelResult:
    means = {name: float(errors.mean()) for name, errors in m.unseen.items()}
    bar = m.best_bar(m.judged_bars(job.judged))
    gap = _interval(m.gaps(job.judged), job.seed)
    both = job.judged != "labelled" and "labelled" in m.unseen
    return LevelResult(
        ratio=m.ratio,
        held_out=means.get("plain"),
        held_out_labelled=means.get("labelled"),
        train=float(m.train.mean()),
        bars={name: means[name] for name in m.bar_names},
        mixture_given_class=means.get("given_class"),
        bar=means[bar],
        bar_name=bar,
        gap=gap,
        gap_labelled=_interval(m.gaps("labelled"), job.seed) if both else None,
        nats_per_value=gap.value / m.ratio**2,
        train_minus_held_out=_difference(m.train, m.unseen[job.judged], job.seed),
        train_optimum=float(m.train_optimum.mean()),
        memory=means["memory"],
        settings=m.settings,
    )


def _resampled(values: Errors, seed: int, tag: int) -> NDArray[np.float64]:
    """Means of bootstrap samples of the pictures."""
    generator = keyed(seed, Stream.EVALUATE, (1 << 41) + tag)
    counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)
    return counts @ values / len(values)


def _bounds(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _interval(values: Errors, seed: int) -> Interval:
    """Paired: `values` are differences picture by picture."""
    low, high = _bounds(_resampled(values, seed, 0)) if len(values) > 1 else (None, None)
    return Interval(float(values.mean()), low, high)


def _difference(a: Errors, b: Errors, seed: int) -> Interval:
    """Of the means of two sets of different pictures."""
    value = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Interval(value, None, None)
    return Interval(value, *_bounds(_resampled(a, seed, 1) - _resampled(b, seed, 2)))


def _memorised(
    levels: Sequence[LevelResult], measured: Sequence[_Measured], judged: str
) -> float | None:
    """How far train and held-out errors lie apart, as a share of the train optimum's own."""
    pairs = [
        (float(m.unseen[judged].mean()) - level.train, level.memory - level.train_optimum)
        for level, m in zip(levels, measured, strict=True)
        if level.ratio <= MEMORY_BELOW
    ]
    whole = sum(most for _, most in pairs)
    return sum(apart for apart, _ in pairs) / whole if whole > 0 else None


def _verdict(
    levels: Sequence[LevelResult],
    beaten: tuple[float, ...],
    nats: Interval,
    memorised: float | None,
) -> tuple[str, str]:
    cost = f"{nats.value:+.4f} nats per value against the bars"
    score = f"held-out error below the bar at {len(beaten)} of {len(levels)} levels, {cost}"
    if not math.isfinite(nats.value):
        return "not measured", "the denoiser's estimates are not finite"
    share = 0.0 if memorised is None else memorised
    surely = any((level.train_minus_held_out.high or 0.0) < 0 for level in levels)
    if share >= 0.5:
        return "memorises", f"{_apart(share)}; {score}"
    if share >= 0.1 and surely and beaten:
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

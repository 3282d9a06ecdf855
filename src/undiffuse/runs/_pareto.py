"""Quality against the number of network evaluations, for every sampler there is."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse import drawing
from undiffuse.checkpoint import Model
from undiffuse.errors import CheckpointError
from undiffuse.evaluation import (
    FrechetJudge,
    SamplerSetting,
    best_per_budget,
    fewest_evaluations,
    frechet_judge,
    frontier,
    paired_distance,
)
from undiffuse.noise import NoiseLevel, levels
from undiffuse.runs._evaluate import (
    EvaluateOptions,
    Progress,
    Subject,
    described,
    sampled,
    subject_of,
)
from undiffuse.runs._folder import RunFolder, read_json, write_json
from undiffuse.runs._generate import spacing_of
from undiffuse.sampling import SAMPLERS, Sampler, finish, start

Grid = Callable[[int], Sequence[NoiseLevel]]  # steps -> their noise levels

SCHEMA = "undiffuse.pareto/1"
BUDGETS = (4, 5, 6, 8, 10, 15, 20, 35, 50)  # network evaluations
REFERENCE = 100  # network evaluations that count as many
PAIRED = 250  # pictures whose distances to their references are measured; these scatter little


@dataclass(frozen=True)
class Pareto:
    """All settings, and what follows from them.

    `reference` is the Fréchet distance at 100 evaluations of the sampler that was asked for, and
    `floor` what as many real pictures score. `best` holds one setting per budget and `frontier`
    those that no setting of as few evaluations beats; `recommended` has the fewest evaluations
    within 10 % of `reference`.
    """

    settings: tuple[SamplerSetting, ...]
    reference: SamplerSetting
    floor: float
    best: tuple[SamplerSetting, ...]
    frontier: tuple[SamplerSetting, ...]
    recommended: SamplerSetting | None
    measured: dict[str, Any]
    warnings: tuple[str, ...]

    def asdict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return {"schema": SCHEMA, **asdict(self)}


def pareto_run(
    path: str | Path,
    options: EvaluateOptions = EvaluateOptions(),  # noqa: B008 - frozen
    progress: Progress = lambda what, done, total: None,
) -> Pareto:
    """Measure every sampler at 4 to 50 network evaluations, from the same noise.

    The figure of merit is the Fréchet distance to held-out pictures in a classifier's features, of
    all samples. Beside it stands the root mean square distance of the pictures to those that the
    same sampler makes of the same noise in 100 evaluations, which has no sampling noise; samplers
    that add noise have none. With guidance an evaluation is two passes through a network.

    Of a run, RUN/pareto.json is written after every setting, and what it holds is not measured
    again if all else is the same; RUN/pareto.png shows the end.

    Args:
        options: `sampling.sampler` gives the reference; its number of steps and `draws` do not
            count.
        progress: first called with 0 done, before anything is computed.

    Raises:
        CheckpointError, DataError, ConfigError: as `evaluate_run`.
    """
    path = Path(path)
    subject = subject_of(path, options)
    plan = _plan(_grid_of(subject.model))
    judge = frechet_judge(
        subject.train, subject.held_out, seed=subject.sampling.seed, features=subject.features
    )
    measured = _measured(subject, options, judge)
    store = _Store(RunFolder(path).pareto if path.is_dir() else None, measured, {})
    store.read()
    job = _Job(subject, judge, options.sampling.sampler.value, store)
    job.run(plan, _Counter(progress, job.passes(plan)))
    made = _pareto(job, plan)
    if path.is_dir():
        write_json(RunFolder(path).pareto, made.asdict())
        figure = drawing.draw_pareto(made.asdict())
        drawing.save(figure, RunFolder(path).pareto.with_suffix(".png"))
    return made


# --- which settings -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """A sampler with the most steps that a budget allows."""

    sampler: str
    budget: int
    steps: int
    evaluations: int
    adds_noise: bool

    @property
    def key(self) -> tuple[str, int]:
        return self.sampler, self.budget

    def setting(self, frechet: float | None, rms: float | None) -> SamplerSetting:
        return SamplerSetting(self.sampler, self.budget, self.steps, self.evaluations, frechet, rms)


def _plan(grid: Grid) -> dict[str, list[_Candidate]]:
    """Of every sampler its settings, the last of which is the reference."""
    return {
        name: [_within(name, sampler, grid, budget) for budget in (*BUDGETS, REFERENCE)]
        for name, sampler in SAMPLERS.items()
    }


def _grid_of(model: Model) -> Grid:
    """The noise levels that `generate` takes."""
    schedule, spacing = model.denoiser.schedule, spacing_of(model)
    return lambda steps: levels(schedule, steps, spacing)


def _within(name: str, sampler: Sampler, grid: Grid, budget: int) -> _Candidate:
    """The most steps whose evaluations are not above the budget."""
    steps = budget
    evaluations, adds_noise = _tried(sampler, grid(steps))
    while evaluations > budget and steps > 1:
        steps = min(steps - 1, 1 + steps * budget // evaluations)
        evaluations, adds_noise = _tried(sampler, grid(steps))
    return _Candidate(name, budget, steps, evaluations, adds_noise)


def _tried(sampler: Sampler, grid: Sequence[NoiseLevel]) -> tuple[int, bool]:
    """How often it calls the network, and whether it draws noise: found out on a single number."""
    calls = draws = 0

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    def draw(step: int) -> Tensor:
        nonlocal draws
        draws += 1
        return torch.zeros(1, 1, 1, 1)

    finish(sampler(denoise, start(grid[0], torch.zeros(1, 1, 1, 1)), grid, noise=draw))
    return calls, draws > 0


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Store:
    """What is measured already, by sampler and budget; kept in a file where there is one."""

    file: Path | None
    measured: dict[str, Any]
    found: dict[tuple[str, int], SamplerSetting]

    def read(self) -> None:
        """Take up what the same measurement has left there."""
        if self.file is None or not self.file.exists():
            return
        try:
            body = read_json(self.file)
            if body.get("schema") == SCHEMA and body.get("measured") == self.measured:
                kept = [
                    SamplerSetting(**one) for one in (*body["settings"], body["reference"]) if one
                ]
                self.found.update({(one.sampler, one.budget): one for one in kept})
        except (CheckpointError, TypeError, KeyError):  # torn or another program's: measured anew
            return

    def add(self, setting: SamplerSetting) -> None:
        self.found[setting.sampler, setting.budget] = setting
        if self.file is not None:
            unfinished = {"schema": SCHEMA, "measured": self.measured, "reference": None}
            settings = [asdict(one) for one in self.found.values()]
            write_json(self.file, {**unfinished, "settings": settings})


@dataclass
class _Counter:
    """Batches through the network, told to whoever watches."""

    tell: Progress
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self.tell("network evaluations", 0, self.total)

    def over(self, passes: int) -> Callable[[int, int], None]:
        """A progress function of sampling that takes so many passes."""
        before = self.done

        def advance(step: int, steps: int) -> None:
            self.done = before + passes * step // steps
            self.tell("network evaluations", self.done, self.total)

        return advance


@dataclass(frozen=True)
class _Job:
    subject: Subject
    judge: FrechetJudge
    reference: str
    store: _Store

    def run(self, plan: dict[str, list[_Candidate]], counter: _Counter) -> None:
        """Measure what the store lacks."""
        for candidates in plan.values():
            exact = self.exact(candidates, counter)
            for one in self.missing(candidates):
                made = self.sampled(one, self.count, counter)
                self.store.add(self.judged(one, made, exact))

    def exact(self, candidates: Sequence[_Candidate], counter: _Counter) -> Tensor | None:
        """The first pictures of a deterministic sampler in 100 evaluations, where they are needed.

        On the way that of the reference is measured.
        """
        often = candidates[-1]
        if self.lacks_reference(often):
            made = self.sampled(often, self.count, counter)
            self.store.add(self.judged(often, made, None))
        elif self.missing(candidates) and not often.adds_noise:
            made = self.sampled(often, self.paired, counter)
        else:
            return None
        return None if often.adds_noise else made[: self.paired]

    def missing(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Of the budgets; the reference is another matter."""
        return [one for one in candidates[:-1] if one.key not in self.store.found]

    def lacks_reference(self, often: _Candidate) -> bool:
        return often.sampler == self.reference and often.key not in self.store.found

    def sampled(self, one: _Candidate, count: int, counter: _Counter) -> Tensor:
        config = self.subject.sampling
        chosen = replace(config, num_inference_steps=one.steps, num_images=count)
        progress = counter.over(one.evaluations * self.batches(count))
        return sampled(self.subject.model, self.subject.weak, chosen, progress, one.sampler)

    def judged(self, one: _Candidate, made: Tensor, exact: Tensor | None) -> SamplerSetting:
        if not bool(made.isfinite().all()):
            return one.setting(None, None)
        rms = None if exact is None else paired_distance(made[: len(exact)], exact)
        return one.setting(self.judge.distance(made), rms)

    @property
    def count(self) -> int:
        return self.subject.sampling.num_images

    @property
    def paired(self) -> int:
        return min(PAIRED, self.count)

    def batches(self, count: int) -> int:
        return -(-count // self.subject.sampling.batch_size)

    def passes(self, plan: dict[str, list[_Candidate]]) -> int:
        """Batches through the network that `run` will take."""
        return sum(self._passes(candidates) for candidates in plan.values())

    def _passes(self, candidates: Sequence[_Candidate]) -> int:
        missing, often = self.missing(candidates), candidates[-1]
        passes = sum(one.evaluations for one in missing) * self.batches(self.count)
        if self.lacks_reference(often):
            return passes + often.evaluations * self.batches(self.count)
        if missing and not often.adds_noise:
            return passes + often.evaluations * self.batches(self.paired)
        return passes


def _measured(subject: Subject, options: EvaluateOptions, judge: FrechetJudge) -> dict[str, Any]:
    """What a figure depends on, and what a reader must know of it."""
    sampling = described(subject, options)
    del sampling["num_inference_steps"]
    return sampling | {
        "levels": repr(spacing_of(subject.model)),
        "features": judge.features.name,
        "reference_pictures": judge.reference,
        "against": judge.against,
        "data": _fingerprint([subject.train.x0, subject.held_out.x0]),
        "weights": _fingerprint(subject.model.net.state_dict().values()),
        "guide": None
        if subject.weak is None
        else _fingerprint(subject.weak.net.state_dict().values()),
    }


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    """The same where the numbers are."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


# --- reading ------------------------------------------------------------------------------------


def _pareto(job: _Job, plan: dict[str, list[_Candidate]]) -> Pareto:
    found = job.store.found
    reference = found[job.reference, REFERENCE]
    settings = tuple(found[one.sampler, one.budget] for one in _budgets(plan))
    distance = reference.frechet
    return Pareto(
        settings=settings,
        reference=reference,
        floor=job.judge.floor(job.count),
        best=best_per_budget(settings),
        frontier=frontier(settings),
        recommended=None if distance is None else fewest_evaluations(settings, distance),
        measured=job.store.measured,
        warnings=job.subject.real.warnings,
    )


def _budgets(plan: dict[str, list[_Candidate]]) -> Iterator[_Candidate]:
    for candidates in plan.values():
        yield from candidates[:-1]

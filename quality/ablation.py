"""What each choice of a recipe is worth: one change at a time, on digits and on crops of photos.

The base is what `--preset digits-demo` and `--preset seconds` take.

The 360 held-out digits, which judge the presets, are never looked at. Of the 1,437 training digits
the last 287 stand in for them. Crops of photographs are judged on the right part of each, which no
training has seen.

A change is judged by the summed distance to the closed-form bars in nats per picture (lower is
better), and by what samples score.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from quality.fitted import fitted
from quality.harness import Finding, Lab, Task
from undiffuse import evaluation, images, runs
from undiffuse.checkpoint import Model
from undiffuse.config import RECIPES

KEPT = 1150  # training digits; the others validate
DRAWS, SAMPLES = 4, 1000
EVERYWHERE = (0.0, math.inf)  # all noise levels


@dataclass(frozen=True)
class Change:
    """One change of the base recipe.

    Args:
        training: settings of `undiffuse train` that differ.
        sampling: options of `runs.generate` that differ; without `training` the base's own network
            is taken.
        early: guide with an early average of the same run.
    """

    name: str
    training: tuple[tuple[str, object], ...] = ()
    sampling: tuple[tuple[str, object], ...] = ()
    early: bool = False


def trained(name: str, **settings: object) -> Change:
    return Change(name, training=tuple(settings.items()))


def sampled(name: str, early: bool = False, **options: object) -> Change:
    return Change(name, sampling=tuple(options.items()), early=early)


@dataclass(frozen=True)
class Ground:
    """Pictures, and the recipe that every change starts from."""

    name: str
    settings: tuple[tuple[str, object], ...]
    changes: tuple[Change, ...] = field(repr=False)  # each has a key of its own
    data: Callable[[], images.Data] = field(repr=False)


# Crops at random are as many as one likes: more steps than the recipe "seconds", smaller batches.
CROPS = {"preset": "tiny", "max_train_steps": 900, "train_batch_size": 32, "random_flip": True}

# Every choice of the recipes, and what else is usual.
COMMON = (
    Change("base"),
    trained("levels centred at sigma 0.3 (EDM)", p_mean=-1.2),
    trained("levels centred at sigma 1", p_mean=0.0),
    trained("levels spread 1", p_std=1.0),
    trained("levels spread 1.6", p_std=1.6),
    trained("epsilon prediction", prediction_type="epsilon"),
    trained("v prediction", prediction_type="v_prediction"),
    trained("sample prediction", prediction_type="sample"),
    trained("flow schedule and prediction", beta_schedule="flow"),
    trained(
        "cosine schedule, v", beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    ),
    trained("average length 0.02", ema_length=0.02),
    trained("average length 0.2", ema_length=0.2),
    trained("dropout 0.1", dropout=0.1),
    trained("augment 0.12", augment=0.12),
    trained("constant learning rate", lr_scheduler="constant"),
    trained("linear decay", lr_scheduler="linear"),
    trained("beta2 0.999", adam_beta2=0.999),
)
DIGITS = (
    trained("without stable targets", stable_targets=False),
    trained("without more weight on high noise", high_noise_weight=None),
    trained("without both", stable_targets=False, high_noise_weight=None),
    trained("without both, min-SNR 5", stable_targets=False, high_noise_weight=None, snr_gamma=5.0),
    trained("learning rate 0.0015", learning_rate=1.5e-3),
    trained("learning rate 0.006", learning_rate=6e-3),
    trained("network tiny", preset="tiny"),
    trained("label dropout 0.1", label_dropout=0.1),
    trained("label dropout 0.75", label_dropout=0.75),
    trained("without classes", class_conditional=False),
    sampled("without guidance", guidance_scale=1.0),
    sampled("guidance 1.5", guidance_scale=1.5),
    sampled("guidance at all levels", guidance_interval=EVERYWHERE),
    sampled("autoguidance 1.3 at all levels, early average", True, guidance_interval=EVERYWHERE),
)
PHOTOS = (
    trained("learning rate 0.001", learning_rate=1e-3),
    trained("learning rate 0.004", learning_rate=4e-3),
    trained("min-SNR 5", snr_gamma=5.0),
    trained("more weight on high noise", high_noise_weight=10.0),
    trained("without flips", random_flip=False),
)


@cache
def _digits() -> images.Data:
    data = images.load("digits")
    train, held_out = (_part(data.train, one) for one in (slice(KEPT), slice(KEPT, None)))
    return replace(data, train=train, held_out=held_out, fingerprint="digits-validation")


def _part(data: images.Dataset, where: slice) -> images.Dataset:
    assert data.labels is not None
    return replace(
        data, pixels=data.pixels[where], labels=data.labels[where], names=data.names[where]
    )


@cache
def _photos() -> images.Data:
    """Grey crops of 16 pixels: small, so that a change costs two minutes."""
    return images.load("photos", images.DataOptions(resolution=(16, 16), channels=1))


GROUNDS = (
    Ground("digits", tuple(RECIPES["digits-demo"].settings.items()), (*COMMON, *DIGITS), _digits),
    Ground(
        "photos",
        tuple({**RECIPES["seconds"].settings, **CROPS}.items()),
        (*COMMON, *PHOTOS),
        _photos,
    ),
)


def findings(ground: Ground, change: Change, lab: Lab, seed: int) -> Iterator[Finding]:
    data = ground.data()
    run, model = _model(ground, change, lab, seed)
    train, held_out = (_some(one) for one in (data.train, data.held_out))
    name = f"ablation/{ground.name}/{change.name}"
    if not change.sampling:
        report = evaluation.loss_by_level(
            model.denoiser, train, held_out, draws=DRAWS, labelled=model.spec.classes > 0
        )
        assert report.nats_per_picture is not None
        detail = {"levels": [[one.ratio, one.held_out, one.bar] for one in report.levels]}
        nats = report.nats_per_picture.value
        yield Finding(f"{name}/nats", nats, unit="nats per picture", detail=detail)
        if report.memorised is not None:
            yield Finding(f"{name}/memorised", report.memorised, unit="share")
    options: dict[str, object] = dict(change.sampling)
    if change.early:
        options["weak"] = runs.guide(run, "early")
    made = runs.generate(model, SAMPLES, seed=seed, batch_size=250, **options)  # pyright: ignore[reportArgumentType] # options of generate
    samples = evaluation.Split(made, runs.labels_in_turn(model, SAMPLES))
    for figure in evaluation.sample_quality(samples, train, held_out).figures:
        if figure.value is not None:
            yield Finding(f"{name}/{figure.name}", figure.value, floor=figure.floor)


def _some(data: images.Dataset) -> evaluation.Split:
    return evaluation.Split(*data.fixed(2000))


def _model(ground: Ground, change: Change, lab: Lab, seed: int) -> tuple[Path, Model]:
    """Trained, or taken from where it is kept; a training that was stopped goes on."""
    settings: Mapping[str, object] = {**dict(ground.settings), **dict(change.training)}
    run = lab.folder(f"ablation-{ground.name}", sorted(settings.items(), key=str), seed)
    once = {"sample_every": settings["max_train_steps"]}
    return run, fitted(run, ground.data(), **settings, **once, seed=seed)


TASKS = tuple(
    Task(
        f"ablation/{ground.name}/{change.name}",
        partial(findings, ground, change),
        (ground, change, KEPT, DRAWS, SAMPLES),
    )
    for ground in GROUNDS
    for change in ground.changes
)

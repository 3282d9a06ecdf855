"""Whether samples are of the class that was asked for, and whether they teach what classes are."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from undiffuse.evaluation._features import PIXELS, SVM_PICTURES, class_judge
from undiffuse.evaluation._quality_figure import HIGHER, Figure, share_std, unmeasured
from undiffuse.evaluation._split import Sets, Split, at_most

_Judge = Callable[[Tensor], NDArray[np.int64]]
_Hits = dict[int, tuple[int, int]]  # class -> (right, all)

_ACCURACY_NOTE = (
    "RBF support vector machine fitted on at most"
    f" {SVM_PICTURES} training pictures; mean over classes. Blind to diversity and to copies;"
    " above the floor is not better"
)
_TEACHING_NOTE = (
    "held-out pictures named by an RBF support vector machine fitted on {} samples, floor: on {}"
    " training pictures; mean over classes (1905.10887). Blind to copies and to bad pictures"
    " beside good ones"
)


def class_accuracy(sets: Sets) -> Figure:
    """How often a judge that knows the training pictures sees in samples the class asked for."""
    train, samples, name = sets.train, sets.samples, "class_accuracy"
    judged_by = at_most(train, SVM_PICTURES, sets.seed, tag=2)
    why = _unlabelled(sets) or _one_class(judged_by, "training pictures")
    if not why and not set(samples.classes()) & set(train.classes()):
        why = "no sample is of a class of the training pictures"
    if why:
        return unmeasured(name, HIGHER, PIXELS, why, _ACCURACY_NOTE)
    judge = class_judge(judged_by)
    sampled = _per_class(judge, samples, train.classes())
    real = _per_class(judge, sets.held_out, train.classes())
    shared = sorted(sampled.keys() & real.keys()) or sorted(sampled)
    value, _, n = _mean_accuracy(sampled, shared)
    floor, std, _ = _mean_accuracy(real, shared) if real else (None, None, 0)
    figure = Figure(name, value, floor, std, HIGHER, n, PIXELS, _ACCURACY_NOTE)
    missing = sorted(set(train.classes()) - set(shared))
    if real and missing:
        return figure.warned(f"no samples or held-out pictures of classes {_few(missing)}")
    return figure if real else figure.warned("no labelled held-out pictures, so no floor")


def train_on_samples(sets: Sets) -> Figure:
    """How well a judge that has seen nothing but samples names held-out pictures (Ravuri & Vinyals
    2019, 1905.10887: the classification accuracy score)."""
    n = min(len(sets.samples), len(sets.train), SVM_PICTURES)
    taught = at_most(sets.samples, n, sets.seed, tag=5)
    by_real = at_most(sets.train, n, sets.seed, tag=6)
    why = _unlabelled(sets) or _one_class(taught, "samples")
    why = why or _one_class(by_real, "training pictures")
    shared = sorted(set(sets.held_out.classes()) & set(sets.train.classes()))
    if not why and not shared:
        why = "no labelled held-out pictures"
    note = _TEACHING_NOTE.format(n, n)
    if why:
        return unmeasured("train_on_samples", HIGHER, PIXELS, why, note)
    value, floor = (
        _mean_accuracy(_per_class(class_judge(part), sets.held_out, shared), shared)
        for part in (taught, by_real)
    )
    return Figure("train_on_samples", value[0], *floor[:2], HIGHER, n, PIXELS, note)


def _unlabelled(sets: Sets) -> str:
    known = sets.train.label is not None and sets.samples.label is not None
    return "" if known else "the pictures have no classes"


def _one_class(split: Split, of: str) -> str:
    return f"the {of} have one class only" if len(split.classes()) < 2 else ""


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (" …" if len(numbers) > 10 else "")


def _per_class(judge: _Judge, split: Split, classes: list[int]) -> _Hits:
    if split.label is None or not len(split):
        return {}
    label = split.label.numpy()
    right = judge(split.x0) == label
    return {
        c: (int(right[label == c].sum()), int((label == c).sum())) for c in classes if c in label
    }


def _mean_accuracy(hits: _Hits, classes: list[int]) -> tuple[float, float, int]:
    """Mean over classes, its standard error, and the number of pictures."""
    counted = [hits[c] for c in classes if c in hits]
    n = sum(total for _, total in counted)
    value = sum(right / total for right, total in counted) / len(counted)
    effective = len(counted) ** 2 / sum(1 / total for _, total in counted)
    return value, share_std(value, effective), n

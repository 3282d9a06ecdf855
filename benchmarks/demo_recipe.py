"""How the demo's recipe was chosen: on a validation part of the training digits.

    python benchmarks/demo_recipe.py            (about seven minutes on two cores)

The 360 held-out digits, which judge the demo, are never looked at. Of the 1,437 training digits
the last 287 stand in for them; the classifier is fitted on the others, too. Prints one line of
JSON per candidate.
"""

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from undiffuse import evaluation, images, runs

STEPS, KEPT = 900, 1150


def part(data: images.Dataset, where: slice) -> images.Dataset:
    assert data.labels is not None
    return replace(
        data, pixels=data.pixels[where], labels=data.labels[where], names=data.names[where]
    )


def candidate(data: images.Data, learning_rate: float, p_mean: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        last: list[runs.Event] = []
        model = runs.fit(
            data,
            output_dir=Path(folder) / "run",
            max_train_steps=STEPS,
            learning_rate=learning_rate,
            p_mean=p_mean,
            sample_every=STEPS,
            seed=1,
            on_event=last.append,
        )
    finished = last[-1]
    assert isinstance(finished, runs.Finished)
    samples = runs.generate(model, 1000, seed=1, batch_size=250)
    report = evaluation.sample_quality(
        evaluation.Split(samples, runs.labels_in_turn(model, 1000)),
        evaluation.Split(*data.train.fixed()),
        evaluation.Split(*data.held_out.fixed()),
    )
    figures = {figure.name: figure.value for figure in report.figures}
    return {
        "learning_rate": learning_rate,
        "p_mean": p_mean,
        "seconds": round(finished.seconds, 1),
        **{name: figures[name] for name in ("class_accuracy", "frechet", "precision", "recall")},
    }


def main() -> None:
    digits = images.load("digits")
    train = part(digits.train, slice(0, KEPT))
    validation = part(digits.train, slice(KEPT, None))
    data = replace(digits, train=train, held_out=validation, fingerprint="validation")
    for learning_rate, p_mean in itertools.product((1e-3, 2e-3), (-1.2, -0.6)):
        print(json.dumps(candidate(data, learning_rate, p_mean)), flush=True)


if __name__ == "__main__":
    main()

"""Each command, imported only when it runs: most need torch, and `--help` does not wait."""

import gc
from collections.abc import Generator
from contextlib import contextmanager

from undiffuse.cli._arguments import Arguments
from undiffuse.cli._output import Output


@contextmanager
def _no_collection() -> Generator[None]:
    """Importing torch makes hundreds of thousands of objects that stay. Looking for garbage among
    them takes a tenth of a second each time, so they are put out of its reach, once."""
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()


def demo(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _demo

    return _demo.demo(arguments, out)


def train(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _train

    return _train.train(arguments, out)


def sample(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _pictures

    return _pictures.sample(arguments, out)


def denoise(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _editing

    return _editing.denoise(arguments, out)


def inpaint(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _editing

    return _editing.inpaint(arguments, out)


def edit(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _editing

    return _editing.edit(arguments, out)


def interpolate(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _editing

    return _editing.interpolate(arguments, out)


def evaluate(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _against, _evaluate, _pareto

    if "against" in arguments.given:
        return _against.against(arguments, out)
    if "pareto" in arguments.given:
        return _pareto.pareto(arguments, out)
    return _evaluate.evaluate(arguments, out)


def likelihood(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _likelihood

    return _likelihood.likelihood(arguments, out)


def describe(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _describe

    return _describe.describe(arguments, out)


def import_(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _exchange

    return _exchange.import_(arguments, out)


def export(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _exchange

    return _exchange.export(arguments, out)


def average(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _average

    return _average.average(arguments, out)


def report(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _about

    return _about.report(arguments, out)


def env(arguments: Arguments, out: Output) -> int:
    with _no_collection():
        from undiffuse.cli import _about

    return _about.env(arguments, out)

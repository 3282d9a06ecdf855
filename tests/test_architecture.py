"""The house stands: who may import whom, and what no module may do.

Every file under the package is parsed, imports inside functions included. A sub-package counts as
its top module. A new module fails here until it has its line in `HOUSE`.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import undiffuse

ROOT = Path(undiffuse.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


class Place(NamedTuple):
    """Where a module stands, and what it may import."""

    floor: float
    ours: frozenset[str]
    outside: frozenset[str]


def place(floor: float, ours: str = "", outside: str = "") -> Place:
    return Place(floor, frozenset(ours.split()), frozenset(outside.split()))


# `errors` is below floor 0: everyone may import it. The absences are the architecture: `unet` does
# not know noise, `denoiser` does not know `unet`, `sampling` does not know `denoiser`, `training`
# knows neither pictures nor files, `report` does not compute.
HOUSE = {
    "errors": place(-1),
    "config": place(0),
    "spec": place(0),
    "noise": place(0, outside="torch numpy jaxtyping"),
    "images": place(0, outside="torch numpy PIL sklearn jaxtyping"),
    "kernels": place(0, outside="torch jaxtyping"),
    "averaging": place(1, outside="torch numpy"),
    "recipes": place(1, "spec"),
    "cost": place(1, "spec"),
    "unet": place(1, "spec", "torch jaxtyping"),
    "denoiser": place(1, "noise", "torch jaxtyping"),
    "augmentation": place(1, "noise", "torch jaxtyping"),
    "guidance": place(1, "noise", "torch jaxtyping"),
    "sampling": place(1, "noise", "torch jaxtyping"),
    "oracles": place(1, "noise", "torch jaxtyping"),
    "fast": place(1.2, "spec unet kernels", "torch jaxtyping"),
    "runtime": place(1.4, "config spec unet kernels fast", "torch jaxtyping"),
    "likelihood": place(1.5, "noise", "torch jaxtyping"),
    "editing": place(1.5, "noise sampling guidance", "torch jaxtyping"),
    "textbook": place(2, "spec recipes unet", "torch jaxtyping"),
    "training": place(2, "config averaging noise denoiser", "torch numpy jaxtyping"),
    "checkpoint": place(2, "spec unet noise denoiser", "torch numpy"),
    "distributed": place(2, "config", "torch"),
    "evaluation": place(
        2, "noise denoiser guidance sampling oracles", "torch numpy sklearn jaxtyping"
    ),
    "drawing": place(2, "spec noise images", "torch numpy matplotlib"),
    "report": place(2, "images", "matplotlib"),
    "interop": place(
        2,
        "spec recipes unet noise denoiser guidance augmentation",
        "torch safetensors jaxtyping",
    ),
    "probe": place(2, "spec unet noise denoiser", "torch jaxtyping"),
}
BELOW_RUNS = " ".join(HOUSE)
HOUSE["runs"] = place(2.5, BELOW_RUNS, "torch numpy jaxtyping")
HOUSE["cli"] = place(3, f"{BELOW_RUNS} runs", "torch numpy tqdm")
HOUSE["__main__"] = place(4, "cli")
# The lazy table of public names; everything but the command line.
HOUSE["__init__"] = place(4, f"{BELOW_RUNS} runs")

# Outside packages that one module may use inside a single function, and why.
EXTRAS = {
    ("runs", "torch.utils.tensorboard"): "an optional tracker, imported when asked for",
    ("runs", "skimage"): "the extra `compare`: non-local means beside the network",
    ("interop", "onnx"): "the extra `onnx`: checks the form of a graph that was written",
    ("interop", "onnxruntime"): "likewise: runs the graph, to compare it with the network",
    ("evaluation", "onnxruntime"): "likewise: runs the network that the user names as features",
    ("interop", "diffusers"): "the extra `diffusers`: runs what was written for it, likewise",
}

# Functions that may seed torch's global generator without forking it, and why.
SEEDS = {("training.py", "_seed_dropout"): "dropout has no generator argument in torch"}


# The tables of public names that are imported when they are first used.
LAZY = {"__init__.py", "runs/__init__.py"}

# The one file that may open a pickle: it runs as a process of its own, under limits.
LOADS = {"interop/_child.py"}


class Import(NamedTuple):
    """One imported module, in full: `from undiffuse import noise` is `undiffuse.noise`."""

    module: str
    line: int


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(node: ast.AST) -> Iterator[Import]:
    for one in ast.walk(node):
        if isinstance(one, ast.Import):
            yield from (Import(alias.name, one.lineno) for alias in one.names)
        elif isinstance(one, ast.ImportFrom) and one.module == "undiffuse":
            yield from (Import(f"undiffuse.{alias.name}", one.lineno) for alias in one.names)
        elif isinstance(one, ast.ImportFrom):
            yield Import("." * one.level + (one.module or ""), one.lineno)


def forbidden_imports(name: str, node: ast.AST) -> list[str]:
    """What is wrong with the imports of a module called `name`."""
    room = HOUSE[name]
    ours = room.ours | {"errors", name, "__version__"}
    wrong: list[str] = []
    for module, line in imports(node):
        top, _, rest = module.partition(".")
        if module.startswith("."):
            wrong.append(f"line {line}: relative import; write it in full")
            continue
        if top == "undiffuse":
            allowed = rest.partition(".")[0] in ours
        else:
            allowed = top in room.outside | sys.stdlib_module_names
        if not allowed:
            wrong.append(f"line {line}: {name} may not import {module}")
    return wrong


def dotted(node: ast.AST) -> str:
    """`torch.random.fork_rng` of that expression; empty if it is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return ""


def calls(node: ast.AST) -> Iterator[ast.Call]:
    return (one for one in ast.walk(node) if isinstance(one, ast.Call))


PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def breaches(file_name: str, node: ast.Module) -> list[str]:
    """Every line of a module that does what no module may do."""
    wrong = [f"line {i.line}: {i.module}" for i in imports(node) if i.module in PICKLES]
    for call in calls(node):
        wrong += [f"line {call.lineno}: {why}" for why in _wrong_call(file_name, call)]
    wrong += [f"line {c.lineno}: {dotted(c.func)}" for c in _unforked_seeds(file_name, node)]
    wrong += [f"line {f.lineno}: {f.name} passes **kwargs through" for f in _passing_on(node)]
    wrong += [f"line {i.line}: __future__" for i in imports(node) if i.module == "__future__"]
    return wrong


def _wrong_call(file_name: str, call: ast.Call) -> Iterator[str]:
    called = dotted(call.func)
    if called == "hasattr":
        yield "hasattr; give both cases one type"
    if called == "print" and file_name.split("/")[0] != "cli":
        yield "print outside cli"
    if called in ("torch.load", "torch.save") and (
        called == "torch.save" or file_name not in LOADS
    ):
        yield f"{called} is a pickle"
    if called in ("import_module", "importlib.import_module", "__import__"):
        yield from ["import by name"] if file_name not in LAZY else []
    for keyword in call.keywords:
        if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
            yield "allow_pickle"


def _is_seed(call: ast.Call) -> bool:
    called = dotted(call.func)
    head, _, verb = called.rpartition(".")
    return head in (
        "torch",
        "torch.cuda",
        "torch.random",
        "np.random",
        "numpy.random",
        "random",
    ) and (
        verb in ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_state", "set_rng_state")
    )


def _unforked_seeds(file_name: str, node: ast.AST, forked: bool = False) -> Iterator[ast.Call]:
    """Calls that seed a global generator outside `with torch.random.fork_rng(...)`."""
    if isinstance(node, ast.FunctionDef) and (file_name, node.name) in SEEDS:
        return
    if isinstance(node, ast.With):
        opened = (
            dotted(i.context_expr.func) for i in node.items if isinstance(i.context_expr, ast.Call)
        )
        forked = forked or "torch.random.fork_rng" in opened
    if isinstance(node, ast.Call) and _is_seed(node) and not forked:
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _unforked_seeds(file_name, child, forked)


def _passing_on(node: ast.AST) -> Iterator[ast.FunctionDef]:
    for function in ast.walk(node):
        if isinstance(function, ast.FunctionDef) and function.args.kwarg is not None:
            name = function.args.kwarg.arg
            starred = (k.value for c in calls(function) for k in c.keywords if k.arg is None)
            if any(dotted(value) == name for value in starred):
                yield function


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_go_down_only(file: Path) -> None:
    name = name_of(file)
    assert name in HOUSE, f"{relative(file)} has no line in HOUSE: decide where it stands"
    extras = {module for owner, module in EXTRAS if owner == name}
    wrong = forbidden_imports(name, tree(file))
    assert [w for w in wrong if not any(module in w for module in extras)] == []


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_module_does_what_none_may(file: Path) -> None:
    assert breaches(relative(file), tree(file)) == []


def test_the_table_itself_goes_down_only() -> None:
    for name, room in HOUSE.items():
        for other in room.ours:
            assert HOUSE[other].floor < room.floor, f"{name} may not look up to {other}"


def test_exceptions_are_still_needed() -> None:
    for file_name, function in SEEDS:
        node = tree(ROOT / file_name)
        found = [f for f in ast.walk(node) if isinstance(f, ast.FunctionDef) and f.name == function]
        assert any(_is_seed(call) for call in calls(found[0]))
    for owner, module in EXTRAS:
        files = [file for file in FILES if name_of(file) == owner]
        assert any(i.module.startswith(module) for f in files for i in imports(tree(f)))


@pytest.mark.parametrize("file_name", sorted(LOADS))
def test_a_file_that_opens_pickles_is_imported_by_none_and_trusts_no_pickle(file_name: str) -> None:
    loads = [c for c in calls(tree(ROOT / file_name)) if dotted(c.func) == "torch.load"]
    assert [k.arg for k in loads[0].keywords if ast.unparse(k.value) == "True"] == ["weights_only"]
    assert len(loads) == 1
    module = f"undiffuse.{file_name.removesuffix('.py').replace('/', '.')}"
    assert [file for file in FILES if any(i.module == module for i in imports(tree(file)))] == []


def test_there_is_no_drawer_for_everything() -> None:
    assert {file.stem for file in FILES} & {"utils", "util", "helpers", "common", "misc"} == set()


@pytest.mark.parametrize("word", ["device", "autocast", "memory_format", "compile"])
def test_the_network_decides_nothing_about_the_machine(word: str) -> None:
    assert word not in (ROOT / "unet.py").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spec", "import torch"),
        ("spec", "def f():\n    from numpy import array"),
        ("unet", "from undiffuse.noise import Flow"),
        ("unet", "from undiffuse import noise"),
        ("denoiser", "def f():\n    import undiffuse.unet"),
        ("sampling", "from undiffuse.denoiser import Denoiser"),
        ("training", "from undiffuse.checkpoint._model import Model"),
        ("report", "import torch"),
        ("runs", "from undiffuse.cli import main"),
        ("noise", "from .spec import Res"),
        ("__init__", "from undiffuse import cli"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(forbidden_imports(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "hasattr(x, 'y')",
        "import pickle",
        "def f():\n    from pickle import loads",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "print(1)",
        "torch.manual_seed(0)",
        "np.random.seed(0)",
        "with open(x):\n    torch.manual_seed(0)",
        "import_module(name)",
        "def f(**kwargs):\n    return g(**kwargs)",
        "from __future__ import annotations",
    ],
)
def test_a_breach_is_found(source: str) -> None:
    assert len(breaches("noise.py", ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)",
        "np.load(path, allow_pickle=False)",
        "def f(**changes):\n    return g(changes)",
        "torch.Generator().manual_seed(0)",
    ],
)
def test_what_is_allowed_passes(source: str) -> None:
    assert breaches("noise.py", ast.parse(source)) == []

"""What `import undiffuse` gives, and what it does not pay for."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import undiffuse

PACKAGE = Path(undiffuse.__file__).parent
HEAVY = ("torch", "numpy", "matplotlib", "sklearn", "PIL")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, without the tests' import hook."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )


def test_names_are_sorted_and_unique() -> None:
    assert undiffuse.__all__ == sorted(set(undiffuse.__all__))


@pytest.mark.parametrize("name", undiffuse.__all__)
def test_every_name_exists_where_it_is_said_to_live(name: str) -> None:
    value = getattr(undiffuse, name)
    if name in undiffuse._HOMES:
        assert value is getattr(import_module(f"undiffuse.{undiffuse._HOMES[name]}"), name)
    elif name != "__version__":
        assert isinstance(value, ModuleType)
        assert value is sys.modules[f"undiffuse.{name}"]


def test_every_module_is_public_but_the_command_line() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    modules = {name for name in undiffuse.__all__ if (PACKAGE / name).is_dir()} | {
        name for name in undiffuse.__all__ if (PACKAGE / f"{name}.py").is_file()
    }
    assert modules == found - {"py", "cli"}


def test_type_checkers_see_the_same_names() -> None:
    source = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    blocks = [n for n in source.body if isinstance(n, ast.If)]
    assert [ast.unparse(block.test) for block in blocks] == ["TYPE_CHECKING"]
    homes: dict[str, str] = {}
    for statement in blocks[0].body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            homes[alias.name] = (statement.module or "").removeprefix("undiffuse").lstrip(".")
    assert sorted([*homes, "__version__"]) == undiffuse.__all__
    assert {name: home for name, home in homes.items() if home} == undiffuse._HOMES


def test_dir_shows_the_public_names_and_an_unknown_one_is_an_attribute_error() -> None:
    assert dir(undiffuse) == undiffuse.__all__
    with pytest.raises(AttributeError, match=r"module 'undiffuse' has no attribute 'unett'"):
        _ = undiffuse.unett  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="Trainer"):
        from undiffuse import Trainer  # noqa: F401


def test_the_version_is_that_of_the_project_file() -> None:
    project = PACKAGE.parent.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("installed without its project file")
    assert tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] == (
        undiffuse.__version__
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import undiffuse",
        "import undiffuse; undiffuse.preset('ddpm'); undiffuse.UNetSpec; dir(undiffuse)",
        "import undiffuse.spec",
        "import undiffuse.recipes",
        "import undiffuse.cost",
        "import undiffuse.config",
        "import undiffuse.errors",
        "import undiffuse.cli",
    ],
)
def test_light_imports_stay_light(statement: str) -> None:
    child = python("-c", f"{statement}; import sys; print(*sys.modules)")
    assert child.returncode == 0, child.stderr
    assert set(child.stdout.split()) & set(HEAVY) == set()


def test_help_does_not_wait_for_torch() -> None:
    child = python("-X", "importtime", "-m", "undiffuse", "--help")
    assert child.returncode == 0, child.stderr
    assert "train" in child.stdout
    imported = {line.rpartition("|")[2].strip() for line in child.stderr.splitlines()}
    assert "undiffuse.cli" in imported  # else the list below says nothing
    assert imported & set(HEAVY) == set()


def test_the_names_work_without_importing_their_modules_first() -> None:
    child = python("-c", "from undiffuse import UNet, preset; print(UNet(preset('tiny')).stride)")
    assert child.returncode == 0, child.stderr
    assert child.stdout == "4\n"

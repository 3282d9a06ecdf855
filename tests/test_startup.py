"""What a cold start imports: time that every command and every short script pays.

Times depend on the machine, the list of imported modules does not.
"""

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import undiffuse
from undiffuse import runs
from undiffuse.checkpoint import Model, Pictures, load_model, save_model
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.noise import Karras
from undiffuse.recipes import PRESETS, preset
from undiffuse.unet import UNet

PACKAGE = Path(undiffuse.__file__).parent
LIBRARIES = {"torch", "numpy", "jaxtyping", "undiffuse"}  # all that a loaded model needs
COMPILER = {"sympy", "mpmath", "torch._dynamo", "torch._inductor", "torch.fx.experimental"}
TRAINING = {"undiffuse.training", "undiffuse.evaluation", "undiffuse.drawing", "undiffuse.report"}
FORMATS = {"undiffuse.interop", "safetensors"}
DATA = {"sklearn", "scipy", "matplotlib", "pandas", "joblib"}


def imported_by(code: str, *arguments: str) -> set[str]:
    """Modules that `code` adds to those of `import torch`, in a fresh interpreter without hooks."""
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        f"{code}\n"
        "print('\\n', *sorted(set(sys.modules) - before))"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert child.returncode == 0, child.stderr
    return set(child.stdout.splitlines()[-1].split())


def tops(modules: set[str]) -> set[str]:
    """Their packages, without the standard library's."""
    names = {name.partition(".")[0] for name in modules}
    return {name for name in names - sys.stdlib_module_names if not name.startswith("_")}


def labelled(name: str) -> UNet:
    return UNet(preset(name, 3).with_classes(2, null=True))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    denoiser = Denoiser(labelled("tiny"), Karras(), KarrasPrecond(0.5))
    save_model(path, Model(denoiser, Pictures(8, 8, 3, 8, ("day", "night")), {}))
    return path


def test_loading_and_generating_wait_for_no_other_part_of_the_package() -> None:
    added = imported_by("import undiffuse; undiffuse.UNet, undiffuse.load, undiffuse.generate")
    assert "undiffuse.runs._generate" in added  # else the lines below say nothing
    assert tops(added) <= LIBRARIES | {"cython_runtime"}  # of numpy.random
    assert added & (TRAINING | {"undiffuse.images", "undiffuse.interop"}) == set()


def test_sampling_from_a_file_does_without_compiler_training_and_formats(model_file: Path) -> None:
    sample = "from undiffuse.cli import main; assert main(sys.argv[1:]) == 0"
    out = str(model_file.parent / "out")
    words = ("sample", str(model_file), "-n", "1", "--num-inference-steps", "1")
    added = imported_by(sample, *words, "--output-dir", out, "--quiet")
    assert "undiffuse.images" in added
    assert added & COMPILER == set()
    assert added & (TRAINING | FORMATS | DATA) == set()


def test_training_waits_for_no_measures_and_no_drawings() -> None:
    added = imported_by("import undiffuse; undiffuse.fit, undiffuse.images")
    assert "undiffuse.training" in added
    assert added & (TRAINING - {"undiffuse.training"} | FORMATS | DATA) == set()


@pytest.mark.parametrize("name", PRESETS)
def test_a_network_without_values_has_the_shapes_of_one_with(name: str) -> None:
    """Shapes are found without computing anything; the plain way is to compute on `meta`."""
    from undiffuse.checkpoint import _model

    spec = preset(name, 3).with_classes(2, null=True)
    with torch.device("meta"):
        wanted = UNet(spec)
    got = _model._on_meta(spec)
    everything = {**dict(got.state_dict()), **dict(got.named_buffers())}
    assert all(tensor.is_meta for tensor in everything.values())
    expected = {**dict(wanted.state_dict()), **dict(wanted.named_buffers())}
    assert {n: (t.shape, t.dtype) for n, t in everything.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }


def test_a_loaded_network_has_its_values(model_file: Path) -> None:
    net = load_model(model_file).net
    assert net.embedding is not None
    fresh = labelled("tiny")
    assert fresh.embedding is not None
    assert torch.equal(net.embedding.frequencies, fresh.embedding.frequencies)
    assert not any(tensor.is_meta for tensor in net.state_dict().values())


# --- the lazy table of `runs` -------------------------------------------------------------------


def test_every_name_of_runs_exists_where_it_is_said_to_live() -> None:
    assert runs.__all__ == sorted(set(runs.__all__))
    assert sorted(runs._HOMES) == runs.__all__
    for name, home in runs._HOMES.items():
        assert getattr(runs, name) is getattr(import_module(f"undiffuse.runs.{home}"), name)


def test_type_checkers_see_the_same_names_in_runs() -> None:
    source = ast.parse((PACKAGE / "runs" / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in source.body if isinstance(n, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    statements = [s for s in block.body if isinstance(s, ast.ImportFrom)]
    homes = {a.name: str(s.module).rpartition(".")[2] for s in statements for a in s.names}
    assert homes == runs._HOMES


def test_an_unknown_name_of_runs_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'undiffuse.runs' has no attribute 'generat'"):
        _ = runs.generat  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="Trainer"):
        from undiffuse.runs import Trainer  # noqa: F401

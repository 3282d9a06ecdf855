"""Settings that every test shares."""

import os
import signal
from collections.abc import Iterator

# Before torch is imported, and for child processes too: two processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

# The same examples on every run and every machine, and no timed assertions.
hypothesis.settings.register_profile(
    "undiffuse",
    derandomize=True,
    deadline=None,
    max_examples=30,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("undiffuse")

# Checks shapes and types of every call into the package. Must stand before its first import.
if not os.environ.get("UNDIFFUSE_NO_TYPECHECK"):
    install_import_hook("undiffuse", "typechecker.tower")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The same order of summation on every machine, and no fight for cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts what it puts into the background with SIGINT ignored; tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def small_preset() -> Iterator[None]:
    """`--preset small`: one level of 8 channels, which trains a step in milliseconds."""
    from undiffuse import recipes  # after the hook above
    from undiffuse.spec import UNetSpec

    def build(channels: int) -> UNetSpec:
        return recipes.ddpm_family(8, (1,), 1, (), channels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.PRESETS, "small", recipes.Preset(build, 16, "for tests"))
        yield

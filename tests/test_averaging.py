"""Averages of the weights: closed forms, what is kept of them, and what is rebuilt."""

# pyright: basic

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import undiffuse
from undiffuse import kernels, recipes, runs
from undiffuse.averaging import (
    MOST_MISSED,
    Profile,
    beta,
    ema_gamma,
    inner,
    mixed,
    rebuildable,
    weights_for,
)
from undiffuse.checkpoint import (
    REAL_DISK,
    Averages,
    Checkpoints,
    Chunk,
    Disk,
    Model,
    RealDisk,
    Snapshot,
    load_model,
    read_header,
)
from undiffuse.cli import main
from undiffuse.config import RunConfig, TrainConfig, override
from undiffuse.denoiser import Denoiser, KarrasPrecond
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.noise import Karras
from undiffuse.runs import _averages, _plan
from undiffuse.training import TrainState

LENGTHS = (0.05, 0.1)


def stored(steps: int = 1000, times: int = 8, lengths: Iterable[float] = LENGTHS) -> list[Profile]:
    """What a run of so many steps keeps."""
    return [Profile(x, steps * i // times) for x in lengths for i in range(1, times + 1)]


# --- closed forms -------------------------------------------------------------------------------


def density(profile: Profile, t: np.ndarray) -> np.ndarray:
    """2312.02696, eq. 123."""
    gamma, end = ema_gamma(profile.length), profile.step
    return np.where(t <= end, (gamma + 1) * t**gamma / float(end) ** (gamma + 1), 0.0)


def midpoints(end: int, per_step: int = 400) -> tuple[np.ndarray, float]:
    return (np.arange(end * per_step) + 0.5) / per_step, 1 / per_step


@given(
    st.sampled_from([0.02, 0.05, 0.1, 0.25]),
    st.integers(1, 40),
    st.sampled_from([0.03, 0.1, 0.2]),
    st.integers(1, 40),
)
def test_inner_products_are_the_integrals(a: float, s: int, b: float, t: int) -> None:
    one, other = Profile(a, s), Profile(b, t)
    grid, width = midpoints(max(s, t))
    wanted = float((density(one, grid) * density(other, grid)).sum() * width)
    assert inner(one, other) == pytest.approx(wanted, rel=5e-3, abs=1e-9)
    assert inner(one, other) == inner(other, one)


def test_inner_products_of_long_runs_neither_overflow_nor_vanish() -> None:
    short = Profile(0.005, 10**9)
    assert inner(short, short) == pytest.approx(
        (short.gamma + 1) ** 2 / (2 * short.gamma + 1) / 1e9, rel=1e-12
    )
    assert inner(short, Profile(0.005, 10)) == 0.0


@pytest.mark.parametrize("times", [1, 2, 8, 32, 100])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_stored_average_is_its_own_mixture(times: int, length: float) -> None:
    there = stored(100 * times, times)
    mixture = weights_for(length, 100 * times, there)
    wanted = [float(one == Profile(length, 100 * times)) for one in there]
    assert mixture.shares == pytest.approx(wanted, abs=1e-9)
    assert mixture.missed < 1e-6


@given(st.floats(0.04, 0.18), st.integers(6, 12))
def test_shares_sum_to_1_and_what_is_missed_is_the_profiles_distance(
    length: float, times: int
) -> None:
    there = stored(4 * times, times)
    mixture = weights_for(length, 4 * times, there)
    assert sum(mixture.shares) == pytest.approx(1.0, abs=1e-12)
    grid, width = midpoints(4 * times)
    wanted = density(Profile(length, 4 * times), grid)
    got = sum(x * density(one, grid) for x, one in zip(mixture.shares, there, strict=True))
    norm = (wanted**2).sum() * width
    distance = np.sqrt(((got - wanted) ** 2).sum() * width / norm)
    assert mixture.missed == pytest.approx(distance, rel=1e-2, abs=1e-4)


def test_no_other_shares_that_sum_to_1_come_nearer() -> None:
    there = stored()
    best = np.array(weights_for(0.07, 1000, there).shares)
    gram = np.array([[inner(a, b) for b in there] for a in there])
    wanted = np.array([inner(a, Profile(0.07, 1000)) for a in there])

    def distance(x: np.ndarray) -> float:
        return float(x @ gram @ x - 2 * x @ wanted)

    dice = np.random.default_rng(0)
    for _ in range(50):
        away = dice.normal(size=len(there))
        away *= 0.01 / np.linalg.norm(away)
        assert distance(best + away - away.mean()) > distance(best)


def test_more_snapshots_miss_less_and_distant_lengths_more() -> None:
    missed = [weights_for(0.07, 960, stored(960, times)).missed for times in (2, 4, 8, 16, 32)]
    assert missed == sorted(missed, reverse=True)
    assert missed[2] < 0.015
    longer = [weights_for(x, 1000, stored()).missed for x in (0.11, 0.13, 0.16, 0.2)]
    shorter = [weights_for(x, 1000, stored()).missed for x in (0.048, 0.045, 0.04, 0.035)]
    assert longer == sorted(longer)
    assert shorter == sorted(shorter)


def test_the_range_that_is_named_is_the_range_that_works() -> None:
    ((low, high),) = rebuildable(1000, stored())
    assert (low, high) == (0.031, 0.216)
    for length in (low, high):
        assert weights_for(length, 1000, stored()).missed <= MOST_MISSED
    for length in (low - 0.001, high + 0.001, 0.25):
        with pytest.raises(ConfigError, match=r"what can be is 0\.031 \.\.\. 0\.216$"):
            weights_for(length, 1000, stored())
    # one short and one long average, once: nothing between them
    ends = [Profile(0.02, 100), Profile(0.2, 100)]
    with pytest.raises(ConfigError, match=r"is 0\.017 \.\.\. 0\.024, 0\.183 \.\.\. 0\.215$"):
        weights_for(0.06, 100, ends)


def test_what_cannot_be_a_length_is_refused_by_name() -> None:
    for length in (0.0, -0.1, 0.3, float("nan")):
        with pytest.raises(ConfigError, match=f"at least 0.005 and at most 0.25; got {length:g}"):
            weights_for(length, 1000, stored())
    with pytest.raises(ConfigError, match=r"ema_length 0.05 needs stored averages"):
        weights_for(0.05, 1000, [])


# --- random walks -------------------------------------------------------------------------------


def tracked(walk: np.ndarray, length: float, steps: Iterable[int]) -> list[np.ndarray]:
    """The average as training keeps it, one update after the other."""
    average, kept, wanted = walk[0], [], set(steps)
    for step, weights in enumerate(walk, 1):
        average = average + (1 - beta(length, step)) * (weights - average)
        if step in wanted:
            kept.append(average)
    return kept


WALK_STEPS, TIMES = 800, 8
AT = [WALK_STEPS * i // TIMES for i in range(1, TIMES + 1)]


@pytest.fixture(scope="module")
def walks() -> np.ndarray:
    """500 weights that walk at random from where they began."""
    dice = np.random.default_rng(0)
    return dice.normal(size=(WALK_STEPS, 500)).cumsum(0) + 30 * dice.normal(size=500)


@pytest.fixture(scope="module")
def kept(walks: np.ndarray) -> list[np.ndarray]:
    """In the order of `stored`."""
    return [average for length in LENGTHS for average in tracked(walks, length, AT)]


def rebuilding_error(length: float, walks: np.ndarray, kept: list[np.ndarray]) -> float:
    (truth,) = tracked(walks, length, [WALK_STEPS])
    mixture = weights_for(length, WALK_STEPS, stored(WALK_STEPS, TIMES))
    parts = ({"w": torch.from_numpy(one)} for one in kept)
    rebuilt = mixed(mixture.shares, parts)["w"].double().numpy()
    return float(np.linalg.norm(rebuilt - truth) / np.linalg.norm(truth))


def test_a_stored_average_comes_back(walks: np.ndarray, kept: list[np.ndarray]) -> None:
    for length in LENGTHS:
        assert rebuilding_error(length, walks, kept) < 1e-6


@pytest.mark.parametrize(("length", "most"), [(0.07, 1e-3), (0.08, 1e-3), (0.13, 2e-3)])
def test_a_length_that_was_never_kept_is_rebuilt(
    length: float, most: float, walks: np.ndarray, kept: list[np.ndarray]
) -> None:
    """Far nearer to the average that was really tracked than the nearest one that was kept."""
    (truth,) = tracked(walks, length, [WALK_STEPS])
    ends = (kept[TIMES - 1], kept[-1])
    nearest = min(float(np.linalg.norm(one - truth) / np.linalg.norm(truth)) for one in ends)
    error = rebuilding_error(length, walks, kept)
    assert error < most
    assert error < nearest / 20


@pytest.mark.parametrize("length", [0.07, 0.13, 0.2])
def test_shares_that_sum_to_1_halve_the_error(
    length: float, walks: np.ndarray, kept: list[np.ndarray]
) -> None:
    """Against the nearest profile among all sums, as 2312.02696, section 3.2, has it."""
    there = stored(WALK_STEPS, TIMES)
    gram = np.array([[inner(a, b) for b in there] for a in there])
    free = np.linalg.solve(gram, [inner(a, Profile(length, WALK_STEPS)) for a in there])
    (truth,) = tracked(walks, length, [WALK_STEPS])
    error = np.linalg.norm(free @ np.array(kept) - truth) / np.linalg.norm(truth)
    assert rebuilding_error(length, walks, kept) < error / 2


def test_the_error_grows_outside_of_what_was_kept(
    walks: np.ndarray, kept: list[np.ndarray]
) -> None:
    inside, near, far = (rebuilding_error(x, walks, kept) for x in (0.07, 0.15, 0.21))
    assert inside < near < far
    inside, near, far = (rebuilding_error(x, walks, kept) for x in (0.07, 0.04, 0.032))
    assert inside < near < far


def test_what_does_not_move_is_rebuilt_exactly() -> None:
    for length in (0.032, 0.07, 0.21):
        mixture = weights_for(length, 1000, stored())
        constant = {"w": torch.full((3,), 123.456, dtype=torch.float64)}
        got = mixed(mixture.shares, (constant for _ in mixture.shares))["w"]
        assert torch.allclose(got.double(), constant["w"], rtol=1e-7)


def test_mixing_holds_one_average_at_a_time() -> None:
    alive: list[Any] = []

    class Weights(dict[str, Tensor]):
        def __del__(self) -> None:
            alive.remove(id(self))

    def averages() -> Iterator[Mapping[str, Tensor]]:
        for value in (1.0, 2.0, 4.0):
            one = Weights(w=torch.tensor([value]))
            alive.append(id(one))
            assert len(alive) <= 2  # the loop still names the last one while it asks for the next
            yield one
            del one

    assert mixed((0.5, -1.0, 1.5), averages())["w"].tolist() == [4.5]


# --- while training -----------------------------------------------------------------------------


def train_state(config: TrainConfig, fused: Any = None, seed: int = 0) -> TrainState:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3))
    return TrainState(net, Denoiser(net, Karras(), KarrasPrecond(0.5)), config, fused=fused)


def push(state: TrainState, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in state.parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    state.advance(torch.tensor(scale))


TWO = TrainConfig(max_train_steps=20, learning_rate=0.1, ema_second_length=0.1)
WAYS = [
    None,
    pytest.param(
        kernels, marks=pytest.mark.skipif(kernels.why_not() is not None, reason="no kernels")
    ),
]


@pytest.mark.parametrize("fused", WAYS)
def test_both_averages_are_the_weighted_sums_of_all_weights(fused: Any) -> None:
    """A step that is left out counts as one that did not move the weights."""
    state, history = train_state(TWO, fused), []
    for step in range(7):
        push(state, step, float("nan") if step == 3 else 1.0)
        history.append({name: w.double().clone() for name, w in state.net.state_dict().items()})
    assert torch.equal(history[2]["0.weight"], history[3]["0.weight"])
    for length, found in ((0.05, state.ema.state_dict()), (0.1, state.second)):
        power = ema_gamma(length) + 1
        shares = [(i / 7) ** power - ((i - 1) / 7) ** power for i in range(1, 8)]
        for name, average in found.items():
            terms = [share * w[name] for share, w in zip(shares, history, strict=True)]
            wanted = torch.stack(terms).sum(0)
            assert torch.allclose(average.double(), wanted, atol=1e-6), (length, name)


def test_a_second_average_changes_nothing_else() -> None:
    one, two = train_state(replace(TWO, ema_second_length=None)), train_state(TWO)
    for step in range(4):
        push(one, step)
        push(two, step)
    assert one.second == {}
    assert set(two.tensors()) - set(one.tensors()) == {"ema_second"}
    for group, tensors in one.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, two.tensors()[group][name]), (group, name)


def test_the_second_average_goes_on_bit_for_bit() -> None:
    straight, first = train_state(TWO), train_state(TWO)
    for step in range(6):
        push(straight, step)
    for step in range(3):
        push(first, step)
    again = train_state(TWO, seed=9)
    again.restore(first.tensors(), first.counters())
    for step in range(3, 6):
        push(again, step)
    for name, tensor in straight.second.items():
        assert torch.equal(tensor, again.second[name])
    without = {k: v for k, v in first.tensors().items() if k != "ema_second"}
    with pytest.raises(CheckpointError, match=r"ema_second does not fit .* 0.weight is missing"):
        again.restore(without, first.counters())


def test_the_same_length_twice_is_no_second_average() -> None:
    assert TrainConfig(ema_second_length=0.05).second_length is None
    assert TrainConfig().second_length is None
    assert TWO.second_length == 0.1


# --- a run and what it keeps --------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("small_preset")

STEPS = 16
SETTINGS: dict[str, Any] = {
    "preset": "small",
    "max_train_steps": STEPS,
    "train_batch_size": 4,
    "mixed_precision": "no",
    "num_samples": 1,
    "device": "cpu",
    "learning_rate": 1e-2,
    "checkpointing_steps": 4,
    "checkpoints_total_limit": 4,
    "sample_every": 1000,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled noise, in a file that the commands can read again."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    dice = np.random.default_rng(0)
    labels = np.arange(12) % 2
    np.savez(path, images=dice.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8), labels=labels)
    return path


def fit(data: Path, run: Path, **settings: Any) -> Model:
    return undiffuse.fit(data, output_dir=run, **{**SETTINGS, **settings})


def events(run: Path, settings: Mapping[str, Any], **options: Any) -> list[runs.Event]:
    config = override(RunConfig(), {**SETTINGS, **settings})
    return list(runs.training_run(runs.Request(config, run, **options)))


def notes(happened: Iterable[runs.Event]) -> list[str]:
    return [event.text for event in happened if isinstance(event, runs.Note)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path, small_preset: None) -> Path:
    """Finished, with both averages at 2, 4, ... 16. No test changes it."""
    del small_preset
    path = tmp_path_factory.mktemp("runs") / "run"
    fit(pictures, path)
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "ema"))


def weights(model: Model) -> Tensor:
    return torch.cat([w.double().flatten() for w in model.net.state_dict().values()])


def rebuilding(model: Model) -> dict[str, Any]:
    found = model.trained["rebuilt"]
    assert isinstance(found, dict)
    return found


def test_a_run_keeps_both_averages_at_even_steps(run: Path) -> None:
    kept = Averages(run / "ema").kept()
    wanted = [(step, length) for step in range(2, STEPS + 1, 2) for length in LENGTHS]
    assert [(one.step, one.length) for one in kept] == wanted
    assert names(run) == sorted(f"step_{s:08d}_ema{x}.safetensors" for s, x in wanted)
    for one in kept:  # each is a model that stands alone
        assert read_header(one.path).trained["images_seen"] == 4 * one.step
    stored_tensors = Checkpoints(run / "checkpoints").read(12)[0].tensors
    for group, length in (("ema", 0.05), ("ema_second", 0.1)):
        (one,) = (one for one in kept if (one.step, one.length) == (12, length))
        for name, tensor in one.model().net.state_dict().items():
            assert torch.equal(tensor, stored_tensors[group][name])


def test_a_stored_length_comes_back_bit_for_bit(run: Path) -> None:
    finished = load_model(run / "model.safetensors")
    again = runs.averaged(run, 0.05, device="cpu")
    assert torch.equal(weights(again), weights(finished))
    assert again.trained == finished.trained
    second = runs.averaged(run, 0.1, 10, device="cpu")
    file = load_model(run / "ema" / "step_00000010_ema0.1.safetensors")
    assert torch.equal(weights(second), weights(file))


def test_another_length_is_what_training_with_it_would_have_kept(
    run: Path, tmp_path: Path, pictures: Path
) -> None:
    """Averages do not touch training, so the same run with 0.07 tells the truth."""
    truth = weights(fit(pictures, tmp_path / "truth", ema_length=0.07, ema_snapshots=0))
    rebuilt = runs.averaged(run, 0.07, device="cpu")
    error = float((weights(rebuilt) - truth).norm())
    nearest = min(
        float((weights(runs.averaged(run, x, device="cpu")) - truth).norm()) for x in LENGTHS
    )
    assert error < nearest / 10
    assert error < 1e-3 * float(truth.norm())
    assert (rebuilt.trained["ema_length"], rebuilt.trained["steps"]) == (0.07, STEPS)
    facts = rebuilding(rebuilt)
    assert facts["averages"] == 16
    assert 0 < facts["missed"] < 0.02


def test_an_average_of_the_past_knows_nothing_of_what_came_after(
    run: Path, tmp_path: Path, pictures: Path
) -> None:
    until = runs.averaged(run, 0.08, 8, device="cpu")
    for path in (run / "ema").iterdir():
        if int(path.name.split("_")[1]) <= 8:
            (tmp_path / "ema").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "ema")
    assert torch.equal(weights(runs.averaged(tmp_path, 0.08, device="cpu")), weights(until))
    assert until.trained["steps"] == 8


def test_what_was_not_kept_is_refused_with_what_was(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0\.24 at step 16 .* what can be is 0\.031 \.\.\. 0"):
        runs.averaged(run, 0.24)
    with pytest.raises(CheckpointError, match=r"no average of step 7; there are 2, 4, 6, 8, 10"):
        runs.averaged(run, 0.07, 7)
    with pytest.raises(ConfigError, match=r"weights raw is none"):
        runs.load(run, "raw", ema_length=0.07)
    with pytest.raises(ConfigError, match=r"ema_length choose within a run folder; .* is a file"):
        runs.averaged(run / "model.safetensors", 0.07)
    with pytest.raises(CheckpointError, match=r"Did you mean .*run\?"):
        runs.averaged(run.parent / "rum", 0.07)
    with pytest.raises(CheckpointError, match=r"has kept no averages in ema/: .*--ema-snapshots 0"):
        runs.averaged(tmp_path, 0.07)


def test_a_damaged_average_is_named(copy: Path) -> None:
    path = copy / "ema" / "step_00000004_ema0.1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"step_00000004_ema0\.1\.safetensors is damaged"):
        runs.averaged(copy, 0.07)
    runs.averaged(copy, 0.05)  # which does not need it
    path.write_bytes(bytes(data[:100]))
    with pytest.raises(CheckpointError, match=r"step_00000004_ema0\.1\.safetensors"):
        runs.averaged(copy, 0.05)


def test_a_model_that_says_no_step_is_no_average(copy: Path, tmp_path: Path) -> None:
    model = load_model(copy / "model.safetensors")
    for wrong in ({}, {"steps": 0, "ema_length": 0.05}, {"steps": 3, "ema_length": "long"}):
        with pytest.raises(CheckpointError, match="no steps and ema_length"):
            Averages(tmp_path / "ema").save(replace(model, trained=wrong))
    assert not list((tmp_path / "ema").glob("*"))


# --- resuming -----------------------------------------------------------------------------------


def bytes_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "ema").iterdir()}


def test_going_back_sets_later_averages_aside_and_makes_them_again(copy: Path) -> None:
    before = bytes_of(copy)
    undiffuse.fit(json.loads((copy / "config.json").read_text())["data"], output_dir=copy, resume=8)
    after = bytes_of(copy)
    aside = {f"step_{s:08d}_ema{x}-before-00000008" for s in (10, 12, 14, 16) for x in LENGTHS}
    new = sorted(set(after) - set(before))
    assert {name.rpartition("-")[0] for name in new} == aside
    assert len(new) == len(aside)
    assert {name: after[name] for name in before} == before  # bit for bit the same run
    assert len(Averages(copy / "ema").kept()) == 16


def test_going_back_twice_to_one_step_loses_nothing(tmp_path: Path, copy: Path) -> None:
    averages, model = Averages(tmp_path / "ema"), load_model(copy / "model.safetensors")
    for n in range(3):
        averages.save(model, {name: value + n for name, value in model.net.state_dict().items()})
        averages.set_aside(8)
    kept = [float(weights(load_model(path))[0]) for path in averages.folder.iterdir()]
    assert len(set(kept)) == 3
    assert averages.kept() == ()


def test_an_extended_run_uses_what_was_kept_before(copy: Path, pictures: Path) -> None:
    before = bytes_of(copy)
    undiffuse.fit(pictures, output_dir=copy, resume="latest", max_train_steps=24, ema_snapshots=2)
    kept = Averages(copy / "ema").kept()
    assert sorted({one.step for one in kept}) == [*range(2, 17, 2), 24]  # 12 was there before
    assert {name: data for name, data in bytes_of(copy).items() if name in before} == before
    model = runs.averaged(copy, 0.07)
    assert (model.trained["steps"], rebuilding(model)["averages"]) == (24, 18)


def test_a_run_without_second_average_goes_on_without_and_says_so(
    tmp_path: Path, pictures: Path
) -> None:
    """Such as those of before there were two."""
    run = tmp_path / "run"
    settings = {"data": str(pictures), "ema_second_length": 0.05, "max_train_steps": 4}
    events(run, settings)
    for file in (run / "config.json", run / "checkpoints" / "step_00000004" / "state.json"):
        text = file.read_text().replace('"ema_second_length": 0.05,', "")
        file.write_text(text.replace('"ema_second_length":0.05,', ""))
    _sign(run / "checkpoints" / "step_00000004")
    stored_again = runs.stored_config(run)
    assert stored_again.train.ema_second_length is None
    config = override(stored_again, {"max_train_steps": 8})
    happened = list(runs.training_run(runs.Request(config, run, resume="latest")))
    assert isinstance(happened[-1], runs.Finished)
    assert any("begun without a second average" in note for note in notes(happened))
    assert {one.length for one in Averages(run / "ema").kept()} == {0.05}
    again = list(runs.training_run(runs.Request(runs.stored_config(run), run, resume="latest")))
    assert not any("second average" in note for note in notes(again))  # said once


def _sign(checkpoint: Path) -> None:
    """A manifest that agrees with the changed state.json."""
    import hashlib

    path = checkpoint / "MANIFEST.json"
    table, data = json.loads(path.read_text()), (checkpoint / "state.json").read_bytes()
    table["files"]["state.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("name", ["ema_length", "ema_second_length"])
def test_the_length_of_an_average_cannot_change_on_the_way(name: str, run: Path) -> None:
    before = runs.stored_config(run)
    with pytest.raises(CheckpointError, match=f"{name} is 0.2 here, 0.0?[15] in .*new run"):
        runs.resumed_config(run, before, {name: 0.2})
    config = override(before, {name: 0.2})
    with pytest.raises(CheckpointError, match=f"{name} is 0.2 here"):
        _plan.gather(runs.Request(config, run, resume="8"))


# --- how many, and how long ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "times", "wanted"),
    [
        (16, 8, {2, 4, 6, 8, 10, 12, 14, 16}),
        (900, 8, {112, 225, 338, 450, 562, 675, 788, 900}),
        (3, 8, {1, 2, 3}),
        (10, 1, {10}),
        (10, 0, set()),
    ],
)
def test_snapshots_are_even_over_the_run(steps: int, times: int, wanted: set[int]) -> None:
    config = override(RunConfig(), {"max_train_steps": steps, "ema_snapshots": times})
    assert _averages.snapshot_steps(config) == wanted


@pytest.mark.parametrize(
    ("settings", "room", "wanted"),
    [
        ({}, True, 0.1),
        ({"ema_length": 0.02}, True, 0.04),
        ({"ema_length": 0.25}, True, 0.125),
        ({"ema_second_length": 0.2}, False, 0.2),  # as named
        ({"ema_snapshots": 0}, True, None),
        ({}, False, None),
    ],
)
def test_the_second_length_is_settled(
    settings: dict[str, Any], room: bool, wanted: float | None
) -> None:
    config, told = _averages.settled(override(RunConfig(), settings), None, room)
    assert config.train.second_length == wanted
    assert len(told) == (not room and wanted is None)


def test_where_memory_is_short_there_is_one_average_and_a_note(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = runs.Request(override(RunConfig(), {**SETTINGS, "data": str(pictures)}), tmp_path / "run")
    size, spec = (8, 8), recipes.PRESETS["small"].build(1).with_classes(2, null=True)
    from undiffuse import cost

    parameters = 4 * cost.total_parameters(spec)
    need = cost.training_bytes(spec, *size, 4)
    for short, wanted in ((0.0, 0.1), (0.5, None)):
        have = (need + (2 - short) * parameters) / _plan.MEMORY_SHARE + 8
        monkeypatch.setattr("undiffuse.runtime.memory", lambda device, have=have: int(have))
        gathered = _plan.gather(one)
        assert gathered.config.train.second_length == wanted
        assert any("no memory for a second" in n for n in gathered.notes) == (wanted is None)


def test_nothing_is_kept_where_nothing_is_asked_for(tmp_path: Path, pictures: Path) -> None:
    fit(pictures, tmp_path / "run", max_train_steps=2, ema_snapshots=0)
    assert not (tmp_path / "run" / "ema").exists()
    loaded = Checkpoints(tmp_path / "run" / "checkpoints").read(2)[0]
    assert set(loaded.tensors) == {"model", "ema", "optim"}


def test_fit_without_a_folder_writes_no_averages(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Averages, "save", lambda *_: pytest.fail("kept for nobody"))
    undiffuse.fit(pictures, **{**SETTINGS, "max_train_steps": 2})


def test_a_full_disk_costs_averages_and_not_the_run(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RealDisk.write

    def full(self: RealDisk, path: Path, chunks: Iterable[Chunk]) -> None:
        if path.parent.name == "ema":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, path, chunks)

    monkeypatch.setattr(RealDisk, "write", full)
    run = tmp_path / "run"
    happened = events(run, {"data": str(pictures), "max_train_steps": 4, "ema_snapshots": 2})
    assert isinstance(happened[-1], runs.Finished)
    told = [note for note in notes(happened) if "not kept" in note]
    assert [note[:33] for note in told] == [f"averages of step {s} not kept: cann" for s in (2, 4)]
    assert "No space left" in told[0]
    assert told[0].split(": ", 1)[1] in (run / "log.txt").read_text()
    assert names(run) == []


@pytest.mark.parametrize(("short", "kept"), [(1, 0), (0, 4)])
def test_averages_leave_room_for_a_checkpoint(
    short: int,
    kept: int,
    run: Path,
    tmp_path: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = Checkpoints(run / "checkpoints").read()[0].tensors
    whole, one = (
        sum(tensor.nbytes for group in groups for tensor in tensors[group].values())
        for groups in (tensors, ("ema",))
    )
    free = int(1.3 * whole) + 2 * one - short
    monkeypatch.setattr(RealDisk, "free_space", lambda self, path: free)
    happened = events(
        tmp_path / "run", {"data": str(pictures), "max_train_steps": 4, "ema_snapshots": 2}
    )
    assert isinstance(happened[-1], runs.Finished)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 4
    assert len(Averages(tmp_path / "run" / "ema").kept()) == kept
    told = [note for note in notes(happened) if "not kept" in note]
    assert len(told) == (2 if short else 0)
    assert all(
        "beside the next checkpoint" in note and "--ema-snapshots 0" in note for note in told
    )


# --- files --------------------------------------------------------------------------------------


class Failing(Disk):
    """Stops before operation number `at`, with half of a file written: a crash."""

    def __init__(self, at: int = 10**9) -> None:
        self.at, self.done = at, 0

    def _step(self) -> None:
        self.done += 1
        if self.done > self.at:
            raise KeyboardInterrupt

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        data = b"".join(chunks)
        try:
            self._step()
        except KeyboardInterrupt:
            REAL_DISK.write(path, [data[: len(data) // 2]])
            raise
        REAL_DISK.write(path, [data])

    def make_folder(self, path: Path) -> None:
        self._step()
        REAL_DISK.make_folder(path)

    def sync(self, path: Path) -> None:
        self._step()

    def sync_folder(self, path: Path) -> None:
        self._step()

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        REAL_DISK.rename(old, new)

    def remove(self, path: Path) -> None:
        REAL_DISK.remove(path)

    def remove_folder(self, path: Path) -> None:
        pytest.fail("no folder is removed")

    def free_space(self, path: Path) -> int:
        pytest.fail("nobody asks")


def test_a_crash_at_any_operation_leaves_no_torn_average(run: Path, tmp_path: Path) -> None:
    model, whole = load_model(run / "model.safetensors"), Failing()
    Averages(tmp_path / "ema", whole).save(model)
    assert whole.done == 6
    for at in range(whole.done):
        folder = tmp_path / f"crash-{at}"
        with pytest.raises(KeyboardInterrupt):
            Averages(folder, Failing(at=at)).save(model)
        there = Averages(folder)
        for one in there.kept():
            assert torch.equal(weights(one.model()), weights(model))
        there.set_aside(10**6)
        assert not list(folder.glob(".tmp-*"))
        there.save(model)
        (again,) = there.kept()
        assert (again.step, again.length) == (STEPS, 0.05)


def test_a_folder_that_cannot_be_made_is_a_resource_error(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = load_model(run / "model.safetensors")
    with pytest.raises(ResourceError, match=r"cannot save .*step_00000016_ema0.05"):
        Averages(tmp_path / "file" / "ema").save(model)


def test_other_files_in_the_folder_are_never_read(copy: Path) -> None:
    before = Averages(copy / "ema").kept()
    for name in ("notes.txt", "step_x_ema0.1.safetensors", ".tmp-step_1", "step_00000003.png"):
        (copy / "ema" / name).write_text("mine")
    assert Averages(copy / "ema").kept() == before


def checkpoint_of(run: Path, step: int) -> Snapshot:
    loaded = Checkpoints(run / "checkpoints").read(step)[0]
    model = load_model(run / "model.safetensors")
    return Snapshot(step, loaded.tensors, model, loaded.state, loaded.run_id)


def test_a_checkpoint_holds_the_second_average_and_every_damage_to_it_is_found(
    run: Path, tmp_path: Path
) -> None:
    snapshot, checkpoints = checkpoint_of(run, 12), Checkpoints(tmp_path)
    assert set(snapshot.tensors) == {"model", "ema", "ema_second", "optim"}
    path = checkpoints.save(snapshot) / "ema_second.safetensors"
    again = checkpoints.read(12)[0].tensors["ema_second"]
    assert all(torch.equal(again[n], t) for n, t in snapshot.tensors["ema_second"].items())
    original = path.read_bytes()
    flipped = bytearray(original)
    flipped[len(original) // 2] ^= 4
    for damaged in (original[:-1], original + b"x", bytes(flipped), b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"ema_second\.safetensors"):
            checkpoints.read(12)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"ema_second\.safetensors does not exist"):
        checkpoints.read(12)


def test_a_second_average_that_is_not_finite_is_not_saved(run: Path, tmp_path: Path) -> None:
    snapshot = checkpoint_of(run, 12)
    bad = {"layers.00_conv.bias": torch.full((8,), float("nan"))}
    tensors = {**snapshot.tensors, "ema_second": bad}
    with pytest.raises(CheckpointError, match=r"00_conv\.bias has values that are not finite"):
        Checkpoints(tmp_path).save(replace(snapshot, tensors=tensors))
    assert os.listdir(tmp_path) == []


# --- guides -------------------------------------------------------------------------------------


def test_the_early_guide_is_the_long_average_of_an_eighth_of_the_steps(run: Path) -> None:
    early = runs.guide(run, device="cpu")
    assert (early.trained["steps"], early.trained["ema_length"]) == (2, 0.1)
    later = runs.guide(run, 6, device="cpu")
    assert (later.trained["steps"], later.trained["ema_length"]) == (6, 0.1)
    other = runs.guide(run, str(run), device="cpu")
    assert other.trained["steps"] == STEPS
    file = runs.guide(run / "model.safetensors", run / "model.safetensors", device="cpu")
    assert file.trained == other.trained


def test_where_nothing_early_was_kept_no_early_guide_is_taken(copy: Path) -> None:
    """Such as the last average alone, with which a model would be guided by itself."""
    for one in Averages(copy / "ema").kept():
        if one.step not in (8, 10, 16):
            one.path.unlink()
    assert runs.guide(copy, device="cpu").trained["steps"] == 8
    for one in Averages(copy / "ema").kept():
        if one.step == 8:
            one.path.unlink()
    with pytest.raises(CheckpointError, match=r"first is of step 10, .* 16; .*--ema-snapshots"):
        runs.guide(copy, device="cpu")
    assert runs.guide(copy, 10, device="cpu").trained["steps"] == 10


def test_a_guide_that_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no average of step 5; there are 2, 4"):
        runs.guide(run, 5)
    with pytest.raises(ConfigError, match=r"autoguidance early and of a step choose within a run"):
        runs.guide(run / "model.safetensors")
    with pytest.raises(CheckpointError, match="No run or model file"):
        runs.guide(tmp_path / "none")
    with pytest.raises(CheckpointError, match="No run or model file"):
        runs.guide(run, "no such run")


# --- the commands -------------------------------------------------------------------------------


@pytest.fixture
def ask(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Runs a command line in an empty folder; its one JSON object."""
    monkeypatch.chdir(tmp_path)

    def asked(line: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        got = main([*(word.format(run=run) for word in line.split()), "--json", "--quiet"])
        out, err = capsys.readouterr()
        assert got == code, err
        return json.loads(out)

    return asked


def pictures_in(body: dict[str, Any]) -> np.ndarray:
    with np.load(body["files"][0]) as arrays:
        return arrays["images"]


SAMPLE = "sample {run} -n 2 --num-inference-steps 3 --format npz --output-dir"


@pytest.mark.slow
def test_every_way_to_choose_an_average_or_a_guide_gives_other_pictures(
    ask: Callable[..., dict[str, Any]],
) -> None:
    plain = pictures_in(ask(f"{SAMPLE} a"))
    assert np.array_equal(plain, pictures_in(ask(f"{SAMPLE} b --ema-length 0.05")))
    guided = "--guidance-scale 3 --autoguidance"
    seen = [plain]
    for n, extra in enumerate(
        (
            *("--ema-length 0.1", "--ema-length 0.07", "--ema-length 0.07 --checkpoint 8"),
            *(f"{guided} early", f"{guided} 6", f"{guided} early --guidance-high 1"),
        )
    ):
        seen.append(pictures_in(ask(f"{SAMPLE} c{n} {extra}")))
    for i, one in enumerate(seen):
        assert not any(np.array_equal(one, other) for other in seen[:i]), i
    outside = pictures_in(ask(f"{SAMPLE} d {guided} early --guidance-low 90"))
    assert np.array_equal(outside, plain)
    (told,) = ask(f"{SAMPLE} e --autoguidance early")["warnings"]
    assert told.startswith("autoguidance: no effect at guidance_scale 1;")


def test_average_writes_a_model_file(ask: Callable[..., dict[str, Any]], run: Path) -> None:
    body = ask("average {run} --ema-length 0.08 -o new/mine.safetensors")
    assert body["file"] == "new/mine.safetensors"
    written = load_model("new/mine.safetensors")
    wanted = runs.averaged(run, 0.08, device="cpu")
    assert torch.equal(weights(written), weights(wanted))
    assert written.trained == wanted.trained == body["trained"]
    again = ask("average {run} --ema-length 0.08 -o new/mine.safetensors", code=2)
    assert "--force" in again["message"]
    ask("average {run} --ema-length 0.1 --checkpoint 4 -o new/mine.safetensors --force")
    assert load_model("new/mine.safetensors").trained["steps"] == 4


def test_average_says_what_it_did(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for length, said in (
        ("0.08", "rebuilt from 16 averages up to step 16, which miss 1.1% of its profile"),
        ("0.1", "as it was kept at step 16"),
    ):
        path = str(tmp_path / f"{length}.safetensors")
        assert main(["average", str(run), "--ema-length", length, "-o", path]) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"{path}: {said}"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("average {run}", 2, "ema_length is missing"),
        ("average {run} --ema-length x", 2, "ema_length must be a finite number"),
        ("average {run} --ema-length 0.4", 2, "at most 0.25; got 0.4"),
        ("average {run} --ema-length 0.07 -o {run}/ema/x.safetensors", 2, "what is read"),
        ("average {run} --ema-length 0.07 --checkpoint 7", 4, "there are 2, 4"),
        ("average nowhere --ema-length 0.07", 4, "No run"),
        ("average {run}/model.safetensors --ema-length 0.07", 2, "choose within a run folder"),
        ("sample {run} --autoguidance 2024", 4, "no average of step 2024"),
        ("sample {run} --autoguidance ./2024", 4, "No run or model file at 2024"),
        ("sample {run} --ema-length 0.24", 2, "what can be is 0.031"),
        ("sample {run} --ema-length 0.07 --weights raw", 2, "weights raw is none"),
        ("sample {run} --autoguidance 5", 4, "there are 2, 4"),
        ("sample {run}/model.safetensors --autoguidance early", 2, "is a file"),
        ("sample {run} --guidance-low 2 --guidance-high 1", 2, "guidance_low 2 is above"),
        ("evaluate {run} --guidance-low -1", 2, "guidance_low must be at least 0"),
        ("evaluate {run} --ema-length 0.3", 2, "ema_length must be"),
    ],
)
def test_bad_choices_end_in_one_line_and_write_nothing(
    line: str, code: int, said: str, ask: Callable[..., dict[str, Any]], run: Path, tmp_path: Path
) -> None:
    before = {str(path) for root in (run, tmp_path) for path in root.rglob("*")}
    assert said in ask(line, code)["message"]
    assert {str(path) for root in (run, tmp_path) for path in root.rglob("*")} == before


@pytest.mark.slow
def test_evaluate_uses_all_of_it(
    ask: Callable[..., dict[str, Any]], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"evaluate {copy} --num-samples 4 --draws 1 --num-inference-steps 3"
    plain = ask(line)
    body = ask(
        f"{line} --guidance-scale 1.5 --guidance-low 0.2 --guidance-high 2 --ema-length 0.08"
        " --autoguidance early"
    )
    sampling = body["sampling"]
    assert {
        name: sampling[name] for name in ("guidance_scale", "guidance_low", "guidance_high")
    } == {
        "guidance_scale": 1.5,
        "guidance_low": 0.2,
        "guidance_high": 2.0,
    }
    assert (sampling["ema_length"], sampling["autoguidance"]) == (0.08, "early")
    assert (plain["sampling"]["ema_length"], plain["sampling"]["autoguidance"]) == (0.05, None)
    assert [one["held_out"] for one in body["levels"]] != [
        one["held_out"] for one in plain["levels"]
    ]


def test_the_plan_says_what_the_averages_take(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    line = ["train", str(pictures), "--output-dir", str(tmp_path / "run"), *words, "--dry-run"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert "averages of length 0.05 and 0.1 of the run, kept 8 times: " in out + err
    assert f" MB in {tmp_path / 'run' / 'ema'}" in out + err
    assert main([*line, "--ema-snapshots", "0"]) == 0
    out, err = capsys.readouterr()
    assert "averages of length" not in out + err

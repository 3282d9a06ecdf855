"""Which averages of the weights a run keeps, and what is made of them afterwards."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from undiffuse import averaging
from undiffuse.averaging import Profile
from undiffuse.checkpoint import Average, Averages, Loaded, Model
from undiffuse.config import RunConfig
from undiffuse.errors import CheckpointError

EARLY = 8  # the guide of 2406.02507 has seen 1/8 of the steps, or 1/16

# --- while a run goes on ------------------------------------------------------------------------


def snapshot_steps(config: RunConfig) -> frozenset[int]:
    """The steps at which the averages are kept: evenly over the run, the last one included."""
    total, count = config.train.max_train_steps, config.log.ema_snapshots
    return frozenset(round(total * i / count) for i in range(1, count + 1)) - {0}


def lengths_of(config: RunConfig) -> tuple[float, ...]:
    """Of all averages; that of the finished model first."""
    second = config.train.second_length
    return (config.train.ema_length,) if second is None else (config.train.ema_length, second)


def settled(
    config: RunConfig, resumed: Loaded | None, room: bool
) -> tuple[RunConfig, tuple[str, ...]]:
    """Settle the length of the second average where nobody names it, with what to say about it.

    None where no snapshots are kept, since it would be of no use; where there is no room in memory;
    and in a run that was begun without, since an average cannot be begun later.
    """
    first, named = config.train.ema_length, config.train.ema_second_length
    wanted = config.log.ema_snapshots > 0
    if resumed is not None and "ema_second" not in resumed.tensors:
        late = "the run was begun without a second average: what it keeps in ema/ is of one length"
        return _with_second(config, first), ((late,) if wanted and named is None else ())
    if named is not None:
        return config, ()
    if not wanted:
        return _with_second(config, first), ()
    if not room:
        short = "no memory for a second average: what the run keeps in ema/ is of one length"
        return _with_second(config, first), (short,)
    twice = 2 * first
    return _with_second(config, twice if twice <= averaging.LONGEST else first / 2), ()


def _with_second(config: RunConfig, length: float) -> RunConfig:
    return replace(config, train=replace(config.train, ema_second_length=length))


# --- afterwards ---------------------------------------------------------------------------------


def rebuilt(run: Path, length: float, step: int | None = None) -> Model:
    """The average of any length, from those that a run has kept (post-hoc EMA, 2312.02696).

    One that was kept in that length comes back bit for bit.

    Args:
        step: at which averages were kept; None for the last.

    Raises:
        CheckpointError: the run has kept none, none at that step, or one is damaged.
        ConfigError: what was kept does not reach so far; the message says which lengths it does.
    """
    kept = _kept(run, step)
    last = kept[-1]
    same = next((one for one in kept if (one.step, one.length) == (last.step, length)), None)
    if same is not None:
        return same.model()
    mixture = averaging.weights_for(
        length, last.step, [Profile(one.length, one.step) for one in kept]
    )
    weights = averaging.mixed(mixture.shares, (one.weights() for one in kept))
    model = last.model()
    model.net.load_state_dict(weights)
    rebuilding = {"averages": len(kept), "missed": mixture.missed}
    return replace(model, trained={**model.trained, "ema_length": length, "rebuilt": rebuilding})


def early(run: Path, step: int | None = None) -> Model:
    """The longest average of an early step: the guide of autoguidance (2406.02507).

    There the guide's average is the longer one, and it has seen an eighth of the steps or less.

    Args:
        step: at which averages were kept; None for the nearest to an eighth of the last.

    Raises:
        CheckpointError: the run has kept none, none at that step, none in its first half where no
            step is named, or it is damaged.
    """
    kept = _kept(run, step)
    chosen = _early_step(run, kept) if step is None else step
    return [one for one in kept if one.step == chosen][-1].model()


def _early_step(run: Path, kept: Sequence[Average]) -> int:
    first, last = kept[0].step, kept[-1].step
    if first > last / 2:
        raise CheckpointError(
            f"{run} has kept no early average: the first is of step {first}, the last of {last};"
            " train with a larger --ema-snapshots, or guide with another run"
        )
    return min(kept, key=lambda one: abs(one.step - last / EARLY)).step


def _kept(run: Path, step: int | None) -> Sequence[Average]:
    """Up to `step`, which must be one of theirs; by step, then by length."""
    kept = Averages(run / "ema").kept()
    if not kept:
        raise CheckpointError(
            f"{run} has kept no averages in ema/: it was trained with --ema-snapshots 0, or"
            " has not come to the first"
        )
    steps = sorted({one.step for one in kept})
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointError(f"{run} has kept no average of step {step}; there are {there}")
    return [one for one in kept if step is None or one.step <= step]

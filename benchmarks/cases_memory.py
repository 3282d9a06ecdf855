"""Peak memory of a training step, each variant in a fresh process.

    python -m benchmarks.cases_memory FOLDER SIDE BATCH DEVICE      (started by this module)

The optimiser's moments are there before the step, as they are in all steps but the first.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.cases_train import Trainer, fastest_form, lesson, our_trainer, their_trainer
from benchmarks.harness import (
    BFLOAT16,
    Bench,
    Case,
    NotEqual,
    Numbers,
    Result,
    chosen,
    fresh,
    peak_memory,
)
from benchmarks.peers import (
    AS_IT_COMES,
    DDPM,
    Arithmetic,
    Form,
    Twins,
    diffusers_twins,
    known,
    prepared,
)
from undiffuse import checkpoint
from undiffuse.denoiser import Denoiser
from undiffuse.runtime import move

BATCH = 64
TARGET = "<= 0.6"


def results(
    bench: Bench, config: Mapping[str, object] = DDPM, batch: int = BATCH
) -> Iterator[Result]:
    """Ours against the better of the peer's two."""
    twins = diffusers_twins(config, bench.device)
    tuned = known(bench, "train/ddpm/b8")
    form = (tuned or fastest_form(bench, lesson(bench, "ddpm", twins, 8))).form
    folder = write(bench.scratch / "memory", twins, config, form)
    sides = {
        name: fresh(
            ["-m", "benchmarks.cases_memory", str(folder), name, str(batch), bench.device.type],
            bench.threads,
        )
        for name in _SIDES
    }
    check_losses(sides)
    yield judged(sides, form, batch)


def write(folder: Path, twins: Twins, config: Mapping[str, object], form: Form) -> Path:
    """Both networks and the tuned form, for the processes to read."""
    folder.mkdir(parents=True, exist_ok=True)
    imported = twins.imported()
    pictures = checkpoint.Pictures(twins.size, twins.size, imported.spec.in_channels)
    checkpoint.save_model(
        folder / "ours.safetensors", checkpoint.Model(imported.denoiser(), pictures)
    )
    theirs = {name: one.cpu().contiguous() for name, one in twins.theirs.state_dict().items()}
    save_file(theirs, folder / "theirs.safetensors")
    told = {"config": dict(config), "form": [form.arithmetic, form.channels_last, form.compiled]}
    (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def check_losses(sides: Mapping[str, Numbers]) -> None:
    """All processes must have learned the same.

    Raises:
        NotEqual: a loss is further from the peer's own than bfloat16 explains.
    """
    theirs = sides["default"]["loss"]
    for name, found in sides.items():
        if not abs(found["loss"] - theirs) <= BFLOAT16 * abs(theirs):
            raise NotEqual(f"memory {name}: loss {found['loss']:.6g}, the peer's {theirs:.6g}")


def judged(sides: Mapping[str, Numbers], form: Form, batch: int) -> Result:
    peaks = {name: found["peak"] for name, found in sides.items()}
    better = min(peaks["default"], peaks["tuned"])
    return Result(
        name=f"memory/train/ddpm/b{batch}",
        how="peak of a training step in a fresh process, everything included, against the"
        f" better of diffusers as it comes and in its fastest form ({form.label})",
        ours=peaks["ours"] / 2**20,
        peer=better / 2**20,
        unit="MiB",
        ratio=peaks["ours"] / better,
        of="our bytes / peer bytes",
        target=TARGET,
        peak_bytes=peaks["ours"],
        more={"processes": dict(sides), "peer_form": form.label},
    )


# --- in a process of its own --------------------------------------------------------------------


def child(folder: Path, side: str, batch: int, device: torch.device) -> Numbers:
    """One step; its loss, and bytes before and at the peak."""
    told = json.loads((folder / "told.json").read_text(encoding="utf-8"))
    size = told["config"]["sample_size"]
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(batch, 3, size, size, generator=generator) for _ in range(2))
    timestep = torch.randint(0, 1000, (batch,), generator=generator)
    trainer = _SIDES[side](folder, told, device)
    trainer.make_moments()
    before = peak_memory(device)
    loss = float(trainer.learn(*(one.to(device) for one in (x0, noise, timestep))))
    return {"before": before, "peak": peak_memory(device), "loss": loss}


def _ours(folder: Path, told: Numbers, device: torch.device) -> Trainer:
    del told
    model = checkpoint.load_model(folder / "ours.safetensors")
    net = model.net.requires_grad_(True)
    move(net, device)
    denoiser = Denoiser(net, model.denoiser.schedule, model.denoiser.prediction)
    return our_trainer(denoiser, chosen(net))


def _default(folder: Path, told: Numbers, device: torch.device) -> Trainer:
    return _theirs(folder, told, device, AS_IT_COMES)


def _tuned(folder: Path, told: Numbers, device: torch.device) -> Trainer:
    arithmetic, last, compiled = told["form"]
    return _theirs(folder, told, device, Form(Arithmetic(arithmetic), last, compiled))


def _theirs(folder: Path, told: Numbers, device: torch.device, form: Form) -> Trainer:
    twins = diffusers_twins(told["config"], device)
    twins.theirs.load_state_dict(load_file(folder / "theirs.safetensors"))
    peer = prepared(twins, form, copied=False)
    peer.net.train()
    return their_trainer(peer, fused=form != AS_IT_COMES)


_SIDES = {"ours": _ours, "default": _default, "tuned": _tuned}
CASES = (Case("memory", results, quick=True),)

if __name__ == "__main__":
    words = sys.argv[1:]
    found = child(Path(words[0]), words[1], int(words[2]), torch.device(words[3]))
    print(json.dumps(found))

"""Other projects' networks beside ours with the same weights, and the forms in which they run.

The peer's network is made first, with random weights of which none is zero, and `interop` imports
them: a comparison never starts from two networks that merely look alike.
"""

import copy
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Bench, NotEqual, Numbers, machine, versions
from undiffuse import interop
from undiffuse.denoiser import Epsilon
from undiffuse.interop import Imported
from undiffuse.noise import LinearBetas
from undiffuse.recipes import PRESETS, preset
from undiffuse.unet import UNet

DOWN, ATTN_DOWN, UP, ATTN_UP = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
DDPM: Mapping[str, object] = {  # diffusers' ddpm-cifar10-32: 35,746,307 parameters
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "layers_per_block": 2,
    "down_block_types": [DOWN, ATTN_DOWN, DOWN, DOWN],
    "up_block_types": [UP, UP, ATTN_UP, UP],
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


class PeerMissing(Exception):
    """The other project is not here; the message says what to do."""


# --- two networks with the same weights ---------------------------------------------------------


@dataclass(frozen=True)
class Twins:
    """Another project's network and ours.

    Args:
        project: "diffusers".
        theirs: in float32, in evaluation mode.
        call: (theirs, x, timestep) -> output.
        read: their tensors, or anything under their names, -> ours.
        size: of the pictures, in pixels.
    """

    project: str
    theirs: nn.Module
    call: Callable[[nn.Module, Tensor, Tensor], Tensor]
    read: Callable[[Mapping[str, Tensor]], Imported]
    size: int

    def ours(self) -> UNet:
        """Our network with a copy of the weights, in evaluation mode."""
        net = copy.deepcopy(self.imported().net())
        return net.requires_grad_(True)

    def imported(self) -> Imported:
        return self.read(self.theirs.state_dict())

    def under_our_names(self, theirs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Such as gradients."""
        return self.read(theirs).weights

    def inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        """Pictures of noise and whole timesteps, the same every time."""
        generator = torch.Generator().manual_seed(batch)
        channels = self.imported().spec.in_channels
        x = torch.randn(batch, channels, self.size, self.size, generator=generator)
        device = next(self.theirs.parameters()).device
        timestep = torch.randint(0, 1000, (batch,), generator=generator)
        return x.to(device), timestep.to(device)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network with its own first weights, and random ones where those are zero or one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = make()
        for one in net.parameters():
            if bool((one == 0).all()):
                one.normal_(0, max(1, one[0].numel()) ** -0.5 if one.dim() > 1 else 0.1)
            elif bool((one == 1).all()):
                one.normal_(1, 0.1)
    return net.eval()


def diffusers_twins(config: Mapping[str, Any], device: torch.device, seed: int = 0) -> Twins:
    """`UNet2DModel` of a configuration."""
    UNet2DModel = _diffusers("diffusers.models.unets.unet_2d").UNet2DModel
    net = seeded(lambda: UNet2DModel.from_config(dict(config)), seed).to(device)
    size = config["sample_size"]
    assert isinstance(size, int)
    return Twins("diffusers", net, _call_diffusers, partial(interop.from_diffusers, config), size)


def _call_diffusers(net: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
    return net(x, timestep).sample


def _diffusers(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerMissing(f"diffusers is not installed ({error})") from error


def ddpm_twins(bench: Bench) -> Twins:
    """DDPM's network for CIFAR-10, 35.7 M parameters, 32 pixels."""
    return diffusers_twins(DDPM, bench.device)


def light_twins(bench: Bench) -> Twins:
    """Our preset `light` at 64 pixels, written as diffusers writes it."""
    size = PRESETS["light"].nominal
    exported = interop.to_diffusers(preset("light"), LinearBetas(), Epsilon(), (size, size))
    return diffusers_twins(exported.unet, bench.device)


def lucidrains_twins(bench: Bench, dim: int = 64) -> Twins:
    """denoising-diffusion-pytorch's default network, 32 pixels."""
    module = from_checkout(bench.peer_paths, "denoising_diffusion_pytorch")
    net = seeded(lambda: module.Unet(dim)).to(bench.device)
    read = interop.from_lucidrains
    return Twins("denoising-diffusion-pytorch", net, _call_plainly, read, 32)


def guided_twins(bench: Bench, channels: int = 192) -> Twins:
    """guided-diffusion's network for ImageNet 64x64 (ADM), without classes."""
    module = from_checkout(bench.peer_paths, "guided_diffusion.unet")
    net = seeded(lambda: _adm_64(module, channels)).to(bench.device)
    options = interop.OpenAIOptions(
        num_head_channels=channels // 3,
        use_new_attention_order=True,
        diffusion_steps=1000,
        noise_schedule=interop.NoiseSchedule.COSINE,
        rescale_timesteps=False,
        predict_xstart=False,
    )
    read = partial(interop.from_openai, options=options)
    return Twins("guided-diffusion", net, _call_plainly, read, 64)


def _adm_64(module: Any, channels: int) -> nn.Module:
    return module.UNetModel(
        image_size=64,
        in_channels=3,
        model_channels=channels,
        out_channels=6,
        num_res_blocks=3,
        attention_resolutions=(2, 4, 8),
        channel_mult=(1, 2, 3, 4),
        num_head_channels=channels // 3,
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=True,
    )


def _call_plainly(net: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
    return net(x, timestep)


def from_checkout(folders: Sequence[Path], module: str) -> Any:
    """A module of a checkout in one of the folders, or one level below.

    Raises:
        PeerMissing: there is none, or it needs a package that is not installed.
    """
    package = module.partition(".")[0]
    near = (place for folder in folders for place in (folder, *sorted(folder.glob("*/"))))
    found = next((place for place in near if (place / package).is_dir()), None)
    if found is None:
        there = " holds it" if folders else ""
        raise PeerMissing(f"no --peer-path{there}: give a checkout with the folder {package}")
    if str(found) not in sys.path:
        sys.path.insert(0, str(found))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerMissing(f"{package} cannot be imported: {error}") from error


# --- the forms in which a peer can run ----------------------------------------------------------


class Arithmetic(StrEnum):
    FLOAT32 = "fp32"
    AUTOCAST = "bf16 autocast"
    BFLOAT16 = "bf16 weights"


@dataclass(frozen=True)
class Form:
    """What a user of the peer can switch without touching its code."""

    arithmetic: Arithmetic = Arithmetic.FLOAT32
    channels_last: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{self.arithmetic}, {layout}, {'compiled' if self.compiled else 'eager'}"


AS_IT_COMES = Form()


def forms(arithmetics: Sequence[Arithmetic] = tuple(Arithmetic)) -> list[Form]:
    """All of them, eager ones first."""
    every = product((False, True), arithmetics, (False, True))
    return [Form(arithmetic, last, compiled) for compiled, arithmetic, last in every]


@dataclass(frozen=True)
class Prepared:
    """A peer in one of its forms: `run` is (x, timestep) -> float32 output."""

    net: nn.Module
    run: Callable[[Tensor, Tensor], Tensor]


def prepared(twins: Twins, form: Form, copied: bool = True) -> Prepared:
    """A copy of their network, or the network itself, in that form."""
    net = copy.deepcopy(twins.theirs) if copied else twins.theirs
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    net = net.to(memory_format=layout)  # pyright: ignore[reportCallIssue] # overload lacks it
    half = form.arithmetic is Arithmetic.BFLOAT16
    net = net.bfloat16() if half else net
    called: Any = torch.compile(net, dynamic=False) if form.compiled else net
    autocast = form.arithmetic is Arithmetic.AUTOCAST

    def run(x: Tensor, timestep: Tensor) -> Tensor:
        x = x.contiguous(memory_format=layout)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            return twins.call(called, x.bfloat16() if half else x, timestep).float()

    return Prepared(net, run)


# --- the fastest of them ------------------------------------------------------------------------

Build = Callable[[Form], Callable[[], Tensor]]  # one unit of work; raises NotEqual


@dataclass(frozen=True)
class Tuned:
    """The fastest form, and seconds per call of all that were tried (or why there are none)."""

    form: Form
    compile_s: float
    tried: Mapping[str, float | str]


def fastest(bench: Bench, key: str, candidates: Sequence[Form], build: Build) -> Tuned:
    """Measure every form once and keep the answer; in a quick run an answer that is kept will do.

    A quick run without one compiles only the two forms that are fastest uncompiled.

    Args:
        build: makes the call of a form; it raises where outputs are not equal.
    """
    kept = _kept(bench, key)
    if bench.quick and (before := kept.read()) is not None:
        return before
    tried = dict(_tried(bench, [form for form in candidates if not form.compiled], build))
    compiled = [form for form in candidates if form.compiled]
    if bench.quick:
        compiled = _promising(tried, compiled)
    tried |= _tried(bench, compiled, build)
    best = min((form for form, found in tried.items() if found.reason is None), key=_speed(tried))
    words = {form.label: found.reason or found.seconds for form, found in tried.items()}
    return kept.write(Tuned(best, tried[best].compile_s, words))


def known(bench: Bench, key: str) -> Tuned | None:
    """What `fastest` found before on such a machine, if it did."""
    return _kept(bench, key).read()


@dataclass(frozen=True)
class _Found:
    seconds: float
    compile_s: float
    reason: str | None = None


def _speed(tried: Mapping[Form, _Found]) -> Callable[[Form], float]:
    return lambda form: tried[form].seconds


def _promising(tried: Mapping[Form, _Found], compiled: Sequence[Form]) -> list[Form]:
    order = sorted((f for f, found in tried.items() if found.reason is None), key=_speed(tried))
    two = [(form.arithmetic, form.channels_last) for form in order[:2]]
    return [form for form in compiled if (form.arithmetic, form.channels_last) in two]


def _tried(bench: Bench, candidates: Sequence[Form], build: Build) -> Iterator[tuple[Form, _Found]]:
    for form in candidates:
        try:
            compile_s, call = built(form, build)
        except (NotEqual, RuntimeError) as error:  # a compiler that is missing, or is wrong
            yield form, _Found(0.0, 0.0, str(error).strip().split("\n")[0])
            continue
        timed = bench.side(form.label, call)
        yield form, _Found(statistics.median(timed.measure() for _ in range(3)), compile_s)


def built(form: Form, build: Build) -> tuple[float, Callable[[], Tensor]]:
    """The call, and how long making it and calling it first took if it is compiled."""
    if not form.compiled:
        return 0.0, build(form)
    torch.compiler.reset()  # or the ninth form of one function would silently run uncompiled
    began = time.perf_counter()
    call = build(form)
    call()
    return time.perf_counter() - began, call


@dataclass(frozen=True)
class _Kept:
    """One answer in a JSON file of several."""

    file: Path
    key: str

    def read(self) -> Tuned | None:
        found = self._all().get(self.key)
        if found is None:
            return None
        one = found["form"]
        form = Form(Arithmetic(one["arithmetic"]), one["channels_last"], one["compiled"])
        return Tuned(form, found["compile_s"], found["tried"])

    def write(self, tuned: Tuned) -> Tuned:
        form = tuned.form
        facts = {
            "form": {
                "arithmetic": form.arithmetic.value,
                "channels_last": form.channels_last,
                "compiled": form.compiled,
            },
            "compile_s": tuned.compile_s,
            "tried": dict(tuned.tried),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self._all() | {self.key: facts}, indent=1) + "\n", "utf-8")
        return tuned

    def _all(self) -> Numbers:
        return json.loads(self.file.read_text("utf-8")) if self.file.exists() else {}


def _kept(bench: Bench, key: str) -> _Kept:
    about, has = machine(bench.threads, 0.0), versions()
    parts = (key, about["gpu"] or about["cpu"], bench.threads, has["torch"], has["diffusers"])
    return _Kept(bench.kept / "fastest.json", "/".join(map(str, parts)))

"""Every setting the command line can change, as frozen dataclasses of plain values.

A field's name is its option: `train_batch_size` is `--train-batch-size`. The names are those of
diffusers' training scripts. Values are checked when a dataclass is made.
"""

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args

from undiffuse.errors import ConfigError


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Precision(StrEnum):
    """Of the network's arithmetic; weights, loss and preconditioning are always float32."""

    AUTO = "auto"  # time one training step of this network both ways
    NO = "no"
    BF16 = "bf16"


class LrScheduler(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class PredictionType(StrEnum):
    KARRAS = "karras"
    EPSILON = "epsilon"
    SAMPLE = "sample"
    V_PREDICTION = "v_prediction"
    FLOW = "flow"


class BetaSchedule(StrEnum):
    KARRAS = "karras"
    LINEAR = "linear"
    SCALED_LINEAR = "scaled_linear"
    COSINE = "squaredcos_cap_v2"
    SIGMOID = "sigmoid"
    FLOW = "flow"


class BadImage(StrEnum):
    SKIP = "skip"
    ERROR = "error"


class Tracker(StrEnum):
    NONE = "none"
    TENSORBOARD = "tensorboard"


class SamplerName(StrEnum):
    DDPM = "ddpm"
    DDIM = "ddim"
    HEUN = "heun"
    DPMPP_2M = "dpmpp_2m"
    DPMPP_2M_SDE = "dpmpp_2m_sde"
    DPMPP_3M = "dpmpp_3m"
    UNIPC = "unipc"
    IPNDM = "ipndm"


class Weights(StrEnum):
    EMA = "ema"
    RAW = "raw"


class ForeignFormat(StrEnum):
    """Whose weights are read."""

    AUTO = "auto"
    DIFFUSERS = "diffusers"
    OPENAI = "openai"
    LUCIDRAINS = "denoising-diffusion-pytorch"
    EDM = "edm"


class ExportFormat(StrEnum):
    """What a model is written as."""

    DIFFUSERS = "diffusers"
    ONNX = "onnx"
    PT2 = "pt2"
    OPENAI = "openai"
    LUCIDRAINS = "denoising-diffusion-pytorch"


class ForeignSchedule(StrEnum):
    """The noise schedules of OpenAI's programs, under their names."""

    LINEAR = "linear"
    COSINE = "cosine"


def option(default: Any, help: str, at_least: float | None = None, **limits: Any) -> Any:
    """A field with its help line and its legal range (`at_least`, `below`, `at_most`, `above`)."""
    bounds = dict(limits) if at_least is None else {"at_least": at_least, **limits}
    return field(default=default, metadata={"help": help, **bounds})


class Checked:
    """Checks every field of a frozen dataclass against the limits beside it."""

    def __post_init__(self) -> None:
        for one in fields(self):  # pyright: ignore[reportArgumentType] # subclasses are dataclasses
            _check(one, getattr(self, one.name))


SectionT = TypeVar("SectionT", bound=Checked)

_LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def _check(one: Field[Any], value: object) -> None:
    if value is None or not isinstance(value, int | float):
        return
    limits: Mapping[str, Any] = one.metadata
    broken = [
        f"{words} {limits[name]}"
        for name, (holds, words) in _LIMITS.items()
        if name in limits and not holds(value, limits[name])
    ]
    if broken or not _holdable(value):
        wanted = " and ".join(broken) or "a finite number of a usual size"
        raise ConfigError(f"{one.name} must be {wanted}; got {value}")


def _holdable(value: float) -> bool:
    """Whole numbers must fit into 64 bits: steps, positions and seeds are counted in them."""
    return -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)


@dataclass(frozen=True)
class DataConfig(Checked):
    """Where the pictures come from and how they become pixels."""

    data: str = option("digits", "a folder, an .npz file, 'digits' or 'photos'")
    resolution: tuple[int, int] | None = option(
        None, "N or HxW in pixels (default: the pictures' common size)"
    )
    channels: int | None = option(None, "1 grey, 3 colour, 4 with alpha (default: detected)", 1)
    background: str = option("white", "colour behind transparent pixels")
    random_flip: bool = option(False, "mirror half of the pictures")
    random_crop: bool = option(False, "store pictures 1/8 larger and crop at random")
    on_bad_image: BadImage = option(BadImage.SKIP, "what to do with an unreadable picture")
    val_fraction: float | None = option(
        None, "share of pictures held out (default: 0.1; digits 0.2)", above=0.0, below=1.0
    )


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Which network, and what its output means."""

    preset: str | None = option(
        None, "a network (default: tiny up to 32 pixels, else light) or a recipe, such as minutes"
    )
    dropout: float = option(0.0, "dropout inside residual blocks", 0.0, below=1.0)
    class_conditional: bool = option(True, "use class labels where the data have them")
    prediction_type: PredictionType | None = option(
        None, "what the network predicts (default: as usual with the schedule, or as --init-from)"
    )
    beta_schedule: BetaSchedule | None = option(
        None, "noise schedule (default: karras, or that of --init-from)"
    )
    num_train_timesteps: int = option(
        1000, "number of noise levels in beta schedules", 2, at_most=1_000_000
    )
    p_mean: float = option(-1.2, "mean of ln(sigma/alpha) in training (karras)")
    p_std: float = option(1.2, "standard deviation of the same (karras)", above=0.0)
    high_noise_weight: float | None = option(
        None,
        "loss weight 1 + (sigma/alpha/sigma_data)^2, at most this (default: 1 throughout; 10 suits"
        " --stable-targets)",
        1.0,
    )
    snr_gamma: float | None = option(
        None, "gamma of min-SNR weighting (2303.09556; default: none; 5 is usual)", above=0.0
    )


@dataclass(frozen=True)
class TrainConfig(Checked):
    """How the weights are found."""

    max_train_steps: int = option(10_000, "optimiser steps", 1)
    train_batch_size: int = option(64, "pictures per optimiser step", 1)
    gradient_accumulation_steps: int | None = option(
        None, "parts that a batch is computed in (default: as few as fit in memory)", 1
    )
    learning_rate: float = option(1e-3, "highest learning rate", above=0.0)
    lr_scheduler: LrScheduler = option(
        LrScheduler.COSINE, "how the learning rate decays after the warm-up"
    )
    lr_warmup_steps: int = option(100, "steps of linear warm-up (at most a tenth of all)", 0)
    adam_beta1: float = option(0.9, "beta1 of AdamW", 0.0, below=1.0)
    adam_beta2: float = option(0.99, "beta2 of AdamW", 0.0, below=1.0)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", above=0.0)
    adam_weight_decay: float = option(0.0, "weight decay of AdamW", 0.0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0.0)
    label_dropout: float = option(0.1, "share of labels replaced by 'no class'", 0.0, at_most=1.0)
    stable_targets: bool = option(
        False,
        "aim at the mean of all training pictures that a noised one may have been (2302.00670):"
        " steadier gradients, for sets up to 16 million values",
    )
    augment: float = option(
        0.0,
        "probability of each transformation (mirror, shift, scale, turn, stretch), of which the"
        " network is told, so that samples show none (2206.00364); 0.12 is usual below 10,000"
        " pictures",
        0.0,
        at_most=1.0,
    )
    ema_length: float = option(
        0.05,
        "length of the weights' average, as a share of the steps (2312.02696)",
        0.005,
        at_most=0.25,
    )
    ema_second_length: float | None = option(
        None,
        "length of a second average beside it (default: twice --ema-length; the same: none)",
        0.005,
        at_most=0.25,
    )
    seed: int = option(0, "seed of everything random", 0, below=2**63)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts > self.train_batch_size:
            raise ConfigError(
                f"gradient_accumulation_steps {self.parts} is more than train_batch_size"
                f" {self.train_batch_size}; a part needs at least one picture"
            )

    @property
    def second_length(self) -> float | None:
        """Of the average beside the first; None where there is none."""
        return None if self.ema_second_length == self.ema_length else self.ema_second_length

    @property
    def parts(self) -> int:
        """In how many parts a batch is computed."""
        return self.gradient_accumulation_steps or 1

    @property
    def part_size(self) -> int:
        """Pictures computed at once, at most."""
        return math.ceil(self.train_batch_size / self.parts)


@dataclass(frozen=True)
class GuidanceConfig(Checked):
    """How a run's pictures are guided (2207.12598) wherever nobody says otherwise.

    A network that takes no labels is not guided, whatever is said here.
    """

    guidance_scale: float = option(1.0, "strength of classifier-free guidance; 1 is none")
    guidance_low: float = option(0.0, "no guidance at noise levels sigma/alpha below this", 0.0)
    guidance_high: float | None = option(
        None,
        "no guidance at noise levels sigma/alpha above this (2404.07724; default: no limit)",
        above=0.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_high is not None and self.guidance_high < self.guidance_low:
            raise ConfigError(
                f"guidance_low {self.guidance_low:g} is above guidance_high"
                f" {self.guidance_high:g}; no noise level would be guided"
            )

    @property
    def interval(self) -> tuple[float, float]:
        """The noise levels sigma / alpha that are guided, lowest and highest."""
        return self.guidance_low, math.inf if self.guidance_high is None else self.guidance_high


@dataclass(frozen=True)
class RuntimeConfig(Checked):
    """What the arithmetic runs on."""

    device: Device = option(Device.AUTO, "where to compute")
    mixed_precision: Precision = option(
        Precision.AUTO, "bf16 inside the network; auto: if a timed step is faster with it"
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass; automatic where memory is short",
    )
    torch_compile: bool = option(
        False, "compile the network where it runs in bf16: minutes at first, then kept"
    )


@dataclass(frozen=True)
class LogConfig(Checked):
    """What a run writes, and how often."""

    checkpointing_steps: int = option(500, "steps between checkpoints", 1)
    checkpoints_total_limit: int = option(2, "checkpoints kept", 2)
    sample_every: int = option(500, "steps between sample grids and held-out losses", 1)
    num_samples: int = option(16, "pictures in a sample grid", 1, at_most=10_000)
    ema_snapshots: int = option(
        8,
        "times in a run that the averages are kept, so that any length can be rebuilt; 0: never",
        0,
        at_most=100,
    )
    report_to: Tracker = option(Tracker.NONE, "also log to this tracker")


@dataclass(frozen=True)
class SampleConfig(Checked):
    """How pictures are generated."""

    num_images: int = option(16, "how many pictures", 1)
    num_inference_steps: int = option(20, "steps of the sampler", 1, at_most=10_000)
    sampler: SamplerName = option(
        SamplerName.DPMPP_2M, "sampling method; heun evaluates the network twice per step"
    )
    eta: float = option(
        0.0, "noise that ddim adds in every step: 0 none, 1 as much as ddpm", 0.0, at_most=1.0
    )
    guidance_scale: float | None = option(
        None,
        "strength of classifier-free guidance; 1 is none (default: as the run was told, else 1)",
    )
    guidance_low: float | None = option(
        None,
        "no guidance at noise levels sigma/alpha below this (default: as the run was told, else 0)",
        0.0,
    )
    guidance_high: float | None = option(
        None,
        "no guidance at noise levels sigma/alpha above this (2404.07724; default: as the run was"
        " told, else no limit)",
        above=0.0,
    )
    class_label: tuple[str, ...] = option((), "class names or numbers (default: all in turn)")
    seed: int = option(0, "seed of the noise; picture n depends on (seed, n) alone", 0, below=2**63)
    batch_size: int = option(64, "pictures computed at once; changes rounding only", 1)
    mixed_precision: Precision = option(
        Precision.AUTO,
        "bf16 inside the network; auto: if it is wide and the machine fast at it",
    )
    torch_compile: bool = option(
        False, "compile the network where it runs in bf16: minutes at first, then kept"
    )

    def guided(self, usual: GuidanceConfig) -> GuidanceConfig:
        """`usual`, but for what is said here.

        Raises:
            ConfigError: together they leave no noise level to guide.
        """
        named = {one.name: getattr(self, one.name) for one in fields(GuidanceConfig)}
        return replace(usual, **{name: said for name, said in named.items() if said is not None})


JUDGED = SampleConfig(batch_size=250)  # of pictures that are judged; how many is asked elsewhere


@dataclass(frozen=True)
class ImportConfig(Checked):
    """What comes in, and what its file does not say."""

    format: ForeignFormat = option(ForeignFormat.AUTO, "whose network it is")
    weights: Weights = option(Weights.EMA, "which, where the file holds averaged and raw ones")
    resolution: tuple[int, int] | None = option(
        None, "N or HxW of the pictures in pixels (default: as the file says)"
    )
    like: str | None = option(
        None, "openai: what is left out is as in this published network, such as adm-64"
    )
    num_heads: int | None = option(None, "openai: heads of each attention", 1)
    num_head_channels: int | None = option(None, "openai, edm: channels of each head", 1)
    use_new_attention_order: bool | None = option(None, "openai: the flag of that name")
    noise_schedule: ForeignSchedule | None = option(None, "openai: in training")
    num_train_timesteps: int | None = option(None, "openai: their diffusion_steps", 2)
    rescale_timesteps: bool | None = option(None, "openai: the flag of that name")
    predict_xstart: bool | None = option(None, "openai: the flag of that name")
    force: bool = option(False, "replace the file that is there")


@dataclass(frozen=True)
class ExportConfig(Checked):
    """What goes out."""

    format: ExportFormat | None = option(
        None, "as what (default: by the ending of --output, else diffusers)"
    )
    check: bool = option(True, "run it where it will be used and compare the outputs")
    pipeline: bool | None = option(
        None, "diffusers: for DDPMPipeline.from_pretrained (default: where that can run it)"
    )
    force: bool = option(False, "replace the file that is there")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a training run; flat in `config.json`, one key per option."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class NamedRecipe:
    """A network and how it is trained, under one name: settings by option."""

    summary: str
    settings: Mapping[str, object]


# The times are those of two cores; quality/ablation.py measures what each choice is worth.
RECIPES: dict[str, NamedRecipe] = {
    "seconds": NamedRecipe(
        "500 steps, a minute for pictures of 16 pixels: is the folder read as it should be?",
        {"max_train_steps": 500, "learning_rate": 2e-3, "ema_length": 0.1, "p_mean": -0.3},
    ),
    "minutes": NamedRecipe(
        "5,000 steps, ten minutes for pictures of 16 pixels",
        {
            "max_train_steps": 5000,
            "learning_rate": 2e-3,
            "dropout": 0.05,
            "ema_length": 0.1,
            "p_mean": -0.3,
        },
    ),
    "hours": NamedRecipe(
        "60,000 steps, two hours for pictures of 16 pixels; augmented, for sets that are small",
        {
            "max_train_steps": 60_000,
            "dropout": 0.1,
            "augment": 0.12,
            "ema_length": 0.1,
            "p_mean": -0.3,
            "checkpointing_steps": 2000,
            "sample_every": 2000,
        },
    ),
    "digits-demo": NamedRecipe(
        "the demo: 350 steps, a minute of training on two cores",
        {
            "preset": "compact",
            "max_train_steps": 350,
            "learning_rate": 3e-3,
            "label_dropout": 0.2,
            "ema_length": 0.1,
            "p_mean": -0.1,
            "p_std": 1.3,
            "stable_targets": True,
            "high_noise_weight": 10.0,
            "guidance_scale": 1.3,
            "guidance_low": 0.3,
            "guidance_high": 2.0,
        },
    ),
    "digits-best": NamedRecipe(
        "as good as the digits allow: 3,200 steps, ten minutes on two cores",
        {
            "preset": "compact",
            "max_train_steps": 3200,
            "learning_rate": 2e-3,
            "dropout": 0.05,
            "label_dropout": 0.75,
            "ema_length": 0.1,
            "p_mean": 0.5,
            "p_std": 1.0,
            "stable_targets": True,
            "high_noise_weight": 10.0,
            "guidance_scale": 1.2,
            "guidance_low": 0.3,
            "guidance_high": 2.0,
        },
    ),
}


def spelled_out(values: Mapping[str, object]) -> Mapping[str, object]:
    """`values` with a recipe's name replaced by its settings, as far as they are not named."""
    recipe = RECIPES.get(str(values.get("preset")))
    if recipe is None:
        return values
    return {**recipe.settings, **values, "preset": recipe.settings.get("preset")}


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every setting by option name, as JSON can hold it."""
    return {
        one.name: _plain(getattr(section, one.name))
        for section in _sections(config)
        for one in fields(section)
    }


def override(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """`config` with the named settings changed; values may be text, as typed, or JSON's types.

    A recipe's name under "preset" stands for all its settings; those in `values` come first.

    Raises:
        ConfigError: an unknown name, or a value that is not of the option's kind or range.
    """
    values = spelled_out(values)
    known = set(flatten(config))
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{suggestion(name, known)}")
    parts = {
        part.name: changed(getattr(config, part.name), values)  # pyright: ignore[reportAny] # getattr by a field's name
        for part in fields(config)
    }
    return RunConfig(**parts)


def changed(section: SectionT, values: Mapping[str, object]) -> SectionT:
    """One section with those of `values` that belong to it; others are ignored."""
    mine = {
        one.name: parse(one, values[one.name])
        for one in fields(section)  # pyright: ignore[reportArgumentType] # as above
        if one.name in values
    }
    return replace(section, **mine)  # pyright: ignore[reportArgumentType, reportCallIssue]


def suggestion(name: str, known: Iterable[str]) -> str:
    """'. Did you mean ...?' if something close is known."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f". Did you mean {near[0]!r}?" if near else ""


def parse(one: Field[Any], value: object) -> Any:
    """A typed or stored value as the field's type.

    Raises:
        ConfigError: naming the field, the value and what would be right.
    """
    kinds = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
    if value is None and NoneType in kinds:
        return None
    try:
        return _PARSERS.get(kinds[0], lambda v: _choice(kinds[0], v))(value)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{one.name} must be {error}; got {value!r}") from None


def _sections(config: RunConfig) -> list[Any]:
    return [getattr(config, part.name) for part in fields(config)]


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(cast("tuple[object, ...]", value))
    return value.value if isinstance(value, StrEnum) else value


def _choice(kind: Any, value: object) -> Any:
    choices: list[str] = [member.value for member in kind]
    if value in choices:
        return kind(value)
    text = str(value)
    if kind is BetaSchedule and text == "cosine":
        return BetaSchedule.COSINE
    raise ValueError(f"one of {', '.join(choices)}")


def _whole(value: object) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("a whole number")
    try:
        return int(value)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, OverflowError):
        raise ValueError("a whole number") from None


def _number(value: object) -> float:
    if isinstance(value, bool):
        raise ValueError("a number")
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, OverflowError):
        raise ValueError("a number") from None


def _truth(value: object) -> bool:
    known = {True: True, False: False, "true": True, "false": False}
    if not isinstance(value, bool | str) or value not in known:
        raise ValueError("true or false")
    return known[value]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    return value


def _size(value: object) -> tuple[int, int]:
    parts = value.lower().split("x") if isinstance(value, str) else value
    parts = [parts] if isinstance(parts, int) else parts
    if not isinstance(parts, list | tuple) or len(parts) not in (1, 2):  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError("N or HxW, such as 64 or 48x40")
    try:
        sides = [_whole(part) for part in cast("Sequence[object]", parts)]
    except ValueError:
        raise ValueError("N or HxW, such as 64 or 48x40") from None
    if min(sides) < 4 or max(sides) > MAX_RESOLUTION:
        raise ValueError(f"from 4 to {MAX_RESOLUTION} pixels each side")
    return sides[0], sides[-1]


def _words(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError("class names or numbers")
    return tuple(str(v) for v in cast("Sequence[object]", value))


MAX_RESOLUTION = 8192

_PARSERS: dict[Any, Callable[[object], Any]] = {
    int: _whole,
    float: _number,
    bool: _truth,
    str: _text,
    tuple[int, int]: _size,
    tuple[str, ...]: _words,
}

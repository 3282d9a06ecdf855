"""From words to a command with checked settings. Imports no torch, so `--help` is instant."""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, fields
from enum import StrEnum
from types import UnionType
from typing import Any, NamedTuple, NoReturn, get_args

from undiffuse import __version__, config
from undiffuse.cli import _commands as commands
from undiffuse.cli._arguments import Arguments, Runner
from undiffuse.errors import ConfigError

# Other projects' words for ours; the first that the command has is suggested.
FOREIGN = {
    "batch-size": ("train-batch-size",),
    "diffusion-steps": ("num-train-timesteps",),
    "dim": ("preset",),
    "dim-mults": ("preset",),
    "block-out-channels": ("preset",),
    "channel-mult": ("preset",),
    "model": ("preset",),
    "model-channels": ("preset",),
    "ddim-steps": ("num-inference-steps",),
    "epochs": ("max-train-steps",),
    "gradient-accumulate-every": ("gradient-accumulation-steps",),
    "image-size": ("resolution",),
    "label": ("class-label",),
    "class-labels": ("class-label",),
    "lr": ("learning-rate",),
    "n-samples": ("num-images", "num-samples"),
    "num-samples": ("num-images",),
    "num-steps": ("max-train-steps", "num-inference-steps"),
    "num-train-epochs": ("max-train-steps",),
    "objective": ("prediction-type",),
    "out": ("output-dir", "output"),
    "outdir": ("output-dir",),
    "output": ("output-dir",),
    "results-folder": ("output-dir",),
    "resume": ("resume-from-checkpoint",),
    "sampling-timesteps": ("num-inference-steps",),
    "scale": ("guidance-scale",),
    "steps": ("max-train-steps", "num-inference-steps"),
    "timestep-respacing": ("num-inference-steps",),
    "timesteps": ("num-train-timesteps", "num-inference-steps"),
    "train-lr": ("learning-rate",),
    "train-num-steps": ("max-train-steps",),
}
FOREIGN_COMMANDS = {
    "eval": "evaluate",
    "fit": "train",
    "convert": "import",
    "generate": "sample",
    "img2img": "edit",
    "help": "--help",
    "info": "describe",
    "summary": "describe",
    "test": "evaluate",
    "version": "--version",
}
GLOBAL = ("json", "quiet", "debug")  # flags of every command, which `wants` looks for
# argparse's sentences, and ours.
_SENTENCES = (
    (r"the following arguments are required: (.+)", r"\1 is missing"),
    (r"argument (\S+): expected .*argument.*", r"\1 needs a value"),
    (r"argument (\S+): ignored explicit argument (.+)", r"\1 takes no value; got \2"),
)


class _Parser(argparse.ArgumentParser):
    """argparse with our errors: one line, with a suggestion, as an exception."""

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"argument COMMAND: invalid choice: (.+?) \(choose", message)
        if wrong:
            message = _unknown_command(wrong[1].strip("'\""))
        for pattern, sentence in _SENTENCES:
            message = re.sub(f"^{pattern}$", sentence, message)
        raise ConfigError(f"{message} ({self.prog} --help lists all)")

    def unknown(self, rest: Sequence[str]) -> NoReturn:
        """Refuse words that no option and no argument takes."""
        flags = [word for word in rest if word.startswith("-") and len(word) > 1]
        if not flags:
            self.error(f"{rest[0]!r} is one argument too many")
        name = flags[0].partition("=")[0]
        self.error(f"unknown option {name}{self._hint(name.lstrip('-'))}")

    def _hint(self, name: str) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings]
        known = [flag[2:] for flag in flags if flag.startswith("--")]
        foreign = [word for word in FOREIGN.get(name, ()) if word in known]
        near = foreign or difflib.get_close_matches(name, known, 1)
        return f". Did you mean --{near[0]}?" if near else ""


def wants(words: Sequence[str], *flags: str) -> bool:
    """Whether a global flag stands anywhere before a bare `--`."""
    before = words[: words.index("--")] if "--" in words else words
    return any(flag in before for flag in flags)


def parse_arguments(words: Sequence[str]) -> Arguments:
    """The command that the words ask for.

    Raises:
        ConfigError: an unknown command or option, or a missing one.
        SystemExit: after `--help` and `--version`.
    """
    parser, ours = _build()
    namespace, rest = parser.parse_known_args(list(_tidied(words)))
    values = {k: v for k, v in vars(namespace).items() if v is not None and k not in GLOBAL}
    command = values.pop("command", None)
    if rest:
        ours.get(command or "", parser).unknown(rest)
    if command is None:
        parser.error("a command is missing: one of " + ", ".join(_COMMANDS))
    given = {name: _checked(name, value) for name, value in values.items()}
    return Arguments(command, _COMMANDS[command].run, given)


def _unknown_command(word: str) -> str:
    near = [FOREIGN_COMMANDS[word]] if word in FOREIGN_COMMANDS else []
    near = near or difflib.get_close_matches(word, _COMMANDS, 1)
    hint = f". Did you mean {near[0]}?" if near else ""
    return f"unknown command {word!r}{hint}"


def _tidied(words: Sequence[str]) -> Iterator[str]:
    """--train_batch_size=8 is --train-batch-size=8; --seed -1e3 is --seed=-1e3, a value."""
    waiting = iter(words)
    held: list[str] = []  # an option whose value may follow
    for word in waiting:
        if word == "--":
            yield from (*held, word, *waiting)
            return
        if held and _is_negative(word):
            yield f"{held.pop()}={word}"
            continue
        yield from held
        held = [_dashed(word)]
        if not word.startswith("--") or "=" in word:
            yield held.pop()
    yield from held


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _is_negative(word: str) -> bool:
    """-1, -1e-3, -inf: a number, where argparse would see an option."""
    try:
        float(word)
    except ValueError:
        return False
    return word.startswith("-")


def _checked(name: str, value: Any) -> Any:
    """Refuse what no file and no setting can be called; expand ~ where the shell did not."""
    if isinstance(value, list):
        return [_checked(name, one) for one in value]  # pyright: ignore[reportUnknownVariableType] # argparse is untyped
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise ConfigError(f"{name} must be a text that is not empty; got {value!r}")
    return os.path.expanduser(value) if value.startswith("~/") else value


def _build() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the whole, and that of each command."""
    parser = _Parser(
        prog="undiffuse",
        description="The U-Net that removes noise: train it on a folder of pictures, generate new"
        " ones, measure how good they are, look inside.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="start with: undiffuse demo",
    )
    _add_global(parser)
    place = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    return parser, {name: _add_command(place, name, entry) for name, entry in _COMMANDS.items()}


def _add_command(place: Any, name: str, command: "_Command") -> _Parser:
    """place: argparse's type of it has no public name."""
    one = place.add_parser(
        name,
        help=command.summary,
        description=command.summary[0].upper() + command.summary[1:] + ".",
        usage=f"undiffuse {name} {command.words}[options]",
        allow_abbrev=False,
    )
    command.add(one)
    _add_global(one)
    return one


def _add_global(parser: argparse.ArgumentParser) -> None:
    """The flags of `GLOBAL`, here only known and explained."""
    group = parser.add_argument_group("everywhere")
    for flags, text in (
        (("--json",), "result as one JSON line"),
        (("-q", "--quiet"), "no progress"),
        (("--debug",), "tracebacks with errors"),
    ):
        group.add_argument(*flags, action="store_true", default=argparse.SUPPRESS, help=text)
    version = f"undiffuse {__version__}"
    group.add_argument(
        "--version", action="version", version=version, help="print the version and exit"
    )


def _add_section(parser: argparse.ArgumentParser, section: Any, *without: str) -> None:
    """section: a dataclass of settings with the defaults that are shown."""
    group = parser.add_argument_group((section.__doc__ or "").strip().splitlines()[0].rstrip("."))
    for one in fields(section):
        if one.name not in without:
            _add_option(group, one, getattr(section, one.name))


def _add_option(group: Any, one: Field[Any], default: Any) -> None:
    """group: argparse's type of it has no public name."""
    flag = "--" + one.name.replace("_", "-")
    kinds = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
    text = str(one.metadata["help"]).replace("%", "%%")
    shown = default.value if isinstance(default, StrEnum) else default
    if kinds[0] is bool:
        shown = "on" if default else "off"
    if default not in (None, ()):
        text += f" (default: {shown})"
    if kinds[0] is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif kinds[0] == tuple[str, ...]:
        group.add_argument(flag, nargs="+", metavar="CLASS", help=text)
    else:
        group.add_argument(flag, metavar=_metavar(kinds[0]), help=text)


def _metavar(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return "|".join(member.value for member in kind)
    names: dict[Any, str] = {int: "N", float: "X", tuple[int, int]: "N|HxW"}
    return names.get(kind, "TEXT")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="digits|photos", help="what to learn (default: digits)")
    parser.add_argument("--output-dir", metavar="RUN", help="run folder (default: runs/demo)")
    parser.add_argument("--seed", metavar="N", help="seed of everything random (default: 0)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="DATA", nargs="?", help=fields(config.DataConfig)[0].metadata["help"]
    )
    parser.add_argument("--output-dir", metavar="RUN", help="run folder (default: runs/DATA-001)")
    parser.add_argument("--config", metavar="FILE", help="settings from a JSON or TOML file")
    parser.add_argument(
        "--resume-from-checkpoint",
        metavar="latest|STEP",
        help="go on with the run in --output-dir; DATA and settings come from there",
    )
    parser.add_argument(
        "--init-from", metavar="MODEL", help="start from the weights of this run or model file"
    )
    parser.add_argument(
        "--accept-data-change",
        action="store_true",
        default=None,
        help="resume although the pictures have changed",
    )
    parser.add_argument(
        *("-n", "--dry-run"), action="store_true", default=None, help="only say what would happen"
    )
    _add_section(parser, config.DataConfig(), "data")
    for section in (
        config.ModelConfig(),
        config.TrainConfig(),
        config.GuidanceConfig(),
        config.RuntimeConfig(),
        config.LogConfig(),
    ):
        _add_section(parser, section)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder or a model file")
    _add_weights(parser)
    parser.add_argument(
        "--ema-length",
        metavar="X",
        help="rebuild the weights' average of this length, as a share of the steps, such as 0.08"
        " (2312.02696; default: as trained)",
    )
    parser.add_argument(
        "--device", metavar="auto|cpu|cuda|mps", help="where to compute (default: auto)"
    )


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", metavar="ema|raw", help="averaged or as last updated (default: ema)"
    )
    parser.add_argument(
        "--checkpoint", metavar="STEP", help="the model at this step (default: the last)"
    )


def _add_sample(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("-n", dest="num_images", metavar="N", help="the same as --num-images")
    _add_section(parser, config.SampleConfig())
    _add_autoguidance(parser)
    parser.add_argument(
        "--format", metavar="grid|png|npz", help="one grid, single files, an array (default: grid)"
    )
    parser.add_argument("--film", metavar="webp|gif", help="also an animation of the denoising")
    parser.add_argument(
        "--output-dir", metavar="DIR", help="where the files go (default: RUN/samples)"
    )


def _add_autoguidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--autoguidance",
        metavar="early|STEP|RUN",
        help="guide with a weaker model, by --guidance-scale: an early average of this run, its"
        " average at a step, or another run, ./2024 if a number is its name (2406.02507)",
    )


def _add_denoise(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="noisy pictures of any size")
    parser.add_argument(
        "--sigma",
        metavar="X|auto",
        help="standard deviation of the noise, for pictures in -1...1 (default: auto, the level at"
        " which the picture is most likely)",
    )
    parser.add_argument(
        "--clean",
        metavar="FILE",
        nargs="+",
        help="the clean pictures, one per IMAGE: prints PSNR and SSIM",
    )
    parser.add_argument(
        "--add-noise",
        action="store_true",
        default=None,
        help="the pictures are clean: first add noise of --sigma, here 0.2 by default",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        default=None,
        help="also denoise with Wiener filters and non-local means (needs the extra `compare`)",
    )
    parser.add_argument(
        "--num-inference-steps",
        metavar="N",
        help="draw one of the pictures that it may have been, in N steps: sharper, but further from"
        " the true one (default: their mean, in one step)",
    )
    parser.add_argument(
        "--class-label", metavar="CLASS", help="what the pictures show (default: no class)"
    )
    parser.add_argument(
        "--tile",
        metavar="N",
        help="denoise larger pictures in overlapping squares of N x N pixels; 0: never (default:"
        " twice the side of the pictures the network was trained on)",
    )
    parser.add_argument("--seed", metavar="N", help="seed of noise and sampler (default: 0)")
    parser.add_argument(
        "--output-dir", metavar="DIR", help="where the files go (default: RUN/denoised)"
    )


def _add_inpaint(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("image", metavar="IMAGE", help="a picture of the network's size")
    parser.add_argument("mask", metavar="MASK", help="a picture of that size, white where to fill")
    parser.add_argument(
        "--num-resamples",
        metavar="N",
        help="use RePaint (2201.09865), which takes every step N times and needs no derivative"
        " (default: moment matching, 2405.13712, closer in the time of about 10)",
    )
    _add_results(parser, "different fillings (default: 4)", "inpainted", "sampler")
    _add_autoguidance(parser)


def _add_edit(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="pictures of the network's size")
    parser.add_argument(
        "--strength",
        metavar="X",
        help="how much noise to add and remove again, as a share of the sampler's steps: 0 returns"
        " the picture, 1 ignores it (default: 0.5)",
    )
    _add_results(parser, "results per picture (default: 4)", "edited")
    _add_autoguidance(parser)


def _add_interpolate(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    for name in ("a", "b"):
        parser.add_argument(
            name, metavar=name.upper(), help="a seed, or a picture of the network's size"
        )
    without = ("sampler", "seed", "guidance_low", "guidance_high")
    _add_results(parser, "pictures from A to B, with both (default: 8)", "interpolated", *without)
    parser.add_argument("--film", metavar="webp|gif", help="also an animation, there and back")


def _add_results(parser: argparse.ArgumentParser, count: str, folder: str, *without: str) -> None:
    """How many pictures to make, of what, and how: `SampleConfig` with other defaults."""
    parser.add_argument(*("-n", "--num-images"), metavar="N", help=count)
    parser.add_argument(
        "--class-label",
        metavar="CLASS",
        nargs="+",
        help="class names or numbers (default: no class)",
    )
    own = ("num_images", "class_label", "eta", "torch_compile")
    _add_section(parser, config.SampleConfig(), *own, *without)
    parser.add_argument(
        "--output-dir", metavar="DIR", help=f"where the files go (default: RUN/{folder})"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="DATA", help="real pictures, as for `train` (default: the run's own)"
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    _add_data(parser)
    parser.add_argument(
        "--num-samples",
        metavar="N",
        help="generated pictures (default: 1000 up to 16x16, fewer of larger ones, at least 100)",
    )
    parser.add_argument(
        "--draws",
        metavar="N",
        help="draws of noise per held-out picture (default: 4, fewer of large data)",
    )
    parser.add_argument(
        "--features",
        metavar="FILE.onnx",
        help="measure distances in this network's output (default: a classifier fitted here)",
    )
    parser.add_argument(
        "--features-output", metavar="NAME", help="which output of it (default: the first)"
    )
    without = ("num_images", "eta", "class_label")
    _add_section(parser, config.JUDGED, *without)
    _add_autoguidance(parser)
    parser.add_argument(
        "--pareto",
        action="store_true",
        default=None,
        help="measure quality against network evaluations for every sampler instead; writes"
        " RUN/pareto.json and .png",
    )
    parser.add_argument(
        "--against",
        metavar="B",
        help="compare with B instead and say which differences are more than chance; B is a run, a"
        " model file or pictures, and so may RUN be",
    )
    parser.add_argument(
        "--fail-above",
        metavar="NAME=X",
        help="exit with 6 if a figure is above X, such as frechet=3",
    )
    parser.add_argument(
        "--fail-below",
        metavar="NAME=X",
        help="exit with 6 if a figure is below X, such as recall=0.5",
    )


def _add_likelihood(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    _add_data(parser)
    parser.add_argument("--split", metavar="train|held-out|both", help="which (default: both)")
    parser.add_argument(
        "--num-images",
        metavar="N",
        help="pictures of each split (default: 50 up to 12x12, fewer of larger ones, at least 8)",
    )
    parser.add_argument(
        "--num-probes",
        metavar="N|exact",
        help="random vectors that the trace of the Jacobian is estimated with (default: exact up to"
        " 256 values per picture, else 8)",
    )
    parser.add_argument(
        "--tolerance",
        metavar="X",
        help="largest estimated error of the integral, in bits per dimension (default: 0.01)",
    )
    parser.add_argument(
        "--given-class",
        action="store_true",
        default=None,
        help="likelihood given the class (default: without, unless the model must be told)",
    )
    parser.add_argument(
        "--seed", metavar="N", help="seed of the random vectors and of dequantising (default: 0)"
    )


def _add_describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="a preset, a run, a model file or a folder of pictures (default: what there is)",
    )
    parser.add_argument(
        "--resolution",
        metavar="N|HxW",
        help="picture size for shapes and FLOPs (default: the target's own)",
    )
    parser.add_argument("--channels", metavar="N", help="channels of a preset (default: 3)")
    parser.add_argument("--classes", metavar="N", help="classes of a preset (default: 0)")
    parser.add_argument(
        "--output", metavar="FILE", help="draw the U as .svg or .png, pictures as a contact sheet"
    )
    parser.add_argument(
        "--animate", action="store_true", default=None, help="show in the .svg how data flow"
    )


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="a folder of diffusers, or a .safetensors, .pt or .bin file"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the model file (default: runs/NAME/model.safetensors)",
    )
    _add_section(parser, config.ImportConfig())


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder or a model file")
    _add_weights(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="a folder for diffusers, else a file (default: in RUN)",
    )
    _add_section(parser, config.ExportConfig())


def _add_average(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--ema-length",
        metavar="X",
        help="length of the average, as a share of the steps, such as 0.08; must be given",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        help="as if the run had ended at this step (default: the last)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the model file (default: RUN/ema-X.safetensors)",
    )
    parser.add_argument("--force", action="store_true", default=None, help="replace the file there")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--output", metavar="FILE", help="the page (default: RUN/report.html)")


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    del parser


class _Command(NamedTuple):
    run: Runner
    words: str
    summary: str
    add: Callable[[argparse.ArgumentParser], None]


_COMMANDS = {
    "demo": _Command(
        commands.demo,
        "",
        "learn real digits, sample, evaluate, report: about three minutes",
        _add_demo,
    ),
    "train": _Command(
        commands.train, "DATA ", "train a generator on a folder of pictures", _add_train
    ),
    "sample": _Command(commands.sample, "RUN ", "generate pictures", _add_sample),
    "denoise": _Command(
        commands.denoise, "RUN IMAGE ... ", "remove noise from pictures", _add_denoise
    ),
    "inpaint": _Command(
        commands.inpaint, "RUN IMAGE MASK ", "fill a hole in a picture", _add_inpaint
    ),
    "edit": _Command(
        commands.edit,
        "RUN IMAGE ... ",
        "vary a picture by noise and denoising (image to image)",
        _add_edit,
    ),
    "interpolate": _Command(
        commands.interpolate,
        "RUN A B ",
        "make pictures between two pictures or seeds",
        _add_interpolate,
    ),
    "evaluate": _Command(
        commands.evaluate,
        "RUN ",
        "measure a model against exact limits and real pictures",
        _add_evaluate,
    ),
    "likelihood": _Command(
        commands.likelihood,
        "RUN ",
        "measure in bits per dimension how probable pictures are",
        _add_likelihood,
    ),
    "describe": _Command(
        commands.describe,
        "[TARGET] ",
        "show a network op by op, a run, or a folder of pictures",
        _add_describe,
    ),
    "import": _Command(
        commands.import_,
        "PATH ",
        "turn weights of another project into a model file",
        _add_import,
    ),
    "export": _Command(
        commands.export,
        "RUN ",
        "write a model for diffusers, ONNX Runtime or torch.export",
        _add_export,
    ),
    "average": _Command(
        commands.average,
        "RUN ",
        "write an average of a run's weights of any length as a model file",
        _add_average,
    ),
    "report": _Command(commands.report, "RUN ", "write a run's report.html", _add_report),
    "env": _Command(
        commands.env, "", "versions, devices and known traps, for a bug report", _add_nothing
    ),
}

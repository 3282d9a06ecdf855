"""From words to a command with checked settings. Imports no torch, so `--help` is instant."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields
from enum import StrEnum
from types import UnionType
from typing import Any, NoReturn, get_args

from undiffuse import __version__, config
from undiffuse.cli._output import Output
from undiffuse.errors import ConfigError

# Other projects' words for ours, for the hint in an error (docs/foreign-words.md has the table).
FOREIGN = {
    "batch-size": "train-batch-size",
    "num-steps": "max-train-steps",
    "steps": "max-train-steps",
    "train-num-steps": "max-train-steps",
    "image-size": "resolution",
    "gradient-accumulate-every": "gradient-accumulation-steps",
    "lr": "learning-rate",
    "train-lr": "learning-rate",
    "objective": "prediction-type",
    "timesteps": "num-train-timesteps",
    "diffusion-steps": "num-train-timesteps",
    "sampling-timesteps": "num-inference-steps",
    "timestep-respacing": "num-inference-steps",
    "resume": "resume-from-checkpoint",
    "outdir": "output-dir",
    "model": "preset",
}


@dataclass(frozen=True)
class Arguments:
    """What the user typed: the command and only those options that were given."""

    command: str
    run: "Callable[[Arguments, Output], int]"
    given: dict[str, Any]

    def section(self, section: config.SectionT) -> config.SectionT:
        """The section's defaults with the typed options."""
        return config.changed(section, self.given)

    def settings(self, *sections: type) -> dict[str, object]:
        """Those typed options that belong to the sections."""
        names = {one.name for section in sections for one in fields(section)}
        return {name: value for name, value in self.given.items() if name in names}


class _Parser(argparse.ArgumentParser):
    """argparse with our errors: one line, with a suggestion, as an exception."""

    def error(self, message: str) -> NoReturn:
        match = re.search(r"unrecognized arguments: (--?[\w-]+)", message)
        hint = self._hint(match[1].lstrip("-")) if match else ""
        raise ConfigError(f"{message}{hint} (undiffuse {self._command()}--help lists all)")

    def _command(self) -> str:
        words = self.prog.split()
        return f"{words[-1]} " if len(words) > 1 else ""

    def _hint(self, name: str) -> str:
        known = [flag[2:] for action in self._actions for flag in action.option_strings]
        foreign = FOREIGN.get(name)
        near = [foreign] if foreign in known else difflib.get_close_matches(name, known, 1)
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
    parser = _build()
    namespace, rest = parser.parse_known_args([_dashed(word) for word in words])
    values = {k: v for k, v in vars(namespace).items() if v is not None}
    if "command" not in values:
        parser.error("a command is missing: one of " + ", ".join(_COMMANDS))
    if rest:
        _subparser(parser, values["command"]).error(f"unrecognized arguments: {' '.join(rest)}")
    command = values.pop("command")
    return Arguments(command, _runner(command), values)


def _dashed(word: str) -> str:
    """--train_batch_size=8 is --train-batch-size=8; values keep their underscores."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _runner(command: str) -> "Callable[[Arguments, Output], int]":
    """Commands are imported only when they run: they need torch."""

    def run(arguments: Arguments, out: Output) -> int:
        from undiffuse.cli import _commands

        return _commands.COMMANDS[command](arguments, out)

    return run


def _subparser(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage] # argparse has no public way
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            return action.choices[command]
    raise AssertionError("no commands")


def _build() -> _Parser:
    parser = _Parser(
        prog="undiffuse",
        description="The U-Net that removes noise: train it on a folder of pictures, generate new"
        " ones, measure how good they are, look inside.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="start with: undiffuse demo",
    )
    parser.add_argument("--version", action="version", version=f"undiffuse {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (words, summary, add) in _COMMANDS.items():
        one = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            usage=f"undiffuse {name} {words}[options]",
            allow_abbrev=False,
        )
        add(one)
        _add_global(one)
    return parser


def _add_global(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("everywhere")
    group.add_argument("--json", action="store_true", default=None, help="result as one JSON line")
    group.add_argument("-q", "--quiet", action="store_true", default=None, help="no progress")
    group.add_argument("-v", "--verbose", action="store_true", default=None, help="say more")
    group.add_argument("--debug", action="store_true", default=None, help="tracebacks with errors")


def _add_section(parser: argparse.ArgumentParser, section: type, *without: str) -> None:
    group = parser.add_argument_group((section.__doc__ or "").strip().splitlines()[0].rstrip("."))
    for one in fields(section):
        if one.name not in without:
            _add_option(group, one)


def _add_option(group: Any, one: Field[Any]) -> None:  # argparse's group type has no public name
    flag = "--" + one.name.replace("_", "-")
    kinds = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
    text = str(one.metadata["help"]).replace("%", "%%")
    shown = one.default.value if isinstance(one.default, StrEnum) else one.default
    if one.default not in (None, (), False):
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
    parser.add_argument("--seed", metavar="N", help="of everything random (default: 0)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="DATA", nargs="?", help=fields(config.DataConfig)[0].metadata["help"]
    )
    parser.add_argument("--output-dir", metavar="RUN", help="run folder (default: runs/DATA-001)")
    parser.add_argument("--config", metavar="FILE", help="settings from JSON or TOML")
    parser.add_argument(
        "--resume-from-checkpoint",
        metavar="latest|STEP",
        help="go on with the run in --output-dir; DATA and settings come from there",
    )
    parser.add_argument("--init-from", metavar="MODEL", help="start from these weights")
    parser.add_argument(
        "--accept-data-change", action="store_true", default=None, help="resume on changed data"
    )
    parser.add_argument(
        "-n", "--dry-run", action="store_true", default=None, help="say what would happen"
    )
    _add_section(parser, config.DataConfig, "data")
    for section in (
        config.ModelConfig,
        config.TrainConfig,
        config.RuntimeConfig,
        config.LogConfig,
    ):
        _add_section(parser, section)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder or a model file")
    parser.add_argument("--weights", metavar="ema|raw", help="(default: ema)")
    parser.add_argument("--checkpoint", metavar="STEP", help="instead of the finished model")
    parser.add_argument("--device", metavar="auto|cpu|cuda|mps", help="where to compute")


def _add_sample(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("-n", dest="num_images", metavar="N", help="the same as --num-images")
    _add_section(parser, config.SampleConfig)
    parser.add_argument("--autoguidance", metavar="RUN", help="guide with this weaker model")
    parser.add_argument(
        "--format", metavar="grid|png|npz", help="one grid, single files, an array (default: grid)"
    )
    parser.add_argument("--film", metavar="webp|gif", help="also an animation of the denoising")
    parser.add_argument("--output-dir", metavar="DIR", help="(default: RUN/samples)")


def _add_denoise(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="noisy pictures")
    parser.add_argument(
        "--sigma",
        metavar="X",
        help="standard deviation of the noise, for pictures in -1...1 (default: 0.2)",
    )
    parser.add_argument(
        "--add-noise",
        action="store_true",
        default=None,
        help="the pictures are clean: add the noise first and print PSNR",
    )
    parser.add_argument("--seed", metavar="N", help="of the added noise (default: 0)")
    parser.add_argument("--output-dir", metavar="DIR", help="(default: RUN/denoised)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--data", metavar="DATA", help="(default: the run's own)")
    parser.add_argument("--num-samples", metavar="N", help="pictures to judge (default: 1000)")
    parser.add_argument("--draws", metavar="N", help="noise draws per picture (default: 4)")
    for name in ("num_inference_steps", "sampler", "guidance_scale", "seed", "batch_size"):
        one = next(f for f in fields(config.SampleConfig) if f.name == name)
        _add_option(parser.add_argument_group("sampling"), one)
    parser.add_argument(
        "--fail-above", metavar="NAME=X", help="exit with 6 if that figure is above X"
    )


def _add_describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="a preset, a run, a model file or a folder of pictures (default: what there is)",
    )
    parser.add_argument("--resolution", metavar="N|HxW", help="picture size for shapes and FLOPs")
    parser.add_argument("--channels", metavar="N", help="of the pictures (default: 3)")
    parser.add_argument("--classes", metavar="N", help="number of classes (default: 0)")
    parser.add_argument("--output", metavar="FILE", help="draw the U as .svg or .png")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--output", metavar="FILE", help="(default: RUN/report.html)")


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    del parser


_COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("", "learn real digits, sample, evaluate, report: about two minutes", _add_demo),
    "train": ("DATA ", "train a generator on a folder of pictures", _add_train),
    "sample": ("RUN ", "generate pictures", _add_sample),
    "denoise": ("RUN IMAGE ... ", "remove noise from pictures", _add_denoise),
    "evaluate": ("RUN ", "measure a model against exact limits and real pictures", _add_evaluate),
    "describe": (
        "[TARGET] ",
        "show a network op by op, a run, or a folder of pictures",
        _add_describe,
    ),
    "report": ("RUN ", "write a run's report.html", _add_report),
    "env": ("", "versions, devices and known traps, for a bug report", _add_nothing),
}

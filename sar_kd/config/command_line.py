"""From a command line, or from values given in Python, to a checked configuration."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import shutil
import sys
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_kd.config.fields import AUTO, KIND_NAMES, C, Command, is_allowed, options_of, require
from sar_kd.config.installation import program_name
from sar_kd.config.presets import default_batch_size, recipe_lines
from sar_kd.config.sections import EMBEDDED
from sar_kd.errors import UsageError
from sar_kd.version import RUN_FORMAT

# A resumed run may have other values of these: they change when it stops, saves and reports, not what it computes.
_MAY_CHANGE_ON_RESUME = {
    "eval_steps", "log_steps", "save_steps", "keep_checkpoints", "on_divergence", "resume", "output_dir", "train_steps",
    "device", "trust_remote_code", "time_limit", "tensorboard", "wandb", "token_cache", "epochs", "max_steps",
    "save_strategy", "gradient_checkpointing", "offload_teacher_to_cpu", "json",
}  # fmt: skip


def parse(command: Command[C], argv: Sequence[str] | None = None) -> C:
    """The configuration that a command line asks for; argv: `sys.argv[1:]` by default.

    Order of precedence, first wins: an option given; with --resume, the run's own `config.json`; --recipe, --task,
    --mode; the command's defaults; the fields' defaults.
    Raises: UsageError, naming the option, its value and the remedy
    """
    return _configure(command, vars(_build_parser(command).parse_args(argv)))


def configure(command: Command[C], options: Mapping[str, object]) -> C:
    """`parse` for options given as Python values; `mode` is one of them."""
    given: dict[str, Any] = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
    known = {item.name: (item, kind) for item, kind in options_of(command.sections.values())}
    for name, value in given.items():
        if name == "mode":
            modes = command.presets.get("mode", {})
            require(value in modes, name, value, f"must be {' or '.join(modes)}")
        elif name not in known:
            raise UsageError(_unknown_option(name, [*known, "mode"]))
        elif not is_allowed(*known[name], value):
            item, kind = known[name]
            words = item.metadata["choices"] or (KIND_NAMES.get(kind, "a list of texts"),)
            raise UsageError(f"--{name} {value!r}: must be {' or '.join(words)}")
    return _configure(command, given)


def _configure(command: Command[C], given: dict[str, Any]) -> C:
    if given.get("resume"):
        return _resume(command, given)
    values: dict[str, Any] = {item.name: item.default for item, _ in options_of(command.sections.values())}
    values |= command.defaults
    for name, presets in command.presets.items():
        values |= presets.get(given.get(name, values[name]), {})
    values |= given
    notices = recipe_lines(values.get("recipe", ""))
    for rate in command.embedded_lr_factors:
        notices += _scale_rate_(values, rate, given, command)
    if command.run_name and "output_dir" not in given:
        values["output_dir"] = f"runs/{command.run_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return command.build(values, values.get("mode", command.name), notices)


def _scale_rate_(values: dict[str, Any], rate: str, given: Mapping[str, Any], command: Command) -> tuple[str, ...]:
    """Multiply a learning rate that is not given for the embedded model; the line that says so, where it is used."""
    model = "teacher" if rate == "router_lr" else "student"
    if values[f"{model}_model"] != EMBEDDED or rate in given:
        return ()
    former, factor = values[rate], command.embedded_lr_factors[rate]
    values[rate] = former * factor
    if rate == "router_lr" and (values["routing"] not in ("auto", "sar") or values["alpha_kd"] == 0):
        return ()
    why = f"because the embedded {model} is tiny; a rate given by hand is used as it is"
    return (f"--{rate}: {former:g} x {factor:g} = {values[rate]:g}, {why}",)


def _resume(command: Command[C], given: dict[str, Any]) -> C:
    """The configuration of the run in `--output_dir`, with the options that may change."""
    if not given.get("output_dir"):
        raise UsageError("--resume: give the run folder with --output_dir")
    path = Path(given["output_dir"]) / "config.json"
    if not path.is_file():
        raise UsageError(f"--output_dir {given['output_dir']}: holds no run to resume ({path.name} is missing)")
    if "overwrite" in given:
        raise UsageError("--resume --overwrite: one continues the run, the other deletes it; give one")
    try:
        values, saved_mode = _read_config(command, path)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"--resume: {path} was not written by this version ({error}); start a new run") from None
    mode = given.pop("mode", None)
    _drop_found_auto_(given, values, command)
    for name, value in given.items():
        same = name in _MAY_CHANGE_ON_RESUME or values[name] == (list(value) if isinstance(value, tuple) else value)
        shown = " ".join(value) if isinstance(value, tuple | list) else value
        former = " ".join(values[name]) if isinstance(values[name], list) else values[name]
        require(same, name, shown, f"the run to resume has '{former}'; leave it out or start a new run")
    require(mode in (None, saved_mode), "mode", mode, f"the run to resume has {saved_mode}; leave it out")
    trusted = not values["trust_remote_code"] or "trust_remote_code" in given
    require(trusted, "resume", given["output_dir"], "its models run code of their own: give --trust_remote_code again")
    notices: tuple[str, ...] = ()
    if given.get("train_steps", values["train_steps"]) != values["train_steps"]:
        notices = (f"--train_steps {given['train_steps']}: changes the learning rate schedule from here on",)
    return command.build({**values, **given, "overwrite": False}, saved_mode, notices)


def _read_config(command: Command, path: Path) -> tuple[dict[str, Any], str]:
    """The options in a run's `config.json`, and its mode.

    Raises: OSError, ValueError, KeyError, AttributeError, TypeError or RecursionError if this version did not write it
    """
    saved = json.loads(path.read_text())
    if (found := saved.pop("format", None)) != RUN_FORMAT:
        raise ValueError(f"its run format is {found or 'older'}, not {RUN_FORMAT}")
    if (mode := saved.pop("mode")) not in command.presets.get("mode", (command.name,)):
        raise ValueError(f"no mode is called {mode}")
    not_saved = {"json": False}
    options = not_saved | {name: value for section in saved.values() for name, value in section.items()}
    for item, kind in options_of(command.sections.values()):
        if not is_allowed(item, kind, options[item.name]):
            raise ValueError(f"{item.name} is {options[item.name]!r}")
    return options, mode


def _drop_found_auto_(given: dict[str, Any], values: dict[str, Any], command: Command) -> None:
    """Leave out an `auto`, whose number was found when the run began, and the steps that this number was found for."""
    if given.get("per_device_batch_size") != AUTO:
        return
    del given["per_device_batch_size"]
    blocks = default_batch_size(command.sections["train"], values["task"]) * given.get("grad_accum_steps", 1)
    if blocks == values["per_device_batch_size"] * values["grad_accum_steps"]:
        given.pop("grad_accum_steps", None)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line each and name the nearest option there is."""

    def error(self, message: str) -> typing.NoReturn:
        missing = "the following arguments are required: "
        if message.startswith(missing):
            raise UsageError(f"{message.removeprefix(missing)}: not given; {self.format_usage().strip()}")
        raise UsageError(message.removeprefix("argument "))

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else list(argv)
        found, unknown = self.parse_known_args(argv, namespace)
        if unknown and not unknown[0].startswith("-"):
            raise UsageError(self._stray(unknown[0], argv))
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            raise UsageError(_unknown_option(unknown[0], names))
        return found

    def _stray(self, word: str, argv: Sequence[str]) -> str:
        """The error about a word that belongs to no option; it often follows one that takes no value."""
        before = argv[argv.index(word) - 1] if argv.index(word) else ""
        for action in self._actions:
            if action.nargs == 0 and before in action.option_strings:
                return f"{before}: takes no value, not {word!r}; its help: {action.help}"
        return f"{word!r}: belongs to no option"


def _unknown_option(name: str, names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name.split("=")[0], names, n=1)
    return f"{name}: no such option; {f'did you mean {nearest[0]}?' if nearest else '--help lists the options'}"


def _build_parser(command: Command) -> _Parser:
    """A parser with one option for each field, in a group for each section."""
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    modes = command.presets.get("mode", {})
    positionals = [item for item, _ in options_of(command.sections.values()) if item.metadata["positional"]]
    usage = ["%(prog)s", *map(_usage_of, positionals), *(["[--mode MODE]"] if modes else []), "[options]"]
    parser = _Parser(
        prog=f"{program_name()} {command.name}" if command.name else None,
        usage=" ".join(usage),
        description=command.description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if modes:
        text = f"a set of values; any option given beside it wins ({command.defaults['mode']})"
        parser.add_argument("--mode", choices=tuple(modes), help=text)
    defaults = {**command.defaults, **modes.get(command.defaults.get("mode", ""), {})}
    for section in command.sections.values():
        title, _, description = (section.__doc__ or "").rstrip(".").partition(": ")
        group = parser.add_argument_group(title, description)
        for item, kind in options_of([section]):
            _add_option(group, item, kind, defaults.get(item.name, item.default))
    return parser


def _usage_of(item: dataclasses.Field) -> str:
    metavar = item.metadata["metavar"]
    return f"{metavar} [{metavar} ...]" if item.default == () else metavar


def _add_option(group, item: dataclasses.Field, kind: type, default) -> None:
    default = " ".join(default) if isinstance(default, tuple) else default
    shown = "" if default in ("", (), False) else f" ({default:g})" if isinstance(default, float) else f" ({default})"
    syntax = item.metadata
    how: dict[str, Any] = {"help": syntax["help"] + shown}
    if kind is bool:
        how |= {"action": "store_true"}
    elif syntax["choices"]:
        how |= {"choices": syntax["choices"]}
    elif kind not in KIND_NAMES:
        how |= {"nargs": "+", "metavar": syntax["metavar"]}
    elif syntax["positional"]:
        how |= {"metavar": syntax["metavar"]}
    else:
        how |= {"type": _converter(kind, syntax["auto"]), "metavar": kind.__name__.upper() + "|auto" * syntax["auto"]}
    group.add_argument(item.name if syntax["positional"] else f"--{item.name}", **how)


def _converter(kind: type, auto: bool) -> Callable[[str], object]:
    """From the text of an option to its value, as argparse wants it."""

    def convert(text: str):
        if auto and text == AUTO:
            return AUTO
        try:
            return kind(text)
        except ValueError:
            words = KIND_NAMES[kind] + f" or {AUTO}" * auto
            raise argparse.ArgumentTypeError(f"'{text}' is not {words}") from None

    return convert

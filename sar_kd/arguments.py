"""The command line, derived from the settings: one flag per field, no second list."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import shutil
import time
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sar_kd.config import (
    EMBEDDED,
    EMBEDDED_LR_FACTOR,
    EMBEDDED_ROUTER_LR_FACTOR,
    MODES,
    SECTIONS,
    TASKS,
    Config,
    RunConfig,
    UsageError,
    require,
)
from sar_kd.routing_config import RoutingConfig

# What may differ between the two halves of a resumed run without making it another run.
_MAY_CHANGE_ON_RESUME = {
    "eval_steps", "log_steps", "save_steps", "keep_checkpoints", "on_divergence", "resume", "output_dir", "train_steps",
    "device", "trust_remote_code", "epochs", "max_steps", "save_strategy",
}  # fmt: skip


def parse_args(script: Mapping[str, str], argv: list[str] | None = None) -> Config:
    """The configuration that a command line asks for.

    Order of precedence, first wins: a flag given; with --resume, the run's own `config.json`; the mode;
    the script's defaults; the fields' defaults.
    Raises: UsageError, naming the flag, its value and the remedy.
    """
    given = vars(_build_parser(script).parse_args(argv))
    mode = given.pop("mode", None)
    if given.get("resume"):
        return _resumed(given, mode, Config, MODES)
    mode = mode or script["mode"]
    values = {"model_dtype": script["model_dtype"], **MODES[mode], **TASKS.get(given.get("task"), {}), **given}
    notices = ()
    if values.get("student_model", EMBEDDED) == EMBEDDED and "student_lr" not in given:
        notices += (_raise_rate(values, "student_lr", EMBEDDED_LR_FACTOR, "Learning rate", "student"),)
    if values.get("teacher_model", EMBEDDED) == EMBEDDED and "router_lr" not in given:
        notice = _raise_rate(values, "router_lr", EMBEDDED_ROUTER_LR_FACTOR, "Routers' rate", "teacher")
        may_learn = values.get("routing", RoutingConfig.routing) in ("auto", "sar") and values["alpha_kd"] > 0
        notices += (notice,) if may_learn else ()
    values.setdefault("output_dir", f"runs/{script['name']}-{time.strftime('%Y%m%d-%H%M%S')}")
    return Config.from_flags(values, mode, notices)


@dataclass(frozen=True)
class Verb:
    """A verb that trains: its flags, and what they are where none is given."""

    name: str
    description: str
    kind: type[RunConfig]
    defaults: Mapping[str, object]
    """What differs from the fields' own"""
    tasks: Mapping[str, Mapping[str, object]]
    """What each `--task` brings with it"""
    embedded_lr_factor: float
    """On the learning rate of the embedded student"""


def parse_run(verb: Verb, argv: list[str]) -> RunConfig:
    """The configuration that a verb's command line asks for; precedence as in `parse_args`, `--task` for the mode.

    Raises: UsageError, naming the flag, its value and the remedy.
    """
    parser = _verb_parser(verb.name, verb.description)
    _add_sections(parser, verb.kind.sections(), verb.defaults)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        return _resumed(given, None, verb.kind, (verb.name,))
    values = {**verb.defaults, **verb.tasks.get(given.get("task"), {}), **given}
    notices = ()
    if values.get("student_model", EMBEDDED) == EMBEDDED and "learning_rate" not in given:
        values.setdefault("learning_rate", verb.kind().optim.learning_rate)
        notices = (_raise_rate(values, "learning_rate", verb.embedded_lr_factor, "Learning rate", "student"),)
    values.setdefault("output_dir", f"runs/{verb.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return verb.kind.from_flags(values, verb.name, notices)


def _raise_rate(values: dict[str, object], flag: str, factor: float, title: str, model: str) -> str:
    """Give an embedded model the rate that it wants; the line that says so."""
    rate = values.get(flag, RoutingConfig.router_lr)
    values[flag] = rate * factor
    return (
        f"{title}: {rate:g} x {factor:g} = {values[flag]:g}, because the embedded {model} is tiny; "
        f"--{flag} is used as given."
    )


def parse_verb(verb: str, description: str, sections: tuple[str, ...], argv: list[str]) -> tuple[Config, bool]:
    """The configuration that a verb's command line asks for, from the flags of some sections, and whether as JSON.

    Raises: UsageError, naming the flag, its value and the remedy.
    """
    given, as_json = _parse_flags(verb, description, {name: SECTIONS[name] for name in sections}, argv)
    return Config.from_flags(given, mode=""), as_json


def parse_section(verb: str, description: str, section: type, argv: list[str]) -> tuple[object, bool]:
    """The one section that a verb's command line asks for, and whether as JSON.

    Raises: UsageError, naming the flag, its value and the remedy.
    """
    given, as_json = _parse_flags(verb, description, {verb: section}, argv)
    return section(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}), as_json


def _parse_flags(verb: str, description: str, sections: Mapping[str, type], argv: list[str]) -> tuple[dict, bool]:
    parser = _verb_parser(verb, description)
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_sections(parser, sections, {})
    given = vars(parser.parse_args(argv))
    return given, given.pop("json", False)


def _resumed(given: dict[str, object], mode: str | None, kind: type[RunConfig], modes: Iterable[str]) -> RunConfig:
    """The configuration of the run in `--output_dir`; modes: the words that it may have been started with."""
    if not given.get("output_dir"):
        raise UsageError("--resume: give the run folder with --output_dir")
    path = Path(given["output_dir"]) / "config.json"
    if not path.is_file():
        raise UsageError(f"--output_dir {given['output_dir']}: holds no run to resume ({path.name} is missing)")
    if "overwrite" in given:
        raise UsageError("--resume --overwrite: one continues the run, the other deletes it; give one")
    try:
        saved = json.loads(path.read_text())
        saved_mode = saved.pop("mode")
        values = {name: value for section in saved.values() for name, value in section.items()}
        values = {name: values[name] for section in kind.sections().values() for name in _names_of(section)}
        _check_kinds(kind, values)
        if saved_mode not in modes:
            raise ValueError(f"no mode is called {saved_mode}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"--resume: {path} is not what this version wrote ({error}); start a new run") from None
    for name, value in given.items():
        same = name in _MAY_CHANGE_ON_RESUME or values[name] == (list(value) if isinstance(value, tuple) else value)
        shown = " ".join(value) if isinstance(value, tuple | list) else value
        former = " ".join(values[name]) if isinstance(values[name], list) else values[name]
        require(same, name, shown, f"the run to resume has '{former}'; leave the flag out or start a new run")
    require(mode in (None, saved_mode), "mode", mode, f"the run to resume has {saved_mode}; leave the flag out")
    trusted = not values["trust_remote_code"] or "trust_remote_code" in given
    require(trusted, "resume", given["output_dir"], "its models run code of their own: give --trust_remote_code again")
    notices = ()
    if given.get("train_steps", values["train_steps"]) != values["train_steps"]:
        notices = (f"--train_steps {given['train_steps']}: the learning rate's course changes from here on.",)
    try:
        return kind.from_flags({**values, **given, "overwrite": False}, saved_mode, notices)
    except (TypeError, AttributeError) as error:  # a value of another type, edited by hand
        raise UsageError(f"--resume: {path} is not what this version wrote ({error}); start a new run") from None


def _names_of(section: type) -> list[str]:
    return [item.name for item in dataclasses.fields(section)]


def _check_kinds(kind: type[RunConfig], values: dict[str, object]) -> None:
    """Raise TypeError or ValueError unless each value is of its flag's kind and, where there are some, choices."""
    for section in kind.sections().values():
        hints = typing.get_type_hints(section)
        for item in dataclasses.fields(section):
            own, value = hints[item.name], values[item.name]
            if own in (bool, int, float, str):
                fits = type(value) is own or (own is float and type(value) is int)
            else:
                fits = isinstance(value, list) and all(isinstance(part, str) for part in value)
            if not fits:
                raise TypeError(f"{item.name} is {value!r}")
            if item.metadata["choices"] and value not in item.metadata["choices"]:
                raise ValueError(f"{item.name} is {value!r}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message.removeprefix("argument "))

    def parse_args(self, argv=None, namespace=None):
        known, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            nearest = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help for the flags there are"
            raise UsageError(f"{unknown[0]}: no such flag; {hint}")
        return known


def _build_parser(script: Mapping[str, str]) -> argparse.ArgumentParser:
    description = "Distil a large causal language model into a small one, in fp16, without NaN."
    parser = _Parser(usage="%(prog)s [--mode MODE] [flags]", description=description, **_style())
    parser.add_argument(
        "--mode", choices=tuple(MODES), help=f"a word for a set of values; flags given beside it win ({script['mode']})"
    )
    _add_sections(parser, SECTIONS, {**script, **MODES[script["mode"]]})
    return parser


def _verb_parser(verb: str, description: str) -> _Parser:
    return _Parser(prog=f"python -m sar_kd {verb}", usage="%(prog)s [flags]", description=description, **_style())


def _style() -> dict:
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    return {
        "formatter_class": lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width),
        "allow_abbrev": False,
        "argument_default": argparse.SUPPRESS,
    }


def _add_sections(parser: argparse.ArgumentParser, sections: Mapping[str, type], defaults: Mapping) -> None:
    """A flag for each field; its default as in `defaults`, else the field's own."""
    for section in sections.values():
        title, _, description = section.__doc__.rstrip(".").partition(": ")
        group = parser.add_argument_group(title, description)
        hints = typing.get_type_hints(section)
        for item in dataclasses.fields(section):
            _add_flag(group, item, hints[item.name], defaults.get(item.name, item.default))


def _add_flag(group, item: dataclasses.Field, kind: type, default) -> None:
    shown = "" if default in ("", (), False) else f" ({default:g})" if isinstance(default, float) else f" ({default})"
    options: dict = {"help": item.metadata["help"] + shown}
    if kind is bool:
        options |= {"action": "store_true"}
    elif item.metadata["choices"]:
        options |= {"choices": item.metadata["choices"]}
    else:
        is_list = kind not in (int, float, str)
        options |= {
            "type": _parser_of(str if is_list else kind),
            "metavar": item.metadata["metavar"] if is_list else kind.__name__.upper(),
        }
        options |= {"nargs": "+"} if is_list else {}
    group.add_argument(f"--{item.name}", **options)


def _parser_of(kind: type):
    words = {int: "a whole number", float: "a number", str: "text"}

    def parse(text: str):
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {words[kind]}") from None

    return parse

"""The command line: what a run's flags, a verb's, or values given in Python ask for."""

from __future__ import annotations

import json
import time
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sar_kd.config.fields import (
    AUTO,
    WORDS,
    Auto,
    Parser,
    RunConfig,
    add_sections,
    check_kind,
    fields_of,
    names_of,
    place_of,
    program_name,
    require,
    style,
    unknown_flag,
)
from sar_kd.config.presets import MODES, RECIPES, STABLE, TASKS, recipe_lines
from sar_kd.config.runs import SECTIONS, Config, RoutingConfig
from sar_kd.config.sections import EMBEDDED, EMBEDDED_LR_FACTOR, EMBEDDED_ROUTER_LR_FACTOR
from sar_kd.errors import UsageError

S = typing.TypeVar("S")

# What may differ between the two halves of a resumed run without making it another run.
_MAY_CHANGE_ON_RESUME = {
    "eval_steps", "log_steps", "save_steps", "keep_checkpoints", "on_divergence", "resume", "output_dir", "train_steps",
    "device", "trust_remote_code", "time_limit", "tensorboard", "wandb", "token_cache", "epochs", "max_steps",
    "save_strategy", "gradient_checkpointing", "offload_teacher_to_cpu",
}  # fmt: skip


def parse_args(script: Mapping[str, str], argv: list[str] | None = None, verb: str = "") -> Config:
    """The configuration that a command line asks for, of a script or of the verb that does the same.

    Order of precedence, first wins: a flag given; with --resume, the run's own `config.json`; the mode;
    the script's defaults; the fields' defaults.
    Raises: UsageError, naming the flag, its value and the remedy.
    """
    program = f"{program_name()} {verb}" if verb else None
    return _configure(script, vars(_build_parser(script, program).parse_args(argv)))


def parse_run(verb: str, description: str, argv: list[str]) -> tuple[Config, bool]:
    """The configuration that a verb with a run's own command line asks for, and whether as JSON.

    Raises: UsageError as `parse_args`
    """
    parser = _build_parser(STABLE, f"{program_name()} {verb}", description)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = vars(parser.parse_args(argv))
    as_json = given.pop("json", False)
    return _configure(STABLE, given), as_json


def configure(script: Mapping[str, str], flags: Mapping[str, object]) -> Config:
    """The configuration that flags given as Python values ask for; `mode` is one of them.

    Raises: UsageError as `parse_args`
    """
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    kinds = {item.name: (item, kind) for item, kind in fields_of(SECTIONS.values())}
    for name in {name for name, value in given.items() if value == str(AUTO) and name in kinds}:
        given[name] = AUTO if kinds[name][0].metadata["auto"] else given[name]
    for name, value in given.items():
        if name != "mode" and name not in kinds:
            raise UsageError(unknown_flag(name, [*kinds, "mode"]))
        try:
            if name != "mode":
                check_kind(*kinds[name], value)
        except (TypeError, ValueError):
            item, kind = kinds[name]
            words = item.metadata["choices"] or (WORDS.get(kind, "a list of texts"),)
            raise UsageError(f"--{name} {value!r}: must be {' or '.join(words)}") from None
    mode = given.get("mode")
    require(mode is None or mode in MODES, "mode", mode, f"must be {' or '.join(MODES)}")
    return _configure(script, given)


def _configure(script: Mapping[str, str], given: dict[str, Any]) -> Config:
    mode = given.pop("mode", None)
    if given.get("resume"):
        return _resumed(given, mode, Config, MODES)
    mode = mode or script["mode"]
    values: dict[str, Any] = {
        "model_dtype": script["model_dtype"],
        **MODES[mode],
        **TASKS.get(given.get("task", ""), {}),
        **RECIPES.get(given.get("recipe", ""), {}),
        **given,
    }
    notices = recipe_lines(given.get("recipe", ""))
    if values.get("student_model", EMBEDDED) == EMBEDDED and "student_lr" not in given:
        notices += (_raise_rate(values, "student_lr", EMBEDDED_LR_FACTOR, "Learning rate", "student"),)
    if values.get("teacher_model", EMBEDDED) == EMBEDDED and "router_lr" not in given:
        notice = _raise_rate(values, "router_lr", EMBEDDED_ROUTER_LR_FACTOR, "Routers' rate", "teacher")
        may_learn = values.get("routing", RoutingConfig.routing) in ("auto", "sar") and values["alpha_kd"] > 0
        notices += (notice,) if may_learn else ()
    values.setdefault("output_dir", f"runs/{script['name']}-{time.strftime('%Y%m%d-%H%M%S')}")
    return Config.from_flags(values, mode, notices)


@dataclass(frozen=True)
class TrainingCommand:
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


def parse_training(verb: TrainingCommand, argv: list[str]) -> Any:
    """The configuration that the command line of a verb that trains asks for.

    Precedence as in `parse_args`, with `--task` in the place of the mode.

    Raises: UsageError, naming the flag, its value and the remedy.
    """
    parser = _verb_parser(verb.name, verb.description)
    add_sections(parser, verb.kind.sections(), verb.defaults)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        return _resumed(given, None, verb.kind, (verb.name,))
    values = {**verb.defaults, **verb.tasks.get(given.get("task", ""), {}), **given}
    notices: tuple[str, ...] = ()
    if values.get("student_model", EMBEDDED) == EMBEDDED and "learning_rate" not in given:
        values.setdefault("learning_rate", verb.kind().optim.learning_rate)
        notices = (_raise_rate(values, "learning_rate", verb.embedded_lr_factor, "Learning rate", "student"),)
    values.setdefault("output_dir", f"runs/{verb.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return verb.kind.from_flags(values, verb.name, notices)


def _raise_rate(values: dict[str, Any], flag: str, factor: float, title: str, model: str) -> str:
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


def parse_kind(verb: str, description: str, kind: type[RunConfig], argv: list[str]) -> tuple[Any, bool]:
    """The configuration of a kind of its own that a verb's command line asks for, and whether as JSON.

    Raises: UsageError, naming the flag, its value and the remedy.
    """
    given, as_json = _parse_flags(verb, description, kind.sections(), argv)
    return kind.from_flags(given, mode=""), as_json


def parse_section(
    verb: str, description: str, section: type[S], argv: list[str], places: Sequence[str] = ()
) -> tuple[S, bool]:
    """The one section that a verb's command line asks for, and whether as JSON.

    places: fields of it that are given by their place instead of a flag, in order; the last may be a list of words

    Raises: UsageError, naming the flag, its value and the remedy.
    """
    given, as_json = _parse_flags(verb, description, {verb: section}, argv, places)
    return section(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}), as_json


def _parse_flags(
    verb: str, description: str, sections: Mapping[str, type], argv: list[str], places: Sequence[str] = ()
) -> tuple[dict, bool]:
    parser = _verb_parser(verb, description, *(place_of(sections, name) for name in places))
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_sections(parser, sections, {}, places)
    given = vars(parser.parse_args(argv))
    return given, given.pop("json", False)


def _resumed(given: dict[str, Any], mode: str | None, kind: type[RunConfig], modes: Iterable[str]) -> Any:
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
        values = {name: values[name] for section in kind.sections().values() for name in names_of(section)}
        _check_kinds(kind, values)
        if saved_mode not in modes:
            raise ValueError(f"no mode is called {saved_mode}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"--resume: {path} is not what this version wrote ({error}); start a new run") from None
    _keep_found_(given, values, kind)
    for name, value in given.items():
        same = name in _MAY_CHANGE_ON_RESUME or values[name] == (list(value) if isinstance(value, tuple) else value)
        shown = " ".join(value) if isinstance(value, tuple | list) else value
        former = " ".join(values[name]) if isinstance(values[name], list) else values[name]
        require(same, name, shown, f"the run to resume has '{former}'; leave the flag out or start a new run")
    require(mode in (None, saved_mode), "mode", mode, f"the run to resume has {saved_mode}; leave the flag out")
    trusted = not values["trust_remote_code"] or "trust_remote_code" in given
    require(trusted, "resume", given["output_dir"], "its models run code of their own: give --trust_remote_code again")
    notices: tuple[str, ...] = ()
    if given.get("train_steps", values["train_steps"]) != values["train_steps"]:
        notices = (f"--train_steps {given['train_steps']}: the learning rate's course changes from here on.",)
    try:
        return kind.from_flags({**values, **given, "overwrite": False}, saved_mode, notices)
    except (TypeError, AttributeError) as error:  # a value of another type, edited by hand
        raise UsageError(f"--resume: {path} is not what this version wrote ({error}); start a new run") from None


def _keep_found_(given: dict[str, Any], values: dict[str, Any], kind: type[RunConfig]) -> None:
    """Leave out an `auto` that was found when the run began, and what it was found for, if that is the same."""
    if not isinstance(given.get("per_device_batch_size"), Auto):
        return
    del given["per_device_batch_size"]
    asked = default_batch_size(kind.sections()["train"], values["task"]) * given.get("grad_accum_steps", 1)
    if asked == values["per_device_batch_size"] * values["grad_accum_steps"]:
        given.pop("grad_accum_steps", None)


def default_batch_size(train: Any, task: str) -> int:
    """Blocks in a micro-batch where nobody says how many."""
    return TASKS.get(task, {}).get("per_device_batch_size", train.per_device_batch_size)  # a field's default


def _check_kinds(run: type[RunConfig], values: dict[str, Any]) -> None:
    """Raise TypeError or ValueError unless each value is of its flag's kind and, where there are some, choices."""
    for item, kind in fields_of(run.sections().values()):
        check_kind(item, kind, values[item.name])


def _build_parser(
    script: Mapping[str, str],
    program: str | None = None,
    description: str = "Distil a large causal language model into a small one, in fp16, without NaN.",
) -> Parser:
    parser = Parser(prog=program, usage="%(prog)s [--mode MODE] [flags]", description=description, **style())
    parser.add_argument(
        "--mode", choices=tuple(MODES), help=f"a word for a set of values; flags given beside it win ({script['mode']})"
    )
    add_sections(parser, SECTIONS, {**script, **MODES[script["mode"]]})
    return parser


def _verb_parser(verb: str, description: str, *places: str) -> Parser:
    usage = " ".join(["%(prog)s", *places, "[flags]"])
    return Parser(prog=f"{program_name()} {verb}", usage=usage, description=description, **style())

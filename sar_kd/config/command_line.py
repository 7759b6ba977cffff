"""From a command line, or from values given in Python, to a checked configuration."""

from __future__ import annotations

import itertools
import math
import os
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_kd.config.config_file import OptionFile, read_option_file, read_run_options
from sar_kd.config.fields import AUTO, GIVEN, C, Command, Origin, R, known_options, options_of, require, value_error
from sar_kd.config.installation import program_name
from sar_kd.config.option_parser import CONFIG, build_parser, unknown_option
from sar_kd.config.presets import ADAFACTOR_LR_FACTOR, default_batch_size, generation_lines, recipe_lines
from sar_kd.config.sections import EMBEDDED, SELF
from sar_kd.config.unused_options import unused_option_lines
from sar_kd.errors import UsageError

# A resumed run may have other values of these: they change when it stops, saves and reports, not what it computes.
MAY_CHANGE_ON_RESUME = {
    "eval_steps", "log_steps", "save_steps", "keep_checkpoints", "on_divergence", "resume", "output_dir", "train_steps",
    "device", "trust_remote_code", "time_limit", "tensorboard", "wandb", "token_cache", "epochs", "max_steps",
    "save_strategy", "allow_changed_inputs", "gradient_checkpointing", "offload_teacher_to_cpu", "json", "verbose",
    "quiet", "overwrite", "fit", "teacher_device", "teacher_device_map", "teacher_max_memory",
    "control", "skip_baseline", "save_dtype", "push_to_hub", "public",
}  # fmt: skip


def parse(command: Command[C], argv: Sequence[str] | None = None) -> C:
    """The configuration that a command line asks for; argv: `sys.argv[1:]` by default.

    Order of precedence, first wins: an option given; the --mode, --task or --recipe given; with --resume, the run's own
    `config.json`; the file of --config; the command's defaults; the fields' defaults.
    Raises: UsageError, naming the option, its value and the remedy
    """
    return _configure(command, vars(build_parser(command).parse_args(argv)))


def configure(command: Command[C], options: Mapping[str, object]) -> C:
    """`parse` for options given as Python values; `mode` is one of them."""
    given: dict[str, Any] = {}
    known = known_options(command.sections.values())
    for name, value in options.items():
        value = list(value) if isinstance(value, tuple) else value
        if name == "mode":
            modes = command.presets.get("mode", {})
            require(isinstance(value, str) and value in modes, name, value, f"must be {' or '.join(modes)}")
        elif name not in known:
            raise UsageError(unknown_option(name, [*known, "mode"], prefix=""))
        elif error := value_error(*known[name], value):
            raise UsageError(f"--{name} {value!r}: {error}")
        given[known[name][0].name if name in known else name] = value
    return _configure(command, given)


def _configure(command: Command[C], given: dict[str, Any]) -> C:
    origin, path = dict(given), given.pop(CONFIG, "")
    if given.get("resume"):
        require(not path, CONFIG, path, "--resume takes the options of the run itself; leave it out")
        return _resume(command, given)
    if "allow_changed_inputs" in given:
        raise UsageError("--allow_changed_inputs: is for --resume; leave it out")
    file = read_option_file(command, path) if path else OptionFile()
    values: dict[str, Any] = {item.name: item.default for item, _ in options_of(command.sections.values())}
    for source in (command.defaults, file.options, given):
        for name, presets in command.presets.items():
            if value := source.get(name):
                values |= presets.get(GIVEN if GIVEN in presets else value, {})
        values |= source
    notices = (*_embedded_lines(values), *file.notices, *recipe_lines(values), *generation_lines(values))
    for rate in command.embedded_lr_factors:
        notices += _scale_rate_(values, rate, file.options.keys() | given.keys(), command)
    chosen = frozenset(given if file.of_run else file.options.keys() | given)
    notices += unused_option_lines(command.name, values, chosen)
    if command.run_name and not values["output_dir"]:
        values["output_dir"] = new_run_folder(command.run_name)
    return command.build(values, values.get("mode", command.name), notices, Origin(command, origin, chosen))


def reconfigure(config: R, options: Mapping[str, Any]) -> R:
    """The configuration as if these options had been given too, in the same run folder."""
    if config.origin is None:
        return config.changed(options)
    given = {**config.origin.given, "output_dir": config.train.output_dir, **options}
    return _configure(config.origin.command, given)


def as_typed(options: Mapping[str, Any]) -> list[str]:
    """Options as the words of a command line."""
    words = list[str]()
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [f"{value:g}" if isinstance(value, float) else value]
        if value not in (False, ""):
            words += [f"--{name}", *(shlex.quote(str(each)) for each in values if each is not True)]
    return words


def typed_command(command: Command, options: Mapping[str, Any]) -> str:
    """A command line to be pasted, with those of the options that the command has."""
    known = {CONFIG, *command.presets, *known_options(command.sections.values())} - {"fit"}
    return " ".join([program_name(), command.name, *as_typed({k: v for k, v in options.items() if k in known})])


def _embedded_lines(values: dict[str, Any]) -> tuple[str, ...]:
    """A warning where a model of one's own is to be trained with the embedded text, or with an embedded model."""
    named = {role: values.get(f"{role}_model") for role in ("teacher", "student")}
    named["teacher"] = values.get("teacher_tokenizer") or named["teacher"]
    models = {role: model for role, model in named.items() if model}
    models = {role: models["student"] if model == SELF else model for role, model in models.items()}
    embedded = [role for role, model in models.items() if model == EMBEDDED]
    if len(embedded) == len(models) or values.get("task", "") or "train_file" not in values:
        return ()
    if not (values["train_file"] or values["dataset_name"]):
        return (
            "Warning: no text is given, so these models meet the embedded text, documentation of CPython; give "
            "--train_file or --dataset_name",
        )
    if not embedded or values.get("alpha_kd") == 0:
        return ()
    return (
        f"Warning: the {embedded[0]} is the embedded one, which was trained on documentation of CPython alone; give "
        f"--{embedded[0]}_model",
    )


def new_run_folder(run_name: str) -> str:
    """A folder that no other run has, even one that began in the same second."""
    name = f"runs/{run_name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(folder for folder in itertools.chain([name], numbered) if not Path(folder).exists())


def _scale_rate_(values: dict[str, Any], rate: str, given: Collection[str], command: Command) -> tuple[str, ...]:
    """Multiply a learning rate that is not given for the embedded model, or for Adafactor; the line that says so, where
    it is used.
    """
    model, factors = "teacher" if rate == "router_lr" else "student", dict[str, float]()
    if values[f"{model}_model"] == EMBEDDED:
        factors[f"for the tiny embedded {model}"] = command.embedded_lr_factors[rate]
    if rate == "student_lr" and values["optimizer"] == "adafactor":
        factors["for Adafactor, which takes it relative to the size of the weights"] = ADAFACTOR_LR_FACTOR
    if not factors or rate in given:
        return ()
    product = " x ".join(f"{value:g}" for value in (values[rate], *factors.values()))
    values[rate] *= math.prod(factors.values())
    if rate == "router_lr" and (values["routing"] not in ("auto", "sar") or values["alpha_kd"] == 0):
        return ()
    return (f"--{rate}: {product} = {values[rate]:g} {' and '.join(factors)}, unless given",)


def _resume(command: Command[C], given: dict[str, Any]) -> C:
    """The configuration of the run in `--output_dir`, with the options that may change."""
    if "overwrite" in given:
        raise UsageError("--resume --overwrite: one continues the run, the other deletes it; give one")
    if not given.get("output_dir"):
        raise UsageError("--resume: give the run folder with --output_dir")
    path = Path(given["output_dir"]) / "config.json"
    if not path.is_file():
        raise UsageError(f"--output_dir {given['output_dir']}: holds no run to resume ({path.name} is missing)")
    values, saved_mode = read_run_options(command, path, MAY_CHANGE_ON_RESUME)
    mode = given.pop("mode", None)
    given.pop("fit", None)  # what it set is among the run's own options
    _drop_found_auto_(given, values, command)
    for name, value in given.items():
        same = name in MAY_CHANGE_ON_RESUME or values[name] == (list(value) if isinstance(value, tuple) else value)
        shown = " ".join(value) if isinstance(value, tuple | list) else value
        former = " ".join(values[name]) if isinstance(values[name], list) else values[name]
        has = "none" if former == "" else f"'{former}'"
        require(same, name, shown, f"the run to resume has {has}; leave it out or start a new run")
    require(mode in (None, saved_mode), "mode", mode, f"the run to resume has {saved_mode}; leave it out")
    trusted = not values["trust_remote_code"] or "trust_remote_code" in given
    require(trusted, "resume", given["output_dir"], "its models run code of their own: give --trust_remote_code again")
    notices: tuple[str, ...] = ()
    if saved_mode != command.defaults.get("mode", saved_mode):
        notices += (f"--resume: mode {saved_mode} and every other setting are the run's own, as {path} has them",)
    if given.get("train_steps", values["train_steps"]) != values["train_steps"]:
        notices += (f"--train_steps {given['train_steps']}: changes the learning rate schedule from here on",)
    values |= {"overwrite": False, "allow_changed_inputs": False}  # once given, not for the next time
    origin = Origin(command, given, frozenset(values.keys() - MAY_CHANGE_ON_RESUME | given.keys()))
    return command.build(values | given, saved_mode, notices, origin)


def _drop_found_auto_(given: dict[str, Any], values: dict[str, Any], command: Command) -> None:
    """Leave out an `auto`, whose number was found when the run began, and the steps that this number was found for."""
    if given.get("per_device_batch_size") != AUTO:
        return
    del given["per_device_batch_size"]
    blocks = default_batch_size(command.sections["train"], values["task"]) * given.get("grad_accum_steps", 1)
    if blocks == values["per_device_batch_size"] * values["grad_accum_steps"]:
        given.pop("grad_accum_steps", None)

"""Options that are read from a file: `--config FILE`, and the `config.json` of a run to resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sar_kd.config.fields import KIND_NAMES, Command, is_allowed, known_options, options_of, value_error
from sar_kd.config.installation import program_name
from sar_kd.config.option_parser import unknown_option
from sar_kd.errors import UsageError
from sar_kd.version import RUN_FORMAT

_OF_ONE_RUN = ("output_dir", "resume", "overwrite", "allow_changed_inputs")
"""Options that a run's `config.json` has, and that another run does not take over"""

_NO_SETTINGS = ("environment",)
"""Sections of a run's `config.json` that record something else than options"""

_KINDS = {"sft": ("sft", "fine-tuning")}
"""Mode in `config.json` -> its command, and what its runs are called; every other mode is of a distillation"""

# Recursion: a file of ten thousand brackets.
_DAMAGED = (OSError, ValueError, RecursionError)


@dataclass(frozen=True)
class OptionFile:
    """The options in a file."""

    options: dict[str, Any] = field(default_factory=dict)
    """By name; `mode` may be one of them"""
    of_run: bool = False
    """Written by a run: it has every option, not only those that somebody chose"""
    notices: tuple[str, ...] = ()


def read_option_file(command: Command, name: str) -> OptionFile:
    """The options in a .json or .yaml file, in sections or not.

    Raises: UsageError for a file that cannot be read, an option that the command does not have, or a wrong value
    """
    where = f"--config {name}"
    content = _parse_file(where, Path(name).expanduser())
    if not isinstance(content, dict):
        raise UsageError(f"{where}: holds no options; expected 'name: value' lines, or a run's config.json")
    of_run = "format" in content
    left_out = _OF_ONE_RUN if of_run else ()
    known, options = known_options(command.sections.values()), dict[str, Any]()
    for typed, value in _pairs(command, where, content):
        option = str(typed).removeprefix("--").replace("-", "_")
        if option in left_out or (option == "mode" and value == command.name):
            continue
        if option == "mode" and (modes := command.presets.get("mode")):
            if not isinstance(value, str) or value not in modes:
                raise UsageError(f"{where}: mode {value}: must be {' or '.join(modes)}")
        elif option not in known:
            raise UsageError(f"{where}: {unknown_option(str(typed), [*known, *command.presets], prefix='')}")
        else:
            item, kind = known[option]
            option, value = item.name, _as_kind(kind, value)
            if error := value_error(item, kind, value):
                raise UsageError(f"{where}: {typed} {value!r}: {error}")
        if option in options:
            raise UsageError(f"{where}: {option}: given twice")
        options[option] = value
    rest = f"; {', '.join(_OF_ONE_RUN[:3])} are not taken over" if of_run else ""
    return OptionFile(options, of_run, (f"{where}: {len(options)} options{rest}",))


def _parse_file(where: str, path: Path) -> Any:
    kind = path.suffix.lower()
    if kind not in (".json", ".yaml", ".yml"):
        raise UsageError(f"{where}: must be a .json or .yaml file")
    if not path.is_file():
        raise UsageError(f"{where}: {'is not a file' if path.exists() else 'no such file'}")
    try:
        text = path.read_text(encoding="utf-8")
        if kind == ".json":
            return json.loads(text)
        import yaml  # only here: it takes longer than all else that answers a command line

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "in ").split())) from None
    except _DAMAGED as error:
        raise UsageError(f"{where}: cannot be read ({error})") from None


def _pairs(command: Command, where: str, content: dict) -> Iterator[tuple[Any, Any]]:
    """Names and values, those in sections too."""
    of_command = {item.name: item.metadata.get("options", True) for item in dataclasses.fields(command.config)}
    for name, value in content.items():
        if name == "format" or ("format" in content and name in _NO_SETTINGS):
            continue
        if not isinstance(value, dict):
            yield name, value
        elif name not in of_command and not set(value) & known_options(command.sections.values()).keys():
            first = f", which has {next(iter(value))}," if value else ""
            raise UsageError(f"{where}: the section {name}{first} belongs to no option of this command")
        elif of_command.get(name, True):  # else a section that no option sets
            yield from value.items()


def _as_kind(kind: type, value: Any) -> Any:
    """What a file means by a value: YAML reads 1e-5 as text, and lists may hold numbers or be a single text."""
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if kind not in KIND_NAMES:
        parts = value if isinstance(value, list) else [value]
        return [str(part) if type(part) in (int, float) else part for part in parts]
    return value


def options_in(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the content of a run's `config.json`, by name."""
    sections = [part for name, part in saved.items() if isinstance(part, dict) and name not in _NO_SETTINGS]
    return {name: value for section in sections for name, value in section.items()}


def read_run_options(command: Command, path: Path, may_change: Collection[str]) -> tuple[dict[str, Any], str]:
    """The options in the `config.json` of a run to resume, and its mode.

    may_change: options that may have their default where an older version has not written them
    Raises: UsageError with the reason, if this version cannot resume the run
    """
    where = f"--resume: {path}"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except _DAMAGED as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{where} is damaged, or cannot be read; put back a copy of it ({reason}), or start a new run"
        ) from None
    if not isinstance(saved, dict) or "mode" not in saved:
        raise UsageError(f"--output_dir {path.parent}: holds no run to resume ({path.name} is not a run's)")
    if type(found := saved.pop("format", 1)) is not int or found != RUN_FORMAT:
        raise UsageError(
            f"{where} has run format {found!r}, and this version reads {RUN_FORMAT}; resume it with the version that "
            "wrote it, or start a new run"
        )
    kind_of_run = saved.pop("mode")
    _check_kind(command, path, kind_of_run)
    options = options_in(saved)
    for item, kind in options_of(command.sections.values()):
        if item.name not in options and item.name in may_change:
            options[item.name] = list(item.default) if isinstance(item.default, tuple) else item.default
        if item.name not in options:
            raise UsageError(f"{where} has no value of --{item.name}; start a new run")
        if not is_allowed(item, kind, options[item.name]):
            raise UsageError(f"{where} is damaged: --{item.name} is {options[item.name]!r}; start a new run")
    return options, kind_of_run


def _check_kind(command: Command, path: Path, name: object) -> None:
    """Raise UsageError if the run is one of another command, or its mode, `name`, is none."""
    modes = command.presets.get("mode", (command.name,))
    if isinstance(name, str) and name in modes:
        return
    other, kind = _KINDS.get(str(name), ("train", "distillation"))
    if isinstance(name, str) and other != command.name and (name in _KINDS or command.name in _KINDS):
        raise UsageError(
            f"--output_dir {path.parent}: {path.parent} holds a {kind} run; resume it with "
            f"`{program_name()} {other} --resume --output_dir {path.parent}`"
        )
    raise UsageError(f"--resume: {path}: no mode is called {name}; start a new run")

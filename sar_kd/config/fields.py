"""What a setting is: a dataclass field that is also a flag, one of a run's sections; what is wrong with its value.

Flags made of dataclass fields: one for each, with its type, choices, default and help; no second list.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import shutil
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sar_kd.errors import UsageError

_TIME = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?")


class Auto(int):
    """A count that is yet to be found: 'auto' on the command line, 0 until then."""

    def __repr__(self) -> str:
        return "auto"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format("auto", spec)


AUTO = Auto()


def flag(default, text: str, choices: tuple[str, ...] = (), metavar: str = "FILE", auto: bool = False):
    """A dataclass field that is also a command-line flag with this help text.

    metavar: of a flag of several words; auto: a count that may also be `AUTO`
    """
    return field(default=default, metadata={"help": text, "choices": choices, "metavar": metavar, "auto": auto})


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raise UsageError naming the flag, its value and the remedy, unless `holds`."""
    if not holds:
        raise UsageError(f"--{name} {value}: {remedy}")


def require_at_least(settings, minimum: float, *names: str) -> None:
    """`require` that each of these fields is a finite number of at least `minimum`, or yet to be found."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, Auto):
            continue
        in_range = minimum <= value < (2**63 if isinstance(value, int) else math.inf)  # a tensor counts no further
        require(in_range, name, value, f"must be a number of at least {minimum:g}")


def require_positive(settings, *names: str) -> None:
    """`require` that each of these fields is a finite number above 0."""
    for name in names:
        value = getattr(settings, name)
        require(math.isfinite(value) and value > 0, name, value, "must be a number above 0")


def seconds_of(text: str) -> float:
    """A time such as 11h, 90m or 1h30m in seconds; 0 for what is no time."""
    found = _TIME.fullmatch(text)
    parts = found.groups(default="0") if found else ()
    return sum(int(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Sections of settings; a field of one of them is a flag. Which sections there are is a subclass's matter."""

    mode: str = "balanced"
    notices: tuple[str, ...] = field(default=(), compare=False)
    """Lines to show at the start of the run; not part of what the run is."""

    if typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> typing.Any:
            """A section: which ones there are differs from subclass to subclass."""

    def to_dict(self) -> dict:
        """Plain values for `config.json`; its sections, joined, are `from_flags`'s values again."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "notices"}

    @classmethod
    def sections(cls) -> dict[str, type]:
        """The sections by name, in order, whose fields are flags."""
        kinds = typing.get_type_hints(cls)
        names = [item.name for item in dataclasses.fields(cls) if item.metadata.get("flags", True)]
        return {name: kinds[name] for name in names if dataclasses.is_dataclass(kinds[name])}

    @classmethod
    def from_flags(cls, values: dict[str, typing.Any], mode: str, notices: tuple[str, ...] = ()):
        """The configuration in which each flag named in `values` has that value and the others their default."""
        parts = {}
        for name, section in cls.sections().items():
            own = {f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values}
            parts[name] = section(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
        return cls(**parts, mode=mode, notices=notices)


WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line each, with the nearest flag there is."""

    def error(self, message: str) -> typing.NoReturn:
        missing = "the following arguments are required: "
        if message.startswith(missing):
            raise UsageError(f"{message.removeprefix(missing)}: not given; {self.format_usage().strip()}")
        raise UsageError(message.removeprefix("argument "))

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else list(argv)
        known, unknown = self.parse_known_args(argv, namespace)
        if unknown and not unknown[0].startswith("-"):
            raise UsageError(self._stray(unknown[0], argv))
        if unknown:
            raise UsageError(unknown_flag(unknown[0], [o for action in self._actions for o in action.option_strings]))
        return known

    def _stray(self, word: str, argv: Sequence[str]) -> str:
        """What is said of a word that belongs to no flag; most often it stands behind one that takes no value."""
        before = argv[argv.index(word) - 1] if argv.index(word) else ""
        for action in self._actions:
            if action.nargs == 0 and before in action.option_strings:
                return f"{before}: takes no value, not {word!r}; it says: {action.help}"
        return f"{word!r}: belongs to no flag"


def unknown_flag(flag: str, flags: Sequence[str]) -> str:
    """What is said of a flag that there is not, with the nearest one that there is."""
    nearest = difflib.get_close_matches(flag.split("=")[0], flags, n=1)
    return f"{flag}: no such flag; {f'did you mean {nearest[0]}?' if nearest else 'see --help for the flags there are'}"


def program_name() -> str:
    """How the verbs were called: as the installed command, or through Python."""
    return "sar-kd" if Path(sys.argv[0]).stem == "sar-kd" else "python -m sar_kd"


def names_of(section: type) -> list[str]:
    """The flags of a section."""
    return [item.name for item in dataclasses.fields(section)]


def fields_of(sections: Iterable[type]) -> Iterator[tuple[dataclasses.Field, type]]:
    """Every field that is a flag, with its type."""
    for section in sections:
        hints = typing.get_type_hints(section)
        yield from ((item, hints[item.name]) for item in dataclasses.fields(section))


def check_kind(item: dataclasses.Field, kind: type, value: object) -> None:
    """Raise TypeError or ValueError unless a value is of its flag's kind and, where there are some, choices."""
    if kind in (bool, int, float, str):
        fits = type(value) is kind or (kind is float and type(value) is int)
        fits = fits or (item.metadata["auto"] and isinstance(value, Auto))
    else:
        fits = isinstance(value, list) and all(isinstance(part, str) for part in value)
    if not fits:
        raise TypeError(f"{item.name} is {value!r}")
    if item.metadata["choices"] and value not in item.metadata["choices"]:
        raise ValueError(f"{item.name} is {value!r}")


def style() -> dict:
    """How every parser looks: as wide as the terminal, and no flag cut short."""
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    return {
        "formatter_class": lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width),
        "allow_abbrev": False,
        "argument_default": argparse.SUPPRESS,
    }


def place_of(sections: Mapping[str, type], name: str) -> str:
    """How the usage line shows a field that is given by its place."""
    item = next(item for section in sections.values() for item in dataclasses.fields(section) if item.name == name)
    metavar = item.metadata["metavar"]
    return f"{metavar} [{metavar} ...]" if item.default == () else metavar


def add_sections(
    parser: argparse.ArgumentParser, sections: Mapping[str, type], defaults: Mapping, places: Sequence[str] = ()
) -> None:
    """A flag for each field, but those in `places`; its default as in `defaults`, else the field's own."""
    for section in sections.values():
        title, _, description = (section.__doc__ or "").rstrip(".").partition(": ")
        group = parser.add_argument_group(title, description)
        hints = typing.get_type_hints(section)
        for item in sorted(dataclasses.fields(section), key=lambda item: [*places, item.name].index(item.name)):
            if item.name in places:
                words: dict[str, Any] = {"nargs": "+"} if item.default == () else {}
                group.add_argument(item.name, help=item.metadata["help"], metavar=item.metadata["metavar"], **words)
            else:
                _add_flag(group, item, hints[item.name], defaults.get(item.name, item.default))


def _add_flag(group, item: dataclasses.Field, kind: type, default) -> None:
    default = " ".join(default) if isinstance(default, tuple) else default
    shown = "" if default in ("", (), False) else f" ({default:g})" if isinstance(default, float) else f" ({default})"
    options: dict = {"help": item.metadata["help"] + shown}
    if kind is bool:
        options |= {"action": "store_true"}
    elif item.metadata["choices"]:
        options |= {"choices": item.metadata["choices"]}
    else:
        is_list, auto = kind not in (int, float, str), item.metadata["auto"]
        options |= {
            "type": _parser_of(str if is_list else kind, auto),
            "metavar": item.metadata["metavar"] if is_list else kind.__name__.upper() + "|auto" * auto,
        }
        options |= {"nargs": "+"} if is_list else {}
    group.add_argument(f"--{item.name}", **options)


def _parser_of(kind: type, auto: bool):
    def parse(text: str):
        if auto and text == str(AUTO):
            return AUTO
        try:
            return kind(text)
        except ValueError:
            words = WORDS[kind] + f" or {AUTO}" * auto
            raise argparse.ArgumentTypeError(f"'{text}' is not {words}") from None

    return parse

"""What settings are made of: dataclass fields that are also command-line options, the checks of their values, a run's
configuration, and the `Command` with the options of a command line.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sar_kd.errors import UsageError
from sar_kd.version import RUN_FORMAT

C = TypeVar("C", bound="RunConfig | Section")
R = TypeVar("R", bound="RunConfig")

AUTO = "auto"
"""The value of a count that the program is to find; `fit_batch_size` puts a number in its place."""

GIVEN = "*"
"""Of the presets of an option: those that any value brings"""

KIND_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
"""A field's type in words."""

_TIME = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?")


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raise UsageError naming the option, its value and the remedy, unless `holds`."""
    if not holds:
        raise UsageError(f"--{name} {value}: {remedy}")


def option(
    default,
    text: str,
    choices: tuple[str, ...] = (),
    *,
    at_least: float | None = None,
    positive: bool = False,
    not_empty: str = "",
    metavar: str = "FILE",
    positional: bool = False,
    auto: bool = False,
    aliases: tuple[str, ...] = (),
):
    """A dataclass field that is also a command-line option, with this help text.

    at_least, positive: a finite number of at least this, or above 0; not_empty: the remedy where '' is given
    positional: given without its name, in the order of the fields; metavar: of a positional, or of several values
    auto: a count that may also be `AUTO`
    aliases: further names that it may be given by
    """
    syntax = {
        "help": text, "choices": choices, "metavar": metavar, "positional": positional, "auto": auto,
        "aliases": aliases,
    }  # fmt: skip
    limits = {"at_least": at_least, "positive": positive, "not_empty": not_empty}
    return field(default=default, metadata=syntax | limits)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Settings that belong together: a group of options, with 'Title: description' as its docstring.

    Raises: UsageError naming an option that is out of bounds, its value and the remedy
    """

    notices: typing.ClassVar[tuple[str, ...]] = ()
    """Lines to show, where the section is all that a command has"""

    def __post_init__(self):
        for item in dataclasses.fields(self):
            name, value, limits = item.name, getattr(self, item.name), item.metadata
            if limits["at_least"] is not None and value != AUTO:
                in_range = limits["at_least"] <= value < math.inf
                require(in_range, name, value, f"must be a number of at least {limits['at_least']:g}")
                require(not isinstance(value, int) or value < 2**63, name, value, "must be below 2^63")
            if limits["positive"]:
                require(0 < value < math.inf, name, value, "must be a number above 0")
                require(1e-37 <= value <= 3e38, name, value, "must be from 1e-37 to 3e38, which float32 holds")
            texts = value if isinstance(value, tuple) else (value,)
            with_null = next((text for text in texts if isinstance(text, str) and "\0" in text), None)
            require(with_null is None, name, repr(with_null), "holds a null character; leave it out")
            if limits["not_empty"]:
                require(value != "", name, "''", limits["not_empty"])

    @classmethod
    def from_options(cls, values: Mapping[str, Any]):
        """The section in which each field named in `values` has that value; lists become tuples."""
        own = {item.name: values[item.name] for item in dataclasses.fields(cls) if item.name in values}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in own.items()})


def options_of(sections: Iterable[type]) -> Iterator[tuple[dataclasses.Field, type]]:
    """Every field of these sections, with its type."""
    for section in sections:
        hints = typing.get_type_hints(section)
        yield from ((item, hints[item.name]) for item in dataclasses.fields(section))


def is_allowed(item: dataclasses.Field, kind: type, value: object) -> bool:
    """Has a value given in Python, or read from a file, its option's type and, where there are some, choices?"""
    if kind not in KIND_NAMES:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    fits = type(value) is kind or (kind is float and type(value) is int) or (item.metadata["auto"] and value == AUTO)
    return fits and (not item.metadata["choices"] or value in item.metadata["choices"])


def value_error(item: dataclasses.Field, kind: type, value: object) -> str:
    """What is wrong with a value that `is_allowed` refuses; '' for any other."""
    if is_allowed(item, kind, value):
        return ""
    words = tuple(filter(None, item.metadata["choices"])) or (KIND_NAMES.get(kind, "a list of texts"),)
    return f"must be {' or '.join(words)}"


def known_options(sections: Iterable[type]) -> dict[str, tuple[dataclasses.Field, type]]:
    """Every field of these sections and its type, by its name and by its aliases."""
    found = options_of(sections)
    return {name: (item, kind) for item, kind in found for name in (item.name, *item.metadata["aliases"])}


def seconds_of(text: str) -> float:
    """A time such as 11h, 90m or 1h30m in seconds; 0 for text that is not a time."""
    found = _TIME.fullmatch(text)
    parts = found.groups(default="0") if found else ()
    return sum(int(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))


def is_date(text: str) -> bool:
    """Is it a date such as 2026-01-31?"""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Sections of settings; every field of a section is an option. A subclass adds the sections."""

    mode: str = "balanced"
    notices: tuple[str, ...] = field(default=(), compare=False)
    """Lines to show at the start of the run; they are not saved."""
    origin: Origin | None = field(default=None, compare=False, repr=False)
    """The command line; not saved either."""

    if typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> typing.Any:
            """A section; which ones there are differs between subclasses."""

    def to_dict(self) -> dict:
        """Plain values for `config.json`: format, sections and mode."""
        saved = dataclasses.replace(self, origin=None)
        values = {k: v for k, v in dataclasses.asdict(saved).items() if k not in ("notices", "origin")}
        return {"format": RUN_FORMAT, **values}

    @property
    def chosen(self) -> frozenset[str]:
        """The options whose values somebody chose; of a run to resume all that may not change."""
        return self.origin.chosen if self.origin else frozenset()

    def changed(self, options: Mapping[str, Any]):
        """The same with other values of these options, whatever else the command line would make of them."""
        parts = {name: getattr(self, name) for name in self.sections()}
        own = {name: {key: options[key] for key in vars(part) if key in options} for name, part in parts.items()}
        return dataclasses.replace(self, **{k: dataclasses.replace(parts[k], **v) for k, v in own.items() if v})

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """The sections whose fields are options, by name, in order."""
        kinds = typing.get_type_hints(cls)
        names = [item.name for item in dataclasses.fields(cls) if item.metadata.get("options", True)]
        return {name: kinds[name] for name in names if dataclasses.is_dataclass(kinds[name])}

    @classmethod
    def from_options(
        cls, values: dict[str, Any], mode: str, notices: tuple[str, ...] = (), origin: Origin | None = None
    ):
        """The configuration in which each option named in `values` has that value and the others their default."""
        parts: dict[str, Any] = {name: section.from_options(values) for name, section in cls.sections().items()}
        return cls(**parts, mode=mode, notices=notices, origin=origin)


@dataclass(frozen=True)
class Command(Generic[C]):
    """Which options a command line takes, and their values where none is given."""

    name: str
    """As typed behind `sar-kd`; '' for a script"""
    description: str
    config: type[C]
    """A kind of `RunConfig`, or a single section"""
    entry: str
    """'module:function' of `sar_kd.commands`: takes the configuration, returns a dict with `status`"""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that differ from the fields' own; where there is a `--mode`, its default is one of them"""
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Option -> its value, or `GIVEN` -> the settings that this value brings; a later option wins"""
    embedded_lr_factors: Mapping[str, float] = field(default_factory=dict)
    """Learning rate option -> its factor where the model is the embedded one and the rate is not given"""
    run_name: str = ""
    """Begins the name of a run folder; '' for a command that makes none"""

    @property
    def has_config_file(self) -> bool:
        """Does it take `--config FILE`? A command with a single section has too few options for one."""
        return issubclass(self.config, RunConfig)

    @property
    def sections(self) -> dict[str, type[Section]]:
        """The sections whose fields are its options."""
        return self.config.sections() if issubclass(self.config, RunConfig) else {self.name: self.config}

    def build(
        self, values: dict[str, Any], mode: str, notices: tuple[str, ...] = (), origin: Origin | None = None
    ) -> C:
        """Its configuration with these values; mode, notices and origin are a run's."""
        if issubclass(self.config, RunConfig):
            return self.config.from_options(values, mode, notices, origin)
        section = self.config.from_options(values)
        object.__setattr__(section, "notices", notices)  # it is frozen, and this is no setting
        return section


@dataclass(frozen=True)
class Origin:
    """What a configuration was made from."""

    command: Command
    given: Mapping[str, Any]
    """The options of the command line, or of the call from Python"""
    chosen: frozenset[str]
    """The names of those, and of the ones in a file of options; of a run to resume, of all that may not change"""

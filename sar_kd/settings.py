"""What a setting is: a dataclass field that is also a flag, one of a run's sections; what is wrong with its value."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field

_TIME = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?")


class UsageError(ValueError):
    """Something the user can mend before training; its text is the one line they see."""


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

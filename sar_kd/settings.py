"""What a setting is: a dataclass field that is also a flag, and the one line that says what is wrong with its value."""

from __future__ import annotations

import math
from dataclasses import field


class UsageError(ValueError):
    """Something the user can mend before training; its text is the one line they see."""


def flag(default, text: str, choices: tuple[str, ...] = (), metavar: str = "FILE"):
    """A dataclass field that is also a command-line flag with this help text; metavar: of a flag of several words."""
    return field(default=default, metadata={"help": text, "choices": choices, "metavar": metavar})


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raise UsageError naming the flag, its value and the remedy, unless `holds`."""
    if not holds:
        raise UsageError(f"--{name} {value}: {remedy}")


def require_at_least(settings, minimum: float, *names: str) -> None:
    """`require` that each of these fields is a finite number of at least `minimum`."""
    for name in names:
        value = getattr(settings, name)
        in_range = minimum <= value < (2**63 if isinstance(value, int) else math.inf)  # a tensor counts no further
        require(in_range, name, value, f"must be a number of at least {minimum:g}")


def require_positive(settings, *names: str) -> None:
    """`require` that each of these fields is a finite number above 0."""
    for name in names:
        value = getattr(settings, name)
        require(math.isfinite(value) and value > 0, name, value, "must be a number above 0")

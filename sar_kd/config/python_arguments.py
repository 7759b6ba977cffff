"""Errors that name an option of the command line, in the words of a Python call."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

from sar_kd.config.fields import Command, options_of
from sar_kd.errors import TrainingDiverged, UsageError

_FIRST = re.compile(r"--(\w+) (?!--)((?:'[^']*'|[^:]|:(?! ))*): ")

_OPTION = re.compile(r"--(\w+)(?:(?P<gap>[ =])(?!--)(?P<value>[\w./+-]*\w))?")

_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


@contextlib.contextmanager
def errors_of_arguments(command: Command, names: Mapping[str, str]) -> Iterator[Callable[[str], str]]:
    """Raise UsageError and TrainingDiverged again, with options as arguments; yields what translates a text.

    names: option -> argument, where they differ
    """
    translate = _Translation(command, names)
    try:
        yield translate
    except UsageError as error:
        raise UsageError(translate(str(error))) from None
    except TrainingDiverged as error:
        raise TrainingDiverged(translate(str(error))) from None


class _Translation:
    """'--train_steps 0: must be ...' becomes 'train_steps=0: must be ...'. Commands in backticks stay as they are."""

    def __init__(self, command: Command, names: Mapping[str, str]):
        self._options: dict[str, tuple[dataclasses.Field, type]] = {
            item.name: (item, kind) for item, kind in options_of(command.sections.values())
        }
        self._names = {name: names.get(name, name) for name in (*self._options, "mode")}

    def __call__(self, text: str) -> str:
        found = _FIRST.match(text)
        if found and found[1] in self._names:
            rest = self._in_sentence(text[found.end() :])
            return f"{self._names[found[1]]}={self._literal(found[1], found[2])}: {rest}"
        return self._in_sentence(text)

    def _in_sentence(self, text: str) -> str:
        parts = text.replace("no such option", "no such argument").split("`")
        return "`".join(part if i % 2 else _OPTION.sub(self._replace, part) for i, part in enumerate(parts))

    def _replace(self, found: re.Match) -> str:
        name, value = found[1], found["value"]
        if name not in self._names:
            return found[0]
        item, kind = self._options.get(name, (None, str))
        choices = item.metadata["choices"] if item else ()
        rest = f"{found['gap']}{value}" if value is not None else ""
        if kind is bool:
            return f"{self._names[name]}=True{rest}"
        if value is not None and (value in choices or (kind in (int, float) and _NUMBER.fullmatch(value))):
            return f"{self._names[name]}={self._literal(name, value)}"
        return self._names[name] + rest

    def _literal(self, name: str, value: str) -> str:
        """The value as it is written in Python."""
        kind = self._options[name][1] if name in self._options else str
        is_plain = kind in (bool, int, float) or value.startswith(("'", '"', "["))
        return value if is_plain else repr(value)

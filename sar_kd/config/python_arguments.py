"""Lines and errors that name an option of the command line, in the words of a Python call."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

from sar_kd.config.fields import Command, options_of
from sar_kd.errors import TrainingDiverged, UsageError

_FIRST = re.compile(r"(Warning: |)--(\w+) (?!--)((?:'[^']*'|[^:]|:(?! ))*): ")

_OPTION = re.compile(r"--(\w+)(?:(?P<gap>[ =])(?!--)(?P<value>[\w./+-]*\w))?")

_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")

_translation: ContextVar[Callable[[str], str]] = ContextVar("translation", default=str)


def as_called(line: str) -> str:
    """A line in the words of the call from Python that is under way; as it is where there is none."""
    return _translation.get()(line)


@contextlib.contextmanager
def called_from_python(command: Command, names: Mapping[str, str]) -> Iterator[Callable[[str], str]]:
    """Within it `as_called` gives options as arguments; so do UsageError and TrainingDiverged that leave it.

    Yields what translates a text.

    names: option -> argument, where they differ
    """
    translate = _Translation(command, names)
    former = _translation.set(translate)
    try:
        yield translate
    except UsageError as error:
        raise UsageError(translate(str(error))) from None
    except TrainingDiverged as error:
        raise TrainingDiverged(translate(str(error))) from None
    finally:
        _translation.reset(former)


class _Translation:
    """'--train_steps 0: must be ...' becomes 'train_steps=0: must be ...'. Commands in backticks stay as they are."""

    def __init__(self, command: Command, names: Mapping[str, str]):
        self._options: dict[str, tuple[dataclasses.Field, type]] = {
            item.name: (item, kind) for item, kind in options_of(command.sections.values())
        }
        self._modes = tuple(command.presets.get("mode", ()))
        self._names = {name: names.get(name, name) for name in (*self._options, "mode")}

    def __call__(self, text: str) -> str:
        found = _FIRST.match(text)
        if found and found[2] in self._names:
            start, name, value = found.groups()
            return f"{start}{self._names[name]}={self._literal(name, value)}: {self._in_sentence(text[found.end() :])}"
        return self._in_sentence(text)

    def _in_sentence(self, text: str) -> str:
        parts = text.replace("no such option", "no such argument").split("`")
        return "`".join(part if i % 2 else _OPTION.sub(self._replace, part) for i, part in enumerate(parts))

    def _replace(self, found: re.Match) -> str:
        name, value = found[1], found["value"]
        if name not in self._names:
            return found[0]
        item, kind = self._options.get(name, (None, str))
        choices = item.metadata["choices"] if item else self._modes
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

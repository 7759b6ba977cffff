"""How a line fits a terminal."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap

_UNIT = re.compile(r"(?<=\d) (?=(?:[kMGT]?B|[kM]|min|s|tokens/s)\b)")


def fitted(*lines: str) -> str:
    """The lines as a terminal shows them without breaking a word; as they are, where they go into a file."""
    return "\n".join(part for line in lines for part in (_wrapped(line) if sys.stdout.isatty() else [line]))


def _wrapped(line: str) -> list[str]:
    width = max(40, shutil.get_terminal_size((80, 24)).columns)
    bound = _UNIT.sub("\u00a0", line)  # a figure keeps its unit
    parts = textwrap.wrap(bound, width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    return [part.replace("\u00a0", " ") for part in parts] or [""]

"""How a line fits a terminal.

What is seen while text becomes tokens: a bar in a terminal, lines elsewhere.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

_UNIT = re.compile(r"(?<=\d) (?=(?:[kMGT]?B|[kM]|min|s|tokens/s)\b)")


def wrap_lines(*lines: str) -> str:
    """The lines as a terminal shows them without breaking a word; as they are, where they go into a file."""
    return "\n".join(part for line in lines for part in (_wrapped(line) if sys.stdout.isatty() else [line]))


def _wrapped(line: str) -> list[str]:
    width = max(40, shutil.get_terminal_size((80, 24)).columns)
    bound = _UNIT.sub("\u00a0", line)  # a figure keeps its unit
    parts = textwrap.wrap(bound, width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    return [part.replace("\u00a0", " ") for part in parts] or [""]


def say(line: str) -> None:
    """Print a line beside whatever else is printed, on standard error."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def tokenizing_bar(num_chars: int, is_shown: bool) -> Iterator[tqdm]:
    """A bar over so many characters of text; `update` tells how many more are done; in a terminal."""
    with tqdm(
        total=num_chars, unit="char", unit_scale=True, desc="Tokenising", disable=not (is_shown and sys.stderr.isatty())
    ) as bar:
        yield bar


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def first_few(names: Sequence[str]) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def perplexity_text(perplexity: float) -> str:
    """Two decimals, or a power of ten where there would be more digits than anyone reads."""
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.3g}"

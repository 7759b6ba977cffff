"""What is seen while text becomes tokens: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


def say(line: str) -> None:
    """Print a line beside whatever else is printed, on standard error."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def reading_bar(num_chars: int, is_shown: bool) -> Iterator[tqdm]:
    """A bar over so many characters of text; `update` tells how many more are done; in a terminal."""
    with tqdm(
        total=num_chars, unit="char", unit_scale=True, desc="Tokenising", disable=not (is_shown and sys.stderr.isatty())
    ) as bar:
        yield bar

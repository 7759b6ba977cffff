"""What goes to a terminal: lines beside progress bars, and numbers as text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


def print_stderr(line: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def tokenizing_bar(num_chars: int, is_shown: bool) -> Iterator[tqdm]:
    """A progress bar over characters of text, on a terminal only; `update(n)` advances it by n characters."""
    with tqdm(
        total=num_chars, unit="char", unit_scale=True, desc="Tokenizing", disable=not (is_shown and sys.stderr.isatty())
    ) as bar:
        yield bar


def first_few(names: Sequence[str]) -> str:
    """The first five names of a list that may be long."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def format_bytes(size: float) -> str:
    """1,234 MB or 1.23 GB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def format_duration(seconds: float) -> str:
    """12 s or 3 min 04 s."""
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def format_perplexity(perplexity: float) -> str:
    """Two decimals, or a power of ten from a million on."""
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.3g}"

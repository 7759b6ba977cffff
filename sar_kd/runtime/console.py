"""What goes to a terminal: lines beside progress bars, their colours, and numbers as text."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from sar_kd.config.python_arguments import as_called

_RED, _GREEN, _YELLOW, _BOLD = "31", "32", "33", "1"

_COLOURS = (
    (re.compile(r"error: |emergency stop|Emergency stop|.*: diverged\. "), _RED),
    (re.compile(r"Warning: |.*: (skipped \(|skip storm|alarm, )"), _YELLOW),
    (re.compile(r".*\(best so far\)"), _GREEN),
    (re.compile(r"(Finished|Interrupted) after |Next:"), _BOLD),
)
"""By the beginning of a line: the colour of the whole line"""

_SECONDS_BETWEEN_LINES = 60.0

_COMMAND = re.compile(r"Next: | {6}")


def paint(line: str, stream: TextIO) -> str:
    """The line as a terminal shows it, in its colour and wrapped between words; for another stream as it is.

    NO_COLOR and TERM=dumb switch colours off. A command to be typed is not wrapped, so that it can be copied.
    """
    if not stream.isatty():
        return line
    width = shutil.get_terminal_size((80, 24)).columns - 1
    is_long = len(line) > width and not _COMMAND.match(line)
    how: dict = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    shown = "\n".join(textwrap.wrap(line, max(width, 20), **how)) if is_long else line
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return shown
    colour = next((colour for pattern, colour in _COLOURS if pattern.match(line)), None)
    return shown if colour is None else f"\033[{colour}m{shown}\033[0m"


def print_stderr(line: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    tqdm.write(as_called(line), file=sys.stderr)


@contextmanager
def tokenizing_bar(num_chars: int, is_shown: bool) -> Iterator[tqdm]:
    """A progress bar over characters of text, on a terminal only; `update(n)` advances it by n characters."""
    with tqdm(
        total=num_chars, unit="char", unit_scale=True, desc="Tokenizing", disable=not (is_shown and sys.stderr.isatty())
    ) as bar:
        yield bar


@contextmanager
def progress(total: int, done: int, unit: str, title: str) -> Iterator[Callable[[int], object]]:
    """A function that counts what is done: a progress bar on a terminal, elsewhere a line on standard error a minute.

    done: what was done before; unit: in the plural
    """
    if sys.stderr.isatty():
        with tqdm(total=total, initial=done, unit=f" {unit}", unit_scale=True, desc=title, file=sys.stderr) as bar:
            yield bar.update
        return
    start = last = time.monotonic()
    count = done

    def advance(number: int) -> None:
        nonlocal count, last
        count, now = count + number, time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and count < total:
            last, left = now, (total - count) * (now - start) / max(1, count - done)
            print_stderr(f"{title}: {count:,} of {total:,} {unit}, about {format_duration(left)} left")

    yield advance


def first_few(names: Sequence[str]) -> str:
    """The first five names of a list that may be long."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def count_of(number: int, noun: str) -> str:
    """'1 line', '2,000 lines'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def format_clock(seconds: float) -> str:
    """0:07, 12:34 or 1:02:03, as a progress bar shows time."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_bytes(size: float) -> str:
    """1.23 GB, 1,234 MB, 12 kB or 1 byte; 'unknown' where it is no number."""
    if not math.isfinite(size):
        return "unknown"
    if size >= 1e6:
        return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
    return f"{size / 1e3:,.0f} kB" if size >= 1e3 else count_of(round(size), "byte")


def format_duration(seconds: float) -> str:
    """12 s, 3 min 04 s or 5 h 06 min; nan s for a time that a damaged file has lost."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    minutes, rest = divmod(int(round(seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def format_perplexity(perplexity: float) -> str:
    """Two decimals, or a power of ten from a million on."""
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.3g}"


def format_share(share: float) -> str:
    """12.3%, or <0.1% of what is not 0; never 100.0% of less than all."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"

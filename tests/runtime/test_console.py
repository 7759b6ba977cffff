"""Progress: a bar on a terminal, elsewhere a line a minute."""

import io
import sys

import pytest

from sar_kd.runtime import console
from sar_kd.runtime.console import format_bytes, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    times = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: times[0])
    return times


def test_without_a_terminal_a_line_a_minute_says_how_long_it_still_takes(clock, capsys):
    with progress(1000, 200, "tokens", "Running the teacher") as advance:
        for seconds in (30, 59, 61, 90, 130):
            clock[0] = seconds
            advance(100)
        advance(300)  # the last one needs no line
    first, second = capsys.readouterr().err.splitlines()
    assert first == "Running the teacher: 500 of 1,000 tokens, about 1 min 42 s left"  # 500 left, 300 in 61 s
    assert second == "Running the teacher: 700 of 1,000 tokens, about 1 min 18 s left"  # 300 left, 500 in 130 s


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1 kB"), (431_499, "431 kB"), (1e6, "1 MB"),
     (123_456_789, "123 MB"), (2.345e9, "2.35 GB")],
)  # fmt: skip
def test_no_size_is_shown_as_none(size, shown):
    assert format_bytes(size) == shown


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(4, 1, "answers", "Generating") as advance:
        advance(3)
    assert "Generating: 100%" in stream.getvalue()
    assert "4.00/4.00" in stream.getvalue()

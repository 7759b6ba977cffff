"""Progress: a bar on a terminal, elsewhere a line a minute."""

import io
import sys

import pytest

from sar_kd.runtime import console
from sar_kd.runtime.console import progress


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


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(4, 1, "answers", "Generating") as advance:
        advance(3)
    assert "Generating: 100%" in stream.getvalue()
    assert "4.00/4.00" in stream.getvalue()

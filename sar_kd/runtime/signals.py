"""Ctrl-C, SIGTERM and a time limit: a request to stop, which a loop checks between two steps, or the end at once."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

INTERRUPTED = 130
"""The exit code of an interrupted command"""

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

_cleanups: list[Callable[[], object]] = []


class StopRequest:
    """Sets `requested` on the first SIGINT or SIGTERM, or at the deadline, and says at once what follows; a second
    signal ends the program at once, as it would without this object.

    deadline: in seconds of `time.monotonic`. Signals reach the main thread only; in another one only the deadline
    counts.
    """

    def __init__(self, deadline: float = math.inf, what_follows: str = ""):
        """what_follows: printed at the first signal; '' prints nothing"""
        self._deadline, self._signalled, self.what_follows = deadline, False, what_follows
        self._previous_handlers: dict = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._request) for number in _NAMES}
        return self

    @property
    def requested(self) -> bool:
        """Is it time to stop?"""
        return self._signalled or time.monotonic() >= self._deadline

    def _request(self, number: int, frame) -> None:
        if self._signalled:
            interrupt = self._previous_handlers[signal.SIGINT]
            if callable(interrupt):  # `exit_at_once`, or Python's own, which raises
                interrupt(signal.SIGINT, frame)
            raise KeyboardInterrupt
        self._signalled = True
        if self.what_follows:
            _print(f"{_NAMES[signal.Signals(number)]}: {self.what_follows}")

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)


def end_at_once_on_ctrl_c(line: str, is_silent: bool = False) -> None:
    """From now on Ctrl-C prints the line and ends the process with 130, as a kill does, after the clean-ups.

    A KeyboardInterrupt would be raised wherever the program is: in a finalizer, which prints it and goes on, or in a
    function that C++ calls, which aborts. So this is for a process that is the program's own, and for a program whose
    files bear a kill.
    """

    def exit_at_once(number: int, frame) -> None:
        for clean_up in reversed(_cleanups):
            with contextlib.suppress(Exception):
                clean_up()
        if not is_silent:
            _print(line)
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, exit_at_once)


@contextlib.contextmanager
def cleaned_up(clean_up: Callable[[], object]) -> Iterator[None]:
    """Call `clean_up` at the end of the context, or at a Ctrl-C that ends the process at once."""
    _cleanups.append(clean_up)
    try:
        yield
    finally:
        _cleanups.remove(clean_up)
        clean_up()


def _print(line: str) -> None:
    """To standard error, past its buffer, into which the signal may have come; behind the ^C of a terminal."""
    with contextlib.suppress(OSError):
        os.write(2, f"{os.linesep if os.isatty(2) else ''}{line}{os.linesep}".encode())

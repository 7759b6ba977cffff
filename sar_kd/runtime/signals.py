"""Ctrl-C, SIGTERM and a time limit as a request to stop, which a loop checks between two steps."""

from __future__ import annotations

import math
import signal
import threading
import time


class StopRequest:
    """Sets `requested` on the first SIGINT or SIGTERM, or at the deadline; a second signal raises KeyboardInterrupt.

    deadline: in seconds of `time.monotonic`. Signals reach the main thread only; in another one only the deadline
    counts.
    """

    def __init__(self, deadline: float = math.inf):
        self._deadline, self._signalled = deadline, False
        self._previous_handlers: dict = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM)
            self._previous_handlers = {number: signal.signal(number, self._request) for number in signals}
        return self

    @property
    def requested(self) -> bool:
        """Is it time to stop?"""
        return self._signalled or time.monotonic() >= self._deadline

    def _request(self, number: int, frame) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

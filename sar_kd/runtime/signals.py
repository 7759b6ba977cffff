"""Ctrl-C, SIGTERM and the end of a time limit as a request that a loop can honour at a good moment."""

from __future__ import annotations

import math
import signal
import threading
import time


class StopRequest:
    """Turns the first SIGINT or SIGTERM into `requested`; the second raises KeyboardInterrupt at once.

    So does the moment `deadline`, in seconds of `time.monotonic`. Signals reach the main thread only; in another one
    the deadline alone counts.
    """

    def __init__(self, deadline: float = math.inf):
        self._deadline, self._signalled = deadline, False
        self._former: dict = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
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
        for number, handler in self._former.items():
            signal.signal(number, handler)

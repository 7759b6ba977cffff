"""Ctrl-C and SIGTERM as a request that a loop can honour at a good moment."""

from __future__ import annotations

import signal


class Interruption:
    """Turns the first SIGINT or SIGTERM into `requested`; the second raises KeyboardInterrupt at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> Interruption:
        self._former = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

"""The next step's batches, made while this step computes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


class Prefetch(Generic[Key, Made]):
    """Calls a function one call ahead, in a thread; what it returns must depend on its argument alone.

    So nothing of it need be saved: whoever takes other things than were foreseen, as after a resumption, gets those.
    """

    def __init__(self, make: Callable[[Key], Made]):
        self._make = make
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ahead: tuple[Key, Future[Made]] | None = None

    def take(self, key: Key, following: Key | None = None) -> Made:
        """make(key), and begin with make(following), unless that is None.

        Raises: what `make(key)` raises
        """
        if self._ahead is None or self._ahead[0] != key:
            self._begin(key)
        assert self._ahead is not None
        _, made = self._ahead
        try:
            return made.result()
        finally:
            self._begin(following)

    def _begin(self, key: Key | None) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = None if key is None else (key, self._pool.submit(self._make, key))

    def close(self) -> None:
        """End the thread, once it is done with what it has begun."""
        self._pool.shutdown(cancel_futures=True)

"""Python's search for garbage in cycles."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Do not look for cycles meanwhile; also a decorator.

    For code that makes many objects which stay, such as imports and tables of a vocabulary: the search goes through
    all of them again and again, and takes a fifth to a third of the time. Other objects are freed as ever.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

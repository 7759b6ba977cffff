"""Where the tokens of a large text are kept, so that it is tokenised once and need not fit into memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from sar_kd.data.column_store import ColumnStore, DamagedStore, open_column_store
from sar_kd.errors import UsageError
from sar_kd.runtime.console import say
from sar_kd.runtime.files import LOCK, FolderLock, require_room

OFF = "off"

_PARTIAL = ".partial"

Contents = tuple[dict[str, np.ndarray], dict]
"""Columns by name, and facts."""


def _own_folder() -> Path:
    """The user's own; the system's temporary folder, for a user without a home."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or (
        Path(home) / ".cache" if os.path.isabs(home) else tempfile.gettempdir()
    )
    return Path(cache) / "sar_kd"


class TokenCache:
    """A folder of shelves, each under the digest of all that its contents depend on."""

    def __init__(self, setting: str, say: Callable[[str], None] = say):
        """setting: `--token_cache`, a folder, 'off' or empty for the user's own; say: shows a line"""
        self.keeps, self.say = setting != OFF, say
        self.folder = Path(setting or _own_folder()) if self.keeps else Path(tempfile.gettempdir())

    def get(self, what: dict, build: Callable[[ColumnStore], None], num_chars: int) -> Contents:
        """The contents that `what` describes: those kept, if they are sound, else what `build` puts on a new shelf.

        what: everything that the contents depend on; num_chars: of the text that they are made of
        Raises: UsageError if the folder cannot be written or has no room
        """
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        path = self.folder / key[:32]
        if self.keeps:
            try:
                found = open_column_store(path, key)
                self.say(f"Tokens: taken from {path}")
                return found
            except OSError:  # there is none, or what keeps us from reading it will keep us from writing, and be named
                pass
            except DamagedStore as damage:
                self.say(f"Tokens: {path} is not trusted ({damage}); it is made anew")
        self.say(f"Tokens: {num_chars / 1e6:,.0f} million characters are tokenised{', once' if self.keeps else ''}")
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            partial = Path(tempfile.mkdtemp(prefix=f"{key[:32]}-", suffix=_PARTIAL, dir=self.folder))
        columns_in = partial / "columns"
        shelf, lock = ColumnStore(columns_in), FolderLock(partial)
        try:
            with self._writable():
                columns_in.mkdir()
                lock.acquire()
                build(shelf)
                columns = shelf.finish()
                if not self.keeps:
                    return columns, shelf.facts
                shelf.seal(key)
                if self._replace(path, columns_in):
                    self.say(f"Tokens: {shelf.num_bytes() / 1e6:,.0f} MB kept in {path}")
                return columns, shelf.facts
        finally:
            shelf.close()
            lock.release()
            shutil.rmtree(partial, ignore_errors=True)  # what is mapped stays readable
            weakref.finalize(self, shutil.rmtree, partial, ignore_errors=True)  # where it can only be removed unmapped

    def require_room(self, num_bytes: int) -> None:
        """Raise UsageError unless the folder has room for so much."""
        remedy = "free some, or name another folder"
        require_room(self.folder, num_bytes, "the text's tokens", flag="token_cache", remedy=remedy)

    @contextmanager
    def _writable(self):
        try:
            yield
        except OSError as error:
            fault = f"cannot be written ({error.strerror or error}); name another folder"
            raise UsageError(f"--token_cache {self.folder}: {fault}") from None

    def _replace(self, path: Path, folder: Path) -> bool:
        """Give a sealed folder its name; False where that cannot be had, and its contents serve this run only."""
        with suppress(OSError):
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            os.rename(folder, path)
        return not folder.exists()

    def _sweep(self) -> None:
        """Remove what runs left that were killed while they tokenised."""
        for path in self.folder.glob(f"*{_PARTIAL}"):
            with suppress(UsageError):
                if not (path / LOCK).exists():
                    continue
                FolderLock(path).check()
                shutil.rmtree(path, ignore_errors=True)

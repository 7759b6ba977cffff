"""The token cache of large texts: each is tokenized once, and its tokens are memory-mapped."""

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
from sar_kd.runtime.console import print_stderr
from sar_kd.runtime.files import LOCK, FolderLock, atomic_rename, require_disk_space

OFF = "off"

_PARTIAL = ".partial"

Contents = tuple[dict[str, np.ndarray], dict]
"""Columns by name, and metadata."""


def _default_folder() -> Path:
    """In the user's cache; in the system's temporary folder for a user without a home."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or (
        Path(home) / ".cache" if os.path.isabs(home) else tempfile.gettempdir()
    )
    return Path(cache) / "sar_kd"


class TokenCache:
    """A folder of column stores, each named after the digest of all that its contents depend on."""

    def __init__(self, setting: str, log: Callable[[str], None] = print_stderr):
        """setting: `--token_cache`: a folder, 'off', or empty for the user's own; log: shows a line"""
        self.is_on, self.log = setting != OFF, log
        self.folder = Path(setting or _default_folder()) if self.is_on else Path(tempfile.gettempdir())

    def get(self, key_parts: dict, build: Callable[[ColumnStore], None], num_chars: int) -> Contents:
        """The cached contents if there are any and they are intact, else those that `build` adds to a new store.

        key_parts: all that the contents depend on; num_chars: of the text
        Raises: UsageError if the folder cannot be written or has no room
        """
        key = hashlib.sha256(json.dumps(key_parts, sort_keys=True).encode()).hexdigest()
        path = self.folder / key[:32]
        if self.is_on:
            try:
                found = open_column_store(path, key)
                self.log(f"Tokens: read from {path}")
                return found
            except OSError:  # there is none; if it cannot be read, it cannot be written either, which is an error below
                pass
            except DamagedStore as damage:
                self.log(f"Tokens: {path} is damaged ({damage}); rebuilding it")
        self.log(f"Tokens: tokenizing {num_chars / 1e6:,.0f} million characters{', once' if self.is_on else ''}")
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            partial = Path(tempfile.mkdtemp(prefix=f"{key[:32]}-", suffix=_PARTIAL, dir=self.folder))
        store, lock = ColumnStore(partial / "columns"), FolderLock(partial)
        try:
            with self._writable():
                (partial / "columns").mkdir()
                lock.acquire()
                build(store)
                columns = store.finalize(key if self.is_on else None)
                if self.is_on and self._publish(partial / "columns", path):
                    self.log(f"Tokens: {store.num_bytes() / 1e6:,.0f} MB cached in {path}")
                return columns, store.metadata
        finally:
            store.close()
            lock.release()
            shutil.rmtree(partial, ignore_errors=True)  # a mapped file stays readable
            weakref.finalize(self, shutil.rmtree, partial, ignore_errors=True)  # for systems where only then it can go

    def require_disk_space(self, num_bytes: int) -> None:
        """Raise UsageError unless the folder's disk has `num_bytes` free."""
        remedy = "free some, or name another folder"
        require_disk_space(self.folder, num_bytes, "the text's tokens", option="token_cache", remedy=remedy)

    @contextmanager
    def _writable(self):
        try:
            yield
        except OSError as error:
            fault = f"cannot be written ({error.strerror or error}); name another folder"
            raise UsageError(f"--token_cache {self.folder}: {fault}") from None

    def _publish(self, folder: Path, path: Path) -> bool:
        """Give a finished folder its final name; if that fails, its contents serve this run only."""
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            atomic_rename(folder, path)
        return not folder.exists()

    def _remove_leftovers(self) -> None:
        """Remove the folders of runs that were killed while they tokenized."""
        for path in self.folder.glob(f"*{_PARTIAL}"):
            with suppress(UsageError):
                if not (path / LOCK).exists():
                    continue
                FolderLock(path).check()
                shutil.rmtree(path, ignore_errors=True)

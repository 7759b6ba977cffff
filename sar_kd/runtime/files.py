"""Text files of a run folder: written whole or not at all, and read although a kill may have cut the last line.

The run folder itself: one run at a time in it, nothing in it that leads out of it, and room for what is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from sar_kd.errors import UsageError


def atomic_write(
    path: Path,
    data: str | bytes | Callable[[Path], object],
    flag: str = "output_dir",
    remedy: str = "then --resume",
) -> None:
    """Write a file so that a reader, a kill or a power cut finds the old content or the new, never a part of it.

    data: the content (text becomes UTF-8), or a function that writes it into the path it is given
    flag, remedy: the option that named the folder, and what to do once there is room
    Raises: UsageError if it cannot be written; the old file is then intact
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if callable(data):
            data(partial)
        else:
            partial.write_bytes(data.encode() if isinstance(data, str) else data)
        atomic_rename(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(
            f"--{flag}: {path} cannot be written ({error.strerror or error}); what was saved before is intact: free "
            f"some room, {remedy}"
        ) from None


def atomic_rename(partial: Path, path: Path) -> None:
    """Give a finished file or folder its final name, in place of what has it, once its content is on the disk.

    A file is replaced in one step; a folder that has the name is deleted first.
    """
    if partial.is_dir():
        for inner in partial.rglob("*"):
            _flush(inner)
        _flush(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    else:
        _flush(partial)
        os.replace(partial, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Wait until a file is on the disk; a folder too (the names in it), where the system can do that."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete_lines(path: Path) -> list[str]:
    """The lines of a text file, without a last one that a kill cut short; none if there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def step_of(line: str) -> float:
    """The step that a line of `metrics.jsonl` is about; inf for a line that is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def plain(value):
    """The value as JSON can hold it: JSON has no nan and no infinity, so they become the words."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def number_of(value: object) -> float:
    """A number that `plain` wrote; nan for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

_SLACK = 2**24


class FolderLock:
    """Keeps a second run out of a folder for as long as this process lives, and tells it whose the folder is.

    The system drops the lock with the process, so a kill leaves none. Where the file system has no locks, none is held.
    """

    def __init__(self, folder: Path, flag: str = "output_dir"):
        """flag: what names the folder"""
        self.path, self._flag = folder / LOCK, flag
        self._file: TextIO | None = None

    def check(self) -> None:
        """Raise UsageError if another run holds the folder."""
        if self.path.exists():
            self.acquire()
            self.release()

    def acquire(self) -> None:
        """Take the folder; again by the same object is no error.

        Raises: UsageError with the process id of the run that has it
        """
        if fcntl is None or self._file is not None:
            return
        while self._file is None:
            file = open(self.path, "a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                where = f"--{self._flag} {self.path.parent}"
                raise UsageError(f"{where}: process {holder} is running in it; wait for it, or name another") from None
            except OSError:  # a file system without locks
                file.close()
                return
            if self._is_current(file):
                self._file = file
            else:  # the run before removed the file between our opening and our locking it
                file.close()
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def _is_current(self, file) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the folder back."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def holds_something(folder: Path) -> bool:
    """Is there anything in it but what a run leaves that was killed as it began?"""
    leftovers = {LOCK, ".config.json.partial"}
    return folder.exists() and any(path.name not in leftovers for path in folder.iterdir())


def check_contained(folder: Path) -> None:
    """Raise UsageError if a link in the folder leads out of it: a run would write, or delete, what it points at."""
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UsageError(f"--output_dir {folder}: {path} is a link that leads out of it; remove it")


def clear(folder: Path) -> None:
    """Delete what a former run left, but not its lock; its `config.json` stays until a new one replaces it, so that a
    kill in between leaves a folder that is known as a run's.
    """
    for path in folder.iterdir():
        if path.name in (LOCK, "config.json"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def require_room(
    folder: Path, num_bytes: int, what: str, *, flag: str = "output_dir", remedy: str = "free some, then --resume"
) -> int:
    """The bytes that are free. Raise UsageError unless that is `num_bytes`, and a little to spare."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + _SLACK:
        raise UsageError(
            f"--{flag} {folder}: no room for {what} ({_megabytes(num_bytes + _SLACK)} needed, {_megabytes(free)} "
            f"free); {remedy}"
        )
    return free


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"

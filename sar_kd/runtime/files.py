"""Files that are written whole or not at all, and read although a kill may have cut off the last line; the lock of a
folder, and the free space of its disk; which checkpoints a run has saved.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from sar_kd.errors import UsageError
from sar_kd.runtime.console import format_bytes

CONFIG = "config.json"

CHECKPOINTS = "checkpoint"
"""The folder of a run's checkpoints, in its own"""

_CHECKPOINT_NAME = re.compile(r"step-\d{8,}")

LOCK = ".lock"

LOCK_FILES = (LOCK, f"{LOCK}.pid")
"""What a `FolderLock` keeps in its folder: the lock, and the process id of its holder"""

_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}

_SPARE_BYTES = 2**24


def atomic_write(
    path: Path,
    data: str | bytes | Callable[[Path], object],
    option: str = "output_dir",
    remedy: str = "",
) -> None:
    """Write a file so that a reader, a kill or a power cut finds the old content or the new, never a part of it.

    data: the content, or a function that writes it into the path it is given; text becomes UTF-8, and what has none, as
        in some file names, is escaped
    option: that named the folder; remedy: what to do; by default what suits a file of a run
    Raises: UsageError if it cannot be written; the old file is then intact
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if callable(data):
            data(partial)
        else:
            partial.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
        atomic_rename(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        run = next((folder for folder in path.parents[:2] if (folder / CONFIG).exists()), path.parent)
        remedy = remedy or f"free some room; {how_to_go_on(run)}"
        raise UsageError(f"--{option}: {path} cannot be written ({error.strerror or error}); {remedy}") from None


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after so many steps."""
    return f"step-{step:08d}"


def step_of_checkpoint(name: str) -> int:
    """The inverse of `checkpoint_name`."""
    return int(name.removeprefix("step-"))


def saved_checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, the newest first."""
    if not folder.is_dir():
        return []
    found = [path.name for path in folder.iterdir() if path.is_dir() and _CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of_checkpoint, reverse=True)


def how_to_go_on(run: Path) -> str:
    """What the run in this folder has saved, and how to go on after an error, in words."""
    if saved := saved_checkpoints(run / CHECKPOINTS):
        return f"the checkpoint of step {step_of_checkpoint(saved[0])} is intact, --resume continues from it"
    if (run / CONFIG).exists():
        return "no checkpoint was saved yet, so start again with --overwrite"
    return "nothing was saved yet"


def atomic_rename(partial: Path, path: Path) -> None:
    """Give a finished file or folder its final name, in place of what has it, once its content is on the disk.

    A file is replaced in one step; a folder that has the name is deleted first. Files get the permissions that a new
    file has (666 without the umask): some libraries write through a temporary file, which only its owner may read.
    """
    mode = 0o666 & ~_umask()
    if partial.is_dir():
        for inner in partial.rglob("*"):
            if inner.is_file():
                _set_mode(inner, mode)
            _flush(inner)
        _flush(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    else:
        _set_mode(partial, mode)
        _flush(partial)
        os.replace(partial, path)
    _flush(path.parent)


def _umask() -> int:
    """The bits that a new file does not get. The system only tells it when it is set."""
    found = os.umask(0o077)
    os.umask(found)
    return found


def _set_mode(path: Path, mode: int) -> None:
    with contextlib.suppress(OSError):  # a file system without permissions
        path.chmod(mode)


def _flush(path: Path) -> None:
    """Wait until a file is on the disk; a folder too (the names in it), where the system can do that."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    is_writable = not is_folder and os.access(path, os.W_OK)  # Windows flushes no file that is open for reading
    descriptor = os.open(path, os.O_RDWR if is_writable else os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def complete_lines(path: Path) -> list[str]:
    """The lines of a text file, without a last one that a kill cut short; none if there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def step_of_line(line: str) -> float:
    """The step of a line of `metrics.jsonl`; inf for a line that has none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def json_safe(value):
    """The value for JSON, which has no nan and no infinity: they become the strings 'nan', 'inf' and '-inf'."""
    if isinstance(value, dict):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_float(value: object) -> float:
    """The inverse of `json_safe` for a number; nan for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


class FolderLock:
    """Keeps a second run out of a folder, or off a file in it, for as long as this process lives, and tells it the
    holder's process id.

    The operating system frees the lock with the process, so a kill leaves none. A file system without locks has none.
    """

    def __init__(self, folder: Path, option: str = "output_dir", file: str = ""):
        """option: the option that named the folder; file: the file in it, '' for the folder as a whole"""
        self.folder, self._option, self._name = folder, option, folder / file
        self._files = [folder / (f".{file}{name}" if file else name) for name in LOCK_FILES]
        self._lock = FileLock(self._files[0], thread_local=False)

    def check(self) -> None:
        """Raise UsageError if another run holds the folder."""
        if self._files[0].exists():
            self.acquire()
            self.release()

    def acquire(self) -> None:
        """Take the folder; again by the same object is no error.

        Raises: UsageError with the process id of the run that has it
        """
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            path = self._files[1]
            holder = (path.read_text(encoding="utf-8") if path.is_file() else "") or "unknown"
            raise UsageError(
                f"--{self._option} {self._name}: process {holder} is running in it; wait for it, or name another"
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
                raise
            return
        if not self._holds_named_file():  # its former holder deleted it between our opening it and our locking it
            self._lock.release()
            return self.acquire()
        self._files[1].write_text(str(os.getpid()), encoding="utf-8")

    def _holds_named_file(self) -> bool:
        """Is the locked file the one that has the name now? Another run may have made a new one in the meantime."""
        descriptor = self._lock._context.lock_file_fd
        try:
            return descriptor is not None and os.path.samestat(os.fstat(descriptor), os.stat(self._files[0]))
        except OSError:
            return False

    def release(self) -> None:
        """Give the folder back."""
        if self._lock.is_locked:
            for path in self._files[::-1]:
                with contextlib.suppress(OSError):  # Windows deletes no open file
                    path.unlink()
            self._lock.release()


def require_disk_space(folder: Path, num_bytes: int, what: str, *, option: str = "output_dir", remedy: str = "") -> int:
    """The free bytes of the folder's disk. Raises UsageError unless they are `num_bytes` and 16 MiB more.

    remedy: what to do; by default what suits a run's folder
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + _SPARE_BYTES:
        needed = format_bytes(num_bytes + _SPARE_BYTES)
        remedy = remedy or f"free some; {how_to_go_on(folder)}"
        raise UsageError(
            f"--{option} {folder}: no room for {what} ({needed} needed, {format_bytes(free)} free); {remedy}"
        )
    return free

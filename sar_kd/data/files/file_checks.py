"""What can be known about the files of text before one is read whole: that they are there, and their first line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sar_kd.config.sections import DataConfig
from sar_kd.data.files.samples import LONG, LongDocument, read_file
from sar_kd.errors import UsageError

_KINDS = {
    stat.S_ISDIR: "is a folder; name the files in it",
    stat.S_ISFIFO: "is a pipe, which can be read only once; write it into a file first",
    stat.S_ISSOCK: "is a socket, not a file",
    stat.S_ISCHR: "is a device, not a file",
    stat.S_ISBLK: "is a device, not a file",
}


def require_files(config: DataConfig) -> None:
    """Raise UsageError unless each of `--train_file` and `--validation_file` is a file that can be opened."""
    for option, path in _files(config):
        require_file(option, path)


def require_file(option: str, path: Path) -> None:
    """Raise UsageError, which names the option, unless the path is of a file that can be opened."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--{option} {path}: cannot be read ({reason})") from None
    for is_kind, reason in _KINDS.items():
        if is_kind(mode):
            raise UsageError(f"--{option} {path}: {reason}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"--{option} {path}: cannot be read (Permission denied)")


def check_first_lines(config: DataConfig) -> None:
    """Read the beginning of each file: the first example, or some of a text.

    Raises: UsageError as `require_files` and `read_file`
    """
    require_files(config)
    for option, path in _files(config):
        size = path.stat().st_size
        if path.suffix == ".txt" and size >= LONG:
            next(LongDocument(path.name, option, path, 0, size).chunks(), None)
        else:
            next(read_file(option, path, config.text_field), None)


def _files(config: DataConfig) -> list[tuple[str, Path]]:
    options = ("train_file", "validation_file")
    return [(option, Path(name)) for option in options for name in getattr(config, option)]

"""Text files of a run folder: written whole or not at all, and read although a kill may have cut the last line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from sar_kd.settings import UsageError


def replace_text(path: Path, text: str, flag: str = "output_dir", remedy: str = "then --resume") -> None:
    """Write a file so that a reader, and a kill, meet the old text or the new, never a part.

    flag, remedy: what named the folder, and what to do once there is room
    Raises: UsageError if it cannot be written
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(
            f"--{flag}: {path} cannot be written ({error.strerror}); what was saved before is intact: free some "
            f"room, {remedy}"
        ) from None


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

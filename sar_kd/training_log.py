"""Logs of losses and gradient norms: a Trainer's lines, its `trainer_state.json`, a run's `metrics.jsonl`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sar_kd.config import UsageError

_LINE = re.compile(r"\{[^{}]*['\"]loss['\"][^{}]*\}")
_ITEM = re.compile(r"['\"](\w+)['\"]\s*:\s*['\"]?([-+.\w]+)")
_ACCURACY = re.compile(r"\b(accuracy|answer_rate)['\"]?\s*[=:]\s*['\"]?([-+.\w]+)")
_HOMES = ("metrics.jsonl", "trainer_state.json")


@dataclass(frozen=True)
class Point:
    """One line of a log. What a line does not say is None."""

    loss: float
    grad_norm: float | None = None
    learning_rate: float | None = None
    step: float | None = None
    cause: str | None = None
    """Why the update was refused, as `guards.CAUSES`; only this program's own files know"""


@dataclass(frozen=True)
class TrainingLog:
    """A log as it was found."""

    path: Path
    points: tuple[Point, ...]
    is_ours: bool
    """It is a run's `metrics.jsonl`, in which a loss of 0 is one"""
    scores: dict[str, float]
    """The last `accuracy` and `answer_rate` that the log names"""
    unscales_half: bool
    """It holds PyTorch's complaint about gradients of half weights"""


def read_log(path: Path) -> TrainingLog:
    """Read a log file, or the one that a run's or a checkpoint's folder holds.

    Raises: UsageError if there is none, or it names no loss
    """
    if path.is_dir():
        path = next((path / name for name in _HOMES if (path / name).is_file()), path)
    if not path.is_file():
        raise UsageError(f"explain {path}: no such log; give a file, or a folder that holds {' or '.join(_HOMES)}")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"explain {path}: cannot be read ({error.strerror})") from None
    records = _records(text)
    is_ours = any(record.get("event") == "step" for record in records)
    points = tuple(point for record in records if (point := _point(record)) is not None)
    scores = {name: number for name, value in _ACCURACY.findall(text) if (number := _number(value)) is not None}
    unscales_half = "Attempting to unscale FP16 gradients" in text
    if not points and not unscales_half:
        raise UsageError(
            f"explain {path}: names no loss; give lines as {{'loss': 2.27, 'grad_norm': 1.55}}, or {_HOMES[1]}"
        )
    return TrainingLog(path, points, is_ours, scores, unscales_half)


def _records(text: str) -> list[dict]:
    whole = _json(text)
    if isinstance(whole, dict) and isinstance(whole.get("log_history"), list):
        return [record for record in whole["log_history"] if isinstance(record, dict)]
    lines = [_json(line) for line in text.splitlines()]
    ours = [line for line in lines if isinstance(line, dict) and "event" in line]
    return [record for record in ours if record["event"] == "step"] or list(_from_lines(text))


def _from_lines(text: str) -> Iterator[dict]:
    """The dicts that a Trainer prints, in which nan is not JSON; newer versions print their values as text."""
    for found in _LINE.finditer(text):
        yield dict(_ITEM.findall(found[0]))


def _json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _point(record: dict) -> Point | None:
    loss, cause = _number(record.get("loss")), record.get("cause")
    if loss is None:
        return None
    others = {name: _number(record.get(name)) for name in ("grad_norm", "learning_rate", "step")}
    return Point(loss, **others, cause=cause if isinstance(cause, str) else None)


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None

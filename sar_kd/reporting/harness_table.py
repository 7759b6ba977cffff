"""What lm-evaluation-harness has found of a run's models, for its pages; in `summary.json` under `HARNESS`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sar_kd.runtime.files import as_float

HARNESS = "harness"

_Z = 1.959964
"""The 97.5 % quantile of the normal distribution"""


def harness_scores(found: Any) -> Iterator[tuple[str, str, str, float, float, dict]]:
    """Model, task, metric, value, standard error and the task's entry; none of what is not as `sar-kd eval` writes it.

    found: {model: {task: {"metrics": {metric: {"value", "stderr"}}, "num_questions", ...}}}
    """
    for model, tasks in _items(found):
        for task, entry in _items(tasks):
            for metric, values in _items(entry.get("metrics") if isinstance(entry, dict) else None):
                if isinstance(values, dict):
                    yield model, task, metric, as_float(values.get("value")), as_float(values.get("stderr")), entry


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def harness_rows(found: Any) -> list[tuple[str, str, str, str, str]]:
    """Model, task, metric, value with its standard error, and questions, as text."""
    rows = []
    for model, task, metric, value, stderr, entry in harness_scores(found):
        shown = f"{value:.4f}" + _uncertainty(value, stderr, as_float(entry.get("num_questions")))
        name = f"{task}, chat template" if entry.get("apply_chat_template") is True else task
        rows.append((model, name, metric, shown, str(entry.get("num_questions", ""))))
    return rows


def _uncertainty(value: float, stderr: float, count: float) -> str:
    """The standard error; where every answer was right, or none, so that it is 0, Wilson's 95 % interval of a share.

    0 of n: from 0 to z^2 / (n + z^2);   n of n: from n / (n + z^2) to 1;   z = 1.96

    Source: Wilson, 1927; Brown, Cai and DasGupta, 2001 (Statistical Science 16), section 3
    """
    if math.isnan(stderr):
        return ""
    if stderr or value not in (0.0, 1.0) or not count > 0:
        return f" +- {stderr:.4f}"
    width = _Z**2 / (count + _Z**2)
    low, high = (0.0, width) if value == 0 else (1 - width, 1.0)
    return f", 95 %: {low:.2f} to {high:.2f}"

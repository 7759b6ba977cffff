"""What lm-evaluation-harness has found of a run's models, for its pages; in `summary.json` under `HARNESS`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sar_kd.runtime.files import as_float

HARNESS = "harness"


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
        shown = f"{value:.4f}" + ("" if math.isnan(stderr) else f" +- {stderr:.4f}")
        name = f"{task}, chat template" if entry.get("apply_chat_template") is True else task
        rows.append((model, name, metric, shown, str(entry.get("num_questions", ""))))
    return rows

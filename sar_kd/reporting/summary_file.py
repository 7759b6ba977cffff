"""`summary.json` of a run that has ended, with what is found out later: by an export, or by an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from sar_kd.errors import UsageError
from sar_kd.reporting.model_card import CardWriter
from sar_kd.reporting.report import find_report_writer
from sar_kd.runtime.files import atomic_write, json_safe


def amend_summary(folder: Path, entries: dict) -> None:
    """Add entries to a run's summary; write the student's card again, and the report where matplotlib is.

    Raises: UsageError if the run has no summary, which it writes when it ends
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        summary = None
    if not isinstance(summary, dict):
        raise UsageError(f"{folder}: its run has not ended ({path.name} is missing or damaged)")
    atomic_write(path, json.dumps({**summary, **json_safe(entries)}, indent=2) + "\n")
    CardWriter(folder).log_summary(summary)
    for writer in find_report_writer(folder)[0]:
        writer.log_summary(summary)

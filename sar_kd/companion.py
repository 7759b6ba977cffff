"""What takes part in a run beside its models: the calendar asks it, and by default it has nothing to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sar_kd.data import Batch
from sar_kd.step import StepReport


class Companion:
    """The trainer's questions, each with the answer of a companion that has none."""

    def __init__(self):
        self.kept: dict = {}
        """Plain values that a resumed run must know; they travel in the checkpoint"""

    def begin(self) -> list[str]:
        """Before the first step: lines to show."""
        return []

    def note(self, step: int, report: StepReport, micro_batches: Sequence[Batch]) -> tuple[list[str], str | None]:
        """After an attempt: lines to show, and why the run must stop, None if it need not."""
        return [], None

    def finish(self, student_folder: Path) -> list[str]:
        """After the last step, when the best student is saved: lines to show."""
        return []

    def summary(self) -> dict:
        """For `summary.json`."""
        return {}

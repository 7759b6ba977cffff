"""What takes part in a run beside its models: the calendar asks it, and by default it has nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def figures(self) -> dict:
        """Of the last attempt, for its record in `metrics.jsonl`."""
        return {}

    def finish(self, student_folder: Path) -> list[str]:
        """After the last step, when the best student is saved: lines to show."""
        return []

    def summary(self) -> dict:
        """For `summary.json`."""
        return {}


class Companions(Companion):
    """All that take part in a run, as the calendar sees them: in order, one after the other."""

    def __init__(self, members: Sequence[Companion] = ()):
        super().__init__()
        self._members = members

    def begin(self) -> list[str]:
        """See `Companion`."""
        return [line for member in self._members for line in member.begin()]

    def look(self, step: int, report: StepReport, window: Callable[[], list[Batch]]) -> tuple[list[str], str | None]:
        """As `note`, with the attempt's micro-batches made when there is someone to see them."""
        return self.note(step, report, window()) if self._members else ([], None)

    def note(self, step: int, report: StepReport, micro_batches: Sequence[Batch]) -> tuple[list[str], str | None]:
        """See `Companion`; the first reason to stop."""
        found = [member.note(step, report, micro_batches) for member in self._members]
        lines = [line for said, _ in found for line in said]
        return lines, next((reason for _, reason in found if reason), None)

    def figures(self) -> dict:
        """See `Companion`."""
        return {name: value for member in self._members for name, value in member.figures().items()}

    def finish(self, student_folder: Path) -> list[str]:
        """See `Companion`."""
        return [line for member in self._members for line in member.finish(student_folder)]

    def summary(self) -> dict:
        """See `Companion`."""
        return {name: value for member in self._members for name, value in member.summary().items()}

    def all_kept(self) -> list[dict]:
        """What each of them keeps."""
        return [member.kept for member in self._members]

    def take_up(self, kept: Sequence[dict]) -> None:
        """Give each of them back what it kept."""
        for member, own in zip(self._members, kept, strict=True):
            member.kept = own

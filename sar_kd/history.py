"""A run folder read back: its settings, its steps and validations, and its summary if it has ended."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sar_kd.files import complete_lines, number_of
from sar_kd.settings import UsageError

_STEP = '{"event": "step"'  # how each line of a step begins


@dataclass(frozen=True)
class History:
    """What a run has written so far."""

    folder: Path
    config: dict
    start: dict
    """Student and teacher before the first step; {} in a run that has not got so far"""
    steps: list[dict]
    evaluations: list[dict]
    summary: dict
    """{} while the run goes on"""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    def setting(self, name: str) -> object:
        """The value of a flag; None in a run of a version that did not have it."""
        sections = (section for section in self.config.values() if isinstance(section, dict))
        return next((section[name] for section in sections if name in section), None)

    def settings(self) -> dict[str, object]:
        """Every flag with its value."""
        return {name: value for part in self.config.values() if isinstance(part, dict) for name, value in part.items()}

    def validations(self) -> list[dict]:
        """The student before the first step, where that is known, and at each validation."""
        return [*([{"step": 0, **self.start}] if "val_ppl" in self.start else []), *self.evaluations]

    def column(self, records: Iterable[dict], key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure, where a record has it; nan where it is not finite."""
        pairs = [(record["step"], number_of(record[key])) for record in records if key in record]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_history(folder: Path, with_steps: bool = True) -> History:
    """Read what a run, finished or not, has left in its folder; without its steps, of which there may be very many.

    Raises: UsageError if the folder holds no run, or one that cannot be read
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder}: holds no run ({path.name} is missing)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        summary_file = folder / "summary.json"
        summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}
        lines = complete_lines(folder / "metrics.jsonl")
        records = [json.loads(line) for line in lines if with_steps or not line.startswith(_STEP)]
        of_kind = {kind: [r for r in records if r["event"] == kind] for kind in ("start", "step", "evaluation")}
        if not isinstance(config, dict) or not isinstance(summary, dict):
            raise ValueError("config.json or summary.json holds no object")
        if any(not isinstance(record["step"], int) for kind in of_kind.values() for record in kind):
            raise ValueError("metrics.jsonl holds a step that is no number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder}: what its run has written cannot be read ({error})") from None
    start = of_kind["start"][-1] if of_kind["start"] else {}
    return History(folder, config, start, of_kind["step"], of_kind["evaluation"], summary)

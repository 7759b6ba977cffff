"""A run folder read back: its settings, its steps and validations, and its summary if it has ended.

A run in words: what came of it, what was refused and why, and what to try next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sar_kd.errors import UsageError
from sar_kd.runtime.files import complete_lines, number_of

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


_ADVICE = {
    "overflow": "the loss scale was still finding its level, which is no fault while it is few",
    "norm": "the gradient norm was above the limit: lower the learning rate, or --skip_rule adaptive",
    "forward": "the forward was not finite: `sar-kd forensics` on this run says where",
    "gradient": "the gradient was not finite at the lowest loss scale: `sar-kd forensics` on this run says where",
    "no_targets": "those steps had no token to learn: look at the text",
}

_MANY = 0.05


def verdict_of(run: History) -> list[str]:
    """Sentences about a run, the most important first."""
    validations = run.validations()
    if not run.steps or not validations:
        return ["Nothing has been trained yet."]
    return [_outcome(run), *_quality(run, validations), *_updates(run), *_advice(run, validations)]


def _outcome(run: History) -> str:
    last, total = run.steps[-1]["step"], run.setting("train_steps")
    status = run.summary.get("status") if run.summary.get("steps") == last else None
    if status == "finished":
        return f"Finished: {last} steps."
    if status == "emergency_stop":
        return (
            f"Emergency stop at step {last}: too many NaN batches in a row. `sar-kd forensics {run.folder}` says why."
        )
    if status == "interrupted":
        return f"Interrupted after {last} of {total} steps; --resume goes on from there."
    return f"Under way: {last} of {total} steps."


def _quality(run: History, validations: list[dict]) -> list[str]:
    bits = [number_of(record.get("val_bits_per_byte")) for record in validations]
    start, last, teacher = bits[0], bits[-1], number_of(run.start.get("teacher_val_bits_per_byte"))
    if not math.isfinite(last):
        return ["The last validation is not finite."]
    if validations[0]["step"] != 0 or len(bits) < 2:
        return [f"Bits per byte on held-out text: {last:.4f}."]
    verb = "fell" if last < start else "rose" if last > start else "stayed"
    line = f"Bits per byte on held-out text {verb} from {start:.4f} to {last:.4f}"
    if teacher < start and last < start:
        line += f", {(start - last) / (start - teacher):.0%} of the way to the teacher's {teacher:.4f}"
    elif math.isfinite(teacher):
        line += f"; the teacher has {teacher:.4f}"
    return [line + "."]


def _updates(run: History) -> list[str]:
    causes = [record.get("cause") for record in run.steps if not record.get("applied")]
    applied = len(run.steps) - len(causes)
    if not causes:
        return [f"All {applied} updates were applied."]
    counts = sorted({cause: causes.count(cause) for cause in causes if cause}.items(), key=lambda item: -item[1])
    named = ", ".join(f"{cause} {count}" for cause, count in counts)
    return [f"{applied} of {len(run.steps)} updates were applied; skipped: {named}."]


def _advice(run: History, validations: list[dict]) -> list[str]:
    lines = []
    skipped = [record.get("cause") for record in run.steps if not record.get("applied")]
    for cause, advice in _ADVICE.items():
        if skipped.count(cause) > _MANY * len(run.steps):
            lines.append(f"Skipped for {cause} in {skipped.count(cause) / len(run.steps):.0%} of the steps: {advice}.")
    bits = [number_of(record.get("val_bits_per_byte")) for record in validations]
    finite = [(value, record["step"]) for value, record in zip(bits, validations, strict=True) if math.isfinite(value)]
    if len(finite) >= 3:
        best, at = min(finite)
        if finite[-1][0] > 1.01 * best:
            lines.append(f"Best at step {at} ({best:.4f}); the later steps made it worse. `student/` holds the best.")
        elif finite[-1][0] < finite[-2][0] and (finite[-2][0] - finite[-1][0]) > 0.1 * (finite[0][0] - finite[-1][0]):
            lines.append("It was still falling at the last validation: more --train_steps would help.")
    teacher = number_of(run.start.get("teacher_val_bits_per_byte"))
    if finite and teacher >= finite[0][0] and number_of(run.setting("alpha_kd")) > 0:
        lines.append("The teacher is no better than the student was on this text: it has little to teach here.")
    rewound = run.summary.get("rewound_from")
    return lines + (
        [f"It diverged at step {rewound} and went back once, at half the learning rate."] if rewound else []
    )

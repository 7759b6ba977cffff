"""A run folder read back: settings, steps, validations and summary; and what they show, in sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sar_kd.errors import UsageError
from sar_kd.runtime.files import as_float, complete_lines
from sar_kd.version import RUN_FORMAT

_STEP = '{"event": "step"'
"""The beginning of a step's line in `metrics.jsonl`"""

_ADVICE = {
    "overflow": "the loss scale was still being calibrated, which is harmless in a few steps",
    "norm": "the gradient norm was above the limit: lower the learning rate, or --skip_rule adaptive",
    "forward": "the forward was not finite: `sar-kd forensics` on this run names the module",
    "gradient": "the gradient was not finite at the lowest loss scale: `sar-kd forensics` on this run names the module",
    "no_targets": "those steps had no target token: look at the text",
}
"""By cause of a skipped step"""

_MANY_SKIPS = 0.05
"""The share of the steps above which advice is given"""


@dataclass(frozen=True)
class RunHistory:
    """What a run has written so far."""

    folder: Path
    config: dict
    start: dict
    """Validation of student and teacher before the first step; {} in a run that has not got so far"""
    steps: list[dict]
    evaluations: list[dict]
    summary: dict
    """{} while the run goes on"""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def last(self) -> dict:
        """The last validation of the student; {} before the first."""
        return (self.validations() or [{}])[-1]

    @property
    def num_applied(self) -> int:
        """Steps whose update was applied."""
        return sum(bool(record.get("applied")) for record in self.steps)

    def setting(self, name: str) -> object:
        """The value of a option; None in a run of a version without it."""
        return self.settings().get(name)

    def settings(self) -> dict[str, object]:
        """Every option with its value."""
        sections = [section for section in self.config.values() if isinstance(section, dict)]
        return {name: value for section in sections for name, value in section.items()}

    def validations(self) -> list[dict]:
        """The student before the first step, where that is known, and at each validation."""
        return [*([{"step": 0, **self.start}] if "val_ppl" in self.start else []), *self.evaluations]

    def series(self, records: Iterable[dict], key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where a record has it."""
        pairs = [(record["step"], as_float(record[key])) for record in records if key in record]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_history(folder: Path, with_steps: bool = True) -> RunHistory:
    """Read the folder of a run, finished or not. with_steps: False leaves out its steps, which may be very many.

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
        by_event = {event: [r for r in records if r["event"] == event] for event in ("start", "step", "evaluation")}
        if not isinstance(config, dict) or not isinstance(summary, dict):
            raise ValueError("config.json or summary.json holds no object")
        if any(not isinstance(record["step"], int) for records in by_event.values() for record in records):
            raise ValueError("metrics.jsonl holds a step that is no number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder}: what its run has written cannot be read ({error})") from None
    start = by_event["start"][-1] if by_event["start"] else {}
    return RunHistory(folder, config, start, by_event["step"], by_event["evaluation"], summary)


def findings_of(run: RunHistory) -> list[str]:
    """Sentences about a run, the most important first."""
    validations, own_format = run.validations(), run.config.get("format", 1)
    lines = [f"Its run format is {own_format}, not {RUN_FORMAT}: values that it does not have are shown as nan."]
    lines = [] if own_format == RUN_FORMAT else lines
    if not run.steps or not validations:
        return [*lines, "Nothing has been trained yet."]
    return [*lines, _status(run), *_quality(run, validations), *_updates(run), *_advice(run, validations)]


def _status(run: RunHistory) -> str:
    last, total = run.steps[-1]["step"], run.setting("train_steps")
    status = run.summary.get("status") if run.summary.get("steps") == last else None
    if status == "finished":
        return f"Finished: {last} steps."
    if status == "emergency_stop":
        return (
            f"Emergency stop at step {last}: too many NaN batches in a row. `sar-kd forensics {run.folder}` shows why."
        )
    if status == "interrupted":
        return f"Interrupted after {last} of {total} steps; --resume goes on from there."
    return f"Under way: {last} of {total} steps."


def _quality(run: RunHistory, validations: list[dict]) -> list[str]:
    bits = [as_float(record.get("val_bits_per_byte")) for record in validations]
    start, last, teacher = bits[0], bits[-1], as_float(run.start.get("teacher_val_bits_per_byte"))
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


def _updates(run: RunHistory) -> list[str]:
    causes = _skip_causes(run)
    if not causes:
        return [f"All {run.num_applied} updates were applied."]
    counts = sorted({cause: causes.count(cause) for cause in causes if cause}.items(), key=lambda item: -item[1])
    skipped = ", ".join(f"{cause} {count}" for cause, count in counts)
    return [f"{run.num_applied} of {len(run.steps)} updates were applied; skipped: {skipped}."]


def _skip_causes(run: RunHistory) -> list[str | None]:
    return [record.get("cause") for record in run.steps if not record.get("applied")]


def _advice(run: RunHistory, validations: list[dict]) -> list[str]:
    lines, causes = [], _skip_causes(run)
    for cause, advice in _ADVICE.items():
        if causes.count(cause) > _MANY_SKIPS * len(run.steps):
            lines.append(f"Skipped for {cause} in {causes.count(cause) / len(run.steps):.0%} of the steps: {advice}.")
    bits = [(as_float(record.get("val_bits_per_byte")), record["step"]) for record in validations]
    finite = [pair for pair in bits if math.isfinite(pair[0])]
    if len(finite) >= 3:
        (best, best_step), (first, _), (previous, _), (last, _) = min(finite), finite[0], finite[-2], finite[-1]
        if last > 1.01 * best:
            lines.append(
                f"Best at step {best_step} ({best:.4f}); the later steps made it worse. `student/` holds the best."
            )
        elif last < previous and previous - last > 0.1 * (first - last):
            lines.append("It was still falling at the last validation: more --train_steps would help.")
    teacher = as_float(run.start.get("teacher_val_bits_per_byte"))
    if finite and teacher >= finite[0][0] and as_float(run.setting("alpha_kd")) > 0:
        lines.append("The teacher is no better than the student was on this text: it has little to teach here.")
    if rewound := run.summary.get("rewound_from"):
        lines.append(f"It diverged at step {rewound} and went back once, at half the learning rate.")
    return lines

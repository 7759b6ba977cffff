"""A run folder read back: settings, steps, validations and summary; and what they show, in sentences."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from sar_kd.config.config_file import options_in
from sar_kd.errors import UsageError
from sar_kd.reporting.step_lines import dropped_share, why_dropped
from sar_kd.runtime.console import count_of, format_share
from sar_kd.runtime.files import as_float
from sar_kd.runtime.run_folder import saved_student
from sar_kd.version import RUN_FORMAT

LOG = "log.txt"
"""The run's lines, those with --verbose too"""

SAMPLES = "samples.json"
"""Prompts, and how the models of the run continue them"""

_STEP = '{"event": "step"'
"""The beginning of a step's line in `metrics.jsonl`"""

_STEP_NUMBER = re.compile(r'"step": (\d+)')

_SKIPPED = re.compile(r'"applied": false, "cause": "(\w+)"')

_MAX_STEPS = 20_000
"""Steps whose metrics are kept; of a longer run every second one, third one, and so on"""

_MAX_LINES = 500
"""Lines of `log.txt` that are shown"""

_MUCH_WORSE = 1.2
"""Bits per byte at the end, over the best ones, that point to a learning rate that is too high"""

_ADVICE = {
    "overflow": "the loss scale was still being calibrated, which is harmless in a few steps",
    "norm": "the gradient norm was above the limit: lower the learning rate",
    "forward": "the forward was not finite: `crash/crash.md` in the run folder names the module",
    "teacher": "the teacher was left out at every position: `crash/crash.md` in the run folder says why",
    "gradient": "the gradient was not finite at the lowest loss scale: `crash/crash.md` in the run folder names the "
    "module",
    "no_targets": "those steps had no target token: look at the text",
}
"""By cause of a skipped step"""

_RESPONSE_ALARMS = {
    "repetition": "came to repeat themselves",
    "length": "grew by more than half",
    "cut_off": "came to end less often",
}
"""By name in `response_alarms`: what the student's responses did"""

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
    """Of a long run not all of them: one of `stride`, and the last"""
    evaluations: list[dict]
    summary: dict
    """{} while the run goes on"""
    num_steps: int = 0
    """All steps"""
    stride: int = 1
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """Every skipped step and its cause"""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def last(self) -> dict:
        """The last validation of the student; {} before the first."""
        return (self.validations() or [{}])[-1]

    @property
    def best(self) -> dict:
        """The validation with the lowest loss; {} before the first."""
        losses = [as_float(record.get("val_loss")) for record in self.validations()]
        ranked = [math.inf if math.isnan(loss) else loss for loss in losses]
        return self.validations()[ranked.index(min(ranked))] if ranked else {}

    @property
    def num_applied(self) -> int:
        """Steps whose update was applied."""
        return self.num_steps - len(self.skipped)

    @property
    def environment(self) -> dict:
        """Versions, devices, commit, command and date; {} in a run of a version that did not write them."""
        found = self.config.get("environment")
        return found if isinstance(found, dict) else {}

    def setting(self, name: str) -> object:
        """The value of an option; None in a run of a version without it."""
        return self.settings().get(name)

    def settings(self) -> dict[str, object]:
        """Every option with its value."""
        return options_in(self.config)

    @cached_property
    def control(self) -> RunHistory | None:
        """The run by cross-entropy alone that belongs to this one, without its steps; None without a control."""
        if not self.models():
            return None
        try:
            folder = self.folder.resolve()
            return read_history(folder.with_name(f"{folder.name}-control"), with_steps=False)
        except UsageError:  # it was deleted, or moved
            return None

    def samples(self) -> list[dict]:
        """Prompts of the held-out text and how the models continue them; [] where the run wrote none."""
        try:
            found = json.loads((self.folder / SAMPLES).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return []
        return found if isinstance(found, list) and all(isinstance(each, dict) for each in found) else []

    def verdict(self) -> list[str]:
        """What the control shows that the teacher was worth, in sentences; [] without a control."""
        found = self.summary.get("comparison")
        sentences = found.get("sentences") if isinstance(found, dict) else None
        return list(map(str, sentences)) if isinstance(sentences, list) else []

    def models(self) -> list[tuple[str, float, float]]:
        """Start, control, distilled and teacher: name, perplexity and bits per byte; [] without a finished control."""
        control = self.summary.get("control")
        if not isinstance(control, dict) or control.get("status") != "finished" or "best_step" not in control:
            return []
        start, best = ("val_ppl_start", "val_bits_per_byte_start"), ("val_ppl_best", "val_bits_per_byte_best")
        teacher = "teacher_val_ppl", "teacher_val_bits_per_byte"
        found = (
            ("start", self.summary, start),
            (f"control: cross-entropy alone (step {control['best_step']})", control, best),
            (f"distilled (step {self.summary.get('best_step')})", self.summary, best),
            ("teacher", self.summary, teacher),
        )
        return [(name, as_float(values.get(ppl)), as_float(values.get(bits))) for name, values, (ppl, bits) in found]

    def log_head(self) -> list[str]:
        """The lines of `log.txt` up to the first step, those that the terminal shows with --verbose too."""
        path = self.folder / LOG
        if not path.is_file():
            return []
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.rstrip("\n") for _, line in zip(range(_MAX_LINES), file, strict=False)]
        end = next((i for i, line in enumerate(lines) if line.startswith("Step ")), len(lines))
        return lines[:end]

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
        records, skipped, num_steps, stride = _read_metrics(folder / "metrics.jsonl", with_steps)
        by_event = {event: [r for r in records if r["event"] == event] for event in ("start", "step", "evaluation")}
        if not isinstance(config, dict) or not isinstance(summary, dict):
            raise ValueError("config.json or summary.json holds no object")
        if any(not _is_step(record["step"]) for records in by_event.values() for record in records):
            raise ValueError("metrics.jsonl holds a step that is no number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder}: what its run has written cannot be read ({error})") from None
    start = by_event["start"][-1] if by_event["start"] else {}
    steps, evaluations = by_event["step"], by_event["evaluation"]
    return RunHistory(folder, config, start, steps, evaluations, summary, num_steps, stride, skipped)


def _is_step(value: object) -> bool:
    """Could this be the number of a step? One beyond 2^53 is not a float's, as charts need it."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _read_metrics(path: Path, with_steps: bool) -> tuple[list[dict], list[tuple[int, str]], int, int]:
    """The records of `metrics.jsonl`, thinned; every skipped step and its cause; the number of steps; the stride."""
    records: list[dict] = []
    skipped: list[tuple[int, str]] = []
    num_steps, stride, last = 0, _stride(path), ""
    for line in _lines(path):
        if not line.startswith(_STEP):
            records.append(json.loads(line))
            continue
        if not with_steps:
            continue
        num_steps += 1
        if stride == 1 or num_steps % stride == 1:
            record, last = json.loads(line), ""
            records.append(record)
            if not record.get("applied"):
                skipped.append((record["step"], str(record.get("cause"))))
        else:
            last = line  # of most steps nothing is parsed but whether they were skipped
            if (found := _SKIPPED.search(line)) and (number := _STEP_NUMBER.search(line)):
                skipped.append((int(number[1]), found[1]))
    return records + ([json.loads(last)] if last else []), skipped, num_steps, stride


def _lines(path: Path) -> Iterator[str]:
    """The complete lines of a file; none if there is no file."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from (line for line in file if line.endswith("\n"))


def _stride(path: Path) -> int:
    """Of how many steps one is kept, estimated from the file's size and its first lines."""
    head = [len(line) for _, line in zip(range(100), _lines(path), strict=False)]
    return max(1, round(path.stat().st_size / (sum(head) / len(head)) / _MAX_STEPS)) if head else 1


def findings_of(run: RunHistory, with_status: bool = True) -> list[str]:
    """Sentences about a run, the most important first. with_status: begin with how far it is, and how it ended"""
    validations, own_format = run.validations(), run.config.get("format", 1)
    lines = [f"Its run format is {own_format}, not {RUN_FORMAT}: values that it does not have are shown as nan."]
    lines = [] if own_format == RUN_FORMAT else lines
    if not run.num_steps or not validations:
        return [*lines, "Nothing has been trained yet."]
    status = [*([_status(run)] if with_status else []), *_control_status(run)]
    return [*lines, *run.verdict(), *status, *_quality(run, validations), *_updates(run), *_advice(run, validations)]


def headline_of(run: RunHistory) -> tuple[str, list[str]]:
    """The sentence about a run that matters most, and the other findings: what the teacher was worth, else how far the
    student came; of a run that has not finished, how far it is, and why it ended.
    """
    findings = findings_of(run)
    if run.summary.get("status") == "finished" and not run.verdict() and len(findings) > 1:
        status = next((i for i, line in enumerate(findings) if line.startswith("Finished: ")), len(findings))
        findings[status : status + 2] = findings[status : status + 2][::-1]
    return findings[0], findings[1:]


def _status(run: RunHistory) -> str:
    last, total = run.steps[-1]["step"], run.setting("train_steps")
    status = run.summary.get("status") if run.summary.get("steps") == last else None
    if status == "finished":
        return f"Finished: {count_of(last, 'step')}."
    if status == "emergency_stop":
        return f"Emergency stop at step {last}: {run.summary.get('stop_reason', 'too many NaN batches in a row')}"
    if status == "interrupted":
        return f"Interrupted after {last} of {total} steps; --resume goes on from there."
    return f"Under way: {last} of {total} steps."


def _control_status(run: RunHistory) -> list[str]:
    """What became of a control that has not finished."""
    control = run.summary.get("control")
    if not isinstance(control, dict) or control.get("status") == "finished":
        return []
    if control.get("status") == "interrupted":
        return [f"Its control was interrupted after {control.get('steps')} steps; --resume goes on with it."]
    return [f"Its control has come to no result: {control.get('stop_reason', control.get('status'))}"]


def _quality(run: RunHistory, validations: list[dict]) -> list[str]:
    bits = [as_float(record.get("val_bits_per_byte")) for record in validations]
    start, last, teacher = bits[0], bits[-1], as_float(run.start.get("teacher_val_bits_per_byte"))
    if not math.isfinite(last):
        return ["The last validation is not finite."]
    if validations[0]["step"] != 0 or len(bits) < 2:
        return [f"Bits per byte on held-out text: {last:.4f}."]
    if f"{last:.4f}" == f"{start:.4f}":
        line = f"Bits per byte on held-out text stayed at {last:.4f}"
    else:
        line = f"Bits per byte on held-out text {'fell' if last < start else 'rose'} from {start:.4f} to {last:.4f}"
    if teacher <= last < start:
        line += f", {(start - last) / (start - teacher):.0%} of the way to the teacher's {teacher:.4f}"
    elif last < teacher < start:
        line += f", below the teacher's {teacher:.4f}"
    elif math.isfinite(teacher):
        line += f"; the teacher has {teacher:.4f}"
    return [line + "."]


def _updates(run: RunHistory) -> list[str]:
    if not run.skipped:
        return [f"All {run.num_applied:,} updates were applied." if run.num_applied > 1 else "The update was applied."]
    counts = Counter(cause for _, cause in run.skipped).most_common()
    skipped = ", ".join(f"{cause} {count}" for cause, count in counts)
    if not run.num_applied:
        return [f"No update was applied, so the student is as it was; skipped: {skipped}."]
    return [f"{run.num_applied:,} of {run.num_steps:,} updates were applied; skipped: {skipped}."]


def _advice(run: RunHistory, validations: list[dict]) -> list[str]:
    lines, causes = [], Counter(cause for _, cause in run.skipped)
    for cause, advice in _ADVICE.items():
        if causes[cause] > _MANY_SKIPS * run.num_steps:
            lines.append(f"Skipped for {cause} in {causes[cause] / run.num_steps:.0%} of the steps: {advice}.")
    counts = [run.summary] if run.summary else run.steps
    if share := dropped_share(counts):
        why, remedy = why_dropped(counts)
        lines.append(
            f"The teacher was left out at {format_share(share)} of its positions ({why}), where the student learned "
            f"from the text alone: {remedy}."
        )
    alarms = Counter(name for record in run.steps for name in record.get("response_alarms") or ())
    for name, count in alarms.items():
        lines.append(
            f"The student's responses {_RESPONSE_ALARMS.get(name, name)} (so in {count_of(count, 'step')}): a lower "
            "--student_lr or --on_policy_fraction, or weight for --alpha_ce, may help."
        )
    bits = [(as_float(record.get("val_bits_per_byte")), record["step"]) for record in validations]
    finite = [pair for pair in bits if math.isfinite(pair[0])]
    if len(finite) >= 2 and min(finite)[1] == 0 and run.num_applied:
        lines.append(
            f"No validation was better than the one before the first step: `{saved_student(run.folder).name}/` holds "
            "the student as it was."
        )
    elif len(finite) >= 3:
        (best, best_step), (first, _), (previous, _), (last, _) = min(finite), finite[0], finite[-2], finite[-1]
        if last > 1.01 * best:
            lines.append(
                f"Best at step {best_step} ({best:.4f}); the later steps made it worse. "
                f"`{saved_student(run.folder).name}/` holds the best."
            )
        elif last < previous and previous - last > 0.1 * (first - last) and finite[-1] == bits[-1]:
            lines.append("It was still falling at the last validation: more --train_steps would help.")
    has_stopped = run.summary.get("status") == "emergency_stop"  # and has named its cause
    if finite and run.num_applied and not has_stopped and not bits[-1][0] <= _MUCH_WORSE * min(finite)[0]:
        rate = as_float(run.setting("student_lr"))
        lines.append(f"The updates made it much worse: a lower --student_lr may help (it is {rate:g}).")
    teacher = as_float(run.start.get("teacher_val_bits_per_byte"))
    teaches_its_prompt = run.setting("teacher_system_prompt") not in (None, "")  # not to be better on this text
    if finite and teacher >= finite[0][0] and as_float(run.setting("alpha_kd")) > 0 and not teaches_its_prompt:
        lines.append("The teacher is no better than the student was on this text: it has little to teach here.")
    if rewound := run.summary.get("rewound_from"):
        lines.append(f"It diverged at step {rewound} and went back once, at half the learning rate.")
    return lines

"""The pattern in a log of losses and gradient norms, its likely cause, and what to try.

A log is what a Trainer prints, its `trainer_state.json`, or a run's `metrics.jsonl`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sar_kd.config.config_file import options_in
from sar_kd.errors import UsageError
from sar_kd.reporting.diagnoses import DIAGNOSES, Diagnosis
from sar_kd.reporting.step_lines import dropped_share, why_dropped
from sar_kd.runtime.console import format_share

_FLAT = 1e-3
"""A loss that varies by less, relative to the first one, does not move"""

_RISE = 1.5
"""A mean loss at the end that is so many times the first one has risen"""

_NORM_RISE = 10.0

_NO_TEACHER = 0.5
"""A step in which a larger share of the teacher was left out is one without distillation"""

_LOG_NAMES = ("metrics.jsonl", "trainer_state.json")

_BRACES = re.compile(r"\{[^{}]*\}")
"""Linear in the text: what is between braces is searched for a loss afterwards"""

_ITEM = re.compile(r"['\"](\w+)['\"]\s*:\s*['\"]?([-+.\w]+)")

_SCORE = re.compile(r"\b(accuracy|answer_rate)['\"]?\s*[=:]\s*['\"]?([-+.\w]+)")


@dataclass(frozen=True)
class LoggedStep:
    """One line of a log; None for a value that it does not have."""

    loss: float
    grad_norm: float | None = None
    cause: str | None = None
    """Why the update was skipped, as in `guards.CAUSES`; in this program's own files only"""
    dropped_share: float = 0.0
    """Of the teacher's positions, those left out of the distillation; likewise"""
    why_dropped: tuple[str, str] = ("", "")
    """Why they were, and what to try"""

    @property
    def has_bad_norm(self) -> bool:
        """Is the gradient norm nan or inf?"""
        return self.grad_norm is not None and not math.isfinite(self.grad_norm)

    @property
    def is_nan(self) -> bool:
        """Is the loss not finite? A Trainer prints 0 for a loss that was NaN all along."""
        return not math.isfinite(self.loss) or (self.loss == 0.0 and self.has_bad_norm)

    @property
    def has_no_labels(self) -> bool:
        """Is the loss 0, and the gradient norm 0, nan or missing?"""
        return self.loss == 0.0 and (not self.grad_norm or self.has_bad_norm)


@dataclass(frozen=True)
class TrainingLog:
    """A log as it was read."""

    path: Path
    steps: tuple[LoggedStep, ...]
    is_own: bool
    """It is a `metrics.jsonl` of this program, in which a loss of 0 is a loss of 0"""
    scores: dict[str, float]
    """The last `accuracy` and `answer_rate` in the log"""
    has_unscale_error: bool
    """It holds PyTorch's error about unscaling float16 gradients"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The options of the run by name, where this program's `config.json` lies beside the log"""
    uses_float16: bool = True
    """Was a loss scale in use, or is that not known?"""


def diagnose(log: TrainingLog) -> Diagnosis:
    """The first pattern that the log shows. Of this program's runs the remedy names its own options, with the values
    that the run had, and nothing that it did already.
    """
    found = DIAGNOSES[next((name for name, matches in _RULES.items() if matches(log)), "healthy")]
    remedy = _own_remedy(found.name, log) if log.is_own else ""
    cause = _OWN_CAUSES.get(found.name, found.cause) if log.is_own else found.cause
    reasons = Counter(step.why_dropped for step in log.steps if step.dropped_share).most_common(1)
    if found.name in _LEFT_OUT and reasons and "infinite" in reasons[0][0][0]:
        cause, remedy = reasons[0][0]
    return dataclasses.replace(found, cause=cause, remedy=remedy or found.remedy)


_LEFT_OUT = ("no teacher", "teacher left out")


_OWN_CAUSES = {"exploding": "the updates are too large: the learning rate is too high"}


def _own_remedy(name: str, log: TrainingLog) -> str:
    """What to try in a run of this program; '' where the general remedy fits."""
    rate, clip, skip_rule = (log.settings.get(key) for key in ("student_lr", "max_grad_norm", "skip_rule"))
    rate = log.settings.get("learning_rate") if rate is None else rate
    lower_rate = "a lower --student_lr" + (f" (it is {rate:g})" if isinstance(rate, (int, float)) else "")
    to_float32 = "--model_dtype float32, or bfloat16 where the card has it" if log.uses_float16 else ""
    if name == "exploding":
        is_loose = isinstance(clip, (int, float)) and clip > 1.0
        return lower_rate + (f", or --max_grad_norm 1 (it is {clip:g})" if is_loose else "")
    if name in _LEFT_OUT:
        return to_float32 or "look at the teacher's files, and at `crash/crash.md` in the run folder"
    if name in ("forward overflow", "backward overflow"):
        return f"{to_float32 or lower_rate}; `crash/crash.md` in the run folder names the module and the documents"
    if name == "norm skips" and skip_rule == "adaptive":
        return lower_rate
    if name == "no gradient":
        return "look at --loss_clamp_style, --logit_clamp_style and the loss weights (--alpha_ce, --alpha_kd)"
    if name == "no movement":
        return lower_rate.replace("lower", "higher")
    return ""


def diagnosis_lines(log: TrainingLog) -> list[str]:
    """The diagnosis as text."""
    found, steps = diagnose(log), log.steps
    lines = [f"{log.path}: {len(steps)} lines with a loss"]
    if steps:
        bad = Counter(
            "0" if s.loss == 0.0 else "nan or inf" for s in steps if s.loss == 0.0 or not math.isfinite(s.loss)
        )
        counts = ", ".join(f"{count} of them {kind}" for kind, count in bad.items())
        lines[0] += f", from {steps[0].loss:g} to {steps[-1].loss:g}" + (f" ({counts})" if counts else "")
    if any(step.dropped_share for step in steps):
        shares = [step.dropped_share for step in steps]
        lines += [
            f"Teacher left out: {format_share(sum(shares) / len(shares))} of its positions, in "
            f"{sum(map(bool, shares)):,} steps; all of them in {shares.count(1.0):,}"
        ]
    lines += [f"Pattern: {found.pattern}"]
    if found.name == "exploding":
        lines += _growth(log)
    lines += [f"Likely cause: {found.cause}", f"What to try: {found.remedy}"]
    return lines + ([f"Reported in: {found.reports}"] if found.reports else [])


def _growth(log: TrainingLog) -> list[str]:
    """How loss and norm grew, in numbers: from the lowest to the last finite value behind it."""
    lines = []
    for name in ("loss", "grad_norm"):
        values = [(i, value) for i, step in enumerate(log.steps, 1) if (value := getattr(step, name)) is not None]
        finite = [(i, value) for i, value in values if math.isfinite(value) and value]
        low, last = min(finite, key=lambda pair: pair[1], default=None), finite[-1] if finite else None
        if low and last and last[1] > _RISE * low[1]:
            lines.append(f"Growth: {name} {low[1]:.4g} in line {low[0]}, {last[1]:.4g} in line {last[0]}")
    first_bad = next((i for i, step in enumerate(log.steps, 1) if step.is_nan or step.has_bad_norm), None)
    return lines + ([f"First line that is not finite: {first_bad}"] if first_bad else [])


def _share(log: TrainingLog, holds: Callable[[LoggedStep], bool]) -> float:
    """The share of the steps for which this holds; 0 without steps."""
    return sum(map(holds, log.steps)) / len(log.steps) if log.steps else 0.0


def _start_of_tail(steps: Sequence[LoggedStep], holds: Callable[[LoggedStep], bool]) -> int:
    """The first of the last steps for all of which this holds; the number of steps if it does not for the last one."""
    start = len(steps)
    while start and holds(steps[start - 1]):
        start -= 1
    return start


def _skipped_for(cause: str, log: TrainingLog) -> bool:
    return _share(log, lambda step: step.cause == cause) > 0.5


def _ends_in_nan(log: TrainingLog) -> bool:
    return 0 < _start_of_tail(log.steps, lambda step: step.is_nan) < len(log.steps)


def _explodes(log: TrainingLog) -> bool:
    """Is the loss much higher at the end than at the start, or was it rising when it became nan?"""
    finite = [step.loss for step in log.steps if math.isfinite(step.loss) and step.loss]
    norms = [step.grad_norm for step in log.steps if step.grad_norm and math.isfinite(step.grad_norm)]
    if not finite:
        return False
    late = finite[-max(1, len(finite) // 5) :]
    rises = sum(late) / len(late) > max(_RISE * finite[0], min(finite) + 1.0)
    norm_rises = len(norms) > 1 and norms[-1] > _NORM_RISE * norms[0]
    # A run of this program refuses updates that are NaN, so its weights must have become too large instead.
    return rises or (_ends_in_nan(log) and (norm_rises or log.is_own or finite[-1] > _RISE * min(finite)))


def _is_flat(log: TrainingLog) -> bool:
    losses = [step.loss for step in log.steps]
    return len(losses) >= 5 and all(map(math.isfinite, losses)) and max(losses) - min(losses) <= _FLAT * abs(losses[0])


_RULES: dict[str, Callable[[TrainingLog], bool]] = {
    "half weights": lambda log: log.has_unscale_error,
    "no labels": lambda log: _skipped_for("no_targets", log)
    or _share(log, lambda step: step.loss == 0.0 and step.grad_norm in (0.0, None)) == 1.0,
    "no teacher": lambda log: (
        _share(log, lambda step: step.cause == "teacher" or step.dropped_share > _NO_TEACHER) > 0.5
    ),
    "norm skips": lambda log: _skipped_for("norm", log),
    "forward overflow": lambda log: (
        bool(log.steps) and log.steps[0].is_nan and _share(log, lambda step: step.is_nan) > 0.5
    ),
    "exploding": _explodes,
    "weights became nan": _ends_in_nan,
    "some labels missing": lambda log: 0 < _share(log, lambda step: step.has_no_labels) < 1,
    "loss lost": lambda log: len(log.steps) > 2 and _start_of_tail(log.steps, lambda step: step.loss == 0.0) == 1,
    "backward overflow": lambda log: _share(log, lambda step: step.has_bad_norm) > 0.5,
    "no gradient": lambda log: _share(log, lambda step: step.grad_norm == 0.0) > 0.5,
    "no movement": _is_flat,
    "no answers": lambda log: log.scores.get("answer_rate") == 0.0,
    "wrong answers": lambda log: log.scores.get("accuracy") == 0.0,
    "teacher left out": lambda log: any(step.dropped_share for step in log.steps),
    "calibration": lambda log: any(step.has_bad_norm for step in log.steps),
}  # fmt: skip
"""The test of each pattern, in the order in which they are tried"""


def read_log(path: Path) -> TrainingLog:
    """Read a log file, or the one in a run's or a checkpoint's folder.

    Raises: UsageError if there is none, or it holds no loss
    """
    if path.is_dir():
        path = next((path / name for name in _LOG_NAMES if (path / name).is_file()), path)
    if not path.is_file():
        raise UsageError(f"explain {path}: no such log; give a file, or a folder that holds {' or '.join(_LOG_NAMES)}")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"explain {path}: cannot be read ({error.strerror})") from None
    records = _records(text)
    is_own = any(record.get("event") == "step" for record in records)
    settings = _settings(path.with_name("config.json")) if is_own else {}
    scales = [_number(record.get("loss_scale")) for record in records]
    uses_float16 = settings.get("model_dtype") != "float32" and any(scale != 1.0 for scale in scales)
    steps = tuple(step for record in records if (step := _logged_step(record)) is not None)
    scores = {name: number for name, value in _SCORE.findall(text) if (number := _number(value)) is not None}
    has_unscale_error = "Attempting to unscale FP16 gradients" in text
    if not steps and not has_unscale_error:
        raise UsageError(
            f"explain {path}: holds no loss; give lines as {{'loss': 2.27, 'grad_norm': 1.55}}, {_LOG_NAMES[1]}, or "
            "the folder of a run"
        )
    return TrainingLog(path, steps, is_own, scores, has_unscale_error, settings, uses_float16)


def _settings(path: Path) -> dict:
    """The options in a run's `config.json`, by name; {} if it cannot be read."""
    try:
        config = _json(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}
    return options_in(config) if isinstance(config, dict) else {}


def _records(text: str) -> list[dict]:
    whole = _json(text)
    if isinstance(whole, dict) and isinstance(whole.get("log_history"), list):
        return [record for record in whole["log_history"] if isinstance(record, dict)]
    lines = [_json(line) for line in text.splitlines()]
    own = [line for line in lines if isinstance(line, dict) and line.get("event") == "step"]
    return own or list(_printed_records(text))


def _printed_records(text: str) -> Iterator[dict]:
    """The dicts that a Trainer prints, in which nan is not JSON; newer versions print their values as text."""
    for found in _BRACES.finditer(text):
        items = dict(_ITEM.findall(found[0]))
        if "loss" in items:
            yield items


def _json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _logged_step(record: dict) -> LoggedStep | None:
    loss, cause = _number(record.get("loss")), record.get("cause")
    if loss is None:
        return None
    cause = cause if isinstance(cause, str) else None
    share = dropped_share([record])
    why = why_dropped([record]) if share else ("", "")
    return LoggedStep(loss, _number(record.get("grad_norm")), cause, share, why)


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None

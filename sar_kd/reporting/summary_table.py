"""The end of a run: the table of results, what they show in sentences, and what to type next."""

from __future__ import annotations

import math
from pathlib import Path

from sar_kd.config.installation import program_name
from sar_kd.config.sections import EMBEDDED
from sar_kd.errors import UsageError
from sar_kd.reporting.history import RunHistory, findings_of, read_history
from sar_kd.reporting.report import FILE as REPORT
from sar_kd.reporting.step_lines import dropped_share, unshared_share, why_dropped
from sar_kd.runtime.console import count_of, format_duration, format_perplexity, format_share
from sar_kd.runtime.files import as_float
from sar_kd.runtime.run_folder import saved_student

_COLUMNS = {"perplexity": 12, "bits per byte": 15, "accuracy": 10, "answer rate": 13}
"""The columns after the names, and their widths; all of it fits into 80 columns."""

_Metrics = tuple[float, float]
"""Perplexity and bits per byte"""


def summary_table(summary: dict, folder: Path) -> list[str]:
    """The results in a table: the student at the start, at its best and at the end, and the teacher, if there is one.

    With a control, that too: the student that was trained without the teacher. A run with a task also has the accuracy
    of each of them.
    """
    scores = summary.get("benchmark_result", {})
    if "accuracy" in summary.get("control", {}):
        scores = scores | {"control": summary["control"]}
    columns = list(_COLUMNS.items())[: None if scores else 2]
    skipped = ", ".join(f"{cause} {count}" for cause, count in summary["skipped"].items() if count)
    mark = "" if summary.get("same_tokenizer", True) else "*"
    lines = [
        "",
        ended_line(summary),
        f"  {'':<28}" + "".join(f"{name:>{width}}" for name, width in columns),
        *(_line(name, metrics, scores.get(key), mark) for name, key, metrics in _models(summary)),
        *(["  * in the teacher's own tokens: compare its bits per byte, not its perplexity"] if mark else []),
        f"  applied {summary['applied']}, skipped {sum(summary['skipped'].values())}"
        + (f" ({skipped})" if skipped else "")
        + f", success rate {summary['success_rate']:.1%}, loss scale {summary['loss_scale_final']:.0f}",
    ]
    if share := dropped_share([summary]):
        lines.append(f"  teacher left out at {format_share(share)} of its positions: {why_dropped([summary])[0]}")
    if share := unshared_share(summary):
        why = "too little of its distribution is in its top k or in shared tokens"
        lines.append(f"  teacher not compared at {format_share(share)} of its positions: {why}")
    if control := summary.get("control"):
        lines.append(_control_line(control))
    if "on_policy" in summary:
        lines.append(_on_policy_line(summary["on_policy"], summary["wall_seconds"]))
    lines.append(f"  student saved in {saved_student(folder)}, metrics in {folder / 'summary.json'}")
    if (folder / REPORT).is_file():
        lines.append(f"  charts in {folder / REPORT}")
    return lines


def ended_line(summary: dict) -> str:
    """How the run ended, and how long it took."""
    status = {"finished": "Finished", "interrupted": "Interrupted"}.get(summary["status"], "Emergency stop")
    return (
        f"{status} after {count_of(summary['steps'], 'step')} in {format_duration(summary['wall_seconds'])}, "
        f"{summary['tokens_per_second']:,.0f} tokens/s"
    )


def closing_lines(folder: Path) -> list[str]:
    """What the run in this folder shows; nothing if its files cannot be read back."""
    try:
        return ["", *findings_of(read_history(folder), with_status=False)]
    except UsageError:
        return []


def next_commands(folder: Path) -> list[str]:
    """The commands to type next, the most useful first; nothing if the run's files cannot be read back."""
    try:
        return _next_commands(read_history(folder, with_steps=False))
    except UsageError:
        return []


def _next_commands(run: RunHistory) -> list[str]:
    status, folder, program = run.summary.get("status"), run.folder, program_name()
    control = run.summary.get("control")
    if status == "interrupted" or (isinstance(control, dict) and control.get("status") == "interrupted"):
        return [f"Next: continue with the same command and --resume --output_dir {folder}"]
    if status == "emergency_stop":
        explained = (folder / "crash").is_dir()  # a run that was stopped without a NaN batch has said why
        return [f"Next: {program} forensics {folder} shows why, and what to try"] if explained else []
    if run.summary.get("best_step") == 0:
        rate = as_float(run.setting("student_lr"))
        return [f"Next: the same command with another --student_lr (it was {rate:g}), or more --train_steps"]
    prompt = '"Return the largest"' if run.setting("student_model") == EMBEDDED else '"The"'
    if run.start.get("learns_chat") is True:
        prompt = '"Hello" --chat'
    lines = [f"Next: {program} generate {folder} {prompt}"]
    if not (folder / REPORT).is_file():
        lines.append(f"      {program} report {folder}")
    start, last = (as_float(run.summary.get(f"val_bits_per_byte_{when}")) for when in ("start", "final"))
    has_teacher = run.setting("teacher_model") and as_float(run.setting("alpha_kd")) > 0
    is_worse = as_float(run.start.get("teacher_val_bits_per_byte")) >= start
    has_precise = run.config.get("mode") == "precise" or bool(run.setting("recipe"))
    if has_teacher and not is_worse and not has_precise and last < start:
        lines.append("To learn more from the teacher: the same command with --mode precise")
    return lines


def _control_line(control: dict) -> str:
    """What the control is, and how long it took."""
    if control["status"] == "emergency_stop":
        return f"  control: {control['stop_reason']}"
    how = "interrupted after " * (control["status"] == "interrupted")
    return (
        f"  control: by cross-entropy alone, same start and batches, in {control['folder']}; {how}"
        f"{count_of(control['steps'], 'step')} in {format_duration(control['wall_seconds'])}"
    )


def _on_policy_line(found: dict, seconds: float) -> str:
    """What the student generated, and the share of the run's time that took."""
    count = max(1, found["responses"])
    issues = ", ".join(f"{name} {count}" for name, count in found["issues"].items() if count)
    shown = f" (issues: {issues})" if issues else ""
    alarms = ", ".join(f"{name} in {count_of(steps, 'step')}" for name, steps in found["alarms"].items() if steps)
    shown += f"; alarms: {alarms}" if alarms else ""
    return (
        f"  generated {found['responses']:,} responses of {found['tokens'] / count:.1f} tokens on average, "
        f"{found['ended'] / count:.0%} of them ended{shown}; that took "
        f"{found['sampling_seconds'] / max(1e-9, seconds):.0%} of the time"
    )


def _line(name: str, metrics: _Metrics, score: dict | None, mark: str = "") -> str:
    """score: `accuracy` and `answer_rate`, where they are known; mark: behind a perplexity in the teacher's tokens"""
    perplexity = format_perplexity(metrics[0]) + (mark if name.startswith("teacher") else "")
    cells = [perplexity, f"{metrics[1]:.4f}" if math.isfinite(metrics[1]) else str(metrics[1])]
    cells += [f"{score['accuracy']:.3f}", f"{score['answer_rate']:.3f}"] if score else []
    return f"  {name:<28}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=False))


def _models(summary: dict) -> list[tuple[str, str, _Metrics]]:
    """Every model that was measured: its name, the key of its score, its metrics."""

    def student(name: str, key: str, when: str) -> tuple[str, str, _Metrics]:
        return name, key, (summary[f"val_ppl_{when}"], summary[f"val_bits_per_byte_{when}"])

    models = [
        student("student, start", "student_start", "start"),
        student(_name_of_last(summary), "student_end", "final"),
        student(f"student, best (step {summary['best_step']})", "student", "best"),
    ]
    if "best_step" in (control := summary.get("control", {})):
        metrics = control["val_ppl_best"], control["val_bits_per_byte_best"]
        models.append((f"control, best (step {control['best_step']})", "control", metrics))
    return models + [(name, name, metrics) for name, metrics in _teachers(summary).items()]


def _name_of_last(summary: dict) -> str:
    """What the last validation is of: a run that was interrupted made steps after it."""
    step = summary.get("val_step_final")
    return "student, end" if step in (None, summary["steps"]) else f"student, step {step}"


def _teachers(summary: dict) -> dict[str, _Metrics]:
    """The teacher with native routing and with that of the run; also at the end if its routers were trained."""
    if "teacher_val_ppl" not in summary:
        return {}
    teachers: dict = {"teacher": (summary["teacher_val_ppl"], summary["teacher_val_bits_per_byte"])}
    for when in ("start", "final"):
        metrics = summary.get(f"router_{when}") or {}
        for how in ("native", "routed"):
            pair = metrics.get(f"teacher_val_ppl_{how}"), metrics.get(f"teacher_val_bits_per_byte_{how}")
            is_new = (when, how) != ("start", "native") and None not in pair
            if is_new and (how == "native" or summary["experts"] != "native"):
                routing = "own routing" if how == "native" else "every expert" if summary["experts"] == "all" else "ka"
                teachers[f"teacher, {routing}, {'end' if when == 'final' else when}"] = pair
    return teachers

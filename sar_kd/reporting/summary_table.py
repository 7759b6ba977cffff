"""What a run says at its end."""

from __future__ import annotations

from pathlib import Path

from sar_kd.reporting.report import FILE as REPORT
from sar_kd.runtime.console import perplexity_text

_COLUMNS = {"perplexity": 12, "bits per byte": 15, "accuracy": 10, "answer rate": 13}
"""What a table may have beside its names, and how wide; all of it fits into 80 columns."""


def closing_table(summary: dict, folder: Path) -> list[str]:
    """The result in a table: student at the start, at its best and at the end, and the teacher, if there is one.

    A run with a task also has what each of them answers, and a student that was trained without the teacher.
    """
    scores = summary.get("benchmark_result", {})
    if "cross_entropy_only" in summary:
        scores = scores | {"cross_entropy_only": summary["cross_entropy_only"]}
    columns = list(_COLUMNS.items())[: None if scores else 2]
    skipped = ", ".join(f"{cause} {count}" for cause, count in summary["skipped"].items() if count)
    lines = [
        "",
        f"{summary['status'].replace('_', ' ').capitalize()} after {summary['steps']} steps "
        f"in {_duration(summary['wall_seconds'])}, {summary['tokens_per_second']:,.0f} tokens/s",
        f"  {'':<28}" + "".join(f"{name:>{width}}" for name, width in columns),
        *(_row(name, figures, scores.get(key)) for name, key, figures in _rows(summary)),
        f"  applied {summary['applied']}, skipped {sum(summary['skipped'].values())}"
        + (f" ({skipped})" if skipped else "")
        + f", success rate {summary['success_rate']:.1%}, loss scale {summary['loss_scale_final']:.0f}",
        f"  student saved in {folder / 'student'}, figures in {folder / 'summary.json'}",
    ]
    if "on_policy" in summary:
        lines.insert(-1, _on_policy(summary["on_policy"], summary["wall_seconds"]))
    if (folder / REPORT).is_file():
        lines.append(f"  pictures in {folder / REPORT}")
    if summary["status"] == "interrupted":
        lines.append(f"  continue with the same command and --resume --output_dir {folder}")
    return lines


def _on_policy(found: dict, seconds: float) -> str:
    """What the student wrote itself, and what that took."""
    count = max(1, found["responses"])
    faults = ", ".join(f"{name} {count}" for name, count in found["faults"].items() if count)
    shown = f" (faults: {faults})" if faults else ""
    return (
        f"  wrote {found['responses']:,} responses of {found['tokens'] / count:.1f} tokens on average, "
        f"{found['ended'] / count:.0%} of them ended{shown}; that took "
        f"{found['sampling_seconds'] / max(1e-9, seconds):.0%} of the time"
    )


def _row(name: str, figures: tuple[float, float], score: dict | None) -> str:
    """score: `accuracy` and `answer_rate`, where they are known"""
    shown = [perplexity_text(figures[0]), f"{figures[1]:.4f}"]
    shown += [f"{score['accuracy']:.3f}", f"{score['answer_rate']:.3f}"] if score else []
    return f"  {name:<28}" + "".join(f"{text:>{width}}" for text, width in zip(shown, _COLUMNS.values(), strict=False))


def _rows(summary: dict) -> list[tuple[str, str, tuple[float, float]]]:
    """Name, key of its score, perplexity and bits per byte of everything that was measured."""

    def student(name: str, key: str, when: str) -> tuple[str, str, tuple[float, float]]:
        return name, key, (summary[f"val_ppl_{when}"], summary[f"val_bits_per_byte_{when}"])

    rows = [
        student("student, start", "student_start", "start"),
        student("student, end", "student_end", "final"),
        student(f"student, best (step {summary['best_step']})", "student", "best"),
    ]
    if "cross_entropy_only" in summary:
        alone = summary["cross_entropy_only"]
        figures = alone["val_ppl_best"], alone["val_bits_per_byte_best"]
        rows.append(("student without teacher", "cross_entropy_only", figures))
    return rows + [(name, name, figures) for name, figures in _teachers(summary).items()]


def _teachers(summary: dict) -> dict[str, tuple[float, float]]:
    """Perplexity and bits per byte of the teacher, in the run's routing, and at the end if its routers learned."""
    if "teacher_val_ppl" not in summary:
        return {}
    found: dict = {"teacher": (summary["teacher_val_ppl"], summary["teacher_val_bits_per_byte"])}
    for when in ("start", "final"):
        figures = summary.get(f"router_{when}") or {}
        for how in ("native", "routed"):
            pair = figures.get(f"teacher_val_ppl_{how}"), figures.get(f"teacher_val_bits_per_byte_{how}")
            is_news = (when, how) != ("start", "native") and None not in pair
            if is_news and (how == "native" or summary["experts"] != "native"):
                active = "own routing" if how == "native" else "every expert" if summary["experts"] == "all" else "ka"
                found[f"teacher, {active}, {'end' if when == 'final' else when}"] = pair
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

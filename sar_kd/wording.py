"""What a run says at its end, and how a line fits a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path

from sar_kd.guards import CAUSES
from sar_kd.report import FILE as REPORT


def fitted(line: str) -> list[str]:
    """The line as a terminal shows it without breaking a word; as it is, where it goes into a file."""
    if not sys.stdout.isatty():
        return [line]
    width = max(40, shutil.get_terminal_size((80, 24)).columns)
    return textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False) or [""]


def closing_table(summary: dict, folder: Path) -> list[str]:
    """The result in a table: student at the start, at its best and at the end, and the teacher."""

    def row(name, perplexity, bits):
        return f"  {name:<26}{perplexity:>14.2f}{bits:>16.4f}"

    skipped = ", ".join(f"{cause} {count}" for cause in CAUSES if (count := summary["skipped"].get(cause)))
    best = f"student, best (step {summary['best_step']})"
    lines = [
        "",
        f"{summary['status'].replace('_', ' ').capitalize()} after {summary['steps']} steps "
        f"in {_duration(summary['wall_seconds'])}, {summary['tokens_per_second']:,.0f} tokens/s",
        f"  {'':<26}{'perplexity':>14}{'bits per byte':>16}",
        row("student, start", summary["val_ppl_start"], summary["val_bits_per_byte_start"]),
        row("student, end", summary["val_ppl_final"], summary["val_bits_per_byte_final"]),
        row(best, summary["val_ppl_best"], summary["val_bits_per_byte_best"]),
        row("teacher", summary["teacher_val_ppl"], summary["teacher_val_bits_per_byte"]),
        *(row(f"teacher, {name}", *figures) for name, figures in _teachers(summary).items()),
        f"  applied {summary['applied']}, skipped {sum(summary['skipped'].values())}"
        + (f" ({skipped})" if skipped else "")
        + f", success rate {summary['success_rate']:.1%}, loss scale {summary['loss_scale_final']:.0f}",
        f"  student saved in {folder / 'student'}, figures in {folder / 'summary.json'}",
    ]
    if (folder / REPORT).is_file():
        lines.append(f"  pictures in {folder / REPORT}")
    if summary["status"] == "interrupted":
        lines.append(f"  continue with the same command and --resume --output_dir {folder}")
    return lines


def _teachers(summary: dict) -> dict[str, tuple[float, float]]:
    """Perplexity and bits per byte of the teacher in the run's routing, and at the end if its routers learned."""
    found: dict = {}
    for when in ("start", "final"):
        figures = summary.get(f"router_{when}") or {}
        for how in ("native", "routed"):
            pair = figures.get(f"teacher_val_ppl_{how}"), figures.get(f"teacher_val_bits_per_byte_{how}")
            is_news = (when, how) != ("start", "native") and None not in pair
            if is_news and (how == "native" or summary["experts"] != "native"):
                active = "own routing" if how == "native" else "every expert" if summary["experts"] == "all" else "ka"
                found[f"{active}, {'end' if when == 'final' else when}"] = pair
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

"""`report.html`: one run, or several side by side, in a page that needs no other file.

Written at every validation and at the end of a run, and by `sar-kd report RUN_DIR [RUN_DIR ...]`. A run without
matplotlib prints once how to get the page, and goes on.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

from sar_kd.config.installation import program_name
from sar_kd.config.runs import SECTIONS, preset_name
from sar_kd.errors import UsageError
from sar_kd.reporting.charts import build_charts, build_lead_chart, build_word_chart
from sar_kd.reporting.comparison import losses_by_file
from sar_kd.reporting.harness_table import HARNESS, harness_rows
from sar_kd.reporting.held_out import HeldOut, read_held_out
from sar_kd.reporting.history import RunHistory, headline_of, read_history
from sar_kd.reporting.rendering import render
from sar_kd.reporting.word_gaps import largest_gaps
from sar_kd.runtime.console import count_of, format_bytes, format_duration, format_perplexity
from sar_kd.runtime.environment import is_installed
from sar_kd.runtime.files import as_float, atomic_write
from sar_kd.version import __version__

FILE = "report.html"

_INSTALL = "pip install matplotlib"

_MAX_SHARE = 0.02

_TEXT_SETTINGS = ("train_file", "validation_file", "dataset_name", "dataset_config_name", "dataset_split", "task")

_IMPORT_ERRORS = (ImportError, AttributeError, RuntimeError, ValueError, TypeError, SystemError, OSError)
"""What the import of a matplotlib that was built for another numpy, or is half installed, may raise"""

_LEVELS = {"finished": "good", "interrupted": "warn", "emergency_stop": "bad"}
"""The colour of a run's findings, by its status"""


class ReportWriter:
    """An observer of the run log that keeps `report.html` up to date.

    A validation that comes so soon after the last page that another one would take more than 2 % of the time between
    them gets none; the end of the run always gets one.
    """

    name = FILE

    def __init__(self, folder: Path):
        self.folder = folder
        self._written, self._cost = -math.inf, 0.0

    def log_record(self, record: dict) -> None:
        if record["event"] == "evaluation" and time.monotonic() - self._written >= self._cost / _MAX_SHARE:
            self._write()

    def log_summary(self, summary: dict) -> None:
        self._write()

    def close(self) -> None:
        pass

    def _write(self) -> None:
        start = time.monotonic()
        write_report([read_history(self.folder)], self.folder / FILE)
        self._written = time.monotonic()
        self._cost = self._written - start


def find_report_writer(folder: Path) -> tuple[list[ReportWriter], list[str]]:
    """A writer for a run in this folder; without matplotlib none, and a line about how to get the page."""
    if is_installed("matplotlib"):
        return [ReportWriter(folder)], []
    return [], [f"No {FILE} without matplotlib: `{_INSTALL}`, then `{program_name()} report {folder}` at any time"]


def check_page(path: Path, title: str) -> None:
    """Raise UsageError, which begins with the title, unless the path can be that of a page."""
    if path.is_dir():
        raise UsageError(f"{title}: is a folder; give a file, such as {path / FILE}")
    if not path.parent.is_dir():
        raise UsageError(f"{title}: the folder {path.parent} is not there")


def require_matplotlib(command: str) -> None:
    """Raise UsageError, which names the command, unless matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"{command}: needs matplotlib, and {error.name} is missing: `{_INSTALL}`") from None
    except _IMPORT_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"{command}: matplotlib cannot be imported ({reason}); install it again: `pip install --upgrade matplotlib`"
        ) from None


def write_report(runs: Sequence[RunHistory], path: Path) -> None:
    """Write the page about one run, or about several side by side.

    Raises: UsageError without matplotlib, or if the file cannot be written
    """
    require_matplotlib("report")
    charts = build_charts(runs)
    title = " and ".join(run.name for run in runs[:3]) + (" and others" if len(runs) > 3 else "")
    values = _values_of_one(runs[0]) if len(runs) == 1 else _values_of_several(runs)
    page = render(FILE, title=title, version=__version__, runs=runs, charts=charts, **values)
    atomic_write(path, page, "output", "name another file")


def _values_of_one(run: RunHistory) -> dict:
    teacher = run.setting("teacher_model")  # fine-tuning has none
    models = f"Student {run.setting('student_model')}" + (f", teacher {teacher}" if teacher else "")
    tiles = {
        "bits per byte, last step": f"{as_float(run.last.get('val_bits_per_byte')):.4f}",
        "perplexity, last step": format_perplexity(as_float(run.last.get("val_ppl"))),
        "updates applied": f"{run.num_applied:,} of {run.num_steps:,}",
    }
    for name, key, form in (
        ("tokens a second", "tokens_per_second", "{:,.0f}".format),
        ("peak memory", "peak_memory_bytes", format_bytes),
        ("time", "wall_seconds", format_duration),
    ):
        if key in run.summary:
            tiles[name] = form(as_float(run.summary[key]))
    defaults = {field.name: field.default for section in SECTIONS.values() for field in dataclasses.fields(section)}
    settings = []
    for name, value in run.settings().items():
        default = defaults.get(name)
        is_changed = name in defaults and value != (list(default) if isinstance(default, tuple) else default)
        settings.append((name, _as_typed(value), is_changed))
    headline, findings = headline_of(run)
    return {
        "models": f"{models}, {preset_name(run.config.get('mode'), run.setting('recipe'))}",
        "headline": headline,
        "findings": findings,
        "lead": build_lead_chart(run),
        "files": _files_of(run),
        **_words_of(run),
        "compared": [(name, format_perplexity(ppl), f"{bits:.4f}") for name, ppl, bits in run.models()],
        "tasks": harness_rows(run.summary.get(HARNESS)),
        "level": _LEVELS.get(str(run.summary.get("status")), "calm"),
        "environment": {name: _as_typed(value) for name, value in run.environment.items() if value},
        "log": run.log_head(),
        "samples": _samples_of(run),
        "tiles": tiles,
        "settings": settings,
    }


_FILE_COLUMNS = {"start": "start", "control": "control", "best": "best student", "teacher": "teacher"}


def _files_of(run: RunHistory) -> list[tuple[str, ...]]:
    """A table of the loss on each held-out file, its header first; [] with one file, or if the losses are not there."""
    control, own = run.control, _held_out_of(run)
    rows = losses_by_file(own, None if control is None else _held_out_of(control)) if own else []
    if not rows:
        return []
    models = [model for model in _FILE_COLUMNS if model in rows[0].bits_per_byte]
    header = ("file", "documents", "bytes", *(_FILE_COLUMNS[model] for model in models))
    has_difference = rows[0].difference is not None
    table: list[tuple[str, ...]] = [(*header, "better than the control by") if has_difference else header]
    for row in rows:
        cells = [row.name, f"{row.num_documents:,}", f"{row.num_bytes:,}"]
        cells += [f"{row.bits_per_byte[model]:.4f}" for model in models]
        if row.difference:
            gain, is_judged = row.difference.gain, row.difference.is_judged
            cells.append(f"{round(gain.value, 4) + 0.0:.4f}" + (f" +- {gain.half_width:.4f}" if is_judged else ""))
        table.append(tuple(cells))
    return table


def _words_of(run: RunHistory) -> dict:
    """What the page shows of the losses by word; `words` is empty where there are none."""
    control, own = run.control, _held_out_of(run)
    gaps = largest_gaps(own, None if control is None else _held_out_of(control)) if own else None
    if own is None or gaps is None:
        return {"words": []}
    tables = (("Where the student loses most beyond the teacher:", gaps.behind), ("Where it loses less:", gaps.ahead))
    line = f"On all {count_of(gaps.num_words, 'such word')} the student loses {abs(gaps.gap):,.0f} nats "
    line += f"{'more' if gaps.gap > 0 else 'less'} than the teacher."
    if gaps.num_nonfinite:
        line += f" {count_of(gaps.num_nonfinite, 'more')} left out: a loss on them is not finite."
    is_part = gaps.num_bytes < own.num_bytes.sum()
    return {
        "words": [(title, [word.cells() for word in words]) for title, words in tables if words],
        "words_header": gaps.header,
        "words_line": line,
        "words_read": f" in the first {format_bytes(gaps.num_bytes)} of the held-out text" if is_part else "",
        "words_chart": build_word_chart(gaps),
    }


def _held_out_of(run: RunHistory) -> HeldOut | None:
    try:
        return read_held_out(run.folder)
    except UsageError:  # of an earlier version, or one that was not begun
        return None


def _samples_of(run: RunHistory) -> list[dict]:
    """Beginnings of texts, each with how start, control, distilled and teacher continue it; without a control as the
    run has named its models.
    """
    control = run.control
    if control is None:
        return run.samples()
    names = {"student, before": "start", "control": "control", "student, after": "distilled", "teacher": "teacher"}
    found = {sample.get("text"): sample.get("student, after") for sample in control.samples()}
    samples = [{**sample, "control": found.get(sample.get("text"))} for sample in run.samples()]
    return [
        {"text": sample.get("text"), **{shown: sample[name] for name, shown in names.items() if sample.get(name)}}
        for sample in samples
    ]


RESULTS = ("run", "status", "steps", "bits per byte", "best", "perplexity", "teacher's bits", "applied")
"""The columns of the table of several runs"""


def results_of(runs: Sequence[RunHistory]) -> list[dict]:
    """The table of several runs: for each, the text under every column of `RESULTS`."""
    results = []
    for run in runs:
        bits = [as_float(record.get("val_bits_per_byte")) for record in run.validations()]
        teacher = run.start.get("teacher_val_bits_per_byte", run.summary.get("teacher_val_bits_per_byte", "none"))
        cells = (
            run.name,
            str(run.summary.get("status", "under way")).replace("_", " "),
            f"{run.num_steps:,}",
            f"{as_float(run.last.get('val_bits_per_byte')):.4f}",
            f"{min(filter(math.isfinite, bits), default=math.nan):.4f}",
            format_perplexity(as_float(run.last.get("val_ppl"))),
            teacher if teacher == "none" else f"{as_float(teacher):.4f}",
            f"{run.num_applied / run.num_steps:.1%}" if run.num_steps else "none",
        )
        results.append(dict(zip(RESULTS, cells, strict=True)))
    return results


def _values_of_several(runs: Sequence[RunHistory]) -> dict:
    settings = [(name, *(_as_typed(run.setting(name)) for run in runs)) for name in runs[0].settings()]
    differing = [row for row in settings if row[0] != "output_dir" and len(set(row[1:])) > 1]
    results = [tuple(each.values()) for each in results_of(runs)]
    return {"columns": list(RESULTS), "results": results, "differing": differing, "warnings": _warnings(runs)}


def _warnings(runs: Sequence[RunHistory]) -> list[str]:
    """What must be known before these runs are compared."""
    lines = []
    texts = {(run.start.get("val_bytes"), *(str(run.setting(name)) for name in _TEXT_SETTINGS)) for run in runs}
    if len(texts) > 1:
        lines.append(
            "These runs have different texts: what is measured on different held-out texts does not compare. The "
            "settings that differ are below."
        )
    models = {str(run.setting("student_model")) for run in runs}
    if len(models) > 1:
        lines.append(
            "These runs have different students: if their tokenizers differ, compare bits per byte, not perplexity."
        )
    return lines


def _as_typed(value: object) -> str:
    """A setting as it is typed on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value in ("", None) else f"{value:g}" if isinstance(value, float) else str(value)

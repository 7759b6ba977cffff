"""`report.html`: a run in one self-contained page, or several beside one another.

Written at every validation and at the end, and by `sar-kd report RUN_DIR [RUN_DIR ...]`. A run without matplotlib says
once how to get the page, and goes on.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

from sar_kd.config.runs import SECTIONS
from sar_kd.errors import UsageError
from sar_kd.reporting.charts import charts_of
from sar_kd.reporting.history import History, read_history, verdict_of
from sar_kd.runtime.environment import is_installed
from sar_kd.runtime.files import atomic_write, number_of
from sar_kd.version import __version__

FILE = "report.html"

_INSTALL = "pip install matplotlib"

_SHARE = 0.02

_CSS = """
:root { --paper: #ffffff; --panel: #f6f7f9; --ink: #1c2127; --soft: #5b6672; --faint: #d5dae0;
  --s0: #1f6fbf; --s1: #c85a11; --s2: #17845c; --s3: #b3261e; --s4: #7a4fb5; --s5: #8a6d00; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --panel: #1d2127; --ink: #e6e9ed; --soft: #9aa5b1;
  --faint: #3a424c; --s0: #6aaef5; --s1: #f59a55; --s2: #4fc796; --s3: #ff8078; --s4: #b795f0; --s5: #dcb73f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 48px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 28px 0 8px; }
.under { color: var(--soft); margin: 2px 0 16px; overflow-wrap: anywhere; }
.verdict { border-left: 4px solid var(--s0); background: var(--panel); padding: 10px 16px; border-radius: 4px; }
.verdict p { margin: 4px 0; } .verdict p:first-child { font-weight: 600; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; }
.tile { background: var(--panel); border-radius: 6px; padding: 8px 14px; flex: 1 1 130px; }
.tile b { display: block; font-size: 18px; white-space: nowrap; } .tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px; }
figure { margin: 0; background: var(--panel); border-radius: 6px; padding: 8px 10px; }
figure svg { width: 100%; height: auto; display: block; } figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: 13px; padding: 0 4px 2px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--faint); overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
.settings { columns: 2 420px; } .settings table { width: 100%; } tr.changed td { font-weight: 600; }
summary { cursor: pointer; } footer { margin-top: 32px; color: var(--soft); font-size: 13px; }
"""


class ReportWriter:
    """Keeps a run's `report.html` up to date while the run goes on.

    A validation so soon after the last one that writing would take more than 2 % of the time between them is passed
    over; the end of the run never is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._written, self._cost = -math.inf, 0.0

    def record(self, record: dict) -> None:
        """Take notice of a line of `metrics.jsonl`."""
        if record["event"] == "evaluation" and time.monotonic() - self._written >= self._cost / _SHARE:
            self._write()

    def finish(self, summary: dict) -> None:
        """Write the page for the last time."""
        self._write()

    def close(self) -> None:
        """Nothing is kept open."""

    def _write(self) -> None:
        began = time.monotonic()
        write_report([read_history(self.folder)], self.folder / FILE)
        self._written = time.monotonic()
        self._cost = self._written - began


def find_report_writer(folder: Path) -> tuple[list[ReportWriter], list[str]]:
    """A writer for a run in this folder; without matplotlib none, and the line that says how to get the page."""
    if is_installed("matplotlib"):
        return [ReportWriter(folder)], []
    return [], [f"No {FILE} without matplotlib: `{_INSTALL}`, then `sar-kd report {folder}` at any time"]


def write_report(runs: Sequence[History], path: Path) -> None:
    """Write the page about one run, or about several beside one another.

    Raises: UsageError without matplotlib, or if the file cannot be written
    """
    try:
        charts = charts_of(runs)
    except ModuleNotFoundError as error:
        raise UsageError(f"report: needs matplotlib, and {error.name} is missing: `{_INSTALL}`") from None
    body = _page_of_one(runs[0], charts) if len(runs) == 1 else _page_of_several(runs, charts)
    title = " and ".join(run.name for run in runs[:3]) + (" and others" if len(runs) > 3 else "")
    atomic_write(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_CSS}</style></head><body>\n{body}\n<footer>SAR-KD {__version__}. Perplexity is exp(nats / token) "
        "over all of a fixed held-out text, nothing clamped; bits per byte is what compares across tokenizers."
        "</footer></body></html>\n",
    )


def _page_of_one(run: History, charts: list[tuple[str, str]]) -> str:
    sentences = "".join(f"<p>{_marked(line)}</p>" for line in verdict_of(run))
    teacher = run.setting("teacher_model")  # fine-tuning has none
    beside = f", teacher {teacher}" if teacher else ""
    models = f"Student {run.setting('student_model')}{beside}, mode {run.config.get('mode')}"
    return "\n".join(
        [
            f"<h1>{_text(run.name)}</h1>",
            f'<p class="under">{_text(models)}</p>',
            f'<div class="verdict">{sentences}</div>',
            f'<div class="tiles">{"".join(_tiles(run))}</div>',
            _figures(charts),
            _settings(run),
        ]
    )


def _page_of_several(runs: Sequence[History], charts: list[tuple[str, str]]) -> str:
    rows: list[tuple[str, ...]] = [
        ("run", "status", "steps", "bits per byte", "best", "perplexity", "teacher's bits", "applied")
    ]
    for run in runs:
        last = run.validations()[-1] if run.validations() else {}
        best = min((number_of(r.get("val_bits_per_byte")) for r in run.validations()), default=math.nan)
        applied = sum(bool(record.get("applied")) for record in run.steps)
        teacher = run.start.get("teacher_val_bits_per_byte", run.summary.get("teacher_val_bits_per_byte"))
        figures = (last.get("val_bits_per_byte"), best), (last.get("val_ppl"), teacher)
        shown = [f"{number_of(value):.4f}" for value in figures[0]]
        shown += [f"{number_of(figures[1][0]):.2f}", f"{number_of(figures[1][1]):.4f}"]
        status = str(run.summary.get("status", "under way")).replace("_", " ")
        share = f"{applied / len(run.steps):.1%}" if run.steps else "none"
        rows.append((run.name, status, str(len(run.steps)), *shown, share))
    differing = [
        name for name in runs[0].settings() if name != "output_dir" and len({_shown(r.setting(name)) for r in runs}) > 1
    ]
    settings: list[tuple[str, ...]] = [("setting", *(run.name for run in runs))]
    settings += [(name, *(_shown(run.setting(name)) for run in runs)) for name in differing]
    parts = [f"<h1>{len(runs)} runs</h1>", '<p class="under">Figures of the last validation, held-out text.</p>']
    parts += [_table(rows, numbers=range(2, 8)), "<h2>Pictures</h2>", _figures(charts)]
    return "\n".join([*parts, "<h2>Settings that differ</h2>", _table(settings) if differing else "<p>None.</p>"])


def _tiles(run: History) -> list[str]:
    last = run.validations()[-1] if run.validations() else {}
    applied, attempts = sum(bool(record.get("applied")) for record in run.steps), len(run.steps)
    tiles = [
        ("bits per byte", f"{number_of(last.get('val_bits_per_byte')):.4f}"),
        ("perplexity", f"{number_of(last.get('val_ppl')):.2f}"),
        ("updates applied", f"{applied} of {attempts}"),
    ]
    if run.summary:
        tiles += [
            ("tokens a second", f"{number_of(run.summary.get('tokens_per_second')):,.0f}"),
            ("peak memory", f"{number_of(run.summary.get('peak_memory_bytes')) / 1e9:,.2f} GB"),
            ("time", f"{number_of(run.summary.get('wall_seconds')) / 60:,.1f} min"),
        ]
    return [f'<div class="tile"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for name, value in tiles]


def _figures(charts: list[tuple[str, str]]) -> str:
    figures = (f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>" for caption, svg in charts)
    return f'<div class="charts">{"".join(figures)}</div>'


def _settings(run: History) -> str:
    defaults = {item.name: item.default for s in SECTIONS.values() for item in dataclasses.fields(s)}
    rows = []
    for name, value in run.settings().items():
        default = defaults.get(name)
        changed = name in defaults and value != (list(default) if isinstance(default, tuple) else default)
        kind = ' class="changed"' if changed else ""
        rows.append(f"<tr{kind}><td>--{_text(name)}</td><td>{_text(_shown(value))}</td></tr>")
    half = math.ceil(len(rows) / 2)
    tables = "".join(f"<table>{''.join(part)}</table>" for part in (rows[:half], rows[half:]))
    return (
        f"<h2>Settings</h2><details><summary>All {len(rows)} flags; bold is what the mode or the command line set "
        f'differently from the default</summary><div class="settings">{tables}</div></details>'
    )


def _table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if index in numbers else "" for index in range(len(cells)))
        return "".join(f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{line(rows[0], "th")}</tr>{body}</table></div>'


def _shown(value: object) -> str:
    """A setting as it would be typed."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value in ("", None) else f"{value:g}" if isinstance(value, float) else str(value)


def _marked(line: str) -> str:
    """A sentence, what it sets in backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(line))


def _text(value: object) -> str:
    return html.escape(str(value))

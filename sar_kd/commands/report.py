"""`sar-kd report`: report.html of a run, or of several side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sar_kd.config.command_line import parse
from sar_kd.config.fields import Command, option
from sar_kd.errors import UsageError
from sar_kd.reporting.history import findings_of, read_history
from sar_kd.reporting.report import FILE, write_report
from sar_kd.runtime.console import wrap_lines


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Runs: which ones, and where the page goes."""

    runs: tuple[str, ...] = option((), "run folders; several are compared on one page", metavar="RUN_DIR")
    output: str = option("", "the page; by default report.html in the run folder, or here where there are several")
    json: bool = option(False, "print JSON")


REPORT = Command(
    name="report",
    description="One run in a page, or several compared.",
    config=ReportConfig,
    positionals=("runs",),
)


def main(argv: list[str]) -> dict:
    """Write the page about one run into its folder, or about several into the current one, and print where it is.

    Raises: UsageError if a folder holds no run, or matplotlib is missing
    """
    config = parse(REPORT, argv)
    folders = [Path(run) for run in config.runs]
    runs = [read_history(folder) for folder in folders]
    path = Path(config.output or (folders[0] / FILE if len(folders) == 1 else FILE))
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: the folder {path.parent} is not there")
    write_report(runs, path)
    sentences = {run.name: findings_of(run) for run in runs}
    if config.json:
        print(json.dumps({"report": str(path), "verdicts": sentences}, indent=2))
        return {"status": "finished"}
    for name, lines in sentences.items():
        print(wrap_lines(f"{name}:", *(f"  {line}" for line in lines)))
    print(wrap_lines(f"Written to {path}"))
    return {"status": "finished"}

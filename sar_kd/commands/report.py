"""`sar-kd report`: write report.html for one run, or for several side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sar_kd.config.command_line import parse
from sar_kd.config.fields import Command, Section, option
from sar_kd.errors import UsageError
from sar_kd.reporting.history import findings_of, read_history
from sar_kd.reporting.report import FILE, write_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Section):
    """Runs: which ones to show, and where to write the page."""

    runs: tuple[str, ...] = option(
        (), "run folders; several are compared on one page", metavar="RUN_DIR", positional=True
    )
    output: str = option("", "file to write; by default report.html, in the run folder or, for several runs, here")
    json: bool = option(False, "print JSON")


REPORT = Command("report", "Show a run, or compare several, on one HTML page.", ReportConfig)


def main(argv: list[str]) -> dict:
    """Write the page, and print the findings and where it is; `--json` for programs.

    Raises: UsageError if a folder holds no run, or matplotlib is missing
    """
    config = parse(REPORT, argv)
    folders = [Path(run) for run in config.runs]
    runs = [read_history(folder) for folder in folders]
    path = Path(config.output or (folders[0] / FILE if len(folders) == 1 else FILE))
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: the folder {path.parent} is not there")
    write_report(runs, path)
    findings = {run.name: findings_of(run) for run in runs}
    if config.json:
        print(json.dumps({"report": str(path), "verdicts": findings}, indent=2))
        return {"status": "finished"}
    for name, lines in findings.items():
        print(f"{name}:", *(f"  {line}" for line in lines), sep="\n")
    print(f"Written to {path}")
    return {"status": "finished"}

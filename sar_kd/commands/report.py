"""`sar-kd report`: write report.html for one run, or for several side by side."""

from __future__ import annotations

import json
from pathlib import Path

from sar_kd.config.commands import ReportConfig
from sar_kd.reporting.history import findings_of, read_history
from sar_kd.reporting.report import FILE, check_page, write_report


def main(config: ReportConfig) -> dict:
    """Write the page, and print the findings and where it is; `--json` for programs.

    Raises: UsageError if a folder holds no run, or matplotlib is missing
    """
    folders = [Path(run) for run in config.runs]
    runs = [read_history(folder) for folder in folders]
    path = Path(config.output or (folders[0] / FILE if len(folders) == 1 else FILE))
    check_page(path, f"--output {path}")
    write_report(runs, path)
    findings = {run.name: findings_of(run) for run in runs}
    if config.json:
        print(json.dumps({"report": str(path), "verdicts": findings}, indent=2))
        return {"status": "finished"}
    for name, lines in findings.items():
        print(f"{name}:", *(f"  {line}" for line in lines), sep="\n")
    print(f"Written to {path}")
    return {"status": "finished"}

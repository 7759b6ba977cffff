"""`sar-kd compare`: is one run better than another, on the held-out documents of both?"""

from __future__ import annotations

import json
from pathlib import Path

from sar_kd.config.commands import CompareConfig
from sar_kd.reporting.run_comparison import compare_runs, comparison_table
from sar_kd.runtime.files import json_safe


def main(config: CompareConfig) -> dict:
    """Print the verdicts, then the models; `--json` for programs. Raises: UsageError as `compare_runs`"""
    found = compare_runs([Path(run) for run in config.runs])
    if config.json:
        print(json.dumps(json_safe(found), indent=2))
    else:
        print(*found["sentences"], *comparison_table(found), sep="\n")
    return {"status": "finished"}

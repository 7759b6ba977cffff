"""`sar-kd explain`: what went wrong in a log of losses and gradient norms."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from sar_kd.config.commands import ExplainConfig
from sar_kd.reporting.log_diagnosis import diagnose, diagnosis_lines, read_log


def main(config: ExplainConfig) -> dict:
    """Print the diagnosis; `--json` for programs.

    Raises: UsageError if there is no log to read
    """
    log = read_log(Path(config.log))
    print(json.dumps(asdict(diagnose(log)), indent=2) if config.json else "\n".join(diagnosis_lines(log)))
    return {"status": "finished"}

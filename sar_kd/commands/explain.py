"""`sar-kd explain`: what went wrong in a log of losses and gradient norms."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sar_kd.config.command_line import parse
from sar_kd.config.fields import Command, Section, option
from sar_kd.reporting.log_diagnosis import diagnose, diagnosis_lines, read_log


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(Section):
    """Log: the one to explain."""

    log: str = option(
        "", "a Trainer's output, trainer_state.json, metrics.jsonl, or their folder", metavar="LOG", positional=True
    )
    json: bool = option(False, "print JSON")


EXPLAIN = Command("explain", "Find the likely cause of the losses and gradient norms in a training log.", ExplainConfig)


def main(argv: list[str]) -> dict:
    """Print the diagnosis; `--json` for programs.

    Raises: UsageError if there is no log to read
    """
    config = parse(EXPLAIN, argv)
    log = read_log(Path(config.log))
    print(json.dumps(asdict(diagnose(log)), indent=2) if config.json else "\n".join(diagnosis_lines(log)))
    return {"status": "finished"}

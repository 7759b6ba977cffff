"""`sar-kd explain`: what went wrong in a log of losses and gradient norms."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sar_kd.config.command_line import parse
from sar_kd.config.fields import Command, option
from sar_kd.reporting.log_diagnosis import diagnose, lines_of, read_log
from sar_kd.runtime.console import wrap_lines


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Explaining: what a log shows."""

    log: str = option(
        "", "what a Trainer printed, its trainer_state.json, a metrics.jsonl, or the folder", metavar="LOG"
    )
    json: bool = option(False, "print JSON")


EXPLAIN = Command(
    name="explain",
    description="The likely cause of the losses and gradient norms in a log.",
    config=ExplainConfig,
    positionals=("log",),
)


def main(argv: list[str]) -> dict:
    """Print the likely cause of a log's pattern; `--json` for programs.

    Raises: UsageError if there is no log to read
    """
    config = parse(EXPLAIN, argv)
    log = read_log(Path(config.log))
    print(json.dumps(asdict(diagnose(log)), indent=2) if config.json else wrap_lines(*lines_of(log)))
    return {"status": "finished"}

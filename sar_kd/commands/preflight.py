"""`sar-kd preflight`: check a run before it starts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from sar_kd.config.command_line import parse
from sar_kd.config.presets import STABLE
from sar_kd.config.runs import Config
from sar_kd.config.sections import OutputConfig
from sar_kd.errors import UsageError
from sar_kd.models.loading import MetaModels
from sar_kd.preflight.checks import ALL_CHECKS, run_checks
from sar_kd.preflight.memory_plan import fit_batch_size
from sar_kd.runtime.console import wrap_lines
from sar_kd.runtime.distributed import SINGLE_PROCESS
from sar_kd.runtime.files import json_safe


@dataclass(frozen=True, kw_only=True)
class PreflightConfig(Config):
    """A run to check, and how to print what is found."""

    output: OutputConfig = field(default_factory=OutputConfig)


PREFLIGHT = dataclasses.replace(
    STABLE,
    name="preflight",
    description="Check a run with these options; nothing is trained.",
    config=PreflightConfig,
)


def main(argv: list[str]) -> dict:
    """Print what a run with these flags would find; with `--json` one object, whose `ok` says whether it could go on.

    Raises: UsageError for what would end the run
    """
    config = parse(PREFLIGHT, argv)
    as_json = config.output.json
    record: dict = {"ok": True}
    try:
        found = fit_batch_size(config, SINGLE_PROCESS)
        if found is not config:
            train = found.train
            record["batch_size"] = {
                name: getattr(train, name) for name in ("per_device_batch_size", "grad_accum_steps")
            }
            if not as_json:
                print(wrap_lines(found.notices[-1]))
        config = found
        for finding in run_checks(ALL_CHECKS, MetaModels(config)):
            record[finding.name] = finding.record
            if not as_json:
                for line in (*finding.lines, *(f"  {line}" for line in finding.table)):
                    print(wrap_lines(line))
            if finding.refusal:
                raise finding.refusal
    except UsageError as error:
        record |= {"ok": False, "error": str(error)}
        raise
    finally:
        if as_json:
            print(json.dumps(json_safe(record), indent=2))
    if not as_json:
        print("Ready: nothing stands in the way of this run")
    return {"status": "finished"}

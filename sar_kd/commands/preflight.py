"""`sar-kd preflight`: every check that can be made before a run."""

from __future__ import annotations

import json

from sar_kd.config.commands import PreflightConfig
from sar_kd.errors import UsageError
from sar_kd.models.loading import MetaModels
from sar_kd.preflight.checks import ALL_CHECKS, run_checks
from sar_kd.preflight.memory_plan import fit_batch_size
from sar_kd.runtime.distributed import SINGLE_PROCESS
from sar_kd.runtime.files import json_safe


def main(config: PreflightConfig) -> dict:
    """Print the findings; with `--json` one object, whose `ok` says whether the run could start.

    Raises: UsageError if the run could not start
    """
    as_json = config.output.json
    record: dict = {"ok": True}

    def show(*lines: str) -> None:
        for line in () if as_json else lines:
            print(line)

    try:
        show(*config.notices)
        fitted = fit_batch_size(config, SINGLE_PROCESS)
        if fitted is not config:
            names = ("per_device_batch_size", "grad_accum_steps")
            record["batch_size"] = {name: getattr(fitted.train, name) for name in names}
            show(fitted.notices[-1])
        for finding in run_checks(ALL_CHECKS, MetaModels(fitted)):
            record[finding.name] = finding.record
            show(*finding.lines, *(f"  {line}" for line in (*finding.details, *finding.table)))
            if finding.refusal:
                raise finding.refusal
    except UsageError as error:
        record |= {"ok": False, "error": str(error)}
        raise
    finally:
        if as_json:
            print(json.dumps(json_safe(record), indent=2))
    show("Ready: nothing stands in the way of this run")
    return {"status": "finished"}

"""`sar-kd preflight`: every check that can be made before a run."""

from __future__ import annotations

import json
from collections.abc import Callable

from sar_kd.config.commands import PreflightConfig
from sar_kd.config.runs import Config
from sar_kd.errors import UsageError
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, MetaModels
from sar_kd.preflight.checks import ALL_CHECKS
from sar_kd.preflight.memory_plan import fit_batch_size
from sar_kd.runtime.distributed import SINGLE_PROCESS
from sar_kd.runtime.files import json_safe


def main(config: PreflightConfig) -> dict:
    """Print the findings; with `--json` one object, whose `ok` says whether the run could start.

    Raises: UsageError if the run could not start
    """
    as_json = config.output.json
    record = check(config, (lambda line: None) if as_json else print)
    if as_json:
        print(json.dumps(json_safe(record), indent=2))
    if not record["ok"]:
        raise UsageError(record["error"])
    return {"status": "finished"}


def check(config: Config, show: Callable[[str], object], loaded: LoadedModels = NO_LOADED_MODELS) -> dict:
    """Make every check and show its lines; returns the records by check, `ok`, and the `error` of a run that could not
    start.
    """
    record: dict = {"ok": True}
    try:
        for line in config.notices:
            show(line)
        fitted = fit_batch_size(config, SINGLE_PROCESS, loaded)
        if fitted is not config:
            names = ("per_device_batch_size", "grad_accum_steps")
            record["batch_size"] = {name: getattr(fitted.train, name) for name in names}
            show(fitted.notices[-1])
        meta = MetaModels(fitted, loaded)
        for finding in (make_check(meta) for make_check in ALL_CHECKS):
            record[finding.name] = finding.record
            for line in (*finding.lines, *(f"  {line}" for line in (*finding.details, *finding.table))):
                show(line)
            if finding.refusal:
                raise finding.refusal
    except UsageError as error:
        return record | {"ok": False, "error": str(error)}
    show("Ready: nothing stands in the way of this run")
    return record

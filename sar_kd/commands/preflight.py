"""`sar-kd preflight`: check a run before it starts."""

from __future__ import annotations

import json

from sar_kd.config.command_line import parse_run
from sar_kd.errors import UsageError
from sar_kd.models.loading import MetaModels
from sar_kd.preflight.checks import ALL_CHECKS, run_checks
from sar_kd.preflight.memory_plan import fit_batch_size
from sar_kd.runtime.console import wrap_lines
from sar_kd.runtime.distributed import SINGLE_PROCESS
from sar_kd.runtime.files import plain


def main(argv: list[str]) -> dict:
    """Print what a run with these flags would find; with `--json` one object, whose `ok` says whether it could go on.

    Raises: UsageError for what would end the run
    """
    config, as_json = parse_run("preflight", "What a run with these flags would find. Nothing is trained.", argv)
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
            print(json.dumps(plain(record), indent=2))
    if not as_json:
        print("Ready: nothing stands in the way of this run")
    return {"status": "finished"}

"""`sar-kd preflight`: every check that can be made before a run."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from sar_kd.config.command_line import typed_command
from sar_kd.config.commands import CACHE, TRAIN, PreflightConfig
from sar_kd.config.runs import Config
from sar_kd.errors import UsageError
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, MetaModels
from sar_kd.preflight.checks import ALL_CHECKS
from sar_kd.preflight.fitting import fit, fit_batch_size
from sar_kd.preflight.memory_plan import MARGIN
from sar_kd.runtime.distributed import SINGLE_PROCESS
from sar_kd.runtime.files import json_safe

_NOT_OF_THE_CACHE = ("per_device_batch_size", "teacher_top_k", "overwrite", "json", "student_lr")
"""Options of a run that have another meaning for a teacher cache, or none"""


def main(config: PreflightConfig) -> dict:
    """Print the findings; with `--json` one object, whose `ok` says whether the run could start.

    Raises: UsageError if the run could not start
    """
    as_json = config.output.json
    record = check(config, (lambda line: None) if as_json else print)
    if found := record.get("fit") or record.get("memory", {}).get("fit"):
        found["commands"] = commands_of(config, record, found["options"])
        if found.get("missing"):
            found["commands"].insert(0, f"pip install {' '.join(found['missing'])}")
        for line in () if as_json else ("What fits:", *(f"  {command}" for command in found["commands"])):
            print(line)
    if as_json:
        print(json.dumps(json_safe(record), indent=2))
    if not record["ok"]:
        raise UsageError(record["error"])
    return {"status": "finished"}


def commands_of(config: Config, record: dict, options: dict) -> list[str]:
    """The command line of the run with these further options; before it, where it needs one, that of a teacher cache.

    record: of `check`
    """
    given = {**(config.origin.given if config.origin else {}), **options}
    if config.train.resume or "teacher_cache" not in options:
        return [typed_command(TRAIN, given)]
    sections = (getattr(config, name) for name in config.sections())
    chosen = {name: value for section in sections for name, value in vars(section).items() if name in config.chosen}
    cache = {name: value for name, value in chosen.items() if name not in _NOT_OF_THE_CACHE}
    cache["teacher_cache"] = options["teacher_cache"]
    size = getattr(torch, record["device"]["dtype"]).itemsize * record["models"]["teacher"]["parameters"]
    if size * (1 + MARGIN) > record["memory"]["available_bytes"]:
        cache["teacher_device_map"] = "auto"
    return [typed_command(CACHE, cache), typed_command(TRAIN, given)]


def check(config: Config, show: Callable[[str], object], loaded: LoadedModels = NO_LOADED_MODELS) -> dict:
    """Make every check and show its lines; returns the records by check, `ok`, and the `error` of a run that could not
    start.
    """
    record: dict = {"ok": True}
    try:
        for line in config.notices:
            show(line)
        chosen = fit(config, SINGLE_PROCESS, loaded)
        for line in (line for line in chosen.notices if line not in config.notices):
            show(line)
        if chosen is not config and chosen.origin and config.origin:
            before = config.origin.given
            options = {name: value for name, value in chosen.origin.given.items() if before.get(name) != value}
            record["fit"] = {"options": {k: v for k, v in options.items() if k not in ("fit", "output_dir")}}
        fitted = fit_batch_size(chosen, SINGLE_PROCESS, loaded)
        if fitted is not chosen:
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

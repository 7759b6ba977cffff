"""What `--save_dtype` and `--push_to_hub` ask for: the best student of a finished run rounded, and uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sar_kd.config.fields import RunConfig
from sar_kd.config.hand_over import HandOverConfig
from sar_kd.config.installation import program_name
from sar_kd.errors import UsageError
from sar_kd.models.saved_weights import convert_saved, require_in_range
from sar_kd.reporting.model_card import saved_dtype
from sar_kd.reporting.run_log import RunLog
from sar_kd.reporting.summary_file import amend_summary
from sar_kd.reporting.summary_table import next_commands
from sar_kd.runtime.console import format_bytes
from sar_kd.runtime.distributed import ProcessGroup
from sar_kd.runtime.hub import push_folder, require_upload
from sar_kd.runtime.run_folder import saved_student
from sar_kd.version import __version__


def check_hand_over(config: RunConfig, student: nn.Module) -> None:
    """Raise UsageError, before the first step, if the upload has no token or the student at the start overflows."""
    settings: HandOverConfig = config.hand_over
    if settings.push_to_hub:
        require_upload(settings.push_to_hub)
    if settings.save_dtype != "float32" and not config.lora.adapter_only:
        require_in_range(f"--save_dtype {settings.save_dtype}", student, getattr(torch, settings.save_dtype))


def hand_over(config: RunConfig, summary: dict, group: ProcessGroup) -> dict:
    """Round the best student of a finished run, and upload it; returns the summary with what was done.

    Raises: UsageError if a weight would overflow, or the hub refuses the upload; the run's results stay as they are
    """
    settings: HandOverConfig = config.hand_over
    if not settings.is_asked:
        return summary
    done = group.broadcast(group.on_rank_zero(lambda: _hand_over(config, settings, summary["status"])))
    return summary | (done or {})


def _hand_over(config: RunConfig, settings: HandOverConfig, status: str) -> dict:
    folder, dtype, done = Path(config.train.output_dir), settings.save_dtype, dict[str, Any]()
    log = RunLog(config)
    log.append()
    try:
        if status != "finished":
            log.info("The student is not rounded and not uploaded, as the run has not finished: --resume")
            return done
        student = saved_student(folder)
        former = "" if config.lora.adapter_only else saved_dtype(student)
        if former not in ("", dtype):
            if former != "float32":
                log.info(f"--save_dtype {dtype}: {student} is in {former} already, which the best step has left so")
            else:
                done |= _round(f"--save_dtype {dtype}", student, dtype, log)
                amend_summary(folder, done)
        if settings.push_to_hub:
            done["hub_url"] = push_student(folder, student, settings.push_to_hub, settings.public, log)
            amend_summary(folder, {"hub_url": done["hub_url"]})
        for line in next_commands(folder):
            log.info(line)
        return done
    finally:
        log.close()


def _round(title: str, student: Path, dtype: str, log: RunLog) -> dict:
    try:
        num_zeros = convert_saved(title, student, getattr(torch, dtype))
    except UsageError as error:
        raise UsageError(f"{error}; the run has finished, and {student} stays in float32") from None
    rest = f"; {num_zeros:,} weights that were not 0 are now" if num_zeros else ""
    size = format_bytes(sum(path.stat().st_size for path in student.glob("*.safetensors")))
    log.info(f"Saved in {dtype}: {student}, {size}{rest}")
    return {"student_dtype": dtype, "student_weights_rounded_to_0": num_zeros}


def push_student(run: Path, student: Path, name: str, public: bool, log: RunLog | None = None) -> str:
    """Upload the student of a run; returns the address of its repository. log: gets a line before and after

    Raises: UsageError with the command that tries again
    """
    say = log.info if log else print
    size = format_bytes(sum(path.stat().st_size for path in student.rglob("*") if path.is_file()))
    say(f"Uploading {student}, {size}, to {name}")
    try:
        url = push_folder(student, name, public, f"Upload by SAR-KD {__version__}")
    except UsageError as error:
        again = f"{program_name()} export {run} --push_to_hub {name}{' --public' if public else ''}"
        raise UsageError(f"{error}; {student} is as it was, and `{again}` tries again") from None
    say(f"Uploaded: {url}")
    return url

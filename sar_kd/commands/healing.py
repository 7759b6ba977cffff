"""Distillation of a whole model into the one that was cut out of it: the ordinary run, with its folder inside."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sar_kd.commands.train import train
from sar_kd.config.command_line import configure
from sar_kd.config.commands import TRAIN
from sar_kd.config.installation import program_name
from sar_kd.config.sections import DataConfig
from sar_kd.config.shrinking import ShrinkingConfig
from sar_kd.runtime.console import print_stderr
from sar_kd.runtime.run_folder import saved_student

HEALING = "healing"
"""The run folder, in that of the cut model"""


def healed_student(folder: Path) -> Path:
    """Where the run has saved its best student."""
    return saved_student(folder / HEALING)


def heal(config: ShrinkingConfig, folder: Path) -> str:
    """Distil `--model` into the model in `folder`; returns the status of the run.

    Raises: as a run, once a line has said that the cut model is intact
    """
    settings, run = config.shrink, folder / HEALING
    options = {
        "mode": "precise", "teacher_model": settings.model, "student_model": str(folder), "output_dir": str(run),
        "train_steps": settings.heal_steps, "student_lr": settings.student_lr, "device": settings.device,
        "per_device_batch_size": settings.per_device_batch_size, "model_dtype": settings.model_dtype,
        "trust_remote_code": settings.trust_remote_code, "quiet": config.output.json,
    }  # fmt: skip
    text = {
        item.name: getattr(config.data, item.name)
        for item in dataclasses.fields(DataConfig)
        if getattr(config.data, item.name) != item.default
    }
    if config.data.task:  # its teacher is the whole model as it is, and nothing else is trained
        options |= {"skip_baseline": True, "task_teacher_steps": 0}
    status = "failed"
    try:
        status = str(train(configure(TRAIN, options | text))["status"])
    finally:
        if status != "finished":
            again = f"{program_name()} train --resume --output_dir {run}" if (run / "checkpoint").is_dir() else ""
            print_stderr(
                f"The distillation has not finished; the cut model in {folder} is intact"
                + (f"; to go on: {again}" if again else "")
            )
    return status

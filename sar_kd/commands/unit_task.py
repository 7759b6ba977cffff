"""`--task` in a distillation run: before it the embedded teacher is fine-tuned on the task, which it does not know.

That is a run of its own, in a folder beside the run's: a finished one is used as it is, an interrupted one continued.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from sar_kd import embedded
from sar_kd.commands.sft import fine_tune
from sar_kd.config.commands import SFT
from sar_kd.config.runs import Config, SftConfig, SftModelConfig, SftOptimConfig, SftTrainConfig
from sar_kd.config.sections import EMBEDDED, DataConfig
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, Models
from sar_kd.preflight.checks import preflight
from sar_kd.runtime.files import CHECKPOINTS
from sar_kd.runtime.precision import Precision
from sar_kd.training.callbacks import Callback, TaskEvaluation

TEACHER_LR = 1e-3
"""Learning rate of the embedded teacher on a task."""


def prepare_task(config: Config, loaded: LoadedModels = NO_LOADED_MODELS) -> Config:
    """With `--task`: fine-tune the embedded teacher; returns the settings with that one.

    Raises: UsageError, TrainingDiverged as `fine_tune`; KeyboardInterrupt if that run was interrupted
    """
    if not (config.data.task and config.models.teacher_model == EMBEDDED and config.data.task_teacher_steps):
        return config
    deadline = time.monotonic() + config.train.time_limit_seconds
    preflight(config, lambda line: None, loaded)  # what stands in the way of the run shows now, not after this one
    of_teacher = _teacher_config(config, f"{config.train.output_dir.rstrip('/')}-teacher")
    _fine_tune(of_teacher, config.train.resume)
    teacher = str(Path(of_teacher.train.output_dir) / "student")
    models = dataclasses.replace(config.models, teacher_model=teacher)
    return dataclasses.replace(config, models=models, train=config.train.with_time_left(deadline - time.monotonic()))


def task_callbacks(config: Config, models: Models, limits: tuple[int, int], precision: Precision) -> list[Callback]:
    """With `--task`: accuracy and answer rate before and after the run. limits: as `Models.block_limits`"""
    if not config.data.task:
        return []
    return [TaskEvaluation(models, limits, precision, config.models.trust_remote_code)]


def _teacher_config(config: Config, folder: str) -> SftConfig:
    return SftConfig(
        models=SftModelConfig(student_model=str(embedded.TEACHER_DIR)),
        data=_data_config(config),
        optim=SftOptimConfig(student_lr=TEACHER_LR, warmup_steps=50),
        precision=config.precision,
        guards=dataclasses.replace(config.guards, **SFT.defaults),
        train=_train_config(config, folder, train_steps=config.data.task_teacher_steps, grad_accum_steps=1),
        notices=(f"First the teacher learns --task {config.data.task}; in this part 'student' means the teacher",),
    )


def _train_config(config: Config, folder: str, **changes: Any) -> SftTrainConfig:
    values = dataclasses.asdict(config.train) | {"output_dir": folder, "save_strategy": "steps", "resume": False}
    return SftTrainConfig(**values | changes)


def _data_config(config: Config) -> DataConfig:
    return DataConfig.from_options(dataclasses.asdict(config.data))


def _fine_tune(config: SftConfig, resumes: bool) -> None:
    """Make this run: not at all if it is finished, else from its checkpoint or from the start.

    resumes: the distillation run is resumed; then this run belongs to it, even if settings have changed since
    """
    folder = Path(config.train.output_dir)
    is_same_run = _settings(_read_json(folder / "config.json")) == _settings(config.to_dict())
    if not config.train.overwrite and (resumes or is_same_run):
        if _read_json(folder / "summary.json").get("status") == "finished":
            return
        resumable = (folder / CHECKPOINTS / "latest").is_file()
        train = dataclasses.replace(config.train, resume=resumable, overwrite=not resumable)
        config = dataclasses.replace(config, train=train)
    if fine_tune(config)["status"] == "interrupted":
        raise KeyboardInterrupt


def _settings(config: dict) -> dict:
    """The settings that make a run what it is, as `config.json` has them."""
    config = json.loads(json.dumps(config))
    for name in ("resume", "overwrite", "time_limit"):
        config.get("train", {}).pop(name, None)
    return config


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

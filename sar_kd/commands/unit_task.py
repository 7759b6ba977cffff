"""`--task` in a distillation run: two fine-tuning runs that come before it, each in a folder beside the run's own.

First the embedded teacher is fine-tuned on the task, which it does not know. Then a student is trained without the
teacher, on the same examples in the same order and at the same learning rate: the baseline to compare with. A finished
one is used as it is, an interrupted one is continued.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, TypeVar

from sar_kd import embedded
from sar_kd.commands.sft import fine_tune
from sar_kd.config.commands import SFT
from sar_kd.config.runs import Config, SftConfig, SftModelConfig, SftOptimConfig, SftTrainConfig
from sar_kd.config.sections import EMBEDDED, DataConfig, MemoryConfig
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, Models
from sar_kd.preflight.checks import preflight
from sar_kd.runtime.files import CHECKPOINTS
from sar_kd.runtime.precision import Precision
from sar_kd.training.callbacks import Callback, TaskEvaluation

R = TypeVar("R", Config, SftConfig)

TEACHER_LR = 1e-3
"""Learning rate of the embedded teacher on a task."""


def prepare_task(config: Config, loaded: LoadedModels = NO_LOADED_MODELS) -> tuple[Config, dict | None]:
    """With `--task`: fine-tune the embedded teacher, and train the baseline.

    Returns: the settings with the fine-tuned teacher; the summary of the baseline, None without one
    Raises: UsageError, TrainingDiverged as `fine_tune`; KeyboardInterrupt if one of the runs was interrupted
    """
    if not config.data.task:
        return config, None
    started = time.monotonic()
    preflight(config, lambda line: None, loaded)  # what stands in the way of the run shows now, not after these two
    folder = config.train.output_dir.rstrip("/")
    if config.models.teacher_model == EMBEDDED and config.data.task_teacher_steps:
        of_teacher = _teacher_config(config, f"{folder}-teacher")
        _run(of_teacher, config.train.resume, started)
        teacher = str(Path(of_teacher.train.output_dir) / "student")
        config = dataclasses.replace(config, models=dataclasses.replace(config.models, teacher_model=teacher))
    baseline = None
    if not config.data.skip_baseline:
        baseline = _run(_baseline_config(config, f"{folder}-cross-entropy"), config.train.resume, started)
    return _with_time_left(config, started), baseline


def task_callbacks(
    config: Config, baseline: dict | None, models: Models, limits: tuple[int, int], precision: Precision
) -> list[Callback]:
    """With `--task`: accuracy and answer rate before and after the run, and those of the baseline.

    baseline: as `prepare_task` returns it; limits: as `Models.block_limits`
    """
    if not config.data.task:
        return []
    evaluation = TaskEvaluation(models, limits, precision, config.models.trust_remote_code)
    return [evaluation, Baseline(baseline)] if baseline else [evaluation]


class Baseline(Callback):
    """The student trained by cross-entropy alone, for the summary table and `summary.json`."""

    def __init__(self, summary: dict):
        super().__init__()
        self.state = {name: summary[name] for name in ("val_ppl_best", "val_bits_per_byte_best", "best_step")}
        self._scores = summary["benchmark_result"]["student"]

    def on_train_begin(self) -> list[str]:
        return [
            f"Cross-entropy alone, the same steps: PPL {self.state['val_ppl_best']:.2f}, accuracy "
            f"{self._scores['accuracy']:.3f}, answer rate {self._scores['answer_rate']:.3f}"
        ]

    def summary(self) -> dict:
        return {"cross_entropy_only": {**self.state, **self._scores}}


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


def _baseline_config(config: Config, folder: str) -> SftConfig:
    return SftConfig(
        models=SftModelConfig(
            student_model=config.models.student_model, trust_remote_code=config.models.trust_remote_code
        ),
        data=_data_config(config),
        lora=config.lora,
        optim=SftOptimConfig(**dataclasses.asdict(config.optim)),
        loss=dataclasses.replace(config.loss, alpha_kd=0.0, alpha_ce=config.loss.alpha_ce or 1.0),
        precision=config.precision,
        memory=MemoryConfig(gradient_checkpointing=config.memory.gradient_checkpointing),
        guards=config.guards,
        train=_train_config(config, folder),
        notices=("For comparison the student learns without a teacher, the same steps; --skip_baseline leaves it out",),
    )


def _train_config(config: Config, folder: str, **changes: Any) -> SftTrainConfig:
    values = dataclasses.asdict(config.train) | {"output_dir": folder, "save_strategy": "steps", "resume": False}
    return SftTrainConfig(**values | changes)


def _data_config(config: Config) -> DataConfig:
    return DataConfig.from_options(dataclasses.asdict(config.data))


def _with_time_left(config: R, started: float) -> R:
    """The settings with the rest of `--time_limit`, which counts from the start of the first run."""
    left = config.train.time_limit_seconds - (time.monotonic() - started)
    return config if left == math.inf else _with_train(config, time_limit=f"{max(1, int(left))}s")


def _with_train(config: R, **changes: Any) -> R:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def _run(config: SftConfig, resumes: bool, started: float) -> dict:
    """The summary of this run: read if it is finished, else run from its checkpoint or from the start.

    resumes: the distillation run is resumed; then this run belongs to it, even if settings have changed since
    """
    folder = Path(config.train.output_dir)
    is_same_run = _settings(_read_json(folder / "config.json")) == _settings(config.to_dict())
    if not config.train.overwrite and (resumes or is_same_run):
        summary = _read_json(folder / "summary.json")
        if summary.get("status") == "finished":
            return summary
        resumable = (folder / CHECKPOINTS / "latest").is_file()
        config = _with_train(config, resume=resumable, overwrite=not resumable)
    summary = fine_tune(_with_time_left(config, started))
    if summary["status"] == "interrupted":
        raise KeyboardInterrupt
    return summary


def _settings(config: dict) -> dict:
    """The settings that make a run what it is, as `config.json` has them."""
    config = json.loads(json.dumps(config))
    for name in ("resume", "overwrite", "time_limit"):
        config.get("train", {}).pop(name, None)
    return config


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

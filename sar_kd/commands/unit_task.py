"""`--task` in a distillation run: what comes before it, so that there is something to distil and something to compare.

The embedded teacher cannot do the task, so it is fine-tuned on it first; and the student is trained on the same
examples by cross-entropy alone, at the same rate and in the same order, so that what the teacher is worth shows. Both
are runs of their own beside the run's folder. One that is finished is taken as it is, one that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, TypeVar

from sar_kd import embedded
from sar_kd.commands.sft import SFT, fine_tune
from sar_kd.config.runs import Config, SftConfig, SftModelConfig, SftOptimConfig, SftTrainConfig
from sar_kd.config.sections import EMBEDDED, MemoryConfig
from sar_kd.errors import UsageError
from sar_kd.models.loading import Models
from sar_kd.runtime.precision import Precision
from sar_kd.training.callbacks import Callback, TaskEvaluation

R = TypeVar("R", Config, SftConfig)

TEACHER_LR = 1e-3
"""Of the embedded teacher on a task."""


class Task:
    """What `--task` asks for beside the run itself; without it, nothing."""

    def __init__(self, config: Config, baseline: dict | None = None):
        """config: of the distillation run, its teacher ready; baseline: the summary of cross-entropy alone, if any"""
        self.config, self._baseline = config, baseline

    def callbacks(self, models: Models, limits: tuple[int, int], precision: Precision) -> list[Callback]:
        """The exam, and what the result is compared with."""
        if not self.config.data.task:
            return []
        trust = self.config.models.trust_remote_code
        found: list[Callback] = [TaskEvaluation(models, limits, precision, trust)]
        return [*found, Baseline(self._baseline)] if self._baseline else found


class Baseline(Callback):
    """Cross-entropy alone, for the closing table and `summary.json`."""

    def __init__(self, summary: dict):
        super().__init__()
        self.state = {name: summary[name] for name in ("val_ppl_best", "val_bits_per_byte_best", "best_step")}
        self.score = summary["benchmark_result"]["student"]

    def on_train_begin(self) -> list[str]:
        """What the student reaches without a teacher."""
        accuracy, answer_rate = (self.score[name] for name in ("accuracy", "answer_rate"))
        return [
            f"Cross-entropy alone, the same steps: PPL {self.state['val_ppl_best']:.2f}, accuracy {accuracy:.3f}, "
            f"answer rate {answer_rate:.3f}"
        ]

    def summary(self) -> dict:
        """The same for `summary.json`."""
        return {"cross_entropy_only": {**self.state, **self.score}}


def prepare_task(config: Config) -> tuple[Config, Task]:
    """Make what the run needs before it starts: with `--task`, a teacher that knows it and a student to compare with.

    Returns: the settings, their teacher the one that is ready; and the task

    Raises: UsageError, TrainingDiverged as `supervised.fine_tune`; KeyboardInterrupt if one of them was interrupted
    """
    if not config.data.task:
        return config, Task(config)
    started = time.monotonic()
    folder = config.train.output_dir.rstrip("/")
    if config.models.teacher_model == EMBEDDED and config.data.task_teacher_steps:
        if config.models.teacher_cache:
            raise UsageError(
                f"--teacher_cache {config.models.teacher_cache}: --task fine-tunes the embedded teacher first, whose "
                "answers nobody has kept; name the fine-tuned one with --teacher_model, and a cache made of it"
            )
        ready = _teacher_config(config, f"{folder}-teacher")
        _run(ready, config.train.resume, started)
        teacher = str(Path(ready.train.output_dir) / "student")
        config = dataclasses.replace(config, models=dataclasses.replace(config.models, teacher_model=teacher))
    baseline = None
    if not config.data.skip_baseline:
        baseline = _run(_baseline_config(config, f"{folder}-cross-entropy"), config.train.resume, started)
    return _in_time(config, started), Task(config, baseline)


def _teacher_config(config: Config, folder: str) -> SftConfig:
    guards: dict[str, Any] = {name: value for name, value in SFT.defaults.items() if hasattr(config.guards, name)}
    return SftConfig(
        models=SftModelConfig(student_model=str(embedded.TEACHER_DIR)),
        data=config.data,
        optim=SftOptimConfig(learning_rate=TEACHER_LR, warmup_steps=50),
        precision=config.precision,
        guards=dataclasses.replace(config.guards, **guards),
        train=_calendar(config, folder, train_steps=config.data.task_teacher_steps, grad_accum_steps=1),
        notices=(f"First the teacher learns --task {config.data.task}; in this part 'student' means the teacher",),
    )


def _baseline_config(config: Config, folder: str) -> SftConfig:
    optim = dataclasses.asdict(config.optim)
    return SftConfig(
        models=SftModelConfig(
            student_model=config.models.student_model, trust_remote_code=config.models.trust_remote_code
        ),
        data=config.data,
        optim=SftOptimConfig(learning_rate=optim.pop("student_lr"), **optim),
        loss=dataclasses.replace(config.loss, alpha_kd=0.0, alpha_ce=config.loss.alpha_ce or 1.0),
        precision=config.precision,
        memory=MemoryConfig(gradient_checkpointing=config.memory.gradient_checkpointing),
        guards=config.guards,
        train=_calendar(config, folder),
        notices=("For comparison the student learns without a teacher, the same steps; --skip_baseline leaves it out",),
    )


def _calendar(config: Config, folder: str, **changes) -> SftTrainConfig:
    values = dataclasses.asdict(config.train) | {"output_dir": folder, "save_strategy": "steps", "resume": False}
    return SftTrainConfig(**values | changes)


def _in_time(config: R, started: float) -> R:
    """The same with what is left of `--time_limit`, which counts from the start of all."""
    left = config.train.time_limit_seconds - (time.monotonic() - started)
    if left == math.inf:
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, time_limit=f"{max(1, int(left))}s"))


def _run(config: SftConfig, resumes: bool, started: float) -> dict:
    """The summary of this run: of one that is finished, or after its rest, or anew.

    resumes: the run that it belongs to has begun, so that this one is what it began with, whatever has changed since
    """
    folder = Path(config.train.output_dir)
    summary = _read(folder / "summary.json")
    if not config.train.overwrite and (resumes or _holds(folder, config)):
        if summary.get("status") == "finished":
            return summary
        if (folder / "checkpoint" / "latest").is_file():
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, resume=True))
        else:
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, overwrite=True))
    summary = fine_tune(_in_time(config, started))
    if summary["status"] == "interrupted":
        raise KeyboardInterrupt
    return summary


def _holds(folder: Path, config: SftConfig) -> bool:
    """Is this very run in the folder?"""
    saved, own = _read(folder / "config.json"), json.loads(json.dumps(config.to_dict()))
    for settings in (saved, own):
        for name in ("resume", "overwrite", "time_limit"):
            settings.get("train", {}).pop(name, None)
    return saved == own


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

"""The control of a distillation run: the same student from the same start, on the same batches, by cross-entropy alone.

It is trained after the run, in a folder beside the run's own, and takes over the run's tokenized text. What the two
students lose on each held-out document says what the teacher was worth.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
from pathlib import Path
from typing import NamedTuple

import torch

from sar_kd.commands.unit_task import task_callbacks
from sar_kd.config.hand_over import HandOverConfig
from sar_kd.config.runs import ComparisonConfig, Config, OnPolicyConfig
from sar_kd.config.sections import SELF, TrainConfig
from sar_kd.data.files.sources import Documents
from sar_kd.errors import TrainingDiverged, UsageError
from sar_kd.losses.objective import Objective
from sar_kd.models.loading import LoadedModels, load_student
from sar_kd.reporting.comparison import compare_with_control
from sar_kd.reporting.held_out import read_held_out
from sar_kd.reporting.run_log import ControlLog, log_with_control, open_run
from sar_kd.runtime.distributed import ProcessGroup
from sar_kd.runtime.files import CHECKPOINTS
from sar_kd.runtime.precision import setup_precision
from sar_kd.runtime.run_folder import check_run_folder, clear_run_folder, hold_run_folder, holds_run
from sar_kd.teacher.base import NoTeacher
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.parallel import build_strategy
from sar_kd.training.run_inputs import digest_inputs
from sar_kd.training.sample_texts import SampleTexts
from sar_kd.training.step import StepContext
from sar_kd.training.trainer import Datasets, Trainer

_STUDENT = "student_model"

_SAME_START = 1e-4
"""Bits per byte at the start that differ by more than this share are of two students"""


class TrainedText(NamedTuple):
    """What a run has trained on, as its control takes it over."""

    documents: tuple[Documents, Documents]
    datasets: Datasets
    tokenizers: TokenizerPair
    limits: tuple[int, int]
    """Most tokens in a block for student and teacher"""
    passes: int
    """Consecutive steps on the same text"""


class Control:
    """The control of one run. It is planned before the run, so that what stands in its way is found at once."""

    def __init__(self, config: Config, loaded: LoadedModels, group: ProcessGroup):
        """Raises: UsageError if its folder holds another run, or cannot be written"""
        self._deadline = time.monotonic() + config.train.time_limit_seconds
        self._group, self._folder = group, Path(f"{config.train.output_dir.rstrip('/')}-control")
        group.on_rank_zero(lambda: self._check_folder(config.train))
        pairs = {name: pair for name, pair in loaded.pairs.items() if name == _STUDENT}
        self.observers = [_ClearedAtStart(self._folder)] if config.train.overwrite else []
        """For the log of the run"""
        self._config_of(config)  # refuses here what it would refuse behind the run
        self._loaded = LoadedModels({name: (copy.deepcopy(model), own) for name, (model, own) in pairs.items()})

    def _check_folder(self, train: TrainConfig) -> None:
        if holds_run(self._folder) and not (train.resume or train.overwrite):
            raise UsageError(
                f"--output_dir {train.output_dir}: the control goes to {self._folder}, which holds a run; --overwrite "
                "deletes both"
            )
        check_run_folder(self._folder, dataclasses.replace(train, overwrite=True, resume=False))

    def compare(self, config: Config, summary: dict, text: TrainedText) -> dict:
        """Train the control, or what is left of it, and add it to the run's summary, table and pages.

        config, summary: of the run; the summary of one that has not finished is returned as it is
        Returns: the summary with `control` and `comparison`; its status is 'interrupted' where the control was
        """
        if summary["status"] != "finished":
            return summary
        gc.collect()  # the run's models, optimizer and teacher
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        control = self._config_of(config)
        with hold_run_folder(control.train, self._group):
            try:
                found = self._train(control, summary["val_bits_per_byte_start"], text)
            except TrainingDiverged as error:
                found = {"status": "emergency_stop", "stop_reason": str(error)}
        summary = summary | {"control": _entry(found, self._folder)}
        if found["status"] == "finished":
            folders = Path(config.train.output_dir), self._folder
            comparison = self._group.on_rank_zero(lambda: compare_with_control(*map(read_held_out, folders)))
            summary["comparison"] = self._group.broadcast(comparison)
        self._group.on_rank_zero(lambda: log_with_control(config, summary))
        return summary | ({"status": "interrupted"} if found["status"] == "interrupted" else {})

    def _config_of(self, config: Config) -> Config:
        """The run's settings with cross-entropy as the only loss, and without what needs the teacher."""
        resumes = config.train.resume and (self._folder / CHECKPOINTS / "latest").is_file()
        overwrites = not resumes and holds_run(self._folder)
        train, models = config.train.with_time_left(self._deadline - time.monotonic()), config.models
        if models.teacher_model == SELF:  # there is no teacher, and this one asks for a loss with it
            models = dataclasses.replace(models, teacher_model=models.student_model)
        return dataclasses.replace(
            config,
            models=models,
            loss=dataclasses.replace(config.loss, alpha_kd=0.0, alpha_ce=1.0),
            routing=dataclasses.replace(config.routing, routing="native"),
            on_policy=OnPolicyConfig(),
            comparison=ComparisonConfig(skip_baseline=True),
            hand_over=HandOverConfig(),
            train=dataclasses.replace(train, output_dir=str(self._folder), resume=resumes, overwrite=overwrites),
            notices=("Control: the same student, start, batches and steps as the run's, without the teacher",),
        )

    def _train(self, config: Config, start: float, text: TrainedText) -> dict:
        """start: bits per byte of the run's student before its first step"""
        group, train = self._group, config.train
        log = open_run(config, ControlLog, group, [_SameStart(start, config)])
        precision = setup_precision(config.precision, train.seed, group)
        models = load_student(config, precision, self._loaded)
        models = dataclasses.replace(models, tokenizers=text.tokenizers)
        objective = Objective(None, models.student, config.loss, text.datasets.train.aligner, precision)
        strategy = build_strategy(objective, train, group)
        optimizer = build_optimizer(models.student, config.optim)
        guard = StepGuard(config.guards)
        context = StepContext(objective, optimizer, guard, precision, config.guards.max_grad_norm, strategy=strategy)
        samples = SampleTexts(models, text.documents[1], precision, train)
        callbacks = [*task_callbacks(config, models, text.limits, precision), samples]
        inputs = digest_inputs(config, text.documents, models, group)
        teacher = NoTeacher(text.passes)
        return Trainer(config, models, text.datasets, context, log, teacher, callbacks, inputs=inputs).run()


class _ClearedAtStart:
    """An observer of a run's log that deletes the control of the run which this one overwrites."""

    name = "the removal of an earlier control"

    def __init__(self, folder: Path):
        self._folder = folder

    def log_record(self, record: dict) -> None:
        if record["event"] == "start" and holds_run(self._folder):
            clear_run_folder(self._folder)

    def log_summary(self, summary: dict) -> None:
        pass

    def close(self) -> None:
        pass


class _SameStart:
    """An observer of the control's log: is its student the one that the run began with?"""

    name = "the check of the control's start"

    def __init__(self, start: float, config: Config):
        self._start, self._config = start, config

    def log_record(self, record: dict) -> None:
        if record["event"] == "start" and abs(record["val_bits_per_byte"] - self._start) > _SAME_START * self._start:
            raise UsageError(
                f"--student_model {self._config.models.student_model}: has {record['val_bits_per_byte']:.4f} bits per "
                f"byte on the held-out text, and had {self._start:.4f} when the run began: one of them has changed "
                "since, so there can be no control; put back what was there"
            )

    def log_summary(self, summary: dict) -> None:
        pass

    def close(self) -> None:
        pass


def _entry(found: dict, folder: Path) -> dict:
    """The control in the summary of its run. found: its own summary"""
    names = (
        "status", "stop_reason", "steps", "best_step", "val_ppl_start", "val_ppl_best", "val_bits_per_byte_start",
        "val_bits_per_byte_best", "wall_seconds",
    )  # fmt: skip
    scores = found.get("benchmark_result", {}).get("student", {})
    return {"folder": str(folder), **{name: found[name] for name in names if name in found}, **scores}

"""The loop around the step: show it; evaluate, save and stop when the calendar says so."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from sar_kd.config.fields import RunConfig
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset
from sar_kd.errors import TrainingDiverged, UsageError
from sar_kd.evaluation.perplexity import Evaluation, evaluate, figures_of, shard_batches
from sar_kd.losses.objective import Objective
from sar_kd.models.loading import Models
from sar_kd.models.lora import exports
from sar_kd.preflight.checks import describe
from sar_kd.preflight.clamp_checks import check_clamps
from sar_kd.reporting.run_log import RunLog
from sar_kd.runtime.precision import Precision
from sar_kd.runtime.signals import StopRequest
from sar_kd.teacher.base import NoTeacher
from sar_kd.teacher.live import LiveTeacher
from sar_kd.training.batch_loader import BatchLoader
from sar_kd.training.callbacks import Callback, Callbacks
from sar_kd.training.checkpoint import TrainerState, load_checkpoint, save_checkpoint, save_student
from sar_kd.training.guards import StepGuard, notices_of
from sar_kd.training.on_policy import OnPolicy
from sar_kd.training.optimizer import learning_rate_at, set_learning_rate_
from sar_kd.training.parallel import SINGLE_DEVICE, ParallelStrategy
from sar_kd.training.recovery import Recovery
from sar_kd.training.step import StepReport, train_step


class Trainer:
    """A run: its parts, and the calendar of what happens when."""

    def __init__(
        self,
        config: RunConfig,
        models: Models,
        train: Dataset,
        validation: Dataset,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        guard: StepGuard,
        precision: Precision,
        log: RunLog,
        routing: LiveTeacher | NoTeacher,
        placement: ParallelStrategy = SINGLE_DEVICE,
        companions: Sequence[Callback] = (),
        on_policy: OnPolicy | None = None,
    ):
        self.placement, self.process_group = placement, placement.process_group
        self.config, self.models, self.log, self.routing = config, models, log, routing
        self.train, self.validation = train, validation
        self.objective, self.optimizer, self.guard, self.precision = objective, optimizer, guard, precision
        self.folder = Path(config.train.output_dir)
        self.progress = TrainerState()
        self.companions = Callbacks([*companions, on_policy] if on_policy is not None else companions)
        self.recovery = Recovery(self.folder, train, objective, precision, placement)
        self.feed = BatchLoader(train, config.train, routing.passes, placement.process_group, on_policy)

    def run(self) -> dict:
        """Train to `train_steps`, or to an interruption; the returned summary's `status` says which.

        Raises: TrainingDiverged after an emergency stop, once everything is saved; UsageError if a resumed run
        cannot be read, or preflight finds that nothing could be learned
        """
        with self.routing:
            return self._run()

    def _run(self) -> dict:
        before = time.monotonic()
        try:
            if self.config.train.resume:
                self._resume()
            else:
                self._begin()
            with StopRequest(self.log.deadline if self.process_group.is_rank_zero else math.inf) as interruption:
                status = self._train(interruption, before)
            if status == "finished":
                self._say(self.companions.finish(self.folder / "student"))
            return self._finish(status)
        except (RuntimeError, OSError):  # memory, a driver, a disk: the weights are still the last good ones
            self._save_in_need()
            raise
        finally:
            self.feed.close()
            self.log.close()

    def _train(self, interruption: StopRequest, before: float) -> str:
        """All steps that are left; returns how it ended. `before`: when the run began."""
        settings, progress = self.config.train, self.progress
        while progress.step < settings.train_steps:
            started = time.monotonic()
            report, window = self._attempt()
            progress.train_seconds += time.monotonic() - started
            interrupted = self.process_group.any_rank(interruption.requested)
            self._record(report)
            self.recovery.note(progress.step, report, window)
            lines, reason = self.companions.look(progress.step, report, window)
            self._say(lines)
            if report.verdict.emergency and self._rewinds():
                progress = self._rewind(report)
                continue
            at_end = progress.step == settings.train_steps or report.verdict.emergency
            if progress.step % settings.eval_steps == 0 or at_end:
                self._validate()
            progress.seconds += time.monotonic() - before
            before = time.monotonic()
            if report.verdict.emergency:
                self._stop(report)
            if reason:
                self._give_up(reason)
            if progress.step % settings.save_steps == 0 or at_end or interrupted:
                self._save()
            if interrupted and not at_end:
                return "interrupted"
        return "finished"

    def _attempt(self) -> tuple[StepReport, Callable[[], list[Batch]]]:
        """One step, and a way to the micro-batches that it was bad in, of whatever rank."""
        step = self.progress.step
        settings, factor = self.config, self.progress.rate_factor

        def rate_at(peak: float) -> float:
            return factor * learning_rate_at(step, settings.train.train_steps, settings.optim, peak)

        set_learning_rate_(self.optimizer, rate_at(settings.optim.student_lr))
        micro_batches, window = self.feed.take(step, frozenset(self.progress.left_out))
        report = train_step(
            micro_batches,
            self.objective,
            self.optimizer,
            self.guard,
            self.precision,
            self.config.guards.max_grad_norm,
            self.routing.learner_at(step, rate_at),
            self.placement,
        )
        self.progress.step += 1
        self.progress.tokens += report.num_target_tokens
        return report, lambda: window(report)

    def _record(self, report: StepReport) -> None:
        verdict, progress = report.verdict, self.progress
        record = {"step": progress.step, **dataclasses.asdict(report)}
        del record["verdict"], record["rank"]
        record |= {name: value for name, value in (record.pop("routers") or {}).items() if value is not None}
        record |= {"applied": verdict.applied, "cause": verdict.cause, "norm_limit": verdict.norm_limit}
        record |= self.companions.figures()
        record["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        blocks = self.config.train.per_device_batch_size * self.config.train.grad_accum_steps
        record["epoch"] = progress.step / self.routing.passes * blocks / len(self.train)
        self.log.step(record, self.guard.success_rate, progress.tokens / max(1e-9, progress.train_seconds))
        after = report.loss_scale if verdict.applied else self.precision.loss_scale.item()  # a host read, if skipped
        scales = report.loss_scale, after
        self._say(notices_of(progress.step, verdict, report.grad_norm, scales, self.config.guards))

    def _say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.log.say(line)

    def _begin(self) -> None:
        """Evaluate both models before the first step, refuse what cannot learn, keep the student as it is."""
        self._say([*describe(self.train, self.validation), *self.placement.lines, *self.routing.lines])
        self._say(self.routing.begin(self.validation, self.precision))
        self.progress.teacher = self.routing.figures()
        start = self._evaluate()
        self.progress.start = self.progress.last = self.progress.best = figures_of(start)
        clamps = self.config.loss, self.models, self.validation, self.precision, start.loss, self.objective.heads
        self._say(self.placement.read(lambda: check_clamps(*clamps)))
        self.log.say_start(self.progress.start, self.progress.teacher)
        self._say(self.companions.begin())
        self.process_group.on_rank_zero(lambda: self.log.start(0, self.config.train))
        self._save_student()
        self.log.begin(self.progress.start, self.progress.teacher)
        if self.config.guards.on_divergence == "rewind":
            self._save()  # somewhere to go back to

    def _resume(self) -> None:
        saved = load_checkpoint(self.folder / "checkpoint", **self._state())
        self.progress = TrainerState(**saved)
        self.companions.take_up(self.progress.companions)
        self.log.say(f"Resumed after step {self.progress.step}")
        self.process_group.on_rank_zero(lambda: self.log.start(self.progress.step, self.config.train))

    def _evaluate(self) -> Evaluation:
        batches = shard_batches(
            self.validation.token_batches("student", self.config.train.per_device_batch_size), self.process_group
        )
        what = self.models.student, batches, self.validation.text.num_bytes, self.precision, self.process_group
        how = {"heads": self.objective.heads, "workspace_mb": self.config.loss.loss_workspace_mb}
        return self.placement.read(lambda: evaluate(*what, **how))

    def _validate(self) -> None:
        progress, evaluation = self.progress, self._evaluate()
        progress.last = figures_of(evaluation)
        is_best = evaluation.loss < progress.best["val_loss"] or not math.isfinite(progress.best["val_loss"])
        if is_best:
            progress.best, progress.best_step = progress.last, progress.step
            self._save_student()
        routers, alarms = self.routing.watch(progress.step, self.validation, self.precision)
        self.log.evaluation({"step": progress.step, **progress.last, **routers}, is_best)
        self._say(alarms)

    def _state(self) -> dict:
        return {
            "student": self.models.student,
            "optimizer": self.optimizer,
            "precision": self.precision,
            "guard": self.guard,
            "objective": self.objective,
            "routing": self.routing,
            "placement": self.placement,
        }

    def _save_student(self) -> None:
        tokenizer, weights = self.models.tokenizers.student, self.placement.weights()

        def save() -> None:
            for name, model in exports(self.models.student).items():
                save_student(model, tokenizer, self.folder / name, weights)

        self.process_group.on_rank_zero(save)

    def _save(self) -> None:
        self.routing.save(self.folder, self.progress.step)
        self.progress.companions = self.companions.all_kept()
        progress, keep = dataclasses.asdict(self.progress), self.config.train.keep_checkpoints
        save_checkpoint(self.folder / "checkpoint", **self._state(), progress=progress, keep=keep)

    def _save_in_need(self) -> None:
        """A checkpoint after a failure that has nothing to do with the weights, if one can still be written."""
        if self.process_group.size > 1:  # the others are elsewhere; what is saved takes all
            return
        if self.progress.step and self.guard.nan_batches < self.guard.max_nan_batches:  # a stopped run has saved
            with contextlib.suppress(RuntimeError, OSError, UsageError):
                self._save()

    def _rewinds(self) -> bool:
        return self.config.guards.on_divergence == "rewind" and not self.progress.rewound_from

    def _rewind(self, report: StepReport) -> TrainerState:
        """Back to the last checkpoint, at half the rate and without the documents that were not finite."""
        step, seconds = self.progress.step, self.progress.seconds
        documents = self.recovery.explain(step, report, "The run went back to its last checkpoint, once.")["documents"]
        left_out = self.recovery.offenders(report.verdict.cause)
        self.progress = TrainerState(**load_checkpoint(self.folder / "checkpoint", **self._state()))
        self.companions.take_up(self.progress.companions)
        self.progress.rewound_from, self.progress.seconds = step, seconds
        self.progress.rate_factor, self.progress.left_out = 0.5, left_out
        self._save()  # so that a resumed run does not go back once more
        record = {"step": self.progress.step, "rewound_from": step, "left_out": left_out, "documents": documents}
        self.log.rewind(record, len(self.train))
        return self.progress

    def _stop(self, report: StepReport) -> None:
        """Emergency stop: the weights are the last good ones; save them, write down why, and raise."""
        count = self.guard.nan_batches
        outcome = f"The run was stopped after {count} NaN batches in a row; its weights are the last good ones."
        record = self.recovery.explain(self.progress.step, report, outcome)
        self._save()
        self._finish("emergency_stop")
        raise TrainingDiverged(f"emergency stop after {count} consecutive NaN batches {self.recovery.in_short(record)}")

    def _give_up(self, reason: str) -> None:
        """A companion's emergency stop: the weights are in order, but nothing is learned."""
        self._save()
        self._finish("emergency_stop")
        raise TrainingDiverged(f"stopped at step {self.progress.step}: {reason}")

    def _finish(self, status: str) -> dict:
        """Write and return `summary.json`."""
        run = self.progress.summary(status, self.guard, self.precision)
        run["peak_memory_bytes"] = max(self.process_group.all_gather_object(run["peak_memory_bytes"]))
        summary = {**run, "embedded": self.models.embedded, **self.routing.summary(), **self.companions.summary()}
        self.process_group.on_rank_zero(lambda: self.log.finish(summary))
        return summary

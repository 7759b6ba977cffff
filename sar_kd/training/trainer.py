"""The training loop around the step: evaluate, log, save, rewind and stop on schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from sar_kd.config.fields import RunConfig
from sar_kd.data.dataset import Dataset
from sar_kd.errors import TrainingDiverged, UsageError
from sar_kd.evaluation.nonfinite import check_finite, check_first_steps
from sar_kd.evaluation.perplexity import Evaluation, evaluate
from sar_kd.models.loading import Models
from sar_kd.preflight.checks import describe_text
from sar_kd.preflight.clamp_checks import check_clamps
from sar_kd.preflight.data_checks import alignment_warnings, how_text_is_used, learns_chat, text_warnings
from sar_kd.reporting.run_log import RunLog
from sar_kd.runtime.console import format_share
from sar_kd.runtime.files import CHECKPOINTS
from sar_kd.runtime.run_folder import saved_student
from sar_kd.runtime.signals import StopRequest
from sar_kd.teacher.base import Teacher
from sar_kd.training.batch_loader import BatchLoader
from sar_kd.training.callbacks import Callback, MicroBatches
from sar_kd.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, save_student_of_run
from sar_kd.training.document_losses import DocumentLosses
from sar_kd.training.guards import nothing_applied, skips_in_words, verdict_messages
from sar_kd.training.on_policy import OnPolicy
from sar_kd.training.optimizer import learning_rate_at, set_learning_rate_
from sar_kd.training.recovery import Recovery
from sar_kd.training.run_inputs import check_inputs
from sar_kd.training.step import StepContext, StepReport, train_step
from sar_kd.training.trainer_state import TrainerState

_WHILE_TRAINING = (
    "the step under way is finished and a checkpoint saved; once more ends the run at once, without saving"
)

_AT_END = "all steps are made and saved, the run is about to end; once more ends it at once"


class Datasets(NamedTuple):
    """What a run trains on, and held-out text."""

    train: Dataset
    validation: Dataset


class Trainer:
    """One run of training."""

    def __init__(
        self,
        config: RunConfig,
        models: Models,
        datasets: Datasets,
        context: StepContext,
        log: RunLog,
        teacher: Teacher,
        callbacks: Sequence[Callback] = (),
        on_policy: OnPolicy | None = None,
        inputs: Mapping[str, str] = MappingProxyType({}),
    ):
        """inputs: digests of what the run reads, as `digest_inputs` gives them"""
        self.config, self.models, self.context, self.log, self.teacher = config, models, context, log, teacher
        self.train, self.validation = datasets
        self.process_group = context.strategy.process_group
        self.folder = Path(config.train.output_dir)
        self.state, self.inputs = TrainerState(inputs=dict(inputs)), dict(inputs)
        log.same_tokenizer = self.train.pair.equal
        self.document_losses = DocumentLosses(self.validation, inputs.get("the student's tokenizer", ""))
        self.recovery = Recovery(config, self.train, context)
        self.callbacks = [self.recovery, *callbacks, *([] if on_policy is None else [on_policy])]
        self.loader = BatchLoader(
            self.train, config.train, teacher.passes, self.process_group, self.recovery, on_policy
        )

    def run(self) -> dict:
        """Train to `train_steps`, or to a stop request; the returned summary's `status` tells which.

        Raises: TrainingDiverged after an emergency stop, once everything is saved; UsageError if a checkpoint cannot be
        read, or preflight finds that nothing could be learned
        """
        started = time.monotonic()
        with self.teacher:
            try:
                if self.config.train.resume:
                    self._resume()
                else:
                    self._start()
                with self._stop_request() as stop:
                    status = self._train(stop, started)
                    stop.what_follows = _AT_END
                    if skips := skips_in_words(self.context.guard):
                        self._log([skips])
                    if status == "finished":
                        student_folder = saved_student(self.folder)
                        self._log(m for callback in self.callbacks for m in callback.on_train_end(student_folder))
                    return self._write_summary(status)
            except (RuntimeError, OSError, MemoryError):  # the weights are still the last good ones
                self._save_after_failure()
                raise
            finally:
                self.loader.close()
                self.log.close()

    def _start(self) -> None:
        """Evaluate both models, refuse a run that cannot learn, save the student as it is."""
        state, config, context = self.state, self.config, self.context
        lines, details = describe_text(self.train, self.validation, config.data.describe(), config.loss.alignment)
        of_run = how_text_is_used(config)
        warnings = text_warnings(self.train, self.validation, config.train, self.process_group.size, **of_run)
        warnings += alignment_warnings(self.models.tokenizers, config.loss)
        self._log([*lines, *warnings, *context.strategy.messages, *self.teacher.lines])
        for line in (*details, *self.teacher.details):
            self.log.detail(line)
        state.teacher, messages = self.teacher.evaluate_start(self.validation, context.precision)
        self._log([*messages, *self._check_teacher()])
        evaluation = self._evaluate()
        state.start = state.last = state.best = evaluation.metrics()
        nats = list(evaluation.group_nats)
        state.document_nats = {"start": nats, "best": nats, "final": nats, "teacher": list(self.teacher.group_nats)}
        self._log(self._check_student())
        context.strategy.inference(self._check_first_steps)
        state.last_step = 0
        clamps = config.loss, self.models, self.validation, context.precision, evaluation.loss, context.objective.heads
        self._log(context.strategy.inference(lambda: check_clamps(*clamps)))
        self.log.print_start(state.start, state.teacher)
        self._log(message for callback in self.callbacks for message in callback.on_train_begin())
        self.process_group.on_rank_zero(lambda: self.log.open(0, config.train))
        self._save_student()
        self._write_document_losses()
        facts = {"val_bytes": self.validation.text.num_bytes, "learns_chat": learns_chat(self.train)}
        self.process_group.on_rank_zero(lambda: self.log.log_start({**state.start, **facts}, state.teacher))
        if self.recovery.may_rewind:
            self._save()  # a checkpoint to go back to

    def _check_teacher(self) -> list[str]:
        """A warning about a teacher that is not finite in a part of the text; UsageError if that is too much."""
        names, share = self.config.models, self.state.teacher.get("val_nonfinite", 0.0)
        option = "teacher_cache" if getattr(names, "teacher_cache", "") else "teacher_model"
        batches = self.validation.token_batches("teacher", self.config.train.per_device_batch_size)
        title, models = f"--{option} {getattr(names, option, '')}", self.models
        precision, limit = self.context.precision, self.teacher.max_nonfinite if self.config.loss.alpha_kd > 0 else 1.0
        return check_finite(title, share, limit, precision, models.teacher, batches, "cache")

    def _check_student(self) -> list[str]:
        """A warning about a student that masks tokens of the text; UsageError about one that is not finite."""
        title, start = f"--student_model {self.config.models.student_model}", self.state.start
        batches = self.validation.token_batches("student", self.config.train.per_device_batch_size)
        student = None if self.context.strategy.is_sharded else self.models.student
        check_finite(title, start.get("val_nonfinite", 0.0), 0.0, self.context.precision, student, batches)
        if not (masked := start.get("val_masked")):
            return []
        return [
            f"Warning: {title}: it masks {format_share(masked)} of the held-out text's tokens (logits of -inf), so its "
            "perplexity is infinite; a step with such a token is refused: leave such documents out"
        ]

    def _check_first_steps(self) -> None:
        """Raise UsageError where every step up to the emergency stop would be refused for its forward."""
        config, group, context = self.config.train, self.process_group, self.context
        sizes = config.per_device_batch_size, config.grad_accum_steps, config.seed, group.rank, group.size
        num_steps = -(-min(self.config.guards.max_nan_batches, config.train_steps) // self.teacher.passes)
        steps = ([batch.student for batch in self.train.micro_batches(step, *sizes)] for step in range(num_steps))
        title, how = f"--student_model {self.config.models.student_model}", (context.precision, context.objective.heads)
        check_first_steps(title, self.models.student, steps, *how, group, replays=not context.strategy.is_sharded)

    def _resume(self) -> None:
        step, train_steps = self._load(), self.config.train.train_steps
        if step > train_steps:
            raise UsageError(
                f"--resume: the run in {self.folder} has made {step} steps, more than the {train_steps} that this asks "
                "for (--train_steps, --epochs, --max_steps); ask for more, or leave it out"
            )
        self._log(check_inputs(self.state.inputs, self.inputs, self.config.train.allow_changed_inputs))
        if self.state.inputs != self.inputs:  # the losses so far may be of another text
            self.state.document_nats = {}
        self.state.inputs = self.inputs
        self.log.info(f"Resumed after step {step}")
        if step == train_steps:
            self.log.info(f"All {step} steps are made already; a higher --train_steps goes on")
        self.process_group.on_rank_zero(lambda: self.log.open(step, self.config.train))

    def _stop_request(self) -> StopRequest:
        """Signals, of which rank 0 tells what they lead to, and the time limit, which rank 0 watches."""
        return StopRequest(self.log.deadline, _WHILE_TRAINING) if self.process_group.is_rank_zero else StopRequest()

    def _train(self, stop: StopRequest, started: float) -> str:
        """Make the steps that are left; returns the run's status. started: when the run began"""
        config = self.config.train
        while self.state.step < config.train_steps:
            report, micro_batches = self._step()
            stop_requested = self.process_group.any_rank(stop.requested)
            self._log_step(report)
            reason = self._run_step_callbacks(report, micro_batches)
            if report.verdict.emergency and self.recovery.can_rewind:
                self._rewind(report)
                continue
            step, at_end = self.state.step, self.state.step == config.train_steps or report.verdict.emergency
            if step % config.eval_steps == 0 or at_end:
                self._validate()
            self.state.seconds += time.monotonic() - started
            started = time.monotonic()
            if report.verdict.emergency:
                self._stop_diverged(report)
            if not reason and at_end:
                reason = nothing_applied(self.context.guard)
            if reason:
                self._stop(f"stopped at step {step}: {reason}")
            if step % config.save_steps == 0 or at_end or stop_requested:
                self._save()
            if stop_requested and not at_end:
                return "interrupted"
        return "finished"

    def _step(self) -> tuple[StepReport, MicroBatches]:
        """One attempted update, and a function that makes the micro-batches in which a NaN of it may lie."""
        started, step, config = time.monotonic(), self.state.step, self.config

        def lr_at(peak: float) -> float:
            scale = self.recovery.state["lr_scale"]
            return scale * learning_rate_at(step, config.train.train_steps, config.optim, peak)

        set_learning_rate_(self.context.optimizer, lr_at(config.optim.student_lr))
        micro_batches = self.loader.get(step)
        self.context.routers = self.teacher.router_trainer_at(step, lr_at)
        report = train_step(micro_batches, self.context)
        self.state.step += 1
        self.state.tokens += report.num_target_tokens
        self.state.teacher_positions += report.teacher_positions
        self.state.teacher_rows_dropped += report.teacher_rows_dropped
        self.state.teacher_rows_infinite += report.teacher_rows_infinite
        self.state.teacher_rows_unshared += report.teacher_rows_unshared
        self.state.train_seconds += time.monotonic() - started
        return report, partial(self.loader.nan_candidates, step, report, micro_batches)

    def _log_step(self, report: StepReport) -> None:
        verdict, state, guard = report.verdict, self.state, self.context.guard
        record = {"step": state.step, **dataclasses.asdict(report)}
        del record["verdict"], record["first_nonfinite_rank"]
        record |= {name: value for name, value in (record.pop("routers") or {}).items() if value is not None}
        record |= {"applied": verdict.applied, "cause": verdict.cause, "norm_limit": verdict.norm_limit}
        for callback in self.callbacks:
            record |= callback.metrics()
        record["learning_rate"] = self.context.optimizer.param_groups[0]["lr"]
        blocks = self.config.train.per_device_batch_size * self.config.train.grad_accum_steps
        record["epoch"] = state.step / self.teacher.passes * blocks / len(self.train)
        self.log.log_step(record, guard.success_rate, state.tokens / max(1e-9, state.train_seconds))
        # A host read, only if the step was skipped.
        after = report.loss_scale if verdict.applied else self.context.precision.loss_scale.item()
        loss_scales = report.loss_scale, after
        self._log(verdict_messages(state.step, verdict, report.grad_norm, loss_scales, self.config.guards))

    def _run_step_callbacks(self, report: StepReport, micro_batches: MicroBatches) -> str | None:
        """The first reason to stop the run that a callback gives."""
        results = [callback.on_step_end(self.state.step, report, micro_batches) for callback in self.callbacks]
        self._log(message for messages, _ in results for message in messages)
        return next((reason for _, reason in results if reason), None)

    def _log(self, messages: Iterable[str]) -> None:
        for message in messages:
            self.log.info(message)

    def _evaluate(self) -> Evaluation:
        return self.context.strategy.inference(
            lambda: evaluate(
                self.models.student,
                self.validation.token_batches("student", self.config.train.per_device_batch_size),
                self.validation.text.num_bytes,
                self.context.precision,
                self.process_group,
                heads=self.context.objective.heads,
                workspace_mb=self.config.loss.loss_workspace_mb,
                num_groups=self.validation.num_groups,
            )
        )

    def _write_document_losses(self) -> None:
        write = partial(self.document_losses.write, self.folder, self.state.document_nats)
        self.process_group.on_rank_zero(write)

    def _validate(self) -> None:
        """Evaluate the student, save it if it is the best so far; evaluate routers that learn."""
        self.recovery.on_validation()
        state, evaluation = self.state, self._evaluate()
        state.last, state.last_step = evaluation.metrics(), self.state.step
        state.document_nats["final"] = list(evaluation.group_nats)
        best = state.best["val_loss"]
        is_best = evaluation.loss < best or not (math.isfinite(best) or math.isnan(evaluation.loss))
        is_best = is_best and not self.recovery.weights_are_lost
        if is_best:
            state.best, state.best_step = state.last, state.step
            state.document_nats["best"] = state.document_nats["final"]
            self._save_student()
        self._write_document_losses()
        routers, alarms = self.teacher.evaluate_routers(state.step, self.validation, self.context.precision)
        self.log.log_evaluation({"step": state.step, **state.last, **routers}, is_best)
        self._log(alarms)

    def _save_student(self) -> None:
        save_student_of_run(self.config, self.models, self.context, self.train.text)

    def _save(self) -> None:
        state = self.state
        self.recovery.before_save(state.step, state.last_step == state.step and math.isfinite(state.last["val_loss"]))
        self.teacher.save(self.folder, self.state.step)
        self.state.callbacks = [callback.state for callback in self.callbacks]
        keep, keeps = self.config.train.keep_checkpoints, self.recovery.keeps
        save_checkpoint(self.folder / CHECKPOINTS, self.context, self.teacher, self.state, keep, keeps)

    def _load(self, path: Path | None = None) -> int:
        """Load a checkpoint, the last one if none is given; returns its step."""
        if path is None:
            path, messages = find_checkpoint(self.folder / CHECKPOINTS)
            self._log(messages)
        self.state = load_checkpoint(path, self.context, self.teacher)
        for callback, state in zip(self.callbacks, self.state.callbacks, strict=True):
            callback.state |= state
        return self.state.step

    def _save_after_failure(self) -> None:
        """A checkpoint after a failure that has nothing to do with the weights, if one can still be written."""
        if self.process_group.size > 1:  # a save is collective, and the other ranks are elsewhere
            return
        has_stopped = self.context.guard.consecutive_nan_batches >= self.config.guards.max_nan_batches  # and saved
        if self.state.step and not has_stopped:
            with contextlib.suppress(RuntimeError, OSError, MemoryError, UsageError):
                self._save()

    def _rewind(self, report: StepReport) -> None:
        seconds = self.state.seconds
        record = self.recovery.rewind(self.state.step, report, self._load)
        self.state.seconds = seconds
        self._save()  # so that a resumed run does not rewind again
        self.log.log_rewind(record, len(self.train))

    def _stop_diverged(self, report: StepReport) -> None:
        """Emergency stop, behind a validation: save the weights as they are, explain the NaN, and raise."""
        count = self.context.guard.consecutive_nan_batches
        outcome = f"The run was stopped after {count} NaN batches in a row.\n{self._weights_in_words()}"
        held_out = self.state.start["val_loss"], self.state.last["val_loss"]
        record = self.recovery.explain(self.state.step, report, outcome, held_out)
        self._stop(f"emergency stop after {count} consecutive NaN batches {self.recovery.summary_line(record)}")

    def _weights_in_words(self) -> str:
        """What the validation at an emergency stop shows about its weights, and where better ones are."""
        start, last, best = (getattr(self.state, name)["val_bits_per_byte"] for name in ("start", "last", "best"))
        if math.isfinite(last) and not last > start and not self.recovery.weights_are_lost:
            text = f"Its weights are the last good ones: {last:.4f} bits per byte on held-out text, in float32."
        else:
            found = f"{last:,.4f} bits per byte" if math.isfinite(last) else "no finite loss"
            text = f"Its last weights are not good: {found} on held-out text, in float32."
        if math.isfinite(best):
            step = self.state.best_step
            name = saved_student(self.folder).name
            text += f"\n`{name}/` holds the best student, that of step {step} ({best:.4f} bits per byte)."
        sound = self.recovery.sound_checkpoint
        if sound is not None:
            text += f"\n`checkpoint/{sound.name}` is the last one after which a step or a validation was finite"
            if not self.recovery.state["rewound_from"]:
                text += ";\n--resume --on_divergence rewind goes back to it once, at half the learning rate"
            text += "."
        return text

    def _stop(self, message: str) -> None:
        self._save()
        self._write_summary("emergency_stop", stop_reason=message)
        raise TrainingDiverged(message)

    def _write_summary(self, status: str, **more: str) -> dict:
        """Write and return `summary.json`. more: further entries"""
        summary = self.state.summary(status, self.context.guard, self.context.precision)
        summary["peak_memory_bytes"] = max(self.process_group.all_gather_object(summary["peak_memory_bytes"]))
        summary |= {
            "embedded": self.models.embedded,
            "same_tokenizer": self.train.pair.equal,
            **more,
            **self.teacher.summary(),
        }
        for callback in self.callbacks:
            summary |= callback.summary()
        summary["environment"] = self.log.environment
        self.process_group.on_rank_zero(lambda: self.log.log_summary(summary))
        return summary

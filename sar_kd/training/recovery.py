"""What follows a NaN batch: an explanation in `crash/`, a sound checkpoint that stays, and, once, a second try with
`--on_divergence rewind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from sar_kd.config.fields import RunConfig
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset
from sar_kd.evaluation.nonfinite import remedy_of
from sar_kd.runtime.files import CHECKPOINTS, checkpoint_name
from sar_kd.training.callbacks import Callback, MicroBatches, StepResult
from sar_kd.training.guards import NAN_CAUSES
from sar_kd.training.nan_forensics import examine, unexamined, write_crash
from sar_kd.training.optimizer import parameters_of
from sar_kd.training.step import StepContext, StepReport

_LR_SCALE = 0.5

_NO_STEP = -1

_WEIGHT_GROWTH = 10.0
"""Weights whose L2 norm is so many times that at the start were changed by updates that are too large"""

_WINDOW = 50
"""Steps whose losses are remembered"""


def has_grown(loss: float, usual: float) -> bool:
    """Is a loss far above the usual one? Both in nats per token; False if one of them is nan."""
    return loss > max(1.5 * usual, usual + 2.0)


_NOTHING_SEEN = {
    "saved_step": _NO_STEP, "sound_step": _NO_STEP, "nan_from": 0, "losses": [], "weight_norm": math.inf,
    "validated_norm": math.inf, "proven_norm": math.inf,
}  # fmt: skip


class Recovery(Callback):
    """Keeps the NaN batches since the last applied step, explains the first one of the run, and rewinds.

    A rewind goes back to the last sound checkpoint, at half the learning rate and without the documents of the NaN
    batches.
    state  rewound_from    the step at which the run diverged and was rewound; 0 if it was not
           lr_scale        factor on the learning rate since then
           skipped_blocks  blocks that are not read since then
           saved_step      step of the newest checkpoint; -1 if there is none
           sound_step      step of the newest sound one: a validation of its weights, or a step from them, was finite
           nan_from        the first NaN batch since the last step with a finite gradient; 0 if that was the last
           weight_norm     L2 norm of all trainable weights before the first step
           validated_norm  that at the last validation
           proven_norm     that at the last validation of weights from which a step had a finite gradient
           losses          cross-entropy of the last steps with a finite gradient, at most 50
    """

    def __init__(self, config: RunConfig, train: Dataset, context: StepContext):
        super().__init__()
        self.folder = Path(config.train.output_dir) / "crash"
        self._rewinds = config.guards.on_divergence == "rewind"
        self._train, self._context, self._process_group = train, context, context.strategy.process_group
        self._nan_steps: list[list[Batch]] = []
        self._config = config
        self.state = {"rewound_from": 0, "lr_scale": 1.0, "skipped_blocks": []} | _NOTHING_SEEN

    def on_train_begin(self) -> list[str]:
        norm = self._weight_norm()
        self.state |= {"weight_norm": norm, "validated_norm": norm, "proven_norm": norm}
        return []

    def on_validation(self) -> None:
        """The weights are about to be validated."""
        self.state["validated_norm"] = self._weight_norm()

    def on_step_end(self, step: int, report: StepReport, micro_batches: MicroBatches) -> StepResult:
        self._follow(step, report)
        if report.verdict.cause in NAN_CAUSES:
            self._nan_steps.append(micro_batches())
            if not self._process_group.broadcast((self.folder / "crash.json").exists()):
                self.explain(step, report, "The update was refused and nothing was changed; the run went on.")
        elif report.verdict.applied:
            self._nan_steps.clear()
        return [], None

    def summary(self) -> dict:
        return {"rewound_from": self.state["rewound_from"]}

    # Checkpoints that stay

    def _follow(self, step: int, report: StepReport) -> None:
        """What this step shows about the newest checkpoint, and about the loss."""
        state, loss = self.state, report.ce_loss
        if report.verdict.cause in (None, "norm"):  # the forward and the gradient are finite
            state["nan_from"] = 0
            state["losses"] = [*state["losses"], *([] if loss is None else [loss])][-_WINDOW:]
            # No update came between the newest checkpoint and the first such step after it: these are its weights.
            state["sound_step"], state["proven_norm"] = state["saved_step"], state["validated_norm"]
        elif report.verdict.cause in NAN_CAUSES:
            state["nan_from"] = state["nan_from"] or step

    def before_save(self, step: int, is_finite: bool) -> None:
        """A checkpoint is about to be saved. is_finite: its weights were validated, and the loss was finite"""
        self.state["saved_step"] = step
        # A validation computes in float32, and says little about gradients, or about what float16 can hold: there it
        # counts only where no step follows, or nothing else is known to be sound.
        is_only_evidence = self.state["sound_step"] == _NO_STEP or step == self._config.train.train_steps
        proves = is_only_evidence or self._context.precision.dtype is torch.float32
        if is_finite and proves and not self.state["nan_from"]:
            self.state["sound_step"] = step

    def keeps(self, step: int) -> bool:
        """Must the checkpoint of this step stay? The newest sound one must, and while NaN batches come all from before
        the first of them.
        """
        return step == self.state["sound_step"] or step < self.state["nan_from"]

    @property
    def sound_checkpoint(self) -> Path | None:
        """The newest checkpoint that is known to be sound; None if there is none."""
        step = self.state["sound_step"]
        return None if step == _NO_STEP else self.folder.parent / CHECKPOINTS / checkpoint_name(step)

    # The explanation

    def explain(self, step: int, report: StepReport, outcome: str, held_out: tuple[float, float] | None = None) -> dict:
        """Replay the last NaN batch, write `crash/`, and return the findings.

        held_out: loss on held-out text at the start and now, nats per token, if these weights were validated
        """
        batch, findings = self._examine(self._nan_steps[-1], report.verdict.cause)
        findings |= self._growth(report, findings, held_out)
        if report.verdict.cause == "teacher" and report.teacher_rows_infinite:
            findings["verdict"] = "masked"
        guards, optim = self._config.guards, self._config.optim
        halved = ", and half of that since the rewind" if self.state["lr_scale"] != 1.0 else ""
        student_lr = f"{optim.student_lr:g}{halved}"
        findings["remedy"] = remedy_of(findings["verdict"], self._context.precision, student_lr, guards.max_grad_norm)
        record = {"step": step, "cause": report.verdict.cause, "outcome": outcome, **findings}
        record |= {"documents": self._documents_of(findings["bad_blocks"]), "loss_scale": report.loss_scale}
        record |= {name: getattr(report, name) for name in ("loss", "ce_loss", "kd_loss", "grad_norm")}
        self._process_group.on_rank_zero(lambda: write_crash(self.folder, batch, record))
        return record

    def _growth(self, report: StepReport, findings: dict, held_out: tuple[float, float] | None) -> dict:
        """`growth`: how the loss or the weights grew before the NaN batch, '' if they did not. If they did, the verdict
        is 'diverged'.
        """
        losses, verdict = self.state["losses"], findings["verdict"]
        if not self._context.guard.applied or verdict == "loss" or report.verdict.cause == "teacher":
            return {"growth": ""}
        usual, last = (median(losses), losses[-1]) if losses else (math.nan, math.nan)
        start, now = held_out or (math.nan, math.nan)
        for before, after, what in (
            (usual, last, "in the last step before it"),
            (usual, math.nan if report.ce_loss is None else report.ce_loss, "in this step"),
            (usual, findings["ce_float32"], "in this step, computed in float32"),
            (start, now, "on held-out text"),
        ):
            if has_grown(after, before):
                text = f"The loss grew from {before:.4g} to {after:.4g} nats per token {what}."
                return {"growth": text, "verdict": "diverged"}
        norm, norm_at_start = self._weight_norm(), self.state["weight_norm"]
        if self._have_grown(norm):
            text = f"The updates have made the weights grow: L2 norm {norm_at_start:.4g} at the start, {norm:.4g} now."
            return {"growth": text, "verdict": "diverged"}
        return {"growth": ""}

    @property
    def weights_are_lost(self) -> bool:
        """Have updates made the validated weights many times larger, and did NaN batches follow, or no step yet?

        Such weights may have a finite loss on held-out text, that of uniform predictions, and no gradient.
        """
        state, norm = self.state, self.state["validated_norm"]
        return not norm <= _WEIGHT_GROWTH * state["proven_norm"] or (bool(state["nan_from"]) and self._have_grown(norm))

    def _have_grown(self, norm: float) -> bool:
        return not norm <= _WEIGHT_GROWTH * self.state["weight_norm"]

    def _weight_norm(self) -> float:
        weights = [parameter.detach() for parameter in parameters_of(self._context.optimizer)]
        weights = [w.masked_fill(w == -math.inf, 0.0) if w.ndim == 1 else w for w in weights]  # a masked token's bias
        return self._context.strategy.grad_norm(weights).item()

    def summary_line(self, record: dict) -> str:
        """Cause, module, remedy, and the path of the page, in one line."""
        module = record["first_bad_module"]
        where = f" First module that is not finite: {module['name']} ({module['output_dtype']})." if module else ""
        cause = f"(cause: {record['cause']}, {record['verdict']})"
        where = f" {record['growth']}" if record["growth"] else where
        return f"{cause}.{where} What to try: {record['remedy']}. Details: {self.folder / 'crash.md'}"

    def _examine(self, micro_batches: list[Batch], cause: str | None) -> tuple[Batch, dict]:
        """The first micro-batch that is not finite when replayed (the last, if none is), and the findings about it."""
        context, of_teacher = self._context, cause == "teacher"
        model = context.objective.teacher if of_teacher else context.objective.student
        if model is None or (context.strategy.is_sharded and not of_teacher):
            return micro_batches[-1], unexamined(micro_batches, cause, context.precision)
        for batch in micro_batches:
            findings = examine(model, batch, context.precision, cause, None if of_teacher else self._total_loss)
            if findings["verdict"] != "not reproduced" and (cause != "gradient" or findings["first_bad_module"]):
                break
        return batch, findings

    def _total_loss(self, batch: Batch) -> Tensor:
        return self._context.objective(batch.to(self._context.precision.device)).total

    def _documents_of(self, blocks: list[int]) -> list[str]:
        return list(dict.fromkeys(name for block in blocks for name in self._train.documents_of(block)))

    # The rewind

    @property
    def may_rewind(self) -> bool:
        """Is a rewind asked for, and none made yet?"""
        return self._rewinds and not self.state["rewound_from"]

    @property
    def can_rewind(self) -> bool:
        """And is there a sound checkpoint to go back to? Another one would lead to the same NaN batches."""
        return self.may_rewind and self.sound_checkpoint is not None

    def rewind(self, step: int, report: StepReport, load: Callable[[Path | None], int]) -> dict:
        """Go back, once; returns the record of it for the log.

        load: loads a checkpoint, the last one if None is given, and returns its step
        """
        documents = self.explain(step, report, "The run went back to its last sound checkpoint, once.")["documents"]
        skipped_blocks = self._blocks_to_skip(report.verdict.cause)
        last_step = load(self.sound_checkpoint)
        self.state |= {"rewound_from": step, "lr_scale": _LR_SCALE, "skipped_blocks": skipped_blocks}
        self.state |= {"saved_step": last_step, "sound_step": last_step, "nan_from": 0}
        return {"step": last_step, "rewound_from": step, "skipped_blocks": skipped_blocks, "documents": documents}

    def _blocks_to_skip(self, cause: str | None) -> list[int]:
        """Every block of the documents whose loss was not finite in the last NaN batches; only the bad blocks
        themselves, if those documents are half of the text or more.
        """
        bad = {block for batches in self._nan_steps for block in self._examine(batches, cause)[1]["bad_blocks"]}
        self._nan_steps.clear()
        documents = set(self._documents_of(sorted(bad)))
        blocks = [block for block in range(len(self._train)) if documents & set(self._train.documents_of(block))]
        return blocks if 2 * len(blocks) < len(self._train) else sorted(bad)

    def replace_skipped(self, blocks: list[int]) -> list[int]:
        """Each skipped block of a batch replaced by the next one that is not; unchanged if all blocks are skipped."""
        skipped, count = set(self.state["skipped_blocks"]), len(self._train)
        if len(skipped) == count or not skipped.intersection(blocks):
            return blocks
        replaced = []
        for block in blocks:
            while block in skipped:
                block = (block + 1) % count
            replaced.append(block)
        return replaced

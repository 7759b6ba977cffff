"""What a step minimises: one `Batch` in, `LossTerms` out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sar_kd.config import LossConfig
from sar_kd.data import Batch
from sar_kd.distillation import Learned, Outputs, build_distillation
from sar_kd.losses import LogitClamp, LossClamp, Sums, cross_entropy, finite_rows
from sar_kd.pairing import Pairing
from sar_kd.precision import Precision


@dataclass(frozen=True)
class LossTerms(Sums):
    """Sums over a batch's target tokens, in nats, as fp32 scalars on the device; never a mean."""

    total: Tensor
    """What is minimised, clamps applied."""
    ce: Tensor
    """Cross-entropy as it is: no clamp, no gradient."""
    kd: Tensor
    """The distillation term as it is: no floor, no gradient."""
    nonfinite_rows: Tensor
    """Rows of student logits that are not finite."""
    teacher_rows_dropped: Tensor
    """Teacher rows that are not finite, left out of the distillation term."""


class Objective:
    """alpha_ce * CE(text) + alpha_kd * distillation, clamped as the guards ask.

    With N target tokens in the batch, the total is N * clamp(alpha_ce * clamp(CE / N) + alpha_kd * KD / N): the
    loss clamp acts on a micro-batch's means. Splitting a window otherwise therefore changes nothing as long as
    no mean is above the limit.
    """

    def __init__(
        self, teacher: nn.Module | None, student: nn.Module, config: LossConfig, pairing: Pairing, precision: Precision
    ):
        self.teacher, self.student, self.precision = teacher, student, precision
        self.alpha_ce, self.alpha_kd = config.alpha_ce, config.alpha_kd
        self.logit_clamp = LogitClamp(config.logit_clamp_style, config.logit_clamp)
        self.loss_clamp = LossClamp(config.loss_clamp_style, config.loss_clamp)
        self.distillation = None
        if self.alpha_kd > 0:
            self.distillation = build_distillation(config, pairing, student, teacher).to(precision.device)

    def parameters(self) -> list[nn.Parameter]:
        """What is learned beside the student's own weights: the projection of hidden states, where there is one."""
        return [] if self.distillation is None else list(self.distillation.parameters())

    def state_dict(self) -> dict:
        """The values of `parameters`."""
        return {} if self.distillation is None else self.distillation.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Put them back."""
        if self.distillation is not None:
            self.distillation.load_state_dict(state)

    def __call__(self, batch: Batch, outputs: Outputs | None = None) -> LossTerms:
        """The terms of a batch; outputs: as `read` gave them, read here if None. The teacher gets no gradient."""
        outputs = self.read(batch) if outputs is None else outputs
        nonfinite = (~finite_rows(outputs.student_logits)).sum()
        ce, raw_ce = cross_entropy(outputs.student_logits, batch.student.targets, self.logit_clamp)
        kd = self._distil(batch, outputs)
        count = batch.num_target_tokens
        total = self.alpha_ce * self.loss_clamp(ce / count) + self.alpha_kd * kd.loss / count
        return LossTerms(self.loss_clamp(total) * count, raw_ce, kd.raw, nonfinite, kd.dropped)

    def read(self, batch: Batch, *, student_learns: bool = True, teacher_learns: bool = False) -> Outputs:
        """What both models make of a batch, each with a graph if it learns; no teacher where nothing is distilled."""
        needs_states = self.distillation is not None and self.distillation.needs_states
        student = self._read(self.student, batch.student.input_ids, needs_states, student_learns)
        logits = student.logits.flatten(0, 1)[batch.student.rows]
        if self.distillation is None:
            return Outputs(logits, None)
        teacher = self._read(self.teacher, batch.teacher.input_ids, needs_states, teacher_learns)
        states = [read.hidden_states[-1].flatten(0, 1) if needs_states else None for read in (student, teacher)]
        return Outputs(logits, teacher.logits.flatten(0, 1), *states)

    def _distil(self, batch: Batch, outputs: Outputs) -> Learned:
        if self.distillation is None:
            return Learned(*(torch.zeros((), device=outputs.student_logits.device),) * 3)
        return self.distillation(batch, dataclasses.replace(outputs, teacher_logits=outputs.teacher_logits.detach()))

    def _read(self, model: nn.Module, input_ids: Tensor, needs_states: bool, learns: bool):
        with self.precision.autocast(), torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return model(input_ids=input_ids, use_cache=False, output_hidden_states=needs_states)

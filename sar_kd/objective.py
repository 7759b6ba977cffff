"""What a step minimises: one `Batch` in, `LossTerms` out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sar_kd.config import LossConfig
from sar_kd.data import Batch
from sar_kd.losses import LogitClamp, LossClamp, cross_entropy, finite_rows, forward_kl, teacher_probs
from sar_kd.precision import Precision


@dataclass(frozen=True)
class LossTerms:
    """Sums over a batch's target tokens, in nats, as fp32 scalars on the device; never a mean."""

    total: Tensor
    """What is minimised, clamps applied."""
    ce: Tensor
    """Cross-entropy as it is: no clamp, no gradient."""
    kd: Tensor
    """T^2 * KL(teacher || student) as it is: no floor, no gradient."""
    nonfinite_rows: Tensor
    """Rows of student logits that are not finite."""
    teacher_rows_dropped: Tensor
    """Teacher rows that are not finite, left out of the distillation term."""

    @staticmethod
    def zero(device: torch.device) -> LossTerms:
        return LossTerms(*(torch.zeros((), device=device) for _ in dataclasses.fields(LossTerms)))

    def __add__(self, other: LossTerms) -> LossTerms:
        """The sum without its graph."""
        return LossTerms(*(a.detach() + b.detach() for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> list[Tensor]:
        return [getattr(self, item.name) for item in dataclasses.fields(self)]


class Objective:
    """alpha_ce * CE(text) + alpha_kd * T^2 * KL(teacher || student), clamped as the guards ask.

    With N target tokens in the batch, the total is N * clamp(alpha_ce * clamp(CE / N) + alpha_kd * KD / N): the
    loss clamp acts on a micro-batch's means. Splitting a window otherwise therefore changes nothing as long as
    no mean is above the limit.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, config: LossConfig, precision: Precision):
        self.teacher, self.student, self.precision = teacher, student, precision
        self.alpha_ce, self.alpha_kd = config.alpha_ce, config.alpha_kd
        self.temperature = config.temperature
        self.logit_clamp = LogitClamp(config.logit_clamp_style, config.logit_clamp)
        self.loss_clamp = LossClamp(config.loss_clamp_style, config.loss_clamp)

    def __call__(self, batch: Batch) -> LossTerms:
        with self.precision.autocast():
            logits = self.student(input_ids=batch.student.input_ids, use_cache=False).logits
        logits = logits.flatten(0, 1)[batch.student.rows]
        nonfinite = (~finite_rows(logits)).sum()
        ce, raw_ce = cross_entropy(logits, batch.student.targets, self.logit_clamp)
        kd, raw_kd, dropped = self._distillation(batch, logits)
        count = batch.num_target_tokens
        total = self.alpha_ce * self.loss_clamp(ce / count) + self.alpha_kd * kd / count
        return LossTerms(self.loss_clamp(total) * count, raw_ce, raw_kd, nonfinite, dropped)

    def _distillation(self, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The distillation sum with and without its floor, and the teacher rows dropped."""
        if self.alpha_kd == 0 or len(batch.kd_rows) == 0:
            return (torch.zeros((), device=logits.device),) * 3
        with torch.no_grad(), self.precision.autocast():
            teacher_logits = self.teacher(input_ids=batch.teacher.input_ids, use_cache=False).logits
        teacher_logits = teacher_logits.flatten(0, 1)[batch.teacher_rows]
        student_logits = logits if batch.projection is None else logits[batch.kd_rows]
        # Equal tokenizers may still come with heads padded to different sizes; the rows they share are the tokens.
        shared = student_logits.shape[1]
        if batch.projection is None:
            shared = min(shared, teacher_logits.shape[1])
        targets, dropped = teacher_probs(teacher_logits, shared, self.temperature, self.logit_clamp, batch.projection)
        kd, raw = forward_kl(student_logits[:, :shared], targets, self.temperature, self.logit_clamp)
        return kd, raw, dropped

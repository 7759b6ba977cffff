"""What a step minimises: one `Batch` in, `LossTerms` out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.segments import positions_per_tile
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import Batch
from sar_kd.losses.baselines import ChunkLikelihood, HiddenStates, SortedProbabilities, Strict
from sar_kd.losses.distillation import Distillation, Learned, Outputs, TokenLevel
from sar_kd.losses.functional import LogitClamp, LossClamp, Sums
from sar_kd.losses.projection.loss import Projected
from sar_kd.losses.tiled_loss import Loss, Tile, stretches_of, tiled_loss
from sar_kd.models.lm_head import LMHeads, forward_to_lm_head, text_config_of
from sar_kd.models.memory_saving import Offload
from sar_kd.runtime.precision import Precision


@dataclass(frozen=True)
class LossTerms(Sums):
    """Sums over a batch's target tokens, in nats, as fp32 scalars on the device; never a mean."""

    total: Tensor
    """What is minimised, clamps applied."""
    ce: Tensor
    """Cross-entropy as it is, of text that is not the student's own: no clamp, no gradient."""
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
        self,
        teacher: Any,
        student: nn.Module,
        config: LossConfig,
        aligner: Aligner,
        precision: Precision,
        offload: Offload | None = None,
        heads: LMHeads | None = None,
    ):
        """offload: of a teacher that is there only while it reads; heads: of models that have been tried already"""
        self.teacher, self.student, self.precision = teacher, student, precision
        self.alpha_ce, self.alpha_kd = config.alpha_ce, config.alpha_kd
        self.logit_clamp = LogitClamp(config.logit_clamp_style, config.logit_clamp)
        self.loss_clamp = LossClamp(config.loss_clamp_style, config.loss_clamp)
        self.heads, self._offload = heads or LMHeads(precision), offload
        self._heard: dict[int, tuple] = {}
        for model in (student, teacher) if self.alpha_kd > 0 and teacher is not None else (student,):
            self.heads.of(model)  # now, as it reads the device
        self._tile_rows = positions_per_tile(config.loss_workspace_mb, aligner.pair.student_vocab_size)
        self.distillation = None
        if self.alpha_kd > 0:
            self.distillation = build_distillation(config, aligner, student, teacher).to(precision.device)

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

    def __call__(self, batch: Batch, outputs: Outputs | None = None, scale: Tensor | float = 1.0) -> LossTerms:
        """The terms of a batch. The teacher gets no gradient.

        outputs: as `read` gave them, read here if None
        scale: what the total will be multiplied by before its backward; gradients are rounded to half with it
        """
        outputs = self.read(batch) if outputs is None else outputs
        outputs = dataclasses.replace(outputs, teacher=outputs.teacher and outputs.teacher.detach())
        count, targets = batch.num_target_tokens, batch.student.targets
        alpha_ce = 0.0 if batch.is_on_policy else self.alpha_ce  # its own text teaches the student nothing
        factor = None
        if self.loss_clamp.style != "off" and alpha_ce > 0:
            factor = lambda ce: self.loss_clamp.factor(ce / count)  # noqa: E731
        if self.distillation is not None and self.distillation.covers_text:
            tiles, compare = self.distillation.tiles(batch), self.distillation.compare
            loss = Loss(tiles, targets, compare, alpha_ce, self.alpha_kd, self.logit_clamp, factor, scale)
            sums = tiled_loss(loss, outputs.student, outputs.teacher)
            kd = Learned(sums.kd, sums.raw_kd, sums.dropped)
        else:
            tiles = [Tile(rows) for rows in stretches_of(count, self._tile_rows)]
            loss = Loss(tiles, targets, None, alpha_ce, 0.0, self.logit_clamp, factor, scale)
            sums = tiled_loss(loss, outputs.student, None)
            zero = torch.zeros_like(sums.ce)
            kd = Learned(zero, zero, zero) if self.distillation is None else self.distillation(batch, outputs)
        mean = alpha_ce * self.loss_clamp(sums.ce / count) + self.alpha_kd * kd.loss / count
        # Its value has the clamps; its slope, which knows their factors, comes from what was minimised.
        mean = mean + (sums.minimised - sums.minimised.detach()) / count
        raw_ce = torch.zeros_like(sums.raw_ce) if batch.is_on_policy else sums.raw_ce
        return LossTerms(self.loss_clamp(mean) * count, raw_ce, kd.raw, sums.nonfinite, kd.dropped)

    def read(self, batch: Batch, *, student_learns: bool = True, teacher_learns: bool = False) -> Outputs:
        """What both models make of a batch, each with a graph if it learns; no teacher where nothing is distilled."""
        needs_states = self.distillation is not None and self.distillation.needs_states
        student = self._read(self.student, batch.student.input_ids, needs_states, student_learns)
        of_targets = dataclasses.replace(student[0], states=student[0].states[batch.student.rows])
        if self.distillation is None or batch.stored is not None:
            return Outputs(of_targets, None if self.distillation is None else batch.stored)
        teacher = self._heard.pop(id(batch), None)
        if teacher is None:
            teacher = self._read(self.teacher, batch.teacher.input_ids, needs_states, teacher_learns)
        return Outputs(of_targets, teacher[0], student[1], teacher[1])

    def listen(self, batches: Sequence[Batch]) -> None:
        """Before a step's first forward: a teacher that cannot stay reads all of its text now, and leaves."""
        if self._offload is None or self.distillation is None:
            return
        needs_states = self.distillation.needs_states
        # What an attempt that was broken off has left is not to be taken for another batch's.
        self._heard = {
            id(batch): self._read(self.teacher, batch.teacher.input_ids, needs_states, learns=False)
            for batch in batches
        }
        self._offload.leave()

    def _read(self, model: nn.Module, input_ids: Tensor, needs_states: bool, learns: bool):
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return forward_to_lm_head(model, self.heads.of(model), input_ids, self.precision, needs_states)


_KINDS: dict[str, type[Distillation]] = {
    "projection": Projected,
    "strict": Strict,
    "alm": ChunkLikelihood,
    "uld": SortedProbabilities,
}


def build_distillation(
    config: LossConfig, aligner: Aligner, student: nn.Module, teacher: nn.Module | None
) -> Distillation:
    """The term that `--alignment` names. auto: token by token for equal tokenizers, else the projection.

    teacher: None for one whose rows are stored, which has no hidden states to learn from
    """
    if config.alignment == "hidden":
        widths = (text_config_of(model).hidden_size for model in (student, teacher))
        return HiddenStates(config, aligner, *widths)
    kind: type[Distillation] = TokenLevel if aligner.pair.tables is None else Projected
    term = (kind if config.alignment == "auto" else _KINDS[config.alignment])(config, aligner)
    if teacher is None and isinstance(term, TokenLevel):
        # No tile of teacher logits is made, so the student's may take the whole workspace.
        term.tile_rows = positions_per_tile(config.loss_workspace_mb, aligner.pair.student_vocab_size)
    return term

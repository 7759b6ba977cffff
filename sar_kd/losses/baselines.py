"""Every kind of distillation by its name on the command line, the baselines among them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.batch_alignment import Alignment
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import MASKED_LOGIT, Batch, CachedTopK, TopKLogits
from sar_kd.losses.distillation import Distillation, Learned, Outputs, whole_tile
from sar_kd.losses.functional import GroupSums, chunk_likelihood, finite_rows, sorted_distance, state_distance
from sar_kd.losses.projection.marginals import on_support
from sar_kd.losses.tiled_loss import target_log_probs
from sar_kd.models.logit_tiles import finite_columns


class Strict(Distillation):
    """T^2 * D(teacher || student) where both predict the same bytes, over the teacher's top k of the shared tokens."""

    _LEAST_MASS = 0.1
    """A row counts if the tokens that both have hold this share of the teacher's probability, as it is cut."""

    same_token: Tensor
    """See `Aligner`"""

    def __init__(self, config: LossConfig, aligner: Aligner):
        super().__init__(config, aligner)
        self.register_buffer("same_token", aligner.same_token, persistent=False)

    def between(self, student: Tensor, teacher: Tensor | TopKLogits, part: Any) -> Learned:
        """part: bool [n], which pairs predict the same bytes"""
        size, student = len(self.same_token), student / self.temperature
        if self.top_k:
            top = self._top(teacher, size)
            partners, keep, heard = self.same_token[top.ids], top.sound, top.logits / self.temperature
            shared, student = heard, student.gather(0, partners.clamp_min(0))
        else:
            whole, partners = whole_tile(teacher), self.same_token[:, None]
            keep = finite_columns(whole.detach())
            heard = whole.masked_fill(~keep, 0.0) / self.temperature
            shared, student = heard[:size], student.index_select(0, self.same_token.clamp_min(0))
        shared = torch.where(partners >= 0, shared, MASKED_LOGIT)
        held = (shared.logsumexp(0) - heard.logsumexp(0)).exp()
        counts = keep & part & (held >= self._LEAST_MASS)
        student = on_support(student, shared)
        # T^2 keeps the size of the gradient (arXiv 1503.02531, section 2).
        loss, raw = self.divergence(student.log_softmax(0), shared.log_softmax(0), counts)
        return Learned(loss * self.temperature**2, raw * self.temperature**2, (~keep).sum())


class ChunkLikelihood(Distillation):
    """tau * KL between the two models' verdicts on each chunk; needs nothing but the probability of the text."""

    def __init__(self, config: LossConfig, aligner: Aligner):
        super().__init__(config, aligner)
        self.tau = config.alm_tau

    def forward(self, batch: Batch, outputs: Outputs) -> Learned:
        """See `Distillation`."""
        alignment = batch.alignment
        bound = self.clamp.raw_bound
        heard, keep = self._heard(batch, outputs, bound)
        said, _ = target_log_probs(outputs.student, batch.student.targets, self.tile_rows, bound)
        loss = self._likelihood(alignment, self.clamp.log_probs(said), heard, keep)
        with torch.no_grad():
            if bound < math.inf:
                heard, _ = self._heard(batch, outputs)
                said, _ = target_log_probs(outputs.student, batch.student.targets, self.tile_rows)
            raw = self._likelihood(alignment, said, heard, keep)
        return Learned(loss, raw, (~keep).sum())

    def _heard(self, batch: Batch, outputs: Outputs, bound: float = math.inf) -> tuple[Tensor, Tensor]:
        teacher = outputs.teacher
        assert teacher is not None, "asked only where something is distilled"
        if isinstance(teacher, CachedTopK):
            return teacher.target_log_probs()
        return target_log_probs(teacher.at(batch.teacher.rows), batch.teacher.targets, self.tile_rows, bound)

    def _likelihood(self, alignment: Alignment, said: Tensor, heard: Tensor, keep: Tensor) -> Tensor:
        chunks = (alignment.student_chunks, alignment.teacher_chunks)
        values = (said, heard.masked_fill(~keep, 0.0))
        both = (_chunk_sums(v, c, alignment.num_chunks) for v, c in zip(values, chunks, strict=True))
        sound = _chunk_sums((~keep).float(), alignment.teacher_chunks, alignment.num_chunks) == 0
        # A chunk of which the teacher's part is not finite is given the same likelihood on both sides: no difference.
        student, teacher = (torch.where(sound, side, -1.0) for side in both)
        return chunk_likelihood(student, teacher, self.tau)


def _chunk_sums(values: Tensor, chunks: Tensor, count: int) -> Tensor:
    """float [count]; what belongs to no chunk (-1) goes to one behind the last."""
    return GroupSums(torch.where(chunks < 0, count, chunks), count + 1).sum(values)[:count]


class SortedProbabilities(Distillation):
    """L1 between sorted probabilities where both start a token: ULD, a baseline. Neither T^2 nor a floor."""

    def between(self, student: Tensor, teacher: Tensor | TopKLogits, part: Any) -> Learned:
        """part: of no concern here"""
        if self.top_k:
            top = self._top(teacher)
            told, keep = top.spread(self.teacher_rows), top.sound
        else:
            whole = whole_tile(teacher)
            keep = finite_columns(whole.detach())
            told = whole.masked_fill(~keep, 0.0)
        loss = sorted_distance(student.T, told.T, self.temperature, keep)
        return Learned(loss, loss.detach(), (~keep).sum())


class HiddenStates(Distillation):
    """Relative squared error of the last hidden states at the ends of chunks, where both have read the same bytes.

    The student's states pass a projection that is learned with it.
    """

    needs_states = True

    def __init__(self, config: LossConfig, aligner: Aligner, student_width: int, teacher_width: int):
        super().__init__(config, aligner)
        self.projection = nn.Linear(student_width, teacher_width, bias=False)

    def forward(self, batch: Batch, outputs: Outputs) -> Learned:
        """See `Distillation`."""
        assert outputs.student_states is not None
        assert outputs.teacher_states is not None
        states = outputs.teacher_states[batch.alignment.teacher_ends]
        keep = finite_rows(states)
        states = states.masked_fill(~keep[:, None], 0.0)
        projected = self.projection(outputs.student_states[batch.alignment.student_ends].float())
        loss = state_distance(projected, states, keep)
        return Learned(loss, loss.detach(), (~keep).sum())

"""The baselines: strict token matching, chunk likelihood (ALM), sorted probabilities (ULD) and hidden states.

Each is a `Distillation` that `--alignment` names. None carries a distribution across vocabularies, as `projection/`
does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.batch_alignment import Alignment
from sar_kd.alignment.segments import split_range
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import Batch, CachedTokenLogits
from sar_kd.losses.distillation import Distillation, DistillationTerms, ForwardOutputs, dense_tile
from sar_kd.losses.functional import (
    GroupSums,
    LogitClamp,
    all_finite,
    chunk_likelihood,
    sorted_distance,
    state_distance,
)
from sar_kd.losses.projection.marginals import on_support
from sar_kd.losses.tiled_loss import TeacherTile, Tile, TileLoss, target_log_probs
from sar_kd.models.logit_tiles import finite_positions
from sar_kd.runtime.precision import MASKED_BELOW, MASKED_LOGIT


class _PairedPositions(Distillation[Tensor]):
    """A method over pairs of positions at a common boundary, whose gradient autograd computes."""

    def tiles(self, batch: Batch) -> list[Tile[Tensor]]:
        """The context is bool [n]: which pairs predict a token of the same bytes."""
        pairs = batch.alignment
        return [
            Tile(pairs.student_positions[part], pairs.teacher_positions[part], None, pairs.strict[part])
            for part in split_range(len(pairs.strict), self.positions_per_tile)
        ]

    def _dense_logits(self, teacher: TeacherTile) -> tuple[Tensor, Tensor]:
        """The teacher's logits, 0 at positions that are not finite; and bool [m], which positions are."""
        whole = dense_tile(teacher)
        is_finite = finite_positions(whole.detach())
        return whole.masked_fill(~is_finite, 0.0), is_finite


class Strict(_PairedPositions):
    """T^2 * D(teacher, student) where both predict the same bytes, over the shared tokens in the teacher's top k."""

    _MIN_SHARED_MASS = 0.1
    """A position counts if shared tokens hold at least this share of the (truncated) teacher's probability"""

    same_token: Tensor
    """See `Aligner`"""

    def __init__(self, config: LossConfig, aligner: Aligner):
        super().__init__(config, aligner)
        self.register_buffer("same_token", aligner.same_token, persistent=False)

    def differentiable_loss(self, student: Tensor, teacher: TeacherTile, context: Tensor) -> TileLoss:
        num_mapped, student = len(self.same_token), student / self.temperature
        if self.top_k:
            top = self._top_k(teacher, num_mapped)
            student_ids, is_finite = self.same_token[top.ids], top.is_finite
            shared = teacher_logits = top.logits / self.temperature
            student = student.gather(0, student_ids.clamp_min(0))
        else:
            dense, is_finite = self._dense_logits(teacher)
            student_ids, teacher_logits = self.same_token[:, None], dense / self.temperature
            shared, student = teacher_logits[:num_mapped], student.index_select(0, self.same_token.clamp_min(0))
        shared = torch.where(student_ids >= 0, shared, MASKED_LOGIT)
        shared_mass = (shared.logsumexp(0) - teacher_logits.logsumexp(0)).exp()
        is_shared = shared_mass >= self._MIN_SHARED_MASS
        keep, unshared = is_finite & context & is_shared, (is_finite & context & ~is_shared).sum()
        student = on_support(student, shared)
        log_p, log_t = student.log_softmax(0), shared.log_softmax(0)
        has_no_mass = student.detach().amax(0) < MASKED_BELOW
        is_infinite = keep & (has_no_mass | self.divergence.infinite_classes(log_p, log_t).any(0))
        # T^2 keeps the size of the gradient (arXiv 1503.02531, section 2).
        loss, unclamped = (self.temperature**2 * each for each in self.divergence(log_p, log_t, keep & ~is_infinite))
        infinite = is_infinite.sum()
        return TileLoss(loss, unclamped, (~is_finite).sum() + infinite, infinite, unshared)


class SortedProbabilities(_PairedPositions):
    """ULD: L1 between sorted probabilities at common boundaries. Neither T^2 nor a floor."""

    def differentiable_loss(self, student: Tensor, teacher: TeacherTile, context: Tensor) -> TileLoss:
        if self.top_k:
            top = self._top_k(teacher)
            teacher_logits, is_finite = top.to_dense(self.teacher_vocab_size), top.is_finite
        else:
            teacher_logits, is_finite = self._dense_logits(teacher)
        loss = sorted_distance(student.T, teacher_logits.T, self.temperature, is_finite)
        dropped = (~is_finite).sum()
        none = torch.zeros_like(dropped)
        return TileLoss(loss, loss.detach(), dropped, none, none)


class ChunkLikelihood(Distillation[None]):
    """ALM: tau * KL between the two models' probabilities of each chunk; needs only the text's log-probabilities."""

    def __init__(self, config: LossConfig, aligner: Aligner):
        super().__init__(config, aligner)
        self.tau = config.alm_tau

    def num_positions(self, batch: Batch) -> int:
        return len(batch.teacher.targets)

    def forward(self, batch: Batch, outputs: ForwardOutputs) -> DistillationTerms:
        alignment, bound, targets = batch.alignment, self.clamp.raw_bound, batch.student.targets
        teacher, is_finite = self._teacher(batch, outputs, bound)
        student, _ = target_log_probs(outputs.student, targets, self.positions_per_tile, bound)
        loss, left_out = self._loss(alignment, student, teacher, is_finite, self.clamp)
        with torch.no_grad():
            if bound < math.inf:
                teacher, _ = self._teacher(batch, outputs)
                student, _ = target_log_probs(outputs.student, targets, self.positions_per_tile)
            unclamped, infinite = self._loss(alignment, student, teacher, is_finite, LogitClamp())
        return DistillationTerms(loss, unclamped, (~is_finite).sum() + left_out, infinite, torch.zeros_like(infinite))

    def _teacher(self, batch: Batch, outputs: ForwardOutputs, bound: float = math.inf) -> tuple[Tensor, Tensor]:
        """As `target_log_probs`, of the teacher's targets."""
        teacher, tokens = outputs.teacher, batch.teacher
        assert teacher is not None
        if isinstance(teacher, CachedTokenLogits):
            return teacher.target_log_probs, teacher.is_finite
        return target_log_probs(teacher.select(tokens.positions), tokens.targets, self.positions_per_tile, bound)

    def _loss(
        self, alignment: Alignment, student: Tensor, teacher: Tensor, is_finite: Tensor, clamp: LogitClamp
    ) -> tuple[Tensor, Tensor]:
        """The loss; and the teacher's tokens in chunks that only the student masks, whose loss is infinite.

        A chunk that both mask has no loss, one that only the teacher masks a finite one.
        """
        count, chunks = alignment.num_chunks, alignment.teacher_chunks
        is_masked = _chunk_sums(student.detach(), alignment.student_chunks, count) < MASKED_BELOW
        student_sums = _chunk_sums(clamp.floor_log_probs(student), alignment.student_chunks, count)
        teacher_sums = _chunk_sums(teacher.masked_fill(~is_finite, 0.0), chunks, count)
        is_sound = _chunk_sums((~is_finite).float(), chunks, count) == 0
        is_infinite = is_sound & is_masked & (teacher_sums >= MASKED_BELOW)
        keep = is_sound & ~is_masked
        # A chunk that is left out gets the same likelihood on both sides: no loss, no gradient.
        student_sums, teacher_sums = (torch.where(keep, side, -1.0) for side in (student_sums, teacher_sums))
        in_infinite = torch.cat([is_infinite, is_infinite.new_zeros(1)])[chunks]  # -1, the last, is in no chunk
        return chunk_likelihood(student_sums, teacher_sums, self.tau), in_infinite.sum()


def _chunk_sums(values: Tensor, chunks: Tensor, count: int) -> Tensor:
    """The sum of each chunk: float [count]. Values outside all chunks (-1) go to an extra last group."""
    values = values.clamp_min(MASKED_LOGIT)  # -inf is a masked token's
    return GroupSums(torch.where(chunks < 0, count, chunks), count + 1).sum(values)[:count]


class HiddenStates(Distillation[None]):
    """Relative squared error between last hidden states at the ends of chunks, where both models have the same prefix.

    A linear projection of the student's states is trained with it.
    """

    needs_states = True

    def __init__(self, config: LossConfig, aligner: Aligner, student_width: int, teacher_width: int):
        super().__init__(config, aligner)
        self.projection = nn.Linear(student_width, teacher_width, bias=False)

    def num_positions(self, batch: Batch) -> int:
        return len(batch.alignment.teacher_ends)

    def forward(self, batch: Batch, outputs: ForwardOutputs) -> DistillationTerms:
        assert outputs.student_states is not None
        assert outputs.teacher_states is not None
        states = outputs.teacher_states[batch.alignment.teacher_ends]
        is_finite = all_finite(states)
        states = states.masked_fill(~is_finite[:, None], 0.0)
        projected = self.projection(outputs.student_states[batch.alignment.student_ends].float())
        loss = state_distance(projected, states, is_finite)
        dropped = (~is_finite).sum()
        none = torch.zeros_like(dropped)
        return DistillationTerms(loss, loss.detach(), dropped, none, none)

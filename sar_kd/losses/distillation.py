"""The interface of a distillation method, and the method for equal tokenizers: the divergence token by token.

A teacher truncated to its top k is a distribution over k + 1 classes: those tokens, and the tail. Logits are known up
to a constant per position, so log-probabilities at temperature 1 serve as logits of the k tokens at every temperature;
the tail's logsumexp depends on the temperature and is stored for each.

Of tokens drawn from the teacher's distribution t the estimates w, with E[w] = t, are a distribution w / S without a
tail, and S = sum w is a weight of the position: S * (p - w / S), the gradient of the forward KL, has the mean p - t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple

import torch
from torch import Tensor, nn

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.segments import positions_per_tile, split_range
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import Batch, TopKLogits
from sar_kd.losses.divergence import Divergence, GradTarget, log_softmax_backward_, logsumexp_backward
from sar_kd.losses.functional import LogitClamp
from sar_kd.losses.tiled_loss import (
    Context,
    SparseGrad,
    TeacherLogits,
    TeacherTile,
    Tile,
    TiledLossSpec,
    TileGrad,
    TileLoss,
    tiled_loss,
)
from sar_kd.models.lm_head import LazyLogits
from sar_kd.models.logit_tiles import LogProbs, finite_positions, flat_view, is_finite_peak, logsumexp_per_position
from sar_kd.runtime.precision import MASKED_LOGIT


@dataclass(frozen=True)
class ForwardOutputs:
    """Logits of both models on a batch, and their hidden states where the method needs them."""

    student: LazyLogits
    """[N, V_s]: positions with a target"""
    teacher: TeacherLogits | None
    """[B * T_t, V_t]: every position; None without distillation"""
    student_states: Tensor | None = None
    """float [B * T_s, D_s]: last hidden states"""
    teacher_states: Tensor | None = None
    """float [B * T_t, D_t]"""


class DistillationTerms(NamedTuple):
    """The distillation loss of a batch: sums over target tokens, nats; fp32 scalars."""

    loss: Tensor
    unclamped: Tensor
    """The loss without a floor and without the logit clamp; no gradient"""
    dropped: Tensor
    """See `TileLoss`"""
    infinite: Tensor
    """See `TileLoss`"""
    unshared: Tensor
    """See `TileLoss`"""


class Distillation(nn.Module, Generic[Context]):
    """A distillation method: `forward` gives the loss of a batch.

    A method compares tiles of logits: it implements `tiles`, and `differentiable_loss` or `loss_and_grad`. A method
    that compares something else overrides `forward`.
    """

    needs_states = False
    covers_text = False
    """The tiles hold each position with a target once, so that cross-entropy can use them too"""

    def __init__(self, config: LossConfig, aligner: Aligner):
        super().__init__()
        workspace, pair = config.loss_workspace_mb, aligner.pair
        self.temperature = config.temperature
        self.top_k = config.teacher_top_k if config.teacher_top_k < pair.teacher_vocab_size else 0
        """0 for the whole vocabulary"""
        self.teacher_vocab_size, self.num_teacher_tokens = pair.teacher_vocab_size, pair.num_teacher_tokens
        self.clamp = LogitClamp(config.logit_clamp_style, config.logit_clamp)
        floor = -2.0 * self.clamp.bound if self.clamp.style == "normalized" else -torch.inf
        self.divergence = Divergence(config.kd_direction, config.jsd_beta, floor)
        self.positions_per_tile = positions_per_tile(workspace, pair.student_vocab_size, pair.teacher_vocab_size)

    def forward(self, batch: Batch, outputs: ForwardOutputs) -> DistillationTerms:
        """The loss, differentiable in the teacher's states if they have a graph, else in the student's."""
        grad_side = "teacher" if outputs.teacher is not None and outputs.teacher.requires_grad else "student"
        spec = TiledLossSpec(self.tiles(batch), None, self.loss_and_grad, 0.0, 1.0, self.clamp, grad_side=grad_side)
        sums = tiled_loss(spec, outputs.student, outputs.teacher)
        return DistillationTerms(sums.total, sums.unclamped_kd, sums.dropped, sums.infinite, sums.unshared)

    def tiles(self, batch: Batch) -> list[Tile[Context]]:
        """The positions to compare, in tiles that fit into the workspace."""
        raise NotImplementedError

    def num_positions(self, batch: Batch) -> int:
        """Teacher positions that are compared in a batch, of which `dropped` are left out."""
        return len(batch.alignment.teacher_positions)

    def loss_and_grad(self, student: Tensor, teacher: TeacherTile, context: Context, grad_side: str | None) -> TileLoss:
        """The loss of two tiles of logits, float32 [V_s, n] and [V_t, m], and its gradient.

        context: of the `Tile`; grad_side: 'student', 'teacher' or None
        A method may overwrite the tile of the side without a gradient.
        """
        if grad_side is None:
            return self.differentiable_loss(student, teacher, context)
        leaf = student if grad_side == "student" else dense_tile(teacher)
        with torch.enable_grad():
            leaf.requires_grad_()
            found = self.differentiable_loss(student, teacher, context)
        (grad,) = torch.autograd.grad(found.loss, leaf)
        return found._replace(loss=found.loss.detach(), unclamped=found.unclamped.detach(), grad=TileGrad(((0, grad),)))

    def differentiable_loss(self, student: Tensor, teacher: TeacherTile, context: Context) -> TileLoss:
        """The loss of two tiles as `loss_and_grad` gets them, with an autograd graph instead of a gradient."""
        raise NotImplementedError

    def _top_k(self, teacher: TeacherTile, num_tokens: int | None = None) -> TopKLogits:
        """The teacher's top k, among the first `num_tokens` tokens if given."""
        if isinstance(teacher, TopKLogits):
            return teacher.truncate(self.top_k, self.temperature)
        num_tokens = min(self.num_teacher_tokens, num_tokens or self.num_teacher_tokens)
        return top_k_of(teacher, self.top_k, num_tokens, self.temperature)


def dense_tile(teacher: TeacherTile) -> Tensor:
    """The teacher's tile where it is not truncated; cached logits always are."""
    assert isinstance(teacher, Tensor)
    return teacher


class TokenLevel(Distillation[None]):
    """T^2 * D(teacher, student) at every position, over one vocabulary: for equal tokenizers."""

    covers_text = True

    def tiles(self, batch: Batch) -> list[Tile[None]]:
        positions = batch.alignment.teacher_positions
        parts = split_range(len(positions), self.positions_per_tile)
        return [Tile(part, positions[part], None, None) for part in parts]

    def loss_and_grad(self, student: Tensor, teacher: TeacherTile, context: None, grad_side: str | None) -> TileLoss:
        """As the base class; the gradient overwrites the other side's tile."""
        if self.top_k:
            assert grad_side != "teacher"
            top = self._top_k(teacher, min(len(student), self.num_teacher_tokens))
            return self._top_k_loss_and_grad(student, top, grad_side is not None)
        whole = dense_tile(teacher)
        # LM heads may be padded to different sizes; the ids that both have are the tokens.
        shared = min(len(student), len(whole))
        student, teacher = student[:shared], whole[:shared]
        log_p, log_t = (LogProbs.from_logits(tile, self.temperature) for tile in (student, teacher))
        keep = is_finite_peak(log_t.peak if len(whole) == shared else whole.amax(0))
        if grad_side is None:
            return self._loss(log_p, log_t, keep)
        grad = teacher if grad_side == "student" else student
        tile_loss = self._loss(log_p, log_t, keep, GradTarget(grad_side, grad, of_logits=True))
        return tile_loss._replace(grad=TileGrad(((0, grad),)))

    def _top_k_loss_and_grad(self, student: Tensor, top: TopKLogits, needs_grad: bool) -> TileLoss:
        """Over the teacher's top k and the tail."""
        positions = torch.arange(student.shape[1], device=student.device)
        indices = (top.ids * student.stride(0) + positions).reshape(-1)
        flat = flat_view(student)
        top_logits = flat.index_select(0, indices)
        flat.index_fill_(0, indices, MASKED_LOGIT)
        tail = self.temperature * logsumexp_per_position(student, self.temperature)
        sides = [top_logits.view_as(top.ids), tail[None]], [top.logits, top.tail_logsumexp[None]]
        log_p, log_t = (LogProbs.from_logits(torch.cat(parts), self.temperature) for parts in sides)
        if not needs_grad:
            flat.index_copy_(0, indices, top_logits)
            return self._loss(log_p, log_t, top.is_finite, weights=top.weights)
        grad = torch.empty_like(log_t.tile)
        tile_loss = self._loss(log_p, log_t, top.is_finite, GradTarget("student", grad, of_logits=True), top.weights)
        tail_grad = logsumexp_backward(student, tail, grad[-1], self.temperature)
        flat.index_copy_(0, indices, top_logits)
        return tile_loss._replace(grad=TileGrad(((0, tail_grad),), SparseGrad(indices, grad[:-1].reshape(-1))))

    def _loss(
        self,
        student: LogProbs,
        teacher: LogProbs,
        keep: Tensor,
        target: GradTarget | None = None,
        weights: Tensor | float = 1.0,
    ) -> TileLoss:
        """The divergence over one set of classes; the gradient of the logits goes to the target's buffer.

        weights: float32 [n], a factor of each position
        """
        loss, unclamped, grad_sum, is_infinite = self.divergence.per_position(student, teacher, target)
        is_infinite = is_infinite & keep
        keep = keep & ~is_infinite
        # T^2 keeps the size of the gradient (arXiv 1503.02531, section 2); dividing logits by T takes one T away.
        if target is not None:
            log_probs = student if target.side == "student" else teacher
            log_softmax_backward_(target.grad, grad_sum, log_probs, keep, weights * self.temperature)
        infinite, dropped = is_infinite.sum(), (~keep).sum()
        weights = weights * self.temperature**2
        loss, unclamped = ((value * weights).where(keep, 0.0).sum() for value in (loss, unclamped))
        return TileLoss(loss, unclamped, dropped, infinite, unshared=torch.zeros_like(dropped))


def top_k_of(tile: Tensor, k: int, num_tokens: int, temperature: float) -> TopKLogits:
    """The k largest logits among a vocabulary's tokens, and the tail.

    tile: float32 [V, n], logits; num_tokens: its first ids are tokens, the rest is padding of the LM head
    """
    is_finite = finite_positions(tile)
    top = tile[:num_tokens].topk(min(k, num_tokens), dim=0)
    tail = temperature * logsumexp_per_position(tile.scatter(0, top.indices, MASKED_LOGIT), temperature)
    return TopKLogits(
        top.indices, top.values.where(is_finite, 0.0), tail.where(is_finite, 0.0), is_finite, torch.ones_like(tail)
    )

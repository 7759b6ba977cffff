"""The projection method: the divergences of one segment, with their gradients.

Three paths, because each of them is the fastest where it applies:
- `_dense_loss_and_grad`: the whole teacher distribution; gradients written out.
- `_top_k_loss_and_grad`: a teacher truncated to its top k whose tokenizer is the coarser, so that the whole vocabulary
  of the student is needed for the tail only; sparse gradients.
- `differentiable_loss`: a truncated teacher whose tokenizer is the finer; autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.batch_alignment import Continuations
from sar_kd.alignment.segments import Segment
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import MASKED_LOGIT, Batch, TopKLogits
from sar_kd.losses.distillation import Distillation, dense_tile
from sar_kd.losses.divergence import logsumexp_backward
from sar_kd.losses.functional import GroupSums
from sar_kd.losses.projection.joint import BoundaryLoss, ContinuationPaths, add_continuation_paths, boundary_divergence
from sar_kd.losses.projection.marginals import (
    KNOWN_THRESHOLD,
    ClassMap,
    coarse_log_probs,
    fine_log_probs,
    gather_logits,
    on_support,
    renormalise,
)
from sar_kd.losses.projection.truncated import SparseClasses, dense_with_tail, known_classes, known_entries
from sar_kd.losses.tiled_loss import SparseGrad, TeacherTile, Tile, TileGrad, TileLoss
from sar_kd.models.logit_tiles import LogProbs, finite_positions, flat_view, logsumexp_per_position, mask_positions_

Sums = tuple[Tensor, Tensor]
"""A sum over positions with the floor and without it, fp32 scalars, nats"""


class _ContinuationLogits(NamedTuple):
    """Logits of one side's tile that continuations need, divided by the temperature."""

    inside: Tensor
    """float32 [V, K_1]: all logits at positions inside a token of the other side"""
    entries: Tensor
    """float32 [E]: the `coarse_entries` of this side's continuations"""
    indices: Tensor
    """int64 [E]: of the entries, in `flat_view` of the tile"""


class Projection(Distillation[Segment]):
    """T^2 * D(teacher, student) over shared classes, wherever either side starts a token; see `losses.projection`."""

    covers_text = True

    def __init__(self, config: LossConfig, aligner: Aligner):
        super().__init__(config, aligner)
        shared, self.teacher_is_coarser = aligner.shared_classes, aligner.teacher_is_coarser
        self.student_map = ClassMap(shared.student_tokens, shared.student_classes, shared.num_classes)
        self.teacher_map = ClassMap(shared.teacher_tokens, shared.teacher_classes, shared.num_classes)

    def tiles(self, batch: Batch) -> list[Tile[Segment]]:
        return [Tile(part.student_positions, part.teacher_positions, part.counts, part) for part in batch.segments]

    def loss_and_grad(self, student: Tensor, teacher: TeacherTile, context: Segment, grad_side: str | None) -> TileLoss:
        if not self.top_k:
            return self._dense_loss_and_grad(student, dense_tile(teacher), context, grad_side)
        assert grad_side != "teacher"
        if self.teacher_is_coarser:
            return self._top_k_loss_and_grad(student, self._top_k(teacher), context, grad_side is not None)
        return super().loss_and_grad(student, teacher, context, grad_side)

    # The whole teacher distribution

    def _dense_loss_and_grad(
        self, student: Tensor, teacher: Tensor, segment: Segment, grad_side: str | None
    ) -> TileLoss:
        side = None if grad_side is None else int(grad_side == "teacher")
        is_finite = finite_positions(teacher)
        tiles = student, mask_positions_(teacher, is_finite)
        records = segment.student_continuations, segment.teacher_continuations
        logits = [self._continuation_logits(tiles[i], segment.num_pairs, records[1 - i], records[i]) for i in range(2)]
        leaves = [] if side is None else [logits[side].inside.requires_grad_(), logits[side].entries.requires_grad_()]
        with torch.enable_grad():
            coarse = [coarse_log_probs(logits[i].entries, records[i]) for i in range(2)]
            inside = self._inside_loss(coarse, (logits[0].inside, logits[1].inside), segment, is_finite)
            paths, counts = self._paths(coarse[self.teacher_is_coarser], segment, is_finite)
        boundary, shares = self._boundary_loss(tiles, segment.num_pairs, paths.detach(), side, counts.float())
        scale = self.temperature**2
        loss, unclamped = (
            scale * (at_boundary * counts).sum() + scale * inside_sum.detach()
            for at_boundary, inside_sum in zip((boundary.loss, boundary.unclamped), inside, strict=True)
        )
        dropped = self._num_dropped(segment, is_finite)
        if side is None or boundary.grad is None:
            return TileLoss(loss, unclamped, dropped)
        outputs, output_grads = [inside[0]], [torch.ones_like(inside[0])]
        if boundary.path_grad is not None:
            outputs += [paths.log_probs, paths.end_log_probs]
            output_grads += boundary.path_grad
        # T^2 of the loss, and 1 / T of the logits.
        inside_grad, entry_grad = (g.mul_(self.temperature) for g in _grads(outputs, leaves, output_grads))
        (self.student_map, self.teacher_map)[side].scatter_grad_(boundary.grad, shares)
        dense = (0, boundary.grad), (segment.num_pairs, inside_grad)
        return TileLoss(loss, unclamped, dropped, TileGrad(dense, SparseGrad(logits[side].indices, entry_grad)))

    def _boundary_loss(
        self, tiles: tuple[Tensor, Tensor], num_pairs: int, paths: ContinuationPaths, side: int | None, counts: Tensor
    ) -> tuple[BoundaryLoss, Tensor]:
        """The divergence at common boundaries, with the classes at the representatives of the side with a gradient.

        Returns: it; the shares of that side's tokens in classes of several
        """
        own, temperature = side or 0, self.temperature
        maps = self.student_map, self.teacher_map
        own_map, own_tile = maps[own], tiles[own][: len(maps[own]), :num_pairs]
        other_tile = own_map.to_other_vocab(maps[1 - own], tiles[1 - own][:, :num_pairs], temperature)
        overwritten, shares = own_map.to_classes_(own_tile, temperature)
        student, teacher = (own_tile, other_tile) if own == 0 else (other_tile, own_tile)
        log_probs = LogProbs.from_logits(student, temperature), LogProbs.from_logits(teacher, temperature)
        boundaries, classes, continuation_classes = paths.indices
        paths = paths._replace(
            indices=torch.stack([boundaries, own_map.representatives[classes], continuation_classes])
        )
        # The weight T is T^2 of the loss, and 1 / T of the logits.
        coarser = int(self.teacher_is_coarser)
        boundary = boundary_divergence(self.divergence, log_probs, paths, coarser, side, counts, weight=temperature)
        own_map.restore_(own_tile, overwritten)
        return boundary, shares

    # A truncated teacher whose tokenizer is the coarser

    def _top_k_loss_and_grad(self, student: Tensor, top: TopKLogits, segment: Segment, needs_grad: bool) -> TileLoss:
        num_pairs, temperature, class_map = segment.num_pairs, self.temperature, self.student_map
        teacher_coarse, teacher_inside, counts_inside = self._truncated_teacher(top, segment)
        paths, counts = self._paths(teacher_coarse, segment, top.is_finite)
        known = known_classes(top.slice(0, num_pairs), self.teacher_map, temperature, paths)
        own = self._continuation_logits(
            student, num_pairs, segment.teacher_continuations, segment.student_continuations
        )
        # The student's logits of the known classes: those of one token by its index, the few others for all positions.
        classes = known.classes.clamp_max(len(class_map.representatives) - 1)
        multi_index = class_map.multi_index[classes]
        indices = class_map.representatives[classes] * student.stride(0) + known.positions
        single = flat_view(student).index_select(0, indices).div_(temperature)
        multi, shares = class_map.multi_token_logits(student[:, :num_pairs], temperature)
        multi.div_(temperature)
        numbers = torch.arange(num_pairs, device=student.device)
        member_indices = (class_map.members[:, None] * student.stride(0) + numbers).view(-1)
        with self._only_tail(student, known, multi_index, indices, member_indices, num_pairs) as tail_tile:
            tail = logsumexp_per_position(tail_tile, temperature)
            leaves = [own.inside, own.entries, single, multi, tail]
            if needs_grad:
                for leaf in leaves:
                    leaf.requires_grad_()
            with torch.enable_grad():
                coarse = coarse_log_probs(own.entries, segment.student_continuations), teacher_coarse
                inside = self._inside_loss(coarse, (own.inside, teacher_inside), segment, top.is_finite, counts_inside)
                multi_logits = torch.cat([multi, multi.new_zeros(1, num_pairs)])[multi_index, known.positions]
                logits = torch.where(multi_index < 0, single, multi_logits).where(known.is_known, MASKED_LOGIT)
                positions = torch.cat([known.positions, numbers])
                sides = torch.cat([logits, tail]), torch.cat([known.log_probs, known.tail])
                log_p, log_t, shared = renormalise(*sides, GroupSums(positions, num_pairs))
                boundary = self.divergence(log_p, log_t, (counts & shared)[positions])
                loss, unclamped = (temperature**2 * (a + b) for a, b in zip(inside, boundary, strict=True))
            dropped = self._num_dropped(segment, top.is_finite)
            if not needs_grad:
                return TileLoss(loss, unclamped, dropped)
            # T^2 is in the loss; 1 / T of the logits.
            grads = [grad.div_(temperature) for grad in _grads([loss], leaves)]
            tail_grad = logsumexp_backward(tail_tile, temperature * tail.detach(), grads[4], temperature)
        member_grad = grads[3].index_select(0, class_map.member_groups).mul_(shares).view(-1)
        sparse = SparseGrad(
            torch.cat([own.indices, indices, member_indices]), torch.cat([grads[1], grads[2], member_grad])
        )
        grad = TileGrad(((0, tail_grad), (num_pairs, grads[0])), sparse)
        return TileLoss(loss.detach(), unclamped.detach(), dropped, grad)

    @contextlib.contextmanager
    def _only_tail(
        self,
        student: Tensor,
        known: SparseClasses,
        multi_index: Tensor,
        indices: Tensor,
        member_indices: Tensor,
        num_pairs: int,
    ) -> Iterator[Tensor]:
        """The student's tile at common boundaries, [V, K], in which only classes that are not known have logits.

        multi_index: int64 [E], of the known classes, as in `ClassMap`
        indices, member_indices: in `flat_view` of the tile, of the known classes' representatives, and of `members`
        """
        class_map, flat, pairs = self.student_map, flat_view(student), student[:, :num_pairs]
        excluded = torch.cat([class_map.unclassed, class_map.tokens_beyond(len(student))])
        num_known = torch.zeros(len(class_map.multi_classes) + 1, num_pairs, device=student.device)
        num_known.index_put_((multi_index, known.positions), known.is_known.float(), accumulate=True)
        is_known = torch.cat([known.is_known, (num_known[class_map.member_groups] > 0).view(-1)])
        indices = torch.cat([indices, member_indices])
        single, whole = flat.index_select(0, indices), pairs.index_select(0, excluded)
        # By the minimum: an index may occur twice, and once for an empty entry.
        flat.scatter_reduce_(0, indices, torch.where(is_known, MASKED_LOGIT, torch.inf), "amin")
        pairs.index_fill_(0, excluded, MASKED_LOGIT)
        yield pairs
        pairs.index_copy_(0, excluded, whole)
        flat.index_copy_(0, indices, single)

    # A truncated teacher whose tokenizer is the finer

    def differentiable_loss(self, student: Tensor, teacher: TeacherTile, context: Segment) -> TileLoss:
        segment, num_pairs, top = context, context.num_pairs, self._top_k(teacher)
        teacher_coarse, teacher_inside, counts_inside = self._truncated_teacher(top, segment)
        num_inside, record = segment.teacher_continuations.num_inside, segment.student_continuations
        own = gather_logits(student, self.student_map, num_pairs, num_inside, record, self.temperature)
        coarse = coarse_log_probs(own.entries, record), teacher_coarse
        inside = self._inside_loss(coarse, (own.inside, teacher_inside), segment, top.is_finite, counts_inside)
        paths, counts = self._paths(coarse[0], segment, top.is_finite)
        log_p = add_continuation_paths(own.boundary.log_softmax(0), paths)
        known = known_classes(top.slice(0, num_pairs), self.teacher_map, self.temperature)
        log_t = torch.full((len(log_p) + 1, num_pairs), MASKED_LOGIT, device=log_p.device)
        log_t[known.classes, known.positions] = known.log_probs
        log_t[-1] = known.tail
        is_known = log_t[:-1] > KNOWN_THRESHOLD
        tail = log_p.masked_fill(is_known, MASKED_LOGIT).logsumexp(0)
        log_p = torch.cat([log_p.where(is_known, MASKED_LOGIT), tail[None]])
        log_p, log_t, shared = renormalise(log_p, log_t)
        boundary = self.divergence(log_p, log_t, counts & shared)
        loss, unclamped = (self.temperature**2 * (a + b) for a, b in zip(inside, boundary, strict=True))
        return TileLoss(loss, unclamped, self._num_dropped(segment, top.is_finite))

    # The steps that they share

    def _continuation_logits(
        self, tile: Tensor, num_pairs: int, as_fine: Continuations, as_coarse: Continuations
    ) -> _ContinuationLogits:
        continuation, token, _ = as_coarse.coarse_entries
        indices = token * tile.stride(0) + as_coarse.coarse_positions[continuation]
        inside = tile[:, num_pairs : num_pairs + as_fine.num_inside]
        entries = flat_view(tile).index_select(0, indices)
        return _ContinuationLogits(inside.div(self.temperature).contiguous(), entries.div_(self.temperature), indices)

    def _truncated_teacher(self, top: TopKLogits, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's top k inside tokens.

        Returns: log-probabilities of its own continuations, float32 [O]; its logits inside the student's tokens, the
        tail last, float32 [V_t + 1, K_1]; which continuations inside its own tokens count, bool [K_1]
        """
        record, num_pairs = segment.teacher_continuations, segment.num_pairs
        entries, counts = known_entries(top, record, self.teacher_vocab_size, self.temperature)
        inside = top.slice(num_pairs, num_pairs + segment.student_continuations.num_inside)
        logits = dense_with_tail(inside, self.teacher_vocab_size, self.temperature)
        return coarse_log_probs(entries, record), logits, counts[: record.num_inside]

    def _paths(self, coarse_log_probs: Tensor, segment: Segment, is_finite: Tensor) -> tuple[ContinuationPaths, Tensor]:
        """The coarser side's continuations at common boundaries, and which boundaries count: bool [num_pairs]."""
        record = segment.teacher_continuations if self.teacher_is_coarser else segment.student_continuations
        counts = is_finite[: segment.num_pairs]
        if self.teacher_is_coarser:
            # The probability that the last token ended comes from that token's position.
            counts = counts & torch.cat([is_finite[record.coarse_positions], is_finite.new_ones(1)])[segment.token_end]
        end_log_probs = coarse_log_probs[record.end_classes]
        return ContinuationPaths(coarse_log_probs, end_log_probs, segment.token_end, segment.continuation_paths), counts

    def _num_dropped(self, segment: Segment, is_finite: Tensor) -> Tensor:
        """Teacher positions that are not finite, each as often as it would be compared."""
        coarse = segment.teacher_continuations.coarse_positions[: segment.teacher_continuations.num_inside]
        inside = torch.cat([coarse, segment.student_continuations.fine_positions])
        return (~is_finite[: segment.num_pairs]).sum() + (~is_finite[inside]).sum()

    def _inside_loss(
        self,
        coarse: Sequence[Tensor],
        fine_logits: tuple[Tensor, Tensor],
        segment: Segment,
        is_finite: Tensor,
        counts_inside: Tensor | None = None,
    ) -> Sums:
        """The divergence where one side starts a token inside a token of the other; student first in all pairs.

        coarse: float32 [O], log-probabilities of each side's continuations; fine_logits: float32 [V, K_1]
        counts_inside: bool [K_1]: which continuations inside a truncated teacher's tokens count
        """
        record = segment.teacher_continuations
        counts = is_finite[record.coarse_positions[: record.num_inside]]
        counts = counts if counts_inside is None else counts & counts_inside
        student = fine_log_probs(fine_logits[0], record, self.divergence.direction == "reverse")
        in_teacher = self._continuation_loss(student, coarse[1][: record.num_inside_classes], record, counts)
        record = segment.student_continuations
        teacher = fine_log_probs(fine_logits[1], record, masks_impossible_end=True)
        counts = is_finite[record.fine_positions]
        in_student = self._continuation_loss(coarse[0][: record.num_inside_classes], teacher, record, counts)
        return in_teacher[0] + in_student[0], in_teacher[1] + in_student[1]

    def _continuation_loss(self, student: Tensor, teacher: Tensor, record: Continuations, counts: Tensor) -> Sums:
        continuation_of = record.class_continuations[: record.num_inside_classes]
        if self.top_k:
            if self.divergence.direction == "reverse":  # a class outside the top k would have probability 0
                student = on_support(student, teacher)
            groups = GroupSums(continuation_of, record.num_inside)
            student, teacher, shared = renormalise(student, teacher, groups)
            counts = counts & shared
        return self.divergence(student, teacher, counts[continuation_of])


def _grads(outputs: list[Tensor], leaves: list[Tensor], output_grads: list[Tensor] | None = None) -> list[Tensor]:
    """The gradients of the leaves; zeros for one that no output depends on."""
    grads = torch.autograd.grad(outputs, leaves, output_grads, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]

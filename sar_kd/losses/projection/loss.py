"""The projection method: the divergences of one segment, with their gradients.

Three implementations, because each of them is the fastest where it applies:
- `_dense_loss_and_grad`: the whole teacher distribution; gradients written out.
- `_top_k_loss_and_grad`: a teacher truncated to its top k whose tokenizer is the coarser; only the tail needs a pass
  over the student's full vocabulary; sparse gradients.
- `differentiable_loss`: a truncated teacher whose tokenizer is the finer; autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.batch_alignment import STUDENT, TEACHER, Continuations
from sar_kd.alignment.segments import Segment
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import Batch, TopKLogits
from sar_kd.losses.distillation import Distillation, dense_tile
from sar_kd.losses.divergence import logsumexp_backward
from sar_kd.losses.functional import GroupSums
from sar_kd.losses.projection.joint import BoundaryLoss, ContinuationPaths, add_continuation_paths, boundary_divergence
from sar_kd.losses.projection.marginals import (
    BeforeLogits,
    ClassMap,
    continuing_log_probs,
    gather_logits,
    on_support,
    renormalise,
    starting_log_probs,
)
from sar_kd.losses.projection.truncated import (
    SparseClasses,
    dense_with_tail,
    known_before,
    known_classes,
    known_entries,
)
from sar_kd.losses.tiled_loss import SparseGrad, TeacherTile, Tile, TileGrad, TileLoss
from sar_kd.models.logit_tiles import LogProbs, finite_positions, flat_view, logsumexp_per_position, mask_positions_
from sar_kd.runtime.precision import MASKED_BELOW, MASKED_LOGIT

Sums = tuple[Tensor, Tensor, Tensor, Tensor]
"""A sum over positions with the floor and without it, fp32 scalars, nats; how many are left out, as infinite and as
unshared (see `TileLoss`)"""


class _ContinuationLogits(NamedTuple):
    """Logits of one side's tile that continuations need, divided by the temperature."""

    inside: Tensor
    """float32 [V, K_1]: all logits at positions inside a token of the other side"""
    entries: Tensor
    """float32 [E]: the `continuing_entries` of this side's continuations"""
    indices: Tensor
    """int64 [E]: of the entries, in `flat_view` of the tile"""


class _TileBefore(NamedTuple):
    """The logits of the tokens before, gathered from the teacher's tile."""

    logits: BeforeLogits
    indices: Tensor
    """int64 [F + B]: of the entries and the tokens, in `flat_view` of the tile"""
    columns: Tensor
    """int64 [B]: the positions that the normalisers are of"""
    tile: Tensor
    """float32 [V, B]: the logits at these"""


class Projection(Distillation[Segment]):
    """T^2 * D(teacher, student) over shared classes, wherever either side starts a token; see `losses.projection`."""

    covers_text = True

    def __init__(self, config: LossConfig, aligner: Aligner):
        super().__init__(config, aligner)
        shared, self.coarser_side = aligner.shared_classes, aligner.coarser_side
        self.student_map = ClassMap(shared.student_tokens, shared.student_classes, shared.num_classes)
        self.teacher_map = ClassMap(shared.teacher_tokens, shared.teacher_classes, shared.num_classes)

    def tiles(self, batch: Batch) -> list[Tile[Segment]]:
        return [Tile(part.student_positions, part.teacher_positions, part.ce_mask, part) for part in batch.segments]

    def num_positions(self, batch: Batch) -> int:
        both = batch.alignment.teacher_continuations, batch.alignment.student_continuations
        return super().num_positions(batch) + sum(side.num_inside for side in both if side)

    def loss_and_grad(self, student: Tensor, teacher: TeacherTile, context: Segment, grad_side: str | None) -> TileLoss:
        if not self.top_k:
            return self._dense_loss_and_grad(student, dense_tile(teacher), context, grad_side)
        assert grad_side != "teacher"
        if self.coarser_side == TEACHER:
            return self._top_k_loss_and_grad(student, self._top_k(teacher), context, grad_side is not None)
        return super().loss_and_grad(student, teacher, context, grad_side)

    # The whole teacher distribution

    def _dense_loss_and_grad(
        self, student: Tensor, teacher: Tensor, segment: Segment, grad_side: str | None
    ) -> TileLoss:
        side = None if grad_side is None else TEACHER if grad_side == "teacher" else STUDENT
        is_finite = finite_positions(teacher)
        tiles = student, mask_positions_(teacher, is_finite)
        continuations = segment.student_continuations, segment.teacher_continuations
        logits = [
            self._continuation_logits(tiles[i], segment.num_pairs, continuations[1 - i], continuations[i])
            for i in range(2)
        ]
        before = self._before_logits(tiles[TEACHER], segment.teacher_continuations)
        leaves = [] if side is None else [logits[side].inside, logits[side].entries]
        leaves += [] if side != TEACHER or before is None else before.logits
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            of_before = None, before and before.logits
            continuing = [continuing_log_probs(logits[i].entries, continuations[i], of_before[i]) for i in range(2)]
            starting = logits[0].inside, logits[1].inside
            *inside, infinite, unshared = self._inside_loss(continuing, starting, segment, is_finite)
            paths, mask = self._paths(continuing[self.coarser_side], segment, is_finite)
        boundary, shares = self._boundary_loss(tiles, segment.num_pairs, paths.detach(), side, mask.float())
        infinite = infinite + (boundary.is_infinite & mask).sum()
        mask, scale = mask & ~boundary.is_infinite, self.temperature**2
        loss, unclamped = (
            scale * (at_boundary * mask).sum() + scale * inside_sum.detach()
            for at_boundary, inside_sum in zip((boundary.loss, boundary.unclamped), inside, strict=True)
        )
        dropped = self._num_dropped(segment, is_finite) + infinite
        if side is None or boundary.grad is None:
            return TileLoss(loss, unclamped, dropped, infinite, unshared)
        outputs, output_grads = [inside[0]], [torch.ones_like(inside[0])]
        if boundary.path_grad is not None:
            outputs += [paths.log_probs, paths.end_log_probs]
            output_grads += boundary.path_grad
        # T^2 from the loss, 1/T from the chain rule through z/T.
        inside_grad, *grads = (g.mul_(self.temperature) for g in _grads(outputs, leaves, output_grads))
        (self.student_map, self.teacher_map)[side].scatter_grad_(boundary.grad, shares)
        indices, columns = [logits[side].indices], None
        if before is not None and side == TEACHER:
            indices.append(before.indices)
            normalisers = before.logits.normalisers.detach() * self.temperature
            columns = before.columns, logsumexp_backward(before.tile, normalisers, grads.pop(), self.temperature)
        dense = (0, boundary.grad), (segment.num_pairs, inside_grad)
        grad = TileGrad(dense, SparseGrad(torch.cat(indices), torch.cat(grads)), columns)
        return TileLoss(loss, unclamped, dropped, infinite, unshared, grad)

    def _boundary_loss(
        self, tiles: tuple[Tensor, Tensor], num_pairs: int, paths: ContinuationPaths, side: int | None, mask: Tensor
    ) -> tuple[BoundaryLoss, Tensor]:
        """The divergence at common boundaries.

        Each class is stored at one representative token's entry in the base vocabulary: that of the side with a
        gradient, the student's if there is none.
        Returns: the loss; each base token's share of its multi-token class
        """
        base, temperature = STUDENT if side is None else side, self.temperature
        maps = self.student_map, self.teacher_map
        base_map, base_tile = maps[base], tiles[base][: len(maps[base]), :num_pairs]
        other_tile = base_map.to_other_vocab(maps[1 - base], tiles[1 - base][:, :num_pairs], temperature)
        overwritten, shares = base_map.to_classes_(base_tile, temperature)
        student, teacher = (base_tile, other_tile) if base == STUDENT else (other_tile, base_tile)
        log_probs = LogProbs.from_logits(student, temperature), LogProbs.from_logits(teacher, temperature)
        boundaries, classes, continuation_classes = paths.indices
        paths = paths._replace(
            indices=torch.stack([boundaries, base_map.representatives[classes], continuation_classes])
        )
        # The weight T is T^2 from the loss times 1/T from the chain rule through z/T.
        boundary = boundary_divergence(
            self.divergence, log_probs, paths, self.coarser_side, side, mask, weight=temperature
        )
        base_map.restore_(base_tile, overwritten)
        return boundary, shares

    # A truncated teacher whose tokenizer is the coarser

    def _top_k_loss_and_grad(self, student: Tensor, top: TopKLogits, segment: Segment, needs_grad: bool) -> TileLoss:
        num_pairs, temperature, class_map = segment.num_pairs, self.temperature, self.student_map
        teacher_continuing, teacher_inside, weights = self._truncated_teacher(top, segment)
        paths, mask = self._paths(teacher_continuing, segment, top.is_finite)
        known = known_classes(top.slice(0, num_pairs), self.teacher_map, temperature, paths)
        student_logits = self._continuation_logits(
            student, num_pairs, segment.teacher_continuations, segment.student_continuations
        )
        # The student's logits of the known classes: those of one token by its index, the few others for all positions.
        classes = known.classes.clamp_max(len(class_map.representatives) - 1)
        multi_index = class_map.multi_index[classes]
        indices = class_map.representatives[classes] * student.stride(0) + known.positions
        single_token = flat_view(student).index_select(0, indices).div_(temperature)
        multi_token, shares = class_map.multi_token_logits(student[:, :num_pairs], temperature)
        multi_token.div_(temperature)
        numbers = torch.arange(num_pairs, device=student.device)
        member_indices = (class_map.members[:, None] * student.stride(0) + numbers).view(-1)
        with self._only_tail(student, known, multi_index, indices, member_indices, num_pairs) as tail_tile:
            tail = logsumexp_per_position(tail_tile, temperature)
            leaves = [student_logits.inside, student_logits.entries, single_token, multi_token, tail]
            if needs_grad:
                for leaf in leaves:
                    leaf.requires_grad_()
            with torch.enable_grad():
                student_continuing = continuing_log_probs(student_logits.entries, segment.student_continuations)
                continuing, starting = (student_continuing, teacher_continuing), (student_logits.inside, teacher_inside)
                *inside, infinite, unshared = self._inside_loss(continuing, starting, segment, top.is_finite, weights)
                multi_logits = torch.cat([multi_token, multi_token.new_zeros(1, num_pairs)])[
                    multi_index, known.positions
                ]
                logits = torch.where(multi_index < 0, single_token, multi_logits).where(known.is_known, MASKED_LOGIT)
                positions = torch.cat([known.positions, numbers])
                log_p, log_t = torch.cat([logits, tail]), torch.cat([known.log_probs, known.tail])
                groups = GroupSums(positions, num_pairs)
                log_p, log_t, shared = renormalise(log_p, log_t, groups)
                is_infinite = groups.any(self.divergence.infinite_classes(log_p, log_t)) & mask & shared
                keep = (mask & shared & ~is_infinite) * top.weights[:num_pairs]
                boundary = self.divergence(log_p, log_t, keep[positions])
                infinite, unshared = infinite + is_infinite.sum(), unshared + (mask & ~shared).sum()
                loss, unclamped = (temperature**2 * (a + b) for a, b in zip(inside, boundary, strict=True))
            dropped = self._num_dropped(segment, top.is_finite) + infinite
            if not needs_grad:
                return TileLoss(loss, unclamped, dropped, infinite, unshared)
            # T^2 is in the loss already; 1/T from the chain rule through z/T.
            grads = [grad.div_(temperature) for grad in _grads([loss], leaves)]
            tail_grad = logsumexp_backward(tail_tile, temperature * tail.detach(), grads[4], temperature)
        member_grad = grads[3].index_select(0, class_map.member_groups).mul_(shares).view(-1)
        sparse = SparseGrad(
            torch.cat([student_logits.indices, indices, member_indices]), torch.cat([grads[1], grads[2], member_grad])
        )
        grad = TileGrad(((0, tail_grad), (num_pairs, grads[0])), sparse)
        return TileLoss(loss.detach(), unclamped.detach(), dropped, infinite, unshared, grad)

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
        saved_entries, saved_excluded = flat.index_select(0, indices), pairs.index_select(0, excluded)
        # amin, because an index may repeat, one of them for an empty entry.
        flat.scatter_reduce_(0, indices, torch.where(is_known, MASKED_LOGIT, torch.inf), "amin")
        pairs.index_fill_(0, excluded, MASKED_LOGIT)
        yield pairs
        pairs.index_copy_(0, excluded, saved_excluded)
        flat.index_copy_(0, indices, saved_entries)

    # A truncated teacher whose tokenizer is the finer

    def differentiable_loss(self, student: Tensor, teacher: TeacherTile, context: Segment) -> TileLoss:
        segment, num_pairs, top = context, context.num_pairs, self._top_k(teacher)
        teacher_continuing, teacher_inside, weights = self._truncated_teacher(top, segment)
        count, continuations = segment.teacher_continuations.num_inside, segment.student_continuations
        student_logits = gather_logits(student, self.student_map, num_pairs, count, continuations, self.temperature)
        continuing = continuing_log_probs(student_logits.entries, continuations), teacher_continuing
        starting = student_logits.inside, teacher_inside
        *inside, infinite, unshared = self._inside_loss(continuing, starting, segment, top.is_finite, weights)
        paths, mask = self._paths(continuing[STUDENT], segment, top.is_finite)
        log_p = add_continuation_paths(student_logits.boundary.log_softmax(0), paths)
        known = known_classes(top.slice(0, num_pairs), self.teacher_map, self.temperature)
        log_t = torch.full((len(log_p) + 1, num_pairs), MASKED_LOGIT, device=log_p.device)
        log_t[known.classes, known.positions] = known.log_probs
        log_t[-1] = known.tail
        is_known = log_t[:-1] > MASKED_BELOW
        tail = log_p.masked_fill(is_known, MASKED_LOGIT).logsumexp(0)
        log_p = torch.cat([log_p.where(is_known, MASKED_LOGIT), tail[None]])
        log_p, log_t, shared = renormalise(log_p, log_t)
        is_infinite = self.divergence.infinite_classes(log_p, log_t).any(0) & mask & shared
        boundary = self.divergence(log_p, log_t, (mask & shared & ~is_infinite) * top.weights[:num_pairs])
        loss, unclamped = (self.temperature**2 * (a + b) for a, b in zip(inside, boundary, strict=True))
        infinite, unshared = infinite + is_infinite.sum(), unshared + (mask & ~shared).sum()
        dropped = self._num_dropped(segment, top.is_finite) + infinite
        return TileLoss(loss, unclamped, dropped, infinite, unshared)

    # The steps that they share

    def _continuation_logits(
        self, tile: Tensor, num_pairs: int, starting: Continuations, continuing: Continuations
    ) -> _ContinuationLogits:
        continuation, token, _ = continuing.continuing_entries
        indices = token * tile.stride(0) + continuing.continuing_positions[continuation]
        inside = tile[:, num_pairs : num_pairs + starting.num_inside]
        entries = flat_view(tile).index_select(0, indices)
        return _ContinuationLogits(inside.div(self.temperature).contiguous(), entries.div_(self.temperature), indices)

    def _before_logits(self, tile: Tensor, continuations: Continuations) -> _TileBefore | None:
        before = continuations.before
        if before is None or not len(before.continuations):
            return None
        index, token, _ = before.entries
        entries = token * tile.stride(0) + before.positions[index]
        tokens = before.tokens * tile.stride(0) + before.positions
        indices, columns = torch.cat([entries, tokens]), continuations.continuing_positions[before.continuations]
        logits = flat_view(tile).index_select(0, indices).div_(self.temperature)
        after_end = tile.index_select(1, columns)
        normalisers = logsumexp_per_position(after_end, self.temperature)
        parts = logits.split([len(entries), len(tokens)])
        return _TileBefore(BeforeLogits(parts[0].clone(), parts[1].clone(), normalisers), indices, columns, after_end)

    def _truncated_teacher(self, top: TopKLogits, segment: Segment) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The teacher's top k at boundaries inside a token.

        Returns: log-probabilities of its own continuations, float32 [O]; its logits inside the student's tokens, the
        tail last, float32 [V_t + 1, K_1]; `weights` of `_inside_loss`
        """
        continuations, num_pairs = segment.teacher_continuations, segment.num_pairs
        entries, mask = known_entries(top, continuations, self.teacher_vocab_size, self.temperature)
        inside = top.slice(num_pairs, num_pairs + segment.student_continuations.num_inside)
        logits = dense_with_tail(inside, self.teacher_vocab_size, self.temperature)
        before = known_before(top, continuations, self.teacher_vocab_size, self.temperature)
        weights = mask[: continuations.num_inside], inside.weights
        return continuing_log_probs(entries, continuations, before), logits, weights

    def _paths(self, log_probs: Tensor, segment: Segment, is_finite: Tensor) -> tuple[ContinuationPaths, Tensor]:
        """The coarser side's continuations at common boundaries, and a mask of the boundaries: bool [num_pairs].

        log_probs: float32 [O], of the coarser side's continuations
        """
        teacher_is_coarser = self.coarser_side == TEACHER
        continuations = segment.teacher_continuations if teacher_is_coarser else segment.student_continuations
        mask = is_finite[: segment.num_pairs]
        if teacher_is_coarser:
            # The probability that the last token ended comes from that token's position.
            is_last_finite = torch.cat([is_finite[continuations.continuing_positions], is_finite.new_ones(1)])
            mask = mask & is_last_finite[segment.token_end]
        end_log_probs = log_probs[continuations.end_classes]
        return ContinuationPaths(log_probs, end_log_probs, segment.token_end, segment.continuation_paths), mask

    def _num_dropped(self, segment: Segment, is_finite: Tensor) -> Tensor:
        """Teacher positions that are not finite, counted once per comparison, as `num_positions` counts all."""
        continuing = segment.teacher_continuations.continuing_positions[: segment.teacher_continuations.num_inside]
        inside = torch.cat([continuing, segment.student_continuations.starting_positions])
        return (~is_finite[: segment.num_pairs]).sum() + (~is_finite[inside]).sum()

    def _inside_loss(
        self,
        continuing: Sequence[Tensor],
        starting: tuple[Tensor, Tensor],
        segment: Segment,
        is_finite: Tensor,
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> Sums:
        """The divergence where one side starts a token inside a token of the other; student first in all pairs.

        continuing: float32 [O], log-probabilities of each side's continuations
        starting: float32 [V, K_1], logits of each side inside the other's tokens
        weights: of a truncated teacher: which continuations inside its tokens enough is known of, bool; and the
        `TopKLogits.weights` inside the student's, float32
        """
        continuations = segment.teacher_continuations
        mask, before = is_finite[continuations.continuing_positions[: continuations.num_inside]], continuations.before
        if before is not None:
            mask = mask.index_copy(0, before.continuations, mask[before.continuations] & is_finite[before.positions])
        student = starting_log_probs(starting[STUDENT], continuations, self.divergence.needs_teacher_support)
        coarse = continuing[TEACHER][: continuations.num_inside_classes]
        in_teacher = self._continuation_loss(student, coarse, continuations, mask, weights[0] if weights else mask)
        continuations = segment.student_continuations
        teacher = starting_log_probs(starting[TEACHER], continuations, masks_impossible_end=True)
        mask = is_finite[continuations.starting_positions]
        coarse = continuing[STUDENT][: continuations.num_inside_classes]
        in_student = self._continuation_loss(coarse, teacher, continuations, mask, weights[1] if weights else mask)
        loss, unclamped, infinite, unshared = (a + b for a, b in zip(in_teacher, in_student, strict=True))
        return loss, unclamped, infinite, unshared

    def _continuation_loss(
        self, student: Tensor, teacher: Tensor, continuations: Continuations, is_finite: Tensor, weights: Tensor
    ) -> Sums:
        continuation_of = continuations.class_continuations[: continuations.num_inside_classes]
        groups = GroupSums(continuation_of, continuations.num_inside)
        mask = is_finite & (weights > 0)
        if self.top_k:
            if self.divergence.needs_teacher_support:  # a class outside the top k has probability 0
                student = on_support(student, teacher)
            student, teacher, shared = renormalise(student, teacher, groups)
            mask = mask & shared
        is_infinite = groups.any(self.divergence.infinite_classes(student, teacher)) & mask
        sums = self.divergence(student, teacher, ((mask & ~is_infinite) * weights)[continuation_of])
        return *sums, is_infinite.sum(), (is_finite & ~mask).sum()


def _grads(outputs: list[Tensor], leaves: list[Tensor], output_grads: list[Tensor] | None = None) -> list[Tensor]:
    """The gradients of the leaves; zeros for one that no output depends on."""
    grads = torch.autograd.grad(outputs, leaves, output_grads, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]

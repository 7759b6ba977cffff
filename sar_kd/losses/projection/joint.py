"""The divergence at common boundaries, with every path by which the coarser tokenizer reaches a shared class.

At a common boundary the coarser side reaches class c by two paths: its last token ends there and the next one begins
with c, or its last token continues with c. Both probabilities add up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import STUDENT
from sar_kd.losses.divergence import Divergence, GradTarget, log_softmax_backward_
from sar_kd.models.logit_tiles import LogProbs


class ContinuationPaths(NamedTuple):
    """The coarser side's continuations at K common boundaries: R continuations with O classes, X ways to continue."""

    log_probs: Tensor
    """float32 [O], of all classes of the continuations"""
    end_log_probs: Tensor
    """float32 [R]: that the token of each continuation ends"""
    token_end: Tensor
    """int64 [K]: the continuation whose token ended at each boundary, -1 for none"""
    indices: Tensor
    """int64 [3, X]: boundary, shared class, class of its continuation; each boundary and shared class once"""

    def detach(self) -> ContinuationPaths:
        """The same without a graph."""
        return self._replace(log_probs=self.log_probs.detach(), end_log_probs=self.end_log_probs.detach())

    @property
    def token_end_log_probs(self) -> Tensor:
        """float32 [K]: log-probability that the token ended at each boundary; 0 where there was none."""
        return torch.cat([self.end_log_probs, self.end_log_probs.new_zeros(1)])[self.token_end]


def add_continuation_paths(after_end: Tensor, paths: ContinuationPaths) -> Tensor:
    """Joint log-probabilities of the shared classes for the coarser side.

    y[c, k] = log(exp(end[token_end[k]] + after_end[c, k]) + exp(log_probs[j])) for each (k, c, j) of `paths.indices`

    after_end: float32 [C, K], given that the last token ended
    Returns: float32 [C, K]
    """
    boundaries, classes, continuation_classes = paths.indices
    total = after_end + paths.token_end_log_probs
    joint = torch.logaddexp(total[classes, boundaries], paths.log_probs[continuation_classes])
    return total.index_put((classes, boundaries), joint)


class BoundaryLoss(NamedTuple):
    """The divergence at each of K common boundaries, nats, and its gradient."""

    loss: Tensor
    """float32 [K]"""
    unclamped: Tensor
    """float32 [K]: without a floor"""
    is_infinite: Tensor
    """bool [K]: see `PositionSums`; these have no gradient"""
    grad: Tensor | None = None
    """float32 [V, K]: d loss / d logits of the side with a gradient"""
    path_grad: tuple[Tensor, Tensor] | None = None
    """float32 [O] and [R]: d loss / d `log_probs` and `end_log_probs` of the paths, where that side is the coarser"""


def boundary_divergence(
    divergence: Divergence,
    sides: tuple[LogProbs, LogProbs],
    paths: ContinuationPaths,
    coarser: int,
    grad_side: int | None,
    mask: Tensor,
    weight: float = 1.0,
) -> BoundaryLoss:
    """The divergence over shared classes, after `add_continuation_paths` for the coarser side.

    Two passes over [V, K] instead of one each for log_softmax, `add_continuation_paths` and the divergence.
    Backward of the joint log-probability at each (k, c, j) of `paths.indices`:

    x = token_end_log_probs[k] + log p(c | the token ended)   the path by the token's end
    y = log(exp(x) + exp(log_probs[j]))                       both paths
    w = exp(x - y)                                            share of the first path
    dx = w * dy,  dlog_probs[j] += (1 - w) * dy

    sides: the student's and the teacher's log-probabilities, given that the last token ended. A class has the same
    index in both tiles, and `paths.indices` holds that index. The tile of the side without a gradient is overwritten
    coarser, grad_side: STUDENT or TEACHER
    mask: float32 [K], 1 where a boundary is compared, else 0: a factor of its gradients
    weight: a further factor of the gradients of the logits
    """
    boundaries, classes, continuation_classes = paths.indices
    coarser_probs = sides[coarser]._replace(shift=sides[coarser].shift + paths.token_end_log_probs)
    logits = coarser_probs.tile[classes, boundaries]
    by_end = coarser_probs.shift[boundaries] + coarser_probs.scale * (logits - coarser_probs.peak[boundaries])
    joint = torch.logaddexp(by_end, paths.log_probs.index_select(0, continuation_classes))
    # The few classes with a second path are stored as the logits that give their joint probability.
    joint_logits = (joint - coarser_probs.shift[boundaries]) / coarser_probs.scale + coarser_probs.peak[boundaries]
    coarser_probs.tile.index_put_((classes, boundaries), joint_logits)
    student, teacher = (coarser_probs, sides[1]) if coarser == STUDENT else (sides[0], coarser_probs)
    if grad_side is None:
        loss, unclamped, _, is_infinite = divergence.per_position(student, teacher)
        return BoundaryLoss(loss, unclamped, is_infinite)
    grad = sides[1 - grad_side].tile
    target = GradTarget(("student", "teacher")[grad_side], grad)
    loss, unclamped, grad_sum, is_infinite = divergence.per_position(student, teacher, target)
    assert grad_sum is not None, "not of_logits"
    path_grad, mask = None, mask * ~is_infinite
    if grad_side == coarser:
        coarser_probs.tile.index_put_((classes, boundaries), logits)
        joint_grad = grad[classes, boundaries]
        by_end_grad = (by_end - joint).exp_().mul_(joint_grad)
        grad.index_put_((classes, boundaries), by_end_grad)
        continuation_grad = joint_grad - by_end_grad
        grad_sum = grad_sum.index_add(0, boundaries, continuation_grad, alpha=-1.0)
        log_prob_grad = torch.zeros_like(paths.log_probs)
        log_prob_grad.index_add_(0, continuation_classes, continuation_grad * mask[boundaries])
        num_ends = len(paths.end_log_probs)
        end_grad = paths.end_log_probs.new_zeros(num_ends + 1)
        end_grad.index_add_(0, paths.token_end.where(paths.token_end >= 0, num_ends), grad_sum * mask)
        path_grad = log_prob_grad, end_grad[:-1]
    log_softmax_backward_(grad, grad_sum, sides[grad_side], mask > 0, weight)
    return BoundaryLoss(loss, unclamped, is_infinite, grad, path_grad)

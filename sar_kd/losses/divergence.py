"""Divergences between two distributions over the same outcomes: values, and gradients written out."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.models.logit_tiles import Logs, blocks_of, exp, exp_


class Terms(NamedTuple):
    """A divergence as sum over outcomes of weight * (log a - log b), one or two of them."""

    weights: tuple[Tensor, ...]
    pairs: tuple[tuple[Tensor, Tensor], ...]

    def sums(self, floor: float, dim: int | None = None) -> tuple[Tensor, Tensor]:
        """With log-probabilities that count for `floor` at least, and without: sums over `dim`, over all if None."""
        terms = list(zip(self.weights, self.pairs, strict=True))
        raw = _added((a - b).mul_(weight).sum(dim) for weight, (a, b) in terms)
        if floor == -math.inf:
            return raw, raw
        floored = ((a.clamp_min(floor).sub_(b.clamp_min(floor)), weight) for weight, (a, b) in terms)
        return _added(difference.mul_(weight).sum(dim) for difference, weight in floored), raw


def _added(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, parts)


@dataclass(frozen=True)
class Divergence:
    """How far the student's distribution p is from the teacher's t.

    forward  sum t * (log t - log p)                                     KL(teacher || student)
    reverse  sum p * (log p - log t)                                     KL(student || teacher)
    jsd      beta * sum t * (log t - log m) + (1 - beta) * sum p * (log p - log m),   m = beta * t + (1 - beta) * p

    Log-probabilities below `floor` count for it in the value; the gradient is that of the value without a floor.

    Source: Agarwal et al., 2024 (arXiv 2306.13649), section 2, for the generalised JSD
    """

    direction: str = "forward"
    beta: float = 0.5
    floor: float = -math.inf

    def __call__(self, student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum over outcomes, rows and all; with a gradient for each side that has one.

        student, teacher: float32, log-probabilities of the same outcomes, of one shape
        keep: bool, broadcast to that shape; the outcomes that count, all if None
        Returns: the sum with the floor, and the same without it or a gradient; fp32 scalars, nats
        """
        return _Divergence.apply(student, teacher, keep, self)

    def terms(self, log_p: Tensor, log_t: Tensor, keep: Tensor | None = None) -> Terms:
        """What the value is made of."""

        def weight(log_probs: Tensor) -> Tensor:
            return exp(log_probs) if keep is None else exp(log_probs).mul_(keep)

        if self.direction == "forward":
            return Terms((weight(log_t),), ((log_t, log_p),))
        if self.direction == "reverse":
            return Terms((weight(log_p),), ((log_p, log_t),))
        log_m = torch.logaddexp(log_t + math.log(self.beta), log_p + math.log1p(-self.beta))
        weights = weight(log_t).mul_(self.beta), weight(log_p).mul_(1 - self.beta)
        return Terms(weights, ((log_t, log_m), (log_p, log_m)))

    def slopes(self, terms: Terms, side: str) -> Tensor:
        """d value / d log-probabilities of a side, each of them taken as free.

                 'student'                             'teacher'
        forward  -t                                    t * (log t - log p + 1)
        reverse  p * (log p - log t + 1)               -p
        jsd      (1 - beta) * p * (log p - log m)      beta * t * (log t - log m)
        """
        which = -1 if side == "student" else 0
        weight, (log_a, log_b) = terms.weights[which], terms.pairs[which]
        if self.total_slope(side) is not None:
            return -weight
        return (log_a - log_b).add_(0.0 if self.direction == "jsd" else 1.0).mul_(weight)

    def total_slope(self, side: str) -> float | None:
        """What the `slopes` of a row add up to, where that is known beforehand."""
        return -1.0 if (self.direction, side) in (("forward", "student"), ("reverse", "teacher")) else None


class _Divergence(torch.autograd.Function):
    """What makes the log-probabilities distributions differentiates itself. Written out because autograd would keep
    several tensors of this size where one for each side that learns suffices.
    """

    @staticmethod
    def forward(ctx, log_p: Tensor, log_t: Tensor, keep: Tensor | None, kind: Divergence):
        terms = kind.terms(log_p, log_t, keep)
        student, teacher, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            kind.slopes(terms, "student") if student else None, kind.slopes(terms, "teacher") if teacher else None
        )
        value, raw = terms.sums(kind.floor)
        value = value.clone() if value is raw else value
        ctx.mark_non_differentiable(raw)
        return value, raw

    @staticmethod
    def backward(ctx, grad_loss: Tensor, grad_raw: Tensor):
        log_p, log_t = (None if slope is None else slope * grad_loss for slope in ctx.saved_tensors)
        return log_p, log_t, None, None


class Learner(NamedTuple):
    """The side that learns, and the place for its slopes."""

    side: str
    """'student' or 'teacher'"""
    slopes: Tensor
    """float32 [V, n]; may be the other side's tile"""


def diverge(
    divergence: Divergence, student: Logs, teacher: Logs, learner: Learner | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of each column; fills the learner's slopes with those of its log-probabilities, each taken as
    free.

    Returns: with the floor and as it is, float32 [n], nats; and the sum of each column's slopes, float32 [n]
    """
    loss = raw = total = torch.zeros_like(teacher.tile[0])
    known = None if learner is None else divergence.total_slope(learner.side)
    for block in blocks_of(teacher.tile):
        terms = divergence.terms(student.at(block), teacher.at(block))
        sums = terms.sums(divergence.floor, dim=0)
        loss, raw = loss + sums[0], raw + sums[1]
        if learner is not None:
            free = divergence.slopes(terms, learner.side)
            total = total + free.sum(0) if known is None else total
            learner.slopes[block] = free
    return loss, raw, total if known is None else total + known


def through_softmax_(slopes: Tensor, total: Tensor, logs: Logs, factor: Tensor) -> Tensor:
    """From slopes of free log-probabilities to those of the logits that they are the softmax of, times a factor:

    dz[u, n] = factor[n] * (g[u, n] - p[u, n] * sum_v g[v, n])

    total: sum_v g[v, n], float32 [n]
    """
    for block in blocks_of(slopes):
        probs = exp_(logs.at(block)).mul_(total)
        torch.mul(slopes[block].sub_(probs), factor, out=slopes[block])
    return slopes


def softmax_slopes(tile: Tensor, total: Tensor, slope: Tensor, temperature: float) -> Tensor:
    """From slopes of y = T * log sum_v exp(z[v] / T) to those of the logits: slope * exp((z - y) / T), float32 [V, n].

    total, slope: y and its slopes, float32 [n]
    """
    slopes = torch.empty_like(tile)
    for block in blocks_of(tile):
        exp_(torch.sub(tile[block], total, out=slopes[block]).div_(temperature)).mul_(slope)
    return slopes

"""Divergences between two distributions over the same classes, with their gradients written out.

A `Divergence` is a differentiable function of dense log-probabilities, and is formed block by block on logit tiles.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.models.logit_tiles import (
    SMALLEST_PROBABILITY,
    LogProbs,
    exp_,
    mask_positions_,
    probabilities,
    vocab_blocks,
)
from sar_kd.runtime.precision import MASKED_BELOW

_INFINITE = 1e9
"""A sum above it holds the product of a probability of `SMALLEST_PROBABILITY` or more and a masked logit."""


class WeightedLogRatios(NamedTuple):
    """A divergence as a sum over classes of weight * (log a - log b); one such term, or two."""

    weights: tuple[Tensor, ...]
    pairs: tuple[tuple[Tensor, Tensor], ...]
    """(log a, log b) of each term"""

    def sums(self, floor: float, dim: int | None = None) -> tuple[Tensor, Tensor]:
        """The sum over `dim`, or over all: with log-probabilities clamped to at least `floor`, and unclamped."""
        terms = list(zip(self.weights, self.pairs, strict=True))
        unclamped = _sum((a - b).mul_(weight).sum(dim) for weight, (a, b) in terms)
        if floor == -math.inf:
            return unclamped, unclamped
        clamped = ((a.clamp_min(floor).sub_(b.clamp_min(floor)), weight) for weight, (a, b) in terms)
        return _sum(log_ratio.mul_(weight).sum(dim) for log_ratio, weight in clamped), unclamped


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, parts)


class GradTarget(NamedTuple):
    """Which side gets a gradient, and the buffer for it."""

    side: str
    """'student' or 'teacher'"""
    grad: Tensor
    """float32 [V, n]; may be the other side's tile, which is then overwritten"""
    of_logits: bool = False
    """Write the gradient of the logits, where `Divergence.grad_sum` is known, instead of the log-probabilities'"""


class PositionSums(NamedTuple):
    """The divergence at each position of two tiles, float32 [n], nats."""

    loss: Tensor
    """With the floor"""
    unclamped: Tensor
    grad_sum: Tensor | None
    """The sum of the gradient over the classes; None where it is the gradient of the logits already"""
    is_infinite: Tensor
    """bool [n]: infinite by definition, to be left out with its gradient, and counted"""


@dataclass(frozen=True)
class Divergence:
    """How far the student's distribution p is from the teacher's t.

    forward  sum t * (log t - log p)                                     KL(teacher || student)
    reverse  sum p * (log p - log t)                                     KL(student || teacher)
    jsd      beta * sum t * (log t - log m) + (1 - beta) * sum p * (log p - log m),   m = beta * t + (1 - beta) * p

    0 * log 0 is 0. A class that p alone masks (forward), or t alone (reverse), makes the divergence infinite: the sum
    is then above 1e9, and the caller leaves the position out.

    The value takes log-probabilities below `floor` as `floor`; the gradient is that of the unclamped value. A new
    direction needs a branch in the methods of this class, and an entry in the choices of `--kd_direction`.

    Source: Agarwal et al., 2024 (arXiv 2306.13649), section 2, for the generalised JSD
    """

    direction: str = "forward"
    beta: float = 0.5
    floor: float = -math.inf

    @property
    def needs_teacher_support(self) -> bool:
        """Infinite where only the teacher's probability is 0, so classes outside its support must be left out."""
        return self.direction == "reverse"

    def __call__(self, student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum over all classes and positions, differentiable in both arguments.

        student, teacher: float32 log-probabilities of the same classes, of one shape
        keep: bool or float32, broadcast to that shape: the entries that count, or a factor of each; all if None
        Returns: the sum with the floor; the sum without it, which has no gradient; fp32 scalars, nats
        """
        return _Divergence.apply(student, teacher, keep, self)

    def terms(self, log_p: Tensor, log_t: Tensor, keep: Tensor | None = None) -> WeightedLogRatios:
        """The value's terms, for log-probabilities of one shape."""

        def weight(log_probs: Tensor) -> Tensor:
            return probabilities(log_probs) if keep is None else probabilities(log_probs).mul_(keep)

        if self.direction == "forward":
            return WeightedLogRatios((weight(log_t),), ((log_t, log_p),))
        if self.direction == "reverse":
            return WeightedLogRatios((weight(log_p),), ((log_p, log_t),))
        log_m = torch.logaddexp(log_t + math.log(self.beta), log_p + math.log1p(-self.beta))
        weights = weight(log_t).mul_(self.beta), weight(log_p).mul_(1 - self.beta)
        return WeightedLogRatios(weights, ((log_t, log_m), (log_p, log_m)))

    def grad(self, terms: WeightedLogRatios, side: str) -> Tensor:
        """d value / d log-probabilities of one side, taken as independent variables (before the softmax's constraint).

                 'student'                             'teacher'
        forward  -t                                    t * (log t - log p + 1)
        reverse  p * (log p - log t + 1)               -p
        jsd      (1 - beta) * p * (log p - log m)      beta * t * (log t - log m)
        """
        i = -1 if side == "student" else 0
        weight, (log_a, log_b) = terms.weights[i], terms.pairs[i]
        if self.grad_sum(side) is not None:
            return -weight
        return (log_a - log_b).add_(0.0 if self.direction == "jsd" else 1.0).mul_(weight)

    def grad_sum(self, side: str) -> float | None:
        """The sum of `grad` over the classes of one position, where it is a constant."""
        return -1.0 if (self.direction, side) in (("forward", "student"), ("reverse", "teacher")) else None

    def infinite_classes(self, student: Tensor, teacher: Tensor) -> Tensor:
        """bool: the classes that make the divergence infinite. student, teacher: log-probabilities of one shape"""
        if self.direction == "jsd":
            return torch.zeros_like(student, dtype=torch.bool)
        first, second = (teacher, student) if self.direction == "forward" else (student, teacher)
        return (first > math.log(SMALLEST_PROBABILITY)) & (second < MASKED_BELOW)

    def per_position(self, student: LogProbs, teacher: LogProbs, target: GradTarget | None = None) -> PositionSums:
        """The divergence at each position of two tiles; writes the `grad` of the target's side into its buffer.

        A position at which one side masks every class has no divergence; it counts as infinite.
        """
        loss = unclamped = grad_sum = torch.zeros_like(teacher.tile[0])
        constant = None if target is None else self.grad_sum(target.side)
        of_logits = target is not None and target.of_logits and constant is not None
        for block in vocab_blocks(teacher.tile):
            log_p, log_t = student.block(block), teacher.block(block)
            terms = self.terms(log_p, log_t)
            sums = terms.sums(self.floor, dim=0)
            loss, unclamped = loss + sums[0], unclamped + sums[1]
            if target is not None:
                grad = self.grad(terms, target.side)
                grad_sum = grad_sum + grad.sum(0) if constant is None else grad_sum
                if of_logits:
                    grad.sub_(exp_(log_p if target.side == "student" else log_t), alpha=constant)
                target.grad[block] = grad
        is_infinite = (unclamped > _INFINITE) | (torch.minimum(student.peak, teacher.peak) < MASKED_BELOW)
        grad_sum = grad_sum if constant is None else grad_sum + constant
        return PositionSums(loss, unclamped, None if of_logits else grad_sum, is_infinite)


class _Divergence(torch.autograd.Function):
    """Autograd would save several tensors of this size where one for each side with a gradient is enough."""

    @staticmethod
    def forward(ctx, log_p: Tensor, log_t: Tensor, keep: Tensor | None, divergence: Divergence):
        terms = divergence.terms(log_p, log_t, keep)
        student, teacher, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            divergence.grad(terms, "student") if student else None,
            divergence.grad(terms, "teacher") if teacher else None,
        )
        value, unclamped = terms.sums(divergence.floor)
        value = value.clone() if value is unclamped else value
        ctx.mark_non_differentiable(unclamped)
        return value, unclamped

    @staticmethod
    def backward(ctx, grad_value: Tensor, grad_unclamped: Tensor):
        grad_p, grad_t = (None if grad is None else grad * grad_value for grad in ctx.saved_tensors)
        return grad_p, grad_t, None, None


def log_softmax_backward_(
    grad: Tensor, grad_sum: Tensor | None, log_probs: LogProbs, keep: Tensor, factor: Tensor | float
) -> Tensor:
    """Backward of log_softmax, in place, times a factor, at the positions of `keep`, bool [n]; 0 elsewhere:

    dz[u, n] = factor[n] * (g[u, n] - p[u, n] * sum_v g[v, n])

    grad: g, the gradient of the log-probabilities, float32 [V, n]
    grad_sum: sum_v g[v, n], float32 [n]; None: `grad` is that of the logits already
    """
    for block in vocab_blocks(grad):
        if grad_sum is not None:
            grad[block].sub_(exp_(log_probs.block(block)).mul_(grad_sum))
        mask_positions_(grad[block].mul_(factor), keep)
    return grad


def logsumexp_backward(tile: Tensor, logsumexp: Tensor, grad: Tensor, temperature: float) -> Tensor:
    """Backward of y = T * log sum_v exp(z[v] / T): dz = dy * exp((z - y) / T), float32 [V, n].

    logsumexp, grad: y and dy, float32 [n]
    """
    grad_logits = torch.empty_like(tile)
    for block in vocab_blocks(tile):
        exp_(torch.sub(tile[block], logsumexp, out=grad_logits[block]).div_(temperature)).mul_(grad)
    return grad_logits

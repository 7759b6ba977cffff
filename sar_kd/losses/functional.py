"""Clamps of logits and losses, sums by group, chunk likelihood, and the distances of the baselines.

Every loss takes positions already selected, computes in float32 and returns a sum in nats; the step divides once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sar_kd.runtime.precision import MASKED_LOGIT


@dataclass(frozen=True)
class SummedTerms:
    """Loss terms that add up over micro-batches: fields are sums over target tokens, fp32 scalars on the device."""

    @classmethod
    def zero(cls, device: torch.device):
        return cls(*(torch.zeros((), device=device) for _ in dataclasses.fields(cls)))

    def __add__(self, other):
        """The sum, without a graph."""
        return type(self)(*(a.detach() + b.detach() for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> list[Tensor]:
        return [getattr(self, item.name) for item in dataclasses.fields(self)]


@dataclass(frozen=True)
class LogitClamp:
    """Bounds the logits to [-bound, bound] in the training loss.

    style 'normalized': logits are defined up to a constant; choose it such that logsumexp(z) = bound. Then
          z - lse(z) + bound <= bound holds by itself, and the clamp is a floor at -bound, that is
          log p >= -2 * bound. The floor is straight-through: nothing is renormalised after it, so the gradient is that
          of the unclamped loss.
    style 'raw': clamp(z, -bound, bound) to the letter; no gradient outside.
    style 'off': z.
    """

    style: str = "off"
    bound: float = math.inf

    @property
    def raw_bound(self) -> float:
        """The bound of the logits themselves: `bound` for style 'raw', else infinity."""
        return self.bound if self.style == "raw" else math.inf

    def floor_log_probs(self, log_probs: Tensor) -> Tensor:
        """The floor of style 'normalized'."""
        return _FloorStraightThrough.apply(log_probs, -2.0 * self.bound) if self.style == "normalized" else log_probs


class _FloorStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, floor: float) -> Tensor:
        return values.clamp_min(floor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


@dataclass(frozen=True)
class LossClamp:
    """Bounds a mean loss to at most `limit`.

    style 'scale': L * min(1, limit / L) with a constant factor: the value is at most the limit, the gradient keeps its
          direction.
    style 'hard': min(L, limit) to the letter; zero gradient above the limit.
    style 'off': L.
    """

    style: str = "off"
    limit: float = math.inf

    def __call__(self, loss: Tensor) -> Tensor:
        if self.style == "hard":
            return loss.clamp(max=self.limit)
        return loss if self.style == "off" else loss * self.grad_factor(loss.detach())

    def grad_factor(self, loss: Tensor) -> Tensor:
        """The factor of the gradient of a loss of this value."""
        above = 0.0 if self.style == "hard" else self.limit / loss
        return torch.ones_like(loss) if self.style == "off" else torch.where(loss > self.limit, above, 1.0)


def all_finite(values: Tensor) -> Tensor:
    """Which vectors are finite, in one pass and without a copy.

    values: float [N, D], |x| <= 6.6e4 so that the float32 sum of a vector cannot overflow
    Returns: bool [N]
    """
    return values.sum(-1, dtype=torch.float32).isfinite()


@dataclass(frozen=True)
class GroupSums:
    """Sums and logsumexps over groups of a flat array's elements."""

    index: Tensor
    """int64 [E]: the group of each element"""
    count: int
    """Number of groups"""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each group: float [count]."""
        return values.new_zeros(self.count).index_add_(0, self.index, values)

    def any(self, values: Tensor) -> Tensor:
        """Is one of a group's values, bool, true? bool [count]"""
        return self.sum(values.float()) > 0

    def logsumexp(self, values: Tensor) -> Tensor:
        """log sum exp of each group, shifted by its own maximum: float [count]; `MASKED_LOGIT` for an empty group."""
        peaks = values.detach().new_full((self.count,), MASKED_LOGIT)
        peaks = peaks.scatter_reduce_(0, self.index, values.detach(), "amax")
        totals = self.sum((values - peaks[self.index]).exp())
        return peaks + torch.where(totals > 0, totals, 1.0).log()


def chunk_likelihood(student: Tensor, teacher: Tensor, tau: float = 5.0) -> Tensor:
    """Sum over chunks of tau * KL between two Bernoulli distributions: the chunk comes next, or it does not.

    tau * sum_c e^a (a - b) + (1 - e^a) (log(1 - e^a) - log(1 - e^b)),   a = log p_t(c) / tau,   b = log p_s(c) / tau

    a and b are shifted by -1e-6, because log(1 - e^x) has no gradient at 0. The factor tau keeps the gradient's size.

    student, teacher: float32 [C], log-probability of each chunk, at most 0, nats
    Returns: fp32 scalar, at least 0
    Source: Minixhofer et al., 2025 (arXiv 2503.20083), section 3
    """
    a, b = teacher / tau - 1e-6, student / tau - 1e-6
    return tau * (a.exp() * (a - b) - torch.expm1(a) * (log1mexp(a) - log1mexp(b))).sum()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, elementwise, by whichever form is accurate."""
    near = x > -math.log(2.0)
    # Each branch gets a harmless argument where the other is taken: a gradient flows through both sides of a `where`.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def sorted_distance(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, keep: Tensor | None = None, top: int = 200
) -> Tensor:
    """Sum over positions of the L1 distance between the sorted probabilities, `top` of each, whatever their tokens.

    sum_k sum_i |sort(softmax(z_k / T))[i] - sort(softmax(y_k / T))[i]|

    student_logits: float [K, V_s]; teacher_logits: float [K, V_t]; keep: bool [K], positions that count, all if None
    Source: Boizard et al., 2024 (arXiv 2402.12030), equation 6; the tail below `top` is left out
    """
    top = min(top, student_logits.shape[1], teacher_logits.shape[1])
    student = (student_logits.float() / temperature).softmax(-1).topk(top).values
    teacher = (teacher_logits.float() / temperature).softmax(-1).topk(top).values
    return _masked_sum((student - teacher).abs().sum(-1), keep)


def state_distance(projected: Tensor, states: Tensor, keep: Tensor | None = None) -> Tensor:
    """Sum over positions of the mean squared error, relative to the teacher's mean square.

    sum_k mean_d (g[k, d] - h[k, d])^2 / mean_d h[k, d]^2

    projected: float [K, D_t], the student's hidden states after a learned projection; states: float [K, D_t], the
    teacher's; keep: bool [K], positions that count, all if None
    """
    states = states.float()
    scale = states.square().mean(-1).clamp_min(1e-6)
    return _masked_sum((projected.float() - states).square().mean(-1) / scale, keep)


def _masked_sum(values: Tensor, keep: Tensor | None) -> Tensor:
    return values.sum() if keep is None else (values * keep).sum()

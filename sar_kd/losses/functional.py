"""The mathematics: the one label shift, the clamps, chunk likelihood, and the baselines' distances.

Every loss takes the rows that count, already selected, computes in float32 and returns a sum in nats; the step
divides once. Gradients carry the loss scale wherever they are rounded to half.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sar_kd.data.batch import MASKED_LOGIT


@dataclass(frozen=True)
class Sums:
    """Sums over target tokens that add up over micro-batches: fp32 scalars on the device, one for each field."""

    @classmethod
    def zero(cls, device: torch.device):
        return cls(*(torch.zeros((), device=device) for _ in dataclasses.fields(cls)))

    def __add__(self, other):
        """The sum without its graph."""
        return type(self)(*(a.detach() + b.detach() for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> list[Tensor]:
        return [getattr(self, item.name) for item in dataclasses.fields(self)]


@dataclass(frozen=True)
class LogitClamp:
    """Logits count within [-bound, bound] in the training loss.

    style 'normalized': logits are defined up to a constant, so choose it such that logsumexp(z) = bound; then
          z - lse(z) + bound <= bound holds by itself and the clamp is a floor at -bound, that is
          log p >= -2 * bound. The floor passes its gradient straight through: nothing is renormalised after it,
          so the gradient is that of the loss without the clamp.
    style 'raw': clamp(z, -bound, bound) to the letter; no gradient outside.
    style 'off': z.
    """

    style: str = "off"
    bound: float = math.inf

    @property
    def raw_bound(self) -> float:
        """What holds the logits themselves, in 'raw'."""
        return self.bound if self.style == "raw" else math.inf

    def log_probs(self, log_probs: Tensor) -> Tensor:
        """What leaves the log-softmax."""
        return _FloorStraightThrough.apply(log_probs, -2.0 * self.bound) if self.style == "normalized" else log_probs


class _FloorStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, floor: float) -> Tensor:
        return values.clamp_min(floor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


NO_CLAMP = LogitClamp()


@dataclass(frozen=True)
class LossClamp:
    """A mean loss counts up to `limit`.

    style 'scale': L * min(1, limit / L), the factor held constant: the value is at most the limit and the
          gradient keeps its direction.
    style 'hard': min(L, limit) to the letter; zero gradient above the limit.
    style 'off': L.
    """

    style: str = "off"
    limit: float = math.inf

    def __call__(self, loss: Tensor) -> Tensor:
        if self.style == "hard":
            return loss.clamp(max=self.limit)
        return loss if self.style == "off" else loss * self.factor(loss.detach())

    def factor(self, loss: Tensor) -> Tensor:
        """What the gradient of a loss of this size is multiplied by."""
        above = 0.0 if self.style == "hard" else self.limit / loss
        return torch.ones_like(loss) if self.style == "off" else torch.where(loss > self.limit, above, 1.0)


def finite_rows(logits: Tensor) -> Tensor:
    """Which rows hold finite numbers only, in one pass and without a copy.

    logits: float [N, V], |z| <= 6.6e4 so that a row's float32 sum cannot overflow
    Returns: bool [N]
    """
    return logits.sum(-1, dtype=torch.float32).isfinite()


@dataclass(frozen=True)
class GroupSums:
    """Which of `count` segments each element of a flat array belongs to."""

    index: Tensor
    """int64 [E]"""
    count: int

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each segment: float [count]."""
        return values.new_zeros(self.count).index_add_(0, self.index, values)

    def logsumexp(self, values: Tensor) -> Tensor:
        """log sum exp of each segment, by its own maximum: float [count]; `MASKED_LOGIT` for one without elements."""
        peaks = values.detach().new_full((self.count,), MASKED_LOGIT)
        peaks = peaks.scatter_reduce_(0, self.index, values.detach(), "amax")
        totals = self.sum((values - peaks[self.index]).exp())
        return peaks + torch.where(totals > 0, totals, 1.0).log()


def chunk_likelihood(student: Tensor, teacher: Tensor, tau: float = 5.0) -> Tensor:
    """Sum over chunks of tau * KL between two coins: the chunk is what follows, or it is not.

    tau * sum_c e^a (a - b) + (1 - e^a) (log(1 - e^a) - log(1 - e^b)),   a = log p_t(c) / tau,   b = log p_s(c) / tau

    Both are shifted by -1e-6, because log(1 - e^x) has no gradient at 0. The factor tau keeps the gradient's size.

    student, teacher: float32 [C], log-probability of each chunk, at most 0, nats
    Returns: fp32 scalar, at least 0
    Source: Minixhofer et al., 2025 (arXiv 2503.20083), section 3
    """
    a, b = teacher / tau - 1e-6, student / tau - 1e-6
    return tau * (a.exp() * (a - b) - torch.expm1(a) * (log1mexp(a) - log1mexp(b))).sum()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, elementwise, by whichever form keeps its digits."""
    near = x > -math.log(2.0)
    # Each branch is given an argument that is harmless to it: a gradient flows through both sides of a `where`.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def sorted_distance(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, keep: Tensor | None = None, top: int = 200
) -> Tensor:
    """Sum over rows of the L1 distance between the `top` largest probabilities of both, whatever they are of.

    sum_k sum_i |sort(softmax(z_k / T))[i] - sort(softmax(y_k / T))[i]|

    student_logits: float [K, V_s]; teacher_logits: float [K, V_t]; keep: bool [K], the rows that count, all if None
    Source: Boizard et al., 2024 (arXiv 2402.12030), equation 6; the rest of the sorted tail is left out
    """
    top = min(top, student_logits.shape[1], teacher_logits.shape[1])
    student = (student_logits.float() / temperature).softmax(-1).topk(top).values
    teacher = (teacher_logits.float() / temperature).softmax(-1).topk(top).values
    return _sum_of((student - teacher).abs().sum(-1), keep)


def state_distance(projected: Tensor, states: Tensor, keep: Tensor | None = None) -> Tensor:
    """Sum over rows of the mean squared error, relative to the teacher's mean square.

    sum_k mean_d (g[k, d] - h[k, d])^2 / mean_d h[k, d]^2

    projected: float [K, D_t], the student's states after a learned projection; states: float [K, D_t], the teacher's
    keep: bool [K], the rows that count, all if None
    """
    states = states.float()
    scale = states.square().mean(-1).clamp_min(1e-6)
    return _sum_of((projected.float() - states).square().mean(-1) / scale, keep)


def _sum_of(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows.sum() if keep is None else (rows * keep).sum()

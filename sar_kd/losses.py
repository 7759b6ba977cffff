"""The mathematics: the one label shift, cross-entropy, forward KL, the projection of a teacher's rows, the clamps.

Every loss takes the rows that count, already selected, computes in float32 and returns a sum in nats; the step
divides once. Gradients are formed in backward, where the loss scale reaches them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position at which nothing is predicted."""


def next_token_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of flattened logits that predict something, and what they predict. The one label shift.

    row b * T + t predicts labels[b, t + 1]

    labels: int64 [B, T], unshifted, IGNORE_INDEX where nothing is predicted
    Returns: rows int64 [N], ascending; targets int64 [N]
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    targets = targets.flatten()
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return rows, targets[rows]


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

    def logits(self, logits: Tensor) -> Tensor:
        """What enters the softmax, in float32."""
        return logits.float().clamp(-self.bound, self.bound) if self.style == "raw" else logits.float()

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
        if self.style == "off":
            return loss
        value = loss.detach()
        return loss * torch.where(value > self.limit, self.limit / value, 1.0)


def finite_rows(logits: Tensor) -> Tensor:
    """Which rows hold finite numbers only, in one pass and without a copy.

    logits: float [N, V], |z| <= 6.6e4 so that a row's float32 sum cannot overflow
    Returns: bool [N]
    """
    return logits.sum(-1, dtype=torch.float32).isfinite()


def cross_entropy(logits: Tensor, targets: Tensor, clamp: LogitClamp = NO_CLAMP) -> tuple[Tensor, Tensor]:
    """Sum of -log p(target) over rows.

    sum_n -log softmax(z_n)[y_n]

    logits: float [N, V]; targets: int64 [N], in [0, V)
    Returns: the sum under `clamp`, and the same without the clamp or a gradient; fp32 scalars, nats
    """
    plain = _target_log_probs(logits.float(), targets)
    if clamp.style == "raw":
        return -_target_log_probs(clamp.logits(logits), targets).sum(), -plain.detach().sum()
    return -clamp.log_probs(plain).sum(), -plain.detach().sum()


def _target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def forward_kl(
    student_logits: Tensor, target_probs: Tensor, temperature: float = 1.0, clamp: LogitClamp = NO_CLAMP
) -> tuple[Tensor, Tensor]:
    """Sum of KL(teacher || student) over rows.

    T^2 * sum_n sum_v t[n, v] * (log t[n, v] - log softmax(z_n / T)[v])

    student_logits: float [N, V]
    target_probs: float32 [N, V], formed at the same T; rows sum to 1, or to 0 where the teacher's row was dropped
    Returns: the sum under `clamp`, and the same without its floor or a gradient; fp32 scalars, nats
    Source: Hinton, Vinyals and Dean, 2015 (arXiv 1503.02531), section 2, for T^2
    """
    floor = -2.0 * clamp.bound if clamp.style == "normalized" else -math.inf
    return _ForwardKL.apply(clamp.logits(student_logits), target_probs, temperature, floor)


class _ForwardKL(torch.autograd.Function):
    """Both values of `forward_kl`, and the gradient of the one without a floor (see `LogitClamp`):

    dL/dz[n, v] = T * (sum_u t[n, u] * softmax(z_n / T)[v] - t[n, v])

    Written out because autograd would keep four [N, V] tensors where two suffice.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target_probs: Tensor, temperature: float, floor: float):
        log_probs = (logits / temperature).log_softmax(-1)
        log_targets = target_probs.clamp_min(torch.finfo(torch.float32).tiny).log_()
        raw = (log_targets - log_probs).mul_(target_probs).sum() * temperature**2
        loss = raw.clone()
        if floor > -math.inf:
            floored = log_targets.clamp_min_(floor).sub_(log_probs.clamp_min(floor))
            loss = floored.mul_(target_probs).sum() * temperature**2
        ctx.save_for_backward(log_probs, target_probs)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(raw)
        return loss, raw

    @staticmethod
    def backward(ctx, grad_loss: Tensor, grad_raw: Tensor):
        log_probs, target_probs = ctx.saved_tensors
        grad = log_probs.exp().mul_(target_probs.sum(-1, keepdim=True)).sub_(target_probs)
        return grad.mul_(grad_loss * ctx.temperature), None, None, None


@dataclass(frozen=True)
class Projection:
    """How a batch's teacher rows are carried onto the student's vocabulary. K rows: K_0 open, then K - K_0 inside.

    An open row's student token starts where the teacher's does. At an inside row some bytes of the teacher's
    token are already emitted; only teacher tokens that extend them take part, and each has its own student token.
    """

    num_open: int
    columns: Tensor
    """int64 [M]: teacher ids that take part in open rows."""
    destinations: Tensor
    """int64 [M]: the student id that each of them gives its probability to."""
    inside_rows: Tensor
    """int64 [E], counted from the first inside row: one entry per (row, teacher token that extends it)."""
    inside_columns: Tensor
    """int64 [E]: the teacher id of each entry."""
    inside_destinations: Tensor
    """int64 [E]: the student id of each entry."""


@torch.no_grad()
def teacher_probs(
    teacher_logits: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    clamp: LogitClamp = NO_CLAMP,
    projection: Projection | None = None,
) -> tuple[Tensor, Tensor]:
    """The target distribution over the student's vocabulary, and how many rows had to be dropped.

    t[k, u] = sum over v with phi_k(v) = u of softmax(z_k / T restricted to row k's teacher tokens)[v]

    phi_k is the identity where the tokenizers are equal. A row that is not finite becomes all zeros, so that it
    adds nothing to the divergence.

    teacher_logits: float [K, V_t]; vocab_size: V of the result
    Returns: float32 [K, V], int64 scalar
    Source: byte-prefix marginalisation (arXiv 2607.22334), conditioned on the bytes already emitted
    """
    finite = finite_rows(teacher_logits)
    if projection is None:
        probs = (clamp.logits(teacher_logits[:, :vocab_size]) / temperature).softmax(-1)
    else:
        split = projection.num_open
        open_probs = _project_open(teacher_logits[:split], vocab_size, temperature, clamp, projection)
        inside_probs = _project_inside(teacher_logits[split:], vocab_size, temperature, clamp, projection)
        probs = torch.cat([open_probs, inside_probs])
    return probs.masked_fill_(~finite[:, None], 0.0), (~finite).sum()


def _project_open(logits, vocab_size, temperature, clamp, projection):
    probs = (clamp.logits(logits[:, projection.columns]) / temperature).softmax(-1)
    # Transposed, because adding whole rows is many times faster than adding scattered columns.
    by_token = probs.new_zeros(vocab_size, len(logits))
    return by_token.index_add_(0, projection.destinations, probs.T.contiguous()).T


def _project_inside(logits, vocab_size, temperature, clamp, projection):
    rows, num_rows = projection.inside_rows, len(logits)
    entries = clamp.logits(logits[rows, projection.inside_columns]) / temperature
    # A segment's softmax by its own maximum: the teacher may have given the emitted bytes a probability that
    # underflows in float32, and the quotient must not be 0 / 0.
    peaks = entries.new_full((num_rows,), -math.inf).scatter_reduce_(0, rows, entries, "amax")
    weights = (entries - peaks[rows]).exp()
    totals = weights.new_zeros(num_rows).index_add_(0, rows, weights)
    cells = rows * vocab_size + projection.inside_destinations
    flat = weights.new_zeros(num_rows * vocab_size)
    return flat.index_add_(0, cells, weights / totals[rows]).view(num_rows, vocab_size)

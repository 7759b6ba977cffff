"""Cross-entropy and distillation of both models' hidden states, value and gradient, one tile of logits at a time.

A chunked (fused linear) distillation loss, as in Liger Kernel, but for both models and any distillation method:

    total = ce_weight * CE(z_s, targets) + kd_weight * KD(z_s, z_t),   z_s = h_s W_s^T,   z_t = h_t W_t^T

Head products: four per tile, z_s, z_t, dh_s = dz^T W_s and dW_s += dz h_s, all in forward; backward only scales the two
gradients. With a loss clamp and several tiles z_s is computed twice, because the clamp's factor is that of the sum.
Memory: the logits of one tile of each model, within `--loss_workspace_mb` whatever B * T is, and float32 dh_s and dW_s.
Rounding: products take dz in half with the factor grad_scale = loss_scale / tokens, as in a backward of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sar_kd.alignment.segments import split_range
from sar_kd.data.batch import CachedTokenLogits, TopKLogits
from sar_kd.losses.functional import LogitClamp
from sar_kd.models.lm_head import Gradients, LazyLogits, PositionIndex
from sar_kd.models.logit_tiles import (
    exp_,
    finite_positions,
    flat_view,
    is_finite_peak,
    logsumexp_per_position,
    vocab_blocks,
)
from sar_kd.runtime.precision import MASKED_BELOW

TeacherLogits = LazyLogits | CachedTokenLogits
"""Where tiles of the teacher's logits, or of those that are kept, come from"""

TeacherTile = Tensor | TopKLogits
"""A tile of the teacher's logits, float32 [V_t, m], or its cached ones"""

Context = TypeVar("Context")
"""Data of a distillation method about the positions of a tile"""


@dataclass(frozen=True)
class Tile(Generic[Context]):
    """Positions of both models that are compared together."""

    student: PositionIndex
    """Positions of the student's logits"""
    teacher: PositionIndex
    """Positions of the teacher's; none without distillation"""
    ce_mask: Tensor | None
    """float32 [n]: 1 where this tile holds the position's cross-entropy, else 0; None for 1 everywhere"""
    context: Context


class SparseGrad(NamedTuple):
    """Gradients of single logits of a tile."""

    indices: Tensor
    """int64 [E], into `flat_view` of the tile; an index may occur several times"""
    values: Tensor
    """float32 [E]"""


class TileGrad(NamedTuple):
    """d loss / d logits of a tile [V, n]: the sum of all parts."""

    dense: tuple[tuple[int, Tensor], ...] = ()
    """The first position of each part, and float32 [V', k] for the first V' tokens of k positions"""
    sparse: SparseGrad | None = None
    columns: tuple[Tensor, Tensor] | None = None
    """int64 [k], positions, which may repeat; and float32 [V', k]: as a dense part, at positions in any order"""

    def add_to_(self, tile: Tensor, weight: Tensor, block: slice = slice(None)) -> None:
        """Add `weight` times the dense parts and the columns to a block of the vocabulary."""
        for first, grad in self.dense:
            part = grad[block]
            tile[block][: len(part), first : first + part.shape[1]].addcmul_(part, weight)
        if self.columns is not None:
            positions, grad = self.columns
            tile[block][: len(grad[block])].index_add_(1, positions, grad[block] * weight)

    def add_sparse_to_(self, tile: Tensor, weight: Tensor) -> None:
        """Add `weight` times the sparse part."""
        if self.sparse is not None:
            flat_view(tile).index_add_(0, self.sparse.indices, self.sparse.values * weight)


class TileLoss(NamedTuple):
    """The distillation loss of a tile: sums over its positions, nats."""

    loss: Tensor
    unclamped: Tensor
    """The loss without a floor and without the logit clamp"""
    dropped: Tensor
    """Teacher positions left out: their logits are not finite, or the divergence is infinite even with a raw clamp"""
    infinite: Tensor
    """Positions whose unclamped divergence is infinite, because only one of the models masks a token"""
    unshared: Tensor
    """Positions left out because too little of the teacher's distribution is in its top k or in shared tokens"""
    grad: TileGrad | None = None
    """d loss / d logits of `grad_side`, if there is one"""


@dataclass(frozen=True)
class TiledLossSpec(Generic[Context]):
    """total = ce_weight * ce_factor(CE) * CE + kd_weight * KD, sums over the positions of `tiles`."""

    tiles: Sequence[Tile[Context]]
    targets: Tensor | None
    """int64 [N]: targets of the student's positions; None without cross-entropy"""
    loss_and_grad: Callable[[Tensor, TeacherTile, Context, str | None], TileLoss] | None
    """`Distillation.loss_and_grad`; None without distillation"""
    ce_weight: float
    kd_weight: float
    clamp: LogitClamp
    ce_factor: Callable[[Tensor], Tensor] | None = None
    """From the batch's clamped cross-entropy, a sum, to a factor of its gradient; None for 1"""
    grad_scale: Tensor | float = 1.0
    """The factor of the total in the caller's backward: loss_scale / tokens"""
    grad_side: str = "student"
    """'student' or 'teacher'"""

    def grad_logits(self, student: LazyLogits, teacher: TeacherLogits | None) -> LazyLogits:
        """The logits of `grad_side`."""
        if self.grad_side == "student":
            return student
        assert isinstance(teacher, LazyLogits), "cached logits have no graph"
        return teacher


class LossSums(NamedTuple):
    """Sums over positions, nats; fp32 scalars. Only `total` has a gradient."""

    total: Tensor
    ce: Tensor
    """Of clamped logits"""
    unclamped_ce: Tensor
    kd: Tensor
    unclamped_kd: Tensor
    nonfinite: Tensor
    """Student positions whose logits are not finite, or whose cross-entropy is to be learned and infinite"""
    dropped: Tensor
    """See `TileLoss`"""
    infinite: Tensor
    """See `TileLoss`"""
    unshared: Tensor
    """See `TileLoss`"""


def tiled_loss(spec: TiledLossSpec, student: LazyLogits, teacher: TeacherLogits | None) -> LossSums:
    """The loss of a batch; `total` is differentiable in states and LM head of `grad_side`."""
    return LossSums(*_TiledLoss.apply(spec, student, teacher, *spec.grad_logits(student, teacher).tensors))


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec: TiledLossSpec, student: LazyLogits, teacher: TeacherLogits | None, *inputs: Tensor | None):
        has_loss = spec.ce_weight > 0 or spec.loss_and_grad is not None
        needed = [needs_grad and has_loss for needs_grad in ctx.needs_input_grad[3:]]
        ctx.gradients = Gradients(spec.grad_logits(student, teacher), needed) if any(needed) else None
        ctx.grad_scale = spec.grad_scale
        sums = _Tiles(spec, student, teacher, ctx.gradients).sums()
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *((None,) * 3 if gradients is None else gradients.scaled(grad / ctx.grad_scale))


class _Tiles(Generic[Context]):
    """One evaluation of a loss: sums over tiles, and their gradients, if any."""

    def __init__(
        self,
        spec: TiledLossSpec[Context],
        student: LazyLogits,
        teacher: TeacherLogits | None,
        gradients: Gradients | None,
    ):
        self.spec, self.student, self.teacher, self.gradients = spec, student, teacher, gradients
        zero = torch.zeros((), device=student.states.device)
        self.ce = self.unclamped_ce = self.nonfinite = self.kd = self.unclamped_kd = zero
        self.dropped = self.infinite = self.unshared = zero
        self.ce_factor = zero + 1.0
        self._logsumexps: dict[int, Tensor] = {}

    def sums(self) -> LossSums:
        """Process all tiles; those of the student twice if the loss clamp's factor must be known beforehand."""
        spec = self.spec
        two_passes = len(spec.tiles) > 1 and spec.ce_factor is not None
        for i in range(len(spec.tiles)) if two_passes else ():
            self._add_ce(i, self.student.tile(spec.tiles[i].student))
        for i in range(len(spec.tiles)) if self.gradients or spec.loss_and_grad or not two_passes else ():
            self._process(i, adds_ce=not two_passes)
        total = spec.kd_weight * self.kd
        if spec.ce_weight:  # the cross-entropy may be infinite
            total = total + spec.ce_weight * self.ce_factor * self.ce
        return LossSums(
            total, self.ce, self.unclamped_ce, self.kd, self.unclamped_kd,
            self.nonfinite, self.dropped, self.infinite, self.unshared,
        )  # fmt: skip

    def _process(self, i: int, adds_ce: bool) -> None:
        """Compute the logits of a tile, add its losses and their gradient. The tile is freed on return."""
        spec, tile, gradients = self.spec, self.spec.tiles[i], self.gradients
        student = self.student.tile(tile.student)
        teacher = None if spec.loss_and_grad is None or self.teacher is None else self.teacher.tile(tile.teacher)
        if adds_ce:
            self._add_ce(i, student)
        logits, positions = (student, tile.student) if spec.grad_side == "student" else (teacher, tile.teacher)
        assert isinstance(logits, Tensor), "cached logits have no graph"
        transform_grad = gradients.logits.logit_transform_grad(logits, spec.clamp.raw_bound) if gradients else None
        kd_grad = self._add_kd(student, teacher, tile.context)
        if gradients is None:
            return
        kd_weight = spec.kd_weight * spec.grad_scale * torch.ones_like(student[0, :1])
        if spec.targets is not None and spec.ce_weight:
            self._backward_(i, student, kd_grad, kd_weight)
        else:
            for block in vocab_blocks(logits):
                logits[block].zero_()
                kd_grad.add_to_(logits, kd_weight, block)
        kd_grad.add_sparse_to_(logits, kd_weight)
        gradients.add_(positions, logits if transform_grad is None else logits.mul_(transform_grad))

    def _add_kd(self, student: Tensor, teacher: TeacherTile | None, context: Context) -> TileGrad:
        """Clamp both tiles to the raw bound, in place, and add their distillation loss. Returns its gradient."""
        spec, bound, whole = self.spec, self.spec.clamp.raw_bound, None
        if spec.loss_and_grad is None or teacher is None:
            _clamp_(student, bound)
            return TileGrad()
        if bound < math.inf:
            assert isinstance(teacher, Tensor), "cached logits cannot be clamped"
            whole = spec.loss_and_grad(student.clone(), teacher.clone(), context, None)
            _clamp_(student, bound)
            _clamp_(teacher, bound)
        kd = spec.loss_and_grad(student, teacher, context, spec.grad_side if self.gradients else None)
        whole = whole or kd
        self.kd, self.dropped, self.unshared = self.kd + kd.loss, self.dropped + kd.dropped, self.unshared + kd.unshared
        self.infinite, self.unclamped_kd = self.infinite + whole.infinite, self.unclamped_kd + whole.unclamped
        return kd.grad or TileGrad()

    def _add_ce(self, i: int, tile: Tensor) -> None:
        """Add the cross-entropy of tile i of the student's logits, before any clamp: float32 [V, n]."""
        if self.spec.targets is None:
            return
        clamp, ce_mask, targets = self.spec.clamp, self.spec.tiles[i].ce_mask, self._targets(i)
        logsumexp = logsumexp_per_position(tile)
        target_logits = tile.gather(0, targets[None])[0]
        is_finite = is_finite_peak(logsumexp)
        unclamped = log_probs = _log_prob(target_logits, logsumexp)
        if self.spec.ce_weight:
            is_finite = is_finite & (target_logits >= MASKED_BELOW)
        if clamp.style == "raw":
            logsumexp = logsumexp_per_position(tile, bound=clamp.bound)
            log_probs = target_logits.clamp(-clamp.bound, clamp.bound) - logsumexp
        log_probs = clamp.floor_log_probs(log_probs)
        if ce_mask is not None:
            counts = ce_mask > 0
            unclamped, log_probs = unclamped.where(counts, 0.0), log_probs.where(counts, 0.0)
            is_finite = is_finite | ~counts
        self.unclamped_ce, self.ce = self.unclamped_ce - unclamped.sum(), self.ce - log_probs.sum()
        self.nonfinite = self.nonfinite + (~is_finite).sum()
        self._logsumexps[i] = logsumexp
        if self.spec.ce_factor is not None:
            self.ce_factor = self.spec.ce_factor(self.ce)

    def _backward_(self, i: int, tile: Tensor, kd_grad: TileGrad, kd_weight: Tensor) -> None:
        """Overwrite tile i of the student's logits with the gradient, except for distillation's sparse part:

        dz[v] = ce_weight * ce_factor * grad_scale * (p[v] - [v = y]) + kd_weight * kd_grad[v]
        """
        ce_mask, targets = self.spec.tiles[i].ce_mask, self._targets(i)
        weight = self.spec.ce_weight * self.ce_factor * self.spec.grad_scale
        weight = weight.expand(len(targets)) if ce_mask is None else weight * ce_mask
        for block in vocab_blocks(tile):
            exp_(tile[block].sub_(self._logsumexps[i])).mul_(weight)
            kd_grad.add_to_(tile, kd_weight, block)
        tile.scatter_add_(0, targets[None], -weight[None])

    def _targets(self, i: int) -> Tensor:
        assert self.spec.targets is not None
        return self.spec.targets[self.spec.tiles[i].student]


def _clamp_(tile: Tensor, bound: float) -> None:
    """Clamp logits to [-bound, bound], in place; a position that is not finite becomes NaN, which a clamp keeps."""
    if bound < math.inf:
        tile.masked_fill_(~finite_positions(tile), math.nan).clamp_(-bound, bound)


def _log_prob(target_logits: Tensor, logsumexp: Tensor) -> Tensor:
    """log p of targets, float32 [n]; -inf for a masked one."""
    return (target_logits - logsumexp).masked_fill(target_logits < MASKED_BELOW, -math.inf)


def target_log_probs(
    logits: LazyLogits, targets: Tensor, tile_size: int, bound: float = math.inf
) -> tuple[Tensor, Tensor]:
    """log softmax(z_n)[y_n] of logits clamped to [-bound, bound], differentiable in states and LM head.

    targets: int64 [N]; tile_size: positions per tile
    Returns: float32 [N], nats, -inf for a masked target, nan where the logits are not finite; bool [N], where they are
    """
    return _TargetLogProbs.apply(logits, targets, tile_size, bound, *logits.tensors)


class _TargetLogProbs(torch.autograd.Function):
    """d log p[y] / d z[v] = [v = y] - p[v]. The incoming gradient differs by position, so backward recomputes tiles."""

    @staticmethod
    def forward(ctx, logits: LazyLogits, targets: Tensor, tile_size: int, bound: float, *inputs: Tensor | None):
        ctx.args = logits, targets, tile_size, bound
        log_probs = [torch.zeros(0, device=targets.device)]
        is_finite = [torch.zeros(0, dtype=torch.bool, device=targets.device)]
        for positions in split_range(len(targets), tile_size):
            tile = logits.tile(positions)
            target_logits = tile.gather(0, targets[None, positions])[0].clamp(-bound, bound)
            logsumexp = logsumexp_per_position(tile, bound=bound)
            is_finite.append(is_finite_peak(logsumexp) if bound == math.inf else finite_positions(tile))
            log_probs.append(_log_prob(target_logits, logsumexp).masked_fill(~is_finite[-1], math.nan))
        finite = torch.cat(is_finite)
        ctx.mark_non_differentiable(finite)
        return torch.cat(log_probs), finite

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        logits, targets, tile_size, bound = ctx.args
        gradients = Gradients(logits, ctx.needs_input_grad[4:])
        for positions in split_range(len(targets), tile_size):
            tile = logits.tile(positions)
            transform_grad = logits.logit_transform_grad(tile, bound)
            exp_(tile.sub_(logsumexp_per_position(tile.clamp_(-bound, bound)))).mul_(-grad[positions])
            tile.scatter_add_(0, targets[None, positions], grad[None, positions])
            gradients.add_(positions, tile if transform_grad is None else tile.mul_(transform_grad))
        return None, None, None, None, *gradients.scaled(torch.ones((), device=grad.device))

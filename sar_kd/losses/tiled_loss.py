"""Cross-entropy and distillation of both models' hidden states, value and gradient, one tile of logits at a time.

A chunked (fused linear) distillation loss, as in Liger Kernel, for student and teacher:

    total = ce_weight * CE + kd_weight * KD,   z_s = head_s(h_s),   z_t = head_t(h_t),   tiles of n positions

Products: of each tile z_s and z_t once, then dh_s = dz^T W_s and dW_s += dz h_s at once, in forward, as many products
as with all logits in memory. With a loss clamp and several tiles, z_s is computed twice, because the clamp's factor
depends on the whole sum. Backward only scales the two results.
Memory: the logits of one tile of each model, `--loss_workspace_mb`, whatever B * T is; the gradient dz overwrites one
of the two. Beside them float32 dh and dW.
Rounding: dz carries grad_scale = loss_scale / tokens when it is rounded to half for the products, as it would in a
backward of its own; `Gradients.scaled` divides by grad_scale again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sar_kd.data.batch import CachedTopK, TopKLogits
from sar_kd.losses.functional import LogitClamp
from sar_kd.models.lm_head import Gradients, LazyLogits, PositionIndex
from sar_kd.models.logit_tiles import exp_, finite_positions, flat_view, logsumexp_per_position, vocab_blocks

TeacherLogits = LazyLogits | CachedTopK
"""Where tiles of the teacher's logits, or of its top k, come from"""

TeacherTile = Tensor | TopKLogits
"""A tile of the teacher's logits, float32 [V_t, m], or its cached top k"""

Context = TypeVar("Context")
"""What a distillation method needs to know about the positions of a tile"""


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

    def add_to_(self, tile: Tensor, weight: Tensor, block: slice = slice(None)) -> None:
        """Add `weight` times the dense parts to a block of the vocabulary."""
        for first, grad in self.dense:
            part = grad[block]
            tile[block][: len(part), first : first + part.shape[1]].addcmul_(part, weight)

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
    """Teacher positions left out because their logits are not finite"""
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
    """What the caller multiplies the total by before its backward: loss_scale / tokens"""
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
    """Student positions whose logits are not finite"""
    dropped: Tensor
    """See `TileLoss`"""


def tiled_loss(spec: TiledLossSpec, student: LazyLogits, teacher: TeacherLogits | None) -> LossSums:
    """The loss of a batch; `total` is differentiable in states and LM head of `grad_side`."""
    return LossSums(*_TiledLoss.apply(spec, student, teacher, *spec.grad_logits(student, teacher).tensors))


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec: TiledLossSpec, student: LazyLogits, teacher: TeacherLogits | None, *inputs: Tensor | None):
        has_loss = spec.ce_weight > 0 or spec.loss_and_grad is not None
        needed = [needs_grad and has_loss for needs_grad in ctx.needs_input_grad[3:]]
        gradients = Gradients(spec.grad_logits(student, teacher), needed) if any(needed) else None
        ctx.grad_scale = spec.grad_scale
        sums, ctx.gradients = _forward(spec, student, teacher, gradients), gradients
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *((None,) * 3 if gradients is None else gradients.scaled(grad / ctx.grad_scale))


def _forward(
    spec: TiledLossSpec, student: LazyLogits, teacher: TeacherLogits | None, gradients: Gradients | None
) -> LossSums:
    zero = torch.zeros((), device=student.states.device)
    kd = unclamped_kd = dropped = zero
    ce = None if spec.targets is None else _CrossEntropy(spec, spec.targets, zero)
    two_passes = len(spec.tiles) > 1 and spec.ce_factor is not None
    if ce is not None and two_passes:
        for i, tile in enumerate(spec.tiles):
            ce.add(i, student.tile(tile.student))
    for i in range(len(spec.tiles)) if gradients or spec.loss_and_grad or not two_passes else ():
        tile_loss = _process_tile(i, spec, student, teacher, ce, not two_passes, gradients)
        if tile_loss is not None:
            kd, unclamped_kd = kd + tile_loss.loss, unclamped_kd + tile_loss.unclamped
            dropped = dropped + tile_loss.dropped
    ce_sum, unclamped_ce, nonfinite, factor = (ce.sum, ce.unclamped, ce.nonfinite, ce.factor) if ce else (zero,) * 4
    total = spec.ce_weight * factor * ce_sum + spec.kd_weight * kd
    return LossSums(total, ce_sum, unclamped_ce, kd, unclamped_kd, nonfinite, dropped)


def _process_tile(
    i: int,
    spec: TiledLossSpec,
    student: LazyLogits,
    teacher: TeacherLogits | None,
    ce: _CrossEntropy | None,
    adds_ce: bool,
    gradients: Gradients | None,
) -> TileLoss | None:
    """Compute the logits of one tile, its losses, and add their gradient to `gradients`. The tile is freed on return.

    adds_ce: its cross-entropy has not been added yet
    Returns: the distillation loss without its gradient; None without distillation
    """
    tile = spec.tiles[i]
    student_tile = student.tile(tile.student)
    teacher_tile = None if spec.loss_and_grad is None or teacher is None else teacher.tile(tile.teacher)
    if ce and adds_ce:
        ce.add(i, student_tile)
    grad_tile = student_tile if spec.grad_side == "student" else teacher_tile
    assert isinstance(grad_tile, Tensor), "cached logits have no graph"
    transform_grad = gradients.logits.logit_transform_grad(grad_tile, spec.clamp.raw_bound) if gradients else None
    kd = _distill(spec, student_tile, teacher_tile, tile.context, spec.grad_side if gradients else None)
    if gradients is not None:
        kd_grad = TileGrad() if kd is None or kd.grad is None else kd.grad
        kd_weight = spec.kd_weight * spec.grad_scale * torch.ones_like(student_tile[0, :1])
        if ce and spec.ce_weight:
            ce.backward_(i, student_tile, kd_grad, kd_weight)
        else:
            kd_grad.add_to_(grad_tile.zero_(), kd_weight)
        kd_grad.add_sparse_to_(grad_tile, kd_weight)
        positions = tile.student if spec.grad_side == "student" else tile.teacher
        gradients.add_(positions, grad_tile if transform_grad is None else grad_tile.mul_(transform_grad))
    return kd and kd._replace(grad=None)


def _distill(
    spec: TiledLossSpec[Context],
    student: Tensor,
    teacher: TeacherTile | None,
    context: Context,
    grad_side: str | None,
) -> TileLoss | None:
    """Clamp both tiles to the clamp's raw bound, in place, and compute their distillation loss."""
    bound = spec.clamp.raw_bound
    if spec.loss_and_grad is None or teacher is None:
        _clamp_(bound, student)
        return None
    if bound == math.inf:
        return spec.loss_and_grad(student, teacher, context, grad_side)
    assert isinstance(teacher, Tensor), "cached logits cannot be clamped"
    unclamped = spec.loss_and_grad(student.clone(), teacher.clone(), context, None).unclamped
    _clamp_(bound, student, teacher)
    return spec.loss_and_grad(student, teacher, context, grad_side)._replace(unclamped=unclamped)


def _clamp_(bound: float, *tiles: Tensor) -> None:
    """Clamp logits to [-bound, bound], in place; a position that is not finite becomes NaN, which a clamp keeps."""
    for tile in tiles if bound < math.inf else ():
        tile.masked_fill_(~finite_positions(tile), math.nan).clamp_(-bound, bound)


class _CrossEntropy:
    """The cross-entropy of a batch: its sums, and what its gradient needs, tile by tile."""

    def __init__(self, spec: TiledLossSpec, targets: Tensor, zero: Tensor):
        self.spec, self.targets, self.factor = spec, targets, zero + 1.0
        self.sum = self.unclamped = self.nonfinite = zero
        self._logsumexps: dict[int, Tensor] = {}

    def add(self, i: int, tile: Tensor) -> None:
        """Add tile i of the student's unclamped logits: float32 [V, n]."""
        clamp, ce_mask, targets = self.spec.clamp, self.spec.tiles[i].ce_mask, self._targets(i)
        logsumexp = logsumexp_per_position(tile)
        target_logits = tile.gather(0, targets[None])[0]
        unclamped = log_probs = target_logits - logsumexp
        if clamp.style == "raw":
            logsumexp = logsumexp_per_position(tile, bound=clamp.bound)
            log_probs = target_logits.clamp(-clamp.bound, clamp.bound) - logsumexp
        log_probs, is_finite = clamp.floor_log_probs(log_probs), finite_positions(tile)
        if ce_mask is not None:
            unclamped, log_probs, is_finite = unclamped * ce_mask, log_probs * ce_mask, is_finite | (ce_mask == 0)
        self.unclamped, self.sum = self.unclamped - unclamped.sum(), self.sum - log_probs.sum()
        self.nonfinite = self.nonfinite + (~is_finite).sum()
        self._logsumexps[i] = logsumexp
        if self.spec.ce_factor is not None:
            self.factor = self.spec.ce_factor(self.sum)

    def backward_(self, i: int, tile: Tensor, kd_grad: TileGrad, kd_weight: Tensor) -> None:
        """Overwrite tile i of the student's logits with the gradient of the cross-entropy and of distillation:

        dz[v] = ce_weight * factor * grad_scale * (p[v] - [v = y]) + kd_weight * kd_grad[v]   (its dense parts)
        """
        ce_mask, targets = self.spec.tiles[i].ce_mask, self._targets(i)
        weight = self.spec.ce_weight * self.factor * self.spec.grad_scale
        weight = weight.expand(len(targets)) if ce_mask is None else weight * ce_mask
        logsumexp = self._logsumexps[i]
        for block in vocab_blocks(tile):
            exp_(tile[block].sub_(logsumexp)).mul_(weight)
            kd_grad.add_to_(tile, kd_weight, block)
        tile.scatter_add_(0, targets[None], -weight[None])

    def _targets(self, i: int) -> Tensor:
        return self.targets[self.spec.tiles[i].student]


def split_range(count: int, size: int) -> list[slice]:
    """The range of `count` positions in slices of at most `size`."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def target_log_probs(
    logits: LazyLogits, targets: Tensor, tile_size: int, bound: float = math.inf
) -> tuple[Tensor, Tensor]:
    """log softmax(z_n)[y_n] of logits clamped to [-bound, bound], differentiable in states and LM head.

    targets: int64 [N]; tile_size: positions per tile
    Returns: float32 [N], nats; bool [N], which positions have finite logits
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
            log_probs.append(target_logits - logsumexp_per_position(tile, bound=bound))
            is_finite.append(finite_positions(tile))
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

"""One attempted update, from batches to `optimizer.step`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sar_kd.data.batch import Batch
from sar_kd.losses.objective import LossTerms, Objective
from sar_kd.runtime.distributed import joined
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.moe.router_training import FROZEN_ROUTERS, FrozenRouters, RouterReport
from sar_kd.training.guards import StepGuard, Verdict
from sar_kd.training.optimizer import parameters_of
from sar_kd.training.parallel import SINGLE_DEVICE, ParallelStrategy


@dataclass(frozen=True)
class StepReport:
    """One attempted update in figures, of all ranks together, as read from the device once."""

    verdict: Verdict
    loss: float
    """alpha_ce * ce_loss + alpha_kd * kd_loss, nats per target token, no clamp; ce counts 0 where the text is the
    student's own"""
    ce_loss: float | None
    """Nats per target token that is not the student's own; None where all of them are"""
    kd_loss: float
    grad_norm: float
    """L2, after unscaling, before clipping"""
    loss_scale: float
    """The factor this attempt used"""
    num_target_tokens: int
    teacher_rows_dropped: int
    routers: RouterReport | None = None
    """Where the teacher's routers learn"""
    rank: int = 0
    """The first one with a forward that is not finite, where there is one"""


def train_step(
    micro_batches: list[Batch],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    precision: Precision,
    max_grad_norm: float,
    routers: FrozenRouters = FROZEN_ROUTERS,
    placement: ParallelStrategy = SINGLE_DEVICE,
) -> StepReport:
    """Attempt one update. Weights and optimizer state change if and only if the verdict is `applied`, the routers' too.

    gradient = sum over all ranks' micro-batches of d total / d weights, divided once by the window's target tokens
    """
    counts = (sum(b.num_target_tokens for b in micro_batches if b.is_on_policy is own) for own in (False, True))
    of_text, of_own = map(int, placement.process_group.all_reduce_sum(counts))
    num_targets = of_text + of_own
    count = max(1, num_targets)
    batches = [batch.to(precision.device) for batch in micro_batches if placement.takes_part(batch)]
    sums = LossTerms.zero(precision.device)
    objective.listen(batches)
    routers.update_before_student_(batches, count)
    for batch in placement.window(batches):
        minimised, terms = placement.forward(_losses, batch, objective, routers, precision.loss_scale / count)
        precision.backward(minimised / count)
        sums = sums + terms
    routers.update_after_student_(batches)
    precision.unscale_(optimizer)
    parameters = parameters_of(optimizer)
    grad_norm = placement.norm([p.grad for p in parameters if p.grad is not None])
    summed = [*sums.values(), *routers.sums()]
    figures = [*summed, grad_norm.to(precision.device), precision.loss_scale, *routers.norms()]
    rows = placement.process_group.all_gather(
        torch.stack([f.float() for f in figures])
    ).tolist()  # the one host read: a row a rank
    (total, ce, kd, nonfinite_rows, dropped, *router_sums), (norm, scale, *router_norms) = joined(rows, len(summed))
    routed = routers.report(router_sums, router_norms, num_targets)
    losses, norms = [total], [norm]
    if routed is not None:  # their norm is clipped, not limited; but where it is no number, neither update is trusted
        losses, norms = [total, routed.router_loss], [norm, routed.router_grad_norm]
    verdict = guard.judge(
        num_targets=num_targets,
        forward_finite=nonfinite_rows == 0 and all(map(math.isfinite, losses)),
        grad_norm=norm if all(map(math.isfinite, norms)) else math.nan,
        loss_scale=scale,
    )
    if verdict.applied:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
        optimizer.step()
    routers.commit_or_roll_back_(verdict.applied)
    precision.update_(verdict.cause, scale)
    optimizer.zero_grad(set_to_none=True)
    loss = (objective.alpha_ce * ce + objective.alpha_kd * kd) / count
    ce_loss = ce / max(1, of_text) if of_text or not of_own else None
    return StepReport(verdict, loss, ce_loss, kd / count, norm, scale, num_targets, int(dropped), routed, _bad(rows))


def _bad(rows: list[list[float]]) -> int:
    """The first rank whose forward is not finite; the first of all, if all are."""
    are_finite = [nonfinite_rows == 0 and math.isfinite(total) for total, _, _, nonfinite_rows, *_ in rows]
    return are_finite.index(False) if False in are_finite else 0


def _losses(batch: Batch, objective: Objective, routers: FrozenRouters, scale: Tensor) -> tuple[Tensor, LossTerms]:
    """What one backward minimises, which multiplies it by `scale`."""
    outputs = objective.read(batch, teacher_learns=routers.is_joint)
    terms = objective(batch, outputs, scale)
    return terms.total + routers.loss(batch, outputs), terms

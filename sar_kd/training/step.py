"""One attempted update, from micro-batches to `optimizer.step`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.data.batch import Batch
from sar_kd.losses.objective import LogitsAndStates, LossTerms, Objective
from sar_kd.runtime.distributed import sum_and_max
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.moe.router_training import FROZEN_ROUTERS, FrozenRouters, RouterReport
from sar_kd.training.guards import StepGuard, Verdict
from sar_kd.training.optimizer import parameters_of
from sar_kd.training.parallel import SINGLE_DEVICE, ParallelStrategy


@dataclass
class StepContext:
    """Everything that a step needs beside its micro-batches."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    guard: StepGuard
    precision: Precision
    max_grad_norm: float
    """Gradients are clipped to this L2 norm"""
    routers: FrozenRouters = FROZEN_ROUTERS
    """The teacher's, if they learn in this step"""
    strategy: ParallelStrategy = SINGLE_DEVICE


@dataclass(frozen=True)
class StepReport:
    """Metrics of one attempted update, over all ranks."""

    verdict: Verdict
    loss: float
    """alpha_ce * ce_loss + alpha_kd * kd_loss, nats per target token, unclamped; ce counts 0 in on-policy text"""
    ce_loss: float | None
    """Nats per target token that is not on-policy; None if all are"""
    kd_loss: float
    """Nats per target token"""
    grad_norm: float
    """L2, after unscaling, before clipping"""
    loss_scale: float
    """That of this attempt"""
    num_target_tokens: int
    teacher_rows_dropped: int
    """Positions whose teacher logits are not finite"""
    routers: RouterReport | None = None
    """If the teacher's routers learn"""
    first_nonfinite_rank: int = 0
    """The first rank whose forward is not finite; 0 if all are finite"""


def train_step(micro_batches: list[Batch], context: StepContext) -> StepReport:
    """Attempt one update. Weights and optimizer state change if and only if the verdict is `applied`, the routers' too.

    gradient = sum over all ranks' micro-batches of d total / d weights, divided once by the step's target tokens
    """
    objective, optimizer, precision = context.objective, context.optimizer, context.precision
    routers, strategy = context.routers, context.strategy
    counts = (sum(b.num_target_tokens for b in micro_batches if b.is_on_policy is kind) for kind in (False, True))
    num_text_targets, num_on_policy_targets = map(int, strategy.process_group.all_reduce_sum(counts))
    num_targets = num_text_targets + num_on_policy_targets
    divisor = max(1, num_targets)
    batches = [batch.to(precision.device) for batch in micro_batches if strategy.needs_forward(batch)]
    terms = LossTerms.zero(precision.device)
    teacher_outputs = objective.precompute_teacher(batches)
    routers.update_before_student_(batches, divisor)
    for batch in strategy.accumulate(batches):
        grad_scale = precision.loss_scale / divisor
        # Popped, so that a micro-batch's teacher outputs are freed before its backward.
        total, batch_terms = strategy.forward(_forward, batch, objective, routers, grad_scale, teacher_outputs.pop(0))
        precision.backward(total / divisor)
        terms = terms + batch_terms
    routers.update_after_student_(batches)
    precision.unscale_(optimizer)
    parameters = parameters_of(optimizer)
    grad_norm = strategy.grad_norm([p.grad for p in parameters if p.grad is not None])
    metrics = reduce_metrics(terms, grad_norm, num_targets, context)
    verdict = context.guard.judge(
        num_targets=num_targets,
        forward_finite=metrics.forward_finite,
        grad_norm=metrics.judged_grad_norm,
        loss_scale=metrics.loss_scale,
    )
    if verdict.applied:
        torch.nn.utils.clip_grads_with_norm_(parameters, context.max_grad_norm, grad_norm)
        optimizer.step()
    routers.commit_or_roll_back_(verdict.applied)
    precision.update_(verdict.cause, metrics.loss_scale)
    optimizer.zero_grad(set_to_none=True)
    has_ce = num_text_targets > 0 or not num_on_policy_targets
    return StepReport(
        verdict,
        loss=(objective.alpha_ce * metrics.ce + objective.alpha_kd * metrics.kd) / divisor,
        ce_loss=metrics.ce / max(1, num_text_targets) if has_ce else None,
        kd_loss=metrics.kd / divisor,
        grad_norm=metrics.grad_norm,
        loss_scale=metrics.loss_scale,
        num_target_tokens=num_targets,
        teacher_rows_dropped=int(metrics.teacher_rows_dropped),
        routers=metrics.routers,
        first_nonfinite_rank=metrics.first_nonfinite_rank,
    )


def _forward(
    batch: Batch,
    objective: Objective,
    routers: FrozenRouters,
    grad_scale: Tensor,
    teacher_outputs: LogitsAndStates | None,
) -> tuple[Tensor, LossTerms]:
    """The loss of a micro-batch, a sum over its target tokens, with its graph.

    grad_scale: its factor in the backward; teacher_outputs: from `Objective.precompute_teacher`
    """
    outputs = objective.forward_models(batch, teacher_outputs, teacher_grad=routers.is_joint)
    terms = objective(batch, outputs, grad_scale)
    return terms.total + routers.loss(batch, outputs), terms


class ReducedMetrics(NamedTuple):
    """A step's metrics as the host reads them: `LossTerms` summed over all ranks, and the largest norms."""

    total: float
    ce: float
    kd: float
    nonfinite_rows: float
    teacher_rows_dropped: float
    grad_norm: float
    loss_scale: float
    routers: RouterReport | None
    first_nonfinite_rank: int

    @property
    def forward_finite(self) -> bool:
        losses = [self.total] if self.routers is None else [self.total, self.routers.router_loss]
        return self.nonfinite_rows == 0 and all(map(math.isfinite, losses))

    @property
    def judged_grad_norm(self) -> float:
        """The student's; nan if the routers' is not finite: it has no limit, but then neither update is trusted."""
        is_finite = self.routers is None or math.isfinite(self.routers.router_grad_norm)
        return self.grad_norm if is_finite else math.nan


def reduce_metrics(terms: LossTerms, grad_norm: Tensor, num_targets: int, context: StepContext) -> ReducedMetrics:
    """Pack a step's metrics into one tensor, gather those of all ranks, read them once, and reduce them."""
    precision, routers = context.precision, context.routers
    sums = [*terms.values(), *routers.sums()]
    norms = [grad_norm.to(precision.device), precision.loss_scale, *routers.norms()]
    packed = torch.stack([value.float() for value in (*sums, *norms)])
    by_rank = context.strategy.process_group.all_gather(packed).tolist()  # the one host read
    summed, largest = sum_and_max(by_rank, len(sums))
    num_terms = len(terms.values())
    router_report = routers.report(summed[num_terms:], largest[2:], num_targets)
    return ReducedMetrics(*summed[:num_terms], *largest[:2], router_report, _first_nonfinite_rank(by_rank))


def _first_nonfinite_rank(by_rank: list[list[float]]) -> int:
    """by_rank: each rank's packed metrics"""
    are_finite = [nonfinite_rows == 0 and math.isfinite(total) for total, _, _, nonfinite_rows, *_ in by_rank]
    return are_finite.index(False) if False in are_finite else 0

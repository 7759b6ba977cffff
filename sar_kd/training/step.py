"""One attempted update, from micro-batches to `optimizer.step`."""

from __future__ import annotations

import math
from dataclasses import dataclass

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

_LARGE_NORM = 1e18
"""Up to here a sum of squares fits float32."""


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
    """Teacher positions left out of distillation: their logits, or the divergence, are not finite"""
    teacher_rows_infinite: int
    """Teacher positions at which the divergence is infinite, because only one of the models masks a token; 0 in a step
    refused as `forward`"""
    teacher_rows_unshared: int
    """Teacher positions left out because too little of its distribution is in its top k or in shared tokens"""
    teacher_positions: int
    """Teacher positions that distillation compares, those left out included; 0 without a teacher"""
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
    targets = (sum(b.num_target_tokens for b in micro_batches if b.is_on_policy is kind) for kind in (False, True))
    positions = (sum(objective.num_teacher_positions(b)[i] for b in micro_batches) for i in range(2))
    counts = [int(count) for count in strategy.process_group.all_reduce_sum([*targets, *positions])]
    divisor = max(1, counts[0] + counts[1])
    batches = [batch.to(precision.device) for batch in micro_batches if strategy.needs_forward(batch)]
    terms = LossTerms.zero(precision.device)
    teacher_outputs = objective.precompute_teacher(batches)
    routers.update_before_student_(batches, divisor)
    for batch in strategy.accumulate(batches):
        grad_scale = precision.loss_scale / divisor
        total, batch_terms = strategy.forward(_loss, batch, teacher_outputs.pop(0), context, grad_scale)
        precision.backward(total / divisor)
        terms = terms + batch_terms
    routers.update_after_student_(batches)
    precision.unscale_(optimizer)
    parameters = parameters_of(optimizer)
    gradients = [p.grad for p in parameters if p.grad is not None]
    grad_norm = strategy.grad_norm(gradients)
    report = _judge(terms, grad_norm, gradients, counts, context)
    verdict = report.verdict
    if verdict.applied:
        if report.grad_norm > _LARGE_NORM:  # the tensor may be inf
            grad_norm = grad_norm.new_tensor(report.grad_norm, dtype=torch.float64)
        torch.nn.utils.clip_grads_with_norm_(parameters, context.max_grad_norm, grad_norm)
        optimizer.step()
    routers.commit_or_roll_back_(verdict.applied)
    precision.update_(verdict.cause, report.loss_scale)
    optimizer.zero_grad(set_to_none=True)
    return report


def _loss(
    batch: Batch, teacher_outputs: LogitsAndStates | None, context: StepContext, grad_scale: Tensor
) -> tuple[Tensor, LossTerms]:
    """The loss of a micro-batch, a sum over its target tokens. grad_scale: the factor of the loss in the backward"""
    outputs = context.objective.forward_models(batch, teacher_outputs, teacher_grad=context.routers.is_joint)
    terms = context.objective(batch, outputs, grad_scale)
    return terms.total + context.routers.loss(batch, outputs), terms


def _judge(
    terms: LossTerms, grad_norm: Tensor, gradients: list[Tensor], counts: list[int], context: StepContext
) -> StepReport:
    """Reduce a step's metrics over all ranks, and judge the update.

    counts: of all ranks, target tokens of text, those of on-policy text, and both of `num_teacher_positions`
    """
    num_text, num_on_policy, num_teacher, num_expected = counts
    objective, routers, num_targets = context.objective, context.routers, num_text + num_on_policy
    divisor = max(1, num_targets)
    sums = [*terms.values(), *routers.sums()]
    maxima = [grad_norm, context.precision.loss_scale, *routers.norms()]
    summed, largest, first_nonfinite_rank = reduce_metrics(sums, maxima, context)
    total, ce, kd, nonfinite_positions, dropped, infinite, unshared, *router_sums = summed
    norm, loss_scale, *router_norms = largest
    if norm == math.inf:  # perhaps of finite gradients whose squares exceed float32
        norm = context.strategy.large_grad_norm(gradients)
    router_report = routers.report(router_sums, router_norms, num_targets)
    teacher_finite, norms = not num_expected or dropped < num_teacher, [norm]
    if router_report is not None:  # its norm has no limit; but if it is not finite, neither update is trusted
        norms = [norm, router_report.router_grad_norm]
        if not routers.is_joint and not math.isfinite(norms[1]):
            teacher_finite = True  # the update of the routers has made it NaN, which an overflow of the scale does too
        elif dropped and not math.isfinite(norms[1]):
            teacher_finite = False  # it makes the gradient of the routers so, at any loss scale
        teacher_finite = teacher_finite and math.isfinite(router_report.router_loss)
    verdict = context.guard.judge(
        num_targets=num_targets,
        forward_finite=nonfinite_positions == 0 and math.isfinite(total),
        teacher_finite=teacher_finite,
        grad_norm=norm if all(map(math.isfinite, norms)) else math.nan,
        loss_scale=loss_scale,
    )
    if verdict.cause == "forward":  # logits of -inf that have overflowed are no masked tokens
        dropped, infinite = dropped - infinite, 0.0
    return StepReport(
        verdict,
        loss=(objective.alpha_kd * kd + (objective.alpha_ce * ce if objective.alpha_ce else 0.0)) / divisor,
        ce_loss=ce / max(1, num_text) if num_text or not num_on_policy else None,
        kd_loss=kd / divisor,
        grad_norm=norm,
        loss_scale=loss_scale,
        num_target_tokens=num_targets,
        teacher_rows_dropped=int(dropped),
        teacher_rows_infinite=int(infinite),
        teacher_rows_unshared=int(unshared),
        teacher_positions=num_teacher,
        routers=router_report,
        first_nonfinite_rank=first_nonfinite_rank,
    )


def reduce_metrics(
    sums: list[Tensor], maxima: list[Tensor], context: StepContext
) -> tuple[list[float], list[float], int]:
    """Gather a step's metrics from all ranks with one host read: the sums added up, the largest of each maximum, and
    the first rank whose forward is not finite.

    sums: scalars, those of `LossTerms` first
    """
    packed = torch.stack([value.to(context.precision.device).float() for value in (*sums, *maxima)])
    by_rank = context.strategy.process_group.all_gather(packed).tolist()  # the one host read
    are_finite = [nonfinite_positions == 0 and math.isfinite(total) for total, _, _, nonfinite_positions, *_ in by_rank]
    return *sum_and_max(by_rank, len(sums)), are_finite.index(False) if False in are_finite else 0

"""A teacher's routers in a run: standing still, or learning from the student beside it.

Router and student minimise different things, each with the other held fixed:

    student  alpha_ce * CE + alpha_kd * T^2 * D(sg[teacher], student)
    routers  T^2 * KL(teacher || sg[student]) + beta * CV^2 + anchor * ||W - W0||^2 / ||W0||^2

Source: Kim et al., 2025 (arXiv 2502.12947), equation 9 and algorithm 2; the anchor is ours

The mathematics of routers: their shares, how evenly they are spread, how certain they are, how far they moved.

Everything that depends on text is taken block by block and summed with each block's number of target tokens, so that
splitting a window into other micro-batches changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sar_kd.alignment.aligner import Aligner
from sar_kd.config.runs import RoutingConfig
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import Batch
from sar_kd.losses.distillation import Outputs
from sar_kd.losses.functional import GroupSums, Sums
from sar_kd.losses.objective import Objective, build_distillation
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.teacher.moe.discovery import Gate, router_parameters
from sar_kd.teacher.moe.router_checkpoint import FrozenTeacherChanged, hash_frozen, hash_routers
from sar_kd.teacher.moe.routing_hooks import Routing, weights_of


@dataclass(frozen=True)
class RouterReport:
    """One attempted update of the routers in figures: means over target tokens, nats where they are divergences."""

    router_loss: float
    router_kl: float
    """Of teacher and student in `--router_direction`, before the update"""
    router_balance: float
    router_anchor: float
    router_entropy: float
    router_grad_norm: float
    """L2, after unscaling, before clipping"""
    router_effect: dict[str, float] | None = None
    """Both divergences before and after the update, on the same text and against the same student, where measured"""


class FrozenRouters:
    """Routers that do not learn: what a step asks of them has no effect."""

    learns = is_joint = False

    def update_before_student_(self, batches: list[Batch], num_targets: int) -> None:
        """Update the routers before the student's forward."""

    def loss(self, batch: Batch, outputs: Outputs) -> Tensor | float:
        """What is minimised beside the student's loss, by the same backward: a sum over target tokens."""
        return 0.0

    def update_after_student_(self, batches: list[Batch]) -> None:
        """Update the routers after the student's backward."""

    def commit_or_roll_back_(self, applied: bool) -> None:
        """Keep the update if the step is applied, else take it back."""

    def sums(self) -> list[Tensor]:
        """What of `report` adds up over micro-batches, on the device."""
        return []

    def norms(self) -> list[Tensor]:
        """What of `report` does not."""
        return []

    def report(self, sums: list[float], norms: list[float], num_targets: int) -> RouterReport | None:
        """`sums` and `norms` as the host read them, for people."""
        return None


FROZEN_ROUTERS = FrozenRouters()


class RouterTrainer(FrozenRouters):
    """Routers that learn from the student. They are float32 in a teacher of any dtype, and nothing else of it moves.

    An update is made at once, because the student may have to hear it, and taken back if the step's one verdict is
    against it: weights and optimizer state are then what they were, bit for bit.
    """

    learns = True

    def __init__(
        self,
        objective: Objective,
        routing: Routing,
        settings: RoutingConfig,
        loss: LossConfig,
        aligner: Aligner,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ):
        self.objective, self.routing, self.settings, self.process_group = objective, routing, settings, process_group
        self.precision = objective.precision
        self.is_joint = settings.sar_schedule == "joint"
        self.measures = False
        """The next update's effect is to be measured: two more forwards of both models"""
        # Of the whole teacher, unclamped, in the routers' own direction, whatever the student's term is.
        plain = dataclasses.replace(
            loss, kd_direction=settings.router_direction, logit_clamp_style="off", teacher_top_k=0
        )
        self._terms = {
            direction: build_distillation(
                dataclasses.replace(plain, kd_direction=direction), aligner, objective.student, objective.teacher
            ).to(self.precision.device)
            for direction in {"forward", "reverse", settings.router_direction}
        }
        self.parameters = router_parameters(routing.specs)
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._initial = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.frozen_sha256 = hash_frozen(objective.teacher, self.parameters)
        self.initial_sha256 = hash_routers(self._initial)
        # Without decay: the anchor holds them where they began, not at 0.
        self.optimizer = torch.optim.AdamW(
            [*self.parameters.values()], lr=settings.router_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._begin()

    def _begin(self) -> None:
        self._sums = RouterTerms.zero(self.precision.device)
        self._norm = torch.zeros((), device=self.precision.device)
        self._effect: list[Tensor] = []
        self._former: list[tuple[Tensor, Tensor]] = []

    # A step

    def update_before_student_(self, batches: list[Batch], num_targets: int) -> None:
        """two_stage: a pass of its own over the window, then the update. See `FrozenRouters`."""
        if self.is_joint:
            return
        for batch in batches:
            self.precision.backward(self._loss(batch, None) / num_targets)
        self._move_(batches)

    def loss(self, batch: Batch, outputs: Outputs) -> Tensor | float:
        """joint: the routers' loss on the forwards that the student learns from. See `FrozenRouters`."""
        return self._loss(batch, outputs) if self.is_joint else 0.0

    def update_after_student_(self, batches: list[Batch]) -> None:
        """joint: the update. See `FrozenRouters`."""
        if self.is_joint:
            self._move_(batches)

    def commit_or_roll_back_(self, applied: bool) -> None:
        """See `FrozenRouters`."""
        if not applied:
            with torch.no_grad():
                for tensor, former in self._former:
                    tensor.copy_(former)
            if len(self._former) == len(self.parameters):  # the optimizer had no state yet
                self.optimizer.state.clear()
        self._begin()

    def _loss(self, batch: Batch, outputs: Outputs | None) -> Tensor:
        if outputs is None:
            with self.precision.same_random():  # the student's own pass is to see the same dropout
                outputs = self.objective.read(batch, student_learns=False, teacher_learns=True)
        terms = self.terms(batch, outputs)
        self._sums = self._sums + terms
        return terms.total

    def terms(self, batch: Batch, outputs: Outputs) -> RouterTerms:
        """The routers' terms of the last forward. The student gets no gradient."""
        outputs = dataclasses.replace(outputs, student=outputs.student.detach())
        learned = self._terms[self.settings.router_direction](batch, outputs)
        shape, rows, device = batch.teacher.input_ids.shape, batch.teacher.rows, self.precision.device
        blocks = GroupSums(rows // shape[1], shape[0])
        ones = torch.ones(batch.num_target_tokens, device=device)
        counts = GroupSums(batch.student.rows // batch.student.input_ids.shape[1], shape[0]).sum(ones)
        balance = entropies = torch.zeros((), device=device)
        for spec, logits in zip(self.routing.specs, self.routing.logits, strict=True):
            shares = router_probs(spec.gate, logits[rows])
            balance = balance + (counts * load_balancing_loss(shares, blocks)).sum()
            of_tokens = blocks.sum(entropy(shares.detach())) / blocks.sum(torch.ones_like(shares[:, 0])).clamp_min(1.0)
            entropies = entropies + (counts * of_tokens).sum()
        changes = [relative_change(p, self._initial[name]) for name, p in self.parameters.items()]
        anchor = torch.stack(changes).mean() * batch.num_target_tokens
        balance, entropies = balance / len(self.routing.specs), entropies / len(self.routing.specs)
        total = learned.loss + self.settings.router_beta * balance + self.settings.router_anchor * anchor
        return RouterTerms(total, learned.raw, balance, anchor, entropies)

    def set_learning_rate_(self, rate: float) -> None:
        """Let the next update use `rate`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _move_(self, batches: list[Batch]) -> None:
        self.routing.forget()
        before = self._divergences(batches) if self.measures else []
        parameters = [*self.parameters.values()]
        self.process_group.sum_gradients_(parameters)
        self.precision.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._norm = norm.to(self.precision.device)
        states = [value for slots in self.optimizer.state.values() for value in slots.values()]
        self._former = [(tensor, tensor.detach().clone()) for tensor in [*parameters, *states]]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.router_max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._effect = [*before, *(self._divergences(batches) if self.measures else [])]

    @torch.no_grad()
    def _divergences(self, batches: list[Batch]) -> list[Tensor]:
        """forward_kl and reverse_kl over the window, sums."""
        sums = [torch.zeros((), device=self.precision.device) for _ in range(2)]
        with self.precision.same_random(), self.routing.same_draws():
            for batch in batches:
                outputs = self.objective.read(batch)
                for i, direction in enumerate(("forward", "reverse")):
                    sums[i] = sums[i] + self._terms[direction](batch, outputs).raw
        return sums

    def sums(self) -> list[Tensor]:
        """See `FrozenRouters`."""
        return [*self._sums.values()[1:], *self._effect]

    def norms(self) -> list[Tensor]:
        """See `FrozenRouters`."""
        return [self._norm]

    def report(self, sums: list[float], norms: list[float], num_targets: int) -> RouterReport:
        """See `FrozenRouters`."""
        count = max(1, num_targets)
        kl, balance, anchor, entropies = (value / count for value in sums[:4])
        (norm,), effect = norms, sums[4:]
        loss = kl + self.settings.router_beta * balance + self.settings.router_anchor * anchor
        names = [f"{kind}_kl_{when}" for when in ("before", "after") for kind in ("forward", "reverse")]
        measured = dict(zip(names, (value / count for value in effect), strict=True)) if effect else None
        return RouterReport(loss, kl, balance, anchor, entropies, norm, measured)

    # What stays

    @torch.no_grad()
    def changes(self) -> dict[str, float]:
        """||W - W0|| / ||W0|| of each parameter."""
        return {name: relative_change(p, self._initial[name]).sqrt().item() for name, p in self.parameters.items()}

    def check_frozen(self) -> None:
        """Raise FrozenTeacherChanged unless every other tensor of the teacher is what it was at the start."""
        if hash_frozen(self.objective.teacher, self.parameters) != self.frozen_sha256:
            raise FrozenTeacherChanged(
                "a frozen tensor of the teacher has changed during the run, so its result is void; the last "
                "checkpoint was proven to be sound when it was written"
            )

    def state_dict(self) -> dict:
        """Routers, optimizer, and what the teacher must be."""
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return {"parameters": values, "optimizer": self.optimizer.state_dict(), "frozen_sha256": self.frozen_sha256}

    def load_state_dict(self, state: dict) -> None:
        """Put it back.

        Raises: ValueError if the teacher is not the one that the state was made with
        """
        if state["frozen_sha256"] != self.frozen_sha256:
            raise ValueError("the teacher is not the one that the run began with")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def router_probs(gate: Gate, logits: Tensor) -> Tensor:
    """The router's distribution over all experts: softmax(z), or sigmoid(z) / sum sigmoid(z).

    logits: float [N, E]
    Returns: float [N, E], rows that add up to 1
    """
    return weights_of(dataclasses.replace(gate, normalised=True, scale=1.0), logits)


def load_balancing_loss(shares: Tensor, blocks: GroupSums) -> Tensor:
    """How unevenly each block's tokens are spread over the experts; 0 if evenly, E - 1 if all go to one.

    CV^2 = Var_e(P[e]) / Mean_e(P[e])^2,   P[e] = sum over the block's tokens n of s[n, e]

    shares: float [N, E]; blocks: the block of each token
    Returns: float [B]; a block without tokens has 0
    Source: Kim et al., 2025 (arXiv 2502.12947), section 3.3, of whose two terms the other is constant when every
    expert is active; taken for each sequence as in DeepSeek-AI, 2024 (arXiv 2412.19437), section 2.1.2
    """
    num_experts = shares.shape[1]
    sums = shares.new_zeros(blocks.count, num_experts).index_add_(0, blocks.index, shares)
    counts = blocks.sum(shares.new_ones(len(shares)))
    means = sums / counts.clamp_min(1.0)[:, None]
    return (num_experts * means.square().sum(1) - 1.0).where(counts > 0, 0.0)


def entropy(shares: Tensor) -> Tensor:
    """How undecided a router is about each token: 1 if all experts are alike to it, 0 if only one counts.

    H[n] = -sum_e s[n, e] log s[n, e] / log E

    shares: float [N, E]
    Returns: float [N]
    """
    return -torch.special.xlogy(shares, shares).sum(1) / math.log(shares.shape[1])


def relative_change(weight: Tensor, initial: Tensor) -> Tensor:
    """||W - W0||^2 / ||W0||^2, the squared distance from the beginning in units of the beginning; a scalar."""
    return (weight - initial).square().sum() / initial.square().sum().clamp_min(1e-12)


@dataclass(frozen=True)
class RouterTerms(Sums):
    """Sums over a batch's target tokens, fp32 scalars on the device; all but `total` without a gradient."""

    total: Tensor
    """What the routers minimise"""
    divergence: Tensor
    """Of teacher and student, nats"""
    balance: Tensor
    """`load_balancing_loss`, mean over routers"""
    anchor: Tensor
    """`relative_change`, mean over routers"""
    entropy: Tensor
    """`entropy`, mean over routers"""

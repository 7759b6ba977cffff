"""The routers of a teacher in a run: frozen, or trained from the student (student-aware routers, SAR).

Student and routers minimise different losses, each with the other's output held constant (sg: stop gradient):

    student  alpha_ce * CE + alpha_kd * T^2 * D(sg[teacher], student)
    routers  T^2 * D(teacher, sg[student]) + beta * CV^2 + anchor * ||W - W0||^2 / ||W0||^2

D of the routers is the divergence in `--router_direction`, KL(teacher || student) by default. CV^2 balances the load
of the experts (`load_balancing_loss`). The anchor pulls the router weights W to their initial values W0: L2-SP,
relative to their size. Terms that depend on text are computed for each block and weighted by its number of target
tokens, so they do not depend on how a step is divided into micro-batches.

Source: Kim et al., 2025 (arXiv 2502.12947), equation 9 and algorithm 2; the anchor: Li et al., 2018 (arXiv 1802.01483)
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
from sar_kd.losses.distillation import ForwardOutputs
from sar_kd.losses.functional import GroupSums, SummedTerms
from sar_kd.losses.objective import Objective, build_distillation
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.teacher.moe.discovery import Gate, router_parameters
from sar_kd.teacher.moe.router_checkpoint import FrozenTeacherChanged, hash_frozen, hash_rounded, hash_routers
from sar_kd.teacher.moe.routing_hooks import Routing, weights_of


@dataclass(frozen=True)
class RouterReport:
    """Metrics of one attempted router update: means over target tokens, divergences in nats."""

    router_loss: float
    router_kl: float
    """Between teacher and student in `--router_direction`, before the update"""
    router_balance: float
    router_anchor: float
    router_entropy: float
    router_grad_norm: float
    """L2, after unscaling, before clipping"""
    router_effect: dict[str, float] | None = None
    """Where measured: both divergences before and after the update, on the same text, against the same student"""


class FrozenRouters:
    """Routers that do not learn; also the interface through which a training step updates routers."""

    is_joint = False
    """The routers learn from the same forwards as the student"""

    def update_before_student_(self, batches: list[Batch], num_targets: int) -> None:
        """Update the routers before the student's forward."""

    def loss(self, batch: Batch, outputs: ForwardOutputs) -> Tensor | float:
        """The loss to add to the student's before the backward: a sum over target tokens."""
        return 0.0

    def update_after_student_(self, batches: list[Batch]) -> None:
        """Update the routers after the student's backward."""

    def commit_or_roll_back_(self, applied: bool) -> None:
        """Keep the update if the step is applied, else undo it."""

    def sums(self) -> list[Tensor]:
        """The scalars of `report` that are summed over ranks; on the device."""
        return []

    def norms(self) -> list[Tensor]:
        """The scalars of `report` that are equal on all ranks; on the device."""
        return []

    def report(self, sums: list[float], norms: list[float], num_targets: int) -> RouterReport | None:
        """The metrics of the step, from the values of `sums` and `norms`."""
        return None


FROZEN_ROUTERS = FrozenRouters()


class RouterTrainer(FrozenRouters):
    """Trains the routers from the student. They are float32 in a teacher of any dtype; the rest of it stays frozen.

    two_stage  a pass of their own over the micro-batches and an update, then the student learns from the new teacher
    joint      both losses from the same forwards, the update after the student's backward

    An update is made before the guards have judged the step. If they refuse it, weights and optimizer state are
    restored bit for bit.
    """

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
        self.measures_effect = False
        """Measure the effect of the next update: two more forwards of both models"""
        # Over the teacher's whole vocabulary, without clamps, whatever the student's loss is.
        whole = dataclasses.replace(loss, logit_clamp_style="off", teacher_top_k=0)
        self._divergences = {
            direction: build_distillation(
                dataclasses.replace(whole, kd_direction=direction), aligner, objective.student, objective.teacher
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
        self.rounded_sha256 = hash_rounded(objective.teacher, self._initial)
        # No weight decay: the anchor pulls to the initial weights, not to 0.
        self.optimizer = torch.optim.AdamW(
            [*self.parameters.values()], lr=settings.router_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._reset()

    def _reset(self) -> None:
        """Start a new step."""
        self._sums = RouterTerms.zero(self.precision.device)
        self._grad_norm = torch.zeros((), device=self.precision.device)
        self._effect: list[Tensor] = []
        self._backup: list[tuple[Tensor, Tensor]] = []

    # One step, in the order of its calls

    def set_learning_rate_(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def update_before_student_(self, batches: list[Batch], num_targets: int) -> None:
        if self.is_joint:
            return
        for batch in batches:
            with self.precision.fork_rng():  # the student's own pass draws the same dropout
                outputs = self.objective.forward_models(batch, student_grad=False, teacher_grad=True)
            self.precision.backward(self._loss(batch, outputs) / num_targets)
        self._update_(batches)

    def loss(self, batch: Batch, outputs: ForwardOutputs) -> Tensor | float:
        return self._loss(batch, outputs) if self.is_joint else 0.0

    def update_after_student_(self, batches: list[Batch]) -> None:
        if self.is_joint:
            self._update_(batches)

    def commit_or_roll_back_(self, applied: bool) -> None:
        if not applied:
            with torch.no_grad():
                for tensor, backup in self._backup:
                    tensor.copy_(backup)
            if len(self._backup) == len(self.parameters):  # the optimizer had no state yet
                self.optimizer.state.clear()
        self._reset()

    def sums(self) -> list[Tensor]:
        return [*self._sums.values()[1:], *self._effect]

    def norms(self) -> list[Tensor]:
        return [self._grad_norm]

    def report(self, sums: list[float], norms: list[float], num_targets: int) -> RouterReport:
        count = max(1, num_targets)
        kl, balance, anchor, entropies = (value / count for value in sums[:4])
        (grad_norm,), effect = norms, sums[4:]
        loss = kl + self.settings.router_beta * balance + self.settings.router_anchor * anchor
        names = [f"{direction}_kl_{when}" for when in ("before", "after") for direction in ("forward", "reverse")]
        measured = dict(zip(names, (value / count for value in effect), strict=True)) if effect else None
        return RouterReport(loss, kl, balance, anchor, entropies, grad_norm, measured)

    # The loss and the update

    def _loss(self, batch: Batch, outputs: ForwardOutputs) -> Tensor:
        terms = self.terms(batch, outputs)
        self._sums = self._sums + terms
        return terms.total

    def terms(self, batch: Batch, outputs: ForwardOutputs) -> RouterTerms:
        """The terms of the routers' loss for the last forward. The student gets no gradient."""
        outputs = dataclasses.replace(outputs, student=outputs.student.detach())
        divergence = self._divergences[self.settings.router_direction](batch, outputs)
        (num_blocks, width), positions = batch.teacher.input_ids.shape, batch.teacher.positions
        blocks = GroupSums(positions // width, num_blocks)
        ones = torch.ones(batch.num_target_tokens, device=self.precision.device)
        num_targets = GroupSums(batch.student.positions // batch.student.input_ids.shape[1], num_blocks).sum(ones)
        balance = entropies = torch.zeros((), device=self.precision.device)
        for spec, logits in zip(self.routing.specs, self.routing.logits, strict=True):
            probs = router_probs(spec.gate, logits[positions])
            balance = balance + (num_targets * load_balancing_loss(probs, blocks)).sum()
            num_positions = blocks.sum(torch.ones_like(probs[:, 0])).clamp_min(1.0)
            entropies = entropies + (num_targets * (blocks.sum(entropy(probs.detach())) / num_positions)).sum()
        changes = [relative_change(p, self._initial[name]) for name, p in self.parameters.items()]
        anchor = torch.stack(changes).mean() * batch.num_target_tokens
        balance, entropies = balance / len(self.routing.specs), entropies / len(self.routing.specs)
        total = divergence.loss + self.settings.router_beta * balance + self.settings.router_anchor * anchor
        return RouterTerms(total, divergence.unclamped, balance, anchor, entropies)

    def _update_(self, batches: list[Batch]) -> None:
        self.routing.forget()
        before = self._measure_divergences(batches) if self.measures_effect else []
        parameters = [*self.parameters.values()]
        self.process_group.all_reduce_gradients_(parameters)
        self.precision.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._grad_norm = grad_norm.to(self.precision.device)
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        self._backup = [(tensor, tensor.detach().clone()) for tensor in [*parameters, *states]]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.router_max_grad_norm, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._effect = [*before, *(self._measure_divergences(batches) if self.measures_effect else [])]

    @torch.no_grad()
    def _measure_divergences(self, batches: list[Batch]) -> list[Tensor]:
        """forward_kl and reverse_kl of the step's micro-batches, summed."""
        sums = [torch.zeros((), device=self.precision.device) for _ in range(2)]
        with self.precision.fork_rng(), self.routing.fork_rng():
            for batch in batches:
                outputs = self.objective.forward_models(batch)
                for i, direction in enumerate(("forward", "reverse")):
                    sums[i] = sums[i] + self._divergences[direction](batch, outputs).unclamped
        return sums

    # Over the run

    @torch.no_grad()
    def changes(self) -> dict[str, float]:
        """||W - W0|| / ||W0|| of each parameter."""
        return {name: relative_change(p, self._initial[name]).sqrt().item() for name, p in self.parameters.items()}

    def check_frozen(self) -> None:
        """Raise FrozenTeacherChanged unless every other tensor of the teacher is what it was at the start."""
        if hash_frozen(self.objective.teacher, self.parameters) != self.frozen_sha256:
            raise FrozenTeacherChanged(
                "a frozen tensor of the teacher has changed during the run, so its result is void; the last "
                "checkpoint was verified when it was written"
            )

    def state_dict(self) -> dict:
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return {"parameters": values, "optimizer": self.optimizer.state_dict(), "frozen_sha256": self.frozen_sha256}

    def load_state_dict(self, state: dict) -> None:
        """Restore routers and optimizer. Raises: ValueError if the state belongs to another teacher."""
        if state["frozen_sha256"] != self.frozen_sha256:
            raise ValueError("the teacher is not the one that the run began with")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class RouterTerms(SummedTerms):
    """Sums over a batch's target tokens, fp32 scalars on the device; the backward is that of `total`."""

    total: Tensor
    """The loss that the routers minimise"""
    divergence: Tensor
    """Between teacher and student, nats"""
    balance: Tensor
    """`load_balancing_loss`, mean over routers"""
    anchor: Tensor
    """`relative_change`, mean over router parameters"""
    entropy: Tensor
    """`entropy`, mean over routers"""


def router_probs(gate: Gate, logits: Tensor) -> Tensor:
    """The router's distribution over all experts: softmax(z), or sigmoid(z) / sum sigmoid(z).

    logits: float [N, E]
    Returns: float [N, E], each row sums to 1
    """
    return weights_of(dataclasses.replace(gate, normalised=True, scale=1.0), logits)


def load_balancing_loss(probs: Tensor, blocks: GroupSums) -> Tensor:
    """How unevenly the tokens of each block use the experts: 0 if evenly, E - 1 if all use one.

    CV^2 = Var_e(P[e]) / Mean_e(P[e])^2,   P[e] = sum over the block's tokens n of p[n, e]

    probs: float [N, E]; blocks: the block of each token
    Returns: float [B]; 0 for a block without tokens
    Source: Kim et al., 2025 (arXiv 2502.12947), section 3.3, whose second term is constant when every expert is
    active; per sequence as in DeepSeek-AI, 2024 (arXiv 2412.19437), section 2.1.2
    """
    num_experts = probs.shape[1]
    sums = probs.new_zeros(blocks.count, num_experts).index_add_(0, blocks.index, probs)
    counts = blocks.sum(probs.new_ones(len(probs)))
    means = sums / counts.clamp_min(1.0)[:, None]
    return (num_experts * means.square().sum(1) - 1.0).where(counts > 0, 0.0)


def entropy(probs: Tensor) -> Tensor:
    """The router's normalised entropy for each token: 1 if all experts are equally likely, 0 if one has everything.

    H[n] = -sum_e p[n, e] log p[n, e] / log E

    probs: float [N, E]
    Returns: float [N]
    """
    return -torch.special.xlogy(probs, probs).sum(1) / math.log(probs.shape[1])


def relative_change(weight: Tensor, initial: Tensor) -> Tensor:
    """||W - W0||^2 / ||W0||^2: the squared distance to the initial weights, relative to them; a scalar."""
    return (weight - initial).square().sum() / initial.square().sum().clamp_min(1e-12)

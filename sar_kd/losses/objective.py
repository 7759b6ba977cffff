"""The objective of a training step: runs both models on a `Batch` and gives its `LossTerms`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.segments import positions_per_tile, split_range
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import Batch
from sar_kd.losses.baselines import ChunkLikelihood, HiddenStates, SortedProbabilities, Strict
from sar_kd.losses.distillation import Distillation, DistillationTerms, ForwardOutputs, TokenLevel
from sar_kd.losses.functional import LogitClamp, LossClamp, SummedTerms
from sar_kd.losses.projection.loss import Projection
from sar_kd.losses.tiled_loss import Tile, TiledLossSpec, tiled_loss
from sar_kd.models.lm_head import LazyLogits, LMHeads, forward_to_lm_head, text_config_of
from sar_kd.models.memory_saving import Offload
from sar_kd.runtime.precision import Precision


@dataclass(frozen=True)
class LossTerms(SummedTerms):
    """Sums over a batch's target tokens, in nats, as fp32 scalars on the device; never a mean."""

    total: Tensor
    """The loss to minimise, with all clamps"""
    ce: Tensor
    """Unclamped cross-entropy of text that is not on-policy; no gradient"""
    kd: Tensor
    """Unclamped distillation loss; no gradient"""
    nonfinite_positions: Tensor
    """Student positions whose logits are not finite, or whose cross-entropy is to be learned and infinite"""
    dropped_positions: Tensor
    """Teacher positions left out of distillation: their logits are not finite, or the divergence is infinite"""
    infinite_positions: Tensor
    """See `TileLoss`"""
    unshared_positions: Tensor
    """See `TileLoss`"""


LogitsAndStates = tuple[LazyLogits, Tensor | None]
"""A model's logits at every position, and its last hidden states where the method needs them"""


class Objective:
    """alpha_ce * CE(text) + alpha_kd * distillation, with the logit and loss clamps.

    With N target tokens in the batch, total = N * clamp(alpha_ce * clamp(CE / N) + alpha_kd * KD / N): the loss clamp
    acts on the means of a micro-batch. So splitting a step into other micro-batches changes nothing unless a mean is
    above the limit.
    """

    def __init__(
        self,
        teacher: Any,
        student: nn.Module,
        config: LossConfig,
        aligner: Aligner,
        precision: Precision,
        offload: Offload | None = None,
        heads: LMHeads | None = None,
    ):
        """offload: moves the teacher to the CPU after `precompute_teacher`; heads: LM heads verified earlier"""
        self.teacher, self.student, self.precision = teacher, student, precision
        self.alpha_ce, self.alpha_kd = config.alpha_ce, config.alpha_kd
        self.logit_clamp = LogitClamp(config.logit_clamp_style, config.logit_clamp)
        self.loss_clamp = LossClamp(config.loss_clamp_style, config.loss_clamp)
        self.heads, self._offload = heads or LMHeads(precision), offload
        for model in (student, teacher) if self.alpha_kd > 0 and teacher is not None else (student,):
            self.heads.of(model)  # verified now, because that synchronises with the device
        self._positions_per_tile = positions_per_tile(config.loss_workspace_mb, aligner.pair.student_vocab_size)
        self.distillation = None
        if self.alpha_kd > 0:
            self.distillation = build_distillation(config, aligner, student, teacher).to(precision.device)

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters beside the student's: the projection of hidden states, if any."""
        return [] if self.distillation is None else list(self.distillation.parameters())

    def state_dict(self) -> dict:
        """The values of `parameters`."""
        return {} if self.distillation is None else self.distillation.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore them."""
        if self.distillation is not None:
            self.distillation.load_state_dict(state)

    def __call__(
        self, batch: Batch, outputs: ForwardOutputs | None = None, grad_scale: Tensor | float = 1.0
    ) -> LossTerms:
        """The loss of a batch, differentiable in the student alone.

        outputs: from `forward_models`, which is called if None
        grad_scale: the factor of the total in the caller's backward; gradients are rounded to half with it
        """
        outputs = self.forward_models(batch) if outputs is None else outputs
        outputs = dataclasses.replace(outputs, teacher=outputs.teacher and outputs.teacher.detach())
        count, targets = batch.num_target_tokens, batch.student.targets
        alpha_ce = 0.0 if batch.is_on_policy else self.alpha_ce

        def ce_factor(ce: Tensor) -> Tensor:
            return self.loss_clamp.grad_factor(ce / count)

        clamps = self.logit_clamp, ce_factor if self.loss_clamp.style != "off" and alpha_ce > 0 else None
        method = self.distillation
        if method is not None and method.covers_text:  # one pass over tiles for both losses
            tiles, loss_and_grad = method.tiles(batch), method.loss_and_grad
        else:
            tiles = [Tile(part, slice(0), None, None) for part in split_range(count, self._positions_per_tile)]
            loss_and_grad = None
        spec = TiledLossSpec(tiles, targets, loss_and_grad, alpha_ce, self.alpha_kd, *clamps, grad_scale)
        sums = tiled_loss(spec, outputs.student, outputs.teacher)
        kd = DistillationTerms(sums.kd, sums.unclamped_kd, sums.dropped, sums.infinite, sums.unshared)
        if method is not None and not method.covers_text:
            kd = method(batch, outputs)
        mean = self.alpha_kd * kd.loss / count
        if alpha_ce:  # the cross-entropy may be infinite
            mean = mean + alpha_ce * self.loss_clamp(sums.ce / count)
        # The value has the clamps; the gradient is that of the tiled loss, in which the cross-entropy's clamp is.
        mean = mean + (sums.total - sums.total.detach()) / count
        unclamped_ce = torch.zeros_like(sums.unclamped_ce) if batch.is_on_policy else sums.unclamped_ce
        total = self.loss_clamp(mean) * count
        return LossTerms(total, unclamped_ce, kd.unclamped, sums.nonfinite, kd.dropped, kd.infinite, kd.unshared)

    def num_teacher_positions(self, batch: Batch) -> tuple[int, int]:
        """Teacher positions that distillation compares in a batch; and the same, but 0 if a cache has none of them."""
        if self.distillation is None or batch.num_target_tokens == 0:
            return 0, 0
        count, cached = self.distillation.num_positions(batch), batch.cached_logits
        return count, 0 if cached is not None and cached.is_missing else count

    def forward_models(
        self,
        batch: Batch,
        teacher: LogitsAndStates | None = None,
        student_grad: bool = True,
        teacher_grad: bool = False,
    ) -> ForwardOutputs:
        """Run both models up to their LM heads, each with a graph if asked; the student alone without distillation.

        teacher: its outputs from `precompute_teacher`; it is run if None
        """
        student, student_states = self._forward(self.student, batch.student.input_ids, student_grad)
        student = dataclasses.replace(student, states=student.states[batch.student.positions])
        if self.distillation is None or batch.cached_logits is not None:
            return ForwardOutputs(student, None if self.distillation is None else batch.cached_logits)
        if teacher is None:
            teacher = self._forward(self.teacher, batch.teacher.input_ids, teacher_grad)
        return ForwardOutputs(student, teacher[0], student_states, teacher[1])

    def precompute_teacher(self, batches: Sequence[Batch]) -> list[LogitsAndStates | None]:
        """Run an offloaded teacher on all micro-batches of a step, then move its weights to the CPU.

        Returns: the argument `teacher` of each batch's `forward_models`; None for each if no teacher is offloaded
        """
        if self._offload is None or self.distillation is None:
            return [None] * len(batches)
        outputs = [self._forward(self.teacher, batch.teacher.input_ids, needs_grad=False) for batch in batches]
        self._offload.to_cpu_()
        return [*outputs]

    def _forward(self, model: nn.Module, input_ids: Tensor, needs_grad: bool) -> LogitsAndStates:
        needs_states = self.distillation is not None and self.distillation.needs_states
        with torch.set_grad_enabled(needs_grad and torch.is_grad_enabled()):
            return forward_to_lm_head(model, self.heads.of(model), input_ids, self.precision, needs_states)


_METHODS: dict[str, type[Distillation]] = {
    "projection": Projection,
    "strict": Strict,
    "alm": ChunkLikelihood,
    "uld": SortedProbabilities,
}


def build_distillation(
    config: LossConfig, aligner: Aligner, student: nn.Module, teacher: nn.Module | None
) -> Distillation:
    """The method that `--alignment` names; for auto, token by token for equal tokenizers, else byte-prefix projection.

    teacher: None if its logits are cached; then there are no hidden states
    """
    if config.alignment == "hidden":
        widths = (text_config_of(model).hidden_size for model in (student, teacher))
        return HiddenStates(config, aligner, *widths)
    default: type[Distillation] = TokenLevel if aligner.pair.tables is None else Projection
    method = _METHODS.get(config.alignment, default)(config, aligner)
    takes_top_k = isinstance(method, TokenLevel) or (isinstance(method, Projection) and aligner.teacher_is_coarser)
    if teacher is None and takes_top_k:
        # No tile of the teacher's logits is made, so the student's tiles may use the whole workspace.
        method.positions_per_tile = positions_per_tile(config.loss_workspace_mb, aligner.pair.student_vocab_size)
    return method

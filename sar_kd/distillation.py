"""What the student learns from the teacher on one batch, by kind of alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sar_kd.config import LossConfig
from sar_kd.data import Batch
from sar_kd.losses import (
    ABSENT,
    Divergence,
    LogitClamp,
    Segments,
    chunk_likelihood,
    finite_rows,
    sorted_distance,
    state_distance,
    target_log_probs,
)
from sar_kd.pairing import Alignment, Pairing
from sar_kd.projection import (
    Continuations,
    Fold,
    add_other_ways,
    on_support,
    poor_log_probs,
    read,
    renormalised,
    rich_log_probs,
)


@dataclass(frozen=True)
class Outputs:
    """What both models make of a batch."""

    student_logits: Tensor
    """float [N, V_s]: the rows that predict a target"""
    teacher_logits: Tensor
    """float [B * T_t, V_t]: every row"""
    student_states: Tensor | None = None
    """float [B * T_s, D_s]: last hidden states, where a term asks for them"""
    teacher_states: Tensor | None = None
    """float [B * T_t, D_t]"""


_Sums = tuple[Tensor, Tensor]
"""What is minimised, and the same as it is."""


class Learned(NamedTuple):
    """The distillation term of a batch: sums over its target tokens, nats; fp32 scalars."""

    loss: Tensor
    """What is minimised"""
    raw: Tensor
    """The same as it is: no floor, no gradient"""
    dropped: Tensor
    """Teacher rows left out because they are not finite"""


class Distillation(nn.Module):
    """A term of the loss, called with a batch and both models' outputs; what it has in common with the others."""

    needs_states = False

    def __init__(self, config: LossConfig, pairing: Pairing):
        super().__init__()
        self.temperature = config.temperature
        # 0: the whole vocabulary.
        self.top_k = config.teacher_top_k if config.teacher_top_k < pairing.pair.teacher_rows else 0
        self.clamp = LogitClamp(config.logit_clamp_style, config.logit_clamp)
        floor = -2.0 * self.clamp.bound if self.clamp.style == "normalized" else -torch.inf
        self.divergence = Divergence(config.kd_direction, config.jsd_beta, floor)

    def _bounded(self, logits: Tensor) -> Tensor:
        return self.clamp.logits(logits) if self.clamp.style == "raw" else logits

    def _teacher_rows(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that are safe to compute with, cut to their top k, and which of them count. Changes `logits`."""
        keep = finite_rows(logits)
        logits = self._bounded(logits).masked_fill_(~keep[:, None], 0.0)
        return self._top(logits), keep

    def _top(self, logits: Tensor) -> Tensor:
        """The teacher's logits with all but each row's top k `ABSENT`."""
        if not self.top_k:
            return logits
        best = logits.float().topk(self.top_k)
        return torch.full_like(logits, ABSENT, dtype=torch.float32).scatter_(1, best.indices, best.values)

    def _diverge(self, student: Tensor, teacher: Tensor, keep: Tensor) -> Learned:
        """From logits [K, C] at the temperature; T^2 keeps the size of the gradient (arXiv 1503.02531, section 2)."""
        if self.top_k:
            student = on_support(student, teacher)
        sums = self.divergence(student.log_softmax(-1), teacher.log_softmax(-1), keep[:, None])
        return Learned(*(total * self.temperature**2 for total in sums), (~keep).sum())


class TokenLevel(Distillation):
    """T^2 * D(teacher || student), token by token: for equal tokenizers."""

    def forward(self, batch: Batch, outputs: Outputs) -> Learned:
        """See `Distillation`."""
        teacher, keep = self._teacher_rows(outputs.teacher_logits[batch.alignment.teacher_rows])
        # Heads may be padded to different sizes; the rows they share are the tokens.
        shared = min(outputs.student_logits.shape[1], teacher.shape[1])
        student, teacher = self._bounded(outputs.student_logits)[:, :shared], teacher[:, :shared]
        return self._diverge(student.float() / self.temperature, teacher.float() / self.temperature, keep)


class Projected(Distillation):
    """T^2 * D(teacher || student) over the outcomes that both vocabularies can tell apart, wherever either starts a
    token. See `projection`.

    Where both start one, the richer side's probability is that of all its ways to write an outcome: ending the token
    before and starting the next, or having gone on. Where only the poorer starts one, the richer has gone on; that it
    might have ended is one outcome, what it would have written then is not known.
    """

    def __init__(self, config: LossConfig, pairing: Pairing):
        super().__init__(config, pairing)
        classes, self.teacher_is_richer = pairing.open_classes, pairing.teacher_is_richer
        self.student_fold = Fold(classes.student_tokens, classes.student_classes, classes.count)
        self.teacher_fold = Fold(classes.teacher_tokens, classes.teacher_classes, classes.count)

    def forward(self, batch: Batch, outputs: Outputs) -> Learned:
        """See `Distillation`."""
        alignment, in_teacher, in_student = batch.alignment, batch.alignment.in_teacher, batch.alignment.in_student
        sound = finite_rows(outputs.teacher_logits)
        teacher, student = self._top(self._bounded(outputs.teacher_logits)), self._bounded(outputs.student_logits)
        student = read(student, self.student_fold, alignment.student_rows, in_teacher, in_student, self.temperature)
        teacher = read(
            teacher, self.teacher_fold, alignment.teacher_rows, in_student, in_teacher, self.temperature, sound
        )
        told, said = rich_log_probs(teacher.entries, in_teacher), rich_log_probs(student.entries, in_student)
        sums = [self._inside_teacher(student.rows, told, in_teacher, sound[in_teacher.rich_rows])]
        sums.append(self._inside_student(said, teacher.rows, in_student, sound[in_student.poor_rows]))
        sums.append(self._open(student.open, teacher.open, alignment, told if self.teacher_is_richer else said, sound))
        rows = alignment.teacher_rows, in_teacher.rich_rows[: len(in_teacher.poor_rows)], in_student.poor_rows
        loss, raw = (self.temperature**2 * sum(parts) for parts in zip(*sums, strict=True))
        return Learned(loss, raw, (~sound[torch.cat(rows)]).sum())

    def _inside_teacher(self, logits: Tensor, told: Tensor, rows: Continuations, counts: Tensor) -> _Sums:
        """Where only the student starts a token."""
        said = poor_log_probs(logits, rows, self.divergence.direction == "reverse" or bool(self.top_k))
        return self._going_on(said, told[: len(said)], rows, counts[: len(logits)])

    def _inside_student(self, said: Tensor, logits: Tensor, rows: Continuations, counts: Tensor) -> _Sums:
        """Where only the teacher starts a token."""
        told = poor_log_probs(logits, rows, must_end=True)
        return self._going_on(said[: len(told)], told, rows, counts)

    def _going_on(self, student: Tensor, teacher: Tensor, rows: Continuations, counts: Tensor) -> _Sums:
        of_rows = rows.outcome_rows[: rows.num_going_on]
        if self.top_k:
            segments = Segments(of_rows, len(rows.poor_rows))
            student, teacher, shared = renormalised(on_support(student, teacher), teacher, segments)
            counts = counts & shared
        return self.divergence(student, teacher, counts[of_rows])

    def _open(self, student: Tensor, teacher: Tensor, alignment: Alignment, going_on: Tensor, sound: Tensor) -> _Sums:
        rows = alignment.in_teacher if self.teacher_is_richer else alignment.in_student
        ways = (going_on, alignment.ended, going_on[rows.ends], alignment.other_ways)
        counts = sound[alignment.teacher_rows]
        student, teacher = student.log_softmax(-1), self._told(teacher)
        if self.teacher_is_richer:
            teacher = add_other_ways(teacher, *ways)
            # Whether the token before was done is what that one's row says.
            counts = counts & torch.cat([sound[rows.rich_rows], sound.new_ones(1)])[alignment.ended]
        else:
            student = add_other_ways(student, *ways)
        if self.top_k:
            student, teacher, shared = renormalised(on_support(student, teacher), teacher)
            counts = counts & shared
        return self.divergence(student, teacher, counts[:, None])

    def _told(self, logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        # A row of which the top k say nothing stays without anything.
        return log_probs.where(logits > 1e-6 * ABSENT, ABSENT) if self.top_k else log_probs


class Strict(Distillation):
    """T^2 * D(teacher || student) where both predict the same bytes, over the teacher's top k of the shared tokens."""

    _LEAST_MASS = 0.1
    """A row counts if the tokens that both have hold this share of the teacher's probability."""

    def __init__(self, config: LossConfig, pairing: Pairing):
        super().__init__(config, pairing)
        self.register_buffer("same_token", pairing.same_token, persistent=False)

    def forward(self, batch: Batch, outputs: Outputs) -> Learned:
        """See `Distillation`."""
        alignment, size = batch.alignment, len(self.same_token)
        rows = outputs.teacher_logits[alignment.teacher_rows]
        keep = finite_rows(rows)
        rows = self._bounded(rows).masked_fill(~keep[:, None], 0.0).float() / self.temperature
        student = self._bounded(outputs.student_logits[alignment.student_rows]).float() / self.temperature
        if self.top_k:
            best = rows[:, :size].topk(self.top_k)
            partners = self.same_token[best.indices]
            teacher, student = best.values, student.gather(1, partners.clamp_min(0))
        else:
            partners = self.same_token
            teacher, student = rows[:, :size], student.index_select(1, partners.clamp_min(0))
        teacher = torch.where(partners >= 0, teacher, ABSENT)
        held = (teacher.logsumexp(1) - rows.logsumexp(1)).exp()
        counts = keep & alignment.strict & (held >= self._LEAST_MASS)
        loss, raw, _ = self._diverge(on_support(student, teacher), teacher, counts)
        return Learned(loss, raw, (~keep).sum())


class ChunkLikelihood(Distillation):
    """tau * KL between the two models' verdicts on each chunk; needs nothing but the probability of the text."""

    def __init__(self, config: LossConfig, pairing: Pairing):
        super().__init__(config, pairing)
        self.tau = config.alm_tau

    def forward(self, batch: Batch, outputs: Outputs) -> Learned:
        """See `Distillation`."""
        alignment = batch.alignment
        rows = outputs.teacher_logits[batch.teacher.rows]
        keep = finite_rows(rows)
        rows = self._bounded(rows).masked_fill(~keep[:, None], 0.0)
        said = target_log_probs(self._bounded(outputs.student_logits), batch.student.targets)
        student = _chunk_sums(self.clamp.log_probs(said), alignment.student_chunks, alignment.num_chunks)
        raw = _chunk_sums(said.detach(), alignment.student_chunks, alignment.num_chunks)
        teacher = _chunk_sums(
            target_log_probs(rows, batch.teacher.targets), alignment.teacher_chunks, alignment.num_chunks
        )
        sound = _chunk_sums((~keep).float(), alignment.teacher_chunks, alignment.num_chunks) == 0
        # A chunk of which the teacher's part is not finite is given the same likelihood on both sides: no difference.
        student, raw, teacher = (torch.where(sound, likelihood, -1.0) for likelihood in (student, raw, teacher))
        return Learned(
            chunk_likelihood(student, teacher, self.tau), chunk_likelihood(raw, teacher, self.tau), (~keep).sum()
        )


def _chunk_sums(values: Tensor, chunks: Tensor, count: int) -> Tensor:
    """float [count]; what belongs to no chunk (-1) goes to one behind the last."""
    return Segments(torch.where(chunks < 0, count, chunks), count + 1).sum(values)[:count]


class SortedProbabilities(Distillation):
    """L1 between sorted probabilities where both start a token: ULD, a baseline. Neither T^2 nor a floor."""

    def forward(self, batch: Batch, outputs: Outputs) -> Learned:
        """See `Distillation`."""
        teacher, keep = self._teacher_rows(outputs.teacher_logits[batch.alignment.teacher_rows])
        student = self._bounded(outputs.student_logits[batch.alignment.student_rows])
        loss = sorted_distance(student, teacher, self.temperature, keep)
        return Learned(loss, loss.detach(), (~keep).sum())


class HiddenStates(Distillation):
    """Relative squared error of the last hidden states at the ends of chunks, where both have read the same bytes.

    The student's states pass a projection that is learned with it.
    """

    needs_states = True

    def __init__(self, config: LossConfig, pairing: Pairing, student_width: int, teacher_width: int):
        super().__init__(config, pairing)
        self.projection = nn.Linear(student_width, teacher_width, bias=False)

    def forward(self, batch: Batch, outputs: Outputs) -> Learned:
        """See `Distillation`."""
        states = outputs.teacher_states[batch.alignment.teacher_ends]
        keep = finite_rows(states)
        states = states.masked_fill(~keep[:, None], 0.0)
        projected = self.projection(outputs.student_states[batch.alignment.student_ends].float())
        loss = state_distance(projected, states, keep)
        return Learned(loss, loss.detach(), (~keep).sum())


_KINDS = {
    "projection": Projected,
    "strict": Strict,
    "alm": ChunkLikelihood,
    "uld": SortedProbabilities,
    "hidden": HiddenStates,
}


def build_distillation(config: LossConfig, pairing: Pairing, student: nn.Module, teacher: nn.Module) -> Distillation:
    """The term that `--alignment` names. auto: token by token for equal tokenizers, else the projection."""
    if config.alignment == "auto":
        kind = TokenLevel if pairing.pair.tables is None else Projected
    else:
        kind = _KINDS[config.alignment]
    widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
    return kind(config, pairing, *(widths if kind is HiddenStates else ()))

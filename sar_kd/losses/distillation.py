"""The distillation term: what the student learns from the teacher on one batch, and how for equal tokenizers.

The likeliest tokens of teacher rows: cut from logits that are there, or as they were stored before.

A teacher cut to its top k is a distribution over k + 1 outcomes: those tokens, and the rest. Logits are known up to a
constant of the row, so log-probabilities at temperature 1 serve for the k tokens at every temperature; the rest at a
temperature is a number of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.segments import positions_per_tile
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import MASKED_LOGIT, Batch, TopKLogits
from sar_kd.losses.divergence import Divergence, Learner, diverge, softmax_slopes, through_softmax_
from sar_kd.losses.functional import LogitClamp
from sar_kd.losses.tiled_loss import Compared, Loss, Single, Slopes, Teacher, Tile, stretches_of, tiled_loss
from sar_kd.models.lm_head import LazyLogits
from sar_kd.models.logit_tiles import Logs, column_logsumexp, finite_columns, flat, normalised, silence_


@dataclass(frozen=True)
class Outputs:
    """What both models make of a batch."""

    student: LazyLogits
    """[N, ...]: the rows that predict a target"""
    teacher: Teacher | None
    """[B * T_t, ...]: every row; None where nothing is distilled"""
    student_states: Tensor | None = None
    """float [B * T_s, D_s]: last hidden states, where a term asks for them"""
    teacher_states: Tensor | None = None
    """float [B * T_t, D_t]"""


Sums = tuple[Tensor, Tensor]
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
    covers_text = False
    """Its tiles hold every row that the student predicts something in, each once"""

    def __init__(self, config: LossConfig, aligner: Aligner):
        super().__init__()
        self.temperature = config.temperature
        # 0: the whole vocabulary.
        self.top_k = config.teacher_top_k if config.teacher_top_k < aligner.pair.teacher_vocab_size else 0
        self.teacher_vocab_size, self.teacher_tokens = aligner.pair.teacher_vocab_size, aligner.pair.teacher_tokens
        self.clamp = LogitClamp(config.logit_clamp_style, config.logit_clamp)
        floor = -2.0 * self.clamp.bound if self.clamp.style == "normalized" else -torch.inf
        self.divergence = Divergence(config.kd_direction, config.jsd_beta, floor)
        self.tile_rows = positions_per_tile(
            config.loss_workspace_mb, aligner.pair.student_vocab_size, aligner.pair.teacher_vocab_size
        )

    def forward(self, batch: Batch, outputs: Outputs) -> Learned:
        """The term of a batch, with a gradient for the teacher if its states have a graph, else for the student."""
        learner = "teacher" if outputs.teacher is not None and outputs.teacher.learns else "student"
        loss = Loss(self.tiles(batch), None, self.compare, 0.0, 1.0, self.clamp, learner=learner)
        sums = tiled_loss(loss, outputs.student, outputs.teacher)
        return Learned(sums.minimised, sums.raw_kd, sums.dropped)

    def tiles(self, batch: Batch) -> list[Tile]:
        """The pairs of rows where both start a token, in stretches."""
        pairs = batch.alignment
        parts = stretches_of(len(pairs.strict), self.tile_rows)
        return [Tile(pairs.student_rows[p], pairs.teacher_rows[p], part=pairs.strict[p]) for p in parts]

    def compare(self, student: Tensor, teacher: Tensor | TopKLogits, part: Any, learner: str | None) -> Compared:
        """Two tiles of logits, float32 [V_s, n] and [V_t, m], or what is stored of the teacher's. See `Compared`.

        part: what `tiles` put beside them
        """
        if learner is None:
            loss, raw, dropped = self.between(student, teacher, part)
            return Compared(loss, raw, dropped, None)
        leaf = student if learner == "student" else whole_tile(teacher)
        with torch.enable_grad():
            leaf.requires_grad_()
            loss, raw, dropped = self.between(student, teacher, part)
        (slopes,) = torch.autograd.grad(loss, leaf)
        return Compared(loss.detach(), raw.detach(), dropped.detach(), Slopes(((0, slopes),)))

    def between(self, student: Tensor, teacher: Tensor | TopKLogits, part: Any) -> Learned:
        """The term of two tiles, as `compare` has them, with a graph; for kinds whose slopes autograd finds."""
        raise NotImplementedError

    def _top(self, teacher: Tensor | TopKLogits, size: int | None = None) -> TopKLogits:
        """The teacher's top k, of the first `size` tokens if it is given."""
        if isinstance(teacher, TopKLogits):
            return teacher.first(self.top_k, self.temperature)
        return top_of(teacher, self.top_k, min(self.teacher_tokens, size or self.teacher_tokens), self.temperature)


def whole_tile(teacher: Tensor | TopKLogits) -> Tensor:
    """A teacher's tile where none is cut: what is stored always is."""
    assert isinstance(teacher, Tensor)
    return teacher


class TokenLevel(Distillation):
    """T^2 * D(teacher || student), token by token: for equal tokenizers."""

    covers_text = True

    def tiles(self, batch: Batch) -> list[Tile]:
        """Every row with its own, in stretches."""
        rows = batch.alignment.teacher_rows
        return [Tile(part, rows[part]) for part in stretches_of(len(rows), self.tile_rows)]

    def compare(self, student: Tensor, teacher: Tensor | TopKLogits, part: Any, learner: str | None) -> Compared:
        """Two tiles of logits; leaves the slopes in the place of the other side's. See `Compared`."""
        if self.top_k:
            assert learner != "teacher"
            top = self._top(teacher, min(len(student), self.teacher_tokens))
            return self._compare_tops(student, top, learner is not None)
        whole = whole_tile(teacher)
        # Heads may be padded to different sizes; the rows they share are the tokens.
        shared = min(len(student), len(whole))
        student, teacher, keep = student[:shared], whole[:shared], finite_columns(whole)
        silence_(teacher, keep)
        own, other = (normalised(tile, self.temperature) for tile in (student, teacher))
        if learner is None:
            return self._diverge(own, other, keep, None)
        slopes = teacher if learner == "student" else student
        compared = self._diverge(own, other, keep, Learner(learner, slopes))
        return compared._replace(slopes=Slopes(((0, slopes),)))

    def _compare_tops(self, student: Tensor, top: TopKLogits, learns: bool) -> Compared:
        """Over the teacher's top k and the rest."""
        places = (top.ids * student.stride(0) + torch.arange(student.shape[1], device=student.device)).reshape(-1)
        line = flat(student)
        kept = line.index_select(0, places)
        line.index_fill_(0, places, MASKED_LOGIT)
        rest = self.temperature * column_logsumexp(student, self.temperature)
        sides = torch.cat([kept.view_as(top.ids), rest[None]]), torch.cat([top.logits, top.rest[None]])
        own, other = (normalised(tile, self.temperature) for tile in sides)
        if not learns:
            line.index_copy_(0, places, kept)
            return self._diverge(own, other, top.sound, None)
        slopes = torch.empty_like(other.tile)
        compared = self._diverge(own, other, top.sound, Learner("student", slopes))
        spread = softmax_slopes(student, rest, slopes[-1], self.temperature)
        line.index_copy_(0, places, kept)
        return compared._replace(slopes=Slopes(((0, spread),), Single(places, slopes[:-1].reshape(-1))))

    def _diverge(self, student: Logs, teacher: Logs, keep: Tensor, learner: Learner | None) -> Compared:
        """The divergence of two sides over the same outcomes, and in the learner's place the slopes of its logits."""
        loss, raw, total = diverge(self.divergence, student, teacher, learner)
        # T^2 keeps the size of the gradient (arXiv 1503.02531, section 2); the logits' own slopes have one T less.
        if learner is not None:
            own = student if learner.side == "student" else teacher
            through_softmax_(learner.slopes, total, own, keep * self.temperature)
        counts = keep * self.temperature**2
        return Compared((loss * counts).sum(), (raw * counts).sum(), (~keep).sum(), None)


def top_of(tile: Tensor, k: int, num_tokens: int, temperature: float) -> TopKLogits:
    """The k likeliest of a vocabulary's tokens, and the rest.

    tile: float32 [V, n], logits; num_tokens: rows of it that stand for tokens, the others are a head's padding
    """
    sound = finite_columns(tile)
    best = tile[:num_tokens].topk(min(k, num_tokens), dim=0)
    rest = temperature * column_logsumexp(tile.scatter(0, best.indices, MASKED_LOGIT), temperature)
    return TopKLogits(best.indices, best.values.where(sound, 0.0), rest.where(sound, 0.0), sound)

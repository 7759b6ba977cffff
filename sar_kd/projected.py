"""Distillation across tokenizers: the divergence over the outcomes that both vocabularies can tell apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.columns import finite_columns, normalised, silence_
from sar_kd.config import LossConfig
from sar_kd.data import Batch
from sar_kd.distillation import Distillation, Learned, Sums
from sar_kd.heard import heard_outcomes
from sar_kd.losses import ABSENT, Segments
from sar_kd.other_ways import Opened, Ways, add_other_ways, open_divergence
from sar_kd.pairing import Pairing
from sar_kd.projection import (
    Continuations,
    Fold,
    on_support,
    poor_log_probs,
    read,
    renormalised,
    rich_log_probs,
)
from sar_kd.stretches import Stretch
from sar_kd.tiled import Compared, Slopes, Tile
from sar_kd.top import Top


class _Taken(NamedTuple):
    """What the continuations ask of one side's tile, at the temperature."""

    inside: Tensor
    """float32 [V, K_1]: whole columns, where the other side is the richer and goes on"""
    entries: Tensor
    """float32 [E]: single logits, where this side is the richer"""
    places: Tensor
    """int64 [E]: where in the flattened tile these are"""


class Projected(Distillation):
    """T^2 * D(teacher || student) over the outcomes that both vocabularies can tell apart, wherever either starts a
    token. See `projection`.

    Where both start one, the richer side's probability is that of all its ways to write an outcome: ending the token
    before and starting the next, or having gone on. Where only the poorer starts one, the richer has gone on; that it
    might have ended is one outcome, what it would have written then is not known.
    """

    covers_text = True

    def __init__(self, config: LossConfig, pairing: Pairing):
        super().__init__(config, pairing)
        classes, self.teacher_is_richer = pairing.open_classes, pairing.teacher_is_richer
        self.student_fold = Fold(classes.student_tokens, classes.student_classes, classes.count)
        self.teacher_fold = Fold(classes.teacher_tokens, classes.teacher_classes, classes.count)
        pairing.stretch_rows = self.tile_rows

    def tiles(self, batch: Batch) -> list[Tile]:
        """Stretches of text, with every row that the student predicts something in."""
        return [Tile(part.student_rows, part.teacher_rows, part.counts, part) for part in batch.stretches]

    def compare(self, student: Tensor, teacher: Tensor | Top, part: Stretch, learner: str | None) -> Compared:
        """Two tiles of logits; uses up the other side's. See `Compared`."""
        if self.top_k and self.teacher_is_richer and learner != "teacher":
            return self._compare_top(student, self._top(teacher), part, learner)
        if self.top_k:
            return super().compare(student, teacher, part, learner)
        sound, mine = finite_columns(teacher), {"student": 0, "teacher": 1}.get(learner)
        tiles = student, silence_(teacher, sound)
        records = part.in_student, part.in_teacher
        taken = [self._taken(tiles[i], part.num_open, records[1 - i], records[i]) for i in range(2)]
        leaves = () if mine is None else (taken[mine].inside.requires_grad_(), taken[mine].entries.requires_grad_())
        with torch.enable_grad():
            said, told = rich_log_probs(taken[0].entries, records[0]), rich_log_probs(taken[1].entries, records[1])
            sums = self._inside(said, told, taken[0].inside, taken[1].inside, part, sound)
            ways, counts = self._ways(told if self.teacher_is_richer else said, part, sound)
        opened, shares = self._opened(tiles, part.num_open, ways.detach(), mine, counts.float())
        scale = self.temperature**2
        loss, raw = (
            scale * (of_columns * counts).sum() + scale * of_inside.detach()
            for of_columns, of_inside in zip((opened.loss, opened.raw), sums, strict=True)
        )
        if mine is None:
            return Compared(loss, raw, self._dropped(part, sound), None)
        outputs, gradients = [sums[0]], [torch.ones_like(sums[0])]
        if opened.into_end is not None:
            outputs, gradients = (
                [*outputs, ways.going_on, ways.end],
                [*gradients, opened.into_going_on, opened.into_end],
            )
        back = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        into_inside, into_entries = (
            torch.zeros_like(leaf) if slope is None else slope.mul_(self.temperature)
            for leaf, slope in zip(leaves, back, strict=True)
        )
        (self.student_fold, self.teacher_fold)[mine].spread_(opened.slopes, shares)
        pieces = (0, opened.slopes), (part.num_open, into_inside)
        slopes = Slopes(pieces, taken[mine].places, into_entries)
        return Compared(loss, raw, self._dropped(part, sound), slopes)

    def _compare_top(self, student: Tensor, top: Top, part: Stretch, learner: str | None) -> Compared:
        """A teacher with the longer tokens, cut to its top k: of the student's logits no more is read than it speaks
        about.
        """
        in_teacher, in_student, num_open, fold = part.in_teacher, part.in_student, part.num_open, self.student_fold
        row, token, _ = in_teacher.rich_entries
        entries = top.logits_of(token, in_teacher.rich_rows[row], self.teacher_rows)
        told = rich_log_probs(entries.div_(self.temperature), in_teacher)
        columns = top.columns(num_open, num_open + len(in_student.poor_rows))
        inside = columns.spread(self.teacher_rows).div_(self.temperature)
        ways, counts = self._ways(told, part, top.sound)
        outcomes = heard_outcomes(top.columns(0, num_open), self.teacher_fold, ways, self.temperature)
        of = outcomes.outcomes.clamp_max(len(fold.first) - 1)
        taken = self._taken(student, num_open, in_teacher, in_student)
        several, shares = fold.several_of(student[:, :num_open], self.temperature)
        places = fold.first[of] * student.shape[1] + outcomes.columns
        single = student.view(-1).index_select(0, places).div_(self.temperature)
        leaves = taken.inside, taken.entries, single, several.div_(self.temperature)
        if learner is not None:
            for leaf in leaves:
                leaf.requires_grad_()
        with torch.enable_grad():
            said = rich_log_probs(taken.entries, in_student)
            sums = self._inside(said, told, taken.inside, inside, part, top.sound)
            joined = torch.cat([several, several.new_zeros(1, several.shape[1])])[fold.place[of], outcomes.columns]
            log_p = torch.where(fold.place[of] < 0, single, joined)
            segments = Segments(outcomes.columns, num_open)
            log_p, log_t, shared = renormalised(on_support(log_p, outcomes.log_probs), outcomes.log_probs, segments)
            opened = self.divergence(log_p, log_t, (counts & shared)[outcomes.columns])
            loss, raw = (self.temperature**2 * (a + b) for a, b in zip(sums, opened, strict=True))
        if learner is None:
            return Compared(loss, raw, self._dropped(part, top.sound), None)
        # T^2 of the loss, and 1 / T of the logits, are in the loss and in the leaves.
        back = torch.autograd.grad(loss, leaves, allow_unused=True)
        into = [
            torch.zeros_like(leaf) if slope is None else slope.div_(self.temperature)
            for leaf, slope in zip(leaves, back, strict=True)
        ]
        members = fold.members[:, None] * student.shape[1] + torch.arange(num_open, device=student.device)
        slopes = Slopes(
            ((num_open, into[0]),),
            torch.cat([taken.places, places, members.view(-1)]),
            torch.cat([into[1], into[2], into[3].index_select(0, fold.groups).mul_(shares).view(-1)]),
        )
        return Compared(loss.detach(), raw.detach(), self._dropped(part, top.sound), slopes)

    def _taken(self, tile: Tensor, num_open: int, as_poor: Continuations, as_rich: Continuations) -> _Taken:
        row, token, _ = as_rich.rich_entries
        places = token * tile.shape[1] + as_rich.rich_rows[row]
        inside = tile[:, num_open : num_open + len(as_poor.poor_rows)]
        entries = tile.view(-1).index_select(0, places)
        return _Taken(inside.div(self.temperature).contiguous(), entries.div_(self.temperature), places)

    def _opened(
        self, tiles: tuple[Tensor, Tensor], num_open: int, ways: Ways, mine: int | None, counts: Tensor
    ) -> tuple[Opened, Tensor]:
        """Where both start a token, with each outcome in the row of the learner's first token of it; the shares of the
        learner's tokens in those of several.
        """
        own = mine or 0
        folds, temperature = (self.student_fold, self.teacher_fold), self.temperature
        fold, columns = folds[own], tiles[own][: len(folds[own]), :num_open]
        carried = fold.carry(folds[1 - own], tiles[1 - own][:, :num_open], temperature)
        kept, shares = fold.enter_(columns, temperature)
        both = [normalised(side, temperature) for side in ((columns, carried) if own == 0 else (carried, columns))]
        rows = torch.stack([ways.others[0], fold.first[ways.others[1]], ways.others[2]])
        ways = ways._replace(others=rows)
        # T^2 of the loss, and 1 / T of the logits.
        rich, weight = int(self.teacher_is_richer), temperature
        opened = open_divergence(self.divergence, both, ways, rich, mine, counts, weight)
        fold.leave_(columns, kept)
        return opened, shares

    def _ways(self, going_on: Tensor, part: Stretch, sound: Tensor) -> tuple[Ways, Tensor]:
        """The richer side's other ways, and which columns count: bool [num_open]."""
        rows = part.in_teacher if self.teacher_is_richer else part.in_student
        counts = sound[: part.num_open]
        if self.teacher_is_richer:
            # Whether the token before was done is what that one's row says.
            counts = counts & torch.cat([sound[rows.rich_rows], sound.new_ones(1)])[part.ended]
        return Ways(going_on, going_on[rows.ends], part.ended, part.other_ways), counts

    def _dropped(self, part: Stretch, sound: Tensor) -> Tensor:
        """Teacher rows that are not finite, each as often as it would speak."""
        size = len(part.in_teacher.poor_rows)
        rows = torch.cat([part.in_teacher.rich_rows[:size], part.in_student.poor_rows])
        return (~sound[: part.num_open]).sum() + (~sound[rows]).sum()

    def _inside(
        self, said: Tensor, told: Tensor, student: Tensor, teacher: Tensor, part: Stretch, sound: Tensor
    ) -> Sums:
        """Where only one side starts a token, inside a token of the other.

        said, told: float32 [O], the richer's outcomes inside the student's and inside the teacher's tokens
        student, teacher: float32 [V, K_1], the poorer's columns there
        """
        in_teacher, in_student = part.in_teacher, part.in_student
        must_end = self.divergence.direction == "reverse" or bool(self.top_k)
        of_student = poor_log_probs(student, in_teacher, must_end), told[: in_teacher.num_going_on]
        of_teacher = said[: in_student.num_going_on], poor_log_probs(teacher, in_student, must_end=True)
        sums = [
            self._going_on(*of_student, in_teacher, sound[in_teacher.rich_rows[: len(in_teacher.poor_rows)]]),
            self._going_on(*of_teacher, in_student, sound[in_student.poor_rows]),
        ]
        return tuple(sum(parts) for parts in zip(*sums, strict=True))

    def _going_on(self, student: Tensor, teacher: Tensor, rows: Continuations, counts: Tensor) -> Sums:
        of_rows = rows.outcome_rows[: rows.num_going_on]
        if self.top_k:
            segments = Segments(of_rows, len(rows.poor_rows))
            student, teacher, shared = renormalised(on_support(student, teacher), teacher, segments)
            counts = counts & shared
        return self.divergence(student, teacher, counts[of_rows])

    def between(self, student: Tensor, teacher: Tensor | Top, part: Stretch) -> Learned:
        """Of one stretch, with a teacher cut to its top k: a sum with a graph for the side that has one."""
        in_teacher, in_student = part.in_teacher, part.in_student
        inside = len(in_teacher.poor_rows), len(in_student.poor_rows)
        teacher, sound = self._cut(teacher)
        student = read(student, self.student_fold, part.num_open, inside[0], in_student, self.temperature)
        teacher = read(teacher, self.teacher_fold, part.num_open, inside[1], in_teacher, self.temperature)
        told, said = rich_log_probs(teacher.entries, in_teacher), rich_log_probs(student.entries, in_student)
        sums = self._inside(said, told, student.rows, teacher.rows, part, sound)
        ways, counts = self._ways(told if self.teacher_is_richer else said, part, sound)
        heard = teacher.open > 1e-6 * ABSENT
        # A column of which the top k say nothing stays without anything.
        log_p, log_t = student.open.log_softmax(0), teacher.open.log_softmax(0).where(heard, ABSENT)
        if self.teacher_is_richer:
            log_t = add_other_ways(log_t, ways)
        else:
            log_p = add_other_ways(log_p, ways)
        log_p, log_t, shared = renormalised(on_support(log_p, log_t), log_t)
        opened = self.divergence(log_p, log_t, counts & shared)
        loss, raw = (self.temperature**2 * (a + b) for a, b in zip(sums, opened, strict=True))
        return Learned(loss, raw, self._dropped(part, sound))

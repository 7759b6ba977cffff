"""Distillation across tokenizers: the divergence over the outcomes that both vocabularies can tell apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.batch_alignment import Continuations
from sar_kd.alignment.segments import Segment
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import MASKED_LOGIT, Batch, TopKLogits
from sar_kd.losses.distillation import Distillation, Learned, Sums, whole_tile
from sar_kd.losses.divergence import softmax_slopes
from sar_kd.losses.functional import GroupSums
from sar_kd.losses.projection.joint import Opened, Ways, add_other_ways, open_divergence
from sar_kd.losses.projection.marginals import Fold, coarse_log_probs, fine_log_probs, on_support, read, renormalised
from sar_kd.losses.projection.truncated import HEARD, Heard, fine_columns, heard_entries, heard_outcomes
from sar_kd.losses.tiled_loss import Compared, Single, Slopes, Tile
from sar_kd.models.logit_tiles import column_logsumexp, finite_columns, flat, normalised, silence_


class _Taken(NamedTuple):
    """What the continuations ask of one side's tile, at the temperature."""

    inside: Tensor
    """float32 [V, K_1]: whole columns, where the other side is the coarser and goes on"""
    entries: Tensor
    """float32 [E]: single logits, where this side is the coarser"""
    places: Tensor
    """int64 [E]: where in the tile, as `flat` lays it out, these are"""


class Projected(Distillation):
    """T^2 * D(teacher || student) over the outcomes that both vocabularies can tell apart, wherever either starts a
    token. See `projection`.

    Where both start one, the coarser side's probability is that of all its ways to write an outcome: ending the token
    before and starting the next, or having gone on. Where only the finer starts one, the coarser has gone on; that it
    might have ended is one outcome, what it would have written then is not known.
    """

    covers_text = True

    def __init__(self, config: LossConfig, aligner: Aligner):
        super().__init__(config, aligner)
        classes, self.teacher_is_coarser = aligner.open_classes, aligner.teacher_is_coarser
        self.student_fold = Fold(classes.student_tokens, classes.student_classes, classes.count)
        self.teacher_fold = Fold(classes.teacher_tokens, classes.teacher_classes, classes.count)

    def tiles(self, batch: Batch) -> list[Tile]:
        """Stretches of text, with every row that the student predicts something in."""
        return [Tile(part.student_rows, part.teacher_rows, part.counts, part) for part in batch.segments]

    def compare(self, student: Tensor, teacher: Tensor | TopKLogits, part: Any, learner: str | None) -> Compared:
        """Two tiles of logits; uses up the other side's. See `Compared`."""
        if self.top_k:
            assert learner != "teacher"
            if not self.teacher_is_coarser:
                return super().compare(student, teacher, part, learner)
            return self._compare_top(student, self._top(teacher), part, learner is not None)
        whole, mine = whole_tile(teacher), None if learner is None else int(learner == "teacher")
        sound = finite_columns(whole)
        tiles = student, silence_(whole, sound)
        records = part.in_student, part.in_teacher
        taken = [self._taken(tiles[i], part.num_open, records[1 - i], records[i]) for i in range(2)]
        leaves = () if mine is None else (taken[mine].inside.requires_grad_(), taken[mine].entries.requires_grad_())
        with torch.enable_grad():
            said, told = coarse_log_probs(taken[0].entries, records[0]), coarse_log_probs(taken[1].entries, records[1])
            sums = self._inside(said, told, taken[0].inside, taken[1].inside, part, sound)
            ways, counts = self._ways(told if self.teacher_is_coarser else said, part, sound)
        opened, shares = self._opened(tiles, part.num_open, ways.detach(), mine, counts.float())
        scale = self.temperature**2
        loss, raw = (
            scale * (of_columns * counts).sum() + scale * of_inside.detach()
            for of_columns, of_inside in zip((opened.loss, opened.raw), sums, strict=True)
        )
        if mine is None or opened.slopes is None:
            return Compared(loss, raw, self._dropped(part, sound), None)
        outputs, gradients = [sums[0]], [torch.ones_like(sums[0])]
        if opened.into_ways is not None:
            outputs += [ways.going_on, ways.end]
            gradients += opened.into_ways
        back = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        into_inside, into_entries = (
            torch.zeros_like(leaf) if slope is None else slope.mul_(self.temperature)
            for leaf, slope in zip(leaves, back, strict=True)
        )
        (self.student_fold, self.teacher_fold)[mine].spread_(opened.slopes, shares)
        pieces = (0, opened.slopes), (part.num_open, into_inside)
        slopes = Slopes(pieces, Single(taken[mine].places, into_entries))
        return Compared(loss, raw, self._dropped(part, sound), slopes)

    def _compare_top(self, student: Tensor, top: TopKLogits, part: Segment, learns: bool) -> Compared:
        """A teacher with the longer tokens, cut to its top k: the student is asked for what it speaks about, and the
        rest.
        """
        in_teacher, in_student, num_open, fold = part.in_teacher, part.in_student, part.num_open, self.student_fold
        told, inside, go_on = self._told(top, part)
        ways, counts = self._ways(told, part, top.sound)
        heard = heard_outcomes(top.columns(0, num_open), self.teacher_fold, self.temperature, ways)
        of, width = heard.outcomes.clamp_max(len(fold.first) - 1), student.stride(0)
        taken = self._taken(student, num_open, in_teacher, in_student)
        several, shares = fold.several_of(student[:, :num_open], self.temperature)
        places = fold.first[of] * width + heard.columns
        alone = flat(student).index_select(0, places).div_(self.temperature)
        rest, restore = self._rest_(student, heard, of, places, num_open)
        leaves = taken.inside, taken.entries, alone, several.div_(self.temperature), rest
        if learns:
            for leaf in leaves:
                leaf.requires_grad_()
        with torch.enable_grad():
            said = coarse_log_probs(taken.entries, in_student)
            sums = self._inside(said, told, taken.inside, inside, part, top.sound, go_on)
            joined = torch.cat([several, several.new_zeros(1, num_open)])[fold.place[of], heard.columns]
            own = torch.where(fold.place[of] < 0, alone, joined).where(heard.are_heard, MASKED_LOGIT)
            columns = torch.cat([heard.columns, torch.arange(num_open, device=student.device)])
            both = torch.cat([own, rest]), torch.cat([heard.log_probs, heard.rest])
            log_p, log_t, shared = renormalised(*both, GroupSums(columns, num_open))
            opened = self.divergence(log_p, log_t, (counts & shared)[columns])
            loss, raw = (self.temperature**2 * (a + b) for a, b in zip(sums, opened, strict=True))
        if not learns:
            restore()
            return Compared(loss, raw, self._dropped(part, top.sound), None)
        # T^2 of the loss, and 1 / T of the logits, are in the loss and in the leaves.
        back = torch.autograd.grad(loss, leaves, allow_unused=True)
        into = [
            torch.zeros_like(leaf) if slope is None else slope.div_(self.temperature)
            for leaf, slope in zip(leaves, back, strict=True)
        ]
        others = softmax_slopes(student[:, :num_open], self.temperature * rest.detach(), into[4], self.temperature)
        restore()
        members = fold.members[:, None] * width + torch.arange(num_open, device=student.device)
        single = Single(
            torch.cat([taken.places, places, members.view(-1)]),
            torch.cat([into[1], into[2], into[3].index_select(0, fold.groups).mul_(shares).view(-1)]),
        )
        slopes = Slopes(((0, others), (num_open, into[0])), single)
        return Compared(loss.detach(), raw.detach(), self._dropped(part, top.sound), slopes)

    def _rest_(
        self, student: Tensor, heard: Heard, of: Tensor, places: Tensor, num_open: int
    ) -> tuple[Tensor, Callable[[], None]]:
        """The student's log sum exp(z / T), float32 [K], of all outcomes that are not heard; and what undoes what this
        does to its tile, in which the others are `MASKED_LOGIT` until then.
        """
        fold, width, line = self.student_fold, student.stride(0), flat(student)
        columns, silent = student[:, :num_open], torch.cat([fold.absent, fold.beyond(len(student))])
        among = torch.zeros(len(fold.several) + 1, num_open, device=student.device)
        among.index_put_((fold.place[of], heard.columns), heard.are_heard.float(), accumulate=True)
        members = fold.members[:, None] * width + torch.arange(num_open, device=student.device)
        places = torch.cat([places, members.view(-1)])
        is_out = torch.cat([heard.are_heard, (among[fold.groups] > 0).view(-1)])
        kept, kept_rows = line.index_select(0, places), columns.index_select(0, silent)
        # By the least of both: a place may stand in the list twice, and once for nothing.
        line.scatter_reduce_(0, places, torch.where(is_out, MASKED_LOGIT, torch.inf), "amin")
        columns.index_fill_(0, silent, MASKED_LOGIT)

        def restore() -> None:
            columns.index_copy_(0, silent, kept_rows)
            line.index_copy_(0, places, kept)

        return column_logsumexp(columns, self.temperature), restore

    def _told(self, top: TopKLogits, part: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """What the cut teacher says inside of tokens: its own outcomes, float32 [O], its whole columns as the finer
        side, and which of its own rows count, bool [K_1].
        """
        entries, counts = heard_entries(top, part.in_teacher, self.teacher_vocab_size, self.temperature)
        columns = top.columns(part.num_open, part.num_open + len(part.in_student.fine_rows))
        inside = fine_columns(columns, self.teacher_vocab_size, self.temperature)
        return coarse_log_probs(entries, part.in_teacher), inside, counts[: len(part.in_teacher.fine_rows)]

    def _taken(self, tile: Tensor, num_open: int, as_fine: Continuations, as_coarse: Continuations) -> _Taken:
        row, token, _ = as_coarse.coarse_entries
        places = token * tile.stride(0) + as_coarse.coarse_rows[row]
        inside = tile[:, num_open : num_open + len(as_fine.fine_rows)]
        entries = flat(tile).index_select(0, places)
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
        sides = (columns, carried) if own == 0 else (carried, columns)
        both = normalised(sides[0], temperature), normalised(sides[1], temperature)
        rows = torch.stack([ways.others[0], fold.first[ways.others[1]], ways.others[2]])
        ways = ways._replace(others=rows)
        # T^2 of the loss, and 1 / T of the logits.
        coarse, weight = int(self.teacher_is_coarser), temperature
        opened = open_divergence(self.divergence, both, ways, coarse, mine, counts, weight)
        fold.leave_(columns, kept)
        return opened, shares

    def _ways(self, going_on: Tensor, part: Segment, sound: Tensor) -> tuple[Ways, Tensor]:
        """The coarser side's other ways, and which columns count: bool [num_open]."""
        rows = part.in_teacher if self.teacher_is_coarser else part.in_student
        counts = sound[: part.num_open]
        if self.teacher_is_coarser:
            # Whether the token before was done is what that one's row says.
            counts = counts & torch.cat([sound[rows.coarse_rows], sound.new_ones(1)])[part.ended]
        return Ways(going_on, going_on[rows.ends], part.ended, part.other_ways), counts

    def _dropped(self, part: Segment, sound: Tensor) -> Tensor:
        """Teacher rows that are not finite, each as often as it would speak."""
        size = len(part.in_teacher.fine_rows)
        rows = torch.cat([part.in_teacher.coarse_rows[:size], part.in_student.fine_rows])
        return (~sound[: part.num_open]).sum() + (~sound[rows]).sum()

    def _inside(
        self,
        said: Tensor,
        told: Tensor,
        student: Tensor,
        teacher: Tensor,
        part: Segment,
        sound: Tensor,
        go_on: Tensor | None = None,
    ) -> Sums:
        """Where only one side starts a token, inside a token of the other.

        said, told: float32 [O], the coarser's outcomes inside the student's and inside the teacher's tokens
        student, teacher: float32 [V, K_1], the finer's columns there
        go_on: bool [K_1], which rows of a cut teacher count inside its tokens
        """
        in_teacher, in_student = part.in_teacher, part.in_student
        of_student = fine_log_probs(student, in_teacher, self.divergence.direction == "reverse")
        of_teacher = fine_log_probs(teacher, in_student, must_end=True)
        counts = sound[in_teacher.coarse_rows[: len(in_teacher.fine_rows)]]
        counts = counts if go_on is None else counts & go_on
        loss, raw = self._going_on(of_student, told[: in_teacher.num_going_on], in_teacher, counts)
        counts = sound[in_student.fine_rows]
        loss_too, raw_too = self._going_on(said[: in_student.num_going_on], of_teacher, in_student, counts)
        return loss + loss_too, raw + raw_too

    def _going_on(self, student: Tensor, teacher: Tensor, rows: Continuations, counts: Tensor) -> Sums:
        of_rows = rows.outcome_rows[: rows.num_going_on]
        if self.top_k:
            if self.divergence.direction == "reverse":  # to which what was not said would be impossible
                student = on_support(student, teacher)
            student, teacher, shared = renormalised(student, teacher, GroupSums(of_rows, len(rows.fine_rows)))
            counts = counts & shared
        return self.divergence(student, teacher, counts[of_rows])

    def between(self, student: Tensor, teacher: Tensor | TopKLogits, part: Any) -> Learned:
        """Of one stretch, with a teacher cut to its top k whose tokens are the shorter ones: a sum with a graph."""
        top, num_open = self._top(teacher), part.num_open
        told, teacher_inside, go_on = self._told(top, part)
        num_inside = len(part.in_teacher.fine_rows)
        asked = read(student, self.student_fold, num_open, num_inside, part.in_student, self.temperature)
        said = coarse_log_probs(asked.entries, part.in_student)
        sums = self._inside(said, told, asked.rows, teacher_inside, part, top.sound, go_on)
        ways, counts = self._ways(said, part, top.sound)
        log_p = add_other_ways(asked.open.log_softmax(0), ways)
        heard = heard_outcomes(top.columns(0, num_open), self.teacher_fold, self.temperature)
        log_t = torch.full((len(log_p) + 1, num_open), MASKED_LOGIT, device=log_p.device)
        log_t[heard.outcomes, heard.columns] = heard.log_probs
        log_t[-1] = heard.rest
        are_heard = log_t[:-1] > HEARD
        rest = log_p.masked_fill(are_heard, MASKED_LOGIT).logsumexp(0)
        log_p = torch.cat([log_p.where(are_heard, MASKED_LOGIT), rest[None]])
        log_p, log_t, shared = renormalised(log_p, log_t)
        opened = self.divergence(log_p, log_t, counts & shared)
        loss, raw = (self.temperature**2 * (a + b) for a, b in zip(sums, opened, strict=True))
        return Learned(loss, raw, self._dropped(part, top.sound))

"""What of a batch's text two models can be compared on, whole and in stretches that can be compared alone.

Index arrays only. A stretch ends where both tokenizers start a token: there every token before has ended on both sides,
so that nothing but that one row is asked by the stretches on both sides of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import Alignment, Continuations


@dataclass(frozen=True)
class Segment:
    """Rows of both models, in an order of their own: first those at whose byte both start a token, in pairs; then those
    where one side starts a token inside a token of the other; then the rest.
    """

    student_rows: Tensor
    """int64 [n]: of the student's N"""
    teacher_rows: Tensor
    """int64 [m]: of the teacher's flattened logits"""
    counts: Tensor
    """float32 [n]: 1 for the student's rows that belong to this stretch, 0 for one that it shares with the former"""
    num_open: int
    in_teacher: Continuations
    """Its rows are places among `teacher_rows` (coarse) and `student_rows` (fine)"""
    in_student: Continuations
    """The same with the sides exchanged"""
    ended: Tensor
    """int64 [num_open]: for each pair the continuation of the coarser side that ended there, or -1"""
    other_ways: Tensor
    """int64 [3, X]: a pair, an open outcome, and the outcome of that continuation which is the same"""


def positions_per_tile(workspace_mb: int, *vocab_sizes: int) -> int:
    """Most positions of a tile for the float32 logits of these vocabularies to fit into the workspace; at least one.

    A multiple of 8 (see `models.logit_tiles.room_for`), also where one more is 2 % more than the workspace.
    """
    bytes_per_position, workspace = 4 * sum(vocab_sizes), workspace_mb * 2**20
    positions = workspace * 51 // (50 * bytes_per_position) // 8 * 8
    return positions if positions >= 32 else max(1, workspace // bytes_per_position)


def cut_segments(
    alignment: Alignment, num_student: int, teacher_rows: Tensor, teacher_is_coarser: bool, limit: int
) -> tuple[Segment, ...]:
    """Cut a batch into stretches of at most `limit` rows of either side, where the text allows it.

    num_student: N; teacher_rows: int64 [N_t], the rows that predict something, of the teacher's flattened logits
    """
    assert alignment.in_student is not None
    assert alignment.in_teacher is not None
    records = alignment.in_student, alignment.in_teacher
    return _Cutter(alignment, records, num_student, teacher_rows, int(teacher_is_coarser)).segments(limit)


_Span = tuple[int, int]


class _Cutter:
    """A batch's alignment with both sides' rows counted by what they predict; lists of two: student, teacher."""

    def __init__(
        self,
        alignment: Alignment,
        records: tuple[Continuations, Continuations],
        num_student: int,
        teacher_rows: Tensor,
        coarser: int,
    ):
        """records: inside the student's tokens, which is then the coarser, and inside the teacher's"""
        self.alignment, self.coarser, self.teacher_rows = alignment, coarser, teacher_rows.numpy()
        self.sizes = [num_student, len(teacher_rows)]
        self.pairs = [alignment.student_rows.numpy(), self._place(alignment.teacher_rows)]
        self.records = records
        self.coarse = [self.records[0].coarse_rows.numpy(), self._place(self.records[1].coarse_rows)]
        self.fine = [self._place(self.records[0].fine_rows), self.records[1].fine_rows.numpy()]
        self.ends = [record.ends.numpy() for record in self.records]
        self.coarse_entries = [record.coarse_entries.numpy() for record in self.records]
        self.fine_entries = [record.fine_entries.numpy() for record in self.records]

    def _place(self, teacher_rows: Tensor) -> np.ndarray:
        return np.searchsorted(self.teacher_rows, teacher_rows.numpy())

    def segments(self, limit: int) -> tuple[Segment, ...]:
        bounds = [-1]
        while bounds[-1] < len(self.pairs[0]):
            bounds.append(self._next(bounds[-1], limit))
        return tuple(self._stretch(*span) for span in itertools.pairwise(bounds))

    def _lows(self, pair: int) -> list[int]:
        """Each side's row of a pair that ends a stretch; -1 at the start of the batch."""
        return [-1 if pair < 0 else int(rows[pair]) for rows in self.pairs]

    def _next(self, start: int, limit: int) -> int:
        """The pair that ends the stretch behind pair `start`; one more than there are for the end of the batch."""
        num_pairs, lows = len(self.pairs[0]), self._lows(start)
        if all(size - low <= limit for size, low in zip(self.sizes, lows, strict=True)):
            return num_pairs
        # One row is left for the former pair, of which its last row is asked as well.
        ends = [np.searchsorted(rows, low + limit) - 1 for rows, low in zip(self.pairs, lows, strict=True)]
        return max(min(map(int, ends)), start + 1)

    def _stretch(self, start: int, end: int) -> Segment:
        first, last = start + 1, min(end + 1, len(self.pairs[0]))
        lows = self._lows(start)
        highs = [
            size if end == len(self.pairs[0]) else int(rows[end])
            for size, rows in zip(self.sizes, self.pairs, strict=True)
        ]
        runs = [self._runs(i, max(0, lows[i]), highs[i]) for i in range(2)]
        asked = [np.concatenate([self.coarse[i][slice(*run)] for run in runs[i]]) for i in range(2)]
        own = np.arange(lows[0] + 1, min(highs[0] + 1, self.sizes[0]))
        orders, coarse = [], []
        for i in range(2):
            ahead = np.concatenate([self.pairs[i][first:last], self.fine[1 - i][slice(*runs[1 - i][0])]])
            rest = np.setdiff1d(np.concatenate([asked[i], own]) if i == 0 else asked[i], ahead)
            order = np.concatenate([ahead, rest])
            places = np.zeros(highs[i] - lows[i] + 1, dtype=np.int64)
            places[order - lows[i]] = np.arange(len(order))
            orders.append(order)
            coarse.append(places[asked[i] - lows[i]])
        num_open = last - first
        parts = [self._part(i, runs[i], coarse[i], num_open) for i in range(2)]
        ended, ways = self._ways(first, last, runs[self.coarser])
        return Segment(
            torch.from_numpy(orders[0]),
            torch.from_numpy(self.teacher_rows[orders[1]]),
            torch.from_numpy((orders[0] > lows[0]).astype(np.float32)),
            num_open,
            parts[1],
            parts[0],
            torch.from_numpy(ended),
            torch.from_numpy(ways),
        )

    def _runs(self, i: int, low: int, high: int) -> tuple[_Span, _Span]:
        """The continuations of one kind whose coarse rows are within [low, high): those that go on, those that ended."""
        rows, size = self.coarse[i], len(self.fine[i])
        going_on = np.searchsorted(rows[:size], [low, high])
        return tuple(going_on.tolist()), tuple((size + np.searchsorted(rows[size:], [low, high])).tolist())

    def _outcomes(self, i: int, run: _Span) -> _Span:
        """The outcomes of a run of continuations."""
        firsts = np.append(0, self.ends[i] + 1)
        return int(firsts[run[0]]), int(firsts[run[1]])

    def _part(self, i: int, runs: tuple[_Span, _Span], coarse_rows: np.ndarray, num_open: int) -> Continuations:
        """Some continuations, with rows, outcomes and entries counted from 0."""
        (a, b), (c, d) = runs
        of_first, of_second = (self._outcomes(i, run) for run in runs)
        shift = of_second[0] - (of_first[1] - of_first[0])  # of the outcomes of those that ended
        record = self.records[i]

        def entries(found: np.ndarray, span: _Span, rows: int, outcomes: int) -> np.ndarray:
            found = found[:, slice(*np.searchsorted(found[0], span))]
            return found - np.array([[rows], [0], [outcomes]])

        coarse = [
            entries(self.coarse_entries[i], (a, b), a, of_first[0]),
            entries(self.coarse_entries[i], (c, d), c - (b - a), shift),
        ]
        ends = np.concatenate([self.ends[i][a:b] - of_first[0], self.ends[i][c:d] - shift])
        counts = np.diff(ends, prepend=-1)
        return Continuations(
            torch.from_numpy(coarse_rows),
            torch.arange(num_open, num_open + b - a),
            torch.from_numpy(np.concatenate(coarse, axis=1)),
            torch.from_numpy(entries(self.fine_entries[i], (a, b), a, of_first[0])),
            torch.from_numpy(np.repeat(np.arange(len(ends)), counts)),
            torch.from_numpy(ends),
            record.can_end[a:b],
            of_first[1] - of_first[0],
        )

    def _ways(self, first: int, last: int, runs: tuple[_Span, _Span]) -> tuple[np.ndarray, np.ndarray]:
        (a, b), (c, _) = runs
        of_first, of_second = (self._outcomes(self.coarser, run) for run in runs)
        ended = self.alignment.ended.numpy()[first:last]
        ways = self.alignment.other_ways.numpy()
        ways = ways[:, slice(*np.searchsorted(ways[0], [first, last]))]
        shift = of_second[0] - (of_first[1] - of_first[0])
        return np.where(ended < 0, -1, ended - c + (b - a)), ways - np.array([[first], [0], [shift]])

"""Splits the alignment of a batch into segments whose logits are formed and compared one segment at a time.

A segment ends at a common boundary. Every token before has ended there on both sides, so two neighbours share nothing
but the pair of positions at that boundary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import STUDENT, TEACHER, Alignment, Continuations, TokensBefore


@dataclass(frozen=True)
class Segment:
    """Positions of both models in an order of their own: first the pairs at common boundaries; then those where one
    side starts a token inside a token of the other; then the rest.
    """

    student_positions: Tensor
    """int64 [n]: among the student's N"""
    teacher_positions: Tensor
    """int64 [m]: in the teacher's flattened logits"""
    ce_mask: Tensor
    """float32 [n]: 1 for the student positions of this segment, 0 for the one that it shares with the segment before"""
    num_pairs: int
    teacher_continuations: Continuations
    """Positions are indices into `teacher_positions` (continuing) and `student_positions` (starting)"""
    student_continuations: Continuations
    """The same with the sides exchanged"""
    token_end: Tensor
    """int64 [num_pairs]: as in `Alignment`"""
    continuation_paths: Tensor
    """int64 [3, X]: as in `Alignment`"""


def positions_per_tile(workspace_mb: int, *vocab_sizes: int) -> int:
    """Most positions of a tile for the float32 logits of these vocabularies to fit into the workspace; at least one.

    A multiple of 8 (see `models.logit_tiles.padded_width`), also where one more is 2 % more than the workspace.
    workspace_mb: MiB; 0: 64, or what 256 positions take, because products with fewer are slow
    """
    bytes_per_position = 4 * sum(vocab_sizes)
    workspace = workspace_mb * 2**20 or max(2**26, 256 * bytes_per_position)
    positions = workspace * 51 // (50 * bytes_per_position) // 8 * 8
    return positions if positions >= 32 else max(1, workspace // bytes_per_position)


def split_range(count: int, size: int) -> list[slice]:
    """The range of `count` positions in slices of at most `size`."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def build_segments(
    alignment: Alignment, num_student: int, teacher_positions: Tensor, teacher_is_coarser: bool, limit: int
) -> tuple[Segment, ...]:
    """Split a batch into segments of at most `limit` positions of either side, where the text allows it.

    num_student: N; teacher_positions: int64 [N_t], those of the teacher's flattened logits that predict a target
    """
    segmenter = _Segmenter(alignment, num_student, teacher_positions, int(teacher_is_coarser))
    ends = [-1]
    while ends[-1] < segmenter.num_pairs:
        ends.append(segmenter.next_end(ends[-1], limit))
    return tuple(segmenter.segment(*span) for span in itertools.pairwise(ends))


_Range = tuple[int, int]
_NONE = np.array([], dtype=np.int64)


class _Segmenter:
    """A batch's alignment, with the positions of both sides counted by target; lists of two: student, teacher."""

    def __init__(self, alignment: Alignment, num_student: int, teacher_positions: Tensor, coarser: int):
        student, teacher = alignment.student_continuations, alignment.teacher_continuations
        assert student is not None
        assert teacher is not None
        self.alignment, self.coarser, self.teacher_positions = alignment, coarser, teacher_positions.numpy()
        self.num_positions = [num_student, len(teacher_positions)]
        self.pairs = [alignment.student_positions.numpy(), self._by_target(alignment.teacher_positions)]
        self.num_pairs = len(self.pairs[0])
        self.continuations = student, teacher
        self.continuing = [student.continuing_positions.numpy(), self._by_target(teacher.continuing_positions)]
        self.starting = [self._by_target(student.starting_positions), teacher.starting_positions.numpy()]
        before = teacher.before
        assert before is not None
        self.before, self.before_positions = before, self._by_target(before.positions)
        self.num_left = [1, 1 + bool(len(before.positions))]
        self.first_classes = [
            np.append(0, continuations.end_classes.numpy() + 1) for continuations in self.continuations
        ]

    def _by_target(self, teacher_positions: Tensor) -> np.ndarray:
        return np.searchsorted(self.teacher_positions, teacher_positions.numpy())

    def next_end(self, start: int, limit: int) -> int:
        """The pair that ends the segment after pair `start`; `num_pairs` for the end of the batch."""
        shared = self._positions_of(start)
        # A position is left for the pair before, whose last token may continue into this segment, and one for the
        # token before that.
        lasts = [first + limit + 1 - left for first, left in zip(shared, self.num_left, strict=True)]
        if all(count <= last for count, last in zip(self.num_positions, lasts, strict=True)):
            return self.num_pairs
        ends = [np.searchsorted(own, last) - 1 for own, last in zip(self.pairs, lasts, strict=True)]
        return max(min(map(int, ends)), start + 1)

    def _positions_of(self, pair: int) -> list[int]:
        """The position of each side at a pair; -1 before the first."""
        return [-1 if pair < 0 else int(positions[pair]) for positions in self.pairs]

    def segment(self, start: int, end: int) -> Segment:
        """The segment after pair `start`, up to and with pair `end`."""
        first_pair, pair_end = start + 1, min(end + 1, self.num_pairs)
        num_pairs, shared = pair_end - first_pair, self._positions_of(start)
        lasts = self.num_positions if end == self.num_pairs else self._positions_of(end)
        ranges = [self._ranges(side, max(0, shared[side]), lasts[side]) for side in range(2)]
        continuing = [np.concatenate([self.continuing[i][slice(*span)] for span in ranges[i]]) for i in range(2)]
        before_range = tuple(np.searchsorted(self.before.continuations.numpy(), ranges[TEACHER][0]).tolist())
        before = [_NONE, self.before_positions[slice(*before_range)]]
        own = np.arange(shared[0] + 1, min(lasts[0] + 1, self.num_positions[0]))
        orders, parts = [], []
        for side in range(2):
            inside = ranges[1 - side][0]
            ahead = np.concatenate([self.pairs[side][first_pair:pair_end], self.starting[1 - side][slice(*inside)]])
            rest = np.setdiff1d(np.concatenate([continuing[side], own if side == STUDENT else before[side]]), ahead)
            order = np.concatenate([ahead, rest])
            first = min(shared[side], int(before[side].min(initial=shared[side])))
            index = np.zeros(lasts[side] - first + 1, dtype=np.int64)
            index[order - first] = np.arange(len(order))
            orders.append(order)
            parts.append(self._continuations(side, ranges[side], index[continuing[side] - first], num_pairs))
            if side == TEACHER:
                tokens_before = self._before(before_range, ranges[side][0], index[before[side] - first])
                parts[-1] = (replace(parts[-1][0], before=tokens_before), *parts[-1][1:])
        _, shift, class_shift = parts[self.coarser]
        token_end = self.alignment.token_end.numpy()[first_pair:pair_end]
        paths = self.alignment.continuation_paths.numpy()
        paths = paths[:, slice(*np.searchsorted(paths[0], [first_pair, pair_end]))]
        return Segment(
            student_positions=torch.from_numpy(orders[0]),
            teacher_positions=torch.from_numpy(self.teacher_positions[orders[1]]),
            ce_mask=torch.from_numpy((orders[0] > shared[0]).astype(np.float32)),
            num_pairs=num_pairs,
            teacher_continuations=parts[1][0],
            student_continuations=parts[0][0],
            token_end=torch.from_numpy(np.where(token_end < 0, -1, token_end - shift)),
            continuation_paths=torch.from_numpy(paths - np.array([[first_pair], [0], [class_shift]])),
        )

    def _before(self, span: _Range, inside: _Range, positions: np.ndarray) -> TokensBefore:
        """The tokens before those of the continuations `inside`, all counted from 0; `span`: their range."""
        first_class = int(self.first_classes[TEACHER][inside[0]])
        entries = self.before.entries.numpy()
        entries = entries[:, slice(*np.searchsorted(entries[0], span))] - np.array([[span[0]], [0], [first_class]])
        return TokensBefore(
            continuations=self.before.continuations[slice(*span)] - inside[0],
            positions=torch.from_numpy(positions),
            tokens=self.before.tokens[slice(*span)],
            entries=torch.from_numpy(entries),
        )

    def _ranges(self, side: int, low: int, high: int) -> tuple[_Range, _Range]:
        """The continuations with `continuing` in [low, high): those inside a token, those at a common boundary."""
        positions, num_inside = self.continuing[side], self.continuations[side].num_inside
        inside = np.searchsorted(positions[:num_inside], [low, high])
        at_boundary = num_inside + np.searchsorted(positions[num_inside:], [low, high])
        return tuple(inside.tolist()), tuple(at_boundary.tolist())

    def _continuations(
        self, side: int, ranges: tuple[_Range, _Range], continuing_positions: np.ndarray, num_pairs: int
    ) -> tuple[Continuations, int, int]:
        """The continuations of a segment, with positions, continuations and classes counted from 0.

        Returns: them; by how much continuations and classes at a common boundary are counted lower
        """
        continuations, first_classes = self.continuations[side], self.first_classes[side]
        inside, at_boundary = ranges
        num_inside, first_class = inside[1] - inside[0], int(first_classes[inside[0]])
        num_inside_classes = int(first_classes[inside[1]]) - first_class
        # Those at a common boundary follow directly on those inside.
        shift, class_shift = at_boundary[0] - num_inside, int(first_classes[at_boundary[0]]) - num_inside_classes

        def entries(arrays: Tensor, span: _Range, first: int, first_class: int) -> np.ndarray:
            part = arrays.numpy()[:, slice(*np.searchsorted(arrays[0].numpy(), span))]
            return part - np.array([[first], [0], [first_class]])

        continuing_entries = (
            entries(continuations.continuing_entries, inside, inside[0], first_class),
            entries(continuations.continuing_entries, at_boundary, shift, class_shift),
        )
        ends = continuations.end_classes.numpy()
        ends = np.concatenate([ends[slice(*inside)] - first_class, ends[slice(*at_boundary)] - class_shift])
        part = Continuations(
            continuing_positions=torch.from_numpy(continuing_positions),
            starting_positions=torch.arange(num_pairs, num_pairs + num_inside),
            continuing_entries=torch.from_numpy(np.concatenate(continuing_entries, axis=1)),
            starting_entries=torch.from_numpy(entries(continuations.starting_entries, inside, inside[0], first_class)),
            class_continuations=torch.from_numpy(np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))),
            end_classes=torch.from_numpy(ends),
            can_end=continuations.can_end[slice(*inside)],
            num_inside_classes=num_inside_classes,
        )
        return part, shift, class_shift

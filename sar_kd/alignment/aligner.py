"""Which row of the teacher speaks about which row of the student, and over which outcomes, batch by batch.

Index arrays only; the arithmetic on them is in `projection` and `losses`. Rows come already shifted: the row of a
token is the one that predicts it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import Alignment, Continuations, SharedClasses
from sar_kd.alignment.byte_alignment import Boundaries, find_boundaries, find_chunks
from sar_kd.alignment.segments import positions_per_tile
from sar_kd.alignment.vocabulary_map import ClassTable, VocabularyMap, same_token_map
from sar_kd.tokenization.token_stream import Block, TokenizedText, TokenStream
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_LEARN_FROM = 2**20
"""Student tokens of the text from which the vocabulary maps learn."""


@dataclass(frozen=True)
class _Piece:
    """One block's part of an alignment, in numpy, before the batch is put together."""

    open: np.ndarray
    """int64 [4, K]: student row, teacher row, strict, and the position among all starts of the finer side"""
    in_teacher: np.ndarray
    """int64 [5, K']: student row, teacher row, whether the teacher's token goes on, that token, its written bytes"""
    in_student: np.ndarray
    """int64 [5, K'']: student row, teacher row, whether the student's token goes on, that token, its written bytes"""
    student_chunks: np.ndarray
    teacher_chunks: np.ndarray
    ends: np.ndarray
    """int64 [2, C]: flattened positions, student first"""


class _GoingOn(NamedTuple):
    """Continuations inside the tokens of one side, and the outcomes that they have."""

    record: Continuations
    places: np.ndarray
    """int64: where in the record each of the rows is that were asked for, -1 where it cannot go on"""
    outcomes: list[ClassTable]
    outcome_of: np.ndarray
    """int64 [K]: which of the outcomes each row of the record has"""


class Aligner:
    """A text in two tokenizations, and the comparisons that it allows."""

    def __init__(
        self,
        pair: TokenizerPair,
        text: TokenizedText,
        blocks: Sequence[Block],
        loss_workspace_mb: int | None = None,
        teacher_is_cached: bool = False,
    ):
        """blocks: the blocks of `text`, of which the first teach the vocabulary maps

        loss_workspace_mb: memory for the logits of one segment, MiB; None: a batch is one segment
        teacher_is_cached: its logits come from a cache, cut to the top k
        """
        self.pair, self._text = pair, text
        self.teacher_is_coarser = len(text.teacher.ids) <= len(text.student.ids)
        self._blocks = blocks
        self.segment_size = sys.maxsize
        """Most positions of either side in a segment"""
        if loss_workspace_mb is not None:
            # No tile of a cached teacher's logits is made where its tokenizer is the coarser.
            sizes = [pair.student_vocab_size]
            if not (teacher_is_cached and self.teacher_is_coarser):
                sizes.append(pair.teacher_vocab_size)
            self.segment_size = positions_per_tile(loss_workspace_mb, *sizes)
        self._open_of: dict[bytes, np.ndarray] = {}

    def over(self, text: TokenizedText) -> Aligner:
        """The same comparisons on another text; what the vocabularies share stays as the first text has it."""
        if self.pair.projects and self.pair.is_exact:
            _ = self._open, self._open_class
        other = copy.copy(self)
        other._text = text
        return other

    @cached_property
    def _maps(self) -> tuple[VocabularyMap, VocabularyMap]:
        """Outcomes inside the student's tokens, and inside the teacher's."""
        student, teacher = self.pair.exact_tables
        maps = VocabularyMap(student, teacher, self.pair.teacher), VocabularyMap(teacher, student, self.pair.student)
        last = next((block for block in self._blocks if block.student_end >= _LEARN_FROM), self._blocks[-1])
        streams = self._text.student, self._text.teacher
        found = find_boundaries(streams[0].ends[: last.student_end], streams[1].ends[: last.teacher_end])
        ids = streams[0].ids[found.student], streams[1].ids[found.teacher]
        written = found.student_written, found.teacher_written
        plain = ~(streams[0].has_dummy[found.student] | streams[1].has_dummy[found.teacher])
        for coarse, vocabulary_map in enumerate(maps):
            begins = plain & (written[1 - coarse] == 0)
            vocabulary_map.learn(ids[coarse][begins], written[coarse][begins], ids[1 - coarse][begins])
        return maps

    @cached_property
    def _open(self) -> ClassTable:
        return self._maps[self.teacher_is_coarser].open()

    @cached_property
    def open_classes(self) -> SharedClasses:
        """Outcomes where both start a token, of tokenizers that have exact tables."""
        coarse = self._open.coarse_tokens, self._open.coarse_outcomes
        fine = self._open.fine_tokens, self._open.fine_outcomes
        student, teacher = (fine, coarse) if self.teacher_is_coarser else (coarse, fine)
        return SharedClasses(self._open.count, *map(torch.from_numpy, (*student, *teacher)))

    @cached_property
    def same_token(self) -> Tensor:
        """int64 [V_t]: the student token of exactly the same bytes, -1 where there is none; likewise."""
        return torch.from_numpy(same_token_map(*self.pair.exact_tables))

    @cached_property
    def _open_class(self) -> np.ndarray:
        """int64 [V]: the open outcome of each token of the finer side, -1 for none."""
        outcomes = self._open
        found = np.full(len(self.pair.exact_tables[not self.teacher_is_coarser].pieces), -1, dtype=np.int64)
        found[outcomes.fine_tokens] = outcomes.fine_outcomes
        return found

    def align_equal(self, rows: Tensor) -> Alignment:
        """The alignment of a batch that both models read in the same tokens; `rows` int64 [N] as in `TokenBatch`."""
        every, none = torch.arange(len(rows)), torch.zeros(3, 0, dtype=torch.int64)
        strict, ended = torch.ones(len(rows), dtype=torch.bool), torch.full_like(every, -1)
        return Alignment(every, rows, strict, None, None, ended, none, every, every, len(rows), rows + 1, rows + 1)

    def align(self, cuts: Sequence[Block], student_width: int, teacher_width: int) -> Alignment:
        """The alignment of a batch of blocks, each one row of inputs of these widths, start token first."""
        pieces, num_student, num_coarser, num_chunks = [], 0, 0, 0
        for number, cut in enumerate(cuts):
            piece = self._align_block(cut)
            coarser = piece.in_teacher if self.teacher_is_coarser else piece.in_student
            for rows in (piece.open, piece.in_teacher, piece.in_student):
                rows[0] += num_student
                rows[1] += number * teacher_width
            for numbers, first in (
                (piece.open[3], num_coarser),
                (piece.student_chunks, num_chunks),
                (piece.teacher_chunks, num_chunks),
            ):
                numbers[numbers >= 0] += first
            piece.ends[0] += number * student_width
            piece.ends[1] += number * teacher_width
            num_student += len(piece.student_chunks)
            num_coarser += coarser.shape[1]
            num_chunks += piece.ends.shape[1]
            pieces.append(vars(piece).values())
        joined = [np.concatenate(parts, axis=-1) for parts in zip(*pieces, strict=True)]
        open_rows, in_teacher, in_student, student_chunks, teacher_chunks, ends = joined
        inside_student = inside_teacher = None
        ended, other_ways = np.full(open_rows.shape[1], -1), np.zeros((3, 0), dtype=np.int64)
        if self.pair.projects:
            found = self._continuations(in_student, 0), self._continuations(in_teacher, 1)
            inside_student, inside_teacher = found[0].record, found[1].record
            coarse = found[self.teacher_is_coarser]
            ended = np.where(open_rows[3] >= 0, coarse.places[open_rows[3]], -1) if len(coarse.places) else ended
            other_ways = self._other_ways(ended, coarse)
        return Alignment(
            student_rows=torch.from_numpy(open_rows[0].copy()),
            teacher_rows=torch.from_numpy(open_rows[1].copy()),
            strict=torch.from_numpy(open_rows[2].astype(bool)),
            in_teacher=inside_teacher,
            in_student=inside_student,
            ended=torch.from_numpy(ended),
            other_ways=torch.from_numpy(other_ways),
            student_chunks=torch.from_numpy(student_chunks),
            teacher_chunks=torch.from_numpy(teacher_chunks),
            num_chunks=num_chunks,
            student_ends=torch.from_numpy(ends[0].copy()),
            teacher_ends=torch.from_numpy(ends[1].copy()),
        )

    def _align_block(self, cut: Block) -> _Piece:
        """One block's alignment, with rows, chunks and positions counted from the block's own start."""
        sides = [_Side(self._text.student, cut.student_start, cut.student_end)]
        sides.append(_Side(self._text.teacher, cut.teacher_start, cut.teacher_end))
        row_of = np.cumsum(sides[0].is_target) - 1
        chunks = find_chunks(sides[0].ends, sides[1].ends)
        sound = np.ones(len(chunks.ends), dtype=bool)
        for side, members in zip(sides, (chunks.student, chunks.teacher), strict=True):
            sound[members[side.spoils & (members < len(sound))]] = False
        number_of = np.append(np.where(sound, np.cumsum(sound) - 1, -1), -1)
        lasts = np.stack([np.searchsorted(side.ends, chunks.ends[sound]) for side in sides])

        found = find_boundaries(sides[0].ends, sides[1].ends)
        in_student, slots_student = self._behind(found, 0, sides, row_of)
        in_teacher, slots_teacher = self._behind(found, 1, sides, row_of)
        slots = slots_teacher if self.teacher_is_coarser else slots_student
        both = (found.student_written == 0) & (found.teacher_written == 0)
        both &= sides[0].usable[found.student] & sides[1].usable[found.teacher]
        strict = chunks.strict[chunks.student[found.student[both]]]
        return _Piece(
            np.stack([row_of[found.student[both]], found.teacher[both], strict, slots[both]]),
            in_teacher,
            in_student,
            number_of[chunks.student][sides[0].is_target],
            number_of[chunks.teacher][sides[1].is_target],
            1 + lasts,
        )

    def _behind(
        self, found: Boundaries, coarse: int, sides: list[_Side], row_of: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the other side starts a token behind bytes with which `coarse` (0 student, 1 teacher) may not be done.

        Everywhere for the coarser side; for the other one only inside its tokens, where it certainly is not.

        Returns: int64 [5, K]: student row, teacher row, whether the token does go on, the token, its written bytes; and
        for each contact its place among them, -1 for none
        """
        tokens, written = (found.student, found.teacher), (found.student_written, found.teacher_written)
        at = sides[coarse].starts[tokens[coarse]] + written[coarse]
        before = np.searchsorted(sides[coarse].starts, at, side="left") - 1  # holds the byte before
        wanted = (written[1 - coarse] == 0) & (at > 0) & ((written[coarse] > 0) | (coarse == self.teacher_is_coarser))
        wanted &= sides[1 - coarse].usable[tokens[1 - coarse]] & sides[coarse].usable[before]
        before = before[wanted]
        rows = (row_of[before], tokens[1][wanted]) if coarse == 0 else (row_of[tokens[0][wanted]], before)
        lengths = at[wanted] - sides[coarse].starts[before]
        places = np.where(wanted, np.cumsum(wanted) - 1, -1)
        goes_on, ids = written[coarse][wanted] > 0, sides[coarse].ids[before].astype(np.int64)
        return np.stack([*rows, goes_on, ids, lengths]), places

    def _continuations(self, rows: np.ndarray, coarse: int) -> _GoingOn:
        """The continuations of some `_Piece.in_student` (coarse 0) or `in_teacher` (1)."""
        pieces, width = self.pair.exact_tables[coarse].pieces, rows[4].max(initial=0) + 1
        keys, inverse = np.unique(rows[3] * width + rows[4], return_inverse=True)
        prefixes = [pieces[key // width][: key % width] for key in keys.tolist()]
        behind = [self._maps[coarse].behind(prefix) for prefix in prefixes]
        known = np.array([outcomes is not None for outcomes in behind], dtype=bool)[inverse]
        # Those that do go on come first.
        order = np.argsort(~rows[2].astype(bool), kind="stable")
        order = order[known[order]]
        places = np.full(len(known), -1)
        places[order] = np.arange(len(order))
        rows, inverse, size = rows[:, order], inverse[order], int(rows[2, order].sum())
        used, inverse = np.unique(inverse, return_inverse=True)
        found = [outcomes for i in used if (outcomes := behind[i]) is not None]
        counts = np.array([outcomes.count for outcomes in found], dtype=np.int64)[inverse]
        firsts = np.cumsum(counts) - counts
        coarse_lists = [(outcomes.coarse_tokens, outcomes.coarse_outcomes) for outcomes in found]
        fine_lists = [(outcomes.fine_tokens, outcomes.fine_outcomes) for outcomes in found]
        can_end = np.array([outcomes.can_end for outcomes in found], dtype=bool)[inverse[:size]]
        record = Continuations(
            torch.from_numpy(rows[coarse].copy()),
            torch.from_numpy(rows[1 - coarse, :size].copy()),
            torch.from_numpy(_entries(coarse_lists, inverse, firsts)),
            torch.from_numpy(_entries(fine_lists, inverse[:size], firsts[:size])),
            torch.from_numpy(np.repeat(np.arange(len(inverse)), counts)),
            torch.from_numpy(firsts + counts - 1),
            torch.from_numpy(can_end),
            int(counts[:size].sum()),
        )
        return _GoingOn(record, places, found, inverse)

    def _other_ways(self, ended: np.ndarray, coarse: _GoingOn) -> np.ndarray:
        """`Alignment.other_ways`: what the coarser side could have written by going on instead of ending."""
        (places,) = (ended >= 0).nonzero()
        firsts = np.append(0, coarse.record.ends.numpy() + 1)[ended[places]]
        lists = [(same[0], same[1]) for same in map(self._same_open, coarse.outcomes)]
        ways = _entries(lists, coarse.outcome_of[ended[places]], firsts)
        ways[0] = places[ways[0]]
        return ways

    def _same_open(self, outcomes: ClassTable) -> np.ndarray:
        """int64 [2, X]: the open outcomes that are also outcomes of a continuation, and which; each once."""
        if outcomes.prefix not in self._open_of:
            classes, own = np.unique(self._open_class[outcomes.leaders], return_index=True)
            self._open_of[outcomes.prefix] = np.stack([classes, own])[:, classes >= 0]
        return self._open_of[outcomes.prefix]


class _Side:
    """One tokenizer's tokens of a block."""

    def __init__(self, stream: TokenStream, start: int, end: int):
        first_byte = stream.ends[start - 1] if start else 0
        self.ids, self.is_target = stream.ids[start:end], stream.is_target[start:end]
        self.ends = stream.ends[start:end] - first_byte
        self.starts = np.concatenate([[0], self.ends[:-1]])
        dummy = stream.has_dummy[start:end]
        # What a token with a dummy space of its own says is not what the text says; what is no target is not learned.
        self.usable = self.is_target & ~dummy
        # A template's token has no bytes, and does not spoil the chunk that it stands before.
        self.spoils = ~self.usable & ((self.ends > self.starts) | dummy)


def _entries(lists: list[tuple[np.ndarray, np.ndarray]], inverse: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Row, token and outcome of each entry: row r holds list `inverse[r]`, its outcomes counted from `firsts[r]`.

    Returns: int64 [3, E], rows ascending
    """
    if not len(inverse):
        return np.zeros((3, 0), dtype=np.int64)
    sizes = np.array([len(tokens) for tokens, _ in lists], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    lengths = sizes[inverse]
    rows = np.repeat(np.arange(len(inverse)), lengths)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    picks = np.repeat(starts[inverse], lengths) + within
    tokens, outcomes = (np.concatenate([entry[i] for entry in lists])[picks] for i in range(2))
    return np.stack([rows, tokens, outcomes + np.repeat(firsts, lengths)])

"""Aligns the two tokenizations of a text: the `Alignment` of each batch, made in the collator.

Index arrays only; the arithmetic on logits is in `losses`. Positions are shifted already: a token's position is the one
that predicts it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import (
    STUDENT,
    TEACHER,
    Alignment,
    BatchTokens,
    Continuations,
    SharedClasses,
    TokensBefore,
)
from sar_kd.alignment.byte_alignment import Boundaries, find_boundaries, find_chunks
from sar_kd.alignment.segments import positions_per_tile
from sar_kd.alignment.vocabulary_map import ClassTable, VocabularyMap, as_written, same_token_map
from sar_kd.tokenization.token_stream import Block, TokenizedText
from sar_kd.tokenization.token_table import TokenTable
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_FIT_TOKENS = 2**20
"""Student tokens of the text that the vocabulary maps are fitted to."""


_NONE = np.array([], dtype=np.int64)
_NO_CLASSES = ClassTable(0, _NONE, _NONE, _NONE, _NONE, _NONE)


class _SideContinuations(NamedTuple):
    """The continuations of one side in a batch, and their classes."""

    continuations: Continuations
    at_boundary: np.ndarray
    """int64: the continuation at each boundary of the text, -1 for none"""
    tables: list[_Continuing]
    table_of: np.ndarray
    """int64 [K]: index in `tables` of each continuation"""


class _Continuing(NamedTuple):
    """The tokens that extend a prefix, and the prefix itself as the last class; a list that continuations share."""

    tokens: np.ndarray
    """int64 [M]"""
    classes: np.ndarray
    """int64 [M]"""
    shared: np.ndarray
    """int64 [num_classes - 1]: after a token that ended, the shared class that each class is; inside a token empty"""
    inside: ClassTable | None = None
    """Inside a token: the classes with the tokens of the starting side"""

    @property
    def num_classes(self) -> int:
        return self.inside.num_classes if self.inside else len(self.shared) + 1


class Aligner:
    """A text in two tokenizations, and which positions and classes of its batches are compared."""

    def __init__(
        self,
        pair: TokenizerPair,
        text: TokenizedText,
        blocks: Sequence[Block],
        loss_workspace_mb: int | None = None,
        teacher_is_cached: bool = False,
    ):
        """blocks: the blocks of `text`; the vocabulary maps are fitted to the first of them

        loss_workspace_mb: memory for the logits of one segment, MiB; None: a batch is one segment
        teacher_is_cached: the teacher's logits come from a cache, cut to the top k
        """
        self.pair, self._text, self._blocks = pair, text, blocks
        self.teacher_is_coarser = text.num_tokens(text.teacher) <= text.num_tokens(text.student)
        self.segment_size = sys.maxsize
        """Most positions of either side in a segment"""
        if loss_workspace_mb is not None:
            sizes = [pair.student_vocab_size]
            if not (teacher_is_cached and self.teacher_is_coarser):  # else no tile of teacher logits is made
                sizes.append(pair.teacher_vocab_size)
            self.segment_size = positions_per_tile(loss_workspace_mb, *sizes)
        self._ended_by_prefix: dict[bytes, _Continuing | None] = {}
        self._before_by_prefix: dict[tuple[bytes, int], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def coarser_side(self) -> int:
        return TEACHER if self.teacher_is_coarser else STUDENT

    def for_text(self, text: TokenizedText) -> Aligner:
        """An aligner of another text, with the shared classes of this one."""
        if self.pair.projects and self.pair.tables is not None:
            _ = self._shared_table, self._shared_class_of  # fitted now, to the first text
        other = copy.copy(self)
        other._text = text
        return other

    @cached_property
    def _maps(self) -> tuple[VocabularyMap, VocabularyMap]:
        """The map with the student as the coarse side, and the one with the teacher."""
        student, teacher = self._student_as_written, self.pair.token_tables[TEACHER]
        maps = VocabularyMap(student, teacher, self.pair.teacher), VocabularyMap(teacher, student, self.pair.student)
        last = self._last_fitted_block
        streams = self._text.student, self._text.teacher
        boundaries = find_boundaries(streams[0].ends[: last.student_end], streams[1].ends[: last.teacher_end])
        ids = streams[0].ids[boundaries.student], streams[1].ids[boundaries.teacher]
        prefix_lengths = boundaries.student_prefix_length, boundaries.teacher_prefix_length
        # Without tokens that begin with a dummy space, one that the tokenizer added to the text.
        is_text = ~(streams[0].has_dummy[boundaries.student] | streams[1].has_dummy[boundaries.teacher])
        for coarse, vocabulary_map in enumerate(maps):
            starts = is_text & (prefix_lengths[1 - coarse] == 0)
            vocabulary_map.fit_(ids[coarse][starts], prefix_lengths[coarse][starts], ids[1 - coarse][starts])
        return maps

    @property
    def _last_fitted_block(self) -> Block:
        return next((block for block in self._blocks if block.student_end >= _FIT_TOKENS), self._blocks[-1])

    @cached_property
    def _student_as_written(self) -> TokenTable:
        return as_written(self.pair, self._text, self._last_fitted_block.student_end)

    @cached_property
    def _shared_table(self) -> ClassTable:
        return self._maps[self.coarser_side].at_common_boundary()

    @cached_property
    def shared_classes(self) -> SharedClasses:
        """The classes at a common boundary."""
        table = self._shared_table
        coarse, fine = (table.coarse_tokens, table.coarse_classes), (table.fine_tokens, table.fine_classes)
        student, teacher = (fine, coarse) if self.teacher_is_coarser else (coarse, fine)
        return SharedClasses(table.num_classes, *map(torch.from_numpy, (*student, *teacher)))

    @cached_property
    def same_token(self) -> Tensor:
        """int64 [V_t]: the student token of exactly the same bytes, -1 where there is none."""
        return torch.from_numpy(same_token_map(self._student_as_written, self.pair.token_tables[TEACHER]))

    @cached_property
    def _shared_class_of(self) -> np.ndarray:
        """int64 [V]: the shared class of each token of the finer vocabulary, -1 for none."""
        finer = self.pair.token_tables[1 - self.coarser_side]
        class_of = np.full(len(finer.pieces), -1, dtype=np.int64)
        class_of[self._shared_table.fine_tokens] = self._shared_table.fine_classes
        return class_of

    def align_equal(self, positions: Tensor, teacher_positions: Tensor | None = None) -> Alignment:
        """The alignment of a batch that both models read in the same tokens.

        positions: `TokenBatch.positions`, int64 [N]; teacher_positions: the teacher's, where a prompt shifts them
        """
        teacher_positions = positions if teacher_positions is None else teacher_positions
        every = torch.arange(len(positions))
        return Alignment(
            student_positions=every,
            teacher_positions=teacher_positions,
            strict=torch.ones(len(positions), dtype=torch.bool),
            teacher_continuations=None,
            student_continuations=None,
            token_end=torch.full_like(every, -1),
            continuation_paths=torch.zeros(3, 0, dtype=torch.int64),
            student_chunks=every,
            teacher_chunks=every,
            num_chunks=len(positions),
            student_ends=positions + 1,
            teacher_ends=teacher_positions + 1,
        )

    def align(
        self, blocks: Sequence[Block], student_width: int, teacher_width: int, teacher_shifts: np.ndarray | None = None
    ) -> Alignment:
        """The alignment of a batch of blocks, each one row of inputs of these widths, start token first.

        teacher_shifts: int64 [B], by how many places a prompt moves the teacher's tokens
        Blocks begin and end at common boundaries, so each has the same bytes on both sides.
        """
        student = BatchTokens(self._text.student, [block[:2] for block in blocks], student_width, STUDENT)
        teacher = BatchTokens(
            self._text.teacher, [block[2:] for block in blocks], teacher_width, TEACHER, teacher_shifts
        )
        boundaries = find_boundaries(student.ends, teacher.ends)
        common = (boundaries.student_prefix_length == 0) & (boundaries.teacher_prefix_length == 0)
        common &= student.is_usable[boundaries.student] & teacher.is_usable[boundaries.teacher]

        chunks = find_chunks(student.ends, teacher.ends)
        no_chunk = len(chunks.ends)
        is_valid = np.arange(no_chunk + 1) < no_chunk
        for side, chunk_of in ((student, chunks.student), (teacher, chunks.teacher)):
            chunk_of[side.is_trailing] = no_chunk
            is_valid[chunk_of[side.invalidates_chunk]] = False
        numbers, chunk_ends = np.where(is_valid, np.cumsum(is_valid) - 1, -1), chunks.ends[is_valid[:-1]]

        student_continuations = teacher_continuations = None
        token_end, paths = np.full(np.count_nonzero(common), -1), np.zeros((3, 0), dtype=np.int64)
        if self.pair.projects:
            by_side = [self._continuations(side, boundaries, (student, teacher)) for side in (STUDENT, TEACHER)]
            student_continuations, teacher_continuations = (each.continuations for each in by_side)
            coarser = by_side[self.coarser_side]
            token_end = coarser.at_boundary[common]
            paths = self._continuation_paths(token_end, coarser)
        return Alignment(
            student_positions=torch.from_numpy(student.positions[boundaries.student[common]]),
            teacher_positions=torch.from_numpy(teacher.positions[boundaries.teacher[common]]),
            strict=torch.from_numpy(chunks.strict[chunks.student[boundaries.student[common]]]),
            teacher_continuations=teacher_continuations,
            student_continuations=student_continuations,
            token_end=torch.from_numpy(token_end),
            continuation_paths=torch.from_numpy(paths),
            student_chunks=torch.from_numpy(numbers[chunks.student[student.is_target]]),
            teacher_chunks=torch.from_numpy(numbers[chunks.teacher[teacher.is_target]]),
            num_chunks=len(chunk_ends),
            student_ends=torch.from_numpy(student.inputs[np.searchsorted(student.ends, chunk_ends)]),
            teacher_ends=torch.from_numpy(teacher.inputs[np.searchsorted(teacher.ends, chunk_ends)]),
        )

    def _continuations(
        self, side: int, boundaries: Boundaries, tokens_by_side: tuple[BatchTokens, BatchTokens]
    ) -> _SideContinuations:
        """The boundaries at which the other side starts a token and the last token of `side` may continue.

        "lower!" as lower|! (coarser) and low|er|! (finer): at byte 3 the coarser side is inside lower, which continues.
        At byte 5 lower has ended in the text, but the vocabulary also has lowers, so it might have continued. The
        coarser side has both kinds of boundary, the finer one only the first. A boundary is left out if no token of the
        vocabulary of `side` extends the bytes before it.
        """
        tokens = boundaries.student, boundaries.teacher
        prefix_lengths = boundaries.student_prefix_length, boundaries.teacher_prefix_length
        continuing, starting = tokens_by_side[side], tokens_by_side[1 - side]
        is_inside = prefix_lengths[side] > 0
        start = continuing.starts[tokens[side]] + prefix_lengths[side]
        last = np.searchsorted(continuing.starts, start, side="left") - 1  # holds the byte before
        may_continue = (prefix_lengths[1 - side] == 0) & (start > continuing.block_starts[tokens[side]])
        may_continue &= is_inside | (side == self.coarser_side)
        may_continue &= starting.is_usable[tokens[1 - side]] & continuing.is_usable[last]
        (chosen,) = may_continue.nonzero()
        last, lengths = last[chosen], (start - continuing.starts[last])[chosen]

        pieces, width = self.pair.token_tables[side].pieces, lengths.max(initial=0) + 1
        keys = (continuing.ids[last].astype(np.int64) * width + lengths) * 2 + is_inside[chosen]
        keys, prefix_of = np.unique(keys, return_inverse=True)
        prefixes = [pieces[key // width][: key % width] for key in (keys // 2).tolist()]
        find = self._after_end, self._inside_token
        by_prefix = [find[key % 2](side, prefix) for key, prefix in zip(keys.tolist(), prefixes, strict=True)]
        has_table = np.array([table is not None for table in by_prefix], dtype=bool)[prefix_of]
        order = np.argsort(~is_inside[chosen], kind="stable")  # those inside a token come first
        order = order[has_table[order]]
        chosen, last, prefix_of = chosen[order], last[order], prefix_of[order]
        at_boundary = np.full(len(start), -1)
        at_boundary[chosen] = np.arange(len(chosen))
        num_inside = np.count_nonzero(is_inside[chosen])

        used, table_of = np.unique(prefix_of, return_inverse=True)
        tables = [table for i in used if (table := by_prefix[i]) is not None]
        num_classes = np.array([table.num_classes for table in tables], dtype=np.int64)[table_of]
        first_classes = np.cumsum(num_classes) - num_classes
        continuing_lists = [(table.tokens, table.classes) for table in tables]
        inside = [table.inside or _NO_CLASSES for table in tables]
        starting_lists = [(table.fine_tokens, table.fine_classes) for table in inside]
        can_end = np.array([table.can_end for table in inside], dtype=bool)[table_of[:num_inside]]
        before = None
        if side == TEACHER:
            before = self._tokens_before(
                continuing, last[:num_inside], [inside[i] for i in table_of[:num_inside]], first_classes
            )
            _, _, class_ = before.entries.numpy()
            can_end |= np.isin((first_classes + num_classes - 1)[:num_inside], class_)
        continuations = Continuations(
            continuing_positions=torch.from_numpy(continuing.positions[last]),
            starting_positions=torch.from_numpy(starting.positions[tokens[1 - side][chosen[:num_inside]]]),
            continuing_entries=torch.from_numpy(_entries(continuing_lists, table_of, first_classes)),
            starting_entries=torch.from_numpy(
                _entries(starting_lists, table_of[:num_inside], first_classes[:num_inside])
            ),
            class_continuations=torch.from_numpy(np.repeat(np.arange(len(table_of)), num_classes)),
            end_classes=torch.from_numpy(first_classes + num_classes - 1),
            can_end=torch.from_numpy(can_end),
            num_inside_classes=int(num_classes[:num_inside].sum()),
            before=before,
        )
        return _SideContinuations(continuations, at_boundary, tables, table_of)

    def _tokens_before(
        self, continuing: BatchTokens, inside: np.ndarray, tables: list[ClassTable], first_classes: np.ndarray
    ) -> TokensBefore:
        """Where the token before one of `inside`, the teacher's tokens with a continuation, may go on over its prefix.

        tables: the classes of each continuation; first_classes: the number of the first of them
        """
        pieces = self.pair.token_tables[TEACHER].pieces
        before = np.maximum(inside - 1, 0)
        may_continue = (continuing.starts[before] < continuing.starts[inside]) & continuing.is_usable[before]
        may_continue &= continuing.starts[inside] > continuing.block_starts[inside]
        chosen, lists = [], []
        for i in may_continue.nonzero()[0].tolist():
            found = self._going_on(pieces[continuing.ids[before[i]]], tables[i])
            if len(found[0]):
                chosen.append(i)
                lists.append(found)
        where = np.array(chosen, dtype=np.int64)
        return TokensBefore(
            continuations=torch.from_numpy(where),
            positions=torch.from_numpy(continuing.positions[before[where]]),
            tokens=torch.from_numpy(continuing.ids[before[where]].astype(np.int64)),
            entries=torch.from_numpy(_entries(lists, np.arange(len(lists)), first_classes[where])),
        )

    def _going_on(self, before: bytes, table: ClassTable) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's tokens that extend the token `before` by the prefix of `table`, and the class of each.

        A token whose next one is in no class counts for the end, as on the starting side.
        """
        key = before + table.prefix, len(before)
        if key not in self._before_by_prefix:
            tokens, following = self._maps[TEACHER].continuations(key[0]) if before else (_NONE, _NONE)
            at = np.searchsorted(table.fine_tokens, following).clip(max=len(table.fine_tokens) - 1)
            is_listed = table.fine_tokens[at] == following
            self._before_by_prefix[key] = tokens, np.where(is_listed, table.fine_classes[at], table.num_classes - 1)
        return self._before_by_prefix[key]

    def _continuation_paths(self, token_end: np.ndarray, coarser: _SideContinuations) -> np.ndarray:
        """`Alignment.continuation_paths`: classes that the coarser side also reaches if its token does not end."""
        (pairs,) = (token_end >= 0).nonzero()
        continuations = token_end[pairs]
        first_classes = np.append(0, coarser.continuations.end_classes.numpy() + 1)[continuations]
        lists = [(table.shared, np.arange(len(table.shared))) for table in coarser.tables]
        paths = _entries(lists, coarser.table_of[continuations], first_classes)
        paths[0] = pairs[paths[0]]
        return paths

    def _inside_token(self, side: int, prefix: bytes) -> _Continuing | None:
        """The continuations inside a token of `side`, after `prefix`; None if no token extends it."""
        table = self._maps[side].after_prefix(prefix)
        if table is None:
            return None
        return _Continuing(table.coarse_tokens, table.coarse_classes, _NONE, table)

    def _after_end(self, side: int, prefix: bytes) -> _Continuing | None:
        """The continuations of a token that ended, `prefix`, by the shared class of the token that comes next.

        Several next tokens may be of one shared class: a line end may continue with 8 spaces and with 16, and where the
        coarser tokenizer starts a token, 16 spaces are of the class of the 8 that they begin with. What is of no shared
        class takes no part. None if nothing is left.
        """
        if prefix not in self._ended_by_prefix:
            tokens, following = self._maps[side].continuations(prefix)
            classes = np.where(following < 0, sys.maxsize, self._shared_class_of[following])  # the end comes last
            tokens, classes = tokens[classes >= 0], classes[classes >= 0]
            shared, classes = np.unique(classes, return_inverse=True)
            can_continue = len(shared) > 1
            self._ended_by_prefix[prefix] = _Continuing(tokens, classes, shared[:-1]) if can_continue else None
        return self._ended_by_prefix[prefix]


def _entries(lists: list[tuple[np.ndarray, np.ndarray]], list_of: np.ndarray, first_classes: np.ndarray) -> np.ndarray:
    """The entries of continuations: i has list `list_of[i]`, with its classes counted from `first_classes[i]`.

    lists: tokens, and the class of each
    Returns: int64 [3, E]: continuation, ascending; token; class
    """
    if not len(list_of):
        return np.zeros((3, 0), dtype=np.int64)
    sizes = np.array([len(tokens) for tokens, _ in lists], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    lengths = sizes[list_of]
    continuations = np.repeat(np.arange(len(list_of)), lengths)
    within = np.arange(len(continuations)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    picks = np.repeat(starts[list_of], lengths) + within
    tokens, classes = (np.concatenate([entry[i] for entry in lists])[picks] for i in range(2))
    return np.stack([continuations, tokens, classes + np.repeat(first_classes, lengths)])

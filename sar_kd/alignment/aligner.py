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

from sar_kd.alignment.batch_alignment import STUDENT, TEACHER, Alignment, Continuations, SharedClasses
from sar_kd.alignment.byte_alignment import Boundaries, find_boundaries, find_chunks
from sar_kd.alignment.segments import positions_per_tile
from sar_kd.alignment.vocabulary_map import ClassTable, VocabularyMap, as_written, same_token_map
from sar_kd.tokenization.token_stream import Block, TokenizedText, TokenStream
from sar_kd.tokenization.token_table import TokenTable
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_FIT_TOKENS = 2**20
"""Student tokens of the text that the vocabulary maps are fitted to."""


class _SideContinuations(NamedTuple):
    """The continuations of one side in a batch, and their classes."""

    continuations: Continuations
    at_boundary: np.ndarray
    """int64: the continuation at each boundary of the text, -1 for none"""
    tables: list[ClassTable]
    table_of: np.ndarray
    """int64 [K]: index in `tables` of each continuation"""


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
        self._continuation_paths_by_prefix: dict[bytes, np.ndarray] = {}

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

    def align_equal(self, positions: Tensor) -> Alignment:
        """The alignment of a batch that both models read in the same tokens; `TokenBatch.positions`, int64 [N]."""
        every = torch.arange(len(positions))
        return Alignment(
            student_positions=every,
            teacher_positions=positions,
            strict=torch.ones(len(positions), dtype=torch.bool),
            teacher_continuations=None,
            student_continuations=None,
            token_end=torch.full_like(every, -1),
            continuation_paths=torch.zeros(3, 0, dtype=torch.int64),
            student_chunks=every,
            teacher_chunks=every,
            num_chunks=len(positions),
            student_ends=positions + 1,
            teacher_ends=positions + 1,
        )

    def align(self, blocks: Sequence[Block], student_width: int, teacher_width: int) -> Alignment:
        """The alignment of a batch of blocks, each one row of inputs of these widths, start token first.

        Blocks begin and end at common boundaries, so each has the same bytes on both sides.
        """
        student = _BatchTokens(self._text.student, [block[:2] for block in blocks], student_width, STUDENT)
        teacher = _BatchTokens(self._text.teacher, [block[2:] for block in blocks], teacher_width, TEACHER)
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
        self, side: int, boundaries: Boundaries, tokens_by_side: tuple[_BatchTokens, _BatchTokens]
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
        keys, prefix_of = np.unique(continuing.ids[last].astype(np.int64) * width + lengths, return_inverse=True)
        by_prefix = [self._maps[side].after_prefix(pieces[key // width][: key % width]) for key in keys.tolist()]
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
        continuing_lists = [(table.coarse_tokens, table.coarse_classes) for table in tables]
        starting_lists = [(table.fine_tokens, table.fine_classes) for table in tables]
        can_end = np.array([table.can_end for table in tables], dtype=bool)[table_of[:num_inside]]
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
        )
        return _SideContinuations(continuations, at_boundary, tables, table_of)

    def _continuation_paths(self, token_end: np.ndarray, coarser: _SideContinuations) -> np.ndarray:
        """`Alignment.continuation_paths`: classes that the coarser side also reaches if its token does not end."""
        (pairs,) = (token_end >= 0).nonzero()
        continuations = token_end[pairs]
        first_classes = np.append(0, coarser.continuations.end_classes.numpy() + 1)[continuations]
        lists = [(paths[0], paths[1]) for paths in map(self._paths_of, coarser.tables)]
        paths = _entries(lists, coarser.table_of[continuations], first_classes)
        paths[0] = pairs[paths[0]]
        return paths

    def _paths_of(self, table: ClassTable) -> np.ndarray:
        """int64 [2, X]: pairs (shared class, continuation class) with the same next token; each shared class once."""
        if table.prefix not in self._continuation_paths_by_prefix:
            shared, of_continuation = np.unique(self._shared_class_of[table.representatives], return_index=True)
            self._continuation_paths_by_prefix[table.prefix] = np.stack([shared, of_continuation])[:, shared >= 0]
        return self._continuation_paths_by_prefix[table.prefix]


class _BatchTokens:
    """One tokenizer's tokens of a batch, block after block; byte offsets continue across blocks."""

    def __init__(self, stream: TokenStream, ranges: Sequence[tuple[int, ...]], width: int, side: int):
        """ranges: of the blocks in the stream; width: of the inputs, start token first; side: STUDENT or TEACHER"""
        spans = [slice(*span) for span in ranges]
        num_tokens = np.array([span.stop - span.start for span in spans])
        bounds = np.array([[stream.ends[i - 1] if i else 0 for i in span] for span in ranges], dtype=np.int64)
        lengths = bounds[:, 1] - bounds[:, 0]
        block_ends = np.cumsum(lengths)
        self.ids = np.concatenate([stream.ids[span] for span in spans])
        self.is_target = np.concatenate([stream.is_target[span] for span in spans])
        self.block_starts = np.repeat(block_ends - lengths, num_tokens)
        self.ends = np.concatenate([stream.ends[span] for span in spans]) + np.repeat(
            block_ends - bounds[:, 1], num_tokens
        )
        self.starts = np.concatenate([[0], self.ends[:-1]])
        firsts = np.cumsum(num_tokens) - num_tokens
        self.inputs = np.arange(len(self.ids)) + np.repeat(1 + width * np.arange(len(spans)) - firsts, num_tokens)
        """Index of each token in the flattened inputs"""
        self.positions = np.cumsum(self.is_target) - 1 if side == STUDENT else self.inputs - 1
        """The position that predicts each token: the student's among its N targets, the teacher's in all logits"""
        dummy = np.concatenate([stream.has_dummy[span] for span in spans])
        # A token with a dummy space (one that the tokenizer added) has bytes that are not in the text.
        self.is_usable = self.is_target & ~dummy
        # A template's token has no bytes, and does not invalidate the next chunk.
        self.invalidates_chunk = ~self.is_usable & ((self.ends > self.starts) | dummy)
        self.is_trailing = self.starts == np.repeat(block_ends, num_tokens)
        """Without bytes at the end of a block, and so in no chunk"""


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

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

from sar_kd.alignment.batch_alignment import Alignment, Continuations, SharedClasses
from sar_kd.alignment.byte_alignment import Boundaries, find_boundaries, find_chunks
from sar_kd.alignment.segments import positions_per_tile
from sar_kd.alignment.vocabulary_map import ClassTable, VocabularyMap, same_token_map
from sar_kd.tokenization.token_stream import Block, TokenizedText, TokenStream
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_FIT_TOKENS = 2**20
"""Student tokens of the text that the vocabulary maps are fitted to."""


class _SideContinuations(NamedTuple):
    """The continuations of one side in a batch, and their classes."""

    record: Continuations
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
        self.teacher_is_coarser = len(text.teacher.ids) <= len(text.student.ids)
        self.segment_size = sys.maxsize
        """Most positions of either side in a segment"""
        if loss_workspace_mb is not None:
            sizes = [pair.student_vocab_size]
            if not (teacher_is_cached and self.teacher_is_coarser):  # else no tile of teacher logits is made
                sizes.append(pair.teacher_vocab_size)
            self.segment_size = positions_per_tile(loss_workspace_mb, *sizes)
        self._paths_by_prefix: dict[bytes, np.ndarray] = {}

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
        student, teacher = self.pair.token_tables
        maps = VocabularyMap(student, teacher, self.pair.teacher), VocabularyMap(teacher, student, self.pair.student)
        last = next((block for block in self._blocks if block.student_end >= _FIT_TOKENS), self._blocks[-1])
        streams = self._text.student, self._text.teacher
        found = find_boundaries(streams[0].ends[: last.student_end], streams[1].ends[: last.teacher_end])
        ids = streams[0].ids[found.student], streams[1].ids[found.teacher]
        prefix_lengths = found.student_prefix_length, found.teacher_prefix_length
        plain = ~(streams[0].has_dummy[found.student] | streams[1].has_dummy[found.teacher])
        for coarse, vocabulary_map in enumerate(maps):
            starts = plain & (prefix_lengths[1 - coarse] == 0)
            vocabulary_map.fit_(ids[coarse][starts], prefix_lengths[coarse][starts], ids[1 - coarse][starts])
        return maps

    @cached_property
    def _shared_table(self) -> ClassTable:
        return self._maps[self.teacher_is_coarser].at_common_boundary()

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
        return torch.from_numpy(same_token_map(*self.pair.token_tables))

    @cached_property
    def _shared_class_of(self) -> np.ndarray:
        """int64 [V]: the shared class of each token of the finer vocabulary, -1 for none."""
        finer = self.pair.token_tables[not self.teacher_is_coarser]
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
        student = _BatchTokens(self._text.student, [block[:2] for block in blocks], student_width)
        teacher = _BatchTokens(self._text.teacher, [block[2:] for block in blocks], teacher_width)
        student.positions = np.cumsum(student.is_target) - 1
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
            both = [self._continuations(i, boundaries, (student, teacher)) for i in range(2)]
            student_continuations, teacher_continuations = (each.record for each in both)
            coarser = both[self.teacher_is_coarser]
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
        self, coarse: int, boundaries: Boundaries, sides: tuple[_BatchTokens, _BatchTokens]
    ) -> _SideContinuations:
        """Where the last token of `coarse` (0 student, 1 teacher) may continue and the other side starts a token.

        For the coarser tokenizer at every such boundary; for the finer one only inside its tokens, where it does
        continue. Left out where no token of the vocabulary continues.
        """
        tokens = boundaries.student, boundaries.teacher
        prefix_lengths = boundaries.student_prefix_length, boundaries.teacher_prefix_length
        own, other, is_inside = sides[coarse], sides[1 - coarse], prefix_lengths[coarse] > 0
        start = own.starts[tokens[coarse]] + prefix_lengths[coarse]
        last = np.searchsorted(own.starts, start, side="left") - 1  # holds the byte before
        may_continue = (prefix_lengths[1 - coarse] == 0) & (start > own.block_starts[tokens[coarse]])
        may_continue &= is_inside | (coarse == self.teacher_is_coarser)
        may_continue &= other.is_usable[tokens[1 - coarse]] & own.is_usable[last]
        (found,) = may_continue.nonzero()
        last, lengths = last[found], (start - own.starts[last])[found]

        pieces, width = self.pair.token_tables[coarse].pieces, lengths.max(initial=0) + 1
        keys, prefix_of = np.unique(own.ids[last].astype(np.int64) * width + lengths, return_inverse=True)
        by_prefix = [self._maps[coarse].after_prefix(pieces[key // width][: key % width]) for key in keys.tolist()]
        has_table = np.array([table is not None for table in by_prefix], dtype=bool)[prefix_of]
        order = np.argsort(~is_inside[found], kind="stable")  # those inside a token come first
        order = order[has_table[order]]
        found, last, prefix_of = found[order], last[order], prefix_of[order]
        at_boundary = np.full(len(start), -1)
        at_boundary[found] = np.arange(len(found))
        num_inside = np.count_nonzero(is_inside[found])

        used, table_of = np.unique(prefix_of, return_inverse=True)
        tables = [table for i in used if (table := by_prefix[i]) is not None]
        counts = np.array([table.num_classes for table in tables], dtype=np.int64)[table_of]
        first_classes = np.cumsum(counts) - counts
        coarse_lists = [(table.coarse_tokens, table.coarse_classes) for table in tables]
        fine_lists = [(table.fine_tokens, table.fine_classes) for table in tables]
        can_end = np.array([table.can_end for table in tables], dtype=bool)[table_of[:num_inside]]
        record = Continuations(
            coarse_positions=torch.from_numpy(own.positions[last]),
            fine_positions=torch.from_numpy(other.positions[tokens[1 - coarse][found[:num_inside]]]),
            coarse_entries=torch.from_numpy(_entries(coarse_lists, table_of, first_classes)),
            fine_entries=torch.from_numpy(_entries(fine_lists, table_of[:num_inside], first_classes[:num_inside])),
            class_continuations=torch.from_numpy(np.repeat(np.arange(len(table_of)), counts)),
            end_classes=torch.from_numpy(first_classes + counts - 1),
            can_end=torch.from_numpy(can_end),
            num_inside_classes=int(counts[:num_inside].sum()),
        )
        return _SideContinuations(record, at_boundary, tables, table_of)

    def _continuation_paths(self, token_end: np.ndarray, coarser: _SideContinuations) -> np.ndarray:
        """`Alignment.continuation_paths`: classes that the coarser side also reaches if its token does not end."""
        (pairs,) = (token_end >= 0).nonzero()
        continuations = token_end[pairs]
        first_classes = np.append(0, coarser.record.end_classes.numpy() + 1)[continuations]
        lists = [(paths[0], paths[1]) for paths in map(self._paths_of, coarser.tables)]
        paths = _entries(lists, coarser.table_of[continuations], first_classes)
        paths[0] = pairs[paths[0]]
        return paths

    def _paths_of(self, table: ClassTable) -> np.ndarray:
        """int64 [2, X]: the shared classes that are also classes of a continuation, each once, and which ones."""
        if table.prefix not in self._paths_by_prefix:
            shared, own = np.unique(self._shared_class_of[table.representatives], return_index=True)
            self._paths_by_prefix[table.prefix] = np.stack([shared, own])[:, shared >= 0]
        return self._paths_by_prefix[table.prefix]


class _BatchTokens:
    """One tokenizer's tokens of a batch, block after block, with the bytes counted through all blocks."""

    def __init__(self, stream: TokenStream, ranges: Sequence[tuple[int, ...]], width: int):
        """ranges: of the blocks in the stream; width: of a row of inputs, start token first"""
        spans = [slice(*span) for span in ranges]
        counts = np.array([span.stop - span.start for span in spans])
        bounds = np.array([[stream.ends[i - 1] if i else 0 for i in span] for span in ranges], dtype=np.int64)
        lengths = bounds[:, 1] - bounds[:, 0]
        block_ends = np.cumsum(lengths)
        self.ids = np.concatenate([stream.ids[span] for span in spans])
        self.is_target = np.concatenate([stream.is_target[span] for span in spans])
        self.block_starts = np.repeat(block_ends - lengths, counts)
        self.ends = np.concatenate([stream.ends[span] for span in spans]) + np.repeat(block_ends - bounds[:, 1], counts)
        self.starts = np.concatenate([[0], self.ends[:-1]])
        firsts = np.cumsum(counts) - counts
        self.inputs = np.arange(len(self.ids)) + np.repeat(1 + width * np.arange(len(spans)) - firsts, counts)
        """Index of each token in the flattened inputs"""
        self.positions = self.inputs - 1
        """The position that predicts each token; the student's are counted by target instead"""
        dummy = np.concatenate([stream.has_dummy[span] for span in spans])
        # A token with a dummy space has bytes that are not in the text; what is no target is not learned.
        self.is_usable = self.is_target & ~dummy
        # A template's token has no bytes, and leaves the chunk that it stands before valid.
        self.invalidates_chunk = ~self.is_usable & ((self.ends > self.starts) | dummy)
        self.is_trailing = self.starts == np.repeat(block_ends, counts)
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

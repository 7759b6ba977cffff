"""Blocks to batches: what the models read at each step, and which teacher row speaks about which student row.

Each block opens with its model's start token and predicts every one of its tokens, of a conversation its responses, so
the loss covers every token that is to be learned exactly once an epoch. Which blocks a step sees is a function of the
seed and the step alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from torch import Tensor

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.segments import Segment, cut_segments
from sar_kd.data.batch import Batch, CachedTopK, TokenBatch, token_batch
from sar_kd.data.blocks import cut, cut_at
from sar_kd.data.samples import Sample
from sar_kd.data.sources import StreamedDocuments
from sar_kd.data.token_cache import TokenCache
from sar_kd.data.tokenized_text import join
from sar_kd.tokenization.token_stream import Block, TokenizedText
from sar_kd.tokenization.tokenizer_pair import TokenizerPair


class TeacherRecords(Protocol):
    """A teacher's cached logits, found for the tokens of one text: `matching.CacheLookup` is what a run has."""

    @property
    def num_unknown(self) -> int:
        """Documents without records."""

    @property
    def some_unknown(self) -> list[str]:
        """Names of the first of them."""

    def windows(self) -> np.ndarray:
        """int64, ascending: where the teacher's blocks end, in its tokens of the plain documents."""

    def rows(self, cuts: Sequence[Block], rows: Tensor, num_places: int) -> CachedTopK:
        """The records of a batch of blocks."""

    def nats(self) -> tuple[float, int]:
        """The teacher's total loss over the text, and its number of tokens."""


class CachedLogits(Protocol):
    """A cached text of `matching.CachedText`'s kind, to be held against the text of a run."""

    def beside(self, text: TokenizedText) -> TeacherRecords:
        """The records that belong to the tokens of `text`."""


class Dataset:
    """Documents as blocks of tokens, and the batches made of them."""

    def __init__(
        self,
        documents: Sequence[Sample] | StreamedDocuments,
        pair: TokenizerPair,
        max_student: int,
        max_teacher: int,
        cache: TokenCache | None = None,
        stored: CachedLogits | None = None,
        loss_workspace_mb: int | None = None,
    ):
        """max_student, max_teacher: most tokens that a block may hold for each model, start token included

        cache: where the tokens of a large text are kept; stored: what the teacher said of this text, if that is kept
        loss_workspace_mb: memory for the logits of one segment of a batch, MiB; None: a batch is one segment

        Raises: UsageError if nothing is left to read, or a stretch without a common boundary exceeds a model
        """
        self.pair, self._loss_workspace_mb = pair, loss_workspace_mb
        limits = max_student - 1, max_teacher - 1
        self.text = join(documents, pair, limits, cache)
        self.stored = None if stored is None else stored.beside(self.text)
        if self.stored is None:
            self.blocks = cut(self.text, *limits)
        else:
            self.blocks = cut_at(self.text, self.stored.windows(), *limits)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_tokens(self) -> int:
        """The student's tokens that are predicted, each once an epoch."""
        return int(self.text.student.is_target.sum())

    def documents_of(self, block: int) -> Sequence[str]:
        """Names of the documents that a block holds a part of."""
        start, end, *_ = self.blocks[block]
        first_byte = self.text.student.ends[start - 1] if start else 0
        low = np.searchsorted(self.text.starts, first_byte, side="right") - 1
        high = np.searchsorted(self.text.starts, self.text.student.ends[end - 1], side="left")
        return self.text.names[low:high]

    def batch(self, blocks: list[int]) -> Batch:
        """Collate blocks: pad, find the rows that predict, and align the teacher's with the student's."""
        cuts = [self.blocks[i] for i in blocks]
        student = token_batch(
            self.text.student, [(c.student_start, c.student_end) for c in cuts], self.pair.student_start
        )
        if self.pair.tables is None:
            alignment = self.aligner.align_equal(student.rows)
            return Batch(student, student, alignment, tuple(blocks), stored=self._stored(cuts, student))
        teacher = token_batch(
            self.text.teacher, [(c.teacher_start, c.teacher_end) for c in cuts], self.pair.teacher_start
        )
        widths = student.input_ids.shape[1], teacher.input_ids.shape[1]
        alignment = self.aligner.align(cuts, *widths)
        segments: tuple[Segment, ...] = ()
        if alignment.in_teacher is not None:
            coarser, limit = self.aligner.teacher_is_coarser, self.aligner.segment_size
            segments = cut_segments(alignment, len(student.rows), teacher.rows, coarser, limit)
        return Batch(student, teacher, alignment, tuple(blocks), segments, stored=self._stored(cuts, teacher))

    def _stored(self, cuts: list[Block], teacher: TokenBatch) -> CachedTopK | None:
        return None if self.stored is None else self.stored.rows(cuts, teacher.rows, teacher.input_ids.numel())

    @cached_property
    def aligner(self) -> Aligner:
        """What connects the two tokenizations; made when the first batch asks for it."""
        return Aligner(self.pair, self.text, self.blocks, self._loss_workspace_mb, self.stored is not None)

    def token_batches(self, which: str, batch_size: int) -> Iterator[TokenBatch]:
        """Every block once, as one of the models ('student' or 'teacher') reads it; for evaluation."""
        return self.token_batches_at(which, range(0, len(self.blocks), batch_size), batch_size)

    def token_batches_at(self, which: str, firsts: Iterable[int], batch_size: int) -> Iterator[TokenBatch]:
        """`batch_size` blocks from each of `firsts` on. See `token_batches`."""
        start_id = getattr(self.pair, f"{which}_start")
        for first in firsts:
            cuts = self.blocks[first : first + batch_size]
            ranges = [(getattr(cut, f"{which}_start"), getattr(cut, f"{which}_end")) for cut in cuts]
            yield token_batch(getattr(self.text, which), ranges, start_id)

    def micro_blocks(
        self, step: int, batch_size: int, accum_steps: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> list[list[int]]:
        """The blocks of each micro-batch of one step: consecutive stretches of an endless row of shuffled epochs.

        Of several ranks each has its own part of every stretch: together they read what one process reads with `ranks`
        times the batch size.
        """
        stretch = ranks * batch_size
        starts = [(step * accum_steps + micro) * stretch + rank * batch_size for micro in range(accum_steps)]
        return [[self._shuffled(start + i, seed) for i in range(batch_size)] for start in starts]

    def micro_batches(self, *args, **kwargs) -> list[Batch]:
        """The micro-batches of one step. Arguments as for `micro_blocks`"""
        return [self.batch(blocks) for blocks in self.micro_blocks(*args, **kwargs)]

    def _shuffled(self, position: int, seed: int) -> int:
        epoch, place = divmod(position, len(self.blocks))
        return int(_order(len(self.blocks), epoch, seed)[place])


@lru_cache(maxsize=4)
def _order(num_blocks: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)

"""Blocks to batches.

Each block begins with its model's start token, a conversation as its template does. It predicts all of its text, in a
conversation its responses, so the loss covers every target exactly once an epoch. The blocks of a step follow from the
seed and the step alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.segments import Segment, build_segments
from sar_kd.data.batch import Batch, CachedTokenLogits, TokenBatch, token_batch
from sar_kd.data.blocks import pack, skip_passages, skip_start_tokens
from sar_kd.data.files.sources import Documents
from sar_kd.data.teacher_prompt import TeacherPrompt, shifts_of
from sar_kd.data.token_cache import TokenCache
from sar_kd.data.tokenized_text import tokenize
from sar_kd.data.words import Words
from sar_kd.tokenization.token_stream import Block, Blocks, TokenizedText
from sar_kd.tokenization.tokenizer_pair import TokenizerPair


class CachedRecords(Protocol):
    """A teacher's cached logits, found for the tokens of one text; `teacher.cache.lookup.CacheLookup` in a run."""

    @property
    def num_missing(self) -> int:
        """Documents without records."""

    @property
    def first_missing(self) -> list[str]:
        """Names of the first of them."""

    def block_ends(self) -> np.ndarray:
        """int64, ascending: where the teacher's blocks end, in its tokens of the plain documents."""

    def records(self, blocks: Sequence[Block], positions: Tensor, num_positions: int) -> CachedTokenLogits:
        """The records of a batch of blocks."""

    def target_nats(self, block: Block) -> tuple[np.ndarray, int]:
        """The teacher's loss at each target token of a block, float64 [N]; and how many are not finite."""


class CachedLogits(Protocol):
    """A teacher's cached logits of one text; `teacher.cache.lookup.CachedText` in a run."""

    def lookup(self, text: TokenizedText) -> CachedRecords:
        """The records of the same text as a run tokenizes it."""


def build_dataset(
    documents: Documents,
    pair: TokenizerPair,
    max_student: int,
    max_teacher: int,
    token_cache: TokenCache | None = None,
    cached_logits: CachedLogits | None = None,
    loss_workspace_mb: int | None = None,
    option: str = "--train_file",
    teacher_prompt: TeacherPrompt | None = None,
) -> Dataset:
    """Documents to token streams to blocks to a dataset.

    max_student, max_teacher: most tokens of a block, start token included, and without a teacher's prompt
    token_cache: for the tokens of a large text; cached_logits: the teacher's, of this text
    loss_workspace_mb, teacher_prompt: as `Dataset`; option: that names the text, for an error
    Raises: UsageError as `tokenize` and `skip_passages`, and for a conversation that the prompt does not fit into
    """
    limits = max_student - 1, max_teacher - 1
    text = tokenize(documents, pair, limits, token_cache, option)
    records = cached_logits.lookup(text) if cached_logits else None
    blocks = pack(text, *limits, records.block_ends() if records else None)
    text = skip_passages(text, blocks, pair, limits[0])
    dataset = Dataset(text, blocks, pair, records, loss_workspace_mb, teacher_prompt)
    if teacher_prompt is not None:
        for block in dataset.blocks[len(blocks) - len(text.conversations) :]:
            dataset.before(block, "teacher")  # one into which the prompt does not fit ends the run before it begins
    return dataset


class Dataset:
    """A tokenized text in blocks, and the batches of them."""

    def __init__(
        self,
        text: TokenizedText,
        blocks: Blocks,
        pair: TokenizerPair,
        cached_records: CachedRecords | None = None,
        loss_workspace_mb: int | None = None,
        teacher_prompt: TeacherPrompt | None = None,
    ):
        """loss_workspace_mb: memory for the logits of one segment of a batch, MiB; None: a batch is one segment

        teacher_prompt: what only the teacher reads, before each block
        """
        self.teacher_prompt, self.plain_starts = teacher_prompt, frozenset[int]()
        """plain_starts: teacher starts of blocks of plain text that stand among the conversations"""
        self.words: Words | None = None
        """Whose losses evaluations sum too"""
        self.text, self.pair, self.cached_records = text, pair, cached_records
        self.blocks = skip_start_tokens(blocks, text)
        self._loss_workspace_mb = loss_workspace_mb

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_tokens(self) -> int:
        """The student's target tokens."""
        is_target = self.text.student.is_target
        skipped = sum(int(is_target[start:end].sum()) for start, end, *_ in self.text.skipped_ranges)
        return int(is_target.sum()) - skipped

    def documents_of(self, block: int) -> Sequence[str]:
        """Names of the documents that a block holds a part of."""
        start, end, *_ = self.blocks[block]
        first_byte = self.text.student.ends[start - 1] if start else 0
        low = np.searchsorted(self.text.starts, first_byte, side="right") - 1
        high = np.searchsorted(self.text.starts, self.text.student.ends[end - 1], side="left")
        return self.text.names[low:high]

    def batch(self, blocks: list[int]) -> Batch:
        """Collate blocks: pad them, find the positions that predict, and align the teacher's with the student's."""
        ranges = [self.blocks[i] for i in blocks]
        student = self._token_batch("student", ranges)
        if self.pair.tables is None:
            teacher = self._token_batch("teacher", ranges) if self.teacher_prompt else student
            alignment = self.aligner.align_equal(student.positions, teacher.positions)
            return Batch(student, teacher, alignment, tuple(blocks), cached_logits=self._records(ranges, student))
        teacher = self._token_batch("teacher", ranges)
        shifts = shifts_of([self.before(block, "teacher") for block in ranges]) if self.teacher_prompt else None
        alignment = self.aligner.align(ranges, student.input_ids.shape[1], teacher.input_ids.shape[1], shifts)
        segments: tuple[Segment, ...] = ()
        if alignment.teacher_continuations is not None:
            coarser, limit = self.aligner.teacher_is_coarser, self.aligner.segment_size
            segments = build_segments(alignment, len(student.positions), teacher.positions, coarser, limit)
        return Batch(student, teacher, alignment, tuple(blocks), segments, cached_logits=self._records(ranges, teacher))

    def _token_batch(self, which: str, blocks: Sequence[Block]) -> TokenBatch:
        beginnings, replaced = zip(*(self.before(block, which) for block in blocks), strict=True)
        starts, ends = ([getattr(block, f"{which}_{end}") for block in blocks] for end in ("start", "end"))
        ranges = [(start + skip, end) for start, skip, end in zip(starts, replaced, ends, strict=True)]
        return token_batch(getattr(self.text, which), ranges, beginnings)

    def before(self, block: Block, which: str) -> tuple[list[int], int]:
        """The tokens before a block, and how many of its own they replace: the start token; the teacher's prompt."""
        start = self.start_of(block, which)
        if self.teacher_prompt is None or which == "student":
            return [start], 0
        conversations = self.text.conversations
        is_conversation = len(conversations) > 0 and block.teacher_start > conversations[0].teacher_start
        is_conversation = is_conversation and block.teacher_start not in self.plain_starts
        return self.teacher_prompt.begin(self.text, block, start, is_conversation)

    def start_of(self, block: Block, which: str) -> int:
        """The input before a block, of which nothing is predicted: a conversation's first token, or the start token."""
        start, is_teacher = getattr(block, f"{which}_start"), which == "teacher"
        conversations = self.text.conversations
        if len(conversations) and start > conversations[0][2 * is_teacher]:
            return int(getattr(self.text, which).ids[start - 1])
        return self.pair.teacher_start if is_teacher else self.pair.student_start

    def _records(self, blocks: Sequence[Block], teacher: TokenBatch) -> CachedTokenLogits | None:
        if self.cached_records is None:
            return None
        return self.cached_records.records(blocks, teacher.positions, teacher.input_ids.numel())

    @cached_property
    def aligner(self) -> Aligner:
        """Aligns the two tokenizations; built for the first batch."""
        return Aligner(self.pair, self.text, self.blocks, self._loss_workspace_mb, self.cached_records is not None)

    def token_batches(self, which: str, batch_size: int) -> Iterator[TokenBatch]:
        """All blocks once, in the tokens of one model ('student' or 'teacher'); for evaluation."""
        return self.token_batches_at(which, range(0, len(self.blocks), batch_size), batch_size)

    def token_batches_at(self, which: str, firsts: Iterable[int], batch_size: int) -> Iterator[TokenBatch]:
        """`batch_size` blocks from each of `firsts` on, as `token_batches`."""
        for first in firsts:
            blocks = self.blocks[first : first + batch_size]
            groups = torch.from_numpy(self.groups_of_targets(which, blocks))
            yield dataclasses.replace(self._token_batch(which, blocks), groups=groups)

    @property
    def num_groups(self) -> int:
        """Of target tokens, in an evaluation: the documents; behind them the `words`, and all other tokens."""
        return len(self.text.names) + (0 if self.words is None else len(self.words.names) + 1)

    def groups_of_targets(self, which: str, blocks: Sequence[Block]) -> np.ndarray:
        """int64 [G, N]: the document, and the word if there are `words`, of each target token in these blocks, in the
        tokens of one model.
        """
        ranges = [(getattr(block, f"{which}_start"), getattr(block, f"{which}_end")) for block in blocks]
        tokens = np.concatenate([np.arange(start, end) for start, end in ranges])
        tokens = tokens[np.asarray(getattr(self.text, which).is_target)[tokens]]
        groups = [np.searchsorted(self._first_tokens[which], tokens, side="right") - 1]
        if self.words is not None:
            groups.append(len(self.text.names) + self.words.of(which, tokens))
        return np.stack(groups)

    @cached_property
    def _first_tokens(self) -> dict[str, np.ndarray]:
        return {which: self.text.first_tokens(which) for which in ("student", "teacher")}

    def micro_blocks(
        self, step: int, batch_size: int, accum_steps: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> list[list[int]]:
        """The blocks of each micro-batch of one step: consecutive parts of an endless sequence of shuffled epochs.

        Each of several ranks takes its own share of every part: together they read the blocks that one process reads
        with `ranks` times the batch size.
        """
        size = ranks * batch_size
        starts = [(step * accum_steps + micro) * size + rank * batch_size for micro in range(accum_steps)]
        return [[self._shuffled(start + i, seed) for i in range(batch_size)] for start in starts]

    def micro_batches(self, *args, **kwargs) -> list[Batch]:
        """The micro-batches of one step. Arguments as for `micro_blocks`"""
        return [self.batch(blocks) for blocks in self.micro_blocks(*args, **kwargs)]

    def _shuffled(self, position: int, seed: int) -> int:
        epoch, index = divmod(position, len(self.blocks))
        return int(_order(len(self.blocks), epoch, seed)[index])


@lru_cache(maxsize=4)
def _order(num_blocks: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)

"""Documents to batches: token streams -> blocks -> `Batch`, in one direction and in a fixed order.

Documents are joined into one stream per tokenizer, an end-of-text token after each. The stream is cut into
blocks at bytes on which both tokenizers agree, so that student and teacher always read the same text; each
block opens with its model's start token and predicts every one of its tokens, so the loss covers every token
of the text exactly once an epoch and nothing is dropped (a document that a tokenizer cannot represent is left
out by name). Which blocks a step sees is a function of the seed and the step alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment import TokenizerPair, cover
from sar_kd.config import UsageError
from sar_kd.documents import Document
from sar_kd.losses import IGNORE_INDEX, Projection, next_token_targets
from sar_kd.tokens import encode


@dataclass(frozen=True)
class TokenStream:
    """All documents in one tokenizer's tokens."""

    ids: np.ndarray
    """int32 [N]"""
    ends: np.ndarray
    """int64 [N]: where each token ends in the joined text, an end-of-text token counting one byte."""
    has_dummy: np.ndarray
    """bool [N]: the token's bytes begin with a space that the text, as both models read it, does not have."""


class Block(NamedTuple):
    """One stretch of text as index ranges into both streams."""

    student_start: int
    student_end: int
    teacher_start: int
    teacher_end: int


@dataclass(frozen=True)
class TokenBatch:
    """What one model reads: start token, then the block's tokens, right padded.

    There is no attention mask: with padding on the right a causal model's real positions never see it.
    """

    input_ids: Tensor
    """int64 [B, T]"""
    labels: Tensor
    """int64 [B, T], unshifted"""
    rows: Tensor
    """int64 [N]: rows of the flattened logits that predict something"""
    targets: Tensor
    """int64 [N]: what they predict"""

    def to(self, device: torch.device) -> TokenBatch:
        return _moved(self, device)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the same text for both models, and which teacher row speaks about which student row."""

    student: TokenBatch
    teacher: TokenBatch
    kd_rows: Tensor
    """int64 [K]: indices into the student's N rows"""
    teacher_rows: Tensor
    """int64 [K]: rows of the teacher's flattened logits"""
    projection: Projection | None
    """None where the tokenizers are equal"""
    blocks: tuple[int, ...]
    """Which blocks these are, for naming the documents of a bad batch."""

    @property
    def num_target_tokens(self) -> int:
        return len(self.student.targets)

    def to(self, device: torch.device) -> Batch:
        return _moved(self, device)


def _moved(record, device: torch.device):
    """The same record with its tensors, and its records' tensors, on `device`."""
    changed = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            changed[item.name] = value.to(device, non_blocking=True)
        elif dataclasses.is_dataclass(value):
            changed[item.name] = _moved(value, device)
    return dataclasses.replace(record, **changed)


class Corpus:
    """Documents as blocks of tokens, and the batches made of them."""

    def __init__(self, documents: list[Document], pair: TokenizerPair, max_student: int, max_teacher: int):
        """max_student, max_teacher: most tokens that a block may hold for each model, start token included

        Raises: UsageError if nothing is left to read, or a stretch without a common boundary exceeds a model
        """
        self.pair = pair
        self.left_out: list[str] = []
        self.student, self.teacher, self.names, self.starts, self.num_bytes = self._join(documents)
        self.blocks = list(_cut(self.student.ends, self.teacher.ends, max_student - 1, max_teacher - 1))

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_tokens(self) -> int:
        """The student's tokens, each predicted once an epoch."""
        return len(self.student.ids)

    def _join(self, documents: list[Document]):
        pair = self.pair
        texts = [pair.canonical(document.text) if _is_unicode(document.text) else "" for document in documents]
        sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
        encoded = [encode(pair.student, texts)] + ([] if pair.equal else [encode(pair.teacher, texts)])
        keep = np.array([bool(ids) for ids in encoded[0]])
        # Bytes that a tokenizer puts before each text: 0, or 1 for a dummy space; anything else is not this text.
        dummies = np.zeros((2, len(texts)), dtype=np.int64)
        for side, table in enumerate(pair.tables or ()):
            dummies[side] = [int(table.lengths[ids].sum()) for ids in encoded[min(side, len(encoded) - 1)]] - sizes
            keep &= (dummies[side] == 0) | ((dummies[side] == 1) & table.dummy_prefix)
        kept = keep.nonzero()[0].tolist()
        self.left_out = [documents[i].name for i in (~keep).nonzero()[0]]
        if not kept:
            shown = ", ".join(self.left_out[:3])
            raise UsageError(f"--train_file: no document holds text that both tokenizers can represent ({shown})")
        dummies, sizes = dummies[:, kept], sizes[kept]
        # A space that both sides put there is text to both; one that only one side puts there is not text.
        shared = dummies.min(axis=0)
        ends = (pair.student_end, pair.teacher_end)
        streams = [
            self._stream(side, [ids[i] for i in kept], ends[side], dummies[side] > shared)
            for side, ids in enumerate(encoded)
        ]
        lengths = 1 + (sizes + shared if pair.tables else np.array([len(encoded[0][i]) for i in kept]))
        return (
            streams[0],
            streams[-1],
            [documents[i].name for i in kept],
            np.cumsum(lengths) - lengths,
            int(sizes.sum()),
        )

    def _stream(self, side: int, encoded: list[list[int]], end_id: int, has_dummy: np.ndarray) -> TokenStream:
        """One tokenizer's stream; `has_dummy` bool [documents]: the first token begins with a space that is no text."""
        counts = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
        ids = np.fromiter((i for document in encoded for i in (*document, end_id)), dtype=np.int32, count=counts.sum())
        flags = np.zeros(len(ids), dtype=bool)
        if self.pair.tables is None:
            return TokenStream(ids, np.arange(1, len(ids) + 1), flags)
        lasts = np.cumsum(counts) - 1
        flags[(lasts - counts + 1)[has_dummy]] = True
        widths = self.pair.tables[side].lengths[ids] - flags
        widths[lasts] = 1
        return TokenStream(ids, np.cumsum(widths), flags)

    def documents_of(self, block: int) -> list[str]:
        """Names of the documents that a block holds a part of."""
        start, end, *_ = self.blocks[block]
        first_byte = self.student.ends[start - 1] if start else 0
        low = np.searchsorted(self.starts, first_byte, side="right") - 1
        high = np.searchsorted(self.starts, self.student.ends[end - 1], side="left")
        return self.names[low:high]

    def batch(self, blocks: list[int]) -> Batch:
        """Collate blocks: pad, find the rows that predict, and align the teacher's with the student's."""
        cuts = [self.blocks[i] for i in blocks]
        student = _tokens(self.student, [(c.student_start, c.student_end) for c in cuts], self.pair.student_start)
        if self.pair.tables is None:
            every = torch.arange(len(student.targets))
            return Batch(student, student, every, student.rows, None, tuple(blocks))
        teacher = _tokens(self.teacher, [(c.teacher_start, c.teacher_end) for c in cuts], self.pair.teacher_start)
        return Batch(student, teacher, *self._align(cuts, teacher.input_ids.shape[1]), tuple(blocks))

    def _align(self, cuts: list[Block], teacher_width: int) -> tuple[Tensor, Tensor, Projection]:
        rows, teacher_rows, tokens, emitted = [], [], [], []
        first_row = 0
        for number, cut in enumerate(cuts):
            start = self.student.ends[cut.student_start - 1] if cut.student_start else 0
            student, teacher = slice(cut.student_start, cut.student_end), slice(cut.teacher_start, cut.teacher_end)
            found = cover(self.student.ends[student] - start, self.teacher.ends[teacher] - start)
            # A token with a dummy space of its own says other bytes than the text does.
            keep = ~(self.student.has_dummy[student][found.student] | self.teacher.has_dummy[teacher][found.teacher])
            rows.append(first_row + found.student[keep])
            teacher_rows.append(number * teacher_width + found.teacher[keep])
            tokens.append(self.teacher.ids[teacher][found.teacher[keep]].astype(np.int64))
            emitted.append(found.emitted[keep])
            first_row += cut.student_end - cut.student_start
        emitted_bytes = np.concatenate(emitted)
        order = np.argsort(emitted_bytes > 0, kind="stable")
        num_open = int((emitted_bytes == 0).sum())
        ordered = [torch.from_numpy(np.concatenate(part)[order]) for part in (rows, teacher_rows)]
        inside = order[num_open:]
        entries = self.pair.projection.inside(np.concatenate(tokens)[inside], emitted_bytes[inside])
        columns, destinations = self._open_map
        return (*ordered, Projection(num_open, columns, destinations, *map(torch.from_numpy, entries)))

    @cached_property
    def _open_map(self) -> tuple[Tensor, Tensor]:
        projection = self.pair.projection
        return torch.from_numpy(projection.columns), torch.from_numpy(projection.destinations)

    def coverage(self, most_blocks: int = 64) -> float:
        """Share of the student's tokens that a teacher row speaks about, in the first blocks."""
        batch = self.batch(list(range(min(most_blocks, len(self.blocks)))))
        return len(batch.kd_rows) / batch.num_target_tokens

    def token_batches(self, which: str, batch_size: int) -> Iterator[TokenBatch]:
        """Every block once, as one of the models ('student' or 'teacher') reads it; for evaluation."""
        start_id = getattr(self.pair, f"{which}_start")
        for first in range(0, len(self.blocks), batch_size):
            cuts = self.blocks[first : first + batch_size]
            ranges = [(getattr(cut, f"{which}_start"), getattr(cut, f"{which}_end")) for cut in cuts]
            yield _tokens(getattr(self, which), ranges, start_id)

    def micro_batches(self, step: int, batch_size: int, accum_steps: int, seed: int) -> list[Batch]:
        """The micro-batches of one step: consecutive stretches of an endless row of shuffled epochs."""
        first = step * batch_size * accum_steps
        return [
            self.batch([self._shuffled(first + micro * batch_size + i, seed) for i in range(batch_size)])
            for micro in range(accum_steps)
        ]

    def _shuffled(self, position: int, seed: int) -> int:
        epoch, place = divmod(position, len(self.blocks))
        return int(self._order(epoch, seed)[place])

    def _order(self, epoch: int, seed: int) -> np.ndarray:
        key = (epoch, seed)
        if self._last_order[0] != key:
            self._last_order = (key, np.random.default_rng([seed, epoch]).permutation(len(self.blocks)))
        return self._last_order[1]

    _last_order: tuple = (None, None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and no encoding can
        return False
    return True


def _cut(student_ends: np.ndarray, teacher_ends: np.ndarray, max_student: int, max_teacher: int) -> Iterator[Block]:
    """Cut both streams, as late as the limits allow, where a token ends on both sides."""
    common = student_ends if student_ends is teacher_ends else np.intersect1d(student_ends, teacher_ends)
    student_start = teacher_start = 0
    while student_start < len(student_ends):
        latest_student = student_ends[min(student_start + max_student, len(student_ends)) - 1]
        latest_teacher = teacher_ends[min(teacher_start + max_teacher, len(teacher_ends)) - 1]
        reached = student_ends[student_start - 1] if student_start else 0
        at = np.searchsorted(common, min(latest_student, latest_teacher), side="right") - 1
        if at < 0 or common[at] <= reached:
            raise UsageError(
                f"--block_size {max_student + 1}: a stretch of text from byte {reached} on holds no place within a "
                "block at which both tokenizers end a token; raise it"
            )
        # The first token that ends there: one without bytes behind it belongs to what follows.
        student_end = int(np.searchsorted(student_ends, common[at])) + 1
        teacher_end = int(np.searchsorted(teacher_ends, common[at])) + 1
        yield Block(student_start, student_end, teacher_start, teacher_end)
        student_start, teacher_start = student_end, teacher_end


def _tokens(stream: TokenStream, ranges: list[tuple[int, int]], start_id: int) -> TokenBatch:
    width = 1 + max(end - start for start, end in ranges)
    input_ids = torch.full((len(ranges), width), start_id, dtype=torch.int64)
    labels = torch.full((len(ranges), width), IGNORE_INDEX, dtype=torch.int64)
    for row, (start, end) in enumerate(ranges):
        ids = torch.from_numpy(stream.ids[start:end].astype(np.int64))
        input_ids[row, 1 : 1 + len(ids)] = ids
        labels[row, 1 : 1 + len(ids)] = ids
    return TokenBatch(input_ids, labels, *next_token_targets(labels))

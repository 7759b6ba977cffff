"""A text as one tokenizer's stream of tokens: their ids, the byte at which each ends, and which are to be predicted.

`TokenizedText` holds the streams of both models over the same bytes; a `Block` is one training example of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, overload

import numpy as np

from sar_kd.tokenization.token_table import Ids, TokenTable

TEMPLATE, PROMPT, RESPONSE, STOP, FORMAT = range(5)
"""Kinds of spans; RESPONSE, STOP and FORMAT are predicted."""


class Span(NamedTuple):
    """Consecutive tokens of one kind."""

    ids: Ids
    kind: int
    """TEMPLATE: no bytes. FORMAT: what a template writes inside an answer, no bytes. PROMPT and RESPONSE: bytes of the
    text. STOP: one byte for the last token, none before it."""
    has_dummy: bool = False
    """The tokenizer put a space (its dummy prefix) before a text that does not begin with one."""
    dummy_is_text: bool = False
    """Both tokenizers put that space, so it counts as text."""


class TokenCount(Sequence):
    """The numbers 1 to N, without an array of them: the ends of tokens that count one each."""

    def __init__(self, size: int):
        self._numbers = range(1, size + 1)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, key):
        found = self._numbers[key]
        return np.arange(found.start, found.stop, found.step) if isinstance(key, slice) else found

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.arange(1, len(self) + 1, dtype=dtype or np.int64)


Ends = np.ndarray | TokenCount


@dataclass(frozen=True)
class TokenStream:
    """All documents in one tokenizer's tokens; the arrays are in memory or memory-mapped."""

    ids: np.ndarray
    """int32 [N]"""
    ends: Ends
    """int64 [N]: where each token ends in the joined text. In bytes, a stop token counting one and a template's token
    none; in tokens where the tokenizers are equal, since no bytes are needed."""
    has_dummy: np.ndarray
    """bool [N]: the token's bytes begin with a space that is not in the text as both models read it."""
    is_target: np.ndarray
    """bool [N]: the token is to be predicted."""


def concatenate_spans(documents: Sequence[list[Span]], table: TokenTable | None) -> tuple[TokenStream, np.ndarray]:
    """Join documents to one stream.

    table: the tokens' bytes; None where tokens count one each
    Returns: the stream; int64 [documents + 1], the number of tokens before each document, and of all
    """
    span_ids, kinds, has_dummy, is_text = zip(*chain.from_iterable(documents), strict=True)
    span_kinds = np.array(kinds, dtype=np.uint8)
    counts = np.fromiter(map(len, span_ids), dtype=np.int64, count=len(span_ids))
    bounds = np.append(0, np.cumsum(counts))[np.cumsum([0, *map(len, documents)])]
    ids = np.concatenate([np.asarray(span, dtype=np.int32) for span in span_ids])
    token_kinds = np.repeat(span_kinds, counts)
    dummy, is_target = np.zeros(len(ids), dtype=bool), token_kinds >= RESPONSE
    if table is None:
        return TokenStream(ids, TokenCount(len(ids)), dummy, is_target), bounds
    lasts = np.cumsum(counts) - 1
    dummy[(lasts - counts + 1)[np.array(has_dummy) & ~np.array(is_text)]] = True
    num_bytes = table.lengths[ids] - dummy
    num_bytes[(token_kinds != PROMPT) & (token_kinds != RESPONSE)] = 0
    num_bytes[lasts[span_kinds == STOP]] = 1
    return TokenStream(ids, np.cumsum(num_bytes), dummy, is_target), bounds


CHUNK_TOKENS = 2**18
"""Tokens, or blocks, of a memory-mapped array that are read at a time."""


class Block(NamedTuple):
    """One example: the same text as index ranges of both streams."""

    student_start: int
    student_end: int
    teacher_start: int
    teacher_end: int


class Blocks(Sequence[Block]):
    """Many blocks, in 32 bytes each."""

    def __init__(self, ranges: np.ndarray):
        """ranges: int64 [N, 4], the fields of each `Block`"""
        self.ranges = ranges

    @staticmethod
    def of(blocks: Iterable[Block]) -> Blocks:
        return Blocks(np.fromiter(chain.from_iterable(blocks), dtype=np.int64).reshape(-1, 4))

    def __len__(self) -> int:
        return len(self.ranges)

    @overload
    def __getitem__(self, key: int) -> Block: ...

    @overload
    def __getitem__(self, key: slice) -> list[Block]: ...

    def __getitem__(self, key):
        found = self.ranges[key].tolist()
        return [Block(*block) for block in found] if isinstance(key, slice) else Block(*found)

    def __iter__(self) -> Iterator[Block]:
        return (block for first in range(0, len(self), CHUNK_TOKENS) for block in self[first : first + CHUNK_TOKENS])

    def __eq__(self, other) -> bool:
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))


@dataclass(frozen=True)
class TokenizedText:
    """All documents as one stream for each model; one and the same stream where the tokenizers are equal."""

    student: TokenStream
    teacher: TokenStream
    names: Sequence[str]
    """Names of the documents, in order."""
    starts: np.ndarray
    """int64: where each document starts, in the unit of `TokenStream.ends`."""
    num_bytes: int
    """Bytes of the text that is predicted."""
    document_bytes: np.ndarray
    """int64 [documents]: those of each document."""
    skipped_documents: Sequence[str]
    """Names of the documents that cannot be used, with the reason except where one is empty."""
    conversations: Blocks
    """The last documents: one block each."""
    truncated: Sequence[str]
    """Names of the conversations that are cut short."""
    dropped_tokens: int
    """The student's target tokens in what is cut off."""
    without_template: tuple[str, ...]
    """'student', 'teacher': whose tokenizer has no chat template, so that conversations take `DEFAULT_TEMPLATE`."""
    dropped_answers: Sequence[str] = ()
    """For each answer that is not predicted because a chat template drops a part of it, its document and whose."""
    stop_ids: tuple[tuple[int, ...], ...] = ((),)
    """By stream, the tokens that end a document or an answer of a conversation, and stand inside none."""
    inner_ids: tuple[tuple[int, ...], ...] = ((),)
    """By stream, the special tokens that a chat template writes inside answers, where they end none."""
    skipped_passages: Sequence[str] = ()
    """For each passage of a document that is skipped, the document's name with the reason."""
    skipped_bytes: int = 0
    """Bytes of the text that would be predicted, were it not for the tokenizers."""
    skipped_ranges: Blocks = field(default_factory=lambda: Blocks.of(()))
    """Of the skipped passages those that are in the streams, and in no block."""

    def first_tokens(self, which: str) -> np.ndarray:
        """int64 [documents]: where each document begins in the stream of one model ('student' or 'teacher')."""
        stream, column = getattr(self, which), 0 if which == "student" else 2
        firsts = np.asarray(self.starts[: len(self.names) - len(self.conversations)])
        if not isinstance(stream.ends, TokenCount):  # behind the last token with bytes that ends there
            plain_ends = stream.ends[: self.conversations[0][column]] if len(self.conversations) else stream.ends
            firsts = np.where(firsts > 0, np.searchsorted(plain_ends, firsts) + 1, 0)
        return np.concatenate([firsts, self.conversations.ranges[:, column]]).astype(np.int64)

    def num_tokens(self, stream: TokenStream) -> int:
        """The tokens of one of the two streams, without the start tokens of plain documents."""
        num_plain = len(self.names) - len(self.conversations)
        return len(stream.ids) - num_plain * int(num_plain > 0 and not stream.is_target[0])

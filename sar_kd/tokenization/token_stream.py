"""One tokenizer's tokens of a text: their ids, where they end in it, and which of them are to be predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, overload

import numpy as np

from sar_kd.tokenization.token_table import Ids, TokenTable

TEMPLATE, PROMPT, RESPONSE, STOP = range(4)
"""Kinds of parts; from RESPONSE on they are to be learned."""


class Part(NamedTuple):
    """A run of one model's tokens."""

    ids: Ids
    kind: int
    """GLUE: no bytes. PROMPT and RESPONSE: bytes of the text. STOP: the last token is one virtual byte."""
    has_dummy: bool = False
    """A content that begins with a space which the text does not have."""
    dummy_is_text: bool = False
    """Both models read that space, so it is text to both."""
    ends: Ids | None = None
    """Where each token ends in the part, in bytes, for a tokenizer whose tokens have no bytes of their own."""


class Counting(Sequence):
    """1, 2, 3 ...: where tokens end that count one each, without an array of them."""

    def __init__(self, size: int):
        self._numbers = range(1, size + 1)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, key):
        found = self._numbers[key]
        return np.arange(found.start, found.stop, found.step) if isinstance(key, slice) else found

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.arange(1, len(self) + 1, dtype=dtype or np.int64)


Ends = np.ndarray | Counting


@dataclass(frozen=True)
class TokenStream:
    """All documents in one tokenizer's tokens; arrays in memory, or of files."""

    ids: np.ndarray
    """int32 [N]"""
    ends: Ends
    """int64 [N]: where each token ends in the joined text, in bytes, a stop token counting one and what a chat template
    adds none; in tokens where the tokenizers are equal and no bytes are needed."""
    has_dummy: np.ndarray
    """bool [N]: the token's bytes begin with a space that the text, as both models read it, does not have."""
    is_target: np.ndarray
    """bool [N]: the token is to be predicted."""


def concatenate_spans(documents: Sequence[list[Part]], table: TokenTable | None) -> tuple[TokenStream, np.ndarray]:
    """One tokenizer's stream of documents in parts, and int64 [documents + 1]: its tokens before each, and all.

    table: None where tokens count one each, or the parts say themselves where their tokens end
    """
    part_ids, *columns, part_ends = zip(*chain.from_iterable(documents), strict=True)
    part_kinds, has_dummy, is_text = map(np.array, columns)
    counts = np.fromiter(map(len, part_ids), dtype=np.int64, count=len(part_ids))
    bounds = np.append(0, np.cumsum(counts))[np.cumsum([0, *map(len, documents)])]
    ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in part_ids])
    kinds = np.repeat(part_kinds.astype(np.uint8), counts)
    flags, is_target = np.zeros(len(ids), dtype=bool), kinds >= RESPONSE
    if table is None and any(ends is not None for ends in part_ends):
        placed = (np.diff(ends, prepend=0) if ends is not None else np.ones(1, dtype=np.int64) for ends in part_ends)
        return TokenStream(ids, np.cumsum(np.concatenate(list(placed))), flags, is_target), bounds
    if table is None:
        return TokenStream(ids, Counting(len(ids)), flags, is_target), bounds
    lasts = np.cumsum(counts) - 1
    flags[(lasts - counts + 1)[has_dummy & ~is_text]] = True
    widths = table.lengths[ids] - flags
    widths[(kinds == TEMPLATE) | (kinds == STOP)] = 0
    widths[lasts[part_kinds == STOP]] = 1
    return TokenStream(ids, np.cumsum(widths), flags, is_target), bounds


CHUNK_TOKENS = 2**18


class Block(NamedTuple):
    """One stretch of text as index ranges into both streams."""

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
    """All documents as one stream for each model; one and the same where the tokenizers are equal."""

    student: TokenStream
    teacher: TokenStream
    names: Sequence[str]
    """Names of the documents, in order."""
    starts: np.ndarray
    """int64: where each of them starts, in the unit of `TokenStream.ends`."""
    num_bytes: int
    """Bytes of the text that is predicted."""
    left_out: Sequence[str]
    """Names of the documents that are empty or that a tokenizer cannot represent, of conversations with the reason."""
    conversations: Blocks
    """The last documents: one block each."""
    truncated: Sequence[str]
    """Names of the conversations that are cut short."""
    dropped_tokens: int
    """Tokens that the student would predict in what is cut off."""
    without_template: tuple[str, ...]
    """'student', 'teacher': whose conversations are written in our template, for want of its own."""

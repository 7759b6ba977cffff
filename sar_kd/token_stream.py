"""One tokenizer's tokens of a text: their ids, where they end in it, and which of them are to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from sar_kd.tokens import Ids, TokenTable

GLUE, PROMPT, RESPONSE, STOP = range(4)
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


def lay(documents: Sequence[list[Part]], table: TokenTable | None) -> tuple[TokenStream, np.ndarray]:
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
    widths[(kinds == GLUE) | (kinds == STOP)] = 0
    widths[lasts[part_kinds == STOP]] = 1
    return TokenStream(ids, np.cumsum(widths), flags, is_target), bounds

"""The index arrays that a batch carries: which positions of the two models are compared, and over which shared classes;
and the tokens of each tokenizer that they are made from.

A position is that of a logits vector, so it belongs to the token that it predicts. The student's positions are counted
among the N that predict a target, the teacher's in its flattened logits [B * T_t].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sar_kd.tokenization.token_stream import TokenStream

STUDENT, TEACHER = range(2)
"""Index of a side in a pair (student, teacher)"""


@dataclass(frozen=True)
class SharedClasses:
    """The classes at a common boundary, where both tokenizers start a token: the same for every such position."""

    num_classes: int
    student_tokens: Tensor
    """int64 [M_s]: student ids that have a class, ascending"""
    student_classes: Tensor
    """int64 [M_s]: the class of each; every class has at least one token"""
    teacher_tokens: Tensor
    """int64 [M_t]"""
    teacher_classes: Tensor
    """int64 [M_t]"""


@dataclass(frozen=True)
class TokensBefore:
    """B continuations inside a token, where the token before may go on over the prefix: the bytes of both are a token
    too, or begin one. So the prefix may have come by two paths: that token ended and another one began, as in the text,
    or it did not end.
    """

    continuations: Tensor
    """int64 [B], ascending"""
    positions: Tensor
    """int64 [B]: the position that predicts the token before"""
    tokens: Tensor
    """int64 [B]: the token before, as in the text"""
    entries: Tensor
    """int64 [3, F]: index among the B, ascending; token that spells both or extends that; class of the continuation"""


@dataclass(frozen=True)
class Continuations:
    """K boundaries at which one tokenizer starts a token, and the last token of the other may continue.

    The former is the starting, the latter the continuing side; either model can be either. The continuing position is
    the one that predicts that last token. Conditioned on the token's bytes before the boundary, its prefix, it is one
    of the tokens that extend the prefix, or it ends there. Each continuation has classes of its own, numbered across
    all K; its last class is that the token ends.

    The first K_1 are inside a token of the text: it does continue, and only the starting side starts a token. The
    others are at common boundaries, where the token ended; only the continuing side's probabilities are needed there.
    """

    continuing_positions: Tensor
    """int64 [K]"""
    starting_positions: Tensor
    """int64 [K_1]"""
    continuing_entries: Tensor
    """int64 [3, E]: continuation, token id, class"""
    starting_entries: Tensor
    """int64 [3, E']: the same of the first K_1; the tokens that are not listed stand for the end"""
    class_continuations: Tensor
    """int64 [O]: the continuation of each class, ascending"""
    end_classes: Tensor
    """int64 [K]: the last class of each continuation, that the token ends"""
    can_end: Tensor
    """bool [K_1]: the continuing vocabulary has a token that is the prefix itself"""
    num_inside_classes: int
    """O_1: classes of the first K_1"""
    before: TokensBefore | None = None
    """Of the teacher's continuations: where the token before may continue too"""

    @property
    def num_inside(self) -> int:
        """K_1."""
        return len(self.starting_positions)


@dataclass(frozen=True)
class Alignment:
    """The positions of a batch at which the two models can be compared."""

    student_positions: Tensor
    """int64 [K]: student positions at a common boundary, one of a pair each"""
    teacher_positions: Tensor
    """int64 [K]: the teacher position of each pair"""
    strict: Tensor
    """bool [K]: both predict a token of the same bytes"""
    teacher_continuations: Continuations | None
    """Where the student starts a token and the teacher's last token may continue; None without projection"""
    student_continuations: Continuations | None
    """The same with the sides exchanged"""
    token_end: Tensor
    """int64 [K]: for each pair the coarser tokenizer's continuation that ends there, -1 for none"""
    continuation_paths: Tensor
    """int64 [3, X]: pair, shared class, and the class of the pair's continuation that has the same next token"""
    student_chunks: Tensor
    """int64 [N]: the chunk of each token that the student predicts, -1 for none"""
    teacher_chunks: Tensor
    """int64 [N_t]: the same for the teacher"""
    num_chunks: int
    student_ends: Tensor
    """int64 [num_chunks]: index in the flattened student inputs at which each chunk is complete"""
    teacher_ends: Tensor
    """int64 [num_chunks]"""


class BatchTokens:
    """One tokenizer's tokens of a batch, block after block; byte offsets continue across blocks."""

    def __init__(
        self,
        stream: TokenStream,
        ranges: Sequence[tuple[int, ...]],
        width: int,
        side: int,
        shifts: np.ndarray | None = None,
    ):
        """ranges: of the blocks in the stream; width: of the inputs, start token first; side: STUDENT or TEACHER

        shifts: int64 [B], by how many places each block's tokens stand later in the inputs; None for 0
        """
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
        if shifts is not None:
            self.inputs += np.repeat(shifts, num_tokens)
        self.positions = np.cumsum(self.is_target) - 1 if side == STUDENT else self.inputs - 1
        """The position that predicts each token: the student's among its N targets, the teacher's in all logits"""
        dummy = np.concatenate([stream.has_dummy[span] for span in spans])
        # A token with a dummy space (one that the tokenizer added) has bytes that are not in the text.
        self.is_usable = self.is_target & ~dummy
        # A template's token has no bytes, and does not invalidate the next chunk.
        self.invalidates_chunk = ~self.is_usable & ((self.ends > self.starts) | dummy)
        self.is_trailing = self.starts == np.repeat(block_ends, num_tokens)
        """Without bytes at the end of a block, and so in no chunk"""

"""One tokenizer's tokens of a batch, with the byte at which each starts and the position that predicts it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sar_kd.alignment.batch_alignment import STUDENT
from sar_kd.tokenization.token_stream import TokenStream


class BatchTokens:
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

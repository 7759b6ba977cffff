"""The loss of each held-out document, and of each word, kept in the run folder for the comparison of models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from sar_kd.data.dataset import Dataset
from sar_kd.reporting.held_out import HeldOut, WordLosses
from sar_kd.tokenization.token_stream import CHUNK_TOKENS


class DocumentLosses:
    """Writes `held_out.json` about one held-out text."""

    def __init__(self, validation: Dataset, tokenizer: str):
        """tokenizer: digest of the student's"""
        self._validation, self._tokenizer = validation, tokenizer

    @cached_property
    def _digests(self) -> tuple[str, str, str]:
        """Of the text in the student's tokens, of the tokenizer, and of the blocks."""
        text = self._validation.text
        stream, firsts = text.student, text.first_tokens("student")
        blocks = self._validation.blocks.ranges[:, :2]
        return _digest(stream.ids, stream.is_target, firsts), self._tokenizer, _digest(blocks)

    def write(self, folder: Path, nats: Mapping[str, Sequence[float]]) -> None:
        """nats: for each model, its loss on each group of `Dataset.num_groups`; a model without any is left out"""
        text, words = self._validation.text, self._validation.words
        count = len(text.names)
        known = {model: np.array(values[:count]) for model, values in nats.items() if len(values)}
        by_word = None
        if words is not None:  # which a part of the run that was without a control has not measured
            size = self._validation.num_groups
            measured = {model: np.array(values[count:-1]) for model, values in nats.items() if len(values) == size}
            measured.pop("final", None)
            by_word = WordLosses(words.names, words.counts, words.num_bytes, measured)
        HeldOut(*self._digests, text.names, text.document_bytes, known, by_word).write(folder)


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        for first in range(0, len(array), CHUNK_TOKENS):
            digest.update(np.ascontiguousarray(array[first : first + CHUNK_TOKENS]).tobytes())
    return digest.hexdigest()

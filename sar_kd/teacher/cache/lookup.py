"""Finds the cached record of each target token of a run: by document, and by token within the document.

A run may skip documents that are in the cache, because its student's tokenizer cannot represent them, and may cut a
conversation shorter. Both tokenizers read text that the student's has normalised (`TokenizerPair.canonical`), so with
another student the teacher's tokens can differ from the cached ones; such a document has no records. A plain document
is one that is not a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment.segments import split_range
from sar_kd.data.batch import CachedDraws, CachedTokenLogits, CachedTopK
from sar_kd.data.column_store import DamagedStore, open_column_store, strings_of
from sar_kd.teacher.cache.draws import gaps_of, log_factors_of
from sar_kd.teacher.cache.format import Shards, damaged_cache, index_key, index_path
from sar_kd.tokenization.token_stream import Block, TokenizedText

CHUNK = 2**20
"""Tokens that are processed at once"""


@dataclass(frozen=True)
class CacheIndex:
    """The index of a cached text, memory-mapped. Records of plain documents come first, then conversations."""

    tokens: np.ndarray | PlainTargets
    """int32 [N]: the target token of each record"""
    documents: np.ndarray
    """int64 [documents + 1]: cumulative record counts (offsets)"""
    names: Sequence[str]
    """Names of the documents, in order"""
    block_ends: np.ndarray
    """int64: record offset at the end of each of the teacher's blocks of plain documents"""
    num_conversations: int
    """The last documents; each was one of the teacher's blocks"""


class CachedText:
    """A text whose teacher logits are cached."""

    def __init__(self, folder: Path, header: dict, text: str, temperature: float):
        """text: one of `TEXTS`; temperature: of the run

        Tail and sums are read at that temperature, or at the cache's first one if it lacks that: `check_settings`
        refuses this for the methods that use them.

        Raises: UsageError if the index is damaged
        """
        self.shards, self.metadata = Shards(folder, header, text), header["metadata"]
        self.is_elsewhere = "source" in self.metadata
        """Another program computed it, and gave no log-probabilities where a record holds none"""
        self.temperature, temperatures = temperature, self.metadata["temperatures"]
        self.temperature_index = temperatures.index(temperature) if temperature in temperatures else 0
        path = index_path(folder, text)
        try:
            columns, of_index = open_column_store(path, index_key(header, text))
        except (DamagedStore, OSError) as error:
            raise damaged_cache(folder, f"{path.relative_to(folder)} cannot be used ({error})") from None
        self.index = CacheIndex(
            columns["tokens"],
            columns["documents"],
            strings_of(columns, "names"),
            columns["block_ends"],
            of_index["num_conversations"],
        )

    def lookup(self, text: TokenizedText) -> CacheLookup:
        """The records of the same text as a run tokenizes it."""
        return CacheLookup(text, self.index, self)


class CacheLookup:
    """A run's text with the cached record of each target token of the teacher."""

    def __init__(self, text: TokenizedText, index: CacheIndex, cached: CachedText | None = None):
        """cached: the records; None if only their indices are needed"""
        self.text, self.index, self._cached = text, index, cached
        self.plain = PlainTargets(text)
        self._conversation_starts = text.conversations.ranges[:, 2]
        stored = self._stored_documents()
        self.first_records = np.where(stored >= 0, index.documents[stored], -1)
        """int64 [documents]: index of the first record of each, -1 if it has none"""
        self._drop_changed(stored)

    def _stored_documents(self) -> np.ndarray:
        """int64 [documents]: which cached document each one is, by name and order; -1 if it is not cached."""
        names, stored_names = self.text.names, self.index.names
        num_conversations = len(self._conversation_starts)
        if (len(names), num_conversations) == (len(stored_names), self.index.num_conversations):
            return np.arange(len(names))
        cached_index = np.full(len(names), -1, dtype=np.int64)
        plain = len(names) - num_conversations, len(stored_names) - self.index.num_conversations
        start = stored = 0
        for end, stored_end in (plain, (len(names), len(stored_names))):
            for document in range(start, end):
                name = names[document]
                match = next((i for i in range(stored, stored_end) if stored_names[i] == name), None)
                if match is not None:
                    cached_index[document], stored = match, match + 1
            start, stored = end, stored_end
        return cached_index

    def _drop_changed(self, stored: np.ndarray) -> None:
        """Unset the records of documents whose tokens differ from the cached ones."""
        sizes = np.diff(self.index.documents)
        num_plain = len(self.plain.starts) - 1
        self.first_records[:num_plain][sizes[stored[:num_plain]] != np.diff(self.plain.starts)] = -1
        for part in split_range(len(self.plain), CHUNK):
            targets = np.arange(part.start, part.stop)
            documents, records = self._plain_records(targets)
            differ = self.index.tokens[np.maximum(records, 0)] != self.plain[targets]
            self.first_records[documents[differ]] = -1
        for number, (_, _, start, end) in enumerate(self.text.conversations.ranges.tolist(), num_plain):
            first = self.first_records[number]
            targets = self.text.teacher.ids[start:end][self.text.teacher.is_target[start:end]]
            fits = len(targets) <= sizes[stored[number]]
            if first >= 0 and not (fits and np.all(self.index.tokens[first + np.arange(len(targets))] == targets)):
                self.first_records[number] = -1

    def _plain_records(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The document and the record index (-1: none) of each of some of the `plain` target tokens."""
        documents = np.searchsorted(self.plain.starts[:-1], targets, side="right") - 1
        firsts = self.first_records[documents]
        return documents, np.where(firsts < 0, -1, firsts + targets - self.plain.starts[documents])

    @property
    def num_missing(self) -> int:
        """Documents without records."""
        return int((self.first_records < 0).sum())

    @property
    def first_missing(self) -> list[str]:
        """Names of the first five of them."""
        return [self.text.names[int(i)] for i in np.flatnonzero(self.first_records < 0)[:5]]

    def record_indices(self, start: int, end: int) -> np.ndarray:
        """int64: the record of each target token in a block of the teacher's tokens, -1 for none."""
        if start < self.plain.num_tokens:
            return self._plain_records(np.arange(*self.plain.count_before(np.array([start, end]))))[1]
        count = int(self.text.teacher.is_target[start:end].sum())
        number = int(np.searchsorted(self._conversation_starts, start, side="right")) - 1
        first = self.first_records[len(self.plain.starts) - 1 + number]
        return np.full(count, -1) if first < 0 else np.arange(first, first + count)

    def records(self, blocks: Sequence[Block], positions: Tensor, num_positions: int) -> CachedTokenLogits:
        """The cached logits of a batch.

        positions: int64 [N], ascending: which of the teacher's `num_positions` flattened positions predict a target
        """
        assert self._cached is not None
        indices = np.concatenate([self.record_indices(block.teacher_start, block.teacher_end) for block in blocks])
        records = self._cached.shards.take(indices)
        record_index = torch.zeros(num_positions, dtype=torch.int64)
        record_index[positions] = torch.arange(len(positions))
        kept, temperature_index = self._cached, self._cached.temperature_index
        common: dict[str, Any] = {
            "record_index": record_index,
            "ids": torch.from_numpy(records["ids"].astype(np.int32)),
            "max_log_probs": torch.from_numpy(records["max_log_prob"].copy()),
            "target_log_probs": torch.from_numpy(records["target_log_prob"].copy()),
            "temperature": kept.temperature,
            "is_missing": not (indices >= 0).any(),
        }
        if kept.metadata["keep"] == "topk":
            tail_log_ratios = records["tail_log_ratios"][:, temperature_index].copy()
            gaps = torch.from_numpy(records["log_prob_gaps"].copy())
            return CachedTopK(**common, log_prob_gaps=gaps, tail_log_ratios=torch.from_numpy(tail_log_ratios))
        return CachedDraws(
            **common,
            log_prob_gaps=torch.from_numpy(gaps_of(records)),
            log_factors=torch.from_numpy(log_factors_of(records, kept.metadata)),
            log_sums=torch.from_numpy(records["log_sums"][:, temperature_index].astype(np.float32)),
            targets=torch.from_numpy(self.index.tokens[np.maximum(indices, 0)].astype(np.int32)),
        )

    def target_nats(self, block: Block) -> tuple[np.ndarray, int]:
        """The teacher's loss at each target token of a block, float64 [N], nan where it has no record; and the number
        of records that are not finite.
        """
        assert self._cached is not None
        indices = self.record_indices(block.teacher_start, block.teacher_end)
        records = self._cached.shards.take(indices)
        num_nonfinite = 0
        if not self._cached.is_elsewhere:  # there it is a token of which nothing was given
            num_nonfinite = int((np.isnan(records["max_log_prob"]) & (indices >= 0)).sum())
        return -records["target_log_prob"].astype(np.float64), num_nonfinite

    def block_ends(self) -> np.ndarray:
        """int64, ascending: where the teacher's blocks end, in its tokens of this text's plain documents."""
        plain_starts, last = self.plain.starts, np.array([len(self.plain)])
        cached = np.flatnonzero(self.first_records[: len(plain_starts) - 1] >= 0)
        if not len(cached):
            return self.plain.token_ends(last[last > 0])
        firsts, starts = self.first_records[cached], plain_starts[cached]
        sizes = plain_starts[cached + 1] - starts
        document = np.maximum(np.searchsorted(firsts, self.index.block_ends - 1, side="right") - 1, 0)
        within = np.clip(self.index.block_ends - firsts[document], 0, sizes[document])
        ends = np.union1d(starts[document] + within, last)
        return self.plain.token_ends(ends[ends > 0])

    def record_ends(self, ends: np.ndarray) -> np.ndarray:
        """int64: ends of ranges of this text's plain documents, as record indices; only those with records.

        ends: in the teacher's tokens
        """
        records = self._plain_records(self.plain.count_before(ends) - 1)[1]
        return records[records >= 0] + 1


class PlainTargets:
    """The teacher's target tokens of a text's plain documents: all but a start token before each document."""

    def __init__(self, text: TokenizedText):
        count = len(text.names) - len(text.conversations)
        end = int(text.conversations[0].teacher_start) if len(text.conversations) else len(text.teacher.ids)
        self._ids, self._num_starts = text.teacher.ids, int(count > 0 and not text.teacher.is_target[0])
        self._first_tokens = text.first_tokens("teacher")[:count]
        self.num_tokens = end
        """Tokens of the plain documents, start tokens included"""
        self.starts = np.append(self._first_tokens, end) - self._num_starts * np.arange(count + 1)
        """int64 [plain documents + 1]: the number of targets before each document, and of all"""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, targets: np.ndarray) -> np.ndarray:
        """int32: the tokens of some targets."""
        return self._ids[self.token_ends(targets + 1) - 1]

    def count_before(self, tokens: np.ndarray) -> np.ndarray:
        """int64: the number of targets before each of some positions in the tokens."""
        return tokens - self._num_starts * np.searchsorted(self._first_tokens, tokens)

    def token_ends(self, counts: np.ndarray) -> np.ndarray:
        """int64: the position in the tokens behind so many targets, at least one."""
        return counts + self._num_starts * np.searchsorted(self.starts[:-1], counts)

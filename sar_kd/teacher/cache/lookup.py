"""Where the rows of a text that was stored before lie: by document, and by token within the document.

A run may leave out documents that were stored, because its student's tokenizer cannot represent them, and may cut a
conversation shorter. A document that the teacher's tokenizer now cuts otherwise, because the student's has changed its
text, has no rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sar_kd.data.batch import CachedTopK
from sar_kd.data.column_store import DamagedStore, open_column_store, strings_of
from sar_kd.teacher.cache.format import Shards, cache_error, index_path, key_of
from sar_kd.tokenization.token_stream import Block, Counting, TokenizedText

_STRETCH = 2**20


@dataclass(frozen=True)
class CacheIndex:
    """What a stored text says about its rows; arrays of files. Rows of plain documents come first."""

    tokens: np.ndarray
    """int32 [N]: what each row predicts"""
    ends: np.ndarray
    """int64 [N]: where that token ends in the joined text, in bytes; in tokens, where a tokenizer's have none"""
    documents: np.ndarray
    """int64 [D + 1]: rows before each document, and all"""
    names: Sequence[str]
    """Of the documents, in order"""
    windows: np.ndarray
    """int64 [W]: rows of plain documents after which the teacher began anew"""
    num_conversations: int
    """The last documents; each was read as a whole"""


class CachedText:
    """A text with what the teacher said of it."""

    def __init__(self, folder: Path, header: dict, text: str, temperature: float):
        """header: of the cache in `folder`; text: one of `TEXTS`; temperature: the run's, if the cache has it

        Raises: UsageError if its index is damaged
        """
        self.folder, self.shards, known = folder, Shards(folder, header, text), header["facts"]["temperatures"]
        self.temperature = known.index(temperature if temperature in known else known[0]), temperature
        """Its place among those of the cache, and itself"""
        path = index_path(folder, text)
        try:
            columns, facts = open_column_store(path, key_of(header, text))
        except (DamagedStore, OSError) as error:
            raise cache_error(folder, f"{path.relative_to(folder)} cannot be used ({error}); --overwrite") from None
        self.index = CacheIndex(
            columns["tokens"],
            columns["ends"],
            columns["documents"],
            strings_of(columns, "names"),
            columns["windows"],
            facts["num_conversations"],
        )

    def beside(self, text: TokenizedText) -> CacheLookup:
        """Its rows, found for the same text as a run reads it."""
        return CacheLookup(text, self.index, self.shards, self.temperature)


def plain_starts(text: TokenizedText) -> np.ndarray:
    """int64 [P + 1]: the teacher's tokens before each plain document, and in all of them."""
    count = len(text.names) - len(text.conversations)
    end = int(text.conversations[0].teacher_start) if len(text.conversations) else len(text.teacher.ids)
    starts = np.asarray(text.starts[:count])
    if not isinstance(text.teacher.ends, Counting):
        starts = np.searchsorted(text.teacher.ends[:end], starts, side="right")
    return np.append(starts, end).astype(np.int64)


def split_range(size: int) -> Iterator[slice]:
    """`size` rows in stretches that fit into memory."""
    return (slice(first, min(first + _STRETCH, size)) for first in range(0, size, _STRETCH))


class CacheLookup:
    """A text beside its stored rows."""

    def __init__(
        self,
        text: TokenizedText,
        index: CacheIndex,
        shards: Shards | None = None,
        temperature: tuple[int, float] = (0, 1.0),
    ):
        """shards: where the rows are; None where only their places are asked for. temperature: as `CachedText`'s"""
        self.text, self.index, self.shards, self.temperature = text, index, shards, temperature
        self.starts = plain_starts(text)
        self._talks = text.conversations.ranges[:, 2]
        places = self._places()
        self.firsts = np.where(places >= 0, index.documents[places], -1)
        """int64 [documents]: the first stored row of each, -1 for none"""
        self._compare(places)

    @property
    def num_unknown(self) -> int:
        """Documents without rows."""
        return int((self.firsts < 0).sum())

    @property
    def some_unknown(self) -> list[str]:
        """The first of them."""
        return [self.text.names[int(i)] for i in np.flatnonzero(self.firsts < 0)[:5]]

    def _places(self) -> np.ndarray:
        """int64 [documents]: which stored document each is, by name and order; -1 where there is none."""
        count, talks = len(self.text.names), len(self._talks)
        stored = len(self.index.names)
        if (count, talks) == (stored, self.index.num_conversations):
            return np.arange(count)
        found = np.full(count, -1, dtype=np.int64)
        ends = (count - talks, stored - self.index.num_conversations), (count, stored)
        own = other = 0
        for end, stored_end in ends:
            while own < end:
                name, at = self.text.names[own], other
                while at < stored_end and self.index.names[at] != name:
                    at += 1
                if at < stored_end:
                    found[own], other = at, at + 1
                own += 1
            other = stored_end
        return found

    def _compare(self, places: np.ndarray) -> None:
        """Take the rows from every document whose tokens are not those stored."""
        sizes = np.diff(self.index.documents)
        plain = len(self.starts) - 1
        self.firsts[:plain][sizes[places[:plain]] != np.diff(self.starts)] = -1
        for part in split_range(int(self.starts[-1])):
            documents, rows = self._plain(np.arange(part.start, part.stop))
            wrong = self.index.tokens[np.maximum(rows, 0)] != self.text.teacher.ids[part]
            self.firsts[documents[wrong]] = -1
        for number, (_, _, start, end) in enumerate(self.text.conversations.ranges.tolist()):
            place, row = places[plain + number], self.firsts[plain + number]
            own = self.text.teacher.ids[start:end][self.text.teacher.is_target[start:end]]
            stored = self.index.tokens[row : row + len(own)]
            if row >= 0 and (len(own) > sizes[place] or not np.array_equal(own, stored)):
                self.firsts[plain + number] = -1

    def _plain(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The document of each of some tokens of plain documents, and its stored row, -1 for none."""
        documents = np.searchsorted(self.starts[:-1], tokens, side="right") - 1
        rows = self.firsts[documents]
        return documents, np.where(rows < 0, -1, rows + tokens - self.starts[documents])

    def rows(self, cuts: Sequence[Block], rows: Tensor, num_places: int) -> CachedTopK:
        """What the teacher said of a batch.

        rows: int64 [N], which of the teacher's `num_places` flattened logits predict something, ascending
        """
        assert self.shards is not None
        found = self.shards.take(np.concatenate([self.rows_of(c.teacher_start, c.teacher_end) for c in cuts]))
        places = torch.zeros(num_places, dtype=torch.int64)
        places[rows] = torch.arange(len(rows))
        place, temperature = self.temperature
        return CachedTopK(
            places,
            ids=torch.from_numpy(found["ids"].astype(np.int32)),
            peaks=torch.from_numpy(found["peak"].copy()),
            gaps=torch.from_numpy(found["gaps"].copy()),
            log_probs=torch.from_numpy(found["log_prob"].copy()),
            rests=torch.from_numpy(found["rests"][:, place].copy()),
            temperature=temperature,
        )

    def nats(self) -> tuple[float, int]:
        """What the teacher makes of all the text that is predicted, and how many tokens that is; nan if not all is
        known.
        """
        assert self.shards is not None
        total, count = 0.0, 0
        for start, end in self._spans():
            rows = self.rows_of(start, end)
            total -= float(self.shards.take(rows)["log_prob"].astype(np.float64).sum())
            count += len(rows)
        return total, count

    def _spans(self) -> Iterator[tuple[int, int]]:
        for part in split_range(int(self.starts[-1])):
            yield part.start, part.stop
        for _, _, start, end in self.text.conversations.ranges.tolist():
            yield start, end

    def rows_of(self, start: int, end: int) -> np.ndarray:
        """int64: the stored row of each token to be predicted in a block of the teacher's tokens, -1 for none."""
        if start < self.starts[-1]:
            return self._plain(np.arange(start, end))[1]
        count = int(self.text.teacher.is_target[start:end].sum())
        row = self.firsts[len(self.starts) - 1 + int(np.searchsorted(self._talks, start))]
        return np.full(count, -1) if row < 0 else np.arange(row, row + count)

    def windows(self) -> np.ndarray:
        """int64, ascending: where the stored windows end, in the teacher's tokens of this text's plain documents."""
        known = np.flatnonzero(self.firsts[: len(self.starts) - 1] >= 0)
        if not len(known):
            return self.starts[-1:][self.starts[-1:] > 0]
        rows, starts = self.firsts[known], self.starts[known]
        sizes = self.starts[known + 1] - starts
        before = np.maximum(np.searchsorted(rows, self.index.windows - 1, side="right") - 1, 0)
        within = np.clip(self.index.windows - rows[before], 0, sizes[before])
        ends = np.union1d(starts[before] + within, self.starts[-1:])
        return ends[ends > 0]

    def stored_ends(self, ends: np.ndarray) -> np.ndarray:
        """int64: where stretches of this text's plain documents end among the stored rows; those with rows only."""
        rows = self._plain(ends - 1)[1]
        return rows[rows >= 0] + 1

"""A text as a teacher will read it for its cache: all documents that it can represent, in windows, whoever the student.

A conversation is read as a whole, as far as the teacher can, so that a run may cut it anywhere. Plain text is read in
windows, cut as a run with one student would cut it: where that student's blocks end, the teacher begins anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sar_kd.alignment import TokenizerPair
from sar_kd.blocks import Blocks
from sar_kd.data import Corpus
from sar_kd.documents import Documents, Sample
from sar_kd.matching import Index, Match, plain_starts, stretches_of
from sar_kd.shelf import Shelf
from sar_kd.streams import cut
from sar_kd.token_cache import TokenCache


class CacheText:
    """One text, its windows and its rows."""

    def __init__(
        self,
        documents: Sequence[Sample] | Documents,
        own: TokenizerPair,
        cutter: TokenizerPair | None,
        block_size: int,
        limit: int,
        cache: TokenCache,
    ):
        """own: the teacher's tokenizer on both sides; cutter: with the student's whose blocks the windows are to be

        block_size: tokens of a block for that student; limit: most that the teacher reads; both with a start token
        """
        self.corpus = Corpus(documents, own, limit, limit, cache)
        text = self.corpus.text
        self._starts = plain_starts(text)
        if cutter is None:
            plain = cut(text, min(block_size, limit) - 1, limit - 1).ranges[:, 3]
            ends = plain[: len(plain) - len(text.conversations)]
        else:
            ends = self._ends_of(Corpus(documents, cutter, block_size, limit, cache))
        self.windows = self._whole(ends, limit - 1)
        bounds = np.append(0, self.windows)
        plain = np.stack([bounds[:-1], bounds[1:]] * 2, axis=1)
        self.corpus.blocks = Blocks(np.concatenate([plain, text.conversations.ranges]))
        is_target = text.teacher.is_target
        talks = [int(is_target[start:end].sum()) for _, _, start, end in text.conversations.ranges.tolist()]
        self.block_rows = np.append(np.diff(bounds), np.array(talks, dtype=np.int64))
        """int64 [blocks]: rows that each of them has"""
        self._documents = np.append(self._starts, self._starts[-1] + np.cumsum(talks, dtype=np.int64))

    @property
    def num_rows(self) -> int:
        """Tokens that are predicted."""
        return int(self.block_rows.sum())

    def _ends_of(self, other: Corpus) -> np.ndarray:
        """Where another corpus of the same text has its blocks' ends."""
        text = self.corpus.text
        # Of conversations nothing is asked.
        index = Index(text.teacher.ids, text.teacher.ids[:0], self._rows_before_talks(), text.names,
                      self._starts[:0], len(text.conversations))  # fmt: skip
        match = Match(other.text, index)
        plain = other.blocks.ranges[: len(other.blocks) - len(other.text.conversations), 3]
        return match.stored_ends(plain)

    def _rows_before_talks(self) -> np.ndarray:
        return np.append(self._starts, np.full(len(self.corpus.text.conversations), self._starts[-1]))

    def _whole(self, ends: np.ndarray, most: int) -> np.ndarray:
        """These ends, and more where a window would exceed the teacher, or text would belong to none."""
        ends = np.union1d(ends, self._starts[-1:])
        ends = ends[ends > 0]
        sizes = np.diff(ends, prepend=0)
        more = [
            np.linspace(end - size, end, -(-size // most) + 1).astype(np.int64)[1:-1]
            for end, size in zip(ends[sizes > most].tolist(), sizes[sizes > most].tolist(), strict=True)
        ]
        return np.union1d(ends, np.concatenate([ends[:0], *more]))

    def write_index(self, folder: Path, key: str) -> None:
        """Write what a run needs to find rows, as a whole or not at all."""
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        text, shelf = self.corpus.text, Shelf(partial)
        shelf.facts = {"num_conversations": len(text.conversations)}
        for name, kind in (("tokens", "int32"), ("ends", "int64"), ("documents", "int64"), ("windows", "int64")):
            shelf.add(name, kind)
        shelf.add_strings("names")
        for part in stretches_of(int(self._starts[-1])):
            self._append(shelf, part)
        for _, _, start, end in text.conversations.ranges.tolist():
            self._append(shelf, slice(start, end))
        shelf.append("documents", self._documents)
        shelf.append("windows", self.windows)
        for part in stretches_of(len(text.names)):
            shelf.append_strings("names", text.names[part])
        shelf.finish()
        shelf.seal(key)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def _append(self, shelf: Shelf, part: slice) -> None:
        stream = self.corpus.text.teacher
        is_row = stream.is_target[part]
        shelf.append("tokens", stream.ids[part][is_row])
        shelf.append("ends", np.asarray(stream.ends[part])[is_row])

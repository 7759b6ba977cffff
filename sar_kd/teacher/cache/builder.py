"""A text as a teacher will read it for its cache: all documents that it can represent, in windows, whoever the student.

A conversation is read as a whole, as far as the teacher can, so that a run may cut it anywhere. Plain text is read in
windows, cut as a run with one student would cut it: where that student's blocks end, the teacher begins anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sar_kd.alignment.segments import positions_per_tile
from sar_kd.config.runs import CachingConfig
from sar_kd.data.batch import MASKED_LOGIT, TokenBatch
from sar_kd.data.blocks import cut
from sar_kd.data.column_store import ColumnStore
from sar_kd.data.dataset import Dataset
from sar_kd.data.samples import Sample
from sar_kd.data.sources import StreamedDocuments
from sar_kd.data.token_cache import TokenCache
from sar_kd.losses.distillation import top_of
from sar_kd.losses.tiled_loss import stretches_of
from sar_kd.models.lm_head import LMHeads, forward_to_lm_head
from sar_kd.models.logit_tiles import column_logsumexp
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.cache.format import index_path, key_of, record_of_facts, shard_path, write_header, write_shard
from sar_kd.teacher.cache.lookup import CacheIndex, CacheLookup, plain_starts, split_range
from sar_kd.tokenization.token_stream import Blocks
from sar_kd.tokenization.tokenizer_pair import TokenizerPair


class CacheText:
    """One text, its windows and its rows."""

    def __init__(
        self,
        documents: Sequence[Sample] | StreamedDocuments,
        own: TokenizerPair,
        cutter: TokenizerPair | None,
        block_size: int,
        limit: int,
        cache: TokenCache,
    ):
        """own: the teacher's tokenizer on both sides; cutter: with the student's whose blocks the windows are to be

        block_size: tokens of a block for that student; limit: most that the teacher reads; both with a start token
        """
        self.corpus = Dataset(documents, own, limit, limit, cache)
        text = self.corpus.text
        self._starts = plain_starts(text)
        if cutter is None:
            plain = cut(text, min(block_size, limit) - 1, limit - 1).ranges[:, 3]
            ends = plain[: len(plain) - len(text.conversations)]
        else:
            ends = self._ends_of(Dataset(documents, cutter, block_size, limit, cache))
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

    def _ends_of(self, other: Dataset) -> np.ndarray:
        """Where another corpus of the same text has its blocks' ends."""
        text = self.corpus.text
        # Of conversations nothing is asked.
        index = CacheIndex(text.teacher.ids, text.teacher.ids[:0], self._rows_before_talks(), text.names,
                      self._starts[:0], len(text.conversations))  # fmt: skip
        match = CacheLookup(other.text, index)
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
        text, shelf = self.corpus.text, ColumnStore(partial)
        shelf.facts = {"num_conversations": len(text.conversations)}
        for name, kind in (("tokens", "int32"), ("ends", "int64"), ("documents", "int64"), ("windows", "int64")):
            shelf.add(name, kind)
        shelf.add_strings("names")
        for part in split_range(int(self._starts[-1])):
            self._append(shelf, part)
        for _, _, start, end in text.conversations.ranges.tolist():
            self._append(shelf, slice(start, end))
        shelf.append("documents", self._documents)
        shelf.append("windows", self.windows)
        for part in split_range(len(text.names)):
            shelf.append_strings("names", text.names[part])
        shelf.finish()
        shelf.seal(key)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def _append(self, shelf: ColumnStore, part: slice) -> None:
        stream = self.corpus.text.teacher
        is_row = stream.is_target[part]
        shelf.append("tokens", stream.ids[part][is_row])
        shelf.append("ends", np.asarray(stream.ends[part])[is_row])


SHARD_ROWS = 2**14
"""Rows after which a shard is closed, unless the text is so large that this would make too many: what a kill costs"""

_MOST_SHARDS = 1024
"""Of a text: the header names each, and is written after each"""


class CacheBuilder:
    """Asks the teacher, and writes shards."""

    def __init__(self, config: CachingConfig, folder: Path, header: dict, precision: Precision, teacher: nn.Module):
        self.folder, self.header, self.precision, self.teacher = folder, header, precision, teacher
        facts = header["facts"]
        self.k, self.num_tokens, self.batch_size = facts["teacher_top_k"], facts["num_tokens"], facts["batch_size"]
        self.record, self.temperatures = record_of_facts(facts), facts["temperatures"]
        self.tile_rows = positions_per_tile(config.cache.loss_workspace_mb, facts["teacher_rows"])
        self._heads = LMHeads(precision)

    def shards(self, name: str, text: CacheText) -> Iterator[int]:
        """Write the shards of a text that are missing; the tokens of each batch, once it is read."""
        path, done = index_path(self.folder, name), self.header["shards"][name]
        if not path.exists():
            text.write_index(path, key_of(self.header, name))
        firsts = np.arange(0, len(text.corpus.blocks), self.batch_size)
        sizes = np.add.reduceat(text.block_rows, firsts)
        for number, span in enumerate(
            _shard_spans(sizes, max(self.header["facts"]["shard_rows"], text.num_rows // _MOST_SHARDS))
        ):
            if number < len(done):
                continue
            parts = []
            for batch in text.corpus.token_batches_at("teacher", firsts[span].tolist(), self.batch_size):
                parts.append(self._rows(batch.to(self.precision.device)))
                yield len(parts[-1])
            rows = np.concatenate(parts)
            digest = write_shard(shard_path(self.folder, name, number), rows)
            done.append([len(rows), digest])
            write_header(self.folder, self.header)

    @torch.no_grad()
    def _rows(self, batch: TokenBatch) -> np.ndarray:
        """The records of a batch's rows."""
        readout, _ = forward_to_lm_head(self.teacher, self._heads.of(self.teacher), batch.input_ids, self.precision)
        found = np.zeros(len(batch.rows), dtype=self.record)
        for part in stretches_of(len(batch.rows), self.tile_rows):
            tile = readout.tile(batch.rows[part])
            top, normaliser = top_of(tile, self.k, self.num_tokens, 1.0), column_logsumexp(tile)
            own = tile.gather(0, batch.targets[None, part])[0] - normaliser
            peaks = top.logits[0] - normaliser
            for field, values in (("log_prob", own), ("peak", peaks)):
                found[field][part] = values.masked_fill(~top.sound, torch.nan).cpu().numpy()
            found["ids"][part] = top.ids.T.cpu().numpy()
            found["gaps"][part] = (top.logits - top.logits[0]).half().T.cpu().numpy()
            others = tile.scatter_(0, top.ids, MASKED_LOGIT)
            for place, temperature in enumerate(self.temperatures):
                rest = column_logsumexp(others, temperature) - (top.logits / temperature).logsumexp(0)
                found["rests"][part, place] = rest.masked_fill(~top.sound, torch.nan).half().cpu().numpy()
        return found


def _shard_spans(sizes: np.ndarray, least: int) -> Iterator[slice]:
    """Batches of these many rows in lots of at least so many; the last may have fewer."""
    first = count = 0
    for number, size in enumerate(sizes.tolist(), 1):
        count += size
        if count >= least or number == len(sizes):
            yield slice(first, number)
            first, count = number, 0

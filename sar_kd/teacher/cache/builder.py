"""Writes the cache of a teacher over a text, for any student; runs the teacher, where it is loaded.

A conversation is one block of the teacher's, as far as its limit allows, so that a run may cut it anywhere. Plain text
is cut into the blocks of a run with one given student.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sar_kd.alignment.segments import positions_per_tile, split_range
from sar_kd.config.caching import CachingConfig
from sar_kd.data.batch import TokenBatch
from sar_kd.data.blocks import pack
from sar_kd.data.column_store import ColumnStore
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.sources import Documents
from sar_kd.data.token_cache import TokenCache
from sar_kd.data.tokenized_text import tokenize
from sar_kd.evaluation.nonfinite import check_finite
from sar_kd.losses.distillation import top_k_of
from sar_kd.models.lm_head import LMHeads, forward_to_lm_head
from sar_kd.models.logit_tiles import finite_positions, logsumexp_per_position, mask_positions_
from sar_kd.runtime.console import count_of
from sar_kd.runtime.files import atomic_rename
from sar_kd.runtime.precision import MASKED_BELOW, MASKED_LOGIT, Precision
from sar_kd.teacher.base import Teacher
from sar_kd.teacher.cache.draws import TokenSampler
from sar_kd.teacher.cache.format import (
    TEXTS,
    index_key,
    index_path,
    record_dtype,
    shard_path,
    write_header,
    write_shard,
)
from sar_kd.teacher.cache.lookup import CHUNK, CacheIndex, CacheLookup, PlainTargets
from sar_kd.tokenization.token_stream import Blocks, TokenizedText
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

SHARD_SIZE = 2**14
"""Records in a shard, more if there would be over `_MAX_SHARDS`; a kill costs at most one shard"""

_MAX_SHARDS = 1024
"""For one text: the header names each shard and is rewritten after each"""


class RecordSource(Protocol):
    """Gives the records of the teacher's blocks: a teacher that is loaded, or what another program computed."""

    title: str
    """Of the progress bar"""
    counts: dict[str, int]
    """What the records so far lack, by the reason; kept in the header where there is any"""

    def records(self, name: str, text: TeacherText, firsts: Sequence[int], size: int) -> Iterator[np.ndarray]:
        """The records of `size` blocks from each of `firsts` on, of the text with this name."""

    def check(self, records: np.ndarray, text: TeacherText, firsts: Sequence[int], size: int) -> None:
        """Look at all of these records, a shard. Raises: UsageError where they are not worth a shard"""


class CacheBuilder:
    """Writes shards of records."""

    def __init__(self, folder: Path, header: dict, source: RecordSource):
        self.folder, self.header, self.source = folder, header, source
        self.batch_size, self.shard_size = header["metadata"]["batch_size"], header["metadata"]["shard_size"]

    def build(self, name: str, text: TeacherText) -> Iterator[int]:
        """Write the missing shards of a text; yields the number of target tokens of each batch that is done.

        Raises: UsageError as the source
        """
        path, shards, source = index_path(self.folder, name), self.header["shards"][name], self.source
        if not path.exists():
            text.write_index(path, index_key(self.header, name))
        firsts = np.arange(0, len(text.dataset.blocks), self.batch_size)
        sizes = np.add.reduceat(text.block_sizes, firsts)
        parts = _shard_parts(sizes, max(self.shard_size, text.num_records // _MAX_SHARDS))
        for number, part in enumerate(parts):
            if number < len(shards):
                continue
            found = []
            for records in source.records(name, text, firsts[part].tolist(), self.batch_size):
                found.append(records)
                yield len(records)
            records = np.concatenate(found)
            source.check(records, text, firsts[part].tolist(), self.batch_size)
            digest = write_shard(shard_path(self.folder, name, number), records)
            shards.append([len(records), digest])
            self.header |= {"counts": dict(source.counts)} if source.counts else {}
            write_header(self.folder, self.header)


class LiveRecords:
    """Runs a loaded teacher."""

    title = "Running the teacher"

    def __init__(
        self,
        config: CachingConfig,
        metadata: dict,
        precision: Precision,
        teacher: nn.Module,
        pieces: Sequence[bytes] | None,
    ):
        """pieces: the bytes of each of the teacher's tokens, None if its tokenizer does not keep them"""
        self.precision, self.teacher, self.counts = precision, teacher, dict[str, int]()
        self.k, self.num_tokens, self.temperatures = (
            metadata[name] for name in ("teacher_top_k", "num_tokens", "temperatures")
        )
        self.dtype = record_dtype(metadata)
        self.tile_size = positions_per_tile(config.cache.loss_workspace_mb, metadata["vocab_size"])
        self._heads, self._title = LMHeads(precision), f"--teacher_model {config.cache.teacher_model}"
        self._num_records = self._num_nonfinite = 0
        self._seed = metadata["seed"]
        self._sampler = None if metadata["keep"] == "topk" else TokenSampler(metadata, pieces, precision.device)

    def records(self, name: str, text: TeacherText, firsts: Sequence[int], size: int) -> Iterator[np.ndarray]:
        """The records of `size` blocks from each of `firsts` on."""
        seed, first = (self._seed, TEXTS.index(name)), int(text.block_sizes[: firsts[0]].sum())
        for batch in text.dataset.token_batches_at("teacher", firsts, size):
            records = self._records(batch.to(self.precision.device), seed, first)
            first += len(records)
            yield records

    def check(self, records: np.ndarray, text: TeacherText, firsts: Sequence[int], size: int) -> None:
        """Raises: UsageError if most of the logits so far are not finite, with the module and the remedy"""
        self._num_records += len(records)
        self._num_nonfinite += int(np.isnan(records["max_log_prob"]).sum())
        batches = text.dataset.token_batches_at("teacher", firsts, size)
        share, limit = self._num_nonfinite / self._num_records, Teacher.max_nonfinite
        where = f"{count_of(self._num_records, 'token')} of the text"
        check_finite(self._title, share, limit, self.precision, self.teacher, batches, where=where)

    @torch.no_grad()
    def _records(self, batch: TokenBatch, seed: tuple[int, int], first: int) -> np.ndarray:
        """The records of a batch's target tokens. first: the number of the first one in the text"""
        logits, _ = forward_to_lm_head(self.teacher, self._heads.of(self.teacher), batch.input_ids, self.precision)
        records = np.zeros(len(batch.positions), dtype=self.dtype)
        for part in split_range(len(batch.positions), self.tile_size):
            tile, targets = logits.tile(batch.positions[part]), batch.targets[part]
            is_finite, largest = finite_positions(tile), tile[: self.num_tokens].amax(0)
            logsumexp, target_logits = logsumexp_per_position(tile), tile.gather(0, targets[None])[0]
            target_logits = target_logits.where(target_logits >= MASKED_BELOW, -torch.inf)
            for field, logit in (("target_log_prob", target_logits), ("max_log_prob", largest)):
                records[field][part] = (logit - logsumexp).masked_fill(~is_finite, torch.nan).cpu().numpy()
            if self._sampler is None:
                self._keep_top_k(records[part], tile)
            else:
                uniforms = self._sampler.uniforms(seed, first + part.start, len(targets))
                self._sampler.write(records[part], mask_positions_(tile, is_finite), targets, uniforms)
        return records

    def _keep_top_k(self, records: np.ndarray, tile: Tensor) -> None:
        """Write the k largest logits of a tile, which is overwritten."""
        top = top_k_of(tile, self.k, self.num_tokens, 1.0)
        records["ids"] = top.ids.T.cpu().numpy()
        records["log_prob_gaps"] = (top.logits - top.logits[0]).half().T.cpu().numpy()
        others = tile.scatter_(0, top.ids, MASKED_LOGIT)
        for i, temperature in enumerate(self.temperatures):
            ratio = logsumexp_per_position(others, temperature) - (top.logits / temperature).logsumexp(0)
            records["tail_log_ratios"][:, i] = ratio.masked_fill(~top.is_finite, torch.nan).half().cpu().numpy()


def _shard_parts(sizes: np.ndarray, shard_size: int) -> Iterator[slice]:
    """Slices of batches with these sizes that hold at least `shard_size` records each; the last may hold fewer."""
    first = count = 0
    for stop, size in enumerate(sizes.tolist(), 1):
        count += size
        if count >= shard_size or stop == len(sizes):
            yield slice(first, stop)
            first, count = stop, 0


class TeacherText:
    """A text in the teacher's tokens and blocks: all documents that its tokenizer can represent."""

    def __init__(
        self,
        documents: Documents,
        teacher_pair: TokenizerPair,
        student_pair: TokenizerPair | None,
        block_size: int,
        limit: int,
        token_cache: TokenCache,
    ):
        """teacher_pair: the teacher's tokenizer on both sides

        student_pair: of the student into whose blocks the text is cut; None: one with the teacher's tokenizer
        block_size: tokens in a block of that student; limit: most tokens in one of the teacher's, start token included
        """
        text = tokenize(documents, teacher_pair, (limit - 1, limit - 1), token_cache)
        self._plain = PlainTargets(text)
        if student_pair is None:
            ends = _plain_bounds(text, pack(text, min(block_size, limit) - 1, limit - 1))
        else:
            student = build_dataset(documents, student_pair, block_size, limit, token_cache)
            ends = self._block_bounds_of(student, text)
        bounds = np.append(0, self._complete(ends, limit - 1))
        self.block_ends = self._plain.count_before(bounds[1:])
        """int64, ascending: the number of records at the end of each block of plain documents"""
        plain = np.stack([bounds[:-1], bounds[1:]] * 2, axis=1)
        self.dataset = Dataset(text, Blocks(np.concatenate([plain, text.conversations.ranges])), teacher_pair)
        is_target = text.teacher.is_target
        counts = [int(is_target[start:end].sum()) for _, _, start, end in text.conversations.ranges.tolist()]
        targets = np.array(counts, dtype=np.int64)
        self.block_sizes = np.append(np.diff(self.block_ends, prepend=0), targets)
        """int64 [blocks]: records of each block"""
        self._first_tokens = np.append(text.first_tokens("teacher"), len(text.teacher.ids))
        self.first_records = np.append(self._plain.starts, len(self._plain) + np.cumsum(targets))
        """int64 [documents + 1]: the number of records before each document, and of all"""

    @property
    def num_records(self) -> int:
        """The target tokens."""
        return int(self.block_sizes.sum())

    def _block_bounds_of(self, student: Dataset, text: TokenizedText) -> np.ndarray:
        """Where the student's blocks of plain documents begin and end in the teacher's tokens of `text`."""
        no_conversations = np.full(len(text.conversations), len(self._plain))
        documents, none = np.append(self._plain.starts, no_conversations), self._plain.starts[:0]
        index = CacheIndex(self._plain, documents, text.names, none, len(text.conversations))
        ends = CacheLookup(student.text, index).record_ends(_plain_bounds(student.text, student.blocks))
        return self._plain.token_ends(ends)

    def _complete(self, ends: np.ndarray, limit: int) -> np.ndarray:
        """These ends, the end of the plain text, and more where a block would exceed the limit."""
        ends = np.union1d(ends, [self._plain.num_tokens])
        ends = ends[ends > 0]
        sizes = np.diff(ends, prepend=0)
        more = [
            np.linspace(end - size, end, -(-size // limit) + 1).astype(np.int64)[1:-1]
            for end, size in zip(ends[sizes > limit].tolist(), sizes[sizes > limit].tolist(), strict=True)
        ]
        return np.union1d(ends, np.concatenate([ends[:0], *more]))

    def document_part(self, document: int) -> slice:
        """The tokens of a document in the teacher's stream."""
        return slice(*self._first_tokens[document : document + 2].tolist())

    def write_index(self, folder: Path, key: str) -> None:
        """Write the index through which a run finds its records; atomic."""
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        text, store = self.dataset.text, ColumnStore(partial)
        store.metadata = {"num_conversations": len(text.conversations)}
        tokens = store.add("tokens", "int32")
        conversations = (slice(start, end) for _, _, start, end in text.conversations.ranges.tolist())
        for part in (*split_range(self._plain.num_tokens, CHUNK), *conversations):
            tokens.append(text.teacher.ids[part][text.teacher.is_target[part]])
        store.add("documents", "int64").append(self.first_records)
        store.add("block_ends", "int64").append(self.block_ends)
        names = store.add_strings("names")
        for part in split_range(len(text.names), CHUNK):
            names.append(text.names[part])
        store.finalize(key)
        atomic_rename(partial, folder)


def _plain_bounds(text: TokenizedText, blocks: Blocks) -> np.ndarray:
    """Where the blocks of plain documents begin and end in the teacher's tokens, without 0; conversations come last."""
    bounds = np.unique(blocks.ranges[: len(blocks) - len(text.conversations), 2:])
    return bounds[bounds > 0]

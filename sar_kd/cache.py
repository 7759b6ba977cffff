"""`sar-kd cache`: run the teacher once over a text and keep what it says of every token, for any student.

Interrupted or killed, the same command goes on behind the last whole shard, and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from sar_kd.alignment import TokenizerPair, UnfitTokenizer
from sar_kd.arguments import parse_kind
from sar_kd.cache_config import CachingConfig
from sar_kd.cache_text import CacheText
from sar_kd.columns import column_logsumexp
from sar_kd.config import UsageError
from sar_kd.data import TokenBatch
from sar_kd.documents import digest_of, load_documents
from sar_kd.files import plain
from sar_kd.folder import LOCK, FolderLock, require_room
from sar_kd.heads import Heads
from sar_kd.losses import ABSENT
from sar_kd.models import load_teacher, load_tokenizers
from sar_kd.precision import Precision, setup
from sar_kd.readout import read_out
from sar_kd.teacher_cache import identity_of
from sar_kd.teacher_store import (
    FORMAT,
    HEADER,
    TEXTS,
    Shards,
    differences,
    fault,
    index_path,
    key_of,
    read_header,
    record_of_facts,
    remove_unnamed,
    shard_path,
    write_header,
    write_shard,
)
from sar_kd.terminal import fitted
from sar_kd.tiled import stretches_of, tile_rows
from sar_kd.token_cache import TokenCache
from sar_kd.tokens import fingerprint
from sar_kd.top import StoredTeacher, top_of
from sar_kd.world import join_world

SHARD_ROWS = 2**14
"""Rows after which a shard is closed, unless the text is so large that this would make too many: what a kill costs"""
_MOST_SHARDS = 1024
"""Of a text: the header names each, and is written after each"""
_INDEX_BYTES = 12
"""Of a row in its text's index: its token, and where that ends"""


def main(argv: list[str]) -> dict:
    """Build the cache that the command line asks for, or what is missing of it.

    Raises: UsageError for what the user can mend
    """
    config, as_json = parse_kind(
        "cache", "Keep what the teacher says of a text, for runs without it.", CachingConfig, argv
    )
    if join_world().size > 1:
        raise UsageError("cache: one process builds it; start it without torchrun")
    folder = Path(config.cache.teacher_cache)
    lock = FolderLock(folder, "teacher_cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise fault(folder, f"cannot be written ({error.strerror}); name another folder") from None
    try:
        return _build(config, folder, as_json)
    finally:
        lock.release()


def _build(config: CachingConfig, folder: Path, as_json: bool) -> dict:
    settings, data = config.cache, config.data
    _require_own(folder, settings.overwrite)
    precision = setup(config.precision, 0)
    teacher, tokenizer, about = load_teacher(settings, precision)
    about = replace(about, limit=min(about.limit or 8 * data.block_size, 8 * data.block_size))
    own, cutter = _pairs(config, tokenizer, about)
    if settings.teacher_top_k >= own.teacher_tokens:
        raise UsageError(
            f"--teacher_top_k {settings.teacher_top_k}: the teacher has {own.teacher_tokens} tokens; keep fewer"
        )
    documents = load_documents(data)
    facts = {
        "text": [digest_of(text) for text in documents],
        "tokenizer": fingerprint(tokenizer),
        "teacher": identity_of(settings.teacher_model, settings.trust_remote_code),
        "teacher_rows": about.num_rows,
        "num_tokens": own.teacher_tokens,
        "stop_ids": list(about.stop_ids),
        "teacher_limit": about.limit,
        "block_size": data.block_size,
        "windows": "" if cutter is None else fingerprint(cutter.student),
        "teacher_top_k": settings.teacher_top_k,
        "temperatures": settings.floats(),
        "dtype": str(precision.dtype).removeprefix("torch."),
        "batch_size": settings.per_device_batch_size,
        "shard_rows": SHARD_ROWS,
    }
    header = _header(folder, facts)
    cache = TokenCache(data.token_cache)
    texts = [CacheText(text, own, cutter, data.block_size, about.limit, cache) for text in documents]
    builder = _Builder(config, folder, header, precision, teacher)
    kept = _announce(settings.teacher_model, folder, header, texts)
    total = sum(text.num_rows for text in texts)
    with tqdm(
        total=total, initial=kept, unit=" tokens", unit_scale=True, desc="Asking the teacher",
        disable=not sys.stderr.isatty(), file=sys.stderr,
    ) as bar:  # fmt: skip
        try:
            for name, text in zip(TEXTS, texts, strict=True):
                for count in builder.shards(name, text):
                    bar.update(count)
        except KeyboardInterrupt:
            bar.close()
            done = sum(rows for name in TEXTS for rows, _ in header["shards"][name])
            print(f"Interrupted: {done:,} of {total:,} tokens are kept; the same command goes on")
            return {"status": "interrupted"}
    header["complete"] = True
    write_header(folder, header)
    return _report(folder, header, texts, as_json)


def _require_own(folder: Path, overwrite: bool) -> None:
    """Make sure that the folder is a cache's, or empty; empty it if it is to be overwritten."""
    own = {LOCK, HEADER, f".{HEADER}.partial", *TEXTS}
    if any(path.name not in own for path in folder.iterdir()):
        raise fault(folder, "holds something else; name another folder")
    if overwrite:
        with suppress(FileNotFoundError):
            (folder / HEADER).unlink()  # first, so that no header names what is not there
        for text in TEXTS:
            shutil.rmtree(folder / text, ignore_errors=True)


def _pairs(config: CachingConfig, tokenizer: Any, about: StoredTeacher) -> tuple[TokenizerPair, TokenizerPair | None]:
    """The teacher's tokenizer with itself, by bytes if it keeps them; and with that of the student that cuts the text,
    if one is named that reads otherwise.
    """
    both = partial(
        TokenizerPair, tokenizer, tokenizer, student_rows=about.num_rows, teacher_rows=about.num_rows, projects=False
    )
    try:
        own = both(aligns=True, stop_ids=(about.stop_ids, about.stop_ids))
    except UnfitTokenizer:  # students with the same tokenizer need no bytes
        own = both()
    if not config.cache.tokenizer_of:
        return own, None
    names = replace(config.cache, student_model=config.cache.tokenizer_of)
    cutter = load_tokenizers(names, aligns=False)
    return own, None if cutter.equal else cutter


def _header(folder: Path, facts: dict) -> dict:
    """The header of the cache that is begun, or of a new one.

    Raises: UsageError if the one that is begun is another, or a whole shard of it is damaged
    """
    if not (folder / HEADER).exists():
        header = {"format": FORMAT, "facts": facts, "complete": False, "shards": {text: [] for text in TEXTS}}
        for text in TEXTS:
            shutil.rmtree(folder / text, ignore_errors=True)
        write_header(folder, header)
        return header
    header = read_header(folder)
    try:
        differences(folder, header, facts)
    except UsageError as error:
        raise UsageError(f"{error}; name another folder, or --overwrite") from None
    for text in TEXTS:
        shards = Shards(folder, header, text)
        for number in range(len(shards.digests)):
            shards.check(number)
        remove_unnamed(folder, header, text)
    return header


def _announce(teacher: str, folder: Path, header: dict, texts: list[CacheText]) -> int:
    """Say how much will be written, and see that there is room for it; the tokens that are there already."""
    facts = header["facts"]
    size = record_of_facts(facts).itemsize + _INDEX_BYTES
    total = sum(text.num_rows for text in texts)
    kept = sum(rows for text in TEXTS for rows, _ in header["shards"][text])
    said = [
        f"Teacher {teacher} in {facts['dtype']}, {facts['teacher_top_k']} likeliest of {facts['num_tokens']:,} tokens: "
        f"{size} bytes a token, {total:,} tokens, {total * size / 1e6:,.1f} MB in {folder}"
    ]
    if kept:
        said.append(f"Going on: {kept:,} of {total:,} tokens are there")
    print(fitted(*said))
    remedy = "free some, lower --teacher_top_k, or name another folder"
    require_room(folder, (total - kept) * size, "what the teacher says", flag="teacher_cache", remedy=remedy)
    return kept


class _Builder:
    """Asks the teacher, and writes shards."""

    def __init__(self, config: CachingConfig, folder: Path, header: dict, precision: Precision, teacher: nn.Module):
        self.folder, self.header, self.precision, self.teacher = folder, header, precision, teacher
        facts = header["facts"]
        self.k, self.num_tokens, self.batch_size = facts["teacher_top_k"], facts["num_tokens"], facts["batch_size"]
        self.record, self.temperatures = record_of_facts(facts), facts["temperatures"]
        self.tile_rows = tile_rows(config.cache.loss_workspace_mb, facts["teacher_rows"])
        self._heads = Heads(precision)

    def shards(self, name: str, text: CacheText) -> Iterator[int]:
        """Write the shards of a text that are missing; the tokens of each batch, once it is read."""
        path, done = index_path(self.folder, name), self.header["shards"][name]
        if not path.exists():
            text.write_index(path, key_of(self.header, name))
        firsts = np.arange(0, len(text.corpus.blocks), self.batch_size)
        sizes = np.add.reduceat(text.block_rows, firsts)
        for number, span in enumerate(_shard_spans(sizes, max(SHARD_ROWS, text.num_rows // _MOST_SHARDS))):
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
        readout, _ = read_out(self.teacher, self._heads.of(self.teacher), batch.input_ids, self.precision)
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
            others = tile.scatter_(0, top.ids, ABSENT)
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


def _report(folder: Path, header: dict, texts: list[CacheText], as_json: bool) -> dict:
    """Say what is there, and how good the teacher is on the held-out text."""
    stored = [Shards(folder, header, name) for name in TEXTS]
    rows = sum(map(len, stored))
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    nats = stored[1].nats() / texts[1].num_rows
    figures = {"tokens": rows, "bytes": num_bytes, "bytes_per_token": num_bytes / rows, "teacher_val_loss": nats}
    if as_json:
        print(json.dumps(plain(figures), indent=2))
    else:
        heard = f"the teacher's PPL on held-out text is {np.exp(nats):.2f}"
        how_much = f"{rows:,} tokens, {num_bytes / 1e6:,.1f} MB, {num_bytes / rows:.0f} bytes a token"
        print(fitted(f"Kept: {how_much}; {heard}", f"Use it: give a run --teacher_cache {folder}"))
    return {"status": "finished", **figures}

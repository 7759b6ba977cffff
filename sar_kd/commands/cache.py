"""`sar-kd cache`: run the teacher once over a text and keep what it says of every token, for any student.

Interrupted or killed, the same command goes on behind the last whole shard, and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sar_kd.config.command_line import parse
from sar_kd.config.fields import Command
from sar_kd.config.runs import CachingConfig
from sar_kd.data.sources import digest_of, load_documents
from sar_kd.data.token_cache import TokenCache
from sar_kd.errors import UsageError
from sar_kd.models.loading import TeacherInfo, load_teacher, load_tokenizers
from sar_kd.runtime.console import wrap_lines
from sar_kd.runtime.distributed import join_process_group
from sar_kd.runtime.files import LOCK, FolderLock, json_safe, require_disk_space
from sar_kd.runtime.precision import setup_precision
from sar_kd.teacher.cache.builder import SHARD_ROWS, CacheBuilder, CacheText
from sar_kd.teacher.cache.format import (
    FORMAT,
    HEADER,
    TEXTS,
    Shards,
    cache_error,
    check_compatible,
    read_header,
    record_of_facts,
    remove_unnamed,
    write_header,
)
from sar_kd.teacher.cached import model_fingerprint
from sar_kd.tokenization.token_table import fingerprint
from sar_kd.tokenization.tokenizer_pair import TokenizerPair, UnfitTokenizer

_INDEX_BYTES = 12
"""Of a row in its text's index: its token, and where that ends"""


CACHE = Command(
    name="cache",
    description="Run a teacher once over a text and store its logits, for runs that do not load it.",
    config=CachingConfig,
)


def main(argv: list[str]) -> dict:
    """Build the cache that the command line asks for, or what is missing of it.

    Raises: UsageError for what the user can mend
    """
    config = parse(CACHE, argv)
    if join_process_group().size > 1:
        raise UsageError("cache: one process builds it; start it without torchrun")
    folder = Path(config.cache.teacher_cache)
    lock = FolderLock(folder, "teacher_cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise cache_error(folder, f"cannot be written ({error.strerror}); name another folder") from None
    try:
        return _build(config, folder)
    finally:
        lock.release()


def _build(config: CachingConfig, folder: Path) -> dict:
    settings, data = config.cache, config.data
    _require_own(folder, settings.overwrite)
    precision = setup_precision(config.precision, 0)
    teacher, tokenizer, about = load_teacher(settings, precision)
    about = replace(about, limit=min(about.limit or 8 * data.block_size, 8 * data.block_size))
    own, cutter = _pairs(config, tokenizer, about)
    if settings.teacher_top_k >= own.num_teacher_tokens:
        raise UsageError(
            f"--teacher_top_k {settings.teacher_top_k}: the teacher has {own.num_teacher_tokens} tokens; keep fewer"
        )
    documents = load_documents(data)
    facts = {
        "text": [digest_of(text) for text in documents],
        "tokenizer": fingerprint(tokenizer),
        "teacher": model_fingerprint(settings.teacher_model, settings.trust_remote_code),
        "teacher_rows": about.vocab_size,
        "num_tokens": own.num_teacher_tokens,
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
    builder = CacheBuilder(config, folder, header, precision, teacher)
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
    return _report(folder, header, texts, config.output.json)


def _require_own(folder: Path, overwrite: bool) -> None:
    """Make sure that the folder is a cache's, or empty; empty it if it is to be overwritten."""
    own = {LOCK, HEADER, f".{HEADER}.partial", *TEXTS}
    if any(path.name not in own for path in folder.iterdir()):
        raise cache_error(folder, "holds something else; name another folder")
    if overwrite:
        with suppress(FileNotFoundError):
            (folder / HEADER).unlink()  # first, so that no header names what is not there
        for text in TEXTS:
            shutil.rmtree(folder / text, ignore_errors=True)


def _pairs(config: CachingConfig, tokenizer: Any, about: TeacherInfo) -> tuple[TokenizerPair, TokenizerPair | None]:
    """The teacher's tokenizer with itself, by bytes if it keeps them; and with that of the student that cuts the text,
    if one is named that reads otherwise.
    """
    both = partial(
        TokenizerPair, tokenizer, tokenizer, student_vocab_size=about.vocab_size, teacher_vocab_size=about.vocab_size, projects=False
    )
    own = both()
    with suppress(UnfitTokenizer):  # students with the same tokenizer need no bytes, and no document is skipped for them
        aligned = both(aligns=True, stop_ids=(about.stop_ids, about.stop_ids))
        own = own if aligned.token_tables[0].change else aligned
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
        check_compatible(folder, header, facts)
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
    print(wrap_lines(*said))
    remedy = "free some, lower --teacher_top_k, or name another folder"
    require_disk_space(folder, (total - kept) * size, "what the teacher says", flag="teacher_cache", remedy=remedy)
    return kept


def _report(folder: Path, header: dict, texts: list[CacheText], as_json: bool) -> dict:
    """Say what is there, and how good the teacher is on the held-out text."""
    stored = [Shards(folder, header, name) for name in TEXTS]
    rows = sum(map(len, stored))
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    nats = stored[1].nats() / texts[1].num_rows
    figures = {"tokens": rows, "bytes": num_bytes, "bytes_per_token": num_bytes / rows, "teacher_val_loss": nats}
    if as_json:
        print(json.dumps(json_safe(figures), indent=2))
    else:
        heard = f"the teacher's PPL on held-out text is {np.exp(nats):.2f}"
        how_much = f"{rows:,} tokens, {num_bytes / 1e6:,.1f} MB, {num_bytes / rows:.0f} bytes a token"
        print(wrap_lines(f"Kept: {how_much}; {heard}", f"Use it: give a run --teacher_cache {folder}"))
    return {"status": "finished", **figures}

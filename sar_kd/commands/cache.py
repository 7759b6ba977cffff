"""`sar-kd cache`: run the teacher once over a text and cache its logits for every token, for any student; or take its
log-probabilities from files or a server, where another program runs it.

After an interruption or a kill, the same command goes on after the last finished shard, and ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sar_kd.config.caching import CacheConfig, CachingConfig
from sar_kd.config.command_line import typed_command
from sar_kd.config.commands import TRAIN
from sar_kd.config.sections import EMBEDDED
from sar_kd.data.files.sources import digest_of, load_documents
from sar_kd.data.token_cache import TokenCache
from sar_kd.errors import UsageError
from sar_kd.models.loading import TeacherInfo, load_teacher, load_tokenizers
from sar_kd.models.without_weights import load_teacher_tokenizer
from sar_kd.preflight.checks import date_lines
from sar_kd.runtime.console import format_share, print_stderr, progress
from sar_kd.runtime.distributed import join_process_group
from sar_kd.runtime.files import LOCK_FILES, FolderLock, json_safe, require_disk_space
from sar_kd.runtime.precision import Precision, setup_precision
from sar_kd.teacher.cache.builder import SHARD_SIZE, CacheBuilder, LiveRecords, TeacherText
from sar_kd.teacher.cache.format import (
    FORMAT,
    HEADER,
    TEXTS,
    Shards,
    cache_error,
    check_compatible,
    describe_kept,
    read_header,
    record_dtype,
    remove_unnamed,
    write_header,
)
from sar_kd.teacher.cache.logprob_files import FileRecords
from sar_kd.teacher.cache.logprobs import count_lines
from sar_kd.teacher.cache.served import ServerRecords
from sar_kd.teacher.cached import model_fingerprint
from sar_kd.tokenization.token_table import TokenTable, fingerprint
from sar_kd.tokenization.tokenizer_pair import TokenizerPair, UnfitTokenizer

_OF_THE_CACHE = (
    "keep", "teacher_top_k", "temperatures", "seed", "per_device_batch_size", "loss_workspace_mb", "overwrite",
)  # fmt: skip
"""Options that have another meaning in a run, or none"""

_INDEX_BYTES = 4
"""Of a record in the index: the target token"""


def main(config: CachingConfig) -> dict:
    """Build the cache that the command line asks for, or the missing part of it.

    Raises: UsageError for what the user can mend
    """
    if join_process_group().size > 1:
        raise UsageError("cache: one process builds it; start it without torchrun")
    folder = Path(config.cache.teacher_cache)
    lock, is_new = FolderLock(folder, "teacher_cache"), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise cache_error(folder, f"cannot be written ({error.strerror}); name another folder") from None
    try:
        return _build(config, folder)
    finally:
        lock.release()
        if is_new:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def _build(config: CachingConfig, folder: Path) -> dict:
    settings, data = config.teacher, config.data
    _prepare_folder(folder, settings.overwrite)
    precision = setup_precision(config.precision, 0)
    documents = load_documents(data, print_stderr)  # before the weights: a mistake in the files shows at once
    elsewhere, teacher, tokenizer, info = _load(config, settings, precision)
    info = replace(info, limit=min(info.limit or 8 * data.block_size, 8 * data.block_size))
    has_header = (folder / HEADER).exists()
    date = data.template_date or (read_header(folder)["metadata"].get("template_date", "") if has_header else "")
    teacher_pair, student_pair = _tokenizer_pairs(settings, tokenizer, info, date, compares=elsewhere is not None)
    if settings.teacher_top_k + (settings.keep != "topk") >= teacher_pair.num_teacher_tokens:
        num_tokens = teacher_pair.num_teacher_tokens
        raise UsageError(f"--teacher_top_k {settings.teacher_top_k}: the teacher has {num_tokens} tokens; give fewer")
    has_dates = any(pair.dated_templates for pair in (teacher_pair, student_pair) if pair)
    metadata = {
        "text": [digest_of(text) for text in documents],
        "tokenizer": fingerprint(tokenizer),
        "teacher": {} if elsewhere else model_fingerprint(settings.teacher_model, settings.trust_remote_code),
        "vocab_size": info.vocab_size,
        "num_tokens": teacher_pair.num_teacher_tokens,
        "stop_ids": list(info.stop_ids),
        "limit": info.limit,
        "block_size": data.block_size,
        "template_date": teacher_pair.template_date if has_dates else "",
        "block_tokenizer": "" if student_pair is None else fingerprint(student_pair.student),
        "keep": settings.keep,
        "teacher_top_k": settings.teacher_top_k,
        "temperatures": settings.temperature_values(),
        "dtype": "its own precision" if elsewhere else str(precision.dtype).removeprefix("torch."),
        "batch_size": settings.per_device_batch_size,
        "shard_size": SHARD_SIZE,
        "seed": 0 if settings.keep == "topk" else settings.seed,
    }
    token_cache = TokenCache(data.token_cache)
    texts = [
        TeacherText(text, teacher_pair, student_pair, data.block_size, info.limit, token_cache) for text in documents
    ]
    pieces = None if teacher_pair.tables is None else teacher_pair.token_tables[0].pieces
    if elsewhere:
        metadata |= elsewhere.begin(texts, _table_of(teacher_pair, settings.teacher_model), settings.teacher_top_k)
    header = _open_header(folder, metadata)
    for line in date_lines(teacher_pair) if has_dates else ():
        print(line)
    name = metadata["source"].get("served_model", "elsewhere") if elsewhere else settings.teacher_model
    _print_plan(name, folder, header, texts, copies=2 if isinstance(elsewhere, FileRecords) else 1)
    if elsewhere:
        elsewhere.start(folder, header, texts)
    source = elsewhere or LiveRecords(config, metadata, precision, teacher, pieces)
    builder = CacheBuilder(folder, header, source)
    total = sum(text.num_records for text in texts)
    try:
        with progress(total, _num_cached(header), "tokens", source.title) as advance:
            for name, text in zip(TEXTS, texts, strict=True):
                for count in builder.build(name, text):
                    advance(count)
    except KeyboardInterrupt:
        print(f"Interrupted: {_num_cached(header):,} of {total:,} tokens are cached; the same command goes on")
        return {"status": "interrupted"}
    finally:
        if isinstance(source, FileRecords):
            source.close()
    header["complete"] = True
    write_header(folder, header)
    return _report(folder, header, config)


def _load(config: CachingConfig, settings: CacheConfig, precision: Precision) -> tuple:
    """Where the records come from, None for a teacher that is loaded; that teacher; its tokenizer and facts."""
    elsewhere = config.elsewhere
    if not elsewhere.is_given:
        notes: list[str] = []
        loaded = load_teacher(settings, precision, config.memory, notes)
        for line in notes:
            print_stderr(line)
        return None, *loaded
    tokenizer, info = load_teacher_tokenizer(settings.teacher_model, settings.trust_remote_code)
    if elsewhere.from_logprobs:
        return FileRecords(elsewhere.from_logprobs, print_stderr), None, tokenizer, info
    wanted = config.cache.teacher_model if config.cache.teacher_model != EMBEDDED else ""
    server = ServerRecords(elsewhere, wanted, print_stderr)
    limits = [limit for limit in (info.limit, server.limit) if limit]
    return server, None, tokenizer, replace(info, limit=min(limits, default=0))


def _table_of(pair: TokenizerPair, name: str) -> TokenTable:
    """The bytes of the teacher's tokens, with which answers are compared."""
    if pair.tables is None:
        raise UsageError(f"--teacher_tokenizer {name}: the bytes of its tokens cannot be known, so answers cannot be "
                         "compared with the text; load the teacher itself")  # fmt: skip
    return pair.token_tables[0]


def _prepare_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something else than a cache; empty it with `--overwrite`."""
    own = {*LOCK_FILES, HEADER, f".{HEADER}.partial", *TEXTS}
    if any(path.name not in own for path in folder.iterdir()):
        raise cache_error(folder, "holds something else; name another folder")
    if overwrite:
        with suppress(FileNotFoundError):
            (folder / HEADER).unlink()  # first, so that no header names missing shards
        for text in TEXTS:
            shutil.rmtree(folder / text, ignore_errors=True)


def _tokenizer_pairs(
    settings: CacheConfig, tokenizer: Any, info: TeacherInfo, template_date: str, compares: bool
) -> tuple[TokenizerPair, TokenizerPair | None]:
    """The teacher's tokenizer on both sides, by bytes if it keeps them; and the pair of the student whose blocks the
    text is cut into, if that student has another tokenizer.

    compares: bytes are needed, to compare answers with the text; what the tokenizer changes is skipped
    """

    def build_pair(**more) -> TokenizerPair:
        size, how = info.vocab_size, {"template_date": template_date, **more}
        return TokenizerPair(
            tokenizer, tokenizer, student_vocab_size=size, teacher_vocab_size=size, projects=False, **how
        )

    teacher_pair = build_pair()
    # Students with the same tokenizer need no bytes, so no document is skipped for them.
    with suppress(UnfitTokenizer):
        aligned = build_pair(aligns=True, stop_ids=(info.stop_ids, info.stop_ids))
        teacher_pair = aligned if compares or not aligned.token_tables[0].change else teacher_pair
    if not settings.block_tokenizer:
        return teacher_pair, None
    names = replace(settings, student_model=settings.block_tokenizer)
    student_pair = load_tokenizers(names, aligns=False, template_date=template_date)
    return teacher_pair, None if student_pair.equal else student_pair


def _open_header(folder: Path, metadata: dict) -> dict:
    """The header of an unfinished or finished cache in the folder, its shards checked; else a new one, written.

    Raises: UsageError if the cache there was made with other metadata, or a shard is damaged
    """
    header = read_header(folder) if (folder / HEADER).exists() else {}
    if not any(header.get("shards", {}).values()):  # nothing, or a command that was refused before its first record
        header = {"format": FORMAT, "metadata": metadata, "complete": False, "shards": {text: [] for text in TEXTS}}
        for text in TEXTS:
            shutil.rmtree(folder / text, ignore_errors=True)
        write_header(folder, header)
        return header
    try:
        check_compatible(folder, header, metadata)
    except UsageError as error:
        raise UsageError(f"{error}; name another folder, or --overwrite") from None
    for text in TEXTS:
        shards = Shards(folder, header, text)
        for number in range(len(shards.digests)):
            shards.check(number)
        remove_unnamed(folder, header, text)
    return header


def _num_cached(header: dict) -> int:
    """Records in the finished shards."""
    return sum(num_records for text in TEXTS for num_records, _ in header["shards"][text])


def _print_plan(teacher: str, folder: Path, header: dict, texts: list[TeacherText], copies: int) -> None:
    """Print how much will be written. Raises UsageError if the disk has no space for it.

    copies: 2 where all records stand in a file of their own until the shards are written
    """
    metadata, num_cached = header["metadata"], _num_cached(header)
    size = record_dtype(metadata).itemsize + _INDEX_BYTES
    total = sum(text.num_records for text in texts)
    print(
        f"Teacher {teacher} in {metadata['dtype']}, {describe_kept(metadata)} of {metadata['num_tokens']:,}: {size} "
        f"bytes a token, {total:,} tokens, {total * size / 1e6:,.1f} MB in {folder}"
    )
    if num_cached:
        print(f"Going on: {num_cached:,} of {total:,} tokens are cached")
    remedy = "free some, lower --teacher_top_k, or name another folder"
    missing = (copies * total - num_cached) * size
    require_disk_space(folder, missing, "the teacher's logits", option="teacher_cache", remedy=remedy)


def _command_of_run(config: CachingConfig, folder: Path) -> str:
    """A run with the cache: with its teacher, text, block size and, where temperatures were chosen, one of them."""
    sections = {**vars(config.data), **vars(config.teacher)}
    options = {name: value for name, value in sections.items() if name in config.chosen and name not in _OF_THE_CACHE}
    if config.teacher.teacher_model != EMBEDDED:
        options["teacher_model"] = config.teacher.teacher_model
    if config.elsewhere.is_given or "temperatures" in config.chosen:
        options["temperature"] = config.cache.temperature_values()[0]
    return typed_command(TRAIN, options | {"teacher_cache": str(folder)})


def _report(folder: Path, header: dict, config: CachingConfig) -> dict:
    """Print the size of the cache, and the teacher's loss on the held-out text."""
    train, validation = (Shards(folder, header, text) for text in TEXTS)
    num_tokens = len(train) + len(validation)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    nats, num_known = validation.total_nats()
    num_nonfinite, is_elsewhere = train.num_nonfinite() + validation.num_nonfinite(), "source" in header["metadata"]
    is_partial = num_known < len(validation)
    loss = nats / num_known if num_known and (is_elsewhere or not is_partial) else math.nan
    metrics = {"tokens": num_tokens, "bytes": num_bytes, "bytes_per_token": num_bytes / num_tokens,
               "teacher_val_loss": loss, "nonfinite_tokens": num_nonfinite}  # fmt: skip
    if config.output.json:
        print(json.dumps(json_safe(metrics), indent=2))
    else:
        size = f"{num_tokens:,} tokens, {num_bytes / 1e6:,.1f} MB, {num_bytes / num_tokens:.0f} bytes a token"
        known = f", over the {format_share(num_known / len(validation))} of it that are known"
        known = known if is_partial and is_elsewhere else ""
        print(f"Cached: {size}; the teacher's PPL on held-out text is {np.exp(loss):.2f}{known}")
        lines = count_lines(header.get("counts", {}), num_tokens)
        if num_nonfinite and not is_elsewhere:
            share = format_share(num_nonfinite / num_tokens)
            lines = [f"Warning: not finite at {share} of the tokens, which a student learns from the text alone"]
        for line in lines:
            print(line)
        print(f"Use it: {_command_of_run(config, folder)}")
    return {"status": "finished", **metrics}

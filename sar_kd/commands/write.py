"""`sar-kd write`: the teacher answers prompts, and what it writes becomes training text.

After an interruption or a kill, the same command goes on after the last whole batch, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from sar_kd.config.writing import WritingConfig
from sar_kd.data.files.prompts import read_prompts, row_of
from sar_kd.data.files.samples import Sample
from sar_kd.data.files.sources import digest_of
from sar_kd.errors import UsageError
from sar_kd.models.loading import load_teacher
from sar_kd.runtime.console import count_of, format_share, print_stderr, progress
from sar_kd.runtime.distributed import join_process_group
from sar_kd.runtime.files import FolderLock, atomic_write
from sar_kd.runtime.precision import setup_precision
from sar_kd.teacher.cached import model_fingerprint
from sar_kd.teacher.writing import REASONS, Answer, Prompt, Writer
from sar_kd.tokenization.token_table import fingerprint

_FORMAT = 1

_MAX_NAMED = 5
"""Skipped prompts that are named"""

_DIFFERENCES = {
    "prompts": "different prompts",
    "teacher": "a different teacher (the digests of its files differ)",
    "tokenizer": "a different tokenizer",
    "stop_ids": "a different generation config of the teacher",
    "limit": "another context of the teacher",
    "dtype": "a different --model_dtype",
}


class _Output:
    """The file that is written, and the record beside it: what it was made from, how far it is, and the counts."""

    def __init__(self, path: Path):
        self.path, self.record_path = path, path.with_name(f"{path.name}.json")
        self.record: dict[str, Any] = {}
        self._digest = hashlib.sha256()

    def open(self, overwrite: bool) -> None:
        """Read what an interrupted or finished command has left, or begin anew.

        Raises: UsageError if there is something else, or it has been changed since
        """
        if self.path.is_dir():
            raise UsageError(f"--output {self.path}: is a folder; name a .jsonl file")
        if overwrite:
            return  # `begin` deletes what is there, once all else is known to be right
        if not self.record_path.exists():
            if self.path.exists() and self.path.stat().st_size:
                raise self._error("is there already, and this command did not write it")
            return
        try:
            self.record = json.loads(self.record_path.read_text(encoding="utf-8"))
            num_bytes, digest = self.record["bytes"], self.record["sha256"]
            is_known = self.record["format"] == _FORMAT
        except (ValueError, KeyError, TypeError):
            is_known = False
        if not is_known:
            raise self._error(f"{self.record_path.name} beside it is no record of this command")
        with open(self.path, "ab+") as file:
            file.seek(0)
            left = num_bytes
            while left and (part := file.read(min(left, 2**20))):
                self._digest.update(part)
                left -= len(part)
            if left or self._digest.hexdigest() != digest:
                raise self._error("has been changed since it was written")
            file.truncate(num_bytes)  # what a kill left behind the last batch

    def begin(self, metadata: dict, num_answers: int) -> None:
        """Check what the text is made from against the record, or make a new record.

        Raises: UsageError naming the first difference
        """
        if not self.record:
            self.record_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            counts = dict.fromkeys(("written", "tokens", "cut_off", *REASONS, "skipped_prompts"), 0)
            self.record = {"format": _FORMAT, "complete": False, "metadata": metadata, "answers": num_answers,
                           "done": 0, "counts": counts, "skipped": []}  # fmt: skip
            self.append([], Counter(), [], 0)
        for name, value in metadata.items():
            stored = self.record["metadata"].get(name)
            if stored != value:
                shown = f" ({stored}, not {value})" if name not in _DIFFERENCES else ""
                raise self._error(f"was begun with {_DIFFERENCES.get(name, f'another --{name}')}{shown}")

    def append(self, rows: Sequence[dict], counts: Counter, skipped: Sequence[str], num_done: int) -> None:
        """Add rows, then the record that counts them: a kill between the two leaves bytes that `open` cuts off."""
        data = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
        with open(self.path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._digest.update(data)
        record = self.record
        record["bytes"], record["sha256"] = record.get("bytes", 0) + len(data), self._digest.hexdigest()
        record["done"] += num_done
        record["complete"] = record["done"] == record["answers"]
        record["counts"] = {name: number + counts[name] for name, number in record["counts"].items()}
        record["skipped"] = [*record["skipped"], *skipped][:_MAX_NAMED]
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        atomic_write(self.record_path, text, "output", "free some room; the same command goes on")

    def _error(self, reason: str) -> UsageError:
        return UsageError(f"--output {self.path}: {reason}; name another file, or --overwrite")


def main(config: WritingConfig) -> dict:
    """Let the teacher answer the prompts, or the rest of them.

    Raises: UsageError for what the user can mend
    """
    if join_process_group().size > 1:
        raise UsageError("write: one process writes; start it without torchrun")
    path = Path(config.write.output)
    lock = FolderLock(path.parent, "output", path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UsageError(f"--output {path}: cannot be written ({error.strerror}); name another file") from None
    try:
        return _write(config, _Output(path))
    finally:
        lock.release()


def _write(config: WritingConfig, output: _Output) -> dict:
    settings = config.write
    say = print_stderr if config.output.json else print
    prompts = read_prompts(settings.prompts, settings.text_field, print_stderr)  # a mistake in a file shows at once
    if any(Path(name).resolve() == output.path.resolve() for name in settings.prompts):
        raise UsageError(f"--output {output.path}: is one of --prompts; name another file")
    output.open(settings.overwrite)
    precision = setup_precision(config.precision, settings.seed)
    teacher, tokenizer, info = load_teacher(settings, precision)
    begun_on = output.record.get("metadata", {}).get("template_date")
    metadata = {
        "prompts": digest_of(prompts),
        "teacher": model_fingerprint(settings.teacher_model, settings.trust_remote_code),
        "tokenizer": fingerprint(tokenizer),
        "stop_ids": list(info.stop_ids),
        "limit": info.limit,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "template_date": settings.template_date or begun_on or date.today().isoformat(),
        **settings.what_decides(),
    }
    num_answers = len(prompts) * settings.samples
    output.begin(metadata, num_answers)
    writer = Writer(settings, teacher, tokenizer, info, metadata["template_date"], precision)
    how = f"temperature {settings.sample_temperature:g}" if settings.sample_temperature else "greedy"
    say(f"Teacher {settings.teacher_model} in {metadata['dtype']}, {how}: {count_of(num_answers, 'answer')}")
    if done := output.record["done"]:
        say(f"Going on: {done:,} are done")
    size = settings.per_device_batch_size
    try:
        with progress(num_answers, done, "answers", "Generating") as advance:
            for first in range(done, num_answers, size):
                numbers = [divmod(i, settings.samples) for i in range(first, min(first + size, num_answers))]
                _write_batch(writer, prompts, numbers, output)
                advance(len(numbers))
    except KeyboardInterrupt:
        say(f"Interrupted: {output.record['done']:,} of {num_answers:,} are done; the same command goes on")
        return {"status": "interrupted"}
    if writer.template.took_default:
        say("The teacher has no chat template, so its prompts were written as 'User: ... Assistant: ...'")
    return _report(output, config, say)


def _write_batch(writer: Writer, prompts: list[Sample], numbers: list[tuple[int, int]], output: _Output) -> None:
    """Write, judge and save some answers. numbers: of their prompts, and of the answers to one prompt

    Raises: UsageError if the logits were not finite for any answer so far
    """
    own = sorted({prompt for prompt, _ in numbers})
    encoded = dict(zip(own, writer.encode([prompts[i] for i in own]), strict=True))
    asked = [(encoded[i], (i, sample)) for i, sample in numbers]
    answerable = [(prompt, number) for prompt, number in asked if isinstance(prompt, Prompt)]
    answers: list[Answer] = []
    if answerable:
        answers = writer.write(*zip(*answerable, strict=True))
    counts: Counter[str] = Counter()
    rows = []
    for (prompt, (i, _)), answer in zip(answerable, answers, strict=True):
        counts[answer.reason or "written"] += 1
        if not answer.reason:
            counts["tokens"] += answer.num_tokens
            counts["cut_off"] += answer.is_cut_off
            rows.append(row_of(prompts[i], prompt.beginning, answer.text))
    if counts["nonfinite"] and counts["nonfinite"] == len(answers) and not output.record["counts"]["written"]:
        title = f"--teacher_model {writer.config.teacher_model}"
        raise UsageError(f"{title}: its logits are not finite, so it writes nothing; use --model_dtype float32")
    skipped = [
        f"{prompts[i].name} ({prompt})" for prompt, (i, sample) in asked if isinstance(prompt, str) and not sample
    ]
    counts["skipped_prompts"] = len(skipped)
    output.append(rows, counts, skipped, len(numbers))


def _report(output: _Output, config: WritingConfig, say) -> dict:
    """Print what was written, and what was dropped for which reason."""
    record, counts = output.record, output.record["counts"]
    dropped = {reason: counts[reason] for reason in REASONS if counts[reason]}
    metrics = {"answers": record["answers"], **counts}
    if config.output.json:
        print(json.dumps(metrics, indent=2))
        return {"status": "finished", **metrics}
    cut_off = f", {counts['cut_off']:,} of them cut off at --max_new_tokens" if counts["cut_off"] else ""
    say(f"Wrote {count_of(counts['written'], 'answer')} ({count_of(counts['tokens'], 'token')}{cut_off})")
    if dropped:
        share = format_share(sum(dropped.values()) / record["answers"])
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        say(f"Dropped {count_of(sum(dropped.values()), 'answer')} ({share}): {reasons}")
    if num_skipped := counts["skipped_prompts"]:
        more = ", ..." if num_skipped > len(record["skipped"]) else ""
        say(f"Skipped {count_of(num_skipped, 'prompt')}: {', '.join(record['skipped'])}{more}")
    if counts["nonfinite"]:
        say("Warning: some logits of the teacher were not finite; float32 may hold them: --model_dtype float32")
    if 2 * counts["unfinished"] > record["answers"]:
        say("Warning: most answers have not ended; raise --max_new_tokens, or keep them with --keep_unfinished")
    if counts["written"]:
        say(f"Use it: give a run --train_file {output.path}")
    else:
        say("Warning: no answer was kept")
    return {"status": "finished", **metrics}

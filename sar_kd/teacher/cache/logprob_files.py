"""The records of a cache from files of log-probabilities, a document a line, in any order.

A line belongs to every document of the text with the same bytes. Of each document its own line is what the teacher
read: one block of its own, however the text is cut.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sar_kd.errors import UsageError
from sar_kd.runtime.console import count_of, first_few, format_share, progress
from sar_kd.runtime.files import file_digest
from sar_kd.teacher.base import Teacher
from sar_kd.teacher.cache.builder import TeacherText
from sar_kd.teacher.cache.format import TEXTS
from sar_kd.teacher.cache.logprobs import (
    Answer,
    BadAnswer,
    RecordReader,
    num_given,
    read_completion,
    read_prompt_logprobs,
)
from sar_kd.tokenization.token_table import TokenTable

_PARTIAL = "records.partial"
"""The records of all documents, in the order of the text, until the shards are written"""


class _Line(NamedTuple):
    answer: Answer
    text: str | None
    """What was asked, where the line says so"""


class _Place(NamedTuple):
    """A document of the text."""

    text: int
    document: int
    is_whole: bool
    """Found by all of its bytes, not by those behind its first token"""


class FileRecords:
    """The records that the lines of some files make."""

    title = "Writing the cache"
    limit = 0
    """Of a prompt in tokens: none is known"""

    def __init__(self, names: Sequence[str], show: Callable[[str], object]):
        self._paths, self._show = [Path(name).expanduser() for name in names], show
        self.counts, self._option = Counter[str](), f"--from_logprobs {' '.join(names)}"
        for path in self._paths:
            if not path.is_file():
                raise UsageError(f"--from_logprobs {path}: no such file")

    def begin(self, texts: Sequence[TeacherText], table: TokenTable, k: int) -> dict:
        """Look at the first line; returns what it says for the metadata. Raises: UsageError if it is of neither form"""
        self._table, self._texts = table, texts
        self._special = {string for piece, string in zip(table.pieces, table.strings, strict=True) if not piece}
        given = next(filter(None, (num_given(line.answer) for _, line, _ in self._lines())), 0)
        if not given:
            raise UsageError(f"{self._option}: holds no line with log-probabilities")
        if given < k:
            self._show(f"A line has {given} tokens at a position: fewer than --teacher_top_k {k}, it is lowered")
        return {"source": {"files": [file_digest(path) for path in self._paths]}, "teacher_top_k": min(k, given)}

    def start(self, folder: Path, header: dict, texts: Sequence[TeacherText]) -> None:
        """Read all lines into records. Raises: UsageError where they do not fit the text, or most of it is not there"""
        reader = RecordReader(header["metadata"], self._table)
        self._stores = [self._open_store(folder / name, text, reader) for name, text in zip(TEXTS, texts, strict=True)]
        places, seen, others = self._documents(), set[tuple[int, int]](), list[str]()
        size = sum(path.stat().st_size for path in self._paths)
        with progress(size, 0, "bytes", "Reading log-probabilities") as advance:
            for where, line, num_bytes in self._lines():
                advance(num_bytes)
                found = self._find(line, places)
                others += [] if found else [where]
                for place in found:
                    self._write(reader, where, line.answer, place, is_new=place[:2] not in seen)
                    seen.add(place[:2])
        self._count_missing(seen, others)

    def _open_store(self, folder: Path, text: TeacherText, reader: RecordReader) -> np.ndarray:
        folder.mkdir(parents=True, exist_ok=True)
        store = np.memmap(folder / _PARTIAL, reader.dtype, "w+", shape=(text.num_records,))
        store["max_log_prob"] = store["target_log_prob"] = np.nan
        return store

    def records(self, name: str, text: TeacherText, firsts: Sequence[int], size: int) -> Iterator[np.ndarray]:
        """The records of `size` blocks from each of `firsts` on."""
        ends, store = np.append(0, np.cumsum(text.block_sizes)), self._stores[TEXTS.index(name)]
        for first in firsts:
            yield np.array(store[ends[first] : ends[min(first + size, len(ends) - 1)]])

    def check(self, records: np.ndarray, text: TeacherText, firsts: Sequence[int], size: int) -> None:
        """All of them were looked at in the beginning."""

    def close(self) -> None:
        """Remove what is not needed once the shards are written."""
        for store in self._stores:
            Path(store.filename).unlink(missing_ok=True)  # type: ignore[attr-defined]

    def _lines(self) -> Iterator[tuple[str, _Line, int]]:
        """Where each line is, its content, and how many bytes of the file were read for it."""
        for path in self._paths:
            with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
                before = number = 0
                try:
                    for number, content in enumerate(file, 1):
                        if content.strip():
                            yield f"{path.name}:{number}", _parse(json.loads(content)), raw.tell() - before
                            before = raw.tell()
                except (OSError, EOFError, ValueError, RecursionError) as error:
                    reason = str(error) if isinstance(error, BadAnswer) else f"cannot be read ({error})"
                    line = number + (not isinstance(error, ValueError))
                    raise UsageError(f"--from_logprobs {path}: line {line} {reason}") from None

    def _ids_of(self, place: _Place) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a document, its start and end token included, and which are targets."""
        text = self._texts[place.text]
        stream, part = text.dataset.text.teacher, text.document_part(place.document)
        return stream.ids[part], stream.is_target[part]

    def _documents(self) -> dict[bytes, list[_Place]]:
        """The documents by a digest of their bytes, and by one of those behind their first token."""
        places = defaultdict(list)
        for number, text in enumerate(self._texts):
            for document in range(len(text.first_records) - 1):
                ids = self._ids_of(_Place(number, document, True))[0].tolist()
                content = self._table.spell(ids)
                first = next((self._table.pieces[i] for i in ids if self._table.pieces[i]), b"")
                places[_digest(content)].append(_Place(number, document, True))
                places[_digest(content[len(first) :])].append(_Place(number, document, False))
        return places

    def _find(self, line: _Line, places: dict[bytes, list[_Place]]) -> list[_Place]:
        """The documents that a line belongs to."""
        tokens = line.answer.tokens
        if line.text is not None:
            content = line.text.encode("utf-8", "surrogatepass")
        elif any(isinstance(token, str) for token in tokens):
            words = [token for token in tokens if isinstance(token, str) and token not in self._special]
            content = "".join(words).encode("utf-8", "surrogatepass")
        else:
            known = (token for token in tokens if isinstance(token, int) and token < len(self._table.pieces))
            content = self._table.spell(known)
        is_first_known = not tokens or tokens[0] is not None
        return [place for place in places.get(_digest(content), ()) if place.is_whole or not is_first_known]

    def _write(self, reader: RecordReader, where: str, answer: Answer, place: _Place, is_new: bool) -> None:
        ids, is_target = self._ids_of(place)
        if not place.is_whole:  # the token that is not given is the first of the text
            first = next(int(i) for i in ids if self._table.pieces[i])
            answer = answer._replace(tokens=[first, *answer.tokens[1:]])
        counts = self.counts if is_new else Counter[str]()
        try:
            records = reader.records(answer, ids.tolist(), is_target.tolist(), counts)
        except BadAnswer as error:
            name = self._texts[place.text].dataset.text.names[place.document]
            raise UsageError(
                f"--from_logprobs {where}: does not fit the text of {name}: it {error}; is --teacher_tokenizer the "
                "model's?"
            ) from None
        first_record = self._texts[place.text].first_records[place.document]
        self._stores[place.text][first_record : first_record + len(records)] = records

    def _count_missing(self, seen: set[tuple[int, int]], others: list[str]) -> None:
        """Count documents without a line and lines without a document; raise UsageError if most is not there."""
        missing = list[str]()
        for number, text in enumerate(self._texts):
            sizes = np.diff(text.first_records)
            for document in range(len(sizes)):
                if (number, document) not in seen:
                    missing.append(text.dataset.text.names[document])
                    self.counts["document"] += int(sizes[document])
        total = sum(map(len, self._stores))
        known = sum(int(np.isfinite(store["max_log_prob"]).sum()) for store in self._stores)
        if known < (1 - Teacher.max_nonfinite) * total:
            absent = f"{count_of(len(missing), 'document')} are not in it" if missing else "too few at a position"
            raise UsageError(
                f"{self._option}: has only {format_share(known / total)} of the text's tokens ({absent}); give files "
                "that were made from this text with this tokenizer, or a lower --teacher_top_k"
            )
        if missing:
            self._show(f"{self._option}: lacks {count_of(len(missing), 'document')} of the text: {first_few(missing)}")
        if others:
            self._show(f"{self._option}: {count_of(len(others), 'line')} of another text: {first_few(others)}")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _parse(value: Any) -> _Line:
    """A line: the positions alone; or an object with them and, beside them, what was asked. Raises: BadAnswer"""
    if isinstance(value, list):
        return _Line(read_prompt_logprobs(value), None)
    if not isinstance(value, dict):
        raise BadAnswer("holds neither a list nor an object")
    text = value.get("prompt")
    if "choices" in value:
        choices = value["choices"]
        if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
            raise BadAnswer("holds not the answer to one prompt")
        value = {"prompt_token_ids": value.get("prompt_token_ids"), **choices[0]}
    if value.get("prompt_logprobs") is not None:
        return _Line(read_prompt_logprobs(value["prompt_logprobs"], value.get("prompt_token_ids")), None)
    return _Line(read_completion(value.get("logprobs") or value), text if isinstance(text, str) else None)

"""Text in files: .txt, .jsonl and .jsonl.gz, read piece by piece, so that no file need fit into memory."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sar_kd.config import UsageError
from sar_kd.rows import CHUNK, Conversation, Document, sample_of_line

LONG = 2**23
"""Bytes from which a .txt file is read anew each time it is needed, instead of being held."""
_LONGEST_LINE = 2**28
_KINDS = (".txt", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class LongDocument:
    """A text file, or a stretch of it, that is too long to be held."""

    name: str
    flag: str
    path: Path
    start: int
    stop: int
    """Characters of the file as it is read"""

    @property
    def num_chars(self) -> int:
        return self.stop - self.start

    def chunks(self) -> Iterator[str]:
        """The text in stretches of about `CHUNK` characters, from the disk."""
        position = 0
        for text in _chunks(self.flag, self.path):
            low, high = max(0, self.start - position), min(len(text), self.stop - position)
            if low < high:
                yield text[low:high]
            position += len(text)
            if position >= self.stop:
                break

    def part(self, start: int, stop: int, name: str) -> LongDocument:
        """The document that these characters are."""
        return dataclasses.replace(self, name=name, start=self.start + start, stop=self.start + stop)


Sample = Document | LongDocument | Conversation


def read_file(flag: str, path: Path, text_field: str) -> Iterator[Sample]:
    """The documents and conversations of a file, those without text left out; `flag` is what named it.

    Raises: UsageError for a file that is missing, unreadable or of another kind
    """
    kind = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if kind not in _KINDS:
        raise UsageError(f"--{flag} {path}: must be a .txt, .jsonl or .jsonl.gz file")
    with _readable(flag, path):
        yield from _read_text(flag, path) if kind == ".txt" else _read_lines(flag, path, kind, text_field)


@contextmanager
def _readable(flag: str, path: Path):
    """Turns what the disk and a damaged archive raise into one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--{flag} {path}: cannot be read ({reason})") from None


def _read_text(flag: str, path: Path) -> Iterator[Document | LongDocument]:
    if path.stat().st_size < LONG:
        text = "".join(_chunks(flag, path))
        if text.strip():
            yield Document(path.name, text)
        return
    size, blank = 0, True
    for text in _chunks(flag, path):
        size += len(text)
        blank = blank and not text.strip()
    if not blank:
        yield LongDocument(path.name, flag, path, 0, size)


def _chunks(flag: str, path: Path) -> Iterator[str]:
    """A .txt file's text in stretches; without a byte order mark, line ends as one character."""
    decoder, position, held = codecs.getincrementaldecoder("utf-8")(), 0, ""
    with _readable(flag, path), open(path, "rb") as file:
        while True:
            block = file.read(CHUNK)
            ended = not block
            if not position and block.startswith(codecs.BOM_UTF8):
                position, block = len(codecs.BOM_UTF8), block[len(codecs.BOM_UTF8) :]
            waiting = len(decoder.getstate()[0])
            try:
                text = held + decoder.decode(block, final=ended)
            except UnicodeDecodeError as error:
                raise _not_utf8(flag, path, f"byte {position - waiting + error.start}") from None
            position += len(block)
            # A carriage return at the end may be half of a line end.
            held = "\r" if text.endswith("\r") and not ended else ""
            text = _line_ends(text[: len(text) - len(held)])
            if text:
                yield text
            if ended:
                return


def _read_lines(flag: str, path: Path, kind: str, text_field: str) -> Iterator[Document | Conversation]:
    with gzip.open(path) if kind == ".jsonl.gz" else open(path, "rb") as file:
        for number, line in enumerate(iter(functools.partial(file.readline, _LONGEST_LINE), b""), 1):
            if len(line) == _LONGEST_LINE:
                size = f"{_LONGEST_LINE // 2**20} MB"
                raise UsageError(f"--{flag} {path}: line {number} exceeds {size}; give it as a .txt file of its own")
            if not line.strip():
                continue
            try:
                content = _line_ends(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise _not_utf8(flag, path, f"line {number}") from None
            sample = sample_of_line(flag, path, number, content, text_field)
            if sample.text.strip():
                yield sample


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n")  # line ends are the editor's, not the text's


def _not_utf8(flag: str, path: Path, where: str) -> UsageError:
    return UsageError(f"--{flag} {path}: is not UTF-8 text ({where}); convert it first")

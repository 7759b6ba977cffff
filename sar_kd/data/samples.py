"""What a row of text is: a plain document or a conversation.

The text field makes it a document; `messages`, or `prompt` and `completion` (also `question` and `answer`), make it a
conversation.

Text in files: .txt, .jsonl and .jsonl.gz, read piece by piece, so that no file need fit into memory.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sar_kd.errors import UsageError
from sar_kd.tokenization.long_text import CHUNK

PAIRS = (("prompt", "completion"), ("question", "answer"))


class Document(NamedTuple):
    """One text with a name to call it by."""

    name: str
    text: str

    @property
    def num_chars(self) -> int:
        return len(self.text)

    def chunks(self) -> Iterator[str]:
        """The text in stretches of at most `CHUNK` characters."""
        return (self.text[first : first + CHUNK] for first in range(0, len(self.text), CHUNK))

    def part(self, start: int, stop: int, name: str) -> Document:
        """The document that these characters are."""
        return Document(name, self.text[start:stop])


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str
    is_target: bool
    """To be learned: an assistant's turn that is no part of a prompt."""


class Conversation(NamedTuple):
    """Messages with a name to call them by, the last one to be learned."""

    name: str
    messages: tuple[Message, ...]
    plain: bool
    """Given as two texts, which without a chat template simply follow one another."""

    @property
    def text(self) -> str:
        """All contents."""
        return "".join(message.content for message in self.messages)

    @property
    def num_chars(self) -> int:
        return sum(len(message.content) for message in self.messages)


def sample_of_line(flag: str, path: Path, number: int, line: str, text_field: str) -> Document | Conversation:
    """What a line of JSON holds; its number in the file, and the flag that named the file, are for naming a bad one.

    Raises: UsageError if it is no JSON, or neither a document nor a conversation
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number or a nesting beyond what Python reads
        reason = getattr(error, "msg", error)
        raise UsageError(f"--{flag} {path}: line {number} is not JSON ({reason})") from None
    name, fields = f"{path.name}:{number}", row if isinstance(row, dict) else {}
    if isinstance(fields.get(text_field), str):
        return Document(name, fields[text_field])
    conversation = conversation_of(name, fields, f"--{flag} {path}: line {number}")
    if conversation is None:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UsageError(
            f"--text_field {text_field}: line {number} of {path} has no such text, nor messages, nor a prompt with a "
            f"completion (it has: {found})"
        )
    return conversation


def conversation_of(name: str, row: dict, where: str) -> Conversation | None:
    """The conversation that a row holds, None if it has no field of one; `where` begins what is said of a bad one."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages", where, learned=True)
        return _checked(
            Conversation(name, messages, plain=False), "messages", "an assistant's message with text", where
        )
    fields = next((pair for pair in PAIRS if pair[0] in row or pair[1] in row), None)
    if fields is None:
        return None
    for field in fields:
        if field not in row:
            raise UsageError(f"{where} has no '{field}'; expected '{fields[0]}' with '{fields[1]}'")
    sides = [
        (Message(role, row[field], learned),)
        if isinstance(row[field], str)
        else _messages(row[field], field, where, learned)
        for field, role, learned in zip(fields, ("user", "assistant"), (False, True), strict=True)
    ]
    plain = all(isinstance(row[field], str) for field in fields)
    return _checked(Conversation(name, (*sides[0], *sides[1]), plain), fields[1], "text to be learned", where)


def _messages(value: object, field: str, where: str, learned: bool) -> tuple[Message, ...]:
    """A list of messages; the assistant's are to be learned if `learned`."""
    expected = "expected {'role': ..., 'content': ...}, both of them text"
    if not isinstance(value, list):
        others = "" if field == "messages" else "text or "
        raise UsageError(f"{where}: '{field}' is {_kind(value)}; expected {others}a list of messages")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise UsageError(f"{where}: message {number} of '{field}' is {_kind(message)}; {expected}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                fault = f"has {_kind(message[key])} as '{key}'" if key in message else f"has no '{key}'"
                raise UsageError(f"{where}: message {number} of '{field}' {fault}; {expected}")
    return tuple(Message(m["role"], m["content"], learned and m["role"] == "assistant") for m in value)


def _kind(value: object) -> str:
    """What JSON calls a value."""
    names = {type(None): "null", list: "a list", dict: "an object", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")


def _checked(conversation: Conversation, field: str, expected: str, where: str) -> Conversation:
    """The conversation up to its last message that is to be learned; what follows that is never predicted."""
    learned = [i for i, message in enumerate(conversation.messages) if message.is_target and message.content.strip()]
    if not learned:
        raise UsageError(f"{where}: '{field}' holds nothing to learn; expected {expected}")
    return conversation._replace(messages=conversation.messages[: learned[-1] + 1])


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

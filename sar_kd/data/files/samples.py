"""Documents and conversations, and the files that hold them: text, JSON lines, and `tables`.

An example with the text field is a document; one with `messages`, with `prompt` and `completion` (also `question` and
`answer`), or in one of the `public_forms`, is a conversation. Files are read in chunks; none but .json need fit into
memory.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from sar_kd.data.files import public_forms, tables
from sar_kd.data.files.tables import json_fault, read_examples
from sar_kd.errors import UsageError
from sar_kd.tokenization.long_text import CHUNK

PAIRS = (("prompt", "completion"), ("question", "answer"))
"""Fields of a conversation in two texts"""

MESSAGE_FIELDS = ("tool_calls", "reasoning_content", "thinking", "reasoning")
"""Fields of an assistant's message that it can consist of, without content"""

LONG = 2**23
"""Bytes from which a .txt file is read from the disk each time it is needed."""

_MAX_LINE = 2**28
"""Bytes"""

_KINDS = (".txt", ".jsonl", ".jsonl.gz", *tables.KINDS)


class Document(NamedTuple):
    """One named text."""

    name: str
    text: str

    @property
    def num_chars(self) -> int:
        return len(self.text)

    def chunks(self) -> Iterator[str]:
        """The text in chunks of at most `CHUNK` characters."""
        return (self.text[first : first + CHUNK] for first in range(0, len(self.text), CHUNK))

    def part(self, start: int, stop: int, name: str) -> Document:
        """A document of these characters."""
        return Document(name, self.text[start:stop])


@dataclass(frozen=True)
class LongDocument:
    """A text file, or a part of one, that is not held in memory."""

    name: str
    option: str
    path: Path
    start: int
    stop: int
    """Range of the file's characters"""

    @property
    def num_chars(self) -> int:
        return self.stop - self.start

    def chunks(self) -> Iterator[str]:
        """The text in chunks of about `CHUNK` characters, read from the disk."""
        position = 0
        for text in _chunks(self.option, self.path):
            low, high = max(0, self.start - position), min(len(text), self.stop - position)
            if low < high:
                yield text[low:high]
            position += len(text)
            if position >= self.stop:
                break

    def part(self, start: int, stop: int, name: str) -> LongDocument:
        """A document of these characters."""
        return dataclasses.replace(self, name=name, start=self.start + start, stop=self.start + stop)


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str
    is_target: bool
    """Its tokens are predicted: an assistant's turn that is no part of a prompt."""
    fields: str = ""
    """JSON of its other fields, such as `tool_calls` and `reasoning_content`, for the chat template; "" for none"""


class Conversation(NamedTuple):
    """Named messages, of which the last is a target."""

    name: str
    messages: tuple[Message, ...]
    plain: bool
    """Given as two texts; without a chat template they are only concatenated."""
    tools: str = ""
    """JSON of the functions that the assistant may call, for the chat template; "" for none"""
    fault: str = ""
    """Why it cannot be used; it is then counted and named, and has no messages"""

    @property
    def text(self) -> str:
        """All contents."""
        return "".join(message.content for message in self.messages)

    @property
    def num_chars(self) -> int:
        return sum(len(message.content) + len(message.fields) for message in self.messages)


Sample = Document | LongDocument | Conversation

ExampleParser = Callable[[str, object, str, str], "Document | Conversation"]
"""As `sample_of`"""


def read_file(option: str, path: Path, text_field: str, parse: ExampleParser | None = None) -> Iterator[Sample]:
    """The documents and conversations of a file, with empty ones; `option` is the one that named it.

    parse: makes a sample of an example, by default `sample_of`
    Raises: UsageError for a file that is missing, unreadable or of another kind
    """
    kind = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if kind not in _KINDS:
        raise UsageError(f"--{option} {path}: must be a {', '.join(_KINDS[:-1])} or {_KINDS[-1]} file")
    with _readable(option, path):
        if kind == ".txt":
            yield from _read_text(option, path)
        else:
            read = _read_lines if kind in (".jsonl", ".jsonl.gz") else _read_table
            yield from read(option, path, text_field, parse or sample_of)


@contextmanager
def _readable(option: str, path: Path):
    """Turn errors of the disk and of a damaged archive into one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--{option} {path}: cannot be read ({reason})") from None


def _read_text(option: str, path: Path) -> Iterator[Document | LongDocument]:
    if path.stat().st_size < LONG:
        yield Document(path.name, "".join(_chunks(option, path)))
        return
    size, blank = 0, True
    for text in _chunks(option, path):
        size += len(text)
        blank = blank and not text.strip()
    yield Document(path.name, "") if blank else LongDocument(path.name, option, path, 0, size)


def _chunks(option: str, path: Path) -> Iterator[str]:
    """A .txt file's text in chunks, without a byte order mark, each line end one character."""
    decoder, position, pending = codecs.getincrementaldecoder("utf-8")(), 0, ""
    with _readable(option, path), open(path, "rb") as file:
        while True:
            block = file.read(CHUNK)
            is_last = not block
            if not position and block.startswith(codecs.BOM_UTF8):
                position, block = len(codecs.BOM_UTF8), block[len(codecs.BOM_UTF8) :]
            undecoded = len(decoder.getstate()[0])
            try:
                text = pending + decoder.decode(block, final=is_last)
            except UnicodeDecodeError as error:
                raise _not_utf8(option, path, f"byte {position - undecoded + error.start}") from None
            position += len(block)
            # A carriage return at the end may be half of a line end.
            pending = "\r" if text.endswith("\r") and not is_last else ""
            text = _line_ends(text[: len(text) - len(pending)])
            if text:
                yield text
            if is_last:
                return


def _read_lines(option: str, path: Path, text_field: str, parse: ExampleParser) -> Iterator[Document | Conversation]:
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(iter(functools.partial(file.readline, _MAX_LINE), b""), 1):
            if len(line) == _MAX_LINE:
                size = f"{_MAX_LINE // 2**20} MB"
                raise UsageError(f"--{option} {path}: line {number} exceeds {size}; give it as a .txt file of its own")
            if not line.strip():
                continue
            try:
                content = _line_ends(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise _not_utf8(option, path, f"line {number}") from None
            yield sample_of_line(option, path, number, content, text_field, parse)


def _read_table(option: str, path: Path, text_field: str, parse: ExampleParser) -> Iterator[Document | Conversation]:
    columns = (text_field, "messages", "tools", *chain(*PAIRS), *public_forms.FIELDS)
    for number, example in read_examples(option, path, columns):
        yield parse(f"{path.name}:{number}", example, text_field, f"--{option} {path}: example {number}")


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n")  # line ends are the editor's, not the text's


def _not_utf8(option: str, path: Path, where: str) -> UsageError:
    return UsageError(f"--{option} {path}: is not UTF-8 text ({where}); convert it first")


def sample_of_line(
    option: str, path: Path, number: int, line: str, text_field: str, parse: ExampleParser | None = None
) -> Document | Conversation:
    """The sample in a line of JSON; option and line number are for the error; parse: as of `read_file`.

    Raises: UsageError if it is no JSON, or neither a document nor a conversation
    """
    where = f"--{option} {path}: line {number}"
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number or a nesting beyond Python's limits
        raise UsageError(f"{where} is not JSON ({json_fault(error).replace('line 1 ', '')})") from None
    return (parse or sample_of)(f"{path.name}:{number}", example, text_field, where)


def sample_of(name: str, example: object, text_field: str, where: str) -> Document | Conversation:
    """The sample in an example; `where` begins an error message.

    Raises: UsageError if it is neither a document nor a conversation
    """
    fields = example if isinstance(example, dict) else {}
    text = fields.get(text_field)
    if isinstance(text, str):
        return Document(name, text)
    conversation = conversation_of(name, fields, where)
    if conversation is None and (example is None or fields.get(text_field, "") is None):
        return Conversation(name, (), plain=False, fault=f"its '{text_field}' is null" if fields else "is null")
    if conversation is None:
        raise _no_sample(example, text_field, where)
    return conversation


def _no_sample(example: object, text_field: str, where: str) -> UsageError:
    if not isinstance(example, dict):
        return UsageError(f"{where} is {_json_type(example)}; expected an object with '{text_field}' or a conversation")
    if text_field in example:
        return UsageError(f"{where} has {_json_type(example[text_field])} as '{text_field}'; expected text")
    found = ", ".join(map(str, example)) or "nothing"
    return UsageError(
        f"{where} has no text and no conversation that is known here (it has: {found}); name its text with --text_field"
    )


def conversation_of(name: str, example: dict, where: str) -> Conversation | None:
    """The conversation in an example, None if it has no field of one; `where` begins an error message.

    One with a null where something must stand, or without an assistant's text, is a conversation with a fault.
    """
    try:
        found = _conversation(name, example, where)
    except _NullField as null:
        return Conversation(name, (), plain=False, fault=str(null))
    tools = example.get("tools")
    if found is None or not tools:
        return found
    tools = _parsed(tools)
    if not isinstance(tools, list):
        raise UsageError(f"{where}: 'tools' is {_json_type(tools)}; expected a list of functions")
    return found._replace(tools=_to_json(tools))


class _NullField(ValueError):
    """Which field is null."""


def _conversation(name: str, example: dict, where: str) -> Conversation | None:
    if "messages" in example:
        messages = _messages(example["messages"], "messages", where, targets=True)
        return _end_with_target(Conversation(name, messages, plain=False), "messages")
    fields = next((pair for pair in PAIRS if pair[0] in example or pair[1] in example), None)
    if fields is None:
        field, turns = public_forms.as_messages(example) or (None, None)
        if field is None:
            return None
        messages = _messages(turns, field, where, targets=True)
        return _end_with_target(Conversation(name, messages, plain=False), field)
    for field in fields:
        if field not in example:
            raise UsageError(f"{where} has no '{field}'; expected '{fields[0]}' with '{fields[1]}'")
    sides = [
        (Message(role, example[field], targets),)
        if isinstance(example[field], str)
        else _messages(example[field], field, where, targets)
        for field, role, targets in zip(fields, ("user", "assistant"), (False, True), strict=True)
    ]
    plain = all(isinstance(example[field], str) for field in fields)
    return _end_with_target(Conversation(name, (*sides[0], *sides[1]), plain), fields[1])


def _messages(value: object, field: str, where: str, targets: bool) -> tuple[Message, ...]:
    """A list of messages; the assistant's are targets if `targets`."""
    if value is None:
        raise _NullField(f"its '{field}' is null")
    if not isinstance(value, list):
        others = "text or " if field in chain(*PAIRS) else ""
        raise UsageError(f"{where}: '{field}' is {_json_type(value)}; expected {others}a list of messages")
    return tuple(_message(message, number, field, where, targets) for number, message in enumerate(value, 1))


def _message(value: object, number: int, field: str, where: str, targets: bool) -> Message:
    expected = "expected {'role': ..., 'content': ...}, both of them text"
    if value is None:
        raise _NullField(f"message {number} of its '{field}' is null")
    if not isinstance(value, dict):
        raise UsageError(f"{where}: message {number} of '{field}' is {_json_type(value)}; {expected}")
    others = {key: item for key, item in value.items() if item is not None and key not in ("role", "content")}
    if others.get("tool_calls"):
        others["tool_calls"] = _parsed(others["tool_calls"])
    role, content = value.get("role"), _joined(value.get("content"))
    if content is None and any(others.get(key) for key in MESSAGE_FIELDS):
        content = ""  # beside tool calls there need be none
    texts = []
    for key, found in (("role", role), ("content", content)):
        if found is None and key in value:
            raise _NullField(f"message {number} of its '{field}' has null as '{key}'")
        if isinstance(found, list) and (kinds := [part["type"] for part in found if _is_other_part(part)]):
            raise UsageError(
                f"{where}: message {number} of '{field}' holds a part of type '{kinds[0]}'; only text is learned: "
                "leave such examples out"
            )
        if not isinstance(found, str):
            fault = f"has {_json_type(value[key])} as '{key}'" if key in value else f"has no '{key}'"
            raise UsageError(f"{where}: message {number} of '{field}' {fault}; {expected}")
        texts.append(found)
    return Message(texts[0], texts[1], targets and role == "assistant", _to_json(others) if others else "")


def _joined(content: object) -> object:
    """A list of text parts as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else content


def _is_other_part(part: object) -> bool:
    """Is it an image, say, in the form of a part of a content?"""
    return isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text"


def _parsed(value: object) -> object:
    """A value that some data sets hold as JSON inside a text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _json_type(value: object) -> str:
    names = {type(None): "null", list: "a list", dict: "an object", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")


def _end_with_target(conversation: Conversation, field: str) -> Conversation:
    """The conversation up to its last target, as later messages are never predicted; with a fault if it has none."""
    targets = [
        i for i, message in enumerate(conversation.messages) if message.is_target and _has_something_to_learn(message)
    ]
    if not targets:
        return Conversation(conversation.name, (), plain=False, fault=f"its '{field}' holds nothing to learn")
    return conversation._replace(messages=conversation.messages[: targets[-1] + 1])


def _has_something_to_learn(message: Message) -> bool:
    fields = json.loads(message.fields) if message.fields else {}
    return bool(message.content.strip() or any(fields.get(key) for key in MESSAGE_FIELDS))

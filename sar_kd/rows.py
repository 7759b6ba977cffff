"""What a row of text is: a plain document or a conversation.

The text field makes it a document; `messages`, or `prompt` and `completion` (also `question` and `answer`), make it a
conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sar_kd.config import UsageError

PAIRS = (("prompt", "completion"), ("question", "answer"))
CHUNK = 2**20
"""Characters of a document that are handed over at once."""


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

"""Where text comes from: the embedded text, files of a user's own, or the `datasets` package.

A row is a plain document or a conversation: the text field makes it a document; `messages`, or `prompt` and
`completion` (also `question` and `answer`), make it a conversation.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sar_kd import embedded, units
from sar_kd.config import DataConfig, UsageError
from sar_kd.hub import reason_of

_HELD_OUT_SHARE = 0.05
_HALF_INSTALLED = "`datasets` is there but cannot be imported ({}); `pip install --force-reinstall datasets`"
_PAIRS = (("prompt", "completion"), ("question", "answer"))


class Document(NamedTuple):
    """One text with a name to call it by."""

    name: str
    text: str


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


Sample = Document | Conversation


def load_documents(config: DataConfig) -> tuple[list[Sample], list[Sample]]:
    """Training and validation documents; without a validation source, 5 % of the training text is held out.

    Raises: UsageError for a file that is missing, unreadable or of another kind, and for text without content
    """
    if config.task:
        return task_questions("train"), task_questions("validation")
    if config.dataset_name:
        train, validation = _load_dataset(config)
    elif config.train_file:
        train, validation = _read_files("train_file", config.train_file, config.text_field), []
    else:
        splits = embedded.read_text("transfer", "validation")
        train, validation = ([Document(*item) for item in split.items()] for split in splits)
    if config.validation_file:
        validation = _read_files("validation_file", config.validation_file, config.text_field)
    if not train:
        raise UsageError(f"--dataset_name {config.dataset_name}: its 'train' split holds no text")
    if not validation:
        train, validation = _hold_out(train)
    return train, validation


def task_questions(split: str) -> list[Conversation]:
    """The questions of `--task units` as conversations, each under its own text's name. split: as in `units.SPLITS`"""
    return [
        Conversation(asked.text, (Message("user", asked.text, False), Message("assistant", asked.answer, True)), True)
        for asked in units.questions(split, units.COUNTS[split])
    ]


def _read_files(flag: str, paths: tuple[str, ...], text_field: str) -> list[Sample]:
    documents = [document for path in paths for document in _read_file(flag, Path(path), text_field)]
    if not documents:
        raise UsageError(f"--{flag} {' '.join(paths)}: holds no text")
    return documents


def _read_file(flag: str, path: Path, text_field: str) -> Iterator[Sample]:
    kind = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if kind not in (".txt", ".jsonl", ".jsonl.gz"):
        raise UsageError(f"--{flag} {path}: must be a .txt, .jsonl or .jsonl.gz file")
    try:
        with gzip.open(path) if kind == ".jsonl.gz" else open(path, "rb") as file:
            if kind == ".txt":
                text = _decode(flag, path, file.read())
                if text.strip():
                    yield Document(path.name, text)
                return
            for number, line in enumerate(file, 1):
                if line.strip() and (sample := _sample_of(flag, path, number, line, text_field)).text.strip():
                    yield sample
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--{flag} {path}: cannot be read ({reason})") from None


def _decode(flag: str, path: Path, content: bytes, where: str = "") -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")  # line ends are the editor's, not the text's
    except UnicodeDecodeError as error:
        where = where or f"byte {error.start}"
        raise UsageError(f"--{flag} {path}: is not UTF-8 text ({where}); convert it first") from None


def _sample_of(flag: str, path: Path, number: int, line: bytes, text_field: str) -> Sample:
    content = _decode(flag, path, line, f"line {number}")
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:  # also a number or a nesting beyond what Python reads
        reason = getattr(error, "msg", error)
        raise UsageError(f"--{flag} {path}: line {number} is not JSON ({reason})") from None
    name, fields = f"{path.name}:{number}", row if isinstance(row, dict) else {}
    if isinstance(fields.get(text_field), str):
        return Document(name, fields[text_field])
    conversation = _conversation_of(name, fields, f"--{flag} {path}: line {number}")
    if conversation is None:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UsageError(
            f"--text_field {text_field}: line {number} of {path} has no such text, nor messages, nor a prompt with a "
            f"completion (it has: {found})"
        )
    return conversation


def _conversation_of(name: str, row: dict, where: str) -> Conversation | None:
    """The conversation that a row holds, None if it has no field of one; `where` begins what is said of a bad one."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages", where, learned=True)
        return _checked(
            Conversation(name, messages, plain=False), "messages", "an assistant's message with text", where
        )
    fields = next((pair for pair in _PAIRS if pair[0] in row or pair[1] in row), None)
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


def _load_dataset(config: DataConfig) -> tuple[list[Sample], list[Sample]]:
    load_dataset = _import_load_dataset(f"--dataset_name {config.dataset_name}")
    try:
        loaded = load_dataset(config.dataset_name, config.dataset_config_name or None)
    except (OSError, ValueError) as error:  # the package's own errors for the hub, the disk and unknown names
        reason = reason_of(error, config.dataset_name, "dataset")
        raise UsageError(f"--dataset_name {config.dataset_name}: cannot be loaded ({reason})") from None
    if "train" not in loaded:
        raise UsageError(f"--dataset_name {config.dataset_name}: has no 'train' split (it has: {', '.join(loaded)})")
    columns = loaded["train"].column_names
    conversations = config.text_field not in columns
    if conversations and not {"messages", *(field for pair in _PAIRS for field in pair)} & set(columns):
        raise UsageError(
            f"--text_field {config.text_field}: the dataset has no such column (it has: {', '.join(columns)})"
        )

    def samples(split: str) -> list[Sample]:
        if split not in loaded:
            return []
        if conversations:
            where = f"--dataset_name {config.dataset_name}: {split} row"
            rows = enumerate(loaded[split])
            return [_conversation_of(f"{split}:{number}", row, f"{where} {number}") for number, row in rows]
        texts = loaded[split][config.text_field]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise UsageError(f"--text_field {config.text_field}: that column of the dataset holds no text")
        return [Document(f"{split}:{number}", text) for number, text in enumerate(texts) if text and text.strip()]

    return samples("train"), samples("validation")


def _import_load_dataset(where: str):
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name == "datasets":
            raise UsageError(f"{where}: needs `pip install datasets`") from None
        raise UsageError(f"{where}: {_HALF_INSTALLED.format(error)}") from None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{where}: {_HALF_INSTALLED.format(str(error).splitlines()[0])}") from None
    if not hasattr(datasets, "load_dataset"):  # a folder of that name, which Python takes for a package
        found = ", ".join(map(str, getattr(datasets, "__path__", ["?"])))
        raise UsageError(f"{where}: `datasets` is the folder {found}, not the package: move it, `pip install datasets`")
    return datasets.load_dataset


def _hold_out(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Hold out about 5 % of the text: whole samples from the end while they fit, then the end of the next document.

    A conversation is never split.
    """
    train, held, missing = list(samples), [], _HELD_OUT_SHARE * sum(len(sample.text) for sample in samples)
    while len(train) > 1 and len(train[-1].text) <= missing:
        held.insert(0, train.pop())
        missing -= len(held[0].text)
    if isinstance(train[-1], Conversation):
        if not held and len(train) == 1:
            raise UsageError("--validation_file: needed, because the training text is one conversation, never split")
        return (train, held) if held else (train[:-1], train[-1:])
    if not held or missing > len(held[0].text):
        name, text = train.pop()
        size = max(1, int(min(missing, len(text) / 2)))
        cut = text.rfind("\n", len(text) - 2 * size, len(text) - size) + 1 or len(text) - size
        train.append(Document(name, text[:cut]))
        held.insert(0, Document(f"{name} (end)", text[cut:]))
    return train, held

"""Where text comes from: the embedded text, files of a user's own, or the `datasets` package."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sar_kd import embedded
from sar_kd.config import DataConfig, UsageError

_HELD_OUT_SHARE = 0.05


class Document(NamedTuple):
    """One text with a name to call it by."""

    name: str
    text: str


def load_documents(config: DataConfig) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; without a validation source, 5 % of the training text is held out.

    Raises: UsageError for a file that is missing, unreadable or of another kind, and for text without content
    """
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


def _read_files(flag: str, paths: tuple[str, ...], text_field: str) -> list[Document]:
    documents = [document for path in paths for document in _read_file(flag, Path(path), text_field)]
    if not documents:
        raise UsageError(f"--{flag} {' '.join(paths)}: holds no text")
    return documents


def _read_file(flag: str, path: Path, text_field: str) -> Iterator[Document]:
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
                if line.strip() and (text := _field_of(flag, path, number, line, text_field)).strip():
                    yield Document(f"{path.name}:{number}", text)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--{flag} {path}: cannot be read ({reason})") from None


def _decode(flag: str, path: Path, content: bytes, where: str = "") -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")  # line ends are the editor's, not the text's
    except UnicodeDecodeError as error:
        where = where or f"byte {error.start}"
        raise UsageError(f"--{flag} {path}: is not UTF-8 text ({where}); convert it first") from None


def _field_of(flag: str, path: Path, number: int, line: bytes, text_field: str) -> str:
    content = _decode(flag, path, line, f"line {number}")
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:  # also a number or a nesting beyond what Python reads
        reason = getattr(error, "msg", error)
        raise UsageError(f"--{flag} {path}: line {number} is not JSON ({reason})") from None
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UsageError(f"--text_field {text_field}: line {number} of {path} has no such text (it has: {fields})")
    return text


def _load_dataset(config: DataConfig) -> tuple[list[Document], list[Document]]:
    try:
        import datasets
    except ImportError:
        raise UsageError(f"--dataset_name {config.dataset_name}: needs `pip install datasets`") from None
    try:
        loaded = datasets.load_dataset(config.dataset_name, config.dataset_config_name or None)
    except (OSError, ValueError) as error:  # the package's own errors for the hub, the disk and unknown names
        reason = str(error).splitlines()[0]
        raise UsageError(f"--dataset_name {config.dataset_name}: cannot be loaded ({reason})") from None
    if "train" not in loaded:
        raise UsageError(f"--dataset_name {config.dataset_name}: has no 'train' split (it has: {', '.join(loaded)})")
    if config.text_field not in loaded["train"].column_names:
        columns = ", ".join(loaded["train"].column_names)
        raise UsageError(f"--text_field {config.text_field}: the dataset has no such column (it has: {columns})")

    def documents(split: str) -> list[Document]:
        texts = loaded[split][config.text_field] if split in loaded else []
        if not all(text is None or isinstance(text, str) for text in texts):
            raise UsageError(f"--text_field {config.text_field}: that column of the dataset holds no text")
        return [Document(f"{split}:{number}", text) for number, text in enumerate(texts) if text and text.strip()]

    return documents("train"), documents("validation")


def _hold_out(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Hold out about 5 % of the text: whole documents from the end while they fit, then the end of the next one."""
    train, held, missing = list(documents), [], _HELD_OUT_SHARE * sum(len(document.text) for document in documents)
    while len(train) > 1 and len(train[-1].text) <= missing:
        held.insert(0, train.pop())
        missing -= len(held[0].text)
    if not held or missing > len(held[0].text):
        name, text = train.pop()
        size = max(1, int(min(missing, len(text) / 2)))
        cut = text.rfind("\n", len(text) - 2 * size, len(text) - size) + 1 or len(text) - size
        train.append(Document(name, text[:cut]))
        held.insert(0, Document(f"{name} (end)", text[cut:]))
    return train, held

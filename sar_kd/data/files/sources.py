"""Training and validation text from the embedded text, the user's files or the `datasets` package.

Small text is held in memory. Large text is read again, document by document, in each pass over it.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, starmap
from pathlib import Path
from typing import NamedTuple

from sar_kd import embedded
from sar_kd.config.sections import EMBEDDED, DataConfig
from sar_kd.data.files.file_checks import require_file, require_files
from sar_kd.data.files.public_forms import has_known_form
from sar_kd.data.files.samples import PAIRS, Conversation, Document, LongDocument, Sample, conversation_of, read_file
from sar_kd.data.unit_questions import task_questions
from sar_kd.errors import UsageError
from sar_kd.runtime.console import count_of
from sar_kd.runtime.garbage import no_garbage_collection
from sar_kd.runtime.hub import explain_hub_error

LARGE = 2**23
"""Characters from which text counts as large."""

_HELD_OUT_SHARE = 0.05

_BROKEN_INSTALL = "`datasets` is installed but cannot be imported ({}); `pip install --force-reinstall datasets`"

_MAX_HELD_OUT = 2**20
"""Characters: perplexity is measured often, and a larger text would hardly change it."""


class _Source(NamedTuple):
    """Documents that can be read again and again."""

    read: Callable[[], Iterator[Sample]]
    """With the empty ones"""
    check: Callable[[], None] = lambda: None
    """Raises UsageError if the text has changed"""

    def samples(self) -> Iterator[Sample]:
        """The documents without the empty ones."""
        return (sample for sample in self.read() if not _is_empty(sample))


def _is_empty(sample: Sample) -> bool:
    return isinstance(sample, Document) and not sample.text.strip()


class StreamedDocuments:
    """The documents of a large text, read one by one in each iteration."""

    def __init__(self, source: _Source, num_chars: int, digest: str, has_conversations: bool):
        """num_chars: of all text; digest: of names and text"""
        self._source, self.num_chars, self.digest, self.has_conversations = source, num_chars, digest, has_conversations

    def take(self, count: int, extra: list[Sample], num_chars: int) -> StreamedDocuments:
        """The first `count` documents, then `extra` ones; num_chars: of all these."""
        content = f"{self.digest} {count} {[(sample.name, sample.num_chars) for sample in extra]}"
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        source = self._source._replace(read=lambda: chain(islice(self._source.samples(), count), extra))
        return StreamedDocuments(source, num_chars, digest, self.has_conversations)

    def __iter__(self) -> Iterator[Sample]:
        yield from self._source.samples()
        self._source.check()


Documents = Sequence[Sample] | StreamedDocuments
"""In memory, or of a large text"""


def load_documents(
    config: DataConfig, show: Callable[[str], object] = lambda line: None
) -> tuple[Documents, Documents]:
    """Training and validation documents; without a validation source, 5 % of the text (at most 1 MB) are held out.

    show: takes a line about examples that are empty
    Raises: UsageError for a file that is missing, unreadable or of another kind, and for text without content
    """
    require_files(config)
    if config.task:
        return task_questions("train"), task_questions("validation")
    if config.dataset_name:
        train, validation = map(_read, _dataset(config))
    elif config.train_file:
        train, validation = _load_files("train_file", config.train_file, config.text_field), _Text([], ())
    else:
        train, validation = _embedded("transfer", "validation")
    if config.validation_file:
        validation = _load_files("validation_file", config.validation_file, config.text_field)
    if not train.count:
        raise UsageError(f"--dataset_name {config.dataset_name}: its '{config.dataset_split}' split holds no text")
    for what, option, text in zip(("training", "held-out"), config.text_options(), (train, validation), strict=True):
        if text.num_empty:
            show(f"Skipped {count_of(text.num_empty, 'empty example')} of the {what} text ({option})")
    if not validation.count:
        return _hold_out(train)
    return train.all, validation.all


def load_whole_texts(option: str, names: Sequence[str], text_field: str) -> list[Documents]:
    """All documents of each of these files; 'embedded' is the embedded training text.

    Raises: UsageError, which names the option, as `load_documents`
    """
    for name in names:
        if name != EMBEDDED:
            require_file(option, Path(name))
    return [
        (_embedded("transfer")[0] if name == EMBEDDED else _load_files(option, (name,), text_field)).all
        for name in names
    ]


@no_garbage_collection()
def _embedded(*splits: str) -> list[_Text]:
    return [_read(_Source(partial(starmap, Document, texts.items()))) for texts in embedded.read_text(*splits)]


@dataclass(frozen=True)
class _Text:
    """Documents after one pass over them."""

    all: Documents
    tail: Sequence[Sample]
    """The last documents, at least as many as are held out"""
    count: int = 0
    num_chars: int = 0
    num_empty: int = 0
    """Examples without text, which are left out"""


def _read(source: _Source) -> _Text:
    """Read documents once. They are held in memory until they prove a large text; the tail always is."""
    held: list[Sample] | None = []
    tail: deque[Sample] = deque()
    tail_chars, count, num_chars, num_empty, digest, has_conversations = 0, 0, 0, 0, hashlib.sha256(), False
    for sample in source.read():
        if _is_empty(sample):
            num_empty += 1
            continue
        size, count = sample.num_chars, count + 1
        num_chars, tail_chars = num_chars + size, tail_chars + size
        has_conversations = has_conversations or isinstance(sample, Conversation)
        tail.append(sample)
        while tail_chars - tail[0].num_chars > _MAX_HELD_OUT:
            tail_chars -= tail.popleft().num_chars
        if held is not None:
            held.append(sample)
        if num_chars >= LARGE:
            for part in held or (sample,):
                _update_digest(digest, part)
            held = None
    found = StreamedDocuments(source, num_chars, digest.hexdigest(), has_conversations) if held is None else held
    return _Text(found, tail, count, num_chars, num_empty)


def _update_digest(digest, sample: Sample) -> None:
    texts = [repr(sample)] if isinstance(sample, Conversation) else sample.chunks()
    start = f"{len(sample.name)} {sample.num_chars} {sample.name}"
    for text in texts:
        digest.update((start + text).encode("utf-8", "surrogatepass"))
        start = ""


def digest_of(documents: Documents) -> str:
    """A digest of names and text."""
    if isinstance(documents, StreamedDocuments):
        return documents.digest
    digest = hashlib.sha256()
    for sample in documents:
        _update_digest(digest, sample)
    return digest.hexdigest()


def _load_files(option: str, paths: tuple[str, ...], text_field: str) -> _Text:
    before = {path: _state_of(path) for path in paths}

    def check() -> None:
        for path in paths:
            if _state_of(path) != before[path]:
                raise UsageError(f"--{option} {path}: was changed while it was read; start again")

    found = _read(_Source(lambda: (s for path in paths for s in read_file(option, Path(path), text_field)), check))
    if not found.count:
        raise UsageError(f"--{option} {' '.join(paths)}: holds no text")
    return found


def _state_of(path: str) -> tuple[int, int] | None:
    """Size and time of a file, which change with its content; None if there is no such file."""
    try:
        found = os.stat(path)
    except OSError:  # reading it raises the error
        return None
    return found.st_size, found.st_mtime_ns


def _dataset(config: DataConfig) -> tuple[_Source, _Source]:
    """A dataset's training and validation split."""
    loaded = _load_splits(config)
    columns = loaded[config.dataset_split].column_names
    conversations = config.text_field not in columns
    known = {"messages", *(field for pair in PAIRS for field in pair)} & set(columns)
    if conversations and not (known or has_known_form(columns)):
        raise UsageError(
            f"--text_field {config.text_field}: the dataset has no such column, and no conversations in a form that is "
            f"known here (it has: {', '.join(columns)})"
        )

    def samples(split: str) -> Iterator[Sample]:
        if split not in loaded:
            return
        if conversations:
            where = f"--dataset_name {config.dataset_name}: {split} example"
            for number, example in enumerate(loaded[split]):
                conversation = conversation_of(f"{split}:{number}", example, f"{where} {number}")
                if conversation is None:  # the columns are the training split's
                    raise UsageError(f"{where} {number} holds no conversation")
                yield conversation
            return
        for number, text in enumerate(loaded[split][config.text_field]):
            if not (text is None or isinstance(text, str)):
                raise UsageError(f"--text_field {config.text_field}: that column of the dataset holds no text")
            yield Document(f"{split}:{number}", text or "")

    validation = "validation" if config.dataset_split != "validation" else ""
    return _Source(lambda: samples(config.dataset_split)), _Source(lambda: samples(validation))


def _load_splits(config: DataConfig) -> dict:
    """A dataset's splits by name, the one to train on among them."""
    where, split = f"--dataset_name {config.dataset_name}", config.dataset_split
    load_dataset = _import_load_dataset(where)
    names = config.dataset_name, config.dataset_config_name or None
    try:
        loaded = load_dataset(*names)
        if split not in loaded and any(mark in split for mark in "[+"):
            return {**loaded, split: load_dataset(*names, split=split)}
    except (OSError, ValueError) as error:  # the package's own errors for the hub, the disk and unknown names
        reason = explain_hub_error(error, config.dataset_name, "dataset")
        raise UsageError(f"{where}: cannot be loaded ({reason})") from None
    if split not in loaded:
        raise UsageError(
            f"{where}: has no '{split}' split (it has: {', '.join(loaded)}); choose one by --dataset_split"
        )
    return loaded


def _import_load_dataset(where: str):
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name == "datasets":
            raise UsageError(f"{where}: needs `pip install datasets`") from None
        raise UsageError(f"{where}: {_BROKEN_INSTALL.format(error)}") from None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{where}: {_BROKEN_INSTALL.format(str(error).splitlines()[0])}") from None
    if not hasattr(datasets, "load_dataset"):  # a folder of that name, which Python takes for a package
        found = ", ".join(map(str, getattr(datasets, "__path__", ["?"])))
        raise UsageError(f"{where}: `datasets` is the folder {found}, not the package: move it, `pip install datasets`")
    return datasets.load_dataset


def _hold_out(text: _Text) -> tuple[Documents, Documents]:
    """Training and held-out text: of the last 5 %, whole samples from the end, then the end of the next document.

    A conversation is never split.
    """
    tail, held, extra = list(text.tail), list[Sample](), list[Sample]()
    missing = min(_HELD_OUT_SHARE * text.num_chars, _MAX_HELD_OUT)
    while text.count - len(held) > 1 and tail[-1].num_chars <= missing:
        held.insert(0, tail.pop())
        missing -= held[0].num_chars
    last = tail[-1]
    if isinstance(last, Conversation):
        if not held and text.count == 1:
            raise UsageError("--validation_file: needed, because the training text is one conversation, never split")
        held = held or [last]
    elif not held or missing > held[0].num_chars:
        cut = _cut_before(last, max(1, int(min(missing, last.num_chars / 2))))
        if not cut and text.count - len(held) == 1:  # what is held by now has no character
            raise UsageError("--validation_file: needed, because the training text holds a single character")
        extra = [last.part(0, cut, last.name)] if cut else []
        held.insert(0, last.part(cut, last.num_chars, f"{last.name} (end)"))
    count = text.count - len(held)
    if isinstance(text.all, StreamedDocuments):
        return text.all.take(count, extra, text.num_chars - sum(sample.num_chars for sample in held)), held
    return [*text.all[:count], *extra], held


def _cut_before(document: Document | LongDocument, size: int) -> int:
    """Where about the last `size` characters begin: after a line end, if there is one in as many before them."""
    length, position, found = document.num_chars, 0, 0
    for chunk in document.chunks():
        low, high = max(0, length - 2 * size - position), length - size - position
        if high > 0 and (at := chunk.rfind("\n", low, high)) >= 0:
            found = position + at + 1
        position += len(chunk)
    return found or length - size

"""Where text comes from: the embedded text, files of a user's own, or the `datasets` package.

What is small is held in memory. What is large is read anew, document by document, each time it is gone through.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from sar_kd import embedded
from sar_kd.config.sections import DataConfig
from sar_kd.data.samples import PAIRS, Conversation, Document, LongDocument, Sample, conversation_of, read_file
from sar_kd.data.unit_questions import task_questions
from sar_kd.errors import UsageError
from sar_kd.runtime.hub import reason_of

LARGE = 2**23
"""Characters from which text counts as large."""

_HELD_OUT_SHARE = 0.05

_HALF_INSTALLED = "`datasets` is there but cannot be imported ({}); `pip install --force-reinstall datasets`"

_MOST_HELD_OUT = 2**20
"""Characters: perplexity is measured often, and a larger text would not tell more."""


class _Source(NamedTuple):
    """Something to read documents from, as often as they are needed."""

    read: Callable[[], Iterator[Sample]]
    check: Callable[[], None] = lambda: None
    """Raises UsageError if it is not what it was"""


class StreamedDocuments:
    """Documents of a large text, each read when it is its turn."""

    def __init__(self, source: _Source, num_chars: int, digest: str, has_conversations: bool):
        """source: all documents, from the first; num_chars: of their text; digest: of names and text"""
        self._source, self.num_chars, self.digest, self.has_conversations = source, num_chars, digest, has_conversations

    def until(self, stop: int, behind: list[Sample], num_chars: int) -> StreamedDocuments:
        """So many documents, and `behind` them others; num_chars: of all these."""
        what = f"{self.digest} {stop} {[(sample.name, sample.num_chars) for sample in behind]}"
        digest = hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()
        source = self._source._replace(read=lambda: chain(islice(self._source.read(), stop), behind))
        return StreamedDocuments(source, num_chars, digest, self.has_conversations)

    def __iter__(self) -> Iterator[Sample]:
        yield from self._source.read()
        self._source.check()


def load_documents(
    config: DataConfig,
) -> tuple[Sequence[Sample] | StreamedDocuments, Sequence[Sample] | StreamedDocuments]:
    """Training and validation documents; without a validation source, 5 % of the training text is held out.

    Of a large text no more is held out than takes a few seconds to measure (1 MB).

    Raises: UsageError for a file that is missing, unreadable or of another kind, and for text without content
    """
    if config.task:
        return task_questions("train"), task_questions("validation")
    if config.dataset_name:
        train, validation = map(_gathered, _dataset(config))
    elif config.train_file:
        train, validation = _load_files("train_file", config.train_file, config.text_field), _Gathered([], ())
    else:
        splits = embedded.read_text("transfer", "validation")
        train, validation = (_gathered(_items(split)) for split in splits)
    if config.validation_file:
        validation = _load_files("validation_file", config.validation_file, config.text_field)
    if not train.count:
        raise UsageError(f"--dataset_name {config.dataset_name}: its 'train' split holds no text")
    if not validation.count:
        return _hold_out(train)
    return train.all, validation.all


@dataclass(frozen=True)
class _Gathered:
    """Documents gone through once."""

    all: Sequence[Sample] | StreamedDocuments
    """In memory, unless they are a large text"""
    tail: Sequence[Sample]
    """The last documents, more than are held out"""
    count: int = 0
    num_chars: int = 0

    def until(
        self, stop: int, last: Document | LongDocument | None, num_chars: int
    ) -> list[Sample] | StreamedDocuments:
        """So many documents, and behind them `last`, which is the next one's beginning, if any; their characters."""
        behind: list[Sample] = [] if last is None else [last]
        if isinstance(self.all, StreamedDocuments):
            return self.all.until(stop, behind, num_chars)
        return [*self.all[:stop], *behind]


def _gathered(source: _Source) -> _Gathered:
    """Go through documents once; keep them while they are no large text, and always what it takes to hold some out."""
    held: list[Sample] | None = []
    tail: deque[Sample] = deque()
    of_tail, count, num_chars, digest, talks = 0, 0, 0, hashlib.sha256(), False
    for sample in source.read():
        size, count = sample.num_chars, count + 1
        num_chars, of_tail, talks = num_chars + size, of_tail + size, talks or isinstance(sample, Conversation)
        tail.append(sample)
        while of_tail - tail[0].num_chars > _MOST_HELD_OUT:
            of_tail -= tail.popleft().num_chars
        if held is not None:
            held.append(sample)
        if num_chars >= LARGE:
            for part in held or (sample,):
                _enter(part, digest)
            held = None
    found = StreamedDocuments(source, num_chars, digest.hexdigest(), talks) if held is None else held
    return _Gathered(found, tail, count, num_chars)


def _enter(sample: Sample, digest) -> None:
    """Let a digest depend on a document."""
    texts = [repr(sample)] if isinstance(sample, Conversation) else sample.chunks()
    start = f"{len(sample.name)} {sample.num_chars} {sample.name}"
    for text in texts:
        digest.update((start + text).encode("utf-8", "surrogatepass"))
        start = ""


def digest_of(documents: Sequence[Sample] | StreamedDocuments) -> str:
    """A digest of names and text, for telling one text from another."""
    if isinstance(documents, StreamedDocuments):
        return documents.digest
    digest = hashlib.sha256()
    for sample in documents:
        _enter(sample, digest)
    return digest.hexdigest()


def _items(texts: dict[str, str]) -> _Source:
    return _Source(lambda: (Document(*item) for item in texts.items()))


def _load_files(flag: str, paths: tuple[str, ...], text_field: str) -> _Gathered:
    before = {path: _state_of(path) for path in paths}

    def check() -> None:
        for path in paths:
            if _state_of(path) != before[path]:
                raise UsageError(f"--{flag} {path}: was changed while it was read; start again")

    found = _gathered(_Source(lambda: (s for path in paths for s in read_file(flag, Path(path), text_field)), check))
    if not found.count:
        raise UsageError(f"--{flag} {' '.join(paths)}: holds no text")
    return found


def _state_of(path: str) -> tuple[int, int] | None:
    """What changes with a file's content; None if there is no such file."""
    try:
        found = os.stat(path)
    except OSError:  # reading it says why
        return None
    return found.st_size, found.st_mtime_ns


def _dataset(config: DataConfig) -> tuple[_Source, _Source]:
    """A dataset's training and validation split."""
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
    if conversations and not {"messages", *(field for pair in PAIRS for field in pair)} & set(columns):
        raise UsageError(
            f"--text_field {config.text_field}: the dataset has no such column (it has: {', '.join(columns)})"
        )

    def samples(split: str) -> Iterator[Sample]:
        if split not in loaded:
            return
        if conversations:
            where = f"--dataset_name {config.dataset_name}: {split} row"
            for number, row in enumerate(loaded[split]):
                talk = conversation_of(f"{split}:{number}", row, f"{where} {number}")
                if talk is None:  # the columns are the training split's
                    raise UsageError(f"{where} {number} holds no conversation")
                yield talk
            return
        for number, text in enumerate(loaded[split][config.text_field]):
            if not (text is None or isinstance(text, str)):
                raise UsageError(f"--text_field {config.text_field}: that column of the dataset holds no text")
            if text and text.strip():
                yield Document(f"{split}:{number}", text)

    return _Source(lambda: samples("train")), _Source(lambda: samples("validation"))


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


def _hold_out(text: _Gathered) -> tuple[Sequence[Sample] | StreamedDocuments, Sequence[Sample] | StreamedDocuments]:
    """Hold out about 5 % of the text: whole samples from the end while they fit, then the end of the next document.

    A conversation is never split.
    """
    tail, held = list(text.tail), list[Sample]()
    missing = min(_HELD_OUT_SHARE * text.num_chars, _MOST_HELD_OUT)
    while text.count - len(held) > 1 and tail[-1].num_chars <= missing:
        held.insert(0, tail.pop())
        missing -= held[0].num_chars
    last, beginning = tail[-1], None
    if isinstance(last, Conversation):
        if not held and text.count == 1:
            raise UsageError("--validation_file: needed, because the training text is one conversation, never split")
        held = held or [last]
    elif not held or missing > held[0].num_chars:
        cut = _cut_before(last, max(1, int(min(missing, last.num_chars / 2))))
        if not cut and text.count == 1:
            raise UsageError("--validation_file: needed, because the training text holds a single character")
        beginning = last.part(0, cut, last.name) if cut else None
        held.insert(0, last.part(cut, last.num_chars, f"{last.name} (end)"))
    num_chars = text.num_chars - sum(sample.num_chars for sample in held)
    return text.until(text.count - len(held), beginning, num_chars), held


def _cut_before(document: Document | LongDocument, size: int) -> int:
    """Where about the last `size` characters begin: behind a line end, if there is one in as many before them."""
    length, position, found = document.num_chars, 0, 0
    for chunk in document.chunks():
        low, high = max(0, length - 2 * size - position), length - size - position
        if high > 0 and (at := chunk.rfind("\n", low, high)) >= 0:
            found = position + at + 1
        position += len(chunk)
    return found or length - size

"""`held_out.json`: the loss of a run's models on each held-out document and word, by which they are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sar_kd.errors import UsageError
from sar_kd.runtime.files import as_float, atomic_write, json_safe

FILE = "held_out.json"


@dataclass(frozen=True)
class WordLosses:
    """What a run's models lose on the words of its held-out text, as `data.words` finds them."""

    words: Sequence[str]
    counts: np.ndarray
    """int64 [words]: how often each occurs"""
    num_bytes: int
    """Of the text in which they were looked for"""
    nats: Mapping[str, np.ndarray]
    """For each model but 'final', float64 [words]: -log p, summed over the tokens of all occurrences"""


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of a run, and what its models lose on each."""

    text: str
    """Digest of the documents, in the student's tokens"""
    tokenizer: str
    """Digest of the student's tokenizer"""
    blocks: str
    """Digest of where the text is cut into blocks"""
    names: Sequence[str]
    num_bytes: np.ndarray
    """int64 [documents]: of the text that is predicted"""
    nats: Mapping[str, np.ndarray]
    """For each model that was measured, float64 [documents]: -log p, summed over tokens. 'start': the student before
    the first step; 'best': the one that is saved; 'final': that of the last validation; 'teacher'"""
    words: WordLosses | None = None
    """In a run with a control"""

    def write(self, folder: Path) -> None:
        """Into the run folder."""
        values = {"text": self.text, "tokenizer": self.tokenizer, "blocks": self.blocks, "names": list(self.names)}
        content = {**values, "bytes": self.num_bytes.tolist(), "nats": _lists_of(self.nats)}
        if self.words is not None:
            found = {"words": list(self.words.words), "counts": self.words.counts.tolist()}
            content["words"] = {**found, "bytes": self.words.num_bytes, "nats": _lists_of(self.words.nats)}
        atomic_write(folder / FILE, json.dumps(content) + "\n")


def _lists_of(nats: Mapping[str, np.ndarray]) -> dict:
    return {model: json_safe(list(map(float, values))) for model, values in nats.items()}


def _arrays_of(nats: dict, size: int) -> dict[str, np.ndarray]:
    """Raises: ValueError if one has another size"""
    found = {str(model): np.array([as_float(value) for value in nats[model]]) for model in nats}
    if any(values.shape != (size,) for values in found.values()):
        raise ValueError("its lists differ in length")
    return found


def _words_of(found: dict) -> WordLosses:
    words, counts = list(map(str, found["words"])), np.array(found["counts"], dtype=np.int64)
    if counts.shape != (len(words),):
        raise ValueError("its lists differ in length")
    return WordLosses(words, counts, int(found["bytes"]), _arrays_of(found["nats"], len(words)))


def read_held_out(folder: Path) -> HeldOut:
    """Read the file of a run. Raises: UsageError if it is not there, or cannot be read"""
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder}: holds no {FILE}, so its run is of an earlier version, or was not begun")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        num_bytes = np.array(found["bytes"], dtype=np.int64)
        text, tokenizer, blocks = (str(found[name]) for name in ("text", "tokenizer", "blocks"))
        names = list(map(str, found["names"]))
        if num_bytes.shape != (len(names),):
            raise ValueError("its lists differ in length")
        nats = _arrays_of(found["nats"], len(names))
        words = _words_of(found["words"]) if "words" in found else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{folder}: {FILE} cannot be read ({error})") from None
    return HeldOut(text, tokenizer, blocks, names, num_bytes, nats, words)


def check_same_text(first: Path, one: HeldOut, second: Path, other: HeldOut) -> None:
    """Raise UsageError, in one line, unless two runs were measured on the same held-out text in the same tokens."""
    kinds = {
        "tokenizers of their students": one.tokenizer == other.tokenizer,
        "sizes of their held-out text": one.num_bytes.sum() == other.num_bytes.sum(),
        "held-out texts": one.text == other.text and np.array_equal(one.num_bytes, other.num_bytes),
    }
    if differ := [what for what, is_same in kinds.items() if not is_same]:
        raise UsageError(f"{second}: cannot be compared with {first}: the {differ[0]} differ")

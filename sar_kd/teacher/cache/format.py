"""The files of a teacher cache: a header that is checked, and for each text an index and shards of rows.

    header.json              facts that all of it depends on, and the digest of every finished shard; digested itself
    train/index/             columns: the token of each row, where it ends, the documents, the windows
    train/00000.rows ...     one record a row: see `record_of`
    validation/ ...          the same of the held-out text

A shard is written under another name and given its own when it is whole; then the header, replaced as one, names it.
So a kill leaves finished shards and at most one file that the header does not name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sar_kd.errors import UsageError
from sar_kd.runtime.files import atomic_write, file_digest

TEXTS = ("train", "validation")

FORMAT = 1

HEADER = "header.json"

_OPEN_SHARDS = 64

_NAMES = {
    "text": "another text",
    "tokenizer": "another tokenizer of the teacher's",
    "teacher": "another teacher",
    "block_size": "another --block_size",
    "teacher_top_k": "another --teacher_top_k",
    "windows": "windows cut for another student's tokenizer",
    "dtype": "another --model_dtype",
    "batch_size": "another --per_device_batch_size",
    "temperatures": "other --temperatures",
}
"""What the facts that a user decides on are called"""


def record_of(k: int, num_tokens: int, num_temperatures: int) -> np.dtype:
    """What is stored of a row, packed.

    log_prob  float32, of the token that the text has there, nats
    peak      float32, of the likeliest token; nan for a row of logits that were not finite
    ids       the k likeliest tokens, the likeliest first; 16 bits each where they suffice
    gaps      float16 [k], log-probability of each minus `peak`
    rests     float16, by temperature T: log sum exp(z / T) of all other tokens, minus that of these k
    """
    ids = "<u2" if num_tokens <= 2**16 else "<i4"
    of_row = [("log_prob", "<f4"), ("peak", "<f4")]
    return np.dtype([*of_row, ("ids", ids, (k,)), ("gaps", "<f2", (k,)), ("rests", "<f2", (num_temperatures,))])


def record_of_facts(facts: dict) -> np.dtype:
    """The same, as a header's facts say."""
    return record_of(facts["teacher_top_k"], facts["num_tokens"], len(facts["temperatures"]))


def cache_error(folder: Path, reason: str) -> UsageError:
    """What is wrong with a cache, in one line."""
    return UsageError(f"--teacher_cache {folder}: {reason}")


def read_header(folder: Path) -> dict[str, Any]:
    """The header of a cache, finished or not.

    Raises: UsageError if there is none, or it is not what was written
    """
    path = folder / HEADER
    if not path.is_file():
        where = "holds no teacher cache" if folder.is_dir() else "no such folder"
        raise cache_error(folder, f"{where}; make one with `python -m sar_kd cache --teacher_cache {folder}`")
    try:
        header = json.loads(path.read_bytes())
        own = header.pop("sha256")
        known = header["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise cache_error(folder, f"{HEADER} cannot be read ({error}); make the cache anew with --overwrite") from None
    if not known:
        raise cache_error(folder, f"was written by another version (format {header['format']}); make it anew")
    if own != _digest(header):
        raise cache_error(folder, f"{HEADER} is damaged; make the cache anew with --overwrite")
    return header


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Replace the header, so that a kill leaves the old one or the new."""
    text = json.dumps({**header, "sha256": _digest(header)}, indent=1) + "\n"
    atomic_write(folder / HEADER, text, "teacher_cache", "then the same command goes on")


def _digest(header: dict) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def key_of(header: dict, text: str) -> str:
    """The key of a text's index: of all that it depends on."""
    return f"{text} {_digest(header['facts'])}"


def check_compatible(folder: Path, header: dict, facts: dict) -> None:
    """Raise UsageError, naming the first of these facts that the cache was made with otherwise."""
    for name, value in facts.items():
        if header["facts"].get(name) != value:
            had = header["facts"].get(name)
            shown = f" ({had}, not {value})" if isinstance(value, (int, str)) and len(str(value)) < 20 else ""
            raise cache_error(folder, f"was made with {_NAMES.get(name, f'another {name}')}{shown}")


def index_path(folder: Path, text: str) -> Path:
    """Where a text's index lies."""
    return folder / text / "index"


def shard_path(folder: Path, text: str, number: int) -> Path:
    """Where a shard lies."""
    return folder / text / f"{number:05d}.rows"


def write_shard(path: Path, rows: np.ndarray) -> str:
    """Write a shard as a whole; its digest."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        rows.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    digest = file_digest(partial)
    os.replace(partial, path)
    return digest


def remove_unnamed(folder: Path, header: dict, text: str) -> None:
    """Remove what a kill left: files that the header does not name."""
    named = {shard_path(folder, text, number) for number in range(len(header["shards"][text]))}
    for path in (folder / text).glob("*.*"):
        if path.is_file() and path not in named:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


class Shards:
    """The rows of a text, memory-mapped."""

    def __init__(self, folder: Path, header: dict, text: str):
        facts = header["facts"]
        self.folder, self.text = folder, text
        self.record = record_of_facts(facts)
        self.digests = [digest for _, digest in header["shards"][text]]
        self.ends = np.cumsum([rows for rows, _ in header["shards"][text]], dtype=np.int64)
        # A map takes one of the files that a process may have open.
        self._map = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        """Rows in all finished shards."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def num_bytes(self) -> int:
        return len(self) * self.record.itemsize

    def check(self, number: int) -> int:
        """Compare a shard with its size and digest; its bytes.

        Raises: UsageError if it is missing or another
        """
        path = shard_path(self.folder, self.text, number)
        size = int(np.diff(self.ends, prepend=0)[number]) * self.record.itemsize
        if not path.is_file() or path.is_symlink() or path.stat().st_size != size:
            raise cache_error(
                self.folder, f"{path.relative_to(self.folder)} is missing or has another size; --overwrite"
            )
        if file_digest(path) != self.digests[number]:
            raise cache_error(
                self.folder, f"{path.relative_to(self.folder)} is damaged (another digest); make it anew, --overwrite"
            )
        return size

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The records at some positions, int64 [N]; where one is negative, a row that nothing is known of."""
        found = np.zeros(len(positions), dtype=self.record)
        found["peak"] = found["log_prob"] = np.nan
        numbers = np.searchsorted(self.ends, positions, side="right")
        for number in np.unique(numbers[positions >= 0]):
            chosen = (numbers == number) & (positions >= 0)
            first = int(self.ends[number - 1]) if number else 0
            found[chosen] = self._map(int(number))[positions[chosen] - first]
        return found

    def nats(self) -> float:
        """What the teacher makes of all these tokens: the sum of -log p, in float64."""
        maps = (self._map(number) for number in range(len(self.digests)))
        return -sum(float(rows["log_prob"].astype(np.float64).sum()) for rows in maps)

    def _open(self, number: int) -> np.ndarray:
        return np.memmap(shard_path(self.folder, self.text, number), self.record, "r")

"""The files of a teacher cache: a verified header and, for each text, an index and shards of records.

    header.json                  metadata that everything depends on, the digest of each finished shard, its own digest
    train/index/                 columns: target tokens, the documents, the teacher's blocks
    train/00000.records ...      one record per target token: see `record_dtype`
    validation/ ...              the same for the held-out text

Each file is written atomically, a shard before the header that names it. So a kill leaves finished shards, and at most
one file that the header does not name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sar_kd.config.installation import program_name
from sar_kd.errors import UsageError
from sar_kd.runtime.files import atomic_write, file_digest

FORMAT = 5
"""Version of all these files; a cache of another one is refused"""

HEADER = "header.json"

TEXTS = ("train", "validation")

_atomic_write = functools.partial(
    atomic_write, option="teacher_cache", remedy="free some room, then the same command continues"
)

_MAX_OPEN_SHARDS = 64

_DIFFERENCES = {
    "text": "a different text",
    "tokenizer": "a different teacher tokenizer",
    "teacher": "a different teacher",
    "block_size": "a different --block_size",
    "keep": "a different --keep",
    "teacher_top_k": "a different --teacher_top_k",
    "block_tokenizer": "blocks cut for a different student tokenizer",
    "template_date": "a different --template_date",
    "dtype": "a different --model_dtype",
    "batch_size": "a different --per_device_batch_size",
    "temperatures": "different --temperatures",
    "seed": "a different --seed",
    "source": "other log-probabilities, or another served model",
}
"""In an error message, by name in the metadata; the names that an option determines"""


def record_dtype(metadata: dict) -> np.dtype:
    """The packed record of one target token, from a header's metadata (k = teacher_top_k).

    target_log_prob  float32, log-probability of the target token, nats
    max_log_prob     float32, the largest log-probability, nats; nan where the logits were not finite
    ids              [k], tokens; uint16 where that suffices, else int32

    --keep topk, where the tokens are the k most likely, the most likely first:
    log_prob_gaps    float16 [k], log-probability of each minus the largest, nats
    tail_log_ratios  float16, for each temperature T: log sum exp(z / T) over all other tokens, minus that over these k

    --keep mixed or sampled, where they are drawn:
    gap_codes        uint8 [k], log-probability of each minus the largest: see `draws.gaps_of`
    codes            uint8 [k], for mixed see `Draws.codes`; for sampled how often each was drawn
    log_sums         float16, for each temperature T: log sum exp((z - max z) / T)
    """
    k, ids = metadata["teacher_top_k"], "<u2" if metadata["num_tokens"] <= 2**16 else "<i4"
    per_temperature = "<f2", (len(metadata["temperatures"]),)
    fields = [
        ("target_log_prob", "<f4"),
        ("max_log_prob", "<f4"),
        ("ids", ids, (k,)),
    ]
    if metadata["keep"] == "topk":
        return np.dtype([*fields, ("log_prob_gaps", "<f2", (k,)), ("tail_log_ratios", *per_temperature)])
    return np.dtype([*fields, ("gap_codes", "u1", (k,)), ("codes", "u1", (k,)), ("log_sums", *per_temperature)])


def describe_kept(metadata: dict) -> str:
    """Which tokens of a position a cache holds."""
    k = metadata["teacher_top_k"]
    drawn = "drawn without replacement" if metadata["keep"] == "mixed" else "drawn with replacement"
    return f"{k} most likely tokens" if metadata["keep"] == "topk" else f"target token and {k} {drawn}"


def cache_error(folder: Path, reason: str) -> UsageError:
    """An error about a cache, in one line."""
    return UsageError(f"--teacher_cache {folder}: {reason}")


def damaged_cache(folder: Path, reason: str) -> UsageError:
    """An error about a cache that has to be made again, with the command for it."""
    command = f"{program_name()} cache --teacher_cache {folder} --overwrite"
    return cache_error(folder, f"{reason}; make it again with `{command}` and the options that it was made with")


def read_header(folder: Path) -> dict[str, Any]:
    """The verified header of a cache, which may be unfinished.

    Raises: UsageError if it is missing, damaged, or of another version
    """
    path = folder / HEADER
    if not path.is_file():
        where = "holds no teacher cache" if folder.is_dir() else "no such folder"
        raise cache_error(folder, f"{where}; make one with `{program_name()} cache --teacher_cache {folder}`")
    try:
        header = json.loads(path.read_bytes())
        digest = header.pop("sha256")
        is_known = header["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged_cache(folder, f"{HEADER} cannot be read ({error})") from None
    if not is_known:
        raise damaged_cache(folder, f"was written by another version (format {header['format']})")
    if digest != _digest(header):
        raise damaged_cache(folder, f"{HEADER} is damaged")
    return header


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Replace the header, with its digest."""
    text = json.dumps({**header, "sha256": _digest(header)}, indent=1) + "\n"
    _atomic_write(folder / HEADER, text)


def check_compatible(folder: Path, header: dict, metadata: dict) -> None:
    """Raise UsageError, naming the first difference, unless the cache was made with this metadata."""
    for name, value in metadata.items():
        stored = header["metadata"].get(name)
        if stored != value:
            shown = f" ({stored}, not {value})" if isinstance(value, (int, str)) and len(str(value)) < 20 else ""
            raise cache_error(folder, f"was made with {_DIFFERENCES.get(name, f'a different {name}')}{shown}")


def index_key(header: dict, text: str) -> str:
    """Identifies the index of a text: a digest of all that it depends on."""
    return f"{text} {_digest(header['metadata'])}"


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def index_path(folder: Path, text: str) -> Path:
    """The folder of a text's index."""
    return folder / text / "index"


def shard_path(folder: Path, text: str, number: int) -> Path:
    """The file of a shard."""
    return folder / text / f"{number:05d}.records"


def write_shard(path: Path, records: np.ndarray) -> str:
    """Write a shard; returns its digest."""
    _atomic_write(path, records.tofile)
    return file_digest(path)


def remove_unnamed(folder: Path, header: dict, text: str) -> None:
    """Remove the files that a kill left and the header does not name."""
    named = {shard_path(folder, text, number) for number in range(len(header["shards"][text]))}
    for path in (folder / text).glob("*.*"):
        if path.is_file() and path not in named:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


class Shards:
    """The records of a text, memory-mapped."""

    def __init__(self, folder: Path, header: dict, text: str):
        self.folder, self.text, self.dtype = folder, text, record_dtype(header["metadata"])
        self.digests = [digest for _, digest in header["shards"][text]]
        self.ends = np.cumsum([num_records for num_records, _ in header["shards"][text]], dtype=np.int64)
        # Each map takes one of the files that a process may have open.
        self._map = functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def num_bytes(self) -> int:
        return len(self) * self.dtype.itemsize

    def check(self, number: int) -> int:
        """Compare a shard with its size and digest; returns its size in bytes.

        Raises: UsageError if it is missing or damaged
        """
        path = shard_path(self.folder, self.text, number)
        name, size = path.relative_to(self.folder), int(np.diff(self.ends, prepend=0)[number]) * self.dtype.itemsize
        if not path.is_file() or path.is_symlink() or path.stat().st_size != size:
            raise damaged_cache(self.folder, f"{name} is missing or has another size")
        if file_digest(path) != self.digests[number]:
            raise damaged_cache(self.folder, f"{name} is damaged (another digest)")
        return size

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The records at int64 [N] indices; one without log-probabilities where an index is negative."""
        records = np.zeros(len(indices), dtype=self.dtype)
        records["max_log_prob"] = records["target_log_prob"] = np.nan
        numbers = np.searchsorted(self.ends, indices, side="right")
        for number in np.unique(numbers[indices >= 0]):
            chosen = (numbers == number) & (indices >= 0)
            first = int(self.ends[number - 1]) if number else 0
            records[chosen] = self._map(int(number))[indices[chosen] - first]
        return records

    def total_nats(self) -> tuple[float, int]:
        """The teacher's loss over the targets with a log-probability, the sum of -log p in float64; their number."""
        found = [records["target_log_prob"].astype(np.float64) for records in self._maps()]
        known = [log_probs[~np.isnan(log_probs)] for log_probs in found]
        return -sum(float(log_probs.sum()) for log_probs in known), sum(map(len, known))

    def num_nonfinite(self) -> int:
        """Records whose logits were not finite."""
        return sum(int(np.isnan(records["max_log_prob"]).sum()) for records in self._maps())

    def _maps(self) -> Iterator[np.ndarray]:
        return (self._map(number) for number in range(len(self.digests)))

    def _open(self, number: int) -> np.ndarray:
        return np.memmap(shard_path(self.folder, self.text, number), self.dtype, "r")

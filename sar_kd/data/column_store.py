"""Growing columns of numbers and strings, in memory or in the files of a folder.

A finished folder has a header with its key and each file's dtype, size and digest; opening it reads and compares every
byte once. Nothing in it is code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sar_kd.runtime.files import file_digest

_HEADER = "header.json"

_FORMAT = 2

_DTYPES = ("int32", "int64", "bool", "uint8")


class Column:
    """An array of one dtype that grows at its end."""

    def __init__(self, dtype: str, width: int, path: Path | None):
        """width: numbers in an entry, 0 for a column without a second dimension; path: its file, None in memory"""
        assert dtype in _DTYPES
        self.dtype, self.width, self.path = dtype, width, path
        self._parts: list[np.ndarray] = []
        self._size = 0
        self._file = open(path, "wb") if path else None

    def __len__(self) -> int:
        return self._size

    @property
    def num_bytes(self) -> int:
        return self._size * _entry_bytes(self.dtype, self.width)

    def append(self, values) -> None:
        values = np.ascontiguousarray(values, dtype=self.dtype)
        self._size += len(values)
        if self._file is None:
            self._parts.append(values)
        else:
            self._file.write(values.data if values.size else b"")

    def truncate(self, size: int) -> None:
        """Drop the entries from `size` on."""
        if self._file is None:
            self._parts = [np.concatenate(self._parts)[:size]] if self._parts else []
        else:
            self._file.seek(size * _entry_bytes(self.dtype, self.width))
            self._file.truncate()
        self._size = size

    def finalize(self) -> np.ndarray:
        """The array, read only; nothing can be added any more."""
        if self._file is None:
            empty = np.zeros((0, self.width) if self.width else 0, dtype=self.dtype)
            return np.concatenate([empty, *self._parts])
        self._file.close()
        assert self.path is not None
        return _memory_map(self.path, self.dtype, self.width, self._size)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _entry_bytes(dtype: str, width: int) -> int:
    return max(1, width) * np.dtype(dtype).itemsize


def _memory_map(path: Path, dtype: str, width: int, size: int) -> np.ndarray:
    shape = (size, width) if width else (size,)
    # numpy cannot map an empty file.
    return np.asarray(np.memmap(path, dtype, "r", shape=shape)) if size else np.zeros(shape, dtype)


class StringColumn:
    """Strings that grow at the end: a column of their bytes, and one of where each ends."""

    def __init__(self, content: Column, ends: Column):
        self._content, self._ends = content, ends

    def append(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        self._ends.append(len(self._content) + np.cumsum(lengths))
        self._content.append(np.frombuffer(b"".join(encoded), dtype=np.uint8))


class Strings(Sequence):
    """The strings of a finished `StringColumn`."""

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        """content: uint8 [N]; ends: int64 [K], where each string ends in it"""
        self._content, self._ends = content, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        key = range(len(self))[key]
        start = self._ends[key - 1] if key else 0
        return self._content[start : self._ends[key]].tobytes().decode("utf-8", "surrogatepass")

    def __eq__(self, other) -> bool:
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))


def strings_of(columns: dict[str, np.ndarray], name: str) -> Strings:
    """The strings of the column `name`."""
    return Strings(columns[name], columns[f"{name}_ends"])


class ColumnStore:
    """Named columns with metadata."""

    def __init__(self, folder: Path | None = None):
        """folder: an empty one for the columns' files; None in memory"""
        self.folder = folder
        self.metadata: dict = {}
        """JSON values"""
        self._columns: dict[str, Column] = {}

    def add(self, name: str, dtype: str, width: int = 0) -> Column:
        """A new column."""
        self._columns[name] = Column(dtype, width, self.folder / name if self.folder else None)
        return self._columns[name]

    def add_strings(self, name: str) -> StringColumn:
        """A new column of strings."""
        return StringColumn(self.add(name, "uint8"), self.add(f"{name}_ends", "int64"))

    def sizes(self) -> dict[str, int]:
        """Entries in each column."""
        return {name: len(column) for name, column in self._columns.items()}

    def truncate(self, sizes: dict[str, int]) -> None:
        """Drop all that was added after the columns had these sizes."""
        for name, size in sizes.items():
            self._columns[name].truncate(size)

    def num_bytes(self) -> int:
        return sum(column.num_bytes for column in self._columns.values())

    def finalize(self, key: str | None = None) -> dict[str, np.ndarray]:
        """The arrays by name, read only; with a key also the header, without which the folder cannot be opened."""
        arrays = {name: column.finalize() for name, column in self._columns.items()}
        if key is not None:
            assert self.folder is not None
            columns = {
                name: {"dtype": c.dtype, "width": c.width, "size": len(c), "sha256": file_digest(self.folder / name)}
                for name, c in self._columns.items()
            }
            header = {"format": _FORMAT, "key": key, "metadata": self.metadata, "columns": columns}
            (self.folder / _HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
        return arrays

    def close(self) -> None:
        for column in self._columns.values():
            column.close()


class DamagedStore(ValueError):
    """A folder whose content is not what its name promises; the text is the reason."""


def open_column_store(folder: Path, key: str) -> tuple[dict[str, np.ndarray], dict]:
    """The columns and metadata of a finished folder, every byte compared with its digest.

    Raises: DamagedStore; FileNotFoundError if there is no folder
    """
    try:
        header = json.loads((folder / _HEADER).read_bytes())
        if (header["format"], header["key"]) != (_FORMAT, key):
            raise DamagedStore("it holds something else")
        arrays = {}
        for name, column in header["columns"].items():
            dtype, width, size = column["dtype"], column["width"], column["size"]
            path = folder / name
            if dtype not in _DTYPES or path.parent != folder or path.is_symlink():
                raise DamagedStore(f"{name!r} is no column")
            if path.stat().st_size != size * _entry_bytes(dtype, width):
                raise DamagedStore(f"{name} has another size")
            if file_digest(path) != column["sha256"]:
                raise DamagedStore(f"{name} has another digest")
            arrays[name] = _memory_map(path, dtype, width, size)
        return arrays, header["metadata"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedStore):
            raise
        raise DamagedStore(f"its header cannot be read ({error})") from None
    except OSError as error:
        if not folder.exists():
            raise
        raise DamagedStore(f"{error.filename} cannot be read ({error.strerror})") from None

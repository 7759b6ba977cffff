"""Columns of numbers that grow: in memory, or in the files of a folder that is checked before it is believed.

A folder is written under another name and given its own at the end, with a header: the key of what it holds, and the
kind, size and digest of every file. Whoever opens it reads every byte once and compares. Nothing in it is code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sar_kd.runtime.files import file_digest

_HEADER = "header.json"

_FORMAT = 1

_KINDS = ("int32", "int64", "bool", "uint8")


class Column:
    """An array of rows of one kind that grows at its end."""

    def __init__(self, kind: str, width: int, path: Path | None):
        """kind: of its numbers; width: of a row, 0 for single numbers; path: where it is kept, None in memory"""
        assert kind in _KINDS
        self.kind, self.width, self.path = kind, width, path
        self._parts: list[np.ndarray] = []
        self._size = 0
        self._file = open(path, "wb") if path else None

    def __len__(self) -> int:
        return self._size

    def append(self, values) -> None:
        """Add rows."""
        values = np.ascontiguousarray(values, dtype=self.kind)
        self._size += len(values)
        if self._file is None:
            self._parts.append(values)
        else:
            self._file.write(values.data if values.size else b"")

    def truncate(self, size: int) -> None:
        """Drop the rows from `size` on."""
        if self._file is None:
            self._parts = [np.concatenate(self._parts)[:size]] if self._parts else []
        else:
            self._file.seek(size * max(1, self.width) * np.dtype(self.kind).itemsize)
            self._file.truncate()
        self._size = size

    def finish(self) -> np.ndarray:
        """The array, to be read only; nothing can be added any more."""
        if self._file is None:
            none = np.zeros((0, self.width) if self.width else 0, dtype=self.kind)
            return np.concatenate([none, *self._parts])
        self._file.close()
        assert self.path is not None
        return _mapped(self.path, self.kind, self.width, self._size)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()


def _mapped(path: Path, kind: str, width: int, size: int) -> np.ndarray:
    shape = (size, width) if width else (size,)
    # numpy cannot map a file without content.
    return np.asarray(np.memmap(path, kind, "r", shape=shape)) if size else np.zeros(shape, kind)


class Strings(Sequence):
    """Many short texts as bytes one behind the other."""

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        """content: uint8 [N]; ends: int64 [K], where each text ends in it"""
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
    """The texts in a pair of columns."""
    return Strings(columns[name], columns[_ends_of(name)])


def _ends_of(name: str) -> str:
    return f"{name}_ends"


class ColumnStore:
    """Named columns, and facts that go with them."""

    def __init__(self, folder: Path | None = None):
        """folder: where the columns are kept, an empty one; None in memory"""
        self.folder = folder
        self.facts: dict = {}
        self._columns: dict[str, Column] = {}

    def add(self, name: str, kind: str, width: int = 0) -> None:
        """A new column."""
        self._columns[name] = Column(kind, width, self.folder / name if self.folder else None)

    def append(self, name: str, values) -> None:
        """Add rows to a column."""
        self._columns[name].append(values)

    def add_strings(self, *names: str) -> None:
        """New pairs of columns for texts."""
        for name in names:
            self.add(name, "uint8")
            self.add(_ends_of(name), "int64")

    def append_strings(self, name: str, texts: Sequence[str]) -> None:
        """Add texts to a pair of columns."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        content, ends = self._columns[name], self._columns[_ends_of(name)]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        ends.append(len(content) + np.cumsum(lengths))
        content.append(np.frombuffer(b"".join(encoded), dtype=np.uint8))

    def sizes(self) -> dict[str, int]:
        """Rows in each column."""
        return {name: len(column) for name, column in self._columns.items()}

    def truncate(self, sizes: dict[str, int]) -> None:
        """Drop what came after the columns had these sizes."""
        for name, size in sizes.items():
            self._columns[name].truncate(size)

    def num_bytes(self) -> int:
        """Size of all columns so far."""
        return sum(len(c) * max(1, c.width) * np.dtype(c.kind).itemsize for c in self._columns.values())

    def finish(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: column.finish() for name, column in self._columns.items()}

    def close(self) -> None:
        """Let go of the files."""
        for column in self._columns.values():
            column.close()

    def seal(self, key: str) -> None:
        """Write the header, once all columns are finished."""
        assert self.folder is not None
        kinds = {n: {"kind": c.kind, "width": c.width, "size": len(c)} for n, c in self._columns.items()}
        columns = {name: {**kind, "sha256": file_digest(self.folder / name)} for name, kind in kinds.items()}
        header = {"format": _FORMAT, "key": key, "facts": self.facts, "columns": columns}
        (self.folder / _HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")


class DamagedStore(ValueError):
    """A folder that does not hold what its name says; the text is the reason."""


def open_column_store(folder: Path, key: str) -> tuple[dict[str, np.ndarray], dict]:
    """The columns and facts of a sealed folder, every byte of it compared with its digest.

    Raises: DamagedShelf, FileNotFoundError if there is none
    """
    try:
        header = json.loads((folder / _HEADER).read_bytes())
        if (header["format"], header["key"]) != (_FORMAT, key):
            raise DamagedStore("it holds something else")
        arrays = {}
        for name, column in header["columns"].items():
            kind, width, size = column["kind"], column["width"], column["size"]
            path = folder / name
            if kind not in _KINDS or path.parent != folder or path.is_symlink():
                raise DamagedStore(f"{name!r} is no column")
            if path.stat().st_size != size * max(1, width) * np.dtype(kind).itemsize:
                raise DamagedStore(f"{name} has another size")
            if file_digest(path) != column["sha256"]:
                raise DamagedStore(f"{name} has another digest")
            arrays[name] = _mapped(path, kind, width, size)
        return arrays, header["facts"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedStore):
            raise
        raise DamagedStore(f"its header cannot be read ({error})") from None
    except OSError as error:
        if not folder.exists():
            raise
        raise DamagedStore(f"{error.filename} cannot be read ({error.strerror})") from None

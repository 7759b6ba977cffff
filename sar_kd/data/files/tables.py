"""The examples of .csv, .json and .parquet files, as dictionaries by column."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sar_kd.errors import UsageError

KINDS = (".csv", ".json", ".parquet")

_MAX_JSON = 2**30
"""Bytes of a .json file, which is read as a whole"""

_MAX_CELL = 2**28
"""Characters"""

_BATCH = 512
"""Rows of a .parquet file that are in memory at once"""

Examples = Iterator[tuple[int, Any]]
"""Number, from 1, and value of each example"""


def read_examples(option: str, path: Path, columns: Sequence[str]) -> Examples:
    """The examples of a file of one of `KINDS`; `option` is the one that named it.

    columns: those that can be used, of which .parquet files may have others that are large
    Raises: UsageError if it is damaged, or another kind of file than its name says
    """
    where = f"--{option} {path}"
    if path.suffix == ".csv":
        return _read_csv(where, path)
    return _read_json(where, path) if path.suffix == ".json" else _read_parquet(where, path, columns)


def _read_csv(where: str, path: Path) -> Examples:
    """A table with a header; commas or, where the header has no comma, semicolons or tabs between the columns."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        start = file.readline()
        delimiter = next((mark for mark in ",;\t" if mark in start), ",")
        file.seek(0)
        usual = csv.field_size_limit(_MAX_CELL)
        rows, number = csv.reader(file, delimiter=delimiter, strict=True), 0
        try:
            header = next(rows, [])
            for number, row in enumerate((row for row in rows if row), 1):
                if len(row) != len(header):
                    sizes = f"{len(row)} columns, its header {len(header)} ({', '.join(header)})"
                    raise UsageError(f"{where}: row {number} has {sizes}; put quotes around a text with commas")
                yield number, dict(zip(header, (cell.replace("\r\n", "\n") for cell in row), strict=True))
        except csv.Error as error:
            raise UsageError(f"{where}: is no table in CSV (behind row {number}: {error})") from None
        except UnicodeDecodeError:
            raise UsageError(f"{where}: is not UTF-8 text (behind row {number}); convert it first") from None
        finally:
            csv.field_size_limit(usual)


def _read_json(where: str, path: Path) -> Examples:
    """An array of examples, an object with one under "data", or JSON lines."""
    if path.stat().st_size > _MAX_JSON:
        raise UsageError(f"{where}: exceeds 1 GB, and .json is read as a whole; write one example a line (.jsonl)")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: is not UTF-8 text (byte {error.start}); convert it first") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not getattr(error, "msg", "").startswith("Extra data"):
            _raise_no_json(f"{where}:", error)
        content = [_parse_line(where, *line) for line in enumerate(text.split("\n"), 1) if line[1].strip()]
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    yield from enumerate(content if isinstance(content, list) else [content], 1)


def _parse_line(where: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        _raise_no_json(f"{where}: line {number}", error)


def _raise_no_json(where: str, error: Exception) -> NoReturn:
    raise UsageError(f"{where} is not JSON ({json_fault(error)})") from None


def json_fault(error: Exception) -> str:
    """What is wrong with a text that is not JSON, and where."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')}, line {error.lineno} column {error.colno}"
    return str(error)


def _read_parquet(where: str, path: Path, columns: Sequence[str]) -> Examples:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(f"{where}: needs pyarrow to be read; `pip install pyarrow`") from None
    try:
        with parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            chosen = [name for name in found if name in columns] or found
            batches = (batch.to_pylist() for batch in file.iter_batches(_BATCH, columns=chosen))
            yield from enumerate(itertools.chain.from_iterable(batches), 1)
    except (ArrowException, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{where}: is no readable .parquet file ({reason})") from None

"""Texts that were given in Python: files by name, or examples in memory, which are written to files of the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sar_kd.errors import UsageError
from sar_kd.runtime.distributed import current_process_group
from sar_kd.runtime.files import atomic_write
from sar_kd.runtime.run_folder import CONFIG, GIVEN_TEXTS

TextsLike = str | Path | Iterable[str | Path | Mapping[str, Any]]


class GivenTexts(contextlib.AbstractContextManager):
    """Writes the examples in memory into a folder when it is entered; takes them away again if no run began there."""

    def __init__(self, folder: Path, text_field: str = "text", is_resumed: bool = False):
        self._folder, self._text_field, self._is_resumed = folder / GIVEN_TEXTS, text_field, is_resumed
        self._contents: dict[Path, str] = {}

    def files_of(self, option: str, texts: Any) -> list[str] | None:
        """The files that hold these examples; None if a resumed run has them already.

        Raises: UsageError if they are no texts, or not those of the run to resume
        """
        if isinstance(texts, (str, Path)):
            return [str(texts)]
        if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
            raise UsageError(f"--{option}: is a {type(texts).__name__}; give a list of texts or of dicts, or a path")
        examples = list(texts)
        if examples and all(isinstance(example, Path) for example in examples):
            return list(map(str, examples))
        if examples and all(isinstance(example, str) and os.path.isfile(example) for example in examples):
            raise UsageError(f"--{option}: its texts are names of files; give each file as a Path")
        path = self._folder / f"{option.removesuffix('_file')}.jsonl"
        content = self._lines(option, examples)
        if self._is_resumed and path.is_file():
            if path.read_text(encoding="utf-8") != content:
                raise UsageError(f"--{option}: these are not the texts of the run to resume; leave them out")
            return None
        self._contents[path] = content
        return [str(path)]

    def _lines(self, option: str, examples: list) -> str:
        wrong = [example for example in examples if not isinstance(example, (str, Mapping))]
        if wrong or not examples:
            found = type(wrong[0]).__name__ if wrong else "nothing"
            raise UsageError(f"--{option}: holds {found}; give texts, dicts as in a .jsonl file, or paths")
        objects = [{self._text_field: each} if isinstance(each, str) else dict(each) for each in examples]
        try:
            return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"--{option}: holds what JSON cannot ({error}); give text, numbers, lists") from None

    def __enter__(self) -> GivenTexts:
        if current_process_group().is_rank_zero:
            for path, content in self._contents.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    atomic_write(path, content)
                except UnicodeEncodeError as error:
                    raise UsageError(f"--train_file: holds text that is not Unicode ({error.reason})") from None
        return self

    def __exit__(self, *exception) -> None:
        if self._contents and not (self._folder.parent / CONFIG).exists():
            shutil.rmtree(self._folder, ignore_errors=True)

"""The embedded models and their text, the defaults of a run without a model and text of its own.

The text is technical English that every CPython contains: the language reference (`pydoc_data.topics`) and the
docstrings of the standard library, read from the installed interpreter with `ast`; none of it is stored here. A
document is one topic, one module's docstring, or one top-level class or function with all docstrings inside it. Its
split follows from a hash of its name and is the same under every Python version (shares of the documents):

    teacher 60 %      for training the embedded models, never used by a run
    transfer 30 %     for the training of a run
    validation 5 %    for its perplexity
    test 5 %          for benchmarks only

Teacher and transfer text are disjoint because a teacher that has memorised the transfer text has nothing to teach.
The models beside this file are trained by `python -m sar_kd embedded` (`commands/build_embedded.py`).
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

TEACHER_DIR = Path(__file__).parent / "teacher"
STUDENT_DIR = Path(__file__).parent / "student"

SPLITS = {"teacher": 0.60, "transfer": 0.90, "validation": 0.95, "test": 1.0}
"""Upper end of each split on [0, 1), in order."""

# Not documentation of the library: tests, vendored and generated trees, and modules that only some builds have.
_SKIPPED = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip",
    "pydoc_data", "encodings", "lib-dynload", "distutils",
}  # fmt: skip
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def split_of(name: str) -> str:
    """The split of the document `name`, from the SHA-256 of the name."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next(split for split, end in SPLITS.items() if position < end)


def read_text(*splits: str) -> list[dict[str, str]]:
    """The documents of each of the given splits, by name, in a fixed order.

    Takes about 3 seconds: the sources of the standard library are parsed, never imported.
    """
    found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for name, text in _documents():
        found[split_of(name)][name] = text
    return [found[split] for split in splits]


def read_modules() -> Iterator[tuple[str, bytes]]:
    """Path below the standard library and source of each module of the text, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if not any(part in _SKIPPED or (part[0] == "_" and part != "__init__.py") for part in module.parts):
            yield module.as_posix(), path.read_bytes()


def _documents() -> Iterator[tuple[str, str]]:
    yield from _topics()
    seen: set[str] = set()  # methods often repeat the docstring of the class they override
    for module, source in read_modules():
        yield from _docstrings(module, ast.parse(source), seen)


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a stripped interpreter: the docstrings remain
        return
    yield from ((f"topic:{name}", text) for name, text in sorted(topics.items()))


def _docstrings(module: str, tree: ast.Module, seen: set[str]) -> Iterator[tuple[str, str]]:
    documents: list[tuple[str, Iterable[ast.AST]]] = [(module, [tree])]
    documents += [(f"{module}:{node.name}", ast.walk(node)) for node in tree.body if isinstance(node, _DEFINITIONS)]
    for name, nodes in documents:
        parts = []
        for node in nodes:
            text = ast.get_docstring(node) if isinstance(node, (ast.Module, *_DEFINITIONS)) else None
            if text and text not in seen:
                seen.add(text)
                parts.append(text)
        if parts:
            yield name, "\n\n".join(parts)

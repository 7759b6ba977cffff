"""The embedded models and their text, the defaults of a run without a model and text of its own.

The text is technical English that every CPython contains: the language reference (`pydoc_data.topics`) and the
docstrings of the standard library, read from the installed interpreter with `ast`; none of it is stored here. A
document is one topic, one module's docstring, or one top-level class or function with all docstrings inside it.
Documents that share `SHARED_CHARACTERS` characters in a row form a group, and a group is in one split as a whole. The
split follows from a hash of the group's first name; one group of a size of its own, most of the language reference,
is teacher text. Shares of the text under Python 3.11:

    teacher 56 %      for training the embedded models, never used by a run
    transfer 34 %     for the training of a run
    validation 5 %    for its perplexity
    test 5 %          for benchmarks only

So no text is in two splits: a teacher that has memorised the transfer text has nothing to teach, and validation text
that was trained on measures memory. Where another Python version has other text, a few documents are in other splits
than the ones that the embedded models were trained with.
The models beside this file are trained by `python -m sar_kd embedded` (`commands/build_embedded.py`).
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

TEACHER_DIR = Path(__file__).parent / "teacher"
STUDENT_DIR = Path(__file__).parent / "student"

SPLITS = {"teacher": 0.50, "transfer": 0.90, "validation": 0.95, "test": 1.0}
"""Upper end of each split on [0, 1), in order."""

SHARED_CHARACTERS = 64
"""Two documents with as many characters in a row in common are in the same split."""

_LARGE_GROUP = 100_000
"""Characters above which a group is teacher text: a twentieth of the text has no room for it."""

# Not documentation of the library: tests, vendored and generated trees, and modules that only some builds have.
_SKIPPED = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip",
    "pydoc_data", "encodings", "lib-dynload", "distutils",
}  # fmt: skip
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def split_of(name: str) -> str:
    """The split of a group of documents, from the SHA-256 of its first name."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next(split for split, end in SPLITS.items() if position < end)


def read_text(*splits: str) -> list[dict[str, str]]:
    """The documents of each of the given splits, by name, in a fixed order.

    Takes about 2 seconds: the sources of the standard library are parsed, never imported.
    """
    texts = dict(_documents())
    names, groups = list(texts), first_of_groups(list(texts.values()))
    sizes: Counter[int] = Counter()
    for text, group in zip(texts.values(), groups, strict=True):
        sizes[group] += len(text)
    found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for (name, text), group in zip(texts.items(), groups, strict=True):
        split = "teacher" if sizes[group] > _LARGE_GROUP else split_of(names[group])
        found[split][name] = text
    return [found[split] for split in splits]


def first_of_groups(texts: list[str]) -> list[int]:
    """For each text the index of the first text of its group: those linked by `SHARED_CHARACTERS` in a row."""
    first = list(range(len(texts)))

    def find(index: int) -> int:
        while first[index] != index:
            index = first[index]
        return index

    for one, other in _sharing(texts):
        low, high = sorted((find(one), find(other)))
        first[high] = low
    return [find(index) for index in range(len(texts))]


def _sharing(texts: list[str]) -> set[tuple[int, int]]:
    """Pairs of texts that share a window of characters: equal 64-bit hashes of all windows, sorted side by side."""
    factors = np.random.default_rng(0).integers(2**63, size=SHARED_CHARACTERS, dtype=np.uint64) * 2 + 1
    hashes, owners = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
    for index, text in enumerate(texts):
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
        if len(codes) >= SHARED_CHARACTERS:
            hashes.append(np.convolve(codes, factors, mode="valid"))  # modulo 2^64
            owners.append(np.full(len(hashes[-1]), index))
    every, owner = np.concatenate(hashes), np.concatenate(owners)
    order = np.argsort(every, kind="stable")
    every, owner = every[order], owner[order]
    equal = (every[1:] == every[:-1]) & (owner[1:] != owner[:-1])
    return set(zip(owner[:-1][equal].tolist(), owner[1:][equal].tolist(), strict=True))


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


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A node and the statements inside it, in the order of `ast.walk`, which visits all expressions too."""
    queue = deque([node])
    while queue:
        node = queue.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            queue.extend(getattr(node, name, ()))


def _docstrings(module: str, tree: ast.Module, seen: set[str]) -> Iterator[tuple[str, str]]:
    documents: list[tuple[str, Iterable[ast.AST]]] = [(module, [tree])]
    documents += [(f"{module}:{node.name}", _statements(node)) for node in tree.body if isinstance(node, _DEFINITIONS)]
    for name, nodes in documents:
        parts = []
        for node in nodes:
            text = ast.get_docstring(node) if isinstance(node, (ast.Module, *_DEFINITIONS)) else None
            if text and text not in seen:
                seen.add(text)
                parts.append(text)
        if parts:
            yield name, "\n\n".join(parts)

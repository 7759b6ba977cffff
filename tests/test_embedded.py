"""The embedded text: no part of it stands in two splits."""

import ast
from itertools import combinations
from pathlib import Path

import pytest

from sar_kd import embedded
from sar_kd.embedded import SHARED_CHARACTERS, SPLITS, first_of_groups


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, str]]:
    return dict(zip(SPLITS, embedded.read_text(*SPLITS), strict=True))


def _windows(documents: dict[str, str]) -> set[str]:
    """Every run of as many characters in the documents."""
    return {
        text[start : start + SHARED_CHARACTERS]
        for text in documents.values()
        for start in range(len(text) - SHARED_CHARACTERS + 1)
    }


@pytest.mark.slow
def test_no_run_of_characters_stands_in_two_splits(texts):
    windows = {split: _windows(documents) for split, documents in texts.items()}
    for one, other in combinations(SPLITS, 2):
        assert not windows[one] & windows[other], (one, other)


def test_every_split_has_its_share_of_the_text(texts):
    sizes = {split: sum(map(len, documents.values())) for split, documents in texts.items()}
    shares = {split: size / sum(sizes.values()) for split, size in sizes.items()}
    assert 0.5 < shares["teacher"] < 0.65
    assert 0.28 < shares["transfer"] < 0.4
    assert min(shares["validation"], shares["test"]) > 0.03


def test_every_document_is_in_one_split(texts):
    names = [name for documents in texts.values() for name in documents]
    assert len(names) == len(set(names)) > 2000


def test_groups_are_linked_through_other_documents():
    a, b = ("".join(chr(ord(first) + i % 20) + str(i) for i in range(40)) for first in "AZ")
    assert len(a) > SHARED_CHARACTERS
    linked = [f"one {a}", "short", f"{a} two {b}", f"three {b}", f"only {a[: SHARED_CHARACTERS - 6]} here"]
    assert first_of_groups(linked) == [0, 1, 0, 0, 4]
    assert first_of_groups([]) == []


_NESTED = """
def a():
    try:
        def b(): "b"
    except OSError:
        class c: "c"
    else:
        for x in y:
            async def d(): "d"
        else:
            def e(): "e"
    finally:
        with f:
            def g(): "g"
    while x:
        def h(): "h"
    else:
        if x:
            def i(): "i"
        elif y:
            def j(): "j"
    match x:
        case 1:
            def k(): "k"
    class l:
        def m(self, n=lambda: 0): "m"
"""


@pytest.mark.parametrize("source", [_NESTED, Path(ast.__file__).read_text(encoding="utf-8")], ids=["nested", "ast.py"])
def test_definitions_are_found_in_the_order_of_a_walk_over_every_node(source):
    tree = ast.parse(source)
    found, expected = (
        [node.name for node in walk(tree) if isinstance(node, embedded._DEFINITIONS)]
        for walk in (embedded._statements, ast.walk)
    )
    assert found == expected
    assert len(found) > 10

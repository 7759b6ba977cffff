"""The embedded text: no part of it stands in two splits."""

from itertools import combinations

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

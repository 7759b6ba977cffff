"""Blocks are cut window by window as they would be cut from the whole."""

import itertools

import numpy as np
import pytest

from sar_kd.data import blocks
from sar_kd.data.blocks import pack_streams
from sar_kd.tokenization.token_stream import Block, Blocks, TokenCount


def _cut_by_definition(student, teacher, max_student, max_teacher) -> list[tuple]:
    """Each block ends at the last byte within both limits where a token ends on both sides. Without such a byte, the
    text up to the next one is in no block."""
    found, at, reached, common = [], (0, 0), 0, set(student) & set(teacher)
    while any(byte > reached for byte in common):
        latest = min(student[at[0] : at[0] + max_student][-1], teacher[at[1] : at[1] + max_teacher][-1])
        within = [byte for byte in common if reached < byte <= latest]
        reached = max(within) if within else min(byte for byte in common if byte > reached)
        ends = student.index(reached) + 1, teacher.index(reached) + 1
        found += [(at[0], ends[0], at[1], ends[1])] if within else []
        at = ends
    return found


def _two_streams(seed: int, every: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Ends of random tokens; every so many bytes both sides end one."""
    draw = np.random.default_rng(seed)
    size = int(draw.integers(60, 400))
    cuts = [np.unique(np.append(draw.integers(1, size, size // 2), [size, *range(7, size, every)])) for _ in range(2)]
    # Tokens without bytes end where the one before them does.
    return tuple(np.sort(np.append(ends, draw.choice(ends, 5))) for ends in cuts)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [1, 20, 2**18])
@pytest.mark.parametrize("limits", [(20, 20), (20, 60), (60, 25), (4, 4), (3, 60), (60, 2), (1, 1)])
def test_windows_do_not_show(seed, window, limits, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_TOKENS", window)
    student, teacher = _two_streams(seed, every=7 if min(limits) > 7 else 30)
    wanted = _cut_by_definition(student.tolist(), teacher.tolist(), *limits)
    assert list(pack_streams(student, teacher, *limits)) == wanted
    if limits == (4, 4):  # some passages are in no block
        assert 0 < sum(block[1] - block[0] for block in wanted) < len(student)


@pytest.mark.parametrize("window", [1, 10, 2**18])
@pytest.mark.parametrize("size", [1, 9, 10, 11, 95])
def test_tokens_that_count_one_each_fill_blocks(window, size, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_TOKENS", window)
    ends = TokenCount(size)
    found = list(pack_streams(ends, ends, 10, 10))
    assert found == [(i, min(i + 10, size)) * 2 for i in range(0, size, 10)]
    assert found == list(pack_streams(np.arange(1, size + 1), np.arange(1, size + 1), 10, 10))


def test_only_so_many_tokens_are_cut_as_are_asked_for():
    ends = TokenCount(100)
    assert list(pack_streams(ends, ends, 30, 30, (70, 70))) == [(0, 30, 0, 30), (30, 60, 30, 60), (60, 70, 60, 70)]


@pytest.mark.parametrize("window", [1, 8, 9, 2**18])
def test_a_passage_without_a_common_end_is_in_no_block(window, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_TOKENS", window)
    evens, odds = np.arange(1, 60) * 2, np.arange(1, 60) * 2 + 1
    student, teacher = evens, np.concatenate([evens[:9], odds[9:30], evens[30:]])
    assert list(pack_streams(student, teacher, 8, 8)) == [
        (0, 8, 0, 8), (8, 9, 8, 9), (31, 39, 31, 39), (39, 47, 39, 47), (47, 55, 47, 55), (55, 59, 55, 59)
    ]  # fmt: skip
    cuts = [0, 9, 31, 53, 59]
    assert list(pack_streams(student, teacher, 22, 22)) == [(a, b, a, b) for a, b in itertools.pairwise(cuts)]
    nothing_in_common = teacher[9:30] - teacher[8], student[9:30] - student[8]
    assert list(pack_streams(*nothing_in_common, 8, 8)) == []


def test_many_blocks_are_a_sequence_of_blocks():
    listed = [Block(i, i + 2, 3 * i, 3 * i + 6) for i in range(0, 20, 2)]
    found = Blocks.of(iter(listed))
    assert found == listed
    assert (len(found), found[3], found[-1], found[2:4]) == (10, listed[3], listed[-1], listed[2:4])
    assert list(found) == listed
    assert {type(value) for block in found for value in block} == {int}
    assert found != listed[:-1]
    assert not len(Blocks.of([]))


def test_counting_is_an_array_that_is_not_there():
    ends, array = TokenCount(9), np.arange(1, 10)
    assert (len(ends), ends[0], ends[-1]) == (9, 1, 9)
    for part in (slice(None), slice(2, 5), slice(7, 20), slice(4, 4), slice(None, None, 3)):
        assert np.array_equal(ends[part], array[part])
        assert ends[part].dtype == array.dtype
    assert np.array_equal(np.asarray(ends), array)

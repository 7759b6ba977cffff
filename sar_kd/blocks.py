"""The blocks that two streams of tokens are cut into: index ranges at whose ends a token ends on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, overload

import numpy as np

from sar_kd.alignment import ends_on_both
from sar_kd.config import UsageError
from sar_kd.token_stream import Ends

_WINDOW = 2**18


class Block(NamedTuple):
    """One stretch of text as index ranges into both streams."""

    student_start: int
    student_end: int
    teacher_start: int
    teacher_end: int


class Blocks(Sequence[Block]):
    """Many blocks, in 32 bytes each."""

    def __init__(self, ranges: np.ndarray):
        """ranges: int64 [N, 4], the fields of each `Block`"""
        self.ranges = ranges

    @staticmethod
    def of(blocks: Iterable[Block]) -> Blocks:
        return Blocks(np.fromiter(chain.from_iterable(blocks), dtype=np.int64).reshape(-1, 4))

    def __len__(self) -> int:
        return len(self.ranges)

    @overload
    def __getitem__(self, key: int) -> Block: ...

    @overload
    def __getitem__(self, key: slice) -> list[Block]: ...

    def __getitem__(self, key):
        found = self.ranges[key].tolist()
        return [Block(*block) for block in found] if isinstance(key, slice) else Block(*found)

    def __iter__(self) -> Iterator[Block]:
        return (block for first in range(0, len(self), _WINDOW) for block in self[first : first + _WINDOW])

    def __eq__(self, other) -> bool:
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))


def cut_blocks(
    student_ends: Ends,
    teacher_ends: Ends,
    max_student: int,
    max_teacher: int,
    sizes: tuple[int, int] | None = None,
) -> Iterator[Block]:
    """Cut both streams, as late as the limits allow, where a token ends on both sides. O((S + T) log).

    student_ends, teacher_ends: int64 [S], [T], arrays in memory or of a file, of which a window is looked at at a time
    sizes: so many tokens of each are cut; None for all
    Raises: UsageError if a stretch within the limits has no such place
    """
    is_same = student_ends is teacher_ends
    num_student, num_teacher = sizes or (len(student_ends), len(teacher_ends))
    student_start = teacher_start = reached = 0
    while student_start < num_student:
        first, first_teacher = student_start, teacher_start
        student = student_ends[first : min(num_student, first + max(_WINDOW, max_student))]
        teacher = student
        if not is_same:
            teacher = teacher_ends[first_teacher : min(num_teacher, first_teacher + max(_WINDOW, max_teacher))]
        common = student if is_same or not len(teacher) else student[ends_on_both(student, teacher)]
        # So far a block can begin of which even the longest form lies within the window.
        last = num_student - 1 if first + len(student) == num_student else first + len(student) - max_student
        last_teacher = first_teacher + len(teacher)
        last_teacher -= 0 if last_teacher == num_teacher else max_teacher
        while student_start <= last and teacher_start <= last_teacher:
            latest = student[min(student_start - first + max_student, len(student)) - 1]
            latest_teacher = teacher[min(teacher_start - first_teacher + max_teacher, len(teacher)) - 1]
            at = np.searchsorted(common, min(latest, latest_teacher), side="right") - 1
            if at < 0 or common[at] <= reached:
                raise UsageError(
                    f"--block_size {max_student + 1}: a stretch of text from byte {reached} on holds no place within a "
                    "block at which both tokenizers end a token; raise it"
                )
            reached = common[at]
            # The first token that ends there: one without bytes behind it belongs to what follows.
            student_end = first + int(np.searchsorted(student, reached)) + 1
            teacher_end = first_teacher + int(np.searchsorted(teacher, reached)) + 1
            yield Block(student_start, student_end, teacher_start, teacher_end)
            student_start, teacher_start = student_end, teacher_end

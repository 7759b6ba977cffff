"""Blocks for a text of which the teacher has read windows before: none reaches over a window's end, where possible."""

from __future__ import annotations

import numpy as np

from sar_kd.blocks import Block, Blocks, cut_blocks
from sar_kd.config import UsageError
from sar_kd.streams import JoinedText
from sar_kd.token_stream import TokenStream

_SLACK = 8
"""Tokens by which the teacher's part of a window may exceed an even one: the student's decides."""


def cut_at(text: JoinedText, ends: np.ndarray, max_student: int, max_teacher: int) -> Blocks:
    """All blocks of a text: its windows; those that exceed a limit in parts of about one size; its conversations.

    Where the two sides have no common end at a window's end, the block ends at the last one before it.

    ends: int64 [W], where windows of plain documents end, in the teacher's tokens, the last one with the last document
    Raises: UsageError as `blocks.cut_blocks`
    """
    student_cuts, teacher_cuts = _common(text, ends)
    bounds = np.stack([student_cuts[:-1], student_cuts[1:], teacher_cuts[:-1], teacher_cuts[1:]], axis=1)
    sizes = bounds[:, 1] - bounds[:, 0], bounds[:, 3] - bounds[:, 2]
    too_long = (sizes[0] > max_student) | (sizes[1] > max_teacher)
    pieces, done = [], 0
    for number in np.flatnonzero(too_long).tolist():
        parts = _parts(text, Block(*bounds[number].tolist()), max_student, max_teacher)
        pieces += [bounds[done:number], Blocks.of(parts).ranges]
        done = number + 1
    return Blocks(np.concatenate([*pieces, bounds[done:], text.conversations.ranges]))


def _common(text: JoinedText, ends: np.ndarray) -> tuple[np.ndarray, ...]:
    """Both sides' tokens up to each of these ends, or up to the last common end before it; from 0, ascending."""
    if text.student is text.teacher:
        cuts = np.append(0, ends)
        return cuts, cuts
    student_ends, teacher_ends = text.student.ends, text.teacher.ends
    places = teacher_ends[ends - 1]
    student = np.searchsorted(student_ends, places)
    last = len(student_ends) - 1
    for number in np.flatnonzero(student_ends[np.minimum(student, last)] != places).tolist():
        at, place = int(student[number]) - 1, -1
        while at >= 0 and place < 0:
            found = int(np.searchsorted(teacher_ends, student_ends[at]))
            place, at = (int(teacher_ends[found]), at) if teacher_ends[found] == student_ends[at] else (-1, at - 1)
        places[number] = max(place, 0)
    places = np.unique(places)
    places = places[places > 0]
    # The first token that ends there: one without bytes behind it belongs to what follows.
    return tuple(np.append(0, np.searchsorted(side, places) + 1) for side in (student_ends, teacher_ends))


def _parts(text: JoinedText, block: Block, max_student: int, max_teacher: int) -> list[Block]:
    """A stretch of text in parts within the limits, of about one size."""
    student = _ends_within(text.student, block.student_start, block.student_end)
    is_same = text.student is text.teacher
    teacher = student if is_same else _ends_within(text.teacher, block.teacher_start, block.teacher_end)
    count = max(-(-len(student) // max_student), -(-len(teacher) // max_teacher))
    even = min(max_student, -(-len(student) // count)), min(max_teacher, -(-len(teacher) // count) + _SLACK)
    try:
        found = list(cut_blocks(student, teacher, *even))
    except UsageError:
        found = list(cut_blocks(student, teacher, max_student, max_teacher))
    starts = block.student_start, block.student_start, block.teacher_start, block.teacher_start
    return [Block(*(start + at for start, at in zip(starts, part, strict=True))) for part in found]


def _ends_within(stream: TokenStream, start: int, end: int) -> np.ndarray:
    """Where some tokens end, counted from where the first of them begins."""
    return np.asarray(stream.ends[start:end]) - (stream.ends[start - 1] if start else 0)

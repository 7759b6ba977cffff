"""The blocks that two streams of tokens are cut into: index ranges at whose ends a token ends on both sides.

Blocks for a text of which the teacher has read windows before: none reaches over a window's end, where possible.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sar_kd.alignment.byte_alignment import ends_on_both
from sar_kd.errors import UsageError
from sar_kd.tokenization.token_stream import CHUNK_TOKENS, Block, Blocks, Ends, TokenizedText, TokenStream


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
        student = student_ends[first : min(num_student, first + max(CHUNK_TOKENS, max_student))]
        teacher = student
        if not is_same:
            teacher = teacher_ends[first_teacher : min(num_teacher, first_teacher + max(CHUNK_TOKENS, max_teacher))]
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


_SLACK = 8
"""Tokens by which the teacher's part of a window may exceed an even one: the student's decides."""


def cut_at(text: TokenizedText, ends: np.ndarray, max_student: int, max_teacher: int) -> Blocks:
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


def _common(text: TokenizedText, ends: np.ndarray) -> tuple[np.ndarray, ...]:
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


def _parts(text: TokenizedText, block: Block, max_student: int, max_teacher: int) -> list[Block]:
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


def cut(text: TokenizedText, max_student: int, max_teacher: int) -> Blocks:
    """All blocks of a text: plain documents packed as by `cut_blocks`, then the conversations, one block each.

    Raises: UsageError as `cut_blocks`
    """
    talks = text.conversations
    sizes = talks[0][::2] if len(talks) else (len(text.student.ids), len(text.teacher.ids))
    plain = Blocks.of(cut_blocks(text.student.ends, text.teacher.ends, max_student, max_teacher, sizes))
    return Blocks(np.concatenate([plain.ranges, talks.ranges]))

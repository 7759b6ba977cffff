"""Token streams packed into blocks: index ranges at whose ends a token ends in both streams.

Where a teacher cache exists, blocks end where the teacher's blocks of that cache end, as far as possible.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sar_kd.alignment.byte_alignment import ends_on_both
from sar_kd.errors import UsageError
from sar_kd.tokenization.token_stream import CHUNK_TOKENS, Block, Blocks, Ends, TokenizedText, TokenStream

_SLACK = 8
"""Tokens by which a part of a teacher block may exceed an even share: the student's share decides."""


def pack(
    text: TokenizedText, max_student: int, max_teacher: int, teacher_block_ends: np.ndarray | None = None
) -> Blocks:
    """All blocks of a text: plain documents packed as full as the limits allow, then one block for each conversation.

    max_student, max_teacher: most tokens of a block, start token excluded
    teacher_block_ends: int64 [W], ascending: where the blocks of a teacher cache end, in the teacher's tokens, the last
        with the last plain document. Each becomes a block, or blocks of about equal size where it exceeds a limit; one
        whose end is inside a student token ends at the last common end before it
    Raises: UsageError if a passage that exceeds a block has no common end
    """
    conversations = text.conversations
    if teacher_block_ends is None:
        sizes = conversations[0][::2] if len(conversations) else (len(text.student.ids), len(text.teacher.ids))
        packed = Blocks.of(pack_streams(text.student.ends, text.teacher.ends, max_student, max_teacher, sizes)).ranges
    else:
        packed = _follow_teacher_blocks(text, teacher_block_ends, max_student, max_teacher)
    return Blocks(np.concatenate([packed, conversations.ranges]))


def skip_start_tokens(blocks: Blocks, text: TokenizedText) -> Blocks:
    """The blocks of plain documents without a document's start token at either end.

    A block begins with a start token of its own, and predicts nothing from one at its end.
    """
    ranges = blocks.ranges.copy()
    plain = ranges[: len(blocks) - len(text.conversations)]
    for side, stream in enumerate((text.student, text.teacher)):
        plain[:, 2 * side] += ~stream.is_target[plain[:, 2 * side]]
        plain[:, 2 * side + 1] -= ~stream.is_target[plain[:, 2 * side + 1] - 1]
    return Blocks(ranges)


def pack_streams(
    student_ends: Ends,
    teacher_ends: Ends,
    max_student: int,
    max_teacher: int,
    sizes: tuple[int, int] | None = None,
) -> Iterator[Block]:
    """Cut both streams where a token ends in both, as late as the limits allow. O((S + T) log).

    student_ends, teacher_ends: int64 [S], [T], in memory or memory-mapped; `CHUNK_TOKENS` of them are read at a time
    sizes: pack only so many tokens of each; None for all
    Raises: UsageError if a passage as long as the limits has no common end
    """
    is_same = student_ends is teacher_ends
    num_student, num_teacher = sizes or (len(student_ends), len(teacher_ends))
    student_start = teacher_start = packed = 0  # tokens of each, and the end that both have in common
    while student_start < num_student:
        first, first_teacher = student_start, teacher_start
        student = student_ends[first : min(num_student, first + max(CHUNK_TOKENS, max_student))]
        teacher = student
        if not is_same:
            teacher = teacher_ends[first_teacher : min(num_teacher, first_teacher + max(CHUNK_TOKENS, max_teacher))]
        common = student if is_same or not len(teacher) else student[ends_on_both(student, teacher)]
        # The last starts from which even the longest block lies within what was read.
        last = num_student - 1 if first + len(student) == num_student else first + len(student) - max_student
        last_teacher = first_teacher + len(teacher)
        last_teacher -= 0 if last_teacher == num_teacher else max_teacher
        while student_start <= last and teacher_start <= last_teacher:
            latest = student[min(student_start - first + max_student, len(student)) - 1]
            latest_teacher = teacher[min(teacher_start - first_teacher + max_teacher, len(teacher)) - 1]
            at = np.searchsorted(common, min(latest, latest_teacher), side="right") - 1
            if at < 0 or common[at] <= packed:
                raise UsageError(
                    f"--block_size {max_student + 1}: from byte {packed} of the text on, there is no place within a "
                    "block at which both tokenizers end a token; raise it"
                )
            packed = common[at]
            # The first token that ends there: those without bytes after it belong to the next block.
            student_end = first + int(np.searchsorted(student, packed)) + 1
            teacher_end = first_teacher + int(np.searchsorted(teacher, packed)) + 1
            yield Block(student_start, student_end, teacher_start, teacher_end)
            student_start, teacher_start = student_end, teacher_end


def _follow_teacher_blocks(text: TokenizedText, ends: np.ndarray, max_student: int, max_teacher: int) -> np.ndarray:
    """int64 [N, 4]: the blocks of plain documents along the teacher's, as `pack`."""
    student_cuts, teacher_cuts = _common_ends(text, ends)
    bounds = np.stack([student_cuts[:-1], student_cuts[1:], teacher_cuts[:-1], teacher_cuts[1:]], axis=1)
    sizes = bounds[:, 1] - bounds[:, 0], bounds[:, 3] - bounds[:, 2]
    too_long = (sizes[0] > max_student) | (sizes[1] > max_teacher)
    found, done = [], 0
    for number in np.flatnonzero(too_long).tolist():
        parts = _split_evenly(text, Block(*bounds[number].tolist()), max_student, max_teacher)
        found += [bounds[done:number], Blocks.of(parts).ranges]
        done = number + 1
    return np.concatenate([*found, bounds[done:]])


def _common_ends(text: TokenizedText, ends: np.ndarray) -> tuple[np.ndarray, ...]:
    """Both streams' tokens up to each of these ends, or up to the last common end before it; from 0, ascending."""
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
    # The first token that ends there: those without bytes after it belong to the next block.
    return tuple(np.append(0, np.searchsorted(side, places) + 1) for side in (student_ends, teacher_ends))


def _split_evenly(text: TokenizedText, block: Block, max_student: int, max_teacher: int) -> list[Block]:
    """A block in parts of about equal size within the limits."""
    student = _ends_within(text.student, block.student_start, block.student_end)
    is_same = text.student is text.teacher
    teacher = student if is_same else _ends_within(text.teacher, block.teacher_start, block.teacher_end)
    count = max(-(-len(student) // max_student), -(-len(teacher) // max_teacher))
    even = min(max_student, -(-len(student) // count)), min(max_teacher, -(-len(teacher) // count) + _SLACK)
    try:
        found = list(pack_streams(student, teacher, *even))
    except UsageError:
        found = list(pack_streams(student, teacher, max_student, max_teacher))
    starts = block.student_start, block.student_start, block.teacher_start, block.teacher_start
    return [Block(*(start + at for start, at in zip(starts, part, strict=True))) for part in found]


def _ends_within(stream: TokenStream, start: int, end: int) -> np.ndarray:
    """Where these tokens end, counted from the first one's start."""
    return np.asarray(stream.ends[start:end]) - (stream.ends[start - 1] if start else 0)

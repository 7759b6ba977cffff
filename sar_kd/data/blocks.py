"""Token streams packed into blocks: index ranges at whose ends a token ends in both streams.

Where a teacher cache exists, blocks end where the teacher's blocks of that cache end, as far as possible. A passage
that no block can hold, because the streams have no common end within one, is in none; it is counted, and a text that
would lose too much is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from sar_kd.alignment.byte_alignment import ends_on_both
from sar_kd.data.skipped import MAX_SKIPPED_SHARE, NO_COMMON_END
from sar_kd.errors import UsageError
from sar_kd.tokenization.token_stream import CHUNK_TOKENS, Block, Blocks, Ends, TokenizedText, TokenStream
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

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
    """
    if teacher_block_ends is None:
        found = pack_streams(text.student.ends, text.teacher.ends, max_student, max_teacher, _plain_sizes(text))
        packed = Blocks.of(found).ranges
    else:
        packed = _follow_teacher_blocks(text, teacher_block_ends, max_student, max_teacher)
    return Blocks(np.concatenate([packed, text.conversations.ranges]))


def _plain_sizes(text: TokenizedText) -> tuple[int, int]:
    """The tokens of all plain documents, student's and teacher's."""
    conversations = text.conversations
    return conversations[0][::2] if len(conversations) else (len(text.student.ids), len(text.teacher.ids))


def skip_start_tokens(blocks: Blocks, text: TokenizedText) -> Blocks:
    """The blocks without the token that a conversation begins with, and a document's start token at either end.

    The first is an input before the block (`Dataset.start_of`). A block of plain documents begins with a start token of
    its own, and predicts nothing from one at its end.
    """
    ranges = blocks.ranges.copy()
    plain = ranges[: len(blocks) - len(text.conversations)]
    for side, stream in enumerate((text.student, text.teacher)):
        plain[:, 2 * side] += ~stream.is_target[plain[:, 2 * side]]
        plain[:, 2 * side + 1] -= ~stream.is_target[plain[:, 2 * side + 1] - 1]
    ranges[len(plain) :, ::2] += 1
    return Blocks(ranges)


def skip_passages(text: TokenizedText, blocks: Blocks, pair: TokenizerPair, max_student: int) -> TokenizedText:
    """The text, less the passages of plain documents that are in none of the blocks.

    blocks: of `pack`; max_student: as there
    Raises: UsageError if they hold too much of the text
    """
    plain = blocks.ranges[: len(blocks) - len(text.conversations)]
    starts, ends = np.concatenate([[[0, 0]], plain[:, 1::2]]), np.concatenate([plain[:, ::2], [_plain_sizes(text)]])
    is_skipped = (starts < ends).any(axis=1)
    if not is_skipped.any():
        return text
    skipped = Blocks(np.stack([starts, ends], axis=2).reshape(-1, 4)[is_skipped])
    first_bytes = np.array([text.student.ends[start - 1] if start else 0 for start, *_ in skipped])
    sizes = np.array([text.student.ends[end - 1] for _, end, *_ in skipped]) - first_bytes
    if all(table.dummy_prefix for table in pair.token_tables):  # a space that is in no document's own bytes
        sizes -= np.isin(first_bytes, text.starts)
    num_bytes = int(sizes.sum())
    share = num_bytes / max(1, text.num_bytes)
    if share > MAX_SKIPPED_SHARE:
        start, end, *_ = skipped[0]
        example = pair.token_tables[0].spell(text.student.ids[start:end]).decode("utf-8", "replace")
        raise UsageError(
            f"--block_size {max_student + 1}: {share:.1%} of the bytes, more than {MAX_SKIPPED_SHARE:.0%}, would be "
            f"skipped: {NO_COMMON_END} ({example[:40]!r}); raise it, or use another model"
        )
    documents = np.searchsorted(text.starts, first_bytes, side="right") - 1
    document_bytes = text.document_bytes.copy()
    np.subtract.at(document_bytes, documents, sizes)
    return dataclasses.replace(
        text,
        num_bytes=text.num_bytes - num_bytes,
        document_bytes=document_bytes,
        skipped_bytes=text.skipped_bytes + num_bytes,
        skipped_passages=[*text.skipped_passages, *(f"{text.names[i]} ({NO_COMMON_END})" for i in documents.tolist())],
        skipped_ranges=skipped,
    )


def pack_streams(
    student_ends: Ends,
    teacher_ends: Ends,
    max_student: int,
    max_teacher: int,
    sizes: tuple[int, int] | None = None,
) -> Iterator[Block]:
    """Cut both streams where a token ends in both, as late as the limits allow. O((S + T) log).

    A passage that exceeds a limit without a common end is in no block: the next one begins where it ends.

    student_ends, teacher_ends: int64 [S], [T], in memory or memory-mapped; `CHUNK_TOKENS` of them are read at a time
    sizes: pack only so many tokens of each; None for all
    """
    is_same = student_ends is teacher_ends
    num_student, num_teacher = sizes or (len(student_ends), len(teacher_ends))
    student_start = teacher_start = packed = 0  # tokens of each, and the end that both have in common
    is_inside = False  # such a passage
    while student_start < num_student and teacher_start < num_teacher:
        first, first_teacher = student_start, teacher_start
        student = student_ends[first : min(num_student, first + max(CHUNK_TOKENS, max_student))]
        teacher = student
        if not is_same:
            teacher = teacher_ends[first_teacher : min(num_teacher, first_teacher + max(CHUNK_TOKENS, max_teacher))]
        common = student if is_same else student[ends_on_both(student, teacher)]
        # The last starts from which even the longest block lies within what was read.
        last = num_student - 1 if first + len(student) == num_student else first + len(student) - max_student
        last_teacher = first_teacher + len(teacher)
        last_teacher -= 0 if last_teacher == num_teacher else max_teacher
        while student_start <= last and teacher_start <= last_teacher:
            latest = student[min(student_start - first + max_student, len(student)) - 1]
            latest_teacher = teacher[min(teacher_start - first_teacher + max_teacher, len(teacher)) - 1]
            at = np.searchsorted(common, min(latest, latest_teacher), side="right") - 1
            is_inside |= at < 0 or common[at] <= packed
            if is_inside:
                at = np.searchsorted(common, packed, side="right")  # the next common end
            if at == len(common):  # not in what was read: go on behind it
                reached = min(student[-1], teacher[-1])
                student_start = first + int(np.searchsorted(student, reached, side="right"))
                teacher_start = first_teacher + int(np.searchsorted(teacher, reached, side="right"))
                break
            packed = common[at]
            # The first token that ends there: those without bytes after it belong to the next block.
            student_end = first + int(np.searchsorted(student, packed)) + 1
            teacher_end = first_teacher + int(np.searchsorted(teacher, packed)) + 1
            if not is_inside:
                yield Block(student_start, student_end, teacher_start, teacher_end)
            student_start, teacher_start, is_inside = student_end, teacher_end, False


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
    found = list(pack_streams(student, teacher, *even))
    if sum(end - start for start, end, *_ in found) < len(student):  # a passage is too long for an even share
        found = list(pack_streams(student, teacher, max_student, max_teacher))
    starts = block.student_start, block.student_start, block.teacher_start, block.teacher_start
    return [Block(*(start + at for start, at in zip(starts, part, strict=True))) for part in found]


def _ends_within(stream: TokenStream, start: int, end: int) -> np.ndarray:
    """Where these tokens end, counted from the first one's start."""
    return np.asarray(stream.ends[start:end]) - (stream.ends[start - 1] if start else 0)

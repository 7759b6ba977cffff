"""Documents as two streams of tokens over the same bytes, and the blocks that both are cut into.

Plain documents are joined, an end-of-text token after each, once in each tokenizer's tokens. Blocks end at bytes where
a token ends on both sides, so that student and teacher always read the same text. Nothing of them is dropped: a
document that a tokenizer cannot represent is left out by name. Conversations follow, each a block of its own, cut short
where it exceeds a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from sar_kd.alignment import TokenizerPair, ends_on_both
from sar_kd.config import UsageError
from sar_kd.conversation import GLUE, RESPONSE, STOP, Part, render
from sar_kd.documents import Conversation, Document
from sar_kd.token_bytes import encode_by_characters
from sar_kd.tokens import TokenTable, encode


@dataclass(frozen=True)
class TokenStream:
    """All documents in one tokenizer's tokens."""

    ids: np.ndarray
    """int32 [N]"""
    ends: np.ndarray
    """int64 [N]: where each token ends in the joined text, in bytes, a stop token counting one and what a chat template
    adds none; in tokens where the tokenizers are equal and no bytes are needed."""
    has_dummy: np.ndarray
    """bool [N]: the token's bytes begin with a space that the text, as both models read it, does not have."""
    is_target: np.ndarray
    """bool [N]: the token is to be predicted."""


class Block(NamedTuple):
    """One stretch of text as index ranges into both streams."""

    student_start: int
    student_end: int
    teacher_start: int
    teacher_end: int


@dataclass(frozen=True)
class JoinedText:
    """All documents as one stream for each model; one and the same where the tokenizers are equal."""

    student: TokenStream
    teacher: TokenStream
    names: list[str]
    """Names of the documents, in order."""
    starts: np.ndarray
    """int64: where each of them starts, in the unit of `TokenStream.ends`."""
    num_bytes: int
    """Bytes of the text that is predicted."""
    left_out: list[str]
    """Names of the documents that are empty or that a tokenizer cannot represent, of conversations with the reason."""
    conversations: list[Block]
    """The last documents: one block each."""
    truncated: list[str]
    """Names of the conversations that are cut short."""
    dropped_tokens: int
    """Tokens that the student would predict in what is cut off."""
    without_template: tuple[str, ...]
    """'student', 'teacher': whose conversations are written in our template, for want of its own."""


@dataclass
class _Joined:
    """What becomes a `JoinedText`, while it is put together."""

    sides: list[list[list[Part]]]
    """Parts by side and document."""
    names: list[str] = field(default_factory=list)
    num_bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    dropped_tokens: int = 0
    without_template: tuple[str, ...] = ()


def join(
    documents: Sequence[Document | Conversation], pair: TokenizerPair, limits: tuple[int, int] | None = None
) -> JoinedText:
    """Tokenize every document on both sides and join them, plain documents before conversations.

    limits: most tokens of a conversation for the student and the teacher, start token excluded; None for no limit
    Raises: UsageError if none of them can be represented
    """
    joined = _Joined(sides=[[]] if pair.tables is None else [[], []])
    _join_plain([document for document in documents if isinstance(document, Document)], pair, joined)
    num_plain = len(joined.names)
    _join_conversations(
        [document for document in documents if isinstance(document, Conversation)], pair, limits, joined
    )
    if not joined.names:
        shown = ", ".join(joined.left_out[:3])
        remedy = "; raise --block_size" if any("within a block" in name for name in joined.left_out) else ""
        raise UsageError(f"--train_file: no document holds text that both tokenizers can represent ({shown}){remedy}")
    laid = [_stream(side, table) for side, table in zip(joined.sides, pair.tables or (None,), strict=True)]
    streams, bounds = zip(*laid, strict=True)
    firsts = bounds[0][:-1]
    student_bounds, teacher_bounds = (bounds[side][num_plain:].tolist() for side in (0, -1))
    spans = zip(student_bounds, student_bounds[1:], teacher_bounds, teacher_bounds[1:], strict=False)
    return JoinedText(
        student=streams[0],
        teacher=streams[-1],
        names=joined.names,
        starts=np.where(firsts > 0, streams[0].ends[firsts - 1], 0),
        num_bytes=joined.num_bytes,
        left_out=joined.left_out,
        conversations=[Block(*span) for span in spans],
        truncated=joined.truncated,
        dropped_tokens=joined.dropped_tokens,
        without_template=joined.without_template,
    )


def _join_plain(documents: list[Document], pair: TokenizerPair, joined: _Joined) -> None:
    """Enter plain documents: all of their text is to be learned, an end-of-text token after each."""
    texts = [pair.canonical(document.text) if _is_unicode(document.text) else "" for document in documents]
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    encoded = [encode(tokenizer, texts) for tokenizer in (pair.student, pair.teacher)[: len(joined.sides)]]
    keep = np.array([bool(ids) for ids in encoded[0]], dtype=bool)
    # Bytes that a tokenizer puts before each text: 0, or 1 for a dummy space; anything else is not this text.
    dummies = np.zeros((len(encoded), len(texts)), dtype=np.int64)
    ends: list[list[list[int] | None]] = [[None] * len(texts) for _ in encoded]
    for side, table in enumerate(pair.tables or ()):
        if table is None:
            placed = encode_by_characters((pair.student, pair.teacher)[side], texts)
            encoded[side], ends[side] = ([item[i] for item in placed] for i in range(2))
            keep &= np.array([bool(ids) for ids in encoded[side]], dtype=bool)
            continue
        dummies[side] = [int(table.lengths[ids].sum()) for ids in encoded[side]] - sizes
        keep &= (dummies[side] == 0) | ((dummies[side] == 1) & table.dummy_prefix)
    # A space that both sides put there is text to both; one that only one side puts there is not text.
    is_text = (dummies == 1).all(axis=0).tolist()
    kept = keep.nonzero()[0].tolist()
    for side, ids in enumerate(encoded):
        end = Part([(pair.student_end, pair.teacher_end)[side]], STOP)
        has_dummy = (dummies[side] == 1).tolist()
        parts = (Part(ids[i], RESPONSE, has_dummy[i], is_text[i], ends[side][i]) for i in kept)
        joined.sides[side] += [[part, end] for part in parts]
    joined.names += [documents[i].name for i in kept]
    joined.num_bytes += int(sizes[kept].sum())
    joined.left_out += [documents[i].name for i in (~keep).nonzero()[0]]


def _join_conversations(
    conversations: list[Conversation], pair: TokenizerPair, limits: tuple[int, int] | None, joined: _Joined
) -> None:
    """Enter conversations, each cut where it exceeds `limits`."""
    if not conversations:
        return
    rendered = render(conversations, pair)
    joined.left_out += rendered.left_out
    joined.without_template = rendered.without_template
    for name, *whole in zip(rendered.names, *rendered.sides, strict=True):
        kept = _within(whole, rendered.tables, limits) if limits else whole
        if kept is None:
            joined.left_out.append(f"{name} (no response begins within a block)")
            continue
        for side, parts in zip(joined.sides, kept, strict=True):
            side.append(parts)
        joined.names.append(name)
        responses = (part for part in kept[0] if part.kind == RESPONSE)
        joined.num_bytes += sum(int(rendered.tables[0].lengths[p.ids].sum()) - p.has_dummy for p in responses)
        lost = _num_tokens(whole[0], learned=True) - _num_tokens(kept[0], learned=True)
        joined.dropped_tokens += lost
        joined.truncated += [name] if lost else []


def _within(whole: list[list[Part]], tables: list[TokenTable], limits: tuple[int, int]) -> list[list[Part]] | None:
    """A conversation on each side, cut at the last place within the limits where both end a token.

    None if nothing that is to be learned is left
    """
    if _num_tokens(whole[0]) <= limits[0] and _num_tokens(whole[-1]) <= limits[1]:
        return whole
    ends = [_stream([parts], table)[0].ends for parts, table in zip(whole, tables, strict=True)]
    try:
        block = next(cut_blocks(ends[0], ends[-1], *limits))
    except UsageError:
        return None
    kept = [_first(parts, end) for parts, end in zip(whole, (block.student_end, block.teacher_end), strict=False)]
    return kept if all(_num_tokens(parts, learned=True) for parts in kept) else None


def _first(parts: list[Part], num_tokens: int) -> list[Part]:
    """The first tokens of a conversation."""
    kept = []
    for part in parts:
        if num_tokens > 0:
            kept.append(part._replace(ids=part.ids[:num_tokens]))
        num_tokens -= len(part.ids)
    return kept


def _num_tokens(parts: list[Part], learned: bool = False) -> int:
    return sum(len(part.ids) for part in parts if part.kind >= RESPONSE or not learned)


def _stream(documents: list[list[Part]], table: TokenTable | None) -> tuple[TokenStream, np.ndarray]:
    """One tokenizer's stream of documents in parts, and int64 [documents + 1]: its tokens before each, and all."""
    part_ids, *columns, part_ends = zip(*chain.from_iterable(documents), strict=True)
    part_kinds, has_dummy, is_text = map(np.array, columns)
    counts = np.fromiter(map(len, part_ids), dtype=np.int64, count=len(part_ids))
    bounds = np.append(0, np.cumsum(counts))[np.cumsum([0, *map(len, documents)])]
    ids = np.fromiter(chain.from_iterable(part_ids), dtype=np.int32, count=counts.sum())
    kinds = np.repeat(part_kinds.astype(np.uint8), counts)
    flags, is_target = np.zeros(len(ids), dtype=bool), kinds >= RESPONSE
    if table is None and any(part_ends):
        placed = (np.diff(ends, prepend=0) if ends else np.ones(1, dtype=np.int64) for ends in part_ends)
        return TokenStream(ids, np.cumsum(np.concatenate(list(placed))), flags, is_target), bounds
    if table is None:
        return TokenStream(ids, np.arange(1, len(ids) + 1), flags, is_target), bounds
    lasts = np.cumsum(counts) - 1
    flags[(lasts - counts + 1)[has_dummy & ~is_text]] = True
    widths = table.lengths[ids] - flags
    widths[(kinds == GLUE) | (kinds == STOP)] = 0
    widths[lasts[part_kinds == STOP]] = 1
    return TokenStream(ids, np.cumsum(widths), flags, is_target), bounds


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and no encoding can
        return False
    return True


def cut_blocks(
    student_ends: np.ndarray, teacher_ends: np.ndarray, max_student: int, max_teacher: int
) -> Iterator[Block]:
    """Cut both streams, as late as the limits allow, where a token ends on both sides.

    Raises: UsageError if a stretch within the limits has no such place
    """
    common = student_ends
    if student_ends is not teacher_ends and len(teacher_ends):
        common = student_ends[ends_on_both(student_ends, teacher_ends)]
    student_start = teacher_start = 0
    while student_start < len(student_ends):
        latest_student = student_ends[min(student_start + max_student, len(student_ends)) - 1]
        latest_teacher = teacher_ends[min(teacher_start + max_teacher, len(teacher_ends)) - 1]
        reached = student_ends[student_start - 1] if student_start else 0
        at = np.searchsorted(common, min(latest_student, latest_teacher), side="right") - 1
        if at < 0 or common[at] <= reached:
            raise UsageError(
                f"--block_size {max_student + 1}: a stretch of text from byte {reached} on holds no place within a "
                "block at which both tokenizers end a token; raise it"
            )
        # The first token that ends there: one without bytes behind it belongs to what follows.
        student_end = int(np.searchsorted(student_ends, common[at])) + 1
        teacher_end = int(np.searchsorted(teacher_ends, common[at])) + 1
        yield Block(student_start, student_end, teacher_start, teacher_end)
        student_start, teacher_start = student_end, teacher_end


def cut(text: JoinedText, max_student: int, max_teacher: int) -> list[Block]:
    """All blocks of a text: plain documents packed as by `cut_blocks`, then the conversations, one block each.

    Raises: UsageError as `cut_blocks`
    """
    student_ends, teacher_ends = text.student.ends, text.teacher.ends
    if text.conversations:
        first = text.conversations[0]
        is_same = teacher_ends is student_ends
        student_ends = student_ends[: first.student_start]
        teacher_ends = student_ends if is_same else teacher_ends[: first.teacher_start]
    return [*cut_blocks(student_ends, teacher_ends, max_student, max_teacher), *text.conversations]

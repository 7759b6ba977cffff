"""Documents as two streams of tokens over the same bytes, and the blocks that both are cut into.

Documents are joined, an end-of-text token after each, once in each tokenizer's tokens. Blocks end at bytes where a
token ends on both sides, so that student and teacher always read the same text. Nothing is dropped: a document that
a tokenizer cannot represent is left out by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sar_kd.alignment import TokenizerPair
from sar_kd.config import UsageError
from sar_kd.documents import Document
from sar_kd.tokens import TokenTable, encode


@dataclass(frozen=True)
class TokenStream:
    """All documents in one tokenizer's tokens."""

    ids: np.ndarray
    """int32 [N]"""
    ends: np.ndarray
    """int64 [N]: where each token ends in the joined text, in bytes, an end-of-text token counting one; in tokens
    where the tokenizers are equal and no bytes are needed."""
    has_dummy: np.ndarray
    """bool [N]: the token's bytes begin with a space that the text, as both models read it, does not have."""


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
    """Bytes of the text itself."""
    left_out: list[str]
    """Names of the documents that are empty or that a tokenizer cannot represent."""


def join(documents: list[Document], pair: TokenizerPair) -> JoinedText:
    """Tokenize every document on both sides and join them.

    Raises: UsageError if none of them can be represented
    """
    texts = [pair.canonical(document.text) if _is_unicode(document.text) else "" for document in documents]
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    encoded = [encode(pair.student, texts)] + ([] if pair.equal else [encode(pair.teacher, texts)])
    keep = np.array([bool(ids) for ids in encoded[0]], dtype=bool)
    # Bytes that a tokenizer puts before each text: 0, or 1 for a dummy space; anything else is not this text.
    dummies = np.zeros((2, len(texts)), dtype=np.int64)
    for side, table in enumerate(pair.tables or ()):
        dummies[side] = [int(table.lengths[ids].sum()) for ids in encoded[min(side, len(encoded) - 1)]] - sizes
        keep &= (dummies[side] == 0) | ((dummies[side] == 1) & table.dummy_prefix)
    left_out = [documents[i].name for i in (~keep).nonzero()[0]]
    if not keep.any():
        shown = ", ".join(left_out[:3])
        raise UsageError(f"--train_file: no document holds text that both tokenizers can represent ({shown})")
    kept = keep.nonzero()[0].tolist()
    dummies, sizes = dummies[:, kept], sizes[kept]
    # A space that both sides put there is text to both; one that only one side puts there is not text.
    shared = dummies.min(axis=0)
    tables, ends = pair.tables or (None, None), (pair.student_end, pair.teacher_end)
    streams = [
        _stream([ids[i] for i in kept], ends[side], tables[side], dummies[side] > shared)
        for side, ids in enumerate(encoded)
    ]
    lengths = 1 + (sizes + shared if pair.tables else np.array([len(encoded[0][i]) for i in kept]))
    names, starts = [documents[i].name for i in kept], np.cumsum(lengths) - lengths
    return JoinedText(streams[0], streams[-1], names, starts, int(sizes.sum()), left_out)


def _stream(encoded: list[list[int]], end_id: int, table: TokenTable | None, has_dummy: np.ndarray) -> TokenStream:
    """One tokenizer's stream; `has_dummy` bool [documents]: the first token begins with a space that is no text."""
    counts = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
    ids = np.fromiter((i for document in encoded for i in (*document, end_id)), dtype=np.int32, count=counts.sum())
    flags = np.zeros(len(ids), dtype=bool)
    if table is None:
        return TokenStream(ids, np.arange(1, len(ids) + 1), flags)
    lasts = np.cumsum(counts) - 1
    flags[(lasts - counts + 1)[has_dummy]] = True
    widths = table.lengths[ids] - flags
    widths[lasts] = 1
    return TokenStream(ids, np.cumsum(widths), flags)


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
    common = student_ends if student_ends is teacher_ends else np.intersect1d(student_ends, teacher_ends)
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

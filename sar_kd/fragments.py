"""Plain documents in lots that fit into memory, long ones in fragments, and the tokens of a lot on both sides."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sar_kd.alignment import TokenizerPair
from sar_kd.pieces import Piece, encode_pieces, pieces_of, place_pieces
from sar_kd.rows import Conversation
from sar_kd.text_files import Sample
from sar_kd.tokens import encode

_LOT = 2**20
"""Characters: tokenizers take some fifty bytes for each, while they work, and share a lot among their threads."""


class Fragment(NamedTuple):
    """A stretch of a plain document; of a short one, all of it."""

    name: str
    piece: Piece
    opens: bool
    closes: bool
    """It is its document's first, its last"""


class Encoded(NamedTuple):
    """A fragment in one tokenizer's tokens."""

    ids: np.ndarray
    """int32 [N]"""
    ends: np.ndarray | None
    """int64 [N]: where each ends in the fragment, in bytes, where the tokens have no bytes of their own"""
    dummy: int
    """Bytes that the tokenizer puts before it: 0, or 1 for a dummy space; anything else is another text."""


def lots_of(samples: Iterable[Sample], pair: TokenizerPair) -> Iterator[list[Fragment]]:
    """All plain documents among `samples`, in order, as lots of fragments."""
    yield from _in_lots(_fragments(samples, pair), lambda fragment: len(fragment.piece.text))


def conversations_of(samples: Iterable[Sample]) -> Iterator[list[Conversation]]:
    """All conversations among `samples`, in order, in lots."""
    found = (sample for sample in samples if isinstance(sample, Conversation))
    yield from _in_lots(found, lambda conversation: conversation.num_chars)


def _in_lots(items: Iterable, size_of) -> Iterator[list]:
    lot, size = [], 0
    for item in items:
        lot.append(item)
        size += size_of(item)
        if size >= _LOT:
            yield lot
            lot, size = [], 0
    if lot:
        yield lot


def _fragments(samples: Iterable[Sample], pair: TokenizerPair) -> Iterator[Fragment]:
    encoders = [_ids_of(pair, side) for side in range(1 if pair.tables is None else 2)]
    for sample in samples:
        if isinstance(sample, Conversation):
            continue
        opens, last = True, Piece("", "")
        try:
            pieces = pieces_of(_checked(sample.chunks()), encoders, pair.canonical)
            last = next(pieces, last)
            for piece in pieces:
                yield Fragment(sample.name, last, opens, closes=False)
                opens, last = False, piece
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and no encoding can
            last = Piece("", "")
        yield Fragment(sample.name, last, opens, closes=True)


def _checked(chunks: Iterable[str]) -> Iterator[str]:
    for chunk in chunks:
        chunk.encode()
        yield chunk


def _ids_of(pair: TokenizerPair, side: int):
    tokenizer = (pair.student, pair.teacher)[side]
    if pair.tables is not None and pair.tables[side] is None:
        return lambda texts: [ids for ids, _ in place_pieces(tokenizer, [Piece(text, "") for text in texts])]
    return functools.partial(encode, tokenizer)


def encode_lot(lot: Sequence[Fragment], pair: TokenizerPair, side: int) -> list[Encoded | None]:
    """A lot in the tokens of one side (0 student, 1 teacher); None for what its tokenizer cannot represent."""
    tokenizer, pieces = (pair.student, pair.teacher)[side], [fragment.piece for fragment in lot]
    table = pair.tables[side] if pair.tables else None
    if pair.tables and table is None:
        return [Encoded(ids, ends, 0) if len(ids) else None for ids, ends in place_pieces(tokenizer, pieces)]
    found: list[Encoded | None] = []
    for piece, ids in zip(pieces, encode_pieces(functools.partial(encode, tokenizer), pieces), strict=True):
        dummy = int(table.lengths[ids].sum()) - len(piece.text.encode()) if table else 0
        found.append(Encoded(ids, None, dummy) if dummy in (0, table is not None and table.dummy_prefix) else None)
    return found

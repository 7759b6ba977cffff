"""Long text encoded in pieces whose tokens, joined, are those of the whole text.

A text is cut after a line end, else before a space between words, else anywhere. Each piece is encoded together with
the character before it, so that a tokenizer with a dummy prefix puts no space inside the text. Every cut is tried
first: the text around it must give the same tokens cut and uncut, from every tokenizer. That is enough for tokenizers
that look no further than `_CONTEXT` characters, as all do that split text into words first. Where no cut passes, the
first candidate is taken nonetheless.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_table import Ids, TokenTable

CHUNK = 2**20
"""Characters of a document that are read at a time."""

PIECE = 2**16
"""Characters from which a text is cut."""

_CONTEXT = 256

_CANDIDATES = 16
"""Cuts of each kind that are tried."""

ANCHORS = ("\n", "a")
"""Text to encode before a piece where the character before it does not stay a token of its own."""


class TextPiece(NamedTuple):
    """Consecutive characters of a document; of a short one, all of it."""

    text: str
    before: str
    """Text to encode before it, whose tokens are dropped; "" at the beginning of the document"""
    document: str = ""
    """The document's name"""
    is_first: bool = True
    is_last: bool = True

    @property
    def num_chars(self) -> int:
        return len(self.text)


Encoder = Callable[[list[str]], Sequence[Ids]]
"""Ids of each of some texts."""


def split_text(
    chunks: Iterable[str], encoders: Sequence[Encoder], canonical: Callable[[str], str] = str
) -> Iterator[TextPiece]:
    """Cut a text that comes in chunks; a short one is a single piece.

    encoders: of all tokenizers that read it; canonical: applied to the text before they do
    """
    buffer, before = "", ""
    for chunk in chunks:
        buffer, first = buffer + chunk, 0
        while len(buffer) - first > PIECE + _CONTEXT:
            cut, next_before = _choose_cut(buffer, first, encoders, canonical)
            yield TextPiece(canonical(buffer[first:cut]), before)
            first, before = cut, next_before
        buffer = buffer[first:]
    if buffer:
        yield TextPiece(canonical(buffer), before)


def _choose_cut(buffer: str, first: int, encoders: Sequence[Encoder], canonical) -> tuple[int, str]:
    """Where to end the piece that begins at `first`, and the next one's `before`."""
    low, high = first + PIECE // 2, first + PIECE
    fallback = None
    for cut in _cut_candidates(buffer, low, high):
        left, right = buffer[cut - _CONTEXT : cut], buffer[cut : cut + _CONTEXT]
        whole, left, right = map(canonical, (left + right, left, right))
        if left and right and left + right == whole:
            fallback = fallback or (cut, left, right)
            if all(_keeps_tokens(encode, whole, left, right) for encode in encoders):
                return cut, left[-1]
    cut, left, right = fallback or (high, " ", " ")
    for before in (left[-1], *ANCHORS):
        if all(_without_prefix(*encode([before, before + right])) is not None for encode in encoders):
            return cut, before
    return cut, ""


def _cut_candidates(buffer: str, low: int, high: int) -> Iterator[int]:
    """Places to cut between `low` and `high`, the best kind first, the last of a kind first."""
    lines = (at + 1 for at in _rfind_all(buffer, "\n", low, high) if not buffer[at + 1].isspace())
    yield from islice(lines, _CANDIDATES)
    spaces = _rfind_all(buffer, " ", low, high)
    yield from islice((at for at in spaces if not (buffer[at - 1].isspace() or buffer[at + 1].isspace())), _CANDIDATES)
    yield from range(high, high - _CANDIDATES, -1)


def _rfind_all(buffer: str, character: str, low: int, high: int) -> Iterator[int]:
    while (high := buffer.rfind(character, low, high)) >= 0:
        yield high


def _keeps_tokens(encode: Encoder, whole: str, left: str, right: str) -> bool:
    """Are the tokens of `left`, and of `right` behind its last character, those of the whole?"""
    uncut, opening, before, both = encode([whole, left, left[-1], left[-1] + right])
    rest = _without_prefix(before, both)
    return rest is not None and [*opening, *rest] == [*uncut]


def _without_prefix(prefix: Ids, ids: Ids) -> Ids | None:
    """The ids behind `prefix`; None if they do not begin with it."""
    return ids[len(prefix) :] if [*ids[: len(prefix)]] == [*prefix] else None


def encode_pieces(encode: Encoder, pieces: Sequence[TextPiece]) -> list[np.ndarray]:
    """int32 ids of each piece."""
    prefixes = {before: ids for before in {p.before for p in pieces if p.before} for ids in encode([before])}
    encoded = encode([piece.before + piece.text for piece in pieces])
    found = []
    for piece, ids in zip(pieces, encoded, strict=True):
        own = _without_prefix(prefixes.get(piece.before, ()), ids)
        found.append(np.array(encode([piece.text])[0] if own is None else own, dtype=np.int32))
    return found


def encode_texts(tokenizer, texts: Sequence[str]) -> list[Ids | None]:
    """As `backends.encode`, long texts in pieces."""
    short = iter(encode(tokenizer, [text for text in texts if len(text) <= PIECE]))
    return [next(short) if len(text) <= PIECE else encode_after(tokenizer, "", text) for text in texts]


def encode_after(tokenizer, before: str, text: str) -> Ids | None:
    """Ids of a text that follows `before`; None where a token spans both."""
    encoder: Encoder = functools.partial(encode, tokenizer)
    chunks = (text[first : first + CHUNK] for first in range(0, len(text), CHUNK))
    first, *others = split_text(chunks, [encoder])
    prefix, whole = encoder([before, before + first.text])
    ids = _without_prefix(prefix, whole)
    if ids is None or not others:
        return ids
    return np.concatenate([np.array(ids, dtype=np.int32), *(encode_pieces(encoder, [piece])[0] for piece in others)])


def encode_inside(tokenizer, table: TokenTable, text: str) -> Ids | None:
    """Ids whose bytes are exactly `text`, as it stands inside another text; None where there are none."""
    options = chain(encode_texts(tokenizer, [text]), (encode_after(tokenizer, anchor, text) for anchor in ANCHORS))
    return next((ids for ids in options if ids is not None and table.spell(ids) == text.encode()), None)

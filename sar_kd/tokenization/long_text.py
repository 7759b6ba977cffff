"""Long text in pieces whose tokens, joined, are the tokens of the whole.

No tokenizer need hold more than a piece at a time. Text is cut behind a line end, else before a space between words,
else anywhere. What is cut apart reads what stands before it: a tokenizer that puts a space before its text puts none
inside of it. Each place is tried before it is used: the text around it, cut there, must give the tokens that it gives
uncut, from every tokenizer. That settles it for tokenizers that look no further than `_AROUND` characters, as all do
that cut text into words first. Where no place passes, the first candidate is taken nonetheless.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from sar_kd.tokenization.backends import encode, encode_by_characters
from sar_kd.tokenization.token_table import Ids, TokenTable

PIECE = 2**16
"""Characters from which a text is cut."""

_AROUND = 256

_TRIES = 16
"""Places of each kind."""

ANCHORS = ("\n", "a")
"""What a piece may read before it instead of what stands there."""


class Piece(NamedTuple):
    """A stretch of one text."""

    text: str
    before: str
    """What stands before it, to be read with it; empty at the beginning of the text"""


Encoder = Callable[[list[str]], Sequence[Ids]]
"""Ids of each of some texts."""


def pieces_of(
    chunks: Iterable[str], encoders: Sequence[Encoder], canonical: Callable[[str], str] = str
) -> Iterator[Piece]:
    """Cut a text that comes in chunks; all of it, if it is short, is one piece.

    encoders: of the tokenizers that read it; canonical: what is done to a text before they do
    """
    buffer, before = "", ""
    for chunk in chunks:
        buffer, first = buffer + chunk, 0
        while len(buffer) - first > PIECE + _AROUND:
            place, behind = _place(buffer, first, encoders, canonical)
            yield Piece(canonical(buffer[first:place]), before)
            first, before = place, behind
        buffer = buffer[first:]
    if buffer:
        yield Piece(canonical(buffer), before)


def _place(buffer: str, first: int, encoders: Sequence[Encoder], canonical) -> tuple[int, str]:
    """Where to end the piece that begins at `first`, and what the next one reads before it."""
    low, high = first + PIECE // 2, first + PIECE
    fallback = None
    for place in _candidates(buffer, low, high):
        left, right = (
            buffer[place - _AROUND : place],
            buffer[place : place + _AROUND],
        )
        whole, left, right = map(canonical, (left + right, left, right))
        if left and right and left + right == whole:
            fallback = fallback or (place, left, right)
            if all(_joins(encode, whole, left, right) for encode in encoders):
                return place, left[-1]
    place, left, right = fallback or (high, " ", " ")
    for before in (left[-1], *ANCHORS):
        if all(_behind(*encode([before, before + right])) is not None for encode in encoders):
            return place, before
    return place, ""


def _candidates(buffer: str, low: int, high: int) -> Iterator[int]:
    """Places between these to cut at, the best kind first, the last of a kind first."""
    yield from islice((at + 1 for at in _found(buffer, "\n", low, high) if not buffer[at + 1].isspace()), _TRIES)
    words = (at for at in _found(buffer, " ", low, high) if not any(map(str.isspace, (buffer[at - 1], buffer[at + 1]))))
    yield from islice(words, _TRIES)
    yield from range(high, high - _TRIES, -1)


def _found(buffer: str, character: str, low: int, high: int) -> Iterator[int]:
    while (high := buffer.rfind(character, low, high)) >= 0:
        yield high


def _joins(encode: Encoder, whole: str, left: str, right: str) -> bool:
    uncut, one, opening, other = encode([whole, left, left[-1], left[-1] + right])
    behind = _behind(opening, other)
    return behind is not None and [*one, *behind] == [*uncut]


def _behind(opening: Ids, whole: Ids) -> Ids | None:
    """What follows `opening` in `whole`; None if that does not begin with it."""
    return whole[len(opening) :] if [*whole[: len(opening)]] == [*opening] else None


def encode_pieces(encode: Encoder, pieces: Sequence[Piece]) -> list[np.ndarray]:
    """int32 ids of each piece."""
    opening_of = {before: ids for before in {p.before for p in pieces if p.before} for ids in encode([before])}
    encoded = encode([piece.before + piece.text for piece in pieces])
    found = []
    for piece, ids in zip(pieces, encoded, strict=True):
        behind = _behind(opening_of.get(piece.before, ()), ids)
        found.append(np.array(encode([piece.text])[0] if behind is None else behind, dtype=np.int32))
    return found


def place_pieces(tokenizer, pieces: Sequence[Piece]) -> list[tuple[np.ndarray, np.ndarray]]:
    """int32 ids of each piece and int64, where each ends in it, as `token_bytes.encode_by_characters` tells them."""
    found = []
    befores = [piece.before for piece in pieces]
    openings = encode_by_characters(tokenizer, befores)
    placed = encode_by_characters(tokenizer, [piece.before + piece.text for piece in pieces])
    for before, (opening, _), (ids, ends) in zip(befores, openings, placed, strict=True):
        behind = np.array(ids[len(opening) :], dtype=np.int32), np.array(ends[len(opening) :], dtype=np.int64)
        found.append((behind[0], behind[1] - len(before.encode())))
    return found


def encode_texts(tokenizer, texts: Sequence[str]) -> list[Ids | None]:
    """As `tokens.encode`, long texts in pieces."""
    short = iter(encode(tokenizer, [text for text in texts if len(text) <= PIECE]))
    return [next(short) if len(text) <= PIECE else encode_behind(tokenizer, "", text) for text in texts]


def encode_behind(tokenizer, before: str, text: str) -> Ids | None:
    """Ids of a text that stands behind `before`; None where the tokenizer cuts them elsewhere than between them."""
    encoder: Encoder = functools.partial(encode, tokenizer)
    chunks = (text[first : first + CHUNK] for first in range(0, len(text), CHUNK))
    first, *others = pieces_of(chunks, [encoder])
    opening, whole = encoder([before, before + first.text])
    ids = _behind(opening, whole)
    if ids is None or not others:
        return ids
    return np.concatenate([np.array(ids, dtype=np.int32), *(encode_pieces(encoder, [piece])[0] for piece in others)])


def encode_inside(tokenizer, table: TokenTable, text: str) -> Ids | None:
    """Ids that spell a text to the byte, as it stands inside of another; None where the tokenizer cannot."""
    ways = chain(encode_texts(tokenizer, [text]), (encode_behind(tokenizer, anchor, text) for anchor in ANCHORS))
    return next((ids for ids in ways if ids is not None and table.spell(ids) == text.encode()), None)


CHUNK = 2**20
"""Characters of a document that are handed over at once."""

"""Documents as two streams of tokens over the same bytes.

Plain documents are joined, an end-of-text token after each, once in each tokenizer's tokens. Nothing of them is
dropped: a document that a tokenizer cannot represent is left out by name. Conversations follow, each a block of its
own, cut short where it exceeds a block. Text is taken lot by lot; the streams of a large one stay on the disk.

Plain documents in lots that fit into memory, long ones in fragments, and the tokens of a lot on both sides.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sar_kd.data.blocks import cut_blocks
from sar_kd.data.chat import render, writers_of
from sar_kd.data.column_store import ColumnStore, strings_of
from sar_kd.data.samples import Conversation, Sample
from sar_kd.data.sources import StreamedDocuments
from sar_kd.data.token_cache import TokenCache
from sar_kd.errors import UsageError
from sar_kd.runtime.console import tokenizing_bar
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.long_text import Piece, encode_pieces, pieces_of, place_pieces
from sar_kd.tokenization.token_stream import (
    RESPONSE,
    STOP,
    Block,
    Blocks,
    Counting,
    Part,
    TokenizedText,
    TokenStream,
    concatenate_spans,
)
from sar_kd.tokenization.token_table import TokenTable, fingerprint
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_SIDES = ("student", "teacher")


def join(
    documents: Sequence[Sample] | StreamedDocuments,
    pair: TokenizerPair,
    limits: tuple[int, int] | None = None,
    cache: TokenCache | None = None,
) -> TokenizedText:
    """Tokenize every document on both sides and join them, plain documents before conversations.

    limits: most tokens of a conversation for the student and the teacher, start token excluded; None for no limit
    cache: where the tokens of a large text are kept; None keeps all of it in memory
    Raises: UsageError if none of them can be represented
    """

    def build(shelf: ColumnStore) -> None:
        _Joiner(pair, limits, shelf).join(documents, cache)

    if cache is not None and isinstance(documents, StreamedDocuments):
        columns, facts = cache.get(_what(documents, pair, limits), build, documents.num_chars)
    else:
        shelf = ColumnStore()
        build(shelf)
        columns, facts = shelf.finish(), shelf.facts
    streams = [_stream(columns, side, pair) for side in _SIDES[: facts["sides"]]]
    names, left_out, truncated = (strings_of(columns, name) for name in ("names", "left_out", "truncated"))
    if not len(names):
        shown = ", ".join(left_out[:3])
        remedy = "; raise --block_size" if any("within a block" in name for name in left_out) else ""
        raise UsageError(f"--train_file: no document holds text that both tokenizers can represent ({shown}){remedy}")
    return TokenizedText(
        student=streams[0],
        teacher=streams[-1],
        names=names,
        starts=columns["starts"],
        num_bytes=facts["num_bytes"],
        left_out=left_out,
        conversations=Blocks(columns["conversations"]),
        truncated=truncated,
        dropped_tokens=facts["dropped_tokens"],
        without_template=tuple(facts["without_template"]),
    )


def _stream(columns: dict[str, np.ndarray], side: str, pair: TokenizerPair) -> TokenStream:
    ids = columns[f"{side}_ids"]
    ends = Counting(len(ids)) if pair.tables is None else columns[f"{side}_ends"]
    return TokenStream(ids, ends, columns[f"{side}_has_dummy"], columns[f"{side}_is_target"])


def _what(documents: StreamedDocuments, pair: TokenizerPair, limits: tuple[int, int] | None) -> dict:
    """All that the streams depend on."""
    tables = [table and [*table.end_ids, table.dummy_prefix, table.nfc] for table in pair.tables or ()]
    return {
        "text": documents.digest,
        "tokenizers": [fingerprint(pair.student), fingerprint(pair.teacher), importlib.metadata.version("tokenizers")],
        "ends": [pair.student_start, pair.student_end, pair.teacher_start, pair.teacher_end],
        "tables": tables,
        "limits": limits if documents.has_conversations else None,
    }


class _Joiner:
    """Writes the columns of a `TokenizedText`."""

    def __init__(self, pair: TokenizerPair, limits: tuple[int, int] | None, shelf: ColumnStore):
        self.pair, self.limits, self.shelf = pair, limits, shelf
        self.ends = [0] if pair.tables is None else [0, 0]
        """By side, where its last token ends"""
        for side in _SIDES[: len(self.ends)]:
            shelf.add(f"{side}_ids", "int32")
            shelf.add(f"{side}_has_dummy", "bool")
            shelf.add(f"{side}_is_target", "bool")
            if pair.tables is not None:
                shelf.add(f"{side}_ends", "int64")
        shelf.add("starts", "int64")
        shelf.add("conversations", "int64", 4)
        shelf.add_strings("names", "left_out", "truncated")
        shelf.facts |= {"sides": len(self.ends), "num_bytes": 0, "dropped_tokens": 0, "without_template": []}
        self.num_bytes = 0
        self._pending: list[list[list[Part]]] = [[] for _ in self.ends]
        self._opened: list[str | None] = []
        """Of what is pending, the name of the document that it opens"""
        self._skips = False
        self._before: tuple[dict[str, int], list[int], int] = {}, [], 0
        """Sizes of the columns, `ends` and `num_bytes` where the document that is being entered begins"""

    def join(self, documents: Sequence[Sample] | StreamedDocuments, cache: TokenCache | None) -> None:
        """Enter all documents, plain ones first."""
        is_large, num_chars = isinstance(documents, StreamedDocuments), 0
        if isinstance(documents, StreamedDocuments):
            num_chars, talks = documents.num_chars, documents.has_conversations
        else:
            talks = any(isinstance(sample, Conversation) for sample in documents)
        with tokenizing_bar(num_chars, is_large) as bar:
            for number, size in enumerate(self._lots(documents, talks)):
                bar.update(size)
                if not number and cache is not None and is_large:
                    cache.require_room(self.shelf.num_bytes() * (num_chars - size) // max(1, size))
        self.shelf.facts["num_bytes"] = self.num_bytes

    def _lots(self, documents: Sequence[Sample] | StreamedDocuments, talks: bool) -> Iterator[int]:
        """Enter the documents lot by lot; the characters of each lot, once it is entered."""
        for lot in lots_of(documents, self.pair):
            self._add_plain(lot)
            yield sum(len(fragment.piece.text) for fragment in lot)
        writers = writers_of(self.pair) if talks else []
        for some in conversations_of(documents) if talks else ():
            self._add_conversations(some, writers)
            yield sum(talk.num_chars for talk in some)

    def _add_plain(self, lot: list[Fragment]) -> None:
        """Enter a lot of plain text: all of it is to be learned, an end-of-text token after each document."""
        encoded = [encode_lot(lot, self.pair, side) for side in range(len(self.ends))]
        for fragment, *found in zip(lot, *encoded, strict=True):
            if fragment.opens:
                self._skips = False
            if fragment.opens and not fragment.closes:
                self._flush()
                self._before = self.shelf.sizes(), [*self.ends], self.num_bytes
            if self._skips:
                continue
            if any(side is None for side in found) or not len(found[0].ids):
                self._leave_out(fragment)
                continue
            # A space that both sides put there is text to both; one that only one side puts there is not text.
            is_text = all(side.dummy for side in found)
            for side, (ids, ends, dummy) in enumerate(found):
                parts = [Part(ids, RESPONSE, bool(dummy), is_text, ends)]
                if fragment.closes:
                    parts.append(Part([(self.pair.student_end, self.pair.teacher_end)[side]], STOP))
                self._pending[side].append(parts)
            self._opened.append(fragment.name if fragment.opens else None)
            self.num_bytes += len(fragment.piece.text.encode())
        self._flush()

    def _leave_out(self, fragment: Fragment) -> None:
        """Name a document that cannot be represented, and forget what is entered of it."""
        self._skips = True
        if not (fragment.opens and fragment.closes):
            self._pending, self._opened = [[] for _ in self.ends], []
            sizes, self.ends, self.num_bytes = self._before
            self.shelf.truncate(sizes)
        self.shelf.append_strings("left_out", [fragment.name])

    def _flush(self) -> None:
        """Write what is pending."""
        if self._opened:
            opens = np.array([name is not None for name in self._opened], dtype=bool)
            self._write(self._pending, self.pair.tables or (None,), opens)
            self.shelf.append_strings("names", [name for name in self._opened if name is not None])
            self._pending, self._opened = [[] for _ in self.ends], []

    def _write(self, sides: list[list[list[Part]]], tables: Sequence[TokenTable | None], opens: np.ndarray) -> list:
        """Append documents, or stretches of them, of which some open one; by side int64, where their tokens begin."""
        bounds = []
        for side, (documents, table) in enumerate(zip(sides, tables, strict=True)):
            stream, found = concatenate_spans(documents, table)
            first, ends = self.shelf.sizes()[f"{_SIDES[side]}_ids"], self.ends[side] + np.asarray(stream.ends)
            if not side:
                at = found[:-1][opens]
                self.shelf.append("starts", np.where(at > 0, ends[at - 1], self.ends[side]))
            for name in ("ids", "has_dummy", "is_target"):
                self.shelf.append(f"{_SIDES[side]}_{name}", getattr(stream, name))
            if self.pair.tables is not None:
                self.shelf.append(f"{_SIDES[side]}_ends", ends)
            self.ends[side] = int(ends[-1]) if len(ends) else self.ends[side]
            bounds.append(first + found)
        return bounds

    def _add_conversations(self, talks: list[Conversation], writers: list) -> None:
        """Enter a lot of conversations, each cut where it exceeds `limits`."""
        rendered, facts = render(talks, self.pair, writers), self.shelf.facts
        names, left_out, truncated = [], rendered.left_out, []
        sides: list[list[list[Part]]] = [[] for _ in self.ends]
        facts["without_template"] = list(rendered.without_template)
        for name, *whole in zip(rendered.names, *rendered.sides, strict=True):
            kept = within(whole, rendered.tables, self.limits) if self.limits else whole
            if kept is None:
                left_out.append(f"{name} (no response begins within a block)")
                continue
            for side, parts in zip(sides, kept, strict=True):
                side.append(parts)
            names.append(name)
            responses = (part for part in kept[0] if part.kind == RESPONSE)
            self.num_bytes += sum(int(rendered.tables[0].lengths[p.ids].sum()) - p.has_dummy for p in responses)
            lost = _num_tokens(whole[0], learned=True) - _num_tokens(kept[0], learned=True)
            facts["dropped_tokens"] += lost
            truncated += [name] if lost else []
        if names:
            bounds = self._write(sides, self.pair.tables or (None,), np.ones(len(names), dtype=bool))
            student, teacher = bounds[0], bounds[-1]
            self.shelf.append("conversations", np.stack([student[:-1], student[1:], teacher[:-1], teacher[1:]], axis=1))
        for column, texts in (("names", names), ("left_out", left_out), ("truncated", truncated)):
            self.shelf.append_strings(column, texts)


def within(whole: list[list[Part]], tables: list[TokenTable], limits: tuple[int, int]) -> list[list[Part]] | None:
    """A conversation on each side, cut at the last place within the limits where both end a token.

    None if nothing that is to be learned is left
    """
    if _num_tokens(whole[0]) <= limits[0] and _num_tokens(whole[-1]) <= limits[1]:
        return whole
    ends = [concatenate_spans([parts], table)[0].ends for parts, table in zip(whole, tables, strict=True)]
    try:
        block: Block = next(cut_blocks(ends[0], ends[-1], *limits))
    except UsageError:
        return None
    kept = [_first(parts, end) for parts, end in zip(whole, (block.student_end, block.teacher_end), strict=False)]
    return kept if all(_num_tokens(parts, learned=True) for parts in kept) else None


def _first(parts: list[Part], num_tokens: int) -> list[Part]:
    """The first tokens of a conversation."""
    kept: list[Part] = []
    for part in parts:
        if num_tokens > 0:
            kept.append(part._replace(ids=part.ids[:num_tokens]))
        num_tokens -= len(part.ids)
    return kept


def _num_tokens(parts: list[Part], learned: bool = False) -> int:
    return sum(len(part.ids) for part in parts if part.kind >= RESPONSE or not learned)


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

"""Documents as two streams of tokens over the same bytes.

Plain documents are joined, an end-of-text token after each, once in each tokenizer's tokens. Nothing of them is
dropped: a document that a tokenizer cannot represent is left out by name. Conversations follow, each a block of its
own, cut short where it exceeds a block. Text is taken lot by lot; the streams of a large one stay on the disk.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sar_kd.alignment import TokenizerPair
from sar_kd.blocks import Block, Blocks, cut_blocks
from sar_kd.config import UsageError
from sar_kd.conversation import Conversation, render, writers_of
from sar_kd.documents import Documents, Sample
from sar_kd.fragments import Fragment, conversations_of, encode_lot, lots_of
from sar_kd.reading import reading_bar
from sar_kd.shelf import Shelf, Strings, strings_of
from sar_kd.token_cache import TokenCache
from sar_kd.token_stream import RESPONSE, STOP, Counting, Part, TokenStream, lay
from sar_kd.tokens import TokenTable, fingerprint

_SIDES = ("student", "teacher")


@dataclass(frozen=True)
class JoinedText:
    """All documents as one stream for each model; one and the same where the tokenizers are equal."""

    student: TokenStream
    teacher: TokenStream
    names: Sequence[str]
    """Names of the documents, in order."""
    starts: np.ndarray
    """int64: where each of them starts, in the unit of `TokenStream.ends`."""
    num_bytes: int
    """Bytes of the text that is predicted."""
    left_out: Sequence[str]
    """Names of the documents that are empty or that a tokenizer cannot represent, of conversations with the reason."""
    conversations: Blocks
    """The last documents: one block each."""
    truncated: Sequence[str]
    """Names of the conversations that are cut short."""
    dropped_tokens: int
    """Tokens that the student would predict in what is cut off."""
    without_template: tuple[str, ...]
    """'student', 'teacher': whose conversations are written in our template, for want of its own."""


def join(
    documents: Sequence[Sample] | Documents,
    pair: TokenizerPair,
    limits: tuple[int, int] | None = None,
    cache: TokenCache | None = None,
) -> JoinedText:
    """Tokenize every document on both sides and join them, plain documents before conversations.

    limits: most tokens of a conversation for the student and the teacher, start token excluded; None for no limit
    cache: where the tokens of a large text are kept; None keeps all of it in memory
    Raises: UsageError if none of them can be represented
    """

    def build(shelf: Shelf) -> None:
        _Joiner(pair, limits, shelf).join(documents, cache)

    if cache is not None and isinstance(documents, Documents):
        columns, facts = cache.get(_what(documents, pair, limits), build, documents.num_chars)
    else:
        shelf = Shelf()
        build(shelf)
        columns, facts = shelf.finish(), shelf.facts
    streams = [_stream(columns, side, pair) for side in _SIDES[: facts["sides"]]]
    names, left_out, truncated = (strings_of(columns, name) for name in ("names", "left_out", "truncated"))
    if not len(names):
        shown = ", ".join(left_out[:3])
        remedy = "; raise --block_size" if any("within a block" in name for name in left_out) else ""
        raise UsageError(f"--train_file: no document holds text that both tokenizers can represent ({shown}){remedy}")
    return JoinedText(
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


def _what(documents: Documents, pair: TokenizerPair, limits: tuple[int, int] | None) -> dict:
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
    """Writes the columns of a `JoinedText`."""

    def __init__(self, pair: TokenizerPair, limits: tuple[int, int] | None, shelf: Shelf):
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

    def join(self, documents: Sequence[Sample] | Documents, cache: TokenCache | None) -> None:
        """Enter all documents, plain ones first."""
        is_large, num_chars = isinstance(documents, Documents), 0
        if isinstance(documents, Documents):
            num_chars, talks = documents.num_chars, documents.has_conversations
        else:
            talks = any(isinstance(sample, Conversation) for sample in documents)
        with reading_bar(num_chars, is_large) as bar:
            for number, size in enumerate(self._lots(documents, talks)):
                bar.update(size)
                if not number and cache is not None and is_large:
                    cache.require_room(self.shelf.num_bytes() * (num_chars - size) // max(1, size))
        self.shelf.facts["num_bytes"] = self.num_bytes

    def _lots(self, documents: Sequence[Sample] | Documents, talks: bool) -> Iterator[int]:
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
            stream, found = lay(documents, table)
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
    ends = [lay([parts], table)[0].ends for parts, table in zip(whole, tables, strict=True)]
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


def cut(text: JoinedText, max_student: int, max_teacher: int) -> Blocks:
    """All blocks of a text: plain documents packed as by `cut_blocks`, then the conversations, one block each.

    Raises: UsageError as `cut_blocks`
    """
    talks = text.conversations
    sizes = talks[0][::2] if len(talks) else (len(text.student.ids), len(text.teacher.ids))
    plain = Blocks.of(cut_blocks(text.student.ends, text.teacher.ends, max_student, max_teacher, sizes))
    return Blocks(np.concatenate([plain.ranges, talks.ranges]))

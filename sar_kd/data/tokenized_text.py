"""Documents to two token streams over the same bytes.

An end-of-text token follows each plain document; a start token precedes it on the side that has one.

Plain documents come first, then conversations, each a block of its own and cut short where it exceeds one. Text is
encoded chunk by chunk, so that it need not fit into memory; the streams of a large text stay on the disk. A line of a
document that a tokenizer changes is skipped and counted, a conversation as a whole; a text that would lose too much is
refused.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sar_kd.data.chat.encoding import ChatTemplate, chat_templates, num_tokens, render, truncate_conversation
from sar_kd.data.column_store import Column, ColumnStore, strings_of
from sar_kd.data.document_pieces import encode_chunk, pieces_of, without_changed_lines
from sar_kd.data.files.samples import Conversation
from sar_kd.data.files.sources import Documents, StreamedDocuments
from sar_kd.data.skipped import MAX_SKIPPED_SHARE, TOO_LONG, unusable
from sar_kd.data.token_cache import TokenCache
from sar_kd.errors import UsageError
from sar_kd.runtime.console import tokenizing_bar
from sar_kd.tokenization.long_text import TextPiece
from sar_kd.tokenization.token_stream import (
    FORMAT,
    RESPONSE,
    STOP,
    TEMPLATE,
    Blocks,
    Span,
    TokenCount,
    TokenizedText,
    TokenStream,
    concatenate_spans,
)
from sar_kd.tokenization.token_table import CONTENT, TokenTable, fingerprint
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.version import TOKEN_FORMAT

_SIDES = ("student", "teacher")

_CHUNK = 2**20
"""Characters encoded at once: a tokenizer takes some fifty bytes for each, and shares them among its threads."""


def tokenize(
    documents: Documents,
    pair: TokenizerPair,
    limits: tuple[int, int] | None = None,
    cache: TokenCache | None = None,
    option: str = "--train_file",
) -> TokenizedText:
    """Encode all documents with both tokenizers, plain documents before conversations.

    limits: most tokens of a conversation for student and teacher, start token excluded; None for no limit
    cache: for the tokens of a large text; None: all of it stays in memory
    option: that names the text, for an error
    Raises: UsageError if a tokenizer changes too much of the text, or no document is left
    """

    def build(store: ColumnStore) -> None:
        _TextWriter(pair, limits, store).add(documents, cache)

    if cache is not None and isinstance(documents, StreamedDocuments):
        columns, metadata = cache.get(_cache_key(documents, pair, limits), build, documents.num_chars)
    else:
        store = ColumnStore()
        build(store)
        columns, metadata = store.finalize(), store.metadata
    _check_changed(metadata)
    names, skipped, passages, truncated, dropped_answers = (
        strings_of(columns, name)
        for name in ("names", "skipped_documents", "skipped_passages", "truncated", "dropped_answers")
    )
    if not len(names):
        raise unusable(option, skipped, len(skipped))
    streams = [_stream(columns, side, pair) for side in _SIDES if f"{side}_ids" in columns]
    return TokenizedText(
        student=streams[0],
        teacher=streams[-1],
        names=names,
        starts=columns["starts"],
        num_bytes=metadata["num_bytes"],
        document_bytes=np.diff(np.append(columns["byte_starts"], metadata["num_bytes"])),
        skipped_documents=skipped,
        conversations=Blocks(columns["conversations"]),
        truncated=truncated,
        dropped_tokens=metadata["dropped_tokens"],
        without_template=tuple(metadata["without_template"]),
        dropped_answers=dropped_answers,
        stop_ids=tuple(map(tuple, metadata["stop_ids"])),
        inner_ids=tuple(map(tuple, metadata["inner_ids"])),
        skipped_passages=passages,
        skipped_bytes=metadata["changed_bytes"],
    )


def _stream(columns: dict[str, np.ndarray], side: str, pair: TokenizerPair) -> TokenStream:
    ids = columns[f"{side}_ids"]
    ends = TokenCount(len(ids)) if pair.tables is None else columns[f"{side}_ends"]
    return TokenStream(ids, ends, columns[f"{side}_has_dummy"], columns[f"{side}_is_target"])


def _cache_key(documents: StreamedDocuments, pair: TokenizerPair, limits: tuple[int, int] | None) -> dict:
    """All that the streams depend on."""
    return {
        "text": documents.digest,
        "tokenizers": [fingerprint(pair.student), fingerprint(pair.teacher), importlib.metadata.version("tokenizers")],
        "format": TOKEN_FORMAT,
        "ends": [pair.student_start, pair.student_end, pair.teacher_start, pair.teacher_end, pair.document_starts],
        "tables": [[*table.end_ids, table.dummy_prefix, table.nfc] for table in pair.tables or ()],
        "limits": limits if documents.has_conversations else None,
        "date": pair.template_date if documents.has_conversations and pair.dated_templates else None,
    }


def _check_changed(metadata: dict) -> None:
    """Raise UsageError if too much of the text is skipped because a tokenizer changes it."""
    share = metadata["changed_bytes"] / max(1, metadata["changed_bytes"] + metadata["num_bytes"])
    if share > MAX_SKIPPED_SHARE:
        whose, example = metadata["first_change"]
        raise UsageError(
            f"--{whose}_model: its tokenizer changes text ({example}); {share:.1%} of the bytes would be skipped, more "
            f"than {MAX_SKIPPED_SHARE:.0%}; use another model"
        )


class _StreamColumns:
    """The columns of one `TokenStream`."""

    def __init__(self, store: ColumnStore, side: str, has_ends: bool):
        self.ids = store.add(f"{side}_ids", "int32")
        self.has_dummy = store.add(f"{side}_has_dummy", "bool")
        self.is_target = store.add(f"{side}_is_target", "bool")
        self.ends: Column | None = store.add(f"{side}_ends", "int64") if has_ends else None
        self.last_end = 0
        """Where the last token ends"""

    def append(self, stream: TokenStream) -> np.ndarray:
        """Append tokens; int64 [N], where each ends in the whole stream."""
        ends = self.last_end + np.asarray(stream.ends)
        self.ids.append(stream.ids)
        self.has_dummy.append(stream.has_dummy)
        self.is_target.append(stream.is_target)
        if self.ends is not None:
            self.ends.append(ends)
        self.last_end = int(ends[-1]) if len(ends) else self.last_end
        return ends


class _TextWriter:
    """Appends documents to the columns of a `TokenizedText`."""

    def __init__(self, pair: TokenizerPair, limits: tuple[int, int] | None, store: ColumnStore):
        self.pair, self.limits, self.store = pair, limits, store
        self.tables: Sequence[TokenTable | None] = pair.tables or (None,)
        """One for each stream: a single stream where the tokenizers are equal"""
        self.streams = [_StreamColumns(store, _SIDES[i], table is not None) for i, table in enumerate(self.tables)]
        self.starts = store.add("starts", "int64")
        self.byte_starts = store.add("byte_starts", "int64")
        self.conversations = store.add("conversations", "int64", 4)
        self.names = store.add_strings("names")
        self.skipped_documents = store.add_strings("skipped_documents")
        self.skipped_passages = store.add_strings("skipped_passages")
        self.truncated = store.add_strings("truncated")
        self.dropped_answers = store.add_strings("dropped_answers")
        self._stop_ids: list[set[int]] = [set() for _ in self.streams]
        """By stream, the special tokens that end a document or an answer, and those that stand inside an answer"""
        self._inner_ids: list[set[int]] = [set() for _ in self.streams]
        self.num_bytes = self.dropped_tokens = self.changed_bytes = 0
        self.without_template: tuple[str, ...] = ()
        self._templates: list[ChatTemplate] = []
        self.first_change: tuple[str, str] | None = None
        """Whose tokenizer first changes text, and how"""
        self._pending: list[list[list[Span]]] = [[] for _ in self.streams]
        """By stream, pieces of plain documents that are not appended yet"""
        self._pending_names: list[str | None] = []
        """Of each pending piece, the name of the document that begins with it"""
        self._pending_byte_starts: list[int] = []
        """Of each pending document, `num_bytes` before it"""
        self._is_begun = self._is_void = False
        """Of the document at hand: something is appended, or pending; it cannot be encoded, or is empty"""
        self._changed_by: list[str] = []
        """For each line of the document at hand that is skipped, whose tokenizer changes it"""
        self._checkpoint: tuple[dict[str, int], list[int], int, int] = {}, [], 0, 0
        """Sizes of the columns, last ends, `num_bytes` and `changed_bytes` before a document of several pieces"""

    def add(self, documents: Documents, cache: TokenCache | None) -> None:
        """Append all documents, and set the store's metadata."""
        is_large = isinstance(documents, StreamedDocuments)
        num_chars = documents.num_chars if isinstance(documents, StreamedDocuments) else 0
        with tokenizing_bar(num_chars, is_large) as bar:
            for number, size in enumerate(self._add_chunks(documents)):
                bar.update(size)
                if not number and cache is not None and is_large:
                    cache.require_disk_space(self.store.num_bytes() * (num_chars - size) // max(1, size))
        self.store.metadata = {
            "num_bytes": self.num_bytes,
            "dropped_tokens": self.dropped_tokens,
            "without_template": list(self.without_template),
            "changed_bytes": self.changed_bytes,
            "first_change": self.first_change,
            "stop_ids": [sorted(stops - inner) for stops, inner in zip(self._stop_ids, self._inner_ids, strict=True)],
            "inner_ids": [sorted(inner) for inner in self._inner_ids],
        }

    def _add_chunks(self, documents: Documents) -> Iterator[int]:
        """Append the documents chunk by chunk; yields the characters of each chunk after it is appended."""
        for pieces in _in_chunks(pieces_of(documents, self.pair)):
            self._add_plain(pieces)
            yield sum(piece.num_chars for piece in pieces)
        if isinstance(documents, StreamedDocuments) and not documents.has_conversations:
            return
        found = (sample for sample in documents if isinstance(sample, Conversation))
        for conversations in _in_chunks(found):
            self.skipped_documents.append([f"{each.name} ({each.fault})" for each in conversations if each.fault])
            sound = [conversation for conversation in conversations if not conversation.fault]
            if sound:
                self._templates = self._templates or chat_templates(self.pair)
                self._add_conversations(sound)
            yield sum(conversation.num_chars for conversation in conversations)

    def _add_plain(self, pieces: list[TextPiece]) -> None:
        """Append a chunk of plain text: all of it is predicted, and the end of each document, but not its start."""
        for piece, ids, dummies in encode_chunk(pieces, self.pair):
            if piece.is_first:
                self._begin_document(piece)
            if None in dummies:
                piece, ids, dummies = self._skip_changed_lines(piece, ids, dummies)
            elif not len(ids[0]) and not self._is_void:
                self._take_back()
            if not self._is_void and (len(ids[0]) or (piece.is_last and self._is_begun)):
                self._add_piece(piece, ids, dummies)
            if piece.is_last and self._is_begun:
                self.skipped_passages.append([f"{piece.document} ({_changed(whose)} it)" for whose in self._changed_by])
            elif piece.is_last:
                reason = f" ({_changed(self._changed_by[0])} its text)" if self._changed_by else ""
                self.skipped_documents.append([piece.document + reason])
        self._flush()

    def _begin_document(self, piece: TextPiece) -> None:
        self._is_begun = self._is_void = False
        self._changed_by = []
        if not piece.is_last:
            self._flush()
            last_ends = [stream.last_end for stream in self.streams]
            self._checkpoint = self.store.sizes(), last_ends, self.num_bytes, self.changed_bytes

    def _skip_changed_lines(self, piece: TextPiece, ids: Sequence, dummies: Sequence[int | None]) -> tuple:
        """A piece without the lines that a tokenizer changes; its ids and dummies."""
        side = dummies.index(None)
        change = self.pair.token_tables[side].describe_change(ids[side], piece.text)
        self.first_change = self.first_change or (_SIDES[side], change)
        kept, sides = without_changed_lines(piece, self.pair)
        self._changed_by += [_SIDES[side] for side in sides]
        self.changed_bytes += len(piece.text.encode()) - len(kept[0].text.encode())
        return kept

    def _add_piece(self, piece: TextPiece, ids: Sequence, dummies: Sequence[int]) -> None:
        self._pending_byte_starts += [] if self._is_begun else [self.num_bytes]
        # A space that both tokenizers put before the text is text; one that only one of them puts is not.
        is_text = all(dummies)
        for side, (own, dummy) in enumerate(zip(ids, dummies, strict=True)):
            start = () if self._is_begun else self.pair.document_starts[side]
            spans = [Span(start, TEMPLATE)] if start else []
            spans += [Span(own, RESPONSE, bool(dummy), is_text)] if len(own) else []
            if piece.is_last:
                end = (self.pair.student_end, self.pair.teacher_end)[side]
                spans.append(Span([end], STOP))
                self._stop_ids[side].add(end)
            self._pending[side].append(spans)
        self._pending_names.append(None if self._is_begun else piece.document)
        self.num_bytes += len(piece.text.encode())
        self._is_begun = True

    def _take_back(self) -> None:
        """Skip the document at hand, which cannot be encoded or is empty, and take back what is appended of it."""
        if self._is_begun or self._changed_by:
            sizes, last_ends, self.num_bytes, self.changed_bytes = self._checkpoint
            self._pending, self._pending_names, self._pending_byte_starts = [[] for _ in self.streams], [], []
            self.store.truncate(sizes)
            for stream, last_end in zip(self.streams, last_ends, strict=True):
                stream.last_end = last_end
        self._is_begun, self._is_void, self._changed_by = False, True, []

    def _flush(self) -> None:
        """Append what is pending."""
        if self._pending_names:
            self._append(self._pending, np.array([name is not None for name in self._pending_names]))
            self.names.append([name for name in self._pending_names if name is not None])
            self.byte_starts.append(self._pending_byte_starts)
            self._pending, self._pending_names, self._pending_byte_starts = [[] for _ in self.streams], [], []

    def _append(self, sides: list[list[list[Span]]], is_first: np.ndarray) -> list[np.ndarray]:
        """Append documents, or pieces of which some are the first of a document.

        Returns: by stream int64, the number of tokens before each, and of all
        """
        bounds = []
        for side, (documents, table, columns) in enumerate(zip(sides, self.tables, self.streams, strict=True)):
            stream, found = concatenate_spans(documents, table)
            num_before, end_before = len(columns.ids), columns.last_end
            ends = columns.append(stream)
            if not side:
                firsts = found[:-1][is_first]
                self.starts.append(np.where(firsts > 0, ends[firsts - 1], end_before))
            bounds.append(num_before + found)
        return bounds

    def _add_conversations(self, conversations: list[Conversation]) -> None:
        """Append a chunk of conversations, each cut short where it exceeds `limits`."""
        rendered = render(conversations, self._templates)
        limits = self.limits and (self.limits[0] + 1, self.limits[1] + 1)  # their own first token is the start token
        self._check_ids(rendered.sides)
        names, skipped, truncated = [], rendered.skipped_documents, []
        sides: list[list[list[Span]]] = [[] for _ in self.streams]
        self.without_template = rendered.without_template
        self.changed_bytes += rendered.changed_bytes
        changes = ((template.whose, template.change) for template in self._templates if template.change)
        self.first_change = self.first_change or next(changes, None)
        for name, *whole in zip(rendered.names, *rendered.sides, strict=True):
            kept = truncate_conversation(whole, rendered.tables, limits) if limits else whole
            if kept is None:
                skipped.append(f"{name} ({TOO_LONG})")
                continue
            for number, spans in enumerate(kept):
                sides[number].append(spans)
                kinds = rendered.tables[number].kinds
                lasts = {int(span.ids[-1]) for span in spans if span.kind == STOP}
                self._stop_ids[number] |= {token for token in lasts if kinds[token] != CONTENT}
                inner = {int(token) for span in spans if span.kind == FORMAT for token in span.ids}
                self._inner_ids[number] |= {token for token in inner if kinds[token] != CONTENT}
            names.append(name)
            self.byte_starts.append([self.num_bytes])
            responses = (span for span in kept[0] if span.kind == RESPONSE)
            self.num_bytes += sum(int(rendered.tables[0].lengths[s.ids].sum()) - s.has_dummy for s in responses)
            dropped = num_tokens(whole[0], targets=True) - num_tokens(kept[0], targets=True)
            self.dropped_tokens += dropped
            truncated += [name] if dropped else []
        if names:
            bounds = self._append(sides, np.ones(len(names), dtype=bool))
            student, teacher = bounds[0], bounds[-1]
            self.conversations.append(np.stack([student[:-1], student[1:], teacher[:-1], teacher[1:]], axis=1))
        self.names.append(names)
        self.skipped_documents.append(skipped)
        self.truncated.append(truncated)
        self.dropped_answers.append(rendered.dropped_answers)

    def _check_ids(self, sides: list[list[list[Span]]]) -> None:
        """Raise UsageError if a chat template writes a token that its model has no logits for."""
        pair, sizes = self.pair, (self.pair.student_vocab_size, self.pair.teacher_vocab_size)
        for side, (tokenizer, conversations) in enumerate(zip(pair.tokenizers, sides, strict=True)):
            size = sizes[side] if pair.tables is not None else min(sizes)
            if max(tokenizer.get_vocab().values()) < size:
                continue
            largest = max((max(span.ids, default=0) for spans in conversations for span in spans), default=0)
            if largest >= size:
                token = tokenizer.convert_ids_to_tokens(int(largest))
                raise UsageError(
                    f"--{_SIDES[side]}_model: its chat template writes {token!r} (id {largest}), for which the model "
                    f"has no logits (its vocab_size is {size}); resize its embeddings, or leave out conversations"
                )


def _changed(whose: str) -> str:
    return f"the {whose}'s tokenizer changes"


def _in_chunks(items: Iterable) -> Iterator[list]:
    """Items with `num_chars`, in lists of about `_CHUNK` characters."""
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += item.num_chars
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk

"""The classes of tokens that two vocabularies share: which coarse tokens begin as which fine token.

At a common boundary, all coarse tokens that the finer tokenizer would begin with the same token are one class. Inside a
coarse token, after its prefix p, every coarse token that extends p and that the finer tokenizer would split after p
belongs to the class of the fine token that comes next; that the coarse token is p itself is one class more. Coarse and
fine are the two roles in one map: there is a map for each direction.

Source: byte-prefix marginalisation (arXiv 2607.22334), here with the finer tokenizer's own segmentation instead of a
residual bucket, with the end of the coarse token as a class, corrected by the text, and never without a class for a
token that only the finer vocabulary has.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sar_kd.runtime.garbage import no_garbage_collection
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_stream import TokenizedText
from sar_kd.tokenization.token_table import TokenTable
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_MAJORITY, _MIN_COUNT = 0.5, 3
"""The text corrects a segmentation by this share of at least so many occurrences."""

_MAX_CONVERSATIONS = 1000
"""Conversations that are searched for the student's ends of a text"""


@dataclass(frozen=True)
class ClassTable:
    """Tokens of both vocabularies by class; a token without a class takes no part."""

    num_classes: int
    coarse_tokens: np.ndarray
    """int64 [M]"""
    coarse_classes: np.ndarray
    """int64 [M]: in [0, num_classes); each class occurs, but for the token end where `can_end` is not set"""
    fine_tokens: np.ndarray
    """int64 [M']"""
    fine_classes: np.ndarray
    """int64 [M']: in [0, num_classes); each class occurs, but for the last after a prefix, the token end"""
    representatives: np.ndarray
    """int64 [num_classes], one less after a prefix: a fine token that stands for the class"""
    prefix: bytes = b""
    """The bytes of the coarse token before; empty at a common boundary"""
    can_end: bool = False
    """After a prefix: the coarse vocabulary has a token that is the prefix itself"""


class _SortedVocabulary:
    """A vocabulary sorted by bytes, so that the tokens that extend a prefix are one slice."""

    def __init__(self, table: TokenTable):
        self._table = table
        content = sorted((i for i, piece in enumerate(table.pieces) if piece), key=table.pieces.__getitem__)
        self.ids = np.array(content, dtype=np.int64)
        self._pieces = [table.pieces[i] for i in content]
        self.by_bytes: dict[bytes, int] = {}
        for index in sorted(content):
            piece = table.pieces[index]
            # A byte-fallback token shares its byte with the ordinary token, which the tokenizer writes.
            if piece not in self.by_bytes or self.by_bytes[piece] in table.unwritten:
                self.by_bytes[piece] = index
        self._longest = max(map(len, self._pieces), default=0)

    def extensions(self, prefix: bytes) -> np.ndarray:
        """The tokens that start with `prefix` and are longer."""
        low = bisect_left(self._pieces, prefix + b"\x00")
        return self.ids[low : bisect_left(self._pieces, _upper_bound(prefix), lo=low)]

    def longest_matches(self, text: bytes) -> list[int]:
        """The tokens of `text`, always the longest that fits; incomplete where none does."""
        tokens, position = [], 0
        while position < len(text):
            lengths = range(min(len(text) - position, self._longest), 0, -1)
            parts = (text[position : position + length] for length in lengths)
            token = next((self.by_bytes[part] for part in parts if part in self.by_bytes), None)
            if token is None:
                break
            tokens.append(token)
            position += len(self._table.pieces[token])
        return tokens


def _upper_bound(prefix: bytes) -> bytes:
    """The smallest byte string above every string that starts with `prefix` (valid UTF-8 never ends in 0xFF)."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\xff" * (len(prefix) + 64)


class VocabularyMap:
    """The shared classes of a coarse and a fine vocabulary, at a common boundary and after a prefix of a coarse token.

    A coarse token is segmented into the fine token of the same bytes if there is one, else as the finer tokenizer
    segments the bytes standing alone, else by the longest matches. The text that follows can change a segmentation:
    three spaces before a word are a token for one tokenizer and the beginning of a token of four for another. So the
    text corrects the segmentations (`fit_`).
    """

    @no_garbage_collection()
    def __init__(self, coarse: TokenTable, fine: TokenTable, fine_tokenizer):
        self._coarse_table, self._fine_table = coarse, fine
        self._coarse, self._fine = _SortedVocabulary(coarse), _SortedVocabulary(fine)
        self._representative = np.arange(len(fine.pieces))
        self._tables: dict[bytes, ClassTable | None] = {}
        self._tokens_by_prefix: dict[bytes, list[int]] = {}  # coarse tokens that are split after these bytes
        self._next_fine: dict[tuple[int, int], int] = {}  # coarse token, prefix length -> the fine token that follows
        for token, fine_ids in self._segmentations(fine_tokenizer):
            piece, position = coarse.pieces[token], 0
            for fine_id in fine_ids:
                self._tokens_by_prefix.setdefault(piece[:position], []).append(token)
                self._next_fine[token, position] = fine_id
                position += len(fine.pieces[fine_id])

    def _segmentations(self, tokenizer) -> Iterator[tuple[int, list[int]]]:
        """Every coarse token that has bytes, with the fine tokens that they are segmented into."""
        # Llama-type tokenizers put a space before the first word, so the bytes are encoded after a newline.
        anchor = b"\n" if self._fine_table.dummy_prefix else b""
        texts, owners = [], []
        for token in self._coarse.ids.tolist():
            piece = self._coarse_table.pieces[token]
            if piece in self._fine.by_bytes:
                yield token, [self._fine.by_bytes[piece]]
                continue
            text = (anchor + piece).decode("utf-8", "replace")
            if "\ufffd" in text or self._fine_table.canonical(text) != text:
                yield token, self._fine.longest_matches(piece)
            else:
                texts.append(text)
                owners.append(token)
        pieces = self._fine_table.pieces
        for token, ids in zip(owners, encode(tokenizer, texts), strict=True):
            piece, fine_ids = self._coarse_table.pieces[token], list[int]()
            missing = len(piece)
            while ids and missing > 0:  # from the end, to leave out the anchor and the space before it
                fine_ids.insert(0, ids.pop())
                missing -= len(pieces[fine_ids[0]])
            fine_ids = [i for i in fine_ids if pieces[i]]
            is_exact = b"".join(pieces[i] for i in fine_ids) == piece
            yield token, fine_ids if is_exact else self._fine.longest_matches(piece)

    def fit_(self, coarse_tokens: np.ndarray, prefix_lengths: np.ndarray, fine_tokens: np.ndarray) -> None:
        """Correct the segmentations by what occurs in a text.

        The fine token that mostly follows a prefix of a coarse token in the text becomes the one that does. A fine
        token that even so mostly occurs where another one is expected is merged into that one's class: else the student
        would learn that it is rare.

        coarse_tokens, prefix_lengths, fine_tokens: int64 [N]; a coarse token, bytes of it that came before, and the
        fine token that starts there in the text
        """
        keys, counts = np.unique(np.stack([coarse_tokens, prefix_lengths, fine_tokens]), axis=1, return_counts=True)
        occurrences: dict[tuple[int, int], dict[int, int]] = {}
        for token, position, fine_id, count in zip(*keys.tolist(), counts.tolist(), strict=True):
            if (token, position) in self._next_fine and self._fine_table.pieces[fine_id]:
                occurrences.setdefault((token, position), {})[fine_id] = count
        expected: dict[int, dict[int, int]] = {}  # by fine token: how often it occurred where which one is expected
        for place, seen in occurrences.items():
            total, most_frequent = sum(seen.values()), max(seen, key=seen.__getitem__)
            if total >= _MIN_COUNT and seen[most_frequent] > _MAJORITY * total:
                self._next_fine[place] = most_frequent
            for fine_id, count in seen.items():
                others = expected.setdefault(fine_id, {})
                others[self._next_fine[place]] = others.get(self._next_fine[place], 0) + count
        for fine_id, seen in expected.items():
            other = max(seen, key=seen.__getitem__)
            if other != fine_id and seen[other] >= max(_MIN_COUNT, _MAJORITY * sum(seen.values())):
                merged = self._representative == self._representative[fine_id]
                self._representative[merged] = self._representative[other]

    def at_common_boundary(self) -> ClassTable:
        """The classes where both tokenizers start a token, the tokens without bytes that both have among them.

        A start token is no end of a text, so the two are never one class, however they are spelled.
        """
        coarse, fine = self._coarse_table, self._fine_table
        by_string = {string: i for i, string in enumerate(fine.strings) if string and not fine.pieces[i]}
        pairs = {i: by_string[s] for i, s in enumerate(coarse.strings) if s in by_string and not coarse.pieces[i]}
        if coarse.has_own_start and fine.has_own_start:
            pairs[coarse.start_id] = fine.start_id
        pairs[coarse.end_id] = fine.end_id
        pairs = {i: j for i, j in pairs.items() if not _is_start_and_end(coarse, i, fine, j)}
        special = set(pairs.values())
        if not (pairs.keys() >= set(coarse.end_ids) and special >= set(fine.end_ids)):
            # Where the ways to end a text do not correspond one to one, that it ends is one class.
            pairs |= dict.fromkeys(coarse.end_ids, fine.end_id)
            special |= set(fine.end_ids)
            self._representative[list(fine.end_ids)] = fine.end_id
        return self._build_table(b"", pairs, sorted(special))

    def continuations(self, prefix: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The coarse tokens that spell `prefix` or extend it, and the fine token that comes after `prefix` in each.

        None for an empty prefix, that of a token without bytes.
        Returns: int64 [M] and [M]; -1 for the token that ends there, which comes last; a fine token stands for those
        that the text merges with it; coarse tokens that are not split after `prefix` are left out
        """
        tokens = np.array(self._tokens_by_prefix.get(prefix, []) if prefix else [], dtype=np.int64)
        following = np.array([self._next_fine[token, len(prefix)] for token in tokens.tolist()], dtype=np.int64)
        end = [self._coarse.by_bytes[prefix]] if prefix in self._coarse.by_bytes else []
        following = np.append(self._representative[following], np.full(len(end), -1))
        return np.append(tokens, np.array(end, dtype=np.int64)), following

    def after_prefix(self, prefix: bytes) -> ClassTable | None:
        """The classes after a coarse token, or a part of one, that spells `prefix`; None if no token extends it."""
        if prefix not in self._tables:
            can_continue = prefix and prefix in self._tokens_by_prefix
            self._tables[prefix] = self._build_table(prefix, {}, []) if can_continue else None
        return self._tables[prefix]

    def _build_table(self, prefix: bytes, special_pairs: dict[int, int], special_fine: list[int]) -> ClassTable:
        """The classes after `prefix`, the token end as the last; or those at a common boundary.

        special_pairs: the fine token of each coarse one without bytes; special_fine: all fine ones without bytes that
        have a class
        """
        coarse_tokens = np.array(self._tokens_by_prefix.get(prefix, []), dtype=np.int64)
        following = np.array([self._next_fine[token, len(prefix)] for token in coarse_tokens.tolist()], dtype=np.int64)
        if not prefix:
            following = self._match_spelling(coarse_tokens, following)
        fine_tokens, merged = self._merge_shared_prefixes(prefix, coarse_tokens, following)
        pairs = np.array(list(special_pairs.items()), dtype=np.int64).reshape(-1, 2)
        special = np.array(special_fine, dtype=np.int64)
        coarse_tokens = np.concatenate([coarse_tokens, pairs[:, 0]])
        following = np.concatenate([following, pairs[:, 1]])
        fine_tokens, merged = np.concatenate([fine_tokens, special]), np.concatenate([merged, special])
        representatives, coarse_classes = np.unique(self._representative[following], return_inverse=True)
        order, fine_order = np.argsort(coarse_tokens, kind="stable"), np.argsort(fine_tokens, kind="stable")
        num_classes, by_bytes = len(representatives), self._coarse.by_bytes
        end = np.array([by_bytes[prefix]] if prefix in by_bytes else [], dtype=np.int64)
        return ClassTable(
            num_classes + bool(prefix),
            np.concatenate([coarse_tokens[order], end]),
            np.concatenate([coarse_classes.reshape(-1)[order], np.full(len(end), num_classes)]),
            fine_tokens[fine_order],
            np.searchsorted(representatives, self._representative[merged])[fine_order],
            representatives,
            prefix,
            can_end=len(end) > 0,
        )

    def _match_spelling(self, coarse_tokens: np.ndarray, following: np.ndarray) -> np.ndarray:
        """Pair tokens that share their bytes with others by their spelling: equal tokenizers then give the identity."""
        fine, following = self._fine_table, following.copy()
        by_string = {string: i for i, string in enumerate(fine.strings) if string}
        for position, token in enumerate(coarse_tokens.tolist()):
            twin = by_string.get(self._coarse_table.strings[token])
            piece = self._coarse_table.pieces[token]
            if twin is not None and fine.pieces[twin] == piece == fine.pieces[following[position]]:
                following[position] = twin
        return following

    def _merge_shared_prefixes(
        self, prefix: bytes, coarse_tokens: np.ndarray, following: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The fine tokens that have a class, and for each the fine token into whose class it is merged.

        Those that follow `prefix` in a coarse token stand for themselves. One that only begins with the remainder of a
        coarse token is merged with the longest such remainder: the coarser tokenizer would emit that first, and then
        what is left of the fine token.
        """
        merged = np.full(len(self._fine_table.pieces), -1, dtype=np.int64)
        pieces, by_bytes = self._coarse_table.pieces, self._coarse.by_bytes

        def rank(pair: tuple[int, int]) -> tuple[int, bool]:
            # Of coarse tokens that share their bytes the ordinary one comes last, and overwrites the others.
            return len(pieces[pair[0]]), by_bytes[pieces[pair[0]]] == pair[0]

        for token, fine_id in sorted(zip(coarse_tokens.tolist(), following.tolist(), strict=True), key=rank):
            remainder = pieces[token][len(prefix) :]
            merged[self._fine.extensions(remainder)] = fine_id
            if remainder in self._fine.by_bytes:
                merged[self._fine.by_bytes[remainder]] = fine_id
        own = np.unique(following)
        merged[own] = own
        has_others = np.bincount(self._representative)[self._representative] > 1
        (fitted,) = (has_others & np.isin(self._representative, self._representative[own])).nonzero()
        merged[fitted] = fitted
        (fine_tokens,) = (merged >= 0).nonzero()
        return fine_tokens, merged[fine_tokens]


def as_written(pair: TokenizerPair, text: TokenizedText, num_tokens: int) -> TokenTable:
    """The student's table, without classes for tokens that it is never to write: nothing would teach it which to take.

    Of several tokens of the same bytes its tokenizer writes one. Of several ends of a text a document has the
    tokenizer's own, and a conversation that of the chat template. A token that the teacher has too keeps its class.

    num_tokens: so many of the student's tokens in `text` are searched for what is written
    """
    (student, teacher), stream = pair.token_tables, text.student
    spellings = {string: piece for string, piece in zip(teacher.strings, teacher.pieces, strict=True) if piece}
    common = {i for i in student.unwritten if spellings.get(student.strings[i]) == student.pieces[i]}
    written = common.union(np.unique(stream.ids[:num_tokens]).tolist())
    ends: set[int] = set()
    for block in text.conversations[:_MAX_CONVERSATIONS]:
        part = slice(block.student_start, block.student_end)
        ends.update(np.intersect1d(stream.ids[part][stream.is_target[part]], student.end_ids).tolist())
    if len(text.names) > len(text.conversations):
        ends.add(student.end_id)
    return student if pair.equal else student.as_written(sorted(ends) or student.end_ids, written)


def _is_start_and_end(one: TokenTable, token: int, other: TokenTable, other_token: int) -> bool:
    """Does one token only start texts and the other one end them?"""
    sides = (one, token, other, other_token), (other, other_token, one, token)
    return any(a.has_own_start and i == a.start_id and j in b.end_ids for a, i, b, j in sides)


def same_token_map(student: TokenTable, teacher: TokenTable) -> np.ndarray:
    """int64 [V_t]: the student token of exactly the same bytes as each teacher token, -1 where there is none.

    Of tokens that share their bytes only the one that is written counts. Every end of a text maps to the end of a text.
    """
    student_ids, student_of = _SortedVocabulary(student).by_bytes, np.full(len(teacher.pieces), -1, dtype=np.int64)
    for piece, index in _SortedVocabulary(teacher).by_bytes.items():
        student_of[index] = student_ids.get(piece, -1)
    student_of[list(teacher.end_ids)] = student.end_id
    return student_of

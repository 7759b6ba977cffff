"""The outcomes that two vocabularies share: which tokens of the one begin as which token of the other.

The coarser vocabulary is carried onto the finer. Where both start a token, all tokens of the coarser side that the
finer would begin with the same token are one outcome. Where the finer side starts a token and the coarser has just
written the bytes p, the coarser token may go on: every token that extends p, and that the finer side would cut after
p, is part of the outcome of the token with which the finer side goes on; that the coarser token is p itself is one
outcome more.

Source: byte-prefix marginalisation (arXiv 2607.22334), here with the finer tokenizer's own cuts instead of a residual
bucket, with the end of the coarser token as an outcome, corrected by the text, and never without a place for a token
that only the finer side has.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_table import TokenTable

_MAJORITY, _FEWEST = 0.5, 3
"""The text decides by this share of at least so many occurrences."""


@dataclass(frozen=True)
class ClassTable:
    """Tokens of both vocabularies by outcome; tokens without one take no part."""

    count: int
    coarse_tokens: np.ndarray
    """int64 [M]"""
    coarse_outcomes: np.ndarray
    """int64 [M]: in [0, count); each outcome occurs, but for the end where `can_end` is not set"""
    fine_tokens: np.ndarray
    """int64 [M']"""
    fine_outcomes: np.ndarray
    """int64 [M']: in [0, count); each outcome occurs, but for the last one behind a prefix: the coarser token ends"""
    leaders: np.ndarray
    """int64 [count], one less behind a prefix: a finer token that stands for the outcome"""
    prefix: bytes = b""
    """The bytes behind which these outcomes are; empty where both start a token"""
    can_end: bool = False
    """Behind a prefix: the coarser side has a token that is the prefix itself"""


class _Sorted:
    """A vocabulary sorted by bytes: the tokens that extend a prefix are one slice."""

    def __init__(self, table: TokenTable):
        self._table = table
        content = sorted((i for i, piece in enumerate(table.pieces) if piece), key=table.pieces.__getitem__)
        self.ids = np.array(content, dtype=np.int64)
        self._pieces = [table.pieces[i] for i in content]
        self.exact: dict[bytes, int] = {}
        for index in sorted(content):
            piece = table.pieces[index]
            # A byte-fallback token shares its byte with the ordinary token, and the tokenizer prefers the latter.
            if piece not in self.exact or table.strings[self.exact[piece]].startswith("<0x"):
                self.exact[piece] = index
        self._longest = max(map(len, self._pieces), default=0)

    def extensions(self, prefix: bytes) -> np.ndarray:
        """The tokens that start with `prefix` and are longer."""
        low = bisect_left(self._pieces, prefix + b"\x00")
        return self.ids[low : bisect_left(self._pieces, _after(prefix), lo=low)]

    def cut(self, text: bytes) -> list[int]:
        """The tokens of `text`, always the longest that fits; fewer where none does."""
        tokens, position = [], 0
        while position < len(text):
            lengths = range(min(len(text) - position, self._longest), 0, -1)
            parts = (text[position : position + length] for length in lengths)
            token = next((self.exact[part] for part in parts if part in self.exact), None)
            if token is None:
                break
            tokens.append(token)
            position += len(self._table.pieces[token])
        return tokens


def _after(prefix: bytes) -> bytes:
    """The smallest byte string above every string that starts with `prefix` (valid UTF-8 never ends in 0xFF)."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\xff" * (len(prefix) + 64)


class VocabularyMap:
    """The outcomes of a coarser and a finer vocabulary, where both start a token and behind what a coarser one began.

    A coarser token is cut as the finer tokenizer cuts its bytes: into one token where it has them as one, else as it
    cuts them standing alone, else always the longest that fits. What follows in the text can change a cut: three spaces
    before a word are a token for one tokenizer and the beginning of a token of four for another; so the text corrects
    the cuts (`learn`).
    """

    def __init__(self, coarse: TokenTable, fine: TokenTable, fine_tokenizer):
        self._coarse_table, self._fine_table = coarse, fine
        self._coarse, self._fine = _Sorted(coarse), _Sorted(fine)
        self._leader = np.arange(len(fine.pieces))
        self._outcomes: dict[bytes, ClassTable | None] = {}
        self._cut_behind: dict[bytes, list[int]] = {}  # the coarser tokens that are cut behind these bytes
        self._goes_on: dict[tuple[int, int], int] = {}  # by coarser token and position of a cut: what starts there
        for token, parts in self._cut_all(fine_tokenizer):
            piece, position = coarse.pieces[token], 0
            for part in parts:
                self._cut_behind.setdefault(piece[:position], []).append(token)
                self._goes_on[token, position] = part
                position += len(fine.pieces[part])

    def _cut_all(self, tokenizer) -> Iterator[tuple[int, list[int]]]:
        """Every coarser token that spells something, with the finer tokens that its bytes are cut into."""
        # Llama-type tokenizers put a space before the first word, so the bytes are read behind a line end.
        anchor = b"\n" if self._fine_table.dummy_prefix else b""
        texts, owners = [], []
        for token in self._coarse.ids.tolist():
            piece = self._coarse_table.pieces[token]
            text = (anchor + piece).decode("utf-8", "replace")
            if piece in self._fine.exact:
                yield token, [self._fine.exact[piece]]
            elif "\ufffd" in text or self._fine_table.canonical(text) != text:
                yield token, self._fine.cut(piece)
            else:
                texts.append(text)
                owners.append(token)
        pieces = self._fine_table.pieces
        for token, ids in zip(owners, encode(tokenizer, texts), strict=True):
            piece, parts = self._coarse_table.pieces[token], list[int]()
            missing = len(piece)
            while ids and missing > 0:  # from the end, to leave out the anchor and the space before it
                parts.insert(0, ids.pop())
                missing -= len(pieces[parts[0]])
            parts = [part for part in parts if pieces[part]]
            yield token, parts if b"".join(pieces[part] for part in parts) == piece else self._fine.cut(piece)

    def learn(self, coarse: np.ndarray, written: np.ndarray, fine: np.ndarray) -> None:
        """Let the text correct the cuts.

        With what a coarser token mostly goes on in the text, it goes on. A finer token that even so mostly stands where
        another one is expected shares that one's outcome: else the student would be taught that it is rare.

        coarse, written, fine: int64 [N]; a coarser token, how many of its bytes are written, and the finer token that
        starts there in the text
        """
        keys, counts = np.unique(np.stack([coarse, written, fine]), axis=1, return_counts=True)
        found: dict[tuple[int, int], dict[int, int]] = {}
        for token, position, part, count in zip(*keys.tolist(), counts.tolist(), strict=True):
            if (token, position) in self._goes_on and self._fine_table.pieces[part]:
                found.setdefault((token, position), {})[part] = count
        expected: dict[int, dict[int, int]] = {}
        for place, seen in found.items():
            total, part = sum(seen.values()), max(seen, key=seen.__getitem__)
            if total >= _FEWEST and seen[part] > _MAJORITY * total:
                self._goes_on[place] = part
            for part, count in seen.items():
                others = expected.setdefault(part, {})
                others[self._goes_on[place]] = others.get(self._goes_on[place], 0) + count
        for part, seen in expected.items():
            other = max(seen, key=seen.__getitem__)
            if other != part and seen[other] >= max(_FEWEST, _MAJORITY * sum(seen.values())):
                self._leader[self._leader == self._leader[part]] = self._leader[other]

    def open(self) -> ClassTable:
        """The outcomes where both start a token, the zero-width tokens that both have among them."""
        coarse, fine = self._coarse_table, self._fine_table
        by_string = {string: i for i, string in enumerate(fine.strings) if string and not fine.pieces[i]}
        same = {i: by_string[s] for i, s in enumerate(coarse.strings) if s in by_string and not coarse.pieces[i]}
        same |= {coarse.start_id: fine.start_id, coarse.end_id: fine.end_id}
        special = set(same.values())
        if not same.keys() >= set(coarse.end_ids):
            # Where the ways to end a text do not correspond one to one, that it ends is one outcome.
            same |= dict.fromkeys(coarse.end_ids, fine.end_id)
            special |= set(fine.end_ids)
            self._leader[list(fine.end_ids)] = fine.end_id
        return self._gather(b"", same, sorted(special))

    def behind(self, prefix: bytes) -> ClassTable | None:
        """The ways to go on behind a coarser token, or a part of one, that spells `prefix`; None if it cannot."""
        if prefix not in self._outcomes:
            known = prefix and prefix in self._cut_behind
            self._outcomes[prefix] = self._with_end(prefix, self._gather(prefix, {}, [])) if known else None
        return self._outcomes[prefix]

    def _with_end(self, prefix: bytes, going_on: ClassTable) -> ClassTable:
        end = np.array([self._coarse.exact[prefix]] if prefix in self._coarse.exact else [], dtype=np.int64)
        return ClassTable(
            going_on.count + 1,
            np.concatenate([going_on.coarse_tokens, end]),
            np.concatenate([going_on.coarse_outcomes, np.full(len(end), going_on.count)]),
            going_on.fine_tokens,
            going_on.fine_outcomes,
            going_on.leaders,
            prefix,
            can_end=len(end) > 0,
        )

    def _gather(self, prefix: bytes, same: dict[int, int], special: list[int]) -> ClassTable:
        """`same`: the finer token of each coarser one without bytes; `special`: all such finer ones that take part."""
        coarse_tokens = np.array(self._cut_behind.get(prefix, []), dtype=np.int64)
        parts = np.array([self._goes_on[token, len(prefix)] for token in coarse_tokens.tolist()], dtype=np.int64)
        if not prefix:
            parts = self._told_apart(coarse_tokens, parts)
        fine_tokens, fine_parts = self._sharers(prefix, coarse_tokens, parts)
        extra = np.array(list(same.items()), dtype=np.int64).reshape(-1, 2)
        coarse_tokens, parts = np.concatenate([coarse_tokens, extra[:, 0]]), np.concatenate([parts, extra[:, 1]])
        bare = np.array(special, dtype=np.int64)
        fine_tokens, fine_parts = np.concatenate([fine_tokens, bare]), np.concatenate([fine_parts, bare])
        image, outcomes = np.unique(self._leader[parts], return_inverse=True)
        order, fine_order = np.argsort(coarse_tokens, kind="stable"), np.argsort(fine_tokens, kind="stable")
        return ClassTable(
            len(image),
            coarse_tokens[order],
            outcomes.reshape(-1)[order],
            fine_tokens[fine_order],
            np.searchsorted(image, self._leader[fine_parts])[fine_order],
            image,
        )

    def _told_apart(self, tokens: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """Tokens that share bytes are told apart by their spelling, so that equal tokenizers give the identity."""
        fine, parts = self._fine_table, parts.copy()
        by_string = {string: i for i, string in enumerate(fine.strings) if string}
        for position, token in enumerate(tokens.tolist()):
            twin = by_string.get(self._coarse_table.strings[token])
            piece = self._coarse_table.pieces[token]
            if twin is not None and fine.pieces[twin] == piece == fine.pieces[parts[position]]:
                parts[position] = twin
        return parts

    def _sharers(self, prefix: bytes, coarse_tokens: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The finer tokens that take part, each with the one whose outcome it shares.

        Those that go on behind `prefix` stand for themselves. One that only starts with the rest of a coarser token goes
        with the longest such rest: the coarser side would write that first, and then what is left of the token.
        """
        taken = np.full(len(self._fine_table.pieces), -1, dtype=np.int64)
        pieces, exact = self._coarse_table.pieces, self._coarse.exact
        cuts = zip(coarse_tokens.tolist(), parts.tolist(), strict=True)
        # Of tokens that share their bytes the ordinary one comes last, and so has its way.
        for token, part in sorted(cuts, key=lambda item: (len(pieces[item[0]]), exact[pieces[item[0]]] == item[0])):
            rest = pieces[token][len(prefix) :]
            taken[self._fine.extensions(rest)] = part
            if rest in self._fine.exact:
                taken[self._fine.exact[rest]] = part
        image = np.unique(parts)
        taken[image] = image
        shares = np.bincount(self._leader)[self._leader] > 1
        (joined,) = (shares & np.isin(self._leader, self._leader[image])).nonzero()
        taken[joined] = joined
        (tokens,) = (taken >= 0).nonzero()
        return tokens, taken[tokens]


def same_token_map(student: TokenTable, teacher: TokenTable) -> np.ndarray:
    """int64 [V_t]: the student token of exactly the same bytes as each of the teacher's, -1 where there is none.

    Of tokens that share their bytes only the ordinary one counts. Every end of a text goes to the end of a text.
    """
    by_bytes, found = _Sorted(student).exact, np.full(len(teacher.pieces), -1, dtype=np.int64)
    for piece, index in _Sorted(teacher).exact.items():
        found[index] = by_bytes.get(piece, -1)
    found[list(teacher.end_ids)] = student.end_id
    return found

"""Which teacher row speaks about which student token, and in whose words.

Both tokenizers cut the same bytes. A student token that starts at byte x is covered by the teacher token whose
bytes contain x; the teacher's row that predicts that token, conditioned on the bytes of it that come before x,
is a distribution over what follows x, and every outcome has a first student token. That carries the whole row
onto the student's vocabulary (`losses.Projection` holds the index arrays, `losses.teacher_probs` the arithmetic).
Everything here is numpy on the host, done before the loop.

Source: byte-prefix marginalisation (arXiv 2607.22334), here conditioned on the emitted bytes and completed by
the student's own tokenisation of the remainder instead of a residual bucket.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from sar_kd.tokens import TokenTable, build_token_table, encode, same_tokenizer, start_and_end


@dataclass(frozen=True)
class Cover:
    """For each student token that a teacher row can speak about: where it is, and how far in."""

    student: np.ndarray
    """int64 [K]: indices of the student tokens, ascending."""
    teacher: np.ndarray
    """int64 [K]: the teacher token that covers each one's first byte."""
    emitted: np.ndarray
    """int64 [K]: bytes of that teacher token before the student token starts; 0 where they start together."""


def cover(student_ends: np.ndarray, teacher_ends: np.ndarray) -> Cover:
    """Cover the student's tokens by the teacher's. O((S + T) log T), no loop over tokens.

    Left out: tokens without bytes, and student tokens that outlast the teacher token which covers their first
    byte, because what follows that token is not known from its row.

    student_ends, teacher_ends: int64 [S], [T], ascending; the byte at which each token ends, from a common
    start at 0 to a common end
    """
    student_starts, teacher_starts = _starts(student_ends), _starts(teacher_ends)
    covering = np.searchsorted(teacher_starts, student_starts, side="right") - 1
    holds = (student_ends > student_starts) & (student_ends <= teacher_ends[covering])
    (student,) = holds.nonzero()
    teacher = covering[student]
    return Cover(student, teacher, student_starts[student] - teacher_starts[teacher])


def _starts(ends: np.ndarray) -> np.ndarray:
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1]
    return starts


class VocabularyProjection:
    """The map phi_p from teacher tokens to student tokens, for every emitted prefix p.

    phi_p(v) is the student token that spells the bytes of v after p; where there is none, the first token that
    the student's own tokenizer gives for them; where that is not a prefix of them, the longest token that is.
    The teacher tokens that extend p are one slice of the teacher's vocabulary sorted by bytes; the map of a
    slice is built when its prefix is first met, and kept.
    """

    def __init__(self, teacher: TokenTable, student: TokenTable, student_tokenizer):
        self._teacher, self._student, self._tokenizer = teacher, student, student_tokenizer
        content = [i for i, piece in enumerate(teacher.pieces) if piece]
        content.sort(key=teacher.pieces.__getitem__)
        self._sorted_ids = np.array(content, dtype=np.int64)
        self._sorted_pieces = [teacher.pieces[i] for i in content]
        self._longest = int(student.lengths.max())
        self._exact: dict[bytes, int] = {}
        for index, piece in enumerate(student.pieces):
            # A byte-fallback token shares its byte with the ordinary token, and the tokenizer prefers the latter.
            if piece and (piece not in self._exact or student.strings[self._exact[piece]].startswith("<0x")):
                self._exact[piece] = index
        self._first_token: dict[bytes, int] = dict(self._exact)
        self._slices: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        self.columns, self.destinations = self._open()

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        columns, destinations = self._extensions(b"")
        by_string = {string: i for i, string in enumerate(self._student.strings) if string}
        # Tokens that share bytes are told apart by their spelling, so that equal tokenizers give the identity.
        for position, column in enumerate(columns):
            twin = by_string.get(self._teacher.strings[column])
            if twin is not None and self._student.pieces[twin] == self._teacher.pieces[column]:
                destinations[position] = twin
        special = {
            i: by_string.get(s, -1) for i, s in enumerate(self._teacher.strings) if s and not self._teacher.pieces[i]
        }
        special |= {self._teacher.start_id: self._student.start_id, self._teacher.end_id: self._student.end_id}
        special = {i: u for i, u in special.items() if u >= 0 and not self._student.pieces[u]}
        columns = np.concatenate([columns, np.array(list(special), dtype=np.int64)])
        destinations = np.concatenate([destinations, np.array(list(special.values()), dtype=np.int64)])
        order = np.argsort(columns, kind="stable")
        return columns[order], destinations[order]

    def inside(self, tokens: np.ndarray, emitted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries (row, teacher id, student id) of rows whose first `emitted` bytes are given.

        tokens, emitted: int64 [R]; the teacher token that covers each row and how many of its bytes are emitted
        Returns: int64 [E] each, rows ascending
        """
        keys, inverse = np.unique(np.stack([tokens, emitted]), axis=1, return_inverse=True)
        inverse = inverse.reshape(-1)
        slices = [self._slice(self._teacher.pieces[token][:length]) for token, length in keys.T.tolist()]
        if not slices:
            return (np.zeros(0, dtype=np.int64),) * 3
        sizes = np.array([len(columns) for columns, _ in slices], dtype=np.int64)
        firsts = np.cumsum(sizes) - sizes
        counts = sizes[inverse]
        rows = np.repeat(np.arange(len(tokens)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        picks = np.repeat(firsts[inverse], counts) + within
        columns = np.concatenate([columns for columns, _ in slices])
        destinations = np.concatenate([destinations for _, destinations in slices])
        return rows, columns[picks], destinations[picks]

    def _slice(self, prefix: bytes) -> tuple[np.ndarray, np.ndarray]:
        if prefix not in self._slices:
            self._slices[prefix] = self._extensions(prefix)
        return self._slices[prefix]

    def _extensions(self, prefix: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Teacher ids whose bytes start with `prefix` and are longer, and phi of each; ids without a phi left out."""
        low = bisect_left(self._sorted_pieces, prefix + b"\x00")
        high = bisect_left(self._sorted_pieces, _after(prefix)) if prefix else len(self._sorted_pieces)
        remainders = [piece[len(prefix) :] for piece in self._sorted_pieces[low:high]]
        self._learn([r for r in remainders if r not in self._first_token])
        destinations = np.array([self._first_token[r] for r in remainders], dtype=np.int64)
        known = destinations >= 0
        return self._sorted_ids[low:high][known], destinations[known]

    def _learn(self, remainders: list[bytes]) -> None:
        """Enter the first student token of each remainder; -1 where no student token begins it."""
        # Llama-type tokenizers put a space before the first word, so the remainder is read behind a line end.
        anchor = b"\n" if self._student.dummy_prefix else b""
        texts, owners = [], []
        for remainder in dict.fromkeys(remainders):
            self._first_token[remainder] = self._longest_prefix(remainder)
            try:
                text = (anchor + remainder).decode()
            except UnicodeDecodeError:
                continue
            if self._student.canonical(text) == text:
                texts.append(text)
                owners.append(remainder)
        for remainder, ids in zip(owners, encode(self._tokenizer, texts), strict=True):
            ends = np.cumsum(self._student.lengths[ids])
            before = int(ends[-1]) - len(remainder)  # the anchor, and the space put before it
            at = int(np.searchsorted(ends, before, side="right")) if before else 0
            starts_there = before == 0 or (at > 0 and ends[at - 1] == before)
            piece = self._student.pieces[ids[at]] if starts_there and at < len(ids) else b""
            if piece and remainder.startswith(piece):
                self._first_token[remainder] = ids[at]

    def _longest_prefix(self, remainder: bytes) -> int:
        lengths = range(min(len(remainder), self._longest), 0, -1)
        return next((self._exact[remainder[:n]] for n in lengths if remainder[:n] in self._exact), -1)


def _after(prefix: bytes) -> bytes:
    """The smallest byte string above every string that starts with `prefix` (valid UTF-8 never ends in 0xFF)."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\xff" * (len(prefix) + 64)


class TokenizerPair:
    """A student's and a teacher's tokenizer: equal, or with what it takes to carry the teacher's rows across."""

    def __init__(self, student, teacher, *, student_rows: int, teacher_rows: int, projects: bool = False):
        """student, teacher: transformers tokenizers; *_rows: rows of the models' heads; projects: even if equal

        Raises: UnfitTokenizer, if they differ and one of them changes text, or one has no end-of-text token
        """
        self.student, self.teacher = student, teacher
        self.equal = same_tokenizer(student, teacher)
        self.student_start, self.student_end = _named(start_and_end, "student", student)
        self.teacher_start, self.teacher_end = _named(start_and_end, "teacher", teacher)
        self.projection = None
        self.tables = None
        if projects or not self.equal:
            student_table = _named(build_token_table, "student", student, student_rows)
            teacher_table = _named(build_token_table, "teacher", teacher, teacher_rows)
            self.tables = (student_table, teacher_table)
            self.projection = VocabularyProjection(teacher_table, student_table, student)

    def canonical(self, text: str) -> str:
        """The text that both models read."""
        for table in self.tables or ():
            text = table.canonical(text)
        return text


class UnfitTokenizer(ValueError):
    """A tokenizer that cannot take part; `whose` is 'student' or 'teacher'."""

    def __init__(self, whose: str, reason: str):
        super().__init__(f"the {whose}'s tokenizer {reason}")
        self.whose, self.reason = whose, reason


def _named(function, whose: str, *args):
    try:
        return function(*args)
    except ValueError as error:
        raise UnfitTokenizer(whose, str(error)) from None

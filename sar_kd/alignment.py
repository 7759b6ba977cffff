"""Where two tokenizations of the same bytes meet, and what it takes to compare two tokenizers.

Everything here is numpy on the host, done before the loop, from the byte at which each token ends; no loop over
tokens. Positions come as indices of tokens; which row of the logits predicts a token is `data`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sar_kd.token_bytes import tells_characters
from sar_kd.tokens import TokenTable, build_token_table, same_tokenizer, start_and_end


@dataclass(frozen=True)
class Contacts:
    """Every byte at which a token starts on either side, and the two tokens that hold it."""

    student: np.ndarray
    """int64 [K]: the student token that holds the byte, ascending"""
    teacher: np.ndarray
    """int64 [K]: the teacher token that holds it, ascending"""
    student_written: np.ndarray
    """int64 [K]: bytes of the student token before it"""
    teacher_written: np.ndarray
    """int64 [K]: bytes of the teacher token before it; of the two counts at least one is 0"""


def find_contacts(student_ends: np.ndarray, teacher_ends: np.ndarray) -> Contacts:
    """Lay two tokenizations of the same bytes over each other; tokens without bytes hold none. O((S + T) log).

    student_ends, teacher_ends: int64 [S], [T], ascending; the byte at which each token ends, from a common start at
    0 to a common end
    """
    student_starts, teacher_starts = _starts(student_ends), _starts(teacher_ends)
    starts = np.union1d(student_starts, teacher_starts)
    starts = starts[starts < student_ends[-1]] if len(student_ends) else starts
    # The last token that starts there: tokens without bytes start where the next one does, and stand before it.
    student = np.searchsorted(student_starts, starts, side="right") - 1
    teacher = np.searchsorted(teacher_starts, starts, side="right") - 1
    return Contacts(student, teacher, starts - student_starts[student], starts - teacher_starts[teacher])


@dataclass(frozen=True)
class Chunks:
    """The smallest spans of bytes on whose ends both tokenizers agree."""

    student: np.ndarray
    """int64 [S]: the chunk of each student token, ascending; a token without bytes joins the one that follows"""
    teacher: np.ndarray
    """int64 [T]"""
    ends: np.ndarray
    """int64 [C]: the byte at which each chunk ends"""
    sizes: np.ndarray
    """int64 [2, C]: tokens with bytes of each side, student first"""

    @property
    def strict(self) -> np.ndarray:
        """bool [C]: one token on each side, so the same bytes."""
        return np.all(self.sizes == 1, axis=0)

    @property
    def straddled(self) -> np.ndarray:
        """bool [C]: several tokens on both sides, so that some of them overlap."""
        return np.all(self.sizes > 1, axis=0)


def ends_on_both(student_ends: np.ndarray, teacher_ends: np.ndarray) -> np.ndarray:
    """bool [len(student_ends)]: a teacher token ends there too. Arguments as for `find_contacts`."""
    # Both are sorted, so this is their intersection, many times faster than `np.intersect1d`.
    places = np.searchsorted(teacher_ends, student_ends)
    return teacher_ends[np.minimum(places, len(teacher_ends) - 1)] == student_ends


def find_chunks(student_ends: np.ndarray, teacher_ends: np.ndarray) -> Chunks:
    """Cut the text at every byte where a token ends on both sides. Arguments as for `find_contacts`.

    A token without bytes behind the last chunk belongs to none: its number is the number of chunks.
    """
    cuts = student_ends[ends_on_both(student_ends, teacher_ends) & (np.diff(student_ends, prepend=0) > 0)]
    members, sizes = [], []
    for ends in (student_ends, teacher_ends):
        starts = _starts(ends)
        members.append(np.searchsorted(cuts, starts, side="right"))
        sizes.append(np.bincount(members[-1][ends > starts], minlength=len(cuts)))
    return Chunks(members[0], members[1], cuts, np.stack(sizes))


def _starts(ends: np.ndarray) -> np.ndarray:
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1]
    return starts


class TokenizerPair:
    """A student's and a teacher's tokenizer: equal, or with the tables of exact bytes that it takes to align them."""

    def __init__(
        self,
        student,
        teacher,
        *,
        student_rows: int,
        teacher_rows: int,
        aligns: bool = False,
        projects: bool = True,
        tolerant: bool = False,
        stop_ids: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    ):
        """student, teacher: transformers tokenizers; *_rows: rows of the models' heads; aligns: even if equal

        projects: batches come with what the projection needs; tolerant: a tokenizer that changes text has no table,
        and its tokens are placed by the characters that it says they come from; stop_ids: further ids that end a text,
        student first
        Raises: UnfitTokenizer, if they differ and one of them changes text, or one has no end-of-text token
        """
        self.projects, self.student_rows, self.teacher_rows = projects, student_rows, teacher_rows
        self.student, self.teacher = student, teacher
        self.equal = same_tokenizer(student, teacher)
        self.student_start, self.student_end = _named(start_and_end, "student", student)
        self.teacher_start, self.teacher_end = _named(start_and_end, "teacher", teacher)
        self.tables: tuple[TokenTable | None, TokenTable | None] | None = None
        """Student first; None where the tokenizers are taken as equal, and for one that only tells characters"""
        if aligns or not self.equal:
            self.tables = (
                _table("student", student, student_rows, stop_ids[0], tolerant),
                _table("teacher", teacher, teacher_rows, stop_ids[1], tolerant),
            )

    @cached_property
    def teacher_tokens(self) -> int:
        """Rows of the teacher's head up to its tokenizer's last token; what follows is padding."""
        return 1 + max(self.teacher.get_vocab().values())

    @property
    def is_exact(self) -> bool:
        """There are tables, and each holds its tokens' exact bytes."""
        return self.tables is not None and None not in self.tables

    @property
    def exact_tables(self) -> tuple[TokenTable, TokenTable]:
        """The tables, of a pair that `is_exact`."""
        student, teacher = self.tables or (None, None)
        assert student is not None
        assert teacher is not None
        return student, teacher

    def canonical(self, text: str) -> str:
        """The text that both models read."""
        for table in self.tables or ():
            text = table.canonical(text) if table else text
        return text


def _table(whose: str, tokenizer, num_rows: int, stop_ids: tuple[int, ...], tolerant: bool) -> TokenTable | None:
    try:
        return _named(build_token_table, whose, tokenizer, num_rows, stop_ids)
    except UnfitTokenizer as error:
        error.tells_characters = tells_characters(tokenizer)
        if tolerant and error.tells_characters:
            return None
        raise


class UnfitTokenizer(ValueError):
    """A tokenizer that cannot take part; `whose` is 'student' or 'teacher'."""

    def __init__(self, whose: str, reason: str):
        super().__init__(f"the {whose}'s tokenizer {reason}")
        self.whose, self.reason = whose, reason
        self.tells_characters = False
        """It takes part where characters are enough (`tolerant`)."""


def _named(function, whose: str, *args):
    try:
        return function(*args)
    except ValueError as error:
        raise UnfitTokenizer(whose, str(error)) from None

"""The student's and the teacher's tokenizer, equal or with the token tables of both."""

from __future__ import annotations

from functools import cached_property

from sar_kd.tokenization.backends import tells_characters
from sar_kd.tokenization.token_table import TokenTable, build_token_table, same_tokenizer, start_and_end


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

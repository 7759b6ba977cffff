"""The student's and the teacher's tokenizer: equal, or with the token tables that their alignment needs."""

from __future__ import annotations

from datetime import date
from functools import cached_property

from sar_kd.tokenization.backends import EncodingFailure
from sar_kd.tokenization.token_table import TokenTable, build_token_table, document_start, same_tokenizer, start_and_end


class TokenizerPair:
    """A student's and a teacher's tokenizer."""

    def __init__(
        self,
        student,
        teacher,
        *,
        student_vocab_size: int,
        teacher_vocab_size: int,
        aligns: bool = False,
        projects: bool = True,
        stop_ids: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
        template_date: str = "",
    ):
        """student, teacher: transformers tokenizers

        *_vocab_size: of the models' LM heads
        aligns: build token tables even if the tokenizers are equal
        projects: batches carry what byte-prefix projection needs
        stop_ids: further ids that end a text, student first
        template_date: that chat templates write, in ISO format; '' for today
        Raises: UnfitTokenizer if the bytes of one are needed and unknown, or one has no end-of-text token
        """
        self.projects = projects
        self.template_date = template_date or date.today().isoformat()
        self.student_vocab_size, self.teacher_vocab_size = student_vocab_size, teacher_vocab_size
        self.student, self.teacher = student, teacher
        self.equal = same_tokenizer(student, teacher)
        self.student_start, self.student_end = _named("student", start_and_end, student)
        self.teacher_start, self.teacher_end = _named("teacher", start_and_end, teacher)
        self.document_starts = document_start(student), document_start(teacher)
        """The start token before each document, or none; student first"""
        self.tables: tuple[TokenTable, TokenTable] | None = None
        """Student first; None where the tokenizers are taken as equal"""
        if aligns or not self.equal:
            self.tables = (
                _named("student", build_token_table, student, student_vocab_size, stop_ids[0]),
                _named("teacher", build_token_table, teacher, teacher_vocab_size, stop_ids[1]),
            )

    @cached_property
    def num_teacher_tokens(self) -> int:
        """Size of the teacher's vocabulary up to its tokenizer's last token; the rest of its LM head is padding."""
        return min(self.teacher_vocab_size, 1 + max(self.teacher.get_vocab().values()))

    @property
    def dated_templates(self) -> tuple[str, ...]:
        """'student', 'teacher': whose chat template writes a date."""
        tokenizers = {"student": self.student} | ({} if self.tables is None else {"teacher": self.teacher})
        templates = {whose: str(getattr(tokenizer, "chat_template", "")) for whose, tokenizer in tokenizers.items()}
        return tuple(whose for whose, template in templates.items() if "strftime_now" in template)

    @property
    def tokenizers(self) -> list:
        """One for each token stream: a single one where they are taken as equal."""
        return [self.student] if self.tables is None else [self.student, self.teacher]

    @property
    def token_tables(self) -> tuple[TokenTable, TokenTable]:
        """The tables of a pair that has them."""
        assert self.tables is not None
        return self.tables

    def canonical(self, text: str) -> str:
        """The text that both models read."""
        for table in self.tables or ():
            text = table.canonical(text)
        return text


class UnfitTokenizer(ValueError):
    """A tokenizer that cannot be used; `whose` is 'student' or 'teacher'."""

    def __init__(self, whose: str, reason: str):
        super().__init__(f"the {whose}'s tokenizer {reason}")
        self.whose, self.reason = whose, reason


def _named(whose: str, function, *args):
    try:
        return function(*args)
    except EncodingFailure as error:
        raise UnfitTokenizer(whose, error.reason) from None
    except ValueError as error:
        raise UnfitTokenizer(whose, str(error)) from None

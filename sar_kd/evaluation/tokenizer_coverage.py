"""How much of a text two tokenizers allow to be compared, and how: what a run prints and `audit` reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sar_kd.alignment.byte_alignment import find_boundaries, find_chunks
from sar_kd.data.dataset import Dataset
from sar_kd.runtime.console import first_few
from sar_kd.tokenization.token_table import TokenTable

_MOST_TOKENS = 2**18


@dataclass(frozen=True)
class Coverage:
    """Shares are of the student's tokens that are learned, in the first part of the text."""

    equal: bool
    """Both tokenizers are the same"""
    num_tokens: int
    """The student's tokens that were looked at"""
    strict: float
    """Share that is one teacher token too, of the same bytes"""
    strict_by_class: dict[str, float]
    """The same among tokens with a digit, of white space alone, with a byte outside ASCII; nan where there is none"""
    chunks_per_token: float
    """Smallest common spans per student token"""
    straddling: float
    """Share of those spans in which several tokens of both sides overlap"""
    both_start: float
    """Positions at which both start a token, per student token"""
    inside_teacher: float
    """Positions at which the student starts a token inside one of the teacher's, per student token"""
    inside_student: float
    """Positions at which the teacher starts a token inside one of the student's, per student token"""
    coarser: str
    """'teacher' or 'student': whose tokens are the longer ones"""
    shared_tokens: int
    """Tokens of exactly the same bytes in both vocabularies"""
    student_tokens: int
    teacher_tokens: int
    """Sizes of the vocabularies"""
    left_out: tuple[str, ...]
    """Documents that are empty or that a tokenizer cannot represent"""

    @property
    def mix(self) -> str:
        """What `--alignment auto` makes of it, in words."""
        if self.equal:
            return "token by token, the tokenizers are equal"
        finer = "student" if self.coarser == "teacher" else "teacher"
        return f"projection of the {self.coarser}'s tokens onto the {finer}'s, at every byte where either starts one"

    def lines(self) -> list[str]:
        """All of it for a person to read."""
        by_class = [(f"  ... {name}", share) for name, share in self.strict_by_class.items()]
        shares = [("same token on both sides (strict)", self.strict), *by_class]
        shares += [
            ("both start a token", self.both_start),
            ("starts inside a teacher token", self.inside_teacher),
            ("a teacher token starts inside it", self.inside_student),
        ]
        lines = [
            f"Vocabularies: teacher {self.teacher_tokens:,}, student {self.student_tokens:,}, "
            f"{self.shared_tokens:,} tokens of the same bytes; the {self.coarser}'s tokens are the longer ones",
            f"Of {self.num_tokens:,} student tokens:",
            *(f"  {name:<36}{share:>8.1%}" if share == share else f"  {name:<36}{'none':>8}" for name, share in shares),
            f"Common spans: {self.chunks_per_token:.3f} per student token; "
            f"in {self.straddling:.1%} of them tokens overlap",
            f"--alignment auto: {self.mix}",
        ]
        return lines


def name_left_out(documents: Sequence[str]) -> list[str]:
    """A line about documents that are empty or that a tokenizer cannot represent; none where there are none."""
    reason = "that are empty or that a tokenizer cannot represent"
    return [f"Left out {len(documents)} documents {reason}: {first_few(documents)}"] if documents else []


def measure_coverage(corpus: Dataset) -> Coverage:
    """Lay the two tokenizations of a text over each other and count.

    corpus: with tables of exact bytes for both tokenizers (`TokenizerPair.is_exact`)
    """
    pair, text = corpus.pair, corpus.text
    last = next((block for block in corpus.blocks if block.student_end >= _MOST_TOKENS), corpus.blocks[-1])
    student, teacher = text.student, text.teacher
    student_ends, teacher_ends = student.ends[: last.student_end], teacher.ends[: last.teacher_end]
    learned = student.is_target[: last.student_end]
    ids = student.ids[: last.student_end]
    chunks = find_chunks(student_ends, teacher_ends)
    strict = np.append(chunks.strict, False)[chunks.student] & learned
    num_tokens = int(learned.sum())
    # Of a conversation only what is learned counts.
    spans = np.unique(chunks.student[learned])
    spans = spans[spans < len(chunks.ends)]
    found = find_boundaries(student_ends, teacher_ends)
    counts = learned[found.student]
    in_teacher, in_student = found.teacher_written > 0, found.student_written > 0
    student_table, teacher_table = pair.exact_tables
    classes = {name: members[ids] & learned for name, members in _classes(student_table).items()}
    shared = {piece for piece in student_table.pieces if piece} & set(teacher_table.pieces)
    return Coverage(
        equal=pair.equal,
        num_tokens=num_tokens,
        strict=strict.sum() / num_tokens,
        strict_by_class={
            name: strict[members].mean() if members.any() else np.nan for name, members in classes.items()
        },
        chunks_per_token=len(spans) / num_tokens,
        straddling=chunks.overlapping[spans].mean(),
        both_start=(counts & ~in_teacher & ~in_student).sum() / num_tokens,
        inside_teacher=(counts & in_teacher).sum() / num_tokens,
        inside_student=(counts & in_student).sum() / num_tokens,
        coarser="teacher" if corpus.aligner.teacher_is_coarser else "student",
        shared_tokens=len(shared),
        student_tokens=len(pair.student),
        teacher_tokens=len(pair.teacher),
        left_out=tuple(text.left_out),
    )


def _classes(table: TokenTable) -> dict[str, np.ndarray]:
    """bool [V] for each class of tokens that is known to be cut differently."""
    tests = {
        "digits": lambda piece: any(0x30 <= byte <= 0x39 for byte in piece),
        "whitespace": lambda piece: bool(piece) and not piece.strip(),
        "non-ASCII": lambda piece: any(byte >= 0x80 for byte in piece),
    }
    return {name: np.array([test(piece) for piece in table.pieces], dtype=bool) for name, test in tests.items()}

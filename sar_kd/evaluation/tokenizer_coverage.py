"""How much of a text can be compared across two tokenizers: what a run prints at its start and `audit` reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sar_kd.alignment.byte_alignment import find_boundaries, find_chunks
from sar_kd.data.dataset import Dataset
from sar_kd.runtime.console import count_of
from sar_kd.tokenization.token_table import TokenTable

_MAX_TOKENS = 2**18

_UTF8_BYTES = frozenset(range(0x100)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclass(frozen=True)
class Coverage:
    """How two tokenizations of the first part of a text meet. Shares are of the student's target tokens."""

    equal: bool
    """The tokenizers are equal"""
    num_tokens: int
    """The student's target tokens in that part"""
    strict: float
    """Share that has the same bytes as one teacher token"""
    strict_by_class: dict[str, float]
    """The same among tokens with a digit, of white space alone, with a byte outside ASCII; nan if there are none"""
    chunks_per_token: float
    """Aligned chunks per student token"""
    overlapping: float
    """Share of the chunks with several tokens on both sides, some of which overlap"""
    both_start: float
    """Boundaries at which both start a token, per student token"""
    inside_teacher: float
    """Boundaries at which the student starts a token inside one of the teacher's, per student token"""
    inside_student: float
    """Boundaries at which the teacher starts a token inside one of the student's, per student token"""
    coarser: str
    """'teacher' or 'student': whose tokens are longer"""
    shared_tokens: int
    """Tokens with equal bytes in both vocabularies"""
    student_tokens: int
    teacher_tokens: int
    """Sizes of the vocabularies"""
    skipped_documents: tuple[str, ...]
    skipped_passages: tuple[str, ...]
    """Documents, and passages of others, that cannot be used; names with the reason"""
    skipped_bytes: int
    skipped_share: float
    """Bytes that are skipped because of the tokenizers, and their share of the text"""
    student_lacks: tuple[int, ...]
    teacher_lacks: tuple[int, ...]
    """Bytes of UTF-8 that no token of a vocabulary holds, so that text with them is skipped"""

    @property
    def auto_alignment(self) -> str:
        """What `--alignment auto` does with these tokenizers."""
        if self.equal:
            return "token by token, the tokenizers are equal"
        finer = "student" if self.coarser == "teacher" else "teacher"
        return f"projection of the {self.coarser}'s tokens onto the {finer}'s, at every byte where either starts one"

    def summary(self, alignment: str = "auto") -> str:
        """One line for people. alignment: the value of that option"""
        if self.equal:
            return "Alignment: the tokenizers are equal, so tokens are compared one by one"
        starts, same = f"{self.both_start:.0%}", f"{self.strict:.0%}"
        share = {"strict": self.strict, "uld": self.both_start}.get(alignment)
        rest = "" if share is None else f"; --alignment {alignment} leaves the other {1 - share:.0%} to the text alone"
        return f"Alignment: {starts} of the student's tokens start where a teacher's does, {same} are equal{rest}"

    def lines(self) -> list[str]:
        """A table for people."""
        shares = {
            "the teacher has the same token": self.strict,
            **{f"  of those {name}": share for name, share in self.strict_by_class.items()},
            "the teacher starts a token there too": self.both_start,
            "start inside one of the teacher's": self.inside_teacher,
            "one of the teacher's starts inside": self.inside_student,
        }
        return [
            f"Vocabularies: teacher {count_of(self.teacher_tokens, 'token')}, student {self.student_tokens:,}; "
            f"{self.shared_tokens:,} have the same bytes; the {self.coarser}'s tokens are longer",
            f"Of {count_of(self.num_tokens, 'student token')}:",
            *(f"  {name:<36}{'none' if np.isnan(share) else f'{share:.1%}':>8}" for name, share in shares.items()),
            f"Aligned chunks: {self.chunks_per_token:.3f} per student token; {self.overlapping:.1%} of them hold "
            "tokens that overlap",
            f"--alignment auto: {self.auto_alignment}",
            *(
                f"Bytes that no token of the {whose}'s vocabulary holds: {bytes(lacking).hex(' ')}"
                for whose, lacking in (("teacher", self.teacher_lacks), ("student", self.student_lacks))
                if lacking
            ),
        ]


def measure_coverage(dataset: Dataset) -> Coverage:
    """Compare the two tokenizations of a text. dataset: of a pair with token tables."""
    pair, text = dataset.pair, dataset.text
    last = next((block for block in dataset.blocks if block.student_end >= _MAX_TOKENS), dataset.blocks[-1])
    ids, is_target = text.student.ids[: last.student_end], text.student.is_target[: last.student_end]
    ends = text.student.ends[: last.student_end], text.teacher.ends[: last.teacher_end]
    num_tokens = int(is_target.sum())
    chunks = find_chunks(*ends)
    is_strict = np.append(chunks.strict, False)[chunks.student] & is_target
    target_chunks = np.unique(chunks.student[is_target])
    target_chunks = target_chunks[target_chunks < len(chunks.ends)]
    boundaries = find_boundaries(*ends)
    is_counted = is_target[boundaries.student]
    in_teacher, in_student = boundaries.teacher_prefix_length > 0, boundaries.student_prefix_length > 0
    student_table, teacher_table = pair.token_tables
    classes = {name: members[ids] & is_target for name, members in _classes(student_table).items()}
    shared = {piece for piece in student_table.pieces if piece} & set(teacher_table.pieces)
    return Coverage(
        equal=pair.equal,
        num_tokens=num_tokens,
        strict=is_strict.sum() / num_tokens,
        strict_by_class={
            name: is_strict[members].mean() if members.any() else np.nan for name, members in classes.items()
        },
        chunks_per_token=len(target_chunks) / num_tokens,
        overlapping=chunks.overlapping[target_chunks].mean(),
        both_start=(is_counted & ~in_teacher & ~in_student).sum() / num_tokens,
        inside_teacher=(is_counted & in_teacher).sum() / num_tokens,
        inside_student=(is_counted & in_student).sum() / num_tokens,
        coarser="teacher" if dataset.aligner.teacher_is_coarser else "student",
        shared_tokens=len(shared),
        student_tokens=len(pair.student),
        teacher_tokens=len(pair.teacher),
        skipped_documents=tuple(text.skipped_documents),
        skipped_passages=tuple(text.skipped_passages),
        skipped_bytes=text.skipped_bytes,
        skipped_share=text.skipped_bytes / (text.skipped_bytes + text.num_bytes),
        student_lacks=lacking_bytes(student_table),
        teacher_lacks=lacking_bytes(teacher_table),
    )


def lacking_bytes(table: TokenTable) -> tuple[int, ...]:
    """The bytes that UTF-8 text may hold and no token does, ascending."""
    return tuple(sorted(_UTF8_BYTES - set().union(*table.pieces)))


def _classes(table: TokenTable) -> dict[str, np.ndarray]:
    """bool [V] for each class of tokens that tokenizers are known to cut differently."""
    tests = {
        "digits": lambda piece: any(0x30 <= byte <= 0x39 for byte in piece),
        "whitespace": lambda piece: bool(piece) and not piece.strip(),
        "non-ASCII": lambda piece: any(byte >= 0x80 for byte in piece),
    }
    return {name: np.array([test(piece) for piece in table.pieces], dtype=bool) for name, test in tests.items()}

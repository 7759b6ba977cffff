"""The index arrays that a batch carries: which teacher position belongs to which student position."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SharedClasses:
    """The classes where both tokenizers start a token: the same for every such row."""

    count: int
    student_tokens: Tensor
    """int64 [M_s]: student ids that take part, ascending"""
    student_classes: Tensor
    """int64 [M_s]: the class of each; every class has at least one"""
    teacher_tokens: Tensor
    """int64 [M_t]"""
    teacher_classes: Tensor
    """int64 [M_t]"""


@dataclass(frozen=True)
class Continuations:
    """Rows where one tokenizer starts a token behind bytes with which the other, the coarser, may not be done.

    The row of the coarser side is the one that predicted the token to which those bytes belong, and is conditioned on
    them: it goes on with one of the tokens that extend them, or ends there. Each row has its own outcomes, numbered
    through all rows; the last of a row is that the token ends.

    In the first K_1 of the K rows it goes on in the text, and only the finer side starts a token. In the others both
    do, and the row only tells what the coarser side might have written instead.
    """

    coarse_rows: Tensor
    """int64 [K]"""
    fine_rows: Tensor
    """int64 [K_1]: both count the student's N rows, or the rows of the teacher's flattened logits"""
    coarse_entries: Tensor
    """int64 [3, E]: row, id, outcome"""
    fine_entries: Tensor
    """int64 [3, E']: the same of the first K_1 rows; no token stands for the end, which is whatever else may begin"""
    outcome_rows: Tensor
    """int64 [O]: the row of each outcome, ascending"""
    ends: Tensor
    """int64 [K]: the last outcome of each row"""
    can_end: Tensor
    """bool [K_1]: the coarser vocabulary has a token that ends there"""
    num_going_on: int
    """O_1: outcomes of the first K_1 rows"""


@dataclass(frozen=True)
class Alignment:
    """What of a batch's text the two models can be compared on."""

    student_rows: Tensor
    """int64 [K]: rows, of the student's N, at whose byte the teacher starts a token too"""
    teacher_rows: Tensor
    """int64 [K]: the teacher's row there, in its flattened logits"""
    strict: Tensor
    """bool [K]: both predict a token of the same bytes"""
    in_teacher: Continuations | None
    """Rows where the student starts a token behind bytes with which the teacher's may not be done"""
    in_student: Continuations | None
    """The same with the sides exchanged"""
    ended: Tensor
    """int64 [K]: for each of `student_rows` the continuation of the coarser side that ended there, or -1"""
    other_ways: Tensor
    """int64 [3, X]: one of `student_rows`, an open outcome, and the outcome of that continuation which is the same"""
    student_chunks: Tensor
    """int64 [N]: the chunk of each token that the student predicts, -1 for none"""
    teacher_chunks: Tensor
    """int64 [N_t]: the same for the teacher"""
    num_chunks: int
    student_ends: Tensor
    """int64 [num_chunks]: where in the flattened input the student has read the chunk to its end"""
    teacher_ends: Tensor
    """int64 [num_chunks]"""

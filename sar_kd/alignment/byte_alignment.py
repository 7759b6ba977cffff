"""Token boundaries and chunks of two tokenizations of the same bytes, from the byte at which each token ends.

numpy on the host, without a loop over tokens. Tokens are given by their index in the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Boundaries:
    """Every byte at which a token starts on either side, and the token of each side that holds the byte."""

    student: np.ndarray
    """int64 [K]: the student's token, ascending"""
    teacher: np.ndarray
    """int64 [K]: the teacher's token, ascending"""
    student_prefix_length: np.ndarray
    """int64 [K]: bytes of the student's token before the boundary"""
    teacher_prefix_length: np.ndarray
    """int64 [K]: the same for the teacher; at least one of the two is 0, both are at a common boundary"""


def find_boundaries(student_ends: np.ndarray, teacher_ends: np.ndarray) -> Boundaries:
    """The boundaries of both tokenizations, ascending; zero-byte tokens are skipped. O(N log N).

    student_ends, teacher_ends: int64 [N_s], [N_t], ascending; the byte at which each token ends, from a common start at
    0 to a common end
    """
    student_starts, teacher_starts = _starts(student_ends), _starts(teacher_ends)
    starts = np.union1d(student_starts, teacher_starts)
    starts = starts[starts < student_ends[-1]] if len(student_ends) else starts
    # The last token that starts there: tokens without bytes start where the next one does, and stand before it.
    student = np.searchsorted(student_starts, starts, side="right") - 1
    teacher = np.searchsorted(teacher_starts, starts, side="right") - 1
    return Boundaries(student, teacher, starts - student_starts[student], starts - teacher_starts[teacher])


@dataclass(frozen=True)
class Chunks:
    """The smallest spans of bytes on whose ends both tokenizers agree."""

    student: np.ndarray
    """int64 [N_s]: the chunk of each student token, ascending; a token without bytes joins the one that follows"""
    teacher: np.ndarray
    """int64 [N_t]"""
    ends: np.ndarray
    """int64 [C]: the byte at which each chunk ends"""
    sizes: np.ndarray
    """int64 [2, C]: tokens with bytes of each side, student first"""

    @property
    def strict(self) -> np.ndarray:
        """bool [C]: one token on each side, so the same bytes."""
        return np.all(self.sizes == 1, axis=0)

    @property
    def overlapping(self) -> np.ndarray:
        """bool [C]: several tokens on both sides, so that some of them overlap."""
        return np.all(self.sizes > 1, axis=0)


def ends_on_both(student_ends: np.ndarray, teacher_ends: np.ndarray) -> np.ndarray:
    """bool [N_s]: whether a teacher token ends where each student token does. Arguments as for `find_boundaries`."""
    # Both are sorted, so this is their intersection, many times faster than `np.intersect1d`.
    places = np.searchsorted(teacher_ends, student_ends)
    return teacher_ends[np.minimum(places, len(teacher_ends) - 1)] == student_ends


def find_chunks(student_ends: np.ndarray, teacher_ends: np.ndarray) -> Chunks:
    """Split the text at every byte where a token ends on both sides. Arguments as for `find_boundaries`.

    A token without bytes behind the last chunk belongs to none: it gets index len(ends).
    """
    ends = student_ends[ends_on_both(student_ends, teacher_ends) & (np.diff(student_ends, prepend=0) > 0)]
    members, sizes = [], []
    for token_ends in (student_ends, teacher_ends):
        starts = _starts(token_ends)
        members.append(np.searchsorted(ends, starts, side="right"))
        sizes.append(np.bincount(members[-1][token_ends > starts], minlength=len(ends)))
    return Chunks(members[0], members[1], ends, np.stack(sizes))


def _starts(ends: np.ndarray) -> np.ndarray:
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1]
    return starts

"""The two errors that end a run: one that the user can mend (exit code 2), and divergence (exit code 3)."""

from __future__ import annotations


class TrainingDiverged(RuntimeError):
    """The run was stopped: too many consecutive NaN batches, or nothing was learned. Its text says which, and what to
    try.
    """


class UsageError(ValueError):
    """A mistake that the user can mend before training; its text is the one line that they see."""

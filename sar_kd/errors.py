"""The two errors that end a run: one that the user can mend (exit code 2), and divergence (exit code 3)."""

from __future__ import annotations


class TrainingDiverged(RuntimeError):
    """Too many consecutive NaN batches; the weights are the last good ones."""


class UsageError(ValueError):
    """A mistake that the user can mend before training; its text is the one line that they see."""

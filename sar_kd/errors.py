"""The two errors that a run ends with: what the user can mend (exit code 2), and a run that diverged (exit code 3)."""

from __future__ import annotations


class TrainingDiverged(RuntimeError):
    """The run met too many consecutive NaN batches; its weights are the last good ones."""


class UsageError(ValueError):
    """Something the user can mend before training; its text is the one line they see."""

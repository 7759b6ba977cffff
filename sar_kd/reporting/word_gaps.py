"""The words of the held-out text on which student and teacher differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sar_kd.reporting.held_out import HeldOut, WordLosses

_MOST_BEHIND, _MOST_AHEAD = 15, 10

_MAX_LETTERS = 24

_MODELS = {"start": "start", "control": "control", "best": "best student", "teacher": "teacher"}


@dataclass(frozen=True)
class WordGap:
    """What the models lose on one word."""

    word: str
    count: int
    nats: dict[str, float]
    """By model, summed over the occurrences"""

    @property
    def gap(self) -> float:
        """Nats that the student loses beyond the teacher on all occurrences; negative where it is better."""
        return self.nats["best"] - self.nats["teacher"]

    def cells(self) -> tuple[str, ...]:
        """Word, occurrences, nats an occurrence of each model, the gap of an occurrence, and of all."""
        each = (self.nats[model] / self.count for model in self.nats)
        gaps = f"{self.gap / self.count:+.2f}", f"{self.gap:+.1f}"
        return self.word, f"{self.count:,}", *(f"{value:.2f}" for value in each), *gaps


@dataclass(frozen=True)
class WordGaps:
    """The words with the largest gaps, the largest first, and what they are a part of."""

    behind: Sequence[WordGap]
    """Where the student loses more than the teacher"""
    ahead: Sequence[WordGap]
    num_words: int
    """That were compared"""
    num_bytes: int
    """Of the text in which they were looked for"""
    gap: float
    """Of all of them together"""
    num_nonfinite: int
    """Words that are left out, as a model's loss on one is not finite"""

    @property
    def header(self) -> tuple[str, ...]:
        """Of the columns of `WordGap.cells`."""
        models = (*self.behind, *self.ahead)[0].nats
        return "word", "times", *(_MODELS[model] for model in models), "student - teacher", "on all"


def largest_gaps(run: HeldOut, control: HeldOut | None = None) -> WordGaps | None:
    """The words on which the best student and the teacher differ most, in nats over all occurrences.

    control: of the run by cross-entropy alone, for one more column
    Returns: None where a model was not measured by word, as in a run that was begun without a control
    """
    found = run.words
    if found is None or not {"best", "teacher"} <= found.nats.keys():
        return None
    nats = {model: _nats_of(model, found, control) for model in _MODELS}
    known = {model: values for model, values in nats.items() if values is not None}
    finite = np.flatnonzero(np.all([np.isfinite(values) for values in known.values()], axis=0))
    words = [
        WordGap(_shortened(found.words[i]), int(found.counts[i]), {model: float(known[model][i]) for model in known})
        for i in finite.tolist()
    ]
    ranked = sorted(words, key=lambda word: -word.gap)
    behind = [word for word in ranked[:_MOST_BEHIND] if word.gap > 0]
    ahead = [word for word in ranked[::-1][:_MOST_AHEAD] if word.gap < 0]
    if not behind and not ahead:
        return None
    total = sum(word.gap for word in words)
    return WordGaps(behind, ahead, len(words), found.num_bytes, total, len(found.words) - len(finite))


def _nats_of(model: str, found: WordLosses, control: HeldOut | None) -> np.ndarray | None:
    if model != "control":
        return found.nats.get(model)
    other = control.words if control is not None else None
    if other is None or list(other.words) != list(found.words) or not np.array_equal(other.counts, found.counts):
        return None
    return other.nats.get("best")


def _shortened(word: str) -> str:
    return word if len(word) <= _MAX_LETTERS else word[: _MAX_LETTERS - 3] + "..."

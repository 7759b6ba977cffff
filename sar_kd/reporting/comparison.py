"""By how much one model is better than another on held-out documents, and whether the text can show it.

Both models are measured on the same documents, so the documents are resampled, and with each its difference (a paired
bootstrap; Koehn, 'Statistical significance tests for machine translation evaluation', 2004, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sar_kd.reporting.held_out import HeldOut
from sar_kd.runtime.console import count_of

FEWEST_DOCUMENTS = 20
"""Fewer say too little about how much documents differ."""

_RESAMPLES, _SEED = 10_000, 0

_MAX_UNITS = 2000
"""Of more documents, neighbours are resampled together: as precise, and the time stays below a second"""

_CHUNK = 2**21
"""Documents drawn at once"""

_MAX_FACTOR = 100
"""A difference that takes more than so many times the text is said to be none"""


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums over documents, with half its 95 % interval."""

    value: float
    half_width: float

    @property
    def is_clear(self) -> bool:
        """Does the interval hold only values of one sign?"""
        return abs(self.value) > self.half_width


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """sum(numerators) / sum(denominators) +- t * standard error, by bootstrap over documents.

    The error is the standard deviation over 10,000 resamplings of the documents, times sqrt(n / (n - 1)), as they are
    drawn from n documents and not from all there are; t: of Student's distribution with n - 1 degrees of freedom. It
    shrinks with 1 / sqrt(n).

    numerators, denominators: float64 [documents], finite
    """
    value = float(numerators.sum() / denominators.sum())
    count = min(len(numerators), _MAX_UNITS)
    firsts = np.linspace(0, len(numerators), count, endpoint=False).astype(np.int64)
    above, below = (np.add.reduceat(values, firsts) for values in (numerators, denominators))
    random, ratios = np.random.default_rng(_SEED), []
    for size in _sizes(_RESAMPLES, max(1, _CHUNK // count)):
        drawn = random.integers(0, count, (size, count))
        ratios.append(above[drawn].sum(1) / below[drawn].sum(1))
    error = float(np.concatenate(ratios).std()) * math.sqrt(count / (count - 1))
    return Estimate(value, _t_of_95(count - 1) * error)


def _sizes(total: int, largest: int) -> list[int]:
    return [min(largest, total - first) for first in range(0, total, largest)]


def _t_of_95(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to 1e-4 from 19 degrees on (Abramowitz and Stegun 26.7.5)."""
    z = 1.959964
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


@dataclass(frozen=True)
class Difference:
    """What one model gains on another one, in bits per byte; positive where it is better."""

    gain: Estimate
    num_better: int
    """Documents on which it loses less"""
    num_documents: int

    @property
    def is_judged(self) -> bool:
        """Are there enough documents, and is every loss finite?"""
        return self.num_documents >= FEWEST_DOCUMENTS and math.isfinite(self.gain.value)

    @property
    def outcome(self) -> str:
        """'better', 'worse', 'no difference' or 'not judged'."""
        if not self.is_judged:
            return "not judged"
        return ("better" if self.gain.value > 0 else "worse") if self.gain.is_clear else "no difference"

    def to_dict(self) -> dict:
        """For JSON: `outcome`, `gain` and half its interval, `gain_interval`, `documents`, `documents_better`."""
        values = {"outcome": self.outcome, "gain": self.gain.value, "gain_interval": self.gain.half_width}
        return {**values, "documents": self.num_documents, "documents_better": self.num_better}

    def sentence(self, one: str, other: str) -> str:
        """The verdict. one, other: the models' names"""
        gain, count = self.gain, self.num_documents
        on = f"better on {self.num_better:,} of {count_of(count, 'document')}"
        if math.isnan(gain.value):
            return f"{one} and {other} cannot be compared: a loss on the held-out text is not finite."
        amount = f"{abs(gain.value):.4f}"
        direction = "better" if gain.value > 0 else "worse"
        if not self.is_judged:
            return (
                f"{one} is {amount} bits per byte {direction} than {other}, but {count_of(count, 'held-out document')} "
                f"cannot show whether that is chance; it takes at least {FEWEST_DOCUMENTS}."
            )
        measured = f"{amount} +- {gain.half_width:.4f} bits per byte"
        if gain.is_clear:
            return f"{one} is {measured} {direction} than {other} ({on})."
        remedy = f"; {self._remedy()}" if float(amount) else ""  # none is worth showing
        return f"{one} and {other}: no difference that this text can show ({measured}, {on}){remedy}."

    def _remedy(self) -> str:
        """About how much text would show a difference of this size: the interval shrinks with 1 / sqrt(documents)."""
        factor = (self.gain.half_width / abs(self.gain.value)) ** 2 if self.gain.value else math.inf
        if factor > _MAX_FACTOR:
            return f"one this small would take more than {_MAX_FACTOR} times as much text"
        documents = count_of(_rounded_up(factor * self.num_documents), "document")
        return f"it would take about {documents} to show one of this size"


def _rounded_up(number: float) -> int:
    """To two digits."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def difference(one: np.ndarray, other: np.ndarray, num_bytes: np.ndarray) -> Difference:
    """gain = (sum of other - sum of one) / ln 2 / bytes, over the same documents.

    one, other: float64 [documents], the nats that each model loses; num_bytes: int64 [documents]
    """
    gains, count = other - one, len(num_bytes)
    num_better = int((one < other).sum())
    if not np.isfinite(gains).all():
        return Difference(Estimate(math.nan, math.nan), num_better, count)
    sizes = math.log(2) * num_bytes
    if count < FEWEST_DOCUMENTS:
        return Difference(Estimate(float(gains.sum() / sizes.sum()), math.nan), num_better, count)
    return Difference(ratio_of_sums(gains, sizes), num_better, count)


def gap_closed(start: np.ndarray, student: np.ndarray, teacher: np.ndarray, num_bytes: np.ndarray) -> Estimate | None:
    """(start - student) / (start - teacher), in bits per byte; None where the teacher is not clearly better than the
    student was. Arguments: as of `difference`
    """
    if difference(teacher, start, num_bytes).outcome != "better" or not np.isfinite(student).all():
        return None
    return ratio_of_sums(start - student, start - teacher)


@dataclass(frozen=True)
class FileLoss:
    """What the models of a run lose on the held-out documents of one file."""

    name: str
    num_documents: int
    num_bytes: int
    bits_per_byte: dict[str, float]
    """By model"""
    difference: Difference | None
    """Of the distilled student and the control, where there is one"""


_MAX_FILES = 12


def losses_by_file(run: HeldOut, control: HeldOut | None = None) -> list[FileLoss]:
    """The losses on each held-out file, those with most bytes first, the rest together; [] with a single file.

    A document's file is its name without what follows the last colon. control: of the run by cross-entropy alone, on
    the same held-out text; its best student is the model 'control'
    """
    if control is not None and control.text != run.text:
        control = None
    nats = {"start": run.nats.get("start"), "control": control.nats.get("best") if control else None}
    nats |= {"best": run.nats.get("best"), "teacher": run.nats.get("teacher")}
    known = {model: values for model, values in nats.items() if values is not None}
    documents: dict[str, list[int]] = {}
    for index, name in enumerate(run.names):
        documents.setdefault(name.rpartition(":")[0] or name, []).append(index)
    if len(documents) < 2:
        return []
    ranked = sorted(documents.items(), key=lambda pair: -run.num_bytes[pair[1]].sum())
    if others := ranked[_MAX_FILES:]:
        together = [index for _, members in others for index in members]
        ranked[_MAX_FILES:] = [(f"the other {len(others):,} files", together)]
    rows = []
    for name, members in ranked:
        sizes, own = run.num_bytes[members], {model: values[members] for model, values in known.items()}
        bits = {model: float(values.sum() / math.log(2) / sizes.sum()) for model, values in own.items()}
        has_both = {"best", "control"} <= own.keys()
        gain = difference(own["best"], own["control"], sizes) if has_both else None
        rows.append(FileLoss(name, len(members), int(sizes.sum()), bits, gain))
    return rows


def compare_with_control(run: HeldOut, control: HeldOut) -> dict:
    """The entry `comparison` of `summary.json`, of a run and of its control on the same held-out text.

    It has what `Difference.to_dict` gives, of the distilled student and the control; `gap_closed` and
    `control_gap_closed`, each with its `..._interval`, where the teacher is better than the student was; and
    `sentences`.
    """
    start, best, size = (run.nats.get("start"), run.nats.get("best"), run.num_bytes)
    alone, teacher = control.nats.get("best"), run.nats.get("teacher")
    if run.text != control.text:
        return {"outcome": "not judged", "sentences": ["The run and its control were measured on different texts."]}
    if start is None or best is None or alone is None:
        return {"outcome": "not judged", "sentences": ["The losses on single documents were not kept by both runs."]}
    own_starts = start, control.nats.get("start")
    if all(own is not None and np.array_equal(nats, own) for nats, own in zip((best, alone), own_starts, strict=True)):
        sentence = "No validation found a student better than the one at the start, with the teacher or without; "
        return {"outcome": "not judged", "sentences": [sentence + "train longer, or at another rate."]}
    found = difference(best, alone, size)
    entry = found.to_dict()
    sentences = [found.sentence("The distilled student", "the control")]
    for name, nats, own in (("distilled student", best, start), ("control", alone, control.nats.get("start"))):
        if own is not None and np.array_equal(nats, own):
            sentences.append(f"The best {name} is the student as it was: no validation found it better; train longer.")
    closed = {
        name: gap_closed(start, student, teacher, size) if teacher is not None else None
        for name, student in (("gap_closed", best), ("control_gap_closed", alone))
    }
    shares = []
    for name, share in closed.items():
        if share is not None:
            entry |= {name: share.value, f"{name}_interval": share.half_width}
            shares.append(f"{share.value:.0%} +- {share.half_width:.0%}")
    if len(shares) == 2:
        sentences.append(f"Of the gap between start and teacher it closed {shares[0]}, the control {shares[1]}.")
    return {**entry, "sentences": sentences}

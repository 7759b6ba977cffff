"""Questions about units, and their right answers: the task of `--task units`.

A question asks for a number of two digits to be converted from one unit to another, in one of several wordings. The
answer shows the calculation and puts the result between tags:

    How many feet are 8.4 m?    8.4*3.28=26.2+1.3=<answer>28</answer>

A conversion is calculated digit by digit, so that a small model can do it for a number that is not in the training
text. Answers are rounded to two digits, which is within 5 % for every number, and 5 % is the tolerance of an answer.

The split of a question follows from a hash of the number's digits and the two units, whatever its wording, its
direction and the place of its decimal point: 84 feet in metres and 8.4 m in feet are in the same split. So a table of
the training questions answers none of the held-out ones.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from sar_kd.data.samples import Conversation, Message

SPLITS = {"train": 0.8, "validation": 0.9, "test": 1.0}
"""Upper end of each split on [0, 1), in order."""

COUNTS = {"train": 20000, "validation": 500, "test": 500}
"""Questions of each split in a run; validation gives the perplexity, test the accuracy."""

TOLERANCE = 0.05
"""An answer is right within this share of the true value."""

WORDINGS = (
    "Convert {value} {source} to {target}.",
    "How many {target} are {value} {source}?",
    "{value} {source} in {target}?",
    "What is {value} {source} in {target}?",
    "Express {value} {source} in {target}.",
)

FACTORS: dict[str, dict[tuple[str, str], float]] = {
    "length": {
        ("km", "m"): 1000, ("m", "cm"): 100, ("m", "feet"): 1 / 0.3048, ("inches", "cm"): 2.54,
        ("miles", "km"): 1.609344,
    },
    "mass": {("kg", "g"): 1000, ("kg", "pounds"): 1 / 0.45359237, ("ounces", "g"): 28.349523125},
    "time": {("hours", "minutes"): 60, ("minutes", "seconds"): 60, ("days", "hours"): 24},
    "volume": {("liters", "ml"): 1000, ("gallons", "liters"): 3.785411784, ("cups", "ml"): 236.5882365},
    "speed": {("m/s", "km/h"): 3.6, ("mph", "km/h"): 1.609344},
    "data": {("MB", "kB"): 1000, ("GB", "MB"): 1000, ("bytes", "bits"): 8},
}  # fmt: skip
"""By quantity: how many of the second unit one of the first is; used in both directions. Prefixes are decimal."""

_TEMPERATURES = {
    ("celsius", "fahrenheit"): (range(1, 100), lambda x: 1.8 * x + 32),
    ("fahrenheit", "celsius"): (range(34, 212), lambda x: (x - 32) / 1.8),
    ("celsius", "kelvins"): (range(1, 100), lambda x: x + 273.15),
    ("kelvins", "celsius"): (range(275, 373), lambda x: x - 273.15),
}

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One question with its answer."""

    quantity: str
    """A key of `FACTORS`, or 'temperature'"""
    text: str
    answer: str
    """The target: the calculation and, between the tags, `true_value` in two digits"""
    true_value: float
    split: str

    def is_right(self, number: float | None) -> bool:
        """Is `number`, as `parse_answer` found it, within `TOLERANCE` of the true value?"""
        return number is not None and abs(number - self.true_value) <= TOLERANCE * abs(self.true_value)


def questions(split: str, count: int, seed: int = 0) -> list[Question]:
    """The first `count` questions of a split, all different, in the random order of `seed`.

    split: a key of `SPLITS`
    Raises: ValueError if the split has fewer
    """
    found = [question for question in _all_questions() if question.split == split]
    if not 0 < count <= len(found):
        raise ValueError(f"the split '{split}' holds {len(found)} questions, not {count}")
    random.Random(f"{split} {seed}").shuffle(found)
    return found[:count]


def parse_answer(text: str) -> float | None:
    """The number between the first pair of tags; None if there is no pair, or no number between them."""
    found = _ANSWER.search(text)
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def in_two_digits(number: float) -> str:
    """The number rounded to two significant digits, without an exponent: 0.0254 is 0.025, 2540 is 2500, 3.0 is 3."""
    return _rounded(number, 2)


def _rounded(number: float, digits: int) -> str:
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    text = f"{float(f'{mantissa}e{exponent}'):.{max(0, digits - 1 - int(exponent))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@lru_cache(maxsize=1)
def _all_questions() -> tuple[Question, ...]:
    return tuple(_generate())


def _generate() -> Iterator[Question]:
    values = [f"{tenths / 10:g}" for tenths in range(10, 100)] + [str(number) for number in range(10, 100)]
    for quantity, factors in FACTORS.items():
        for (large, small), factor in factors.items():
            for value in values:
                for source, target, share in ((large, small, factor), (small, large, 1 / factor)):
                    yield from _worded(quantity, value, source, target, float(value) * share, _steps(value, share))
    for (source, target), (numbers, convert) in _TEMPERATURES.items():
        for number in numbers:
            steps = _temperature_steps(number, source, target)
            yield from _worded("temperature", str(number), source, target, convert(number), steps)


def _steps(value: str, factor: float) -> str:
    """The calculation, in products of the last digit and of the digits before it: '8.4*3.28=26.2+1.3='."""
    formula = f"{value}*{_rounded(factor, 3)}=" if factor > 1 else f"{value}/{_rounded(1 / factor, 3)}="
    moves_point = math.log10(factor) == round(math.log10(factor))
    terms = _terms(value, factor)
    return formula + (f"{terms}=" if "+" in terms and not moves_point else "")


def _terms(value: str, factor: float) -> str:
    """The products of `factor` with the digits before the last one and with the last: '26.2+1.3' for 8.4 and 3.28."""
    last = float(re.sub("[0-9](?=.)", "0", value))  # 0.4 of 8.4
    if last in (0.0, float(value)):
        return _rounded(float(value) * factor, 3)
    first = _rounded((float(value) - last) * factor, 3)
    return f"{first}+{last * factor:.{len(first.partition('.')[2])}f}"


def _temperature_steps(number: int, source: str, target: str) -> str:
    if target == "fahrenheit":
        return f"{number}*1.8+32={_terms(str(number), 1.8)}+32="
    if source == "fahrenheit":
        return f"({number}-32)/1.8={_steps(str(number - 32), 1 / 1.8)}"
    return f"{number}{'+' if target == 'kelvins' else '-'}273="


def _worded(quantity: str, value: str, source: str, target: str, true_value: float, step: str) -> Iterator[Question]:
    answer, split = f"{step}<answer>{in_two_digits(true_value)}</answer>", split_of(value, source, target)
    for wording in WORDINGS:
        text = wording.format(value=value, source=source, target=target)
        yield Question(quantity, text, answer, true_value, split)


def split_of(value: str, source: str, target: str) -> str:
    """The split of the questions about these digits and these two units."""
    digits = value.replace(".", "").strip("0")
    name = " ".join((digits, *sorted((source, target))))
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next(split for split, end in SPLITS.items() if position < end)


def task_questions(split: str) -> list[Conversation]:
    """The questions of `--task units` as conversations named by their text. split: a key of `SPLITS`"""
    return [
        Conversation(each.text, (Message("user", each.text, False), Message("assistant", each.answer, True)), True)
        for each in questions(split, COUNTS[split])
    ]

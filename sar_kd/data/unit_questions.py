"""Questions about units, and their right answers: the task of `--task units`.

A question asks for a number of two digits to be converted from one unit to another, in one of several wordings. The
answer shows the calculation and puts the result between tags:

    How many feet are 8.4 m?    8.4*3.28=26.2+1.3=<answer>28</answer>

A conversion is calculated digit by digit, so that a small model can do it for a number that is not in the training
text. Factors have three digits, and so has the larger of two terms, or four. An answer is the sum of the terms as they
stand there, rounded half up to two digits. It is within 5 % of the true value for every number, and 5 % is the
tolerance of an answer.

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
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache

from sar_kd.data.files.samples import Conversation, Message

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
    """The target: the calculation and, between the tags, its result in two digits"""
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


def in_digits(number: Decimal, digits: int) -> str:
    """The number rounded half up to significant digits, no exponent: in two, 0.0254 is 0.025 and 2540 is 2500."""
    text = f"{_rounded(number, digits):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _rounded(number: Decimal, digits: int) -> Decimal:
    return number.quantize(Decimal(1).scaleb(number.adjusted() - digits + 1), ROUND_HALF_UP)


@lru_cache(maxsize=1)
def _all_questions() -> tuple[Question, ...]:
    return tuple(_generate())


def _generate() -> Iterator[Question]:
    values = [f"{tenths / 10:g}" for tenths in range(10, 100)] + [str(number) for number in range(10, 100)]
    for quantity, factors in FACTORS.items():
        for (large, small), factor in factors.items():
            for value in values:
                for source, target, share in ((large, small, factor), (small, large, 1 / factor)):
                    calculation = _product(Decimal(value), share)
                    yield from _worded(quantity, value, source, target, float(value) * share, *calculation)
    for (source, target), (numbers, convert) in _TEMPERATURES.items():
        for number in numbers:
            calculation = _temperature(Decimal(number), source, target)
            yield from _worded("temperature", str(number), source, target, convert(number), *calculation)


def _product(value: Decimal, factor: float) -> tuple[str, Decimal]:
    """`value` times the factor in three digits: the calculation and its result, '8.4*3.28=26.2+1.3=' and 27.5."""
    divides = factor < 1
    shown = _rounded(Decimal(1 / factor if divides else factor), 3)
    formula = f"{value}{'/' if divides else '*'}{in_digits(shown, 3)}="
    is_power_of_ten = shown == Decimal(1).scaleb(shown.adjusted())
    terms = [value] if is_power_of_ten else _digits_of(value)
    products = [term / shown if divides else term * shown for term in terms]
    if len(products) == 1:
        return formula, products[0]
    rounded = _to_one_place(products)
    return f"{formula}{_sum(rounded)}=", sum(rounded, Decimal(0))


def _digits_of(value: Decimal) -> list[Decimal]:
    """The digits before the last one, and the last: 8 and 0.4 of 8.4; the value alone if one of them is 0."""
    last = value % Decimal(1).scaleb(int(value.as_tuple().exponent) + 1)
    return [value - last, last] if last not in (0, value) else [value]


def _to_one_place(terms: list[Decimal]) -> list[Decimal]:
    """All rounded at one place, the third digit of the first, so that none is lost in the sum: 23.0+0.7, 1.00+0.11.

    The fourth digit where the first is 1: there half of the third is 0.5 %, and with the answer's rounding too much.
    """
    exponent = terms[0].adjusted()
    begins_with_one = terms[0] < Decimal(2).scaleb(exponent)
    place = Decimal(1).scaleb(min(0, exponent - 2 - begins_with_one))
    return [term.quantize(place, ROUND_HALF_UP) for term in terms]


def _sum(terms: list[Decimal]) -> str:
    return "+".join(f"{term:f}" for term in terms)


def _temperature(number: Decimal, source: str, target: str) -> tuple[str, Decimal]:
    """The calculation for a temperature and its result, as `_product`."""
    if target == "fahrenheit":
        steps, product = _product(number, 1.8)
        terms = steps.split("=")[1]
        return f"{number}*1.8+32=" + (f"{terms}+32=" if terms else ""), product + 32
    if source == "fahrenheit":
        steps, quotient = _product(number - 32, 1 / 1.8)
        return f"({number}-32)/1.8={steps}", quotient
    offset = Decimal("273.15")
    return (f"{number}+{offset}=", number + offset) if target == "kelvins" else (f"{number}-{offset}=", number - offset)


def _worded(
    quantity: str, value: str, source: str, target: str, true_value: float, steps: str, result: Decimal
) -> Iterator[Question]:
    answer, split = f"{steps}<answer>{in_digits(result, 2)}</answer>", split_of(value, source, target)
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

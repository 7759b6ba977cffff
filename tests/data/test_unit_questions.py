"""The unit questions: their wording, their right answers, and that no split knows another's answers."""

import re
from decimal import Decimal
from fractions import Fraction
from itertools import combinations

import pytest

from sar_kd.data import unit_questions
from sar_kd.data.unit_questions import Question, in_digits, parse_answer, questions

# Metres, kilograms, seconds, cubic metres, metres a second and bytes, from the definitions of the units.
SI = {
    "km": 1e3, "m": 1.0, "cm": 1e-2, "feet": 0.3048, "inches": 0.0254, "miles": 1609.344,
    "kg": 1.0, "g": 1e-3, "pounds": 0.45359237, "ounces": 0.45359237 / 16,
    "hours": 3600.0, "minutes": 60.0, "seconds": 1.0, "days": 86400.0,
    "liters": 1e-3, "ml": 1e-6, "gallons": 231 * 0.0254**3, "cups": 231 * 0.0254**3 / 16,
    "m/s": 1.0, "km/h": 1e3 / 3600, "mph": 1609.344 / 3600,
    "MB": 1e6, "kB": 1e3, "GB": 1e9, "bytes": 1.0, "bits": 0.125,
}  # fmt: skip
PATTERNS = [
    re.compile("^" + re.escape(wording).replace(r"\{", "{").replace(r"\}", "}").format(
        value=r"(?P<value>[\d.]+)", source="(?P<source>[a-zA-Z/]+)", target="(?P<target>[a-zA-Z/]+)") + "$")
    for wording in unit_questions.WORDINGS
]  # fmt: skip


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Question]]:
    """Every question there is."""
    found = {}
    for split in unit_questions.SPLITS:
        with pytest.raises(ValueError, match="holds") as error:
            questions(split, 10**9)
        found[split] = questions(split, int(re.search(r"holds (\d+)", str(error.value))[1]))
    return found


def _asked(question: Question) -> tuple[str, str, str]:
    """The number, its unit and the unit that is wanted, as a reader takes them from the text."""
    found = next(match for pattern in PATTERNS if (match := pattern.match(question.text)))
    return found["value"], found["source"], found["target"]


def _in_kelvins(value: float, unit: str) -> float:
    return {"celsius": value + 273.15, "fahrenheit": (value + 459.67) / 1.8, "kelvins": value}[unit]


def _expected(value: str, source: str, target: str) -> float:
    if source in SI:
        return float(value) * SI[source] / SI[target]
    kelvins = _in_kelvins(float(value), source)
    return {"celsius": kelvins - 273.15, "fahrenheit": kelvins * 1.8 - 459.67, "kelvins": kelvins}[target]


def test_every_true_value_is_that_of_the_definitions(splits):
    for asked in (asked for found in splits.values() for asked in found):
        assert asked.true_value == pytest.approx(_expected(*_asked(asked)), rel=1e-9), asked


def test_every_answer_is_right_by_its_own_rule(splits):
    assert all(asked.is_right(parse_answer(asked.answer)) for found in splits.values() for asked in found)


def _exact(expression: str) -> Fraction:
    """The value of '26.2+1.3', in exact arithmetic."""
    return eval(re.sub(r"[\d.]+", r'Fraction("\g<0>")', expression), {"Fraction": Fraction})


def _places(expression: str) -> int:
    """Decimals of the number with the fewest."""
    return min(len(number.partition(".")[2]) for number in re.findall(r"[\d.]+", expression))


def _in_two_digits(number: Fraction) -> Fraction:
    unit = Fraction(10) ** next(e for e in range(-9, 9) if Fraction(10) ** (e + 1) <= number < Fraction(10) ** (e + 2))
    return (number / unit + Fraction(1, 2)).__floor__() * unit


def test_every_calculation_is_right_as_it_stands_there(splits):
    """Two terms lose at most half a unit of their last place each, and the answer is the last sum in two digits."""
    for text in {asked.answer for found in splits.values() for asked in found}:
        *steps, answer = text.removesuffix("</answer>").replace("<answer>", "").split("=")
        values = [_exact(step) for step in steps]
        for value, after, step in zip(values, values[1:], steps[1:], strict=False):
            assert abs(value - after) <= Fraction(1, 10 ** _places(step)), text
        assert _in_two_digits(values[-1]) == Fraction(answer), text


def test_no_question_stands_in_two_splits_or_twice(splits):
    texts = [asked.text for found in splits.values() for asked in found]
    assert len(texts) == len(set(texts)) > 30000


def test_splits_share_no_number_and_units_in_any_wording_direction_or_place_of_the_point(splits):
    def key(asked):
        value, *pair = _asked(asked)
        return value.replace(".", "").strip("0"), frozenset(pair)

    keys = {split: {key(asked) for asked in found} for split, found in splits.items()}
    assert all(keys[a].isdisjoint(keys[b]) for a, b in combinations(keys, 2))


def test_a_table_of_the_training_answers_answers_no_other_question(splits):
    known = {_asked(asked) for asked in splits["train"]}
    held_out = [_asked(asked) for split in ("validation", "test") for asked in splits[split]]
    assert not known & set(held_out)
    digits = {(value.replace(".", "").strip("0"), *pair) for value, *pair in known}
    assert not digits & {(value.replace(".", "").strip("0"), *pair) for value, *pair in held_out}


def test_each_split_asks_for_every_quantity_in_every_wording_with_decimals(splits):
    for found in splits.values():
        assert {asked.quantity for asked in found} == {*unit_questions.FACTORS, "temperature"}
        assert {next(i for i, p in enumerate(PATTERNS) if p.match(asked.text)) for asked in found} == set(range(5))
        assert any("." in _asked(asked)[0] for asked in found)


def test_a_seed_gives_its_questions_and_another_gives_others():
    assert questions("train", 50, seed=1) == questions("train", 50, seed=1)
    assert questions("train", 50, seed=1) != questions("train", 50, seed=2)
    assert questions("train", 20, seed=1) == questions("train", 50, seed=1)[:20]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0254, "0.025"), (2540, "2500"), (3.0, "3"), (0.0996, "0.1"), (99.6, "100"), (1e-4, "0.0001")],
)
def test_numbers_are_written_in_two_digits_without_an_exponent(number, text):
    assert in_digits(Decimal(str(number)), 2) == text


def test_rounding_to_two_digits_stays_within_the_tolerance():
    numbers = [mantissa / 1000 * 10**exponent for exponent in range(-3, 6) for mantissa in range(1000, 10000, 7)]
    assert max(abs(float(in_digits(Decimal(x), 2)) - x) / x for x in numbers) < unit_questions.TOLERANCE


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8.4*3.28=<answer>28</answer>", 28.0),
        ("<answer> 2.8e1 </answer> <answer>3</answer>", 28.0),
        ("<answer>28", None),
        ("28", None),
        ("<answer></answer>", None),
        ("<answer>28 feet</answer>", None),
        ("<answer>nan</answer>", None),
        ("<answer>inf</answer>", None),
    ],
)  # fmt: skip
def test_an_answer_is_the_number_between_the_first_tags(text, number):
    assert parse_answer(text) == number


@pytest.mark.parametrize(
    ("number", "right"), [(95.0, True), (105.0, True), (94.9, False), (105.1, False), (None, False)]
)
def test_within_five_percent_is_right(number, right):
    assert Question("length", "", "", 100.0, "test").is_right(number) is right


def test_more_questions_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"the split 'test' holds \d+ questions, not 999999"):
        questions("test", 999999)

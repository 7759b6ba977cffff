"""What `unit_conversion.yaml` calls: the test questions of `--task units`, and the score of an answer.

lm-evaluation-harness reads this file by its path, from beside the task file.
"""

from __future__ import annotations

from typing import Any

from sar_kd.data.unit_questions import COUNTS, parse_answer, questions


def load_questions(**options: Any) -> dict:
    """The split 'test', as a data set. options: what the harness hands over, of which none is used"""
    import datasets

    rows = [
        {"question": each.text, "answer": each.answer, "number": number}
        for number, each in enumerate(questions("test", COUNTS["test"]))
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def score(row: dict, results: list[str]) -> dict[str, float]:
    """Is the answer within 5 % of the true value, and does it hold a number between the tags?"""
    question, number = questions("test", COUNTS["test"])[row["number"]], parse_answer(results[0])
    return {"accuracy": float(question.is_right(number)), "answer_rate": float(number is not None)}

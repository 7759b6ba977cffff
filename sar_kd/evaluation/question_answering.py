"""Accuracy on questions with a known answer: greedy generation, in batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from tqdm import tqdm

from sar_kd.data.batch import IGNORE_INDEX
from sar_kd.data.dataset import Dataset
from sar_kd.data.unit_questions import Question, parse_answer
from sar_kd.evaluation.perplexity import eval_mode
from sar_kd.models.generation import generate
from sar_kd.runtime.precision import Precision

_BATCH_SIZE = 100

_EXTRA_TOKENS = 16
"""Tokens by which an answer may exceed the longest right one"""


@dataclass(frozen=True)
class AnswerScores:
    """A model's answers to questions that it was not trained on."""

    num_right: int
    num_answered: int
    num_questions: int
    num_nonfinite: int = 0
    """Answers that ended because the next logits were not finite"""

    @property
    def accuracy(self) -> float:
        """Share of the questions whose answer is right within 5 %."""
        return self.num_right / self.num_questions

    @property
    def answer_rate(self) -> float:
        """Share of the questions whose answer holds a number between the tags."""
        return self.num_answered / self.num_questions

    def line(self, label: str) -> str:
        """For people. label: which model it is."""
        nonfinite = f", {self.num_nonfinite} ended at logits that are not finite" if self.num_nonfinite else ""
        return (
            f"benchmark_result.accuracy={self.accuracy:.3f}  benchmark_result.answer_rate={self.answer_rate:.3f}  "
            f"({label}, {self.num_questions} questions{nonfinite})"
        )


def answer_questions(
    model: nn.Module,
    dataset: Dataset,
    questions: list[Question],
    precision: Precision,
    *,
    which: str = "student",
    label: str = "Questions",
) -> AnswerScores:
    """Let `model` answer every question, in eval mode.

    dataset: the questions as conversations, named after their text; one that it skips counts as not answered
    which: whose tokens, 'student' or 'teacher'; label: of the progress bar
    """
    by_name = {question.text: question for question in questions}
    posed = [by_name[name] for name in dataset.text.names]
    answers: list[str] = []
    num_nonfinite = 0
    with tqdm(total=len(posed), desc=label, leave=False, disable=not sys.stdout.isatty(), file=sys.stdout) as bar:
        for batch, is_finite in _answers(model, dataset, precision, which):
            answers += batch
            num_nonfinite += is_finite.count(False)
            bar.update(len(batch))
    numbers = [parse_answer(answer) for answer in answers]
    num_right = sum(question.is_right(number) for question, number in zip(posed, numbers, strict=True))
    return AnswerScores(num_right, sum(number is not None for number in numbers), len(questions), num_nonfinite)


def _answers(
    model: nn.Module, dataset: Dataset, precision: Precision, which: str
) -> Iterator[tuple[list[str], list[bool]]]:
    """The generated answers, and whether the logits of each were finite, a batch at a time."""
    tokenizer = getattr(dataset.pair, which)
    # An answer ends with what follows it in training: the end of text, or the chat template's own token.
    stops = {getattr(dataset.pair, f"{which}_end"), *dataset.text.stop_ids[0 if which == "student" else -1]}
    for batch in dataset.token_batches(which, _BATCH_SIZE):
        is_target = batch.labels != IGNORE_INDEX
        lengths = is_target.sum(1)
        firsts = is_target.int().argmax(1)
        prompts = [ids[:first].tolist() for ids, first in zip(batch.input_ids, firsts.tolist(), strict=True)]
        max_new_tokens = [int(lengths.max()) + _EXTRA_TOKENS] * len(prompts)
        with eval_mode(model, precision):
            answers = generate(model, prompts, stop_token_ids=sorted(stops), max_new_tokens=max_new_tokens)
        texts = tokenizer.batch_decode([answer.ids for answer in answers], skip_special_tokens=True)
        yield texts, [answer.is_finite for answer in answers]

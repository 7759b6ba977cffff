"""How many questions a model answers, and how many of the answers are right: greedy generation, in batches."""

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

_ROOM = 16
"""Tokens that an answer may be longer than the longest one that is right."""


@dataclass(frozen=True)
class AnswerScores:
    """What a model makes of questions that it has not seen."""

    num_right: int
    num_answered: int
    num_questions: int

    @property
    def accuracy(self) -> float:
        """Share of the questions whose answer is right within 5 %."""
        return self.num_right / self.num_questions

    @property
    def answer_rate(self) -> float:
        """Share of the questions whose answer holds a number between the tags."""
        return self.num_answered / self.num_questions

    def line(self, who: str) -> str:
        """For people: what was found, and of whom."""
        return (
            f"benchmark_result.accuracy={self.accuracy:.3f}  benchmark_result.answer_rate={self.answer_rate:.3f}  "
            f"({who}, {self.num_questions} questions)"
        )


def answer_questions(
    model: nn.Module, corpus: Dataset, questions: list[Question], precision: Precision, *, which: str = "student",
    label: str = "Benchmark",
) -> AnswerScores:  # fmt: skip
    """Let `model` answer every question, in eval mode, in which it is not left.

    corpus: the questions as conversations under their own text's name, as training reads them; a question that it
    leaves out counts as not answered
    which: whose tokens, 'student' or 'teacher'
    """
    by_name = {question.text: question for question in questions}
    asked = [by_name[name] for name in corpus.text.names]
    given = []
    with tqdm(total=len(asked), desc=label, leave=False, disable=not sys.stdout.isatty(), file=sys.stdout) as bar:
        for answers in _answers(model, corpus, precision, which):
            given += answers
            bar.update(len(answers))
    numbers = [parse_answer(answer) for answer in given]
    right = sum(question.is_right(number) for question, number in zip(asked, numbers, strict=True))
    return AnswerScores(right, sum(number is not None for number in numbers), len(questions))


def _answers(model: nn.Module, corpus: Dataset, precision: Precision, which: str) -> Iterator[list[str]]:
    """What the model writes behind each question, a batch at a time."""
    tokenizer, end = getattr(corpus.pair, which), getattr(corpus.pair, f"{which}_end")
    for batch in corpus.token_batches(which, _BATCH_SIZE):
        is_target = batch.labels != IGNORE_INDEX
        lengths = is_target.sum(1)
        firsts = is_target.int().argmax(1)
        # What ends an answer is what training put behind it: the end of text, or the template's own token.
        stops = {end, *batch.labels.gather(1, (firsts + lengths - 1)[:, None]).flatten().tolist()}
        prompts = [ids[:first].tolist() for ids, first in zip(batch.input_ids, firsts.tolist(), strict=True)]
        rooms = [int(lengths.max()) + _ROOM] * len(prompts)
        with eval_mode(model, precision):
            written = generate(model, prompts, stop_token_ids=sorted(stops), max_new_tokens=rooms)
        yield tokenizer.batch_decode([answer.ids for answer in written], skip_special_tokens=True)

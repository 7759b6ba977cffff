"""Sample texts of a run: how its models continue beginnings of the held-out text, before and after."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sar_kd.config.sections import TrainConfig
from sar_kd.data.files.samples import Document, Sample
from sar_kd.evaluation.perplexity import eval_mode
from sar_kd.models.generation import generate
from sar_kd.models.loading import Models
from sar_kd.models.placement import is_offloaded
from sar_kd.reporting.history import SAMPLES
from sar_kd.runtime.distributed import current_process_group
from sar_kd.runtime.files import atomic_write
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.backends import called_ids
from sar_kd.training.callbacks import Callback

FEWEST_STEPS = 20
"""A shorter run writes no samples."""

_NUM_SAMPLES, _PROMPT_CHARACTERS, _NEW_TOKENS = 3, 100, 40

_REPETITION_PENALTY = 1.1

_GENERATION_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError, AssertionError,
)  # fmt: skip
"""What a model that cannot generate may raise"""


class SampleTexts(Callback):
    """Lets the student, and a teacher that is in memory, continue three texts before the first step, and the student at
    the end too. Greedy, so that no random number of the run is used.
    """

    def __init__(self, models: Models, held_out: Iterable[Sample], precision: Precision, train: TrainConfig):
        super().__init__()
        self._models, self._precision = models, precision
        self._is_on = train.train_steps >= FEWEST_STEPS and current_process_group().size == 1
        texts = (each for each in held_out if isinstance(each, Document))  # no conversations
        documents = itertools.islice(texts, _NUM_SAMPLES) if self._is_on else []
        self.state: dict = {"samples": [{"text": _beginning(document.text)} for document in documents]}

    def on_train_begin(self) -> list[str]:
        messages = self._continue("student, before", "student")
        teacher = self._models.teacher
        if teacher is not None and self._models.offload is None and not is_offloaded(teacher):
            messages += self._continue("teacher", "teacher")
        return messages

    def on_train_end(self, student_folder: Path) -> list[str]:
        if not self.state["samples"]:
            return []
        messages = self._continue("student, after", "student")
        atomic_write(student_folder.parent / SAMPLES, json.dumps(self.state["samples"], indent=1, ensure_ascii=False))
        return messages

    def _continue(self, name: str, role: str) -> list[str]:
        model: Any = getattr(self._models, role)
        tokenizer = getattr(self._models.tokenizers, role)
        prompts = [called_ids(tokenizer, sample["text"]) for sample in self.state["samples"]]
        if not self._is_on or not prompts or not all(prompts):
            return []
        try:
            with eval_mode(model, self._precision):
                generations = generate(
                    model,
                    prompts,
                    stop_token_ids=[tokenizer.eos_token_id],
                    max_new_tokens=[_NEW_TOKENS] * len(prompts),
                    repetition_penalty=_REPETITION_PENALTY,
                )
        except _GENERATION_ERRORS as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return [f"Warning: no sample texts of the {name} ({reason}); the run goes on"]
        for sample, generation in zip(self.state["samples"], generations, strict=True):
            text = tokenizer.decode(generation.ids, skip_special_tokens=True)
            sample[name] = text if generation.is_finite else f"{text} (the next logits are not finite)"
        return []


def _beginning(text: str) -> str:
    """The first words of a text."""
    head = text.strip()[:_PROMPT_CHARACTERS]
    return head.rsplit(" ", 1)[0] if " " in head else head

"""Callbacks of the training loop: hooks, checks that the targets teach anything, and the questions of a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from sar_kd.config.fields import RunConfig
from sar_kd.config.sections import DataConfig
from sar_kd.data import unit_questions
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.skipped import TOO_LONG, by_reason, is_incomplete, unusable
from sar_kd.data.unit_questions import task_questions
from sar_kd.evaluation.question_answering import answer_questions
from sar_kd.models.loading import Models, load_for_generation
from sar_kd.runtime.console import first_few
from sar_kd.runtime.precision import Precision
from sar_kd.training.checkpoint import save_student_of_run
from sar_kd.training.step import StepContext, StepReport

MicroBatches = Callable[[], list[Batch]]
"""Makes the micro-batches of a step; on several ranks those in which a NaN may lie, of any rank."""

LAST = "last_"
"""Before the name of a folder: it holds the student of the last step, not the best one"""

StepResult = tuple[list[str], str | None]
"""Messages, and the reason why the run must stop, if it must."""


class Callback:
    """Hooks that the trainer calls; the defaults do nothing. Messages that a hook returns are logged."""

    def __init__(self) -> None:
        self.state: dict = {}
        """Plain values that a checkpoint keeps"""

    def on_train_begin(self) -> list[str]:
        """Called before the first step; not in a resumed run. Returns: messages"""
        return []

    def on_step_end(self, step: int, report: StepReport, micro_batches: MicroBatches) -> StepResult:
        """Called after each attempted update."""
        return [], None

    def metrics(self) -> dict:
        """Metrics of the last step, for its record in `metrics.jsonl`."""
        return {}

    def on_train_end(self, student_folder: Path) -> list[str]:
        """Called after the last step, when the best student is saved. Returns: messages"""
        return []

    def summary(self) -> dict:
        """Entries of `summary.json`."""
        return {}


class LastStudent(Callback):
    """Saves the student of the last step beside the best one, in `last_student/`, and an adapter in `last_adapter/`."""

    def __init__(self, config: RunConfig, models: Models, context: StepContext, train: Dataset):
        super().__init__()
        self._saved = config, models, context, train.text

    def on_train_end(self, student_folder: Path) -> list[str]:
        save_student_of_run(*self._saved, LAST)
        return [f"The student of the last step is saved in {student_folder.with_name(LAST + student_folder.name)}"]


_MAX_WITHOUT_TARGETS = 0.01
"""Largest share of the documents, or of the batches, that may be without a target."""

_MIN_BATCHES = 100

_MAX_ZERO_STEPS = 3

_NO_TARGETS = (
    "nothing in them is to be learned. Likely causes: the answer is cut off (raise --block_size, or shorten the "
    "question), the chat template drops the assistant's turn, or the answer is in another field (question and "
    "answer, prompt and completion, or messages with the role assistant)"
)

_ZERO_LOSS = (
    "the loss is exactly 0: the targets are the same in every example, or the model knows them by heart; look at the "
    "answers in the training file"
)

_ZERO_GRADIENT = (
    "the gradient is exactly 0 although the loss is not: float16 rounds it to 0 (raise --init_loss_scale, or use "
    "--model_dtype float32), or the trainable parameters do not reach the loss (--lora_targets)"
)


def check_targets(train: Dataset, data: DataConfig) -> list[str]:
    """Messages about examples of which more than the answer is learned.

    Raises: UsageError with the cause, if more than 1 % of the documents were skipped, apart from incomplete examples
    """
    skipped = [name for name in train.text.skipped_documents if not is_incomplete(name)]
    used = len(train.text.names)
    if len(skipped) > _MAX_WITHOUT_TARGETS * (len(skipped) + used):
        too_long = next(iter(by_reason(skipped))) == TOO_LONG
        option = f"--block_size {data.block_size}" if too_long else data.text_options()[0]
        raise unusable(option, skipped, len(skipped) + used)
    plain = used - len(train.text.conversations)
    return [f"{plain} of {used} documents are plain text: all of it is learned, not an answer only"] if plain else []


class TargetChecks(Callback):
    """Stops a run that cannot learn, and names the cause.

    It stops where more than 1 % of the batches have no target, or three updates in a row have a loss, or a gradient,
    of exactly 0. Batches without a target are reported.
    """

    def __init__(self, train: Dataset):
        super().__init__()
        self._train = train
        self.state = {"batches": 0, "without_targets": 0, "zero_losses": 0, "zero_gradients": 0}

    def on_step_end(self, step: int, report: StepReport, micro_batches: MicroBatches) -> StepResult:
        state, batches = self.state, micro_batches()
        empty = [batch for batch in batches if batch.num_target_tokens == 0]
        state["batches"] += len(batches)
        state["without_targets"] += len(empty)
        names = dict.fromkeys(n for batch in empty for block in batch.blocks for n in self._train.documents_of(block))
        shown = first_few(list(names))
        messages = [f"Step {step}: a batch without a target is skipped (no_targets): {shown}"] if empty else []
        if state["without_targets"] > _MAX_WITHOUT_TARGETS * max(state["batches"], _MIN_BATCHES):
            count = f"{state['without_targets']} of {state['batches']} batches have no target"
            return messages, f"{count} ({shown}): {_NO_TARGETS}"
        if report.verdict.applied:
            state["zero_losses"] = state["zero_losses"] + 1 if report.loss == 0.0 else 0
            state["zero_gradients"] = state["zero_gradients"] + 1 if report.grad_norm == 0.0 else 0
        for name, reason in (("zero_losses", _ZERO_LOSS), ("zero_gradients", _ZERO_GRADIENT)):
            if state[name] >= _MAX_ZERO_STEPS:
                return messages, f"{_MAX_ZERO_STEPS} steps running {reason}"
        return messages, None

    def summary(self) -> dict:
        return {"batches_without_targets": self.state["without_targets"]}


class TaskEvaluation(Callback):
    """Accuracy on the task's test questions before and after the run: of the student, the teacher, and the student as
    saved. No run trains on these questions or selects its best student by them.
    """

    def __init__(
        self,
        models: Models,
        limits: tuple[int, int],
        precision: Precision,
        trust_remote_code: bool = False,
        max_questions: int | None = None,
    ):
        """limits: as `Models.block_limits` gives them"""
        super().__init__()
        self._models, self._precision, self._trust_remote_code = models, precision, trust_remote_code
        self._questions = unit_questions.questions("test", unit_questions.COUNTS["test"])[:max_questions]
        self._dataset = build_dataset(task_questions("test")[:max_questions], models.tokenizers, *limits)

    def on_train_begin(self) -> list[str]:
        messages = [self._evaluate("student_start", self._models.student, "student at the start")]
        if self._models.teacher is not None:
            messages.append(self._evaluate("teacher", self._models.teacher, "teacher", which="teacher"))
        return messages

    def on_train_end(self, student_folder: Path) -> list[str]:
        end = self._evaluate("student_end", self._models.student, "student at the end")
        student, _ = load_for_generation("output_dir", str(student_folder), self._trust_remote_code)
        return [end, self._evaluate("student", student.to(self._precision.device), "student as saved")]

    def _evaluate(self, key: str, model: nn.Module, label: str, which: str = "student") -> str:
        scores = answer_questions(
            model, self._dataset, self._questions, self._precision, which=which, label=f"Questions, {label}"
        )
        names = ("accuracy", "answer_rate", "num_questions", *(["num_nonfinite"] if scores.num_nonfinite else []))
        self.state[key] = {name: getattr(scores, name) for name in names}
        return scores.line(label)

    def summary(self) -> dict:
        return {"benchmark_result": self.state}

"""What takes part in a run beside its models: the calendar asks it, and by default it has nothing to say.

Is anything learned at all? Batches without a target, losses of exactly 0, gradients of exactly 0.

The questions of a task before a run and after it: what the teacher, the student and the saved student answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from sar_kd.config.sections import DataConfig
from sar_kd.data import unit_questions
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset
from sar_kd.data.unit_questions import task_questions
from sar_kd.errors import UsageError
from sar_kd.evaluation.question_answering import AnswerScores, answer_questions
from sar_kd.models.loading import Models, load_for_generation
from sar_kd.runtime.console import first_few
from sar_kd.runtime.precision import Precision
from sar_kd.training.step import StepReport


class Callback:
    """The trainer's questions, each with the answer of a companion that has none."""

    def __init__(self):
        self.kept: dict = {}
        """Plain values that a resumed run must know; they travel in the checkpoint"""

    def begin(self) -> list[str]:
        """Before the first step: lines to show."""
        return []

    def note(self, step: int, report: StepReport, micro_batches: Sequence[Batch]) -> tuple[list[str], str | None]:
        """After an attempt: lines to show, and why the run must stop, None if it need not."""
        return [], None

    def figures(self) -> dict:
        """Of the last attempt, for its record in `metrics.jsonl`."""
        return {}

    def finish(self, student_folder: Path) -> list[str]:
        """After the last step, when the best student is saved: lines to show."""
        return []

    def summary(self) -> dict:
        """For `summary.json`."""
        return {}


class Callbacks(Callback):
    """All that take part in a run, as the calendar sees them: in order, one after the other."""

    def __init__(self, members: Sequence[Callback] = ()):
        super().__init__()
        self._members = members

    def begin(self) -> list[str]:
        """See `Callback`."""
        return [line for member in self._members for line in member.begin()]

    def look(self, step: int, report: StepReport, window: Callable[[], list[Batch]]) -> tuple[list[str], str | None]:
        """As `note`, with the attempt's micro-batches made when there is someone to see them."""
        return self.note(step, report, window()) if self._members else ([], None)

    def note(self, step: int, report: StepReport, micro_batches: Sequence[Batch]) -> tuple[list[str], str | None]:
        """See `Callback`; the first reason to stop."""
        found = [member.note(step, report, micro_batches) for member in self._members]
        lines = [line for said, _ in found for line in said]
        return lines, next((reason for _, reason in found if reason), None)

    def figures(self) -> dict:
        """See `Callback`."""
        return {name: value for member in self._members for name, value in member.figures().items()}

    def finish(self, student_folder: Path) -> list[str]:
        """See `Callback`."""
        return [line for member in self._members for line in member.finish(student_folder)]

    def summary(self) -> dict:
        """See `Callback`."""
        return {name: value for member in self._members for name, value in member.summary().items()}

    def all_kept(self) -> list[dict]:
        """What each of them keeps."""
        return [member.kept for member in self._members]

    def take_up(self, kept: Sequence[dict]) -> None:
        """Give each of them back what it kept."""
        for member, own in zip(self._members, kept, strict=True):
            member.kept = own


LARGEST_SHARE = 0.01
"""Of the documents, or of the batches, so many may be without a target; more is no accident."""

_FEWEST_BATCHES = 100

_STEPS_RUNNING = 3

NO_TARGETS = (
    "nothing in them is to be learned. Likely causes: the answer is cut off (raise --block_size, or shorten the "
    "question), the chat template drops the assistant's turn, or the answer stands in another field (question and "
    "answer, prompt and completion, or messages with the role assistant)"
)

ZERO_LOSS = (
    "the loss is exactly 0: the targets are the same in every example, or the model knows them by heart; look at the "
    "answers in the training file"
)

ZERO_GRADIENT = (
    "the gradient is exactly 0 although the loss is not: float16 rounds it to nothing (raise --init_loss_scale, or use "
    "--model_dtype float32), or what learns does not reach the loss (--lora_targets)"
)


def check_targets(train: Dataset, data: DataConfig) -> list[str]:
    """Lines about examples in which not only an answer is learned.

    Raises: UsageError with the cause, where more than 1 % of the documents had to be left out
    """
    missing, found = train.text.left_out, len(train.text.names)
    if len(missing) > LARGEST_SHARE * (len(missing) + found):
        share = f"{len(missing)} of {len(missing) + found} documents cannot be used ({first_few(missing)})"
        raise UsageError(f"--block_size {data.block_size}: {share}: {NO_TARGETS}")
    plain = found - len(train.text.conversations)
    return [f"{plain} of {found} documents are plain text: all of it is learned, not an answer only"] if plain else []


class TargetChecks(Callback):
    """Stops a run that cannot learn, and names the cause."""

    def __init__(self, train: Dataset):
        super().__init__()
        self._train = train
        self.kept = {"batches": 0, "without_targets": 0, "zero_losses": 0, "zero_gradients": 0}

    def note(self, step: int, report: StepReport, micro_batches: Sequence[Batch]) -> tuple[list[str], str | None]:
        """Batches without a target are named, more than 1 % of them stop the run; so do 3 zeros running."""
        kept, empty = self.kept, [batch for batch in micro_batches if batch.num_target_tokens == 0]
        kept["batches"] += len(micro_batches)
        kept["without_targets"] += len(empty)
        names = list(
            dict.fromkeys(n for batch in empty for block in batch.blocks for n in self._train.documents_of(block))
        )
        lines = [f"Step {step}: a batch without a target is skipped (no_targets): {first_few(names)}"] if empty else []
        if kept["without_targets"] > LARGEST_SHARE * max(kept["batches"], _FEWEST_BATCHES):
            count = f"{kept['without_targets']} of {kept['batches']} batches have no target"
            return lines, f"{count} ({first_few(names)}): {NO_TARGETS}"
        if report.verdict.applied:
            kept["zero_losses"] = kept["zero_losses"] + 1 if report.loss == 0.0 else 0
            kept["zero_gradients"] = kept["zero_gradients"] + 1 if report.grad_norm == 0.0 else 0
        for name, reason in (("zero_losses", ZERO_LOSS), ("zero_gradients", ZERO_GRADIENT)):
            if kept[name] >= _STEPS_RUNNING:
                return lines, f"{_STEPS_RUNNING} steps running {reason}"
        return lines, None

    def summary(self) -> dict:
        """How many batches had no target."""
        return {"batches_without_targets": self.kept["without_targets"]}


class TaskEvaluation(Callback):
    """Asks the test questions, which no run has trained on or chosen its best student by."""

    def __init__(
        self,
        models: Models,
        limits: tuple[int, int],
        precision: Precision,
        trust_remote_code: bool = False,
        most: int | None = None,
    ):
        """limits: as `Models.block_limits` gives them; most: so many questions at most, for a quick check"""
        super().__init__()
        self._models, self._precision, self._trust = models, precision, trust_remote_code
        self._questions = unit_questions.questions("test", unit_questions.COUNTS["test"])[:most]
        self._corpus = Dataset(task_questions("test")[:most], models.tokenizers, *limits)

    def begin(self) -> list[str]:
        """Ask the models that are there."""
        lines = [self._ask("student_start", self._models.student, "student at the start")]
        if self._models.teacher is not None:
            lines.append(self._ask("teacher", self._models.teacher, "teacher", which="teacher"))
        return lines

    def finish(self, student_folder: Path) -> list[str]:
        """Ask the student as it is, and the one that was saved, as it loads from there."""
        end = self._ask("student_end", self._models.student, "student at the end")
        student, _ = load_for_generation("output_dir", str(student_folder), self._trust)
        return [end, self._ask("student", student.to(self._precision.device), "student as saved")]

    def _ask(self, key: str, model: nn.Module, who: str, which: str = "student") -> str:
        result = answer_questions(
            model, self._corpus, self._questions, self._precision, which=which, label=f"Questions, {who}"
        )
        self.kept[key] = _figures(result)
        return result.line(who)

    def summary(self) -> dict:
        """Accuracy and answer rate by model."""
        return {"benchmark_result": self.kept}


def _figures(result: AnswerScores) -> dict:
    return {"accuracy": result.accuracy, "answer_rate": result.answer_rate, "num_questions": result.num_questions}

"""The questions of a task before a run and after it: what the teacher, the student and the saved student answer."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sar_kd import units
from sar_kd.benchmark import BenchmarkResult, benchmark
from sar_kd.companion import Companion
from sar_kd.data import Corpus
from sar_kd.documents import task_questions
from sar_kd.models import Models, load_for_writing
from sar_kd.precision import Precision


class Exam(Companion):
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
        self._questions = units.questions("test", units.COUNTS["test"])[:most]
        self._corpus = Corpus(task_questions("test")[:most], models.tokenizers, *limits)

    def begin(self) -> list[str]:
        """Ask the models that are there."""
        lines = [self._ask("student_start", self._models.student, "student at the start")]
        if self._models.teacher is not None:
            lines.append(self._ask("teacher", self._models.teacher, "teacher", which="teacher"))
        return lines

    def finish(self, student_folder: Path) -> list[str]:
        """Ask the student as it is, and the one that was saved, as it loads from there."""
        end = self._ask("student_end", self._models.student, "student at the end")
        student, _ = load_for_writing("output_dir", str(student_folder), self._trust)
        return [end, self._ask("student", student.to(self._precision.device), "student as saved")]

    def _ask(self, key: str, model: nn.Module, who: str, which: str = "student") -> str:
        result = benchmark(
            model, self._corpus, self._questions, self._precision, which=which, label=f"Questions, {who}"
        )
        self.kept[key] = _figures(result)
        return result.line(who)

    def summary(self) -> dict:
        """Accuracy and answer rate by model."""
        return {"benchmark_result": self.kept}


def _figures(result: BenchmarkResult) -> dict:
    return {"accuracy": result.accuracy, "answer_rate": result.answer_rate, "num_questions": result.num_questions}

"""A teacher that is read from a cache, as the calendar sees it; and which of the two kinds of teacher a run has."""

from __future__ import annotations

from sar_kd.config import Config
from sar_kd.data import Corpus
from sar_kd.evaluate import Evaluation
from sar_kd.models import Models
from sar_kd.no_teacher import NoTeacher
from sar_kd.objective import Objective
from sar_kd.precision import Precision
from sar_kd.progress import figures_of
from sar_kd.teacher_routing import TeacherRouting, build_teacher_routing
from sar_kd.world import ALONE, World


class StoredTeaching(NoTeacher):
    """What a run asks of a teacher that is not there any more, in its own routing."""

    def __init__(self, config: Config, train: Corpus):
        self._config, self.lines = config, _lines(config, train)
        self._figures: dict = {}

    def begin(self, validation: Corpus, precision: Precision) -> list[str]:
        """Add up what it made of the held-out text; lines to show."""
        assert validation.stored is not None
        nats, num_tokens = validation.stored.nats()
        found = figures_of(Evaluation(nats, num_tokens, validation.text.num_bytes))
        self._figures = {name: found[name] for name in ("val_ppl", "val_bits_per_byte")}
        return []

    def figures(self) -> dict:
        """Perplexity and bits per byte on held-out text."""
        return self._figures

    def summary(self) -> dict:
        """For `summary.json`."""
        loss = self._config.loss
        return {"teacher_cache": self._config.models.teacher_cache, "teacher_top_k": loss.teacher_top_k}


def _lines(config: Config, train: Corpus) -> tuple[str, ...]:
    """How the blocks of a run lie beside what the teacher read."""
    match = train.stored
    assert match is not None
    num_windows, num_blocks = len(match.windows()), len(train) - len(train.text.conversations)
    lines = []
    if num_blocks > num_windows:
        lines.append(
            f"The teacher read {num_windows:,} stretches of plain text, which take {num_blocks:,} blocks of "
            f"--block_size {config.data.block_size} here: behind the first of each it had read more than the student "
            f"has. `sar-kd cache --student_model {config.models.student_model}` cuts them to fit"
        )
    if match.num_unknown:
        named = ", ".join(match.some_unknown) + (", ..." if match.num_unknown > len(match.some_unknown) else "")
        lines.append(
            f"{match.num_unknown} documents are not in the cache as this student reads them, and are learned without "
            f"the teacher: {named}"
        )
    return tuple(lines)


def build_teaching(
    config: Config, models: Models, objective: Objective, train: Corpus, world: World = ALONE
) -> TeacherRouting | StoredTeaching:
    """The teacher of a run: from `--teacher_cache`, or there and routed as `--routing` asks.

    Raises: UsageError as `build_teacher_routing`
    """
    if config.models.teacher_cache:
        return StoredTeaching(config, train)
    return build_teacher_routing(config, models, objective, train, world)

"""Is anything learned at all? Batches without a target, losses of exactly 0, gradients of exactly 0."""

from __future__ import annotations

from collections.abc import Sequence

from sar_kd.companion import Companion
from sar_kd.config import DataConfig, UsageError
from sar_kd.data import Batch, Corpus
from sar_kd.metrics import few
from sar_kd.step import StepReport

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


def check_targets(train: Corpus, data: DataConfig) -> list[str]:
    """Lines about examples in which not only an answer is learned.

    Raises: UsageError with the cause, where more than 1 % of the documents had to be left out
    """
    missing, found = train.text.left_out, len(train.text.names)
    if len(missing) > LARGEST_SHARE * (len(missing) + found):
        share = f"{len(missing)} of {len(missing) + found} documents cannot be used ({few(missing)})"
        raise UsageError(f"--block_size {data.block_size}: {share}: {NO_TARGETS}")
    plain = found - len(train.text.conversations)
    return [f"{plain} of {found} documents are plain text: all of it is learned, not an answer only"] if plain else []


class Vitals(Companion):
    """Stops a run that cannot learn, and names the cause."""

    def __init__(self, train: Corpus):
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
        lines = [f"Step {step}: a batch without a target is skipped (no_targets): {few(names)}"] if empty else []
        if kept["without_targets"] > LARGEST_SHARE * max(kept["batches"], _FEWEST_BATCHES):
            count = f"{kept['without_targets']} of {kept['batches']} batches have no target"
            return lines, f"{count} ({few(names)}): {NO_TARGETS}"
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

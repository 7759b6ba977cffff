"""Where a run stands, and its entries of `summary.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

from sar_kd.runtime.environment import peak_memory
from sar_kd.runtime.precision import Precision
from sar_kd.training.guards import CAUSES, StepGuard


@dataclass
class TrainerState:
    """Where a run stands: what a resumed run needs and no other object holds."""

    step: int = 0
    """Attempts made"""
    tokens: int = 0
    """Target tokens of all attempts"""
    teacher_positions: int = 0
    """Of all attempts, as in `StepReport`"""
    teacher_rows_dropped: int = 0
    """Likewise"""
    teacher_rows_infinite: int = 0
    teacher_rows_unshared: int = 0
    """Likewise"""
    seconds: float = 0.0
    """Wall time, all parts of a resumed run together"""
    train_seconds: float = 0.0
    """The part of it spent in attempts"""
    teacher: dict = field(default_factory=dict)
    """As `Teacher.evaluate_start` gives it, before the first step; empty if there is none"""
    start: dict = field(default_factory=dict)
    """Validation metrics of the student before the first step; likewise the last ones, and the best ones"""
    last: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    document_nats: dict[str, list[float]] = field(default_factory=dict)
    """For each model of `held_out.json`, its loss on each group of `Dataset.num_groups`, documents first, nats"""
    last_step: int | None = None
    """The step of the last validation; None in a checkpoint of a version that did not keep it"""
    best_step: int = 0
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of text, tokenizers and models, as `digest_inputs` gives them"""
    callbacks: list[dict] = field(default_factory=list)
    """The state of each callback"""

    def summary(self, status: str, guard: StepGuard, precision: Precision) -> dict:
        """The run's entries of `summary.json`."""
        return {
            "status": status,
            "steps": self.step,
            "applied": guard.applied,
            "skipped": {cause: guard.skipped[cause] for cause in CAUSES},
            "success_rate": guard.success_rate,
            "val_ppl_start": self.start["val_ppl"],
            "val_ppl_final": self.last["val_ppl"],
            "val_ppl_best": self.best["val_ppl"],
            "best_step": self.best_step,
            "val_step_final": self.last_step,
            "val_loss_final": self.last["val_loss"],
            "val_bits_per_byte_start": self.start["val_bits_per_byte"],
            "val_bits_per_byte_final": self.last["val_bits_per_byte"],
            "val_bits_per_byte_best": self.best["val_bits_per_byte"],
            **{f"teacher_{name}": value for name, value in self.teacher.items()},
            "teacher_positions": self.teacher_positions,
            "teacher_rows_dropped": self.teacher_rows_dropped,
            "teacher_rows_infinite": self.teacher_rows_infinite,
            "teacher_rows_unshared": self.teacher_rows_unshared,
            "nan_batches_max_consecutive": guard.max_consecutive_nan_batches,
            "zero_gradient_steps": guard.zero_gradient_steps,
            "loss_scale_final": precision.loss_scale.item(),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / max(1e-9, self.train_seconds),
            "train_seconds": self.train_seconds,
            "peak_memory_bytes": peak_memory(precision.device),
            "wall_seconds": self.seconds,
        }

"""Where a run stands, and what of it ends up in `summary.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

from sar_kd.evaluate import Evaluation
from sar_kd.guards import CAUSES, StepGuard
from sar_kd.precision import Precision, peak_memory


@dataclass
class Progress:
    """Where a run stands: everything that a resumed run must know and no other object carries."""

    step: int = 0
    """Attempts made"""
    tokens: int = 0
    """Target tokens of all attempts"""
    seconds: float = 0.0
    """Wall time, all parts of a resumed run together"""
    train_seconds: float = 0.0
    """The part of it spent in attempts"""
    start: dict = field(default_factory=dict)
    teacher: dict = field(default_factory=dict)
    """`val_ppl` and `val_bits_per_byte` before the first step; empty where there is no teacher"""
    last: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    best_step: int = 0
    rewound_from: int = 0
    """The step at which the run diverged and went back (`--on_divergence rewind`); 0 if it did not"""
    rate_factor: float = 1.0
    """What the learning rate is multiplied by since"""
    left_out: list[int] = field(default_factory=list)
    """Blocks that are not read since"""
    companions: list[dict] = field(default_factory=list)
    """What each companion keeps"""

    def summary(self, status: str, guard: StepGuard, precision: Precision) -> dict:
        """What the run did and what it reached."""
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
            "val_loss_final": self.last["val_loss"],
            "val_bits_per_byte_start": self.start["val_bits_per_byte"],
            "val_bits_per_byte_final": self.last["val_bits_per_byte"],
            "val_bits_per_byte_best": self.best["val_bits_per_byte"],
            **{f"teacher_{name}": value for name, value in self.teacher.items()},
            "nan_batches_max_consecutive": guard.nan_batches_max,
            "dead_steps": guard.dead_steps,
            "rewound_from": self.rewound_from,
            "loss_scale_final": precision.loss_scale.item(),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / max(1e-9, self.train_seconds),
            "train_seconds": self.train_seconds,
            "peak_memory_bytes": peak_memory(precision.device),
            "wall_seconds": self.seconds,
        }


def figures_of(evaluation: Evaluation) -> dict:
    """An evaluation in the words of the run folder's files."""
    return {
        "val_ppl": evaluation.perplexity,
        "val_loss": evaluation.loss,
        "val_bits_per_byte": evaluation.bits_per_byte,
    }

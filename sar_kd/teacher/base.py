"""The contract between a run and its teacher: all that the training loop calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sar_kd.data.dataset import Dataset
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.moe.router_training import FROZEN_ROUTERS, FrozenRouters


class Teacher:
    """A run's teacher, a context around the run. The defaults suit a teacher without routers that learn."""

    max_nonfinite = 0.5
    """The largest share of the held-out text in which its logits may be not finite; such positions are left out"""
    passes = 1
    """Consecutive steps on the same text"""
    lines: Sequence[str] = ()
    """Shown when the run starts"""
    details: Sequence[str] = ()
    """Likewise, with --verbose"""
    group_nats: Sequence[float] = ()
    """Its loss on each group of `Dataset.num_groups`, such as a document; in its own routing, at the last evaluation"""

    def __enter__(self) -> Teacher:
        return self

    def __exit__(self, *exception) -> None:
        """Restore the teacher model."""

    def router_trainer_at(self, step: int, lr_at: Callable[[float], float]) -> FrozenRouters:
        """The routers' part of training step `step`. lr_at: the learning rate of this step for a given peak."""
        return FROZEN_ROUTERS

    def evaluate_start(self, validation: Dataset, precision: Precision) -> tuple[dict, list[str]]:
        """Evaluate the teacher before the first step: `val_ppl`, `val_bits_per_byte` and, where it is not 0,
        `val_nonfinite` in the routing of the run; and lines to show.
        """
        return {}, []

    def evaluate_routers(self, step: int, validation: Dataset, precision: Precision) -> tuple[dict, list[str]]:
        """Evaluate routers that learn: metrics for the log, and lines about new alarms."""
        return {}, []

    def save(self, folder: Path, step: int) -> None:
        """Write the trained routers to the run folder."""

    def summary(self) -> dict:
        """The teacher's entries of `summary.json`."""
        return {}

    def state_dict(self) -> dict:
        """The state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state. Raises: ValueError if the state belongs to another teacher."""


class NoTeacher(Teacher):
    """The teacher of a run without distillation."""

    def __init__(self, passes: int = 1):
        self.passes = passes

"""A run in which nothing is distilled, as the calendar sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sar_kd.data.dataset import Dataset
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.moe.router_training import FROZEN_ROUTERS, FrozenRouters


class NoTeacher:
    """What a run asks of its teacher, where there is none."""

    passes = 1
    lines: tuple[str, ...] = ()

    def __enter__(self) -> NoTeacher:
        return self

    def __exit__(self, *exception) -> None:
        """Nothing to put back."""

    def learner_at(self, step: int, rate_at: Callable[[float], float]) -> FrozenRouters:
        """No routers, so none that learn."""
        return FROZEN_ROUTERS

    def begin(self, validation: Dataset, precision: Precision) -> list[str]:
        """Nothing to measure."""
        return []

    def figures(self) -> dict:
        """Nothing was measured."""
        return {}

    def watch(self, step: int, validation: Dataset, precision: Precision) -> tuple[dict, list[str]]:
        """Nothing to watch."""
        return {}, []

    def save(self, folder: Path, step: int) -> None:
        """Nothing to keep."""

    def summary(self) -> dict:
        """Nothing for `summary.json`."""
        return {}

    def state_dict(self) -> dict:
        """Nothing that a resumed run must know."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to put back."""

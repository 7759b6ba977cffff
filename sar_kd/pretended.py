"""What stands in for parts of a run that want numbers, while its memory is planned on tensors that have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.data import Batch
from sar_kd.distillation import Distillation
from sar_kd.hollow import AWAY, Ledger
from sar_kd.offload import Offload, travelling
from sar_kd.tiled import Compared, Slopes, Tile, stretches_of


class PretendedOffload(Offload):
    """Moves in the ledger what another moves in memory."""

    def __init__(self, ledger: Ledger, teacher: nn.Module):
        self._ledger, self._travelling = ledger, travelling(teacher)

    def come(self) -> None:
        """See `Offload`."""
        self._ledger.enter(self._travelling, "teacher")

    def leave(self) -> None:
        """See `Offload`."""
        self._ledger.enter(self._travelling, AWAY)


class PretendedProjection(Distillation):
    """Stands in for `projected.Projected`, which wants to know the text: the same tiles, and as much beside them."""

    covers_text = True
    _BESIDE = 1.3
    """Of a pair of tiles, what comparing them takes beside the slopes; measured (`benchmarks/memory_plan.py`)"""

    def tiles(self, batch: Batch) -> list[Tile]:
        """See `Distillation`."""
        own, others = batch.student.rows, batch.teacher.rows
        parts = stretches_of(len(own), self.tile_rows)
        return [Tile(part, others[: (part.stop - part.start) * len(others) // len(own)], None, None) for part in parts]

    def compare(self, student: Tensor, teacher: Any, part: object, learner: str | None) -> Compared:
        """See `Distillation`."""
        zero = student.new_zeros(())
        beside = student.new_empty(round(self._BESIDE * (student.numel() + teacher.numel())))
        del beside
        slopes = torch.empty_like(teacher if learner == "teacher" else student)
        return Compared(zero, zero, zero, Slopes(((0, slopes),)))

"""CPU threads of a run: how they wait, and how many there are. A user's own settings are never changed.

Imports no torch at the top: OpenMP reads its settings when torch is imported, so they must be made before.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_COUNT_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_FEWEST_PARAMETERS = 20_000_000
"""Below this a second thread gains less than it costs as soon as another process wants a core."""


def set_wait_policy() -> None:
    """Let OpenMP threads sleep while they wait; to be called before torch is imported, else it does nothing.

    By default they spin after each parallel region. Beside another busy process they then take the core from the
    thread that they wait for, and a step of small models takes several times as long.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAIT_SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def limit_threads(num_parameters: int, device: torch.device) -> list[str]:
    """Compute small models with one thread where the run computes on the CPU; returns lines about what was changed.

    num_parameters: of teacher and student together
    """
    import torch

    is_set = any(name in os.environ for name in _COUNT_SETTINGS)
    if is_set or device.type != "cpu" or num_parameters >= _FEWEST_PARAMETERS or torch.get_num_threads() == 1:
        return []
    torch.set_num_threads(1)
    return ["One CPU thread, because the models are small; set OMP_NUM_THREADS for more"]

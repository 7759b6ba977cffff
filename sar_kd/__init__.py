"""SAR-KD: distil a large causal language model into a small one in fp16, without NaN.

    from sar_kd import distill
    result = distill("embedded", "embedded", mode="precise", train_steps=100)

Shapes, everywhere: B batch, T positions, V vocabulary (rows of the head), D hidden size, N flattened tokens that
count, K of them that a teacher row speaks about, M and E entries of a vocabulary map, E experts where there is a
router; `_s` student, `_t` teacher.

Reading order: `train_sar_kd_stable.py`, `step.train_step`, `objective`, `losses`, `guards`; then the way of the
data, `data`, `alignment`, `tokens`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sar_kd.version import __version__

if TYPE_CHECKING:
    from sar_kd.api import Distilled, distill

__all__ = ["Distilled", "__version__", "distill"]


def __getattr__(name: str):
    """Load the Python interface when it is first asked for: the command line must not wait for it."""
    if name not in ("distill", "Distilled"):
        raise AttributeError(f"module 'sar_kd' has no attribute '{name}'")
    from sar_kd import api

    return getattr(api, name)

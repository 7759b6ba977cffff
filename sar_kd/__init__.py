"""SAR-KD: distil a large causal language model into a small one in fp16, without NaN.

    from sar_kd import distill
    result = distill("embedded", "embedded", mode="precise", train_steps=100)

Shapes, everywhere: B batch, T positions, V vocabulary size (of the LM head), D hidden size, N flattened positions with
a target, or tokens of a text; K positions compared with the teacher (in a tile: those of the tile), boundaries, or
continuations; C classes shared by two vocabularies, or chunks of bytes; O classes of continuations; M tokens of a
vocabulary map; E entries of an index array, or experts of a router; X triples of `continuation_paths`; `_s` student,
`_t` teacher. Other letters are defined where they are used.

Reading order: `commands/train.py`, `training/step.py`, `losses/objective.py`, `training/guards.py`; then the data
path: `data/files/sources.py`, `data/tokenized_text.py`, `data/blocks.py`, `data/dataset.py`, `alignment/aligner.py`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sar_kd.version import __version__

if TYPE_CHECKING:
    from sar_kd.api import Comparison, Distilled, RunResult, cache, compare, distill, preflight, sft
    from sar_kd.errors import TrainingDiverged, UsageError
    from sar_kd.teacher.moe.router_checkpoint import load_router_update

__all__ = [
    "Comparison", "Distilled", "RunResult", "TrainingDiverged", "UsageError", "__version__", "cache", "compare",
    "distill", "load_router_update", "preflight", "sft",
]  # fmt: skip

_MODULES = {
    **dict.fromkeys(
        ("Comparison", "Distilled", "RunResult", "cache", "compare", "distill", "preflight", "sft"), "sar_kd.api"
    ),
    "TrainingDiverged": "sar_kd.errors",
    "UsageError": "sar_kd.errors",
    "load_router_update": "sar_kd.teacher.moe.router_checkpoint",
}


def __getattr__(name: str):
    """Import a public name when it is first used: the command line must not wait for all of them."""
    if name not in _MODULES:
        raise AttributeError(f"module 'sar_kd' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)

"""Will a run fit into its device's memory?

The peak is that of the largest phase of a step, not the sum of everything that is ever allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sar_kd.config.fields import RunConfig
from sar_kd.models.memory_saving import layers_of
from sar_kd.preflight.dry_run import CATEGORIES, Phase, dry_run
from sar_kd.runtime import environment
from sar_kd.runtime.console import format_bytes
from sar_kd.runtime.distributed import ProcessGroup, current_process_group

MARGIN = 0.15
"""Largest relative error of a plan"""

_LIBRARIES = {"cuda": 2**25, "cpu": 7 * 2**24}
"""Bytes that libraries take on first use: cuBLAS 8 MiB, 32 MiB from Hopper on (PyTorch's defaults); on a CPU also what
the C library keeps of freed memory, as measured (`benchmarks/memory_plan.py`)."""

# A model that needs tensor values may raise these in a dry run.
_DRY_RUN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError)


class NotEstimated(Exception):
    """There is no memory plan, because a model needs tensor values; the text is the reason, one line."""


@dataclass(frozen=True)
class Plan:
    """The phases of a step, and the memory that is available for them."""

    phases: Sequence[Phase]
    device: torch.device
    baseline: int
    """Bytes of the process beside the phases: what libraries take, and on a CPU what it holds already"""
    available: int | None
    """Bytes that the process can have in all; None if unknown"""

    @property
    def peak(self) -> Phase:
        """The phase with the most live bytes."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def needed(self) -> int:
        """Bytes of the process on the device at the peak, as `peak_memory_bytes` in `summary.json` measures them."""
        return self.peak.total + self.baseline

    @property
    def verdict(self) -> str:
        """'fits', 'close', 'too large', or 'unknown' if the available memory is unknown."""
        if self.available is None:
            return "unknown"
        if self.needed * (1 + MARGIN) <= self.available:
            return "fits"
        return "close" if self.needed * (1 - MARGIN) <= self.available else "too large"

    def lines(self) -> list[str]:
        """Needed and available memory in two lines."""
        on_cpu = self.device.type == "cpu"
        where, rest = ("this machine", "Python and libraries") if on_cpu else (str(self.device), "libraries")
        of = "" if self.available is None else f" of the {format_bytes(self.available)} on {where}: {self.verdict}"
        sizes = ", ".join(f"{category} {format_bytes(size)}" for category, size in self.peak.bytes.items() if size)
        return [
            f"Memory: up to {format_bytes(self.needed)}{of}",
            f"At the peak ({self.peak.name}): {sizes}, {format_bytes(self.baseline)} {rest}",
        ]

    def table(self) -> list[str]:
        """Every category in every phase, MB, in at most 78 columns."""
        width, decimals = max(len(phase.name) for phase in self.phases), 1 if self.peak.total < 1e9 else 0
        columns = {category: max(9, len(category) + 1) for category in (*CATEGORIES, "in all")}
        table = [f"{'MB':{width}}" + "".join(f"{category:>{size}}" for category, size in columns.items())]
        for phase in self.phases:
            sizes = {**phase.bytes, "in all": phase.total}
            cells = (f"{sizes[category] / 1e6:{size},.{decimals}f}" for category, size in columns.items())
            table.append(f"{phase.name:{width}}" + "".join(cells))
        return table

    def record(self) -> dict:
        """The plan as JSON, bytes."""
        return {
            "needed_bytes": self.needed,
            "available_bytes": self.available,
            "baseline_bytes": self.baseline,
            "verdict": self.verdict,
            "peak": self.peak.name,
            "phases": {phase.name: {**phase.bytes, "total": phase.total} for phase in self.phases},
        }


def plan(
    config: RunConfig,
    models: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    process_group: ProcessGroup | None = None,
) -> Plan:
    """The memory plan of a run on this device. models: as `dry_run` takes them

    Raises: NotEstimated if a model needs tensor values
    """
    config, models = _without_cached_teacher(config, models)
    process_group = process_group or current_process_group()
    is_sharded = process_group.size > 1 and config.train.parallel == "fsdp"
    keeps_gradients = process_group.size > 1 and not is_sharded
    try:
        phases = dry_run(config, models, device, dtype, keeps_gradients)
    except _DRY_RUN_ERRORS:
        try:  # layers may depend on one another
            phases = dry_run(config, models, device, dtype, keeps_gradients, runs_every_layer=True)
        except _DRY_RUN_ERRORS as error:
            first_line = next(iter(str(error).splitlines()), "")
            raise NotEstimated(f"a model needs tensor values: {type(error).__name__} {first_line}".strip()) from error
    if is_sharded:
        phases = [_shard(phase, models["student"], process_group.size) for phase in phases]
    available, baseline = environment.free_memory(device), _LIBRARIES[device.type]
    if device.type == "cpu":
        # Models in memory already are in the phases.
        real = [p for model in models.values() for p in model.parameters() if p.device.type == "cpu"]
        baseline += max(0, environment.resident_memory() - sum(parameter.nbytes for parameter in real))
        # The processes share one machine's memory.
        available = None if available is None else available // process_group.size + baseline
    elif available is not None:
        available += torch.cuda.memory_allocated(device)
    return Plan(phases, device, baseline, available)


def _without_cached_teacher(config: Any, models: Mapping[str, nn.Module]) -> tuple[Any, Mapping[str, nn.Module]]:
    """With a teacher cache no teacher runs, and the loss takes no more memory than cross-entropy."""
    if not getattr(config.models, "teacher_cache", ""):
        return config, models
    # Both are refused beside a cache, later and by name.
    others = {"on_policy_fraction": 0.0, "routing": "native", "alpha_kd": 0.0, "alpha_ce": 1.0, "control": False}
    return config.changed(others), {"student": models["student"]}


def _shard(phase: Phase, student: nn.Module, ranks: int) -> Phase:
    """With FSDP: a share of all that is trained, and whole what is gathered: weights outside the layers, two layers, or
    all of them while the student samples.
    """
    layers = [4 * sum(p.numel() for p in layer.parameters()) for layer in layers_of(student)]
    gathered = 4 * sum(p.numel() for p in student.parameters())
    if phase.name != "sampling":
        gathered += 2 * max(layers, default=0) - sum(layers)
    sizes = dict(phase.bytes)
    for category in ("student", "gradients", "optimizer"):
        sizes[category] //= ranks
    sizes["student"] += gathered
    return Phase(phase.name, sizes)

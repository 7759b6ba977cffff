"""Will a run fit into its device's memory, which options make it fit, and `--per_device_batch_size auto`.

The peak is that of the largest phase of a step, not the sum of everything that is ever allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from sar_kd.config.fields import AUTO, RunConfig
from sar_kd.config.presets import default_batch_size
from sar_kd.errors import UsageError
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, MetaModels
from sar_kd.models.memory_saving import layers_of, quantizable_layers
from sar_kd.preflight.dry_run import CATEGORIES, Phase, dry_run
from sar_kd.runtime import environment
from sar_kd.runtime.console import format_bytes
from sar_kd.runtime.distributed import ProcessGroup, current_process_group
from sar_kd.runtime.precision import choose_device

R = TypeVar("R", bound=RunConfig)

MARGIN = 0.15
"""Largest relative error of a plan"""

MAX_TOKENS_ON_CPU = 4096
"""Tokens of a micro-batch; more do not make a CPU faster (the embedded pair: 1,000 tokens are as fast as 8,000)."""

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
    try:
        phases = dry_run(config, models, device, dtype, keeps_gradients=process_group.size > 1 and not is_sharded)
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
    config = _replace(config, "on_policy", on_policy_fraction=0.0)
    config = _replace(config, "routing", routing="native")
    return _replace(config, "loss", alpha_kd=0.0, alpha_ce=1.0), {"student": models["student"]}


def _shard(phase: Phase, student: nn.Module, ranks: int) -> Phase:
    """With FSDP: a share of all that is trained, and whole what is gathered: weights outside the layers, two layers."""
    layers = [4 * sum(p.numel() for p in layer.parameters()) for layer in layers_of(student)]
    gathered = 4 * sum(p.numel() for p in student.parameters()) - sum(layers) + 2 * max(layers, default=0)
    sizes = dict(phase.bytes)
    for category in ("student", "gradients", "optimizer"):
        sizes[category] //= ranks
    sizes["student"] += gathered
    return Phase(phase.name, sizes)


def advice(
    memory_plan: Plan, config: Any, models: Mapping[str, nn.Module], dtype: torch.dtype, num_gpus: int = 0
) -> tuple[list[str], UsageError | None]:
    """Lines about a plan, and the refusal if it clearly does not fit and `--force` is not given."""
    lines = memory_plan.lines()
    if memory_plan.verdict in ("fits", "unknown"):
        return lines, None
    fitting = remedies(memory_plan, config, models, dtype, num_gpus)
    remedy = f"what fits: {', or '.join(fitting)}" if fitting else "take smaller models or a smaller --block_size"
    has_force = "loss" in type(config).sections()
    if memory_plan.verdict == "close" or config.loss.force or not has_force:
        return [*lines, f"That may not be enough; {remedy}"], None
    where = "the machine's" if memory_plan.device.type == "cpu" else f"{memory_plan.device}'s"
    return lines, UsageError(
        f"--per_device_batch_size {config.train.per_device_batch_size}: the run needs about "
        f"{format_bytes(memory_plan.needed)} of {where} memory, and {format_bytes(memory_plan.available or 0)} are "
        f"available; {remedy}; or --force to run anyway"
    )


def remedies(
    memory_plan: Plan, config: RunConfig, models: Mapping[str, nn.Module], dtype: torch.dtype, num_gpus: int = 0
) -> list[str]:
    """Options with which the run fits, and what it then needs: each that is enough alone, else all together."""

    def if_it_fits(*changes: _Change) -> list[str]:
        smaller = config
        for _, section, values in changes:
            smaller = _replace(smaller, section, **values)
        with contextlib.suppress(NotEstimated):
            planned = plan(smaller, models, memory_plan.device, dtype)
            if planned.verdict == "fits":
                return [f"{' '.join(options for options, _, _ in changes)} ({format_bytes(planned.needed)})"]
        return []

    changes = list(_smaller(memory_plan, config, models))
    fitting = [text for change in changes for text in if_it_fits(change)]
    if not fitting and len(changes) > 1:
        fitting = if_it_fits(*changes)
    if num_gpus > 1 and current_process_group().size == 1:
        fitting.append(f"torchrun --nproc_per_node {num_gpus} with --parallel fsdp")
    return fitting


_Change = tuple[str, str, dict[str, Any]]
"""Options as they are typed; the section of the config and the values that they stand for"""


def _smaller(memory_plan: Plan, config: Any, models: Mapping[str, nn.Module]) -> Iterator[_Change]:
    """The options that could still save memory."""
    memory, size, activations = config.memory, config.train.per_device_batch_size, memory_plan.peak.bytes["activations"]
    if size > 1:
        # Activations grow with the batch size, the rest does not.
        limit = size * ((memory_plan.available or 0) / (1 + MARGIN) - (memory_plan.needed - activations))
        divisors = [n for n in range(size // 2, 0, -1) if size % n == 0]
        best = next((n for n in divisors if n * activations <= limit), 1)
        values = {"per_device_batch_size": best, "grad_accum_steps": config.train.grad_accum_steps * size // best}
        yield " ".join(f"--{name} {value}" for name, value in values.items()), "train", values
    if not memory.gradient_checkpointing and layers_of(models["student"]):
        yield "--gradient_checkpointing", "memory", {"gradient_checkpointing": True}
    if "teacher" not in models or config.models.teacher_cache or config.routing.routing in ("sar", "auto"):
        return
    if memory_plan.device.type != "cpu" and not memory.offload_teacher_to_cpu:
        yield "--offload_teacher_to_cpu", "memory", {"offload_teacher_to_cpu": True}
    quantizable = sum(layer.weight.numel() for layer in quantizable_layers(models["teacher"]))
    if memory.teacher_quantization == "off" and 2 * quantizable > sum(
        p.numel() for p in models["teacher"].parameters()
    ):
        yield "--teacher_quantization nf4", "memory", {"teacher_quantization": "nf4"}


def _replace(config: Any, section: str, **values) -> Any:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def fit_batch_size(config: R, process_group: ProcessGroup, loaded: LoadedModels = NO_LOADED_MODELS) -> R:
    """Replace `--per_device_batch_size auto` by the largest number that fits, and add a notice; rank 0's on every rank.

    The number of blocks in an update is what it is without `auto`, as it is part of what is learned: the default batch
    size times `--grad_accum_steps`.

    Raises: UsageError if the models or the device are not available
    """
    if config.train.per_device_batch_size != AUTO:
        return config
    return process_group.broadcast(process_group.on_rank_zero(lambda: _fit(config, loaded)) or config)


def _fit(config: R, loaded: LoadedModels) -> R:
    models, (device, dtype, _) = MetaModels(config, loaded).models, choose_device(config.precision)
    default = default_batch_size(type(config.train), config.data.task)
    blocks = default * config.train.grad_accum_steps
    sizes = [size for size in range(blocks, 0, -1) if blocks % size == 0]
    if device.type == "cpu":
        sizes = [size for size in sizes if size * config.data.block_size <= MAX_TOKENS_ON_CPU] or [1]
    try:
        for size in sizes:
            fitted = _replace(config, "train", per_device_batch_size=size, grad_accum_steps=blocks // size)
            planned = plan(fitted, models, device, dtype)
            note = f" ({format_bytes(planned.needed)})"
            if planned.verdict in ("fits", "unknown"):
                break
        else:
            note = f", though even that may not fit{note}"
    except NotEstimated as error:
        size, note = default, f" (the default; memory not estimated, {error})"
        fitted = _replace(config, "train", per_device_batch_size=default)
    line = f"--per_device_batch_size auto: {size}{note}, --grad_accum_steps {blocks // size}: {blocks} blocks an update"
    return dataclasses.replace(fitted, notices=(*config.notices, line))

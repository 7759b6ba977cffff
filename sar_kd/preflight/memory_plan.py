"""How much memory a run will take on its device, part by part and moment by moment, and whether it is there.

The peak is the largest of the moments of a step, not the sum of all that ever is.

`--per_device_batch_size auto`: as many blocks at once as fit, in updates of as many blocks as ever.

How many blocks an update has is part of what is learned, and stays what it is without `auto`: the default number times
`--grad_accum_steps`. How many of them are computed at once is a matter of memory, and of speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from sar_kd.config.fields import AUTO, RunConfig
from sar_kd.config.presets import default_batch_size
from sar_kd.errors import UsageError
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, MetaModels
from sar_kd.models.memory_saving import layers_of, quantizable_layers
from sar_kd.preflight.dry_run import dry_run
from sar_kd.preflight.memory_estimate import CATEGORIES, Phase, estimate
from sar_kd.runtime import environment
from sar_kd.runtime.console import format_bytes
from sar_kd.runtime.distributed import ProcessGroup, current_process_group
from sar_kd.runtime.precision import choose_device

MARGIN = 0.15
"""A plan and what is measured differ by no more than this share of what is measured."""

_LIBRARIES = {"cuda": 2**25, "cpu": 7 * 2**24}
"""What libraries take when they are first used: cuBLAS 8 MiB, 32 MiB from Hopper on (PyTorch's defaults); on a CPU also
what the C library keeps of memory that was given back, as measured (`benchmarks/memory_plan.py`)."""

# What a model may raise that does not run without numbers.
_UNRUNNABLE = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError)


@dataclass(frozen=True)
class Plan:
    """The moments of a step, and the memory that there is for them."""

    moments: Sequence[Phase]
    device: torch.device
    held: int
    """Bytes that the process takes beside the parts: what libraries keep, and on a CPU what it holds already"""
    free: int | None
    """Bytes that it could still take; None where the system does not tell"""
    rehearsed: bool
    """By a step without numbers; else by a formula"""

    @property
    def peak(self) -> Phase:
        """The moment at which most is alive."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def needed(self) -> int:
        """Bytes of the process on the device at the peak, as `peak_memory_bytes` in `summary.json` measures them."""
        return self.peak.total + self.held

    @property
    def room(self) -> int | None:
        """Bytes that there are in all: free, or held already."""
        if self.free is None:
            return None
        return self.free + (self.held if self.device.type == "cpu" else 0)

    @property
    def verdict(self) -> str:
        """'fits', 'close', 'too large', or 'unknown' where the system does not say how much there is."""
        if self.room is None:
            return "unknown"
        if self.needed * (1 + MARGIN) <= self.room:
            return "fits"
        return "close" if self.needed * (1 - MARGIN) <= self.room else "too large"

    def lines(self) -> list[str]:
        """For people: what is needed and what there is."""
        where = "this machine" if self.device.type == "cpu" else f"{self.device}"
        there = "" if self.room is None else f" of the {format_bytes(self.room)} on {where}: {self.verdict}"
        how = "" if self.rehearsed else " (by a rule of thumb: the model does not run without its numbers)"
        parts = ", ".join(f"{part} {format_bytes(size)}" for part, size in self.peak.parts.items() if size)
        held = f", {format_bytes(self.held)} " + ("Python and libraries" if self.device.type == "cpu" else "libraries")
        return [f"Memory: up to {format_bytes(self.needed)}{there}{how}", f"At the peak ({self.peak.name}): {parts}{held}"]

    def table(self) -> list[str]:
        """For people: every part at every moment, MB; it fits into 78 columns."""
        width, decimals = max(len(moment.name) for moment in self.moments), 1 if self.peak.total < 1e9 else 0
        columns = {part: max(9, len(part) + 1) for part in (*CATEGORIES, "in all")}
        rows = [f"{'MB':{width}}" + "".join(f"{part:>{room}}" for part, room in columns.items())]
        for moment in self.moments:
            sizes = {**moment.parts, "in all": moment.total}
            cells = (f"{sizes[part] / 1e6:{room},.{decimals}f}" for part, room in columns.items())
            rows.append(f"{moment.name:{width}}" + "".join(cells))
        return rows

    def record(self) -> dict:
        """For programs, bytes."""
        return {
            "needed_bytes": self.needed,
            "room_bytes": self.room,
            "held_bytes": self.held,
            "verdict": self.verdict,
            "rehearsed": self.rehearsed,
            "peak": self.peak.name,
            "moments": {moment.name: {**moment.parts, "total": moment.total} for moment in self.moments},
        }


def plan(
    config: RunConfig,
    skeletons: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    process_group: ProcessGroup | None = None,
) -> Plan:
    """The plan of a run on this device. skeletons: as `dry_run` takes them."""
    config, skeletons = _as_run(config, skeletons)
    process_group = process_group or current_process_group()
    in_shards = process_group.size > 1 and config.train.parallel == "fsdp"
    what = config, skeletons, device, dtype
    try:
        moments, rehearsed = dry_run(*what, keeps_gradients=process_group.size > 1 and not in_shards), True
    except _UNRUNNABLE:
        moments, rehearsed = estimate(config, skeletons, dtype), False
    if in_shards:
        moments = [_in_shards(moment, skeletons["student"], process_group.size) for moment in moments]
    free, held = environment.free_memory(device), _LIBRARIES[device.type]
    if device.type == "cpu":
        # Models that are in memory already are among the parts.
        real = [p for model in skeletons.values() for p in model.parameters() if p.device.type == "cpu"]
        held += max(0, environment.resident_memory() - sum(parameter.nbytes for parameter in real))
        free = free and free // process_group.size  # of one machine's memory each process has its part
    elif free is not None:
        free += torch.cuda.memory_allocated(device)
    return Plan(moments, device, held, free, rehearsed)


def _as_run(config: Any, skeletons: Mapping[str, nn.Module]) -> tuple[Any, Mapping[str, nn.Module]]:
    """With a teacher's stored answers there is no teacher, and what is compared with them is a part of the logits."""
    if not getattr(config.models, "teacher_cache", ""):
        return config, skeletons
    text = dataclasses.replace(config.loss, alpha_kd=0.0, alpha_ce=1.0)
    given = dataclasses.replace(config.on_policy, on_policy_fraction=0.0)  # refused with it, later and by name
    return dataclasses.replace(config, loss=text, on_policy=given), {"student": skeletons["student"]}


def _in_shards(moment: Phase, student: nn.Module, ranks: int) -> Phase:
    """The same with the student in shards: a part of everything that learns, and whole what computes just now, that is
    what no layer holds, and two layers.
    """
    sizes = [4 * sum(p.numel() for p in layer.parameters()) for layer in layers_of(student)]
    whole = 4 * sum(p.numel() for p in student.parameters()) - sum(sizes) + 2 * max(sizes, default=0)
    parts = dict(moment.parts)
    for part in ("student", "gradients", "optimizer"):
        parts[part] //= ranks
    parts["student"] += whole
    return Phase(moment.name, parts)


def remedies(
    found: Plan, config: RunConfig, skeletons: Mapping[str, nn.Module], dtype: torch.dtype, cards: int = 0
) -> list[str]:
    """Flags with which the run fits, and what it then needs: each that does alone, else the fewest together.

    found: the run's plan as it is; cards: GPUs of this machine
    """
    alone = list(_smaller(found, config, skeletons))
    fitting = _fitting(((flags, smaller(config)) for flags, smaller in alone), found, skeletons, dtype)
    if not fitting:
        together, with_all = [], config
        for number, (_, smaller) in enumerate(alone, 1):
            with_all = smaller(with_all)
            together.append((" ".join(flags for flags, _ in alone[:number]), with_all))
        fitting = _fitting(together[1:], found, skeletons, dtype)[:1]
    if cards > 1 and current_process_group().size == 1:
        fitting.append(f"torchrun --nproc_per_node {cards} with --parallel fsdp")
    return fitting


def _fitting(
    candidates: Iterable[tuple[str, RunConfig]], found: Plan, skeletons: Mapping[str, nn.Module], dtype: torch.dtype
) -> list[str]:
    plans = ((flags, plan(config, skeletons, found.device, dtype)) for flags, config in candidates)
    return [f"{flags} ({format_bytes(smaller.needed)})" for flags, smaller in plans if smaller.verdict == "fits"]


def _smaller(
    found: Plan, config: Any, skeletons: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Callable[[RunConfig], RunConfig]]]:
    """Each remedy that this run has left: its flags, and what they make of its settings."""
    train, memory, blocks = config.train, config.memory, config.train.per_device_batch_size
    # Activations grow with the blocks, the rest does not.
    left = (found.room or 0) / (1 + MARGIN) - (found.needed - found.peak.parts["activations"])
    if blocks > 1 and left > 0:
        most = max(1, min(blocks // 2, int(blocks * left / max(1, found.peak.parts["activations"]))))
        size = next(size for size in range(most, 0, -1) if blocks % size == 0)
        accum = train.grad_accum_steps * blocks // size
        batch = {"per_device_batch_size": size, "grad_accum_steps": accum}
        yield f"--per_device_batch_size {size} --grad_accum_steps {accum}", _with("train", **batch)
    if left > 0 and not memory.gradient_checkpointing and layers_of(skeletons["student"]):
        yield "--gradient_checkpointing", _with("memory", gradient_checkpointing=True)
    if "teacher" not in skeletons or config.models.teacher_cache or config.routing.routing in ("sar", "auto"):
        return
    if found.device.type != "cpu" and not memory.offload_teacher_to_cpu:
        yield "--offload_teacher_to_cpu", _with("memory", offload_teacher_to_cpu=True)
    rounded = sum(layer.weight.numel() for layer in quantizable_layers(skeletons["teacher"]))
    if memory.teacher_quantization == "off" and 2 * rounded > sum(p.numel() for p in skeletons["teacher"].parameters()):
        yield "--teacher_quantization nf4", _with("memory", teacher_quantization="nf4")


def _with(section: str, **values) -> Callable[[RunConfig], RunConfig]:
    def changed(config: RunConfig) -> RunConfig:
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})

    return changed


def advice(
    found: Plan, config: Any, skeletons: Mapping[str, nn.Module], dtype: torch.dtype, cards: int = 0
) -> tuple[list[str], UsageError | None]:
    """Lines about the plan; and the refusal, where there is clearly too little memory and `--force` is not given."""
    lines = found.lines()
    if found.verdict in ("fits", "unknown"):
        return lines, None
    fitting = remedies(found, config, skeletons, dtype, cards)
    remedy = f"what fits: {', or '.join(fitting)}" if fitting else "take smaller models or a smaller --block_size"
    can_force = "loss" in type(config).sections()
    if found.verdict == "close" or config.loss.force or not can_force:
        return [*lines, f"That may not be enough; {remedy}"], None
    where = "the machine's" if found.device.type == "cpu" else f"{found.device}'s"
    return lines, UsageError(
        f"--per_device_batch_size {config.train.per_device_batch_size}: the run needs about {format_bytes(found.needed)} "
        f"of {where} memory, and {format_bytes(found.room or 0)} are there; {remedy}; or --force to try all the same"
    )


R = TypeVar("R", bound=RunConfig)

MOST_TOKENS_ON_A_CPU = 4096
"""More at once do not make a CPU faster (the embedded pair: 1,000 tokens are as fast as 8,000), only fuller."""


def fit_batch_size(config: R, process_group: ProcessGroup, given: LoadedModels = NO_LOADED_MODELS) -> R:
    """The settings with a number in the place of `auto`, and a line about it; of several processes all get rank 0's.

    Raises: UsageError where the models or the device are not there
    """
    if config.train.per_device_batch_size != AUTO:
        return config
    found: list[R] = []
    process_group.on_rank_zero(lambda: found.append(_fit(config, given)))
    return process_group.broadcast(found[0] if found else config)


def _fit(config: R, given: LoadedModels) -> R:
    subject, (device, dtype, _) = MetaModels(config, given), choose_device(config.precision)
    blocks = default_batch_size(type(config.train), config.data.task) * config.train.grad_accum_steps
    sizes = [size for size in range(blocks, 0, -1) if blocks % size == 0]
    if device.type == "cpu":
        sizes = [size for size in sizes if size * config.data.block_size <= MOST_TOKENS_ON_A_CPU] or [1]
    for size in sizes:
        fitted = _with_batch_size(config, size, blocks // size)
        planned = plan(fitted, subject.models, device, dtype)
        if planned.verdict in ("fits", "unknown"):
            break
    one_block = "" if planned.verdict in ("fits", "unknown") else ", the fewest there are"
    line = (
        f"--per_device_batch_size auto: {size}{one_block} ({format_bytes(planned.needed)}), --grad_accum_steps "
        f"{blocks // size}: {blocks} blocks an update"
    )
    return dataclasses.replace(fitted, notices=(*config.notices, line))


def _with_batch_size(config: Any, size: int, accum_steps: int) -> Any:
    train = dataclasses.replace(config.train, per_device_batch_size=size, grad_accum_steps=accum_steps)
    changed: Any = dataclasses.replace(config, train=train)
    return changed

"""The cheapest options with which a run fits its device: what a refusal advises, what `--fit` sets; and the largest
`--per_device_batch_size auto`.

Candidates are added in the order of `_candidates`, what costs least first, until the run fits. Then each that it fits
without is left out again, what costs most first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from sar_kd.config.command_line import as_typed, reconfigure
from sar_kd.config.fields import AUTO, R, RunConfig
from sar_kd.config.presets import LORA_LR_FACTOR, default_batch_size
from sar_kd.errors import UsageError
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, MetaModels
from sar_kd.models.memory_saving import layers_of, quantizable_layers
from sar_kd.preflight.memory_plan import MARGIN, NotEstimated, Plan, plan
from sar_kd.preflight.packages import QUANTIZATION, check_packages
from sar_kd.runtime import environment
from sar_kd.runtime.console import format_bytes
from sar_kd.runtime.distributed import ProcessGroup, current_process_group
from sar_kd.runtime.precision import choose_device

MAX_TOKENS_ON_CPU = 4096
"""Tokens of a micro-batch; more do not make a CPU faster (the embedded pair: 1,000 tokens are as fast as 8,000)."""

CACHE = "teacher_cache"
"""The folder of the teacher cache that is advised"""

_RANK = 16

_TEACHER = {"teacher_device": "", "teacher_device_map": "", "offload_teacher_to_cpu": False,
            "teacher_quantization": "off"}  # fmt: skip
"""Options of a teacher that is where the student is, in the compute dtype"""


class _Candidate(NamedTuple):
    """Options that save memory, and the packages that they need."""

    options: dict[str, Any]
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """The cheapest options with which a run fits, or those with which it comes closest."""

    options: dict[str, Any]
    """Those that differ from the run's"""
    plan: Plan
    missing: tuple[str, ...] = ()
    """Packages that are to be installed first"""

    @property
    def fits(self) -> bool:
        return self.plan.verdict == "fits"

    @property
    def is_ready(self) -> bool:
        """Is nothing to be installed or made first?"""
        return not self.missing and CACHE not in self.options

    def record(self) -> dict:
        """As JSON."""
        return {"options": self.options, "needed_bytes": self.plan.needed, "missing": list(self.missing)}

    def __str__(self) -> str:
        first = [f"`pip install {' '.join(self.missing)}`"] if self.missing else []
        first += ["a teacher cache made before"] if CACHE in self.options else []
        needs = f", needs {' and '.join(first)}" if first else ""
        return f"{' '.join(as_typed(self.options))} ({format_bytes(self.plan.needed)}{needs})"


def cheapest_fit(
    config: RunConfig,
    models: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    fixed: Collection[str] = (),
    may_need_more: bool = True,
) -> Fit | None:
    """The cheapest options with which the run fits; else those with which it comes closest, None if no option helps.

    models: as `dry_run` takes them; fixed: options whose values stay
    may_need_more: where nothing else fits, packages that are not installed may be used too, and then a teacher cache
    """
    search = _Search(config, models, device, dtype)
    every = _candidates(config, models, device, fixed)
    candidates = [each for each in every if not each.options.keys() & set(fixed)]
    found = search.find([each for each in candidates if not _missing([each])])
    if may_need_more and not (found and found.fits):
        for more in (candidates, [*candidates, *_cache_candidate(config, models, fixed)]):
            other = search.find(more)
            if other and other.fits:
                return other
    return found


def _candidates(
    config: Any, models: Mapping[str, nn.Module], device: torch.device, fixed: Collection[str]
) -> Iterator[_Candidate]:
    """What could still save memory, what costs least first (`docs/memory.md` says why)."""
    train, optimizer = config.train, config.optim.optimizer
    size = train.per_device_batch_size
    if size > 1:
        yield _Candidate({"per_device_batch_size": 1, "grad_accum_steps": train.grad_accum_steps * size})
    if not config.memory.gradient_checkpointing and layers_of(models["student"]):
        yield _Candidate({"gradient_checkpointing": True})
    has_teacher = "teacher" in models and not config.models.teacher_cache
    movable = has_teacher and config.routing.routing not in ("sar", "auto") and not config.memory.placement()
    if movable:
        yield from _teacher_candidates(config, models["teacher"], device)
    if optimizer == "adamw":
        yield _Candidate({"optimizer": "adamw8bit"}, ("bitsandbytes",))
        if "student_lr" not in config.chosen:  # it would mean something else
            yield _Candidate({"optimizer": "adafactor"})
    if movable and device.type != "cpu" and not config.memory.offload_teacher_to_cpu:
        elsewhere = {name: value for name, value in _TEACHER.items() if name not in fixed}
        yield _Candidate(elsewhere | {"teacher_device_map": "auto"}, ("accelerate",))
    if not config.lora.lora_rank and not hasattr(models["student"], "peft_config"):
        options: dict[str, Any] = {"lora_rank": _RANK}
        if "optimizer" not in fixed:
            options["optimizer"] = "adamw"
        if "student_lr" not in config.chosen and "loss" in type(config).sections():  # the rate of `sft` is one for LoRA
            options["student_lr"] = LORA_LR_FACTOR * config.optim.student_lr
        yield _Candidate(options, ("peft",))
        yield _Candidate({**options, "lora_quantization": "nf4"}, ("peft", *QUANTIZATION))
    elif config.lora.lora_rank and not config.lora.is_quantized:
        yield _Candidate({"lora_quantization": "nf4"}, QUANTIZATION)


def _teacher_candidates(config: Any, teacher: nn.Module, device: torch.device) -> Iterator[_Candidate]:
    memory = config.memory
    if device.type != "cpu" and not memory.offload_teacher_to_cpu:
        own = torch.cuda.current_device() if device.index is None else device.index
        others = [gpu.number for gpu in environment.find_gpus() if gpu.number != own]
        free = {number: environment.free_memory(torch.device("cuda", number)) or 0 for number in others}
        best = max(free, key=lambda number: free[number], default=0)
        alone = current_process_group().size == 1
        if alone and free and (1 + MARGIN) * 2 * sum(p.numel() for p in teacher.parameters()) <= free[best]:
            yield _Candidate({"teacher_device": f"cuda:{best}"})
        yield _Candidate({"offload_teacher_to_cpu": True, "teacher_device": ""})
    quantizable = sum(layer.weight.numel() for layer in quantizable_layers(teacher))
    if memory.teacher_quantization == "off" and 2 * quantizable > sum(p.numel() for p in teacher.parameters()):
        yield _Candidate({"teacher_quantization": "nf4"}, QUANTIZATION)


def _cache_candidate(config: Any, models: Mapping[str, nn.Module], fixed: Collection[str]) -> list[_Candidate]:
    """A teacher cache, if a run with these settings can use one (`teacher.cached.check_settings`)."""
    if "teacher" not in models or config.models.teacher_cache or "teacher_cache" in fixed:
        return []
    loss = config.loss
    usable = loss.alpha_kd > 0 and loss.alignment != "hidden" and loss.logit_clamp_style != "raw"
    usable = usable and config.routing.routing in ("native", "auto") and not config.on_policy.on_policy_fraction
    return [_Candidate({**_TEACHER, "teacher_cache": CACHE})] if usable else []


def _missing(candidates: Sequence[_Candidate]) -> tuple[str, ...]:
    """The packages of these that are not installed."""
    needed = dict.fromkeys(package for each in candidates for package in each.packages)
    return tuple(package for package in needed if not environment.is_installed(package))


class _Search:
    """The plans of a run with more and more options."""

    def __init__(self, config: RunConfig, models: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype):
        self._config, self._models, self._device, self._dtype = config, models, device, dtype
        sections = (getattr(config, name) for name in type(config).sections())
        self._own = {name: value for section in sections for name, value in vars(section).items()}
        self._plans: dict[tuple, Plan | None] = {}

    def find(self, candidates: Sequence[_Candidate]) -> Fit | None:
        """As `cheapest_fit`, with these candidates."""
        active, closest = list[_Candidate](), None
        for candidate in candidates:
            if (planned := self._fit([*active, candidate])) is None:
                continue
            active.append(candidate)
            if planned.fits:
                return self._smallest(active)
            if closest is None or planned.plan.needed < closest.plan.needed:
                closest = planned
        return closest

    def _smallest(self, active: list[_Candidate]) -> Fit | None:
        """Without those that it fits without; and with the largest micro-batch."""
        for candidate in reversed(active[:-1]):
            fewer = [each for each in active if each is not candidate]
            if (planned := self._fit(fewer)) and planned.fits:
                active = fewer
        size, accum = self._config.train.per_device_batch_size, self._config.train.grad_accum_steps
        for larger in (n for n in range(size // 2, 1, -1) if size % n == 0):
            if "per_device_batch_size" not in active[0].options:
                break
            batch = _Candidate({"per_device_batch_size": larger, "grad_accum_steps": accum * size // larger})
            if (planned := self._fit([batch, *active[1:]])) and planned.fits:
                return planned
        return self._fit(active)

    def _fit(self, active: Sequence[_Candidate]) -> Fit | None:
        """None for options that are refused together, or whose memory is not estimated."""
        options = {name: value for candidate in active for name, value in candidate.options.items()}
        options = {name: value for name, value in options.items() if value != self._own[name]}
        key = tuple(sorted(options.items()))
        if key not in self._plans:
            try:
                changed = self._config.changed(options)
                self._plans[key] = plan(changed, self._models, self._device, self._dtype)
            except (UsageError, NotEstimated):
                self._plans[key] = None
        planned = self._plans[key]
        used = [each for each in active if options.items() & each.options.items()]
        return Fit(options, planned, _missing(used)) if planned else None


class Advice(NamedTuple):
    """What is said about a plan."""

    lines: list[str]
    refusal: UsageError | None
    """If the run clearly does not fit and `--force` is not given"""
    fit: Fit | None
    """If the run does not fit as it is"""


def advice(
    memory_plan: Plan, config: Any, models: Mapping[str, nn.Module], dtype: torch.dtype, num_gpus: int = 0
) -> Advice:
    """Lines about a plan, and the options with which the run fits."""
    lines = memory_plan.lines()
    if memory_plan.verdict in ("fits", "unknown"):
        return Advice(lines, None, None)
    fixed = config.chosen if config.train.resume else ()
    fit = cheapest_fit(config, models, memory_plan.device, dtype, fixed)
    remedy = _remedy(fit, memory_plan, config, num_gpus)
    has_force = "loss" in type(config).sections()
    if memory_plan.verdict == "close" or config.loss.force or not has_force:
        return Advice([*lines, f"That may not be enough; {remedy}"], None, fit)
    refusal = f"--per_device_batch_size {config.train.per_device_batch_size}: the run needs about "
    return Advice(lines, UsageError(f"{refusal}{_sizes(memory_plan)}; {remedy}; or --force to run anyway"), fit)


def _remedy(fit: Fit | None, memory_plan: Plan, config: Any, num_gpus: int) -> str:
    sharded = f"torchrun --nproc_per_node {num_gpus} with --parallel fsdp"
    can_shard = num_gpus > 1 and current_process_group().size == 1
    if fit and fit.fits:
        by_itself = fit.is_ready and not fit.options.keys() & config.chosen
        return f"what fits: {fit}" + ", which --fit sets" * by_itself + f", or {sharded}" * can_shard
    if can_shard:
        return f"what may fit: {sharded}"
    closest = f"; the closest is {fit}" if fit and fit.plan.needed < memory_plan.needed else ""
    return f"take smaller models or a smaller --block_size{closest}"


def _sizes(memory_plan: Plan) -> str:
    where = "the machine's" if memory_plan.device.type == "cpu" else f"{memory_plan.device}'s"
    return (
        f"{format_bytes(memory_plan.needed)} of {where} memory, and {format_bytes(memory_plan.available or 0)} are "
        "available"
    )


def fit(config: R, process_group: ProcessGroup, loaded: LoadedModels = NO_LOADED_MODELS) -> R:
    """With `--fit`: the run with the cheapest options with which it fits, and a notice; rank 0's on every rank.

    Options that somebody chose keep their values.
    Raises: UsageError if no options fit, or the models or the device are not available
    """
    if not config.memory.fit:
        return config
    return process_group.broadcast(process_group.on_rank_zero(lambda: _apply(config, loaded)) or config)


def _apply(config: R, loaded: LoadedModels) -> R:
    check_packages(config)  # before the models are described
    models, (device, dtype, _) = MetaModels(config, loaded).models, choose_device(config.precision)
    smallest = config
    if config.train.per_device_batch_size == AUTO:  # the largest that fits is found afterwards
        smallest = config.changed({"per_device_batch_size": 1, "grad_accum_steps": _num_blocks(config)})
    options: dict[str, Any] = {}
    try:
        planned = plan(smallest, models, device, dtype)
        note = f"sets nothing, the run fits ({format_bytes(planned.needed)})"
        if planned.verdict == "unknown":
            note = "sets nothing, the free memory is not known"
        elif planned.verdict != "fits":
            found = cheapest_fit(smallest, models, device, dtype, config.chosen)
            is_ready = found is not None and found.is_ready and found.fits
            free = None if is_ready else cheapest_fit(smallest, models, device, dtype, may_need_more=False)
            planned, options, note = _require_fit(found, free, planned, config)
    except NotEstimated as error:
        note = f"sets nothing, the memory is not estimated ({error})"
    changed = reconfigure(config, {**options, "fit": False})
    return dataclasses.replace(changed, notices=(*changed.notices, f"--fit: {note}"))


def _require_fit(found: Fit | None, free: Fit | None, planned: Plan, config: Any) -> tuple[Plan, dict[str, Any], str]:
    """The plan, the options and the line about them.

    found, free: the cheapest fit that leaves the options that are given, and one that does not
    Raises: UsageError if nothing fits
    """
    if found and found.is_ready and (found.plan.verdict != "too large" or getattr(config.loss, "force", False)):
        return found.plan, found.options, f"sets {found} of {format_bytes(found.plan.available or 0)}"
    if planned.verdict == "close":
        return planned, {}, f"sets nothing, no option makes the run smaller ({format_bytes(planned.needed)})"
    closest = f"the closest is {found}" if found else "no option makes it smaller"
    verb = "what fits is" if found and found.fits else closest
    rest = f" {found}" if found and found.fits else ""
    chosen = "; options that are given keep their values" if config.chosen else ""
    if free and free.fits and (changed := sorted(free.options.keys() & config.chosen)):
        chosen += f": without {', '.join(f'--{name}' for name in changed)} it fits with {free}"
    raise UsageError(f"--fit: the run needs about {_sizes(planned)}; {verb}{rest}{chosen}")


def _num_blocks(config: Any) -> int:
    """Blocks in an update with `--per_device_batch_size auto`: what is learned does not depend on what fits."""
    return default_batch_size(type(config.train), config.data.task) * config.train.grad_accum_steps


def fit_batch_size(config: R, process_group: ProcessGroup, loaded: LoadedModels = NO_LOADED_MODELS) -> R:
    """Replace `--per_device_batch_size auto` by the largest number that fits, and add a notice; rank 0's on every rank.

    The number of blocks in an update is what it is without `auto`, as it is part of what is learned: the default batch
    size times `--grad_accum_steps`.

    Raises: UsageError if the models or the device are not available
    """
    if config.train.per_device_batch_size != AUTO:
        return config
    return process_group.broadcast(process_group.on_rank_zero(lambda: _fit_batch(config, loaded)) or config)


def _fit_batch(config: R, loaded: LoadedModels) -> R:
    check_packages(config)
    models, (device, dtype, _) = MetaModels(config, loaded).models, choose_device(config.precision)
    blocks = _num_blocks(config)
    sizes = [size for size in range(blocks, 0, -1) if blocks % size == 0]
    if device.type == "cpu":
        sizes = [size for size in sizes if size * config.data.block_size <= MAX_TOKENS_ON_CPU] or [1]
    try:
        for size in sizes:
            fitted = config.changed({"per_device_batch_size": size, "grad_accum_steps": blocks // size})
            planned = plan(fitted, models, device, dtype)
            note = f" ({format_bytes(planned.needed)})"
            if planned.verdict in ("fits", "unknown"):
                break
        else:
            note = f", though even that may not fit{note}"
    except NotEstimated as error:
        size = blocks // config.train.grad_accum_steps
        note = f" (the default; memory not estimated, {error})"
        fitted = config.changed({"per_device_batch_size": size})
    line = f"--per_device_batch_size auto: {size}{note}, --grad_accum_steps {blocks // size}: {blocks} blocks an update"
    return dataclasses.replace(fitted, notices=(*config.notices, line))

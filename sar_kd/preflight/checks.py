"""What is checked before a run, one function for each check.

A check returns lines for people and a record for programs; a run that would fail is refused in one line. Every run
starts with the cheap checks, before a weight is loaded; `sar-kd preflight` also reads tokenizers and text.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sar_kd.config.fields import RunConfig
from sar_kd.config.sections import EMBEDDED
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.samples import Sample
from sar_kd.data.sources import load_documents
from sar_kd.errors import UsageError
from sar_kd.evaluation.tokenizer_coverage import measure_coverage, skipped_lines
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, MetaModels, load_tokenizers, vocab_size_of
from sar_kd.models.memory_saving import quantizable_layers, require_quantization_packages
from sar_kd.preflight.clamp_checks import clamp_lines, require_learnable
from sar_kd.preflight.memory_plan import NotEstimated, advice, plan
from sar_kd.runtime import environment, hub
from sar_kd.runtime.console import first_few
from sar_kd.runtime.files import require_disk_space
from sar_kd.runtime.precision import choose_device
from sar_kd.teacher.cached import check_settings

_SAMPLE_CHARACTERS = 200_000


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    lines: list[str]
    record: dict
    table: Sequence[str] = ()
    """Further lines, of the command `preflight` only"""
    refusal: UsageError | None = None
    """To be raised once the lines are printed"""


def preflight(config: RunConfig, log: Callable[[str], None], loaded: LoadedModels = NO_LOADED_MODELS) -> None:
    """Run the checks with which every run starts.

    Raises: UsageError with cause and remedy, from the first check that fails
    """
    for finding in run_checks(START_CHECKS, MetaModels(config, loaded)):
        for line in finding.lines:
            log(line)
        if finding.refusal:
            raise finding.refusal


def run_checks(checks: Sequence[Callable[[MetaModels], Finding]], meta: MetaModels) -> Iterator[Finding]:
    """The findings of these checks, in order."""
    return (check(meta) for check in checks)


def _check_versions(meta: MetaModels) -> Finding:
    versions = environment.versions()
    names = {"python": "Python", "torch": "PyTorch"}
    shown = [f"{names.get(name, name)} {versions[name]}" for name in ("python", "torch", "transformers")]
    return Finding("versions", [", ".join(shown), *environment.require_versions(versions)], versions)


def _check_device(meta: MetaModels) -> Finding:
    gpus, archs, threads = environment.find_gpus(), torch.cuda.get_arch_list(), torch.get_num_threads()
    lines = []
    for gpu in gpus:
        has = "has" if environment.has_kernels_for(archs, gpu.capability) else "has no"
        capability = ".".join(map(str, gpu.capability))
        lines.append(
            f"GPU {gpu.number}: {gpu.name}, {gpu.memory / 1e9:.1f} GB, compute capability {capability}; this PyTorch "
            f"{has} kernels for it"
        )
    device, dtype, why = choose_device(meta.config.precision)  # runs one kernel on a GPU
    name = str(dtype).removeprefix("torch.")
    rounded = "; matmul outputs are rounded to float16" if dtype is torch.float16 and device.type == "cpu" else ""
    lines.append(f"Computing in {name} on {device} ({why}{rounded}); trainable weights are float32")
    if not gpus:
        lines.append(f"No GPU: {os.cpu_count()} CPU cores, {threads} thread{'s' if threads > 1 else ''}")
    record = {"gpus": [gpu._asdict() for gpu in gpus], "arch_list": archs, "device": str(device), "dtype": name}
    return Finding("device", lines, {**record, "why": why, "threads": threads})


def _check_hub(meta: MetaModels) -> Finding:
    offline, where = hub.offline_variable(), {}
    for role in meta.roles:
        option = f"{role}_model"
        name = getattr(meta.config.models, option)
        if meta.loaded.model(option) is not None:
            where[role] = "in memory"
        elif name == EMBEDDED:
            where[role] = "shipped with the package"
        elif Path(name).expanduser().is_dir():
            where[role] = "directory"
        else:
            where[role] = "in the cache" if hub.is_cached(name) else "to be downloaded"
    needed = bool({"in the cache", "to be downloaded"} & set(where.values()) or meta.config.data.dataset_name)
    token = "with a token" if hub.has_token() else "without a token, so gated models cannot be downloaded"
    line = f"Hub: offline ({offline})" if offline else f"Hub: allowed, {token}"
    return Finding("hub", [line] if needed else [], {"needed": needed, "offline": bool(offline), "models": where})


def _check_models(meta: MetaModels) -> Finding:
    lines, record = [], {}
    for role, model in meta.models.items():
        name, count, vocab_size = type(model).__name__, _num_parameters(model), vocab_size_of(model)
        record[role] = {"class": name, "parameters": count, "vocabulary": vocab_size}
        lines.append(f"{role.capitalize()}: {name}, {_format_count(count)} parameters, vocabulary {vocab_size:,}")
    return Finding("models", lines, record)


def _check_clamps(meta: MetaModels) -> Finding:
    # Without a teacher the student's vocabulary stands for both.
    teacher, student = (vocab_size_of(meta.models[role]) for role in (meta.roles[0], "student"))
    require_learnable(meta.config.loss, student, teacher)
    return Finding("clamps", *clamp_lines(meta.config.loss, student, teacher))


def _check_disk(meta: MetaModels) -> Finding:
    """Needed: `student/` twice while it is replaced; `--keep_checkpoints` checkpoints and one that is being written."""
    train = meta.config.train
    student = 4 * _num_parameters(meta.models["student"])
    checkpoint = 3 * student  # weights and AdamW's two moments, all float32
    needed = 2 * student + (train.keep_checkpoints + 1) * checkpoint
    remedy = "free some, or lower --keep_checkpoints" if train.keep_checkpoints > 1 else "free some"
    free = require_disk_space(Path(train.output_dir), needed, "the run's files", remedy=remedy)
    line = f"Disk: up to {needed / 1e9:,.2f} GB will be written to {train.output_dir}, {free / 1e9:,.1f} GB are free"
    return Finding("disk", [line], {"needed_bytes": needed, "free_bytes": free, "output_dir": train.output_dir})


def _check_memory(meta: MetaModels) -> Finding:
    config, models = meta.config, meta.models
    device, dtype, _ = choose_device(config.precision)
    lines = _teacher_memory_lines(config, models, device) if "teacher" in models else []
    try:
        memory_plan = plan(config, models, device, dtype)
    except NotEstimated as reason:
        record = {"verdict": "not estimated", "reason": str(reason)}
        return Finding("memory", [*lines, f"Memory: not estimated ({reason})"], record)
    plan_lines, refusal = advice(memory_plan, config, models, dtype, len(environment.find_gpus()))
    return Finding("memory", lines + plan_lines, memory_plan.record(), memory_plan.table(), refusal)


def _teacher_memory_lines(config: RunConfig, models: dict, device: torch.device) -> list[str]:
    """Lines about options of the teacher's memory whose effect may surprise; UsageError if they cannot be used."""
    memory, lines = config.memory, []
    if config.routing.routing == "sar" and memory.routers_frozen_reason:
        raise UsageError(f"--routing sar: {memory.routers_frozen_reason}; use --routing all or native")
    if memory.offload_teacher_to_cpu and device.type == "cpu":
        lines.append("--offload_teacher_to_cpu: has no effect, the run is on the CPU already")
    if memory.teacher_quantization != "off":
        require_quantization_packages(memory.teacher_quantization)
        quantized = sum(layer.weight.numel() for layer in quantizable_layers(models["teacher"]))
        share = quantized / _num_parameters(models["teacher"])
        why = " (experts that are stacked in one tensor are not)" if share < 0.5 else ""
        lines.append(f"--teacher_quantization {memory.teacher_quantization}: {share:.0%} of the teacher's weights{why}")
    return lines


def _check_teacher_cache(meta: MetaModels) -> Finding:
    folder = meta.config.models.teacher_cache
    if not folder:
        return Finding("teacher_cache", [], {"used": False})
    metadata = check_settings(meta.config)["metadata"]
    top_k, dtype = metadata["teacher_top_k"], metadata["dtype"]
    line = (
        f"Teacher cache {folder}: the {top_k} largest logits of each position, in {dtype}; a run verifies that "
        "teacher, text and shard digests match the cache"
    )
    return Finding("teacher_cache", [line], {"used": True, **metadata})


def _check_alignment(meta: MetaModels) -> Finding:
    config = meta.config
    if config.loss.alpha_kd == 0 or config.loss.alignment == "uld":
        reason = "distillation is off" if config.loss.alpha_kd == 0 else "--alignment uld compares by rank alone"
        return Finding("alignment", [f"Alignment: none, {reason}"], {"audited": False})
    sample: list[Sample] = []
    size = 0
    for document in load_documents(config.data)[0]:
        sample.append(document)
        size += document.num_chars
        if size >= _SAMPLE_CHARACTERS:
            break
    block_size = config.data.block_size
    coverage = measure_coverage(build_dataset(sample, load_tokenizers(config.models), block_size, 8 * block_size))
    lines = [f"Alignment, on the first {size / 1e3:,.0f} thousand characters of the text:", *coverage.lines()]
    record = {"audited": True, **dataclasses.asdict(coverage), "auto_alignment": coverage.auto_alignment}
    return Finding("alignment", [*lines, *skipped_lines(coverage.skipped_documents)], record)


START_CHECKS = (_check_versions, _check_device, _check_hub, _check_models, _check_clamps, _check_disk, _check_memory)
"""The checks with which every run starts"""

ALL_CHECKS = (*START_CHECKS, _check_teacher_cache, _check_alignment)
"""The checks of the command `preflight`"""


def describe_text(train: Dataset, validation: Dataset) -> list[str]:
    """Lines about the tokenized text: its size, how the tokenizers align on it, what was skipped or truncated."""
    lines = [
        f"Text: {_format_bytes(train.text.num_bytes)}, {train.num_tokens:,} tokens in {len(train):,} blocks; "
        f"held out: {_format_bytes(validation.text.num_bytes)}, {validation.num_tokens:,} tokens",
    ]
    if train.pair.tables is not None:
        lines += measure_coverage(train).lines()
    roles = ("student",) if train.pair.teacher is train.pair.student else ("student", "teacher")  # or no teacher at all
    for role in (role for role in roles if role in train.text.without_template):
        lines.append(
            f"The {role}'s tokenizer has no chat template: conversations are formatted as 'User: ... Assistant: ...'"
        )
    truncated = [*train.text.truncated, *validation.text.truncated]
    if truncated:
        lost = train.text.dropped_tokens + validation.text.dropped_tokens
        lines.append(
            f"Cut short {len(truncated)} conversations that exceed a block, by {lost:,} tokens: {first_few(truncated)}"
        )
    return lines + skipped_lines([*train.text.skipped_documents, *validation.text.skipped_documents])


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:,.1f} kB" if num_bytes >= 1000 else f"{num_bytes} bytes"


def _format_count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return str(number)

"""What is checked before a run, one function for each check.

A check returns lines for people and a record for programs; a run that would fail is refused in one line. Every run
starts with `START_CHECKS`, before a weight is loaded; `sar-kd preflight` makes the same ones, and tokenizes the text.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sar_kd.config.fields import RunConfig
from sar_kd.config.python_arguments import as_called
from sar_kd.config.sections import EMBEDDED
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.file_checks import check_first_lines
from sar_kd.data.files.samples import Sample
from sar_kd.data.files.sources import Documents, load_documents
from sar_kd.data.skipped import by_reason, skipped_lines
from sar_kd.errors import UsageError
from sar_kd.evaluation.tokenizer_coverage import measure_coverage
from sar_kd.models.half_precision import range_report
from sar_kd.models.loading import (
    NO_LOADED_MODELS,
    LoadedModels,
    MetaModels,
    load_tokenizers,
)
from sar_kd.models.memory_saving import quantizable_layers
from sar_kd.models.model_checks import context_length_of, require_context, vocab_size_of
from sar_kd.models.model_files import is_local
from sar_kd.models.optimizer_state import state_bytes
from sar_kd.preflight.clamp_checks import clamp_lines, require_learnable
from sar_kd.preflight.data_checks import alignment_warnings, how_text_is_used, text_warnings
from sar_kd.preflight.fitting import advice
from sar_kd.preflight.memory_plan import NotEstimated, plan
from sar_kd.preflight.memory_tracker import with_adapter
from sar_kd.preflight.packages import check_packages
from sar_kd.runtime import environment, hub
from sar_kd.runtime.console import count_of, first_few
from sar_kd.runtime.files import FolderLock, require_disk_space
from sar_kd.runtime.precision import choose_device
from sar_kd.runtime.run_folder import check_run_folder
from sar_kd.teacher.cache.format import describe_kept
from sar_kd.teacher.cached import check_settings
from sar_kd.teacher.moe.discovery import find_routers, require_routers
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_SAMPLE_CHARACTERS = 200_000


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    lines: list[str]
    record: dict
    details: Sequence[str] = ()
    """Further lines, shown by `preflight` and by a run with --verbose"""
    table: Sequence[str] = ()
    """Further lines, of the command `preflight` only"""
    refusal: UsageError | None = None
    """To be raised once the lines are printed"""


def preflight(
    config: RunConfig,
    log: Callable[[str], None],
    loaded: LoadedModels = NO_LOADED_MODELS,
    detail: Callable[[str], None] = lambda line: None,
) -> None:
    """Run the checks with which every run starts.

    log, detail: show a line; show one of the lines that few people need
    Raises: UsageError with cause and remedy, from the first check that fails
    """
    meta = MetaModels(config, loaded)
    for finding in (check(meta) for check in START_CHECKS):
        for show, lines in ((log, finding.lines), (detail, finding.details)):
            for line in lines:
                show(line)
        if finding.refusal:
            raise finding.refusal


def _check_versions(meta: MetaModels) -> Finding:
    versions = environment.versions()
    names = {"python": "Python", "torch": "PyTorch"}
    shown = [f"{names.get(name, name)} {versions[name]}" for name in ("python", "torch", "transformers")]
    return Finding("versions", environment.require_versions(versions), versions, [", ".join(shown)])


def _check_device(meta: MetaModels) -> Finding:
    gpus, archs, threads = environment.find_gpus(), torch.cuda.get_arch_list(), torch.get_num_threads()
    details = []
    for gpu in gpus:
        has = "has" if environment.has_kernels_for(archs, gpu.capability) else "has no"
        capability = ".".join(map(str, gpu.capability))
        details.append(
            f"GPU {gpu.number}: {gpu.name}, {gpu.memory / 1e9:.1f} GB, compute capability {capability}; this PyTorch "
            f"{has} kernels for it"
        )
    device, dtype, why = choose_device(meta.config.precision)  # runs one kernel on a GPU
    name = str(dtype).removeprefix("torch.")
    rounded = "; matmul outputs are rounded to float16" if dtype is torch.float16 and device.type == "cpu" else ""
    card = f" ({gpus[device.index or 0].name})" if device.type == "cuda" and gpus else ""
    line = f"Device: {device}{card}, computing in {name} ({why})"
    details.append(f"Trainable weights are float32{rounded}")
    if not gpus:
        details.append(f"No GPU: {os.cpu_count()} CPU cores, {count_of(threads, 'thread')}")
    record = {"gpus": [gpu._asdict() for gpu in gpus], "arch_list": archs, "device": str(device), "dtype": name}
    return Finding("device", [line], {**record, "why": why, "threads": threads}, details)


def _check_packages(meta: MetaModels) -> Finding:
    return Finding("packages", [], {"needed": check_packages(meta.config)})


def _check_files(meta: MetaModels) -> Finding:
    data = meta.config.data
    check_first_lines(data)
    return Finding("files", [], {"files": [*data.train_file, *data.validation_file]})


def _check_folder(meta: MetaModels) -> Finding:
    train = meta.config.train
    check_run_folder(Path(train.output_dir), train)
    FolderLock(Path(train.output_dir)).check()
    return Finding("folder", [], {"output_dir": train.output_dir})


def _check_hub(meta: MetaModels) -> Finding:
    offline, where = hub.offline_variable(), {}
    for role in meta.roles:
        option = f"{role}_model"
        name = getattr(meta.config.models, option)
        if meta.loaded.model(option) is not None:
            where[role] = "in memory"
        elif name == EMBEDDED:
            where[role] = "shipped with the package"
        elif is_local(name):
            where[role] = "directory"
        else:
            where[role] = "in the cache" if hub.is_cached(name) else "to be downloaded"
    needed = bool({"in the cache", "to be downloaded"} & set(where.values()) or meta.config.data.dataset_name)
    token = "with a token" if hub.has_token() else "without a token, so gated models cannot be downloaded"
    line = f"Hub: offline ({offline})" if offline else f"Hub: allowed, {token}"
    return Finding("hub", [line] if needed else [], {"needed": needed, "offline": bool(offline), "models": where})


def _check_models(meta: MetaModels) -> Finding:
    lines, record, details = [], {}, []
    is_float16 = choose_device(meta.config.precision)[1] is torch.float16
    for role, model in meta.models.items():
        name, count, vocab_size = type(model).__name__, _num_parameters(model), vocab_size_of(model)
        record[role] = {"class": name, "parameters": count, "vocabulary": vocab_size}
        made = f"; {meta.conversions[role]}" if role in meta.conversions else ""
        lines.append(f"{role.capitalize()}: {name}, {_format_count(count)} parameters, vocabulary {vocab_size:,}{made}")
        if is_float16 and not (role == "teacher" and getattr(meta.config.models, "teacher_cache", False)):
            found = range_report(model)
            scores = ", attention scores" if found.has_eager_attention else ""
            details.append(
                f"{role.capitalize()} ({found.family}) in float16: matrix products are half; float32 are the residual "
                f"stream{scores}, and other products in {count_of(found.num_modules, 'module')}"
            )
    in_memory = meta.loaded.model("student_model") is not None
    made = "it is in memory" if in_memory else meta.conversions.get("student", "")
    if meta.config.lora.adapter_only and made:
        raise UsageError(
            f"--adapter_only: the base model that the adapter names would not be this student ({made}); leave it out"
        )
    return Finding("models", lines, record, details)


def _check_context(meta: MetaModels) -> Finding:
    require_context(meta.models["student"], meta.config.data.block_size)
    return Finding("context", [], {role: context_length_of(model) for role, model in meta.models.items()})


def _check_routing(meta: MetaModels) -> Finding:
    settings = getattr(meta.config, "routing", None)
    if settings is None or settings.routing not in ("all", "ka", "sar"):
        return Finding("routing", [], {"routers": None})
    teacher = meta.models["teacher"]
    specs = find_routers(teacher, settings.router_patterns)
    trains_natively = settings.routing == "sar" and settings.sar_routing == "native"
    require_routers(teacher, specs, settings.routing, trains_natively)
    return Finding("routing", [], {"routers": len(specs)})


def _check_clamps(meta: MetaModels) -> Finding:
    # Without a teacher the student's vocabulary stands for both.
    teacher, student = (vocab_size_of(meta.models[role]) for role in (meta.roles[0], "student"))
    require_learnable(meta.config.loss, student, teacher)
    lines, record = clamp_lines(meta.config.loss, student, teacher)
    return Finding("clamps", [], record, lines)


def _check_disk(meta: MetaModels) -> Finding:
    """Needed: `student/` twice while it is replaced, and with `--keep_last` the last student; `--keep_checkpoints`
    checkpoints and one that is being written.
    """
    config = meta.config
    train, lora, whole = config.train, config.lora, meta.models["student"]
    parameters = [p for p in with_adapter(whole, lora, torch.float16).parameters() if p.requires_grad]
    trained = 4 * sum(parameter.numel() for parameter in parameters)
    student = (0 if lora.adapter_only else 4 * _num_parameters(whole)) + (trained if lora.lora_rank else 0)
    checkpoint = trained + sum(state_bytes(parameter, config.optim.optimizer) for parameter in parameters)
    keeps_last = getattr(getattr(config, "on_policy", None), "keep_last", False)
    needed = (2 + keeps_last) * student + (train.keep_checkpoints + 1) * checkpoint
    remedy = "free some, or lower --keep_checkpoints" if train.keep_checkpoints > 1 else "free some"
    free = require_disk_space(Path(train.output_dir), needed, "the run's files", remedy=remedy)
    line = f"Disk: up to {needed / 1e9:,.2f} GB will be written to {train.output_dir}, {free / 1e9:,.1f} GB are free"
    return Finding("disk", [], {"needed_bytes": needed, "free_bytes": free, "output_dir": train.output_dir}, [line])


def _check_memory(meta: MetaModels) -> Finding:
    config, models = meta.config, meta.models
    device, dtype, _ = choose_device(config.precision)
    lines = _teacher_memory_lines(config, models, device) if "teacher" in models else []
    if config.lora.is_quantized:
        lines += _quantization_line("lora_quantization", config.lora.lora_quantization, models["student"], "student")
    try:
        memory_plan = plan(config, models, device, dtype)
    except NotEstimated as reason:
        unknown = {"verdict": "not estimated", "reason": str(reason)}
        return Finding("memory", [*lines, f"Memory: not estimated ({reason})"], unknown)
    found = advice(memory_plan, config, models, dtype, len(environment.find_gpus()))
    needed, at_the_peak, *others = found.lines
    record: dict[str, Any] = memory_plan.record()
    if found.fit:
        record["fit" if found.fit.fits else "closest"] = found.fit.record()
    return Finding("memory", [*lines, needed, *others], record, [at_the_peak], memory_plan.table(), found.refusal)


def _quantization_line(option: str, kind: str, model: Any, role: str) -> list[str]:
    """How much of a model is quantized."""
    if kind == "off":
        return []
    share = sum(layer.weight.numel() for layer in quantizable_layers(model)) / _num_parameters(model)
    why = " (experts that are stacked in one tensor are not)" if share < 0.5 else ""
    return [f"--{option} {kind}: {share:.0%} of the {role}'s weights{why}"]


def _teacher_memory_lines(config: RunConfig, models: dict, device: torch.device) -> list[str]:
    """Lines about options of the teacher's memory whose effect may surprise; UsageError if they cannot be used."""
    memory, lines = config.memory, []
    if memory.offload_teacher_to_cpu and device.type == "cpu":
        lines.append("--offload_teacher_to_cpu: has no effect, the run is on the CPU already")
    teacher = models["teacher"]
    return [*lines, *_quantization_line("teacher_quantization", memory.teacher_quantization, teacher, "teacher")]


def _check_teacher_cache(meta: MetaModels) -> Finding:
    folder = getattr(meta.config.models, "teacher_cache", "")
    if not folder:
        return Finding("teacher_cache", [], {"used": False})
    metadata = check_settings(meta.config)["metadata"]
    line = (
        f"Teacher cache {folder}: at each position the {describe_kept(metadata)}, in {metadata['dtype']}; a run "
        "verifies that teacher, text and shard digests match the cache"
    )
    return Finding("teacher_cache", [line], {"used": True, **metadata})


def _first_samples(documents: Documents) -> list[Sample]:
    """As many as hold enough characters to judge by."""
    found, size = list[Sample](), 0
    for document in documents:
        found.append(document)
        size += document.num_chars
        if size >= _SAMPLE_CHARACTERS:
            break
    return found


def _num_chars(documents: Documents) -> int:
    return getattr(documents, "num_chars", None) or sum(document.num_chars for document in documents)


def _check_text(meta: MetaModels) -> Finding:
    """Tokenize the text, or the beginning of a large one, as a run does."""
    config, block_size = meta.config, meta.config.data.block_size
    lines: list[str] = []
    documents = load_documents(config.data, lines.append)
    sample, held_out = map(_first_samples, documents)
    size = sum(document.num_chars for document in sample)
    share = size / _num_chars(documents[0])
    compares = config.loss.alpha_kd > 0 and config.loss.alignment != "uld"
    pair = load_tokenizers(config.models, compares, meta.loaded, config.data.template_date)
    limit = context_length_of(meta.models[meta.roles[0]])
    train, validation = (build_dataset(text, pair, block_size, limit or 8 * block_size) for text in (sample, held_out))
    found = text_warnings(train, validation, config.train, share=share, **how_text_is_used(config))
    found += alignment_warnings(pair, config.loss)
    warnings = [as_called(line) for line in found]
    if not compares:
        reason = "distillation is off" if config.loss.alpha_kd == 0 else "--alignment uld compares by rank alone"
        lines += [f"Alignment: none, {reason}", *warnings]
        return Finding("alignment", lines, {"audited": False, "warnings": warnings})
    coverage = measure_coverage(train)
    summary = coverage.summary(config.loss.alignment)
    lines += [f"{summary} (on the first {size / 1e3:,.0f} thousand characters of the text)"]
    record = {"audited": True, **dataclasses.asdict(coverage), "auto_alignment": coverage.auto_alignment}
    dates = date_lines(pair) if len(train.text.conversations) else []
    lines += [*dates, *skipped_lines(train.text), *warnings]
    return Finding("alignment", lines, record | {"warnings": warnings}, coverage.lines())


START_CHECKS = (
    _check_versions, _check_packages, _check_files, _check_device, _check_hub, _check_models, _check_context,
    _check_routing, _check_teacher_cache, _check_clamps, _check_disk, _check_memory,
)  # fmt: skip
"""The checks with which every run starts: no weights are loaded yet, and none are downloaded"""

ALL_CHECKS = (*START_CHECKS[:3], _check_folder, *START_CHECKS[3:], _check_text)
"""The checks of the command `preflight`. A run has taken its folder before, and reads its text in any case."""


def describe_text(
    train: Dataset, validation: Dataset, name: str, alignment: str = "auto"
) -> tuple[list[str], list[str]]:
    """Lines about the tokenized text (its size, how the tokenizers align on it, what was skipped or truncated), and
    further ones that few people need. name: of the text; alignment: the value of that option
    """
    learned = " to learn" if len(train.text.conversations) else ""  # of a conversation the answers alone are counted
    lines = [
        f"Text: {name}, {_format_bytes(train.text.num_bytes)}{learned}, {count_of(train.num_tokens, 'token')} in "
        f"{count_of(len(train), 'block')}; held out: {_format_bytes(validation.text.num_bytes)}, "
        f"{count_of(validation.num_tokens, 'token')}",
    ]
    details = []
    if train.pair.tables is not None:
        coverage = measure_coverage(train)
        lines.append(coverage.summary(alignment))
        details = coverage.lines()
    roles = ("student",) if train.pair.teacher is train.pair.student else ("student", "teacher")  # or no teacher at all
    for role in (role for role in roles if role in train.text.without_template):
        lines.append(
            f"The {role}'s tokenizer has no chat template: conversations are formatted as 'User: ... Assistant: ...'"
        )
    lines += date_lines(train.pair) if len(train.text.conversations) else []
    truncated = [*train.text.truncated, *validation.text.truncated]
    if truncated:
        lost = train.text.dropped_tokens + validation.text.dropped_tokens
        lines.append(
            f"Cut short {count_of(len(truncated), 'conversation')} that exceed a block, by {count_of(lost, 'token')}: "
            f"{first_few(truncated)}"
        )
    dropped = [*train.text.dropped_answers, *validation.text.dropped_answers]
    for reason, names in by_reason(dropped).items():
        shown = first_few(list(dict.fromkeys(names)))
        lines.append(f"Not learned: {count_of(len(names), 'answer')}, {reason}: {shown}")
    return lines + skipped_lines(train.text, validation.text), details


def date_lines(pair: TokenizerPair) -> list[str]:
    """A line about the date that chat templates write."""
    if not pair.dated_templates:
        return []
    whose = " and ".join(f"{role}'s" for role in pair.dated_templates)
    verb = "templates write" if pair.dated_templates[1:] else "template writes"
    return [f"The {whose} chat {verb} a date: {pair.template_date} (--template_date), kept when the run is resumed"]


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:,.1f} kB" if num_bytes >= 1000 else count_of(num_bytes, "byte")


def _format_count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return str(number)

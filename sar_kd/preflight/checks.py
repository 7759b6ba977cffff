"""`sar-kd preflight`, and the start of each run: what will happen on this machine, before anything heavy is loaded.

A check looks at one matter and says what it found, in lines for people and in a record for programs; what cannot go
well is refused in one line. `_AT_START` is what every run begins with. The verb also reads the tokenizers and a sample
of the text, which a run does soon after by itself.
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
from sar_kd.data.dataset import Dataset
from sar_kd.data.samples import Sample
from sar_kd.data.sources import load_documents
from sar_kd.errors import UsageError
from sar_kd.evaluation.tokenizer_coverage import measure_coverage, name_left_out
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, MetaModels, load_tokenizers, num_rows
from sar_kd.models.memory_saving import require_quantisation, roundable
from sar_kd.preflight.clamp_checks import clamp_lines, reasons_not_to_learn
from sar_kd.preflight.memory_plan import advice, plan
from sar_kd.runtime import environment, hub
from sar_kd.runtime.console import first_few
from sar_kd.runtime.files import require_room
from sar_kd.runtime.precision import choose
from sar_kd.teacher.cached import check_settings

_SAMPLE_CHARACTERS = 200_000


class Finding(NamedTuple):
    """What one check found."""

    name: str
    lines: list[str]
    record: dict
    table: Sequence[str] = ()
    """What the verb shows beside the lines"""
    refusal: UsageError | None = None
    """What is raised once the lines are shown"""


def preflight(config: RunConfig, say: Callable[[str], None], given: LoadedModels = NO_LOADED_MODELS) -> None:
    """Look at everything that a run's success depends on and that costs next to nothing to look at.

    Raises: UsageError with cause and remedy, at the first thing that cannot go well
    """
    for finding in run_checks(_AT_START, MetaModels(config, given)):
        for line in finding.lines:
            say(line)
        if finding.refusal:
            raise finding.refusal


def run_checks(checks: tuple[Callable[[MetaModels], Finding], ...], subject: MetaModels) -> Iterator[Finding]:
    """The findings of these checks, in order."""
    for check in checks:
        yield check(subject)


def _check_versions(subject: MetaModels) -> Finding:
    found = environment.versions()
    names = {"python": "Python", "torch": "PyTorch"}
    shown = [f"{names.get(name, name)} {found[name]}" for name in ("python", "torch", "transformers")]
    return Finding("versions", [", ".join(shown), *environment.require_versions(found)], found)


def _check_device(subject: MetaModels) -> Finding:
    cards, archs = environment.find_cards(), torch.cuda.get_arch_list()
    lines = []
    for card in cards:
        carried = "carried" if environment.carries(archs, card.capability) else "not carried"
        capability = ".".join(map(str, card.capability))
        lines.append(
            f"GPU {card.number}: {card.name}, {card.memory / 1e9:.1f} GB, compute capability {capability}, {carried} "
            "by this PyTorch"
        )
    device, dtype, why = choose(subject.config.precision)  # runs one kernel where it is a GPU
    name = str(dtype).removeprefix("torch.")
    rounded = "; each product is rounded to half" if dtype is torch.float16 and device.type == "cpu" else ""
    lines.append(f"Computing in {name} on {device} ({why}{rounded}); trainable weights are float32")
    if not cards:
        threads = torch.get_num_threads()
        lines.append(f"No GPU: {os.cpu_count()} CPU cores, {threads} thread{'s' if threads > 1 else ''}")
    record = {"cards": [card._asdict() for card in cards], "arch_list": archs, "device": str(device), "dtype": name}
    return Finding("device", lines, {**record, "why": why, "threads": torch.get_num_threads()})


def _check_hub(subject: MetaModels) -> Finding:
    offline, where = hub.offline_by(), {}
    for whose in subject.sides:
        flag = f"{whose}_model"
        name = getattr(subject.config.models, flag)
        if subject.given.model(flag) is not None:
            where[whose] = "in memory"
        elif name == EMBEDDED:
            where[whose] = "shipped with the package"
        elif Path(name).expanduser().is_dir():
            where[whose] = "directory"
        else:
            where[whose] = "in the cache" if hub.is_in_cache(name) else "to be downloaded"
    if not {"in the cache", "to be downloaded"} & set(where.values()) and not subject.config.data.dataset_name:
        return Finding("hub", [], {"needed": False, "offline": bool(offline), "models": where})
    token = "with a token" if hub.has_token() else "without a token, so gated models are closed"
    line = f"Hub: offline ({offline})" if offline else f"Hub: allowed, {token}"
    return Finding("hub", [line], {"needed": True, "offline": bool(offline), "models": where})


def _check_models(subject: MetaModels) -> Finding:
    lines, record = [], {}
    for whose, model in subject.models.items():
        count, rows = sum(parameter.numel() for parameter in model.parameters()), num_rows(model)
        record[whose] = {"class": type(model).__name__, "parameters": count, "vocabulary": rows}
        lines.append(f"{whose.capitalize()}: {type(model).__name__}, {_count(count)} parameters, vocabulary {rows:,}")
    return Finding("models", lines, record)


def _check_clamps(subject: MetaModels) -> Finding:
    # Where there is no teacher, the student's vocabulary stands for its own.
    loss, (teacher, student) = subject.config.loss, (num_rows(subject.models[w]) for w in (subject.sides[0], "student"))
    lines, record = clamp_lines(loss, student, teacher)
    reasons = reasons_not_to_learn(
        logit_clamp=loss.logit_clamp if loss.logit_clamp_style == "raw" else None,
        loss_clamp=None,  # where the student starts is measured once it is loaded
        temperature=loss.temperature,
        distils=loss.alpha_kd > 0,
        student_vocab=student,
        teacher_vocab=teacher,
        start_loss=0.0,
        saturated=0.0,
    )
    if reasons and not loss.force:
        raise UsageError(f"{reasons[0]}, or --force to try all the same")
    return Finding("clamps", lines, record)


def _check_disk(subject: MetaModels) -> Finding:
    """`student/` twice while it is replaced; `--keep_checkpoints` checkpoints and the one that is being written."""
    train = subject.config.train
    student = 4 * sum(parameter.numel() for parameter in subject.models["student"].parameters())
    checkpoint = 3 * student  # weights and AdamW's two moments, all float32
    needed = 2 * student + (train.keep_checkpoints + 1) * checkpoint
    remedy = "free some, or lower --keep_checkpoints" if train.keep_checkpoints > 1 else "free some"
    free = require_room(Path(train.output_dir), needed, "what the run writes", remedy=remedy)
    line = f"Disk: up to {needed / 1e9:,.2f} GB will be written to {train.output_dir}, {free / 1e9:,.1f} GB are free"
    return Finding("disk", [line], {"needed_bytes": needed, "free_bytes": free, "output_dir": train.output_dir})


def _check_memory(subject: MetaModels) -> Finding:
    config, models = subject.config, subject.models
    device, dtype, _ = choose(config.precision)
    lines = _notes_on_the_teacher(config, models, device) if "teacher" in models else []
    found = plan(config, models, device, dtype)
    of_plan, refusal = advice(found, config, models, dtype, len(environment.find_cards()))
    return Finding("memory", lines + of_plan, found.record(), found.table(), refusal)


def _notes_on_the_teacher(config: RunConfig, models: dict, device: torch.device) -> list[str]:
    """What the settings of its memory do, where that is not what one might expect; UsageError if they cannot be."""
    memory, lines = config.memory, []
    if config.routing.routing == "sar" and memory.why_routers_stand_still:
        raise UsageError(f"--routing sar: {memory.why_routers_stand_still}; use --routing all or native")
    if memory.offload_teacher_to_cpu and device.type == "cpu":
        lines.append("--offload_teacher_to_cpu: has no effect, the run is on the CPU already")
    if memory.teacher_quantization != "off":
        require_quantisation(memory.teacher_quantization)
        rounded = sum(layer.weight.numel() for layer in roundable(models["teacher"]))
        share = rounded / sum(parameter.numel() for parameter in models["teacher"].parameters())
        why = " (experts that are stacked in one tensor are not)" if share < 0.5 else ""
        lines.append(f"--teacher_quantization {memory.teacher_quantization}: rounds {share:.0%} of its weights{why}")
    return lines


def _check_alignment(subject: MetaModels) -> Finding:
    config = subject.config
    if config.loss.alpha_kd == 0 or config.loss.alignment == "uld":
        reason = "no teacher is heard" if config.loss.alpha_kd == 0 else "--alignment uld compares by rank alone"
        return Finding("alignment", [f"Alignment: none, {reason}"], {"audited": False})
    sample: list[Sample] = []
    size = 0
    for document in load_documents(config.data)[0]:
        sample.append(document)
        size += document.num_chars
        if size >= _SAMPLE_CHARACTERS:
            break
    corpus = Dataset(sample, load_tokenizers(config.models), config.data.block_size, 8 * config.data.block_size)
    coverage = measure_coverage(corpus)
    lines = [f"Alignment, on the first {size / 1e3:,.0f} thousand characters of the text:", *coverage.lines()]
    record = {"audited": True, **dataclasses.asdict(coverage), "mix": coverage.mix}
    return Finding("alignment", [*lines, *name_left_out(coverage.left_out)], record)


def _check_teacher_cache(subject: MetaModels) -> Finding:
    folder = subject.config.models.teacher_cache
    if not folder:
        return Finding("teacher_cache", [], {"used": False})
    facts = check_settings(subject.config)["facts"]
    line = f"Teacher cache {folder}: the {facts['teacher_top_k']} likeliest tokens of each row, in {facts['dtype']}"
    return Finding("teacher_cache", [f"{line}; a run compares its teacher, text and digests"], {"used": True, **facts})


# A further check is one more function in one of these lists.
_AT_START = (_check_versions, _check_device, _check_hub, _check_models, _check_clamps, _check_disk, _check_memory)

ALL_CHECKS = (*_AT_START, _check_teacher_cache, _check_alignment)


def describe(train: Dataset, validation: Dataset) -> list[str]:
    """The text once it has been read: how much, how the tokenizers meet on it, what had to be left out."""
    lines = [
        f"Text: {_size(train.text.num_bytes)}, {train.num_tokens:,} tokens in {len(train):,} blocks; "
        f"held out: {_size(validation.text.num_bytes)}, {validation.num_tokens:,} tokens",
    ]
    if train.pair.is_exact:
        lines += measure_coverage(train).lines()
    elif train.pair.tables is not None:
        lines.append("A tokenizer changes text: its tokens are placed by characters, and compared by rank alone (uld)")
    sides = ("student",) if train.pair.teacher is train.pair.student else ("student", "teacher")  # or no teacher at all
    for side in (side for side in sides if side in train.text.without_template):
        lines.append(f"The {side}'s tokenizer has no chat template: its conversations read 'User: ... Assistant: ...'")
    truncated = [*train.text.truncated, *validation.text.truncated]
    if truncated:
        lost = train.text.dropped_tokens + validation.text.dropped_tokens
        lines.append(
            f"Cut short {len(truncated)} conversations that exceed a block, by {lost:,} tokens: {first_few(truncated)}"
        )
    return lines + name_left_out([*train.text.left_out, *validation.text.left_out])


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:,.1f} kB" if num_bytes >= 1000 else f"{num_bytes} bytes"


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return str(number)

"""`sar-kd shrink`: cut a model down to a smaller one, a student for distillation.

The cut model is written aside, loaded again and compared with what was cut before the folder gets its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from sar_kd.config.fields import require
from sar_kd.config.installation import program_name
from sar_kd.config.sections import DeviceConfig
from sar_kd.config.shrinking import ShrinkConfig, ShrinkingConfig, kept_count
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.samples import Conversation, Sample
from sar_kd.data.files.sources import Documents, load_documents
from sar_kd.data.token_cache import TokenCache
from sar_kd.errors import UsageError
from sar_kd.evaluation.layer_influence import LayerInfluence, measure_influence
from sar_kd.evaluation.perplexity import Evaluation, evaluate
from sar_kd.models.cutting import WholeModel, check_equal, load_whole, probe_logits
from sar_kd.models.feed_forward import channel_norms, find_feed_forward, keep_channels_, without_channels
from sar_kd.models.generation import generate
from sar_kd.models.layers import (
    check_follows,
    find_layers,
    keep_layers_,
    shown_layers,
    spread_evenly,
    without_layers,
)
from sar_kd.models.loading import context_length_of
from sar_kd.models.model_checks import vocab_size_of
from sar_kd.models.pretrained import rebuild_on_meta
from sar_kd.reporting.report import require_matplotlib
from sar_kd.reporting.shrink_page import PAGE, Measured, Shrunk, build_shrink_card, build_shrink_page
from sar_kd.runtime.console import format_share, print_stderr
from sar_kd.runtime.files import atomic_rename, json_safe
from sar_kd.runtime.precision import Precision, setup_precision
from sar_kd.teacher.moe.discovery import find_routers
from sar_kd.teacher.moe.expert_cut import count_usage, keep_experts_, require_cuttable
from sar_kd.training.checkpoint import save_student

_BATCH_SIZE = 4

_PROMPT, _NEW_TOKENS = 8, 16
"""Tokens of the generation whose time is measured"""

_NUM_LAST = 2
"""Last layers that are kept, as they form the next token's distribution; one where fewer than 8 layers are kept"""


def main(config: ShrinkingConfig) -> dict:
    """Cut `--model`, write it into `--output_dir`, and print what it was worth before and after; `--json`: as JSON.

    Raises: UsageError for what the user can mend
    """
    settings, folder = config.shrink, Path(config.shrink.output_dir)
    _check_new(folder)
    require_matplotlib("shrink")
    precision = setup_precision(DeviceConfig(device=settings.device, model_dtype="float32"), 0)
    documents = load_documents(config.data, print_stderr)  # before the weights: a mistake in the files shows at once
    how = settings.trust_remote_code, precision, config.data.template_date
    whole = load_whole(settings.model, *how)
    say = print_stderr if config.output.json else print
    say(f"{settings.model}: {type(whole.model).__name__}, {whole.num_parameters:,} parameters")
    texts = [list(_beginning(text, chars)) for text, chars in zip(documents, settings.text_sizes, strict=True)]
    calibration, held_out = _datasets(config, whole, texts)
    before, evaluation = _measure(whole, held_out, precision)
    shrunk = Shrunk(settings.model, f"{evaluation.num_bytes:,} bytes of {config.data.describe()}", before)

    for is_asked, cut in (
        (settings.layers or settings.listed_layers, _cut_layers_),
        (settings.intermediate, _cut_channels_),
        (settings.experts, _cut_experts_),
    ):
        if is_asked:
            shrunk, expected = cut(settings, whole, calibration, shrunk, precision)
            say(shrunk.cuts[-1])
            check_follows(whole.title, whole.model, rebuild_on_meta(f"{whole.title}, cut", whole.model))
            check_equal(whole.title, probe_logits(whole.model, precision), expected)
    with _written_aside(folder) as partial:
        whole.restore_dtypes_()
        save_student(whole.model, whole.tokenizer, partial)
        del whole.model  # its memory is the next one's
        written = load_whole(str(partial), *how, f"{whole.title}, cut")
        check_equal(whole.title, probe_logits(written.model, precision), expected)
        calibration, held_out = _datasets(config, written, texts)
        after, evaluation = _measure(written, held_out, precision)
        warnings = _compare_with_chance(evaluation, calibration, held_out)
        shrunk = dataclasses.replace(shrunk, after=after, warnings=warnings)
        (partial / "README.md").write_text(build_shrink_card(shrunk, folder), encoding="utf-8")
        (partial / PAGE).write_text(build_shrink_page(shrunk), encoding="utf-8")
    _report(shrunk, folder, config)
    return {"status": "finished"}


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output_dir {folder}: is there already, and nothing is overwritten; name another folder")
    existing = next(path for path in folder.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"--output_dir {folder}: cannot be written ({existing} is no folder that can be)")


def _beginning(documents: Documents, num_chars: int) -> Iterator[Sample]:
    """The first documents, this many characters of them; a conversation is not cut."""
    for sample in documents:
        if num_chars <= 0:
            break
        is_cut = not isinstance(sample, Conversation) and sample.num_chars > num_chars
        yield sample.part(0, num_chars, sample.name) if is_cut else sample  # type: ignore[union-attr]
        num_chars -= sample.num_chars


def _datasets(config: ShrinkingConfig, whole: WholeModel, texts: list[list[Sample]]) -> list[Dataset]:
    """The text that the choice is made on and the held-out one, in the model's tokens."""
    size, context = config.data.block_size, context_length_of(whole.model)
    if context and context < size:
        raise UsageError(f"--block_size {size}: the model takes {context} tokens at most; lower it")
    return [
        build_dataset(text, whole.pair, size, size, TokenCache(config.data.token_cache), option=option)
        for text, option in zip(texts, config.data.text_options(), strict=True)
    ]


def _measure(whole: WholeModel, held_out: Dataset, precision: Precision) -> tuple[Measured, Evaluation]:
    batches = held_out.token_batches("student", _BATCH_SIZE)
    evaluation = evaluate(whole.model, batches, held_out.text.num_bytes, precision)
    seconds = _seconds_per_token(whole, held_out.text.student.ids[:_PROMPT].tolist())
    values = evaluation.perplexity, evaluation.bits_per_byte, seconds
    return Measured(whole.num_parameters, whole.num_bytes, *values), evaluation


def _seconds_per_token(whole: WholeModel, prompt: list[int]) -> float:
    """The least of three greedy generations, of 16 tokens behind a prompt.

    Raises: UsageError if it cannot generate, as a hybrid model cannot that has lost all of its attention
    """
    count = min(_NEW_TOKENS, (context_length_of(whole.model) or 2**31) - len(prompt))
    last, seconds = vocab_size_of(whole.model) - 1, []  # a stop that hardly comes
    for _ in range(3):
        start = time.perf_counter()
        try:
            (found,) = generate(whole.model, [prompt], stop_token_ids=[last], max_new_tokens=[count])
        except (ValueError, LookupError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"{whole.title}: it cannot generate with a cache ({reason}); make another cut") from None
        seconds.append((time.perf_counter() - start) / (len(found.ids) + (found.stop is not None)))
    return min(seconds)


def _cut_layers_(
    settings: ShrinkConfig, whole: WholeModel, calibration: Dataset, shrunk: Shrunk, precision: Precision
) -> tuple[Shrunk, Tensor]:
    """Cut the depth; returns what was done, and the logits that the cut model has to have: those of the whole one whose
    other layers hand on what they are given.
    """
    model = whole.model
    name, layers = find_layers(whole.title, model)
    influence = measure_influence(whole.title, model, layers, calibration.token_batches("student", _BATCH_SIZE))
    kept = choose_layers(settings, influence)
    dropped = [index for index in range(len(layers)) if index not in kept]
    with without_layers(layers, dropped):
        expected = probe_logits(model, precision)
    keep_layers_(f"{whole.title}, cut", model, name, kept)
    how = "given by hand" if settings.listed_layers else settings.layer_choice
    line = (
        f"Layers: {len(kept)} of {len(layers)} kept ({how}, over {influence.num_tokens:,} tokens); cut, counted from "
        f"0: {shown_layers(dropped)}"
    )
    cuts = [*shrunk.cuts, line]
    return dataclasses.replace(shrunk, cuts=cuts, influence=influence.of_each(), dropped_layers=dropped), expected


def _cut_channels_(
    settings: ShrinkConfig, whole: WholeModel, calibration: Dataset, shrunk: Shrunk, precision: Precision
) -> tuple[Shrunk, Tensor]:
    """Cut the width of the feed-forward parts; returns as `_cut_layers_`, of the model whose other channels are 0."""
    parts, setting, size = find_feed_forward(whole.title, whole.model)
    count = kept_count("intermediate", settings.intermediate, size)
    norms = channel_norms(whole.model, parts, calibration.token_batches("student", _BATCH_SIZE))
    kept = [each.topk(count).indices.sort().values for each in norms]
    with without_channels(parts, kept):
        expected = probe_logits(whole.model, precision)
    keep_channels_(f"{whole.title}, cut", whole.model, parts, kept, setting)
    line = (
        f"Feed-forward: {count:,} of {size:,} channels kept in each of {len(parts)} parts, those of the largest norm "
        f"over {calibration.num_tokens:,} tokens"
    )
    return dataclasses.replace(shrunk, cuts=[*shrunk.cuts, line]), expected


def _cut_experts_(
    settings: ShrinkConfig, whole: WholeModel, calibration: Dataset, shrunk: Shrunk, precision: Precision
) -> tuple[Shrunk, Tensor]:
    """Cut the experts of each block; returns as `_cut_layers_`, the logits being those of the cut model itself."""
    specs = find_routers(whole.model)
    require_cuttable(whole.title, whole.model, specs)
    size, top_k = specs[0].num_experts, max(spec.top_k for spec in specs)
    count = kept_count("experts", settings.experts, size)
    require(count >= top_k, "experts", settings.experts, f"each token takes {top_k} experts; keep at least as many")
    usage = count_usage(whole.model, specs, calibration.token_batches("student", _BATCH_SIZE))
    kept = [each.topk(count).indices.sort().values for each in usage]
    chosen = sum(int(each[indices].sum()) for each, indices in zip(usage, kept, strict=True))
    share = format_share(chosen / sum(int(each.sum()) for each in usage))
    keep_experts_(f"{whole.title}, cut", whole.model, specs, kept)
    line = (
        f"Experts: {count} of {size} kept in each of {len(specs)} blocks, those that {calibration.num_tokens:,} tokens "
        f"use most: {share} of their choices"
    )
    return dataclasses.replace(shrunk, cuts=[*shrunk.cuts, line]), probe_logits(whole.model, precision)


def choose_layers(settings: ShrinkConfig, influence: LayerInfluence) -> list[int]:
    """The layers to keep, ascending. Raises: UsageError if there are not so many, or nothing would be cut"""
    total, listed = influence.num_layers, settings.listed_layers
    if listed:
        choice = settings.layer_choice
        require(listed[-1] < total, "layer_choice", choice, f"the model has layers 0 to {total - 1}")
        require(len(listed) < total, "layer_choice", choice, "keeps every layer of the model; leave some out")
        return list(listed)
    count = kept_count("layers", settings.layers, total)
    if settings.layer_choice == "even":
        return spread_evenly(total, count)
    num_last, size = _NUM_LAST if count >= 8 else 1, total - count
    if settings.layer_choice == "influence":
        first = influence.least(size, num_last)
    else:
        first = count if settings.layer_choice == "first" else count - num_last
    return [index for index in range(total) if not first <= index < first + size]


def _compare_with_chance(evaluation: Evaluation, calibration: Dataset, held_out: Dataset) -> list[str]:
    """A warning if the model is no better than one that knows only how often each token is.

    loss = -mean over the held-out tokens of log (c + 1) / (N + V), c: how often the token is among the N of the text
    """
    known, targets = (data.text.student.ids[data.text.student.is_target] for data in (calibration, held_out))
    counts = np.bincount(known, minlength=calibration.pair.student_vocab_size)
    loss = np.log(counts.sum() + len(counts)) - np.log(counts[targets] + 1).mean()
    if evaluation.loss < loss:
        return []
    return [
        f"Warning: the cut has left the model at chance: {evaluation.loss:.2f} nats a token, and {loss:.2f} for how "
        "often each token is; cut less, or distil it for long"
    ]


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name once all is in it; after an error nothing is left."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        atomic_rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _report(shrunk: Shrunk, folder: Path, config: ShrinkingConfig) -> None:
    if config.output.json:
        print(json.dumps(json_safe({**dataclasses.asdict(shrunk), "output_dir": str(folder)}), indent=2))
        return
    for line in (*shrunk.table(), *shrunk.warnings):
        print(line)
    print(f"Written: {folder}, with README.md and {PAGE}")
    print(f"Next: {program_name()} train --teacher_model {shrunk.model} --student_model {folder}")

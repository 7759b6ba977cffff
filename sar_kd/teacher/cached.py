"""A teacher read from a cache: opened, checked against everything that it depends on, evaluated from its records."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from sar_kd.config.fields import RunConfig
from sar_kd.config.installation import program_name
from sar_kd.config.runs import Config
from sar_kd.data.dataset import Dataset
from sar_kd.data.files.sources import digest_of
from sar_kd.evaluation.perplexity import Evaluation
from sar_kd.models.loading import TeacherInfo, load_meta_model
from sar_kd.models.model_files import find_model
from sar_kd.runtime.console import count_of
from sar_kd.runtime.distributed import ProcessGroup
from sar_kd.runtime.files import file_digest
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.base import Teacher
from sar_kd.teacher.cache.format import TEXTS, cache_error, check_compatible, describe_kept, read_header
from sar_kd.teacher.cache.lookup import CachedText
from sar_kd.tokenization.token_table import fingerprint

C = TypeVar("C", bound=RunConfig)


def set_template_date(config: C) -> C:
    """The config with a date for chat templates: the one given, the teacher cache's, or today's."""
    if config.data.template_date:
        return config
    folder = getattr(config.models, "teacher_cache", "")
    found = read_header(Path(folder))["metadata"].get("template_date") if folder else ""
    data = dataclasses.replace(config.data, template_date=found or date.today().isoformat())
    return dataclasses.replace(config, **{"data": data})


def open_teacher_cache(
    config: Config, process_group: ProcessGroup, show: Callable[[str], None]
) -> tuple[Config, CacheReader | None]:
    """The cache that `--teacher_cache` names, checked, and the config of a run with it; None without one.

    show: takes a line about the cache
    Raises: UsageError if it is unfinished, damaged, or does not fit this run
    """
    if not config.models.teacher_cache:
        return config, None
    reader = CacheReader(Path(config.models.teacher_cache), check_settings(config), config.loss.temperature)
    process_group.on_rank_zero(lambda: reader.check(config, show))
    is_drawn = reader.metadata["keep"] != "topk"  # then the target comes to the k
    top_k = config.loss.teacher_top_k or reader.metadata["teacher_top_k"] + is_drawn
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, teacher_top_k=top_k)), reader


def check_settings(config: RunConfig) -> dict:
    """The header of the cache that `--teacher_cache` names, if a run with these settings can use it.

    Raises: UsageError with the reason
    """
    folder, loss, memory = Path(config.models.teacher_cache), config.loss, config.memory
    routing = config.routing.routing
    refusals = {
        "--alpha_kd is 0, so distillation is off; leave the cache out": loss.alpha_kd == 0,
        f"holds the teacher in its own routing, which --routing {routing} changes; leave the cache out, or --routing "
        "native": routing not in ("native", "auto"),
        "holds a fixed text, and --on_policy_fraction samples another; leave one of them out":
            config.on_policy.on_policy_fraction > 0,
        "replaces the teacher; leave out --offload_teacher_to_cpu and --teacher_quantization":
            memory.offload_teacher_to_cpu or memory.teacher_quantization != "off",
        f"replaces the teacher; leave out {memory.placement()}": bool(memory.placement()),
        "holds no hidden states, which --alignment hidden compares; leave the cache out": loss.alignment == "hidden",
        "holds no logits for --logit_clamp_style raw to clamp; use normalized, or leave the cache out":
            loss.logit_clamp_style == "raw",
    }  # fmt: skip
    for reason, is_refused in refusals.items():
        if is_refused:
            raise cache_error(folder, reason)
    header = read_header(folder)
    if not header["complete"]:
        raise cache_error(folder, f"is not finished; `{program_name()} cache` with its options goes on")
    needed: dict[str, object] = {"block_size": config.data.block_size}
    if config.data.template_date and header["metadata"].get("template_date"):
        needed["template_date"] = config.data.template_date
    check_compatible(folder, header, needed)
    k, temperatures = header["metadata"]["teacher_top_k"], header["metadata"]["temperatures"]
    if (keep := header["metadata"]["keep"]) != "topk":
        drawn = {
            f"--kd_direction {loss.kd_direction}": loss.kd_direction != "forward" and loss.alignment != "alm",
            f"--alignment {loss.alignment}": loss.alignment in ("strict", "uld"),
            f"--teacher_top_k {loss.teacher_top_k}": loss.teacher_top_k not in (0, k + 1),  # all, the target too
        }
        for setting in (setting for setting, is_given in drawn.items() if is_given):
            raise cache_error(
                folder,
                f"holds drawn tokens (--keep {keep}); {setting} needs the most likely ones: leave it out, or make a "
                "cache with --keep topk",
            )
    elif loss.teacher_top_k > k:
        raise cache_error(folder, f"holds {k} tokens per position, fewer than --teacher_top_k {loss.teacher_top_k}")
    if loss.alignment in ("auto", "projection") and loss.temperature not in temperatures:
        if "source" in header["metadata"]:
            known = "its log-probabilities give the mass of all other tokens at temperature 1 alone"
            raise cache_error(folder, f"{known}; give --temperature 1")
        served = ", ".join(f"{value:g}" for value in temperatures)
        raise cache_error(
            folder,
            f"serves --temperature {served}, not {loss.temperature:g}; make another one with --temperatures "
            f"{' '.join(f'{value:g}' for value in sorted({*temperatures, loss.temperature}))}",
        )
    return header


class CacheReader:
    """A finished cache in a run."""

    def __init__(self, folder: Path, header: dict, temperature: float):
        self.folder, self._header, self.metadata = folder, header, header["metadata"]
        self.teacher = TeacherInfo(
            self.metadata["vocab_size"], tuple(self.metadata["stop_ids"]), self.metadata["limit"]
        )
        self._texts = tuple(CachedText(folder, header, text, temperature) for text in TEXTS)

    def check(self, config: Config, show: Callable[[str], None]) -> None:
        """Compare every shard with its digest, and the teacher with the one that the cache was made with.

        Raises: UsageError naming what is damaged or differs
        """
        size = sum(text.shards.num_bytes for text in self._texts)
        with tqdm(
            total=size, unit="B", unit_scale=True, desc="Checking the teacher cache", leave=False,
            disable=not sys.stderr.isatty(),
        ) as bar:  # fmt: skip
            for text in self._texts:
                for number in range(len(text.shards.digests)):
                    bar.update(text.shards.check(number))
        found = model_fingerprint(config.models.teacher_model, config.models.trust_remote_code)
        compared = _check_teacher(self.folder, self.metadata["teacher"], found)
        kept, dtype = describe_kept(self.metadata), self.metadata["dtype"]
        show(
            f"Teacher: not loaded; {size / 1e6:,.1f} MB of cached logits, at each position the {kept}, in {dtype}, are "
            f"read from {self.folder}" + ("" if compared else "; its weights are not here to compare")
        )

    def texts(self, texts: tuple[Any, Any], tokenizer) -> tuple[CachedText, ...]:
        """The cached training and held-out text.

        texts: training and held-out documents of the run; tokenizer: the teacher's, as the run has loaded it
        Raises: UsageError if the cache was made with a different text or tokenizer
        """
        metadata = {"text": [digest_of(text) for text in texts], "tokenizer": fingerprint(tokenizer)}
        check_compatible(self.folder, self._header, metadata)
        return self._texts


def model_fingerprint(name: str, trust_remote_code: bool, option: str = "teacher_model") -> dict[str, str]:
    """Identifies a model: digests of its files, or its commit on the hub; no weights are loaded.

    option: the one that named the model
    Raises: UsageError if there is no such model
    """
    files = find_model(option, name)
    if files.folder is None:
        commit = getattr(load_meta_model(option, name, trust_remote_code).config, "_commit_hash", None)
        return {"commit": commit or name}
    if files.gguf_file:
        return {files.gguf_file: file_digest(files.folder / files.gguf_file)}
    folders = [files.folder, *([Path(files.adapter)] if files.adapter else [])]
    patterns = ("*.safetensors", "*.bin", "*.gguf", "*.py", "config.json", "adapter_config.json")
    return {
        path.name: file_digest(path)
        for folder in folders
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern))
    }


def _check_teacher(folder: Path, stored: dict[str, str], found: dict[str, str]) -> bool:
    """Whether weights, or commits, could be compared.

    Raises: UsageError if they or the configurations differ
    """
    common = stored.keys() & found.keys()
    weights = common - {"config.json"}
    differ = any(stored[name] != found[name] for name in common)
    if differ or (not weights and len(found) > 1 and len(stored) > 1):
        raise cache_error(folder, "was made with a different teacher (the digests of its files differ)")
    return bool(weights)


class CachedTeacher(Teacher):
    """A teacher whose logits were cached, in its own routing."""

    def __init__(self, config: Config, train: Dataset):
        self._config, self.lines = config, _describe_records(config, train)

    def evaluate_start(self, validation: Dataset, precision: Precision) -> tuple[dict, list[str]]:
        assert validation.cached_records is not None
        total, num_tokens, num_nonfinite, num_known = 0.0, 0, 0, 0
        group_nats = np.zeros(validation.num_groups)
        for block in validation.blocks:
            nats, count = validation.cached_records.target_nats(block)
            for groups in validation.groups_of_targets("teacher", [block]):
                np.add.at(group_nats, groups, nats)
            is_known = ~np.isnan(nats)
            total, num_known = total + float(nats[is_known].sum()), num_known + int(is_known.sum())
            num_tokens, num_nonfinite = num_tokens + len(nats), num_nonfinite + count
        self.group_nats = group_nats.tolist()
        missing, whole = validation.cached_records.num_missing, total if num_known == num_tokens else math.nan
        metrics, lines = Evaluation(whole, num_tokens, validation.text.num_bytes, num_nonfinite).metrics(), []
        del metrics["val_loss"]
        if 0 < num_known < num_tokens and not missing and not num_nonfinite:
            metrics["val_ppl"] = Evaluation(total, num_known, 1).perplexity
            left_out = f"{num_tokens - num_known:,} of {num_tokens:,} held-out tokens"
            lines = [f"{left_out} have no log-probabilities in the cache and are left out of the teacher's perplexity"]
        if missing:
            found = count_of(missing, "held-out document")
            lines = [f"{found} not in the cache with the tokens of this run, so the teacher's perplexity is nan"]
        return metrics, lines

    def summary(self) -> dict:
        return {"teacher_cache": self._config.models.teacher_cache, "teacher_top_k": self._config.loss.teacher_top_k}


def _describe_records(config: Config, train: Dataset) -> list[str]:
    """Lines about blocks that differ from the teacher's, and about documents without records."""
    cached = train.cached_records
    assert cached is not None
    num_cached, num_blocks = len(cached.block_ends()), len(train) - len(train.text.conversations)
    lines = []
    if num_blocks > num_cached:
        lines.append(
            f"The teacher read plain text in {num_cached:,} blocks, which take {num_blocks:,} blocks of --block_size "
            f"{config.data.block_size} here: after the first of each, its context was longer than the student's. "
            f"`{program_name()} cache --student_model {config.models.student_model}` cuts blocks that fit"
        )
    if cached.num_missing:
        names = ", ".join(cached.first_missing) + ", ..." * (cached.num_missing > len(cached.first_missing))
        lines.append(
            f"{cached.num_missing} documents are not in the cache with the tokens of this run, and are learned without "
            f"the teacher: {names}"
        )
    return lines

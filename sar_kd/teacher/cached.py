"""A teacher that is read from a cache, as the calendar sees it; and which of the two kinds of teacher a run has.

What a teacher once said of a text, in a run: opened, checked against all that it depends on, never half believed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sar_kd import embedded
from sar_kd.config.fields import RunConfig
from sar_kd.config.runs import Config
from sar_kd.config.sections import EMBEDDED
from sar_kd.data.dataset import Dataset
from sar_kd.data.sources import digest_of
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import Evaluation, figures_of
from sar_kd.models.loading import TeacherInfo, load_meta_model
from sar_kd.runtime.distributed import ProcessGroup
from sar_kd.runtime.files import file_digest
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.base import NoTeacher
from sar_kd.teacher.cache.format import TEXTS, cache_error, check_compatible, read_header
from sar_kd.teacher.cache.lookup import CachedText
from sar_kd.tokenization.token_table import fingerprint


class CachedTeacher(NoTeacher):
    """What a run asks of a teacher that is not there any more, in its own routing."""

    def __init__(self, config: Config, train: Dataset):
        self._config, self.lines = config, _lines(config, train)
        self._figures: dict = {}

    def begin(self, validation: Dataset, precision: Precision) -> list[str]:
        """Add up what it made of the held-out text; lines to show."""
        assert validation.stored is not None
        nats, num_tokens = validation.stored.nats()
        found = figures_of(Evaluation(nats, num_tokens, validation.text.num_bytes))
        self._figures = {name: found[name] for name in ("val_ppl", "val_bits_per_byte")}
        return []

    def figures(self) -> dict:
        """Perplexity and bits per byte on held-out text."""
        return self._figures

    def summary(self) -> dict:
        """For `summary.json`."""
        loss = self._config.loss
        return {"teacher_cache": self._config.models.teacher_cache, "teacher_top_k": loss.teacher_top_k}


def _lines(config: Config, train: Dataset) -> tuple[str, ...]:
    """How the blocks of a run lie beside what the teacher read."""
    match = train.stored
    assert match is not None
    num_windows, num_blocks = len(match.windows()), len(train) - len(train.text.conversations)
    lines = []
    if num_blocks > num_windows:
        lines.append(
            f"The teacher read {num_windows:,} stretches of plain text, which take {num_blocks:,} blocks of "
            f"--block_size {config.data.block_size} here: behind the first of each it had read more than the student "
            f"has. `sar-kd cache --student_model {config.models.student_model}` cuts them to fit"
        )
    if match.num_unknown:
        named = ", ".join(match.some_unknown) + (", ..." if match.num_unknown > len(match.some_unknown) else "")
        lines.append(
            f"{match.num_unknown} documents are not in the cache as this student reads them, and are learned without "
            f"the teacher: {named}"
        )
    return tuple(lines)


Texts = tuple[Any, Any]
"""Training and held-out documents, as `load_documents` gives them"""

_WEIGHTS = ("*.safetensors", "*.bin")


class CacheReader:
    """A finished cache in a run; `NO_CACHE` where the teacher itself is asked."""

    def __init__(self, folder: Path, header: dict, temperature: float):
        self.folder, self._header, self.facts = folder, header, header["facts"]
        self.teacher: TeacherInfo | None = TeacherInfo(
            self.facts["teacher_rows"], tuple(self.facts["stop_ids"]), self.facts["teacher_limit"]
        )
        self._texts = [CachedText(folder, header, text, temperature) for text in TEXTS]

    def texts(self, texts: Texts, tokenizer) -> list[CachedText | None]:
        """What is stored of training and held-out text.

        tokenizer: the teacher's, as the run has loaded it
        Raises: UsageError if these are not the text and the tokenizer that the cache was made with
        """
        facts = {"text": [digest_of(text) for text in texts], "tokenizer": fingerprint(tokenizer)}
        check_compatible(self.folder, self._header, facts)
        return list(self._texts)

    def check(self, config: Config, say: Callable[[str], None]) -> None:
        """Compare every byte with its digest, and the teacher with the one that was asked.

        Raises: UsageError naming what is damaged or another
        """
        sizes = [stored.shards.num_bytes for stored in self._texts]
        with tqdm(
            total=sum(sizes), unit="B", unit_scale=True, desc="Checking the teacher cache", leave=False,
            disable=not sys.stderr.isatty(),
        ) as bar:  # fmt: skip
            for stored in self._texts:
                for number in range(len(stored.shards.digests)):
                    bar.update(stored.shards.check(number))
        found = model_fingerprint(config.models.teacher_model, config.models.trust_remote_code)
        compared = _require_same(self.folder, self.facts["teacher"], found)
        k, dtype = self.facts["teacher_top_k"], self.facts["dtype"]
        say(
            f"Teacher: not loaded; {sum(sizes) / 1e6:,.1f} MB of what it said, the {k} likeliest tokens of each row, "
            f"in {dtype}, are read from {self.folder}" + ("" if compared else "; its weights are not here to compare")
        )


class _NoCache:
    """The teacher is loaded and asked."""

    teacher = None

    def texts(self, texts: Texts, tokenizer) -> list[CachedText | None]:
        """Nothing is stored."""
        return [None] * len(texts)


NO_CACHE = _NoCache()


def open_teacher_cache(config: Config, process_group: ProcessGroup, log: Any) -> tuple[Config, CacheReader | _NoCache]:
    """The cache that `--teacher_cache` names, checked, and the settings of a run with it.

    Raises: UsageError if it is unfinished, damaged, or not what this run asks for
    """
    if not config.models.teacher_cache:
        return config, NO_CACHE
    folder = Path(config.models.teacher_cache)
    header = check_settings(config)
    cache = CacheReader(folder, header, config.loss.temperature)
    process_group.on_rank_zero(lambda: cache.check(config, log.say))
    top_k = config.loss.teacher_top_k or header["facts"]["teacher_top_k"]
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, teacher_top_k=top_k)), cache


def check_settings(config: RunConfig) -> dict:
    """The header of the cache that `--teacher_cache` names, if a run with these settings can use it.

    Raises: UsageError with the reason
    """
    folder, loss, routing = Path(config.models.teacher_cache), config.loss, config.routing.routing
    if loss.alpha_kd == 0:
        raise cache_error(folder, "--alpha_kd is 0, so no teacher is heard; leave the cache out")
    if routing not in ("native", "auto"):
        what = "its routers learn" if routing == "sar" else f"--routing {routing} asks other experts"
        raise cache_error(
            folder, f"holds the teacher in its own routing, and {what}; leave the cache out, or --routing native"
        )
    if config.on_policy.on_policy_fraction:
        raise cache_error(
            folder, "holds a fixed text, and --on_policy_fraction asks about another; leave one of them out"
        )
    if config.memory.offload_teacher_to_cpu or config.memory.teacher_quantization != "off":
        raise cache_error(
            folder, "stands for the teacher, which is not loaded; leave out --offload_teacher_to_cpu and "
            "--teacher_quantization"
        )  # fmt: skip
    if loss.alignment == "hidden":
        raise cache_error(folder, "holds no hidden states, which --alignment hidden compares; leave the cache out")
    if loss.logit_clamp_style == "raw":
        raise cache_error(
            folder, "holds no logits, which --logit_clamp_style raw clamps; use normalized, or leave the cache out"
        )
    header = read_header(folder)
    if not header["complete"]:
        raise cache_error(folder, "is not finished; `python -m sar_kd cache` with its flags goes on")
    check_compatible(folder, header, {"block_size": config.data.block_size})
    k = header["facts"]["teacher_top_k"]
    if loss.teacher_top_k > k:
        raise cache_error(folder, f"holds {k} tokens of each row, fewer than --teacher_top_k {loss.teacher_top_k}")
    known = header["facts"]["temperatures"]
    if loss.alignment in ("auto", "projection") and loss.temperature not in known:
        shown = ", ".join(f"{value:g}" for value in known)
        raise cache_error(
            folder, f"serves --temperature {shown}, not {loss.temperature:g}; make it with --temperatures"
        )
    return header


def model_fingerprint(name: str, trust_remote_code: bool) -> dict[str, str]:
    """What tells a teacher from another: digests of its files, or its commit on the hub; no weights are loaded."""
    folder = embedded.TEACHER_DIR if name == EMBEDDED else Path(name).expanduser()
    if not folder.is_dir():
        commit = getattr(load_meta_model("teacher_model", name, trust_remote_code).config, "_commit_hash", None)
        return {"commit": commit or name}
    weights = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    found = {path.name: file_digest(path) for path in weights}
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"--teacher_model {name}: has no config.json")
    return {**found, "config.json": file_digest(config)}


def _require_same(folder: Path, stored: dict[str, str], found: dict[str, str]) -> bool:
    """Whether there were weights to compare. Raises: UsageError if they, or the configurations, are others"""
    common = stored.keys() & found.keys()
    weights = common - {"config.json"}
    is_other = any(stored[name] != found[name] for name in common)
    if is_other or (not weights and len(found) > 1 and len(stored) > 1):
        raise cache_error(folder, "was made with another teacher (its files have other digests)")
    return bool(weights)

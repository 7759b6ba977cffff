"""One model or tokenizer as a flag names it: embedded, of a directory, of the hub, or given in memory.

The only module that reads checkpoints through transformers.

Load the teacher, the student and their tokenizers: the student trainable in float32, the teacher frozen.

What is looked at before a run: its settings, and its models without their weights.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
import transformers
from torch import nn

from sar_kd import embedded
from sar_kd.config.fields import RunConfig
from sar_kd.config.runs import Config
from sar_kd.config.sections import EMBEDDED, ModelConfig
from sar_kd.errors import UsageError
from sar_kd.models.lm_head import backbone_of
from sar_kd.models.memory_saving import Offload, quantised, recompute_activations_
from sar_kd.runtime.hub import reason_of
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.tokenizer_pair import TokenizerPair, UnfitTokenizer

_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError, EOFError,
    pickle.UnpicklingError, safetensors.SafetensorError,
)  # fmt: skip

IN_MEMORY = "(in memory)"
"""Begins the name of a model that was handed over in Python."""

_EMBEDDED_DIRS = {
    "teacher_model": embedded.TEACHER_DIR,
    "student_model": embedded.STUDENT_DIR,
    "model": embedded.TEACHER_DIR,
}


@dataclass(frozen=True)
class LoadedModels:
    """Models that are in memory already, each with its tokenizer, by flag; they are not read from anywhere."""

    pairs: Mapping[str, tuple[nn.Module, Any]]

    def model(self, flag: str) -> Any:
        """The model that stands for this flag's; None if it is to be loaded."""
        return self.pairs[flag][0] if flag in self.pairs else None


NO_LOADED_MODELS = LoadedModels(MappingProxyType({}))


def load_meta_model(flag: str, name: str, trust_remote_code: bool) -> nn.Module:
    """The model without its weights, on the meta device: names and shapes as in `load_models`, whatever its size.

    Raises: UsageError as `load_models`
    """
    quiet()
    location = _location(flag, name)
    build = transformers.AutoModelForCausalLM.from_config

    def load() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return build(config, trust_remote_code=trust_remote_code)

    return _read(flag, name, load)


def stop_ids_of(model: Any) -> tuple[int, ...]:
    """What the generation config names beside the tokenizer's own end of text."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(ids) if isinstance(ids, list) else (() if ids is None else (ids,))


def quiet() -> None:
    """No bars and no warnings of transformers' own."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry of an absent network


def num_rows(model: Any) -> int:
    """Rows of the head: V of the logits, which may exceed the tokenizer's size."""
    return model.get_output_embeddings().weight.shape[0]


def context_of(model: Any) -> int | None:
    """The longest input that the model takes; None if it states none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def rows_named(flag: str, name: str, trust_remote_code: bool) -> int:
    """Rows of the head of what a flag names, as its configuration says; no weights are read. Raises: UsageError"""
    load = functools.partial(transformers.AutoConfig.from_pretrained, _location(flag, name))
    return _read(flag, name, functools.partial(load, trust_remote_code=trust_remote_code)).get_text_config().vocab_size


def _location(flag: str, name: str) -> str:
    if name == EMBEDDED:
        if not _EMBEDDED_DIRS[flag].is_dir():
            raise UsageError(f"--{flag} {EMBEDDED}: not in this installation; make it with `python -m sar_kd embedded`")
        return str(_EMBEDDED_DIRS[flag])
    if name.startswith(IN_MEMORY):
        raise UsageError(f"--{flag} {name}: was handed over in Python; continue there, with the same model")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"--{flag} {name}: no such directory")
    return os.path.expanduser(name)


def _load_model(flag: str, name: str, dtype: torch.dtype, trust_remote_code: bool, **how) -> Any:
    location = _location(flag, name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    how |= {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    model, info = _read(flag, name, lambda: load(location, **how))
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(f"--{flag} {name}: {len(missing)} weights are not in its files, {missing[0]} among them")
    return model


def model_of(flag: str, names: ModelConfig, dtype: torch.dtype, given: LoadedModels, **how) -> nn.Module:
    """The model of a flag, given or loaded (`how`: with what else), found fit to compute in `dtype`."""
    name, model = getattr(names, flag), given.model(flag)
    model = _load_model(flag, name, dtype, names.trust_remote_code, **how) if model is None else model.to(dtype)
    if model.get_output_embeddings() is None:
        raise UsageError(
            f"--{flag} {name}: {type(model).__name__} has no language-model head; use a causal language model"
        )
    for weight, values in model.named_parameters():
        if not values.isfinite().all():
            remedy = f"float32 might hold what {dtype} cannot (--model_dtype float32), or the file is damaged"
            raise UsageError(f"--{flag} {name}: its weight {weight} is not finite; {remedy}")
    return model


def load_for_generation(flag: str, name: str, trust_remote_code: bool, dtype: torch.dtype = torch.float32):
    """A model in eval mode, and its tokenizer.

    Raises: UsageError as `load_models`
    """
    quiet()
    model = _load_model(flag, name, dtype, trust_remote_code).eval()
    return model, _load_tokenizer(flag, name, trust_remote_code)


def _load_tokenizer(flag: str, name: str, trust_remote_code: bool):
    location = _location(flag, name)
    load = transformers.AutoTokenizer.from_pretrained
    return _read(flag, name, lambda: load(location, trust_remote_code=trust_remote_code))


def tokenizer_of(flag: str, names: ModelConfig, rows: int, given: LoadedModels):
    """The tokenizer of a flag's model, given or loaded, found fit for a model with so many rows."""
    name, pair = getattr(names, flag), given.pairs.get(flag)
    tokenizer = _load_tokenizer(flag, name, names.trust_remote_code) if pair is None else pair[1]
    try:
        encode(tokenizer, ["a"])
    except (AttributeError, NotImplementedError, TypeError):
        kind = type(tokenizer).__name__
        raise UsageError(f"--{flag} {name}: its {kind} cannot encode plain text; save it as a fast tokenizer") from None
    if len(tokenizer) > rows:
        raise UsageError(f"--{flag} {name}: the tokenizer has {len(tokenizer)} ids, the model only {rows}")
    return tokenizer


def _read(flag: str, name: str, load):
    """What `load` reads, with the errors of disk, hub and unknown formats as one line."""
    try:
        return load()
    except _UNREADABLE as error:
        raise UsageError(f"--{flag} {name}: cannot be loaded ({reason_of(error, name)})") from None


@dataclass(frozen=True)
class Models:
    """The two models of a run and what connects their tokenizers."""

    teacher: Any
    """A module; None where nothing is distilled"""
    student: nn.Module
    tokenizers: TokenizerPair
    embedded: bool
    """Every model is one that is shipped with the package."""
    teacher_limit: int | None = None
    """Most tokens that a teacher read at once whose answers are stored"""
    offload: Offload | None = None
    """Of a teacher that is on the device only while it reads"""

    def with_student(self, student: nn.Module) -> Models:
        """The same with another student."""
        return dataclasses.replace(self, student=student.to(next(self.student.parameters()).device))

    def block_limits(self, block_size: int) -> tuple[int, int]:
        """Most tokens in a block for the student and for the teacher, start token included.

        Raises: UsageError if the student's context is shorter than `block_size`
        """
        student, teacher = (None if model is None else context_of(model) for model in (self.student, self.teacher))
        if student is not None and student < block_size:
            raise UsageError(f"--block_size {block_size}: the student takes {student} tokens at most; lower it")
        return block_size, self.teacher_limit or teacher or 8 * block_size


def load_models(
    config: Config, precision: Precision, stored: TeacherInfo | None = None, given: LoadedModels = NO_LOADED_MODELS
) -> Models:
    """Load what `--teacher_model` and `--student_model` name, but for what is given.

    stored: of a teacher whose answers are stored, of which the tokenizer alone is loaded
    Raises: UsageError naming the flag, where a model or tokenizer is missing or cannot be used
    """
    quiet()
    names = config.models
    student = model_of("student_model", names, torch.float32, given)
    rounding = config.memory.teacher_quantization
    if rounding != "off" and given.model("teacher_model") is not None:
        raise UsageError(f"--teacher_quantization {rounding}: the teacher is in memory already; leave the flag out")
    small = quantised(rounding, precision)
    teacher = None if stored else model_of("teacher_model", names, precision.dtype, given, **small)
    found = stored or TeacherInfo(num_rows(teacher), stop_ids_of(teacher), 0)
    rows = {"student_model": num_rows(student), "teacher_model": found.num_rows}
    stops = stop_ids_of(student), found.stop_ids
    tokenizers = _pair_tokenizers(
        names,
        rows,
        given,
        aligns=config.loss.alignment != "auto",
        projects=config.loss.alignment in ("auto", "projection") and config.loss.alpha_kd > 0,
        tolerant=config.loss.alignment == "uld",
        stop_ids=stops,
    )
    offload = None
    if teacher is not None:
        teacher.requires_grad_(False).eval().to(precision.device)
        if config.memory.offloads_from(precision.device):
            offload = Offload(teacher, backbone_of(teacher), precision.device)
    student.train()
    if config.memory.gradient_checkpointing:
        recompute_activations_(student, same_dropout=True)
    if config.train.parallel != "fsdp":  # such a student may be larger than a device: `place` moves it, part by part
        student.to(precision.device)
    both = (names.teacher_model, names.student_model)
    return Models(teacher, student, tokenizers, both == (EMBEDDED, EMBEDDED), found.limit or None, offload)


def load_teacher(names: Any, precision: Precision) -> tuple[nn.Module, Any, TeacherInfo]:
    """What `--teacher_model` names, frozen, its tokenizer, and what is to be known of it; no student.

    Raises: UsageError as `load_models`
    """
    quiet()
    teacher = model_of("teacher_model", names, precision.dtype, NO_LOADED_MODELS)
    tokenizer = tokenizer_of("teacher_model", names, num_rows(teacher), NO_LOADED_MODELS)
    about = TeacherInfo(num_rows(teacher), stop_ids_of(teacher), context_of(teacher) or 0)
    return teacher.requires_grad_(False).eval().to(precision.device), tokenizer, about


def load_student(names: Any, dtype: torch.dtype, precision: Precision) -> Models:
    """Load what `--student_model` names, and no teacher: the student stands on both sides of the tokenizers.

    names: `student_model` and `trust_remote_code`; dtype: of the weights; float32 for weights that are to learn
    Raises: UsageError as `load_models`
    """
    quiet()
    student = model_of("student_model", names, dtype, NO_LOADED_MODELS)
    rows = num_rows(student)
    tokenizer = tokenizer_of("student_model", names, rows, NO_LOADED_MODELS)
    both = {"student_model": tokenizer, "teacher_model": tokenizer}
    pair = _pair(names, both, dict.fromkeys(both, rows), projects=False, stop_ids=(stop_ids_of(student),) * 2)
    return Models(None, student.train().to(precision.device), pair, names.student_model == EMBEDDED)


def load_tokenizers(names: Any, aligns: bool = True) -> TokenizerPair:
    """The tokenizers alone, with tables of bytes even if they are equal, if `aligns`; no weights are read.

    names: `teacher_model`, `student_model` and `trust_remote_code`
    Raises: UsageError as `load_models`
    """
    quiet()
    rows = {}
    for flag in ("student_model", "teacher_model"):
        rows[flag] = rows_named(flag, getattr(names, flag), names.trust_remote_code)
    return _pair_tokenizers(names, rows, aligns=aligns)


def _pair_tokenizers(
    names: ModelConfig, rows: dict[str, int], given: LoadedModels = NO_LOADED_MODELS, **how
) -> TokenizerPair:
    """`how`: as `TokenizerPair`"""
    loaded = {flag: tokenizer_of(flag, names, rows[flag], given) for flag in rows}
    return _pair(names, loaded, rows, **how)


def _pair(names: ModelConfig, loaded: dict[str, Any], rows: dict[str, int], **how) -> TokenizerPair:
    try:
        return TokenizerPair(
            loaded["student_model"],
            loaded["teacher_model"],
            student_rows=rows["student_model"],
            teacher_rows=rows["teacher_model"],
            **how,
        )
    except UnfitTokenizer as error:
        flag = f"{error.whose}_model"
        remedy = "use another model" + (", or --alignment uld" if error.tells_characters else "")
        raise UsageError(f"--{flag} {getattr(names, flag)}: its tokenizer {error.reason}; {remedy}") from None


class MetaModels:
    """What the checks look at: the settings, and the models without their weights, built when first asked for."""

    def __init__(self, config: RunConfig, given: LoadedModels = NO_LOADED_MODELS):
        self.config, self.given = config, given
        self.sides = [whose for whose in ("teacher", "student") if hasattr(config.models, f"{whose}_model")]

    @cached_property
    def models(self) -> dict[str, torch.nn.Module]:
        """'teacher', if there is one, and 'student': shapes only, or the model itself where it is in memory already."""
        names, found = self.config.models, {}
        for whose in self.sides:
            flag = f"{whose}_model"
            model = self.given.model(flag)
            found[whose] = model or load_meta_model(flag, getattr(names, flag), names.trust_remote_code)
        return found


@dataclass(frozen=True)
class TeacherInfo:
    """What must be known of a teacher whose answers are stored, and which is not loaded."""

    num_rows: int
    """Rows of its head"""
    stop_ids: tuple[int, ...]
    limit: int
    """Most tokens that it read at once, start token included"""

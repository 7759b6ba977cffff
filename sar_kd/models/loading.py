"""Load teacher, student and tokenizers: from the package, a directory, the hub, or handed over in memory.

The student is trainable in float32, the teacher frozen. The only module that reads checkpoints through transformers.
"""

from __future__ import annotations

import dataclasses
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
from sar_kd.models.memory_saving import Offload, quantization_options, recompute_activations_
from sar_kd.runtime.hub import explain_hub_error
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.tokenizer_pair import TokenizerPair, UnfitTokenizer

IN_MEMORY = "(in memory)"
"""Begins the name of a model that was handed over in Python."""

_EMBEDDED_DIRS = {
    "teacher_model": embedded.TEACHER_DIR,
    "student_model": embedded.STUDENT_DIR,
    "model": embedded.TEACHER_DIR,
}

_LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError, EOFError,
    pickle.UnpicklingError, safetensors.SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class LoadedModels:
    """Models that are in memory already, each with its tokenizer, by option; they are not loaded from anywhere."""

    pairs: Mapping[str, tuple[nn.Module, Any]]

    def model(self, option: str) -> Any:
        """The model for this option; None if it is to be loaded."""
        return self.pairs[option][0] if option in self.pairs else None


NO_LOADED_MODELS = LoadedModels(MappingProxyType({}))


@dataclass(frozen=True)
class TeacherInfo:
    """The facts about a teacher that a run needs even when it reads cached logits and loads no teacher."""

    vocab_size: int
    """V of its logits"""
    stop_ids: tuple[int, ...]
    limit: int
    """Most tokens of one input, start token included; 0 if none is stated"""


@dataclass(frozen=True)
class Models:
    """The two models of a run and their tokenizers."""

    teacher: Any
    """A module; None where nothing is distilled"""
    student: nn.Module
    tokenizers: TokenizerPair
    embedded: bool
    """Every model is one that ships with the package."""
    teacher_limit: int | None = None
    """Most tokens of one teacher input; None if the model states none"""
    offload: Offload | None = None
    """Of a teacher that is on the device only during its forwards"""

    @property
    def num_parameters(self) -> int:
        """Of both models."""
        modules = [self.student] if self.teacher is None else [self.student, self.teacher]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def with_student(self, student: nn.Module) -> Models:
        """The same with another student."""
        return dataclasses.replace(self, student=student.to(next(self.student.parameters()).device))

    def block_limits(self, block_size: int) -> tuple[int, int]:
        """Most tokens in a block for the student and for the teacher, start token included.

        Raises: UsageError if the student's context is shorter than `block_size`
        """
        context = _context_length_of(self.student)
        if context and context < block_size:
            raise UsageError(f"--block_size {block_size}: the student takes {context} tokens at most; lower it")
        return block_size, self.teacher_limit or 8 * block_size


def load_models(
    config: Config, precision: Precision, cached: TeacherInfo | None = None, loaded: LoadedModels = NO_LOADED_MODELS
) -> Models:
    """Load `--teacher_model`, `--student_model` and their tokenizers, except for those in `loaded`.

    cached: of a teacher whose logits are cached; then only its tokenizer is loaded
    Raises: UsageError naming the option, where a model or tokenizer is missing or cannot be used
    """
    silence_transformers()
    names, quantization = config.models, config.memory.teacher_quantization
    student = _load_checked_model("student_model", names, torch.float32, loaded)
    if quantization != "off" and loaded.model("teacher_model") is not None:
        raise UsageError(
            f"--teacher_quantization {quantization}: the teacher is in memory already; leave the option out"
        )
    options = quantization_options(quantization, precision)
    teacher = None if cached else _load_checked_model("teacher_model", names, precision.dtype, loaded, **options)
    info = cached or _teacher_info(teacher)
    tokenizers = _load_tokenizers(
        names,
        {"student_model": vocab_size_of(student), "teacher_model": info.vocab_size},
        loaded,
        aligns=config.loss.alignment != "auto",
        projects=config.loss.alignment in ("auto", "projection") and config.loss.alpha_kd > 0,
        stop_ids=(_stop_ids_of(student), info.stop_ids),
    )
    offload = None
    if teacher is not None:
        teacher.requires_grad_(False).eval().to(precision.device)
        if config.memory.offloads_from(precision.device):
            offload = Offload(teacher, backbone_of(teacher), precision.device)
    student.train()
    if config.memory.gradient_checkpointing:
        recompute_activations_(student, same_dropout=True)
    if config.train.parallel != "fsdp":  # that student may exceed one device: `build_strategy` moves it, shard by shard
        student.to(precision.device)
    is_embedded = names.teacher_model == names.student_model == EMBEDDED
    return Models(teacher, student, tokenizers, is_embedded, info.limit or None, offload)


def load_teacher(names: Any, precision: Precision) -> tuple[nn.Module, Any, TeacherInfo]:
    """Load `--teacher_model`, frozen, and its tokenizer, without a student.

    Raises: UsageError as `load_models`
    """
    silence_transformers()
    teacher = _load_checked_model("teacher_model", names, precision.dtype)
    info = _teacher_info(teacher)
    tokenizer = _load_checked_tokenizer("teacher_model", names, info.vocab_size)
    return teacher.requires_grad_(False).eval().to(precision.device), tokenizer, info


def load_student(names: Any, dtype: torch.dtype, precision: Precision) -> Models:
    """Load `--student_model` and no teacher; its tokenizer stands for both of the pair.

    names: `student_model` and `trust_remote_code`; dtype: of the weights; float32 for weights that are trained
    Raises: UsageError as `load_models`
    """
    silence_transformers()
    student = _load_checked_model("student_model", names, dtype)
    tokenizer = _load_checked_tokenizer("student_model", names, vocab_size_of(student))
    stop_ids = _stop_ids_of(student)
    pair = _pair_tokenizers(
        names, [tokenizer] * 2, [vocab_size_of(student)] * 2, projects=False, stop_ids=(stop_ids, stop_ids)
    )
    return Models(None, student.train().to(precision.device), pair, names.student_model == EMBEDDED)


def load_tokenizers(names: Any, aligns: bool = True) -> TokenizerPair:
    """Load the tokenizers alone and no weights; `aligns`: with tables of token bytes even if they are equal.

    names: `teacher_model`, `student_model` and `trust_remote_code`
    Raises: UsageError as `load_models`
    """
    silence_transformers()
    roles = ("student_model", "teacher_model")
    return _load_tokenizers(names, {role: _configured_vocab_size(role, names) for role in roles}, aligns=aligns)


def load_for_generation(option: str, name: str, trust_remote_code: bool, dtype: torch.dtype = torch.float32):
    """A model in eval mode, and its tokenizer.

    Raises: UsageError as `load_models`
    """
    silence_transformers()
    return _load_model(option, name, dtype, trust_remote_code).eval(), _load_tokenizer(option, name, trust_remote_code)


class MetaModels:
    """The settings of a run and its models on the meta device, for checks that need shapes and no weights."""

    def __init__(self, config: RunConfig, loaded: LoadedModels = NO_LOADED_MODELS):
        self.config, self.loaded = config, loaded
        self.roles = [role for role in ("teacher", "student") if hasattr(config.models, f"{role}_model")]

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """'teacher', if there is one, and 'student'; built on first use, or the model itself where it is in memory."""
        names, found = self.config.models, {}
        for role in self.roles:
            option = f"{role}_model"
            model = self.loaded.model(option)
            found[role] = model or load_meta_model(option, getattr(names, option), names.trust_remote_code)
        return found


def load_meta_model(option: str, name: str, trust_remote_code: bool) -> nn.Module:
    """The model without its weights, on the meta device: names and shapes as `load_models` gives, whatever its size.

    Raises: UsageError as `load_models`
    """
    silence_transformers()
    config = _load_config(option, name, trust_remote_code)

    def build() -> nn.Module:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    return _with_usage_errors(option, name, build)


def silence_transformers() -> None:
    """Switch off transformers' progress bars and warnings."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry of an absent network


def vocab_size_of(model: Any) -> int:
    """V of the logits, the rows of the LM head's weight; may exceed the tokenizer's size."""
    return model.get_output_embeddings().weight.shape[0]


def _context_length_of(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _stop_ids_of(model: Any) -> tuple[int, ...]:
    """The end-of-text ids that the generation config adds to the tokenizer's own."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(ids) if isinstance(ids, list) else (() if ids is None else (ids,))


def _teacher_info(teacher: Any) -> TeacherInfo:
    return TeacherInfo(vocab_size_of(teacher), _stop_ids_of(teacher), _context_length_of(teacher) or 0)


def _load_checked_model(
    option: str, names: ModelConfig, dtype: torch.dtype, loaded: LoadedModels = NO_LOADED_MODELS, **options
) -> nn.Module:
    """The model of an option, checked: it has an LM head, and every weight is finite in `dtype`.

    options: further arguments of `from_pretrained`
    """
    name, model = getattr(names, option), loaded.model(option)
    model = _load_model(option, name, dtype, names.trust_remote_code, **options) if model is None else model.to(dtype)
    if model.get_output_embeddings() is None:
        raise UsageError(
            f"--{option} {name}: {type(model).__name__} has no language-model head; use a causal language model"
        )
    for weight, values in model.named_parameters():
        if not values.isfinite().all():
            remedy = f"float32 might hold what {dtype} cannot (--model_dtype float32), or the file is damaged"
            raise UsageError(f"--{option} {name}: its weight {weight} is not finite; {remedy}")
    return model


def _load_model(option: str, name: str, dtype: torch.dtype, trust_remote_code: bool, **options) -> Any:
    location = _location(option, name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    options |= {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    model, info = _with_usage_errors(option, name, lambda: load(location, **options))
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(f"--{option} {name}: {len(missing)} weights are not in its files, {missing[0]} among them")
    return model


def _load_tokenizers(
    names: ModelConfig, vocab_sizes: Mapping[str, int], loaded: LoadedModels = NO_LOADED_MODELS, **options
) -> TokenizerPair:
    """vocab_sizes: of the models, by option, student first; options: further arguments of `TokenizerPair`"""
    tokenizers = [_load_checked_tokenizer(option, names, size, loaded) for option, size in vocab_sizes.items()]
    return _pair_tokenizers(names, tokenizers, list(vocab_sizes.values()), **options)


def _pair_tokenizers(names: ModelConfig, tokenizers: list, vocab_sizes: list[int], **options) -> TokenizerPair:
    """tokenizers, vocab_sizes: the student's, the teacher's"""
    student_vocab_size, teacher_vocab_size = vocab_sizes
    try:
        return TokenizerPair(
            *tokenizers, student_vocab_size=student_vocab_size, teacher_vocab_size=teacher_vocab_size, **options
        )
    except UnfitTokenizer as error:
        option = f"{error.whose}_model"
        raise UsageError(
            f"--{option} {getattr(names, option)}: its tokenizer {error.reason}; use another model"
        ) from None


def _load_checked_tokenizer(option: str, names: ModelConfig, vocab_size: int, loaded: LoadedModels = NO_LOADED_MODELS):
    """The tokenizer of an option, checked: it encodes plain text, and the model has a logit for every id."""
    name, pair = getattr(names, option), loaded.pairs.get(option)
    tokenizer = _load_tokenizer(option, name, names.trust_remote_code) if pair is None else pair[1]
    try:
        encode(tokenizer, ["a"])
    except (AttributeError, NotImplementedError, TypeError):
        kind = type(tokenizer).__name__
        raise UsageError(
            f"--{option} {name}: its {kind} cannot encode plain text; save it as a fast tokenizer"
        ) from None
    if len(tokenizer) > vocab_size:
        raise UsageError(f"--{option} {name}: the tokenizer has {len(tokenizer)} ids, the model only {vocab_size}")
    return tokenizer


def _load_tokenizer(option: str, name: str, trust_remote_code: bool):
    location = _location(option, name)
    load = transformers.AutoTokenizer.from_pretrained
    return _with_usage_errors(option, name, lambda: load(location, trust_remote_code=trust_remote_code))


def _configured_vocab_size(option: str, names: ModelConfig) -> int:
    return _load_config(option, getattr(names, option), names.trust_remote_code).get_text_config().vocab_size


def _load_config(option: str, name: str, trust_remote_code: bool):
    location = _location(option, name)
    load = transformers.AutoConfig.from_pretrained
    return _with_usage_errors(option, name, lambda: load(location, trust_remote_code=trust_remote_code))


def _location(option: str, name: str) -> str:
    if name == EMBEDDED:
        if not _EMBEDDED_DIRS[option].is_dir():
            raise UsageError(
                f"--{option} {EMBEDDED}: not in this installation; make it with `python -m sar_kd embedded`"
            )
        return str(_EMBEDDED_DIRS[option])
    if name.startswith(IN_MEMORY):
        raise UsageError(f"--{option} {name}: was handed over in Python; continue there, with the same model")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"--{option} {name}: no such directory")
    return os.path.expanduser(name)


def _with_usage_errors(option: str, name: str, load):
    """What `load` returns, with the errors of disk, hub and unknown formats as one line."""
    try:
        return load()
    except _LOADING_ERRORS as error:
        raise UsageError(f"--{option} {name}: cannot be loaded ({explain_hub_error(error, name)})") from None

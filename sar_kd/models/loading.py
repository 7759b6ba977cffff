"""Load teacher, student and tokenizers: from the package, a directory, a GGUF file, the hub, or handed over in memory.

The student is trainable in float32, the teacher frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from sar_kd.config.fields import RunConfig
from sar_kd.config.placement import TeacherPlacementConfig
from sar_kd.config.runs import Config, SftConfig
from sar_kd.config.sections import EMBEDDED, SELF, ModelConfig
from sar_kd.errors import UsageError
from sar_kd.models.half_precision import compute_in_range_
from sar_kd.models.lm_head import backbone_of
from sar_kd.models.lora import add_adapter, describe_trainable
from sar_kd.models.memory_saving import Offload, prepare_quantized_, quantization_options, recompute_activations_
from sar_kd.models.model_checks import (
    context_length_of,
    learn_pad_row_,
    require_causal,
    require_context,
    require_finite,
    require_lm_head,
    require_trainable,
    stop_ids_of,
    vocab_size_of,
)
from sar_kd.models.model_files import find_model, no_tokenizer, require_weights
from sar_kd.models.own_base import WithoutAdapter
from sar_kd.models.placement import device_of_teacher, load_outside_modes_, spreading_options
from sar_kd.models.pretrained import (
    build_meta_model,
    load_config,
    load_model,
    load_tokenizer,
    silence_transformers,
)
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.backends import EncodingFailure, encode
from sar_kd.tokenization.token_table import check_vocab_size
from sar_kd.tokenization.tokenizer_pair import TokenizerPair, UnfitTokenizer


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
    notes: tuple[str, ...] = ()
    """Lines about what was left out of the models' files"""

    def block_limits(self, block_size: int) -> tuple[int, int]:
        """Most tokens in a block for the student and for the teacher, start token included.

        Raises: UsageError if the student's context is shorter than `block_size`
        """
        require_context(self.student, block_size)
        return block_size, self.teacher_limit or 8 * block_size


def load_models(
    config: Config, precision: Precision, cached: TeacherInfo | None = None, loaded: LoadedModels = NO_LOADED_MODELS
) -> Models:
    """Load `--teacher_model`, `--student_model` and their tokenizers, except for those in `loaded`.

    cached: of a teacher whose logits are cached; then only its tokenizer is loaded
    Raises: UsageError naming the option, where a model or tokenizer is missing or cannot be used
    """
    names, quantization, notes = config.models, config.memory.teacher_quantization, list[str]()
    student = _load_student_model(config, precision, loaded, notes)
    if quantization != "off" and loaded.model("teacher_model") is not None:
        raise UsageError(
            f"--teacher_quantization {quantization}: the teacher is in memory already; leave the option out"
        )
    teacher: Any = None
    if cached is None and names.teacher_model != SELF:
        teacher = _load_placed_teacher(names, config.memory, precision, loaded, notes, quantization, has_student=True)
    info = cached or _teacher_info(names, student if teacher is None else teacher)
    tokenizers = _load_tokenizers(
        names,
        {"student_model": vocab_size_of(student), "teacher_model": info.vocab_size},
        loaded,
        aligns=config.loss.alignment != "auto",
        projects=config.loss.alignment in ("auto", "projection") and config.loss.alpha_kd > 0,
        stop_ids=(stop_ids_of(f"--student_model {names.student_model}", student), info.stop_ids),
        template_date=config.data.template_date,
    )
    offload = None
    if teacher is not None and config.memory.offloads_from(precision.device):
        offload = Offload(teacher, backbone_of(teacher), precision.device)
    if config.train.parallel != "fsdp":  # that student may exceed one device: `build_strategy` moves it, shard by shard
        student.to(precision.device)
    student, more_notes = _make_trainable(student, config, tokenizers, precision)
    notes += more_notes
    if names.teacher_model == SELF:
        teacher = WithoutAdapter(student)
    is_embedded = names.student_model == EMBEDDED and names.teacher_model in (EMBEDDED, SELF)
    return Models(teacher, student, tokenizers, is_embedded, info.limit or None, offload, tuple(notes))


def load_teacher(
    names: Any, precision: Precision, memory: TeacherPlacementConfig | None = None, notes: list[str] | None = None
) -> tuple[nn.Module, Any, TeacherInfo]:
    """Load `--teacher_model`, frozen, and its tokenizer, without a student.

    memory: where the teacher is to be; notes: gets lines about it
    Raises: UsageError as `load_models`
    """
    teacher = _load_placed_teacher(names, memory or TeacherPlacementConfig(), precision, notes=notes)
    info = _teacher_info(names, teacher)
    tokenizer = _load_checked_tokenizer("teacher_model", names, info.vocab_size)
    return teacher, tokenizer, info


def _load_placed_teacher(
    names: Any,
    memory: TeacherPlacementConfig,
    precision: Precision,
    loaded: LoadedModels = NO_LOADED_MODELS,
    notes: list[str] | None = None,
    quantization: str = "off",
    has_student: bool = False,
) -> nn.Module:
    """The teacher, frozen and checked, on its device or spread over several.

    has_student: as `spread_over_devices`; the other arguments as `_load_checked_model`
    """
    device = device_of_teacher(memory, precision.device)
    options, notes = quantization_options(quantization, precision.on(device)), [] if notes is None else notes
    if memory.teacher_device_map:
        if loaded.model("teacher_model") is not None:
            raise UsageError(f"{memory.placement()}: the teacher is in memory already; leave the option out")
        meta = load_meta_model("teacher_model", names.teacher_model, names.trust_remote_code)
        options = spreading_options(meta, memory, precision, has_student, notes)
    teacher: Any = _load_checked_model("teacher_model", names, precision.dtype, precision, loaded, notes, **options)
    teacher.requires_grad_(False).eval()
    load_outside_modes_(teacher) if memory.teacher_device_map else teacher.to(device)
    require_causal(f"--teacher_model {names.teacher_model}", teacher, precision)
    return teacher


def load_student(config: Config | SftConfig, precision: Precision, loaded: LoadedModels = NO_LOADED_MODELS) -> Models:
    """Load `--student_model` and no teacher; its tokenizer stands for both of the pair.

    Raises: UsageError as `load_models`
    """
    names: Any = config.models
    title, notes = f"--student_model {names.student_model}", list[str]()
    student = _load_student_model(config, precision, loaded, notes)
    tokenizer = _load_checked_tokenizer("student_model", names, vocab_size_of(student), loaded)
    stop_ids = stop_ids_of(title, student)
    how: dict[str, Any] = {"projects": False, "stop_ids": (stop_ids, stop_ids)}
    how["template_date"] = config.data.template_date
    pair = _pair_tokenizers(names, [tokenizer] * 2, [vocab_size_of(student)] * 2, **how)
    if config.train.parallel != "fsdp":  # as in `load_models`
        student.to(precision.device)
    student, more_notes = _make_trainable(student, config, pair, precision)
    return Models(None, student, pair, names.student_model == EMBEDDED, notes=(*notes, *more_notes))


def _load_student_model(
    config: Config | SftConfig, precision: Precision, loaded: LoadedModels, notes: list[str]
) -> nn.Module:
    """The student, checked: trained weights are float32, those behind an adapter are as they compute, or in 4 bits."""
    lora, names = config.lora, cast(ModelConfig, config.models)
    dtype = precision.dtype if lora.lora_rank else torch.float32
    if not lora.is_quantized:
        return _load_checked_model("student_model", names, dtype, precision, loaded, notes)
    if loaded.model("student_model") is not None:
        raise UsageError(
            f"--lora_quantization {lora.lora_quantization}: the student is in memory already; leave the option out"
        )
    options = quantization_options(lora.lora_quantization, precision, "lora_quantization")
    return _load_checked_model("student_model", names, dtype, precision, loaded, notes, **options)


def _make_trainable(
    student: nn.Module, config: Config | SftConfig, tokenizers: TokenizerPair, precision: Precision
) -> tuple[nn.Module, list[str]]:
    """The student, checked, as it is trained: in training mode, with its adapter; and lines about it."""
    title = f"--student_model {config.models.student_model}"
    require_causal(title, student, precision)
    special_ids = tokenizers.student_start, tokenizers.student_end
    notes = learn_pad_row_(title, student, special_ids, precision)
    student.train()
    if config.memory.gradient_checkpointing:
        recompute_activations_(student, same_dropout=True)
    student = add_adapter(student, config.lora)
    require_trainable(title, student)
    return student, [*notes, describe_trainable(student)]


def load_tokenizers(
    names: Any, aligns: bool = True, loaded: LoadedModels = NO_LOADED_MODELS, template_date: str = ""
) -> TokenizerPair:
    """Load the tokenizers alone and no weights; `aligns`: with tables of token bytes even if they are equal.

    names: `teacher_model`, `student_model` and `trust_remote_code`; template_date: as of `TokenizerPair`
    Raises: UsageError as `load_models`
    """
    models = {role: loaded.model(_source(role, names)) for role in ("student_model", "teacher_model")}
    sizes = {
        role: vocab_size_of(model) if model is not None else _configured_vocab_size(_source(role, names), names)
        for role, model in models.items()
    }
    return _load_tokenizers(names, sizes, loaded, aligns=aligns, template_date=template_date)


def _source(option: str, names: Any) -> str:
    """The option whose model this one's is, which is another one where the student is its own teacher."""
    return "student_model" if getattr(names, option) == SELF else option


def load_for_generation(
    option: str, name: str, trust_remote_code: bool, dtype: torch.dtype = torch.float32, title: str = ""
) -> tuple[Any, Any]:
    """A model in eval mode, and its tokenizer.

    title: what an error begins with, where that is not the option
    Raises: UsageError as `load_models`
    """
    files = find_model(option, name, title)
    model, _ = load_model(files, dtype, trust_remote_code)
    if dtype is torch.float16:
        compute_in_range_(model)
    return model.eval(), load_tokenizer(files, trust_remote_code, vocab_size_of(model))


def load_tokenizer_of(option: str, name: str, trust_remote_code: bool, model: Any) -> Any:
    """The tokenizer of a loaded model, checked. Raises: UsageError as `load_models`"""
    names = SimpleNamespace(**{option: name}, trust_remote_code=trust_remote_code)
    return _load_checked_tokenizer(option, names, vocab_size_of(model))


class MetaModels:
    """The settings of a run and its models on the meta device, for checks that need shapes and no weights."""

    def __init__(self, config: RunConfig, loaded: LoadedModels = NO_LOADED_MODELS):
        self.config, self.loaded = config, loaded
        self.conversions: dict[str, str] = {}
        """By role, what is made of the files before the model is used; of models from such files only"""
        named = {role: getattr(config.models, f"{role}_model", SELF) for role in ("teacher", "student")}
        self.roles = [role for role, name in named.items() if name != SELF]

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """'teacher', if there is one, and 'student'; built on first use, or the model itself where it is in memory."""
        names, found = self.config.models, {}
        for role in self.roles:
            option = f"{role}_model"
            model = self.loaded.model(option)
            name = getattr(names, option)
            if model is None:
                files = find_model(option, name)
                model = build_meta_model(files, names.trust_remote_code)
                self.conversions |= {role: files.conversion} if files.conversion else {}
                if role == "student" or not getattr(names, "teacher_cache", ""):
                    require_weights(files)
            require_lm_head(f"--{option} {name}", model)
            found[role] = model
        return found


def load_meta_model(option: str, name: str, trust_remote_code: bool) -> nn.Module:
    """The model of an option without its weights, on the meta device. Raises: UsageError as `build_meta_model`"""
    return build_meta_model(find_model(option, name), trust_remote_code)


def _teacher_info(names: ModelConfig, teacher: Any) -> TeacherInfo:
    stop_ids = stop_ids_of(f"--teacher_model {names.teacher_model}", teacher)
    return TeacherInfo(vocab_size_of(teacher), stop_ids, context_length_of(teacher) or 0)


def _load_checked_model(
    option: str,
    names: ModelConfig,
    dtype: torch.dtype,
    precision: Precision,
    loaded: LoadedModels = NO_LOADED_MODELS,
    notes: list[str] | None = None,
    **options: Any,
) -> nn.Module:
    """The model of an option, checked: it has an LM head, and every weight is finite in `dtype`; and ready for float16.

    notes: gets a line about tensors in its files that it has not; options: further arguments of `from_pretrained`
    """
    name, model, unused = getattr(names, option), loaded.model(option), list[str]()
    title = f"--{option} {name}"
    if model is None:
        model, unused = load_model(find_model(option, name), dtype, names.trust_remote_code, **options)
    else:
        silence_transformers()
        model = model.to(dtype)
    prepare_quantized_(title, model)
    require_lm_head(title, model)
    require_finite(title, model, dtype)
    if precision.dtype is torch.float16:
        compute_in_range_(model)
    if unused and notes is not None:
        notes.append(f"{title}: {len(unused)} tensors in its files are no part of the model, {unused[0]} among them")
    return model


def _load_tokenizers(
    names: ModelConfig, vocab_sizes: Mapping[str, int], loaded: LoadedModels = NO_LOADED_MODELS, **options
) -> TokenizerPair:
    """vocab_sizes: of the models, by option, student first; options: further arguments of `TokenizerPair`"""
    sizes = vocab_sizes.items()
    tokenizers = [_load_checked_tokenizer(_source(option, names), names, size, loaded) for option, size in sizes]
    return _pair_tokenizers(names, tokenizers, list(vocab_sizes.values()), **options)


def _pair_tokenizers(names: ModelConfig, tokenizers: list, vocab_sizes: list[int], **options) -> TokenizerPair:
    """tokenizers, vocab_sizes: the student's, the teacher's"""
    student_vocab_size, teacher_vocab_size = vocab_sizes
    try:
        return TokenizerPair(
            *tokenizers, student_vocab_size=student_vocab_size, teacher_vocab_size=teacher_vocab_size, **options
        )
    except EncodingFailure as error:
        title = f"--student_model {names.student_model}, or the teacher"
        raise UsageError(f"{title}: its tokenizer {error.reason}") from None
    except UnfitTokenizer as error:
        option = f"{error.whose}_model"
        raise UsageError(
            f"--{option} {getattr(names, option)}: its tokenizer {error.reason}; use another model"
        ) from None


def _load_checked_tokenizer(option: str, names: Any, vocab_size: int, loaded: LoadedModels = NO_LOADED_MODELS):
    """The tokenizer of an option, checked: it encodes plain text, and the model has a logit for every id."""
    name, pair = getattr(names, option), loaded.pairs.get(option)
    if pair is None:
        tokenizer = load_tokenizer(find_model(option, name), names.trust_remote_code, vocab_size)
    else:
        tokenizer = pair[1]
    try:
        (ids,) = encode(tokenizer, ["a"])
    except EncodingFailure as error:
        raise UsageError(f"--{option} {name}: its tokenizer {error.reason}") from None
    except (AttributeError, NotImplementedError, TypeError):
        kind = type(tokenizer).__name__
        raise UsageError(
            f"--{option} {name}: its {kind} cannot encode plain text; save it as a fast tokenizer"
        ) from None
    if not len(ids):  # what transformers makes of some configs without a vocabulary beside them
        raise no_tokenizer(f"--{option} {name}")
    try:
        check_vocab_size(tokenizer, vocab_size)
    except ValueError as error:
        raise UsageError(f"--{option} {name}: its tokenizer {error}") from None
    return tokenizer


def _configured_vocab_size(option: str, names: ModelConfig) -> int:
    files = find_model(option, getattr(names, option))
    return load_config(files, names.trust_remote_code).get_text_config().vocab_size

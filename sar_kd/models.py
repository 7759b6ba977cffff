"""Load the teacher, the student and their tokenizers: the student trainable in float32, the teacher frozen.

The only module that reads checkpoints through transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sar_kd import embedded
from sar_kd.alignment import TokenizerPair, UnfitTokenizer
from sar_kd.config import EMBEDDED, Config, ModelConfig, UsageError
from sar_kd.precision import Precision
from sar_kd.tokens import encode

_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError, EOFError,
    pickle.UnpicklingError, safetensors.SafetensorError,
)  # fmt: skip
_EMBEDDED_DIRS = {
    "teacher_model": embedded.TEACHER_DIR,
    "student_model": embedded.STUDENT_DIR,
    "model": embedded.TEACHER_DIR,
}


@dataclass(frozen=True)
class Models:
    """The two models of a run and what connects their tokenizers."""

    teacher: nn.Module | None
    """None where nothing is distilled"""
    student: nn.Module
    tokenizers: TokenizerPair
    embedded: bool
    """Every model is one that is shipped with the package."""

    def with_student(self, student: nn.Module) -> Models:
        """The same with another student."""
        return dataclasses.replace(self, student=student.to(next(self.student.parameters()).device))

    def block_limits(self, block_size: int) -> tuple[int, int]:
        """Most tokens in a block for the student and for the teacher, start token included.

        Raises: UsageError if the student's context is shorter than `block_size`
        """
        student, teacher = (None if model is None else _context(model) for model in (self.student, self.teacher))
        if student is not None and student < block_size:
            raise UsageError(f"--block_size {block_size}: the student takes {student} tokens at most; lower it")
        return block_size, teacher or 8 * block_size


def load_models(config: Config, precision: Precision) -> Models:
    """Load what `--teacher_model` and `--student_model` name.

    Raises: UsageError naming the flag, where a model or tokenizer is missing or cannot be used
    """
    _quiet()
    names = config.models
    student = _load_model("student_model", names.student_model, torch.float32, names.trust_remote_code)
    teacher = _load_model("teacher_model", names.teacher_model, precision.dtype, names.trust_remote_code)
    rows = {"student_model": num_rows(student), "teacher_model": num_rows(teacher)}
    stops = tuple(_stop_ids(model) for model in (student, teacher))
    tokenizers = _pair_tokenizers(
        names,
        rows,
        aligns=config.loss.alignment != "auto",
        projects=config.loss.alignment in ("auto", "projection") and config.loss.alpha_kd > 0,
        tolerant=config.loss.alignment == "uld",
        stop_ids=stops,
    )
    teacher.requires_grad_(False).eval().to(precision.device)
    student.train().to(precision.device)
    both = (names.teacher_model, names.student_model)
    return Models(teacher, student, tokenizers, both == (EMBEDDED, EMBEDDED))


def load_student(names, dtype: torch.dtype, precision: Precision) -> Models:
    """Load what `--student_model` names, and no teacher: the student stands on both sides of the tokenizers.

    names: `student_model` and `trust_remote_code`; dtype: of the weights; float32 for weights that are to learn
    Raises: UsageError as `load_models`
    """
    _quiet()
    name = names.student_model
    student = _load_model("student_model", name, dtype, names.trust_remote_code)
    rows = num_rows(student)
    tokenizer = _load_tokenizer("student_model", name, rows, names.trust_remote_code)
    both = {"student_model": tokenizer, "teacher_model": tokenizer}
    pair = _pair(names, both, dict.fromkeys(both, rows), projects=False)
    return Models(None, student.train().to(precision.device), pair, name == EMBEDDED)


def load_saved(folder: Path, trust_remote_code: bool, precision: Precision) -> nn.Module:
    """A student that a run has saved, as its users will load it.

    Raises: UsageError if it cannot be loaded
    """
    student = _load_model("output_dir", str(folder), torch.float32, trust_remote_code)
    return student.requires_grad_(False).eval().to(precision.device)


def load_tokenizers(config: Config) -> TokenizerPair:
    """The tokenizers alone, with tables of bytes even if they are equal; no weights are read.

    Raises: UsageError as `load_models`
    """
    _quiet()
    names, rows = config.models, {}
    for flag in ("student_model", "teacher_model"):
        name, location = getattr(names, flag), _location(flag, getattr(names, flag))
        load = functools.partial(transformers.AutoConfig.from_pretrained, location)
        found = _read(flag, name, functools.partial(load, trust_remote_code=names.trust_remote_code))
        rows[flag] = found.get_text_config().vocab_size
    return _pair_tokenizers(names, rows, aligns=True)


def load_skeleton(flag: str, name: str, trust_remote_code: bool) -> nn.Module:
    """The model without its weights, on the meta device: names and shapes as in `load_models`, whatever its size.

    Raises: UsageError as `load_models`
    """
    _quiet()
    location = _location(flag, name)
    build = transformers.AutoModelForCausalLM.from_config

    def load() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return build(config, trust_remote_code=trust_remote_code)

    return _read(flag, name, load)


def recompute_activations_(model: nn.Module, same_dropout: bool = False) -> int:
    """Let each layer of `model` compute its activations anew in backward instead of keeping them; how many do.

    Around the layers' own `forward`, so that nothing has to be in training mode: transformers' own switch does nothing
    in eval mode, and in training mode dropout and the routers' noise would come with it.
    same_dropout: draw again what the forward drew, for a model in training mode
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward, same_dropout)
    return len(layers)


def _recomputed(forward, same_dropout: bool, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=same_dropout, **kwargs)


def _stop_ids(model: nn.Module) -> tuple[int, ...]:
    """What the generation config names beside the tokenizer's own end of text."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(ids) if isinstance(ids, list) else (() if ids is None else (ids,))


def _pair_tokenizers(names: ModelConfig, rows: dict[str, int], **how) -> TokenizerPair:
    """`how`: as `TokenizerPair`"""
    loaded = {flag: _load_tokenizer(flag, getattr(names, flag), rows[flag], names.trust_remote_code) for flag in rows}
    return _pair(names, loaded, rows, **how)


def _pair(names, loaded: dict, rows: dict[str, int], **how) -> TokenizerPair:
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


def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry of an absent network


def num_rows(model: nn.Module) -> int:
    """Rows of the head: V of the logits, which may exceed the tokenizer's size."""
    return model.get_output_embeddings().weight.shape[0]


def _context(model: nn.Module) -> int | None:
    """The longest input that the model takes; None if it states none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _location(flag: str, name: str) -> str:
    if name == EMBEDDED:
        if not _EMBEDDED_DIRS[flag].is_dir():
            raise UsageError(f"--{flag} {EMBEDDED}: not in this installation; make it with `python -m sar_kd embedded`")
        return str(_EMBEDDED_DIRS[flag])
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"--{flag} {name}: no such directory")
    return os.path.expanduser(name)


def _load_model(flag: str, name: str, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    location = _location(flag, name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    how = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    model, info = _read(flag, name, lambda: load(location, **how))
    if model.get_output_embeddings() is None:
        raise UsageError(
            f"--{flag} {name}: {type(model).__name__} has no language-model head; use a causal language model"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(f"--{flag} {name}: {len(missing)} weights are not in its files, {missing[0]} among them")
    for weight, values in model.named_parameters():
        if not values.isfinite().all():
            remedy = f"float32 might hold what {dtype} cannot (--model_dtype float32), or the file is damaged"
            raise UsageError(f"--{flag} {name}: its weight {weight} is not finite; {remedy}")
    return model


def _load_tokenizer(flag: str, name: str, rows: int, trust_remote_code: bool):
    location = _location(flag, name)
    load = transformers.AutoTokenizer.from_pretrained
    tokenizer = _read(flag, name, lambda: load(location, trust_remote_code=trust_remote_code))
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--{flag} {name}: cannot be loaded ({reason})") from None

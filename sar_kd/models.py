"""Load the teacher, the student and their tokenizers: the student trainable in float32, the teacher frozen.

The only module that reads checkpoints through transformers.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from sar_kd import embedded
from sar_kd.alignment import TokenizerPair, UnfitTokenizer
from sar_kd.config import EMBEDDED, Config, UsageError
from sar_kd.precision import Precision

_EMBEDDED_DIRS = {"teacher_model": embedded.TEACHER_DIR, "student_model": embedded.STUDENT_DIR}


@dataclass(frozen=True)
class Models:
    """The two models of a run and what connects their tokenizers."""

    teacher: nn.Module
    student: nn.Module
    tokenizers: TokenizerPair
    embedded: bool
    """Both models are the ones shipped with the package."""

    def block_limits(self, block_size: int) -> tuple[int, int]:
        """Most tokens in a block for the student and for the teacher, start token included.

        Raises: UsageError if the student's context is shorter than `block_size`
        """
        student, teacher = _context(self.student), _context(self.teacher)
        if student is not None and student < block_size:
            raise UsageError(f"--block_size {block_size}: the student takes {student} tokens at most; lower it")
        return block_size, teacher or 8 * block_size


def load_models(config: Config, precision: Precision) -> Models:
    """Load what `--teacher_model` and `--student_model` name.

    Raises: UsageError naming the flag, where a model or tokenizer is missing or cannot be used
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry of an absent network
    names = config.models
    student = _load_model("student_model", names.student_model, torch.float32, names.trust_remote_code)
    teacher = _load_model("teacher_model", names.teacher_model, precision.dtype, names.trust_remote_code)
    student_tokenizer = _load_tokenizer("student_model", names.student_model, student, names.trust_remote_code)
    teacher_tokenizer = _load_tokenizer("teacher_model", names.teacher_model, teacher, names.trust_remote_code)
    try:
        tokenizers = TokenizerPair(
            student_tokenizer,
            teacher_tokenizer,
            student_rows=num_rows(student),
            teacher_rows=num_rows(teacher),
            projects=config.loss.alignment == "projection",
        )
    except UnfitTokenizer as error:
        flag = f"{error.whose}_model"
        raise UsageError(f"--{flag} {getattr(names, flag)}: its tokenizer {error.reason}; use another model") from None
    teacher.requires_grad_(False).eval().to(precision.device)
    student.train().to(precision.device)
    both = (names.teacher_model, names.student_model)
    return Models(teacher, student, tokenizers, both == (EMBEDDED, EMBEDDED))


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
    model = _read(flag, name, lambda: load(location, dtype=dtype, trust_remote_code=trust_remote_code))
    if model.get_output_embeddings() is None:
        raise UsageError(
            f"--{flag} {name}: {type(model).__name__} has no language-model head; use a causal language model"
        )
    return model


def _load_tokenizer(flag: str, name: str, model: nn.Module, trust_remote_code: bool):
    location = _location(flag, name)
    load = transformers.AutoTokenizer.from_pretrained
    tokenizer = _read(flag, name, lambda: load(location, trust_remote_code=trust_remote_code))
    if not tokenizer.is_fast:
        raise UsageError(f"--{flag} {name}: its tokenizer has no tokenizer.json; save it as a fast tokenizer first")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(f"--{flag} {name}: the tokenizer has {len(tokenizer)} ids, the model only {rows} embeddings")
    return tokenizer


def _read(flag: str, name: str, load):
    """What `load` reads, with the errors of disk, hub and unknown formats as one line."""
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--{flag} {name}: cannot be loaded ({reason})") from None

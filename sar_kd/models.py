"""Load the teacher, the student and their tokenizers: the student trainable in float32, the teacher frozen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sar_kd.alignment import TokenizerPair, UnfitTokenizer
from sar_kd.config import EMBEDDED, Config, ModelConfig, UsageError
from sar_kd.heads import body_of
from sar_kd.layers import recompute_activations_
from sar_kd.loading import (
    NOTHING_GIVEN,
    Given,
    context_of,
    model_of,
    num_rows,
    quiet,
    rows_named,
    stop_ids_of,
    tokenizer_of,
)
from sar_kd.offload import Offload
from sar_kd.precision import Precision
from sar_kd.quantised import quantised
from sar_kd.top import StoredTeacher


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
    config: Config, precision: Precision, stored: StoredTeacher | None = None, given: Given = NOTHING_GIVEN
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
    found = stored or StoredTeacher(num_rows(teacher), stop_ids_of(teacher), 0)
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
            offload = Offload(teacher, body_of(teacher), precision.device)
    student.train()
    if config.memory.gradient_checkpointing:
        recompute_activations_(student, same_dropout=True)
    if config.train.parallel != "fsdp":  # such a student may be larger than a device: `place` moves it, part by part
        student.to(precision.device)
    both = (names.teacher_model, names.student_model)
    return Models(teacher, student, tokenizers, both == (EMBEDDED, EMBEDDED), found.limit or None, offload)


def load_teacher(names: Any, precision: Precision) -> tuple[nn.Module, Any, StoredTeacher]:
    """What `--teacher_model` names, frozen, its tokenizer, and what is to be known of it; no student.

    Raises: UsageError as `load_models`
    """
    quiet()
    teacher = model_of("teacher_model", names, precision.dtype, NOTHING_GIVEN)
    tokenizer = tokenizer_of("teacher_model", names, num_rows(teacher), NOTHING_GIVEN)
    about = StoredTeacher(num_rows(teacher), stop_ids_of(teacher), context_of(teacher) or 0)
    return teacher.requires_grad_(False).eval().to(precision.device), tokenizer, about


def load_student(names: Any, dtype: torch.dtype, precision: Precision) -> Models:
    """Load what `--student_model` names, and no teacher: the student stands on both sides of the tokenizers.

    names: `student_model` and `trust_remote_code`; dtype: of the weights; float32 for weights that are to learn
    Raises: UsageError as `load_models`
    """
    quiet()
    student = model_of("student_model", names, dtype, NOTHING_GIVEN)
    rows = num_rows(student)
    tokenizer = tokenizer_of("student_model", names, rows, NOTHING_GIVEN)
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


def _pair_tokenizers(names: ModelConfig, rows: dict[str, int], given: Given = NOTHING_GIVEN, **how) -> TokenizerPair:
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

"""What a cache has to know of a teacher that runs in another program: its tokenizer, and what its config says."""

from __future__ import annotations

import contextlib
from typing import Any

import transformers

from sar_kd.models.loading import TeacherInfo, load_meta_model, load_tokenizer_of
from sar_kd.models.model_checks import context_length_of, stop_ids_of, vocab_size_of
from sar_kd.models.model_files import find_model


def load_teacher_tokenizer(name: str, trust_remote_code: bool) -> tuple[Any, TeacherInfo]:
    """The tokenizer of `--teacher_tokenizer` and the facts of its model, from a folder that may hold no weights.

    Raises: UsageError if the tokenizer, or config.json, is missing or cannot be used
    """
    option = "teacher_tokenizer"
    model: Any = load_meta_model(option, name, trust_remote_code)
    with contextlib.suppress(OSError):  # there is none, and the config says which tokens end a text
        model.generation_config = transformers.GenerationConfig.from_pretrained(find_model(option, name).location)
    tokenizer = load_tokenizer_of(option, name, trust_remote_code, model)
    stop_ids = stop_ids_of(f"--{option} {name}", model)
    return tokenizer, TeacherInfo(vocab_size_of(model), stop_ids, context_length_of(model) or 0)

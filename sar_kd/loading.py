"""One model or tokenizer as a flag names it: embedded, of a directory, of the hub, or given in memory.

The only module that reads checkpoints through transformers.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
import transformers
from torch import nn

from sar_kd import embedded
from sar_kd.config import EMBEDDED, ModelConfig, UsageError
from sar_kd.hub import reason_of
from sar_kd.tokens import encode

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
class Given:
    """Models that are in memory already, each with its tokenizer, by flag; they are not read from anywhere."""

    pairs: Mapping[str, tuple[nn.Module, Any]]

    def model(self, flag: str) -> Any:
        """The model that stands for this flag's; None if it is to be loaded."""
        return self.pairs[flag][0] if flag in self.pairs else None


NOTHING_GIVEN = Given(MappingProxyType({}))


def load_skeleton(flag: str, name: str, trust_remote_code: bool) -> nn.Module:
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


def model_of(flag: str, names: ModelConfig, dtype: torch.dtype, given: Given, **how) -> nn.Module:
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


def load_for_writing(flag: str, name: str, trust_remote_code: bool, dtype: torch.dtype = torch.float32):
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


def tokenizer_of(flag: str, names: ModelConfig, rows: int, given: Given):
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

"""Configs, models and tokenizers read through transformers, with every failure as one line that names the option.

The only module that reads checkpoints through transformers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import modeling_gguf_pytorch_utils
from transformers.quantizers.auto import AutoHfQuantizer

from sar_kd.errors import UsageError
from sar_kd.models.lora import merge_adapter, untie_config_
from sar_kd.models.model_files import (
    ModelFiles,
    check_files,
    check_num_tokens,
    check_shapes,
    require_tokenizer,
    require_weights,
    size_error,
)
from sar_kd.runtime.garbage import no_garbage_collection
from sar_kd.runtime.hub import explain_hub_error

_PLAIN_ERRORS = (OSError, ValueError, RuntimeError, ImportError)
"""Errors whose text says what is wrong; of others the kind is named too."""

_TOKENIZER = "its tokenizer"


def silence_transformers() -> None:
    """Switch off progress bars and warnings: transformers', the hub's of a network that is absent, accelerate's."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for library in ("huggingface_hub", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)


def load_config(files: ModelFiles, trust_remote_code: bool) -> Any:
    """The transformers config of a model, after the checks of `check_files`.

    Raises: UsageError if it is missing or cannot be used
    """
    silence_transformers()
    check_files(files)
    load = transformers.AutoConfig.from_pretrained
    part = files.gguf_file or "config.json"
    with _reading_gguf():
        config = _in_one_line(
            files, part, lambda: load(files.location, trust_remote_code=trust_remote_code, **files.arguments)
        )
    stated, is_known = getattr(config, "quantization_config", None), AutoHfQuantizer.supports_quant_method
    if stated is not None and not files.gguf_file and not _in_one_line(files, part, lambda: is_known(stated)):
        raise UsageError(
            f"{files.title}: is quantized by {stated['quant_method']!r} (quantization_config in config.json), which "
            "transformers cannot read here; use the model before quantization"
        )
    return config


def build_meta_model(files: ModelFiles, trust_remote_code: bool) -> nn.Module:
    """The model without its weights, on the meta device: names and shapes as `load_model` gives, whatever its size.

    Raises: UsageError if it cannot be built, or its tensors have other sizes than those of its weights file
    """
    config = load_config(files, trust_remote_code)

    def build() -> nn.Module:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    model = _in_one_line(files, files.gguf_file or "config.json", build)
    check_shapes(files, model)
    return model


def renew_config_(
    title: str, model: Any, change: Callable[[dict[str, Any]], dict[str, Any]], of_all_parts: bool = False
) -> None:
    """Give a model a config whose text part has other settings; change: makes them from those of `to_dict`.

    of_all_parts: change what stands beside the text part too
    Raises: UsageError, which begins with the title, if they are no config
    """
    config, text = model.config, model.config.get_text_config()
    settings = config.to_dict()
    if text is config:
        settings = change(settings)
    else:
        part = next(name for name, value in vars(config).items() if value is text)
        settings[part] = change(settings[part])
        settings = change(settings) if of_all_parts else settings
    new = _in_one_line(ModelFiles(title, ""), "config.json", lambda: type(config).from_dict(settings))
    new._attn_implementation = config._attn_implementation
    renewed = {id(config): new, id(text): new.get_text_config()}
    for module in model.modules():
        if id(getattr(module, "config", None)) in renewed:
            module.config = renewed[id(module.config)]


def rebuild_on_meta(title: str, model: Any) -> nn.Module:
    """A model of the same class from a model's config as it is saved, on the meta device. Raises: as `renew_config_`"""

    def build() -> nn.Module:
        with torch.device("meta"):
            return type(model)(type(model.config).from_dict(model.config.to_dict()))

    return _in_one_line(ModelFiles(title, ""), "config.json", build)


def load_model(
    files: ModelFiles, dtype: torch.dtype, trust_remote_code: bool, **options: Any
) -> tuple[nn.Module, list[str]]:
    """A causal language model, an adapter merged; and the names of tensors in its files that are no part of it.

    options: further arguments of `from_pretrained`
    Raises: UsageError if a weight is missing, or a file cannot be used
    """
    load_config(files, trust_remote_code)
    require_weights(files)
    if options and (files.gguf_file or files.adapter):
        what = "a GGUF file" if files.gguf_file else "an adapter"
        verb, option = ("quantized", "quantization") if "quantization_config" in options else ("spread", "device_map")
        owner = "lora" if files.title.startswith("--student_model") else "teacher"
        raise UsageError(f"{files.title}: {what} cannot be {verb}; leave out --{owner}_{option}")
    if files.gguf_file and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    options |= {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        **files.arguments,
    }
    load = transformers.AutoModelForCausalLM.from_pretrained
    with _reading_gguf():
        model, info = _in_one_line(files, "its weights", lambda: load(files.location, **options))
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise size_error(files, model.config, name, wanted, found)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(f"{files.title}: {len(missing)} weights are not in its files, {missing[0]} among them")
    if files.adapter:
        model = _in_one_line(files, "its adapter", lambda: merge_adapter(model, files.adapter))
    _state_ties_(model)
    return model, sorted(info["unexpected_keys"])


_load_gguf = modeling_gguf_pytorch_utils.load_gguf_checkpoint


@contextlib.contextmanager
def _reading_gguf() -> Iterator[None]:
    """With the metadata of a GGUF file parsed once in a process, and without a progress bar.

    transformers parses it for each config and each tokenizer, which takes seconds to half a minute with a large
    vocabulary, and its own switch leaves the bar on.
    """
    silent = functools.partial(modeling_gguf_pytorch_utils.tqdm, disable=True)
    with mock.patch.multiple(modeling_gguf_pytorch_utils, tqdm=silent, load_gguf_checkpoint=_load_gguf_once):
        yield


def _load_gguf_once(path: str, return_tensors: bool = False, **options: Any) -> dict[str, Any]:
    if return_tensors:
        return _load_gguf(path, return_tensors, **options)
    return copy.deepcopy(_gguf_metadata(path, os.stat(path).st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _gguf_metadata(path: str, modified: int) -> dict[str, Any]:
    """modified: when the file was; another time is another file"""
    return _load_gguf(path)


def _state_ties_(model: Any) -> None:
    """Let the config of a model whose file has an LM head of its own say so, or a saved student would lose it."""
    ends = model.get_output_embeddings(), model.get_input_embeddings()
    if None not in ends and ends[0].weight is not ends[1].weight:
        untie_config_(model.config)


@no_garbage_collection()
def load_tokenizer(files: ModelFiles, trust_remote_code: bool, vocab_size: int) -> Any:
    """The tokenizer of a model with logits of `vocab_size` ids.

    Raises: UsageError if there is none, or it cannot be used
    """
    silence_transformers()
    files = files.with_tokenizer()
    require_tokenizer(files)
    check_num_tokens(files, vocab_size)
    load = transformers.AutoTokenizer.from_pretrained
    part = files.gguf_file or _TOKENIZER
    with _reading_gguf():
        return _in_one_line(
            files, part, lambda: load(files.location, trust_remote_code=trust_remote_code, **files.arguments)
        )


def _in_one_line(files: ModelFiles, part: str, load: Any) -> Any:
    """What `load` returns, with the errors of disk, hub, and nonsense in the files as one line.

    part: of a local model, the file that is read
    """
    try:
        return load()
    except (UsageError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what a damaged file raises is not known beforehand; Rust's panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise UsageError(
                f"{files.title}: has code of its own, which runs only with --trust_remote_code; read that code first"
            ) from None
        reason = _reason(error, files.location)
        if part == _TOKENIZER and (type(error) is Exception or isinstance(error, json.JSONDecodeError)):
            part = "tokenizer.json"  # whose reader is Rust; the other files were checked before
        where = "" if files.folder is None else f"{part}: "
        raise UsageError(f"{files.title}: cannot be loaded ({where}{reason})") from None


def _reason(error: BaseException, location: str) -> str:
    text, lines = explain_hub_error(error, location), str(error).strip().splitlines()
    if text.endswith(":") and text == lines[0] and len(lines) > 1:
        text += f" {lines[1].strip()}"
    is_plain = isinstance(error, _PLAIN_ERRORS) or type(error) is Exception or "Validation" in type(error).__name__
    return text if is_plain else f"{type(error).__name__}: {text}"

"""The rows that a model has for each token, in its embedding and its LM head, and the token ids in its configs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sar_kd.errors import UsageError
from sar_kd.models.lm_head import text_config_of
from sar_kd.models.model_checks import vocab_size_of
from sar_kd.models.pretrained import renew_config_

_IDS = re.compile(r"\w+_token_ids?|\w+_token_index|(begin_)?suppress_tokens|bad_words_ids")
"""Settings that hold an id, or a list of ids, or of such lists"""

_UNREAD = ("sequence_bias", "forced_decoder_ids")
"""Settings that mix ids with other numbers"""


def ids_in_configs(title: str, model: Any) -> set[int]:
    """The ids of the model that its config and its generation config name.

    Raises: UsageError, which begins with the title, for a setting whose ids cannot be renumbered
    """
    generation = _generation_settings(model)
    for name in _UNREAD:
        if generation.get(name):
            raise UsageError(f"{title}: {name} in its generation config cannot follow; remove it first")
    settings = (generation, model.config.to_dict(), text_config_of(model).to_dict())
    found = {index for each in settings for name, value in each.items() if _IDS.fullmatch(name)
             for index in _flat(value)}  # fmt: skip
    return {index for index in found if 0 <= index < vocab_size_of(model)}


def _generation_settings(model: Any) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    return {} if config is None else config.to_dict()


def _flat(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [index for part in value for index in _flat(part)]
    return [value] if type(value) is int else []


def keep_tokens_(title: str, model: Any, kept: Sequence[int]) -> None:
    """Keep the rows of these ids, ascending, and no others; the configs follow. Ids without a row get none.

    Raises: UsageError, which begins with the title, if a tensor or the config cannot follow
    """
    size, new = vocab_size_of(model), {old: index for index, old in enumerate(kept)}
    rows = torch.tensor([old for old in kept if old < size])
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tensors = [values for module in ends for values in module.parameters(recurse=False)]
    own = {id(values): values for values in tensors}  # tied weights once
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if id(values) not in own and size in values.shape:
            raise UsageError(f"{title}: {name} has an entry for each token and cannot follow; leave out --vocab_size")
    for values in own.values():
        values.data = values.data.index_select(0, rows.to(values.device))
    for module in model.modules():
        names = ("num_embeddings", "out_features") if module in ends else ()
        for name in (*names, "vocab_size"):
            if getattr(module, name, None) == size:
                setattr(module, name, len(rows))
        if (module in ends or hasattr(module, "vocab_size")) and type(getattr(module, "padding_idx", None)) is int:
            module.padding_idx = new.get(module.padding_idx, module.padding_idx)
    setting = text_config_of(model).attribute_map.get("vocab_size", "vocab_size")
    sizes = {setting: len(rows)}

    def change(settings: dict[str, Any]) -> dict[str, Any]:
        return _renumber(settings, new) | (sizes if settings.get(setting) == size else {})

    renew_config_(title, model, change, of_all_parts=True)
    for name, value in _renumber(_generation_settings(model), new).items():
        if _IDS.fullmatch(name):
            setattr(model.generation_config, name, value)


def _renumber(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    def of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [of(part) for part in value]
        return new.get(value, value) if type(value) is int else value

    return {name: of(value) if _IDS.fullmatch(name) else value for name, value in settings.items()}

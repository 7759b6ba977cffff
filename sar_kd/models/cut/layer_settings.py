"""The settings of a transformers config that speak of single layers, and what becomes of them when layers are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_OF_NO_LAYER = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"}
"""Lists that may have as many entries as there are layers, and have none for each"""

_INDICES = (
    "mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "ple_layer_ids", "hybrid_layer_ids",
    "cross_attention_layers", "local_layer_ids",
)  # fmt: skip
"""Lists of layers, from 0"""

_FIRST = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Numbers of the first layers that differ from the others"""

_LAST = ("num_kv_shared_layers",)
"""Numbers of the last layers that differ"""


def keep_layer_settings(settings: Mapping[str, Any], num_layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """The settings of `num_layers` layers, as a config's `to_dict` has them, for the kept ones alone, ascending.

    A list with an entry for each layer keeps theirs; a list of layers, and a number of first or last ones, is counted
    anew. A period, such as every second layer, stays as it is: whether it still fits, `check_follows` finds out.
    """
    new = {old: index for index, old in enumerate(kept)}
    found = dict(settings)
    for key, value in settings.items():
        is_list = isinstance(value, (list, tuple))
        if key in _INDICES and is_list:
            found[key] = [new[index] for index in value if index in new]
        elif key == "block_types":  # a pattern that is repeated
            found[key] = [value[index % len(value)] for index in kept]
        elif is_list and len(value) == num_layers and key not in _OF_NO_LAYER:
            found[key] = [value[index] for index in kept]
        elif key in _FIRST and type(value) is int:
            found[key] = sum(index < value for index in kept)
        elif key in _LAST and type(value) is int:
            found[key] = sum(index >= num_layers - value for index in kept)
        elif key == "moe_layer_end_index" and type(value) is int and value >= 0:  # the last one, not one behind it
            found[key] = sum(index <= value for index in kept) - 1
        elif key == "per_layer_config" and value:
            entries = ((int(index), entry) for index, entry in value.items())
            found[key] = {str(new[index]): entry for index, entry in entries if index in new}
    if settings.get("attention_types"):  # GPT-Neo's: [kinds, how often]; attention_layers follows from it
        found["attention_types"] = [[[kind], 1] for kind in found["attention_layers"]]
    step = settings.get("decoder_sparse_step") or 1
    if step > 1:  # of Qwen's mixtures: every second layer, say, is one
        dense = {index for index in kept if (index + 1) % step} | {*settings["mlp_only_layers"]}
        found["mlp_only_layers"], found["decoder_sparse_step"] = [new[i] for i in kept if i in dense], 1
    return found

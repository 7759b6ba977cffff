"""Tiny models of the families that are known to pass float16's range, with weights that drive one place beyond it.

In all of them the LM head has weights of its own, so that large embeddings give no large logits.
"""

import torch
import transformers
from torch import nn

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 4}  # all: none is chosen by a rounding
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}

CONFIGS = {
    "gemma3": ("Gemma3TextConfig", {}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {"laurel_rank": 4, "altup_num_inputs": 2, "num_kv_shared_layers": 0, **_PER_LAYER,
         "layer_types": ["sliding_attention", "full_attention", "full_attention"],
         "activation_sparsity_pattern": [0.0] * 3},
    ),
    "gemma4": ("Gemma4TextConfig", {"global_head_dim": 8, **_PER_LAYER}),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, **_EXPERTS}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
         **_EXPERTS},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 4, "attention_bias": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e12}},
    ),
    "llama": ("LlamaConfig", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "olmo2": ("Olmo2Config", {}),
}  # fmt: skip


def build_family(name: str) -> nn.Module:
    """A tiny model of the family in float32; the same weights each time, of values that half has."""
    kind, overrides = CONFIGS[name]
    settings = {**_SIZES, **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    _round_(model)
    return model.eval()


def _round_(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()


def exceed_(model: nn.Module, place: str) -> None:
    """Make the values in one place pass 65,504.

    place  "residual": what a layer adds to it; "product": gate times up, each of them in range; "scores": queries times
           keys, by a part that is the same for all, so that softmax does not depend on it; "gradient": that of the
           residual stream, whose values are so small that the norms enlarge it; the forward is in range
    """
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        if place == "residual":
            model.get_input_embeddings().weight.uniform_(-1e4, 1e4)
        if place == "gradient":
            model.get_input_embeddings().weight.mul_(1e-5)
        for name, parameter in model.named_parameters():
            if place == "residual" and name.endswith("dense_4h_to_h.bias"):
                parameter.uniform_(-6e4, 6e4)
            norms = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
            if place == "residual" and model.config.model_type.startswith(("gemma", "olmo2")) and name.endswith(norms):
                parameter.fill_(4e4)
            if place == "product" and name.endswith("gate_up_proj"):  # of stacked experts
                gate, up = parameter.chunk(2, dim=1)
                gate.normal_(std=5.0)
                up.normal_(std=1500.0)
            elif place == "product" and name.endswith(("gate_proj.weight", "up_proj.weight")):
                parameter.normal_(std=5.0 if "gate" in name else 1500.0)
            if place == "scores" and name.endswith(("q_proj.bias", "k_proj.bias")):
                heads = parameter.view(-1, 8)
                heads.zero_()
                heads[:, 3] = heads[:, 7] = 400.0  # the pair of dimensions that rotates least
            if place == "scores" and name.endswith(("q_proj.weight", "k_proj.weight")):
                rows = parameter.view(-1, 8, parameter.shape[1])
                rows[:, 3] = rows[:, 7] = 0.0
    _round_(model)

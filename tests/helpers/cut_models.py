"""Tiny random models of six layers that differ from one another wherever their config can say so."""

import torch
import transformers
from torch import nn

LAYERS = 6
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention",
            "full_attention"]  # fmt: skip
_LINEAR = ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention",
           "linear_attention"]  # fmt: skip
_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
_PLAIN = {name: _SIZES[name] for name in _SIZES if name not in ("num_key_value_heads", "head_dim")}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS = {
    "llama": ("LlamaConfig", _SIZES),
    "llama_tied": ("LlamaConfig", {**_SIZES, "tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2Config",
        {**_SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3": ("Qwen3Config", {**_SIZES, "use_sliding_window": True, "sliding_window": 8, "layer_types": _WINDOWS}),
    "gemma2": ("Gemma2Config", {**_SIZES, "sliding_window": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**_SIZES, "sliding_window": 8, "layer_types": _WINDOWS[::-1]}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "bos_token_id": 0,
                            "eos_token_id": 0}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": LAYERS, "attention_types": [[["global", "local"], 3]], "num_heads": 4,
         "window_size": 8, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "gpt_neox": ("GPTNeoXConfig", _PLAIN),
    "olmo2": ("Olmo2Config", {**_PLAIN, "num_key_value_heads": 2}),
    "phi3": ("Phi3Config", {**_PLAIN, "num_key_value_heads": 2}),
    "smollm3": ("SmolLM3Config", {**_SIZES, "no_rope_layers": [1, 0, 1, 1, 0, 1]}),
    "mixtral": ("MixtralConfig", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_SIZES, **_EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_PLAIN, "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16,
         "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_SIZES, **_EXPERTS, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2,
         "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": _LINEAR},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "layer_types": _WINDOWS},
    ),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 8, "bos_token_id": 0,
                              "eos_token_id": 0}),
}  # fmt: skip


def build_to_cut(name: str, vocab_size: int, **overrides) -> nn.Module:
    """A model in eval mode; its weights are so large that every layer matters."""
    kind, settings = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = getattr(transformers, kind)(vocab_size=vocab_size, **{**settings, **overrides})
        model = transformers.AutoModelForCausalLM.from_config(config)
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in key and "conv" not in key:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()

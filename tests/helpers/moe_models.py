"""Tiny random models of every mixture-of-experts architecture whose routers are known."""

import torch
import transformers

EXPERTS = 4
_SHARED = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LATENT = {
    "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "num_hidden_layers": 3, "topk_group": 1,
}  # fmt: skip
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
_COUNTED = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
_QWEN = {**_COUNTED, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 16}
_LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
# Name: prefix of the classes, settings, names of the routers' parents, name of the router, of its parameters.
CAUSAL = {
    "mixtral": ("Mixtral", _LOCAL, "model.layers.{}.mlp", "gate", ("weight",)),
    "minimax": (
        "MiniMax",
        {**_LOCAL, "head_dim": 16, "block_size": 16, "layer_types": ["full_attention", "linear_attention"]},
        "model.layers.{}.mlp", "gate", ("weight",),
    ),
    "qwen2_moe": ("Qwen2Moe", _QWEN, "model.layers.{}.mlp", "gate", ("weight",)),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN, "head_dim": 16}, "model.layers.{}.mlp", "gate", ("weight",)),
    "qwen3_next": ("Qwen3Next", {**_QWEN, **_LINEAR, "head_dim": 16}, "model.layers.{}.mlp", "gate", ("weight",)),
    "olmoe": ("Olmoe", _COUNTED, "model.layers.{}.mlp", "gate", ("weight",)),
    "flex_olmo": ("FlexOlmo", _COUNTED, "model.layers.{}.mlp", "gate", ("weight",)),
    "deepseek_v2": ("DeepseekV2", {**_LATENT, "n_group": 1}, "model.layers.{}.mlp", "gate", ("weight",)),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, "n_group": 2}, "model.layers.{}.mlp", "gate", ("weight",)),
    "glm4_moe": ("Glm4Moe", {**_LATENT, "n_group": 1, "head_dim": 16}, "model.layers.{}.mlp", "gate", ("weight",)),
    "gpt_oss": ("GptOss", {**_LOCAL, "head_dim": 16}, "model.layers.{}.mlp", "router", ("weight", "bias")),
    "granitemoe": ("GraniteMoe", _LOCAL, "model.layers.{}.block_sparse_moe", "router", ("weight",)),
    "jamba": (
        "Jamba",
        {
            **_COUNTED, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
            "attn_layer_offset": 0, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_hidden_layers": 4,
        },
        "model.layers.{}.feed_forward", "router", ("weight",),
    ),
    "phimoe": ("Phimoe", _LOCAL, "model.layers.{}.mlp", "router", ("weight",)),
    "llama4": (
        "Llama4",
        {
            **_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 16,
            "interleave_moe_layer_step": 1, "attention_chunk_size": 32,
        },
        "model.layers.{}.feed_forward", "router", ("weight",),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1, "num_hidden_layers": 3,
        },
        "model.layers.{}.mlp", "gate", ("weight",),
    ),
    "minimax_m2": ("MiniMaxM2", {**_LOCAL, "head_dim": 16}, "model.layers.{}.mlp", "gate", ("weight",)),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1", {"num_experts": EXPERTS, "moe_topk": 2, "head_dim": 16}, "model.layers.{}.mlp", "gate",
        ("wg.weight",),
    ),
    "dbrx": (
        "Dbrx",
        {
            "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": 32},
        },
        "transformer.blocks.{}.ffn", "router", ("layer.weight",),
    ),
}  # fmt: skip
LAYERS = {"deepseek_v2": (1, 2), "deepseek_v3": (1, 2), "glm4_moe": (1, 2), "jamba": (1, 3), "ernie4_5_moe": (1, 2)}
NATIVE_ONLY = {
    "switch_transformers": ("encoder.block.1.layer.1.mlp.router", "decoder.block.1.layer.2.mlp.router"),
    "nllb_moe": ("model.encoder.layers.1.ffn.router", "model.decoder.layers.1.ffn.router"),
}


def make_causal(architecture: str, **overrides):
    """A seeded model, frozen and in eval mode, whose routers have clearly different logits."""
    prefix, settings, parent, router, _ = CAUSAL[architecture]
    settings = {**({} if architecture == "dbrx" else _SHARED), **settings, **overrides}
    config = "Llama4Text" if architecture == "llama4" else prefix
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{config}Config")(**settings))
        for layer in LAYERS.get(architecture, (0, 1)):
            module = model.get_submodule(f"{parent.format(layer)}.{router}")
            for key, parameter in module.named_parameters():
                if "e_score" not in key:
                    torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False).eval()


def router_names(architecture: str) -> list[str]:
    """The full names that its routers have."""
    _, _, parent, router, _ = CAUSAL[architecture]
    return [f"{parent.format(layer)}.{router}" for layer in LAYERS.get(architecture, (0, 1))]


def make_encoder_decoder(architecture: str):
    """Switch or NLLB: capacity masks, one weight for each token."""
    sizes = {"vocab_size": 64, "d_model": 32, "num_experts": EXPERTS}
    if architecture == "switch_transformers":
        layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1}
        heads = {"num_sparse_decoder_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 64}
        config = transformers.SwitchTransformersConfig(**sizes, **layers, **heads)
        return transformers.SwitchTransformersForConditionalGeneration(config).eval()
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in _NLLB_SIDE.items()}
    config = transformers.NllbMoeConfig(**sizes, **sides, max_position_embeddings=64)
    return transformers.NllbMoeForConditionalGeneration(config).eval()


_NLLB_SIDE = {"layers": 2, "ffn_dim": 64, "attention_heads": 2, "sparse_step": 2}


def make_dense():
    """A Llama whose feed-forward parts have a `gate_proj`."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHARED)).requires_grad_(False).eval()

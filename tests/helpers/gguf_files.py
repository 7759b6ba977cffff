"""GGUF files of tiny Llama models, written with the writer of the `gguf` package."""

import json

import gguf

_NAMES = {
    "embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
}  # fmt: skip


def write_gguf(model, tokenizer, path):
    """Write a Llama model in float32 and a byte-level BPE tokenizer."""
    config, definition = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    special = {token["content"] for token in definition["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in definition["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, value in model.state_dict().items():
        part = next(new for old, new in _NAMES.items() if f"{old}.weight" in name)
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else None
        if part in ("attn_q", "attn_k"):  # GGUF interleaves the two halves of each head's rotary pairs
            heads = config.num_attention_heads
            value = value.view(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"blk.{layer}.{part}.weight" if layer else f"{part}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

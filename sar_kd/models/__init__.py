"""Everything that touches transformers: loading, LM heads, LoRA, quantization, offload, generation.

In: a directory, a hub id, or a model in memory. Out: frozen teacher and trainable student with their tokenizers;
hidden states and an LM head instead of whole logits; generated tokens.
May import: `alignment` and what stands below it; not `data` or `reporting`.
"""

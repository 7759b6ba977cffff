"""A tiny teacher that writes ASCII text and ends it now and then, and a chat template for it."""

import copy

import torch
import transformers

from sar_kd.tokenization.token_table import CONTENT, build_token_table

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer, template):
    """A copy with this chat template and ChatML's special tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def build_writer(tokenizer, stop_bias=0.0, positions=128):
    """A GPT-2 of random weights in which one hidden value is 1, so that a column of the head is a bias: tokens of
    printable ASCII have 0 there, those that end a text `stop_bias`, and all others are never written.
    """
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=32, n_positions=positions, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    table = build_token_table(tokenizer, len(tokenizer))
    model.transformer.ln_f.weight.data[0] = 0.0
    model.transformer.ln_f.bias.data[0] = 1.0
    bias = torch.full((len(tokenizer),), -1e4)
    for token, piece in enumerate(table.pieces):
        if table.kinds[token] == CONTENT and all(32 <= byte < 127 for byte in piece):
            bias[token] = 0.0
    bias[list(table.end_ids)] = stop_bias
    model.lm_head.weight.data[:, 0] = bias
    return model


def save(folder, model, tokenizer):
    """A folder that `from_pretrained` loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

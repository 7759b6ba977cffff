"""`sar-kd embedded`: train the embedded pair from a seed, about 20 minutes on 2 cores.

Teacher: a Qwen3-type mixture of experts with a byte-level BPE tokenizer. Student: a Llama-type model of a tenth of
its size with a SentencePiece-type BPE tokenizer with byte fallback. Both are trained on the `teacher` split of the
embedded text; the student for fewer steps, so that it has something to learn from the teacher.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from torch import nn
from tqdm import tqdm

from sar_kd import embedded
from sar_kd.config.commands import EmbeddedConfig
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.runtime.files import atomic_rename
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

TEACHER_VOCAB, STUDENT_VOCAB = 2048, 1024

BLOCK_SIZE, BATCH_SIZE = 256, 8

CONTEXT = 1024

# Muon updates matrices by an orthogonalised momentum; embeddings, experts (3-D) and routers are left to AdamW.
ADAMW_LR, MUON_LR, WEIGHT_DECAY = 3e-3, 4e-3, 0.3

WARMUP_STEPS, DECAY_SHARE = 50, 0.4

INPUT_NOISE = 0.15
"""Share of input tokens replaced at random: without it the teacher would memorize its 1 MB of text."""


def main(config: EmbeddedConfig) -> dict:
    """Train both models and save them. Raises: UsageError"""
    output = Path(config.output_dir)
    for name in ("teacher", "student"):
        if (output / name).exists():
            raise UsageError(f"--output_dir {config.output_dir}: it holds a folder {name}; give another folder")
    build(output, config.teacher_steps, config.student_steps, config.seed)
    return {"status": "finished"}


def build(output: Path, teacher_steps: int, student_steps: int, seed: int) -> None:
    """Train both models and save them, with tokenizer and model card, in folders of `output`."""
    torch.manual_seed(seed)
    texts, transfer, validation = embedded.read_text("teacher", "transfer", "validation")
    recipes = {
        "teacher": (byte_level_bpe, TEACHER_VOCAB, teacher_model, teacher_steps, INPUT_NOISE),
        "student": (sentencepiece_bpe, STUDENT_VOCAB, student_model, student_steps, 0.0),
    }
    for name, (make_tokenizer, vocab_size, make_model, steps, noise) in recipes.items():
        started = time.monotonic()
        tokenizer, model = make_tokenizer(list(texts.values()), vocab_size), make_model()
        pretrain(model, dataset_of(tokenizer, texts), steps, noise, seed, name)
        scores = {}
        for split, held_out_texts in (("transfer", transfer), ("validation", validation)):
            held_out = dataset_of(tokenizer, held_out_texts)
            batches = held_out.token_batches("student", BATCH_SIZE)
            precision = Precision(torch.device("cpu"), torch.float32, 1.0)
            scores[split] = evaluate(model, batches, held_out.text.num_bytes, precision)
        _save(output / name, name, model, tokenizer, scores, steps, noise, seed)
        bits = ", ".join(f"{split} {score.bits_per_byte:.3f}" for split, score in scores.items())
        print(f"{name}: bits per byte: {bits}; {time.monotonic() - started:.0f} s")


def byte_level_bpe(texts: list[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's: bytes as printable characters, words split by its pattern."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, clean_up_tokenization_spaces=False
    )


_WORDS = pre_tokenizers.Split(Regex("\u2581+(?=\u2581)|\u2581?[^\u2581\n]+|\u2581|\n+"), "isolated")
"""A word includes the space before it; further spaces and line ends are words of their own."""


def sentencepiece_bpe(
    texts: list[str], vocab_size: int, words: pre_tokenizers.PreTokenizer = _WORDS
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer like Gemma's: spaces as U+2581, no dummy prefix, a token for each byte where no other token fits."""
    tokenizer = Tokenizer(tokenizer_models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=special + byte_tokens, limit_alphabet=128, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer can only reserve ids for special tokens; byte tokens must be ordinary ones.
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in special]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def teacher_model() -> nn.Module:
    """4.5 M parameters, most of them in 8 experts, of which 2 are active for a token."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=TEACHER_VOCAB, hidden_size=192, intermediate_size=512, moe_intermediate_size=192,
        num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=6, head_dim=32,  # type: ignore[call-arg]
        num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def student_model() -> nn.Module:
    """0.43 M parameters, dense."""
    config = transformers.LlamaConfig(
        vocab_size=STUDENT_VOCAB, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def pretrain(model: Any, dataset: Dataset, steps: int, noise: float, seed: int, label: str) -> None:
    """Train by cross-entropy: linear warm-up, constant, linear decay over the last 40 % of the steps."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "gate.weight" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    peaks = ((muon, MUON_LR), (adamw, ADAMW_LR))
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc=label)
    for step in bar:
        factor = min(1.0, (step + 1) / WARMUP_STEPS, max(0.02, (steps - step) / (DECAY_SHARE * steps)))
        (batch,) = dataset.micro_batches(step, BATCH_SIZE, 1, seed)
        tokens = batch.student
        random_ids = torch.randint(0, model.config.vocab_size, tokens.input_ids.shape, generator=generator)
        replaced = torch.rand(tokens.input_ids.shape, generator=generator) < noise
        output = model(input_ids=torch.where(replaced, random_ids, tokens.input_ids), use_cache=False)
        loss = nn.functional.cross_entropy(output.logits.flatten(0, 1)[tokens.positions], tokens.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in peaks:
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix_str(f"loss={loss.item():.3f}", refresh=False)


def dataset_of(tokenizer: Any, texts: dict[str, str]) -> Dataset:
    """Texts by name in blocks of the tokenizer's tokens."""
    pair = TokenizerPair(tokenizer, tokenizer, student_vocab_size=len(tokenizer), teacher_vocab_size=len(tokenizer))
    return build_dataset([Document(*item) for item in texts.items()], pair, BLOCK_SIZE, BLOCK_SIZE)


def _save(folder: Path, name: str, model: Any, tokenizer, scores, steps: int, noise: float, seed: int) -> None:
    partial = folder.with_name(f"{name}.partial")
    model.half().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    (partial / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# SAR-KD's embedded {name}

A {type(model).__name__} of {size:.2f} M parameters, for trying out SAR-KD without a download. It is too small for
any other use.

- Text: the `teacher` split of the documentation shipped with CPython (see `sar_kd/embedded/__init__.py`).
- Training: {steps} steps of {BATCH_SIZE} blocks of {BLOCK_SIZE} tokens, {noise:.0%} of the input tokens replaced at
  random, Muon and AdamW, seed {seed}. Trained by `python -m sar_kd embedded`.
- Bits per byte on held-out text: {scores["validation"].bits_per_byte:.3f} (validation split),
  {scores["transfer"].bits_per_byte:.3f} (transfer split).
- Weights are stored in float16.
"""
    )
    atomic_rename(partial, folder)

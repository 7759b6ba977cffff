"""The moments of a step and what is alive at each: as words, and by a rule of thumb.

What it takes to let the student write: the keys and values of every token, and what drawing the next one takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sar_kd.config.runs import OnPolicyConfig
from sar_kd.models.lm_head import backbone_of
from sar_kd.models.loading import num_rows
from sar_kd.runtime.precision import Precision

CATEGORIES = ("teacher", "student", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class Phase:
    """A stretch of a step, and what is alive when most is."""

    name: str
    parts: Mapping[str, int]
    """Bytes, by the words in `CATEGORIES`"""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def teacher_width(width: int, student_rows: int, teacher_rows: int) -> int:
    """How many tokens of the teacher's make `width` of the student's, as their vocabularies' sizes suggest: the text of
    a token is about as long as the logarithm of their number.
    """
    if alike(student_rows, teacher_rows):
        return width
    return max(2, round(width * math.log(student_rows) / math.log(teacher_rows)))


def alike(student_rows: int, teacher_rows: int) -> bool:
    """Are the vocabularies' sizes those of the same tokenizer, padding apart?"""
    return max(student_rows, teacher_rows) <= 1.02 * min(student_rows, teacher_rows)


def estimate(config: Any, skeletons: Mapping[str, nn.Module], dtype: torch.dtype) -> list[Phase]:
    """The moments of a step by a rule of thumb, for models that do not run without numbers.

    saved for backward = B * T * layers * (17 * D + 5 * I) numbers of the compute dtype, I the width of what a token
    passes in a feed-forward block; without layers being kept, one of them and each layer's input
    """
    train, own = config.train, getattr(config, "on_policy", None)
    tokens, half = train.per_device_batch_size * config.data.block_size, torch.finfo(dtype).bits // 8
    weights = {whose: sum(p.numel() for p in model.parameters()) for whose, model in skeletons.items()}
    saved = {whose: _saved(model, half * tokens, config) for whose, model in skeletons.items()}
    learned, passing = weights["student"], saved.get("teacher", (0, 0))[1]
    heads = {whose: num_rows(model) for whose, model in skeletons.items()}
    student = skeletons["student"].get_output_embeddings().weight  # type: ignore[operator]  # transformers'
    loss = min(config.loss.loss_workspace_mb * 2**20, 4 * tokens * sum(heads.values())) + 4 * student.numel()
    standing = {
        "teacher": half * weights.get("teacher", 0), "student": 4 * learned, "gradients": 0, "optimizer": 8 * learned,
        "activations": 0, "loss": 0,
    }  # fmt: skip
    kept = {"gradients": 4 * learned} if train.grad_accum_steps > 1 else {}
    sizes = own and writing_sizes(own, train.per_device_batch_size, train.grad_accum_steps, config.data.block_size)
    writing = []
    if sizes:  # at its beginning all prompts pass a layer at once, at its end all keys and values are there
        passes = saved["student"][1] * sizes.rows * sizes.prompt // tokens
        written = max(passes, cache_bytes(skeletons["student"], sizes, half))
        writing.append(Phase("writing", {**standing, "activations": written}))
    return [
        *writing,
        Phase("forward", {**standing, **kept, "activations": saved["student"][0] + passing}),
        Phase("loss", {**standing, **kept, "activations": saved["student"][0], "loss": loss}),
        Phase("backward", {**standing, "activations": saved["student"][0], "gradients": 4 * learned}),
        Phase("update", {**standing, "gradients": 4 * learned}),
        Phase("evaluation", {**standing, "activations": max(saved["student"][1], passing)}),
    ]


def _saved(model: Any, unit: int, config: Any) -> tuple[int, int]:
    """Bytes that a forward keeps for its backward, and that it needs while it passes one layer.

    unit: bytes of one number of each token
    """
    settings = model.config.get_text_config()
    width = settings.hidden_size
    inner = getattr(settings, "moe_intermediate_size", None) or getattr(settings, "intermediate_size", None)
    inner = (inner or 4 * width) * (getattr(settings, "num_experts_per_tok", None) or 1)
    one = unit * (17 * width + 5 * inner)
    if config.memory.gradient_checkpointing:
        return unit * width * settings.num_hidden_layers + one, one
    return one * settings.num_hidden_layers, one


_HELD, _SORTED = 3, 7
"""Tensors of [B, V] in 32 bits: what `generate` holds of a token that is drawn, while it reads it (logits, these
without what is not finite, probabilities); what it takes beside when --sample_top_p is below 1 (sorted logits, their
places in 64 bits, both once more while they are sorted, probabilities)"""


class Sizes(NamedTuple):
    """The largest lot of responses that a step writes at once."""

    rows: int
    """B: prompts"""
    prompt: int
    """Tokens of the longest prompt, start token included"""
    total: int
    """Tokens that have keys and values at the end"""


def writing_sizes(config: OnPolicyConfig, blocks: int, accum_steps: int, block_size: int) -> Sizes | None:
    """The most that a step of a run writes; None where the student writes nothing.

    All on-policy micro-batches of a step are written in one go. Prompts are padded to the longest, and as many tokens
    follow as the shortest has room for; the last one written is not read again.
    """
    if not config.on_policy_fraction:
        return None
    rows, prompt = blocks * math.ceil(accum_steps * config.on_policy_fraction), block_size - 1
    room = min(config.max_new_tokens, block_size - 1) if rows > 1 else 1
    return Sizes(rows, prompt, prompt + room - 1)


def cache_bytes(model: Any, sizes: Sizes, unit: int) -> int:
    """Keys and values of every token: B * T * layers * 2 * kv heads * head dim * unit.

    unit: bytes of a number
    """
    settings = model.config.get_text_config()
    heads = settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    kept = (getattr(settings, "num_key_value_heads", None) or heads) * width
    return sizes.rows * sizes.total * settings.num_hidden_layers * 2 * kept * unit


class Writing:
    """The two heaviest moments of writing."""

    def __init__(self, model: nn.Module, sizes: Sizes, precision: Precision, draws_from_part: bool):
        """draws_from_part: not from all tokens, but from the fewest that have a certain probability"""
        self._model, self._sizes, self._precision, self._draws_from_part = model, sizes, precision, draws_from_part

    @torch.no_grad()
    def full_cache(self) -> Any:
        """Keys and values of all tokens, with the last still to come."""
        return self._read(self._sizes.total - 1, None)

    @torch.no_grad()
    def begin(self) -> None:
        """Read the prompts."""
        self._read(self._sizes.prompt, None)

    @torch.no_grad()
    def end(self, cache: Any) -> None:
        """Read one token more, behind all the others, and draw the next."""
        held = [self._scores() for _ in range(_HELD)]
        self._read(1, cache)
        held += [self._scores() for _ in range(_SORTED if self._draws_from_part else 1)]
        del held

    def _scores(self) -> Tensor:
        return self._empty(torch.float32, num_rows(self._model))

    def _read(self, width: int, cache: Any) -> Any:
        before = 0 if cache is None else self._sizes.total - 1
        mask = self._empty(torch.bool, 1, width, before + width)  # prompts of unlike length are padded
        how = {"past_key_values": cache} if cache is not None else {}
        with self._precision.autocast():
            input_ids = self._empty(torch.int64, width)
            out = backbone_of(self._model)(input_ids=input_ids, attention_mask=mask, use_cache=True, **how)
            self._model.get_output_embeddings()(out.last_hidden_state[:, -1:])  # type: ignore[operator]
        return out.past_key_values

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((self._sizes.rows, *shape), dtype=dtype, device=self._precision.device)

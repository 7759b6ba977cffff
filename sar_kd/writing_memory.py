"""What it takes to let the student write: the keys and values of every token, and what drawing the next one takes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sar_kd.heads import body_of
from sar_kd.loading import num_rows
from sar_kd.on_policy_config import OnPolicyConfig
from sar_kd.precision import Precision

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
            out = body_of(self._model)(input_ids=input_ids, attention_mask=mask, use_cache=True, **how)
            self._model.get_output_embeddings()(out.last_hidden_state[:, -1:])  # type: ignore[operator]
        return out.past_key_values

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((self._sizes.rows, *shape), dtype=dtype, device=self._precision.device)

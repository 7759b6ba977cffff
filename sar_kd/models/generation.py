"""Batched generation with a KV cache, through transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ISSUES = ("nonfinite", "broken_utf8", "special", "unrepresentable", "too_long", "nothing")
"""Why a response cannot be used. nonfinite: its logits were not finite; broken_utf8: bytes that are no text, most often
half a character at the end; special: a token without text in the middle; unrepresentable: the teacher's tokenizer
changes the text; too_long: for the teacher's block; nothing: no token is left of it."""


GREEDY = 1e-30
"""Below this temperature all probability is the likeliest token's, whatever float32 logits differ by, and z /
temperature would overflow."""


class Generation(NamedTuple):
    """The continuation of one prompt."""

    ids: list[int]
    """Without the stop token"""
    stop: int | None
    """The stop token; None if there is none, at `max_new_tokens` or at logits that are not finite"""
    is_finite: bool = True
    """False: ended where the logits were not finite"""


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    draws: Tensor | None = None,
) -> list[Generation]:
    """Continue every prompt until a stop token or its `max_new_tokens`.

    A token is sampled from softmax(z / temperature), restricted to the fewest tokens whose probabilities reach
    `top_p`; temperature 0 is greedy, and so is one below `GREEDY`. The model's own generation config is ignored. The
    caller sets the model's mode, its dtype and the random seed.
    max_new_tokens: for each prompt, the stop token included
    repetition_penalty: z of tokens that occur already is divided by it where positive, else multiplied; 1: unchanged
    draws: float64 [B, T], in [0, 1): the random number behind each token, T of at least the largest of max_new_tokens;
        by default PyTorch's generator makes them, and what one sequence gets depends on the others of its batch
    """
    width, padding = max(map(len, prompts)), stop_token_ids[0]
    positions = _position_table_size(model)
    if len(prompts) > 1 and positions and width + max(max_new_tokens) > positions:
        # In one batch the longest prompt would get as many new tokens as the shortest, and the table has no more.
        how: dict[str, Any] = {"stop_token_ids": stop_token_ids, "temperature": temperature, "top_p": top_p}
        how["repetition_penalty"] = repetition_penalty
        each = zip(prompts, max_new_tokens, [None] * len(prompts) if draws is None else draws.split(1), strict=True)
        return [generate(model, [prompt], max_new_tokens=[limit], draws=own, **how)[0] for prompt, limit, own in each]
    ids = torch.full((len(prompts), width), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[i, width - len(prompt) :] = 1
    finite_check = _StopAtNonfinite(padding, model.device, len(prompts))
    samples = temperature >= GREEDY and draws is None
    processors: list[Any] = [finite_check]
    if temperature >= GREEDY and draws is not None:
        processors.append(_InverseSampling(draws.to(model.device), temperature, top_p))
    saved_config, model.generation_config = model.generation_config, type(model.generation_config)()
    try:
        new_ids = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=processors,
            max_new_tokens=max(max_new_tokens),
            do_sample=samples,
            temperature=temperature if samples else None,
            top_p=top_p if samples else None,
            top_k=0 if samples else None,
            repetition_penalty=repetition_penalty if repetition_penalty != 1.0 else None,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(set(stop_token_ids)),
            pad_token_id=padding,
            synced_gpus=False,  # a sharded model is gathered whole, so no forward waits for another rank
        )[:, width:].tolist()
    finally:
        model.generation_config = saved_config
    first_nonfinite, stops = finite_check.first_nonfinite.tolist(), set(stop_token_ids)
    return [_cut(*each, stops) for each in zip(new_ids, max_new_tokens, first_nonfinite, strict=True)]


def _position_table_size(model: Any) -> int | None:
    """Positions of a model that embeds each by a table, as GPT-2 does; None for other models."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    others = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings())
    # OPT's table has two more.
    return context if context and any(context <= m.num_embeddings <= context + 2 for m in others) else None


def _cut(ids: list[int], limit: int, nonfinite_at: int, stops: set[int]) -> Generation:
    """nonfinite_at: position of the first logits that are not finite, -1 for none"""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    if 0 <= nonfinite_at <= min(end, limit - 1):
        return Generation(ids[:nonfinite_at], None, False)
    return Generation(ids[: min(end, limit)], ids[end] if end < min(limit, len(ids)) else None)


class _StopAtNonfinite:
    """A logits processor that ends a sequence at logits that are not finite and records where; no host read."""

    def __init__(self, stop: int, device: torch.device, batch_size: int):
        self._stop, self._step = stop, 0
        self.first_nonfinite = torch.full((batch_size,), -1, device=device)
        """int64 [B]: position of each sequence's first logits that are not finite, -1 for none"""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """scores: float32 [B, V]"""
        nonfinite = ~scores.logsumexp(1).isfinite()
        self.first_nonfinite = torch.where(nonfinite & (self.first_nonfinite < 0), self._step, self.first_nonfinite)
        self._step += 1
        stopping = torch.full_like(scores[:1], -torch.inf)
        stopping[:, self._stop] = 0.0
        return torch.where(nonfinite[:, None], stopping, scores)


class _InverseSampling:
    """A logits processor that leaves one token to each sequence: the first whose cumulative probability exceeds the
    sequence's draw for this step; no host read.
    """

    def __init__(self, draws: Tensor, temperature: float, top_p: float):
        """draws: float64 [B, T]"""
        self._draws, self._temperature, self._top_p, self._step = draws, temperature, top_p, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """scores: float32 [B, V]"""
        probs = (scores.double() / self._temperature).softmax(1)
        if self._top_p < 1:
            largest, order = probs.sort(dim=1, descending=True, stable=True)
            largest = largest.masked_fill(largest.cumsum(1) - largest >= self._top_p, 0.0)
            probs = torch.zeros_like(probs).scatter(1, order, largest)
        ends = probs.cumsum(1)
        draws = self._draws[:, self._step, None] * ends[:, -1:]
        self._step += 1
        drawn = torch.searchsorted(ends, draws, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)

"""What a model writes behind some prompts: batches of them at once, with its cache, by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ISSUES = ("nonfinite", "broken_utf8", "special", "unrepresentable", "too_long", "nothing")
"""What may be wrong with what a student wrote. nonfinite: the logits were, while it was written; broken_utf8: bytes
that are no text, most often half a character at the end; special: a token without text in the middle; unrepresentable:
the teacher's tokenizer does not keep the text; too_long: for the teacher's block; nothing: no token is left of it."""


class Generation(NamedTuple):
    """What a model wrote behind one prompt."""

    ids: list[int]
    """Without the token it stopped with"""
    stop: int | None
    """That token; None if there was no room left, or the logits were not finite"""
    is_finite: bool = True
    """False: broken off where the logits were not finite"""


@torch.no_grad()
def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    rooms: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Generation]:
    """Go on from every prompt until one of `stops`, or until there is no room left for it.

    A token is drawn from softmax(z / temperature), of the fewest tokens that together have the probability `top_p`; at
    temperature 0 it is the likeliest. Nothing that the model's own generation config asks for takes part. The model's
    mode, its dtype and the random numbers are the caller's; no graph is kept.
    rooms: for each prompt the most tokens that may stand behind it, the one it stops with included
    """
    width, padding = max(map(len, prompts)), stops[0]
    ids = torch.full((len(prompts), width), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    watch = _Watch(stops[0], model.device, len(prompts))
    draws = temperature > 0
    own, model.generation_config = model.generation_config, type(model.generation_config)()
    try:
        found = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=[watch],
            max_new_tokens=max(rooms),
            do_sample=draws,
            temperature=temperature if draws else None,
            top_p=top_p if draws else None,
            top_k=0 if draws else None,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(set(stops)),
            pad_token_id=padding,
        )[:, width:].tolist()
    finally:
        model.generation_config = own
    broken = watch.first.tolist()
    return [_read(row, set(stops), room, at) for row, room, at in zip(found, rooms, broken, strict=True)]


def _read(ids: list[int], stops: set[int], room: int, broken: int) -> Generation:
    """broken: the place at which the logits were not finite, -1 for none"""
    at = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    if 0 <= broken <= min(at, room - 1):
        return Generation(ids[:broken], None, False)
    return Generation(ids[: min(at, room)], ids[at] if at < min(room, len(ids)) else None)


class _Watch:
    """Ends a row whose logits are not finite, and remembers where; no host read."""

    def __init__(self, stop: int, device: torch.device, rows: int):
        self._stop, self._step = stop, 0
        self.first = torch.full((rows,), -1, device=device)
        """int64 [B]: the first place of each row at which they were not, -1 for none"""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """scores: float32 [B, V]"""
        bad = ~scores.logsumexp(1).isfinite()
        self.first = torch.where(bad & (self.first < 0), self._step, self.first)
        self._step += 1
        ending = torch.full_like(scores[:1], -torch.inf)
        ending[:, self._stop] = 0.0
        return torch.where(bad[:, None], ending, scores)

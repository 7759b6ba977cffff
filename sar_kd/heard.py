"""The outcomes that a teacher cut to its top k speaks about where both models start a token: a few of each row.

All that is compared is in lists, of at most k outcomes a row and the other ways that the teacher has, so that nothing
of the size of a vocabulary is gone through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.losses import ABSENT, Segments
from sar_kd.other_ways import Ways
from sar_kd.projection import Fold
from sar_kd.top import Top


class Heard(NamedTuple):
    """Outcomes in a flat list, those of one column in any order, each once."""

    columns: Tensor
    """int64 [E]"""
    outcomes: Tensor
    """int64 [E]; the number of outcomes there are, where the entry stands for none"""
    log_probs: Tensor
    """float32 [E], not normalised; about `ABSENT` where the teacher says nothing"""


def heard_outcomes(top: Top, fold: Fold, ways: Ways, temperature: float) -> Heard:
    """What a teacher whose tokens are the longer ones says of the outcomes, by all its ways to write them.

    top: of the K columns where both start a token; ways: its other ways there
    """
    count = len(fold.first)
    classes, logits = _by_outcome(fold.outcomes_of(top.ids.T), top.logits.T / temperature, count)
    totals = logits.logsumexp(1, keepdim=True)
    ended = (logits - totals).where(logits > 1e-6 * ABSENT, ABSENT) + ways.ends[:, None]
    numbers = torch.arange(len(classes), device=classes.device)
    keys = (numbers[:, None] * (count + 1) + classes).view(-1)  # ascending
    columns, outcomes, others = ways.others
    wanted, more = columns * (count + 1) + outcomes, ways.going_on[others]
    at = torch.searchsorted(keys, wanted).clamp_max(max(0, len(keys) - 1))
    is_there = keys[at] == wanted
    flat = torch.cat([ended.reshape(-1), ended.new_zeros(1)])
    target = torch.where(is_there, at, len(keys))  # the last one is for those that are not
    flat = flat.index_put((target,), torch.where(is_there, torch.logaddexp(flat[at], more), 0.0))[:-1]
    return Heard(
        torch.cat([numbers.repeat_interleave(classes.shape[1]), columns]),
        torch.cat([classes.reshape(-1), outcomes]),
        torch.cat([flat, torch.where(is_there, ABSENT, more)]),
    )


def _by_outcome(classes: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens' logits, [K, k], as those of their outcomes, likewise, in ascending order, `count` where there is none.

    classes: int64 [K, k], the outcome of each token, -1 for none
    """
    classes, order = torch.where(classes < 0, count, classes).contiguous().sort(1)
    logits = logits.gather(1, order).where(classes < count, ABSENT)
    is_new = torch.ones_like(classes)
    is_new[:, 1:] = classes[:, 1:] != classes[:, :-1]
    width = classes.shape[1]
    places = is_new.cumsum(1) - 1 + width * torch.arange(len(classes), device=classes.device)[:, None]
    sums = Segments(places.view(-1), classes.numel()).logsumexp(logits.reshape(-1)).view_as(logits)
    found = torch.full_like(classes, count).view(-1).scatter_(0, places.view(-1), classes.view(-1))
    return found.view_as(classes), sums

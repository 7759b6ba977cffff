"""What a teacher cut to its top k says of the outcomes that two vocabularies share: some of them, and the rest.

Where both models start a token, the rest is one outcome more. A token among the k that has no outcome takes no part;
what the rest is made of is not known, so all of it is taken to have one. Where the teacher is asked how it would go on
behind bytes that it has written, how much of the rest would go on so is not known either: none is taken to, and the row
counts only if what is heard of it is at least as likely as all the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import Continuations
from sar_kd.data.batch import MASKED_LOGIT, TopKLogits
from sar_kd.losses.functional import GroupSums
from sar_kd.losses.projection.joint import Ways
from sar_kd.losses.projection.marginals import Fold

HEARD = 1e-6 * MASKED_LOGIT
"""What is above it was said."""


class Heard(NamedTuple):
    """Where both start a token: outcomes in a flat list, those of one column in any order, each once; and the rest."""

    columns: Tensor
    """int64 [E]"""
    outcomes: Tensor
    """int64 [E]; the number of outcomes there are, where the entry stands for none"""
    log_probs: Tensor
    """float32 [E]; about `MASKED_LOGIT` where the entry stands for none, or the teacher does not say it"""
    rest: Tensor
    """float32 [K], log-probability of all other outcomes of a column"""

    @property
    def are_heard(self) -> Tensor:
        """bool [E]"""
        return self.log_probs > HEARD


def heard_outcomes(top: TopKLogits, fold: Fold, temperature: float, ways: Ways | None = None) -> Heard:
    """What a teacher says of the outcomes.

    top: of the K columns where both start a token; ways: its other ways there, where its tokens are the longer ones
    """
    count = len(fold.first)
    classes, logits = _by_outcome(fold.outcomes_of(top.ids.T), top.logits.T / temperature, count)
    rest = top.rest / temperature
    totals = torch.logaddexp(logits.logsumexp(1), rest)
    ended, rest = (logits - totals[:, None]).where(logits > HEARD, MASKED_LOGIT), rest - totals
    numbers = torch.arange(len(classes), device=classes.device)
    columns = numbers.repeat_interleave(classes.shape[1])
    if ways is None:
        return Heard(columns, classes.reshape(-1), ended.reshape(-1), rest)
    flat, rest = (ended + ways.ends[:, None]).reshape(-1), rest + ways.ends
    keys = (numbers[:, None] * (count + 1) + classes).view(-1)  # ascending
    others, outcomes, continuations = ways.others
    wanted, more = others * (count + 1) + outcomes, ways.going_on[continuations]
    at = torch.searchsorted(keys, wanted).clamp_max(max(0, len(keys) - 1))
    is_there = keys[at] == wanted
    flat = torch.cat([flat, flat.new_zeros(1)])
    target = torch.where(is_there, at, len(keys))  # the last one is for those that are not
    flat = flat.index_put((target,), torch.where(is_there, torch.logaddexp(flat[at], more), 0.0))[:-1]
    return Heard(
        torch.cat([columns, others]),
        torch.cat([classes.reshape(-1), outcomes]),
        torch.cat([flat, torch.where(is_there, MASKED_LOGIT, more)]),
        rest,
    )


def _by_outcome(classes: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens' logits, [K, k], as those of their outcomes, likewise, in ascending order, `count` where there is none.

    classes: int64 [K, k], the outcome of each token, -1 for none
    """
    classes, order = torch.where(classes < 0, count, classes).contiguous().sort(1)
    logits = logits.gather(1, order).where(classes < count, MASKED_LOGIT)
    is_new = torch.ones_like(classes)
    is_new[:, 1:] = classes[:, 1:] != classes[:, :-1]
    width = classes.shape[1]
    places = is_new.cumsum(1) - 1 + width * torch.arange(len(classes), device=classes.device)[:, None]
    sums = GroupSums(places.view(-1), classes.numel()).logsumexp(logits.reshape(-1)).view_as(logits)
    found = torch.full_like(classes, count).view(-1).scatter_(0, places.view(-1), classes.view(-1))
    return found.view_as(classes), sums


def heard_entries(top: TopKLogits, rows: Continuations, num_rows: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits of the tokens that would go on, at the temperature, and which of the rows count.

    top: of the teacher, the coarser side of `rows`; num_rows: of its head
    Returns: float32 [E], of `coarse_entries`, `MASKED_LOGIT` where nothing was said; bool [K]
    """
    row, token, _ = rows.coarse_entries
    entries = top.logits_of(token, rows.coarse_rows[row], num_rows).div_(temperature)
    counts = GroupSums(row, len(rows.coarse_rows)).logsumexp(entries) >= top.rest[rows.coarse_rows] / temperature
    return entries.where(counts[row], MASKED_LOGIT), counts


def fine_columns(top: TopKLogits, num_rows: int, temperature: float) -> Tensor:
    """Whole columns of the teacher, at the temperature, with the rest as a token more: float32 [num_rows + 1, n]."""
    return torch.cat([top.spread(num_rows), top.rest[None]]).div_(temperature)

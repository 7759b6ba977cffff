"""Shared classes of a teacher truncated to its top k: the known classes, and the tail.

At a common boundary the tail, all other tokens, is one class more. A token of the top k without a class takes no part;
which tokens make up the tail is not known, so all of it is taken to have a class. After a prefix it is not known either
how much of the tail extends the prefix: none is taken to, and the continuation counts only if its known tokens are at
least as likely as the whole tail. A token of the text that ended at a common boundary is one token of the tail if it is
not among the k: it is taken to be as likely as it can be, as the k-th, or as the whole tail if that is less.

Drawn tokens (`CachedDraws`) have no tail, and the text's own token is always among them. Sums over classes at a common
boundary are linear in the teacher's distribution, so theirs are unbiased where every token of the teacher has a class.
Conditioning on a prefix divides by a sum of estimates, whose mean is not the quotient of the means: the bias falls as
1/k, and the draws favour tokens that share the text's bytes (`teacher.cache.draws`), which makes it small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import Continuations
from sar_kd.data.batch import TopKLogits
from sar_kd.losses.functional import GroupSums
from sar_kd.losses.projection.joint import ContinuationPaths
from sar_kd.losses.projection.marginals import BeforeLogits, ClassMap
from sar_kd.runtime.precision import MASKED_BELOW, MASKED_LOGIT


class SparseClasses(NamedTuple):
    """Known classes at K common boundaries in a flat list, in any order, each once; and the tail."""

    positions: Tensor
    """int64 [E]"""
    classes: Tensor
    """int64 [E]; the number of classes for an empty entry"""
    log_probs: Tensor
    """float32 [E]; about `MASKED_LOGIT` for an empty entry or a class that is not known"""
    tail: Tensor
    """float32 [K]: log-probability of all other classes of a position"""

    @property
    def is_known(self) -> Tensor:
        """bool [E]"""
        return self.log_probs > MASKED_BELOW


def known_classes(
    top: TopKLogits, class_map: ClassMap, temperature: float, paths: ContinuationPaths | None = None
) -> SparseClasses:
    """The shared classes of a truncated teacher.

    top: at the K common boundaries; paths: the teacher's continuations there, where its tokenizer is the coarser
    """
    num_classes = len(class_map.representatives)
    classes, logits = _sum_by_class(class_map.classes_of(top.ids.T), top.logits.T / temperature, num_classes)
    tail = top.tail_logsumexp / temperature
    totals = torch.logaddexp(logits.logsumexp(1), tail)
    log_probs, tail = (logits - totals[:, None]).where(logits > MASKED_BELOW, MASKED_LOGIT), tail - totals
    numbers = torch.arange(len(classes), device=classes.device)
    positions = numbers.repeat_interleave(classes.shape[1])
    if paths is None:
        return SparseClasses(positions, classes.reshape(-1), log_probs.reshape(-1), tail)
    end = paths.token_end_log_probs
    joint, tail = (log_probs + end[:, None]).reshape(-1), tail + end
    # A class that is known by both paths gets the sum; one that is known by its continuation only, an entry more.
    keys = (numbers[:, None] * (num_classes + 1) + classes).view(-1)  # ascending
    path_positions, path_classes, continuation_classes = paths.indices
    wanted, path_log_probs = path_positions * (num_classes + 1) + path_classes, paths.log_probs[continuation_classes]
    at = torch.searchsorted(keys, wanted).clamp_max(max(0, len(keys) - 1))
    is_there = keys[at] == wanted
    joint = torch.cat([joint, joint.new_zeros(1)])
    target = torch.where(is_there, at, len(keys))  # the last one is for those that are not there
    joint = joint.index_put((target,), torch.where(is_there, torch.logaddexp(joint[at], path_log_probs), 0.0))[:-1]
    return SparseClasses(
        torch.cat([positions, path_positions]),
        torch.cat([classes.reshape(-1), path_classes]),
        torch.cat([joint, torch.where(is_there, MASKED_LOGIT, path_log_probs)]),
        tail,
    )


def _sum_by_class(classes: Tensor, logits: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Tokens' logits, [K, k], as those of their classes, [K, k], classes ascending; `num_classes` for an empty entry.

    classes: int64 [K, k], the class of each token, -1 for none
    """
    classes, order = torch.where(classes < 0, num_classes, classes).contiguous().sort(1)
    logits = logits.gather(1, order).where(classes < num_classes, MASKED_LOGIT)
    is_new = torch.ones_like(classes)
    is_new[:, 1:] = classes[:, 1:] != classes[:, :-1]
    k = classes.shape[1]
    entries = is_new.cumsum(1) - 1 + k * torch.arange(len(classes), device=classes.device)[:, None]
    sums = GroupSums(entries.view(-1), classes.numel()).logsumexp(logits.reshape(-1)).view_as(logits)
    merged = torch.full_like(classes, num_classes).view(-1).scatter_(0, entries.view(-1), classes.view(-1))
    return merged.view_as(classes), sums


def known_entries(
    top: TopKLogits, continuations: Continuations, vocab_size: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits of the tokens that extend a prefix, divided by the temperature, and a mask of the continuations.

    top: of the teacher, the continuing side of `continuations`; vocab_size: of the teacher
    Returns: float32 [E], of `continuing_entries`, `MASKED_LOGIT` for what is not known; bool [K], the continuations
    whose known tokens are at least as likely as the tail
    """
    continuation, token, class_ = continuations.continuing_entries
    positions = continuations.continuing_positions
    entries = top.logits_of(token, positions[continuation], vocab_size).div_(temperature)
    least = (top.tail_logsumexp[positions] / temperature).clamp_min(MASKED_BELOW)
    mask = GroupSums(continuation, len(positions)).logsumexp(entries) >= least
    has_ended = (class_ == continuations.end_classes[continuation]) & (continuation >= continuations.num_inside)
    most = _most_likely_tail(top, positions, temperature)[continuation]
    entries = torch.where(has_ended & (entries < MASKED_BELOW), most, entries)
    return entries.where(mask[continuation], MASKED_LOGIT), mask


def known_before(
    top: TopKLogits, continuations: Continuations, vocab_size: int, temperature: float
) -> BeforeLogits | None:
    """The logits of the tokens before, as `known_entries`; None if the teacher has none in these continuations."""
    before = continuations.before
    if before is None or not len(before.continuations):
        return None
    index, token, _ = before.entries
    entries = top.logits_of(token, before.positions[index], vocab_size).div_(temperature)
    tokens = top.logits_of(before.tokens, before.positions, vocab_size).div_(temperature)
    tokens = torch.where(tokens < MASKED_BELOW, _most_likely_tail(top, before.positions, temperature), tokens)
    whole = torch.cat([top.logits, top.tail_logsumexp[None]])[
        :, continuations.continuing_positions[before.continuations]
    ]
    return BeforeLogits(entries, tokens, (whole / temperature).logsumexp(0))


def _most_likely_tail(top: TopKLogits, positions: Tensor, temperature: float) -> Tensor:
    """The largest logit that one token of the tail can have, divided by the temperature."""
    return torch.minimum(top.logits[-1], top.tail_logsumexp)[positions] / temperature


def dense_with_tail(top: TopKLogits, vocab_size: int, temperature: float) -> Tensor:
    """All logits of the teacher, divided by the temperature, with the tail as one token more: [vocab_size + 1, n]."""
    return torch.cat([top.to_dense(vocab_size), top.tail_logsumexp[None]]).div_(temperature)

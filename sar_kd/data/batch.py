"""A micro-batch: token ids and labels of both models, their alignment, and the one label shift of the package.

Also the few logits of each position that are kept of a teacher: its top k, cut from a tile or read from a teacher
cache, or tokens drawn from its distribution, which a batch may carry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import Alignment
from sar_kd.alignment.segments import Segment
from sar_kd.runtime.precision import MASKED_LOGIT
from sar_kd.tokenization.token_stream import TokenStream

IGNORE_INDEX = -100
"""Label of a position at which nothing is predicted."""


@dataclass(frozen=True)
class TokenBatch:
    """The input of one model: a start token, then the block's tokens, padded on the right.

    There is no attention mask: with padding on the right, a causal model's real positions never attend to it.
    """

    input_ids: Tensor
    """int64 [B, T]"""
    labels: Tensor
    """int64 [B, T], unshifted"""
    positions: Tensor
    """int64 [N]: positions of the flattened logits [B * T, V] that have a target"""
    targets: Tensor
    """int64 [N]: the target token of each"""
    groups: Tensor | None = None
    """int64 [G, N]: the groups of each whose losses are summed apart, as `Dataset.groups_of_targets`; in an evaluation
    only"""

    def to(self, device: torch.device) -> TokenBatch:
        return _to(self, device)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the same text for both models, and their alignment."""

    student: TokenBatch
    teacher: TokenBatch
    alignment: Alignment
    blocks: tuple[int, ...]
    """Indices of the blocks, to name the documents of a bad batch"""
    segments: tuple[Segment, ...] = ()
    """The alignment in parts that can be compared independently, for byte-prefix projection"""
    is_on_policy: bool = False
    """The text was sampled from the student: it takes part in distillation, not in cross-entropy"""
    cached_logits: CachedTokenLogits | None = None
    """The teacher's logits from a teacher cache; then the teacher is not run"""

    @property
    def num_target_tokens(self) -> int:
        return len(self.student.targets)

    def to(self, device: torch.device) -> Batch:
        return _to(self, device)


def _to(record, device: torch.device):
    """A copy of a dataclass with all of its tensors on `device`, those of nested dataclasses too."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            changed[item.name] = value.to(device, non_blocking=True)
        elif dataclasses.is_dataclass(value):
            changed[item.name] = _to(value, device)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            changed[item.name] = tuple(_to(each, device) for each in value)
    return dataclasses.replace(record, **changed)


def token_batch(stream: TokenStream, ranges: list[tuple[int, int]], beginnings: Sequence[Sequence[int]]) -> TokenBatch:
    """Ranges of a token stream as one padded batch, each after tokens of its own, of which the first one pads it."""
    width = max(len(first) + end - start for first, (start, end) in zip(beginnings, ranges, strict=True))
    input_ids = torch.tensor([first[0] for first in beginnings], dtype=torch.int64)[:, None].repeat(1, width)
    labels = torch.full((len(ranges), width), IGNORE_INDEX, dtype=torch.int64)
    for i, (start, end) in enumerate(ranges):
        ids = torch.from_numpy(stream.ids[start:end].astype(np.int64))
        is_target = torch.from_numpy(stream.is_target[start:end].copy())  # a memory-mapped array is read-only
        first = len(beginnings[i])
        input_ids[i, :first] = torch.tensor(beginnings[i])
        input_ids[i, first : first + len(ids)] = ids
        labels[i, first : first + len(ids)] = torch.where(is_target, ids, IGNORE_INDEX)
    return TokenBatch(input_ids, labels, *next_token_targets(labels))


def next_token_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of the flattened logits that have a target, and their targets. The one label shift.

    position b * T + t predicts labels[b, t + 1]

    labels: int64 [B, T], unshifted, IGNORE_INDEX where nothing is predicted
    Returns: positions int64 [N], ascending; targets int64 [N]
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    targets = targets.flatten()
    positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, targets[positions]


class TopKLogits(NamedTuple):
    """The teacher's k largest logits at n positions, and the logsumexp of all others (the tail).

    Or k tokens of which `CachedDraws` estimates the whole distribution: T * log of the estimates, and no tail.
    """

    ids: Tensor
    """int64 [k, n], each once at its position; the k largest by descending logit"""
    logits: Tensor
    """float32 [k, n], at each position up to a constant; 0 where the position is not finite"""
    tail_logsumexp: Tensor
    """float32 [n]: T * log sum exp(z / T) over all other tokens, up to the same constant, at the run's temperature T"""
    is_finite: Tensor
    """bool [n]: all logits of the position are finite"""
    weights: Tensor
    """float32 [n]: factor of the position's loss: 1, or the sum of the estimated probabilities, on average 1"""

    def truncate(self, k: int, temperature: float) -> TopKLogits:
        """Keep the first k; add the others to the tail."""
        if k >= len(self.ids):
            return self
        others = torch.cat([self.logits[k:], self.tail_logsumexp[None]]) / temperature
        tail = temperature * others.logsumexp(0)
        return self._replace(ids=self.ids[:k], logits=self.logits[:k], tail_logsumexp=tail)

    def slice(self, first: int, stop: int) -> TopKLogits:
        """Positions first to stop - 1."""
        return TopKLogits(*(part[..., first:stop] for part in self))

    def logits_of(self, tokens: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
        """Logits of single tokens, `MASKED_LOGIT` for a token that is not in the top k of its position.

        tokens, positions: int64 [E]; vocab_size: above every token id
        Returns: float32 [E]
        """
        ids, order = self.ids.T.contiguous().sort(1)
        keys = (vocab_size * torch.arange(len(ids), device=ids.device)[:, None] + ids).view(-1)
        wanted = vocab_size * positions + tokens
        at = torch.searchsorted(keys, wanted).clamp_max(max(0, len(keys) - 1))
        found = self.logits.T.gather(1, order).reshape(-1)[at]
        return torch.where(keys[at] == wanted, found, MASKED_LOGIT)

    def to_dense(self, vocab_size: int) -> Tensor:
        """A tile of logits, float32 [vocab_size, n], with `MASKED_LOGIT` for every token outside the top k."""
        tile = self.logits.new_full((vocab_size, self.logits.shape[1]), MASKED_LOGIT)
        return tile.scatter_(0, self.ids, self.logits)


@dataclass(frozen=True, kw_only=True)
class CachedTokenLogits:
    """A batch's teacher logits from a teacher cache, at its N positions with a target."""

    record_index: Tensor
    """int64 [B * T]: for each position of the flattened logits its record, 0 to N - 1; arbitrary without a target"""
    ids: Tensor
    """int32 [N, k]: the tokens that are kept"""
    max_log_probs: Tensor
    """float32 [N]: the largest log-probability, nats; NaN where the logits were not finite"""
    log_prob_gaps: Tensor
    """float16 or float32 [N, k]: each log-probability minus the largest, nats, at most 0; -inf for a masked token"""
    target_log_probs: Tensor
    """float32 [N]: log-probability of the target token, nats; -inf for a masked one"""
    temperature: float
    """T"""
    is_missing: bool = False
    """The cache has no record of this text"""

    requires_grad = False

    @property
    def is_finite(self) -> Tensor:
        """bool [N]: the logits were finite."""
        return self.max_log_probs.isfinite()

    def detach(self) -> CachedTokenLogits:
        """Itself: it has no graph."""
        return self

    def tile(self, positions: slice | Tensor) -> TopKLogits:
        """The logits at some positions of the flattened logits."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CachedTopK(CachedTokenLogits):
    """The k most likely tokens, by descending logit, and the mass of all others."""

    tail_log_ratios: Tensor
    """float16 [N]: log sum exp(z / T) over all other tokens, minus that over these k; -inf if all of them are masked"""

    def tile(self, positions: slice | Tensor) -> TopKLogits:
        records = self.record_index[positions]
        max_log_probs = self.max_log_probs[records]
        is_finite = max_log_probs.isfinite()
        log_probs = self.log_prob_gaps[records].float() + max_log_probs[:, None]
        logits = log_probs.clamp_min(MASKED_LOGIT).where(is_finite[:, None], 0.0).T.contiguous()
        tail = self.tail_log_ratios[records].float().where(is_finite, 0.0) + (logits / self.temperature).logsumexp(0)
        tail = (tail * self.temperature).clamp_min(MASKED_LOGIT)
        return TopKLogits(self.ids[records].T.long(), logits, tail, is_finite, torch.ones_like(tail))


@dataclass(frozen=True, kw_only=True)
class CachedDraws(CachedTokenLogits):
    """k tokens drawn from the teacher's distribution t, and the target: an unbiased estimate of t at temperature T.

    estimate of t(v) = t(v) * number of draws of v / expected number;   of the target t(v) itself;   of all others 0

    Tokens that were not drawn have log-probability -inf. Whatever is linear in t has the estimate's as its mean:
    the gradient of the forward KL is. The sum of an estimate is 1 on average.
    """

    log_factors: Tensor
    """float32 [N, k]: log of the number of draws over the expected number"""
    log_sums: Tensor
    """float32 [N]: log sum exp((z - max z) / T) over the vocabulary"""
    targets: Tensor
    """int32 [N]: the target token, which is none of the k"""

    def tile(self, positions: slice | Tensor) -> TopKLogits:
        records = self.record_index[positions]
        largest = self.max_log_probs[records]
        is_finite = largest.isfinite()
        drawn = self.log_prob_gaps[records].float() / self.temperature + self.log_factors[records]
        target = (self.target_log_probs[records] - largest) / self.temperature
        log_probs = torch.cat([drawn, target[:, None]], 1) - self.log_sums[records, None]
        logits = (self.temperature * log_probs).clamp_min(MASKED_LOGIT).where(is_finite[:, None], 0.0).T.contiguous()
        ids = torch.cat([self.ids[records], self.targets[records, None]], 1).T.long()
        no_tail = torch.full_like(largest, MASKED_LOGIT)
        return TopKLogits(ids, logits, no_tail, is_finite, log_probs.exp().sum(1).where(is_finite, 1.0))

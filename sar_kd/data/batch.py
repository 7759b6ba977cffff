"""A micro-batch: the token ids and labels of both models, their alignment, and the one label shift."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import Alignment
from sar_kd.alignment.segments import Segment
from sar_kd.tokenization.token_stream import TokenStream


@dataclass(frozen=True)
class TokenBatch:
    """What one model reads: start token, then the block's tokens, right padded.

    There is no attention mask: with padding on the right a causal model's real positions never see it.
    """

    input_ids: Tensor
    """int64 [B, T]"""
    labels: Tensor
    """int64 [B, T], unshifted"""
    rows: Tensor
    """int64 [N]: rows of the flattened logits that predict something"""
    targets: Tensor
    """int64 [N]: what they predict"""

    def to(self, device: torch.device) -> TokenBatch:
        return _moved(self, device)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the same text for both models, and which teacher row speaks about which student row."""

    student: TokenBatch
    teacher: TokenBatch
    alignment: Alignment
    blocks: tuple[int, ...]
    """Which blocks these are, for naming the documents of a bad batch."""
    segments: tuple[Segment, ...] = ()
    """The alignment in parts that can be compared alone, where distributions are carried over."""
    is_on_policy: bool = False
    """What is predicted is the student's own text: it is compared with the teacher, and learned from no further."""
    stored: CachedTopK | None = None
    """What the teacher said of its rows, where that is kept; then nobody asks it."""

    @property
    def num_target_tokens(self) -> int:
        return len(self.student.targets)

    def to(self, device: torch.device) -> Batch:
        return _moved(self, device)


def _moved(record, device: torch.device):
    """The same record with its tensors, and its records' tensors, on `device`."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            changed[item.name] = value.to(device, non_blocking=True)
        elif dataclasses.is_dataclass(value):
            changed[item.name] = _moved(value, device)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            changed[item.name] = tuple(_moved(each, device) for each in value)
    return dataclasses.replace(record, **changed)


def token_batch(stream: TokenStream, ranges: list[tuple[int, int]], start_id: int) -> TokenBatch:
    """Ranges of a token stream as one padded batch, each behind a start token."""
    width = 1 + max(end - start for start, end in ranges)
    input_ids = torch.full((len(ranges), width), start_id, dtype=torch.int64)
    labels = torch.full((len(ranges), width), IGNORE_INDEX, dtype=torch.int64)
    for row, (start, end) in enumerate(ranges):
        ids = torch.from_numpy(stream.ids[start:end].astype(np.int64))
        is_target = torch.from_numpy(stream.is_target[start:end].copy())  # a file's array is read only
        input_ids[row, 1 : 1 + len(ids)] = ids
        labels[row, 1 : 1 + len(ids)] = torch.where(is_target, ids, IGNORE_INDEX)
    return TokenBatch(input_ids, labels, *next_token_targets(labels))


IGNORE_INDEX = -100
"""Label of a position at which nothing is predicted."""


def next_token_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of flattened logits that predict something, and what they predict. The one label shift.

    row b * T + t predicts labels[b, t + 1]

    labels: int64 [B, T], unshifted, IGNORE_INDEX where nothing is predicted
    Returns: rows int64 [N], ascending; targets int64 [N]
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    targets = targets.flatten()
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return rows, targets[rows]


MASKED_LOGIT = -1e30
"""The logit of an outcome that takes no part: finite, so that 0 * ABSENT is 0, and its probability is exactly 0."""


class TopKLogits(NamedTuple):
    """The k likeliest tokens of n teacher rows, a column each."""

    ids: Tensor
    """int64 [k, n], the likeliest first"""
    logits: Tensor
    """float32 [k, n], each column up to a constant; 0 where it is not sound"""
    rest: Tensor
    """float32 [n]: T * log sum exp(z / T) of all other tokens, in the same units, at the run's temperature T"""
    sound: Tensor
    """bool [n]: the row's logits are finite, every one"""

    def first(self, k: int, temperature: float) -> TopKLogits:
        """The k likeliest of these; the others are of the rest."""
        if k >= len(self.ids):
            return self
        others = torch.cat([self.logits[k:], self.rest[None]]) / temperature
        rest = temperature * others.logsumexp(0)
        return self._replace(ids=self.ids[:k], logits=self.logits[:k], rest=rest)

    def columns(self, first: int, stop: int) -> TopKLogits:
        """Some of the columns."""
        return TopKLogits(*(part[..., first:stop] for part in self))

    def logits_of(self, tokens: Tensor, columns: Tensor, size: int) -> Tensor:
        """Logits of single tokens, `MASKED_LOGIT` for one that is not among the likeliest of its column.

        tokens, columns: int64 [E]; size: more than any token
        Returns: float32 [E]
        """
        ids, order = self.ids.T.contiguous().sort(1)
        keys = (size * torch.arange(len(ids), device=ids.device)[:, None] + ids).view(-1)
        wanted = size * columns + tokens
        at = torch.searchsorted(keys, wanted).clamp_max(max(0, len(keys) - 1))
        found = self.logits.T.gather(1, order).reshape(-1)[at]
        return torch.where(keys[at] == wanted, found, MASKED_LOGIT)

    def spread(self, num_rows: int) -> Tensor:
        """A tile of logits, float32 [num_rows, n], in which every other token is `MASKED_LOGIT`."""
        tile = self.logits.new_full((num_rows, self.logits.shape[1]), MASKED_LOGIT)
        return tile.scatter_(0, self.ids, self.logits)


@dataclass(frozen=True)
class CachedTopK:
    """What a teacher once said where a batch's rows predict something; stands for its readout."""

    places: Tensor
    """int64 [B * T]: by row of the flattened logits, which of the N below it is; anything where it is none"""
    ids: Tensor
    """int32 [N, k], the likeliest first"""
    peaks: Tensor
    """float32 [N]: log-probability of the likeliest; nan for a row that was not finite"""
    gaps: Tensor
    """float16 [N, k]: how much smaller the log-probability of each is, nats, at most 0"""
    log_probs: Tensor
    """float32 [N]: of what the row predicts, nats"""
    rests: Tensor
    """float16 [N]: log sum exp(z / T) of all other tokens, minus that of these k"""
    temperature: float
    """T"""

    learns = False

    def detach(self) -> CachedTopK:
        """The same; there is no graph."""
        return self

    def tile(self, rows: slice | Tensor) -> TopKLogits:
        """The top of some rows of the flattened logits."""
        places = self.places[rows]
        peaks = self.peaks[places]
        sound = peaks.isfinite()
        logits = (self.gaps[places].float() + peaks[:, None]).where(sound[:, None], 0.0).T.contiguous()
        rest = self.rests[places].float().where(sound, 0.0) + (logits / self.temperature).logsumexp(0)
        return TopKLogits(self.ids[places].T.long(), logits, rest * self.temperature, sound)

    def target_log_probs(self) -> tuple[Tensor, Tensor]:
        """log p of what each row predicts, float32 [N], and whether the row was finite, bool [N]."""
        return self.log_probs, self.peaks.isfinite()

"""The likeliest tokens of teacher rows: cut from logits that are there, or as they were stored before.

A teacher cut to its top k is a distribution over k + 1 outcomes: those tokens, and the rest. Logits are known up to a
constant of the row, so log-probabilities at temperature 1 serve for the k tokens at every temperature; the rest at a
temperature is a number of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.columns import column_logsumexp, finite_columns
from sar_kd.losses import ABSENT


class Top(NamedTuple):
    """The k likeliest tokens of n teacher rows, a column each."""

    ids: Tensor
    """int64 [k, n], the likeliest first"""
    logits: Tensor
    """float32 [k, n], each column up to a constant; 0 where it is not sound"""
    rest: Tensor
    """float32 [n]: T * log sum exp(z / T) of all other tokens, in the same units, at the run's temperature T"""
    sound: Tensor
    """bool [n]: the row's logits are finite, every one"""

    def first(self, k: int, temperature: float) -> Top:
        """The k likeliest of these; the others are of the rest."""
        if k >= len(self.ids):
            return self
        others = torch.cat([self.logits[k:], self.rest[None]]) / temperature
        rest = temperature * others.logsumexp(0)
        return self._replace(ids=self.ids[:k], logits=self.logits[:k], rest=rest)

    def columns(self, first: int, stop: int) -> Top:
        """Some of the columns."""
        return Top(*(part[..., first:stop] for part in self))

    def logits_of(self, tokens: Tensor, columns: Tensor, size: int) -> Tensor:
        """Logits of single tokens, `ABSENT` for one that is not among the likeliest of its column.

        tokens, columns: int64 [E]; size: more than any token
        Returns: float32 [E]
        """
        ids, order = self.ids.T.contiguous().sort(1)
        keys = (size * torch.arange(len(ids), device=ids.device)[:, None] + ids).view(-1)
        wanted = size * columns + tokens
        at = torch.searchsorted(keys, wanted).clamp_max(max(0, len(keys) - 1))
        found = self.logits.T.gather(1, order).reshape(-1)[at]
        return torch.where(keys[at] == wanted, found, ABSENT)

    def spread(self, num_rows: int) -> Tensor:
        """A tile of logits, float32 [num_rows, n], in which every other token is `ABSENT`."""
        tile = self.logits.new_full((num_rows, self.logits.shape[1]), ABSENT)
        return tile.scatter_(0, self.ids, self.logits)


def top_of(tile: Tensor, k: int, num_tokens: int, temperature: float) -> Top:
    """The k likeliest of a vocabulary's tokens, and the rest.

    tile: float32 [V, n], logits; num_tokens: rows of it that stand for tokens, the others are a head's padding
    """
    sound = finite_columns(tile)
    best = tile[:num_tokens].topk(min(k, num_tokens), dim=0)
    rest = temperature * column_logsumexp(tile.scatter(0, best.indices, ABSENT), temperature)
    return Top(best.indices, best.values.where(sound, 0.0), rest.where(sound, 0.0), sound)


@dataclass(frozen=True)
class StoredRows:
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

    def detach(self) -> StoredRows:
        """The same; there is no graph."""
        return self

    def tile(self, rows: slice | Tensor) -> Top:
        """The top of some rows of the flattened logits."""
        places = self.places[rows]
        peaks = self.peaks[places]
        sound = peaks.isfinite()
        logits = (self.gaps[places].float() + peaks[:, None]).where(sound[:, None], 0.0).T.contiguous()
        rest = self.rests[places].float().where(sound, 0.0) + (logits / self.temperature).logsumexp(0)
        return Top(self.ids[places].T.long(), logits, rest * self.temperature, sound)

    def target_log_probs(self) -> tuple[Tensor, Tensor]:
        """log p of what each row predicts, float32 [N], and whether the row was finite, bool [N]."""
        return self.log_probs, self.peaks.isfinite()


@dataclass(frozen=True)
class StoredTeacher:
    """What must be known of a teacher whose answers are stored, and which is not loaded."""

    num_rows: int
    """Rows of its head"""
    stop_ids: tuple[int, ...]
    limit: int
    """Most tokens that it read at once, start token included"""

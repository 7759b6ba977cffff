"""From the logits of a vocabulary's tokens to those of the outcomes that two vocabularies share, and back."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from sar_kd.divergence import exp_
from sar_kd.losses import ABSENT

warnings.filterwarnings("ignore", message="index_reduce")  # "in beta" for years; its substitute is many times slower


class Fold(nn.Module):
    """How the tokens of one vocabulary make up the outcomes where both tokenizers start a token.

    One token of each outcome, its first, may stand for all of them: then the tokens' own logits are those of the
    outcomes, but for the few that have several tokens.
    """

    first: Tensor
    """int64 [C]: a token of each outcome"""
    place: Tensor
    """int64 [C]: which of the S below it is, -1 for none"""
    several: Tensor
    """int64 [S]: the outcomes of more than one token"""
    members: Tensor
    """int64 [J]: the tokens of those"""
    groups: Tensor
    """int64 [J]: which of the S"""
    outcome: Tensor
    """int64, by token"""
    absent: Tensor
    """int64: tokens without an outcome"""
    silent: Tensor
    """int64: tokens for which another one stands, or none"""

    def __init__(self, tokens: Tensor, classes: Tensor, count: int):
        """tokens, classes: int64 [M], the tokens that take part and the class of each; every class has at least one"""
        super().__init__()
        sizes = torch.bincount(classes, minlength=count)
        joined = sizes[classes] > 1
        several = torch.arange(count)[sizes > 1]
        outcome = torch.full((int(tokens.max()) + 1,), -1).index_copy_(0, tokens, classes)
        first = tokens[classes.argsort(stable=True)[sizes.cumsum(0) - sizes]]
        silent = torch.ones(len(outcome), dtype=torch.bool).index_fill_(0, first, False)
        place = torch.full((count,), -1).index_copy_(0, several, torch.arange(len(several)))
        parts = {
            "first": first,
            "place": place,
            "several": several,
            "members": tokens[joined],
            "groups": torch.searchsorted(several, classes[joined]),
            "outcome": outcome.clamp_min(0),
            "absent": torch.arange(len(outcome))[outcome < 0],
            "silent": torch.arange(len(outcome))[silent],
        }
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)
        self._room = torch.empty(0)

    def __len__(self) -> int:
        """Tokens up to the last that takes part."""
        return len(self.outcome)

    def outcomes_of(self, ids: Tensor) -> Tensor:
        """The outcome of each token, of the shape of `ids`; -1 for none."""
        known = torch.full((len(self) + 1,), -1, device=ids.device)  # behind the last: every token beyond
        known[:-1] = self.outcome
        known[self.absent] = -1
        return known[ids.clamp_max(len(self))]

    def beyond(self, num_rows: int) -> Tensor:
        """The rows of a head with so many that are behind the last token that takes part."""
        return torch.arange(len(self), max(len(self), num_rows), device=self.first.device)

    def several_of(self, columns: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The outcomes of several tokens: their logits, y[s, k] = T * log sum over v of s of exp(z[v, k] / T), and each
        token's share of its outcome.

        columns: float32 [V, K]
        Returns: float32 [S, K] and [J, K]
        """
        shares = columns.index_select(0, self.members)
        if temperature != 1.0:
            shares.div_(temperature)
        # By each class's own maximum: its probability may underflow beside the column's.
        peaks = shares.new_full((len(self.several), columns.shape[1]), -torch.inf)
        peaks.index_reduce_(0, self.groups, shares, "amax")
        exp_(shares.sub_(peaks.index_select(0, self.groups)))
        totals = torch.zeros_like(peaks).index_add_(0, self.groups, shares)
        shares.div_(totals.index_select(0, self.groups))
        return peaks.add_(totals.log_()).mul_(temperature), shares

    def enter_(self, columns: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Turn logits of tokens, float32 [V, K], into those of the outcomes, each in the row of its first token; the
        other rows are `ABSENT`.

        Returns: what `leave_` wants, and the shares of `several_of`
        """
        values, shares = self.several_of(columns, temperature)
        kept = columns.index_select(0, torch.cat([self.silent, self.leaders]))
        columns.index_fill_(0, self.silent, ABSENT)
        columns.index_copy_(0, self.leaders, values)
        return kept, shares

    def leave_(self, columns: Tensor, kept: Tensor) -> None:
        """Put the logits of tokens back."""
        columns.index_copy_(0, torch.cat([self.silent, self.leaders]), kept)

    def spread_(self, slopes: Tensor, shares: Tensor) -> None:
        """From slopes of outcomes, each in the row of its first token, to those of tokens."""
        if len(self.members):
            slopes.index_copy_(0, self.members, slopes.index_select(0, self.leaders[self.groups]).mul_(shares))

    @property
    def leaders(self) -> Tensor:
        """int64 [S]: the first tokens of the outcomes of several."""
        return self.first[self.several]

    def carry(self, other: Fold, columns: Tensor, temperature: float) -> Tensor:
        """Logits of the other vocabulary's tokens as those of outcomes, in the rows of this one's first tokens.

        columns: float32 [V_o, K]
        Returns: float32 [V, K], good until the next call; rows without an outcome are `ABSENT`
        """
        size = len(self) * columns.shape[1]
        if len(self._room) < size or self._room.device != columns.device:
            self._room = columns.new_empty(size)  # kept: on a CPU memory that is new costs more than what is done in it
        carried = self._room[:size].view(len(self), columns.shape[1])
        torch.index_select(columns, 0, other.first[self.outcome], out=carried)
        values, _ = other.several_of(columns, temperature)
        carried.index_copy_(0, self.first[other.several], values)
        return carried.index_fill_(0, self.silent, ABSENT)

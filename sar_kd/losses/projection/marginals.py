"""From the logits of a vocabulary's tokens to those of the outcomes that two vocabularies share, and back.

Two distributions over different vocabularies, compared on the outcomes that both can tell apart.

An outcome is a class of tokens: of the finer vocabulary, one token (and what only begins with it); of the coarser
one, every token that the finer would begin with that token (`vocabulary.VocabularyMap` draws the classes). A token
without a class takes no part, so nothing is pushed down because the other vocabulary lacks it. With equal
vocabularies every class is one token and this is the token-level divergence.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sar_kd.alignment.batch_alignment import Continuations
from sar_kd.data.batch import MASKED_LOGIT
from sar_kd.losses.functional import GroupSums
from sar_kd.models.logit_tiles import exp_

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
        other rows are `MASKED_LOGIT`.

        Returns: what `leave_` wants, and the shares of `several_of`
        """
        values, shares = self.several_of(columns, temperature)
        kept = columns.index_select(0, torch.cat([self.silent, self.leaders]))
        columns.index_fill_(0, self.silent, MASKED_LOGIT)
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
        Returns: float32 [V, K], good until the next call; rows without an outcome are `MASKED_LOGIT`
        """
        size = len(self) * columns.shape[1]
        if len(self._room) < size or self._room.device != columns.device:
            self._room = columns.new_empty(size)  # kept: on a CPU memory that is new costs more than what is done in it
        carried = self._room[:size].view(len(self), columns.shape[1])
        torch.index_select(columns, 0, other.first[self.outcome], out=carried)
        values, _ = other.several_of(columns, temperature)
        carried.index_copy_(0, self.first[other.several], values)
        return carried.index_fill_(0, self.silent, MASKED_LOGIT)


class Reading(NamedTuple):
    """What is asked of one model's tile of logits, at the temperature; float32."""

    open: Tensor
    """[C, K]: logits of the outcomes where both start a token, y[c, k] = log sum over v of c of exp(z[v, k] / T)"""
    rows: Tensor
    """[V, K_1]: whole columns, where the other side is the coarser and goes on"""
    entries: Tensor
    """[E]: single logits, where this side is the coarser and might go on: the `coarse_entries`"""


def read(
    tile: Tensor, fold: Fold, num_open: int, num_inside: int, inside_own: Continuations, temperature: float
) -> Reading:
    """Take from one model's logits all that the projection needs, with one gradient for all of it.

    tile: float32 [V, n], first the columns where both start a token, then those where the other side is the coarser and
    goes on, then any others; num_open, num_inside: K and K_1
    inside_own: the continuations in which this side is the coarser
    """
    row, token, _ = inside_own.coarse_entries
    places = token * tile.shape[1] + inside_own.coarse_rows[row]
    return Reading(*_Read.apply(tile, fold, num_open, num_inside, places, temperature))


class _Read(torch.autograd.Function):
    """dz[v, k] = dy[c(v), k] * exp(z[v, k] / T - y[c(v), k]) / T, and what comes from whole columns and entries.

    One buffer for the gradient, and shares only where a class has several tokens: passes over [V, n] are what this
    costs.
    """

    @staticmethod
    def forward(ctx, tile, fold: Fold, num_open: int, num_inside: int, places, temperature: float):
        ctx.shape, ctx.fold, ctx.temperature = (*tile.shape, num_open, num_inside), fold, temperature
        taken, inside = tile[:, :num_open], tile[:, num_open : num_open + num_inside]
        outcomes = taken.index_select(0, fold.first)
        values, shares = fold.several_of(taken, temperature)
        outcomes.index_copy_(0, fold.several, values)
        entries, inside = tile.view(-1).index_select(0, places), inside.contiguous()
        if temperature != 1.0:
            for part in (outcomes, entries, inside):
                part.div_(temperature)
        ctx.save_for_backward(places, shares)
        return outcomes, inside, entries

    @staticmethod
    def backward(ctx, grad_open: Tensor, grad_inside: Tensor, grad_entries: Tensor):
        places, shares = ctx.saved_tensors
        (size, width, num_open, num_inside), fold = ctx.shape, ctx.fold
        grad = grad_open.new_zeros(size, width)
        columns = grad[: len(fold.outcome), :num_open]
        columns.copy_(grad_open.index_select(0, fold.outcome))
        columns.index_copy_(
            0, fold.members, grad_open.index_select(0, fold.several).index_select(0, fold.groups).mul_(shares)
        )
        columns.index_fill_(0, fold.absent, 0.0)
        grad[:, num_open : num_open + num_inside] = grad_inside
        grad.view(-1).index_add_(0, places, grad_entries)
        return grad if ctx.temperature == 1.0 else grad.div_(ctx.temperature), *[None] * 5


def coarse_log_probs(entries: Tensor, rows: Continuations) -> Tensor:
    """Log-probabilities of the coarser side: softmax over the tokens that extend the written bytes and the one that ends
    there. A row of which a cut to the top k left nothing counts as one that ends.

    entries: float32 [E], the logits of `coarse_entries`
    Returns: float32 [O]; about `MASKED_LOGIT` where an outcome cannot be
    """
    outcomes = GroupSums(rows.coarse_entries[2], len(rows.outcome_rows)).logsumexp(entries)
    totals = GroupSums(rows.outcome_rows, len(rows.ends)).logsumexp(outcomes)
    unknown = totals < 1e-6 * MASKED_LOGIT
    log_probs = outcomes - totals.masked_fill(unknown, 0.0)[rows.outcome_rows]
    return log_probs.index_fill(0, rows.ends, 0.0).where(unknown[rows.outcome_rows], log_probs)


def fine_log_probs(logits: Tensor, rows: Continuations, must_end: bool) -> Tensor:
    """Log-probabilities of the finer side in the first K_1 rows: softmax over its whole vocabulary, where all that
    goes on with none of a row's tokens counts for the end.

    Where the coarser side has no token that ends there, only the other outcomes take part if `must_end` (the end would
    face a probability of 0), and the whole vocabulary if not.

    logits: float32 [V, K_1]
    Returns: float32 [O_1], of the outcomes of the first K_1 rows; about `MASKED_LOGIT` where an outcome cannot be
    """
    size = logits.shape[1]
    ends = rows.ends[:size]
    of_rows = rows.outcome_rows[: rows.num_going_on]
    segments = GroupSums(of_rows, size)
    row, token, outcome = rows.fine_entries
    places, flat = token * size + row, logits.view(-1)
    outcomes = GroupSums(outcome, len(of_rows)).logsumexp(flat.index_select(0, places))
    # From what is left, not as 1 minus the others: a student that is certain to go on must still be told to end.
    end = flat.scatter(0, places, MASKED_LOGIT).view_as(logits).logsumexp(0)
    if must_end:
        end = torch.where(rows.can_end, end, MASKED_LOGIT)
    outcomes = outcomes.index_copy(0, ends, end)
    return torch.where(outcomes > 1e-6 * MASKED_LOGIT, outcomes - segments.logsumexp(outcomes)[of_rows], MASKED_LOGIT)


def on_support(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's logits without the outcomes of which a teacher cut to its top k says nothing (`MASKED_LOGIT`).

    Both are then renormalised on the rest, so that nothing is pushed down because the teacher did not say it.
    """
    return torch.where(teacher > 1e-6 * MASKED_LOGIT, student, MASKED_LOGIT)


def renormalised(student: Tensor, teacher: Tensor, rows: GroupSums | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Both with each row's probabilities adding up to 1, and the rows, bool [K], of which both leave something.

    student, teacher: float [C, K], or [O] with `rows`
    """
    totals = [side.logsumexp(0) if rows is None else rows.logsumexp(side) for side in (student, teacher)]
    shared = torch.minimum(*totals) > 1e-6 * MASKED_LOGIT
    student, teacher = (side - _spread(total, rows) for side, total in zip((student, teacher), totals, strict=True))
    keep = _spread(shared, rows)
    return student.where(keep, 0.0), teacher.where(keep, 0.0), shared


def _spread(values: Tensor, rows: GroupSums | None) -> Tensor:
    return values if rows is None else values[rows.index]

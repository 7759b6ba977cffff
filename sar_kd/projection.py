"""Two distributions over different vocabularies, compared on the outcomes that both can tell apart.

An outcome is a class of tokens: of the poorer vocabulary, one token (and what only begins with it); of the richer
one, every token that the poorer would begin with that token (`vocabulary.VocabularyMap` draws the classes). A token
without a class takes no part, so nothing is pushed down because the other vocabulary lacks it. With equal
vocabularies every class is one token and this is the token-level divergence.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sar_kd.losses import ABSENT, Segments

warnings.filterwarnings("ignore", message="index_reduce")  # "in beta" for years; its substitute is many times slower


@dataclass(frozen=True)
class OpenClasses:
    """The classes where both tokenizers start a token: the same for every such row."""

    count: int
    student_tokens: Tensor
    """int64 [M_s]: student ids that take part, ascending"""
    student_classes: Tensor
    """int64 [M_s]: the class of each; every class has at least one"""
    teacher_tokens: Tensor
    """int64 [M_t]"""
    teacher_classes: Tensor
    """int64 [M_t]"""


@dataclass(frozen=True)
class Continuations:
    """Rows where one tokenizer starts a token behind bytes with which the other, the richer, may not be done.

    The row of the richer side is the one that predicted the token to which those bytes belong, and is conditioned on
    them: it goes on with one of the tokens that extend them, or ends there. Each row has its own outcomes, numbered
    through all rows; the last of a row is that the token ends.

    In the first K_1 of the K rows it goes on in the text, and only the poorer side starts a token. In the others both
    do, and the row only tells what the richer side might have written instead.
    """

    rich_rows: Tensor
    """int64 [K]"""
    poor_rows: Tensor
    """int64 [K_1]: both count the student's N rows, or the rows of the teacher's flattened logits"""
    rich_entries: Tensor
    """int64 [3, E]: row, id, outcome"""
    poor_entries: Tensor
    """int64 [3, E']: the same of the first K_1 rows; no token stands for the end, which is whatever else may begin"""
    outcome_rows: Tensor
    """int64 [O]: the row of each outcome, ascending"""
    ends: Tensor
    """int64 [K]: the last outcome of each row"""
    can_end: Tensor
    """bool [K_1]: the richer vocabulary has a token that ends there"""
    num_going_on: int
    """O_1: outcomes of the first K_1 rows"""


class Fold(nn.Module):
    """How the tokens of one vocabulary make up the outcomes where both tokenizers start a token."""

    def __init__(self, tokens: Tensor, classes: Tensor, count: int):
        """tokens, classes: int64 [M], the tokens that take part and the class of each; every class has at least one"""
        super().__init__()
        sizes = torch.bincount(classes, minlength=count)
        joined = sizes[classes] > 1
        several = torch.arange(count)[sizes > 1]
        outcome = torch.full((int(tokens.max()) + 1,), -1).index_copy_(0, tokens, classes)
        parts = {
            "first": tokens[classes.argsort(stable=True)[sizes.cumsum(0) - sizes]],  # [C]: a token of each
            "several": several,  # [S]: the outcomes of more than one token
            "members": tokens[joined],  # [J]: the tokens of those
            "groups": torch.searchsorted(several, classes[joined]),  # [J]: which of the S
            "outcome": outcome.clamp_min(0),  # by token
            "absent": torch.arange(len(outcome))[outcome < 0],  # tokens without an outcome
        }
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)


class Reading(NamedTuple):
    """What a batch asks of one model, at the temperature; float32."""

    open: Tensor
    """[K, C]: logits of the outcomes where both start a token, y[k, c] = log sum over v of c of exp(z[k, v] / T)"""
    rows: Tensor
    """[K_1, V]: whole rows, where the other side is the richer and goes on"""
    entries: Tensor
    """[E]: single logits, where this side is the richer and might go on: the `rich_entries`"""


def read(
    logits: Tensor,
    fold: Fold,
    open_rows: Tensor,
    inside_other: Continuations,
    inside_own: Continuations,
    temperature: float,
    sound: Tensor | None = None,
) -> Reading:
    """Take from one model's logits all that the projection needs, with one gradient for all of it.

    logits: float [N, V]; open_rows: int64 [K], each once
    inside_other, inside_own: the continuations in which this side is the poorer, and the richer
    sound: bool [N], rows that are finite, None for all; the others are read as zeros
    """
    row, token, _ = inside_own.rich_entries
    places = inside_own.rich_rows[row] * logits.shape[1] + token
    return Reading(*_Read.apply(logits, sound, fold, open_rows, inside_other.poor_rows, places, temperature))


class _Read(torch.autograd.Function):
    """dz[k, v] = dy[k, c(v)] * exp(z[k, v] / T - y[k, c(v)]) / T, and what comes from rows and entries.

    One buffer for the gradient, and columns copied only where a class has one token: passes over [N, V] are what this
    costs.
    """

    @staticmethod
    def forward(ctx, logits, sound, fold: Fold, open_rows, whole_rows, places, temperature: float):
        ctx.like, ctx.fold, ctx.temperature = (logits.shape, logits.dtype), fold, temperature

        def at_temperature(values: Tensor, rows: Tensor) -> Tensor:
            if sound is not None:
                values.masked_fill_(~sound[rows].view(-1, *[1] * (values.dim() - 1)), 0.0)
            return values.float().div_(temperature) if temperature != 1.0 else values.float()

        taken = at_temperature(logits.index_select(0, open_rows), open_rows)
        outcomes = taken.index_select(1, fold.first)
        # Rows are added many times faster than columns.
        shares = taken.index_select(1, fold.members).T.contiguous()
        # By each class's own maximum: its probability may underflow beside the row's.
        peaks = shares.new_full((len(fold.several), shares.shape[1]), -torch.inf)
        peaks.index_reduce_(0, fold.groups, shares, "amax")
        shares.sub_(peaks.index_select(0, fold.groups)).exp_()
        totals = torch.zeros_like(peaks).index_add_(0, fold.groups, shares)
        shares.div_(totals.index_select(0, fold.groups))
        outcomes.index_copy_(1, fold.several, peaks.add_(totals.log_()).T)
        ctx.save_for_backward(sound, open_rows, whole_rows, places, shares)
        whole = at_temperature(logits.index_select(0, whole_rows), whole_rows)
        entries = at_temperature(logits.flatten().index_select(0, places), places // logits.shape[1])
        return outcomes, whole, entries

    @staticmethod
    def backward(ctx, grad_open: Tensor, grad_whole: Tensor, grad_entries: Tensor):
        sound, open_rows, whole_rows, places, shares = ctx.saved_tensors
        (shape, dtype), fold = ctx.like, ctx.fold
        columns = grad_open.index_select(1, fold.outcome)
        joined = grad_open.index_select(1, fold.several).index_select(1, fold.groups).mul_(shares.T)
        columns.index_copy_(1, fold.members, joined).index_fill_(1, fold.absent, 0.0)
        grad = grad_open.new_zeros(shape)
        grad[:, : len(fold.outcome)].index_copy_(0, open_rows, columns)
        grad.index_add_(0, whole_rows, grad_whole)
        grad.view(-1).index_add_(0, places, grad_entries)
        if ctx.temperature != 1.0:
            grad.div_(ctx.temperature)
        if sound is not None:
            grad.masked_fill_(~sound[:, None], 0.0)
        return grad.to(dtype), *[None] * 6


def rich_log_probs(entries: Tensor, rows: Continuations) -> Tensor:
    """Log-probabilities of the richer side: softmax over the tokens that extend the written bytes and the one that ends
    there. A row of which a cut to the top k left nothing counts as one that ends.

    entries: float32 [E], the logits of `rich_entries`
    Returns: float32 [O]; about `ABSENT` where an outcome cannot be
    """
    outcomes = Segments(rows.rich_entries[2], len(rows.outcome_rows)).logsumexp(entries)
    totals = Segments(rows.outcome_rows, len(rows.ends)).logsumexp(outcomes)
    unknown = totals < 1e-6 * ABSENT
    log_probs = outcomes - totals.masked_fill(unknown, 0.0)[rows.outcome_rows]
    return log_probs.index_fill(0, rows.ends, 0.0).where(unknown[rows.outcome_rows], log_probs)


def poor_log_probs(logits: Tensor, rows: Continuations, must_end: bool) -> Tensor:
    """Log-probabilities of the poorer side in the first K_1 rows: softmax over its whole vocabulary, where all that
    goes on with none of a row's tokens counts for the end.

    Where the richer side has no token that ends there, only the other outcomes take part if `must_end` (the end would
    face a probability of 0), and the whole vocabulary if not.

    logits: float32 [K_1, V]
    Returns: float32 [O_1], of the outcomes of the first K_1 rows; about `ABSENT` where an outcome cannot be
    """
    size, ends = len(logits), rows.ends[: len(logits)]
    of_rows = rows.outcome_rows[: rows.num_going_on]
    segments = Segments(of_rows, size)
    row, token, outcome = rows.poor_entries
    places, flat = row * logits.shape[1] + token, logits.flatten()
    outcomes = Segments(outcome, len(of_rows)).logsumexp(flat.index_select(0, places))
    # From what is left, not as 1 minus the others: a student that is certain to go on must still be told to end.
    end = flat.index_fill(0, places, ABSENT).view_as(logits).logsumexp(-1)
    if must_end:
        end = torch.where(rows.can_end, end, ABSENT)
    outcomes = outcomes.index_copy(0, ends, end)
    return torch.where(outcomes > 1e-6 * ABSENT, outcomes - segments.logsumexp(outcomes)[of_rows], ABSENT)


def add_other_ways(ended: Tensor, going_on: Tensor, rows: Tensor, end: Tensor, other_ways: Tensor) -> Tensor:
    """Log-probabilities of the open outcomes for the richer side, which might have written them by going on.

    y[k, c] = log(exp(end[rows[k]] + ended[k, c]) + exp(going_on[j])) for each (k, c, j) of `other_ways`

    ended: float32 [K, C], given that the token before ended; going_on: float32 [O], of the continuations' outcomes
    rows: int64 [K], the continuation of each row, -1 for none; end: float32 [R], that it ends
    other_ways: int64 [3, X], row, open outcome, outcome of the continuation; each row and open outcome once
    Returns: float32 [K, C]
    """
    return _AddOtherWays.apply(ended, going_on, rows, end, other_ways)


class _AddOtherWays(torch.autograd.Function):
    """With w = exp(x - y) at each (k, c, j), x the first of the two and y their sum: dx = w * dy, dgoing_on[j] gets
    (1 - w) * dy. Written out because autograd would pass over [K, C] four times more.
    """

    @staticmethod
    def forward(ctx, ended: Tensor, going_on: Tensor, rows: Tensor, end: Tensor, other_ways: Tensor):
        total = ended + torch.cat([end, end.new_zeros(1)])[rows][:, None]  # the last one, log 1, where there is none
        flat, places = total.view(-1), other_ways[0] * ended.shape[1] + other_ways[1]
        first = flat.index_select(0, places)
        both = torch.logaddexp(first, going_on.index_select(0, other_ways[2]))
        flat.index_copy_(0, places, both)
        ctx.save_for_backward((first - both).exp(), places, other_ways[2], rows)
        ctx.sizes = len(going_on), len(end)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        share, places, ways, rows = ctx.saved_tensors
        num_outcomes, num_ends = ctx.sizes
        grad = grad.clone()
        at_places = grad.view(-1).index_select(0, places)
        grad.view(-1).index_copy_(0, places, share * at_places)
        going_on = grad.new_zeros(num_outcomes).index_add_(0, ways, (1.0 - share) * at_places)
        ends = grad.new_zeros(num_ends + 1).index_add_(0, rows.where(rows >= 0, num_ends), grad.sum(1))
        return grad, going_on, None, ends[:-1], None


def on_support(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's logits without the outcomes of which a teacher cut to its top k says nothing (`ABSENT`).

    Both are then renormalised on the rest, so that nothing is pushed down because the teacher did not say it.
    """
    return torch.where(teacher > 1e-6 * ABSENT, student, ABSENT)


def renormalised(student: Tensor, teacher: Tensor, rows: Segments | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Both with each row's probabilities adding up to 1, and the rows, bool [K], of which both leave something.

    student, teacher: float [K, C], or [O] with `rows`
    """
    totals = [side.logsumexp(-1) if rows is None else rows.logsumexp(side) for side in (student, teacher)]
    shared = torch.minimum(*totals) > 1e-6 * ABSENT
    student, teacher = (side - _spread(total, rows) for side, total in zip((student, teacher), totals, strict=True))
    return *(side.where(_spread(shared, rows), 0.0) for side in (student, teacher)), shared


def _spread(values: Tensor, rows: Segments | None) -> Tensor:
    return values[:, None] if rows is None else values[rows.index]

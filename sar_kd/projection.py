"""Two distributions over different vocabularies, compared on the outcomes that both can tell apart.

An outcome is a class of tokens: of the poorer vocabulary, one token (and what only begins with it); of the richer
one, every token that the poorer would begin with that token (`vocabulary.VocabularyMap` draws the classes). A token
without a class takes no part, so nothing is pushed down because the other vocabulary lacks it. With equal
vocabularies every class is one token and this is the token-level divergence.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

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


def class_logits(logits: Tensor, tokens: Tensor, classes: Tensor, count: int, temperature: float) -> Tensor:
    """The logit of each class: y[k, c] = log sum over tokens v of class c of exp(z[k, v] / T).

    logits: float [K, V]; tokens, classes: int64 [M], the tokens that take part and the class of each
    Returns: float32 [K, count]
    """
    return _ClassLogits.apply(logits, tokens, classes, count, temperature)


class _ClassLogits(torch.autograd.Function):
    """dz[k, v] = dy[k, c(v)] * exp(z[k, v] / T - y[k, c(v)]) / T

    Worked out with the vocabulary first, because adding whole rows is many times faster than adding columns.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, classes: Tensor, count: int, temperature: float):
        values = logits.T.contiguous().index_select(0, tokens).float().div_(temperature)
        # By each class's own maximum: its probability may underflow beside the row's.
        peaks = values.new_full((count, values.shape[1]), -torch.inf).index_reduce_(0, classes, values, "amax")
        values.sub_(peaks.index_select(0, classes)).exp_()
        totals = torch.zeros_like(peaks).index_add_(0, classes, values)
        ctx.save_for_backward(values.div_(totals.index_select(0, classes)), tokens, classes)
        ctx.like, ctx.temperature = (logits.shape, logits.dtype), temperature
        return peaks.add_(totals.log_()).T.contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor):
        shares, tokens, classes = ctx.saved_tensors
        (num_rows, vocab_size), dtype = ctx.like
        entries = grad.T.contiguous().index_select(0, classes).mul_(shares).div_(ctx.temperature)
        grad_logits = grad.new_zeros(vocab_size, num_rows).index_copy_(0, tokens, entries)
        return grad_logits.T.to(dtype).contiguous(), None, None, None, None


def rich_log_probs(logits: Tensor, rows: Continuations, temperature: float) -> Tensor:
    """Log-probabilities of the richer side: softmax over the tokens that extend the written bytes and the one that ends
    there. A row of which a cut to the top k left nothing counts as one that ends.

    logits: float [K, V]
    Returns: float32 [O]; about `ABSENT` where an outcome cannot be
    """
    outcomes = _outcome_logits(logits, rows.rich_entries, len(rows.outcome_rows), temperature)
    totals = Segments(rows.outcome_rows, len(rows.ends)).logsumexp(outcomes)
    unknown = totals < 1e-6 * ABSENT
    log_probs = outcomes - totals.masked_fill(unknown, 0.0)[rows.outcome_rows]
    return log_probs.index_fill(0, rows.ends, 0.0).where(unknown[rows.outcome_rows], log_probs)


def poor_log_probs(logits: Tensor, rows: Continuations, temperature: float, must_end: bool) -> Tensor:
    """Log-probabilities of the poorer side in the first K_1 rows: softmax over its whole vocabulary, where all that
    goes on with none of a row's tokens counts for the end.

    Where the richer side has no token that ends there, only the other outcomes take part if `must_end` (the end would
    face a probability of 0), and the whole vocabulary if not.

    logits: float [K_1, V]
    Returns: float32 [O_1], of the outcomes of the first K_1 rows; about `ABSENT` where an outcome cannot be
    """
    size, ends = len(logits), rows.ends[: len(logits)]
    of_rows = rows.outcome_rows[: rows.num_going_on]
    segments = Segments(of_rows, size)
    outcomes = _outcome_logits(logits, rows.poor_entries, len(of_rows), temperature)
    values = logits.float() / temperature
    places = rows.poor_entries[0] * logits.shape[1] + rows.poor_entries[1]
    # From what is left, not as 1 minus the others: a student that is certain to go on must still be told to end.
    end = values.flatten().index_fill(0, places, ABSENT).view_as(values).logsumexp(-1)
    if must_end:
        end = torch.where(rows.can_end, end, ABSENT)
    outcomes = outcomes.index_copy(0, ends, end)
    return torch.where(outcomes > 1e-6 * ABSENT, outcomes - segments.logsumexp(outcomes)[of_rows], ABSENT)


def _outcome_logits(logits: Tensor, entries: Tensor, num_outcomes: int, temperature: float) -> Tensor:
    """y[c] = log sum over entries (k, v, c) of exp(z[k, v] / T); `ABSENT` for an outcome without entries."""
    rows, tokens, outcomes = entries
    values = logits.flatten().index_select(0, rows * logits.shape[1] + tokens).float() / temperature
    return Segments(outcomes, num_outcomes).logsumexp(values)


def add_other_ways(ended: Tensor, going_on: Tensor, rows: Tensor, end: Tensor, other_ways: Tensor) -> Tensor:
    """Log-probabilities of the open outcomes for the richer side, which might have written them by going on.

    y[k, c] = log(exp(end[rows[k]] + ended[k, c]) + exp(going_on[j])) for each (k, c, j) of `other_ways`

    ended: float32 [K, C], given that the token before ended; going_on: float32 [O], of the continuations' outcomes
    rows: int64 [K], the continuation of each row, -1 for none; end: float32 [R], that it ends
    other_ways: int64 [3, X], row, open outcome, outcome of the continuation; each row and open outcome once
    Returns: float32 [K, C]
    """
    total = ended + torch.cat([end, end.new_zeros(1)])[rows][:, None]  # the last one, log 1, where there is none
    places = other_ways[0] * ended.shape[1] + other_ways[1]
    flat = total.flatten()
    both = torch.logaddexp(flat.index_select(0, places), going_on.index_select(0, other_ways[2]))
    return flat.index_copy(0, places, both).view_as(ended)

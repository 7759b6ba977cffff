"""Two distributions over different vocabularies, compared on the outcomes that both can tell apart.

An outcome is a class of tokens: of the poorer vocabulary, one token (and what only begins with it); of the richer
one, every token that the poorer would begin with that token (`vocabulary.VocabularyMap` draws the classes). A token
without a class takes no part, so nothing is pushed down because the other vocabulary lacks it. With equal
vocabularies every class is one token and this is the token-level divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.fold import Fold
from sar_kd.losses import ABSENT, Segments


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


class Reading(NamedTuple):
    """What is asked of one model's tile of logits, at the temperature; float32."""

    open: Tensor
    """[C, K]: logits of the outcomes where both start a token, y[c, k] = log sum over v of c of exp(z[v, k] / T)"""
    rows: Tensor
    """[V, K_1]: whole columns, where the other side is the richer and goes on"""
    entries: Tensor
    """[E]: single logits, where this side is the richer and might go on: the `rich_entries`"""


def read(
    tile: Tensor, fold: Fold, num_open: int, num_inside: int, inside_own: Continuations, temperature: float
) -> Reading:
    """Take from one model's logits all that the projection needs, with one gradient for all of it.

    tile: float32 [V, n], first the columns where both start a token, then those where the other side is the richer and
    goes on, then any others; num_open, num_inside: K and K_1
    inside_own: the continuations in which this side is the richer
    """
    row, token, _ = inside_own.rich_entries
    places = token * tile.shape[1] + inside_own.rich_rows[row]
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

    logits: float32 [V, K_1]
    Returns: float32 [O_1], of the outcomes of the first K_1 rows; about `ABSENT` where an outcome cannot be
    """
    size = logits.shape[1]
    ends = rows.ends[:size]
    of_rows = rows.outcome_rows[: rows.num_going_on]
    segments = Segments(of_rows, size)
    row, token, outcome = rows.poor_entries
    places, flat = token * size + row, logits.view(-1)
    outcomes = Segments(outcome, len(of_rows)).logsumexp(flat.index_select(0, places))
    # From what is left, not as 1 minus the others: a student that is certain to go on must still be told to end.
    end = flat.scatter(0, places, ABSENT).view_as(logits).logsumexp(0)
    if must_end:
        end = torch.where(rows.can_end, end, ABSENT)
    outcomes = outcomes.index_copy(0, ends, end)
    return torch.where(outcomes > 1e-6 * ABSENT, outcomes - segments.logsumexp(outcomes)[of_rows], ABSENT)


def on_support(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's logits without the outcomes of which a teacher cut to its top k says nothing (`ABSENT`).

    Both are then renormalised on the rest, so that nothing is pushed down because the teacher did not say it.
    """
    return torch.where(teacher > 1e-6 * ABSENT, student, ABSENT)


def renormalised(student: Tensor, teacher: Tensor, rows: Segments | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Both with each row's probabilities adding up to 1, and the rows, bool [K], of which both leave something.

    student, teacher: float [C, K], or [O] with `rows`
    """
    totals = [side.logsumexp(0) if rows is None else rows.logsumexp(side) for side in (student, teacher)]
    shared = torch.minimum(*totals) > 1e-6 * ABSENT
    student, teacher = (side - _spread(total, rows) for side, total in zip((student, teacher), totals, strict=True))
    keep = _spread(shared, rows)
    return student.where(keep, 0.0), teacher.where(keep, 0.0), shared


def _spread(values: Tensor, rows: Segments | None) -> Tensor:
    return values if rows is None else values[rows.index]

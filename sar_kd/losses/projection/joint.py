"""Where both models start a token: the divergence over the outcomes, with all ways of the coarser side to write one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.losses.divergence import Divergence, Learner, diverge, through_softmax_
from sar_kd.models.logit_tiles import Logs


class Ways(NamedTuple):
    """Where both start a token, what else the coarser side might have written: instead of ending its token before and
    starting the next, it might have gone on.
    """

    going_on: Tensor
    """float32 [O], log-probabilities of the continuations' outcomes"""
    end: Tensor
    """float32 [R], of them that a continuation ends"""
    ended: Tensor
    """int64 [K]: the continuation that ended at each column, -1 for none"""
    others: Tensor
    """int64 [3, X]: column, open outcome, outcome of its continuation; each column and open outcome once"""

    def detach(self) -> Ways:
        """The same without a graph."""
        return self._replace(going_on=self.going_on.detach(), end=self.end.detach())

    @property
    def ends(self) -> Tensor:
        """float32 [K], that it ended at each column: log 1 where there was none"""
        return torch.cat([self.end, self.end.new_zeros(1)])[self.ended]


def add_other_ways(ended: Tensor, ways: Ways) -> Tensor:
    """Log-probabilities of the open outcomes for the coarser side, which might have written them by going on.

    y[c, k] = log(exp(end[ended[k]] + ended[c, k]) + exp(going_on[j])) for each (k, c, j) of `ways.others`

    ended: float32 [C, K], given that the token before ended
    Returns: float32 [C, K]
    """
    columns, outcomes, others = ways.others
    total = ended + ways.ends
    both = torch.logaddexp(total[outcomes, columns], ways.going_on[others])
    return total.index_put((outcomes, columns), both)


class WaySlopes(NamedTuple):
    """d loss / d the `Ways`' log-probabilities."""

    going_on: Tensor
    """float32 [O]"""
    end: Tensor
    """float32 [R]"""


class Opened(NamedTuple):
    """What is learned where both start a token: by column, nats, and slopes where one side learns."""

    loss: Tensor
    """float32 [K]"""
    raw: Tensor
    """float32 [K]: the same without a floor"""
    slopes: Tensor | None = None
    """float32 [V, K]: d loss / d logits of the learner"""
    into_ways: WaySlopes | None = None
    """Where the learner is the coarser"""


def open_divergence(
    divergence: Divergence,
    both: tuple[Logs, Logs],
    ways: Ways,
    coarse: int,
    mine: int | None,
    counts: Tensor,
    weight: float = 1.0,
) -> Opened:
    """The divergence over the open outcomes, `add_other_ways` of the coarser side's; what log_softmax, `add_other_ways`
    and the divergence would do one after the other, in two passes over [V, K].

    With x the way by ending, y both ways and w = exp(x - y) at each (k, c, j): dx = w * dy, dgoing_on[j] gets
    (1 - w) * dy.

    both: the student's and the teacher's log-probabilities, given that the token before ended, each outcome in the same
    row; the other side's tile is used up
    coarse, mine: the side that is the coarser, and the one that learns, if any: 0 the student, 1 the teacher
    counts: float32 [K], what a column's slopes are multiplied by; weight: and those of logits beside
    """
    columns, rows, others = ways.others
    written = both[coarse]._replace(shift=both[coarse].shift + ways.ends)
    logits = written.tile[rows, columns]
    first = written.shift[columns] + written.scale * logits
    sums = torch.logaddexp(first, ways.going_on.index_select(0, others))
    # The few that have another way are written as the logits that would have their sums.
    written.tile.index_put_((rows, columns), (sums - written.shift[columns]) / written.scale)
    student, teacher = (written, both[1]) if coarse == 0 else (both[0], written)
    if mine is None:
        loss, raw, _ = diverge(divergence, student, teacher)
        return Opened(loss, raw)
    slopes = both[1 - mine].tile
    loss, raw, total = diverge(divergence, student, teacher, Learner(("student", "teacher")[mine], slopes))
    into_ways = None
    if mine == coarse:
        written.tile.index_put_((rows, columns), logits)
        at_places = slopes[rows, columns]
        kept = (first - sums).exp_().mul_(at_places)
        slopes.index_put_((rows, columns), kept)
        lost = at_places - kept
        total = total.index_add(0, columns, lost, alpha=-1.0)
        into_going_on = torch.zeros_like(ways.going_on).index_add_(0, others, lost * counts[columns])
        into_end = ways.end.new_zeros(len(ways.end) + 1)
        into_end.index_add_(0, ways.ended.where(ways.ended >= 0, len(ways.end)), total * counts)
        into_ways = WaySlopes(into_going_on, into_end[:-1])
    through_softmax_(slopes, total, both[mine], counts * weight)
    return Opened(loss, raw, slopes, into_ways)

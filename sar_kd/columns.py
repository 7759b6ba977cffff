"""Arithmetic on tiles of logits, [V, n], one column for each row of text, a block of the vocabulary at a time.

A block fits into a processor's cache, so that what happens to it in turn costs little more than its exponentials.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.divergence import Divergence, exp_

_BLOCK = {"cpu": 2**17, "cuda": 2**23}
"""Numbers in a block: what a CPU core's cache holds several of; enough to keep a GPU busy."""
_MOST_BLOCKS: ContextVar[int | None] = ContextVar("most blocks", default=None)


def blocks_of(tile: Tensor) -> Iterator[slice]:
    """The tile [V, n] in stretches of its vocabulary."""
    size = max(1, _BLOCK.get(tile.device.type, _BLOCK["cuda"]) // max(1, tile.shape[1]))
    return (slice(first, first + size) for first in range(0, tile.shape[0], size)[: _MOST_BLOCKS.get()])


def room_for(count: int) -> int:
    """How many columns a tile has room for that is to hold so many: a multiple of 8, because products into rows of
    another length take a third to a half longer; as many as there are where the next multiple would be much more.
    """
    return count if count < 32 else -(-count // 8) * 8


def flat(tile: Tensor) -> Tensor:
    """The tile [V, n] in one row: z[v, n] is at v * tile.stride(0) + n. A tile may have room for more columns."""
    return tile.as_strided((len(tile) * tile.stride(0),), (1,)) if tile.shape[1] else tile.flatten()


@contextlib.contextmanager
def few_blocks() -> Iterator[None]:
    """Of every tile only the first blocks, for tensors without numbers: what one block takes, all of them take."""
    former = _MOST_BLOCKS.set(2)
    try:
        yield
    finally:
        _MOST_BLOCKS.reset(former)


def column_logsumexp(tile: Tensor, temperature: float = 1.0, bound: float = math.inf) -> Tensor:
    """log sum_v exp(z[v, n] / T) of each column, of logits within [-bound, bound].

    tile: float32 [V, n]
    Returns: float32 [n]
    """
    peaks = tile.new_full((tile.shape[1],), -math.inf)
    for block in blocks_of(tile):
        peaks = torch.maximum(peaks, tile[block].amax(0))
    peaks = peaks.clamp(-bound, bound)
    totals = torch.zeros_like(peaks)
    for block in blocks_of(tile):
        part = tile[block] if bound == math.inf else tile[block].clamp(-bound, bound)
        part = part - peaks
        totals += exp_(part if temperature == 1.0 else part.div_(temperature)).sum(0)
    return peaks / temperature + totals.log()


def finite_columns(tile: Tensor) -> Tensor:
    """Which columns hold finite numbers only, in one pass: bool [n]; |z| <= 6.6e4, so that no sum can overflow."""
    return tile.sum(0).isfinite()


def silence_(tile: Tensor, keep: Tensor) -> Tensor:
    """Set the columns that are not kept to 0, whatever they hold.

    By their bits, because 0 times NaN is NaN, and a masked fill is ten times slower.
    """
    tile.view(torch.int32).bitwise_and_(-keep.to(torch.int32))
    return tile


class Logs(NamedTuple):
    """Log-probabilities, formed block by block: shift[n] + scale * tile[v, n]."""

    tile: Tensor
    shift: Tensor
    scale: float

    def at(self, block: slice) -> Tensor:
        """Those of one block."""
        return torch.add(self.shift, self.tile[block], alpha=self.scale)


def normalised(tile: Tensor, temperature: float) -> Logs:
    """log softmax of each column at a temperature."""
    return Logs(tile, -column_logsumexp(tile, temperature), 1.0 / temperature)


class Learner(NamedTuple):
    """The side that learns, and the place for its slopes."""

    side: str
    """'student' or 'teacher'"""
    slopes: Tensor
    """float32 [V, n]; may be the other side's tile"""


def diverge(
    divergence: Divergence, student: Logs, teacher: Logs, learner: Learner | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of each column; fills the learner's slopes with those of its log-probabilities, each taken as
    free.

    Returns: with the floor and as it is, float32 [n], nats; and the sum of each column's slopes, float32 [n]
    """
    loss = raw = total = torch.zeros_like(teacher.tile[0])
    known = None if learner is None else divergence.total_slope(learner.side)
    for block in blocks_of(teacher.tile):
        terms = divergence.terms(student.at(block), teacher.at(block))
        sums = terms.sums(divergence.floor, dim=0)
        loss, raw = loss + sums[0], raw + sums[1]
        if learner is not None:
            free = divergence.slopes(terms, learner.side)
            total = total + free.sum(0) if known is None else total
            learner.slopes[block] = free
    return loss, raw, total if known is None else total + known


def through_softmax_(slopes: Tensor, total: Tensor, logs: Logs, factor: Tensor) -> Tensor:
    """From slopes of free log-probabilities to those of the logits that they are the softmax of, times a factor:

    dz[u, n] = factor[n] * (g[u, n] - p[u, n] * sum_v g[v, n])

    total: sum_v g[v, n], float32 [n]
    """
    for block in blocks_of(slopes):
        probs = exp_(logs.at(block)).mul_(total)
        torch.mul(slopes[block].sub_(probs), factor, out=slopes[block])
    return slopes


def softmax_slopes(tile: Tensor, total: Tensor, slope: Tensor, temperature: float) -> Tensor:
    """From slopes of y = T * log sum_v exp(z[v] / T) to those of the logits: slope * exp((z - y) / T), float32 [V, n].

    total, slope: y and its slopes, float32 [n]
    """
    slopes = torch.empty_like(tile)
    for block in blocks_of(tile):
        exp_(torch.sub(tile[block], total, out=slopes[block]).div_(temperature)).mul_(slope)
    return slopes

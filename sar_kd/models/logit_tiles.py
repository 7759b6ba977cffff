"""Arithmetic on tiles of logits [V, n], one column per position, a block of the vocabulary at a time.

A block fits into a processor's cache, so several passes over it cost little more than its exponentials.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.runtime.precision import MASKED_BELOW, MASKED_LOGIT

_BLOCK = {"cpu": 2**17, "cuda": 2**23}
"""Numbers in a block: a CPU core's cache holds several such blocks; on a GPU one is enough to keep it busy."""

_MAX_BLOCKS: ContextVar[int | None] = ContextVar("max blocks", default=None)


def vocab_blocks(tile: Tensor, at_least: int = 1) -> Iterator[slice]:
    """Slices of the vocabulary that cover the tile [V, n]; at_least: tokens of one, for matrix products 1024."""
    size = max(at_least, _BLOCK.get(tile.device.type, _BLOCK["cuda"]) // max(1, tile.shape[1]))
    return (slice(first, first + size) for first in range(0, tile.shape[0], size)[: _MAX_BLOCKS.get()])


@contextlib.contextmanager
def limit_blocks() -> Iterator[None]:
    """Process only the first two blocks of every tile: enough for a dry run on fake tensors."""
    former = _MAX_BLOCKS.set(2)
    try:
        yield
    finally:
        _MAX_BLOCKS.reset(former)


def padded_width(count: int) -> int:
    """The width to allocate for `count` positions: a multiple of 8, because matrix products into rows of another
    length take a third to a half longer; `count` itself below 32, where the next multiple would be much more.
    """
    return count if count < 32 else -(-count // 8) * 8


def flat_view(tile: Tensor) -> Tensor:
    """The tile [V, n] as one dimension: z[v, n] is at v * tile.stride(0) + n; the stride may exceed n (padding)."""
    return tile.as_strided((len(tile) * tile.stride(0),), (1,)) if tile.shape[1] else tile.flatten()


def logsumexp_per_position(tile: Tensor, temperature: float = 1.0, bound: float = math.inf) -> Tensor:
    """log sum_v exp(z[v, n] / T) of logits clamped to [-bound, bound].

    tile: float32 [V, n]
    Returns: float32 [n]
    """
    peaks, log_sums = _peaks_and_log_sums(tile, temperature, bound)
    return peaks / temperature + log_sums


def _peaks_and_log_sums(tile: Tensor, temperature: float, bound: float = math.inf) -> tuple[Tensor, Tensor]:
    """m[n] = max_v z[v, n] and log sum_v exp((z[v, n] - m[n]) / T), float32 [n], in one pass over the tile:

    m' = max(m, max of the block),   sum' = sum * exp((m - m') / T) + sum over the block of exp((z - m') / T)
    """
    peaks = tile.new_full((tile.shape[1],), MASKED_LOGIT)
    totals = torch.zeros_like(peaks)
    for block in vocab_blocks(tile):
        part = tile[block] if bound == math.inf else tile[block].clamp(-bound, bound)
        former, peaks = peaks, torch.maximum(peaks, part.amax(0))
        part = part - peaks
        _exp_(part if temperature == 1.0 else part.div_(temperature))
        totals = totals.mul_(exp_((former - peaks).div_(temperature))).add_(part.sum(0))
    return peaks, totals.log()


def finite_positions(tile: Tensor) -> Tensor:
    """`is_finite_peak` of the largest logit of each position of a tile: bool [n]."""
    return is_finite_peak(tile.amax(0))


def is_finite_peak(peaks: Tensor) -> Tensor:
    """Are the logits of a position finite, but for masked tokens? By their largest, or by their logsumexp.

    NaN, +inf, and a position of which every token is masked are not. Both numbers are NaN where a logit is.
    """
    return (peaks > MASKED_BELOW) & (peaks < math.inf)


def mask_positions_(tile: Tensor, keep: Tensor) -> Tensor:
    """Set the logits of the positions that are not in `keep`, bool [n], to 0, whatever they are.

    By a bitwise and, because 0 * NaN is NaN and masked_fill is ten times slower.
    """
    tile.view(torch.int32).bitwise_and_(-keep.to(torch.int32))
    return tile


class LogProbs(NamedTuple):
    """Log-probabilities computed block by block: shift[n] + scale * (tile[v, n] - peak[n])."""

    tile: Tensor
    peak: Tensor
    """float32 [n]: apart from the shift, because beside logits of 1e4 the log of a sum loses three of its digits"""
    shift: Tensor
    """float32 [n]"""
    scale: float

    @classmethod
    def from_logits(cls, tile: Tensor, temperature: float) -> LogProbs:
        """log softmax(z / T) over the vocabulary, without a second tile."""
        peaks, log_sums = _peaks_and_log_sums(tile, temperature)
        return cls(tile, peaks, -log_sums, 1.0 / temperature)

    def block(self, block: slice) -> Tensor:
        """The log-probabilities of one block of the vocabulary."""
        part = self.tile[block] - self.peak
        return torch.add(self.shift, part, alpha=self.scale, out=part)


_MIN_EXPONENT = -87.0
"""Its exp is 1.646e-38, still a normal float32."""


def exp_(values: Tensor) -> Tensor:
    """exp in place, of float32 of any shape; results below 2e-38 are exactly 0.

    On a CPU, PyTorch's exp takes 12 to 35 times as long for results below the smallest normal number, so a tile in
    which a tenth of the vocabulary is masked would take more than twice as long (`benchmarks/tile_costs.py`).
    """
    _exp_(values)
    return torch.threshold_(values, 2e-38, 0.0) if values.device.type == "cpu" else values


def _exp_(values: Tensor) -> Tensor:
    """exp in place; on a CPU at least 1.6e-38, which a sum that has a term of 1 does not hold."""
    return (values.clamp_min_(_MIN_EXPONENT) if values.device.type == "cpu" else values).exp_()


SMALLEST_PROBABILITY = 1e-18
"""A lower one is exactly 0 in `probabilities`: far below the rounding of a sum that it is a term of."""


def probabilities(log_probs: Tensor) -> Tensor:
    """exp into a new tensor; 0 below `SMALLEST_PROBABILITY`, so that 0 or at least 1e12 comes of it times a mask."""
    if log_probs.device.type == "cpu":  # see `exp_`
        probs = log_probs.clamp_min(math.log(SMALLEST_PROBABILITY)).exp_()
    else:
        probs = log_probs.exp()
    return torch.threshold_(probs, 1.001 * SMALLEST_PROBABILITY, 0.0)

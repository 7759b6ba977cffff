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


_LEAST = -87.0
"""exp of it is 1.646e-38, and still a normal float32."""


def exp_(values: Tensor) -> Tensor:
    """exp, in place, of float32 of any shape; what would be below 2e-38 is exactly 0.

    On a CPU what is below the least normal number takes the library that PyTorch has for it 12 to 35 times as long as
    the rest, so that a vocabulary of which a tenth is absent takes more than twice as long
    (`benchmarks/tile_costs.py`).
    """
    if values.device.type != "cpu":
        return values.exp_()
    return torch.threshold_(values.clamp_min_(_LEAST).exp_(), 2e-38, 0.0)


def exp(values: Tensor) -> Tensor:
    """The same, into a tensor of its own."""
    return exp_(values.clone()) if values.device.type == "cpu" else values.exp()

"""The last step of a language model, from hidden states to logits, a few rows at a time.

The logits of a batch are its largest tensor by far, and each row of them is needed once. So they are made in tiles of
shape [V, n], one column for each of n rows, and given up before the next tile is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sar_kd.columns import blocks_of, room_for
from sar_kd.heads import Head, body_of
from sar_kd.precision import Precision

Rows = slice | Tensor
"""Rows of a readout: a stretch, or int64 indices"""


@dataclass(frozen=True)
class Readout:
    """Rows of hidden states, and the head that reads logits out of them."""

    states: Tensor
    """float [N, D]; float [N, V], the logits themselves, without a head"""
    head: Head | None
    precision: Precision

    @property
    def vocab_size(self) -> int:
        return len(self.head.weight) if self.head else self.states.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What may learn: the states, the head's weight and its bias; None for what there is not."""
        return (self.states, None, None) if self.head is None else (self.states, self.head.weight, self.head.bias)

    @property
    def learns(self) -> bool:
        """Its states have a graph."""
        return self.states.requires_grad

    def __len__(self) -> int:
        return len(self.states)

    def at(self, rows: Tensor) -> Readout:
        """These rows alone, with the graph that there is."""
        return replace(self, states=self.states.index_select(0, rows))

    def detach(self) -> Readout:
        """The same without a graph."""
        return replace(self, states=self.states.detach(), head=self.head and self.head.detach())

    def tile(self, rows: Rows) -> Tensor:
        """The logits of some rows, float32 [V, n], as the run's dtype computes them; with room for more columns."""
        states = _taken(self.states.detach(), rows)
        if self.head is None:
            return states.T.float().contiguous()
        head, count = self.head, len(states)
        columns = nn.functional.pad(states, (0, 0, 0, room_for(count) - count)).T
        tile = states.new_empty((len(head.weight), columns.shape[1]), dtype=torch.float32)
        with self.precision.products():
            for block in blocks_of(tile):
                bias = None if head.bias is None else head.bias.detach()[block, None]
                self._product(head.weight.detach()[block], columns, bias, tile[block])
                if head.scale != 1.0:
                    tile[block] *= head.scale
                if head.softcap:
                    tile[block].div_(head.softcap).tanh_().mul_(head.softcap)
        return tile[:, :count]

    def inner_slopes(self, tile: Tensor, bound: float = math.inf) -> Tensor | None:
        """d clamp(cap(x), -bound, bound) / d x where the tile's logits are cap(x); None where that is 1."""
        softcap = 0.0 if self.head is None else self.head.softcap
        slopes = 1.0 - (tile / softcap).square_() if softcap else None
        if bound == math.inf:
            return slopes
        inside = tile.abs() <= bound
        return inside if slopes is None else slopes.mul_(inside)

    def logits(self) -> Tensor:
        """All of them at once, with a graph: float [N, V]."""
        if self.head is None:
            return self.states
        with self.precision.autocast():
            return self.head.after_product(nn.functional.linear(self.states, self.head.weight, self.head.bias))

    def _product(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        dtype = self.precision.dtype
        if dtype is not torch.float32:
            a, b = a.to(dtype), b.to(dtype)
            out.copy_(a @ b if bias is None else torch.addmm(bias.to(dtype), a, b))  # rounded once, bias and all
        elif bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)


def read_out(
    model: nn.Module, head: Head | None, input_ids: Tensor, precision: Precision, needs_states: bool = False
) -> tuple[Readout, Tensor | None]:
    """Run a model: a readout of every row, [B * T, ...], and the last hidden states if they are asked for.

    head: the model's, as `Heads.of` gives it; None where its logits are to come from the model itself
    input_ids: int64 [B, T]
    """
    with precision.autocast():
        if head is None:
            out = model(input_ids=input_ids, use_cache=False, output_hidden_states=needs_states)
            states = out.hidden_states[-1].flatten(0, 1) if needs_states else None
            return Readout(out.logits.flatten(0, 1), None, precision), states
        states = body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    return Readout(states, head, precision), states


def _taken(states: Tensor, rows: Rows) -> Tensor:
    return states[rows] if isinstance(rows, slice) else states.index_select(0, rows)


class Gradients:
    """What a readout's states and head get back, collected tile by tile in float32."""

    def __init__(self, readout: Readout, wanted: Sequence[bool]):
        """wanted: of each of `Readout.tensors`"""
        self.readout = readout
        self.states, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and needed else None
            for tensor, needed in zip(readout.tensors, wanted, strict=True)
        )

    def add_(self, rows: Rows, slopes: Tensor) -> None:
        """Carry the slopes of a tile's logits, float32 [V, n], times any loss scale, back to states and head."""
        readout, head = self.readout, self.readout.head
        if head is None:
            self._add_states_(rows, slopes.T)
            return
        if head.scale != 1.0:
            slopes.mul_(head.scale)
        if self.bias is not None:
            self.bias += slopes.sum(1)
        states, dtype = _taken(readout.states.detach(), rows), readout.precision.dtype
        narrow = dtype is not torch.float32
        states = states.to(dtype)
        back = states.new_zeros(states.shape, dtype=torch.float32)
        with readout.precision.products():
            for block in blocks_of(slopes):
                part, weight = slopes[block].to(dtype), head.weight.detach()[block].to(dtype)
                if self.states is not None:
                    back.add_(part.T @ weight) if narrow else back.addmm_(part.T, weight)
                if self.weight is not None:
                    self.weight[block].add_(part @ states) if narrow else self.weight[block].addmm_(part, states)
        self._add_states_(rows, back)

    def _add_states_(self, rows: Rows, back: Tensor) -> None:
        if self.states is None:
            return
        if isinstance(rows, slice):
            self.states[rows] += back
        else:
            self.states.index_add_(0, rows, back)

    def times(self, factor: Tensor) -> list[Tensor | None]:
        """The gradients of states, weight and bias, each in its tensor's dtype; to be called once."""
        parts = self.states, self.weight, self.bias
        self.states = self.weight = self.bias = None
        return [
            None if part is None or like is None else part.mul_(factor).to(like.dtype)
            for part, like in zip(parts, self.readout.tensors, strict=True)
        ]

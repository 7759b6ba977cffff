"""Where a causal language model's last hidden states become logits, found and tried, never assumed.

The last step of a language model, from hidden states to logits, a few rows at a time.

The logits of a batch are its largest tensor by far, and each row of them is needed once. So they are made in tiles of
shape [V, n], one column for each of n rows, and given up before the next tile is made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sar_kd.models.logit_tiles import blocks_of, room_for
from sar_kd.runtime.precision import Precision

_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""What configurations call a factor of the logits, and to which power it acts."""


@dataclass(frozen=True)
class LMHead:
    """Logits from hidden states: z = cap(scale * (h W^T + b)), with cap(x) = softcap * tanh(x / softcap), if any."""

    weight: Tensor
    """float [V, D]"""
    bias: Tensor | None = None
    """float [V]"""
    scale: float = 1.0
    softcap: float = 0.0

    def detach(self) -> LMHead:
        """The same without a graph."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def after_product(self, products: Tensor) -> Tensor:
        """Logits from h W^T + b."""
        logits = products * self.scale if self.scale != 1.0 else products
        return self.softcap * (logits / self.softcap).tanh() if self.softcap else logits


def backbone_of(model: Any) -> nn.Module:
    """The model without its head, which gives hidden states."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters around a model
    return getattr(inner, "base_model", inner)


def text_config_of(model: Any) -> Any:
    """What transformers knows about a model, or about the part of it that reads text."""
    return model.config.get_text_config()


def _output_module(model: Any) -> nn.Module:
    return model.get_output_embeddings()


class _Form(NamedTuple):
    """How logits come from a head's products. See `LMHead`."""

    scale: float
    softcap: float

    def head(self, module: nn.Module) -> LMHead:
        """A module of this form, with the weights that it has now."""
        parameters = dict(module.named_parameters())
        return LMHead(parameters["weight"], parameters.get("bias"), self.scale, self.softcap)


class LMHeads:
    """The heads of models, each tried once."""

    def __init__(self, precision: Precision):
        self.precision = precision
        self._forms: WeakKeyDictionary[nn.Module, _Form | None] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> LMHead | None:
        """The head of a model as it computes now; None if its logits come about in another way.

        The first call for a head runs the model and reads the device.
        """
        module = _output_module(model)
        if module not in self._forms:
            self._forms[module] = _find_form(model, module, self.precision)
        form = self._forms[module]
        if form is None or module._forward_hooks or module._forward_pre_hooks:  # who waits for its output is to get it
            return None
        return form.head(module)

    def assume(self, model: nn.Module) -> None:
        """Take it that the head is what the configuration says; for a model without numbers, which cannot be tried."""
        module = _output_module(model)
        self._forms[module] = _candidates(model)[0] if _may_be_plain(model, module) else None


def _may_be_plain(model: nn.Module, module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return backbone_of(model) is not model and names in ({"weight"}, {"weight", "bias"})


@torch.no_grad()
def _find_form(model: nn.Module, module: nn.Module, precision: Precision) -> _Form | None:
    """The form of a head, None if it is another kind of head.

    Tried on a few tokens: what the head is given must be what the body returns, and what it makes of that, scaled and
    capped as the configuration says, must be the model's logits.
    """
    if not _may_be_plain(model, module):
        return None
    body = backbone_of(model)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    was_training = model.training
    model.eval()
    input_ids = torch.arange(4, device=next(module.parameters()).device)[None]
    try:
        with precision.same_random(), precision.autocast():
            logits = model(input_ids=input_ids, use_cache=False).logits
            states = getattr(body(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    finally:
        hook.remove()
        model.train(was_training)
    if len(seen) != 1 or states is None or not torch.equal(seen[0][0], states):
        return None
    products = seen[0][1]
    for form in _candidates(model):
        found = form.head(module)
        with contextlib.suppress(RuntimeError):  # another shape
            if _close(found.after_product(products), logits) and _close(_product(states, found, precision), products):
                return form
    return None


def _candidates(model: nn.Module) -> list[_Form]:
    config = text_config_of(model)
    scales = [float(value) ** power for name, power in _SCALES.items() if (value := getattr(config, name, None))]
    caps = [float(getattr(config, "final_logit_softcapping", None) or 0.0), 0.0]
    return [_Form(scale, cap) for cap in caps for scale in (*scales, 1.0)]


def _product(states: Tensor, head: LMHead, precision: Precision) -> Tensor:
    with precision.autocast():
        return nn.functional.linear(states, head.weight, head.bias)


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for the last bits of the dtype."""
    both = found.float(), wanted.float()
    return torch.allclose(*both, rtol=4 * torch.finfo(wanted.dtype).eps, atol=1e-6 * wanted.float().abs().max().item())


PositionIndex = slice | Tensor
"""Rows of a readout: a stretch, or int64 indices"""


@dataclass(frozen=True)
class LazyLogits:
    """Rows of hidden states, and the head that reads logits out of them."""

    states: Tensor
    """float [N, D]; float [N, V], the logits themselves, without a head"""
    head: LMHead | None
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

    def at(self, rows: Tensor) -> LazyLogits:
        """These rows alone, with the graph that there is."""
        return replace(self, states=self.states.index_select(0, rows))

    def detach(self) -> LazyLogits:
        """The same without a graph."""
        return replace(self, states=self.states.detach(), head=self.head and self.head.detach())

    def tile(self, rows: PositionIndex) -> Tensor:
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

    def logit_transform_grad(self, tile: Tensor, bound: float = math.inf) -> Tensor | None:
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


def forward_to_lm_head(
    model: nn.Module, head: LMHead | None, input_ids: Tensor, precision: Precision, needs_states: bool = False
) -> tuple[LazyLogits, Tensor | None]:
    """Run a model: a readout of every row, [B * T, ...], and the last hidden states if they are asked for.

    head: the model's, as `LMHeads.of` gives it; None where its logits are to come from the model itself
    input_ids: int64 [B, T]
    """
    with precision.autocast():
        if head is None:
            out = model(input_ids=input_ids, use_cache=False, output_hidden_states=needs_states)
            states = out.hidden_states[-1].flatten(0, 1) if needs_states else None
            return LazyLogits(out.logits.flatten(0, 1), None, precision), states
        states = backbone_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    return LazyLogits(states, head, precision), states


def _taken(states: Tensor, rows: PositionIndex) -> Tensor:
    return states[rows] if isinstance(rows, slice) else states.index_select(0, rows)


class Gradients:
    """What a readout's states and head get back, collected tile by tile in float32."""

    def __init__(self, readout: LazyLogits, wanted: Sequence[bool]):
        """wanted: of each of `LazyLogits.tensors`"""
        self.readout = readout
        self.states, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and needed else None
            for tensor, needed in zip(readout.tensors, wanted, strict=True)
        )

    def add_(self, rows: PositionIndex, slopes: Tensor) -> None:
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

    def _add_states_(self, rows: PositionIndex, back: Tensor) -> None:
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

"""The last step of a causal language model, from hidden states to logits [B * T, V], one tile [V, n] at a time.

The logits are a batch's largest tensor by far and each position is needed once, so a tile is freed before the next is
made. How a model computes its logits is verified by running it, never assumed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sar_kd.models.logit_tiles import padded_width, vocab_blocks
from sar_kd.runtime.precision import MASKED_BELOW, MASKED_LOGIT, Precision

_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Names that configurations use for a factor of the logits, and the power to which it is applied"""


@dataclass(frozen=True)
class LMHead:
    """z = cap(scale * (h W^T + b)) with cap(x) = softcap * tanh(x / softcap), or cap(x) = x if softcap is 0."""

    weight: Tensor
    """float [V, D]"""
    bias: Tensor | None = None
    """float [V]"""
    scale: float = 1.0
    softcap: float = 0.0

    def detach(self) -> LMHead:
        """A copy without a graph."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def to(self, device: torch.device) -> LMHead:
        """A copy on another device, without a graph."""
        weight, bias = (None if each is None else each.detach().to(device) for each in (self.weight, self.bias))
        assert weight is not None
        return replace(self, weight=weight, bias=bias)

    def transform(self, products: Tensor) -> Tensor:
        """Logits from the products h W^T + b."""
        logits = products * self.scale if self.scale != 1.0 else products
        return self.softcap * (logits / self.softcap).tanh() if self.softcap else logits


def backbone_of(model: Any) -> nn.Module:
    """The model without its LM head; its output has `last_hidden_state`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft wraps a model
    return getattr(inner, "base_model", inner)


def device_of(model: Any) -> torch.device:
    """Where a model takes its input: the device of its LM head, which is loaded wherever its layers are."""
    head = model.get_output_embeddings()
    return next(chain(head.parameters(), model.parameters())).device


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode; restores its own."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def text_config_of(model: Any) -> Any:
    """The transformers config of a model, or of its text part in a multimodal model."""
    return model.config.get_text_config()


class _LogitTransform(NamedTuple):
    """The scale and softcap of an `LMHead`."""

    scale: float
    softcap: float

    def head(self, module: nn.Module) -> LMHead:
        """An output module as an LM head, with its current weights."""
        parameters = dict(module.named_parameters())
        return LMHead(parameters["weight"], parameters.get("bias"), self.scale, self.softcap)


class LMHeads:
    """The LM heads of models, each verified once."""

    def __init__(self, precision: Precision):
        self.precision = precision
        self._transforms: WeakKeyDictionary[nn.Module, _LogitTransform | None] = WeakKeyDictionary()
        self._copies: WeakKeyDictionary[nn.Module, LMHead] = WeakKeyDictionary()
        """Of heads on another device, which are a frozen teacher's"""

    def of(self, model: Any) -> LMHead | None:
        """The model's LM head with its current weights; None if its logits are computed in another way.

        Its weights are on the run's device, where logits are formed: of a teacher on another one, a copy of them.

        The first call for a head runs the model and synchronises with the device.
        """
        module = model.get_output_embeddings()
        if module not in self._transforms:
            self._transforms[module] = _find_transform(model, module, self.precision)
        transform = self._transforms[module]
        if transform is None or module._forward_hooks or module._forward_pre_hooks:  # hooks need the module's forward
            return None
        head = transform.head(module)
        if self.precision.on(head.weight.device) is self.precision:
            return head
        if module not in self._copies:
            self._copies[module] = head.to(self.precision.device)
        return self._copies[module]

    def assume(self, model: Any) -> None:
        """Trust the configuration; for a model on fake tensors, on which nothing can be verified."""
        module = model.get_output_embeddings()
        self._transforms[module] = _candidates(model)[0] if _is_linear(model, module) else None


def _is_linear(model: nn.Module, module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return backbone_of(model) is not model and names in ({"weight"}, {"weight", "bias"})


@torch.no_grad()
def _find_transform(model: nn.Module, module: nn.Module, precision: Precision) -> _LogitTransform | None:
    """The transform of an LM head; None for another kind of head.

    Verified on four tokens: the head's input must be the backbone's output, and the head's output, scaled and capped as
    the configuration says, must be the model's logits.
    """
    if not _is_linear(model, module):
        return None
    seen: list[tuple[Tensor, Tensor]] = []
    precision = precision.on(device_of(model))
    hook = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    input_ids = torch.arange(4, device=next(module.parameters()).device)[None]
    with hook, in_eval_mode(model), precision.fork_rng(), precision.autocast():
        logits = model(input_ids=input_ids, use_cache=False).logits
        states = getattr(backbone_of(model)(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    if len(seen) != 1 or states is None or not torch.equal(seen[0][0], states):
        return None
    products = seen[0][1]
    for transform in _candidates(model):
        head = transform.head(module)
        with contextlib.suppress(RuntimeError):  # another shape
            if _close(head.transform(products), logits) and _close(_product(states, head, precision), products):
                return transform
    return None


def _candidates(model: nn.Module) -> list[_LogitTransform]:
    config = text_config_of(model)
    scales = [float(value) ** power for name, power in _SCALES.items() if (value := getattr(config, name, None))]
    caps = [float(getattr(config, "final_logit_softcapping", None) or 0.0), 0.0]
    return [_LogitTransform(scale, cap) for cap in caps for scale in (*scales, 1.0)]


def _product(states: Tensor, head: LMHead, precision: Precision) -> Tensor:
    with precision.autocast():
        return nn.functional.linear(states, head.weight, head.bias)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding of the dtype."""
    rtol, found, expected = 4 * torch.finfo(expected.dtype).eps, found.float(), expected.float()
    size = expected.where(expected > MASKED_BELOW, 0.0).abs().max().item()  # -inf is a masked token
    return torch.allclose(found, expected, rtol=rtol, atol=1e-6 * size)


PositionIndex = slice | Tensor
"""A range of positions, or int64 indices"""


@dataclass(frozen=True)
class LazyLogits:
    """Hidden states of N positions and the LM head, from which logits are computed a tile at a time."""

    states: Tensor
    """float [N, D]; float [N, V], the logits themselves, if there is no head"""
    head: LMHead | None
    precision: Precision

    @property
    def vocab_size(self) -> int:
        return len(self.head.weight) if self.head else self.states.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Inputs that may require a gradient: states, the head's weight and bias; None for one that is missing."""
        return (self.states, None, None) if self.head is None else (self.states, self.head.weight, self.head.bias)

    @property
    def requires_grad(self) -> bool:
        """The states have a graph."""
        return self.states.requires_grad

    def __len__(self) -> int:
        return len(self.states)

    def select(self, positions: Tensor) -> LazyLogits:
        """Only these positions, int64 [n]; differentiable."""
        return replace(self, states=self.states.index_select(0, positions))

    def detach(self) -> LazyLogits:
        """A copy without a graph."""
        return replace(self, states=self.states.detach(), head=self.head and self.head.detach())

    def tile(self, positions: PositionIndex) -> Tensor:
        """The logits of some positions, float32 [V, n], computed in the run's dtype; not contiguous if n is padded.

        -inf, a masked token, is `MASKED_LOGIT`.
        """
        states = _index(self.states.detach(), positions)
        if self.head is None:
            tile = states.new_empty(states.T.shape, dtype=torch.float32).copy_(states.T)
            for block in vocab_blocks(tile):
                tile[block].clamp_min_(MASKED_LOGIT)
            return tile
        head, count = self.head, len(states)
        padded = nn.functional.pad(states, (0, 0, 0, padded_width(count) - count)).T
        tile = states.new_empty((len(head.weight), padded.shape[1]), dtype=torch.float32)
        with self.precision.matmul_context():
            for block in vocab_blocks(tile, at_least=1024):
                bias = None if head.bias is None else head.bias.detach()[block, None]
                self._product(head.weight.detach()[block], padded, bias, tile[block])
                if head.scale != 1.0:
                    tile[block] *= head.scale
                if head.softcap:
                    tile[block].div_(head.softcap).tanh_().mul_(head.softcap)
        return tile[:, :count]

    def logit_transform_grad(self, tile: Tensor, bound: float = math.inf) -> Tensor | None:
        """d clamp(cap(x), -bound, bound) / d x for a tile of logits cap(x), [V, n]; None if it is 1 everywhere."""
        softcap = 0.0 if self.head is None else self.head.softcap
        grad = 1.0 - (tile / softcap).square_() if softcap else None
        if bound == math.inf:
            return grad
        inside = tile.abs() <= bound
        return inside if grad is None else grad.mul_(inside)

    def _product(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """a b + bias, `MASKED_LOGIT` for -inf: of a bias of -inf, or beyond the range of half."""
        dtype = self.precision.dtype
        if dtype is not torch.float32:
            a, b = a.to(dtype), b.to(dtype)
            product = a @ b if bias is None else torch.addmm(bias.to(dtype), a, b)  # rounded once, with the bias
            torch.maximum(product, out.new_full((1,), MASKED_LOGIT), out=out)
        elif bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias.clamp_min(MASKED_LOGIT), a, b, out=out)


def forward_to_lm_head(
    model: nn.Module, head: LMHead | None, input_ids: Tensor, precision: Precision, needs_states: bool = False
) -> tuple[LazyLogits, Tensor | None]:
    """Run a model up to its LM head: the logits of all B * T positions, and the last hidden states if needed.

    It computes where its weights are; what is returned is on the run's device.

    head: from `LMHeads.of`; None to let the model compute its logits itself
    input_ids: int64 [B, T]
    Returns: logits [B * T, V]; float [B * T, D], or None
    """
    device = device_of(model)
    with precision.on(device).autocast():
        input_ids = input_ids.to(device)
        if head is None:
            out = model(input_ids=input_ids, use_cache=False, output_hidden_states=needs_states)
            states = out.hidden_states[-1].flatten(0, 1).to(precision.device) if needs_states else None
            return LazyLogits(out.logits.flatten(0, 1).to(precision.device), None, precision), states
        states = backbone_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    states = states.to(precision.device)
    return LazyLogits(states, head, precision), states


def _index(states: Tensor, positions: PositionIndex) -> Tensor:
    return states[positions] if isinstance(positions, slice) else states.index_select(0, positions)


class Gradients:
    """Gradients of hidden states and LM head, accumulated tile by tile in float32."""

    def __init__(self, logits: LazyLogits, needed: Sequence[bool]):
        """needed: for each of `LazyLogits.tensors`"""
        self.logits = logits
        self.states, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and is_needed else None
            for tensor, is_needed in zip(logits.tensors, needed, strict=True)
        )

    def add_(self, positions: PositionIndex, grad: Tensor) -> None:
        """Backpropagate the gradient of a tile's logits, float32 [V, n], to states and head; overwrites `grad`.

        dh += (scale * g)^T W,   dW += (scale * g) h,   db += sum_n scale * g[:, n]
        """
        logits, head = self.logits, self.logits.head
        if head is None:
            self._add_states_(positions, grad.T)
            return
        if head.scale != 1.0:
            grad.mul_(head.scale)
        if self.bias is not None:
            self.bias += grad.sum(1)
        states, dtype = _index(logits.states.detach(), positions), logits.precision.dtype
        is_half = dtype is not torch.float32
        states = states.to(dtype)
        grad_states = states.new_zeros(states.shape, dtype=torch.float32)
        with logits.precision.matmul_context():
            for block in vocab_blocks(grad, at_least=1024):
                part, weight = grad[block].to(dtype), head.weight.detach()[block].to(dtype)
                if self.states is not None:
                    grad_states.add_(part.T @ weight) if is_half else grad_states.addmm_(part.T, weight)
                if self.weight is not None:
                    self.weight[block].add_(part @ states) if is_half else self.weight[block].addmm_(part, states)
        self._add_states_(positions, grad_states)

    def _add_states_(self, positions: PositionIndex, grad: Tensor) -> None:
        if self.states is None:
            return
        if isinstance(positions, slice):
            self.states[positions] += grad
        else:
            self.states.index_add_(0, positions, grad)

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        """`factor` times the gradients of states, weight and bias, in their tensors' dtypes. To be called once."""
        grads = self.states, self.weight, self.bias
        self.states = self.weight = self.bias = None
        return [
            None if grad is None or tensor is None else grad.mul_(factor).to(tensor.dtype)
            for grad, tensor in zip(grads, self.logits.tensors, strict=True)
        ]

"""A dry run of a deep model in the time of a shallow one: of layers that are alike, the first two and the last are run.

The layers between them hold as many bytes as the second one did, from their forward to their backward. From layer to
layer the live bytes grow or shrink evenly, so a phase has its peak in a layer at an end, which is run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.models.lm_head import backbone_of
from sar_kd.models.memory_saving import layers_of
from sar_kd.preflight.memory_tracker import MemoryTracker

_OWN_NUMBER = ("layer_idx", "layer_id", "layer_index", "training")


def stand_in_(model: nn.Module, tracker: MemoryTracker) -> None:
    """Replace the layers of a fake model that are at no end of their kind, in forward and backward."""
    kinds = {layer: _kind_of(layer) for layer in layers_of(model)}
    last, calls = {kind: layer for layer, kind in kinds.items()}, _Calls(tracker)
    for layer, kind in kinds.items():
        if layer is not last[kind]:
            layer.forward = functools.partial(calls.run, layer, kind, layer.forward)
    backbone_of(model).register_forward_hook(lambda *_: calls.casts.clear())


class _Calls:
    """What the layers hold that are run."""

    def __init__(self, tracker: MemoryTracker):
        self.casts: list[Tensor] = []
        """In place of the weights in half that autocast keeps until a forward ends"""
        self._tracker = tracker
        self._held: dict[tuple, tuple[int, int]] = {}
        self._seen = set[tuple]()

    def run(self, layer: nn.Module, kind: tuple, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run a layer, or let what is known of others of its kind stand in for it."""
        states = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(states, Tensor):
            return forward(*args, **kwargs)
        is_learned = torch.is_grad_enabled() and states.requires_grad
        place = kind, states.shape, states.dtype, is_learned, torch.is_grad_enabled()
        if place in self._held:
            num_bytes, num_cast = self._held[place]
            self._keep_cast(num_cast, states.device)
            return _StandIn.apply(states, num_bytes, layer, self._tracker) if is_learned else torch.empty_like(states)
        self._take_casts(states.device)
        before = self._tracker.num_live_bytes
        out = forward(*args, **kwargs)
        num_cast = self._take_casts(states.device)
        is_alike = isinstance(out, Tensor) and (out.shape, out.dtype) == (states.shape, states.dtype)
        if is_alike and place in self._seen and (is_learned or not out.requires_grad):
            num_bytes = self._tracker.num_live_bytes - before - out.nbytes - num_cast
            self._held[place] = max(0, num_bytes), num_cast
        self._seen.add(place)  # the first layer of all may convert its input
        return out

    def _take_casts(self, device: torch.device) -> int:
        """Let `casts` hold what autocast alone does; the number of bytes."""
        before = self._tracker.num_live_bytes
        torch.clear_autocast_cache()
        num_bytes = before - self._tracker.num_live_bytes
        self._keep_cast(num_bytes, device)
        return num_bytes

    def _keep_cast(self, num_bytes: int, device: torch.device) -> None:
        if num_bytes:
            self.casts.append(torch.empty(num_bytes, dtype=torch.uint8, device=device))


class _StandIn(torch.autograd.Function):
    """A layer that is not run."""

    @staticmethod
    def forward(ctx, states: Tensor, num_bytes: int, layer: nn.Module, tracker: MemoryTracker) -> Tensor:
        ctx.held = states, torch.empty(num_bytes, dtype=torch.uint8, device=states.device)
        ctx.layer, ctx.tracker = layer, tracker
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        for parameter in ctx.layer.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
                ctx.tracker.relabel([parameter.grad], "gradients")
        ctx.held = None
        return torch.empty_like(grad), None, None, None


def _kind_of(layer: nn.Module) -> tuple:
    """The same of two layers only if they compute alike: class, plain attributes and parameters of every module."""
    return tuple(_facts_of(layer))


def _facts_of(layer: nn.Module) -> Iterator[tuple]:
    for name, module in layer.named_modules():
        plain = ((key, value) for key, value in vars(module).items() if key not in _OWN_NUMBER)
        values = tuple((key, value) for key, value in plain if isinstance(value, (str, int, float, tuple, type(None))))
        sizes = ((key, *weight.shape, weight.dtype, weight.requires_grad) for key, weight in module.named_parameters())
        yield name, type(module), str(values), tuple(sizes)

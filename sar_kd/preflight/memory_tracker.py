"""Models without memory: they compute shapes and dtypes and nothing else, and what they would have taken is counted.

What PyTorch calls fake tensors have a device, a dtype and strides, but no storage. A forward and a backward on them run
the very operations of a real one, autocast, recomputation and what autograd saves included, at no cost in memory. Every
storage that comes to life and goes is entered in a `MemoryTracker`, as an allocator would see it. What an operation needs
inside its own kernel, nobody sees.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

M = TypeVar("M", bound=nn.Module)

OFF_DEVICE = "away"
"""The label of what is in another memory: it is not counted."""


class MemoryTracker(TorchDispatchMode):
    """Bytes of all storages that are alive, by label; a context. What is born while it is open gets `label`.

    Also of use with real tensors, whose allocator's figure it gives but for what kernels allocate inside.
    """

    def __init__(self, label: str = ""):
        super().__init__()
        self.label = label
        self.live: Counter[str] = Counter()
        self._held: dict[int, tuple[weakref.ref, int, str]] = {}
        self.forget_peak()

    def forget_peak(self) -> None:
        """Let the peak be what is alive now."""
        self.peak = 0
        self._note_peak()

    def _note_peak(self) -> None:
        total = sum(self.live.values()) - self.live[OFF_DEVICE]
        if total >= self.peak:
            self.peak, self.at_peak = total, dict(self.live)

    def enter(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count these tensors' storages under this label from here on, whatever they were before."""
        for tensor in tensors:
            self._enter(tensor, label, moves=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.run(func, args, kwargs or {})
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._enter(value, self.label)
        return out

    def run(self, func, args: tuple, kwargs: dict):
        """What the operation gives."""
        return func(*args, **kwargs)

    def _enter(self, tensor: Tensor, label: str, moves: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._held.get(key)
        if known is not None:
            if moves and known[2] != label:
                self.live[known[2]] -= known[1]
                self.live[label] += known[1]
                self._held[key] = (known[0], known[1], label)
                self._note_peak()
            return
        size = storage.nbytes()
        self._held[key] = (weakref.ref(storage, functools.partial(self._leave, key)), size, label)
        self.live[label] += size
        self._note_peak()

    def _leave(self, key: int, _: weakref.ref) -> None:
        _, size, label = self._held.pop(key)
        self.live[label] -= size


class _Imagined(MemoryTracker):
    """The ledger of fake tensors, which also knows the shapes of operations that PyTorch's own rules refuse."""

    def run(self, func, args: tuple, kwargs: dict):
        """See `MemoryTracker`."""
        if func.name() != "aten::_grouped_mm":
            return super().run(func, args, kwargs)
        # Its rule for fake tensors takes bfloat16 alone; the kernels take more.
        a, b = args[:2]
        groups: Any = kwargs.get("offs", args[2] if len(args) > 2 else None)
        stacked: tuple[int, ...] = ()
        if a.ndim == b.ndim:  # one product for each group, of parts of both or of stacks
            stacked = (len(groups) if a.ndim == 2 else len(a),)
        return a.new_empty((*stacked, a.shape[-2], b.shape[-1]))


@contextlib.contextmanager
def imagined() -> Iterator[MemoryTracker]:
    """Everything made inside takes no memory and is counted."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Imagined() as ledger:
        yield ledger


def hollow(model: M, device: torch.device, dtype: torch.dtype | None = None) -> M:
    """A copy of a model without its weights, to be made inside `imagined`: on `device`, what learns or computes in
    `dtype` (its own if None); weights that are tied stay tied.

    model: on the meta device, or real
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        empty = torch.empty(parameter.shape, dtype=kind, device=device)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(model, memo)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]

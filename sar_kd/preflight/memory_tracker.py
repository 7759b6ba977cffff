"""Count live bytes by label while something is computed, on real tensors or on fake ones.

Fake tensors have a device, a dtype and strides but no storage. A forward and a backward on them run the operations of a
real one, with autocast, recomputation and what autograd saves, in no memory. Scratch inside a kernel is not counted.
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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sar_kd.config.lora import LoraConfig
from sar_kd.config.placement import TeacherPlacementConfig
from sar_kd.models.lora import add_adapter
from sar_kd.models.memory_saving import BYTES_PER_WEIGHT, quantizable_layers
from sar_kd.models.placement import place_of, spread_over_devices
from sar_kd.runtime.precision import Precision, same_device

M = TypeVar("M", bound=nn.Module)

OFF_DEVICE = "off device"
"""The label of storages in another memory, which are not counted"""


class MemoryTracker(TorchDispatchMode):
    """Context that counts the bytes of all live storages by label; a storage made inside gets the current `label`."""

    def __init__(self, label: str = ""):
        super().__init__()
        self.label = label
        self.device: torch.device | None = None
        """Storages elsewhere are `OFF_DEVICE`; None counts all"""
        self.live: Counter[str] = Counter()
        self._storages: dict[int, tuple[weakref.ref, int, str]] = {}
        self.reset_peak()

    def reset_peak(self) -> None:
        """Set `peak` and `at_peak`, the same by label, to what is live now."""
        self.peak = 0
        self._update_peak()

    @property
    def num_live_bytes(self) -> int:
        """Of all labels."""
        return sum(self.live.values())

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count the storages of these tensors under `label` from now on, new or not."""
        for tensor in tensors:
            self._add(tensor, label, relabels=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_refused = func.name() == "aten::_grouped_mm" and isinstance(args[0], FakeTensor)
        out = (_fake_grouped_mm if is_refused else func)(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value, self.label)
        return out

    def _add(self, tensor: Tensor, label: str, relabels: bool = False) -> None:
        if self.device is not None and tensor.device.type != "meta" and not same_device(tensor.device, self.device):
            label = OFF_DEVICE
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            reference = weakref.ref(storage, functools.partial(self._remove, key))
            self._storages[key] = reference, storage.nbytes(), label
            self.live[label] += storage.nbytes()
        elif relabels:
            reference, size, former = self._storages[key]
            self._storages[key] = reference, size, label
            self.live[former] -= size
            self.live[label] += size
        else:
            return
        self._update_peak()

    def _remove(self, key: int, _: weakref.ref) -> None:
        _, size, label = self._storages.pop(key)
        self.live[label] -= size

    def _update_peak(self) -> None:
        total = sum(self.live.values()) - self.live[OFF_DEVICE]
        if total >= self.peak:
            self.peak, self.at_peak = total, dict(self.live)


def _fake_grouped_mm(a: Tensor, b: Tensor, offs: Any = None, *_, **__) -> Tensor:
    """The shape of a grouped product; PyTorch's own rule for fake tensors takes bfloat16 alone, unlike the kernels."""
    batch: tuple[int, ...] = ()
    if a.ndim == b.ndim:  # one product for each group: of slices of both, or of stacked matrices
        batch = (len(offs) if a.ndim == 2 else len(a),)
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


@contextlib.contextmanager
def fake_tensors() -> Iterator[MemoryTracker]:
    """Every tensor made inside is fake, and counted by the tracker."""
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
        yield tracker


def with_adapter(student: nn.Module, config: LoraConfig, dtype: torch.dtype) -> nn.Module:
    """The student with the adapter of `--lora_rank`, all else frozen, on the meta device; itself without that option.

    Not to be made inside `fake_tensors`: peft moves modules, which fake ones cannot be.
    dtype: of the frozen weights
    """
    if not config.lora_rank:
        return student
    return add_adapter(fake_copy(student, torch.device("meta"), dtype).requires_grad_(True), config)


def fake_copy(model: M, device: torch.device, dtype: torch.dtype | None = None) -> M:
    """A copy of a model without weights, to be made inside `fake_tensors`; tied weights stay tied.

    model: on the meta device, or real; dtype: of floating-point parameters, None for their own
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        own = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        empty = torch.empty(parameter.shape, dtype=own, device=device)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(model, memo)


def quantize_fake_(model: nn.Module, tracker: MemoryTracker, label: str) -> Tensor:
    """Put the weights of linear layers into 4 bits; returns what holds them. Each is dequantized while it computes."""
    layers = quantizable_layers(model)
    num_bytes = round(BYTES_PER_WEIGHT * sum(layer.weight.numel() for layer in layers))
    held = torch.empty(num_bytes, dtype=torch.uint8, device=next(model.parameters()).device)
    tracker.relabel([held], label)
    tracker.relabel([layer.weight for layer in layers], OFF_DEVICE)
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: _dequantize_fake(layer))
        layer.register_forward_hook(_dequantize_fake_in_backward)
    return held


def _dequantize_fake(layer: Any) -> None:
    torch.empty_like(layer.weight)  # and freed


def _dequantize_fake_in_backward(layer: Any, _: object, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda _: _dequantize_fake(layer))


def spread_fake_teacher_(
    tracker: MemoryTracker, teacher: nn.Module, config: TeacherPlacementConfig, precision: Precision
) -> None:
    """Take the layers of a spread teacher that are elsewhere off the device; a tensor of one that computes there is on
    it for that time.
    """
    places = spread_over_devices(teacher, config, precision.device, precision.dtype, has_student=True)
    for name, place in places.items():
        if place == place_of(precision.device):
            continue
        layer = teacher.get_submodule(name)  # all that is no layer is on the device
        tracker.relabel(layer.parameters(), OFF_DEVICE)
        if isinstance(place, str):
            largest = max(weight.nbytes for weight in layer.parameters())

            def copy_one(*_, largest: int = largest) -> None:
                torch.empty(largest, dtype=torch.uint8, device=precision.device)  # and freed

            layer.register_forward_pre_hook(copy_one)

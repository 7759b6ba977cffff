"""Fewer experts in each block of a mixture-of-experts model: the ones that a text uses most."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from sar_kd.data.batch import TokenBatch
from sar_kd.errors import UsageError
from sar_kd.models.cut.layers import run_backbone
from sar_kd.models.lm_head import text_config_of
from sar_kd.models.pretrained import renew_config_
from sar_kd.teacher.moe.discovery import CONFIG_COUNTS, RouterSpec, experts_of
from sar_kd.teacher.moe.routing_hooks import Routing

_NUMBERS = ("n_experts", "num_classes", "out_features")
"""Attributes of routers and experts that hold the number of experts, under other names than the settings"""


_PRODUCTS = (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)


def require_cuttable(title: str, model: Any, specs: list[RouterSpec]) -> None:
    """Raise UsageError if the model has no experts, or chooses them in groups."""
    kind = type(model).__name__
    if not specs:
        raise UsageError(f"{title}: {kind} has no experts; leave out --experts")
    if (getattr(text_config_of(model), "n_group", None) or 1) > 1:
        raise UsageError(f"{title}: {kind} chooses its experts in groups, which a cut would mix; leave out --experts")


@torch.no_grad()
def count_usage(model: Any, specs: list[RouterSpec], batches: Iterable[TokenBatch]) -> list[Tensor]:
    """How often each expert is among the top k of a token of these batches, int64 [E], for each router."""
    counts = [torch.zeros(spec.num_experts, dtype=torch.int64) for spec in specs]
    with Routing(model, specs, "native") as routing:
        for batch in batches:
            run_backbone(model, batch.input_ids)
            for spec, count, logits in zip(specs, counts, routing.logits, strict=True):
                chosen = logits[batch.positions.to(logits.device)].topk(spec.top_k).indices
                count += torch.bincount(chosen.flatten().cpu(), minlength=spec.num_experts)
    return counts


class _MaskLogits(TorchFunctionMode):
    """Sets the logits of experts to -inf as a router computes them, before it makes weights of them."""

    def __init__(self, num_experts: int, dropped: Tensor):
        super().__init__()
        self.num_experts, self.dropped, self.was_used = num_experts, dropped, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and output.shape[-1] == self.num_experts:
            self.was_used = True
            return output.index_fill(-1, self.dropped.to(output.device), -torch.inf)
        return output


@contextlib.contextmanager
def without_experts(title: str, specs: list[RouterSpec], kept: list[Tensor]) -> Iterator[None]:
    """Let each router choose among these experts alone, int64; nothing else of the model is changed.

    Raises: UsageError, which begins with the title, for a router whose logits are not found
    """
    with contextlib.ExitStack() as stack:
        modes = []
        for spec, indices in zip(specs, kept, strict=True):
            mode = _MaskLogits(spec.num_experts, torch.tensor(sorted({*range(spec.num_experts)} - {*indices.tolist()})))
            modes.append(mode)
            module = spec.module
            stack.enter_context(module.register_forward_pre_hook(lambda *_, mode=mode: mode.__enter__() and None))
            stack.enter_context(
                module.register_forward_hook(lambda *_, mode=mode: mode.__exit__(None, None, None), always_call=True)
            )
        yield
        for spec, mode in zip(specs, modes, strict=True):
            if not mode.was_used:
                kind = type(spec.module).__name__
                raise UsageError(f"{title}: the logits of its {kind} are not found; leave out --experts")


def keep_experts_(title: str, model: Any, specs: list[RouterSpec], kept: list[Tensor]) -> None:
    """Keep these experts of each block, int64, ascending, as many in all; the config follows.

    Raises: UsageError, which begins with the title, if it cannot
    """
    size, count = specs[0].num_experts, len(kept[0])
    for spec, indices in zip(specs, kept, strict=True):
        experts: Any = experts_of(spec.block)
        if isinstance(experts, nn.ModuleList):
            for index in sorted({*range(size)} - {*indices.tolist()}, reverse=True):
                del experts[index]
        parts = [spec.module] if isinstance(experts, nn.ModuleList) else [spec.module, experts]
        for tensor in (each for part in parts for each in (*part.parameters(), *part.buffers())):
            if tensor.ndim and tensor.shape[0] == size:
                tensor.data = tensor.data.index_select(0, indices.to(tensor.device))
    parts = [each for spec in specs for each in (*spec.module.modules(), experts_of(spec.block))]
    for modules, names in ((model.modules(), CONFIG_COUNTS), (parts, _NUMBERS)):
        for module, name in itertools.product(modules, names):
            if getattr(module, name, None) == size:
                setattr(module, name, count)
    renew_config_(
        title, model, lambda settings: settings | {k: count for k in CONFIG_COUNTS if settings.get(k) == size}
    )

"""How much each layer, and each run of layers, changes the hidden states of a text: what the depth is cut by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.data.batch import TokenBatch
from sar_kd.errors import UsageError
from sar_kd.models.cut.layers import input_states, output_states, run_backbone


@dataclass(frozen=True)
class LayerInfluence:
    """1 - cos(h_i, h_j) for the hidden states h_i before layer i, averaged over tokens.

    Source: Men et al., 2024 (ShortGPT, section 3: block influence); Gromov et al., 2024 (angular distance of a run of
    layers)
    """

    cosines: Tensor
    """float64 [L + 1, L + 1]: the mean over tokens of cos(h_i, h_j); h_L leaves the last layer"""
    num_tokens: int

    @property
    def num_layers(self) -> int:
        return len(self.cosines) - 1

    def of(self, first: int, stop: int) -> float:
        """That of the layers first to stop - 1 together, from 0 to 2."""
        return 1.0 - self.cosines[first, stop].item()

    def of_each(self) -> list[float]:
        """That of each layer alone."""
        return [self.of(index, index + 1) for index in range(self.num_layers)]

    def least(self, size: int, num_last: int) -> int:
        """The first of the `size` layers in a row that change the least, the last `num_last` layers not among them."""
        return min(range(self.num_layers - num_last - size + 1), key=lambda first: self.of(first, first + size))


@torch.no_grad()
def measure_influence(title: str, model: Any, layers: nn.ModuleList, batches: Iterable[TokenBatch]) -> LayerInfluence:
    """The influence of a model's layers on the tokens of these batches, in one pass, in the model's dtype.

    Raises: UsageError, which begins with the title, if the hidden states are not finite, or all 0 at a token
    """
    states: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(input_states(args, kwargs))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        states.append(output_states(output))

    total = torch.zeros(len(layers) + 1, len(layers) + 1, dtype=torch.float64)
    num_tokens = 0
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(before, with_kwargs=True))
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(after))
        for batch in batches:
            states.clear()
            run_backbone(model, batch.input_ids)
            positions = batch.positions.to(states[0].device)
            units = torch.stack([state.flatten(0, 1)[positions].float() for state in states])  # [L + 1, N, D]
            units = (units / units.norm(dim=-1, keepdim=True)).flatten(1)
            total += (units @ units.T).double().cpu()  # over tokens and dimensions at once
            num_tokens += len(positions)
    if not total.isfinite().all():
        raise UsageError(f"{title}: its hidden states are not finite, or 0, so no influence of a layer is known")
    return LayerInfluence(total / num_tokens, num_tokens)

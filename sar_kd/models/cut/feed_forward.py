"""The feed-forward parts of a model, and their inner channels: how strong each is on a text, and which are kept.

down(act(gate(x)) * up(x)), or down(act(up(x))): a channel is a row of gate and up, and a column of down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.errors import UsageError
from sar_kd.models.cut.layers import run_backbone
from sar_kd.models.lm_head import text_config_of
from sar_kd.models.pretrained import renew_config_

_FORMS = (
    (("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"), (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"), (("c_fc",), "c_proj"), (("dense_h_to_4h",), "dense_4h_to_h"), (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
)  # fmt: skip
"""Names that models give to the layers before the activation, and to the one behind it"""

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""Settings that hold the number of channels"""


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward part."""

    before: tuple[nn.Module, ...]
    """Linear layers with an output for each channel, or two: gates, then the others"""
    down: nn.Module
    """The linear layer with an input for each channel"""

    def keep_(self, kept: Tensor, size: int) -> None:
        """Keep these of `size` channels, int64, ascending."""
        for module in self.before:
            rows = torch.cat([kept + first for first in range(0, _sizes(module)[1], size)])
            _select_(module, rows, is_output=True)
        _select_(self.down, kept, is_output=False)


def find_feed_forward(title: str, model: Any) -> tuple[list[FeedForward], str, int]:
    """The feed-forward parts of all layers, the setting that holds their width, and the width.

    Raises: UsageError, which begins with the title, if there are none of a known form, or they differ in width
    """
    found = []
    for module in model.modules():
        children = dict(module.named_children())
        for before, down in _FORMS:
            if {*before, down} <= children.keys() and all(_is_linear(children[name]) for name in (*before, down)):
                part = FeedForward(tuple(children[name] for name in before), children[down])
                size = _sizes(part.down)[0]
                if all(_sizes(each)[1] in (size, 2 * size) for each in part.before):
                    found.append(part)
                break
    settings = text_config_of(model).to_dict()
    setting = next((key for key in _WIDTHS if key in settings and type(settings[key]) in (int, type(None))), "")
    size = settings.get(setting) or max((_sizes(part.down)[0] for part in found), default=0)  # None: by the class
    parts = [part for part in found if _sizes(part.down)[0] == size]  # experts that all tokens share may be narrower
    if not setting or not parts:
        raise UsageError(
            f"{title}: {type(model).__name__} has no feed-forward parts of a known form, or no setting for their "
            "width; leave out --intermediate"
        )
    return parts, setting, size


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; GPT-2's Conv1D holds its weight transposed."""
    first, second = module.weight.shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)


def _select_(module: Any, kept: Tensor, is_output: bool) -> None:
    is_linear, kept = isinstance(module, nn.Linear), kept.to(module.weight.device)
    module.weight.data = module.weight.data.index_select(0 if is_output == is_linear else 1, kept).contiguous()
    if is_output and module.bias is not None:
        module.bias.data = module.bias.data.index_select(0, kept)
    names = ("in_features", "out_features") if is_linear else ("nx", "nf")
    setattr(module, names[is_output], len(kept))


@torch.no_grad()
def channel_norms(model: Any, parts: list[FeedForward], batches: Iterable[Any]) -> list[Tensor]:
    """For each part the L2 norm of every channel over the tokens of the batches, float64 [I]."""
    sums = [torch.zeros(_sizes(part.down)[0], dtype=torch.float64) for part in parts]
    positions = torch.zeros(0)

    def add(index: int) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            sums[index] += args[0].flatten(0, -2)[positions].float().square().sum(0).double().cpu()

        return hook

    with contextlib.ExitStack() as hooks:
        for index, part in enumerate(parts):
            hooks.enter_context(part.down.register_forward_pre_hook(add(index)))
        for batch in batches:
            positions = batch.positions.to(next(model.parameters()).device)
            run_backbone(model, batch.input_ids)
    return [each.sqrt() for each in sums]


@contextlib.contextmanager
def without_channels(parts: list[FeedForward], kept: list[Tensor]) -> Iterator[None]:
    """Let the other channels be 0."""

    def mask(indices: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple) -> tuple:
            states = torch.zeros_like(args[0])
            states[..., indices] = args[0][..., indices]
            return (states,)

        return hook

    with contextlib.ExitStack() as hooks:
        for part, indices in zip(parts, kept, strict=True):
            hooks.enter_context(part.down.register_forward_pre_hook(mask(indices)))
        yield


def keep_channels_(title: str, model: Any, parts: list[FeedForward], kept: list[Tensor], setting: str) -> None:
    """Keep these channels of each part, as many in all; the config follows. Raises: UsageError if it cannot"""
    size = _sizes(parts[0].down)[0]
    for part, indices in zip(parts, kept, strict=True):
        part.keep_(indices, size)
    for module in model.modules():
        if getattr(module, setting, None) == size:
            setattr(module, setting, len(kept[0]))
    renew_config_(title, model, lambda settings: settings | {setting: len(kept[0])})

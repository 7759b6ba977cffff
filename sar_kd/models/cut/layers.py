"""The decoder layers of a causal language model: found by running it, left out for a forward, or cut.

What a layer is follows from no class name: a list of modules is the layers if each takes hidden states [B, T, D] and
hands on hidden states, and the next one takes just those.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.errors import UsageError
from sar_kd.models.cut.layer_settings import keep_layer_settings
from sar_kd.models.lm_head import backbone_of, in_eval_mode, text_config_of
from sar_kd.models.pretrained import renew_config_

_NUMBER_OF_A_LAYER = re.compile(r"(layer|block)_?(idx|id|index|number|num)")
"""Attributes that hold a layer's place, from 0"""


def find_layers(title: str, model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder layers of a model, and their name in it.

    Raises: UsageError, which begins with the title, if no list of modules, or more than one, behaves as layers do
    """
    count = getattr(text_config_of(model), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = {name: found for name, found in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    found = [(name, layers) for name, layers in outer.items() if _hands_on(model, layers)]
    if len(found) != 1:
        raise UsageError(
            f"{title}: the layers of {type(model).__name__} cannot be found ({len(found)} lists of {count} modules "
            "hand hidden states on from one to the next); its depth cannot be cut here"
        )
    return found[0]


def input_states(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The hidden states that a layer was called with."""
    return args[0] if args else kwargs.get("hidden_states")


def output_states(output: Any) -> Any:
    """The hidden states that a layer has returned."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def _hands_on(model: Any, layers: nn.ModuleList) -> bool:
    """Does each of these modules run once, in order, on what the one before returned?"""
    calls: list[tuple[nn.Module, Any, Any]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((module, input_states(args, kwargs), output_states(output)))

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(record, with_kwargs=True))
        run_backbone(model, torch.arange(4)[None])
    if [module for module, _, _ in calls] != list(layers):
        return False
    states = [state for _, *pair in calls for state in pair]
    if any(not isinstance(state, Tensor) or state.shape[:2] != (1, 4) or state.ndim != 3 for state in states):
        return False
    pairs = itertools.pairwise(calls)
    return all(before.shape == after.shape and torch.equal(before, after) for (_, _, before), (_, after, _) in pairs)


def run_backbone(model: Any, input_ids: Tensor) -> None:
    """One forward without the LM head, in eval mode, for the hooks; input_ids: int64 [B, T]"""
    embedding = model.get_input_embeddings().weight
    with in_eval_mode(model), torch.no_grad():
        backbone_of(model)(input_ids=(input_ids % len(embedding)).to(embedding.device), use_cache=False)


@contextlib.contextmanager
def without_layers(layers: nn.ModuleList, dropped: Collection[int]) -> Iterator[None]:
    """Let these layers hand on the hidden states that they are given."""

    def pass_on(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        states = input_states(args, kwargs)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with contextlib.ExitStack() as hooks:
        for index in dropped:
            hooks.enter_context(layers[index].register_forward_hook(pass_on, with_kwargs=True))
        yield


def keep_layers_(title: str, model: Any, name: str, kept: Sequence[int]) -> None:
    """Keep these layers of the list of that name, ascending, and no others; the config follows.

    Raises: UsageError, which begins with the title, if the config cannot follow
    """
    path, _, attribute = name.rpartition(".")
    layers = model.get_submodule(name)
    for new, old in enumerate(kept):
        for module in layers[old].modules():
            for key, value in vars(module).items():
                if _NUMBER_OF_A_LAYER.fullmatch(key) and type(value) is int and value == old:
                    setattr(module, key, new)
    setattr(model.get_submodule(path), attribute, nn.ModuleList(layers[index] for index in kept))
    attributes, count = text_config_of(model).attribute_map, "num_hidden_layers"
    renew_config_(
        title,
        model,
        lambda settings: {
            **keep_layer_settings(settings, len(layers), kept), attributes.get(count, count): len(kept),
        },
    )  # fmt: skip


def check_follows(title: str, model: Any, rebuilt: Any) -> None:
    """Compare a model that was cut with one that was built from its config, which may be on the meta device.

    Tensors, their shapes, and what each module keeps as plain values: a window, a scale, a kind of attention.
    Raises: UsageError naming what the config cannot say
    """
    own, other = ({key: tuple(value.shape) for key, value in each.state_dict().items()} for each in (model, rebuilt))
    differing = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
    kind = f"{title}: {type(model).__name__} cannot be cut so, because its config cannot say it"
    if differing:
        key = differing[0]
        shapes = [list(each[key]) if key in each else "missing" for each in (own, other)]
        raise UsageError(f"{kind} ({key} is {shapes[0]}, by the config {shapes[1]}); make another cut")
    modules = dict(rebuilt.named_modules())
    for name, module in model.named_modules():
        values, others = _plain_values(module), _plain_values(modules[name])
        for key in sorted(values.keys() & others.keys()):
            if values[key] != others[key]:
                shown = f"{name or 'model'}.{key} is {values[key]}, by the config {others[key]}"
                raise UsageError(f"{kind} ({shown}); make another cut")


def _plain_values(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and key != "training" and not key.startswith("_")
    }


def spread_evenly(num_layers: int, count: int) -> list[int]:
    """`count` of the layers at equal distances, the first and the last among them; the first alone if it is one."""
    return [round(index * (num_layers - 1) / max(1, count - 1)) for index in range(count)]


def shown_layers(indices: Sequence[int]) -> str:
    """Ascending numbers as ranges: '0-5, 8, 10-11'; 'none'."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][-1] + 1 == index:
            ranges[-1].append(index)
        else:
            ranges.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ranges) or "none"

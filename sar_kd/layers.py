"""The blocks of a model that follow one another, and how each may be computed twice instead of kept."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that follow one another in `model`, each of which takes and returns hidden states."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_activations_(model: nn.Module, same_dropout: bool = False) -> int:
    """Let each layer of `model` compute its activations anew in backward instead of keeping them; how many do.

    Around the layers' own `forward`, so that nothing has to be in training mode: transformers' own switch does nothing
    in eval mode, and in training mode dropout and the routers' noise would come with it.
    same_dropout: draw again what the forward drew, for a model in training mode
    """
    layers = layers_of(model)
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward, same_dropout)
    return len(layers)


def _recomputed(forward, same_dropout: bool, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=same_dropout, **kwargs)
